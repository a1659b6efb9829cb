"Runs of all stages: domains with controls, mixing, pseudo-labels, networks per cell type, the published systems."

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

import rcic_fastai.cli.core as cli
from rcic_fastai.data.select import select_sites
from rcic_fastai.data.context import MixedContext
from rcic_fastai.predict.core import Predictions, well_accuracy
from rcic_fastai.predict.sites import predict_sites
from rcic_fastai.run.predict import embed_run, predict_run, write_embeddings
from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe, small_resnet
from rcic_fastai.run.train import control_sites, held_out, train_run, training_sites
from rcic_fastai.screen.read import read_screen
from rcic_fastai.cli.script import CliError
from rcic_fastai.screen.simulate import simulate_screen
from rcic_fastai.data.statistics import complete_stats
from rcic_fastai.recipe.settings import ModelSettings, Recipe, TrainSettings
from rcic_fastai.train.schedule import schedule_function
from rcic_fastai.train.loaders import recipe_dataloaders
from rcic_fastai.train.learner import fit_stage, screen_learner
from rcic_fastai.train.metrics import known_accuracy
from rcic_fastai.train.network import new_head
from rcic_fastai.run.folder import load_run, read_run
from rcic_fastai.run.record import read_record

quick = change_recipe(replace(Recipe(), model=ModelSettings(**small_resnet)), "data.batch_size=16", "data.cache=true",
                      "train.epochs=1",
                      "loss.options.m=0.2", "loss.options.s=16")


def quiet(*args):
    pass


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    "Two cell types, 2 training and 1 test experiment each, 8 treatments, 32 pixels"
    folder = tmp_path_factory.mktemp("data") / "screen"
    return read_screen(simulate_screen(folder, n_sirnas=8, n_train=2, n_test=1, image_size=32, n_positive=2,
                                       progress=False))


def test_schedules_are_their_closed_forms():
    s = TrainSettings(epochs=10, lr=0.8, schedule="steps", milestones=[0.5, 0.9])
    assert ([round(schedule_function(s)(p), 6) for p in (0, 0.49, 0.5, 0.89, 0.9, 1)] == [
        0.8, 0.8, 0.08, 0.08, 0.008, 0.008])
    f = schedule_function(replace(s, schedule="cosine"))
    np.testing.assert_allclose([f(0), f(0.25), f(0.5), f(1)], [0.8, 0.4 * (1 + np.sqrt(0.5)), 0.4, 0], atol=1e-12)
    f = schedule_function(replace(s, schedule="exponential", decay=0.95))
    np.testing.assert_allclose([f(e / 10) for e in range(10)], [0.8 * 0.95**e for e in range(10)])
    with pytest.raises(ValueError, match="schedule is 'linear'"):
        schedule_function(replace(s, schedule="linear"))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["steps", "cosine", "exponential", "constant", "one_cycle"])
def test_the_learner_follows_its_schedule(screen, schedule):
    stage = TrainSettings(epochs=2, lr=0.01, schedule=schedule, milestones=[0.5], decay=0.5, optimizer="adamw")
    learn = screen_learner(recipe_dataloaders(select_sites(screen).head(48), quick), quick)
    with learn.no_bar(), learn.no_logging():
        fit_stage(learn, stage)
    rates, n = learn.recorder.lrs, len(learn.dls.train)
    assert len(rates) == 2 * n
    at = np.arange(2 * n) / (2 * n)
    if schedule == "one_cycle":  # two half cosines: from lr/25 to lr in the first quarter, then to lr/100,000
        up, down = at / stage.pct_start, (at - stage.pct_start) / (1 - stage.pct_start)
        half = lambda low, high, x: low + (high - low) * (1 - np.cos(np.pi * x)) / 2  # noqa: E731
        expected = np.where(at < stage.pct_start, half(0.01 / 25, 0.01, up), half(0.01, 0.01 / 1e5, down))
    else:
        expected = [schedule_function(stage)(x) for x in at]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    assert type(learn.opt.opt) is torch.optim.AdamW


def test_accuracy_counts_what_is_known():
    scores = torch.eye(3)[[0, 1, 2, 0]]
    assert known_accuracy(scores, torch.tensor([0, 1, 1, -1])) == pytest.approx(2 / 3)
    soft = torch.tensor([[0.7, 0.3, 0], [0, 0.4, 0.6], [0, 0, 1], [0, 0, 0]])
    assert known_accuracy((scores, scores.flip(1)), soft) == pytest.approx(2 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("mix", [None, "mixup", "cutmix"])
def test_controls_in_a_batch_shape_its_statistics_and_nothing_else(screen, mix):
    "The loss sees the treated sites alone; with statistics of the controls, the first BatchNorm's are exactly theirs."
    recipe = change_recipe(quick, "data.n_controls=6", 'data.statistics="controls"', "data.domains_per_batch=2",
                           f"train.mix={json.dumps(mix)}",
                           "device.precision=fp32")
    sites, seen, inputs = select_sites(screen), [], []
    dls = recipe_dataloaders(sites, recipe, controls=control_sites(screen), cell_types=screen.cell_types,
                             experiments=screen.experiments)
    learn = screen_learner(dls, recipe)
    loss, bn = learn.loss_func, next(m for m in learn.model.modules() if isinstance(m, torch.nn.BatchNorm2d))

    def recorded(inp, targ):
        seen.append((len(inp), len(targ), bool(((targ if targ.ndim == 1 else targ.sum(1) - 0.5) >= 0).all())))
        return loss(inp, targ)

    learn.loss_func, loss.reduction = recorded, "mean"
    handle = bn.register_forward_hook(lambda m, i, o: inputs.append((i[0].detach().clone(), o.detach().clone())))
    forward_pre = (
        learn.model.register_forward_pre_hook(lambda m, args: inputs.append(getattr(args[1], "context", args[1]))))
    with learn.no_bar(), learn.no_logging():
        fit_stage(learn, recipe.train)
    handle.remove()
    forward_pre.remove()
    assert all(n == m and known for n, m, known in seen) and seen[0][0] == 16
    context, (x, y) = inputs[0], inputs[1]
    assert len(x) == 16 + 2 * 6 and len(context[:, 1].unique()) == 2
    for experiment in context[:, 1].unique():
        own = (context[:, 1] == experiment) & (context[:, 3] > 0)
        assert own.sum() == 6
        normal = y[own].mean((0, 2, 3)), y[own].var((0, 2, 3), correction=0)
        if type(bn) is torch.nn.BatchNorm2d:  # timm's has an activation on top
            torch.testing.assert_close(normal[0], torch.zeros_like(normal[0]), atol=1e-4, rtol=0)
            torch.testing.assert_close(normal[1], torch.ones_like(normal[1]), atol=2e-2, rtol=0)


def test_mixed_context_reaches_the_head(screen):
    recipe = change_recipe(quick, 'model.cell_type="embedding"', "data.domain=null", 'train.mix="cutmix"',
                           "inference.batchnorm=running")
    learn, seen = screen_learner(recipe_dataloaders(select_sites(screen), recipe), recipe), []
    handle = learn.model.head.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    with learn.no_bar(), learn.no_logging():
        fit_stage(learn, recipe.train)
    handle.remove()
    assert isinstance(seen[0], MixedContext) and 0 < float(seen[0].weight.min()) < 1


@pytest.mark.slow
def test_every_published_system_runs_to_predictions(screen, tmp_path):
    """On a small network; the 44th place with a network per cell type, the winner with pseudo-labels, ours with
    matched histograms"""
    for name in ("densenet121_domain_bn", "densenet161_first_place", "densenet161_domain_batches"):
        recipe = laptop_recipe(get_recipe(name), epochs=4, lr=1e-3)
        recipe = change_recipe(recipe, 'model.arch_options={"channels": [8, 16, 32, 64], "stem_width": 8}')
        train_run(screen, recipe, tmp_path / name, valid="experiment=HUVEC-02", say=quiet)
        p = predict_run(tmp_path / name, screen, "test", progress=False, say=quiet)
        wells = screen.wells[(screen.wells.split == "test") & (screen.wells.well_type == "treatment")]
        assert set(p.wells().ids) == set(wells.id_code) and list(p.classes) == list(range(8))
        assert np.isfinite(p.logits).all()
    _, info = read_run(tmp_path / "densenet121_domain_bn")
    assert info["parts"] == ["HUVEC", "RPE"]
    assert set(pd.read_csv(tmp_path / "densenet121_domain_bn/RPE/history.csv").columns) >= {"train_loss"}
    with pytest.raises(ValueError, match="network for each cell type"):
        load_run(tmp_path / "densenet121_domain_bn", select_sites(screen, "test"))
    _, info = read_run(tmp_path / "densenet161_first_place")
    assert len(info["classes"]) == 8 + 2 + 1
    assert [r["known"] > 0 for r in info["pseudo"]] == [True] * len(info["pseudo"])
    run = tmp_path / "densenet161_domain_batches"
    x, table = embed_run(run, screen, "test", progress=False, say=quiet)
    stored = np.load(write_embeddings(x, table, tmp_path / "e.npz"))
    np.testing.assert_array_equal(stored["id_code"], table.id_code)
    # features and the cell type
    assert np.isnan(stored["sirna"]).sum() == len(wells)
    assert x.shape == (len(table), 64 + 2)
    with pytest.raises(ValueError, match="as .parquet, .npz or .h5ad"):
        write_embeddings(x, table, tmp_path / "e.csv")


FOUR = "efficientnet_b5_amsoftmax", "densenet201_amsoftmax", "efficientnet_b2_crossentropy", "seresnext101_amsoftmax"


@pytest.mark.slow
def test_the_blend_of_four_models_runs_to_a_submission(screen, tmp_path, capsys):
    """Each by one command: all cell types, then each of them, validated on the same wells; then their blend, and the
    ten-day log"""
    tiny = ["model.arch_options=" + json.dumps(dict(channels=[8, 8, 8, 8], stem_width=8)), "data.crop=null",
            "train.lr=1e-3"]
    common = dict(data=screen.path, laptop=3, valid="experiment=HUVEC-02,RPE-02", submit=True, set=tiny)
    for name in (*FOUR, "densenet121_accumulate"):
        cli.rcic_train(recipe=name, run=tmp_path / name, **common)
    assert "Validation, experiment=HUVEC-02,RPE-02:" in capsys.readouterr().out
    _, info = read_run(tmp_path / FOUR[0])
    assert info["parts"] == ["HUVEC", "RPE"] and (tmp_path / FOUR[0] / "all/model.safetensors").exists()
    cli.rcic_blend(run=[tmp_path / n for n in FOUR], out=tmp_path / "blend", weights="chosen")
    cli.rcic_submit(run=tmp_path / "blend")
    assert read_run(tmp_path / "blend")[0].inference.assignment == "vote"  # as the system did
    wells = set(screen.wells[(screen.wells.split == "test") & (screen.wells.well_type == "treatment")].id_code)
    for name in (*FOUR, "densenet121_accumulate", "blend"):
        assert set(pd.read_csv(tmp_path / name / "submission.csv").id_code) == wells
    right = {n: well_accuracy(Predictions.load(tmp_path / n / "predictions/valid.npz"), screen.wells)[0]
             for n in (*FOUR, "blend")}
    assert right["blend"] >= max(right[n] for n in FOUR)
    with pytest.raises(ValueError, match="is a blend"):
        predict_run(tmp_path / "blend", screen, "test")
    with pytest.raises(CliError, match="at least two runs"):
        cli.rcic_blend(run=[tmp_path / FOUR[0]], out=tmp_path / "other")
    with pytest.raises(CliError, match="holds .*, and no blend"):
        cli.rcic_blend(run=[tmp_path / n for n in FOUR], out=tmp_path / FOUR[0] / "all")


@pytest.mark.slow
def test_folds_are_blended_by_command(screen, tmp_path, capsys):
    "Each labelled well by the run that did not train on it; a submission, and a run that is loaded instead of trained"
    options = json.dumps(dict(channels=[8, 8, 8, 8], stem_width=8))
    small = ["model.arch=resnet10t", f"model.arch_options={options}", "data.crop=null"]
    how = dict(data=screen.path, recipe="laptop", epochs=1, batch_size=16, device="cpu", set=small)
    for k in range(2): cli.rcic_train(run=tmp_path / f"fold{k}", valid=f"fold={k}/2", **how)
    recipe, info = read_run(tmp_path / "fold0")
    assert (recipe.train.epochs, recipe.data.batch_size) == (1, 16)
    folds = [tmp_path / "fold0", tmp_path / "fold1"]
    with pytest.raises(CliError, match="these are folds"):
        cli.rcic_blend(run=folds, out=tmp_path / "no", weights="chosen")
    cli.rcic_blend(run=folds, out=tmp_path / "blend", device="cpu")
    labelled = screen.wells[(screen.wells.split == "train") & (screen.wells.well_type == "treatment")]
    assert f"each of {len(labelled)} wells is predicted by the runs that did not train on it" in capsys.readouterr().out
    joined = Predictions.load(tmp_path / "blend/predictions/valid.npz").wells()
    assert set(joined.ids) == set(labelled.id_code) == set(read_run(tmp_path / "blend")[1]["valid_wells"])
    own = Predictions.load(folds[1] / "predictions/valid.npz").wells()
    rows = [joined.ids.tolist().index(i) for i in own.ids]
    np.testing.assert_array_equal(joined.labels[rows], own.labels)
    cli.rcic_submit(run=tmp_path / "blend")
    assert (tmp_path / "blend/submission.csv").exists()
    before = (folds[0] / "model.safetensors").read_bytes()
    learn = train_run(screen, recipe, folds[0], valid="fold=0/2", exist="load", say=print)
    assert "is trained, and loaded" in capsys.readouterr().out and set(learn.dls.valid.sites.id_code) == set(
        info["valid_wells"])
    assert (folds[0] / "model.safetensors").read_bytes() == before
    with pytest.raises(FileExistsError, match="seed was 0 and is 1"):
        train_run(screen, replace(recipe, seed=1), folds[0], valid="fold=0/2", exist="load", say=quiet)
    with pytest.raises(ValueError, match="exist is 'replace'"):
        train_run(screen, recipe, folds[0], valid="fold=0/2", exist="replace", say=quiet)


@pytest.mark.slow
def test_histograms_come_back_with_the_run(screen, tmp_path):
    "What was saved is what was trained: the same sites, loaded alone, are predicted alike"
    recipe = change_recipe(quick, 'data.match_histograms="plate"', 'inference.batchnorm="running"')
    sites = select_sites(screen).query("experiment=='HUVEC-01'").reset_index(drop=True)
    learn = train_run(screen, recipe, tmp_path / "run", say=quiet)
    expected = predict_sites(learn, sites, "running", progress=False)
    few = sites[sites.plate == 2].reset_index(drop=True)
    again = predict_sites(load_run(tmp_path / "run", few), few, "running", progress=False)
    np.testing.assert_allclose(again.logits, expected.logits[sites.plate == 2], atol=1e-4)
    new = select_sites(screen, "test")
    assert np.isfinite(predict_sites(learn, new, "running", progress=False).logits).all()  # measured when met


def test_known_statistics_stay_when_new_ones_are_measured(screen):
    recipe = change_recipe(quick, 'data.standardize="experiment"')
    dls = recipe_dataloaders(select_sites(screen), recipe, cell_types=screen.cell_types, experiments=screen.experiments)
    before = dls.stats.mean.clone()
    complete_stats(dls, select_sites(screen, "test"))
    known = before.isfinite().all(-1)
    torch.testing.assert_close(dls.stats.mean[: len(before)][known], before[known], rtol=0, atol=0)
    assert dls.stats.mean.isfinite().all() and len(dls.stats.mean) == len(screen.experiments)
    x, *_ = dls.test_dl(select_sites(screen, "test")).one_batch()
    assert x.isfinite().all()


def test_what_is_held_out(screen):
    recipe = change_recipe(quick, 'data.control_classes="all"')
    sites = training_sites(screen, recipe)
    assert set(sites[sites.well_type != "treatment"].split) == {"train", "test"}
    _, mask = held_out(sites, "experiment=RPE-02", recipe)
    assert set(sites.experiment[mask]) == {"RPE-02"} and set(sites.well_type[mask]) == {"treatment"}
    strict = change_recipe(quick, 'data.control_classes="train"')
    sites, mask = held_out(training_sites(screen, strict), "experiment=RPE-02", strict)
    assert set(sites.experiment[sites.well_type != "treatment"]) == {"HUVEC-01", "HUVEC-02", "RPE-01"}
    ids = {"HUVEC-01_1_" + w for w in screen.wells.query("experiment=='HUVEC-01' and plate==1 and "
                                                         "well_type=='treatment'").well}
    assert set(sites.id_code[held_out(sites, ids, quick)[1]]) == ids


@pytest.mark.slow
def test_the_truth_of_held_out_wells_changes_nothing_but_the_log(screen, tmp_path):
    "Pseudo-labels of held-out wells are the network's own: with their labels scrambled, the weights are the same"
    recipe = change_recipe(quick, "train.epochs=2", "pseudo.start=1")
    scrambled, rng = screen.wells.copy(), np.random.default_rng(0)
    held = (scrambled.experiment == "RPE-02") & (scrambled.well_type == "treatment")
    scrambled.loc[held, "sirna"] = rng.permutation(scrambled.sirna[held].to_numpy())
    runs = []
    for name, wells in (("a", screen.wells), ("b", scrambled)):
        train_run(replace(screen, wells=wells), recipe, tmp_path / name, valid="experiment=RPE-02", say=quiet)
        runs.append(((tmp_path / name / "model.safetensors").read_bytes(), read_run(tmp_path / name)[1]["pseudo"]))
    assert runs[0][0] == runs[1][0] and runs[0][1][0]["wells"] == runs[1][1][0]["wells"] > 0


@pytest.mark.slow
def test_conditioning_on_controls(screen, tmp_path):
    """The head compares with controls of the experiment, in training and at inference; without them it says what is
    missing"""
    recipe = change_recipe(quick, "data.n_controls=6", 'model.head="controls"',
                           'loss={"name": "cross_entropy", "options": {}}', "device.precision=fp32")
    learn = train_run(screen, recipe, tmp_path / "run", say=quiet)
    sites = select_sites(screen, "test")
    p = predict_sites(learn, sites, controls=control_sites(screen), progress=False)
    assert np.isfinite(p.logits).all() and not np.allclose(p.logits[0], p.logits[1])
    with pytest.raises(ValueError, match="give `controls`"):
        predict_sites(learn, sites, progress=False)
    np.testing.assert_allclose(predict_run(tmp_path / "run", screen, progress=False, say=quiet).logits, p.logits,
                               atol=1e-3)


def test_a_fresh_head_keeps_the_body(screen):
    learn = screen_learner(recipe_dataloaders(select_sites(screen), quick), quick)
    body = {k: v.clone() for k, v in learn.model.body.state_dict().items()}
    model = new_head(learn.model,
                     change_recipe(quick, 'model.head="neck"', "model.hidden=32",
                                   'loss={"name": "cross_entropy", "options": {}}'), 5)
    assert all(torch.equal(v, body[k]) for k, v in model.body.state_dict().items())
    assert model.eval()(torch.zeros(2, 6, 32, 32), torch.zeros(2, 4, dtype=torch.long)).shape == (2, 5)


@pytest.mark.slow
def test_a_packed_screen_gives_the_same_run(small_screen, tmp_path):
    "From image files, from a store, with threads and without: the same weights and the same predictions"
    from rcic_fastai.data.pack import pack_screen

    pack_screen(read_screen(small_screen), tmp_path / "packed", progress=False)
    weights, logits = [], []
    for name, data, workers in [("files", small_screen, 0), ("store", tmp_path / "packed", 2)]:
        recipe = change_recipe(quick, "data.crop=32", "data.cache=false", f"data.workers={workers}")
        run = tmp_path / name
        learn = train_run(read_screen(data), recipe, run, valid="experiment=HUVEC-02", say=lambda *a: None)
        weights.append(torch.cat([p.detach().flatten() for p in learn.model.parameters()]))
        logits.append(predict_run(run, read_screen(data), "test", progress=False, say=lambda *a: None).logits)
    assert (weights[0] == weights[1]).all() and (logits[0] == logits[1]).all()
    with pytest.warns(UserWarning, match="was trained on images of 48 x 48 pixels, these have 24 x 24"):
        pack_screen(read_screen(small_screen), tmp_path / "half", size=24, progress=False)
        predict_run(run, read_screen(tmp_path / "half"), "test", progress=False, say=lambda *a: None)


@pytest.mark.parametrize("options", [dict(weights="0,0"), dict(weights="1,2,3"), dict(space="foo")])
def test_options_that_a_blend_refuses_leave_nothing(small_run, small_screen, tmp_path, options):
    "The folder is free for the command as it was meant"
    runs = [shutil.copytree(small_run, tmp_path / n) for n in "ab"]
    with pytest.raises(CliError, match="weights|space"):
        cli.rcic_blend(run=runs, data=small_screen, out=tmp_path / "blend", **options)
    assert not (tmp_path / "blend").exists()


def test_a_training_that_is_not_finished_is_told_as_that(tmp_path):
    for name in ("recipe.json", "begun.json"): (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match="its training is not finished; the same rcic-train .* resumes"):
        read_record(tmp_path)
    (tmp_path / "begun.json").unlink()
    with pytest.raises(FileNotFoundError, match="is no finished run: run.json is missing"): read_record(tmp_path)
