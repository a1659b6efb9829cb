"""An epoch of our learner against a bare PyTorch loop, each switch of the recipe on and off, and a naive pipeline.

`make bench NAME=training` (ARGS="--sections loop switches" for a part of it). Images are simulated; nothing is
downloaded.
"""

import argparse
import io
import os
import shutil
import tempfile
import time
import warnings
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

THREADS = "1"
os.environ.update({"OMP_NUM_THREADS": THREADS, "MKL_NUM_THREADS": THREADS, "TQDM_DISABLE": "1"})
warnings.filterwarnings("ignore")

import fastai.optimizer  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from fastai.callback.all import CancelValidException, Callback, CSVLogger, ProgressCallback  # noqa: E402
from fastai.learner import Learner  # noqa: E402
from measure import REPEATS, interleave, machine, markdown, summary, write_report  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

from rcic_fastai.data.augment import dihedral_batch  # noqa: E402
from rcic_fastai.model.batchnorm import BatchNormModeCallback  # noqa: E402
from rcic_fastai.data.select import select_sites  # noqa: E402
from rcic_fastai.data.context import plain  # noqa: E402
from rcic_fastai.model.core import param_groups  # noqa: E402
from rcic_fastai.recipe.published import change_recipe, get_recipe, small_resnet  # noqa: E402
from rcic_fastai.screen.sites import site_files  # noqa: E402
from rcic_fastai.screen.read import read_screen  # noqa: E402
from rcic_fastai.screen.simulate import simulate_screen  # noqa: E402
from rcic_fastai.train.optimizer import TorchOptimizer  # noqa: E402
from rcic_fastai.train.precision import fast_precision  # noqa: E402
from rcic_fastai.recipe.settings import LossSettings, ModelSettings, TrainSettings  # noqa: E402
from rcic_fastai.train.loaders import recipe_dataloaders  # noqa: E402
from rcic_fastai.train.learner import fit_stage, screen_learner  # noqa: E402
from rcic_fastai.train.metrics import known_accuracy  # noqa: E402
from rcic_fastai.train.network import recipe_model  # noqa: E402

CLOCKS = dict(wall=time.perf_counter, processor=time.process_time)
SECTIONS = "loop", "switches", "pipeline"
CPU = torch.device("cpu")
LR = 1e-4  # small, so that the weights stay where they are
BARE, SAME, OURS, BEFORE = "bare PyTorch", "bare PyTorch, our DataLoaders", "ours", "fastai's Learner and AdamW"


class Case(NamedTuple):
    "What is trained"

    name: str  # in the tables
    model: ModelSettings
    pixels: int  # side of the images
    batch: int  # images
    steps: int  # per epoch, about


CASES = [
    Case("small ResNet, 64 pixels, batches of 32", ModelSettings(**small_resnet, head="cosine"), 64, 32, 32),
    Case("SE-ResNeXt50, 128 pixels, batches of 4", ModelSettings(arch="se_resnext50_32x4d", head="cosine"), 128, 4, 6),
]
# a network that costs next to nothing, so that the loop is what is measured
LOOP = Case("timm's test_resnet, 32 pixels, batches of 4", ModelSettings(arch="test_resnet", head="cosine"), 32, 4, 96)
QUICK = [Case("small ResNet, 32 pixels, batches of 4", ModelSettings(**small_resnet, head="cosine"), 32, 4, 2)]


# What both sides share


def ready_screen(folder, pixels, n_sirnas):
    "A small simulated screen: one cell type, three experiments of which the last is for validation"
    path = folder / f"screen-{pixels}-{n_sirnas}"
    settings = dict(n_sirnas=n_sirnas, n_train=3, n_test=0, cell_types=("HUVEC",), n_positive=1, missing=0)
    if not path.exists():
        simulate_screen(path, image_size=pixels, progress=False, **settings)
    return read_screen(path)


def make_recipe(case, *settings):
    "Domain batches, every batch transform that the recipe `laptop` has, images kept in memory, float32"
    recipe = replace(get_recipe("laptop"), model=case.model, train=TrainSettings(epochs=1, lr=LR, optimizer="adamw"))
    sites = case.steps * case.batch
    return change_recipe(recipe, f"data.batch_size={case.batch}", f"data.epoch_sites={sites}", "data.crop=null",
                         "data.cache=true", "device.precision=fp32", *settings)


def make_loaders(case, recipe, folder):
    "One batch of validation for every eight of training"
    sites = select_sites(ready_screen(folder, case.pixels, max(4, case.batch // 2)))
    valid = (sites.experiment == "HUVEC-03").to_numpy()
    own = sites[~valid | (valid.cumsum() <= max(1, case.steps // 8) * case.batch)].reset_index(drop=True)
    dls = recipe_dataloaders(own, recipe, valid=(own.experiment == "HUVEC-03").to_numpy(), path=folder, device=CPU)
    for dl in dls.loaders:
        list(dl)  # read once; from now on the images are in memory
    return dls


class Rewound:
    "A network for each contestant, and before each run the same weights, order of the batches and random numbers"

    def __init__(self, dls, recipe, names):
        self.dls = dls
        self.first = recipe_model(recipe, len(dls.vocab))
        self.models = {name: deepcopy(self.first) for name in names}

    def __call__(self, name):
        self.models[name].load_state_dict(self.first.state_dict())
        self.dls.train.epoch = 0
        torch.manual_seed(0)


# The bare loop


class PlainTransforms:
    """The batch transforms of the recipe, written for plain tensors: symmetries, mean and deviation of the screen,
    gain and offset"""

    def __init__(self, stats, intensity):
        self.mean, self.std = (t[:, None, None] for t in stats)
        self.intensity = intensity

    def __call__(self, x, train):
        if train:
            x = dihedral_batch(x, torch.randint(0, 8, (len(x),)))
        x = x.float().sub_(self.mean).div_(self.std)
        if not train or not self.intensity:
            return x
        a, b = torch.randn(2, *x.shape[:2], 1, 1) * self.intensity
        return torch.addcmul(b, x, a + 1)


def batches_in_memory(dls, transforms):
    """Functions that yield the training and the validation batches without anything of fastai: uint8 in memory,
    transformed on the way"""
    raw = [[tuple(map(plain, b)) for b in dl.new(after_batch=lambda b: b)] for dl in dls.loaders]

    def batches(i):
        for x, context, y in raw[i]:
            yield transforms(x, i == 0), context, y

    return batches


def same_batches(dls):
    "The same batches from our DataLoaders, freed of their types"
    return lambda i: (tuple(map(plain, b)) for b in dls[i])


def bare_epoch(model, loss_func, batches, steps, log, optimizer):
    "Train and validate once and write a line; validation uses the statistics of its batches, as ours does"
    model.train().to(memory_format=torch.channels_last)
    opt = optimizer(model.parameters(), lr=LR, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, LR, total_steps=steps)
    losses, found = [], []
    for x, context, y in batches(0):
        loss = loss_func(model(x.contiguous(memory_format=torch.channels_last), context), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    with torch.inference_mode():
        for x, context, y in batches(1):
            scores = model(x.contiguous(memory_format=torch.channels_last), context)
            found.append((loss_func(scores, y), known_accuracy(scores, y)))
    print(torch.stack(losses).mean().item(), *np.mean(found, 0), file=log)


# Learners


class WithoutValidation(Callback):
    def before_validate(self):
        raise CancelValidException


def quiet(learn):
    "Without a progress bar, as where the output is a file"
    learn.remove_cb(ProgressCallback)
    learn.logger = partial(print, file=io.StringIO())
    return learn


def our_learner(dls, recipe, folder, model=None, **kwargs):
    return quiet(screen_learner(dls, recipe, model, path=folder, cbs=[CSVLogger("ours.csv")], **kwargs))


def fastai_learner(dls, recipe, folder, model):
    "What fastai offers: its own AdamW, every callback asked for every event"
    cbs = [CSVLogger("fastai.csv"), BatchNormModeCallback(), fastai.callback.channelslast.ChannelsLast()]
    loss_func = screen_learner(dls, recipe, model).loss_func
    return quiet(Learner(dls, model, loss_func=loss_func, opt_func=fastai.optimizer.Adam, metrics=known_accuracy,
                         splitter=param_groups, path=folder, cbs=cbs))


def epoch_of(learn, stage):
    "One epoch; the state of the optimiser, twice the size of the network, is given back"
    fit_stage(learn, stage)
    learn.opt = None


def loop_contestants(case, folder):
    "Epochs by name, and what is to happen before each"
    recipe = make_recipe(case)
    dls = make_loaders(case, recipe, folder)
    before, log = Rewound(dls, recipe, (BARE, SAME, OURS, BEFORE)), io.StringIO()
    models = before.models
    ours = our_learner(dls, recipe, folder, models[OURS])
    theirs = fastai_learner(dls, recipe, folder, models[BEFORE])
    transforms = PlainTransforms(dls.stats, recipe.data.intensity)
    bare = partial(bare_epoch, loss_func=ours.loss_func, steps=len(dls.train), log=log,
                   optimizer=partial(torch.optim.AdamW, fused=True))
    return {
        BARE: partial(bare, models[BARE], batches=batches_in_memory(dls, transforms)),
        SAME: partial(bare, models[SAME], batches=same_batches(dls)),
        OURS: partial(epoch_of, ours, recipe.train),
        BEFORE: partial(epoch_of, theirs, recipe.train),
    }, before, len(dls.train)


def table_of(seconds, baseline, units, unit="step"):
    "`summary`, with the time relative to `baseline` instead of the speed"
    table = summary(seconds, units=units, unit=unit).drop(columns=f"{unit}s/s")
    ratio = seconds.div(seconds[baseline], axis=0)
    low, high = ratio.quantile(0.25), ratio.quantile(0.75)
    return table.assign(**{f"time relative to {baseline}": ratio.median(),
                           "quartiles of that": [f"{a:.3f}-{b:.3f}" for a, b in zip(low, high)]})


def loop_section(args, cases, folder):
    parts = [
        "## Epochs of the loop\n\nOne epoch, training and validation, with the same weights, batches of one "
        "experiment, batch transforms (symmetries, standardising, intensity), AM-Softmax, "
        "one-cycle and AdamW in PyTorch's fused kernel (but for the last row); float32, channels-last, images in "
        "memory as uint8. "
        f"*{BARE}*: nothing of fastai, batches cut before, transforms written for plain tensors. *{SAME}*: the same "
        "loop fed by the loaders of the library. "
        f"*{OURS}*: `screen_learner` and `fit_stage` with Recorder, CSVLogger and a line per epoch. *{BEFORE}*: the "
        "same with the Learner and the optimiser of fastai, fed alike."
    ]
    found = {}
    for case in [*cases, *([] if args.quick else [LOOP])]:
        contestants, before, steps = loop_contestants(case, folder)
        seconds = interleave(contestants, args.repeats, clock=CLOCKS[args.clock], before=before)
        table = table_of(seconds, BARE, steps)
        ratio = float((seconds[OURS] / seconds[SAME]).median())
        found[case.name] = ratio
        parts.append(f"### {case.name}\n\n{markdown(table, 4)}\n\nAn epoch of {steps} steps. Ours relative to "
                     f"*{SAME}*: {ratio:.3f}.")
    return parts, found


# Switches


def with_optimizer(make, **settings):
    return lambda params, lr, **kwargs: TorchOptimizer(params, partial(make, **settings), lr=lr, **kwargs)


def switch_contestants(case, args, folder):
    "Training epochs of our learner, by what is different from its defaults"
    recipe = replace(make_recipe(case), train=TrainSettings(epochs=1, lr=LR, optimizer="radam"))
    dls = make_loaders(case, recipe, folder)
    adamw, radam = torch.optim.AdamW, partial(torch.optim.RAdam, decoupled_weight_decay=True)
    optimizers = {
        "RAdam, foreach of PyTorch": with_optimizer(radam, foreach=True),
        "RAdam, loop of fastai": fastai.optimizer.RAdam,
        "AdamW, fused": with_optimizer(adamw, fused=True),
        "AdamW, foreach": with_optimizer(adamw, foreach=True),
        "AdamW, loop of fastai": fastai.optimizer.Adam,
    }
    recipes = {"defaults (RAdam in a fused kernel, channels-last)": recipe,
               "contiguous": change_recipe(recipe, "device.channels_last=false")}
    if fast_precision(CPU) == "bf16":
        recipes["bf16"] = change_recipe(recipe, "device.precision=bf16")
    if args.compile and shutil.which("c++") and case.model.arch == small_resnet["arch"]:
        recipes["compiled"] = change_recipe(recipe, "device.compile=true")
    before = Rewound(dls, recipe, (*recipes, *optimizers))
    learners = {name: our_learner(dls, recipes.get(name, recipe), folder, model)
                for name, model in before.models.items()}
    for name, learn in learners.items():
        learn.opt_func = optimizers.get(name, learn.opt_func)
        learn.add_cb(WithoutValidation())
    return {name: partial(epoch_of, learn, recipe.train) for name, learn in learners.items()}, before, len(dls.train)


def first_seconds(contestants, before, name):
    "Seconds of the first epoch of a contestant, in which its network is compiled"
    before(name)
    start = time.perf_counter()
    contestants[name]()
    return time.perf_counter() - start


def emulated_bf16(model, pixels, repeats):
    "Forward and backward of one image in float32 and in bfloat16"
    net = recipe_model(replace(get_recipe("laptop"), model=model), 8).to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, pixels, pixels).contiguous(memory_format=torch.channels_last)

    def run(enabled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = net(x)
        y.float().sum().backward()

    seconds = interleave({"float32": partial(run, False), "bfloat16": partial(run, True)}, repeats)
    return float((seconds["bfloat16"] / seconds["float32"]).median())


def switch_section(args, cases, folder):
    parts = ["## Switches\n\nTraining epochs of our learner, each with one thing different from its defaults; ratios "
             "above 1 are slower."]
    for case in cases:
        contestants, before, steps = switch_contestants(case, args, folder)
        default, text = next(iter(contestants)), ""
        if "compiled" in contestants:
            text = f" The first compiled epoch took {first_seconds(contestants, before, 'compiled'):.0f} s."
        table = table_of(interleave(contestants, args.repeats, clock=CLOCKS[args.clock], before=before), default, steps)
        table.columns = [c.replace(default, "the defaults") for c in table.columns]
        parts.append(f"### {case.name}\n\n{markdown(table, 4)}\n\nAn epoch of {steps} steps.{text}")
    if not args.compile or not shutil.which("c++"):
        parts.append("`torch.compile` was left out: " + ("it was not asked for." if not args.compile
                                                         else "there is no C++ compiler."))
    if fast_precision(CPU) != "bf16":
        ratio = emulated_bf16(cases[0].model, cases[0].pixels, args.repeats)
        parts.append(
            "bfloat16 was left out of the table: this processor has no instructions for it, so PyTorch emulates it, "
            "and `precision='auto'` stays with float32. "
            f"Forward and backward of the first network, two images: {ratio:.1f} times the time of float32."
        )
    return parts


# From files to weights


class NaiveDataset(torch.utils.data.Dataset):
    "Six PNGs per site through PIL, float32 from the start, every image transformed by itself"

    def __init__(self, sites, classes, window, mean, std, times):
        self.paths = [[str(f) for f in site_files(f)] for f in sites.files]
        self.targets, self.times = [classes.index(s) for s in sites.sirna], times
        self.window, self.mean, self.std = window, np.float32(mean)[:, None, None], np.float32(std)[:, None, None]

    def __len__(self):
        return len(self.paths) * self.times

    def __getitem__(self, i):
        i %= len(self.paths)
        x = np.stack([np.asarray(Image.open(p), np.float32) for p in self.paths[i]])
        top, left = (int(torch.randint(n - self.window + 1, ())) for n in x.shape[1:])
        x = x[:, top : top + self.window, left : left + self.window]
        x = np.rot90(x, int(torch.randint(4, ())), (1, 2))
        x = x[:, :, ::-1] if torch.rand(()) < 0.5 else x
        x = (x - self.mean) / self.std
        return torch.from_numpy(np.ascontiguousarray(x)), self.targets[i]


def naive_epoch(model, loader):
    "The loop of a ten-day log: Adam, cross entropy, a look at the loss of each step"
    model.train()
    opt, loss_func, total = torch.optim.Adam(model.parameters(), lr=LR), nn.CrossEntropyLoss(), 0.0
    for x, y in loader:
        loss = loss_func(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        total += loss.item()
    return total


def pipeline_contestants(args, folder):
    "Epochs from files, and the number of sites in one"
    from rcic_fastai.data.pack import pack_sites

    pixels, window, batch = (96, 64, 4) if args.quick else (512, 64, 32)
    sites = select_sites(ready_screen(folder, pixels, 4 if args.quick else 16))
    store = pack_sites(sites, folder / f"store-{pixels}", progress=False)
    n = len(sites) if args.quick else 4 * len(sites)
    settings = dict(model=ModelSettings(**small_resnet, head="linear"), loss=LossSettings("cross_entropy", {}))
    recipe = replace(get_recipe("laptop"), train=TrainSettings(epochs=1, lr=LR, optimizer="adam", weight_decay=0.0),
                     **settings)
    data = (f"data.crop={window}", f"data.workers={args.workers}", "data.intensity=0", f"data.batch_size={batch}",
            f"data.epoch_sites={n}")
    recipe = change_recipe(recipe, *data, "device.precision=fp32")
    dls = recipe_dataloaders(sites, recipe, path=folder, device=CPU, source=store)
    ours = our_learner(dls, recipe, folder)
    own = NaiveDataset(sites, list(dls.vocab), window, *dls.stats, times=-(-n // len(sites)))
    loader = torch.utils.data.DataLoader(own, batch, shuffle=True, num_workers=args.workers)
    from_png = our_learner(recipe_dataloaders(sites, recipe, path=folder, device=CPU), recipe, folder)
    epochs = {
        "naive": partial(naive_epoch, recipe_model(recipe, len(dls.vocab)), loader),
        "ours, from the PNGs": partial(epoch_of, from_png, recipe.train),
        "ours": partial(epoch_of, ours, recipe.train),
    }
    return (epochs, pd.Series({"naive": len(own), "ours, from the PNGs": shown(from_png), "ours": shown(ours)}),
            (pixels, window, batch))


def shown(learn):
    "Sites in a training epoch"
    return sum(len(b[0]) for b in learn.dls.train)


def pipeline_section(args, cases, folder):
    try:
        epochs, sites, (pixels, window, batch) = pipeline_contestants(args, folder)
    except ModuleNotFoundError as e:
        return [f"## From files to weights\n\nLeft out: {e}."], {}
    seconds = interleave(epochs, args.repeats)
    table = summary(seconds, "naive", units=sites, unit="site")
    text = (
        f"## From files to weights\n\nThe small ResNet on random windows of {window} pixels in sites of "
        f"6x{pixels}x{pixels}, batches of {batch}, Adam and cross entropy, float32. "
        "*naive* (as in the ten-day log): six PNGs through PIL, float32 from there on, each image transformed by "
        f"itself, a plain DataLoader with {args.workers} processes. "
        f"*ours*: the packed store, {args.workers} threads that read ahead, uint8 until the windows are cut, "
        "everything else in batches. Files are in the page cache."
    )
    return [text, markdown(table)], dict(pipeline=float(table.loc["ours", "x naive"]))


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=REPEATS, help="how often each contestant runs")
    parser.add_argument("--quick", action="store_true",
                        help="tiny settings, to see that it works; writes nothing unless --out is given")
    parser.add_argument("--out", type=Path,
                        help="Markdown file to write; default: results/training.md beside this script")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS, help="parts to measure")
    parser.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="of the loops and switches, which run in one thread: 'processor' does not count what "
                        "others do")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads that read")
    parser.add_argument("--no-compile", dest="compile", action="store_false",
                        help="leave torch.compile out, which takes minutes")
    parser.add_argument("--work", type=Path, help="folder for screens and stores, kept; default: a temporary one")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be 1 or more")
    if args.quick:
        args.repeats, args.compile = min(args.repeats, 2), False
    return args


def measure_all(args, folder):
    "Markdown of all sections, and the ratios that matter"
    cases, parts, ratios = QUICK if args.quick else CASES, [], {}
    if "loop" in args.sections:
        text, ratios = loop_section(args, cases, folder)
        parts += text
    if "switches" in args.sections:
        parts += switch_section(args, cases, folder)
    if "pipeline" in args.sections:
        text, found = pipeline_section(args, cases, folder)
        parts, ratios = parts + text, {**ratios, **found}
    return parts, ratios


def main(argv=None):
    args = arguments(argv)
    torch.set_num_threads(int(THREADS))
    out = args.out or (Path(tempfile.mkdtemp()) if args.quick else Path(__file__).parent / "results") / "training.md"
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        parts, ratios = measure_all(args, folder)
    intro = (f"{args.repeats} repeats in turns; medians and quartiles. {THREADS} thread for PyTorch, {args.clock} "
             f"clock. {machine('fastai', 'timm', 'pillow')}")
    write_report(out, "Training", intro, *parts)
    return ratios


if __name__ == "__main__":
    main()
