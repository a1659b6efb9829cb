"Assignment against brute force, at real size, and the submission and score on every kind of wrong table."
import itertools
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cases import each

from rcic_fastai.predict.submission import score_submission, score_table, write_submission
from rcic_fastai.predict.assign import allowed_classes, argmax_classes, assign_classes, assign_experiment
from rcic_fastai.predict.assign import assign_predictions, assign_screen, infer_plate_groups, plate_group_values
from rcic_fastai.predict.assign import plate_group_votes, vote_plate_groups
from rcic_fastai.predict.core import Predictions

SHARED = Path(__file__).resolve().parents[1].parent/'shared'
needs_rcic = pytest.mark.skipif(not (SHARED/'rcic'/'train.csv').exists(),
                                reason='the real tables (../shared/rcic/train.csv) are not here')
SEEDS = range(12)


def brute_force(scores, allowed):
    "Largest value of a one-to-one assignment, by trying all of them; -inf if there is none."
    n_wells, n_classes = scores.shape
    scores = np.where(allowed, scores, -np.inf)
    return max(scores[range(n_wells), p].sum() for p in itertools.permutations(range(n_classes), n_wells))


def value(scores, labels): return scores[range(len(labels)), labels].sum()


@each('seed', SEEDS)
@each('shape', [(1, 1), (1, 4), (4, 4), (3, 6), (5, 6)])
def test_assignment_is_the_best_of_all(seed, shape):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=shape)
    labels = assign_classes(scores)
    assert len(set(labels)) == len(labels) == shape[0]
    assert value(scores, labels) == pytest.approx(brute_force(scores, np.ones(shape, bool)))


@each('seed', SEEDS)
def test_forbidden_pairs_are_never_chosen(seed):
    rng = np.random.default_rng(seed)
    scores, allowed = rng.normal(size=(4, 6)), rng.random((4, 6)) < .45
    best = brute_force(scores, allowed)
    if best == -np.inf:
        with pytest.raises(ValueError, match=r'at most \d of 4 wells'): assign_classes(scores, allowed)
    else:
        labels = assign_classes(scores, allowed)
        assert allowed[range(4), labels].all() and len(set(labels)) == 4
        assert value(scores, labels) == pytest.approx(best)


def test_some_random_masks_are_infeasible_and_some_are_not():
    feasible = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        feasible.append(brute_force(rng.normal(size=(4, 6)), rng.random((4, 6)) < .45) > -np.inf)
    assert 0 < sum(feasible) < len(feasible)


@each('dtype', ['float16', 'float32', 'float64', 'int64'])
def test_scores_of_any_dtype(dtype):
    assert assign_classes(np.array([[3, 1], [2, 1]], dtype=dtype)).tolist() == [0, 1]


@each('scores,allowed,message', [
    (np.zeros(3), None, r'shape \(3,\), expected \(wells, classes\)'),
    (np.zeros((3, 2)), None, '3 wells but only 2 classes'),
    (np.array([[0, np.nan]]), None, 'row 0, class 1 is nan'),
    (np.array([[0, 1], [np.inf, 0]]), None, 'row 1, class 0 is inf'),
    (np.zeros((2, 3)), np.ones((3, 2), bool), r'allowed has shape \(3, 2\)'),
    (np.zeros((2, 3)), np.ones((2, 3)), 'dtype float64'),
    (np.zeros((2, 3)), np.array([[1, 0, 0], [1, 0, 0]], bool), 'at most 1 of 2 wells'),
])
def test_bad_scores_are_explained(scores, allowed, message):
    with pytest.raises(ValueError, match=message): assign_classes(scores, allowed)


def test_argmax_needs_an_allowed_class():
    allowed = np.array([[True, True], [False, False]])
    with pytest.raises(ValueError, match='row 1 of scores has no allowed class'):
        argmax_classes(np.zeros((2, 2)), allowed)


def small_experiment(seed, n_plates=3, n_groups=3, free=0, per_group=3):
    "Scores without signal (so that mappings compete), plates with missing wells, `free` classes without group."
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.r_[np.repeat(np.arange(n_groups), per_group), np.full(free, -1)])
    plates = np.concatenate([np.full(rng.integers(1, per_group+1), p) for p in range(1, n_plates+1)])
    return rng.normal(size=(len(plates), len(groups))), rng.permutation(plates), groups


def mapping_values(scores, plates, groups, known=()):
    "Value of every mapping of plates to groups, each by one assignment of the whole experiment."
    names, out = np.unique(plates), {}
    for perm in itertools.permutations(np.unique(groups[groups >= 0]).tolist(), len(names)):
        mapping = dict(zip(names.tolist(), perm))
        try: out[perm] = value(scores, assign_classes(scores, allowed_classes(plates, groups, mapping, known)))
        except ValueError: pass
    return out


@each('seed', SEEDS)
@each('layout', [{}, {"n_plates": 2, "n_groups": 4}, {"n_plates": 4, "n_groups": 4}, {"n_plates": 1, "n_groups": 3},
                                    {"free": 2}, {"n_plates": 2, "n_groups": 4, "free": 3}])
def test_mapping_and_margin_against_all_permutations(seed, layout):
    scores, plates, groups = small_experiment(seed, **layout)
    mapping, margin = infer_plate_groups(scores, plates, groups)
    totals = mapping_values(scores, plates, groups)
    best, second = sorted(totals.values(), reverse=True)[:2]
    assert totals[tuple(mapping[p] for p in sorted(mapping))] == pytest.approx(best)
    assert margin == pytest.approx(best-second)
    assert all(type(p) is int and type(g) is int for p, g in mapping.items())


@each('seed', SEEDS)
def test_known_classes_count_neither_for_the_mapping_nor_for_the_labels(seed):
    scores, plates, groups = small_experiment(seed, per_group=4)
    known = [int(np.flatnonzero(groups == g)[0]) for g in (0, 2)]
    totals = mapping_values(scores, plates, groups, known)
    if not totals:
        with pytest.raises(ValueError, match='usable classes'): assign_experiment(scores, plates, groups, known)
        return
    a = assign_experiment(scores, plates, groups, known)
    assert a.value == pytest.approx(max(totals.values())) == pytest.approx(value(scores, a.labels))
    assert not set(a.labels) & set(known) and len(set(a.labels)) == len(a.labels)
    assert (groups[a.labels] == [a.mapping[p] for p in plates]).all()


def test_a_single_possible_mapping_has_an_infinite_margin():
    groups, plates = np.array([0, 0, 1]), np.array([1, 1, 2])
    scores = np.array([[0., 0, 9], [0, 0, 9], [9, 9, 0]])
    assert plate_group_values(scores, plates, groups).loc[1, 1] == -np.inf
    assert infer_plate_groups(scores, plates, groups) == ({1: 0, 2: 1}, np.inf)


def test_margin_of_each_well():
    scores = np.array([[5., 4, 1, 9], [5, 1, 2, 9]])
    a = assign_experiment(scores, [1, 1], [0, 0, 0, 1])
    assert a.mapping == {1: 0} and a.labels.tolist() == [1, 0]
    assert a.margin.tolist() == [-1, 3]  # class 3 is in another group and does not compete
    assert assign_experiment(np.array([[2.]]), [1]).margin.tolist() == [np.inf]


def test_without_groups_only_the_assignment_counts():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(6, 8))
    a = assign_experiment(scores, [1, 1, 2, 2, 3, 3])
    assert a.labels.tolist() == assign_classes(scores).tolist() and a.mapping is None and np.isnan(a.mapping_margin)
    assert assign_experiment(scores, [1]*6, one_to_one=False).labels.tolist() == scores.argmax(1).tolist()
    assert 'Assignment(6 wells' in repr(a)


@each('change,message', [
    ({"plates": [1, 1]}, r'plates has shape \(2,\), expected \(4,\)'),
    ({"groups": [0, 1]}, r'groups has shape \(2,\), expected \(6,\)'),
    ({"groups": [0., 0, 0, 1, 1, 1]}, 'groups must be integers'),
    ({"groups": [-2, 0, 0, 1, 1, 1]}, 'minimum -2'),
    ({"plates": [1, 2, 3, 3]}, '3 plates but 2 groups'),
    ({"plates": [1, 1, 1, 1]}, r'the plates have \[4\] wells, the groups \[3, 3\] usable'),
    ({"known": [6]}, 'known must hold class numbers from 0 to 5'),
    ({"known": [1, 2]}, 'no mapping of plates to groups fits'),
])
def test_bad_layouts_are_explained(change, message):
    args = {"scores": np.zeros((4, 6)), "plates": [1, 1, 2, 2], "groups": [0, 0, 0, 1, 1, 1]} | change
    with pytest.raises(ValueError, match=message): assign_experiment(**args)


def test_a_mapping_must_cover_every_plate():
    with pytest.raises(ValueError, match='no group for plate 3'): allowed_classes([1, 3], [0, 1], {1: 0, 2: 1})


@pytest.mark.parametrize('one_to_one', [True, False])
def test_a_screen_is_its_experiments_in_the_order_of_the_input(one_to_one):
    parts = [small_experiment(seed) for seed in range(3)]
    groups = parts[0][2]
    order = np.random.default_rng(0).permutation(sum(len(p[1]) for p in parts))
    scores, plates = np.concatenate([p[0] for p in parts])[order], np.concatenate([p[1] for p in parts])[order]
    experiments = np.repeat(['B-01', 'A-02', 'A-01'], [len(p[1]) for p in parts])[order]
    known = {'A-01': [0]}
    table = assign_screen(scores, experiments, plates, groups, known, one_to_one)
    assert table.label.dtype.kind == 'i' and (table.experiment == experiments).all() and (table.plate == plates).all()
    for e in np.unique(experiments):
        rows = experiments == e
        a = assign_experiment(scores[rows], plates[rows], groups, known.get(e), one_to_one)
        assert (table.label[rows] == a.labels).all() and np.allclose(table.margin[rows], a.margin)
        assert (table.group[rows] == [a.mapping[p] for p in plates[rows]]).all()
        assert np.allclose(table.mapping_margin[rows], a.mapping_margin)
    assert assign_screen(scores[:, :0].reshape(0, 9), [], [], groups).shape == (0, 6)
    assert assign_screen(scores, experiments, plates, one_to_one=False).group.isna().all()


def test_a_screen_names_the_experiment_of_an_error():
    with pytest.raises(ValueError, match='experiment RPE-08: 2 plates but 1 group'):
        assign_screen(np.zeros((2, 2)), ['RPE-08']*2, [1, 2], [0, 0])


# The published vote

def test_the_vote_by_hand():
    scores = np.array([[.9, .1, .2, .3], [-.2, -.1, 9, 0], [.2, .9, .3, .1],  # plate 1 votes for groups 0, 1, 0
                       [.1, .2, .3, .9], [.9, .1, .2, .3]])  # plate 2 for 1, 0
    plates, groups = [1, 1, 1, 2, 2], [0, 0, 1, 1]
    assert plate_group_votes(scores, plates, groups).to_numpy().tolist() == [[2, 1], [1, 1]]
    # 2 + 1 votes against 1 + 1, however sure well 1 is
    assert vote_plate_groups(scores, plates, groups) == ({1: 0, 2: 1}, 1)
    a, zero = (assign_experiment(scores, plates, groups, method=m) for m in ('vote', 'vote_zero'))
    assert a.labels.tolist() == [0, 1, 1, 3, 3] and a.mapping_margin == 1  # not one-to-one, whatever `one_to_one` is
    assert a.margin == pytest.approx([.8, .1, .7, .6, .1]) and a.value == pytest.approx(.9-.1+.9+.9+.3)
    # well 1: the zero of class 2 beats -.2 and -.1
    assert zero.labels.tolist() == [0, 2, 1, 3, 3]
    assert zero.mapping == a.mapping
    assert zero.margin == pytest.approx([.8, 0, .7, .6, .1])
    assert assign_experiment(scores, plates, groups, known=[3], method='vote').labels.tolist() == [0, 1, 1, 2, 2]
    assert assign_experiment(scores, plates, groups, known=[2], method='vote_zero').labels.tolist() == [0, 3, 1, 3, 3]
    with pytest.raises(ValueError, match=r'the plates have \[3, 2\] wells, the groups \[2, 2\]'):
        assign_experiment(scores, plates, groups)


def test_equal_votes_are_decided_by_the_scores_and_only_equal_ones():
    # one vote each; 2 + 3 against 3 + 0
    assert vote_plate_groups([[3, 2], [3, 0]], [1, 2], [0, 1]) == ({1: 1, 2: 0}, 0)
    sure = np.array([[1, 0, -9], [1, 0, -9], [0, 1e9, -9], [0, 0, 1]])  # the class without group does not vote
    assert plate_group_votes(sure, [1, 1, 1, 2], [0, 1, -1]).to_numpy().tolist() == [[2, 1], [0, 0]]
    assert vote_plate_groups(sure, [1, 1, 1, 2], [0, 1, -1]) == ({1: 0, 2: 1}, 1)
    assert vote_plate_groups(np.zeros((3, 2)), [1, 1, 1], [0, 0]) == ({1: 0}, np.inf)
    # nothing is left of group 0
    assert vote_plate_groups([[5., 1], [5, 1]], [1, 1], [0, 1], known=[0]) == ({1: 1}, np.inf)
    assert vote_plate_groups(np.zeros((0, 2)), [], [0, 1]) == infer_plate_groups(np.zeros((0, 2)), [],
                                                                                 [0, 1]) == ({}, np.inf)
    with pytest.raises(ValueError, match='2 plates but 1 group'): vote_plate_groups(np.zeros((2, 2)), [1, 2], [0, 0])
    with pytest.raises(ValueError, match=r'the groups \[0, 1\] usable'):
        vote_plate_groups(np.zeros((2, 2)), [1, 2], [0, 1], known=[0])


LAYOUTS = [{}, {"n_plates": 2, "n_groups": 4}, {"n_plates": 4, "n_groups": 4, "per_group": 4}, {"free": 3}]


@each('layout', LAYOUTS)
def test_the_vote_against_all_permutations(layout):
    ties = 0
    for seed in SEEDS:
        scores, plates, groups = small_experiment(seed, **layout)
        voted, best = groups[scores.argmax(1)], {}
        for perm in itertools.permutations(np.unique(groups[groups >= 0]).tolist(), len(np.unique(plates))):
            mapping = dict(zip(np.unique(plates).tolist(), perm))
            best[perm] = (sum(v == mapping[p] for v, p in zip(voted, plates)),
                          value(scores, argmax_classes(scores, allowed_classes(plates, groups, mapping))))
        first, second = sorted(best.values(), reverse=True)[:2]
        mapping, margin = vote_plate_groups(scores, plates, groups)
        assert best[tuple(mapping[p] for p in sorted(mapping))] == pytest.approx(first) and margin == first[0]-second[0]
        assert all(type(p) is int and type(g) is int for p, g in mapping.items())
        ties += margin == 0
        allowed = allowed_classes(plates, groups, mapping)
        assert assign_experiment(scores, plates, groups, method='vote').labels.tolist() == np.where(
            allowed, scores, -np.inf).argmax(1).tolist()
        assert assign_experiment(scores, plates, groups, method='vote_zero').labels.tolist() == np.where(
            allowed, scores, 0).argmax(1).tolist()
    assert 0 < ties < len(SEEDS)


@each('layout', LAYOUTS)
def test_with_a_strong_signal_the_vote_is_the_exact_mapping(layout):
    for seed in SEEDS:
        scores, plates, groups = small_experiment(seed, **layout)
        rng = np.random.default_rng(seed)
        true_mapping = dict(zip(np.unique(plates).tolist(), rng.permutation(groups.max()+1).tolist()))
        truth = np.empty(len(plates), int)
        for p, g in true_mapping.items():
            truth[plates == p] = rng.permutation(np.flatnonzero(groups == g))[:(plates == p).sum()]
        scores[range(len(plates)), truth] += 20
        for method in ('exact', 'vote', 'vote_zero'):
            a = assign_experiment(scores, plates, groups, method=method)
            assert a.mapping == true_mapping and a.labels.tolist() == truth.tolist()


@pytest.mark.parametrize('method', ['exact', 'vote', 'vote_zero'])
def test_the_method_reaches_screens_and_predictions(method):
    rng = np.random.default_rng(0)
    ids = [f'{e}_{p}_{w}' for e in ('HUVEC-17', 'RPE-08') for p in (1, 2) for w in ('B03', 'C04')]
    experiments, plates = np.repeat(['HUVEC-17', 'RPE-08'], 4), np.tile([1, 1, 2, 2], 2)
    classes, groups = np.array([2, 3, 5, 7, 9]), pd.Series([0, 0, 1, 1], index=[2, 3, 5, 7])  # 9 is a control
    p = Predictions(ids, classes, rng.normal(size=(8, 5))-1, {"level": 'well'})
    table, sirna = assign_predictions(p, groups, method=method), {}
    screen = assign_screen(p.logits[:, :4], experiments, plates, groups.to_numpy(), method=method)
    for e in ('HUVEC-17', 'RPE-08'):
        a = assign_experiment(p.logits[experiments == e, :4], plates[experiments == e], groups.to_numpy(),
                              method=method)
        assert (screen.label[experiments == e] == a.labels).all()
        assert (screen.mapping_margin[experiments == e] == a.mapping_margin).all()
        sirna |= dict(zip(np.array(ids)[experiments == e], classes[a.labels]))
    assert dict(zip(table.id_code, table.sirna)) == sirna
    if method == 'exact': assert table.equals(assign_predictions(p, groups, True))
    else: assert table.equals(assign_predictions(p, groups, one_to_one=False, method=method))


@pytest.mark.parametrize('call', [
    lambda groups, method: assign_experiment(np.zeros((2, 2)), [1, 1], groups, method=method),
    lambda groups, method: assign_screen(np.zeros((2, 2)), ['A-01']*2, [1, 1], groups, method=method),
    lambda groups, method: assign_predictions(Predictions(['A-01_1_B03'], [0, 1], np.zeros((1, 2)), {"level": 'well'}),
                                              None if groups is None else pd.Series(groups), one_to_one=False,
                                              method=method)])
def test_bad_methods_are_explained(call):
    with pytest.raises(ValueError, match="^method is 'hungarian', expected one of exact, vote, vote_zero$"):
        call([0, 0], 'hungarian')
    for method in ('vote', 'vote_zero'):
        for groups in (None, [-1, -1]):
            with pytest.raises(ValueError, match=f"^method '{method}' votes on plate groups, but there are none"):
                call(groups, method)


# The real size. Signal and hubs make raw argmax right for about 60% of the wells.

def noisy_scores(truth, n_classes, seed, signal=3.9, hubs=.5):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(len(truth), n_classes)).astype(np.float32) + (
        hubs*rng.normal(size=n_classes)).astype(np.float32)
    scores[range(len(truth)), truth] += signal
    return scores


def check_real_size(experiments, n_classes=1108):
    "Assign every experiment; `experiments` yields name, plates, truth and groups. The table of what came out."
    rows = []
    for seed, (name, plates, truth, groups) in enumerate(experiments):
        scores = noisy_scores(truth, n_classes, seed)
        start = time.process_time()
        a = assign_experiment(scores, plates, groups)
        seconds = time.process_time()-start
        true_mapping = dict(zip(plates.tolist(), groups[truth].tolist()))
        rows.append({"experiment": name, "raw": (scores.argmax(1) == truth).mean(),
                     "assigned": (a.labels == truth).mean(), "found": a.mapping == true_mapping,
                         "unique": len(set(a.labels)) == len(a.labels), "seconds": seconds})
    table = pd.DataFrame(rows)
    print('\n', table.describe().loc[['count', 'mean', 'min', 'max']].round(3),
          f'\ngroups recovered: {table.found.sum()} of {len(table)}')
    assert table.found.all() and table.unique.all()
    assert .55 < table.raw.mean() < .65 and table.assigned.min() > .85 and table.seconds.max() < 1
    return table


@pytest.mark.slow
@needs_rcic
def test_real_layout_of_all_training_experiments():
    wells = pd.read_csv(SHARED/'rcic'/'train.csv')
    # which plate holds a siRNA, experiment by experiment
    plates_of = wells.pivot(index='sirna', columns='experiment', values='plate')
    experiments = plates_of.columns.tolist()
    assert len(experiments) == 33

    def layouts():
        for i, name in enumerate(experiments):
            # groups come from the other experiments, so that this one's rotation is hidden: the plates of the first are
            # the groups,
            # and each further one says in which group the siRNAs are that were missing so far
            first, *others = (plates_of[e] for e in experiments[:i] + experiments[i+1:])
            groups = first - 1
            for other in others: groups = groups.fillna(other.map(groups.groupby(other).first()))
            groups = groups.to_numpy().astype(int)
            assert np.bincount(groups).tolist() == [277]*4
            part = wells[wells.experiment == name]
            yield name, part.plate.to_numpy(), part.sirna.to_numpy(), groups

    assert len(check_real_size(layouts())) == 33


@pytest.mark.slow
def test_synthetic_layout_of_real_size():
    def layouts(n=8):
        groups = np.random.default_rng(0).permutation(np.arange(1108) % 4)
        for seed in range(n):
            rng = np.random.default_rng(seed)
            order = rng.permutation(4)
            truth = [rng.permutation(np.flatnonzero(groups == g))[:rng.integers(272, 278)] for g in order]
            yield f'synthetic-{seed:02}', np.repeat([1, 2, 3, 4],
                                                    [len(t) for t in truth]), np.concatenate(truth), groups

    check_real_size(layouts())


# Submission and score

IDS = ['HUVEC-17_1_B03', 'HUVEC-17_2_B04', 'U2OS-04_1_B03', 'HUVEC-18_1_B03']


@pytest.fixture
def sample(tmp_path):
    pd.DataFrame({'id_code': IDS, 'sirna': 0}).to_csv(tmp_path/'sample_submission.csv', index=False)
    return tmp_path/'sample_submission.csv'


def test_submission_has_the_order_of_the_sample(sample, tmp_path):
    order = [2, 0, 3, 1]
    out = write_submission(np.array(IDS)[order], np.array([10, 11, 12, 13])[order], sample,
                           tmp_path/'new'/'submission.csv')
    assert out.read_text() == 'id_code,sirna\n' + ''.join(f'{i},{s}\n' for i, s in zip(IDS, [10, 11, 12, 13]))
    assert [p.name for p in out.parent.iterdir()] == ['submission.csv']


def test_submission_takes_whole_numbers_of_any_type(sample, tmp_path):
    for labels in ([1, 2, 3, 4], np.array([1., 2, 3, 4]), pd.Series([1, 2, 3, 4], dtype='Int64', index=[9, 8, 7, 6]),
                   list('1234')):
        assert pd.read_csv(write_submission(pd.Series(IDS, index=[4, 3, 2, 1]), labels, pd.read_csv(sample),
                                            tmp_path/'s.csv')).sirna.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize('ids,labels,message', [
    (IDS[1:], [1, 2, 3], '1 well of .*sample_submission.csv is missing: HUVEC-17_1_B03'),
    (IDS+['RPE-01_1_B03'], range(5), '1 well is not in .*sample_submission.csv: RPE-01_1_B03'),
    (IDS[:3]+IDS[:1], range(4), 'HUVEC-17_1_B03 occurs more than once'),
    (IDS[:3]+[None], range(4), 'row 3 has no id_code'),
    (IDS, [1, 2, 3], '3 sirna for 4 id_code'),
    (IDS, [1, 2, np.nan, 4], r'row 2 \(U2OS-04_1_B03\): sirna is nan'),
    (IDS, [1, 2.5, 3, 4], 'sirna is 2.5, expected an integer'),
    (IDS, [1, 2, 3, -1], 'sirna is -1, expected an integer from 0 on'),
    (IDS, [1, 2, 'x', 4], 'sirna is x'),
    (IDS, pd.array([1, pd.NA, 3, 4], dtype='Int64'), 'sirna is <NA>'),
])
def test_bad_submissions_are_refused_and_leave_the_old_file(sample, tmp_path, ids, labels, message):
    old = tmp_path/'submission.csv'
    old.write_text('old')
    with pytest.raises(ValueError, match=message): write_submission(ids, labels, sample, old)
    assert old.read_text() == 'old'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['sample_submission.csv', 'submission.csv']


def test_an_interrupted_write_leaves_the_old_file(sample, tmp_path, monkeypatch):
    old = tmp_path/'submission.csv'
    old.write_text('old')
    def killed(self, path, **kwargs):
        Path(path).write_text('id_code,si')
        raise KeyboardInterrupt
    monkeypatch.setattr(pd.DataFrame, 'to_csv', killed)
    with pytest.raises(KeyboardInterrupt): write_submission(IDS, range(4), sample, old)
    assert old.read_text() == 'old'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['sample_submission.csv', 'submission.csv']


def test_score_and_its_table(sample, tmp_path):
    truth = pd.DataFrame({'well_type': 'treatment', 'sirna': [3, 2, 1, 0], 'id_code': IDS[::-1]})
    truth.to_csv(tmp_path/'truth.csv', index=False)
    submission = write_submission(IDS, [0, 1, 9, 9], sample, tmp_path/'submission.csv')
    assert score_submission(submission, tmp_path/'truth.csv') == .5
    assert score_submission(pd.read_csv(submission), truth.sample(frac=1, random_state=1)) == .5
    by_experiment, by_cell = score_table(submission, truth), score_table(submission, truth, by='cell_type')
    assert by_experiment.accuracy.to_dict() == {'HUVEC-17': 1, 'HUVEC-18': 0, 'U2OS-04': 0, 'all': .5}
    assert by_cell.wells.to_dict() == {'HUVEC': 3, 'U2OS': 1, 'all': 4}
    assert by_cell.right.to_dict() == {'HUVEC': 2, 'U2OS': 0, 'all': 2}
    with pytest.raises(ValueError, match="by is 'plate'"): score_table(submission, truth, by='plate')


@each('submission,message', [
    ('id_code,sirna\nHUVEC-17_1_B03,0\n',
     r'submission.csv: 3 wells of truth are missing: HUVEC-17_2_B04, HUVEC-18_1_B03, U2OS-04_1_B03'),
    ('id_code,sirna\n' + ''.join(f'{i},0\n' for i in IDS+['X-01_1_B03']), '1 well is not in truth: X-01_1_B03'),
    ('id_code,sirna\n' + ''.join(f'{i},0\n' for i in IDS+IDS[:1]),
     'submission.csv: HUVEC-17_1_B03 occurs more than once'),
    ('id_code,sirna\n' + ''.join(f'{i},\n' for i in IDS), r'submission.csv: row 2 \(HUVEC-17_1_B03\) has no sirna'),
    ('id,sirna\na,0\n', 'submission.csv: neither id_code nor well is among its columns, id, sirna'),
    ('', 'submission.csv: the file is empty'),
])
def test_a_submission_that_cannot_be_scored_is_explained(tmp_path, submission, message):
    (tmp_path/'submission.csv').write_text(submission)
    with pytest.raises(ValueError, match=message):
        score_submission(tmp_path/'submission.csv', pd.DataFrame({'id_code': IDS, 'sirna': range(4)}))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing.csv does not exist'):
        score_submission(tmp_path/'nothing.csv', tmp_path/'truth.csv')
    empty = pd.DataFrame({'id_code': [], 'sirna': []})
    with pytest.raises(ValueError, match='truth: there are no wells'): score_submission(empty, empty)


@needs_rcic
def test_the_real_sample_submission_can_be_written(tmp_path):
    sample = pd.read_csv(SHARED/'rcic'/'sample_submission.csv')
    shuffled = sample.sample(frac=1, random_state=0)
    out = write_submission(shuffled.id_code, shuffled.sirna, SHARED/'rcic'/'sample_submission.csv',
                           tmp_path/'submission.csv')
    assert out.read_bytes() == (SHARED/'rcic'/'sample_submission.csv').read_bytes().replace(b'\r\n', b'\n')
