"""What thresholds lose on images that did not choose them: ways to choose, numbers of positives, shrinking.

The scores are simulated. For a class of n positives among N images, z is normal with variance 1 and `d` higher in
positives; the log odds of being positive are then d*z + log(n/(N-n)) exactly. The score is the one that minimises focal
loss (gamma 2) for these odds, its logit moved by an offset of the class, because networks do not mean the same by the
same score in all classes. `d` is set so that the best threshold there is has the F1 asked for. F1 on endless fresh
images is then a formula, and no test set adds its noise. Methods that look at the scores of the test set see those of
another sample of N images.
"""

import argparse
import os
import tempfile
import time
import warnings
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from measure import machine, markdown, write_report  # noqa: E402
from scipy.optimize import brentq  # noqa: E402
from scipy.special import expit, logit  # noqa: E402
from scipy.stats import norm  # noqa: E402

from rcic_fastai.labels.metrics import f1_scores, macro_f1  # noqa: E402
from rcic_fastai.labels.threshold import F1Threshold, GlobalThreshold, create_threshold, nested_macro_f1  # noqa: E402
from rcic_fastai.labels.threshold import share_thresholds  # noqa: E402

N = 31_072  # images of the competition's training set, and the positives of its 28 classes
COUNTS = np.array([12885, 1254, 3621, 1561, 1858, 2513, 1008, 2822, 53, 45, 28, 1093, 688, 537, 1066, 21, 530, 210, 902,
                   1482, 172, 3777, 802, 2965,
                   322, 8228, 328, 11])
POSITIVES = (11, 50, 200, 500, 2000)
ALONE = ("f1", "repeated_f1", "soft_f1", "share", "em_share")
TOGETHER = ("constant", "global", *ALONE, "f1_shrunk", "repeated_f1_shrunk", "f1_to_share", "repeated_f1_to_share")
GROUPS = {"at most 60": (0, 60), "61-600": (60, 600), "601-2,000": (600, 2000), "above 2,000": (2000, N)}
STRENGTHS = (0, 5, 10, 20, 50, 100)
SPREADS = (0.0, 0.25, 0.5)  # standard deviation of the classes' offsets
SPREAD = 0.25  # of all tables but that of spreads

_GRID = np.linspace(-12, 12, 4001)
_Q = expit(_GRID)
# h*(1-q)^2*-log(q) + (1-h)*q^2*-log(1-q) is least where these two slopes, weighted by 1-h and h, cancel
_LOG_ODDS = np.log((_Q**2 / (1 - _Q) - 2 * _Q * np.log1p(-_Q)) / ((1 - _Q) ** 2 / _Q - 2 * (1 - _Q) * np.log(_Q)))


class Classes(NamedTuple):
    """K classes: share of the images, distance of positives from negatives, offset of the logits, F1 of the best
    threshold"""

    share: np.ndarray
    d: np.ndarray
    offset: np.ndarray
    best: np.ndarray


# The model


@lru_cache(maxsize=10_000)
def best_f1(share, d):
    "F1 of the best threshold on endless images"
    z = np.linspace(-5, 9, 1401)
    tp, fp = share * norm.sf(z - d / 2), (1 - share) * norm.sf(z + d / 2)
    return (2 * tp / (tp + fp + share)).max()


def classes(counts, best, offset=0.0, n=N):
    "`Classes` with so many positives among `n` images and these F1 of the best threshold"
    counts = np.asarray(counts)
    best = np.broadcast_to(best, counts.shape)
    d = np.array([brentq(lambda d, c=c, f=f: best_f1(c / n, d) - f, 0.01, 7, xtol=1e-3) for c, f in zip(counts, best)])
    return Classes(counts / n, d, np.broadcast_to(offset, counts.shape),
                   np.array([best_f1(c / n, x) for c, x in zip(counts, d)]))


def scores(y, c, rng):
    "Scores float64 (N, K) for labels (N, K)"
    z = rng.standard_normal(y.shape) + c.d * (y - 0.5)
    return expit(np.interp(c.d * z + logit(c.share), _LOG_ODDS, _GRID) + c.offset)


def exact_f1(thresholds, c):
    "F1 (K,) of thresholds on endless images"
    z = (np.interp(logit(np.clip(thresholds, 1e-9, 1 - 1e-9)) - c.offset, _GRID, _LOG_ODDS) - logit(c.share)) / c.d
    tp, fp = c.share * norm.sf(z - c.d / 2), (1 - c.share) * norm.sf(z + c.d / 2)
    return 2 * tp / (tp + fp + c.share)


def draw_labels(counts, rng, n=N):
    "uint8 (n, K) with the column sums `counts` and, if there are as many labels as images, one in each row at least"
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    y, rest = np.zeros((n, len(counts)), np.uint8), labels[n:]
    y[rng.permutation(n)[: len(labels)], labels[:n]] = 1
    while len(rest):
        rows, place = rng.integers(n, size=len(rest)), np.arange(len(rest))
        first = np.unique(rows * len(counts) + rest, return_index=True)[1]  # of those that meet now
        free = np.isin(place, first) & (y[rows, rest] == 0)
        y[rows[free], rest[free]] = 1
        rest = rest[~free]
    return y


def samples(c, rng, n=N):
    """Labels and scores that thresholds are chosen on; labels and scores of as many fresh images, whose counts
    scatter by chance"""
    counts = np.round(c.share * n).astype(int)
    y, fresh = draw_labels(counts, rng, n), draw_labels(np.maximum(rng.poisson(counts), 1), rng, n)
    return y, scores(y, c, rng), fresh, scores(fresh, c, rng)


# Tables


def mean_and_error(rows):
    "Mean over samples and its standard error, of a list of equal-sized Series"
    t = pd.DataFrame(rows)
    return t.mean(), t.sem()


def written(mean, error, digits=3):
    "`.034 (2)`: the figure and the standard error of its last digit"
    plain = lambda v: f"{v:.{digits}f}".replace("0.", ".", 1)
    return [f"{plain(m)} ({e * 10**digits:.0f})" if np.isfinite(e) else plain(m) for m, e in zip(mean, error)]


def one_class(n_pos, seed, best=0.6, methods=ALONE, n=N):
    """One sample of one class: in-sample F1 of the best cut, what it promises too much, what each method loses to
    the best threshold"""
    rng = np.random.default_rng([seed, n_pos])
    c = classes([n_pos], best, n=n)
    y, p, _, q = samples(c, rng, n)
    inside = f1_scores(y, p >= F1Threshold().fit(p, y).thresholds_)[0]
    outside = {m: exact_f1(create_threshold(m).fit(p, y).adapt(q).thresholds_, c)[0] for m in methods}
    return pd.Series({"best possible": c.best[0], "in sample": inside, "out of sample": outside["f1"],
                      "optimism": inside - outside["f1"],
                      **{f"lost, {m}": c.best[0] - f for m, f in outside.items()}})


def by_positives(repeats, positives=POSITIVES, methods=ALONE, n=N):
    "Means and standard errors, a row per number of positives; a column per quantity of `one_class`"
    found = {k: mean_and_error([one_class(k, seed, methods=methods, n=n) for seed in range(repeats)])
             for k in positives}
    return tuple(pd.DataFrame({k: v[i] for k, v in found.items()}).T.rename_axis("positives") for i in range(2))


def all_classes(seed, spread=SPREAD, counts=COUNTS, n=N):
    """28 classes of the real counts; F1 of the best threshold .4 to .8, and at least .15 more than that of
    predicting every image"""
    rng = np.random.default_rng([seed, 28])
    best = np.maximum(rng.uniform(0.4, 0.8, len(counts)), 2 * counts / (n + counts) + 0.15)
    return classes(counts, best, spread * rng.standard_normal(len(counts)), n), rng


def per_group(values, counts=COUNTS):
    "Mean over all classes and over those of each size"
    return pd.Series({"all": values.mean(),
                      **{g: values[(counts > low) & (counts <= high)].mean() for g, (low, high) in GROUPS.items()}})


def together(repeats, methods=TOGETHER, seconds=None):
    """F1 lost to the best thresholds, by size of the class: means and standard errors, a row per method; the same
    for losses less those of `f1`"""
    lost = {m: [] for m in methods}
    for seed in range(repeats):
        c, rng = all_classes(seed)
        y, p, _, q = samples(c, rng)
        for m in methods:
            start = time.perf_counter()
            t = create_threshold(m).fit(p, y).adapt(q).thresholds_
            if seconds is not None:
                seconds.setdefault(m, []).append(time.perf_counter() - start)
            lost[m].append(per_group(c.best - exact_f1(t, c)))
    against = {m: [a - b for a, b in zip(rows, lost["f1"])] for m, rows in lost.items()}
    return [tuple(pd.DataFrame({m: mean_and_error(rows)[i] for m, rows in x.items()}).T for i in range(2))
            for x in (lost, against)]


def shrinking(repeats, spreads=SPREADS, strengths=STRENGTHS, counts=COUNTS):
    """F1 lost by classes of at most 60 positives, a row per spread of the offsets and strength: best cuts drawn to
    the common threshold, to share matching"""
    rows = {}
    for spread in spreads:
        found = []
        for seed in range(repeats):
            c, rng = all_classes(seed, spread, counts)
            y, p, _, q = samples(c, rng)
            n_pos, own = y.sum(0), F1Threshold().fit(p, y).thresholds_
            towards = {"common": GlobalThreshold().fit(p, y).thresholds_, "share": share_thresholds(q, y.mean(0))}
            mixed = {f"{name}, {s}": (n_pos * own + s * t) / (n_pos + s) for name, t in towards.items()
                     for s in strengths}
            mixed |= {f"{name}, only": t for name, t in towards.items()}
            found.append(pd.Series({key: (c.best - exact_f1(t, c))[n_pos <= 60].mean() for key, t in mixed.items()}))
        rows[spread] = mean_and_error(found)
    return tuple(pd.DataFrame({s: v[i] for s, v in rows.items()}) for i in range(2))


def empty_rules(repeats):
    """Macro-F1 of best cuts on fresh images, by what an image gets that reaches no threshold: means and standard
    errors of differences to `none`"""
    found = []
    for seed in range(repeats):
        c, rng = all_classes(seed)
        y, p, fresh, q = samples(c, rng)
        t = F1Threshold().fit(p, y).thresholds_
        plain = (q >= t).astype(np.uint8)
        rows, row = np.flatnonzero(~plain.any(1)), {}
        for name, value in {"p/t": q / t, "p - t": q - t, "odds of p / odds of t": logit(q) - logit(t), "p": q}.items():
            pred = plain.copy()
            pred[rows, value[rows].argmax(1)] = 1
            row[name] = macro_f1(fresh, pred) - macro_f1(fresh, plain)
        found.append(pd.Series({"empty": len(rows) / len(q), "none": macro_f1(fresh, plain), **row}))
    return mean_and_error(found)


def nested(repeats, method="f1"):
    "Macro-F1 in sample, by nested folds with its interval, and on fresh images; how often the interval holds the last"
    found = []
    for seed in range(repeats):
        c, rng = all_classes(seed)
        y, p, fresh, q = samples(c, rng)
        e = create_threshold(method)
        n = nested_macro_f1(e, p, y, n_repeats=1, n_bootstrap=100)
        value = macro_f1(fresh, e.fit(p, y).adapt(q).predict(q))
        found.append(pd.Series({"in sample": n.in_sample, "nested folds": n.macro_f1, "on fresh images": value,
                                "width of the interval": n.high - n.low,
                                "interval holds it": float(n.low <= value <= n.high)}))
    return mean_and_error(found)


def table_of(mean, error, name=None, digits=3):
    "Figures with standard errors"
    return pd.DataFrame({c: written(mean[c], error[c], digits) for c in mean}, index=mean.index).rename_axis(name)


def line_of(mean, error):
    "One row of a table"
    return table_of(pd.DataFrame([mean]), pd.DataFrame([error])).set_axis(["macro-F1"])


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60,
                        help="samples of each single class; of all classes together a fifth as many")
    parser.add_argument("--out", type=Path, help="file of the report; default: benchmarks/results/thresholds.md, "
                        "with --quick a temporary one")
    parser.add_argument("--quick", action="store_true", help="2 samples of each: that it runs, no result")
    args = parser.parse_args(argv)
    args.repeats = 2 if args.quick else args.repeats
    args.out = args.out or (Path(tempfile.mkdtemp()) if args.quick
                            else Path(__file__).parent / "results") / "thresholds.md"
    return args


def main(argv=None):
    "Measure, write the report; returns mean and standard error of each table by name"
    args, start = arguments(argv), time.time()
    few, seconds = max(2, args.repeats // 5), {}
    many = 2 if args.quick else 5 * args.repeats
    best_cuts, single = by_positives(many, methods=("f1",)), by_positives(args.repeats)
    (lost, lost_error), (against, against_error) = together(few, seconds=seconds)
    shrunk, empties, folds = shrinking(few), empty_rules(few), nested(max(2, few // 2))
    group = partial(table_of, name="method")
    differences = table_of(against, against_error)[["all", "at most 60"]].add_prefix("less than `f1`, ")
    speed = pd.Series({m: f"{np.median(s):.2g}" for m, s in seconds.items()}, name="seconds")
    write_report(
        args.out,
        "Thresholds",
        *__doc__.strip().split("\n\n"),
        "Figures are means over simulated samples, in parentheses the standard error in units of the last digit. N = "
        f"{N:,}. Methods by their names in "
        "`threshold_methods`, with their defaults.",
        "## One class",
        f"The best threshold has an F1 of .6. {many} samples for each number of positives. `in sample`: F1 of the best "
        "cut on the images that chose it; "
        "`out of sample`: of the same threshold on fresh images; `optimism` is the difference. `lost` is F1 of the "
        "best threshold there is, less that of "
        "the chosen one, both on fresh images: what another method could win back at most. What best cuts of 11, 50 "
        "and 500 positives have been said to lose, "
        ".101, .043 and .006, is of the kind of `optimism`.",
        markdown(table_of(*best_cuts, name="positives").rename(columns={"lost, f1": "lost"})),
        f"What other methods lose, the first {args.repeats} of these samples:",
        markdown(table_of(*[t.filter(like="lost, ").rename(columns=lambda c: c.removeprefix("lost, ")) for t in single],
                          name="positives")),
        "## The 28 classes",
        f"Real counts, F1 of the best thresholds .4 to .8, offsets with a standard deviation of {SPREAD}, {few} "
        "samples. F1 lost to the best thresholds, averaged "
        "over all classes and over those with so many positives. `less than f1`: the loss less that of best cuts on "
        "the same samples, below 0 where a method "
        "is better. `seconds`: median time of one fit.",
        markdown(group(lost, lost_error).join(differences).join(speed)),
        "## How far to shrink",
        f"F1 lost by the classes of at most 60 positives, {few} samples. Columns: standard deviation of the offsets of "
        "the classes, that is of how far scores mean "
        "different things. Rows: best cuts drawn to the common threshold (`common`) or to share matching (`share`), "
        "with so many positives as strength; "
        "0 is no shrinking, `only` the other threshold alone.",
        markdown(table_of(*shrunk, name="towards, strength")),
        "## Empty predictions",
        f"Best cuts, {few} samples, every image with a label at least. `empty`: share of images that reach no "
        "threshold; `none`: macro-F1 on fresh images if they "
        "stay so; the others: what is gained if they get the class with the highest of these. The library takes p/t.",
        markdown(line_of(*empties)),
        "## Nested folds",
        f"Best cuts, {max(2, few // 2)} samples: macro-F1 in sample, by `nested_macro_f1`, and of the thresholds of "
        "all images on as many fresh ones.",
        markdown(line_of(*folds)),
        f"{time.time() - start:.0f} s in all.",
        machine("numpy", "scipy", "scikit-learn"),
    )
    return dict(best_cuts=best_cuts, one_class=single, all_classes=(lost, lost_error), against=(against, against_error),
                shrinking=shrunk, empty=empties, nested=folds)


if __name__ == "__main__":
    main()
