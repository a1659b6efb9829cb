"Tables of a screen: bad input, the three layouts, files, plate groups, splits, and the real tables."

import csv
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from cases import each

from rcic_fastai.screen.tables import WELL_COLUMNS, metadata_sites, read_table, screen_layout
from rcic_fastai.screen.groups import plate_groups, plate_rotations
from rcic_fastai.screen.channels import Channel, as_channel, channel_file, channel_name, grey_limits, is_optional
from rcic_fastai.screen.channels import CHANNELS
from rcic_fastai.screen.sites import check_files, present_sites, site_files, well_sites
from rcic_fastai.screen.core import check_screen, plate_map
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.split import experiment_folds, split_experiments, valid_mask

matplotlib.use("Agg")
REAL = Path(__file__).parents[1].parent / "shared" / "rcic"
real = pytest.mark.skipif(not (REAL / "train.csv").is_file(), reason="the real tables are not in ../shared/rcic")

METADATA = ["site_id", "well_id", "cell_type", "dataset", "experiment", "plate", "well", "site", "well_type", "sirna",
            "sirna_id"]
# 12 treatments; 12 and 13 are positive controls, 14 the negative one
GROUPS = [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]
SHIFT = {"HEPG2-01": 0, "HEPG2-02": 1, "HEPG2-03": 3, "RPE-01": 0, "RPE-02": 3, "RPE-03": 2}
TEST = ("HEPG2-03", "RPE-03")


def rows():
    "Every well of the small screen: dicts of text, as the files hold them."
    out = []
    for experiment, shift in SHIFT.items():
        for plate in range(1, 5):
            sirnas = [14, *GROUPS[(plate - 1 + shift) % 4], 12, 13]
            for well, s in zip(["B02", "B03", "C11", "H12", "N22", "O23"], sirnas):
                kind = "treatment" if s < 12 else "positive_control" if s < 14 else "negative_control"
                out.append(
                    {
                        "id_code": f"{experiment}_{plate}_{well}",
                        "experiment": experiment,
                        "plate": str(plate),
                        "well": well,
                        "sirna": str(s),
                        "well_type": kind,
                    }
                )
    return out


def write(path, table, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as f:
        w = csv.DictWriter(f, columns, extrasaction="ignore")
        w.writeheader()
        w.writerows(table)


def write_kaggle(root):
    base = ["id_code", "experiment", "plate", "well"]
    for split in ("train", "test"):
        part = [r for r in rows() if (r["experiment"] in TEST) == (split == "test")]
        write(root / f"{split}.csv", [r for r in part if r["well_type"] == "treatment"],
              base + ["sirna"] * (split == "train"))
        write(root / f"{split}_controls.csv", [r for r in part if r["well_type"] != "treatment"],
              base + ["sirna", "well_type"])
    return root


def write_metadata(path, dataset, sites=(1, 2)):
    "The small screen as a metadata.csv; `dataset` maps experiments to splits."
    table = [
        dict(
            r,
            site_id=f"{r['id_code']}_{s}",
            well_id=r["id_code"],
            cell_type=r["experiment"].split("-")[0],
            site=str(s),
            dataset=dataset.get(r["experiment"], "train"),
            sirna="EMPTY",
            sirna_id=r["sirna"],
        )
        for r in rows()
        for s in sites
    ]
    write(path, table, METADATA)
    return path


@pytest.fixture
def root(tmp_path):
    return write_kaggle(tmp_path / "screen")


@pytest.fixture
def wells(root):
    return read_screen(root).wells


def put(path, row, **cells):
    "Change cells of one row; rows count as in a spreadsheet."
    with path.open(newline="") as f:
        table = list(csv.DictReader(f))
    table[row - 2].update(cells)
    write(path, table, list(table[0]))


def move(path, row, **cells):
    "Change cells of one row and the id with them."
    put(path, row, **cells)
    with path.open(newline="") as f:
        r = list(csv.DictReader(f))[row - 2]
    put(path, row, id_code=f"{r['experiment']}_{r['plate']}_{r['well']}")


def edit(path, change):
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")


def swap_sirnas(path, a, b):
    with path.open(newline="") as f:
        table = list(csv.DictReader(f))
    put(path, a, sirna=table[b - 2]["sirna"])
    put(path, b, sirna=table[a - 2]["sirna"])


# what is wrong: the file, how it is damaged, and what the message must say
BAD = {
    "missing train controls": ("train_controls.csv", Path.unlink, ["train_controls.csv does not exist"]),
    "missing test controls": ("test_controls.csv", Path.unlink, ["test_controls.csv does not exist"]),
    "missing test treatments": ("test.csv", Path.unlink, ["test.csv does not exist"]),
    "missing column": (
        "train.csv",
        lambda p: edit(p, lambda t: [x.rpartition(",")[0] for x in t]),
        ["train.csv: row 1", "'sirna' is missing"],
    ),
    "extra column": (
        "test.csv",
        lambda p: edit(p, lambda t: [t[0] + ",batch"] + [x + ",1" for x in t[1:]]),
        ["test.csv: row 1", "'batch' is not expected"],
    ),
    "labels in the test table": (
        "test.csv",
        lambda p: edit(p, lambda t: [t[0] + ",sirna"] + [x + ",1" for x in t[1:]]),
        ["'sirna' is not expected"],
    ),
    "column twice": ("train.csv", lambda p: edit(p, lambda t: [x + "," + x.split(",")[2] for x in t]),
                     ["row 1", "'plate' appears twice"]),
    "empty table": ("train.csv", lambda p: edit(p, lambda t: t[:1]), ["train.csv", "table is empty"]),
    "empty file": ("train.csv", lambda p: p.write_text(""), ["train.csv", "file is empty"]),
    "not text": ("train.csv", lambda p: p.write_bytes(b"\xff\xfe\x00id"), ["train.csv", "UTF-8"]),
    "cell too many": ("train.csv", lambda p: edit(p, lambda t: t[:6] + [t[6] + ",1"] + t[7:]),
                      ["train.csv: row 7", "6 cells", "5"]),
    "cell too few": ("train.csv", lambda p: edit(p, lambda t: t[:6] + [t[6].rpartition(",")[0]] + t[7:]),
                     ["train.csv: row 7", "4 cells"]),
    "duplicate id": (
        "train.csv",
        lambda p: edit(p, lambda t: t + [t[3]]),
        ["train.csv: row 50", "HEPG2-01_1_H12 is already in train.csv: row 4"],
    ),
    "duplicate id in another file": (
        "train_controls.csv",
        lambda p: move(p, 3, well="B03"),
        ["train_controls.csv: row 3", "is already in train.csv: row 2"],
    ),
    "id disagrees": (
        "train.csv",
        lambda p: put(p, 9, id_code="HEPG2-01_2_B03"),
        ["train.csv: row 9", "HEPG2-01_2_B03 disagrees", "HEPG2-01_3_C11"],
    ),
    "plate 5": ("train.csv", lambda p: move(p, 9, plate="5"), ["train.csv: row 9", "plate 5 is outside 1-4"]),
    "plate 0": ("train.csv", lambda p: move(p, 9, plate="0"), ["train.csv: row 9", "plate 0 is outside 1-4"]),
    "plate no number": ("test_controls.csv", lambda p: move(p, 9, plate="one"),
                        ["test_controls.csv: row 9", "plate one is outside 1-4"]),
    "well row": ("train.csv", lambda p: move(p, 9, well="Q03"), ["train.csv: row 9", "'Q03'", "A01 to P24"]),
    "well column": ("train.csv", lambda p: move(p, 9, well="B25"), ["train.csv: row 9", "'B25'"]),
    "well column 0": ("train.csv", lambda p: move(p, 9, well="B00"), ["train.csv: row 9", "'B00'"]),
    "well without zero": ("train.csv", lambda p: move(p, 9, well="B3"), ["train.csv: row 9", "'B3'"]),
    "well in small letters": ("train.csv", lambda p: move(p, 9, well="b03"), ["train.csv: row 9", "'b03'"]),
    "experiment without number": (
        "train.csv",
        lambda p: move(p, 9, experiment="HEPG2"),
        ["train.csv: row 9", "'HEPG2' does not look like HUVEC-07"],
    ),
    "siRNA a fraction": ("train.csv", lambda p: put(p, 9, sirna="3.5"), ["train.csv: row 9", "'3.5'", "whole number"]),
    "siRNA a name": ("train.csv", lambda p: put(p, 9, sirna="s217"), ["train.csv: row 9", "'s217'"]),
    "siRNA empty": ("train.csv", lambda p: put(p, 9, sirna=""), ["train.csv: row 9", "''", "whole number"]),
    "siRNA negative": ("train.csv", lambda p: put(p, 9, sirna="-1"), ["train.csv: row 9", "'-1' is out of range"]),
    "siRNA too large for any table": ("train.csv", lambda p: put(p, 9, sirna="9" * 30),
                                      ["train.csv: row 9", "is out of range"]),
    "siRNA beyond the controls": (
        "train.csv",
        lambda p: put(p, 9, sirna="99"),
        ["train.csv: row 9", "siRNA 99 is out of range", "0 to 11"],
    ),
    "control among treatments": (
        "train.csv",
        lambda p: put(p, 9, sirna="13"),
        ["train.csv: row 9", "siRNA 13 is a treatment here", "control"],
    ),
    "treatment among controls": (
        "test_controls.csv",
        lambda p: put(p, 9, sirna="3"),
        ["test_controls.csv: row 9", "siRNA 3 is a positive control here"],
    ),
    "siRNA repeated in its plate": (
        "train.csv",
        lambda p: put(p, 9, sirna="2"),
        ["train.csv: row 9", "siRNA 2 is repeated in HEPG2-01", "row 8"],
    ),
    "siRNA repeated in its experiment": (
        "train.csv",
        lambda p: put(p, 9, sirna="0"),
        ["train.csv: row 9", "siRNA 0 is repeated", "train.csv: row 2"],
    ),
    "plate with two groups": (
        "train.csv",
        lambda p: swap_sirnas(p, 27, 30),
        ["train.csv: row 27", "plate 1 of RPE-01 holds two plate groups"],
    ),
    "well type": (
        "train_controls.csv",
        lambda p: put(p, 9, well_type="positive"),
        ["train_controls.csv: row 9", "'positive'", "'positive_control'"],
    ),
    "treatment in the controls table": (
        "train_controls.csv",
        lambda p: put(p, 9, well_type="treatment"),
        ["train_controls.csv: row 9", "'treatment'"],
    ),
}


@pytest.mark.slow
@each("fault", BAD)
def test_bad_table_is_named_with_file_and_row(tmp_path, fault):
    root, (file, damage, words) = write_kaggle(tmp_path), BAD[fault]
    read_screen(root)  # the screen is good before
    damage(root / file)
    with pytest.raises((ValueError, FileNotFoundError)) as e:
        read_screen(root)
    assert isinstance(e.value, FileNotFoundError) == fault.startswith("missing t")
    for word in words:
        assert word in str(e.value)


BAD_METADATA = {
    "dataset": ({"dataset": "tset"}, ["row 9", "dataset 'tset' is unknown", "'test'"]),
    "site": ({"site": "3"}, ["row 9", "site 3 is outside 1-2"]),
    "cell type": ({"cell_type": "RPE"}, ["row 9", "cell_type 'RPE' disagrees with experiment HEPG2-01"]),
    "site id": ({"site_id": "HEPG2-01_1_B02_1"}, ["row 9", "site_id HEPG2-01_1_B02_1 disagrees"]),
    "siRNA of the other site": ({"sirna_id": "3"}, ["row 9", "sirna_id 3 disagrees with another site"]),
    "well type of the other site": ({"well_type": "positive_control"},
                                    ["row 9", "well_type positive_control disagrees"]),
    "split of the other site": ({"dataset": "test"}, ["row 9", "dataset test disagrees"]),
    "plate": ({"plate": "9"}, ["row 9", "plate 9 is outside 1-4"]),
}


@each("fault", BAD_METADATA)
def test_bad_metadata_is_named_with_file_and_row(tmp_path, fault):
    path = write_metadata(tmp_path / "metadata.csv", dict.fromkeys(TEST, "test"))
    cells, words = BAD_METADATA[fault]
    metadata_sites(path)
    put(path, 9, **cells)  # the second site of a treatment
    with pytest.raises(ValueError) as e:
        read_screen(tmp_path)
    assert str(e.value).startswith("metadata.csv: ")
    for word in words:
        assert word in str(e.value)


def test_metadata_repeats_a_site(tmp_path):
    path = write_metadata(tmp_path / "metadata.csv", {})
    edit(path, lambda t: t + [t[6]])
    with pytest.raises(ValueError, match=r"metadata.csv: row 290: site_id \S+ is already in metadata.csv: row 7"):
        read_screen(tmp_path)


def test_rows_count_blank_lines_and_ignore_a_byte_order_mark(root):
    path = root / "train.csv"
    path.write_text("\ufeff" + path.read_text().replace("\n", "\n\n", 3) + "\n\n", encoding="utf-8")
    assert read_table(path, ["id_code", "experiment", "plate", "well", "sirna"]).row.tolist()[:4] == [3, 5, 7, 8]
    read_screen(root)


def test_columns_may_come_in_any_order(root, wells):
    with (root / "train.csv").open(newline="") as f:
        table = list(csv.DictReader(f))
    write(root / "train.csv", table, ["sirna", "well", "plate", "experiment", "id_code"])
    pd.testing.assert_frame_equal(read_screen(root).wells, wells)


def test_several_mistakes_are_counted(root):
    for row in (5, 9, 12):
        move(root / "train.csv", row, plate="7")
    with pytest.raises(ValueError, match=r"train.csv: row 5: plate 7 .*\(and 2 more"):
        read_screen(root)


def test_new_cell_type_is_kept_and_reported_once(root):
    for f in root.glob("*.csv"):
        f.write_text(f.read_text().replace("HEPG2", "HEPG3").replace("RPE", "A549"))
    with pytest.warns(UserWarning) as heard:
        screen = read_screen(root)
    assert screen.cell_types == ["A549", "HEPG3"]
    said = [str(w.message) for w in heard]
    assert len(said) == 2 and "train.csv: row 2: cell type 'HEPG3' is new; did you mean 'HEPG2'?" in said[0]


def test_check_off_reads_half_a_download(root):
    for f in ("train_controls.csv", "test.csv", "test_controls.csv"):
        (root / f).unlink()
    edit(root / "train.csv", lambda t: t + [t[3]])
    assert len(read_screen(root, check=False).wells) == 49
    (root / "train.csv").unlink()
    with pytest.raises(FileNotFoundError, match="train.csv"):
        read_screen(root, layout="kaggle", check=False)


def test_training_tables_alone_are_a_screen(root):
    (root / "test.csv").unlink()
    (root / "test_controls.csv").unlink()
    screen = read_screen(root)
    assert set(screen.wells.split) == {"train"} and len(screen.wells) == 4 * 24


def test_check_screen_takes_a_screen_and_plain_wells(root, wells):
    check_screen(read_screen(root))
    wells.loc[7, "sirna"] = wells.sirna[6]
    with pytest.raises(ValueError, match=f"^well {wells.id_code[7]}: siRNA .* repeated .* in well {wells.id_code[6]}"):
        check_screen(wells)


# layouts


def test_schema_is_the_same_for_every_layout(root, tmp_path):
    write_metadata(tmp_path / "r" / "metadata.csv", dict.fromkeys(TEST, "test"))
    write_metadata(tmp_path / "w" / "rxrx1_v1.0" / "metadata.csv", {"HEPG2-03": "val", "RPE-03": "test"})
    kaggle, rxrx1, wilds = (read_screen(p) for p in (root, tmp_path / "r", tmp_path / "w"))
    assert [s.layout for s in (kaggle, rxrx1, wilds)] == ["kaggle", "rxrx1", "wilds"]
    assert [s.channels for s in (kaggle, rxrx1, wilds)] == [CHANNELS, CHANNELS, (1, 2, 3)]
    for s in (kaggle, rxrx1, wilds):
        assert tuple(s.wells.columns) == WELL_COLUMNS
        assert str(s.wells.plate.dtype) == "int64" and str(s.wells.sirna.dtype) == "Int64"
        assert s.wells.id_code.is_unique and len(s.wells) == 6 * 24
        assert s.experiments == sorted(SHIFT)
    known = kaggle.wells[kaggle.wells.sirna.notna()].sort_values("id_code", ignore_index=True)
    same = rxrx1.wells[rxrx1.wells.id_code.isin(known.id_code)].sort_values("id_code", ignore_index=True)
    pd.testing.assert_frame_equal(known, same)
    hidden = kaggle.wells[kaggle.wells.sirna.isna()]
    assert set(hidden.split) == {"test"} and set(hidden.well_type) == {"treatment"} and len(hidden) == 24
    assert kaggle.wells.query("well == 'B02'").well_type.eq("negative_control").all()


def test_wilds_levels_and_split_by_site(tmp_path):
    write_metadata(tmp_path / "rxrx1_v1.0" / "metadata.csv", {"HEPG2-03": "val", "RPE-03": "test"})
    for path in (tmp_path, tmp_path / "rxrx1_v1.0"):
        screen = read_screen(path)
        assert screen.layout == "wilds" and screen.path == tmp_path / "rxrx1_v1.0"
    sites = screen.sites()
    assert sites.groupby("split").site.unique().map(list).to_dict() == {"train": [1], "id_test": [2], "val": [1, 2],
                                                                        "test": [1, 2]}
    assert set(screen.wells.split) == {"train", "val", "test"}
    assert sites.files[1].endswith("rxrx1_v1.0/images/HEPG2-01/Plate1/B02_s2.png")
    assert site_files(sites.files[1], screen.channels) == [tmp_path / "rxrx1_v1.0/images/HEPG2-01/Plate1/B02_s2.png"]


def test_wilds_without_val_is_known_by_its_composites(tmp_path):
    write_metadata(tmp_path / "metadata.csv", {})
    assert screen_layout(tmp_path) == "rxrx1"
    image = tmp_path / "images/HEPG2-01/Plate1/B02_s1.png"
    image.parent.mkdir(parents=True)
    image.touch()
    assert screen_layout(tmp_path) == "wilds"
    assert read_screen(tmp_path, layout="rxrx1").layout == "rxrx1"


def test_rxrx1_folder_level(tmp_path):
    write_metadata(tmp_path / "rxrx1" / "metadata.csv", dict.fromkeys(TEST, "test"))
    sites = read_screen(tmp_path).sites()
    assert sites.files[0] == f"{tmp_path.as_posix()}/rxrx1/images/HEPG2-01/Plate1/B02_s1_w{{channel}}.png"


def test_unknown_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="train.csv, screen.json, metadata.csv, rxrx1_v1.0/metadata.csv"):
        screen_layout(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        screen_layout(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="'kagle' is unknown; did you mean 'kaggle'"):
        read_screen(tmp_path, layout="kagle")


# sites and files


def test_wells_to_sites(root, wells):
    screen = read_screen(root)
    sites = screen.sites()
    assert len(sites) == 2 * len(wells) and sites.site_id.is_unique
    assert list(sites.columns) == [*WELL_COLUMNS, "site_id", "site", "files"]
    assert sites.site_id[:3].tolist() == ["HEPG2-01_1_B03_1", "HEPG2-01_1_B03_2", "HEPG2-01_1_C11_1"]
    files = dict(zip(sites.site_id, sites.files))
    assert files["HEPG2-01_1_B02_1"] == f"{root.as_posix()}/train/HEPG2-01/Plate1/B02_s1_w{{channel}}.png"
    assert files["RPE-03_4_O23_2"] == f"{root.as_posix()}/test/RPE-03/Plate4/O23_s2_w{{channel}}.png"
    assert [p.name for p in site_files(files["RPE-03_4_O23_2"], (2, 6))] == ["O23_s2_w2.png", "O23_s2_w6.png"]


def test_filtered_wells_keep_their_columns_and_order(root, wells):
    some = wells.query("plate == 3").iloc[::-1].assign(fold=7)
    sites = read_screen(root).sites(some)
    assert sites.id_code[::2].tolist() == some.id_code.tolist() and (sites.fold == 7).all()
    assert len(read_screen(root).sites(some.iloc[:0])) == 0
    with pytest.raises(ValueError, match="sites already"):
        read_screen(root).sites(sites)


def test_metadata_decides_which_sites_exist(tmp_path):
    path = write_metadata(tmp_path / "metadata.csv", {})
    edit(path, lambda t: t[:2] + t[3:])  # the first well loses its site 2
    screen = read_screen(tmp_path)
    sites = screen.sites()
    assert len(sites) == 2 * 144 - 1
    assert sites.site_id[:3].tolist() == ["HEPG2-01_1_B02_1", "HEPG2-01_1_B03_1", "HEPG2-01_1_B03_2"]
    strange = screen.wells.head(2).assign(id_code=["HEPG2-01_1_B02", "HEPG2-01_1_P24"])
    with pytest.raises(ValueError, match="HEPG2-01_1_P24 has no site"):
        screen.sites(strange)
    with pytest.raises(ValueError, match="layout 'wild' is unknown; did you mean 'wilds'"):
        well_sites(screen.wells, tmp_path, "wild")


def test_files_present_and_missing(root, wells):
    sites = read_screen(root).sites(wells.query("experiment == 'RPE-03' and plate == 2"))
    with pytest.raises(FileNotFoundError,
                       match=r"Plate2/B03_s1_w1.png does not exist .*; 71 more files are missing, 12 of 12 sites"):
        check_files(sites)
    for pattern in sites.files:
        for p in site_files(pattern):
            p.parent.mkdir(parents=True, exist_ok=True)
            p.touch()
    check_files(sites)
    assert present_sites(sites)[1] == 0
    gone = site_files(sites.files[3])[4]
    gone.unlink()
    with pytest.raises(FileNotFoundError) as e:
        check_files(sites)
    assert str(e.value) == f"{gone.as_posix()} does not exist (site {sites.site_id[3]})"
    present, n_left_out = present_sites(sites)
    assert n_left_out == 1 and len(present) == 11 and sites.site_id[3] not in set(present.site_id)
    assert present.index.tolist() == list(range(11))
    check_files(sites, channels=(1, 2, 3, 4, 6))  # channel 5 is not asked for


# plate groups


def test_groups_and_rotations(wells):
    groups = plate_groups(wells)
    assert groups.to_dict() == {s: g for g, sirnas in enumerate(GROUPS) for s in sirnas}
    rotations = plate_rotations(wells, groups)
    assert rotations.loc["HEPG2-01"].tolist() == [1, 2, 3, 4]
    assert rotations.loc["HEPG2-02"].tolist() == [4, 1, 2, 3]  # plate 1 holds group 1, ..., plate 4 group 0
    assert set(rotations.index) == set(SHIFT) - set(TEST)
    pd.testing.assert_series_equal(groups, plate_groups(wells.sample(frac=1, random_state=3)))


def test_groups_survive_missing_wells(wells):
    rng = np.random.default_rng(0)
    some = wells[(wells.sirna != 8) & (rng.random(len(wells)) < 0.75)]
    groups = plate_groups(some)
    assert 8 not in groups.index and set(some.sirna[some.well_type == "treatment"].dropna()) == set(groups.index)
    together = {frozenset(groups.index[groups == g]) for g in groups.unique()}
    assert together == {frozenset(groups.index.intersection(g)) for g in GROUPS}


def test_groups_of_part_of_a_screen(wells):
    assert plate_groups(wells.iloc[:0]).empty and plate_groups(wells[wells.split == "test"]).empty
    part = wells[(wells.experiment == "HEPG2-01") & wells.plate.isin([2, 4])]
    assert plate_groups(part).value_counts().to_dict() == {0: 3, 1: 3}
    rotations = plate_rotations(wells[(wells.experiment != "HEPG2-01") | (wells.plate != 2)], plate_groups(wells))
    assert rotations.loc["HEPG2-01", 1] is pd.NA


# splits


@pytest.fixture(scope="module")
def many():
    "Wells of 33 experiments with the cell types of the real training set, four to an experiment."
    sizes = {"HEPG2": 7, "HUVEC": 16, "RPE": 7, "U2OS": 3}
    return pd.DataFrame(
        [
            {"id_code": f"{c}-{e:02}_{p}_B03", "experiment": f"{c}-{e:02}", "cell_type": c, "plate": p,
             "split": "train"}
            for c, n in sizes.items()
            for e in range(1, n + 1)
            for p in range(1, 5)
        ]
    )


def cell_counts(experiments):
    return pd.Series([e.split("-")[0] for e in experiments]).value_counts().to_dict()


@each("seed", range(5))
@each("how", [{}, {"valid_frac": 0.01}, {"valid_frac": 0.99}, {"n_valid": 4}, {"n_valid": 9}, {"n_valid": 29}])
def test_split_is_disjoint_stratified_and_deterministic(many, how, seed):
    train, valid = split_experiments(many, seed=seed, **how)
    assert not set(train) & set(valid) and set(train) | set(valid) == set(many.experiment)
    assert set(cell_counts(train)) == set(cell_counts(valid)) == set(many.cell_type)
    assert len(valid) == how.get("n_valid", len(valid))
    assert (train, valid) == split_experiments(many.sample(frac=1, random_state=1), seed=seed, **how)


def test_split_is_in_proportion_and_depends_on_the_seed(many):
    assert cell_counts(split_experiments(many, valid_frac=0.25)[1]) == {"HEPG2": 2, "HUVEC": 4, "RPE": 2, "U2OS": 1}
    assert cell_counts(split_experiments(many, n_valid=8)[1]) == {"HEPG2": 2, "HUVEC": 4, "RPE": 1, "U2OS": 1}
    assert len({tuple(split_experiments(many, seed=s)[1]) for s in range(10)}) > 5


def test_split_of_one_cell_type_is_that_of_all(many):
    rpe = many[many.cell_type == "RPE"]
    assert split_experiments(rpe)[1] == [e for e in split_experiments(many)[1] if e.startswith("RPE")]
    folds = experiment_folds(many)
    pd.testing.assert_series_equal(experiment_folds(rpe), folds[folds.index.str.startswith("RPE")])


def test_a_single_experiment_of_a_cell_type_stays_in_training(many):
    few = many[(many.cell_type != "U2OS") | (many.experiment == "U2OS-02")]
    assert "U2OS-02" in split_experiments(few)[0] and "U2OS-02" in split_experiments(few, n_valid=9)[0]


def test_impossible_splits(many):
    for n in (3, 30):
        with pytest.raises(ValueError, match="expected 4 to 29"):
            split_experiments(many, n_valid=n)
    with pytest.raises(ValueError, match="valid_frac=1.5 is outside 0-1"):
        split_experiments(many, valid_frac=1.5)
    with pytest.raises(ValueError, match="no cell type has two experiments"):
        split_experiments(many[many.experiment == "RPE-01"])
    for n, folds in ((1, "1 fold is"), (17, "17 folds are")):
        with pytest.raises(ValueError, match=f"{folds} impossible; expected 2 to 16.*HUVEC"):
            experiment_folds(many, n)


@each("seed", range(4))
@each("n_folds", [2, 5, 16])
def test_folds(many, n_folds, seed):
    folds = experiment_folds(many, n_folds, seed)
    assert folds.index.tolist() == sorted(many.experiment.unique()) and set(folds) == set(range(n_folds))
    for cell in many.cell_type.unique():
        sizes = folds[folds.index.str.startswith(cell)].value_counts().reindex(range(n_folds), fill_value=0)
        assert sizes.max() - sizes.min() <= 1
    pd.testing.assert_series_equal(folds, experiment_folds(many.sample(frac=1, random_state=2), n_folds, seed))


def test_valid_mask(many):
    mask = valid_mask(many, "experiment=HEPG2-07, RPE-07")
    assert mask.dtype == bool and set(many.experiment[mask]) == {"HEPG2-07", "RPE-07"} and mask.sum() == 8
    assert set(many.plate[valid_mask(many, "plate=4")]) == {4} and valid_mask(many, "plate=1,2").sum() == 66
    assert set(many.cell_type[valid_mask(many, "cell_type=U2OS")]) == {"U2OS"}
    folds = experiment_folds(many, 3, seed=5)
    assert set(many.experiment[valid_mask(many, "fold=1/3", seed=5)]) == set(folds.index[folds == 1])
    assert (valid_mask(many, "fold=2") == valid_mask(many, "fold=2/5")).all()
    masks = [valid_mask(many, f"fold={k}") for k in range(5)]
    assert (np.sum(masks, axis=0) == 1).all()


@pytest.mark.parametrize("n_parts", [2, 5])
def test_valid_mask_by_wells(root, n_parts):
    wells = read_screen(root).wells
    parts = [valid_mask(wells, f"well={k}/{n_parts}", seed=3) for k in range(n_parts)]
    assert parts[0].dtype == bool and (np.sum(parts, axis=0) == 1).all()
    held_out = set(wells.id_code[parts[0]])
    assert len({frozenset(wells.id_code[valid_mask(wells, f"well=0/{n_parts}", seed=s)]) for s in range(10)}) == 10

    def chosen(table):
        "The wells that a table holds out; all sites of a well or none."
        mask = pd.Series(valid_mask(table, f"well=0/{n_parts}", seed=3), index=table.id_code)
        assert mask.groupby(level=0).nunique().max() == 1
        return set(mask.index[mask])

    # sites or wells, in any order, without controls, of one cell type: what is held out of a well does not depend on
    # the others
    for few in (wells, wells.sample(frac=1, random_state=0), wells[wells.well_type == "treatment"],
                wells[wells.cell_type == "RPE"]):
        assert chosen(few) == held_out & set(few.id_code) == chosen(
            well_sites(few, root, "kaggle").sample(frac=1, random_state=1))


def test_parts_of_wells_are_a_random_sample():
    wells = pd.DataFrame([(e, f"{e}_{p}_{r}{c:02}") for e in ("RPE-01", "RPE-02") for p in range(1, 5)
                          for r in "BCDEFGHIJKLMNO" for c in range(2, 24)],
                         columns=["experiment", "id_code"])
    parts = np.stack([[valid_mask(wells, f"well={k}/5", seed=s) for k in range(5)] for s in range(4)])
    assert np.abs(parts.mean(-1) - 0.2).max() < 4 * np.sqrt(0.2 * 0.8 / len(wells))
    assert (valid_mask(wells, "well=2", seed=1) == parts[1, 2]).all()
    # experiment, plate, row, column
    for name in (wells.experiment, wells.id_code.str[7], wells.id_code.str[9], wells.id_code.str[10:]):
        shares = pd.Series(parts[0, 0]).groupby(name.to_numpy()).agg(["mean", "size"])
        assert (np.abs(shares["mean"] - 0.2) < 4 * np.sqrt(0.2 * 0.8 / shares["size"])).all()
    both = (parts[0, 0] & parts[1, 0]).mean()  # another seed is another draw
    assert abs(both - 0.04) < 4 * np.sqrt(0.04 * 0.96 / len(wells))


def test_an_empty_part_of_wells_is_an_error(many):
    few = many[:6]
    said = []
    for k in range(6):
        try:
            assert valid_mask(few, f"well={k}/6").any()
        except ValueError as e:
            said.append(str(e))
    assert said and all("holds out none of the 6 wells" in s for s in said)


@each(
    "spec, words",
    {
        "experiment=HEPG2-77": ["'HEPG2-77'", "did you mean 'HEPG2-07'"],
        "experiment=HEPG2-01,RPE-O2": ["'RPE-O2'", "did you mean 'RPE-02'"],
        "experiment=xyz": ["'xyz'", "expected one of 'HEPG2-01'"],
        "plate=5": ["plate '5'", "'1', '2', '3', '4'"],
        "cell_type=UTOS": ["did you mean 'U2OS'"],
        "plate=1,2,3,4": ["leaves none to train on"],
        "fold=5": ["fold 5 is outside 0-4"],
        "fold=3/3": ["fold 3 is outside 0-2"],
        "fold=one": ["'one' is not a number"],
        "fold=0/99": ["99 folds are impossible"],
        "fold=-1": ["'-1' is not a number"],
        "fold=0/0": ["0 parts", "expected 2 or more"],
        "well=5": ["well 5 is outside 0-4"],
        "well=3/3": ["well 3 is outside 0-2"],
        "well=B03": ["'B03' is not a number", "0/5 for the first of five"],
        "well=1/": ["'1/' is not a number"],
        "well=0/1": ["1 part is impossible; expected 2 to 132"],
        "well=0/999": ["999 parts are impossible"],
        "sirna=3": ["not understood", "experiment=NAME"],
        "HEPG2-07": ["not understood"],
        "plate=": ["not understood"],
        "": ["not understood"],
    }.items(),
)
def test_valid_mask_errors(many, spec, words):
    with pytest.raises(ValueError) as e:
        valid_mask(many, spec)
    for word in [f"valid {spec!r}", *words]:
        assert word in str(e.value)


# what a person sees


def test_summary_counts(root):
    put_out = [line for line in (root / "train.csv").read_text().splitlines() if not line.startswith("RPE-02_3_B03")]
    (root / "train.csv").write_text("\n".join(put_out))
    screen = read_screen(root)
    s = screen.summary()
    assert s.index.tolist() == [("train", "HEPG2"), ("train", "RPE"), ("test", "HEPG2"), ("test", "RPE"),
                                ("all", "all")]
    assert s.loc[("train", "RPE")].tolist() == [2, 8, 7, 23, 16, 8, 12]
    assert s.loc[("test", "RPE")].tolist()[:-1] == [1, 4, 4, 12, 8, 4] and s.loc[("test", "RPE"), "siRNAs"] is pd.NA
    assert s.loc[("all", "all"), "experiments"] == 6
    assert "143 wells" in repr(screen) and "complete plates" in repr(screen)
    assert "<table" in screen._repr_html_() and "<NA>" not in screen._repr_html_()
    assert "&lt;NA" not in screen._repr_html_()


def test_plate_map(root, wells):
    import matplotlib.pyplot as plt

    screen = read_screen(root)
    ax = screen.plot_plate("RPE-01", 2)
    empty, used = ax.collections
    assert len(empty.get_paths()) == 16 * 24 and len(used.get_facecolors()) == 6
    assert [t.get_text() for t in ax.get_legend().texts] == ["treatment (3)", "positive control (2)",
                                                             "negative control (1)"]
    one = wells.query("experiment == 'RPE-03' and plate == 1").assign(cells=np.arange(6), area=np.linspace(0, 1, 6))
    at = [p.vertices.mean(0).round() for p in plate_map(one).collections[1].get_paths()]
    assert np.allclose(at[0], [3, 1], atol=0.6)  # B03: column 3, second row from the top
    assert "unknown (3)" in [t.get_text() for t in plate_map(one, "sirna").get_legend().texts]
    many = pd.DataFrame({"well": [f"C{c:02}" for c in range(1, 25)], "area": np.arange(24) / 7,
                         "name": [f"n{i}" for i in range(24)]})
    assert len(plate_map(many, "area").figure.axes) == 2  # a colour scale beside the plate
    assert plate_map(many, "name").get_legend() is None
    for call, words in [
        (lambda: screen.plot_plate("RPE-9", 1), "did you mean 'RPE-0"),
        (lambda: screen.plot_plate("RPE-01", 7), r"no plate 7.*\[1, 2, 3, 4\]"),
        (lambda: plate_map(wells), "appears twice"),
        (lambda: plate_map(one, "well_typ"), "did you mean 'well_type'"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    plt.close("all")


# the real tables


@pytest.fixture(scope="module")
def rcic():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read_screen(REAL)


@pytest.mark.slow
@real
def test_real_tables_are_read_and_checked_in_two_seconds(rcic):
    best = np.inf
    for _ in range(3):  # other work on the machine may take one of them
        start = time.perf_counter()
        read_screen(REAL)
        best = min(best, time.perf_counter() - start)
    assert best < 2
    counts = rcic.wells.assign(control=rcic.wells.well_type != "treatment").groupby(["split", "control"]).size()
    assert counts.to_dict() == {("train", False): 36515, ("test", False): 19897, ("train", True): 4097,
                                ("test", True): 2246}
    assert rcic.summary().loc["train", "experiments"].to_dict() == {"HEPG2": 7, "HUVEC": 16, "RPE": 7, "U2OS": 3}
    assert rcic.summary().loc["train", "complete plates"].sum() == 109
    assert len(rcic.sites()) == 125510


@real
def test_real_plate_groups(rcic):
    groups = plate_groups(rcic.wells)
    assert groups.value_counts().to_dict() == {0: 277, 1: 277, 2: 277, 3: 277}
    assert groups.index.tolist() == list(range(1108))
    train = rcic.wells.query("split == 'train' and well_type == 'treatment'")
    per_plate = train.assign(group=train.sirna.map(groups)).groupby(["experiment", "plate"]).group.nunique()
    assert len(per_plate) == 33 * 4 and (per_plate == 1).all()
    rotations = plate_rotations(rcic.wells, groups)
    assert rotations.shape == (33, 4)
    assert rotations.apply(tuple, axis=1).value_counts().to_dict() == {(1, 2, 3, 4): 22, (3, 4, 1, 2): 7,
                                                                       (4, 1, 2, 3): 4}


@real
def test_one_misplaced_label_is_found_among_the_real_wells(rcic):
    wells = rcic.wells.copy()
    one, two = (
        wells.index[(wells.experiment == "RPE-03") & (wells.plate == p) & (wells.well == w)][0]
        for p, w in [(2, "C05"), (3, "K12")]
    )
    wells.loc[[one, two], "sirna"] = wells.sirna[[two, one]].to_numpy()
    with pytest.raises(ValueError, match=r"^well RPE-03_(2_C05|3_K12): plate [23] of RPE-03 holds two plate groups"):
        check_screen(wells)


@real
def test_real_files(rcic):
    if not (REAL / "train" / "HEPG2-01").is_dir():
        pytest.skip("the real images are not in ../shared/rcic")
    sites = rcic.sites(rcic.wells.query("well == 'B02' and experiment.str.endswith('-01')"))
    present, n_left_out = present_sites(sites)
    assert (len(present), n_left_out) == (16, 16) and set(present.site) == {1}
    with pytest.raises(FileNotFoundError, match=r"HEPG2-01/Plate1/B02_s2_w5.png does not exist .*; 31 more files"):
        check_files(sites)
    check_files(sites, channels=(1, 2, 3, 4))


# Channels

@each("text, parts", [
    (3, ("3", "3", None, False)), ("yellow?", ("yellow", "yellow", None, True)),
    ("DAPI[100-3200]", ("DAPI", "DAPI", (100, 3200), False)),
    ("w1=DAPI", ("DAPI", "w1", None, False)), ("w1=DAPI[100-3200]?", ("DAPI", "w1", (100, 3200), True)),
    ("a[b]", ("a[b]", "a[b]", None, False)), ("ER[0.0002-0.0187]", ("ER", "ER", (.0002, .0187), False)),
    ("ER[-20-3200]", ("ER", "ER", (-20, 3200), False)), ("ER[-2.5--1e-07]?", ("ER", "ER", (-2.5, -1e-7), True)),
    ("ER[1e-05-1e+20]", ("ER", "ER", (1e-5, 1e20), False)),
])
def test_a_channel_and_its_text(text, parts):
    channel = as_channel(text)
    assert (channel.name, channel.file, channel.limits, channel.optional) == parts == (
        channel_name(text), channel_file(text), grey_limits(text), is_optional(text))
    assert str(channel) == str(text) and as_channel(channel) is channel
    assert as_channel(str(channel)) == channel == Channel(*parts)


@each("text", ["a[5-5]", "a[2-1]", "a[.5-.25]", "a[0-" + "9" * 400 + "]", "a[-1e400-0]"])
def test_grey_limits_are_a_range(text):
    with pytest.raises(ValueError, match="channel a: grey limits .* the second must be larger"): as_channel(text)


@each("name", ["a/b", "..", "a\\b", "../a=b", "a\0"])
def test_a_channel_stays_in_its_folder(name):
    with pytest.raises(ValueError, match="leads to another folder"): as_channel(name)
