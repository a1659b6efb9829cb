"""Pseudo-labels: the choice against a plain loop, ties and infinities, what training may see of a truth, and the way
through a checkpoint."""
import json

import numpy as np
import pandas as pd
import pytest
from cases import each
from pandas.testing import assert_frame_equal

from rcic_fastai.predict.assign import assign_predictions
from rcic_fastai.data.select import select_sites
from rcic_fastai.predict.core import Predictions
from rcic_fastai.train.pseudo import mislabel_rate, pseudo_from_json, pseudo_share, pseudo_sites, pseudo_to_json
from rcic_fastai.train.pseudo import select_pseudo_labels
from rcic_fastai.screen.groups import plate_groups
from rcic_fastai.screen.read import read_screen

COLUMNS = ['id_code', 'experiment', 'plate', 'sirna', 'margin']


def noisy(ids, sirnas, classes, signal, seed=0):
    "Well predictions whose true class stands out by `signal` above unit noise"
    logits = np.random.default_rng(seed).normal(size=(len(ids), len(classes)))
    return Predictions(ids, classes, logits + signal*(np.asarray(sirnas)[:, None] == classes), dict(level='well'))


def screen_of(seed=0, signal=2., per_group=6, n_groups=3, sizes=(6, 5, 6)):
    "Predictions, truth and groups of two experiments of three plates; experiment RPE-02 lacks half of its wells"
    rng, rows = np.random.default_rng(seed), []
    for e in (1, 2):
        for plate, n in enumerate(sizes, 1):
            members = per_group*((plate+e) % n_groups) + rng.permutation(per_group)
            rows += [(f'RPE-{e:02}_{plate}_B{w+2:02}', s) for w, s in enumerate(members[:n if e == 1 else n//2])]
    truth = pd.DataFrame(rows, columns=['id_code', 'sirna'])
    classes = np.arange(per_group*n_groups)
    return noisy(truth.id_code, truth.sirna, classes, signal, seed), truth, pd.Series(classes//per_group)


def pseudo_of(*rows):
    return pd.DataFrame([(i, i.rsplit('_', 2)[0], int(i.rsplit('_', 2)[1]), s, m) for i, s, m in rows], columns=COLUMNS)


# How many

@each('start, epochs, kwargs, expected', [
    (90, 121, {}, {0: 0, 89: 0, 90: .4, 105: .7, 120: 1}),
    (0, 3, dict(first=0, last=.5), {0: 0, 1: .25, 2: .5}),
    (2, 3, {}, {1: 0, 2: 1}),        # one epoch with pseudo-labels: it is the last
    (90, 5, {}, {0: 0, 4: 0}),       # a short training ends before they start
    (1, 4, dict(first=.6, last=.6), {1: .6, 2: .6, 3: .6}),
])
def test_share(start, epochs, kwargs, expected):
    assert {e: pseudo_share(e, start, epochs, **kwargs) for e in expected} == pytest.approx(expected)


@each('args, said', [((5, 0, 5), 'epoch is 5, expected 0 to 4'), ((-1, 0, 5), 'epoch is -1'),
                     ((0, -1, 5), 'start is -1'),
                                        ((0, 1, 5, 40), 'first is 40'), ((0, 1, 5, .4, 1.1), 'last is 1.1'),
                     ((0, 1, 5, float('nan')), 'first is nan')])
def test_share_refuses(args, said):
    with pytest.raises(ValueError, match=said): pseudo_share(*args)


# Which

@each('per', ['experiment', 'screen'])
@each('share', [0, .1, .5, .77, 1])
@each('min_margin', [-np.inf, 0., 1.])
def test_selection_is_what_a_plain_loop_selects(per, share, min_margin):
    p, truth, groups = screen_of(signal=1.5)
    table, expected = assign_predictions(p, groups), []
    for experiment in (['RPE-01', 'RPE-02'] if per == 'experiment' else [None]):
        wells = [r for r in table.itertuples() if experiment in (None, r.experiment)]
        wells.sort(key=lambda r: -r.margin)
        expected += [r.id_code for r in wells[:int(len(wells)*share + .5)] if r.margin >= min_margin]
    chosen = select_pseudo_labels(p, groups, share, per, min_margin)
    assert list(chosen) == COLUMNS and set(chosen.id_code) == set(expected) and len(chosen) == len(expected)
    assert chosen.margin.is_monotonic_decreasing
    labels = table.set_index('id_code').sirna
    assert (labels[chosen.id_code].to_numpy() == chosen.sirna.to_numpy()).all()


@each('seed', range(8))
@each('grouped', [True, False])
def test_no_sirna_twice_in_an_experiment(seed, grouped):
    p, _, groups = screen_of(seed, signal=.5)
    chosen = select_pseudo_labels(p, groups if grouped else None, share=1, min_margin=-np.inf)
    assert len(chosen) == len(p.ids) and not chosen.duplicated(['experiment', 'sirna']).any()
    assert len(set(p.labels)) < len(p.labels)  # which argmax does not achieve
    if grouped: assert (chosen.groupby(['experiment', 'plate']).sirna.agg(lambda s: groups[s].nunique()) == 1).all()


def test_ties_go_by_id_and_the_order_of_the_input_does_not_matter():
    ids = [f'RPE-01_1_{w}' for w in ('D03', 'B03', 'C03', 'E03')]
    p = Predictions(ids, np.arange(4), 2*np.eye(4), dict(level='well'))
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        chosen = select_pseudo_labels(Predictions(p.ids[order], p.classes, p.logits[order], p.made), share=.5)
        assert_frame_equal(chosen, pseudo_of(('RPE-01_1_B03', 1, 2.), ('RPE-01_1_C03', 2, 2.)), check_dtype=False)
    # the smallest margin itself is enough
    assert [len(select_pseudo_labels(p, share=1, min_margin=m)) for m in (2, 2.001)] == [4, 0]


def test_a_well_without_rival_ranks_first():
    ids, groups = ['RPE-01_1_B03', 'RPE-01_2_B03', 'RPE-01_2_B04', 'RPE-01_2_B05'], pd.Series([0, 1, 1, 1])
    logits = np.array([[.1, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0], [0, 0, 0, 9]])
    chosen = select_pseudo_labels(Predictions(ids, np.arange(4), logits, dict(level='well')), groups, share=.5)
    assert chosen[['id_code', 'margin']].to_numpy().tolist() == [['RPE-01_1_B03', np.inf], ['RPE-01_2_B03', 9]]


def test_sites_are_averaged_and_controls_are_never_chosen():
    p, _, groups = screen_of()
    noise = np.random.default_rng(1).normal(size=p.logits.shape)
    ids, logits = [f'{i}_{s}' for s in (1, 2) for i in p.ids], np.concatenate([p.logits+noise, p.logits-noise])
    sites = Predictions(ids, np.arange(19), np.concatenate([logits, np.full((len(ids), 1), 99.)], axis=1),
                        dict(level='site'))
    # class 18 has no group
    assert_frame_equal(select_pseudo_labels(sites, groups), select_pseudo_labels(p, groups), rtol=1e-4)


@each('change, said', [(dict(share=1.01), 'share is 1.01, expected a share from 0 to 1'),
                       (dict(share=float('nan')), 'share is nan'),
                                          (dict(share=-.1), 'share is -0.1'),
                       (dict(per='plate'), "per is 'plate', expected one of 'experiment', 'screen'"),
                                          (dict(p=Predictions([], np.arange(3), np.zeros((0, 3)))), 'hold no wells')])
def test_selection_refuses(change, said):
    with pytest.raises(ValueError, match=said): select_pseudo_labels(**{'p': screen_of()[0], **change})


# How many are wrong

PSEUDO = pseudo_of(('RPE-01_1_B03', 5, 3.), ('RPE-01_1_B04', 6, 2.), ('RPE-02_1_B03', 5, 2.), ('RPE-02_1_B05', 0, 1.))


@each('truth, expected', [
    # other order, one well more, one less
    ([('RPE-02_1_B05', 0), ('RPE-01_1_B04', 7), ('RPE-01_1_B03', 5), ('RPE-09_1_B03', 8)], (1, 3, 1/3)),
    ([('RPE-01_1_B03', pd.NA), ('RPE-01_1_B04', 7)], (1, 1, 1)),
    # sites: wells count once
    ([('RPE-01_1_B03', 5), ('RPE-01_1_B03', 5), ('RPE-01_1_B04', 7), ('RPE-01_1_B04', 7)], (1, 2, .5)),
    ([('RPE-02_1_B05', 0)], (0, 1, 0)),
])
@each('dtype', ['Int64', 'Float64', 'object'])
def test_mislabel_rate(truth, expected, dtype):
    wells = pd.DataFrame(truth, columns=['id_code', 'target']).astype({'target': dtype})
    assert mislabel_rate(PSEUDO, wells, target='target') == pytest.approx(expected)


def test_without_known_wells_the_rate_is_unknown():
    wells = pd.DataFrame({'id_code': PSEUDO.id_code, 'sirna': pd.array([pd.NA]*4, dtype='Int64')})
    for table in (wells, wells[:0]):
        r = mislabel_rate(PSEUDO, table)
        assert (r.wrong, r.known) == (0, 0) and np.isnan(r.rate)
    assert np.isnan(mislabel_rate(PSEUDO[:0], wells.assign(sirna=1)).rate)
    with pytest.raises(ValueError, match='wells: column sirna is missing'): mislabel_rate(PSEUDO, wells[['id_code']])
    with pytest.raises(ValueError, match='well RPE-01_1_B03 occurs more than once'):
        mislabel_rate(pd.concat([PSEUDO, PSEUDO[:1]]), wells)


# Sites

def sites_of(truth):
    return pd.DataFrame([(i, s, t) for i, t in truth for s in (1, 2)],
                        columns=['id_code', 'site', 'sirna']).astype({'sirna': 'Int64'})


def test_sites_get_the_pseudo_label():
    sites = sites_of([('RPE-02_1_B05', pd.NA), ('RPE-02_1_B09', pd.NA), ('RPE-01_1_B04', pd.NA),
                      ('RPE-02_1_B03', pd.NA), ('RPE-01_1_B03', 5)])
    before = sites.copy()
    chosen = pseudo_sites(sites, PSEUDO)  # RPE-01_1_B03 is known and agrees
    assert chosen[['id_code', 'site', 'sirna']].to_numpy().tolist() == [
        [i, s, label] for i, label in (('RPE-02_1_B05', 0), ('RPE-01_1_B04', 6), ('RPE-02_1_B03', 5),
                                       ('RPE-01_1_B03', 5)) for s in (1, 2)]
    assert chosen.index.tolist() == list(range(8))  # rows 2 and 3 of `sites` are gone
    assert chosen.pseudo.dtype == bool and chosen.pseudo.all() and chosen.sirna.dtype == sites.sirna.dtype
    assert_frame_equal(sites, before)
    none = pseudo_sites(sites, PSEUDO[:0])
    assert not len(none) and none.dtypes.equals(chosen.dtypes)


def test_a_known_label_is_kept_unless_it_is_hidden():
    sites = sites_of([('RPE-01_1_B03', 5), ('RPE-01_1_B04', 7), ('RPE-02_1_B03', pd.NA), ('RPE-02_1_B05', 3)])
    with pytest.raises(ValueError, match='RPE-01_1_B04 is known to be treatment 7, its pseudo-label is 6'):
        pseudo_sites(sites, PSEUDO)
    chosen = pseudo_sites(sites, PSEUDO, hidden=True)
    assert chosen.sirna.tolist() == [5, 5, 6, 6, 5, 5, 0, 0]
    with pytest.raises(ValueError, match='1 well with a pseudo-label has no sites here, RPE-02_1_B05 for one'):
        pseudo_sites(sites[:6], PSEUDO, hidden=True)
    with pytest.raises(ValueError, match='sites: column sirna is missing'): pseudo_sites(sites[['id_code']], PSEUDO)


def test_hidden_labels_change_nothing():
    "Held-out truth replaced by another truth, or by none: training sees the same sites"
    a = sites_of([(i, 1) for i in PSEUDO.id_code])
    b, c = a.assign(sirna=a.sirna + 8), a.assign(sirna=pd.array([pd.NA]*len(a), dtype='Int64'))
    assert_frame_equal(pseudo_sites(a, PSEUDO, hidden=True), pseudo_sites(b, PSEUDO, hidden=True))
    assert_frame_equal(pseudo_sites(a, PSEUDO, hidden=True), pseudo_sites(c, PSEUDO))


# Checkpoint

@pytest.mark.parametrize('pseudo', [
    select_pseudo_labels(*screen_of()[::2], share=.6),
    select_pseudo_labels(*screen_of()[::2], share=0),
    # share .4 of one well is none
    select_pseudo_labels(Predictions(['RPE-01_1_B03'], np.array([7]), [[.1]], dict(level='well'))),
    # no rival: infinite margin
    select_pseudo_labels(Predictions(['RPE-01_1_B03'], np.array([7]), [[.1]], dict(level='well')), share=1),
    select_pseudo_labels(Predictions(['A_b-01_1_B03', 'A_b-01_1_B04'], np.array(['x', 'y']), np.eye(2)/3,
                                     dict(level='well')), share=1),
], ids=['usual', 'share-0', 'none', 'infinite', 'text'])
def test_a_checkpoint_gives_the_labels_back(pseudo):
    stored = json.dumps(pseudo_to_json(pseudo), allow_nan=False)
    assert_frame_equal(pseudo_from_json(json.loads(stored)), pseudo, check_exact=True)


@each('record',
      [{}, 'RPE-01_1_B03', {'id_code': 'RPE-01_1_B03', 'sirna': 1}, {'id_code': 'B03', 'sirna': 1, 'margin': 1.}])
def test_a_record_that_is_none(record):
    with pytest.raises(ValueError, match='record 1 is'):
        pseudo_from_json([{'id_code': 'RPE-01_1_B03', 'sirna': 1, 'margin': 1.}, record])


# Screens

def test_sites_of_a_screen(small_screen):
    screen = read_screen(small_screen)
    train, test = select_sites(screen, 'train'), select_sites(screen, 'test')
    groups, wells = plate_groups(screen.wells), test.id_code.unique()
    p = noisy(wells, np.arange(len(wells)) % 8, np.arange(8), 4)
    chosen = pseudo_sites(test, select_pseudo_labels(p, groups, share=.5, min_margin=-np.inf))
    n_sites = 2*int(.5*len(wells) + .5)
    assert len(chosen) == n_sites and list(chosen) == [*test, 'pseudo']
    together = pd.concat([train.assign(pseudo=False), chosen], ignore_index=True)
    assert together.pseudo.sum() == n_sites and together.sirna.notna().all()
    assert together.dtypes.drop('pseudo').equals(train.dtypes)


@pytest.mark.slow
def test_the_layout_lowers_the_mislabel_rate_on_the_real_plates(real_rcic):
    screen = read_screen(real_rcic)
    wells = screen.wells[screen.wells.experiment.isin(['HUVEC-03', 'RPE-05']) & (screen.wells.well_type == 'treatment')]
    p = noisy(wells.id_code, wells.sirna.to_numpy('int64'), np.arange(1108), 3.2)
    with_groups, without = (select_pseudo_labels(p, g, share=.4) for g in (plate_groups(screen.wells), None))
    a, b = mislabel_rate(with_groups, wells), mislabel_rate(without, wells)
    assert a.known == b.known == len(with_groups) == sum(int(.4*n + .5) for n in wells.experiment.value_counts())
    assert a.rate < .5*b.rate
    assert a.rate < mislabel_rate(select_pseudo_labels(p, plate_groups(screen.wells), 1, min_margin=-np.inf),
                                  wells).rate/3
