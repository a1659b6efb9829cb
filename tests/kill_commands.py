"""Commands that are killed while they write, and two at once: `python kill_commands.py FOLDER` prints JSON.

Run by test_writing.py in a process of its own: each attempt is a fork, which kills itself with SIGKILL before or after
a file gets its name. With `all` after the folder it is every moment of `SERIES`, each in a folder of its own, and the
report is made from the library's template.
"""

import io
import json
import os
import shutil
import signal
import sys
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

os.environ.update({"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"})
warnings.filterwarnings("ignore")

import nbformat  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from forked import locks_of_its_own  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import rcic_fastai.files as files  # noqa: E402
from rcic_fastai.cli import core as cli, labels as hpa_cli  # noqa: E402
from rcic_fastai.profile.metrics import embedding_report  # noqa: E402, F401
from rcic_fastai.files import write_json  # noqa: E402
from rcic_fastai.screen.atlas import label_truth, read_hpa  # noqa: E402
from rcic_fastai.run.stack import stack_runs  # noqa: E402, F401
from rcic_fastai.predict.core import Predictions  # noqa: E402
from rcic_fastai.recipe.check import recipe_to_json  # noqa: E402
from rcic_fastai.report.core import make_report  # noqa: E402, F401
from rcic_fastai.screen.simulate_atlas import simulate_hpa  # noqa: E402
from rcic_fastai.data.pack import pack_screen  # noqa: E402, F401
from rcic_fastai.recipe.settings import CheckpointSettings, DataSettings, LossSettings, ModelSettings  # noqa: E402
from rcic_fastai.recipe.settings import Recipe  # noqa: E402
from rcic_fastai.recipe.settings import TrainSettings  # noqa: E402

# the moments of the tests; what they leave out is in `SERIES`
POINTS = dict(
    simulate=["simulation.json", "HUVEC-01/Plate2/B02_s2_w1.png", "HUVEC-02/Plate2/C11_s2_w1.png+"],
    train=["model.safetensors", "run.json+", "test.npz", "submission.csv"],
    embed=["train.npz"], report=["page.ipynb+"], stack=["statistics-valid", "fold2-class05", "run.json"],
)

# a file that gets its name: before that, + after that, ~ after that share of the time from there (or from the start) to
# the end
SERIES = dict(
    simulate=["simulation.json", "test.csv", "truth.csv+", "~.2", "HUVEC-01/Plate2/B02_s2_w1.png",
              "HUVEC-01/Plate2/B02_s2_w1.png+", "~.6", "HUVEC-02/Plate2/C11_s2_w1.png+"],
    train=["model.safetensors", "model.safetensors+", "recipe.json+", "run.json", "run.json+", "run.json~.2",
           "valid.npz", "valid.npz+", "valid.npz~.5", "test.npz", "test.npz+",
           "submission.csv", "submission.csv+"],
    embed=["~.2", "~.5", "~.8", "train.npz", "train.npz+"],
    report=["~.1", "~.4", "~.8", "page.ipynb", "page.ipynb+", "page.html", "page.html+"],
    stack=["stack.json", "statistics-valid", "statistics-test+", "settings.json", "fold1-class05", "fold2-class05+",
           "~.7", "test.npz", "test.npz+", "run.json", "run.json+"],
)

TINY = replace(Recipe(), model=ModelSettings(arch="resnet10t", arch_options=dict(channels=[8, 8, 8, 8], stem_width=8)),
               data=DataSettings(batch_size=8, cache=True),
               loss=LossSettings("am_softmax", dict(m=0.2, s=16.0)), train=TrainSettings(epochs=1, lr=1e-3),
               checkpoint=CheckpointSettings(every_steps=2))
ORPHANS = Path(sys.argv[1], "orphans") if len(sys.argv) > 1 else None
PAGE = """import warnings
import matplotlib.pyplot as plt
%config InlineBackend.figure_formats = ['svg', 'png']
warnings.warn('names its cell')
print(sorted(run) != [], {'a', 'set', 'of', 'text'})
plt.plot([1, 2]);"""  # what would differ from run to run
SCREEN = dict(sirnas=6, train_experiments=3, test_experiments=1, cell_types="HUVEC", image_size=32)


def kill_in(seconds):
    "SIGKILL from another process, in the middle of whatever is going on then"
    parent = os.getpid()
    if os.fork(): return
    time.sleep(seconds)
    if os.getppid() == parent: os.kill(parent, signal.SIGKILL)
    os._exit(0)


def kill_at(name, after=False, seconds=None):
    """SIGKILL when a file of that name is renamed into place, before, after or some time after that; in a worker of
    a pool it is the parent that dies"""
    replace_, parent = os.replace, os.getpid()
    if not name: return kill_in(seconds)

    def patched(a, b):
        hit = name in str(b)
        if not hit or after or seconds is not None: replace_(a, b)
        if not hit: return
        if seconds is not None: return kill_in(seconds)
        os.kill(parent, signal.SIGKILL)
        time.sleep(5)  # only a worker is still there
        ORPHANS.write_text(f"{b}: a worker outlived its parent")

    files.os.replace = patched


def attempt(what, at=None):
    "In a fork: 0, 1 with what was said, or minus the signal"
    r, w = os.pipe()
    pid = os.fork()
    if pid:
        os.close(w)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with os.fdopen(r, errors="replace") as f: return status, f.read() if status == 1 else ""
    os.close(r)
    said, status = "", 0
    try:
        locks_of_its_own()
        if at: kill_at(*at)
        with redirect_stdout(io.StringIO()): what()
    except BaseException as e:
        said, status = f"{type(e).__name__}: {e}", 1
    os.write(w, said[:4000].encode())
    os._exit(status)


def content(path):
    "What is compared: tensors of networks, arrays of archives, bytes of all else"
    if path.suffix == ".safetensors":
        return [(k, v.shape, v.numpy().tobytes()) for k, v in sorted(load_file(path).items())]
    if path.suffix == ".npz": return [(k, v.tobytes()) for k, v in np.load(path).items()]
    if path.name == "history.csv": return path.read_text().split(",time")[0]
    return path.read_bytes().replace(b"/killed/", b"/whole/")


def same(folder, a="whole", b="killed"):
    "Files that differ; nothing hidden may be left"
    trees = [{p.relative_to(folder / n).as_posix(): content(p) for p in sorted((folder / n).rglob("*")) if p.is_file()}
             for n in (a, b)]
    return [k for k in sorted({*trees[0], *trees[1]}) if trees[0].get(k) != trees[1].get(k) or "rcic-" in k]


def killed(folder, make, *points):
    """Files that differ after a command was killed at each point (before a file gets its name, with a + after that)
    and run to its end, and how it ended each time"""
    assert (done := attempt(lambda: make(folder / "whole")))[0] == 0, done
    ends = [attempt(lambda: make(folder / "killed"), (p.rstrip("+"), "+" in p))[0] for p in points]
    done = attempt(lambda: make(folder / "killed"))
    return dict(ends=ends, last=done, differ=same(folder))


def times(make, answer):
    "A command that is not killed: when it gave a file its name, and when it ended"
    start, replace_, named = time.monotonic(), os.replace, {}

    def patched(a, b):
        replace_(a, b)
        named[str(b)] = time.monotonic() - start

    def timed():
        files.os.replace = patched
        make()
        answer.write_text(json.dumps(named | {"": time.monotonic() - start}))

    assert (done := attempt(timed))[0] == 0, done
    return json.loads(answer.read_text())


def each(folder, make, points):
    """Rows: what came of a kill at each moment, in a folder of its own: how it ended, how the same command ended
    after that, and which files differ"""
    when, rows = times(lambda: make(folder / "whole"), folder.with_suffix(".json")), []
    for point in points:
        name, timed, share = point.partition("~")
        since = next((t for path, t in when.items() if name and name in path), 0.0)
        seconds = float(share) * (when[""] - since) if timed else None
        for _ in range(4):
            shutil.rmtree(folder / "killed", ignore_errors=True)
            end = attempt(lambda: make(folder / "killed"), (name.rstrip("+"), "+" in name, seconds))[0]
            if end or not timed: break
            seconds /= 2  # it was faster than before
        left = sum(p.is_file() for p in (folder / "killed").rglob("*"))
        last = attempt(lambda: make(folder / "killed"))
        rows.append(dict(command=folder.name, moment=point, end=end, left=left, last=last, differ=same(folder)))
    return rows


def at_once(make):
    "Two processes that start together"
    r, w = os.pipe()

    def wait_and_make():
        os.read(r, 1)
        make()

    pipes = []
    for _ in range(2):
        a, b = os.pipe()
        if not os.fork():
            said = attempt(wait_and_make)
            os.write(b, json.dumps(said).encode())
            os._exit(0)
        os.close(b)
        pipes.append(a)
    os.write(w, b"go")
    out = []
    for a in pipes:
        with os.fdopen(a) as f: out.append(json.loads(f.read()))
        os.wait()
    return sorted(out)


def atlas_and_runs(root):
    "An atlas, and two runs whose networks were never trained"
    atlas = read_hpa(simulate_hpa(root / "atlas", n_images=150, n_test=30, n_external=0, image_size=24, min_positives=3,
                                  workers=1, progress=False))
    train, test = (atlas.wells.id_code[atlas.wells.split == s].tolist() for s in ("train", "test"))
    rng = np.random.default_rng(0)
    for k in range(2):
        run, y = root / f"net{k}", label_truth(atlas, train)[0]
        for split, ids in (("valid", train), ("test", test)):
            logits = rng.normal(0, 1, (len(ids), y.shape[1])) + (2 * y - 1 if split == "valid" else 0)
            Predictions([f"{i}_1" for i in ids], atlas.classes, logits, dict(activation="sigmoid")).save(
                run / "predictions" / f"{split}.npz")
        write_json(run / "recipe.json", asdict(Recipe(loss=LossSettings("multilabel_focal"))))
        write_json(run / "run.json", dict(target="labels", wells="treatments", valid="fold=0/5", present_only=False,
                                          data=str(atlas.path), valid_wells=train, blend=["a network"]))
    return [root / "net0", root / "net1"]


def main(folder, series=False):
    torch.set_num_threads(1)
    found, screen, recipe, template = ({}, folder / "simulate" / "whole" / "screen", folder / "recipe.json",
                                       folder / "template.ipynb")
    recipe.write_text(recipe_to_json(TINY))
    cells = [nbformat.v4.new_markdown_cell("# A run", id="a"), nbformat.v4.new_code_cell(PAGE, id="b")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), template)

    run, runs = folder / "train" / "whole" / "run", []
    made = dict(
        simulate=lambda out: cli.rcic_simulate(out=out / "screen", workers=2, **SCREEN),
        train=lambda out: cli.rcic_train(data=screen, recipe=str(recipe), run=out / "run", valid="experiment=HUVEC-03",
                                         submit=True),
        embed=lambda out: cli.rcic_embed(run=run, split="train", out=out / "train.npz"),
        report=lambda out: cli.rcic_report(run, out=out / "page.html", template=None if series else template),
        stack=lambda out: hpa_cli.rcic_hpa_stack(run=runs, out=out / "stack", data=folder / "stack" / "atlas",
                                                 min_positives=10**6, no_statistics=False),
    )
    for name, make in made.items():
        if name == "stack": runs += atlas_and_runs(folder / "stack")
        found[name] = each(folder / name, make, SERIES[name]) if series else killed(folder / name, make, *POINTS[name])
    if series: return print(json.dumps([row for name in made for row in found[name]]))

    both = folder / "both"
    for name, make in dict(simulate=lambda: cli.rcic_simulate(out=both / "simulate", workers=2, **SCREEN),
                           pack=lambda: cli.rcic_pack(data=screen, out=both / "pack", workers=1),
                           train=lambda: cli.rcic_train(data=screen, recipe=str(recipe), run=both / "train")).items():
        found[f"two at once: {name}"] = at_once(make)
    found["simulated"] = same(folder, "simulate/whole/screen", "both/simulate")
    found["orphans"] = ORPHANS.read_text() if ORPHANS.exists() else ""
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), "all" in sys.argv[2:])
