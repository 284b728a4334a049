"""What a waiting task may expect, for readers that ask with `?metrics=1`: when, how often, and what of it."""

import asyncio
import itertools
from typing import Any

import msgspec
import pytest

from llorch import outlook
from llorch.engine import Chunk, Prefill
from llorch.eventlog import EventLog
from llorch.outlook import TICK_S, Metrics, Outlook, Teller
from llorch.streams import _Reader
from llorch.task import Task
from tests.fakes import FakeLlamaServer
from tests.live import Event, EventReader, Live, eventually, names, refused
from tests.memory_engine import Call
from tests.rig import Rig, rig
from tests.virtualtime import advance, current, settled, virtual_time

WANTED = {"params": {"metrics": "1"}}


class Listener:
    """One reader: what it was told and when; `full`: its transport holds something."""

    def __init__(self, built: Rig, task: Task, outlook: Outlook | None = None) -> None:
        self.told: list[tuple[float, Metrics]] = []
        self.full = False
        self.teller = Teller(task, outlook or Outlook(built.orchestrator))
        self.teller.start(self._say)

    def _say(self, frame: bytes) -> bool:
        head, data, *rest = frame.split(b"\n")
        assert (head, rest) == (b"event: metrics", [b"", b""])
        if not self.full:
            said = msgspec.json.decode(data.removeprefix(b"data: "), type=Metrics)
            self.told.append((current().time(), said))
        return not self.full

    @property
    def last(self) -> Metrics:
        """What it was told last."""
        return self.told[-1][1]

    def all(self, field: str) -> list[Any]:
        """Every value that it was told of a field."""
        return [getattr(metrics, field) for _, metrics in self.told]


async def finish(call: Call) -> None:
    """The engine is done with a task, and the next one starts."""
    call.finish("x")
    await settled()


# -- what is said ----------------------------------------------------------------------------------


@virtual_time
async def test_a_waiting_task_hears_of_its_place() -> None:
    """Tasks ahead now and the depth of the queue; null once it has started."""
    async with rig(slots=1) as built:
        _, call = await built.running()
        ahead = [await built.submit() for _ in range(2)]
        task = await built.submit()
        await built.submit()
        listener = Listener(built, task)
        assert listener.last == Metrics(
            queue_position=2,
            predicted_start_ms=None,
            queue_depth=4,
            prompt_tokens=None,
            prompt_tokens_done=None,
        )
        built.cancel(ahead[0])
        await advance(TICK_S)
        assert (listener.last.queue_position, listener.last.queue_depth) == (1, 3)
        await finish(call)
        await advance(TICK_S)
        assert (listener.last.queue_position, listener.last.queue_depth) == (0, 2)
        await finish(built.engine.calls[-1])
        await advance(TICK_S)
        assert (listener.last.queue_position, listener.last.queue_depth) == (None, 1)
        assert listener.all("queue_position") == [2, 1, 0, None]


@virtual_time
async def test_a_promotion_is_a_move() -> None:
    """A batch task goes before an interactive one once it has waited long, though nobody came or went."""
    async with rig(slots=1, batch_promote_s=5.0) as built:
        await built.running()
        batch, interactive = await built.submit(priority="batch"), await built.submit()
        shared = Outlook(built.orchestrator)
        listeners = [Listener(built, task, shared) for task in (batch, interactive)]
        await advance(5 + TICK_S)
        assert [listener.all("queue_position") for listener in listeners] == [[1, 0], [0, 1]]


@virtual_time
async def test_the_predicted_start_is_from_now() -> None:
    """It follows from what was measured, and counts down; a strict task ahead counts whole."""
    async with rig(slots=2) as built:
        (_, first), (_, second) = await built.running(), await built.running()
        await advance(10)
        await finish(first)
        await finish(second)
        for _ in range(2):
            await built.submit()
        strict = await built.submit(seed=1)
        task = await built.submit()
        shared = Outlook(built.orchestrator)
        listeners = [Listener(built, waiting, shared) for waiting in (strict, task)]
        assert [listener.last.predicted_start_ms for listener in listeners] == [10_000, 20_000]
        await advance(4)
        assert [listener.last.predicted_start_ms for listener in listeners] == [6000, 16_000]
        for call in built.engine.calls[-2:]:
            await finish(call)
        await advance(TICK_S)
        assert listeners[0].last.predicted_start_ms is None
        assert listeners[1].last.queue_position == 0


@virtual_time
async def test_a_running_task_hears_how_far_its_prompt_is() -> None:
    """As the engine says it; the newest where it says more than one between two looks."""
    async with rig(slots=1) as built:
        task, call = await built.running()
        listener = Listener(built, task)
        for done in (0, 512, 700):
            call.send(Chunk([], begun=True, prefill=Prefill(900, done)))
            if done != 512:
                await advance(TICK_S)
        assert listener.all("prompt_tokens") == [None, 900, 900]
        assert listener.all("prompt_tokens_done") == [None, 0, 700]


# -- when ------------------------------------------------------------------------------------------


@virtual_time
async def test_nothing_is_said_twice_and_nothing_too_often() -> None:
    """However much happens: at most twice a second, and only what changed."""
    async with rig(slots=1, capacity=100, max_bytes=10_000) as built:
        await built.running()
        task = await built.submit()
        listener = Listener(built, task)
        await advance(10)
        assert len(listener.told) == 1
        for _ in range(40):
            await built.submit()
            await advance(0.1)
        await advance(1)
        times = [at for at, _ in listener.told]
        assert len(times) <= 10
        assert min(later - at for at, later in itertools.pairwise(times)) >= TICK_S - 1e-6
        assert listener.last.queue_depth == 41


@virtual_time
async def test_after_the_first_token_nothing_is_said() -> None:
    """Nor after the end: no timer is left then."""
    async with rig(slots=1) as built:
        task, call = await built.running()
        waiting = await built.submit()
        listeners = [Listener(built, task), Listener(built, waiting)]
        call.say("x")
        await settled()
        built.cancel(waiting)
        told = [len(listener.told) for listener in listeners]
        await built.submit()
        await advance(10)
        assert [len(listener.told) for listener in listeners] == told == [1, 1]
        late = [Listener(built, task), Listener(built, waiting)]
        await advance(10)
        assert [listener.told for listener in late] == [[], []]


@virtual_time
async def test_a_reader_that_leaves_is_told_nothing_more() -> None:
    """`stop` ends it, also before anything was said."""
    async with rig(slots=1) as built:
        await built.running()
        task = await built.submit()
        listener = Listener(built, task)
        listener.teller.stop()
        await built.submit()
        await advance(10)
        assert len(listener.told) == 1
        Teller(task, Outlook(built.orchestrator)).stop()


@virtual_time
async def test_a_full_transport_gets_the_newest_later() -> None:
    """What could not be said is not remembered as said."""
    async with rig(slots=1) as built:
        await built.running()
        task = await built.submit()
        listener = Listener(built, task)
        listener.full = True
        await built.submit()
        await advance(10)
        assert len(listener.told) == 1
        listener.full = False
        await advance(TICK_S)
        assert listener.all("queue_depth") == [1, 2]


@virtual_time
async def test_many_readers_share_one_walk_of_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand looks at a queue that does not change cost one; at one that does, ten a second."""
    walks = 0
    places = outlook._Places

    def counted(*args: Any) -> Any:
        nonlocal walks
        walks += 1
        return places(*args)

    monkeypatch.setattr(outlook, "_Places", counted)
    async with rig(slots=1, capacity=200, max_bytes=100_000) as built:
        await built.running()
        tasks = [await built.submit() for _ in range(50)]
        shared = Outlook(built.orchestrator)
        for _ in range(20):
            assert [shared.of(task).queue_position for task in tasks] == list(range(50))
        assert walks == 1
        for _ in range(100):
            await built.submit()
            await advance(0.01)
            shared.of(tasks[0])
        assert 1 < walks <= 12


# -- over HTTP -------------------------------------------------------------------------------------


async def until(stream: EventReader, **wanted: Any) -> dict[str, Any]:
    """The first metrics event that says all of this; no other event may come before it."""
    while True:
        event = await stream.next()
        assert event is not None
        assert event.name == "metrics", event
        if event.data.items() >= wanted.items():
            return event.data


async def test_a_reader_of_a_full_queue_sees_it_move(fake_engine: FakeLlamaServer) -> None:
    """`started`, its place as it moves, the prompt's progress, then tokens and `end`, with ids as ever."""
    fake_engine.hold = True
    async with Live(fake_engine, {"adapter": {"slots": 1}, "queue": {"capacity": 3}}) as live:
        first, second, third, last = [
            await live.submit_held(),
            *[await live.submit(prompt="one two three four") for _ in range(3)],
        ]
        assert (await live.post()).status == 429
        async with live.stream(last, **WANTED) as stream, live.stream(last) as plain:
            assert await stream.next() == Event(0, "started", {"queue_position": 2})
            nothing = {"prompt_tokens": None, "prompt_tokens_done": None, "predicted_start_ms": None}
            assert await until(stream) == {"queue_position": 2, "queue_depth": 3, **nothing}
            await live.cancel(second)
            assert await until(stream, queue_position=1) == {"queue_position": 1, "queue_depth": 2, **nothing}
            await live.cancel(third)
            await until(stream, queue_position=0, queue_depth=1)
            await live.cancel(first)
            await until(stream, queue_position=None, queue_depth=0, prompt_tokens=None)
            engine = await fake_engine.started(2)
            for done in (0, 512, 1100):
                await engine.progress(done, 1100)
                await until(stream, prompt_tokens=1100, prompt_tokens_done=done, queue_position=None)
            await engine.token("a")
            assert await stream.next() == Event(1, "token", {"t": "a", "i": 0})
            await engine.finish()
            rest = await stream.rest()
            assert names(rest) == "end"
            assert rest[0].id == 2
            assert names(await plain.rest()) == "started token end"
        assert names(await live.events(last, **WANTED)) == "started token end"


async def test_the_bytes_of_a_metrics_event(fake_engine: FakeLlamaServer) -> None:
    """No `id`, so that resuming is not disturbed; and a reader that does not ask gets none of it."""
    fake_engine.hold = True
    async with Live(fake_engine) as live:
        task = await live.submit_held()

        async def body(query: str) -> bytes:
            request = f"GET {task['stream_url']}{query} HTTP/1.0\r\nHost: localhost\r\n\r\n"
            return (await live.raw(request.encode())).partition(b"\r\n\r\n")[2]

        readers = [asyncio.create_task(body(query)) for query in ("?metrics=1", "", "?metrics=0")]
        await eventually(lambda: live.orchestrator.reader_count == 3, "they do not read")
        await fake_engine.held[0].token("a")
        await fake_engine.held[0].finish()
        asked, *others = [await reader for reader in readers]
        started, metrics, *rest = asked.split(b"\n\n")
        assert metrics == (
            b'event: metrics\ndata: {"queue_position":null,"predicted_start_ms":null,"queue_depth":0,'
            b'"prompt_tokens":null,"prompt_tokens_done":null}'
        )
        assert others == [b"\n\n".join([started, *rest])] * 2


async def test_a_resumed_reader_that_still_waits_gets_metrics(fake_engine: FakeLlamaServer) -> None:
    """After `started`, at once; one that has seen tokens gets none."""
    fake_engine.hold = True
    async with Live(fake_engine) as live:
        task = await live.submit_held()
        async with live.stream(task, 0, **WANTED) as stream:
            await until(stream, queue_position=None)
            await fake_engine.held[0].token("a")
            assert await stream.next() == Event(1, "token", {"t": "a", "i": 0})
        async with live.stream(task, 0, **WANTED) as stream:
            assert await stream.next() == Event(1, "token", {"t": "a", "i": 0})
            await fake_engine.held[0].finish()
            assert names(await stream.rest()) == "end"


@pytest.mark.parametrize("running", [False, True])
async def test_cancel_keeps_its_promise_to_readers_with_metrics(
    fake_engine: FakeLlamaServer, running: bool
) -> None:
    """After the answer there is `end`, and between it and the close nothing [MVP-032]."""
    fake_engine.hold = True
    async with Live(fake_engine, {"adapter": {"slots": 1}}) as live:
        task = await live.submit_held()
        if not running:
            task = await live.submit()
        async with live.stream(task, **WANTED) as stream:
            await stream.next()
            await until(stream)
            answer = await live.cancel(task)
            assert answer["tokens_out"] == 0
            rest = await stream.rest()
            assert names(rest) == "end"
            assert rest[0].data["finish_reason"] == "cancelled"


class Wire:
    """A transport and its protocol: what was written, and whether it is `full`, `closing`."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.writing_paused = self.closing = False

    def write(self, data: bytes) -> None:
        """Keep it."""
        self.written.append(data)

    def is_closing(self) -> bool:
        """As it was set."""
        return self.closing


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_frame_aside_is_written_only_to_an_empty_transport(chunked: bool) -> None:
    """Never behind what a slow reader has not taken, nor before what the log still has for it [C3]."""
    log, wire = EventLog(), Wire()
    log.append(b"started")
    reader: Any = _Reader(log, 0, wire, wire, chunked=chunked)  # type: ignore[arg-type]
    assert not reader.say(b"too early")
    reader.write()
    wire.writing_paused = True
    assert reader.say(b"aside")
    assert reader.stalled
    await reader.until_noticed()
    assert not reader.say(b"too much")
    reader.stalled = wire.writing_paused = False
    wire.closing = True
    assert not reader.say(b"too late")
    expected = [b"7\r\nstarted\r\n", b"5\r\naside\r\n"] if chunked else [b"started", b"aside"]
    assert wire.written == expected


async def test_nothing_is_written_after_the_end() -> None:
    """Neither a frame aside nor a heartbeat comes behind the terminal event [C3]."""
    log, wire = EventLog(), Wire()
    reader: Any = _Reader(log, 0, wire, wire, chunked=False)  # type: ignore[arg-type]
    log.watch(reader.changed)
    reader.ping_every(0.0)
    log.seal(b"end")
    reader.write()
    assert reader.ended
    assert not reader.say(b"too late")
    for _ in range(3):
        await asyncio.sleep(0)  # the heartbeat is due
    reader.stop()
    assert wire.written == [b"end"]


@pytest.mark.parametrize("value", ["", "2", "true", "yes", "%00", "01"])
async def test_a_value_that_asks_for_nothing_we_know(fake_engine: FakeLlamaServer, value: str) -> None:
    """400 that names the parameter."""
    async with Live(fake_engine) as live:
        task = await live.submit(max_tokens=1)
        answer = await live.get(f"{task['stream_url']}?metrics={value}")
        refused(live, answer, 400, "INVALID_PARAMS", retriable=False)
        assert answer.body["message"].startswith("?metrics: expected 0 or 1, got ")
