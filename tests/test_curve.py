"Learning curves: what points are trained and judged on, that they resume, what is fitted and what is said."

import shutil

import numpy as np
import pandas as pd
import pytest
from cases import each

from rcic_fastai.cli import core as cli
from rcic_fastai.cli.script import CliError
from rcic_fastai.recipe.published import get_recipe, laptop_recipe
from rcic_fastai.report.curve import (
    curve_parts, curve_sentences, curve_table, expected_accuracy, fit_curve, plot_curve, read_points, run_curve,
    write_curve,
)
from rcic_fastai.run import curve
from rcic_fastai.run.curve import curve_points, CurvePoint, learning_curve, point_screen, replicate_units
from rcic_fastai.screen.core import Screen
from rcic_fastai.screen.read import read_screen

TINY = laptop_recipe(get_recipe("laptop"), 1, virtual_batch=16)


def quiet(*args): pass


def design(replicates=1, n=5, **cell_types):
    "A screen of tables only"
    numbers = cell_types or dict(HUVEC=6, RPE=4)
    rows = [(f"{t}-{e:02}_1_{'BCDE'[r]}{k+2:02}", "train", t, f"{t}-{e:02}", 1, f"{'BCDE'[r]}{k+2:02}", "treatment", k)
            for t, m in numbers.items() for e in range(1, m+1) for k in range(n) for r in range(replicates)]
    columns = ["id_code", "split", "cell_type", "experiment", "plate", "well", "well_type", "sirna"]
    return Screen("nowhere", "kaggle", pd.DataFrame(rows, columns=columns).astype(dict(sirna="Int64")))


def test_held_out_experiments_are_never_trained_on_and_curves_are_nested():
    screen, held = design(), []
    for r in range(8):
        before = set()
        for n in (1, 2, 3, 5):
            part, judged = point_screen(screen, CurvePoint("experiments", n, r))
            w = part.wells.assign(judged=part.wells.id_code.isin(judged))
            by = w.groupby("judged").experiment.unique().map(set)
            assert not by[True] & by[False] and before <= by[False]
            assert w[~w.judged].groupby("cell_type").experiment.nunique().to_dict() == dict(HUVEC=n, RPE=min(n, 3))
            assert w[w.judged].groupby("cell_type").experiment.nunique().to_dict() == dict(HUVEC=1, RPE=1)
            before = by[False]
        held.append(by[True])
    assert set.union(*held[:6]) == set(screen.wells.experiment)  # each is held out in turn


def test_wells_and_sites_are_varied_where_there_are_several():
    screen = design(replicates=3)
    points = curve_points(screen, repeats=2)
    assert {p.axis: sorted({q.value for q in points if q.axis == p.axis}) for p in points} == dict(
        experiments=[1, 2, 3, 4, 5], sites=[1], wells=[1, 2])
    part, judged = point_screen(screen, CurvePoint("wells", 2, 0))
    own = part.wells[~part.wells.id_code.isin(judged)]
    assert set(own.groupby(["experiment", "sirna"]).size()) == {2}
    assert part.wells[part.wells.id_code.isin(judged)].groupby(["experiment", "sirna"]).size().eq(3).all()
    part, _ = point_screen(screen, CurvePoint("sites", 1, 0))
    assert part.sites().groupby("id_code").size().eq(1).all() and len(part.left_out) == len(part.wells)
    assert curve_points(design(), repeats=1)[-1] == CurvePoint("sites", 1, 0)  # one well each: none to vary


def test_plates_stand_in_for_experiments():
    wells = design(HUVEC=1).wells
    plates = pd.concat([wells.assign(plate=p, id_code=wells.id_code.str.replace("_1_", f"_{p}_")) for p in range(1, 5)])
    assert replicate_units(plates).nunique() == 4
    part, judged = point_screen(Screen("nowhere", "kaggle", plates.reset_index(drop=True)),
                                CurvePoint("experiments", 2, 0))
    assert part.wells.plate.nunique() == 3 and len(judged) == 5
    with pytest.raises(ValueError, match="a learning curve needs three"): curve_points(design(HUVEC=2))


@pytest.fixture(scope="module")
def curved(small_screen, tmp_path_factory):
    "A screen with three experiments, and the folder of its curve"
    out = tmp_path_factory.mktemp("curve") / "out"
    learning_curve(small_screen, out, recipe=TINY, repeats=2, say=quiet)
    return small_screen, out


def test_a_curve_resumes_and_trains_nothing_twice(curved, monkeypatch):
    screen, out = curved
    before, trained = pd.read_csv(out / "points.csv"), []
    assert before.groupby("axis").value.unique().map(list).to_dict() == dict(experiments=[1, 2], sites=[1])
    assert set(before.wells) == {8} and before.repeat.nunique() == 2 and before.unit.nunique() == 2
    points = curve_points(read_screen(screen), repeats=2)
    (out / str(points[-1]) / "run.json").unlink()  # as if it had been killed at the end of the last training
    usual = curve.train_run
    monkeypatch.setattr(curve, "train_run", lambda s, r, run, *a, **k: (trained.append((run / "run.json").exists()),
                                                                       usual(s, r, run, *a, **k))[1])
    after = learning_curve(screen, out, recipe=TINY, repeats=2, say=quiet)
    pd.testing.assert_frame_equal(before, after.reset_index(drop=True))
    assert trained == [True]*(len(points)-1) + [False]
    with pytest.raises(ValueError, match="seed is 0 there, 1 now"): learning_curve(screen, out, recipe=TINY, seed=1)
    with pytest.raises(ValueError, match="recipe"): learning_curve(screen, out, recipe=None)


def test_no_time_left(curved, tmp_path):
    said = []
    found = learning_curve(curved[0], tmp_path / "out", recipe=TINY, repeats=2, hours=1e-6, say=said.append)
    assert len(found) == 1 and "5 of 6 trainings are left" in said[-1] and "resumes" in said[-1]


def test_the_command_and_the_section_of_the_report(curved, small_run, capsys, tmp_path):
    screen, out = curved
    cli.rcic_learning_curve(data=screen, out=tmp_path / "c", recipe="laptop", laptop=1, repeats=1, debug=True)
    said = capsys.readouterr().out
    assert "experiments of a cell type to train on" in said and "sites of a well instead of 1" in said
    table = pd.read_csv(tmp_path / "c" / "curve.csv")
    assert list(table.columns[:3]) == ["axis", "value", "trainings"] and (tmp_path / "c" / "curve.png").exists()
    with pytest.raises(CliError, match="either --data, a screen, or --run"):
        cli.rcic_learning_curve(data=screen, run=small_run)
    with pytest.raises(CliError, match="holds screen|holds train|is what is read|holds"):
        cli.rcic_learning_curve(data=screen, out=small_run)
    assert "Nobody has asked yet" in run_curve(tmp_path)[0].data
    shutil.copytree(out, tmp_path / "run" / "learning_curve")
    parts = run_curve(tmp_path / "run")
    assert len(parts) == 3 and "<img" in parts[2].data and "experiments of a cell type" in parts[0].data
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "curve.csv").write_text("mine")
    with pytest.raises(FileExistsError, match="curve.csv"): write_curve(read_points(out), tmp_path / "d")


def drawn(gain, n=(1, 2, 4, 8), repeats=6, wells=300, seed=0):
    "Points whose accuracy is given, with noise"
    rng = np.random.default_rng(seed)
    return pd.DataFrame([dict(axis="experiments", value=v, repeat=r, unit=f"E{r}", wells=wells,
                              right=rng.binomial(wells, gain(v))) for r in range(repeats) for v in n])


@each("a, b", [(.8, .3), (.9, .7), (.5, 1.)])
def test_a_power_law_is_found(a, b):
    points = drawn(lambda v: 1-a*v**-b, wells=2000)
    t = curve_table(points).xs("experiments")
    law = fit_curve(t.index, t.accuracy, t.wells)
    assert law.b == pytest.approx(b, abs=.1) and law.a == pytest.approx(a, abs=.05)
    value, low, high = expected_accuracy(points, 16)
    assert value == pytest.approx(1-a*16**-b, abs=.03) and low <= value <= high
    assert "extrapolated, not measured" in curve_sentences(points)[0]
    assert plot_curve(points, .1).axes[0].lines


def test_no_law_is_made_up():
    for points in (drawn(lambda v: .6-.05*np.log2(v)), drawn(lambda v: {1: .2, 2: .8, 4: .2, 8: .8}[v]),
                   drawn(lambda v: .5+.1*v, n=(1, 2))):
        assert expected_accuracy(points, 9) is None
        said = curve_sentences(points)[0]
        assert "No curve fits" in said and "expect" not in said


def test_intervals_are_over_experiments_where_there_are_enough():
    few, many = drawn(lambda v: .5, repeats=2), drawn(lambda v: .5, repeats=8)
    assert (curve_table(few)["interval"] == "wells").all() and (curve_table(many)["interval"] == "experiments").all()
    uneven = many.assign(right=np.where(many.repeat % 2, 290, 10))  # experiments differ far more than wells
    t = curve_table(uneven)
    assert (t.high-t.low).min() > .4


def test_a_second_site_is_compared_on_the_same_wells():
    full = drawn(lambda v: .5, repeats=6)
    one = full[full.value == 8].assign(axis="sites", value=1, right=lambda t: t.right-30)
    said = curve_sentences(pd.concat([full, one]))
    assert "All sites of a well instead of 1: 10.0 points more (95 % interval 10.0 points to 10.0 points)" in said[1]
    assert curve_parts("/nowhere") == []
