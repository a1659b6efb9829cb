"A finished run meets the plates of next week: another folder, nothing said twice, nothing of the first written over."

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_cli import in_process

NAMES = ["vehicle", "taxol", "KIF11", "colchicine"]
STAINS = ["DAPI", "ER"]


def write_folder(root, day, known=True):
    "Images of two plates of 8 wells with spots whose size is the treatment, and a plate map"
    y, x = np.mgrid[:32, :32]
    rows = []
    for plate in ("P1", "P2"):
        (root / day / plate).mkdir(parents=True)
        for i, well in enumerate(("B02", "B03", "C02", "C03")):
            rng = np.random.default_rng([i, len(day), ord(day[-1]), ord(plate[-1])])
            dy, dx = rng.integers(0, 32, (2, 6))
            spots = np.exp(-((y[..., None] - dy) ** 2 + (x[..., None] - dx) ** 2) / (2 + 3 * i) ** 2).sum(-1)
            for k, stain in enumerate(STAINS):
                image = rng.normal(300 + 100 * k, 20, (32, 32)) + 3000 * spots
                Image.fromarray(image.clip(0, 65535).astype(np.uint16)).save(root / day / plate / f"{well}-{stain}.tif")
            rows.append((day, plate, well, NAMES[i] if known or not i else ""))
    return pd.DataFrame(rows, columns=["Day", "Barcode", "Position", "Compound"])


@pytest.fixture(scope="module")
def plates(tmp_path_factory):
    root = tmp_path_factory.mktemp("plates")
    first = pd.concat([write_folder(root / "first", day) for day in ("day1", "day2")])
    first.to_csv(root / "first/map.csv", index=False)
    write_folder(root / "next week", "day9", known=False).to_csv(root / "next week/other.csv", index=False)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("how", [["--recipe", "laptop", "--laptop", 2, "--set", "model.arch=resnet10t"],
                                 ["--epochs", 2]], ids=["head", "centres"])
def test_the_next_plates_by_command(plates, tmp_path, how, monkeypatch, capsys):
    "By the scores of the head, and by centres of the classes, which later plates do not have: the default"
    def command(*args):
        status, out, err = in_process(monkeypatch, capsys, *args)
        assert status == 0, err
        return out

    first, later, run, out = plates / "first", plates / "next week", tmp_path / "run", tmp_path / "answers"
    command("rcic-describe", "--data", first, "--column", "experiment=Day", "--column", "plate=Barcode", "--column",
            "well=Position", "--column", "treatment=Compound", "--negative", "vehicle")
    command("rcic-train", "--data", first, "--run", run, "--valid", "experiment=day2", *how)
    command("rcic-predict", "--run", run, "--split", "valid")
    before = {p: p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file() and not p.name.startswith(".")}
    monkeypatch.chdir(plates.parent)  # from another folder
    said = command("rcic-apply", "--run", run, "--data", later, "--out", out, "--no-report")
    assert "negative controls vehicle" in said and "columns experiment=Day" in said
    answers = pd.read_csv(out / "submission_wells.csv")
    assert len(answers) == 6 and set(answers.treatment) <= set(NAMES[1:])
    assert list(pd.read_csv(out / "submission.csv").columns) == ["id_code", "sirna", "treatment"]
    assert {p: p.read_bytes() for p in before} == before
    made = {p.relative_to(run) for p in run.rglob("*.npz")} - {p.relative_to(run) for p in before}
    assert made == {Path("predictions/answers/test.npz")}
    again = command("rcic-apply", "--run", run, "--data", later, "--out", out, "--no-report")
    assert f"{len(answers)} wells" in again
    pd.testing.assert_frame_equal(pd.read_csv(out / "submission_wells.csv"), answers)


@pytest.mark.slow
def test_known_wells_of_later_plates_do_not_limit_the_others(plates, tmp_path):
    "Centres are those of the training, whatever is known of the later plates; lost images are named"
    from rcic_fastai.predict.core import Predictions
    from rcic_fastai.recipe.default import default_recipe
    from rcic_fastai.recipe.published import change_recipe
    from rcic_fastai.report.apply import apply_run
    from rcic_fastai.run.train import train_run
    from rcic_fastai.screen.describe import describe_screen

    own, later, quiet = tmp_path / "own", tmp_path / "later", dict(say=lambda *a: None)
    shutil.copytree(plates / "first", own)
    shutil.copytree(plates / "next week", later)
    table = pd.read_csv(later / "other.csv", dtype=str)
    table.loc[table.index[1], "Compound"] = "taxol"
    table.to_csv(later / "other.csv", index=False)
    columns = dict(experiment="Day", plate="Barcode", well="Position", treatment="Compound")
    screen = describe_screen(own, columns=columns, negative=["vehicle"], **quiet)
    recipe = change_recipe(default_recipe(screen, full=False)[0], "train.epochs=2")
    train_run(screen, recipe, tmp_path / "run", valid="experiment=day2", **quiet)
    answers = apply_run(tmp_path / "run", later, tmp_path / "out", report=False, progress=False, **quiet)
    p = Predictions.load(tmp_path / "run/predictions/out/test.npz")
    assert len(answers) == 5 and len(p.classes) == 3
    own.rename(tmp_path / "archive")
    with pytest.raises(FileNotFoundError, match="own"):
        apply_run(tmp_path / "run", later, tmp_path / "out", report=False, progress=False, **quiet)


@pytest.mark.slow
def test_controls_among_the_classes_are_found_again(plates, tmp_path):
    "With wells='all' a control has a class centre like every other class"
    from rcic_fastai.recipe.default import default_recipe
    from rcic_fastai.recipe.published import change_recipe
    from rcic_fastai.run.predict import predict_run
    from rcic_fastai.run.train import train_run
    from rcic_fastai.screen.describe import describe_screen

    columns = dict(experiment="Day", plate="Barcode", well="Position", treatment="Compound")
    screen = describe_screen(plates / "first", columns=columns, negative=["vehicle"], out=tmp_path / "own",
                             say=lambda *a: None)
    recipe = change_recipe(default_recipe(screen)[0], "train.epochs=2")
    train_run(screen, recipe, tmp_path / "run", wells="all", valid="experiment=day2", say=lambda *a: None)
    p = predict_run(tmp_path / "run", screen, "valid", progress=False)
    assert recipe.inference.postprocess and len(p.classes) == 4
    assert (p.logits > -15).any(0).all()  # before, that of the control was -16 for every site
