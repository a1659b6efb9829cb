"""Methods against the batch effect on simulated screens: one table over methods, seeds and strengths.

`make bench NAME=batch_effect` runs it at its default size in less than 30 minutes on two cores. It can be stopped and
started again: a training that has finished is kept in `--work`, and is done again only if one of its settings has
changed. All methods have the same network and show it the same number of images, but for the default as it comes,
which chooses its epochs itself. No setting was chosen by looking at
test labels: learning rates come from `--select`, which holds training experiments of screens of other seeds out and
never looks at their test split.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

# one thread per process, one process per core
os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
warnings.filterwarnings("ignore")

import pandas as pd  # noqa: E402

SCREENS = {"default": dict(effect=0.22, batch_effect=2.0), "hard": dict(effect=0.18, batch_effect=2.5),
           # the second family, whose cameras are not monotone
           "optics": dict(effect=0.5, family="optics"), "hard optics": dict(effect=0.5, family="hard_optics")}
DESIGN = dict(n_sirnas=40, n_train=6, n_test=4, cell_types=("HUVEC", "RPE"), n_positive=2, image_size=64)
SELECT_SEEDS, RATES = (100,), (5e-4, 1.5e-3, 4e-3, 1.2e-2)


# The contestants


def images_shown(recipe, design):
    "Images that pass through the network in all stages of training"
    types, plates = len(design["cell_types"]), 4
    # sites of one experiment of each type
    treated, controls = 2 * design["n_sirnas"] * types, 2 * (design["n_positive"] + 1) * plates * types
    sites, n_test = treated * design["n_train"], treated * design["n_test"]
    extra = {None: 0, "train": controls * design["n_train"],
             "all": controls * (design["n_train"] + design["n_test"])}[recipe.data.control_classes]
    beside = 1 + recipe.data.n_controls * recipe.data.domains_per_batch / recipe.data.batch_size
    p, n = recipe.pseudo, recipe.train.epochs
    shares = [] if p.start is None else [p.first + (p.last - p.first) * (e - p.start) / max(1, n - 1 - p.start)
                                         for e in range(p.start, n)]
    return round(beside * ((sites + extra) * (n + recipe.finetune.epochs) + sum(shares) * n_test)
                 + controls * design["n_train"] * recipe.pretrain.epochs)


def within_budget(recipe, views, design, **network):
    """The recipe with as many epochs, its stages in proportion, as come closest to `views` images

    On the laptop's network, or another by its settings."""
    from rcic_fastai.recipe.published import laptop_recipe

    options = [replace(laptop_recipe(recipe, epochs=e, lr=recipe.train.lr, **network), name=recipe.name)
               for e in range(3, 80)]
    return min(options, key=lambda r: abs(images_shown(r, design) - views))


def contestants(views, design, rates=None):
    "Name -> (recipe, settings of prediction, strengths it runs at)"
    from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe

    rates = rates or {}  # None: those that `laptop_recipe` knows, which --select has found
    s3 = change_recipe(laptop_recipe(get_recipe("densenet121_domain_bn"), 100, rates.get("44th place")),
                       "per_cell_type=false")
    bare = change_recipe(s3, "finetune.epochs=0")
    single = change_recipe(bare, "train.accumulate=1", "pretrain.accumulate=1")
    first = laptop_recipe(get_recipe("densenet161_first_place"), 100, rates.get("1st place"))
    ours = laptop_recipe(get_recipe("densenet161_domain_batches"), 100, rates.get("ours"))
    both, every = ["default", "hard"], list(SCREENS)
    out = {"44th place: eval-mode BatchNorm": (single, dict(batchnorm="running", bagging=[]), ["default"]),
           "44th place: batch statistics": (single, {}, every),
           "44th place: + virtual batch": (bare, {}, ["default"]),
           "44th place: + MixUp fine-tuning": (s3, {}, both),
           "1st place": (first, {}, every),
           "1st place, domain statistics": (first, dict(batchnorm="domain", domain="experiment"), both),
           "ours": (ours, {}, every),
           "ours, eval-mode BatchNorm, no centring": (ours, dict(batchnorm="running", postprocess=None), both),
           "ours, no centring": (ours, dict(postprocess=None), every)}
    batches = change_recipe(laptop_recipe(get_recipe("laptop"), 100, rates.get("batches")), "data.standardize=image")
    for domain, name in ((None, "random"), ("cell_type", "cell type"), ("experiment", "experiment"),
                         ("plate", "plate")):
        recipe = change_recipe(batches, f"data.domain={json.dumps(domain)}", "data.epoch_sites=0", "data.crop=null")
        out[f"batches: {name}"] = (recipe, dict(batchnorm="domain", domain=domain or "screen"), ["default"])
    out["laptop, the default of 0.1"] = (laptop_recipe(get_recipe("laptop"), 100), {}, every)
    methods = {k: (within_budget(r, views, design), inference, at) for k, (r, inference, at) in out.items()}
    return methods | {DEFAULT: (default_of(design), {}, every)}


DEFAULT = "default, as it comes"


def default_of(design):
    "What `rcic-train` takes where no recipe is named; it chooses its epochs itself, and shows more images"
    from rcic_fastai.recipe.default import default_epochs
    from rcic_fastai.recipe.published import change_recipe, get_recipe

    n_sites = 2 * design["n_sirnas"] * design["n_train"] * len(design["cell_types"])
    return change_recipe(get_recipe(), f"train.epochs={default_epochs(n_sites, design['image_size'])}",
                         "data.cache=true")


# One training and its predictions


def job_key(job):
    return hashlib.sha1(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]


def ready_screen(work, settings):
    "Folder of a simulated screen, made once"
    from rcic_fastai.screen.simulate import simulate_screen

    folder = work / "screens" / job_key(settings)
    if not (folder / "done").exists():
        simulate_screen(folder, **settings, workers=1, progress=False)
        (folder / "done").write_text("")
    return folder


def run_job(work, job):
    "Train once, predict with every variant; the result is a file, so that it is never done twice"
    import torch

    from rcic_fastai.files import write_json
    from rcic_fastai.predict.assign import accuracy_ladder
    from rcic_fastai.train.inference import predict_with
    from rcic_fastai.run.train import control_sites, needs_controls, train_run
    from rcic_fastai.screen.groups import plate_groups
    from rcic_fastai.screen.read import read_screen
    from rcic_fastai.data.select import select_sites
    from rcic_fastai.recipe.settings import recipe_from_dict

    torch.set_num_threads(1)
    result = work / "results" / f"{job_key(job)}.json"
    if result.exists():
        return json.loads(result.read_text())
    screen, recipe = read_screen(work / "screens" / job_key(job["screen"])), recipe_from_dict(job["recipe"])
    start, run = time.process_time(), work / "runs" / job_key(job)
    shutil.rmtree(run, ignore_errors=True)
    learn = train_run(screen, recipe, run, valid=job["valid"], say=lambda *a: None)
    trained = time.process_time()
    if job["valid"]:  # selection: the experiments that were held out
        sites = select_sites(screen).query("experiment in @job['valid_experiments']").reset_index(drop=True)
        truth = screen.wells
    else:
        sites, truth = select_sites(screen, "test"), pd.read_csv(screen.path / "truth.csv")
    truth = truth[truth.id_code.isin(sites.id_code)]
    known = screen.wells[screen.wells.split == "train"]
    groups = plate_groups(known[~known.experiment.isin(sites.experiment.unique())])
    rows = []
    for name, inference in job["variants"].items():
        r = replace(recipe, inference=replace(recipe.inference, **inference))
        p = predict_with(learn, sites, r, control_sites(screen) if needs_controls(r) else None,
                         progress=False).only(groups.index)
        ladder = accuracy_ladder({"argmax": p}, truth[["id_code", "sirna"]], groups).accuracy
        rows.append(dict(method=name, argmax=ladder.iloc[0], assignment=ladder.iloc[1], groups=ladder.iloc[2]))
    out = dict(rows=rows, train_seconds=trained - start, predict_seconds=time.process_time() - trained)
    shutil.rmtree(run, ignore_errors=True)
    result.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, out)
    return out


def make_jobs(args, methods, screens):
    "Trainings, each with all the variants of prediction that share it"
    jobs = {}
    for strength, settings in screens.items():
        for seed in args.seeds:
            screen = {**args.design, **settings, "seed": seed}
            for name, (recipe, inference, strengths) in methods.items():
                if strength not in strengths:
                    continue
                recipe = replace(recipe, seed=seed, name=recipe.name)
                job = dict(screen=screen, recipe=asdict(recipe), valid=None, variants={})
                job = jobs.setdefault((strength, seed, json.dumps(asdict(recipe), sort_keys=True)), job)
                job["variants"][name] = inference
    return {(strength, seed, " / ".join(job["variants"])): job for (strength, seed, _), job in jobs.items()}


def run_all(args, jobs):
    "All jobs in parallel; yields (key, job, result)"
    screens = {job_key(j["screen"]): j["screen"] for j in jobs.values()}
    with ProcessPoolExecutor(args.workers) as pool:
        list(pool.map(partial(ready_screen, args.work), screens.values()))
        futures = {pool.submit(run_job, args.work, job): key for key, job in jobs.items()}
        start = time.time()
        for n, future in enumerate(as_completed(futures), 1):
            key, out = futures[future], future.result()
            print(f"{n}/{len(futures)} {time.time() - start:5.0f} s  {', '.join(map(str, key))}: "
                  + "; ".join(f"{r['argmax']:.3f} {r['assignment']:.3f} {r['groups']:.3f}" for r in out["rows"]),
                  flush=True)
            yield key, jobs[key], out


# Learning rates, on held-out training experiments of other screens


def select(args, screens):
    "Validation accuracy of every system at every learning rate"
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    valid = [f"{c}-{i:02}" for c in args.design["cell_types"]
             for i in (args.design["n_train"] - 1, args.design["n_train"])]
    jobs = {}
    for rate in RATES:
        methods = contestants(args.views, args.design,
                              dict.fromkeys(("44th place", "1st place", "ours", "batches"), rate))
        for name in args.select or ("44th place: + MixUp fine-tuning", "1st place", "ours", "batches: experiment"):
            recipe, inference, _ = methods[name]
            for seed in SELECT_SEEDS:
                screen = {**args.design, **next(iter(screens.values())), "seed": seed}
                jobs[name, rate, seed] = dict(screen=screen, recipe=asdict(replace(recipe, seed=seed)),
                                              valid="experiment=" + ",".join(valid),
                                              valid_experiments=valid, variants={name: inference})
    for (name, rate, seed), _, out in run_all(args, jobs):
        rows.append(dict(method=name, rate=rate, seed=seed, **next(iter(screens.values())),
                         **{k: v for k, v in out["rows"][0].items() if k != "method"}))
    pd.DataFrame(rows).to_csv(args.out / "batch_effect_rates.csv", index=False, float_format="%.4f")
    print(pd.DataFrame(rows).groupby(["method", "rate"])[["argmax", "assignment",
                                                          "groups"]].mean().round(3).to_string())


# Tables


def spread(values):
    return f"{values.mean():.3f} ± {values.std(ddof=1) if len(values) > 1 else 0:.3f}"


def summary(table):
    "Mean and standard deviation over the seeds"
    t = table.groupby(["strength", "method"], sort=False)[["argmax", "assignment", "groups"]].agg(spread).reset_index()
    return t.rename(columns={"argmax": "argmax", "assignment": "+ assignment", "groups": "+ plate groups"})


def differences(table):
    "By how much ours is ahead, seed by seed"
    rows = []
    others = ("44th place: + MixUp fine-tuning", "44th place: batch statistics", "1st place",
              "1st place, domain statistics", "laptop, the default of 0.1")
    for strength, t in table.groupby("strength", sort=False):
        wide = t.pivot(index="seed", columns="method")
        for own, other in [*(("ours", o) for o in others), *((DEFAULT, o) for o in ("ours", *others))]:
            if {own, other} <= set(t.method):
                gain = {s: wide[s][own] - wide[s][other] for s in ("argmax", "assignment", "groups")}
                rows.append({"strength": strength, "method": own, "minus": other,
                             **{k: spread(v) for k, v in gain.items()},
                             "smallest": f"{min(v.min() for v in gain.values()):+.3f}"})
    return pd.DataFrame(rows)


def gains(table):
    "What each step of the ladder of the 44th place brings, seed by seed, and in how many seeds it helped"
    steps = [("eval-mode BatchNorm", "44th place: eval-mode BatchNorm", "argmax"),
             ("batch statistics", "44th place: batch statistics", "argmax"),
             ("+ virtual batch", "44th place: + virtual batch", "argmax"),
             ("+ assignment", "44th place: + virtual batch", "assignment"),
             ("+ plate groups", "44th place: + virtual batch", "groups"),
             ("+ MixUp fine-tuning", "44th place: + MixUp fine-tuning", "groups")]
    t, rows, before = table[table.strength == table.strength.iloc[0]].set_index(["method", "seed"]), [], None
    for step, method, column in steps:
        if method not in t.index.get_level_values(0):
            return pd.DataFrame()
        now = t.loc[method][column]
        gain = None if before is None else now - before
        helped = "" if gain is None else f"{(gain > 0).sum()} of {len(gain)}"
        rows.append({"step": step, "accuracy": spread(now), "gain": "" if gain is None else spread(gain),
                     "seeds it helped": helped})
        before = now
    return pd.DataFrame(rows)


def markdown(table):
    "A table without a further package"
    lines = [list(map(str, table.columns)), ["---"] * len(table.columns), *table.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(args, table, methods, screens, seconds):
    "CSV of all rows, and a page a person reads, with the exact settings"
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / "batch_effect.csv", index=False, float_format="%.4f")
    budget = {k: images_shown(r, args.design) for k, (r, _, _) in methods.items()}
    chosen = {"--seeds": args.seeds, "--strengths": args.strengths, "--views": [args.views], "--sirnas": [args.sirnas],
              "--methods": args.methods or []}
    usual = vars(arguments([]))
    options = " ".join(f"{k} {' '.join(map(str, v))}" for k, v in chosen.items() if v and v != usual[k[2:]]
                       and v != [usual[k[2:]]])
    command = f'make bench NAME=batch_effect ARGS="{options}"' if options else "make bench NAME=batch_effect"
    parts = ["# The batch effect on simulated screens",
             f"`{command}`, {len(args.seeds)} seeds ({', '.join(map(str, args.seeds))}), "
             f"chance {1 / args.design['n_sirnas']:.3f}; mean ± standard deviation over the seeds (screen and "
             "training). "
             f"{args.workers} processes of one thread, {seconds:.0f} s of computing on {platform.machine()}, Python "
             f"{platform.python_version()}.",
             "## Methods", markdown(summary(table)), "## Ours against the published systems",
             markdown(differences(table)),
             "## The ladder of the 44th place", markdown(gains(table)) if len(gains(table)) else "(not run)",
             "## Screens", "```json\n" + json.dumps({**args.design, **screens}, indent=1) + "\n```",
             "## Recipes", "Images shown in training: " + ", ".join(f"{k} {v:,}" for k, v in budget.items()) + ".",
             *(f"<details><summary>{k}</summary>\n\n```json\n{json.dumps(dict(recipe=asdict(r), prediction=i))}\n```\n"
               "</details>"
               for k, (r, i, _) in methods.items())]
    (args.out / "batch_effect.md").write_text("\n\n".join(parts) + "\n")


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of screens and trainings")
    parser.add_argument("--views", type=int, default=8000, help="images shown to the network in a training")
    parser.add_argument("--strengths", nargs="+", default=list(SCREENS),
                        help="default, hard, or EFFECT:BATCH_EFFECT such as .35:1.8")
    parser.add_argument("--sirnas", type=int, default=DESIGN["n_sirnas"], help="treatment siRNAs of a screen")
    parser.add_argument("--methods", nargs="+", help="only contestants whose name begins so")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="screens and finished trainings")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the tables go")
    parser.add_argument("--select", nargs="*",
                        help="compare learning rates on held-out training experiments instead; names of contestants, "
                        "by default the four families")
    args = parser.parse_args(argv)
    args.design = {**DESIGN, "n_sirnas": args.sirnas}
    return args


def main(argv=None):
    args = arguments(argv)
    screens = {s: SCREENS[s] if s in SCREENS else dict(zip(("effect", "batch_effect"), map(float, s.split(":"))))
               for s in args.strengths}
    if args.select is not None:
        return select(args, screens)
    methods = {k: v for k, v in contestants(args.views, args.design).items() if not args.methods
               or k.startswith(tuple(args.methods))}
    # strengths that somebody else thinks of are for the whole systems
    methods = {k: (r, i, [s for s in screens if s in strengths or s not in SCREENS and "hard" in strengths])
               for k, (r, i, strengths) in methods.items()}
    rows, seconds = [], 0.0
    for (strength, seed, _), _, out in run_all(args, make_jobs(args, methods, screens)):
        seconds += out["train_seconds"] + out["predict_seconds"]
        rows += [dict(strength=strength, seed=seed, **r, train_seconds=round(out["train_seconds"], 1))
                 for r in out["rows"]]
    order = {k: i for i, k in enumerate(methods)}
    table = pd.DataFrame(rows).sort_values(["strength", "method", "seed"],
                                           key=lambda c: c.map(order) if c.name == "method" else c, ignore_index=True)
    table = table.sort_values("strength", key=lambda c: c.map({s: i for i, s in enumerate(screens)}), kind="stable",
                              ignore_index=True)
    report(args, table, methods, screens, seconds)
    print((args.out / "batch_effect.md").read_text().split("## Screens")[0])


if __name__ == "__main__":
    main()
