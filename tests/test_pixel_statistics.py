"Numbers about images: means, black pixels, correlations, sizes; of arrays and of files."

import numpy as np
import pandas as pd
import pytest
from cases import each

from rcic_fastai.labels.pixel_statistics import image_statistics, site_statistics


@pytest.mark.parametrize("dtype,full", [(np.uint8, 255), (np.uint16, 65535)])
def test_statistics_are_those_of_numpy(dtype, full):
    rng = np.random.default_rng(0)
    x = rng.integers(0, full + 1, (2, 3, 20, 30)).astype(dtype)
    x[:, :, :5] = 0
    t = image_statistics(x, list("rgb"), size=True)
    for i in range(2):
        assert t["mean g"][i] == pytest.approx(x[i, 1].mean() / full)
        assert t["nonzero mean g"][i] == pytest.approx(x[i, 1][x[i, 1] > 0].mean() / full)
        assert t["nonzero share r"][i] == pytest.approx((x[i, 0] > 0).mean())
        assert t["correlation r-b"][i] == pytest.approx(np.corrcoef(x[i, 0].ravel(), x[i, 2].ravel())[0, 1])
        assert t["brightness"][i] == pytest.approx(x[i].mean() / full)
    assert (t.height == 20).all() and (t.width == 30).all() and t.shape == (2, 3 * 3 + 3 + 1 + 2)


@pytest.mark.parametrize("value", [0, 7, 255])
def test_statistics_of_constant_channels_are_finite(value):
    x = np.full((1, 2, 9, 9), value, np.uint8)
    x[0, 1] = np.arange(81).reshape(9, 9)
    t = image_statistics(x)
    assert np.isfinite(t.to_numpy()).all() and t["correlation 0-1"][0] == 0
    assert t["nonzero mean 0"][0] == pytest.approx(value / 255)


def test_statistics_of_files_keep_the_index_of_the_table(tmp_path):
    from PIL import Image

    rng, files = np.random.default_rng(0), {}
    for i in (5, 3):
        pixels = rng.integers(0, 256, (8 + i, 9)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}_w1.png")
        files[i] = (str(tmp_path / f"{i}_w{{channel}}.png"), pixels.mean() / 255)
    t = site_statistics(pd.Series({i: f for i, (f, _) in files.items()}), (1,), ["green"], size=True, workers=3,
                        progress=False)
    assert t.index.tolist() == [5, 3] and t.height.tolist() == [13, 11]
    assert t["mean green"].tolist() == pytest.approx([m for _, m in files.values()])
    assert len(site_statistics([], progress=False)) == 0


@each(
    "x", [np.zeros((2, 2), np.uint8), np.zeros((1, 2, 4, 4)), np.zeros((1, 2, 0, 4), np.uint8),
          np.zeros((0, 2, 4, 4), np.int16)]
)
def test_what_is_no_image_is_refused(x):
    with pytest.raises(ValueError, match="expected uint8 or uint16"):
        image_statistics(x)


def test_names_must_fit_the_channels():
    with pytest.raises(ValueError, match="3 names .* 2 channels"):
        image_statistics(np.zeros((1, 2, 4, 4), np.uint8), "rgb")
