"""Every code block of the README runs: commands here, on data small enough for a test; Python in the notebook that
the README is made from."""
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from test_cli import in_process
from test_report import execute_here

ROOT = Path(__file__).resolve().parents[1]
# what a test can do without: full-size networks, many views and thousands of images; the options are those of the
# commands
NETWORK = ["--set", 'model.arch_options={"channels": [8, 16, 32, 64], "stem_width": 8}']
SMALLER = {
    "rcic-demo": ["--set", "train.epochs=2", *NETWORK],
    "rcic-train": ["--laptop", "1", "--set", "data.batch_size=16", "--set", "inference.tta=1", *NETWORK],
    "rcic-hpa-simulate": ["--images", "340", "--test", "168", "--external", "46"],
}


def blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def commands():
    "Lines of all shell blocks, continued lines joined, comments dropped, as lists of words"
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_python_blocks_are_cells_that_the_notebook_tests_run():
    cells = [c.source for c in nbformat.read(ROOT / "nbs" / "index.ipynb", 4).cells if c.cell_type == "code"]
    code = [re.sub(r"^#\|.*\n", "", c, flags=re.M).strip() for c in cells]
    found = [b.strip() for b in blocks("python")]
    assert len(found) >= 2 and not [b for b in found if b not in code]


def test_make_knows_its_targets():
    targets = [w[1] for w in commands() if w[0] == "make"] + re.findall(r"`make ([a-z-]+)",
                                                                        (ROOT / "README.md").read_text(
                                                                            encoding="utf-8"))
    assert {"demo", "test", "docs"} <= set(targets)
    for t in set(targets): subprocess.run(["make", "-n", t], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.slow
def test_pip_accepts_what_is_installed():
    "`pip install .` and its extras: the names exist and the project is one that pip can read"
    installs = [w for w in commands() if w[0] == "pip"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert ["pip", "install", "."] in installs
    extras = set(re.findall(r"rcic_fastai\[(\w+)\]|\.\[(\w+)\]", text))
    for names in extras:
        assert (names[0] or names[1]) + "_requirements" in (ROOT / "settings.ini").read_text(encoding="utf-8")
    dry = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-build-isolation", "--no-index", "-q",
           str(ROOT)]
    subprocess.run(dry, check=True, capture_output=True)


@pytest.fixture(scope="module")
def home(small_screen, tmp_path_factory):
    "A folder with the data that the README speaks of"
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(small_screen, folder / "data" / "rcic")
    shutil.copy(small_screen / "truth.csv", folder / "truth.csv")
    mine, rng = folder / "data" / "mine", np.random.default_rng(0)
    mine.mkdir()
    for stain in ("DAPI", "ER", "AGP", "RNA", "Mito", "Golgi"):
        Image.fromarray(rng.integers(200, 4000, (64, 64)).astype(np.uint16)).save(mine / f"B02_{stain}.tif")
    table, = re.findall(r"^```\n(well,.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M | re.S)
    (mine / "wells.csv").write_text(table)
    return folder


@pytest.mark.slow
def test_commands_of_the_readme(home, monkeypatch, capsys):
    """In the order of the README, each with its own arguments, in this process, cells of reports too (test_report.py
    gives them a kernel)"""
    monkeypatch.chdir(home)
    monkeypatch.setattr("rcic_fastai.report.core.execute_notebook", execute_here)
    monkeypatch.setattr("rcic_fastai.report.core._most_wells", lambda *_: 24)  # what it is of large images
    ran = []
    for words in commands():
        if words[0] in ("make", "pip", "git", "cd"): continue
        # the last one counts
        extra = SMALLER.get(words[0], []) if "--laptop" not in words else ["--laptop", "1", *SMALLER[words[0]][2:]]
        status, out, err = in_process(monkeypatch, capsys, *words, *extra)
        assert status == 0, f"{' '.join(words)}: exit status {status}\n{out[-500:]}\n{err[-2000:]}"
        ran.append(words[0])
    assert {"rcic-demo", "rcic-describe", "rcic-show", "rcic-pack", "rcic-train", "rcic-predict", "rcic-submit",
            "rcic-score", "rcic-report",
            "rcic-kaggle", "rcic-hpa-simulate", "rcic-hpa-duplicates"} <= set(ran)
    picture = Image.open("B02.png")
    assert picture.width > 500 and len(np.unique(np.asarray(picture))) > 50
    submission = pd.read_csv("submission.csv")
    assert set(submission.id_code) == set(pd.read_csv("truth.csv").id_code)
    for page in ("runs/seresnext101/report.html", "runs/focal/report.html", "runs/demo/tiny/default/report.html"):
        assert "</html>" in Path(page).read_text(encoding="utf-8")
    assert Path("kernel/kernel-metadata.json").exists()


def test_commands_of_the_pages_have_these_options():
    "Commands in the shell blocks of guides and tutorials are parsed: a renamed option is found here"
    from importlib import import_module

    from rcic_fastai.cli.script import option_parser

    settings = (ROOT / "settings.ini").read_text(encoding="utf-8")
    made_by = dict(re.findall(r"^ +(rcic-[a-z-]+)=(\S+)$", settings, flags=re.M))
    found = 0
    for path in sorted((ROOT / "nbs").glob("[pt]*/*.ipynb")):
        text = "\n".join(c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown")
        shell = "".join(re.findall(r"^```sh\n(.*?)^```$", text, flags=re.M | re.S)).replace("\\\n", " ")
        for line in shell.splitlines():
            for command in re.findall(r"\brcic-[a-z-]+ [^;&|#]*", line):
                name, *words = shlex.split(command.replace("...", ""))
                module, function = made_by[name].split(":")
                if name == "rcic-kaggle" and len(words) and words[0] != "build": continue
                try: option_parser(getattr(import_module(module), function)).parse_args(words)
                except SystemExit: pytest.fail(f"{path.name}: {command}")
                found += 1
    assert found >= 30
