"""Every command on every layout, on every split it takes, each in a process of its own: nobody meets an error that is
unexpected.

What reads images runs from files and from a store. What starts from a finished run, or takes the data for granted, runs
once per layout: from files on every other layout, from stores on those between.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_cli import COMMANDS

from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.simulate_atlas import simulate_hpa

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not hasattr(os, "fork"),
                                 reason="a fresh process per command is a fork here, which this system does not have")]
LAYOUTS = ("kaggle", "rxrx1", "wilds", "atlas", "own")
# they make or fetch a screen of their own
COVERED_ELSEWHERE = {"rcic-demo": "test_readme.py", "rcic-download": "test_download.py"}
TINY = ["--laptop", "1", "--set", "data.batch_size=16", "--set", "inference.tta=1", "--set", "device.precision=fp32"]
TINY += ["--set", 'model.arch_options={"channels": [4, 8, 16, 16], "stem_width": 8}']


@pytest.fixture(scope="module")
def server(tmp_path_factory, compressed):
    "Runs a command in a forked process: exit status, standard output, standard error"
    folder = tmp_path_factory.mktemp("server")
    env = {**os.environ, "TQDM_DISABLE": "1", "COLUMNS": "200", "MPLBACKEND": "agg",
           "RCIC_TEST_COMPRESSED": str(compressed)}
    process = subprocess.Popen([sys.executable, str(Path(__file__).parent / "fork_server.py")], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "ready\n"

    def run(*argv, cwd=folder):
        out, err = folder / "out", folder / "err"
        process.stdin.write(json.dumps(dict(argv=[str(a) for a in argv], cwd=str(cwd), out=str(out), err=str(err)))
                            + "\n")
        process.stdin.flush()
        start, status = time.time(), int(process.stdout.readline())
        print(f"{argv[0]}: {time.time() - start:.1f} s")
        return SimpleNamespace(status=status, out=out.read_text(), err=err.read_text())

    yield run
    process.stdin.close()
    process.wait()


# The layouts


def truth_of(folder): return pd.read_csv(folder / "truth.csv").set_index("id_code").sirna


def metadata(wells, split):
    "The table of RxRx1, a row per site"
    sites = wells.loc[wells.index.repeat(2)].assign(site=[1, 2] * len(wells)).reset_index(drop=True)
    sites = sites.assign(site_id=sites.id_code + "_" + sites.site.astype(str), dataset=split(sites),
                         sirna_id=sites.sirna)
    sites["sirna"] = "s" + sites.sirna_id.astype(str)
    return sites.rename(columns=dict(id_code="well_id"))[
        ["site_id", "well_id", "cell_type", "dataset", "experiment", "plate", "well", "site", "well_type", "sirna",
         "sirna_id"]]


def rxrx1(small, to):
    "The public release: one table, no folder per split, the test split labelled"
    wells = read_screen(small).wells
    wells["sirna"] = wells.sirna.fillna(wells.id_code.map(truth_of(small)).astype("Int64"))
    to.mkdir()
    for split in ("train", "test"): shutil.copytree(small / split, to / "images", dirs_exist_ok=True)
    metadata(wells, lambda t: t.split).to_csv(to / "metadata.csv", index=False)


def wilds(small, to):
    "Composites of three stains, a validation split of its own"
    rxrx1(small, to)
    table = pd.read_csv(to / "metadata.csv")
    table.loc[table.experiment == "HUVEC-03", "dataset"] = "val"
    table.to_csv(to / "metadata.csv", index=False)
    for first in (to / "images").rglob("*_w1.png"):
        planes = [np.asarray(Image.open(first.with_name(first.name.replace("_w1", f"_w{c}")))) for c in (1, 2, 3)]
        Image.fromarray(np.stack(planes, 2)).save(first.with_name(first.name.replace("_w1", "")))
    for p in (to / "images").rglob("*_w?.png"): p.unlink()


def own(small, to):
    "Somebody's own folder: 16-bit TIFFs, a plate map with names of treatments, wells to predict"
    wells, truth = read_screen(small).wells, truth_of(small)
    to.mkdir()
    names = {s: f"compound {chr(65 + s)}" for s in range(50)}
    table = wells.assign(treatment=wells.sirna.map(names).fillna(""), plate_name="P" + wells.plate.astype(str))
    table[["experiment", "plate_name", "well", "treatment", "well_type"]].rename(
        columns=dict(plate_name="plate")).to_csv(to / "wells.csv", index=False)
    for w in wells.itertuples():
        for site in (1, 2):
            for c in (1, 2, 3):
                x = np.asarray(
                    Image.open(small / w.split / w.experiment / f"Plate{w.plate}"
                               / f"{w.well}_s{site}_w{c}.png")).astype(np.uint16) * 16
                to.joinpath(w.experiment, f"P{w.plate}").mkdir(parents=True, exist_ok=True)
                Image.fromarray(x).save(to / w.experiment / f"P{w.plate}" / f"{w.well}_s{site}_ch{c}.tif")
    pd.DataFrame(dict(id_code=truth.index, treatment=truth.map(names))).to_csv(to.parent / "own_truth.csv", index=False)


@pytest.fixture(scope="module")
def layouts(small_screen, tmp_path_factory):
    "Folder of a screen in each layout"
    folder = tmp_path_factory.mktemp("layouts")

    def make(layout):
        to = folder / layout
        if to.exists(): return to
        if layout == "kaggle": shutil.copytree(small_screen, to)
        elif layout == "atlas": simulate_hpa(to, 90, 30, 0, 32, min_positives=3, workers=1, progress=False)
        else: dict(rxrx1=rxrx1, wilds=wilds, own=own)[layout](small_screen, to)
        return to

    return make


# The commands

VALID = dict(kaggle="experiment=HUVEC-03", rxrx1="experiment=HUVEC-03", wilds="experiment=HUVEC-02", atlas="well=0/4",
             own="experiment=HUVEC-03")
FORMAT = dict(rxrx1="raw", wilds="zarr" if find_spec("zarr") else "blosc2")  # zarr 3 needs Python 3.11
SPLITS = dict(kaggle=("train", "valid", "test"), rxrx1=("train", "valid", "test"),
              wilds=("train", "valid", "id_test", "val", "test"),
              atlas=("train", "valid", "test"), own=("train", "valid", "test"))


def truth_file(layout, data):
    if layout == "own": return data.parent / "own_truth.csv"
    if layout in ("kaggle", "atlas"): return data / "truth.csv"
    table = pd.read_csv(data / "metadata.csv").query("dataset == 'test' and well_type == 'treatment'").drop_duplicates(
        "well_id")
    path = data.parent / f"{data.name}_truth.csv"
    table.rename(columns=dict(well_id="id_code")).drop(columns="sirna").rename(
        columns=dict(sirna_id="sirna"))[["id_code", "sirna"]].to_csv(path, index=False)
    return path


# these, the first training and the embedding of the test split meet files and a store on every layout
IMAGES = {"rcic-show", "rcic-predict", "rcic-hpa-duplicates"}


def once(name, words):
    "Does a cell run on one of the two folders of a layout?"
    return words[0] not in IMAGES and name not in ("train", "embed test")


def cells(layout, packed, data, home):
    """The commands for one folder of data, in their order, without those that are the turn of the other folder: name
    of the cell, words"""
    turn = packed == bool(LAYOUTS.index(layout) % 2)
    return [(name, words) for name, words in every_cell(layout, packed, data, home) if turn or not once(name, words)]


def every_cell(layout, packed, data, home):
    "The commands that there are for one folder of data: name of the cell, words"
    recipe = ["--recipe", "hpa_seresnext50_focal" if layout == "atlas" else "laptop", *TINY]
    first, second, blend, truth = home / "first", home / "second", home / "blend", truth_file(
        layout, data if not packed else data.parent / layout)
    yield "show", ["rcic-show", "--data", data, "--out", home / "well.png"]
    if layout != "atlas": yield "qc", ["rcic-qc", "--data", data, "--out", home / "qc", "--workers", "1"]
    yield "find-lr", ["rcic-find-lr", "--data", data, *recipe, "--steps", "20", "--out", home / "lr.png"]
    yield "train", ["rcic-train", "--data", data, "--run", first, "--valid", VALID[layout], *recipe, "--submit"]
    yield "train again", ["rcic-train", "--data", data, "--run", second, "--valid", VALID[layout], *recipe, "--set",
                          "train.lr=0.004"]
    for split in SPLITS[layout]:
        yield f"predict {split}", ["rcic-predict", "--run", first, "--split", split]
        yield f"embed {split}", ["rcic-embed", "--run", first, "--split", split,
                                 *(["--truth", truth] if split == "test" and layout != "atlas" else [])]
    yield "explain", ["rcic-explain", "--run", first, "--split", "valid", "--most", "2", "--out", home / "explain.html"]
    if layout not in ("atlas", "wilds"):  # two experiments to train on there
        yield "learning curve", ["rcic-learning-curve", "--run", first, "--recipe", "laptop", *TINY, "--repeats", "1",
                                 "--hours", "0.01"]
    yield "embed without truth", ["rcic-embed", "--run", first, "--out", home / "plain.npz"]
    yield "submit", ["rcic-submit", "--run", first, "--out", home / "submission.csv"]
    yield "score", ["rcic-score", "--submission", home / "submission.csv", "--truth", truth]
    yield "blend", ["rcic-blend", "--run", first, "--run", second, "--out", blend]
    yield "submit a blend", ["rcic-submit", "--run", blend]
    if layout == "atlas":
        yield "twins", ["rcic-hpa-duplicates", "--data", data, *(["--out", home / "twins"] if packed else [])]
        yield "stack", ["rcic-hpa-stack", "--run", first, "--run", second, "--out", home / "stack"]
        yield "submit a stack", ["rcic-submit", "--run", home / "stack"]
        yield "adversarial", ["rcic-hpa-adversarial", "--data", data, "--out", home / "adversarial"]
        yield "neighbours", ["rcic-hpa-neighbours", "--run", second, "--classifier", first, "--out", home / "near"]
        yield "submit neighbours", ["rcic-submit", "--run", home / "near"]
    kernel = ["rcic-kaggle", "build", "--user", "ada", "--no-wheel"]
    yield "kernel that trains", [*kernel, "--folder", home / "kernel", "--valid", VALID[layout], *recipe]
    yield "kernel that infers", [*kernel, "--folder", home / "infer", "--kind", "infer", "--run", first]
    yield "report", ["rcic-report", first, "--truth", truth]


def check(name, words, done):
    said = f"exit status {done.status}\n{done.out[-800:]}\n{done.err[-3000:]}"
    assert done.status == 0, f"{name}: {' '.join(map(str, words))}\n{said}"
    assert "Traceback" not in done.err and "unexpected" not in done.err, f"{name}: {done.err[-3000:]}"


def prepare(server, layout, packed, data):
    "The folder that the commands read: described, packed"
    if layout == "own" and not packed:
        words = ["rcic-describe", "--data", data, "--negative", "compound L"]
        check("describe", words, server(*words))
    if not packed: return data
    store = data.parent / f"{layout}-packed"
    words = ["rcic-pack", "--data", data, "--out", store, "--format", FORMAT.get(layout, "blosc2"), "--workers", "1",
             "--verify"]
    check("pack", words, server(*words))
    return store


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_command(server, layouts, tmp_path, layout):
    faults, ran, predicted = [], 0, {}
    for packed in (False, True):
        data, home = prepare(server, layout, packed, layouts(layout)), tmp_path / ("packed" if packed else "files")
        home.mkdir()
        for name, words in cells(layout, packed, data, home):
            done = server(*words, cwd=home)
            ran += 1
            try: check(f"{'packed' if packed else 'files'}: {name}", words, done)
            except AssertionError as e: faults.append(str(e))
        predicted[packed] = {p.name: np.load(p)["logits"]
                             for p in sorted((home / "first" / "predictions").glob("*.npz"))}
    assert not faults, f"{len(faults)} of {ran} cells\n\n" + "\n\n".join(faults)
    assert len(predicted[False]) == len(SPLITS[layout]) and predicted[False].keys() == predicted[True].keys()
    for split, logits in predicted[False].items():  # trained and predicted from the files, and from the store
        np.testing.assert_array_equal(logits, predicted[True][split], err_msg=f"{layout}, {split}")


def test_every_command_is_in_the_matrix(tmp_path):
    # rcic-apply takes a later folder of images: tests/test_apply.py
    used, met = {"rcic-apply", "rcic-describe", "rcic-pack", "rcic-simulate", "rcic-hpa-simulate"}, []
    for layout in LAYOUTS:
        (tmp_path / layout).mkdir()
        if layout in ("rxrx1", "wilds"):
            pd.DataFrame(dict(dataset=[], well_type=[], well_id=[], sirna=[], sirna_id=[])).to_csv(
                tmp_path / layout / "metadata.csv")
        files, store = ({name: str(words[0]) for name, words in cells(layout, packed, tmp_path / layout, tmp_path)}
                        for packed in (False, True))
        # each cell on each layout
        assert (files.keys() | store.keys() == {name
                                                for name, _ in every_cell(layout, True, tmp_path / layout, tmp_path)})
        met += [(packed, name) for packed, names in ((False, files), (True, store)) for name in names
                if layout != "atlas"]
        used |= {*files.values(), *store.values()}
    assert used | set(COVERED_ELSEWHERE) == set(COMMANDS)
    single = {name for packed, name in met if packed} ^ {name for packed, name in met if not packed}
    assert single == {"embed id_test", "embed val"}  # splits of one layout; every other cell meets files and a store


def test_simulate_in_processes_of_their_own(server, tmp_path):
    for words in (["rcic-simulate", "--out", tmp_path / "a", "--sirnas", "4", "--train-experiments", "1",
                   "--test-experiments", "1", "--cell-types", "HUVEC",
                   "--image-size", "32", "--sites", "1", "--workers", "1"], ["rcic-hpa-simulate", "--out",
                                                                             tmp_path / "b", "--images", "340",
                                                                             "--test", "168",
                   "--external", "0", "--image-size", "32", "--workers", "1"]):
        check(words[0], words, server(*words))
