"Sites to batches: one domain each, every site where it should be, readable titles and errors."

import pickle
import warnings
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from cases import each
import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorCategory
from PIL import Image
from torch import nn

from rcic_fastai.data.context import DOMAINS, ContextEncoder, ScreenContext
from rcic_fastai.data.select import select_sites
from rcic_fastai.data.target import MASKED, MaskedCategorize
from rcic_fastai.data.domains import domain_keys, paired_sites, several_domains, shuffled_domains
from rcic_fastai.data.reader import SiteReader
from rcic_fastai.data.loader import DomainDL
from rcic_fastai.data.block import SixChannelImageBlock, screen_dataloaders
from rcic_fastai.data.store import read_site
from rcic_fastai.data.image import MultiChannelImage
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.simulate import simulate_screen

matplotlib.use("Agg")
torch.set_num_threads(1)
REAL = Path(__file__).parents[1].parent / "shared" / "rcic"


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="load_learner")
        yield
    plt.close("all")


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    path = tmp_path_factory.mktemp("screen")
    return read_screen(simulate_screen(path, n_sirnas=8, n_positive=1, n_train=2, n_test=1, image_size=16, seed=1,
                                       workers=1, progress=False))


@pytest.fixture(scope="module")
def sites(screen):
    return select_sites(screen)


@pytest.fixture(scope="module")
def controls(screen):
    "Controls of all splits: 2 sites of each well"
    return pd.concat([select_sites(screen, split, "controls") for split in ("train", "test")], ignore_index=True)


@pytest.fixture(scope="module")
def test_sites(screen):
    "Sites of the test experiments, in no order, on an index of their own"
    return select_sites(screen, "test").sample(frac=1, random_state=0)


LOADERS = [(domain, 0) for domain in DOMAINS] + [(None, 2), ("plate", 2)]
VALID = "experiment=HUVEC-02,RPE-02"


def loaders(sites, **kwargs):
    return screen_dataloaders(sites, **{**dict(valid=VALID, bs=6, val_bs=5, transforms=[], device="cpu"), **kwargs})


def ids_of(dl, table):
    "site_id of each image of each batch the loader yields, looked up by the pixels"
    known = {read_site(r.files).tobytes(): r.site_id for r in table.itertuples()}
    assert len(known) == len(table)
    return [[known[x.numpy().tobytes()] for x in b[0]] for b in dl]


class Means(nn.Module):
    "Logits from which a site can be told: the means of its channels"

    def __init__(self, n):
        super().__init__()
        self.head = nn.Linear(6, n)
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, context):
        assert x.ndim == 4 and context.shape == (len(x), 4)
        return self.head(x.float().mean((2, 3)))


def learner(dls, n=8, **kwargs):
    learn = Learner(dls, Means(n), loss_func=CrossEntropyLossFlat(), **kwargs)
    return learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])


# which sites


def test_select_sites_by_split_and_wells(screen):
    for split in ("train", "test"):
        n = {w: len(select_sites(screen, split, w)) for w in ("treatments", "controls", "all")}
        assert n["all"] == n["treatments"] + n["controls"] == 2 * (screen.wells.split == split).sum()
        controls = select_sites(screen, split, "controls")
        assert set(controls.well_type) == {"positive_control", "negative_control"} and set(controls.split) == {split}


@pytest.mark.parametrize(
    "args, message",
    [
        (("valid",), "split is 'valid', expected one of 'test', 'train'"),
        (("train", "control"), "wells is 'control', expected one of 'treatments', 'controls', 'all'"),
    ],
)
def test_select_sites_errors(screen, args, message):
    with pytest.raises(ValueError, match=message):
        select_sites(screen, *args)


def test_missing_files_are_an_error_or_are_left_out_and_reported(tmp_path):
    screen = read_screen(simulate_screen(tmp_path, n_sirnas=4, n_train=1, n_test=0, cell_types="RPE", image_size=16,
                                         workers=1, progress=False))
    n = len(select_sites(screen))
    lost = select_sites(screen).files[2].format(channel=5)
    Path(lost).unlink()
    with pytest.raises(FileNotFoundError, match="_w5.png does not exist"):
        select_sites(screen)
    said = []
    sites = select_sites(screen, present_only=True, warn=said.append)
    assert len(sites) == n - 1 and said == [f"{n - 1} of {n} train sites have all their files; 1 was left out"]
    assert lost.replace("5.png", "{channel}.png") not in set(sites.files)
    for p in Path(tmp_path, "train").rglob("*_w1.png"):
        p.unlink()
    with pytest.raises(ValueError, match="no treatments in split 'train' whose files are all there"):
        select_sites(screen, present_only=True, warn=said.append)


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "train" / "HEPG2-01").is_dir(), reason="the real images are not in ../shared/rcic")
def test_real_controls_that_are_present():
    said = []
    sites = select_sites(read_screen(REAL), wells="controls", present_only=True, warn=said.append)
    assert len(sites) == 16 and said[0].startswith("16 of 8,194 train sites")
    dls = screen_dataloaders(sites, "plate=4", target="cell_type", domain=None, bs=4, transforms=[], device="cpu",
                             repeats=3)
    x, context, y = dls.one_batch()
    assert x.shape == (4, 6, 512, 512) and x.dtype == torch.uint8
    assert list(dls.vocab) == ["HEPG2", "HUVEC", "RPE", "U2OS"]
    assert (context[:, 0] == y).all() and len(dls.train) == 9
    assert dls.valid.one_batch()[1][:, 2].tolist() == [3] * 4


def test_a_file_that_vanishes_is_named_while_reading(tmp_path):
    screen = read_screen(simulate_screen(tmp_path, n_sirnas=4, n_train=1, n_test=0, cell_types="RPE", image_size=16,
                                         workers=1, progress=False))
    dls = screen_dataloaders(select_sites(screen), bs=4, transforms=[], device="cpu", num_workers=0)
    for p in Path(tmp_path, "train").rglob("*_w6.png"):
        p.unlink()
    with pytest.raises(FileNotFoundError, match="_w6.png does not exist"):
        list(dls.train)


# context and target


def test_context_there_and_back():
    encode = ContextEncoder(["HUVEC", "RPE"], ["HUVEC-01", "RPE-01"])
    context = encode(["RPE", "HUVEC-01", 4])
    assert type(context) is ScreenContext and context.tolist() == [1, 0, 3, 0] and context.dtype == torch.int64
    assert encode.describe(context) == "RPE, HUVEC-01, plate 4"
    assert encode(["U2OS", "U2OS-01", 2]).tolist() == [-1, -1, 1, 0]
    roles = [encode(["RPE", "HUVEC-01", 4, w]) for w in ("treatment", "positive_control", "negative_control")]
    assert [r.tolist() for r in roles] == [[1, 0, 3, i] for i in range(3)]
    assert [encode.describe(r) for r in roles] == [f"RPE, HUVEC-01, plate 4{c}"
                                                   for c in ("", ", positive control", ", negative control")]
    with pytest.raises(ValueError, match="well_type is 'empty', expected one of 'treatment'"):
        encode(["RPE", "HUVEC-01", 4, "empty"])
    assert encode.describe([-1, -1, 1]) == "new cell type, new experiment, plate 2"


def test_classes_there_and_back():
    categorize = MaskedCategorize([7, 3, "x"])
    assert [int(categorize(o)) for o in (7, 3, "x", None)] == [0, 1, 2, MASKED] and categorize.c == 3
    assert isinstance(categorize(3), TensorCategory)
    assert [str(categorize.decode(TensorCategory(i))) for i in (1, MASKED)] == ["3", "unknown"]
    with pytest.raises(ValueError, match="class 4 is not among the 3 known ones"):
        categorize(4)


def test_unknown_targets_are_masked(sites):
    some = sites.copy()
    some.loc[::3, "sirna"] = pd.NA
    dls = loaders(some, valid=None)
    order = dls.train.new(shuffle=False)
    y = torch.cat([b[2] for b in order])
    rows = order.get_idxs()
    expected = [MASKED if pd.isna(s) else list(dls.vocab).index(s) for s in some.sirna.iloc[rows]]
    assert y.tolist() == expected and MASKED in expected and y.dtype == torch.int64


@pytest.mark.slow
@each("target", ["sirna", "cell_type", "experiment", "plate", "well_type"])
def test_any_column_is_a_target(screen, target):
    table = select_sites(screen, wells="all")
    dls = loaders(table, valid=None, target=target)
    dl = dls.train.new(shuffle=False)
    y, rows = torch.cat([b[2] for b in dl]), dl.get_idxs()
    assert list(dls.vocab) == sorted(table[target].unique()) and dls.c == table[target].nunique()
    assert [dls.vocab[i] for i in y] == table[target].iloc[rows].tolist()


# batches of one domain


def random_domains(seed):
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 6)
    keys = np.repeat(np.arange(n), rng.integers(1, 40, n))
    return rng.permutation(keys), int(rng.integers(1, 14)), int(rng.integers(1, 4))


@each("seed", range(60))
def test_shuffled_domains(seed):
    keys, bs, repeats = random_domains(seed)
    batches = shuffled_domains(keys, bs, seed, 3, repeats)
    sizes = np.bincount(keys) * repeats
    assert all(len(set(keys[b])) == 1 for b in batches)
    assert len(batches) == sum(-(-s // bs) for s in sizes)
    for b in batches:
        assert len(b) == min(bs, sizes[keys[b[0]]])  # full, or all there is
        if repeats == 1:
            assert len(set(b)) == len(b)
    seen = np.bincount(np.concatenate(batches), minlength=len(keys))
    assert seen.min() >= repeats
    if repeats == 1:
        assert seen.max() <= 2
    for d in np.unique(keys):  # no more than what fills the last batch
        assert seen[keys == d].sum() - sizes[d] == (-sizes[d] % bs if sizes[d] > bs else 0)


def test_shuffled_domains_follow_seed_and_epoch():
    keys = np.repeat([0, 1, 2], 20)
    draw = lambda *args: np.concatenate(shuffled_domains(keys, 4, *args)).tolist()
    assert draw(0, 0) == draw(0, 0)
    assert len({tuple(draw(s, e)) for s in range(3) for e in range(4)}) == 12
    first = [keys[b[0]] for b in shuffled_domains(keys, 4, 0, 0)]
    assert first != sorted(first)  # batches of the domains are mixed
    assert shuffled_domains(np.zeros(0, int), 4) == []


def test_domain_keys(sites):
    some = sites.sample(frac=1, random_state=1)
    for domain, columns in {"plate": ["experiment", "plate"], "experiment": ["experiment"],
                            "cell_type": ["cell_type"]}.items():
        keys = domain_keys(some, domain)
        assert keys.dtype == np.int64
        assert len(set(zip(keys, some[columns].itertuples(index=False, name=None)))) == len(some.groupby(columns))
    assert (domain_keys(some, None) == 0).all()
    with pytest.raises(ValueError, match="domain is 'well', expected one of None, 'cell_type', 'experiment', 'plate'"):
        domain_keys(some, "well")


@pytest.mark.slow
@each("domain, workers", LOADERS)
def test_training_batches(sites, domain, workers):
    dls = loaders(sites.sample(frac=1, random_state=2), domain=domain, num_workers=workers, seed=5)
    table = dls.train_ds.items
    first = ids_of(dls.train, table)
    assert len(first) == len(dls.train)
    assert set(sum(first, [])) == set(table.site_id)
    by_id = dict(zip(table.site_id, domain_keys(table, domain)))
    assert all(len({by_id[i] for i in b}) == 1 for b in first)
    expected = [table.site_id.iloc[b].tolist() for b in shuffled_domains(domain_keys(table, domain), 6, 5, 0)]
    assert sorted(sum(first, [])) == sorted(sum(expected, []))
    if domain is None:
        assert first == expected
    assert ids_of(dls.train, table) != first  # the next epoch
    dls.train.epoch = 0
    assert ids_of(dls.train, table) == first  # and the first again


@pytest.mark.slow
@each("domain, workers", LOADERS)
def test_validation_batches(sites, domain, workers):
    dls = loaders(sites.sample(frac=1, random_state=2), domain=domain, num_workers=workers)
    table, batches = dls.valid_ds.items, ids_of(dls.valid, dls.valid_ds.items)
    assert len(batches) == len(dls.valid) and sorted(sum(batches, [])) == sorted(table.site_id)  # each site once
    by_id = dict(zip(table.site_id, domain_keys(table, domain)))
    assert all(len({by_id[i] for i in b}) == 1 for b in batches)
    sizes = {}
    for b in batches:
        sizes.setdefault(by_id[b[0]], []).append(len(b))
    assert max(max(s) for s in sizes.values()) <= 5
    if domain is not None:
        assert all(max(s) - min(s) <= 1 for s in sizes.values())  # even parts
    assert ids_of(dls.valid, table) == batches
    assert sum(batches, []) == table.site_id.iloc[dls.valid.get_idxs()].tolist()


def test_a_table_in_order_stays_in_order(sites):
    for domain in DOMAINS:
        dl = loaders(sites, valid=None, domain=domain).test_dl(sites)
        assert dl.get_idxs() == list(range(len(sites)))


class Rows:
    "A data set of numbers, for counting"

    def __init__(self, keys):
        self.items = pd.DataFrame(dict(cell_type=[f"T{k}" for k in keys], experiment="E", plate=1))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return (torch.tensor(i),)


@pytest.mark.slow
@each("seed", range(40))
def test_length_is_the_number_of_batches(seed):
    keys, bs, repeats = random_domains(seed)
    for domain in ("cell_type", None):
        for shuffle in (True, False):
            for drop_last in (True, False):
                for n in (None, len(keys) // 2 + 1):
                    settings = dict(bs=bs, shuffle=shuffle, drop_last=drop_last, n=n, num_workers=0)
                    dl = DomainDL(Rows(keys), domain=domain, repeats=repeats, seed=seed, **settings)
                    batches = [b[0].tolist() for b in dl]
                    assert len(batches) == len(dl), settings
                    rows = sum(batches, [])
                    assert set(rows) <= set(range(n or len(keys)))
                    if drop_last:
                        assert all(len(b) == bs for b in batches)
                    elif shuffle:
                        assert set(rows) == set(range(n or len(keys)))
                    else:
                        assert sorted(rows) == list(range(n or len(keys)))
                    if domain:
                        assert all(len(set(keys[b])) == 1 for b in batches)
                        if not shuffle and not drop_last:  # even parts: no batch of two beside one of many
                            for d in np.unique(keys):
                                sizes = [len(b) for b in batches if keys[b[0]] == d]
                                assert not sizes or max(sizes) - min(sizes) <= 1


@pytest.mark.slow
@each("seed", range(12))
def test_length_with_several_domains_and_pairs(seed):
    keys, half, repeats = random_domains(seed)
    rng, data = np.random.default_rng(seed), Rows(keys)
    data.items["experiment"], data.items["class"] = rng.choice(list("ABC"), len(keys)), rng.integers(0, 4, len(keys))
    for k in (1, 2, 3):
        for drop_last in (True, False):
            for pairs, domain in ((False, "cell_type"), (True, "cell_type"), (True, None)):
                settings = dict(domain=domain, domains_per_batch=k, pairs=pairs, repeats=repeats, drop_last=drop_last)
                dl = DomainDL(data, bs=2 * half * k, shuffle=True, num_workers=0, **settings)
                batches = [b[0].tolist() for b in dl]
                assert len(batches) == len(dl) and (not drop_last or all(len(b) == dl.bs for b in batches))
                if not drop_last:
                    assert set(sum(batches, [])) == set(range(len(keys)))


def test_repeats(sites):
    dls = loaders(sites, repeats=3, domain="plate", bs=2)
    table = dls.train_ds.items
    rows = pd.Series(dls.train.get_idxs()).value_counts()
    assert rows.min() >= 3 and len(rows) == len(table)
    assert len(dls.train) == len(list(dls.train)) == sum(-(-3 * n // 2)
                                                         for n in table.groupby(["experiment", "plate"]).size())
    assert sorted(dls.valid.get_idxs()) == list(range(len(dls.valid_ds)))  # validation takes each once


def test_new_keeps_what_a_domain_loader_is(sites):
    dls = loaders(sites, domain="plate", seed=4, repeats=2)
    for dl in (dls.train.new(), dls.train.new(bs=3), dls.new(num_workers=0)):
        assert type(dl) is DomainDL and (dl.domain, dl.seed, dl.repeats, dl.shuffle) == ("plate", 4, 2, True)
    assert dls.train.new(bs=3).get_idxs() != dls.train.new(bs=3, seed=5).get_idxs()
    still = dls.train.new(shuffle=False)
    assert sorted(still.get_idxs()) == list(range(len(dls.train_ds))) and len(list(still)) == len(still)
    mixed = dls.valid.new(domain=None)
    assert mixed.get_idxs() == list(range(len(dls.valid_ds)))
    assert [len(b[0]) for b in dls.train.new(drop_last=True, bs=5, domain="experiment", repeats=1,
                                             shuffle=False)][0] == 5


# controls beside the sites


def in_parts(batch):
    "Parts of a batch: its treatments and the controls behind them; a part ends where a treatment follows a control"
    role = batch[1][:, 3].numpy() > 0
    ends = np.flatnonzero(role[:-1] & ~role[1:]) + 1
    return [(rows[~role[rows]], rows[role[rows]]) for rows in np.split(np.arange(len(role)), ends)]


def domain_columns(domain):
    return {None: [], "cell_type": [0], "experiment": [1], "plate": [1, 2]}[domain]


@pytest.mark.slow
@each("domain, workers, k", [(None, 0, 1), ("cell_type", 0, 1), ("experiment", 2, 2), ("plate", 0, 1)])
def test_controls_follow_the_sites_of_their_domain(sites, controls, domain, workers, k):
    settings = dict(domain=domain, num_workers=workers, bs=4, domains_per_batch=k, seed=3)
    dls, plain = loaders(sites, controls=controls, n_controls=3, **settings), loaders(sites, **settings)
    assert len(dls.train_ds) == dls.train.n == len(plain.train_ds) and len(dls.train) == len(plain.train)
    for dl, without in ((dls.train, plain.train), (dls.valid, plain.valid)):
        first, bare, n = list(dl), list(without.new(num_workers=0)), len(dl.dataset)
        dl.epoch, rows = 0, dl.new(num_workers=0).get_idxs()
        assert [r for r in rows if r < n] == without.new().get_idxs() and len(first) == len(dl) == len(bare)
        for b, w in zip(first, bare):
            treated = np.concatenate([t for t, _ in in_parts(b)])
            # the same sites in the same order
            assert torch.equal(b[0][treated], w[0]) and torch.equal(b[2][treated], w[2])
            for t, c in in_parts(b):
                roles = b[1][c, 3].tolist()
                assert len(c) == 3 and {1, 2} == set(roles) and (b[2][c] == MASKED).all() and (b[2][t] >= 0).all()
                assert len(set(map(tuple, b[1][np.append(t, c)][:, domain_columns(domain)].tolist()))) == 1
                assert len(b[0][c].flatten(1).unique(dim=0)) == 3  # all different
        again = dl.new(num_workers=0)
        # the same epoch again, without workers
        assert all(torch.equal(x, y) for p, q in zip(first, again) for x, y in zip(p, q))
    assert dls.valid.get_idxs() == dls.valid.get_idxs()  # validation is the same each time
    dls.train.epoch = 0
    drawn = [[r for r in dls.train.get_idxs() if r >= dls.train.n] for _ in range(2)]
    assert drawn[0] != drawn[1] and min(map(min, drawn)) >= len(dls.train_ds)


def test_few_controls_are_drawn_again(sites, controls):
    size = len(controls[(controls.experiment == "RPE-01") & (controls.plate == 1)])
    dl = loaders(sites, domain="plate", controls=controls, n_controls=size + 2).train
    for b in dl:
        (_, c), = in_parts(b)
        assert len(c) == size + 2 and len(b[0][c].flatten(1).unique(dim=0)) == size
    one = loaders(sites, domain="plate", controls=controls, n_controls=1).train
    assert {int(b[1][-1, 3]) for _ in range(3) for b in one} == {1, 2}
    negative = controls[controls.well_type == "negative_control"]
    assert all((b[1][-3:, 3] == 2).all() for b in loaders(sites, domain="plate", controls=negative, n_controls=3).train)


def test_targets_of_controls_are_masked_whatever_the_target(sites, controls):
    for target in ("cell_type", "plate"):
        dls = loaders(sites, target=target, controls=controls, n_controls=2)
        for dl in dls:
            _, context, y = dl.one_batch()
            assert y[-2:].tolist() == [MASKED] * 2 and (y[:-2] >= 0).all() and (context[-2:, 3] > 0).all()


def test_a_plate_without_controls_borrows_those_of_its_experiment(sites, controls):
    few = controls[(controls.experiment != "RPE-01") | (controls.plate != 2)]
    with pytest.warns(UserWarning,
                      match="plate 2 of RPE-01 has no controls; those of the whole experiment are used") as caught:
        dls = loaders(sites, domain="plate", controls=few, n_controls=2)
        dls.train.new(bs=4), list(dls.train)
    assert len([w for w in caught if "has no controls" in str(w.message)]) == 1
    b = next(b for b in dls.train if b[1][0, 1:3].tolist() == [2, 1])
    assert (b[1][-2:, 1] == 2).all() and (b[1][-2:, 2] != 1).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaders(sites, domain="experiment", controls=few, n_controls=2)


@each(
    "domain, gone, name",
    [
        ("plate", "RPE-02", "plate 1 of RPE-02"),
        ("experiment", "HUVEC-02", "experiment HUVEC-02"),
        ("cell_type", "RPE", "cell type RPE"),
        (None, "", "any domain"),
    ],
)
def test_a_domain_without_controls_is_named(sites, controls, domain, gone, name):
    with pytest.raises(ValueError, match=f"there are no controls for {name}; give their sites, or n_controls=0"):
        loaders(sites, domain=domain, controls=controls[~controls.experiment.str.startswith(gone)], n_controls=2)


def test_new_sites_have_no_controls_unless_asked_for(sites, controls, test_sites, tmp_path):
    dls = loaders(sites, domain="plate", controls=controls, n_controls=2, domains_per_batch=2)
    plain = dls.test_dl(test_sites)
    assert plain.n_controls == 0 and plain.controls is None and sorted(plain.get_idxs()) == list(range(len(test_sites)))
    for dl in (dls.test_dl(test_sites, n_controls=3),
               dls.test_dl(test_sites, n_controls=3, controls=controls, with_labels=True)):
        for b in dl:
            (t, c), = in_parts(b)
            assert len(c) == 3 and len(b[1][:, 1:3].unique(dim=0)) == 1 and (len(b) == 2 or (b[2][c] == MASKED).all())
    own, mixed = dls.train.new(shuffle=False), dls.train.new(domain=None)
    assert own.n_controls == 2 and own.controls is dls.train.controls
    assert mixed.controls.pools[0].tolist() == list(range(len(controls)))
    learn = learner(dls, path=tmp_path)
    learn.loss_func = CrossEntropyLossFlat(ignore_index=MASKED)
    with learn.no_logging():
        learn.fit(1, 1e-3)
    assert np.isfinite(learn.recorder.values[0]).all()
    preds, targets = learn.get_preds(ds_idx=1, reorder=True)  # the sites in their order, then the controls
    assert targets[: len(dls.valid_ds)].tolist() == dls.valid_ds.items.sirna.tolist()
    assert (targets[len(dls.valid_ds) :] == MASKED).all()
    learn.export("learner.pkl")
    assert load_learner(tmp_path / "learner.pkl").dls.train.n_controls == 0


def test_no_validation_set_with_controls(sites, controls):
    dls = loaders(sites, valid=None, controls=controls, n_controls=2)
    assert list(dls.valid) == [] and len(dls.train.one_batch()[0]) == 8


# several domains in a batch


@each("seed", range(20))
def test_several_domains(seed):
    keys, size, _ = random_domains(seed)
    n, parts = 1 + seed % 4, shuffled_domains(keys, size, seed)
    batches = several_domains(parts, keys, n, seed, 1)
    assert sorted(map(tuple, parts)) != [] and sorted(np.concatenate(sum(batches, []))) == sorted(np.concatenate(parts))
    assert len(batches) == -(-len(parts) // n)
    assert all(len({keys[i] for i in p}) == 1 for b in batches for p in b)
    assert all(len({keys[p[0]] for p in b}) == len(b) <= n for b in batches)
    most = np.bincount([keys[p[0]] for p in parts]).max()
    if most <= len(parts) // n:
        assert sum(len(b) < n for b in batches) <= 1  # n different ones, but for the batch that is left
    again, other = several_domains(parts, keys, n, seed, 1), several_domains(parts, keys, n, seed, 2)
    assert str(again) == str(batches) and (len(parts) < 8 or n == 1 or str(other) != str(batches))


def test_batches_of_two_experiments(sites):
    dls = loaders(sites, valid=None, bs=6, domains_per_batch=2)
    for b in dls.train:
        e = b[1][:, 1]
        assert len(e) == 6 and len(set(e[:3].tolist())) == len(set(e[3:].tolist())) == 1 and e[0] != e[3]
    assert all(len(b[1][:, 1].unique()) == 1 for b in dls.test_dl(sites))
    # as far as there are two
    lone = loaders(sites[sites.experiment == "RPE-01"], valid=None, bs=6, domains_per_batch=2).train
    assert {len(b[0]) for b in list(lone)[:1]} <= {3, 6} and len(lone) == len(list(lone))


# pairs


@each("seed", range(20))
def test_paired_sites(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 80))
    domains, experiments = rng.integers(0, 1 + seed % 3, n), rng.choice(list("ABCDE"), n, p=[0.4, 0.3, 0.1, 0.1, 0.1])
    targets = pd.Series(rng.integers(0, 6, n)).astype("Int64").mask(rng.random(n) < 0.1)
    pairs = paired_sites(domains, targets, experiments, seed, 2)
    table = pd.DataFrame(dict(d=domains, t=targets, e=experiments))
    assert set(pairs.ravel()) == set(range(n)) and (domains[pairs[:, 0]] == domains[pairs[:, 1]]).all()
    (a, b), known = pairs.T, targets.fillna(-1).to_numpy(int)
    good = (known[a] >= 0) & (known[a] == known[b]) & (experiments[a] != experiments[b])
    extra = 0
    for (_, _), g in table.dropna().groupby(["d", "t"]):
        if g.e.nunique() > 1:  # each of them has a partner, and no more than needed come twice
            assert set(g.index) <= set(pairs[good].ravel())
            extra += max(len(g) % 2, 2 * g.e.value_counts().max() - len(g))
    alone = table[~table.index.isin(pairs[good].ravel())]
    assert 2 * len(pairs) == n + extra + sum(alone.groupby("d").size() % 2)
    assert (pairs == paired_sites(domains, targets, experiments, seed, 2)).all()


@pytest.mark.parametrize("domain, workers, k", [(None, 2, 1), ("cell_type", 0, 1), ("cell_type", 0, 2)])
def test_batches_of_pairs(sites, controls, domain, workers, k):
    n_controls = 2 * (k > 1)
    settings = dict(num_workers=workers, domains_per_batch=k, controls=controls, n_controls=n_controls)
    dl = loaders(sites, valid=None, domain=domain, pairs=True, bs=8, **settings).train
    batches = list(dl)
    assert len(batches) == len(dl)
    for b in batches:
        for t, c in in_parts(b):
            context, y = b[1][t].numpy(), b[2][t].numpy()
            assert len(t) == 8 // k and len(c) == n_controls and (y[::2] == y[1::2]).all()
            # the only siRNA with a well in one experiment of each cell type alone
            lone = (y[::2] == 6) & (domain is not None)
            assert ((context[::2, 1] != context[1::2, 1]) != lone).all()
            if domain:
                assert len(set(context[:, 0])) == 1
    dl.epoch = 0
    seen = np.bincount([i for i in dl.get_idxs() if i < len(sites)], minlength=len(sites))
    # once, but for what fills the last batch of a domain
    assert seen.min() == 1 and seen.sum() - len(sites) <= 8 // k * 2


# images in memory


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_read_once(tmp_path, workers):
    settings = dict(n_sirnas=4, n_train=1, n_test=1, cell_types="RPE", image_size=16, workers=1, progress=False)
    screen = read_screen(simulate_screen(tmp_path, **settings))
    sites, controls = select_sites(screen), select_sites(screen, wells="controls")
    settings = (dict(valid=(sites.site == 2).to_numpy(), controls=controls, n_controls=len(controls),
                     domain="cell_type", bs=32))
    dls = loaders(sites, cache=True, num_workers=workers, **settings)
    dl = dls.test_dl(select_sites(screen, "test"))
    first = [x for loader in (dls.valid, dls.train.new(shuffle=False), dl) for x, *_ in loader]
    reader = dl.dataset.tls[0].tfms[-1]
    assert isinstance(reader, SiteReader) and pickle.loads(pickle.dumps(reader))._images == {}
    for p in Path(tmp_path).rglob("*.png"):
        p.unlink()
    for x in first:
        x.clone().zero_()
    again = [x for loader in (dls.valid, dls.train.new(shuffle=False), dl) for x, *_ in loader]
    assert all(torch.equal(a, b) and a.dtype == torch.uint8 for a, b in zip(first, again)) and len(first) == len(again)
    dls.train_ds[0][0].zero_()
    assert dls.train_ds[0][0].any()  # whoever changes an image changes a copy
    with pytest.raises(FileNotFoundError):
        loaders(sites, **settings).one_batch()


# from sites to DataLoaders


def test_a_batch(sites):
    dls = screen_dataloaders(sites, VALID, bs=6, device="cpu")
    x, context, y = dls.one_batch()
    assert type(x) is MultiChannelImage and x.dtype == torch.float32 and x.shape == (6, 6, 16, 16)
    assert type(context) is ScreenContext and context.dtype == y.dtype == torch.int64
    assert context.shape == (6, 4) and y.shape == (6,)
    assert dls.n_inp == dls.valid.n_inp == 2 and dls.c == 8
    assert set(dls.valid_ds.items.experiment) == {"HUVEC-02", "RPE-02"} and dls.valid.bs == 64


def test_pixels_are_those_of_the_files(sites):
    dls = loaders(sites)
    for i in (0, 7):
        x = dls.train_ds[i][0]
        assert x.dtype == torch.uint8
        np.testing.assert_array_equal(x.numpy(), read_site(dls.train_ds.items.files.iloc[i]))


def test_context_and_target_of_each_site(sites):
    dls = loaders(sites, valid=None, experiments=["RPE-02", "HUVEC-01", "RPE-01"], cell_types=["RPE", "HUVEC"])
    dl = dls.train.new(shuffle=False)
    context, y = torch.cat([b[1] for b in dl]), torch.cat([b[2] for b in dl])
    table = sites.iloc[dl.get_idxs()]
    numbers = {"RPE-02": 0, "HUVEC-01": 1, "RPE-01": 2, "HUVEC-02": -1}
    expected = [(int(c == "HUVEC"), numbers[e], p - 1) for c, e, p in zip(table.cell_type, table.experiment,
                                                                          table.plate)]
    assert context.tolist() == [[*e, 0] for e in expected] and y.tolist() == table.sirna.tolist()


def test_no_validation_set(sites):
    dls = loaders(sites, valid=None)
    assert len(dls.train_ds) == len(sites) and len(dls.valid_ds) == len(dls.valid) == 0 and list(dls.valid) == []


def test_a_mask_on_a_table_with_an_index_of_its_own(sites):
    some = sites.sample(frac=1, random_state=3)
    mask = (some.experiment == "RPE-02").to_numpy()
    dls = loaders(some, valid=mask)
    assert dls.valid_ds.items.site_id.tolist() == some.site_id[mask].tolist()
    assert dls.train_ds.items.site_id.tolist() == some.site_id[~mask].tolist()


def test_classes_may_be_given(sites):
    dls = loaders(sites, classes=np.arange(9)[::-1])
    assert list(dls.vocab) == list(range(8, -1, -1))
    b = dls.valid.one_batch()
    rows = dls.valid.get_idxs()[: len(b[2])]
    assert [dls.vocab[i] for i in b[2]] == dls.valid_ds.items.sirna.iloc[rows].tolist()


@each(
    "settings, message",
    [
        (dict(target="dose"), "target 'dose' is no column of the wells; there are id_code, "),
        (dict(classes=[0, 1, 2]), r"sirna \d of well \S+ is not among the 3 classes given"),
        (dict(valid="experiment=HUVEC-09"), "no well has experiment 'HUVEC-09'"),
        (dict(valid=np.ones(3, bool)), r"a validation mask of 3 rows for \d+ sites"),
        (dict(domain="well"), "domain is 'well', expected one of"),
        (dict(bs=0), "bs is 0, expected a batch size of 1 or more"),
        (dict(n_controls=2), "n_controls is 2, but there are no controls"),
        (dict(n_controls=-1), "n_controls is -1, expected 0 or more"),
        (dict(domains_per_batch=0), "domains_per_batch is 0, expected 1 or more"),
        (dict(domains_per_batch=4), "a batch of 6 sites cannot be cut into 4 equal parts"),
        (dict(pairs=True, domain="plate"), "pairs with domain 'plate': an experiment has no treatment twice"),
        (dict(pairs=True, domain=None, domains_per_batch=2),
         "pairs need an even number of sites per domain in a batch, not 3"),
    ],
)
def test_settings_that_cannot_be(sites, settings, message):
    with pytest.raises(ValueError, match=message):
        loaders(sites, **settings)


def test_masks_and_labels_that_cannot_be(sites, test_sites):
    with pytest.raises(ValueError, match="every site is in the validation set"):
        loaders(sites, valid=np.ones(len(sites), bool))
    one = sites[sites.sirna == 3].id_code.iloc[0]
    with pytest.raises(ValueError, match=f"sirna 3 of well {one} is in the validation set but in no training well"):
        loaders(sites, valid=(sites.sirna == 3).to_numpy())
    with pytest.raises(ValueError,
                       match=rf"sirna is unknown for all {len(test_sites)} training sites; choose other wells"):
        loaders(test_sites, valid=None)


def test_four_channels(sites):
    dls = screen_dataloaders(sites, VALID, bs=4, channels=(1, 2, 3, 5), device="cpu")
    assert dls.one_batch()[0].shape == (4, 4, 16, 16)
    x = dls.train_ds[0][0]
    np.testing.assert_array_equal(x.numpy(), read_site(dls.train_ds.items.files.iloc[0])[[0, 1, 2, 4]])
    dls.show_batch(max_n=2, colors=[(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
    assert SixChannelImageBlock().type_tfms[0].channels == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("layout", ["rxrx1", "wilds"])
def test_the_other_layouts(tmp_path, layout):
    rows, rng = [], np.random.default_rng(0)
    for e, dataset in (("HUVEC-01", "train"), ("HUVEC-02", "train"),
                       ("HUVEC-03", "val" if layout == "wilds" else "test")):
        for well, kind, sirna in (("B02", "negative_control", 1138), ("B03", "treatment", 5), ("B04", "treatment", 9)):
            for site in (1, 2):
                i = f"{e}_1_{well}"
                rows.append([f"{i}_{site}", i, "HUVEC", dataset, e, 1, well, site, kind, f"s{sirna}", sirna])
                folder = tmp_path / "images" / e / "Plate1"
                folder.mkdir(parents=True, exist_ok=True)
                if layout == "wilds":
                    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
                        folder / f"{well}_s{site}.png")
                else:
                    for c in range(1, 7):
                        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(
                            folder / f"{well}_s{site}_w{c}.png")
    columns = "site_id,well_id,cell_type,dataset,experiment,plate,well,site,well_type,sirna,sirna_id".split(",")
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "metadata.csv", index=False)
    screen = read_screen(tmp_path)
    assert screen.layout == layout
    sites = select_sites(screen, "train")
    assert len(sites) == (4 if layout == "wilds" else 8)
    dls = screen_dataloaders(sites, "experiment=HUVEC-02", bs=2, channels=screen.channels, transforms=[], device="cpu")
    x, context, y = dls.valid.one_batch()
    assert x.shape[1:] == ((3 if layout == "wilds" else 6), 8, 8) and list(dls.vocab) == [5, 9]
    np.testing.assert_array_equal(x[0].numpy(), read_site(dls.valid_ds.items.files.iloc[0], screen.channels))
    if layout == "wilds":
        assert len(select_sites(screen, "id_test")) == 4 and len(select_sites(screen, "val")) == 4


# predictions come back in the order of the table


@pytest.mark.slow
@each("domain, workers", LOADERS)
def test_get_preds_in_the_order_of_the_table(sites, test_sites, domain, workers):
    learn = learner(loaders(sites, domain=domain, num_workers=workers))
    preds, targets = learn.get_preds(dl=learn.dls.test_dl(test_sites), act=lambda x: x)
    means = lambda t: np.stack([read_site(f).mean((1, 2)) for f in t.files])
    np.testing.assert_allclose(preds[:, :6].numpy(), means(test_sites), rtol=1e-5)
    assert targets is None
    for i in (0, 1):
        preds, targets = learn.get_preds(ds_idx=i, act=lambda x: x)
        table = learn.dls.loaders[i].dataset.items
        np.testing.assert_allclose(preds[:, :6].numpy(), means(table), rtol=1e-5)
        assert targets.tolist() == table.sirna.tolist()


def test_labelled_and_unlabelled_test_sites(sites, test_sites):
    dls = loaders(sites, experiments=["HUVEC-03", "RPE-03"])
    assert len(dls.test_dl(test_sites).one_batch()) == 2
    dl = dls.test_dl(sites.sample(frac=1, random_state=5), with_labels=True)
    y = torch.cat([b[2] for b in dl])
    assert y.tolist() == dl.dataset.items.sirna.iloc[dl.get_idxs()].tolist()


def test_test_sites_of_two_experiments_do_not_share_a_batch_although_training_never_saw_them(sites, test_sites):
    dl = loaders(sites, domain="experiment").test_dl(test_sites)
    assert all(len({i.split("_")[0] for i in b}) == 1 for b in ids_of(dl, test_sites)) and len(dl) == len(list(dl))


# a Learner


def test_training_and_a_saved_learner(sites, test_sites, tmp_path):
    for domain in (None, "plate"):
        learn = learner(loaders(sites, domain=domain), path=tmp_path)
        with learn.no_logging():
            learn.fit(1, 1e-3)
        expected = learn.get_preds(dl=learn.dls.test_dl(test_sites))[0]
        learn.export("learner.pkl")
        again = load_learner(tmp_path / "learner.pkl")
        torch.testing.assert_close(again.get_preds(dl=again.dls.test_dl(test_sites))[0], expected)
        assert list(again.dls.vocab) == list(range(8)) and again.dls.train.domain == domain


def test_training_without_a_validation_set(sites):
    learn = learner(loaders(sites, valid=None))
    with learn.no_logging():
        learn.fit(1, 1e-3)
    assert np.isfinite(learn.recorder.values[0][0])


# pictures


def test_controls_are_titled_as_controls(sites, controls):
    dls = loaders(sites, controls=controls, n_controls=2, bs=4)
    dls.show_batch(max_n=6)
    assert all(t.startswith("siRNA ") and "control" not in t for t in titles()[:4])
    assert sorted(t.split("\n")[0] for t in titles()[4:]) == ["negative control", "positive control"]
    assert "plate" in titles()[4]
    dls.show_batch(max_n=3, unique=True)
    assert len(set(titles())) == 1
    b = dls.valid.one_batch()
    dls.valid.show_results(b, TensorCategory(b[2].clamp(min=0)), max_n=len(b[0]))
    assert "control\n" in titles()[-1] and "siRNA" not in titles()[-1] and "wrong" not in "".join(titles())
    everything = pd.concat([sites, controls[controls.experiment.isin(sites.experiment)]])
    # controls that are to be predicted keep their siRNA
    dl = loaders(everything, valid=None, bs=200, domain=None).train
    assert any(t.startswith("siRNA 9, negative control\n") for t in dl.titles(dl.decode(dl.one_batch())))


def titles():
    return [ax.get_title() for ax in plt.gcf().axes if ax.images]


def test_show_batch_says_what_a_person_wants_to_know(sites):
    dls = loaders(sites)
    b = dls.valid.one_batch()
    dls.valid.show_batch(b, max_n=4)
    expected = []
    for context, y in zip(b[1][:4].tolist(), b[2][:4].tolist()):
        cell_type, experiment = ["HUVEC", "RPE"][context[0]], ["HUVEC-01", "HUVEC-02", "RPE-01", "RPE-02"][context[1]]
        expected.append(f"siRNA {dls.vocab[y]}\n{cell_type}, {experiment}, plate {context[2] + 1}")
    assert titles() == expected
    rows = dls.valid.get_idxs()[:4]
    table = dls.valid_ds.items.iloc[rows]
    assert [f"siRNA {s}\n{c}, {e}, plate {p}" for s, c, e, p in zip(table.sirna, table.cell_type, table.experiment,
                                                                    table.plate)] == expected


def test_show_batch_of_standardised_and_unlabelled_sites(sites, test_sites):
    dls = screen_dataloaders(sites, VALID, bs=6, device="cpu")
    dls.show_batch(max_n=3)
    assert len(titles()) == 3 and all(t.startswith("siRNA ") for t in titles())
    dls.test_dl(test_sites).show_batch(max_n=2)
    assert len(titles()) == 2 and all("new experiment, plate" in t and "siRNA" not in t for t in titles())
    dls.test_dl(sites, with_labels=True).show_batch(max_n=1)
    assert titles()[0].startswith("siRNA ")
    loaders(sites, target="cell_type").show_batch(max_n=1)
    assert titles()[0].startswith("cell type ")


def test_show_batch_unique_shows_one_site(sites):
    dls = loaders(sites)
    dls.show_batch(max_n=4, unique=True)
    assert len(set(titles())) == 1 and len(titles()) == 4
    images = [ax.images[0].get_array() for ax in plt.gcf().axes if ax.images]
    assert all((x == images[0]).all() for x in images)


@pytest.mark.slow
def test_show_results_says_what_was_right(sites, test_sites):
    dls = loaders(sites)
    b = dls.valid.one_batch()
    right = b[2].clone()
    out = TensorCategory(torch.where(torch.arange(len(right)) == 0, (right + 1) % 8, right))
    dls.valid.show_results(b, out, max_n=3)
    first, second = titles()[:2]
    one, two, wrong = int(right[0]), int(right[1]), int(out[0])
    assert first.startswith(f"siRNA {one}, predicted {wrong} (wrong)\nHUVEC, HUVEC-02, plate 1")
    assert second.startswith(f"siRNA {two}, predicted {two}\nHUVEC, HUVEC-02, plate 1")
    learn = learner(dls)
    learn.show_results(max_n=2)
    assert len(titles()) == 2 and all("predicted" in t for t in titles())
    learn.show_results(dl=dls.test_dl(test_sites), max_n=2)  # without labels
    assert all(t.startswith("siRNA unknown, predicted ") and "wrong" not in t for t in titles())


# Whole batches, from files, from the cache and from a packed store


@pytest.fixture(scope="module")
def packed(small_screen, tmp_path_factory):
    from rcic_fastai.data.pack import pack_screen

    return pack_screen(read_screen(small_screen), tmp_path_factory.mktemp("store") / "packed", progress=False)


def item_by_item(dl):
    "The same loader, its items made one by one"
    dl._batch_source = lambda: None
    return dl


def assert_same_batches(a, b):
    a, b = list(a), list(b)
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        assert [type(o) for o in x] == [type(o) for o in y] and [o.dtype for o in x] == [o.dtype for o in y]
        assert all((torch.as_tensor(o) == torch.as_tensor(p)).all() for o, p in zip(x, y))


@pytest.mark.slow
@each("workers", [0, 2])
@each("kind", ["files", "cache", "store", "channels", "controls"])
def test_whole_batches_are_those_of_the_items(small_screen, packed, kind, workers):
    screen = read_screen(small_screen)
    settings = dict(bs=8, domain="plate", transforms=[], valid="experiment=HUVEC-02")
    if kind == "channels":
        settings["channels"] = (5, 1)
    if kind == "controls":
        settings.update(domain="experiment", controls=select_sites(screen, wells="controls"), n_controls=3)
    of_kind = dict(cache=dict(cache=True), store=dict(source=packed), channels=dict(source=packed.path),
                   controls=dict(source=packed)).get(kind, {})
    sites = select_sites(screen)
    ours, theirs = (screen_dataloaders(sites, num_workers=w, **settings, **k) for w, k in ((workers, of_kind), (0, {})))
    assert ours.train._batch_source() is not None
    for i in (0, 1):
        item_by_item(theirs[i])
        for _ in range(2):  # two epochs
            assert_same_batches(ours[i], theirs[i])
    test, other = (d.test_dl(sites.drop(columns="sirna")[:40]) for d in (ours, theirs))
    assert_same_batches(test, item_by_item(other))
    assert (ours.train.one_batch()[0].shape[1]) == (2 if kind == "channels" else 6)


def test_a_packed_screen_needs_no_source(packed, small_screen):
    ours, theirs = (screen_dataloaders(select_sites(read_screen(s)), bs=8, transforms=[])
                    for s in (packed.path, small_screen))
    assert ours.train._batch_source().store is not None and theirs.train._batch_source().store is None
    assert_same_batches(ours.train, theirs.train)


def test_batches_that_are_kept_stay_what_they_are(small_screen, packed):
    dl = screen_dataloaders(select_sites(read_screen(small_screen)), bs=8, transforms=[], source=packed,
                            num_workers=2).train
    kept = [(b[0], b[0].clone()) for b in dl for _ in range(1)]
    list(dl)
    assert all((a == b).all() for a, b in kept) and len({a.data_ptr() for a, _ in kept}) == len(kept)


def test_whoever_changes_items_gets_changed_items(small_screen):
    "Item transforms and transforms before collating switch whole batches off"
    from fasttransform import Transform

    class Half(Transform):
        def encodes(self, x: MultiChannelImage):
            return x[:, ::2, ::2]

    dls = screen_dataloaders(select_sites(read_screen(small_screen)), bs=8, transforms=[])
    cropped = dls.train.new(after_item=[Half()])
    assert cropped._batch_source() is None and cropped.one_batch()[0].shape == (8, 6, 24, 24)
    noted = dls.train.new(before_batch=[lambda b: b])
    assert noted._batch_source() is None and noted.one_batch()[0].shape == (8, 6, 48, 48)


def test_images_of_two_shapes(small_screen, tmp_path):
    import shutil

    from PIL import Image

    screen = read_screen(shutil.copytree(small_screen, tmp_path / "s"))
    sites = select_sites(screen)
    odd = sites.files[len(sites) // 2]
    for c in range(1, 7):
        Image.new("L", (40, 48)).save(odd.format(channel=c))
    with pytest.raises(ValueError, match=r"has 48 x 40, and a batch holds images of one size: read_size=40"):
        screen_dataloaders(sites, bs=8, transforms=[], num_workers=2)
    # not seen when they were made
    few = screen_dataloaders(sites[sites.files != odd], bs=8, transforms=[], num_workers=2).test_dl(sites)
    with pytest.raises(ValueError, match=r"shape \(6, 48, 40\), but the first site \(6, 48, 48\)"):
        list(few)


def test_memory_a_gpu_still_copies_is_not_used_again(monkeypatch):
    from rcic_fastai.data import loader as data

    class Event:
        made = []

        def __init__(self):
            self.done = False
            self.made.append(self)

        def record(self):
            pass

        def query(self):
            return self.done

    monkeypatch.setattr(torch.cuda, "Event", Event)
    moves = []
    monkeypatch.setattr(data, "to_device", lambda b, device, non_blocking=False: moves.append(non_blocking)
                        or [o.clone() for o in b])
    copies, cuda = data._HostCopies(), torch.device("cuda")
    batches = [(torch.zeros(2),) for _ in range(3)]
    for b in batches:
        copies.to_device(b, cuda)
    assert moves == [True] * 3 and [b for _, b in copies.running] == batches
    Event.made[0].done = Event.made[2].done = True  # the second is still copied, and the third after it
    copies.to_device(batches[0], cuda)
    assert len(copies.running) == 3 and copies.running[0][1] is batches[1]
    assert copies.to_device(batches[0], None) is batches[0]


def test_loaders_of_a_screen_and_fastai_names(screen, sites, monkeypatch):
    "A screen says its sites, channels and target; keyword arguments win; names and values of fastai are told ours"
    own = screen_dataloaders(screen, valid=VALID, transforms=[], device="cpu")
    assert len(own.train_ds) + len(own.valid_ds) == len(sites)
    assert own.vocab == screen_dataloaders(sites, valid=VALID).vocab
    encoder = own.train._transform(ContextEncoder)
    assert encoder.experiments == screen.experiments and encoder.cell_types == screen.cell_types
    few = screen_dataloaders(screen, channels=(1, 3), target="cell_type", experiments=screen.experiments[::-1],
                             device="cpu")
    assert few.one_batch()[0].shape[1] == 2 and few.vocab == screen.cell_types
    assert few.train._transform(ContextEncoder).experiments == screen.experiments[::-1]
    for name, said in (("batch_tfms", "transforms="), ("item_tfms", "read_size="), ("valid_pct", "valid='well=0/5'"),
                       ("splitter", "valid="), ("tranforms", "did you mean 'transforms'")):
        with pytest.raises(TypeError, match=f"screen_dataloaders has no '{name}'.*{said}"):
            screen_dataloaders(screen, **{name: None})
    for valid, said in ((0.25, "well=0/4"), (["HUVEC-02"], "a mask with True for each validation row"),
                        (3, "experiment=NAME")):
        with pytest.raises(ValueError, match=f"valid is .*{said}"):
            screen_dataloaders(screen, valid=valid)
    with pytest.raises(ValueError, match=r"read_screen\('data/rcic'\)"):
        screen_dataloaders("data/rcic")


@pytest.mark.parametrize("channels", [None, ["DAPI", "ER"]])
def test_channels_that_are_not_there(sites, channels):
    "Other files of the site are named, where there are some"
    files = sites.files if channels else sites.files.astype(str).str.replace("_w{channel}", "_{channel}", regex=False)
    with pytest.raises(FileNotFoundError,
                       match=r"of this site there are \w+_s1_w1.png, .*: say which channels those are, "
                       r"channels=screen.channels"):
        screen_dataloaders(sites.assign(files=files), channels=channels, device="cpu").one_batch()
    with pytest.raises(FileNotFoundError, match=r"nowhere_1.png does not exist$"):
        screen_dataloaders(sites.assign(files="nowhere_{channel}.png"), device="cpu").one_batch()


@pytest.mark.slow
def test_transforms_of_fastai(sites):
    "They want floats, which integers become first; pictures in one row"
    from fastai.vision.augment import aug_transforms

    dls = screen_dataloaders(sites, valid=VALID, transforms=aug_transforms(), device="cpu")
    x = dls.one_batch()[0]
    assert x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1.5
    assert screen_dataloaders(sites, transforms=[], device="cpu").one_batch()[0].dtype == torch.uint8
    dls.show_batch(max_n=4, nrows=1)
    assert len({ax.get_position().y0.round(3) for ax in plt.gcf().axes}) == 1 and len(plt.gcf().axes) == 4
