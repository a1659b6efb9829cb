"""Two questions of the ten-day log on simulated screens: augmentation for six channels, and what to do with controls.

`make bench NAME=questions` runs it at its default size in less than 30 minutes on one core. It can be stopped and
started again, as `batch_effect.py`, whose trainings and tables it uses: a training that has finished is kept in
`--work`. All contestants show the network the same number of images, controls included, and differ from the base in one
setting. Whatever helped on every one of the `--seeds` is put together and judged on screens that had no part in the
choice, those of the `--fresh` seeds.
"""

import argparse
import json
import math
import os
import platform
from dataclasses import asdict
from pathlib import Path

from batch_effect import images_shown, make_jobs, markdown  # sets one thread per process, before NumPy is imported
from batch_effect import run_all, spread, within_budget  # sets one thread per process, before NumPy is imported

import pandas as pd  # noqa: E402
from scipy.stats import t as student  # noqa: E402

DESIGN = dict(n_sirnas=32, n_train=4, n_test=6, cell_types=("HUVEC",), n_positive=2, image_size=64)
SCREEN = dict(effect=0.4, batch_effect=1.5)
QUICK = dict(n_sirnas=4, n_train=2, n_test=1, cell_types=("HUVEC",), n_positive=1, image_size=32)
VIEWS, LR = 3000, 4e-3
NOTHING, IGNORED, TOGETHER = "nothing", "ignored", "all that helped"

# What each contestant adds to the base, whose augmentation is all off
AUGMENTATIONS = {"D4 symmetries": ["data.d4=true"],
                 "intensity": ["data.intensity=0.1"],
                 "cutout": ["data.cutout=2"],
                 "random windows": ["data.crop={crop}"],
                 "mixup": ["train.mix=mixup"],
                 "cutmix": ["train.mix=cutmix"],
                 "label smoothing": ["loss.options={{\"smoothing\": 0.1}}"]}
# What each contestant does with the controls, all with D4; the second dictionary changes the prediction only
CONTROLS = {IGNORED: ([], {}),
            "statistics at inference only": ([], dict(batchnorm="controls")),
            "pretraining": (["pretrain.epochs=25", "pretrain.lr={lr}", "pretrain.optimizer=adam",
                             "pretrain.schedule=constant",
                             "pretrain.weight_decay=0", "pretrain.accumulate=5"], {}),
            "extra classes, train": (["data.control_classes=train"], {}),
            "extra classes, all": (["data.control_classes=all"], {}),
            "beside every batch": (["data.n_controls=6"], {}),
            "statistics from controls alone": (["data.n_controls=6", "data.statistics=controls",
                                                "inference.batchnorm=controls"], {})}
WITH_D4 = AUGMENTATIONS["D4 symmetries"]


# The contestants


def base_recipe():
    "The system of the log on a small network, 100 epochs long, with all augmentation off"
    from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe

    return change_recipe(laptop_recipe(get_recipe("densenet121_accumulate"), 100, LR), "data.d4=false",
                         "data.intensity=0", "data.cutout=0", "data.crop=null")


def contestant(settings, views, design):
    "The base with some settings changed, as long as the budget allows"
    from rcic_fastai.recipe.published import change_recipe

    filled = [s.format(crop=design["image_size"] * 3 // 4, lr=LR) for s in settings]
    return within_budget(change_recipe(base_recipe(), *filled), views, design)


def contestants(views, design):
    "(part, name) -> (recipe, settings of prediction, strengths it runs at), as `make_jobs` takes them"
    out = {("augmentation", NOTHING): ([], {}), **{("augmentation", k): (s, {}) for k, s in AUGMENTATIONS.items()},
           **{("controls", k): (WITH_D4 + s, i) for k, (s, i) in CONTROLS.items()}}
    return {k: (contestant(s, views, design), i, ["screen"]) for k, (s, i) in out.items()}


def helpful(table):
    """Names of the augmentations that were ahead of nothing on every screen; of mixup and cutmix, which exclude each
    other, the better one"""
    gain = gains(table, "augmentation", NOTHING)
    names = [k for k in AUGMENTATIONS if k in gain and (gain[k] > 0).all()]
    mixes = sorted({"mixup", "cutmix"} & set(names), key=lambda k: gain[k].mean())
    return [k for k in names if k not in mixes[:-1]]


def fresh_contestants(names, views, design):
    "Nothing, what helped most, and all that helped"
    out = {NOTHING: [], **{k: AUGMENTATIONS[k] for k in names[:1]},
           **({TOGETHER: [s for k in names for s in AUGMENTATIONS[k]]} if len(names) > 1 else {})}
    return {("together", k): (contestant(s, views, design), {}, ["screen"]) for k, s in out.items()}


# Running


def measure(args, methods, seeds):
    "One row per contestant and seed"
    rows, seconds = [], 0.0
    args.seeds, names = seeds, {" / ".join(k): k for k in methods}  # `make_jobs` reads the seeds, and joins names
    jobs = make_jobs(args, {" / ".join(k): m for k, m in methods.items()}, {"screen": args.screen})
    for (_, seed, _), _, out in run_all(args, jobs):
        seconds += out["train_seconds"] + out["predict_seconds"]
        for r in out["rows"]:
            (part, method), recipe = names[r["method"]], methods[names[r["method"]]][0]
            rows.append(dict(part=part, method=method, seed=seed, argmax=r["argmax"], assignment=r["assignment"],
                             groups=r["groups"],
                             images=images_shown(recipe, args.design), train_seconds=round(out["train_seconds"], 1)))
    order = {k: i for i, k in enumerate(methods)}
    return pd.DataFrame(sorted(rows, key=lambda r: (order[r["part"], r["method"]], r["seed"]))), seconds


# Tables


def gains(table, part, base, column="argmax"):
    "Difference to the base, seed by seed: one column per contestant, one row per seed"
    wide = table[table.part == part].pivot(index="seed", columns="method", values=column)
    return wide.sub(wide[base], axis=0).drop(columns=base)


def verdict(gain):
    """What the seeds say of a gain: `helps` or `hurts` if a 95 % interval (Student's t over the seeds) leaves zero
    out, `rather` if only the signs agree"""
    n, mean = len(gain), gain.mean()
    if n < 2 or not ((gain > 0).all() or (gain < 0).all()):
        return "not decided"
    sure = abs(mean) > student.ppf(0.975, n - 1) * gain.std(ddof=1) / math.sqrt(n)
    return ("" if sure else "rather ") + ("helps" if mean > 0 else "hurts")


def part_table(table, part, base):
    "A row per contestant: accuracy, difference to the base, and what that decides"
    own, gain = table[table.part == part], gains(table, part, base)
    rows = []
    for method, t in own.groupby("method", sort=False):
        g = None if method == base else gain[method]
        rows.append({"": method, "accuracy": spread(t.argmax), f"minus {base}": "" if g is None else spread(g),
                     "seeds ahead": "" if g is None else f"{(g > 0).sum()} of {len(g)}",
                     "verdict": "" if g is None else verdict(g),
                     "images": f"{t.images.iloc[0]:,}"})
    return pd.DataFrame(rows)


def report(args, table, methods, chosen, seconds):
    "CSV of all rows, and a page a person reads, with the exact settings"
    args.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out / "questions.csv", index=False, float_format="%.4f")
    wells = args.design["n_sirnas"] * args.design["n_test"] * len(args.design["cell_types"])
    seeds = {part: ", ".join(map(str, sorted(t.seed.unique()))) for part, t in table.groupby("part")}
    fresh = f" (the last table: {seeds['together']})" if "together" in seeds else ""
    pages = {"augmentation": "Augmentation, one by one", "controls": "The controls, all with D4",
             "together": "Together, on screens that had no part in the choice"}
    bases = {"augmentation": NOTHING, "controls": IGNORED, "together": NOTHING}
    parts = ["# Two open questions of the ten-day log", __doc__.split("\n")[0],
             f"`make bench NAME=questions`, screens and trainings of seeds {seeds['augmentation']}{fresh}, chance "
             f"{1 / args.design['n_sirnas']:.3f}. "
             f"Accuracy of a well (argmax) on {wells} wells, less a few missing ones, of {args.design['n_test']} "
             "experiments that training never saw, BatchNorm statistics of the "
             "experiment; mean ± standard deviation over the seeds. *helps* and *hurts*: a 95 % interval over the "
             "seeds leaves zero out; "
             "*rather*: all seeds agree in sign, which chance alone brings in one case of four; *not decided*: they "
             "do not. "
             f"{args.workers} processes of one thread, {seconds:.0f} s of computing on {platform.machine()}, Python "
             f"{platform.python_version()}."]
    for part, title in pages.items():
        if part in table.part.values:
            parts += [f"## {title}", markdown(part_table(table, part, bases[part]))]
    parts += ["Ahead on every screen: " + (", ".join(chosen) or "none") + "."]
    parts += ["## Screens", "```json\n" + json.dumps({**args.design, **args.screen}, indent=1) + "\n```", "## Recipes",
              *(f"<details><summary>{', '.join(k)}</summary>\n\n```json\n"
                f"{json.dumps(dict(recipe=asdict(r), prediction=i))}\n```\n</details>"
                for k, (r, i, _) in methods.items())]
    (args.out / "questions.md").write_text("\n\n".join(parts) + "\n")


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of screens and trainings")
    parser.add_argument("--fresh", type=int, nargs="*", default=[3, 4, 5],
                        help="of the screens on which all that helped is judged")
    parser.add_argument("--views", type=int, default=VIEWS, help="images shown to the network in a training")
    parser.add_argument("--effect", type=float, default=SCREEN["effect"], help="size of the phenotypes")
    parser.add_argument("--batch-effect", type=float, default=SCREEN["batch_effect"], help="size of the batch effect")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="screens and finished trainings")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the tables go")
    parser.add_argument("--quick", action="store_true",
                        help="a tiny screen and a few steps, to see that it runs; the figures mean nothing")
    args = parser.parse_args(argv)
    args.design, args.screen = (dict(QUICK if args.quick else DESIGN),
                                dict(effect=args.effect, batch_effect=args.batch_effect))
    args.views = 100 if args.quick else args.views
    return args


def main(argv=None):
    args = arguments(argv)
    methods = contestants(args.views, args.design)
    table, seconds = measure(args, methods, args.seeds)
    chosen = sorted(helpful(table), key=lambda k: -gains(table, "augmentation", NOTHING)[k].mean())
    if args.fresh and chosen:
        fresh = fresh_contestants(chosen, args.views, args.design)
        judged, more = measure(args, fresh, args.fresh)
        table, methods, seconds = pd.concat([table, judged], ignore_index=True), {**methods, **fresh}, seconds + more
    report(args, table, methods, chosen, seconds)
    print((args.out / "questions.md").read_text().split("## Screens")[0])


if __name__ == "__main__":
    main()
