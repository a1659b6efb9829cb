"What is left out counts nowhere: in a store, in a training and its resumption, in a blend."

import json
from dataclasses import replace

import pandas as pd
import pytest
from fastai.callback.core import Callback

from rcic_fastai.cli import core as cli
from rcic_fastai.cli.kaggle import rcic_kaggle
from rcic_fastai.recipe.published import get_recipe, laptop_recipe
from rcic_fastai.run.blend import blend_runs
from rcic_fastai.run.predict import Run
from rcic_fastai.run.train import finished_run, train_run
from rcic_fastai.screen.exclude import without_sites
from rcic_fastai.screen.read import read_screen


def quiet(*args): pass


def test_a_store_remembers_what_it_was_packed_without(small_screen, tmp_path, capsys):
    screen = read_screen(small_screen)
    gone = screen.wells[(screen.wells.split == "train") & (screen.wells.well_type == "treatment")].id_code.iloc[0]
    table = tmp_path / "qc.csv"
    pd.DataFrame(dict(id_code=[gone, screen.wells.id_code.iloc[5]], site=[1, 2])).to_csv(table, index=False)
    cli.rcic_pack(data=small_screen, out=tmp_path / "packed", exclude=table, verify=True, workers=1, debug=True)
    said = capsys.readouterr().out
    assert "2 sites are left out" in said and "as they were packed" in said
    packed = read_screen(tmp_path / "packed")
    assert len(packed.left_out) == 2 and len(packed.sites()) == len(screen.sites())-2
    run = tmp_path / "run"
    asked = dict(data=tmp_path / "packed", run=run, recipe="laptop", laptop=1, debug=True)
    cli.rcic_train(**asked)  # no --present-only is asked for
    assert Run(run).info["left_out"] == list(packed.left_out)
    more = packed.sites().site_id.iloc[-1]
    both = Run(run, without_sites(packed, [more])).screen.left_out  # what a run left out, and what a screen does
    assert set(both) == {*packed.left_out, more}
    manifest = tmp_path / "packed" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"left_out": [', '"left_out": [3, '))
    with pytest.raises(ValueError, match=r"manifest\.json: left_out is \[3, .*expected a list of ids"):
        read_screen(tmp_path / "packed")


def test_another_set_of_left_out_sites_is_another_training(small_screen, tmp_path):
    screen = read_screen(small_screen)
    recipe, sites = laptop_recipe(get_recipe("laptop"), 1, virtual_batch=16), screen.sites()
    known = sites[(sites.split == "train") & (sites.well_type == "treatment")].site_id
    run = tmp_path / "run"
    train_run(screen, recipe, run, say=quiet)
    record = json.loads((run / "run.json").read_text())
    del record["request"]["asked"]["left_out"]  # of a version that knew no such thing
    (run / "run.json").write_text(json.dumps(record))
    assert finished_run(screen, recipe, run)
    for some in (known.iloc[:1], known.iloc[1:2]):
        with pytest.raises(FileExistsError, match="left_out was .* and is"):
            finished_run(without_sites(screen, some), recipe, run)
    with pytest.raises(FileExistsError, match="left_out was"):
        train_run(without_sites(screen, known.iloc[:1]), recipe, run, exist="load", say=quiet)


def test_a_training_that_was_begun_is_not_resumed_without_other_sites(small_screen, tmp_path):
    screen = read_screen(small_screen)
    recipe, sites = laptop_recipe(get_recipe("laptop"), 2, virtual_batch=16), screen.sites()
    recipe = replace(recipe, checkpoint=replace(recipe.checkpoint, every_steps=1))
    first, second = (sites[sites.split == "train"].site_id.iloc[[k]] for k in (0, 1))  # both of the same well

    class Stop(Callback):
        order = 100
        def after_epoch(self): raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_run(without_sites(screen, first), recipe, tmp_path / "run", cbs=[Stop()], say=quiet)
    with pytest.raises(ValueError, match="was started otherwise: left_out was"):
        train_run(without_sites(screen, second), recipe, tmp_path / "run", say=quiet)
    train_run(without_sites(screen, first), recipe, tmp_path / "run", say=quiet)


def test_what_one_run_left_out_counts_nowhere_in_a_blend(small_screen, tmp_path):
    screen = read_screen(small_screen)
    recipe = laptop_recipe(get_recipe("laptop"), 1, virtual_batch=16)
    w = screen.wells[(screen.wells.experiment == "HUVEC-03") & (screen.wells.well_type == "treatment")].id_code
    gone = [f"{w.iloc[0]}_1", f"{w.iloc[0]}_2", f"{w.iloc[1]}_1"]
    runs = [tmp_path / n for n in ("a", "b")]
    for run, out in zip(runs, (gone, ())):
        train_run(without_sites(screen, out), recipe, run, valid="experiment=HUVEC-03", say=quiet)
    for order in (runs, runs[::-1]):
        out = tmp_path / f"blend_{order[0].name}"
        for run in runs: Run(run).predict("valid", progress=False, say=quiet)
        report = blend_runs(order, screen, out, say=quiet)
        blend = Run(out)
        assert blend.info["left_out"] == sorted(gone) and report.known.tolist() == [len(w)-1]*3
        assert w.iloc[0] not in blend.valid_wells and len(blend.valid_wells) == len(w)-1
        assert "3 sites left out" in repr(blend) and set(blend.screen.left_out) == set(gone)
        assert not report.agreement.isna().any()  # they are no folds


def test_predictions_leave_out_sites_of_wells_to_predict(small_screen, small_run, tmp_path, capsys):
    import shutil

    run, screen = shutil.copytree(small_run, tmp_path / "run"), read_screen(small_screen)
    cli.rcic_predict(run=run, debug=True)
    before = Run(run, screen).kept("test")
    test = screen.sites(screen.wells[(screen.wells.split == "test") & (screen.wells.well_type == "treatment")])
    some, whole = test.id_code.iloc[0], test.id_code.iloc[-1]  # the second has no other site left, and stays
    pd.DataFrame(dict(id_code=[some, whole, whole], site=[1, 1, 2])).to_csv(tmp_path / "qc.csv", index=False)
    capsys.readouterr()
    cli.rcic_predict(run=run, exclude=tmp_path / "qc.csv", debug=True)
    assert "1 site is left out" in capsys.readouterr().out
    after = Run(run, screen).kept("test")
    assert set(before.ids) - set(after.ids) == {f"{some}_1"} and set(after.wells().ids) == set(before.wells().ids)
    cli.rcic_submit(run=run, out=tmp_path / "submission.csv", debug=True)
    assert "1 site left out" in capsys.readouterr().out


def test_a_kernel_is_told_what_to_leave_out(tmp_path):
    table, asked = tmp_path / "qc.csv", dict(user="ada", no_wheel=True, debug=True)
    table.write_text("id_code,site,channel,exclude\nA_1_B02,1,1,True\nA_1_B02,1,2,True\nA_1_B03,2,1,False\n")
    for name, exclude, said in (("plain", None, "{}"), ("some", table, "{'id_code': ['A_1_B02'], 'site': ['1']}")):
        rcic_kaggle("build", folder=tmp_path / name, exclude=exclude, **asked)
        cells = json.loads((tmp_path / name / "kernel.ipynb").read_text())["cells"]
        assert sum(f"\nEXCLUDE = {said}" in c["source"] for c in cells) == 1
    table.write_text("well\nB02\n")
    with pytest.raises(ValueError, match="column id_code is missing"):
        rcic_kaggle("build", folder=tmp_path / "other", exclude=table, **asked)
