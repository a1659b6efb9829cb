"""Planted faults that quality control finds, and clean sites that it suspects, on simulated screens.

`make bench NAME=quality` simulates a screen of each family and seed, spoils some of its sites and plates
(`plant_faults`), and looks at it (`screen_quality`). The limits were chosen on seeds 0 to 3.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

# one thread; nothing that a bar would say
os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"})

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from measure import machine, markdown, write_report  # noqa: E402

DESIGN = dict(n_sirnas=40, n_positive=30, n_train=4, n_test=1, cell_types=("HUVEC", "RPE"), image_size=64)
SITES, PLATES = 12, 4  # of each fault in a screen
FAMILIES = {"curves": {}, "optics": dict(hot_pixels=0.0)}  # its own hot pixels would hide those that are planted


def died(wells, seed, share):
    "Wells of an optical family in which nearly all cells died: the third number that is drawn for a well"
    from rcic_fastai.screen.morphology import named_rng

    def one(id_code):
        rng = named_rng(seed, "well", id_code)
        rng.standard_normal(), rng.standard_normal()
        return rng.random() < share
    return wells.id_code[[one(i) for i in wells.id_code]]


def spoilt_screen(root, family, seed, design=DESIGN, sites=SITES, plates=PLATES, workers=2):
    "A screen with faults, and their truth"
    from rcic_fastai.screen.faults import plant_faults
    from rcic_fastai.screen.read import read_screen
    from rcic_fastai.screen.simulate import simulate_screen

    simulate_screen(root, **design, family=family, effects=FAMILIES[family], seed=seed, workers=workers, progress=False)
    truth = plant_faults(root, sites, plates, seed)
    return read_screen(root), truth


def judge(q, truth, dead=()):
    "Faults found by kind, and what was suspected of clean sites and plates: name -> (found, of)"
    from rcic_fastai.screen.faults import PLATE_FAULTS, SITE_FAULTS

    said = q.measured.sites[["id_code", "site", "experiment", "plate"]].iloc[q.faults["at"]].reset_index(drop=True)
    said = said.join(q.faults[["fault", "exclude"]])
    key = lambda t: list(zip(t.id_code, t.site))
    found = {}
    for fault in SITE_FAULTS:
        planted = set(key(truth[truth.fault == fault]))
        found[fault] = len(planted & set(key(said[said.fault == fault]))), len(planted)
    plates = lambda t: set(zip(t.experiment, t.plate))
    for fault in PLATE_FAULTS:
        planted, suspected = plates(truth[truth.fault == fault]), plates(said[said.fault == fault])
        found[fault] = len(planted & suspected), len(planted)
        found[f"plates said to have {fault}"] = len(suspected-planted), len(plates(q.sites)-planted)
    originals = set(truth.of.dropna()) - {""}
    everything = set(key(q.measured.sites))
    clean = {k for k in everything - set(key(truth[truth.fault != "hot pixels"])) if f"{k[0]}_{k[1]}" not in originals}
    suspected, of_dead = clean & set(key(said[said.exclude])), {k for k in clean if k[0] in set(dead)}
    found["clean sites"] = len(suspected), len(clean)
    found["of them in wells that died"] = len(suspected & of_dead), len(of_dead)
    return found


def one_screen(family, seed, **settings):
    "A row of the table: (found, of) by kind, seconds a site"
    from rcic_fastai.quality.core import screen_quality
    from rcic_fastai.screen.optics import families

    with tempfile.TemporaryDirectory() as folder:
        screen, truth = spoilt_screen(Path(folder) / "screen", family, seed, **settings)
        start = time.perf_counter()
        q = screen_quality(screen, workers=2, progress=False)
        seconds = time.perf_counter()-start
        dead = died(screen.wells, seed, families[family].dead_wells) if families[family] else ()
        table = q.batch_effect()
    return judge(q, truth, dead), seconds/len(q.measured.sites), table.groupby("what")[["accuracy", "chance"]].mean()


def own_hot_pixels(seed, share=0.001):
    "The hot pixels of an optical family: (found, of), and (wrong, found)"
    from rcic_fastai.quality.core import measure_sites
    from rcic_fastai.screen.optics import _hot
    from rcic_fastai.screen.read import read_screen
    from rcic_fastai.screen.simulate import simulate_screen

    with tempfile.TemporaryDirectory() as folder:
        screen = read_screen(simulate_screen(Path(folder) / "s", 40, 2, 0, ("HUVEC",), 64, family="optics", seed=seed,
                                             effects=dict(hot_pixels=share), workers=2, progress=False))
        m = measure_sites(screen, screen.sites(), workers=2, progress=False)
    right = wrong = of = 0
    for p, hot in m.hot.items():
        at, _ = _hot(seed, m.sites.experiment[m.plates == p].iloc[0], 64, share)
        true, seen = set(map(tuple, np.stack(at, 1).tolist())), set(map(tuple, hot.tolist()))
        right, wrong, of = right+len(true & seen), wrong+len(seen-true), of+len(true)
    return (right, of), (wrong, right+wrong)


def text(pairs):
    "Sum over seeds, and the share"
    k, n = (sum(v) for v in zip(*pairs))
    return f"{k} of {n} ({100*k/n:.1f} %)" if n else "-"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="of screens and faults")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality.md"), help="the table")
    args = parser.parse_args(argv)
    rows, batches, cost = {}, {}, []
    for family in FAMILIES:
        for seed in args.seeds:
            found, seconds, table = one_screen(family, seed)
            for name, pair in found.items(): rows.setdefault(name, {}).setdefault(family, []).append(pair)
            batches.setdefault(family, []).append(table)
            cost.append(seconds)
            print(family, seed, found, f"{1000*seconds:.0f} ms a site", flush=True)
    shown = pd.DataFrame({f: {name: text(v[f]) for name, v in rows.items()} for f in FAMILIES}).rename_axis("what")
    told = pd.DataFrame({(f, w): pd.concat(t).loc[[w]].mean() for f, t in batches.items()
                         for w in ("experiment", "plate")})
    told = told.T.round(3).rename_axis(["family", "what"]).reset_index().set_index("family")
    hot = [own_hot_pixels(s) for s in args.seeds]
    screens = ("Screens of {n_sirnas} treatments, {n_positive} controls, 10 experiments, 40 plates and {image_size} "
               "pixels each; ").format(**DESIGN)
    write_report(args.out, "Quality of images", screens + f"in each {SITES} sites with each "
                 f"fault, {PLATES} plates with hot pixels, {PLATES} shifted by a well. Sums over seeds "
                 f"{', '.join(map(str, args.seeds))}. A fault counts as found under its own name only. The optical "
                 "family has effects of its own: wells that died, sites out of focus, plates that saturate; where "
                 "these are suspected they count as false alarms among the clean sites. Both sites of a duplicate are "
                 "suspected, for nobody knows which is the copy; the original is no clean site. Hot pixels are said "
                 "and leave nothing out.", markdown(shown),
                 "How well batches can be told apart by simple numbers of raw images (mean over what they lie "
                 "within):", markdown(told),
                 f"The optical family's own hot pixels, a thousandth of all: {text([h[0] for h in hot])} found, "
                 f"{text([h[1] for h in hot])} of those that were said are none.",
                 f"{1000*np.mean(cost):.0f} ms a site with two threads.", machine("scikit-image"))


if __name__ == "__main__":
    main()
