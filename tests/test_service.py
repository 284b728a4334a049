"""The systemd service: its units, and the script that installs them, on a tree of its own, with tools that
only write down what they were asked; and llorch started by the unit's own command line."""

import asyncio
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import aiohttp
import pytest

from llorch import config, schema, server
from tests.fakes import PATIENCE_S, FakeLlamaServer

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/install-service"
UNITS = ("llorch.service", "llama-server@.service")
BASH = sorted(
    path for path in (ROOT / "scripts").iterdir() if path.is_file() and b"bash" in path.read_bytes()[:30]
)
EXPOSURE = 1.5
needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")

TOOLS = {
    "systemctl": """
case "$*" in
    --version) echo "systemd ${SYSTEMD_VERSION:-255} (255.1)" ;;
    *is-enabled*) [ -e "$TREE/enabled" ] ;;
    *) echo "systemctl $*" >> "$TREE/calls"
       case "$*" in *enable*) touch "$TREE/enabled" ;; esac
       case "$*" in *disable*) rm -f "$TREE/enabled" ;; esac ;;
esac""",
    "useradd": 'echo "useradd $*" >> "$TREE/calls"; echo "llorch:x:999:999::/:" >> "$TREE/etc/passwd"',
    "userdel": 'echo "userdel $*" >> "$TREE/calls"; sed -i /^llorch:/d "$TREE/etc/passwd"',
    "python3": f"""
if [ "$1 $2" = "-m venv" ]; then
    echo "venv" >> "$TREE/calls"
    mkdir -p "$3/bin"
    cp "$TREE/usr/bin/pip" "$3/bin/python"
else
    exec {sys.executable} "$@"
fi""",
    "pip": f"""
echo "pip" >> "$TREE/calls"
printf '#!/bin/sh\\nexec {sys.executable} -m llorch "$@"\\n' > "${{0%/*}}/llorch"
chmod +x "${{0%/*}}/llorch" """,
}


class Tree:
    """A system to install into, with a folder of tools; `calls` is what they were asked to change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bin = path / "usr/bin"
        self.llorch = path / "etc/llorch"
        self.units = path / "etc/systemd/system"
        self.bin.mkdir(parents=True)
        (path / "etc").mkdir()
        (path / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
        (path / "etc/group").write_text("video:x:44:\n")
        for name, text in TOOLS.items():
            tool = self.bin / name
            tool.write_text(f"#!/bin/sh\n{text}\n")
            tool.chmod(0o755)

    def run(self, *argv: str, root: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """scripts/install-service to its end."""
        given = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
        given |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "TREE": str(self.path), "PYTHONPATH": str(ROOT)}
        given["PYTHON"] = str(self.bin / "python3")
        where = ["--root", str(self.path)] if root else []
        command = [SCRIPT, *where, *argv]
        return subprocess.run(command, env=given | env, capture_output=True, text=True, timeout=60)

    def install(self, *argv: str, **env: str) -> list[str]:
        """Its lines, once it has gone well."""
        done = self.run(*argv, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    @property
    def calls(self) -> list[str]:
        """What the tools were asked, oldest first."""
        return (self.path / "calls").read_text().splitlines() if (self.path / "calls").exists() else []

    def snapshot(self) -> dict[str, tuple[int, int, bytes]]:
        """Every file with its mode, its time of change and its bytes."""
        files = [path for path in self.path.rglob("*") if path.is_file()]
        return {
            str(path): (path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes()) for path in files
        }


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A system without llorch."""
    return Tree(tmp_path / "system")


# -- the script ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", BASH, ids=lambda path: path.name)
def test_no_shell_script_has_a_known_trap(path: Path) -> None:
    """shellcheck finds nothing to say."""
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_a_dry_run_changes_nothing_and_says_everything(tree: Tree) -> None:
    """It says each line that the real run says for its changes."""
    before = tree.snapshot()
    said = tree.install("--dry-run")
    assert tree.snapshot() == before
    assert tree.calls == []
    really = tree.install()
    plain = [re.sub(r"/tmp/tmp\.\w+$", str(ROOT), line) for line in really]
    assert [line for line in plain if line[:2] == "+ "] == [line for line in said if line[:2] == "+ "]
    assert len(said) > 12


def test_it_makes_all_that_a_service_needs(tree: Tree) -> None:
    """User, virtual environment, units; a good configuration, and two secrets that only root can read."""
    tree.install()
    secrets = [(tree.llorch / name) for name in ("token", "engine-key")]
    assert [stat.S_IMODE(path.stat().st_mode) for path in secrets] == [0o400, 0o400]
    texts = {path.read_text().strip() for path in secrets}
    assert len(texts) == 2
    assert all(len(text) >= 40 for text in texts)
    values = tomllib.loads((tree.llorch / "config.toml").read_text())
    assert json.dumps(values) == json.dumps(config.defaults())  # with the token taken out of it
    assert stat.S_IMODE((tree.llorch / "config.toml").stat().st_mode) == 0o644
    assert [call.split()[0] for call in tree.calls] == ["useradd", "venv", "pip", "systemctl"]
    assert "--groups video" in tree.calls[0]
    assert tree.calls[-1] == f"systemctl --root={tree.path} enable llorch.service"


def test_a_second_run_changes_nothing(tree: Tree) -> None:
    """Every step finds its work done."""
    tree.install()
    before = tree.snapshot()
    said = tree.install()
    assert [line for line in said if line.startswith("+")] == []
    assert len([line for line in said if line.startswith("= ")]) > 7
    assert tree.snapshot() == before


def test_an_upgrade_installs_anew_and_keeps_what_is_the_users(tree: Tree) -> None:
    """Other sources, an edited unit: both are put right; configuration, token and engine file stay."""
    tree.llorch.mkdir()
    (tree.llorch / "config.toml").write_text("[log]\nlevel = 'debug'\n")
    (tree.llorch / "token").write_text("my own token 0123456789\n")
    tree.install()
    (tree.llorch / "engines/default.env").write_text("MODEL=/mine\n")
    (tree.path / "opt/llorch/.fingerprint").write_text("of an older llorch\n")
    (tree.units / "llorch.service").write_text("[Service]\n")
    calls = len(tree.calls)
    tree.install()
    assert tree.calls[calls:] == ["pip"]
    assert "WatchdogSec=" in (tree.units / "llorch.service").read_text()
    assert (tree.llorch / "config.toml").read_text() == "[log]\nlevel = 'debug'\n"
    assert (tree.llorch / "token").read_text() == "my own token 0123456789\n"
    assert (tree.llorch / "engines/default.env").read_text() == "MODEL=/mine\n"


def test_a_given_virtual_environment_is_used(tree: Tree) -> None:
    """Nothing is made in /opt, and the unit runs it from there."""
    venv = tree.path / "srv/venv"
    (venv / "bin").mkdir(parents=True)
    shutil.copy(tree.bin / "pip", venv / "bin/python")
    refused = tree.run("--venv", str(venv))
    assert refused.returncode == 69
    assert f"{venv}/bin/pip install" in refused.stderr
    subprocess.run([venv / "bin/python"], env={"TREE": str(tree.path), "PATH": "/usr/bin:/bin"}, check=True)
    tree.install("--venv", str(venv))
    assert not (tree.path / "opt").exists()
    assert "\nExecStart=/srv/venv/bin/llorch serve " in (tree.units / "llorch.service").read_text()


def test_uninstall_takes_away_what_was_made_and_keeps_what_is_the_users(tree: Tree) -> None:
    """Units, user and virtual environment go; /etc/llorch stays, until --purge. Again: nothing more to do."""
    tree.install()
    said = tree.install("--uninstall")
    left = {path.relative_to(tree.path).as_posix() for path in tree.path.rglob("*") if path.is_file()}
    mine = {f"etc/llorch/{name}" for name in ("config.toml", "token", "engine-key", "engines/default.env")}
    assert {path for path in left if not path.startswith("usr/bin/")} == mine | {
        "etc/passwd",
        "etc/group",
        "calls",
    }
    assert "llorch" not in (tree.path / "etc/passwd").read_text()
    assert not (tree.path / "opt/llorch").exists()
    assert "(--purge takes it away too)" in said[-1]
    assert [line for line in tree.install("--uninstall") if line.startswith("+")] == []
    tree.install("--uninstall", "--purge")
    assert not tree.llorch.exists()


def test_uninstall_leaves_a_user_that_was_there_before(tree: Tree) -> None:
    """It takes away only what it made; and a dry run of it takes away nothing."""
    with (tree.path / "etc/passwd").open("a") as passwd:
        passwd.write("llorch:x:500:500::/:/bin/sh\n")
    tree.install()
    before = tree.snapshot()
    assert [line for line in tree.install("--uninstall", "--purge", "--dry-run") if line.startswith("+ rm")]
    assert tree.snapshot() == before
    tree.install("--uninstall")
    assert "llorch:x:500" in (tree.path / "etc/passwd").read_text()
    assert not [call for call in tree.calls if call.startswith(("userdel", "useradd"))]


@pytest.mark.parametrize(
    ("argv", "env", "code", "words"),
    [
        (["--purge"], {}, 64, ["--uninstall"]),
        (["--root"], {}, 64, ["--root needs a folder"]),
        (["--dance"], {}, 64, ["unknown: --dance", "usage:"]),
        ([], {"SYSTEMD_VERSION": "249"}, 69, ["systemd 252 or newer", "249"]),
        ([], {"PYTHON": "/bin/false"}, 69, ["Python 3.11", "PYTHON"]),
        (["--venv", "/home/me/venv"], {}, 69, ["/home/me/venv", "no bin/llorch"]),
    ],
)
def test_what_cannot_be_is_refused_with_its_cure(
    argv: list[str], env: dict[str, str], code: int, words: list[str], tree: Tree
) -> None:
    """Before anything is changed."""
    done = tree.run(*argv, **env)
    assert done.returncode == code
    assert [word for word in words if word not in done.stderr] == []
    assert tree.calls == []


def test_a_python_that_the_service_cannot_see_is_refused(tree: Tree) -> None:
    """One below /home: the unit hides it from the service."""
    home = tree.path / "home/me"
    home.mkdir(parents=True)
    shutil.copy(tree.bin / "python3", home / "python3")
    done = tree.run(PYTHON=str(home / "python3"))
    assert done.returncode == 69
    assert "the service can't see home folders" in done.stderr
    assert "PYTHON=/usr/bin/python3" in done.stderr
    assert tree.calls == []


def test_without_root_it_says_so(tree: Tree) -> None:
    """And that a dry run needs none."""
    (tree.bin / "id").write_text("#!/bin/sh\necho 1000\n")
    (tree.bin / "id").chmod(0o755)
    done = tree.run(root=False, PYTHON="/bin/false")  # which stops it, should this fail
    assert done.returncode == 77
    assert "sudo" in done.stderr
    assert "--dry-run" in done.stderr


@pytest.mark.parametrize(("version", "grows"), [("253", False), ("254", True)])
def test_an_older_systemd_gets_no_key_that_it_does_not_know(version: str, grows: bool, tree: Tree) -> None:
    """Pauses between restarts grow from 254 on; before it they are the longer."""
    tree.install(SYSTEMD_VERSION=version)
    for name in UNITS:
        text = (tree.units / name).read_text()
        assert ("RestartMaxDelaySec=" in text, "RestartSteps=" in text) == (grows, grows)
        assert ("\nRestartSec=10\n" in text) is not grows


# -- the units -------------------------------------------------------------------------------------


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_no_fault_in_a_unit(name: str, tree: Tree) -> None:
    """Not a word; what it would run is another thing, for that is not on this machine."""
    tree.install(SYSTEMD_VERSION="252")  # with the keys that any systemd knows
    unit = tree.path / name.replace("@", "@default")
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", (tree.units / name).read_text()))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_hardened(name: str) -> None:
    """systemd's own measure of exposure is 1.5 at most."""
    threshold = str(round(EXPOSURE * 10))
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={threshold}", "--no-pager"]
    done = subprocess.run([*command, ROOT / "scripts" / name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    said = re.search(r"Overall exposure level for \S+ ([0-9.]+)", done.stdout)
    assert said is not None
    assert float(said[1]) <= EXPOSURE


def settings(name: str) -> dict[str, list[str]]:
    """Each key of a unit with its values."""
    text = (ROOT / "scripts" / name).read_text().replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if re.match(r"[A-Z]\w+=", line):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def test_the_unit_leaves_the_gpu_to_nvml() -> None:
    """The devices that it opens are let through, and what would hide them or /proc/driver is not there."""
    unit = settings("llorch.service")
    assert {value.split()[0] for value in unit["DeviceAllow"]} == {
        "char-nvidia",
        "char-nvidia-frontend",
        "char-nvidiactl",
    }
    assert all(value.endswith(" rw") for value in unit["DeviceAllow"])
    assert not {"PrivateDevices", "ProcSubset"} & unit.keys()


def test_only_what_a_person_mends_is_not_restarted() -> None:
    """78, configuration and GPU; 69, a port that is taken, may pass, and gives way to no limit of starts."""
    unit = settings("llorch.service")
    assert (unit["Restart"], unit["RestartPreventExitStatus"]) == (["on-failure"], ["78"])
    assert unit["StartLimitIntervalSec"] == ["0"]
    assert float(unit["TimeoutStopSec"][0]) > schema.Shutdown().grace_s + 1


def test_the_engine_is_started_so_that_seeds_can_hold() -> None:
    """The flags of the self-test's cure, and those by which llorch sees a slot come back."""
    command = shlex.split(settings("llama-server@.service")["ExecStart"][0])
    wanted = [
        "--no-kv-unified",
        "--no-context-shift",
        "--cache-ram",
        "--slots",
        "--api-key-file",
        "--parallel",
    ]
    assert [flag for flag in wanted if flag not in command] == []
    assert command[command.index("--cache-ram") + 1] == "0"
    variables = set(re.findall(r"\$\{?([A-Z_]+)", " ".join(command)))
    example = (ROOT / "scripts/engine.example.env").read_text()
    assert set(re.findall(r"(?m)^([A-Z_]+)=", example)) == variables
    port = re.search(r"(?m)^PORT=(\d+)$", example)
    assert port is not None
    assert schema.Adapter().endpoint.endswith(f":{port[1]}")


# -- the service itself ----------------------------------------------------------------------------


def harden() -> None:
    """What the unit asks of the kernel that any process may ask for itself: no new privileges, and no memory
    that is first written and then run (Linux 6.3)."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    libc.prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE; an older kernel refuses, which is no fault of ours


async def heard(systemd: socket.socket, word: bytes) -> bytes:
    """The next message to systemd that begins with `word`; others are passed over."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(PATIENCE_S):
        while not (said := await loop.sock_recv(systemd, 4096)).startswith(word):
            pass
    return said


async def test_the_command_of_the_unit_serves_and_beats_and_stops(tree: Tree, tmp_path: Path) -> None:
    """With the unit's environment, its credentials as systemd lays them down, and written memory not run."""
    tree.install()
    unit = settings("llorch.service")
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    for name, source in (value.split(":") for value in unit["LoadCredential"]):
        shutil.copy(f"{tree.path}{source}", credentials / name)
        (credentials / name).chmod(0o440)
    notify = str(tmp_path / "notify")
    env = dict(pair.split("=") for pair in " ".join(unit["Environment"]).split())
    env = {name: value.replace("%d", str(credentials)) for name, value in env.items()}
    env |= {"CREDENTIALS_DIRECTORY": str(credentials), "NOTIFY_SOCKET": notify}
    env |= {"WATCHDOG_USEC": str(int(unit["WatchdogSec"][0]) * 1_000_000), "PATH": os.environ["PATH"]}
    env |= {"LLORCH_BIND_ADDR": "127.0.0.1:0", "LLORCH_GPU_REQUIRED": "false", "PYTHONPATH": str(ROOT)}
    env |= {"LLORCH_ADAPTER_SELF_TEST": "false"}
    command = [f"{tree.path}{word}" if word[0] == "/" else word for word in shlex.split(unit["ExecStart"][0])]
    key = (tree.llorch / "engine-key").read_text().strip()
    token = (tree.llorch / "token").read_text().strip()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(notify)
        systemd.setblocking(False)
        async with FakeLlamaServer(api_key=key) as engine:
            env["LLORCH_ADAPTER_ENDPOINT"] = engine.url
            process = await asyncio.create_subprocess_exec(
                *command, env=env, cwd="/", preexec_fn=harden, stdout=asyncio.subprocess.PIPE
            )
            try:
                ready = (await heard(systemd, b"READY=1")).decode()
                assert await heard(systemd, b"WATCHDOG=1")
                address = re.search(r"http://\S+:\d+", ready)
                assert address is not None
                async with aiohttp.ClientSession(address[0]) as session:
                    async with session.get("/v1/pools/default/health") as response:
                        assert response.status == 401
                    headers = {"Authorization": f"Bearer {token}"}
                    async with session.get("/v1/pools/default/health", headers=headers) as response:
                        assert (await response.json())["live"] is True
                process.send_signal(signal.SIGTERM)
                assert await heard(systemd, b"STOPPING=1")
                out, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
    assert process.returncode == 0
    lines = [json.loads(line) for line in out.splitlines()]
    warnings = [line["msg"] for line in lines if line["level"] != "info"]
    assert [line for line in warnings if "gpu.required" not in line] == []


@pytest.mark.parametrize(
    ("text", "mode", "warned"),
    [
        ('[auth]\ntoken = "canary-token-0123456789"\n', 0o644, True),
        ('[auth]\ntoken = "canary-token-0123456789"\n', 0o600, False),
        ('[log]\nlevel = "info"\n', 0o644, False),
        ("", 0o644, False),
    ],
)
def test_only_a_file_that_shows_a_secret_is_warned_of(
    text: str, mode: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not one whose token comes from a credential, though others may read it."""
    path = tmp_path / "config.toml"
    path.write_text(text)
    path.chmod(mode)
    server._warn(config.load(path, {"LLORCH_AUTH_TOKEN": "from-the-environment-0123"}), path)
    assert any(f"others on this machine can read {path}" in said for said in caplog.messages) is warned
