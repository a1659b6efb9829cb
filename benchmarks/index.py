"""The index of a store of a million sites: time to open, memory, and how far apart the sites of a batch lie.

The index is written by the library for simulated rows; no pixels are needed. It is opened in a fresh process for each
repeat. The distances are those between the end of one site and the start of the next, in the order in which
`read_batch` reads them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import xxhash
from measure import REPEATS, machine, markdown, spread, write_report

OPEN = """
import json, resource, sys, time
import pandas, pyarrow.parquet  # noqa: F401
from rcic_fastai.data.store import Store
memory = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() / 1e6
before, start = memory(), time.perf_counter()
store = Store(sys.argv[1])
n = len(store.sites)
opened, after = time.perf_counter() - start, memory()
start = time.perf_counter()
store.rows(store.sites.site_id[-2:])
print(json.dumps(dict(n=n, seconds=opened, megabytes=after-before, first_lookup=time.perf_counter()-start,
                      megabytes_then=memory()-before)))
"""


def simulated_index(n, shard_sites=256, seed=0):
    """Rows of `n` sites in the layout of RxRx1: 4 plates of 308 wells and 2 sites per experiment, bytes as the
    default preset has them"""
    i, rng = np.arange(n), np.random.default_rng(seed)
    experiment, plate, well, site = i // 2464, i // 616 % 4 + 1, i % 616 // 2, i % 2 + 1
    cell = np.array(["HEPG2", "HUVEC", "RPE", "U2OS"])[experiment % 4]
    names = pd.Series(cell) + "-" + pd.Series(experiment).astype(str).str.zfill(3)
    wells = pd.Series(np.array([f"{r}{c:02}" for r in "BCDEFGHIJKLMNO" for c in range(2, 24)])[well])
    ids = names + "_" + pd.Series(plate).astype(str) + "_" + wells
    length = rng.integers(450_000, 750_000, n)
    start = np.concatenate([np.cumsum(length[a : a + shard_sites]) - length[a : a + shard_sites]
                            for a in range(0, n, shard_sites)])
    return pd.DataFrame(dict(site_id=ids + "_" + pd.Series(site).astype(str), id_code=ids, split="train",
                             cell_type=cell, experiment=names, plate=plate,
                             well=wells, well_type="treatment", sirna=pd.array(i % 1108, dtype="Int64"), site=site,
                             offset=start, length=length,
                             checksum=rng.integers(0, 2**63, n).astype(np.uint64)))


def write_store(folder, table, shard_sites=256):
    "A store without its shards"
    from rcic_fastai.data.pack import write_index
    from rcic_fastai.data.store import _KINDS

    folder.mkdir(parents=True, exist_ok=True)
    write_index(table, folder / "sites.parquet")
    manifest = dict(kind=_KINDS[8], format="blosc2", preset="default", shape=[6, 512, 512], channels=[1, 2, 3, 4, 5, 6],
                    composite=False, size=None,
                    n_sites=len(table), shard_sites=shard_sites, tables=[],
                    files={"sites.parquet": xxhash.xxh3_64_hexdigest((folder / "sites.parquet").read_bytes())})
    (folder / "manifest.json").write_text(json.dumps(manifest))


def opening(folder, repeats):
    "One row per fresh process"
    return pd.DataFrame(
        [json.loads(subprocess.run([sys.executable, "-W", "ignore", "-c", OPEN, str(folder)], check=True,
                                   capture_output=True, text=True).stdout)
         for _ in range(repeats)])


def distances(table, batches, shard_sites=256, ordered=True):
    """Megabytes between the end of a site and the start of the next within each batch, and the files that a batch
    touches"""
    ends = table.length.groupby(np.arange(len(table)) // shard_sites).sum().cumsum().to_numpy()
    shard = np.arange(len(table)) // shard_sites
    start = np.concatenate([[0], ends[:-1]])[shard] + table.offset.to_numpy()
    gaps, files = [], []
    for rows in batches:
        rows = np.sort(rows) if ordered else np.asarray(rows)
        gaps.append(np.abs(start[rows[1:]] - (start + table.length.to_numpy())[rows[:-1]]) / 1e6)
        files.append(len(set(shard[rows])))
    return np.concatenate(gaps), np.array(files)


def seeks(table, bs=32, most=20_000):
    "Distances for random batches and for batches of one domain"
    from rcic_fastai.data.domains import domain_keys, shuffled_domains

    part = table[:125_510]  # as many sites as RxRx1 has
    rows = {}
    for name, domain, ordered in [("random, as drawn", None, False), ("random", None, True),
                                  ("cell type", "cell_type", True), ("experiment", "experiment", True),
                                  ("plate, as drawn", "plate", False), ("plate", "plate", True)]:
        batches = shuffled_domains(domain_keys(part, domain), bs)[: most // bs]
        gap, files = distances(part, batches, ordered=ordered)
        rows[name] = {"median MB": np.median(gap), "90 % within MB": np.quantile(gap, 0.9),
                      "MB from first to last site": gap.sum() / len(batches),
                      "files per batch": files.mean()}
    return pd.DataFrame(rows).T.rename_axis("sites of a batch")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--quick", action="store_true", help="20,000 sites and 2 repeats, to see that it works")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "index.md")
    args = parser.parse_args(argv)
    if args.quick:
        args.sites, args.repeats = 20_000, 2
    table = simulated_index(args.sites)
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder), table)
        size = (Path(folder) / "sites.parquet").stat().st_size / 1e6
        runs = opening(folder, args.repeats)
    names = {"seconds": "open, with the table of all sites: s", "megabytes": "memory of it: MB",
             "first_lookup": "first look-up of a site by name: s",
             "megabytes_then": "memory after it: MB"}
    figures = runs[list(names)].rename(columns=names)
    summary = pd.DataFrame({"median": figures.median(), "quartiles": spread(figures)}).rename_axis("what")
    far = seeks(table)
    write_report(args.out, "The index of a packed store", __doc__.strip(), machine("pandas", "pyarrow"), "## Opening",
                 f"{args.sites:,} sites, {size:.0f} MB on disk, {args.repeats} fresh processes (libraries imported "
                 "before the clock starts).", markdown(summary),
                 "## Reading order",
                 "Batches of 32 of 125,510 sites of 0.6 MB, as many as RxRx1 has. `read_batch` reads a batch in stored "
                 "order; "
                 "*as drawn* is what it would be without that.", markdown(far))
    return summary, far


if __name__ == "__main__":
    main()
