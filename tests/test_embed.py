"""Corrections of embeddings against closed forms, metrics against enumeration and `copairs`, and that nothing leaks
from the rows that are scored."""
import itertools
import math
import sys
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from cases import each
from scipy.linalg import fractional_matrix_power
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from rcic_fastai.profile.correct import TVN, ClassCentres, Sphering, center_by, embedding_correction
from rcic_fastai.profile.correct import postprocess_embeddings, postprocess_names, shrink_by, well_means
from rcic_fastai.profile.metrics import batch_probe, embedding_report, knn_recall, plot_embedding, project_2d
from rcic_fastai.profile.metrics import replicate_map, to_anndata


def screen(n_sirnas=6, n_experiments=4, n_features=8, sites=1, seed=0, signal=2.0, batch=3.0):
    """Embeddings of every siRNA once in each experiment of two cell types, and two controls per plate; siRNAs as the
    nullable integers of `wells`."""
    rng = np.random.default_rng(seed)
    effect, rows, x = signal * rng.normal(size=(n_sirnas + 2, n_features)), [], []
    for cell, e in itertools.product(("HUVEC", "RPE"), range(1, n_experiments + 1)):
        for plate in (1, 2):
            offset = batch * rng.normal(size=n_features)
            for i, s in enumerate([*range(plate - 1, n_sirnas, 2), n_sirnas, n_sirnas + 1]):
                for _ in range(sites):
                    x.append(effect[s] + offset + rng.normal(size=n_features))
                    kind = "treatment" if s < n_sirnas else "positive_control"
                    rows.append((f"{cell}-{e:02}_{plate}_B{i + 2:02}", cell, f"{cell}-{e:02}", plate, kind, s))
    table = pd.DataFrame(rows, columns=["id_code", "cell_type", "experiment", "plate", "well_type", "sirna"])
    return np.array(x), table.astype({"sirna": "Int64"})


# Centring and means


def test_center_by_takes_out_the_mean_of_the_group_and_nothing_else():
    x, groups = np.array([[1.0, 2], [10, 0], [3, 6], [30, 8]]), ["a", "b", "a", "b"]
    assert center_by(x, groups).tolist() == [[-1, -2], [-10, -4], [1, 2], [10, 4]]
    assert center_by(x.astype(np.float32), groups).dtype == np.float32


def test_well_means_keep_the_order_of_first_appearance():
    means, ids = well_means([[1.0, 0], [5, 5], [3, 2]], pd.Series(["w2", "w1", "w2"], index=[9, 4, 7]))
    assert ids.tolist() == ["w2", "w1"] and means.tolist() == [[2, 1], [5, 5]]


# Sphering


@pytest.mark.parametrize("n", [200, 5], ids=["more controls than features", "fewer"])
def test_sphering_is_the_regularised_inverse_root_of_the_covariance(n):
    rng = np.random.default_rng(1)
    controls, x = rng.normal(size=(n, 8)) @ rng.normal(size=(8, 8)) + 3, rng.normal(size=(4, 8))
    cov = np.cov(controls.T)
    expected = (x - controls.mean(0)) @ fractional_matrix_power(cov + 0.01 * np.trace(cov) / 8 * np.eye(8), -0.5)
    np.testing.assert_allclose(Sphering().fit(controls).transform(x), expected, rtol=1e-6)
    # scale does not matter
    np.testing.assert_allclose(Sphering().fit(100 * controls).transform(100 * x), expected, rtol=1e-6)


def test_sphering_makes_the_controls_white():
    controls = np.random.default_rng(2).normal(size=(300, 4)) * [1, 10, 0.1, 5]
    np.testing.assert_allclose(np.cov(Sphering(1e-9).fit_transform(controls).T), np.eye(4), atol=1e-5)


# TVN


def test_tvn_follows_its_four_steps():
    rng = np.random.default_rng(3)
    batch = np.repeat(["A", "B", "C"], 40)
    controls = rng.normal(size=(120, 5)) @ rng.normal(size=(5, 5)) + np.repeat(rng.normal(size=(3, 5)), 40, axis=0)
    x, of = rng.normal(size=(6, 5)), np.array(list("AABBCC"))
    scale = StandardScaler().fit(controls)
    pca = PCA().fit(scale.transform(controls))
    scale2 = StandardScaler().fit(pca.transform(scale.transform(controls)))
    # n-1, not n, as in a covariance
    steps = lambda x: scale2.transform(pca.transform(scale.transform(x))) * (119 / 120) ** 0.5
    expected = np.empty_like(x)
    for b in "ABC":
        y = steps(controls[batch == b])
        expected[of == b] = (steps(x[of == b]) - y.mean(0)) @ fractional_matrix_power(np.cov(y.T) + 0.5 * np.eye(5),
                                                                                      -0.5)
    got = TVN().fit(controls, batch).transform(x, of)
    np.testing.assert_allclose(got @ got.T, expected @ expected.T, rtol=1e-6)  # principal components have no sign


def test_tvn_undoes_any_affine_change_of_a_batch():
    """Closed form: without regularisation the controls of every batch become white, so a stretched and shifted batch
    equals the original up to a rotation."""
    rng = np.random.default_rng(4)
    controls, x = rng.normal(size=(50, 4)), rng.normal(size=(7, 4))
    change, shift = rng.normal(size=(4, 4)) + 3 * np.eye(4), rng.normal(size=4)
    both, batch = np.r_[controls, controls @ change + shift], np.repeat(["A", "B"], 50)
    tvn = TVN(regularization=1e-9).fit(both, batch)
    y = tvn.transform(both, batch)
    for b in "AB":
        np.testing.assert_allclose(np.cov(y[batch == b].T), np.eye(4), atol=1e-6)
        np.testing.assert_allclose(y[batch == b].mean(0), 0, atol=1e-9)
    one, two = tvn.transform(x, ["A"] * 7), tvn.transform(x @ change + shift, ["B"] * 7)
    np.testing.assert_allclose(one @ one.T, two @ two.T, atol=1e-5)


def test_tvn_with_fewer_controls_than_features_stays_finite():
    rng = np.random.default_rng(5)
    controls = rng.normal(size=(6, 20))
    controls[:, 3] = 7  # a dead feature
    y = TVN().fit(controls, list("AAABBB")).transform(rng.normal(size=(9, 20)), list("ABABABABA"))
    assert y.shape == (9, 5) and np.abs(y).max() < 100
    assert TVN(n_components=2).fit(controls, list("AAABBB")).transform(controls, list("AAABBB")).shape == (6, 2)


def test_tvn_batch_without_controls_is_aligned_by_all_until_its_controls_come():
    rng = np.random.default_rng(6)
    controls, x = rng.normal(size=(21, 3)), rng.normal(size=(2, 3))
    tvn = TVN().fit(controls, ["A"] * 20 + ["B"])
    with pytest.warns(UserWarning,
                      match="1 of 2 batches have fewer than 2 controls and are aligned by all controls: B"):
        y = tvn.transform(x, ["A", "B"])
    with pytest.warns(UserWarning, match="aligned by all"):
        np.testing.assert_allclose(tvn.transform(x, ["C", "C"])[1], y[1])
    tvn.fit_batches(rng.normal(size=(9, 3)) + 2, ["B"] * 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.abs(tvn.transform(x, ["A", "B"])[1] - y[1]).max() > 0.1


# Centres


def test_centres_by_hand():
    x = [[2, 0], [4, 0], [0, 3], [0, 1], [1, 1]]
    centres = ClassCentres().fit(x, [5, 5, 9, 9, 5], ["RPE", "RPE", "RPE", "HUVEC", "HUVEC"])
    assert centres.classes_.tolist() == [5, 9]
    r = 0.5**0.5
    np.testing.assert_allclose(centres.decision_function([[7, 0], [7, 0]], ["RPE", "HUVEC"]), [[1, 0], [r, 0]])
    # unseen: mean over all rows
    np.testing.assert_allclose(centres.decision_function([[1, 0]], ["U2OS"]), [[7 / 50**0.5, 0]])
    lacking = ClassCentres().fit(x[:3], ["a", "a", "b"], ["RPE", "RPE", "HUVEC"])
    np.testing.assert_allclose(lacking.decision_function([[0, 9], [0, 0]], ["RPE", "RPE"]), [[0, 1], [0, 0]])


def fitted_tvn():
    return TVN().fit(np.random.default_rng(0).normal(size=(4, 2)), list("AABB"))


@each(
    "call, message",
    [
        (lambda: center_by([[1, 2], [3, np.nan]], ["a", "a"]), "x: row 1 holds nan or inf"),
        (lambda: center_by([1, 2], ["a", "a"]), "shape \\(2,\\), expected \\(rows, features\\)"),
        (lambda: center_by([[1], [2]], ["a", None]), "groups: row 1 is missing"),
        (lambda: well_means([[1], [2]], ["a"]), "ids has 1 entry for 2 rows"),
        (lambda: Sphering().fit([[1, 2]]), "at least 2"),
        (lambda: Sphering(0).fit([[1, 2], [2, 1]]), "regularization is 0"),
        (lambda: Sphering().fit(np.eye(3)).transform(np.eye(2)), "2 features, expected 3"),
        (lambda: fitted_tvn().transform(np.eye(2), ["A"]), "batch has 1 entry for 2 rows"),
        (lambda: ClassCentres().fit(np.eye(2), [1]), "y has 1 entry for 2 rows"),
        (lambda: ClassCentres().fit(np.eye(2), pd.array([1, pd.NA], dtype="Int64")), "y: row 1 is missing"),
        (lambda: ClassCentres().fit(np.eye(2), [1, 2]).decision_function(np.eye(2), ["a"]), "strata has 1 entry"),
        (lambda: Sphering().transform(np.eye(2)), "not fitted"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# By name


@pytest.fixture(scope="module")
def tables():
    x, sites = screen()
    control, test = sites.well_type.ne("treatment").to_numpy(), sites.experiment.str.endswith("04").to_numpy()
    return {"train": (x[~control & ~test], sites[~control & ~test]),
            "test": (x[~control & test], sites[~control & test]), "controls": (x[control], sites[control])}


def score(name, tables, rows=slice(None)):
    x, sites = tables["test"]
    sites = sites.drop(columns=["sirna", "well_type"])  # labels of the test table are not needed
    return postprocess_embeddings(name, x[rows], sites.iloc[rows], *tables["train"], *tables["controls"])


@each("name", postprocess_names)
def test_postprocess_by_name(name, tables):
    scores, classes = score(name, tables)
    x, sites = tables["test"]
    assert classes.tolist() == [0, 1, 2, 3, 4, 5] and scores.shape == (len(x), 6) and np.abs(scores).max() <= 1 + 1e-9
    accuracy = (classes[scores.argmax(1)] == sites.sirna.to_numpy(int)).mean()
    assert accuracy > (0.2 if name == "centers" else 0.4)
    order = np.random.default_rng(0).permutation(len(x))
    np.testing.assert_allclose(score(name, tables, order)[0], scores[order], atol=1e-9)


@each("name", [n for n in postprocess_names if n != "shrink_plate"])
def test_rows_see_only_what_they_may(name, tables):
    "Without centring a row is scored on its own; with it, by the rows of its plate or experiment only."
    sites = tables["test"][1]
    rows = {"center_plate": sites.experiment.eq("RPE-04") & sites.plate.eq(2),
            "center_experiment": sites.experiment.eq("RPE-04")}.get(name)
    rows = np.arange(3) if rows is None else np.flatnonzero(rows)
    np.testing.assert_allclose(score(name, tables, rows)[0], score(name, tables)[0][rows], atol=1e-9)


def test_shrinking_sees_other_experiments_by_their_spread_only(tables):
    "How far plates differ is pooled over all experiments; where these lie is not looked at"
    x, sites = tables["test"]
    own = sites.experiment.eq("RPE-04").to_numpy()
    moved = {**tables, "test": (x + 3 * ~own[:, None], sites)}
    np.testing.assert_allclose(score("shrink_plate", moved)[0][own], score("shrink_plate", tables)[0][own], atol=1e-6)


@each(
    "call, message",
    [
        (lambda: embedding_correction("center_plates"), "did you mean 'center_plate'"),
        (lambda: embedding_correction("zzz"), "expected one of centers, center_plate"),
        (lambda: embedding_correction("sphering"), "fitted on controls"),
        (lambda: embedding_correction("tvn", np.eye(3)), "needs control_sites"),
        (lambda: embedding_correction("center_plate")(np.eye(2), pd.DataFrame({"plate": [1, 2]})),
         "no column 'experiment'"),
    ],
)
def test_postprocess_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Metrics


def test_map_and_recall_of_six_wells_by_hand():
    "Angles: a is found first; b third of three; c second. Wells of the own experiment never count."
    angle = np.deg2rad([0, 40, 90, 5, 85, 60])
    x, sites = np.c_[np.cos(angle), np.sin(angle)], pd.DataFrame(
        {"experiment": list("AAABBB"), "sirna": list("abcabc")})
    mean, table = replicate_map(x, sites)
    assert table.mAP.to_dict() == pytest.approx({"a": 1, "b": (1 / 3 + 1 / 2) / 2, "c": 1 / 2})
    assert mean == pytest.approx((1 + 5 / 12 + 1 / 2) / 3) and table.wells.tolist() == [2, 2, 2]
    assert knn_recall(x, sites, (1, 2, 3)).recall.tolist() == pytest.approx([2 / 6, 5 / 6, 1])


def brute_force_ap(x, sites):
    "Average precision of every well, by sorting in plain Python."
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    sirna, experiment, out = sites.sirna.tolist(), sites.experiment.tolist(), []
    for i in range(len(x)):
        others = sorted((j for j in range(len(x)) if experiment[j] != experiment[i]), key=lambda j: -x[i] @ x[j])
        hits = [r for r, j in enumerate(others, 1) if sirna[j] == sirna[i]]
        out.append(np.mean([n / r for n, r in enumerate(hits, 1)]) if hits else np.nan)
    return pd.Series(out).groupby(sites.sirna.astype(int)).mean()


def test_map_equals_brute_force_and_leaves_out_wells_without_replicate():
    x, sites = screen(seed=7, sites=2)
    sites.loc[3, "sirna"] = 99
    table = replicate_map(x, sites).table
    expected = brute_force_ap(x, sites)
    assert np.isnan(expected[99]) and 99 not in table.index
    np.testing.assert_allclose(table.mAP, expected.drop(99), rtol=1e-9)


def test_map_equals_copairs():
    copairs = pytest.importorskip("copairs.map", reason="copairs (rcic_fastai[phenomics]) is not installed")
    x, sites = screen(seed=8)
    meta = sites.astype({"sirna": int})[["sirna", "experiment"]]
    ap = copairs.average_precision(meta, x.astype(np.float32), ["sirna"], ["experiment"], [], ["sirna", "experiment"],
                                   progress_bar=False)
    np.testing.assert_allclose(replicate_map(x, sites).table.mAP, ap.groupby("sirna").average_precision.mean(),
                               rtol=1e-4)


def test_collapsed_embeddings_score_as_chance_and_chance_is_exact():
    "All equal: no order is better than another. Chance is the mean over all orders, here enumerated: 2 hits among 5."
    sites = pd.DataFrame({"experiment": list("ABCDEF"), "sirna": [0, 0, 0, 1, 2, 3]})
    # one direction, up to the last bit
    x = np.outer([1, 3, 0.7, 11, 0.3, 1.9], np.random.default_rng(11).normal(size=30))
    mean, table = replicate_map(x, sites)
    assert mean == pytest.approx(2 / 5)
    ranks = list(itertools.combinations(range(1, 6), 2))
    assert table.chance[0] == pytest.approx(np.mean([(1 / a + 2 / b) / 2 for a, b in ranks]))
    recall = knn_recall(x, sites, (1, 3, 4))
    assert recall.chance.tolist() == pytest.approx([1 - math.comb(3, k) / math.comb(5, k) for k in (1, 3, 4)])
    assert recall.recall.tolist() == [0, 0, 1]


def test_no_replicates_is_an_error():
    with pytest.raises(ValueError, match="no treatment occurs in two experiments"):
        replicate_map(np.eye(3), pd.DataFrame({"experiment": list("AAB"), "sirna": [0, 0, 1]}))
    with pytest.raises(ValueError, match="sirna: row 2 is missing"):
        replicate_map(np.eye(3),
                      pd.DataFrame({"experiment": list("ABB"), "sirna": pd.array([0, 0, pd.NA], dtype="Int64")}))


def test_probe_does_not_recognise_wells():
    "Labels that are noise: two nearly equal sites of a well in different folds would give them away."
    rng = np.random.default_rng(9)
    wells, labels = np.repeat(np.arange(150), 2), np.repeat(rng.integers(0, 3, 150), 2)
    x = np.repeat(rng.normal(size=(150, 60)), 2, axis=0) + 0.01 * rng.normal(size=(300, 60))
    honest, leaky = batch_probe(x, labels, groups=wells), batch_probe(x, labels)
    assert honest.accuracy < 0.45 and leaky.accuracy > honest.accuracy + 0.15 and 0.33 < honest.chance < 0.45


def test_probe_finds_labels_in_a_row_and_more_features_than_rows():
    rng = np.random.default_rng(10)
    labels = np.repeat([f"HUVEC-{e:02}" for e in range(6)], 15)
    x = rng.normal(size=(90, 200))
    x[:, 0] = np.repeat(np.arange(6), 15) + 0.05 * rng.normal(size=90)
    assert batch_probe(x[:, :3], labels).accuracy > 0.95
    x[:, :100] += 3 * x[:, :1]
    probe = batch_probe(x, labels)
    assert probe.accuracy > 0.6 and probe.chance == pytest.approx(1 / 6) and probe == batch_probe(x, labels)


@each(
    "labels, groups, message",
    [(list("aaaa"), None, "nothing to tell"), (list("aaab"), None, "label b has 1 row"),
     (list("aabb"), [0, 0, 1, 1], "label a has 1 row"), (list("aabb"), [0, 1, 1, 2], "group 1 has rows of two labels")],
)
def test_probe_errors(labels, groups, message):
    with pytest.raises(ValueError, match=message):
        batch_probe(np.eye(4), labels, groups=groups)


def test_report_and_what_it_cannot_answer():
    x, sites = screen(sites=2)
    report = embedding_report(x, sites)
    metrics = ["replicate mAP", "recall at 1", "recall at 5", "recall at 10", "probe plate", "probe experiment",
               "probe cell_type"]
    assert report.index.tolist() == metrics and report.notna().all(axis=None) and (report.value.between(0, 1)).all()
    assert report.value["replicate mAP"] == replicate_map(x, sites).mean
    assert report.value["probe plate"] == batch_probe(x, sites.experiment + "/" + sites.plate.astype(str),
                                                      groups=sites.id_code).accuracy
    rows = sites.experiment.eq("RPE-01").to_numpy()
    one = embedding_report(x[rows], sites[rows])
    assert one.index[one.value.notna()].tolist() == ["probe plate"]
    with pytest.raises(ValueError, match="nan"):
        embedding_report(np.full_like(x, np.nan), sites)


# Handing on


def test_to_anndata(tmp_path):
    anndata = pytest.importorskip("anndata", reason="anndata (rcic_fastai[phenomics]) is not installed")
    x, sites = screen(sites=2)
    sites.loc[0, "sirna"] = pd.NA
    data = to_anndata(x, sites.iloc[::-1], run="runs/demo")
    assert data.X.dtype == np.float32 and data.obs_names.is_unique and data.uns["run"] == "runs/demo"
    assert data.obs_names[-1] == "HUVEC-01_1_B02_2" and pd.isna(data.obs.sirna.iloc[-1])
    assert data.obs.plate.iloc[0] == 2 and data[data.obs.sirna == 3].n_obs == 16
    data.write_h5ad(tmp_path / "e.h5ad")
    assert anndata.read_h5ad(tmp_path / "e.h5ad").obs.experiment.iloc[0] == "RPE-04"


@pytest.mark.parametrize(
    "module, call, message",
    [("anndata", lambda x, s: to_anndata(x, s), r"rcic_fastai\[phenomics\]"),
     ("umap", lambda x, s: project_2d(x, "umap"), "umap-learn")],
)
def test_missing_extras_say_what_to_install(module, call, message, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        call(*screen())


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_project_and_plot(method):
    x, sites = screen(n_experiments=2)
    xy = project_2d(x, method, seed=1)
    assert xy.shape == (len(x), 2) and np.array_equal(xy, project_2d(x, method, seed=1))
    ax = plot_embedding(xy, sites.cell_type, title="cells")
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["HUVEC", "RPE"] and ax.get_title() == "cells"
    ax = plot_embedding(xy, sites.sirna, max_legend=3)
    assert ax.get_legend() is None and ax.texts[0].get_text() == "8 labels"
    with pytest.raises(ValueError, match="unknown method 'pac'"):
        project_2d(x, "pac")
    plt.close("all")


@each("n_wells, plate, share", [(12, 0., (-1e-9, .25)), (12, .5, (.6, .95)), (277, .5, (.97, 1.0001)),
                                (12, 5., (.98, 1.0001))])
def test_plates_are_centred_as_far_as_they_differ(n_wells, plate, share):
    rng = np.random.default_rng(1)
    plates = np.repeat(np.arange(8), n_wells)
    own = plate * rng.standard_normal((8, 30))
    x = own[plates] + rng.standard_normal((len(plates), 30))
    sites, wells = np.repeat(x, 2, axis=0), np.repeat(np.arange(len(x)), 2)  # two sites count as one well
    days = plates.repeat(2) // 4
    y = shrink_by(sites, plates.repeat(2), days, wells)
    np.testing.assert_allclose(y[::2], shrink_by(x, plates, plates // 4, np.arange(len(x))))
    means = lambda v: pd.DataFrame(center_by(v, days)).groupby(plates.repeat(2)).mean().to_numpy()
    taken = 1 - np.linalg.norm(means(y)) / np.linalg.norm(means(sites))
    assert share[0] <= taken <= share[1], taken
    np.testing.assert_allclose(shrink_by(x, plates, plates, np.arange(len(x))), center_by(x, plates), atol=1e-12)
