"""docs/ is true: its commands and programs are run as they stand, against a live llorch; no table has a gap.

A fence that is marked ``run`` is carried out, the fences of a page in their order, in one folder; ``exit=N``
is the exit code that it must have, ``file=NAME`` what it is called, ``command=NAME`` the command of llorch
without which it is passed over. A fence marked ``output`` is what the one before it must have said; … stands
for anything.
"""

import ast
import asyncio
import contextlib
import functools
import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import aiohttp
import pytest

from llorch import errors, journal
from llorch.config import defaults, env_name
from llorch.schema import PoolTable, ReplicaTable
from llorch.task import State, Task
from tests.fakes import PATIENCE_S, Connection, FakeLlamaServer
from tests.live import TOKEN, Live, names
from tests.pools import written
from tests.test_docs import KEYS, REFUSALS, event_codes, subclasses

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FENCE = re.compile(r"^```(?P<language>\w+)?(?P<marks>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
KEYS_OF_POOLS = [f"pools.NAME.{key}" for key in PoolTable.__struct_fields__ if key != "replicas"]
KEYS_OF_POOLS += [f"pools.NAME.replicas.{key}" for key in ReplicaTable.__struct_fields__]
RUNNERS = {"sh": "bash -euo pipefail", "python": sys.executable, "js": "node"}


class Fence(NamedTuple):
    """One fenced block of a page."""

    language: str
    marks: dict[str, str]
    text: str
    line: int


def fences(page: Path) -> list[Fence]:
    """Every fenced block, in order."""
    text = page.read_text("utf-8")
    found = []
    for match in FENCE.finditer(text):
        marks = dict(mark.partition("=")[::2] for mark in match["marks"].split())
        line = text.count("\n", 0, match.start()) + 1
        found.append(Fence(match["language"] or "", marks, match["text"], line))
    return found


def said_as(pattern: str, said: str) -> bool:
    """Whether `said` is `pattern`, in which … stands for anything."""
    lines = "\n".join(line.rstrip() for line in said.strip().splitlines())
    return re.fullmatch(re.escape(pattern.strip()).replace("…", ".*?"), lines, re.DOTALL) is not None


@functools.cache
def has_command(name: str) -> bool:
    """Whether llorch has this command."""
    command = [sys.executable, "-m", "llorch", name, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode == 0


# -- what is run -----------------------------------------------------------------------------------


def as_script(blocks: list[Fence]) -> str:
    """One shell script that carries out all blocks, so that a variable of one is there for the next."""
    lines = ["set -uo pipefail"]
    for number, block in enumerate(blocks):
        lines.append(f"echo; echo '<<< {number} >>>'")
        text = block.text.rstrip("\n")
        if name := block.marks.get("file"):
            lines += [f"cat > {name} <<'END OF FILE'", text, "END OF FILE"]
            text = f"{RUNNERS[block.language]} {name}"
        if wanted := block.marks.get("exit"):
            lines += [text, f'[ $? = {wanted} ] || {{ echo "not exit {wanted}" >&2; exit 97; }}']
        else:
            lines += ["set -e", text, "set +e"]
    return "\n".join(lines) + "\n"


async def carry_out(script: str, folder: Path, env: dict[str, str]) -> tuple[int, list[str], str]:
    """Exit code, what each block said, and stderr."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    inherited["PATH"] = f"{Path(sys.executable).parent}:{inherited['PATH']}"
    process = await asyncio.create_subprocess_exec(
        *["bash", "-c", script],
        cwd=folder,
        env=inherited | env,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(3 * PATIENCE_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    parts = re.split(r"\n<<< \d+ >>>\n", out.decode())
    return process.returncode, parts[1:], err.decode()


async def patient(connection: Connection) -> None:
    """Short answers come whole; a long one says one word and then waits for its cancel."""
    wanted = connection.request.body["n_predict"]
    if wanted > 1000:
        await connection.token()
        await connection.stall()
    for _ in range(wanted):
        await connection.token()
    await connection.final("limit")


RUN_PAGES = [page for page in PAGES if any("run" in fence.marks for fence in fences(page))]


def test_the_pages_that_promise_commands_have_some() -> None:
    """None has lost its marks."""
    wanted = {
        "quickstart",
        "api",
        "clients",
        "configuration",
        "determinism",
        "operations",
        "metrics",
        "recipes",
    }
    assert {page.stem for page in RUN_PAGES} == wanted


@pytest.mark.skipif(not shutil.which("jq") or not shutil.which("curl"), reason="no jq or no curl here")
@pytest.mark.parametrize("page", [page for page in RUN_PAGES if page.stem != "clients"], ids=lambda p: p.stem)
async def test_the_commands_of_a_page_do_what_it_says(
    page: Path, fake_engine: FakeLlamaServer, tmp_path: Path
) -> None:
    """Each ends as it should, and says what stands below it."""
    blocks = [fence for fence in fences(page) if {"run", "output"} & fence.marks.keys()]
    skipped = {
        fence.line for fence in blocks if "command" in fence.marks and not has_command(fence.marks["command"])
    }
    runs = [fence for fence in blocks if "run" in fence.marks and fence.line not in skipped]
    fake_engine.always(patient, path="/completion")
    async with contextlib.AsyncExitStack() as open_:
        if page.stem == "recipes":  # two engines behind one pool
            other = await open_.enter_async_context(FakeLlamaServer())
            other.always(patient, path="/completion")
            devices = {"gpu0": {"devices": [0]}, "gpu1": {"devices": [1]}}
            pools = {"big": {"gpu0": fake_engine, "gpu1": other}}
            live = Live(fake_engine, file=written(tmp_path, pools, self_test=True, **devices))
        else:
            settings = {"queue": {"capacity": 2}, "adapter": {"self_test": True, "slots": 1}}
            live = Live(fake_engine, settings)
        await open_.enter_async_context(live)
        await verified(live)
        script = as_script(runs).replace("127.0.0.1:8080", f"127.0.0.1:{live.port}")
        code, said, err = await carry_out(script, tmp_path, {"LLORCH_URL": live.url})
    last = runs[min(len(said), len(runs)) - 1]
    assert code == 0, f"{page.name}:{last.line} {said[-1:]} {err}"
    outputs = [(before, fence) for before, fence in itertools.pairwise(blocks) if "output" in fence.marks]
    for before, fence in outputs:
        if before in runs:
            text = said[runs.index(before)]
            assert said_as(fence.text, text), f"{page.name}:{fence.line} said {text}"


async def verified(live: Live) -> None:
    """Return once the self-test is over."""
    async with asyncio.timeout(PATIENCE_S):
        while any(it.determinism == "unknown" or it.leases for it in live.pool.replicas):  # noqa: ASYNC110
            await asyncio.sleep(0)  # no event tells


async def test_the_recipe_gives_each_engine_a_gpu_and_a_port(tmp_path: Path) -> None:
    """Carried out on a copy of the file that the service starts with."""
    shutil.copy(ROOT / "scripts/engine.example.env", tmp_path / "default.env")
    (loop,) = [fence.text for fence in fences(DOCS / "recipes.md") if "for gpu in" in fence.text]
    script = re.sub(r"(?m)^(cd|sudo systemctl) .*", "", loop).replace("sudo ", "")
    code, _, err = await carry_out(f"set -e\n{script}", tmp_path, {})
    assert code == 0, err
    for gpu in (0, 1):
        lines = (tmp_path / f"gpu{gpu}.env").read_text().splitlines()
        wanted = [f"PORT={8081 + gpu}", "CUDA_DEVICE_ORDER=PCI_BUS_ID", f"CUDA_VISIBLE_DEVICES={gpu}"]
        assert [line for line in lines if line.startswith(("PORT", "CUDA"))] == wanted
    assert loop.count("llama-server@gpu") == 2


# -- clients ---------------------------------------------------------------------------------------

CLIENTS = [fence for fence in fences(DOCS / "clients.md") if "file" in fence.marks]
TEXT = [" on", "ce", "\u2028", " a", " Straße", "\r", ' "q"', "\x85", " 日本", "."]


class Cutter:
    """A proxy that cuts every second stream off after so many bytes, in the middle of whatever comes then."""

    def __init__(self, port: int, after: int) -> None:
        self._port, self._after = port, after
        self.streams = self.cuts = 0
        self._server: asyncio.Server | None = None
        self._handlers: set[asyncio.Task[None]] = set()
        self.url = ""

    async def __aenter__(self) -> "Cutter":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for handler in self._handlers:
            handler.cancel()
        if self._handlers:
            await asyncio.wait(self._handlers)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.current_task()
        assert handler is not None
        self._handlers.add(handler)
        handler.add_done_callback(self._handlers.discard)
        engine_reader, engine_writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            with contextlib.suppress(ConnectionError):
                async with asyncio.TaskGroup() as group:
                    back = group.create_task(self._back(engine_reader, writer))
                    there = group.create_task(self._there(reader, engine_writer))
                    back.add_done_callback(lambda _: there.cancel())
        finally:
            for end in (writer, engine_writer):
                end.close()

    async def _there(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while block := await reader.read(2**16):
            writer.write(block)

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left: int | None = None
        while block := await reader.read(2**16):
            if b"text/event-stream" in block and left is None:
                self.streams += 1
                left = self._after if self.streams % 2 else 2**30
                left += block.index(b"\r\n\r\n")
            if left is not None and len(block) > left:
                self.cuts += 1
                writer.write(block[:left])
                await writer.drain()
                return
            left = None if left is None else left - len(block)
            writer.write(block)


async def sings(connection: Connection) -> None:
    """Forty tokens, with all that lines could be split at by mistake."""
    for number in range(40):
        await connection.token(TEXT[number % len(TEXT)])
    await connection.final("limit")


@pytest.mark.parametrize("token", ["", TOKEN], ids=["open", "token"])
@pytest.mark.parametrize("fence", CLIENTS, ids=lambda fence: fence.marks["file"])
async def test_a_client_loses_nothing_when_its_connection_breaks(
    fence: Fence, token: str, fake_engine: FakeLlamaServer, tmp_path: Path
) -> None:
    """Each recipe prints the whole text once, though its first stream is cut off in mid-event."""
    needed = {"js": ["node"], "sh": ["curl", "jq"], "python": []}[fence.language]
    if not all(map(shutil.which, needed)):
        pytest.skip(f"no {' or no '.join(needed)} here")
    fake_engine.always(sings, path="/completion")
    async with Live(fake_engine, {"auth": {"token": token}}) as live, Cutter(live.port, 1100) as cutter:
        env = {"LLORCH_URL": cutter.url} | ({"LLORCH_AUTH_TOKEN": token} if token else {})
        code, said, err = await carry_out(as_script([fence]), tmp_path, env)
    assert code == 0, err
    assert said == ["".join(TEXT) * 4]
    assert (cutter.streams, cutter.cuts) == (2, 1)


# -- behind a proxy --------------------------------------------------------------------------------


def snippet(language: str) -> str:
    """The one block of operations.md in this language."""
    (fence,) = [fence for fence in fences(DOCS / "operations.md") if fence.language == language]
    return fence.text


def nginx(live: Live, port: int, folder: Path) -> list[str]:
    """The command that runs the page's nginx configuration, without TLS, on `port`."""
    server = re.sub(r"(?m)^\s+ssl_\w+ .*$", "", snippet("nginx"))
    server = server.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
    server = server.replace("127.0.0.1:8080", f"127.0.0.1:{live.port}")
    places = "".join(
        f"    {name}_temp_path {folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{\n{places}{server}}}\n"
    )
    return ["nginx", "-p", str(folder), "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"]


def caddy(live: Live, port: int, folder: Path) -> list[str]:
    """The same for Caddy."""
    site = snippet("caddy").replace("llm.example.org {", f"http://:{port} {{\n    bind 127.0.0.1")
    site = site.replace("127.0.0.1:8080", f"127.0.0.1:{live.port}")
    (folder / "Caddyfile").write_text(f"{{\n    admin off\n    auto_https off\n}}\n{site}")
    return ["caddy", "run", "--adapter", "caddyfile", "--config", f"{folder}/Caddyfile"]


@contextlib.asynccontextmanager
async def proxy(name: str, live: Live, folder: Path) -> AsyncIterator[str]:
    """The page's proxy in front of `live`, at this URL."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = {"nginx": nginx, "caddy": caddy}[name](live, port, folder)
    env = os.environ | {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    log = (folder / "log").open("wb")
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=log, stderr=log)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await listens(port):
                assert process.returncode is None, (folder / "log").read_text()
                await asyncio.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()
        log.close()


async def listens(port: int) -> bool:
    """Whether somebody does."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionError:
        return False
    writer.close()
    await writer.wait_closed()
    return True


@pytest.mark.parametrize("name", ["nginx", "caddy"])
async def test_behind_a_proxy_each_token_comes_at_once_and_nobody_is_local(
    name: str, fake_engine: FakeLlamaServer, tmp_path: Path
) -> None:
    """Nothing is buffered, a stream resumes, a large body passes, and nobody is exempt as local."""
    if shutil.which(name) is None:
        pytest.skip(f"no {name} here")
    fake_engine.hold = True
    settings: dict[str, Any] = {"auth": {"token": TOKEN, "optional": True}}
    settings["http"] = {"allowed_hosts": ["llm.example.org"]}
    host = {"Host": "llm.example.org", "Origin": "http://llm.example.org"}
    async with Live(fake_engine, settings) as live, proxy(name, live, tmp_path) as url:
        assert (await live.ask("GET", "/v1/tasks", headers={})).status == 200
        async with aiohttp.ClientSession(url) as stranger, stranger.get("/v1/tasks", headers=host) as answer:
            assert (await answer.json())["code"] == "MISSING_TOKEN"
        direct, live.session = live.session, aiohttp.ClientSession(url)
        await direct.close()
        live.headers |= host
        body = io.BytesIO(b'{"prompt": "hello", "max_tokens": 100' + b" " * 2_000_000 + b"}")
        answer = await live.post(data=body, headers={**live.headers, "Content-Type": "application/json"})
        assert answer.status == 202, answer.body
        task, connection = answer.body, await fake_engine.started()
        async with live.stream(task) as stream:
            assert names([await stream.next()]) == "started"  # type: ignore[list-item]
            for number in range(3):
                await connection.token(f"{number}")
                event = await stream.next()
                assert event is not None
                assert event.data == {"t": f"{number}", "i": number}
        async with live.stream(task, last_event_id=2) as stream:
            event = await stream.next()
            assert event is not None
            assert event.id == 3
            await connection.finish()
            assert names(await stream.rest()) == "end"


# -- tables that are whole -------------------------------------------------------------------------


def maker() -> ModuleType:
    """scripts/docs.py."""
    spec = importlib.util.spec_from_file_location("docs_maker", ROOT / "scripts/docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = maker()


@pytest.mark.parametrize("part", MAKER.PARTS)
def test_what_is_made_from_the_program_is_as_the_program_is(part: str) -> None:
    """Else `scripts/docs` has to be run."""
    text = (DOCS / MAKER.PARTS[part][0]).read_text("utf-8")
    assert MAKER.renewed(part, text) == text


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_its_row(key: str) -> None:
    """With its default as TOML, and the variable of the environment."""
    table, _, name = key.rpartition(".")
    default = (defaults()[table] if table else defaults())[name]
    rows = [
        line for line in (DOCS / "configuration.md").read_text("utf-8").splitlines() if f"| `{key}` |" in line
    ]
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].strip("|").split(" | ")]
    assert cells[2] == f"`{json.dumps(list(default) if isinstance(default, tuple) else default)}`"
    assert cells[4] == f"`{env_name(key)}`"
    assert len(cells[5]) > 8


@pytest.mark.parametrize("key", KEYS_OF_POOLS)
def test_every_key_of_a_pool_has_its_row(key: str) -> None:
    """With its type and words, and no variable: the environment can't say which pool is meant."""
    text = (DOCS / "configuration.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if f"| `{key}` |" in line]
    assert len(rows) == 1
    cells = [cell.strip() for cell in rows[0].strip("|").split(" | ")]
    assert cells[1]
    assert cells[4] == "none"
    assert len(cells[5]) > 8


def test_the_diagram_has_every_step_of_a_task() -> None:
    """Each arrow is a method of Task, and each state stands in it."""
    diagram = MAKER.states()
    assert all(hasattr(Task, step) for step in MAKER.STEPS.values())
    assert all(f" {state.value}" in diagram for state in State)
    assert len(re.findall(r"-->", diagram)) == 10


def rows(heading: str) -> list[list[str]]:
    """The rows of the table below this heading of operations.md."""
    part = (DOCS / "operations.md").read_text("utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in part.splitlines()
        if line[:3] == "| `"
    ]


def events() -> set[str]:
    """Every `event` that a line of the log may have."""
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "llorch").rglob("*.py")]
    found = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                found |= {
                    value.value
                    for key, value in pairs
                    if isinstance(key, ast.Constant)
                    and key.value == "event"
                    and isinstance(value, ast.Constant)
                }
    sentences = ast.walk(ast.parse(inspect.getsource(journal._sentence)))
    pairs = [node.elts[1] for node in sentences if isinstance(node, ast.Tuple) and len(node.elts) == 3]
    return found | {element.value for element in pairs if isinstance(element, ast.Constant)}


def test_every_event_of_the_log_is_told() -> None:
    """And none that is not written."""
    assert {row[0].strip("`") for row in rows("Logs")} == events()
    assert len(events()) >= 14


def test_every_error_code_is_told_with_its_cure() -> None:
    """With the status that it has as an answer, and none for those of a stream alone."""
    told = {row[0].strip("`"): row[1:] for row in rows("Error codes")}
    assert told.keys() == REFUSALS | event_codes()
    statuses = {kind.code: str(kind.status) for kind in subclasses(errors.LlorchError)}
    assert {code: cells[0] for code, cells in told.items()} == {code: statuses.get(code, "") for code in told}
    assert all(len(cells[2]) > 8 for cells in told.values())


def test_every_path_and_every_key_that_is_named_exists() -> None:
    """Links to pages and headings, scripts and modules, keys, and variables of the environment."""
    tables = {key.partition(".")[0] for key in KEYS if "." in key}
    variables = {"LLORCH_URL", "LLORCH_CONFIG", *map(env_name, KEYS)}
    for page in PAGES:
        text = page.read_text("utf-8")
        for link, heading in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            target = DOCS / link if link else page
            assert target.exists(), f"{page.name}: {link}"
            titles = re.findall(r"(?m)^#+ (.*)$", target.read_text("utf-8"))
            assert not heading or heading in {title.lower().replace(" ", "-") for title in titles}
        named = set(re.findall(r"(?<![\w/])(?:scripts|llorch|tests)/[\w./@-]+\w", text))
        assert [path for path in named if not (ROOT / path).exists()] == []
        keys = set(re.findall(rf"`({'|'.join(tables)})\.([a-z_]+)\b", text))
        assert [key for key in keys if ".".join(key) not in KEYS and key[1] != "py"] == []
        assert set(re.findall(r"\bLLORCH_[A-Z_]+\b", text)) <= variables


def test_the_commands_that_are_named_are_there_or_on_their_way() -> None:
    """No page speaks of a command that llorch will never have."""
    known = {"serve", "check-config", "init", "run", "ps", "top", "doctor"}
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    assert set(re.findall(r"`llorch ([a-z-]+)", text)) <= known
