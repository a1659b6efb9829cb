"""Training steps on a GPU at the real size: precisions, memory layouts, torch.compile, a bare loop, feeding.

`make bench NAME=gpu` on a machine with a CUDA GPU. `--torch-only` needs nothing but torch, timm, numpy and pandas and
leaves out what needs the library. `--device cpu --quick` walks through everything in seconds; its numbers mean nothing.
"""

import argparse
import gc
import os
import tempfile
import warnings
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

os.environ.update({"TQDM_DISABLE": "1"})
# contestants of different needs share the memory
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
warnings.filterwarnings("ignore")

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from measure import REPEATS, interleave, machine, markdown, summary, write_report  # noqa: E402

# name in the report: timm's network for the bare loops, settings of `ModelSettings` for the library; the SE-ResNeXts
# are the same network
NETWORKS = {"SE-ResNeXt101": ("legacy_seresnext101_32x4d", dict(arch="se_resnext101_32x4d")),
            "DenseNet-161": ("densenet161", dict(arch="densenet161"))}
SMALL = {"small ResNet": ("test_resnet", dict(arch="test_resnet"))}
CLASSES, CHANNELS = 1108, 6


class Variant(NamedTuple):
    "How a step is computed"

    precision: str  # 'fp32' or 'bf16' (autocast; weights and their gradients stay float32)
    tf32: bool  # may float32 convolutions and products use TF32?
    channels_last: bool = False
    compiled: bool = False


VARIANTS = {
    "fp32, no TF32": Variant("fp32", tf32=False),
    "fp32, TF32": Variant("fp32", tf32=True),
    "fp32, TF32, channels-last": Variant("fp32", tf32=True, channels_last=True),
    "bf16": Variant("bf16", tf32=True),
    "bf16, channels-last": Variant("bf16", tf32=True, channels_last=True),
    "bf16, channels-last, compiled": Variant("bf16", tf32=True, channels_last=True, compiled=True),
}
PLAIN, BEST_EAGER = "fp32, no TF32", "bf16, channels-last"


# The device


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allow_tf32(allowed):
    "TF32 in convolutions and in matrix products, both or neither"
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def clean(device):
    "Give memory of what is no longer used back to the device"
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def allocated(device):
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_memory(function, device):
    "Largest number of bytes allocated while `function` runs"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else float("nan")


# The bare loop


def synthetic(batch, size, device):
    "Images as they come out of the batch transforms, and their classes"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, CHANNELS, size, size, generator=generator)
    return x.to(device), torch.randint(CLASSES, (batch,), generator=generator).to(device)


class BareSteps:
    "Forward, backward and optimiser step of a network on one batch, `n` times a call"

    def __init__(self, model, batch, variant, n, backend="inductor"):
        self.x, self.y = batch
        self.variant, self.n, self.device = variant, n, self.x.device
        layout = torch.channels_last if variant.channels_last else torch.contiguous_format
        model = model.to(self.device, memory_format=layout).train()
        self.x = self.x.contiguous(memory_format=layout)
        self.opt = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-2, fused=True)
        self.model = torch.compile(model, backend=backend) if variant.compiled else model

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.variant.precision == "bf16" else nullcontext()

    def run(self, n):
        for _ in range(n):
            with self.autocast():
                out = self.model(self.x)
            torch.nn.functional.cross_entropy(out.float(), self.y).backward()
            self.opt.step()
            self.opt.zero_grad(set_to_none=True)

    def __call__(self):
        self.run(self.n)
        synchronize(self.device)


def timm_model(name):
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, in_chans=CHANNELS, num_classes=CLASSES)


def attempt(make):
    "What `make` returns and None, or None and why not; out of memory is a result, not an error"
    try:
        return make(), None
    except torch.cuda.OutOfMemoryError:
        pass  # what holds the tensors of the failed step is gone with the exception
    return None, "out of memory"


def bytes_needed(name, batch, size, device, others):
    """Memory of a float32 step, the hungriest variant, beside `others` networks that wait with their optimisers and
    batches"""
    allow_tf32(False)
    before = allocated(device)
    steps = BareSteps(timm_model(name), synthetic(batch, size, device), VARIANTS[PLAIN], 1)
    peak = peak_memory(lambda: steps.run(2), device)
    return peak + others * (allocated(device) - before)


def largest_batch(args, name, most=256, share=0.9):
    "The largest power of two that trains in float32 within a share of the device's memory; 0 if not even 2 fits"
    room, best, batch = share * torch.cuda.get_device_properties(args.device).total_memory, 0, 2
    while batch <= most:
        needed, _ = attempt(lambda b=batch: bytes_needed(name, b, args.size, args.device, len(args.variants) - 1))
        clean(args.device)
        if needed is None or needed > room:
            break
        best, batch = batch, 2 * batch
    return best


def warmed(name, batch, variant, args):
    """A bare contestant after its first steps (kernel choice, compiling, state of the optimiser), and the bytes it
    needs at most"""
    allow_tf32(variant.tf32)
    before = allocated(args.device)
    steps = BareSteps(timm_model(name), batch, variant, args.steps, args.backend)
    steps.run(args.warmup)
    # counted for everybody, though only a channels-last copy is their own
    shared = batch[0].nbytes if steps.x is batch[0] else 0
    return steps, peak_memory(lambda: steps.run(1), args.device) - before + shared


def measure_steps(name, batch_size, args):
    "Seconds, a row per repeat and a column per variant; peak memory in GiB; why variants are missing"
    batch, contestants, memory, failed = synthetic(batch_size, args.size, args.device), {}, {}, {}
    for variant_name in args.variants:
        variant = VARIANTS[variant_name]
        try:
            done, why = attempt(lambda v=variant: warmed(name, batch, v, args))
        except Exception as e:
            if not variant.compiled:
                raise
            # no compiler here, say
            done, why = (None,
                         f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no message'}")
        if done is None:
            failed[variant_name] = why
        else:
            contestants[variant_name], memory[variant_name] = done[0], done[1] / 2**30
        clean(args.device)

    def before(variant_name):
        allow_tf32(VARIANTS[variant_name].tf32)
        synchronize(args.device)

    seconds = interleave(contestants, args.repeats, before=before)
    return seconds, pd.Series(memory, dtype=float), failed


def step_table(seconds, memory, batch_size, n):
    "One row per variant; against plain float32, or the first that ran"
    t = summary(seconds, baseline=seconds.columns[0], units=n * batch_size, unit="image")
    if memory.notna().all():  # a CPU does not count
        t["peak memory, GiB"] = memory
    return t.rename_axis("step")


# The library


class SameBatch:
    "A loader that hands out one batch, already on the device, `n` times"

    def __init__(self, batch, n):
        self.batch, self.n, self.dataset, self.device = batch, n, range(n * len(batch[0])), batch[0].device

    def __len__(self):
        return self.n

    def __iter__(self):
        return iter([self.batch] * self.n)


def bench_recipe(model, batch_size):
    "A recipe as it would train on a GPU"
    from rcic_fastai.recipe.settings import DataSettings, DeviceSettings, LossSettings, ModelSettings, Recipe
    from rcic_fastai.recipe.settings import TrainSettings

    return Recipe(name="gpu", data=DataSettings(domain="experiment", batch_size=batch_size),
                  model=ModelSettings(**{"head": "linear", **model}),
                  loss=LossSettings("cross_entropy"), train=TrainSettings(optimizer="adamw"),
                  device=DeviceSettings("bf16", channels_last=True))


def make_store(folder, size, n_sirnas):
    "Sites of two simulated experiments, and the store they are packed in"
    from rcic_fastai.data.select import select_sites
    from rcic_fastai.screen.read import read_screen
    from rcic_fastai.screen.simulate import simulate_screen
    from rcic_fastai.data.pack import pack_sites

    screen = read_screen(simulate_screen(folder / "screen", n_sirnas=n_sirnas, n_train=2, n_test=0,
                                         cell_types=("HUVEC",), n_positive=1,
                                         image_size=size, missing=0, progress=False,
                                         workers=1 if n_sirnas < 16 else None))
    sites = select_sites(screen)
    return sites, pack_sites(sites, folder / "store", progress=False)


def store_loader(sites, store, batch_size, steps, args, **kwargs):
    "DataLoaders from the store whose epoch has about so many full batches; sites come again as often as that takes"
    from rcic_fastai.data.block import screen_dataloaders

    repeats = max(1, round(steps * batch_size / len(sites)))
    bs = min(batch_size, len(sites) // 2 * repeats)  # each batch is of one of the two experiments
    return screen_dataloaders(sites, source=store, bs=bs, num_workers=args.workers, repeats=repeats, device=args.device,
                              **kwargs)


def n_images(dls):
    "Images of a training epoch, whose batches are full"
    return len(dls.train) * dls.train.bs


def epoch_of(learn, device):
    "Function that trains one epoch without a progress bar"

    def epoch():
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-4)
        synchronize(device)

    return epoch


def measure_learner(model, batch_size, sites, store, args):
    "Seconds of bare loop, learner on the same synthetic batch, and learner fed from the store; images per run of each"
    from fastai.data.core import DataLoaders

    from rcic_fastai.train.network import recipe_model
    from rcic_fastai.train.learner import screen_learner

    allow_tf32(True)
    recipe = bench_recipe(model, batch_size)
    x, y = synthetic(batch_size, args.size, args.device)
    context = torch.zeros(batch_size, 4, dtype=torch.int64, device=args.device)
    same = DataLoaders(SameBatch((x, context, y), args.steps), SameBatch((x, context, y), 0), device=args.device)
    fed = store_loader(sites, store, batch_size, args.steps, args, classes=range(CLASSES))

    def network():
        torch.manual_seed(0)
        return recipe_model(recipe, CLASSES, CHANNELS).to(args.device)

    contestants = {
        "bare loop, synthetic": BareSteps(network(), (x, y), VARIANTS[BEST_EAGER], args.steps),
        "learner, synthetic": epoch_of(screen_learner(same, recipe, network()), args.device),
        f"learner, from the store ({args.workers} threads)": epoch_of(screen_learner(fed, recipe, network()),
                                                                      args.device),
    }
    seconds = interleave(contestants, args.repeats, before=lambda name: synchronize(args.device))
    return seconds, pd.Series([args.steps * batch_size] * 2 + [n_images(fed)], index=seconds.columns)


def measure_loading(batch_size, sites, store, args):
    "Seconds to bring batches to the device, as they are and after the batch transforms; images per run"
    kinds = {"uint8 on the device": dict(transforms=[]), "after the batch transforms": {}}
    loaders = {name: store_loader(sites, store, batch_size, 4 * args.steps, args, **kwargs)
               for name, kwargs in kinds.items()}

    def drain(dls):
        def run():
            for batch in dls.train:
                pass
            synchronize(args.device)
            return batch

        return run

    seconds = interleave({name: drain(dls) for name, dls in loaders.items()}, args.repeats,
                         before=lambda name: synchronize(args.device))
    return seconds, pd.Series({name: n_images(dls) for name, dls in loaders.items()})


def verdict(feeding, steps):
    "Does feeding exceed the step? In words, from images per second"
    fastest = max(steps, key=steps.get)
    ratio = feeding / steps[fastest]
    return (f"Feeding: {feeding:,.0f} images/s reach the device, {ratio:.2f} times what the fastest step here takes "
            f"({fastest}: {steps[fastest]:,.0f} images/s): "
            + ("feeding exceeds the step." if ratio > 1 else "the step waits for its images."))


# The command


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 ... or cpu")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--batch", type=int,
                        help="images per step; default: the largest power of two that trains in float32 (on a CPU 2)")
    parser.add_argument("--size", type=int, default=512, help="side of the images in pixels")
    parser.add_argument("--steps", type=int, default=5, help="steps per measurement")
    parser.add_argument("--warmup", type=int, default=4, help="steps before anything is measured")
    parser.add_argument("--workers", type=int, default=16, help="threads that read from the store")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--torch-only", action="store_true", help="bare loops with timm's networks only")
    parser.add_argument("--out", type=Path,
                        help="file of the report; default: benchmarks/results/gpu.md, with --quick a temporary one")
    parser.add_argument("--quick", action="store_true",
                        help="48 pixels, batches of 2, a small network: that it runs, no result")
    args = parser.parse_args(argv)
    args.device, args.backend, args.sirnas = torch.device(args.device), "inductor", 64
    if args.device.type not in ("cuda", "cpu"):
        parser.error(f"--device is {args.device}, expected cuda, cuda:1 ... or cpu")
    if args.quick:  # the eager backend needs no compiler
        args.size, args.steps, args.warmup, args.workers, args.backend, args.sirnas, args.batch = (
            48, 1, 1, 2, "eager", 4, args.batch or 2)
        args.repeats = min(args.repeats, 2)
    folder = Path(tempfile.mkdtemp()) if args.quick else Path(__file__).parent / "results"
    args.out = args.out or folder / "gpu.md"
    return args


def library_missing():
    return [name for name in ("fastai", "rcic_fastai") if find_spec(name) is None]


def network_parts(name, timm_name, model, data, args):
    "Tables of one network, as parts of the report; images per second of each kind of step"
    torch.compiler.reset()
    batch_size = args.batch or (largest_batch(args, timm_name) if args.device.type == "cuda" else 2)
    heading = f"## {name}, {CHANNELS}x{args.size}x{args.size}, batches of {batch_size}"
    if not batch_size:
        return [f"{heading}\n\nNot even a batch of 2 fits into the memory of this device."], {}, {}, 0
    seconds, memory, failed = measure_steps(timm_name, batch_size, args)
    parts, tables, rates = [heading], {}, {}
    if len(seconds.columns):
        tables["steps"] = step_table(seconds, memory, batch_size, args.steps)
        rates = tables["steps"]["images/s"].to_dict()
        parts.append(markdown(tables["steps"]))
    parts += [f"Not measured: {variant}: {why}." for variant, why in failed.items()]
    torch.compiler.reset()  # what it keeps of the compiled network
    clean(args.device)
    if data:
        seconds, units = measure_learner(model, batch_size, *data, args)
        tables["learner"] = summary(seconds, baseline=seconds.columns[0], units=units,
                                    unit="image").rename_axis("bf16, channels-last")
        rates["learner"] = tables["learner"]["images/s"].iloc[1]
        parts.append(markdown(tables["learner"]))
    clean(args.device)
    return parts, tables, {f"{name}, {k}": v for k, v in rates.items()}, batch_size


def explanation(args, with_library):
    "The report in words"
    text = ["Forward, backward and optimiser step (AdamW, fused) on a synthetic batch that is on the device already; "
            f"{args.repeats} repeats in turns of {args.steps} steps "
            f"each, after a warm-up of {args.warmup}, the device synchronised before and after each measurement; "
            "medians, ratios within each repeat, quartiles behind both. "
            "TF32 is switched as the name of a row says, for convolutions and matrix products alike, and is on for "
            "bf16; cudnn.benchmark is on. bf16 is autocast, weights stay "
            "float32. Peak memory: tensors of the network, its optimiser and a step, without what the driver holds. "
            "The networks of this table are timm's."]
    if with_library:
        text.append("`learner`: `screen_learner` of rcic_fastai with its usual callbacks, as in a run without a "
                    "validation set (accuracy on training batches), against a bare loop with the same "
                    f"network. `from the store`: uint8 images of a simulated screen, packed, read by {args.workers} "
                    "threads, transformed on the device. The files are in the "
                    "system's cache, so a slow disk is not measured.")
    return text


def main(argv=None):
    "Measure, write the report; returns tables by network, or None where there is nothing to measure on"
    args = arguments(argv)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA GPU here, so nothing was measured and nothing was written; `--device cpu --quick` "
              "walks through the script without one.")
        return None
    with_library = not args.torch_only and not library_missing()
    if not args.torch_only and not with_library:
        print(f"{' and '.join(library_missing())} cannot be imported here: only the part that needs torch and timm is "
              "measured, as with --torch-only.")
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device.index or 0)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    networks = SMALL if args.quick else {name: NETWORKS[name] for name in args.networks}
    tables, parts, rates, batches = {}, [], {}, []
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = make_store(Path(folder), args.size, args.sirnas) if with_library else None
            for name, (timm_name, model) in networks.items():
                more, tables[name], speeds, batch_size = network_parts(name, timm_name, model, data, args)
                parts, rates, batches = parts + more, {**rates, **speeds}, [*batches, batch_size]
            if data and rates:
                seconds, units = measure_loading(max(batches), *data, args)
                tables["loading"] = summary(seconds, units=units, unit="image").rename_axis("loading")
                parts += [f"## Loading, batches of {max(batches)}", markdown(tables["loading"]),
                          verdict(tables["loading"]["images/s"].iloc[0], rates)]
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = before
    cuda = (f" CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}." if args.device.type == "cuda"
            else " Measured on the CPU, which shows only that the script runs.")
    write_report(args.out, "Training steps on a GPU", *explanation(args, with_library), *parts,
                 machine("timm", "fastai", "numpy") + cuda)
    return tables


if __name__ == "__main__":
    main()
