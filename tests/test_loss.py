"Losses of one label against float64 formulas written out in NumPy; what all losses share is in `test_contracts`."
import copy
import math

import numpy as np
import pytest
from cases import each
import torch

from rcic_fastai.data.target import MASKED
from rcic_fastai.loss.base import logsumexp_others
from rcic_fastai.loss.single import AMSoftmaxLoss, ArcFaceLoss, CrossEntropyArcFaceLoss, OneHotBCELoss
from rcic_fastai.loss.single import SoftmaxCrossEntropyLoss
from rcic_fastai.loss.by_name import create_loss, losses
from rcic_fastai.loss.by_name import multilabel_losses

B,K = 7,5
LOSSES = [SoftmaxCrossEntropyLoss(), SoftmaxCrossEntropyLoss(s=10., gamma=2., smoothing=.2),
          AMSoftmaxLoss(), AMSoftmaxLoss(m=.3, s=12., gamma=2.), AMSoftmaxLoss(gamma=.5, smoothing=.1),
          ArcFaceLoss(), ArcFaceLoss(m=.9, s=16., gamma=1., smoothing=.1), OneHotBCELoss(), OneHotBCELoss(smoothing=.1)]
each_loss = each('loss', LOSSES, ids=str)

@pytest.fixture
def cos(): return torch.from_numpy(np.random.default_rng(0).uniform(-.98, .98, (B, K)))

@pytest.fixture
def y(): return torch.from_numpy(np.random.default_rng(1).integers(0, K, B))

@pytest.fixture
def soft():
    t = np.random.default_rng(2).dirichlet(np.ones(K), B)
    return torch.from_numpy(t)

def expected_row(loss, x, k):
    "The loss of one row of scores `x (K,)` whose true class is `k`: plain formulas in float64, no shared code"
    n = len(x)
    if isinstance(loss, OneHotBCELoss):
        t = (1-loss.smoothing)*np.eye(n)[k] + loss.smoothing/n
        p = 1/(1+np.exp(-x))
        return -(t*np.log(p) + (1-t)*np.log(1-p)).mean()
    c = x.copy()
    if isinstance(loss, AMSoftmaxLoss): c[k] -= loss.m
    elif isinstance(loss, ArcFaceLoss):
        angle = np.arccos(x[k])
        c[k] = np.cos(angle+loss.m) if angle+loss.m <= np.pi else x[k]-loss.m*np.sin(loss.m)
    p = np.exp(loss.s*c); p /= p.sum()
    t = (1-loss.smoothing)*np.eye(n)[k] + loss.smoothing/n
    return -(t*np.log(p)).sum() * (1-p[k])**loss.gamma

def as_(loss, reduction):
    loss = copy.deepcopy(loss); loss.reduction = reduction
    return loss

@each_loss
def test_hard_targets_match_numpy(loss, cos, y):
    want = np.array([expected_row(loss, x, k) for x,k in zip(cos.numpy(), y.numpy())])
    np.testing.assert_allclose(as_(loss, 'none')(cos, y), want, rtol=1e-10)
    np.testing.assert_allclose(loss(cos, y), want.mean(), rtol=1e-10)
    np.testing.assert_allclose(as_(loss, 'sum')(cos, y), want.sum(), rtol=1e-10)
    p = loss.activation(cos)
    if isinstance(loss, OneHotBCELoss): torch.testing.assert_close(p, 1/(1+(-cos).exp()))
    else: torch.testing.assert_close(p, (cos*loss.s).exp()/(cos*loss.s).exp().sum(1, keepdim=True))

@each_loss
def test_soft_targets_match_numpy(loss, cos, soft):
    want = [sum(t*expected_row(loss, x, k) for k,t in enumerate(ts)) for x,ts in zip(cos.numpy(), soft.numpy())]
    np.testing.assert_allclose(as_(loss, 'none')(cos, soft), want, rtol=1e-10)

def test_float64_keeps_its_digits():
    x = torch.tensor([[0., 21.], [0., 30.], [0., 39.], [0., 41.]], dtype=torch.float64)
    x,y = torch.cat([x, x]),torch.tensor([0]*4 + [1]*4)
    rows = SoftmaxCrossEntropyLoss(reduction='none')(x, y).numpy()
    d = np.array([21., 30, 39, 41])
    np.testing.assert_allclose(rows, np.concatenate([d+np.log1p(np.exp(-d)), np.log1p(np.exp(-d))]), rtol=1e-14)

def test_gradient_where_one_class_dominates():
    z = torch.tensor([[50., 0, -1, 2], [0, 700, 3, 3], [1, 1, 1, 1], [5, 5, 0, 0]], dtype=torch.float64)
    rest = logsumexp_others(z)
    for k in range(4):
        others = np.delete(z.numpy(), k, 1); top = others.max(1)
        np.testing.assert_allclose(rest[:,k], top+np.log(np.exp(others-top[:,None]).sum(1)), rtol=1e-14)
    torch.testing.assert_close(torch.cat([logsumexp_others(z, torch.full((4, 1), k)) for k in range(4)], 1), rest,
                               rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(logsumexp_others, (z[:1].clone().requires_grad_(),))

def test_cosines_rounded_above_one_stay_finite():
    x = torch.tensor([[1.001, -1.001, 0.]], requires_grad=True)
    for k in (0, 1): ArcFaceLoss()(x, torch.tensor([k])).backward()
    assert x.grad.isfinite().all()

# ---- cross entropy of logits, ArcFace of cosines

def expected_pair(loss, logits, cos, k):
    return (1-loss.weight)*expected_row(SoftmaxCrossEntropyLoss(smoothing=loss.smoothing), logits, k) \
        + loss.weight*expected_row(ArcFaceLoss(loss.m, loss.s, smoothing=loss.smoothing), cos, k)/2

@pytest.mark.parametrize('loss',
                         [CrossEntropyArcFaceLoss(), CrossEntropyArcFaceLoss(weight=.6, s=12., m=.3, smoothing=.1)],
                         ids=str)
def test_pairs_match_numpy(loss, cos, y, soft):
    logits = torch.from_numpy(np.random.default_rng(3).normal(0, 3, (B, K)))
    rows = np.array([[expected_pair(loss, a, c, k) for k in range(K)] for a,c in zip(logits.numpy(), cos.numpy())])
    for targ,want in ((y, rows[np.arange(B), y]), (soft, (rows*soft.numpy()).sum(1))):
        for reduction,f in (('none', np.asarray), ('mean', np.mean), ('sum', np.sum)):
            np.testing.assert_allclose(as_(loss, reduction)((logits, cos), targ), f(want), rtol=1e-10)
    plain = SoftmaxCrossEntropyLoss(smoothing=loss.smoothing) # what logits alone cost
    for targ in (y, soft): assert loss(logits, targ) == plain(logits, targ)
    masked = y.clone(); masked[[1, 4]] = MASKED
    a,c = (o.clone().index_fill_(0, torch.tensor([1, 4]), math.nan).requires_grad_() for o in (logits, cos))
    out = loss((a, c), masked); out.backward()
    keep = (masked >= 0).numpy()
    np.testing.assert_allclose(out.item(), rows[np.arange(B), y][keep].mean(), rtol=1e-10)
    assert all(o.grad.isfinite().all() and (o.grad[keep] != 0).any() and not o.grad[~keep].any() for o in (a, c))
    assert torch.equal(loss.decodes((logits, cos)), logits.argmax(1))
    assert torch.equal(loss.activation([logits, cos]), logits.softmax(1))
    with pytest.raises(ValueError, match='expected .logits, cosines.'): loss((logits,), y)
    with pytest.raises(ValueError, match='weight is 1.5'): create_loss('ce_arcface', weight=1.5)

def test_arcface_falls_with_the_angle():
    for m in (.1, .5, 1.):
        x = torch.linspace(1, -1, 5001, dtype=torch.float64)
        assert (ArcFaceLoss(m=m).margin(x).diff() < 0).all()

@each('inp,targ,message', [
    (torch.zeros(2, 3), torch.tensor([0, 3]), 'target 3 at row 1 is outside the 3 classes'),
    (torch.zeros(2, 3), torch.tensor([0, 1, 2]), r'expected \(2,\) integers or \(2, 3\) weights'),
    (torch.zeros(2, 3), torch.zeros(2), r'expected \(2,\) integers'),
    (torch.zeros(2, 3), torch.zeros(2, 1), r'shape \(2, 1\)'),
    (torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.long), r'expected \(B, K\)'),
    (torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), 'at least 2 classes')])
def test_bad_input(inp, targ, message):
    for name in set(losses) - set(multilabel_losses):
        with pytest.raises(ValueError, match=message): create_loss(name)(inp, targ)

@each('name,kwargs,message', [
    ('arc_face', {}, "did you mean 'arcface'"), ('AM-Softmax', {}, "did you mean 'am_softmax'"),
    ('xyz', {}, 'known: am_softmax, arcface'),
    ('am_softmax', {'margin': .5}, "no parameter 'margin', only m, s, gamma"), ('am_softmax', {'m': -1}, 'm is -1'),
    ('arcface', {'m': 4}, 'm is 4'), ('arcface', {'s': 0}, 's is 0'),
    ('cross_entropy', {'smoothing': 1.}, 'smoothing is 1.0'), ('cross_entropy', {'gamma': -1}, 'gamma is -1'),
    ('one_hot_bce', {'reduction': 'avg'}, "reduction is 'avg', expected 'mean', 'sum' or 'none'")])
def test_bad_settings(name, kwargs, message):
    with pytest.raises(ValueError, match=message): create_loss(name, **kwargs)
