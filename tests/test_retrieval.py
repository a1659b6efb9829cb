"Nearest images of other groups, a prior from their labels, and whether it helps."

import numpy as np
import pandas as pd
import pytest
from cases import each
from sklearn.base import clone
from sklearn.metrics import average_precision_score

from rcic_fastai.labels.metrics import macro_f1
from rcic_fastai.labels.retrieval import Retrieval, _resamples, apply_prior, held_out_prior, nearest_rows
from rcic_fastai.labels.retrieval import neighbour_table, retrieval_report, unit_rows


def simulated(n=120, per=4, seed=0, location=0.3, noise=0.6):
    "Images of `n` antibodies, `per` each: embeddings, labels, antibodies and a mediocre classifier's probabilities"
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, 5)) < [0.5, 0.3, 0.2, 0.15, 0.1]).astype(np.uint8)
    who = np.repeat(np.arange(n), per)
    centres = unit_rows(rng.standard_normal((n, 24))) + location * labels @ unit_rows(rng.standard_normal((5, 24)))
    x = centres[who] + noise * unit_rows(rng.standard_normal((n * per, 24)))
    p = 1 / (1 + np.exp(-(3 * labels[who] - 1.5 + 1.5 * rng.standard_normal((n * per, 5)))))
    return dict(x=x, y=labels[who], groups=np.char.add("HPA", who.astype(str)), p=p)


def by_hand(q, g, k, cq, cg):
    c = q @ g.T
    c[cq[:, None] == cg[None]] = -np.inf
    order = np.argsort(-c, 1, kind="stable")[:, :k]
    return np.take_along_axis(c, order, 1), order


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_blocks_change_nothing(block):
    rng = np.random.default_rng(0)
    q, g = unit_rows(rng.standard_normal((40, 16))), unit_rows(rng.standard_normal((130, 16)))
    codes = rng.integers(0, 5, 40), rng.integers(0, 5, 130)
    cosines, rows = nearest_rows(q, g, 4, codes, block)
    expected = by_hand(q, g, 4, *codes)
    np.testing.assert_array_equal(rows, expected[1])
    np.testing.assert_allclose(cosines, expected[0], atol=1e-6)
    assert cosines.dtype == np.float32 and rows.dtype == np.int64


def test_length_does_not_count_and_zeros_are_near_to_nothing():
    x = np.array([[1e-30, 2e-30], [1e30, 2e30], [3, 6], [0, 0]])
    u = unit_rows(x)
    np.testing.assert_allclose(u[:3], np.tile(np.array([1, 2]) / 5**0.5, (3, 1)), rtol=1e-6)
    assert not u[3].any()
    cosines, rows = nearest_rows(u, u, 5)
    assert (rows[:3, :3] >= 0).all() and (rows[:, 3:] == -1).all() and (rows[3] == -1).all()
    assert np.isneginf(cosines[rows == -1]).all()
    assert (nearest_rows(u, u[:0])[1] == -1).all() and nearest_rows(u[:0], u)[0].shape == (0, 1)


@each("f, message", [
    (lambda: unit_rows([1.0, 2.0]), r"embeddings have shape \(2,\)"),
    (lambda: unit_rows([[1.0], [np.inf]]), "row 1 has a value that is not finite"),
    (lambda: nearest_rows(np.ones((1, 2)), np.ones((1, 3))), "queries have 2 features and the gallery 3"),
    (lambda: nearest_rows(np.ones((1, 2)), np.ones((1, 2)), 0), "k is 0"),
    (lambda: apply_prior(np.ones((2, 3)), np.ones((2, 3)), 1.5, [True, True]), "weight is 1.5"),
    (lambda: apply_prior(np.ones((2, 3)), np.ones((2, 2)), 0.5, [True, True]), "do not fit"),
    (lambda: Retrieval().fit(np.ones((2, 3)), np.full((2, 4), -1)),
     "the gallery is empty: none of its 2 images has known labels"),
    (lambda: Retrieval().fit(np.ones((0, 3)), np.ones((0, 4))), "the gallery is empty: none of its 0 images"),
    (lambda: Retrieval().fit(np.ones((2, 3)), np.ones((3, 4))), "2 embeddings for 3 rows of labels"),
    (lambda: Retrieval().fit(np.ones((2, 3)), np.ones((2, 4)), ["a"]), "1 group for 2 embeddings"),
    (lambda: Retrieval().fit(np.ones((2, 3)), np.ones((2, 4)), p=np.ones((2, 3))),
     r"probabilities of shape \(2, 3\) for labels of \(2, 4\)"),
    (lambda: Retrieval().fit(np.ones((2, 3)), np.ones((2, 4)), p=np.full((2, 4), np.nan)),
     "no image of the gallery has both labels and probabilities"),
    (lambda: retrieval_report(np.ones((2, 4)), np.ones((2, 4)), np.ones((2, 3))), "expected the same"),
    (lambda: retrieval_report(-np.ones((2, 4)), np.ones((2, 4)), np.ones((2, 4))), "no image has known labels")])
def test_bad_input(f, message):
    with pytest.raises(ValueError, match=message):
        f()


def test_an_image_finds_other_groups_unless_asked():
    "Row 1 is a twin of row 0 in its group, row 2 is a little further and of another; a missing group is alone"
    x, y = np.array([[1, 0], [1, 0.01], [1, 0.3], [0, 1]]), np.eye(4)
    r = Retrieval(threshold=0.5).fit(x, y, ["a", "a", "b", None])
    assert r.kneighbors(x[:1], ["a"])[1].tolist() == [[2]] and r.kneighbors(x[:1])[1].tolist() == [[0]]
    assert r.kneighbors(x[:1], ["new"])[1].tolist() == [[0]] and r.kneighbors(x[3:], [None])[1].tolist() == [[3]]
    found = Retrieval(threshold=0.5).fit(x, y, ["a", "a", "b", None], p=np.full((4, 4), 0.2))
    own = Retrieval(threshold=0.5, own_group=True).fit(x, y, ["a", "a", "b", None], p=np.full((4, 4), 0.2))
    assert found.curve_.near.max() == 0.75 and own.curve_.near.max() == 0.75
    # what the neighbours of the choice were: right only within the own group
    y = np.array([[1, 0], [1, 0], [0, 1], [0, 1]])
    both = (Retrieval(threshold=0.5, weight=1.0, own_group=o).fit(x, y, ["a", "a", "b", None], p=np.full((4, 2), 0.2))
            for o in (False, True))
    assert [round(float(r.curve_.precision.iloc[0]), 2) for r in both] == [0.0, 0.67]


def test_unknown_labels_are_no_neighbours():
    x, y = np.array([[1, 0], [1, 0.2], [0, 1]]), np.array([[-1, -1], [1, 0], [0, 1]])
    r = Retrieval(threshold=0.5, weight=0.5).fit(x, y)
    assert r.rows_.tolist() == [1, 2] and r.kneighbors([[1, 0], [0, 0]])[1].tolist() == [[1], [-1]]
    prior, near = r.predict([[1, 0], [0, 0], [-1, 0]])
    assert prior.tolist() == [[1, 0], [0, 0], [0, 0]] and near.tolist() == [True, False, False]
    y = np.where(y < 0, np.nan, y)
    assert Retrieval(threshold=0.5).fit(x, y).rows_.tolist() == [1, 2]


def test_several_neighbours_are_averaged_above_the_threshold():
    x, y = np.array([[1, 0], [1, 0.1], [0, 1]]), np.array([[1, 0], [1, 1], [0, 1]])
    prior, near = Retrieval(k=3, threshold=0.9, weight=0.5).fit(x, y).predict([[1, 0]])
    assert prior.tolist() == [[1, 0.5]] and near.tolist() == [True]


def test_a_threshold_by_precision_reaches_it():
    d = simulated()
    for precision in (0.5, 0.9, 0.99):
        r = Retrieval(precision=precision, own_group=True).fit(d["x"], d["y"], d["groups"])
        c = r.curve_.set_index("threshold").precision
        assert c[r.threshold_] >= precision and (c[c.index < r.threshold_] < precision).all() and r.weight_ == 0.5
    r = Retrieval(precision=1.01).fit(d["x"], d["y"], d["groups"])  # cannot be reached: nothing is retrieved
    assert np.isinf(r.threshold_) and not r.predict(d["x"])[1].any()
    np.testing.assert_array_equal(r.apply(d["p"], d["x"]), d["p"])


def test_the_choice_helps_where_neighbours_know_and_is_none_where_they_do_not():
    d = simulated()
    r = Retrieval(own_group=True).fit(**d)
    plain = macro_f1(d["y"], d["p"] >= 0.5)
    assert r.curve_.score.max() > plain + 0.1
    assert r.curve_.set_index(["threshold", "weight"]).score[r.threshold_, r.weight_] == r.curve_.score.max()
    # a perfect classifier needs no prior
    assert Retrieval(own_group=True).fit(**{**d, "p": d["y"] * 0.98 + 0.01}).threshold_ == np.inf
    fixed = Retrieval(threshold=0.6, weight=0.25).fit(**d)
    assert (fixed.threshold_, fixed.weight_) == (0.6, 0.25) and len(fixed.curve_) == 1


def test_images_without_probabilities_are_gallery_only():
    d = simulated()
    outside = np.arange(len(d["x"])) % 4 == 0
    p = np.where(outside[:, None], np.nan, d["p"])
    r = Retrieval(own_group=True).fit(d["x"], d["y"], d["groups"], p)
    first = r.curve_.iloc[0]
    assert len(r.rows_) == len(d["x"]) and first.score == macro_f1(d["y"][~outside], d["p"][~outside] >= 0.5)
    assert outside[r.kneighbors(d["x"])[1][:, 0]].any()


@pytest.mark.parametrize("own_group", [False, True])
def test_labels_of_a_fold_do_not_reach_its_own_result(own_group):
    d, r = simulated(60), Retrieval(k=2, own_group=own_group)
    folds = np.arange(240) // 4 % 3
    out, chosen = held_out_prior(r, **d, folds=folds)
    held = folds == 1
    other, _ = held_out_prior(r, d["x"], np.where(held[:, None], 1 - d["y"], d["y"]),
                              np.where(held[:, None], d["p"], d["p"]), d["groups"], folds=folds)
    np.testing.assert_array_equal(out[held], other[held])
    assert chosen.index.tolist() == [0, 1, 2] and not hasattr(r, "threshold_")
    part, chosen = held_out_prior(r, **d, folds=np.where(folds == 1, 1, -1))
    np.testing.assert_array_equal(part[~held], d["p"][~held])
    assert chosen.index.tolist() == [1]


def test_held_out_groups_are_whole_and_unknown_rows_stay():
    d = simulated(60)
    y = d["y"].astype(int)
    y[:8] = -1
    out, chosen = held_out_prior(Retrieval(threshold=-1.0, weight=1.0), d["x"], y, d["p"], d["groups"], n_folds=3)
    np.testing.assert_array_equal(out[:8], d["p"][:8])
    assert (out[8:] != d["p"][8:]).any(1).all() and len(chosen) == 3 and chosen.near.eq(1).all()


def test_the_report_is_honest():
    d = simulated()
    rng = np.random.default_rng(0)
    better = 0.3 * d["p"] + 0.7 * d["y"]
    report = retrieval_report(d["y"], d["p"], better, d["groups"])
    assert report.loc["without", "score"] == macro_f1(d["y"], d["p"] >= 0.5) and report.loc["difference", "low"] > 0
    assert report.score["difference"] == pytest.approx(report.score["with"] - report.score["without"])
    assert 0 < report.changed["with"] < 1
    same = retrieval_report(d["y"], d["p"], d["p"], d["groups"])
    assert same.loc["difference"].tolist() == [0, 0, 0, 0]
    noise = np.where(rng.random((len(d["p"]), 1)) < 0.1, rng.random(d["p"].shape), d["p"])
    assert retrieval_report(d["y"], d["p"], noise, d["groups"]).loc["difference", "low"] < 0


def test_groups_are_drawn_as_a_whole():
    "Four copies of each image are worth one: the interval is that of the images without copies"
    d = simulated(80, per=1)
    y, p, q = (np.repeat(a, 4, 0) for a in (d["y"], d["p"], 0.8 * d["p"] + 0.2 * d["y"]))
    width = lambda groups, rows=slice(None): (lambda t: t.high - t.low)(
        retrieval_report(y[rows], p[rows], q[rows], groups, n_boot=400).loc["without"])
    grouped, single, alone = width(np.repeat(d["groups"], 4)), width(None), width(None, slice(None, None, 4))
    assert grouped == pytest.approx(alone, rel=0.2) and single < 0.7 * grouped
    uneven = np.repeat(np.arange(5), [1, 2, 3, 4, 5])[np.random.default_rng(0).permutation(15)]
    for rows in _resamples(uneven, 15, 20, 0):
        times = np.bincount(rows, minlength=15)
        drawn = [set(times[uneven == g]) for g in range(5)]  # all images of a group as often as each other
        assert all(len(t) == 1 for t in drawn) and sum(t.pop() for t in drawn) == 5
    missing = np.repeat(d["groups"], 4).astype(object)
    missing[:] = None
    assert width(missing) == pytest.approx(single, rel=0.01)


def test_any_score_of_probabilities_and_unknown_rows():
    d = simulated(60)
    y = d["y"].astype(float)
    y[:20] = np.nan
    score = lambda y, p: average_precision_score(y, p, average="macro")  # noqa: E731
    report = retrieval_report(y, d["p"], d["p"] * 0.5 + 0.5 * d["y"], d["groups"], decision=None, score=score,
                              n_boot=20)
    assert report.score["without"] == score(d["y"][20:], d["p"][20:]) and report.score["difference"] > 0
    r = Retrieval(decision=None, score=score, own_group=True).fit(**d)
    assert r.curve_.score.iloc[0] == pytest.approx(score(d["y"], d["p"]), abs=1e-6)


def test_neighbours_by_name():
    d = simulated(30)
    ids = np.array([f"{g}_{i}" for i, g in enumerate(d["groups"])])
    r = Retrieval(threshold=0.6).fit(d["x"], d["y"], d["groups"])
    t = neighbour_table(r, d["x"][:5], ids[:5], ids, k=3)
    assert t.shape == (15, 6) and t["rank"].tolist() == [1, 2, 3] * 5 and (t["query"] != t.neighbour).all()
    assert (t.near == (t.cosine >= 0.6)).all()
    assert t.groupby("query").cosine.apply(lambda c: c.is_monotonic_decreasing).all()
    first = t.iloc[0]
    row = np.flatnonzero(ids == first.neighbour)[0]
    assert first.labels == tuple(np.flatnonzero(d["y"][row]))
    assert first.cosine == pytest.approx((unit_rows(d["x"])[0] * unit_rows(d["x"])[row]).sum(), abs=1e-6)
    others = neighbour_table(r, d["x"][:5], ids[:5], ids, d["groups"][:5])
    assert not (others["query"].str.split("_").str[0] == others.neighbour.str.split("_").str[0]).any()
    with pytest.raises(ValueError, match="4 names for 5 images"):
        neighbour_table(r, d["x"][:5], ids[:4], ids)


def test_it_is_an_estimator():
    r = Retrieval(k=3, own_group=True)
    assert clone(r).get_params()["k"] == 3 and "own_group=True" in repr(r)
    d = simulated(20)
    assert r.fit(d["x"], d["y"], pd.Series(d["groups"])) is r
