"""The request in reserve: connected before its body is known, never sent without one, never left over."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from llorch.adapters import spare
from llorch.adapters.llamacpp import LlamaCpp
from llorch.engine import EngineFailure, Generation
from llorch.task import Sampling
from tests.fakes import Connection, FakeLlamaServer

HELLO = Generation(prompt="hello", max_tokens=2, sampling=Sampling())


@pytest.fixture
async def llama(fake_engine: FakeLlamaServer) -> AsyncIterator[LlamaCpp]:
    """The adapter, pointed at the fake engine."""
    adapter = LlamaCpp(fake_engine.url)
    yield adapter
    await adapter.close()
    await fake_engine.until(lambda: not fake_engine.open_connections)


async def generated(llama: LlamaCpp) -> list[str]:
    """The texts of one whole generation."""
    async with contextlib.aclosing(llama.generate(HELLO)) as chunks:
        return [text async for chunk in chunks for text in chunk.texts]


async def test_the_next_generation_goes_over_the_connection_in_reserve(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """One is opened beside each generation; the next needs no connecting, and says the same."""
    texts = await generated(llama)
    await fake_engine.until(lambda: fake_engine.connections == 2)
    assert await generated(llama) == texts
    await fake_engine.until(lambda: fake_engine.connections == 3)
    assert [request.path for request in fake_engine.requests] == ["/completion"] * 2
    own, spared = (request.body for request in fake_engine.requests)
    assert own == spared


async def test_nothing_is_sent_before_there_is_a_body(llama: LlamaCpp) -> None:
    """Not even the headers: the engine would hold a thread in the midst of a request, and log its end."""
    got = asyncio.Queue[bytes]()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.put_nowait(b"connected")
        got.put_nowait(await reader.read())
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        adapter = LlamaCpp(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        adapter.keep_spare(True)
        assert await got.get() == b"connected"
        await adapter.close()
        assert await got.get() == b""


async def test_unused_it_is_given_up(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `SPARE_S` its connection is closed; while work waits there is always another."""
    monkeypatch.setattr(spare, "SPARE_S", 0.01)
    await generated(llama)
    await fake_engine.until(lambda: fake_engine.connections == 2 and not fake_engine.open_connections)
    llama.keep_spare(True)
    await fake_engine.until(lambda: fake_engine.connections > 5)
    llama.keep_spare(False)
    await fake_engine.until(lambda: not fake_engine.open_connections)


async def test_it_is_kept_once_however_often_that_is_said(
    llama: LlamaCpp, fake_engine: FakeLlamaServer
) -> None:
    """Every dispatch says it."""
    for _ in range(5):
        llama.keep_spare(True)
    await fake_engine.until(lambda: fake_engine.connections == 1)
    assert await generated(llama)
    assert fake_engine.completions[0].request.headers["transfer-encoding"] == "chunked"
    await fake_engine.until(lambda: fake_engine.connections == 2)


async def test_an_engine_that_hung_up_on_it(llama: LlamaCpp, fake_engine: FakeLlamaServer) -> None:
    """The next generation connects by itself and nobody hears of it."""
    texts = await generated(llama)
    await fake_engine.until(lambda: fake_engine.open_connections == 1)
    await fake_engine.stop()
    await fake_engine.start()
    await asyncio.sleep(0)  # the loop reads the end of the connection in this turn or the next
    await fake_engine.until(lambda: not fake_engine.open_connections)
    assert await generated(llama) == texts


async def test_an_engine_that_is_gone(llama: LlamaCpp, fake_engine: FakeLlamaServer) -> None:
    """A request in reserve that can't connect is no news; the generation says it."""
    await fake_engine.stop()
    llama.keep_spare(True)
    with pytest.raises(EngineFailure, match="nothing listens"):
        await generated(llama)


@pytest.mark.parametrize("turns", range(12))
async def test_a_cancel_at_any_turn_closes_the_connection(
    llama: LlamaCpp, fake_engine: FakeLlamaServer, turns: int
) -> None:
    """Also in the very turn that the answer's headers come: then nobody would own the answer."""

    async def held(connection: Connection) -> None:
        await connection.headers()
        await connection.stall()

    await generated(llama)
    fake_engine.script(held)
    runner = asyncio.create_task(generated(llama))
    await fake_engine.started(2)
    for _ in range(turns):
        await asyncio.sleep(0)
    runner.cancel()
    await asyncio.wait({runner})
    await fake_engine.closed(1)
