"What wrote a folder of images: names, indexes and headers of microscopes and projects, and what cannot be guessed."

import json
import os
import re
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from cases import each
from formats_inputs import WELLS, hostile_zarr, make, ome_zarr, write_csv, write_tiff

from rcic_fastai.data.pack import pack_screen
from rcic_fastai.data.reader import site_size
from rcic_fastai.data.store import read_site, verify_store
from rcic_fastai.screen.channels import as_channel, channel_name
from rcic_fastai.screen.describe import describe_screen, read_well_table
from rcic_fastai.screen.formats import SYSTEMS, find_images
from rcic_fastai.screen.formats_core import list_folder, Listing, xml_elements
from rcic_fastai.screen.formats_guess import guess_names
from rcic_fastai.screen.formats_indexed import _harmony_index
from rcic_fastai.screen.formats_names import names_regex
from rcic_fastai.screen.image_index import write_sites
from rcic_fastai.screen.image_table import check_images, choose_t, choose_z, image_sites
from rcic_fastai.screen.image_wells import match_wells
from rcic_fastai.screen.name_parts import name_parts
from rcic_fastai.screen.pages import read_page
from rcic_fastai.screen.planes import read_plane
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.sites import check_files, present_sites
from rcic_fastai.screen.well_names import well_name

# input, system, names of channels, sites, planes of a stack, times, plates
TEN = [("harmony", "harmony", ["HOECHST 33342", "Alexa 568"], 12, 3, 1, ["BR00121482", "BR00121483"]),
       ("imagexpress", "metaxpress", ["1", "2"], 12, 1, 2, ["MyScreen"]),
       ("cellvoyager", "cellvoyager", ["1", "2"], 6, 1, 1, ["AssayPlate_Greiner_#655090"]),
       ("incell", "incell", ["390 - Blue", "473 - Green"], 6, 1, 1, [""]),
       ("gen5", "gen5", ["DAPI", "GFP"], 6, 1, 1, [""]),
       ("ome_tiff", "ome-tiff", ["DAPI", "GFP"], 6, 3, 1, [""]),
       ("imagej", "tiff-stack", ["1", "2"], 6, 3, 1, [""]),
       ("ome_set", "ome-tiff", ["DAPI", "GFP"], 6, 1, 1, [""]),
       ("ome_zarr_04", "ome-zarr", ["DAPI", "GFP"], 6, 3, 1, ["BR00121482"]),
       ("ome_zarr_05", "ome-zarr", ["DAPI", "GFP"], 6, 3, 1, ["BR00121482"]),
       ("load_data", "load-data", ["DNA", "ER"], 6, 1, 1, ["BR00121482"]),
       ("jump", "harmony", ["1", "2"], 12, 1, 1, ["BR00116991", "BR00116992"]),
       ("rxrx19a", "rxrx", ["1", "2", "3", "4", "5"], 12, 1, 1, ["1"]),
       ("rxrx3_core", "rxrx-rows", ["1", "2"], 6, 1, 1, ["1"])]


@pytest.mark.parametrize("name, system, channels, n_sites, n_planes, n_times, plates", TEN, ids=[t[0] for t in TEN])
def test_ten_real_conventions(name, system, channels, n_sites, n_planes, n_times, plates, tmp_path):
    if name.startswith("ome_zarr"): pytest.importorskip("zarr", reason="zarr writes the example")
    found = find_images(make(name, tmp_path))
    images = check_images(found.images)
    assert found.system == system and found.why
    assert [found.channel_names.get(c, c) for c in images.channel.unique()] == channels
    assert (images.z.nunique(), images.t.nunique(), images.plate.unique().tolist()) == (n_planes, n_times, plates)
    sites = image_sites(images).drop_duplicates(["batch", "plate", "well", "site"])
    assert len(sites) == n_sites
    if not name.startswith("rxrx"):
        fields = choose_t(images, 1).drop_duplicates(["plate", "well", "field"]).groupby("well").size()
        assert {w: n // len(plates) for w, n in fields.items()} == WELLS
    if (tmp_path / "wells.csv").is_file():
        assert (match_wells(images, pd.read_csv(tmp_path / "wells.csv").assign(file="wells.csv")) >= 0).all()


def spread(template, **parts):
    "A text with each <part> replaced by each of its values"
    out = [template]
    for key, values in parts.items(): out = [o.replace(f"<{key}>", v) for o in out for v in values]
    return out


FIELDS = [("A01", 1), ("B02", 1), ("B02", 2)]  # uneven
TIMED = ["X_20230918_135839", "Y_20230919_081500"]
GUID = "0D3B1A52-75E6-426C-8B41-71A5693784E3"
HARMONY = ["X__2021-03-29T16_51_44-Measurement 1", "Y__2021-03-29T19_02_10-Measurement 2"]
# folders of two plates, most with times; a name for each field; channels; and what lies next to them
LAYOUTS = {
    "harmony": (HARMONY, "<P>/Images/r0{r}c0{c}f0{f}p01-ch<C>sk1fk1fl1.tiff", "12", []),
    "columbus": ("XY", "<P>/00{r}00{c}-1-00{f}00100<C>.tif", "12", []),
    "metaxpress": (["2023-02-21/X", "2023-02-22/Y"], f"<P>/My_{{w}}_s{{f}}_w<C>{GUID}.tif", "12",
                   spread(f"2023-02-21/X/My_A01_s1_w<C>_thumb{GUID}.tif", C="12")),
    "cellvoyager": (TIMED, "<P>/Greiner_{w}_T0001F00{f}L01A0<C>Z01C0<C>.tif", "12",
                    [f"{TIMED[0]}/SC_BP445-45_40x_M10_CH01.tif"]),
    "cq1": ("XY", "<P>/Image/W{n}F000{f}T0001Z001C<C>.tif", "12", ["X/Projection/W0001F0001T0001Z001C1.tif"]),
    "incell": (TIMED, "<P>/{w0} - 0{c}(fld {f} wv <C>).tif", ["UV - DAPI", "Blue - FITC"], []),
    "incell-full": ("XY", "<P>/{w0}_0{c}_f{f}_c<C>_z1_t1.tif", ["1_xUV_mDAPI", "2_xBlue_mFITC"], []),
    "cellomics": (["X_150619170001", "Y_150619190001"], "<P>/<P>_{w}f0{f}d<C>.TIF", "01",
                  ["X_150619170001/X_150619170001_A01f01o1.TIF"]),
    "gen5": (["230125_110321_X", "230126_090000_Y"], "<P>/{w0}{c}_01_<C>_001.tif",
             ["1_{f}_DAPI", "2_{f}_Bright Field"], ["230125_110321_X/A1_-2_1_1_Stitched[DAPI 377,447]_001.tif"]),
    "leica": ("XY", "<P>/slide--S00/image--L00--S00--U0{c0}--V0{r0}--J8--E0--O0--X0{f}--Y00--T00--Z00--C0<C>.ome.tif",
              "01", []),
    "scanr": ("XY", "<P>/data/{w0}{c}--W0000{n}--P0000{f}--Z00000--T00000--<C>.tif", ["DAPI", "FITC"], []),
    "bd-pathway": (["2009-09-21_000", "2009-09-22_000"], "<P>/Well {w}/<C> - n00000{f}.tif",
                   ["Alexa 488 - Confocal", "Hoechst"], []),
    "rxrx": ("12", "images/HUVEC-1/Plate<P>/{w}_s{f}_w<C>.png", "12", []),
    "protein-atlas": (["921", "922"], "10005/<P>_{w}_{f}_<C>.jpg", ["blue", "green"],
                      ["10005/921_A01_1_blue_red_green.jpg"])}


def named(system):
    "(number of the plate, well, field, number of the channel, path) of two plates of different times, uneven fields"
    plates, template, channels, _ = LAYOUTS[system]
    for w, f in FIELDS:
        r, c = "AB".index(w[0]) + 1, int(w[1:])
        for p, plate in enumerate(plates):
            for k, channel in enumerate(channels):
                name = template.replace("<P>", plate).replace("<C>", channel)
                yield p, w, f, k, name.format(w=w, w0=w[0], r=r, c=c, r0=r - 1, c0=c - 1, f=f,
                                              n=f"{24 * (r - 1) + c:04}")


def names_of(system):
    "Paths of the images, and of what lies next to them"
    return [*(n[-1] for n in named(system)), *LAYOUTS[system][-1]]


NAMED = [s for s in SYSTEMS if s not in ("ome-zarr", "rxrx-rows", "load-data", "ome-tiff", "tiff-stack", "names")]


@pytest.mark.parametrize("system", NAMED)
def test_two_plates_uneven_fields_and_what_lies_next_to_them(system, tmp_path):
    for i, path in enumerate(names_of(system)):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path,
                         np.full((4, 4), i, np.uint16)) if path.suffix.lower().startswith(".tif") else path.touch()
    found = find_images(tmp_path, plate_size=384)
    images = check_images(found.images)
    assert found.system == system
    assert images.plate.nunique() == 2 and images.channel.nunique() == 2
    images = image_sites(images)  # BD Pathway has times instead of fields
    fields = images.drop_duplicates(["plate", "well", "site"]).groupby(["plate", "well"]).size()
    assert fields.index.get_level_values("well").tolist() == ["A01", "B02"] * 2 and fields.tolist() == [1, 2, 1, 2]
    what = dict(metaxpress={"thumbnails": 2}, cellvoyager={"pictures for corrections": 1}, cq1={"projections": 1},
                cellomics={"masks": 1}, gen5={"montages": 1})
    assert found.skipped == what.get(system, {"pictures of several colours": 1} if system == "protein-atlas" else {})
    if system not in ("protein-atlas", "rxrx", "bd-pathway"):
        rows = pd.DataFrame(dict(plate=["X", "X", "Y"], well=["A1", "B2", "b02"], file="map.csv"))
        assert np.bincount(match_wells(images, rows) + 1).tolist() == [2, 2, 4, 4]


# other ways in which the same systems name files: system, a folder of a plate, an image
OTHERS = [("harmony", "<P>/Images/r0{r}c0{c}f00{f}p1-ch<C>sk1fk1fl1.tiff"),
          ("columbus", "<P>/Images/00{r}00{c}-1-00{f}00100<C>.tif"),
          ("metaxpress", "<P>/My_B03_exp_{w}_s{f}_w<C>.TIF"), ("cq1", "<P>/W{n}F00{f}T0001Z01C<C>.tif"),
          ("metaxpress", f"<P>/TimePoint_1/a b_{{w}}_s{{f}}_w<C>{GUID}.tif"),
          ("cellvoyager", "<P>/Greiner_#655090_{w}_T0001F00{f}L01A0<C>Z01C0<C>.png"),
          ("incell", "<P>/{w0} - {c}(fld {f} wv <C> - DAPI z 1 time 1 - 2000 ms).tif"),
          ("gen5", "<P>/{w0}{c}_-1_1_{f}_Tsf[<C> 377,447]_001.tif"), ("cellomics", "<P>/<P>_{w0}{c}f{f}d<C>.png")]


@each("system, template", OTHERS)
def test_other_names_of_the_same_systems(system, template, tmp_path):
    for plate, channel in ((p, c) for p in TIMED for c in "12"):
        for w, f in FIELDS:
            r, c = "AB".index(w[0]) + 1, int(w[1:])
            name = template.replace("<P>", plate).replace("<C>", channel)
            path = tmp_path / name.format(w=w, w0=w[0], r=r, c=c, f=f, n=24 * (r - 1) + c)
            write_tiff(path, np.zeros((4, 4), np.uint16)) if path.suffix != ".png" else (
                path.parent.mkdir(exist_ok=True), path.touch())
    found = find_images(tmp_path, plate_size=384)
    images = check_images(found.images)
    assert found.system == system and found.skipped == {} and images.channel.nunique() == 2
    fields = images.drop_duplicates(["plate", "well", "field"]).groupby(["plate", "well"]).size()
    assert fields.index.get_level_values("well").tolist() == ["A01", "B02"] * 2 and fields.tolist() == [1, 2, 1, 2]


UNREAD = [("001001000.flex", "is 1 file of Opera such as P1/001001000.flex, which is not read: export them as TIFF"),
          ("P1_A01f00d0.C01", "1 file of Cellomics"), ("scan.czi", "1 file of Zeiss"),
          ("scan.nd2", "1 file of Nikon"),
          ("slide.scn", "1 file of Leica"), ("slide.svs", "1 file of a slide scanner"),
          ("s_A01.ets", "1 file of Olympus"), ("P1.h5", "1 file of a microscope"),
          ("P1.tar", "1 archive such as P1/P1.tar, which is not read: unpack them"), ("A01.tif.gz", "1 archive")]


@each("name, message", UNREAD)
def test_files_that_are_not_read(name, message, tmp_path):
    "A plate of them is refused, also with a few overviews next to it; one next to images is said"
    for k in (0, 1):
        write_tiff(tmp_path / f"P1/{name}", np.zeros((4, 4), np.uint16))
        several = message.replace("is 1 ", "are 2 ").replace("1 ", "2 ", 1).replace("which is", "which are")
        for one, more in (("file ", "files "), ("archive", "archives")): several = several.replace(one, more, 1)
        with pytest.raises(ValueError, match=message if k == 0 else several):
            find_images(tmp_path)
        write_tiff(tmp_path / f"P1/z_{name}", np.zeros((4, 4), np.uint16))
        write_tiff(tmp_path / "P1/A01.jpg", np.zeros((4, 4), np.uint8))
    for w in ("A02", "B01"): write_tiff(tmp_path / f"P1/{w}.jpg", np.zeros((4, 4), np.uint8))
    (what, n), = find_images(tmp_path).skipped.items()
    assert n == 2 and what.endswith(", which are not read") and f"such as P1/{name}" in what


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    for name in ("P1.xdce", "a.dat", "b.dat", "wells.csv", "notes"): (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"no images in that folder; its files are \.dat \(2\), .*\.xdce \(1\)"):
        find_images(tmp_path)


def test_a_plate_of_ome_zarr_that_is_given_itself_or_at_an_address(tmp_path):
    "The folder above it is meant; what is not on this machine is to be copied"
    pytest.importorskip("zarr", reason="zarr writes the example")
    ome_zarr(tmp_path / "own", "0.5", ("P1",))
    plate, = (tmp_path / "own").glob("*.zarr")
    with pytest.raises(ValueError, match=f"is a plate of OME-Zarr itself: give .* lies in, {plate.parent}"):
        describe_screen(plate, out=tmp_path / "out")
    memory = fsspec.filesystem("memory")
    for there in (plate.parent, plate):
        memory.put(str(there), "/test_formats_zarr", recursive=True)
        with pytest.raises(ValueError, match="is of OME-Zarr, whose plates are read from a disk: copy them to this"):
            describe_screen("memory://test_formats_zarr", out=tmp_path / "out")
        memory.rm("/test_formats_zarr", recursive=True)


def test_an_index_of_images_that_are_not_there(tmp_path):
    root = make("harmony", tmp_path)
    lost = sorted(root.rglob("r01c02*.tiff"))[:3]
    for path in lost: path.unlink()
    assert find_images(root).skipped == {"images that the index names are not there": 3}


def test_planes_times_and_names_of_one_system_in_another_folder(tmp_path):
    "A stack whose planes and times are folders, and the projection that the microscope has made"
    for folder in ("TimePoint_1", "TimePoint_1/ZStep_1", "TimePoint_1/ZStep_2", "TimePoint_2", "TimePoint_2/ZStep_1",
                   "TimePoint_2/ZStep_2"):
        (tmp_path / folder).mkdir(exist_ok=True)
        for w in (1, 2): tifffile.imwrite(tmp_path / folder / f"Mine_A01_s1_w{w}.TIF", np.zeros((4, 4), np.uint16))
    images = find_images(tmp_path).images
    assert sorted(images.z.unique()) == [-1, 1, 2] and sorted(images.t.unique()) == [1, 2]
    assert choose_z(images).z.tolist() == [1, 2] * 4 and image_sites(choose_z(images)).site.unique().tolist() == [1, 2]
    assert choose_z(choose_t(images, 2), 2).path.tolist() == [f"TimePoint_2/ZStep_2/Mine_A01_s1_w{w}.TIF"
                                                              for w in (1, 2)]


SPELLINGS = ["A1", "A01", "A001", "a-01", "A - 1", "A_01", "r01c01", "R1C1", "001001", "R01_C01"]


def test_wells_in_every_spelling():
    assert {well_name(s) for s in SPELLINGS} == {"A01"}
    every = [f"{r}{c:02}" for r in (*"ABCDEFGHIJKLMNOPQRSTUVWXYZ", *(f"A{x}" for x in "ABCDEF")) for c in range(1, 49)]
    assert len(set(map(well_name, every))) == 1536 and [well_name(w) for w in every] == every
    for wrong in ("", "A", "A0", "A49", "AG1", "1A", "well", "r00c01", "033001", "A1B"):
        with pytest.raises(ValueError, match="is no well|is not on a plate"): well_name(wrong)


def test_rows_and_columns_that_count_from_0(tmp_path):
    for r, c in ((0, 0), (0, 1), (1, 0)): Image.new("L", (4, 4)).save(tmp_path / f"r{r}_c{c}_f0_DAPI.png")
    found = find_images(tmp_path, files="r{row0}_c{column0}_f{site}_{channel}.png")
    assert found.images.well.tolist() == ["A01", "A02", "B01"]
    with pytest.raises(ValueError, match=r"r0_c0_f0_DAPI\.png: row 0 and column 0 count from 0.*say \{row0\}"):
        find_images(tmp_path, files="r{row}_c{column}_f{site}_{channel}.png")


def test_six_silent_errors(tmp_path):
    "Each is right now, or a message that shows two names of files"
    table = dict(well=["A01", "A02", "B01"])
    # fields, planes and times are no channels
    nine = spread("<w>_z<z>_t<t>_f<f>_<c>.png", w=table["well"], z="01", t="12", f="123", c=["DAPI", "ER"])
    assert guess_names(nine, table) == "{well}_z{z}_t{t}_f{site}_{channel}.png"
    # the time of a plate
    timed = [p for f in ("P1__2021-03-29", "P2__2021-03-30")
             for p in spread(f"{f}/<w>_<c>.png", w=table["well"], c=["DAPI", "ER"])]
    assert guess_names(timed, table | dict(plate=["P1", "P2"])) == "{plate}__2021-03-{*}/{well}_{channel}.png"
    # a well in the name of a plate
    named = spread("MyPlate_B03_exp/<w>_s<s>_<c>.png", w=["B03", "C04"], s="12", c=["DAPI", "ER"])
    assert guess_names(named, dict(well=["B03", "C04"])) == "MyPlate_B03_exp/{well}_s{site}_{channel}.png"
    # a first well with one field
    uneven = [p for w, n in WELLS.items() for p in spread(f"{w}_f<f>_<c>.png", f="123"[:n], c=["DAPI", "ER"])]
    assert guess_names(uneven, table) == "{well}_f{site}_{channel}.png"
    for path in uneven:
        (tmp_path / path).touch()
    images = check_images(find_images(tmp_path, known=table).images)
    assert images.drop_duplicates(["well", "field"]).groupby("well").size().to_dict() == WELLS
    # a thumbnail and a hidden file are no channels, and a number of its own for each file is none
    (tmp_path / "A01_f1_DAPI_thumb.png").touch()
    (tmp_path / "._A01_f1_DAPI.png").touch()
    assert check_images(find_images(tmp_path, known=table).images).channel.unique().tolist() == ["DAPI", "ER"]
    each = [p.replace(".png", f"_{i:04x}f.png") for i, p in enumerate(uneven)]
    assert guess_names(each, table) == "{well}_f{site}_{channel}_{*}.png"
    # two numbers that say nothing
    with pytest.raises(ValueError, match=r"A01_1_1.png and A01_\d_\d.png: what '1' and '2' mean is not clear.*--files"):
        guess_names(spread("<w>_<a>_<b>.png", w=table["well"], a="12", b="12"), table)


def test_guesses_that_can_be_wrong_are_refused(tmp_path):
    for path in ("P/A01_s1_w1.tif", "P/A01_s1_w2.tif", "P/A01_c1_w1.tif"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        tifffile.imwrite(tmp_path / path, np.zeros((4, 4), np.uint16))
    with pytest.raises(ValueError, match="P/A01_s1_w1.tif: what 'c1' and 's1' mean is not"):
        find_images(tmp_path, known=dict(well=["A01", "A02"]))
    fields = [f"{w}_{f}.png" for w, n in WELLS.items() for f in ("f1", "f2", "f3")[:n]]
    for path in fields: (tmp_path / path).touch()
    found = find_images(tmp_path, files="{well}_{channel}.png")
    assert found.skipped == {"images that do not fit": 3}
    with pytest.raises(ValueError, match="channel 'f3' is in 1 of 3 sites: B01_f3.png is there, and nothing"):
        check_images(found.images)
    assert len(check_images(found.images, ["f1"])) == 3
    alike = r"A02_f1.png and A02_f2.png are both well A02, field 1, channel '1'.*they differ in 'f1' and 'f2'"
    with pytest.raises(ValueError, match=alike):
        check_images(find_images(tmp_path, files="{well}_{*}.png").images)


def test_plates_that_cannot_be_told_apart(tmp_path):
    images = find_images(make("harmony", tmp_path)).images
    rows = pd.read_csv(tmp_path / "wells.csv").assign(file="wells.csv")
    with pytest.raises(ValueError, match="BR00121482__.* and BR00121483__.* are both of the one plate of wells.csv"):
        match_wells(images, rows[["well", "file"]][:3])
    assert (match_wells(images, rows[rows.plate == "BR00121482"]) >= 0).sum() == len(images) // 2
    with pytest.raises(ValueError, match="plate x of wells.csv has no images, and BR00121483__.* is of no plate of it"):
        match_wells(images, rows.assign(plate=["BR00121482"] * 3 + ["x"] * 3))
    with pytest.raises(ValueError, match="its plates are x, y, those of the images BR00121482, BR00121483"):
        match_wells(images, rows.assign(plate=["x"] * 3 + ["y"] * 3))


# what a guess makes of names that people give; P1 and P2 are plates of the plate map
GUESSED = {"<p>/<w>_s<f>_<c>.tif": (dict(c=["Hoechst", "Alexa_488"]), "{plate}/{well}_s{site}_{channel}.tif"),
           "<p>/<w>/<p>_<x>_s<f>_<c>.tif": ({}, "{plate}/{well}/P{*}_{*}_s{site}_{channel}.tif"),
           "<p>/Well<x>_Point<x>_000<f>_<c>_Seq.tif": ({}, "{plate}/Well{well}_{*}_{site}_{channel}_Seq.tif"),
           "<p>/<x>_taxol_<y>uM_s<f>_<c>.tif": ({}, "{plate}/{well}_taxol_{*}uM_s{site}_{channel}.tif"),
           "2021-03-2<y>/<p>/<x>--W000<y>--s<f>--<c>.tif": (
               {}, "2021-03-{*}/{plate}/{well}--W{*}--s{site}--{channel}.tif")}


@each("template, how", list(GUESSED.items()))
def test_names_that_people_give(template, how):
    said, pattern = how
    parts = dict(p=["P1", "P2"], f="12", c=["DAPI", "ER"]) | said
    names = [p for w, x, y in (("A1", "A01", "1"), ("B2", "B02", "2"), ("B10", "B10", "3"))
             for p in spread(template.replace("<w>", w).replace("<x>", x).replace("<y>", y), **parts)]
    for plates in (["P1", "P2"], ["P1"]):  # images of a plate that the map does not have are left out later
        assert guess_names(names, dict(well=["A01", "B02", "B10"], plate=plates)) == pattern


HOSTILE = ['<!DOCTYPE a [<!ENTITY b "bb"><!ENTITY c "&b;&b;">]><a>&c;</a>',
           '<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>',
           '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "b">]><a>&b;</a>']


def test_an_index_is_not_trusted(tmp_path):
    for i, text in enumerate(HOSTILE):
        path = tmp_path / f"{i}.xml"
        path.write_bytes(text.encode("utf-16" if "utf-16" in text else "utf-8"))
        with pytest.raises(ValueError, match="has a document type declaration, which is not read"):
            xml_elements(path, "a")
    (tmp_path / "deep.xml").write_text("<a>" * 100_000 + "</a>" * 100_000)
    assert len(xml_elements(tmp_path / "deep.xml", "a")) == 1
    for folder, path in dict(above="../../etc", root="/etc/1").items():
        hostile_zarr(tmp_path / folder, path)
        with pytest.raises(ValueError, match="leads out of|is no well"): find_images(tmp_path / folder)


def test_damaged_indexes_and_headers_name_the_file(tmp_path):
    root = make("harmony", tmp_path / "harmony")
    index = next(root.rglob("Index.idx.xml"))
    index.write_text(index.read_text()[:-30])
    with pytest.raises(ValueError, match="Index.idx.xml is no XML: .*line 1"): find_images(root)
    root = make("ome_tiff", tmp_path / "ome")
    (root / "A02_f1.ome.tiff").write_bytes(b"not a TIFF")
    with pytest.raises(ValueError, match="A02_f1.ome.tiff is damaged, or no TIFF file"): find_images(root)
    root = make("load_data", tmp_path / "table")
    next((root / "images").iterdir()).unlink()
    with pytest.raises(FileNotFoundError,
                       match=r"load_data.csv: row \d: .* does not exist in the folder of the images"):
        find_images(root)


def test_tables_with_a_row_per_site(tmp_path):
    "BBBC021 has no column for sites, and BBBC022 calls the well a position"
    for i in range(4): tifffile.imwrite(tmp_path / f"{i}.tif", np.eye(4, dtype=np.uint16))
    columns = {"ImageNumber": [1, 2], "Image_FileName_DAPI": ["0.tif", "1.tif"], "Image_PathName_DAPI": "Week1/x",
               "Image_FileName_Actin": ["2.tif", "3.tif"], "Image_PathName_Actin": "Week1/x",
               "Image_Metadata_Plate_DAPI": "Week1_22123",
               "Image_Metadata_Well_DAPI": "B02", "Image_Metadata_Compound": "DMSO"}
    write_csv(tmp_path / "BBBC021_v1_image.csv", columns)
    images = find_images(tmp_path).images
    assert images[["plate", "well", "field", "channel", "path"]].values.tolist() == [
        ["Week1_22123", "B02", 1, "Actin", "2.tif"], ["Week1_22123", "B02", 1, "DAPI", "0.tif"],
        ["Week1_22123", "B02", 2, "Actin", "3.tif"], ["Week1_22123", "B02", 2, "DAPI", "1.tif"]]
    described = describe_screen(tmp_path, out=tmp_path / "out", say=lambda *a: None)
    assert len(described.sites()) == 2 and described.wells[["plate", "well"]].values.tolist() == [[1, "B02"]]


def test_a_zarr_plate_is_not_walked(tmp_path):
    pytest.importorskip("zarr", reason="zarr writes the example")
    listing = list_folder(make("ome_zarr_04", tmp_path))
    assert listing.paths == ("plate.ome.zarr", "wells.csv")


# From a folder to pixels

def grey(files, channels):
    "Grey values of a site at its first and last pixel, before they become 8 bits"
    planes = files.planes([as_channel(c).file for c in channels])
    return [tuple(int(read_plane(p)[at, at]) for at in (0, 7)) for p in planes]


def described(name, root, **kwargs):
    "The screen of an input, read again"
    describe_screen(make(name, root), say=lambda *a: None, **kwargs)
    return read_screen(root)


# settings of describing; sites; names of channels; (0, 0) of both channels of well A02, field 2, plate by plate
PIXELS = [("harmony", {}, 12, ["HOECHST 33342", "Alexa 568"], [(1317, 1327), (4317, 4327)]),
          ("harmony", dict(z=1), 12, ["HOECHST 33342", "Alexa 568"], [(1313, 1323), (4313, 4323)]),
          ("harmony", dict(z="middle"), 12, ["HOECHST 33342", "Alexa 568"], [(1315, 1325), (4315, 4325)]),
          ("imagexpress", dict(time=1), 6, ["1", "2"], [(1313, 1323)]),
          ("imagexpress", dict(time=2), 6, ["1", "2"], [(1314, 1324)]),
          ("cellvoyager", {}, 6, ["1", "2"], [(1313, 1323)]),
          ("incell", {}, 6, ["390 - Blue", "473 - Green"], [(1313, 1323)]),
          ("gen5", {}, 6, ["DAPI", "GFP"], [(1313, 1323)]),
          ("ome_tiff", {}, 6, ["DAPI", "GFP"], [(1317, 1327)]),
          ("ome_tiff", dict(z=1, channels=["GFP", "DAPI"]), 6, ["GFP", "DAPI"], [(1323, 1313)]),
          ("imagej", {}, 6, ["1", "2"], [(1317, 1327)]),
          ("ome_set", {}, 6, ["DAPI", "GFP"], [(1313, 1323)]),
          ("ome_zarr_04", {}, 6, ["DAPI", "GFP"], [(1317, 1327)]),
          ("ome_zarr_05", dict(z=1), 6, ["DAPI", "GFP"], [(1313, 1323)]),
          ("load_data", {}, 6, ["DNA", "ER"], [(1313, 1323)]),
          ("jump", {}, 12, ["1", "2"], [(1313, 1323), (4313, 4323)])]


@pytest.mark.parametrize("name, how, n_sites, channels, values", PIXELS, ids=[f"{p[0]}-{p[1]}" for p in PIXELS])
def test_pixels_of_ten_real_conventions(name, how, n_sites, channels, values, tmp_path):
    if name.startswith("ome_zarr"): pytest.importorskip("zarr", reason="zarr writes the example")
    screen = described(name, tmp_path / name, **how)
    sites = screen.sites()
    assert len(sites) == n_sites and [channel_name(c) for c in screen.channels] == channels
    one = sites[(sites.well == "A02") & (sites.site == (1 if name.startswith("ome_zarr") else 2))]
    assert [grey(f, screen.channels) for f in one.files] == [[(v, v + 63) for v in plate] for plate in values]
    check_files(sites, screen.channels)
    assert {site_size(f, screen.channels) for f in sites.files} == {(8, 8)}
    x = sites.files.iloc[-1].read(screen.channels)
    assert x.shape == (2, 8, 8) and x.dtype == np.uint8 and x[0, 0, 0] < x[0, 7, 7]
    if name not in ("jump", "load_data"):
        assert screen.wells.groupby("treatment").size().to_dict() == dict.fromkeys(
            ["DMSO", "taxol", "nocodazole"], len(values))


def test_time_is_a_column_of_the_sites(tmp_path):
    screen = described("imagexpress", tmp_path)
    sites = screen.sites()
    assert len(sites) == 12 and sites.groupby("time").size().tolist() == [6, 6]
    one = sites[(sites.well == "A02") & (sites.time == 2)]
    assert grey(one.files.iloc[1], screen.channels)[0][0] == 1314


def test_planes_and_times_are_as_described_before(tmp_path):
    "In the store too, and next to a column of the plate map that is called time"
    root, said = make("imagexpress", tmp_path / "own"), []
    write_csv(root / "wells.csv", dict(well=list(WELLS), treatment=["DMSO", "x", "y"], time="24h"))
    screen = describe_screen(root, say=said.append)
    assert "time" not in screen.sites().time_point.unique() and set(screen.sites().time) == {"24h"}
    packed = pack_screen(screen, tmp_path / "store", progress=False) and read_screen(tmp_path / "store")
    for s in (screen, packed): assert s.sites().groupby("time_point").size().to_dict() == {1: 6, 2: 6}
    for time, n in ((2, 6), (None, 6), ("all", 12), (None, 12)):
        told = []
        assert len(describe_screen(root, time=time, say=told.append).sites()) == n
        assert ("2 times: time 2 is taken; --time all makes each a site" in told) == (n == 6)
    stack = make("imagej", tmp_path / "stack")
    for z, value in (("middle", 1315), (None, 1315), (1, 1313), (None, 1313), ("max", 1317)):
        sites = describe_screen(stack, z=z, say=said.append).sites()
        one = sites[(sites.well == "A02") & (sites.site == 2)].files.iloc[0]
        assert grey(one, ["1"])[0][0] == value
    assert "3 planes of depth: the maximum is taken; --z says otherwise" in said
    for how, message in ((dict(z="top"), "z is 'top', expected 'max'"), (dict(time="first"), "time is 'first', exp")):
        with pytest.raises(ValueError, match=message): describe_screen(root, say=said.append, **how)


# what is written into a plate map, and which treatments come out
FORMS = {"wells.txt": lambda t: t.to_csv(index=False, sep="\t").encode("utf-16"),
         "wells.csv": lambda t: t.assign(note="µM").to_csv(index=False, sep=";").encode("cp1252"),
         "other.csv": lambda t: t.assign(Row=["A", "A", "B"], Col=[1.0, 2.0, 1.0]).drop(columns="well").to_csv(
             index=False).encode(),
         "echo.csv": lambda t: t.rename(columns=dict(well="Destination Well", treatment="Sample Name")).to_csv(
             index=False).encode()}


@each("name", list(FORMS))
def test_plate_maps_as_people_save_them(name, tmp_path):
    for w in WELLS: Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path / f"{w}_DAPI.png")
    table = pd.DataFrame(dict(well=list(WELLS), treatment=["DMSO 0.1%", "x", "y"]))
    (tmp_path / name).write_bytes(FORMS[name](table))
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")  # no plate map
    if name.endswith("txt"): (tmp_path / "notes.csv").unlink()
    wells = describe_screen(tmp_path, say=lambda *a: None).wells.set_index("well")
    assert wells.treatment.to_dict() == dict(A01="DMSO 0.1%", A02="x", B01="y")
    assert wells.well_type["A01"] == "negative_control"
    truth = read_well_table(tmp_path / name, read_screen(tmp_path))
    assert truth.treatment.tolist() == table.treatment.tolist()


def test_compounds_in_any_form(tmp_path):
    for compounds in ("compounds.xlsx", "compounds.txt"):
        root = make("jump", tmp_path / compounds)
        old = root / "metadata/JUMP-Target-1_compound_metadata.tsv"
        table = pd.read_csv(old, sep="\t", dtype=str, keep_default_na=False)
        old.unlink()
        if compounds.endswith("txt"): (old.parent / compounds).write_bytes(table.to_csv(index=False).encode("utf-16"))
        else:
            pytest.importorskip("openpyxl", reason="openpyxl writes the example")
            table.to_excel(old.parent / compounds, index=False)
        wells = describe_screen(root, say=lambda *a: None).wells
        assert wells.treatment.unique().tolist() == ["DMSO", "CYT-997", "gabapentin-enacarbil"]


def test_wells_that_have_no_images_next_to_images_of_no_well(tmp_path):
    for system, image in (("gen5", "B1_01_1_1_DAPI_001.tif"), ("cellvoyager", ".*_B01_T0001F001L01A01Z01C01.tif"),
                          ("names", "B01_DAPI.png")):
        root = tmp_path / system
        if system != "names": make(system, root)
        else:
            for w in WELLS: write_tiff(root / f"{w}_DAPI.png", np.zeros((4, 4), np.uint8))
        write_csv(root / "wells.csv", dict(well=["A01", "A02"], treatment=["x", "y"]))
        assert len(describe_screen(root, say=lambda *a: None).wells) == 2  # more was imaged than is described
        write_csv(root / "wells.csv", dict(well=["A01", "A02", "B02"], treatment=["x", "y", "z"]))
        with pytest.raises(ValueError, match=f"wells.csv: well B02 has no images, and {image} is of no well"):
            describe_screen(root, say=lambda *a: None)


def test_numbers_of_planes_are_no_channels_in_a_pattern(tmp_path):
    for p in spread("<w>_z<z>_<c>.png", w=list(WELLS), z="01", c=["DAPI", "ER"]):
        write_tiff(tmp_path / p, np.arange(16, dtype=np.uint16).reshape(4, 4))
    write_csv(tmp_path / "wells.csv", dict(well=list(WELLS), treatment=list("xyz")))
    for files in ("{well}_{channel}.png", "{row}{column}_{channel}.png"):
        with pytest.raises(ValueError, match="'z0_DAPI' and 'z1_DAPI' differ in a number behind 'z'.*such as z{z}"):
            describe_screen(tmp_path, files=files, say=lambda *a: None)
    names = ["z0_DAPI", "z1_DAPI"]
    screen = describe_screen(tmp_path, files="{well}_{channel}.png", channels=names, say=lambda *a: None)
    assert [channel_name(c) for c in screen.channels] == names


def test_tables_of_jump_and_of_rxrx19a(tmp_path):
    wells = described("jump", tmp_path / "jump").wells.set_index(["plate_name", "well"])
    for plate in ("BR00116991", "BR00116992"):
        assert wells.loc[plate].treatment.tolist() == ["DMSO", "CYT-997", "gabapentin-enacarbil"]
        assert wells.loc[plate].well_type.tolist() == ["negative_control", "positive_control", "treatment"]
    screen = described("rxrx19a", tmp_path / "rxrx19a")
    sites = screen.sites()
    wells = screen.wells.set_index("well")
    assert len(sites) == 12 and screen.channels == ("1", "2", "3", "4", "5")
    assert (wells.loc["B02"].well_type, wells.loc["B02"].treatment) == ("negative_control", "Mock")
    assert wells.loc["AF47"].treatment == "GS-441524" and wells.loc["AF47"].treatment_conc == "3.0"
    one = sites[(sites.well == "AA02") & (sites.site == 2)].files.iloc[0]
    assert grey(one, screen.channels)[2] == (53, 53 + 15)


def test_images_in_rows_of_parquet_files(tmp_path):
    screen = described("rxrx3_core", tmp_path / "own")
    sites, wells = screen.sites(), screen.wells.set_index(["experiment", "well"])
    assert wells.loc[("gene-002", "AF47")][["treatment", "concentration", "gene"]].tolist() == ["MTOR_guide_2", "2.5",
                                                                                             "MTOR"]
    assert set(wells.xs("B02", level="well").well_type) == {"negative_control"}
    one = sites[(sites.experiment == "gene-002") & (sites.well == "AA02")].files.iloc[0]
    assert grey(one, screen.channels) == [(71, 86), (72, 87)]  # 10 * 7 + channel
    assert site_size(one, screen.channels) == (8, 8)
    check_files(sites, screen.channels)
    store = pack_screen(screen, tmp_path / "store", progress=False)
    assert not len(verify_store(store, sites, progress=False))
    file = next((tmp_path / "own/data").iterdir())
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=f"{file.name} is damaged, or no Parquet file"):
        for f in read_screen(tmp_path / "own").sites().files: f.read(screen.channels)


def test_what_is_said_of_a_system(tmp_path):
    said = []
    describe_screen(make("imagexpress", tmp_path), say=said.append)
    assert said.pop(0) == "Columns of wells.csv: well = well, treatment = treatment"
    assert said[0] == "Taken for negative controls: DMSO (1 well); --negative and --positive say otherwise"
    assert said[1].startswith("MetaXpress (ImageXpress) (metaxpress): 24 of 24 images are named like 2023-02-21/1334/")
    assert said[2:4] == ["24 thumbnails, left out", "2 times: each is a site; --time N keeps one"]
    again = []
    before = (tmp_path / "screen.json").read_bytes()
    describe_screen(tmp_path, say=again.append)
    assert (tmp_path / "screen.json").read_bytes() == before and any("keep the numbers they have" in s for s in again)


def test_an_index_is_not_walked_and_not_trusted(tmp_path):
    screen = described("harmony", tmp_path / "a")
    new = next((tmp_path / "a").rglob("r01c02f02p01-ch1sk1fk1fl1.tiff"))
    new.with_name("r01c02f03p01-ch1sk1fk1fl1.tiff").write_bytes(new.read_bytes())
    assert len(read_screen(tmp_path / "a").sites()) == len(screen.sites())
    new.unlink()
    with pytest.raises(FileNotFoundError, match="r01c02f02p01-ch1sk1fk1fl1.tiff does not exist"):
        check_files(read_screen(tmp_path / "a").sites(), screen.channels)
    index = pd.read_parquet(tmp_path / "a/images.parquet")
    for path in ("../b.tif", "/etc/passwd", "x/../../b.tif", "..\\b.tif", "C:/b.tif"):
        index.assign(path=path).to_parquet(tmp_path / "a/images.parquet")
        with pytest.raises(ValueError, match="leads to another folder"): read_screen(tmp_path / "a")
    index.drop(columns="page").to_parquet(tmp_path / "a/images.parquet")
    with pytest.raises(ValueError, match="images.parquet: column 'page' is missing"): read_screen(tmp_path / "a")
    description = tmp_path / "a/screen.json"
    description.write_text(description.read_text().replace('"images.parquet"', '"../images.parquet"'))
    with pytest.raises(ValueError, match="screen.json: index '../images.parquet' leads out of"):
        read_screen(tmp_path / "a")


def test_a_channel_that_is_missing_in_one_field(tmp_path):
    root, said = make("cellvoyager", tmp_path), []
    next(root.rglob("*_B01_T0001F003L01A02Z01C02.tif")).unlink()
    screen = describe_screen(root, say=said.append)
    assert "Channel 2: images of 5 of 6 sites only" in said
    sites, left_out = present_sites(screen.sites(), screen.channels)
    assert (len(sites), left_out) == (5, 1)
    lacking = screen.sites().files.iloc[-1]
    with pytest.raises(FileNotFoundError, match="channel 2 of 1: .*F003L01A01Z01C01.tif does not exist"):
        lacking.read(screen.channels)
    assert lacking.read(["1[0-5000]", "2[0-5000]?"])[1].max() == 0


def test_it_is_packed_and_read_like_any_screen(tmp_path):
    screen = described("harmony", tmp_path / "own")
    store = pack_screen(screen, tmp_path / "store", progress=False)
    assert not len(verify_store(store, screen.sites(), progress=False))
    packed = read_screen(tmp_path / "store")
    a, b = screen.sites().set_index("site_id"), packed.sites().set_index("site_id")
    assert set(a.index) == set(b.index) and packed.channels == screen.channels
    for i in a.index[::5]:
        np.testing.assert_array_equal(a.files[i].read(screen.channels), read_site(b.files[i], packed.channels))
    moved = tmp_path / "moved"
    (tmp_path / "own").rename(moved)
    assert read_screen(moved).sites().files.iloc[3].read(screen.channels).shape == (2, 8, 8)


def test_codecs_of_zarr_that_run_programs_are_refused(tmp_path):
    pytest.importorskip("zarr", reason="zarr reads the example")
    for kind, said, message in (
            (".zarray", dict(zarr_format=2, shape=[2, 8, 8], chunks=[1, 8, 8], dtype="<u2", order="C", fill_value=0,
                             compressor=None, filters=[dict(id="pickle")]), "the codec 'pickle' is not read"),
            (".zarray", dict(zarr_format=2, shape=[2, 8, 8], chunks=[1, 8, 8], dtype="|O", order="C", fill_value=0,
                             compressor=None, filters=None), "type 'O', expected whole numbers"),
            ("zarr.json", dict(zarr_format=3, node_type="array", shape=[2, 8, 8], data_type="uint16", codecs=[
                dict(name="sharding_indexed", configuration=dict(codecs=[dict(name="numcodecs.pickle")]))]),
             "the codec 'numcodecs.pickle' is not read")):
        folder = tmp_path / f"{len(message)}"
        folder.mkdir()
        (folder / kind).write_text(json.dumps(said))
        with pytest.raises(ValueError, match=message): read_page(folder, (0,))


# what a plate map calls the plates of each layout, where not X and Y
PLATES = {"bd-pathway": ["2009-09-21_000", "2009-09-22_000"], "rxrx": ["1", "2"], "protein-atlas": ["921", "922"]}


@pytest.mark.parametrize("system", NAMED)
def test_pixels_of_each_system(system, tmp_path):
    "Every plane is found where its name says, on both plates"
    for path in names_of(system):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((8, 8), 250, np.uint8)
        Image.fromarray(pixels).save(tmp_path / path)
    for p, well, field, k, path in named(system):
        value = 100 * p + 50 * (well == "B02") + 10 * field + k
        Image.fromarray(np.full((8, 8), value, np.uint8)).save(tmp_path / path, quality=100)
    plates = PLATES.get(system, ["X", "Y"])
    write_csv(tmp_path / "wells.csv", dict(plate=np.repeat(plates, 2), well=["A1", "B2"] * 2, treatment=list("abcd")))
    describe_screen(tmp_path, plate_size=384, say=lambda *a: None)
    screen = read_screen(tmp_path)
    sites, found = screen.sites(), []
    for s in sites.sort_values(["plate_name", "well", "site"]).itertuples():
        found.append([int(x[0, 0]) for x in s.files.read(screen.channels)])
    expected = [[100 * p + 50 * (w == "B02") + 10 * f + k for k in (0, 1)]
                for p in (0, 1) for w, f in FIELDS]
    if system in ("gen5", "incell", "incell-full", "bd-pathway"):  # channels by name, which are in another order
        expected = [e if screen.channels[0].startswith(("DAPI", "Alexa")) else e[::-1] for e in expected]
    assert found == expected


def test_sites_of_a_pattern_are_found_again_when_something_has_changed(tmp_path, monkeypatch):
    "What was found is read as long as files, table and pattern are the same"
    import rcic_fastai.screen.describe as describe
    import rcic_fastai.screen.described as module

    walked, find = [], module.find_sites
    for m in (describe, module):
        monkeypatch.setattr(m, "find_sites", lambda *args: walked.append(args) or find(*args))
    for well in ("A01", "A02", "B01"):
        for c in ("DAPI", "ER"): Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path / f"{well}_{c}.png")
    write_csv(tmp_path / "wells.csv", dict(well=["A01", "A02"], treatment=["x", "y"]))
    first = describe_screen(tmp_path, say=lambda *a: None).sites()
    assert len(walked) == 1 and len(first) == 2
    pd.testing.assert_frame_equal(read_screen(tmp_path).sites(), first)
    assert len(walked) == 1
    write_csv(tmp_path / "wells.csv", dict(well=["A01", "A02", "B01"], treatment=["x", "y", "x"]))
    assert len(read_screen(tmp_path).sites()) == 3 and len(walked) == 2
    for c in ("DAPI", "ER"): (tmp_path / f"A02_{c}.png").unlink()
    assert len(read_screen(tmp_path).sites()) == 2 and len(walked) == 3
    (tmp_path / "images.parquet").unlink()
    assert len(read_screen(tmp_path).sites()) == 2 and len(walked) == 4
    describe_screen(tmp_path, say=lambda *a: None)
    kept = pd.read_parquet(tmp_path / "images.parquet")
    d = json.loads((tmp_path / "screen.json").read_text())
    found_with = module._found_with(tmp_path, d, module._names_now(tmp_path, d))
    write_sites(tmp_path / "images.parquet", kept.assign(files="../x_{channel}.png"), **found_with)
    with pytest.raises(ValueError, match="leads to another folder"): read_screen(tmp_path)


def test_a_screen_whose_folders_have_not_changed_is_not_listed_again(tmp_path, monkeypatch):
    "The times of the folders say so; a file more in one of them, and all are listed"
    import rcic_fastai.screen.described as module

    images, out = tmp_path / "images", tmp_path / "out"
    for plate in ("P1", "P2"):
        (images / plate).mkdir(parents=True)
        for name in ("A01_DAPI", "A01_ER", "A02_DAPI", "A02_ER"):
            Image.fromarray(np.full((8, 8), 9, np.uint8)).save(images / plate / f"{name}.png")
        os.utime(images / plate, (1e9, 1e9))
    os.utime(images, (1e9, 1e9))
    plates = dict(plate=["P1", "P1", "P2", "P2"], well=["A01", "A02"] * 2, treatment=list("abcd"))
    write_csv(tmp_path / "wells.csv", plates)
    describe_screen(images, tmp_path / "wells.csv", out=out, say=lambda *a: None)
    listed, list_folder = [], module.list_folder
    monkeypatch.setattr(module, "list_folder", lambda *args: listed.append(args) or list_folder(*args))
    assert len(read_screen(out).sites()) == 4 and not listed
    for c in ("DAPI", "ER"): (images / "P2" / f"A02_{c}.png").unlink()
    assert len(read_screen(out).sites()) == 3 and listed


def test_a_pattern_guessed_from_some_names_is_that_of_all():
    "Of very many names some are looked at; what only others have is seen all the same"
    import rcic_fastai.screen.formats as module

    names = [f"Plate{p}/{r}{c:02}_s{s}_w{w}.tif" for p in (1, 2) for r in "ABCDEFGHIJKLMNOP" for c in range(1, 25)
             for s in range(1, 8) for w in (1, 2, 3)]
    of_some = lambda names: module._pattern_of_some(Listing(Path("."), tuple(names)))
    assert len(names) > 16_000 and of_some(names) == guess_names(names)
    assert of_some([*names, "Plate1/A01_s1_w1_x.tif"]) is None
    assert of_some([n.replace("_w", f"_x{i % 7}_w") for i, n in enumerate(names)]) is None


@each("pattern", ["{plate}/{well}_s{site}_{*}_{channel}.tif", "{row}/{column}/{channel}.tif", "{well}_{channel}.tif",
                 None])
def test_both_engines_read_names_alike(pattern, monkeypatch):
    "RE2 where it says what Python says; where a part is empty or left out, too"
    import rcic_fastai.screen.name_parts as module

    regex = re.compile(r"(?P<where>(?:[^/]+/)*?)(?P<well>[A-P]\d\d)(?:_s(?P<field>\d+?))?(?:_w(?P<channel>\d+))?\.tif")
    if pattern: regex = names_regex(pattern, dict(plate=["1", "12", "a.b"]))
    names = [f"{folder}{name}.tif" for folder in ("", "12/", "012/", "a.b/", "axb/", "AA/02/", "x/y/")
             for name in ("A01_s1_x_DAPI", "B-3_s07__a b", "A01_w1", "A01_s12_w3", "A01", "b03_s\n1_2", "{A}1_s1_2")]
    assert module._by_arrow(names, regex) is not None
    quick = name_parts(names, regex)
    monkeypatch.setattr(module, "_by_arrow", lambda *args: None)
    assert len(quick) > 1 and quick.equals(name_parts(names, regex))


def test_an_index_of_harmony_that_is_not_like_others(tmp_path):
    "Images whose channel is said elsewhere are all read; one that is cut off is named with its line"
    path = tmp_path / "Index.xml"
    image = '<Image id="{0}"><URL>{0}.tif</URL></Image>'
    path.write_text(f'<E><Images>{image.format(1)}{image.format(2)}</Images>'
                    '<Map><Entry ChannelID="1"><ChannelName>DAPI</ChannelName></Entry></Map></E>')
    said = _harmony_index(path)
    assert said["files"] == ["1.tif", "2.tif"] and said["names"] == {"1": "DAPI"}
    image = "<Image><ChannelID>{0}</ChannelID><ChannelName>c{0}</ChannelName><URL>{0} &amp; {1}.tif</URL></Image>"
    images = "".join(image.format(c, f) for f in range(3) for c in (1, 2))
    path.write_text(f'<E><Wells><Image id="1"/></Wells><Images>{images}</Images><PlateID>P1</PlateID></E>')
    said = _harmony_index(path)
    assert said["files"] == [f"{c} & {f}.tif" for f in range(3) for c in (1, 2)]
    assert said["names"] == {"1": "c1", "2": "c2"} and said["plate"] == "P1"
    for cut in (10, 60, 400):
        path.write_text(f"<E><Images>{images}</Images></E>"[:cut])
        with pytest.raises(ValueError, match=r"Index\.xml is no XML: .* line 1"): _harmony_index(path)
    path.write_text("")
    with pytest.raises(ValueError, match="is no XML"): _harmony_index(path)


def refused(folder, **how):
    with pytest.raises(ValueError) as e: describe_screen(folder, say=lambda *a: None, **how)
    return str(e.value)


def test_what_a_person_may_have_meant(tmp_path):
    "Another system, a microscope by its own name, a folder inside, a column of another table, roles in a column"
    own, project = make("harmony", tmp_path / "own"), make("jump", tmp_path / "project")
    for system in ("cellvoyager", "rxrx", "ome-tiff", "load-data"):
        assert "Leave system (--system) out: this looks like Harmony" in refused(own, system=system)
    for name, meant in (("phenix", "harmony"), ("opera-phenix", "harmony"), ("ImageXpress", "metaxpress"),
                        ("cv8000", "cellvoyager"), ("cytation", "gen5"), ("In Cell", "incell")):
        assert f"system {name!r} is unknown; did you mean '{meant}'" in refused(own, system=name)
    assert "--system list shows all" in refused(own, system="xyz")
    assert f"{own}/wells.csv may be it: give that folder (--data {own})" in refused(next(own.glob("BR*")) / "Images")
    said = refused(project, columns=dict(treatment="pert_inam"))
    assert "compound_metadata.tsv: there is no column 'pert_inam'; did you mean 'pert_iname'?" in said
    said = refused(project, columns=dict(well_type="pert_type"))
    assert "well_type 'control' is unknown; expected treatment, positive_control" in said and "--negative" in said
    screen = describe_screen(project, positive=[""], say=lambda *a: None)
    assert screen.wells.well_type.value_counts().to_dict() == dict(treatment=4, negative_control=2)
    assert "positive_control" in set(describe_screen(project, say=lambda *a: None).wells.well_type)
    screen = describe_screen(own, negative=[""], out=tmp_path / "out", say=lambda *a: None)
    assert set(screen.wells.well_type) == {"treatment"}


def test_a_folder_of_several_screens_is_not_read_as_one_of_them(tmp_path):
    for name, system in (("a", "harmony"), ("b", "cellvoyager")): make(system, tmp_path / "two/images" / name)
    (tmp_path / "two/images/a/wells.csv").rename(tmp_path / "two/wells.csv")
    (tmp_path / "two/images/b/wells.csv").unlink()
    said = refused(tmp_path / "two")
    assert "holds images of two systems: images/a/BR" in said and "of CellVoyager (CV7000, CV8000)" in said
    assert f"--data {tmp_path}/two/images/b" in said
    for name in "abc": make("cellvoyager", tmp_path / "three" / name)
    said = refused(tmp_path / "three")
    assert "a/wells.csv, b/wells.csv, c/wells.csv in its folders: describe each folder on its own" in said
    make("jump", tmp_path / "mixed/one")
    make("cellvoyager", tmp_path / "mixed/two")
    said = refused(tmp_path / "mixed")
    assert "several screens: one/metadata/barcode_platemap.csv and two/wells.csv are plate maps of their own" in said


def test_any_plane_of_a_stack_can_be_looked_at(tmp_path):
    "However the screen was described; a store holds one"
    screens = [described("harmony", tmp_path / str(z), z=z) for z in (2, "max", "middle")]
    for screen in screens:
        for z, value in ((1, 1213), (3, 1217), ("middle", 1215), ("max", 1217)):  # of field 1, as `plane` says
            sites = screen.at_depth(z).sites()
            one = sites[(sites.well == "A02") & (sites.site == 1) & (sites.plate == 1)].files.iloc[0]
            assert read_plane(one.planes(["1"])[0])[0, 0] == value
    said = []
    title = lambda z: screens[0].show_well("A02", z=z, say=said.append)[0].figure._suptitle.get_text()
    assert "plane 3" in title(3) and "maximum of 3 planes" in title("max") and len(said) == 2
    with pytest.raises(ValueError, match="there is no plane 9; expected one of 1 to 3"): title(9)
    pack_screen(screens[1], tmp_path / "store", progress=False)
    with pytest.raises(ValueError, match="no depth 2 to choose: .* is a packed store"):
        read_screen(tmp_path / "store").show_well("A02", z=2)
