"""A run that version 0.1.0 has made is read, and predicts what it predicted then.

`data/run_0_1_0` was written by that version, on the screen of `simulate_screen` below, with its predictions of the test
split.
"""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rcic_fastai.predict.core import Predictions
from rcic_fastai.report.core import run_context
from rcic_fastai.run.submit import Run
from rcic_fastai.run.task import one_class

OLD = Path(__file__).parent / "data" / "run_0_1_0"


@pytest.fixture
def old_run(small_screen, tmp_path):
    "A copy of the old run next to the screen that it was trained on"
    shutil.copytree(OLD, tmp_path / "run")
    message = "run/recipe.json: data.controls is called data.n_controls, controls is called pretrain"
    with pytest.warns(FutureWarning, match=message) as said:
        run = Run(tmp_path / "run", small_screen)
    assert len(said) == 1
    return run


def test_it_is_read(old_run, monkeypatch, tmp_path):
    assert (old_run.format, old_run.version, old_run.task, old_run.target) == (1, "0.1.0", one_class, "sirna")
    assert old_run.classes == list(range(8)) and old_run.channels == [1, 2, 3, 4, 5, 6] and old_run.recipe.name == "old"
    assert {i.partition("_")[0] for i in old_run.valid_wells} == {"HUVEC-03"} and len(old_run.history()) == 2
    monkeypatch.chdir(tmp_path)
    said = "was in screen .as seen from where it was trained."
    with pytest.raises(FileNotFoundError, match=said), pytest.warns(FutureWarning):
        _ = Run(OLD).screen


def test_its_stages_have_their_present_names(old_run):
    "A stage on the control wells was called `controls`"
    path = old_run.path / "history.csv"
    history = pd.read_csv(path)
    pd.concat([history.assign(stage="controls"), history]).to_csv(path, index=False)
    assert old_run.history().stage.tolist() == ["pretrain"] * 2 + ["train"] * 2


def test_it_predicts_the_same(old_run):
    then = Predictions.load(OLD / "predictions" / "test.npz")
    now = old_run.predict("test", progress=False)
    assert now.ids.tolist() == then.ids.tolist() and now.classes.tolist() == then.classes.tolist()
    np.testing.assert_allclose(now.logits, then.logits, rtol=0, atol=1e-5)


def test_it_is_submitted_and_reported(old_run):
    assert old_run.submit(say=lambda *a: None).read_text().startswith("id_code,sirna\n")
    c = run_context(old_run, old_run.screen, say=lambda *a: None)
    assert c.split == "test" and c.judged.known.all()
