"The benchmark of the published systems: that it runs small, counts what the network is shown, and does nothing twice."

import importlib.util
import json
import os
import sys
from pathlib import Path

import pandas as pd
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    environment = dict(os.environ)
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmark_recipes", FOLDER / "recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))
    for name in ("measure", "batch_effect"):
        sys.modules.pop(name, None)
    os.environ.clear()
    os.environ.update(environment)


def test_everybody_has_the_same_budget(bench):
    "All stages together, with the faithful ones, to within half an epoch"
    args = bench.arguments([])
    methods = bench.contestants(args)
    assert set(methods) == {*bench.SYSTEMS, *(f"{n}-faithful" for n in bench.ORIGINALS)}
    for name, r in methods.items():
        assert abs(bench.images_shown(r, args.design) - args.views) < 200, name
        assert r.model.arch == "resnet10t" and not r.model.pretrained
    batches = {n: r.data.batch_size * r.train.accumulate for n, r in methods.items()}
    assert (batches["densenet121_accumulate"], batches["resnext50_accumulate"]) == (30, 60)


@pytest.mark.slow
def test_it_runs_counts_and_is_not_done_twice(bench, tmp_path, monkeypatch, capsys):
    options = ["--quick", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--recipes",
               "densenet201_amsoftmax", "seresnext101_amsoftmax"]
    bench.main(options)
    page, table = (tmp_path / "out" / "recipes.md").read_text(), pd.read_csv(
        tmp_path / "out" / "recipes.csv").set_index("recipe")
    assert list(table.index) == ["densenet201_amsoftmax", "seresnext101_amsoftmax", "blend, equal weights",
                                 "blend, weights chosen on validation",
                                 "seresnext101_amsoftmax-faithful"]
    assert table[list(bench.SCORES)].apply(lambda c: c.between(0, 1)).all(axis=None)
    # a pass over the sites of one experiment of each cell type, then one by the networks of the cell types
    sites = 2 * bench.QUICK["n_sirnas"] * 2
    assert table.images["densenet201_amsoftmax"] == table.images["seresnext101_amsoftmax"] == 2 * sites
    members, chosen = (table.loc[["densenet201_amsoftmax", "seresnext101_amsoftmax"]],
                       table.loc["blend, weights chosen on validation"])
    assert chosen.validation >= members.validation.max() and "flatter" in page
    assert all(f"| {name} |" in page for name in table.index)

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("rcic_fastai.run.train.train_run", never)
    bench.main(options)
    assert (tmp_path / "out" / "recipes.md").read_text() == page
    result = next((tmp_path / "work" / "results").glob("*/result.json"))
    assert set(json.loads(result.read_text())) == {"images", "steps", "train_seconds", "predict_seconds"}
    result.unlink()
    with pytest.raises(AssertionError, match="trained again"):
        bench.main(options)


def test_rates_are_the_best_on_held_out_experiments(bench, tmp_path):
    "Highest mean of both accuracies; of equals, the lower rate"
    rows = [("a", 1e-3, 0.5, 0.6), ("a", 4e-3, 0.7, 0.8), ("a", 1.2e-2, 0.6, 1.0), ("b", 1.2e-2, 0.5, 0.5),
            ("b", 4e-3, 0.5, 0.5)]
    path = tmp_path / "recipe_rates.csv"
    assert bench.chosen_rates(path) == {}
    pd.DataFrame(rows, columns=["recipe", "rate", "argmax", "exact"]).to_csv(path, index=False)
    assert bench.chosen_rates(path) == {"a": 1.2e-2, "b": 4e-3}
