"""One headless Chromium for all browser tests, and the pages that it opens."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from genie.cli import main

from .stored import cell, matrix, write

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
#: of the test that needs the most; the newest run of these is what a page shows
COMMITS = 50


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: install the `test` extra")
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver_path = shutil.which("chromedriver")
    if binary is None or driver_path is None:
        pytest.skip("needs a Chromium and its chromedriver: on Debian, apt install chromium chromium-driver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    driver.set_page_load_timeout(30)
    yield driver
    driver.quit()


def _page(folder: Path, *runs) -> Path:
    paths = [
        str(write(folder / f"{hour}.json", cells, hour=hour, commit=f"{hour:040x}"[::-1]))
        for hour, cells in enumerate(runs)
    ]
    output = folder / "report.html"
    assert main(["report", *paths, "-o", str(output)]) == 0
    return output


@pytest.fixture(scope="session")
def small_page(tmp_path_factory) -> Path:
    """Two runs of three cells, one of them with a feature off."""
    cells = [
        cell("llm_decode", "local_pytorch"),
        cell("llm_decode", "genie_full", 0.3, ratio=3.0),
        cell("llm_decode", "genie_full", 0.9, ratio=9.0, ablated=("residency",)),
    ]
    return _page(tmp_path_factory.mktemp("small"), cells, cells)


@pytest.fixture(scope="session")
def full_page(tmp_path_factory) -> Path:
    """The whole matrix, twice, and once more on other sizes: a warning and two series."""
    other = [cell("llm_decode", "local_pytorch", profile="cpu")]
    return _page(tmp_path_factory.mktemp("full"), matrix(seed=1), other, matrix(seed=2))


@pytest.fixture(scope="session")
def long_page(tmp_path_factory) -> Path:
    """50 commits of 35 cells."""
    return _page(tmp_path_factory.mktemp("long"), *(matrix(seed=seed) for seed in range(COMMITS)))
