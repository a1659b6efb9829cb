"""A store of 16 bits against the same planes as TIFF files with LZW, read by tifffile.

`--data` is a folder of TIFF files, a plane each, read as one site; those that have no LZW are written with it. Without
it the site is noise like that of a camera: smooth light, photons counted, an offset and the noise of reading out. All
contestants read the same site in turns, in one thread, and write the same thing into the same memory, uint16
(channels, height, width).
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"})

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import tifffile  # noqa: E402
from measure import REPEATS, interleave, machine, markdown, summary, write_report  # noqa: E402

from rcic_fastai.data.pack import pack_sites  # noqa: E402

STORES = {f"store, {preset}": dict(preset=preset) for preset in ("default", "small", "fast", "windows")}
STORES |= {"store, zarr": dict(format="zarr"), "store, raw": dict(format="raw")}
LZW = "TIFF with LZW, tifffile"


def camera_noise(n_channels=6, side=1080, seed=0):
    "One site, uint16 (C, H, W): cells on a dim ground, seen by a camera of 16 bits"
    rng, y = np.random.default_rng(seed), np.linspace(0, 12 * np.pi, side)
    light = np.clip(np.sin(y)[:, None] * np.sin(1.3 * y) + 0.2, 0, None)
    planes = [rng.poisson(60 + (200 + 150 * c) * light) * 2 + 100 + rng.normal(0, 3, light.shape)
              for c in range(n_channels)]
    return np.clip(np.rint(planes), 0, 65535).astype(np.uint16)


def sites_in(data):
    "Sites of a folder by the name of its folders; planes in the order of their names"
    files = sorted(p for p in Path(data).rglob("*") if p.suffix.lower() in (".tif", ".tiff"))
    if not files:
        raise SystemExit(f"{data}: no TIFF files")
    groups = {}
    for f in files:
        groups.setdefault(f.parent, []).append(f)
    return list(groups.values()), [np.stack([tifffile.imread(f) for f in planes]) for planes in groups.values()]


def with_lzw(path):
    with tifffile.TiffFile(path) as f:
        return f.pages[0].compression == tifffile.COMPRESSION.LZW


def written(pixels, folder, files=None):
    "A table of sites whose planes are TIFF files with LZW: copies of `files` that have it, others written"
    rows = []
    for i, planes in enumerate(pixels):
        for c, plane in enumerate(planes):
            to = folder / f"s{i}_w{c}.tif"
            if files and with_lzw(files[i][c]):
                shutil.copyfile(files[i][c], to)
            else:
                tifffile.imwrite(to, plane, compression="lzw")
        rows.append(dict(site_id=f"E_1_A01_{i}", id_code="E_1_A01", split="train", cell_type="cells", experiment="E",
                         plate=1, well="A01", well_type="treatment", sirna=0, site=i,
                         files=str(folder / f"s{i}_w{{channel}}.tif")))
    return pd.DataFrame(rows)


def size_of(folder, pattern):
    return sum(f.stat().st_size for f in folder.rglob(pattern) if f.is_file())


def measured(pixels, folder, repeats, files=None):
    "Table of the contestants: milliseconds, bytes"
    (folder / "files").mkdir()
    sites = written(pixels, folder / "files", files)
    channels = [f"{c}[0-65535]" for c in range(len(pixels[0]))]
    readers, sizes = {}, {LZW: size_of(folder / "files", "*.tif")}
    paths = [[f.replace("{channel}", str(c)) for c in range(len(channels))] for f in sites.files]

    into = np.empty_like(pixels[0])  # memory that is used again, as loaders do

    def read_lzw():
        for planes in paths:
            for plane, path in zip(into, planes):
                plane[...] = tifffile.imread(path)

    def reader(store):
        def read():
            for i in range(len(store)):
                store.read_into(i, into)

        return read

    for name, settings in STORES.items():
        out = folder / name.replace(", ", "_")
        store = pack_sites(sites, out, channels, bits=16, progress=False, workers=1, **settings)
        for i, x in enumerate(pixels):
            if not np.array_equal(store.read(i), x):
                raise ValueError(f"{name}: the pixels are not those of the files")
        sizes[name] = sum(size_of(out / part, "*") for part in ("shards", "plates", "images.ome.zarr"))
        readers[name] = reader(store)
    seconds = interleave({LZW: read_lzw, **readers}, repeats)
    table = summary(seconds, LZW, units=len(pixels), unit="site")
    table["MB"] = pd.Series(sizes) / 1e6 / len(pixels)
    table["of the bytes"] = pd.Series(sizes) / sizes[LZW]
    table["of the pixels"] = pd.Series(sizes) / sum(x.nbytes for x in pixels)
    table.index.name = "contestant"
    return table


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of TIFF files, a site per folder; default: camera-like noise")
    parser.add_argument("--source", help="what they are, for the report")
    parser.add_argument("--repeats", type=int, default=3 * REPEATS)
    parser.add_argument("--quick", action="store_true", help="a small site, few repeats")
    parser.add_argument("--out", type=Path, help="file of the report; default: benchmarks/results/store16.md")
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    sets, repeats = {}, 3 if args.quick else args.repeats
    if args.data:
        sets["real"] = (args.source or "Files of a microscope", *sites_in(args.data))
    sets["noise"] = ("Noise like that of a camera", None, [camera_noise(side=128 if args.quick else 1080)])
    tables, parts = {}, []
    for key, (name, files, pixels) in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            tables[key] = measured(pixels, Path(folder), repeats, files)
        c, h, w = pixels[0].shape
        n = f"{len(pixels)} sites" if len(pixels) > 1 else "A site"
        parts += [f"## {name}", f"{n} of {c} channels, {h}x{w} pixels, {pixels[0].nbytes / 1e6:.3g} MB each.",
                  markdown(tables[key])]
    out = args.out or (Path(tempfile.mkdtemp()) if args.quick else Path(__file__).parent / "results") / "store16.md"
    write_report(out, "Stores of 16 bits", "One thread. All contestants read the same sites in turns, from files that "
                 f"the system holds in memory; medians over {repeats} repeats, lower and upper quartile behind them. "
                 "Every pixel of every contestant was compared with the files.", *parts,
                 machine("tifffile", "imagecodecs", "blosc2", "zarr"))
    return tables


if __name__ == "__main__":
    main()
