"""The benchmarks of speed: that they measure what they say, run small, and write their tables. `pytest -m bench`
runs them in full and looks at the figures."""

import builtins
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def script():
    "Function that imports a script of `benchmarks/` as it is run: with its folder on the path"
    environment = dict(os.environ)
    sys.path.insert(0, str(FOLDER))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.path.remove(str(FOLDER))
    sys.modules.pop("measure", None)
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def measure(script):
    return script("measure")


@pytest.fixture(scope="module")
def assignment(script):
    return script("assignment")


@pytest.fixture(scope="module")
def inference(script):
    return script("inference")


@pytest.fixture(scope="module")
def gpu(script):
    return script("gpu")


def tables_in(text):
    "Header cells of the Markdown tables of a report"
    lines = text.splitlines()
    return [[c.strip() for c in line.strip("|").split("|")] for line, rule in zip(lines, lines[1:])
            if rule.startswith("| --- ") or rule.startswith("| ---|")]


# measure.py


def test_contestants_take_turns(measure):
    "Everybody runs warm-up and repeats, none is always first, and the clock sees the contestant alone"
    now, log = [0.0], []

    def contestant(name, seconds):
        def run():
            log.append(name)
            now[0] += seconds

        return run

    def before(name):
        now[0] += 100  # would be seen

    seconds = measure.interleave({"a": contestant("a", 2), "b": contestant("b", 3)}, repeats=4, warmup=2,
                                 clock=lambda: now[0], before=before)
    assert list(seconds.columns) == ["a", "b"] and (seconds == [2, 3]).all(axis=None) and len(seconds) == 4
    turns = ["".join(log[i : i + 2]) for i in range(0, len(log), 2)]
    assert len(turns) == 6 and sorted(set(turns)) == ["ab", "ba"] and all(a != b for a, b in zip(turns, turns[1:]))


def test_ratios_are_within_a_repeat(measure):
    "One repeat in which the whole machine is ten times slower changes no ratio; a unit is what a run handles"
    seconds = pd.DataFrame({"slow": [4.0, 40.0, 4.0], "fast": [1.0, 10.0, 1.0]})
    t = measure.summary(seconds, baseline="slow", units=pd.Series({"slow": 2, "fast": 1}), unit="site")
    assert t.loc["slow", "ms per site"] == 2000 and t.loc["fast", "ms per site"] == 1000
    assert t.loc["fast", "sites/s"] == 1
    assert t.loc["fast", "x slow"] == 2 and t.loc["fast", "quartiles of x"] == "2-2" and t.loc["slow", "x slow"] == 1
    uneven = measure.summary(pd.DataFrame({"a": [1.0, 2.0, 9.0], "b": [1.0, 1.0, 1.0]}), baseline="a")
    assert uneven.loc["b", "x a"] == 2 and uneven.loc["b", "quartiles of x"] == "1.5-5.5"


def test_markdown(measure):
    text = measure.markdown(pd.DataFrame({"x": [1234.5, 0.12345], "n": [3, 4], "s": ["a", "b"]},
                                         index=pd.Index(["one", "two"], name="what")))
    assert text.splitlines() == ["| what | x | n | s |", "| --- | --- | --- | --- |", "| one | 1,234 | 3 | a |",
                                 "| two | 0.123 | 4 | b |"]


# assignment.py


def test_assignment_runs(assignment, tmp_path):
    out = tmp_path / "sub" / "assignment.md"
    tables = assignment.main(["--quick", "--out", str(out)])
    text, scipy = out.read_text(), f"x {assignment.FULL}"
    assert len(tables_in(text)) == len(tables) == 3 and "Ran on " in text
    for t in tables.values():
        exact = [name for name in t.index if not name.startswith("vote")]
        assert len(exact) >= 4 and set(t.exact[exact]) == {"2 of 2"}
        assert np.isfinite(t[scipy]).all() and (t[scipy] > 0).all()
        assert (t["wells with a class twice"].drop("vote, best of each well") == 0).all()
        assert t.accuracy.between(0, 1).all()
        assert np.allclose(t["value, share of the best"][exact], 1)
        assert t["value, share of the best"]["vote, greedy"] <= 1
    assert tables["hard"]["wells with a class twice"]["vote, best of each well"] > 0  # the task has something to solve


def test_assignment_notices_an_answer_that_is_not_the_best(assignment, monkeypatch):
    experiments = [assignment.with_scores(layout, 1.0, i)
                   for i, layout in enumerate(assignment.simulated_layouts(2, group_size=12))]
    monkeypatch.setattr(assignment, "ours", assignment.greedy)
    with pytest.raises(RuntimeError, match="the library's assignment has value"):
        assignment.measure(experiments, repeats=1)


def test_assignment_says_which_peers_are_missing(assignment, monkeypatch):
    monkeypatch.setattr(assignment, "find_spec", lambda name: None)
    found, missing = assignment.contestants()
    assert missing == ["lap, 24 full problems", "lap, 16 blocks"] and not set(missing) & set(found)


def test_layouts_have_the_real_shape(assignment):
    for plates, truth, groups in assignment.simulated_layouts(20):
        assert np.bincount(groups).tolist() == [277] * 4 and len(np.unique(truth)) == len(truth)
        sizes = np.bincount(plates)[1:]
        assert len(sizes) == 4 and sizes.min() >= 272 and sizes.max() <= 277
        assert all(len(set(groups[truth[plates == p]])) == 1 for p in range(1, 5))


@pytest.mark.slow
def test_real_layouts(assignment, real_rcic):
    layouts = list(assignment.real_layouts(real_rcic))
    assert len(layouts) == 33 and sum(len(plates) for plates, *_ in layouts) == 36515
    for plates, truth, groups in layouts:
        assert np.bincount(groups).tolist() == [277] * 4 and truth.min() >= 0
        assert sorted(groups[truth[plates == p]].min() for p in range(1, 5)) == [0, 1, 2, 3]


# inference.py


@pytest.mark.slow
def test_inference_runs(inference, tmp_path):
    out, threads = tmp_path / "inference.md", torch.get_num_threads()
    ((table, costs),) = inference.main(["--quick", "--repeats", "2", "--out", str(out)]).values()
    assert len(tables_in(out.read_text())) == 2 and torch.get_num_threads() == threads
    ratios = table[f"x {inference.BARE}"]
    assert len(table) == 9 and np.isfinite(ratios).all() and (ratios > 0).all()
    assert np.isfinite(costs["time, ratio"]).all()
    for name in (inference.RUNNING, inference.BATCH, inference.DOMAIN):
        assert float(table["logits differ by"][name]) <= inference.TOLERANCE
    # averages of variances are something else than the variance
    assert float(table["logits differ by"][inference.BARE_ADABN]) > 1e-3


def test_inference_notices_other_logits(inference):
    found = {name: torch.zeros(2, 3) for name in (inference.BARE, inference.BARE_BATCH, inference.BARE_WHOLE,
                                                  inference.BARE_ADABN, inference.FAST)}
    found.update({inference.RUNNING: torch.zeros(2, 3), inference.BATCH: torch.full((2, 3), 5e-5),
                  inference.DOMAIN: torch.zeros(2, 3)})
    assert inference.differences(found)[inference.BATCH] == pytest.approx(5e-5)
    for wrong in (2e-4, float("nan")):
        with pytest.raises(RuntimeError, match="rcic_fastai, domain: logits differ"):
            inference.differences({**found, inference.DOMAIN: torch.full((2, 3), wrong)})


def test_bare_domain_statistics(inference):
    "The bare ways leave the network in eval mode, and of one batch per domain the average is exact"
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(6, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1),
                                torch.nn.Flatten())
    domains = [[torch.randint(0, 256, (8, 6, 8, 8), dtype=torch.uint8)] for _ in range(2)]
    whole = inference.bare_batch(model, [d[0] for d in domains])
    n = 8 * 6 * 6  # running variances are unbiased
    adapted = inference.bare_adabn(model, domains)
    assert not any(m.training for m in model.modules())
    assert torch.allclose(whole, adapted, atol=2 / n)
    x = inference.standardised(domains[0][0])
    assert x.mean((2, 3)).abs().max() < 1e-5 and (x.std((2, 3), correction=0) - 1).abs().max() < 1e-5


# gpu.py


@pytest.mark.slow
def test_gpu_runs_on_the_cpu(gpu, tmp_path):
    out = tmp_path / "gpu.md"
    tables = gpu.main(["--device", "cpu", "--quick", "--variants", gpu.PLAIN, "bf16, channels-last, compiled", "--out",
                       str(out)])
    steps, learner, loading = tables["small ResNet"]["steps"], tables["small ResNet"]["learner"], tables["loading"]
    assert list(steps.index) == [gpu.PLAIN, "bf16, channels-last, compiled"] and len(learner) == 3 and len(loading) == 2
    for t in (steps, learner, loading):
        assert np.isfinite(t["images/s"]).all() and (t["images/s"] > 0).all()
    assert np.isfinite(learner["x bare loop, synthetic"]).all()
    text = out.read_text()
    assert len(tables_in(text)) == 3 and "Feeding: " in text and "Measured on the CPU" in text


@pytest.mark.slow
def test_gpu_needs_only_torch_and_timm(gpu, tmp_path, monkeypatch):
    imported = builtins.__import__

    def without_library(name, *args, **kwargs):
        if name.split(".")[0] in ("fastai", "rcic_fastai", "fastcore"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_library)
    tables = gpu.main(["--device", "cpu", "--quick", "--torch-only", "--variants", gpu.PLAIN, "--out",
                       str(tmp_path / "gpu.md")])
    assert list(tables) == ["small ResNet"] and list(tables["small ResNet"]) == ["steps"]
    assert "learner" not in (tmp_path / "gpu.md").read_text()
    monkeypatch.setattr(gpu, "library_missing", lambda: ["fastai"])
    assert (list(gpu.main(["--device", "cpu", "--quick", "--variants", gpu.PLAIN, "--out", str(tmp_path / "gpu.md")]))
            == ["small ResNet"])


def test_gpu_without_one(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.md")]) is None
    said = capsys.readouterr().out
    assert said.startswith("There is no CUDA GPU here") and said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_gpu_leaves_out_what_does_not_fit(gpu, monkeypatch):
    "Out of memory, and a compiler that is missing, are results; anything else is an error"
    args = gpu.arguments(["--device", "cpu", "--quick", "--variants", gpu.PLAIN, "bf16",
                          "bf16, channels-last, compiled"])
    warmed = gpu.warmed

    def failing(name, batch, variant, args):
        if variant.compiled:
            raise RuntimeError("no compiler\nat all")
        if variant.precision == "bf16":
            raise torch.cuda.OutOfMemoryError("no room")
        return warmed(name, batch, variant, args)

    monkeypatch.setattr(gpu, "warmed", failing)
    seconds, _, failed = gpu.measure_steps("test_resnet", 2, args)
    assert list(seconds.columns) == [gpu.PLAIN]
    assert failed == {"bf16": "out of memory", "bf16, channels-last, compiled": "RuntimeError: no compiler"}

    def broken(*args):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(gpu, "warmed", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        gpu.measure_steps("test_resnet", 2, args)


def test_bare_steps_are_those_of_pytorch(gpu):
    "Two steps by hand end at the same weights"
    batch = gpu.synthetic(4, 8, torch.device("cpu"))
    make = lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6 * 64, gpu.CLASSES))
    torch.manual_seed(0)
    model, other = make(), make()
    other.load_state_dict(model.state_dict())
    gpu.BareSteps(model, batch, gpu.VARIANTS[gpu.PLAIN], 2)()
    opt = torch.optim.AdamW(other.parameters(), lr=1e-4, weight_decay=1e-2)
    for _ in range(2):
        opt.zero_grad()
        torch.nn.functional.cross_entropy(other(batch[0]), batch[1]).backward()
        opt.step()
    assert torch.allclose(model[1].weight, other[1].weight, atol=1e-7)


def test_verdict(gpu):
    assert gpu.verdict(300.0, {"a": 100.0, "b": 150.0}).startswith(
        "Feeding: 300 images/s reach the device, 2.00 times what the fastest step here takes (b: 150")
    assert "feeding exceeds the step" in gpu.verdict(300.0, {"b": 150.0})
    assert "the step waits" in gpu.verdict(100.0, {"b": 150.0})


# In full: pytest -m bench


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_assignment_in_full(assignment, tmp_path):
    "Exact on every layout, and at least five times as fast as the full problems"
    for name, t in assignment.main(["--out", str(tmp_path / "assignment.md")]).items():
        n = t.exact[assignment.FULL].split(" of ")[1]
        assert t.exact[assignment.OURS] == f"{n} of {n}", name
        assert t[f"x {assignment.FULL}"][assignment.OURS] >= 5, name
        assert t.accuracy[assignment.OURS] >= t.accuracy["vote, greedy"] - 0.005, name


@pytest.mark.bench
@pytest.mark.timeout(3600)
def test_inference_in_full(inference, tmp_path):
    """Prediction costs what a bare loop costs; exact statistics of a domain no more than the two passes of those
    that are not exact"""
    results = inference.main(["--out", str(tmp_path / "inference.md")])
    words = {a: {b: w for c, b, _, w in inference.PAIRS if c == a} for a, *_ in inference.PAIRS}
    for name, (table, costs) in results.items():
        ratio = costs["time, ratio"]
        assert ratio[words[inference.RUNNING][inference.BARE]] <= (1.05 if name.startswith("SE-ResNeXt")
                                                                   else 1.15), name
        assert ratio[words[inference.DOMAIN][inference.BARE_ADABN]] <= 1, name
        assert ratio[words[inference.TTA][inference.RUNNING]] <= 1.2, name  # turning the images costs


# the index of a store


def test_distances_between_the_sites_of_a_batch(script):
    "Four sites of 2, 3, 1 and 4 MB in two files: by hand"
    index = script("index")
    table = pd.DataFrame(dict(offset=[0, 2_000_000, 0, 1_000_000], length=[2_000_000, 3_000_000, 1_000_000, 4_000_000]))
    gaps, files = index.distances(table, [np.array([3, 0])], shard_sites=2)
    # from the end of the first, 2 MB, to the start of the last, 6 MB
    assert gaps.tolist() == [4.0] and files.tolist() == [2]
    gaps, files = index.distances(table, [np.array([3, 0]), np.array([0, 1])], shard_sites=2, ordered=False)
    assert gaps.tolist() == [10.0, 0.0] and files.tolist() == [2, 1]


def test_a_simulated_index_opens(script, tmp_path):
    from rcic_fastai.data.store import Store

    index = script("index")
    table = index.simulated_index(5000)
    index.write_store(tmp_path / "s", table)
    store = Store(tmp_path / "s")
    assert store.sites.site_id.is_unique and store.rows(table.site_id[-2:]).tolist() == [4998, 4999]
    assert table.groupby("experiment").plate.nunique().max() == 4
    assert (table.offset[:256].diff()[1:] == table.length[:255].to_numpy()).all()


@pytest.mark.slow
def test_a_training_epoch_is_compared(script, tmp_path):
    "The loop section in small: all contestants train, and the ratios are numbers"
    ratios = script("training").main(["--quick", "--repeats", "1", "--sections", "loop", "--out",
                                      str(tmp_path / "training.md")])
    text = (tmp_path / "training.md").read_text()
    assert all(name in text for name in ("bare PyTorch, our DataLoaders", "ours", "fastai's Learner and AdamW"))
    assert len(ratios) == 1 and all(0 < r < 100 for r in ratios.values())


# describing a folder of many files


def test_folders_of_many_files(script, tmp_path):
    "Each place has its file, each plate of Harmony an index of all its files, and the library reads both"
    from rcic_fastai.screen.describe import describe_screen

    screens, shape = script("screens"), (2, 2, 3, 2, 5)
    for i, name in enumerate(screens.NAMINGS.values()):
        folder = tmp_path / f"screen{i}"
        assert screens.write_folder(folder, name, shape) == len(list(folder.rglob("*.tif*"))) == 2 * 2 * 3 * 2 * 5
        sites = describe_screen(folder, out=tmp_path / f"out{i}", say=lambda *a: None).sites()
        assert len(sites) == 24 and sites.plate.nunique() == 2
    index = (tmp_path / "screen0" / "Plate2" / "Images" / "Index.idx.xml").read_text()
    assert index.count("<Image>") == 60 and "r02c03f02p01-ch5sk1fk1fl1.tiff" in index


def test_describing_is_compared_within_a_repeat(script, tmp_path):
    "Turns alternate, ratios are of one repeat, and contestants that find other sites end it"
    screens, asked = script("screens"), []
    naming = next(iter(screens.NAMINGS))

    def clock(package, images, out, reads):
        asked.append(package)
        t = 1.0 if package == "ours" else 4.0
        return dict(describe=t, read=t / 10, sites=3, wells=2, channels=1, first="a", last="b")

    packages = {screens.NOW: "ours", screens.BEFORE: "earlier"}
    rows, found = screens.measure(tmp_path / "x", packages, naming, 2, 1, clock)
    assert asked == ["earlier", "ours", "ours", "earlier"] and found["sites"] == 3
    assert screens.ratios(rows).eq(0.25).all(axis=None)
    assert screens.summary(rows)["of the earlier commit"]["describe, rcic_fastai"] == "0.250"
    other = lambda package, *args: clock(package, *args) | dict(sites=3 if package == "ours" else 4)
    with pytest.raises(RuntimeError, match="the contestants find other sites"):
        screens.measure(tmp_path / "x", packages, naming, 1, 1, other)
    with pytest.raises(ValueError, match="--against 0000000 is no commit of this checkout"):
        screens.take_out("0000000", tmp_path)


@pytest.mark.slow
def test_screens_run(script, tmp_path):
    tables = script("screens").main(["--quick", "--against", "none", "--out", str(tmp_path / "screens.md")])
    assert len(tables) == 2 and all((t[["describe", "read_screen"]] > 0).all(axis=None) for t in tables.values())
    text = (tmp_path / "screens.md").read_text()
    assert len(tables_in(text)) == 2 and "There is no earlier commit here" in text


# store16.py


def test_a_store_of_16_bits_against_lzw(script, tmp_path):
    for package in ("tifffile", "imagecodecs", "zarr"):
        pytest.importorskip(package)
    store16 = script("store16")
    tables = store16.main(["--quick", "--out", str(tmp_path / "store16.md")])
    table = tables["noise"]
    assert list(table.index) == [store16.LZW, *store16.STORES] and table.loc["store, raw", "of the pixels"] == 1
    assert table.loc["store, default", "of the bytes"] < 0.95 < table.loc["store, raw", "of the bytes"]
    assert "store, small" in (tmp_path / "store16.md").read_text()
