"""A real batch effect: how well a linear probe tells plates and cell types of real control wells from embeddings.

Wells B02 of four experiments (one per cell type), four plates each, two sites, the four stains that both sites have;
every site in 16 windows of 128 pixels. A small network learns the cell type from plates 1-3. The probe of the plate
learns from one site of each of the 16 plates and is asked about the other; that of the cell type learns from three
plates and is asked about the fourth. `laptop` learns from mixed batches for six epochs. The default chooses network,
loss, epochs and histograms itself; its batches are mixed too, because a plate holds one cell type.
"""

import argparse
import os
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.update({"TQDM_DISABLE": "1"})
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402

MIXED = ["data.domain=null", "inference.batchnorm=running"]
LAPTOP = [*MIXED, "data.epoch_sites=128", "train.lr=4e-3"]
# name -> (recipe, where None is the default, and its settings)
WAYS = {"laptop, screen": ("laptop", [*LAPTOP, "data.standardize=screen"]),
        "laptop, image": ("laptop", [*LAPTOP, "data.standardize=image"]),
        "laptop, plate": ("laptop", [*LAPTOP, "data.standardize=plate"]),
        "laptop, histograms of the plate": ("laptop", [*LAPTOP, "data.standardize=image",
                                                       "data.match_histograms=plate"]),
        "default, as it comes": (None, ["data.epoch_sites=128"])}


def windows(sites, channels, size=128):
    "uint8 (N, C, size, size) and the row of the site of each window"
    from rcic_fastai.data.store import read_site

    x = np.stack([read_site(f, channels) for f in sites.files])
    n = x.shape[-1] // size
    x = x.reshape(len(x), len(channels), n, size, n, size).transpose(0, 2, 4, 1, 3,
                                                                     5).reshape(-1, len(channels), size, size)
    return torch.from_numpy(x), np.repeat(np.arange(len(sites)), n * n)


def embed(learn, sites, channels, batchnorm, size=128):
    "Embeddings of the windows, standardised like the training images, and the site of each"
    from fastai.vision.core import TensorImage

    from rcic_fastai.data.augment import MatchHistograms, Standardize
    from rcic_fastai.model.batchnorm import BatchNormMode
    from rcic_fastai.data.context import ContextEncoder

    x, site = windows(sites, channels, size)
    encoder = next(t for t in learn.dls.train_ds.tls[1].tfms if isinstance(t, ContextEncoder))
    number = {e: i for i, e in enumerate(encoder.experiments)}
    context = torch.tensor([[0, number[e], p - 1] for e, p in zip(sites.experiment, sites.plate)])[site]
    for tfm in (t for t in learn.dls.train.after_batch.fs if isinstance(t, (Standardize, MatchHistograms))):
        x, context = tfm((TensorImage(x), context))
    out, keys = (np.zeros((len(x), learn.model.n_features), np.float32), [site * 0] if batchnorm == "running"
                 else [sites.plate.to_numpy()[site], sites.experiment.to_numpy()[site]])
    domains = pd.Series(list(zip(*keys))).factorize()[0]
    for d in np.unique(domains):
        rows = np.flatnonzero(domains == d)
        with torch.no_grad():
            y = BatchNormMode(learn.model, batchnorm).predict([(x[rows].as_subclass(torch.Tensor), context[rows])],
                                                              forward=learn.model.embed)
        out[rows] = torch.cat(y).numpy()
    return out, site


def probes(x, site, sites):
    "Accuracies of the probes of the plate (of 16) and of the cell type (of 4)"
    from rcic_fastai.profile.metrics import batch_probe

    plate = (sites.experiment + "_" + sites.plate.astype(str)).to_numpy()[site]
    return (batch_probe(x, plate, folds=2, groups=site),
            batch_probe(x, sites.cell_type.to_numpy()[site], folds=4, groups=plate))


def measure(data, epochs=6, seeds=(0, 1, 2), ways=WAYS, size=128):
    "One row per way of standardising and kind of BatchNorm statistics"
    from rcic_fastai.data.select import select_sites
    from rcic_fastai.recipe.default import default_recipe
    from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe
    from rcic_fastai.run.train import train_run
    from rcic_fastai.screen.read import read_screen

    screen = replace(read_screen(data, check=False), channels=(1, 2, 3, 4))
    sites = select_sites(screen, "train", "controls", present_only=True, warn=lambda *a: None)
    rows = []
    for name, (recipe_name, settings) in ways.items():
        for seed in seeds:
            recipe = (laptop_recipe(get_recipe(recipe_name), epochs) if recipe_name else
                      default_recipe(screen, "cell_type", full=False)[0])
            recipe = change_recipe(recipe, *settings, f"data.crop={size}", f"seed={seed}")
            with tempfile.TemporaryDirectory() as tmp:
                learn = train_run(screen, recipe, Path(tmp) / "run", target="cell_type", wells="controls",
                                  valid="plate=4", present_only=True,
                                  say=lambda *a: None)
            for batchnorm in ("running", "domain"):
                plate, cell_type = probes(*embed(learn, sites, screen.channels, batchnorm, size), sites)
                rows.append(dict(standardise=name, batchnorm="running" if batchnorm == "running" else "of the plate",
                                 seed=seed,
                                 plate=plate.accuracy, cell_type=cell_type.accuracy, chance_plate=plate.chance,
                                 chance_cell_type=cell_type.chance))
    return pd.DataFrame(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/rcic"), help="folder of the real sample")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="where the table goes")
    args = parser.parse_args(argv)
    table = measure(args.data)
    text = table.groupby(["standardise", "batchnorm"], sort=False)[["plate", "cell_type"]].agg(
        lambda v: f"{v.mean():.3f} ± {v.std(ddof=1):.3f}").reset_index()
    lines = [list(text.columns), ["---"] * len(text.columns), *text.astype(str).values.tolist()]
    page = [__doc__.strip(),
            f"Mean ± standard deviation over 3 trainings; chance {table.chance_plate[0]:.3f} and "
            f"{table.chance_cell_type[0]:.3f}. "
            "Made by `python benchmarks/real_plates.py --data DIR`.",
            "\n".join("| " + " | ".join(line) + " |" for line in lines)]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "real_plates.md").write_text("# Plates and cell types of real control wells\n\n" + "\n\n".join(page)
                                             + "\n")
    print("\n\n".join(page))


if __name__ == "__main__":
    main()
