"""What is trained where nobody names a recipe."""

import pytest
import torch
from cases import each

from rcic_fastai.recipe import default
from rcic_fastai.recipe.default import default_epochs, default_recipe
from rcic_fastai.recipe.published import get_recipe, recipes
from rcic_fastai.recipe.settings import compare_recipes
from rcic_fastai.run.train import train_run
from rcic_fastai.screen.read import read_screen


@each("n, side, low, high", [(1, 64, 60, 60), (96, 32, 60, 60), (768, 64, 30, 60), (768, 512, 12, 20),
                             (73_030, 512, 12, 12)])
def test_epochs_follow_the_work(n, side, low, high):
    assert low <= default_epochs(n, side) <= high
    assert max(default_epochs(2 * n, side), default_epochs(n, 2 * side)) <= default_epochs(n, side)


@each("target, gone", [("sirna", ()), ("well", ("postprocess",)), ("cell_type", ("postprocess", "cell_type"))])
def test_a_target_changes_what_would_not_fit_it(small_screen, target, gone):
    screen = read_screen(small_screen)
    for full in (False, True):
        r, _ = default_recipe(screen, target, full)
        assert (r.inference.postprocess is None) == ("postprocess" in gone)
        assert (r.model.cell_type is None) == ("cell_type" in gone)


def test_the_machine_decides(small_screen, monkeypatch):
    screen = read_screen(small_screen)
    for gpu, asked, name in ((False, None, "resnet10t_domain_batches"), (True, None, "densenet161_domain_batches"),
                             (True, False, "resnet10t_domain_batches"), (False, True, "densenet161_domain_batches")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        recipe, why = default_recipe(screen, full=asked)
        assert recipe.name == name and ("GPU" in why or asked), (gpu, asked, recipe.name, why)
    assert not get_recipe().model.pretrained and get_recipe().name == "resnet10t_domain_batches"


def test_both_sizes_have_the_same_ingredients():
    small, full = recipes["resnet10t_domain_batches"], recipes["densenet161_domain_batches"]
    assert set(compare_recipes(small, full).index) <= {
        "name", "data.crop", "model.arch", "model.arch_options", "model.pretrained", "train.epochs", "train.lr",
        "inference.pool_sites"}


def test_large_screens_are_not_kept_in_memory(small_screen, monkeypatch):
    screen = read_screen(small_screen)
    assert default_recipe(screen, full=False)[0].data.cache
    monkeypatch.setattr(default, "_side", lambda *a: 4096)
    recipe = default_recipe(screen, full=False)[0]
    assert not recipe.data.cache and recipe.inference.tta == 1


def test_training_without_a_recipe(small_screen, tmp_path, monkeypatch):
    monkeypatch.setattr(default, "_most", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = []
    learn = train_run(small_screen, run=tmp_path / "run", say=said.append)
    assert said[0].startswith("No recipe is named: resnet10t_domain_batches, 1 epochs, because: "), said[0]
    assert learn.dls.train.domain == "plate" and learn.dls.counts is not None
    own = get_recipe(tmp_path / "run" / "recipe.json")
    assert own == default_recipe(read_screen(small_screen))[0]
    with pytest.raises(ValueError, match="did you mean 'sirna'"):
        train_run(small_screen, target="sirnas", run=tmp_path / "b")
