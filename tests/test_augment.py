"Batch transforms against numpy, against slicing, and through fastai's own loaders."
import itertools
import pickle

import numpy as np
import pytest
from cases import each
import torch
import torch.nn.functional as F
from fastai.data.core import Datasets
from fastai.torch_core import TensorBase, TensorCategory
from fastai.vision.core import TensorImage
from scipy.ndimage import map_coordinates

from rcic_fastai.data.augment import D4, D4_INVERSE, ImageBrightness, ChannelIntensity, ChannelStats, Cutout
from rcic_fastai.data.augment import RandomSquareCrop, RandomResizedSquareCrop, Standardize, PerspectiveWarp
from rcic_fastai.data.augment import channel_stats, dihedral, dihedral_batch, perspective_matrices, rcic_stats
from rcic_fastai.data.augment import screen_transforms


class SomeImage(TensorImage):
    "Stands for a subclass that a data block may use; every transform must keep it."


def batch(n=8, c=6, size=(32, 32), seed=0):
    "Image, context and target; 2 experiments of 2 plates, brightness depends on all of it."
    g = torch.Generator().manual_seed(seed)
    context = torch.stack([torch.zeros(n, dtype=torch.long), torch.arange(n) % 2, torch.arange(n)//2 % 2], 1)
    gain = (1+2*context[:, 1]+.5*context[:, 2]).view(-1, 1, 1, 1) * torch.linspace(.5, 2, c).view(-1, 1, 1)
    x = (torch.rand(n, c, *size, generator=g)*30*gain+5).clamp(0, 255).to(torch.uint8)
    return SomeImage(x), TensorBase(context), TensorCategory(torch.arange(n))


def numpy(x): return x.as_subclass(torch.Tensor).numpy()


def pixels(x): return np.sort(numpy(x).reshape(*x.shape[:2], -1), -1)


# Symmetries

def test_the_symmetries_form_the_dihedral_group():
    x = torch.arange(9).view(3, 3)
    views = [dihedral(x, k) for k in range(8)]
    names = {v.numpy().tobytes(): k for k, v in enumerate(views)}
    assert len(names) == 8 and names[x.numpy().tobytes()] == 0
    # closed
    table = {(a, b): names[dihedral(views[a], b).contiguous().numpy().tobytes()]
             for a, b in itertools.product(range(8), repeat=2)}
    assert all(table[a, D4_INVERSE[a]] == table[D4_INVERSE[a], a] == 0 for a in range(8))
    assert all(table[table[a, b], c] == table[a, table[b, c]] for a, b, c in itertools.product(range(8), repeat=3))
    order = [next(n for n in range(1, 9) if not (k_to_the_n(table, k, n))) for k in range(8)]
    assert sorted(order) == [1, 2, 2, 2, 2, 2, 4, 4]


def k_to_the_n(table, k, n):
    result = 0
    for _ in range(n): result = table[result, k]
    return result


@each('k', range(8))
@each('shape,dtype', [((5, 5), torch.uint8), ((2, 3, 4, 6), torch.float32), ((1, 7, 3), torch.int64)])
def test_a_symmetry_moves_pixels_and_has_an_inverse(k, shape, dtype):
    x = torch.randint(0, 200, shape).to(dtype)
    y = dihedral(x, k)
    assert y.dtype == dtype and torch.equal(dihedral(y, D4_INVERSE[k]), x)
    assert torch.equal(y.flatten().sort().values, x.flatten().sort().values)
    expected = np.swapaxes(x.numpy(), -1, -2) if k & 4 else x.numpy()
    if k & 2: expected = expected[..., ::-1, :]
    if k & 1: expected = expected[..., ::-1]
    assert np.array_equal(y.numpy(), expected)


def test_a_ninth_symmetry_is_refused():
    for k in (-1, 8):
        with pytest.raises(ValueError, match=f'k is {k}, expected a symmetry from 0 to 7'):
            dihedral(torch.zeros(2, 2), k)


def test_each_image_has_its_own_symmetry():
    x, *_ = batch(40)
    ks = torch.arange(40) % 8
    y = dihedral_batch(x, ks)
    for i in range(40): assert torch.equal(y[i], dihedral(x[i], int(ks[i])))
    assert torch.equal(dihedral_batch(y, torch.tensor(D4_INVERSE)[ks]), x)
    with pytest.raises(ValueError, match='images of 4x6 are not square'):
        dihedral_batch(torch.zeros(1, 1, 4, 6), torch.tensor([4]))


def test_d4_draws_all_symmetries_equally_and_keeps_rectangles():
    x, *_ = batch(4000, 1, (2, 2))
    d4 = D4(seed=0)
    d4(x, split_idx=0)
    assert torch.bincount(d4.ks, minlength=8).min() > 400
    d4 = D4(seed=0, p=.5)
    d4(x, split_idx=0)
    assert torch.bincount(d4.ks)[0].item() == pytest.approx(4000*(.5+.5/8), rel=.07)
    x, *_ = batch(40, 2, (6, 9))
    assert D4(seed=0)(x, split_idx=0).shape == x.shape
    assert D4(seed=0, p=0)(x, split_idx=0).equal(x)


# Standardising

def by_hand(x, context, by):
    x, context = numpy(x).astype(np.float64), numpy(context)
    out = np.empty_like(x)
    for i in range(len(x)):
        same = {'image': np.arange(len(x)) == i, 'screen': np.full(len(x), True),
                'experiment': context[:, 1] == context[i, 1],
                'plate': (context[:, 1:] == context[i, 1:]).all(1)}[by]
        out[i] = (x[i]-x[same].mean((0, 2, 3))[:, None, None])/x[same].std((0, 2, 3))[:, None, None]
    return out


@each('by', ['image', 'plate', 'experiment', 'screen'])
@each('c', [1, 4, 6])
@each('dtype', [torch.uint8, torch.float32, torch.float16])
def test_standardising_agrees_with_numpy(by, c, dtype):
    x, context, target = batch(c=c, size=(16, 24))
    stats = () if by == 'image' else channel_stats([(x[:3], context[:3]), (x[3:], context[3:], target[3:])], by)
    tfm, before = Standardize(by, *stats), x.to(dtype)
    kept = before.clone()
    y, *rest = tfm((before, context, target))
    assert type(y) is SomeImage and y.dtype == torch.float32 and torch.equal(before, kept)
    np.testing.assert_allclose(numpy(y), by_hand(x, context, by), atol=2e-5)
    assert rest[0] is context and rest[1] is target
    assert torch.equal(tfm((before, context))[0], y) and isinstance(tfm((before, context)), tuple)
    # a fourth column, the kind of well, changes nothing
    role = TensorBase(torch.cat([context, torch.full((len(context), 1), 2)], 1))
    assert torch.equal(tfm((before, role))[0], y)
    if by != 'image':
        shown = tfm.decode((y, context, target))
        assert shown[0].dtype == torch.uint8 and type(shown[0]) is SomeImage
        assert torch.equal(shown[0], x) and shown[1] is context


def test_images_alone_can_be_standardised_by_image_and_screen():
    x, context, _ = batch()
    assert torch.equal(Standardize()(x), Standardize()((x, context))[0])
    y = Standardize('screen')(x)
    np.testing.assert_allclose(numpy(y),
                               (numpy(x)-rcic_stats.mean.numpy()[:, None, None])/rcic_stats.std.numpy()[:, None, None],
                               atol=1e-4)
    with pytest.raises(ValueError, match=r'context integers \(B, 3\) or wider, got nothing'):
        Standardize('plate', torch.zeros(1, 1, 6), torch.ones(1, 1, 6))(x)


def test_blank_channels_stay_finite():
    x = TensorImage(torch.full((2, 3, 8, 8), 7, dtype=torch.uint8))
    assert torch.equal(Standardize()(x), TensorImage(torch.zeros(2, 3, 8, 8)))
    assert Standardize('screen',
                       *channel_stats([(x, torch.zeros(2, 3, dtype=torch.long))], 'screen'))(x).abs().max() == 0


@pytest.mark.parametrize('c', [2, 6])
def test_what_was_standardised_by_image_can_be_shown(c):
    x, context, target = batch(c=c)
    tfm = Standardize()
    y = tfm.decode(tfm((x, context, target)))[0]
    assert y.dtype == torch.uint8 and type(y) is SomeImage and y.float().std() > 1
    bright = Standardize('image', torch.full((c,), 100.), torch.full((c,), 20.))
    assert bright.decode(bright(x)).float().mean().item() == pytest.approx(100, abs=1)


@pytest.mark.parametrize('by', ['plate', 'experiment', 'screen'])
def test_statistics_are_pooled_exactly_however_the_batches_are_cut(by):
    x, context, _ = batch(n=12, size=(40, 40))
    whole = channel_stats([(x, context)], by)
    for cut in (1, 5, 11):
        parts = channel_stats(((x[i:i+cut], context[i:i+cut]) for i in range(0, 12, cut)), by)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts))
    assert whole.mean.shape == {'plate': (2, 2, 6), 'experiment': (2, 6), 'screen': (6,)}[by]
    assert whole.mean.dtype == torch.float32
    first = numpy(x)[{'plate': (numpy(context)[:, 1:] == 0).all(1), 'experiment': numpy(context)[:, 1] == 0,
                      'screen': slice(None)}[by]].astype(np.float64)
    index = {'plate': (0, 0), 'experiment': 0, 'screen': slice(None)}[by]
    np.testing.assert_allclose(whole.mean[index], first.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(whole.std[index], first.std((0, 2, 3)), rtol=1e-6)


def test_statistics_of_bright_pixels_do_not_overflow():
    x = torch.full((1, 1, 600, 600), 255, dtype=torch.uint8)
    stats = channel_stats(((x, torch.zeros(1, 3, dtype=torch.long)) for _ in range(40)), 'experiment')
    assert stats.mean.item() == 255 and stats.std.item() == 0


def test_missing_statistics_and_wrong_tables_are_explained():
    x, context, _ = batch()
    stats = channel_stats([(x, context + torch.tensor([0, 1, 0]))], 'experiment')  # experiment 0 was never seen
    assert stats.mean[0].isnan().all()
    tfm = Standardize('experiment', *stats)
    with pytest.raises(ValueError, match='no statistics for experiment 0 '): tfm((x, context))
    with pytest.raises(ValueError, match='no statistics for experiment 3 '): tfm((x, context + torch.tensor([0, 3, 0])))
    with pytest.raises(ValueError, match='no statistics for experiment -1 '):
        tfm((x, context - torch.tensor([0, 1, 0])))
    with pytest.raises(ValueError, match=r'got \(8, 3\) torch.float32'): tfm((x, context.float()))
    with pytest.raises(ValueError, match=r'integers \(B, 3\) or wider, got \(8, 2\) torch.int64'):
        tfm((x, context[:, :2]))
    with pytest.raises(ValueError, match='statistics of 6 channels for images of 4'): tfm((x[:, :4], context))
    with pytest.raises(ValueError, match=r'mean \(3, 6\).*expected \(experiments, plates, channels\)'):
        Standardize('plate', *stats)
    with pytest.raises(ValueError, match='both mean and std'): Standardize('screen', stats.mean[1])
    with pytest.raises(ValueError, match="by='plate'"): Standardize('plate')
    with pytest.raises(ValueError, match="by is 'well', expected one of 'image'"): Standardize('well')
    with pytest.raises(ValueError, match="by is 'image', expected one of 'screen'"):
        channel_stats([(x, context)], 'image')
    with pytest.raises(ValueError, match='got no images'): channel_stats([])
    with pytest.raises(ValueError, match='got floats from -'): channel_stats([(x.float()-300, context)])


# Crops

@pytest.mark.parametrize('size,shape', [(16, (32, 32)), (32, (32, 32)), (20, (40, 24))])
def test_a_crop_is_a_slice(size, shape):
    x, context, target = batch(64, 3, shape)
    crop = RandomSquareCrop(size, seed=0)
    y, c, t = crop((x, context, target), split_idx=0)
    assert y.shape == (64, 3, size, size) and y.dtype == torch.uint8
    assert type(y) is SomeImage and c is context and t is target
    corners = crop.corners.T.tolist()
    for i, (top, left) in enumerate(corners): assert torch.equal(y[i], x[i, :, top:top+size, left:left+size])
    for axis in (0, 1):
        assert {c[axis] for c in corners} <= set(range(shape[axis]-size+1))
        assert (shape[axis] == size or len({c[axis] for c in corners}) > 3)
    top, left = (shape[0]-size)//2, (shape[1]-size)//2
    for split_idx in (1, None): assert torch.equal(crop(x, split_idx=split_idx), x[:, :, top:top+size, left:left+size])
    assert torch.equal(RandomSquareCrop(size, p=0)(x, split_idx=0), crop(x, split_idx=1))


def test_a_crop_reaches_every_corner():
    x, *_ = batch(2000, 1, (5, 6))
    crop = RandomSquareCrop(4, seed=0)
    crop(x, split_idx=0)
    assert {tuple(c) for c in crop.corners.T.tolist()} == set(itertools.product(range(2), range(3)))


@each('n,size', [(32, 16), (32, 10), (32, 32), (24, 40)])
def test_the_whole_image_is_resized_like_torch_does(n, size):
    x, *_ = batch(4, 3, (n, n))
    y = RandomResizedSquareCrop(size)(x, split_idx=1)
    assert y.dtype == torch.float32 and type(y) is SomeImage
    torch.testing.assert_close(y.as_subclass(torch.Tensor),
                               F.interpolate(x.as_subclass(torch.Tensor).float(), (size, size), mode='bilinear',
                                             antialias=True))


@each('seed', range(4))
def test_windows_of_a_ramp_show_where_they_are(seed):
    rows, cols = torch.meshgrid(torch.arange(64.), torch.arange(80.), indexing='ij')
    x = TensorImage(torch.stack([rows, cols]).expand(16, 2, 64, 80))
    tfm = RandomResizedSquareCrop(16, scale=(.1, .9), seed=seed)
    y = tfm(x, split_idx=0)
    sides, (tops, lefts) = tfm.sides, tfm.corners
    assert sides.min() >= round(.1**.5*64) and sides.max() <= round(.9**.5*64) and sides.unique().numel() > 4
    assert (tops >= 0).all() and (lefts >= 0).all() and (tops+sides <= 64).all() and (lefts+sides <= 80).all()
    for i in range(16):
        centres = (torch.arange(16)+.5)*sides[i]/16-.5  # in pixels of the window
        # at the border the filter is cut; inside, a sampled triangle is linear to a few hundredths
        inner = slice(2, -2)
        assert torch.allclose(y[i, 0, inner, 5].as_subclass(torch.Tensor), tops[i]+centres[inner], atol=.06)
        assert torch.allclose(y[i, 1, 5, inner].as_subclass(torch.Tensor), lefts[i]+centres[inner], atol=.06)


def test_shrinking_is_antialiased():
    x = TensorImage((torch.arange(64) % 2*200.).expand(1, 1, 64, 64))  # stripes of one pixel
    y = RandomResizedSquareCrop(16)(x, split_idx=1)[..., 1:-1]
    assert (y-100).abs().max() < 5


def test_windows_at_native_scale_are_not_blurred():
    x, *_ = batch(size=(32, 32))
    tfm = RandomResizedSquareCrop(16, scale=(.25, .25), seed=0)
    y = tfm(x, split_idx=0)
    for i, (top, left) in enumerate(tfm.corners.T.tolist()):
        assert torch.equal(y[i], x[i, :, top:top+16, left:left+16].float())


def test_validation_windows_are_centred():
    x, *_ = batch(2, 1, (32, 48))
    assert torch.equal(RandomResizedSquareCrop(32)(x, split_idx=1), x[..., 8:40].float())
    assert torch.equal(RandomResizedSquareCrop(16, val_scale=.25)(x, split_idx=1), x[..., 8:24, 16:32].float())
    assert torch.equal(RandomResizedSquareCrop(32, p=0)(x, split_idx=0), x[..., 8:40].float())


# Warp

SQUARE = torch.tensor([[-1., -1], [1, -1], [-1, 1], [1, 1]])


def test_a_perspective_takes_the_corners_where_they_should_go():
    # up to just below a quarter of the side
    corners = SQUARE + torch.rand(50, 4, 2, generator=torch.Generator().manual_seed(0))*.98-.49
    m = perspective_matrices(corners)
    at = torch.cat([SQUARE, torch.ones(4, 1)], 1).double() @ m.transpose(1, 2)
    torch.testing.assert_close(at[..., :2]/at[..., 2:], corners.double())
    assert at[..., 2].min() > 0  # and between them, as it is linear: nothing passes through infinity
    torch.testing.assert_close(perspective_matrices(SQUARE[None])[0], torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize('shape', [(24, 24), (20, 32)])
def test_a_warp_agrees_with_scipy(shape):
    x, context, target = batch(6, 3, shape)
    warp = PerspectiveWarp(.2, seed=1)
    y, c, t = warp((x, context, target), split_idx=0)
    assert y.dtype == torch.float32 and type(y) is SomeImage and c is context and t is target
    h, w = shape
    size = np.array([w, h])
    for i in range(6):
        source = torch.cat([SQUARE, torch.ones(4, 1)], 1).double() @ warp.matrices[i].T
        moved = (source[:, :2]/source[:, 2:]).numpy()
        assert (abs(moved-SQUARE.numpy()) <= .4+1e-6).all()  # .2 of a side of 2
        px = lambda p: (p+1)*size/2-.5  # pixel centres, the border at -.5
        rows = [r for (u, v), (a, b) in zip(px(SQUARE.numpy()), px(moved))
                for r in ([u, v, 1, 0, 0, 0, -u*a, -v*a, -a], [0, 0, 0, u, v, 1, -u*b, -v*b, -b])]
        m = np.linalg.svd(rows)[2][-1].reshape(3, 3)  # the map in pixels, from the four pairs
        q = m @ np.stack([*np.meshgrid(np.arange(w), np.arange(h)), np.ones(shape)]).reshape(3, -1)
        at = (q[:2]/q[2])[::-1]
        for channel in range(3):
            want = map_coordinates(numpy(x[i, channel]).astype(float), at, order=1, mode='reflect').reshape(shape)
            np.testing.assert_allclose(numpy(y[i, channel]), want, atol=.01)


def test_warps_differ_reach_their_limit_and_leave_the_rest_untouched():
    x, *_ = batch(400, 1, (8, 8))
    warp = PerspectiveWarp(.1, p=.5, seed=0)
    y = warp(x, split_idx=0)
    rest = torch.ones(400, dtype=torch.bool)
    rest[warp.rows] = False
    assert torch.equal(y[rest], x[rest].float()) and rest.float().mean().item() == pytest.approx(.5, abs=.08)
    assert (y[~rest] != x[~rest]).flatten(1).any(1).all()
    at = torch.cat([SQUARE, torch.ones(4, 1)], 1).double() @ warp.matrices.transpose(1, 2)
    steps = at[..., :2]/at[..., 2:]-SQUARE
    assert steps.abs().max() <= .2+1e-6 and (steps.amax(0) > .18).all() and (steps.amin(0) < -.18).all()
    torch.testing.assert_close(PerspectiveWarp(0.)(x, split_idx=0).as_subclass(torch.Tensor),
                               x.as_subclass(torch.Tensor).float(), atol=1e-3, rtol=0)
    half = x.half()
    assert PerspectiveWarp(seed=0)(half, split_idx=0).dtype == torch.float16 and torch.equal(half, x.half())
    assert torch.equal(PerspectiveWarp(p=0)(x, split_idx=0), x.float())


# Intensity and cutout

def test_brightness_is_shared_by_the_channels_of_an_image():
    x = TensorImage(torch.randn(500, 4, 8, 8))
    tfm = ImageBrightness(.3, seed=0)
    y = tfm(x, split_idx=0)
    a, b = tfm.a, tfm.b
    assert a.shape == b.shape == (500, 1, 1, 1)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), x.as_subclass(torch.Tensor)*a+b)
    for u in (a.log(), b):
        assert u.abs().max() <= .3 and u.std().item() == pytest.approx(.3/3**.5, rel=.06) and abs(u.mean().item()) < .02
    assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < .1
    half = ImageBrightness(p=.5, seed=0)(x, split_idx=0)
    assert (half == x).all((1, 2, 3)).float().mean().item() == pytest.approx(.5, abs=.07)
    assert ImageBrightness()(x.half(), split_idx=0).dtype == torch.float16


def test_each_channel_of_each_image_gets_its_own_gain_and_offset():
    x = TensorImage(torch.randn(500, 6, 8, 8))
    tfm = ChannelIntensity(.1, .2, seed=0)
    y = tfm(x, split_idx=0)
    a, b = tfm.a, tfm.b
    assert a.shape == b.shape == (500, 6, 1, 1) and a.unique().numel() > 2900
    torch.testing.assert_close(y.as_subclass(torch.Tensor), x.as_subclass(torch.Tensor)*a+b)
    assert a.mean().item() == pytest.approx(1, abs=.01) and a.std().item() == pytest.approx(.1, rel=.06)
    assert b.mean().item() == pytest.approx(0, abs=.02) and b.std().item() == pytest.approx(.2, rel=.06)
    assert abs(np.corrcoef(a[:, 0, 0, 0], a[:, 1, 0, 0])[0, 1]) < .15
    assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < .1
    half = ChannelIntensity(p=.5, seed=0)(x, split_idx=0)
    assert (half == x).all((1, 2, 3)).float().mean().item() == pytest.approx(.5, abs=.07)
    assert ChannelIntensity()(x.half(), split_idx=0).dtype == torch.float16


def test_cutout_covers_rectangles_in_all_channels():
    x = TensorImage(torch.rand(300, 3, 40, 20)+1)
    tfm = Cutout(1, (.1, .5), seed=0)
    y = tfm(x, split_idx=0)
    gone = (y == 0).as_subclass(torch.Tensor)
    assert (gone == gone[:, :1]).all() and torch.equal(y[~gone], x[~gone])
    heights, widths = gone[:, 0].any(2).sum(1), gone[:, 0].any(1).sum(1)
    assert torch.equal(heights*widths, gone[:, 0].sum((1, 2)))  # one filled rectangle each
    assert heights.min() == 4 and heights.max() == 20 and widths.min() == 2 and widths.max() == 10
    assert gone[:, 0].any(2).any(0).all() and gone[:, 0].any(1).any(0).all()  # up to every border
    assert (Cutout(4, seed=0)(x, split_idx=0) == 0).sum() > 2*gone.sum()/3
    assert (Cutout(1, p=.5, seed=0)(x, split_idx=0) == x).all(
        (1, 2, 3)).float().mean().item() == pytest.approx(.5, abs=.1)
    assert Cutout(1, value=9)(batch()[0], split_idx=0).dtype == torch.uint8


# Rules that hold for all of them

MAKE = {"D4": lambda **k: D4(**k), "RandomSquareCrop": lambda **k: RandomSquareCrop(20, **k),
        "RandomResizedSquareCrop": lambda **k: RandomResizedSquareCrop(20, **k),
            "ChannelIntensity": lambda **k: ChannelIntensity(**k), "Cutout": lambda **k: Cutout(**k),
        "PerspectiveWarp": lambda **k: PerspectiveWarp(**k), "ImageBrightness": lambda **k: ImageBrightness(**k)}


@each('name', MAKE)
def test_random_transforms_are_reproducible_and_leave_the_rest_alone(name):
    x, context, target = batch()
    x = x.float()
    kept, make = x.clone(), MAKE[name]
    a, b = make(seed=3), make(seed=3)
    first, second = a((x, context, target), split_idx=0), a((x, context, target), split_idx=0)
    assert type(first) is tuple and first[1] is context and first[2] is target and type(first[0]) is SomeImage
    assert torch.equal(x, kept) and not torch.equal(first[0], second[0])
    assert torch.equal(b(x, split_idx=0), first[0]) and torch.equal(b(x, split_idx=0), second[0])
    copied = pickle.loads(pickle.dumps(a))
    assert torch.equal(copied(x, split_idx=0), a(x, split_idx=0))
    torch.manual_seed(5); c = make()(x, split_idx=0)
    torch.manual_seed(5); d = make()(x, split_idx=0)
    assert torch.equal(c, d) and not torch.equal(c, first[0])


@each('name', MAKE)
def test_validation_draws_nothing_and_a_seed_leaves_the_global_generator_alone(name):
    x, *_ = batch()
    x = x.float()
    state = torch.get_rng_state()
    for split_idx in (1, None):
        a, b = (MAKE[name]()(x, split_idx=split_idx) for _ in range(2))
        assert torch.equal(a, b) and ('Crop' in name or a is x)
    MAKE[name](seed=0)(x, split_idx=0)
    assert torch.equal(torch.get_rng_state(), state)


@each('name', MAKE)
def test_only_images_are_touched(name):
    x, context, target = batch()
    mask = torch.rand(8, 6, 32, 32)
    assert MAKE[name]()((context, mask, target), split_idx=0)[1] is mask
    with pytest.raises(ValueError, match=rf'{name} works on batches \(B, C, H, W\), got \(6, 32, 32\)'):
        MAKE[name]()(x[0], split_idx=None if 'Crop' in name else 0)


@each('make,message', [
    (lambda: D4(p=1.5), 'p is 1.5'),
    (lambda: RandomSquareCrop(33)(batch()[0], split_idx=1), 'window of 33 pixels does not fit into images of 32x32'),
    (lambda: RandomResizedSquareCrop(8, scale=(.8, .5)), r'scale is \(0.8, 0.5\)'),
    (lambda: RandomResizedSquareCrop(8, val_scale=0), 'val_scale is 0'),
    (lambda: Cutout(size=(0, .5)), r'size is \(0, 0.5\)'),
    (lambda: ChannelIntensity()(batch()[0], split_idx=0), 'got torch.uint8; Standardize comes first'),
    (lambda: ImageBrightness()(batch()[0], split_idx=0),
     'ImageBrightness changes standardised float images, got torch.uint8'),
    (lambda: ImageBrightness(-.1), 'max_change is -0.1'),
    (lambda: PerspectiveWarp(.25), 'magnitude is 0.25, expected a share of the side, 0 <= magnitude < .25'),
])
def test_wrong_settings_are_explained(make, message):
    with pytest.raises(ValueError, match=message): make()


# Together, in fastai

def loaders(tfms, n=24, c=6):
    x, context, _ = batch(n, c, (48, 48))
    dsets = Datasets(range(n), [[lambda i: SomeImage(x[i])], [lambda i: TensorBase(context[i])],
                                [lambda i: TensorCategory(i)]],
                     splits=[range(16), range(16, n)], n_inp=2)
    return dsets.dataloaders(bs=8, after_batch=tfms, device='cpu', num_workers=0, shuffle=False), x, context


def names(tfms): return [type(t).__name__ for t in sorted(tfms, key=lambda t: t.order)]


def test_the_orders_put_bytes_first():
    assert names(screen_transforms(size=32, crop=40, cutout=1)) == ['RandomSquareCrop', 'D4', 'RandomResizedSquareCrop',
                                                                    'Standardize', 'ChannelIntensity', 'Cutout']
    assert names(screen_transforms()) == ['D4', 'Standardize', 'ChannelIntensity']
    assert screen_transforms(d4=False, intensity=0, standardize=None) == []
    assert len({t.seed for t in screen_transforms(size=32, crop=40, cutout=1, seed=10) if hasattr(t, 'seed')}) == 5
    every = screen_transforms(size=32, crop=40, cutout=1, seed=10, warp=.1, brightness=.2)
    assert names(every) == ['RandomSquareCrop', 'D4', 'RandomResizedSquareCrop', 'PerspectiveWarp', 'Standardize',
                            'ImageBrightness', 'ChannelIntensity', 'Cutout']
    seeds = {type(t).__name__: t.seed for t in every if hasattr(t, 'seed')}
    assert len(set(seeds.values())) == 7
    # the new ones leave the draws of the old ones alone
    for t in screen_transforms(size=32, crop=40, cutout=1, seed=10):
        if hasattr(t, 'seed'): assert seeds[type(t).__name__] == t.seed
    assert screen_transforms(size=32, crop=40)[2].scale == (1, 1)
    assert screen_transforms(size=32, scale=(.2, .4))[1].scale == (.2, .4)


@each('c', [1, 4, 6])
@each('standardize', ['image', 'plate', 'experiment', 'screen'])
def test_a_real_loader(standardize, c):
    _, x, context = loaders(None, c=c)
    stats = None if standardize == 'image' else channel_stats([(x, context)], standardize)
    dls, x, context = loaders(screen_transforms(size=24, crop=40, cutout=2, standardize=standardize, stats=stats,
                                                seed=0), c=c)
    for dl in dls:
        for image, ctx, target in dl:
            assert type(image) is SomeImage and image.dtype == torch.float32 and image.shape == (8, c, 24, 24)
            assert type(target) is TensorCategory and torch.equal(ctx, context[target])
    valid = dls.valid.one_batch()
    tfm = Standardize(standardize, *(stats or ()))
    expected = RandomResizedSquareCrop(24)(RandomSquareCrop(40)(x[16:], split_idx=1), split_idx=1)
    assert torch.equal(valid[0], tfm((expected, context[16:]))[0])
    shown = dls.valid.decode(valid)[0]
    assert type(shown) is SomeImage and shown.dtype == torch.uint8
    if standardize != 'image': assert (shown.float()-expected).abs().max() < .51
    assert len(dls.valid.decode_batch(valid, max_n=3)) == 3


def test_symmetries_and_crops_reach_the_standardising_as_bytes():
    seen = []
    class Spy(Standardize):
        def encodes(self, b:list):
            seen.append(b[0].dtype)
            return b
    dls, x, _ = loaders([Spy(), *screen_transforms(crop=32, standardize=None, intensity=0)])
    image, _, target = dls.train.one_batch()
    assert set(seen) == {torch.uint8}
    assert all(np.isin(numpy(image[i]), numpy(x[target[i]])).all() for i in range(8))


def test_a_loader_of_images_and_context_alone_and_its_test_set():
    dls, _, context = (
        loaders(screen_transforms(standardize='experiment',
                                  stats=channel_stats([(batch(24, 6, (48, 48))[0], batch(24)[1])], 'experiment'))))
    image, ctx = dls.test_dl(list(range(16, 24))).one_batch()
    assert torch.equal(image, dls.valid.one_batch()[0]) and torch.equal(ctx, context[16:])


def test_statistics_can_be_computed_from_a_loader_without_batch_transforms():
    dls, x, context = loaders(None)
    stats = channel_stats(dls.valid, 'experiment')
    assert isinstance(stats, ChannelStats)
    assert all(torch.equal(a, b) for a, b in zip(stats, channel_stats([(x[16:], context[16:])], 'experiment')))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_the_same_seed_gives_the_same_augmentation_on_the_gpu():
    x, context, target = batch(size=(48, 48))
    for standardize in ('image', 'experiment'):
        stats = channel_stats([(x, context)], 'experiment') if standardize == 'experiment' else None
        out = []
        for device in ('cpu', 'cuda'):
            b = (x.to(device), context.to(device), target.to(device))
            for tfm in sorted(screen_transforms(size=24, crop=40, cutout=2, standardize=standardize, stats=stats,
                                                seed=0), key=lambda t: t.order):
                b = tfm(b, split_idx=0)
            out.append(b[0].cpu())
        torch.testing.assert_close(*out, atol=1e-4, rtol=1e-4)
    x = x.float()
    for make in (lambda: PerspectiveWarp(.1, p=.7, seed=0), lambda: ImageBrightness(seed=0)):
        torch.testing.assert_close(make()(x.cuda(), split_idx=0).cpu(), make()(x, split_idx=0), atol=1e-2, rtol=1e-3)
