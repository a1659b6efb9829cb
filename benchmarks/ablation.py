"""What carries the default recipe: each ingredient taken away, larger budgets, and networks without BatchNorm.

`make bench NAME=ablation` runs it on the hard screens of both families, two hours of CPU per seed. It can be stopped
and started again, on another machine too: a training whose row is in the table is not done again (unless `--anew`), and
table and page are written anew after each.
Learning rates of the networks without BatchNorm come from `--select`: held-out training experiments of another screen.
"""

import argparse
import json
import os
import platform
from dataclasses import asdict, replace
from pathlib import Path

import batch_effect  # first: it sets one thread per process
import pandas as pd
from batch_effect import DESIGN, SCREENS, images_shown, make_jobs, markdown, run_all, spread, within_budget

STEPS = ["argmax", "assignment", "groups"]
# what is taken away -> the settings without it; the second table is of predictions of the training with everything
WITHOUT = {
    "histograms (standardised by image)": ["data.match_histograms=null", "data.standardize=image"],
    "histograms (standardised by plate)": ["data.match_histograms=null", "data.standardize=plate"],
    "plate batches (of an experiment)": ["data.domain=experiment"],
    "plate batches (mixed, statistics of the plate)": ["data.domain=null", "inference.domain=plate"],
    "batch size 8 (32)": ["data.batch_size=32"],
    "AM-Softmax (cross entropy)": ["loss.name=cross_entropy", "loss.options={}", "model.head=linear"],
    "cell type": ["model.cell_type=null"],
    "D4 (neither in training nor as views)": ["data.d4=false", "inference.tta=1"],
}
PREDICTED_WITHOUT = {"centring of plates": dict(postprocess=None),
                     "shrinking of the centring": dict(postprocess="center_plate"), "eight views (one)": dict(tta=1),
                     "statistics of the plate (running)": dict(batchnorm="running")}
# without BatchNorm: the network, and what it needs of the data
NETWORKS = {"ConvNeXt": (dict(arch="convnext_atto", arch_options=dict(patch_size=2)), []),
            "ViT": (dict(arch="vit_tiny_patch16_224", arch_options=dict(img_size=64, patch_size=8, depth=6)),
                    ["data.crop=null"])}
NETWORK_RATES = {"ConvNeXt": 2e-3, "ViT": 1e-3}  # a guess; --select compares others
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
FULL, KEY = "default", "{} at {:,}"


def contestants(budgets, design=DESIGN, rates=None):
    "Name with its budget -> (recipe, settings of prediction, strengths it runs at), as `batch_effect` has them"
    from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe

    rates, small, every = {**NETWORK_RATES, **(rates or {})}, min(budgets), list(SCREENS)
    default = laptop_recipe(get_recipe("resnet10t_domain_batches"), 100)
    s3 = change_recipe(laptop_recipe(get_recipe("densenet121_domain_bn"), 100), "per_cell_type=false",
                       "finetune.epochs=0", "train.accumulate=1", "pretrain.accumulate=1")
    first = laptop_recipe(get_recipe("densenet161_first_place"), 100)
    out = {KEY.format(f"without {k}", small): (change_recipe(default, *v), {}) for k, v in WITHOUT.items()}
    for views in budgets:
        out |= {KEY.format(k, views): (r, i) for k, r, i in (
            (FULL, default, {}), ("44th place: batch statistics", s3, {}), ("1st place", first, {}),
            ("1st place, domain statistics", first, dict(batchnorm="domain", domain="experiment")))}
        for k, (_, settings) in NETWORKS.items():
            r = change_recipe(default, *settings, f"train.lr={rates[k]}", "inference.batchnorm=running")
            out |= {KEY.format(f"{k}, histograms alone", views): (r, dict(postprocess=None)),
                    KEY.format(f"{k}, centring too", views): (r, {})}
    out |= {KEY.format(f"without {k}", small): (default, v) for k, v in PREDICTED_WITHOUT.items()}
    network = lambda name: next((n for k, (n, _) in NETWORKS.items() if name.startswith(k)), {})
    return {k: (within_budget(r, split_name(k)[1], design, **network(k)), i, every) for k, (r, i) in out.items()}


def table_of(results):
    "A row per method, budget, strength and seed, of pairs of a job's key and its result"
    rows = []
    for (strength, seed, _), out in results:
        for r in out["rows"]:
            method, views = split_name(r["method"])
            rows.append({"strength": strength, "method": method, "views": views, "seed": seed,
                         **{s: r[s] for s in STEPS}, "seconds": out["train_seconds"] + out["predict_seconds"]})
    return pd.DataFrame(rows)


def split_name(name):
    "Method and images shown of a contestant such as 'default at 8,000'"
    method, _, views = name.rpartition(" at ")
    return method, int(views.replace(",", ""))


def earlier_rows(args):
    "The table that is there: trainings of another day, perhaps of another machine"
    file = args.out / "ablation.csv"
    return pd.read_csv(file) if file.exists() and not args.anew else table_of([])


def joined(old, done, methods):
    "Rows of before and of today in the order of the contestants; those of today count"
    keys = ["strength", "method", "views", "seed"]
    rows = [t for t in (old, table_of(done)) if len(t)]
    return ordered(pd.concat(rows).drop_duplicates(keys, keep="last"), methods)


def losses(table):
    "What each ingredient brings: accuracy with it minus accuracy without it, seed by seed"
    t = table[table.views == table.views.min()]
    full, rows = t[t.method == FULL].set_index(["strength", "seed"]), []
    for (strength, method), own in t[t.method.str.startswith("without ")].groupby(["strength", "method"], sort=False):
        own = own.set_index(["strength", "seed"])
        own = own.loc[own.index.isin(full.index)]
        gain = full.loc[own.index, STEPS] - own[STEPS]
        if not len(gain): continue
        ahead, noise = gain.argmax, gain.argmax.std() if len(gain) > 1 else 0
        rows.append({"strength": strength, "without": method.removeprefix("without "),
                     "argmax without": spread(own.argmax), "it brings": spread(ahead), "after groups":
                     spread(gain.groups), "seeds it helped": f"{(ahead > 0).sum()} of {len(gain)}",
                     "helped": bool(ahead.mean() > max(noise, .01))})
    return pd.DataFrame(rows)


def sentences(lost):
    "What helped on both families, on one, on none"
    if not len(lost): return "(nothing to compare yet)"
    helped = lost.groupby("without", sort=False).helped.agg(["sum", "size"])
    names = lambda k: "; ".join(k.index) or "nothing"
    return (f"An ingredient helped where accuracy (`argmax`) with it is ahead by more than .01 and more than the "
            f"spread over the seeds. Helped on all screens: {names(helped[helped['sum'] == helped['size']])}. On some: "
            f"{names(helped[(helped['sum'] > 0) & (helped['sum'] < helped['size'])])}. **Did not help**: "
            f"{names(helped[helped['sum'] == 0])}.")


def budgets_of(table):
    "Accuracy of systems by the images they were shown"
    t = table[~table.method.str.startswith("without ")]
    return t.groupby(["strength", "method", "views"], sort=False)[STEPS].agg(spread).reset_index().sort_values(
        ["strength", "method", "views"], kind="stable", ignore_index=True)


def behind(table):
    "One sentence per system: is it level with the default at the same budget?"
    t, said = table[~table.method.str.startswith("without ")], []
    wide = t.pivot_table(index=["strength", "views", "seed"], columns="method", values="argmax")
    if FULL not in wide: return "(nothing to compare yet)"
    for method in wide.columns.drop(FULL):
        gap = (wide[FULL] - wide[method]).dropna().groupby(["strength", "views"]).mean()
        said.append(f"- {method} is behind the default by " + ", ".join(
            f"{v:.3f} ({strength}, {views:,} images)" for (strength, views), v in gap.items()) + ".")
    return "\n".join(said)


def report(args, table, methods, of):
    "A page and a CSV of what is finished"
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / "ablation.csv", index=False, float_format="%.4f")
    lost, seeds = losses(table), sorted(table.seed.unique())
    shown = {k: images_shown(r, args.design) for k, (r, _, _) in methods.items()}
    once = table.drop_duplicates(["strength", "seed", "seconds"])
    parts = ["# What carries the default recipe",
             f"`make bench NAME=ablation`, seeds {', '.join(map(str, seeds))} of screens and trainings, "
             f"{args.design['n_sirnas']} treatments; mean ± standard deviation over the seeds. {len(once)} of {of} "
             f"trainings are finished, {once.seconds.sum():,.0f} s of computing on {platform.machine()}, Python "
             f"{platform.python_version()}.",
             "## Ingredients", "The default recipe without one of its ingredients; what stands in its place is in "
             "brackets.", markdown(lost.drop(columns="helped")) if len(lost) else "(not run)", sentences(lost),
             "## Budgets, and networks without BatchNorm", "Histograms alone: neither BatchNorm nor centring removes "
             "what they leave of the batch effect.", markdown(budgets_of(table)), behind(table),
             "## Settings", "Images shown: " + ", ".join(f"{k} {v:,}" for k, v in shown.items()) + ".",
             "```json\n" + json.dumps({**args.design, **{s: SCREENS[s] for s in args.strengths}, "without": WITHOUT,
                                       "predicted without": PREDICTED_WITHOUT, "networks": NETWORKS,
                                       "rates": NETWORK_RATES}, indent=1) + "\n```"]
    (args.out / "ablation.md").write_text("\n\n".join(parts) + "\n")


def select(args):
    "Learning rates of the networks without BatchNorm, on held-out training experiments"
    valid = [f"{c}-{args.design['n_train']:02}" for c in args.design["cell_types"]]
    jobs = {}
    for rate in RATES:
        methods = contestants([min(args.budgets)], args.design, dict.fromkeys(NETWORKS, rate))
        for name in NETWORKS:
            recipe, inference, _ = methods[KEY.format(f"{name}, histograms alone", min(args.budgets))]
            jobs[name, rate] = dict(screen={**args.design, **SCREENS[args.strengths[0]], "seed": 100},
                                    recipe=asdict(replace(recipe, seed=100)), valid="experiment=" + ",".join(valid),
                                    valid_experiments=valid, variants={name: inference})
    rows = [dict(network=name, rate=rate, **{s: out["rows"][0][s] for s in STEPS})
            for (name, rate), _, out in run_all(args, jobs)]
    print(markdown(pd.DataFrame(rows).sort_values(["network", "rate"]).round(3)))


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of screens and trainings")
    parser.add_argument("--budgets", type=int, nargs="+", default=[8_000, 32_000], help="images shown in a training")
    parser.add_argument("--strengths", nargs="+", choices=SCREENS, default=["hard", "hard optics"], help="of screens")
    parser.add_argument("--methods", nargs="+", help="only contestants whose name begins so")
    parser.add_argument("--sirnas", type=int, default=DESIGN["n_sirnas"], help="treatments of a screen")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="screens and finished trainings")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the tables go")
    parser.add_argument("--finished", action="store_true", help="write the page of what is finished, train nothing")
    parser.add_argument("--anew", action="store_true", help="do trainings again whose rows are in the table")
    parser.add_argument("--select", action="store_true", help="compare learning rates of networks without BatchNorm")
    args = parser.parse_args(argv)
    args.design = {**DESIGN, "n_sirnas": args.sirnas}
    return args


def main(argv=None):
    args = arguments(argv)
    if args.select: return select(args)
    methods = {k: v for k, v in contestants(args.budgets, args.design).items()
               if not args.methods or k.startswith(tuple(args.methods))}
    jobs = make_jobs(args, methods, {s: SCREENS[s] for s in args.strengths})
    jobs = dict(sorted(jobs.items(), key=lambda j: j[0][1]))  # a seed is whole before the next one begins
    files = {k: args.work / "results" / f"{batch_effect.job_key(j)}.json" for k, j in jobs.items()}
    done, old = [(k, json.loads(f.read_text())) for k, f in files.items() if f.exists()], earlier_rows(args)
    had = set(zip(old.strength, old.seed, old.method, old.views)) if len(old) else set()
    known = lambda key, job: all((*key[:2], *split_name(name)) in had for name in job["variants"])
    todo = {} if args.finished else {k: j for k, j in jobs.items() if not files[k].exists() and not known(k, j)}
    if done or len(old): report(args, joined(old, done, methods), methods, len(jobs))
    for key, _, out in run_all(args, todo) if todo else ():
        done.append((key, out))
        report(args, joined(old, done, methods), methods, len(jobs))
    if not done and not len(old): raise SystemExit(f"no training is finished in {args.work} or {args.out}")
    print((args.out / "ablation.md").read_text().split("## Settings")[0])


def ordered(table, methods):
    "Rows in the order of the contestants, whatever finished first"
    order = {k.rpartition(" at ")[0]: i for i, k in enumerate(methods)}
    return table.sort_values(["strength", "method", "views", "seed"], ignore_index=True,
                             key=lambda c: c.map(order) if c.name == "method" else c)


if __name__ == "__main__":
    main()
