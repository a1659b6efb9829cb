"The second family of screens: each effect does what its name says, none is there at 0; the first family is as it was."

import hashlib
import json
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from cases import each
from PIL import Image
from scipy.ndimage import gaussian_filter

from rcic_fastai.screen.morphology import sirna_morphology
from rcic_fastai.screen.optics import Optics, blur_field, families, family_optics, optics_morphology, optics_site
from rcic_fastai.screen.optics import plate_optics
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.simulate import Simulation, design_screen, simulate_screen, simulate_site

PLAIN = Optics(noise=0).scaled(0)
EFFECTS = [f.name for f in fields(Optics) if f.name not in ("noise", "bits")]
SMALL = dict(n_sirnas=4, n_positive=1, n_train=1, n_test=1, cell_types="RPE", image_size=24, seed=3, workers=1,
             progress=False, family="optics")


def well_row(well="G08", experiment="HUVEC-01", plate=1, sirna=3):
    return SimpleNamespace(id_code=f"{experiment}_{plate}_{well}", cell_type=experiment.split("-")[0],
                           experiment=experiment, plate=plate, well=well, well_type="treatment", sirna=sirna)


def picture(well=None, site=1, size=48, **effects):
    return optics_site(replace(PLAIN, **effects), 0, well or well_row(), site, size, size / 8)


def contents(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# the families


def test_the_first_family_is_as_it_was():
    "Pixels of a few sites of every cell type, and the settings that a screen of monotone cameras writes"
    digest = hashlib.sha256()
    for cell_type in ("HUVEC", "RPE", "HEPG2", "U2OS"):
        for e in (1, 2):
            for site in (1, 2):
                digest.update(simulate_site(Simulation(image_size=32, cell_radius=4),
                                            well_row(experiment=f"{cell_type}-0{e}"), site).tobytes())
    assert digest.hexdigest() == "65280f82296a5a3367b0c38a926aac350e1915c8dbb99722ae4fb3ac9169f678"


def test_settings_of_the_first_family_name_no_optics(tmp_path):
    simulate_screen(tmp_path, **{**SMALL, "family": "curves", "n_sirnas": 4, "image_size": 16, "n_test": 0})
    assert list(json.loads((tmp_path / "simulation.json").read_text())) == [
        "seed", "image_size", "cell_radius", "n_sites", "effect", "batch_effect", "plate_effect", "n_sirnas", "n_train",
        "n_test", "cell_types", "n_positive", "n_plates", "missing"]


def test_without_effects_both_families_are_the_same_picture():
    ours = Simulation(batch_effect=0, optics=Optics(noise=0.25))
    for well in (well_row(), well_row("B02", "RPE-02", 4, 7)):
        np.testing.assert_array_equal(simulate_site(ours, well, 2), simulate_site(Simulation(batch_effect=0), well, 2))


@each("workers", [2])
def test_same_seed_same_bytes_for_any_number_of_workers(workers, tmp_path):
    one, two = (simulate_screen(tmp_path / str(n), **{**SMALL, "workers": n}) for n in (1, workers))
    assert contents(one) == contents(two)
    other = simulate_screen(tmp_path / "other", **{**SMALL, "seed": 4})
    assert contents(other) != contents(one)
    settings = json.loads((one / "simulation.json").read_text())
    assert {k: settings[k] for k in asdict(Optics())} == asdict(Optics())
    with pytest.raises(ValueError, match=r"other settings \(bleed is 0.* there, 0.9 now\)"):
        simulate_screen(one, **SMALL, effects={"bleed": 0.9})
    with pytest.raises(ValueError, match=r"other settings \(background is 0.* there, absent now\)"):
        simulate_screen(one, **{**SMALL, "family": "curves"})


def test_a_12_bit_camera_writes_deeper_files(tmp_path):
    folder = simulate_screen(tmp_path, **{**SMALL, "n_test": 0, "effects": {"bits": 12}})
    with Image.open(folder / "train/RPE-01/Plate1/B02_s1_w2.png") as im:
        assert im.mode == "I;16"
        deep = np.asarray(im)
    row = read_screen(folder).wells.query("id_code == 'RPE-01_1_B02'").iloc[0]
    sim = Simulation(3, 24, 3.0, optics=Optics())
    shallow = simulate_site(sim, row, 1)[1]
    assert 255 < deep.max() <= 4095 and len(np.unique(deep)) > 1.5 * len(np.unique(shallow))
    assert np.abs(deep / 16 - shallow).max() <= 0.6


@each("change, message", [
    (dict(effects={"blead": 1}), "effect is 'blead'"), (dict(effects={"bleed": 2}), "bleed is 2, expected 0 to 1"),
    (dict(effects={"bits": 10}), "bits is 10, expected 8 or 12"), (dict(family="lens"), "family is 'lens'"),
    (dict(effects={"defocus": float("nan")}), "defocus is nan"),
    (dict(family="curves", effects={"bleed": 0.1}), "the family 'curves' has no effect 'bleed'")])
def test_settings_that_cannot_be(change, message, tmp_path):
    with pytest.raises(ValueError) as error:
        simulate_screen(tmp_path / "screen", **{**SMALL, **change})
    assert message in str(error.value) and not (tmp_path / "screen").exists()


def test_every_effect_changes_the_picture_and_only_by_its_size():
    plain = picture(well_row("B03"))
    for name in EFFECTS:
        full = {"dead_wells": 1.0, "strong_plates": 1.0, "saturation": 0.2}.get(name, 0.1)
        assert np.abs(picture(well_row("B03"), **{name: full}) - plain).mean() > 0.01, name
    np.testing.assert_array_equal(picture(well_row("B03")), plain)
    assert Optics().scaled(0) == replace(PLAIN, noise=Optics().noise) and Optics().scaled(1) == Optics()
    assert Optics(vignette=0.8).scaled(2).vignette == 1


def test_hard_optics_are_no_smaller_than_the_usual():
    usual, hard = asdict(families["optics"]), asdict(family_optics("hard_optics"))
    assert all(hard[k] >= v for k, v in usual.items()) and sum(hard[k] > v for k, v in usual.items()) >= 8


# what each effect does

EXPERIMENTS = [f"HUVEC-{e:02}" for e in range(1, 9)]


def test_gain_and_response_differ_between_experiments():
    mean = lambda **k: np.log([picture(well_row(experiment=e), size=32, **k).mean((1, 2)) for e in EXPERIMENTS])
    assert (mean(gain=0.8).std(0) > 3 * mean().std(0)).all()
    skew = lambda x: ((x - x.mean()) ** 3).mean() / x.std() ** 3
    tails = lambda **k: np.array([skew(picture(well_row(experiment=e), size=32, **k)[1]) for e in EXPERIMENTS])
    assert tails(response=0.8).std() > 2 * tails().std()


def test_bleed_through_correlates_neighbours_in_the_spectrum():
    def correlation(a, b, **effects):
        pictures = [picture(well_row(experiment=e), **effects) for e in EXPERIMENTS]
        return np.mean([np.corrcoef(x[a].ravel(), x[b].ravel())[0, 1] for x in pictures])

    assert correlation(0, 1, bleed=0.6) > correlation(0, 1) + 0.2
    assert abs(correlation(0, 4, bleed=0.6) - correlation(0, 4)) < 0.2  # nucleus and mitochondria are far apart


def sharpness(x):
    "Share of the power in the fine half of the spectrum, per channel"
    power = np.abs(np.fft.fft2(x - x.mean((-2, -1), keepdims=True))) ** 2
    f = np.fft.fftfreq(x.shape[-1])
    return power[:, np.hypot(*np.meshgrid(f, f)) > 0.15].sum(-1) / power.sum((-2, -1))


def test_defocus_takes_fine_detail_away():
    pairs = [(picture(well_row(experiment=e), defocus=0.3), picture(well_row(experiment=e))) for e in EXPERIMENTS]
    assert np.median([sharpness(soft) / sharpness(sharp) for soft, sharp in pairs]) < 0.5
    # different channels and sites lose different amounts
    soft = [sharpness(picture(site=s, defocus=0.3)) for s in (1, 2)]
    assert soft[0].std() > 0 and not np.allclose(*soft, rtol=0.05)


def test_tilt_blurs_one_side_more():
    x = np.random.default_rng(0).random((6, 64, 64)).astype(np.float32)
    out = blur_field(x, np.full(6, 0.15), np.array([0.15, 0]), 8.0)
    assert out[:, -16:].std() < 0.5 * out[:, :16].std()
    np.testing.assert_allclose(blur_field(x, np.full(6, 0.3), np.zeros(2), 8.0)[2],
                               gaussian_filter(x[2], 8 * np.hypot(0.06, 0.3)), atol=1e-5)


def test_vignette_darkens_the_corners():
    corner, middle = (lambda x: x[:, :8, :8].mean()), (lambda x: x[:, 20:28, 20:28].mean())
    sites = [well_row(experiment=e, sirna=s) for e in EXPERIMENTS for s in range(3)]
    ratio = lambda **k: np.mean([corner(x) / middle(x) for x in (picture(w, **k) for w in sites)])
    assert ratio(vignette=0.6) < 0.8 * ratio()


def test_the_background_glows_unevenly():
    floor = lambda x: np.percentile(x, 5, axis=(1, 2))
    assert np.median(floor(picture(background=0.8)) - floor(picture())) > 1
    added = picture(background=0.8) - picture()
    assert (added >= -1e-3).all() and (added.std((1, 2)) > 0.05 * added.mean((1, 2))).all()


def test_saturated_pixels_share_one_value():
    share = lambda x: np.array([(c == c.max()).mean() for c in x])
    found = np.mean([share(picture(well_row(experiment=e), saturation=0.05)) for e in EXPERIMENTS])
    assert 0.02 < found < 0.12 and share(picture()).max() < 0.005
    assert (picture(saturation=0.05) <= picture()).all()


def test_hot_pixels_stay_where_they_are_in_an_experiment():
    hot = lambda w: picture(w, hot_pixels=0.02) > picture(w) + 3
    one, same, other = (hot(w) for w in (well_row(), well_row("C05", sirna=9), well_row(experiment="HUVEC-02")))
    agree = lambda a, b: (a & b).sum() / min(a.sum(), b.sum())
    assert agree(one, same) > 0.6 and agree(one, other) < 0.2 and 0.003 < one.mean() < 0.021


def plate_of(effects, value):
    wells = [f"{r}{c:02}" for r in "BEHKO" for c in (2, 8, 14, 20)]
    return np.array([value(replace(PLAIN, **effects), well_row(w)) for w in wells])


def test_gradient_runs_over_a_plate():
    p = plate_optics(replace(PLAIN, gradient=0.5), 0, "HUVEC-01", 1)
    assert np.abs(p.slope).max() > 0.2 and (plate_optics(PLAIN, 0, "HUVEC-01", 1).slope == 0).all()
    where = np.abs(p.slope).max(0).argmax()
    side = p.slope[:, where]
    dim, bright = (well_row(("B" if (s := side[0] * sign) < 0 else "O") + ("02" if side[1] * sign < 0 else "23"))
                   for sign in (-1, 1))
    ratio = lambda w: picture(w, gradient=0.5)[where].mean() / picture(w)[where].mean()
    assert ratio(dim) < 1 < ratio(bright)


def test_cells_shrink_where_a_plate_dries_out():
    spread = lambda well: optics_morphology(replace(PLAIN, evaporation=0.5), 0, well_row(well)).spread
    usual = sirna_morphology(0, "HUVEC", 3).spread
    assert spread("B08") < spread("C08") < spread("D08") <= usual and spread("H12") == pytest.approx(usual, rel=0.01)


def test_overgrowth_goes_with_the_stock_of_a_treatment():
    def crowding(e, s):
        well = well_row(f"{'DEFG'[s // 10]}{s % 10 + 4:02}", f"HUVEC-{e:02}", sirna=s)
        usual = sirna_morphology(0, "HUVEC", s).crowding
        return np.log(optics_morphology(replace(PLAIN, overgrowth=0.4), 0, well).crowding / usual)

    table = np.array([[crowding(e, s) for s in range(40)] for e in range(1, 9)])
    r = np.corrcoef(table)
    same_stock = r[:4, :4][np.triu_indices(4, 1)].mean()
    assert 0.25 < table.std() < 0.5 and 0.3 < same_stock < 0.9 and abs(r[:4, 4:].mean()) < 0.25


def test_strong_plates_and_dead_wells_are_as_often_as_asked():
    optics = replace(PLAIN, strong_plates=0.3, dead_wells=0.1)
    strong = [plate_optics(optics, 0, f"HUVEC-{e:02}", p).strong for e in range(1, 51) for p in range(1, 5)]
    assert 0.2 < np.mean(strong) < 0.4
    wells = design_screen(n_sirnas=400, n_train=1, n_test=0, cell_types="HUVEC", missing=0)
    alive = np.array([optics_morphology(replace(optics, strong_plates=0), 0, w).crowding
                      / sirna_morphology(0, "HUVEC", w.sirna).crowding for w in wells[wells.well_type
                                                                                 == "treatment"].itertuples()])
    assert 0.06 < (alive < 0.4).mean() < 0.14
    dead, usual = (optics_site(replace(PLAIN, dead_wells=d), 0, well_row(), 1, 48, 6.0) for d in (1.0, 0.0))
    stain = lambda x: (x[0] - usual[0].min()).mean()
    assert stain(dead) < 0.3 * stain(usual)


def test_a_strong_plate_pushes_a_phenotype_further_the_same_way():
    wild, usual, strong = (sirna_morphology(0, "HUVEC", None), sirna_morphology(0, "HUVEC", 3),
                           optics_morphology(replace(PLAIN, strong_plates=1.0), 0, well_row()))
    change = lambda m: np.array([np.log(getattr(m, k) / getattr(wild, k)) for k in ("er_scale", "nucleoli", "spread")])
    np.testing.assert_allclose(change(strong), 1.6 * change(usual), rtol=1e-6)


# speed, and the table a person reads


def test_a_site_takes_little_longer_than_in_the_first_family():
    wells = [well_row(f"D{c:02}", sirna=c) for c in range(2, 14)]

    def seconds(sim):
        simulate_site(sim, wells[0], 1)
        times = []
        for _ in range(3):
            start = time.process_time()
            for w in wells:
                simulate_site(sim, w, 1)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(Simulation(optics=Optics())) < 2 * seconds(Simulation())  # 1.2 on a quiet machine


def test_the_table_of_effects_names_every_one():
    readme = (Path(__file__).parents[1] / "data" / "README.md").read_text(encoding="utf-8")
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in readme.splitlines() if line.startswith("| `")]
    rows = [r[:3] for r in rows if r[0].strip("`") in asdict(Optics())]
    table = pd.DataFrame(rows, columns=["name", "optics", "hard"])
    assert list(table.name.str.strip("`")) == list(asdict(Optics()))
    for family, column in (("optics", table.optics), ("hard_optics", table.hard)):
        assert list(column.astype(float)) == [float(v) for v in asdict(families[family]).values()]
