"""The main job on real files: cell types of the control wells, from random windows, through the command that trains
everything else."""

import re
import time

import pytest

from test_cli import in_process, run


@pytest.mark.slow
def test_cell_types_of_real_controls(real_rcic, tmp_path):
    "Plates 1-3 train, plate 4 is predicted, windows of 64 of 128 pixels: 4 of 4 wells right, in under 3 minutes."
    start = time.time()
    done = run("rcic-train", "--data", real_rcic, "--target", "cell_type", "--wells", "controls", "--present-only",
               "--valid", "plate=4",
               "--laptop", 8, "--set", "data.read_size=128", "--set", "data.epoch_sites=64", "--set", "data.crop=64",
               "--set", "data.batch_size=16",
               "--run", tmp_path / "run")
    assert "16 of 8,194 train sites have all their files; 8,178 were left out" in done.stdout
    assert re.search(r"Validation, plate=4: 4 of 4 wells right", done.stdout), done.stdout
    assert time.time() - start < 180


@pytest.mark.slow
def test_without_present_only_the_missing_file_is_an_error(real_rcic, tmp_path, monkeypatch, capsys):
    args = "--data", real_rcic, "--target", "cell_type", "--wells", "controls", "--run", tmp_path / "run"
    status, _, err = in_process(monkeypatch, capsys, "rcic-train", *args)
    assert status == 1 and re.search(r"error: \S+_w\d\.png does not exist", err) and err.count("\n") == 1
