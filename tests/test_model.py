"""Backbones, first convolutions, heads, weights in and out; what all heads, pools and rules share is in
`test_contracts`.

Nothing is downloaded: loaders are replaced, files are made here."""
import copy
import errno
import io
import itertools
import os
import pickle
import socket
import sys
import urllib.error
from pathlib import Path

import pytest
from cases import each
import timm
import torch
import torch.nn.functional as F
from fastai.layers import AdaptiveConcatPool2d
from fastai.torch_core import TensorBase, TensorImage
from pretrainedmodels.models import senet
from safetensors.torch import save_file
from torch import nn

import rcic_fastai.model.backbone as M
from rcic_fastai.loss.single import CrossEntropyArcFaceLoss
from rcic_fastai.data.context import MixedContext
from rcic_fastai.model.backbone import Backbone, channel_mixing, create_backbone, download_weights, first_convs
from rcic_fastai.model.backbone import patch_first_conv, read_weights, weight_urls
from rcic_fastai.model.core import ScreenModel, create_model, load_weights, param_groups, read_meta, save_weights
from rcic_fastai.model.head import CosineLinear, GeM, ScreenBody, ScreenHead, condition_on_controls, create_screen_head


@pytest.fixture(autouse=True)
def seed():
    n = torch.get_num_threads()
    torch.set_num_threads(1); torch.manual_seed(0)
    yield
    torch.set_num_threads(n)

@pytest.fixture
def no_network(monkeypatch):
    def refuse(url, *args, **kwargs): raise urllib.error.URLError('no network here')
    monkeypatch.setattr(M, 'load_state_dict_from_url', refuse)

@pytest.fixture(scope='module')
def small(): return create_model('small_seresnext', 5, head='neck', n_hidden=32, n_cell_types=3)

def context(b=4): return torch.tensor([[i%3, i, 1] for i in range(b)])

# ---- networks

@pytest.mark.slow
@each('arch', ['small_seresnext', 'se_resnext50_32x4d', 'resnet18', 'densenet121', 'efficientnet_b0',
               'legacy_seresnext26_32x4d',
                                  'convnext_atto', 'mobilenetv3_small_050', 'regnetx_002', 'repvgg_a0'])
def test_families(arch):
    body = create_backbone(arch).eval()
    with torch.no_grad():
        for size in (32, 75):
            y = body(torch.randn(1, 6, size, size))
            assert y.ndim == 4 and y.shape[:2] == (1, body.n_features)
    assert all(c.in_channels == 6 for c in first_convs(body.net).values())

@pytest.mark.slow
@each('arch', ['small_seresnext', 'efficientnet_b0', 'convnext_atto', 'mobilenetv3_small_050', 'repvgg_a0'])
def test_every_parameter_gets_a_gradient(arch):
    model = create_model(arch, 3, pool='gem', head='linear')
    model(torch.randn(2, 6, 64, 64)).sum().backward()
    assert [n for n,p in model.named_parameters() if p.grad is None] == []

@pytest.mark.parametrize('arch,tokens', [('vit_tiny_patch16_224', 16), ('swin_tiny_patch4_window7_224', 4)])
def test_transformers(arch, tokens):
    body = create_backbone(arch, img_size=64).eval()
    with torch.no_grad(): y = body(torch.randn(1, 6, 64, 64))
    assert y.shape[1] == body.n_features and y.shape[2]*y.shape[3] == tokens # no class token among them

def test_seresnext_is_that_of_pretrainedmodels():
    for name in ('se_resnext50_32x4d', 'se_resnext101_32x4d'):
        with torch.device('meta'): theirs = getattr(senet, name)(pretrained=None); ours = M._seresnext(name)
        theirs = {k: v.shape for k,v in theirs.state_dict().items() if not k.startswith('last_linear')}
        assert {k: v.shape for k,v in ours.net.state_dict().items()} == theirs

@pytest.mark.slow
def test_the_first_network_of_a_process_draws_what_the_next_one_draws(monkeypatch):
    "pretrainedmodels is imported late, and importing it consumes random numbers"
    for name in [m for m in sys.modules if m.partition('.')[0] == 'pretrainedmodels']:
        monkeypatch.delitem(sys.modules, name)
    torch.manual_seed(0); first = M._seresnext('small_seresnext').state_dict()
    torch.manual_seed(0); second = M._seresnext('small_seresnext').state_dict()
    assert all(torch.equal(v, second[k]) for k,v in first.items())

@pytest.mark.slow
def test_seresnext_computes_what_pretrainedmodels_computes():
    net = senet.se_resnext50_32x4d(pretrained=None).eval()
    ours = M._seresnext('se_resnext50_32x4d').eval()
    M.load_checked(ours.net, net.state_dict(), 'theirs', M.classifier_keys)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): torch.testing.assert_close(ours(x), net.features(x))

def test_timm_publishes_the_same_state():
    for name in ('se_resnext50_32x4d', 'se_resnext101_32x4d'):
        with torch.device('meta'):
            a = getattr(senet, name)(pretrained=None).state_dict()
            b = timm.create_model(name.replace('se_', 'legacy_se')).state_dict()
        assert {k: v.shape for k,v in a.items()} == {k: v.shape for k,v in b.items()}
    assert len(a) == 758

def test_unknown_names():
    with pytest.raises(ValueError, match='se_resnext50_32x4d'): create_backbone('se_resnext50')
    with pytest.raises(ValueError, match='nearest: none'): create_backbone('qqqqqqqqqqqq')
    with pytest.raises(ValueError, match='reads 48 channels'): create_backbone('tresnet_m')
    with pytest.raises(ValueError, match='no options, got img_size'): create_backbone('small_seresnext', img_size=64)
    with pytest.raises(ValueError, match="cannot build 'resnet18'.*not_an_option"):
        create_backbone('resnet18', not_an_option=1)
    with pytest.raises(ValueError, match='expected maps of 8'): Backbone(nn.Identity(), 8)(torch.zeros(1, 7, 4, 5))

# ---- first convolution

def conv(c=3, **kw): return nn.Sequential(nn.Conv2d(c, 8, 5, **{**dict(stride=2, padding=1, dilation=2), **kw}))

def test_repeat_sees_the_same_rgb_twice():
    old = conv(); new = patch_first_conv(copy.deepcopy(old), 6, 'repeat')
    x = torch.randn(2, 3, 20, 20)
    torch.testing.assert_close(new(torch.cat([x, x], 1)), old(x))
    assert not torch.allclose(new(torch.cat([x, 0*x], 1)), old(x), atol=.1)

def test_fewer_channels_add_up():
    for init,n in itertools.product(('mean', 'repeat'), (1, 2)):
        torch.testing.assert_close(channel_mixing(init, n).sum(0), torch.ones(3))

@pytest.mark.parametrize('init', ['mean', 'repeat'])
def test_correlated_channels_keep_their_scale(init):
    old = conv(); old[0].weight.data = old[0].weight.data.mean(1, keepdim=True)*(1 + .1*torch.randn(8, 3, 1, 1))
    new = patch_first_conv(copy.deepcopy(old), 6, init)
    x = .95**.5*torch.randn(16, 1, 40, 40) + .05**.5*torch.randn(16, 6, 40, 40)
    ratio = (new(x) - new[0].bias[:,None,None]).std()/(old(x[:,:3]) - old[0].bias[:,None,None]).std()
    assert abs(ratio - 1) < .04, ratio
    wrong = copy.deepcopy(new); wrong[0].weight.data *= 2 # the published mistake
    assert wrong(x).std()/old(x[:,:3]).std() > 1.7

def test_zero_copies_and_mean_is_equal():
    old = conv()
    zero,mean = (patch_first_conv(copy.deepcopy(old), 6, i)[0].weight for i in ('zero', 'mean'))
    assert torch.equal(zero[:,:3], old[0].weight) and not zero[:,3:].any()
    torch.testing.assert_close(mean, old[0].weight.mean(1, keepdim=True).expand(-1, 6, -1, -1)/2)

def test_random_has_the_fan_in_of_all_channels():
    net = nn.Sequential(nn.Conv2d(3, 256, 7)); old = net[0].weight.detach().clone()
    w = patch_first_conv(net, 6, 'random')[0].weight
    assert abs(w.std()*(6*49/2)**.5 - 1) < .02 and not net[0].bias.any()
    assert not torch.allclose(w[:,:3], old)

def test_a_second_patch_changes_nothing():
    net = patch_first_conv(conv(), 6)
    w = net[0].weight
    assert patch_first_conv(net, 6, 'random')[0].weight is w # six already

def test_parallel_stems():
    body = create_backbone('repvgg_a0')
    assert len(first_convs(body.net)) == 2

def test_patch_errors():
    with pytest.raises(ValueError, match="init is 'copy', expected one of mean, repeat, zero, random"):
        patch_first_conv(conv(), 6, 'copy')

def test_default_init_follows_the_weights(tmp_path):
    torch.save(M._timm('resnet18', False).net.state_dict(), tmp_path/'w.pth')
    same = lambda body: torch.equal(body.net.conv1.weight[:,0], body.net.conv1.weight[:,5])
    assert same(create_backbone('resnet18', pretrained=tmp_path/'w.pth'))
    assert not same(create_backbone('resnet18'))
    assert same(create_backbone('resnet18', init='mean'))

# ---- pretrained weights

def published(name='se_resnext50_32x4d'): return getattr(senet, name)(pretrained=None).state_dict()

def test_pretrained_prefers_timm_and_falls_back(monkeypatch):
    state,asked = published(),[]
    def loader(url, **kw):
        asked.append((url, kw['weights_only'], kw['check_hash'], socket.getdefaulttimeout()))
        if 'github' in url: raise urllib.error.URLError('unreachable')
        return state
    monkeypatch.setattr(M, 'load_state_dict_from_url', loader)
    body = create_backbone('se_resnext50_32x4d', pretrained=True)
    torch.testing.assert_close(body.net.layer4[2].conv3.weight, state['layer4.2.conv3.weight'])
    torch.testing.assert_close(body.net.layer0.conv1.weight.sum(1), state['layer0.conv1.weight'].sum(1))
    assert [u for u,*_ in asked] == weight_urls('se_resnext50_32x4d')
    assert 'legacy_se_resnext50_32x4d' in asked[0][0] and 'lip6' in asked[1][0]
    assert [a[1:] for a in asked] == [(True, False, 15.), (True, True, 15.)] and socket.getdefaulttimeout() is None

def test_no_network(no_network):
    with pytest.raises(ConnectionError, match="(?s)pretrained='FILE.pth'.*github.*no network here.*lip6"):
        create_backbone('se_resnext50_32x4d', pretrained=True)
    assert socket.getdefaulttimeout() is None
    with pytest.raises(ValueError, match='small_seresnext has no published weights'):
        create_backbone('small_seresnext', pretrained=True)

def test_timm_loads_its_own(monkeypatch):
    seen = {}
    class Stop(Exception): pass
    def create(name, **kw): seen.update(kw); raise Stop
    monkeypatch.setattr(timm, 'create_model', create)
    with pytest.raises(Stop): create_backbone('resnet18', pretrained=True)
    assert seen['pretrained'] is True and seen['in_chans'] == 3
    with pytest.raises(Stop): create_backbone('resnet18', pretrained='file.pth')
    assert seen['pretrained'] is False

@pytest.mark.slow
@each('suffix', ['.pth', '.safetensors'])
@each('classifier', [True, False])
def test_weights_from_a_file(tmp_path, suffix, classifier):
    state = timm.create_model('resnet18', num_classes=7).state_dict()
    if not classifier: state = {k: v for k,v in state.items() if not k.startswith('fc')}
    file = tmp_path/f'w{suffix}'
    if suffix == '.pth': torch.save({'state_dict': state, 'epoch': 3}, file)
    else: save_file(state, file)
    body = create_backbone('resnet18', pretrained=str(file), init='repeat')
    assert torch.equal(body.net.layer4[1].conv2.weight, state['layer4.1.conv2.weight'])
    torch.testing.assert_close(body.net.conv1.weight[:,3], state['conv1.weight'][:,0]/2)

def test_files_without_batch_counters(tmp_path):
    state = M._seresnext('small_seresnext').net.state_dict()
    torch.save({k: v for k,v in state.items() if not k.endswith('num_batches_tracked')}, tmp_path/'old.pth')
    create_backbone('small_seresnext', pretrained=tmp_path/'old.pth')

@pytest.mark.slow
def test_files_that_do_not_fit(tmp_path):
    state = M._timm('resnet18', False).net.state_dict()
    def attempt(state):
        torch.save(state, tmp_path/'w.pth')
        create_backbone('resnet18', pretrained=tmp_path/'w.pth')
    with pytest.raises(ValueError, match='w.pth does not fit ResNet; weights 1 missing: layer1.0.conv1.weight$'):
        attempt({k: v for k,v in state.items() if k != 'layer1.0.conv1.weight'})
    with pytest.raises(ValueError, match='1 unexpected: layer9.weight'):
        attempt(state | {'layer9.weight': torch.zeros(1)})
    with pytest.raises(ValueError, match=r'conv1.weight is \(64, 6, 7, 7\), expected \(64, 3, 7, 7\)'):
        attempt(state | {'conv1.weight': torch.zeros(64, 6, 7, 7)})
    with pytest.raises(ValueError, match='dictionary of tensors'): attempt({'a': 1})

class Evil:
    def __reduce__(self): return (print, ('executed',))

def test_files_that_are_no_weights(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match='none.pth: no such file'): read_weights(tmp_path/'none.pth')
    torch.save({'w': Evil()}, tmp_path/'evil.pth')
    with pytest.raises(ValueError, match='evil.pth: not a file of weights'): read_weights(tmp_path/'evil.pth')
    assert 'executed' not in capsys.readouterr().out
    buf = io.BytesIO(); torch.save({'w': torch.zeros(1000)}, buf)
    for name in ('cut.pth', 'cut.safetensors', 'empty.pth'):
        (tmp_path/name).write_bytes(buf.getvalue()[:0 if 'empty' in name else 300])
        with pytest.raises(ValueError, match=f'{name}: not a file of weights'): read_weights(tmp_path/name)

def test_a_damaged_download_is_one_more_failure(monkeypatch):
    def loader(url, **kw): raise RuntimeError('invalid hash value') if url == 'a' else pickle.UnpicklingError('broken')
    monkeypatch.setattr(M, 'load_state_dict_from_url', loader)
    with pytest.raises(ConnectionError, match='a: invalid hash value; b: broken'): download_weights(['a', 'b'])

# ---- pools and heads

def test_pools():
    x = torch.rand(2, 3, 5, 4)
    class Maps(nn.Identity): n_features = 3
    avg,concat = ScreenBody(Maps())(x), ScreenBody(Maps(), 'concat')(x)
    torch.testing.assert_close(avg, x.mean((2,3)))
    torch.testing.assert_close(concat, AdaptiveConcatPool2d()(x).flatten(1))
    torch.testing.assert_close(concat, torch.cat([x.amax((2,3)), x.mean((2,3))], 1))
    torch.testing.assert_close(GeM(1.)(x).flatten(1), avg)
    torch.testing.assert_close(GeM(3.)(x).flatten(1), (x**3).mean((2,3))**(1/3))
    with pytest.raises(ValueError, match="pool is 'max', expected one of avg, concat, gem"): ScreenBody(Maps(), 'max')

def test_cosines():
    head,x = CosineLinear(7, 4),torch.randn(5, 7)
    want = torch.tensor([[(a@b)/(a.norm()*b.norm()) for b in head.weight.detach()] for a in x])
    torch.testing.assert_close(head(x), want)
    torch.testing.assert_close(head(x*1e3), want)
    assert head(100*head.weight).abs().max() <= 1
    assert head(x.half()).dtype == torch.float32 and head.double()(x.double()).dtype == torch.float64

def test_cosines_stay_float32_under_autocast():
    head,x = CosineLinear(8, 4),torch.randn(3, 8)
    with torch.autocast('cpu', torch.bfloat16):
        assert F.linear(x, head.weight).dtype == torch.bfloat16
        out = head(x)
    assert out.dtype == torch.float32
    assert torch.equal(out, head(x))

def test_cosine_of_nothing_has_a_finite_gradient():
    head,x = CosineLinear(8, 4),torch.zeros(2, 8, requires_grad=True)
    head(x).sum().backward()
    assert x.grad.abs().max() < 1e8 and head.weight.grad.isfinite().all() and not head(x).any()

def test_class_weights_are_spread():
    w = F.normalize(CosineLinear(2048, 277).weight)
    assert (w@w.T - torch.eye(277)).abs().max() < .15
    assert (CosineLinear(2048, 277).weight.norm(dim=1) - 1).abs().max() < .1

def test_classifiers_of_heads():
    for kind,classifier,width in (('linear','linear',10), ('cosine','linear',10), ('neck','linear',16),
                                  ('neck','cosine',16)):
        for n in (0, 3):
            head = create_screen_head(kind, 10, 5, n_hidden=16, classifier=classifier, n_cell_types=n).eval()
            assert head.embed(torch.randn(4, 10), context()).shape == (4, width + (n if kind != 'neck' else 0))
            assert isinstance(head.classifier, CosineLinear if 'cosine' in (kind, classifier) else nn.Linear)

def test_neck_is_bn_fc_relu_bn_fc_bn():
    names = [type(m).__name__ for m in create_screen_head('neck', 10, 5).neck if not isinstance(m, nn.Dropout)]
    assert names == ['BatchNorm1d', 'Linear', 'ReLU', 'BatchNorm1d', 'Linear', 'BatchNorm1d']

def test_cell_types():
    head = create_screen_head('linear', 2, 3, n_cell_types=2)
    x,c = torch.zeros(3, 2),torch.tensor([[0,0,0],[1,9,9],[-1,0,0]])
    assert head.embed(x, c)[:,2:].tolist() == [[1,0],[0,1],[0,0]]
    with pytest.raises(ValueError, match='needs the context'): head(x)
    with pytest.raises(ValueError, match='row 1 has cell type 2, but the head knows 2'): head(x, c+1)

def test_head_errors():
    for kw,match in [(dict(kind='mlp'), "head is 'mlp', expected one of linear, cosine, linear_cosine, batchnorm, "
                      "neck, controls"),
                     (dict(classifier='svm'), "is 'svm'"),
                     (dict(dropout=1.), 'dropout is 1.0'), (dict(n_classes=0), 'n_classes is 0'),
                     (dict(n_cell_types=-1), 'n_cell_types is -1'),
                     (dict(cell_type='onehot'), "cell_type is 'onehot'")]:
        with pytest.raises(ValueError, match=match):
            create_screen_head(**{**dict(kind='linear', n_features=4, n_classes=3), **kw})

def screen_context():
    "Two experiments of two plates; each has treatments and two controls of either kind, experiment by experiment"
    return torch.tensor([[e, 4+e, i%2, r] for e in range(2) for i,r in enumerate((0, 0, 0, 1, 2, 0, 2, 1))])

def test_embedded_and_mixed_cell_types():
    head = create_screen_head('linear', 2, 3, n_cell_types=4, cell_type='embedding')
    x,c = torch.randn(3, 2),torch.tensor([[0,0,0,0],[3,9,9,1],[-1,0,0,2]])
    table = head.cell_type_table
    assert table.shape == (4, 16) and head.classifier.in_features == 18
    torch.testing.assert_close(head.embed(x, c)[:,2:], torch.stack([table[0], table[3], 0*table[0]]))
    mixed = MixedContext(c, c.roll(1, 0), torch.tensor([.2, .7, 1.]))
    torch.testing.assert_close(head.embed(x, mixed)[1,2:], .7*table[3] + .3*table[0])
    head(x, mixed).sum().backward()
    assert table.grad[0].any() and not table.grad[1].any()
    assert create_screen_head('neck', 2, 3, cell_type='embedding').cell_type_table is None
    assert not any('cell_type' in k for k in create_screen_head('neck', 2, 3, n_cell_types=4).state_dict())

def test_linear_cosine_trains_both_and_predicts_logits():
    model = create_model('resnet18', 5, head='neck', classifier='linear_cosine', n_hidden=8)
    x,y = torch.randn(4, 6, 32, 32),torch.tensor([0, 1, 4, -1])
    logits,cosines = model(x)
    torch.testing.assert_close(cosines,
                               F.normalize(model.head.neck(model.body(x))) @ F.normalize(
                                   model.head.classifier.cosine.weight).T)
    CrossEntropyArcFaceLoss()((logits, cosines), y).backward()
    assert [n for n,p in model.head.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert model.body.backbone.net.conv1.weight.grad.any()
    out = model.eval()(x)
    torch.testing.assert_close(out, model.head.classifier.linear(model.embed(x)))

def test_controls_condition_features():
    c,x = screen_context(),torch.rand(16, 3, dtype=torch.float64)
    want = []
    for i in range(16):
        p,n = (torch.stack([x[j] for j in range(16) if c[j,1] == c[i,1] and c[j,3] == role]).mean(0) for role in (1, 2))
        want.append(torch.cat([x[i], x[i]*p, x[i]*n, x[i]*p*n]))
    torch.testing.assert_close(condition_on_controls(x, c), torch.stack(want))
    order = torch.randperm(16)
    torch.testing.assert_close(condition_on_controls(x[order], c[order]), torch.stack(want)[order])
    mixed = MixedContext(c, c.flip(0), torch.full((16,), .5)) # the first image says which experiment and role
    torch.testing.assert_close(condition_on_controls(x, mixed), torch.stack(want))
    x.requires_grad_(); condition_on_controls(x, c)[:3,3:].sum().backward() # three treatments of the first experiment
    assert ((x.grad != 0).all(1) == ((c[:,1] == 4) & ((c[:,3] > 0) | (torch.arange(16) < 3)))).all()

def test_controls_stay_finite_in_half_precision():
    c,x = screen_context(),torch.full((16, 4), 60.)
    head = create_screen_head('controls', 4, 3)
    with torch.autocast('cpu', torch.bfloat16):
        both = condition_on_controls(x.half(), c)
        assert head(x.bfloat16(), c).isfinite().all()
    assert both.dtype == torch.float32 and (both[:,12:] == 60.**3).all()

def test_controls_that_are_missing():
    c,head = screen_context(),create_screen_head('controls', 4, 3)
    x = torch.rand(16, 4)
    for role,kind in ((1, 'positive'), (2, 'negative')):
        rows = (c[:,1] == 4) | (c[:,3] != role)
        with pytest.raises(ValueError, match=rf'experiment 5 .*no {kind} control in this batch: .*\(data.n_controls\)'):
            head(x[rows], c[rows])
    with pytest.raises(ValueError, match='no positive control'): head(x, c[:,:3]) # without roles all are treatments
    with pytest.raises(ValueError, match='needs the context'): head(x)

@pytest.mark.slow
@each('kw', [dict(head='controls', n_cell_types=2, dropout=.1), dict(head='controls', classifier='linear_cosine'),
                                dict(head='neck', classifier='linear_cosine', n_cell_types=2, cell_type='embedding',
                                     n_hidden=8),
                                dict(head='linear_cosine')], ids=str)
def test_new_heads_are_swapped_saved_and_grouped(tmp_path, kw):
    x,c = torch.randn(16, 6, 32, 32),screen_context()
    model = create_model('resnet18', 5, **kw); model(x, c) # moves the BatchNorms
    save_weights(model, tmp_path/'m.safetensors')
    twin = load_weights(create_model('resnet18', 5, **kw), tmp_path/'m.safetensors').eval()
    with torch.no_grad(): assert torch.equal(twin(x, c), model.eval()(x, c)) and twin(x, c).shape == (16, 5)
    ids = {id(p) for p in model.head.parameters()}
    assert {id(p) for p in param_groups(model)[2]} == ids
    config = {k: v for k,v in model.head.config.items() if k != 'n_classes'}
    head = model.swap_head(7).head
    assert {k: v for k,v in head.config.items() if k != 'n_classes'} == config
    with torch.no_grad(): assert model(x, c).shape == (16, 7)

# ---- the model

def test_forward_is_head_of_body(small):
    small.eval(); x,c = torch.randn(4, 6, 40, 40),context()
    with torch.no_grad():
        torch.testing.assert_close(small(x, c), small.head(small.body(x), c))
        torch.testing.assert_close(small.head.classifier(small.embed(x, c)), small(x, c))
    assert small.n_features == 2048 and small.embed(x, c).shape == (4, 32)

def test_typed_tensors_become_plain(small):
    small.eval(); seen = []
    hook = small.body.backbone.net.layer0.register_forward_pre_hook(lambda m, args: seen.append(type(args[0])))
    x,c = torch.randn(4, 6, 40, 40),context()
    with torch.no_grad():
        out = small(TensorImage(x), TensorBase(c)); emb = small.embed(TensorImage(x), TensorBase(c)); want = small(x, c)
    hook.remove()
    assert seen == [torch.Tensor]*3 and type(out) is type(emb) is torch.Tensor and torch.equal(out, want)

def test_integer_images_are_refused(small):
    with pytest.raises(ValueError, match='torch.uint8, expected float'):
        small(torch.zeros(1, 6, 32, 32, dtype=torch.uint8), context(1))

@pytest.mark.parametrize('arch', ['small_seresnext', 'densenet121'])
def test_channels_last(arch):
    model = create_model(arch, 5, pool='concat').eval(); x = torch.randn(2, 6, 48, 48)
    with torch.no_grad():
        want = model(x)
        model.to(memory_format=torch.channels_last); x = x.contiguous(memory_format=torch.channels_last)
        got = model(x)
        assert model.body.backbone(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)

def test_swap_head(small):
    model = copy.deepcopy(small).double().train(); body = copy.deepcopy(model.body.state_dict())
    assert model.swap_head(31) is model
    for k,v in model.body.state_dict().items(): assert torch.equal(v, body[k])
    assert model.head.classifier.out_features == 31 and model.head.n_cell_types == 3
    assert model.head.classifier.weight.dtype == torch.float64
    assert model.head.training and not copy.deepcopy(small).eval().swap_head(2).head.training
    assert model.swap_head(5).head.config == small.head.config
    model.head = ScreenHead(nn.Identity(), nn.Linear(2048, 3))
    with pytest.raises(ValueError, match='not made by create_screen_head'): model.swap_head(3)

def test_copies_and_pickles(small):
    small.eval(); x,c = torch.randn(1, 6, 32, 32),context(1)
    with torch.no_grad():
        for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
            assert torch.equal(twin(x, c), small(x, c))

@each('arch', ['small_seresnext', 'resnet18', 'densenet121', 'efficientnet_b0', 'convnext_atto'])
def test_param_groups(arch):
    model = create_model(arch, 5, pool='gem', head='neck', n_hidden=8)
    groups = param_groups(model)
    assert len(groups) == 3 and all(groups)
    ids = [id(p) for g in groups for p in g]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    where = {id(p): i for i,g in enumerate(groups) for p in g}
    assert all(where[id(c.weight)] == 0 for c in first_convs(model.body.backbone.net).values())
    assert where[id(model.body.pool.p)] == 1 and {where[id(p)] for p in model.head.parameters()} == {2}
    order = [where[id(p)] for p in model.body.backbone.parameters()]
    assert order == sorted(order)
    early,later = (sum(p.ndim > 1 for p in g) for g in groups[:2])
    assert .25 < early/(early+later) < .75

def test_param_groups_keeps_blocks_whole():
    model = create_model('resnet18', 5)
    early,_,_ = ({id(p) for p in g} for g in param_groups(model))
    for stage in (f'layer{i}' for i in range(1, 5)):
        for block in getattr(model.body.backbone.net, stage):
            assert len({id(p) in early for p in block.parameters()}) == 1

def test_param_groups_of_a_plain_body():
    class Flat(nn.Module):
        n_features = 4
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(6, 4, 3)
        def forward(self, x): return self.conv(x)
    groups = param_groups(ScreenModel(ScreenBody(Flat()), create_screen_head('linear', 4, 2)))
    assert [len(g) for g in groups] == [2, 0, 2]

# ---- written down

CONTEXT = torch.tensor([[0, 0, 0, 1], [1, 0, 2, 2], [1, 0, 3, 0], [-1, 0, 0, 0]]) # with both controls of the experiment
WRITTEN = {'cosine': dict(head='cosine'), 'gem': dict(arch='small_seresnext', head='linear', pool='gem'),
           'both': dict(head='linear_cosine', pool='concat'),
           'transformer': dict(arch='vit_tiny_patch16_224', img_size=32),
           'neck': dict(head='neck', n_hidden=16, n_cell_types=2),
           'embedding': dict(n_cell_types=2, cell_type='embedding'), 'controls': dict(head='controls')}
NEED_CONTEXT = 'neck', 'embedding', 'controls'
INPUTS = [(kind, 2 if kind in NEED_CONTEXT else 1) for kind in WRITTEN] + [('cosine', 2)]

def written(kind, n):
    "A network in evaluation mode, its inputs, and what it gives for them"
    model = create_model(**{'arch': 'resnet10t', 'n_classes': 5, **WRITTEN[kind]}).eval()
    inputs = (torch.randn(4, 6, 32, 32), CONTEXT)[:n]
    with torch.no_grad(): return model, inputs, model(*inputs)

def same(out, wanted): torch.testing.assert_close(out.detach(), wanted, rtol=1e-5, atol=1e-5)

@pytest.mark.slow
@each('kind,n', INPUTS)
def test_a_network_is_exported(kind, n):
    model,inputs,wanted = written(kind, n)
    sites = torch.export.Dim('sites', min=2, max=64)
    shapes = {name: {0: sites} for name in ('x', 'context')[:n]}
    module = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False).module()
    same(module(*inputs), wanted)
    more = [torch.cat([i, i.flip(0)]) for i in inputs] # another number of sites
    with torch.no_grad(): same(module(*more), model(*more))

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning')
@each('kind,n', INPUTS)
def test_a_network_is_traced(kind, n, tmp_path):
    model,inputs,wanted = written(kind, n)
    torch.jit.save(torch.jit.trace(model, inputs), tmp_path/'m.pt')
    again = torch.jit.load(tmp_path/'m.pt')
    same(again(*inputs), wanted)
    more = [torch.cat([i, i.flip(0)]) for i in inputs]
    with torch.no_grad(): same(again(*more), model(*more))

@pytest.mark.slow
@each('kind,n', INPUTS)
def test_a_network_is_copied_pickled_and_compiled(kind, n):
    model,inputs,wanted = written(kind, n)
    fresh = written(kind, n)[0]
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh,
                  torch.compile(copy.deepcopy(model), backend='eager')):
        with torch.no_grad(): same(other(*inputs), wanted)

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
@pytest.mark.parametrize('kind,n,dynamo',
                         [('gem', 1, True), ('neck', 2, False), ('neck', 2, True), ('controls', 2, False)])
def test_a_network_becomes_onnx(kind, n, dynamo, tmp_path):
    for needed in ('onnx', 'onnxruntime', *(['onnxscript'] if dynamo else [])):
        pytest.importorskip(needed, reason=f'{needed} is a tool of development')
    import onnxruntime
    model,inputs,wanted = written(kind, n)
    names = ['x', 'context'][:n]
    axes = dict(dynamic_shapes={k: {0: torch.export.Dim('sites', min=2, max=64)} for k in names}) if dynamo else dict(
        dynamic_axes={k: {0: 'sites'} for k in names})
    torch.onnx.export(model, inputs, str(tmp_path/'m.onnx'), input_names=names, dynamo=dynamo, **axes)
    session = onnxruntime.InferenceSession(str(tmp_path/'m.onnx'))
    run = lambda given: torch.from_numpy(session.run(None,
                                                     {i.name: g.numpy()
                                                      for i,g in zip(session.get_inputs(), given)})[0])
    same(run(inputs), wanted)
    more = [torch.cat([i, i.flip(0)]) for i in inputs]
    with torch.no_grad(): same(run(more), model(*more))

def test_outside_of_a_written_network_values_are_still_looked_at():
    model = written('neck', 2)[0]
    with pytest.raises(ValueError, match='row 1 has cell type 7, but the head knows 2'):
        model(torch.randn(2, 6, 32, 32), torch.tensor([[0, 0, 0, 0], [7, 0, 0, 0]]))
    with pytest.raises(ValueError, match='experiment 3 of the context has no positive control'):
        written('controls', 2)[0](torch.randn(2, 6, 32, 32), torch.tensor([[0, 3, 0, 0], [0, 3, 0, 2]]))

# ---- files

def test_save_and_load(tmp_path, small):
    file = tmp_path/'new'/'model.safetensors'
    meta = {'arch': 'small_seresnext', 'classes': ['a', 'ü', None], 'lr': 1e-4}
    small.to(memory_format=torch.channels_last)
    save_weights(small, file, meta)
    assert [f.name for f in file.parent.iterdir()] == ['model.safetensors'] and read_meta(file) == meta
    twin = copy.deepcopy(small).to(memory_format=torch.contiguous_format)
    for p in twin.parameters(): p.data.zero_()
    assert load_weights(twin, file) is twin
    for (k,a),b in zip(small.state_dict().items(), twin.state_dict().values(), strict=True): assert torch.equal(a, b), k

def test_wrapped_models_save_their_own_names(tmp_path):
    class Wrapped(nn.Module): # as torch.compile and DistributedDataParallel do
        def __init__(self, m, name): super().__init__(); setattr(self, name, m)
    head = create_screen_head('linear', 4, 2)
    for name in ('_orig_mod', 'module'):
        save_weights(Wrapped(head, name), tmp_path/'m.safetensors')
        assert set(read_weights(tmp_path/'m.safetensors')) == set(head.state_dict())
        load_weights(Wrapped(create_screen_head('linear', 4, 2), name), tmp_path/'m.safetensors')

def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path/'m.safetensors'; head = create_screen_head('linear', 4, 2)
    save_weights(head, file, {'n': 1}); before = file.read_bytes()
    def half(path, data):
        with path.open('wb') as f: f.write(data[:9])
        raise OSError('disk full')
    monkeypatch.setattr(Path, 'write_bytes', half)
    with pytest.raises(OSError, match='disk full'): save_weights(head, file, {'n': 2})
    monkeypatch.undo()
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1

def test_load_errors(tmp_path):
    file = tmp_path/'m.safetensors'; save_weights(create_screen_head('linear', 4, 2), file)
    with pytest.raises(ValueError, match=r'm.safetensors does not fit ScreenHead; '
                       r'.*classifier.weight is \(2, 4\), expected \(3, 4\)'):
        load_weights(create_screen_head('linear', 4, 3), file)
    save_file({'a': torch.zeros(1), 'b': torch.zeros(1)}, tmp_path/'n.safetensors')
    with pytest.raises(ValueError, match='1 missing: classifier.weight; 2 unexpected: '):
        load_weights(create_screen_head('cosine', 4, 2), tmp_path/'n.safetensors')
    with pytest.raises(FileNotFoundError, match='none.safetensors'):
        load_weights(create_screen_head('linear', 4, 2), tmp_path/'none.safetensors')
    with pytest.raises(FileNotFoundError, match='none.safetensors'): read_meta(tmp_path/'none.safetensors')
    (tmp_path/'bad.safetensors').write_bytes(b'not a file')
    with pytest.raises(ValueError, match='bad.safetensors: not a file of save_weights'):
        read_meta(tmp_path/'bad.safetensors')


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch, where):
    "The weights of before stay, no temporary file of anybody is left, and the message has the name of the file"

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, net = tmp_path / "model.safetensors", torch.nn.Linear(2, 2)
    save_weights(net, path, dict(a=1))
    before = path.read_bytes()
    monkeypatch.setattr(*dict(write=(Path, "write_bytes"), fsync=(os, "fsync"))[where], full)
    with pytest.raises(OSError, match="No space left on device.*model.safetensors") as e:
        save_weights(torch.nn.Linear(2, 2), path)
    assert e.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before
