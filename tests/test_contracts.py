"""What every loss, head, pool and first convolution promises: a check is a function of the object, and a test holds all
to it.

In the spirit of scikit-learn's `check_estimator`. What only one of them promises is tested with it (`test_loss`,
`test_multilabel_loss`, `test_model`). A new loss, head, pool or rule is added to a list here and is held to all of
it."""
import copy
import math
import pickle

import pytest
import torch
from cases import each
from fastai.basics import DataLoaders, Learner, nn
from fastai.layers import NoneReduce

from rcic_fastai.data.target import MASKED
from rcic_fastai.loss.by_name import losses
from rcic_fastai.loss.multi import AsymmetricLoss, FocalLovaszLoss, HardNegativeLoss, LovaszHingeLoss, LSEPLoss
from rcic_fastai.loss.multi import MultiLabelBCELoss, MultiLabelFocalLoss, MultiLabelLoss
from rcic_fastai.loss.single import AMSoftmaxLoss, ArcFaceLoss, CrossEntropyArcFaceLoss, OneHotBCELoss
from rcic_fastai.loss.single import SoftmaxCrossEntropyLoss
from rcic_fastai.model.backbone import first_conv_inits, patch_first_conv
from rcic_fastai.model.head import ScreenBody, cell_type_kinds, classifiers, create_screen_head, head_kinds, pools

B,K = 7,5
SINGLE = [SoftmaxCrossEntropyLoss(), SoftmaxCrossEntropyLoss(s=10., gamma=2., smoothing=.2),
          AMSoftmaxLoss(), AMSoftmaxLoss(m=.3, s=12., gamma=2.), AMSoftmaxLoss(gamma=.5, smoothing=.1),
          ArcFaceLoss(), ArcFaceLoss(m=.9, s=16., gamma=1., smoothing=.1), OneHotBCELoss(), OneHotBCELoss(smoothing=.1),
          CrossEntropyArcFaceLoss()]
MULTI = [MultiLabelBCELoss(), MultiLabelBCELoss(smoothing=.1, pos_weight=[1, 2, 3, 4, .5], class_reduction='sum'),
         MultiLabelFocalLoss(), MultiLabelFocalLoss(gamma=.5, alpha=.25, class_reduction='sum'),
         MultiLabelFocalLoss(gamma=1, alpha=[.1, .2, .3, .4, .5]), HardNegativeLoss(), HardNegativeLoss(.3), LSEPLoss(),
         LovaszHingeLoss(), FocalLovaszLoss(), FocalLovaszLoss(.3, hard_negative=.5, class_reduction='mean'),
         AsymmetricLoss(), AsymmetricLoss(gamma_neg=3, gamma_pos=0, clip=0, class_reduction='sum')]
HEADS = [dict(kind=kind) for kind in head_kinds]
HEADS += [dict(kind='neck', classifier=c, n_cell_types=3, cell_type=t) for c in classifiers for t in cell_type_kinds]
HEADS += [dict(kind='cosine', n_cell_types=3), dict(kind='controls', classifier='cosine', n_cell_types=3)]


def rand(seed): return torch.Generator().manual_seed(seed)

def with_reduction(loss, reduction):
    loss = copy.deepcopy(loss); loss.reduction = reduction
    return loss


# Losses

def scores(loss):
    "Float64: cosines, or logits for several labels"
    if isinstance(loss, MultiLabelLoss): return 2*torch.randn(B, K, generator=rand(0), dtype=torch.float64)
    return 1.96*torch.rand(B, K, generator=rand(0), dtype=torch.float64) - .98

def targets(loss):
    "Every kind of target without masked rows; of several labels, a row without a positive, one without a negative"
    if isinstance(loss, MultiLabelLoss):
        hard = (torch.rand(B, K, generator=rand(1)) < .4).double()
        hard[:,4],hard[1],hard[2] = 0,0,1
        return hard,torch.rand(B, K, generator=rand(2), dtype=torch.float64)
    soft = torch.rand(B, K, generator=rand(2), dtype=torch.float64)
    return torch.randint(K, (B,), generator=rand(1)),soft/soft.sum(1, keepdim=True)

def masked(loss, target, rows):
    "The target with `rows` masked, one way after the other"
    target = target.clone()
    if isinstance(loss, MultiLabelLoss):
        target[rows,torch.arange(int(rows.sum())) % K] = -1 # one value masks the whole row
    else: target[rows] = MASKED if target.ndim == 1 else 0
    return target

def check_mean_sum_and_rows(loss):
    x = scores(loss)
    for target in targets(loss):
        rows = with_reduction(loss, 'none')(x, target)
        assert rows.shape == (B,) and rows.dtype == torch.float64
        torch.testing.assert_close(loss(x, target), rows.mean())
        torch.testing.assert_close(with_reduction(loss, 'sum')(x, target), rows.sum())
        with NoneReduce(loss) as again: torch.testing.assert_close(again(x, target), rows) # as fastai asks for rows
    assert loss.reduction == 'mean'

def check_types_of_targets(loss):
    "Hard targets in any type; one class as its one-hot row"
    x,hard = scores(loss),targets(loss)[0]
    same = [hard.to(t) for t in (torch.int8, torch.uint8, torch.int32)]
    if isinstance(loss, MultiLabelLoss): same += [hard.bool(), hard.half()]
    else:
        same += [nn.functional.one_hot(hard, K).to(t) for t in (torch.int64, torch.float64, torch.float32,
                                                                torch.float16)]
    for target in same: torch.testing.assert_close(loss(x, target), loss(x, hard), rtol=1e-12, atol=1e-12)

def check_gradient(loss):
    x,(hard,soft),rows = scores(loss),targets(loss),torch.arange(B) == 2
    # timm computes in float32: a wider step, and what float32 leaves of the difference
    tolerance = dict(eps=1e-2, atol=2e-3, rtol=1e-2) if isinstance(loss, AsymmetricLoss) else {}
    for target in (hard, soft, masked(loss, hard, rows), masked(loss, soft, rows)):
        assert torch.autograd.gradcheck(loss, (x.clone().requires_grad_(), target), **tolerance)
    assert torch.autograd.gradcheck(with_reduction(loss, 'none'), (x.clone().requires_grad_(), hard), **tolerance)

def check_masked_rows_take_no_part(loss):
    "Not even a NaN in them"
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 0]).bool()
    for full in targets(loss):
        target,x = masked(loss, full, ~keep),scores(loss)
        x[~keep] = math.nan; x.requires_grad_()
        torch.testing.assert_close(loss(x, target), loss(scores(loss)[keep], full[keep]))
        rows = with_reduction(loss, 'none')(x, target)
        torch.testing.assert_close(rows[keep], with_reduction(loss, 'none')(scores(loss)[keep], full[keep]))
        assert (rows[~keep] == 0).all()
        loss(x, target).backward()
        assert (x.grad[~keep] == 0).all() and (x.grad[keep] != 0).any()

def check_nothing_but_masked_rows(loss):
    every = [masked(loss, t, torch.ones(B).bool()) for t in targets(loss)]
    if not isinstance(loss, MultiLabelLoss): every.append(torch.full((B,), -100))
    for target in every:
        x = scores(loss).requires_grad_()
        out = loss(x, target); out.backward()
        assert out == 0 and (x.grad == 0).all()

def extremes(loss):
    "Scores and targets: right, wrong and undecided; rows and classes without a positive or a negative; masked; .5"
    if not isinstance(loss, MultiLabelLoss):
        x = torch.tensor([[1., -1, -1], [-1, 1, 1], [1, 1, 1], [0, 0, 0], [-1, -1, -1]])
        weights = torch.tensor([[1., 0, 0], [.5, .5, 0], [.2, .3, .5], [0, 0, 1], [0, 0, 0]])
        for scale in (1., 1e4): yield from ((scale*x, t) for t in (torch.zeros(5, dtype=torch.long), weights))
        return
    y = torch.tensor([[0., 0, 0, 0, 1], [1, 1, 1, 0, 1], [0, 1, 0, 0, 1], [1, 1, 1, 1, 1], [.5, .5, .5, .5, .5],
                      [.3, .7, 0, 0, 1]])
    for t in (y, y[:1], y[3:4], torch.zeros(6, 5), torch.ones(6, 5), torch.full((6, 5), .5), torch.full((6, 5), -1.)):
        yield from ((x, t) for x in (100*(2*t-1), -100*(2*t-1), torch.zeros(t.shape), torch.full(t.shape, 100.)))

def check_finite_at_the_extremes(loss):
    for x,target in extremes(loss):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            v = x.clone().to(dtype).requires_grad_()
            out = loss(v, target); out.backward()
            assert out.dtype == torch.float32 and out.isfinite() and v.grad.isfinite().all()

def check_float32_inside(loss):
    for target in targets(loss):
        for dtype in (torch.bfloat16, torch.float16):
            half = scores(loss).to(dtype)
            with torch.autocast('cpu', torch.bfloat16): out = loss(half, target)
            assert out.dtype == torch.float32
            torch.testing.assert_close(out.double(), loss(half.double(), target), rtol=2e-5, atol=2e-5)
    assert loss(scores(loss), target).dtype == torch.float64
    assert loss.activation(scores(loss).half()).dtype == torch.float32

def check_copies_keep_the_settings(loss):
    x,target,loss = scores(loss),targets(loss)[0],with_reduction(loss, 'sum')
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert str(twin) == str(loss) and twin.reduction == 'sum' and twin(x, target) == loss(x, target)
    with pytest.raises(ValueError, match="reduction is 'median'"): loss.reduction = 'median'

def check_probabilities(loss):
    "Between 0 and 1; a larger score is a larger probability; what is decoded from both is the same"
    x = scores(loss); p = loss.activation(x)
    assert p.shape == x.shape and (p >= 0).all() and (p <= 1).all()
    assert torch.equal(p.argsort(1), x.argsort(1))
    if isinstance(loss, MultiLabelLoss): assert torch.equal(loss.decodes(p), x > 0)
    else: assert torch.equal(loss.decodes(p), x.argmax(1)) and torch.equal(loss.decodes(x), x.argmax(1))

def check_a_learner_trains_with_it(loss):
    "fastai moves the loss, trains with soft targets, returns losses of rows and probabilities"
    x,target = torch.randn(B, 3, generator=rand(3)),targets(loss)[1].float()
    dls = DataLoaders.from_dsets(list(zip(x, target)), list(zip(x, target)), bs=4, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Sequential(nn.Linear(3, K), nn.Tanh()), loss_func=copy.deepcopy(loss))
    with learn.no_logging(), learn.no_mbar(): learn.fit(1, 1e-3)
    probs,_,decoded,rows = learn.get_preds(with_decoded=True, with_loss=True)
    assert probs.shape == (B, K) and len(decoded) == B and rows.shape == (B,) and rows.isfinite().all()

def check_linear_in_the_weights(loss):
    x,y,loss = scores(loss),targets(loss)[0],with_reduction(loss, 'none')
    other,lam = y.roll(1),torch.linspace(0, 1, B, dtype=torch.float64)
    a,b = (nn.functional.one_hot(o, K).double() for o in (y, other))
    mixed = loss(x, lam[:,None]*a + (1-lam[:,None])*b)
    torch.testing.assert_close(mixed, lam*loss(x, y) + (1-lam)*loss(x, other), rtol=1e-11, atol=1e-12)

LOSS_CHECKS = [check_mean_sum_and_rows, check_types_of_targets, check_gradient, check_masked_rows_take_no_part,
               check_nothing_but_masked_rows, check_finite_at_the_extremes, check_float32_inside,
               check_copies_keep_the_settings, check_probabilities, check_a_learner_trains_with_it]

@pytest.mark.parametrize("check", [*LOSS_CHECKS, check_linear_in_the_weights])
@each("loss", SINGLE, ids=str)
def test_loss_for_one_label(loss, check): check(loss)

@pytest.mark.parametrize("check", LOSS_CHECKS)
@each("loss", MULTI, ids=str)
def test_loss_for_several_labels(loss, check): check(loss)

def test_every_loss_is_held_to_it():
    assert {type(loss) for loss in SINGLE + MULTI} == set(losses.values())


# Heads

F,H,N = 6,8,8 # features, width of the neck, rows

def head_of(kw, **more):
    torch.manual_seed(0)
    return create_screen_head(**{**dict(n_features=F, n_classes=K, n_hidden=H), **kw, **more})

def rows():
    "Features and context: two experiments, each with treatments and both kinds of controls, of three cell types"
    context = torch.tensor([[i%3, i%2, i%4, (0, 0, 1, 1, 2, 2, 0, 0)[i]] for i in range(N)])
    return torch.rand(N, F, generator=rand(0)),context

def first(out): return out[0] if isinstance(out, tuple) else out

def check_scores_are_the_classifier_of_the_embedding(kw):
    head,(x,c) = head_of(kw).eval(),rows()
    out,emb = head(x, c),head.embed(x, c)
    assert out.shape == (N, K) and len(emb) == N and out.isfinite().all()
    torch.testing.assert_close(head.classifier(emb), out)

def check_training_gives_every_parameter_a_gradient(kw):
    head,(x,c) = head_of(kw),rows()
    out = head(x, c)
    sum((o*torch.randn(o.shape, generator=rand(1))).sum()
        for o in (out if isinstance(out, tuple) else (out,))).backward()
    assert [n for n,p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

def check_the_configuration_makes_it_again(kw):
    head,(x,c) = head_of(kw, dropout=.3).eval(),rows()
    again = create_screen_head(**head.config); again.load_state_dict(head.state_dict())
    assert again.config == head.config and torch.equal(again.eval()(x, c), head(x, c))
    assert list(head.state_dict()) == list(head_of(kw).state_dict()) # names do not depend on dropout

def check_dropout_acts_in_training_alone(kw):
    head,(x,c) = head_of(kw, dropout=.5),rows()
    assert not torch.equal(first(head(x, c)), first(head(x, c)))
    head.eval(); assert torch.equal(head(x, c), head(x, c))

def check_cell_types_matter_if_it_knows_them(kw):
    head,(x,c) = head_of(kw).eval(),rows()
    other = c.clone(); other[:,0] = (c[:,0]+1)%3
    assert torch.equal(head(x, other), head(x, c)) == (not head.n_cell_types)
    if head.n_cell_types or head.controls:
        with pytest.raises(ValueError, match='needs the context'): head(x)
    else: assert torch.equal(head(x), head(x, c))

def check_low_precision_stays_finite(kw):
    head,(x,c) = head_of(kw),rows()
    with torch.autocast('cpu', torch.bfloat16): out = first(head(60*x.bfloat16(), c))
    assert out.isfinite().all()

def check_double_precision(kw):
    head,(x,c) = head_of(kw).eval(),rows()
    want = head(x, c); got = head.double()(x.double(), c)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got.float(), want, rtol=1e-4, atol=1e-5)

def check_copies(kw):
    head,(x,c) = head_of(kw).eval(),rows()
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))): assert torch.equal(twin(x, c), head(x, c))

HEAD_CHECKS = [check_scores_are_the_classifier_of_the_embedding, check_training_gives_every_parameter_a_gradient,
               check_the_configuration_makes_it_again, check_dropout_acts_in_training_alone,
               check_cell_types_matter_if_it_knows_them, check_low_precision_stays_finite, check_double_precision,
               check_copies]

@pytest.mark.parametrize("check", HEAD_CHECKS)
@each("settings", HEADS, ids=str)
def test_head(settings, check): check(settings)


# Pools

class Maps(nn.Identity): n_features = 3

def maps(*size): return torch.rand(2, 3, *size, generator=rand(0))

def check_any_size(name):
    body = ScreenBody(Maps(), name)
    for size in ((1, 1), (5, 4), (7, 9)): assert body(maps(*size)).shape == (2, body.n_features)

def check_positions_do_not_matter(name):
    body,x = ScreenBody(Maps(), name),maps(5, 4)
    shuffled = x.flatten(2)[...,torch.randperm(20, generator=rand(1))].view_as(x)
    torch.testing.assert_close(body(shuffled), body(x))

def check_equal_maps_keep_their_value(name):
    body,value = ScreenBody(Maps(), name),torch.tensor([[.5, 1, 2]])
    torch.testing.assert_close(body(value[...,None,None].expand(1, 3, 4, 4)), value.repeat(1, body.n_features//3))

def check_stronger_maps_give_more(name):
    body,x = ScreenBody(Maps(), name),maps(5, 4)
    assert (body(x+.1) > body(x)).all()

def check_pool_in_low_precision(name):
    body = ScreenBody(Maps(), name)
    for dtype in (torch.float16, torch.bfloat16):
        out = body((200*maps(5, 4)).to(dtype)) # 200^3 does not fit into fp16
        assert out.dtype == dtype and out.isfinite().all()
        torch.testing.assert_close(out.float(), body(200*maps(5, 4)), rtol=2e-2, atol=1e-2)

def check_pool_gradient(name):
    body = ScreenBody(Maps(), name).double()
    assert torch.autograd.gradcheck(body, (maps(3, 2).double().requires_grad_(),))

POOL_CHECKS = [check_any_size, check_positions_do_not_matter, check_equal_maps_keep_their_value,
               check_stronger_maps_give_more,
               check_pool_in_low_precision, check_pool_gradient]

@pytest.mark.parametrize("check", POOL_CHECKS)
@each("name", pools)
def test_pool(name, check): check(name)


# First convolutions

def conv(channels=3, **kw):
    return nn.Sequential(nn.Conv2d(channels, 8, 5, **{**dict(stride=2, padding=1, dilation=2), **kw}))

def patched(init, n, old): return patch_first_conv(copy.deepcopy(old), n, init)

def check_grey_images_stay(init):
    "But for new kernels"
    old,x = conv(),torch.randn(2, 1, 20, 20, generator=rand(0))
    for n in (3, 4, 5, 6, 9):
        same = torch.allclose(patched(init, n, old)(x.expand(-1, n, -1, -1)), old(x.expand(-1, 3, -1, -1)), rtol=1e-4,
                              atol=1e-5)
        assert same == (init != 'random' or n == 3)

def check_any_number_of_channels(init):
    for n in (1, 2, 3, 6, 9): assert patched(init, n, conv())(torch.randn(1, n, 20, 20)).shape[1] == 8

def check_the_convolution_stays(init):
    net = conv(); before = net[0]
    assert patch_first_conv(net, 6, init) is net and net[0] is before
    assert (before.stride, before.padding, before.dilation, before.in_channels) == ((2,2), (1,1), (2,2), 6)
    assert before.bias is not None and isinstance(before.weight, nn.Parameter) and before.weight.requires_grad
    assert not patch_first_conv(conv().requires_grad_(False), 6, init)[0].weight.requires_grad

def check_enough_channels_keep_their_weights(init):
    for n in (3, 6):
        net = conv(n); weight = net[0].weight
        assert patch_first_conv(net, n, init)[0].weight is weight

def check_dtype_stays(init):
    for dtype in (torch.float64, torch.bfloat16):
        assert patch_first_conv(conv().to(dtype), 6, init)[0].weight.dtype == dtype

def check_copies_of_a_patched_one(init):
    net,x = patch_first_conv(conv(), 6, init),torch.randn(1, 6, 20, 20)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))): assert torch.equal(twin(x), net(x))

def check_what_cannot_be_patched(init):
    with pytest.raises(ValueError, match='groups=3, expected 1'):
        patch_first_conv(nn.Conv2d(3, 6, 3, groups=3), 6, init)
    with pytest.raises(ValueError, match='n_channels is 0'): patch_first_conv(conv(), 0, init)
    with pytest.raises(ValueError, match='no nn.Conv2d'): patch_first_conv(nn.Linear(3, 4), 6, init)

CONV_CHECKS = [check_grey_images_stay, check_any_number_of_channels, check_the_convolution_stays,
               check_enough_channels_keep_their_weights,
               check_dtype_stays, check_copies_of_a_patched_one, check_what_cannot_be_patched]

@pytest.mark.parametrize("check", CONV_CHECKS)
@each("init", first_conv_inits)
def test_first_convolution(init, check): check(init)
