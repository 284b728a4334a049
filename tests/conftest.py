"""Fixtures that more than one module needs: the fake engine, and the real one."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.browser import browser  # noqa: F401  # a fixture of every module's
from tests.fakes import FakeLlamaServer

ROOT = Path(__file__).parent.parent
REAL_SLOTS = 4
REAL_CTX = 2048


def pytest_configure() -> None:
    """A runner in the background ignores Ctrl-C, and every program that a test starts would inherit that."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    for number, handler in handlers.items():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--sim-seeds N`: how many seeds the simulation plays; `--fuzz-n N`: how many inputs the fuzzer."""
    parser.addoption("--sim-seeds", type=int, default=2000, help="seeds for tests/sim (default 2000)")
    parser.addoption("--fuzz-n", type=int, default=2000, help="inputs for test_fuzz (default 2000)")


@pytest.fixture
async def fake_engine() -> AsyncIterator[FakeLlamaServer]:
    """A fake llama-server with two slots of 4096 tokens, listening."""
    async with FakeLlamaServer() as engine:
        yield engine


@contextmanager
def embedded_engine(*, port: int = 0, slots: int = REAL_SLOTS) -> Iterator[str]:
    """The URL of a real llama.cpp server with a 135M model: a process, which is killed at the end."""
    command = [sys.executable, "scripts/embedded_engine.py", "--port", str(port)]
    command += ["--slots", str(slots), "--ctx", str(REAL_CTX)]
    env = os.environ | {"OMP_WAIT_POLICY": "passive"}  # or its threads spin, and crawl once a core is shared
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()  # once it has loaded the model
            assert " listens on " in said, "the real engine did not start"
            yield said.split(" listens on ")[1].strip()
        finally:
            process.kill()


@pytest.fixture(scope="session")
def real_engine() -> Iterator[str]:
    """The URL of a real engine for all tests that need one."""
    with embedded_engine() as url:
        yield url
