"Runs that survive: kills, signals, damaged files, full disks, broken losses; and stages that do not leak."

import errno
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xxhash
from fastai.callback.core import Callback
from safetensors.torch import load_file

import rcic_fastai.train.checkpoint as checkpoint
import rcic_fastai.cli.core as cli
from rcic_fastai.train.checkpoint import TrainingStopped, checkpoint_files, latest_checkpoint, read_checkpoint
from rcic_fastai.train.checkpoint import save_checkpoint
from rcic_fastai.recipe.check import recipe_to_json
from rcic_fastai.recipe.published import change_recipe
from rcic_fastai.run.stages import check_no_leak
from rcic_fastai.run.train import train_run
from rcic_fastai.screen.read import read_screen
from rcic_fastai.cli.script import CliError
from rcic_fastai.screen.simulate import simulate_screen
from rcic_fastai.recipe.settings import CheckpointSettings, DataSettings, LossSettings, ModelSettings, Recipe
from rcic_fastai.recipe.settings import stage_names, TrainSettings
from rcic_fastai.run.folder import load_run

tiny = replace(Recipe(), model=ModelSettings(arch="resnet10t", arch_options=dict(channels=[8, 8, 8, 8], stem_width=8)),
               data=DataSettings(batch_size=8, cache=True), loss=LossSettings("am_softmax", dict(m=0.2, s=16.0)),
               train=TrainSettings(epochs=3, lr=1e-3), checkpoint=CheckpointSettings(every_steps=2))


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "screen"
    settings = dict(n_sirnas=6, n_train=3, n_test=1, cell_types=("HUVEC",), image_size=32, n_positive=1)
    return read_screen(simulate_screen(folder, progress=False, **settings))


@pytest.fixture(scope="module")
def whole(screen, tmp_path_factory):
    "The weights of a training that nobody touched"
    run = tmp_path_factory.mktemp("whole") / "run"
    train_run(screen, tiny, run, valid="experiment=HUVEC-03", say=lambda *a: None)
    return load_file(run / "model.safetensors")


class At(Callback):
    "Does something after a step of the training"

    order, run_valid = 120, False

    def __init__(self, step, do):
        self.step, self.do = step, do

    def after_batch(self):
        if self.train_iter == self.step:
            self.do(self.learn)


def fail(learn):
    raise RuntimeError("power cut")


def train(screen, run, *cbs, recipe=tiny, say=lambda *a: None, **kwargs):
    return train_run(screen, recipe, run, valid="experiment=HUVEC-03", say=say, cbs=cbs, **kwargs)


def same(run, weights):
    found = load_file(run / "model.safetensors")
    return found.keys() == weights.keys() and all(torch.equal(found[k], v) for k, v in weights.items())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system does not have")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [8, pytest.param(40, marks=pytest.mark.bench)])
def test_killed_at_any_moment_the_weights_are_the_same(tmp_path, kills):
    """SIGKILL in every stage of every network, with accumulation, EMA, mixing, pseudo-labels, domain batches and
    controls in them"""
    script = Path(__file__).with_name("kill_training.py")
    done = subprocess.run([sys.executable, script, tmp_path, str(kills)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["killed"]) == kills and {tuple(k[:2]) for k in found["killed"]} == set(map(tuple, found["stages"]))
    assert len(found["stages"]) == 5 and found["same"] == dict.fromkeys(("all", "HUVEC", "RPE"), True)
    assert found["histories"]
    assert not list(tmp_path.glob("killed/**/.*"))  # temporary files of the killed


@pytest.mark.slow
@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_first_and_say_so(screen, whole, tmp_path, monkeypatch, capsys, signum, code):
    "Through the command: the exit status is 128 plus the signal, and the same command resumes"
    (tmp_path / "recipe.json").write_text(recipe_to_json(tiny))
    command = dict(data=screen.path, recipe=str(tmp_path / "recipe.json"), run=tmp_path / "run",
                   valid="experiment=HUVEC-03")
    monkeypatch.setattr("rcic_fastai.run.train.logger", lambda *a: At(6, lambda learn: os.kill(os.getpid(), signum)))
    inherited = signal.signal(signum, signal.default_int_handler)  # a job in the background begins with SIGINT ignored
    try:
        with pytest.raises(SystemExit) as e:
            cli.rcic_train(**command, log="kill")
        assert signal.getsignal(signum) is signal.default_int_handler
    finally:
        signal.signal(signum, inherited)
    assert e.value.code == code
    message = capsys.readouterr().err
    saved = checkpoint_files(tmp_path / 'run/checkpoints')[-1]
    assert f"stopped by {signal.Signals(signum).name}, saved as {saved}" in message
    assert "the same command resumes" in message
    state = latest_checkpoint(tmp_path / "run/checkpoints")
    assert state["train_iter"] == 6
    cli.rcic_train(**command)
    assert "Resuming" in capsys.readouterr().out and same(tmp_path / "run", whole)
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
def test_a_signal_while_validating(screen, whole, tmp_path):
    class Validating(At):
        run_valid = True

        def after_batch(self):
            if not self.learn.training and self.learn.epoch == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingStopped):
        train(screen, tmp_path / "run", Validating(0, None))
    state = latest_checkpoint(tmp_path / "run/checkpoints")
    assert state["epoch"] == 1 and state["batch"] > 0
    train(screen, tmp_path / "run")
    assert same(tmp_path / "run", whole)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_told_and_left_out(screen, whole, tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        train(screen, tmp_path / "run", At(7, fail))
    files, said = checkpoint_files(tmp_path / "run/checkpoints"), []
    assert len(files) == 2
    files[-1].write_bytes(files[-1].read_bytes()[:-1000])
    train(screen, tmp_path / "run", say=said.append)
    assert said[0] == f"{files[-1]} is cut short or damaged; going back to the checkpoint before it"
    assert "Resuming" in said[1] and same(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("change, message", [
    ("train.lr=0.01", "train.lr was 0.001 and is 0.01"),
    ("loss.options.m=0.3", r"loss.options was .*0.2.* and is .*0.3"),
    ("seed=1", "seed was 0 and is 1")])
def test_another_recipe_is_refused(screen, tmp_path, change, message):
    with pytest.raises(RuntimeError, match="power cut"):
        train(screen, tmp_path / "run", At(3, fail))
    before = [p.read_bytes() for p in checkpoint_files(tmp_path / "run/checkpoints")]
    with pytest.raises(ValueError, match=message):
        train(screen, tmp_path / "run", recipe=change_recipe(tiny, change))
    with pytest.raises(ValueError, match="validation_wells was .* and is"):
        train_run(screen, tiny, tmp_path / "run", valid="experiment=HUVEC-02", say=lambda *a: None)
    assert [p.read_bytes() for p in checkpoint_files(tmp_path / "run/checkpoints")] == before


@pytest.mark.slow
def test_what_changes_nothing_may_change(screen, whole, tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        train(screen, tmp_path / "run", At(5, fail))
    train(screen, tmp_path / "run", recipe=change_recipe(tiny, "checkpoint.every_steps=1", "data.workers=1",
                                                         "data.cache=false"))
    assert same(tmp_path / "run", whole)


def as_in_0_1(state):
    "A checkpoint as that version wrote it, with the old names of settings and of the stage on control wells"
    recipe = state["extra"]["recipe"]
    recipe["data"]["controls"], recipe["inference"]["domain"] = recipe["data"].pop("n_controls"), None
    recipe["checkpoint"] = dict(steps=recipe["checkpoint"]["every_steps"], keep=recipe["checkpoint"]["keep_last"])
    for name in stage_names:
        recipe[name]["steps"] = recipe[name].pop("milestones")
    recipe["controls"] = recipe.pop("pretrain")
    old = dict(pretrain="controls")
    rows = state["callbacks"]["history"]["rows"]
    for row in rows:
        row["stage"] = old.get(row["stage"], row["stage"])
    return {**state, "stage": old.get(state["stage"], state["stage"])}


@pytest.fixture(scope="module")
def pretrained(screen, tmp_path_factory):
    "The weights of a training with a stage on control wells"
    run = tmp_path_factory.mktemp("pretrained") / "run"
    train(screen, run, recipe=change_recipe(tiny, "pretrain.epochs=2", "train.epochs=1"))
    return load_file(run / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "train"])
def test_a_checkpoint_of_0_1_is_resumed(screen, pretrained, tmp_path, stage):
    "In the stage that was called `controls`, or after it: the same weights, and a history with the present names"
    run, recipe = tmp_path / "run", change_recipe(tiny, "pretrain.epochs=2", "train.epochs=1")
    with pytest.raises(RuntimeError, match="power cut"):
        train(screen, run, At(3, lambda learn: fail(learn) if learn.checkpoint.stage == stage else None), recipe=recipe)
    files = checkpoint_files(run / "checkpoints")
    state = as_in_0_1(read_checkpoint(files[-1]))
    save_checkpoint(run / "checkpoints", state, 1)
    assert state["stage"] == dict(pretrain="controls", train="train")[stage]
    assert {r["stage"] for r in state["callbacks"]["history"]["rows"]} <= {"controls"}
    with pytest.warns(FutureWarning, match="controls is called pretrain"):
        train(screen, run, recipe=recipe)
    assert same(run, pretrained) and pd.read_csv(run / "history.csv").stage.tolist() == ["pretrain"] * 2 + ["train"]


@pytest.mark.slow
def test_a_full_disk_while_saving(screen, whole, tmp_path, monkeypatch):
    "Training goes on, what was saved stays, nothing half-written is left"
    write, said, sizes = checkpoint.write_whole, [], []

    def full(path, data):
        if Path(path).suffix == ".pt" and 2 < len(sizes) < 5:
            sizes.append(0)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sizes.append(len(data))
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_whole", full)
    with pytest.raises(RuntimeError, match="power cut"):
        train(screen, tmp_path / "run", At(9, fail), say=said.append)
    assert any("not written (No space left on device); the training continues" in s for s in said)
    folder = tmp_path / "run/checkpoints"
    assert latest_checkpoint(folder)["stage"] == "train"
    assert len(checkpoint_files(folder)) == len(list(folder.iterdir()))
    train(screen, tmp_path / "run")
    assert same(tmp_path / "run", whole)


def test_a_loss_that_is_no_number(screen, tmp_path, monkeypatch):
    "Step, learning rate and the last good checkpoint, in one line of the command"

    def poison(learn):
        next(learn.model.parameters()).data.fill_(float("nan"))

    (tmp_path / "recipe.json").write_text(recipe_to_json(change_recipe(tiny, "train.schedule=constant")))
    monkeypatch.setattr("rcic_fastai.run.train.logger", lambda *a: At(5, poison))
    with pytest.raises(CliError) as e:
        cli.rcic_train(data=screen.path, recipe=str(tmp_path / "recipe.json"), run=tmp_path / "run", log="poison",
                       valid="experiment=HUVEC-03")
    last = checkpoint_files(tmp_path / "run/checkpoints")[-1]
    assert ("error: the loss is nan at step 6 of stage train (epoch 1), learning rate 0.001; the last good checkpoint "
            f"is {last}" in str(e.value))
    assert all(torch.isfinite(v).all() for v in read_checkpoint(last)["model"].values() if v.is_floating_point())


def test_weights_that_are_no_numbers_are_never_saved(screen, tmp_path):
    def poison(learn):
        next(learn.model.parameters()).data.fill_(float("inf"))

    with pytest.raises(FloatingPointError, match="at step 6"):
        train(screen, tmp_path / "run", At(6, poison))  # where a checkpoint is due
    assert latest_checkpoint(tmp_path / "run/checkpoints")["train_iter"] < 6


def test_reading_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    buffer = io.BytesIO()
    torch.save(dict(model=Evil()), buffer)
    for data in (buffer.getvalue(), pickle.dumps(Evil()), b"nothing"):
        path = tmp_path / f"00000001-{xxhash.xxh3_64_hexdigest(data)}.pt"
        path.write_bytes(data)
        with pytest.raises(ValueError, match="holds more than tensors and plain values"):
            read_checkpoint(path)
        assert not (tmp_path / "owned").exists()
    with pytest.raises(ValueError, match="is no checkpoint"):
        read_checkpoint(__file__)


def test_the_newest_so_many_stay(tmp_path):
    for i in range(5):
        save_checkpoint(tmp_path, dict(i=i), keep=3)
    assert [read_checkpoint(p)["i"] for p in checkpoint_files(tmp_path)] == [2, 3, 4]


# Leaks


@pytest.fixture(scope="module")
def two_types(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "screen"
    settings = dict(n_sirnas=6, n_train=2, n_test=1, cell_types=("HUVEC", "RPE"), image_size=32, n_positive=1)
    return read_screen(simulate_screen(folder, progress=False, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("valid", ["well=0/3", "experiment=HUVEC-02,RPE-02"])
def test_no_stage_validates_on_what_another_has_trained_on(two_types, tmp_path, monkeypatch, valid):
    "The wells of each stage as its learner has them; then one is planted"
    stages, fit = [], checkpoint.Checkpoint.before_fit

    def spy(self):
        train, held = (set(ds.items.id_code) for ds in (self.learn.dls.train_ds, self.learn.dls.valid_ds))
        stages.append((self.learn.path.name, train, held))
        return fit(self)

    monkeypatch.setattr(checkpoint.Checkpoint, "before_fit", spy)
    recipe = change_recipe(replace(tiny, train=TrainSettings(epochs=1), finetune=TrainSettings(epochs=1),
                                   cell_type=TrainSettings(epochs=1)))
    train_run(two_types, recipe, tmp_path / "run", valid=valid, say=lambda *a: None)
    assert [s[0] for s in stages] == ["all", "all", "HUVEC", "RPE"] and stages[0][2] == stages[2][2] | stages[3][2]
    check_no_leak(set.union(*(s[1] for s in stages)), set.union(*(s[2] for s in stages)), "all")
    # the first stage is made to forget one of its validation wells
    info = json.loads((tmp_path / "run/all/run.json").read_text())
    planted = next(w for w in info["valid_wells"] if w.startswith("RPE"))
    info["valid_wells"].remove(planted)
    (tmp_path / "run/all/run.json").write_text(json.dumps(info))
    for name in ("run.json", "RPE/run.json"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(ValueError,
                       match=f"stage train: 1 well is validated on whose labels are trained on, such as {planted}"):
        train_run(two_types, recipe, tmp_path / "run", valid=valid, say=lambda *a: None)


@pytest.mark.slow
def test_held_out_controls_are_left_out_of_pretraining(two_types, tmp_path, monkeypatch):
    "Where controls are validated on, they are not what is pretrained on"
    seen, fit = [], checkpoint.Checkpoint.before_fit
    monkeypatch.setattr(checkpoint.Checkpoint, "before_fit",
                        lambda self: (seen.append(set(self.learn.dls.train_ds.items.id_code)), fit(self))[1])
    recipe = replace(tiny, train=TrainSettings(epochs=1), pretrain=TrainSettings(epochs=1),
                     data=DataSettings(batch_size=8, domain=None))
    learn = train_run(two_types, recipe, tmp_path / "run", wells="all", valid="experiment=HUVEC-02",
                      say=lambda *a: None)
    assert len(seen) == 2 and not seen[0] & set(learn.dls.valid_ds.items.id_code)


# Where the network of a run goes on


@pytest.mark.slow
def test_a_run_starts_with_the_network_of_another(two_types, tmp_path):
    say = lambda *a: None  # noqa: E731
    recipe = replace(tiny, train=TrainSettings(epochs=1, lr=1e-9, weight_decay=0.0))
    train_run(two_types, recipe, tmp_path / "first", valid="experiment=HUVEC-02", say=say)
    learn = train_run(two_types, recipe, tmp_path / "second", valid="experiment=HUVEC-02", say=say,
                      start=tmp_path / "first")
    first = load_file(tmp_path / "first/model.safetensors")
    assert all(torch.allclose(v, first[k], atol=1e-6) for k, v in learn.model.named_parameters())
    with pytest.raises(ValueError, match="stage train: .* wells are validated on"):
        train_run(two_types, recipe, tmp_path / "leak", valid="experiment=HUVEC-01", say=say, start=tmp_path / "first")
    with pytest.raises(ValueError, match="predicts sirna, not plate"):
        train_run(two_types, recipe, tmp_path / "plate", target="plate", say=say, start=tmp_path / "first")
    assert load_run(tmp_path / "second", learn.dls.valid_ds.items).dls.vocab == learn.dls.vocab
    assert np.isfinite(first["head.classifier.weight"].numpy()).all()
