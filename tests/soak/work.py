"""What the clients do: each task is submitted, followed in one of several ways, and checked.

The one rule: whatever else happens to a task, somebody reads it from the start to the terminal event, and
what was read is held against the contract.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from tests.fuzz.answers import ENDS, Event, Fault, check_events
from tests.soak.client import Client, Stream, stream

RETRIABLE = {"WORKER_RESET", "POOL_UNAVAILABLE", "DECODE_TIMEOUT", "QUEUE_TIMEOUT"}
REFUSED = {429: "ADMISSION_REJECT", 503: "POOL_UN"}
MAX_FAULTS = 40
SMALL_BUFFER_BYTES = 2048
SLOW_S = 0.01
LONG_TOKENS = 64  # of a task that is to be cancelled on its way
SEEDED_EVERY, SEEDED_IN = 300, 15  # of so many tasks the last so many are often seeded: each runs alone
SEEDED = 0.3
BATCH = 0.25

Way = Callable[["Work", "Job"], Awaitable[list[Event]]]


class Job:
    """One admitted task: who asks, with what dice, and what the 202 said."""

    def __init__(self, client: Client, chance: random.Random, created: dict[str, Any]) -> None:
        self.client, self.chance, self.created = client, chance, created
        self.path: str = created["stream_url"]
        self.cancelled: dict[str, Any] | None = None  # what the first cancel was answered


class Work:
    """All tasks of one soak against `address`, and what became of them."""

    def __init__(
        self,
        address: tuple[str, int],
        seed: int,
        *,
        max_tokens: int,
        errors_expected: bool,
        ends_within_s: float,
    ) -> None:
        self.address, self.seed, self.max_tokens = address, seed, max_tokens
        self.errors_expected = errors_expected
        self.ends_within_s = ends_within_s
        self.admitted = 0
        self.done = 0
        self.ended: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.ways: Counter[str] = Counter()
        self.faults: list[str] = []
        self.lost = 0
        self._texts: dict[str, list[Event]] = {}

    async def worker(self, indices: "list[int]") -> None:
        """Take tasks from the end of `indices` until there are none."""
        client = Client(self.address)
        while indices and len(self.faults) < MAX_FAULTS:
            await self._one(client, indices.pop())
        client.close()

    async def _one(self, client: Client, index: int) -> None:
        chance = random.Random((self.seed << 48) + index)
        seeded = index % SEEDED_EVERY >= SEEDED_EVERY - SEEDED_IN and chance.random() < SEEDED
        (way,) = chance.choices(WAYS, WEIGHTS)
        body = self._body(chance, seeded)
        if way is cancelled_midway:
            body["max_tokens"] = LONG_TOKENS
        job = None
        try:
            async with asyncio.timeout(self.ends_within_s):
                job = Job(client, chance, await self._submit(client, body))
                self.admitted += 1
                events = await way(self, job)
            self._check(job, events)
            if seeded:
                self._check_text(str(body), events)
        except (Fault, OSError, asyncio.IncompleteReadError) as error:
            self.faults.append(f"task {index} ({way.__name__}): {error!r}")
            self.lost += job is not None
            client.close()
        self.done += 1
        self.ways[f"{way.__name__}{', seeded' if seeded else ''}"] += 1

    def _body(self, chance: random.Random, seeded: bool) -> dict[str, Any]:
        words = chance.randrange(5) if seeded else chance.randrange(10**9)
        body: dict[str, Any] = {"prompt": f"Count from {words} on:", "max_tokens": self.max_tokens}
        if seeded:
            return body | {"seed": chance.randrange(3)}
        lane = {"priority": "batch"} if chance.random() < BATCH else {}
        return body | {"max_tokens": chance.randint(1, self.max_tokens)} | lane

    async def _submit(self, client: Client, body: dict[str, Any]) -> dict[str, Any]:
        """The 202; refusals are waited out, as they ask for."""
        while True:
            reply = await client.ask("POST", "/v1/tasks", body)
            said: dict[str, Any] = reply.body
            if reply.status == 202:
                return said
            if not str(said.get("code")).startswith(REFUSED.get(reply.status, "never")):
                raise Fault(f"POST answered {reply.status} {said}")
            wait_ms = said["retry_after_ms"]
            if int(reply.headers["retry-after"]) * 1000 < wait_ms:
                raise Fault(f"Retry-After is shorter than {wait_ms} ms")
            self.refused[f"{reply.status} {said['code']}"] += 1
            await asyncio.sleep(wait_ms / 1000)

    # -- checks --------------------------------------------------------------------------------

    def _check(self, job: Job, events: list[Event]) -> None:
        check_events(events)
        if events[0].name != "started":
            raise Fault(f"the first event was {events[0]}")
        end = events[-1]
        how = end.data["finish_reason"] if end.name == "end" else end.data["code"]
        self.ended[how] += 1
        if end.name == "error" and (not self.errors_expected or how not in RETRIABLE):
            raise Fault(f"ended with {end.data}")
        if job.cancelled is None:
            if how == "cancelled":
                raise Fault("cancelled by nobody")
            return
        tokens_out = job.cancelled["tokens_out"]
        late = [event for event in events if event.name == "token" and event.data["i"] >= tokens_out]
        if job.cancelled["state"] == "cancelled" and (late or how != "cancelled"):
            raise Fault(f"after the cancel with {tokens_out} tokens came {late}, then {end.data}")

    def _check_text(self, what: str, events: list[Event]) -> None:
        if events[-1].data.get("finish_reason") in ("stop", "length"):
            tokens = [event for event in events if event.name == "token"]
            if self._texts.setdefault(what, tokens) != tokens:
                raise Fault(f"another text for {what}")

    # -- what the ways share -------------------------------------------------------------------

    async def read(self, job: Job, *, slow: bool = False) -> list[Event]:
        """Every event, from the start."""
        buffer_bytes = SMALL_BUFFER_BYTES if slow else 0
        async with stream(self.address, job.path, buffer_bytes=buffer_bytes) as reader:
            events = []
            async for event in self.opened(reader):
                events.append(event)
                if slow:
                    await asyncio.sleep(SLOW_S)
        return events

    def opened(self, reader: Stream) -> Stream:
        """`reader`, which must have been let in."""
        if reader.status != 200:
            raise Fault(f"the stream answered {reader.status}")
        return reader

    async def cancel(self, job: Job) -> dict[str, Any]:
        """What the cancel is answered; the first of a task decides."""
        status, _, said = await job.client.ask("POST", job.created["cancel_url"])
        if status != 200:
            raise Fault(f"the cancel answered {status} {said}")
        if job.cancelled not in (None, said):
            raise Fault(f"a second cancel says {said}, the first said {job.cancelled}")
        job.cancelled = said
        return job.cancelled


# -- the ways --------------------------------------------------------------------------------------


async def plain(work: Work, job: Job) -> list[Event]:
    """Read it all."""
    return await work.read(job)


async def slow(work: Work, job: Job) -> list[Event]:
    """Read it all, slowly, with little room in the socket."""
    return await work.read(job, slow=True)


async def checked(work: Work, job: Job) -> list[Event]:
    """Read it all; the snapshot says the same, and there is nothing to resume."""
    events = await work.read(job)
    end = events[-1]
    snapshot = (await job.client.ask("GET", f"/v1/tasks/{job.created['task_id']}")).body
    if end.name == "end" and (
        snapshot["tokens_out"] != end.data["tokens_out"]
        or snapshot["finish_reason"] != end.data["finish_reason"]
    ):
        raise Fault(f"the snapshot is {snapshot}, the end was {end}")
    async with stream(work.address, job.path, after=end.id) as reader:
        if reader.status != 204:
            raise Fault(f"a reader past the end is answered {reader.status}")
    return events


async def cancelled_at_once(work: Work, job: Job) -> list[Event]:
    """Cancel it right after it was admitted, wherever it is by then, twice."""
    reading = asyncio.create_task(work.read(job), name="full-reader")
    try:
        await work.cancel(job)
        await work.cancel(job)
    finally:
        await asyncio.wait({reading})
    return reading.result()


async def cancelled_midway(work: Work, job: Job) -> list[Event]:
    """Cancel it after its first tokens; a reader that comes then gets none of them."""
    tokens = job.chance.randint(0, work.max_tokens)
    events: list[Event] = []
    async with stream(work.address, job.path) as reader:
        async for event in work.opened(reader):
            events.append(event)
            if job.cancelled is None and (event.name in ENDS or len(events) > tokens):
                said = await work.cancel(job)
                if said["state"] == "cancelled":
                    again = [event.name for event in await work.read(job)]
                    if again != ["started", "end"]:
                        raise Fault(f"a reader after the cancel got {again}")
    return events


async def cancelled_after(work: Work, job: Job) -> list[Event]:
    """Cancel it when it has ended: nothing changes."""
    events = await work.read(job)
    said = await work.cancel(job)
    if said["state"] not in ("completed", "failed"):
        raise Fault(f"cancelled after its end, it is {said}")
    job.cancelled = None
    return events


async def vanishing(work: Work, job: Job) -> list[Event]:
    """One reader dies in the middle; another reads it all."""
    count = job.chance.randint(1, work.max_tokens)
    async with stream(work.address, job.path) as reader:
        async for _ in work.opened(reader):
            count -= 1
            if not count:
                reader.reset()
                break
    return await work.read(job)


async def resumed(work: Work, job: Job) -> list[Event]:
    """Read it in pieces, each from where the last one was left."""
    events: list[Event] = []
    while not events or events[-1].name not in ENDS:
        count = job.chance.randint(1, 3)
        after = events[-1].id if events else None
        async with stream(work.address, job.path, after=after) as reader:
            async for event in work.opened(reader):
                events.append(event)
                count -= 1
                if not count:
                    break
    return events


WAYS: list[Way] = [
    plain,
    slow,
    checked,
    cancelled_at_once,
    cancelled_midway,
    cancelled_after,
    vanishing,
    resumed,
]
WEIGHTS = (55, 5, 8, 8, 5, 3, 8, 8)
