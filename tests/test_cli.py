"""The command line: what each command says and returns, which configuration counts, and never a traceback."""

import json
import os
import socket
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pynvml
import pytest

from llorch import __version__, cli
from llorch.cli import main
from llorch.config import defaults, env_name, load
from llorch.schema import Config
from llorch.server import EXIT_CONFIG, EXIT_UNAVAILABLE

TOKEN = "canary-token-0123456789"
API_KEY = "canary-api-key-0123456789"
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and an environment that says nothing to llorch."""
    for name in os.environ:
        if name.startswith("LLORCH_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, Path | None]]:
    """What `llorch serve` would have run with, each time."""
    calls: list[tuple[Config, Path | None]] = []
    monkeypatch.setattr(cli, "serve", lambda config, path, reread: calls.append((config, path)) or 0)
    return calls


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of one command."""
    code = main(list(argv))
    return code, *capsys.readouterr()


def complaint(capsys: pytest.CaptureFixture[str], *argv: str, code: int = EXIT_CONFIG) -> list[str]:
    """The lines on stderr of a command that fails with `code`, without `llorch: `, which begins each."""
    exit_code, out, err = run(capsys, *argv)
    assert (exit_code, out) == (code, "")
    lines = err.splitlines()
    assert all(line.startswith("llorch: ") for line in lines)
    return [line.removeprefix("llorch: ") for line in lines]


def child(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m llorch` as a process of its own, to its end."""
    env = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([sys.executable, "-m", "llorch", *argv], env=env, text=True, timeout=60, **streams)


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    """A file with `text`."""
    path.write_text(text)
    path.chmod(mode)
    return path


# -- help and usage --------------------------------------------------------------------------------


def test_the_version_is_said_by_the_module_too() -> None:
    """`python -m llorch` is llorch."""
    done = child("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"llorch {__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--help"], ["serve", "check-config", "init", "--version"]),
        (["serve", "--help"], ["--config", "LLORCH_CONFIG", "./config.toml"]),
        (["check-config", "--help"], ["--config", "LLORCH_CONFIG", "--print"]),
        (["init", "--help"], ["config.toml", "--force"]),
    ],
)
def test_help_names_what_there_is(
    argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """On stdout, exit 0."""
    with pytest.raises(SystemExit) as done:
        main(argv)
    out, err = capsys.readouterr()
    assert (done.value.code, err) == (0, "")
    assert not [word for word in words if word not in out]


def test_help_of_serve_names_key_and_variable_of_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """So that each can be moved to the file or the environment."""
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for key in cli._FLAGS:
        assert f"--{key.replace('.', '-').replace('_', '-')} VALUE" in said
        assert f"({key}; {env_name(key)})" in said


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        ([], "required: COMMAND"),
        (["dance"], "invalid choice: 'dance'"),
        (["serve", "--bogus"], "unrecognized arguments: --bogus"),
        (["serve", "extra"], "unrecognized arguments: extra"),
        (["serve", "--bind-addr"], "--bind-addr: expected one argument"),
        (["check-config", "--bind-addr", "127.0.0.1:1"], "unrecognized arguments"),
        (["init", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_a_wrong_command_line_is_told_with_the_usage(
    argv: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2, as other programs do."""
    with pytest.raises(SystemExit) as done:
        main(argv)
    out, err = capsys.readouterr()
    assert (done.value.code, out) == (2, "")
    assert err.startswith("usage: llorch")
    assert complaint in err


# -- check-config ----------------------------------------------------------------------------------


def test_no_configuration_is_a_good_one(capsys: pytest.CaptureFixture[str]) -> None:
    """It says which one it looked at."""
    assert run(capsys, "check-config") == (0, "the built-in configuration: good\n", "")


def test_all_faults_are_told_at_once(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line each, with file, key and cure; exit 78."""
    write(workplace / "bad.toml", 'qeue.capacity = 1\nprofile = "work"\n[auth]\noptional = "yes"')
    assert complaint(capsys, "check-config", "--config", "bad.toml") == [
        "bad.toml: qeue: unknown key, did you mean queue?",
        'bad.toml: profile: expected "home" or "mvp", got \'work\'',
        "bad.toml: auth.optional: expected bool, got 'yes'",
    ]


@pytest.mark.parametrize("command", ["check-config", "serve"])
@pytest.mark.parametrize("named", ["flag", "variable"])
def test_a_file_that_was_named_must_be_there(
    command: str, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether by --config or by the environment; nothing else is taken instead."""
    argv = [command, "--config", "none.toml"] if named == "flag" else [command]
    if named == "variable":
        monkeypatch.setenv("LLORCH_CONFIG", "none.toml")
    assert complaint(capsys, *argv) == ["none.toml: there is no such file: llorch init none.toml writes one"]


def test_the_environment_is_checked_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same faults as `serve` would find."""
    monkeypatch.setenv("LLORCH_QUEUE_CAPACITY", "none")
    expected = ["LLORCH_QUEUE_CAPACITY: expected int, got 'none'"]
    assert complaint(capsys, "check-config") == complaint(capsys, "serve") == expected


def test_a_token_is_never_said(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither in faults nor in what is printed [T18]."""
    write(workplace / "config.toml", f'bind_addr = 1\n[auth]\ntoken = "{TOKEN}"\noptional = 3')
    code, out, err = run(capsys, "check-config", "--print")
    assert code == EXIT_CONFIG
    assert "canary" not in out + err


def test_what_is_in_force_is_printed_as_toml(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every key, from wherever it came; secrets are hidden, wherever they came from [T18]."""
    write(workplace / "token", TOKEN)
    text = 'auth.token_file = "token"\nqueue.capacity = 3\nhttp.allowed_hosts = ["a.example"]'
    write(workplace / "config.toml", text)
    monkeypatch.setenv("LLORCH_ADAPTER_API_KEY", API_KEY)
    monkeypatch.setenv("LLORCH_LOG_LEVEL", "debug")
    code, out, err = run(capsys, "check-config", "--print")
    expected = defaults()
    expected["auth"] |= {"token": "(hidden)", "token_file": "token"}
    expected["adapter"]["api_key"] = "(hidden)"
    expected["queue"]["capacity"] = 3
    expected["http"]["allowed_hosts"] = ["a.example"]
    expected["log"]["level"] = "debug"
    assert (code, err) == (0, "")
    assert "canary" not in out
    assert tomllib.loads(out) == json.loads(json.dumps(expected))  # with lists for tuples


def test_what_is_printed_can_be_used_again(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without secrets it is a file that says the same, and an absent secret does not look hidden."""
    _, out, _ = run(capsys, "check-config", "--print")
    assert load(write(workplace / "again.toml", out)) == Config()


# -- which configuration ---------------------------------------------------------------------------


def test_the_file_is_looked_for_in_this_order(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, served: list[tuple[Config, Path | None]]
) -> None:
    """--config, else LLORCH_CONFIG, else ./config.toml if there is one, else built-in."""
    for number, name in enumerate(("config.toml", "variable.toml", "flag.toml"), start=1):
        write(workplace / name, f"queue.capacity = {number}")
    monkeypatch.setenv("LLORCH_CONFIG", "variable.toml")
    main(["serve", "--config", "flag.toml"])
    main(["serve"])
    monkeypatch.delenv("LLORCH_CONFIG")
    main(["serve"])
    (workplace / "config.toml").unlink()
    main(["serve"])
    assert [(config.queue.capacity, path and path.name) for config, path in served] == [
        (3, "flag.toml"),
        (2, "variable.toml"),
        (1, "config.toml"),
        (64, None),
    ]


def test_a_flag_beats_the_environment_and_that_the_file(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, served: list[tuple[Config, Path | None]]
) -> None:
    """Each only for the key that it names."""
    write(workplace / "config.toml", 'bind_addr = "127.0.0.1:1"\nlog.level = "error"\nadapter.slots = 3')
    monkeypatch.setenv("LLORCH_BIND_ADDR", "127.0.0.1:2")
    monkeypatch.setenv("LLORCH_LOG_LEVEL", "warning")
    assert main(["serve", "--bind-addr", "127.0.0.1:3"]) == 0
    config = served[0][0]
    assert (config.bind_addr, config.log.level, config.adapter.slots) == ("127.0.0.1:3", "warning", 3)


def test_every_flag_reaches_its_key(served: list[tuple[Config, Path | None]]) -> None:
    """All of them at once."""
    flags = {
        "--bind-addr": "[::1]:9",
        "--profile": "mvp",
        "--adapter-endpoint": "http://127.0.0.1:9",
        "--adapter-slots": "auto",
        "--log-format": "text",
        "--log-level": "debug",
    }
    assert main(["serve", *(word for pair in flags.items() for word in pair)]) == 0
    config = served[0][0]
    adapter, log = config.adapter, config.log
    assert [config.bind_addr, config.profile, adapter.endpoint, adapter.slots, log.format, log.level] == [
        *flags.values()
    ]
    assert len(cli._FLAGS) == len(flags)


def test_a_place_that_can_not_be_looked_at_has_no_file(
    monkeypatch: pytest.MonkeyPatch, served: list[tuple[Config, Path | None]]
) -> None:
    """A working folder that may not be entered is no reason for a traceback."""
    monkeypatch.setattr(cli, "DEFAULT_CONFIG", Path("x" * 5000))  # stat fails, and not for want of a file
    assert main(["serve"]) == 0
    assert served[0] == (Config(), None)


# -- serve -----------------------------------------------------------------------------------------


def test_serve_with_a_bad_configuration_does_not_start(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 78, each fault with its cure [MVP-011]."""
    argv = ["serve", "--bind-addr", "0.0.0.0:8080", "--adapter-slots", "0"]
    assert complaint(capsys, *argv) == ["--adapter-slots: expected 1 to 1024 or \"auto\", got '0'"]
    (fault,) = complaint(capsys, *argv[:3])
    assert fault.startswith("bind_addr: NON_LOOPBACK_WITHOUT_TOKEN: ")
    assert "llorch init" in fault


def test_serve_without_a_gpu_does_not_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 78, one line that says what is missing and how to mend it [MVP-010]."""

    def no_library() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_library)
    (line,) = complaint(capsys, "serve", "--bind-addr", "127.0.0.1:0")
    assert line.startswith("no GPU: no NVIDIA driver")
    assert "nvidia-smi" in line
    assert "gpu.required = false" in line


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_serve_on_a_port_that_is_taken_does_not_start(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 69, with the way to find out who has it."""
    monkeypatch.setenv("LLORCH_GPU_REQUIRED", "false")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (line,) = complaint(capsys, "serve", "--bind-addr", f"{host}:{port}", code=EXIT_UNAVAILABLE)
    assert line.startswith(f"{host}:{port} is taken by another program")
    assert f"sport = :{port}" in line


def test_serve_on_an_address_of_another_machine_does_not_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 78: it is the configuration that must be mended."""
    monkeypatch.setenv("LLORCH_GPU_REQUIRED", "false")
    monkeypatch.setenv("LLORCH_AUTH_TOKEN", TOKEN)
    (line,) = complaint(capsys, "serve", "--bind-addr", "192.0.2.1:8080")
    assert line == "can't listen on 192.0.2.1:8080: Cannot assign requested address; mend bind_addr"


# -- init ------------------------------------------------------------------------------------------


def test_init_writes_a_good_configuration_with_a_token(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Readable by its owner alone; all else is the defaults, with their comments; the token is not said."""
    code, out, err = run(capsys, "init")
    file = workplace / "config.toml"
    config = load(file)
    assert (code, err) == (0, "")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(config.auth.token) >= 40
    assert config.auth.token not in out
    assert "llorch serve --config config.toml" in out
    template = (ROOT / "llorch/config.template.toml").read_text()
    assert file.read_text().replace(config.auth.token, "") == template
    assert run(capsys, "check-config") == (0, "config.toml: good\n", "")
    assert os.listdir(workplace) == ["config.toml"]


def test_init_makes_a_token_of_its_own_each_time(workplace: Path) -> None:
    """No two installations share one."""
    assert main(["init", "a.toml"]) == main(["init", "b.toml"]) == 0
    assert load(Path("a.toml")).auth.token != load(Path("b.toml")).auth.token


def test_init_overwrites_nothing_unless_told_to(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --force the old file is replaced whole, and what could be read by all no longer can."""
    file = write(workplace / "config.toml", "# mine", mode=0o644)
    assert complaint(capsys, "init") == ["config.toml is there already: choose another path, or say --force"]
    assert file.read_text() == "# mine"
    assert run(capsys, "init", "--force")[0] == 0
    assert load(file).auth.token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(workplace) == ["config.toml"]


def test_init_follows_no_link_that_was_laid_for_it(workplace: Path) -> None:
    """A dangling link is in the way like a file, and --force replaces the link, not what it names."""
    (workplace / "config.toml").symlink_to("elsewhere")
    assert main(["init"]) == EXIT_CONFIG
    assert main(["init", "--force"]) == 0
    assert os.listdir(workplace) == ["config.toml"]
    assert not (workplace / "config.toml").is_symlink()


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("none/config.toml", "can't be written: No such file or directory"),
        ("file/config.toml", "can't be written: Not a directory"),
        ("x" * 260, "can't be written: File name too long"),
        ("/proc/config.toml", "can't be written: No such file or directory"),
        ("folder", "is there already: choose another path, or say --force"),
        ("folder/", "is there already: choose another path, or say --force"),
        (".", "is there already: choose another path, or say --force"),
        ("..", "is there already: choose another path, or say --force"),
        ("", "is there already: choose another path, or say --force"),
    ],
)
def test_init_says_where_it_can_not_write(
    path: str, why: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit 78, and nothing left behind."""
    write(workplace / "file", "")
    (workplace / "folder").mkdir()
    assert complaint(capsys, "init", path) == [f"{Path(path)} {why}"]
    (line,) = complaint(capsys, "init", path, "--force")
    assert "can't be written: " in line
    assert sorted(os.listdir(workplace)) == ["file", "folder"]


# -- stdout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_left_is_no_fault(unbuffered: str) -> None:
    """`llorch check-config --print | head -1` ends quietly [P4]."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = child("check-config", "--print", stdout=writing, env={"PYTHONUNBUFFERED": unbuffered})
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_told(unbuffered: str) -> None:
    """What was asked for is not there, so it is not said to be good [P4]."""
    with open("/dev/full", "w") as full:
        done = child("check-config", "--print", stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == EXIT_CONFIG
    assert done.stderr == "llorch: stdout can't be written: No space left on device\n"


def test_no_stdout_at_all_is_no_fault() -> None:
    """As under a daemon that closed it [P4]."""
    command = f"exec {sys.executable} -m llorch check-config >&-"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], env=env, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_name_that_is_no_text_is_told_escaped(workplace: Path) -> None:
    """Linux allows any bytes; a strict terminal does not."""
    env = {"PYTHONIOENCODING": "utf-8:strict"}
    made = child("init", b"\xff.toml", env=env)  # type: ignore[arg-type]
    checked = child("check-config", "--config", b"\xff.toml", env=env)  # type: ignore[arg-type]
    assert (made.returncode, made.stderr) == (0, "")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout == "\\udcff.toml: good\n"


def test_check_config_tells_a_slip_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A variable that names no key is told on stderr; the configuration is good without it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLORCH_AUTH_TOKN", "x")
    assert main(["check-config"]) == 0
    assert "LLORCH_AUTH_TOKN: no such key, did you mean LLORCH_AUTH_TOKEN?" in capsys.readouterr().err
