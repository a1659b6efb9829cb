"The annotations: mypy agrees with them, notices wrong uses of the library, and none of the public ones is missing."

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = [p for p in (ROOT / "rcic_fastai").rglob("*.py") if p.stem != "all" and not p.stem.startswith("_")
           and "a module of version 0.1.0" not in p.read_text(encoding="utf-8")]
# what they override says what they take
PARAMETERS_OF_FASTAI = {"DomainDL.show_batch", "DomainDL.show_results", "MultiChannelImage.show"}
ROWS_OF_TABLES = {("simulate_site", "well"), ("simulate_picture", "row")}  # of `itertuples`, which have no type

# right and wrong uses; the comment is what mypy has to say about the line
USES = """\
import numpy as np
from rcic_fastai.all import *
from rcic_fastai.screen.folds import grouped_folds
from rcic_fastai.train.mix import create_mix

labels = assign_classes([[.1, .9], [.8, .2]], allowed=None)
assign_classes({'B03': 1})  # arg-type
labels.most_common()  # attr-defined
create_mix(3)  # arg-type
packed = open_store('packed')
open_store(3)  # arg-type
packed.read_batchh([0])  # attr-defined
f1: str = macro_f1(np.eye(2), np.eye(2))  # assignment
grouped_folds(np.eye(4), groups=['a', 'a', 'b', 'c'], folds=2)  # call-arg
"""


@pytest.mark.slow
def test_mypy_finds_nothing_in_the_package_and_every_wrong_use(tmp_path):
    """One run for both: reading torch and numpy takes most of its time; mypy keeps what it read, and looks whether
    that is still so"""
    pytest.importorskip("mypy", reason="mypy is one of the development requirements")
    uses = tmp_path / "uses.py"
    uses.write_text(USES)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--cache-dir",
               str(ROOT / ".mypy_cache"), "--no-pretty", "rcic_fastai", str(uses)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MYPY")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    own = [e for e in errors if e.startswith("rcic_fastai")]
    assert not own, "\n".join(own)
    found = {int(e.split("uses.py:")[1].split(":")[0]): e.rsplit("[", 1)[1].rstrip("]") for e in errors}
    assert found == {i: line.split("  # ")[1] for i, line in enumerate(USES.splitlines(), 1)
                     if "  # " in line}, done.stdout


def inside(node):
    "What a function consists of, without the functions within it"
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield child
            yield from inside(child)


def gives_something(f):
    return any(isinstance(n, ast.Yield | ast.YieldFrom) or isinstance(n, ast.Return) and n.value is not None
               for n in inside(f))


def public_functions(tree):
    "Functions of `__all__`, and of its classes the constructors and the methods that are documented, by name"
    public = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)
                  and n.targets[0].id == "__all__")
    for node in tree.body:
        if getattr(node, "name", None) not in public:
            continue
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        for f in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(f, ast.FunctionDef) and (f.name == "__init__" or not f.name.startswith("_")
                                                   and ast.get_docstring(f)):
                yield f"{node.name}.{f.name}", f


def missing_annotations(source):
    "`function: parameter`, or `function: return` where one returns something"
    for name, f in public_functions(ast.parse(source)):
        if name in PARAMETERS_OF_FASTAI:
            continue
        for a in f.args.posonlyargs + f.args.args + f.args.kwonlyargs:
            if a.annotation is None and a.arg not in ("self", "cls") and (name, a.arg) not in ROWS_OF_TABLES:
                yield f"{name}: {a.arg}"
        command = any(getattr(d, "id", "") in ("call_parse", "command") for d in f.decorator_list)
        if f.returns is None and gives_something(f) and not command:
            yield f"{name}: return"


def test_public_parameters_and_results_are_annotated():
    missing = {p.stem: list(missing_annotations(p.read_text(encoding="utf-8"))) for p in MODULES}
    assert {module: names for module, names in missing.items() if names} == {}


def test_a_missing_annotation_is_noticed():
    source = """
__all__ = ['f', 'C', 'rcic_go']
def f(x, y:int=1): return lambda: x
def _private(x): return x
@call_parse
def rcic_go(x:int=1): return print(x)
class C:
    def __init__(self, a): self.a = a
    def fit(self, x:int): "Documented."; return self
    def after_batch(self, x): return x
    def look(self): "Prints." ; print(self.a)
"""
    assert list(missing_annotations(source)) == ["f: x", "f: return", "C.__init__: a", "C.fit: return"]
