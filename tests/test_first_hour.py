"""The first hour: every message that a newcomer can meet says what is wrong, where, and how to mend it.

One row a message, read aloud once and kept; `words` are the thing, the place and the cure.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from llorch.cli import main
from llorch.server import EXIT_CONFIG, EXIT_UNAVAILABLE
from tests.fakes import FakeLlamaServer, answers, error
from tests.live import TOKEN, Live

ROOT = Path(__file__).parent.parent
WRONG_TOKEN = "another-token-0123456789"


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and an environment that says nothing to llorch."""
    for name in [name for name in os.environ if name.startswith("LLORCH_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lacks(said: str, words: tuple[str, ...]) -> list[str]:
    """The words that `said` does not have."""
    return [word for word in words if word not in said]


# -- starting it -----------------------------------------------------------------------------------

FILES = [
    ("[queue]\ncapcity = 3", ("config.toml: queue.capcity", "unknown key", "did you mean queue.capacity?")),
    ("[adaptor]\nslots = 2", ("config.toml: adaptor", "unknown key", "did you mean adapter?")),
    ("capacity = 3", ("config.toml: capacity", "unknown key", "did you mean queue.capacity?")),
    ("bind_addr = 127.0.0.1:8080", ("config.toml: is not valid TOML", "line 1", "a text needs quotes")),
    ("[queue\ncapacity = 3", ("config.toml: is not valid TOML", "line 1", "a table [brackets]")),
    ('profile = "work"', ("config.toml: profile", "'work'", 'expected "home" or "mvp"')),
    ('[adapter]\nslots = "all"', ("config.toml: adapter.slots", "'all'", '1 to 1024 or "auto"')),
    ('[queue]\ncapacity = "ten"', ("config.toml: queue.capacity", "'ten'", "expected int")),
    ("[timeouts]\nidle_s = 0", ("config.toml: timeouts.idle_s", "got 0", "expected float > 0")),
    (
        'bind_addr = "localhost"',
        ("bind_addr", "'localhost'", "expected IP:port, [v6]:port or localhost:port"),
    ),
    ('bind_addr = "0.0.0.0:8080"', ("bind_addr", "from other machines", "auth.token_file", "bind 127.0.0.1")),
    ('profile = "home"', ("auth.token", "always needs a token", "llorch init")),
    ('[auth]\ntoken = "short"', ("auth.token", "under 16 characters", "llorch init")),
    ('[auth]\ntoken_file = "t"', ("auth.token_file", "t can't be read", "No such file")),
    ('[adapter]\nendpoint = "localhost:8081"', ("adapter.endpoint", "'localhost:8081'", "http://host:port")),
    ('[adapter]\nendpoint = "ftp://h:1"', ("adapter.endpoint", "'ftp://h:1'", "http://host:port")),
    ('[adapter]\nendpoint = "http://h:1/v1"', ("adapter.endpoint", "nothing more", "'http://h:1/v1'")),
    (
        '[adapter]\nendpoint = "http://localhost:8080"',
        ("adapter.endpoint", "llorch's own address", "--port 8081"),
    ),
]


@pytest.mark.parametrize(("text", "words"), FILES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_slip_in_the_configuration(
    text: str, words: tuple[str, ...], workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with file or key, what stands there, and what should; exit 78."""
    path = workplace / "config.toml"
    path.write_text(text)
    path.chmod(0o600)
    assert main(["serve"]) == EXIT_CONFIG
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("llorch: ")
    assert lacks(line, words) == []


def test_a_token_file_that_all_can_read(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file, its mode, and the very command that mends it."""
    (workplace / "t").write_text(TOKEN)
    (workplace / "t").chmod(0o644)
    (workplace / "config.toml").write_text('[auth]\ntoken_file = "t"')
    assert main(["check-config"]) == EXIT_CONFIG
    assert (
        lacks(capsys.readouterr().err, ("auth.token_file", "others can read t", "0644", "chmod 600 t")) == []
    )


def test_a_config_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    """The command that writes one."""
    assert main(["serve", "--config", "nothere.toml"]) == EXIT_CONFIG
    words = ("nothere.toml", "no such file", "llorch init nothere.toml")
    assert lacks(capsys.readouterr().err, words) == []


def test_a_slip_in_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable that was meant."""
    monkeypatch.setenv("LLORCH_QEUE_CAPACITY", "10")
    main(["check-config"])
    words = ("LLORCH_QEUE_CAPACITY", "no such key", "did you mean LLORCH_QUEUE_CAPACITY?")
    assert lacks(capsys.readouterr().err, words) == []


def test_no_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing, how to install and check it, and the way around."""

    def no_driver() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_driver)
    assert main(["serve"]) == EXIT_CONFIG
    words = ("no NVIDIA driver", "install the driver", "nvidia-smi", "LLORCH_GPU_REQUIRED=false")
    assert lacks(capsys.readouterr().err, words) == []


@contextlib.contextmanager
def taken(port: int) -> Iterator[int]:
    """Somebody listens on a port of 127.0.0.1, this one if it is free."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen()
        yield sock.getsockname()[1]


def test_the_port_is_taken(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which, how to see by whom, and the key; exit 69."""
    monkeypatch.setenv("LLORCH_GPU_REQUIRED", "false")
    with taken(0) as port:
        assert main(["serve", "--bind-addr", f"127.0.0.1:{port}"]) == EXIT_UNAVAILABLE
    said = capsys.readouterr().err
    words = (f"127.0.0.1:{port} is taken", "another bind_addr", f"ss -ltnp 'sport = :{port}'")
    assert lacks(said, words) == []
    assert "8081" not in said


def test_llama_server_has_the_port(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both take 8080 by default, and llama-server is usually there first."""
    monkeypatch.setenv("LLORCH_GPU_REQUIRED", "false")
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # it is taken already: as good
            stack.enter_context(taken(8080))
        assert main(["serve"]) == EXIT_UNAVAILABLE
    words = ("127.0.0.1:8080 is taken", "llama-server's own default", "--port 8081")
    assert lacks(capsys.readouterr().err, words) == []


def test_init_where_a_file_is(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It keeps it, and says how to insist."""
    (workplace / "config.toml").write_text("")
    assert main(["init"]) == EXIT_CONFIG
    words = ("config.toml is there already", "another path", "--force")
    assert lacks(capsys.readouterr().err, words) == []


# -- the engine ------------------------------------------------------------------------------------


def gone(engine: FakeLlamaServer) -> str:
    """Nothing listens there."""
    return "gone"


def loading(engine: FakeLlamaServer) -> str:
    """The model is loading."""
    engine.health = "loading"
    return ""


def wants_key(engine: FakeLlamaServer) -> str:
    """It was started with --api-key, and llorch knows of none."""
    engine.api_key = "its-key-0123456789"
    return ""


def without_slots(engine: FakeLlamaServer) -> str:
    """It was started with --no-slots."""
    refusal = error(501, "This server does not support slots endpoint.", "not_supported_error")
    engine.always(answers(501, refusal), path="/slots")
    return ""


def another_program(engine: FakeLlamaServer) -> str:
    """A web server of another kind, which knows no such path."""
    engine.always(answers(404, b"<html>404</html>"), path="/health")
    return ""


def a_page(engine: FakeLlamaServer) -> str:
    """A web server of another kind, which answers everything with a page."""
    for path in ("/health", "/props", "/slots"):
        engine.always(answers(200, b"<!DOCTYPE html>"), path=path)
    return ""


def silent(engine: FakeLlamaServer) -> str:
    """It takes the connection and says nothing."""
    engine.health = "hang"
    return ""


IS_IT = "is it llama-server that listens at its endpoint?"
ENGINES: list[tuple[Callable[[FakeLlamaServer], str], str, tuple[str, ...]]] = [
    (
        gone,
        "POOL_UNAVAILABLE",
        ("nothing listens on http://", "(adapter.endpoint)", "is llama-server running?"),
    ),
    (loading, "POOL_UNREADY", ("pool default", "the model is loading", "try again in a moment")),
    (wants_key, "POOL_UNAVAILABLE", ("misconfigured", "/props answered 401", "its api_key_file")),
    (without_slots, "POOL_UNAVAILABLE", ("misconfigured", "/slots", "start llama-server with --slots")),
    (another_program, "POOL_UNAVAILABLE", ("misconfigured", "/health answered 404", IS_IT)),
    (a_page, "POOL_UNAVAILABLE", ("/health answered with something else", IS_IT)),
    (silent, "POOL_UNAVAILABLE", ("the engine at http://", "did not answer in time", "is it stuck?")),
]


@pytest.mark.parametrize(
    ("state", "code", "words"), ENGINES, ids=lambda value: getattr(value, "__name__", "")
)
async def test_an_engine_that_is_not_ready(
    state: Callable[[FakeLlamaServer], str], code: str, words: tuple[str, ...], fake_engine: FakeLlamaServer
) -> None:
    """The answer to a task says what, where and the cure; the pool's health says the same."""
    if state(fake_engine) == "gone":
        await fake_engine.stop()
    async with Live(fake_engine, {"timeouts": {"control_s": 0.2}}) as live:
        answer = await live.post()
        health = await live.health()
    assert (answer.status, answer.body["code"], answer.body["retriable"]) == (503, code, True)
    assert answer.body["retry_after_ms"] > 0
    assert lacks(answer.body["message"], words) == []
    if code == "POOL_UNAVAILABLE":
        assert lacks(health["last_error"], words) == []


async def test_an_engine_whose_name_is_unknown(fake_engine: FakeLlamaServer) -> None:
    """The address, the key, and the resolver's own words, without those of the library around them."""
    settings = {"adapter": {"endpoint": "http://no-such-host.invalid:8081"}}
    async with Live(fake_engine, settings) as live:
        said = (await live.post()).body["message"]
    assert lacks(said, ("can't connect to http://no-such-host.invalid:8081", "(adapter.endpoint)")) == []
    assert "ssl:default" not in said


# -- the first tasks -------------------------------------------------------------------------------

TASK = {"prompt": "hello"}
REFUSALS: list[tuple[dict[str, Any], dict[str, str] | None, int, tuple[str, ...]]] = [
    (TASK, {}, 401, ("a Bearer token is needed", "Authorization: Bearer", "auth.token")),
    (TASK, {"Authorization": TOKEN}, 401, ("a Bearer token is needed", "Authorization: Bearer")),
    (TASK, {"Authorization": f"Bearer {WRONG_TOKEN}"}, 401, ("a different token", "auth.token")),
    (
        {"prompt": "word " * 5000},
        None,
        400,
        ("5000 prompt tokens", "4096 tokens of context", "shorten", "-c"),
    ),
    (TASK | {"max_tokens": 9999}, None, 400, ("$.max_tokens", "<= 4096", "limits.max_tokens")),
    (TASK | {"temperatur": 1}, None, 400, ("$.temperatur", "unknown field", "did you mean temperature?")),
    (TASK | {"temperature": 9}, None, 400, ("$.temperature", "expected", "<= 5")),
    (TASK | {"model": "gpt"}, None, 400, ("$.model", "leave it out", "one model")),
    (TASK | {"stream": True}, None, 400, ("$.stream", "leave it out", "stream_url")),
    (TASK | {"n_predict": 9}, None, 400, ("$.n_predict", "did you mean max_tokens?")),
    (TASK | {"seed": None}, None, 400, ("$.seed", "expected int", "got null")),
    (TASK | {"pool_id": "gpu"}, None, 404, ("no pool 'gpu'", "the pools are: default")),
    ({"max_tokens": 5}, None, 400, ("exactly one of prompt and messages",)),
]


@pytest.mark.parametrize(("task", "headers", "status", "words"), REFUSALS)
async def test_a_task_that_is_refused(
    task: dict[str, Any],
    headers: dict[str, str] | None,
    status: int,
    words: tuple[str, ...],
    fake_engine: FakeLlamaServer,
) -> None:
    """Message and hint together name the field or the limit, and what to do."""
    async with Live(fake_engine, {"auth": {"token": TOKEN}}) as live:
        answer = await live.post(task, headers=headers)
    said = f"{answer.body['message']} {answer.body.get('hint', '')}"
    assert answer.status == status
    assert lacks(said, words) == []
    assert WRONG_TOKEN not in said


async def test_a_full_queue(fake_engine: FakeLlamaServer) -> None:
    """How full, the key that says so, and when to try again, in the body and in the headers."""
    fake_engine.hold = True
    async with Live(fake_engine, {"queue": {"capacity": 1}}) as live:
        await live.submit_held()
        await live.submit()
        answer = await live.post()
    words = ("the queue is full: 1 of 1 tasks wait", "queue.capacity", "try again later")
    assert answer.status == 429
    assert lacks(answer.body["message"], words) == []
    assert answer.headers["X-Backoff-Ms"] == str(answer.body["retry_after_ms"])


async def test_a_name_that_is_not_this_server(fake_engine: FakeLlamaServer) -> None:
    """The name, and the key that takes it."""
    async with Live(fake_engine) as live:
        answer = await live.get("/health", headers={"Host": "workstation.lan"})
    said = f"{answer.body['message']} {answer.body['hint']}"
    assert lacks(said, ("'workstation.lan'", "http.allowed_hosts")) == []


async def test_a_path_of_another_api(fake_engine: FakeLlamaServer) -> None:
    """What it asked for, and where tasks go."""
    async with Live(fake_engine) as live:
        said = (await live.ask("POST", "/v1/completions", json=TASK)).body["message"]
    assert lacks(said, ("/v1/completions", "POST /v1/tasks")) == []


# -- the scripts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smoke", "determinism", "haiku"])
def test_a_script_under_an_old_python(name: str) -> None:
    """Which is needed, which it is, and the command that works; no traceback."""
    code = (
        "import runpy, sys; sys.version_info = (3, 9, 2); sys.path.insert(0, 'scripts'); "
        f"sys.argv = ['scripts/{name}']; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    words = ("Python 3.11 or newer", "scripts/setup", f".venv/bin/python scripts/{name}")
    assert done.returncode == 1
    assert lacks(done.stderr, words) == []
    assert "Traceback" not in done.stderr


def test_setup_under_an_old_python(tmp_path: Path) -> None:
    """It says which is too old, and how to name another; nothing is made."""
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" && exit 0\nexit 1\n')
    old.chmod(0o755)
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    shutil.copy(ROOT / "scripts/setup", scripts)
    env = os.environ | {"PYTHON": str(old)}
    done = subprocess.run([scripts / "setup"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 69
    assert lacks(done.stderr, ("Python 3.11 or newer", "Python 3.9.2", "Set PYTHON")) == []
    assert not (tmp_path / ".venv").exists()
