"""Any type, container and meaning of grey: describing, showing, packing and training accept the same files, read the
same values, or say the same sentence."""
import base64
import struct
import zlib
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from cases import each
from PIL import Image
from tifffile import imwrite

import rcic_fastai.data.image as shown_by
from rcic_fastai.data.block import screen_dataloaders
from rcic_fastai.data.pack import pack_screen
from rcic_fastai.screen.channels import as_channel, grey_limits
from rcic_fastai.screen.describe import describe_screen
from rcic_fastai.screen.grey_limits import find_grey_limits
from rcic_fastai.screen.planes import plane_size, read_grey
from rcic_fastai.screen.read import read_screen
from rcic_fastai.screen.sources import Plane

try: import imagecodecs
except ImportError: imagecodecs = None

X = (np.arange(64).reshape(8, 8) * 65).astype(np.uint16)  # what a camera of 12 bits wrote, 0 to 4095
EIGHT = (X >> 4).astype(np.uint8)
FLOAT = (X / 4095 * .02).astype(np.float32)
FLAT = np.full((8, 8), 77, np.uint8)
FLAT = np.full((8, 8), 77, np.uint8)
RGB = np.stack([EIGHT, EIGHT.T, EIGHT[::-1]], -1)

# X with 12 bits, written by imagecodecs
JP2 = """/0//UQApAAAAAAAIAAAACAAAAAAAAAAAAAAACAAAAAgAAAAAAAAAAAABCwEB/1IADAAAAAEAAAQEAAH/XAAEQGD/ZAAlAAFDcmVh
dGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAABmAAH/k9/hVBIsQqeXlbFDDtYoP97oKcVIuDRWEuF5DpiRhU9D
0Zh+EpvOO8N5vXFJxoU3gmJWFbc5znXqSkAMwCgAB0Rl1SPMU4YLXGfa6ymrhOuAcNhsNhsNhsP/2Q=="""
JXL = "/wpBYFC0CAgEAQDsAEs4aBjC2wUKEpLi8q36PHAGAAAAgNcAAAAAaAQAAABAIwAAAAAaAQAAANAIAAAAgEYAAAAANAIAAAAA"
RGB16 = """iVBORw0KGgoAAAANSUhEUgAAAAgAAAAIEAIAAAAb/fWfAAAAIklEQVQYlWNkgABHdMgIhpjiLEwcIMiAARnBEFN8VAMxGgBhjwr1
ludOtgAAAABJRU5ErkJggg=="""
JPEG12 = """/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEB
AQEBAQEBAQEBAQEBAQH/wQALDAAIAAgBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAAA//EABwQAAAGAwAAAAAAAAAAAAAAAAALDio3
SVZndP/aAAgBAQAAPwAy15NfcBsIMarX5daD/9k="""


def tiff(x, **how): return partial(imwrite, data=x, **how)
def picture(x, mode=None, format="PNG", **how):
    image = Image.fromarray(x)
    return partial((image.convert(mode) if mode else image).save, format=format, **how)


def white(write):
    "The same samples in a little-endian TIFF whose white is zero"
    def turned(path):
        write(path)
        data, tag = Path(path).read_bytes(), struct.pack("<HHI", 262, 3, 1)
        assert data.count(tag + b"\1\0") == 1
        Path(path).write_bytes(data.replace(tag + b"\1\0", tag + b"\0\0"))
    return turned


def content(data): return partial(Path.write_bytes, data=data)
def text(data): return lambda path: Path(path).write_bytes(base64.b64decode(data))


def packed_tiff(bits, white=0):
    "A TIFF whose samples of 12 bits lie next to each other, or of 1 bit"
    digits = "".join(f"{v >> 12 - bits:0{bits}b}" for v in X.ravel())
    data = int(digits, 2).to_bytes(len(digits) // 8, "big")
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: 1 - white, 273: 8, 277: 1, 278: 8, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in tags.items())
    head = struct.pack("<4sI", b"II*\0", 8 + len(data))
    return content(head + data + struct.pack("<H", len(tags)) + entries + bytes(4))


def png(depth, x, chunks=()):
    "A PNG of grey samples of any depth, with more chunks"
    rows = ["".join(f"{v:0{depth}b}" for v in row) for row in x]
    data = b"".join(b"\0" + int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, depth, 0, 0, 0, 0)), *chunks, (b"IDAT", zlib.compress(data)),
             (b"IEND", b"")]
    return content(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts))


def palette(grey):
    table = np.stack([np.arange(255, -1, -1)] * 3)
    if not grey: table[0] = 7
    return table.astype(np.uint16) * 257


def with_alpha(x, alpha): return np.dstack([x, np.full(x.shape[:2], alpha, x.dtype)])
def three(x): return np.stack([x] * 3, -1)
def dotted(value): return np.where(np.arange(64).reshape(8, 8) == 9, value, FLOAT).astype(np.float32)


# what is written, and the grey values that it means
READ = {
    **{f"tif {x.dtype}": (tiff(x), x) for x in (
        EIGHT, X, X.astype(np.uint32) * 1000, X.astype(np.int16) - 300, X.astype(np.int32) * 1000,
        FLOAT - np.float32(.001), FLOAT.astype(np.float64))},
    "tif float16": (tiff(FLOAT.astype(np.float16)), FLOAT.astype(np.float16).astype(np.float32)),
    "tif int8": (tiff((EIGHT >> 1).astype(np.int8) - 60), (EIGHT >> 1).astype(np.int8) - 60),
    "tif other end": (tiff(X, byteorder=">"), X), "bigtiff": (tiff(X, bigtiff=True), X),
    "tif deflate": (tiff(X, compression="deflate", predictor=True), X),
    "tif tiles": (tiff(X, tile=(16, 16), compression="deflate"), X),
    "tif LZW": (picture(X, format="TIFF", compression="tiff_lzw"), X),
    "tif LZW 8": (picture(EIGHT, format="TIFF", compression="tiff_lzw"), EIGHT),
    "tif LZW float": (picture(FLOAT, format="TIFF", compression="tiff_lzw"), FLOAT),
    "tif LZW white": (white(picture(X, format="TIFF", compression="tiff_lzw")), 65535 - X),
    "tif LZW white 8": (white(picture(EIGHT, format="TIFF", compression="tiff_lzw")), 255 - EIGHT),
    "tif 12 packed": (packed_tiff(12), X), "tif 1 bit": (packed_tiff(1), (X >> 11).astype(np.uint8) * np.uint8(255)),
    "tif 1 bit white": (packed_tiff(1, 1), (1 - (X >> 11)).astype(np.uint8) * np.uint8(255)),
    "tif MaxSampleValue": (tiff(X, extratags=[(281, 3, 1, 4095, True)]), X),
    "tif SignificantBits": (tiff(X, ome=True, metadata=dict(axes="YX", SignificantBits=12)), X),
    "tif white 8": (tiff(EIGHT, photometric="miniswhite"), 255 - EIGHT),
    "tif white 16": (tiff(X, photometric="miniswhite"), 65535 - X),
    "tif white deflate": (tiff(X, photometric="miniswhite", compression="deflate"), 65535 - X),
    "tif RGB": (tiff(three(X), photometric="rgb"), X), "tif RGB planes": (
        tiff(three(EIGHT).transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate"), EIGHT),
    "tif alpha": (tiff(with_alpha(three(X), 65535), photometric="rgb", extrasamples=["unassalpha"]), X),
    "tif palette": (tiff(EIGHT, photometric="palette", colormap=palette(True)), 255 - EIGHT),
    "png": (picture(EIGHT), EIGHT), "png 16": (picture(X), X), "bmp": (picture(EIGHT, format="BMP"), EIGHT),
    "png RGB": (picture(three(EIGHT)), EIGHT), "png alpha": (picture(with_alpha(EIGHT, 255)), EIGHT),
    "png RGBA": (picture(with_alpha(three(EIGHT), 255)), EIGHT), "png palette": (picture(EIGHT, "P"), EIGHT),
    "png 1": (png(1, X >> 11), (X >> 11).astype(np.uint8) * np.uint8(255)),
    "png 4": (png(4, X >> 8), (X >> 8).astype(np.uint8) * np.uint8(17)),
    "png sBIT": (png(16, X << 4 | X >> 8, [(b"sBIT", b"\x0c")]), X),
    "jp2 8": (picture(EIGHT, format="JPEG2000"), EIGHT), "jp2 16": (picture(X, format="JPEG2000"), X),
    "jp2 12": (text(JP2), X), "jpeg": (picture(FLAT, format="JPEG"), FLAT),
}
CODECS = {  # and with imagecodecs
    "jxl 12": (text(JXL), X), "jpeg 12": (text(JPEG12), X), "tif 12 packed white": (packed_tiff(12, 1), 4095 - X),
    "png RGB 16": (text(RGB16), X),
}
REFUSED = {
    "tif RGB": (tiff(RGB, photometric="rgb"), "a colour image, expected one grey image per channel; channels that"),
    "png RGB": (picture(RGB), "--channels NAME=red,NAME=green,NAME=blue"),
    "tif palette": (tiff(EIGHT, photometric="palette", colormap=palette(False)), "a colour image"),
    "png palette": (picture(RGB, "P"), "a colour image"),
    "tif alpha": (tiff(with_alpha(three(X), 9), photometric="rgb", extrasamples=["unassalpha"]),
                  "64 of 64 pixels are transparent"),
    "png alpha": (picture(with_alpha(EIGHT, 9)), "64 of 64 pixels are transparent"),
    "NaN": (tiff(dotted(np.nan)), "nan in row 1, column 1, and 0 more pixels of 64 are no finite number"),
    "infinite": (tiff(dotted(-np.inf)), "-inf in row 1, column 1"),
    "white float": (tiff(FLOAT, photometric="miniswhite"), "float32 pixels whose white is zero"),
    "white signed": (tiff(X.astype(np.int16), photometric="miniswhite"), "int16 pixels whose white is zero"),
    "complex": (tiff(FLOAT.astype(np.complex64)), "pixels of type complex64"),
    "samples": (tiff(np.stack([X, X]), photometric="minisblack", planarconfig="separate"), "2 samples per pixel"),
    "CMYK": (picture(RGB, "CMYK", format="JPEG"), "mode CMYK, expected grey or RGB"),
    "pages": (tiff(np.stack([X, X, X]), photometric="minisblack"), "holds 3 images, expected one file per channel"),
    "ImageJ": (tiff(np.stack([X, X, X]), imagej=True), "holds 3 images, expected one file per channel"),
    "text": (content(b"no image"), "is not an image"),
}


def write_screen(folder, kinds):
    "A well with a file per kind, whatever its first bytes are"
    folder.mkdir()
    for kind, (write, _) in kinds.items(): write(folder / f"A01_{kind}.img.tif")
    (folder / "wells.csv").write_text("well,treatment\nA01,one\n")


def ways(screen, out):
    "The pixels of its site as they are shown, packed and trained on, or what is said"
    found, seen = {}, []
    def show():
        screen.show_well()
        plt.close("all")
        return np.asarray(seen[0])
    def train(): return screen_dataloaders(screen, transforms=[], bs=1, num_workers=0).train.one_batch()[0][0].numpy()
    how = dict(show=show, pack=lambda: pack_screen(screen, out, progress=False).read(0), train=train)
    with pytest.MonkeyPatch.context() as patch:
        real = shown_by.show_channels
        patch.setattr(shown_by, "show_channels", lambda x, *a, **k: seen.append(x) or real(x, *a, **k))
        for name, function in how.items():
            try: found[name] = function()
            except Exception as e: found[name] = f"{type(e).__name__}: {e}"
    return found


def scaled(want, limits):
    low, high = limits
    return np.round((np.clip(want.astype(np.float64), low, high) - low) * (255 / (high - low)))


def test_every_kind_of_file_is_read_alike(tmp_path):
    kinds = READ | (CODECS if imagecodecs else {})
    write_screen(tmp_path / "own", kinds)
    for kind, (_, want) in kinds.items():
        got = read_grey(tmp_path / "own" / f"A01_{kind}.img.tif")
        assert got.dtype == want.dtype and (got == want).all(), kind
        assert plane_size(Plane(str(tmp_path / "own" / f"A01_{kind}.img.tif"))) == want.shape, kind
    said = []
    screen = describe_screen(tmp_path / "own", files="{well}_{channel}.img.tif", say=said.append)
    found = ways(screen, tmp_path / "store")
    assert read_screen(tmp_path / "store").channels == screen.channels
    for c, *pixels in zip(screen.channels, *found.values(), strict=True):
        want, limits = kinds[as_channel(c).name][1], grey_limits(c)
        assert (limits is None) == (want.dtype == np.uint8), c
        if limits is None: expected = want
        else:
            assert limits[0] <= np.percentile(want[::2, ::2], .1) and limits[1] >= np.percentile(want[::2, ::2], 99.9)
            expected = scaled(want, limits)
            assert any(s.startswith(f"Channel {c}: of the pixels looked at") for s in said)
        for x in pixels: np.testing.assert_allclose(x.astype(float), expected, atol=1, err_msg=c)
        assert all((x == pixels[0]).all() for x in pixels)


@each("kind", REFUSED)
def test_what_is_refused_is_refused_alike(tmp_path, kind):
    write, said = REFUSED[kind]
    write_screen(tmp_path / "own", {"a": (tiff(EIGHT), None)})
    screen = describe_screen(tmp_path / "own", files="{well}_{channel}.img.tif", say=lambda *a: None)
    write(next((tmp_path / "own").glob("*.img.tif")))
    found = ways(screen, tmp_path / "store")
    try: describe_screen(tmp_path / "own", files="{well}_{channel}.img.tif", say=lambda *a: None)
    except ValueError as e: found["describe"] = f"ValueError: {e}"
    assert len(set(found.values())) == 1, found
    assert said in found["describe"] and "A01_a.img.tif" in found["describe"]


@each("kind, what", [("jxl 12", "a JPEG XL image"), ("jpeg 12", "a JPEG of 12 bits"),
                     ("tif 12 packed white", "a TIFF of 12 bits"), ("png RGB 16", "a PNG with 16 bits per colour")])
def test_a_package_that_is_missing_is_named(tmp_path, kind, what):
    if imagecodecs: pytest.skip("imagecodecs is there")
    CODECS[kind][0](tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"a.tif: {what}.*imagecodecs reads: pip install 'rcic_fastai\[codecs\]'"):
        read_grey(tmp_path / "a.tif")


@pytest.mark.skipif(imagecodecs is None, reason="needs imagecodecs")
@each("compression", ["lerc", "jpeg2000", "jpegxl", "zstd", "lzw", "png"])
def test_compressions_of_imagecodecs(tmp_path, compression):
    imwrite(tmp_path / "a.tif", X, compression=compression)
    np.testing.assert_array_equal(read_grey(tmp_path / "a.tif"), X)


def test_floats_of_cellprofiler_keep_their_grey_levels(tmp_path):
    "0 to .02: at least 200 of 256, and limits that a person can read"
    x = np.random.default_rng(0).random((1, 64, 64), np.float32)[0] * np.float32(.02)
    imwrite(tmp_path / "A01_a.tif", x)
    (tmp_path / "wells.csv").write_text("well,treatment\nA01,one\n")
    screen = describe_screen(tmp_path, say=lambda *a: None)
    got = screen.sites().files.iloc[0].read(screen.channels)
    assert len(np.unique(got)) > 200 and len(screen.channels[0]) <= 20
    assert read_screen(tmp_path).channels == screen.channels


def test_limits_by_hand_stay(tmp_path):
    imwrite(tmp_path / "A01_a.tif", FLOAT - np.float32(.005))
    imwrite(tmp_path / "A01_b.tif", EIGHT)
    (tmp_path / "wells.csv").write_text("well,treatment\nA01,one\n")
    said = []
    screen = describe_screen(tmp_path, channels=["b=B[0-100.5]", "a=A[-0.001-.01]"], say=said.append)
    assert screen.channels == ("b=B[0-100.5]", "a=A[-0.001-0.01]")
    below, above = ((FLOAT[::2, ::2] < .004).mean(), (FLOAT[::2, ::2] > .015).mean())
    assert (f"Channel a=A[-0.001-0.01]: of the pixels looked at, {below:.2%} are darker than these grey limits and "
            f"{above:.2%} brighter") in said
    assert not any("order of their names" in s for s in said)
    np.testing.assert_allclose(screen.sites().files.iloc[0].read(screen.channels)[1],
                               scaled(FLOAT - .005, (-.001, .01)), atol=1)


def test_colours_are_channels_of_their_names(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "A01_all.png")
    (tmp_path / "wells.csv").write_text("well,treatment\nA01,one\n")
    screen = describe_screen(tmp_path, channels=["all=red", "all=green", "all=blue"], files="{well}_{channel}.png",
                             say=lambda *a: None)
    np.testing.assert_array_equal(screen.sites().files.iloc[0].read(screen.channels), RGB.transpose(2, 0, 1))


@each("x", [X.astype(np.int16) - 2000, FLOAT - np.float32(.01), X.astype(np.uint32) * 10**6,
            FLOAT.astype(np.float64) * 1e30])
def test_limits_enclose_what_they_were_found_from(tmp_path, x):
    imwrite(tmp_path / "a.tif", x)
    low, high = find_grey_limits([tmp_path / "a.tif"], (0, 100), step=1)
    assert low <= x.min() and x.max() <= high and high - low <= 1.003 * (float(x.max()) - float(x.min())) + 2
    assert as_channel(f"a[{low}-{high}]").limits == (low, high)


@each("cut", [.3, .6, .95])
@each("how", [{}, dict(compression="deflate"), dict(rowsperstrip=2)])
def test_a_tiff_that_was_cut_off_is_named(tmp_path, cut, how):
    x = np.random.default_rng(0).integers(0, 4096, (40, 40), np.uint16)
    imwrite(tmp_path / "a.tif", x, **how)
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[:int(cut * len(data))])
    with pytest.raises(ValueError, match="a.tif"): read_grey(tmp_path / "a.tif")


def test_planes_of_a_stack_with_one_header(tmp_path):
    imwrite(tmp_path / "a.tif", np.stack([X, X + 1, X + 2]), imagej=True)
    assert (read_grey(tmp_path / "a.tif", (2,)) == X + 2).all() and (read_grey(tmp_path / "a.tif", (0,)) == X).all()
    with pytest.raises(ValueError, match=r"a.tif \[3\] does not exist, the file holds 3 images"):
        read_grey(tmp_path / "a.tif", (3,))
