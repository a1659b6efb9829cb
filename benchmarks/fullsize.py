"""Each recipe at full size: build its network and take one real optimiser step on two real sites.

A site has 6x512x512 pixels, one of the Human Protein Atlas 4x512x512.

`make bench NAME=fullsize`; needs ../shared/rcic beside the checkout (or --data). No weights are downloaded: networks
begin at random.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

THREADS = "2"
REAL = Path(__file__).parents[1].parent / "shared" / "rcic"


def one_step(name, data, size):
    "Seconds, memory and loss of a step, in this process"
    os.environ.update({"OMP_NUM_THREADS": THREADS, "MKL_NUM_THREADS": THREADS, "TQDM_DISABLE": "1"})
    warnings.filterwarnings("ignore")
    import torch
    from fastai.callback.core import Callback

    from rcic_fastai.loss.by_name import multilabel_losses
    from rcic_fastai.recipe.published import get_recipe
    from rcic_fastai.screen.sites import present_sites
    from rcic_fastai.screen.read import read_screen
    from rcic_fastai.train.loaders import recipe_dataloaders
    from rcic_fastai.train.learner import fit_stage, screen_learner

    class Clock(Callback):
        order = 150

        def before_batch(self):
            self.start = time.perf_counter()

        def after_step(self):
            self.seconds, self.stepped = time.perf_counter() - self.start, True

    torch.set_num_threads(int(THREADS))
    screen = read_screen(data)
    sites = present_sites(screen.sites())[0].head(2).reset_index(drop=True)
    recipe = get_recipe(name)
    # two sites make a step: nothing is accumulated, nothing frozen, nothing downloaded, no controls that are not there
    stage = replace(recipe.train, epochs=1, accumulate=1, freeze_epochs=0, keep="last")
    recipe = replace(recipe, data=replace(recipe.data, batch_size=2, size=size),
                     model=replace(recipe.model, pretrained=False, first_conv=recipe.model.first_conv), train=stage)
    if name.startswith("hpa_"):  # four of the channels; 12,815 antibodies have images of their own
        target, channels, n_classes = ("labels", (1, 2, 3, 4), 28) if recipe.loss.name in multilabel_losses else (
            "antibody", (1, 2, 3, 4), 12815)
    else:
        target, channels, n_classes = "sirna", screen.channels, 1139 if recipe.data.control_classes else 1108
    # the real sites are of one control; two classes make it two examples
    sites = sites.assign(sirna=[0, 1], antibody=[0, 1], labels=[(0, 25), (7,)])
    dls = recipe_dataloaders(sites, recipe, target=target, channels=channels, classes=list(range(n_classes)),
                             cell_types=screen.cell_types, experiments=screen.experiments, device=torch.device("cpu"))
    learn, clock = screen_learner(dls, recipe), Clock()
    before = {k: v.clone() for k, v in learn.model.named_parameters()}
    with learn.no_bar(), learn.no_logging():
        fit_stage(learn, stage, [clock])
    moved = sum(not torch.equal(v, before[k]) for k, v in learn.model.named_parameters())
    assert clock.stepped and torch.isfinite(learn.recorder.losses[0])
    x = dls.train_ds[0][0]
    return dict(arch=recipe.model.arch, image="x".join(map(str, x.shape)), classes=n_classes,
                parameters=sum(p.numel() for p in learn.model.parameters()) / 1e6,
                seconds=clock.seconds, memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                loss=float(learn.recorder.losses[0]),
                moved=f"{moved} of {len(before)}")


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REAL, help="folder of a screen with sites of 512 pixels")
    parser.add_argument("--recipes", nargs="+", help="which ones; by default all but the laptop's")
    parser.add_argument("--size", type=int,
                        help="side that images are resized to, to see that it works; writes nothing unless --out is "
                        "given")
    parser.add_argument("--out", type=Path,
                        help="Markdown file to write; default: results/fullsize.md beside this script")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    if args.one:
        print(json.dumps(one_step(args.one, args.data, args.size)))
        return None
    import pandas as pd
    from measure import machine, markdown, write_report

    from rcic_fastai.recipe.published import recipes

    rows = {}
    for name in args.recipes or [r for r in recipes if r != "laptop"]:
        size = ["--size", str(args.size)] if args.size else []
        done = subprocess.run([sys.executable, __file__, "--one", name, "--data", args.data, *size],
                              capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(
                f"{name}: {done.stderr.strip().splitlines()[-1] if done.stderr else f'ended with {done.returncode}'}")
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, rows[name], flush=True)
    table = pd.DataFrame(rows).T.rename_axis("recipe").rename(
        columns={"parameters": "million weights", "seconds": "s per step", "memory": "GB", "moved": "tensors moved"})
    intro = (
        "One step (forward, loss, backward, optimiser) of each recipe's main stage on two real sites of the screen, on "
        "the CPU; each in a process of its own, "
        "whose peak memory, libraries and data included, is `GB`. The two sites get two different classes. Random "
        f"weights, nothing accumulated, nothing frozen. {THREADS} threads. {machine('timm')}"
    )
    out = args.out or (None if args.size else Path(__file__).parent / "results" / "fullsize.md")
    if out:
        write_report(out, "The recipes at full size", intro, markdown(table))
    return table


if __name__ == "__main__":
    main()
