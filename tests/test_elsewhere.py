"A run without its screen at hand, with another one, with a part of its own: what is used, and what is said of it."
import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest

from rcic_fastai.data.select import select_sites
from rcic_fastai.predict.core import Predictions
from rcic_fastai.recipe.published import change_recipe, get_recipe
from rcic_fastai.run.folder import load_run, Run
from rcic_fastai.run.predict import embed_run, predict_run
from rcic_fastai.run.submit import submit_run
from rcic_fastai.run.train import train_run
from rcic_fastai.screen.read import read_screen


@pytest.fixture
def run(small_run, tmp_path):
    "A copy that knows where its screen is"
    there = shutil.copytree(small_run, tmp_path / "run")
    info = json.loads((there / "run.json").read_text())
    (there / "run.json").write_text(json.dumps({**info, "data": str(Run(small_run).data)}))
    return there


def without(screen, treatment):
    "The screen without the wells of a treatment"
    return replace(screen, wells=screen.wells[~screen.wells.sirna.eq(treatment).fillna(False)])


def test_the_screen_of_a_run_is_found(run):
    before = Predictions.load(run / "predictions" / "test.npz").logits
    np.testing.assert_allclose(predict_run(run, progress=False).logits, before, atol=1e-5)
    assert submit_run(run, say=lambda *a: None).exists() and len(embed_run(run, progress=False)[0])
    with pytest.raises(FileNotFoundError, match="expected the folder of the screen of"): predict_run(run, "valid")


def test_classes_that_a_screen_lacks_are_left_out_with_a_notice(run, small_screen):
    screen, said = read_screen(small_screen), []
    assert len(predict_run(run, screen, progress=False, say=said.append).classes) == 8 and not said
    p = predict_run(run, without(screen, 3), progress=False, say=said.append)
    assert 3 not in p.classes and len(p.classes) == 7
    assert "1 of the 8 classes" in said[0] and "no treatment 3" in said[0]


def test_treatments_that_a_network_does_not_know_have_no_label_and_that_is_said(run, small_screen):
    sites = select_sites(read_screen(small_screen))
    other = sites.assign(sirna=sites.sirna.where(sites.sirna != 3, 99))
    with pytest.warns(UserWarning, match=r"does not know the sirna of \d+ of \d+ sites, such as 99"):
        load_run(run, other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_run(run, sites)


def test_wells_set_aside_that_a_screen_lacks(run, small_screen):
    screen, said = read_screen(small_screen), []
    aside = Run(run).valid_wells
    part = replace(screen, wells=screen.wells[screen.wells.id_code != aside[0]])
    assert len(predict_run(run, part, "valid", progress=False, say=said.append).wells().ids) == len(aside) - 1
    assert f"1 of the {len(aside)} wells" in said[0]
    none = replace(screen, wells=screen.wells[~screen.wells.id_code.isin(aside)])
    with pytest.raises(ValueError, match="it is another screen"): predict_run(run, none, "valid", progress=False)


def test_names_and_folders_will_do(small_screen, tmp_path):
    with pytest.raises(ValueError, match="no recipe 'laptp'; did you mean 'laptop'"):
        train_run(small_screen, "laptp", tmp_path / "run")
    one = read_screen(small_screen)
    one = replace(one, wells=one.wells[(one.wells.sirna == 3) | (one.wells.split != "train")])
    with pytest.raises(ValueError, match="there is nothing to tell apart"): train_run(one, "laptop", tmp_path / "run")
    with pytest.raises(TypeError, match="expected a text like"):
        change_recipe(get_recipe("laptop"), {"train.epochs": 1})


def test_a_misspelt_setting_of_inference(run, small_screen):
    with pytest.raises(ValueError, match="a setting of inference is 'pool_site', expected one of"):
        predict_run(run, small_screen, progress=False, pool_site=4)
