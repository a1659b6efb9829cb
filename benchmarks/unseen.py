"""Recipes for new experiments that cannot be seen whole: a plate alone, a well alone, a plate of one phenotype.

`make bench NAME=unseen` runs it in about eight minutes on two cores. It can be stopped and started again: what has
finished is kept in `--work`. Statistics of a plate (`resnet10t_domain_batches`) need its wells; those of its controls
(`resnet10t_control_statistics`, `resnet10t_control_histograms`) do not.
"""

import argparse
import json
import os
import platform
import shutil
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

# one thread per process, one process per core
os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
warnings.filterwarnings("ignore")

import pandas as pd  # noqa: E402
from batch_effect import markdown, spread  # noqa: E402

DESIGN = dict(n_sirnas=40, n_train=8, n_test=2, cell_types=("HUVEC",), n_positive=6, image_size=64, missing=.3)
SCREENS = {"curves": dict(effect=.22, batch_effect=2.), "optics": dict(family="optics")}
RECIPES = "resnet10t_domain_batches", "resnet10t_control_statistics", "resnet10t_control_histograms"
SITUATIONS = "whole experiment", "one plate alone", "90 % of a plate alike", "one well alone"


def epochs_for(recipe, views):
    "Epochs in which a recipe shows about `views` treated images"
    return max(1, round(views / (2 * DESIGN["n_sirnas"] * DESIGN["n_train"])))


def ready_screen(work, family, seed):
    "A simulated screen, made once"
    from rcic_fastai.screen.simulate import simulate_screen

    folder = work / "screens" / f"{family}_{seed}"
    if not (folder / "done").exists():
        simulate_screen(folder, **DESIGN, **SCREENS[family], seed=seed, workers=1, progress=False)
        (folder / "done").write_text("")
    return folder


def alike(folder):
    "The same screen with test plates on which nine of ten treated wells have the same treatment; the folder, the truth"
    from rcic_fastai.screen.read import read_screen
    from rcic_fastai.screen.simulate import Simulation, _write_wells
    from rcic_fastai.screen.optics import Optics

    out = folder.with_name(f"{folder.name}_alike")
    wells = read_screen(folder).wells
    truth = pd.read_csv(folder / "truth.csv").set_index("id_code").sirna
    test = wells[(wells.split == "test") & (wells.well_type == "treatment")].copy()
    test["sirna"] = truth.loc[test.id_code].to_numpy()
    for _, plate in test.groupby(["experiment", "plate"]):
        test.loc[plate.index[: round(0.9 * len(plate))], "sirna"] = plate.sirna.iloc[0]
    if not (out / "done").exists():
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder, out, ignore=lambda *a: ["train", "done"])
        settings = json.loads((folder / "simulation.json").read_text())
        own, optics = ({k: v for k, v in settings.items() if k in t.__dataclass_fields__} for t in (Simulation, Optics))
        sim = Simulation(**own, optics=Optics(**optics) if optics else None)
        for path in (out / "test").rglob("*.png"):
            if f"{path.parts[-3]}_{path.parts[-2][-1]}_{path.name[:3]}" in set(test.id_code): path.unlink()
        for _, plate in test.groupby(["experiment", "plate"]):
            _write_wells(sim, out, plate)
            first = f"test/{plate.experiment.iloc[0]}/Plate{plate.plate.iloc[0]}/{plate.well.iloc[0]}_s1_w1.png"
            if (out / first).read_bytes() != (folder / first).read_bytes(): # its treatment is what it was
                raise RuntimeError(f"{out / first} is drawn otherwise than {folder / first}")
        (out / "done").write_text("")
    return out, test[["id_code", "sirna"]]


def parts_of(sites, situation):
    "What is predicted at once"
    keys = {"whole experiment": ["experiment"], "one well alone": ["id_code"]}.get(situation, ["experiment", "plate"])
    return [own.reset_index(drop=True) for _, own in sites.groupby(keys)]


def accuracy(learn, recipe, screen, truth, situation, forget):
    "Share of wells whose class has the highest score"
    from rcic_fastai.data.select import select_sites
    from rcic_fastai.predict.core import well_accuracy
    from rcic_fastai.run.train import needs_controls

    sites, controls = select_sites(screen, "test"), select_sites(screen, "test", "controls")
    if situation == "one well alone": sites = sites[sites.plate == 1]
    right = total = 0
    for own in parts_of(sites, situation):
        forget()
        p = predict_alone(learn, own, recipe, controls[controls.experiment.isin(own.experiment)]
                          if needs_controls(recipe) else None)
        r, n = well_accuracy(p, truth)
        right, total = right + r, total + n
    return right / total


def predict_alone(learn, sites, recipe, controls):
    from rcic_fastai.train.inference import predict_with

    if controls is not None: controls = controls.reset_index(drop=True)
    return predict_with(learn, sites, recipe, controls, progress=False)


def forgetful(learn):
    "A function that forgets what was measured on new plates"
    from rcic_fastai.data.augment import MatchHistograms

    counts = learn.dls.counts.clone()

    def forget():
        learn.dls.counts = counts.clone()
        for dl in learn.dls.loaders:
            for t in dl.after_batch.fs:
                if isinstance(t, MatchHistograms): t.set_counts(learn.dls.counts)

    return forget


def result_of(work, views, job):
    "File of the result of a job"
    return work / "results" / f"{'_'.join(map(str, job))}_{views}.json"


def run_job(work, views, job):
    "Train a recipe once, and predict in every situation"
    import torch

    from rcic_fastai.files import write_json
    from rcic_fastai.recipe.published import get_recipe, laptop_recipe
    from rcic_fastai.run.train import train_run
    from rcic_fastai.screen.read import read_screen

    torch.set_num_threads(1)
    family, seed, name = job
    result = result_of(work, views, job)
    if result.exists(): return json.loads(result.read_text())
    folder, run, start = ready_screen(work, family, seed), work / "runs" / "_".join(map(str, job)), time.process_time()
    shutil.rmtree(run, ignore_errors=True)
    recipe = replace(laptop_recipe(get_recipe(name), epochs_for(name, views)), seed=seed)
    recipe = replace(recipe, inference=replace(recipe.inference, postprocess=None))
    screen = read_screen(folder)
    learn = train_run(screen, recipe, run, say=lambda *a: None)
    skewed, truth = alike(folder)
    truths = {"90 % of a plate alike": truth}
    rows = {s: accuracy(learn, recipe, read_screen(skewed) if s in truths else screen,
                        truths.get(s, pd.read_csv(folder / "truth.csv")), s, forgetful(learn)) for s in SITUATIONS}
    out = dict(family=family, seed=seed, recipe=name, seconds=round(time.process_time() - start), **rows)
    shutil.rmtree(run, ignore_errors=True)
    result.parent.mkdir(parents=True, exist_ok=True)
    write_json(result, out)
    return out


def report(args, table):
    "A page and a CSV"
    table.to_csv(args.out / "unseen.csv", index=False, float_format="%.4f")
    groups = table.groupby(["family", "recipe"], sort=False)
    shown = groups[list(SITUATIONS)].agg(spread).assign(seeds=groups.size()).reset_index()
    parts = ["# When an experiment cannot be seen whole",
             "`make bench NAME=unseen`: accuracy of wells (`argmax`), mean ± standard deviation over so many seeds (of "
             f"screen and training) as the last column says. {args.views:,} treated images shown, the same network, "
             f"{table.seconds.sum():,} s of computing on {platform.machine()}, Python {platform.python_version()}.",
             markdown(shown),
             "*One plate alone* and *one well alone*: nothing else of the experiment is known but the controls of the "
             "plate, for recipes that look at them. *90 % of a plate alike*: nine of ten treated wells of a plate have "
             "the same treatment, so that the statistics of the plate are those of one phenotype.",
             "```json\n" + json.dumps({**DESIGN, **SCREENS}, indent=1) + "\n```"]
    (args.out / "unseen.md").write_text("\n\n".join(parts) + "\n")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of screens and trainings")
    parser.add_argument("--views", type=int, default=8_000, help="treated images shown in a training")
    parser.add_argument("--families", nargs="+", default=list(SCREENS), help="of screens")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="screens and finished trainings")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the tables go")
    parser.add_argument("--finished", action="store_true", help="write the tables of what is finished, train nothing")
    args = parser.parse_args(argv)
    jobs = [(family, seed, name) for family in args.families for seed in args.seeds for name in RECIPES]
    if args.finished: jobs = [j for j in jobs if result_of(args.work, args.views, j).exists()]
    with ProcessPoolExecutor(args.workers) as pool:
        list(pool.map(partial(ready_screen, args.work), *zip(*{j[:2] for j in jobs})))
        rows = []
        for row in pool.map(partial(run_job, args.work, args.views), jobs):
            rows.append(row)
            print(row, flush=True)
    report(args, pd.DataFrame(rows))
    print((args.out / "unseen.md").read_text().split("```json")[0])


if __name__ == "__main__":
    main()
