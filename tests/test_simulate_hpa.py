"""Simulated atlases: real label frequencies, the same bytes however they are written, planted twins, patterns that
can be told apart."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cases import each
from PIL import Image
from scipy.ndimage import gaussian_filter

from rcic_fastai.screen.atlas import hpa_channels, read_hpa, read_labels
from rcic_fastai.screen.labels import label_matrix
from rcic_fastai.screen.morphology import named_rng
from rcic_fastai.screen.cells import CellField, Stain, antibody_stain, hpa_patterns
from rcic_fastai.screen.simulate_atlas import AtlasSimulation, changed_labels, design_atlas, draw_label_sets
from rcic_fastai.screen.simulate_atlas import label_sets, simulate_hpa, simulate_picture, twin_pairs

REAL = Path(__file__).parents[1].parent / "shared" / "hpa"
# fmt: off
REAL_COUNTS = [12885, 1254, 3621, 1561, 1858, 2513, 1008, 2822, 53, 45, 28, 1093, 688, 537, 1066, 21, 530, 210, 902,
               1482, 172, 3777, 802, 2965, 322, 8228, 328, 11]
# fmt: on
SMALL = dict(n_images=40, n_test=20, n_external=24, min_positives=1, twins=.2, duplicates=.05, missing_yellow=.2,
             image_size=32, seed=3, workers=1, progress=False)


def contents(path):
    "Bytes of every file below `path`, by name"
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return simulate_hpa(tmp_path_factory.mktemp("atlas"), **SMALL)


@pytest.fixture(scope="module")
def design():
    return design_atlas(seed=5)


def green(path):
    x = np.asarray(Image.open(path))
    return x if x.ndim == 2 else x[..., 1]


# labels


def test_label_sets_are_those_of_the_real_table():
    sets, counts = label_sets()
    assert (counts @ label_matrix(sets)).tolist() == REAL_COUNTS
    assert len(set(sets)) == len(sets) == 577 and counts.sum() == 31072


@pytest.mark.skipif(not REAL.exists(), reason="the real tables (../shared/hpa) are not here")
def test_every_set_occurs_as_often_as_in_the_real_table():
    real = read_labels(REAL / "train.csv").value_counts()
    assert dict(zip(*label_sets())) == real.to_dict()


def test_drawn_classes_and_pairs_are_as_frequent_as_real_ones():
    n, (sets, counts) = 20000, label_sets()
    y, drawn = label_matrix(sets).astype(int), label_matrix(draw_label_sets(named_rng(1), n)).astype(int)
    expected, found = (y.T * counts) @ y / counts.sum() * n, drawn.T @ drawn
    often = expected >= 5
    z = (found - expected)[often] / np.sqrt(expected[often] * (1 - expected[often] / n))
    assert np.abs(z).max() < 5 and .8 < z.std() < 1.2  # binomial scatter, no more and no less
    assert found[expected == 0].sum() == 0  # no pair that does not occur


@pytest.mark.parametrize("n, minimum", [(28, 1), (84, 3), (300, 6)])
def test_every_class_gets_its_minimum(n, minimum):
    drawn = draw_label_sets(named_rng(2, n), n, min_positives=minimum)
    assert len(drawn) == n and label_matrix(drawn).sum(0).min() >= minimum
    assert set(drawn) <= set(label_sets()[0])


def test_balanced_classes_are_equally_frequent():
    count = label_matrix(draw_label_sets(named_rng(3), 10000, "balanced")).sum(0)
    assert count.max() / count.min() < 1.35


def test_changed_labels_differ_by_one_class():
    rng = named_rng(4)
    for s in label_sets()[0]:
        changed = changed_labels(rng, s)
        assert len(set(s) ^ set(changed)) == 1 and changed and list(changed) == sorted(changed)


# the layout


def test_numbers_of_the_design(design):
    assert design.split.value_counts().to_dict() == dict(train=1500, test=600, external=900)
    assert design.Id.is_unique and design.groupby("picture").size().max() == 2
    ours = design[design.split != "external"]
    assert (ours.target == ours.labels).all()
    train, test = (label_matrix(design[design.split == s].labels).sum(0) for s in ("train", "test"))
    assert train.min() >= 12 and test.min() >= 6
    common = np.array(REAL_COUNTS) > 800
    assert np.abs(np.log(train / 1500 * 31072 / np.array(REAL_COUNTS)))[common].max() < .5


def test_an_antibody_has_one_label_set_and_three_plates(design):
    by_antibody = design.groupby("antibody")
    assert by_antibody.labels.nunique().max() == 1
    assert design[design.split == "external"].groupby("antibody").target.nunique().max() == 1
    assert by_antibody.plate.nunique().max() == 3 and by_antibody.well.nunique().max() == 1
    assert design[design.split == "external"].Id.str.fullmatch(r"\d+_\d+_[A-H]\d{1,2}_\d+").all()
    assert not design[design.split != "external"].Id.str.contains("_").any()


def test_twins_and_their_agreement(design):
    pairs, split, target = twin_pairs(design), design.set_index("Id").split, design.set_index("Id").target
    kind = pairs.twin.map(split)
    assert kind.value_counts().to_dict() == dict(external=195, train=15, test=6)
    assert pairs.Id.map(split).eq("train").all() and pairs.Id.is_unique
    assert pairs.same_labels[kind == "external"].sum() == round(.604 * 195)
    assert pairs.same_labels[kind != "external"].all()
    assert (pairs.same_labels == [target[a] == target[b] for a, b in zip(pairs.Id, pairs.twin)]).all()


@each(
    "bad, message",
    [
        (dict(n_images=100), "100 images cannot hold 12 of each of 28 classes"),
        (dict(n_external=50), "50 external images cannot hold the twins of 0.13 of 1500"),
        (dict(twin_agreement=1.2), "twin_agreement is 1.2"),
        (dict(frequencies="rare"), "'real' or 'balanced'"),
        (dict(n_test=-1), "n_test -1"),
        (dict(n_external=1500, twins=1.), "more than 1500 training images allow"),
    ],
)
def test_designs_nobody_could_draw(bad, message):
    with pytest.raises(ValueError, match=message):
        design_atlas(**bad)


def test_without_test_set_or_external_images():
    alone = design_atlas(n_images=28, n_test=0, n_external=0, min_positives=1)
    assert alone.split.unique().tolist() == ["train"] and len(alone) == 28


# the files


@pytest.mark.slow
def test_two_processes_write_what_one_writes_and_a_lost_file_comes_back(small, tmp_path):
    assert contents(simulate_hpa(tmp_path / "two", **{**SMALL, "workers": 2})) == contents(small)
    before = contents(small)
    victim = next((small / "external").glob("*_green.jpg"))
    victim.unlink()
    simulate_hpa(small, **SMALL)
    assert contents(small) == before


def test_another_atlas_is_left_alone(small):
    with pytest.raises(ValueError, match="other settings .*size_shift is 1.15 there, 1.3 now"):
        simulate_hpa(small, **{**SMALL, "size_shift": 1.3})


def test_files_and_tables_agree(small):
    tables = {name: pd.read_csv(small / f"{name}.csv") for name in ("train", "external", "sample_submission", "truth",
                                                                    "twins")}
    assert (tables["sample_submission"].Id == tables["truth"].Id).all()
    assert (tables["sample_submission"].Predicted == 0).all()
    for split, table, suffix in (("train", "train", "png"), ("test", "truth", "png"), ("external", "external", "jpg")):
        expected = {f"{i}_{c}.{suffix}" for i in tables[table].Id for c in hpa_channels}
        missing = expected - {p.name for p in (small / split).iterdir()}
        assert {p.name for p in (small / split).iterdir()} <= expected
        assert all("yellow" in m for m in missing) and (0 < len(missing) < 15 if split == "external" else not missing)
    assert set(tables["twins"].Id) <= set(tables["train"].Id)
    unsorted = [t for t in tables["train"].Target if list(map(int, t.split())) != sorted(map(int, t.split()))]
    assert unsorted  # as in the real table
    atlas = read_hpa(small)
    assert len(atlas.wells) == 84 and atlas.labels(atlas.wells[atlas.wells.labels.notna()]).shape == (64, 28)


def test_external_images_are_coloured_and_of_two_sizes(small):
    sides = set()
    for path in (small / "external").iterdir():
        x = np.asarray(Image.open(path)).astype(int)
        sides.add(x.shape[0])
        own = {"red": [0], "green": [1], "blue": [2], "yellow": [0, 1]}[path.stem.rpartition("_")[2]]
        others = [c for c in range(3) if c not in own]
        assert x[..., own].max() > 40 and x[..., others].mean() < 5
    assert sides == {32, 48}
    for path in (small / "train").iterdir():
        assert (Image.open(path).mode, Image.open(path).size) == ("L", (32, 32))


def test_planted_twins_are_the_same_picture_and_others_are_not(small):
    pairs = pd.read_csv(small / "twins.csv")
    files = {p.name[: -len("_green.png")]: p for s in ("train", "test", "external")
             for p in (small / s).glob("*_green.*")}

    def small_picture(i):
        return np.asarray(Image.fromarray(green(files[i])).resize((16, 16), Image.Resampling.BOX)).astype(float).ravel()

    near = [np.corrcoef(small_picture(a), small_picture(b))[0, 1] for a, b in zip(pairs.Id, pairs.twin)]
    far = [np.corrcoef(small_picture(a), small_picture(b))[0, 1] for a, b in zip(pairs.Id, np.roll(pairs.twin, 1))]
    assert len(pairs) >= 10 and min(near) > .98 and max(far) < .9


# the pictures


def row(labels=(0,), picture="1_100_A1_1", **kwargs):
    return pd.Series(dict(labels=labels, antibody=1, plate=100, well="A1", picture=picture, shifted=False) | kwargs)


def test_a_picture_depends_on_its_name_and_on_what_it_shows():
    sim = AtlasSimulation()
    x = simulate_picture(sim, row())
    assert x.shape == (4, 64, 64) and x.dtype == np.uint8
    assert (x == simulate_picture(sim, row())).all()
    for other in (row((1,)), row(picture="1_100_A1_2"), row(shifted=True)):
        assert (x != simulate_picture(sim, other)).mean() > .2


def test_more_contrast_and_less_noise_do_what_they_say():
    def far_from_smooth(x): return (x - gaussian_filter(x.astype(float), 1)).std()
    quiet, loud = (simulate_picture(AtlasSimulation(noise=n), row((25,)))[0] for n in (0., 3.))
    assert far_from_smooth(loud) > 1.5 * far_from_smooth(quiet)
    dim, bright = (simulate_picture(AtlasSimulation(contrast=c), row((25,)))[1].mean() for c in (.5, 1.))
    assert 1.5 < bright / dim < 2.1


def test_the_test_set_shows_larger_cells():
    def per_cell(shifted):
        return np.mean([CellField(named_rng(0, i), 64, 10.5 * (1.15 if shifted else 1)).n for i in range(20)])
    assert per_cell(True) < .9 * per_cell(False)


def statistics(c, protein):
    "Twelve numbers about where and how finely the protein lies"
    p = np.clip(gaussian_filter(protein, .5) / max(np.percentile(protein, 99.5), .05), 0, 2)
    total = p.sum() + 1e-6
    grain = [(gaussian_filter(p, s) ** 2).sum() / (p**2).sum() for s in (1, 2, 4)]
    where = [(p * m).sum() / total for m in (c.nucleus, c.nucleoli, c.cytoplasm, np.exp(-(((c.r - 1) / .2) ** 2)),
                                             np.exp(-((c.gap / .1) ** 2)), 4 * c.body * (1 - c.body),
                                             c.dividing[c.own])]
    same = [np.corrcoef(p.ravel(), m.ravel())[0, 1] for m in (c.tubules, c.reticulum)]
    return np.array([*grain, *where, *same, np.log(total), (p > .5).mean()])


@pytest.mark.slow
def test_every_pattern_can_be_told_from_the_others():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    rows = []
    for k, pattern in enumerate(hpa_patterns):
        for i in range(10):
            c = CellField(named_rng(0, "pattern", k, i), 64, 12, dividing=.35 if k == 17 else .02)
            rows.append((k, i, statistics(c, pattern(c, antibody_stain(0, 100 * k + i, (k,))))))
    y, i, x = np.array([r[0] for r in rows]), np.array([r[1] for r in rows]), np.array([r[2] for r in rows])
    predicted = LinearDiscriminantAnalysis(shrinkage="auto", solver="lsqr").fit(x[i < 7], y[i < 7]).predict(x[i >= 7])
    recall = np.array([(predicted[y[i >= 7] == k] == k).mean() for k in range(28)])
    assert recall.mean() > .9 and recall.min() > .3  # chance is 1/28


def test_a_stain_belongs_to_its_antibody():
    assert antibody_stain(0, 7, (0, 25)) == antibody_stain(0, 7, (0, 25)) != antibody_stain(0, 8, (0, 25))
    s = antibody_stain(0, 7, (0, 2, 25))
    assert isinstance(s, Stain) and max(s.weights) == 1 and min(s.weights) >= .5


@each("bad, message", [(dict(image_size=8), "image_size is 8"), (dict(cell_radius=2.), "cell_radius is 2"),
                       (dict(size_shift=0), "size_shift is 0"), (dict(noise=-1.), "noise is -1")])
def test_settings_out_of_range(bad, message):
    with pytest.raises(ValueError, match=message):
        AtlasSimulation(**bad)
