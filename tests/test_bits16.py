"""Stores of 16 bits: what the camera wrote comes back in every format, and trains like the files read with limits."""

import json
import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from cases import each
from fastai.data.all import DataBlock
from fastcore.basics import AttrDict
from fasttransform import Pipeline
from PIL import Image

from rcic_fastai.data.augment import (MatchHistograms, RandomSquareCrop, Standardize, channel_histograms, channel_stats,
                                      screen_transforms)
from rcic_fastai.data.block import MultiChannelImageBlock, screen_dataloaders
from rcic_fastai.data.grey import GreyLimits
from rcic_fastai.data.hashes import hash_sites
from rcic_fastai.data.image import MultiChannelImage, show_channels, stains_to_rgb
from rcic_fastai.data.pack import clipped_pixels, pack_screen, pack_sites
from rcic_fastai.data.statistics import measure_histograms, measure_stats
from rcic_fastai.data.store import DamagedSite, Store, read_site, verify_store
from rcic_fastai.labels.pixel_statistics import site_statistics
from rcic_fastai.screen.counts import eight_bits, read_counts
from rcic_fastai.screen.describe import describe_screen
from rcic_fastai.screen.planes import read_planes
from rcic_fastai.screen.read import read_screen

FORMATS = [("blosc2", "default"), ("blosc2", "small"), ("blosc2", "fast"), ("blosc2", "windows"), ("zarr", "default"),
           ("raw", "default")]
CHANNELS = "w1=DAPI[300-1500]", "w2=GFP[250.5-900]", "w3=RNA[0-65535]"
SIZE = 48


def quiet(*args):
    pass


def camera(rng, well):
    "Counts of one site, uint16 (3, SIZE, SIZE)"
    y = np.arange(SIZE)[:, None] + np.arange(SIZE) * (1 + well)
    return np.stack([rng.poisson(200 + (8 + 2 * c) * (y % 97)) for c in range(3)]).astype(np.uint16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two plates of four wells with two sites, 16-bit TIFF files, described"
    root, rng = tmp_path_factory.mktemp("camera"), np.random.default_rng(0)
    rows = []
    for plate in (1, 2):
        for i, well in enumerate(("B02", "B03", "C02", "C03")):
            rows.append(dict(plate=plate, well=well, treatment=("DMSO", "one", "two", "three")[i],
                             control_type="negative" if not i else ""))
            for site in (1, 2):
                for c, x in enumerate(camera(rng, i), 1):
                    Image.fromarray(x).save(root / f"p{plate}_{well}_s{site}_w{c}.tif")
    pd.DataFrame(rows).to_csv(root / "layout.csv", index=False)
    describe_screen(root, root / "layout.csv", "p{plate}_{well}_s{site}_{channel}.tif", ("w1=DAPI", "w2=GFP", "w3=RNA"),
                    say=quiet)
    known = json.loads((root / "screen.json").read_text())
    (root / "screen.json").write_text(json.dumps({**known, "channels": CHANNELS}))
    return root


@pytest.fixture(scope="module")
def stores(folder, tmp_path_factory):
    "The screen as files, as a store of 8 and of 16 bits"
    screen, out = read_screen(folder), tmp_path_factory.mktemp("stores")
    made = {b: pack_screen(screen, out / str(b), bits=b, progress=False, say=quiet) for b in (8, 16)}
    return AttrDict(files=screen, eight=made[8], sixteen=made[16], out=out)


@each("kind", FORMATS)
def test_every_format_gives_the_counts_back(kind, stores, tmp_path):
    if kind[0] == "zarr":
        pytest.importorskip("zarr")
    sites = stores.files.sites()
    store = pack_sites(sites, tmp_path / "s", CHANNELS, *kind, bits=16, shard_sites=5, workers=2, progress=False)
    want = [read_counts(f, CHANNELS) for f in sites.set_index("site_id").files[store.sites.site_id]]
    assert store.bits == 16 and store.dtype == np.uint16 and len(verify_store(store, sites, progress=False)) == 0
    for i, x in enumerate(want):
        got = store.read(i)
        assert got.dtype == np.uint16 and np.array_equal(got, x)
        assert np.array_equal(store.read(i, 5, 7, 20, 30), x[:, 5:25, 7:37])
    rows = [3, 0, 9, 7]
    batch = store.read_batch(rows, threads=2)
    assert batch.dtype == torch.uint16 and np.array_equal(batch.numpy(), np.stack([want[r] for r in rows]))
    ahead = list(store.read_ahead([rows[:3], rows[3:]], threads=2))
    assert np.array_equal(torch.cat(ahead).numpy(), batch.numpy())
    for wrong in (torch.empty(4, 3, SIZE, SIZE, dtype=torch.uint8), torch.empty(4, 3, SIZE, SIZE, dtype=torch.int16)):
        with pytest.raises(ValueError, match="expected contiguous uint16"):
            store.read_batch(rows, wrong)


@each("kind", [("blosc2", "default"), ("raw", "default")])
def test_one_wrong_bit_is_found(kind, stores, tmp_path):
    store = pack_sites(stores.files.sites(), tmp_path / "s", CHANNELS, *kind, bits=16, progress=False)
    shard = tmp_path / "s" / "shards" / "00000.bin"
    data = bytearray(shard.read_bytes())
    data[store.sites.offset[4] + 60] ^= 1
    shard.write_bytes(data)
    damaged = Store(tmp_path / "s")
    with pytest.raises(DamagedSite, match=damaged.sites.site_id[4]):
        damaged.read(4)
    assert verify_store(damaged, progress=False).site_id.tolist() == [damaged.sites.site_id[4]]


def test_8_bits_are_packed_as_before(stores):
    manifest = json.loads((stores.out / "8" / "manifest.json").read_text())
    assert "bits" not in manifest and manifest["kind"] == "rcic_fastai store 1" and stores.eight.bits == 8
    deep = json.loads((stores.out / "16" / "manifest.json").read_text())
    assert deep["bits"] == 16 and deep["kind"] == "rcic_fastai store 2" and tuple(deep["channels"]) == CHANNELS
    for a, b in zip(stores.eight.sites.files, stores.sixteen.sites.files):
        assert np.array_equal(read_site(b, CHANNELS, bits=8), read_site(a, CHANNELS))
    assert "16 bits" in repr(stores.sixteen) and "bits" not in repr(stores.eight)


@each("change,match", [(dict(bits=8), "bits is 8, expected 16"), (dict(bits=True), "bits is True"),
                       (dict(kind="rcic_fastai store 1"), "bits is 16, expected 8"), (dict(bits="16"), "bits is 16"),
                       (dict(kind="rcic_fastai store 3"), "kind 'rcic_fastai store 3'")])
def test_a_manifest_that_lies_of_its_bits(change, match, stores, tmp_path):
    shutil.copytree(stores.out / "16", tmp_path / "s")
    path = tmp_path / "s" / "manifest.json"
    manifest = {k: v for k, v in json.loads(path.read_text()).items() if k != "digest"}
    path.write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ValueError, match=match):
        Store(tmp_path / "s")


def test_packing_resumes_with_the_same_bits_only(stores, tmp_path):
    from rcic_fastai.data import pack

    sites, out = stores.files.sites(), tmp_path / "s"
    out.mkdir()
    pack._begin(out, pack._plan(sites, CHANNELS, "blosc2", "default", None, None, [], 16))
    with pytest.raises(ValueError, match="bits 16 instead of 8"):
        pack_sites(sites, out, CHANNELS, progress=False)
    assert pack_sites(sites, out, CHANNELS, bits=16, progress=False).bits == 16


def save(folder, **planes):
    for name, x in planes.items():
        Image.fromarray(x).save(folder / f"a_{name}.tif")
    return str(folder / "a_{channel}.tif")


def test_what_16_bits_are_not_for(stores, tmp_path):
    x = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pattern = save(tmp_path, eight=x, deep=x.astype(np.uint16) * 200, floats=x / np.float32(100),
                   whole=x.astype(np.float32), negative=x.astype(np.int32) - 3)
    one = stores.files.sites().iloc[:1].assign(files=pattern)
    for channels, match in [(("eight",), "the images have 8 bits"), (("eight[3-90]",), "the images have 8 bits"),
                            (("deep",), "deeper images need grey limits"),
                            (("floats[0-2]",), "float32 from 0 to 2.55, and 16 bits hold whole numbers"),
                            (("negative[0-100]",), "from -3 to 252")]:
        with pytest.raises(ValueError, match=match):
            pack_sites(one, tmp_path / "s", channels, bits=16, progress=False)
    with pytest.raises(ValueError, match="bits is 12"):
        pack_sites(one, tmp_path / "s", ["deep[0-9]"], bits=12, progress=False)
    with pytest.raises(ValueError, match="the images have 8 bits"):
        pack_sites(stores.files.sites().assign(files=stores.eight.sites.files.iloc[0]), tmp_path / "s", CHANNELS,
                   bits=16, progress=False)
    mixed = pack_sites(one, tmp_path / "s", ("eight", "deep[100-40000]", "whole[0-255]", "gone?"), bits=16,
                       progress=False)
    assert np.array_equal(mixed.read(0), [x * np.uint16(257), x.astype(np.uint16) * 200, x, x * 0])
    got = GreyLimits(mixed.channels)(MultiChannelImage.create(mixed.read(0)))
    assert np.abs(np.asarray(got) - read_planes(pattern, mixed.channels)).max() <= 0.5001


def test_a_store_of_16_bits_becomes_one_of_8(stores, tmp_path):
    again = pack_screen(read_screen(stores.out / "16"), tmp_path / "s", progress=False, say=quiet)
    for i in range(len(again)):
        assert np.array_equal(again.read(i), stores.eight.read(i))
    small = pack_screen(stores.files, tmp_path / "small", bits=16, size=24, progress=False, say=quiet)
    mean = stores.sixteen.read(3).reshape(3, 24, 2, 24, 2).mean((2, 4))
    assert small.shape == (3, 24, 24) and np.abs(small.read(3) - mean).max() <= 0.51


def loaders(screen, **kwargs):
    settings = dict(domain="plate", bs=4, seed=3, device="cpu")
    return screen_dataloaders(screen, **{**settings, **kwargs})


@each("by", ["image", "plate", "experiment", "screen"])
def test_batches_mean_the_same_as_from_files(by, stores):
    batches = []
    for screen in (stores.files, read_screen(stores.out / "16")):
        dls = loaders(screen, transforms=[RandomSquareCrop(32, seed=1)])
        stats = None if by == "image" else measure_stats(dls, screen.sites(), by)
        tfms = screen_transforms(crop=32, intensity=0, standardize=by, stats=stats, seed=5)
        batches.append(list(loaders(screen, transforms=tfms).train))
    files, deep = batches
    assert len(files) == len(deep)
    for a, b in zip(files, deep):
        assert b[0].dtype == torch.float32 and isinstance(b[0], MultiChannelImage)
        assert torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
        # rounding to 8 bits is .29 grey values, the narrowest channel (of 65,535) spreads over less than 4
        assert (a[0][:, :2] - b[0][:, :2]).abs().max() < 0.02


def test_raw_batches_and_workers(stores):
    deep = read_screen(stores.out / "16")
    dls = loaders(deep, transforms=[], num_workers=2)
    x = next(iter(dls.valid if len(dls.valid_ds) else dls.train))[0]
    assert x.dtype == torch.uint16 and isinstance(x, MultiChannelImage)
    item_by_item = dls.train.new()
    item_by_item.before_batch = Pipeline([lambda b: b])
    for dl in (dls.train, item_by_item):
        seen = torch.cat([b[0].as_subclass(torch.Tensor) for b in dl])
        assert seen.dtype == torch.uint16 and seen.shape == (len(deep.sites()), 3, SIZE, SIZE)
    assert torch.equal(pickle.loads(pickle.dumps(x)), x)
    assert len(pickle.loads(pickle.dumps(stores.sixteen)).read(1)) == 3


def test_histograms(stores):
    counts, curves = [], []
    for screen in (stores.files, read_screen(stores.out / "16")):
        dls = loaders(screen, transforms=screen_transforms(intensity=0))
        counts.append(measure_histograms(dls, screen.sites(), "plate"))
        match = MatchHistograms("plate", counts[-1])
        curves.append(torch.cat([b[0] for b in loaders(screen, transforms=[match]).train]))
    assert torch.equal(*counts)
    assert (curves[0] - curves[1])[:, :2].abs().mean() < 0.01


def test_statistics_want_grey_values(stores):
    raw = [(MultiChannelImage.create(stores.sixteen.read(0))[None], torch.zeros(1, 3, dtype=torch.int64))]
    for function in (channel_stats, channel_histograms):
        with pytest.raises(ValueError, match="grey values that GreyLimits made of uint16, .* got torch.uint16"):
            function(raw)
    limits = GreyLimits(CHANNELS)
    mean, _ = channel_stats([(limits(x), c) for x, c in raw], "screen")
    want = read_site(stores.sixteen.sites.files[0], CHANNELS, bits=8).mean((1, 2))
    assert np.abs(mean.numpy() - want).max() < 0.05


def test_hashes_and_statistics_do_not_see_the_depth(stores):
    a, b = stores.eight.sites, stores.sixteen.sites
    assert np.array_equal(*[hash_sites(s, CHANNELS, progress=False) for s in (a, b)])
    pd.testing.assert_frame_equal(*[site_statistics(s.files, CHANNELS, progress=False) for s in (a, b)])


def test_limits_are_chosen_anew(stores):
    narrow = "w1=DAPI[400-700]", "w2=GFP[300-500]"
    deep, files = stores.sixteen.sites.files[5], stores.files.sites().set_index("site_id").files
    own = files[stores.sixteen.sites.site_id[5]]
    assert np.array_equal(read_site(deep, narrow, bits=8), read_site(own, narrow))
    with pytest.raises(ValueError, match="has no channel w1=DAPI"):
        read_site(stores.eight.sites.files[5], narrow)
    with pytest.raises(ValueError, match="has no channel w1=other"):
        read_site(deep, ["w1=other[400-700]"])


def test_depths_are_not_mixed(stores):
    sites = pd.concat([s.sites.assign(sirna=0, well_type="treatment").iloc[:4] for s in (stores.eight, stores.sixteen)],
                      ignore_index=True)
    sites["sirna"] = range(len(sites))
    dls = screen_dataloaders(sites, channels=CHANNELS, target="sirna", domain=None, bs=8, device="cpu")
    with pytest.raises(ValueError, match="a batch holds images of one depth"):
        list(dls.train)


def test_a_block_of_fastai(stores):
    def pixels(transforms, files):
        block = DataBlock([MultiChannelImageBlock(CHANNELS)], splitter=lambda o: ([*range(len(o))], []),
                          batch_tfms=transforms)
        return torch.cat([b[0] for b in block.dataloaders(files, bs=4, shuffle=False, drop_last=False,
                                                          device="cpu").train])

    a, b = (pixels([], list(s.sites.files)) for s in (stores.eight, stores.sixteen))
    assert a.max() <= 1 and (a - b).abs().max() <= 0.51 / 255
    normal = pixels([Standardize()], list(stores.sixteen.sites.files))
    assert normal.std().item() == pytest.approx(1, abs=0.01)


def test_pictures(stores):
    x = MultiChannelImage.create(stores.sixteen.read(0))
    rgb = stains_to_rgb(x)
    assert rgb.shape == (SIZE, SIZE, 3) and rgb.max() > 0.5
    limits = np.array([[300, 1500], [250.5, 900], [0, 65535]])
    eight = stains_to_rgb(eight_bits(stores.sixteen.read(0), CHANNELS), np.array([[0, 255]] * 3))
    assert np.abs(stains_to_rgb(x, limits) - eight).max() < 0.02
    show_channels(x, "abc")
    read_screen(stores.out / "16").show_well("B02")
    loaders(read_screen(stores.out / "16")).show_batch(max_n=2)


def test_clipped_shares_are_said(stores, tmp_path):
    said = []
    pack_screen(stores.files, tmp_path / "s", progress=False, say=said.append)
    x = np.stack([stores.sixteen.read(i) for i in range(len(stores.sixteen))])
    below, above = (x[:, 1] < 250.5).mean(), (x[:, 1] > 900).mean()
    assert f"GFP {below:.2%} and {above:.2%}" in said[0] and "DAPI" in said[0]
    shares = clipped_pixels(stores.sixteen.sites, CHANNELS)
    assert shares.loc["RNA"].tolist() == [0, 0] and shares.above["GFP"] == pytest.approx(above)
    assert not len(clipped_pixels(stores.eight.sites, CHANNELS))
    known = {str(CHANNELS[1]): [.25, .5]}
    told = clipped_pixels(stores.sixteen.sites, CHANNELS, known)
    assert told.loc["GFP"].tolist() == [.25, .5] and told.index.tolist() == shares.index.tolist()
    pack_screen(stores.files, tmp_path / "deep", bits=16, progress=False, say=said.append)
    assert len(said) == 1
