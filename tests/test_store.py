"""Packed stores: every format gives back every bit, damage is found and named, interruptions leave no trace."""

import errno
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cases import each
import torch
from forked import locks_of_its_own

import rcic_fastai.data.codec as codec_module
import rcic_fastai.data.pack as pack_module
from rcic_fastai.data.select import select_sites
from rcic_fastai.data.block import screen_dataloaders
from rcic_fastai.data.store import read_site
from rcic_fastai.data.image import MultiChannelImage
from rcic_fastai.screen.sites import present_sites
from rcic_fastai.screen.read import read_screen
from rcic_fastai.data.buffers import BatchBuffers, read_ahead
from rcic_fastai.data.pack import pack_screen, pack_sites
from rcic_fastai.data.store import DamagedSite, Store, open_store
from rcic_fastai.data.store import verify_store

FORMATS = [("blosc2", "default"), ("blosc2", "small"), ("blosc2", "fast"), ("blosc2", "windows"), ("zarr", "default"),
           ("raw", "default")]
NAMES = ["-".join(f) for f in FORMATS]


def quiet(*args):
    pass


def contents(folder):
    "Every file below a folder with its bytes"
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def need_zarr(format):
    if format == "zarr":
        pytest.importorskip("zarr", reason="the format zarr needs zarr 3, which needs Python 3.11")


@pytest.fixture(scope="module")
def screen(small_screen):
    return read_screen(small_screen)


@pytest.fixture(scope="module")
def packed(screen, tmp_path_factory):
    "A store of all sites, in shards of 50 sites"
    out = tmp_path_factory.mktemp("store") / "packed"
    pack_screen(screen, out, shard_sites=50, progress=False, say=quiet)
    return out


@pytest.fixture()
def copy(packed, tmp_path):
    return Path(shutil.copytree(packed, tmp_path / "copy"))


@pytest.mark.slow
@pytest.mark.parametrize("format, preset", FORMATS, ids=NAMES)
def test_every_bit_comes_back(screen, tmp_path, format, preset):
    need_zarr(format)
    sites = screen.sites().sample(frac=1, random_state=3)[:30]
    store = pack_sites(sites, tmp_path / "s", format=format, preset=preset, shard_sites=8, progress=False)
    assert store.sites.site_id.tolist() == sites.sort_values(["experiment", "plate", "well", "site"]).site_id.tolist()
    rows = store.rows(sites.site_id)
    batch = store.read_batch(rows, threads=2)
    rng = np.random.default_rng(0)
    for x, row, files in zip(batch, rows, sites.files):
        pixels = read_site(files)
        assert (x.numpy() == pixels).all() and (store.read(row) == pixels).all()
        (y, x0), (h, w) = rng.integers(0, 40, 2), rng.integers(1, 8, 2)
        assert (store.read(row, y, x0, h, w) == pixels[:, y : y + h, x0 : x0 + w]).all()
    assert (store.read(3, y=5) == store.read(3)[:, 5:]).all()


@each("shape", [(1, 1, 1), (4, 33, 57), (6, 128, 64), (3, 640, 832)])
@each("preset", ["default", "small", "fast", "windows"])
def test_images_of_any_shape(shape, preset):
    codec, rng = codec_module._Blosc2(shape, preset), np.random.default_rng(1)
    x = (rng.normal(9, 3, shape).clip(0, 255) + np.arange(shape[2])).astype(np.uint8)
    data, out = codec.encode(x), np.empty_like(x)
    codec.decode(data, out)
    assert (out == x).all()
    h, w = (shape[1] + 1) // 2, (shape[2] + 1) // 2
    y, x0 = shape[1] - h, shape[2] - w
    assert (codec.window(np.frombuffer(data, np.uint8), y, x0, h, w) == x[:, y:, x0:]).all()


def test_a_store_stands_for_its_screen(screen, packed):
    again = read_screen(packed)
    pd.testing.assert_frame_equal(again.wells, screen.wells)
    theirs, ours = screen.sites(), again.sites()
    assert theirs.site_id.equals(ours.site_id) and set(Store(packed).sites.files) == set(ours.files)
    for i in (0, 77, len(ours) - 1):
        assert (MultiChannelImage.create(ours.files[i]) == MultiChannelImage.create(theirs.files[i])).all()
    assert (MultiChannelImage.create(ours.files[5], (4, 2)) == MultiChannelImage.create(theirs.files[5], (4, 2))).all()
    with pytest.raises(ValueError, match="has no channel 9; it holds 1, 2, 3, 4, 5, 6"):
        MultiChannelImage.create(ours.files[5], (1, 9))


def test_a_site_left_out_is_a_missing_file(screen, tmp_path):
    sites = screen.sites()
    pack_sites(sites.drop(index=7), tmp_path / "s", progress=False, tables=screen.path)
    part = read_screen(tmp_path / "s")
    lost = sites.site_id[7]
    with pytest.raises(FileNotFoundError, match=f"the row of site {lost} in .* does not exist .site {lost}"):
        select_sites(part, "train", "all")
    assert len(present_sites(part.sites())[0]) == len(sites) - 1
    with pytest.raises(FileNotFoundError, match=f"holds no site {sites.site_id[7]}"):
        MultiChannelImage.create(part.sites().files[7])
    with pytest.raises(ValueError, match=f"site {sites.site_id[7]} is not in"):
        screen_dataloaders(select_sites(screen, wells="all"), target="well_type", source=tmp_path / "s")


def test_missing_png_files_are_told_before_packing(screen, tmp_path):
    broken = read_screen(shutil.copytree(screen.path, tmp_path / "broken"))
    gone = Path(broken.sites().files[9].format(channel=3))
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        pack_screen(broken, tmp_path / "s", progress=False)
    assert not (tmp_path / "s").exists()
    said = []
    store = pack_screen(broken, tmp_path / "s", present_only=True, progress=False, say=said.append)
    assert len(store) == len(broken.sites()) - 1 and "left out: 1" in said[0]


def test_one_shape(screen, tmp_path):
    from PIL import Image

    broken = read_screen(shutil.copytree(screen.path, tmp_path / "broken"))
    odd = broken.sites().iloc[4]
    for c in range(1, 7):
        Image.new("L", (50, 48)).save(odd.files.format(channel=c))
    with pytest.raises(ValueError,
                       match=rf"site {odd.site_id} has shape \(6, 48, 50\), but the first one \(6, 48, 48\)"):
        pack_screen(broken, tmp_path / "s", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["blosc2", "raw", "zarr"])
def test_every_flipped_byte_is_found(screen, tmp_path, format):
    "Bytes all over a shard, the first and the last ones included"
    need_zarr(format)
    sites = screen.sites()[:6]
    store = pack_sites(sites, tmp_path / "s", format=format, progress=False)
    shard = max((f for f in (tmp_path / "s").rglob("*/*") if f.is_file() and f.name != "zarr.json"),
                key=lambda f: f.stat().st_size)
    whole, rng, pixels = shard.read_bytes(), np.random.default_rng(5), store.read_batch(range(6)).numpy()
    for at in [0, 1, 15, len(whole) - 1, *rng.integers(0, len(whole), 12)]:
        changed = bytearray(whole)
        changed[at] ^= 1 << int(rng.integers(8))
        shard.write_bytes(changed)
        opened = Store(store.path)
        problems = verify_store(opened, progress=False)
        assert len(problems), at
        bad = opened.sites.index[opened.sites.site_id == problems.site_id[0]][0]
        if format == "zarr":  # the checksums of the chunks are compared by others, and when it is verified
            with suppress(DamagedSite): assert (opened.read(bad) == pixels[bad]).all()
        else:
            with pytest.raises(DamagedSite, match=f"site {problems.site_id[0]} .row {bad}"):
                opened.read_batch([bad])
        if format != "zarr":
            where = opened.sites.offset <= at
            assert problems.site_id.tolist() == [opened.sites.site_id[where[where].index[-1]]]
            with pytest.raises(DamagedSite):
                opened.read(bad, 3, 3, 9, 9)
    shard.write_bytes(whole[: len(whole) // 2])
    assert len(verify_store(Store(store.path), progress=False)) >= (1 if format == "zarr" else 2)
    shard.unlink()
    if format == "zarr":
        problems = verify_store(Store(store.path), progress=False)
        bad = store.rows(problems.site_id)[0]
        for read in (lambda opened: opened.read(bad), lambda opened: opened.read(bad, 3, 3, 9, 9)):
            with pytest.raises(FileNotFoundError, match="/0/c/0/0/0 does not exist; it holds site "
                               + problems.site_id[0]):
                read(Store(store.path))
    else:
        with pytest.raises(FileNotFoundError, match=f"00000.bin does not exist; it holds site {sites.site_id[2]}"):
            Store(store.path).read(2)


@pytest.mark.slow
def test_verify_compares_with_the_files(screen, copy, tmp_path):
    assert len(verify_store(Store(copy), screen.sites(), progress=False)) == 0
    changed = read_screen(shutil.copytree(screen.path, tmp_path / "changed"))
    from PIL import Image

    row = changed.sites().iloc[21]
    file = row.files.format(channel=5)
    pixels = np.asarray(Image.open(file)).copy()
    pixels[3, 4] ^= 1
    Image.fromarray(pixels).save(file)
    problems = verify_store(Store(copy), changed.sites(), progress=False)
    assert problems.site_id.tolist() == [row.site_id] and "1 pixel differs" in problems.problem[0]
    Path(file).unlink()
    assert "could not be compared" in verify_store(Store(copy), changed.sites(), progress=False).problem[0]
    with pytest.raises(ValueError, match="is not among the 5 sites given"):
        verify_store(Store(copy), screen.sites()[:5], progress=False)


def test_index_and_tables_are_verified(screen, copy):
    for name in ("sites.parquet", "train.csv", "sample_submission.csv"):
        whole = (copy / name).read_bytes()
        changed = bytearray(whole)
        changed[len(whole) // 2] ^= 1
        (copy / name).write_bytes(changed)
        if name == "sites.parquet":
            with pytest.raises(ValueError, match="sites.parquet is not the file that was packed"):
                len(Store(copy).sites)
        else:
            problems = verify_store(Store(copy), progress=False)
            assert problems.site_id.tolist() == [name] and "is not the file that was packed" in problems.problem[0]
        (copy / name).write_bytes(whole)
    (copy / "train.csv").unlink()
    assert "train.csv does not exist" in verify_store(Store(copy), progress=False).problem[0]


def test_an_unfinished_store_is_no_screen(screen, copy):
    (copy / "packing.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="packing was interrupted; run the same rcic-pack to resume"):
        read_screen(copy)
    (copy / "packing.json").unlink()
    (copy / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="a store whose manifest.json is missing"):
        read_screen(copy)


def test_names_are_not_rows(packed, screen):
    store = Store(packed)
    name = store.sites.site_id[7]
    with pytest.raises(TypeError, match=f"row '{name}' is a name; `rows"):
        store.read(name)
    assert store.rows([name]).tolist() == [7]
    assert (store.rows(screen.sites()[:5]) == store.rows(screen.sites().site_id[:5])).all()


def test_smaller_images(screen, tmp_path):
    "Halving is the mean of four pixels, rounded; other sizes keep the mean; verify knows"
    sites = screen.sites()[:10]
    half = pack_sites(sites, tmp_path / "half", size=24, progress=False)
    x = read_site(sites.files[2]).astype(np.float64)
    expected = x.reshape(6, 24, 2, 24, 2).mean((2, 4))
    ours = half.read(half.rows(sites.site_id[2:3])[0])
    assert np.abs(ours - expected).max() <= 0.5 and half.shape == (6, 24, 24) and half.manifest["size"] == 24
    assert "images reduced to 24 pixels" in repr(half)
    assert len(verify_store(half, sites, progress=False)) == 0
    odd = pack_sites(sites, tmp_path / "odd", size=30, progress=False)
    assert odd.shape == (6, 30, 30) and abs(odd.read(0).mean() - half.read(0).mean()) < 0.2
    with pytest.raises(ValueError, match="48x48 pixels cannot be reduced to 64"):
        pack_sites(sites, tmp_path / "large", size=64, progress=False)


@pytest.mark.parametrize("change, message", [
    (dict(format="tar"), "format is 'tar', expected one of 'blosc2', 'zarr', 'raw'"),
    (dict(preset="tiny"), "preset is 'tiny', expected one of 'default', 'small', 'fast', 'windows'"),
    (dict(format="raw", preset="small"), "format 'raw' has no preset 'small'")])
def test_wrong_settings(screen, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        pack_screen(screen, tmp_path / "s", progress=False, **change)
    assert not (tmp_path / "s").exists()


def test_folders_that_hold_something_else(screen, copy, tmp_path):
    with pytest.raises(FileExistsError, match="holds a finished store"):
        pack_screen(screen, copy, progress=False)
    with pytest.raises(ValueError, match="is what is read"):
        pack_screen(screen, screen.path, progress=False)
    with pytest.raises(FileExistsError, match="is not empty"):
        pack_sites(screen.sites(), screen.path, progress=False)
    with pytest.raises(FileNotFoundError, match="holds no finished store"):
        Store(tmp_path)
    (copy / "manifest.json").write_text(json.dumps(dict(kind="other")))
    with pytest.raises(ValueError, match="manifest.json: kind 'other', expected"):
        Store(copy)


def test_rows_and_windows_outside(packed):
    store = Store(packed)
    for row in (-1, len(store)):
        with pytest.raises(IndexError, match=f"row {row} is outside 0-{len(store) - 1}"):
            store.read(row)
    for window in [(40, 0, 9, 9), (0, -1, 9, 9), (0, 0, 0, 9), (0, 0, 49, 48)]:
        with pytest.raises(ValueError, match="is not inside 48x48 pixels"):
            store.read(0, *window)
    for out in (torch.empty(2, 6, 48, 48), torch.empty(3, 6, 48, 48, dtype=torch.uint8),
                torch.empty(2, 6, 48, 96, dtype=torch.uint8)[..., ::2]):
        with pytest.raises(ValueError, match=r"expected contiguous uint8 \(2, 6, 48, 48\)"):
            store.read_batch([0, 1], out)


def test_shared_memory_and_pickles(packed):
    "What worker processes need: a store that travels, and memory that is not theirs"
    store = Store(packed)
    store.read(0)
    other, out = pickle.loads(pickle.dumps(store)), torch.empty(2, 6, 48, 48, dtype=torch.uint8).share_memory_()
    assert set(other.__dict__) == {"path", "manifest", "_local"}
    assert other.read_batch([4, 9], out).data_ptr() == out.data_ptr()
    assert (out[1].numpy() == store.read(9)).all()
    array = np.zeros((2, 6, 48, 48), np.uint8)
    store.read_batch([4, 9], array)
    assert (array == out.numpy()).all()


def test_a_store_packed_anew_is_opened_anew(screen, tmp_path):
    pack_sites(screen.sites()[:3], tmp_path / "s", progress=False)
    first = open_store(str(tmp_path / "s"))
    assert open_store(str(tmp_path / "s")) is first
    shutil.rmtree(tmp_path / "s")
    time.sleep(0.02)
    pack_sites(screen.sites()[:4], tmp_path / "s", progress=False)
    assert len(open_store(str(tmp_path / "s"))) == 4


# interruptions


def pack_in_child(sites, out, **kwargs):
    "Process id of a child that packs; it shares what is imported"
    pid = os.fork()
    if pid:
        return pid
    try:
        locks_of_its_own()
        sys.stderr = open(os.devnull, "w")
        pack_sites(sites, out, progress=False, workers=1, **kwargs)
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process; this system has no fork")
@pytest.mark.parametrize("format, kills", [("blosc2", 10), ("raw", 3), ("zarr", 3)])
def test_killed_at_random_moments(screen, tmp_path, format, kills):
    "Killed and started again, packing gives the bytes of an uninterrupted one, and never redoes a finished shard"
    need_zarr(format)
    sites, settings = screen.sites(), dict(format=format, shard_sites=10)
    start = time.time()
    os.waitpid(pack_in_child(sites, tmp_path / "whole", **settings), 0)
    duration, rng, out, kept = time.time() - start, random.Random(4), tmp_path / "killed", 0
    for _ in range(kills):
        pid = pack_in_child(sites, out, **settings)
        time.sleep(rng.uniform(0, duration / 4))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        parts = {f: f.stat().st_mtime_ns for f in (out / "parts").glob("*.npy")} if (out / "parts").exists() else {}
        kept = max(kept, len(parts))
        if not (out / "manifest.json").exists():
            with pytest.raises(FileNotFoundError, match="holds no finished store"):
                Store(out)
    if not (out / "manifest.json").exists() or (out / "packing.json").exists():
        before = {f.name: f.stat().st_mtime_ns for f in (out / "shards").glob("*.bin")}
        done = {f.stem for f in (out / "parts").glob("[0-9]*.npy")}
        assert os.waitpid(pack_in_child(sites, out, **settings), 0)[1] == 0
        for name, written in before.items():
            assert Path(name).stem not in done or (out / "shards" / name).stat().st_mtime_ns == written
    assert contents(out) == contents(tmp_path / "whole")


def test_killed_between_its_last_two_steps(screen, tmp_path, monkeypatch):
    sites = screen.sites()[:12]
    pack_sites(sites, tmp_path / "whole", progress=False)
    monkeypatch.setattr(pack_module, "_tidy", lambda out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pack_sites(sites, tmp_path / "s", progress=False)
    monkeypatch.undo()
    assert len(pack_sites(sites, tmp_path / "s", progress=False)) == 12
    assert contents(tmp_path / "s") == contents(tmp_path / "whole")


def test_packing_goes_on_only_with_the_same_settings(screen, tmp_path, monkeypatch):
    sites = screen.sites()[:30]
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        pack_sites(sites, tmp_path / "s", shard_sites=8, progress=False)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="packing was interrupted: run the same command to resume"):
        Store(tmp_path / "s")
    with pytest.raises(ValueError, match="unfinished store with preset 'default' instead of 'fast'"):
        pack_sites(sites, tmp_path / "s", preset="fast", shard_sites=8, progress=False)
    with pytest.raises(ValueError, match="30 sites instead of these 29"):
        pack_sites(sites[:29], tmp_path / "s", shard_sites=8, progress=False)
    assert len(pack_sites(sites, tmp_path / "s", shard_sites=8, progress=False)) == 30


def stop_after(monkeypatch, shards, error=KeyboardInterrupt):
    "Let packing fail in the middle of a shard"
    encode, count = pack_module._Packer._encoded, []

    def encoded(self, row):
        count.append(row)
        if len(count) > 8 * shards + 6 + 3:  # six go into the estimate of the size
            raise error
        return encode(self, row)

    monkeypatch.setattr(pack_module._Packer, "_encoded", encoded)


def test_too_small_a_disk_is_told_before_anything_is_written(screen, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9 - 2000, 2000))
    with pytest.raises(OSError, match=r"needs about \d\.\d MB more, but .* has 0\.0 MB of free space") as e:
        pack_screen(screen, tmp_path / "s", progress=False)
    assert e.value.errno == errno.ENOSPC and not (tmp_path / "s").exists()


def test_a_disk_that_fills_up(screen, tmp_path, monkeypatch):
    "A clear message, nothing half-written, and the shards that were finished are kept"
    sites, out = screen.sites()[:40], tmp_path / "s"
    stop_after(monkeypatch, 3, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match=f"the disk of {out} is full; make room and run the same command: "
                       "finished shards are kept"):
        pack_sites(sites, out, shard_sites=8, progress=False)
    assert sorted(f.name for f in (out / "shards").iterdir()) == ["00000.bin", "00001.bin", "00002.bin"]
    assert not (out / "manifest.json").exists() and not [f for f in out.rglob(".*")]
    monkeypatch.undo()
    written = (out / "shards" / "00001.bin").stat().st_mtime_ns
    store = pack_sites(sites, out, shard_sites=8, progress=False)
    assert (out / "shards" / "00001.bin").stat().st_mtime_ns == written
    assert len(verify_store(store, sites, progress=False)) == 0


# other programs, other places


def test_zarr_is_read_by_zarr_and_from_a_url(screen, tmp_path):
    import fsspec  # a requirement

    zarr = pytest.importorskip("zarr", reason="the format zarr needs zarr 3, which needs Python 3.11")
    store = pack_screen(screen, tmp_path / "z", format="zarr", progress=False, say=quiet)
    site = store.sites.iloc[70]
    array = zarr.open_array(tmp_path / "z" / site.place / "0", mode="r")
    assert array.shape == array.shards == (6, 48, 48) and array.chunks == (1, 48, 48)
    assert array.metadata.zarr_format == 3 and array.metadata.dimension_names == ("c", "y", "x")
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "z"), "/bucket/z", recursive=True)
    remote = Store("memory://bucket/z")
    assert (remote.read(70) == store.read(70)).all() and (array[:] == store.read(70)).all()
    assert (remote.read(70, 5, 6, 7, 8) == store.read(70)[:, 5:12, 6:14]).all()
    sites = select_sites(screen)
    ours, theirs = (list(screen_dataloaders(sites, bs=8, transforms=[], source=s, num_workers=2).train)
                    for s in (remote, None))
    assert len(ours) == len(theirs) and all((a[0] == b[0]).all() for a, b in zip(ours, theirs))
    memory.rm("/bucket", recursive=True)


@pytest.fixture(scope="module")
def plates(screen, tmp_path_factory):
    "A store of format zarr: plates of OME-Zarr"
    need_zarr("zarr")
    out = tmp_path_factory.mktemp("plates") / "z"
    return pack_screen(screen, out, format="zarr", progress=False, say=quiet)


def test_a_store_is_plates_of_ome_zarr(screen, plates):
    "Every plate, well and image by the validator of the specification's community"
    models = pytest.importorskip("ome_zarr_models.v05", reason="it validates OME-Zarr")
    import zarr

    folders, images = sorted((Path(plates.path) / "plates").iterdir()), 0
    assert len(folders) == len(screen.wells.drop_duplicates(["experiment", "plate"]))
    for folder in folders:
        plate = models.HCS.from_zarr(zarr.open_group(folder, mode="r"))
        assert f"{plate.ome_attributes.plate.name}.ome.zarr" == folder.name and plate.n_wells > 0
        for well in plate.ome_attributes.plate.wells:
            well_group = models.Well.from_zarr(zarr.open_group(folder / well.path, mode="r"))
            for found in well_group.ome_attributes.well.images:
                image = models.Image.from_zarr(zarr.open_group(folder / well.path / found.path, mode="r"))
                channels = image.ome_attributes.omero["channels"]  # it does not look into these
                assert [c["label"] for c in channels][:2] == ["nucleus", "ER"] and channels[0]["color"] == "0033FF"
                windows = [c["window"] for c in channels]
                assert all(0 <= w["start"] < w["end"] <= w["max"] == 255 for w in windows)
                images += 1
    assert images == len(plates)


def test_a_store_is_described_like_any_plate_of_ome_zarr(screen, plates, tmp_path):
    "There and back: the same sites, channels and pixels"
    from rcic_fastai.screen.describe import describe_screen

    table = screen.wells.assign(plate=screen.wells.experiment + "_" + screen.wells.plate.astype(str),
                                treatment=screen.wells.sirna.map("s{}".format, na_action="ignore"))
    table[["plate", "well", "treatment", "experiment"]].to_csv(tmp_path / "wells.csv", index=False)
    described = describe_screen(Path(plates.path) / "plates", tmp_path / "wells.csv", out=tmp_path / "described",
                                say=quiet)
    assert described.channels and len(described.sites()) == len(plates)
    names = [c.partition("[")[0].rpartition("=")[2] for c in described.channels]
    assert names == ["nucleus", "ER", "actin", "RNA", "mitochondria", "Golgi"]
    key = lambda t, plate: sorted(zip(plate, t.well, t.site))
    ours, theirs = plates.sites, described.sites()
    assert key(ours, ours.experiment + "_" + ours.plate.astype(str)) == key(theirs, theirs.plate_name)
    row = theirs.iloc[11]
    same = ours[(ours.experiment + "_" + ours.plate.astype(str) == row.plate_name) & (ours.well == row.well)
                & (ours.site == row.site)]
    assert (read_site(row.files, described.channels) == plates.read(same.index[0])).all()


def test_descriptions_of_plates_are_verified(plates, tmp_path):
    theirs = Path(shutil.copytree(plates.path, tmp_path / "z"))
    assert len(verify_store(Store(theirs), progress=False)) == 0
    place = plates.sites.place[5]
    for name, problem in ((f"{place}/zarr.json", "is not the file"), (f"{place}/0/zarr.json", "does not exist"),
                          (place.rpartition("/")[0] + "/zarr.json", "is not the file")):
        whole = (theirs / name).read_bytes()
        (theirs / name).write_bytes(whole[:-1])
        if "exist" in problem: (theirs / name).unlink()
        problems = verify_store(Store(theirs), progress=False)
        assert problems.site_id.tolist() == [name] and problem in problems.problem[0]
        (theirs / name).write_bytes(whole)


def test_stores_of_zarr_of_version_0_1_0(plates, tmp_path):
    from zarr_0_1_0 import pack_0_1_0

    old = Store(pack_0_1_0(plates.path, tmp_path / "old"))
    assert not (tmp_path / "old" / "plates").exists() and len(verify_store(old, progress=False)) == 0
    assert (old.read_batch([0, 9, 71]) == plates.read_batch([0, 9, 71])).all()
    assert (old.read(9, 3, 4, 5, 6) == plates.read(9, 3, 4, 5, 6)).all()
    again = read_screen(tmp_path / "old")
    assert (read_site(again.sites().files[4]) == read_site(read_screen(plates.path).sites().files[4])).all()


def test_black_sites_and_several_times(screen, tmp_path):
    "zarr keeps no file of a black image; times are acquisitions of a plate"
    need_zarr("zarr")
    black = np.zeros((6, 48, 48), np.uint8)
    from PIL import Image

    for c in range(1, 7): Image.fromarray(black[0]).save(tmp_path / f"black_w{c}.png")
    sites = screen.sites()[:12]
    sites = sites.assign(time=np.tile([1, 3], 6),
                         files=[str(tmp_path / "black_w{channel}.png"), *map(str, sites.files[1:])])
    store = pack_sites(sites, tmp_path / "z", format="zarr", progress=False)
    row = store.rows(sites.site_id[:1])[0]
    assert (store.read(row) == black).all() and not store.read(row, 3, 3, 8, 8).any()
    assert len(verify_store(store, sites, progress=False)) == 0
    folder = tmp_path / "z" / store.sites.place[row].rsplit("/", 3)[0]
    plate = json.loads((folder / "zarr.json").read_text())["attributes"]["ome"]["plate"]
    assert plate["acquisitions"] == [dict(id=i, name=f"time {t}", maximumfieldcount=1) for i, t in enumerate((1, 3))]
    well = json.loads((folder / plate["wells"][0]["path"] / "zarr.json").read_text())["attributes"]["ome"]["well"]
    assert well["images"] == [dict(path="1", acquisition=0), dict(path="2", acquisition=1)]


def test_images_without_wells_are_a_collection(screen, tmp_path):
    need_zarr("zarr")
    import zarr

    sites = screen.sites()[:5].assign(experiment="kaggle", plate=1, well="A01", site=1)
    store = pack_sites(sites, tmp_path / "z", format="zarr", progress=False)
    assert store.sites.place.tolist() == [f"images.ome.zarr/{i}" for i in range(5)]
    group = zarr.open_group(tmp_path / "z" / "images.ome.zarr", mode="r")
    assert group.attrs["ome"] == {"version": "0.5", "bioformats2raw.layout": 3}
    assert (group["3/0"][:] == store.read(3)).all() and len(verify_store(store, sites, progress=False)) == 0


def test_raw_is_a_memmap(screen, tmp_path):
    store = pack_sites(screen.sites()[:9], tmp_path / "r", format="raw", shard_sites=4, progress=False)
    shard = np.memmap(tmp_path / "r" / "shards" / "00001.bin", np.uint8, "r").reshape(-1, 6, 48, 48)
    assert len(shard) == 4 and (shard[2] == store.read(6)).all()


# memory


def test_memory_is_used_again_only_when_nobody_holds_it():
    buffers = BatchBuffers((2, 3, 4), keep=2)
    kept = [buffers.take(5) for _ in range(6)]
    assert len({x.data_ptr() for x in kept}) == 6
    views = [kept[0][1:], kept[1].numpy(), kept[2].as_subclass(MultiChannelImage), kept[3].view(-1)]
    addresses = {x.data_ptr() for x in kept[:4]}
    del kept
    assert not {buffers.take(5).data_ptr() for _ in range(3)} & addresses
    del views
    a, b = buffers.take(5), buffers.take(4)
    assert len(buffers._free) == 0 and a.shape == (5, 2, 3, 4) and b.shape == (4, 2, 3, 4)
    assert buffers.take(6).shape[0] == 6


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_read_ahead(threads):
    rng, buffers, seen = np.random.default_rng(2), BatchBuffers((1, 2, 2)), []

    def read(row, out):
        time.sleep(rng.uniform(0, 0.002))
        out[...] = row

    batches = [rng.integers(0, 200, rng.integers(1, 9)) for _ in range(25)]
    for x, rows in zip(read_ahead(batches, read, buffers.take, threads), batches):
        assert x[:, 0, 1, 1].tolist() == rows.tolist()
        seen.append(x if len(seen) % 3 else x.clone())  # some are held, and must stay what they are
    assert [x[:, 0, 0, 0].tolist() for x in seen] == [b.tolist() for b in batches]


@pytest.mark.parametrize("threads", [0, 2])
def test_read_ahead_passes_errors_on_and_stops(threads):
    import threading

    def read(row, out):
        if row == 7:
            raise DamagedSite("row 7")

    n, reader = threading.active_count(), read_ahead([[1, 2], [7, 3], [4, 5]], read, BatchBuffers((1, 1, 1)).take,
                                                     threads)
    next(reader) if threads == 0 else None
    with pytest.raises(DamagedSite, match="row 7"):
        list(reader)
    early = read_ahead([[1]] * 100, read, BatchBuffers((1, 1, 1)).take, threads)
    next(early)
    early.close()
    assert threading.active_count() == n
