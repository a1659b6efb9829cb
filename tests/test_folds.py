"Grouped, stratified folds: no group divided, rare classes spread, what is refused; and the real tables."

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cases import each

from rcic_fastai.screen.duplicates import external_keys, join_groups
from rcic_fastai.screen.folds import check_no_straddling, fold_report, grouped_folds, straddling_groups

REAL = Path(__file__).parents[1].parent / "shared" / "hpa"
SHARES = (0.4, 0.2, 0.1, 0.05, 0.02, 0.005)


def atlas(seed, n_groups=300, largest=12, shares=SHARES):
    "Labels and groups; all images of a group have the same labels"
    rng = np.random.default_rng(seed)
    y = (rng.random((n_groups, len(shares))) < shares).astype(np.uint8)
    groups = rng.permutation(np.repeat(np.arange(n_groups), rng.integers(1, largest + 1, n_groups)))
    return y[groups], groups


def counts(y, folds, n_folds):
    return np.stack([y[folds == j].sum(0) for j in range(n_folds)])


@each("n_folds", [2, 5, 10])
@each("kind", ["numbers", "names", "none"])
def test_no_group_is_divided_and_every_row_has_a_fold(n_folds, kind):
    for seed in range(4):
        y, groups = atlas(seed)
        given = {"numbers": groups * 7 - 50, "names": pd.Series(groups).map("HPA{:05}".format), "none": None}[kind]
        folds = grouped_folds(y, given, n_folds, seed)
        assert folds.dtype == np.int64 and folds.shape == (len(y),) and set(folds) == set(range(n_folds))
        if given is not None:
            assert pd.Series(folds).groupby(groups).nunique().max() == 1 and straddling_groups(given, folds) == []


def test_folds_depend_on_the_seed_alone():
    y, groups = atlas(0)
    first = grouped_folds(y, groups, seed=3)
    # what groups are called does not matter
    assert np.array_equal(first, grouped_folds(y.astype(float), groups.astype(str), seed=3))
    assert any(not np.array_equal(first, grouped_folds(y, groups, seed=s)) for s in range(3))


@each("n_groups", [1, 2, 3, 4, 5, 7])
def test_the_groups_of_a_rare_class_reach_as_many_folds_as_there_are(n_groups):
    for seed in range(10):
        y, groups = atlas(seed, shares=(0.5, 0.3))
        rare = np.isin(groups, np.random.default_rng(seed).choice(300, n_groups, replace=False))
        folds = grouped_folds(np.column_stack([y, rare]), groups, seed=seed)
        per_fold = pd.Series(groups[rare]).groupby(folds[rare]).nunique()
        assert len(per_fold) == min(5, n_groups)
        assert fold_report(np.column_stack([y, rare]), folds)["empty"].iloc[-1] == max(0, 5 - n_groups)


def test_the_largest_groups_are_dealt_first():
    "6 | 3 + 3 and 5 + 1 | 4 + 2: only whole groups, so the order decides"
    for seed in range(10):
        for sizes in ([3, 6, 3], [1, 4, 2, 5]):
            groups = np.repeat(np.arange(len(sizes)), sizes)
            assert np.bincount(grouped_folds(np.ones((len(groups), 1)), groups, 2, seed)).tolist() == [6, 6]


def test_ties_go_to_the_fold_that_lacks_most_of_the_other_classes():
    """C is dealt first, then G of five images, to the other fold; for class 0 folds tie, and A joins G: C's fold is
    smaller, but has class 2"""
    groups = list("CGGGGGAABEF")
    has = dict(C=[0, 1, 1, 0], G=[0, 0, 0, 1], A=[1, 0, 1, 0], B=[1, 0, 0, 0], E=[0, 0, 1, 0], F=[0, 0, 1, 0])
    for seed in range(20):
        fold = dict(zip(groups, grouped_folds([has[g] for g in groups], groups, 2, seed).tolist()))
        assert fold["A"] == fold["G"] != fold["C"] == fold["B"]


def test_images_without_labels_even_out_the_sizes():
    sizes = np.bincount(grouped_folds(np.zeros((37, 3)), None, 5))
    assert sizes.max() - sizes.min() == 1
    groups = np.repeat(np.arange(3), [6, 2, 3])  # the third class has none
    y = np.eye(3)[groups][:, :1].repeat(2, 1)
    folds = grouped_folds(y, groups, 2)
    assert sorted(np.bincount(folds)) == [5, 6]


def test_stratified_folds_are_more_even_than_folds_by_chance():
    ours, chance = [], []
    for seed in range(8):
        y, groups = atlas(seed)
        y = y[:, y.any(0)]
        random = (np.random.default_rng(seed).permutation(groups.max() + 1) % 5)[groups]
        ours.append(fold_report(y, grouped_folds(y, groups, seed=seed)).spread[:4].mean())
        chance.append(fold_report(y, random).spread[:4].mean())
    assert np.mean(ours) < 0.2 * np.mean(chance), (np.mean(ours), np.mean(chance))


@each(
    "y, groups, n_folds, message",
    [
        ([[0, 1]] * 6, None, 1, "n_folds is 1, expected 2 to 6"),
        ([[0, 1]] * 6, None, 7, "n_folds is 7, expected 2 to 6, the number of groups"),
        ([[0, 1]] * 6, list("aabbcc"), 4, "n_folds is 4, expected 2 to 3"),
        ([[0, 1]] * 6, list("aabb"), 2, "4 groups for 6 rows"),
        ([0, 1, 0], None, 2, r"labels have shape \(3,\), expected \(rows, classes\)"),
        (np.zeros((0, 2)), None, 2, "there are no rows"),
        ([[0, 1], [0, 2]], None, 2, "row 1 has the value 2 for class 1, expected 0 or 1"),
        ([[0, 1], [-1, 0]], None, 2, "row 1 has the value -1 for class 0, expected 0 or 1"),
        ([[0, 1], [np.nan, 0]], None, 2, "row 1 has the value nan for class 0, expected 0 or 1"),
    ],
)
def test_what_cannot_be_divided_is_refused(y, groups, n_folds, message):
    with pytest.raises(ValueError, match=message):
        grouped_folds(y, groups, n_folds)


def test_the_report_counts():
    y = np.array([[1, 0, 0], [1, 0, 0], [1, 0, 1], [1, 0, 0], [0, 0, 1], [1, 0, 0]])
    report = fold_report(y, [0, 0, 0, 1, 1, 2], ["a", "b", "c"], groups=["x", "x", "y", "y", None, None])
    assert report.index.tolist() == ["a", "b", "c"] and report.positives.tolist() == [5, 0, 2]
    assert report[["fold 0", "fold 1", "fold 2"]].values.tolist() == [[3, 1, 1], [0, 0, 0], [1, 1, 0]]
    assert report["min"].tolist() == [1, 0, 0] and report["max"].tolist() == [3, 0, 1]
    assert report["empty"].tolist() == [0, 3, 1]
    assert report.spread[["a", "c"]].tolist() == pytest.approx([2 / (5 / 3), 1 / (2 / 3)])
    assert np.isnan(report.spread["b"])
    assert report.groups.tolist() == [3, 0, 2] and report.straddling.tolist() == [1, 0, 1]
    assert report.attrs["straddling"] == 1
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        fold_report(y, [0] * 6, ["a", "b"])
    with pytest.raises(ValueError, match=r"folds have shape \(5,\), expected one for each of the 6 rows"):
        fold_report(y, [0] * 5)


@each(
    "parts, message",
    [
        (([0, 2], [3]), "group 'b' is in part 0 (row 2) and in part 1 (row 3); 1 group is shared"),
        (([0, 2], [4], [1, 3]), "group 'a' is in part 0 (row 0) and in part 2 (row 1); 2 groups are shared"),
        (([True] * 5 + [False], [False] * 5 + [True]), "group 'c' is in part 0 (row 4) and in part 1 (row 5)"),
        (([0], [-1]), "part 1 holds values from -1 to -1, expected row numbers from 0 to 5"),
        (([0], [True, False]), "part 1 is a mask of shape (2,), expected one value for each of the 6 rows"),
        (([0], [0.5]), "part 1 holds values from 0.5 to 0.5"),
    ],
)
def test_parts_that_share_a_group_are_refused(parts, message):
    groups = list("aabbcc")
    with pytest.raises(ValueError) as e:
        check_no_straddling(groups, *parts)
    assert message in str(e.value)
    check_no_straddling(groups, [0, 1], [], [2, 3], np.array([False] * 4 + [True] * 2))


def test_missing_groups_are_alone():
    y, groups = atlas(1)
    groups = pd.Series(groups).map(str).where(groups % 3 > 0, None)
    folds = grouped_folds(y, groups)
    assert straddling_groups(groups, folds) == []
    alone = groups.isna().to_numpy()
    assert np.bincount(folds[alone]).min() > 0.15 * alone.sum()
    check_no_straddling(groups, *(folds == j for j in range(5)))


# The real tables


@pytest.fixture(scope="module")
def real():
    if not REAL.exists():
        pytest.skip(f"no real tables at {REAL}")
    train, external = (pd.read_csv(REAL / f"{name}.csv") for name in ("train", "external"))
    both = pd.concat([train, external], ignore_index=True)
    pairs = np.array([(row, int(c)) for row, t in enumerate(both.Target) for c in t.split()])
    y = np.zeros((len(both), 28), np.uint8)
    y[pairs[:, 0], pairs[:, 1]] = 1
    return y, external_keys(both.Id), len(train)


@pytest.mark.slow
def test_real_train_and_external_are_divided_without_a_leak(real):
    """Antibodies, wells and duplicates: 13 % of the training images get a twin among the external ones, as in
    reality, some of them several"""
    y, keys, n_train = real
    assert len(y) == 31_072 + 74_606 and keys.antibody.nunique() == 12_815 and keys.antibody[:n_train].isna().all()
    assert keys.antibody[n_train:].notna().all()
    rng = np.random.default_rng(0)
    twins = np.column_stack([rng.choice(n_train, round(0.13 * n_train), replace=False),
                             rng.integers(n_train, len(y), round(0.13 * n_train))])
    groups = join_groups(keys.antibody, keys.plate_well, pairs=twins)
    start = time.process_time()
    folds = grouped_folds(y, groups)
    assert time.process_time() - start < 8
    for key in (keys.antibody, keys.plate_well, groups):
        assert straddling_groups(key, folds) == []
    assert (folds[twins[:, 0]] == folds[twins[:, 1]]).all()
    report = fold_report(y, folds, groups=groups)
    assert report["empty"].max() == 0 and report.attrs["straddling"] == 0
    assert report.spread.median() < 0.005 and report.spread.max() < 0.15, report.spread
    assert np.ptp(np.bincount(folds)) < 0.01 * len(y) / 5


@pytest.mark.slow
def test_real_external_list_against_iterative_stratification_of_images(real):
    """It is more even, for it may divide antibodies, and divides 99 % of them; a class of seven antibodies cannot be
    even in whole ones"""
    stratifiers = pytest.importorskip("iterstrat.ml_stratifiers", reason="iterative-stratification is not installed")
    y, keys, n_train = real
    y, antibody = y[n_train:], keys.antibody[n_train:]
    theirs = np.empty(len(y), int)
    for j, (_, held_out) in enumerate(stratifiers.MultilabelStratifiedKFold(5, shuffle=True,
                                                                            random_state=0).split(y, y)):
        theirs[held_out] = j
    assert len(straddling_groups(antibody, theirs)) > 0.99 * 12_815
    ours = grouped_folds(y, antibody)
    assert straddling_groups(antibody, ours) == []
    report = fold_report(y, ours, groups=antibody)
    assert report["empty"].max() == 0
    assert report.spread.median() < 0.01 and fold_report(y, theirs).spread.median() < 0.01
    many = report.groups >= 100
    assert many.sum() > 15 and report.spread[many].max() < 0.05
    assert report.spread.idxmax() == report.groups.idxmin() == 15 and report.groups[15] == 7
