"""Build the site in `_site` from the notebooks and their stored outputs, and check its links: `python tools/docs.py`.

Nothing is executed and nothing is loaded from the network: nbdev's processors turn notebooks into pages, docments
become entries of Sphinx's Python domain, Sphinx with MyST-NB and the PyData theme make HTML of it. `--external` asks
the network whether external addresses still answer.
"""

import argparse
import os
import re
import shutil
import sys
import time
import warnings
from configparser import ConfigParser
from functools import cache
from importlib import import_module
from pathlib import Path

import nbformat
from fastcore.nbio import mk_cell, nb2str
from nbdev.process import NBProcessor
from nbdev.processors import filter_stream_, hide_, hide_line, populate_language, rm_export, rm_header_dash, strip_ansi

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # the modules of this checkout, wherever it is installed from
warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)  # of fastai's imports
import docs_api as api  # noqa: E402
from docs_links import broken_links  # noqa: E402
from docs_search import write_context  # noqa: E402

# in this order; others follow
TUTORIALS = ["walkthrough", "fastai_learner", "batch_effects", "own_data", "hpa", "kaggle", "open_questions"]
GUIDES = ["by_question", "which_recipe", "image_quality", "sizes", "systems", "runs", "published_systems", "limits",
          "architecture", "glossary"]
# rooms of the API that stand under one title; a room that is not named has its own
GROUPS = dict.fromkeys(["errors", "files", "credentials", "renamed", "versions", "private"], "Ground")
GROUND = "Files, errors and names that everything stands on."
BENCHMARKS = {  # in this order, each with a sentence
    "batch_effect": "Methods against the batch effect side by side, over seeds and strengths, on simulated screens.",
    "ablation": "What carries the default: each ingredient taken away, larger budgets, networks without BatchNorm.",
    "recipes": "The published systems with one small network and the same number of images, and what their corrections "
    "bring.",
    "questions": "Augmentations one by one, and seven uses of the control wells.",
    "fullsize": "One optimiser step of every recipe on real sites at full size: time and memory.",
    "hpa": "Several labels: thresholds, views, means of weights, stack and retrieval.",
    "thresholds": "What a threshold loses on images that did not choose it.",
    "duplicates": "All pairs of perceptual hashes: time, memory, twins found.",
    "real_plates": "A real batch effect: what a linear probe reads from control wells.",
    "quality": "Planted faults of images that quality control finds, and its false alarms.",
    "loading": "Reading sites: formats, presets and other libraries.",
    "training": "An epoch of our learner against a bare PyTorch loop and a naive pipeline.",
    "inference": "Prediction against bare PyTorch loops, by kind of BatchNorm statistics.",
    "assignment": "Plate groups and one-to-one assignment against other ways: time and exactness.",
    "index": "A store of a million sites: time to open, memory, reading order.",
}
FENCE = re.compile(r"^ *```.*?^ *```[ \t]*$", flags=re.S | re.M)
NOT_SHOWN = "application/vnd.jupyter.widget-view+json"  # a progress bar of Jupyter


@cache
def notebook_line(path):
    "Title of a notebook or Markdown page, and the sentence after `>`"
    text = nbformat.read(path, 4).cells[0].source if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    if not (found := re.match(r"# (.+)\n*(?:> (.+))?", text)):
        raise ValueError(f"{path.name}: expected a title, `# ...`, at its start")
    return found[1], found[2] or {**BENCHMARKS,
                                  "README": "Where the screens come from, and which folders are understood."}.get(
                                      path.stem, "")


def ordered(paths, names):
    "Paths by the place of their stem in `names`, the others after them"
    return sorted(paths, key=lambda p: (names.index(p.stem) if p.stem in names else len(names), p.stem))


class Site:
    "Which page is made from which file, and where names, commands and paths in backticks lead"

    def __init__(self, root=ROOT):
        self.root = root
        settings = ConfigParser(delimiters=["="])
        settings.read(root / "settings.ini", encoding="utf-8")
        self.settings = settings["DEFAULT"]
        nbs = root / "nbs"
        self.tutorials = {f"tutorials/{p.stem}": p for p in ordered(nbs.glob("tutorials/*.ipynb"), TUTORIALS)}
        self.guides = {f"guides/{p.stem}": p for p in ordered(nbs.glob("pages/*.ipynb"), GUIDES)}
        self.api = {f"api/{m}": p for p in sorted(nbs.glob("[0-9]*.ipynb")) if (m := default_exp(p))}
        self.benchmarks = {f"benchmarks/{'store_index' if p.stem == 'index' else p.stem}": p
                           for p in ordered((root / "benchmarks" / "results").glob("*.md"), list(BENCHMARKS))}
        self.other = {"index": nbs / "index.ipynb", "tutorials/data": root / "data" / "README.md",
                      "changelog": root / "CHANGELOG.md", "contributing": root / "CONTRIBUTING.md"}
        self.pages = {**self.other, **self.tutorials, **self.guides, **self.api, **self.benchmarks}
        self.modules = {page: import_module(f"{self.settings['lib_name']}.{page.removeprefix('api/')}")
                        for page in self.api}
        self.commands = dict(api.commands(self.settings))
        self.places = self._places()

    def _places(self):
        "Text in backticks -> page that it means"
        places = {p.relative_to(self.root).as_posix(): page for page, p in self.pages.items()}
        places |= {p.name: page for page, p in self.other.items() if page != "index" and p.name != "README.md"}
        return places | {p.stem: page for page, p in self.api.items()}

    def suffix(self, page):
        "Of the file that Sphinx reads for a page"
        return self.pages[page].suffix if page in self.pages else ".md"

    def relative(self, target, page):
        "Link from one page to another, as MyST wants it"
        return Path(os.path.relpath(target, Path(page).parent)).as_posix() + self.suffix(target)

    def groups(self):
        "The API in rooms, in the order of their floors: title, sentence, pages"
        rooms = {}
        for page in self.api:
            room = page.removeprefix("api/").split(".")[0]
            rooms.setdefault(GROUPS.get(room, room), []).append(page)
        for room, pages in rooms.items():
            line = GROUND if room == "Ground" else import_module(f"{self.settings['lib_name']}.{room}").__doc__
            yield room.capitalize(), line, pages


def default_exp(path):
    "Name of the module that a notebook exports"
    found = re.search(r"#\|\s*default_exp ([\w.]+)",
                      "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "code"))
    return found and found[1]


class Linker:
    "Turn code in backticks that names something of the library, a command or a file into a link to its page"

    def __init__(self, site):
        self.site, self.symbols, self.files, parameters = site, {}, set(), set()
        for module in site.modules.values():
            for name in module.__all__:
                symbol = api.plain(getattr(module, name))
                self.symbols[name] = f"{module.__name__}.{name}"
                if callable(symbol):
                    parameters |= api.own_parameters(symbol)[0].keys()
                if isinstance(symbol, type):
                    self.symbols |= {f"{name}.{m}": f"{module.__name__}.{name}.{m}"
                                     for m, _ in api.public_members(symbol)}
        self.ambiguous = parameters & self.symbols.keys()  # `window` is a parameter more often than the function

    def code(self, text, page):
        "A link for the code `text`, or the code as it is"
        name = text.removesuffix("()")
        if name in self.symbols and not (name in self.ambiguous and name == text):
            return f"{{py:obj}}`{text} <{self.symbols[name]}>`"
        if text.split()[0] in self.site.commands:
            return f"[`{text}`](#{text.split()[0]})"
        # the title of a page says more than where its source lies
        if (target := self.site.places.get(text)) and target != page:
            shown = f"*{notebook_line(self.site.pages[target])[0]}*" if "/" in text else f"`{text}`"
            return f"[{shown}]({self.site.relative(target, page)})"
        return f"`{text}`"

    def __call__(self, markdown, page):
        """Link code outside fences, headings and link texts; relative links to files of the repository lead to their
        pages"""
        folder = self.site.pages[page].parent if page in self.site.pages else self.site.root
        out = []
        for i, part in enumerate(re.split(r"(^ *```.*?^ *```[ \t]*$|^#[^\n]*$)", markdown, flags=re.S | re.M)):
            if i % 2 == 0:
                part = re.sub(r"(?<![`}])`([^`\n]+)`(?![`\]])", lambda m: self.code(m[1], page), part)
                part = re.sub(r"\]\(([^)\s#:]+)(#[^)\s]*)?\)", lambda m: self.file(m, folder, page), part)
            out.append(part)
        return "".join(out)

    def file(self, match, folder, page):
        "A link to a page instead of one to its source; other files of the repository go along"
        path = Path(os.path.normpath(folder / match[1]))
        if not path.is_relative_to(self.site.root) or not path.exists():
            return match[0]
        name = path.relative_to(self.site.root).as_posix()
        if target := self.site.places.get(name):
            return f"]({self.site.relative(target, page)}{match[2] or ''})"
        self.files.add(name)
        return f"]({os.path.relpath(Path('files') / name, Path(page).parent)})"


def add_entries(nb, module):
    "After each exported cell, the entries of what it defines; returns these names, each with its comment"
    left, comments = list(module.__all__), {}
    for cell in [c for c in nb.cells if c.cell_type == "code" and "export" in c.directives_]:
        names = {k: v for k, v in api.defined_names(cell.source).items() if k in left}
        left = [k for k in left if k not in names]
        comments |= names
        if names:
            text = "\n".join(api.entry(module, name, comment) for name, comment in names.items())
            nb.cells.insert(nb.cells.index(cell) + 1, mk_cell(text, "markdown"))
    if left:
        raise ValueError(f"{module.__name__}: no cell of its notebook defines {', '.join(left)}")
    return comments


def module_header(module, source, comments):
    "What stands below the title of an API page: the module, and a table of its names"
    rows = [f"| {{py:obj}}`{n} <{module.__name__}.{n}>` | {api.summary(getattr(module, n), comments[n])} |"
            for n in comments]
    return (f":::{{py:module}} {module.__name__}\n:::\n\n{{.module}}\n"
            f"{{py:mod}}`{module.__name__}`, made from `{source}`\n\n"
            + "\n".join(["{.names}", "| Name | |", "|---|---|", *rows]) + "\n")


def clean_cell(cell, link, page):
    "Directives as MyST-NB knows them, and of the outputs only what a page can show"
    said = cell.directives_
    if said.get("echo", "").strip() == "false":
        cell.metadata["tags"] = ["remove-input"]
    if "fig-alt" in said:
        cell.metadata["mystnb"] = {"image": {"alt": said["fig-alt"].strip().strip("\"'")}}
    cell.outputs = [o for o in cell.outputs if NOT_SHOWN not in o.get("data", {})]
    for out in cell.outputs:
        if "text/html" in (data := out.get("data", {})):
            data["text/html"] = re.sub(r"<style.*?</style>\s*", "", "".join(data["text/html"]), flags=re.S)
            data.pop("text/markdown", None)
        elif "text/markdown" in data:
            data["text/markdown"] = link("".join(data["text/markdown"]), page)


def notebook_page(site, link, page):
    "A notebook as a page: no hidden cells or directives, entries instead of exported cells"
    source, module = site.pages[page], site.modules.get(page)
    processor = NBProcessor(source, procs=[populate_language, strip_ansi, hide_line, filter_stream_, rm_header_dash,
                                           rm_export, hide_])
    nb = processor.nb
    if module:
        comments = add_entries(nb, module)
        for cell in nb.cells:
            cell.directives_ = getattr(cell, "directives_", {})
    processor.process()
    if module:
        nb.cells.insert(1, mk_cell(module_header(module, source.relative_to(site.root).as_posix(), comments),
                                   "markdown"))
    if page == "index":
        nb.cells.insert(1, mk_cell(CARDS, "markdown"))
        nb.cells.append(mk_cell(toctree(SECTIONS, hidden=True), "markdown"))
    nb.metadata = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"},
                   "language_info": {"name": "python", "pygments_lexer": "python3"}}
    for i, cell in enumerate(nb.cells):
        if i and cell.cell_type != "code" and (second := re.search(r"^# .+$", FENCE.sub("", cell.source), flags=re.M)):
            raise ValueError(f"{source.name}: a second title, {second[0]!r}")
        if cell.cell_type == "code":
            clean_cell(cell, link, page)
        else:
            cell.source = link(cell.source, page)
    return nb2str(nb)


def markdown_page(link, page, source):
    "A Markdown file as a page; tables of benchmarks are mostly figures"
    text = link(source.read_text(encoding="utf-8"), page)
    return re.sub(r"^(?=\|[^\n]*\n\|[ :|-]+\|$)", "{.figures}\n", text,
                  flags=re.M) if page.startswith("benchmarks/") else text


def toctree(entries, hidden=False, caption=None):
    "A table of contents"
    options = [":hidden:"] * hidden + [f":caption: {caption}"] * bool(caption)
    return "\n".join(["```{toctree}", *options, "", *entries, "```", ""])


SECTIONS = ["Guides <guides/index>", "Tutorials <tutorials/index>", "API <api/index>", "Commands <commands>",
            "Benchmarks <benchmarks/index>",
            "Changelog <changelog>", "Contributing <contributing>"]
CARDS = """{.cards}
- **[Guide by question](guides/by_question.ipynb)**

  Odd wells, the batch effect, best hits, the next plate, two GPUs, a backbone: each with the lines that answer it.
- **[Tutorials](tutorials/index.md)**

  The whole road in a notebook, your own images, the Human Protein Atlas, open questions.
- **[Guides](guides/index.md)**

  Which recipe to use, what the published systems did, what this library cannot do, its architecture and its words.
- **[API](api/index.md)**

  Every function and class, with the notebook that explains it.
- **[Commands](commands.md)**

  From a folder of images to a submission in a terminal.
"""


def list_page(title, line, pages, site):
    "A page that lists others with their one line"
    folder = Path(pages[0]).parent.as_posix()
    items = []
    for page in pages:
        name, about = notebook_line(site.pages[page])
        items.append(f"- **[{name}]({Path(page).name}{site.suffix(page)})**\n\n  {about}\n")
    return f"# {title}\n\n{line}\n\n{{.cards}}\n" + "".join(items) + "\n" + toctree(
        [p.removeprefix(f"{folder}/") for p in pages], hidden=True)


def api_index(site):
    "All exported names, in groups and in the order of the data"
    out = ["# API\n\nIn the order of the data. Each page is the notebook that its module is made from: what it does "
           "and why, an entry for "
           "each name it exports, and cells that show it working.\n\n"
           "In alphabetical order: {ref}`names <genindex>`, {ref}`modules <modindex>`.\n"]
    for title, line, pages in site.groups():
        out.append(f"## {title}\n\n{line}\n\n{{.names}}\n| Page | |\n|---|---|")
        for page in pages:
            name, about = notebook_line(site.pages[page])
            module = site.modules[page]
            names = " · ".join(f"{{py:obj}}`{n} <{module.__name__}.{n}>`" for n in module.__all__)
            out.append(f"| [{name}]({page.removeprefix('api/')}.ipynb) | {api.escape(about)}<br>{names} |")
        out.append("\n" + toctree([p.removeprefix("api/") for p in pages], hidden=True, caption=title))
    return "\n".join(out)


def command_page(site):
    "The command reference"
    names = "\n".join(f"| [`{n}`](#{n}) | {api.summary(f)} |" for n, f in site.commands.items())
    entries = "\n".join(api.command_entry(n, f) for n, f in site.commands.items())
    return ("# Commands\n\nWhat `--help` says about each of them. An error is one readable line and a non-zero exit "
            "status; `--debug` shows the "
            f"traceback.\n\n{{.names}}\n| Command | |\n|---|---|\n{names}\n\n{entries}")


def write_pages(site, folder):
    "All pages that Sphinx reads, into an empty folder"
    shutil.rmtree(folder, ignore_errors=True)
    link = Linker(site)

    def write(name, text):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")

    for page, source in site.pages.items():
        text = notebook_page(site, link, page) if source.suffix == ".ipynb" else markdown_page(link, page, source)
        write(page + source.suffix, text)
    generated = {
        "tutorials/index": list_page("Tutorials", "Notebooks to run cell by cell, on simulated images or on your own.",
                                     [*site.tutorials, "tutorials/data"], site),
        "guides/index": list_page("Guides",
                                  "What to choose, where it comes from, where it ends, and how the library is built.",
                                  list(site.guides), site) if site.guides else "",
        "benchmarks/index": list_page("Benchmarks",
                                      "What was measured, how, and on what machine; each page says the command that "
                                      "measures it again.",
                                      list(site.benchmarks), site),
        "api/index": api_index(site), "commands": command_page(site)}
    for page, text in generated.items():
        write(page + ".md", link(text, page))
    for name in link.files:
        write(f"files/{name}", (site.root / name).read_text(encoding="utf-8"))


def sphinx(source, out, builder="html", jobs="auto"):
    "Run Sphinx; a warning is an error"
    try:
        from sphinx.cmd.build import main
    except ImportError:
        raise SystemExit("the site is built by Sphinx 9, which needs Python 3.11 or newer: pip install -e '.[dev]' "
                         "there") from None
    source = Path(source)
    args = ["-b", builder, "-c", str(ROOT / "docs"), "-d", str(source / ".doctrees"), "-W", "--keep-going", "-n", "-q",
            "-j", str(jobs), str(source), str(out)]
    return main(args)


def build(out=ROOT / "_site", pages=ROOT / "_proc", external=False, jobs="auto"):
    "Build the site; returns the number of problems"
    start = time.time()
    write_pages(Site(), pages)
    print(f"pages: {time.time() - start:.0f} s")
    shutil.rmtree(out, ignore_errors=True)
    failed = sphinx(pages, out, jobs=jobs)
    # MyST-NB leaves the notebooks that it has read beside the site
    shutil.rmtree(Path(out).parent / "jupyter_execute", ignore_errors=True)
    if not failed:
        write_context(out)
    print(f"Sphinx: {time.time() - start:.0f} s")
    problems = broken_links(out)
    for problem in problems:
        print(problem)
    if external:
        failed |= sphinx(pages, pages / ".linkcheck", "linkcheck", jobs)
    if not failed and not problems:
        print(f"{out}/index.html: {len(list(out.rglob('*.html')))} pages without a warning or a broken link, "
              f"{time.time() - start:.0f} s")
    return bool(failed) + len(problems)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "_site", help="folder of the site (default: _site)")
    parser.add_argument("--pages", type=Path, default=ROOT / "_proc",
                        help="folder of the pages that Sphinx reads (default: _proc)")
    parser.add_argument("--external", action="store_true", help="ask the network whether external addresses answer")
    args = parser.parse_args()
    sys.exit(1 if build(args.out, args.pages, args.external) else 0)
