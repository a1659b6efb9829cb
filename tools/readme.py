"Write README.md and its pictures from nbs/index.ipynb and its stored outputs: `python tools/readme.py`."
import os
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK, README, PICTURES = Path("nbs/index.ipynb"), Path("README.md"), Path("docs/readme")  # all relative to the root
NOTE = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->\n\n"
DIRECTIVE = re.compile(r"^#\|\s*(?P<name>[\w-]+):?[ \t]*(?P<value>.*)\n?", flags=re.M)


def directives(cell):
    "The `#| name: value` lines of a code cell, as a dictionary"
    return {m["name"]: m["value"].strip() for m in DIRECTIVE.finditer(cell.source)} if cell.cell_type == "code" else {}


def relink(markdown, folder):
    "Relative links of a notebook in `folder` as links from the root; code is left alone"
    def from_root(m):
        if re.match(r"[a-z][a-z+.-]*:|[/#]", m[1]):
            return m[0]
        return f"]({Path(os.path.relpath(folder / m[1], ROOT)).as_posix()})"
    parts = re.split(r"(```.*?```|`[^`\n]+`)", markdown, flags=re.S)
    return "".join(part if i % 2 else re.sub(r"\]\(([^)\s]+)\)", from_root, part) for i, part in enumerate(parts))


def markdown_table(html):
    "A table that pandas has printed, as Markdown; any other HTML as it is"
    if 'class="dataframe"' not in html:
        return html
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.S)
            for row in re.findall(r"<tr[^>]*>(.*?)</tr>", html, flags=re.S)]
    if len(rows) < 2 or len({len(r) for r in rows}) > 1:  # cells that span others
        return html
    cells = [[c.strip().replace("|", r"\|") for c in r] for r in rows]
    lines = [f"| {' | '.join(r)} |" for r in (cells[0], ["---"] * len(cells[0]), *cells[1:])]
    return "\n".join(lines)


def prepare(nb, folder):
    """Keep what a reader of the README needs: no hidden cells, directives, warnings or table styles; returns the alt
    text of each picture"""
    nb.cells = [c for c in nb.cells if not {"hide", "default_exp"} & directives(c).keys()]
    # nbdev-clean drops it; nbconvert names the language of a code block by it
    nb.metadata["language_info"] = {"name": "python"}
    alts = {}
    for cell in nb.cells:
        if cell.cell_type != "code":
            cell.source = relink(cell.source, folder)
            continue
        said = directives(cell)
        cell.source = DIRECTIVE.sub("", cell.source)
        if said.get("echo") == "false" or not cell.source.strip():
            cell.metadata["transient"] = {"remove_source": True}
        bars = {"<div></div>", ""}  # what a finished progress bar leaves
        cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"
                        and (h := "".join(o.get("data", {}).get("text/html", "x")).strip()) not in bars
                        and "appearance: none" not in h]
        for i, out in enumerate(cell.outputs):
            if "text/html" in out.get("data", {}):  # GitHub prints the text of a <style> element
                out.data["text/html"] = (
                    markdown_table(re.sub(r"<style.*?</style>\s*", "", out.data["text/html"], flags=re.S)))
            if out.get("data", {}).keys() & {"image/png", "image/jpeg", "image/svg+xml"}:
                out.metadata["filename"] = f"{cell.id}-{i}"  # named by cell, so that a new cell above renames nothing
                alts[f"{cell.id}-{i}"] = said.get("fig-alt", "").strip("\"'")
    return alts


def convert(
    notebook=ROOT / NOTEBOOK,  # path of a notebook with stored outputs; nothing is executed
):                             # text of the README, and a dictionary from picture path (relative to the root) to bytes
    "Markdown and pictures of a notebook: the same notebook gives the same bytes"
    nb = nbformat.read(notebook, as_version=4)
    alts = prepare(nb, Path(notebook).resolve().parent)
    exporter = MarkdownExporter()
    text, resources = exporter.from_notebook_node(nb, resources={"output_files_dir": PICTURES.as_posix()})
    text = re.sub(r"!\[(?:png|jpeg|svg)\]\((\S+)\)", lambda m: f"![{alts.get(Path(m[1]).stem, '')}]({m[1]})", text)
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    return NOTE + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n", resources["outputs"]


def write(root=ROOT):
    "Write the README and its pictures, and delete the pictures it no longer shows"
    text, pictures = convert()
    (root / README).write_text(text, encoding="utf-8")
    for old in (root / PICTURES).glob("*"):
        if (PICTURES / old.name).as_posix() not in pictures:
            old.unlink()
    for name, content in pictures.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


if __name__ == "__main__":
    write()
