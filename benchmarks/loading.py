"""Reading sites: PNGs through five decoders, the packed store in every format, other file formats, and whole loaders.

All contestants read the same sites in turns and hand over the same thing, uint8 of shape (channels, height, width); one
that does not give the pixels of the PNGs bit by bit ends the benchmark with an error. The sites are the complete ones
of `--data`, or those of a simulated screen.
"""

import argparse
import importlib
import os
import shutil
import tempfile
import time
import warnings
from pathlib import Path

os.environ.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from measure import REPEATS, interleave, machine, markdown, spread, summary, write_report  # noqa: E402
from PIL import Image  # noqa: E402

from rcic_fastai.data.reader import SiteReader  # noqa: E402
from rcic_fastai.data.block import screen_dataloaders  # noqa: E402
from rcic_fastai.screen.channels import CHANNELS  # noqa: E402
from rcic_fastai.screen.sites import present_sites, site_files  # noqa: E402
from rcic_fastai.screen.read import read_screen  # noqa: E402
from rcic_fastai.screen.simulate import simulate_screen  # noqa: E402
from rcic_fastai.data.pack import pack_sites  # noqa: E402
from rcic_fastai.data.store import Store  # noqa: E402

REAL = Path(__file__).parents[1].parent / "shared" / "rcic"
SECTIONS = "single", "windows", "loaders"
# name in the tables: what `pack_sites` is told
STORES = {f"store, {preset}": dict(format="blosc2", preset=preset)
          for preset in ("default", "small", "fast", "windows")}
STORES |= {"store, zarr": dict(format="zarr"), "store, raw": dict(format="raw")}
CV2 = "PNG, cv2"
PEERS = ("opencv-python-headless", "pillow", "scikit-image", "torchvision", "imagecodecs", "blosc2", "zarr", "h5py",
         "hdf5plugin", "tifffile")


def library(name):
    "A module, or None where it is not installed"
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


# The sites


def real_sites(folder, n):
    "`n` complete sites spread over the screen"
    sites, left_out = present_sites(read_screen(folder).sites())
    if not len(sites):
        raise SystemExit(f"{folder}: no site has all its {len(CHANNELS)} files")
    return sites.iloc[np.unique(np.linspace(0, len(sites) - 1, min(n, len(sites))).astype(int))].reset_index(drop=True)


def simulated_sites(folder, n, image_size):
    "Sites of a small simulated screen"
    settings = dict(n_sirnas=4, n_train=1, n_test=0, cell_types=("HUVEC", "RPE"), n_positive=1, n_sites=1, missing=0,
                    image_size=image_size)
    simulate_screen(folder, **settings, progress=False)
    return real_sites(folder, n)


def read_reference(sites):
    "Pixels of all sites, uint8 (N, C, H, W), and the bytes of their PNGs"
    files = [site_files(f) for f in sites.files]
    return np.stack([np.stack([np.asarray(Image.open(f)) for f in fs]) for fs in files]), sum(
        f.stat().st_size for fs in files for f in fs)


def require_same(name, got, want, sites):
    "Every pixel of every site, or an error that names both"
    for x, y, site in zip(got, want, sites):
        if x.shape != y.shape or not np.array_equal(x, y):
            raise ValueError(f"{name}: the pixels of site {site} are not those of its PNGs")


def disk_bytes(path):
    path = Path(path)
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


# PNG, one file per channel


def png_readers():
    "Name -> function from a path to pixels (H, W), and the names of what is not installed"
    found, missing = {}, []
    cv2, imagecodecs, skimage, torchvision, torchcodec = map(library,
                                                             ("cv2", "imagecodecs", "skimage.io", "torchvision.io",
                                                              "torchcodec.decoders"))
    if cv2:
        cv2.setNumThreads(1)
        found[CV2] = lambda f: cv2.imread(str(f), cv2.IMREAD_UNCHANGED)
    found["PNG, PIL"] = read_pil
    if skimage:
        found["PNG, scikit-image"] = lambda f: skimage.imread(f)
    if torchvision:
        found["PNG, torchvision"] = lambda f: torchvision.decode_png(torchvision.read_file(str(f)))[0].numpy()
    if imagecodecs:
        found["PNG, imagecodecs"] = lambda f: imagecodecs.png_decode(Path(f).read_bytes())
    if hasattr(torchcodec, "decode_png"):
        found["PNG, torchcodec"] = lambda f: torchcodec.decode_png(str(f), mode="UNCHANGED")[0].numpy()
    packages = {CV2: "opencv-python-headless", "PNG, scikit-image": "scikit-image",
                "PNG, torchcodec": "torchcodec>=0.16"}
    for name in (CV2, "PNG, scikit-image", "PNG, torchvision", "PNG, imagecodecs", "PNG, torchcodec"):
        if name not in found:
            missing.append((name, packages.get(name, name.removeprefix("PNG, "))))
    return found, missing


def read_pil(path):
    with Image.open(path) as im:
        return np.asarray(im)


def each_channel(read, files):
    "Reader of one site from six files into an array (C, H, W)"

    def into(i, x):
        for plane, path in zip(x, files[i]):
            plane[...] = read(path)

    return into


# The store


def packed_stores(sites, folder, names=tuple(STORES)):
    "Name -> store, packed for the first section that asks; names of what is not installed"
    stores, missing = {}, []
    for name in names:
        settings, path = STORES[name], folder.parent / name.replace(", ", "_")
        if settings["format"] != "raw" and library(settings["format"]) is None:
            missing.append((name, settings["format"]))
        else:
            stores[name] = Store(path) if path.exists() else pack_sites(sites, path, progress=False, **settings)
    return stores, missing


def pixel_bytes(store):
    "Bytes of the pixels, without tables and index"
    return sum(disk_bytes(Path(store.path) / d) for d in ("shards", "plates") if (Path(store.path) / d).exists())


def measure_packing(sites, names, folder, repeats):
    "Milliseconds per site to read the PNGs, and to pack them with one thread"
    from rcic_fastai.data.store import read_site

    def pack(name):
        shutil.rmtree(folder / "again", ignore_errors=True)
        pack_sites(sites, folder / "again", workers=1, progress=False, **STORES[name])

    contestants = {name: lambda name=name: pack(name) for name in names}
    contestants["reading the PNGs alone"] = lambda: [read_site(f) for f in sites.files]
    seconds = interleave(contestants, repeats, warmup=0)
    shutil.rmtree(folder / "again", ignore_errors=True)
    return seconds * 1e3 / len(sites)


# What others pack images into


def zarr_peer(zarr, codec):
    "zarr-python, a chunk per site"

    def write(x, path):
        zarr.config.set({"async.concurrency": 1, "threading.max_workers": 1})
        a = zarr.create_array(path, shape=x.shape, chunks=(1, *x.shape[1:]), dtype="uint8", compressors=[codec])
        a[...] = x
        return zarr.open_array(path, mode="r")

    def read(a, i, out):
        out[...] = a[i]

    return write, read, lambda a, i, y, x, h, w: a[i, :, y : y + h, x : x + w]


def hdf5_peer(h5py, hdf5plugin):
    "h5py, a chunk per site"

    def write(x, path):
        with h5py.File(path, "w") as f:
            f.create_dataset("x", data=x, chunks=(1, *x.shape[1:]), **hdf5plugin.Bitshuffle(cname="lz4"))
        return h5py.File(path, "r", rdcc_nbytes=0)["x"]  # no cache of chunks: every site is read once per epoch

    def read(d, i, out):
        d.read_direct(out, np.s_[i])

    return write, read, lambda d, i, y, x, h, w: d[i, :, y : y + h, x : x + w]


def tiff_peer(tifffile):
    "tifffile, a file per site"

    def write(x, path):
        path.mkdir()
        for i, site in enumerate(x):
            tifffile.imwrite(path / f"{i}.tif", site, compression="zstd", predictor=True, photometric="minisblack")
        return path

    def read(path, i, out):
        tifffile.imread(path / f"{i}.tif", out=out, maxworkers=1)

    return write, read, None


def npy_peer():
    "NumPy's own file, mapped into memory"

    def write(x, path):
        np.save(path.with_suffix(".npy"), x)
        return np.load(path.with_suffix(".npy"), mmap_mode="r")

    def read(a, i, out):
        out[...] = a[i]

    return write, read, lambda a, i, y, x, h, w: np.array(a[i, :, y : y + h, x : x + w])


def open_peers(pixels, folder):
    "Name -> (read into, read a window, bytes) of each peer, and the names of what is not installed"
    zarr, h5py, hdf5plugin, tifffile, imagecodecs = map(library,
                                                        ("zarr", "h5py", "hdf5plugin", "tifffile", "imagecodecs"))
    peers, missing = {}, []
    if zarr:
        from zarr.codecs import BloscCodec, ZstdCodec

        peers["zarr, zstd"] = zarr_peer(zarr, ZstdCodec())
        peers["zarr, blosc bitshuffle"] = zarr_peer(zarr, BloscCodec(cname="zstd", shuffle="bitshuffle", typesize=1))
    else:
        missing += [("zarr, zstd", "zarr"), ("zarr, blosc bitshuffle", "zarr")]
    if h5py and hdf5plugin:
        peers["HDF5, bitshuffle lz4"] = hdf5_peer(h5py, hdf5plugin)
    else:
        missing.append(("HDF5, bitshuffle lz4", "h5py hdf5plugin"))
    if tifffile and imagecodecs:
        peers["TIFF, zstd"] = tiff_peer(tifffile)
    else:
        missing.append(("TIFF, zstd", "tifffile imagecodecs"))
    peers["npy, memory map"] = npy_peer()
    opened = {}
    for name, (write, read, window) in peers.items():
        path = folder / name.replace(", ", "_").replace(" ", "_")
        source = write(pixels, path)
        opened[name] = (
            lambda i, out, source=source, read=read: read(source, i, out),
            window and (lambda *where, source=source, window=window: window(source, *where)),
            disk_bytes(path if path.exists() else path.with_suffix(".npy")),
        )
    return opened, missing


# One thread


def single(sites, pixels, png_bytes, folder, args):
    "Whole sites by one thread"
    readers, missing = png_readers()
    stores, without = packed_stores(sites, folder)
    peers, others = open_peers(pixels, folder)
    files, one = [site_files(f) for f in sites.files], np.empty_like(pixels[0])
    reads = {name: each_channel(read, files) for name, read in readers.items()}
    place = {name: s.rows(sites.site_id) for name, s in stores.items()}
    reads |= {name: lambda i, x, s=s, rows=place[name]: s.read_into(rows[i], x) for name, s in stores.items()}
    reads |= {name: read for name, (read, _, _) in peers.items()}
    for name, read in reads.items():
        out = np.zeros_like(pixels)
        for i, x in enumerate(out):
            read(i, x)
        require_same(name, out, pixels, sites.site_id)

    # into memory that is used again, as a loader does it: what is compared is decoding, not getting memory from the
    # system
    contestants = {name: lambda read=read: [read(i, one) for i in range(len(sites))] for name, read in reads.items()}
    seconds = interleave(contestants, 3 * args.repeats)
    baseline = CV2 if CV2 in readers else "PNG, PIL"
    table = summary(seconds, baseline, len(sites), "site")
    table.insert(2, "MB/s", pixels[0].nbytes / 1e3 / table["ms per site"])
    sizes = {name: pixel_bytes(s) for name, s in stores.items()} | {name: n for name, (_, _, n) in peers.items()}
    table["size / PNGs"] = [sizes.get(name, png_bytes) / png_bytes for name in table.index]
    packing = measure_packing(sites, list(stores), folder, min(3, args.repeats))
    table["packing, ms per site"] = [f"{packing[name].median():.3g}" if name in packing else "" for name in table.index]
    alone = packing["reading the PNGs alone"].median()
    note = (
        f"`x` is the median over the repeats of the ratio to `{baseline}` within one repeat. MB/s counts pixels. `size "
        "/ PNGs` is of the pixels' files, the index "
        "of the sites not counted. Every site is read into the same memory, as a loader does it. Packing is that of "
        f"the store by one thread, from PNG to disk; reading the PNGs is {alone:.3g} ms of it."
    )
    return table.rename_axis("contestant"), [note], missing + without + others


# Windows


def windows(sites, pixels, png_bytes, folder, args):
    "A window at a random place, as a share of the whole site"
    side = min(256, pixels.shape[-1] // 2)
    rng = np.random.default_rng(0)
    h, w = pixels.shape[2:]
    where = [(int(i), int(rng.integers(h - side + 1)), int(rng.integers(w - side + 1)), side, side)
             for i in np.tile(np.arange(len(sites)), 2)]
    stores, missing = packed_stores(sites, folder)
    peers, others = open_peers(pixels, folder)
    read = {}
    for name, s in stores.items():
        rows = s.rows(sites.site_id)
        read[name] = lambda i, *window, s=s, rows=rows: s.read(rows[i], *window)
    for name, (read_into, window, _) in peers.items():
        if window:
            read[name] = lambda i, *place, r=read_into, w=window: w(i,
                                                                    *place) if place else whole(r, i, pixels.shape[1:])
    contestants = {}
    for name, f in read.items():
        require_same(name, [f(*p) for p in where],
                     [pixels[i, :, y : y + side, x : x + side] for i, y, x, _, _ in where],
                     sites.site_id.iloc[[p[0] for p in where]])
        contestants[name, "whole"] = lambda f=f: [f(i) for i, *_ in where]
        contestants[name, "window"] = lambda f=f: [f(*p) for p in where]
    seconds = interleave(contestants, 2 * args.repeats)
    rows = {}
    for name in read:
        share = seconds[name, "window"] / seconds[name, "whole"]
        ms = {kind: seconds[name, kind].median() * 1e3 / len(where) for kind in ("whole", "window")}
        quartiles = spread(share.to_frame("x")).iloc[0]
        rows[name] = {"ms per site": ms["whole"], "ms per window": ms["window"], "window / site": share.median(),
                      "quartiles": quartiles}
    note = (f"Windows of {side}x{side} pixels, all channels, at random offsets, one thread, against the whole site by "
            "the same call; new memory for each.")
    return pd.DataFrame(rows).T.infer_objects().rename_axis("contestant"), [note], missing + others


def whole(read, i, shape):
    out = np.empty(shape, np.uint8)
    read(i, out)
    return out


# Loaders


class Cv2Reader(SiteReader):
    "The library's reader with OpenCV in it; not being the library's own, fastai reads item by item in worker processes"

    def pixels(self, files):
        return cv2_site(files)


def cv2_site(files):
    import cv2

    cv2.setNumThreads(1)
    planes = [cv2.imread(str(f), cv2.IMREAD_UNCHANGED) for f in site_files(files)]
    return np.stack(planes)


def loader(sites, bs, repeats, num_workers, source=None, cv2=None):
    """Training loader of the library: batches of one experiment with context and target, no batch transforms; the
    target numbers the sites"""
    dls = screen_dataloaders(sites, target="number", domain="experiment", bs=bs, transforms=[], repeats=repeats,
                             num_workers=num_workers, source=source, device="cpu")
    pipe = dls.train.dataset.tls[0].tfms
    if cv2 == "processes":
        pipe.fs[-1] = Cv2Reader()
    elif cv2 == "threads":
        pipe.fs[-1].pixels = cv2_site
    return dls.train


def require_same_batches(name, dl, pixels, sites, bs):
    "All batches of an epoch: pixels, one experiment each, context and target"
    numbers = []
    for x, context, y in dl:
        require_same(name, x.numpy(), pixels[y.numpy()], sites.site_id.iloc[y.numpy()])
        if len(context) != len(y) or len(context[:, 1].unique()) != 1:
            raise ValueError(f"{name}: a batch is not of one experiment")
        numbers += y.tolist()
    if set(numbers) != set(range(len(sites))):
        raise ValueError(f"{name}: not every site was in the epoch")
    return len(numbers)


class Ring:
    """The limit: processes that fill a ring of shared batches from the store, without fastai, contexts and targets.

    Each takes every n-th batch, waits for a free slot and reads straight into it. They are running and wait when the
    clock starts."""

    SLOTS = 4

    def __init__(self, store, batches, workers=2):
        import torch.multiprocessing as mp

        self.store, self.batches, self.workers, self.ctx = store, batches, workers, mp.get_context()
        self.bs = max(map(len, batches))
        self.memory = self.ctx.RawArray("B", self.SLOTS * self.bs * int(np.prod(store.shape)))
        self.slots = np.frombuffer(self.memory, np.uint8).reshape(self.SLOTS, self.bs, *store.shape)
        self.slots[...] = 0  # all of its memory is there before anything is measured

    def start(self):
        self.free, self.done, self.go, self.ready = (self.ctx.SimpleQueue() for _ in range(4))
        for slot in range(self.SLOTS):
            self.free.put(slot)
        queues = self.free, self.done, self.go, self.ready
        work = [(self.store, self.batches, k, self.workers, self.memory, self.bs, queues) for k in range(self.workers)]
        self.processes = [self.ctx.Process(target=fill_ring, args=w, daemon=True) for w in work]
        for p in self.processes:
            p.start()
        for _ in self.processes:
            self.ready.get()

    def run(self, see=None):
        "Hand all batches over, in the order in which they are done"
        for _ in self.processes:
            self.go.put(True)
        for _ in self.batches:
            k, slot = self.done.get()
            if k < 0:
                raise ValueError(f"ring: a process ended with {slot}")
            if see:
                see(self.batches[k], self.slots[slot])
            self.free.put(slot)

    def stop(self):
        for p in self.processes:
            p.join()


def fill_ring(store, batches, first, step, memory, bs, queues):
    "One process of the ring"
    free, done, go, ready = queues
    try:
        torch.set_num_threads(1)
        slots = torch.frombuffer(memory, dtype=torch.uint8).view(Ring.SLOTS, bs, *store.shape)
        store.read(0)  # the store is open
        ready.put(True)
        go.get()
        for k in range(first, len(batches), step):
            slot = free.get()
            store.read_batch(batches[k], out=slots[slot, : len(batches[k])])
            done.put((k, slot))
    except Exception as e:
        ready.put(False)
        done.put((-1, repr(e)))
        raise


def require_same_ring(name, ring, pixels, sites, rows):
    number = {int(r): i for i, r in enumerate(rows)}
    ids = sites.site_id.to_numpy()
    ring.start()

    def see(batch, slot):
        numbers = [number[int(r)] for r in batch]
        require_same(name, slot, pixels[numbers], ids[numbers])

    ring.run(see)
    ring.stop()


def loaders(sites, pixels, png_bytes, folder, args):
    "Epochs of whole loaders"
    bs, n_batches, epochs = (8, 4, 1) if args.quick else (32, 20, 4)
    sites = sites.assign(number=np.arange(len(sites)))
    stores, missing = packed_stores(sites, folder, ("store, default", "store, fast", "store, raw"))
    repeats = max(1, round(n_batches * bs / len(sites)))
    dls, rings = {}, {}
    if library("cv2"):
        for workers in (2, 1):
            dls[f"PNG, cv2, worker processes: {workers}"] = loader(sites, bs, repeats, workers, cv2="processes")
        dls["PNG, cv2, threads: 2"] = loader(sites, bs, repeats, 2, cv2="threads")
    else:
        missing.append(("PNG, cv2", "opencv-python-headless"))
    for workers in (2, 1):
        dls[f"PNG, rcic_fastai: {workers}"] = loader(sites, bs, repeats, workers)
        dls |= {f"{name}: {workers}": loader(sites, bs, repeats, workers, source=s) for name, s in stores.items()}
    units = {name: require_same_batches(name, dl, pixels, sites, bs) for name, dl in dls.items()}
    many = {name: epochs if name.startswith("store") else 1 for name in dls}
    contestants = {name: lambda dl=dl, n=many[name]: [None for _ in range(n) for _ in dl] for name, dl in dls.items()}
    units = {name: n * many[name] for name, n in units.items()}
    for name, store in stores.items():
        ring, rows = name.replace("store", "ring") + ": 2", store.rows(sites.site_id)
        batches = [rows[b] for _ in range(epochs) for b in dls[f"{name}: 2"].get_idxs().batches]
        rings[ring] = Ring(store, batches)
        require_same_ring(ring, rings[ring], pixels, sites, rows)
        contestants[ring], units[ring] = rings[ring].run, sum(map(len, batches))
    seconds = measure_loaders(contestants, rings, args.repeats)
    baseline = BASELINE if BASELINE in seconds else "PNG, rcic_fastai: 2"
    return (loader_table(seconds, units, baseline),
            [loader_note(bs, len(dls["PNG, rcic_fastai: 2"]), epochs, baseline)], missing)


def measure_loaders(contestants, rings, repeats):
    "The processes of a ring are started before the clock, and waited for after it"
    last = []

    def before(name):
        while last:
            last.pop().stop()
        if name in rings:
            rings[name].start()
            last.append(rings[name])

    # all have been through their epoch when it was checked
    seconds = interleave(contestants, repeats, warmup=0, before=before)
    before(None)
    return seconds


BASELINE = "PNG, cv2, worker processes: 2"


def loader_table(seconds, units, baseline):
    "Sites per second, against OpenCV in worker processes and in threads, and as a share of the ring of the same store"
    units, threads = pd.Series(units), "PNG, cv2, threads: 2"
    table = summary(seconds, baseline, units, "site")[["sites/s", f"x {baseline}", "quartiles of x"]].rename(
        columns={f"x {baseline}": "x"})
    rate = units / seconds
    if threads in seconds:
        table["x cv2 in threads"] = rate.div(rate[threads], axis=0).median()
    ring = {name: name.replace("store", "ring") for name in seconds if name.startswith("store")}
    table["share of the ring"] = [f"{(rate[name] / rate[ring[name]]).median():.2f}" if ring.get(name) in rate else ""
                                  for name in table.index]
    return table.rename_axis("contestant: workers")


def loader_note(bs, n_batches, epochs, baseline):
    return (
        f"An epoch is {n_batches} batches of {bs} sites of one experiment, uint8 with context and target, nothing done "
        "with them; the sites are repeated to fill it. "
        f"Stores and rings are given {epochs} epochs per measurement, PNGs one. `x` is against `{baseline}`. `worker "
        "processes`: fastai's way, one item at a time in "
        "processes that start with every epoch. `threads`: the same decoder in the threads that this library reads "
        "with. The ring is two processes that refill "
        f"{Ring.SLOTS} batches of shared memory from the same store, without fastai, context, target or order, started "
        "before the clock."
    )


# The report


TITLES = {"single": "Whole sites, one thread", "windows": "Windows", "loaders": "Loaders"}


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REAL,
                        help="folder of a screen; default: the real sites in ../shared/rcic, where they are")
    parser.add_argument("--simulated", action="store_true", help="a simulated screen instead")
    parser.add_argument("--image-size", type=int, default=512, help="side of simulated images, in pixels")
    parser.add_argument("--sites", type=int, default=16, help="how many sites")
    parser.add_argument("--repeats", type=int, default=REPEATS,
                        help="of the loaders; windows are measured twice as often, whole sites three times")
    parser.add_argument("--only", choices=SECTIONS,
                        help="one section; the report goes to a temporary file unless --out is given")
    parser.add_argument("--out", type=Path, help="file of the report; default: benchmarks/results/loading.md")
    parser.add_argument("--quick", action="store_true", help="tiny images, two repeats: that it runs, no result")
    args = parser.parse_args(argv)
    if args.quick:
        args.simulated, args.image_size, args.sites, args.repeats = True, 64, 8, 2
    elif not args.simulated and not args.data.is_dir():
        parser.error(f"{args.data} does not exist; give --data or --simulated")
    return args


def main(argv=None):
    "Measure, write the report; returns the tables by section"
    args, start = arguments(argv), time.perf_counter()
    torch.set_num_threads(1)
    tables, parts, missing = {}, [], {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        sites = simulated_sites(folder / "screen", args.sites,
                                args.image_size) if args.simulated else real_sites(args.data, args.sites)
        sites = sites.sort_values(["experiment", "plate", "well", "site"]).reset_index(drop=True)
        pixels, png_bytes = read_reference(sites)
        for section in SECTIONS if args.only is None else [args.only]:
            (folder / section).mkdir()
            tables[section], notes, absent = globals()[section](sites, pixels, png_bytes, folder / section, args)
            parts += [f"## {TITLES[section]}", markdown(tables[section]), *notes]
            missing |= dict(absent)
        out = args.out or (Path(tempfile.mkdtemp()) if args.quick or args.only
                           else Path(__file__).parent / "results") / "loading.md"
    n, c, h, w = pixels.shape
    write_report(
        out,
        "Reading sites",
        f"{n} {'simulated' if args.simulated else 'real'} sites of {c} channels, {h}x{w} pixels, "
        f"{png_bytes / n / 1e6:.3g} MB of PNG and {pixels[0].nbytes / 1e6:.3g} MB "
        "of pixels each. All contestants read the same sites in turns, from files that the system holds in memory, so "
        "it is decoding that is measured and not the "
        f"disk; medians over the repeats ({args.repeats} for loaders, twice as many for windows, three times for whole "
        "sites), lower and upper quartile behind "
        "them. Every site of every contestant was compared with its PNGs, bit by bit. One thread in each worker.",
        *parts,
        *[f"{name}: not installed (pip install {package})." for name, package in missing.items()],
        f"{machine(*PEERS)} It took {(time.perf_counter() - start) / 60:.1f} minutes.",
    )
    return tables


if __name__ == "__main__":
    main()
