"A few dozen generated bad inputs; `python tests/bad_inputs.py` tries hundreds"

from bad_inputs import main


def test_bad_inputs_end_in_a_line_that_names_them(tmp_path):
    counts, wrong = main(seed=0, number=60, root=tmp_path, say=lambda *a: None)
    assert sum(c[0] for c in counts.values()) > 50
    assert not [w for w in wrong if w[2]], wrong
