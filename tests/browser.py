"""A real Chromium, headless, for the tests of what runs in a browser.

    async def test_…(browser: Browser) -> None:
        page = await browser.new_page()

The one rule: where there is no Chromium a test skips and says how to get one, except where it must be there:
in CI, or with LLORCH_REQUIRE_BROWSER=1, it fails.
"""

import os
import shutil
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.async_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"]
MISSING = f"none of {', '.join(NAMES)} is installed: run scripts/system-packages as root"


def required(environ: dict[str, str]) -> bool:
    """Whether this environment says that a browser has to be there."""
    return environ.get("CI") == "true" or environ.get("LLORCH_REQUIRE_BROWSER") == "1"


def executable() -> str:
    """The path of an installed Chromium; skips the test without one, or fails it where one is required."""
    paths = (shutil.which(name) for name in NAMES)
    if (found := next(filter(None, paths), None)) is not None:
        return found
    if required(dict(os.environ)):
        pytest.fail(MISSING)
    pytest.skip(MISSING)


@pytest.fixture
async def browser() -> AsyncIterator["Browser"]:
    """Chromium of its own for this test, closed after it."""
    path = executable()
    from playwright.async_api import async_playwright  # slow to import, and few tests need it

    async with async_playwright() as playwright:
        chromium = await playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        await chromium.close()
