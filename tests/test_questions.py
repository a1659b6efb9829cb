"The benchmark of the two open questions: one difference and one budget for all, what counts as decided, tables."

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cases import each

from rcic_fastai.recipe.settings import compare_recipes

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def ask():
    "The script as it is run: with its folder on the path"
    environment = dict(os.environ)
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("questions", FOLDER / "questions.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))
    sys.modules.pop("batch_effect", None)
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.slow
def test_one_difference_and_one_budget_for_all(ask):
    """Beside the number of epochs, a contestant differs from its base in the settings it is named after, and shows
    the network as many images"""
    methods = ask.contestants(ask.VIEWS, ask.DESIGN)
    for (part, name), (recipe, _, _) in methods.items():
        base = methods["augmentation", "nothing"] if part == "augmentation" else methods["controls", "ignored"]
        settings = ask.AUGMENTATIONS.get(name, []) if part == "augmentation" else ask.CONTROLS[name][0]
        changed = set(compare_recipes(base[0], recipe).index) - {"train.epochs", "pretrain.epochs"}
        named = {s.partition("=")[0] for s in settings} - {"pretrain.epochs"}
        assert changed <= named and len(changed) >= min(1, len(named)), (part, name, changed)
        assert abs(ask.images_shown(recipe, ask.DESIGN) - ask.VIEWS) < 0.08 * ask.VIEWS, name
    off = methods["augmentation", "nothing"][0].data
    assert (off.d4, off.intensity, off.cutout, off.crop) == (False, 0, 0, None)
    assert methods["controls", "pretraining"][0].pretrain.epochs > 0


@each("gain, said", [([0.1, 0.11, 0.12], "helps"), ([-0.1, -0.11, -0.12], "hurts"), ([0.01, 0.1, 0.2], "rather helps"),
                                        ([-0.01, 0.1, 0.2], "not decided"), ([0.0, 0.1, 0.2], "not decided"),
                     ([0.1], "not decided")])
def test_what_counts_as_decided(ask, gain, said):
    assert ask.verdict(pd.Series(gain)) == said


def made_up(gains):
    "A table of three seeds whose contestants are so much ahead of nothing"
    base = np.array([0.4, 0.5, 0.6])
    return pd.DataFrame([dict(part="augmentation", method=m, seed=s, argmax=base[s] + g[s], assignment=0.0, groups=0.0,
                              images=3000)
                         for m, g in {"nothing": [0, 0, 0], **gains}.items() for s in range(3)])


def test_what_helped_goes_together_and_the_mixes_exclude_each_other(ask):
    table = made_up({"cutout": [0.1, 0.1, -0.01], "mixup": [0.1, 0.1, 0.1], "cutmix": [0.2, 0.1, 0.1],
                     "intensity": [0.01, 0.02, 0.03]})
    assert ask.helpful(table) == ["intensity", "cutmix"]
    fresh = ask.fresh_contestants(["cutmix", "intensity"], ask.VIEWS, ask.DESIGN)
    recipes = {k: r for (_, k), (r, _, _) in fresh.items()}
    assert list(recipes) == ["nothing", "cutmix", "all that helped"]
    assert (recipes["all that helped"].train.mix, recipes["all that helped"].data.intensity) == ("cutmix", 0.1)
    row = ask.part_table(table, "augmentation", "nothing").set_index("").loc["cutmix"]
    assert (row["minus nothing"], row["seeds ahead"], row.accuracy) == ("0.133 ± 0.058", "3 of 3", "0.633 ± 0.058")


@pytest.mark.slow
def test_a_quick_run_writes_its_tables_and_is_not_done_again(ask, tmp_path, monkeypatch):
    trained = []

    def one_by_one(args, jobs):
        "As `run_all`, without processes"
        import batch_effect as bench

        for key, job in jobs.items():
            bench.ready_screen(args.work, job["screen"])
            if not (args.work / "results" / f"{bench.job_key(job)}.json").exists():
                trained.append(key)
            yield key, job, bench.run_job(args.work, job)

    monkeypatch.setattr(ask, "run_all", one_by_one)
    monkeypatch.setattr(ask, "AUGMENTATIONS", {})
    monkeypatch.setattr(ask, "CONTROLS",
                        {k: ask.CONTROLS[k] for k in ("ignored", "statistics at inference only",
                                                      "statistics from controls alone")})
    options = ["--quick", "--seeds", "0", "--fresh", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    ask.main(options)
    rows = pd.read_csv(tmp_path / "out" / "questions.csv")
    assert list(rows.columns) == ["part", "method", "seed", "argmax", "assignment", "groups", "images", "train_seconds"]
    # one training serves both that differ in prediction only
    assert len(rows) == 4 and rows.argmax.between(0, 1).all()
    assert len(trained) == 3
    page = (tmp_path / "out" / "questions.md").read_text()
    assert "## Augmentation, one by one" in page and "minus ignored" in page and '"statistics": "controls"' in page
    ask.main(options)
    assert len(trained) == 3 and (tmp_path / "out" / "questions.md").read_text() == page
