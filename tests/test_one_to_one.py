"What one-to-one assignment did, and the sentence where it lowers accuracy: by hand, of a run, of a score."

import numpy as np
import pandas as pd
import pytest

from rcic_fastai.cli import core as cli
from rcic_fastai.predict.assign import assign_predictions
from rcic_fastai.predict.core import well_accuracy
from rcic_fastai.predict.one_to_one import assignment_effect, surplus_wells, WHEN_ONE_TO_ONE
from rcic_fastai.predict.submission import score_note
from rcic_fastai.run.submit import Run
from rcic_fastai.screen.read import read_screen


def test_wells_that_no_assignment_gets_right():
    assert surplus_wells(list("AAABB"), [1, 1, 2, 1, 2]) == 1
    assert surplus_wells(list("AAA"), [None, None, 1]) == 0  # nobody knows whether they are the same
    assert surplus_wells(list("AAAA"), [1, 1, 1, 1]) == 3


@pytest.mark.parametrize("true, assigned, said", [
    ([0, 1, 2], [0, 1, 2], "of 3 wells 3 are right with it and 2 without."),
    ([0, 0, 2], [0, 1, 2], "of 3 wells 2 are right with it and 2 without; with it at most 2 can be: the treatment of 1 "
                           "well is in another well of its experiment."),
    ([0, 0, 9], [1, 2, 0], ""),
    ([0, 1, 2], [1, 0, 2], "It lowers accuracy here, though each treatment has one well"),
])
def test_the_sentence(true, assigned, said):
    alone = [0, 3, 2]
    e = assignment_effect(["A"]*3, true, alone, assigned, range(4))
    assert e.alone == sum(a == b for a, b in zip(alone, true))
    assert e.assigned == sum(a == b for a, b in zip(assigned, true))
    text = e.sentence()
    if 9 in true:
        assert "It lowers accuracy here: the treatment of 1 well is in another" in text
        assert "that of 1 well is none" in text
        assert "--no-assignment does without" in text and e.unknown == 1
    else: assert said in text
    with pytest.raises(ValueError, match="the truth of none"): assignment_effect(["A"], [None], [0], [0], [0])


def test_a_run_is_asked_about_the_wells_that_it_set_aside(small_run, tmp_path, capsys):
    run = Run(small_run)
    run.predict("valid", progress=False, say=lambda *a: None)
    e, p = run.assignment_effect(), run.kept("valid")
    assert e.alone == well_accuracy(p, run.screen.wells)[0] and e.wells == 8
    held = run.screen.wells[~run.screen.wells.id_code.isin(p.wells().ids)]
    from rcic_fastai.screen.groups import plate_groups
    labels = assign_predictions(p, plate_groups(held)).set_index("id_code").sirna
    truth = run.screen.wells.set_index("id_code").sirna[labels.index]
    assert e.assigned == (labels == truth).sum() and e.surplus == e.unknown == 0
    cli.rcic_submit(run=small_run, out=tmp_path / "a.csv", debug=True)
    assert e.sentence("held-out ") in capsys.readouterr().out
    cli.rcic_submit(run=small_run, out=tmp_path / "b.csv", no_assignment=True, debug=True)
    assert "One-to-one" not in capsys.readouterr().out
    (small_run / "predictions" / "valid.npz").unlink()
    cli.rcic_submit(run=small_run, out=tmp_path / "c.csv", debug=True)
    assert WHEN_ONE_TO_ONE in capsys.readouterr().out


def test_a_score_says_where_the_truth_repeats_a_treatment(small_screen, tmp_path, capsys):
    screen = read_screen(small_screen)
    truth = pd.read_csv(small_screen / "truth.csv")
    test = screen.wells[screen.wells.sirna.isna() & (screen.wells.well_type == "treatment")].id_code
    truth = truth[truth.id_code.isin(test)].reset_index(drop=True)
    assert score_note(truth, truth) == ""
    twice = truth.assign(sirna=np.where(truth.index == 1, truth.sirna[0], truth.sirna))
    assert f"at most {len(truth)-1:,} can be right" in score_note(truth, twice)
    assert "repeats treatments, too" in score_note(twice, twice)
    for name, t in (("truth", twice), ("mine", truth)): t.to_csv(tmp_path / f"{name}.csv", index=False)
    cli.rcic_score(submission=tmp_path / "mine.csv", truth=tmp_path / "truth.csv", debug=True)
    said = capsys.readouterr().out
    assert "rcic-submit --no-assignment" in said and float(said.split()[-1]) == pytest.approx(1-1/len(truth), abs=1e-5)
