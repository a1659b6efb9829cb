"Blends of several networks: what fits together, means, weights, reports."

import numpy as np
import pandas as pd
import pytest
from cases import each

from rcic_fastai.predict.blend import agreement, aligned, blend_predictions, blend_report, blend_weights
from rcic_fastai.predict.blend import check_members, join_folds
from rcic_fastai.predict.core import Predictions, well_accuracy


def draw(seed=0, signal=(2.5, 2.0, 1.5), scale=(1.0, 8.0, 3.0), n=60, k=12, common=0.3, classes=None):
    "Members of a noisy truth, and the table of wells."
    rng = np.random.default_rng(seed)
    classes, truth, shared = np.arange(k) if classes is None else np.asarray(classes), rng.integers(
        k, size=n), rng.normal(size=(n, k))
    ids = [f"RPE-0{i % 3 + 1}_{i % 4 + 1}_{'BCDEF'[i % 5]}{i % 22 + 2:02}" for i in range(n)]
    members = {
        name: Predictions(ids, classes, s * (d * np.eye(k)[truth] + noise), dict(level="well", run=name))
        for name, d, s, noise in zip("abc", signal, scale, common * shared + rng.normal(size=(3, n, k)))
    }
    assert len(set(ids)) == n
    return members, pd.DataFrame(dict(id_code=ids,
                                      sirna=pd.Series(classes[truth], dtype="Int64" if classes.dtype.kind == "i"
                                                      else object)))


def changed(p, rows=None, cols=None, **made):
    "Some rows and columns of predictions"
    rows, cols = np.arange(len(p.ids)) if rows is None else rows, np.arange(len(p.classes)) if cols is None else cols
    return Predictions(p.ids[rows], p.classes[cols], p.logits[np.ix_(rows, cols)], {**p.made, **made})


def softmax64(x):
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def accuracy(p, wells):
    return well_accuracy(p, wells)[0]


@pytest.mark.parametrize("weights", [None, [1, 2, 5], [0, 0.25, 0.75]])
def test_a_mean_of_probabilities(weights):
    members, _ = draw()
    w = np.full(3, 1 / 3) if weights is None else np.array(weights) / sum(weights)
    expected = sum(x * softmax64(p.logits) for x, p in zip(w, members.values()))
    blend = blend_predictions(members, weights)
    np.testing.assert_allclose(softmax64(blend.logits), expected, rtol=1e-5, atol=1e-12)
    np.testing.assert_array_equal(blend.labels, blend.classes[expected.argmax(1)])
    assert blend.made["weights"] == pytest.approx(dict(zip("abc", w)))
    assert blend.made["level"] == "well" and "run" not in blend.made


def test_a_mean_of_logits_is_blind_to_scale_and_offset():
    members, _ = draw()
    blend = blend_predictions(members, [1, 2, 3], "logit")
    x = [p.logits.astype(np.float64) for p in members.values()]
    x = [a - a.mean(1, keepdims=True) for a in x]
    expected = sum(w * a / a.std() for w, a in zip((1, 2, 3), x)) / 6 * sum(
        w * a.std() for w, a in zip((1, 2, 3), x)) / 6
    np.testing.assert_allclose(blend.logits, expected, rtol=1e-5, atol=1e-4)
    offset = np.random.default_rng(0).normal(size=(len(blend.ids), 1))
    b = members["b"]
    louder = {**members, "b": Predictions(b.ids, b.classes, 50 * b.logits + 9 * offset, b.made)}
    again = blend_predictions(louder, [1, 2, 3], "logit")
    np.testing.assert_array_equal(again.labels, blend.labels)
    ratio = again.logits / blend.logits
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=1e-2)
    # as large as its members
    same = {n: Predictions(p.ids, p.classes, p.logits * 4, p.made) for n, p in members.items()}
    np.testing.assert_allclose(blend_predictions(same, [1, 2, 3], "logit").logits, 4 * blend.logits, rtol=1e-4,
                               atol=1e-4)


@each("space", ["probability", "logit"])
@each("classes", [range(12), [f"gene{i}" for i in range(12)]])
def test_another_order_of_rows_and_columns_changes_nothing(space, classes):
    members, wells = draw(classes=classes)
    rng = np.random.default_rng(1)
    shuffled = {n: changed(p, rng.permutation(60), rng.permutation(12)) if n != "a" else p for n, p in members.items()}
    assert not np.array_equal(shuffled["b"].logits, members["b"].logits)
    blend, again = (blend_predictions(m, [1, 2, 3], space) for m in (members, shuffled))
    np.testing.assert_allclose(again.logits, blend.logits, rtol=1e-6, atol=1e-6)
    assert list(again.ids) == list(blend.ids) and list(again.classes) == list(blend.classes)
    assert blend_weights(shuffled, wells, space=space) == blend_weights(members, wells, space=space)
    pd.testing.assert_frame_equal(agreement(shuffled), agreement(members))
    pd.testing.assert_frame_equal(blend_report(shuffled, again, wells), blend_report(members, blend, wells))


def test_sites_are_averaged_first_even_if_members_saw_different_ones():
    rng = np.random.default_rng(0)
    ids = [f"RPE-01_1_{w}_{s}" for w in ("B02", "B03", "C04") for s in (1, 2)]
    a = Predictions(ids, range(4), rng.normal(size=(6, 4)), dict(level="site"))
    b = Predictions(ids[1:], range(4), rng.normal(size=(5, 4)), dict(level="site"))  # one site of B02
    blend = blend_predictions(dict(a=a, b=b.wells()))
    of_b = np.vstack([b.logits[:1], b.logits[1:].reshape(2, 2, 4).mean(1)])
    expected = (softmax64(a.logits.reshape(3, 2, 4).mean(1)) + softmax64(of_b)) / 2
    assert list(blend.ids) == ["RPE-01_1_B02", "RPE-01_1_B03", "RPE-01_1_C04"]
    np.testing.assert_allclose(softmax64(blend.logits), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="'a' has level 'site' and 'b' 'well': bring all to wells first"):
        check_members(dict(a=a, b=b.wells()))
    with pytest.raises(ValueError, match="site or well RPE-01_1_C04_2 is there twice"):
        changed(a, [0, 1, 2, 3, 4, 5, 5])  # would count double in the mean of its well


def test_weights_by_name_by_order_and_from_a_report():
    members, wells = draw()
    expected = blend_predictions(members, [1, 0, 3])
    for weights in (dict(c=6, a=2, b=0), np.array([0.25, 0, 0.75]), pd.Series(dict(b=0.0, c=3.0, a=1.0))):
        np.testing.assert_array_equal(blend_predictions(members, weights).logits, expected.logits)
    column = blend_report(members, expected, wells).weight.drop("blend")[::-1]
    np.testing.assert_array_equal(blend_predictions(members, column).logits, expected.logits)
    np.testing.assert_array_equal(blend_predictions(members, [0, 1, 0]).labels, members["b"].labels)


@each("weights, message", [
    ([1, 2], r"weights have shape \(2,\), expected one for each of 'a', 'b', 'c'"), (1.0, r"weights have shape \(\)"),
    (dict(a=1, b=1), "weights are for 'a', 'b', expected one for each of 'a', 'b', 'c'"),
    (dict(a=1, b=1, d=1), "weights are for 'a', 'b', 'd'"),
    ([1, -0.1, 1], "the weight of 'b' is -0.1"), ([1, 1, np.nan], "the weight of 'c' is nan"),
    (dict(a=np.inf, b=1, c=1), "the weight of 'a' is inf"),
    ([0, 0, 0], "all weights are 0"),
])
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        blend_predictions(draw()[0], weights)


def with_a_nan(p):
    q = changed(p)
    q.logits[3, 2] = np.nan
    return q


@each("change, message", [
    (lambda p: changed(p, range(1, 60)), r"ids differ: 1 of the 60 of 'a' are not in 'b', such as 'RPE-01_1_B02'$"),
    (lambda p: Predictions(["x_1", *p.ids[1:]], p.classes, p.logits, p.made),
     r"ids differ: 1 of .* 'RPE-01_1_B02'; 1 of the 60 of 'b' .* such as 'x_1'"),
    (lambda p: changed(p, cols=range(9)), r"classes differ: 3 of the 12 of 'a' are not in 'b', such as 9$"),
    (lambda p: Predictions(p.ids, [str(c) for c in p.classes], p.logits, p.made),
     r"classes differ: 12 .*, such as 0; 12 .*, such as '0'$"),
    (lambda p: changed(p, split="test"), "'a' has split 'valid' and 'b' 'test'$"),
    (lambda p: changed(p, target="cell_type"), "target 'sirna' and 'b' 'cell_type'"),
    (lambda p: changed(p, level=None), "'b' does not say whether its ids are sites or wells"),
    (lambda p: changed(p, []), "'b' is empty: 0 ids and 12 classes"),
    (with_a_nan, "'b' has a score of nan for RPE-01_4_E05, class 2"),
])
def test_members_that_do_not_fit_together(change, message):
    members, wells = draw()
    members = {n: changed(p, split="valid", target="sirna") for n, p in members.items()}
    check_members(members)
    members["b"] = change(members["b"])
    for check in (check_members, blend_predictions, agreement, lambda m: blend_weights(m, wells)):
        with pytest.raises(ValueError, match=message):
            check(members)


def test_a_blend_needs_two_members_and_a_known_space():
    members, wells = draw()
    for few, message in (({}, "got none"), (dict(a=members["a"]), "got 'a'")):
        with pytest.raises(ValueError, match=f"two members or more, {message}"):
            blend_predictions(few)
    for blend in (blend_predictions, lambda m, space: blend_weights(m, wells, space=space)):
        with pytest.raises(ValueError, match="space is 'rank', expected one of 'probability', 'logit'"):
            blend(members, space="rank")


def test_aligned_takes_the_order_of_another_and_refuses_other_sets():
    p = draw()[0]["a"]
    rows, cols = np.random.default_rng(0).permutation(60), np.random.default_rng(1).permutation(12)
    q = aligned(p, changed(p, rows, cols, run="other"))
    np.testing.assert_array_equal(q.logits, p.logits[np.ix_(rows, cols)])
    assert q.made == p.made
    with pytest.raises(ValueError, match="ids differ: 1 of the 60 of the predictions are not in"):
        aligned(p, changed(p, range(59)))
    with pytest.raises(ValueError, match="site or well RPE-01_1_B02 is there twice"):
        changed(p, [*range(60), 0])
    with pytest.raises(ValueError, match="class 0 is there twice"):
        Predictions(p.ids, [*p.classes[:-1], 0], p.logits, p.made)
    with pytest.raises(ValueError, match="the scores of RPE-01_1_B02 are NaN or infinite"):
        Predictions(p.ids, p.classes, p.logits * np.nan, p.made)


@pytest.mark.parametrize("space", ["probability", "logit"])
def test_extreme_logits_stay_finite(space):
    "Certain members that disagree, and a member without an opinion"
    ids, made = ["w1", "w2"], dict(level="well")
    a = Predictions(ids, range(3), [[1e4, -1e4, 0], [0, 1e4, 1e4]], made)
    b = Predictions(ids, range(3), [[-1e4, 1e4, 0], [0, 0, 1e4]], made)
    flat = Predictions(ids, range(3), np.full((2, 3), 0.1), made)
    for members in (dict(a=a, b=b), dict(a=a, flat=flat), dict(flat=flat, other=flat)):
        with np.errstate(over="raise", divide="raise", invalid="raise"):
            blend = blend_predictions(members, space=space)
        assert np.isfinite(blend.logits).all()
    assert blend_predictions(dict(a=a, b=b), space=space).labels[1] == 2
    assert (blend_predictions(dict(a=a, flat=flat), space=space).labels == a.labels).all()


def test_certain_members_do_not_end_in_a_tie():
    "Of two certain members the more certain one wins, although float32 cannot tell the logarithms of both means apart"
    a, b = (Predictions(["w"], range(3), [x], dict(level="well")) for x in ([25.0, 0, 0], [0, 0, 28.0]))
    mean = (softmax64(a.logits) + softmax64(b.logits)) / 2
    assert mean.argmax() == 2 and np.log(mean).astype(np.float32)[0, 0] == np.log(mean).astype(np.float32)[0, 2]
    assert blend_predictions(dict(a=a, b=b)).labels.tolist() == [2]


@each("space", ["probability", "logit"])
def test_folds(space):
    "Each well by those that have it: one of them, or the blend of two; whatever the order of rows and classes"
    members, wells = draw()
    rows = dict(a=range(0, 30), b=range(20, 45), c=range(45, 60))
    folds = {n: changed(p, list(rows[n])[::-1], np.random.default_rng(0).permutation(12) if n == "c" else None)
             for n, p in members.items()}
    joined = join_folds(folds, [1, 3, 1], space)
    assert joined.ids.tolist() == sorted(members["a"].ids) and joined.made["weights"] == dict(a=0.2, b=0.6, c=0.2)
    taken = lambda p, which: changed(p, [p.ids.tolist().index(i) for i in members["a"].ids[which]])
    for name, which in (("a", range(20)), ("b", range(30, 45)), ("c", range(45, 60))):
        np.testing.assert_array_equal(taken(joined, which).labels, taken(members[name], which).labels)
        if space == "probability":
            np.testing.assert_allclose(taken(joined, which).probabilities, taken(members[name], which).probabilities,
                                       atol=1e-6)
    if space == "probability":
        both = blend_predictions({n: taken(members[n], range(20, 30)) for n in "ab"}, [1, 3])
        np.testing.assert_allclose(taken(joined, range(20, 30)).logits, both.logits, atol=1e-6)
    report = blend_report(folds, joined, wells)
    assert report.known.tolist() == [30, 25, 15, 60] and report.agreement.isna().all()
    assert report.right["blend"] == accuracy(joined, wells)


@each("change, message", [
    (lambda m: dict(a=m["a"]), "folds need two members or more, got 'a'"),
    (lambda m: m | dict(b=changed(m["b"], split="test")), "'a' has split 'valid' and 'b' 'test'"),
    (lambda m: m | dict(b=changed(m["b"], cols=range(11))), "classes differ: 1 of the 12 of 'a' are not in 'b'"),
])
def test_folds_that_do_not_fit_together(change, message):
    members = {n: changed(p, range(i * 20, i * 20 + 20), split="valid") for i, (n, p) in enumerate(draw()[0].items())}
    with pytest.raises(ValueError, match=message): join_folds(change(members))
    with pytest.raises(ValueError, match="is held out by 'c' only, with a weight of 0"): join_folds(members, [1, 1, 0])


@pytest.mark.slow
@pytest.mark.parametrize("space", ["probability", "logit"])
def test_chosen_weights_are_never_worse_than_the_best_member(space):
    "Twenty random cases, some with unlabelled wells; and in most of them better"
    gains = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        members, wells = draw(seed, rng.uniform(0.5, 3, 3), np.exp(rng.uniform(-2, 4, 3)), common=rng.uniform(0, 2))
        wells.loc[rng.random(60) < 0.2 * (seed % 2), "sirna"] = pd.NA
        weights = blend_weights(members, wells, steps=10, space=space)
        assert list(weights) == list(members) and sum(weights.values()) == pytest.approx(1)
        assert min(weights.values()) >= 0
        assert weights == blend_weights(members, wells, steps=10, space=space)
        gains.append(accuracy(blend_predictions(members, weights, space),
                              wells) - max(accuracy(p, wells) for p in members.values()))
    assert min(gains) >= 0 and np.mean(np.array(gains) > 0) > 0.5


def test_a_member_much_better_than_the_rest_gets_the_weight():
    members, wells = draw(signal=(0.1, 9.0, 0.1))
    assert accuracy(members["b"], wells) == 60 and max(accuracy(members[n], wells) for n in "ac") < 20
    weights = blend_weights(members, wells)
    assert weights["b"] > 0.8
    one_step = blend_weights(members, wells, steps=1)
    assert one_step == dict(a=0.0, b=1.0, c=0.0)


def test_equally_right_blends_are_told_apart_by_log_loss():
    "Both members are right everywhere; the one that is more certain of it starts, and the mean cannot beat it"
    ids, truth = ["w1", "w2", "w3"], pd.DataFrame(dict(id_code=["w1", "w2", "w3"], sirna=[0, 1, 2]))
    members = {n: Predictions(ids, range(3), s * np.eye(3), dict(level="well"))
               for n, s in (("doubtful", 1), ("certain", 5))}
    assert blend_weights(members, truth) == dict(doubtful=0.0, certain=1.0)


def test_the_best_blend_on_the_way_is_kept():
    "Only equal weights are right about both wells, so the third step makes it worse"
    ids, truth = ["w1", "w2"], pd.DataFrame(dict(id_code=["w1", "w2"], sirna=[0, 1]))
    a, b = np.log([[0.35, 0.65], [0.3, 0.7]]), np.log([[0.7, 0.3], [0.65, 0.35]])
    members = {n: Predictions(ids, range(2), x, dict(level="well")) for n, x in dict(a=a, b=b).items()}
    assert [accuracy(blend_predictions(members, w), truth) for w in ([1, 0], [1, 1], [2, 1], [1, 2])] == [1, 2, 1, 1]
    for steps in (2, 3, 4, 5):
        assert blend_weights(members, truth, steps=steps) == dict(a=0.5, b=0.5)


def test_weights_need_known_wells():
    members, wells = draw()
    for table, message in ((wells.assign(sirna=pd.NA), "none of the 60 wells has a known sirna"),
                           (wells.drop(columns="sirna"), "no column 'sirna'"),
                           (wells.assign(id_code="x"), "none of the 60 wells"),
                           (wells.assign(sirna=wells.sirna.astype(str)), "no known sirna, such as")):
        with pytest.raises(ValueError, match=message):
            blend_weights(members, table)
    with pytest.raises(ValueError, match="steps is 0, expected 1 or more"):
        blend_weights(members, wells, steps=0)
    absent = {n: p.only(range(11)) for n, p in members.items()}  # wells of class 11 cannot be right, and do no harm
    assert sum(blend_weights(absent, wells).values()) == pytest.approx(1)
    named = wells.rename(columns=dict(sirna="gene"))
    assert blend_weights(members, named, "gene") == blend_weights(members, wells)


def test_a_report_by_hand(tmp_path):
    ids, made = ["w1", "w2", "w3", "w4"], dict(level="well")
    rows = dict(a=[0, 1, 0, 1], b=[0, 1, 1, 1], c=[1, 1, 1, 1])
    members = {n: Predictions(ids, [0, 1], np.eye(2)[r], made) for n, r in rows.items()}
    blend = Predictions.load(blend_predictions(members, [1, 2, 1]).save(tmp_path / "blend.npz"))  # as a command would
    wells = pd.DataFrame(dict(id_code=ids, sirna=pd.array([0, 1, 0, None], "Int64")))
    report = blend_report(members, blend, wells)
    assert list(report.index) == ["a", "b", "c", "blend"] and list(blend.labels) == rows["b"]
    assert list(report.columns) == ["weight", "right", "known", "accuracy", "agreement"]
    assert report.weight.tolist() == [0.25, 0.5, 0.25, 1] and report.right.tolist() == [3, 2, 1, 2]
    assert report.known.tolist() == [3] * 4
    np.testing.assert_allclose(report.accuracy, [1, 2 / 3, 1 / 3, 2 / 3])
    np.testing.assert_allclose(report.agreement,
                               [(0.75 + 0.5) / 2, (0.75 + 0.75) / 2, (0.5 + 0.75) / 2, (0.75 + 1 + 0.75) / 3])
    np.testing.assert_allclose(agreement(members), [[1, 0.75, 0.5], [0.75, 1, 0.75], [0.5, 0.75, 1]])
    unknown = blend_report(members, blend, wells.assign(sirna=pd.array([None] * 4, "Int64")))
    assert unknown.known.tolist() == [0] * 4 and unknown.accuracy.isna().all() and unknown.agreement.notna().all()


def test_a_report_of_another_blend_is_refused():
    members, wells = draw()
    blend = blend_predictions(members)
    with pytest.raises(ValueError, match="the blend is one of 'a', 'b', 'c', not of 'a', 'b'"):
        blend_report({n: members[n] for n in "ab"}, blend, wells)
    with pytest.raises(ValueError, match="ids differ"):
        blend_report({n: changed(p, range(50)) for n, p in members.items()}, blend, wells)
    clash = dict(blend=members["a"], b=members["b"])
    with pytest.raises(ValueError, match="'blend' is the name of a row"):
        blend_report(clash, blend_predictions(clash), wells)
