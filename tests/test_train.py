"Learner, mixed precision, optimiser, stages and run folders."

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from cases import each
import torch
from fastai.callback.core import Callback
from fastai.learner import Learner
from fastai.optimizer import OptimWrapper
from torch import nn

from rcic_fastai.data.select import select_sites
from rcic_fastai.model.core import load_weights, save_weights
from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe, recipes
from rcic_fastai.run.train import train_run
from rcic_fastai.screen.read import read_screen
from rcic_fastai.data.statistics import measure_stats, sample_sites
from rcic_fastai.recipe.settings import recipe_from_dict
from rcic_fastai.train.loaders import recipe_dataloaders
from rcic_fastai.train.optimizer import optimizers, radam
from rcic_fastai.train.precision import AutoMixedPrecision, fast_precision
from rcic_fastai.train.learner import LossOnDevice, ScreenLearner, fit_stage, screen_learner
from rcic_fastai.train.network import recipe_model
from rcic_fastai.train.controls import pretrain_on_controls
from rcic_fastai.run.folder import load_run, read_run

laptop = change_recipe(laptop_recipe(get_recipe("laptop"), 1, virtual_batch=16), "data.cache=false",
                       "data.epoch_sites=0")
tiny = change_recipe(laptop, "model.arch=resnet10t", 'model.arch_options={"channels": [8, 8, 8, 8], "stem_width": 8}')


def quiet(*args):
    pass


@pytest.fixture(scope="module")
def screen(small_screen):
    return read_screen(small_screen)


@pytest.fixture(scope="module")
def sites(screen):
    return select_sites(screen)


def radam_by_hand(p, grads, lr, wd, beta1=0.9, beta2=0.999, eps=1e-8):
    "Liu et al. 2020, algorithm 2, with decoupled weight decay, in float64."
    m, v, rho_inf = np.zeros_like(p), np.zeros_like(p), 2 / (1 - beta2) - 1
    for t, g in enumerate(grads, 1):
        p = p * (1 - lr * wd)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        m_hat, rho = m / (1 - beta1**t), rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        if rho > 5:
            rect = np.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            p = p - lr * rect * m_hat * np.sqrt(1 - beta2**t) / (np.sqrt(v) + eps)
        else:
            p = p - lr * m_hat
    return p


def test_radam_is_the_published_one():
    rng = np.random.default_rng(0)
    start, grads = rng.standard_normal(5), rng.standard_normal((20, 5))
    w = nn.Parameter(torch.tensor(start))
    opt = radam([[w]], lr=0.01)
    opt.set_hypers(wd=0.1)
    for g in grads:
        w.grad = torch.tensor(g)
        opt.step()
    np.testing.assert_allclose(w.detach().numpy(), radam_by_hand(start, grads, 0.01, 0.1), rtol=1e-6)


def plain_loop(name, groups, **settings):
    "PyTorch's own optimiser, one parameter after the other"
    make = dict(radam=partial(torch.optim.RAdam, decoupled_weight_decay=True), adam=torch.optim.Adam,
                adamw=torch.optim.AdamW)[name]
    return make([{"params": g} for g in groups], foreach=False, **settings)


@pytest.mark.parametrize("name", optimizers)
def test_optimisers_equal_a_plain_loop(name):
    """Per-group learning rates, decay, a scheduled momentum, a group that is frozen for a while, state saved and
    loaded, and a change of layout."""
    torch.manual_seed(0)
    shapes = [[(4, 3, 3, 3), (4,)], [(8, 4)], [(5,), (2, 5)]]
    ours, theirs = ([[nn.Parameter(torch.ones(s).mul_(i + 1)) for s in g] for i, g in enumerate(shapes)]
                    for _ in range(2))
    opt, other = optimizers[name](ours, lr=1e-3, eps=1e-2), plain_loop(name, theirs, lr=1e-3, eps=1e-2)
    opt.set_hypers(wd=[0.0, 0.1, 0.2], lr=slice(1e-3, 1e-1))
    assert [h["lr"] for h in opt.hypers] == pytest.approx([1e-3, 1e-2, 1e-1])
    assert [h["wd"] for h in opt.hypers] == [0.0, 0.1, 0.2]
    for g, wd in zip(other.param_groups, (0.0, 0.1, 0.2)):
        g["weight_decay"] = wd
    for step in range(14):
        opt.set_hyper("lr", np.array([1e-3, 1e-2, 1e-1]) * (step + 1) / 14)
        opt.set_hyper("mom", 0.95 - step / 100)
        for g, h in zip(other.param_groups, opt.hypers):
            g["lr"], g["betas"] = float(h["lr"]), (0.95 - step / 100, 0.999)
        # the weights of the convolution move to another layout, with what is known of them; then all is saved and
        # loaded
        if step == 7:
            ours[0][0].data = ours[0][0].data.contiguous(memory_format=torch.channels_last)
            saved = {k: v for k, v in opt.state_dict().items()}
            opt = optimizers[name](ours, lr=1e-3)
            opt.load_state_dict(saved)
        for a, b in zip(sum(ours, []), sum(theirs, [])):
            a.grad = None if a.shape == (8, 4) and step < 3 else torch.randn_like(b)
            b.grad = None if a.grad is None else a.grad.clone()
        opt.step()
        other.step()
        for a, b in zip(sum(ours, []), sum(theirs, [])):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-6)
    opt.zero_grad()
    assert all(p.grad is None for p in sum(ours, []))


def test_optimisers_take_the_kernel_that_is_there():
    w = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    assert all(g["fused"] for name in optimizers for g in optimizers[name]([w]).opt.param_groups)
    elsewhere = [nn.Parameter(torch.ones(2, device="meta"))]  # as on a device that has no fused kernel
    assert all(g["foreach"] for name in optimizers for g in optimizers[name]([elsewhere]).opt.param_groups)
    assert all(g["decoupled_weight_decay"] for g in radam([elsewhere]).opt.param_groups)


def test_freezing_keeps_the_body_and_starts_radam_anew(sites):
    learn = screen_learner(recipe_dataloaders(sites, tiny), tiny)
    learn.create_opt()
    learn.freeze()
    before = {k: v.clone() for k, v in learn.model.named_parameters() if v.ndim > 1}
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, lr=slice(1e-4, 1e-2))
        moved = {k for k, v in learn.model.named_parameters() if v.ndim > 1 and not torch.equal(v, before[k])}
        assert moved == {"head.classifier.weight"}
        assert [h["lr"] for h in learn.opt.hypers] == pytest.approx([1e-4, 1e-3, 1e-2])
        learn.unfreeze()
        assert not learn.opt.opt.state
        learn.fit(1)
    assert all(not torch.equal(v, before[k]) for k, v in learn.model.named_parameters() if v.ndim > 1)


def test_precision_auto_never_emulates(monkeypatch):
    "Nor does it take bfloat16 for networks that are faster without"
    monkeypatch.delenv("RCIC_BF16", raising=False)
    cpu, dense, depthwise = (torch.device("cpu"), nn.Conv2d(8, 8, 3, groups=4),
                             nn.Sequential(nn.Conv2d(8, 8, 3, groups=8)))
    for flag, expected in ((False, "fp32"), (True, "bf16")):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda flag=flag: flag, raising=False)
        assert fast_precision(cpu) == fast_precision(cpu, dense) == expected
        assert fast_precision(cpu, depthwise) == "fp32"


@pytest.mark.slow
@each("arch, precision, setting, expected", [
    ("resnet10t", "fp32", "auto", True), ("efficientnet_lite0", "fp32", "auto", True),
    ("efficientnet_lite0", "bf16", "auto", False),
    ("efficientnet_lite0", "bf16", "true", True), ("resnet10t", "fp32", "false", False)])
def test_memory_layout_per_architecture(sites, arch, precision, setting, expected):
    recipe = change_recipe(laptop, f"device.precision={precision}", f"device.channels_last={setting}",
                           f"model.arch={arch}", "model.arch_options={}")
    learn = screen_learner(recipe_dataloaders(sites, recipe), recipe)
    learn("before_fit")
    spatial = next(p for p in learn.model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1)
    assert (spatial.stride(1) == 1) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mixed_precision_on_the_cpu(screen, sites, precision):
    "The network runs in the precision asked for, the loss sees float32, and autocast is off afterwards."
    seen = []
    recipe = change_recipe(laptop, f"device.precision={precision}", "model.arch=resnet10t", "data.crop=32")
    dls = recipe_dataloaders(sites.groupby("experiment").head(8).reset_index(drop=True), recipe)
    learn = screen_learner(dls, recipe)
    handle = next(m for m in learn.model.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(
        lambda m, i, o: seen.append(o.dtype))
    with learn.no_bar(), learn.no_logging():
        fit_stage(learn, recipe.train)
        learn.validate(dl=dls.train)
        learn.get_preds(dl=dls.test_dl(sites.head(4)))
    handle.remove()
    assert set(seen) == {torch.float32 if precision == "fp32" else torch.bfloat16}
    assert learn.pred.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in learn.model.parameters())


def test_gradients_of_tiny_images_are_finite(sites):
    """Of 16 pixels one is left before the last stage, where oneDNN leaves part of a bfloat16 gradient as it found
    the memory."""
    recipe = change_recipe(laptop, "device.precision=bf16", "model.arch=resnet10t", "data.crop=16")
    learn = (screen_learner(recipe_dataloaders(sites.groupby("experiment").head(8).reset_index(drop=True), recipe),
                            recipe))
    junk = [torch.full((9 * c * c * 2,), torch.nan, dtype=t) for c in (64, 128, 256)
            for t in (torch.float32, torch.bfloat16) for _ in range(8)]
    del junk
    with learn.no_bar(), learn.no_logging():
        fit_stage(learn, recipe.train)
    assert all(p.isfinite().all() for p in learn.model.parameters())


def one_group(model):
    return [list(model.parameters())]


class Spying(nn.Module):
    "A network that notes how it was called"

    def __init__(self, n_classes=8):
        super().__init__()
        self.norm, self.fc, self.seen = nn.BatchNorm2d(6), nn.Linear(6, n_classes), []

    def forward(self, x, context):
        self.seen.append((self.training, torch.is_inference_mode_enabled(), type(x), type(context)))
        return self.fc(self.norm(x).mean((2, 3)))


def test_inference_mode_and_plain_tensors(sites):
    """No gradients and no types of fastai where the network runs; ordinary tensors come out, and gradients flow
    afterwards."""
    recipe = change_recipe(laptop, "loss.name=cross_entropy", "loss.options={}", "model.head=linear",
                           "data.n_controls=0", "device.precision=fp32")
    dls = recipe_dataloaders(sites, recipe, valid="experiment=HUVEC-03")
    learn = screen_learner(dls, recipe, Spying())
    learn.splitter = one_group
    with learn.no_bar(), learn.no_logging():
        fit_stage(learn, recipe.train)
        assert {s[:2] for s in learn.model.seen} == {(True, False), (False, True)}
        assert {s[2:] for s in learn.model.seen} == {(torch.Tensor, torch.Tensor)}
        learn.model.seen.clear()
        # fails with a tensor of inference mode
        scores, y = learn.get_preds(cbs=Callback(after_pred=lambda self: self.learn.pred.mul_(1.0)))
        views, _ = learn.tta(n=2)
        learn.validate()
        assert {s[:2] for s in learn.model.seen} == {(False, True)}
        # statistics of the batch, as the callback says, and predictions that are tensors like others
        expected = []
        learn.model.train()
        for x, context, _ in dls.valid.new(shuffle=False):
            x = x.as_subclass(torch.Tensor).contiguous(memory_format=torch.channels_last)
            expected.append(learn.model(x, context).detach().softmax(1))
        torch.testing.assert_close(scores.as_subclass(torch.Tensor).sort(0).values, torch.cat(expected).sort(0).values,
                                   rtol=1e-4, atol=1e-5)
        assert not scores.is_inference() and not views.is_inference() and len(scores) == len(y) == len(dls.valid_ds)
        nn.Linear(8, 1)(scores.as_subclass(torch.Tensor)).sum().backward()
        learn.lr_find(num_it=4, show_plot=False)
        fit_stage(learn, recipe.train)
    assert "forward" not in learn.model.__dict__


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_validation_leaves_no_mode_behind(sites, error):
    "Neither inference mode nor autocast; and the next fit puts the network in order."

    class Failing(Spying):
        fail = True

        def forward(self, x, context):
            if self.fail and not self.training:
                raise error("no")
            return super().forward(x, context)

    recipe = change_recipe(laptop, "loss.name=cross_entropy", "loss.options={}", "model.head=linear",
                           "device.precision=bf16")
    learn = screen_learner(recipe_dataloaders(sites, recipe, valid="experiment=HUVEC-03"), recipe, Failing())
    learn.splitter = one_group
    with learn.no_bar(), learn.no_logging():
        with pytest.raises(error, match="no"):
            fit_stage(learn, recipe.train)
        assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
        learn.model.fail = False
        fit_stage(learn, recipe.train)
    assert "forward" not in learn.model.__dict__


@pytest.mark.slow
def test_compiling_keeps_names_and_statistics(sites, tmp_path):
    """The body is compiled in place: it trains compiled, is validated as written, and what is saved fits the plain
    network."""
    calls, recipe = [], change_recipe(tiny, "device.compile=eager")

    def counting(graph, inputs):
        return lambda *args: (calls.append(1), graph(*args))[1]

    dls = recipe_dataloaders(sites, recipe, valid="experiment=HUVEC-03")
    plain, learn = recipe_model(recipe, 8), screen_learner(dls, recipe)
    assert learn.model.body._compiled_call_impl is not None
    assert list(learn.model.state_dict()) == list(plain.state_dict())
    learn.model.body.compile(backend=counting)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        save_weights(learn.model, tmp_path / "model.safetensors")
        load_weights(plain, tmp_path / "model.safetensors")
        assert len(calls) == len(dls.train)  # and none in validation, where the BatchNorms have other statistics
        scores, _ = learn.get_preds()
        expected, _ = screen_learner(dls, tiny, plain).get_preds()
    x, context, _ = dls.one_batch()
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(learn.model.eval().embed(x, context), plain.eval().embed(x, context))
    assert len(calls) == len(dls.train) + 1 and learn.model.swap_head(3)(x, context).shape[1] == 3
    with pytest.raises(ValueError, match="compiled code cannot keep the domains of a batch apart"):
        screen_learner(dls, change_recipe(recipe, "data.domains_per_batch=2"))


@pytest.mark.slow
def test_losses_of_the_steps_are_those_of_fastai(sites):
    def losses(cls):
        learn = screen_learner(recipe_dataloaders(sites, tiny, valid="experiment=HUVEC-03"), tiny)
        learn.__class__ = cls
        if cls is Learner:
            learn.remove_cb(LossOnDevice)
        with learn.no_bar(), learn.no_logging():
            fit_stage(learn, replace(tiny.train, epochs=2))
        return learn.recorder

    ours, theirs = losses(ScreenLearner), losses(Learner)
    assert type(ours.smooth_loss) is not type(theirs.smooth_loss) and len(ours.losses) == len(theirs.losses) == 4
    torch.testing.assert_close(torch.stack(ours.losses), torch.stack(theirs.losses))
    assert ours.values == theirs.values and ours.lrs == theirs.lrs and list(ours.hps["mom"]) == list(theirs.hps["mom"])


def test_every_callback_hears_what_it_knows(sites):
    """In the order of fastai, whether an event is defined by the class or given to the object; one that was off is
    on again after the fit."""
    heard = []

    class Late(Callback):
        order = 5

        def after_pred(self):
            heard.append("late")

        def before_fit(self):
            self.run = False

    early = Callback(after_pred=lambda self: heard.append("early"))
    learn = screen_learner(recipe_dataloaders(sites, tiny), tiny, cbs=[Late(), early])
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        assert set(heard) == {"early"} and learn.late.run
        heard.clear()
        learn.late.before_fit = lambda: None
        learn.fit(1)
    assert heard[:4] == ["early", "late"] * 2
    with pytest.raises(Exception, match="missing after_everything"):
        learn("after_everything")


def test_fp16_is_refused_on_the_cpu(sites):
    recipe = change_recipe(laptop, "device.precision=fp16")
    learn = screen_learner(recipe_dataloaders(sites, recipe), recipe)
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match="'fp16' cannot train on a CPU"):
        fit_stage(learn, recipe.train)


def test_gradient_accumulation_equals_a_large_batch(sites):
    "Four batches of 4 make one step, with the gradient of one batch of 16 (network without BatchNorm)."

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 8)

        def forward(self, x, context):
            return self.fc(x.mean((2, 3)))

    def gradients(bs, accumulate):
        class Recording(torch.optim.SGD):
            def step(self, closure=None):
                seen.append(self.param_groups[0]["params"][0].grad.clone())
                return super().step(closure)

        def opt_func(params, lr, **kwargs):
            return OptimWrapper(params, opt=Recording, lr=lr, momentum=0.9)

        recipe = change_recipe(laptop, f"data.batch_size={bs}", "data.domain=null", "data.d4=false", "data.intensity=0",
                               "model.head=linear",
                               "loss.name=cross_entropy", "loss.options={}", f"train.accumulate={accumulate}",
                               "data.crop=null",
                               "device.channels_last=false")
        table, seen = sites[sites.experiment == "HUVEC-01"].iloc[:16].reset_index(drop=True), []
        dls = recipe_dataloaders(table, recipe, classes=list(range(8)))
        torch.manual_seed(0)
        model = Net()
        loss = screen_learner(dls, recipe, model).loss_func
        learn = Learner(dls, model, loss_func=loss, opt_func=opt_func, splitter=lambda m: [list(m.parameters())])
        with learn.no_bar(), learn.no_logging():
            fit_stage(learn, recipe.train)
        return seen

    (small,), (large,) = gradients(4, 4), gradients(16, 1)
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_same_seed_same_weights(sites):
    def train():
        learn = screen_learner(recipe_dataloaders(sites, laptop), laptop)
        with learn.no_bar(), learn.no_logging():
            fit_stage(learn, laptop.train)
        return learn.model.state_dict()

    a, b = train(), train()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("by", ["screen", "experiment", "plate"])
def test_measured_statistics(screen, sites, by):
    dls = recipe_dataloaders(sites, laptop, experiments=screen.experiments)
    stats = measure_stats(dls, sites, by)
    from rcic_fastai.data.store import read_site

    own = {"screen": sites, "experiment": sites[sites.experiment == "HUVEC-02"],
           "plate": sites[(sites.experiment == "HUVEC-02") & (sites.plate == 3)]}[by]
    pixels = np.stack([read_site(f) for f in own.files]).astype(np.float64)
    index = {"screen": (), "experiment": (1,), "plate": (1, 2)}[by]
    np.testing.assert_allclose(stats.mean[index].numpy(), pixels.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(stats.std[index].numpy(), pixels.std((0, 2, 3)), rtol=1e-4)


def test_sample_sites_takes_some_of_each(sites):
    sample = sample_sites(sites, "plate", n=3)
    assert (sample.groupby(["experiment", "plate"]).size() == 3).all()
    assert sample.equals(sample_sites(sites, "plate", n=3))
    assert not sample.index.equals(sample_sites(sites, "plate", n=3, seed=1).index)


def test_pretraining_keeps_the_body(screen, tmp_path):
    recipe = change_recipe(laptop, "pretrain.epochs=1", "pretrain.lr=0.001")
    learn = pretrain_on_controls(screen, recipe, path=tmp_path)
    controls = screen.wells[(screen.wells.well_type != "treatment") & (screen.wells.split == "train")]
    assert sorted(learn.dls.vocab) == sorted(controls.sirna.unique())
    body = {k: v.clone() for k, v in learn.model.body.state_dict().items()}
    model = learn.model.swap_head(8)
    assert all(torch.equal(v, body[k]) for k, v in model.body.state_dict().items())
    assert model(torch.zeros(2, 6, 48, 48), torch.zeros(2, 3, dtype=torch.long)).shape == (2, 8)


@pytest.mark.slow
def test_run_with_pretraining_writes_its_folder(screen, tmp_path):
    run = tmp_path / "run"
    train_run(screen, change_recipe(laptop, "pretrain.epochs=1"), run, say=quiet)
    assert {p.name for p in run.iterdir()} == {"history.csv", "recipe.json", "run.json", "model.safetensors"}
    history = pd.read_csv(run / "history.csv")
    assert list(history.columns) == ["stage", "epoch", "train_loss", "accuracy", "time"]
    assert list(history.stage) == ["pretrain", "train"]


def test_run_comes_back(small_run, small_screen):
    recipe, info = read_run(small_run)
    assert info["classes"] == list(range(8)) and info["target"] == "sirna" and info["valid"] == "experiment=HUVEC-03"
    assert {w.split("_")[0] for w in info["valid_wells"]} == {"HUVEC-03"}
    screen = read_screen(small_screen)
    a, b = (load_run(small_run, select_sites(screen, "test")) for _ in range(2))
    assert all(torch.equal(v, b.model.state_dict()[k]) for k, v in a.model.state_dict().items())
    assert recipe_from_dict(json.loads((small_run / "recipe.json").read_text())) == recipe


def test_damaged_runs_are_refused(small_run, small_screen, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(small_run, copy)
    sites = select_sites(read_screen(small_screen), "test")
    (copy / "model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="model.safetensors"):
        load_run(copy, sites)
    (copy / "recipe.json").unlink()
    with pytest.raises(FileNotFoundError, match="recipe.json is missing"):
        load_run(copy, sites)


def test_a_target_that_is_the_domain_switches_domain_batches_off(screen, tmp_path):
    said = []
    wells = screen.wells.copy()
    learn = train_run(screen, laptop, tmp_path / "run", target="experiment", valid="plate=4", say=said.append)
    assert learn.dls.train.domain is None and read_run(tmp_path / "run")[0].inference.batchnorm == "running"
    assert any("batches are mixed" in s for s in said) and screen.wells.equals(wells)


@pytest.mark.slow
@each("standardize", ["image", "plate", "experiment", "screen"])
def test_every_standardisation_reaches_new_experiments(screen, tmp_path, standardize):
    run = tmp_path / "run"
    train_run(screen, change_recipe(laptop, f"data.standardize={standardize}", "model.arch=resnet10t"), run, say=quiet)
    learn = load_run(run, select_sites(screen, "test"))
    x, *_ = learn.dls.test_dl(select_sites(screen, "test")).one_batch()
    assert x.isfinite().all() and abs(float(x.mean())) < 1.5


def test_errors_come_before_training(screen, tmp_path):
    for kwargs, message in ((dict(target="dose"), "target 'dose' is no column"),
                            (dict(valid="experiment=HUVEC-99"), "HUVEC-99"),
                            (dict(wells="some"), "wells is 'some'")):
        with pytest.raises(ValueError, match=message):
            train_run(screen, laptop, tmp_path / "run", say=quiet, **kwargs)
    assert not (tmp_path / "run").exists()


def test_published_recipe_has_the_published_settings():
    r = recipes["seresnext101_amsoftmax"]
    assert (r.train.epochs, r.train.lr, r.train.weight_decay, r.loss.options["gamma"]) == (20, 1e-4, 1e-4, 2.0)
    assert replace(r, seed=1) != r
    assert isinstance(AutoMixedPrecision("bf16"), AutoMixedPrecision)
