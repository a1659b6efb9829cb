"""Describing a folder of 86,400 files, and every later `read_screen`, side by side with an earlier commit.

The folder has 5 plates of 384 wells, 9 fields and 5 channels, in the names of Harmony with an index for each plate, and
in free names; nothing is said about either. The files are tiny, so that what is measured is the walk, the names and
the tables.
The earlier commit, by default the one before the room of formats, is taken out of the history of this checkout and
imported by processes of its own. Each process imports the library, describes the folder into a new one, and reads
that; the contestants take turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
from measure import machine, markdown, spread, write_report
from PIL import Image

ROOT = Path(__file__).parents[1]
NOW, BEFORE = "rcic_fastai", "earlier commit"
GOALS = {"describe": 0.25, "read_screen": 0.08}  # of the time of the commit before the room of formats
ROWS = "ABCDEFGHIJKLMNOP"

# A process: libraries first, then the clock
WORK = """
import json, sys, time, warnings
from pathlib import Path
warnings.filterwarnings("ignore")
import rcic_fastai
from rcic_fastai.screen.describe import describe_screen
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.sites import site_files
assert Path(rcic_fastai.__file__).resolve().parents[1] == Path(sys.argv[1]).resolve(), rcic_fastai.__file__
images, out, reads = json.loads(sys.argv[2])
start = time.perf_counter()
screen = describe_screen(images, out=out, say=lambda *a: None)
described, read = time.perf_counter() - start, []
for _ in range(reads):
    start = time.perf_counter()
    screen = read_screen(out)
    read.append(time.perf_counter() - start)
sites = screen.sites()
first, last = (str(site_files(sites.files.iloc[i], screen.channels)[0]) for i in (0, -1))
print(json.dumps(dict(describe=described, read=sorted(read)[len(read) // 2], sites=len(sites),
                      wells=len(screen.wells), channels=len(screen.channels), first=first, last=last)))
"""


# The folders


def harmony_name(plate, row, column, field, channel):
    return f"Plate{plate}/Images/r{row + 1:02}c{column + 1:02}f{field:02}p01-ch{channel}sk1fk1fl1.tiff"


def free_name(plate, row, column, field, channel):
    return f"Plate{plate}/{ROWS[row]}{column + 1:02}_s{field}_w{channel}.tif"


NAMINGS = {"Harmony, with an index": harmony_name, "free names": free_name}


def places(plates, rows, columns, fields, channels):
    return [(p, r, c, f, ch) for p in range(1, plates + 1) for r in range(rows) for c in range(columns)
            for f in range(1, fields + 1) for ch in range(1, channels + 1)]


def tiny_images(folder, n, seed=0):
    "Paths of `n` images of 8 x 8 pixels and 16 bits"
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(n):
        Image.fromarray(rng.integers(100, 4000, (8, 8), dtype=np.uint16)).save(folder / f"{i}.tif")
    return [folder / f"{i}.tif" for i in range(n)]


def harmony_index(images):
    "An index of a plate: an entry per image, with the names of the channels"
    stain = ["DAPI", "ER", "RNA", "AGP", "Mito", "BF"]
    entries = "".join(
        f"<Image><id>{r + 1:02}{c + 1:02}K1F{f}P1R{ch}</id><URL>{Path(path).name}</URL><Row>{r + 1}</Row>"
        f"<Col>{c + 1}</Col><FieldID>{f}</FieldID><PlaneID>1</PlaneID><ChannelID>{ch}</ChannelID>"
        f"<ChannelName>{stain[(ch - 1) % 6]}</ChannelName><ImageResolutionX>5.97e-07</ImageResolutionX>"
        f"<PositionX>{f * 1e-4:.6f}</PositionX><PositionY>0</PositionY><AbsTime>2021-03-29T16:51:44</AbsTime>"
        f"<MainEmissionWavelength>{400 + 50 * ch}</MainEmissionWavelength></Image>"
        for path, (_, r, c, f, ch) in images)
    return ('<?xml version="1.0" encoding="utf-8"?><EvaluationInputData '
            'xmlns="http://www.perkinelmer.com/PEHH/HarmonyV5"><MeasurementStartTime>2021-03-29T16:51:44'
            f"</MeasurementStartTime><Images>{entries}</Images></EvaluationInputData>")


def write_folder(folder, name, shape):
    "A screen: hard links to a few tiny images, a plate map, and an index of each plate where the names are Harmony's"
    folder.mkdir()
    at = [(name(*p), p) for p in places(*shape)]
    few = tiny_images(folder.with_name(f"{folder.name}-pixels"), shape[0] * shape[4])
    for plate in sorted({Path(path).parent for path, _ in at}):
        (folder / plate).mkdir(parents=True)
    for path, (plate, *_, channel) in at:
        os.link(few[(plate - 1) * shape[4] + channel - 1], folder / path)
    if name is harmony_name:
        for plate in range(1, shape[0] + 1):
            text = harmony_index([(path, p) for path, p in at if p[0] == plate])
            (folder / f"Plate{plate}" / "Images" / "Index.idx.xml").write_text(text)
    wells = [(p, f"{ROWS[r]}{c + 1:02}", "DMSO" if c % 12 == 0 else f"compound-{r * shape[2] + c}")
             for p in range(1, shape[0] + 1) for r in range(shape[1]) for c in range(shape[2])]
    pd.DataFrame(wells, columns=["plate", "well", "treatment"]).to_csv(folder / "plates.csv", index=False)
    return len(at)


# The contestants


def earlier_commit():
    "The commit before the room of formats, None outside of a checkout with its history"
    git = ["git", "-C", str(ROOT), "log", "--diff-filter=A", "--format=%H", "--", "nbs/14_screen.formats.ipynb"]
    try:
        added = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split()
        back = ["git", "-C", str(ROOT), "rev-parse", "--verify", f"{added[-1]}~1"]
        return subprocess.run(back, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, IndexError, subprocess.CalledProcessError):
        return None


def take_out(commit, folder):
    "The package of a commit in a folder"
    data = subprocess.run(["git", "-C", str(ROOT), "archive", commit, "rcic_fastai"], capture_output=True)
    if data.returncode:
        raise ValueError(f"--against {commit} is no commit of this checkout: {data.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(data.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run_once(package, images, out, reads):
    "What a fresh process with this package measures"
    env = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
           "PYTHONDONTWRITEBYTECODE": ""}
    job = json.dumps([str(images), str(out), reads])
    done = subprocess.run([sys.executable, "-c", WORK, str(package), job], env=env, cwd=package, capture_output=True,
                          text=True)
    if done.returncode:
        raise RuntimeError(f"{package}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder, packages, naming, repeats, reads, clock=run_once):
    "A row per repeat and contestant, who take turns; ends with an error if they find other sites"
    rows, found = [], {}
    for repeat in range(repeats):
        for who in list(packages) if repeat % 2 else reversed(packages):
            out = folder.with_name(f"{folder.name}-{len(rows)}")
            said = clock(packages[who], folder, out, reads)
            found[who] = {k: said[k] for k in ("sites", "wells", "channels", "first", "last")}
            if found[who] != next(iter(found.values())):
                raise RuntimeError(f"{naming}: the contestants find other sites: {found}")
            rows.append(dict(repeat=repeat, who=who, describe=said["describe"], read_screen=said["read"]))
    return pd.DataFrame(rows), found[NOW]


def ratios(rows):
    "Time of ours by that of the earlier commit, within each repeat"
    by = rows.pivot(index="repeat", columns="who", values=["describe", "read_screen"])
    return pd.DataFrame({what: by[what][NOW] / by[what][BEFORE] for what in GOALS})


def summary(rows):
    "Median seconds and quartiles of each contestant, and ratios where there are two"
    lines = {}
    for what in GOALS:
        for who in rows.who.unique():
            seconds = rows.loc[rows.who == who, what]
            lines[f"{what}, {who}"] = {"seconds": seconds.median(), "quartiles": spread(seconds.to_frame("s")).iloc[0]}
        if rows.who.nunique() == 2:
            r = ratios(rows)[what]
            lines[f"{what}, {NOW}"] |= {"of the earlier commit": f"{r.median():.3f}",
                                        "range": f"{r.min():.3f}-{r.max():.3f}", "goal": f"{GOALS[what]}"}
    return pd.DataFrame(lines).T.fillna("").rename_axis("what")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", help="commit; by default the one before the room of formats; none: ours alone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="2 plates of 24 wells and 1 repeat, to see that it works")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "screens.md")
    args = parser.parse_args(argv)
    shape = (2, 4, 6, 2, 5) if args.quick else (5, 16, 24, 9, 5)
    repeats = 1 if args.quick else args.repeats
    commit = earlier_commit() if args.against is None else None if args.against == "none" else args.against
    parts, tables = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        packages = {NOW: ROOT}
        if commit:
            packages[BEFORE] = take_out(commit, Path(scratch) / "earlier")
        for i, naming in enumerate(NAMINGS):
            folder = Path(scratch) / f"screen{i}"
            n = write_folder(folder, NAMINGS[naming], shape)
            if not args.quick:  # the folder is in memory for all
                run_once(ROOT, folder, folder.with_name(f"warm{i}"), 1)
            rows, found = measure(folder, packages, naming, repeats, 1 if args.quick else 3)
            tables[naming] = rows
            parts += [f"## {naming}", f"{n:,} files, {found['sites']:,} sites of {found['wells']:,} wells, "
                      f"{found['channels']} channels; {repeats} fresh processes of each.", markdown(summary(rows))]
    said = (f"Earlier commit: {commit[:12]}. *Of the earlier commit* is the median over the repeats of the ratio "
            "within one repeat. It guesses Harmony's names too, and reads no index."
            if commit else "There is no earlier commit here to compare with.")
    load = f" The load of the machine was {os.getloadavg()[0]:.1f} at the end." if hasattr(os, "getloadavg") else ""
    write_report(args.out, "Describing and reading a screen of many files", __doc__.strip(),
                 machine("pandas", "pyarrow", "numpy") + load, said, *parts)
    return tables


if __name__ == "__main__":
    main()
