"""Adversarial validation: AUC with intervals, what tells training from test images, validation sets that look like
the test set."""

import numpy as np
import pandas as pd
import pytest
from cases import each
from sklearn.metrics import roc_auc_score
from sklearn.tree import DecisionTreeClassifier

from rcic_fastai.labels.adversarial import adversarial_report, auc_interval, choose_validation, probability_of_test


def draw(seed=0, n=400, m=200, shift=0.0, share=0.5, features=4):
    "Training rows, of which a share is shifted in feature 0 like all test rows; groups of four (training first)."
    rng = np.random.default_rng(seed)
    groups = np.arange(n + m) // 4
    shifted = np.where(groups < n // 4, (rng.random((n + m) // 4) < share)[groups], True)
    x = rng.normal(size=(n + m, features))
    x[:, 0] += shift * shifted
    return x[:n], x[n:], groups, shifted[:n]


@pytest.mark.parametrize("ties", [False, True])
def test_auc_is_that_of_scikit_learn_and_its_variance_that_of_delong(ties):
    rng = np.random.default_rng(0)
    y = rng.random(200) < 0.3
    s = rng.normal(size=200) + y
    s = s.round() if ties else s
    auc, low, high = auc_interval(s, y)
    assert auc == pytest.approx(roc_auc_score(y, s)) and low < auc < high
    over = np.array([[(a > b) + 0.5 * (a == b) for b in s[~y]] for a in s[y]])  # DeLong, pair by pair
    variance = over.mean(1).var(ddof=1) / y.sum() + over.mean(0).var(ddof=1) / (~y).sum()
    width = np.log(high / (1 - high)) - np.log(low / (1 - low))
    assert width == pytest.approx(2 * 1.959964 * variance**0.5 / (auc * (1 - auc)), rel=0.02)


def test_copies_in_one_group_add_nothing():
    rng = np.random.default_rng(1)
    y = np.arange(60) < 30
    s = rng.normal(size=60) + y
    five = np.repeat(np.arange(60), 5)
    assert auc_interval(s[five], y[five], five) == pytest.approx(auc_interval(s, y))
    _, low, high = auc_interval(s[five], y[five])
    assert high - low < 0.6 * np.ptp(auc_interval(s, y)[1:])


@pytest.mark.parametrize("sign", [1, -1])
def test_complete_separation_is_not_certainty(sign):
    auc, low, high = auc_interval(sign * np.arange(20), np.arange(20) >= 10)
    assert (auc, high, round(low, 3)) == (1, 1, 0.692) if sign > 0 else (auc, low, round(high, 3)) == (0, 0, 0.308)
    assert auc_interval(np.zeros(20), np.arange(20) >= 10)[0] == 0.5


def test_equal_sets_cannot_be_told_apart_and_shifted_ones_can():
    a, b, groups, _ = draw()
    same = adversarial_report(a, b, groups=groups)
    assert same.low.iloc[0] < 0.5 < same.high.iloc[0] and abs(same.auc.iloc[0] - 0.5) < 0.08
    far = adversarial_report(a, b + [0, 8, 0, -1], list("wxyz"), groups)
    assert (
        far.index[:3].tolist() == ["logistic regression", "x", "z"] and far.auc.iloc[0] > 0.99
        and far.auc["x"] > 0.99 > 0.4 > far.auc["z"]
    )
    assert far.differs[["logistic regression", "x", "z"]].all() and far["mean test"]["x"] > far["mean train"]["x"] + 6
    assert far.kind.tolist() == ["model"] + ["feature"] * 4


def test_any_classifier_may_judge_and_sees_no_row_of_its_groups():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 4)
    x = rng.normal(size=(100, 3))[groups]  # all rows of a group alike: a tree would know them again
    table = adversarial_report(x[:200], x[200:], groups=groups,
                               models=dict(linear=None, tree=DecisionTreeClassifier(random_state=0)))
    assert table.kind.tolist()[:2] == ["model", "model"] and abs(table.auc["tree"] - 0.5) < 0.15
    leaky = probability_of_test(x[:200], x[200:], None, DecisionTreeClassifier(random_state=0))
    assert roc_auc_score(np.arange(400) >= 200, leaky) > 0.95


def test_a_chosen_validation_set_is_closer_to_the_test_set():
    a, b, groups, shifted = draw(shift=2.0, share=0.3, n=800)
    c = choose_validation(a, b, 0.2, groups)
    assert c.rows.sum() == 160 and c.table.index.tolist() == ["weighted", "top", "random"]
    assert c.how in ("weighted", "top")
    assert abs(c.table.auc[c.how] - 0.5) < abs(c.table.auc["random"] - 0.5) - 0.1
    assert shifted[c.rows].mean() > shifted.mean() + 0.25
    assert not set(groups[:800][c.rows]) & set(groups[:800][~c.rows])
    np.testing.assert_array_equal(c.rows, choose_validation(a, b, 0.2, groups).rows)
    top = choose_validation(a, b, 0.2, groups, how="top")
    assert top.how == "top" and shifted[top.rows].mean() >= shifted[c.rows].mean()


@pytest.mark.parametrize("seed", range(3))
def test_classes_stay_on_both_sides(seed):
    a, b, groups, _ = draw(seed, shift=2.0, share=0.3)
    own = groups[:400]
    y = np.stack([own % 3 == 0, own < 2, own == 50, np.isin(own, (7, 60, 80))], 1).astype(np.uint8)
    c = choose_validation(a, b, 0.1, groups, y, min_positives=4, seed=seed)
    assert (y[c.rows].sum(0)[[0, 1, 3]] >= 4).all() and y[~c.rows].any(0).all() and c.absent == [2]


@each(
    "change,message",
    [
        (dict(share=0), "share is 0"),
        (dict(share=0.005), "0 groups for the validation set"),
        (dict(how="random"), "how is 'random'"),
        (dict(y=np.zeros((3, 2))), "labels of shape"),
        (dict(groups=[1]), "1 group for"),
        (dict(test=np.zeros((5, 3))), "expected .rows, features. with the same features"),
        (dict(test=np.full((200, 4), np.inf)), "feature 0 is inf in test row 0"),
        (dict(train=np.zeros((0, 4))), "there are no training rows"),
    ],
)
def test_bad_input(change, message):
    a, b, groups, _ = draw()
    with pytest.raises(ValueError, match=message):
        choose_validation(**{**dict(train=a, test=b, groups=groups), **change})


def test_tables_must_have_the_same_columns():
    a, b, *_ = draw()
    with pytest.raises(ValueError, match="stand in another order"):
        adversarial_report(pd.DataFrame(a, columns=list("wxyz")), pd.DataFrame(b, columns=list("wxzy")))
    with pytest.raises(ValueError, match="score nan"):
        auc_interval([0, np.nan], [True, False])
