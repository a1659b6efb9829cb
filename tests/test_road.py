"From a folder of a microscope to a report, by command: what is written down at the start is read at the end."

import formats_inputs
import numpy as np
import pandas as pd
import pytest
from formats_inputs import cellvoyager, harmony, jump, ome_zarr, write_csv
from test_cli import in_process
from test_report import execute_here

NAMES = ["DMSO", "taxol", "nocodazole"]
NETWORK = ["--set", 'model.arch_options={"channels": [8, 16, 32, 64], "stem_width": 8}', "--set", "inference.tta=2"]


def cells(well, field=1, channel=1, z=1, t=1):
    "Grey values (64, 64): spots whose size is that of a treatment, brighter in the plane in the middle"
    rng = np.random.default_rng([well, field, channel])
    y, x, dy, dx = *np.mgrid[:64, :64], *rng.integers(0, 64, (2, 12))
    size = 2 + 3 * (well % 3)
    spots = np.exp(-((y[..., None] - dy) ** 2 + (x[..., None] - dx) ** 2) / size**2).sum(-1)
    return (rng.normal(300, 20, (64, 64)) + 3000 * spots / (1 + abs(z - 2))).clip(0, 65535).astype(np.uint16)


@pytest.fixture
def larger(monkeypatch):
    "Two plates of 18 wells and 64 pixels, three treatments"
    monkeypatch.setattr(formats_inputs, "WELLS", {f"{r}{c:02}": 1 for r in "ABC" for c in range(1, 7)})
    monkeypatch.setattr(formats_inputs, "TREATMENTS", NAMES * 6)
    monkeypatch.setattr(formats_inputs, "plane", cells)


def with_doses(root):
    table = pd.read_csv(root / "wells.csv", dtype=str)
    write_csv(root / "wells.csv", table.assign(dose=[f"{i % 5} uM" for i in range(len(table))]))


ROADS = {"harmony": (harmony, NAMES),
         "cellvoyager": (lambda root: cellvoyager(root, ("Greiner_#1", "Greiner_#2")), NAMES),
         "jump": (jump, ["DMSO", "CYT-997", "gabapentin-enacarbil"]),
         "ome-zarr": (lambda root: ome_zarr(root, "0.5", ("P1", "P2")), NAMES)}


@pytest.mark.slow
@pytest.mark.parametrize("system", ROADS)
def test_from_a_microscope_to_a_report(system, larger, tmp_path, monkeypatch, capsys):
    if system == "ome-zarr": pytest.importorskip("zarr", reason="zarr writes the example")
    write, names = ROADS[system]
    own, packed, run = tmp_path / "own", tmp_path / "packed", tmp_path / "run"
    write(own)
    if system != "jump": with_doses(own)

    def command(*args):
        status, out, err = in_process(monkeypatch, capsys, *args)
        assert status == 0, err
        return out

    said = command("rcic-describe", "--data", own)
    assert f"({dict(jump='harmony').get(system, system)}): " in said and "36 sites of 36 wells" in said
    command("rcic-show", "--data", own, "--well", "B02", "--out", tmp_path / "well.png")
    command("rcic-pack", "--data", own, "--out", packed)
    deep = tmp_path / "deep"
    said = command("rcic-pack", "--data", own, "--out", deep, "--bits", 16, "--verify")
    assert "of 16 bits" in said and f"36 sites are as they were packed, compared with {own}" in said
    said = command("rcic-train", "--data", packed, "--laptop", 4, "--wells", "all", "--valid", "plate=2", "--run", run,
                   *NETWORK)
    assert "Validation, plate=2" in said
    command("rcic-embed", "--run", run, "--split", "valid", "--out", tmp_path / "valid.npz")
    monkeypatch.setattr("rcic_fastai.report.core.execute_notebook", execute_here)  # test_report.py gives cells a kernel
    command("rcic-report", run)
    if system == "harmony":  # grey limits make 0-255 of it on the device
        command("rcic-embed", "--run", run, "--split", "valid", "--data", deep, "--out", tmp_path / "deep.npz")
    page = (run / "report.html").read_text()
    for name in names: assert name in page
    kept = np.load(tmp_path / "valid.npz", allow_pickle=False)
    assert set(kept["treatment"]) == set(names)
    if system == "harmony":  # but for their rounding
        x, y = (e - e.mean(0) for e in (np.load(tmp_path / "deep.npz", allow_pickle=False)["x"], kept["x"]))
        assert np.corrcoef(x.ravel(), y.ravel())[0, 1] > .98
    if system != "jump": assert set(kept["dose"]) == {f"{i} uM" for i in range(5)}
