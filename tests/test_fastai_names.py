"What a fastai user has imported stays what it was: `from rcic_fastai.all import *` replaces nothing, in either order."
import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cases import each

ROOT = Path(__file__).resolve().parents[1]
# what people import beside fastai; fastai.vision.all has some of it too
USUAL = """import os, re, sys, math, json, random, shutil, time, warnings
import numpy as np, pandas as pd, matplotlib.pyplot as plt
import torch, torchvision, timm, PIL, scipy, sklearn, fastai, fastcore
import torch.nn.functional as F
from torch import nn, optim, tensor, Tensor
from torch.utils.data import Dataset, DataLoader
from torchvision import transforms, models
from functools import partial
from collections import defaultdict, Counter
from pathlib import Path
from tqdm.auto import tqdm
from PIL import Image
from sklearn.metrics import *
from sklearn.model_selection import train_test_split, StratifiedKFold, GroupKFold, KFold
from fastcore.all import *
from fastai.vision.all import *
from fastai.vision.gan import *
from fastai.vision.widgets import *
from fastai.callback.all import *
from fastai.tabular.all import *
from fastai.text.all import *
"""
COMPARE = f"""
import sys, types
usual = {{}}
exec({USUAL!r}, usual)
import fastai.vision.all as fastai_all
usual.update((n, getattr(fastai_all, n)) for n in dir(fastai_all) if not n.startswith('__'))
foreign = ('fastai', 'fastcore', 'torch')
classes = {{c: dict(vars(c)) for c in usual.values()
           if isinstance(c, type) and (c.__module__ or '').startswith(foreign)}}
ours, after, before = {{}}, dict(usual), {{}}
exec('from rcic_fastai.all import *', ours)
exec('from rcic_fastai.all import *', after)
exec('from rcic_fastai.all import *', before)
exec({USUAL!r}, before)
ours.pop('__builtins__')
import builtins, json
print(json.dumps(dict(
    n=len(usual), classes=len(classes), ours=len(ours),
    slow=[m for m in ('nbformat', 'nbclient', 'nbconvert') if m in sys.modules],
    replaced=[n for n in usual if n != '__builtins__' and after[n] is not usual[n]],
    lost=[n for n in ours if before[n] is not ours[n]],
    builtins=[n for n in ours if hasattr(builtins, n)],
    modules=[n for n, o in ours.items() if isinstance(o, types.ModuleType)],
    patched=[f'{{c.__qualname__}}.{{k}}' for c, d in classes.items() for k, v in d.items()
             if not k.startswith('__') and vars(c).get(k) is not v])))
"""
RENAMED = {"data.augment": ["Brightness", "RandomCrop", "Warp"], "model.head": ["Body", "Head", "create_head"],
           "model.core": ["save_model"], "train.precision": ["ChannelsLast"],
           "train.metrics": ["accuracy"], "predict.tta": ["View"]}


@pytest.fixture(scope="module")
def found():
    "What the imports did, in a process of its own"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPARE], cwd=ROOT, text=True, capture_output=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_star_import_replaces_no_name_of_fastai_nor_of_what_people_import_beside_it(found):
    assert found["n"] > 1000 and 140 < found["ours"] < 220 and found["replaced"] == []


@pytest.mark.slow
def test_what_takes_long_to_import_waits_until_it_is_used(found):
    "jsonschema 4.26 compiles a grammar at its import where Jupyter is installed (rfc3987-syntax 1.1.0): two seconds"
    assert found["slow"] == []


@pytest.mark.slow
def test_nor_is_one_of_ours_replaced_where_fastai_comes_second(found):
    assert found["lost"] == []


@pytest.mark.slow
def test_it_brings_no_modules_and_hides_no_builtins(found):
    assert found["modules"] == [] and found["builtins"] == []


@pytest.mark.slow
def test_no_method_of_fastai_or_torch_is_replaced(found):
    assert found["classes"] > 300 and found["patched"] == []


def test_all_lists_public_names_by_the_rooms_and_hides_none_of_another_module():
    source = Path(importlib.import_module("rcic_fastai.all").__file__).read_text(encoding="utf-8")
    imports = [n for n in ast.parse(source).body if isinstance(n, ast.ImportFrom)]
    assert [n.module for n in imports] == list(dict.fromkeys(n.module for n in imports)), "a module is named twice"
    listed = {}
    for node in imports:
        names, module = [a.name for a in node.names], importlib.import_module(f"rcic_fastai.{node.module}")
        assert names == sorted(names, key=str.lower) and set(names) <= set(module.__all__), node.module
        assert not set(names) & set(listed), f"{set(names) & set(listed)} of {node.module} and of another module"
        listed |= {n: node.module for n in names}
    modules = {n: m for n, m in sys.modules.items() if n.startswith("rcic_fastai.") and n != "rcic_fastai.all"
               and not hasattr(m, "__path__")}
    ours = [n for n, m in modules.items()
            if "a module of version 0.1.0" not in Path(m.__file__).read_text(encoding="utf-8")]
    others = [(m, n) for m in ours for n in getattr(modules[m], "__all__", ()) if n in listed
              and m != f"rcic_fastai.{listed[n]}"]
    assert not others, f"two modules export the same name: {others}"


@each("module,old", [(m, n) for m, names in RENAMED.items() for n in names])
def test_a_name_of_the_release_before_is_found_in_its_module_alone(module, old):
    m = importlib.import_module(f"rcic_fastai.{module}")
    with pytest.warns(FutureWarning, match=rf"rcic_fastai\.{module}\.{old} is called \w+ now") as caught:
        exec(f"from rcic_fastai.{module} import {old} as old_name", there := {})
    new = str(caught[0].message).split(" is called ")[1].split()[0]
    assert there["old_name"] is getattr(m, new) and new in m.__all__ and old not in m.__all__
    assert not hasattr(importlib.import_module("rcic_fastai.all"), old)


def test_a_name_that_never_was_is_not_found():
    with pytest.raises(ImportError, match="cannot import name 'Tail' from 'rcic_fastai.model.core'"):
        exec("from rcic_fastai.model.core import Tail")
