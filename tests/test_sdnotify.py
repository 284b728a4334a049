"""What systemd hears, over real datagram sockets."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from llorch.sdnotify import notify, watchdog_interval_s


@pytest.fixture(params=["path", "abstract"])
def systemd(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """systemd's end, as a file or in the abstract namespace."""
    path = str(tmp_path / "notify") if request.param == "path" else f"@llorch-test-{os.getpid()}"
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + path[1:] if path.startswith("@") else path)
        sock.setblocking(False)
        yield sock


def test_each_state_is_one_datagram(systemd: socket.socket) -> None:
    """READY with its status, then the watchdog's beat, each by itself."""
    notify("READY=1\nSTATUS=höre zu")
    notify("WATCHDOG=1")
    assert [systemd.recv(100), systemd.recv(100)] == ["READY=1\nSTATUS=höre zu".encode(), b"WATCHDOG=1"]
    with pytest.raises(BlockingIOError):
        systemd.recv(100)


@pytest.mark.parametrize("address", [None, ""])
def test_outside_of_systemd_nothing_happens(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable, or an empty one."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")


@pytest.mark.parametrize("there", [False, True])
def test_a_supervisor_that_is_gone_hurts_nobody(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No socket there, or nobody behind it: the service goes on."""
    path = tmp_path / "notify"
    if there:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(path))
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    notify("READY=1")


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("20000000", None, 10.0),
        ("20000000", "mine", 10.0),
        ("500000", None, 0.25),
        ("20000000", "1", None),  # meant for another process
        ("0", None, None),
        ("", None, None),
        ("-1", None, None),
        ("soon", None, None),
        (None, None, None),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_time(
    usec: str | None, pid: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of WATCHDOG_USEC, if it is meant for this process."""
    values = {"WATCHDOG_USEC": usec, "WATCHDOG_PID": str(os.getpid()) if pid == "mine" else pid}
    for name, value in values.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert watchdog_interval_s() == seconds
