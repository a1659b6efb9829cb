"Quality control against faults that are planted, strong phenotypes that are none, and tables made by hand."

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from rcic_fastai.cli import core as cli
from rcic_fastai.data.pack import pack_screen
from rcic_fastai.data.store import read_site
from rcic_fastai.quality.batch import batch_table, position_table
from rcic_fastai.quality.core import FAULTS, screen_quality
from rcic_fastai.quality.measures import block_means, focus, light, nuclei, standing_out
from rcic_fastai.quality.outliers import moved_wells, plate_scores, unexplained
from rcic_fastai.report.quality import check_quality_folder, write_quality
from rcic_fastai.run.predict import Run
from rcic_fastai.screen.describe import describe_screen
from rcic_fastai.screen.exclude import without_sites
from rcic_fastai.screen.faults import plant_faults, PLATE_FAULTS, SITE_FAULTS, spoil_site
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.simulate import simulate_screen

DESIGN = dict(n_sirnas=48, n_train=3, n_test=0, cell_types=("HUVEC",), n_plates=2, image_size=48, missing=0.0)


def quiet(*args): pass


@pytest.fixture(scope="module")
def spoilt(once):
    "Folder of a screen with faults."
    def make(folder):
        simulate_screen(folder, **DESIGN, seed=5, progress=False)
        plant_faults(folder, sites=4, seed=5)
    return once("quality/spoilt", make)


@pytest.fixture(scope="module")
def quality(spoilt):
    return screen_quality(read_screen(spoilt), workers=2, progress=False)


def test_planted_faults_are_found_and_clean_sites_are_not(quality, spoilt):
    truth, found = pd.read_csv(spoilt / "faults.csv"), quality.measured.sites.iloc[quality.faults["at"]]
    said = set(zip(found.id_code, found.site, quality.faults.fault))
    planted = set(zip(truth.id_code, truth.site, truth.fault))
    assert {f for *_, f in planted} == {*SITE_FAULTS, *PLATE_FAULTS} and len(planted & said) >= 0.95*len(planted)
    spoilt_sites = {(i, s) for i, s, f in planted if f != "hot pixels"}
    originals = set(truth.of.dropna())
    out = quality.sites[quality.sites.exclude].drop_duplicates(["id_code", "site"])
    wrong = [r for r in out.itertuples() if (r.id_code, r.site) not in spoilt_sites
             and f"{r.id_code}_{r.site}" not in originals]
    assert len(wrong) <= 0.02*len(quality.measured.sites)
    shifted = truth[truth.fault == "shifted plate"].drop_duplicates(["experiment", "plate"])
    seen = quality.outliers[quality.outliers.fault == "shifted plate"]
    assert seen[["experiment", "plate"]].values.tolist() == shifted[["experiment", "plate"]].values.tolist()
    assert "1 well on" in seen.why.iloc[0]


def test_tables_agree_with_each_other(quality):
    sites, wells = quality.sites.drop_duplicates(["id_code", "site"]), quality.wells
    assert wells.left_out.sum() == sites.exclude.sum() == quality.plates.drop_duplicates(
        ["experiment", "plate"]).left_out.sum()
    assert (wells.exclude == (wells.left_out == wells.sites)).all()
    named = quality.sites.groupby(["id_code", "site"]).agg(any=("fault", "max"), exclude=("exclude", "all"))
    assert list(quality.counts().index) == list(FAULTS) and (named["any"][named.exclude] != "").all()
    assert not quality.outliers.exclude[quality.outliers.fault == "hot pixels"].any()


def test_a_strong_treatment_is_no_fault():
    "What all replicates of a treatment show is a phenotype; where one well shows it, it is suspicious"
    rng = np.random.default_rng(0)
    plates = np.repeat(np.arange(6), 40)
    x, treatment = rng.standard_normal((240, 1)), np.tile(np.arange(40), 6)
    x[treatment == 3] -= 20
    x[57] -= 20
    z = plate_scores(x, plates)
    assert set(np.flatnonzero(z[:, 0] < -6)) == {*np.flatnonzero(treatment == 3), 57}
    assert np.flatnonzero(unexplained(z, treatment, np.arange(240))[:, 0] < -6).tolist() == [57]
    assert np.flatnonzero(unexplained(z, np.full(240, -1), np.arange(240))[:, 0] < -6).size == 7  # unknown treatments


def test_focus_is_blind_to_brightness_and_noise(spoilt):
    x = read_site(read_screen(spoilt).sites().files[0]).astype(float)
    rng = np.random.default_rng(0)
    blurred = [np.stack([gaussian_filter(p, s) for p in x]) for s in (0, 1, 2)]
    noisy = [np.median(focus(b+0.3*rng.standard_normal(b.shape))) for b in blurred]
    assert noisy[0] > noisy[1]+0.4 > noisy[2]+0.8
    np.testing.assert_allclose(focus(3*x), focus(x), atol=0.02)


@pytest.mark.parametrize("n", [0, 1, 9, 25])
def test_nuclei_are_counted_over_an_uneven_background(n):
    rng, k = np.random.default_rng(n), int(np.ceil(np.sqrt(max(n, 1))))
    y, x = np.mgrid[:120, :120]
    image = 20+0.2*x+0.1*y
    for i in range(n):
        r, c = (np.array(divmod(i, k))+0.5)*120/k
        image = image+80*((y-r)**2+(x-c)**2 < 36)
    assert nuclei(rng.poisson(image))[0] == n


def test_light_and_pixels():
    y, x = np.meshgrid(*2*[np.linspace(-1, 1, 64)], indexing="ij")
    plane = 100*(1+0.3*x)[None]
    assert light(block_means(plane))[0][0] == pytest.approx(0.3, abs=0.05)
    image = np.random.default_rng(0).poisson(50, (2, 64, 64))
    image[1, 5, 6] = 250
    assert standing_out(image)[1, 5, 6] and standing_out(image).mean() < 0.01


def test_moves_of_a_plate():
    rng = np.random.default_rng(0)
    at = np.array([(r, c) for r in range(16) for c in range(24)])
    true = rng.standard_normal((384, 12))
    seen = true+rng.standard_normal(true.shape)
    assert moved_wells(seen, true, at) == ("", 0.0)
    grid = seen.reshape(16, 24, -1)
    for moved, name in ((np.roll(grid, 1, 0), "1 row down"), (np.roll(grid, -2, 1), "2 columns left"),
                        (grid[::-1, ::-1], "turned by 180 degrees"), (grid[::-1], "rows mirrored")):
        assert moved_wells(moved.reshape(384, -1), true, at)[0] == name
    half = np.where(rng.random((384, 1)) < 0.5, true, np.nan)  # the treatments of half of the wells are known
    assert moved_wells(np.roll(grid, 1, 0).reshape(384, -1), half, at)[0] == "1 row down"


def test_batches_and_positions_without_and_with_an_effect():
    rng = np.random.default_rng(0)
    wells = pd.DataFrame([dict(cell_type="A", experiment=e, plate=p, well_type=t, row=r, column=c)
                          for e in ("1", "2") for p in (1, 2) for r in range(6) for c in range(8)
                          for t in ["treatment" if c else "negative_control"]])
    x = rng.standard_normal((len(wells), 4))
    plain = batch_table(x, wells)
    assert (abs(plain.accuracy-0.5) < 0.2).all() and set(plain.of) == {"controls", "all wells"}
    strong = batch_table(x+3*(wells.experiment == "2").to_numpy()[:, None], wells)
    assert strong.accuracy["experiment", "A"] == 1 and (abs(strong.accuracy["plate"]-0.5) < 0.2).all()
    x[:, 2] += wells.row
    shares = position_table(x, wells.groupby(["experiment", "plate"]).ngroup(), wells[["row", "column"]].to_numpy())
    assert shares.row[2] > 0.5 and shares.drop(index=2).abs().max().max() < 0.15


def test_faults_keep_type_and_range():
    x = np.random.default_rng(0).integers(0, 4096, (3, 40, 40)).astype(np.uint16)
    for fault in SITE_FAULTS[:-1]:
        y = spoil_site(x, fault, white=4095)
        assert y.dtype == np.uint16 and y.shape == x.shape and y.max() <= 4095 and (y != x).any()


def test_planting_refuses_other_folders(tmp_path, spoilt):
    with pytest.raises(FileNotFoundError, match="no simulated screen"): plant_faults(tmp_path)
    with pytest.raises(FileExistsError, match="has faults already"): plant_faults(spoilt)


def test_excluded_sites_count_nowhere_and_the_run_says_so(small_screen, tmp_path, capsys):
    screen = read_screen(small_screen)
    train = screen.wells[(screen.wells.split == "train") & (screen.wells.well_type == "treatment")]
    valid = train[train.experiment == "HUVEC-03"].id_code.tolist()
    hidden = screen.wells[screen.wells.sirna.isna()].id_code.iloc[0]  # it is to be predicted
    gone = train.id_code.iloc[0]
    table = pd.DataFrame(dict(id_code=[gone, gone, valid[0], valid[1], hidden], site=[1, 2, 1, 2, 1],
                              exclude=["yes", "yes", "True", "no", "yes"]))
    table.to_csv(tmp_path / "qc.csv", index=False)
    asked = dict(data=small_screen, run=tmp_path / "run", recipe="laptop", laptop=1, valid="experiment=HUVEC-03",
                 debug=True)
    cli.rcic_train(**asked, exclude=tmp_path / "qc.csv")
    said = capsys.readouterr().out
    assert "3 sites are left out, and 1 well that has no other" in said and "(3 sites left out)" in said
    run = Run(tmp_path / "run")
    assert run.info["left_out"] == sorted([f"{gone}_1", f"{gone}_2", f"{valid[0]}_1"])
    assert "3 sites left out" in repr(run) and gone not in set(run.screen.wells.id_code)
    ids = run.predicted("valid").ids
    assert len(ids) == 2*len(valid)-1 and f"{valid[0]}_1" not in set(ids) and f"{valid[0]}_2" in set(ids)
    assert f"{hidden}_1" in set(run.sites("test").site_id)
    x, wells = run.embed("train", progress=False, say=quiet)
    assert len(wells) == (screen.wells.split == "train").sum()-1 and gone not in set(wells.id_code)
    assert Run(tmp_path / "run", screen).screen.left_out == run.screen.left_out  # whoever brings the screen
    with pytest.raises(FileExistsError, match="not of what is asked for"): cli.rcic_train(**asked)


@pytest.mark.parametrize("kind", ["packed", "described"])
def test_sites_of_every_layout_are_left_out(small_screen, tmp_path, kind):
    screen = read_screen(small_screen)
    if kind == "packed":
        pack_screen(screen, tmp_path / "packed", say=quiet, progress=False)
        other = read_screen(tmp_path / "packed")
    else:
        for w in ("B02", "B03"):
            for s in (1, 2): Image.fromarray(np.full((32, 32), s, np.uint8)).save(tmp_path / f"{w}_s{s}_DAPI.png")
        pd.DataFrame(dict(well=["B02", "B03"], treatment=["DMSO", "x"])).to_csv(tmp_path / "map.csv", index=False)
        other = describe_screen(tmp_path, files="{well}_s{site}_{channel}.png", say=quiet)
    sites = other.sites()
    out = without_sites(other, sites.site_id[[0]]).sites()
    assert out.site_id.tolist() == sites.site_id[1:].tolist()
    np.testing.assert_array_equal(read_site(out.files[0], other.channels), read_site(sites.files[1], other.channels))


@pytest.fixture(scope="module")
def page(quality, tmp_path_factory):
    return write_quality(quality, tmp_path_factory.mktemp("quality") / "qc")


def test_page_and_tables(quality, page):
    text, folder = page.read_text(), page.parent
    for title in ("In short", "What is suspicious", "Pictures", "Plates", "Plate maps", "Batch effect"):
        assert f">{title}</h2>" in text
    assert "src=\"http" not in text and "<script" not in text and len(text) < 3e6
    assert "notebook beside" not in text  # there is none
    again = pd.read_csv(folder / "qc.csv", keep_default_na=False)
    assert again.exclude.sum() == quality.sites.exclude.sum() and len(again) == len(quality.sites)
    assert check_quality_folder(folder) == folder  # what is ours is replaced
    (folder / "plates.csv").write_text("mine")
    with pytest.raises(FileExistsError, match=r"plates\.csv"): write_quality(quality, folder)
    with pytest.raises(ValueError, match="is what is read"): write_quality(quality, quality.screen.path)


def test_page_in_a_browser(page, chromium):
    for width in (1280, 390):
        tab = chromium.new_context(offline=True, viewport=dict(width=width, height=900)).new_page()
        tab.goto(page.as_uri())
        seen = tab.evaluate("""() => [document.documentElement.scrollWidth,
            [...document.images].every(
                i => i.naturalWidth > 0 && i.alt && i.getBoundingClientRect().right <= innerWidth)]""")
        assert seen[0] <= width and seen[1]
