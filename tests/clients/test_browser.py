"""The helper that finds a browser for the tests."""

import shutil

import pytest

from tests import browser


def test_without_a_browser_a_test_skips(monkeypatch: pytest.MonkeyPatch) -> None:
    """And says how to get one."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for name in ("CI", "LLORCH_REQUIRE_BROWSER"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(pytest.skip.Exception, match="scripts/system-packages"):
        browser.executable()


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("LLORCH_REQUIRE_BROWSER", "1")])
def test_where_it_is_required_a_test_fails(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """Or nobody would notice that nothing was tested."""
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setenv(name, value)
    with pytest.raises(pytest.fail.Exception, match="scripts/system-packages"):
        browser.executable()


def test_the_first_that_is_installed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under whatever name the distribution gives it."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if "google" in name else None)
    assert browser.executable() == "/bin/google-chrome"
