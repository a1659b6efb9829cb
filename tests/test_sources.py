"Where the pixels of sites are: references in a column of pandas, and the same pixels from each kind of them."
import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from rcic_fastai.data.block import screen_dataloaders
from rcic_fastai.data.loader import sites_table
from rcic_fastai.data.pack import pack_screen, pack_sites
from rcic_fastai.data.select import select_sites
from rcic_fastai.data.store import Store, read_packed, read_site
from rcic_fastai.screen.core import Screen
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.simulate import simulate_screen
from rcic_fastai.screen.sites import check_files, present_sites, site_files
from rcic_fastai.screen.sources import (
    AbsentSite, FileList, ImageFiles, ImagePlanes, PixelsArray, Plane, StoreRow,
    as_pixels, pattern_column, pixel_column, store_column,
)

KINDS = [ImageFiles("a#17_{channel}.png"), StoreRow("store", 3), AbsentSite("store", "E_1_B02_1"),
         FileList(("a.png", "b.png")),
         ImagePlanes((("w1", Plane("a.tif", (0,))), ("w2", Plane("a.tif", (1,)))))]


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    "A screen in a folder whose name looks like a row of a store"
    folder = tmp_path_factory.mktemp("screens") / "images#17"
    small = dict(n_sirnas=4, n_train=2, n_test=1, cell_types=("HUVEC",), image_size=32, progress=False)
    return read_screen(simulate_screen(folder, **small))


def test_references_are_frozen_values():
    assert len(set(KINDS + pickle.loads(pickle.dumps(KINDS)))) == len(KINDS)
    for kind in KINDS[1:]:
        with pytest.raises(AttributeError):
            kind.store = kind.files = kind.channels = "x"
    assert [as_pixels(k) for k in KINDS] == KINDS and as_pixels(["a.png", "b.png"]) == KINDS[3]
    for wrong in (3, None, {"files": "a"}, 1.5, [1, 2]):
        with pytest.raises(ValueError, match="a site is given as"):
            as_pixels(wrong)


def test_a_column_survives_what_pandas_does():
    table = pd.DataFrame(dict(site_id=list("edcba"), files=pixel_column(KINDS)))
    assert table.files.dtype == "pixels" and table.files.tolist() == KINDS
    ways = dict(
        sort=table.sort_values("site_id").sort_values("site_id", ascending=False),
        slices=pd.concat([table[:2], table.iloc[2:]]), merge=table[["site_id"]].merge(table, on="site_id"),
        pickle=pickle.loads(pickle.dumps(table)), copy=table.copy(), mask=table[table.files.notna()],
        assign=table.assign(files=table.files.tolist()).astype(dict(files="pixels")),
        unique=table.drop_duplicates("files"), twice=pd.concat([table, table]).drop_duplicates(),
        groups=pd.concat([t for _, t in table.groupby("site_id", sort=False)]),
        reindex=table.set_index("site_id").reindex(list("edcba")).reset_index())
    for name, changed in ways.items():
        assert changed.files.dtype == "pixels" and changed.files.tolist() == KINDS, name
    assert table.files.isin({KINDS[1], KINDS[4]}).tolist() == [False, True, False, False, True]
    assert (table.files == "a#17_{channel}.png").tolist() == [True] + [False] * 4
    assert [r.files for r in table.itertuples()] == KINDS and table.iloc[2].files == KINDS[2]
    assert table.files.astype(str).tolist() == table.files.map(str).tolist() == [str(k) for k in KINDS]
    assert table.merge(pd.DataFrame(dict(site_id=["a", "z"])), how="right").files.isna().tolist() == [False, True]


def test_a_part_of_a_column_is_changed_alone():
    table = pd.DataFrame(dict(files=pixel_column(KINDS)))
    part = table[:3].copy()
    part.loc[1, "files"] = "new_{channel}.png"
    part.loc[[0, 2], "files"] = pixel_column([StoreRow("other", 1), StoreRow("other", 2)])
    assert part.files.tolist() == [StoreRow("other", 1), "new_{channel}.png", StoreRow("other", 2)]
    assert table.files.tolist() == KINDS


def test_two_million_sites_need_no_objects():
    n = 2_000_000
    column = store_column("store", np.arange(n))
    assert column.nbytes == 12 * n and len(column.sources) == 2
    table = pd.DataFrame(dict(key=np.arange(n)[::-1], files=column))
    table = pd.concat([table.sort_values("key")[n // 2 :], table[n // 2 :]], ignore_index=True)
    assert len(pickle.dumps(table.files.array[:10])) < 2000
    store, rows = table.files.array.packed()
    assert store == "store" and rows[0] == n // 2 - 1 and rows[-1] == n - 1
    assert table.files[0] == StoreRow("store", n // 2 - 1)


def test_only_sites_of_one_store_are_read_by_rows():
    assert pixel_column([StoreRow("a", 1), StoreRow("b", 1)]).packed() is None
    assert pixel_column([StoreRow("a", 1), "x.png"]).packed() is None
    assert pixel_column([StoreRow("a", 1), None]).packed() is None
    assert pixel_column([]).packed() is None
    store, rows = pixel_column([StoreRow("a", 1), AbsentSite("a", "x"), StoreRow("a", 0)]).packed()
    assert store == "a" and rows.tolist() == [1, -1, 0]
    assert pixel_column([StoreRow("a", 1), "x.png"])[:1].packed()[1].tolist() == [1]


def test_a_hash_sign_is_part_of_a_path(screen, tmp_path):
    sites = screen.sites()
    check_files(sites)
    x = read_site(sites.files[0])
    stores = [tmp_path / "store#3", tmp_path / "x#E_1_B02_1"]
    for path in stores:
        pack_screen(screen, path, progress=False, say=lambda *a: None)
        packed = read_screen(path)
        row = Store(path).rows(sites.site_id[:1])[0]
        assert packed.sites().files[0] == StoreRow(path.as_posix(), row)
        assert (read_site(packed.sites().files[0]) == x).all() and len(present_sites(packed.sites())[0]) == len(sites)
        dls = screen_dataloaders(packed, bs=8, transforms=[], device="cpu", valid="experiment=HUVEC-02")
        assert (dls.train_ds[0][0].numpy() == read_site(dls.train_ds.items.files.iloc[0])).all()
    composite = tmp_path / "B02#17"  # a file without a suffix, which looks like a row of a store
    Image.fromarray(x[:3].transpose(1, 2, 0)).save(composite, format="png")
    assert (read_site(str(composite)) == x[:3]).all() and (read_site(composite) == x[:3]).all()
    assert (read_site(pattern_column([str(composite)])[0]) == x[:3]).all()


def test_texts_of_version_0_1_0_are_read(screen, tmp_path):
    store = pack_screen(screen, tmp_path / "store", progress=False, say=lambda *a: None)
    text = f"{tmp_path / 'store'}#5"
    assert (read_site(text) == store.read(5)).all() and (read_packed(text, (3, 1)) == store.read(5)[[2, 0]]).all()
    assert as_pixels(text) == StoreRow(str(tmp_path / "store"), 5)
    with pytest.raises(FileNotFoundError, match="holds no site HUVEC-09_1_B02_1"):
        read_site(f"{tmp_path / 'store'}#HUVEC-09_1_B02_1")
    table = sites_table(text)
    assert table.files[0] == StoreRow(str(tmp_path / "store"), 5)


def test_each_kind_gives_the_same_pixels_and_batches(screen, tmp_path):
    sites = select_sites(screen)
    store = pack_sites(sites, tmp_path / "store", screen.channels, progress=False)
    (tmp_path / "pages").mkdir()
    stacks = []
    for r in sites.itertuples():
        pages = [Image.fromarray(p) for p in read_site(r.files)]
        path = tmp_path / "pages" / f"{r.site_id}.tif"
        pages[0].save(path, save_all=True, append_images=pages[1:])
        stacks.append(ImagePlanes(tuple((str(c), Plane(str(path), (k,))) for k, c in enumerate(screen.channels))))
    rows, lists = store.files(sites.site_id), [FileList(tuple(map(str, site_files(f)))) for f in sites.files]
    mixed = [(a, b, c)[i % 3] for i, (a, b, c) in enumerate(zip(sites.files, rows, stacks))]
    kinds = dict(patterns=sites.files, texts=sites.files.astype(str), lists=lists, rows=rows, pages=stacks, mixed=mixed)
    expected = None
    for name, files in kinds.items():
        table = sites.assign(files=files if name == "texts" else pixel_column(files))
        check_files(table)
        assert len(present_sites(table)[0]) == len(table), name
        dls = screen_dataloaders(table, bs=8, transforms=[], device="cpu", valid="experiment=HUVEC-02", num_workers=2)
        batches = [x.numpy() for x, *_ in dls.train]
        expected = expected or batches
        assert all((a == b).all() for a, b in zip(batches, expected, strict=True)), name


def test_a_channel_without_a_plane(screen, tmp_path):
    x = read_site(screen.sites().files[0])
    for k in (0, 1):
        Image.fromarray(x[k]).save(tmp_path / f"{k}.png")
    planes = ImagePlanes((("1", Plane(str(tmp_path / "0.png"))), ("2", Plane(str(tmp_path / "1.png")))))
    one = screen.sites()[:1].assign(files=pixel_column([planes]))
    assert (read_site(planes, [1, 2]) == x[:2]).all() and not read_site(planes, [2, "9?"])[1].any()
    check_files(one, [1, 2, "9?"])
    with pytest.raises(FileNotFoundError, match="channel 9 of .* does not exist"):
        read_site(planes, [1, 9])
    with pytest.raises(FileNotFoundError, match="channel 9 of .* does not exist .site "):
        check_files(one, [1, 9])
    (tmp_path / "1.png").unlink()
    assert present_sites(one, [1, 2])[1] == 1


def test_packing_again_keeps_what_a_site_is(screen, tmp_path):
    sites = screen.sites()
    first = pack_sites(sites, tmp_path / "a", screen.channels, progress=False)
    again = pack_sites(sites.assign(files=first.files(sites.site_id)), tmp_path / "b", screen.channels, progress=False)
    at, other = first.rows(sites.site_id[3:4])[0], again.rows(sites.site_id[3:4])[0]
    assert not again.manifest["composite"] and (again.read(other) == first.read(at)).all()
    assert (read_site(again.files(sites.site_id)[3], (4, 2)) == first.read(at)[[3, 1]]).all()
    shutil.rmtree(tmp_path / "a")
    assert isinstance(Store(tmp_path / "b").sites.files.array, PixelsArray)


def test_a_screen_of_a_store_that_lacks_sites(screen):
    ids, path = screen.sites().site_id, screen.path.as_posix()
    packed = pd.Series(store_column("s", np.arange(2)), index=ids[:2])
    files = Screen(screen.path, screen.layout, screen.wells, packed=packed).sites().files
    assert files[:3].tolist() == [StoreRow(path, 0), StoreRow(path, 1), AbsentSite(path, ids[2])]
