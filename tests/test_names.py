"Names with every character that a file system takes: in folders, tables, files of images, pictures and pages."
import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from cases import each
from PIL import Image
from test_report import execute_here

from rcic_fastai.cli import core as cli
from rcic_fastai.predict.submission import score_submission
from rcic_fastai.data.store import read_site
from rcic_fastai.data.image import MultiChannelImage
from rcic_fastai.report.accuracy import plot_intervals, plot_plate
from rcic_fastai.model.backbone import create_backbone
from rcic_fastai.screen.describe import describe_screen, find_sites, pattern_regex
from rcic_fastai.screen.platemap import read_plate_map
from rcic_fastai.run.predict import predict_run
from rcic_fastai.recipe.published import get_recipe, laptop_recipe
from rcic_fastai.report.core import make_report, plot_map, run_context
from rcic_fastai.run.submit import submit_run
from rcic_fastai.run.train import find_lr, train_run
from rcic_fastai.screen.sites import check_files, site_files
from rcic_fastai.screen.sources import escape_braces, has_channels, packed_row, pattern_parts
from rcic_fastai.screen.core import plain_text
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.split import valid_mask
from rcic_fastai.screen.simulate import simulate_screen
from rcic_fastai.data.pack import pack_screen
from rcic_fastai.data.store import verify_store
from rcic_fastai.run.folder import read_run, run_data
from rcic_fastai.run.record import write_run

FOLDER = "a #1 {channel} {{x}} $5 %20 & <b> \"q\" 's ü"
TREATMENTS = ["$alpha$ & <b>", "#7", "{x}", "two\nlines", "-minus", "_under", "µM 5%", '"quoted, name"', "DMSO $"]


def quiet(*args):
    pass


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    "A screen of one's own in which every name is awkward, and its plate map with all treatments."
    root, rng, rows = tmp_path_factory.mktemp("own") / FOLDER / "images{DAPI}", np.random.default_rng(0), []
    for e in ("day #1", "day {2}", "-day3$"):
        (root / e).mkdir(parents=True)
        for i, treatment in enumerate(TREATMENTS):
            for channel in ("{DAPI}", "#ER", "$RNA %"):
                Image.fromarray(rng.integers(300, 3000, (24, 24)).astype(np.uint16)).save(
                    root / e / f"B{i+2:02}_f1_{channel}.tif")
            rows.append(dict(Experiment=e, Plate="P#1 {a}", Well=f"B{i+2}", Compound=treatment, Cells="HE{LA} #2"))
    truth = pd.DataFrame(rows)
    known = ~((truth.Experiment == "-day3$") & (truth.index % 9 < 3))
    truth.assign(Compound=truth.Compound.where(known, "")).to_csv(root / "plate #map {1}.csv", index=False)
    screen = describe_screen(root, columns=dict(treatment="Compound", cell_type="Cells"), negative=["DMSO $"],
                             say=quiet)
    return screen, truth


@pytest.fixture(scope="module")
def own_run(own, tmp_path_factory):
    screen, _ = own
    run = tmp_path_factory.mktemp("runs") / "r #u{n} $x$ %"
    train_run(screen, laptop_recipe(get_recipe("laptop"), 1, virtual_batch=8), run, valid="experiment=day {2}",
              say=quiet)
    predict_run(run, screen, "test", progress=False)
    return run, submit_run(run, screen, say=quiet)


# Paths

def test_paths_of_every_name_are_read_and_packed(own, tmp_path):
    screen, _ = own
    sites = screen.sites()
    check_files(sites, screen.channels)
    x = read_site(sites.files[0], screen.channels)
    store = pack_screen(screen, tmp_path / "pa#ck {channel}", say=quiet, progress=False)
    packed = read_screen(tmp_path / "pa#ck {channel}")
    assert not len(verify_store(store, sites, progress=False))
    assert (read_site(packed.sites().files[0], packed.channels) == x).all()
    assert packed.wells.treatment.tolist() == screen.wells.treatment.tolist()


@pytest.mark.slow
def test_simulated_screen_in_such_a_folder(tmp_path):
    screen = read_screen(simulate_screen(tmp_path / FOLDER, n_sirnas=4, n_train=2, n_test=1, cell_types=("HUVEC",),
                                         image_size=32, progress=False))
    check_files(screen.sites())
    pack_screen(screen, tmp_path / "x#2", say=quiet, progress=False)
    packed, plain = (s.sites().set_index("site_id").files for s in (read_screen(tmp_path / "x#2"), screen))
    assert (read_site(packed.iloc[0]) == read_site(plain[packed.index[0]])).all()


@each("files, expected", [
    ("a/{channel}.png", ["a/1.png"]), ("{channel}/b.png", ["1/b.png"]), ("a{b}/{channel}.png", ["a{b}/1.png"]),
    ("{{channel}}/{channel}.png", ["{channel}/1.png"]),
    ("x{{{channel}}}.png", ["x{1}.png"]), ("a/b.png", ["a/b.png"]), ("{{channel}}.png", ["{channel}.png"]),
    ("}{channel}{", ["}1{"]),
])
def test_braces(files, expected):
    assert [p.as_posix() for p in site_files(files, [1])] == expected
    assert has_channels(files) == ("1" in expected[0])


@each("text", ["a", "{", "}", "{{", "{channel}", "a{b}c", "}{", "{{}}", "{{channel}}"])
def test_escaped_braces_are_text(text):
    assert pattern_parts(escape_braces(text)) == [(text, "")]
    assert [p.as_posix() for p in site_files(escape_braces(text) + "{channel}", ["x"])] == [text + "x"]


@each("files, expected", [
    ("store#17", ("store", "17")), ("a#b/store#17", ("a#b/store", "17")), ("s#E#1_1_B03_2", ("s#E", "1_1_B03_2")),
    ("a#1/E/B03_s1_w{channel}.png", None),
    ("a/B03#1.png", None), ("a/b_1.png", None), ("s3://bucket/store#3", ("s3://bucket/store", "3")),
])
def test_packed_rows(files, expected):
    assert packed_row(files) == expected


def test_channels_in_folders_of_their_own(tmp_path):
    for channel in ("DAPI", "ER"):
        (tmp_path / channel).mkdir()
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / channel / "B02.png")
    (tmp_path / "map.csv").write_text("well,treatment\nB02,x\n")
    screen = describe_screen(tmp_path, files="{channel}/{well}.png", say=quiet)
    check_files(screen.sites(), screen.channels)
    (tmp_path / "ER/B02.png").unlink()
    with pytest.raises(FileNotFoundError, match="ER/B02.png does not exist"):
        check_files(screen.sites(), screen.channels)


def test_patterns_with_braces_of_their_own(tmp_path):
    (tmp_path / "map.csv").write_text("well,treatment\nB02,x\n")
    rows = read_plate_map(tmp_path / "map.csv")
    (tmp_path / "{a}").mkdir()
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "{a}" / "B02_{1}.png")
    assert pattern_regex("{{a}}/{well}_{{{channel}}}.png", rows).fullmatch("{a}/B02_{1}.png")["channel"] == "1"
    sites, channels, _ = find_sites(tmp_path, "{{a}}/{well}_{{{channel}}}.png", rows)
    assert sites.files.tolist() == ["{{a}}/B02_{{{channel}}}.png"] and channels.index.tolist() == ["1"]
    with pytest.raises(ValueError, match="{a} is no column of the plate map"):
        find_sites(tmp_path, "{a}/{well}_{channel}.png", rows)


# Pictures

@pytest.mark.slow
@each("name", [*TREATMENTS, "$", "$$", "$a", r"\$x$", "$\\frac{1}$", "a_b^c", "$%$"])
def test_pictures_show_names_as_they_are(name):
    figures = [plot_plate(np.zeros((8, 12)), name), plot_map(np.random.rand(6, 2), [name] * 3 + ["other"] * 3, name),
               plot_intervals(pd.DataFrame(dict(accuracy=[.5], low=[.4], high=[.6]), index=[name]), title=name)]
    ax = MultiChannelImage.create(np.zeros((6, 8, 8), np.uint8)).show(title=name)
    for fig in (*figures, ax.figure):
        fig.canvas.draw()
    legend = figures[1].axes[0].get_legend()
    # also a name that begins with an underscore
    assert [t.get_text() for t in legend.get_texts()] == [plain_text(name)]
    plt.close("all")


# Treatments by name

@pytest.mark.slow
def test_scores_by_name(own, own_run, tmp_path):
    (screen, truth), (run, submission) = own, own_run
    ids, given = pd.read_csv(submission).id_code, pd.read_csv(submission)
    right = truth[truth.Experiment == "-day3$"].head(3).reset_index(drop=True)
    given.assign(treatment=right.Compound, sirna=given.sirna).to_csv(tmp_path / "submission.csv", index=False)
    number = screen.wells.dropna(subset="sirna").drop_duplicates("treatment").set_index("treatment").sirna
    given[["id_code"]].assign(sirna=right.Compound.map(number)).to_csv(tmp_path / "numbers.csv", index=False)
    forms = dict(plate_map=truth, names=pd.DataFrame(dict(id_code=ids, treatment=right.Compound)),
                 named_sirna=pd.DataFrame(dict(id_code=ids, sirna=right.Compound)),
                 one_day=truth[truth.Experiment == "-day3$"], upper=truth.rename(columns=str.upper))
    for form, table in forms.items():
        table.to_csv(tmp_path / "truth.csv", index=False)
        assert score_submission(tmp_path / "submission.csv", tmp_path / "truth.csv") == 1, form
        assert score_submission(tmp_path / "submission.csv", tmp_path / "truth.csv", screen) == 1, form
        assert score_submission(tmp_path / "numbers.csv", tmp_path / "truth.csv", screen) == 1, form
        assert run_context(run, truth=tmp_path / "truth.csv", say=quiet).truth[ids].map(
            lambda k: screen.wells.set_index("sirna").treatment[k].iloc[0]).tolist() == right.Compound.tolist(), form
    with pytest.raises(ValueError,
                       match="numbers.csv has the numbers of treatments and .*truth.csv their names: the screen"):
        score_submission(tmp_path / "numbers.csv", tmp_path / "truth.csv")
    cli.rcic_score(submission=tmp_path / "numbers.csv", truth=tmp_path / "truth.csv", data=screen.path)


def test_truth_of_a_treatment_that_is_new(own, own_run, tmp_path):
    (_, truth), (run, _) = own, own_run
    truth.assign(Compound=truth.Compound.replace("#7", "never seen")).to_csv(tmp_path / "truth.csv", index=False)
    c = run_context(run, truth=tmp_path / "truth.csv", say=quiet)
    new = c.judged[c.judged.true == "never seen"]
    assert len(new) == 1 and new.known.all() and not new.right.any() and c.class_name("never seen") == "never seen"


@each("text, message", [
    ("id_code,compound\nx,y\n", "column 'sirna' is missing"),
    ("a,b\n1,2\n", "neither id_code nor well is among its columns, a, b"),
    ("id_code,treatment\nnowhere_1_B02,x\n", "none of its 1 well"),
    ("well,treatment\nB02,x\n", "has several wells B02; columns for experiment"),
    ("experiment,well,treatment\nday #1,C02,x\n", "row 2: experiment day #1 well C02 is not in"),
    ("id_code,treatment\nday #1_1_B02,x\nday #1_1_B02,x\n", "row 3: well day #1_1_B02 occurs more than once"),
    ("", "truth.csv: the file is empty"),
])
def test_truths_that_do_not_fit_are_explained(own_run, tmp_path, text, message):
    (tmp_path / "truth.csv").write_text(text)
    with pytest.raises(ValueError) as e:
        run_context(own_run[0], truth=tmp_path / "truth.csv", say=quiet)
    assert message in str(e.value)


@pytest.mark.slow
def test_report_by_name(own, own_run, tmp_path, monkeypatch):
    # names reach the cells as text either way; test_report.py starts a kernel
    monkeypatch.setattr("rcic_fastai.report.core.execute_notebook", execute_here)
    (_, truth), (run, _) = own, own_run
    truth.to_csv(tmp_path / "truth.csv", index=False)
    page = make_report(run, tmp_path / "re #1 {p}.html", truth=tmp_path / "truth.csv", max_wells=12, n_pictures=2,
                       say=quiet).read_text()
    assert "$alpha$ &amp; &lt;b&gt;" in page and "<b>q" not in page and "siRNA\u00a0" not in page


# Commands

@pytest.mark.slow
def test_wells_are_shown_by_whatever_they_are_called(own, small_screen, tmp_path):
    for screen in (own[0], read_screen(small_screen)):
        w = screen.wells.iloc[len(screen.wells) // 2]
        for well in (None, w.id_code, w.well, w.well.lower(), f"{w.plate}_{w.well}",
                     f"{w.get('plate_name', w.plate)}/{w.well}"):
            title = screen.show_well(well)[0].figure._suptitle.get_text()
            assert well is None or w.well in title
        for well in ("nowhere", "Z99", ""):
            with pytest.raises(ValueError, match="has no well"):
                screen.show_well(well)
        plt.close("all")
    cli.rcic_show(data=own[0].path, out=tmp_path / "a $b$ #1.png")
    assert (tmp_path / "a $b$ #1.png").stat().st_size


def test_more_channels_than_colours(tmp_path):
    for i in range(8):
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / f"B02_c{i}.png")
    (tmp_path / "map.csv").write_text("well,treatment\nB02,x\n")
    assert len(describe_screen(tmp_path, say=quiet).show_well()) == 9
    plt.close("all")


def test_experiments_with_commas_are_set_aside():
    wells = pd.DataFrame(dict(experiment=["a, b", "a", "c"], id_code=["x", "y", "z"]))
    assert valid_mask(wells, "experiment=a, b").tolist() == [True, False, False]
    assert valid_mask(wells, "experiment=a, b,c").tolist() == [True, False, True]
    assert valid_mask(wells, "experiment=a,c").tolist() == [False, True, True]


def test_home_folders(small_run, small_screen, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "screen").symlink_to(small_screen)
    shutil.copytree(small_run, tmp_path / "run")
    cli.rcic_show(data=Path("~/screen"), out=Path("~/well.png"))
    cli.rcic_submit(run=Path("~/run"), data=Path("~/screen"), out=Path("~/submission.csv"))
    cli.rcic_score(submission=Path("~/submission.csv"), truth=Path("~/screen/truth.csv"))
    assert (tmp_path / "well.png").exists() and (tmp_path / "submission.csv").exists() and not Path("~").exists()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/w.pth"):
        create_backbone("resnet18", 6, pretrained="~/w.pth")


def test_run_and_data_that_move(small_run, small_screen, tmp_path, monkeypatch):
    recipe, info = read_run(small_run)
    shutil.copytree(small_screen, tmp_path / "a" / "screen")
    shutil.copytree(small_run, tmp_path / "a" / "runs" / "first")
    write_run(tmp_path / "a" / "runs" / "first", recipe, {**info, "data": str(tmp_path / "a" / "screen")})
    assert json.loads((tmp_path / "a/runs/first/run.json").read_text())["data"] == "../../screen"
    shutil.move(tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir(tmp_path / "b" / "runs")
    assert run_data("first") == tmp_path / "b" / "screen"
    shutil.move(tmp_path / "b" / "screen", tmp_path / "other")
    with pytest.raises(FileNotFoundError,
                       match="the data of first was in .*/b/screen, which does not exist here: say where it is now "
                       "with --data"):
        run_data("first")
    assert run_data("first", tmp_path / "other") == tmp_path / "other"


@pytest.mark.slow
@pytest.mark.parametrize("steps", [20, 23])
def test_short_tests_of_learning_rates(small_screen, steps):
    found = find_lr(read_screen(small_screen), laptop_recipe(get_recipe("laptop"), 1, virtual_batch=8), steps=steps,
                    say=quiet)
    assert all(1e-8 < v < 10 for v in found)
    with pytest.raises(ValueError, match="--steps is 19, expected 20 or more"):
        find_lr(read_screen(small_screen), get_recipe("laptop"), steps=19)


def test_folders_that_begin_with_a_tilde(small_screen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_screen, tmp_path / "~nobody-here")
    assert len(read_screen("./~nobody-here").wells) == len(read_screen(small_screen).wells)
