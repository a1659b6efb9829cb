"Channel files to pixels, and pixels to colours: real files, bad files, any number of channels."

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from cases import each
import torch
from fastai.torch_core import TensorImage
from PIL import Image

from rcic_fastai.screen.planes import read_channel
from rcic_fastai.data.store import read_site
from rcic_fastai.data.colors import channel_colors, stain_colors, stain_names
from rcic_fastai.data.image import MultiChannelImage, channel_limits, show_channels
from rcic_fastai.data.image import stains_to_rgb
from rcic_fastai.screen.sites import present_sites, site_files
from rcic_fastai.screen.read import read_screen

matplotlib.use("Agg")
REAL = Path(__file__).parents[1].parent / "shared" / "rcic"
real = pytest.mark.skipif(not (REAL / "train" / "HEPG2-01").is_dir(),
                          reason="the real images are not in ../shared/rcic")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def grey(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def site(tmp_path):
    "Pattern and pixels of a site of six files, 9 rows and 14 columns"
    x = grey((6, 9, 14))
    for c, plane in enumerate(x, 1):
        Image.fromarray(plane).save(tmp_path / f"B03_s1_w{c}.png")
    return f"{tmp_path}/B03_s1_w{{channel}}.png", x


# the real files


@pytest.fixture(scope="module")
def real_sites():
    screen = read_screen(REAL)
    return screen.sites(screen.wells.query("well == 'B02' and split == 'train' and experiment.str.endswith('-01')"))


@pytest.mark.slow
@real
def test_the_complete_real_sites_have_the_pixels_of_their_files(real_sites):
    sites, left_out = present_sites(real_sites)
    assert (len(sites), left_out) == (16, 16)
    for files in sites.files:
        x = MultiChannelImage.create(files)
        assert (tuple(x.shape), x.dtype, type(x)) == ((6, 512, 512), torch.uint8, MultiChannelImage)
        for c in range(6):
            with Image.open(files.format(channel=c + 1)) as im:
                np.testing.assert_array_equal(x[c].numpy(), np.asarray(im))


@real
def test_the_incomplete_real_sites_name_the_missing_file(real_sites):
    incomplete = real_sites[real_sites.site == 2]
    assert len(incomplete) == 16
    for r in incomplete.itertuples():
        with pytest.raises(FileNotFoundError, match=f"{r.experiment}/Plate{r.plate}/B02_s2_w5.png does not exist"):
            MultiChannelImage.create(r.files)
        assert MultiChannelImage.create(r.files, channels=(1, 2, 3, 4)).shape == (4, 512, 512)


# reading


def test_pattern_list_and_array_give_the_same_image(site):
    files, x = site
    for source in (files, Path(files), site_files(files), [str(p) for p in site_files(files)], x, torch.from_numpy(x)):
        im = MultiChannelImage.create(source)
        assert type(im) is MultiChannelImage and isinstance(im, TensorImage) and im.dtype == torch.uint8
        np.testing.assert_array_equal(im.numpy(), x)


def test_channels_come_in_the_order_asked_for(site):
    files, x = site
    np.testing.assert_array_equal(read_site(files, (6, 1)), x[[5, 0]])
    np.testing.assert_array_equal(read_site(files, (3,)), x[[2]])


def test_a_composite_gives_its_colours_as_channels(tmp_path):
    x = grey((5, 7, 3))
    Image.fromarray(x).save(tmp_path / "B03_s1.png")
    im = MultiChannelImage.create(tmp_path / "B03_s1.png")
    assert im.is_contiguous() and im.shape == (3, 5, 7)
    np.testing.assert_array_equal(im.numpy(), x.transpose(2, 0, 1))


def png(x, mode=None, **kwargs):
    data = io.BytesIO()
    image = Image.fromarray(x)
    (image.convert(mode) if mode else image).save(data, "PNG", **kwargs)
    return data.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def interlaced_png(x):
    "Adam7, which Pillow reads but does not write; every row unfiltered"
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = [b"\0" + row.tobytes() for y, x0, dy, dx in passes for row in x[y::dy, x0::dx] if row.size]
    header = struct.pack(">2I5B", x.shape[1], x.shape[0], 8, 0 if x.ndim == 2 else 2, 0, 0, 1)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows)))
            + chunk(b"IEND", b""))


@each("shape", [(5, 7), (1, 1), (1, 333), (257, 1), (64, 64), (9, 11, 3), (1, 1, 3)])
@each("write", [png, interlaced_png, lambda x: png(x, transparency=3 if x.ndim == 2 else (1, 2, 3))])
def test_png_of_any_size_is_read_bit_by_bit(tmp_path, shape, write):
    x = grey(shape)
    (tmp_path / "a.png").write_bytes(write(x))
    got = read_channel(tmp_path / "a.png")
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, x)


def test_grey_tiff(tmp_path):
    x = grey((5, 7))
    Image.fromarray(x).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_channel(tmp_path / "a.tif"), x)


def test_the_content_counts_not_the_name(tmp_path):
    x = grey((5, 7))
    (tmp_path / "a.tif").write_bytes(png(x))
    Image.fromarray(x).save(tmp_path / "b.png", format="TIFF")
    np.testing.assert_array_equal(read_channel(tmp_path / "a.tif"), x)
    np.testing.assert_array_equal(read_channel(tmp_path / "b.png"), x)


def test_threads_read_at_the_same_time(site):
    "Packing reads with threads"
    with ThreadPoolExecutor(4) as pool:
        for x in pool.map(read_site, [site[0]] * 50):
            np.testing.assert_array_equal(x, site[1])


def test_a_site_can_be_written_to(site):
    im = MultiChannelImage.create(site[0])
    im[0] = 0
    assert im[0].sum() == 0


def test_arrays_of_any_memory_order():
    x = grey((6, 4, 5))
    np.testing.assert_array_equal(MultiChannelImage.create(x[::-1, ::-1]).numpy(), x[::-1, ::-1])
    np.testing.assert_array_equal(MultiChannelImage.create(np.asfortranarray(x)).numpy(), x)


@pytest.mark.parametrize("channel", [1, 4, 6])
def test_a_missing_file_is_named(site, channel):
    Path(site[0].format(channel=channel)).unlink()
    with pytest.raises(FileNotFoundError, match=f"B03_s1_w{channel}.png does not exist"):
        read_site(site[0])


@each(
    "suffix, array, said",
    [
        (".tif", np.zeros((9, 14), np.uint16), "uint16, expected 8 bits; deeper images need grey limits"),
        (".tif", np.zeros((9, 14), np.float32), "float32, expected 8 bits; deeper images need grey limits"),
        (".png", np.zeros((9, 14), np.uint16), "uint16, expected 8 bits; deeper images need grey limits"),
        (".tif", np.zeros((9, 14, 4), np.uint8), "126 of 126 pixels are transparent"),
        (".png", np.zeros((9, 14, 4), np.uint8), "126 of 126 pixels are transparent"),
        (".png", np.zeros((9, 14, 2), np.uint8), "126 of 126 pixels are transparent"),
    ],
)
def test_files_of_another_depth_are_refused(site, suffix, array, said):
    path = Path(site[0].format(channel=3)).with_suffix(suffix)
    Image.fromarray(array).save(path)
    with pytest.raises(ValueError, match=rf"B03_s1_w3{suffix}: {said}"):
        read_channel(path)


@each("mode", ["P", "1", "LA", "RGBA"])
def test_grey_of_another_kind_is_read(tmp_path, mode):
    x = grey((5, 7)) if mode != "1" else grey((5, 7)) // 128 * 255
    Image.fromarray(x).convert(mode).save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_channel(tmp_path / "p.png", limits=(0, 255)), x)


def test_a_colour_file_among_the_channels_is_refused(site):
    Image.fromarray(grey((9, 14, 3))).save(site[0].format(channel=2))
    with pytest.raises(ValueError, match="B03_s1_w2.png: a colour image, expected one grey image per channel"):
        read_site(site[0])


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_file_that_was_cut_off_is_named(tmp_path, keep):
    path = tmp_path / "cut.png"
    Image.fromarray(grey((64, 64))).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match="cut.png cannot be read"):
        read_channel(path)


@pytest.mark.parametrize("kind", [grey((9, 11)), grey((5, 7, 3))])
def test_one_wrong_byte_never_gives_wrong_pixels(tmp_path, kind):
    """Whichever byte it is: an error that names the file, or the right pixels where it was of no account; libpng
    behind torchvision 0.29 crashes"""
    path, content, errors = tmp_path / "one.png", png(kind), 0
    for i in range(len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 255]) + content[i + 1 :])
        try:
            got = read_channel(path)
        except ValueError as e:
            assert "one.png" in str(e)
            errors += 1
        else:
            np.testing.assert_array_equal(got, kind)
    assert errors > 0.8 * len(content)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>"])
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "no.png").write_bytes(content)
    with pytest.raises(ValueError, match="no.png is not an image"):
        read_channel(tmp_path / "no.png")


def test_a_folder_is_named(tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=tmp_path.name):
        read_channel(tmp_path)


def test_channels_of_different_size_are_named(site):
    Image.fromarray(grey((8, 14))).save(site[0].format(channel=5))
    message = "B03_s1_w5.png: 8x14 pixels, but B03_s1_w1.png has 9x14"
    with pytest.raises(ValueError, match=message):
        read_site(site[0])
    with pytest.raises(ValueError, match=message):
        read_site([site[0].format(channel=c) for c in range(1, 7)])  # names as text


@pytest.mark.parametrize("channels, files", [((), "x{channel}.png"), ((1,), [])])
def test_no_channels_at_all(channels, files):
    with pytest.raises(ValueError, match="expected one per channel"):
        read_site(files, channels)


@each("shape", [(5, 5), (2, 6, 5, 5)])
@each("kind", [np.zeros, torch.zeros])
def test_pixels_of_another_shape_are_refused(shape, kind):
    with pytest.raises(ValueError, match=r"expected \(channels, height, width\)"):
        MultiChannelImage.create(kind(shape))


# colours


def test_each_stain_has_its_colour_and_they_add_up():
    for c in range(6):
        x = np.zeros((6, 2, 3), np.uint8)
        x[c] = 200
        np.testing.assert_allclose(stains_to_rgb(x, limits=[(0, 200)] * 6), np.broadcast_to(stain_colors[c], (2, 3, 3)),
                                   atol=1e-6)
    both = np.zeros((6, 2, 3), np.uint8)
    both[[0, 2]] = 100
    expected = 0.5 * (np.array(stain_colors[0]) + stain_colors[2])
    np.testing.assert_allclose(stains_to_rgb(both, limits=[(0, 200)] * 6)[0, 0], expected, atol=1e-6)
    np.testing.assert_allclose(stains_to_rgb(both, limits=[(0, 200)] * 6, brightness=0.5)[0, 0], expected / 2,
                               atol=1e-6)
    assert len(set(stain_colors)) == len(stain_names) == 6


def test_limits_stretch_each_channel_apart():
    x = np.arange(1000, dtype=np.float32).reshape(1, 20, 50)
    x = np.concatenate([x, 5 - x / 100])
    limits = channel_limits(x, (10, 90))
    np.testing.assert_allclose(limits, [[99.9, 899.1], [5 - 8.991, 5 - 0.999]], rtol=1e-4)
    rgb = stains_to_rgb(x, limits, colors=[(1, 0, 0), (0, 1, 0)])
    assert rgb[..., 0].min() == rgb[..., 1].min() == 0 and rgb[..., 0].max() == rgb[..., 1].max() == 1
    assert not rgb[..., 2].any()
    np.testing.assert_allclose(rgb[..., 0], 1 - rgb[..., 1], atol=1e-5)
    two = np.stack([x, x + 100])
    assert (channel_limits(two, (0, 100)) == [[0, 1099], [x[1].min(), x[1].max() + 100]]).all()


@each("dtype", [torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_colours_of_any_type(dtype):
    x = torch.from_numpy(grey((6, 16, 16)) // 2).to(dtype)
    rgb = stains_to_rgb(x)
    assert rgb.dtype == np.float32 and rgb.shape == (16, 16, 3) and 0 <= rgb.min() < rgb.max() <= 1
    np.testing.assert_allclose(rgb, stains_to_rgb(x.float().numpy()), atol=1e-6)


def test_colours_do_not_depend_on_standardising():
    x = grey((6, 32, 32)).astype(np.float32)
    z = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
    np.testing.assert_allclose(stains_to_rgb(z), stains_to_rgb(x), atol=1e-4)


def test_colours_of_a_tensor_with_gradient():
    x = torch.rand(6, 4, 4, requires_grad=True)
    assert stains_to_rgb(x).shape == (4, 4, 3) and channel_limits(x).shape == (6, 2)


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_constant_image_is_black(value):
    assert not stains_to_rgb(np.full((6, 4, 4), value, np.uint8)).any()


def test_what_is_no_number_is_black_and_harms_nothing_else():
    x = np.random.default_rng(0).random((6, 40, 40), dtype=np.float32)
    x[0, 3, 4], x[1, 5, 6], x[2, 7, 8] = np.nan, np.inf, -np.inf
    x[5] = np.nan
    rgb, clean = stains_to_rgb(x), stains_to_rgb(np.nan_to_num(x, nan=0.5, posinf=0.5, neginf=0.5))
    assert np.isfinite(rgb).all() and np.isfinite(channel_limits(x)).all()
    keep = np.ones((40, 40), bool)
    keep[[3, 5, 7], [4, 6, 8]] = False
    np.testing.assert_allclose(rgb[keep], clean[keep], atol=0.01)
    assert not stains_to_rgb(np.full((6, 4, 4), np.nan)).any()


def test_four_channels_with_colours_of_their_own():
    "Those of the Human Protein Atlas: red, green, blue, yellow"
    colors = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)]
    x = np.zeros((4, 2, 2), np.uint8)
    x[3] = 255
    assert (stains_to_rgb(x, [(0, 255)] * 4, colors) == (1, 1, 0)).all()
    x[2] = 255
    assert (stains_to_rgb(x, [(0, 255)] * 4, colors) == (1, 1, 1)).all()
    seven = [*stain_colors, (1, 1, 1)]
    assert stains_to_rgb(grey((7, 5, 5)), colors=seven).shape == (5, 5, 3)


def test_colour_errors():
    with pytest.raises(ValueError, match="7 channels, but 6 colours; give `colors`"):
        stains_to_rgb(grey((7, 4, 4)), colors=stain_colors)
    with pytest.raises(ValueError, match=r"limits of shape \(5, 2\), expected \(6, 2\)"):
        stains_to_rgb(grey((6, 4, 4)), limits=np.zeros((5, 2)))
    with pytest.raises(ValueError, match=r"shape \(2, 6, 4, 4\), expected \(channels, height, width\)"):
        stains_to_rgb(grey((2, 6, 4, 4)))


# showing


def test_show_draws_on_the_axes_given_with_a_title():
    im = MultiChannelImage.create(grey((6, 8, 8)))
    fig, ax = plt.subplots()
    assert im.show(ctx=ax, title="siRNA 3", limits=[(0, 255)] * 6) is ax
    assert ax.get_title() == "siRNA 3" and not ax.axison
    np.testing.assert_allclose(ax.images[0].get_array(), stains_to_rgb(im, [(0, 255)] * 6))
    assert im.show(figsize=(1, 1)).figure is not fig


@pytest.mark.parametrize("n", [1, 3, 6])
def test_show_channels_shows_each_plane(n):
    x = MultiChannelImage.create(grey((n, 8, 9)))
    axes = show_channels(x)
    assert [a.get_title() for a in axes] == ["together", *(f"{i} {name}" for i, name in enumerate(stain_names[:n], 1))]
    for i in range(n):
        np.testing.assert_array_equal(axes[i + 1].images[0].get_array(), x[i].numpy())


@pytest.mark.parametrize("n", [1, 2, 5, 7, 8, 30])
def test_any_number_of_channels_is_a_contact_sheet(n):
    "Floats of any size; each channel alone has its colour, and no two are alike"
    x = np.zeros((n, 6, n + 1), np.float32)
    for c in range(n): x[c, :, c] = 2e-5
    limits = np.tile([0.5e-5, 2e-5], (n, 1))
    axes = show_channels(x, [f"marker {c}" for c in range(n)], limits)
    rows = {round(a.get_position().y0, 3) for a in axes}
    assert len(axes) == n + 1 and len(rows) == -(-(n + 1) // 8) and axes[n].get_title() == f"{n} marker {n - 1}"
    rgb = axes[0].images[0].get_array()
    np.testing.assert_allclose(rgb[0, :n], channel_colors(n), atol=1e-5)
    assert (rgb[0, n] == 0).all() and len(set(channel_colors(n))) == n
    assert all(a.lines[0].get_color() == c for a, c in zip(axes[1:], channel_colors(n)))
    plt.close("all")


def test_some_channels_of_a_well(small_screen):
    screen = read_screen(small_screen)
    well = screen.wells.id_code[0]
    every, some = screen.show_well(well), screen.show_well(well, channels="Golgi,2")
    assert [a.get_title() for a in some] == ["together", "1 Golgi", "2 ER"]
    for ours, theirs in ((1, 6), (2, 2)):
        np.testing.assert_array_equal(some[ours].images[0].get_array(), every[theirs].images[0].get_array())
        assert some[ours].lines[0].get_color() == every[theirs].lines[0].get_color() == stain_colors[theirs - 1]
    with pytest.raises(ValueError, match="no channel is called 'DNA'; did you mean 'RNA'"):
        screen.show_well(well, channels="DNA")
    with pytest.raises(ValueError, match="there is no time 2: the screen has one"): screen.show_well(well, time=2)
    plt.close("all")


def test_show_channels_of_standardised_half_precision():
    axes = show_channels(torch.randn(2, 8, 8).bfloat16(), names=["a"])
    assert [a.get_title() for a in axes] == ["together", "1 a", "2"]


def test_the_type_survives_what_a_loader_does():
    im = MultiChannelImage.create(grey((6, 8, 8)))
    assert type(torch.stack([im, im])) is MultiChannelImage and type(im.float() / 2) is MultiChannelImage
    assert type(im[:2]) is MultiChannelImage
