"The report of the benchmark on several labels, from made-up results"

import argparse
import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    environment = dict(os.environ)
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmark_hpa", BENCHMARKS / "hpa.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(BENCHMARKS))
    sys.modules.pop("measure", None)
    os.environ.clear()
    os.environ.update(environment)


def result(seed, gain):
    "Scores of two classes: the reference has .2 and .4, the stack so much more"
    f1 = {"fixed": [0.1, 0.1], "plain": [0.2, 0.4], "stack_statistics": [0.2 + gain, 0.4 + gain]}
    f1 |= {f"thresholds: {m}": [0.2, 0.3] for m in ("f1", "repeated_f1")}
    nested = {m: [0.3, 0.2, 0.4, 0.5] for m in ("f1", "repeated_f1")}
    return dict(seed=seed, f1=f1, support=[5, 500], positives=[3, 300], floors={"all": 0.1}, nested=nested,
                near={"retrieval": dict(threshold=0.9, weight=0.5)}, prepared=30.0,
                seconds={"train focal": 60.0}, total=100.0, precision={"plain": 0.3}, adversarial={"brightness": 0.4})


def test_gains_are_counted_on_the_same_atlas(bench):
    table, macro = bench.differences([result(1, 0.1), result(2, -0.05), result(3, 0.25)])
    assert table.loc["plain", "gain"] == "+0.000 ± 0.000" and table.loc["plain", "macro-F1"] == "0.300 ± 0.000"
    assert table.loc["stack_statistics", "seeds ahead"] == "2 of 3"
    assert table.loc["stack_statistics", "gain"] == "+0.100 ± 0.150"
    assert macro.loc["stack_statistics"].tolist() == pytest.approx([0.4, 0.25, 0.55])


def test_classes_by_how_rare_they_are(bench):
    table = bench.by_support([result(1, 0.1), result(2, 0.3)], ["plain", "stack_statistics"])
    assert table.loc["0-5", "plain"] == pytest.approx(0.2)
    assert table.loc["0-5", "stack_statistics"] == pytest.approx(0.4)
    assert table.loc["60 or more", "plain"] == pytest.approx(0.4) and table.loc["0-5", "classes"] == 2
    assert np.isnan(table.loc["6-19", "plain"])


def test_report_names_what_was_measured(bench):
    text = bench.report([result(1, 0.1), result(2, 0.2)], argparse.Namespace(design=bench.DESIGN, epochs=bench.EPOCHS))
    assert "seed 1, seed 2" in text and "| one view, last weights, focal loss (reference) | 0.300 ± 0.000 |" in text
    assert "brightness 0.40" in text
    assert "| f1 | 0.500 | 0.300 | 0.250 ± 0.000 | -0.050 ± 0.000 | 0 of 2 |" in text
