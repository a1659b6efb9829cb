"""What is trained where nobody names a recipe."""

import numpy as np
import pandas as pd
import pytest
import torch
from cases import each

from rcic_fastai.data.select import select_sites
from rcic_fastai.data.statistics import complete_stats
from rcic_fastai.recipe import default
from rcic_fastai.recipe.default import default_epochs, default_recipe
from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe, recipes
from rcic_fastai.recipe.settings import compare_recipes
from rcic_fastai.run.train import control_sites, train_run
from rcic_fastai.screen.read import read_screen
from rcic_fastai.train.inference import predict_with
from rcic_fastai.train.loaders import recipe_dataloaders


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
    assert said[0].startswith("No recipe is named: resnet10t_domain_batches, 1 epoch, because: "), said[0]
    assert learn.dls.train.domain == "plate" and learn.dls.counts is not None
    own = get_recipe(tmp_path / "run" / "recipe.json")
    assert own == default_recipe(read_screen(small_screen))[0]
    with pytest.raises(ValueError, match="did you mean 'sirna'"):
        train_run(small_screen, target="sirnas", run=tmp_path / "b")


@each("name", ["resnet10t_control_statistics", "resnet10t_control_histograms"])
def test_a_well_alone_is_predicted_as_with_its_plate(small_screen, tmp_path, name):
    screen = read_screen(small_screen)
    recipe = change_recipe(laptop_recipe(get_recipe(name), 1), "device.precision=fp32", "inference.tta=1",
                           "data.n_controls=4" if "statistics" in name else "data.batch_size=16")
    learn = train_run(screen, recipe, tmp_path / "run", say=lambda *a: None)
    assert learn.dls.reference == "controls" and learn.dls.counts.ndim == 4  # of plates
    sites, controls = select_sites(screen, "test"), select_sites(screen, "test", "controls")
    known = learn.dls.counts.clone()

    def scores(own):
        learn.dls.counts = known.clone()
        for dl in learn.dls.loaders:
            for t in dl.after_batch.fs: getattr(t, "set_counts", lambda _: None)(learn.dls.counts)
        return predict_with(learn, own, recipe, controls, progress=False)

    whole = scores(sites)
    one = sites[sites.id_code == sites.id_code.iloc[-1]].reset_index(drop=True)
    alone = scores(one)
    at = [list(whole.ids).index(i) for i in alone.ids]
    np.testing.assert_allclose(alone.logits, whole.logits[at], atol=1e-4)
    without = scores(one.assign(files=sites.files.iloc[0]))
    assert np.abs(without.logits - alone.logits).max() > 1e-3  # pixels of the well do count


def test_new_plates_need_controls_where_these_are_the_reference(small_screen, tmp_path):
    screen = read_screen(small_screen)
    recipe = change_recipe(get_recipe("resnet10t_control_histograms"), "data.cache=true")
    train, test = select_sites(screen), select_sites(screen, "test")
    dls = recipe_dataloaders(train, recipe, controls=control_sites(screen), experiments=screen.experiments)
    with pytest.raises(ValueError, match=r"HUVEC-04 plate 1 has no control site whose pixels could be measured"):
        complete_stats(dls, test)
    complete_stats(dls, pd.concat([test, control_sites(screen)], ignore_index=True))
    counts = dls.counts.clone()
    complete_stats(dls, test)  # what is known needs none
    assert (dls.counts == counts).all()
    with pytest.raises(ValueError, match="data.reference 'controls' has nothing to measure"):
        change_recipe(recipe, "data.match_histograms=null", "data.standardize=image")
