"""The published systems side by side: one small network, one number of images, simulated screens with known truth.

`make bench NAME=recipes` runs it in about 20 minutes on one core. It can be stopped and started again: a training that
has finished is kept in `--work`, and is done again only if one of its settings has changed. What differs between the
rows is what a recipe is about: batches, loss, optimiser, schedule, stages, BatchNorm statistics, the way from scores to
labels. Learning rates come from `--select`, on a screen of another seed and its held-out training experiments.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import batch_effect  # first: it sets the number of threads  # isort: skip
import pandas as pd
from batch_effect import job_key, ready_screen, spread
from measure import machine, markdown, write_report

FOUR = ("efficientnet_b5_amsoftmax", "densenet201_amsoftmax", "efficientnet_b2_crossentropy", "seresnext101_amsoftmax")
SYSTEMS = {**dict.fromkeys(FOUR, "83rd place"), "densenet121_accumulate": "ten-day log",
           "resnext50_accumulate": "ten-day log", "densenet121_domain_bn": "44th place"}
ORIGINALS = ("seresnext101_amsoftmax", "densenet121_accumulate")
# what sets it apart from densenet121_accumulate once both have the same network
VIRTUAL_BATCH = {"resnext50_accumulate": 60}
DESIGN = dict(n_sirnas=32, n_train=4, n_test=3, cell_types=("HUVEC", "RPE"), n_positive=3, image_size=64, effect=0.3,
              batch_effect=1.5)
SELECT = dict(n_train=5, n_test=0, seed=100)
RATES, SELECT_VIEWS = (1e-3, 4e-3, 1.2e-2, 3.6e-2), 1920
QUICK = dict(n_sirnas=4, n_train=2, n_test=1, n_positive=1, image_size=32)
SCORES = {"validation": "validation", "argmax": "test: argmax", "own": "test: its own way",
          "exact": "test: exact + plate groups"}
FORMS = {"exact": "exact + plate groups", "vote": "vote of the plates", "vote_zero": "vote, others 0"}


# The contestants


def images_shown(recipe, design, held=1):
    """Images that pass through the network, or through those of all cell types, in all stages; `held` experiments of
    each cell type are set aside, not their controls"""
    types, n = len(design["cell_types"]), design["n_train"] - held
    sites, controls = 2 * design["n_sirnas"] * types * n, 2 * (design["n_positive"] + 1) * 4 * types * held
    return (batch_effect.images_shown(recipe, {**design, "n_train": n}) + sites * recipe.cell_type.epochs
            + controls * recipe.pretrain.epochs)


def within_budget(name, views, design, held=1, lr=None, faithful=False):
    "A recipe on the laptop's network with as many epochs, its stages in proportion, as come closest to `views` images"
    from rcic_fastai.recipe.published import get_recipe, laptop_recipe

    recipe = get_recipe(name, faithful)
    options = [replace(laptop_recipe(recipe, e, lr, VIRTUAL_BATCH.get(name, 32)), name=recipe.name)
               for e in range(2, 40)]
    return min(options, key=lambda r: abs(images_shown(r, design, held) - views))


def chosen_rates(path):
    """Learning rates that were best on held-out experiments, by recipe: by the mean of both accuracies, because
    argmax alone is a matter of a few wells"""
    if not path.exists():
        return {}
    table = pd.read_csv(path)
    best = table.assign(mean=table.argmax + table.exact).sort_values(["mean", "rate"], ascending=[False, True])
    return best.groupby("recipe").rate.first().to_dict()


def contestants(args):
    "Name -> recipe"
    rates = chosen_rates(args.out / "recipe_rates.csv")  # missing ones: those of `laptop_rates`
    made = lambda n, faithful: within_budget(n, args.views, args.design, 1, rates.get(n), faithful)
    return {n: made(n, False) for n in args.recipes} | {f"{n}-faithful": made(n, True) for n in ORIGINALS
                                                        if n in args.recipes}


# One training and its predictions


@cache
def opened(folder):
    "A screen, and the truth of its test wells"
    from rcic_fastai.screen.read import read_screen

    truth = folder / "truth.csv"
    return read_screen(folder), pd.read_csv(truth)[["id_code", "sirna"]] if truth.exists() else None


def counter():
    "Callback that counts images and optimiser steps of all stages"
    from fastai.callback.core import Callback

    class Count(Callback):
        images = steps = 0

        def before_batch(self):
            self.images += len(self.xb[0]) if self.training else 0

        def after_step(self):
            self.steps += 1

    return Count()


def run_job(work, job):
    "Train once and predict; folder with the predictions of wells and `result.json`, which comes last"
    import torch

    from rcic_fastai.run.predict import predict_run
    from rcic_fastai.run.train import train_run
    from rcic_fastai.recipe.settings import recipe_from_dict

    torch.set_num_threads(1)
    folder, run = work / "results" / job_key(job), work / "runs" / job_key(job)
    if (folder / "result.json").exists():
        return folder
    screen, recipe, count = opened(ready_screen(work, job["screen"]))[0], recipe_from_dict(job["recipe"]), counter()
    quiet = dict(say=lambda *a: None)
    shutil.rmtree(run, ignore_errors=True)
    start = time.process_time()
    train_run(screen, recipe, run, valid=job["valid"], cbs=[count], **quiet)
    trained = time.process_time()
    for split in ("valid", "test") if job["screen"]["n_test"] else ("valid",):
        predict_run(run, screen, split, progress=False, **quiet).wells().save(folder / f"{split}.npz")
    result = dict(images=count.images, steps=count.steps, train_seconds=trained - start,
                  predict_seconds=time.process_time() - trained)
    shutil.rmtree(run, ignore_errors=True)
    partial_file = folder / f".result.{os.getpid()}"
    partial_file.write_text(json.dumps(result))
    os.replace(partial_file, folder / "result.json")
    return folder


def run_all(args, jobs):
    "One job after the other; yields (key, job, folder)"
    start = time.time()
    for n, (key, job) in enumerate(jobs.items(), 1):
        folder = run_job(args.work, job)
        print(f"{n}/{len(jobs)} {time.time() - start:5.0f} s  {', '.join(map(str, key))}", flush=True)
        yield key, job, folder


def loaded(folder):
    "Predictions by split"
    from rcic_fastai.predict.core import Predictions

    return {s: Predictions.load(folder / f"{s}.npz") for s in ("valid", "test") if (folder / f"{s}.npz").exists()}


# Scores


def share(p, wells, groups=None, method="exact"):
    "Accuracy by argmax, or with plate groups"
    from rcic_fastai.predict.submission import score_submission
    from rcic_fastai.predict.assign import assign_predictions

    table = assign_predictions(p, one_to_one=False) if groups is None else assign_predictions(p, groups, method=method)
    return score_submission(table[["id_code", "sirna"]], wells[wells.id_code.isin(table.id_code)])


def scores(work, job, predictions, method):
    "The columns of the table"
    from rcic_fastai.screen.groups import plate_groups

    screen, truth = opened(ready_screen(work, job["screen"]))
    known = screen.wells[screen.wells.split == "train"]
    p, groups = predictions["test"], plate_groups(known)
    return dict(validation=share(predictions["valid"], known[["id_code", "sirna"]]), argmax=share(p, truth),
                own=share(p, truth, groups, method), exact=share(p, truth, groups))


def blends(work, job, members):
    "Rows of the blends of one seed"
    from rcic_fastai.predict.blend import blend_predictions, blend_weights

    valid, test = ({n: p[s] for n, p in members.items()} for s in ("valid", "test"))
    screen = opened(ready_screen(work, job["screen"]))[0]
    for name, weights in (("equal weights", None),
                          ("weights chosen on validation", blend_weights(valid, screen.wells))):
        both = dict(valid=blend_predictions(valid, weights), test=blend_predictions(test, weights))
        used = both["test"].made["weights"]
        yield dict(recipe=f"blend, {name}", weights=" ".join(f"{used[n]:.2f}" for n in members),
                   **scores(work, job, both, job["recipe"]["inference"]["assignment"]))


def compare(args, methods):
    "All trainings and blends: a row per method and seed"
    n = args.design["n_train"]
    last = "experiment=" + ",".join(f"{c}-{n:02}" for c in args.design["cell_types"])
    # an original sets single wells of all experiments aside, here as many as there are in one experiment of each cell
    # type
    valid = lambda recipe: f"well=0/{n}" if recipe.valid else last
    jobs = {(name, seed): dict(screen={**args.design, "seed": seed}, recipe=asdict(replace(recipe, seed=seed)),
                               valid=valid(recipe))
            for seed in args.seeds for name, recipe in methods.items()}
    rows, members = [], {}
    for (name, seed), job, folder in run_all(args, jobs):
        predictions = loaded(folder)
        row = scores(args.work, job, predictions, methods[name].inference.assignment)
        rows.append(dict(system=SYSTEMS[name.removesuffix("-faithful")], recipe=name, seed=seed, **row,
                         **json.loads((folder / "result.json").read_text())))
        if name in FOUR:
            members.setdefault(seed, {})[name] = predictions
    for seed, those in members.items():
        if len(those) > 1:
            rows += [dict(system="83rd place", seed=seed, **r)
                     for r in blends(args.work, jobs[next(iter(those)), seed], those)]
    order = [*[n for n in methods if n in FOUR], "blend, equal weights", "blend, weights chosen on validation",
             *[n for n in methods if n not in FOUR]]
    return pd.DataFrame(rows).sort_values(["recipe", "seed"], key=lambda c: c.map(order.index) if c.name == "recipe"
                                          else c, ignore_index=True)


# Learning rates, on held-out training experiments of another screen


def select(args):
    "Validation accuracy of the recipes of the 83rd place and of the ten-day log at every learning rate"
    from rcic_fastai.screen.groups import plate_groups

    screen = {**args.design, **SELECT}
    held = [f"{c}-{i:02}" for c in screen["cell_types"] for i in (SELECT["n_train"] - 1, SELECT["n_train"])]
    jobs, rows = {}, []
    for name in args.recipes:
        for rate in RATES if SYSTEMS[name] != "44th place" else ():
            recipe = within_budget(name, args.select_views, screen, 2, rate)
            jobs[name, rate] = dict(screen=screen, recipe=asdict(replace(recipe, seed=SELECT["seed"])),
                                    valid="experiment=" + ",".join(held))
    for (name, rate), job, folder in run_all(args, jobs):
        wells = opened(ready_screen(args.work, job["screen"]))[0].wells
        p, result = loaded(folder)["valid"], json.loads((folder / "result.json").read_text())
        groups = plate_groups(wells[~wells.experiment.isin(held)])
        rows.append(dict(recipe=name, rate=rate, seed=SELECT["seed"], argmax=share(p, wells[["id_code", "sirna"]]),
                         exact=share(p, wells[["id_code", "sirna"]], groups), images=result["images"],
                         steps=result["steps"]))
    args.out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(args.out / "recipe_rates.csv", index=False, float_format="%.4f")
    print(table.pivot(index="recipe", columns="rate", values=["argmax", "exact"]).round(3).to_string())
    print(chosen_rates(args.out / "recipe_rates.csv"))


# Tables


def summary(table, methods):
    "Mean and standard deviation over the seeds, one row per recipe"
    t = table.groupby(["system", "recipe"], sort=False)
    out = t[list(SCORES)].agg(spread).rename(columns=SCORES)
    counts = t[["images", "steps"]].mean()
    for c in ("images", "steps"):
        out[c] = [f"{v:,.0f}" if v == v else "" for v in counts[c]]
    out = out.reset_index("recipe")
    lr = {n: f"{r.train.lr:g}" for n, r in methods.items()}
    way = {n: FORMS[r.inference.assignment] for n, r in methods.items()}
    blend = next((way[n] for n in methods if n in FOUR), "")
    out.insert(1, "learning rate", out.recipe.map(lr).fillna(""))
    out.insert(list(out).index(SCORES["own"]) + 1, "which is", out.recipe.map(way).fillna(blend))
    return out


def blend_gains(table):
    "The blends against the member that is best on validation, seed by seed"
    t, rows = table[table.recipe.isin(FOUR)], []
    best = t.sort_values("validation", ascending=False, kind="stable").groupby("seed").first()
    for name, b in table[table.recipe.str.startswith("blend")].groupby("recipe", sort=False):
        gain = b.set_index("seed")[list(SCORES)] - best[list(SCORES)]
        rows.append({"": name.removeprefix("blend, "), **{SCORES[k]: spread(gain[k]) for k in SCORES},
                     "smallest on validation": f"{gain.validation.min():+.3f}"})
    return pd.DataFrame(rows).set_index("") if rows else None


def corrections(table):
    "Corrected minus original, seed by seed; `own` compares each with its own way to labels"
    rows = []
    for name in ORIGINALS:
        new, old = (table[table.recipe == n].set_index("seed")[list(SCORES)] for n in (name, f"{name}-faithful"))
        if len(new):
            gain, gap = new - old, {"corrected": new.validation - new.argmax, "original": old.validation - old.argmax}
            rows.append({"": name, **{SCORES[k]: spread(gain[k]) for k in SCORES},
                         **{f"validation minus test, {k}": spread(v) for k, v in gap.items()}})
    return pd.DataFrame(rows).set_index("") if rows else None


def rates_table(path):
    "Accuracy on held-out experiments by learning rate"
    if not path.exists():
        return None
    t = pd.read_csv(path)
    wide = t.assign(both=[f"{a:.3f} / {b:.3f}" for a, b in zip(t.argmax, t.exact)]).pivot(
        index="recipe", columns="rate", values="both")
    return wide.reindex([n for n in SYSTEMS if n in wide.index]).rename(columns="{:g}".format)


def report(args, table, methods):
    "CSV of all rows, and a page a person reads"
    args.out.mkdir(parents=True, exist_ok=True)
    table.round(4).to_csv(args.out / "recipes.csv", index=False)
    d, seconds = args.design, table[["train_seconds", "predict_seconds"]].sum().sum()
    wells = {s: n * d["n_sirnas"] * len(d["cell_types"]) for s, n in (("validation", 1), ("test", d["n_test"]))}
    parts = [f"`make bench NAME=recipes`, {len(args.seeds)} seeds ({', '.join(map(str, args.seeds))}: each its own "
             f"screen and training), chance {1 / d['n_sirnas']:.3f}; "
             f"mean ± standard deviation over the seeds. {machine('fastai', 'timm')} {seconds:.0f} s of computing in "
             "one thread.",
             "All recipes have the same small network in place of their own (`laptop_recipe`) and are shown about the "
             "same number of images, all stages together; "
             f"one training experiment of each cell type is set aside (up to {wells['validation']} wells), "
             f"{d['n_test']} test experiments of each are scored with "
             f"the known truth (up to {wells['test']} wells a seed). `images` and `steps` were counted while training. "
             "So the table compares losses, batches, schedules and "
             "stages, not the published networks, and a recipe with large virtual batches takes few steps at this "
             "budget.",
             "## Recipes", markdown(summary(table, methods))]
    if (gains := blend_gains(table)) is not None:
        parts += ["## The blend of the 83rd place against its best member",
                  "Best on validation, seed by seed; differences. Weights that were chosen on the wells they are "
                  "reported on flatter the blend there, and so does calling the "
                  "member with the highest of four validation figures the best: the columns of the test experiments "
                  "are the ones to go by.", markdown(gains)]
    if (gains := corrections(table)) is not None:
        parts += ["## What the corrections bring",
                  "Corrected minus original (`get_recipe(name, faithful=True)`): batches of one experiment instead of "
                  "mixed ones, statistics of that experiment instead of running ones, "
                  "groups masked instead of set to 0 (83rd place), a first convolution that is no copy (here of random "
                  "weights), and whole experiments for validation instead of single wells. The column `validation` "
                  "therefore compares "
                  "different wells; the last two show how far either validation is from the test.", markdown(gains)]
    if (rates := rates_table(args.out / "recipe_rates.csv")) is not None:
        parts += ["## Learning rates",
                  f"`--select`: a screen of seed {SELECT['seed']}, about {SELECT_VIEWS:,} images, argmax / exact "
                  "assignment with plate groups on two held-out training experiments of "
                  "each cell type. The highest mean of the two was taken; the 44th place keeps the rate of "
                  "`laptop_rates`.", markdown(rates)]
    parts += ["## Screens", "```json\n" + json.dumps(d, indent=1) + "\n```",
              "## Settings", *(f"<details><summary>{n}</summary>\n\n```json\n{json.dumps(asdict(r))}\n```\n</details>"
                               for n, r in methods.items())]
    write_report(args.out / "recipes.md", "The published systems at an equal budget", *parts)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of screens and trainings")
    parser.add_argument("--views", type=int, default=3500, help="images shown to the network in a training")
    parser.add_argument("--recipes", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS), help="only these")
    parser.add_argument("--select", action="store_true",
                        help="compare learning rates on held-out training experiments instead")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-recipes"), help="screens and finished trainings")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results",
                        help="where the tables go; with --quick a temporary folder")
    parser.add_argument("--quick", action="store_true", help="tiny screens and trainings: that it runs, no result")
    args = parser.parse_args(argv)
    args.design, args.select_views = dict(DESIGN), SELECT_VIEWS
    if args.quick:
        folder = Path(tempfile.mkdtemp())
        args.design.update(QUICK)
        args.seeds, args.views, args.select_views = args.seeds[:1], 1, 1
        args.work, args.out = (folder / k if getattr(args, k) == parser.get_default(k) else getattr(args, k)
                               for k in ("work", "out"))
    return args


def main(argv=None):
    args = arguments(argv)
    if args.select:
        return select(args)
    methods = contestants(args)
    report(args, compare(args, methods), methods)


if __name__ == "__main__":
    sys.exit(main())
