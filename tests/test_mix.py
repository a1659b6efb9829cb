"""MixUp, CutMix and LISA: who is mixed with whom, exact weights, targets and contexts, the callbacks in a Learner,
and fastai's own ones there."""
import copy
from dataclasses import replace

import numpy as np
import pytest
from cases import each
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner, nn
from fastai.callback.all import CSVLogger, CutMix, GradientAccumulation, GradientClip, MixUp, ReduceLROnPlateau
from fastai.callback.all import TerminateOnNaNCallback
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.mixup import MixHandler
from fastai.callback.progress import ProgressCallback  # noqa: F401  brings Learner.no_bar
from fastai.losses import FocalLoss, FocalLossFlat, LabelSmoothingCrossEntropy, LabelSmoothingCrossEntropyFlat
from fastai.metrics import accuracy
from fastai.torch_core import TensorBase, TensorCategory, TensorImage

from rcic_fastai.data.select import select_sites
from rcic_fastai.loss.single import AMSoftmaxLoss, ArcFaceLoss, OneHotBCELoss
from rcic_fastai.data.context import MixedContext, cell_type_weights, plain
from rcic_fastai.train.mix import LISA, MixedLoss, ScreenCutMix, ScreenMixUp, context_domains, create_mix
from rcic_fastai.train.mix import cutmix_images, heavier_class, lisa_partners, mix_partners, mix_targets, mixup_images
from rcic_fastai.train.mix import refuse_plain_mix
from rcic_fastai.recipe.published import change_recipe, small_resnet
from rcic_fastai.screen.read import read_screen
from rcic_fastai.recipe.settings import ModelSettings, Recipe
from rcic_fastai.train.loaders import recipe_dataloaders
from rcic_fastai.train.learner import screen_learner

# two cell types, three experiments (two of cell type 0), two plates each; siRNAs 0-2 on every plate, and a control for
# the statistics
CONTEXT = torch.tensor([[e//2, e, p, 2*(s < 0)] for e in range(3) for p in range(2) for s in (0, 1, 2, -1)])
Y = torch.tensor([0, 1, 2, -1]*6)
B, K, ROWS, MASKED = 24, 3, torch.arange(24), Y < 0


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)

@pytest.fixture
def x(): return torch.randn(B, 6, 12, 20)


# Partners

@each('within,columns', [(None, []), ('cell_type', [0]), ('experiment', [1]), ('plate', [1, 2])])
def test_partners_are_a_permutation_of_the_unmasked_rows_of_a_group(within, columns):
    seen = torch.zeros(B, B, dtype=torch.bool)
    for _ in range(400):
        partner = mix_partners(Y, context_domains(CONTEXT, within))
        assert torch.equal(partner.sort().values, ROWS) and torch.equal(partner[MASKED], ROWS[MASKED])
        seen[ROWS, partner] = True
    same = (CONTEXT[:, None, columns] == CONTEXT[:, columns]).all(2)
    allowed = same & ~MASKED[:, None] & ~MASKED
    assert torch.equal(seen, allowed | torch.eye(B, dtype=torch.bool))  # all of its group can come up, and nobody else

def test_partners_are_drawn_evenly():
    partners = torch.stack([mix_partners(torch.zeros(5, dtype=torch.long)) for _ in range(3000)])
    shares = torch.stack([(partners == i).float().mean(0) for i in range(5)])
    assert (shares-.2).abs().max() < .03

def test_a_domain_is_a_number_even_with_unknown_names():
    context = torch.tensor([[-1, -1, 0], [-1, 0, 0], [0, -1, 1], [0, 0, -1], [0, 0, 0]])
    assert len(context_domains(context, 'plate').unique()) == 4
    assert torch.equal(context_domains(MixedContext(context, context.flip(0), torch.ones(5)), 'experiment'),
                       context[:, 1])

def test_lisa_takes_the_same_target_of_another_experiment():
    for groups in (None, CONTEXT[:, 0]):
        seen = torch.zeros(B, B, dtype=torch.bool)
        for _ in range(300): seen[ROWS, lisa_partners(Y, CONTEXT[:, 1], groups)] = True
        fits = (Y[:, None] == Y) & (CONTEXT[:, None, 1] != CONTEXT[:, 1]) & ~MASKED[:, None]
        if groups is not None: fits &= groups[:, None] == groups
        alone = ~fits.any(1)
        # masked; with groups, the only experiment of its cell type too
        assert alone.sum() == (6 if groups is None else 12)
        assert torch.equal(seen, fits | torch.diag(alone))


# Images, targets, contexts

def test_mixup_is_the_weighted_sum(x):
    partner, weight = mix_partners(Y), torch.rand(B)
    for kind in (TensorImage, torch.Tensor):
        out = mixup_images(x.as_subclass(kind), partner, weight)
        w = weight[:, None, None, None]
        assert type(out) is kind
        torch.testing.assert_close(out.as_subclass(torch.Tensor), w*x + (1-w)*x[partner])
    assert torch.equal(out[MASKED], x[MASKED])  # to the bit
    half = mixup_images(x.half(), partner, weight)
    assert half.dtype == torch.float16
    with pytest.raises(ValueError, match='torch.uint8, expected float'): mixup_images(x.byte(), partner, weight)

def test_cutmix_boxes_and_their_exact_weight():
    n, h, w = 4000, 16, 24
    x = torch.arange(n)[:, None, None, None].expand(n, 2, h, w)
    partner, drawn = torch.arange(n).roll(1), torch.rand(n)
    drawn[:2] = torch.tensor([1., 0.])
    out, weight = cutmix_images(x, partner, drawn)
    foreign = (out == partner[:, None, None, None]).all(1)
    assert torch.equal(out[:, 0], out[:, 1]) and out.dtype == x.dtype
    torch.testing.assert_close(weight, 1-foreign.float().mean((1, 2)), rtol=0, atol=1e-6)
    rows, cols = foreign.any(2), foreign.any(1)
    assert torch.equal(foreign, rows[:, :, None] & cols[:, None])  # a rectangle
    for line in (rows, cols): assert (line.int().diff(dim=1).abs().sum(1) <= 2).all()  # in one piece
    assert weight[0] == 1 and weight[1] < .8 and (weight >= drawn-.1).all()
    # a side of share s around a uniform centre keeps s - s²/4 of itself on average
    share = (1-drawn).sqrt()
    assert abs((1-weight).mean() - ((share - share**2/4)**2).mean()) < .01
    assert foreign.float().mean(0).std() < .09  # reaches the borders too, though less

def test_targets_are_the_mix_and_masked_rows_empty():
    partner, weight = mix_partners(Y), torch.rand(B)
    soft = mix_targets(TensorCategory(Y), partner, weight, K)
    for i in range(B):
        want = torch.zeros(K)
        if Y[i] >= 0: want[Y[i]] += weight[i]; want[Y[partner[i]]] += 1-weight[i]
        torch.testing.assert_close(soft[i], want)
    with pytest.raises(ValueError, match='target 2 at row 2 is outside the 2 classes'):
        mix_targets(Y, partner, weight, 2)

@pytest.mark.parametrize('loss', [AMSoftmaxLoss(gamma=2., smoothing=.1), ArcFaceLoss(), OneHotBCELoss()], ids=str)
def test_a_mixed_row_costs_the_mix_of_its_two_losses(loss):
    cosines, partner, weight = torch.rand(B, K)*2-1, mix_partners(Y), torch.rand(B)
    loss.reduction = 'none'
    want = weight*loss(cosines, Y) + (1-weight)*loss(cosines, Y[partner])
    torch.testing.assert_close(loss(cosines, mix_targets(Y, partner, weight, K)), want, rtol=1e-4, atol=1e-5)

def test_mixed_context():
    mixed = MixedContext(CONTEXT, CONTEXT.roll(7, 0), torch.rand(B))
    part = mixed.to('cpu')[Y == 1]
    assert len(mixed) == B and len(part) == 6 and torch.equal(part.other, CONTEXT.roll(7, 0)[Y == 1])
    assert part.weight.dtype == torch.float32
    weights = cell_type_weights(mixed, 2)
    torch.testing.assert_close(weights.sum(1), torch.ones(B))
    torch.testing.assert_close(weights[:, 0],
                               mixed.weight*(CONTEXT[:, 0] == 0) + (1-mixed.weight)*(mixed.other[:, 0] == 0))
    assert cell_type_weights(torch.tensor([[-1, 0, 0], [2, 0, 0]]).as_subclass(TensorBase),
                             3).tolist() == [[0, 0, 0], [0, 0, 1]]
    with pytest.raises(ValueError, match='row 16 has cell type 1, but the head knows 1'): cell_type_weights(mixed, 1)
    with pytest.raises(ValueError, match=r'expected \(B, 4\) twice'): MixedContext(CONTEXT, CONTEXT[:5], torch.rand(B))


# In a Learner

class Net(nn.Module):
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(6, K, 3); self.cell_type = nn.Linear(2, K)
    def forward(self, x, context):
        return self.conv(x.as_subclass(torch.Tensor)).mean((2, 3)) + self.cell_type(cell_type_weights(context, 2))

class Seen(Callback):
    "What the network and the loss got"
    order = ScreenMixUp.order+1
    def before_fit(self): self.batches = []
    def before_batch(self): self.batches.append((*self.xb, *self.yb))

def fit(x, mix, cbs=(), context=CONTEXT, y=Y, n=3):
    batches = [(TensorImage(x), context.as_subclass(TensorBase), TensorCategory(y))]*n
    dls = DataLoaders(DataLoader(batches, bs=None), DataLoader(batches[:1], bs=None), device='cpu')
    dls.n_inp, dls.c = 2, K
    learn = Learner(dls, Net(), loss_func=AMSoftmaxLoss(m=.1, s=5.), cbs=[mix, Seen(), *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return learn

@pytest.mark.parametrize('mix', [ScreenMixUp(within='experiment'), ScreenCutMix(within='experiment')], ids=repr)
def test_training_batches_are_mixed_and_validation_is_not(x, mix):
    learn = fit(x, mix)
    *train, (vx, vc, vy) = learn.seen.batches
    assert torch.equal(vx, x) and torch.equal(vc, CONTEXT) and torch.equal(vy, Y)
    for image, context, soft in train:
        assert type(context.context) is torch.Tensor and torch.equal(context.context, CONTEXT)
        assert torch.equal(context.other[:, 1], CONTEXT[:, 1]) and torch.equal(context.other[MASKED], CONTEXT[MASKED])
        assert torch.equal(image[MASKED], x[MASKED]) and (context.weight[MASKED] == 1).all() and not soft[MASKED].any()
        assert torch.equal((image != x).flatten(1).any(1), context.weight < 1) and (context.weight < 1).sum() > 5
        torch.testing.assert_close(soft.sum(1), (~MASKED).float())
        assert (soft.gather(1, Y.clamp_min(0)[:, None])[~MASKED, 0] >= context.weight[~MASKED]-1e-6).all()
    assert not torch.equal(train[0][0], train[1][0])

def test_lisa_keeps_hard_targets(x):
    learn = fit(x, LISA(p=1., within='cell_type'))
    for image, context, y in learn.seen.batches[:-1]:
        moved = context.weight < 1
        assert torch.equal(y, Y) and torch.equal(moved, (CONTEXT[:, 0] == 0) & ~MASKED)
        assert (context.other[moved, 1] != CONTEXT[moved, 1]).all() and torch.equal(image[~moved], x[~moved])

def test_lisa_says_that_it_needs_several_experiments(x):
    one = CONTEXT*torch.tensor([1, 0, 1, 1])
    with pytest.warns(UserWarning, match='put several experiments into a batch'): fit(x, LISA(), context=one)

def test_share_of_mixed_images_and_none(x):
    learn = fit(x, ScreenMixUp(p=.3, alpha=1.), n=60)
    share = torch.cat([c.weight[~MASKED] < 1 for _, c, _ in learn.seen.batches[:-1]]).float().mean()
    assert abs(share-.3*17/18) < .05
    image, context, y = fit(x, ScreenMixUp(p=0.)).seen.batches[0]
    assert torch.equal(image, x) and isinstance(context, torch.Tensor) and torch.equal(y, Y)

def test_the_state_of_torch_resumes_the_mixes(x):
    state = torch.get_rng_state()
    first = fit(x, ScreenCutMix(p=.7)).seen.batches
    torch.rand(5)
    torch.set_rng_state(state)
    again = fit(x, ScreenCutMix(p=.7)).seen.batches
    for (a, c, s), (b, d, t) in zip(first[:-1], again[:-1]):
        assert torch.equal(a, b) and torch.equal(c.weight, d.weight) and torch.equal(s, t)

def test_mixed_precision_and_masked_batches(x):
    class Bfloat(MixedPrecision):
        def before_fit(self):
            self.learn.scaler, self.scales = torch.amp.GradScaler('cpu', enabled=False), []
            self.autocast = torch.autocast('cpu', torch.bfloat16)
    for y in (Y, torch.full((B,), -1)):
        learn = fit(x, ScreenCutMix(), [Bfloat()], y=y)
        assert torch.stack(learn.recorder.losses).isfinite().all()
        assert all(p.isfinite().all() for p in learn.model.parameters())

def test_settings_and_batches_that_cannot_be_mixed(x):
    for kwargs, message in [(dict(name='mix_up'), "did you mean 'mixup'"),
                            (dict(name='cutmix', alpha=0.), 'alpha is 0.0'),
                            (dict(name='mixup', p=2.), 'p is 2.0'),
                            (dict(name='lisa', within='experiment'), "expected one of None, 'cell_type'"),
                            (dict(name='mixup', within='well'), "'experiment', 'plate'")]:
        with pytest.raises(ValueError, match=message): create_mix(**kwargs)
    mix = create_mix('lisa', alpha=.5)
    assert (mix.alpha, mix.p, mix.within) == (.5, .5, None) and create_mix('cutmix', within='plate').alpha == 1.
    class Second(ScreenMixUp): order = 61
    with pytest.raises(ValueError, match='mixes them already'): fit(x, ScreenMixUp(), [Second()])


# fastai's own callbacks and losses on the learner of a screen

RECIPE = change_recipe(replace(Recipe(), model=ModelSettings(**small_resnet)), 'data.batch_size=16', 'data.cache=true',
                       'device.precision=fp32')


@pytest.fixture(scope='module')
def dls(small_screen):
    return recipe_dataloaders(select_sites(read_screen(small_screen)), RECIPE, valid='experiment=HUVEC-03')


def epoch(learn, cbs=None):
    "Losses and metrics of an epoch"
    learn.dls.train.epoch = 0
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3, cbs=cbs)
    return learn.recorder.values[-1]


class OwnMix(MixHandler): pass


@pytest.mark.slow
@each('theirs,ours', [(MixUp(), "use ScreenMixUp() or create_mix('mixup')"), (CutMix, "use ScreenCutMix() or "
                                                                              "create_mix('cutmix')"),
                                         (CutMix(alpha=.3), 'ScreenCutMix'), (OwnMix(), 'ScreenMixUp'),
                      ([GradientClip(1.), MixUp()], 'ScreenMixUp')])
def test_fastais_mixing_is_refused_and_leaves_no_trace(dls, theirs, ours):
    learn = screen_learner(dls, RECIPE)
    before, loss = [type(cb) for cb in learn.cbs], learn.loss_func
    for how in (lambda: learn.fit(1, cbs=theirs), lambda: learn.fit_one_cycle(1, cbs=theirs),
                lambda: learn.fine_tune(1, cbs=theirs),
                lambda: learn.add_cbs(theirs), lambda: screen_learner(dls, RECIPE, cbs=theirs)):
        with pytest.raises(ValueError) as e: how()
        assert ours in str(e.value) and 'cannot mix a batch that has a context next to the image' in str(e.value)
        assert str(e.value).count('.') == 0
        learn.unfreeze()
    assert [type(cb) for cb in learn.cbs] == before and learn.loss_func is loss
    torch.manual_seed(1); first = epoch(learn, [create_mix('mixup')])
    assert np.isfinite(first).all() and epoch(learn)[0] < 50


def test_other_callbacks_are_not_refused():
    refuse_plain_mix([ScreenMixUp(), LISA, GradientClip, Callback()]); refuse_plain_mix(None)


@pytest.mark.slow
@each('cb', [lambda: GradientAccumulation(32), lambda: GradientClip(.1), MixedPrecision,
             lambda: [CSVLogger(), TerminateOnNaNCallback()],
                                lambda: ReduceLROnPlateau('valid_loss')])
def test_fastais_callbacks_train_and_leave_the_learner_as_it_was(dls, cb, tmp_path):
    learn = screen_learner(dls, RECIPE, path=tmp_path)
    loss, before = learn.loss_func, {type(c) for c in learn.cbs}
    assert np.isfinite(epoch(learn, cb())).all() and np.isfinite(epoch(learn)).all()
    assert learn.loss_func is loss and {type(c) for c in learn.cbs} == before


@pytest.mark.parametrize('loss', [LabelSmoothingCrossEntropy, CrossEntropyLossFlat, FocalLossFlat])
def test_losses_of_fastai(dls, loss):
    learn = screen_learner(dls, RECIPE, loss_func=loss())
    assert np.isfinite(epoch(learn)).all() and learn.get_preds()[0].sum(1).sub(1).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('settings',
                         [['device.precision=fp32'], ['device.precision=bf16'],
                          ['data.domains_per_batch=2', 'device.precision=fp32']])
def test_a_network_that_was_trained_is_exported_copied_and_traced(dls, settings):
    recipe = change_recipe(RECIPE, *settings)
    learn = screen_learner(recipe_dataloaders(dls.train_ds.items, recipe), recipe)
    epoch(learn)
    model = learn.model.eval()
    x, c, _ = (o.as_subclass(torch.Tensor) for o in dls.valid.one_batch())
    with torch.no_grad(), pytest.warns():
        wanted, traced = model(x, c), torch.jit.trace(model, (x, c))
    for other in (torch.export.export(model, (x, c), strict=False).module(), traced, copy.deepcopy(model)):
        torch.testing.assert_close(other(x, c).detach(), wanted, rtol=1e-5, atol=1e-5)


LOSSES_OF_FASTAI = [CrossEntropyLossFlat(), LabelSmoothingCrossEntropyFlat(), FocalLossFlat(),
                    LabelSmoothingCrossEntropy(), FocalLoss(), CrossEntropyLossFlat(weight=torch.arange(1., 9)),
                    nn.CrossEntropyLoss()]


# every loss with one of the three, and every one of the three with fastai's own loss
@pytest.mark.slow
@each('mix, loss', [*((ScreenMixUp, loss) for loss in LOSSES_OF_FASTAI),
                    *((mix, LOSSES_OF_FASTAI[0]) for mix in (ScreenCutMix, LISA))], ids=repr)
def test_mixing_with_losses_of_fastai(dls, mix, loss):
    "A fit with them, metrics of fastai next to it; the loss is the own one afterwards"
    learn = screen_learner(dls, 'resnet10t', loss_func=loss, cbs=mix(), metrics=accuracy)
    values = epoch(learn)
    assert np.isfinite(values).all() and learn.loss_func is loss and getattr(loss, 'reduction', 'mean') == 'mean'
    learn.recorder.train_metrics = True
    assert len(epoch(learn)) == len(values)+1  # the accuracy in training


@each('loss', [CrossEntropyLossFlat(), LabelSmoothingCrossEntropyFlat(), FocalLossFlat(),
               CrossEntropyLossFlat(reduction='sum')], ids=repr)
def test_mixed_loss_is_the_mean_of_both(loss):
    torch.manual_seed(0)
    logits, w = torch.randn(5, 4), torch.rand(5)
    y, other = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 1, 0, 2, 3])
    hot = torch.eye(4)
    soft = hot[y]*w[:, None] + hot[other]*(1-w[:, None])
    each = [type(loss)(reduction='none')(logits, t) for t in (y, other)]
    want = w*each[0] + (1-w)*each[1]
    mixed = MixedLoss(loss)
    torch.testing.assert_close(plain(mixed(logits, soft)),
                               plain(want.sum() if loss.reduction == 'sum' else want.mean()))
    torch.testing.assert_close(plain(mixed(logits, y)), plain(loss(logits, y)))
    assert mixed.reduction == loss.reduction and torch.equal(mixed.decodes(logits), loss.decodes(logits))
    assert copy.deepcopy(mixed).loss is not loss


def test_masked_rows_have_no_part_in_a_mixed_loss():
    logits, soft = torch.randn(3, 4), torch.tensor([[.5, .5, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]])
    torch.testing.assert_close(plain(MixedLoss(CrossEntropyLossFlat())(logits, soft)),
                               plain(MixedLoss(CrossEntropyLossFlat())(logits[[0, 2]], soft[[0, 2]])))
    assert heavier_class(soft).tolist() == [0, -1, 2]
