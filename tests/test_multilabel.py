"""Labels of several classes: matrices, text, macro-F1 and its interval, floors, tables, relations of classes,
submissions."""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from cases import each
from sklearn.metrics import average_precision_score, f1_score, precision_recall_fscore_support

from rcic_fastai.labels import metrics as multilabel
from rcic_fastai.screen.labels import format_labels, label_lists, label_matrix, parse_labels
from rcic_fastai.labels.metrics import average_precision, class_graph, co_occurrence, f1_floors, f1_scores, f1_table
from rcic_fastai.labels.metrics import label_report, macro_f1, macro_f1_interval, plot_class_graph, plot_co_occurrence
from rcic_fastai.labels.submission import read_label_submission, score_label_submission, write_label_submission

HPA = Path(__file__).parents[1].parent / "shared" / "hpa"


def draw(n=300, k=7, seed=0, agree=0.7):
    """Labels and predictions of n images; the last class is never there and never predicted, the one before only
    predicted."""
    rng = np.random.default_rng(seed)
    y = (rng.random((n, k)) < np.geomspace(0.5, 0.01, k)).astype(np.uint8)
    pred = np.where(rng.random((n, k)) < agree, y, rng.random((n, k)) < 0.2).astype(np.uint8)
    y[:, -2:], pred[:, -1], pred[0, -2] = 0, 0, 1
    return y, pred


@pytest.fixture(scope="module")
def real_y():
    "Labels of the real training images."
    if not (HPA / "train.csv").exists():
        pytest.skip("the real HPA tables are not beside this checkout (../shared/hpa)")
    return label_matrix(map(parse_labels, pd.read_csv(HPA / "train.csv").Target))


# labels


@each(
    "labels, message",
    [
        ([(0,), (3, 28)], "image 1: label 28 is outside 0-27"),
        ([(-1,)], "image 0: label -1 is outside 0-27"),
        ([(1, 2), [4, 0, 4]], "image 1: label 4 occurs more than once"),
        ([(0,), (1,), None], "image 2: the labels are unknown"),
        ([(0,), 5], "image 1: labels are 5, expected a list"),
        (["16 0"], "image 0: labels are '16 0', expected a list"),
        ([(1.5,)], "image 0: label 1.5 is not a class number"),
        ([(True,)], "image 0: label True is not a class number"),
        ([np.array([3.0])], "is not a class number"),
    ],
)
def test_labels_that_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        label_matrix(labels)


def test_matrix_and_lists():
    y = (np.random.default_rng(0).random((200, 28)) < 0.06).astype(np.uint8)
    assert (~y.any(1)).any()  # images without labels are there, and come back as ()
    lists = label_lists(y)
    assert lists == [tuple(map(int, np.flatnonzero(row))) for row in y]
    assert all(type(c) is int for row in lists for c in row)
    back = label_matrix(lists)
    assert back.dtype == np.uint8 and (back == y).all()
    assert (label_matrix([np.array(row[::-1], np.int64) for row in lists]) == y).all()  # the order does not matter
    assert label_matrix([]).shape == (0, 28) and label_lists(np.zeros((0, 28))) == []
    assert label_matrix([(4,)], n_classes=5).tolist() == [[0, 0, 0, 0, 1]]


@pytest.mark.parametrize("bad, message", [(np.zeros(3), "shape"), ([[0, 1], [1, 2]], "y: image 1, class 1 is 2"),
                                          ([[np.nan]], "nan")])
def test_a_matrix_holds_zeros_and_ones(bad, message):
    with pytest.raises(ValueError, match=message):
        label_lists(bad)


@each(
    "text, message",
    [("", "there are no labels"), ("0 x", "label 'x' is not a number"), ("28", "label 28 is outside 0-27"),
     ("-1", "label -1 is outside 0-27"),
     ("1_0", "not a number"), ("³", "not a number"), ("3 3", "label 3 occurs more than once"),
     (None, "labels are None"), (float("nan"), "labels are nan")],
)
def test_text_that_is_refused(text, message):
    with pytest.raises(ValueError, match=f"^train.csv: row 9: .*{message}"):
        parse_labels(text, where="train.csv: row 9")
    with pytest.raises(ValueError, match="^(there|label)"):
        parse_labels(text)


def test_text():
    assert parse_labels(" 16  0\n") == (0, 16)
    assert parse_labels("30", n_classes=31) == (30,)
    assert format_labels((16, 0)) == "0 16" and format_labels(()) == ""


# scores


@each("dtype", [np.uint8, bool, np.float32])
@each("seed", range(3))
def test_f1_is_that_of_scikit_learn(seed, dtype):
    y, pred = draw(seed=seed)
    each = f1_scores(y.astype(dtype), pred.astype(dtype))
    assert each.dtype == np.float64
    np.testing.assert_array_equal(each, f1_score(y, pred, average=None, zero_division=0))
    assert macro_f1(y.astype(dtype), pred.astype(dtype)) == f1_score(y, pred, average="macro", zero_division=0)


def test_many_images_do_not_overflow():
    y = np.ones((70_000, 2), np.uint8)
    assert macro_f1(y, y) == 1


def test_scores_refuse_what_does_not_fit():
    y, pred = draw()
    with pytest.raises(ValueError, match="y has shape .300, 7. and pred .300, 6."):
        macro_f1(y, pred[:, :6])
    with pytest.raises(ValueError, match="pred: image 0, class 0 is 0.5"):
        f1_scores(y, np.full(y.shape, 0.5))


@pytest.mark.parametrize("seed", range(3))
def test_floors_are_the_scores_of_constant_answers(seed):
    y, _ = draw(seed=seed)
    y = y[:, np.random.default_rng(seed).permutation(7)]
    top = y.sum(0, dtype=int).argsort()[::-1]
    for answer, floor in zip((top, top[:1], top[:2]), f1_floors(y)):
        pred = np.zeros_like(y)
        pred[:, answer] = 1
        assert floor == pytest.approx(macro_f1(y, pred), abs=1e-12)


def test_the_real_table(real_y):
    assert real_y.shape == (31_072, 28) and real_y.sum() == 50_782
    assert np.bincount(real_y.sum(1, dtype=int)).tolist() == [0, 15_126, 12_485, 3_160, 299, 2]
    assert real_y.sum(0).tolist() == [12885, 1254, 3621, 1561, 1858, 2513, 1008, 2822, 53, 45, 28, 1093, 688, 537, 1066,
                                      21, 530, 210, 902, 1482, 172, 3777,
                                      802, 2965, 322, 8228, 328, 11]
    assert f1_floors(real_y).round(4).tolist() == [0.0996, 0.0209, 0.0359]
    counts, graph = co_occurrence(real_y), class_graph(real_y)
    assert counts.loc[9, 10] == counts.loc[10, 10] == 28  # all images with lysosomes have endosomes, too
    strongest = sorted(graph.edges(data="lift"), key=lambda e: -e[2])[:3]
    assert [e[:2] for e in strongest] == [(9, 10), (16, 17), (6, 10)]


# intervals


@pytest.mark.parametrize("grouped", [False, True])
def test_resamples_are_those_of_a_plain_loop(grouped):
    y, pred = draw(n=60)
    groups = np.random.default_rng(1).integers(12, size=60) if grouped else np.arange(60)
    found = pd.unique(groups)
    drawn = np.random.default_rng(5).integers(len(found), size=(20, len(found)))
    plain = []
    for draws in drawn:
        rows = np.concatenate([np.flatnonzero(groups == found[g]) for g in draws])
        plain.append(f1_score(y[rows], pred[rows], average=None, zero_division=0))
    fast = multilabel._resampled_f1(y, pred, groups if grouped else None, 20, 5)
    np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-12)
    low, high = np.percentile(np.mean(plain, 1), [2.5, 97.5])
    score = macro_f1(y, pred)
    assert macro_f1_interval(y, pred, groups if grouped else None, 20, 5) == pytest.approx(
        (2 * score - high, 2 * score - low))


def test_copies_in_a_group_are_no_evidence():
    y, pred = draw()
    five = np.repeat(np.arange(len(y)), 5)
    alone, by_image = macro_f1_interval(y, pred), macro_f1_interval(y[five], pred[five])
    assert macro_f1_interval(y[five], pred[five], [f"antibody {i}" for i in five]) == pytest.approx(alone)
    assert by_image[1] - by_image[0] < 0.6 * (alone[1] - alone[0])


def test_an_interval_is_repeatable_and_inside_0_to_1():
    y, pred = draw(n=12)
    assert macro_f1_interval(y, pred, seed=3) == macro_f1_interval(y, pred,
                                                                   seed=3) != macro_f1_interval(y, pred, seed=4)
    low, high = macro_f1_interval(y[:, :1], y[:, :1])
    assert (low, high) == (1, 1)
    assert multilabel._resampled_f1(y, pred, None, 250, 0).shape == (250, 7)


@pytest.mark.parametrize("groups, message",
                         [([1, 2], "2 groups for 300 images"), ([None] + [1] * 299, "image 0 has no group")])
def test_groups_that_are_refused(groups, message):
    y, pred = draw()
    with pytest.raises(ValueError, match=message):
        macro_f1_interval(y, pred, groups)


def test_a_thousand_resamples_take_a_moment():
    rng = np.random.default_rng(0)
    y, pred = rng.random((10_000, 28)) < 0.06, rng.random((10_000, 28)) < 0.06
    start = time.process_time()
    macro_f1_interval(y, pred, n_boot=1000)
    assert time.process_time() - start < 2  # 0.15 s on one core


# tables


def test_table():
    y, pred = draw()
    groups, names, thresholds = np.arange(300) // 3, list("abcdefg"), np.linspace(0.1, 0.7, 7)
    table = f1_table(y, pred, names, thresholds, groups, n_boot=50)
    assert table.columns.tolist() == ["support", "groups", "predicted", "precision", "recall", "f1", "low", "high",
                                      "threshold"]
    assert table.index.tolist() == [*names, "macro"] and table.index.name == "class"
    assert all(table[c].dtype.kind == "i" for c in ("support", "groups", "predicted"))
    precision, recall, f1, support = precision_recall_fscore_support(y, pred, zero_division=0)
    for column, values in dict(precision=precision, recall=recall, f1=f1, support=support,
                               threshold=thresholds).items():
        np.testing.assert_array_equal(table.loc[names, column], values)
    assert table.groups["a"] == pd.Series(groups[y[:, 0] > 0]).nunique() and table.groups["g"] == 0
    macro = table.loc["macro"]
    assert (macro.support, macro.predicted, macro.groups) == (y.sum(), pred.sum(), 100)
    assert (macro.low, macro.high) == macro_f1_interval(y, pred, groups, 50)
    assert (macro.f1, macro.precision) == pytest.approx((macro_f1(y, pred), precision.mean()))
    assert np.isnan(macro.threshold)
    assert ((table.low <= table.f1) & (table.f1 <= table.high)).all()


def test_table_without_extras():
    y, pred = draw()
    table = f1_table(y, pred, n_boot=0)
    assert table.columns.tolist() == ["support", "predicted", "precision", "recall", "f1", "low", "high"]
    assert table.index.tolist() == [*range(7), "macro"] and table[["low", "high"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="the name 'a' is given to two classes"):
        f1_table(y, pred, list("abcdefa"))


def test_a_table_of_no_images_is_refused():
    none = np.zeros((0, 7), np.uint8)
    with pytest.raises(ValueError, match="there are no images to score"):
        f1_table(none, none)


def test_report():
    y, pred = draw()
    ids = [f"i{i}" for i in range(300)]
    report = label_report(y, pred, ids, exclude={*ids[:100], "of another set"}, groups=np.arange(300) // 2)
    assert report.index.tolist() == ["all images", "without duplicates", *f1_floors(y).index]
    assert report.images.tolist() == [300, 200, 300, 300, 300]
    assert report.macro_f1.tolist() == [macro_f1(y, pred), macro_f1(y[100:], pred[100:]), *f1_floors(y)]
    assert tuple(report.loc["without duplicates", ["low", "high"]]) == macro_f1_interval(
        y[100:], pred[100:], np.arange(200) // 2)
    assert "without duplicates" not in label_report(y, pred).index
    with pytest.raises(ValueError, match="all 300 images are excluded"):
        label_report(y, pred, ids, exclude=ids)
    with pytest.raises(ValueError, match="id 'i0' occurs more than once"):
        label_report(y, pred, ["i0"] * 300, exclude=["i0"])
    with pytest.raises(ValueError, match="pass the `ids`"):
        label_report(y, pred, exclude=ids)


def test_average_precision():
    y, _ = draw()
    p = np.random.default_rng(0).normal(size=y.shape) + y
    has = y.any(0)
    assert average_precision(y, p) == pytest.approx(average_precision_score(y[:, has], p[:, has]), abs=1e-12)
    each = average_precision(y, p, average=None)
    assert np.isnan(each).tolist() == (~has).tolist()
    masked = np.vstack([np.full((5, 7), -1), y])  # rows of unknown labels
    assert average_precision(masked.astype(np.float32),
                             np.vstack([np.full((5, 7), np.nan), p])) == average_precision(y, p)
    assert np.isnan(average_precision(y * 0, p))
    with pytest.raises(ValueError, match="p: image 0, class 0 is nan"):
        average_precision(y, p * np.nan)


# relations of classes


def test_co_occurrence_and_graph():
    y = label_matrix([(0, 1)] * 12 + [(0,)] * 8 + [(2,)] * 15 + [(1, 2)] * 5, n_classes=4)
    counts = co_occurrence(y, list("abcd"))
    assert counts.to_numpy().tolist() == [[20, 12, 0, 0], [12, 17, 5, 0], [0, 5, 20, 0], [0, 0, 0, 0]]
    share = co_occurrence(y, list("abcd"), share=True)
    assert share.loc["a", "b"] == 12 / 20 and share.loc["b", "a"] == 12 / 17 and share.loc["d"].isna().all()
    graph = class_graph(y, list("abcd"), min_count=12, min_lift=1.2)
    assert list(graph.nodes(data="count")) == [("a", 20), ("b", 17), ("c", 20), ("d", 0)]
    assert list(graph.edges) == [("a", "b")]
    edge = graph.edges["a", "b"]
    assert edge["count"] == 12 and edge["lift"] == pytest.approx(12 * 40 / (20 * 17))
    assert edge["phi"] == pytest.approx(np.corrcoef(y[:, 0], y[:, 1])[0, 1])
    assert not class_graph(y, min_count=13).edges and not class_graph(y, min_lift=1.5).edges
    assert list(class_graph(y, min_count=5, min_lift=0).edges) == [(0, 1), (1, 2)]


def test_phi_of_a_class_in_all_images_is_unknown():
    assert np.isnan(class_graph(np.ones((20, 2)), min_lift=1).edges[0, 1]["phi"])


def test_plots_draw_every_class_and_repeat():
    y = np.random.default_rng(0).random((400, 12)) < 0.2
    y[:, 5] |= y[:, 4]
    y[:, 11] = 0
    names = [f"class {i}" for i in range(12)]

    def places():
        ax = plot_class_graph(class_graph(y, names, min_count=5))
        return {t.get_text(): t.xy for t in ax.texts}

    first = places()
    assert len(first) == 12 and f"class 4  {y[:, 4].sum()}" in first
    assert {k: tuple(v) for k, v in first.items()} == {k: tuple(v) for k, v in places().items()}
    ax = plot_co_occurrence(y, names, ax=plt.subplots()[1])
    assert [t.get_text() for t in ax.get_xticklabels()] == names
    shown = ax.images[0].get_array()
    assert shown[4, 5] == 1 and np.ma.getmaskarray(shown)[11].all() and np.ma.getmaskarray(shown).diagonal().all()
    plot_class_graph(class_graph(np.zeros((0, 3))))
    plt.close("all")


# submissions

IDS, LABELS = ["007", "b", "c d"], [(16, 0), (25,), (3,)]


@pytest.fixture
def sample(tmp_path):
    "Sample submission: its ids look like a number, and are in another order than those of the tests."
    (tmp_path / "sample.csv").write_text('Id,Predicted\nb,0\n007,0\n"c d",0\n')
    return tmp_path / "sample.csv"


def test_write_and_read(tmp_path, sample):
    path = write_label_submission(IDS, LABELS, sample, tmp_path / "new" / "submission.csv")
    assert path.read_bytes() == b"Id,Predicted\nb,25\n007,0 16\nc d,3\n"
    assert [p.name for p in path.parent.iterdir()] == ["submission.csv"]  # nothing temporary is left
    back = read_label_submission(path)
    assert back.index.tolist() == ["b", "007", "c d"] and back.tolist() == [(25,), (0, 16), (3,)]
    assert read_label_submission(pd.DataFrame(dict(Id=IDS, Predicted=LABELS))).tolist() == [(0, 16), (25,), (3,)]


def test_other_columns_and_images_without_labels(tmp_path):
    sample, path = pd.DataFrame(dict(image=[2, 1], other=0)), tmp_path / "s.csv"
    with pytest.raises(ValueError, match="1 of 2 images have no labels, first '2'"):
        write_label_submission([1, 2], [(1,), ()], sample, path, "image", "labels", n_classes=2)
    write_label_submission([1, 2], [(1,), ()], sample, path, "image", "labels", n_classes=2, allow_empty=True)
    assert read_label_submission(path, "image", "labels").to_dict() == {"2": (), "1": (1,)}


@pytest.mark.parametrize(
    "ids, labels, message",
    [
        (IDS[:2], LABELS[:2], "1 image of .*sample.csv is missing, such as 'c d'"),
        ([*IDS, "x"], [*LABELS, (0,)], "1 image is not in .*sample.csv, such as 'x'"),
        (["b", "b", "c d"], LABELS, "row 1: id 'b' occurs more than once"),
        (["b", None, "c d"], LABELS, "row 1 has no id"),
        (IDS, LABELS[:2], "labels of 2 images for 3 ids"),
        (IDS, [(0,), (28,), (1,)], "image 'b': label 28 is outside 0-27"),
        (IDS, [(0,), None, (1,)], "image 'b': the labels are unknown"),
        (IDS, np.eye(3, 28, dtype=np.uint8), "labels are a matrix"),
    ],
)
def test_a_submission_that_is_refused_leaves_the_old_file(tmp_path, sample, ids, labels, message):
    path = tmp_path / "submission.csv"
    path.write_text("old")
    with pytest.raises(ValueError, match=message):
        write_label_submission(ids, labels, sample, path)
    assert path.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["sample.csv", "submission.csv"]


@each(
    "text, message",
    [
        ("", "the file is empty"),
        ("id,Predicted\na,0\n", "column 'Id' is missing, it has 'id', 'Predicted'"),
        ("Id,Predicted\na,0\n\na,1\n", "row 4: id 'a' occurs more than once"),
        ("Id,Predicted\n,0\n", "row 2 has no id"),
        ("Id,Predicted\na,0\nb,28\n", "row 3 .b.: label 28 is outside"),
        ("Id,Predicted\na,0;1\n", "row 2 .a.: label '0;1' is not a number"),
        ("Id,Predicted\na,0 0\n", "row 2 .a.: label 0 occurs more than once"),
    ],
)
def test_a_file_that_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"bad.csv: {message}"):
        read_label_submission(path)


def test_a_file_that_is_not_there(tmp_path, sample):
    for call in (
        lambda: read_label_submission(tmp_path / "no.csv"),
        lambda: write_label_submission(IDS, LABELS, tmp_path / "no.csv", sample),
    ):
        with pytest.raises(FileNotFoundError, match="no.csv does not exist"):
            call()


def test_files_from_other_programs(tmp_path):
    path = tmp_path / "s.csv"
    path.write_bytes(
        b"\xef\xbb\xbfId,Predicted\r\n\r\nNA,1\r\nnull,\r\n\r\n"
    )  # BOM, Windows lines, blank lines, ids that look like nothing
    assert read_label_submission(path).to_dict() == {"NA": (1,), "null": ()}


def test_score(tmp_path, sample):
    path = write_label_submission(IDS, LABELS, sample, tmp_path / "submission.csv")
    truth = pd.DataFrame(dict(Id=["c d", "007", "b"], Target=["3 1", "0 16", "1"]))
    y, pred = label_matrix([(1, 3), (0, 16), (1,)]), label_matrix([(3,), (0, 16), (25,)])
    assert score_label_submission(path, truth) == f1_score(y, pred, average="macro", zero_division=0)
    truth.to_csv(tmp_path / "truth.csv", index=False)
    assert score_label_submission(path, tmp_path / "truth.csv") == macro_f1(y, pred)
    tuples = pd.DataFrame(dict(id=truth.Id, labels=[(3, 1), (16, 0), (1,)]))
    assert score_label_submission(path, tuples) == macro_f1(y, pred)
    with pytest.raises(ValueError, match="1 image is not in truth, such as 'c d'"):
        score_label_submission(path, truth[1:])
    with pytest.raises(ValueError, match="truth: row 2 .b.: there are no labels"):
        score_label_submission(path, truth.assign(Target=["3", "0", ""]))
