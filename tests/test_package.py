"""The project's own promises: one place of its settings, notebooks as the source, modules in the order of the data,
a README that is current."""
import ast
import base64
import configparser
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from cases import each
import setuptools
from fastcore.docments import docments
from packaging.requirements import Requirement

import rcic_fastai

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
PACKAGE = ROOT / "rcic_fastai"
FILES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))
         if not p.stem.startswith("_")}
# leave their names behind for a release
MOVED = sorted(m for m, p in FILES.items() if "a module of version 0.1.0" in p.read_text(encoding="utf-8"))
NOT_EXPORTED = {"all", *MOVED}  # modules written by hand
MODULES = sorted(set(FILES) - set(MOVED))
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")


def settings():
    "`settings.ini`, read independently of setup.py"
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def scripts():
    "Name and `module:function` of every command"
    return dict(s.split("=") for s in settings()["console_scripts"].split())


@functools.cache  # to read them all takes seconds
def notebook(path):
    return nbformat.read(path, as_version=4)


@functools.cache
def exported():
    "Module name -> floor: the number of the notebook that exports it"
    numbers = {}
    for path in NOTEBOOKS:
        names = re.findall(r"^#\|\s*default_exp\s+(\S+)",
                           "\n".join(c.source for c in notebook(path).cells if c.cell_type == "code"), flags=re.M)
        assert len(names) <= 1, f"{path.name} exports to {names}"
        if names:
            assert re.fullmatch(r"\d\d_" + re.escape(names[0]),
                                path.stem), f"{path.name} exports {names[0]}.py; they must be named alike"
            assert names[0] not in numbers, f"two notebooks export {names[0]}.py"
            numbers[names[0]] = int(path.stem.partition("_")[0])
    return numbers


# Lines

def test_lines_of_the_library_fit_a_screen():
    "120 columns, but for the list of names that nbdev writes"
    wide = [f"{p.relative_to(ROOT)}:{i}" for p in (ROOT / "rcic_fastai").rglob("*.py") if p.name != "_modidx.py"
            for i, line in enumerate(p.read_text(encoding="utf-8").splitlines(), 1)
            if len(line) > 120 and not re.match(r"(__all__ = \[| +)'[\w.]+',", line)]
    assert not wide, f"longer than 120 columns: {wide}"


# Settings

def test_setup_is_what_the_settings_say(monkeypatch):
    given, cfg = {}, settings()
    monkeypatch.setattr(setuptools, "setup", lambda **kwargs: given.update(kwargs))
    runpy.run_path(str(ROOT / "setup.py"))
    assert (given["name"], given["version"], given["license"]) == (cfg["lib_name"], cfg["version"], cfg["license"])
    assert given["python_requires"] == ">=" + cfg["min_python"]
    assert given["install_requires"] == cfg["requirements"].split()
    extras = ("dev", "phenomics", "zarr", "s3", "codecs", "excel", "stack", "kaggle", "tracking", "bench")
    assert given["extras_require"] == {e: cfg[f"{e}_requirements"].split() for e in extras}
    named = {e for f in FILES.values() for e in re.findall(r"rcic_fastai\[(\w+)\]", f.read_text(encoding="utf-8"))}
    assert {"excel", "codecs", "zarr", "s3"} <= named <= set(extras)  # what messages advise can be installed
    assert dict(s.split("=") for s in given["entry_points"]["console_scripts"]) == scripts()
    rooms = {f"rcic_fastai.{m.partition('.')[0]}" for m in MODULES if "." in m}
    assert set(given["packages"]) == {"rcic_fastai", *rooms}


def test_the_installed_package_is_what_the_settings_say():
    cfg, installed = settings(), importlib.metadata.distribution("rcic_fastai")
    assert (installed.metadata["Name"], installed.version) == (cfg["lib_name"], cfg["version"])
    required = [Requirement(r) for r in installed.requires]
    assert {str(r) for r in required if not r.marker} == {str(Requirement(r)) for r in cfg["requirements"].split()}
    dev = {(r.name, str(r.specifier)) for r in required if r.marker and r.marker.evaluate({"extra": "dev"})}
    assert dev == {(r.name, str(r.specifier)) for r in map(Requirement, cfg["dev_requirements"].split()) if not r.marker
                   or r.marker.evaluate()}
    assert {e.name: e.value for e in installed.entry_points if e.group == "console_scripts"} == scripts()


def test_version(monkeypatch):
    assert rcic_fastai.__version__ == settings()["version"]

    def missing(name): raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert runpy.run_path(rcic_fastai.__file__)["__version__"] == "0+unknown"


@pytest.mark.parametrize("name", scripts())
def test_a_command_points_at_a_function(name):
    module, function = scripts()[name].split(":")
    if module.startswith("nbdev"): pytest.importorskip("nbdev", reason="nbdev is a tool of development")
    assert callable(getattr(importlib.import_module(module),
                            function)), f"{name}: {module}.{function} is not a function"


def test_changelog_and_citation_name_the_version():
    version = settings()["version"]
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert {"cff-version: 1.2.0", f"version: {version}", f"title: {settings()['lib_name']}",
            f"license: {settings()['license']}",
            f"  - name: {settings()['author']}"} <= set(citation)


def test_upper_bounds_are_above_what_is_tested():
    tool = runpy.run_path(str(ROOT / "tools" / "newest.py"))
    required = {r.name: r for r in map(Requirement, settings()["requirements"].split())}
    kaggle = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "tools" / "kaggle_image.txt").read_text(encoding="utf-8"),
                             flags=re.M))
    for name in ("fastai", "fastcore", "torch", "torchvision"):
        specifier = required[name].specifier
        assert any(s.operator == "<" for s in specifier), f"{name} has no upper bound"
        assert kaggle[name] in specifier and importlib.metadata.version(name).partition("+")[0] in specifier
    free = tool["unbounded"](["fastai>=2.8.7,<2.9", "nbdev==3.3.26", "zarr>=3.0.8;python_version>='3.11'",
                              "plum-dispatch<=2.9"])
    assert free == ["fastai>=2.8.7", "nbdev", "zarr>=3.0.8;python_version>='3.11'", "plum-dispatch"]


def test_benchmarks_and_notebooks_that_are_named_exist():
    stems = {p.stem for p in NOTEBOOKS}
    pages = {p: "\n".join(c.source for c in notebook(p).cells) for p in NOTEBOOKS}
    pages |= {p: p.read_text(encoding="utf-8") for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md",
                                                         *(ROOT / "benchmarks").rglob("*.md"))}
    for path, text in pages.items():
        gone = [n for n in re.findall(r"`(?:nbs/)?(\d\d_[a-z_.]+?)(?:\.ipynb)?`", text) if n not in stems]
        assert not gone, f"{path.name} names notebooks that do not exist: {gone}"
        missing = [n for n in re.findall(r"make bench NAME=(\w+)", text) if n != "..."
                   and not (ROOT / "benchmarks" / f"{n}.py").exists()]
        assert not missing, f"{path.name} names benchmarks that do not exist: {missing}"


# Notebooks

@each("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_a_notebook_is_fit_to_read(path):
    nb = notebook(path)
    nbformat.validate(nb)
    ids = [c.get("id", "") for c in nb.cells]
    assert all(re.fullmatch(r"[\w-]{1,64}", i) for i in ids) and len(set(ids)) == len(
        ids), "cell ids are missing or repeated"
    first = nb.cells[0]
    assert first.cell_type == "markdown" and re.match(r"# \S.*\n+> \S",
                                                      first.source), "it must open with an H1 and a `>` line"
    for cell in nb.cells:
        assert cell.cell_type != "markdown" or not re.search(r"^#( [#>].*)?$", cell.source,
                                                             flags=re.M), f"cell {cell.id} is commented-out markdown"
    assert path.stat().st_size < 1_000_000, f"{path.stat().st_size/1e6:.2f} MB; make the plots smaller"
    for cell in nb.cells:
        for out in cell.get("outputs", []):
            assert out.output_type != "error", f"cell {cell.id} stores an error: {out.get('ename')}"
            shown = out.get("text", "") + "".join(v for k, v in out.get("data", {}).items() if isinstance(v, str)
                                                  and not k.startswith("image/p"))
            found = re.search(r"/(tmp|work|root|home|Users|var|private)/[\w./-]*|[\w./-]*site-packages[\w./-]*", shown)
            assert not found, f"cell {cell.id} shows a path of the machine it ran on: {found[0]}"
        found = re.search(r"(?<![\w.])/(work|root|home|Users)/[\w./-]*", cell.source)
        assert not found, f"cell {cell.id} names a path of one machine: {found[0]}"
        checks_nothing = cell.cell_type == "code" and re.search(r"expect_fail\(\s*(lambda|partial)", cell.source)
        assert not checks_nothing, (f"cell {cell.id}: expect_fail is a context manager and never calls a function "
                                    "that it is given")


def test_every_module_has_one_notebook():
    assert set(FILES) - NOT_EXPORTED == set(exported())


# Modules

@functools.cache
def imported_modules(name):
    "Modules of the package that a module imports, anywhere in its code"
    tree, found = ast.parse(FILES[name].read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("rcic_fastai.") for a in node.names if a.name.startswith("rcic_fastai.")}
        elif isinstance(node, ast.ImportFrom):
            full = importlib.util.resolve_name("." * node.level + (node.module or ""),
                                               f"rcic_fastai.{name}".rpartition(".")[0]) if node.level else node.module
            if full.split(".")[0] != "rcic_fastai": continue
            inner = full.removeprefix("rcic_fastai").removeprefix(".")
            found |= {inner} if inner in FILES else {f"{inner}.{a.name}".strip(".") for a in node.names} & set(FILES)
    return found


def test_modules_import_only_lower_floors():
    "So there is no circle either; nothing of ours uses a name that moved"
    numbers = exported()
    ahead = {(m, i) for m in numbers for i in imported_modules(m) if i not in numbers or numbers[i] >= numbers[m]}
    assert not ahead, f"imports of the same or of a higher floor: {sorted(ahead)}"


@pytest.mark.slow
def test_the_drawing_of_the_import_graph():
    "Made by a tool that reads the imports in another way than this file"
    tool = runpy.run_path(str(ROOT / "tools" / "imports.py"))
    floors = tool["module_floors"]()
    graph = tool["import_graph"](floors)
    assert floors == exported() and graph == {m: imported_modules(m) & set(floors) for m in floors}
    found = tool["counts"](graph, floors)
    assert found["circles"] == found["arrows up"] == 0 and 10 < found["rooms"] <= 25
    drawing = tool["drawing"](graph, floors)
    assert drawing.splitlines()[-1] == ", ".join(f"{k} {n}" for k, n in found.items())
    for m in floors:
        assert re.search(rf"(^| ){re.escape(m.rpartition('.')[2])}( |$)", drawing, flags=re.M), f"{m} is not drawn"


def test_the_tool_sees_circles_and_arrows_up():
    tool = runpy.run_path(str(ROOT / "tools" / "imports.py"))
    floors = {"files": 1, "screen.core": 10, "screen.read": 11, "data.image": 20}
    source = "from .core import x\nfrom ..files import y\ndef f():\n    import rcic_fastai.data.image"
    assert tool["imported"](source, "screen.read", floors) == {"screen.core", "files", "data.image"}
    graph = {"files": set(), "screen.core": {"files"}, "screen.read": {"screen.core", "data.image"},
             "data.image": {"screen.read"}}
    assert tool["circles"](graph) == [("data.image", "screen.read")]
    assert tool["arrows_up"](graph, floors) == [("screen.read", "data.image")]
    assert tool["counts"](graph, floors) == {"rooms": 3, "modules": 4, "arrows": 4, "circles": 2, "arrows up": 1}
    drawn = tool["drawing"](graph, floors)
    assert "up: screen.read --> data.image" in drawn and "circle: data.image, screen.read" in drawn
    assert "circle: data, screen" in drawn


def test_a_room_has_numbers_of_its_own():
    numbers, rooms = exported(), {}
    for m, n in numbers.items(): rooms.setdefault(m.partition(".")[0], []).append(n)
    assert len(rooms) <= 25
    spans = sorted((min(n), max(n), room) for room, n in rooms.items())
    assert all(a[1] < b[0] for a, b in zip(spans, spans[1:])), f"rooms share floors: {spans}"


@each("name", [*MOVED, *(r for r in ("screen", "train", "run", "predict", "model", "data"))])
def test_names_of_the_release_before_are_found_where_they_are_now(name):
    old = importlib.import_module(f"rcic_fastai.{name}")
    with pytest.warns(FutureWarning, match="the old place leaves with the next release"):
        for n in old.__all__: assert getattr(old, n) is not None
    with pytest.raises(AttributeError): old.no_such_name  # noqa: B018



def undocumented(name):
    "Parameters without a comment of the public functions of a module, and of the initialisers it writes itself"
    module = importlib.import_module(f"rcic_fastai.{name}")
    for n in module.__all__:
        o = getattr(module, n, None)
        if inspect.isclass(o) and "__init__" in vars(o) and not dataclasses.is_dataclass(o): o = o.__init__
        if not inspect.isfunction(o) or o.__module__ != module.__name__: continue
        # not the delegated ones
        own = set(o.__code__.co_varnames[:o.__code__.co_argcount + o.__code__.co_kwonlyargcount]) - {"self"}
        yield from (f"{n}({p})" for p, doc in docments(o, returns=False).items() if p in own and not doc)


@each("name", [m for m in MODULES if m not in NOT_EXPORTED])
def test_public_names_are_documented(name):
    tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
    defs = [d for d in tree.body if isinstance(d, ast.FunctionDef | ast.ClassDef) and not d.name.startswith("_")]
    assert not [d.name for d in defs if not ast.get_docstring(d)]
    assert not list(undocumented(name))


# README

@pytest.fixture(scope="module")
def readme():
    "The namespace of tools/readme.py"
    return runpy.run_path(str(ROOT / "tools" / "readme.py"))


def test_the_readme_is_made_from_the_index(readme):
    text, pictures = readme["convert"]()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == text, "run `make readme`"
    stored = {p.relative_to(ROOT).as_posix(): p.read_bytes() for p in (ROOT / "docs" / "readme").glob("*")}
    assert stored == pictures, "run `make readme`"


@each("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"])
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]+`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    links = [m.partition("#")[0] for m in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", m)]
    assert not [link for link in links if not (ROOT / page).parent.joinpath(link).exists()]


def test_readme_converter(readme, tmp_path):
    table = "<div><style scoped>\n.dataframe {color: red}\n</style>\n<table><tr><td>1</td></tr></table></div>"
    picture = nbformat.v4.new_output("display_data",
                                     {"image/png": base64.b64encode(PNG).decode(), "text/plain": "<Figure>"})
    code = nbformat.v4.new_code_cell
    cells = [
        nbformat.v4.new_markdown_cell("# Title\n\n[walk](tutorials/walk.ipynb#two) ![](images/a.png) "
                                      "[out](https://x.org) `f[0](a)` [up](../LICENSE) [in](#here)"),
        code("#| hide\nimport secret", id="aaaa"),
        code("#| fig-alt: 'one well'\nplot()", id="bbbb", outputs=[picture]),
        code("#| echo: false\nprint(2)", id="cccc", outputs=[nbformat.v4.new_output("stream", text="two\n")]),
        code("frame", id="dddd",
             outputs=[nbformat.v4.new_output("execute_result", {"text/html": table, "text/plain": "1"}),
                                           nbformat.v4.new_output("stream", name="stderr", text="a warning")]),
    ]
    path = tmp_path / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    text, pictures = readme["convert"](path)
    assert (text, pictures) == readme["convert"](path)
    assert pictures == {"docs/readme/bbbb-0.png": PNG}
    assert "![one well](docs/readme/bbbb-0.png)" in text and "```python\nplot()\n```" in text
    assert "    two\n" in text and "<td>1</td>" in text and text.startswith("<!--") and "\n# Title\n" in text
    for gone in ("secret", "style", "warning", "#|", "print(2)", "Figure"): assert gone not in text
    relinked = readme["relink"](cells[0].source, ROOT / "nbs")
    assert ("[walk](nbs/tutorials/walk.ipynb#two) ![](nbs/images/a.png) [out](https://x.org) `f[0](a)` [up](LICENSE) "
            "[in](#here)" in relinked)


@pytest.mark.slow
def test_the_public_environment_is_enough():
    "Modules import nothing that only the development environment has (nbdev's index aside)"
    dev = {Requirement(r).name.replace("-", "_") for r in settings()["dev_requirements"].split()} - {
        "zarr", "lightgbm", "kaggle", "setuptools", "build"}
    for name in MODULES:
        tree = ast.parse(FILES[name].read_text(encoding="utf-8"))
        tops = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        tops |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
        assert not tops & dev, f"{name}.py imports {sorted(tops & dev)}"
        foreign = tops - set(sys.stdlib_module_names) - {"rcic_fastai"}
        known = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn", "IPython": "ipython"}
        # the extra, and what a function looks for and does without
        # h5py comes with anndata, tifffile with scikit-image
        optional = {Requirement(r).name for e in ("phenomics", "zarr", "stack", "kaggle", "tracking")
                    for r in settings()[f"{e}_requirements"].split()} | {"umap", "h5py", "tifffile"}
        declared = {Requirement(r).name for r in settings()["requirements"].split()} | optional
        assert ({known.get(f, f)
                 for f in foreign}
                <= declared), f"{name}.py imports what settings.ini does not require: {sorted(foreign)}"
