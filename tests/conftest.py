"Screens and runs that several test files share."

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).parents[1].parent / "shared"


@pytest.fixture(scope="session")
def real_rcic():
    "Folder with the real tables and 160 real images."
    folder = SHARED / "rcic"
    if not folder.exists():
        pytest.skip("the real RCIC sample is not beside this checkout (../shared/rcic)")
    return folder


@pytest.fixture(scope="session")
def small_screen(tmp_path_factory):
    "Folder of a simulated screen: one cell type, 3 training and 1 test experiment, 8 treatments, 48 pixels."
    from rcic_fastai.simulate import simulate_screen

    return simulate_screen(tmp_path_factory.mktemp("data") / "screen", n_sirnas=8, n_train=3, n_test=1, cell_types=("HUVEC",),
                           image_size=48, progress=False)  # fmt: skip


@pytest.fixture(scope="session")
def small_run(small_screen, tmp_path_factory):
    "Folder of a finished run on `small_screen` with predictions of its test split."
    from rcic_fastai.predict import predict_run
    from rcic_fastai.recipe import get_recipe, laptop_recipe
    from rcic_fastai.run import train_run
    from rcic_fastai.screen import read_screen

    run, screen = tmp_path_factory.mktemp("runs") / "small", read_screen(small_screen)
    recipe = laptop_recipe(get_recipe("laptop"), 3, virtual_batch=16)
    train_run(screen, recipe, run, valid="experiment=HUVEC-03", say=lambda *a: None)
    predict_run(run, screen, "test", progress=False)
    return run


@pytest.fixture
def chromium():
    "A headless Chromium of Playwright, without network: `chromium.new_context(offline=True, viewport=...)`"
    from playwright.sync_api import sync_playwright

    if (path := runpy.run_path(str(ROOT / "tools" / "browser.py"))["find_chromium"]()) is None:
        pytest.skip("there is no Chromium on this machine: `make browser` gets one")
    with sync_playwright() as p:  # not for the whole session: its event loop would be in the way of others
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()
