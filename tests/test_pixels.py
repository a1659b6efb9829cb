"fastai's own transforms and learners on images of six channels, in a DataBlock of one's own."
import random
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
from cases import each
import torch
from fastai.vision.all import (
    CategoryBlock,
    ClassificationInterpretation,
    ColReader,
    CropPad,
    CrossEntropyLossFlat,
    DataBlock,
    DihedralItem,
    FlipItem,
    Learner,
    MixUp,
    Normalize,
    PILImage,
    RandomCrop,
    RandomResizedCrop,
    RandomResizedCropGPU,
    RandomSplitter,
    RatioResize,
    Resize,
    ResizeMethod,
    Saturation,
    aug_transforms,
    load_learner,
    resnet18,
    vision_learner,
)
from fastai.vision.augment import Hue, PadMode
from fastai.vision.core import imagenet_stats
from PIL import Image
from torch import nn

from rcic_fastai.data.augment import D4, PerspectiveWarp, RandomResizedSquareCrop, RandomSquareCrop, Standardize
from rcic_fastai.data.augment import channel_stats, screen_transforms
from rcic_fastai.data.select import select_sites
from rcic_fastai.data.block import MultiChannelImageBlock, SixChannelImageBlock, screen_dataloaders
from rcic_fastai.screen.planes import resize_site
from rcic_fastai.data.image import MultiChannelImage
from rcic_fastai.model.core import create_model, param_groups
from rcic_fastai.data.pixels import PixelsToFloat
from rcic_fastai.screen.read import read_screen


@pytest.fixture(scope="module")
def sites(small_screen): return select_sites(read_screen(small_screen), "train")


def loaders(sites, item_tfms=None, batch_tfms=None, block=SixChannelImageBlock, **kwargs):
    block = DataBlock(blocks=(block, CategoryBlock), get_x=ColReader("files"), get_y=ColReader("sirna"),
                      splitter=RandomSplitter(seed=0),
                      item_tfms=item_tfms, batch_tfms=batch_tfms)
    return block.dataloaders(sites, **{"bs": 16, **kwargs})


def plain(x): return x.as_subclass(torch.Tensor)


def pixels(*shape, dtype=np.uint8):
    return MultiChannelImage(
        torch.from_numpy(np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, shape, dtype)))


# Integers to floats

@pytest.mark.parametrize("dtype,top", [(np.uint8, 255), (np.uint16, 65535)])
def test_integers_become_floats_of_0_to_1(dtype, top):
    x = pixels(6, 5, 7, dtype=dtype)
    out = PixelsToFloat()(x)
    assert type(out) is MultiChannelImage and out.dtype == torch.float32
    assert np.allclose(out.numpy(), x.numpy().astype(np.float64) / top, atol=1e-6)
    assert torch.equal(PixelsToFloat()(out), out)  # a second time changes nothing
    half = out.half()
    assert PixelsToFloat()(half).dtype == torch.float16


@each("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_other_integers_are_refused(dtype):
    with pytest.raises(ValueError, match=f"images are {dtype}, expected uint8, uint16 or float"):
        PixelsToFloat()(MultiChannelImage.create(torch.zeros(6, 4, 4).to(dtype)))


@each("tfms,low,high", [
    ([], 0, 1), ([D4, lambda: RandomSquareCrop(32)], 0, 1), ([lambda: RandomResizedSquareCrop(24)], 0, 1),
    ([lambda: PerspectiveWarp(.1)], 0, 1),
    ([lambda: Standardize("image")], -60, 60), ([lambda: RandomResizedSquareCrop(24), lambda: Standardize("screen")],
                                                -60, 60)])
def test_pixels_are_converted_once_whatever_ours_did_before(sites, tfms, low, high):
    tfms = [t() for t in tfms]
    batch = loaders(sites, batch_tfms=tfms).valid.one_batch()[0]
    assert batch.is_floating_point() and low <= batch.min() and .1 < batch.max() <= high
    if low < 0:  # the numbers that a screen pipeline gives
        raw = MultiChannelImage(
            torch.stack([MultiChannelImage.create(f) for f in loaders(sites).valid.items.files[:len(batch)]]))
        for t in tfms: raw = t(raw, split_idx=1)
        assert torch.allclose(plain(batch), plain(raw), atol=1e-5)


def test_a_screen_pipeline_keeps_its_integers(sites):
    raw = screen_dataloaders(sites, transforms=[])
    assert raw.one_batch()[0].dtype == torch.uint8 and not any(isinstance(t, PixelsToFloat) for t in raw.after_batch.fs)
    assert channel_stats(raw.train, by="screen").mean.max() > 1


def test_pixels_of_16_bits_train_in_a_datablock():
    x = [np.random.default_rng(i).integers(0, 65536, (2, 32, 32), np.uint16) for i in range(8)]
    for tfms in ([], [D4(), RandomSquareCrop(24)], [Standardize("image")], aug_transforms(flip_vert=True)):
        block = DataBlock(blocks=(MultiChannelImageBlock, CategoryBlock), get_y=lambda x: int(x[0, 0, 0]) % 2,
                          splitter=RandomSplitter(seed=0),
                          item_tfms=Resize(28), batch_tfms=tfms)
        image, _ = block.dataloaders(x, bs=4).one_batch()
        assert image.dtype == torch.float32 and image.std() > .05
        assert (len(tfms) == 1 or 0 <= image.min() <= image.max() <= 1.0001)
    deep = pixels(2, 6, 32, 32, dtype=np.uint16)
    for tfm in (RandomResizedSquareCrop(24), PerspectiveWarp()):
        with pytest.raises(ValueError, match=r"got uint16: PixelsToFloat\(order=4\) comes first"):
            tfm(deep, split_idx=0)
        assert tfm(PixelsToFloat()(deep), split_idx=0).max() <= 1.0001
    block = DataBlock(blocks=(MultiChannelImageBlock, CategoryBlock), get_y=lambda x: int(x[0, 0, 0]) % 2,
                      splitter=RandomSplitter(seed=0),
                      batch_tfms=[PixelsToFloat(order=4), RandomResizedSquareCrop(24)])
    assert .5 < block.dataloaders(x, bs=4).one_batch()[0].max() <= 1.0001


# Item transforms

@each("tfm,shape", [
    (lambda: Resize(20), (20, 20)), (lambda: Resize((20, 30)), (20, 30)),
    (lambda: Resize(20, ResizeMethod.Squish), (20, 20)),
    (lambda: Resize(70, ResizeMethod.Pad), (70, 70)), (lambda: Resize(20, ResizeMethod.Pad, pad_mode=PadMode.Zeros),
                                                       (20, 20)),
    (lambda: RandomResizedCrop(24), (24, 24)), (lambda: RandomCrop(30), (30, 30)), (lambda: CropPad(80), (80, 80)),
    (lambda: CropPad((10, 80)), (10, 80)),
    (lambda: CropPad(200, pad_mode=PadMode.Reflection), (200, 200)), (lambda: RatioResize(24), None),
    (lambda: FlipItem(1.), (40, 56)),
    (lambda: DihedralItem(1.), None)])
@each("split_idx", [0, 1])
@each("dtype", [np.uint8, np.uint16])
def test_item_transforms_do_to_each_channel_what_they_do_to_a_picture(tfm, shape, split_idx, dtype):
    smooth = np.clip(np.cumsum(np.random.default_rng(0).normal(0, 9, (6, 40, 56)), 2) + 128, 0, 255).astype(np.uint8)
    image = MultiChannelImage.create(smooth.astype(dtype) * (1 if dtype == np.uint8 else 257))
    t = tfm()
    random.seed(3); out = t((image, 0), split_idx=split_idx)[0]
    assert type(out) is MultiChannelImage and out.dtype == image.dtype
    if shape: assert tuple(out.shape[1:]) == (shape if split_idx is not None else out.shape[1:])
    for plane, got in zip(smooth, out.numpy()):
        random.seed(3); expected = np.asarray(t((PILImage.create(plane), 0), split_idx=split_idx)[0]).astype(int)
        # Pillow rounds twice
        assert expected.shape == got.shape and np.abs(expected - got / (1 if dtype == np.uint8 else 257)).max() <= 1.5


def test_resampling_by_name_and_what_crop_pad_refuses():
    x = pixels(6, 16, 16)
    for how in (Image.Resampling.NEAREST, Image.Resampling.BOX, Image.Resampling.BICUBIC):
        assert x.crop_pad((16, 16), resize_mode=how, resize_to=(8, 8)).shape == (6, 8, 8)
    with pytest.raises(ValueError, match="LANCZOS.*expected one of NEAREST, BOX, BILINEAR, BICUBIC"):
        x.crop_pad((16, 16), resize_mode=Image.Resampling.LANCZOS, resize_to=(8, 8))
    with pytest.raises(ValueError, match=r"shape \(2, 6, 8, 8\), expected \(channels, height, width\)"):
        Resize(4)(pixels(2, 6, 8, 8), split_idx=1)


def test_resize_site_keeps_the_type():
    for dtype in (np.uint8, np.uint16, np.float32):
        x = (np.random.default_rng(0).random((2, 8, 8)) * 200).astype(dtype) * dtype(1 if dtype == np.uint8 else 300)
        assert resize_site(x, 4).dtype == dtype and abs(resize_site(x, 4).mean() / x.mean() - 1) < .01


# Batch transforms

def test_batch_transforms_keep_channels_and_type():
    x = MultiChannelImage(torch.rand(4, 6, 32, 32))
    for tfms in (aug_transforms(flip_vert=True, max_rotate=45.), [RandomResizedCropGPU(24)], aug_transforms(size=20)):
        y = x
        for t in tfms: y = t((y, 0), split_idx=0)[0]
        assert type(y) is MultiChannelImage and y.shape[:2] == (4, 6) and 0 <= y.min() <= y.max() <= 1.0001


def test_what_makes_no_sense_on_stains_is_refused(sites):
    x = MultiChannelImage(torch.rand(4, 6, 32, 32))
    for t in (Saturation(p=1.), Hue(p=1.)):
        with pytest.raises(ValueError,
                           match=f"{type(t).__name__}: saturation and hue need red, green and blue, these images have "
                           "6 channels"):
            t(x, split_idx=0)
        assert t(MultiChannelImage(torch.rand(4, 3, 32, 32)), split_idx=0).shape == (4, 3, 32, 32)
    with pytest.raises(ValueError,
                       match="Brightness clips pixels to 0-1.*for standardised images there are ImageBrightness and "
                       "ChannelIntensity"):
        screen_dataloaders(sites, transforms=[*screen_transforms(), *aug_transforms()]).one_batch()
    with pytest.raises(ValueError, match="statistics of 3 channels for images of 6"):
        Normalize.from_stats(*imagenet_stats, cuda=False)(x)
    assert Normalize.from_stats(*imagenet_stats,
                                cuda=False)(MultiChannelImage(torch.rand(4, 3, 8, 8))).shape == (4, 3, 8, 8)
    assert Normalize.from_stats([.1] * 6, [.2] * 6, cuda=False)(x).shape == x.shape


# Learners

@pytest.mark.slow
@pytest.mark.parametrize("arch,item_tfms,batch_tfms",
                         [("resnet18", None, None), (resnet18, None, None), (resnet18, Resize(40), "fastai"),
                          ("resnet18", None, "ours")],
                         ids=["timm", "torchvision", "torchvision-fastai", "timm-ours"])
def test_vision_learner_trains_shows_and_predicts(sites, tmp_path, arch, item_tfms, batch_tfms):
    tfms = {None: None, "fastai": [*aug_transforms(flip_vert=True), Normalize()],
            "ours": screen_transforms(size=32)}[batch_tfms]
    dls = loaders(sites, item_tfms, tfms, path=tmp_path)
    learn = vision_learner(dls, arch, n_in=6, pretrained=False, metrics=None)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-3)
    assert np.isfinite(learn.recorder.values[-1]).all()
    with warnings.catch_warnings(), learn.no_bar():
        warnings.simplefilter("ignore")
        dls.show_batch(max_n=4); learn.show_results(max_n=4)
        ClassificationInterpretation.from_learner(learn).plot_top_losses(2)
        plt.close("all")
        row = sites.iloc[0]
        named, number, shares = learn.predict(row)
        learn.export()
        again = load_learner(tmp_path / "export.pkl")
        with again.no_bar(): loaded = again.predict(row)[2]
    assert named == str(dls.vocab[number]) and shares.sum() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(shares, loaded, atol=1e-5)


@pytest.mark.slow
def test_learner_with_a_network_of_ones_own_and_with_ours(sites):
    dls = loaders(sites)
    for net, split in ((nn.Sequential(nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                      nn.Linear(8, dls.c)), None),
                       (create_model("resnet10t", dls.c, n_channels=6), param_groups)):
        learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), cbs=MixUp(),
                        **({"splitter": split} if split else {}))
        with learn.no_bar(), learn.no_logging():
            learn.fine_tune(1)
            assert learn.tta()[0].shape[1] == dls.c and np.isfinite(learn.validate()[0])


@each("given", ["row", "pattern", "paths", "pixels", "tensor"])
def test_a_site_in_any_form(sites, given):
    row = sites.iloc[0]
    expected = MultiChannelImage.create(row.files)
    form = {"row": row, "pattern": row.files, "paths": [row.files.format(channel=c) for c in range(1, 7)],
            "pixels": expected.numpy(), "tensor": plain(expected)}[given]
    assert torch.equal(plain(SixChannelImageBlock().type_tfms[0](form)), plain(expected))
    small = MultiChannelImageBlock(cache=True, size=24).type_tfms[0]
    assert small(form).shape == (6, 24, 24) and torch.equal(plain(small(form)), plain(small(row.files)))


def test_what_is_no_site_is_refused():
    for wrong in (3, None, {"files": "a"}):
        with pytest.raises(ValueError, match=f"a site is given as {type(wrong).__name__}, expected a path pattern"):
            SixChannelImageBlock().type_tfms[0](wrong)
