"""Prediction by the library against bare PyTorch loops with the same network, images and batches, on the CPU.

Every contestant starts from uint8 images in memory and ends with the logits of all sites: standardising each image, the
network, one thread, float32. The library's logits are compared with those of the bare loop that computes the same
thing, and a difference above 1e-4 ends the benchmark with an error.
"""

import argparse
import os
import tempfile
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

os.environ.update({"TQDM_DISABLE": "1"})
warnings.filterwarnings("ignore")

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from measure import REPEATS, interleave, machine, markdown, spread, summary, write_report  # noqa: E402
from torch.nn.modules.batchnorm import _BatchNorm  # noqa: E402

from rcic_fastai.data.select import select_sites  # noqa: E402
from rcic_fastai.predict.sites import predict_sites  # noqa: E402
from rcic_fastai.recipe.published import small_resnet  # noqa: E402
from rcic_fastai.screen.read import read_screen  # noqa: E402
from rcic_fastai.screen.simulate import simulate_screen  # noqa: E402
from rcic_fastai.recipe.settings import DataSettings, DeviceSettings, LossSettings, ModelSettings, Recipe  # noqa: E402
from rcic_fastai.train.loaders import recipe_dataloaders  # noqa: E402
from rcic_fastai.train.precision import fast_precision  # noqa: E402
from rcic_fastai.train.learner import screen_learner  # noqa: E402

# network, side of the images in pixels, treatments (two sites each in both experiments), sites per batch
SIZES = {"small ResNet, 64 pixels": (small_resnet, 64, 48, 32),
         "SE-ResNeXt50, 128 pixels": (dict(arch="se_resnext50_32x4d"), 128, 8, 8)}
QUICK = {"small ResNet, 32 pixels": (small_resnet, 32, 4, 4)}
TOLERANCE = 1e-4
BARE, BARE_BATCH, BARE_ADABN, BARE_WHOLE = (f"bare, {name}" for name in ("running", "batch", "two passes per domain",
                                                                         "domain as one batch"))
RUNNING, BATCH, DOMAIN, TTA, FAST = (f"rcic_fastai, {name}"
                                     for name in ("running", "batch", "domain", "running, 8 views",
                                                  "running, recipe's precision"))
# what is compared with what: (of one, of the other, passes of the other, in words)
PAIRS = [
    (RUNNING, BARE, 1, "running statistics: the library against the bare loop"),
    (BATCH, BARE_BATCH, 1, "batch statistics: the library against the bare loop"),
    (DOMAIN, BARE_BATCH, 1, "exact domain statistics against one bare pass with batch statistics"),
    (DOMAIN, BARE_ADABN, 1, "exact domain statistics against two bare passes that average batch statistics (AdaBN)"),
    (DOMAIN, BARE_WHOLE, 1, "exact domain statistics in batches against the whole domain as one bare batch"),
    (TTA, RUNNING, 8, "8 views against 8 times one view"),
    (FAST, RUNNING, 1, "the precision that recipes choose against float32"),
]


# The library's side


def make_screen(folder, n_sirnas, image_size):
    "Sites of two simulated experiments of equal size, on which no well is missing"
    simulate_screen(folder, n_sirnas=n_sirnas, n_train=2, n_test=0, cell_types=("HUVEC",), n_positive=1,
                    image_size=image_size, missing=0, workers=1, progress=False)
    return select_sites(read_screen(folder))


def make_learner(sites, network, bs):
    "A learner with an untrained network whose running statistics are those of the sites"
    recipe = Recipe(name="inference", data=DataSettings(domain="experiment", batch_size=bs, cache=True),
                    model=ModelSettings(**{"head": "linear", **network}),
                    loss=LossSettings("cross_entropy"), device=DeviceSettings("fp32", channels_last=False))
    dls = recipe_dataloaders(sites, recipe, device=torch.device("cpu"))
    learn = screen_learner(dls, recipe)
    with torch.no_grad(), with_batch_statistics(learn.model, None):
        for x in raw_batches(learn, sites, bs):
            learn.model(standardised(x))
    return learn, recipe


def raw_batches(learn, sites, bs):
    "The images of the sites as plain uint8 tensors"
    dl = learn.dls.test_dl(sites, after_batch=[], bs=bs, domain=None, shuffle=False, device=torch.device("cpu"))
    return [b[0].as_subclass(torch.Tensor) for b in dl]


# The bare loops


def standardised(x):
    "Each channel of each image to mean 0 and standard deviation 1, as the recipe does"
    x = x.float()
    var, mean = torch.var_mean(x, (-2, -1), correction=0, keepdim=True)
    return x.sub_(mean).div_(var.sqrt_().clamp_(min=1e-3))


class with_batch_statistics:
    """A model in eval mode but for its BatchNorms; `momentum=None` collects the plain average of the batches from
    here on"""

    def __init__(self, model, momentum=0.1):
        self.model = model.eval()
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        for m in self.norms:
            m.train()
            m.momentum = momentum
            if momentum is None:
                m.reset_running_stats()

    def __enter__(self):
        return self.model

    def __exit__(self, *exc):
        self.model.eval()


@torch.inference_mode()
def bare_running(model, batches):
    model.eval()
    return torch.cat([model(standardised(x)) for x in batches])


@torch.inference_mode()
def bare_batch(model, batches):
    with with_batch_statistics(model):
        return torch.cat([model(standardised(x)) for x in batches])


@torch.inference_mode()
def bare_adabn(model, domains):
    "Per domain one pass that averages the statistics of its batches, and one that uses them"
    out = []
    for batches in domains:
        with with_batch_statistics(model, None):
            for x in batches:
                model(standardised(x))
        out += [model(standardised(x)) for x in batches]
    return torch.cat(out)


# Measuring


def contestants(learn, fast, sites, bs):
    "Functions by name, each returning logits (N, K) of the sites, in order of experiment"
    domains = [raw_batches(learn, part, bs) for _, part in sites.groupby("experiment")]
    batches, whole = [x for d in domains for x in d], [torch.cat(d) for d in domains]
    models = [deepcopy(learn.model) for _ in range(4)]
    predict = lambda learn, **kwargs: torch.from_numpy(predict_sites(learn, sites, domain="experiment", bs=bs,
                                                                     progress=False, **kwargs).logits)
    return {
        BARE: lambda: bare_running(models[0], batches),
        RUNNING: lambda: predict(learn, batchnorm="running"),
        BARE_BATCH: lambda: bare_batch(models[1], batches),
        BATCH: lambda: predict(learn, batchnorm="batch"),
        BARE_ADABN: lambda: bare_adabn(models[2], domains),
        BARE_WHOLE: lambda: bare_batch(models[3], whole),
        DOMAIN: lambda: predict(learn, batchnorm="domain"),
        TTA: lambda: predict(learn, batchnorm="running", tta=8),
        FAST: lambda: predict(fast, batchnorm="running"),
    }


def differences(found):
    """Largest difference of logits from the bare loop that computes the same; of AdaBN, which approximates, from the
    exact domain statistics.

    Raises: RuntimeError if the library computes something else."""
    same = {RUNNING: BARE, BATCH: BARE_BATCH, DOMAIN: BARE_WHOLE}
    out = {a: (found[a] - found[b]).abs().max().item() for a, b in {**same, BARE_ADABN: BARE_WHOLE, FAST: BARE}.items()}
    for name in same:
        if not out[name] <= TOLERANCE:
            raise RuntimeError(f"{name}: logits differ by {out[name]:.2g} from those of {same[name]}, expected at most "
                               f"{TOLERANCE}")
    return pd.Series(out)


def measure(network, image_size, n_sirnas, bs, repeats=REPEATS):
    "Seconds, a row per repeat and a column per contestant; differences of logits; number of sites"
    with tempfile.TemporaryDirectory() as folder:
        sites = make_screen(Path(folder), n_sirnas, image_size).sort_values("experiment",
                                                                            kind="stable").reset_index(drop=True)
        learn, recipe = make_learner(sites, network, bs)
        fast = screen_learner(learn.dls, replace(recipe, device=DeviceSettings()), deepcopy(learn.model))
        functions = contestants(learn, fast, sites, bs)
        found = {name: f() for name, f in functions.items()}  # which warms up, too
        return interleave(functions, repeats, warmup=0), differences(found), len(sites)


def table(seconds, difference, n_sites):
    "One row per contestant"
    t = summary(seconds, baseline=BARE, units=n_sites, unit="site")
    t["logits differ by"] = [f"{difference[name]:.1e}" if name in difference else "" for name in t.index]
    return t.rename_axis("contestant")


def costs(seconds):
    "Time of one contestant as a share of another's, within each repeat"
    ratio = pd.DataFrame({words: seconds[a] / (n * seconds[b]) for a, b, n, words in PAIRS})
    return pd.DataFrame({"time, ratio": ratio.median(), "quartiles": spread(ratio)}).rename_axis("what")


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file of the report; default: benchmarks/results/inference.md, "
                        "with --quick a temporary one")
    parser.add_argument("--quick", action="store_true", help="few small images: that it runs, no result")
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp()) if args.quick else Path(__file__).parent / "results"
    args.out = args.out or folder / "inference.md"
    return args


def main(argv=None):
    "Measure, write the report; returns (table, costs) by size"
    args = arguments(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    results, parts = {}, []
    try:
        for name, (network, image_size, n_sirnas, bs) in (QUICK if args.quick else SIZES).items():
            seconds, difference, n = measure(network, image_size, n_sirnas, bs, args.repeats)
            results[name] = table(seconds, difference, n), costs(seconds)
            parts += [f"## {name}, {n} sites of 2 experiments, batches of {bs}", markdown(results[name][0]),
                      markdown(results[name][1])]
    finally:
        torch.set_num_threads(threads)
    write_report(
        args.out,
        "Inference",
        "Time from uint8 images in memory to the logits of all sites: each image standardised, the network forward, no "
        "gradients. `rcic_fastai` is "
        "`predict_sites` with cached images; `bare` is a PyTorch loop over ready-made batches with a copy of the same "
        "network. `running`: statistics kept in "
        "training. `batch`: those of each batch. `domain`: pooled exactly over the sites of each experiment, in "
        "batches. The bare ways to adapt to a domain "
        "are two passes per experiment, the first of which averages the statistics of batches, and each experiment as "
        "one batch.",
        f"{args.threads} thread{'s' if args.threads > 1 else ''}, {len(seconds)} repeats in turns, medians; ratios "
        "within each repeat, quartiles behind both. "
        f"`x {BARE}`: how many times faster than that loop. `logits differ by`: largest difference from the bare loop "
        "that computes the same thing (the two-pass way from the "
        f"exact one, the recipe's precision, here {fast_precision(torch.device('cpu'))}, from float32); above "
        f"{TOLERANCE:g} for a mode of the library the benchmark ends with an error.",
        *parts,
        machine("fastai", "timm", "numpy"),
    )
    return results


if __name__ == "__main__":
    main()
