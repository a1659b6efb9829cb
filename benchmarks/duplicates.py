"""All pairs of perceptual hashes: time and peak memory of the library's search and of two others.

Each run is a fresh process with hashes of its own: random ones, `even` with all bits alike and `skewed` with bits that
hang together as those of images do, 3 % of the first channel blank, and planted twins of known distances. A search that
misses one of them or invents one ends the benchmark with an error.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from measure import REPEATS, machine, markdown, spread, write_report  # noqa: E402

from rcic_fastai.screen.duplicates import find_twins, hash_distance  # noqa: E402

DISTANCE, LIMITS = 6, dict(seconds=60, megabytes=2000)  # of all pairs of 62,000 images with 3 channels
SIZES = 8_000, 31_072, 62_000, 105_678  # the last with 4 channels: training images and external list together


# Hashes


def random_hashes(n, n_channels, kind, rng):
    "uint64 (n, C) with all bits alike, or with those of 12 common factors, so that pairs are nearer than by chance"
    if kind == "even":
        return rng.integers(1, 2**64, (n, n_channels), dtype=np.uint64)
    bits = np.stack(
        [rng.standard_normal((n, 12), np.float32) @ rng.standard_normal((12, 64), np.float32)
         + 2 * rng.standard_normal((n, 64), np.float32) > 0
         for _ in range(n_channels)], 1)
    return np.packbits(bits, axis=-1).view(">u8")[..., 0].astype(np.uint64)


def flipped(h, n, rng):
    "The hash with n bits changed"
    return h ^ sum((np.uint64(1) << np.uint64(b) for b in rng.choice(64, n, replace=False)), np.uint64(0))


def planted(n, n_channels, kind, seed=0, share=0.02):
    """Hashes, and the pairs that are twins: 0 to 6 bits apart in every channel; as many are 7 bits apart in one, and
    no twins"""
    rng = np.random.default_rng(seed)
    h = random_hashes(n, n_channels, kind, rng)
    h[rng.random(n) < 0.03, 0] = 0
    rows = rng.permutation(n)[: 4 * round(share * n / 4)].reshape(-1, 2)
    for k, (i, j) in enumerate(rows):
        h[j] = [flipped(v, d, rng) if v else v for v, d in zip(h[i], rng.integers(0, DISTANCE + 1, n_channels))]
        if k % 2:
            h[j, -1] = flipped(h[i, -1], DISTANCE + 1, rng)
    return h, {tuple(sorted(p)) for p in rows[::2].tolist()}


# Contestants: functions from hashes (N, C) to a set of pairs


def pairs(table):
    return set(zip(table["first"].tolist(), table["second"].tolist()))


def ours(h, threads=None):
    return pairs(find_twins(h, max_distance=DISTANCE, threads=threads))


def plain(h):
    "Each image against all later ones, all channels at once"
    found = set()
    for i in range(len(h) - 1):
        both = (h[i] != 0) & (h[i + 1 :] != 0)
        near = ((hash_distance(h[i], h[i + 1 :]) <= DISTANCE) | ~both).all(1) & both.any(1)
        found.update((i, i + 1 + int(j)) for j in np.flatnonzero(near))
    return found


def index_of_parts(h):
    """Twins agree in at least one of seven parts of the last channel (no blanks there): candidates are pairs of a
    bucket, the buckets one after the other"""
    found, last = set(), h[:, -1]
    for part in np.array_split(np.arange(64, dtype=np.uint64), DISTANCE + 1):
        key = (last >> part[0]) & np.uint64(2 ** len(part) - 1)
        order = np.argsort(key, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(key[order])) + 1):
            for i, j in blocks(rows):
                near = hash_distance(last[i][:, None], last[j]) <= DISTANCE
                a, b = (r[k] for r, k in zip((i, j), np.nonzero(near)))
                both = (h[a] != 0) & (h[b] != 0)
                keep = (a < b) & ((hash_distance(h[a], h[b]) <= DISTANCE) | ~both).all(1)
                found.update(zip(a[keep].tolist(), b[keep].tolist()))
    return found


def blocks(rows, size=1024):
    "Pairs of parts of a bucket; its rows ascend, so earlier parts against themselves and later ones are all pairs"
    for a in range(0, len(rows), size):
        for b in range(a, len(rows), size):
            yield rows[a : a + size], rows[b : b + size]


CONTESTANTS = {"rcic_fastai": ours, "rcic_fastai, 1 thread": lambda h: ours(h, 1), "each against all": plain,
               "index of parts": index_of_parts}


# Measuring


def peak():
    "Megabytes that this process has held at most; NaN where the system does not tell"
    try:
        return next(int(line.split()[1]) / 1e3 for line in Path("/proc/self/status").read_text().splitlines()
                    if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return float("nan")


def run_one(n, n_channels, kind, contestant, seed):
    "One search in this process"
    h, twins = planted(n, n_channels, kind, seed)
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    found = CONTESTANTS[contestant](h)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return dict(seconds=seconds, cpu=cpu, peak=peak(), more=peak() - before, planted=len(twins),
                found=len(found & twins), invented=len(found - twins))


def measure(n, n_channels, kind, contestant, repeats):
    "One row per fresh process"
    rows = []
    for seed in range(repeats):
        command = [sys.executable, "-W", "ignore", __file__, "--one",
                   json.dumps([n, n_channels, kind, contestant, seed])]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return pd.DataFrame(rows)


def row(t, n, n_channels, kind, contestant):
    "A line of the table; raises if a twin was missed or invented"
    if (t.found != t.planted).any() or t.invented.any():
        raise RuntimeError(f"{contestant}, {n:,} {kind} hashes: found {t.found.tolist()} of {t.planted.tolist()} "
                           f"twins, invented {t.invented.tolist()}")
    return {"images": f"{n:,} x {n_channels}", "hashes": kind, "search": contestant, "s": t.seconds.median(),
            "quartiles": spread(t[["seconds"]])["seconds"],
            "CPU s": t.cpu.median(), "ns of CPU per pair": t.cpu.median() * 1e9 / (n * (n - 1) / 2),
            "peak MB": t.peak.max(), "of it for the search": t.more.max(),
            "found": f"{t.found.sum()} of {t.planted.sum()}, {t.invented.sum()} invented"}


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=min(REPEATS, 3), help="fresh processes per row")
    parser.add_argument("--out", type=Path, help="file of the report; default: benchmarks/results/duplicates.md, "
                        "with --quick a temporary one")
    parser.add_argument("--quick", action="store_true", help="2,000 images: that it runs, no result")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp()) if args.quick else Path(__file__).parent / "results"
    args.out = args.out or folder / "duplicates.md"
    return args


def main(argv=None):
    "Measure, write the report; returns the table"
    args = arguments(argv)
    if args.one:
        print(json.dumps(run_one(*args.one)))
        return None
    if args.quick:
        table = pd.DataFrame([row(pd.DataFrame([run_one(2000, 3, kind, name, 0)]), 2000, 3, kind, name)
                              for kind in ("even", "skewed") for name in CONTESTANTS])
    else:
        jobs = [(n, 3 if n < 100_000 else 4, kind, "rcic_fastai") for kind in ("even", "skewed") for n in SIZES]
        jobs += [(n, 3, kind, name)
                 for n, names in ((8_000, CONTESTANTS), (62_000, ["rcic_fastai, 1 thread", "index of parts"]))
                 for kind in ("even", "skewed") for name in names if (n, name) != (8_000, "rcic_fastai")]
        table = pd.DataFrame([row(measure(*job, args.repeats), *job) for job in jobs])
        large = table[(table["images"] == "62,000 x 3") & (table["search"] == "rcic_fastai")]
        if (large["s"] > LIMITS["seconds"]).any() or (large["peak MB"] > LIMITS["megabytes"]).any():
            raise RuntimeError(f"62,000 x 3 hashes took {large['s'].max():.0f} s and {large['peak MB'].max():.0f} MB, "
                               f"the limits are {LIMITS}")
    write_report(
        args.out,
        "Twins among perceptual hashes",
        f"Seconds to compare all pairs of N images by their hashes of C channels, at most {DISTANCE} bits apart in "
        f"each; medians over {args.repeats} fresh process(es), the largest "
        "peak of memory, which includes Python with its libraries. `CPU s` is the work of all threads, which other "
        "programs of the machine hardly change. The limit for 62,000 x 3 is 60 s and 2 GB on 2 cores. 1 % of the "
        "images are twins, 0 to 6 bits "
        "apart in each channel, and 1 % are pairs 7 bits apart in the last; 3 % are blank in the first. Every search "
        "found the former and nothing else, or the "
        "benchmark would have ended with an error.",
        "`even`: all 64 bits are independent. `skewed`: they depend on 12 common factors, so that pairs are nearer "
        "than by chance. `rcic_fastai` is `find_twins`, "
        "which compares everything in blocks; `each against all` is a loop over the images; `index of parts` compares "
        "only what agrees in one of seven parts of "
        "the last channel, which is exact up to 6 bits and depends on how even these are.",
        markdown(table.set_index("images")),
        machine("numpy"),
    )
    return table


if __name__ == "__main__":
    main()
