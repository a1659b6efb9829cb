"Normalising by controls against closed forms, and sphering as pycytominer does it against its formula."
import numpy as np
import pytest
from cases import each

from rcic_fastai.profile.normalise import PycytominerSphering, normalise_by


@each("method, centre, spread", [
    ("standardise", lambda c: c.mean(0), lambda c: c.std(0)),
    ("mad_robustise", lambda c: np.median(c, 0),
     lambda c: np.median(np.abs(c - np.median(c, 0)), 0) / 0.6744897501960817),
])
def test_every_group_by_its_own_controls(method, centre, spread):
    rng = np.random.default_rng(0)
    x, groups, controls = rng.normal(size=(90, 5)) * [1, 2, 3, 4, 5], np.tile([7, 3, 5], 30), rng.random(90) < 0.4
    y = normalise_by(x, groups, controls, method)
    for g in (3, 5, 7):
        c = x[(groups == g) & controls]
        np.testing.assert_allclose(y[groups == g], (x[groups == g] - centre(c)) / spread(c), rtol=1e-9)
    assert normalise_by(x.astype(np.float32), groups, controls, method).dtype == np.float32
    x[:, 2] = 7  # without spread: centred, and finite
    x[0, 2] = 8
    controls[0] = False
    assert normalise_by(x, groups, controls, method)[0, 2] == 1


@each("n", [60, 6, 9])
@each("kind", ["ZCA", "ZCA-cor", "PCA", "PCA-cor"])
def test_sphering_of_pycytominer_is_its_formula(kind, n):
    "Here by the covariance of what comes out: white within the span of the controls, the smallest spread beyond it"
    rng = np.random.default_rng(n)
    controls, x = rng.normal(size=(n, 8)) @ rng.normal(size=(8, 8)) + 3, rng.normal(size=(5, 8))
    s = PycytominerSphering(kind, epsilon=0).fit(controls)
    y = s.transform(controls)
    values = np.linalg.eigvalsh(np.cov(y.T))
    np.testing.assert_allclose(values[-min(n - 1, 8):], 1, rtol=1e-6)
    np.testing.assert_allclose(values[:-min(n - 1, 8)], 0, atol=1e-9)
    d = (controls - controls.mean(0)) / (controls.std(0) if kind.endswith("cor") else 1)
    least = np.linalg.svd(d, compute_uv=False)[min(n - 1, 8) - 1]
    gains = np.linalg.svd(s.weights_, compute_uv=False)
    assert gains.max() == pytest.approx(np.sqrt(n - 1) / least)
    if kind.startswith("ZCA"): np.testing.assert_allclose(s.weights_, s.weights_.T, atol=1e-9)
    assert np.isfinite(s.transform(x)).all()
