"""Plate groups and one-to-one assignment: time and value of the library and of the other ways, on the same scores.

Experiments of the real shape: 1,108 siRNAs in 4 groups of 277, 4 plates on which some wells are missing. The layouts
are those of the 33 training experiments where the real tables are at hand (`--data`), else made up alike; the scores
are simulated either way. The library's answer is compared with that of the full problem, solved once for each of the 24
ways to put groups on plates: an answer of another value ends the benchmark with an error.
"""

import argparse
import os
import tempfile
import warnings
from importlib.util import find_spec
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from measure import REPEATS, interleave, machine, markdown, summary, write_report  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402

from rcic_fastai.predict.assign import assign_experiment  # noqa: E402

REAL = Path(__file__).parents[1].parent / "shared" / "rcic"
# how far the true class stands out of the noise, in its standard deviations, and the share of the layouts that are
# solved
SIGNALS = {"hard": (2.2, 1 / 4), "middle": (3.0, 1.0), "easy": (4.5, 1 / 4)}
OURS, FULL = "rcic_fastai", "scipy, 24 full problems"


class Experiment(NamedTuple):
    "One experiment: scores (W, K), plate and true class of each well, group of each class"

    scores: np.ndarray
    plates: np.ndarray
    truth: np.ndarray
    groups: np.ndarray


# Experiments


def simulated_layouts(n, group_size=277, n_plates=4, seed=0):
    """(plates, truth, groups) of `n` experiments; one plate in six has lost one to five of its wells, as in the real
    screen"""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(n_plates), group_size))
    for _ in range(n):
        parts = []
        for group in rng.permutation(n_plates):
            wells = rng.permutation(np.flatnonzero(groups == group))
            parts.append(wells[rng.integers(1, 6) :] if rng.random() < 1 / 6 else wells)
        yield np.repeat(np.arange(1, n_plates + 1), [len(p) for p in parts]), np.concatenate(parts), groups


def real_layouts(folder):
    "(plates, truth, groups) of the training experiments of the real tables"
    from rcic_fastai.screen.groups import plate_groups
    from rcic_fastai.screen.read import read_screen

    wells = read_screen(folder, check=False).wells
    wells = wells[(wells.split == "train") & (wells.well_type == "treatment")]
    groups = plate_groups(wells)
    for _, t in wells.groupby("experiment"):
        yield t.plate.to_numpy(int), groups.index.get_indexer(t.sirna.to_numpy(int)), groups.to_numpy()


def with_scores(layout, signal, seed):
    """An `Experiment` with scores like logits: noise, the true class `signal` higher, classes that this experiment's
    batch effect favours"""
    plates, truth, groups = layout
    rng = np.random.default_rng([seed, 1])
    scores = rng.standard_normal((len(plates), len(groups))) + 0.5 * rng.standard_normal(len(groups))
    scores[np.arange(len(plates)), truth] += signal
    return Experiment(scores.astype(np.float32), plates, truth, groups)


# Contestants: functions from an experiment to the class of each well


def ours(e):
    return assign_experiment(e.scores, e.plates, e.groups).labels


def mappings(e):
    "Every way to put groups on plates: plate -> group"
    plates = np.unique(e.plates)
    return [dict(zip(plates, p)) for p in permutations(np.unique(e.groups), len(plates))]


def allowed(e, mapping):
    "Mask (W, K) of the classes of the group that each well's plate has"
    return e.groups == np.array([mapping[p] for p in e.plates])[:, None]


def value(e, labels):
    "Sum of the scores of the labels, in float64"
    return e.scores[np.arange(len(labels)), labels].astype(float).sum()


def full_problems(solve):
    """For each way to put groups on plates all wells against all classes, those of other groups masked; the best of
    the 24"""

    def labels(e):
        found = [solve(e.scores.astype(float), allowed(e, m)) for m in mappings(e)]
        return max(found, key=lambda classes: value(e, classes))

    return labels


def block_problems(solve):
    "Each plate against each group, then the best of the 24 sums of four: the least work that is still exact"

    def labels(e):
        scores, found = e.scores.astype(float), {}
        for p in np.unique(e.plates):
            for g in np.unique(e.groups):
                rows, classes = np.flatnonzero(e.plates == p), np.flatnonzero(e.groups == g)
                block = scores[np.ix_(rows, classes)]
                own = solve(block, np.ones(block.shape, bool))
                found[p, g] = rows, classes[own], block[np.arange(len(rows)), own].sum()
        best = max(mappings(e), key=lambda m: sum(found[item][2] for item in m.items()))
        out = np.empty(len(scores), int)
        for rows, classes, _ in (found[item] for item in best.items()):
            out[rows] = classes
        return out

    return labels


def by_scipy(scores, mask):
    return linear_sum_assignment(np.where(mask, scores, -np.inf), maximize=True)[1]


def by_sparse(scores, mask):
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    # every well has one class, so a shift that keeps scores off zero, which means `no edge` here, changes no comparison
    return min_weight_full_bipartite_matching(csr_matrix(np.where(mask, scores - scores.min() + 1, 0)),
                                              maximize=True)[1]


def by_lap(scores, mask):
    from lap import lapjv

    return lapjv(np.where(mask, -scores, 1e5), extend_cost=True)[1]


def vote(e):
    "The way to put groups on plates that agrees with the most wells' best class: what notebooks do"
    best = e.groups[e.scores.argmax(1)]
    return max(mappings(e), key=lambda m: sum((best[e.plates == p] == g).sum() for p, g in m.items()))


def greedy(e):
    "Groups by vote; then, plate by plate, the highest score that is left decides, and its well and class are out"
    out, mapping = np.empty(len(e.scores), int), vote(e)
    for p, g in mapping.items():
        rows, classes = np.flatnonzero(e.plates == p), np.flatnonzero(e.groups == g)
        block = e.scores[np.ix_(rows, classes)].copy()
        for _ in rows:
            i, j = np.unravel_index(block.argmax(), block.shape)
            out[rows[i]] = classes[j]
            block[i], block[:, j] = -np.inf, -np.inf
    return out


def best_of_each(e):
    "Groups by vote; then the best class of each well on its own, however often it is given"
    return np.where(allowed(e, vote(e)), e.scores, -np.inf).argmax(1)


def contestants():
    "Functions by name; and the names of those whose package is not installed"
    lap = {"lap, 24 full problems": full_problems(by_lap), "lap, 16 blocks": block_problems(by_lap)}
    found = {OURS: ours, FULL: full_problems(by_scipy), "scipy.sparse, 24 full problems": full_problems(by_sparse),
             "scipy, 16 blocks": block_problems(by_scipy), **(lap if find_spec("lap") else {}),
             "vote, greedy": greedy, "vote, best of each well": best_of_each}
    return found, [] if find_spec("lap") else list(lap)


# Measuring


class InTurn:
    "A contestant that solves the next experiment whenever it is called, and keeps the answers"

    def __init__(self, solve, experiments):
        self.solve, self.experiments, self.labels = solve, experiments, []

    def __call__(self):
        self.labels.append(self.solve(self.experiments[len(self.labels) % len(self.experiments)]))


def quality(e, labels, best):
    "Value, whether it is the best there is, accuracy, and wells whose class another well has too"
    v = value(e, labels)
    return dict(value=v, exact=abs(v - best) <= 1e-9 * abs(best), accuracy=(labels == e.truth).mean(),
                double=len(labels) - len(np.unique(labels)))


def measure(experiments, repeats=REPEATS):
    """Seconds per experiment, a row per repeat, and the quality of each contestant, a row per contestant and
    experiment.

    Each repeat is another experiment as far as there are as many, the same for everybody.
    Raises: RuntimeError if the library's answer has not the value of the full problem."""
    solvers, _ = contestants()
    turns = {name: InTurn(solve, experiments) for name, solve in solvers.items()}
    seconds = interleave(turns, repeats=max(repeats, len(experiments)), warmup=1)
    rows = []
    for i, e in enumerate(experiments):
        best = value(e, turns[FULL].labels[i])
        rows += [dict(experiment=i, contestant=name, **quality(e, turn.labels[i], best))
                 for name, turn in turns.items()]
    qualities = pd.DataFrame(rows)
    wrong = qualities[(qualities.contestant == OURS) & ~(qualities.exact & (qualities.double == 0))]
    if len(wrong):
        raise RuntimeError(f"experiment {wrong.experiment.iloc[0]}: the library's assignment has value "
                           f"{wrong.value.iloc[0]}, not that of the full problem")
    return seconds, qualities


def table(seconds, qualities):
    "One row per contestant: time, ratio to the full problems, and what its answers are worth"
    t = summary(seconds, baseline=FULL, unit="experiment").drop(columns="experiments/s")
    q = qualities.groupby("contestant")
    best = q.value.mean()[FULL]
    t["value, share of the best"] = q.value.mean() / best
    t["exact"] = [f"{n} of {size}" for n, size in zip(q.exact.sum()[t.index], q.size()[t.index])]
    t["accuracy"], t["wells with a class twice"] = q.accuracy.mean(), q.double.mean()
    return t.rename_axis("contestant")


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REAL if REAL.exists() else None,
                        help="folder of the real tables; default: ../shared/rcic where it is")
    parser.add_argument("--simulated", type=int, default=0, help="so many simulated layouts instead of the real ones")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="at least; every layout is solved once")
    parser.add_argument("--out", type=Path, help="file of the report; default: benchmarks/results/assignment.md, "
                        "with --quick a temporary one")
    parser.add_argument("--quick", action="store_true", help="2 small experiments: that it runs, no result")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp()) if args.quick else Path(__file__).parent / "results"
    args.out = args.out or folder / "assignment.md"
    return args


def main(argv=None):
    "Measure, write the report; returns the tables by difficulty"
    args = arguments(argv)
    if args.quick:
        layouts, source = list(simulated_layouts(2, group_size=12)), "simulated"
    elif args.data and not args.simulated:
        layouts, source = list(real_layouts(args.data)), "real"
    else:
        layouts, source = list(simulated_layouts(args.simulated or 33)), "simulated"
    tables, parts = {}, []
    for name, (signal, share) in SIGNALS.items():
        chosen = layouts[: max(2, round(share * len(layouts)))]
        experiments = [with_scores(layout, signal, i) for i, layout in enumerate(chosen)]
        tables[name] = table(*measure(experiments, 2 if args.quick else args.repeats))
        alone = np.mean([(e.scores.argmax(1) == e.truth).mean() for e in experiments])
        parts += [f"## {name.capitalize()}: {len(experiments)} experiments, {alone:.2f} of the wells right by their "
                  "highest score alone", markdown(tables[name])]
    missing = contestants()[1]
    n_wells, n_classes = [len(p) for p, *_ in layouts], len(layouts[0][2])
    write_report(
        args.out,
        "Plate groups and one-to-one assignment",
        f"Milliseconds from the scores of one experiment to one siRNA per well, on {len(layouts)} {source} layouts of "
        f"{min(n_wells)}-{max(n_wells)} wells and "
        f"{n_classes:,} siRNAs in {len(np.unique(layouts[0][2]))} groups, with simulated scores. Contestants take "
        "turns on the same experiment; medians over "
        f"the experiments, ratios (`x {FULL}`) within each experiment, quartiles behind both. One thread.",
        f"`{OURS}` is `assign_experiment`, which also returns the margin of every well and of the plate groups. `24 "
        "full problems` solves all wells against all "
        "classes, other groups masked, for every way to put groups on plates: the plain exact answer. `16 blocks` "
        "solves each plate against each group. "
        "`vote` takes the groups that agree with the most wells' best class; `greedy` then hands classes out from the "
        "highest score down. `exact`: experiments "
        "in which the sum of the scores is that of the full problem; the benchmark ends with an error if the library "
        "misses one.",
        *parts,
        *([f"Not installed here, so not measured: {', '.join(missing)} (pip install lapx)."] if missing else []),
        machine("numpy", "scipy", "lapx"),
    )
    return tables


if __name__ == "__main__":
    main()
