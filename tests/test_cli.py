"The commands as a person runs them: help, the road from files to score, and errors of one line."

import configparser
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rcic_fastai.cli import core as cli
from rcic_fastai.cli.script import CliError, run_cli

ROOT = Path(__file__).parents[1]
config = configparser.ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini")
scripts = dict(line.split("=") for line in config["DEFAULT"]["console_scripts"].split())
COMMANDS = [name for name in scripts if name.startswith("rcic-")]


def run(*args, ok=True):
    "Run an installed command; with `ok` it must succeed."
    command = [str(Path(sys.executable).parent / args[0]), *map(str, args[1:])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"}, timeout=500)
    assert not ok or done.returncode == 0, done.stderr
    return done


def in_process(monkeypatch, capsys, name, *args):
    "The same without a new interpreter; returns exit status, stdout and stderr."
    module, _, function = scripts[name].partition(":")
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    status, message = 0, ""
    try:
        run_cli(getattr(importlib.import_module(module), function).__wrapped__)
    except SystemExit as e:
        # Python prints a text and exits with 1
        status, message = (1, f"{e.code}\n") if isinstance(e.code, str) else (e.code or 0, "")
    out = capsys.readouterr()
    return status, out.out, out.err + message


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, monkeypatch, capsys):
    status, out, _ = in_process(monkeypatch, capsys, name, "--help")
    assert status == 0 and "usage:" in out and "--debug" in out
    for line in out.splitlines():  # every option is explained
        if line.startswith("  --"):
            assert len(line.split("  ", 2)) > 2 or out.splitlines()[out.splitlines().index(line) + 1].startswith(
                "      ")


@pytest.mark.parametrize("name", [c for c in COMMANDS if c != "rcic-demo"])
def test_what_is_required_is_said(name, monkeypatch, capsys):
    status, _, err = in_process(monkeypatch, capsys, name)
    assert status == 2 and "the following arguments are required" in err


@pytest.mark.slow
def test_installed_command_fails_in_one_line(tmp_path):
    "As a process: exit status 1, one line on standard error, no traceback; the traceback with --debug."
    done = run("rcic-simulate", "--out", tmp_path / "none", "--sirnas", 2, ok=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("rcic-simulate: error: ")
    assert "4 to 1,108" in done.stderr
    debug = run("rcic-simulate", "--out", tmp_path / "none", "--sirnas", 2, "--debug", ok=False)
    assert debug.returncode != 0 and "Traceback" in debug.stderr


def test_help_is_said_at_once():
    "Nothing heavy is imported before a command knows what it shall do."
    code = ("import sys, rcic_fastai.cli.core, rcic_fastai.cli.labels, rcic_fastai.cli.kaggle; print([m for m in "
            "('torch', 'fastai', 'pandas', 'numpy') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_head_may_stop_reading():
    code = (f"'{sys.executable}' -c \"from rcic_fastai.cli.core import _say; [_say('x' * 1000) for _ in "
            f"range(10000)]\" | head -1; exit ${{PIPESTATUS[0]}}")
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.returncode == 141 and done.stderr == "" and done.stdout.count("\n") == 1


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda name, *args: in_process(monkeypatch, capsys, name, *args)


def test_outputs_that_cannot_be_are_refused_before_the_work(command, small_screen, tmp_path):
    """A picture of no kind, a file in the place of a folder, a link that leads nowhere: one sentence that names the
    option, and nothing is written"""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(p.name for p in tmp_path.iterdir())
    for name in ("rcic-show", "rcic-find-lr"):
        status, _, err = command(name, "--data", small_screen, "--out", tmp_path / "x.csv")
        assert status == 1 and "--out" in err and "x.csv is no kind of picture" in err and ".png" in err
        status, _, err = command(name, "--data", small_screen, "--out", tmp_path)
        assert status == 1 and f"--out {tmp_path} is a folder" in err
    commands = [("rcic-simulate", "out"), ("rcic-pack", "out", "--data", small_screen),
                ("rcic-qc", "out", "--data", small_screen),
                ("rcic-train", "run", "--data", small_screen), ("rcic-demo", "out"),
                ("rcic-describe", "out", "--data", small_screen), ("rcic-kaggle", "folder", "build")]
    for name, option, *more in commands:
        for place, message in (("file", "is a file, expected a folder"), ("link", "is a link to")):
            status, _, err = command(name, *more, f"--{option}", tmp_path / place)
            assert status == 1 and f"--{option} {tmp_path / place} {message}" in err and err.count("\n") == 1, err
    assert sorted(p.name for p in tmp_path.iterdir()) == before and (tmp_path / "file").read_text() == "mine"


def test_errors_of_each_command(command, small_screen, small_run, tmp_path):
    bad = [
        (("rcic-simulate", "--out", tmp_path / "s", "--sirnas", 2000), "plates hold 4 to 1,108 treatments"),
        (("rcic-simulate", "--out", small_screen, "--sirnas", 12), "other settings"),
        (("rcic-train", "--data", tmp_path), str(tmp_path)),
        (("rcic-train", "--data", small_screen, "--recipe", "laptp"), "did you mean 'laptop'"),
        (("rcic-train", "--data", small_screen, "--set", "train.epoch=3"), "did you mean 'train.epochs'"),
        (("rcic-train", "--data", small_screen, "--valid", "plate=9", "--run", tmp_path / "r"), "plate"),
        (("rcic-train", "--data", small_screen, "--target", "dose", "--run", tmp_path / "r"), "target 'dose'"),
        (("rcic-train", "--data", small_screen, "--run", small_run), "holds a finished run"),
        (("rcic-predict", "--run", tmp_path), "is no finished run"),
        (("rcic-predict", "--run", small_run, "--batchnorm", "domian"), "batchnorm is 'domian'"),
        (("rcic-predict", "--run", small_run, "--split", "val"), "split is 'val'"),
        (("rcic-submit", "--run", tmp_path), "is no finished run"),
        (("rcic-demo", "--out", tmp_path / "d", "--set", "data.crop"), 'has no "="'),
    ]
    for args, message in bad:
        status, out, err = command(*args)
        assert status == 1 and message in err and err.count("\n") == 1, (args, err)
        assert err.startswith(f"{args[0]}: error: ") and "Traceback" not in err


@pytest.mark.slow
def test_the_road(command, small_screen, tmp_path):
    "Train, predict, submit and score a small screen, and the score is that of the file."
    data, run_folder, out = small_screen, tmp_path / "run", tmp_path / "submission.csv"
    status, said, err = command("rcic-train", "--data", data, "--run", run_folder, "--valid", "experiment=HUVEC-02",
                                "--laptop", 2, "--set", 'model.arch_options={"channels": [8, 16, 24, 32]}')
    assert status == 0, err
    assert "No --recipe: resnet10t_domain_batches-laptop, 2 epochs, because: " in said
    assert "Validation, experiment=HUVEC-02: " in said
    assert f"Run folder: {run_folder}" in said
    assert "█" not in said  # no progress bar in a pipe, but a line per epoch
    assert said.count("\n             1 ") == 1
    assert command("rcic-predict", "--run", run_folder, "--tta", 2)[0] == 0
    status, said, err = command("rcic-submit", "--run", run_folder, "--out", out)
    assert status == 0 and "HUVEC-04: groups" in said, err
    sample, submission, truth = (pd.read_csv(f) for f in (data / "sample_submission.csv", out, data / "truth.csv"))
    assert list(submission.columns) == ["id_code", "sirna"] and list(submission.id_code) == list(sample.id_code)
    assert submission.sirna.is_unique  # one-to-one
    status, said, _ = command("rcic-score", "--submission", out, "--truth", data / "truth.csv")
    expected = np.mean(submission.sirna.to_numpy() == truth.set_index("id_code").sirna[submission.id_code].to_numpy())
    assert status == 0 and float(said.strip().splitlines()[-1]) == pytest.approx(expected, abs=1e-6)
    submission.iloc[1:].to_csv(out, index=False)
    status, _, err = command("rcic-score", "--submission", out, "--truth", data / "truth.csv")
    assert status == 1 and sample.id_code[0] in err


def test_pack_and_verify(small_screen, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    status, out, err = in_process(monkeypatch, capsys, "rcic-pack", "--data", small_screen, "--out", tmp_path / "s",
                                  "--preset", "fast", "--verify")
    assert status == 0, err
    assert "blosc2 fast" in out and f"sites are as they were packed, compared with {small_screen}" in out
    status, _, err = in_process(monkeypatch, capsys, "rcic-pack", "--data", small_screen, "--out", tmp_path / "s")
    assert status == 1 and "holds a finished store" in err
    status, _, err = in_process(monkeypatch, capsys, "rcic-pack", "--out", tmp_path / "t")
    assert status == 1 and "--data is missing" in err
    shard = tmp_path / "s" / "shards" / "00000.bin"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 8
    shard.write_bytes(data)
    status, out, err = in_process(monkeypatch, capsys, "rcic-pack", "--out", tmp_path / "s", "--verify")
    assert status == 1 and "is damaged: its checksum differs" in out and "error: 1 of" in err and "Traceback" not in err


def test_a_disk_without_room(small_screen, tmp_path, monkeypatch, capsys):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 0))
    status, _, err = in_process(monkeypatch, capsys, "rcic-pack", "--data", small_screen, "--out", tmp_path / "s")
    assert status == 1 and "rcic-pack: error: the store needs about " in err


def test_packing_that_is_interrupted_says_how_to_go_on(small_screen, tmp_path, monkeypatch, capsys):
    import rcic_fastai.data.pack as store

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "pack_screen", interrupted)
    status, _, err = in_process(monkeypatch, capsys, "rcic-pack", "--data", small_screen, "--out", tmp_path / "s")
    assert status == 1 and err.strip() == "rcic-pack: interrupted; run the same command to resume"
    status, _, err = in_process(monkeypatch, capsys, "rcic-pack", "--out", tmp_path / "nothing", "--verify")
    assert status == 1 and "nothing holds no finished store" in err


def test_every_option_that_is_a_number_has_limits():
    "Zero, negative, NaN and huge numbers end in one line that names the option, before any work"
    import inspect

    from rcic_fastai.cli.script import CliError

    from rcic_fastai.cli import core as cli, kaggle as kaggle_cli, labels as hpa_cli

    seen = 0
    for module in (cli, hpa_cli, kaggle_cli):
        for name in module.__all__:
            if not name.startswith("rcic_"):
                continue
            function = getattr(module, name)
            for p in inspect.signature(function).parameters.values():
                if p.annotation not in (int, float):
                    continue
                low, high = cli._limits[p.name]
                for value in (low - 1, high * 2 + 1, float("nan"), float("inf"), -float("inf"), 10**400):
                    with pytest.raises(CliError, match=f"--{p.name.replace('_', '-')} is .* expected") as e:
                        function(**{p.name: value})
                    assert len(str(e.value).splitlines()) == 1
                    seen += 1
    assert seen > 150


@pytest.mark.parametrize("address",
                         ["s3://bucket/store", "https://host/x", "memory:///x", "simplecache::s3://bucket/x"])
def test_no_output_is_an_address(command, small_screen, small_run, tmp_path, monkeypatch, address):
    "No folder `s3:` is made; the library refuses it like the commands"
    from rcic_fastai.files import check_output, claim_folder, write_whole

    monkeypatch.chdir(tmp_path)
    for name, option, *more in [("rcic-simulate", "out"), ("rcic-pack", "out", "--data", small_screen),
                                ("rcic-train", "run", "--data", small_screen), ("rcic-demo", "out"),
                                ("rcic-show", "out", "--data", small_screen),
                                ("rcic-find-lr", "out", "--data", small_screen),
                                ("rcic-embed", "out", "--run", small_run), ("rcic-submit", "out", "--run", small_run),
                                ("rcic-report", "out", small_run),
                                ("rcic-blend", "out", "--run", small_run),
                                ("rcic-qc", "out", "--data", small_screen),
                                ("rcic-explain", "out", "--run", small_run),
                                ("rcic-describe", "out", "--data", small_screen), ("rcic-kaggle", "folder", "build"),
                                ("rcic-kaggle", "to", "output"),
                                ("rcic-hpa-simulate", "out"), ("rcic-hpa-stack", "out", "--run", small_run),
                                ("rcic-hpa-duplicates", "out", "--data", small_screen),
                                ("rcic-download", "out", "--source", "rxrx1")]:
        status, _, err = command(name, *more, f"--{option}", address)
        assert (status == 1 and f"--{option} " in err
                and "is an address, and outputs are files and folders of this machine" in err
                and err.count("\n") == 1), (name, err)
    for write in (lambda p: write_whole(p, "x"), check_output, lambda p: claim_folder(p).__enter__()):
        with pytest.raises(ValueError, match="is an address, and outputs"): write(Path(address))
    assert not list(tmp_path.iterdir())


def test_messages_name_options_that_the_command_has(command, tmp_path):
    "And what only Python has is said to be so"
    for args, message in {("--images", 40): "draw 336 or more",
                          ("--test", 30): "30 images cannot hold 6 .* draw 168 or more",
                          ("--image-size", 16): "image_size is 16, expected at least 22"}.items():
        status, _, err = command("rcic-hpa-simulate", "--out", tmp_path / "a", *args)
        assert status == 1 and re.search(message, err) and "cell_radius" not in err and (
            "min_positives" not in err or "in Python a smaller min_positives" in err), err
    assert not (tmp_path / "a").exists()
    status, out, _ = command("rcic-embed", "--help")
    assert status == 0 and "--present-only" in out  # the message of a missing file names it


# What was told as unexpected, without a name, or too late


@pytest.mark.parametrize("command, message", [
    (lambda run, data, tmp: cli.rcic_predict(run=run, data=data, tta="²"), "tta is '²', expected a number of views"),
    (lambda run, data, tmp: cli.rcic_predict(run=run, data=data, split="x"),
     "split is 'x', expected one of 'test', 'train', 'valid'"),
    (lambda run, data, tmp: cli.rcic_embed(run=run, data=data, split="x", out=tmp / "x.npz"),
     "split is 'x', expected one of 'test', 'train', 'valid'"),
    (lambda run, data, tmp: cli.rcic_train(data=data, run=tmp / "run", set=["="]),
     "'=' has no name of a setting before \"=\""),
    (lambda run, data, tmp: cli.rcic_train(data=data, run=tmp / ("x" * 300)), "a name in it is longer than 255 bytes"),
    (lambda run, data, tmp: cli.rcic_train(data=Path("x/" * 3000), run=tmp / "run"), "it is longer than 4,000 bytes"),
    (lambda run, data, tmp: cli.rcic_simulate(out=tmp / "s", sirnas=1), "--sirnas is 1; 4 plates hold 4 to"),
    (lambda run, data, tmp: cli.rcic_simulate(out=tmp / "s", cell_types="HUVEC,huvec"), "--cell-types is .*each once"),
    (lambda run, data, tmp: cli.rcic_simulate(out=tmp / "s", cell_types="con"),
     "cell type 'con' cannot be the name of a file"),
])
def test_a_message_names_what_is_wrong(small_run, small_screen, tmp_path, command, message):
    with pytest.raises(CliError, match=message) as e: command(small_run, small_screen, tmp_path)
    assert "unexpected" not in str(e.value) and not any(tmp_path.iterdir())


def test_weights_whose_sum_is_infinite(small_run, small_screen, tmp_path):
    runs = [shutil.copytree(small_run, tmp_path / n) for n in "ab"]
    cli.rcic_blend(run=runs, data=small_screen, out=tmp_path / "blend", weights="1e308,1e308")
    assert json.loads((tmp_path / "blend" / "run.json").read_text())["weights"] == dict(a=0.5, b=0.5)


def test_h5ad_without_anndata_is_told_before_the_work(small_run, small_screen, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    monkeypatch.setattr("rcic_fastai.run.folder.Run.profiles", lambda *a, **k: pytest.fail("it was embedded"))
    with pytest.raises(CliError, match="x.h5ad: .h5ad needs the package anndata: pip install"):
        cli.rcic_embed(run=small_run, data=small_screen, out=tmp_path / "x.h5ad")


def test_pretrained_weights_out_of_reach(small_screen, tmp_path, monkeypatch):
    def offline(*args, **kwargs): raise OSError("first\nsecond")
    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(CliError,
                       match="model.pretrained is true, and the weights of resnet18 cannot be downloaded: .*--set "
                       "model.pretrained=FILE.*first second") as e:
        cli.rcic_train(data=small_screen, run=tmp_path / "run", set=["model.arch=resnet18", "model.pretrained=true"])
    assert "\n" not in str(e.value)


# Commands for several labels


@pytest.fixture(scope="module")
def small_atlas(tmp_path_factory):
    "An atlas whose test images are larger and brighter, and one without test images"
    from rcic_fastai.screen.simulate_atlas import simulate_hpa

    folder, size = tmp_path_factory.mktemp("atlas"), dict(n_external=0, image_size=32, workers=1, progress=False)
    simulate_hpa(folder / "atlas", 300, 100, size_shift=1.6, min_positives=4, **size)
    simulate_hpa(folder / "known", 40, 0, min_positives=1, **size)
    return folder


@pytest.mark.slow
def test_labels_from_neighbours_and_sets_that_differ(command, small_atlas, tmp_path):
    "Train, retrieve, submit; compare pixels, and the embeddings of what the run set aside"
    from rcic_fastai.labels.submission import read_label_submission

    atlas, run, near = small_atlas / "atlas", tmp_path / "run", tmp_path / "near"
    network = 'model.arch_options={"channels": [8, 16, 24, 32], "stem_width": 8}'
    settings = [w for s in ("data.batch_size=16", "inference.tta=1", "inference.thresholds=global", network)
                for w in ("--set", s)]
    train = ["rcic-train", "--data", atlas, "--recipe", "hpa_seresnext50_focal", *settings, "--laptop"]
    assert command(*train, 2, "--run", run, "--valid", "fold=0/3")[0] == 0
    status, said, err = command("rcic-hpa-neighbours", "--run", run, "--out", near)
    assert status == 0 and "test images have a neighbour" in said and "difference" in said, err
    table = pd.read_csv(near / "neighbours.csv")
    assert table["query"].nunique() == 100 and set(table.neighbour) <= set(pd.read_csv(atlas / "train.csv").Id)
    status, _, err = command("rcic-submit", "--run", near)
    assert status == 0 and len(read_label_submission(near / "submission.csv")) == 100, err

    for name, options in (("pixels", ["--data", atlas]), ("embeddings", ["--run", run])):
        status, said, err = command("rcic-hpa-adversarial", *options, "--out", tmp_path / name)
        assert status == 0 and "Training and test images can" in said, err
        weights, report = (pd.read_csv(tmp_path / name / f) for f in ("weights.csv", "report.csv"))
        assert len(weights) == (300 if name == "pixels" else 100) and weights.weight.mean() == pytest.approx(1)
        assert report.low[0] < report.auc[0] < report.high[0]
    assert pd.read_csv(tmp_path / "pixels" / "report.csv").low[0] > 0.5

    assert command(*train, 1, "--run", tmp_path / "other", "--valid", "fold=1/3")[0] == 0
    assert command(*train, 1, "--run", tmp_path / "whole", "--set", "valid=null")[0] == 0
    for words, message in [
        (["rcic-hpa-neighbours", "--run", tmp_path / "other", "--classifier", run], "of the images that .* set aside"),
        (["rcic-hpa-neighbours", "--run", tmp_path / "whole"], "set no images aside"),
        (["rcic-hpa-adversarial", "--run", tmp_path / "whole"], "leave --run out"),
        (["rcic-hpa-neighbours", "--run", run, "--neighbours", 3, "--out", near], "k is 1 there, 3 now"),
    ]:
        status, _, err = command(*words, *([] if "--out" in words else ["--out", tmp_path / "x"]))
        assert status == 1 and re.search(message, err) and err.count("\n") == 1 and "unexpected" not in err, err


@pytest.mark.slow
def test_an_atlas_that_cannot_be_compared_is_told_in_one_line(command, small_atlas, small_screen, small_run, tmp_path):
    for words, message in [
        (["rcic-hpa-adversarial", "--data", small_atlas / "known"], "has no test images"),
        (["rcic-hpa-adversarial", "--data", small_screen], "train.csv"),
        (["rcic-hpa-adversarial", "--run", tmp_path / "none"], "is no finished run"),
        (["rcic-hpa-neighbours", "--run", small_run], "train.csv"),
        (["rcic-hpa-neighbours", "--run", tmp_path / "none"], "is no finished run"),
    ]:
        status, _, err = command(*words, "--out", tmp_path / "out")
        assert status == 1 and message in err and err.count("\n") == 1 and "unexpected" not in err, err


@pytest.mark.slow
def test_a_command_in_a_new_process_finds_every_method(small_screen, tmp_path):
    "`show_well` comes by a module that nothing else imports"
    done = run("rcic-show", "--data", small_screen, "--out", tmp_path / "well.png")
    assert "Written: " in done.stdout and (tmp_path / "well.png").stat().st_size > 1000


def test_a_submission_waits_for_the_run_folder(command, small_run, small_screen, tmp_path):
    "A process that holds the folder is named; a file elsewhere needs no claim"
    folder = shutil.copytree(small_run, tmp_path / "run")
    code = (f"import sys; from rcic_fastai.files import claim_folder\n"
            f"with claim_folder({str(folder)!r}): print('held', flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as p:
        assert p.stdout.readline() == "held\n"
        status, _, err = command("rcic-submit", "--run", folder, "--data", small_screen)
        elsewhere = command("rcic-submit", "--run", folder, "--data", small_screen, "--out", tmp_path / "s.csv")
        p.stdin.close()
    assert status == 1 and f"{folder} is in use by" in err, err
    assert elsewhere[0] == 0, elsewhere[2]
