"Hashes, twins, groups and conflicting labels; against plain implementations, and on the real field and ids."

import importlib.util
import io
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cases import each
from PIL import Image

import rcic_fastai.screen.duplicates as duplicates
from rcic_fastai.screen.duplicates import area_means, external_keys, find_twins, hash_distance, image_hashes
from rcic_fastai.screen.duplicates import join_groups, label_agreement, parse_external_id, perceptual_hash
from rcic_fastai.screen.duplicates import resolve_labels, symmetry_hashes
from rcic_fastai.data.hashes import hash_sites
from rcic_fastai.screen.folds import grouped_folds, straddling_groups

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "hpa"


def blobs(seed, shape=(90, 70), dtype=np.uint8):
    "A smooth random plane"
    rng = np.random.default_rng(seed)
    rows, cols = (np.linspace(0, 1, n)[:, None] for n in shape)
    plane = sum(rng.uniform(0.2, 1) * np.exp(-((rows - r) ** 2 + (cols.T - c) ** 2) / s**2)
                for r, c, s in rng.uniform(0.05, 1, (25, 3)) * [1, 1, 0.25])
    plane = plane / plane.max()
    return plane.astype(dtype) if np.dtype(dtype).kind == "f" else np.rint(plane * np.iinfo(dtype).max).astype(dtype)


def symmetries(x):
    "The eight flips and rotations"
    return [f(np.rot90(x, k)) for k in range(4) for f in (np.asarray, np.flipud)]


def jpeg(plane, quality):
    data = io.BytesIO()
    Image.fromarray(plane).save(data, "JPEG", quality=quality)
    return np.asarray(Image.open(data))


def resized(plane, size, how=Image.BICUBIC):
    return np.asarray(Image.fromarray(plane).resize((size, size), how))


# Hashes


@each("shape", [(32, 32), (64, 96), (20, 31), (33, 45), (1, 7)])
def test_area_means_are_means_over_areas(shape):
    "Against planes whose pixels are repeated 32 times each way, so that areas hold whole pixels"
    x = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    big = x.repeat(32, 0).repeat(32, 1).reshape(32, shape[0], 32, shape[1])
    assert area_means(x) == pytest.approx(big.mean((1, 3)), abs=1e-9)


def test_bits_are_frequencies_above_their_median_row_by_row():
    "Against the sum that defines the cosine transform"
    x = blobs(3, (64, 64))
    means = x.reshape(32, 2, 32, 2).mean((1, 3))
    wave = np.cos(np.pi * np.arange(8)[:, None] * (2 * np.arange(32) + 1) / 64)
    low = (wave @ means @ wave.T).ravel()
    assert f"{int(perceptual_hash(x)):064b}" == "".join("01"[int(v > np.median(low))] for v in low)
    assert int(perceptual_hash(x, size=4)) < 2**16


def test_it_is_the_hash_of_the_field():
    imagehash = pytest.importorskip("imagehash", reason="imagehash is not installed")
    for seed in range(10):
        x = blobs(seed, (256, 256))
        theirs = int(str(imagehash.phash(Image.fromarray(x))), 16)
        assert hash_distance(perceptual_hash(x), np.uint64(theirs)) <= 4


def test_a_batch_is_hashed_like_its_planes():
    x = np.stack([[blobs(2 * i + j) for j in range(2)] for i in range(3)])
    assert np.array_equal(perceptual_hash(x), [[perceptual_hash(p) for p in planes] for planes in x])
    assert np.array_equal(perceptual_hash(x, canonical=True),
                          [[perceptual_hash(p, canonical=True) for p in planes] for planes in x])
    assert np.array_equal(symmetry_hashes(x)[..., 0], perceptual_hash(x)) and symmetry_hashes(x).shape == (3, 2, 8)
    assert np.array_equal(image_hashes(x[0]), perceptual_hash(x[0]))


@each("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_canonical_hashes_are_equal_under_every_flip_and_rotation(dtype):
    for seed in range(25):
        rng = np.random.default_rng(seed)
        x = blobs(seed, tuple(rng.integers(20, 150, 2)), dtype)
        assert len({int(perceptual_hash(v, canonical=True)) for v in symmetries(x)}) == 1
        assert {int(h) for h in symmetry_hashes(x)} == {int(perceptual_hash(v)) for v in symmetries(x)}


def test_canonical_hashes_of_symmetric_planes_where_frequencies_are_zero():
    for seed in range(10):
        x = np.random.default_rng(seed).integers(0, 256, (40, 40)).astype(np.uint16)
        for s in (x + x[::-1], x + x.T, x + x[::-1, ::-1], sum(v.astype(np.uint16) for v in symmetries(x))):
            assert len({int(perceptual_hash(v, canonical=True)) for v in symmetries(s)}) == 1


def test_canonical_hashes_seldom_change_with_jpeg_or_size():
    far = [hash_distance(perceptual_hash(f(x), canonical=True), perceptual_hash(np.rot90(x), canonical=True)) > 8
           for x in (blobs(seed, (128, 128)) for seed in range(60))
           for f in (lambda x: jpeg(x, 75), lambda x: resized(x, 64))]
    assert np.mean(far) < 0.02


def test_depth_brightness_size_and_jpeg_hardly_change_a_hash():
    for seed in range(8):
        x = blobs(seed, (256, 256))
        h = perceptual_hash(x)
        assert perceptual_hash(x.astype(np.uint16) * 257) == h and perceptual_hash(x.astype(np.float32) * 3 - 7) == h
        for v in (x // 2 + 20, resized(x, 128), resized(x, 97), jpeg(x, 75)):
            assert hash_distance(perceptual_hash(v), h) <= 4


@each("plane", [np.zeros((50, 50), np.uint8), np.full((50, 50), 65_535, np.uint16), np.full((9, 9), 0.1, np.float32),
                np.full((9, 9), -3.0)])
def test_blank_and_constant_planes_have_the_hash_0(plane):
    assert perceptual_hash(plane) == 0 and perceptual_hash(plane, canonical=True) == 0
    if plane.dtype == np.uint8:
        faint = np.zeros((128, 128), np.uint8)
        # less than a grey level in the mean of 4 x 4
        faint[:40, :40] = np.random.default_rng(0).integers(0, 2, (40, 40))
        assert perceptual_hash(faint) == 0 and perceptual_hash(faint, canonical=True) == 0
        assert perceptual_hash(faint, min_range=0.01) != 0


@each(
    "planes, message",
    [
        (np.zeros((4, 4), np.int32), "planes of type int32, expected uint8, uint16 or floats"),
        (np.zeros(4, np.uint8), r"planes have shape \(4,\), expected \(..., height, width\)"),
        (np.zeros((0, 4), np.uint8), r"planes have shape \(0, 4\)"),
        (np.array([[0.0, np.nan]]), "planes hold NaN or infinite values"),
    ],
)
def test_what_cannot_be_hashed_is_refused(planes, message):
    with pytest.raises(ValueError, match=message):
        perceptual_hash(planes)


@pytest.fixture(scope="module")
def real_planes():
    files = {c: REAL / f"30741_800_A6_1_{c}.jpg" for c in ("red", "green", "blue", "yellow")}
    if not all(f.exists() for f in files.values()):
        pytest.skip(f"no real field in {REAL}")
    band = dict(red=0, green=1, blue=2, yellow=0)  # yellow is equal parts of red and green
    return {c: np.asarray(Image.open(f).convert("RGB"))[..., band[c]] for c, f in files.items()}


@pytest.mark.slow
def test_real_field_under_resizing_jpeg_and_flips(real_planes):
    for name, x in real_planes.items():
        h, canonical = perceptual_hash(x), perceptual_hash(x, canonical=True)
        for v in (*(resized(x, n, how) for n in (1024, 512) for how in (Image.BILINEAR, Image.BICUBIC, Image.BOX)),
                  jpeg(x, 75), jpeg(x, 95)):
            assert hash_distance(perceptual_hash(v), h) <= 2, name
            assert hash_distance(perceptual_hash(v, canonical=True), canonical) <= 2, name
        assert {int(perceptual_hash(v, canonical=True)) for v in symmetries(x)} == {int(canonical)}, name
        assert hash_distance(perceptual_hash(x[:, ::-1]), h) >= 24, name


# Twins


def test_bits_are_counted_as_python_counts_them():
    x = np.r_[np.random.default_rng(0).integers(0, 2**64, 500, dtype=np.uint64), np.uint64([0, 1, 2**63, 2**64 - 1])]
    counted = [int(v).bit_count() for v in x]
    assert duplicates._popcount(x.copy()).tolist() == counted
    assert duplicates._bitwise_count(x.copy()).tolist() == counted
    assert hash_distance(x, np.uint64(0)).tolist() == counted and int(hash_distance(5, 6)) == 2


def clustered(n, n_channels, seed, blank=0.2):
    "Hashes that lie near each other in clusters, some of them 0"
    rng = np.random.default_rng(seed)
    h = rng.integers(1, 2**64, (12, n_channels), dtype=np.uint64)[rng.integers(12, size=n)]
    for _ in range(4):
        h ^= np.where(rng.random(h.shape) < 0.5, np.uint64(1) << rng.integers(0, 64, h.shape).astype(np.uint64),
                      np.uint64(0))
    h[rng.random(h.shape) < blank] = 0
    return h


def plain_twins(a, b, has_a, has_b, d, rule, min_channels, same):
    "All distances at once"
    distance = np.array([[[int(v).bit_count() for v in row] for row in x ^ b] for x in a])
    both = has_a[:, None] & has_b
    n = both.sum(2)
    total, largest = (distance * both).sum(2), (distance * both).max(2)
    near = (n >= min_channels) & ((largest <= d) if rule == "all" else (total <= d * n))
    return [(i, j, total[i, j] / n[i, j], largest[i, j], n[i, j]) for i, j in np.argwhere(near) if not same or i < j]


@pytest.mark.slow
@each("rule", ["all", "mean"])
@each("same", [True, False])
@each("d, min_channels, blank", [(1, 1, 0.2), (4, 1, 0.6), (4.5, 2, 0.2), (30, 3, 0)])
def test_twins_are_those_of_the_plain_search(rule, same, d, min_channels, blank, monkeypatch):
    monkeypatch.setattr(duplicates, "_ROWS", 16)  # many blocks, the last of them cut off
    monkeypatch.setattr(duplicates, "_COLS", 50)
    a, b = clustered(131, 3, 0, blank), clustered(70, 3, 1, blank)
    b[:30] = a[20:50]
    valid = np.random.default_rng(2).random(a.shape) < 0.9
    b = a if same else b
    has_a = (a != 0) & valid
    expected = plain_twins(a, b, has_a, has_a if same else b != 0, d, rule, min_channels, same)
    found = find_twins(a, None if same else b, d, rule, valid, min_channels=min_channels)
    assert len(expected) > 5
    assert [tuple(r) for r in found.itertuples(index=False)] == [pytest.approx(e) for e in expected]


@pytest.mark.parametrize("threads", [1, 3])
def test_planted_twins_are_found_across_blocks_and_none_invented(threads):
    rng = np.random.default_rng(0)
    h = rng.integers(1, 2**64, (6000, 3), dtype=np.uint64)
    planted = [(0, 5999), (63, 64), (2047, 2048), (2111, 4159), (1, 2)]
    for k, (i, j) in enumerate(planted):
        h[j] = h[i] ^ np.uint64(2**k - 1)
    found = find_twins(h, max_distance=3, threads=threads)
    assert list(zip(found["first"], found.second)) == sorted(planted[:4])
    assert len(find_twins(h[:0])) == 0 and find_twins(h[:0]).columns.tolist() == found.columns.tolist()


def test_blank_images_are_nobodys_twins():
    h = np.stack([image_hashes(np.zeros((3, 40, 40), np.uint8))] * 50)
    assert len(find_twins(h, max_distance=64)) == 0
    h[:2, 0] = 5
    assert find_twins(h)[["first", "second", "channels"]].values.tolist() == [[0, 1, 1]]


@each(
    "arguments, message",
    [
        (dict(hashes=np.zeros(3, np.uint64)), r"hashes are uint64 of shape \(3,\)"),
        (dict(hashes=np.zeros((3, 0), np.uint64)), r"hashes are uint64 of shape \(3, 0\)"),
        (dict(hashes=np.zeros((3, 2), np.uint64), others=np.zeros((3, 3), np.uint64)),
         "hashes of 2 channels and others of 3"),
        (dict(hashes=np.zeros((3, 2), np.uint64), valid=np.ones(3, bool)),
         r"the mask of hashes is bool of shape \(3,\), expected bool \(3, 2\)"),
        (dict(hashes=np.zeros((3, 2), np.uint64), rule="any"), "rule is 'any', expected 'all' or 'mean'"),
        (dict(hashes=np.zeros((3, 2), np.uint64), max_distance=65), "max_distance is 65, expected 0 to 64"),
        (dict(hashes=np.ones((300, 2), np.uint64), max_pairs=100), "more than 100 pairs are at most 6 bits apart"),
    ],
)
def test_searches_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        find_twins(**arguments)


def test_the_benchmark_runs_small(tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("benchmark_duplicates", ROOT / "benchmarks" / "duplicates.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        table = module.main(["--quick", "--out", str(tmp_path / "duplicates.md")])
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    assert table["found"].str.fullmatch(r"(\d+) of \1, 0 invented").all() and len(table) >= 3
    assert "| images" in (tmp_path / "duplicates.md").read_text()


# Ids and groups


@each("id", ["10580_1610_C1", "a_1610_C1_1", "10580_1610_C25_1", "10580_1610_C01_1", "10580_1610_C1_1_",
             "00070df0-bbc3-11e8-b2bc-ac1f6b6435d0", ""])
def test_other_ids_are_no_external_ids(id):
    with pytest.raises(ValueError, match="is not {antibody}_{plate}_{well}_{fov}, expected one like 10580_1610_C1_1"):
        parse_external_id(id)
    if "-" not in id:
        with pytest.raises(ValueError, match=f"row 1: id '{id}' is neither"):
            external_keys(["10580_1610_C1_1", id])


@pytest.mark.slow
def test_real_ids():
    if not REAL.exists():
        pytest.skip(f"no real tables at {REAL}")
    ids = pd.read_csv(REAL / "external.csv").Id
    keys = external_keys(ids)
    assert keys.notna().all(axis=None) and keys.antibody.nunique() == 12_815
    assert keys.antibody.groupby(keys.plate_well).nunique().max() == 1  # one antibody per well
    for row in range(0, len(ids), 997):
        assert parse_external_id(ids[row])[:4] == tuple(keys.iloc[row][["antibody", "plate", "well", "fov"]])
    train = external_keys(pd.read_csv(REAL / "train.csv").Id)
    assert train.isna().all(axis=None) and len(set(join_groups(train.antibody, train.plate_well))) == 31_072


def test_groups_are_the_connected_parts():
    "Against joining one by one"
    for seed in range(20):
        rng = np.random.default_rng(seed)
        a, b = (rng.integers(0, 60, 80).astype(object),
                np.array(list("abcdefghijklmnopqrst"), object)[rng.integers(0, 20, 80)])
        a[rng.random(80) < 0.5], b[rng.random(80) < 0.7] = None, ""
        pairs = rng.integers(0, 80, (5, 2))
        group = list(range(80))
        joined = [(i, j) for i, j in combinations(range(80), 2) if (a[i] is not None and a[i] == a[j])
                  or (b[i] != "" and b[i] == b[j])]
        for i, j in joined + pairs.tolist():
            old, new = group[i], group[j]
            group = [new if g == old else g for g in group]
        found = join_groups(a, b, pairs=pairs)
        assert found.dtype == np.int64 and np.array_equal(found, pd.factorize(np.array(group))[0])


@each("missing", [None, np.nan, pd.NA, "", pd.NaT])
def test_missing_keys_join_nothing(missing):
    assert join_groups(["a", missing, "a", missing]).tolist() == [0, 1, 0, 2]
    assert join_groups(pd.Series(["a", missing, "a", missing], dtype=object, index=[5, 5, 1, 0])).tolist() == [
        0, 1, 0, 2]


def test_keys_of_any_type():
    expected = [0, 1, 0, 2]
    for key in (np.array([3.0, np.nan, 3.0, np.nan]), pd.array([3, pd.NA, 3, pd.NA], dtype="Int64"),
                pd.Categorical(["x", None, "x", ""]), (7, 8, 7, 9)):
        assert join_groups(key).tolist() == expected
    with pytest.raises(ValueError, match="neither keys nor the number of images"):
        join_groups(pairs=[(0, 1)])


def test_twins_stay_in_one_fold():
    h = clustered(200, 3, 0, blank=0)
    twins = find_twins(h, max_distance=5)
    groups = join_groups(pairs=twins, n=200)
    folds = grouped_folds(np.random.default_rng(0).integers(0, 2, (200, 4)), groups, 3)
    assert len(twins) > 100 and (folds[twins["first"]] == folds[twins.second]).all()
    assert straddling_groups(groups, folds) == []


# Labels


def random_labels(seed, n=120):
    rng = np.random.default_rng(seed)
    labels = [None if rng.random() < 0.15 else tuple(np.flatnonzero(rng.random(5) < 0.25).tolist()) for _ in range(n)]
    return labels, rng.integers(0, 40, n), rng.choice(["train", "external", "test"], n)


def test_agreement_is_that_of_all_pairs():
    for seed in range(5):
        labels, groups, source = random_labels(seed)
        pairs = [(i, j) for i, j in combinations(range(120), 2) if groups[i] == groups[j] and labels[i] is not None
                 and labels[j] is not None]
        table = label_agreement(labels, groups, source)
        for name in table.index:
            chosen = [(i, j) for i, j in pairs if name == "all" or sorted((source[i], source[j])) == name.split(" - ")]
            assert table.loc[name, "pairs"] == len(chosen) > 0
            assert table.loc[name, "agree"] == sum(labels[i] == labels[j] for i, j in chosen)
        assert len(table) == 7 and label_agreement(labels, groups).index.tolist() == ["all"]
    assert np.isnan(label_agreement([(1,), None], [0, 0]).share["all"])


TWINS = [(1, 2), (1,), (1, 3), (5,), (6,), (0,), (0,), None, (9,)]
GROUPS = [0, 0, 0, 1, 1, 2, 2, 0, 3]


@each(
    "policy, expected",
    [
        ("keep", TWINS),
        ("union", [(1, 2, 3)] * 3 + [(5, 6)] * 2 + [(0,), (0,), None, (9,)]),
        ("intersection", [(1,)] * 3 + [(5, 6)] * 2 + [(0,), (0,), None, (9,)]),
        ("majority", [(1,)] * 3 + [(5, 6)] * 2 + [(0,), (0,), None, (9,)]),
        ("train", [(1, 2)] * 3 + [(5,), (6,), (0,), (0,), None, (9,)]),  # the second group has no image of `train`
        ("drop", [None] * 5 + [(0,), (0,), None, (9,)]),
    ],
)
def test_policies(policy, expected):
    source = ["train", "external", "external", "external", "external", "train", "external", "train", "train"]
    assert resolve_labels(TWINS, GROUPS, policy, source) == expected
    assert TWINS[0] == (1, 2)  # what was given stays


def test_majorities_of_three_and_several_images_of_train():
    assert resolve_labels([(1, 2), (2, 3), (2, 4, 3)], [0] * 3, "majority") == [(2, 3)] * 3
    assert resolve_labels([(1,), (2,), (7,)], [0] * 3, "train", ["train", "train", "external"]) == [(1, 2)] * 3
    assert resolve_labels([(2, 1), (1, 2)], [0, 0], "drop") == [(1, 2)] * 2  # the order is no conflict


@each(
    "arguments, message",
    [
        (([(1,)], [0], "best"), "policy is 'best', expected one of 'keep'"),
        (([(1,)], [0], "train"), "policy 'train' needs the source"),
        (([(1,), [2]], [0, 0], "union"), r"row 1: labels \[2\], expected a tuple"),
        (([(1,), (2,)], [0], "union"), r"groups of shape \(1,\) for 2 images"),
        (([(1,), (2,)], [0, 0], "train", ["train"]), r"sources of shape \(1,\) for 2 images"),
    ],
)
def test_labels_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve_labels(*arguments)


# Tables of images


@pytest.fixture
def table(tmp_path):
    "Twelve images without files, and the function that reads them"
    sites = pd.DataFrame(dict(site_id=[f"s{i}" for i in range(12)], files=[f"image {i}" for i in range(12)]))
    seen = []

    def read(files, channels):
        i = int(files.split()[1])
        seen.append(i)
        if i in read.broken:
            raise read.broken[i]
        return np.stack([blobs(10 * i + c) for c in range(len(channels))])

    read.broken, read.seen = {}, seen
    return sites, read, tmp_path / "deep" / "hashes.parquet"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("image 7 is damaged")])
def test_hashing_goes_on_where_it_stopped(table, error):
    sites, read, cache = table
    options = dict(channels=("a", "b"), cache=cache, read=read, save_every=4, progress=False)
    expected = hash_sites(sites, ("a", "b"), read=read, progress=False)
    read.seen.clear()
    read.broken[7] = error
    with pytest.raises(type(error)):
        hash_sites(sites, threads=1, **options)
    kept = pd.read_parquet(cache)
    assert kept.index.tolist() == [f"s{i}" for i in range(7)] and not list(cache.parent.glob("*.tmp"))
    read.seen.clear()
    read.broken.clear()
    assert np.array_equal(hash_sites(sites, threads=2, **options), expected) and sorted(read.seen) == [7, 8, 9, 10, 11]
    read.seen.clear()
    shuffled = sites.iloc[[5, 2, 9]]
    assert np.array_equal(hash_sites(shuffled, **options), expected[[5, 2, 9]]) and not read.seen
    assert len(pd.read_parquet(cache)) == 12  # the others are still there


def test_one_file_serves_several_tables(table):
    sites, read, cache = table
    for part in (sites[:5], sites[5:]):
        hash_sites(part, ("a", "b"), cache, read=read, progress=False)
    assert sorted(pd.read_parquet(cache).index) == sorted(sites.site_id) and sorted(read.seen) == list(range(12))


def test_tables_and_files_that_do_not_fit_are_refused(table):
    sites, read, cache = table
    run = lambda t=sites, channels=("a", "b"), **kwargs: hash_sites(t, channels, cache, read=read, progress=False,
                                                                    **kwargs)
    with pytest.raises(ValueError, match="the table has no column 'Id': it has 'site_id', 'files'"):
        run(id="Id")
    with pytest.raises(ValueError, match="site_id 's0' occurs more than once"):
        run(pd.concat([sites, sites[:1]]))
    with pytest.raises(ValueError, match="image 0: 2 channels, expected 3"):
        hash_sites(sites, ("a", "b", "c"), read=lambda f, c: read(f, "ab"), progress=False, threads=1)
    run()
    with pytest.raises(ValueError,
                       match="was made with .*'size': 8.*, expected .*'size': 6.*: give another file, or delete it"):
        run(size=6)
    cache.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="hashes.parquet is no file of hashes"):
        run()
