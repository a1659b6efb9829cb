"""Several labels, from files to a scored submission: what each step is worth on simulated atlases.

The steps are thresholds, views, means of weights, stack and retrieval.

`make bench NAME=hpa` runs it in about 40 minutes on one core. It can be stopped and started again: runs, predictions
and tables that are finished are kept in `--work`. Nothing but the labels of the training images, and of those set aside
from them, chooses anything; the test labels only score.
"""

import argparse
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

os.environ.update({"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "TQDM_DISABLE": "1"})

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from measure import machine, markdown, write_report  # noqa: E402

DESIGN = dict(n_images=1500, n_test=800, n_external=700, image_size=64)
QUICK = dict(n_images=400, n_test=180, n_external=80, image_size=32)
EPOCHS = dict(train=14, lsep=5, arcface=10)
QUICK_EPOCHS = dict(train=1, lsep=1, arcface=1)
OWN = "repeated_f1_shrunk"  # thresholds of all rows that are not about thresholds
LABELS = {
    "fixed": "thresholds: fixed at .5",
    "plain": "one view, last weights, focal loss (reference)",
    "tta8": "8 views (symmetries)",
    "tta32": "32 views, .4 plain + .6 mean",
    "tta32max": "32 views, maximum",
    "lsep": "LSEP fine-tuning, last weights",
    "lsep_mean": "LSEP fine-tuning, mean of the last epochs",
    "other": "another network, focal + Lovász",
    "equal": "mean of the three networks, 32 views",
    "stack": "stack of the three networks",
    "stack_statistics": "stack, with image statistics",
    "retrieval": "reference with retrieval",
    "full": "stack with image statistics, with retrieval",
}


# Data and networks


def ready_atlas(seed, work, design):
    "A simulated atlas, its twins and groups, packed to one size"
    from rcic_fastai.data.hashes import find_duplicates
    from rcic_fastai.data.pack import pack_screen
    from rcic_fastai.screen.atlas import read_hpa
    from rcic_fastai.screen.simulate_atlas import simulate_hpa

    packed = work / f"packed{seed}"
    if not (packed / "manifest.json").exists():
        path = simulate_hpa(work / f"atlas{seed}", **design, seed=seed, workers=1)
        find_duplicates(read_hpa(path), progress=False, say=lambda *a: None)
        pack_screen(read_hpa(path), packed, size=design["image_size"], workers=1, progress=False)
    return read_hpa(packed)


def recipes(seed, epochs, size):
    """The network of the 8th place shrunk, its LSEP stage with and without a mean of the weights, another network,
    one for retrieval"""
    from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe

    common = [f"seed={seed}", "data.read_size=null", f"data.size={size}", "data.batch_size=32"]
    small = laptop_recipe(get_recipe("hpa_seresnext50_focal"), 20)
    stages = [f"train.epochs={epochs['train']}", "finetune.epochs=0", "train.accumulate=1"]
    focal = change_recipe(small, "name=focal", *common, *stages)
    n = epochs["lsep"]
    tune = [f"train.epochs={n}", "train.lr=0.0025", "train.schedule=constant", "train.loss=lsep"]
    other = ["name=other", "loss.name=focal_lovasz", "loss.options={}", 'model.arch="resnet14t"', "model.pool=avg"]
    arcface = laptop_recipe(get_recipe("hpa_resnet50_arcface"), epochs["arcface"])
    return {
        "focal": focal,
        "lsep": change_recipe(focal, "name=lsep", *tune),
        "lsep_mean": change_recipe(focal, "name=lsep_mean", *tune, f"train.average={n}"),
        "other": change_recipe(focal, *other),
        "arcface": change_recipe(arcface, "name=arcface", *common),
    }


def trained(seed, atlas, work, epochs, size):
    "Run folders by name, and the seconds of each training and prediction"
    from rcic_fastai.run.predict import predict_run
    from rcic_fastai.run.folder import read_run
    from rcic_fastai.run.train import train_run

    runs, seconds = {}, {}
    for name, recipe in recipes(seed, epochs, size).items():
        run, start = work / f"runs{seed}" / name, time.time()
        if not (run / "run.json").exists():
            start_with = runs["focal"] if name.startswith("lsep") else None
            if name != "arcface":
                train_run(atlas, recipe, run, valid="fold=0/5", say=lambda *a: None, start=start_with)
            else:  # it must not know the antibodies of the images that choose threshold and weight
                aside = atlas.wells.id_code.isin(read_run(runs["focal"])[1]["valid_wells"])
                train_run(replace(atlas, wells=atlas.wells.assign(antibody=atlas.wells.antibody.mask(aside))), recipe,
                          run, "antibody", say=lambda *a: None)
        seconds[f"train {name}"] = time.time() - start
        for split in () if name == "arcface" else ("valid", "test"):
            start = time.time()
            if not (run / "predictions" / f"{split}.npz").exists():
                predict_run(run, atlas, split, tta="none" if name == "lsep" else "s4", keep_views=True, progress=False,
                            say=lambda *a: None)
            seconds[f"predict {name} {split}"] = time.time() - start
        runs[name] = run
    return runs, seconds


# Scores


def submission_scores(method, valid, y, groups, test, truth):
    "Macro-F1 of the test images with thresholds chosen on those set aside, and of classes by how rare they are"
    from rcic_fastai.labels.threshold import create_threshold
    from rcic_fastai.labels.metrics import f1_scores

    estimator = create_threshold(method).fit(valid, y, groups)
    return f1_scores(truth, estimator.adapt(test).predict(test))


def prior(atlas, runs, ids, p_valid, y, groups, thresholds):
    "Retrieval fitted on images of training and of those set aside; probabilities of both with the prior"
    from rcic_fastai.labels.retrieval import Retrieval
    from rcic_fastai.predict.sites import embed_sites
    from rcic_fastai.run.folder import load_run

    sites = atlas.sites()
    learn = load_run(runs["arcface"], sites)
    x = pd.DataFrame(embed_sites(learn, sites, "running", progress=False), index=sites.id_code)
    known = atlas.wells[atlas.wells.labels.notna()]
    own = pd.Series(range(len(ids["valid"])), index=ids["valid"])
    p = np.full((len(known), p_valid.shape[1]), np.nan, np.float32)
    rows = known.id_code.isin(own.index).to_numpy()
    p[rows] = p_valid[own[known.id_code[rows]]]
    found = Retrieval(decision=thresholds).fit(x.loc[known.id_code].to_numpy(), atlas.labels(known),
                                               known.group.to_numpy(), p)
    gallery = known.set_index("id_code").group
    return found, lambda which, q: found.apply(q, x.loc[ids[which]].to_numpy(), gallery.reindex(ids[which]).to_numpy()
                                               if which == "valid" else None)


def one_seed(seed, args):
    "F1 of every class for each row of the table, and what else was measured"
    from rcic_fastai.all import (Predictions, Stacker, adversarial_report, average_precision, create_threshold,
                                 f1_floors, label_matrix, label_truth,
                                 read_labels, site_statistics)
    from rcic_fastai.labels.threshold import nested_macro_f1, threshold_methods

    start = time.time()
    atlas = ready_atlas(seed, args.work, args.design)
    prepared = time.time() - start
    runs, seconds = trained(seed, atlas, args.work, args.epochs, args.design["image_size"])
    kept = {n: {s: Predictions.load(runs[n] / "predictions" / f"{s}.npz").wells() for s in ("valid", "test")}
            for n in ("focal", "lsep", "lsep_mean", "other")}
    ids = {s: kept["focal"][s].ids for s in ("valid", "test")}
    y, groups = label_truth(atlas, ids["valid"])
    truth = label_matrix(read_labels(args.work / f"packed{seed}" / "truth.csv")[ids["test"]])
    view = lambda n, tta: {s: p.combine(tta).probabilities for s, p in kept[n].items()}
    plain = view("focal", "none")
    score = lambda p, method=OWN: submission_scores(method, p["valid"], y, groups, p["test"], truth)
    rows = {"fixed": score(plain, "constant"), "plain": score(plain)}
    for method in threshold_methods:
        rows[f"thresholds: {method}"] = score(plain, method)
    nested = {m: nested_macro_f1(e, plain["valid"], y, groups, n_repeats=2) for m, e in threshold_methods.items()}
    rows["tta8"], rows["tta32"] = score(view("focal", "d4")), score(view("focal", "s4"))
    rows["tta32max"] = score(view("focal", dict(seeds=4, combine="max")))
    for name in ("lsep", "lsep_mean", "other"):
        rows[name] = score(view(name, "none"))
    members = {n: view(n, "s4") for n in ("focal", "lsep_mean", "other")}
    of = lambda split: {n: p[split] for n, p in members.items()}
    rows["equal"] = score({s: np.mean(list(of(s).values()), 0) for s in ids})
    table, images = {}, atlas.sites().set_index("id_code")
    for s in ids:
        table[s] = site_statistics(images.files[ids[s]], atlas.channels, progress=False, workers=1)
    stacked = {}
    for name, own in {"stack": (None, None), "stack_statistics": (table["valid"], table["test"])}.items():
        stack = Stacker(repeats=args.repeats, seed=seed, progress=False, folder=args.work / f"runs{seed}" / name).fit(
            of("valid"), y, own[0], groups)
        stack.audit()
        stacked[name] = {"valid": stack.oof_, "test": stack.predict(of("test"), own[1])}
        rows[name] = score(stacked[name])
    near = {}
    for name, p in {"retrieval": plain, "full": stacked["stack_statistics"]}.items():
        found, with_prior = prior(atlas, runs, ids, p["valid"], y, groups,
                                  create_threshold(OWN).fit(p["valid"], y, groups).thresholds_)
        rows[name] = score({s: with_prior(s, v) for s, v in p.items()})
        near[name] = dict(threshold=found.threshold_, weight=found.weight_)
    shift = adversarial_report(table["valid"], table["test"])
    return dict(
        seed=seed, f1={k: v.tolist() for k, v in rows.items()}, support=truth.sum(0).tolist(),
        positives=y.sum(0).tolist(), floors=f1_floors(truth).to_dict(),
        nested={m: [v.macro_f1, v.low, v.high, v.in_sample] for m, v in nested.items()}, near=near, prepared=prepared,
        seconds=seconds, total=time.time() - start,
        precision={n: average_precision(truth, p["test"]) for n, p in {"plain": plain, "32 views": view("focal", "s4"),
                                                                       "lsep": view("lsep", "none"),
                                                                       "lsep_mean": view("lsep_mean", "none"),
                                                                       "other": view("other", "none"),
                                                                       **stacked}.items()},
        adversarial={str(k): float(v) for k, v in shift.auc.iloc[:6].items()},
    )


# Report


def differences(results, reference="plain"):
    "Macro-F1 of each row: mean and standard deviation over the seeds, and the difference to the reference"
    macro = pd.DataFrame({r["seed"]: {k: np.mean(v) for k, v in r["f1"].items()} for r in results})
    delta = macro - macro.loc[reference]
    form = lambda m, s: f"{m:.3f} ± {s:.3f}"
    table = pd.DataFrame({"macro-F1": [form(m, s) for m, s in zip(macro.mean(axis=1), macro.std(axis=1, ddof=1))],
                          "gain": [f"{m:+.3f} ± {s:.3f}"
                                   for m, s in zip(delta.mean(axis=1), delta.std(axis=1, ddof=1))],
                          "seeds ahead": [f"{n} of {len(results)}" for n in (delta > 0).sum(axis=1)]},
                         index=macro.index)
    return table, macro


def by_support(results, rows, edges=(0, 6, 20, 60, 10**6)):
    "Mean F1 of classes by how many images set aside have them"
    out = {}
    for low, high in zip(edges, edges[1:]):
        values = {k: [f for r in results for f, n in zip(r["f1"][k], r["positives"]) if low < n + 0.5
                      and low <= n < high] for k in rows}
        out[f"{low}-{high - 1}" if high < 10**6 else f"{low} or more"] = {"classes": len(values[rows[0]]),
                                                                          **{k: float(np.mean(v)) if v else float("nan")
                                                                             for k, v in values.items()}}
    return pd.DataFrame(out).T


def report(results, args):
    table, _ = differences(results)
    methods = [k for k in table.index if k.startswith("thresholds: ")]
    nested = pd.DataFrame({r["seed"]: {m: v[0] for m, v in r["nested"].items()} for r in results}).mean(axis=1)
    inside = pd.DataFrame({r["seed"]: {m: v[3] for m, v in r["nested"].items()} for r in results}).mean(axis=1)
    thresholds = table.loc[methods].rename(index=lambda k: k.removeprefix("thresholds: ")).rename_axis("thresholds")
    thresholds.insert(0, "out of sample, set aside", [f"{nested[m]:.3f}" for m in thresholds.index])
    thresholds.insert(0, "in sample", [f"{inside[m]:.3f}" for m in thresholds.index])
    road = table.loc[[k for k in LABELS if k in table.index]].rename(index=LABELS).rename_axis("")
    precision = pd.DataFrame({r["seed"]: r["precision"] for r in results})
    floors = pd.DataFrame([r["floors"] for r in results]).mean()
    seconds = pd.DataFrame([r["seconds"] for r in results]).mean()
    d = args.design
    first = results[0]
    found = {r['seed']: r['near']['retrieval'] for r in results}
    chosen = '; '.join(f"seed {s}: {r['threshold']:.3f}, {r['weight']:.2f}" for s, r in found.items())
    rare = by_support(results, ["fixed", "thresholds: f1", "thresholds: repeated_f1", "plain", "stack_statistics"])
    rare.columns = ["classes", "fixed at .5", "f1", "repeated_f1", f"{OWN} (reference)", "stack with statistics"]
    return f"""{len(results)} atlases ({', '.join(f"seed {r['seed']}" for r in results)}): {d['n_images']:,} training, \
{d['n_external']:,} external and {d['n_test']:,} test images of {d['image_size']} pixels, 28 classes with the real \
frequencies (rare ones have a few images more),
twins whose labels disagree, cells 15 % larger and 15 % less light in the test set. A fifth of the labelled images, \
whole groups, is set aside (`fold=0/5`) and chooses thresholds,
stack and retrieval. A small ResNet instead of the published networks; {args.epochs['train']} epochs, \
{args.epochs['lsep']} of LSEP. All scores are macro-F1 on the hidden test labels: mean ± standard deviation over the \
seeds;
`gain` is the difference to the reference on the same atlas. Constant answers reach {floors.max():.3f} at most. \
{machine("lightgbm", "timm")}

## What each step is worth

{markdown(road)}

Thresholds of all rows but the first: `{OWN}`, chosen anew for each row.

## Thresholds

One view of the network of the reference. In sample and out of sample (five folds within) on the images set aside, \
then on the test set.

{markdown(thresholds)}

## By how many images set aside have the class

Mean F1 on the test set over classes and seeds.

{markdown(rare.rename_axis("positives"))}

## Ranking alone

Macro average precision on the test set, which needs no thresholds: \
{', '.join(f"{k} {v:.3f}" for k, v in precision.mean(axis=1).items())}.

## Retrieval

Cosine above which a neighbour counts and its weight, as chosen on the images set aside: \
{chosen} (inf: nothing is retrieved).

## Do training and test set look alike?

AUC of simple statistics, images set aside against test images (seed {first['seed']}): \
{', '.join(f"{k} {v:.2f}" for k, v in first['adversarial'].items())}.

## Time

Simulating, finding twins and packing {np.mean([r['prepared'] for r in results]):.0f} s; \
{', '.join(f"{k} {v:.0f} s" for k, v in seconds.items())}. Seconds of one thread; other work ran beside it."""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--work", type=Path, default=Path("runs/bench-hpa"), help="folder for atlases and runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results",
                        help="folder for hpa.md and hpa.json")
    parser.add_argument("--repeats", type=int, default=2, help="of the outer folds of the stack")
    parser.add_argument("--quick", action="store_true", help="small images and one epoch, to see that it runs")
    parser.add_argument("--no-report", action="store_true", help="only compute; another call writes the report")
    args = parser.parse_args(argv)
    args.design, args.epochs = (QUICK, QUICK_EPOCHS) if args.quick else (DESIGN, EPOCHS)
    if args.quick:
        args.repeats = 1
    args.work = args.work / "quick" if args.quick else args.work
    args.work.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in args.seeds:
        path = args.work / f"result{seed}.json"
        if not path.exists():
            result = json.dumps(one_seed(seed, args))
            path.with_suffix(".part").write_text(result)
            path.with_suffix(".part").replace(path)
        results.append(json.loads(path.read_text()))
    if not args.no_report:
        write_report(args.out / "hpa.md", "Several labels on simulated atlases", report(results, args))
        (args.out / "hpa.json").write_text(
            json.dumps([{k: r[k] for k in ("seed", "f1", "support", "positives", "nested", "near", "precision")}
                        for r in results]) + "\n")
    if args.quick:
        shutil.rmtree(args.work)


if __name__ == "__main__":
    main()
