"What a stage can be told about its weights, through a recipe and a learner."

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from cases import each
import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ShowGraphCallback
from fastai.optimizer import OptimWrapper

from rcic_fastai.data.select import select_sites
from rcic_fastai.model.core import param_groups
from rcic_fastai.recipe.published import change_recipe, get_recipe, recipes
from rcic_fastai.run.train import find_lr, logger, train_run
from rcic_fastai.screen.read import read_screen
from rcic_fastai.recipe.settings import DataSettings, LossSettings, ModelSettings, Recipe, TrainSettings
from rcic_fastai.train.schedule import schedule_function
from rcic_fastai.train.loaders import recipe_dataloaders
from rcic_fastai.train.learner import fit_stage, screen_learner
from rcic_fastai.train.network import recipe_model
from rcic_fastai.train.averaging import KeepBest, geometric_rates

small = replace(Recipe(), model=ModelSettings(arch="resnet10t", arch_options=dict(channels=[8, 8, 8, 8], stem_width=8)),
                data=DataSettings(batch_size=16, cache=True, d4=False, intensity=0.0))


@pytest.fixture(scope="module")
def screen(small_screen):
    return read_screen(small_screen)


@pytest.fixture(scope="module")
def sites(screen):
    return select_sites(screen)


def fit(sites, recipe, *cbs, valid=None, seed=0, model=None):
    torch.manual_seed(seed)
    learn = screen_learner(recipe_dataloaders(sites, recipe, valid), recipe, model)
    with learn.no_bar(), learn.no_logging():
        fit_stage(learn, recipe.train, cbs)
    return learn


@each("n", [1, 2, 3, 7])
@each("ratio", [1, 3.5, 1e4])
def test_rates_are_geometric(n, ratio):
    rates = geometric_rates(2e-3, ratio, n)
    assert len(rates) == n and rates[-1] == pytest.approx(2e-3)
    if n > 1:
        assert rates[0] == pytest.approx(2e-3 / ratio)
        np.testing.assert_allclose(rates[1:] / rates[:-1], ratio ** (1 / (n - 1)))


@pytest.mark.slow
@each("schedule", ["one_cycle", "cosine", "steps", "exponential", "constant"])
def test_each_group_follows_its_rate(sites, schedule):
    class Rates(Callback):
        order, run_valid = 100, False

        def before_fit(self):
            self.seen = []

        def after_pred(self):
            self.seen.append([h["lr"] for h in self.opt.hypers])

    stage = TrainSettings(epochs=2, lr=1e-3, lr_ratio=100, schedule=schedule, milestones=[0.5], decay=0.5)
    rates = Rates()
    learn = fit(sites, replace(small, train=stage), rates)
    seen = np.array(rates.seen)
    np.testing.assert_allclose(seen / seen[:, -1:], [[1e-2, 1e-1, 1]] * len(seen))
    if schedule != "one_cycle":
        n = len(learn.dls.train)
        np.testing.assert_allclose(seen[:, -1], [schedule_function(stage)(i / (2 * n)) for i in range(2 * n)])
    else:
        assert seen[:, -1].max() == pytest.approx(1e-3, rel=0.05)


@each("arch", ["efficientnet_lite0", "densenet121", "se_resnext50_32x4d", "resnet10t", "convnext_atto"])
def test_every_backbone_has_three_groups(arch):
    "Stem, later half, head: every weight once, so that learning rates and freezing reach all of them"
    model = recipe_model(replace(small, model=ModelSettings(arch=arch)), 4)
    groups = param_groups(model)
    flat = [id(p) for g in groups for p in g]
    assert len(groups) == 3 and all(len(g) for g in groups)
    assert len(set(flat)) == len(flat) == len(list(model.parameters()))


def test_accumulation_equals_one_large_batch(sites):
    "Four batches of 8 and one of 32, for a network without BatchNorm"
    own = sites.head(32)
    finals = []
    for bs, accumulate in ((8, 4), (32, 1)):
        data = replace(small.data, batch_size=bs, domain=None)
        stage = TrainSettings(epochs=3, lr=0.1, schedule="constant", weight_decay=0.0, accumulate=accumulate)
        recipe = replace(small, data=data, train=stage, model=ModelSettings(arch="test_convnext"))
        torch.manual_seed(0)
        learn = screen_learner(recipe_dataloaders(own, recipe), recipe)
        assert not any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in learn.model.modules())
        learn.opt_func = partial(OptimWrapper, opt=torch.optim.SGD)
        before = [p.detach().clone() for p in learn.model.parameters()]
        with learn.no_bar(), learn.no_logging():
            fit_stage(learn, stage)
        finals.append([p.detach() for p in learn.model.parameters()])
        assert any(not torch.equal(a, b) for a, b in zip(before, finals[-1]))
    for a, b in zip(*finals):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_new_stage_forgets_gradients_of_the_last(sites):
    "A stage that ends within a virtual batch leaves gradients behind"
    recipe = change_recipe(replace(small, train=TrainSettings(epochs=1, accumulate=50, lr=1e-3)))
    learn = fit(sites, recipe)
    assert any(p.grad is not None for p in learn.model.parameters())
    seen = []

    class First(Callback):
        def before_fit(self):
            seen.extend(p.grad for p in self.learn.model.parameters())

    with learn.no_bar(), learn.no_logging():
        fit_stage(learn, recipe.train, [First()])
    assert seen and all(g is None for g in seen)


@pytest.mark.slow
def test_patience_and_best_need_wells_set_aside(sites):
    stage = TrainSettings(epochs=6, lr=1e-12, schedule="constant", weight_decay=0.0, patience=2, keep="best",
                          validate_steps=2)
    learn = fit(sites, replace(small, train=stage), valid="experiment=HUVEC-03")
    assert len(learn.recorder.values) == 3  # the first, and two that were no better
    assert len(fit(sites, replace(small, train=stage)).recorder.values) == 6


def test_the_best_weights_are_those_of_the_best_validation(sites, tmp_path):
    class Spoil(Callback):
        order, run_valid = 55, False

        def after_train(self):
            if self.epoch == 2:
                self.learn.model.head.classifier.weight.data.mul_(-100)

    torch.manual_seed(0)
    recipe = replace(small, train=TrainSettings(epochs=3, lr=3e-3), loss=LossSettings("cross_entropy", {}),
                     model=replace(small.model, head="linear"))
    learn, best = screen_learner(recipe_dataloaders(sites, recipe, "experiment=HUVEC-03"), recipe), KeepBest(
        "valid_loss", tmp_path / "best.safetensors")
    with learn.no_bar(), learn.no_logging():
        fit_stage(learn, recipe.train, [best, Spoil()])
        losses = [v[1] for v in learn.recorder.values]
        found = learn.validate()[0]  # which begins a new log
    assert losses.index(min(losses)) < 2 and best.best == min(losses) and found == pytest.approx(best.best, abs=1e-4)
    assert (tmp_path / "best.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("change", ["train.ema=0.9", "train.average=2"])
def test_means_end_a_stage_with_other_weights_and_statistics(sites, change):
    """The mean is no network that was trained; its BatchNorm statistics are pooled anew, without a trace in the
    order of the batches"""
    plain = replace(small, train=TrainSettings(epochs=3, lr=3e-3))
    last, mean = fit(sites, plain), fit(sites, change_recipe(plain, change))
    assert last.recorder.values == mean.recorder.values or [v[:-1] for v in last.recorder.values] == [
        v[:-1] for v in mean.recorder.values]
    assert last.dls.train.epoch == mean.dls.train.epoch == 3
    name = next(n for n, m in last.model.named_modules() if isinstance(m, torch.nn.BatchNorm2d))
    bn, other = last.model.get_submodule(name), mean.model.get_submodule(name)
    assert not torch.equal(bn.weight, other.weight) and not torch.equal(bn.running_mean, other.running_mean)
    assert torch.isfinite(other.running_var).all()


@each("settings, message", [
    (["train.ema=1"], "train.ema is 1.0, expected a decay below 1"),
    (["train.ema=0.9", "train.average=2"], "choose one"),
    (["train.average=1", "train.keep=best"], "choose one"),
    (["train.average=2", "train.patience=1"], "train.patience may leave out"),
    (["train.freeze_epochs=99"], "expected at most the"), (["train.keep=first"], 'expected one of "last", "best"'),
    (["train.lr_ratio=0.5"], "expected at least 1"), (["per_cell_type=true", "cell_type.epochs=2"], "leaves nothing"),
    (["inference.assignment=zero"], '"exact", "vote", "vote_zero"'),
    (["checkpoint.keep_last=0"], "checkpoint.keep_last is 0, expected at least 1"),
    (["train.emma=0.9"], "did you mean 'train.ema'"), (["train.freeze_epochs=yes"], "expected int")])
def test_recipes_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        change_recipe(get_recipe("laptop"), *settings)


def test_originals_are_there():
    for name in ("efficientnet_b5_amsoftmax", "densenet201_amsoftmax", "efficientnet_b2_crossentropy",
                 "seresnext101_amsoftmax"):
        r, original = get_recipe(name), get_recipe(name, faithful=True)
        assert (original.model.first_conv, original.valid, original.inference.assignment) == (
            "repeat", "well=0/5", "vote_zero")
        assert original.data.domain is None and original.inference.batchnorm == "running"
        assert r.cell_type.epochs and r.inference.assignment == "vote"
    b5, b2 = recipes["efficientnet_b5_amsoftmax"], recipes["efficientnet_b2_crossentropy"]
    assert (b5.train.optimizer, b5.train.lr, b5.data.batch_size, b5.train.schedule, b5.train.decay,
            b5.train.freeze_epochs) == ("radam", 1e-4, 4, "exponential", 0.95, 1)
    assert (b2.train.optimizer, b2.train.lr, b2.data.batch_size, b2.train.decay, b2.train.freeze_epochs,
            b2.loss.name) == ("adam", 1e-3, 8, 0.99, 0, "cross_entropy")
    virtual = [recipes[n].data.batch_size * recipes[n].train.accumulate
               for n in ("densenet121_accumulate", "resnext50_accumulate")]
    assert virtual == [30, 60] and recipes["densenet121_accumulate"].train.validate_steps == 500
    with pytest.raises(ValueError, match="nothing was corrected in 'laptop'"):
        get_recipe("laptop", faithful=True)


@pytest.mark.slow
def test_fastai_tools_work(screen, sites, tmp_path, monkeypatch):
    "`lr_find` with suggestions and a picture, `fine_tune`, `ShowGraphCallback`"
    import matplotlib

    matplotlib.use("Agg")
    found = find_lr(screen, small, steps=30, path=tmp_path / "lr.png", say=lambda *a: None)
    assert set(found._fields) == {"valley", "slide", "steep", "minimum"} and all(np.isfinite(v) for v in found)
    assert (tmp_path / "lr.png").stat().st_size > 5000
    learn = screen_learner(recipe_dataloaders(sites, small, "experiment=HUVEC-03"), small)
    before = learn.model.body.backbone.net.conv1[0].weight.clone()
    with learn.no_logging():
        learn.fine_tune(1, 1e-2, cbs=ShowGraphCallback())
    assert not torch.equal(before, learn.model.body.backbone.net.conv1[0].weight) and len(learn.recorder.values) == 1


def test_tensorboard_gets_a_log(screen, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    recipe = replace(small, train=TrainSettings(epochs=1))
    train_run(screen, recipe, tmp_path / "run", say=lambda *a: None,
              cbs=[logger("tensorboard", tmp_path / "run", recipe)])
    events = list((tmp_path / "run/tensorboard").glob("events.*"))
    assert events and events[0].stat().st_size > 500
    with pytest.raises(ValueError, match="log is 'mlflow', expected 'tensorboard' or 'wandb'"):
        logger("mlflow", tmp_path, recipe)


def test_weights_and_biases_gets_the_recipe(screen, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install rcic_fastai[tracking]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = replace(small, train=TrainSettings(epochs=1))
    train_run(screen, recipe, tmp_path / "run", say=lambda *a: None, cbs=[logger("wandb", tmp_path / "run", recipe)])
    assert wandb.run.config["train"]["epochs"] == 1 and list((tmp_path / "run/wandb").glob("offline-run-*"))
    wandb.finish()
