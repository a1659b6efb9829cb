"""How far the probabilities of wells on new experiments can be trusted, and what abstention keeps.

`make bench NAME=confidence` trains one network per screen with a third of its experiments held out, fits temperature
and margins on these, and judges them on two kinds of new experiments: such as those of the training, and such with a
stronger batch effect. Finished trainings are kept in `--work`. The seeds are not those that the prior of the margins
was chosen on.
"""

import argparse
import os
import warnings
from pathlib import Path

# one thread; nothing that a bar would say
os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from measure import machine, markdown, write_report  # noqa: E402

DESIGN = dict(n_sirnas=24, n_train=6, n_test=3, cell_types=("HUVEC", "RPE"), n_positive=2, image_size=64)
EFFECTS = {"clear": 0.2, "weak": 0.12}  # size of the phenotypes
BATCHES = {"alike": dict(batch_effect=2.0), "shifted": dict(batch_effect=2.8, plate_effect=0.2)}
EPOCHS, VALID, ERROR_RATE = 12, "fold=0/3", 0.05


def finished(work, effect, seed, design=DESIGN, epochs=EPOCHS):
    "A trained run with predictions of its held-out and new wells; and predictions of the shifted screen"
    from rcic_fastai.predict.core import Predictions
    from rcic_fastai.recipe.published import get_recipe, laptop_recipe
    from rcic_fastai.run.predict import Run
    from rcic_fastai.run.train import train_run
    from rcic_fastai.screen.read import read_screen
    from rcic_fastai.screen.simulate import simulate_screen

    work, quiet = work / f"{effect}_{seed}", lambda *a: None
    screens = {name: read_screen(simulate_screen(work / name, **design, **batch, effect=EFFECTS[effect], seed=seed,
                                                 workers=1, progress=False)) for name, batch in BATCHES.items()}
    if not (work / "run" / "run.json").exists():
        recipe = laptop_recipe(get_recipe("densenet161_domain_batches"), epochs=epochs)
        train_run(screens["alike"], recipe, work / "run", valid=VALID, say=quiet)
    run = Run(work / "run", screens["alike"])
    if not (work / "shifted.npz").exists():
        Run(work / "run", screens["shifted"]).predict("test", progress=False, say=quiet).save(work / "shifted.npz")
        for split in ("valid", "test"):
            run.predict(split, progress=False, say=quiet)
    return run, {"alike": run.kept("test"), "shifted": Predictions.load(work / "shifted.npz")}


def judge(confidence, p, truth, groups, one_to_one):
    "Accuracy, calibration errors, and what is kept at the error rate"
    from rcic_fastai.predict.assign import assign_predictions
    from rcic_fastai.predict.confidence import calibration_error, kept_wells, reliability

    table = assign_predictions(p, groups, one_to_one)
    found, alone = confidence.probabilities(p, table, groups), p.wells().probabilities.max(1)
    true = truth.reindex(table.id_code).to_numpy()
    right, alone_right = table.sirna.to_numpy() == true, p.wells().labels == true
    row = dict(wells=len(table), right=right.mean())
    if not one_to_one:
        kept = kept_wells(alone, ERROR_RATE)
        row |= {"ECE before": calibration_error(reliability(alone, alone_right)), "kept before": kept.mean(),
                "wrong among kept before": (~alone_right[kept]).mean() if kept.any() else np.nan}
    kept = kept_wells(found.probability, ERROR_RATE)
    return row | {"ECE after": calibration_error(reliability(found.probability, right)), "kept": kept.mean(),
                  "wrong among kept": (~right[kept]).mean() if kept.any() else np.nan}


def one_run(run, new):
    "Rows of all kinds of new experiments, of the network alone and after assignment"
    from rcic_fastai.predict.confidence import fit_confidence, held_out_wells
    from rcic_fastai.screen.groups import plate_groups

    wells = run.screen.wells
    held, known = held_out_wells(wells, run.valid_wells), wells.set_index("id_code").sirna
    truth = pd.read_csv(Path(run.screen.path) / "truth.csv").set_index("id_code").sirna
    without = plate_groups(wells[~wells.id_code.isin(held.index)])
    rows = []
    for labels, groups, one_to_one in (("network alone", None, False), ("assigned", without, True)):
        confidence = fit_confidence(run.kept("valid"), known[held.index], held, groups, one_to_one)
        for name, p in new.items():
            rows.append(dict(labels=labels, new=name, held_out=len(held), **judge(confidence, p, truth, groups,
                                                                                  one_to_one)))
    return rows


def over_seeds(table):
    "Mean, and lowest to highest, of each number over the seeds"
    text = lambda v: "" if v.isna().all() else f"{v.mean():.3f} ({v.min():.3f}-{v.max():.3f})"
    numbers = ["right", "ECE before", "ECE after", "kept before", "wrong among kept before", "kept", "wrong among kept"]
    groups = table.groupby(["effect", "labels", "new"], sort=False)
    out = pd.DataFrame([{"phenotypes": k[0], "labels": k[1], "new experiments": k[2],
                         **{n: text(g[n]) for n in numbers}} for k, g in groups])
    return out.set_index("phenotypes")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[4, 5, 6], help="of screens and trainings")
    parser.add_argument("--work", type=Path, default=Path("runs/bench_confidence"), help="screens and trainings")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/confidence.md"), help="the table")
    args = parser.parse_args(argv)
    rows = []
    for effect in EFFECTS:
        for seed in args.seeds:
            rows += [dict(effect=effect, seed=seed, **r) for r in one_run(*finished(args.work, effect, seed))]
            print(effect, seed, rows[-4]["right"], rows[-1]["right"], flush=True)
    table = pd.DataFrame(rows)
    n = table.groupby(["effect", "seed"]).held_out.first()
    write_report(args.out, "Confidence", f"Screens of {DESIGN['n_sirnas']} treatments, {2 * DESIGN['n_train']} "
                 f"training and {2 * DESIGN['n_test']} new experiments; {VALID}, so that {n.min()} to {n.max()} wells "
                 f"are held out; `densenet161_domain_batches --laptop {EPOCHS}`. Mean over seeds "
                 f"{', '.join(map(str, args.seeds))}, and lowest to highest. Kept: at an error rate of {ERROR_RATE}.",
                 markdown(over_seeds(table)), machine("timm"))


if __name__ == "__main__":
    main()
