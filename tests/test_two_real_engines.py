"""Two real llama.cpp servers behind one pool: one dies in mid-answer and comes back, one is reloaded away."""

import asyncio
import contextlib
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import embedded_engine
from tests.fakes import FakeLlamaServer
from tests.live import Live, names, text
from tests.test_reload import reload, write

pytestmark = pytest.mark.real_engine

PATIENCE_S = 120.0


def free_port() -> int:
    """A port that nobody has now; an engine that is started again has to be where it was."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def configured(*urls: str) -> str:
    """A pool of these engines, two slots each."""
    tables = (f'[[pools.default.replicas]]\nendpoint = "{url}"\nslots = 2\n' for url in urls)
    return "queue.capacity = 100\n[pools.default]\n" + "".join(tables)


async def until_ready(live: Live, count: int) -> list[dict[str, Any]]:
    """Return the replicas once so many of them are ready and have shown that seeds hold."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            replicas: list[dict[str, Any]] = (await live.health())["replicas"]
            good = [replica for replica in replicas if replica["determinism"] == "verified"]
            if len(good) == count:
                return replicas
            await asyncio.sleep(0.1)


async def test_two_real_engines(fake_engine: FakeLlamaServer, tmp_path: Path) -> None:
    """A mixed load is shared, the same seed gives the same bytes on both, a death loses nothing that had not
    begun, a reload takes one away under load."""
    ports, file = [free_port(), free_port()], tmp_path / "llorch.toml"
    async with contextlib.AsyncExitStack() as stack:
        first = contextlib.ExitStack()
        stack.callback(first.close)
        urls = [
            await asyncio.to_thread(first.enter_context, embedded_engine(port=ports[0], slots=2)),
            await asyncio.to_thread(stack.enter_context, embedded_engine(port=ports[1], slots=2)),
        ]
        write(file, configured(*urls))
        live = await stack.enter_async_context(Live(fake_engine, file=file))
        await until_ready(live, 2)
        kinds: list[dict[str, Any]] = [{}, {"seed": 7}, {"priority": "batch"}]
        tasks = [await live.submit(prompt="Once", max_tokens=8, **kinds[number % 3]) for number in range(18)]
        events = [await live.events(task) for task in tasks]
        assert all(names(seen).endswith("end") for seen in events)
        assert len({text(seen) for seen in events[1::3]}) == 1
        assert {(await live.snapshot(task))["replica_id"] for task in tasks} == {"default-0", "default-1"}

        long = [await live.submit(prompt="Once", max_tokens=400, seed=number) for number in range(2)]
        waiting = [await live.submit(prompt="Twice", max_tokens=4) for _ in range(6)]
        ran_on = {(await live.snapshot(task))["replica_id"]: task for task in long}
        async with live.stream(ran_on["default-0"]) as stream:
            while (event := await stream.next()) is not None and event.name != "token":
                pass
            await asyncio.to_thread(first.close)
            rest = await stream.rest()
        assert (rest[-1].name, rest[-1].data["code"]) == ("error", "WORKER_RESET")
        assert names(await live.events(ran_on["default-1"])).endswith("end")
        for task in waiting:
            assert names(await live.events(task)).endswith("end")
        assert not (await live.health())["replicas"][0]["ready"]

        await asyncio.to_thread(first.enter_context, embedded_engine(port=ports[0], slots=2))
        await until_ready(live, 2)
        again = await live.submit(prompt="Once", max_tokens=8, seed=7)
        assert text(await live.events(again)) == text(events[1])

        running = [await live.submit(prompt="Once", max_tokens=100) for _ in range(4)]
        later = [await live.submit(prompt="Later", max_tokens=4) for _ in range(4)]
        write(file, configured(urls[1]))
        answer = await reload(live)
        assert (answer.status, answer.body["retired"]) == (200, ["default-0"]), answer.body
        for task in [*running, *later]:
            assert names(await live.events(task)).endswith("end")
