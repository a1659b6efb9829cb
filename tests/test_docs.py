"""The site of the documentation: it builds without a warning, every link leads somewhere, and a browser without
network shows all of it."""

import ast
import configparser
import html
import importlib
import os
import re
import sys
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import nbformat
import pytest
from cases import each
from filelock import FileLock

pytest.importorskip("myst_nb", reason="the site is built by Sphinx 9, which needs Python 3.11")
ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
PACKAGE = ROOT / "rcic_fastai"
MODULES = sorted(".".join(p.relative_to(PACKAGE).with_suffix("").parts) for p in PACKAGE.rglob("*.py")
                 if not p.stem.startswith("_") and p.stem != "all"
                 and "a module of version 0.1.0" not in p.read_text(encoding="utf-8"))
PAGES = ["index", "api/screen.read", "api/loss.single", "tutorials/walkthrough", "guides/which_recipe",
         "guides/published_systems", "commands"]
MOST_READ = ["index", "guides/by_question", "guides/runs", "guides/image_quality", "guides/sizes",
             "guides/which_recipe", "tutorials/walkthrough", "tutorials/own_data", "tutorials/kaggle",
             "api/screen.read"]
# what a person types, and where the answer is
SEARCHES = {"outlier": "guides/image_quality.html#which-wells-are-odd",
            "quality control": "guides/image_quality.html#which-wells-are-odd",
            "new plate": "guides/by_question.html#the-next-plate-from-another-folder",
            "GPU": "guides/by_question.html#one-gpu-two-gpus",
            "look alike": "guides/by_question.html#which-treatments-look-alike",
            "replicates": "guides/by_question.html#how-many-replicates-experiments-sites-wells",
            "saliency": "guides/by_question.html#cells-or-background-and-which-stain",
            "best hits": "guides/by_question.html#show-me-the-best-hits",
            "compounds": "guides/by_question.html#which-treatments-do-something",
            "ensemble of folds": "guides/by_question.html#blend-folds-or-two-models",
            "test time augmentation": "guides/by_question.html#eight-views-at-prediction-tta-8"}


@pytest.fixture(scope="module")
def tools():
    "`tools/docs.py` as a module"
    path = list(sys.path)
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("docs")
    sys.path[:] = path


@pytest.fixture(scope="module")
def site(tools, tmp_path_factory):
    "Folder of the built site; the workers of a test session build it once"
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "docs"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            with redirect_stdout(StringIO()) as out, redirect_stderr(out), warnings.catch_warnings():
                warnings.simplefilter("ignore", PendingDeprecationWarning)  # of MyST with the newest Sphinx
                # in one process: this one has threads, and must not fork
                problems = tools.build(folder / "site", folder / "pages", jobs=1)
            (folder / "said").write_text(f"{problems}\n{out.getvalue()}")
    problems, said = (folder / "said").read_text().split("\n", 1)
    assert problems == "0", said
    return folder / "site"


def text_of(page):
    return page.read_text(encoding="utf-8")


def settings():
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def test_every_notebook_has_a_page(site):
    for folder, where in (("nbs/tutorials", "tutorials"), ("nbs/pages", "guides")):
        for notebook in (ROOT / folder).glob("*.ipynb"):
            assert (site / where / f"{notebook.stem}.html").exists(), f"{notebook.name} is not on the site"
    for name in ("which_recipe", "published_systems", "limits"):
        assert (site / "guides" / f"{name}.html").exists()
    assert not (site.parent / "jupyter_execute").exists()  # nothing is left beside the site


def exported(module):
    "`__all__` of a module, without importing it"
    tree = ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
    return next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)
                and n.targets[0].id == "__all__")


@each("module", MODULES)
def test_every_exported_name_has_an_entry(site, module):
    page = text_of(site / "api" / f"{module}.html")
    missing = [n for n in exported(module) if f'id="rcic_fastai.{module}.{n}"' not in page]
    assert not missing, f"api/{module}.html has no entry for {', '.join(missing)}"


def test_an_entry_has_signature_parameters_errors_and_source(site):
    entry = text_of(site / "api" / "screen.read.html").split('id="rcic_fastai.screen.read.read_screen"')[1][:8000]
    entry = html.unescape(re.sub(r"<[^>]+>", "", entry))
    for part in ("read_screen(path", "[source]", "of the screen, or of a store", "FileNotFoundError"):
        assert part in entry


def test_every_command_and_option_is_in_the_reference(site):
    page = text_of(site / "commands.html")
    for line in settings()["console_scripts"].split():
        name, target = line.split("=")
        if not target.startswith("rcic_fastai."):
            continue
        assert f'id="{name}"' in page, f"{name} is not in the reference"
        assert re.search(f'id="cmdoption-{name}-', page), f"{name} has no options in the reference"
    for option in ("rcic-train-recipe", "rcic-train-valid", "rcic-pack-preset", "rcic-predict-batchnorm"):
        assert f'id="cmdoption-{option}"' in page


def test_nothing_of_the_machine_or_of_the_making_is_left(site):
    here = [str(ROOT), str(Path.home()) + "/", tempfile.gettempdir() + "/", "site-packages"]
    for page in site.rglob("*.html"):
        if "_static" in page.parts:
            continue
        text = text_of(page)
        assert not [h for h in here if h in text], f"{page.name} holds a path of this machine"
        if "_modules" not in page.parts:
            shown = html.unescape(re.sub(r"<math.*?</math>|<[^>]+>", "", text, flags=re.S))
            assert not re.search(r"^#\|", shown, flags=re.M), f"{page.name} holds a directive"
            assert not re.search(r"\$[^$\n]*\\[a-z]+[^$\n]*\$|\{py:|\{option\}|:::", shown), f"{page.name} holds markup"


def test_hidden_cells_are_not_shown_and_outputs_are(site):
    for notebook, page in ((ROOT / "nbs" / "index.ipynb", "index"),
                           (ROOT / "nbs" / "pages" / "limits.ipynb", "guides/limits")):
        shown = html.unescape(re.sub(r"<[^>]+>", "", text_of(site / f"{page}.html")))
        cells = [c for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
        hidden = [line for c in cells if c.source.startswith("#| hide") for line in c.source.splitlines()[1:]
                  if len(line) > 30]
        assert hidden and not [line for line in hidden if line in shown]
    assert "<img" in text_of(site / "index.html")


def page_with(tmp_path, body):
    (tmp_path / "other.html").write_text('<h1 id="there">Other</h1>')
    (tmp_path / "page.html").write_text(f"<html><body>{body}</body></html>")
    return tmp_path


@each("body, problem", [
    ('<a href="gone.html">x</a>', "there is no such file"),
    ('<a href="other.html#nowhere">x</a>', "there is no such place on the page"),
    ('<a href="#nowhere">x</a>', "there is no such place on the page"),
    ('<img src="gone.png">', "there is no such file"),
    ('<img srcset="other.html 1x, gone.png 2x">', "there is no such file"),
    ('<script src="https://cdn.example.org/x.js"></script>', "is loaded from the network"),
    ('<link rel="stylesheet" href="//fonts.example.org/x.css">', "is loaded from the network"),
    ('<a href="https://exa mple">x</a>', "is no address"),
    ('<a href="../../outside.html">x</a>', "there is no such file"),
])
def test_link_check_finds(tools, tmp_path, body, problem):
    (found,) = tools.broken_links(page_with(tmp_path, body))
    assert found.startswith("page.html: ") and found.endswith(problem)


def test_link_check_accepts(tools, tmp_path):
    good = ('<p id="a b"></p><a href="#a%20b"></a><a href="other.html?q=1#there"></a><a '
            'href="https://example.org/x?y#z"></a><img src="data:image/png;base64,AA==">')
    assert tools.broken_links(page_with(tmp_path, good)) == []
    assert tools.broken_links(tmp_path / "nothing")[0].endswith("no pages")


def test_a_broken_link_in_a_copy_is_found(tools, site, tmp_path):
    copy = tmp_path / "copy"
    (copy / "api").mkdir(parents=True)
    # its own places and addresses stay
    page = re.sub(r'(?:href|src|action)="(?!#|https?:)[^"]*"', "", text_of(site / "api" / "predict.assign.html"))
    (copy / "api" / "predict.assign.html").write_text(page)
    assert tools.broken_links(copy) == []
    (copy / "api" / "predict.assign.html").write_text(page.replace('id="rcic_fastai.predict.assign.assign_classes"',
                                                                   ""))
    assert any("#rcic_fastai.predict.assign.assign_classes" in p for p in tools.broken_links(copy))


def test_a_warning_is_an_error(tools, tmp_path):
    (tmp_path / "index.md").write_text("# Title\n\n{py:obj}`rcic_fastai.no_such_name`\n")
    with redirect_stderr(StringIO()) as said:
        assert tools.sphinx(tmp_path, tmp_path / "out", jobs=1)
    assert "no_such_name" in said.getvalue()


def watched(context):
    "A page that collects what goes wrong"
    page, wrong = context.new_page(), []
    page.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
    page.on("pageerror", lambda e: wrong.append(str(e)))
    # aborted: by the next page
    page.on("requestfailed", lambda r: r.failure == "net::ERR_ABORTED" or wrong.append(f"{r.url} could not be loaded"))
    page.on("request", lambda r: r.url.startswith(("file:", "data:", "blob:"))
            or wrong.append(f"{r.url} is not in the site"))
    return page, wrong


@pytest.mark.parametrize("width, height", [(1280, 900), (390, 844)])
def test_pages_in_a_browser(site, chromium, width, height):
    page, wrong = watched(chromium.new_context(offline=True, viewport={"width": width, "height": height}))
    for name in PAGES:
        page.goto((site / f"{name}.html").as_uri())
        assert page.locator("h1").first.is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} is wider than {width} pixels"
        bad = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)")
        assert not bad, f"{name}: {bad}"
        assert not wrong, f"{name}: {wrong}"


def test_search_answers_without_a_server(site, chromium):
    page, wrong = watched(chromium.new_context(offline=True))
    page.goto((site / "search.html").as_uri() + "?q=read_screen")
    page.locator("#search-results li a").first.wait_for()
    assert "rcic_fastai.screen.read.read_screen" in page.locator("#search-results").inner_text()
    page.locator("#search-results li a").first.click()
    # a click returns before the next page is there
    page.wait_for_url("**/api/screen.read.html#rcic_fastai.screen.read.read_screen")
    assert not wrong


@pytest.mark.parametrize("width", [1280, 390])
def test_no_code_is_hidden_behind_the_right_edge(site, chromium, width):
    "Code wraps; each character of it lies within its box, and the box within the window"
    page, wrong = watched(chromium.new_context(offline=True, viewport={"width": width, "height": 900}))
    for name in MOST_READ:
        page.goto((site / f"{name}.html").as_uri())
        hidden = page.evaluate("""([...document.querySelectorAll('.bd-article pre')].filter(
            e => e.scrollWidth > e.clientWidth + 1 || e.getBoundingClientRect().right > innerWidth)
            .map(e => e.textContent.slice(0, 80)))""")
        assert not hidden, f"{name} at {width} pixels hides {hidden}"
        lines = page.evaluate("document.querySelectorAll('.bd-article pre > .line').length")
        assert lines or name == "index", f"{name} has no lines of code"
    assert not wrong


def test_search_leads_to_the_answer_first(site, chromium):
    page, wrong = watched(chromium.new_context(offline=True))
    for query, target in SEARCHES.items():
        page.goto((site / "search.html").as_uri() + f"?q={query.replace(' ', '+')}")
        first = page.locator("#search-results li").first
        first.locator("p.context").wait_for()
        assert first.locator("a").get_attribute("href") == target, query
        assert len(first.locator("p.context").inner_text()) > 30, f"{query}: no line of context"
    page.locator("#search-results li a").first.click()
    page.wait_for_url(f"**/{target}")
    assert not wrong


def test_topics_of_the_search_are_sections(tools):
    "A heading that was renamed is an error of the build, not a search that leads nowhere"
    search = importlib.import_module("docs_search")
    pages = {page: [["x", heading, ""] for heading in headings] for page, headings in search.TOPICS.items()}
    assert len(search.topics(pages)) > 100
    page, headings = next(iter(search.TOPICS.items()))
    with pytest.raises(ValueError, match=re.escape(next(iter(headings)))):
        search.topics(pages | {page: []})
