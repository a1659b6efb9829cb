"Simulated screens: the same bytes however they are written, a layout the readers accept, images near the real ones."

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cases import each
from PIL import Image
from tqdm import tqdm

import rcic_fastai.screen.simulate as simulate
from rcic_fastai.screen.groups import plate_groups, plate_rotations
from rcic_fastai.screen.sites import check_files
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.cameras import other_intensity, plate_camera, real_intensity
from rcic_fastai.screen.morphology import Morphology, cell_centres, changed_morphology, draw_cells, named_rng
from rcic_fastai.screen.morphology import sirna_morphology
from rcic_fastai.screen.simulate import Simulation, design_screen, simulate_screen, simulate_site

REAL = Path(__file__).parents[1].parent / "shared" / "rcic"
SMALL = dict(n_sirnas=8, n_positive=1, n_train=2, n_test=1, cell_types=("HUVEC", "RPE"), image_size=24, seed=3,
             workers=1, progress=False)
TABLES = {"train.csv", "train_controls.csv", "test.csv", "test_controls.csv", "sample_submission.csv", "truth.csv",
          "simulation.json"}


def contents(path):
    "Bytes of every file below `path`, by name"
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return simulate_screen(tmp_path_factory.mktemp("small"), **SMALL)


@pytest.fixture(scope="module")
def small_bytes(small):
    return contents(small)


def well_row(experiment, plate=1, well="B02", sirna=None, split="train"):
    "A well as `simulate_site` takes it; without a siRNA it is the negative control"
    kind = "negative_control" if sirna is None else "treatment"
    return pd.Series(
        dict(
            id_code=f"{experiment}_{plate}_{well}",
            split=split,
            cell_type=experiment.split("-")[0],
            experiment=experiment,
            plate=plate,
            well=well,
            well_type=kind,
            sirna=99 if sirna is None else sirna,
        )
    )


# the same bytes


@pytest.mark.slow
def test_two_processes_write_what_one_writes(small_bytes, tmp_path):
    assert contents(simulate_screen(tmp_path, **{**SMALL, "workers": 2})) == small_bytes


def test_more_workers_than_work_and_none(tmp_path):
    one = dict(SMALL, n_sirnas=1, n_plates=1, n_train=1, n_test=0, cell_types="RPE", image_size=16)
    files = [contents(simulate_screen(tmp_path / str(n), **{**one, "workers": n})) for n in (0, 9)]
    assert files[0] == files[1] and len(files[0]) > 3


@pytest.mark.slow
def test_what_is_missing_is_written_again_and_nothing_else(small, small_bytes):
    lost_plate = small / "train/HUVEC-01/Plate3"
    lost_file = small / "test/RPE-03/Plate1/B02_s2_w4.png"
    kept = small / "train/RPE-02/Plate2/B02_s1_w1.png"
    shutil.rmtree(lost_plate)
    lost_file.unlink()
    (small / "truth.csv").unlink()
    before = kept.stat().st_mtime_ns
    simulate_screen(small, **SMALL)
    assert contents(small) == small_bytes
    assert kept.stat().st_mtime_ns == before


def test_any_order(small, small_bytes):
    wells = read_screen(small).wells.merge(pd.read_csv(small / "truth.csv"), on="id_code", how="left",
                                           suffixes=("", "_true"))
    wells["sirna"] = wells.sirna.fillna(wells.sirna_true).astype(int)
    sim = Simulation(**{k: v for k, v in json.loads((small / "simulation.json").read_text()).items()
                        if k in Simulation.__dataclass_fields__})
    for well in wells.sample(5, random_state=0).itertuples():
        for site in (2, 1):
            x = simulate_site(sim, well, site)
            assert x.dtype == np.uint8 and x.shape == (6, 24, 24)
            for c in range(6):
                file = small / well.split / well.experiment / f"Plate{well.plate}" / f"{well.well}_s{site}_w{c + 1}.png"
                np.testing.assert_array_equal(x[c], np.asarray(Image.open(file)))


@pytest.mark.slow
def test_more_experiments_leave_the_images_of_the_others_alone(small_bytes, tmp_path):
    longer = contents(simulate_screen(tmp_path, **{**SMALL, "n_train": 3, "n_test": 0, "cell_types": "HUVEC"}))
    first = [f for f in small_bytes if f.startswith(("train/HUVEC-01", "train/HUVEC-02"))]
    assert len(first) > 100 and all(longer[f] == small_bytes[f] for f in first)


def test_every_site_has_cells_of_its_own():
    sim = Simulation(image_size=24, cell_radius=3, batch_effect=0)
    wells = [("RPE-01", 1, "B02"), ("RPE-01", 2, "B02"), ("RPE-02", 1, "B02"), ("RPE-01", 1, "B03")]
    x = [simulate_site(sim, well_row(*w), site)[0].astype(float).ravel() for w in wells for site in (1, 2)]
    alike = np.corrcoef(x) - np.eye(len(x))
    assert np.abs(alike).max() < 0.5


def test_another_seed_is_another_screen(small_bytes, tmp_path):
    other = contents(simulate_screen(tmp_path,
                                     **{**SMALL, "seed": 4, "n_train": 1, "n_test": 0, "cell_types": "HUVEC"}))
    same = [f for f in other if f.endswith("B02_s1_w1.png") and other[f] == small_bytes[f]]
    assert not same and "train/HUVEC-01/Plate1/B02_s1_w1.png" in other


def test_an_interrupted_write_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    folder, save, n = tmp_path / "screen", Image.Image.save, 0

    def save_half(self, path, *args, **kwargs):
        nonlocal n
        n += 1
        save(self, path, *args, **kwargs)
        if n == 15:
            Path(path).write_bytes(Path(path).read_bytes()[:40])
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", save_half)
    with pytest.raises(KeyboardInterrupt):
        simulate_screen(folder, **SMALL)
    monkeypatch.undo()
    images = list(folder.rglob("*png*"))
    assert len(images) == 14 and all(p.suffix == ".png" for p in images)
    for p in images:
        assert np.asarray(Image.open(p)).shape == (24, 24)
    assert {p.name for p in folder.iterdir()} == TABLES | {"train"}  # the tables come first


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_ends_every_process_and_the_screen_can_be_completed(tmp_path):
    settings = dict(SMALL, n_positive=3, n_train=20, image_size=64, workers=2)
    # a shell's background job ignores it
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += (f"from rcic_fastai.screen.simulate import simulate_screen; simulate_screen({str(tmp_path)!r}, "
             f"**{settings!r})")
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while process.poll() is None and sum(1 for _ in tmp_path.rglob("*.png")) < 30 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of the group
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and error.rstrip().endswith("KeyboardInterrupt")
    assert error.count("Traceback") == 1  # the workers are silent
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody is left
    images = list(tmp_path.rglob("*.png*"))
    assert 30 <= len(images) < 20 * 4 * 2 * 12
    assert all(p.suffix == ".png" and not p.name.startswith(".") for p in images)
    for p in images:
        Image.open(p).load()


# what the readers accept


def test_the_reader_of_the_real_screen_takes_it(small):
    screen = read_screen(small)  # with all checks
    assert screen.layout == "kaggle" and {p.name for p in small.iterdir()} == TABLES | {"train", "test"}
    check_files(screen.sites())
    assert len(screen.sites()) == 2 * len(screen.wells)
    assert screen.experiments == [f"{c}-0{i}" for c in ("HUVEC", "RPE") for i in (1, 2, 3)]
    assert set(screen.wells[screen.wells.split == "test"].experiment) == {"HUVEC-03", "RPE-03"}


def test_the_tables_have_the_columns_of_the_real_ones_and_the_truth_is_apart(small):
    columns = {name: list(pd.read_csv(small / f"{name}.csv"))
               for name in ("train", "test", "train_controls", "test_controls")}
    well = ["id_code", "experiment", "plate", "well"]
    assert columns == dict(train=[*well, "sirna"], test=well, train_controls=[*well, "sirna", "well_type"],
                           test_controls=[*well, "sirna", "well_type"])
    test, truth, sample = (pd.read_csv(small / f"{n}.csv") for n in ("test", "truth", "sample_submission"))
    assert list(test.id_code) == list(truth.id_code) == list(sample.id_code)
    assert list(truth) == list(sample) == ["id_code", "sirna"]
    assert set(truth.sirna) <= set(range(8)) and (sample.sirna == 0).all() and truth.sirna.nunique() > 4
    groups = plate_groups(read_screen(small).wells)
    plates = test.assign(group=truth.sirna.map(groups)).groupby(["experiment", "plate"]).group.nunique()
    assert (plates == 1).all() and len(plates) == 8  # the truth keeps to the plate groups of training


def test_no_test_experiment(tmp_path):
    path = simulate_screen(tmp_path, **{**SMALL, "n_test": 0, "n_train": 1})
    screen = read_screen(path)
    assert set(screen.wells.split) == {"train"}
    assert {p.name for p in path.iterdir()} == {"train.csv", "train_controls.csv", "simulation.json", "train"}


@pytest.mark.slow
@pytest.mark.parametrize("n_plates", [1, 2, 3])
def test_fewer_plates(n_plates, tmp_path):
    path = simulate_screen(tmp_path, **{**SMALL, "n_plates": n_plates, "n_sirnas": 6, "cell_types": "U2OS",
                                        "image_size": 16})
    screen = read_screen(path)
    check_files(screen.sites())
    assert set(screen.wells.plate) == set(range(1, n_plates + 1)) and plate_groups(screen.wells).nunique() == n_plates


@each("size", [16, 37, 48, 100])
def test_any_image_size(size):
    x = simulate_site(Simulation(image_size=size, cell_radius=min(size / 8, 26)), well_row("HUVEC-01", sirna=4), 1)
    assert x.shape == (6, size, size) and all(x[c].std() > 0.5 for c in range(6))


def test_one_channel_file_is_8_bit_grey(small):
    with Image.open(small / "train/HUVEC-01/Plate1/B02_s1_w1.png") as im:
        assert (im.mode, im.size, im.format) == ("L", (24, 24), "PNG")


def test_progress_counts_the_sites(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    # as on a terminal
    monkeypatch.setattr("rcic_fastai.screen.simulate.tqdm",
                        lambda **kwargs: tqdm(**{**kwargs, "disable": bool(kwargs["disable"])}))
    simulate_screen(tmp_path, **{**SMALL, "n_train": 1, "n_test": 0, "cell_types": "RPE", "image_size": 16,
                                 "progress": True})
    n = len(read_screen(tmp_path).sites())
    assert f"{n}/{n}" in capsys.readouterr().err


# where every siRNA is


def treatments(wells):
    return wells[wells.well_type == "treatment"]


@pytest.mark.parametrize("settings",
                         [dict(), dict(n_sirnas=13, n_train=1, n_test=1),
                          dict(n_sirnas=1108, n_train=3, cell_types=("HEPG2",))])
def test_design_of_the_plates(settings):
    wells = design_screen(**settings)
    n, t = settings.get("n_sirnas", 48), treatments(wells)
    n_positive = min(max(n // 8, 3), 30)
    assert wells.id_code.is_unique
    assert (wells.id_code == wells.experiment + "_" + wells.plate.astype(str) + "_" + wells.well).all()
    assert set(wells.well) <= {f"{r}{c:02}" for r in "BCDEFGHIJKLMNO" for c in range(2, 24)}  # the outer ring is empty
    assert not t.duplicated(["experiment", "sirna"]).any() and set(t.sirna) == set(range(n))
    plates = wells.groupby(["experiment", "plate"])
    positive = wells[wells.well_type == "positive_control"]
    assert (positive.groupby(["experiment", "plate"]).sirna.agg(set) == set(range(n, n + n_positive))).all()
    assert set(positive.well) <= {f"{r}{c:02}" for r in "CFHJM" for c in (3, 7, 11, 15, 19, 22)}
    negative = wells[wells.well_type == "negative_control"]
    assert set(negative.sirna) == {n + n_positive} and (plates.apply(lambda p: (p.well == "B02").sum()) == 1).all()
    assert (wells[wells.well == "B02"].well_type == "negative_control").all()
    known = plate_groups(t)
    assert known.groupby(known).size().max() - known.groupby(known).size().min() <= 1 and known.nunique() == 4
    of_plate = t.assign(group=t.sirna.map(known)).groupby(["experiment", "plate"]).group.nunique()
    assert (of_plate == 1).all()


@pytest.mark.skipif(not (REAL / "train_controls.csv").is_file(), reason="the real tables are not in ../shared/rcic")
def test_controls_are_where_the_real_ones_are():
    real = pd.read_csv(REAL / "train_controls.csv")
    ours = design_screen(1108, 2, 1)
    grids = [set(w[w.well_type == "positive_control"].well) for w in (real, ours)]
    assert grids[0] == grids[1] and len(grids[1]) == 30
    real = pd.read_csv(REAL / "train.csv")
    assert set(treatments(ours).well) == set(real.well)


@pytest.mark.slow
@each("seed", range(3))
@each("n_types", [1, 2, 4])
@each("n_test", [1, 2, 3])
def test_one_rotation_occurs_in_test_only(seed, n_types, n_test):
    wells = design_screen(n_sirnas=16, n_train=4, n_test=n_test, cell_types=["HEPG2", "HUVEC", "RPE", "U2OS"][:n_types],
                          seed=seed)
    plates = plate_rotations(wells, plate_groups(wells)).apply(tuple, axis=1)
    split = wells.drop_duplicates("experiment").set_index("experiment").split
    train, test = (set(plates[plates.index.map(split) == s]) for s in ("train", "test"))
    assert len(test - train) >= 1
    turns = {tuple((np.arange(4) + k) % 4 + 1) for k in range(4)}
    # groups in the order of the plates of one experiment
    named = [tuple(np.array(p)[np.argsort(sorted(plates)[0])]) for p in train | test]
    assert set(named) <= turns


def test_some_plates_lost_wells_but_every_sirna_is_seen_in_each_cell_type():
    for seed in range(3):
        wells = design_screen(n_sirnas=1108, n_train=8, n_test=2, cell_types=("HUVEC",), seed=seed)
        sizes = treatments(wells).groupby(["experiment", "plate"]).size()
        assert 272 <= sizes.min() < 277 and sizes.max() == 277
        assert 0.05 < (sizes < 277).mean() < 0.4
        assert (sizes.loc["HUVEC-01"] == 277).all()
        # another negative control only where a well was lost
        assert wells.groupby(["experiment", "plate"]).size().max() == 308
    few = design_screen(n_sirnas=8, n_train=1, n_test=4, missing=1.0, cell_types=("HUVEC", "RPE"))
    assert (treatments(few[few.split == "train"]).groupby("cell_type").sirna.nunique() == 8).all()
    assert (treatments(few[few.split == "test"]).groupby(["experiment", "plate"]).size() == 1).all()
    assert len(treatments(design_screen(n_sirnas=8, missing=0))) == 8 * 16


def test_more_than_99_experiments():
    wells = design_screen(n_sirnas=1, n_plates=1, n_train=100, n_test=1, cell_types="HUVEC")
    assert {"HUVEC-01", "HUVEC-99", "HUVEC-101"} <= set(wells.experiment) and wells.experiment.nunique() == 101
    assert set(wells[wells.split == "test"].experiment) == {"HUVEC-101"}


def test_1108_sirnas_take_seconds():
    start = time.process_time()
    wells = design_screen(1108, 33, 18, ("HUVEC",))
    assert time.process_time() - start < 10 and len(wells) > 51 * 4 * 300


# errors


@each(
    "settings, message",
    [
        (dict(n_sirnas=1109), "n_sirnas is 1109; 4 plates hold 4 to 1,108 treatments"),
        (dict(n_sirnas=3), "n_sirnas is 3; 4 plates hold 4 to 1,108"),
        (dict(n_positive=31), "n_positive is 31; a plate has 30 wells"),
        (dict(n_positive=-1), "n_positive is -1"),
        (dict(n_train=0), "n_train is 0 and n_test is 2, expected at least 1 training"),
        (dict(n_test=-1), "n_test is -1"),
        (dict(n_plates=5, n_sirnas=50), "n_plates is 5, expected 1 to 4"),
        (dict(n_plates=0), "n_plates is 0"),
        (dict(cell_types=()), "expected one name or more"),
        (dict(cell_types=("RPE", "RPE")), "expected one name or more, each once"),
        (dict(cell_types=("my cells",)), "cell type 'my cells' is no name such as HUVEC"),
        (dict(cell_types=("a/b",)), "cell type 'a/b' is no name"),
        (dict(image_size=8), "image_size is 8, expected at least 16 pixels"),
        (dict(cell_radius=0.5), "cell_radius is 0.5, expected at least 2"),
        (dict(n_sites=3), "n_sites is 3, expected 1 or 2"),
        (dict(effect=-1), "effect is -1, expected 0 or more"),
        (dict(batch_effect=float("nan")), "batch_effect is nan"),
    ],
)
def test_settings_that_cannot_be(settings, message, tmp_path):
    folder = tmp_path / "screen"
    with pytest.raises(ValueError) as error:
        simulate_screen(folder, progress=False, workers=1, **settings)
    assert message in str(error.value) and not folder.exists()


def test_a_folder_with_another_screen_is_refused_and_left_alone(small, small_bytes, tmp_path):
    with pytest.raises(ValueError,
                       match=r"other settings \(seed is 3 there, 5 now; effect is 0.5 there, 0.7 now\); give another "
                       r"folder"):
        simulate_screen(small, **{**SMALL, "seed": 5, "effect": 0.7})
    assert contents(small) == small_bytes
    (tmp_path / "train.csv").write_text("id_code\n")
    with pytest.raises(FileExistsError, match="holds train.csv, and no simulated screen"):
        simulate_screen(tmp_path, **SMALL)
    assert contents(tmp_path) == {"train.csv": b"id_code\n"}


def test_the_settings_are_beside_the_screen(small):
    settings = json.loads((small / "simulation.json").read_text())
    assert settings["n_sirnas"] == 8 and settings["cell_types"] == ["HUVEC", "RPE"] and settings["cell_radius"] == 3
    # the same settings in other types
    simulate_screen(small, **{**SMALL, "seed": np.int64(3), "cell_types": ["HUVEC", "RPE"]})


def test_numpy_settings(tmp_path):
    one = dict(SMALL, n_sirnas=1, n_plates=1, n_train=1, n_test=0, cell_types="RPE", image_size=16, seed=np.int64(2),
               effect=np.float64(0.5))
    simulate_screen(tmp_path, **one)
    assert json.loads((tmp_path / "simulation.json").read_text())["seed"] == 2


# the images


def test_named_rng_depends_on_seed_and_every_part_of_the_name():
    draws = [named_rng(*name).random() for name in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a"),
                                                    (0, "a", 1, 1)]]
    assert len(set(draws)) == 6 and named_rng(0, "a", 1).random() == draws[0]


def test_cells_keep_their_distance():
    centres = cell_centres(named_rng(0, "x"), 128, 12)
    distance = np.sqrt(((centres[:, None] - centres[None]) ** 2).sum(-1)) + 1e9 * np.eye(len(centres))
    random = named_rng(0, "y").uniform(centres.min(), centres.max(), centres.shape)
    apart = np.sqrt(((random[:, None] - random[None]) ** 2).sum(-1)) + 1e9 * np.eye(len(centres))
    assert np.median(distance.min(1)) > 1.4 * np.median(apart.min(1))
    assert centres.min() < 0 and centres.max() > 128  # cells are cut by the border
    assert len(cell_centres(named_rng(0, "x"), 128, 12, crowding=2)) == pytest.approx(2 * len(centres), abs=1)


def test_parameters_of_a_cell_show_where_they_should():
    "A change of one organelle changes its channel more than the nucleus"
    base = Morphology()
    draw = lambda m: draw_cells(named_rng(0, "field"), 96, 14, m)
    plain = draw(base)
    for name, channel in dict(er_extent=1, actin_period=2, nucleolus_size=3, mito_scale=4, golgi_size=5).items():
        changed = draw(Morphology(**{name: 1.6 * getattr(base, name)}))
        difference = np.abs(changed - plain).mean((1, 2)) / plain.std((1, 2))
        assert difference[channel] > 0.05 and difference[0] < 0.01, name
    larger = draw(Morphology(nucleus_size=1.4 * base.nucleus_size))
    assert (larger[0] > 0.5).mean() > 1.4 * (plain[0] > 0.5).mean()
    assert plain.shape == (6, 96, 96) and plain.dtype == np.float32 and np.isfinite(plain).all() and plain.min() >= 0


def test_a_phenotype_of_size_zero_is_no_phenotype():
    wild = sirna_morphology(0, "RPE", None)
    assert sirna_morphology(0, "RPE", 5, effect=0) == wild != sirna_morphology(0, "RPE", 5)
    assert changed_morphology(wild, named_rng(0, "z"), 0) == wild
    change = lambda cell_type: np.log(sirna_morphology(0, cell_type,
                                                       5).nucleoli / sirna_morphology(0, cell_type, None).nucleoli)
    # much the same in each cell type
    assert change("RPE") != change("HUVEC") and abs(change("RPE") - change("HUVEC")) < 0.5


def test_the_batch_effect_is_between_experiments_and_little_between_plates():
    sim = Simulation(image_size=32, cell_radius=4)
    # (10, 3, 6)
    mean = np.array([[simulate_site(sim, well_row(f"HUVEC-{e:02}", p), 1).mean((1, 2)) for p in (1, 2, 3)]
                     for e in range(1, 11)])
    of_experiment = np.log(mean.mean(1))
    factor = np.exp(np.ptp(of_experiment, 0))
    assert (factor > 2.5).all() and np.median(factor) > 4
    between, within = of_experiment.std(0), np.log(mean).std(1).mean(0)
    assert (within < 0.35 * between).all() and (within > 0.005).all()
    still = Simulation(image_size=32, cell_radius=4, batch_effect=0)
    mean = np.array([simulate_site(still, well_row(f"HUVEC-{e:02}"), 1).mean((1, 2)) for e in range(1, 9)])
    assert (np.log(mean).std(0) < 0.25 * between).all()


def test_cameras_differ_in_more_than_gain():
    cameras = [plate_camera(0, f"RPE-{e:02}", 1) for e in range(1, 9)]
    for k in ("gain", "offset", "power", "blur", "light"):
        assert (np.std([getattr(c, k) for c in cameras], 0) > 0.01).all(), k
    assert np.std([c.crowding for c in cameras]) > 0.03
    assert plate_camera(0, "RPE-01", 1, plate_effect=0) == plate_camera(0, "RPE-01", 2, plate_effect=0) != plate_camera(
        0, "RPE-02", 1, plate_effect=0)


def features(x):
    "Size of the grain in each channel of a site, blind to its brightness: spectrum in five rings, and skewness"
    x = x.astype(np.float64)
    z = (x - x.mean((1, 2), keepdims=True)) / (x.std((1, 2), keepdims=True) + 1e-6)
    power = np.abs(np.fft.fft2(z)) ** 2
    f = np.fft.fftfreq(x.shape[-1])
    ring = np.digitize(np.hypot(*np.meshgrid(f, f)), [0.03, 0.07, 0.12, 0.2])
    return np.concatenate([*(np.log(power[:, ring == r].mean(1) + 1e-6) for r in range(5)), (z**3).mean((1, 2))])


def nearest_centroid_accuracy(effect, n_sirnas=8):
    "siRNAs of one experiment: centroids from five wells each, tested on three others"
    sim = Simulation(image_size=48, cell_radius=6, effect=effect)
    wells = [f"D{c:02}" for c in range(2, 10)]
    x = np.array([[features(simulate_site(sim, well_row("HUVEC-01", well=w, sirna=s), 1)) for w in wells]
                  for s in range(n_sirnas)])
    x = (x - x[:, :5].mean((0, 1))) / x[:, :5].std((0, 1))
    distance = ((x[:, 5:, None] - x[:, :5].mean(1)) ** 2).sum(-1)
    return (distance.argmin(-1) == np.arange(n_sirnas)[:, None]).mean()


@pytest.mark.slow
def test_a_phenotype_can_be_told_from_texture_alone():
    assert nearest_centroid_accuracy(0.5) > 0.7
    assert nearest_centroid_accuracy(0) < 0.3  # an eighth by chance


# grey values


@each("cell_type", [*real_intensity, "A549"])
def test_intensities_without_a_batch_effect_are_the_real_ones(cell_type):
    sim = Simulation(image_size=48, cell_radius=6, batch_effect=0)
    x = np.stack([simulate_site(sim, well_row(f"{cell_type}-01", p), s) for p in (1, 2, 3, 4) for s in (1, 2)]).astype(
        float)
    mean, std = real_intensity.get(cell_type, other_intensity)
    np.testing.assert_allclose(x.mean((0, 2, 3)), mean, rtol=0.2)
    np.testing.assert_allclose(x.std((2, 3)).mean(0), std, rtol=0.2)


@pytest.mark.parametrize("cell_type", real_intensity)
def test_the_table_of_real_intensities_is_that_of_the_real_files(cell_type):
    folder = REAL / "train" / f"{cell_type}-01"
    if not folder.is_dir():
        pytest.skip("the real images are not in ../shared/rcic")
    files = [[folder / f"Plate{p}" / f"B02_s1_w{c}.png" for c in range(1, 7)] for p in range(1, 5)]
    x = np.stack([[np.asarray(Image.open(f)) for f in row] for row in files]).astype(float)
    mean, std = real_intensity[cell_type]
    np.testing.assert_allclose(mean, x.mean((0, 2, 3)), atol=0.006)
    np.testing.assert_allclose(std, x.std((2, 3)).mean(0), atol=0.006)


@pytest.mark.slow
def test_the_module_needs_no_torch():
    "Worker processes import it, and should start fast"
    code = "import sys, rcic_fastai.screen.simulate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert simulate.__all__
