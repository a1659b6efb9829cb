"Screens and runs that several test files share."

import os
import runpy
import shutil
from pathlib import Path

import pytest
from compress_once import compress_once
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(__file__).parents[1].parent / "shared"


# Tests of a file run in one process (`--dist loadfile`), so that what they share is made once. The longest files come
# first, so that no worker is left with one of them at the end.
LONGEST = ("test_docs", "test_matrix", "test_readme", "test_cli", "test_speed_benchmarks", "test_writing",
           "test_promises", "test_report", "test_model", "test_package", "test_store", "test_formats", "test_damaged",
           "test_train", "test_quality", "test_hpa", "test_road", "test_checkpoint", "test_default", "test_run",
           "test_kaggle", "test_locations", "test_contracts", "test_data", "test_strangers", "test_simulate",
           "test_mix")

# Nothing in these files computes with a network: with bfloat16 forced on (`make test-bf16`) they would only repeat
# what `make test` has seen.
NO_NETWORK = ("test_cases", "test_docs", "test_download", "test_duplicates", "test_fastai_names", "test_folds",
              "test_formats", "test_optics", "test_package", "test_pixel_statistics", "test_profile",
              "test_profile_normalise", "test_screen", "test_sources", "test_tables", "test_types", "test_words")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    "The longest files at the front; a browser and processes that are killed are slow"
    if os.environ.get("RCIC_BF16") == "on":
        again = [item for item in items if item.path.stem in NO_NETWORK]
        config.hook.pytest_deselected(items=again)
        items[:] = [item for item in items if item.path.stem not in NO_NETWORK]
    for item in items:
        if {"chromium", "pages"} & set(item.fixturenames) or item.name.startswith("test_killed"):
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """`once(name, make)`: a copy of the folder that `make(folder)` fills once for all workers of a test session.

    The copy is the worker's own, for its tests may write into it, and lies to other copies as the originals to each
    other: a run finds its screen.
    """
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "once"

    def copy_of(name, make):
        folder = shared / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (done := Path(f"{folder}.done")).exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                done.touch()
        return Path(shutil.copytree(folder, base / name))

    return copy_of


@pytest.fixture(scope="session")
def compressed(tmp_path_factory):
    "Folder of what was compressed already"
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compressed"


@pytest.fixture(scope="session", autouse=True)
def kernels_are_compressed_once(compressed):
    undo = compress_once(compressed)
    yield
    undo()


@pytest.fixture(scope="session")
def real_rcic():
    "Folder with the real tables and 160 real images."
    folder = SHARED / "rcic"
    if not folder.exists():
        pytest.skip("the real RCIC sample is not beside this checkout (../shared/rcic)")
    return folder


@pytest.fixture(scope="session")
def small_screen(once):
    "Folder of a simulated screen: one cell type, 3 training and 1 test experiment, 8 treatments, 48 pixels."
    from rcic_fastai.screen.simulate import simulate_screen

    settings = dict(n_sirnas=8, n_train=3, n_test=1, cell_types=("HUVEC",), image_size=48)
    return once("small_data/screen", lambda folder: simulate_screen(folder, **settings, progress=False))


@pytest.fixture(scope="session")
def small_run(small_screen, once):
    "Folder of a finished run on `small_screen` with predictions of its test split."
    from rcic_fastai.run.predict import predict_run
    from rcic_fastai.recipe.published import get_recipe, laptop_recipe
    from rcic_fastai.run.train import train_run
    from rcic_fastai.screen.read import read_screen

    def make(run):
        screen = read_screen(run.parents[1] / "small_data" / "screen")
        recipe = laptop_recipe(get_recipe("laptop"), 3, virtual_batch=16)
        train_run(screen, recipe, run, valid="experiment=HUVEC-03", say=lambda *a: None)
        predict_run(run, screen, "test", progress=False)

    return once("small_runs/small", make)


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
