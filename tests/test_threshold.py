"""Thresholds against brute force, folds without leaks, shares, files, what is refused; and what rare classes lose,
by the benchmark's own functions."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cases import each
from scipy.special import expit, logit
from sklearn.base import clone

from rcic_fastai.labels.metrics import f1_scores, macro_f1
from rcic_fastai.labels.threshold import ConstantThreshold, F1Threshold, GlobalThreshold, RepeatedF1Threshold
from rcic_fastai.labels.threshold import ShareThreshold, ShrunkThreshold, SoftF1Threshold, ThresholdEstimator
from rcic_fastai.labels.threshold import _between, _deal_groups, _repeated_cuts, _soft_f1, best_threshold
from rcic_fastai.labels.threshold import compare_thresholds, create_threshold, estimate_shares, nested_macro_f1
from rcic_fastai.labels.threshold import read_thresholds, share_thresholds, threshold_methods, write_thresholds

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def draw(seed=0, n=400, shares=(0.4, 0.1, 0.03), d=2.0, decimals=None, groups=0):
    """Probabilities that are right, labels with 2 positives per class at least, and groups; with `decimals` many
    scores are equal"""
    rng, shares = np.random.default_rng(seed), np.asarray(shares)
    y = (rng.random((n, len(shares))) < shares).astype(np.uint8)
    y[:2] = 1
    p = expit(d * (rng.standard_normal(y.shape) + d * (y - 0.5)) + logit(shares))
    return p if decimals is None else p.round(decimals), y, rng.integers(groups, size=n) if groups else None


def every_cut(p):
    "A threshold for each set of predictions that a threshold can give"
    return np.append(np.unique(p), 2)


# The best cut


@each("decimals", [None, 2, 1, 0])
@each("dtype", [np.float64, np.float32])
def test_no_threshold_is_better_than_the_best(decimals, dtype):
    for seed in range(6):
        p, y, _ = draw(seed, n=150, decimals=decimals)
        p = p.astype(dtype)
        for c in range(3):
            t, f1 = best_threshold(p[:, c], y[:, c])
            all_f1 = {x: f1_scores(y[:, [c]], p[:, [c]] >= x)[0] for x in every_cut(p[:, c])}
            assert f1 == pytest.approx(max(all_f1.values()))
            assert f1_scores(y[:, [c]], p[:, [c]] >= t)[0] == pytest.approx(f1)
            n_best = min((p[:, c] >= x).sum() for x, f in all_f1.items() if f > f1 - 1e-12)
            assert (p[:, c] >= t).sum() == n_best  # of equals the one with the fewest predictions
            assert t not in p[:, c] or t == 0  # between scores, so that a change in the last digit moves nobody


@pytest.mark.parametrize("scale", [1.0, 1e-300, 0.5])
def test_a_threshold_parts_neighbouring_numbers(scale):
    below = np.float64(scale) * 0.7
    above = np.nextafter(below, 1)
    t, f1 = best_threshold([above, below], [1, 0])
    assert f1 == 1 and above >= t > below
    assert best_threshold([1.0, np.nextafter(1, 0)], [1, 0])[1] == 1
    assert _between(above, below) > below


@each("decimals", [None, 1])
@each("average", ["macro", "micro"])
def test_no_common_threshold_is_better(average, decimals):
    for seed in range(4):
        p, y, _ = draw(seed, n=80, decimals=decimals)
        t = GlobalThreshold(average, empty="none").fit(p, y).thresholds_
        if average == "micro":
            y, p = y.reshape(-1, 1), p.reshape(-1, 1)
        assert len(set(t)) == 1
        assert macro_f1(y, p >= t[0]) == pytest.approx(max(macro_f1(y, p >= x) for x in every_cut(p)))


def test_a_class_without_positives_gets_the_fallback():
    p, y, _ = draw()
    y[:, 1] = 0
    common = GlobalThreshold().fit(p, y).thresholds_[0]
    for e in (F1Threshold(), RepeatedF1Threshold(n_repeats=1), SoftF1Threshold(), ShrunkThreshold()):
        assert e.fit(p, y).thresholds_[1] == pytest.approx(common)
    for e in (F1Threshold(0.9), RepeatedF1Threshold(n_repeats=1, fallback=0.9), SoftF1Threshold(fallback=0.9)):
        assert e.fit(p, y).thresholds_[1] == 0.9 and e.thresholds_[0] < 0.9


# Repeated folds


@each("decimals, groups", [(None, 0), (1, 0), (None, 40), (2, 40)])
def test_cuts_of_repeated_folds_are_those_of_each_training_part(decimals, groups):
    p, y, g = draw(1, decimals=decimals, groups=groups)
    codes = np.arange(len(p)) if g is None else pd.factorize(g)[0]
    for c in range(3):
        rng, plain = np.random.default_rng(5), []
        for _ in range(3):
            folds = _deal_groups(y[:, c], codes, 4, rng)
            plain += [best_threshold(p[folds != j, c], y[folds != j, c])[0] for j in range(4) if y[folds != j, c].any()]
        found = _repeated_cuts(p[:, c], y[:, c], codes, 3, 4, np.random.default_rng(5))
        np.testing.assert_allclose(found, plain, rtol=1e-12)
    fitted = RepeatedF1Threshold(n_repeats=3, n_folds=4, seed=5).fit(p, y, g).thresholds_
    rng = np.random.default_rng(5)
    np.testing.assert_allclose(fitted, [np.mean(_repeated_cuts(p[:, c], y[:, c], codes, 3, 4, rng)) for c in range(3)])


def test_folds_of_a_class_keep_groups_and_spread_positives():
    p, y, g = draw(2, groups=60)
    folds = _deal_groups(y[:, 2], g, 5, np.random.default_rng(0))
    assert pd.Series(folds).groupby(g).nunique().max() == 1
    alone = _deal_groups(y[:, 2], np.arange(len(y)), 5, np.random.default_rng(0))
    assert np.ptp(np.bincount(alone, weights=y[:, 2], minlength=5)) <= 1


def test_a_single_positive_is_learnt_from_the_parts_that_hold_it():
    p, y, _ = draw(3, n=60)
    y[:, 0] = 0
    y[7, 0] = 1
    cuts = _repeated_cuts(p[:, 0], y[:, 0], np.arange(60), 2, 5, np.random.default_rng(0))
    assert len(cuts) == 8 and (p[7, 0] >= np.array(cuts)).all()  # 4 of the 5 parts, twice


# Soft F1


def test_soft_f1_finds_its_maximum_and_its_derivative_is_right():
    p, y, _ = draw(4, n=2000)
    tried = np.linspace(0.02, 0.98, 1921)
    for c in range(3):
        soft = np.array([_soft_f1(p[:, c], y[:, c].astype(float), t, 0.02) for t in tried])
        np.testing.assert_allclose(np.gradient(soft[:, 0], tried)[1:-1], soft[1:-1, 1],
                                   atol=2e-3 * abs(soft[:, 1]).max())
        t = SoftF1Threshold(weight_decay=0).fit(p, y).thresholds_[c]
        assert _soft_f1(p[:, c], y[:, c].astype(float), t, 0.02)[0] > soft[:, 0].max() - 1e-4
    strong = SoftF1Threshold(weight_decay=1e3).fit(p, y).thresholds_
    np.testing.assert_allclose(strong, 0.5, atol=1e-3)


# Shares


@pytest.mark.parametrize("decimals", [None, 1])
def test_as_many_images_reach_a_share_threshold_as_asked_for(decimals):
    p, _, _ = draw(5, n=200, decimals=decimals)
    for share in (0.0, 0.001, 0.1, 0.5, 0.73, 1.0):
        n = (p >= share_thresholds(p, np.full(3, share))).sum(0)
        wanted = 0 if share == 0 else max(1, share * 200)
        for c in range(3):
            possible = np.array([(p[:, c] >= x).sum() for x in every_cut(p[:, c])])
            possible = possible[possible > 0] if share > 0 else possible
            assert abs(n[c] - wanted) == abs(possible - wanted).min()


def test_em_finds_the_most_likely_shares():
    p, y, _ = draw(6, n=3000, d=1.5)
    prior, tried = y.mean(0), np.linspace(0.001, 0.999, 2000)
    keep = (y[:, 0] == 0) | (np.random.default_rng(0).random(len(y)) < 0.3)  # a shift of the first class
    shares = estimate_shares(p[keep], prior, tol=1e-9)
    for c in range(3):
        likelihood = [np.log(s * p[keep, c] / prior[c] + (1 - s) * (1 - p[keep, c]) / (1 - prior[c])).sum()
                      for s in tried]
        assert shares[c] == pytest.approx(tried[np.argmax(likelihood)], abs=1e-3)
    assert abs(shares[0] - y[keep, 0].mean()) < 0.25 * abs(prior[0] - y[keep, 0].mean())
    np.testing.assert_array_equal(estimate_shares(p, [0.0, 1.0, 0.5])[:2], [0, 1])


def test_share_matching_looks_at_the_scores_it_saw_last_and_at_no_label_of_theirs():
    p, y, _ = draw(7)
    other, truth, _ = draw(8, n=300)
    e = ShareThreshold(empty="none").fit(p, y)
    np.testing.assert_array_equal(e.predict(p).sum(0), y.sum(0))
    e.adapt(other)
    np.testing.assert_allclose(e.predict(other).mean(0), y.mean(0), atol=1 / 300)
    given = ShareThreshold(truth.mean(0), empty="none").fit(other)
    np.testing.assert_array_equal(given.predict(other).sum(0), truth.sum(0))
    by_prior = ShareThreshold("em", prior=y.mean(0)).fit(other)
    np.testing.assert_allclose(by_prior.shares_, estimate_shares(other, y.mean(0)))
    F1Threshold().fit(p, y).adapt(other)  # others take it and do nothing
    np.testing.assert_array_equal(F1Threshold().fit(p, y).adapt(other).thresholds_, F1Threshold().fit(p, y).thresholds_)


def test_em_needs_and_gets_calibrated_scores():
    p, y, _ = draw(9, n=4000, d=2.5)
    squashed = expit(0.4 * logit(p) + 0.3)
    shares = {c: ShareThreshold("em", calibrate=c).fit(squashed, y).adapt(squashed).shares_ for c in (True, False)}
    np.testing.assert_allclose(shares[True], y.mean(0), rtol=0.1)
    assert (abs(shares[False] / y.mean(0) - 1) > 0.3).all()


# Shrinking


def test_shrinking_is_a_mean_by_the_number_of_positives():
    p, y, _ = draw(10)
    own, common, n = F1Threshold().fit(p, y).thresholds_, GlobalThreshold().fit(p, y).thresholds_, y.sum(0)
    for strength in (0, 7, 1e9):
        t = ShrunkThreshold(strength=strength).fit(p, y).thresholds_
        np.testing.assert_allclose(t, (n * own + strength * common) / (n + strength))
    other = draw(11)[0]
    e = ShrunkThreshold(F1Threshold(), 7, ShareThreshold()).fit(p, y).adapt(other)
    np.testing.assert_allclose(e.thresholds_, (n * own + 7 * share_thresholds(other, y.mean(0))) / (n + 7))
    assert not hasattr(e.estimator, "thresholds_")  # what was passed in stays as it was


# Predictions


def test_an_empty_prediction_gets_the_class_that_comes_closest():
    t = ConstantThreshold([0.8, 0.1, 1.5]).fit(np.zeros((1, 3)))
    p = np.array([[0.7, 0.09, 1.0], [0.3, 0.06, 0.1], [0.8, 0.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(t.predict(p), [[0, 1, 0], [0, 1, 0], [1, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(t.set_params(empty="none").predict(p).sum(1), [0, 0, 1, 0])
    np.testing.assert_array_equal(t.set_params(empty=2).predict(p), [[0, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 1]])
    assert t.predict(p).dtype == np.uint8


@each("name", list(threshold_methods))
def test_every_method_is_an_estimator_that_fits_adapts_and_predicts(name):
    p, y, g = draw(12, n=300, groups=50)
    e = create_threshold(name, empty="none")
    before = repr(e)
    fitted = clone(e).fit(p, y, g)
    assert fitted.thresholds_.shape == (3,) and np.isfinite(fitted.thresholds_).all()
    assert repr(e) == before and not hasattr(e, "thresholds_")
    np.testing.assert_array_equal(clone(e).fit(p, y, g).thresholds_, fitted.thresholds_)
    np.testing.assert_array_equal(fitted.adapt(p).predict(p.astype(np.float32)).shape, y.shape)
    assert macro_f1(y, fitted.predict(p)) > macro_f1(y, np.ones_like(y))
    assert threshold_methods[name].empty == "argmax"


# Out of sample


class Watching(ThresholdEstimator):
    "Notes the rows that it is fitted on, adapted to and asked for, by their scores"

    seen = []

    def __init__(self, empty="none"):
        self.empty = empty

    def _fit(self, p, y, groups):
        type(self).seen.append([set(p[:, 0]), groups, None, None])
        return np.full(p.shape[1], 0.5)

    def adapt(self, p):
        self.seen[-1][2] = set(p[:, 0])
        return super().adapt(p)

    def predict(self, p):
        self.seen[-1][3] = set(p[:, 0])
        return super().predict(p)


def test_nested_folds_never_show_what_they_ask_for():
    p, y, g = draw(13, groups=80)
    Watching.seen.clear()
    n = nested_macro_f1(Watching(), p, y, g, n_folds=4, n_repeats=2, n_bootstrap=10)
    group = dict(zip(p[:, 0], g))
    inner = [s for s in Watching.seen if s[2] is not None]
    assert len(inner) == 8 and all(fit | held == set(p[:, 0]) and not fit & held for fit, _, held, _ in inner)
    for fit, groups, held, asked in inner:
        assert held == asked and not {group[x] for x in fit} & {group[x] for x in held}
        assert set(groups) == {group[x] for x in fit}
    assert set.union(*[s[2] for s in inner[:4]]) == set(p[:, 0])
    value = macro_f1(y, p >= 0.5)
    # a constant learns nothing
    assert n.macro_f1 == pytest.approx(value) == pytest.approx(n.in_sample)
    assert n.optimism == pytest.approx(0)
    np.testing.assert_allclose(n.f1, f1_scores(y, p >= 0.5))


def test_the_interval_draws_whole_groups():
    p, y, _ = draw(14)
    g = p[:, 2].argsort().argsort() // 10  # rows of a group are alike, so rows drawn one by one would scatter otherwise
    n = nested_macro_f1(ConstantThreshold(empty="none"), p, y, g, n_repeats=1, n_bootstrap=2000)
    rng, codes = np.random.default_rng(0), np.unique(g, return_inverse=True)[1]
    rows = [np.flatnonzero(codes == j) for j in range(codes.max() + 1)]
    pred, plain = p >= 0.5, []
    for _ in range(600):
        drawn = np.concatenate([rows[j] for j in rng.integers(len(rows), size=len(rows))])
        plain.append(macro_f1(y[drawn], pred[drawn]))
    assert n.bootstrap.mean() == pytest.approx(np.mean(plain), abs=4 * np.std(plain) / 600**0.5)
    assert n.bootstrap.std() == pytest.approx(np.std(plain), rel=0.15)
    np.testing.assert_allclose([n.low, n.high], np.quantile(n.bootstrap, [0.025, 0.975]))
    same = nested_macro_f1(ConstantThreshold(empty="none"), p, y, g, n_repeats=1, n_bootstrap=2000)
    np.testing.assert_array_equal(same.bootstrap, n.bootstrap)


def test_noise_has_an_optimism_that_nested_folds_take_away():
    rng = np.random.default_rng(0)
    y = (rng.random((600, 8)) < 0.03).astype(np.uint8)
    p = rng.random(y.shape)  # scores that know nothing
    table = compare_thresholds(p, y, ("constant", "f1"), n_repeats=2, n_bootstrap=50, progress=False)
    f1 = table.loc["f1"]
    assert f1.optimism > 0.03 and f1.in_sample > f1.high
    assert f1.optimism == pytest.approx(f1.in_sample - f1.out_of_sample)
    assert table.gain["constant"] == table.gain_low["constant"] == 0
    assert f1.gain == pytest.approx(f1.out_of_sample - table.out_of_sample["constant"])
    alone = nested_macro_f1(F1Threshold(), p, y, n_repeats=2, n_bootstrap=50)
    assert (alone.macro_f1, alone.low, alone.high) == pytest.approx((f1.out_of_sample, f1.low, f1.high))


# Files


@pytest.mark.parametrize("empty", ["argmax", "none", 2])
def test_thresholds_come_back_in_any_order(tmp_path, empty):
    p, y, _ = draw(15)
    names, file = ["Nucleoplasm", "Lipid droplets", "Rods & rings"], tmp_path / "thresholds.json"
    e = F1Threshold(empty=empty).fit(p, y)
    write_thresholds(file, e, names)
    np.testing.assert_array_equal(read_thresholds(file).predict(p), e.predict(p))
    turned = read_thresholds(file, [names[i] for i in (2, 0, 1)])
    np.testing.assert_array_equal(turned.predict(p[:, [2, 0, 1]]), e.predict(p)[:, [2, 0, 1]])
    assert clone(turned).fit(p).predict(p).shape == y.shape and list(tmp_path.iterdir()) == [file]


def broken(file, **changes):
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, **changes}))
    return file


@each(
    "spoil, message",
    [
        (lambda f: f.write_text("{"), "thresholds.json: line 1"),
        (lambda f: f.write_text("[1]"), "thresholds.json holds no thresholds"),
        (lambda f: broken(f, thresholds={}), "thresholds.json holds no thresholds"),
        (lambda f: broken(f, thresholds={"a": "high", "b": 1}), "the threshold of 'a' is 'high', expected a number"),
        (lambda f: broken(f, thresholds={"a": 0.5, "c": 0.5}),
         "thresholds.json has other classes: 'b' is only asked for"),
        (lambda f: broken(f, empty={"class": "z"}), "empty predictions get class 'z', which has no threshold"),
    ],
)
def test_a_file_that_is_none_of_ours_is_named(tmp_path, spoil, message):
    file = tmp_path / "thresholds.json"
    write_thresholds(file, ConstantThreshold().fit(np.zeros((1, 2))), "ab")
    spoil(file)
    with pytest.raises(ValueError, match=message):
        read_thresholds(file, "ab")
    with pytest.raises(FileNotFoundError):
        read_thresholds(tmp_path / "none.json")


# What is refused

P, Y, _ = draw(16, n=20)
NAN = np.where(np.arange(60).reshape(20, 3) == 4, np.nan, P)


@each(
    "act, message",
    [
        (lambda: F1Threshold().fit(logit(P), Y), "expected 0 to 1: apply a sigmoid"),
        (lambda: F1Threshold().fit(NAN, Y), "image 1, class 1 has a score of nan"),
        (lambda: F1Threshold().fit(P[:, 0], Y[:, 0]), "scores have shape"),
        (lambda: F1Threshold().fit(P[:0], Y[:0]), "with one of each at least"),
        (lambda: F1Threshold().fit(P, Y[:5]), "labels have shape"),
        (lambda: F1Threshold().fit(P, Y - 1.0), "expected 0 or 1"),
        (lambda: F1Threshold().fit(P), "F1Threshold needs labels"),
        (lambda: F1Threshold().fit(P, Y, [1, 2]), "2 groups for 20 images"),
        (lambda: F1Threshold().fit(P, 0 * Y), "no class has a positive"),
        (lambda: best_threshold(P[:, 0], 0 * Y[:, 0]), "no row is positive"),
        (lambda: F1Threshold(empty=True).fit(P, Y), "empty is True, expected"),
        (lambda: F1Threshold(empty="first").fit(P, Y), "empty is 'first', expected"),
        (lambda: ConstantThreshold().fit(P).predict(P[:, :2]), "scores have 2 classes, expected 3"),
        (lambda: ConstantThreshold([0.5, 0.5]).fit(P), "one for each of the 3 classes"),
        (lambda: ConstantThreshold(np.nan).fit(P), "expected a number"),
        (lambda: GlobalThreshold("mean").fit(P, Y), "average is 'mean'"),
        (lambda: RepeatedF1Threshold(n_repeats=0).fit(P, Y), "n_repeats is 0"),
        (lambda: RepeatedF1Threshold(n_folds=21).fit(P, Y), "n_folds is 21, expected 2 to 20"),
        (lambda: SoftF1Threshold(tau=0).fit(P, Y), "tau is 0"),
        (lambda: ShrunkThreshold(strength=-1).fit(P, Y), "strength is -1"),
        (lambda: ShareThreshold("test").fit(P, Y), "expected 'train', 'em' or a number for each class"),
        (lambda: ShareThreshold().fit(P), "shares of the training set need labels"),
        (lambda: ShareThreshold("em").fit(P), "for `em` a `prior`"),
        (lambda: ShareThreshold([0.1, 0.2]).fit(P), "one for each class"),
        (lambda: ShareThreshold([0.1, 0.2, 1.2]).fit(P), "shares of class 2 is 1.2"),
        (lambda: create_threshold("best"), "no threshold method 'best', expected one of constant, global"),
        (lambda: create_threshold("f1", strength=3), "Invalid parameter 'strength'"),
        (lambda: compare_thresholds(P, Y, []), "no methods to compare"),
        (lambda: nested_macro_f1(F1Threshold(), P, Y, n_repeats=0), "n_repeats is 0"),
        (lambda: nested_macro_f1(F1Threshold(), P, Y, n_folds=1), "n_folds is 1"),
        (lambda: write_thresholds("x.json", ConstantThreshold().fit(P), "ab"), "2 classes for 3 thresholds"),
        (lambda: write_thresholds("x.json", ConstantThreshold().fit(P), "aba"), "class 'a' occurs more than once"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(act, message):
    with pytest.raises(ValueError, match=message):
        act()


# What rare classes lose


@pytest.fixture(scope="module")
def benchmark():
    "The script `benchmarks/thresholds.py`"
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmark_thresholds", BENCHMARKS / "thresholds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))
    sys.modules.pop("measure", None)


def test_the_formula_of_the_benchmark_agrees_with_many_images(benchmark):
    c, rng = benchmark.classes([300, 3000], [0.5, 0.7], [0.4, -0.2], n=10_000), np.random.default_rng(0)
    np.testing.assert_allclose(c.best, [0.5, 0.7], atol=2e-3)
    y = (rng.random((400_000, 2)) < c.share).astype(np.uint8)
    p, t = benchmark.scores(y, c, rng), np.array([0.45, 0.4])
    np.testing.assert_allclose(f1_scores(y, p >= t), benchmark.exact_f1(t, c), atol=6e-3)
    q = np.linspace(0.01, 0.99, 99)[:, None]  # the score is the least focal loss, so no other probability has less
    h = 0.2
    loss = h * (1 - q) ** 2 * -np.log(q) + (1 - h) * q**2 * -np.log(1 - q)
    assert q[loss.argmin(), 0] == pytest.approx(expit(np.interp(logit(h), benchmark._LOG_ODDS, benchmark._GRID)),
                                                abs=0.01)


@pytest.mark.slow
def test_best_cuts_lose_more_the_fewer_positives_there_are(benchmark):
    mean, error = benchmark.by_positives(16, (11, 50, 500), ("f1",))
    assert mean["lost, f1"].is_monotonic_decreasing and mean.optimism.is_monotonic_decreasing
    assert mean["lost, f1"][11] > 0.01 > mean["lost, f1"][500] >= 0 and mean.optimism[11] > 0.02
    assert (mean.optimism > mean["lost, f1"]).all()


@pytest.mark.slow
def test_shrinking_wins_some_of_it_back_unless_scores_differ_between_classes(benchmark):
    counts = np.array([12885, 3621, 1561, 802, 322, 53, 45, 28, 21, 11])
    mean, error = benchmark.shrinking(6, spreads=(0.0, 1.0), strengths=(0, 10, 50), counts=counts)
    assert mean[0.0]["common, 10"] < 0.9 * mean[0.0]["common, 0"]
    assert mean[1.0]["common, 50"] > 2 * mean[1.0]["common, 0"]
    for spread in (0.0, 1.0):
        assert mean[spread]["share, 10"] < 0.9 * mean[spread]["share, 0"]
