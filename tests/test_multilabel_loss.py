"Multi-label losses against float64 loops in NumPy and against timm; what all losses share is in `test_contracts`."
import copy
import itertools

import numpy as np
import pytest
from cases import each
import timm.loss
import torch

from rcic_fastai.loss.by_name import create_loss, losses
from rcic_fastai.loss.multi import AsymmetricLoss, ClasswiseLoss, FocalLovaszLoss, HardNegativeLoss, LovaszHingeLoss
from rcic_fastai.loss.multi import LSEPLoss, MultiLabelBCELoss, MultiLabelFocalLoss, lovasz_hinge
from rcic_fastai.loss.by_name import multilabel_losses

B,K = 9,5
LOSSES = [MultiLabelBCELoss(), MultiLabelBCELoss(smoothing=.1, pos_weight=[1, 2, 3, 4, .5], class_reduction='sum'),
          MultiLabelFocalLoss(), MultiLabelFocalLoss(gamma=.5, alpha=.25, class_reduction='sum'),
          MultiLabelFocalLoss(gamma=1, alpha=[.1, .2, .3, .4, .5]),
          HardNegativeLoss(), HardNegativeLoss(.3), LSEPLoss(), LovaszHingeLoss(), FocalLovaszLoss(),
          FocalLovaszLoss(.3, hard_negative=.5, class_reduction='mean'),
          AsymmetricLoss(), AsymmetricLoss(gamma_neg=3, gamma_pos=0, clip=0, class_reduction='sum')]
each_loss = each('loss', LOSSES, ids=str)
classwise = [loss for loss in LOSSES if isinstance(loss, ClasswiseLoss)]

@pytest.fixture
def x(): return torch.from_numpy(np.random.default_rng(0).normal(0, 2, (B, K)))

@pytest.fixture
def y():
    "Hard targets; row 1 has no positive, row 2 no negative, class 4 no positive but there"
    t = (np.random.default_rng(1).random((B, K)) < .4).astype(float)
    t[:,4],t[1],t[2] = 0,0,1
    return torch.from_numpy(t)

@pytest.fixture
def soft(): return torch.from_numpy(np.random.default_rng(2).random((B, K)))

def as_(loss, reduction):
    loss = copy.deepcopy(loss); loss.reduction = reduction
    return loss

# ---- the formulas, one number at a time

def sigmoid(x): return 1/(1+np.exp(-x))

def one_class(loss, x, y, k):
    "Loss of class `k` with logit `x` and target `y`"
    p = sigmoid(x)
    pick = lambda v: v[k] if isinstance(v, list) else v
    if isinstance(loss, AsymmetricLoss):
        q = min(1-p+loss.clip, 1)
        pt = p*y + q*(1-y)
        return -(y*np.log(p) + (1-y)*np.log(q)) * (1-pt)**(loss.gamma_pos*y + loss.gamma_neg*(1-y))
    if isinstance(loss, MultiLabelFocalLoss):
        a,b = (1, 1) if loss.alpha is None else (pick(loss.alpha), 1-pick(loss.alpha))
        return -a*y*(1-p)**loss.gamma*np.log(p) - b*(1-y)*p**loss.gamma*np.log(1-p)
    if loss.smoothing: y = y + loss.smoothing*(.5-y)
    return -(1 if loss.pos_weight is None else pick(loss.pos_weight))*y*np.log(p) - (1-y)*np.log(1-p)

def jaccard_loss(wrong, true):
    "1 - J of a set `true` when exactly the elements of `wrong` are mistaken"
    called = true ^ wrong
    return 1 - len(called & true)/len(called | true) if called | true else 0.

def lovasz(x, true):
    """Lovász extension by its definition: the errors, weighed by what the Jaccard loss of a growing set of mistakes
    gains"""
    errors = {i: 1-v if i in true else 1+v for i,v in enumerate(x)}
    total,wrong = 0.,set()
    for i in sorted(errors, key=errors.get, reverse=True):
        total += max(errors[i], 0)*(jaccard_loss(wrong | {i}, true) - jaccard_loss(wrong, true))
        wrong = wrong | {i}
    return total

def hard_negatives(x, y, share):
    nll = [-np.log(sigmoid(v if t else -v)) for v,t in zip(x, y)]
    negatives = sorted((v for v,t in zip(nll, y) if not t), reverse=True)
    return np.mean([v for v,t in zip(nll, y) if t] + negatives[:int(np.ceil(share*len(negatives)))])

def expected(loss, x, y):
    "The mean loss of a batch without masked rows"
    if isinstance(loss, FocalLovaszLoss):
        return ((1-loss.weight)*expected(MultiLabelFocalLoss(loss.gamma, class_reduction=loss.class_reduction), x, y)
                + loss.weight*expected(LovaszHingeLoss(), x, y) + loss.hard_negative*expected(HardNegativeLoss(), x, y))
    if isinstance(loss, HardNegativeLoss):
        return np.mean([hard_negatives(x[:,k], y[:,k], loss.share) for k in range(x.shape[1])])
    if isinstance(loss, LSEPLoss):
        return np.mean(
            [np.log(1 + sum(np.exp(r[n]-r[p]) for n in range(len(r)) for p in range(len(r)) if t[p] > .5 > t[n]))
             for r,t in zip(x, y)])
    if isinstance(loss, LovaszHingeLoss):
        sets = lambda t: set(np.flatnonzero(t).tolist())
        return np.mean([(lovasz(x[:,k], sets(y[:,k])) + lovasz(-x[:,k], sets(1-y[:,k])))/2 for k in range(x.shape[1])])
    rows = [[one_class(loss, v, t, k) for k,(v,t) in enumerate(zip(r, ts))] for r,ts in zip(x, y)]
    return getattr(np, loss.class_reduction)(rows, 1).mean()

@each_loss
def test_hard_targets_match_numpy(loss, x, y):
    tolerance = 1e-5 if isinstance(loss, AsymmetricLoss) else 1e-10 # timm computes in float32
    np.testing.assert_allclose(loss(x, y), expected(loss, x.numpy(), y.numpy()), rtol=tolerance)
    torch.testing.assert_close(loss.activation(x), torch.from_numpy(sigmoid(x.numpy())))

@each('loss', classwise, ids=str)
def test_soft_targets_match_numpy(loss, x, soft):
    np.testing.assert_allclose(loss(x, soft), expected(loss, x.numpy(), soft.numpy()),
                               rtol=1e-5 if isinstance(loss, AsymmetricLoss) else 1e-10)

@pytest.mark.parametrize('loss', [LSEPLoss(), LovaszHingeLoss(), HardNegativeLoss(1.)], ids=str)
def test_comparisons_take_sides_at_one_half(loss, x, soft):
    if not isinstance(loss, HardNegativeLoss): torch.testing.assert_close(loss(x, soft), loss(x, (soft > .5).double()))
    else: torch.testing.assert_close(loss(x, soft), MultiLabelBCELoss()(x, soft))

def test_an_undecided_target_takes_no_side(x, y):
    undecided = y.clone(); undecided[:,0] = .5
    torch.testing.assert_close(LSEPLoss()(x, undecided), LSEPLoss()(x[:,1:], y[:,1:]))
    one = y.clone(); one[3,2] = .5 # one image of class 2
    rest = [i for i in range(B) if i != 3]
    torch.testing.assert_close(LovaszHingeLoss()(x[:,[2]], one[:,[2]]),
                               LovaszHingeLoss()(x[rest][:,[2]], y[rest][:,[2]]))
    moved = x.clone(); moved[3,2] += 7
    assert LovaszHingeLoss()(moved, one) == LovaszHingeLoss()(x, one)

# ---- each by its own property

def test_lsep_at_any_scale():
    x = torch.tensor([[100., -100, 100], [-100, 100, 0], [1e4, -1e4, 0]], dtype=torch.float64)
    y = torch.tensor([[0., 1, 0], [0, 1, 0], [0, 1, 0]])
    np.testing.assert_allclose(as_(LSEPLoss(), 'none')(x, y),
                               [200+np.log(2), np.log1p(np.exp(-200.)+np.exp(-100.)), 2e4], rtol=1e-12)

def test_lovasz_of_decided_logits_is_the_jaccard_loss():
    g = np.random.default_rng(0)
    true,called = (g.random((40, 6)) < .3 for _ in range(2))
    j = lambda a,b: (a & b).sum(0)/(a | b).sum(0)
    want = 1 - (j(true, called) + j(~true, ~called))/2
    for size in (1., 3., 100.):
        got = LovaszHingeLoss()(torch.from_numpy(size*(2.*called-1)), torch.from_numpy(true))
        np.testing.assert_allclose(got, (1+size)*want.mean(), rtol=1e-12)

def test_lovasz_of_an_absent_class_is_its_worst_false_alarm():
    x,known = torch.tensor([[.5], [2.], [-3.]]),torch.ones(3, 1).bool()
    assert lovasz_hinge(x, ~known, known).flatten().tolist() == [0, 3, 0]
    assert lovasz_hinge(x-5, ~known, known).sum() == 0

def test_the_hardest_negatives_count():
    x,y,every = torch.arange(30.)[:,None]/10,torch.zeros(30, 1),torch.ones(30).bool()
    for share,n in ((.1, 3), (.5, 15), (1., 30), (.01, 1), (.34, 11)): # .34 of 30 is 10.2, rounded up
        assert HardNegativeLoss(share).kept(x, y, every)[:,0].nonzero()[:,0].tolist() == [*range(30-n, 30)]
    assert HardNegativeLoss(.6).kept(x[:25], y[:25], every[:25]).sum() == 15 # in float32, .6*25 is above 15
    y[:4] = 1; every[29] = False
    # positives, and 5 of 25
    assert HardNegativeLoss(.2).kept(x, y, every)[:,0].nonzero()[:,0].tolist() == [0, 1, 2, 3, 24, 25, 26, 27, 28]
    assert HardNegativeLoss(.2).kept(torch.ones(10, 1), torch.zeros(10, 1), torch.ones(10).bool()).sum() == 2 # ties

def test_asymmetric_is_timms(x, y, soft):
    settings = {}, dict(gamma_neg=2., gamma_pos=2., clip=.1, eps=1e-6), dict(gamma_neg=0., gamma_pos=0., clip=0.)
    for kwargs,targ in itertools.product(settings, (y, soft)):
        single = timm.loss.AsymmetricLossMultiLabel(**kwargs)
        v = x.float().requires_grad_(); w = x.float().requires_grad_()
        rows = AsymmetricLoss(**kwargs, class_reduction='sum', reduction='none')(v, targ.float())
        want = torch.stack([single(w[[i]], targ[[i]].float()) for i in range(B)])
        torch.testing.assert_close(rows, want)
        rows.sum().backward(); want.sum().backward()
        torch.testing.assert_close(v.grad, w.grad)

# ---- names and messages

def test_all_names_are_known():
    assert set(multilabel_losses) == {'multilabel_focal', 'lsep', 'lovasz', 'hard_negative', 'focal_lovasz',
                                      'asymmetric', 'multilabel_bce'}
    for name in multilabel_losses: assert type(create_loss(name)) is losses[name]
    with pytest.raises(ValueError, match="did you mean 'lovasz'"): create_loss('lovasz_hinge')

@each('inp,targ,message', [
    (torch.zeros(2, 3), torch.tensor([0, 1]),
     r'shape \(2,\) and type torch.int64 does not fit scores of shape \(2, 3\): expected \(2, 3\) values from 0 to 1, '
     r'or rows of -1'),
    (torch.zeros(2, 3), torch.zeros(2, 4), r'shape \(2, 4\)'), (torch.zeros(3), torch.zeros(3), r'expected \(B, K\)'),
    (torch.zeros(2, 3), torch.tensor([[0., 1, 0], [0, 0, 28]]),
     'target 28 at row 1, class 2: expected a value from 0 to 1'),
    (torch.zeros(2, 3), torch.tensor([[0., np.nan, 0], [0, 0, 1]]), 'target nan at row 0, class 1')])
def test_bad_input(inp, targ, message):
    for name in multilabel_losses:
        with pytest.raises(ValueError, match=message): create_loss(name)(inp, targ)

@each('name,kwargs,message', [
    ('multilabel_focal', {'gamma': -1}, 'gamma is -1'),
    ('multilabel_focal', {'alpha': 1.}, 'alpha is 1.0, expected 0 <= alpha < 1'),
    ('multilabel_focal', {'alpha': [.5, -.1]}, 'alpha is -0.1'),
    ('multilabel_focal', {'class_reduction': 'max'}, "class_reduction is 'max', expected 'mean' or 'sum'"),
    ('focal_lovasz', {'weight': 1.2}, 'weight is 1.2'),
    ('focal_lovasz', {'class_reduction': 'none'}, "class_reduction is 'none'"),
    ('hard_negative', {'share': 0}, 'share is 0'),
    ('asymmetric', {'gamma_neg': .5}, 'gamma_neg is 0.5, expected 0 or at least 1'),
    ('asymmetric', {'clip': 1}, 'clip is 1'),
    ('multilabel_bce', {'pos_weight': -2}, 'pos_weight is -2'),
    ('lsep', {'gamma': 2}, "no parameter 'gamma', only reduction"),
    ('lovasz', {'reduction': 'avg'}, "reduction is 'avg'")])
def test_bad_settings(name, kwargs, message):
    with pytest.raises(ValueError, match=message): create_loss(name, **kwargs)

def test_weights_must_fit_the_classes(x, y):
    for loss in (MultiLabelFocalLoss(alpha=[.5]*4), MultiLabelBCELoss(pos_weight=np.ones(6))):
        with pytest.raises(ValueError,
                           match=r'has \d values for scores of 5 classes, expected one number or one for each class'):
            loss(x, y)
