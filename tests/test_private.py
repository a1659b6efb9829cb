"""What the library uses of other libraries without a public name: each part is there, and each is written down in
one notebook."""
import ast
import importlib
import inspect
import re
import warnings
from pathlib import Path

import pytest

from rcic_fastai.private import PRIVATE_PARTS, has_part

PACKAGE = Path(__file__).parents[1] / "rcic_fastai"
FOREIGN = ("fastai", "fastcore", "fasttransform", "torch", "timm", "lightgbm", "matplotlib", "filelock")
# of Python itself: documented in spite of their names
DOCUMENTED = {"_asdict", "_replace", "_fields", "_exit", "_getframe"}

def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if not path.stem.startswith("_") and "a module of version 0.1.0" not in source:
            yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), ast.parse(source)


def private(name):
    return name.startswith("_") and not name.startswith("__")


def ours():
    "Private names that the package defines: functions, classes, variables and attributes"
    found = set()
    for _, tree in modules():
        for n in ast.walk(tree):
            if isinstance(n, ast.FunctionDef | ast.ClassDef): found.add(n.name)
            elif isinstance(n, ast.Name | ast.Attribute) and isinstance(n.ctx, ast.Store):
                found.add(n.id if isinstance(n, ast.Name) else n.attr)
            elif isinstance(n, ast.arg): found.add(n.arg)
    return found


def used():
    "Module and private attribute of every use that is not of ours"
    known = ours() | DOCUMENTED
    for name, tree in modules():
        if name == "private": continue
        yield from ((name, n.attr) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and private(n.attr)
                    and n.attr not in known)
        for n in ast.walk(tree):
            if isinstance(n, ast.ImportFrom) and not n.level and n.module.split(".")[0] in FOREIGN:
                yield from ((name, a.name) for a in n.names if private(a.name))


def overridden():
    "Class of another library and private method, for each that a class of ours overrides"
    warnings.simplefilter("ignore")
    for name, _ in modules():
        for o in vars(importlib.import_module(f"rcic_fastai.{name}")).values():
            if not inspect.isclass(o) or not o.__module__.startswith("rcic_fastai."): continue
            for base in o.__mro__[1:]:
                if base.__module__.split(".")[0] not in FOREIGN: continue
                yield from (f"{base.__module__}.{base.__name__}.{n}" for n in vars(o) if private(n) and n in vars(base)
                            and inspect.isfunction(vars(base)[n]))


@pytest.mark.parametrize("name", PRIVATE_PARTS)
def test_a_private_part_is_there(name):
    if (library := name.partition(".")[0]) in ("lightgbm", "zarr"):
        pytest.importorskip(library, reason=f"{library} belongs to an extra that is not installed")
    assert has_part(name)


@pytest.mark.slow
def test_what_is_used_is_written_down():
    written = {n.rpartition(".")[2] for n in PRIVATE_PARTS} | {"_ConfigAliases"}
    left = {(m, n) for m, n in used() if n.replace("_DataLoader__", "__") not in written}
    assert not left, f"no public names, and neither in nbs/05_private.ipynb: {sorted(left)}"


@pytest.mark.slow
def test_what_is_overridden_is_written_down():
    assert set(overridden()) <= set(PRIVATE_PARTS)


@pytest.mark.slow
def test_what_is_written_down_is_used():
    source = "\n".join(ast.unparse(t) for n, t in modules() if n != "private")
    for name in PRIVATE_PARTS: assert re.search(rf"{name.rpartition('.')[2]}\b", source), name
