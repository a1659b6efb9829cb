"Groups of views: which they are, what a batch looks like in them, and one score out of many."

from itertools import product

import numpy as np
import pytest
from cases import each
import torch
from fastai.vision.augment import RandTransform
from scipy.special import expit, log_softmax, softmax

from rcic_fastai.data.augment import RandomSquareCrop, RandomResizedSquareCrop, Standardize, dihedral
from rcic_fastai.data.augment import screen_transforms
from rcic_fastai.data.context import ScreenContext
from rcic_fastai.data.image import MultiChannelImage
from rcic_fastai.predict.tta import TTA, TTAView, ViewTransform, check_views, combine_views, image_keys, tta_group
from rcic_fastai.predict.tta import tta_presets, window


def raw(n=3, side=48):
    x = np.random.default_rng(0).integers(0, 255, (n, 4, side, side), dtype=np.uint8)
    return MultiChannelImage(torch.from_numpy(x)), ScreenContext(torch.zeros(n, 3, dtype=torch.int64))


def plain(x):
    return x.as_subclass(torch.Tensor)


@each("name, n", [("none", 1), ("d4", 8), ("s4", 32), ("hpa_first_place", 32)])
def test_presets_start_with_the_plain_view(name, n):
    views = tta_group(name).views()
    assert len(set(views)) == len(tta_group(name)) == n and views[0] == TTAView(share=tta_presets[name].crop_size)
    assert TTA(**tta_presets[name].changes()) == tta_presets[name]


def test_a_number_keeps_its_meaning():
    assert tta_group(11).views() == [TTAView(v % 8, v) for v in range(11)]


@each("settings, message", [
    (dict(d4=3), "d4 is 3, expected 1, 2, 4 or 8"), (dict(crops=0), "crops is 0"), (dict(seeds=65), "seeds is 65"),
    (dict(crop_size=1.5), "crop_size is 1.5"),
    (dict(combine="median"), "combine is 'median', expected 'mean' or 'max'"),
    (dict(plain_weight=-.1), "plain_weight is -0.1"), (dict(space="odds"), "space is 'odds'"),
    (dict(crop=2), "tta has no setting 'crop'")])
def test_bad_groups(settings, message):
    with pytest.raises(ValueError, match=message):
        tta_group(settings)


@each("activation, space, combine, weight",
      [*product(["softmax", "sigmoid"], ["logit", "probability"], ["mean", "max"], [0.0, 0.4, 1.0])])
def test_combination_against_float64_by_hand(activation, space, combine, weight):
    y = np.random.default_rng(0).normal(0, 4, (8, 5, 6))
    z = y if space == "logit" else expit(y) if activation == "sigmoid" else softmax(y, -1)
    expected = weight * z[0] + (1 - weight) * getattr(z, combine)(0)
    if space == "probability":
        expected = np.log(expected / (1 - expected)) if activation == "sigmoid" else np.log(expected)
    group = TTA(space=space, combine=combine, plain_weight=weight)
    for views in (torch.tensor(y).float(), list(torch.tensor(y).float())):
        np.testing.assert_allclose(combine_views(views, group, activation), expected, rtol=1e-4, atol=1e-4)


def test_what_is_combined_by_default():
    y = torch.randn(8, 3, 4, generator=torch.Generator().manual_seed(0)) * 3
    logit, probability = TTA(space="logit"), TTA(space="probability")
    assert torch.equal(combine_views(y, TTA()), combine_views(y, logit))
    assert torch.equal(combine_views(y, TTA(), "sigmoid"), combine_views(y, probability, "sigmoid"))
    # softmax does not see a constant per view, and neither does a maximum
    shifted = y + torch.arange(8.0)[:, None, None] * 5
    np.testing.assert_allclose(*(log_softmax(combine_views(v, TTA(combine="max")).numpy(), 1) for v in (y, shifted)),
                               atol=1e-5)


@pytest.mark.parametrize("combine", ["mean", "max"])
def test_certain_scores_stay_finite(combine):
    y = torch.tensor([100.0, -100.0, 300.0, -300.0]).repeat(8, 1)[:, None]
    y[1:] = y[1:] / 2
    for activation in ("sigmoid", "softmax"):
        out = combine_views(y, TTA(combine=combine, space="probability", plain_weight=0.4), activation)
        assert torch.isfinite(out).all() and out.argmax() == 2


def test_as_many_scores_as_views():
    with pytest.raises(ValueError, match="logits of 4 views for a group of 8"):
        combine_views(torch.zeros(4, 2, 3), TTA())
    with pytest.raises(ValueError, match="activation is 'relu'"):
        combine_views(torch.zeros(8, 2, 3), TTA(), "relu")


def test_windows_lie_in_the_middle_and_elsewhere():
    x = torch.arange(48 * 48).reshape(1, 1, 48, 48)
    assert torch.equal(window(x, 32, 0), x[..., 8:40, 8:40])
    corners = {int(window(x, 32, v)[0, 0, 0, 0]) for v in range(9)}
    assert len(corners) > 6 and torch.equal(window(x, 32, 5), window(x, 32, 5))


def test_networks_trained_on_windows_keep_theirs():
    "`crop_size` is for whole images; a draw looks through another window than the plain view"
    x, context = raw()
    show = ViewTransform([RandomSquareCrop(32), Standardize("image")])
    assert show(x, context, TTAView(share=0.5))[0].shape[-2:] == (32, 32)
    seen = [plain(show(x, context, TTAView(0, c, s))[0]) for c, s in product(range(3), range(2))]
    assert len({v.numpy().tobytes() for v in seen}) == 6
    assert check_views(TTA(crops=3), show) is None
    small = MultiChannelImage(plain(x)[..., :24, :24])
    with pytest.raises(ValueError, match="windows of 32 pixels do not fit into images of 24x24"):
        show(small, context)


def test_windows_of_whole_images_have_the_scale_of_validation():
    "Cut after resizing and standardising: the pixels are those of the plain view"
    x, context = raw()
    show = ViewTransform(screen_transforms(size=24, intensity=0.3))
    whole = plain(show(x, context)[0])
    assert torch.equal(plain(show(x, context, TTAView(share=2 / 3))[0]), whole[..., 4:20, 4:20])
    assert torch.equal(plain(show(x, context, TTAView(3, 2, 0, 0.5))[0]), dihedral(window(whole, 12, 2), 3))


@pytest.mark.parametrize("bound", [False, True])
def test_draws_depend_on_seed_and_key_alone(bound):
    "Also where each transform holds a bound `before_call`, as in fastai 2.8.9: a copy draws for itself."
    x, context = raw(4)
    tfms = screen_transforms(size=32, intensity=0.3, cutout=1, seed=5)
    for t in tfms if bound else ():
        if isinstance(t, RandTransform):
            t.before_call = t.before_call
    states = [t.generator.get_state() for t in tfms if getattr(t, "generator", None) is not None]
    show, keys = ViewTransform(tfms), image_keys("abcd")
    first = plain(show(x, context, TTAView(2, 0, 1), keys)[0])
    state = torch.get_rng_state()
    order = [3, 1, 0]
    rows = [plain(show(x[i : i + 1], context[i : i + 1], TTAView(2, 0, 1), keys[i : i + 1])[0]) for i in order]
    assert torch.equal(torch.cat(rows), first[order])
    assert torch.equal(torch.get_rng_state(), state)  # the generators of training do not move
    assert all(torch.equal(t.generator.get_state(), s)
               for t, s in zip([t for t in tfms if getattr(t, "generator", None) is not None], states))
    assert not torch.equal(first, plain(show(x, context, TTAView(2, 0, 2), keys)[0]))
    same = MultiChannelImage(plain(x)[:1].expand(4, -1, -1, -1))
    drawn = plain(show(same, context, TTAView(0, 0, 1), keys)[0])
    assert len({v.numpy().tobytes() for v in drawn}) == 4  # one image under four names: four draws


def test_draws_leave_out_what_the_group_counts_off():
    "Symmetries are enumerated, not drawn: without other augmentations all draws are alike, and that is told"
    x, context = raw()
    show = ViewTransform(screen_transforms(intensity=0))
    assert torch.equal(plain(show(x, context, TTAView(0, 0, 3))[0]), plain(show(x, context)[0]))
    assert "the draws are all the same" in check_views(TTA(seeds=4), show)
    assert check_views(TTA(seeds=4), ViewTransform([RandomResizedSquareCrop(32)])) is None


@each("group, symmetries", [(TTA(), range(8)), (TTA(d4=4), range(4)), (TTA(d4=2), range(2)),
                            (TTA(combine="max"), range(8))])
def test_a_group_does_not_see_its_own_symmetries(group, symmetries):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 5), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2),
                              torch.nn.Flatten(), torch.nn.Linear(32, 4))
    x, context = raw()
    show = ViewTransform(screen_transforms(intensity=0))

    @torch.no_grad()
    def predicted(x):
        return combine_views(torch.stack([net(plain(show(x, context, v)[0])) for v in group.views()]), group, "sigmoid")

    expected = predicted(x)
    for k in symmetries:
        torch.testing.assert_close(predicted(dihedral(x, k)), expected, atol=1e-5, rtol=1e-5)
