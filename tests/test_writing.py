"Nothing lost: one function writes, links and devices are left alone, a full disk leaves what was there."
import ast
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from cases import each
import torch
from PIL import Image
from safetensors.torch import save_file

from rcic_fastai.cli import core as cli, labels as hpa_cli
from rcic_fastai.kaggle import core as kaggle
from rcic_fastai.run.blend import blend_runs
from rcic_fastai.run.train import train_run
from rcic_fastai.files import FolderClaimed, claim_folder, is_marked, write_picture, write_whole
from rcic_fastai.screen.describe import describe_screen
from rcic_fastai.train.checkpoint import remove_checkpoints
from rcic_fastai.run.predict import predict_run
from rcic_fastai.recipe.check import recipe_to_json
from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe
from rcic_fastai.screen.read import read_screen
from rcic_fastai.cli.script import CliError

PACKAGE = Path(__file__).parents[1] / "rcic_fastai"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if not p.stem.startswith("_"))
WRITES = {"write_bytes", "write_text", "copyfile", "copytree", "save_file", "savez", "savez_compressed", "savefig",
          "savetxt",
          "write_table", "write_h5ad", "to_parquet", "to_pickle", "mkstemp"}
ALLOWED = {  # beside what `write_whole` itself calls
    ("files", "write_whole"),  # it is the one
    ("report.html", "figure"), ("run.stack", "_statistics"),  # into memory
    # given to `write_whole`
    ("predict.core", "_save_arrays"), ("data.pack", "_write_parts"), ("kaggle.download", "_copy_member"),
    ("data.pack", "_pack_zarr"),  # zarr writes its shards itself; here they are forced to the disk
    ("kaggle.download", "_load"), ("kaggle.download", "fetch_file"),  # a download is appended to until it is complete
    # a module that runs alone; into a temporary folder, into memory
    ("kaggle.packages", "installed_wheel"), ("kaggle.packages", "pack_wheels"),
    ("kaggle.core", "copy_run"),  # a folder that is renamed as a whole
    ("train.checkpoint", "save_checkpoint"),  # torch.save into memory
}


def name_of(module):
    return ".".join(module.relative_to(PACKAGE).with_suffix("").parts)


def writes(module):
    "Function and name of each call in a module that writes a file without `write_whole`"

    def name(call): return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")

    def look(node, function):
        if isinstance(node, ast.FunctionDef): function = node.name
        if isinstance(node, ast.Call):
            called, owner = name(node), getattr(getattr(node.func, "value", None), "id", None)
            if called == "write_whole": return
            text = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)
                    and isinstance(a.value, str)]
            if called == "open" and any(set(t) & set("wax+") and set(t) <= set("rwabtx+U") for t in text):
                yield function, "open"
            if called == "ZipFile" and any(t in "wax" for t in text): yield function, "ZipFile"
            if called in ("replace", "rename", "link", "symlink") and owner == "os": yield function, f"os.{called}"
            if called in ("rename", "symlink_to", "hardlink_to", "touch") and owner != "os" and not node.keywords:
                yield function, called
            if called == "to_csv" and node.args: yield function, called
            if called == "save" and owner in ("torch", "np", "image", "nbformat"): yield function, called
            if called in WRITES or owner == "shutil" and called in ("copy", "copy2", "move"): yield function, called
            if called == "rmtree": yield function, called
        for child in ast.iter_child_nodes(node): yield from look(child, function)

    return list(look(ast.parse(module.read_text(encoding="utf-8")), ""))


@each("module", MODULES, ids=lambda p: name_of(p))
def test_one_function_writes(module):
    found = [(f, what) for f, what in writes(module) if (name_of(module), f) not in ALLOWED]
    assert not found, f"{module.name} writes or removes without `write_whole`: {found}"


def test_what_the_rule_looks_for(tmp_path):
    (tmp_path / "m.py").write_text("import os\ndef f(p):\n    open(p, 'wb')\n    os.replace(p, p)\n"
                                   "    p.write_text('')\n    t.to_csv(p)\n    t.to_csv()\n"
                                   "    write_whole(p, lambda q: t.to_csv(q))\n    open(p, 'rb')\n"
                                   "    s.replace('a', 'b')\n")
    assert [what for _, what in writes(tmp_path / "m.py")] == ["open", "os.replace", "write_text", "to_csv"]


def cannot(path):
    Path(path).write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_what_was_there(tmp_path):
    write_whole(tmp_path / "a.txt", "before")
    with pytest.raises(OSError, match="No space left"): write_whole(tmp_path / "a.txt", cannot)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "before")]


def too_large(path): raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
def too_large_copy(path): raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), "source", None, str(path))
def no_encoder(path): raise OSError("encoder error -2 when writing image file")


@each("fault, message", [(too_large, r"\[Errno 27\] .*a.txt'$"), (too_large_copy, r"\[Errno 27\] .*a.txt'$"),
                         (cannot, r".*No space left on device: '.*a.txt'$"),
                         (no_encoder, "a.txt cannot be written: encoder")])
def test_a_failed_write_names_the_file(tmp_path, fault, message):
    with pytest.raises(OSError, match=message) as e: write_whole(tmp_path / "a.txt", fault)
    assert "None" not in str(e.value) and "rcic-part" not in str(e.value)


@pytest.mark.skipif(os.name != "posix", reason="pipes and devices of POSIX")
def test_what_is_no_file_is_left_alone(tmp_path):
    (tmp_path / "there.txt").write_text("before")
    (tmp_path / "link.txt").symlink_to("there.txt")
    (tmp_path / "dangling.txt").symlink_to("nowhere.txt")
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    before = {p.name: p.lstat().st_mode for p in tmp_path.iterdir()}
    for path, what in [*((tmp_path / f"{n}.txt", w) for n, w in dict(link="a link", dangling="a link",
                                                                     folder="a folder", pipe="a pipe").items()),
                       (Path("/dev/null"), "a device")]:
        with pytest.raises(ValueError, match=f"{path.name} is {what}"): write_whole(path, "new")
    assert {p.name: p.lstat().st_mode for p in tmp_path.iterdir()} == before
    assert (tmp_path / "there.txt").read_text() == "before"
    assert Path("/dev/null").is_char_device()


# Outputs that are inputs, and folders of somebody else

def tree(*folders):
    return {p: p.read_bytes() for f in folders for p in sorted(Path(f).rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def mine(small_screen, small_run, tmp_path_factory):
    "Copies of a screen and of a run, a notebook, a plate map: what a user would not want to lose"
    root = tmp_path_factory.mktemp("mine")
    shutil.copytree(small_screen, root / "screen")
    shutil.copytree(small_run, root / "run")
    (root / "parts" / "HUVEC").mkdir(parents=True)
    shutil.copy(root / "run" / "model.safetensors", root / "parts" / "HUVEC")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Mine", id="a")]),
                   root / "mine.ipynb")
    (root / "weights").mkdir()
    (root / "weights" / "dataset-metadata.json").write_text('{"id": "ada/others"}')
    (root / "data").mkdir()
    (root / "net").mkdir()
    save_file(dict(x=torch.zeros(1)), root / "net" / "model.safetensors")
    (root / "data" / "photo.jpg").write_bytes(b"a photo")
    return root


COMMANDS = {  # what it would have written over, and the message
    "show over an image": (lambda r: cli.rcic_show(data=r / "screen",
                                                   out=next((r / "screen" / "train").rglob("*_w3.png"))), "belongs to"),
    "find-lr over an image": (lambda r: cli.rcic_find_lr(data=r / "screen",
                                                         out=next((r / "screen" / "train").rglob("*_w3.png"))),
                              "belongs to"),
    "submit over the sample": (lambda r: cli.rcic_submit(run=r / "run", data=r / "screen",
                                                         out=r / "screen" / "sample_submission.csv"),
                               "is what is read"),
    "submit over the truth": (lambda r: cli.rcic_submit(run=r / "run", data=r / "screen",
                                                        out=r / "screen" / "truth.csv"), "is what is read"),
    "submit over predictions": (lambda r: cli.rcic_submit(run=r / "run", data=r / "screen",
                                                          out=r / "run" / "predictions" / "test.npz"),
                                "is what is read"),
    "submit over the screen": (lambda r: cli.rcic_submit(run=r / "run", data=r / "screen", out=r / "screen"),
                               "is what is read"),
    "submit over the history": (lambda r: cli.rcic_submit(run=r / "run", data=r / "screen",
                                                          out=r / "run" / "history.csv"),
                                "history.csv is no submission"),
    "submit over the simulation": (lambda r: cli.rcic_submit(run=r / "run", data=r / "screen",
                                                             out=r / "screen" / "simulation.json"),
                                   "is no submission|is what is read|belongs to"),
    "submit over a photo": (lambda r: cli.rcic_submit(run=r / "run", data=r / "screen", out=r / "data" / "photo.jpg"),
                            "photo.jpg is no submission"),
    "embed over predictions": (lambda r: cli.rcic_embed(run=r / "run", data=r / "screen",
                                                        out=r / "run" / "predictions" / "test.npz"), "is what is read"),
    "pack into the screen": (lambda r: cli.rcic_pack(data=r / "screen", out=r / "screen"), "is what is read"),
    "pack around the screen": (lambda r: cli.rcic_pack(data=r / "screen", out=r), "which is read"),
    "pack into a run": (lambda r: cli.rcic_pack(data=r / "screen", out=r / "run"), "is not empty"),
    "train into the screen": (lambda r: cli.rcic_train(data=r / "screen", run=r / "screen"), "is what is read"),
    "train into its own start": (lambda r: cli.rcic_train(data=r / "screen", run=r / "run", start=r / "run"),
                                 "is what is read"),
    "train over its recipe": (lambda r: cli.rcic_train(data=r / "screen", run=r / "data",
                                                       recipe=str(r / "data" / "recipe.json")), "is what is read"),
    "train over a network": (lambda r: cli.rcic_train(data=r / "screen", run=r / "net", laptop=1),
                             "net holds model.safetensors, and no training"),
    "simulate over a run": (lambda r: cli.rcic_simulate(out=r / "run"), "no simulated screen"),
    "simulate over photos": (lambda r: cli.rcic_simulate(out=r / "data"), "holds photo.jpg.*, and no simulated screen"),
    "simulate an atlas over a screen": (lambda r: hpa_cli.rcic_hpa_simulate(out=r / "screen"), "other settings"),
    "blend over a run": (lambda r: blend_runs([r / "run", r / "parts" / ".." / "run2"], read_screen(r / "screen"),
                                              r / "run"), "is what is read"),
    "report over its template": (lambda r: cli.rcic_report(r / "run", data=r / "screen", template=r / "mine.ipynb",
                                                           out=r / "mine.html"),
                                 "the executed notebook .*mine.ipynb is what is read"),
    "report over a notebook": (lambda r: cli.rcic_report(r / "run", data=r / "screen", out=r / "mine.html"),
                               "not written by a report"),
    "weights over the run": (lambda r: kaggle.build_kernel(r, "infer", run=r / "run", user="ada"),
                             "holds .*run, which is read"),
    "weights into the run": (lambda r: kaggle.weights_folder(r / "run", r / "run", "ada", "My weights"),
                             "is what is read"),
    "weights over a data set": (lambda r: kaggle.weights_folder(r / "run", r / "weights", "ada", "My weights"),
                                "holds the dataset ada/others"),
    "a kernel among photos": (lambda r: kaggle.build_kernel(r / "data", user="ada", lacking=()), "no kernel"),
}


@pytest.mark.slow
@each("name", COMMANDS)
def test_what_is_read_stays(mine, name):
    command, message = COMMANDS[name]
    if name == "train over its recipe": (mine / "data" / "recipe.json").write_text(recipe_to_json(get_recipe("laptop")))
    before = tree(mine)
    with pytest.raises((CliError, ValueError, FileExistsError), match=message): command(mine)
    assert tree(mine) == before


@each("name", ["best.safetensors", "history.csv", "submission.csv", "predictions/test.npz", "recipe.json"])
def test_a_run_is_not_written_among_files_of_others(small_screen, tmp_path, name):
    (tmp_path / "run" / name).parent.mkdir(parents=True)
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(CliError, match=f"run holds {name}, and no training that was begun"):
        cli.rcic_train(data=small_screen, run=tmp_path / "run", laptop=1)
    assert [p.read_text() for p in (tmp_path / "run").rglob("*") if p.is_file()] == ["mine"]


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_goes_on(small_screen, tmp_path, monkeypatch):
    "It is known by begun.json, which is gone at the end"
    screen, recipe, quiet = (read_screen(small_screen), laptop_recipe(get_recipe("laptop"), 1, virtual_batch=16),
                             dict(say=lambda *a: None))
    with monkeypatch.context() as m:
        m.setattr("rcic_fastai.run.stages.fit_stage", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): train_run(screen, recipe, tmp_path / "run", **quiet)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["begun.json"]
    (tmp_path / "run" / "history.csv").write_text("of its first epoch")
    train_run(screen, recipe, tmp_path / "run", **quiet)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"history.csv", "recipe.json", "run.json",
                                                              "model.safetensors"}


def test_a_blend_is_written_to_a_folder_of_its_own(mine, tmp_path):
    "Neither over a run with a network per cell type, nor over another blend; the same blend again is welcome"
    shutil.copytree(mine / "run", tmp_path / "second")
    screen, runs = read_screen(mine / "screen"), [mine / "run", tmp_path / "second"]
    with pytest.raises(FileExistsError, match="holds HUVEC, and no blend"): blend_runs(runs, screen, mine / "parts")
    for _ in range(2): blend_runs(runs, screen, tmp_path / "blend")
    before = tree(tmp_path / "blend")
    with pytest.raises(ValueError, match="holds a blend with other settings .space is probability there, logit now"):
        blend_runs(runs, screen, tmp_path / "blend", space="logit")
    assert tree(tmp_path / "blend") == before


def simulate_own_screen(folder):
    root = folder / "images"
    root.mkdir()
    for well in ("A01", "A02"):
        for c in ("w1", "w2"):
            Image.fromarray(np.full((16, 16), ord(well[-1]), np.uint8)).save(root / f"{well}_s1_{c}.tif")
    (folder / "wells.csv").write_text("well,treatment\nA01,a\nA02,b\n")
    return root


def test_a_plate_map_of_the_same_name_stays(tmp_path):
    "The copy gets a free name, which screen.json names; described again, it is the same one"
    root = simulate_own_screen(tmp_path)
    (root / "wells.csv").write_text("another,table\n1,2\n")
    for _ in range(2):
        screen = describe_screen(root, tmp_path / "wells.csv", say=lambda *a: None)
        assert (root / "wells.csv").read_text() == "another,table\n1,2\n"
        assert json.loads((root / "screen.json").read_text())["table"] == "wells-2.csv"
    assert len(screen.wells) and sorted(p.name for p in root.glob("*.csv")) == ["wells-2.csv", "wells.csv"]


def test_only_what_is_ours_is_removed(small_screen, tmp_path):
    "A folder `checkpoints` with files of the user's, hidden files, a folder `parts` within a store"
    recipe = change_recipe(laptop_recipe(get_recipe("laptop"), 1, virtual_batch=16), "checkpoint.every_steps=2")
    theirs = [tmp_path / "run" / n for n in ("checkpoints/best.pt", "checkpoints/.notes", ".gitignore",
                                             ".run.json.1234", "model.txt")]
    ours = [tmp_path / "run" / n for n in ("checkpoints/.00000001-0123456789abcdef.2147483646.rcic-part.pt",
                                           ".run.2147483646.rcic-part.json")]
    for p in theirs + ours:
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text("mine")
    train_run(read_screen(small_screen), recipe, tmp_path / "run", say=lambda *a: None)
    assert all(p.read_text() == "mine" for p in theirs) and not any(p.exists() for p in ours)
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [".notes", "best.pt"]


# Folders inside a folder of ours that are links to elsewhere

def remove_while_held(run, data):
    "As `finished_run` does"
    with claim_folder(run): remove_checkpoints(run / "checkpoints")


THROUGH_LINKS = {  # the link inside the run, and the command that would follow it
    "predict": ("predictions", lambda run, data: cli.rcic_predict(run=run, data=data)),
    "embed": ("embeddings", lambda run, data: cli.rcic_embed(run=run, data=data)),
    "train, finished": ("checkpoints", remove_while_held),
    "train, begun": ("checkpoints", lambda run, data: cli.rcic_train(data=data, run=run, laptop=1)),
    "train, predictions": ("predictions", lambda run, data: cli.rcic_train(data=data, run=run, laptop=1)),
    "simulate": ("train", lambda run, data: cli.rcic_simulate(out=run, sirnas=4, train_experiments=1,
                                                              test_experiments=0, cell_types="HUVEC", image_size=16,
                                                              workers=2)),
    "weights": ("predictions", lambda run, data: kaggle.weights_folder(run.with_name("run"), run, "ada", "My weights")),
}


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="links need rights on Windows")
@each("name", THROUGH_LINKS)
def test_no_folder_inside_a_folder_of_ours_leads_out_of_it(mine, tmp_path, name):
    "Neither written nor deleted: what lies behind the link stays as it is"
    inside, command = THROUGH_LINKS[name]
    run, victim = tmp_path / "theirs", tmp_path / "victim"
    victim.mkdir()
    for f in ("test.npz", "valid.npz", "run.json", "00000001-0123456789abcdef.pt", ".a.2147483646.rcic-part.pt",
              "model.safetensors"):
        (victim / f).write_text("mine")
    if name == "embed": (victim / "test.npz").unlink()
    if name.startswith(("predict", "embed")): shutil.copytree(mine / "run", run)
    else: run.mkdir()
    if name == "weights":
        shutil.copytree(mine / "run", tmp_path / "run")
        (run / "dataset-metadata.json").write_text(json.dumps(dict(id="ada/my-weights")))
        (run / "run.json").write_text(json.dumps(dict(parts=["predictions"])))
    if name == "train, begun": (run / "begun.json").write_text(json.dumps(dict(recipe={}, asked={})))
    if name == "simulate":
        command(run, None)
        shutil.rmtree(run / "train")
    shutil.rmtree(run / inside, ignore_errors=True)
    (run / inside).symlink_to(victim)
    before = tree(victim)
    with pytest.raises((CliError, ValueError),
                       match=f"{inside} is a link to .*victim, and nothing is written or deleted through a link"):
        command(run, mine / "screen")
    assert tree(victim) == before and not [p for p in victim.iterdir() if p.name.startswith(".rcic")]


# Files of others under a name that is asked for; ours may be made again

OVER = {  # file, the command that would replace it, and what it is not
    "report": ("mine.html", lambda r, out: cli.rcic_report(r / "run", data=r / "screen", out=out), "a report"),
    "show": ("mine.png", lambda r, out: cli.rcic_show(data=r / "screen", out=out), "a picture"),
    "show, pdf": ("mine.pdf", lambda r, out: cli.rcic_show(data=r / "screen", out=out), "a picture"),
    "show, jpg": ("mine.jpg", lambda r, out: cli.rcic_show(data=r / "screen", out=out), "a picture"),
    "find-lr": ("mine.png", lambda r, out: cli.rcic_find_lr(data=r / "screen", out=out, laptop=1, steps=20),
                "a picture"),
    "embed": ("mine.npz", lambda r, out: cli.rcic_embed(run=r / "run", data=r / "screen", out=out),
              "a file of embeddings"),
}


@pytest.mark.slow
@each("name", OVER)
def test_a_file_of_others_is_not_replaced(mine, tmp_path, name):
    "It is told before the work; what the same command has written before is replaced"
    file, command, what = OVER[name]
    out, before = tmp_path / file, tree(mine)
    if file.endswith(".npz"): np.savez(out, x=np.zeros(3))
    elif file.endswith(("png", "jpg")): Image.fromarray(np.zeros((9, 9), np.uint8)).save(out)
    else: out.write_text("<html>rcic_fastai is what I write about</html>")
    theirs = out.read_bytes()
    with pytest.raises(CliError,
                       match=f"{file} exists, and is not {what} that rcic_fastai has written: delete it, or give "
                       "another name"):
        command(mine, out)
    assert out.read_bytes() == theirs and tree(mine) == before
    if name in ("report", "find-lr", "show, jpg"): return  # the first two take a while, and a JPEG has no mark
    out.write_bytes(b"")
    for _ in range(2): command(mine, out)
    assert out.stat().st_size


def test_marks_of_pictures(tmp_path):
    import matplotlib.pyplot as plt

    fig = plt.figure()
    for kind in ("png", "pdf", "svg", "eps", "ps"):
        write_picture(fig, tmp_path / f"x.{kind}")
        assert is_marked(write_picture(fig, tmp_path / f"x.{kind}"))
        fig.savefig(tmp_path / f"theirs.{kind}")
        with pytest.raises(FileExistsError, match="delete it"): write_picture(fig, tmp_path / f"theirs.{kind}")
    plt.close(fig)


def test_a_submission_of_other_wells_is_not_replaced(mine, tmp_path):
    screen, run, out = read_screen(mine / "screen"), mine / "run", tmp_path / "mine.csv"
    out.write_text("id_code,sirna\nHUVEC-99_1_B02,3\n")
    with pytest.raises(CliError, match="mine.csv has other ids than .*sample_submission.csv"):
        cli.rcic_submit(run=run, data=screen.path, out=out)
    assert "HUVEC-99" in out.read_text()
    out.unlink()
    for _ in range(2): cli.rcic_submit(run=run, data=screen.path, out=out)


def test_a_begun_json_of_others_stays(small_screen, tmp_path):
    for text in ('{"mine": 1}', "[1]", '"recipe asked"'):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "begun.json").write_text(text)
        with pytest.raises(CliError, match="begun.json is not of a training that was begun"):
            cli.rcic_train(data=small_screen, run=tmp_path / "run", laptop=1)
        assert (tmp_path / "run" / "begun.json").read_text() == text


@pytest.mark.slow
def test_the_metadata_of_another_kernel_stays(tmp_path):
    "Of another address, or of a kernel whose notebook is somebody else's; the same kernel may be built again"
    def build(title="Train something"):
        return kaggle.build_kernel(tmp_path / "kernel", user="ada", title=title, lacking=())
    path = tmp_path / "kernel" / "kernel-metadata.json"
    path.parent.mkdir()
    for there, message in ((dict(id="ada/other", code_file="x.py"), "is of the kernel ada/other, not "
                            "ada/train-something"), (dict(id="ada/train-something", code_file="x.py"),
                                                     "is not of a kernel that rcic_fastai has written")):
        path.write_text(json.dumps(there))
        with pytest.raises(FileExistsError, match=message): build()
        assert json.loads(path.read_text()) == there
    path.unlink()
    for _ in range(2): build()
    with pytest.raises(FileExistsError, match="is of the kernel ada/train-something, not ada/another-one"):
        build("Another one")


# Killed, and two at once

@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system does not have")
@pytest.mark.timeout(400)
def test_killed_commands_end_with_the_same_files_and_folders_have_one_holder(tmp_path):
    done = subprocess.run([sys.executable, Path(__file__).with_name("kill_commands.py"), tmp_path], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, moments in dict(simulate=3, train=4, embed=1, report=1, stack=3).items():
        assert found[name] == dict(ends=[-9] * moments, last=[0, ""], differ=[]), name
    assert found["orphans"] == ""
    for name in ("simulate", "pack", "train"):
        (won, _), (told, said) = found[f"two at once: {name}"]
        assert (won, told) == (0, 1) and "is in use by kill_commands.py (process " in said, name
    assert found["simulated"] == []


@pytest.mark.bench
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, which this system does not have")
@pytest.mark.timeout(3600)
def test_killed_at_any_moment(tmp_path):
    """Each moment by itself, and pages of the library's template: the table is shown with `pytest -m bench -s -k
    any_moment`"""
    done = subprocess.run([sys.executable, Path(__file__).with_name("kill_commands.py"), tmp_path, "all"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = pd.DataFrame(json.loads(done.stdout.splitlines()[-1]))
    print(rows.to_string())
    assert (rows.end == -9).all() and (rows["last"].str[0] == 0).all() and not rows.differ.str.len().any()
    assert dict(rows.command.value_counts()) == dict(train=13, stack=11, simulate=8, report=7, embed=5)


@pytest.mark.slow
def test_predictions_and_descriptions_have_one_holder(small_screen, small_run, tmp_path):
    """A second process is told who holds the run, or the folder that is described; the holder itself goes on, and
    files elsewhere need no claim"""
    run, root = shutil.copytree(small_run, tmp_path / "run"), simulate_own_screen(tmp_path)
    screen = read_screen(small_screen)
    with claim_folder(run):
        predict_run(run, screen, "test", progress=False, say=lambda *a: None)  # as rcic-train does
    hold = ("import sys\nfrom rcic_fastai.files import claim_folder\n"
            "with claim_folder(sys.argv[1]), claim_folder(sys.argv[2]):\n    print('held', flush=True)\n"
            "    sys.stdin.read()\n")
    held = subprocess.Popen([sys.executable, "-c", hold, run, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            text=True)
    assert held.stdout.readline() == "held\n"
    before = (run / "predictions" / "test.npz").read_bytes()
    try:
        for name, do in dict(predict=lambda: cli.rcic_predict(run=run, data=small_screen),
                             embed=lambda: cli.rcic_embed(run=run, data=small_screen),
                             describe=lambda: describe_screen(root, tmp_path / "wells.csv")).items():
            with pytest.raises((CliError, FolderClaimed), match=f"is in use by .*process {held.pid}"): do()
            assert name
        cli.rcic_embed(run=run, data=small_screen, out=tmp_path / "elsewhere.npz")
    finally:
        held.communicate("", timeout=60)
    assert (run / "predictions" / "test.npz").read_bytes() == before and not (root / "screen.json").exists()
    cli.rcic_predict(run=run, data=small_screen)
    describe_screen(root, tmp_path / "wells.csv", say=lambda *a: None)
    assert not [p for p in [*run.rglob(".*"), *root.rglob(".*")]]
