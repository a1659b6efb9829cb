"""What README, docstrings and pages promise to somebody who knows fastai: one test per promise, on the four ways to
a learner."""

import os
import shutil
import subprocess
import sys
import warnings
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.all import (ActivationStats, CSVLogger, EarlyStoppingCallback, FetchPredsCallback, GradientClip,
                                 ReduceLROnPlateau, SaveModelCallback,
                                 ShowGraphCallback, TerminateOnNaNCallback, minimum, slide, steep, valley)
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import AvgMetric, Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy, error_rate
from fastai.optimizer import SGD, Adam
from fastai.torch_core import params
from fastai.vision.all import CategoryBlock, ColReader, DataBlock, resnet18, vision_learner
from torch import nn

from rcic_fastai.train.checkpoint import History
from rcic_fastai.data.select import select_sites
from rcic_fastai.data.loader import sites_table
from rcic_fastai.data.block import SixChannelImageBlock, screen_dataloaders
from rcic_fastai.loss.single import SoftmaxCrossEntropyLoss
from rcic_fastai.train.mix import ScreenMixUp
from rcic_fastai.model.core import read_meta
from rcic_fastai.screen.platemap import read_plate_map
from rcic_fastai.predict.core import Predictions
from rcic_fastai.predict.sites import embed_sites, predict_sites
from rcic_fastai.run.predict import embed_run, predict_run, write_embeddings
from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe
from rcic_fastai.run.submit import submit_run
from rcic_fastai.run.train import control_sites, train_run
from rcic_fastai.screen.atlas import hpa_classes
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.simulate_atlas import simulate_hpa
from rcic_fastai.train.optimizer import radam
from rcic_fastai.data.pack import pack_screen
from rcic_fastai.data.store import open_store
from rcic_fastai.recipe.settings import LossSettings, TrainSettings
from rcic_fastai.train.loaders import recipe_dataloaders
from rcic_fastai.train.network import ImageOnly
from rcic_fastai.train.learner import fit_stage, screen_learner
from rcic_fastai.data.target import TargetBlock
from rcic_fastai.run.folder import load_run

matplotlib.use("Agg")

KINDS = "screen_learner", "train_run", "load_run", "load_learner"
# the first kind is quick
EACH_KIND = [KINDS[0], *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])]
HELD = "experiment=HUVEC-03"
recipe = change_recipe(laptop_recipe(get_recipe("laptop"), 1, virtual_batch=16), "device.precision=fp32",
                       'model.arch_options={"channels": [8, 16, 32, 64], "stem_width": 8}', "loss.options.m=0.2",
                       "loss.options.s=16")


@pytest.fixture(scope="module")
def screen(small_screen):
    return read_screen(small_screen)


@pytest.fixture(scope="module")
def sites(screen):
    return select_sites(screen)


@pytest.fixture(scope="module")
def new_sites(screen):
    return select_sites(screen, "test")


@pytest.fixture(scope="module")
def learners(screen, sites, new_sites, tmp_path_factory):
    "By kind: a learner with a validation set, and one without"
    path, quiet = tmp_path_factory.mktemp("learners"), lambda *a: None

    def two(valid):
        name = "with" if valid else "without"
        dls = recipe_dataloaders(sites, recipe, valid, path=path / name)
        (path / name).mkdir()
        own = screen_learner(dls, recipe)
        trained = train_run(screen, recipe, path / f"run_{name}", valid=valid, say=quiet)
        loaded = load_run(path / f"run_{name}", sites if valid else new_sites)
        exported = screen_learner(dls, recipe)
        exported.export("learner.pkl")
        again = load_learner(path / name / "learner.pkl")
        if valid:
            again.dls = dls
        return dict(zip(KINDS, (own, trained, loaded, again)))

    return dict(valid=two(HELD), none=two(None))


@pytest.fixture(params=EACH_KIND)
def learn(learners, request):
    return calm(learners["valid"][request.param])


@pytest.fixture(params=EACH_KIND)
def bare(learners, request):
    "A learner without a validation set; from `load_learner` one without any sites"
    return calm(learners["none"][request.param])


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def calm(learn):
    learn.logger = lambda values: None
    return learn


def titles():
    return [ax.get_title() for ax in plt.gcf().axes if ax.get_title()]


# With a validation set


def test_show_batch(learn):
    learn.show_batch(max_n=4)
    assert len(titles()) == 4 and all("siRNA" in t and "HUVEC-0" in t for t in titles())
    plt.close("all")
    learn.dls.valid.show_batch(max_n=2)
    assert all("HUVEC-03" in t for t in titles())


@pytest.mark.parametrize("kwargs, experiments",
                         [(dict(), ["HUVEC-03"]), (dict(ds_idx=0, max_n=3), ["HUVEC-01", "HUVEC-02"])])
def test_show_results(learn, kwargs, experiments):
    learn.show_results(**kwargs)
    found = titles()
    assert len(found) == kwargs.get("max_n", 9)
    assert all("predicted" in t and any(e in t for e in experiments) for t in found)
    assert all(("(wrong)" in t) == (t.split("siRNA ")[1].split(",")[0] != t.split("predicted ")[1].split()[0])
               for t in found)


def test_show_results_tells_what_get_preds_tells(learn):
    few = learn.dls.valid_ds.items.iloc[:4]
    learn.show_results(dl=learn.dls.test_dl(few, with_labels=True))
    expected = learn.get_preds()[0][:4].argmax(1).tolist()
    assert [t.split("predicted ")[1].split()[0] for t in titles()] == [str(learn.dls.vocab[i]) for i in expected]


def test_summary(learn):
    text = str(learn.summary())
    assert f"Total params: {sum(p.numel() for p in learn.model.parameters() if p.ndim):,}"[:15] in text
    assert "Callbacks" in text and "BatchNorm2d" in text


def test_predict_takes_a_row_a_table_and_a_path(learn, new_sites):
    row = learn.dls.valid_ds.items.iloc[3]
    decoded, number, probs = learn.predict(row)
    assert probs.shape == (8,) and probs.sum() == pytest.approx(1, abs=1e-5) and probs.argmax() == number
    assert str(learn.dls.vocab[int(number)]) == decoded
    for same in (learn.dls.valid_ds.items.iloc[3:4], [row], row.files):
        torch.testing.assert_close(learn.predict(same)[2], probs)
    with pytest.warns(UserWarning,
                      match="no other well of its experiment is known to this learner, so the running statistics"):
        _, _, alone = learn.predict(new_sites.files[0])
    assert alone.shape == (8,) and alone.sum() == pytest.approx(1, abs=1e-5)
    (image, context), *rest = learn.predict(row, with_input=True)
    assert image.shape == (6, 48, 48) and context.shape == (4,) and rest[0] == decoded


def test_predict_is_that_row_of_get_preds(learn):
    "A site asked about alone keeps the statistics of its experiment"
    probs = learn.get_preds()[0]
    for i in (0, 7, 15):
        torch.testing.assert_close(learn.predict(learn.dls.valid_ds.items.iloc[i])[2], probs[i], atol=1e-5, rtol=1e-4)


def test_predict_of_a_well_is_the_mean_of_its_scores(learn):
    well = learn.dls.valid_ds.items[lambda t: t.id_code == t.id_code.iloc[0]]
    scores = learn.get_preds(act=lambda x: x)[0][:len(well)]
    assert len(well) == 2
    torch.testing.assert_close(learn.predict(well)[2], learn.loss_func.activation(scores.mean(0, keepdim=True))[0],
                               atol=1e-5, rtol=1e-4)


def test_predict_says_what_it_takes(learn, screen, sites):
    for wrong, message in ((sites.head(6), "predict takes one site or the sites of one well, not 6 sites: get_preds"),
                           (screen.wells.iloc[0], "no column 'files'"),
                           (3, "given as int, expected a table of sites")):
        with pytest.raises(ValueError, match=message):
            learn.predict(wrong)
    with pytest.raises(FileNotFoundError,
                       match="nowhere_w1.png does not exist"), warnings.catch_warnings(action="ignore"):
        learn.predict("nowhere_w{channel}.png")
    assert len(learn.predict(sites.iloc[0])) == 3  # still usable


def test_labels_that_are_not_there(learn, sites):
    with pytest.raises(ValueError, match=r"validate needs labels: learn.dls.test_dl\(sites, with_labels=True\)"):
        learn.validate(dl=learn.dls.test_dl(sites))
    with pytest.raises(ValueError, match="with_labels: the sites have no column 'sirna'"):
        learn.dls.test_dl(sites.drop(columns="sirna"), with_labels=True)
    with pytest.raises(ValueError, match="there are no sites in the table"):
        learn.dls.test_dl(sites[:0])


def test_copies(learn):
    "A learner whose loaders have read something already"
    learn.validate()
    torch.testing.assert_close(deepcopy(learn).get_preds()[0], learn.get_preds()[0], atol=1e-5, rtol=1e-4)


def test_validate_and_get_preds(learn):
    loss, acc = learn.validate()
    probs, y, decoded, losses = learn.get_preds(with_decoded=True, with_loss=True)
    table = learn.dls.valid_ds.items
    assert [learn.dls.vocab[int(i)] for i in y] == table.sirna.tolist()
    assert losses.mean() == pytest.approx(loss, rel=1e-4)
    assert (decoded == y).float().mean() == pytest.approx(acc, abs=1e-6)
    assert type(probs) is not None and not probs.is_inference() and learn.validate(ds_idx=0)[0] > 0


def test_get_preds_of_the_training_set_is_in_its_order(learn):
    _, y, losses = learn.get_preds(ds_idx=0, with_loss=True)
    assert [learn.dls.vocab[int(i)] for i in y] == learn.dls.train_ds.items.sirna.tolist() and len(losses) == 32


def test_get_preds_of_new_sites_in_any_form(learn, new_sites):
    shuffled = new_sites.sample(frac=1, random_state=1)
    probs, y = learn.get_preds(dl=learn.dls.test_dl(shuffled))
    assert probs.shape == (len(new_sites), 8) and y is None
    back = torch.from_numpy(np.argsort(shuffled.index.to_numpy()))
    torch.testing.assert_close(probs[back], learn.get_preds(dl=learn.dls.test_dl(new_sites))[0], atol=1e-5, rtol=1e-4)
    rows = [new_sites.iloc[0], new_sites.iloc[5]]
    assert learn.get_preds(dl=learn.dls.test_dl(rows))[0].shape == learn.get_preds(
        dl=learn.dls.test_dl(new_sites.files[:2].tolist()))[0].shape == (2, 8)


def test_get_preds_with_inputs(learn, sites):
    mixed = sites.sample(12, random_state=0)  # of three experiments, out of order
    (images, context), _, y = learn.get_preds(dl=learn.dls.test_dl(mixed, with_labels=True), with_input=True)
    assert images.shape == (12, 6, 48, 48) and [learn.dls.vocab[int(i)] for i in y] == mixed.sirna.tolist()
    names = next(t for t in learn.dls.train_ds.tls[1].tfms if hasattr(t, "experiments")).experiments
    assert [names[i] for i in context[:, 1]] == mixed.experiment.tolist()


def test_tta(learn, new_sites):
    preds, y = learn.tta(n=2)
    assert preds.shape == (16, 8) and len(y) == 16
    torch.testing.assert_close(learn.tta(n=1, beta=1.0)[0], learn.get_preds()[0], atol=1e-5, rtol=1e-4)
    assert not torch.equal(learn.tta(n=1, beta=0.0)[0], preds)
    assert learn.tta(dl=learn.dls.test_dl(new_sites), n=1)[0].shape == (len(new_sites), 8)


def test_confusion_matrix(learn, capsys):
    interp = ClassificationInterpretation.from_learner(learn)
    cm = interp.confusion_matrix()
    assert cm.sum() == 16 and np.trace(cm) == round(16 * learn.validate()[1])
    interp.plot_confusion_matrix(normalize=True)
    assert [t.get_text() for t in plt.gca().get_yticklabels()] == [str(v) for v in learn.dls.vocab]
    assert sum(n for *_, n in interp.most_confused(1)) == 16 - np.trace(cm)
    interp.print_classification_report()
    assert "precision" in capsys.readouterr().out


@pytest.mark.parametrize("cls", [Interpretation, ClassificationInterpretation])
def test_top_losses_and_their_pictures_agree(learn, cls):
    "Of several experiments too: the loss in a title belongs to the prediction next to it"
    for source in (dict(), dict(ds_idx=0)):
        interp = cls.from_learner(learn, **source)
        probs, y = learn.get_preds(**source)
        losses, rows = interp.top_losses(4)
        interp.plot_top_losses(4)
        vocab = [str(v) for v in learn.dls.vocab]
        found = [[o.strip() for o in t.split("/")] for t in titles() if t[0].isdigit()]
        plt.close("all")
        assert [f[:2] for f in found] == [[vocab[probs[i].argmax()], vocab[int(y[i])]] for i in rows]
        assert [float(f[2]) for f in found] == pytest.approx(losses.tolist(), abs=6e-3)
        assert [float(f[3]) for f in found] == pytest.approx([probs[i].max().item() for i in rows], abs=6e-3)
    interp.show_results([0, 3])
    assert len(titles()) == 2
    assert interp.top_losses(2,
                             items=True)[2].id_code.tolist() == interp.dl.items.iloc[rows[:2].tolist()].id_code.tolist()


TOP_LOSSES = """
import matplotlib.pyplot as plt
dls = screen_dataloaders(read_screen(sys.argv[1]), valid="experiment=HUVEC-03", bs=8)
interp = Interpretation.from_learner(screen_learner(dls, "resnet10t"))
interp.plot_top_losses(2)
true = [str(dls.valid.sites.sirna.iloc[int(i)]) for i in interp.top_losses(2)[1]]
assert [ax.get_title().split(" / ")[1] for ax in plt.gcf().axes] == true
"""
OURS, FASTAI, INTERPRET = (f"from {m} import *" for m in ("rcic_fastai.all", "fastai.vision.all", "fastai.interpret"))


@pytest.mark.slow
@pytest.mark.parametrize("imports", [(OURS, FASTAI), (FASTAI, OURS), (OURS, INTERPRET)])
def test_top_losses_are_ours_in_every_order_of_imports(small_screen, imports):
    "The last function registered may win, whatever its types"
    code = "\n".join(["import sys, matplotlib", "matplotlib.use('Agg')", *imports, TOP_LOSSES])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, small_screen], text=True, capture_output=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr


def test_csv_logger(learn):
    history = learn.path / "history.csv"
    before = history.read_bytes() if (learn.path / "run.json").exists() else None
    if before is None:
        logger = CSVLogger()
        learn.fit(1, cbs=logger)
    else:
        with pytest.warns(UserWarning, match="is the history of the run: CSVLogger writes to history_csvlogger.csv"):
            learn.fit(1, cbs=(logger := CSVLogger()))
        assert history.read_bytes() == before
    log = pd.read_csv(learn.path / logger.fname)
    assert log.columns.tolist() == ["epoch", "train_loss", "valid_loss", "accuracy", "time"] and len(log) == 1


def test_callbacks_that_watch(learn):
    learn.fit(2, cbs=[SaveModelCallback(monitor="accuracy"), EarlyStoppingCallback(patience=1, min_delta=100.0),
                      ReduceLROnPlateau()])
    assert len(learn.recorder.values) == 2 and (learn.path / "models" / "model.pth").exists()
    with pytest.raises(ValueError,
                       match="'f1' is not logged: SaveModelCallback cannot watch 'f1'; give it monitor='train_loss' or "
                       "'valid_loss' or 'accuracy'"):
        learn.fit(1, cbs=SaveModelCallback(monitor="f1"))


def test_other_callbacks(learn):
    stats, fetched = ActivationStats(), FetchPredsCallback()
    learn.fit(1, lr=1e-4, cbs=[stats, fetched, GradientClip(1.0), TerminateOnNaNCallback()])
    assert len(stats.stats) == len(learn.dls.train) and fetched.preds[0].shape == (16, 8)
    learn.fit(1, lr=1e-4, cbs=ShowGraphCallback())


def test_the_log_stays_after_a_validation(learn):
    learn.fit_one_cycle(2, 1e-4)
    losses, values = list(learn.recorder.losses), list(learn.recorder.values)
    learn.validate()
    learn.get_preds()
    assert list(learn.recorder.losses) == losses and list(learn.recorder.values) == values and len(values) == 2
    assert [line.get_label() for line in learn.recorder.plot_loss(skip_start=0).lines] == ["train", "valid"]
    learn.recorder.plot_sched()


@pytest.mark.slow
def test_lr_find_leaves_the_network_as_it_was(learn):
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    found = learn.lr_find(num_it=40, suggest_funcs=(minimum, steep, valley, slide))
    assert all(1e-8 < v < 10 for v in found)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())


@pytest.mark.parametrize("how", ["fit", "fit_one_cycle", "fit_flat_cos", "fine_tune", "fit_sgdr"])
def test_ways_to_fit(learn, how):
    before = [p.clone() for p in learn.model.parameters()]
    getattr(learn, how)(1, *([1] if how == "fit_sgdr" else []))
    assert sum(not torch.equal(a, b) for a, b in zip(before, learn.model.parameters())) > len(before) / 2
    assert [len(v) for v in learn.recorder.values] == [3]


def test_freezing(learn):
    learn.freeze()
    before = {k: v.clone() for k, v in learn.model.named_parameters() if v.ndim == 4}
    learn.fit(1, 1e-3)
    assert all(torch.equal(v, before[k]) for k, v in learn.model.named_parameters() if v.ndim == 4)
    learn.unfreeze()
    learn.fit(1, slice(1e-4, 1e-3))
    assert any(not torch.equal(v, before[k]) for k, v in learn.model.named_parameters() if v.ndim == 4)


def test_precision_and_layout(learn):
    assert learn.to_bf16().auto_mixed_precision.dtype == torch.bfloat16
    learn.fit(1, 1e-4)
    assert next(learn.model.parameters()).dtype == torch.float32 and learn.get_preds()[0].dtype == torch.float32
    assert learn.to_fp32().auto_mixed_precision.dtype == torch.float32
    with pytest.raises(ValueError, match="precision 'fp16' cannot train on a CPU; use to_bf16 or to_fp32"):
        learn.to_fp16()
    learn.to_channelslast().fit(1, 1e-4)
    learn.to_contiguous(to_fp32=True).fit(1, 1e-4)
    assert all(p.is_contiguous() for p in learn.model.parameters()) and len(learn.get_preds()[0]) == 16


def test_save_and_load(learn):
    before = learn.get_preds()[0]
    learn.save("kept")
    learn.fit(1, 1e-2)
    learn.load("kept")
    torch.testing.assert_close(learn.get_preds()[0], before, atol=1e-5, rtol=1e-4)


def test_export_and_load_learner(learn, new_sites):
    before, dls, opt = learn.get_preds(dl=learn.dls.test_dl(new_sites))[0], learn.dls, learn.opt
    learn.export("again.pkl")
    assert learn.dls is dls and learn.opt is opt
    again = load_learner(learn.path / "again.pkl")
    torch.testing.assert_close(again.get_preds(dl=again.dls.test_dl(new_sites))[0], before, atol=1e-5, rtol=1e-4)
    assert not len(again.dls.train_ds) and not len(again.dls.valid_ds) and list(again.dls.vocab) == list(dls.vocab)
    with pytest.raises(AttributeError):
        learn.export("broken.pkl", pickle_module=None)
    assert learn.dls is dls and len(learn.get_preds()[0]) == 16  # still usable


# Without one: each says so, and what to call instead

TAKES = r"there is no validation set: {}\(dl=learn.dls.test_dl\(sites{}\)\) takes any sites"
LABELS = ", with_labels=True"


@pytest.mark.slow
@pytest.mark.parametrize("call, labels", [("validate", LABELS), ("get_preds", ""), ("show_results", LABELS),
                                          ("tta", "")])
def test_no_validation_set(bare, sites, call, labels):
    with pytest.raises(ValueError, match=TAKES.format(call, labels)) as e:
        getattr(bare, call)()
    assert "\n" not in str(e.value)
    dl = bare.dls.test_dl(sites, with_labels=bool(labels))  # what it says works
    out = getattr(bare, call)(dl=dl)
    if call == "validate":
        assert len(out) == 2 and out[1] == pytest.approx(accuracy(*bare.get_preds(dl=dl)).item(), abs=1e-6)
    elif call != "show_results":
        assert out[0].shape == (48, 8)
    if len(bare.dls.train_ds):
        assert "ds_idx=0) the training set" in str(e.value) and "valid=... sets some aside" in str(e.value)
        if call == "validate" and bare.dls.train_ds.items.sirna.isna().all():
            with pytest.raises(ValueError, match="validate needs labels, and sirna is unknown for all"):
                bare.validate(ds_idx=0)
        else:
            getattr(bare, call)(ds_idx=0)
    else:
        with pytest.raises(ValueError, match="there is no training set"):
            getattr(bare, call)(ds_idx=0)


def test_no_validation_set_to_interpret(bare, sites):
    for cls in (Interpretation, ClassificationInterpretation):
        with pytest.raises(ValueError,
                           match=r"there is no validation set: give dl=learn.dls.test_dl\(sites, with_labels=True\) "
                           r"for any sites"):
            cls.from_learner(bare)
        with pytest.raises(ValueError, match="the loss of each site needs labels"):
            cls.from_learner(bare, dl=bare.dls.test_dl(sites))
    interp = ClassificationInterpretation.from_learner(bare, dl=bare.dls.test_dl(sites, with_labels=True))
    assert interp.confusion_matrix().sum() == 48
    interp.plot_top_losses(3)
    assert len(titles()) == 3


def test_predict_without_a_validation_set(bare, new_sites):
    with warnings.catch_warnings(action="ignore"):
        decoded, _, probs = bare.predict(new_sites.iloc[0])
        assert decoded in map(str, bare.dls.vocab) and probs.shape == (8,)
        assert bare.predict(new_sites.files[0])[2].shape == (8,)


def test_fits_without_a_validation_set(bare, sites):
    if not len(bare.dls.train_ds):
        for call in (lambda: bare.fit(1), lambda: bare.fine_tune(1), bare.lr_find, bare.summary, bare.show_batch):
            with pytest.raises(ValueError,
                               match=r"no training sites: give it some, learn.dls = screen_dataloaders\(sites, ...\)"):
                call()
        return
    if bare.dls.train_ds.items.sirna.isna().all():  # the test split
        with pytest.raises(ValueError,
                           match="sirna is unknown for all .* training sites: there is nothing to learn from"):
            bare.fit(1)
        return
    for cb, message in ((SaveModelCallback(), "there is no validation set, so SaveModelCallback cannot watch "
                         "'valid_loss'; give it monitor='train_loss' or 'accuracy'"),
                        (EarlyStoppingCallback(), "EarlyStoppingCallback cannot watch 'valid_loss'"),
                        (ReduceLROnPlateau(), "ReduceLROnPlateau cannot watch"),
                        (ShowGraphCallback(), "no validation set for ShowGraphCallback: learn.recorder.plot_loss"),
                        (FetchPredsCallback(), "there is no validation set: get_preds")):
        with pytest.raises(ValueError, match=message):
            bare.fit(1, cbs=cb)
    with warnings.catch_warnings(action="ignore"):
        bare.fit(1, 1e-4, cbs=[logger := CSVLogger(), SaveModelCallback(monitor="train_loss")])
    assert pd.read_csv(bare.path / logger.fname).columns.tolist() == ["epoch", "train_loss", "accuracy", "time"]
    with pytest.raises(ValueError, match=r"no validation set: learn.recorder.plot_loss\(with_valid=False\)"):
        bare.recorder.plot_loss()
    bare.recorder.plot_loss(with_valid=False)


def test_a_learner_that_was_never_trained_has_no_losses(sites):
    with pytest.raises(ValueError, match="nothing was trained with this learner yet"):
        screen_learner(recipe_dataloaders(sites, recipe), recipe).recorder.plot_loss()


# What is given wins


def test_metrics_loss_optimiser_and_splitter_that_are_given(sites):
    dls, loss = recipe_dataloaders(sites, recipe, HELD), CrossEntropyLossFlat()
    learn = calm(screen_learner(dls, recipe, metrics=[error_rate, accuracy], loss_func=loss, opt_func=SGD,
                                splitter=params, lr=1e-4, wd=0.1))
    assert learn.metrics.attrgot("name") == ["error_rate", "accuracy"] and learn.loss_func is loss
    assert learn.opt_func is SGD and learn.lr == 1e-4 and learn.wd == 0.1
    learn.fit(1)
    assert len(learn.opt.param_lists) == 1
    assert learn.recorder.values[-1][2] == pytest.approx(1 - learn.recorder.values[-1][3])
    assert screen_learner(dls, recipe, metrics=[]).metrics == []
    assert len(screen_learner(dls, recipe, metrics=None).metrics) == 1


@pytest.mark.slow
@pytest.mark.parametrize("opt_func", [Adam, radam, partial(SGD, mom=0.9)])
def test_a_stage_respects_them(sites, opt_func):
    stage, seen = TrainSettings(epochs=1, lr=1e-3, optimizer="adamw", loss="cross_entropy"), []

    class Mine(SoftmaxCrossEntropyLoss):
        def __call__(self, inp, targ):
            seen.append(len(targ))
            return super().__call__(inp, targ)

    dls = recipe_dataloaders(sites, recipe, HELD)
    learn = calm(screen_learner(dls, recipe, loss_func=(loss := Mine()), opt_func=opt_func))
    fit_stage(learn, stage)
    assert seen and learn.loss_func is loss and learn.opt_func is opt_func
    learn = calm(screen_learner(dls, recipe))  # nothing given: the stage says
    fit_stage(learn, stage)
    assert type(learn.opt.opt) is torch.optim.AdamW


def test_a_stage_without_metrics(sites):
    learn = calm(screen_learner(recipe_dataloaders(sites, recipe, HELD), recipe, metrics=[]))
    fit_stage(learn, TrainSettings(epochs=1, lr=1e-3, keep="best"))
    assert [len(v) for v in learn.recorder.values] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [dict(), dict(loss_func=CrossEntropyLossFlat())])
@pytest.mark.parametrize("domain", ["experiment", None])
def test_an_architecture_in_place_of_a_recipe(sites, kwargs, domain):
    dls = screen_dataloaders(sites, valid=HELD, bs=16, domain=domain)
    learn = calm(screen_learner(dls, "resnet10t", **kwargs).to_fp32())
    learn.fit(1, 1e-4)
    assert np.isfinite(learn.validate()).all() and learn.inference_mode.mode == ("batch" if domain else "running")
    assert learn.model.head.classifier.weight.shape[0] == 8
    assert isinstance(learn.model.head.classifier, nn.Linear) == bool(kwargs)


def test_a_name_that_is_no_architecture(sites):
    dls = screen_dataloaders(sites, valid=HELD, bs=16)
    with pytest.raises(ValueError,
                       match=r"architecture 'laptop' is unknown.* A recipe by its name is get_recipe\('laptop'\)"):
        screen_learner(dls, "laptop")
    with pytest.raises(ValueError, match="recipe is int, expected a Recipe or the name of an architecture"):
        screen_learner(dls, 3)
    with pytest.raises(ValueError, match="the sites have one label each, and loss 'lsep' is one of several"):
        screen_learner(dls, replace(recipe, loss=LossSettings("lsep")))


def test_a_network_without_batchnorm(sites):
    learn = calm(screen_learner(screen_dataloaders(sites, valid=HELD, bs=16), "convnext_atto").to_fp32())
    assert learn.inference_mode.mode == "running" and np.isfinite(learn.validate()[0])


def test_a_callback_history_of_ours_and_one_of_fastai(sites, tmp_path):
    learn = calm(screen_learner(recipe_dataloaders(sites, recipe, HELD), recipe, path=tmp_path))
    with pytest.warns(UserWarning, match="CSVLogger writes to history_csvlogger.csv"):
        learn.fit(1, 1e-4, cbs=[History(tmp_path / "history.csv"), CSVLogger()])
    assert len(pd.read_csv(tmp_path / "history.csv")) == len(pd.read_csv(tmp_path / "history_csvlogger.csv")) == 1


# Controls in the batch, statistics of plates, several labels


@pytest.mark.slow
@pytest.mark.parametrize("settings",
                         [['data.statistics="controls"', "data.domains_per_batch=2"],
                          ['model.head="controls"', 'loss.name="cross_entropy"', "loss.options={}"]])
def test_learners_that_need_controls(screen, sites, new_sites, settings):
    own = change_recipe(recipe, "data.n_controls=4", *settings)
    dls = recipe_dataloaders(sites, own, HELD, controls=control_sites(screen), cell_types=screen.cell_types,
                             experiments=screen.experiments)
    learn = calm(screen_learner(dls, own))
    probs, y, losses = learn.get_preds(with_loss=True)
    assert probs.shape == (16, 8) and [dls.vocab[int(i)] for i in y] == dls.valid_ds.items.sirna.tolist()
    assert len(losses) == 16
    (images, context), preds, _ = learn.get_preds(dl=dls.test_dl(sites.sample(9, random_state=2)), with_input=True)
    assert len(images) == len(context) == len(preds) == 9 and (context[:, 3] == 0).all()
    assert learn.predict(sites.iloc[0])[2].shape == (8,)
    assert len(learn.validate(dl=dls.test_dl(sites, with_labels=True))) == 2
    learn.show_results(ds_idx=0, max_n=4)
    assert len(titles()) == 4 and all("predicted" in t for t in titles())
    interp = ClassificationInterpretation.from_learner(learn)
    assert interp.confusion_matrix().sum() == 16
    interp.plot_top_losses(3)
    with pytest.raises(ValueError,
                       match="a path says nothing of the origin of the site, which this network needs .*: give a row "
                       "of the sites"):
        learn.predict(new_sites.files[0])


def test_learners_that_standardise_by_plate(screen, sites, new_sites):
    own = change_recipe(recipe, 'data.standardize="plate"')
    dls = recipe_dataloaders(sites, own, HELD, cell_types=screen.cell_types, experiments=screen.experiments)
    learn = calm(screen_learner(dls, own))
    assert learn.predict(sites.iloc[0])[2].shape == (8,)
    assert learn.get_preds(dl=dls.test_dl(new_sites))[0].shape == (len(new_sites), 8)
    torch.testing.assert_close(learn.predict(sites.files[0])[2], learn.predict(sites.iloc[0])[2])
    with pytest.raises(ValueError, match="a path says nothing of the origin"):
        learn.predict(new_sites.files[0])


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    "A learner of several labels per site"
    folder = tmp_path_factory.mktemp("atlas")
    atlas = read_screen(simulate_hpa(folder / "atlas", n_images=56, n_test=8, n_external=0, image_size=32,
                                     min_positives=1, progress=False))
    sites, own = select_sites(atlas), change_recipe(laptop_recipe(get_recipe("hpa_seresnext50_focal"), 1),
                                                    "device.precision=fp32", "data.batch_size=16")
    dls = recipe_dataloaders(sites, own, np.arange(len(sites)) % 4 == 0, target=atlas.target, channels=atlas.channels,
                             classes=atlas.classes, path=folder)
    return calm(screen_learner(dls, own))


@pytest.mark.slow
def test_several_labels(several):
    n, row = len(several.dls.valid_ds), several.dls.valid_ds.items.iloc[0]
    loss, precision, f1 = several.validate()
    probs, y = several.get_preds()
    assert probs.shape == y.shape == (n, 28) and set(y.unique().tolist()) == {0, 1}
    assert 0 <= f1 <= 1 and 0 <= precision <= 1 and loss > 0
    decoded, mask, one = several.predict(row)
    assert decoded == [hpa_classes[i] for i in mask.nonzero()[:, 0]] and one.shape == (28,)
    torch.testing.assert_close(one, several.predict(row.files)[2])
    several.show_results(max_n=4)
    assert len(titles()) == 4
    plt.close("all")
    interp = Interpretation.from_learner(several)
    interp.plot_top_losses(3)
    assert len(titles()) == 3 and all(t.count("/") == 3 for t in titles())
    several.fit_one_cycle(1, cbs=[CSVLogger(), SaveModelCallback(monitor="macro_f1")])
    several.export("several.pkl")
    assert load_learner(several.path / "several.pkl").predict(row)[2].shape == (28,)


@pytest.mark.slow
def test_an_architecture_for_several_labels(several):
    learn = calm(screen_learner(several.dls, "resnet10t").to_fp32())
    learn.fit(1, 1e-4)
    assert learn.metrics.attrgot("name") == ["average_precision", "macro_f1"] and np.isfinite(learn.validate()[0])
    with pytest.raises(ValueError,
                       match="the sites have several labels each, and loss 'am_softmax' is one of one label"):
        screen_learner(several.dls, recipe)


def test_sites_in_any_form(sites):
    row = sites.iloc[0]
    assert sites_table([row, row.files, sites.head(2)]).files.tolist() == [row.files, row.files, *sites.files[:2]]
    assert sites_table(sites) is sites and not len(sites_table(sites[:0]))
    assert sites_table(dict(row)).files[0] == sites_table(next(sites.itertuples())).files[0] == row.files


def test_a_plain_learner_of_fastai_on_our_loaders(sites):
    "What is ours stands on DataLoaders and callbacks; fastai's own Learner trains on them too"

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 8))

        def forward(self, x, context):
            return self.net(x)

    learn = calm(Learner(recipe_dataloaders(sites, recipe, HELD), Net(), loss_func=CrossEntropyLossFlat(),
                         metrics=AvgMetric(accuracy)))
    learn.fit(1)
    learn.show_results(max_n=4)
    ClassificationInterpretation.from_learner(learn).plot_top_losses(3)
    assert learn.get_preds()[0].shape == (16, 8) and len(learn.predict(sites.iloc[0])) == 3


# What somebody tries who has read the README and knows fastai


def said(call):
    "Result of a call, and what it warns of"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    return result, [str(w.message) for w in caught if "is known to this learner" in str(w.message)]


def test_one_well_of_an_unknown_experiment_is_told_whose_statistics_it_has(learn, bare, new_sites):
    well, other = (new_sites[new_sites.id_code == i] for i in new_sites.id_code.unique()[:2])
    theirs = learn.dls.test_dl(well.assign(sirna=learn.dls.vocab[0]), with_labels=True)
    for call in (lambda: learn.predict(well), lambda: learn.get_preds(dl=learn.dls.test_dl(well)),
                 lambda: learn.tta(dl=learn.dls.test_dl(well), n=1),
                 lambda: learn.validate(dl=theirs)):
        _, warned = said(call)
        assert warned and f"{well.id_code.iloc[0]}: no other well of its experiment" in warned[0]
        assert "running statistics of the network" in warned[0]
    for call in (lambda: learn.get_preds(dl=learn.dls.test_dl(new_sites)),
                 lambda: learn.get_preds(dl=learn.dls.test_dl(pd.concat([well, other]))),
                 lambda: learn.predict(learn.dls.valid_ds.items.iloc[0]), learn.validate, learn.get_preds):
        assert not said(call)[1]
    if len(bare.dls.train_ds) == 0:  # what `load_learner` gives
        assert said(lambda: bare.predict(well))[1]


def test_predict_by_id(learn):
    row = learn.dls.valid_ds.items.iloc[3]
    torch.testing.assert_close(learn.predict(row.site_id)[2], learn.predict(row)[2])
    well = learn.dls.valid_ds.items[lambda t: t.id_code == row.id_code]
    torch.testing.assert_close(learn.predict(row.id_code)[2], learn.predict(well)[2])
    assert len(learn.dls.test_dl([row.id_code, row.files]).sites) == len(well) + 1
    with pytest.raises(ValueError, match="'HUVEC-99_1_B02' is no well or site that this learner has, and no file"):
        learn.predict("HUVEC-99_1_B02")


@pytest.mark.parametrize("spelt", [str, Path, os.path.relpath, lambda files: files])
def test_a_site_is_known_by_its_files(learn, spelt):
    row = learn.dls.valid_ds.items.iloc[3]
    given = spelt(row.files)
    assert learn.dls.known_sites(given).site_id.tolist() == [row.site_id]
    assert learn.dls.known_sites([given, row.files]).experiment.tolist() == [row.experiment] * 2
    result, warned = said(lambda: learn.predict(given))
    torch.testing.assert_close(result[2], learn.predict(row)[2])
    assert not warned


def test_a_missing_file_is_told_without_a_warning_of_statistics(learn):
    with warnings.catch_warnings(action="error"), pytest.raises(FileNotFoundError, match="nope/B02_s1_w1.png"):
        learn.predict("nope/B02_s1_w{channel}.png")


def test_a_warning_of_statistics_points_to_who_asked(learn, new_sites):
    well = new_sites[new_sites.id_code == new_sites.id_code[0]]
    for call in (lambda: learn.predict(well), lambda: learn.get_preds(dl=learn.dls.test_dl(well))):
        with pytest.warns(UserWarning, match="no other well of its experiment") as caught:
            call()
        assert [w.filename for w in caught if "no other well" in str(w.message)] == [__file__]


def test_a_table_of_wells_is_no_table_of_sites(learn, screen):
    for call in (predict_sites, embed_sites):
        with pytest.raises(ValueError, match=r"no column 'files'; screen.sites\(\) .* have"):
            call(learn, screen.wells, progress=False)
    well = screen.wells.iloc[0]
    with pytest.raises(ValueError, match=rf"learn.predict\('{well.id_code}'\) takes a well by its id"):
        learn.predict(well)


def test_pretrained_as_vision_learner_takes_it(learners):
    dls = learners["valid"]["screen_learner"].dls
    plain, named = (screen_learner(dls, "resnet10t", **kw) for kw in ({}, dict(pretrained=False)))
    for a, b in zip(plain.model.state_dict().values(), named.model.state_dict().values()):
        torch.testing.assert_close(a, b)
    for name in ("resnet10t", recipe):  # the file is asked for, so the setting takes part
        with pytest.raises(FileNotFoundError, match="nope.pth"):
            screen_learner(dls, name, pretrained=Path("nope.pth"))
    with pytest.raises(ValueError, match="pretrained is True, but the network given has its weights already"):
        screen_learner(dls, model=plain.model, pretrained=True)


def test_settings_are_told_what_was_meant(learners, screen):
    dls = learners["valid"]["screen_learner"].dls
    for name, message in (("laptop", r"get_recipe\('laptop'\)"), ("laptp", r"get_recipe\('laptop'\)"),
                          ("resnt18", "nearest: resnet18")):
        with pytest.raises(ValueError, match=message) as e:
            screen_learner(dls, name)
        assert f"get_recipe('{name}')" not in str(e.value) or name == "laptop"
    for given, message in ((dict(size=32), r"screen_transforms\(size=...\)"),
                           (dict(present_only=True), r"select_sites\(screen, present_only=True\)")):
        with pytest.raises(TypeError, match=message):
            screen_dataloaders(screen, **given)
    with pytest.raises(ValueError, match="did you mean 'experiment=HUVEC-03'"):
        screen_dataloaders(screen, valid="expriment=HUVEC-03")


def test_one_channel_is_no_site(learn, new_sites):
    files = [new_sites.files[0].replace("{channel}", str(i)) for i in range(1, 7)]
    for call in (lambda: learn.predict(files[0]), lambda: learn.dls.test_dl(files), lambda: learn.predict(files)):
        with pytest.raises(ValueError, match="_w1.png is an image of one channel, and a site has 6"):
            call()


@pytest.mark.parametrize("call", ["fit", "fit_one_cycle", "fine_tune", "fit_flat_cos", "fit_sgdr", "lr_find"])
def test_sites_without_labels_train_nothing(learners, new_sites, call):
    learn = calm(load_run(learners["valid"]["train_run"].path, new_sites))
    with pytest.raises(ValueError, match="sirna is unknown for all .* training sites"), learn.no_bar():
        getattr(learn, call)(*(dict(fit_sgdr=(1, 1), lr_find=()).get(call, (1,))))


def test_home_folder(learners, new_sites, monkeypatch):
    run = learners["valid"]["train_run"].path
    monkeypatch.setenv("HOME", str(run.parent))
    learn = load_run(f"~/{run.name}", new_sites)
    assert learn.path == run and screen_learner(learn.dls, recipe, path=f"~/{run.name}").path == run


def test_tta_prints_no_header(learn, capsys):
    learn.logger = print
    learn.tta(n=1)
    assert "train_loss" not in capsys.readouterr().out


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(6, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                                 nn.Flatten(), nn.Linear(8, 8))

    def forward(self, image):
        return self.net(image)


class SmallWithContext(Small):
    def forward(self, image, context):
        return self.net(image) + context[:, :1].float()


@pytest.mark.parametrize("make", [Small, SmallWithContext, lambda: Small().net])
def test_a_network_of_ones_own(learners, make, new_sites):
    own = calm(screen_learner(learners["valid"]["screen_learner"].dls, model=make()))
    with own.no_bar():
        own.fit_one_cycle(1, 1e-2)
    assert own.get_preds()[0].shape == (16, 8) and isinstance(own.loss_func, SoftmaxCrossEntropyLoss)
    assert len(own.predict(own.dls.valid_ds.items.iloc[0])) == 3 and "Conv2d" in str(own.summary())
    assert predict_sites(own, new_sites, progress=False).logits.shape == (len(new_sites), 8)
    with pytest.raises(ValueError, match=r"has no `embed\(image, context\)`"):
        embed_sites(own, new_sites, progress=False)


def test_learners_that_cannot_be(learners, sites):
    dls = learners["valid"]["screen_learner"].dls
    block = DataBlock(blocks=(SixChannelImageBlock, CategoryBlock), get_x=ColReader("files"), get_y=ColReader("sirna"))
    own = block.dataloaders(sites, bs=8)
    for args, message in (((own, "resnet10t"), "these batches have no context next to the image"),
                          ((dls, accuracy), "recipe is the function accuracy"),
                          ((dls, Small),
                           r"recipe is the class Small: a network of your own is given as model=Small\(\)"),
                          ((dls, recipe, accuracy),
                           "model is the function accuracy, .* metrics are given as metrics=accuracy"),
                          ((dls, "resnet18", recipe), "model is a Recipe"),
                          ((dls, recipe, Small), r"the class Small, expected a network: model=Small\("),
                          ((dls, recipe, "resnet18"),
                           r"an architecture is the second argument: screen_learner\(dls, 'resnet18'\)"),
                          ((dls, Small()), "recipe is a Small: a network of your own is given as model=")):
        with pytest.raises(ValueError, match=message):
            screen_learner(*args)
    plain = vision_learner(own, "resnet10t", n_in=6, pretrained=False)
    for call in (predict_sites, embed_sites):
        with pytest.raises(ValueError, match=f"{call.__name__} needs the batches of screen_dataloaders"):
            call(plain, sites, progress=False)


@pytest.mark.slow
def test_an_atlas_in_two_lines(several, tmp_path):
    "Labels, classes and channels are those of the atlas"
    atlas = read_screen(simulate_hpa(tmp_path / "atlas", n_images=40, n_test=0, n_external=0, image_size=32,
                                     min_positives=1, progress=False))
    for dls in (screen_dataloaders(atlas, bs=8), screen_dataloaders(select_sites(atlas), bs=8, channels=atlas.channels,
                                                                    classes=atlas.classes)):
        x, _, y = dls.one_batch()
        assert x.shape[1] == 4 and y.shape == (8, 28) and dls.train.target_name == "labels"
    with pytest.raises(ValueError, match="several labels each, which are not mixed"), several.no_bar():
        several.fit(1, cbs=ScreenMixUp())


@pytest.mark.slow
def test_home_folder_everywhere(small_run, small_screen, tmp_path, monkeypatch):
    "What reads or writes a run, predictions, a table or a store takes ~"
    shutil.copytree(small_run, tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(small_screen)
    screen = read_screen(small_screen)
    assert predict_run("~/run", screen, "test", progress=False).ids.tolist() == Predictions.load(
        "~/run/predictions/test.npz").ids.tolist()
    submit_run("~/run", screen, "~/sub.csv", say=lambda *a: None)
    assert read_meta("~/run/model.safetensors") is not None
    assert read_plate_map("~/sub.csv", dict(well="id_code")).shape[0] == len(pd.read_csv(tmp_path / "sub.csv"))
    x, wells = embed_run("~/run", screen, "test", progress=False, say=lambda *a: None)
    write_embeddings(x, wells, "~/e.npz")
    pack_screen(screen, "~/packed", progress=False)
    assert (tmp_path / "e.npz").exists() and len(open_store("~/packed")) == len(screen.sites())
    assert not (small_screen / "~").exists()


def test_loaders_of_a_recipe_take_a_screen(screen, sites):
    dls = recipe_dataloaders(screen, recipe, HELD)
    assert dls.vocab == screen_dataloaders(sites).vocab and len(dls.train_ds) + len(dls.valid_ds) == len(sites)
    assert recipe_dataloaders(screen, recipe, HELD, channels=(1, 2)).one_batch()[0].shape[1] == 2


@pytest.mark.slow
def test_the_learner_of_a_run(learners, sites, new_sites, screen):
    "Its own sites, any others, and its validation wells wherever they are among them"
    run = learners["valid"]["train_run"].path
    acc = calm(load_run(run, sites)).validate()[1]
    held = sites[sites.experiment == "HUVEC-03"]
    for given in ((), (screen,), (sites,), (pd.concat([held, new_sites], ignore_index=True),), (held,)):
        learn = calm(load_run(run, *given))
        assert set(learn.dls.valid.sites.id_code) == set(held.id_code) and learn.validate()[1] == pytest.approx(acc)
        assert learn.get_preds()[0].shape == (16, 8) and learn.predict(held.iloc[0])[2].shape == (8,)
        assert predict_sites(learn, held, progress=False).logits.shape == (16, 8)
    assert not len(learn.dls.train_ds)
    with pytest.raises(ValueError, match="no training sites"):
        learn.fit(1)
    assert set(load_run(run, sites, valid="experiment=HUVEC-02").dls.valid.sites.experiment) == {"HUVEC-02"}
    assert len(load_run(run, sites, valid=np.ones(len(sites), bool)).dls.valid.sites) == len(sites)
    for wrong, message in ((learn.dls, r"sites are ScreenDataLoaders, expected a table of sites or a screen: "
                            r"load_run\(run, dls.valid.sites\)"),
                           ("data", r"load_run\(run, read_screen\('data'\)\)")):
        with pytest.raises(ValueError, match=message):
            load_run(run, wrong)


@pytest.mark.slow
def test_a_loss_that_the_data_set_knows(sites, several):
    "A plain Learner needs none; rows that are unknown do not count"
    some = sites.assign(sirna=sites.sirna.where(np.arange(len(sites)) % 3 > 0))
    dls = screen_dataloaders(some, valid=HELD, bs=8)
    learn = calm(Learner(dls, ImageOnly(Small())))
    learn.fit(1, 1e-3)
    assert np.isfinite(learn.validate()[0])
    own = DataBlock(blocks=(SixChannelImageBlock, TargetBlock(sorted(sites.sirna.unique()))), get_x=ColReader("files"),
                    get_y=ColReader("sirna"))
    calm(Learner(own.dataloaders(sites, bs=8), Small())).fit(1, 1e-3)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 28))
    learn = calm(Learner(several.dls, ImageOnly(net)))
    learn.fit(1, 1e-3)
    probs = learn.get_preds()[0]
    assert probs.shape[1] == 28 and 0 <= probs.min() and probs.max() <= 1
    assert not torch.allclose(probs.sum(1), torch.ones(len(probs)))


def plain_cross_entropy(scores, y):
    return nn.functional.cross_entropy(scores, y)


def cross_entropy_of_rows(scores, y, reduction="mean"):
    return nn.functional.cross_entropy(scores, y, reduction=reduction)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), cross_entropy_of_rows, plain_cross_entropy])
def test_a_loss_without_activation(learners, loss):
    learn = calm(screen_learner(learners["valid"]["screen_learner"].dls, "resnet10t", loss_func=loss).to_fp32())
    learn.fit(1, 1e-4)
    name, number, probs = learn.predict(learn.dls.valid_ds.items.iloc[0])
    assert probs.sum() == pytest.approx(1, abs=1e-5) and name == str(learn.dls.vocab[int(number)])
    assert number == probs.argmax()
    _, y, decoded = learn.get_preds(with_decoded=True)
    assert decoded.shape == y.shape == (16,) and learn.loss_func is loss
    learn.show_results(max_n=2)
    if loss is plain_cross_entropy:
        with pytest.raises(ValueError,
                           match="the loss of each site is not known: give plain_cross_entropy a parameter "
                           "reduction='mean'"):
            ClassificationInterpretation.from_learner(learn)
        return
    interp = ClassificationInterpretation.from_learner(learn)
    assert interp.confusion_matrix().sum() == 16
    interp.plot_top_losses(2)
    assert getattr(loss, "reduction", "mean") == "mean"


def test_several_labels_are_no_confusion_matrix(several):
    interp = ClassificationInterpretation.from_learner(several)
    for call in (interp.confusion_matrix, interp.print_classification_report):
        with pytest.raises(ValueError,
                           match=r"several labels each, and ClassificationInterpretation counts one: f1_table\(y, "
                           r"probs > .5, names\)"):
            call()
    interp.plot_top_losses(2)
    assert len(titles()) == 2


def test_sites_that_nobody_labelled_are_not_wrong(learn, new_sites):
    dl = learn.dls.test_dl(new_sites, with_labels=True)
    with pytest.raises(ValueError, match="validate needs labels, and sirna is unknown for all"):
        learn.validate(dl=dl)
    with pytest.raises(ValueError, match="the loss of each site needs labels, and sirna is unknown for all"):
        Interpretation.from_learner(learn, dl=dl)
    learn.show_results(dl=dl, max_n=2)
    assert all(t.startswith("siRNA unknown, predicted ") and "wrong" not in t for t in titles())


def test_a_well_of_an_unknown_experiment_is_the_mean_of_its_sites(learn, new_sites):
    well = new_sites[new_sites.id_code == new_sites.id_code[0]]
    with warnings.catch_warnings(action="ignore"):
        scores = torch.cat([learn.get_preds(dl=learn.dls.test_dl(row), act=lambda x: x)[0]
                            for _, row in well.iterrows()])
        together = learn.predict(well)[2]
        same = learn.get_preds(dl=learn.dls.test_dl(well), act=lambda x: x)[0]
    torch.testing.assert_close(same, scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together, learn.loss_func.activation(scores.mean(0, keepdim=True))[0], atol=1e-4,
                               rtol=1e-4)


def test_a_plain_learner_says_that_it_predicts_one_site(learners, sites):
    learn = calm(Learner(learners["valid"]["screen_learner"].dls, ImageOnly(Small())))
    with pytest.warns(UserWarning,
                      match="one item has 2 sites, and fastai's Learner.predict shows the first of them alone"):
        learn.predict(sites[sites.id_code == sites.id_code[0]])


def test_an_architecture_as_a_function(learners):
    learn = screen_learner(learners["valid"]["screen_learner"].dls, resnet18)
    assert type(learn.model.body).__name__ == type(screen_learner(learn.dls, "resnet18").model.body).__name__


def test_a_measurement_is_no_class(sites):
    with pytest.raises(ValueError,
                       match="targets are classes, and dose has .* different numbers for .* wells; group them"):
        screen_dataloaders(sites.assign(dose=np.random.default_rng(0).random(len(sites))), target="dose")
