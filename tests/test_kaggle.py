"""Kernels executed from start to end where this library is not installed, and the official client against a server
on this machine."""

import base64
import configparser
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import threading
import venv
import zipfile
from email.parser import Parser
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer

import nbformat
import pytest
from packaging.requirements import Requirement

import rcic_fastai.kaggle.core
from rcic_fastai.run.labels import submit_labels
from rcic_fastai.kaggle.core import build_kernel, find_competition, find_run, go_on, weights_folder
from rcic_fastai.cli.kaggle import rcic_kaggle
from rcic_fastai.kaggle.client import kaggle_user, run_client, scrub_kaggle
from rcic_fastai.run.predict import predict_run
from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe
from rcic_fastai.run.submit import submit_run
from rcic_fastai.run.train import train_run
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.simulate_atlas import simulate_hpa
from rcic_fastai.run.folder import read_run
from rcic_fastai.kaggle.packages import image_lacks, installed_wheel, pack_wheels

KEY = "0a1b2c3d4e5f60718293a4b5c6d7e8f9"  # looks like one of Kaggle's
ROOT = Path(__file__).parents[1]
TOOL = runpy.run_path(str(ROOT / "tools" / "kaggle_image.py"))
IMAGE = TOOL["read_pins"]()
NO_NETWORK = """
import socket
def only_here(real):
    def connect(self, address):
        internet = self.family in (socket.AF_INET, socket.AF_INET6)
        if internet and not str(address[0]).startswith(("127.", "::1", "localhost")):
            raise OSError(f"there is no network: {address}")
        return real(self, address)
    return connect
socket.socket.connect, socket.socket.connect_ex = only_here(socket.socket.connect), only_here(socket.socket.connect_ex)
"""
EXECUTE = """
import sys, nbformat, nbclient
nb = nbformat.read(sys.argv[1], 4)
try: nbclient.NotebookClient(nb, timeout=300, kernel_name="python3").execute()
finally: nbformat.write(nb, sys.argv[1])
"""


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    "No real credentials: another home folder, and none of the client's variables"
    for name in [n for n in os.environ if n.startswith("KAGGLE_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


@pytest.fixture
def bare(tmp_path):
    """A function that runs Python in an environment like this one, without this library, what Kaggle's image lacks,
    and a network"""
    root = tmp_path / "environment"
    venv.create(root, symlinks=True, with_pip=importlib.util.find_spec("pip") is None)
    site = next(root.glob("lib/python*/site-packages"))
    # munch: comes with pretrainedmodels
    hidden = tuple(n.replace("-", "_") for n in ("rcic_fastai", "__editable__", "munch", *image_lacks))
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for p in Path(folder).iterdir():
            if not p.name.lstrip("_").startswith(
                tuple(h.lstrip("_") for h in hidden)) and p.name != "__pycache__" and not (site / p.name).exists():
                (site / p.name).symlink_to(p)
    (site / "sitecustomize.py").write_text(NO_NETWORK)
    (root / "share").mkdir(exist_ok=True)
    (root / "share" / "jupyter").symlink_to(Path(sys.prefix) / "share" / "jupyter")  # templates of nbconvert
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "JUPYTER_PATH")}
    state = {n: str(tmp_path / "jupyter" / n) for n in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR",
                                                        "IPYTHONDIR")}

    def run(*args, ok=True, **env):
        done = subprocess.run([root / "bin" / "python", *map(str, args)], cwd=tmp_path, capture_output=True, text=True,
                              timeout=600,
                              env={**keep, **state, "PIP_NO_INDEX": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "agg",
                                   **env})
        assert not ok or done.returncode == 0, done.stderr[-3000:]
        return done

    for module in ("rcic_fastai", *image_lacks):
        assert "ModuleNotFoundError" in run("-c", f"import {module}", ok=False).stderr
    assert "there is no network" in run("-c", "import socket; socket.create_connection(('192.0.2.1', 80), 1)",
                                        ok=False).stderr
    return run


def texts(cells):
    "What cells have shown, as text"
    outputs = [o for c in cells for o in c.get("outputs", ())]
    return "\n".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)


@pytest.fixture(scope="module")
def tiny_run(small_screen, tmp_path_factory):
    "A run of a very small network, with the submission that the library makes of it outside a kernel"
    run, screen = tmp_path_factory.mktemp("runs") / "tiny", read_screen(small_screen)
    recipe = change_recipe(get_recipe("laptop"), "train.epochs=2", "data.batch_size=16", "model.arch=resnet10t",
                           'model.arch_options={"channels": [8, 16, 32, 64], "stem_width": 8}')
    train_run(screen, recipe, run, valid="experiment=HUVEC-03", say=lambda *a: None)
    predict_run(run, screen, "test", progress=False)
    submit_run(run, screen, say=lambda *a: None)
    return run


@pytest.mark.slow
def test_weights_that_are_damaged_are_not_packed(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        build_kernel(tmp_path / "k", "infer", run=run, user="ada")
    (run / "model.safetensors").write_bytes(weights)
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["model"]["arch_options"]["channels"] = [8, 8, 8, 8]
    (run / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match="not of the network of recipe.json with .* of run.json: .* expected "):
        build_kernel(tmp_path / "k", "infer", run=run, user="ada")
    assert not (tmp_path / "k").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)  # twice a library imported for the first time, on a machine that may be busy
def test_kernels_run_offline_without_the_library(bare, tiny_run, small_screen, tmp_path):
    """One kernel trains, another one infers from an attached dataset: the same submission as outside.

    Both in one session, so that the library is imported once; between them every name is forgotten.
    """
    recipe, info = read_run(tiny_run)
    train, infer, disk = tmp_path / "train", tmp_path / "infer", tmp_path / "input"
    build_kernel(train, recipe=recipe, user="ada", title="RCIC on a laptop", values=dict(VALID=info["valid"]))
    meta = build_kernel(infer, "infer", run=tiny_run, user="ada", title="RCIC inference")
    assert meta["dataset_sources"] == ["ada/rcic-inference-weights"]
    assert str(tiny_run.parent) not in "".join(p.read_text() for p in (infer / "weights").glob("*.json"))
    shutil.copytree(small_screen, disk / "competitions" / meta["competition_sources"][0],
                    ignore=shutil.ignore_patterns("truth.csv"))
    shutil.copytree(infer / "weights", disk / "datasets" / "ada" / "rcic-inference-weights")  # where Kaggle puts it
    first, second = (nbformat.read(f / "kernel.ipynb", 4) for f in (train, infer))
    between = nbformat.v4.new_code_cell("%reset -f\nimport os\nos.environ['RCIC_KAGGLE_WORKING'] = "
                                        f"{str(tmp_path / 'second')!r}")
    n = len(first.cells)
    for c in second.cells: c["id"] += "b"
    both = nbformat.v4.new_notebook(cells=[*first.cells, between, *second.cells])
    for folder in ("first", "second"): (tmp_path / folder).mkdir()
    nbformat.write(both, tmp_path / "both.ipynb")
    bare("-c", EXECUTE, tmp_path / "both.ipynb", RCIC_KAGGLE_INPUT=str(disk),
         RCIC_KAGGLE_WORKING=str(tmp_path / "first"))
    cells = nbformat.read(tmp_path / "both.ipynb", 4).cells
    assert all(c.get("execution_count") for c in cells if c.cell_type == "code")
    said = texts(cells[:n])
    assert "Installed: pretrainedmodels-" in said and ", rcic_fastai-" in said
    assert "Training resnet10t" in said and "+ plate groups" in said and "Training" not in texts(cells[n:])
    assert (tmp_path / "first" / "run" / "model.safetensors").read_bytes() == (
        tiny_run / "model.safetensors").read_bytes()
    for folder in ("first", "second"):
        assert (tmp_path / folder / "submission.csv").read_bytes() == (tiny_run / "submission.csv").read_bytes()
    assert not list((tmp_path / "second" / "run").glob("history.csv"))  # nothing was trained there
    assert (tmp_path / "environment" / "bin" / "rcic-train").exists()  # the commands came too
    if not image_differs():  # elsewhere tests/test_report.py is enough
        page = tmp_path / "page.html"
        bare(tmp_path / "environment" / "bin" / "rcic-report", "--run", tmp_path / "first" / "run", "--data",
             small_screen, "--out", page)
        assert "resnet10t" in page.read_text() and page.stat().st_size > 100_000


def test_requirements_admit_kaggles_image():
    "So that installing this library there replaces nothing."
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    needed = [Requirement(r) for r in config["DEFAULT"]["requirements"].split()]
    names = {TOOL["normal"](r.name): r for r in needed}
    assert {n: v for n, v in IMAGE.items() if n in names and not names[n].specifier.contains(v)} == {}
    assert set(names) - set(IMAGE) == {*image_lacks, "nbclient"}  # nbclient: as nbconvert wants it
    assert TOOL["replaced"]({"fastcore": "2.2.22", "munch": "4.0"},
                            IMAGE) == [f"fastcore {IMAGE['fastcore']} -> 2.2.22"]


def image_differs():
    "Packages of this environment that are not those of Kaggle's image"
    there = {TOOL["normal"](d.name): d.version for d in importlib.metadata.distributions()}
    return {n: there.get(n) for n, v in IMAGE.items() if there.get(n) != v}


def run_cells(folder, monkeypatch, inputs, working):
    "The code of a kernel's notebook, in this process; returns its names"
    working.mkdir()
    monkeypatch.setenv("RCIC_KAGGLE_INPUT", str(inputs))
    monkeypatch.setenv("RCIC_KAGGLE_WORKING", str(working))
    names = {}
    for c in json.loads((folder / "kernel.ipynb").read_text())["cells"]:
        if c["cell_type"] == "code": exec(compile(c["source"], c["id"], "exec"), names)
    return names


@pytest.mark.slow
def test_several_labels_and_a_session_that_ends(tmp_path, monkeypatch, capsys):
    """An atlas; the first session ends at once, the second one goes on from its output and submits what an
    uninterrupted run does"""
    simulate_hpa(tmp_path / "input" / "human-protein-atlas-image-classification", 90, 30, 0, 32, min_positives=3,
                 workers=1, progress=False)
    recipe = change_recipe(laptop_recipe(get_recipe("hpa_seresnext50_focal"), 1), "data.batch_size=16",
                           "data.epoch_sites=0", "data.read_size=null", "inference.tta=1", "inference.thresholds=share",
                           'model.arch_options={"channels": [8, 16, 32, 64], "stem_width": 8}')
    meta = build_kernel(tmp_path / "kernel", recipe=recipe, user="ada", title="Several labels", gpu=False, go_on=True,
                        values=dict(HOURS=0.0, VALID="fold=0/3"))
    assert meta["competition_sources"] == ["human-protein-atlas-image-classification"]
    assert meta["kernel_sources"] == ["ada/several-labels"] and not meta["enable_gpu"]
    names = run_cells(tmp_path / "kernel", monkeypatch, tmp_path / "input", tmp_path / "session1")
    assert not names["finished"] and "The session is about to end" in capsys.readouterr().out
    shutil.copytree(tmp_path / "session1", tmp_path / "input" / "several-labels")
    build_kernel(tmp_path / "kernel", recipe=recipe, user="ada", title="Several labels",
                 values=dict(HOURS=8.5, VALID="fold=0/3"))
    names = run_cells(tmp_path / "kernel", monkeypatch, tmp_path / "input", tmp_path / "session2")
    said = capsys.readouterr().out
    assert names["finished"] and "Resuming" in said and "macro-F1" in said
    screen = names["screen"]
    train_run(screen, recipe, tmp_path / "outside", valid="fold=0/3", say=lambda *a: None)
    predict_run(tmp_path / "outside", screen, "test", progress=False)
    outside = submit_labels(tmp_path / "outside", screen, say=lambda *a: None)
    assert (tmp_path / "session2" / "submission.csv").read_bytes() == outside.read_bytes()
    table = names["validation_table"](tmp_path / "outside", screen)
    assert {"macro-F1", "average precision"} <= set(table.index)
    kept = weights_folder(tmp_path / "outside", tmp_path / "weights", "ada", "Atlas weights")[0]
    assert (kept / "predictions" / "valid.npz").exists()  # what thresholds are chosen on
    with pytest.raises(FileExistsError, match="holds run, and no dataset of weights"):
        weights_folder(tmp_path / "outside", tmp_path / "session1", "ada", "Atlas weights")


# Wheels and folders


@pytest.mark.slow
def test_a_wheel_of_what_is_installed_is_a_wheel(bare, tmp_path):
    """Editable here; installed elsewhere, it gives the same wheel again: each file as RECORD says, commands and
    templates among them"""
    wheel = installed_wheel("rcic_fastai", tmp_path)
    bare("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", wheel)
    code = ("import sys; sys.path.insert(0, sys.argv[1]); "
            "from importlib.util import spec_from_file_location as s, module_from_spec as m; "
            "spec = s('w', sys.argv[2]); w = m(spec); spec.loader.exec_module(w); "
            "print(w.installed_wheel('rcic_fastai', sys.argv[3]))")
    site = next((tmp_path / "environment").glob("lib/python*/site-packages"))
    again = Path(bare("-c", code, site, site / "rcic_fastai" / "wheels.py", tmp_path / "again").stdout.strip())
    with zipfile.ZipFile(wheel) as a, zipfile.ZipFile(again) as b:
        record = next(n for n in a.namelist() if n.endswith("/RECORD"))
        assert sorted(a.namelist()) == sorted(b.namelist())
        assert {n: a.read(n) for n in a.namelist() if n != record} == {n: b.read(n) for n in b.namelist()
                                                                       if n != record}
        assert {"rcic_fastai/templates/kernel.ipynb", "rcic_fastai/kaggle/packages.py"} <= set(a.namelist())
        for line in a.read(record).decode().splitlines()[:-1]:
            name, digest, size = line.rsplit(",", 2)
            expected = base64.urlsafe_b64encode(hashlib.sha256(a.read(name)).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={expected}", len(a.read(name)))
        info = Parser().parsestr(a.read(record.replace("RECORD", "METADATA")).decode())
        assert info["Name"] == "rcic_fastai" and "Requires-Dist" in info


@pytest.mark.slow
def test_what_kaggle_would_refuse_is_refused_here(tiny_run, tmp_path, monkeypatch):
    build = lambda *args, **kwargs: build_kernel(tmp_path / "kernel", *args,
                                                 **{"user": "ada", "title": "A kernel", **kwargs})
    fake = tmp_path / "fake-1.0-py3-none-any.whl"
    fake.write_text("no archive")
    monkeypatch.setattr(rcic_fastai.kaggle.core, "notebook_limit", 100_000)
    bad = [
        (dict(title="RCIC"), "Kaggle takes 5 to 50 characters"),
        (dict(title="https://bob:Hunter2@h/w"), r"title holds an address with a password, https://\*\*\*@h/w"),
        (dict(user="ada/lovelace"), "--user is 'ada/lovelace'"),
        (dict(datasets=["backbones"]), "--dataset is 'backbones', expected USER/NAME"),
        (dict(models=["a/b"]), "expected USER/NAME/FRAMEWORK/VARIATION/VERSION"),
        (dict(competition="https://kaggle.com/c/x"), "--competition is"),
        (dict(wheels=[fake]), "fake-1.0-py3-none-any.whl: this is no wheel"),
        (dict(), "Kaggle takes 0.1 MB; rcic_fastai-.* alone takes 0."),
        (dict(lacking=["numpy"]), "numpy holds code compiled for this machine"),
        (dict(user=None), "Give --user NAME"),
        (dict(kind="test"), "kind is 'test'"),
        (dict(kind="infer"), "needs weights"),
        (dict(run=tiny_run), "makes a new run"),
        (dict(recipe=get_recipe("densenet161_first_place")), "this kernel has no internet"),
        (dict(values=dict(EPOCHS=3)), "assigns EPOCHS 0 times"),
    ]
    for kwargs, message in bad:
        with pytest.raises(ValueError, match=message): build(**kwargs)
    with pytest.raises(FileNotFoundError, match="is no finished run"): build(kind="infer", run=tmp_path)
    assert not (tmp_path / "kernel").exists()


def test_what_is_below_the_input(tmp_path):
    "Found by what is in it, at either place Kaggle has put it; said in words if it is missing or there twice"
    for place in ("rcic", "competitions/rcic"):
        root = tmp_path / place.replace("/", "-")
        (root / place / "train" / "HUVEC-01").mkdir(parents=True)
        for n in ("train.csv", "test.csv"): (root / place / n).touch()
        (root / place / "train" / "HUVEC-01" / "run.json").touch()  # folders of images are not entered
        assert find_competition(root) == root / place
        with pytest.raises(FileNotFoundError, match="no finished run .* which holds"): find_run(root)
        (root / "store").mkdir()
        for n in ("train.csv", "test.csv", "manifest.json"): (root / "store" / n).touch()
        assert find_competition(root) == root / "store"  # packed ones are read faster
    for n in ("a", "b"):
        (tmp_path / "weights" / n / "HUVEC").mkdir(parents=True)
        for f in ("run.json", "recipe.json"):
            (tmp_path / "weights" / n / f).touch()
            (tmp_path / "weights" / n / "HUVEC" / f).touch()
    with pytest.raises(ValueError, match="2 folders below .* attach one of them only"): find_run(tmp_path / "weights")
    shutil.rmtree(tmp_path / "weights" / "b")
    assert find_run(tmp_path / "weights") == tmp_path / "weights" / "a"  # not the part of one cell type
    with pytest.raises(FileNotFoundError, match="which holds nothing"): find_competition(tmp_path / "none")
    assert go_on(tmp_path / "run", tmp_path / "none") == tmp_path / "run" and not (tmp_path / "run").exists()


def test_whose_kernel(monkeypatch, tmp_path):
    "The name in the client's files, and never what else is in them"
    with pytest.raises(ValueError, match="Give --user"): kaggle_user()
    (tmp_path / "home" / ".kaggle").mkdir(parents=True)
    (tmp_path / "home" / ".kaggle" / "kaggle.json").write_text(json.dumps(dict(username="grace", key=KEY)))
    assert kaggle_user() == "grace"
    monkeypatch.setenv("KAGGLE_USERNAME", "ada")
    assert kaggle_user() == "ada"
    monkeypatch.setenv("KAGGLE_KEY", "an-unusual-key")
    assert scrub_kaggle("user ada, an-unusual-key; Basic YWRhOmFuLXVudXN1YWwta2V5 and "
                        + KEY) == "user ada, ***; Basic *** and ***"


# The official client


class Server(BaseHTTPRequestHandler):
    "Answers like api.kaggle.com, and remembers what it was asked"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        method = self.path.rpartition("/")[2]
        self.server.asked.append((method, dict(self.headers), json.loads(body)))
        answer = self.server.answers.get(method,
                                         dict(code=404,
                                              message=f"no {method}; you sent {self.headers.get('Authorization')} and "
                                              f"{KEY}"))
        self._send(json.dumps(answer).encode(), "application/json")

    def do_GET(self): self._send(b"id_code,sirna\n", "text/csv")

    def _send(self, data, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args): pass


@pytest.fixture
def kaggle_server(monkeypatch):
    """The client's own address for tests, http://localhost, reached through a proxy on a free port: its requests end
    here, unchanged"""
    pytest.importorskip("kagglesdk", reason="Kaggle's client is not installed: pip install kaggle")
    # HTTPServer looks up the name of this machine, which can take seconds
    server = ThreadingTCPServer(("127.0.0.1", 0), Server)
    server.asked, server.answers = [], {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"): monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy"): monkeypatch.setenv(name, f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setenv("KAGGLE_USERNAME", "ada")
    monkeypatch.setenv("KAGGLE_KEY", KEY)
    monkeypatch.setenv("VERBOSE", "true")  # would make the client print headers
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_the_official_client_takes_the_folder(kaggle_server, tmp_path, monkeypatch, capfd):
    "push, status and output: the request holds notebook and metadata, and no key is seen anywhere"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kaggle.py").write_text("raise SystemExit('not the client')")
    folder = Path("kernel")
    rcic_kaggle("build", folder=folder, title="RCIC: domain batches", valid="fold=0/3", dataset=["ada/backbones"],
                machine="NvidiaTeslaT4", no_wheel=True)
    kaggle_server.answers = dict(SaveKernel=dict(ref="/code/ada/rcic-domain-batches",
                                                 url="https://www.kaggle.com/code/ada/rcic-domain-batches",
                                                 versionNumber=3),
                                 GetKernelSessionStatus=dict(status="RUNNING"),
                                 ListKernelSessionOutput=dict(
                                     files=[dict(fileName="submission.csv", url="http://localhost/submission.csv")],
                                     log="done"))
    for action in ("push", "status", "output"): rcic_kaggle(action, folder=folder)
    said = "".join(capfd.readouterr())
    assert "Kernel version 3 successfully pushed" in said and "RUNNING" in said and "does not resolve" not in said
    assert "Authorization" not in said  # which it prints when VERBOSE is set
    assert (folder / "output" / "submission.csv").read_text() == "id_code,sirna\n"
    (_, headers, sent), *others = kaggle_server.asked
    assert headers["Authorization"].startswith("Basic ")  # the client did have the key
    meta = json.loads((folder / "kernel-metadata.json").read_text())
    assert [m for m, _, _ in kaggle_server.asked] == ["SaveKernel", "GetKernelSessionStatus", "ListKernelSessionOutput"]
    assert all((r["userName"], r["kernelSlug"]) == ("ada", "rcic-domain-batches") for _, _, r in others)
    expected = dict(slug=meta["id"], newTitle=meta["title"], language="python", kernelType="notebook", isPrivate=True,
                    enableGpu=True, enableInternet=False,
                    datasetDataSources=["ada/backbones"],
                    competitionDataSources=["recursion-cellular-image-classification"], machineShape="NvidiaTeslaT4")
    assert {k: sent.get(k) for k in expected} == expected
    notebook = json.loads((folder / "kernel.ipynb").read_text())
    assert [c["source"] for c in json.loads(sent["text"])["cells"]] == [c["source"] for c in notebook["cells"]]
    assert "VALID = 'fold=0/3'" in sent["text"]
    assert pack_wheels([installed_wheel("rcic_fastai", tmp_path)])[:1000] in (
        folder / "kernel.ipynb").read_text().replace("\\n", "\n")
    pair = headers["Authorization"].removeprefix("Basic ")
    for text in (said, *(p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file())):
        assert KEY not in text and pair not in text


@pytest.mark.slow
def test_errors_of_the_client_are_errors(kaggle_server, tmp_path, monkeypatch):
    "Also where its exit status is 0; what a server repeats of the credentials is taken out"
    build_kernel(tmp_path, user="ada", title="Refused", lacking=())
    with pytest.raises(ValueError) as e: run_client("kernels", "push", "-p", tmp_path)
    assert "no SaveKernel; you sent Basic *** and ***" in str(e.value) and KEY not in str(e.value)
    kaggle_server.answers["SaveKernel"] = dict(error="Maximum batch GPU session count of 2 reached.")
    with pytest.raises(ValueError, match="Kernel push error: Maximum batch GPU session count"):
        run_client("kernels", "push", "-p", tmp_path)
    kaggle_server.answers["SaveKernel"] = dict(versionNumber=1, url="https://www.kaggle.com/x",
                                               invalidDatasetSources=["ada/gone"])
    with pytest.raises(ValueError, match="not valid dataset sources .*ada/gone"):
        run_client("kernels", "push", "-p", tmp_path)
    monkeypatch.delenv("KAGGLE_KEY")
    with pytest.raises(ValueError, match="does not know who asks"): run_client("kernels", "status", "ada/refused")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install kaggle"): run_client("kernels", "status", "ada/refused")


@pytest.mark.parametrize("code", ["", ".", "./", 3])
def test_a_code_file_without_a_name(tmp_path, code):
    from rcic_fastai.kaggle.core import read_kernel

    (tmp_path / "kernel-metadata.json").write_text(json.dumps(dict(id="ada/x", code_file=code)))
    with pytest.raises(ValueError, match="code_file is .*, expected the name of a notebook in the same folder"):
        read_kernel(tmp_path)
