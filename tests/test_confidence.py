"Calibrated probabilities: estimators on drawn scores, a run folder with drawn predictions, what is refused."

import numpy as np
import pandas as pd
import pytest
from cases import each
from scipy.special import softmax

from rcic_fastai.predict.assign import assign_predictions
from rcic_fastai.predict.blend import blend_predictions
from rcic_fastai.predict.confidence import (
    calibration_error, error_table, fit_temperature, held_out_wells, kept_wells, made_alike, MarginConfidence,
    reliability, Temperature,
)
from rcic_fastai.predict.core import Predictions
from rcic_fastai.recipe.settings import Recipe
from rcic_fastai.run.predict import _note_temperature
from rcic_fastai.run.record import write_run
from rcic_fastai.run.submit import Run, side_table_path
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.simulate import tiny_screen


def scores(seed, n, classes=30, signal=2.5):
    "Calibrated logits and the true column of each"
    rng = np.random.default_rng(seed)
    true = rng.integers(classes, size=n)
    return signal * (rng.normal(size=(n, classes)) + signal * np.eye(classes)[true]), true


@each("factor", [0.1, 0.5, 1.0, 4.0, 30.0])
def test_a_temperature_finds_by_how_much_scores_are_too_large(factor):
    x, true = scores(0, 2000)
    t = Temperature().fit(factor * x, true)
    assert t.value == pytest.approx(factor, rel=0.08)
    new, new_true = scores(1, 2000)
    p = t.predict(factor * new)
    assert calibration_error(reliability(p.max(1), p.argmax(1) == new_true)) < 0.03
    assert (p.argmax(1) == new.argmax(1)).all() and np.allclose(p.sum(1), 1)


def test_a_margin_is_a_probability_of_new_wells_too():
    def drawn(seed):
        margin = np.random.default_rng(seed).exponential(3, 3000)
        return margin, np.random.default_rng(seed + 9).random(3000) < 1 / (1 + np.exp(1 - 0.8 * margin))

    curve, (margin, right) = MarginConfidence(0.5).fit(*drawn(0)), drawn(1)
    assert calibration_error(reliability(curve.predict(margin), right)) < 0.02
    kept = kept_wells(curve.predict(margin), 0.05)
    assert 0.03 < 1 - right[kept].mean() < 0.07


@each("seed", range(20))
def test_kept_wells_are_the_most_that_an_error_rate_admits(seed):
    rng = np.random.default_rng(seed)
    p, rate = rng.choice([0.5, 0.8, 0.9, 0.97, 1.0], 30), rng.choice([0.0, 0.02, 0.05, 0.1, 0.3])
    kept = kept_wells(p, rate)
    sets = [p >= v for v in np.unique(p)]  # equal wells go together
    best = max([s.sum() for s in sets if (1 - p[s]).mean() <= rate + 1e-12], default=0)
    assert kept.sum() == best and (not kept.any() or p[kept].min() > p[~kept].max(initial=-1))


def test_a_table_of_error_rates_knows_empty_sets():
    table = error_table([0.5, 0.6], [1, 0], (0.01, 0.5))
    assert table.kept.tolist() == [0, 2] and np.isnan(table.error[0.01]) and table.error[0.5] == 0.5
    assert len(error_table([], None)) == 5


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    return read_screen(tiny_screen(tmp_path_factory.mktemp("confidence") / "screen", {"HUVEC": 6}, {"HUVEC": 2},
                                   n_sirnas=24))


def treated(screen, experiments):
    w = screen.wells
    return w[w.experiment.isin(experiments) & (w.well_type == "treatment")]


def drawn(wells, seed, **made):
    x = np.random.default_rng(seed).normal(size=(len(wells), 24))
    x += 2 * np.eye(24)[wells.sirna.fillna(seed).astype(int)]
    return Predictions(wells.id_code, np.arange(24), 6 * x, dict(level="well", weights={"a": 1.0}, **made))


def blend(path, screen, valid_wells, recipe="blend"):
    "A run folder without a network, which holds predictions"
    write_run(path, Recipe(name=recipe), dict(
        target="sirna", wells="treatments", valid=None, present_only=False, data=str(screen.path),
        valid_wells=sorted(valid_wells), blend=["a", "b"], weights={"a": 1.0}))
    return Run(path)


HELD = ["HUVEC-04", "HUVEC-05", "HUVEC-06"]


@pytest.fixture
def run(screen, tmp_path):
    aside = treated(screen, HELD)
    run = blend(tmp_path / "run", screen, aside.id_code)
    drawn(aside, 0).save(run.predictions_path("valid"))
    drawn(treated(screen, ["HUVEC-07", "HUVEC-08"]), 1).save(run.predictions_path("test"))
    return run


def test_the_temperature_goes_along_with_predictions_made_alike(screen, run):
    valid, test = run.kept("valid"), run.kept("test")
    _note_temperature(run, "valid", valid)
    assert valid.made["temperature"] == pytest.approx(3, rel=0.3)
    for p, expected in ((test, True), (drawn(treated(screen, ["HUVEC-07"]), 1, tta=8), False)):
        _note_temperature(run, "test", p, valid)
        assert ("temperature" in p.made) == expected == made_alike(p, valid)
    path = test.save(run.path / "again.npz")
    again = Predictions.load(path)
    assert np.allclose(again.calibrated, softmax(again.logits / again.made["temperature"], 1), atol=1e-6)
    # a blend of such members has to find its own
    both = blend_predictions({"a": test, "b": test})
    assert "temperature" not in both.made
    with pytest.raises(ValueError, match="have no temperature"):
        both.calibrated.sum()
    train = drawn(treated(screen, ["HUVEC-01"]), 2)
    _note_temperature(run, "train", train, valid)
    assert "temperature" not in train.made  # what was trained on is no measure


def test_a_submission_has_a_table_beside_it(screen, run):
    said = []
    out = run.submit(say=lambda s: said.append(str(s)), error_rate=0.1)
    t = pd.read_csv(side_table_path(out))
    assert t[["id_code", "sirna"]].equals(pd.read_csv(out)[["id_code", "sirna"]])
    assert any(s.startswith("Calibrated on 72 wells of 3 held-out experiments") for s in said)
    assert f"{t.kept.sum()} of them kept at an error rate of 0.1" in "\n".join(said)
    assert 0.9 <= t.probability[t.kept].mean() and (t.second != t.sirna).all()
    assert (t.probability + t.second_probability <= 1 + 1e-6).all()
    run.submit(say=lambda s: None, groups=False, one_to_one=False)  # replaces its own
    alone = pd.read_csv(side_table_path(out))
    x = Temperature(run.confidence(False, False).temperature.value).predict(run.kept("test").logits)
    assert np.allclose(alone.set_index("id_code").probability[run.kept("test").ids], x.max(1), atol=1e-5)
    side_table_path(out).write_text("mine\n")
    before = out.read_bytes()
    with pytest.raises(FileExistsError, match="is not a table of wells"):
        run.submit(say=lambda s: None)
    assert out.read_bytes() == before


def test_each_reason_not_to_calibrate_has_a_sentence(screen, run, tmp_path):
    aside = treated(screen, HELD)
    cases = {
        "the run set no wells aside": (blend(tmp_path / "a", screen, []), None),
        "of experiments that it was trained on": (blend(tmp_path / "b", screen, aside.id_code[::2]), None),
        "were not predicted: blend again": (blend(tmp_path / "c", screen, aside.id_code), None),
        "24 predicted wells are of held-out experiments, and 50 are needed":
            (blend(tmp_path / "d", screen, aside.id_code[:24]), aside[:24]),
    }
    for said, (other, wells) in cases.items():
        if wells is not None: drawn(wells, 0).save(other.predictions_path("valid"))
        with pytest.raises(ValueError, match=said):
            other.confidence()
    with pytest.raises(ValueError, match="in another way"):
        run.confidence(like=drawn(aside, 0, tta=4))
    labels = Predictions(aside.id_code, range(24), np.zeros((72, 24)), dict(level="well", activation="sigmoid"))
    with pytest.raises(ValueError, match="several labels"):
        fit_temperature(labels, aside.set_index("id_code").sirna)


def test_experiments_judge_each_other(screen, run):
    "What an experiment is judged by does not change with its own truth"
    wells, found = screen.wells, run.confidence()
    held = held_out_wells(wells, run.valid_wells)
    own = wells.id_code.isin(held.index[held == HELD[0]]) & (wells.well_type == "treatment")
    shuffled = wells.sirna.where(~own, wells.sirna[own].sample(frac=1, random_state=0).reset_index(drop=True)
                                 .set_axis(wells.index[own]))
    other = Run(run.path)
    other.screen.wells = wells.assign(sirna=shuffled)
    changed = other.confidence(groups=False).wells
    found = run.confidence(groups=False).wells
    first = found.experiment == HELD[0]
    assert changed.right[first].mean() < found.right[first].mean() - 0.3
    assert np.allclose(changed.calibrated[first], found.calibrated[first])
    assert np.allclose(changed.probability[first], found.probability[first])
    assert not np.allclose(changed.calibrated[~first], found.calibrated[~first])


def test_later_plates_are_calibrated_by_the_screen_of_the_training(screen, run, tmp_path):
    later = read_screen(tiny_screen(tmp_path / "later", {"RPE": 1}, {"RPE": 2}, n_sirnas=24))
    there = Run(run.path, later)
    assert there.beside
    wells = later.wells[(later.wells.split == "test") & (later.wells.well_type == "treatment")]
    p = drawn(wells, 1)
    valid = run.kept("valid")
    _note_temperature(run, "valid", valid)
    valid.save(run.predictions_path("valid"))
    _note_temperature(there, "test", p)
    assert p.made["temperature"] == valid.made["temperature"]
    found = there.confidence(groups=False, like=p)
    assert len(found.wells) == 72
    t = there.well_table(p, assign_predictions(p), found)
    assert t.probability.between(0, 1).all() and t.well.notna().all()
