"""Tables as people write them: what is the same is read the same by every reader, and what is wrong is named by file
and row."""

import re

import numpy as np
import pandas as pd
import pytest
from cases import each

from rcic_fastai.screen.describe import describe_screen
from rcic_fastai.screen.platemap import plate_map_wells, read_plate_map
from rcic_fastai.screen.tables import alike, alike_names, is_unknown, read_rows, read_table

ROWS = [["well", "treatment", "dose"], ["B02", "Taxol", "1"], ["B03", "DMSO", "0"], ["C04", "a, b", "2.5"]]


def written(rows, sep=",", end="\n"):
    return end.join(sep.join(f'"{c}"' if sep in c else c for c in r) for r in rows) + end


FORMS = {
    "plain": written(ROWS),
    "a byte order mark": "\ufeff" + written(ROWS),
    "Windows": written(ROWS, end="\r\n"),
    "old Mac": written(ROWS, end="\r"),
    "semicolons": written(ROWS, ";"),
    "tabs": written(ROWS, "\t"),
    "said by Excel": "sep=;\r\n" + written(ROWS, ";", "\r\n"),
    "quotes": "\n".join(",".join(f'"{c}"' for c in r) for r in ROWS),
    "blanks around": "\n".join(" , ".join(f'"{c}"' if "," in c else c for c in r) + "  " for r in ROWS),
    "columns of nothing": written([[*r, "", " "] for r in ROWS]),
    "rows of nothing": written([*ROWS, ["", "", ""], [" ", "", ""]]),
    "no end": written(ROWS).rstrip(),
}


@each("form", FORMS)
def test_the_same_table_in_every_form(tmp_path, form):
    path = tmp_path / "t.csv"
    path.write_bytes(FORMS[form].encode())
    expected = pd.DataFrame(ROWS[1:], columns=ROWS[0])
    for table in (read_rows(path), read_table(path, ROWS[0]), read_plate_map(path)):
        pd.testing.assert_frame_equal(table[ROWS[0]], expected, check_dtype=False)
        assert table.row.tolist() == list(range(2, 5)) if form != "said by Excel" else table.row.tolist() == list(
            range(3, 6))


WRONG = {
    "UTF-16": (written(ROWS).encode("utf-16"), "UTF-16"),
    "Latin-1": (written([*ROWS, ["D05", "Köln", "1"]]).encode("latin-1"),
                "row 5: not comma-separated UTF-8 text: byte 0xf6"),
    "a workbook": (b"PK\x03\x04" + bytes(100), "a workbook"),
    "an image": (b"\x89PNG\r\n", "an image"),
    "binary": (b"well,treatment\n\0\0", "no text"),
    "an open quote": (b'well,treatment\nB02,"Taxol\nB03,DMSO\n', "not comma-separated text"),
    "a short row": (b"well,treatment,dose\nB02,Taxol,1\n\nB03,DMSO\n", "row 4: 2 cells where the header has 3"),
    "a long row": (b"well,treatment\nB02,Taxol,1\n", "row 2: 3 cells where the header has 2"),
    "empty": (b"", "the file is empty"),
    "blank": (b"\n \n,,\n", "the file is empty"),
    "a header": (b"well,treatment\n,\n", "a header and no rows"),
    "a column twice": (b"well,dose,dose\nB02,1,2\n", "row 1: column 'dose' appears twice"),
    "a column almost twice": (b"\nwell,dose, Dose \nB02,1,2\n",
                              "row 2: columns 'dose' and 'Dose' differ in capitals or blanks only"),
}


@each("name", WRONG)
def test_what_is_no_table_is_named(tmp_path, name):
    path, (data, words) = tmp_path / "t.csv", WRONG[name]
    path.write_bytes(data)
    for read in (read_rows, read_plate_map, lambda p: read_table(p, ["well", "treatment"])):
        with pytest.raises(ValueError, match=r"t\.csv") as e:
            read(path)
        assert words in str(e.value) and "\n" not in str(e.value)


def test_every_word_of_pandas_for_unknown(tmp_path):
    from pandas._libs.parsers import STR_NA_VALUES

    words = sorted({w for v in STR_NA_VALUES for w in (v, v.lower(), v.upper(), f" {v} ")}) + ["-", "--"]
    assert is_unknown(pd.Series(words)).all()
    assert not is_unknown(pd.Series(["DMSO", "NaCl", "nano", "0", "Nullomycin"])).any()
    wells = [f"{r}{c:02}" for r in "ABCDEFGH" for c in range(1, 25)]
    (tmp_path / "t.csv").write_text("well,treatment\nA01,DMSO\n" + "".join(
        f"{w},{v}\n" for w, v in zip(wells[1:], words)))
    found = plate_map_wells(read_plate_map(tmp_path / "t.csv"))
    assert found.sirna.notna().sum() == 1 and (found.split == "test").sum() == len(words)


def test_notices_of_a_description(tmp_path):
    from PIL import Image

    for w in ("B02", "B03", "B04"):
        Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / f"{w}_DAPI.png")
    (tmp_path / "map.csv").write_text("well,treatment\nB02,Taxol\nB03,taxol \nB04,n/a\n")
    said = []
    screen = describe_screen(tmp_path, files="{well}_{channel}.png", say=lambda s: said.append(str(s)))
    assert any("treatment 'Taxol' and 'taxol' differ in capitals or blanks only" in s for s in said)
    assert any("1 well has the treatment 'n/a': taken as unknown" in s for s in said)
    assert screen.wells.sirna.notna().sum() == 2


@each("pair, how, shown", [
    (["Taxol", "taxol "], "capitals or blanks", "'Taxol' and 'taxol '"),
    (["Taxol", "Tax\u200bol"], "invisible characters or the coding of accents", r"'Taxol' and 'Tax\\u200bol'"),
    (["Caf\u00e9", "Cafe\u0301"], "invisible characters or the coding of accents", r"'Cafe\\u0301' and 'Caf\\xe9'"),
    (["5 uM", "5\u00a0uM"], "capitals or blanks", r"'5 uM' and '5\\xa0uM'"),
    (["\u00b5M", "\u03bcM"], "capitals or blanks", r"'\\xb5M' and '\\u03bcM'"),
    (["a\u00adb", "ab"], "invisible", r"'a\\xadb'"), (["x\ufe0f", "x"], "invisible", r"'x\\ufe0f'"),
])
def test_names_that_look_alike(pair, how, shown):
    (names,) = alike(pd.Series([*pair, "another"]))
    assert re.search(shown, said := alike_names(names)) and f"differ in {how}" in said and said.isprintable()
    assert not alike(pd.Series(["é", "e", "x2", "x²", "1-2", "12"]))


def test_notices_of_names_that_look_alike(tmp_path):
    "Treatments, cell types, experiments and plates; and a column that is there twice to the eye"
    from PIL import Image

    for e in ("a", "b"):
        (tmp_path / e).mkdir()
    for path in ("a/B02", "a/B03", "b/B02", "b/B03"):
        Image.fromarray(np.full((8, 8), 7, np.uint8)).save(tmp_path / f"{path}_DAPI.png")
    rows = [("a", "B02", "Taxol", "HeLa", "day", "P1"), ("a", "B03", "Tax\u200bol", "HeLa", "day", "P1"),
            ("b", "B02", "Caf\u00e9", "He\u200dLa", "day\u2060", "P1\ufeff"),
            ("b", "B03", "Cafe\u0301", "He\u200dLa", "day\u2060", "P1\ufeff")]
    (tmp_path / "map.csv").write_text("folder,well,treatment,cell_type,experiment,plate\n" + "".join(
        ",".join(r) + "\n" for r in rows), encoding="utf-8")
    said = []
    describe_screen(tmp_path, files="{folder}/{well}_{channel}.png", say=lambda s: said.append(str(s)))
    notices = [s for s in said if s.startswith("Notice")]
    for what in (r"treatment 'Taxol' and 'Tax\u200bol'", r"treatment 'Cafe\u0301' and 'Caf\xe9'",
                 r"cell type 'HeLa' and 'He\u200dLa'", r"experiment 'day' and 'day\u2060'",
                 r"plate 'P1' and 'P1\ufeff'"):
        assert any(all(part in s for part in what.split(" and "))
                   and "invisible characters or the coding of accents only" in s for s in notices), (what, notices)
    (tmp_path / "twice.csv").write_text("well,dose,do\u200bse\nB02,1,2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 1: columns 'dose' and 'do\\u200bse' differ in invisible characters"):
        read_rows(tmp_path / "twice.csv")
