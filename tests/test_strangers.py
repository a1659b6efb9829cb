"""A stranger's run, store, screen or kernel folder gives data and nothing else: no program, no way out of its
folder, no memory without end; and no password is shown."""

import ast
import base64
import hashlib
import json
import logging
import os
import shutil
import sys
import types
import warnings
import zipfile
import zlib
from pathlib import Path
from urllib.parse import quote

import nbformat
import numpy as np
import pandas as pd
import pytest
from cases import each
import xxhash
from zarr_0_1_0 import pack_0_1_0

from rcic_fastai.cli.core import _say, one_line_errors, rcic_show
from rcic_fastai.credentials import refuse_password, scrub
from rcic_fastai.screen.atlas import read_hpa
from rcic_fastai.kaggle.core import build_kernel, copy_run, read_kernel
from rcic_fastai.kaggle.client import run_client, scrub_kaggle
from rcic_fastai.report.html import notebook_page, table, tiles
from rcic_fastai.screen.describe import describe_screen
from rcic_fastai.report.core import folder_sizes, make_report
from rcic_fastai.run.train import train_run
from rcic_fastai.recipe.published import get_recipe
from rcic_fastai.cli.script import CliError
from rcic_fastai.screen.read import read_screen
from rcic_fastai.cli.script import option_parser
from rcic_fastai.data.codec import _Blosc2
from rcic_fastai.data.pack import pack_screen, pack_sites
from rcic_fastai.data.store import DamagedSite, Store, _digest, _zstd_size
from rcic_fastai.run.folder import load_run, read_run
from rcic_fastai.kaggle.packages import install_wheels, pack_wheels

ROOT = Path(__file__).resolve().parents[1]


def quiet(*args): pass


# Programs


def calls(tree):
    "Dotted name and node of every call"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call): yield ast.unparse(node.func), node


def keyword(node, name):
    return next((ast.unparse(k.value) for k in node.keywords if k.arg == name), None)


@pytest.mark.slow
@each("path", sorted((ROOT / "rcic_fastai").rglob("*.py")), ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_nothing_that_is_read_can_be_a_program(path):
    """Every reader that could unpickle or execute is told not to; every Python that is started finds no module in
    the current folder"""
    for name, node in calls(ast.parse(path.read_text(encoding="utf-8"))):
        where = f"{path.name}: {ast.unparse(node)[:120]}"
        last = name.rpartition(".")[2]
        assert name not in ("eval", "exec", "compile", "__import__", "os.system"), where
        assert last not in ("load_learner", "read_pickle", "unsafe_load",
                            "extractall") or path.stem == "packages", where
        assert not name.startswith(("pickle.load", "joblib.", "dill.", "cloudpickle.", "yaml.load", "runpy.",
                                    "importlib.import_module")), where
        if name == "np.load": assert keyword(node, "allow_pickle") == "False", where
        if name in ("torch.load", "load_state_dict_from_url"): assert keyword(node, "weights_only") == "True", where
        if name.startswith("zarr.open"):
            # of images of others, the codecs are looked at first
            kinds = ("3", "kind") if path.stem == "pages" else ("3",)
            assert "r+" in where or keyword(node, "zarr_format") in kinds and keyword(node, "mode") == "'r'", where
        assert keyword(node, "shell") in (None, "False"), where


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    "The current folder, full of modules that would leave a mark"
    mark = tmp_path / "mark"
    program = f"open({str(mark)!r}, 'a').write(__file__)\n"
    folder = tmp_path / "stranger"
    for name in ("torch.py", "numpy.py", "json.py", "sitecustomize.py", "usercustomize.py", "conftest.py",
                 "ipykernel_launcher.py", "ipython_config.py", "jupyter_config.py",
                 "kaggle/__init__.py", "fastai/__init__.py", "rcic_fastai/__init__.py", "blosc2_openhtj2k/__init__.py",
                 ".ipython/profile_default/startup/00-mark.py",
                 "profile_default/startup/00-mark.py", "profile_default/ipython_kernel_config.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(program)
    for name in ("base", "lab", "python"):  # templates of nbconvert are programs too
        (folder / name).mkdir()
        (folder / name / "conf.json").write_text("{}")
        for file in ("index.html.j2", "base.html.j2", "celltags.j2", "display_priority.j2", "null.j2"):
            (folder / name / file).write_text("{{ cycler.__init__.__globals__.os.mkdir('" + str(mark) + "') }}")
    monkeypatch.chdir(folder)
    yield folder
    assert not mark.exists(), mark.read_text() if mark.is_file() else "a template"


@pytest.mark.slow
def test_a_report_executes_nothing_of_the_run_folder(small_run, small_screen, stranger, tmp_path):
    "The page of a run whose folder is full of modules, asked for from within it"
    shutil.copytree(small_run, stranger, dirs_exist_ok=True)
    cells = [nbformat.v4.new_code_cell("run = data = truth = max_wells = None", metadata=dict(tags=["parameters"])),
             nbformat.v4.new_code_cell("import json, numpy, os, sys\nsorted(os.listdir()), run, [p for p in ('', '.', "
                                       "os.getcwd(), run) if p in sys.path]")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "mine.ipynb")
    page = make_report(".", tmp_path / "page.html", small_screen, template=tmp_path / "mine.ipynb", say=quiet)
    done = nbformat.read(page.with_suffix(".ipynb"), 4).cells[-1].outputs[0].data["text/plain"]
    assert ast.literal_eval(done) == ([], str(stranger), [])


def test_the_client_of_kaggle_is_the_installed_one(stranger):
    pytest.importorskip("kagglesdk", reason="Kaggle's client is not installed: pip install kaggle")
    assert "usage" in run_client("kernels", "--help")


def test_children_of_a_command_do_not_look_here(monkeypatch):
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with one_line_errors(False): assert os.environ["PYTHONSAFEPATH"] == "1"
    assert "PYTHONSAFEPATH" not in os.environ


def test_a_copied_run_is_data_alone(small_run, tmp_path):
    theirs = shutil.copytree(small_run, tmp_path / "theirs")
    for name in ("torch.py", "x.so", ".hidden", "predictions/y.pth.py", "z.ipynb"):
        (theirs / name).write_text("raise SystemExit")
    (theirs / "elsewhere").symlink_to("/usr")
    for name in ("recipe.json", "model.safetensors"):  # as caches of downloads have it
        (theirs / name).unlink()
        (theirs / name).symlink_to(small_run / name)
    assert read_run(theirs)[1] == read_run(small_run)[1]
    assert folder_sizes(theirs).files["elsewhere/"] == 0
    copied = copy_run(theirs, tmp_path / "ours")
    names = {p.relative_to(copied).as_posix() for p in copied.rglob("*")}
    assert names == {p.relative_to(small_run).as_posix() for p in small_run.rglob("*")
                     if p.suffix in (".json", ".csv", ".npz", ".safetensors") or p.is_dir()}
    assert not (copied / "recipe.json").is_symlink() and read_run(copied)[1] == read_run(small_run)[1]


@pytest.mark.slow
def test_a_kernel_installs_only_the_wheels_that_were_named(tmp_path, monkeypatch):
    "Others may lie beside the weights of an attached dataset, also under the same name"
    def wheel(path, text):
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as z: z.writestr("x.py", text)
        return path
    mine = wheel(tmp_path / "mine" / "mine-1.0-py3-none-any.whl", "mine")
    wheel(tmp_path / "input" / "a" / mine.name, "theirs")
    wheel(tmp_path / "input" / "a" / "torch-99.0-py3-none-any.whl", "theirs")
    installed = []
    monkeypatch.setattr("subprocess.run",
                        lambda args, **kwargs: installed.append((args[-1], kwargs["env"]["PYTHONSAFEPATH"]))
                        or types.SimpleNamespace(returncode=0))
    named = dict.fromkeys([mine.name], hashlib.sha256(mine.read_bytes()).hexdigest())
    assert install_wheels(pack_wheels([]), tmp_path / "input") == [] == installed
    with pytest.raises(FileNotFoundError, match="mine-1.0.*as it was when the notebook was built"):
        install_wheels(pack_wheels([]), tmp_path / "input", named)
    (tmp_path / "input" / "b").mkdir()
    shutil.copy(mine, tmp_path / "input" / "b")
    assert install_wheels(pack_wheels([]), tmp_path / "input", named) == [mine.name]
    assert installed == [(str(tmp_path / "input" / "b" / mine.name), "1")]
    meta = build_kernel(tmp_path / "kernel", user="ada", title="With a wheel", datasets=["ada/wheels"], lacking=(),
                        attached=[mine])
    source, = [c.source for c in nbformat.read(tmp_path / "kernel" / meta["code_file"], 4).cells
               if "PACKED = " in c.source]
    assert f"ATTACHED = {named}" in source
    with pytest.raises(ValueError, match="--attached-wheel .*: this is no wheel"):
        build_kernel(tmp_path / "kernel", user="ada", title="With a wheel", attached=[tmp_path / "x.whl"])


# Names


@each("change", [dict(parts=["../other"]), dict(parts=["/other"]), dict(parts=[r"..\other"]),
                 dict(channels=["../../x", 2, 3, 4, 5, 6])], ids=str)
def test_names_in_a_run_lead_nowhere(small_run, small_screen, tmp_path, change):
    theirs = shutil.copytree(small_run, tmp_path / "theirs")
    shutil.copytree(small_run, tmp_path / "other")
    info = json.loads((theirs / "run.json").read_text())
    (theirs / "run.json").write_text(json.dumps({**info, **change}))
    with pytest.raises(ValueError, match="leads|expected different names of folders within the run"):
        load_run(theirs, read_screen(small_screen).sites()[:4])


@pytest.fixture(scope="module")
def own(small_screen, tmp_path_factory):
    "A screen of six wells that was described"
    from PIL import Image

    folder = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for well in ("B02", "B03", "B04"):
        for stain in ("DAPI", "ER"):
            Image.fromarray(rng.integers(0, 255, (32, 32)).astype(np.uint8)).save(folder / f"{well}_{stain}.png")
    (folder / "wells.csv").write_text("well,treatment,experiment\nB02,a,x\nB03,b,x\nB04,DMSO,x\n")
    describe_screen(folder, negative=["DMSO"], say=quiet)
    return folder


def described(own, to, **change):
    theirs = shutil.copytree(own, to)
    (theirs / "screen.json").write_text(json.dumps({**json.loads((theirs / "screen.json").read_text()), **change}))
    return theirs


@each("name", ["../secret.csv", "/etc/passwd", r"..\secret.csv", "a/../../secret.csv"])
def test_a_table_lies_in_its_folder(own, tmp_path, name):
    (tmp_path / "secret.csv").write_text("well,password\nB02,hunter2\n")
    theirs = described(own, tmp_path / "theirs", table=name)
    with pytest.raises(ValueError, match="screen.json: table .* leads out of") as e: read_screen(theirs)
    assert "hunter2" not in str(e.value) and "root:" not in str(e.value)
    screen = read_screen(own)
    screen.path = theirs
    with pytest.raises(ValueError, match="leads out of"):
        pack_screen(screen, tmp_path / "out" / "store", progress=False, say=quiet)
    assert not (tmp_path / "out").exists()


def test_a_table_is_no_link_to_elsewhere(own, small_screen, tmp_path):
    "Messages quote a table: one that is a link out of its folder is refused, whatever the layout"
    secret = tmp_path / "secret.csv"
    secret.write_text("well,password\nB99,hunter2\n")
    theirs = described(own, tmp_path / "theirs")
    (theirs / "wells.csv").unlink()
    (theirs / "wells.csv").symlink_to(secret)
    (theirs / "inside.csv").write_text((own / "wells.csv").read_text())
    for read in (read_screen, lambda folder: describe_screen(folder, table=None, out=tmp_path / "out", say=quiet)):
        with pytest.raises(ValueError, match="leads out of|holds 2 CSV files") as e: read(theirs)
        assert "hunter2" not in str(e.value) and "B99" not in str(e.value)
    (theirs / "inside.csv").rename(tmp_path / "moved.csv")
    with pytest.raises(ValueError, match="leads out of") as e: describe_screen(theirs, out=tmp_path / "out", say=quiet)
    assert "hunter2" not in str(e.value) and "B99" not in str(e.value)
    (theirs / "wells.csv").unlink()
    (tmp_path / "moved.csv").rename(theirs / "inside.csv")
    (theirs / "wells.csv").symlink_to("inside.csv")  # within the folder
    assert len(read_screen(theirs).wells) == 3
    for name in ("train.csv", "train_controls.csv", "metadata.csv"):
        folder = tmp_path / name
        folder.mkdir()
        for p in small_screen.glob("*.csv"): shutil.copy(p, folder)
        if name == "metadata.csv": (folder / "train.csv").unlink()
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(secret)
        with pytest.raises(ValueError, match="leads out of .* copy the table into the folder") as e: read_screen(folder)
        assert "hunter2" not in str(e.value) and "password" not in str(e.value)


def test_names_of_a_screen_lead_nowhere(own, tmp_path):
    with pytest.raises(ValueError, match="screen.json: channel '../DAPI' leads to another folder"):
        read_screen(described(own, tmp_path / "a", channels=["../DAPI", "ER"]))
    for name in ("../x", r"..\x", "/x"):
        theirs = described(own, tmp_path / f"b{name!r}".replace("/", "-"))
        (theirs / "wells.csv").write_text(f"well,treatment,experiment\nB02,a,{name}\n")
        with pytest.raises(ValueError, match="has a slash in its name"): read_screen(theirs)
    away = described(own, tmp_path / "away", images="../away-images")  # as --out of rcic-describe writes it
    shutil.copytree(own, tmp_path / "away-images")
    assert read_screen(away).sites().files.astype(str).str.contains("away-images/").all()


def test_ids_and_cell_types_lead_nowhere(small_screen, tmp_path):
    for table_, text in {"train.csv": "Id,Target\n../a,16 0\n",
                         "sample_submission.csv": "Id,Predicted\n../../a,0\n"}.items():
        folder = tmp_path / table_
        folder.mkdir()
        (folder / "train.csv").write_text("Id,Target\na,16 0\n")
        (folder / table_).write_text(text)
        with pytest.raises(ValueError, match=f"{table_}: row 2: Id .* leads to another folder"): read_hpa(folder)
    from rcic_fastai.recipe.published import change_recipe, get_recipe

    screen, recipe = read_screen(small_screen), change_recipe(get_recipe("laptop"), "per_cell_type=true")
    for name in ("../x", "a/b", "..", "predictions", "all"):
        screen.wells = screen.wells.assign(cell_type=np.where(np.arange(len(screen.wells)) % 2, name, "HUVEC"))
        with pytest.raises(ValueError, match="cell type"):
            train_run(screen, recipe, tmp_path / "runs" / "run", say=quiet)
    assert {p.relative_to(tmp_path / "runs").as_posix() for p in (tmp_path / "runs").rglob("*")} <= {"run"}
    assert not (tmp_path / "x").exists()


def test_a_kernel_uploads_its_own_notebook(tmp_path):
    folder = tmp_path / "kernel"
    folder.mkdir()
    (tmp_path / "key.json").write_text("{}")
    (folder / "link.ipynb").symlink_to(tmp_path / "key.json")
    def write(**meta): (folder / "kernel-metadata.json").write_text(json.dumps(meta))
    for name in ("../key.json", "/etc/passwd", "link.ipynb", r"..\key.json"):
        write(id="ada/x", code_file=name)
        with pytest.raises(ValueError, match="code_file .* leads out of .* it would be uploaded"): read_kernel(folder)
    for name in ("--help", "ada", "ada/../x", None, "-p/x"):
        write(id=name, code_file="kernel.ipynb")
        with pytest.raises(ValueError, match="expected USER/NAME"): read_kernel(folder)
    write(id="ada/x", code_file="kernel.ipynb")
    assert read_kernel(folder)["id"] == "ada/x"


def test_an_image_that_would_fill_the_memory(tmp_path):
    "Forty thousand pixels a side by its header, and nothing in it"
    from rcic_fastai.screen.planes import read_grey

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    header = (40_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))
                                     + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match="x.png cannot be read: .*decompression bomb"): read_grey(tmp_path / "x.png")


# Stores


@pytest.fixture(scope="module")
def stores(small_screen, tmp_path_factory):
    "Stores of ten sites in shards of four, by format"
    folder, sites = tmp_path_factory.mktemp("stores"), read_screen(small_screen).sites()[:10]
    formats = ["blosc2", "raw"] + (["zarr"] if sys.version_info >= (3, 11) else [])
    packed = {f: Path(pack_sites(sites, folder / f, format=f, shard_sites=4, progress=False).path) for f in formats}
    if "zarr" in packed: packed["zarr_0_1_0"] = pack_0_1_0(packed["zarr"], folder / "zarr_0_1_0")
    return packed


@pytest.fixture
def forged(stores, tmp_path):
    "A copy of a store whose manifest, index and shards say something else, with the checksums that belong to it"
    def forge(format, manifest=None, index=None, chunk=None):
        shutil.rmtree(tmp_path / "theirs", ignore_errors=True)
        theirs = shutil.copytree(stores[format], tmp_path / "theirs")
        m = {**json.loads((theirs / "manifest.json").read_text()), **(manifest or {})}
        m = {k: v for k, v in m.items() if v is not ...}
        table = pd.read_parquet(theirs / "sites.parquet")
        if chunk is not None:
            shard = theirs / "shards" / "00000.bin"
            data = bytearray(shard.read_bytes())
            part = np.frombuffer(data, np.uint8)[: table.length[0]]
            chunk(part)
            shard.write_bytes(data)
            table.loc[0, "checksum"] = np.uint64(xxhash.xxh3_64_intdigest(part))
        if index is not None: table = index(table)
        if index is not None or chunk is not None:
            table.to_parquet(theirs / "sites.parquet", index=False)
            m["files"] = {**m["files"],
                          "sites.parquet": xxhash.xxh3_64_hexdigest((theirs / "sites.parquet").read_bytes())}
        if "digest" in m: m["digest"] = _digest(m)
        (theirs / "manifest.json").write_text(json.dumps(m))
        return theirs
    return forge


@pytest.fixture
def no_decoder(monkeypatch):
    "Decoding, or memory for more than a few sites, is a failure"
    def fail(*args, **kwargs): raise AssertionError("it was decoded")
    real = np.empty
    def small(shape, *args, **kwargs):
        assert np.prod(shape) < 1e8, f"memory for {shape}"
        return real(shape, *args, **kwargs)
    monkeypatch.setattr(np, "empty", small)
    return fail


@each("change", [
    dict(shape=[6, 48, 47]), dict(shape=[6, 20000, 10000]), dict(shape=[6, 10**6, 10**6]), dict(shape=[6, -48, -48]),
    dict(shape=[6, 48]), dict(shape="648"), dict(shape=[6.0, 48, 48]),
    dict(shape=[3, 48, 48]), dict(channels=[1, 2, 3]), dict(channels=[1] * 6), dict(channels=[None] * 6),
    dict(channels={}), dict(format="pickle"), dict(format="raw"), dict(preset="fast"),
    dict(preset="best"), dict(n_sites=11), dict(n_sites=-1), dict(n_sites=True), dict(shard_sites=0),
    dict(shard_sites=3), dict(shard_sites=...), dict(kind="rcic_fastai store 2"),
    dict(size="x"), dict(files={}), dict(files={"sites.parquet": 1}), dict(files={"sites.parquet": "0", "../x": "0"}),
    dict(composite="no"), dict(channels=...)], ids=str)
def test_a_manifest_that_does_not_fit(forged, no_decoder, monkeypatch, change):
    "Refused by the name of its file, before anything is decoded"
    monkeypatch.setattr(_Blosc2, "decompress", None, raising=False)
    theirs = forged("blosc2", manifest=change)
    with pytest.raises(ValueError, match=r"(manifest.json|sites.parquet)") as e:
        store = Store(theirs)
        store._codec.decompress = no_decoder
        store.read_batch(range(len(store)))
    assert not isinstance(e.value, DamagedSite)


@each("change, message", [
    (lambda t: t.assign(length=t.length * 10**6), "bytes, expected"),
    (lambda t: t.assign(length=-t.length), "bytes, expected"),
    (lambda t: t.assign(offset=t.offset - 1), "row 0: offset -1"),
    (lambda t: t.assign(offset=0), "row 1: offset 0 is not where the site before it ends"),
    (lambda t: t.assign(offset=t.offset + 2**62), "offset"), (lambda t: t[:9], "9 sites, but the manifest counts 10"),
    (lambda t: t.drop(columns="checksum"), "column 'checksum' is missing"),
    (lambda t: t.assign(offset=t.offset.astype(float)), "column 'offset' is double"),
    (lambda t: t.assign(site_id=t.site_id.iloc[0]), "twice"),
    (lambda t: t.assign(site_id=range(10)), "column 'site_id' is int64"),
    (lambda t: t.assign(checksum=t.checksum.astype(str)), "column 'checksum'")])
def test_an_index_that_does_not_fit(forged, change, message):
    with pytest.raises(ValueError, match=f"sites.parquet.*{message}"): Store(forged("blosc2", index=change)).read(0)


def test_an_index_that_is_none(forged):
    theirs = forged("blosc2")
    (theirs / "sites.parquet").write_bytes(b"PAR1")
    m = json.loads((theirs / "manifest.json").read_text())
    # nothing else would tell
    for change in (dict(shape=[6, 96, 24]), dict(channels=["a", "b", "c", "d", "e", "f"]), dict(digest="0")):
        (theirs / "manifest.json").write_text(json.dumps({**m, **change}))
        with pytest.raises(ValueError, match="manifest.json is not as it was written"): Store(theirs)
    del m["digest"]
    (theirs / "manifest.json").write_text(
        json.dumps({**m, "files": {"sites.parquet": xxhash.xxh3_64_hexdigest(b"PAR1")}}))
    with pytest.raises(ValueError, match="sites.parquet is no Parquet file"): Store(theirs).read(0)
    for text in ("{", "[]", '{"kind": NaN}', '{"kind": 1, "kind": 2}', "\x00"):
        (theirs / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match="manifest.json"): Store(theirs)


@pytest.mark.parametrize("read", ["read", "window", "batch"])
@each("at, value, message", [
    (slice(4, 8), np.frombuffer(np.int32(2**31 - 64).tobytes(), np.uint8), "it holds 2,147,483,584 bytes, not 13,824"),
    (slice(12, 16), np.uint8(255), "it has .* bytes, not"),
    (3, 8, "numbers of 8"), (slice(8, 12), np.uint8(1), "blocks of"), (2, 0b11010101, "its codec is 6"),
    (22, 36, "its codec is 4, 36"), (16, 160, "its filters are 160"), (17, 2, "its filters are 35, 2"),
    (31, 0b1000000, "flags that are unknown"), (31, 8, "flags that are unknown")])
def test_a_chunk_that_does_not_fit(forged, stranger, monkeypatch, at, value, message, read):
    "A bomb, another shape, and a codec for which Blosc2 would start a Python that looks for a module here"
    def change(part): part[at] = value
    store = Store(forged("blosc2", chunk=change))
    how = dict(read=lambda: store.read(0), window=lambda: store.read(0, 1, 1, 8, 8),
               batch=lambda: store.read_batch([0, 1]))
    with pytest.raises(ValueError, match=message): how[read]()


def test_zarr_is_format_3_and_the_array_that_was_packed(stores, forged):
    pytest.importorskip("zarr", reason="the format zarr needs zarr 3, which needs Python 3.11")
    assert (Store(stores["zarr_0_1_0"]).read(3) == Store(stores["zarr"]).read(3)).all()
    theirs = forged("zarr_0_1_0")
    path = theirs / "shards" / "zarr.json"
    good = json.loads(path.read_text())
    inner = good["codecs"][0]["configuration"]["codecs"]
    def with_codecs(*codecs):
        return [dict(name="sharding_indexed",
                     configuration={**good["codecs"][0]["configuration"], "codecs": list(codecs)})]
    for change in (dict(zarr_format=2), dict(shape=[10, 6, 48, 47]), dict(shape=[10**9, 6, 48, 48]),
                   dict(data_type="uint16"), dict(data_type=dict(name="numpy.void")), dict(fill_value=1),
                   dict(codecs=with_codecs(dict(name="numcodecs.pickle"))),
                   dict(codecs=with_codecs(*inner, dict(name="gzip", configuration=dict(level=1)))), dict(codecs=inner),
                   dict(node_type="group"),
                   dict(chunk_grid=dict(name="regular", configuration=dict(chunk_shape=[64, 6, 48, 480]))),
                   dict(storage_transformers=[dict(name="x")])):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match="shards/zarr.json: "): Store(theirs).read(0)
    path.unlink()
    (theirs / "shards" / ".zarray").write_text(
        json.dumps(dict(zarr_format=2, shape=[10, 6, 48, 48], chunks=[1, 6, 48, 48], dtype="|O",
                        filters=[dict(id="pickle")], compressor=None, fill_value=0, order="C")))
    with pytest.raises(FileNotFoundError, match="zarr.json"): Store(theirs).read(0)


@pytest.mark.parametrize("size", [1, 255, 256, 70000, 2**20])
def test_what_a_zstd_frame_says_it_holds(size):
    numcodecs = pytest.importorskip("numcodecs", reason="it comes with zarr")
    assert _zstd_size(bytes(numcodecs.Zstd().encode(bytes(size)))[:18]) == size
    assert _zstd_size(b"") is _zstd_size(b"\x28\xb5\x2f\xfd\x00\x00") is _zstd_size(b"PK\x03\x04" * 5) is None


@each("index, message", [
    (lambda t: t.assign(place="../../outside"), "row 0: '../../outside' is no place"),
    (lambda t: t.assign(place=[*t.place[:4], "plates/../../a.ome.zarr/B/3/1", *t.place[5:]]), "row 4: .* is no place"),
    (lambda t: t.assign(place=t.place.str.replace("zarr/[A-Z]", "zarr/..", regex=True)), "row 0: .* is no place"),
    (lambda t: t.assign(place=t.place.iloc[0]), "row 1: another site has its place"),
    (lambda t: t.assign(place=1), "row 0: '1' is no place"),
    (lambda t: t.drop(columns="place"), "row 0: 'None' is no")])
def test_places_lie_in_the_store(forged, index, message):
    pytest.importorskip("zarr", reason="the format zarr needs zarr 3, which needs Python 3.11")
    with pytest.raises(ValueError, match=f"sites.parquet: {message}"): Store(forged("zarr", index=index)).read(0)


@each("said", [None, [], dict(version="0.5"), dict(version="0.4"), dict(labels="ABCDEF"), dict(windows=[[0, 1]] * 5),
               dict(windows=[[0, "1"]] * 6), dict(colors=[1] * 6)], ids=str)
def test_what_a_manifest_says_to_other_programs(stores, forged, said):
    pytest.importorskip("zarr", reason="the format zarr needs zarr 3, which needs Python 3.11")
    good = json.loads((stores["zarr"] / "manifest.json").read_text())["ome_zarr"]
    assert Store(forged("zarr", manifest=dict(ome_zarr=good))).read(0).any()
    if isinstance(said, dict) and said != dict(version="0.5"): said = {**good, **said}
    with pytest.raises(ValueError, match="manifest.json: ome_zarr does not describe 6 channels"):
        Store(forged("zarr", manifest=dict(ome_zarr=said)))


@pytest.mark.parametrize("address", ["{}", "memory://strangers/store"])
@pytest.mark.parametrize("layout, n, size", [("zarr", 6, 48 * 48), ("zarr_0_1_0", 4, 6 * 48 * 48)])
def test_a_zarr_chunk_that_holds_too_much(stores, tmp_path, address, layout, n, size):
    "Ten times the pixels of a chunk, compressed to less than one: refused before they are there"
    pytest.importorskip("zarr", reason="the format zarr needs zarr 3, which needs Python 3.11")
    import fsspec
    from numcodecs import Zstd
    from zarr.codecs import ZstdCodec

    google_crc32c = pytest.importorskip("google_crc32c", reason="it comes with zarr")
    def crc(data): return google_crc32c.value(bytes(data)).to_bytes(4, "little")
    theirs = shutil.copytree(stores[layout], tmp_path / "theirs")
    assert Store(theirs).read(1).any()
    shard = theirs / "shards" / "c" / "0" / "0" / "0" / "0"
    if layout == "zarr": shard = theirs / Store(theirs).sites.place[1] / "0" / "c" / "0" / "0" / "0"
    data = bytearray(shard.read_bytes())
    # of the chunks, and how long they are
    starts = np.frombuffer(data[-4 - 16 * n : -4], "<u8").reshape(-1, 2).astype(int)
    bomb = bytes(Zstd().encode(bytes(10 * size)))
    chunk = bomb + crc(bomb)
    index = starts.copy()
    index[1, 1] = len(chunk)
    assert len(chunk) <= starts[1, 1]
    data[starts[1, 0] : starts[1, 0] + len(chunk)] = chunk
    raw = index.astype("<u8").tobytes()
    data[-4 - 16 * n :] = raw + crc(raw)
    shard.write_bytes(data)
    address = address.format(theirs)
    if "://" in address: fsspec.filesystem("memory").put(str(theirs), "/strangers/store", recursive=True)
    with pytest.raises(DamagedSite, match=f"it holds {10 * size:,} bytes, not {size:,}"): Store(address).read(1)
    assert Store(address).read(0).any()
    from zarr.registry import get_codec_class

    assert get_codec_class("zstd") is ZstdCodec  # for everybody else
    if "://" in address: fsspec.filesystem("memory").rm("/strangers", recursive=True)


# Passwords

SECRET = "feed/Beef+cafe==1 @x"  # with all that has to be encoded
TOKEN = "KGAT_0123456789feedBeef"


@each("text", [
    "s3://AKEY:{raw}@bucket/store", "https://ada:{quoted}@host/a.zip", "https://ada:{lower}@host/a.zip",
    "s3:/AKEY:{quoted}@bucket", "ftp://{quoted}@host", "zip://a.zip::https://ada:{quoted}@host/x",
    "https%3A%2F%2Fada%3A{twice}%40host%2F",
    r"https:\/\/ada:{quoted}@host\/x", "https://host/a?X-Amz-Signature={quoted}&X-Amz-Date=1",
    "/a?sig={quoted} (Caused by", "https://host/a?page=1&amp;token={quoted}", "https://host/#access_token={quoted}",
    "https://host/a%3Ftoken%3D{twice}", "Authorization: Basic {basic}", "Authorization: Bearer {b64}",
    "{{'Authorization': 'Basic {basic}'}}", '{{"username": "ada", "key": {json}}}', "{{'password': {repr}}}",
    r'{{\"key\": \"{quoted}\"}}',
    "ada:{quoted}@host/path is no folder", "'ada:{raw}@host.com'", "x=ada:{raw}@10.0.0.1/x", "ada:{raw}@bucket",
    "/here/ada:{quoted}@host:80/x", "ada%3A{quoted}%40host%2Fx",
    "password='{raw}'", "aws_secret_access_key = {quoted}", "AccountKey={quoted};EndpointSuffix=core",
    "X-Api-Key: {quoted}", "(b'authorization', b'Bearer {b64}')", "netrc: machine host login ada password={quoted}"])
def test_no_spelling_of_a_password_is_shown(text):
    "Without knowing it; what is left holds no part of it"
    basic = base64.b64encode(f"ada:{SECRET}".encode()).decode()
    quoted = quote(SECRET, safe="")
    shown = scrub(text.format(raw=SECRET.replace(" ", ""), quoted=quoted,
                              lower=quoted.replace("%2F", "%2f").replace("%2B", "%2b"), twice=quote(quoted, safe=""),
                              basic=basic, b64=base64.b64encode(SECRET.encode()).decode(),
                              json=json.dumps(SECRET), repr=repr(SECRET)))
    assert ("***" in shown
            and not any(part in shown.lower() for part in ("feed", "beef", "cafe", basic[8:].lower(), "zwvkl0"))), shown


@each("spell",
      [str, lambda s: quote(s, safe=""), quote, json.dumps, repr, lambda s: base64.b64encode(s.encode()).decode(),
       lambda s: base64.urlsafe_b64encode(b"ada:" + s.encode()).decode(),
                                   lambda s: base64.b64encode(json.dumps(dict(a=1, k=s)).encode()).decode(),
       lambda s: quote(quote(s, safe=""), safe="")])
def test_a_known_password_is_hidden_anywhere(monkeypatch, spell):
    monkeypatch.setenv("MY_STORE_PASSWORD", SECRET)
    assert "***" in scrub(f"before {spell(SECRET)} after")
    assert spell(SECRET) not in scrub(f"before {spell(SECRET)} after")
    monkeypatch.delenv("MY_STORE_PASSWORD")
    monkeypatch.setenv("HTTPS_PROXY", f"http://ada:{quote(SECRET, safe='')}@proxy:8080")
    assert spell(SECRET) not in scrub(f"before {spell(SECRET)} after")


def test_credentials_of_the_client_are_known(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("KAGGLE_")]: monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".kaggle").mkdir()
    for name, text in {"kaggle.json": json.dumps(dict(username="ada", key="odd-looking-one")),
                       "access_token": "odd-looking-two\n",
                       "credentials.json": json.dumps(dict(refresh_token="odd-looking-three"))}.items():
        (tmp_path / ".kaggle" / name).write_text(text)
    said = (f"odd-looking-one, odd-looking-two; {base64.b64encode(b'ada:odd-looking-one').decode()} odd-looking-three "
            f"{TOKEN} {'0a' * 16}")
    assert scrub_kaggle(said) == "***, ***; *** *** *** ***"


def test_commands_show_no_password(capsys, monkeypatch):
    address = f"s3://AKEY:{SECRET.replace(' ', '')}@bucket/x"
    for error in (OSError(f"{address} is not a folder"), ValueError(address), KeyError(address),
                  OSError(13, "no", address), RuntimeError(f"url: {address}?sig=feed")):
        with pytest.raises(CliError) as e:
            with one_line_errors(False): raise error
        assert "feed" not in str(e.value).lower() and "***" in str(e.value)
    with pytest.raises(SystemExit):
        with one_line_errors(False): raise KeyboardInterrupt(address)
    with pytest.raises(SystemExit): option_parser(rcic_show).parse_args(["--bogus", address])
    _say(f"Written: {address}")
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(ValueError):
        with one_line_errors(True): raise ValueError(address)
    try: raise ValueError(address)
    except ValueError as e: sys.excepthook(type(e), e, e.__traceback__)
    out, err = capsys.readouterr()
    assert "feed" not in (out + err).lower() and "Written: s3://***@bucket/x" in out
    assert "ValueError: s3://***@bucket/x" in err


@pytest.mark.parametrize("address",
                         ["https://ada:feedBeef@host/x", "ada:feedBeef@host/x",
                          "https://host/x?X-Amz-Signature=feedBeef"])
def test_no_option_takes_a_password(address, tmp_path, monkeypatch):
    """Of any command, in text, paths and lists; nothing is written. The address of a download may hold one, which is
    noted nowhere"""
    import inspect

    from rcic_fastai.cli import core as cli, kaggle as kaggle_cli, labels as hpa_cli

    monkeypatch.chdir(tmp_path)
    seen = 0
    for module in (cli, hpa_cli, kaggle_cli):
        for name in [n for n in module.__all__ if n.startswith("rcic_")]:
            for p in inspect.signature(getattr(module, name)).parameters.values():
                if p.annotation in (int, float, bool) or p.name == "url" or "Path" in str(
                    p.annotation) and "?" in address:
                    continue
                value = Path(address) if "Path" in str(p.annotation) else address
                with pytest.raises(CliError,
                                   match=f"--{p.name.replace('_', '-')} holds an address with a password") as e:
                    getattr(module, name)(**{p.name: [value] if "append" in str(p.annotation) else value})
                assert "feed" not in str(e.value).lower()
                seen += 1
    assert seen > 50 and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="VALID holds an address with a password"):
        build_kernel(tmp_path / "k", user="ada", values=dict(VALID=address), lacking=())


def test_what_exists_is_a_path(small_screen, tmp_path):
    "A folder whose name looks like a user, a password and a host"
    shutil.copytree(small_screen, tmp_path / "ada:12:30@lab.x")
    rcic_show(data=tmp_path / "ada:12:30@lab.x", out=tmp_path / "well.png")


def test_a_store_shows_no_password(stores, forged, monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(stores["raw"]), "/ada:feed@bucket/s", recursive=True)
    assert repr(Store("memory://ada:feed@bucket/s")).startswith("Store memory://***@bucket/s: ")
    with pytest.raises(FileNotFoundError, match=r"memory://\*\*\*@bucket/none holds no finished store"):
        Store("memory://ada:feed@bucket/none")
    memory.rm("/ada:feed@bucket", recursive=True)


def test_messages_without_passwords_stay_as_they_are():
    for text in ("train.csv: row 17: plate 5 is outside 1-4",
                 "recipe.json: unknown setting 'token'; did you mean 'taken'?",
                 "its MD5 is 0a1b2c3d4e5f60718293a4b5c6d7e8f9", "files '{well}_s{site}_{channel}.tif' has no {channel}",
                 "unknown key: learning_rate", "store#17 of C:/mine/ada@home", "https://www.kaggle.com/code/ada/rcic",
                 "--set train.lr=.1", "valid 'experiment=HUVEC-07,RPE-07': x", "mail ada@example.org: 5 tokens",
                 "treatment 'TP53:siRNA1@24h'", "treatment 'drug:5@10uM'", "well 12:30@day", "git@example.org:ada/x",
                 "files '{well}:{site}@{channel}.tif'"):
        assert scrub(text) == text


# Settings that lead to files, to addresses, or to memory without end

OPTIONS = {  # what timm would do with them
    "checkpoint_path": "/etc/passwd", "cache_dir": "x",
    "pretrained_cfg": {"url": "http://u:S3cretPw@127.0.0.1:9/x.pth"}, "pretrained_cfg_overlay": {"file": "/etc/passwd"},
    "features_only": True, "out_indices": [1], "feature_cfg": {}, "pretrained": True, "scriptable": True,
    "hf_hub_id": "a/b", "stem_width": "http://u:S3cretPw@127.0.0.1:9/x",
    "act_layer": "../x", "channels": [10**7] * 4, "norm_kwargs": {"eps": 1}, "layers": [[[1]]], "stem_type": "x" * 50,
    "drop_rate": 1e9,
}


@each("name", OPTIONS)
def test_options_of_a_network_are_plain(small_run, tmp_path, monkeypatch, name):
    "In a recipe that is trained and in a run that predicts"
    monkeypatch.setattr("timm.create_model", lambda *a, **k: pytest.fail("timm was asked"))
    run = shutil.copytree(small_run, tmp_path / "run")
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["model"].update(arch="resnet10t", arch_options={name: OPTIONS[name]})
    (run / "recipe.json").write_text(json.dumps(recipe))
    for read in (lambda: read_run(run), lambda: get_recipe(run / "recipe.json")):
        with pytest.raises(ValueError,
                           match=rf"recipe.json: model.arch_options.*{name}|recipe.json: model holds an address") as e:
            read()
        assert "S3cretPw" not in str(e.value)


@each("change", [dict(data=dict(read_size=10**6)), dict(data=dict(batch_size=10**9)), dict(model=dict(hidden=10**8)),
                 dict(seed=-1), dict(inference=dict(bagging=[10**9]))], ids=str)
def test_sizes_of_a_run_have_bounds(small_run, tmp_path, change):
    run = shutil.copytree(small_run, tmp_path / "run")
    recipe = json.loads((run / "recipe.json").read_text())
    for part, values in change.items():
        recipe[part] = {**recipe[part], **values} if isinstance(values, dict) else values
    (run / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="recipe.json: .*expected"): read_run(run)


def test_what_others_log_and_warn_of_holds_no_password(caplog):
    with warnings.catch_warnings(record=True) as found, one_line_errors(False):
        warnings.simplefilter("always")
        logging.getLogger("timm.models").warning("Loading from (%s)",
                                                 "https://u:S3cretPw@example.org/x.pth?sig=S3cretSig")
        warnings.warn("https://u:S3cretPw@example.org is slow", stacklevel=1)
        logging.getLogger("timm.models").warning("%d of %d", 1, 2)
    said = caplog.text + " ".join(str(w.message) for w in found)
    assert "S3cret" not in said and "example.org is slow" in said and "1 of 2" in said


def test_an_error_without_a_word_gets_some():
    for error in (MemoryError(), ValueError(), OSError(), KeyError("")):
        with pytest.raises(CliError, match=f"{type(error).__name__}"), one_line_errors(False): raise error


@each("address", ["h.org/x?sig=S3cret", "x?token=S3cret", "https://h/x?token=S3c",
                  "https://h/x?a=1&X-Amz-Signature=S3cret", "https://h/x#access_token=S3cret",
                  "//h/x?sv=1&Signature=S3cret",
                                     "u:S3cret@h:/x", "u:S3cret@h.org:x", "https://h/x?api_key=S3cret"])
def test_signatures_and_tokens_come_into_no_file(tmp_path, address):
    for build in (dict(values=dict(VALID=address)), dict(title=address)):
        with pytest.raises(ValueError, match="holds an address with a password") as e:
            build_kernel(tmp_path / "kernel", user="ada", lacking=(), **build)
        assert "S3c" not in str(e.value)
    assert not (tmp_path / "kernel").exists()
    for text in ("https://host/weights.pth?download=true", "valid?fold=0/5", "treatment 'TP53:siRNA1@24h: x'",
                 "C:/mine/a@h.org/x", "a:b@c"):
        refuse_password(text, "x")


# Pages

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


def test_names_are_text_on_a_page():
    t = pd.DataFrame({EVIL: [EVIL, "[x](javascript:alert(1))"]}, index=pd.Index([EVIL, "`x`"], name=EVIL))
    cell = nbformat.v4.new_code_cell(f"name = {EVIL!r}",
                                     outputs=[nbformat.v4.new_output("stream", name="stdout", text=EVIL),
                                              nbformat.v4.new_output("execute_result", {"text/plain": EVIL}),
                                                                 *(nbformat.v4.new_output(
                                                                     "display_data", {"text/html": part.data})
                                                                   for part in (table(t, EVIL),
                                                                                tiles({EVIL: (EVIL, EVIL)})))])
    page = notebook_page(nbformat.v4.new_notebook(cells=[cell]), EVIL)
    assert "<script" not in page and "<img src=x" not in page and "href=\"javascript" not in page
    assert page.count("&lt;script&gt;") >= 8


def test_names_are_text_in_a_notebook(small_screen):
    screen = read_screen(small_screen)
    screen.wells = screen.wells.assign(cell_type=EVIL)
    assert "<script" not in screen._repr_html_() and "<img src" not in screen._repr_html_()


def test_parameters_are_literals():
    from rcic_fastai.report.html import with_parameters

    nb = nbformat.v4.new_notebook()
    value = "'''\"); import os; os.mkdir('x')\n#"
    source = with_parameters(nb, dict(run=value, n=None)).cells[0].source
    assert [ast.literal_eval(a.value) for a in ast.parse(source).body] == [value, None]
    class Sly:
        def __repr__(self): return "__import__('os')"
    for bad in (Sly(), float("nan"), {1: Sly()}, Path("x")):
        with pytest.raises(ValueError, match="is no plain value"): with_parameters(nb, dict(run=bad))
    with pytest.raises(ValueError, match="is no plain value"): with_parameters(nb, {"a; b": 1})
