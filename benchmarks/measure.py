"What all benchmarks share: contestants measured in turns, medians with their spread, Markdown, the machine."

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd

REPEATS = 7


def interleave(contestants, repeats=REPEATS, warmup=1, clock=time.perf_counter, before=None):
    """Seconds of each of `contestants`, functions by name, in turns: whatever else the machine does meets all of them
    alike.

    Returns a table with one column per contestant and one row per repeat. `before(name)` runs before each measurement,
    outside of it."""
    rows = []
    for repeat in range(-warmup, repeats):
        names = list(contestants)
        row = {}
        for name in names if repeat % 2 else reversed(names):  # none is always the first or the last
            if before:
                before(name)
            start = clock()
            contestants[name]()
            row[name] = clock() - start
        if repeat >= 0:
            rows.append({name: row[name] for name in names})
    return pd.DataFrame(rows)


def summary(seconds, baseline=None, units=1, unit="item"):
    """Median, spread and ratio of each contestant of `interleave`.

    `units`: how many a run handles, a number or one per contestant. `faster than BASELINE` is the median over the
    repeats of the ratio within one repeat, so a slow moment of the machine touches both sides; its spread is the range
    from the lower to the upper quartile."""
    n = pd.Series(units, index=seconds.columns) if not isinstance(units, pd.Series) else units
    ms = seconds * 1e3 / n
    table = pd.DataFrame({f"ms per {unit}": ms.median(), "quartiles": spread(ms), f"{unit}s/s": (1e3 / ms).median()})
    if baseline is not None:
        ratio = (seconds[baseline] / n[baseline]).to_numpy()[:, None] / (seconds / n)
        table[f"x {baseline}"], table["quartiles of x"] = ratio.median(), spread(ratio)
    return table


def spread(table, digits=3):
    "Lower and upper quartile of each column, as text"
    low, high = table.quantile(0.25), table.quantile(0.75)
    number = lambda v: f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.{digits}g}"
    return pd.Series([f"{number(a)}-{number(b)}" for a, b in zip(low, high)], index=table.columns)


def markdown(table, digits=3):
    "A table with its index as the first column; numbers to `digits` significant digits, whole from 1,000 on"
    cell = lambda v: (f"{v:,.0f}" if abs(v) >= 1000 else f"{v:.{digits}g}") if isinstance(
        v, (float, np.floating)) else str(v)
    head = [table.index.name or "", *map(str, table.columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join([str(i), *map(cell, row)]) + " |"
                              for i, row in zip(table.index, table.itertuples(index=False))])


def processor():
    "Name of the processor, as the system tells it"
    try:
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def machine(*packages):
    "One sentence on where this ran: processor, cores, accelerator, versions"
    import os

    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    accelerator = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    versions = []
    for package in ("torch", *packages):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    return (f"Ran on {processor()}, {cores} cores{accelerator}, {platform.system()}, Python "
            f"{platform.python_version()}, {', '.join(versions)}.")


def write_report(path, title, *parts):
    "A Markdown file of a title and paragraphs or tables, printed as well"
    text = "\n\n".join([f"# {title}", *parts]) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(text)
    return text
