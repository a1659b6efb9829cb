"Somebody's own screen: plate maps, names of files, grey values, screen.json."
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from cases import each
from PIL import Image

from rcic_fastai.screen.planes import read_channel
from rcic_fastai.data.store import read_site
from rcic_fastai.data.image import MultiChannelImage
from rcic_fastai.screen.describe import describe_screen, find_grey_limits, guess_pattern
from rcic_fastai.screen.platemap import plate_map_wells, read_plate_map
from rcic_fastai.screen.project_tables import read_project_map
from rcic_fastai.report.core import run_context
from rcic_fastai.screen.channels import channel_name, grey_limits
from rcic_fastai.screen.sites import site_files
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.split import valid_mask
from rcic_fastai.data.pack import pack_screen
from rcic_fastai.data.store import verify_store


def write_table(folder, text, name="wells.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def write_images(folder, names, size=24, deep=True, seed=0):
    "Images of random grey values, all different"
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        x = rng.integers(300, 3000, (size, size)).astype(np.uint16)
        Image.fromarray(x if deep else (x // 16).astype(np.uint8)).save(folder / name)


# Plate maps

@each("text", ["Well,Compound\nB2,x\n", "Well;Compound\nB2;x\n", "Well\tCompound\nB2\tx\n",
               "\ufeffwell position, compound\nb02, x\n"])
def test_tables_as_people_write_them(tmp_path, text):
    rows = read_plate_map(write_table(tmp_path, text))
    wells = plate_map_wells(rows)
    assert (wells.well.tolist(), wells.treatment.tolist(), wells.sirna.tolist()) == (["B02"], ["x"], [0])
    assert wells.id_code.tolist() == ["experiment-1_1_B02"]


@each("well, name", [("b2", "B02"), ("B02", "B02"), ("P 24", "P24"), ("r02c02", "B02"), ("R16C24", "P24")])
def test_names_of_wells(tmp_path, well, name):
    assert plate_map_wells(read_plate_map(write_table(tmp_path, f"well,treatment\n{well},x\n"))).well.tolist() == [name]


@each("text, columns, message", [
    ("a,b\n1,2\n", None, "is known to name the well"),
    ("well,treatment\n", None, "the table is empty"),
    ("well,treatment\nAG1,x\n", None, "row 2: well 'AG1' is not on a plate"),
    ("well,treatment\nwell,treatment\nA1,x\n", None, "wells.csv: row 2: the header is there once more"),
    ("well,treatment\nA1,x\nA01,y\n", None, "row 3: id_code experiment-1_1_A01 is already in wells.csv: row 2"),
    ("well,treatment,well_type\nA1,x,control\n", None, "well_type 'control' is unknown"),
    ("well,treatment,split\nA1,x,trian\n", None, "split 'trian' is unknown; did you mean 'train'?"),
    ("well,batch\nA1,a/b\n", None, "has a slash in its name"),
    ("well,batch\nA1,\n", None, "row 2: experiment is empty"),
    ("well,drug\nA1,x\n", dict(treatment="drgu"), "did you mean 'drug'?"),
    ("well,drug\nA1,x\n", dict(treatmnt="drug"), "did you mean 'treatment'?"),
])
def test_faults_of_a_table_are_named(tmp_path, text, columns, message):
    with pytest.raises(ValueError) as e:
        plate_map_wells(read_plate_map(write_table(tmp_path, text), columns))
    assert message in str(e.value)


def test_plates_treatments_and_controls_are_numbered(tmp_path):
    text = "batch,barcode,well,gene,dose\n" + "".join(f"b{b},P{p:03},A{w},{g},{w}\n" for b in (1, 2) for p in (7, 30)
                                                      for w, g in enumerate(("DMSO", "g10", "g9", ""), 1))
    wells = plate_map_wells(read_plate_map(write_table(tmp_path, text)), negative=["DMSO"])
    assert wells.groupby("plate_name").plate.unique().map(list).to_dict() == {"P007": [1], "P030": [2]}
    assert wells.dropna(subset="treatment").drop_duplicates("treatment").set_index(
        "treatment").sirna.to_dict() == {"g9": 0, "g10": 1, "DMSO": 2}
    assert set(wells[wells.treatment.isna()].split) == {"test"}
    assert set(wells[wells.treatment.notna()].split) == {"train"}
    assert set(wells[wells.treatment == "DMSO"].well_type) == {"negative_control"}
    assert wells.dose.tolist() == wells.well.str[-1].tolist()  # other columns are kept


# Names of files

@each("names, pattern", [
    (["B02_DAPI.tif", "B02_DNA.tif", "B02_ER.tif"], "{well}_{channel}.tif"),
    (["B02_s1_w1.png", "B02_s1_w2.png", "B02_s2_w1.png", "B02_s2_w2.png"], "{well}_s{site}_w{channel}.png"),
    (["Row2/Col02/f1 DAPI.tif", "Row2/Col02/f1 ER.tif"], None),
    (["deep/P7/B2 DAPI.TIF", "deep/P7/B2 ER.TIF"], "deep/{plate}/{well} {channel}.TIF"),
    (["b1/B02/ER_field01.tif", "b1/B02/DAPI_field01.tif"], "{experiment}/{well}/{channel}_field{site}.tif"),
])
def test_names_of_files_are_guessed(tmp_path, names, pattern):
    write_images(tmp_path, names)
    rows = read_plate_map(write_table(tmp_path, "batch,plate,well,gene\nb1,P7,B2,x\n"))
    if pattern is None:
        with pytest.raises(ValueError, match="no part of .* names a well"): guess_pattern(tmp_path, rows)
        return
    assert guess_pattern(tmp_path, rows) == pattern
    screen = describe_screen(tmp_path, say=lambda *a: None)
    files = {str(p.relative_to(tmp_path)) for f in screen.sites().files for c in screen.channels
             for p in [type(tmp_path)(f.replace("{channel}", channel_name(c)))]}
    assert files == set(names)


@pytest.mark.slow
def test_channels_get_names_of_their_own(tmp_path):
    "Files are found by what they are called, pictures show the other name; a later batch takes both from the first."
    names = [f"B{c:02}_ch{i}.tif" for c in (2, 3) for i in (1, 2)]
    for folder in ("first", "later"):
        write_images(tmp_path / folder, names)
        write_table(tmp_path / folder, "well,gene\nB2,x\nB3,y\n")
    quiet = dict(say=lambda *a: None)
    screen = describe_screen(tmp_path / "first", channels=["2=ER", "1=DAPI"], **quiet)
    assert [channel_name(c) for c in screen.channels] == ["ER", "DAPI"]
    assert read_screen(tmp_path / "first").channels == screen.channels
    row = screen.sites().iloc[0]
    assert [Path(f).name for f in site_files(row.files, screen.channels)] == ["B02_ch2.tif", "B02_ch1.tif"]
    assert [ax.get_title() for ax in screen.show_well("B2")[1:3]] == ["1 ER", "2 DAPI"]
    store = pack_screen(screen, tmp_path / "store")
    assert not len(verify_store(store, screen.sites())) and read_screen(tmp_path / "store").channels == screen.channels
    assert describe_screen(tmp_path / "later", like=tmp_path / "first", **quiet).channels == screen.channels
    with pytest.raises(ValueError, match="two channels are called 'DAPI': 1=DAPI, 2=DAPI"):
        describe_screen(tmp_path / "first", channels=["1=DAPI", "2=DAPI"], **quiet)
    with pytest.raises(ValueError, match="channel 'DAPI' has no images.*; 1=DAPI gives one another name"):
        describe_screen(tmp_path / "first", channels=["DAPI"], **quiet)


@pytest.mark.parametrize("names, message", [
    ([], "there are no images in that folder"),
    (["img_0001.tif", "img_0002.tif"], "no part of img_0001.tif names a well in all of the 2 images; say how files"),
    (["B02_1.tif", "B02_2.tif"], "B02_1.tif and B02_2.tif: what '1' and '2' mean is not clear; say how files are"),
])
def test_names_that_cannot_be_guessed(tmp_path, names, message):
    write_images(tmp_path, names)
    write_table(tmp_path, "well\nB2\n")
    with pytest.raises(ValueError) as e: describe_screen(tmp_path)
    assert message in str(e.value) and ("--files" in str(e.value) or not names)


def test_a_pattern_must_tell_wells_apart(tmp_path):
    write_images(tmp_path, [f"P{p}/B02_{c}.tif" for p in (1, 2) for c in "xy"])
    write_table(tmp_path, "plate,well\nP1,B02\nP2,B02\n")
    with pytest.raises(ValueError, match="row 3: well B02 is there a second time"):
        describe_screen(tmp_path, files="P1/{well}_{channel}.tif")
    assert len(describe_screen(tmp_path, files="{plate}/{well}_{channel}.tif", say=lambda *a: None).sites()) == 2


# Grey values

def test_one_scale_for_the_whole_screen(tmp_path):
    "The limits are the percentiles of all images, and every image is scaled by them"
    rng, planes = np.random.default_rng(1), {}
    for well, bright in (("A01", 1), ("A02", 4)):
        planes[well] = (rng.integers(100, 900, (40, 40)) * bright).astype(np.uint16)
        for c in ("DAPI", "ER"): Image.fromarray(planes[well]).save(tmp_path / f"{well}_{c}.tif")
    write_table(tmp_path, "well\nA1\nA2\n")
    screen = describe_screen(tmp_path, say=lambda *a: None)
    low, high = np.percentile(np.concatenate([p[::2, ::2].ravel() for p in planes.values()]), (0.1, 99.9))
    assert grey_limits(screen.channels[0]) == (int(np.floor(low)), int(np.ceil(high)))
    low, high = grey_limits(screen.channels[0])
    for row in screen.sites().itertuples():
        expected = np.round((np.clip(planes[row.well], low, high) - low) / (high - low) * 255)
        np.testing.assert_allclose(read_site(row.files, screen.channels)[0].astype(float), expected, atol=1)
    assert read_site(screen.sites().files.iloc[0], screen.channels).mean() < read_site(screen.sites().files.iloc[1],
                                                                                       screen.channels).mean() / 2


def test_eight_bits_stay_as_they_are(tmp_path):
    write_images(tmp_path, ["A01_1.png", "A01_2.png"], deep=False)
    write_table(tmp_path, "well\nA1\n")
    screen = describe_screen(tmp_path, files="{well}_{channel}.png", say=lambda *a: None)
    assert screen.channels == ("1", "2")
    np.testing.assert_array_equal(read_site(screen.sites().files.iloc[0], screen.channels)[1],
                                  np.asarray(Image.open(tmp_path / "A01_2.png")))


def test_images_that_cannot_be_channels(tmp_path):
    write_images(tmp_path, ["a.tif"])
    stack = [Image.fromarray(np.zeros((4, 4), np.uint16))] * 3
    stack[0].save(tmp_path / "stack.tif", save_all=True, append_images=stack[1:])
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 4, 3), np.uint8)).save(tmp_path / "rgb.png")
    Image.fromarray(np.full((4, 4), 7, np.uint16)).save(tmp_path / "flat.tif")
    write_images(tmp_path, ["eight.png"], deep=False)
    with pytest.raises(ValueError, match="stack.tif holds 3 images"): find_grey_limits([tmp_path / "stack.tif"])
    with pytest.raises(ValueError, match="rgb.png: a colour image"): find_grey_limits([tmp_path / "rgb.png"])
    with pytest.raises(ValueError, match="of one grey value, 7"): find_grey_limits([tmp_path / "flat.tif"])
    with pytest.raises(ValueError, match="images of a channel must be alike"):
        find_grey_limits([tmp_path / "a.tif", tmp_path / "eight.png"])
    with pytest.raises(ValueError, match="the second must be larger"): read_channel(tmp_path / "a.tif", limits=(5, 5))


# The screen

@pytest.fixture
def own(tmp_path):
    "Two batches of two plates, replicates within a batch, one well to predict, one without images"
    text, names = "batch,plate,well,gene\n", []
    for b in (1, 2):
        for p in (1, 2):
            for w, g in (("A01", "x"), ("A02", "y"), ("A03", "DMSO")):
                text += f"b{b},{p},{w},{g}\n"
                names += [f"b{b}/p{p}/{w}_s{s}_{c}.tif" for s in (1, 2) for c in ("DAPI", "ER")]
    write_images(tmp_path / "own", names + ["b2/p2/A04_s1_DAPI.tif", "b2/p2/A04_s1_ER.tif", "b2/p2/overview.tif"],
                 size=64)
    write_table(tmp_path / "own", text + "b2,2,A04,\nb2,2,A05,x\n")
    return tmp_path / "own"


FILES = "{batch}/p{plate}/{well}_s{site}_{channel}.tif"


def test_a_described_screen_is_a_screen(own, tmp_path):
    said = []
    screen = describe_screen(own, files=FILES, negative=["DMSO"], say=said.append)
    clipped = json.loads((own / "screen.json").read_text())["clipped"].values()
    assert all(0 <= share < .002 for shares in clipped for share in shares)
    assert said == ["Columns of wells.csv: well = well, treatment = gene, plate = plate, experiment = batch",
                    "Channels are in the order of their names: DAPI, ER; pictures show the first as the nucleus, and "
                    "channels=... (--channels ER,DAPI) gives another order",
                    *(f"Channel {c}: of the pixels looked at, {low:.2%} are darker than these grey limits and "
                      f"{high:.2%} brighter" for c, (low, high) in zip(screen.channels, clipped)),
                    f"25 sites of 13 wells, 1 to 2 of each, named {FILES}; 1 well has no images; 1 image belongs to no "
                    "well"]
    again = read_screen(own)
    pd.testing.assert_frame_equal(again.sites(), screen.sites())
    assert again.replicates and again.layout == "platemap" and len(again.wells) == 14
    assert json.loads((own / "screen.json").read_text())["treatments"] == ["x", "y", "DMSO"]
    elsewhere = describe_screen(own, files=FILES, negative=["DMSO"], out=tmp_path / "description", say=said.append)
    assert [p.name for p in sorted((tmp_path / "description").iterdir())] == [
        "images.parquet", "screen.json", "wells.csv"]
    np.testing.assert_array_equal(read_site(elsewhere.sites().files.iloc[3], elsewhere.channels),
                                  read_site(screen.sites().files.iloc[3], screen.channels))


def test_a_store_of_it(own, tmp_path):
    screen = describe_screen(own, files=FILES, say=lambda *a: None)
    store = pack_screen(screen, tmp_path / "packed", progress=False)
    assert not len(verify_store(store, screen.sites(), progress=False))
    packed = read_screen(tmp_path / "packed")
    a, b = screen.sites().set_index("site_id"), packed.sites().set_index("site_id")
    assert set(a.index) == set(b.index) and packed.channels == screen.channels
    for i in a.index[::7]:
        np.testing.assert_array_equal(read_site(a.files[i], screen.channels), read_site(b.files[i], packed.channels))


def test_a_later_batch_is_read_like_the_first(own, tmp_path):
    screen = describe_screen(own, files=FILES, negative=["DMSO"], say=lambda *a: None)
    write_images(tmp_path / "later", ["A01_DAPI.tif", "A01_ER.tif", "A02_DAPI.tif", "A02_ER.tif"], seed=9)
    write_table(tmp_path / "later", "well,gene\nA01,new\nA02,y\n")
    later = describe_screen(tmp_path / "later", like=own, say=lambda *a: None)
    assert later.channels == screen.channels and later.wells.sirna.tolist() == [3, 1]
    (own / "wells.csv").write_text((own / "wells.csv").read_text().replace("b1,1,A01,x", "b1,1,A01,z"))
    with pytest.raises(ValueError, match="wells.csv: row 2: treatment 'z' has no number in screen.json"):
        read_screen(own)


def test_faults_of_a_description_are_named(own):
    with pytest.raises(FileNotFoundError, match="rcic-describe"): read_screen(own)
    with pytest.raises(ValueError, match="channel 'DPAI' has no images; did you mean 'DAPI'?"):
        describe_screen(own, files=FILES, channels=["DPAI"])
    with pytest.raises(FileNotFoundError, match="is not a folder"): describe_screen(own / "nothing")
    write_table(own, "well\nA1\n", "second.csv")
    with pytest.raises(ValueError, match="holds 2 CSV files, .*; say which is the plate map"):
        describe_screen(own, files=FILES)
    (own / "screen.json").write_text("{}")
    with pytest.raises(ValueError, match="screen.json: 'table' is missing"): read_screen(own)


@pytest.mark.parametrize("channels", [["1"] * 6, ["1=a", "2=a"], ["DAPI[1-9]", "DAPI?"]])
def test_channels_are_named_once(own, channels):
    describe_screen(own, files=FILES, say=lambda *a: None)
    path = own / "screen.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "channels": channels}))
    with pytest.raises(ValueError, match="screen.json: two channels are called '(1|a|DAPI)': "): read_screen(own)


def test_a_control_is_negative_or_positive(own):
    with pytest.raises(ValueError, match="'x' is given as a negative and as a positive control"):
        describe_screen(own, files=FILES, negative=["DMSO", "x"], positive=["x"], say=lambda *a: None)
    assert not (own / "screen.json").exists()
    describe_screen(own, files=FILES, negative=["DMSO"], positive=["x"], say=lambda *a: None)
    path = own / "screen.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "positive": ["x", "DMSO"]}))
    with pytest.raises(ValueError, match="screen.json and its table do not fit: 'DMSO' is given as"): read_screen(own)


def test_a_well_is_shown(own):
    screen = describe_screen(own, files=FILES, say=lambda *a: None)
    axes = screen.show_well("A02", site=2)
    assert [a.get_title() for a in axes] == ["together", "1 DAPI", "2 ER"]
    assert axes[0].figure._suptitle.get_text() == "b1_1_A02, site 2 (2 sites), y"
    with pytest.raises(ValueError, match="has no images of well A05"): screen.show_well("A05", experiment="b2", plate=2)
    with pytest.raises(ValueError, match="no images of well A02, site 7; sites are 1, 2"): screen.show_well("A02", 7)


def test_which_of_several_wells_is_shown(own):
    screen, said = describe_screen(own, files=FILES, say=lambda *a: None), []
    screen.show_well("A02", say=said.append)
    assert said == ["There are 4 wells A02: the one shown is on plate 1 of b1; the others are on plate 2 of b1, "
                    "plate 1 of b2, plate 2 of b2; plate=... (--plate) and experiment=... (--experiment) choose"]
    for plate in ("02", 2):
        axes = screen.show_well("A02", plate=plate, experiment="b2", say=said.append)
        assert axes[0].figure._suptitle.get_text().startswith("b2_2_A02, site 1") and len(said) == 1
    with pytest.raises(ValueError, match="there is no plate '7'; expected one of '1', '2'"):
        screen.show_well(plate=7)
    with pytest.raises(ValueError, match="has no experiment 'b3'; expected one of 'b1'"):
        screen.show_well(experiment="b3")
    with pytest.raises(ValueError, match="there is no depth 2 to choose: .* one plane"): screen.show_well(z=2)
    plt.close("all")
    assert MultiChannelImage.create(screen.sites().files.iloc[0], screen.channels).shape == (2, 64, 64)


@pytest.mark.slow
def test_from_a_plate_map_to_a_submission(own, tmp_path):
    "Replicates: no plate groups and no one-to-one assignment; names of treatments in the submission"
    from rcic_fastai.run.predict import predict_run
    from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe
    from rcic_fastai.run.submit import submit_run
    from rcic_fastai.run.train import train_run

    screen, said = describe_screen(own, files=FILES, negative=["DMSO"], say=lambda *a: None), []
    recipe = change_recipe(laptop_recipe(get_recipe("laptop"), 1), "data.batch_size=4", "data.read_size=48")
    train_run(screen, recipe, tmp_path / "run", say=said.append)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        predict_run(tmp_path / "run", screen, "test", batchnorm="running", progress=False)  # one well is no domain
    # they are reduced when they are read, as in training
    assert not [w for w in caught if "was trained on images of" in str(w.message)]
    submission = pd.read_csv(submit_run(tmp_path / "run", screen, say=said.append))
    assert submission.columns.tolist() == ["id_code", "sirna", "treatment"]
    assert submission.id_code.tolist() == ["b2_2_A04"]
    assert submission.treatment[0] == ["x", "y"][submission.sirna[0]]
    context = run_context(tmp_path / "run", say=lambda *a: None)
    assert context.what == "treatment" and context.class_name(submission.sirna[0]) == submission.treatment[0]
    assert any("several wells within an experiment" in s for s in said)


@each("headings, found", [
    ("Position,Compound Name,batch,plate", True), ("well,Treatment_name", True), ("well,drug name,drug id", True),
    ("well,sample", True), ("well,compound,sample", True),
    ("well,sample,condition", False), ("well,dose,colour", False), ("well", False),
])
def test_columns_of_treatments(tmp_path, headings, found):
    "Known by more names where that is unambiguous; else an error names them, unless all wells are to be predicted"
    n = headings.count(",")
    lines = [",".join(["B02", "taxol", "1", "1"][:n + 1]), ",".join(["B03", "dmso", "1", "1"][:n + 1])]
    table = write_table(tmp_path, "\n".join([headings, *lines]) + "\n")
    write_images(tmp_path, [f"{w}_{c}.tif" for w in ("B02", "B03") for c in ("a", "b")])
    others, said = headings.split(",")[1:], []
    if not found and others:
        with pytest.raises(ValueError, match="wells.csv: no column is known to name the treatments") as e:
            describe_screen(tmp_path, table, say=said.append)
        assert "--column treatment=NAME" in str(e.value) and all(repr(c) in str(e.value) for c in others)
        assert not (tmp_path / "screen.json").exists()
    screen = describe_screen(tmp_path, table, columns={} if found or not others else dict(treatment=""),
                             say=said.append)
    assert ("Notice: wells.csv names no treatments: all wells are to be predicted" in said) != found
    assert screen.wells.split.tolist() == ["train" if found else "test"] * 2
    assert len(read_screen(tmp_path).wells) == 2
    if found and "compound,sample" not in headings: assert screen.wells.treatment.tolist() == ["taxol", "dmso"]


def test_which_column_became_what_is_said(tmp_path):
    table = write_table(tmp_path, "Barcode,Position,compound,dose,moa\nP1,B2,taxol,5,mitosis\nP1,B3,x,1,none\n")
    write_images(tmp_path, [f"P1/{w}_{c}.tif" for w in ("B02", "B03") for c in ("a", "b")])
    said = []
    describe_screen(tmp_path, table, say=said.append)
    assert said[0] == ("Columns of wells.csv: well = Position, treatment = compound, plate = Barcode; "
                       "kept: dose, moa")
    write_table(tmp_path, "Position,treatment\nB2,taxol\n", "second.csv")
    assert "treatment" not in read_plate_map(tmp_path / "second.csv", dict(treatment=""))


def test_wells_are_set_aside_by_names_of_ones_own(tmp_path):
    table = write_table(tmp_path, "Position,Drug,Batch,Donor\nB02,x,day1,a\nB02,y,day6,a\nB03,x,day6,b\n")
    wells = plate_map_wells(read_plate_map(table))
    assert wells.experiment[valid_mask(wells, "batch=day6")].tolist() == [
        "day6"] * 2 == wells.experiment[valid_mask(wells, "Batch=day6")].tolist()
    assert valid_mask(wells, "Donor=b").sum() == 1
    assert valid_mask(wells, "treatment=y").sum() == valid_mask(wells, "drug=y").sum() == 1
    with pytest.raises(ValueError, match="no well has experiment 'day7'; did you mean"):
        valid_mask(wells, "batch=day7")
    with pytest.raises(ValueError, match="valid 'colour=red' is not understood; expected experiment=NAME"):
        valid_mask(wells, "colour=red")


def numbers(screen):
    return screen.wells.dropna(subset="treatment").drop_duplicates("treatment").set_index("treatment").sirna.to_dict()


def test_treatments_keep_their_numbers(own):
    "Described again with a new treatment that would come first, with one that has gone, and with another column"
    describe_screen(own, files=FILES, negative=["DMSO"], say=lambda *a: None)
    text, said = (own / "wells.csv").read_text(), []
    (own / "wells.csv").write_text(text.replace("b2,2,A05,x", "b2,2,A05,aspirin"))
    assert numbers(describe_screen(own, files=FILES, negative=["DMSO"], say=said.append)) == dict(x=0, y=1, DMSO=2,
                                                                                                  aspirin=3)
    assert f"3 treatments keep the numbers they have in {own / 'screen.json'}; new: aspirin" in said
    (own / "wells.csv").write_text(text.replace(",x", ",y"))
    assert numbers(describe_screen(own, files=FILES, negative=["DMSO"], say=said.append)) == dict(y=1, DMSO=2)
    (own / "wells.csv").write_text("".join(f"{line},{('low', 'high')[i % 2] if i else 'dose'}\n"
                                           for i, line in enumerate(text.splitlines())))
    assert numbers(describe_screen(own, files=FILES, columns=dict(treatment="dose"), say=lambda *a: None)) == dict(
        high=0, low=1)


def test_a_description_stays_with_its_screen(own, tmp_path):
    "Neither over the description of other images, nor into a screen of another layout, nor into a store"
    screen = describe_screen(own, files=FILES, say=lambda *a: None)
    shutil.copytree(own, tmp_path / "copy")
    pack_screen(screen, tmp_path / "packed", progress=False)
    for name, text in dict(kaggle="id_code,experiment,plate,well,sirna\n", rxrx1="site_id,well_id,cell_type\n").items():
        (tmp_path / name).mkdir()
        (tmp_path / name / dict(kaggle="train.csv", rxrx1="metadata.csv")[name]).write_text(text + "a,b,c\n" * 2)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for name, message in dict(copy="and not those in", packed="holds a packed store", kaggle="train.csv",
                              rxrx1="metadata.csv").items():
        with pytest.raises((FileExistsError, ValueError), match=message):
            describe_screen(own, files=FILES, out=tmp_path / name, say=lambda *a: None)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (tmp_path / "named").mkdir()  # a plate map of one's own may have such a name
    write_images(tmp_path / "named", ["A01_x.png", "A01_y.png"])
    write_table(tmp_path / "named", "well,gene\nA01,x\n", "metadata.csv")
    assert len(describe_screen(tmp_path / "named", say=lambda *a: None).wells) == 1


@pytest.mark.slow
def test_a_run_knows_its_treatments_by_name(own, tmp_path):
    """A screen whose numbers mean other treatments is refused by all that reads it with the run; one that grew is
    welcome"""
    from rcic_fastai.run.predict import embed_run, predict_run
    from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe
    from rcic_fastai.run.submit import submit_run
    from rcic_fastai.run.train import finished_run, train_run

    quiet = dict(say=lambda *a: None)
    screen, run = describe_screen(own, files=FILES, negative=["DMSO"], **quiet), tmp_path / "run"
    recipe = change_recipe(laptop_recipe(get_recipe("laptop"), 1), "data.batch_size=4", "data.read_size=48",
                           "inference.batchnorm=running")
    train_run(screen, recipe, run, **quiet)
    info = json.loads((run / "run.json").read_text())
    assert info["treatments"] == {"0": "x", "1": "y", "2": "DMSO"}
    table = (own / "wells.csv").read_text()
    (own / "wells.csv").write_text(table.replace("b2,2,A05,x", "b2,2,A05,aspirin"))
    grown = describe_screen(own, files=FILES, negative=["DMSO"], **quiet)
    predict_run(run, grown, "test", progress=False, **quiet)
    named = pd.read_csv(submit_run(run, grown, **quiet))
    assert named.treatment[0] == info["treatments"][str(named.sirna[0])]
    (own / "screen.json").unlink()
    other = describe_screen(own, files=FILES, negative=["DMSO"], **quiet)
    assert numbers(other) == dict(aspirin=0, x=1, y=2, DMSO=3)
    before = (run / "submission.csv").read_bytes()
    for ask in (lambda: predict_run(run, other, "test", progress=False, **quiet),
                lambda: submit_run(run, other, **quiet), lambda: embed_run(run, other, progress=False, **quiet),
                lambda: run_context(run, own, **quiet),
                lambda: train_run(other, recipe, tmp_path / "second", start=run, **quiet)):
        with pytest.raises(ValueError,
                           match="has number . for treatment '.*', and in .* is .*: describe the screen --like"):
            ask()
    assert (run / "submission.csv").read_bytes() == before
    del info["treatments"]  # as an earlier version wrote it
    (run / "run.json").write_text(json.dumps(info))
    predict_run(run, grown, "test", progress=False, **quiet)
    assert finished_run(screen, recipe, run)


@each("word", ["#VALUE!", "#REF!", "#DIV/0!", "#N/A", "#NAME?", "NaT", "–", "—", "unknown", "TBD", "n.d."])
def test_words_of_programs_for_nothing_are_no_treatments(tmp_path, word):
    wells = plate_map_wells(read_plate_map(write_table(tmp_path, f"well,treatment\nA1,x\nA2,{word}\n")))
    assert wells.treatment.isna().tolist() == [False, True] and wells.split.tolist() == ["train", "test"]


def test_a_well_that_is_none_is_named_before_names_of_files_are_guessed(tmp_path):
    rows = read_plate_map(write_table(tmp_path, "well,treatment\nA1,x\nELLA,y\n"))
    with pytest.raises(ValueError, match="wells.csv: row 3: well 'ELLA'"):
        guess_pattern(tmp_path, rows)


def drawn(n_rows, n_columns, sep=",", name=None):
    "A plate as people draw it; DMSO in the first column, one cell empty"
    letters = [*map(chr, range(65, 91)), *(f"A{c}" for c in "ABCDEF")][:n_rows]
    heading = [name + sep * n_columns] if name else []
    return "\n".join([*heading, sep.join(["", *map(str, range(1, n_columns + 1))]),
                      *(sep.join([r, "DMSO", *(f"{name or ''}{r}{c}" for c in range(2, n_columns)), ""])
                        for r in letters)]) + "\n"


@each("n_rows, n_columns, last, sep", [(8, 12, "H11", ","), (16, 24, "P23", "\t"), (32, 48, "AF47", ";")])
def test_a_plate_that_is_drawn(tmp_path, n_rows, n_columns, last, sep):
    said = []
    table = write_table(tmp_path, drawn(n_rows, n_columns, sep), "plate.txt")
    rows, _ = read_project_map(table, say=said.append)
    wells = plate_map_wells(rows.assign(row=range(len(rows)))).set_index("well")
    assert len(wells) == n_rows * n_columns and "plate.txt is drawn as 1 plate" in said[0]
    assert (wells.treatment[last], wells.well_type["A01"]) == (last, "negative_control")
    assert wells.treatment.isna().sum() == n_rows  # the last column is empty


def test_plates_that_are_drawn_below_each_other(tmp_path):
    write_images(tmp_path, [f"{p}/{w}_{c}.tif" for p in ("X1", "X2") for w in ("A02", "B03") for c in ("a", "b")])
    for plate in ("X1", "X2"): os.utime(tmp_path / plate, (1e9, 1e9))  # what was made just now may still change unseen
    write_table(tmp_path, drawn(8, 12, name="X1") + "\n" + drawn(8, 12, name="X2"), "layout.txt")
    screen = describe_screen(tmp_path, say=lambda *a: None)
    assert screen.sites().treatment.tolist() == ["X1A2", "X1B3", "X2A2", "X2B3"]
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert len(describe_screen(tmp_path, say=lambda *a: None).sites()) == 4
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
    torn = drawn(8, 12).rsplit("\n", 2)[0]
    with pytest.raises(ValueError, match="torn.csv"): read_project_map(write_table(tmp_path, torn, "torn.csv"))


@each("sep", [";", "\t"])
def test_a_table_of_an_older_program_of_windows(tmp_path, sep):
    write_images(tmp_path, [f"{w}_{c}.tif" for w in ("B02", "B03") for c in ("a", "b")])
    text = "Well,Compound,Dose µM\nB02,K252a–β,5\nB03,Käse,1\n".replace(",", sep).replace("β", "ß")
    (tmp_path / "wells.txt").write_bytes(text.encode("cp1252"))
    (tmp_path / "log.txt").write_text("acquired on Monday\nby nobody\n")
    said = []
    screen = describe_screen(tmp_path, say=said.append)
    assert "wells.txt is not in UTF-8: read as cp1252, the encoding of Windows" in said
    assert screen.wells.treatment.tolist() == ["K252a–ß", "Käse"] and screen.wells["Dose µM"].tolist() == ["5", "1"]
    assert read_screen(tmp_path).wells.treatment.tolist() == ["K252a–ß", "Käse"]
    (tmp_path / "bad.csv").write_bytes(b"well,treatment\nA1,\x81\n")
    with pytest.raises(ValueError, match="bad.csv: row 2: not comma-separated UTF-8 text: byte 0x81"):
        read_project_map(tmp_path / "bad.csv")


def test_a_workbook(tmp_path):
    pytest.importorskip("openpyxl", reason="it writes the workbook")
    write_images(tmp_path, [f"{w}_{c}.tif" for w in ("B02", "B03") for c in ("a", "b")])
    pd.DataFrame(dict(Well=["B2", "B3"], Compound=["taxol", "NA"], dose=[5, 1.5])).to_excel(
        tmp_path / "wells.xlsx", index=False)
    screen = describe_screen(tmp_path, say=lambda *a: None)
    assert screen.wells.treatment.tolist()[0] == "taxol" and screen.wells.split.tolist() == ["train", "test"]
    assert read_screen(tmp_path).wells.dose.tolist() == ["5", "1.5"]
    (tmp_path / "broken.xlsx").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="broken.xlsx cannot be read as a workbook"):
        read_project_map(tmp_path / "broken.xlsx")


def test_a_workbook_without_openpyxl_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    (tmp_path / "wells.xlsx").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ImportError, match=r"^wells.xlsx is a workbook; pip install rcic_fastai\[excel\] to read it$"):
        read_project_map(tmp_path / "wells.xlsx")


def test_wells_to_predict_stay_so_in_a_table_of_ones_own(tmp_path):
    "Of a table that is rewritten, the column that is no treatment is none when it is read again"
    write_images(tmp_path, [f"{w}_{c}.tif" for w in ("B02", "B03") for c in ("a", "b")])
    (tmp_path / "wells.csv").write_bytes("well,drug,µ\nB02,x,1\nB03,y,2\n".encode("cp1252"))
    screen = describe_screen(tmp_path, columns=dict(treatment=""), say=lambda *a: None)
    assert set(screen.wells.split) == set(read_screen(tmp_path).wells.split) == {"test"}


def test_a_control_found_by_name_in_a_table_with_capitals(tmp_path):
    write_images(tmp_path, [f"P1/{w}_{c}.tif" for w in ("B02", "B03") for c in ("a", "b")])
    write_table(tmp_path, "Plate,Well,Treatment,Dose\nP1,B2,DMSO,0\nP1,B3,x,1\n")
    screen = describe_screen(tmp_path, say=lambda *a: None)
    assert screen.wells.well_type.tolist() == ["negative_control", "treatment"]
    assert screen.wells.Dose.tolist() == ["0", "1"] and len(read_screen(tmp_path).sites()) == 2


def test_like_takes_over_columns_controls_and_names(tmp_path):
    "The next plate, from another folder: what was said of the first need not be said again"
    for name, seed in (("first", 0), ("next", 1)):
        rng = np.random.default_rng(seed)
        (tmp_path / name / "day1").mkdir(parents=True)
        for well in ("B02", "B03", "B04", "C02"):
            for channel in ("w1", "w2"):
                image = Image.fromarray(rng.integers(0, 4000, (16, 16), dtype=np.uint16))
                image.save(tmp_path / name / "day1" / f"{well}-{channel}.tif")
    (tmp_path / "first" / "map.csv").write_text(
        "Position,What,Day\nB02,vehicle,day1\nB03,vehicle,day1\nB04,taxol,day1\nC02,colchicine,day1\n")
    (tmp_path / "next" / "other.csv").write_text(
        "Position,What,Day\nB02,vehicle,day1\nB03,vehicle,day1\nB04,,day1\nC02,,day1\n")
    first = describe_screen(tmp_path / "first", columns=dict(well="Position", treatment="What", experiment="Day"),
                            negative=["vehicle"], channels=["w2=ER", "w1=DAPI"], say=lambda *a: None,
                            files="{experiment}/{well}-{channel}.tif")
    said = []
    later = describe_screen(tmp_path / "next", like=tmp_path / "first", say=said.append)
    assert later.channels == first.channels
    assert later.experiments == ["day1"]
    assert later.wells.well_type.value_counts().to_dict() == {"negative_control": 2, "treatment": 2}
    assert set(later.wells[later.wells.well_type == "treatment"].split) == {"test"}
    assert "columns well=Position, treatment=What, experiment=Day" in said[0]
    assert "negative controls vehicle" in said[0]
    with pytest.raises(ValueError, match="no well has the control 'taxol'"):  # what is asked for is not dropped
        describe_screen(tmp_path / "next", like=tmp_path / "first", negative=["taxol"], say=lambda *a: None)
