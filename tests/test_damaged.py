"""Every file of ours, damaged in every way that a disk, an editor or another version can think of, is named in the
message."""
import json
import os
import shutil

import bad_inputs
import numpy as np
import pandas as pd
import pytest
from cases import each
import xxhash
from PIL import Image

from rcic_fastai.predict.submission import score_submission
from rcic_fastai.screen.describe import describe_screen, read_platemap
from rcic_fastai.predict.core import Predictions
from rcic_fastai.run.predict import embed_run, predict_run
from rcic_fastai.report.core import make_report, read_truth
from rcic_fastai.run.folder import read_history
from rcic_fastai.run.stages import Stages
from rcic_fastai.run.submit import submit_run
from rcic_fastai.recipe.published import get_recipe, laptop_recipe
from rcic_fastai.run.blend import blend_runs
from rcic_fastai.run.train import find_lr, train_run
from rcic_fastai.screen.planes import read_channel
from rcic_fastai.train.checkpoint import read_checkpoint
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.simulate import simulate_screen
from rcic_fastai.labels.stack import Stacker
from rcic_fastai.data.pack import pack_screen, pack_sites
from rcic_fastai.data.store import Store, verify_store
from rcic_fastai.labels.threshold import ConstantThreshold, read_thresholds, write_thresholds
from rcic_fastai.run.folder import Run, load_run, read_run

EXPECTED = ValueError, OSError  # what commands tell in one line


def quiet(*args):
    pass


def damages(data):
    "Ways to damage a file"
    yield from dict(empty=b"", half=data[: len(data) // 2], list=b"[]", dict=b"{}", null=b"null", number=b"7",
                    bytes=np.random.default_rng(0).bytes(999), zeros=bytes(len(data)),
                    text="größer".encode("latin-1")).items()
    try:
        whole = json.loads(data)
    except ValueError:
        return
    if isinstance(whole, dict):
        for key, value in whole.items():
            yield f"without {key}", json.dumps({k: v for k, v in whole.items() if k != key}).encode()
            for other in ([], {}, "text", 7, -1.5, True, None, [[1], "x"], {"a": {}}):
                if type(other) is not type(value) or other != value:
                    yield f"{key} {other!r}", json.dumps({**whole, key: other}).encode()


def faults(path, read, names=()):
    "What is not told as it should be; `names` of other files that a message may name instead"
    data, found = path.read_bytes(), []
    for how, bad in damages(data):
        path.write_bytes(bad)
        try:
            read()
        except EXPECTED as e:
            if not any(n in str(e) for n in (path.name, *names)):
                found.append(f"{how}: {type(e).__name__}: {e}")
        except Exception as e:
            found.append(f"{how}: {type(e).__name__}: {e}")
        finally:
            path.write_bytes(data)
    return found


@pytest.fixture
def run(small_run, tmp_path):
    return shutil.copytree(small_run, tmp_path / "run")


@pytest.fixture(scope="module")
def sites(small_screen):
    return read_screen(small_screen).sites().head(4)


def test_settings_of_a_run(run):
    for name in ("run.json", "recipe.json"):
        assert not faults(run / name, lambda: read_run(run)), name


def test_run_that_is_loaded(run, sites):
    assert not faults(run / "model.safetensors", lambda: load_run(run, sites))
    stats = json.loads((run / "run.json").read_text())
    for other in ([], [[1, 2], [3]], [1, 2], [["a"] * 6] * 2, [[1.0] * 5] * 2, [[1.0] * 6]):
        (run / "run.json").write_text(json.dumps({**stats, "stats": other}))
        with pytest.raises(ValueError, match="run.json: stats"):
            load_run(run, sites)


def test_a_target_that_the_wells_do_not_have(run, small_screen):
    (run / "run.json").write_text(json.dumps({**json.loads((run / "run.json").read_text()), "target": "nope"}))
    for use in (predict_run, embed_run):
        with pytest.raises(ValueError, match="run.json: target is 'nope', and the wells have only .*sirna"):
            use(run, read_screen(small_screen), "test", progress=False, say=quiet)


def test_histograms(run):
    np.savez(run / "histograms.npz", counts=np.zeros((2, 6, 256), np.int64))
    assert not faults(run / "histograms.npz", lambda: Run(run).histograms)
    for counts in (np.zeros((2, 6, 256)), np.zeros((2, 6, 255), int), np.zeros(256, int)):
        np.savez(run / "histograms.npz", counts=counts)
        with pytest.raises(ValueError, match="histograms.npz: counts are"):
            _ = Run(run).histograms


def test_learning_rates(run):
    (run / "learning_rates.json").write_text('{"recipe": "x", "train": 0.1}')
    stages = Stages.__new__(Stages)
    stages.run, stages.extra, stages.say = run, {}, quiet
    key = json.loads('"x"')

    def read():
        import rcic_fastai.run.stages as module

        stages.extra = {}
        was, module.xxhash = module.xxhash, type("", (), {"xxh3_64_hexdigest": staticmethod(lambda b: key)})
        try:
            stages._found_lr(None, "train", read_run(run)[0].train)
        except AttributeError as e:  # it went on to look for the rate, which needs a learner
            assert "NoneType" in str(e)
        finally:
            module.xxhash = was

    assert not faults(run / "learning_rates.json", read)


def test_predictions(run, small_screen):
    path, screen = run / "predictions" / "test.npz", read_screen(small_screen)
    assert not faults(path, lambda: submit_run(run, screen, say=quiet))
    whole = dict(np.load(path))
    for name in ("ids", "classes", "logits", "made"):
        for other in (None, np.zeros(3), np.array(["a"]), np.array("{"), np.zeros((2, 2, 2, 2)), np.array(7)):
            np.savez(path, **{k: v for k, v in whole.items() if k != name}, **({} if other is None else {name: other}))
            with pytest.raises(EXPECTED, match="test.npz"):
                Predictions.load(path)


def test_tables_of_a_run(run, small_screen, tmp_path):
    assert not faults(run / "history.csv", lambda: read_history(run), names=("the file is empty",))
    screen, truth = read_screen(small_screen), shutil.copy(small_screen / "truth.csv", tmp_path / "truth.csv")
    submission = submit_run(run, screen, say=quiet)
    assert not faults(submission, lambda: score_submission(submission, truth))
    assert not faults(tmp_path / "truth.csv", lambda: score_submission(submission, truth))
    assert not faults(tmp_path / "truth.csv", lambda: read_truth(screen, "sirna", truth))


def test_screens(small_screen, tmp_path):
    for name in ("train.csv", "test.csv", "train_controls.csv", "test_controls.csv"):
        shutil.copy(small_screen / name, tmp_path / name)
    for name in ("train.csv", "test.csv", "train_controls.csv", "test_controls.csv"):
        assert not faults(tmp_path / name, lambda: read_screen(tmp_path),
                          names=("train.csv", "train_controls.csv", "test.csv", "test_controls.csv", "HUVEC")), name


@pytest.mark.slow
def test_screen_of_ones_own(tmp_path):
    for w in ("B02", "B03"):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"{w}_DAPI.png")
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"{w}_ER.png")
    (tmp_path / "map.csv").write_text("well,treatment\nB02,x\nB03,y\n")
    describe_screen(tmp_path, say=quiet)
    assert not faults(tmp_path / "screen.json", lambda: read_platemap(tmp_path), names=("map.csv", "no image fits"))
    assert not faults(tmp_path / "map.csv", lambda: read_platemap(tmp_path), names=("no image",))
    assert not faults(tmp_path / "screen.json", lambda: describe_screen(tmp_path, out=tmp_path / "new", like=tmp_path,
                                                                        say=quiet), names=("map.csv", "has no images",
                                                                                           "channel"))


@pytest.mark.slow
def test_stores(small_screen, tmp_path):
    screen = read_screen(small_screen)
    part = type(screen)(**{**screen.__dict__, "wells": screen.wells.head(4)})
    store = tmp_path / "store"
    pack_screen(part, store, say=quiet, progress=False)

    def read():
        s = Store(store)
        s.read(0), len(s.sites), repr(s)

    assert not faults(store / "manifest.json", read, names=("sites.parquet", "shards"))
    assert not faults(store / "sites.parquet", read)
    assert not faults(store / "sites.parquet", lambda: read_screen(store))
    assert not faults(store / "shards" / "00000.bin", read)
    (tmp_path / "begun").mkdir()
    plan = json.loads((store / "manifest.json").read_text())
    (tmp_path / "begun" / "packing.json").write_text(
        json.dumps({k: v for k, v in plan.items() if k not in ("files", "versions")}))
    assert not faults(tmp_path / "begun" / "packing.json",
                      lambda: (shutil.rmtree(tmp_path / "copy", ignore_errors=True),
                               shutil.copytree(tmp_path / "begun", tmp_path / "copy"),
                      pack_screen(part, tmp_path / "copy", say=quiet, progress=False)), names=("unfinished store",))


@pytest.mark.slow
def test_simulation(tmp_path):
    (tmp_path / "simulation.json").write_text('{"n_sirnas": 3}')
    assert not faults(tmp_path / "simulation.json", lambda: simulate_screen(tmp_path, n_sirnas=4, progress=False),
                      names=("other settings",))


def test_thresholds(tmp_path):
    write_thresholds(tmp_path / "thresholds.json", ConstantThreshold(.3).fit(np.full((4, 3), .5)), list("abc"))
    assert not faults(tmp_path / "thresholds.json", lambda: read_thresholds(tmp_path / "thresholds.json", list("abc")))


def test_later_versions_are_named(run):
    info, settings = (json.loads((run / n).read_text()) for n in ("run.json", "recipe.json"))
    (run / "run.json").write_text(json.dumps({**info, "format": 3, "version": "0.9.1"}))
    with pytest.raises(ValueError,
                       match="run.json has format 3, written by rcic_fastai 0.9.1; this is .* reads formats up to 2"):
        read_run(run)
    (run / "run.json").write_text(json.dumps({**info, "version": "0.9.1"}))
    (run / "recipe.json").write_text(json.dumps({**settings, "train": {**settings["train"], "swing": 1}}))
    with pytest.raises(ValueError,
                       match=r"recipe.json: train.swing is no setting.*; written by rcic_fastai 0.9.1, and this is "):
        read_run(run)


def test_runs_of_the_first_version_are_read(run, small_screen, monkeypatch):
    info, settings = (json.loads((run / n).read_text()) for n in ("run.json", "recipe.json"))
    monkeypatch.chdir(small_screen.parent)
    old = {k: v for k, v in info.items() if k not in ("format", "version")} | {"data": "screen"}
    (run / "run.json").write_text(json.dumps(old))
    # a setting that came later keeps its default
    (run / "recipe.json").write_text(json.dumps({**settings, "inference": {"batchnorm": "domain"}}))
    recipe, found = read_run(run)
    assert found["data"] == "screen" and found["format"] == 1 and recipe.inference.batchnorm == "domain"
    assert Predictions.load(run / "predictions" / "test.npz").ids is not None and len(pd.read_csv(run / "history.csv"))


WRONG = {  # value of run.json, and whether `rcic-submit`, which has the predictions, cannot know
    "channels": [..., [1, 2, 3], list("abcdef"), [1] * 6, [True] * 6, "123456", []],
    "classes": [..., [], "ab", list("abcdefgh"), [9000 + i for i in range(8)], [1] * 8, list(range(7)),
                [0.5] + list(range(1, 8)), ["a"] + list(range(1, 8)), [[1]] * 8],
    "target": [..., None, 7, "nothing", "labels", "cell_type"], "cell_types": [..., ["HUVEC"] * 2, "HUVEC"],
    "experiments": [..., ["HUVEC-01"] * 2],
}


@pytest.mark.slow
@pytest.mark.parametrize("key", WRONG)
def test_run_json_that_does_not_fit_is_named_by_every_command(run, small_screen, tmp_path, key):
    from rcic_fastai.kaggle.core import build_kernel
    from rcic_fastai.report.core import run_context

    screen, info = read_screen(small_screen), json.loads((run / "run.json").read_text())
    tell = dict(predict=lambda: predict_run(run, screen, "test", progress=False, say=quiet),
                embed=lambda: embed_run(run, screen, "test", progress=False, say=quiet),
                submit=lambda: submit_run(run, screen, tmp_path / "s.csv", say=quiet),
                report=lambda: run_context(run, small_screen, say=quiet),
                kaggle=lambda: build_kernel(tmp_path / "k", "infer", run=run, user="ada", lacking=()))
    for value in WRONG[key]:
        (run / "run.json").write_text(json.dumps({k: v for k, v in {**info, key: value}.items() if v is not ...}))
        for name, do in tell.items():
            if name == "embed" and isinstance(value, list) and value[:1] == [9000]:
                continue  # a network may look at a screen with other treatments
            with pytest.raises((ValueError, FileNotFoundError), match="run.json") as e: do()
            assert key in str(e.value), (name, value, str(e.value))


@pytest.mark.slow
def test_models_of_a_stack(tmp_path):
    "Each value missing or of another kind is told by the name of the file"
    pytest.importorskip("lightgbm", reason="stacking needs LightGBM (pip install rcic_fastai[stack])")
    rng = np.random.default_rng(0)
    y = (rng.random((240, 2)) < [0.5, 0.05]).astype(int)
    members = dict(a=np.clip(y * 0.4 + rng.random(y.shape) * 0.6, 0, 1), b=rng.random(y.shape))
    fit = lambda: Stacker(n_folds=2, n_inner=2, max_rounds=4, min_positives=30, folder=tmp_path,
                          progress=False).fit(members, y)
    fit()
    kinds = {json.loads(p.read_text())["kind"]: p for p in sorted(tmp_path.glob("*/repeat*.json"))}
    assert set(kinds) == {"boosted", "linear"}
    for path in kinds.values():
        kept = {"loss", "C", "params", "positives", "rounds"}  # what changes nothing may have another value
        assert not [f for f in faults(path, fit) if f.split()[0] not in kept and f.split()[-1] not in kept], path


def test_parameters_of_a_stack(small_run, small_screen):
    from rcic_fastai.cli.labels import rcic_hpa_stack
    from rcic_fastai.cli.script import CliError

    with pytest.raises(CliError, match="--params: line 1: Expecting"): rcic_hpa_stack(run=[small_run], params="{bad")
    with pytest.raises(CliError, match="--params: .* where an object in braces is expected"):
        rcic_hpa_stack(run=[small_run], params="[1]")
    pytest.importorskip("lightgbm", reason="stacking needs LightGBM (pip install rcic_fastai[stack])")
    y = (np.random.default_rng(0).random((90, 1)) < 0.5).astype(int)
    for params in (dict(learning_rate="x"), dict(num_leaves=-1), dict(monotone_constraints={"a": 1})):
        with pytest.raises(ValueError, match=f"params .*{next(iter(params))}.*: LightGBM refuses them"):
            Stacker(n_folds=2, n_inner=2, min_positives=2, params=params, progress=False).fit(dict(a=y * 0.5), y)


def test_tables_of_a_store_are_compared_when_it_is_read(small_screen, tmp_path):
    store = tmp_path / "store"
    pack_screen(read_screen(small_screen), store, say=quiet, progress=False)
    for name in ("train.csv", "test.csv", "truth.csv", "sample_submission.csv"):
        data = (store / name).read_text()
        (store / name).write_text(data.replace("3", "4", 1))
        with pytest.raises(ValueError, match=f"{name} is not the table that was packed"): read_screen(store)
        (store / name).write_text(data)
    read_screen(store)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes of POSIX")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["run.json", "recipe.json", "predictions/test.npz", "model.safetensors",
                                  "histograms.npz", "history.csv", "manifest.json", "sites.parquet", "shards/00000.bin",
                                  "train.csv", "image", "checkpoint", "template"])
def test_a_pipe_is_not_waited_for(run, small_screen, tmp_path, name):
    "Nobody writes into it, so that a reader would wait for ever"
    screen, store = read_screen(small_screen), tmp_path / "store"
    if name.startswith(("manifest", "sites", "shards", "train")):
        pack_screen(screen, store, progress=False)
        path = store / name
    elif name == "image": path = tmp_path / "x.png"
    elif name == "checkpoint": path = tmp_path / "00000001-0123456789abcdef.pt"
    elif name == "template": path = tmp_path / "mine.ipynb"
    else: path = run / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    reads = {"predictions/test.npz": lambda: submit_run(run, screen, say=quiet),
             "model.safetensors": lambda: load_run(run, screen.sites().head(4)),
             "histograms.npz": lambda: Run(run).histograms,
             "history.csv": lambda: read_history(run), "image": lambda: read_channel(path),
             "checkpoint": lambda: read_checkpoint(path), "run.json": lambda: read_run(run),
             "recipe.json": lambda: read_run(run),
             "template": lambda: make_report(run, tmp_path / "page.html", small_screen, template=path, say=quiet)}
    with pytest.raises(EXPECTED,
                       match=f"{path.name}.*(is a pipe, expected a regular file|does not exist|no such file|is "
                       "missing|looked for)|looked for train.csv"):
        reads.get(name, lambda: (read_screen(store), Store(store).read(0)))()


@pytest.mark.slow
def test_a_manifest_does_not_say_how_long_something_takes(small_screen, tmp_path):
    for format in ("blosc2", "raw", "zarr"):
        store = tmp_path / format
        pack_screen(read_screen(small_screen), store, progress=False, format=format)
        manifest = json.loads((store / "manifest.json").read_text())
        (store / "manifest.json").write_text(
            json.dumps({k: v for k, v in {**manifest, "n_sites": 10**12}.items() if k != "digest"}))
        for use in (lambda s: s.check(), verify_store, lambda s: s.read(0), lambda s: s.read_batch([0])):
            with pytest.raises(ValueError,
                               match="sites.parquet: [0-9]+ sites, but the manifest counts 1,000,000,000,000"):
                use(Store(store))


def test_predictions_are_of_the_sites_of_the_screen(run, small_screen, tmp_path):
    "By submission and blend; a site that is written in another way is another one"
    screen, path = read_screen(small_screen), run / "predictions" / "test.npz"
    p = predict_run(run, screen, "test", progress=False, say=quiet)
    second = shutil.copytree(run, tmp_path / "second")
    def changed(i, ids, logits=None): return Predictions(ids, p.classes, p.logits if logits is None else logits, p.made)
    other = p.ids.copy().astype(object)
    other[0] = p.ids[0].rpartition("_")[0] + "_01"
    more = np.append(p.ids, p.ids[0].rpartition("_")[0] + "_9")
    cases = [(changed(0, other), "site .*_01 is not in"),
             (changed(0, more, np.concatenate([p.logits, p.logits[:1]])), "site .*_9 is not in"),
             (changed(0, p.ids[1:], p.logits[1:]), f"site {p.ids[0]} is missing")]
    wells = p.wells()
    unknown = wells.ids.copy().astype(object)
    unknown[0] = "HUVEC-99_1_B02"
    cases.append((Predictions(unknown, wells.classes, wells.logits, wells.made), "well HUVEC-99_1_B02 is not in"))
    for bad, message in cases:
        bad.save(path)
        with pytest.raises(ValueError, match=f"test.npz: {message}"): submit_run(run, screen, say=quiet)
        with pytest.raises(ValueError, match=f"test.npz: {message}"):
            blend_runs([second, run], screen, tmp_path / "blend", say=quiet)
    assert not (run / "submission.csv").exists()
    wells.save(path)
    assert submit_run(run, screen, say=quiet).exists()


@pytest.mark.parametrize("change, message", [(dict(classes=[0.5, float("nan")], target="x"), "classes has NaN"),
                                             (dict(classes=[1, 1]), "classes has 1 twice"),
                                             *((dict(parts=p), "parts is ")
                                               for p in ([""], ["."], ["a", "a"], ["../x"], ["a/b"]))], ids=str)
def test_names_and_classes_of_a_run(run, change, message):
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**info, **change}))
    with pytest.raises(ValueError, match=f"run.json: {message}"): read_run(run)


@each("change", [dict(level="x"), dict(level=[]), dict(activation={}), dict(split=3), dict(weights=3),
                 dict(weights=dict(a="x")), dict(run=[])], ids=str)
def test_what_predictions_say_of_themselves(tmp_path, change):
    p = Predictions(["a_1"], [0, 1], [[0.0, 1.0]], change)
    p.save(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=f"x.npz: {next(iter(change))} (is|are)"): Predictions.load(tmp_path / "x.npz")


def with_index(store, change):
    "The index changed, with checksums that fit"
    table = change(pd.read_parquet(store / "sites.parquet"))
    table.to_parquet(store / "sites.parquet", index=False)
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["files"]["sites.parquet"] = xxhash.xxh3_64_hexdigest((store / "sites.parquet").read_bytes())
    (store / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "digest"}))


@pytest.mark.slow
def test_an_index_that_is_not_ours(small_screen, tmp_path):
    for name, change in dict(once=lambda t: t.assign(site_id=t.site_id.iloc[0]),
                             files=lambda t: t.assign(files="x")).items():
        pack_screen(read_screen(small_screen), store := tmp_path / name, progress=False)
        with_index(store, change)
        with pytest.raises(ValueError, match="sites.parquet: (site .* twice|an index has no column 'files')"):
            (read_screen(store), Store(store).check())


def test_an_array_with_an_entry_that_must_be_understood(small_screen, tmp_path):
    pytest.importorskip("zarr", reason="the format zarr needs zarr 3, which needs Python 3.11")
    from zarr_0_1_0 import pack_0_1_0

    packed = pack_sites(read_screen(small_screen).sites()[:4], tmp_path / "plates", progress=False, format="zarr")
    path = pack_0_1_0(packed.path, tmp_path / "store") / "shards" / "zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "other": dict(must_understand=True)}))
    with pytest.raises(ValueError, match="zarr.json: other is no entry of a store"): Store(tmp_path / "store").read(0)


@pytest.mark.slow
def test_random_bad_inputs_are_refused_by_name(tmp_path):
    "A sample of options, tables, JSON, arrays, weights and images; `tests/bad_inputs.py --number 400` tries more"
    counts, wrong = bad_inputs.main(seed=7, number=90, root=tmp_path, say=quiet)
    assert set(counts) == {"options", "tables", "json", "arrays", "weights", "images"}
    assert [w for w in wrong if w[2]] == []
    assert all(refused > fine for refused, fine, _ in counts.values())


def test_a_run_of_another_network_says_which_setting_differs(small_screen, small_run, tmp_path):
    recipe = laptop_recipe(get_recipe("laptop"), 1, arch="resnet10t")
    with pytest.raises(ValueError, match="model.arch_options is .*'stem_width': 16}, and laptop asks for {}"):
        train_run(read_screen(small_screen), recipe, tmp_path / "next", start=small_run, say=quiet)


def test_find_lr_names_a_target_that_is_no_column(small_screen):
    with pytest.raises(ValueError, match="target 'nothing' is no column of the wells"):
        find_lr(read_screen(small_screen), get_recipe("laptop"), target="nothing", say=quiet)
