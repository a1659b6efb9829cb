"""Pooled and sliced statistics against float64 by hand and against training-mode batches; restoration; threads that
neither hang nor leak."""
import _thread
import copy
import signal
import threading
import time

import numpy as np
import pytest
from cases import each
import timm
import torch
import torchvision
from fastai.basics import CancelBatchException, CancelEpochException, CancelFitException, CancelValidException, Learner
from fastai.basics import OptimWrapper
from fastai.callback.core import Callback
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from rcic_fastai.model.batchnorm import BatchNormMode, BatchNormModeCallback, DomainSlices, LayerStats
from rcic_fastai.model.batchnorm import batchnorm_layers, domain_slices, layer_stats, pool_stats, reestimate_batchnorm


@pytest.fixture(autouse=True)
def one_thread():
    "Networks this small only lose by sharing their work; also: every test must end without threads of ours"
    n = torch.get_num_threads(); torch.set_num_threads(1); torch.manual_seed(0)
    yield
    torch.set_num_threads(n)
    assert not [t for t in threading.enumerate() if t.name.startswith('batchnorm-')]

def small_net(dtype=torch.float64):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3),
                        nn.BatchNorm2d(5)).to(dtype)
    for bn in batchnorm_layers(net).values():
        for p in (bn.weight, bn.bias): nn.init.normal_(p)
        nn.init.normal_(bn.running_mean); nn.init.uniform_(bn.running_var, .5, 2)
    return net

def shifted(n=13, size=9, dtype=torch.float64):
    "Images whose mean and spread differ from one to the next, so that batches differ too"
    k = torch.arange(n, dtype=dtype)[:,None,None,None]
    return torch.randn(n, 3, size, size, dtype=dtype)*(1+k/5) + k - 2

def training_forward(model, x):
    "One forward in training mode over everything, without dropout and without touching `model`"
    model = copy.deepcopy(model).train()
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd): m.eval()
    with torch.no_grad(): return model(x)

def snapshot(model):
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    return hooks,[m.training for m in model.modules()],buffers,{k: v.clone() for k,v in model.state_dict().items()}

def assert_unchanged(model, before):
    hooks,flags,buffers,state = before
    assert hooks == [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert flags == [m.training for m in model.modules()]
    assert len(list(model.buffers())) == len(buffers)
    assert all(now is then and torch.equal(now, value) for now,(then,value) in zip(model.buffers(), buffers))
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[k], v) for k,v in model.state_dict().items())

# --- numbers

def conv_by_hand(x, conv):
    w,b = (p.detach().double().numpy() for p in (conv.weight, conv.bias))
    return np.einsum('bchwij,ocij->bohw', sliding_window_view(x, w.shape[2:], (2,3)), w) + b[:,None,None]

def norm_by_hand(x, bn, stats):
    mean,var = (s[:,None,None] for s in stats)
    w,b = (p.detach().double().numpy()[:,None,None] for p in (bn.weight, bn.bias))
    return (x-mean)/np.sqrt(var+bn.eps)*w + b

def by_hand(net, x, pick=slice(None)):
    "The net in NumPy, every BatchNorm with the statistics of the images in `pick`"
    x = x.double().numpy()
    for layer in net:
        if isinstance(layer, nn.Conv2d): x = conv_by_hand(x, layer)
        elif isinstance(layer, nn.ReLU): x = np.maximum(x, 0)
        else: x = norm_by_hand(x, layer, (x[pick].mean((0,2,3)), x[pick].var((0,2,3))))
    return x

@pytest.mark.parametrize('dtype,rtol', [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_domain_matches_numpy(dtype, rtol):
    net,x = small_net(dtype),shifted(dtype=dtype)
    with torch.no_grad(): out = BatchNormMode(net, 'domain').pool(x.split(5))
    assert [len(o) for o in out] == [5, 5, 3]
    np.testing.assert_allclose(torch.cat(out), by_hand(net, x), rtol=rtol, atol=rtol)

def test_controls_match_numpy():
    net,x = small_net(),shifted()
    with torch.no_grad():
        out = torch.cat(BatchNormMode(net, 'controls').predict(x[6:].split(3), controls=x[:6].split(4)))
    np.testing.assert_allclose(out, by_hand(net, x, slice(6))[6:], rtol=1e-10)

def test_batch_matches_numpy():
    net,x = small_net(),shifted()
    with torch.no_grad(): out = BatchNormMode(net, 'batch').predict(x.split(5))
    for o,b in zip(out, x.split(5)): np.testing.assert_allclose(o, by_hand(net, b), rtol=1e-10)

def test_running_is_ordinary_eval():
    net,x = small_net(),shifted()
    with torch.no_grad():
        want = copy.deepcopy(net).eval()(x)
        with BatchNormMode(net, 'running'): assert torch.equal(net(x), want)
        assert torch.equal(torch.cat(BatchNormMode(net, 'running').predict([x])), want)

@each('cut', [1, 2, 5, 12, 13, [1, 9, 3]], ids=str)
def test_independent_of_batch_size_and_order(cut):
    net,x = small_net(),shifted()
    whole = training_forward(net, x)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(BatchNormMode(net, 'domain').pool(x.split(cut))), whole, rtol=1e-10,
                                   atol=1e-10)
        order = torch.randperm(len(x))
        torch.testing.assert_close(torch.cat(BatchNormMode(net, 'domain').pool(x[order].split(cut))), whole[order],
                                   rtol=1e-10, atol=1e-10)

def test_averaging_variances_would_be_noticed():
    "The tests above can fail: batches differ enough for the wrong pooling to be far off"
    s = [layer_stats(b) for b in shifted().split(5)]
    assert ((sum(b.var for b in s)/3)/pool_stats(s).var < .8).all()

NETWORKS = {'resnet18': lambda: torchvision.models.resnet18(num_classes=4),
            # BatchNorms with an activation inside
            'efficientnet': lambda: timm.create_model('test_efficientnet', num_classes=4),
            'densenet': lambda: timm.create_model('densenet121', growth_rate=4, num_classes=4, block_config=(2,2,2,2),
                                                  drop_rate=.5)}

@pytest.mark.slow
@pytest.mark.parametrize('make', NETWORKS.values(), ids=NETWORKS)
def test_deep_networks_equal_one_training_batch(make):
    model = make().double()
    x = shifted(7, 64)
    before = snapshot(model)
    with torch.no_grad():
        bn = BatchNormMode(model, 'domain')
        whole = training_forward(model, x)
        torch.testing.assert_close(torch.cat(bn.pool(x.split(3))), whole, rtol=1e-8, atol=1e-8)
        with bn: torch.testing.assert_close(model(x[:2]), whole[:2], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(BatchNormMode(model, 'batch').predict([x])[0], whole, rtol=1e-8, atol=1e-8)
    assert_unchanged(model, before)

LAYERS = {'1d': (nn.BatchNorm1d(3), (8, 3)), '1d length': (nn.BatchNorm1d(3), (8, 3, 5)),
          '3d': (nn.BatchNorm3d(3), (8, 3, 2, 4, 2)),
          'sync': (nn.SyncBatchNorm(3), (8, 3, 4, 4)), 'no affine': (nn.BatchNorm2d(3, affine=False), (8, 3, 4, 4)),
          'untracked': (nn.BatchNorm2d(3, track_running_stats=False), (8, 3, 4, 4)),
          'neither': (nn.BatchNorm1d(3, affine=False, track_running_stats=False), (8, 3)),
          'cumulative': (nn.BatchNorm2d(3, momentum=None), (8, 3, 4, 4)),
          'channels last': (nn.BatchNorm2d(3), (8, 3, 4, 4))}

@each('dtype', [torch.float32, torch.float64], ids=str)
@each('kind', LAYERS)
def test_kinds_of_layer(kind, dtype):
    layer,shape = LAYERS[kind]
    layer = copy.deepcopy(layer).to(dtype)
    x = (torch.randn(shape, dtype=dtype)*3 + 5) * torch.arange(1, 9, dtype=dtype).view(8, *[1]*(len(shape)-1))
    if kind == 'channels last': x = x.to(memory_format=torch.channels_last)
    dims = [0, *range(2, x.ndim)]
    want = (x.double()-x.double().mean(dims, keepdim=True))/(
        x.double().var(dims, correction=0, keepdim=True)+layer.eps).sqrt()
    before = snapshot(layer)
    with torch.no_grad():
        bn = BatchNormMode(layer, 'domain')
        outs = torch.cat(bn.pool(x.split(3))),BatchNormMode(layer, 'batch').predict([x])[0],bn.predict(x.split(5))
        with bn: outs = *outs[:2],torch.cat(outs[2]),layer(x)
    for out in outs:
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    assert_unchanged(layer, before)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_mean_does_not_cancel(dtype):
    x = (1e3 + .1*torch.randn(64, 2, 8, 8)).to(dtype)
    if dtype != torch.float32:
        x = (x.float() + torch.randint(0, 8, x.shape)).to(dtype) # half precision has steps of .5 and 4 here
    s,exact = pool_stats([layer_stats(b) for b in x.split(7)]),x.double()
    assert s.mean.dtype == s.var.dtype == torch.float64 and s.n == 64*64
    torch.testing.assert_close(s.mean, exact.mean((0,2,3)), rtol=1e-9, atol=0)
    torch.testing.assert_close(s.var, exact.var((0,2,3), correction=0), rtol=1e-6, atol=0)

def test_rounded_first_estimate_is_corrected():
    "At 1e5 float32 rounds the first estimate of the mean by up to .004, a visible share of the variance of .01"
    x = 1e5 + .1*torch.randn(64, 8, 8, 8)
    s,exact = layer_stats(x),x.double()
    torch.testing.assert_close(s.mean, exact.mean((0,2,3)), rtol=1e-12, atol=0)
    torch.testing.assert_close(s.var, exact.var((0,2,3), correction=0), rtol=1e-6, atol=0)

def test_large_mean_through_a_layer():
    layer,x = nn.BatchNorm2d(2),1e3 + .1*torch.randn(64, 2, 8, 8)
    with torch.no_grad(): out = torch.cat(BatchNormMode(layer, 'domain').pool(x.split(7))).double()
    torch.testing.assert_close(out.mean((0,2,3)), torch.zeros(2).double(), rtol=0, atol=2e-3)
    # eps is .001 of the variance
    torch.testing.assert_close(out.var((0,2,3)), torch.ones(2).double(), rtol=2e-3, atol=0)

def test_pool_stats_of_unequal_sizes():
    parts = [torch.randn(n, 2, dtype=torch.float64)*n for n in (1, 2, 50)]
    s = pool_stats([LayerStats(len(p), p.mean(0), p.var(0, correction=0)) for p in parts])
    torch.testing.assert_close(s.var, torch.cat(parts).var(0, correction=0))

# --- ways of calling

class Shared(nn.Module):
    "One BatchNorm called twice, at different scales, and a head that `embed` leaves out"
    def __init__(self):
        super().__init__(); self.bn,self.conv,self.head = nn.BatchNorm2d(3),nn.Conv2d(3, 3, 1),nn.BatchNorm1d(3)
    def embed(self, x, scale=1.): return self.bn(self.conv(10*self.bn(x)*scale).relu()).mean((2,3))
    def forward(self, x, scale=1.): return self.head(self.embed(x, scale))

def test_a_layer_called_twice_keeps_two_statistics():
    model,x = Shared().double(),shifted(8)
    whole = training_forward(model, x)
    bn = BatchNormMode(model, 'domain')
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(bn.pool(x.split(3))), whole)
        with bn:
            for _ in range(2): torch.testing.assert_close(model(x[2:5]), whole[2:5])
    assert [len(bn.stats[k]) for k in ('bn','head')] == [2, 1]

def test_tuples_forward_generator_and_sizes():
    model,x = Shared().double(),shifted(8)
    seen = []
    def forward(x, scale): seen.append(scale.item()); return model.embed(x, scale)
    with torch.no_grad():
        out = BatchNormMode(model, 'domain').pool(((b, torch.tensor(2.)) for b in x.split(3)), forward)
        torch.testing.assert_close(torch.cat(out), training_forward_embed(model, x, 2.))
        assert seen == [2.]*3
        sizes = [shifted(4, 9),shifted(3, 12)]
        assert [tuple(o.shape) for o in BatchNormMode(small_net(), 'domain').pool(sizes)] == [(4,5,5,5), (3,5,8,8)]

def training_forward_embed(model, x, scale): return copy.deepcopy(model).train().embed(x, scale)

def test_layer_left_out_of_the_pool_is_an_error():
    model,x = Shared().double(),shifted(8)
    bn = BatchNormMode(model, 'domain')
    bn.pool(x.split(4), model.embed)
    with bn, pytest.raises(ValueError, match="'head' has no pooled statistics"): model(x)

@pytest.mark.parametrize('ctx', [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_threads_see_the_state_of_the_caller(ctx):
    net,x,seen = small_net(torch.float32),shifted(dtype=torch.float32),[]
    def forward(x):
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled('cpu'),
                     torch.get_autocast_dtype('cpu')))
        return net(x)
    bn = BatchNormMode(net, 'domain')
    with ctx(), torch.autocast('cpu', torch.bfloat16):
        here = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), True, torch.bfloat16)
        out = bn.pool(x.split(5), forward)
        whole = BatchNormMode(net, 'batch').predict([x])[0]
    assert seen == [here]*3 and out[0].dtype == whole.dtype == torch.bfloat16
    assert all(o.requires_grad == here[0] and o.is_inference() == here[1] for o in out)
    torch.testing.assert_close(torch.cat(out).float(), whole.float(), rtol=.05, atol=.05)
    seen.clear(); bn.pool(x.split(5), forward)
    assert all(s[2] is False for s in seen)

def test_statistics_from_inference_mode_allow_gradients_later():
    net,x = small_net(),shifted()
    bn = BatchNormMode(net, 'controls')
    with torch.inference_mode(): bn.pool(x.split(5))
    with bn: net(x.requires_grad_()).square().sum().backward()
    assert x.grad.isfinite().all() and (x.grad != 0).any()

def test_half_precision_model():
    net,x = small_net(torch.bfloat16),shifted(dtype=torch.bfloat16)
    with torch.no_grad(): out = torch.cat(BatchNormMode(net, 'domain').pool(x.split(5)))
    assert out.dtype == torch.bfloat16 and out.isfinite().all()

def test_one_thread_computes_at_a_time():
    net,active,most = small_net(),[],[]
    def forward(x):
        for layer in net:
            active.append(1); most.append(len(active)); time.sleep(.002); active.pop()
            x = layer(x)
        return x
    with torch.no_grad(): BatchNormMode(net, 'domain').pool(shifted().split(2), forward)
    assert max(most) == 1 and len(most) == 7*len(net)

# --- restoration

@each('mode', ['running','batch','domain','controls'])
def test_model_is_unchanged(mode):
    net = nn.Sequential(small_net(), nn.Flatten(), nn.Dropout(.5)).train()
    net[0][1].eval(); net[0][4].num_batches_tracked.fill_(7)
    before,x = snapshot(net),shifted()
    bn = BatchNormMode(net, mode)
    with torch.no_grad(): a,b = (torch.cat(bn.predict(x.split(5), controls=x.split(6))) for _ in range(2))
    assert_unchanged(net, before)
    assert torch.equal(a, b), 'dropout must be off'
    with pytest.raises(KeyError), bn:
        assert not any(m.training for m in net.modules())
        net(x); net.train(); raise KeyError
    assert_unchanged(net, before)

class Failing(nn.Module):
    def __init__(self, error, at): super().__init__(); self.error,self.at = error,at
    def forward(self, x):
        if len(x) == self.at: raise self.error
        return x

@each('place', [0, 2, 5])
@each('error', [RuntimeError('out of memory'), KeyboardInterrupt()], ids=repr)
def test_error_in_a_thread_is_raised_in_the_caller(place, error):
    layers = list(small_net()); layers.insert(place, Failing(error, 3))
    net = nn.Sequential(*layers)
    before,bn = snapshot(net),BatchNormMode(net, 'domain')
    with pytest.raises(type(error)) as info: bn.pool(shifted().split([5, 3, 5]))
    assert info.value is error and any(e.name == 'forward'
                                       for e in info.traceback), 'the traceback must lead to where it happened'
    assert_unchanged(net, before)
    assert not bn.stats
    assert len(bn.pool(shifted().split(5)[:2])) == 2, 'and the object works again'

def test_interrupt_of_the_caller():
    "Control-C reaches the main thread, which waits for the others"
    net = small_net(); before = snapshot(net)
    def forward(x):
        if len(x) == 3: _thread.interrupt_main(); time.sleep(.2)
        return net(x)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler) # a process started in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt): BatchNormMode(net, 'domain').pool(shifted().split(5), forward)
    finally: signal.signal(signal.SIGINT, handler)
    assert_unchanged(net, before)

def test_threads_that_cannot_start(monkeypatch):
    start,count = threading.Thread.start,[0]
    def limited(self):
        count[0] += 1
        if count[0] == 3: raise RuntimeError("can't start new thread")
        start(self)
    net = small_net(); before = snapshot(net)
    monkeypatch.setattr(threading.Thread, 'start', limited)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        BatchNormMode(net, 'domain').pool(shifted().split(2))
    assert_unchanged(net, before)

def test_batches_that_walk_differently():
    a,b = nn.BatchNorm2d(3).double(),nn.BatchNorm2d(3).double()
    both = nn.ModuleList([a, b])
    cases = [(lambda x: b(a(x)) if len(x) == 5 else a(b(x)), "batch 0 calls BatchNorm '0' where batch 2 calls "
              "BatchNorm '1'"),
             (lambda x: b(a(x)) if len(x) == 5 else a(x), "batch 0 calls BatchNorm '1' where batch 2 is through"),
             (lambda x: b(a(x)) if len(x) != 5 else a(x), "batch 0 is through where batch 2 calls BatchNorm '1'")]
    for forward,message in cases:
        before = snapshot(both)
        with pytest.raises(ValueError, match=message): BatchNormMode(both, 'domain').pool(shifted().split(5), forward)
        assert_unchanged(both, before)

# --- what cannot be done

def test_one_value_per_channel():
    net,x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double(),torch.randn(3, 3).double()
    for run in (lambda: BatchNormMode(net, 'domain').pool([x[:1]]),
                lambda: BatchNormMode(net, 'batch').predict([x, x[:1]])):
        with pytest.raises(ValueError, match=r"BatchNorm '1' has one value per channel \(input of shape \(1, 4\)\)"):
            run()
    out = torch.cat(BatchNormMode(net, 'domain').pool(x.split(1))) # single images are fine if the domain has more
    torch.testing.assert_close(out.detach(), training_forward(net, x))

@each('run,message', [
    (lambda net, x: BatchNormMode(net, 'plate'), "'plate', expected one of running, batch, domain, controls"),
    (lambda net, x: BatchNormMode(nn.Linear(2, 2), 'domain'), "no BatchNorm"),
    (lambda net, x: BatchNormMode(net, 'domain').__enter__(), r"call pool\(batches\) first"),
    (lambda net, x: BatchNormMode(net, 'batch').pool([x]), "mode 'batch' pools nothing"),
    (lambda net, x: BatchNormMode(net, 'domain').pool([]), "no batches"),
    (lambda net, x: BatchNormMode(net, 'domain').pool([x], lambda x: x), "no BatchNorm of the model was called"),
    (lambda net, x: BatchNormMode(net, 'domain').pool([x, x[:0]]), "a batch is empty"),
    (lambda net, x: BatchNormMode(net, 'domain').pool([x[0,0]]), "Expected|expected"),
    (lambda net, x: BatchNormMode(net, 'controls').predict([x]), "give `controls`"),
    (lambda net, x: BatchNormMode(torch.compile(net, backend='eager'), 'batch'), "compiled"),
    (lambda net, x: BatchNormModeCallback('domain'), "'batch' or 'running'")])
def test_readable_errors(run, message):
    net = small_net(); before = snapshot(net)
    with pytest.raises((ValueError, RuntimeError), match=message): run(net, shifted())
    assert_unchanged(net, before)

# --- running statistics, and fitting

def test_reestimate():
    net,x = small_net(torch.float32),shifted(dtype=torch.float32)
    with torch.no_grad():
        want = torch.cat(BatchNormMode(net, 'domain').pool(x.split(5)))
        assert reestimate_batchnorm(net, x.split(4)) is net and net.training
        torch.testing.assert_close(net.eval()(x), want, rtol=1e-5, atol=1e-5)
    assert net[1].num_batches_tracked == 4
    model = Shared().double()
    with pytest.warns(UserWarning, match='keep their running statistics: head'):
        reestimate_batchnorm(model, shifted().split(5), model.embed)
    assert (model.head.running_mean == 0).all() and (model.bn.running_mean != 0).all()
    untracked = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)).double()
    assert reestimate_batchnorm(untracked, [shifted()])[0].running_mean is None

class Batches:
    def __init__(self, train, valid):
        self.both,self.train,self.valid,self.device = (train, valid),train,valid,torch.device('cpu')
    def __getitem__(self, i): return self.both[i]

def make_learner(*cbs):
    torch.manual_seed(0)
    net = nn.Sequential(small_net(torch.float32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = [(shifted(5, dtype=torch.float32)+i, torch.arange(5)) for i in range(4)]
    return Learner(Batches(data[:2], data[2:]), net, loss_func=nn.CrossEntropyLoss(), cbs=cbs)

def quiet_fit(learn, *cbs):
    with learn.no_logging(), learn.no_mbar(): learn.fit(1, 1e-2, cbs=cbs)

class Watch(Callback):
    "Keeps the validation outputs, and raises `error` in the second validation batch"
    def __init__(self, error=None, event='after_pred'): self.error,self.outs = error,[]; setattr(self, event, self.look)
    def look(self):
        if self.training: return
        self.outs.append(getattr(self.learn, 'pred', None))
        if self.error and self.iter == 1: raise self.error

def test_callback_validates_with_batch_statistics():
    plain,learn,watch = make_learner(),make_learner(BatchNormModeCallback()),Watch()
    quiet_fit(plain); quiet_fit(learn, watch)
    assert all(torch.equal(a, b) for a,b in zip(plain.model.state_dict().values(), learn.model.state_dict().values()))
    assert 'forward' not in learn.model.__dict__
    with torch.no_grad(): want = BatchNormMode(learn.model, 'batch').predict([x for x,_ in learn.dls.valid])
    for out,w in zip(watch.outs, want): torch.testing.assert_close(out, w)
    assert not torch.allclose(watch.outs[0], plain.model.eval()(learn.dls.valid[0][0]))

@pytest.mark.parametrize('error', [CancelValidException(), CancelEpochException(), CancelFitException()], ids=repr)
def test_callback_leaves_when_validation_is_cancelled(error):
    learn = make_learner(BatchNormModeCallback())
    quiet_fit(learn, Watch(error))
    assert 'forward' not in learn.model.__dict__ and not any(m._forward_pre_hooks for m in learn.model.modules())

@pytest.mark.parametrize('error', [KeyboardInterrupt(), RuntimeError('out of memory')], ids=repr)
def test_interrupted_validation_leaves_complete_buffers(error):
    "fastai sends no event then, but the model must be whole, and the next fit as if nothing had happened"
    learn = make_learner(BatchNormModeCallback())
    learn.model.append(Failing(error, 4)); keys = list(learn.model.state_dict())
    learn.dls.valid[1] = learn.dls.valid[1][0][:4],torch.arange(4)
    with pytest.raises(type(error)): quiet_fit(learn)
    assert list(learn.model.state_dict()) == keys and not any(m._forward_pre_hooks for m in learn.model.modules())
    learn.dls.valid.pop(); quiet_fit(learn)
    assert 'forward' not in learn.model.__dict__
    assert all(bn.running_mean is not None for bn in batchnorm_layers(learn.model).values())

# --- shown by: a residual net, float32, against float64 with the whole domain in one batch

class Residual(nn.Module):
    "Three BatchNorms, the last on the sum of two paths"
    def __init__(self):
        super().__init__()
        self.conv1,self.bn1,self.conv2,self.bn2,self.bn3 = nn.Conv2d(3, 4, 3, padding=1),nn.BatchNorm2d(4),nn.Conv2d(
            4, 4, 3, padding=1),nn.BatchNorm2d(4),nn.BatchNorm2d(4)
    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.bn3(x + self.bn2(self.conv2(x)))

def float64_stats(model, x):
    "Means and standard deviations of every BatchNorm's input, and the outputs, for all of `x` in one float64 batch"
    model,seen = copy.deepcopy(model).double().train(),{}
    for name,layer in batchnorm_layers(model).items():
        layer.register_forward_pre_hook(lambda m, args, name=name: seen.update(
            {name: (args[0].mean((0,2,3)), args[0].std((0,2,3), correction=0))}))
    with torch.no_grad(): return model(x.double()),seen

@each('bf16,rtol', [(False, 1e-5), (True, 1e-2)])
@each('bs', [1, 7, 64])
def test_pooled_statistics_equal_float64(bs, bf16, rtol):
    "Treated wells with their controls, in any order; and controls alone, applied to the treated"
    model = Residual().train()
    model.bn2.eval(); before = snapshot(model)
    x = torch.cat([shifted(48, 5), 3*shifted(18, 5)-4]).float()[torch.randperm(66)]
    is_control = torch.arange(66) % 4 == 0
    for mode,pooled in (('domain', x), ('controls', x[is_control])):
        bn = BatchNormMode(model, mode)
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            out = torch.cat(bn.pool(pooled.split(bs)))
        assert_unchanged(model, before)
        whole,stats = float64_stats(model, pooled)
        for name,(mean,std) in stats.items():
            (s,) = bn.stats[name]
            assert ((s.mean-mean).abs() <= rtol*(mean.abs()+std)).all() and (
                (s.var.sqrt()-std).abs() <= rtol*std).all(), name
        assert (out-whole).norm() <= rtol*whole.norm()

def test_domain_of_one_image_is_its_own_content():
    net,x = small_net(),shifted(1)
    with torch.no_grad():
        torch.testing.assert_close(BatchNormMode(net, 'domain').pool([x])[0], training_forward(net, x))

# --- several domains in one batch

def by_domain(x, domains, reference, eps=1e-5):
    "Written out: every row by the statistics of its domain's reference rows; also the pooled statistics"
    dims,rows = [0, *range(2, x.ndim)],[]
    for d in domains:
        r = x[(domains == d) & reference]
        rows.append((r.mean(dims, keepdim=True), r.var(dims, correction=0, keepdim=True)))
    mean,var = (torch.cat(s) for s in zip(*rows))
    used = x[reference]
    return (x-mean)/(var+eps).sqrt(),used.mean(dims),used.var(dims)

DOMAINS = {'contiguous': [7,7,7,-1,-1,-1,-1,-1], 'scattered': [3,-1,3,3,-1,5,5,-1], 'one': [4]*8}
REFERENCE = {'all': None, 'later': [0,1,1,1,0,1,1,1], 'scattered': [1,0,1,0,1,1,1,1]}

@each('reference', REFERENCE)
@each('domains', DOMAINS)
@each('kind', LAYERS)
def test_slices_match_the_formula(kind, domains, reference):
    "Outputs, gradients and running statistics; float64"
    layer,shape = LAYERS[kind]
    layer = copy.deepcopy(layer).double().train()
    for p in layer.parameters(): nn.init.normal_(p)
    x = (torch.randn(shape)*3 + 5).double() * torch.arange(1, 9).view(8, *[1]*(len(shape)-1))
    if kind == 'channels last': x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    d = torch.tensor(DOMAINS[domains])
    marks = None if REFERENCE[reference] is None else torch.tensor(REFERENCE[reference]).bool()
    plain = copy.deepcopy(layer)
    with domain_slices(layer, d, marks): out = layer(x)
    want,mean,var = by_domain(x, d, torch.ones(8, dtype=bool) if marks is None else marks)
    if layer.affine: want = want*layer.weight.view(-1, *[1]*(x.ndim-2)) + layer.bias.view(-1, *[1]*(x.ndim-2))
    torch.testing.assert_close(out, want)
    if kind == 'channels last': assert out.is_contiguous(memory_format=torch.channels_last)
    inputs,weights = [x, *layer.parameters()],torch.randn_like(out)
    for a,b in zip(*(torch.autograd.grad((o*weights).sum(), inputs) for o in (out, want))):
        torch.testing.assert_close(a, b)
    if layer.running_mean is None: return
    m = 1. if layer.momentum is None else layer.momentum
    torch.testing.assert_close(layer.running_mean, m*mean); torch.testing.assert_close(layer.running_var, 1-m + m*var)
    assert layer.num_batches_tracked == 1
    if domains == 'one' and marks is None: # PyTorch's own path
        assert torch.equal(plain(x), out) and all(torch.equal(a, b) for a,b in zip(plain.buffers(), layer.buffers()))

@pytest.mark.parametrize('make', [NETWORKS['efficientnet'], NETWORKS['densenet']], ids=['efficientnet','densenet'])
def test_slices_of_deep_networks(make):
    "As if every domain were a batch of its own; with controls, as `BatchNormMode` does it at inference"
    model = make().double()
    for m in model.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd): m.eval()
    x,d,control = shifted(8, 32),torch.tensor([1,1,2,2,2,2,1,1]),torch.tensor([0,1,0,0,1,1,0,1]).bool()
    hooks,flags = snapshot(model)[:2]
    with domain_slices(model, d): out = model(x)
    with domain_slices(model, d, control), torch.no_grad(): by_controls = model(x)
    assert (hooks, flags) == snapshot(model)[:2] and not any('forward' in m.__dict__ for m in model.modules())
    for i in (1, 2):
        torch.testing.assert_close(out[d==i], training_forward(model, x[d==i]), rtol=1e-8, atol=1e-8)
        with torch.no_grad():
            want, = BatchNormMode(model, 'controls').predict([x[d==i]], controls=[x[(d==i) & control]])
        torch.testing.assert_close(by_controls[d==i], want, rtol=1e-8, atol=1e-8)
    assert all(bn.num_batches_tracked == 2 for bn in batchnorm_layers(model).values())
    out.sum().backward() # after closing

def test_slices_under_autocast():
    "bf16 in and out, statistics in float32: the mean is far from zero, where bf16 has steps of 2"
    net,x,d = nn.Sequential(nn.BatchNorm2d(3)),(300 + 4*torch.randn(6, 3, 8, 8)).bfloat16(),torch.tensor([0,0,0,1,1,1])
    x[3:] += 60
    for marks in (None, torch.tensor([1,1,0,1,1,0]).bool()):
        with torch.autocast('cpu', torch.bfloat16), domain_slices(net, d, marks): out = net(x.requires_grad_())
        want,mean,_ = by_domain(x.double(), d, torch.ones(6, dtype=bool) if marks is None else marks)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), want, rtol=1e-2, atol=1e-2)
        got, = torch.autograd.grad(out.float().square().sum()+out.float().pow(3).sum(), x)
        exact, = torch.autograd.grad(want.square().sum()+want.pow(3).sum(), x)
        assert (got-exact).norm() < .02*exact.norm()
    torch.testing.assert_close(net[0].running_mean.double(), (.1*.9+.1)*mean, rtol=5e-3, atol=0)

def test_slices_of_a_layer_called_twice_and_of_two_graphs():
    "Its running statistics move twice, and an earlier forward of it can still go backward"
    model,x = Shared().double(),shifted(6)
    first = model.embed(x).sum()
    with domain_slices(model, [0,0,0,1,1,1]): out = model.embed(x)
    assert model.bn.num_batches_tracked == 4
    for part,rows in zip(out.split(3), x.split(3)):
        torch.testing.assert_close(part, training_forward_embed(model, rows, 1.))
    (first + out.square().sum()).backward()

def test_eval_mode_has_nothing_to_slice():
    net,x = small_net().eval(),shifted(4)
    want = net(x)
    with domain_slices(net, [0,0,1,1], torch.tensor([1,1,0,0]).bool()): assert torch.equal(net(x), want)
    with domain_slices(net, [0,0,1,1]), BatchNormMode(net, 'batch'): a = net(x)
    with BatchNormMode(net, 'batch'), domain_slices(net, [0,0,1,1]): b = net(x)
    assert torch.equal(a, b)
    torch.testing.assert_close(a, torch.cat([training_forward(net, p) for p in x.split(2)]))

class Frozen(nn.BatchNorm2d):
    "Uses its running statistics in training too"
    def forward(self, x):
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)

def test_frozen_subclass_has_nothing_to_slice():
    layer,x = Frozen(3).train(),shifted(4).float()
    with domain_slices(layer, [0,0,1,1]): assert torch.equal(layer(x), layer.eval()(x))

class Silent(nn.BatchNorm2d):
    def forward(self, x): return x

@each('run,message', [
    (lambda net, x: net(x[1:]),
     r"BatchNorm '1' got 3 rows \(input of shape \(3, 4, 7, 7\)\), but domains were given for 4"),
    (lambda net, x: net(x).sum().missing, 'missing'),
    (lambda net, x: domain_slices(net, [0,0,1,1]).__enter__(), 'open on this model already')])
@each('domains', [[0,0,5,5], [0]*4], ids=str)
def test_errors_inside_leave_the_model_whole(domains, run, message):
    net,x = small_net(),shifted(4)
    with pytest.raises((ValueError, AttributeError), match=message):
        with domain_slices(net, domains): run(net, x)
    assert not any('forward' in m.__dict__ or m._forward_pre_hooks for m in net.modules())

@each('args,message', [
    (([0,0,5,5], torch.tensor([1,0,0,0]).bool()), 'domain 5 has no reference rows, none of its 2'),
    (([[1,0],[1,0],[1,3],[1,3]], torch.tensor([1,0,0,0]).bool()), r'domain \(1, 3\) has no reference rows'),
    ((torch.zeros(4),), 'expected integers'), (([],), 'expected integers'),
    (([0,0,1,1], torch.ones(3).bool()), r'expected bool of shape \(4,\)'),
    (([0,0,1,1], torch.ones(4)), 'expected bool')])
def test_readable_errors_of_slices(args, message):
    net = small_net()
    with pytest.raises(ValueError, match=message):
        with domain_slices(net, *args): net(shifted(4))
    assert not any('forward' in m.__dict__ for m in net.modules())

def test_one_value_silent_layers_and_models_without_batchnorm():
    for domains in ([0,0,3], [3]):
        with pytest.raises(ValueError,
                           match=r"BatchNorm 'BatchNorm1d' has one value per channel \(input of shape \(1, 4\)\) for "
                           r"domain 3"):
            layer = nn.BatchNorm1d(4)
            with domain_slices(layer, domains): layer(torch.randn(len(domains), 4))
    with pytest.raises(RuntimeError, match=r'\(Silent\) did not call'), domain_slices(layer := Silent(3), [0,1]):
        layer(shifted(2))
    with pytest.raises(ValueError, match='compiled'), domain_slices(torch.compile(small_net(), backend='eager'), [0]):
        pass
    with pytest.warns(UserWarning, match='no BatchNorm') as w, domain_slices(linear := nn.Linear(2, 2), [0,1]):
        linear(torch.randn(2, 2))
    assert w[0].filename == __file__

# --- in a Learner

class Context(nn.Module):
    def __init__(self):
        super().__init__(); self.net = nn.Sequential(small_net(torch.float32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    def forward(self, x, context): return self.net(x)

CONTEXT = torch.tensor([[0,5,0,0],[0,5,0,2],[0,5,1,0],[0,5,1,1],[1,6,0,0],[1,6,0,1],[1,6,0,0],[1,6,0,2]])

def context_learner(*cbs, context=CONTEXT):
    torch.manual_seed(0)
    model = Context()
    data = [(shifted(8, dtype=torch.float32)+i, context, torch.arange(8)%5) for i in range(4)]
    dls = Batches(data[:2], data[2:]); dls.n_inp = 2
    return Learner(dls, model, loss_func=nn.CrossEntropyLoss(), cbs=cbs)

@each('by,domains', [('cell_type', [0]*4+[1]*4), ('experiment', [5]*4+[6]*4), ('plate', [0,0,1,1,2,2,2,2]),
                     (None, [0]*8)])
@each('reference', ['all', 'controls'])
def test_callback_slices_training_and_validation(by, domains, reference):
    "The same as a loop by hand, and in either order with the callback for batch statistics"
    marks = None if reference == 'all' else CONTEXT[:,3] != 0
    hand = context_learner()
    model,opt = hand.model,torch.optim.SGD(hand.model.parameters(), 1e-2)
    for x,context,y in hand.dls.train:
        with domain_slices(model.train(), domains, marks): nn.functional.cross_entropy(model(x, context), y).backward()
        opt.step(); opt.zero_grad()
    with torch.no_grad(), BatchNormMode(model, 'batch'), domain_slices(model, domains, marks):
        want = [model(x, c) for x,c,_ in hand.dls.valid]
    for cbs in ([BatchNormModeCallback(), DomainSlices(by, reference)],
                [DomainSlices(by, reference), BatchNormModeCallback()]):
        learn,watch = context_learner(*cbs),Watch()
        learn.opt_func = lambda params, lr: OptimWrapper(params, torch.optim.SGD, lr=lr)
        quiet_fit(learn, watch)
        for k,v in model.state_dict().items(): torch.testing.assert_close(learn.model.state_dict()[k], v, msg=k)
        for a,b in zip(watch.outs, want): torch.testing.assert_close(a, b)
        assert not any('forward' in m.__dict__ for m in learn.model.modules())

def test_callback_reads_mixed_context_and_says_what_is_missing():
    class MixedContext:
        def __init__(self, context): self.context,self.other,self.weight = context,context.flip(0),torch.ones(8)
    a,b = (context_learner(DomainSlices('plate', 'controls')),
           context_learner(DomainSlices('plate', 'controls'), context=MixedContext(CONTEXT)))
    for learn in (a, b): quiet_fit(learn)
    assert all(torch.equal(v, w) for v,w in zip(a.model.state_dict().values(), b.model.state_dict().values()))
    with pytest.raises(ValueError, match=r'domain \(5,\) has no reference rows'):
        quiet_fit(context_learner(DomainSlices('experiment', 'controls'), context=CONTEXT[:,:3]))
    with pytest.raises(ValueError, match='no context'): quiet_fit(make_learner(DomainSlices()))
    with pytest.raises(ValueError, match="by is 'well', expected one of None, 'cell_type', 'experiment', 'plate'"):
        DomainSlices('well')
    with pytest.raises(ValueError, match="reference is 'positive'"): DomainSlices(reference='positive')

@each('event', ['before_batch', 'after_pred'])
@each('error', [CancelBatchException(), CancelFitException(), KeyboardInterrupt()], ids=repr)
def test_callback_interrupted(error, event):
    learn = context_learner(DomainSlices(), BatchNormModeCallback())
    def stop(): raise error
    watch = Callback(); setattr(watch, event, stop)
    if not isinstance(error, KeyboardInterrupt): watch.order = 2000 # after the wrapping
    try: quiet_fit(learn, watch)
    except KeyboardInterrupt: pass
    learn.remove_cb(watch)
    assert 'forward' not in learn.model.__dict__
    quiet_fit(learn)
    assert not any('forward' in m.__dict__ for m in learn.model.modules())
