"Screens and packed stores in object storage: in memory always, and on an S3 server of this machine where moto is."

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock, Thread
from time import sleep

import fsspec
import nbformat
import numpy as np
import pytest
import requests
from formats_inputs import make, write_csv
from PIL import Image
from test_report import execute_here

from rcic_fastai import locations
from rcic_fastai.data.pack import pack_screen
from rcic_fastai.data.reader import site_size
from rcic_fastai.data.store import read_site, Store, verify_store
from rcic_fastai.report.core import make_report
from rcic_fastai.run.folder import Run, run_data
from rcic_fastai.run.record import noted_path
from rcic_fastai.screen.describe import describe_screen
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.sites import check_files, present_sites

WELLS = [f"{r}{c:02}" for r in "ABCD" for c in range(1, 5)]


def quiet(*args):
    pass


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "Copies go into a folder of the test"
    monkeypatch.setenv("RCIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    for p in fs.ls("/", detail=False): fs.rm(p, recursive=True)


def upload(fs, folder, to):
    for p in Path(folder).rglob("*"):
        if p.is_file():
            fs.pipe(f"{to}/{p.relative_to(folder).as_posix()}", p.read_bytes())


def write_screen(folder, fields=2):
    "Images of 16 bits, and a plate map"
    rng = np.random.default_rng(0)
    folder.mkdir()
    for name in (f"{w}_s{s}_{c}.tif" for w in WELLS for s in range(1, fields + 1) for c in ("DAPI", "ER")):
        Image.fromarray(rng.integers(0, 4000, (24, 24), dtype=np.uint16)).save(folder / name)
    write_csv(folder / "map.csv", dict(well=WELLS, treatment=[f"t{i % 4}" for i in range(len(WELLS))]))
    return folder


def pixels(screen):
    return np.stack([f.read(screen.channels) for f in screen.sites()["files"]])


def test_describing_an_address_finds_what_describing_the_folder_does(tmp_path, memory):
    "Sites, channels, grey limits and pixels; and they are read again without listing the bucket"
    folder = write_screen(tmp_path / "mine")
    upload(memory, folder, "/mine")
    here = describe_screen(folder, out=tmp_path / "here", say=quiet)
    there = describe_screen("memory://mine", out=tmp_path / "there", say=quiet)
    assert there.channels == here.channels and (pixels(there) == pixels(here)).all()
    assert [str(f) for f in there.sites()["files"]][0] == "memory://mine/A01_s1_{channel}.tif"
    memory.rm("/mine", recursive=True)
    again = read_screen(tmp_path / "there")
    assert len(again.sites()) == 32 and (pixels(again) == pixels(here)).all()  # copies


@pytest.mark.parametrize("system", ["harmony", "imagexpress", "ome_tiff", "ome_set", "imagej", "load_data"])
def test_systems_are_read_from_addresses(tmp_path, memory, system):
    "Indexes, headers and stacks too"
    make(system, tmp_path / "mine")
    upload(memory, tmp_path / "mine", "/mine")
    here = describe_screen(tmp_path / "mine", out=tmp_path / "here", say=quiet)
    there = describe_screen("memory://mine", out=tmp_path / "there", say=quiet)
    assert there.channels == here.channels and (pixels(there) == pixels(here)).all()
    assert site_size(there.sites()["files"][0], there.channels) == (8, 8)


def test_a_described_screen_is_read_where_it_lies(tmp_path, memory):
    "screen.json beside the images; the same through `Path`, which loses a slash"
    folder = write_screen(tmp_path / "mine")
    here = describe_screen(folder, say=quiet)
    upload(memory, folder, "/mine")
    for address in ("memory://mine", Path("memory://mine"), "memory://mine/"):
        there = read_screen(address)
        assert "Screen memory://mine (platemap" in repr(there) and (pixels(there) == pixels(here)).all()
    check_files(there.sites(), there.channels)
    memory.rm("/mine/A01_s1_ER.tif")
    with pytest.raises(FileNotFoundError, match="memory://mine/A01_s1_ER.tif does not exist"):
        check_files(there.sites(), there.channels)
    assert present_sites(there.sites(), there.channels)[1] == 1


@pytest.mark.parametrize("format", ["blosc2", "raw", "zarr"])
def test_stores_are_read_from_addresses(tmp_path, memory, format):
    "Packed from an address to a folder, which is uploaded"
    if format == "zarr": pytest.importorskip("zarr")
    folder = write_screen(tmp_path / "mine")
    here = describe_screen(folder, say=quiet)
    upload(memory, folder, "/mine")
    store = pack_screen(read_screen("memory://mine"), tmp_path / "store", format=format, progress=False, say=quiet)
    upload(memory, tmp_path / "store", f"/store-{format}")
    screen = read_screen(f"memory://store-{format}")
    assert "packed" in repr(screen) and (pixels(screen) == pixels(here)).all()
    there = pickle.loads(pickle.dumps(Store(f"memory://store-{format}")))
    assert len(verify_store(there, progress=False)) == 0
    assert (there.read(3, 4, 5, 6, 7) == store.read(3, 4, 5, 6, 7)).all()


def test_a_run_takes_a_screen_at_an_address(small_run, small_screen, memory):
    "Given, or noted: run.json says the address, and not where copies of its tables lie"
    for p in Path(small_screen).glob("*.csv"): memory.pipe(f"/screen/{p.name}", p.read_bytes())
    for address in ("memory://screen", Path("memory://screen")):
        run = Run(small_run, address)
        assert run.screen.wells.equals(read_screen(small_screen).wells) and run.has_own_screen
        assert run_data(small_run, address) == run.data
        assert noted_path(address, small_run) == noted_path(run.data, small_run) == "memory://screen"
    with pytest.raises(FileNotFoundError, match="memory://none holds no screen"):
        run_data(small_run, "memory://none")


def test_a_report_reads_what_another_process_can_read(small_run, small_screen, tmp_path, memory, monkeypatch):
    "An address on this machine, not the memory of this process, which is refused before anything is executed"
    monkeypatch.setattr("rcic_fastai.report.core.execute_notebook", execute_here)  # test_report.py gives cells a kernel
    template = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(
        "from IPython.display import HTML\nfrom rcic_fastai.data.store import read_site\n"
        "from rcic_fastai.screen.read import read_screen\ns = read_screen(data)\n"
        "HTML(f'{s.path.name} {read_site(s.sites().files.iloc[0], s.channels).mean()}')")])
    nbformat.write(template, tmp_path / "template.ipynb")
    page = tmp_path / "page.html"
    upload(memory, small_screen, "/screen")
    with pytest.raises(ValueError, match="^memory://screen is in the memory of this process, and another one makes"):
        make_report(small_run, page, data="memory://screen", template=tmp_path / "template.ipynb", say=quiet)
    assert not page.exists()
    there = f"file://{Path(small_screen).resolve().as_posix()}"
    make_report(small_run, page, data=there, template=tmp_path / "template.ipynb", say=quiet)
    screen = read_screen(there)
    mean = read_site(screen.sites().files.iloc[0], screen.channels).mean()
    assert screen.path != Path(small_screen) and f"{screen.path.name} {mean}" in page.read_text()


def test_damage_in_a_store_elsewhere_is_told(tmp_path, memory):
    folder = write_screen(tmp_path / "mine")
    pack_screen(describe_screen(folder, say=quiet), tmp_path / "store", progress=False, say=quiet)
    upload(memory, tmp_path / "store", "/store")
    data = memory.cat_file("/store/shards/00000.bin")
    memory.pipe("/store/shards/00000.bin", data[:-1] + bytes([data[-1] ^ 1]))
    assert verify_store(Store("memory://store"), progress=False).site_id.tolist() == ["mine_1_D04_2"]
    memory.rm("/store/shards/00000.bin")
    with pytest.raises(FileNotFoundError, match="memory://store/shards/00000.bin does not exist"):
        locations.read_bytes("memory://store/shards/00000.bin", 0, 5)


def test_what_an_address_is_no_place_for(tmp_path, memory, cache):
    "A folder to write to, names that lead elsewhere, an atlas, OME-Zarr plates, passwords"
    folder = write_screen(tmp_path / "mine")
    describe_screen(folder, say=quiet)
    upload(memory, folder, "/mine")
    with pytest.raises(ValueError, match=r"nothing is written to memory://mine: give a folder with out=... \(--out\)"):
        describe_screen("memory://mine", say=quiet)
    with pytest.raises(ValueError, match="is an address, and outputs are files and folders of this machine"):
        pack_screen(read_screen("memory://mine"), "memory://store", progress=False)
    said = memory.cat_file("/mine/screen.json")
    for wrong in (b'"../other.csv"', b'"/etc/passwd"'):
        memory.pipe("/mine/screen.json", said.replace(b'"map.csv"', wrong))
        with pytest.raises(ValueError, match="cannot be the name of a file"): read_screen("memory://mine")
    memory.pipe("/mine/screen.json", said.replace(b'"images": "."', b'"images": "../other"'))
    with pytest.raises(ValueError, match="'../other' leads out of memory://mine"): read_screen("memory://mine")
    memory.pipe("/atlas/train.csv", b"Id,Target\na,0\n")
    with pytest.raises(ValueError, match="memory://atlas is an atlas, which is read from a disk"):
        read_screen("memory://atlas")
    memory.pipe({"/plates/p.zarr/.zgroup": b"{}", "/plates/map.csv": b"well,treatment\nA01,a\n"})
    with pytest.raises(ValueError, match="is of OME-Zarr, whose plates are read from a disk"):
        describe_screen("memory://plates", out=tmp_path / "out", say=quiet)
    with pytest.raises(ValueError, match="holds an address with a password, memory://\\*\\*\\*@host/x"):
        read_screen("memory://me:secret@host/x")
    with pytest.raises(FileNotFoundError, match="memory://none holds no screen; looked for screen.json"):
        read_screen("memory://none")
    assert not [p for p in cache.rglob("passwd")]


def test_folders_of_this_machine_as_addresses(tmp_path):
    "file:// by `describe_screen`, then by what it wrote; and a store"
    here = describe_screen(write_screen(tmp_path / "mine"), out=tmp_path / "here", say=quiet)
    there = describe_screen(Path(f"file://{tmp_path}/mine"), out=tmp_path / "there", say=quiet)
    assert (pixels(there) == pixels(here)).all()
    pack_screen(read_screen(tmp_path / "there"), tmp_path / "packed", progress=False, say=quiet)
    assert (pixels(read_screen((tmp_path / "packed").as_uri())) == pixels(here)).all()


def test_missing_credentials_are_told_as_that(monkeypatch):
    class NoCredentialsError(Exception): pass

    def read(): raise NoCredentialsError("Unable to locate credentials")

    with pytest.raises(PermissionError, match="s3://bucket/a cannot be read: there are no credentials"):
        locations.with_retries(read, "s3://bucket/a")


def test_copies_are_bounded(tmp_path, memory, monkeypatch, cache):
    "What was not used for longest goes; threads that fetch the same file do not disturb each other"
    monkeypatch.setenv("RCIC_CACHE_GB", "1e-4")  # 100 kB
    for i in range(40): memory.pipe(f"/many/{i}.bin", bytes(10_000))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: len(locations.read_part(f"memory://many/{i % 40}.bin", 0, 10_000)), range(80)))
    assert found == [10_000] * 80
    assert sum(p.stat().st_size for p in cache.rglob("part")) <= 110_000
    monkeypatch.setenv("RCIC_CACHE_GB", "much")
    with pytest.raises(ValueError, match="RCIC_CACHE_GB is 'much', expected a number of gigabytes"):
        locations.local_copy("memory://many/39.bin")


def test_paths_of_this_machine_stay_as_they_are(tmp_path, monkeypatch):
    "A folder whose name looks like an address is a folder"
    assert locations.local_copy("a/b.tif") == Path("a/b.tif") and locations.as_address(tmp_path) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)
    assert locations.as_address(Path("s3://bucket")) is None and locations.as_address("s3://bucket2") == "s3://bucket2"


# A server of S3 on this machine


class Bucket:
    "What is asked of it, how slow it is, and which request fails"
    def __init__(self):
        self.wait, self.every, self.asked, self.failed, self.lock = 0, 0, [], 0, Lock()

    def wrap(self, app):
        def answer(environ, start_response):
            with self.lock:
                self.asked.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE")))
                fails = self.every and len(self.asked) % self.every == 0
                self.failed += bool(fails)
            sleep(self.wait)
            if not fails: return app(environ, start_response)
            start_response("503 Slow Down", [("Content-Type", "text/plain"), ("Content-Length", "0")])
            return [b""]
        return answer


@pytest.fixture
def s3(monkeypatch):
    "A bucket on the loopback interface, and the file system of it"
    pytest.importorskip("moto.server", reason="moto, which serves S3 on this machine, is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install rcic_fastai[s3]")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    bucket = Bucket()
    server = make_server("127.0.0.1", 0, bucket.wrap(DomainDispatcherApplication(create_backend_app)), threaded=True)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in dict(AWS_ACCESS_KEY_ID="testing", AWS_SECRET_ACCESS_KEY="testing-key", AWS_REGION="us-east-1",
                            AWS_DEFAULT_REGION="us-east-1", AWS_ENDPOINT_URL=f"http://127.0.0.1:{server.port}",
                            NO_PROXY="127.0.0.1", AWS_EC2_METADATA_DISABLED="true").items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    locations._file_system.cache_clear()
    requests.post(f"http://127.0.0.1:{server.port}/moto-api/reset", timeout=30)
    bucket.fs = fsspec.filesystem("s3")
    bucket.fs.mkdir("screens")
    yield bucket
    locations._file_system.cache_clear()
    fsspec.filesystem("s3").clear_instance_cache()
    server.shutdown()
    thread.join()


def test_a_screen_on_s3_takes_one_request_per_image(tmp_path, s3):
    "One list, one request for each file, none the second time"
    folder = write_screen(tmp_path / "mine")
    here = describe_screen(folder, out=tmp_path / "here", say=quiet)
    upload(s3.fs, folder, "screens/mine")
    s3.asked.clear()
    there = describe_screen("s3://screens/mine", out=tmp_path / "there", say=quiet)
    lists = [a for a in s3.asked if a[0] == "GET" and a[1].rstrip("/").endswith("screens")]
    assert len(lists) == 1
    assert (pixels(there) == pixels(here)).all()
    files = [a[1] for a in s3.asked if a[1].endswith(".tif")]
    assert len(files) == len(set(files)) == 64 and {a[0] for a in s3.asked} == {"GET"}
    s3.asked.clear()
    assert (pixels(there) == pixels(here)).all() and not s3.asked


def test_a_packed_site_on_s3_is_one_range(tmp_path, s3):
    "Not the whole shard"
    folder = write_screen(tmp_path / "mine")
    here = pack_screen(describe_screen(folder, say=quiet), tmp_path / "store", progress=False, say=quiet)
    upload(s3.fs, tmp_path / "store", "screens/store")
    store = Store("s3://screens/store")
    assert len(store.sites) == 32
    store.check()
    s3.asked.clear()
    for i in (5, 6, 7): assert (store.read(i) == here.read(i)).all()
    assert len(s3.asked) == 3
    ranges = [tuple(map(int, r.removeprefix("bytes=").split("-"))) for _, _, r in s3.asked]
    assert [b - a + 1 for a, b in ranges] == store.sites.length[5:8].tolist()


@pytest.mark.slow
def test_nothing_is_lost_on_a_slow_s3_that_fails_now_and_then(tmp_path, s3):
    "Every answer takes 200 ms, and one request in a hundred fails"
    folder = write_screen(tmp_path / "mine", fields=8)
    screen = describe_screen(folder, say=quiet)
    here = pack_screen(screen, tmp_path / "store", progress=False, say=quiet)
    upload(s3.fs, tmp_path / "store", "screens/store")
    s3.wait, s3.every = .2, 100
    s3.asked.clear()
    store = Store("s3://screens/store")
    x = store.read_batch(np.arange(len(store)), threads=8)
    assert (x.numpy() == here.read_batch(np.arange(len(here))).numpy()).all()
    assert s3.failed >= 1 and len(s3.asked) <= len(store) + 2 + s3.failed
