"Predictions under named BatchNorm statistics, views, wells and files."

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from cases import each
import torch

from rcic_fastai.predict import sites as predict
from rcic_fastai.data.select import select_sites
from rcic_fastai.profile.correct import postprocess_embeddings, postprocess_names
from rcic_fastai.data.context import plain
from rcic_fastai.predict.core import Predictions, well_accuracy
from rcic_fastai.predict.sites import embed_sites, predict_sites
from rcic_fastai.run.predict import predict_run
from rcic_fastai.screen.read import read_screen
from rcic_fastai.run.folder import load_run
from rcic_fastai.predict.tta import TTA, combine_views, tta_presets


@pytest.fixture(scope="module")
def screen(small_screen):
    return read_screen(small_screen)


@pytest.fixture(scope="module")
def sites(screen):
    return select_sites(screen, "test")


@pytest.fixture(scope="module")
def learn(small_run, sites):
    "The trained network in float32: what is compared here are numbers"
    learn = load_run(small_run, sites)
    learn.auto_mixed_precision.precision = "fp32"
    return learn


def two_experiments(screen):
    return pd.concat([select_sites(screen, "test"), select_sites(screen, "train").query("experiment=='HUVEC-01'")],
                     ignore_index=True)


def test_running_is_ordinary_eval(learn, sites):
    p = predict_sites(learn, sites, "running", progress=False)
    model, out = learn.model.eval(), []
    with torch.no_grad():
        for x, context in learn.dls.test_dl(sites, domain=None):
            out.append(model(x, context) * learn.loss_func.s)
    np.testing.assert_allclose(p.logits, torch.cat(out).numpy(), atol=2e-3)


@pytest.mark.parametrize("mode", ["running", "batch", "domain"])
def test_only_the_network_runs_in_inference_mode(learn, sites, mode, monkeypatch):
    "What loaders and transforms keep stays usable in training; gradients flow afterwards."
    inside, outside, forward, prepare = [], [], type(learn.model).forward, predict._prepare

    def spied(self, x, context=None):
        inside.append((torch.is_inference_mode_enabled(), type(x), type(context)))
        return forward(self, x, context)

    def prepared(learn):
        f = prepare(learn)
        return lambda *a: (outside.append(torch.is_inference_mode_enabled()), f(*a))[1]

    monkeypatch.setattr(type(learn.model), "forward", spied)
    monkeypatch.setattr(predict, "_prepare", prepared)
    predict_sites(learn, sites.head(6), mode, bs=4, progress=False)
    assert {i[0] for i in inside} == {True} and {i[1:] for i in inside} == {(torch.Tensor, torch.Tensor)}
    assert set(outside) == {False}
    x, context = learn.dls.test_dl(sites.head(4)).one_batch()
    learn.model(x, context).sum().backward()
    assert torch.is_grad_enabled() and all(p.grad is not None for p in learn.model.parameters())
    learn.model.zero_grad()


def test_domain_is_one_large_training_batch_per_experiment(screen, learn):
    """Pooling exactly means: the same as one train-mode forward over all sites of the experiment, and nothing from
    the other experiment."""
    sites = two_experiments(screen)
    p = predict_sites(learn, sites, "domain", bs=7, progress=False)
    for experiment, rows in sites.groupby("experiment").groups.items():
        x, context = next(iter(learn.dls.test_dl(sites.loc[rows].reset_index(drop=True), domain=None, bs=len(rows))))
        state = {k: v.clone() for k, v in learn.model.state_dict().items()}
        learn.model.train()
        with torch.no_grad():
            expected = learn.model(plain(x), context) * learn.loss_func.s
        learn.model.load_state_dict(state)
        np.testing.assert_allclose(p.logits[rows], expected.numpy(), atol=5e-3)


def test_controls_shape_the_statistics_of_their_own_experiment(screen, learn):
    sites = two_experiments(screen)
    controls = pd.concat([select_sites(screen, s, "controls") for s in ("test", "train")], ignore_index=True)
    both = predict_sites(learn, sites, "controls", controls=controls, progress=False)
    one = sites[sites.experiment == "HUVEC-01"]
    alone = predict_sites(learn, one, "controls", controls=controls[controls.experiment == "HUVEC-01"], progress=False)
    np.testing.assert_allclose(both.logits[one.index], alone.logits, atol=1e-4)
    with pytest.raises(ValueError, match="there are no control sites of HUVEC-01"):
        predict_sites(learn, one, "controls", controls=controls[controls.experiment != "HUVEC-01"], progress=False)


def test_a_plate_as_the_domain(screen, learn):
    sites = select_sites(screen, "test")
    p = predict_sites(learn, sites, "domain", domain="plate", progress=False)
    own = sites[sites.plate == 2]
    np.testing.assert_allclose(p.logits[own.index], predict_sites(learn, own, "domain", progress=False).logits,
                               atol=1e-3)


def test_pool_sites_bounds_the_pool_and_predicts_all(learn, sites):
    p = predict_sites(learn, sites, "domain", pool_sites=10, progress=False)
    assert len(p.ids) == len(sites) and np.isfinite(p.logits).all()
    whole = predict_sites(learn, sites, "domain", progress=False)
    assert 0 < np.abs(p.logits - whole.logits).mean() < 2
    np.testing.assert_allclose(predict_sites(learn, sites, "domain", pool_sites=10**6, progress=False).logits,
                               whole.logits, atol=1e-4)


def test_prediction_leaves_the_model_as_it_was(learn, sites):
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    for mode in ("running", "batch", "domain"):
        predict_sites(learn, sites.head(8), mode, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


def test_views_are_averaged(learn, sites, monkeypatch):
    "Two views are the mean of both, and a network that ignores orientation gives the same for one and eight."
    eight = predict_sites(learn, sites.head(8), "running", tta=8, progress=False)
    assert np.abs(eight.logits - predict_sites(learn, sites.head(8), "running", progress=False).logits).max() > 1e-3

    class Mean(torch.nn.Module):
        def forward(self, x, context):
            return x.mean((2, 3))[:, :1].expand(-1, 8)

    monkeypatch.setattr(learn, "model", Mean())
    a, b = (predict_sites(learn, sites.head(8), "running", tta=n, progress=False).logits for n in (1, 8))
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_windows_of_large_images(screen, tmp_path):
    "A network of 32-pixel windows predicts 48-pixel images, by number and by group."
    from rcic_fastai.recipe.published import change_recipe, get_recipe
    from rcic_fastai.run.train import train_run

    recipe = change_recipe(get_recipe("laptop"), "train.epochs=1", "data.crop=32", "model.arch=resnet10t",
                           "inference.tta=4",
                           'model.arch_options={"channels": [8, 8, 16, 16], "stem_width": 8}')
    train_run(screen, recipe, tmp_path / "run", say=lambda *a: None)
    p = predict_run(tmp_path / "run", screen, "test", progress=False)
    assert p.made["tta"] == 4 and np.isfinite(p.logits).all()
    windows = predict_run(tmp_path / "run", screen, "test", tta=TTA(d4=1, crops=4), keep_views=True, progress=False)
    assert windows.made["tta"] == dict(d4=1, crops=4) and len({v.tobytes() for v in windows.views}) == 4


@pytest.mark.parametrize("kwargs, message",
                         [(dict(batchnorm="adaptive"), "batchnorm is 'adaptive'"), (dict(tta=0), "tta is 0"),
                          (dict(domain="well"), "domain is 'well'")])
def test_bad_settings(learn, sites, kwargs, message):
    with pytest.raises(ValueError, match=message):
        predict_sites(learn, sites, progress=False, **kwargs)


def test_nothing_to_predict(learn, sites):
    with pytest.raises(ValueError, match="no sites to predict"):
        predict_sites(learn, sites.head(0), progress=False)


def test_a_missing_file_is_named(learn, sites):
    gone = sites.head(2).assign(files=lambda t: t.files.astype(str).str.replace("_s[12]_", "_s9_", regex=True))
    with pytest.raises(FileNotFoundError, match="_s9_w1.png does not exist"):
        predict_sites(learn, gone, "running", progress=False)


def test_wells_are_means_of_their_sites():
    rng = np.random.default_rng(0)
    ids = [f"HUVEC-01_1_{w}_{s}" for w in ("D05", "B03", "C04") for s in (1, 2)] + ["HUVEC-01_2_B03_1"]
    p = Predictions(ids, range(5), rng.standard_normal((7, 5)), dict(level="site"))
    w = p.wells()
    assert list(w.ids) == ["HUVEC-01_1_D05", "HUVEC-01_1_B03", "HUVEC-01_1_C04", "HUVEC-01_2_B03"]
    np.testing.assert_allclose(w.logits[:3], p.logits[:6].reshape(3, 2, 5).mean(1), rtol=1e-6)
    assert w.wells() is w


def test_files_hold_no_pickle(tmp_path):
    p = Predictions(["a_1", "b_1"], ["HUVEC", "RPE"], [[0, 1], [2, 3]], dict(tta=8))
    again = Predictions.load(p.save(tmp_path / "deep" / "p.npz"))
    assert list(again.classes) == ["HUVEC", "RPE"] and again.made == dict(tta=8) and again.logits.dtype == np.float32
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["p.npz"]  # no temporary file stays
    (tmp_path / "bad.npz").write_bytes(b"no")
    with pytest.raises(ValueError, match="bad.npz is damaged, or no file of arrays"):
        Predictions.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "evil.npz", ids=np.array([print], dtype=object))
    with pytest.raises(ValueError):
        Predictions.load(tmp_path / "evil.npz")


def test_well_accuracy_counts_known_wells(screen):
    wells = screen.wells[screen.wells.split == "train"].query("well_type=='treatment'").head(6)
    classes = list(range(8))
    logits = np.eye(8)[wells.sirna.to_numpy(int)]
    logits[0] = np.roll(logits[0], 1)
    p = Predictions(wells.id_code, classes, logits, dict(level="well"))
    assert well_accuracy(p, screen.wells) == (5, 6)
    test_well = screen.wells[screen.wells.split == "test"].query("well_type=='treatment'").head(1)
    q = Predictions([*p.ids, *test_well.id_code], classes, np.vstack([logits, np.eye(8)[:1]]), dict(level="well"))
    assert well_accuracy(q, screen.wells) == (5, 6)  # the truth of a test well is not known


def test_valid_split_of_a_run(small_run, screen):
    p = predict_run(small_run, screen, "valid", progress=False)
    assert {i.split("_")[0] for i in p.ids} == {"HUVEC-03"} and p.made["split"] == "valid"
    assert Predictions.load(small_run / "predictions" / "valid.npz").made == p.made


def test_bagging_averages_passes_over_batch_sizes(learn, sites):
    "Two passes are the mean of each alone with the same shuffles; no batch is left with a few sites"
    from rcic_fastai.model.batchnorm import BatchNormMode

    sizes, enter = [], BatchNormMode._use_batch

    def spy(self, name, layer, args, kwargs):
        sizes.append(len((*args, *kwargs.values())[0]))
        return enter(self, name, layer, args, kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchNormMode, "_use_batch", spy)
        p = predict_sites(learn, sites, "batch", bagging=[10, 5], progress=False, seed=1)
    assert min(sizes) >= 4 and p.made["bagging"] == [10, 5]
    rng = np.random.default_rng(1)
    orders = [rng.permutation(len(sites)) for _ in range(2)]
    expected = np.zeros_like(p.logits)
    for size, order in zip((10, 5), orders):
        even = -(-len(sites) // -(-len(sites) // size))
        expected[order] += predict_sites(learn, sites.iloc[order].reset_index(drop=True), "batch", bs=even,
                                         progress=False).logits / 2
    np.testing.assert_allclose(p.logits, expected, atol=1e-3)
    with pytest.raises(ValueError, match="bagging repeats passes over batches"):
        predict_sites(learn, sites, "domain", bagging=[16], progress=False)


def test_domain_statistics_with_controls_are_those_of_both_together(screen, learn, sites):
    controls = select_sites(screen, "test", "controls")
    p = predict_sites(learn, sites, "domain", controls=controls, bs=7, progress=False)
    both = pd.concat([sites, controls], ignore_index=True)
    np.testing.assert_allclose(p.logits, predict_sites(learn, both, "domain", progress=False).logits[: len(sites)],
                               atol=2e-3)
    assert np.abs(p.logits - predict_sites(learn, sites, "domain", progress=False).logits).max() > 1e-2


def test_embeddings_are_what_the_classifier_sees(learn, sites):
    x = embed_sites(learn, sites, "domain", progress=False)
    logits = learn.model.head.classifier(torch.as_tensor(x)).detach().numpy() * learn.loss_func.s
    np.testing.assert_allclose(logits, predict_sites(learn, sites, "domain", progress=False).logits, atol=1e-3)


@pytest.mark.slow
@each("name", postprocess_names)
def test_postprocessing_by_name(screen, learn, sites, name):
    "Scores of every class from class centres of labelled sites, the same as by hand on the embeddings"
    reference = select_sites(screen, "train").query("experiment!='HUVEC-03'").reset_index(drop=True)
    controls = pd.concat([select_sites(screen, s, "controls") for s in ("train", "test")],
                         ignore_index=True) if name in ("sphering", "tvn") else None
    p = predict_sites(learn, sites, postprocess=name, reference=reference, controls=controls, progress=False)
    tables = [t for t in (sites, reference, controls) if t is not None]
    x = np.split(embed_sites(learn, pd.concat(tables, ignore_index=True), progress=False),
                 np.cumsum([len(t) for t in tables])[:-1])
    scores, classes = postprocess_embeddings(name, x[0], sites, x[1], reference,
                                             *((x[2], controls) if controls is not None else ()))
    np.testing.assert_allclose(p.logits, scores * learn.loss_func.s, atol=1e-4)
    assert list(classes) == list(p.classes) and p.made["postprocess"] == name


def test_bad_domains_are_told(screen, learn, sites, monkeypatch):
    with pytest.raises(ValueError, match="domain is 'well', expected one of 'cell_type', 'experiment', 'plate'"):
        predict_sites(learn, sites, domain="well", progress=False)
    with pytest.warns(UserWarning, match="is the only well of its experiment"):
        predict_sites(learn, sites.head(2), "domain", progress=False)
    controls = select_sites(screen, "test", "controls")
    with pytest.warns(UserWarning, match="plate 2 has no controls: those of the whole experiment are used"):
        p = predict_sites(learn, sites, "controls", domain="plate", controls=controls[controls.plate != 2],
                          progress=False)
    own = sites[sites.plate == 2].reset_index(drop=True)
    expected = predict_sites(learn, own, "controls", domain="experiment", controls=controls[controls.plate != 2],
                             progress=False)
    np.testing.assert_allclose(p.logits[sites.plate == 2], expected.logits, atol=1e-3)
    with pytest.raises(ValueError, match="'tvn' is fitted on controls"):
        predict_sites(learn, sites, postprocess="tvn", progress=False)
    with pytest.raises(ValueError, match="this learner has none: give `reference`"):
        predict_sites(learn, sites, postprocess="centers", progress=False)

    class Plain(torch.nn.Module):
        def forward(self, x, context):
            return x.mean((2, 3))[:, :1].expand(-1, 8)

    monkeypatch.setattr(learn, "model", Plain())
    with pytest.raises(ValueError,
                       match="the model has no BatchNorm, so mode 'domain' would change nothing: use 'running'"):
        predict_sites(learn, sites, "domain", progress=False)


def test_classes_that_are_not_asked_for_are_left_out():
    p = Predictions(["a_1", "b_1"], [0, 1, 7], np.arange(6).reshape(2, 3))
    assert p.only([7, 0]).classes.tolist() == [0, 7] and p.only([7]).logits.tolist() == [[2.0], [5.0]]
    with pytest.raises(ValueError, match="none of the 3 predicted classes"):
        p.only([9])


def test_views_are_kept_and_combined_again(learn, sites, tmp_path):
    "Each smaller group out of the kept views is what a pass of its own gives; the same call gives the same numbers."
    few, group = sites.head(4), TTA(d4=2, seeds=3, plain_weight=0.4)
    p = predict_sites(learn, few, "running", tta=group, keep_views=True, progress=False)
    assert p.made["tta"] == dict(d4=2, seeds=3, plain_weight=0.4)
    assert p.views.shape == (6, 4, 8) == (len({v.tobytes() for v in p.views}), 4, 8)
    np.testing.assert_array_equal(predict_sites(learn, few, "running", tta=group, keep_views=True,
                                                progress=False).views, p.views)
    np.testing.assert_allclose(predict_sites(learn, few, "running", tta=group, bs=3, progress=False).logits, p.logits,
                               atol=1e-4)
    np.testing.assert_allclose(p.logits, 0.4 * p.views[0] + 0.6 * p.views.mean(0), atol=1e-4)
    for tta in ("none", TTA(d4=2), TTA(d4=1, seeds=3, combine="max")):
        np.testing.assert_allclose(p.combine(tta).logits,
                                   predict_sites(learn, few, "running", tta=tta, progress=False).logits, atol=1e-4)
    loaded = Predictions.load(p.save(tmp_path / "p.npz"))
    np.testing.assert_array_equal(loaded.views, p.views)
    assert loaded.combine(TTA(d4=2)).made["tta"] == dict(d4=2)
    with pytest.raises(ValueError,
                       match="6 of 8 views of tta 'd4' were not kept, such as 'd4=2 crop=0 seed=0': kept are those of "
                       "tta {'d4': 2"):
        loaded.combine("d4")
    with pytest.raises(ValueError, match="keep no views: predict with keep_views=True"):
        p.__class__(p.ids, p.classes, p.logits).combine("d4")


def test_draws_of_a_site_are_its_own(learn, sites):
    "Domain statistics see other sites, running ones do not: there neither order nor neighbours change a draw."
    tta = TTA(d4=1, seeds=2, plain_weight=0.0)
    p = predict_sites(learn, sites.head(6), "running", tta=tta, keep_views=True, progress=False)
    order = [4, 1, 5]
    q = predict_sites(learn, sites.iloc[order].reset_index(drop=True), "running", tta=tta, keep_views=True, bs=2,
                      progress=False)
    np.testing.assert_allclose(q.views, p.views[:, order], atol=1e-4)
    assert np.abs(p.views[0] - p.views[1]).max() > 1e-3


@pytest.mark.parametrize("mode, kwargs", [("domain", {}), ("domain", dict(pool_sites=4)), ("batch", {})])
def test_kept_views_under_other_statistics(learn, sites, mode, kwargs):
    few = sites.head(8)
    p = predict_sites(learn, few, mode, tta=3, keep_views=True, progress=False, **kwargs)
    np.testing.assert_allclose(p.logits, predict_sites(learn, few, mode, tta=3, progress=False, **kwargs).logits,
                               atol=1e-4)
    np.testing.assert_allclose(p.views[0], predict_sites(learn, few, mode, progress=False, **kwargs).logits, atol=1e-4)


def test_windows_of_a_network_that_saw_whole_images(learn, sites):
    p = predict_sites(learn, sites.head(2), "running", tta="hpa_first_place", keep_views=True, progress=False)
    expected = combine_views(torch.from_numpy(p.views), tta_presets["hpa_first_place"])
    np.testing.assert_allclose(p.logits, expected.numpy(), atol=1e-5)
    assert len(p.views) == 32 and len({v.tobytes() for v in p.views}) == 32 and "share=0.667" in p.view_names[0]
    with pytest.raises(ValueError, match="takes 4 windows, but this network sees whole images: give crop_size"):
        predict_sites(learn, sites.head(4), "running", tta=TTA(crops=4), progress=False)


def test_embeddings_of_views_are_averaged(learn, sites):
    "A maximum is one of scores, never of embeddings"
    few = sites.head(2)
    one, eight, most = (embed_sites(learn, few, "running", tta=t, progress=False)
                        for t in (1, "d4", TTA(combine="max")))
    np.testing.assert_array_equal(eight, most)
    assert np.abs(one - eight).max() > 1e-4


def test_several_labels_per_image(learn, sites, monkeypatch, tmp_path):
    "A multi-label loss means sigmoid probabilities, which are what views are averaged in."
    from scipy.special import expit, softmax

    from rcic_fastai.loss.multi import MultiLabelBCELoss

    few = sites.head(5)
    p = predict_sites(learn, few, "running", progress=False)
    np.testing.assert_allclose(p.probabilities, softmax(p.logits, 1), atol=1e-6)
    assert p.activation == "softmax" and "activation" not in p.made
    monkeypatch.setattr(learn, "loss_func", MultiLabelBCELoss())
    p = predict_sites(learn, few, "running", tta=8, keep_views=True, progress=False)
    np.testing.assert_allclose(p.probabilities, expit(p.views).mean(0), atol=1e-5)
    q = Predictions.load(p.save(tmp_path / "p.npz"))
    assert q.activation == "sigmoid" and q.wells().activation == "sigmoid"
    assert (q.labels == p.classes[p.logits.argmax(1)]).all()
    np.testing.assert_allclose(q.combine(4).probabilities, expit(p.views[:4]).mean(0), atol=1e-5)
    monkeypatch.setattr(learn, "loss_func", torch.nn.BCEWithLogitsLoss())
    assert predict_sites(learn, few, "running", progress=False).activation == "sigmoid"


def test_kept_views_follow_ids_and_classes():
    rng = np.random.default_rng(0)
    views = rng.standard_normal((3, 4, 2))
    p = Predictions(["a_1", "a_2", "b_1", "b_2"], [5, 7], views.mean(0), dict(level="site", tta=3), views,
                    [f"d4={v} crop={v} seed=0" for v in range(3)])
    np.testing.assert_allclose(p.wells().views, views.reshape(3, 2, 2, 2).mean(2), atol=1e-6)
    np.testing.assert_allclose(p.only([7]).wells().combine(2).logits, views[:2, :, 1:].mean(0).reshape(2, 2, 1).mean(1),
                               atol=1e-6)
    with pytest.raises(ValueError, match=r"views of shape \(3, 4, 2\), expected \(1, 4, 2\)"):
        Predictions(p.ids, p.classes, p.logits, {}, views, ["one"])


def test_groups_in_a_run(small_run, screen):
    "A run predicts with a group by name; a wrong name is told with the nearest."
    p = predict_run(small_run, replace(screen, wells=screen.wells.groupby(["experiment", "well_type"]).head(4)),
                    "valid", tta="d4", keep_views=True, progress=False)
    assert p.made["tta"] == "d4"
    assert (Predictions.load(small_run / "predictions" / "valid.npz").views.shape == p.views.shape
            == (8, *p.logits.shape))
    with pytest.raises(ValueError, match="did you mean 'hpa_first_place'"):
        predict_run(small_run, screen, "valid", tta="hpa_first", progress=False)


@pytest.mark.parametrize("kwargs, message",
                         [(dict(batchnorm="batch", bagging=[8]), "not with bagging"),
                          (dict(postprocess="centers"), "not with postprocess")])
def test_views_of_several_passes_are_not_kept(learn, sites, kwargs, message):
    with pytest.raises(ValueError, match=message):
        predict_sites(learn, sites, keep_views=True, progress=False, **kwargs)
