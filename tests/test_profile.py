"Profiles: one object for embeddings and their wells, its files without loss, consensus."
import importlib.util
import warnings

import numpy as np
import pandas as pd
import pytest
from cases import each

from rcic_fastai.profile.core import Profiles, join_profiles, modz, profiles_of
from rcic_fastai.profile.files import from_anndata, read_profiles
from rcic_fastai.profile.table import typed_columns

HAS_ANNDATA = importlib.util.find_spec("anndata") is not None
KINDS = [".parquet", ".npz"] + [".h5ad"] * HAS_ANNDATA


def columns():
    "A column of every type, with and without missing values"
    ns = pd.Series(pd.to_datetime(["2026-01-01 12:00:01.5", None, "2026-03-29 03:00:00.0"]))
    text = pd.Series(["Ä $x$\n2", None, "007"], dtype="str")
    return {
        "text": ["a", "ü b", ""], "missing text": text, "all missing": pd.Series([None] * 3, dtype=object),
        "int": [1, -2, 2**62], "int8": np.array([1, 2, -3], np.int8), "uint16": np.array([1, 2, 65535], np.uint16),
        "float": [0.1, np.nan, np.inf], "float32": np.array([0.1, np.nan, -np.inf], np.float32),
        "flag": [True, False, True], "Int64": pd.array([1, None, 2**62], "Int64"),
        "no Int64": pd.array([None] * 3, "Int64"), "Int8": pd.array([1, None, -3], "Int8"),
        "boolean": pd.array([True, None, False], "boolean"), "no boolean": pd.array([None] * 3, "boolean"),
        "Float64": pd.array([0.1, None, 3], "Float64"), "date": ns, "no date": pd.Series([pd.NaT] * 3),
        "date of a place": ns.dt.tz_localize("Europe/Berlin"), "duration": pd.to_timedelta([1, None, 2], unit="h"),
        "category": pd.Categorical(["b", "a", "b"]),
        "missing category": pd.Categorical(["b", None, "a"], ["a", "b", "z"]),
        "ordered": pd.Categorical(["low", "high", None], ["low", "mid", "high"], ordered=True),
        "category of numbers": pd.Categorical([3, None, 1], [3, 1, 2]),
        "category of halves": pd.Categorical([0.5, None, 1.5]), "no category": pd.Categorical([None] * 3, ["a"]),
        "a/b": ["x", "y", "z"], "x": [1, 2, 3], "missing.a": [1, 2, 3], "profiles": [1, 2, 3],
    }


def profiles(table=None, seed=0):
    rng = np.random.default_rng(seed)
    wells = pd.DataFrame(dict(id_code=["e_1_B02", "e_1_B03", "e_2_B02"], experiment="e", plate=["P1", "P1", "01"],
                              well=["B02", "B03", "B02"], treatment=["DMSO", None, "taxol"],
                              well_type=["negative_control", "treatment", "treatment"]))
    if table is not None: wells = wells.assign(**table)
    made = dict(run="runs/ü", batchnorm="domain", steps=[dict(step="tvn", by="experiment", n=[1, 2.5])])
    return Profiles(rng.normal(size=(3, 4)), wells, made, ("f1", "f 2", "Cells_Area", "ü"),
                    dict(umap=rng.normal(size=(3, 2)), pca=rng.normal(size=(3, 3))))


def assert_same(a, b):
    assert a.x.dtype == b.x.dtype == np.float32 and np.array_equal(a.x, b.x)
    assert a.made == b.made and a.features == b.features and set(a.maps) == set(b.maps)
    for k in a.maps: np.testing.assert_array_equal(a.maps[k], b.maps[k])
    pd.testing.assert_frame_equal(a.table, b.table, check_categorical=True)


@each("kind", KINDS)
@each("name", list(columns()))
def test_every_type_of_column_comes_back(kind, name, tmp_path):
    p = profiles({name: columns()[name]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert_same(read_profiles(p.save(tmp_path / f"p{kind}")), p)


@each("kind", KINDS)
def test_all_of_them_and_none_at_all(kind, tmp_path):
    full = profiles(columns())
    assert_same(read_profiles(full.save(tmp_path / f"full{kind}")), full)
    empty = full[np.zeros(3, bool)]
    assert_same(read_profiles(empty.save(tmp_path / f"empty{kind}")), empty)
    full.save(tmp_path / f"empty{kind}")  # ours, so it is replaced
    assert len(read_profiles(tmp_path / f"empty{kind}")) == 3


def test_what_others_read(tmp_path):
    p = profiles(dict(dose=[0.0, 0.5, 10.0], toxic=[True, False, True]))
    t = pd.read_parquet(p.save(tmp_path / "p.parquet"))
    assert {"Metadata_Plate", "Metadata_Well", "Metadata_treatment", "Metadata_dose", *p.features} <= set(t)
    assert [c for c in t if not c.startswith("Metadata_")] == list(p.features)
    assert t.Metadata_toxic.dtype == bool and t.Metadata_dose.dtype == float
    arrays = np.load(p.save(tmp_path / "p.npz"), allow_pickle=False)
    assert arrays["plate"].tolist() == ["P1", "P1", "01"] and arrays["dose"].tolist() == [0, 0.5, 10]
    np.testing.assert_array_equal(arrays["x"], p.x)


@pytest.mark.skipif(not HAS_ANNDATA, reason="anndata (rcic_fastai[phenomics]) is not installed")
def test_anndata_has_types_and_takes_that_of_others(tmp_path):
    import anndata
    p = profiles({k: v for k, v in columns().items() if k != "a/b"})
    p.save(tmp_path / "p.h5ad")
    data = anndata.read_h5ad(tmp_path / "p.h5ad")
    assert data.X.dtype == np.float32 and data.obs_names.tolist() == p.table.id_code.tolist()
    assert data.obs.flag.dtype == bool and data.obs.float.dtype == float and data.obsm["X_umap"].shape == (3, 2)
    assert data[data.obs.flag & (data.obs.int > 0)].n_obs == 2
    assert_same(from_anndata(data[[2, 0]].copy()), p[[2, 0]])  # with the categories that no row has
    data.obs["leiden"] = pd.Categorical(["0", "1", "0"])
    assert from_anndata(data).table.leiden.tolist() == ["0", "1", "0"]
    text = lambda *names: pd.Index(names, dtype=object)
    other = anndata.AnnData(np.eye(3), pd.DataFrame(dict(Metadata_Plate=[1, 2, 2], gene=pd.Categorical.from_codes(
        [0, 1, 1], text("a", "b"))), text("w1", "w2", "w3")), pd.DataFrame(index=text("f1", "f2", "f3")))
    other.write_h5ad(tmp_path / "other.h5ad")
    q = read_profiles(tmp_path / "other.h5ad", negative=["a"])
    assert q.treatments.tolist() == ["a", "b", "b"] and q.table.plate.tolist() == ["1", "2", "2"]
    assert q.negative.tolist() == [True, False, False]


def test_embeddings_of_the_version_before(tmp_path):
    np.savez(tmp_path / "old.npz", x=np.eye(2, 3), id_code=["e_1_B02", "e_1_B03"], split=["test"] * 2,
             cell_type=["cells"] * 2, experiment=["e"] * 2, plate=["1", "1"], well=["B02", "B03"],
             well_type=["treatment"] * 2, sirna=[3.0, np.nan], treatment=["taxol", ""], plate_name=["P1"] * 2,
             dose=["0.5", ""])
    p = read_profiles(tmp_path / "old.npz")
    assert p.treatments.fillna("?").tolist() == ["taxol", "?"] and p.table.plate.tolist() == ["P1", "P1"]
    assert p.table.sirna.dtype == "Int64" and p.table.dose.dtype == float and p.table.dose[0] == 0.5


@each("write, message", [
    (lambda p, f: np.savez(f, id_code=[1]), "the array 'x' is missing"),
    (lambda p, f: f.write_bytes(b"no zip"), "is damaged, or no file of arrays"),
    (lambda p, f: np.savez(f, x=np.eye(2), profiles="{"), "line 1"),
    (lambda p, f: np.savez(f, x=np.eye(2), profiles="{}"), "is damaged, or no file of profiles"),
    (lambda p, f: np.savez(f, x=np.array([{}])), "is damaged, or no file of arrays"),
])
def test_damaged_files_are_named(write, message, tmp_path):
    path = tmp_path / "p.npz"
    write(None, path)
    with pytest.raises(ValueError, match=f"p.npz.*{message}"): read_profiles(path)


@each("table, message", [
    (dict(a=[[1], [2], [3]]), r"column 'a' holds \[1\], expected text, numbers"),
    (dict(a=pd.Series([1, "b", 2.5], dtype=object)), "column 'a' holds 1 and 'b'"),
])
def test_columns_that_no_file_holds(table, message):
    with pytest.raises(ValueError, match=message): profiles(table)


def test_a_feature_with_missing_values_is_named(tmp_path):
    pd.DataFrame(dict(Metadata_Well=["A01", "A02"], Cells_Area=[1, 2], Cells_Odd=[1, np.nan])).to_csv(
        tmp_path / "p.csv", index=False)
    with pytest.raises(ValueError, match="'Cells_Odd' has values that are missing"): read_profiles(tmp_path / "p.csv")


@each("values, kind, expected", [
    (["1", "2", ""], "Int64", [1, 2, None]), (["0.5", "1e-3", None], "float64", [0.5, 0.001, None]),
    (["007", "8", "9"], "str", None), (["1", "x", ""], "str", None), (["true", "FALSE", ""], "boolean", [1, 0, None]),
    (["nan", "1", "2"], "str", None), (["1e999", "1", "2"], "str", None), (["1" * 17, "1", "2"], "str", None),
    (["", "", None], "str", None), (["1_000", "2", "3"], "str", None), (["yes", "no", ""], "str", None),
])
def test_text_becomes_numbers_only_where_nothing_is_lost(values, kind, expected):
    table = pd.DataFrame(dict(a=pd.Series(values, dtype="str"), treatment=["1", "2", "3"]))
    t = typed_columns(table)
    assert str(t.a.dtype) == kind and t.treatment.tolist() == ["1", "2", "3"]
    if expected is None: pd.testing.assert_series_equal(t.a, table.a)
    else: assert [None if pd.isna(v) else v for v in t.a] == expected


def test_consensus_is_the_mean_the_median_and_modz():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(60, 30))
    table = pd.DataFrame(dict(treatment=np.repeat(list("bca"), 20), dose=np.tile([1.0, 2], 30), moa=np.repeat(
        ["k", "k", "m"], 20), well_type="treatment"))
    order = rng.permutation(60)
    p = Profiles(x[order], table.iloc[order])
    for method, f in dict(mean=np.mean, median=np.median).items():
        c = p.consensus(method=method)
        assert set(c.table) == {"treatment", "moa", "well_type", "replicates"} and c.table.replicates.eq(20).all()
        assert c.treatments.tolist() == p.treatments.drop_duplicates().tolist()
        for name, row in zip(c.treatments, c.x):
            np.testing.assert_allclose(row, f(x[table.treatment == name], 0), rtol=1e-5, atol=1e-6)
    assert len(p.consensus(["treatment", "dose"])) == 6
    known = p.table.assign(treatment=p.table.treatment.where(p.table.treatment != "a"))
    assert len(Profiles(p.x, known).consensus()) == 2


def test_modz_follows_its_formula():
    "pandas' Spearman correlations, clipped, averaged over the others, at least .01, brought to a sum of 1"
    rng = np.random.default_rng(4)
    x = rng.normal(size=(1, 50)) + rng.normal(size=(6, 50)) * [[0.2], [0.5], [1], [2], [5], [50]]
    x[5] = -x[0]
    c = pd.DataFrame(x.T).corr("spearman").to_numpy(copy=True)
    np.fill_diagonal(c, np.nan)
    w = np.clip(np.nanmean(np.clip(c, 0, None), axis=1), 0.01, None)
    w /= w.sum()
    np.testing.assert_allclose(modz(x), w @ x, rtol=1e-10)
    np.testing.assert_allclose(modz(x, precision=4), w.round(4) @ x, rtol=1e-10)
    assert w[5] < 0.02
    many = np.repeat(x[:1, :3], 3000, axis=0)
    np.testing.assert_allclose(modz(many), x[0, :3])
    assert not modz(many, precision=3).any()  # weights of 1/3000: why rounding is not the default


def test_parts_and_joins():
    p = profiles(dict(dose=[1.0, 2, 3]))
    assert_same(join_profiles([p[:1], p[1:]]), Profiles(p.x, p.table, p.made, p.features))
    assert_same(p[p.table.dose > 1], p[[1, 2]])
    assert len(p[p.table.dose.astype("Float64").mask([True, False, False]) > 1]) == 2
    with pytest.raises(ValueError, match="part 1 has other features"):
        join_profiles([p, Profiles(p.x[:, :2], p.table)])


def test_from_wells_plates_have_names_and_files_are_left_out(small_screen):
    from rcic_fastai.screen.read import read_screen
    sites = read_screen(small_screen).sites()
    p = profiles_of(np.eye(len(sites))[:, :3], sites, run="r")
    assert "files" not in p.table and p.table.plate.iloc[0] == "1" and p.treatment_column == "sirna"
    wells = p.by_well()
    assert len(wells) == sites.id_code.nunique() and wells.made["level"] == "well" and "site" not in wells.table
    np.testing.assert_allclose(wells.x[0], p.x[:2].mean(0))
