"Several labels per image, from the tables to a scored submission; on real files where they are there"

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cases import each
import torch
from fastai.callback.core import Callback
from PIL import Image

from test_cli import in_process

from rcic_fastai.all import (
    TTA,
    Atlas,
    Predictions,
    Retrieval,
    atlas_folds,
    blend_runs,
    change_recipe,
    create_threshold,
    embed_sites,
    f1_floors,
    find_duplicates,
    fold_report,
    get_recipe,
    hpa_channels,
    hpa_classes,
    label_matrix,
    label_score_table,
    laptop_recipe,
    load_run,
    pack_screen,
    predict_run,
    predict_sites,
    read_hpa,
    read_label_submission,
    read_run,
    read_screen,
    read_site,
    score_label_submission,
    screen_dataloaders,
    simulate_hpa,
    stack_runs,
    submit_labels,
    train_run,
    valid_mask,
)
from rcic_fastai.data.augment import dihedral
from rcic_fastai.labels.threshold import read_thresholds, threshold_methods
from rcic_fastai.model.core import load_weights
from rcic_fastai.screen.duplicates import external_keys, hash_distance, image_hashes
from rcic_fastai.screen.folds import straddling_groups
from rcic_fastai.screen.labels import label_lists
from rcic_fastai.screen.planes import read_channel, resize_site
from rcic_fastai.screen.sites import check_files, present_sites
from rcic_fastai.train.network import recipe_model
from rcic_fastai.screen.atlas import _image_table

HPA = Path(__file__).parents[1].parent / "shared" / "hpa"
real = pytest.mark.skipif(not (HPA / "train.csv").is_file(),
                          reason="the real tables of the Human Protein Atlas are not beside this checkout (shared/hpa)")
FIELD = "30741_800_A6_1"
COUNTS = [12885, 1254, 3621, 1561, 1858, 2513, 1008, 2822, 53, 45, 28, 1093, 688, 537, 1066, 21, 530, 210, 902, 1482,
          172, 3777, 802, 2965, 322, 8228, 328, 11]
DESIGN = dict(n_images=340, n_test=168, n_external=60, image_size=32, external_sizes=(32, 48), seed=3, workers=1,
              progress=False)
TINY = ("head.epochs=0", "train.epochs=1", "finetune.epochs=0", "inference.tta=1", "data.read_size=32", "data.size=32",
        "data.cache=false")


def quiet(*args):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = simulate_hpa(tmp_path_factory.mktemp("hpa") / "atlas", **DESIGN)
    find_duplicates(read_hpa(path), progress=False, say=quiet)
    return path


@pytest.fixture(scope="module")
def atlas(folder):
    return read_hpa(folder)


def tiny(*settings, name="hpa_seresnext50_focal"):
    return change_recipe(laptop_recipe(get_recipe(name), 3), *TINY, *settings)


@pytest.fixture(scope="module")
def run(atlas, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "focal"
    train_run(atlas, tiny(), path, say=quiet)
    for split in ("valid", "test"):
        predict_run(path, atlas, split, progress=False)
    return path


# The real tables and the real field


@pytest.mark.slow
@real
def test_real_tables():
    atlas = read_hpa(HPA, external=True)
    train = atlas.wells[atlas.wells.experiment == "kaggle"]
    y = atlas.labels(train)
    assert (len(train), int(y.sum()), y.sum(0).tolist()) == (31072, 50782, COUNTS)
    assert f1_floors(y).round(4).tolist() == [0.0996, 0.0209, 0.0359]
    assert len(atlas.wells) == 31072 + 74606 and atlas.wells.labels.notna().all()
    one_set = atlas.wells.dropna(subset="antibody").groupby("antibody").labels.nunique()
    assert (one_set == 1).all(), "an antibody with two label sets"
    folds = atlas_folds(atlas.wells)
    report = fold_report(atlas.labels(), folds, hpa_classes, atlas.wells.group)
    assert report.attrs["straddling"] == 0 and not straddling_groups(atlas.wells.antibody, folds)
    assert not straddling_groups(external_keys(atlas.wells.id_code).plate_well, folds)
    assert report.spread.max() < 0.15 and not report["empty"].any()


@pytest.mark.slow
@real
def test_real_field_at_full_brightness():
    field = str(HPA / (FIELD + "_{channel}.jpg"))
    x = read_site(field, hpa_channels)
    assert x.shape == (4, 2048, 2048)
    for color, own, least, most in ((2, "blue", 0.10, 0.14), (0, "red", 0.30, 0.34)):
        luma = np.asarray(Image.open(field.format(channel=own)).convert("L"))
        assert least < luma.mean() / x[color].mean() < most, "what a luma conversion keeps"
    rgb = np.asarray(Image.open(field.format(channel="yellow")))
    assert np.abs(x[3].astype(int) - rgb[..., 0]).max() <= 130 and abs(x[3].mean() - rgb[..., :2].mean()) < 0.3
    small = resize_site(x, 512)
    assert hash_distance(image_hashes(x), image_hashes(small)).max() <= 2
    for k in range(8):
        turned = dihedral(torch.from_numpy(small), k).numpy()
        assert (image_hashes(turned, canonical=True) == image_hashes(small, canonical=True)).all()


@pytest.mark.slow
@real
def test_real_field_is_predicted_in_patches(run):
    "The network of simulated images takes windows of a real one: what counts is that the road is open"
    sites = _image_table([FIELD], "external", "test").assign(site_id=FIELD + "_1", site=1,
                                                             files=str(HPA / (FIELD + "_{channel}.jpg")))
    recipe, info = read_run(run)
    learn = load_run(run, pd.concat([sites]))
    group = TTA(d4=8, crops=4, crop_size=2 / 3, combine="max")
    p = predict_sites(learn, sites, "running", tta=group, progress=False, keep_views=True)
    assert p.views.shape == (32, 1, 28) and np.isfinite(p.logits).all()
    np.testing.assert_array_equal(p.logits, predict_sites(learn, sites, "running", tta=group, progress=False).logits)
    assert (p.probabilities >= p.combine(TTA(d4=8, crops=4, crop_size=2 / 3)).probabilities
            - 1e-6).all(), "a maximum below the mean"


# Tables


@each(
    "row, message",
    [
        ("0007adf0-bbc3-11e8-b2bc-ac1f6b6435d0,28", r"train.csv: row 3: label 28 is outside 0-27"),
        ("0007adf0-bbc3-11e8-b2bc-ac1f6b6435d0,", r"train.csv: row 3: .*no label|train.csv: row 3"),
        ("0007adf0-bbc3-11e8-b2bc-ac1f6b6435d0,x", r"train.csv: row 3"),
        ("0007adf0-bbc3-11e8-b2bc-ac1f6b6435d0,3 3", r"train.csv: row 3"),
        ("0007bdf0-bbc3-11e8-b2bc-ac1f6b6435d0,3",
         r"train.csv: row 3: Id 0007bdf0-bbc3-11e8-b2bc-ac1f6b6435d0 is already in row 2"),
        (",3", r"train.csv: row 3: there is no Id"),
        ("0007adf0-bbc3-11e8-b2bc-ac1f6b6435d0,3,4", r"train.csv: row 3: 3 cells where the header has 2"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    (tmp_path / "train.csv").write_text(f"Id,Target\n0007bdf0-bbc3-11e8-b2bc-ac1f6b6435d0,25\n{row}\n")
    with pytest.raises(ValueError, match=message):
        read_screen(tmp_path)


def test_an_image_in_two_tables_is_refused(tmp_path):
    i = "0007bdf0-bbc3-11e8-b2bc-ac1f6b6435d0"
    (tmp_path / "train.csv").write_text(f"Id,Target\n{i},25\n")
    (tmp_path / "sample_submission.csv").write_text(f"Id,Predicted\n{i},0\n")
    with pytest.raises(ValueError, match="is in two of the tables"):
        read_hpa(tmp_path)


def test_groups_of_another_atlas_are_refused(tmp_path):
    i = "0007bdf0-bbc3-11e8-b2bc-ac1f6b6435d0"
    (tmp_path / "train.csv").write_text(f"Id,Target\n{i},25\n")
    (tmp_path / "groups.csv").write_text("Id,group,twins,antibody\nother,0,0,\n")
    with pytest.raises(ValueError, match=f"groups.csv: image {i} is missing"):
        read_hpa(tmp_path)


@pytest.mark.slow
def test_missing_channel_and_missing_yellow(tmp_path, folder):
    atlas = read_hpa(folder)
    strict = read_hpa(folder, yellow="raise")
    sites = atlas.sites()
    lacking = [not Path(f.format(channel="yellow")).exists() for f in sites.files]
    assert 0 < sum(lacking) < 20 and all(e == "external" for e in sites.experiment[lacking])
    check_files(sites, atlas.channels)
    with pytest.raises(FileNotFoundError, match="yellow.jpg does not exist"):
        check_files(strict.sites(), strict.channels)
    assert present_sites(strict.sites(), strict.channels)[1] == sum(lacking)
    assert read_site(sites.files[lacking].iloc[0], atlas.channels)[3].max() == 0
    with pytest.raises(FileNotFoundError, match="_green.png does not exist"):
        read_site(str(tmp_path / "a_{channel}.png"), hpa_channels[1:])


@pytest.mark.slow
def test_colour_where_grey_is_expected(folder):
    colored = next((folder / "external").glob("*_red.jpg"))
    with pytest.raises(ValueError, match="a colour image, expected one grey image per channel"):
        read_site([colored, colored])
    with pytest.raises(ValueError, match="color is 'magenta', expected one of red, green, blue, yellow"):
        read_channel(colored, "magenta")


@pytest.mark.slow
@each("conflicts", ["keep", "union", "intersection", "majority", "train", "drop"])
def test_policies_for_twins_that_disagree(folder, conflicts):
    before, after = read_hpa(folder).wells, read_hpa(folder, conflicts=conflicts).wells
    known = after[after.labels.notna()]
    disagree = (known.groupby("twins").labels.nunique() > 1).sum()
    assert (disagree > 0) == (conflicts == "keep"), f"{disagree} groups of twins disagree"
    assert (len(after) < len(before)) == (conflicts == "drop")


@pytest.mark.slow
def test_planted_twins_are_found(folder):
    planted = pd.read_csv(folder / "twins.csv")
    found = pd.read_csv(folder / "duplicates.csv")
    pairs = lambda t: {frozenset(p) for p in t[["Id", "twin"]].itertuples(index=False)}
    assert len(pairs(planted) - pairs(found)) <= 0.1 * len(planted), "planted twins that were not found"
    twins = read_hpa(folder).wells.set_index("id_code").twins
    inside = [twins[a] == twins[b] for a, b in planted[["Id", "twin"]].itertuples(index=False)]
    assert np.mean(inside) > 0.9


@pytest.mark.slow
def test_a_validation_fold_shares_nothing_with_training(atlas):
    train = atlas.wells[atlas.wells.split == "train"].reset_index(drop=True)
    masks = np.array([valid_mask(train, f"fold={k}/4") for k in range(4)])
    assert (masks.sum(0) == 1).all(), "every labelled image is in one fold"
    for mask in masks:
        assert not set(train.group[mask]) & set(train.group[~mask])


@pytest.mark.slow
def test_a_fold_without_a_positive_is_told_and_works(atlas):
    known = atlas.wells[atlas.wells.labels.notna()].iloc[:60]
    y = atlas.labels(known)
    report = fold_report(y, atlas_folds(known, 5), hpa_classes, known.group)
    assert report["empty"].any()
    absent = np.flatnonzero(y.sum(0) == 0)
    p = np.random.default_rng(0).uniform(size=y.shape)
    for method in threshold_methods:
        estimator = create_threshold(method).fit(p, y, known.group.to_numpy())
        assert np.isfinite(estimator.thresholds_).all(), (method, absent)


# Batches


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_batches_hold_rows_of_labels(atlas, tmp_path, packed):
    if packed:
        pack_screen(atlas, tmp_path / "store", size=32, workers=1, progress=False, say=quiet)
    source = read_screen(tmp_path / "store") if packed else atlas
    assert isinstance(source, Atlas) and source.channels == ("red", "green", "blue", "yellow?")
    sites = source.sites()
    dls = screen_dataloaders(sites, target="labels", domain=None, bs=16, channels=source.channels,
                             classes=source.classes, read_size=None if packed else 32, transforms=[])
    x, context, y = next(iter(dls.train.new(shuffle=False)))
    assert x.shape == (16, 4, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.float32
    np.testing.assert_array_equal(y, label_matrix(sites.labels[:16]))
    item = dls.train_ds[5]  # one by one, as other libraries read
    assert (item[0] == x[5]).all() and (item[2] == y[5]).all()
    *_, last = dls.train.new(shuffle=False)
    assert (last[2] == -1).all(), "test images are masked"
    assert dls.train.titles((x[:1], context[:1], y[:1]))[0].startswith(
        "labels " + ", ".join(atlas.class_names[i] for i in sites.labels[0]))


@pytest.mark.slow
def test_a_list_of_external_images_that_were_not_packed(folder, tmp_path):
    "The store holds the table of images that nobody had; they are none of its images"
    without = read_hpa(folder, external=False)
    pack_screen(without, tmp_path / "store", size=32, workers=1, progress=False, say=quiet)
    packed = read_screen(tmp_path / "store")
    assert (tmp_path / "store" / "external.csv").exists() and len(packed.wells) == len(without.wells)
    check_files(packed.sites(), packed.channels)


@pytest.mark.slow
def test_images_of_two_sizes_need_one(atlas):
    sites = atlas.sites()
    with pytest.raises(ValueError, match="read_size"):
        screen_dataloaders(sites[sites.experiment == "external"], target="labels", domain=None, bs=60,
                           channels=atlas.channels, transforms=[])


# Training


@pytest.mark.slow
def test_losses_and_labels_must_fit(atlas, tmp_path):
    with pytest.raises(ValueError, match="labels is a set of labels, and 'am_softmax' is a loss of one label"):
        train_run(atlas, laptop_recipe(get_recipe("laptop"), 1), tmp_path / "a", say=quiet)
    with pytest.raises(ValueError, match="antibody is one label, and 'multilabel_focal' is a loss of several"):
        train_run(atlas, tiny(), tmp_path / "b", target="antibody", say=quiet)
    for setting, message in [("train.mix=mixup", "mixes two labels"), ("finetune.loss=arcface", "one is for one label"),
                             ("train.find_lr=5", "expected 20 steps or more"),
                             ("pseudo.start=1", "one label per image"), ("inference.tta=s5", "s4"),
                             ("loss.name=focal", "expected one of")]:
        with pytest.raises(ValueError, match=message):
            tiny(setting)


class Watch(Callback):
    "What a stage trains, and by which loss; stops at a step if asked to"

    def __init__(self, stop=None):
        self.seen, self.stop, self.steps = [], stop, 0

    def after_batch(self):
        if not self.training or hasattr(self.learn, "lr_finder"):
            return
        body = next(self.learn.model.body.parameters())
        self.seen.append((type(self.learn.loss_func).__name__, body.requires_grad, self.opt.hypers[-1]["lr"]))
        self.steps += 1
        if self.steps == self.stop:
            raise InterruptedError("stop")


@pytest.fixture(scope="module")
def staged():
    "A recipe with all its stages, on few images"
    return tiny("head.epochs=1", "head.lr=0.01", "head.find_lr=20", "train.find_lr=20", "finetune.epochs=2",
                "finetune.average=2", "checkpoint.every_steps=3", "seed=4")


@pytest.fixture(scope="module")
def whole(atlas, staged, tmp_path_factory):
    "A run that nobody interrupted, and what was seen of it"
    path, watch = tmp_path_factory.mktemp("staged") / "whole", Watch()
    train_run(atlas, staged, path, say=quiet, cbs=[watch])
    return path, watch


@pytest.mark.slow
def test_stages_train_what_they_should(staged, whole):
    path, watch = whole
    losses = [s[0] for s in watch.seen]
    n = len(losses) // 4
    assert losses == ["MultiLabelFocalLoss"] * 2 * n + ["LSEPLoss"] * 2 * n
    assert [s[1] for s in watch.seen] == [False] * n + [True] * 3 * n, "the head alone, then all"
    found = json.loads((path / "learning_rates.json").read_text())
    assert max(s[2] for s in watch.seen[n : 2 * n]) == pytest.approx(found["train"], rel=0.05)
    assert found["head"] != staged.head.lr
    history = pd.read_csv(path / "history.csv")
    assert history.stage.tolist() == ["head", "train", "finetune", "finetune"]
    assert {"average_precision", "macro_f1"} <= set(history)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [2, 13])
def test_a_run_that_was_interrupted_ends_the_same(atlas, staged, whole, tmp_path, stop):
    "Also in the stage whose learning rate was looked for"
    whole, broken = whole[0], tmp_path / "broken"
    with pytest.raises(InterruptedError):
        train_run(atlas, staged, broken, say=quiet, cbs=[Watch(stop)])
    torch.rand(7)  # another state of the random numbers, as in a new process
    train_run(atlas, staged, broken, say=quiet)
    a, b = (load_weights(recipe_model(staged, 28, 4), r / "model.safetensors").state_dict() for r in (whole, broken))
    assert all(torch.equal(a[k], b[k]) for k in a)
    pd.testing.assert_frame_equal(*(pd.read_csv(r / "history.csv").drop(columns="time") for r in (whole, broken)))


# Inference and submission


@pytest.mark.slow
def test_predictions_are_probabilities_of_each_label(run, atlas):
    p = Predictions.load(run / "predictions" / "test.npz")
    assert p.activation == "sigmoid" and p.classes.tolist() == list(range(28))
    assert (abs(p.probabilities.sum(1) - 1) > 1e-3).any()
    assert set(p.wells().ids) == set(atlas.wells.id_code[atlas.wells.split == "test"])


@pytest.mark.slow
def test_submission_with_thresholds_and_score(run, atlas, folder, tmp_path):
    said = []
    path = submit_labels(run, atlas, tmp_path / "s.csv", method="global", say=said.append)
    sample, written = pd.read_csv(folder / "sample_submission.csv"), pd.read_csv(path)
    assert written.Id.tolist() == sample.Id.tolist() and "macro-F1" in said[0] and "constant answers" in said[0]
    stored = read_thresholds(run / "thresholds.json", hpa_classes)
    test = Predictions.load(run / "predictions" / "test.npz").wells()
    assert read_label_submission(path)[test.ids].tolist() == label_lists(stored.predict(test.probabilities))
    table = label_score_table(path, folder / "truth.csv")
    assert table.f1["macro"] == pytest.approx(score_label_submission(path, folder / "truth.csv"))
    twins = pd.read_csv(folder / "twins.csv")[["Id", "twin"]].to_numpy().ravel()
    left = label_score_table(path, folder / "truth.csv", exclude=twins)
    assert left.support["macro"] < table.support["macro"]


@pytest.mark.slow
def test_without_images_set_aside_shares_are_matched(atlas, tmp_path):
    run = tmp_path / "run"
    train_run(atlas, replace(tiny(), valid=None), run, say=quiet)
    predict_run(run, atlas, "test", progress=False)
    said = []
    path = submit_labels(run, atlas, say=said.append)
    assert "its share in training" in said[0]
    share = label_matrix(read_label_submission(path)).mean(0)
    wanted = atlas.labels(atlas.wells[atlas.wells.split == "train"]).mean(0)
    assert np.abs(share - wanted).max() < 0.05


@pytest.mark.slow
def test_stack_and_mean_of_two_runs(run, atlas, tmp_path):
    other = tmp_path / "other"
    train_run(atlas, tiny("loss.name=focal_lovasz", "loss.options={}", "seed=5"), other, valid=f"run={run}", say=quiet)
    report = stack_runs([run, other], atlas, tmp_path / "stack", min_positives=10**6, progress=False, say=quiet)
    assert {"focal", "other", "stack"} <= set(report.index)
    path = submit_labels(tmp_path / "stack", atlas, method="global", say=quiet)
    assert len(pd.read_csv(path)) == DESIGN["n_test"]
    table = blend_runs([run, other], atlas, tmp_path / "blend", say=quiet)
    mean = np.mean([Predictions.load(r / "predictions" / "test.npz").wells().probabilities for r in (run, other)], 0)
    np.testing.assert_allclose(Predictions.load(tmp_path / "blend" / "predictions" / "test.npz").probabilities, mean,
                               atol=1e-5)
    assert table.weight.tolist() == [0.5, 0.5, 1]
    with pytest.raises(ValueError, match="rcic-hpa-stack"):
        blend_runs([run, other], atlas, tmp_path / "blend2", weights="chosen", say=quiet)


@pytest.mark.slow
def test_metric_learning_on_antibodies(atlas, tmp_path):
    recipe = change_recipe(laptop_recipe(get_recipe("hpa_resnet50_arcface"), 1), "data.read_size=32", "data.size=32")
    learn = train_run(atlas, recipe, tmp_path / "run", target="antibody", say=quiet)
    sites = atlas.sites()
    x = embed_sites(learn, sites, "running", progress=False)
    known = sites.labels.notna().to_numpy()
    near = Retrieval(own_group=True, threshold=0.5).fit(x[known], atlas.labels(), atlas.wells.group[known].to_numpy())
    prior, found = near.predict(x[~known])
    assert prior.shape == ((~known).sum(), 28) and found.any()


# Commands


def command(name, *args, cwd):
    done = subprocess.run([str(Path(sys.executable).parent / name), *map(str, args)], capture_output=True, text=True,
                          cwd=cwd)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_from_files_to_a_score_by_commands(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = [o for s in TINY[:-1] for o in ("--set", s)]
    code, out, _ = in_process(monkeypatch, capsys, "rcic-train", "--data", folder, "--recipe", "hpa_seresnext50_focal",
                              "--laptop", 3, *settings, "--set", "inference.thresholds=global", "--run", "run",
                              "--submit")
    assert code == 0 and "macro-F1" in out, out
    code, out, _ = in_process(monkeypatch, capsys, "rcic-score", "--submission", "run/submission.csv", "--truth",
                              folder / "truth.csv")
    assert code == 0 and 0 < float(out.split()[-1]) < 1, out
    code, out, _ = in_process(monkeypatch, capsys, "rcic-submit", "--run", "run", "--thresholds", "share", "--out",
                              "share.csv")
    assert code == 0 and (tmp_path / "share.csv").exists(), out


@pytest.mark.slow
def test_labels_of_a_table_in_a_data_block_of_ones_own(atlas):
    "Tuples with our block; fastai's takes lists, and says so with nothing better than a TypeError"
    from fastai.data.all import ColReader, DataBlock, MultiCategoryBlock, RandomSplitter

    from rcic_fastai.data.block import MultiChannelImageBlock
    from rcic_fastai.data.target import MultiLabelBlock

    sites = atlas.sites(atlas.wells[atlas.wells.labels.notna()]).head(12).reset_index(drop=True)
    for block, get_y in ((MultiLabelBlock(atlas.classes), ColReader("labels")),
                         (MultiCategoryBlock(vocab=atlas.classes), lambda r: list(r.labels))):
        dls = DataBlock((MultiChannelImageBlock(atlas.channels), block), get_y=get_y,
                        splitter=RandomSplitter(seed=0)).dataloaders(sites, bs=4, num_workers=0)
        x, y = dls.valid.new(shuffle=False).one_batch()
        assert x.shape[1] == len(atlas.channels) and y.shape[1] == len(atlas.classes)
        rows = [tuple(r.nonzero()[:, 0].tolist()) for r in y]
        assert rows == [tuple(sorted(t)) for t in dls.valid_ds.items.labels[: len(rows)]]
