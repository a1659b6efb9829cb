"""Hundreds of bad inputs, generated from a seed, against the commands: each must end with a line that names what is
wrong, and not with 0.

`python tests/bad_inputs.py [--seed 0] [--number 400] [--kind tables]` prints each that does not, and the count.
"""

import argparse
import contextlib
import io
import json
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from rcic_fastai.cli.script import CliError


def made(root):
    "What the bad inputs are made from: a screen, its store, a run with predictions, a screen of one's own"
    from PIL import Image

    from rcic_fastai.screen.describe import describe_screen
    from rcic_fastai.run.predict import predict_run
    from rcic_fastai.recipe.published import get_recipe, laptop_recipe
    from rcic_fastai.run.submit import submit_run
    from rcic_fastai.run.train import train_run
    from rcic_fastai.screen.read import read_screen
    from rcic_fastai.screen.simulate import simulate_screen
    from rcic_fastai.data.pack import pack_screen

    quiet = lambda *a: None
    screen = read_screen(simulate_screen(root / "screen", n_sirnas=8, n_train=2, n_test=1, cell_types=("HUVEC",),
                                         image_size=32, progress=False))
    pack_screen(screen, root / "store", say=quiet)
    recipe = laptop_recipe(get_recipe("laptop"), 1, arch="resnet10t",
                           arch_options=dict(channels=[8, 8, 8, 8], stem_width=8))
    train_run(screen, recipe, root / "run", valid="experiment=HUVEC-02", say=quiet)
    for split in ("test", "valid"):
        predict_run(root / "run", screen, split, progress=False)
    submit_run(root / "run", screen, say=quiet)
    (root / "own").mkdir()
    rows = [(f"{r}{c:02}", t) for r, t in zip("BCDEFG", ("DMSO", "Taxol", "Latrunculin", "DMSO", "Taxol", ""))
            for c in (2, 3)]
    for i, (w, _) in enumerate(rows):
        for c in ("DAPI", "ER"):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (32, 32), dtype=np.uint8)).save(
                root / "own" / f"{w}_{c}.png")
    pd.DataFrame(rows, columns=["well", "treatment"]).to_csv(root / "own" / "map.csv", index=False)
    describe_screen(root / "own", files="{well}_{channel}.png", negative=["DMSO"], say=quiet)
    return root


def bad_table(rng, text):
    "A name of the fault, and a table that has it"
    rows = [line.split(",") for line in text.splitlines()]
    header, at = rows[0], int(rng.integers(1, len(rows)))
    column = int(rng.integers(len(header)))
    join = lambda rows: "\n".join(",".join(r) for r in rows) + "\n"
    changed = lambda f: join([f(list(r)) if i == at else r for i, r in enumerate(rows)])
    faults = {
        "UTF-16": lambda: join(rows).encode("utf-16"),
        "Latin-1": lambda: changed(lambda r: r[:-1] + ["\xe9"]).encode("latin-1"),
        "cut": lambda: join(rows[:at]) + ",".join(rows[at])[: max(1, len(rows[at][0]) // 2)],
        "empty": lambda: "",
        "blank": lambda: " \n,,\n\n",
        "header alone": lambda: join(rows[:1]),
        "no header": lambda: join(rows[1:]),
        "a column twice": lambda: join([[*r, r[column]] for r in rows]),
        "a column almost twice": lambda: join([[*r, (r[column].upper() + " ") if i == 0 else r[column]]
                                               for i, r in enumerate(rows)]),
        "a column gone": lambda: join([r[1:] for r in rows]),
        "a long row": lambda: changed(lambda r: [*r, "1", "2"]),
        "a short row": lambda: changed(lambda r: r[:-1]),
        "an open quote": lambda: changed(lambda r: ['"' + r[0], *r[1:]]),
        "a row twice": lambda: join([*rows, rows[at]]),
        "an id gone": lambda: changed(lambda r: ["", *r[1:]]),
        "a stray id": lambda: changed(lambda r: ["../../x", *r[1:]]),
        "a word for a number": lambda: changed(lambda r: [*r[:-1], "seven"]),
        "a fraction": lambda: changed(lambda r: [*r[:-1], "2.5"]),
        "negative": lambda: changed(lambda r: [*r[:-1], "-3"]),
        "huge": lambda: changed(lambda r: [*r[:-1], "9" * 30]),
        "NaN": lambda: changed(lambda r: [*r[:-1], "NaN"]),
        "infinite": lambda: changed(lambda r: [*r[:-1], "inf"]),
        "NUL": lambda: changed(lambda r: [*r[:-1], "\0"]),
        "a workbook": lambda: b"PK\x03\x04" + bytes(rng.integers(0, 255, 200, dtype=np.uint8)),
        "noise": lambda: bytes(rng.integers(128, 255, 500, dtype=np.uint8)),
        "JSON": lambda: '{"a": 1}',
    }
    name = list(faults)[int(rng.integers(len(faults)))]
    return name, faults[name]()


def bad_json(rng, text):
    d = json.loads(text)
    key = list(d)[int(rng.integers(len(d)))]
    values = [None, True, -1, 1e400, float("nan"), "x\0", [], {}, [[]], {"a": {"b": 1}}, "../../x", 10**40]
    value = values[int(rng.integers(len(values)))]
    faults = {
        "cut": lambda: text[: int(rng.integers(1, len(text) - 2))],
        "empty": lambda: "",
        "a list": lambda: "[" + text + "]",
        "a number": lambda: "3",
        "no JSON": lambda: "recipe: laptop",
        "a key twice": lambda: "{" + f"{json.dumps(key)}: 1, " + text.lstrip()[1:],
        "NaN": lambda: json.dumps({**d, key: float("nan")}),
        "a value": lambda: json.dumps({**d, key: value}),
        "a stray key": lambda: json.dumps({**d, "surprise": 1}),
        "deep": lambda: "[" * 100_000,
        "UTF-16": lambda: text.encode("utf-16"),
        "noise": lambda: bytes(rng.integers(128, 255, 300, dtype=np.uint8)),
    }
    name = list(faults)[int(rng.integers(len(faults)))]
    return f"{name} {key} {value!r:.20}" if name in ("a value", "NaN", "a key twice") else name, faults[name]()


def bad_arrays(rng, path):
    with np.load(path) as f:
        d = {k: f[k] for k in f.files}
    i, out = int(rng.integers(len(d["ids"]))), io.BytesIO()
    logits = d["logits"].copy()
    logits[i, 0] = rng.choice([np.nan, np.inf, -np.inf])
    faults = {
        "NaN": dict(d, logits=logits),
        "a site twice": dict(d, ids=np.append(d["ids"][1:], d["ids"][-1])),
        "a class twice": dict(d, classes=np.append(d["classes"][1:], d["classes"][-1])),
        "transposed": dict(d, logits=d["logits"].T),
        "one dimension": dict(d, logits=d["logits"].ravel()),
        "a row less": dict(d, logits=d["logits"][1:]),
        "text": dict(d, logits=np.full(d["logits"].shape, "x")),
        "no ids": {k: v for k, v in d.items() if k != "ids"},
        "no logits": {k: v for k, v in d.items() if k != "logits"},
        "made is no JSON": dict(d, made="{"),
        "made is a list": dict(d, made="[1]"),
        "strange ids": dict(d, ids=np.array([f"x{j}" for j in range(len(d["ids"]))])),
        "strange classes": dict(d, classes=d["classes"] + 5000),
        "no sites": dict(d, ids=d["ids"][:0], logits=d["logits"][:0]),
        "pickled": dict(d, classes=np.array([None] * len(d["classes"]), dtype=object)),
        "views of another shape": dict(d, views=d["logits"][None, :, 1:], view_names=np.array(["a"])),
    }
    names = [*faults, "cut", "empty", "noise"]
    name = names[int(rng.integers(len(names)))]
    np.savez(out, **faults.get(name, d), allow_pickle=True) if name != "pickled" else np.savez(out, **faults[name])
    data = out.getvalue()
    return name, dict(cut=data[: len(data) // 2], empty=b"",
                      noise=bytes(rng.integers(0, 255, 400, dtype=np.uint8))).get(name, data)


def bad_weights(rng, path, out):
    import torch
    from safetensors.torch import load_file, save_file

    state = load_file(path)
    key = list(state)[int(rng.integers(len(state)))]
    while not state[key].is_floating_point() or not state[key].numel():
        key = list(state)[int(rng.integers(len(state)))]
    names = ["NaN", "infinite", "a weight gone", "another weight", "another shape", "cut", "empty", "noise",
             "a long header", "pickled"]
    name = names[int(rng.integers(len(names)))]
    data = Path(path).read_bytes()
    if name in ("NaN", "infinite"):
        state[key].view(-1)[0] = float("nan") if name == "NaN" else float("inf")
    elif name == "a weight gone":
        del state[key]
    elif name == "another weight":
        state["body.surprise"] = torch.zeros(3)
    elif name == "another shape":
        state[key] = torch.zeros(7, 7)
    else:
        noise = bytes(rng.integers(0, 255, 400, dtype=np.uint8))
        Path(out).write_bytes({"cut": data[: len(data) // 3], "empty": b"", "noise": noise,
                               "a long header": b"\xff" * 8 + data[8:], "pickled": b"\x80\x04K\x01."}[name])
        return f"{name} {key}"
    Path(out).unlink(missing_ok=True)
    save_file({k: v.clone() for k, v in state.items()}, out)
    return f"{name} {key}"


def bad_image(rng, path):
    from PIL import Image

    data, out = Path(path).read_bytes(), io.BytesIO()
    name = ["cut", "empty", "text", "noise", "other size", "RGB", "16 bits", "float", "two pages", "one pixel",
            "a folder", "palette"][int(rng.integers(12))]
    make = {
        "other size": lambda: Image.new("L", (int(rng.integers(1, 300)), 7)),
        "RGB": lambda: Image.new("RGB", (32, 32)),
        "16 bits": lambda: Image.fromarray(rng.integers(0, 65535, (32, 32), dtype=np.uint16)),
        "float": lambda: Image.fromarray(rng.random((32, 32), dtype=np.float32)),
        "one pixel": lambda: Image.new("L", (1, 1)),
        "palette": lambda: Image.new("P", (32, 32)),
    }
    if name in make:
        make[name]().save(out, "TIFF" if name == "float" else "PNG")
    elif name == "two pages":
        Image.new("L", (32, 32)).save(out, "TIFF", save_all=True, append_images=[Image.new("L", (9, 9))])
    known = dict(cut=data[: len(data) // 2], empty=b"", text=b"no image",
                 noise=bytes(rng.integers(0, 255, 300, dtype=np.uint8)))
    return name, None if name == "a folder" else known.get(name, out.getvalue())


def put(path, data):
    path = Path(path)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if data is None:
        path.mkdir()
    else:
        path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
    return path


@contextlib.contextmanager
def changed(path, data):
    "A file with other contents, for a while"
    before = Path(path).read_bytes()
    put(path, data)
    try:
        yield Path(path)
    finally:
        put(path, before)


OPTIONS = {
    "rcic_train": dict(laptop=[0, -5, 10**12, float("nan")], wells=["x", "", "all "], target=["nothing", ""],
                       recipe=["lapto", "no.json", "", "laptop.json", "."], log=["x"],
                       valid=["", "=", "plate", "plate=9", "fold=9", "fold=1/0", "well=-1", "experiment=HUVEC",
                              "run=nowhere", "x=1", "fold=nan"], start=["nowhere", "/dev/null"], data=["nowhere",
                                                                                                       "/dev/null", ""],
                       set=[["train.lr=NaN"], ["train.lr=-1"], ["train.epochs=0"], ["x"], ["train.x=1"],
                            ["data.size=0"], ["model.arch=resnet"], ["data.batch_size=0"], ["data.workers=-1"],
                            ["model.arch_options={\"channels\": \"a\"}"], ["model.arch_options={\"x\": 1}"],
                            ["model.pretrained=nowhere.pth"], ["data={}x"], ["=1"], ["train.lr"], ["model.head=x"],
                            ["device.precision=fp8"]]),
    "rcic_find_lr": dict(steps=[0, -1, 19, 10**12], laptop=[0, -1], data=["nowhere"], recipe=["x"],
                         set=[["data.crop=-1"]], target=["nothing"]),
    "rcic_predict": dict(split=["x", "", "Test"], batchnorm=["x", ""], domain=["well", ""],
                         bagging=["", "0", "-1", "a", "8,,8", "1e3", "1"], postprocess=["x"],
                         tta=["0", "-1", "65", "x", "nan", "1.5"],
                         run=["nowhere", ""], data=["nowhere", "/dev/null"]),
    "rcic_embed": dict(split=["x"], batchnorm=["x"], out=["e.txt", "e", ""], truth=["nowhere.csv", "/dev/null", "."],
                       run=["nowhere"], data=["nowhere"]),
    "rcic_submit": dict(assignment=["x", ""], thresholds=["f1"], sample=["nowhere.csv", "/dev/null"], run=["nowhere"],
                        data=["nowhere"]),
    "rcic_blend": dict(weights=["x", "1", "nan,1", "-1,2", "inf,1", "0,0", "1,2,3", ""], space=["x"], data=["nowhere"]),
    "rcic_pack": dict(format=["x", ""], preset=["x"], size=[0, -1, 10**9, 33], workers=[0, -1, 10**9],
                      data=["nowhere", "/dev/null"]),
    "rcic_simulate": dict(sirnas=[0, -1, 10**12], train_experiments=[0, -1], test_experiments=[-1],
                          image_size=[0, -1, 15, 10**9], sites=[0, 3], effect=[float("nan"), -1, float("inf")],
                          batch_effect=[float("nan"), -1],
                          seed=[-1], workers=[0, -1], cell_types=["", "a/b", "../x", "HUVEC,HUVEC"]),
    "rcic_show": dict(well=["Z99", "", "../x"], site=[-1, 9, 10**12], data=["nowhere"], out=["x.xyz"]),
    "rcic_qc": dict(nucleus=["x", "7", "0"], workers=[0, -1], data=["nowhere", "/dev/null"]),
    "rcic_describe": dict(table=["nowhere.csv", "/dev/null"],
                          files=["x", "{well}", "{wel}_{channel}.png", "{well}_{channel}.tif"],
                          channels=["x", "", "DAPI,DAPI", "a=b=c"], column=[["x"], ["x=y"], ["well=x"]],
                          negative=[["x"]], positive=[["x"]], like=["nowhere"], data=["nowhere"]),
    "rcic_hpa_simulate": dict(images=[0, -1, 10**12], test=[-1], external=[-1], image_size=[0],
                              size_shift=[0.0, float("nan"), -1.0], contrast=[0.0, float("nan")], seed=[-1],
                              workers=[0]),
    "rcic_score": dict(submission=["nowhere.csv", "/dev/null", "."], truth=["nowhere.csv", "/dev/null", "."]),
    "rcic_report": dict(folder=["nowhere", "/dev/null"], truth=["nowhere.csv"], template=["nowhere.ipynb"],
                        data=["nowhere"]),
    "rcic_kaggle": dict(laptop=[0, -1], hours=[0.0, -1.0, float("nan"), float("inf")], kind=["x"], recipe=["x"],
                        title=["x", "", "y" * 99], user=["", "a b", "../x"], dataset=[["x"], ["a/b/c/d"]],
                        weights=["x"]),
}


def command(name):
    from rcic_fastai.cli import core as cli, kaggle as kaggle_cli, labels as hpa_cli

    return next(getattr(m, name) for m in (cli, hpa_cli, kaggle_cli) if hasattr(m, name))


def cases(root, rng):
    """Endless: kind, what is wrong, words one of which the line must have, and a context in which to call a command
    with options"""
    good = dict(rcic_train=dict(data=root / "screen", run=root / "new"),
                rcic_find_lr=dict(data=root / "screen", out=root / "lr.png"), rcic_predict=dict(run=root / "run"),
                rcic_embed=dict(run=root / "run", out=root / "e.npz"),
                rcic_submit=dict(run=root / "run", out=root / "s.csv"),
                rcic_blend=dict(run=[root / "run", root / "run2"], out=root / "blend"),
                rcic_pack=dict(data=root / "screen", out=root / "packed"),
                rcic_simulate=dict(out=root / "simulated"), rcic_show=dict(data=root / "screen", out=root / "w.png"),
                rcic_qc=dict(data=root / "screen", out=root / "qc"),
                rcic_describe=dict(data=root / "own", out=root / "described", files="{well}_{channel}.png"),
                rcic_hpa_simulate=dict(out=root / "atlas"),
                rcic_score=dict(submission=root / "run/submission.csv", truth=root / "screen/truth.csv"),
                rcic_report=dict(folder=root / "run", out=root / "r.html"),
                rcic_kaggle=dict(action="build", folder=root / "kernel", user="somebody"))
    paths = ("data", "start", "run", "out", "truth", "table", "like", "sample", "submission", "folder", "template")
    flat = [(n, o, v) for n, d in OPTIONS.items() for o, values in d.items() for v in values]
    order, treated = iter(rng.permutation(len(flat))), list(pd.read_csv(root / "screen/test.csv").itertuples())
    while True:
        if (i := next(order, None)) is not None:
            n, o, v = flat[i]
            value = Path(v) if o in paths and isinstance(v, str) else v
            yield "options", f"{n} {o}={v!r}", None, contextlib.nullcontext(), n, {**good[n], o: value}
        tables = [("screen/train.csv", "rcic_train"), ("screen/train_controls.csv", "rcic_show"),
                  ("screen/test.csv", "rcic_predict"), ("run/submission.csv", "rcic_score"),
                  ("screen/truth.csv", "rcic_score"),
                  ("own/map.csv", "rcic_describe"), ("store/train.csv", "rcic_show"),
                  ("screen/sample_submission.csv", "rcic_submit"), ("screen/truth.csv", "rcic_embed")]
        file, n = tables[int(rng.integers(len(tables)))]
        fault, data = bad_table(rng, (root / file).read_text())
        more = dict(data=root / "store") if file.startswith("store") else dict(
            truth=root / file) if n == "rcic_embed" else {}
        if n == "rcic_submit":
            more = dict(sample=root / file)
        yield "tables", f"{file} {fault} {n}", Path(file).name, changed(root / file, data), n, {**good[n], **more}
        jsons = [("run/recipe.json", "rcic_predict"), ("run/run.json", "rcic_submit"), ("run/run.json", "rcic_predict"),
                 ("store/manifest.json", "rcic_show"), ("own/screen.json", "rcic_show"), ("my.json", "rcic_train")]
        file, n = jsons[int(rng.integers(len(jsons)))]
        fault, data = bad_json(rng, (root / file).read_text())
        more = dict(data=(root / file).parent) if n == "rcic_show" else dict(
            recipe=str(root / file)) if n == "rcic_train" else {}
        yield "json", f"{file} {fault} {n}", Path(file).name, changed(root / file, data), n, {**good[n], **more}
        fault, data = bad_arrays(rng, root / "run/predictions/test.npz")
        yield "arrays", fault, "test.npz", changed(root / "run/predictions/test.npz",
                                                   data), "rcic_submit", good["rcic_submit"]
        weights = root / "run/model.safetensors"
        fault = bad_weights(rng, weights, root / "bad.safetensors")
        yield "weights", fault, "model.safetensors", changed(weights, (root / "bad.safetensors").read_bytes()), *(
            ("rcic_predict", good["rcic_predict"]) if rng.integers(2)
            else ("rcic_train", {**good["rcic_train"], "start": root / "run", "recipe": str(root / "my.json")})
        )
        images = [p for w in treated
                  for p in sorted((root / "screen/test").glob(f"{w.experiment}/Plate{w.plate}/{w.well}_*.png"))]
        image = images[int(rng.integers(len(images)))]
        fault, data = bad_image(rng, image)
        n = ("rcic_predict", "rcic_pack")[int(rng.integers(2))]
        yield "images", f"{image.name} {fault} {n}", image.name, changed(image, data), n, good[n]


def tried(kind, fault, words, context, name, options):
    "What is wrong with the answer of a command; None if it is as it should be, '' if the input was fine after all"
    out, err = io.StringIO(), io.StringIO()
    with context, warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        warnings.simplefilter("ignore")
        try:
            command(name)(**options)
        except CliError as e:
            line = str(e)
        except SystemExit as e:
            line = e.code if isinstance(e.code, str) else err.getvalue()
            if e.code == 0:
                return ""
        except BaseException as e:
            return f"{type(e).__name__}: {e}"
        else:
            return ""
    line = line.strip()
    if "(unexpected; --debug" in line or "Traceback" in line:
        return line
    if len(line.splitlines()) != 1:
        return f"{len(line.splitlines())} lines: {line}"
    if words and words not in line and Path(words).stem not in line:
        return f"does not name {words}: {line}"
    return None


def main(seed=0, number=400, kind=None, root=None, say=print):
    "Counts of inputs that were refused as they should be, that were fine after all, and the others"
    import os

    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory() if root is None else contextlib.nullcontext(root) as folder:
        root = Path(folder)
        if not (root / "run").exists():
            made(root)
        shutil.copytree(root / "run", root / "run2", dirs_exist_ok=True)
        (root / "my.json").write_text((root / "run/recipe.json").read_text())
        rng, counts, wrong = np.random.default_rng(seed), {}, []
        stream = cases(root, rng)
        while sum(sum(c) for c in counts.values()) < number:
            case = next(stream)
            if kind and case[0] != kind:
                continue
            answer = tried(*case)
            for left in ("new", "packed", "blend", "described", "simulated", "atlas", "kernel"):
                shutil.rmtree(root / left, ignore_errors=True)
            c = counts.setdefault(case[0], [0, 0, 0])
            c[0 if answer is None else 1 if answer == "" else 2] += 1
            if answer is not None:
                wrong.append((case[0], case[1], answer))
                say(f"{case[0]}: {case[1]}: {answer or 'taken'}")
    for k, (right, fine, others) in counts.items():
        say(f"{k:>8}: {right} refused by name, {fine} taken, {others} otherwise")
    return counts, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=400)
    parser.add_argument("--kind")
    parser.add_argument("--root", type=Path)
    args = parser.parse_args()
    main(args.seed, args.number, args.kind, args.root)
