"The benchmark of methods: budgets, resuming, tables."

import importlib.util
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from rcic_fastai.recipe.published import change_recipe, laptop_recipe, recipes
from rcic_fastai.train.network import recipe_model

FOLDER = Path(__file__).parents[1] / "benchmarks"
DESIGN = dict(n_sirnas=4, n_train=2, n_test=1, cell_types=("HUVEC", "RPE"), n_positive=1, image_size=32)


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("batch_effect", FOLDER / "batch_effect.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["batch_effect"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["batch_effect"]


@pytest.fixture(scope="module")
def work(bench, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    bench.ready_screen(folder, {**DESIGN, "effect": 0.3, "batch_effect": 1.0, "missing": 0.0, "seed": 0})
    return folder


def job(name, *settings, variants=None):
    recipe = change_recipe(laptop_recipe(recipes[name], 3), *settings)
    screen = {**DESIGN, "effect": 0.3, "batch_effect": 1.0, "missing": 0.0, "seed": 0}
    return dict(screen=screen, recipe=asdict(recipe), valid=None, variants=variants or {name: {}})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet121_domain_bn", "densenet161_first_place", "densenet161_domain_batches"])
def test_the_budget_is_what_the_network_is_shown(bench, work, name, monkeypatch):
    """`images_shown` counts the images of all stages, pseudo-labelled wells and controls included (to a well or two
    that has a negative margin)"""
    import rcic_fastai.model.core as model

    shown, forward = [], model.ScreenModel.forward

    def counted(self, x, context=None):
        if self.training:
            shown.append(len(x))
        return forward(self, x, context)

    monkeypatch.setattr(model.ScreenModel, "forward", counted)
    one = job(name, "per_cell_type=false")
    result = bench.run_job(work, one)
    expected = bench.images_shown(bench_recipe(one), DESIGN)
    assert abs(sum(shown) - expected) < 0.25 * expected
    assert [set(r) for r in result["rows"]] == [{"method", "argmax", "assignment", "groups"}]


def bench_recipe(one):
    from rcic_fastai.recipe.settings import recipe_from_dict

    return recipe_from_dict(one["recipe"])


@pytest.mark.slow
def test_a_finished_training_is_not_done_again(bench, work, monkeypatch):
    one = job("laptop", variants={"a": {}, "b": dict(batchnorm="running")})
    first = bench.run_job(work, one)

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("rcic_fastai.run.train.train_run", never)
    assert bench.run_job(work, one) == first and [r["method"] for r in first["rows"]] == ["a", "b"]
    with pytest.raises(AssertionError, match="trained again"):
        bench.run_job(work, job("laptop", "train.lr=0.5"))


@pytest.mark.slow
def test_everybody_has_the_same_budget(bench):
    for name, (recipe, _, _) in bench.contestants(8000, bench.DESIGN).items():
        assert name == bench.DEFAULT or abs(bench.images_shown(recipe, bench.DESIGN) - 8000) < 700, name
        assert recipe.model.arch == "resnet10t" and not recipe.model.pretrained


@pytest.mark.slow
def test_variants_of_one_training_share_it(bench):
    args = bench.arguments(["--seeds", "0", "1"])
    methods = bench.contestants(args.views, args.design)
    jobs = bench.make_jobs(args, methods, bench.SCREENS)
    assert sum(len(j["variants"]) for j in jobs.values()) == 2 * sum(len(s) for _, _, s in methods.values())
    assert all(j["recipe"]["seed"] == j["screen"]["seed"] for j in jobs.values())
    assert len({bench.job_key(j) for j in jobs.values()}) == len(jobs)


def test_tables(bench):
    "Means, spreads and differences are those of the rows"
    rng, rows = np.random.default_rng(0), []
    for method in ("44th place: eval-mode BatchNorm", "44th place: batch statistics", "44th place: + virtual batch",
                   "44th place: + MixUp fine-tuning", "1st place", "ours"):
        rows += [dict(strength="default", seed=s, method=method,
                      **dict(zip(("argmax", "assignment", "groups"), rng.random(3)))) for s in range(3)]
    table = pd.DataFrame(rows)
    ours, first = (table[table.method == m] for m in ("ours", "1st place"))
    s = bench.summary(table).set_index("method")
    assert s.loc["ours", "argmax"] == f"{ours.argmax.mean():.3f} ± {ours.argmax.std():.3f}"
    gain = ours.groups.to_numpy() - first.groups.to_numpy()
    d = bench.differences(table).set_index("minus").loc["1st place"]
    assert d["groups"] == f"{gain.mean():.3f} ± {gain.std(ddof=1):.3f}"
    steps = bench.gains(table)
    virtual = table[table.method == "44th place: + virtual batch"]
    assert steps.set_index("step").loc["+ assignment", "gain"] == bench.spread(
        virtual.assignment.reset_index().assignment - virtual.argmax.reset_index().argmax)
    assert steps["seeds it helped"].iloc[1:].str.fullmatch(r"[0-3] of 3").all()
    assert bench.markdown(steps).count("\n") == len(steps) + 1


def test_replace_keeps_the_name(bench):
    r = bench.within_budget(recipes["laptop"], 3000, bench.DESIGN)
    assert r.name == "laptop" and replace(r, seed=1).seed == 1


def test_networks_of_the_ablation_are_what_they_are_called(bench):
    "Each contestant has the network of its name, and takes a batch"
    spec = importlib.util.spec_from_file_location("ablation", FOLDER / "ablation.py")
    ablation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ablation)
    found = ablation.contestants([8000])
    arch = {k.partition(" at ")[0]: r.model.arch for k, (r, _, _) in found.items()}
    assert {v for k, v in arch.items() if not k.startswith(tuple(ablation.NETWORKS))} == {"resnet10t"}
    for name, (network, _) in ablation.NETWORKS.items():
        assert {v for k, v in arch.items() if k.startswith(name)} == {network["arch"]}
        recipe = found[f"{name}, histograms alone at 8,000"][0]
        model = recipe_model(recipe, 40, 6, 2).eval()
        assert not any(isinstance(m, _BatchNorm) for m in model.body.modules())
        assert model(torch.rand(2, 6, 64, 64), torch.zeros(2, 4, dtype=torch.long)).shape == (2, 40)
