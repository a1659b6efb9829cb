"Recipes from names, files and the command line."

import json
import re
import warnings
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path

import pytest
from cases import each
import torch

from rcic_fastai.model.batchnorm import batchnorm_modes
from rcic_fastai.model.backbone import first_conv_inits
from rcic_fastai.model.head import cell_type_kinds, classifiers, head_kinds, pools
from rcic_fastai.labels.threshold import threshold_methods
from rcic_fastai.loss.by_name import losses
from rcic_fastai.profile.correct import postprocess_names
from rcic_fastai.recipe.check import check_recipe, recipe_from_json, recipe_to_json, settings_table
from rcic_fastai.recipe.published import change_recipe, get_recipe, laptop_recipe, list_recipes, recipes
from rcic_fastai.recipe.settings import _limits, _rule, InferenceSettings, LossSettings, ModelSettings, Recipe
from rcic_fastai.recipe.settings import TrainSettings, compare_recipes
from rcic_fastai.recipe.settings import current_name, recipe_from_dict, renamed_settings, stage_names
from rcic_fastai.train.learner import _compile
from rcic_fastai.train.network import recipe_model
from rcic_fastai.train.mix import mixes
from rcic_fastai.train.optimizer import optimizers
from rcic_fastai.train.schedule import schedule_function


def leaves(settings, where=""):
    for f in fields(settings):
        value = getattr(settings, f.name)
        if is_dataclass(value):
            yield from leaves(value, f"{where}{f.name}.")
        else:
            yield where + f.name, value


@each("name", recipes)
def test_every_recipe_survives_json(name, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(recipe_to_json(recipes[name]))
    assert get_recipe(path) == get_recipe(name) == recipes[name]


@each("key, default", list(leaves(Recipe())))
def test_every_setting_can_be_set_and_wrong_types_are_named(key, default):
    assert compare_recipes(change_recipe(Recipe(), f"{key}={json.dumps(default)}"), change_recipe(Recipe())).empty
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        change_recipe(Recipe(), f"{key}={json.dumps({'a': 1}) if not isinstance(default, dict) else [1]}")


@each("text, message", [
    ('{"train": {"epoch": 3}}', r"train\.epoch is no setting; did you mean 'train\.epochs'\?"),
    ('{"epochs": 3}', r"epochs is no setting; did you mean 'train\.epochs'\?"),
    ('{"optimizer": "adam"}', r"did you mean 'train\.optimizer'\?"),
    ('{"trian": {}}', r"trian is no setting; did you mean 'train'\?"),
    ('{"train": 3}', "train is 3, expected settings"),
    ('{"train": {"epochs": 2.5}}', "train.epochs is 2.5, expected int"),
    ('{"train": {"epochs": true}}', "train.epochs is true, expected int"),
    ('{"train": {"epochs": 0}}', "train.epochs is 0, expected at least 1"),
    ('{"data": {"batch_size": 0}}', "data.batch_size is 0, expected at least 1"),
    ('{"data": {"domain": "well"}}', 'data.domain is "well", expected one of null'),
    ('{"device": {"precision": "half"}}', "device.precision"),
    ('{"train": {"mix": "lisa"}}', "train.mix 'lisa' mixes experiments, so a batch cannot be of one"),
    ('{"data": {"statistics": "controls"}}',
     "data.statistics 'controls' needs controls in the batches: data.n_controls"),
    ('{"model": {"head": "controls"}, "loss": {"name": "cross_entropy"}}', "data.n_controls of 2 or more"),
    ('{"data": {"domain": null, "domains_per_batch": 2}}', "data.domains_per_batch needs data.domain"),
    ('{"data": {"batch_size": 9, "domains_per_batch": 2}}', "expected a multiple of data.domains_per_batch"),
    ('{"data": {"match_histograms": "plate", "standardize": "screen"}}', "has no grey values left"),
    ('{"data": {"standardize": null}}', "data.standardize None leaves grey values as they are"),
    ('{"loss": {"name": "ce_arcface"}}', "a neck with the classifier 'linear_cosine'"),
    ('{"inference": {"bagging": [32]}}', "inference.bagging is for inference.batchnorm"),
    ('{"train": {"schedule": "linear"}}', "train.schedule is"),
    ('{"loss": {"name": "cross_entropy"}}', "do not fit"),
    ('{"name": "x",}', "line 1"),
    ("[1]", "an object in braces is expected"),
])
def test_bad_files(text, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        recipe_from_json(text)
    with pytest.raises(ValueError, match="bad.json: "):
        get_recipe(path)


def test_missing_names_and_files(tmp_path):
    with pytest.raises(ValueError, match="there is no recipe 'lapto'; did you mean 'laptop'"):
        get_recipe("lapto")
    with pytest.raises(FileNotFoundError, match="none.json does not exist"):
        get_recipe(tmp_path / "none.json")


def test_changes_are_copies_and_compose():
    base = get_recipe("laptop")
    a = change_recipe(base, "train.epochs=3", "train.lr=1", "loss.options.m=0.1", "data.domain=null",
                      "model.arch=resnet18")
    assert (a.train.epochs, a.train.lr, a.loss.options["m"], a.data.domain, a.model.arch) == (
        3, 1.0, 0.1, None, "resnet18")
    assert base == recipes["laptop"]
    assert set(compare_recipes(base, a).index) == {"train.epochs", "train.lr", "loss.options", "data.domain",
                                                   "model.arch"}


def test_a_laptop_recipe_keeps_the_system():
    "Stages in proportion, learning rates too; what the system is stays"
    full, small = recipes["densenet121_domain_bn"], laptop_recipe(recipes["densenet121_domain_bn"], epochs=40, lr=2e-3)
    assert (small.pretrain.epochs, small.train.epochs, small.finetune.epochs) == (10, 28, 2)
    assert (small.train.lr, small.finetune.lr) == (2e-3, 2e-4) and small.train.accumulate == 4
    assert (small.data.domain, small.loss, small.train.milestones, small.inference.bagging) == (
        full.data.domain, full.loss, full.train.milestones, [32, 64, 96, 128])
    assert not small.model.pretrained and small.data.cache and recipes["densenet121_domain_bn"].train.epochs == 275
    assert laptop_recipe(recipes["densenet161_first_place"], epochs=10).pseudo.start == 6
    assert laptop_recipe(recipes["laptop"], arch="resnet18").model.arch == "resnet18"


def test_list_names_source_and_score():
    table = list_recipes()
    assert list(table.index) == list(recipes) and {"source", "score", "arch"} <= set(table.columns)
    assert asdict(recipes["laptop"])["name"] == "laptop"


def test_every_number_of_a_recipe_has_a_range():
    "What is zero, negative, huge, NaN or infinite is refused by name"
    base, checked = get_recipe("laptop"), 0
    for section in fields(base):
        part = getattr(base, section.name)
        for f in fields(part) if is_dataclass(part) else ():
            if not {int, float} & set(_rule(type(part), f.name)[0]):
                continue
            key, (low, high) = f"{section.name}.{f.name}", _limits(type(part), f.name)
            for text in ("NaN", "Infinity", "-Infinity", "1e999", "true", "[1]", "{}", '"nan"', str(low - 1),
                         str(int(high * 2 + 1)), "-1e30", str(10**400)):
                with pytest.raises(ValueError, match=key.removeprefix("inference.")) as e:
                    change_recipe(base, f"{key}={text}")
                assert "\n" not in str(e.value)
                checked += 1
    assert checked > 600


@each("table, setting, names", [
    (LossSettings, "name", losses), (TrainSettings, "loss", losses), (TrainSettings, "optimizer", optimizers),
    (TrainSettings, "mix", mixes),
    (ModelSettings, "pool", pools), (ModelSettings, "head", set(head_kinds) - {"linear_cosine"}),
    (ModelSettings, "cell_type", cell_type_kinds), (ModelSettings, "classifier", classifiers),
    (ModelSettings, "first_conv", first_conv_inits),
    (InferenceSettings, "batchnorm", batchnorm_modes), (InferenceSettings, "postprocess", postprocess_names),
    (InferenceSettings, "thresholds", threshold_methods),
])
def test_the_words_of_a_setting_are_those_of_its_module(table, setting, names):
    "A name that a module gains or loses is one that a recipe gains or loses"
    assert set(_rule(table, setting)[1]) == set(names)


@pytest.mark.slow
def test_every_setting_is_in_the_table_with_its_rule():
    table = settings_table()
    assert list(table.index) == [key for key, _ in leaves(Recipe())]
    assert table.what.notna().all() and table.loc["train.keep", "may_be"] == '"last", "best"'
    assert table.loc["data.crop", "may_be"] == "int or null, 8 to 16,384"
    assert table.loc["device.channels_last", "may_be"] == 'bool or "auto"'


@each("schedule", _rule(TrainSettings, "schedule")[1])
def test_every_schedule_can_be_made(schedule):
    if schedule != "one_cycle":  # which is fastai's
        assert schedule_function(TrainSettings(schedule=schedule, milestones=[0.5]))(0) > 0


@each("setting", ['loss.options={"m": 1, "m": 2}', 'loss.options={"m": "a"}', 'loss.options={"s": NaN}',
                  'loss.options={"reduction": "none"}', "train.milestones=[2]",
                                     'train.milestones=["a"]', "inference.bagging=[1]", 'train.loss_options={"m": 1}',
                  "inference.thresholds=best"])
def test_lists_and_options_are_looked_into(setting):
    with pytest.raises(ValueError, match=setting.partition("=")[0]):
        change_recipe(get_recipe("laptop"), setting)


@pytest.mark.parametrize("setting", ["source=https://bob:Hunter2@h/w", "model.pretrained=https://bob:Hunter2@h/w.pth"])
def test_no_setting_holds_a_password(setting):
    key = setting.partition("=")[0]
    with pytest.raises(ValueError, match=f"{key} holds an address with a password") as e:
        change_recipe(recipes["laptop"], setting)
    assert "Hunter2" not in str(e.value)
    assert change_recipe(recipes["laptop"], "source=https://h/w?page=1#at@b").source


@each("epochs", [0, -5, True, 10**9])
def test_a_laptop_needs_epochs(epochs):
    with pytest.raises(ValueError, match="--laptop"):
        laptop_recipe(get_recipe("laptop"), epochs)


@each("options", [dict(stem_width=-1), dict(channels=[0, 0, 0, 0]), dict(channels=[4096] * 4, layers=[9] * 4),
                  dict(channels=["x"]),
                                     dict(stem_width="x"), dict(nope=1)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_options_that_make_no_network_are_named(options):
    recipe = change_recipe(get_recipe("laptop"), f"model.arch_options={json.dumps(options)}", "model.arch=resnet10t")
    with pytest.raises(ValueError) as e:
        recipe_model(recipe, 5)
    assert str(e.value).startswith(f"model.arch_options is {json.dumps(options)}") and "resnet10t" in str(e.value)


@pytest.mark.parametrize("text", ['{"s": 99999999999999999999}', '{"m": null}', '{"s": -1e300}'])
def test_options_that_make_no_loss_are_named(text):
    with pytest.raises(ValueError, match=r"loss\.options\.[sm] is "):
        change_recipe(recipes["laptop"], f"loss.options={text}")


def test_a_compiler_that_there_is_not_is_named():
    with pytest.raises(ValueError, match=r"device\.compile is 'x', expected true, false or .*inductor"):
        _compile(torch.nn.Linear(2, 2), change_recipe(recipes["laptop"], "device.compile=x", "data.domain=null",
                                                      "data.domains_per_batch=1", "data.statistics=all"))


# Names of version 0.1

RECIPE_0_1_0 = Path(__file__).parent / "data" / "run_0_1_0" / "recipe.json"
RENAMED = {
    "data.controls=3": "data.n_controls=3", "controls.epochs=2": "pretrain.epochs=2",
    "controls.steps=[0.5]": "pretrain.milestones=[0.5]",
    'controls={"epochs": 2, "steps": [0.5]}': 'pretrain={"epochs": 2, "milestones": [0.5]}',
    **{f"{s}.steps=[0.5]": f"{s}.milestones=[0.5]" for s in ("head", "train", "finetune", "cell_type")},
    "checkpoint.steps=7": "checkpoint.every_steps=7", "checkpoint.keep=9": "checkpoint.keep_last=9",
    "inference.domain=null": "inference.domain=as_trained"}  # fmt: skip


def key_of(setting):
    return setting.partition("=")[0]


def said_by(function, *args):
    "What a function returns, and what it warns of"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args)
    return result, [str(w.message) for w in caught]


def nested(setting):
    "A setting of the command line as a file has it"
    key, _, text = setting.partition("=")
    table, dot, name = key.partition(".")
    value = json.loads(text) if text[0] in "0123456789[{n" else text
    return {table: {name: value}} if dot else {table: value}


@each("old, new", list(RENAMED.items()))
def test_names_of_0_1_are_read_and_reported(old, new, tmp_path):
    "On the command line and in files, with one warning that has both names"
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(nested(old)))
    expected, silence = said_by(change_recipe, Recipe(), new)
    assert silence == []
    names = ["inference.domain null", '"as_trained"'] if "null" in old else [key_of(old), key_of(new)]
    recipe, said = said_by(change_recipe, Recipe(), old)
    assert recipe == expected and len(said) == 1, said
    assert f"{names[0]} is called {names[1]}" in said[0] and said[0].endswith(" since 0.2")
    if names[0] == "controls.epochs":  # a file has the stage as a table
        names = ["controls", "pretrain"]
    recipe, said = said_by(get_recipe, path)
    assert recipe == expected and len(said) == 1, said
    assert f"{names[0]} is called {names[1]}" in said[0] and said[0].startswith(f"{path}: ")


def test_all_old_names_are_tried():
    more = {"controls.epochs", "controls.steps", "inference.domain"}
    assert {key_of(o) for o in RENAMED} == {*renamed_settings, *more} - {"pretrain.steps"}
    assert all(current_name(new) == new for new in renamed_settings.values())
    assert [current_name(s) for s in ("controls", *stage_names)] == ["pretrain", *stage_names]


def test_a_file_of_0_1_is_read():
    "As that version wrote it, with all settings: one warning, and what is written again has new names only"
    recipe, said = said_by(get_recipe, RECIPE_0_1_0)
    assert len(said) == 1 and said[0].startswith(f"{RECIPE_0_1_0}: data.controls is called data.n_controls, controls ")
    old, new = json.loads(RECIPE_0_1_0.read_text()), asdict(recipe)
    assert recipe.name == "old" and recipe.data.n_controls == old["data"]["controls"]
    assert {n: v for n, v in new["pretrain"].items() if n != "milestones"}.items() <= old["controls"].items()
    assert new["checkpoint"] == dict(every_steps=old["checkpoint"]["steps"], keep_last=old["checkpoint"]["keep"])
    assert old["inference"]["domain"] is None and recipe.inference.domain == "as_trained"
    assert recipe.data.domain == old["data"]["domain"]
    assert said_by(recipe_from_json, recipe_to_json(recipe)) == (recipe, [])


@each("settings", [("data.controls=3", "data.n_controls=3"), ("data.n_controls=3", "data.controls=4"),
                   ("controls.steps=[0.5]", "pretrain.milestones=[0.5]"),
                   ("checkpoint.keep=1", "train.lr=1", "checkpoint.keep_last=1"),
                   ("train.milestones=[0.5]", "train.steps=[0.5]")])  # fmt: skip
def test_a_setting_with_both_names_is_refused(settings):
    old, new = key_of(settings[0]), key_of(settings[-1])
    message = f"{old} and {new} are one setting, which is called {current_name(new)} since 0.2: give it once"
    with pytest.raises(ValueError, match=re.escape(message)):
        change_recipe(Recipe(), *settings)
    tables = {}
    for s in settings:
        for table, values in nested(s).items():
            tables.setdefault(table, {}).update(values)
    message = "controls and pretrain are one setting" if "controls" in tables else message
    with pytest.raises(ValueError, match=re.escape(message)):
        recipe_from_dict(tables)


def test_as_trained_is_a_word():
    "None is what files of 0.1 have; a recipe says 'as_trained'"
    words = '"cell_type", "experiment", "plate", "screen", "as_trained"'
    with pytest.raises(ValueError, match=f"inference.domain is null, expected one of {words}"):
        check_recipe(replace(Recipe(), inference=InferenceSettings(domain=None)))
    assert change_recipe(Recipe(), "data.domain=null").data.domain is None
    assert settings_table().loc["inference.domain", "default"] == '"as_trained"'
