"""One place answers what a run looks at beside the sites it predicts: predictions, embeddings and report see the
same statistics."""

import numpy as np
import pandas as pd
import pytest

from rcic_fastai.predict.core import Predictions
from rcic_fastai.run.predict import embed_run, predict_run
from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe
from rcic_fastai.report.core import embed_again, load_network, run_context
from rcic_fastai.run.train import train_run
from rcic_fastai.screen.read import read_screen

quick = change_recipe(laptop_recipe(get_recipe("laptop"), 1, virtual_batch=16), "device.precision=fp32",
                      "data.crop=null", "data.epoch_sites=16",
                      'model.arch_options={"channels": [8, 8, 8, 16], "stem_width": 8}')
own_head = ("loss.name=cross_entropy", "loss.options={}", "model.head=linear")
CASES = {
    "plain": (),
    "controls in the batch": ("data.n_controls=4",),
    "plates": ("data.domain=plate", "data.n_controls=2"),
    "a sample of the domain": ("data.n_controls=4", "inference.pool_sites=12"),
    "a head that compares": ("data.n_controls=4", "model.head=controls", "loss.name=cross_entropy", "loss.options={}"),
    "centred plates and controls": ("data.n_controls=4", "inference.postprocess=center_plate"),
    "tvn beside controls": ("data.n_controls=4", "inference.postprocess=tvn"),
    "batches": (*own_head, "inference.batchnorm=batch", "inference.bagging=[16, 8]"),
}


def means(x, sites):
    codes, first = pd.factorize(sites.id_code)
    return np.stack([x[codes == i].mean(0) for i in range(len(first))]), first


@pytest.fixture(scope="module")
def screen(small_screen):
    return read_screen(small_screen)


def features_of_prediction(monkeypatch, recipe, run, screen, split):
    """Mean features of each well as `predict_run` sees them, and the ids: a prediction with the features in place of
    the logits"""
    import rcic_fastai.predict.sites as module

    seen, original = {}, module._forward
    with monkeypatch.context() as m:
        m.setattr(module, "_forward", lambda learn, view, prepare, embed=False: original(learn, view, prepare, True))
        m.setattr(module, "Predictions", lambda ids, classes, logits, *a: seen.update(ids=ids, x=logits)
                  or Predictions(ids, [0, 1], logits[:, :2], *a))
        m.setattr(module, "postprocess_embeddings", lambda n, x, sites, *a: seen.update(x=x)
                  or (np.zeros((len(x), 2)), np.array([0, 1])))
        m.setattr(Predictions, "only", lambda self, classes: self)
        if recipe.inference.postprocess:
            m.setattr(module, "Predictions", lambda ids, classes, logits, *a: seen.update(ids=ids)
                      or Predictions(ids, [0, 1], logits[:, :2], *a))
        predict_run(run, screen, split, progress=False, say=lambda *a: None)
    return means(seen["x"], pd.DataFrame(dict(id_code=pd.Series(seen["ids"]).str.rsplit("_", n=1).str[0])))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_same_statistics_everywhere(screen, tmp_path, name, monkeypatch):
    """What `embed` gets while a run predicts, what `embed_run` returns and what the report draws, for the test wells
    and the same ones"""
    recipe, quiet = change_recipe(quick, *CASES[name]), lambda *a: None
    train_run(screen, recipe, tmp_path, valid="well=0/3", say=quiet)
    embedded = {}
    for split in ("valid", "test"):
        predicted, ids = features_of_prediction(monkeypatch, recipe, tmp_path, screen, split)
        x, wells = embed_run(tmp_path, screen, split, progress=False, say=quiet)
        assert (split == "valid" or set(wells.well_type) >= {"treatment", "negative_control"}) and np.isfinite(x).all()
        at = pd.Index(wells.id_code).get_indexer(ids)
        np.testing.assert_allclose(x[at], predicted, rtol=1e-3, atol=1e-4)
        embedded[split] = x, wells
        only, some = embed_run(tmp_path, screen, split, wells="treatments", progress=False, say=quiet)
        np.testing.assert_allclose(only, x[pd.Index(wells.id_code).get_indexer(some.id_code)], rtol=1e-3, atol=1e-4)
    if recipe.inference.bagging:
        return
    c = run_context(tmp_path, max_wells=10_000, say=quiet)
    for split in ("valid", "test"):
        w = screen.wells[screen.wells.id_code.isin(c.predictions[split].ids)]
        drawn, ids = embed_again(load_network(c, w), recipe.inference.batchnorm)
        x, wells = embedded[split]
        np.testing.assert_allclose(drawn, x[pd.Index(wells.id_code).get_indexer(ids)], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_embed_without_and_with_a_truth(small_run, small_screen, tmp_path, capsys, monkeypatch):
    """Without labels the file and a sentence; a truth fills in what is unknown, keeps the controls, and may not
    contradict"""
    from rcic_fastai.cli.script import CliError

    from rcic_fastai.cli.core import rcic_embed

    out, wells = tmp_path / "e.npz", read_screen(small_screen).wells.query("split == 'test'")
    rcic_embed(run=small_run, out=out)
    said = capsys.readouterr().out
    assert "needs a truth" in said and "--truth" in said
    with np.load(out) as f:
        unknown = np.isnan(f["sirna"])
        assert set(f["well_type"][unknown]) == {"treatment"} and (~unknown).any()
    truth = pd.read_csv(small_screen / "truth.csv")
    rcic_embed(run=small_run, out=out, truth=small_screen / "truth.csv")
    said = capsys.readouterr().out
    assert "Not measured: replicate mAP" in said and "probe plate" in said and "NaN" not in said  # one experiment
    with np.load(out) as f:
        found = pd.Series(f["sirna"], f["id_code"])
    assert found.notna().all() and (found[truth.id_code].to_numpy() == truth.sirna).all()
    controls = wells[wells.well_type != "treatment"]
    assert (found[controls.id_code].to_numpy() == controls.sirna).all()
    bad = pd.concat([truth[["id_code", "sirna"]], pd.DataFrame(dict(id_code=[controls.id_code.iloc[0]], sirna=[0]))])
    bad.to_csv(tmp_path / "bad.csv", index=False)
    monkeypatch.setattr("rcic_fastai.run.folder.Run.profiles",
                        lambda *a, **k: pytest.fail("embedded before the truth was looked at"))
    for kwargs, words in ((dict(truth=tmp_path / "bad.csv"), rf"bad.csv: row {len(bad) + 1} .*sirna is 0, and the "
                           r"screen says"),
                          (dict(out=tmp_path / "e.txt"), "written as .parquet, .npz or .h5ad"),
                          (dict(truth=tmp_path / "none.csv"), "none.csv does not exist")):
        with pytest.raises(CliError, match=words):
            rcic_embed(run=small_run, **{"out": out, **kwargs})
