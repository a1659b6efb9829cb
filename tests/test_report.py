"A page about a run, in a real browser and against numbers computed apart."

import ast
import html
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from rcic_fastai.predict.submission import score_submission
from rcic_fastai.predict.assign import assign_predictions
from rcic_fastai.model.batchnorm import batchnorm_layers
from rcic_fastai.screen.atlas import read_labels
from rcic_fastai.run.labels import submit_labels
from rcic_fastai.report.accuracy import accuracy_by, calibration_error, confused_pairs, judge_wells, plate_grid
from rcic_fastai.report.accuracy import reliability, statistic_shift, wilson_interval
from rcic_fastai.screen.labels import label_matrix
from rcic_fastai.labels.metrics import f1_scores
from rcic_fastai.labels.submission import score_label_submission
from rcic_fastai.report.html import ThisPython, execute_notebook, notebook_page, table
from rcic_fastai.predict.core import Predictions
from rcic_fastai.run.predict import predict_run
from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe
from rcic_fastai.report.core import batchnorm_shift, load_network, make_report, report_template, run_context
from rcic_fastai.report.core import shift_wells
from rcic_fastai.run.blend import blend_runs
from rcic_fastai.run.train import train_run
from rcic_fastai.screen.groups import plate_groups
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.simulate_atlas import simulate_hpa


def quiet(*a): pass


SECTIONS = {
    "single": ["In short", "Recipe and run", "Learning curves", "What each step of post-processing brings",
               "Accuracy by cell type, experiment and plate",
               "Plate maps", "Classes that are taken for each other", "The worst wells",
               "Quality of the images", "Where the network looks", "How many replicates", "Map of embeddings",
               "BatchNorm shift", "Calibration",
               "Time and size"],
    "several": ["In short", "Recipe and run", "Learning curves", "What each step of post-processing brings",
                "F1 per class", "What classes are taken for",
                "The worst images", "Plate maps", "Map of embeddings", "BatchNorm shift", "Calibration",
                "Time and size"],
}


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory):
    "A copy of the small run, for files that a report adds to its folder."
    return Path(shutil.copytree(small_run, tmp_path_factory.mktemp("report") / "small"))


@pytest.fixture(scope="module")
def label_run(tmp_path_factory):
    "A finished run on a tiny atlas, with a submission."
    folder = tmp_path_factory.mktemp("labels")
    atlas = read_screen(simulate_hpa(folder / "atlas", 120, 60, 0, image_size=32, min_positives=2, workers=0,
                                     progress=False))
    recipe = change_recipe(laptop_recipe(get_recipe("hpa_seresnext50_focal"), 1), "inference.tta=1",
                           "inference.thresholds=f1_to_share")
    train_run(atlas, recipe, folder / "focal", valid="fold=0/3", say=quiet)
    for split in ("valid", "test"): predict_run(folder / "focal", atlas, split, progress=False, say=quiet)
    submit_labels(folder / "focal", atlas, say=quiet)
    return folder / "focal"


def execute_here(nb, *_):
    "Instead of `execute_notebook`: the same cells without another Python, whose imports take longer than the page"
    shown = []
    names = dict(display=lambda *parts: shown.extend(parts))
    for cell in nb.cells:
        if cell.cell_type != "code": continue
        tree = ast.parse(cell.source)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, cell.id, "exec"), names)
        if last is not None: shown.append(eval(compile(ast.Expression(last.value), cell.id, "eval"), names))
        cell.outputs = [nbformat.v4.new_output("display_data", {"text/html": part.data}) for part in shown
                        if part is not None]
        shown.clear()
    return nb


@pytest.fixture(scope="module")
def pages(run, label_run, small_screen):
    "Both kinds of pages: one made by the command's own way, a kernel, the other one by `execute_here`."
    single = make_report(run, truth=small_screen / "truth.csv", say=quiet)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rcic_fastai.report.core.execute_notebook", execute_here)
        return dict(single=single, several=make_report(label_run, code=False, say=quiet))


def words(page):
    "Visible text of a page, with plain spaces"
    body = re.sub(r"<(style|head)\b.*?</\1>", "", page.read_text(), flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def listen(page):
    "A list that gets what the console says, errors, requests that fail and requests that leave this machine"
    faults = []
    page.on("console", lambda m: faults.append(m.text))
    page.on("pageerror", lambda e: faults.append(str(e)))
    page.on("requestfailed", lambda r: faults.append(r.url[:100]))
    page.on("request", lambda r: r.url.startswith(("file:", "data:")) or faults.append(r.url[:100]))
    return faults


@pytest.mark.parametrize("kind", ["single", "several"])
def test_page_in_a_browser(pages, chromium, kind):
    for width in (1280, 390):
        context = chromium.new_context(offline=True, viewport=dict(width=width, height=900))
        page = context.new_page()
        faults = listen(page)
        page.goto(pages[kind].as_uri())
        seen = page.evaluate("""() => ({
            width: document.documentElement.scrollWidth, lang: document.documentElement.lang,
            images: [...document.images].map(i => [i.naturalWidth, i.alt.length, i.getBoundingClientRect().right]),
            sections: [...document.querySelectorAll('section > h2')].map(h => h.textContent),
            anchors: [...document.querySelectorAll('nav a')].map(
                a => document.querySelector(a.getAttribute('href'))?.querySelector('h2').textContent),
            tables: [...document.querySelectorAll('table')].every(t => t.closest('.scroll'))})""")
        assert not faults
        assert seen["width"] <= width and seen["lang"] == "en" and seen["tables"]
        assert seen["sections"] == SECTIONS[kind] == seen["anchors"]
        assert len(seen["images"]) > 10
        assert all(w > 0 and alt > 10 and right <= width for w, alt, right in seen["images"])
        assert page.locator("details").count() == page.get_by_text("show code", exact=True).count() == (
            16 + 1 if kind == "single" else 0)
        context.close()


def test_pages_load_nothing(pages):
    for path in pages.values():
        text = path.read_text()
        assert not re.search(r"""(?:src|href|action)\s*=\s*["']?(?!["']?(?:data:|#))""", text) and "@import" not in text
        assert not re.search(r"url\((?!data:)", text) and "<script" not in text and "<iframe" not in text
        assert len(text) < 3e6
        assert nbformat.read(path.with_suffix(".ipynb"), 4).cells[1].metadata.tags == ["injected-parameters"]


def test_numbers_of_a_single_label(pages, run, small_screen):
    text, screen, truth = words(pages["single"]), read_screen(small_screen), pd.read_csv(
        small_screen / "truth.csv").set_index("id_code").sirna
    p = Predictions.load(run / "predictions" / "test.npz").wells()
    groups = plate_groups(screen.wells)
    alone = int((p.labels == truth[p.ids].to_numpy()).sum())
    table = assign_predictions(p, groups)
    share = score_submission(table[["id_code", "sirna"]], truth.reset_index())
    right = round(share * len(p.ids))
    low, high = wilson_interval(right, len(p.ids))
    assert f"wells right {100 * share:.1f} % 95 % interval {100 * low:.0f}–{100 * high:.0f} %" in text
    assert f"+ plate groups {len(p.ids)} {right} {100 * share:.1f} %" in text
    assert f"domain BatchNorm {len(p.ids)} {alone} " in text
    running = predict_run(shutil.copytree(run, run.parent / "again"), screen, "test", "running", progress=False).wells()
    assert f"running BatchNorm {len(p.ids)} {int((running.labels == truth[running.ids].to_numpy()).sum())} " in text
    valid = Predictions.load(run / "predictions" / "valid.npz").wells()
    own = screen.wells.set_index("id_code").sirna[valid.ids].to_numpy(int)
    assert f"domain BatchNorm {len(valid.ids)} {int((valid.labels == own).sum())} " in text
    confidence, hits = p.probabilities.max(1), p.labels == truth[p.ids].to_numpy()
    bins = np.minimum((confidence * 10).astype(int), 9)
    error = sum((bins == b).mean() * abs(hits[bins == b].mean() - confidence[bins == b].mean())
                for b in np.unique(bins))
    assert f"Expected calibration error {error:.3f}:" in text
    history = pd.read_csv(run / "history.csv")
    assert f"{len(history)} epochs" in text and "train.epochs 8 3" in text
    assert "set aside 8 wells (experiment=HUVEC-03)" in text


def test_numbers_of_several_labels(pages, label_run):
    text, atlas = words(pages["several"]), label_run.parent / "atlas"
    score = score_label_submission(label_run / "submission.csv", atlas / "truth.csv")
    assert f"macro-F1 {score:.3f} 95 % interval" in text and f"chosen thresholds {score:.3f} " in text
    p = Predictions.load(label_run / "predictions" / "test.npz").wells()
    y = label_matrix(read_labels(atlas / "truth.csv")[p.ids])
    half = p.probabilities >= 0.5
    half[~half.any(1)] = False
    assert f"thresholds of .5 {f1_scores(y, half).mean():.3f} " in text
    predicted = label_matrix(pd.read_csv(label_run / "submission.csv").set_index("Id").Predicted[p.ids].map(
        lambda t: tuple(map(int, t.split()))))
    f1 = f1_scores(y, predicted)
    assert re.search(rf"Nucleoplasm {y[:, 0].sum()} {predicted[:, 0].sum()} [\d.]+ [\d.]+ {f1[0]:.3f} ", text)
    assert "an atlas has images, not plates" in text and "Probability of" in text


def test_broken_template_leaves_what_was_there(pages, run, tmp_path):
    nb = nbformat.read(report_template(), 4)
    at = next(i for i, c in enumerate(nb.cells) if c.source.startswith("## In short"))
    nb.cells = nb.cells[:1] + nb.cells[at : at + 1] + [nbformat.v4.new_code_cell("import numpy\nnumpy.zeros(3)[7]")]
    nbformat.write(nb, tmp_path / "mine.ipynb")
    before = pages["single"].read_bytes()
    with pytest.raises(ValueError,
                       match=r'mine.ipynb: section "In short" failed: IndexError: index 7 .* begins with .import '
                       r'numpy.*no page was written'):
        make_report(run, template=tmp_path / "mine.ipynb", say=quiet)
    assert pages["single"].read_bytes() == before
    with pytest.raises(ValueError, match="written as .html"): make_report(run, tmp_path / "page.pdf")
    with pytest.raises(FileNotFoundError, match="elsewhere does not exist; expected the folder of the screen"):
        make_report(run, data=tmp_path / "elsewhere")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.ipynb"]


@pytest.mark.parametrize("several, kind", [(False, "single"), (True, "several")])
def test_templates_are_clean(several, kind):
    nb = nbformat.read(report_template(several), 4)
    nbformat.validate(nb)
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in code)
    assert [c.source.splitlines()[0][3:] for c in nb.cells if c.source.startswith("## ")] == SECTIONS[kind]
    assert sum("parameters" in c.metadata.get("tags", ()) for c in code) == 1
    assert not re.search(r"/(tmp|home|root|work)/", json.dumps(nb))


@pytest.mark.slow
def test_kernel_is_this_python_whatever_is_registered(tmp_path, monkeypatch):
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps(dict(argv=["/bin/false", "{connection_file}"], display_name="other",
                                                        language="python")))
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    cells = [nbformat.v4.new_code_cell("import sys, rcic_fastai\nsys.executable, rcic_fastai.__file__"),
             nbformat.v4.new_code_cell("import os\nos._exit(3)")]
    nb = nbformat.v4.new_notebook(cells=cells[:1])
    import rcic_fastai

    expected = sys.executable, rcic_fastai.__file__
    assert eval(execute_notebook(nb).cells[0].outputs[0].data["text/plain"]) == expected
    assert ThisPython().kernel_spec.argv[0] == sys.executable
    nb.cells = [nbformat.v4.new_markdown_cell("## End"), cells[1]]
    with pytest.raises(ValueError, match='the kernel died.*after section "End" had begun'): execute_notebook(nb)


def test_page_of_a_persons_own_cells():
    "Plain outputs of a changed template: a data frame, a picture of matplotlib, printed text, markup in a name."
    output = lambda **data: nbformat.v4.new_output("display_data", data)  # noqa: E731
    cell = nbformat.v4.new_code_cell("x")
    cell.outputs = [output(**{"text/html": "<table><tr><td>1</td></tr></table>", "text/plain": "1"}),
                    output(**{"image/png": "iVBORw0KGgo=\n"}),
                    nbformat.v4.new_output("stream", name="stdout", text="a < b"),
                    nbformat.v4.new_output("stream", name="stderr", text="hidden")]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("## A & B"), cell,
                                         nbformat.v4.new_markdown_cell("## A & B\n\nMore.")])
    page = notebook_page(nb, "<i>run</i>")
    assert "&lt;i&gt;run&lt;/i&gt;" in page and "<i>run" not in page and "a &lt; b" in page and "hidden" not in page
    assert re.search(r'<img[^>]*alt="Output of a cell[^>]*src="data:image/png;base64,iVBORw0KGgo="', page)
    assert 'href="#a-b"' in page and 'href="#a-b-1"' in page and page.count('id="a-b-1"') == 1
    assert "&lt;b&gt;x" in table(pd.DataFrame({"<b>x": ["</td><script>"]}), "<u>").data
    assert "<script>" not in table(pd.DataFrame({"x": ["<script>"]})).data


@pytest.mark.slow
def test_blend_has_a_context_without_networks(run, small_screen, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    screen = read_screen(small_screen)
    blend_runs([run, other], screen, tmp_path / "blend", say=quiet)
    c = run_context(tmp_path / "blend", say=quiet)
    assert c.networks == {} and c.split == "test"
    assert c.judged.right.tolist() == run_context(run, say=quiet).judged.right.tolist()


def test_batchnorm_shift_by_hand(run):
    c = run_context(run, say=quiet)
    drawn = shift_wells(c, n_wells=2)
    net = load_network(c, drawn)
    found = batchnorm_shift(net, net.sites.domain)
    assert found.columns.tolist() == ["HUVEC-01", "HUVEC-02", "HUVEC-03 (valid)", "HUVEC-04 (test)"]
    name, layer = next(iter(batchnorm_layers(net.learn.model).items()))
    kept, own = [], net.sites[net.sites.domain == "HUVEC-04 (test)"]
    handle = layer.register_forward_pre_hook(lambda m, args: kept.append(args[0].detach()))
    net.learn.model.eval()
    dl = net.learn.dls.test_dl(own.reset_index(drop=True), bs=len(own), domain=None, shuffle=False)
    from rcic_fastai.predict.sites import predict_sites

    predict_sites(net.learn, own, "running", progress=False)
    handle.remove()
    x = torch.cat([k.float() for k in kept])
    by_hand = ((x.mean((0, 2, 3)) - layer.running_mean).abs() / (layer.running_var + layer.eps).sqrt()).mean()
    assert len(dl.dataset) == len(own) == len(x)
    assert found.loc[name, "HUVEC-04 (test)"] == pytest.approx(float(by_hand), rel=1e-3)


@pytest.mark.parametrize("right, n, low, high", [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634)])
def test_wilson_interval(right, n, low, high):
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=1e-4)


def test_tables_by_hand():
    bins = reliability([0.05, 0.15, 0.15, 0.85], [1, 0, 1, 1])
    assert bins.wells.tolist() == [1, 2, 1] and bins.accuracy.tolist() == [1, 0.5, 1]
    assert calibration_error(bins) == pytest.approx((0.95 + 2 * 0.35 + 0.15) / 4)
    pairs = confused_pairs([1, 2, 2, 3, 3, 3], [2, 1, 1, 3, 1, 3])
    assert pairs.to_numpy().tolist() == [[1, 2, 3, 1, 2, 3], [1, 3, 1, 0, 1, 4]]
    assert statistic_shift([2.0, 0.0], [0.0, 0.0], [4.0, 1.0], eps=0) == 0.5
    grid = plate_grid(["A01", "P24", "P24"], [1, 0, 1])
    assert grid.shape == (16, 24) and grid[0, 0] == 1 and grid[15, 23] == 0.5 and np.isnan(grid[1, 1])
    wells = pd.DataFrame([("E-1_1_B02", "E", "E-1", 1, "B02", "treatment"),
                          ("E-1_1_B03", "E", "E-1", 1, "B03", "treatment")],
                         columns=["id_code", "cell_type", "experiment", "plate", "well", "well_type"])
    p = Predictions(wells.id_code, [4, 7], [[2.0, 1.9], [3.0, 0.0]], dict(level="well"))
    judged = judge_wells(p, wells, pd.Series({"E-1_1_B02": 7, "E-1_1_B03": 4}), pd.Series({4: 0, 7: 0}))
    # one-to-one: the surer well keeps 4
    assert judged.network.tolist() == [4, 4] and judged.predicted.tolist() == [7, 4]
    assert accuracy_by(judged).right["all"] == 2 and accuracy_by(judged, (), "network_right").right["all"] == 1
