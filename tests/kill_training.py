"""A training with everything on, uninterrupted and killed at random moments: `python kill_training.py FOLDER KILLS`
prints JSON.

Run by test_checkpoint.py in a process of its own: each attempt is a fork, which is killed with SIGKILL by a callback of
its own.
"""

import json
import os
import random
import signal
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.update({"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"})
warnings.filterwarnings("ignore")

import torch  # noqa: E402
from forked import locks_of_its_own  # noqa: E402
from fastai.callback.core import Callback  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import rcic_fastai.files as files  # noqa: E402
from rcic_fastai.recipe.check import check_recipe  # noqa: E402
from rcic_fastai.run.train import train_run  # noqa: E402
from rcic_fastai.screen.read import read_screen  # noqa: E402
from rcic_fastai.screen.simulate import simulate_screen  # noqa: E402
from rcic_fastai.recipe.settings import CheckpointSettings, DataSettings, LossSettings, ModelSettings  # noqa: E402
from rcic_fastai.recipe.settings import PseudoSettings  # noqa: E402
from rcic_fastai.recipe.settings import Recipe, TrainSettings  # noqa: E402

MOMENTS = "before_batch", "after_pred", "before_backward", "after_step", "after_batch", "within a checkpoint"


def everything():
    "Accumulation, EMA, mixing, pseudo-labels, domain batches with controls, a frozen epoch, all stages"
    stage = TrainSettings
    return check_recipe(replace(
        Recipe(), model=ModelSettings(arch="resnet10t", arch_options=dict(channels=[8, 8, 8, 8], stem_width=8)),
        data=DataSettings(batch_size=8, n_controls=4, cache=True), loss=LossSettings("am_softmax", dict(m=0.2, s=16.0)),
        pretrain=stage(epochs=1, lr=1e-3, lr_ratio=10), pseudo=PseudoSettings(start=1, first=0.5),
        train=stage(epochs=3, lr=1e-3, accumulate=3, ema=0.9, mix="cutmix", freeze_epochs=1),
        finetune=stage(epochs=2, lr=1e-4, mix="mixup", average=2, optimizer="adam", schedule="cosine"),
        cell_type=stage(epochs=2, lr=1e-4, keep="best", validate_steps=2, accumulate=2, optimizer="adamw",
                        schedule="exponential"),
        checkpoint=CheckpointSettings(every_steps=2, keep_last=2)))


class Steps(Callback):
    "Counts the steps of all stages, and kills the process at one of them, or at the first after it that has the moment"

    order = 150

    def __init__(self, where=None, stages=()):
        self.where, self.stages, self.seen = where, stages, []

    def _at(self, moment):
        if not self.learn.training:
            return
        stage, step = [self.learn.path.name,
                       self.learn.checkpoint.stage], self.learn.train_iter + (moment != "after_batch")
        if moment == "after_batch":
            self.seen.append([*stage, step])
        if self.where is None:
            return
        position = lambda stage, step: (self.stages.index(tuple(stage)), step)
        if position(stage, step) < position(self.where[:2], self.where[2]):
            return
        if self.where[3] == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.where[3] == "within a checkpoint":
            files.os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)  # everything is written but for the name

    def before_batch(self):
        self._at("before_batch")

    def after_pred(self):
        self._at("after_pred")

    def before_backward(self):
        self._at("before_backward")

    def after_step(self):
        self._at("after_step")

    def after_batch(self):
        self._at("after_batch")


def attempt(screen, run, where, answer, stages=()):
    "Train in a fork; True if it came to its end"
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == 0
    try:
        locks_of_its_own()
        steps, said = Steps(where, stages), []
        train_run(screen, everything(), run, valid="experiment=HUVEC-03,RPE-03", say=said.append, cbs=[steps])
        answer.write_text(json.dumps(steps.seen))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def weights(run):
    return {p.parent.name: load_file(p) for p in sorted(run.glob("*/model.safetensors"))}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def main(folder, kills):
    torch.set_num_threads(1)
    if not (folder / "screen").exists():
        simulate_screen(folder / "screen", n_sirnas=6, n_train=3, n_test=1, cell_types=("HUVEC", "RPE"), image_size=32,
                        n_positive=2, progress=False)
    screen, answer, rng = read_screen(folder / "screen"), folder / "steps.json", random.Random(0)
    assert attempt(screen, folder / "whole", None, answer)
    steps = json.loads(answer.read_text())
    stages = list(dict.fromkeys((a, b) for a, b, _ in steps))
    # the first step of each stage of each network, before anything of it is saved; the rest anywhere
    chosen = [[*stage, 1] for stage in stages]
    chosen += rng.sample([s for s in steps if s not in chosen], max(0, kills - len(chosen)))
    killed = []
    for i, where in enumerate(sorted(chosen, key=steps.index)):
        where = [*where, MOMENTS[i % len(MOMENTS)]]
        if attempt(screen, folder / "killed", where, answer, stages):
            break
        killed.append(where)
    if not (folder / "killed" / "run.json").exists():
        assert attempt(screen, folder / "killed", None, answer)
    found = weights(folder / "killed")
    same = {k: equal(v, found[k]) for k, v in weights(folder / "whole").items()}
    histories = [[p.read_text().split(",time")[0] for p in sorted((folder / n).glob("*/history.csv"))]
                 for n in ("whole", "killed")]
    print(json.dumps(dict(killed=killed, stages=stages, same=same, histories=histories[0] == histories[1],
                          steps=len(steps))))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
