"Stacks: models per class that never see what they judge, resuming, reports."

import json
import math
import sys

import numpy as np
import pandas as pd
import pytest
from cases import each
from scipy.special import expit, logit
from sklearn.metrics import average_precision_score

from rcic_fastai.labels import stack as module
from rcic_fastai.labels.stack import Stacker, check_lightgbm_params, crossfit_decisions, stack_features, stack_report

pytest.importorskip("lightgbm", reason="stacking needs LightGBM (pip install rcic_fastai[stack])")
SMALL = dict(n_folds=3, max_rounds=40, patience=5, min_positives=20, params=dict(learning_rate=0.2, num_leaves=4),
             progress=False)
LINEAR = {**SMALL, "min_positives": math.inf}


def draw(seed=0, n=600, prevalence=(0.3, 0.2), complementary=True, signal=2.5):
    "Two members that see on bright or on dim images only (or on all), statistics, labels and groups of three images."
    rng = np.random.default_rng(seed)
    groups = np.arange(n) // 3
    y = (rng.random((n // 3 + 1, len(prevalence))) < prevalence).astype(np.uint8)[groups]
    bright = rng.random(n)
    sees = (bright > 0.5, bright <= 0.5) if complementary else (np.full(n, 0.7),) * 2
    logits = (logit(np.array(prevalence)) + signal * s[:, None] * (2.0 * y - 1) + 1.3 * rng.normal(size=y.shape)
              for s in sees)
    return dict(zip("ab", map(expit, logits))), y, pd.DataFrame(
        dict(brightness=bright, noise=rng.normal(size=n))), groups


@pytest.fixture(scope="module")
def data():
    return draw()


@pytest.fixture(scope="module")
def fitted(data):
    return Stacker(**SMALL).fit(*data)


def mean_ap(y, p):
    return average_precision_score(y, p, average="macro")


# parameters
@each(
    "params,message",
    [
        (dict(num_leafs=3), "no parameter 'num_leafs': did you mean"),
        (dict(zzzzzzzz=3), "no parameter 'zzzzzzzz'$"),
        (dict(n_estimators=3), "Stacker has a setting `max_rounds`"),
        (dict(random_state=3), "Stacker has a setting `seed`"),
        (dict(objective="regression"), "needs its own value"),
        (dict(subsample=0.5, bagging=0.5), "names twice"),
    ],
)
def test_parameters_that_do_not_exist_or_are_not_free(params, message, data):
    with pytest.raises(ValueError, match=message):
        check_lightgbm_params(params)
    with pytest.raises(ValueError, match=message):
        Stacker(**{**SMALL, "params": params}).fit(*data)


def test_every_name_of_the_scikit_learn_interface_is_known():
    import inspect

    from lightgbm import LGBMClassifier

    own = {"class_weight", "importance_type", "subsample_for_bin", "kwargs", "self", "n_estimators", "objective",
           "random_state", "n_jobs"}
    names = set(inspect.signature(LGBMClassifier.__init__).parameters) - own
    assert len(check_lightgbm_params(dict.fromkeys(names, 1))) == len(names) >= 10


def test_inner_folds_choose_among_sets_of_parameters(data):
    good, bad = dict(learning_rate=0.2), dict(learning_rate=1e-5)
    s = Stacker(**{**SMALL, "params": [bad, good]}).fit(*data)
    assert {m["params"]["learning_rate"] for m in s.models_} == {0.2}


def test_without_lightgbm_linear_models_work_and_trees_say_what_to_install(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    assert Stacker(**LINEAR).fit(*data).oof_.any()
    with pytest.raises(ImportError, match=r"pip install rcic_fastai\[stack\]"):
        Stacker(**SMALL).fit(*data)


# what a stack gains
def test_a_stack_helps_where_errors_are_complementary(data, fitted):
    members, y, stats, groups = data
    linear = Stacker(**LINEAR).fit(*data)
    mean = sum(members.values()) / 2
    assert mean_ap(y, fitted.oof_) > mean_ap(y, linear.oof_) + 0.02 > mean_ap(y, mean) + 0.02
    new, y2, stats2, _ = draw(seed=5)
    # and on images that nobody has seen
    assert mean_ap(y2, fitted.predict(new, stats2)) > mean_ap(y2, sum(new.values()) / 2) + 0.03
    table, classes = stack_report(members, dict(linear=linear, trees=fitted), y)
    assert table.loc["trees", "gain low"] > 0 and classes.sure.all()


def test_a_stack_of_one_perfect_and_one_blind_member_gains_nothing():
    members, y, stats, groups = draw(seed=1, signal=6.0, complementary=False)
    members["b"] = np.random.default_rng(0).random(y.shape)
    s = Stacker(**SMALL).fit(members, y, stats, groups)
    table, classes = stack_report(members, dict(trees=s), y)
    assert table.gain["trees"] < 0.01 and not (classes.low > 0).any() and table.gain["a"] == 0


def test_labels_without_signal_are_not_learned():
    members, _, stats, groups = draw(seed=2)
    y = (np.random.default_rng(7).random((600, 2)) < 0.3).astype(np.uint8)[groups]
    s = Stacker(**SMALL).fit(members, y, stats, groups)
    assert mean_ap(y, s.oof_) < y.mean() + 0.06  # an in-sample stack would look far better


# leaks
def test_a_fold_is_predicted_by_models_that_its_rows_cannot_change(data, fitted):
    members, y, stats, groups = data
    rng, out = np.random.default_rng(0), fitted.folds_[0] == 1
    y2, stats2 = y.copy(), stats.copy()
    y2[out] = 1 - y[out]
    stats2.loc[out] = rng.normal(size=(out.sum(), 2))
    members2 = {n: np.where(out[:, None], rng.random(p.shape), p) for n, p in members.items()}
    s = Stacker(**SMALL).fit(members2, y2, stats2, groups, folds=fitted.folds_)
    for a, b in zip(fitted.models_, s.models_):
        assert (a.get("trees") == b.get("trees")) == (a["fold"] == 1)
        assert (a["threshold"] == b["threshold"]) == (a["fold"] == 1)


def test_audit_finds_planted_rows_groups_and_gaps(data):
    s = Stacker(**LINEAR).fit(*data)
    table = s.audit()
    assert table.models["linear"] == 6 and table.seen["linear"] >= 390
    n, m = len(data[1]), s.models_[3]
    seen, out = (module._unpacked(m[k], n) for k in ("seen", "predicted"))

    def planted(message, **changes):
        before = dict(m)
        m.update({k: module._packed(rows, n) for k, rows in changes.items()})
        with pytest.raises(ValueError, match=message):
            s.audit()
        with pytest.raises(ValueError, match=message):
            stack_report(data[0], dict(s=s), data[1])
        m.update(before)
        s.audit()

    row = np.flatnonzero(out)[4]
    planted(f"{m['name']} saw row {row} in training", seen=seen | (np.arange(n) == row))
    planted(
        f"{m['name']}, trained on part 0 and used on part 1: group",
        predicted=out & (np.arange(n) != row),
        seen=seen | (np.arange(n) == row),
    )
    planted(f"row {row} was predicted 0 times for class {m['class']}", predicted=out & (np.arange(n) != row))


def test_folds_that_divide_groups_are_found(data):
    s = Stacker(**LINEAR).fit(*data, folds=np.arange(len(data[1])) % 3)
    with pytest.raises(ValueError, match="repeat00-fold0-class00, trained on part 0"):
        s.audit()


def test_inner_folds_get_the_groups(data, monkeypatch):
    asked = []
    real = module.grouped_folds
    monkeypatch.setattr(
        module, "grouped_folds", lambda y, groups, k, seed: asked.append((len(y), np.asarray(groups), k))
        or real(y, groups, k, seed=seed)
    )
    s = Stacker(**LINEAR).fit(*data)
    assert [(n, k) for n, _, k in asked] == [(600, 3)] + [((s.folds_[0] != f).sum(), 3) for f in range(3)]
    for f, (_, groups, _) in enumerate(asked[1:]):
        np.testing.assert_array_equal(groups, s.groups_[s.folds_[0] != f])


# classes that are hard to learn
def test_classes_without_positives_somewhere():
    members, y, stats, groups = draw(prevalence=(0.3, 0.2, 0.1, 0.1, 0.1))
    y[:, 1], y[:, 2], y[:, 3] = 0, 0, 1
    y[groups == 7, 2] = 1  # one group only
    y[:, 4] = groups < 2  # two groups
    s = Stacker(**SMALL).fit(members, y, stats, groups)
    s.audit()
    kinds = {c: [m["kind"] for m in s.models_ if m["class"] == c] for c in range(5)}
    assert kinds[0] == ["boosted"] * 3 and kinds[1] == kinds[3] == ["constant"] * 3
    assert sorted(kinds[2]) == ["constant", "linear", "linear"]
    assert kinds[4] == ["linear"] * 3
    assert not s.oof_[:, 1].any() and (s.oof_[:, 3] == 1).all() and not s.oof_[groups == 7, 2].any()
    votes = Stacker(**{**SMALL, "combine": "vote"}).fit(members, y, stats, groups)
    assert not votes.oof_[:, 1].any() and (votes.oof_[:, 3] == 1).all()
    table, classes = stack_report(members, dict(s=s), y, n_boot=20)
    assert np.isnan(classes.s[1]) and np.isfinite(table.to_numpy()).all()


def test_few_positives_make_a_linear_model_of_the_own_columns(data):
    members, y, stats, groups = data
    s = Stacker(**{**SMALL, "min_positives": int(y[:, 1].sum() * 2 / 3) + 5}).fit(*data)
    assert {m["class"]: m["kind"] for m in s.models_} == {0: "boosted", 1: "linear"}
    m = next(m for m in s.models_ if m["class"] == 1)
    assert len(m["coef"]) == len(members) and min(m["coef"]) > 0


# resuming
def test_an_interrupted_fit_goes_on_and_ends_the_same(data, fitted, tmp_path, monkeypatch):
    calls, real = [], module._fit_model
    monkeypatch.setattr(
        module, "_fit_model", lambda *a: calls.append(1)
        or (real(*a) if len(calls) != 4 else (_ for _ in ()).throw(KeyboardInterrupt))
    )
    with pytest.raises(KeyboardInterrupt):
        Stacker(**SMALL, folder=tmp_path).fit(*data)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.glob("repeat*.json"))) == 3
    assert json.loads((folder / "settings.json").read_text())["rows"] == 600
    new = draw(seed=5)
    s = Stacker(**SMALL, folder=tmp_path).fit(*data)
    assert len(calls) == 4 + 3
    np.testing.assert_array_equal(s.oof_, fitted.oof_)
    np.testing.assert_array_equal(s.predict(new[0], new[2]), fitted.predict(new[0], new[2]))
    Stacker(**SMALL, folder=tmp_path, repeats=2).fit(*data)
    assert len(calls) == 7 + 6 and len(list(tmp_path.iterdir())) == 1  # the first repeat is there
    Stacker(**{**SMALL, "combine": "vote", "num_threads": 2}, folder=tmp_path).fit(*data)
    assert len(calls) == 13


def test_other_data_settings_or_folds_take_no_old_model(data, tmp_path):
    members, y, stats, groups = data
    quick = {**LINEAR, "n_folds": 2, "n_inner": 2}

    def folders(*data, **settings):
        folds = settings.pop("folds", None)
        Stacker(**{**quick, **settings}, folder=tmp_path).fit(*data, folds=folds)
        return len(list(tmp_path.iterdir()))

    y2, folds = y.copy(), Stacker(**quick).fit(*data).folds_
    y2[0, 0] = 1 - y2[0, 0]
    assert [folders(*data), folders(*data), folders(members, y2, stats, groups), folders(*data, seed=1)] == [1, 1, 2, 3]
    assert folders(members, y, stats + 1e-9, groups) == 4 and folders(members, y, stats, np.arange(600)) == 5
    other = (groups[None] // 2) % 2
    assert (other != folds).any() and (other == folds).any()
    assert folders(*data, folds=other) == 5
    np.testing.assert_array_equal(
        Stacker(**quick, folder=tmp_path).fit(*data, folds=other).oof_, Stacker(**quick).fit(*data, folds=other).oof_
    )


def test_a_damaged_file_is_named(data, tmp_path):
    Stacker(**LINEAR, folder=tmp_path).fit(*data)
    path = next(tmp_path.glob("*/repeat00-fold1-class01.json"))
    path.write_text(path.read_text()[:50])
    with pytest.raises(ValueError, match=r"repeat00-fold1-class01.json is damaged"):
        Stacker(**LINEAR, folder=tmp_path).fit(*data)


# predictions
def test_mean_and_vote(data):
    new, _, stats, _ = draw(seed=5)
    for combine in ("mean", "vote"):
        s = Stacker(**{**LINEAR, "combine": combine, "n_folds": 2}, repeats=2).fit(*data)
        expected = np.zeros((600, 2))
        for m in s.models_:
            z = np.column_stack([logit(p[:, m["class"]].clip(1e-7, 1 - 1e-7)) for p in new.values()])
            p = expit(z @ np.array(m["coef"]) + m["intercept"])
            expected[:, m["class"]] += (p if combine == "mean" else p >= m["threshold"]) / 4
        np.testing.assert_allclose(s.predict(new, stats), expected, atol=1e-12)
        assert combine == "mean" or set(np.unique(s.oof_)) == {0, 0.5, 1}


@each(
    "change,message",
    [
        (dict(members={}), "no members"),
        (dict(members=dict(a=np.zeros((600, 2)), b=np.zeros((600, 3)))),
         r"'b' has shape \(600, 3\) and 'a' \(600, 2\)"),
        (dict(members=dict(a=np.full((600, 2), np.nan))), "'a' has nan in row 0, class 0"),
        (dict(y=np.zeros((600, 3))), r"labels of shape \(600, 3\), expected \(600, 2\)"),
        (dict(y=np.full((600, 2), -1)), "row 0 has label -1"),
        (dict(groups=[1, 2]), "2 groups for 600 rows"),
        (dict(folds=np.zeros(600, int)), "folds of repeat 0 are"),
        (dict(folds=np.zeros(5, int)), r"folds have shape \(1, 5\)"),
        (dict(statistics=pd.DataFrame(dict(size=["a"] * 600))), "statistic 'size' is"),
    ],
)
def test_bad_input(data, change, message):
    good = dict(zip(("members", "y", "statistics", "groups"), data))
    with pytest.raises(ValueError, match=message):
        Stacker(**LINEAR).fit(**{**good, **change})


@each(
    "setting", [dict(n_folds=1), dict(repeats=0), dict(min_positives=math.nan), dict(combine="median"), dict(params=[])]
)
def test_bad_settings(data, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        Stacker(**{**SMALL, **setting}).fit(*data)


def test_prediction_needs_a_fit_and_the_same_columns(data, fitted):
    members, _, stats, _ = data
    with pytest.raises(ValueError, match="was not fitted"):
        Stacker().predict(members, stats)
    with pytest.raises(ValueError, match="do not match"):
        fitted.predict(members, stats[["noise", "brightness"]])
    assert list(stack_features(members, stats, ["x", "y"])) == ["a: x", "a: y", "b: x", "b: y", "brightness", "noise"]


# report
def test_average_precision_of_a_draw_is_that_of_repeated_rows():
    rng = np.random.default_rng(0)
    p, y, codes = rng.integers(0, 15, 200) / 14, rng.integers(0, 2, 200), np.arange(200) // 4
    draws = module._draws(codes, 5, 0)
    found = module._average_precision(p, y, codes, draws)
    for w, ap in zip(draws, found):
        rows = np.repeat(np.arange(200), w[codes])
        assert ap == pytest.approx(average_precision_score(y[rows], p[rows]))
    assert np.isnan(module._average_precision(p, 0 * y, codes, draws)).all()


def test_thresholds_come_from_other_folds_and_any_estimator(data):
    members, y, _, groups = data
    folds = groups % 3

    class Recorder:
        def fit(self, p, y, groups):
            self.groups = set(groups)
            return self

        def predict(self, p):
            asked.append(self.groups)
            return p >= 0.9

    asked = []
    decided = crossfit_decisions(members["a"], y, folds, Recorder(), groups)
    np.testing.assert_array_equal(decided, members["a"] >= 0.9)
    assert asked == [set(groups[folds != f]) for f in range(3)]
    best = crossfit_decisions(members["a"], y, folds)
    assert (2 * best * y).sum() / (best.sum() + y.sum()) > 0.4


def test_report_refuses_what_it_cannot_compare(data, fitted):
    members, y, *_ = data
    with pytest.raises(ValueError, match="no stacks"):
        stack_report(members, {}, y)
    with pytest.raises(ValueError, match="has the name of a member"):
        stack_report(members, dict(a=fitted), y)
    with pytest.raises(ValueError, match="against is 'c'"):
        stack_report(members, dict(s=fitted), y, against="c")
    with pytest.raises(ValueError, match="nothing to compare"):
        stack_report(members, dict(s=fitted), 0 * y)
    with pytest.raises(ValueError, match="was not fitted"):
        stack_report(members, dict(s=Stacker()), y)
