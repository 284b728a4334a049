"""An engine in memory that does everything llama.cpp was seen to do wrong, when chance says so."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator
from typing import Any

from llorch.engine import (
    BEGUN,
    Chunk,
    EngineBroken,
    EngineGone,
    EngineInvalidRequest,
    EngineLoading,
    EngineRefused,
    EngineStalled,
    Final,
    Generation,
    Props,
)
from llorch.task import Message

PICK_UP_S = 0.09  # a request may read as idle that long; less than the 100 ms between two looks
LINGER_S = 0.6  # and the engine may compute that long after its client has gone
CTX = 64
VERSIONS = ("b1", "b1", "b1", "b1", "b2")
DIGESTS = (None, None, None, "sha256:a", "sha256:b")

NO_FAULT = "none"
FAULTS = (
    "gone",
    "refused before it was sent",
    "hung up",
    "loading",
    "invalid",
    "broken at once",
    "broken",
    "no final",
    "silent at first",
    "silent",
    "bug",
)


class Run:
    """One request that the engine has: from its last byte until the engine lets go of it."""

    def __init__(self, prompt: str, exclusive: bool) -> None:
        self.prompt = prompt
        self.exclusive = exclusive
        self.picked_up = False
        self.answered = False
        self.killed = asyncio.get_running_loop().create_future()


class SimEngine:
    """Implements `llorch.engine.Engine`; it adds to `violations` what no orchestrator may ever do to it.

    `version`, `digest`: what it is; a restart may make another of it. `over`: the world has ended, and
    looking at a closed engine is no fault any more.
    """

    name = "sim"

    def __init__(self, chance: random.Random, slots: int, fault_rate: float, violations: list[str]) -> None:
        self.chance = chance
        self.slots = slots
        self.fault_rate = fault_rate
        self.fickle = chance.random() < 0.2
        self.ctx = CTX
        self.version = chance.choice(VERSIONS)
        self.digest = chance.choice(DIGESTS)
        self.over = False
        self.state = "up"
        self.runs: set[Run] = set()
        self.sent: list[Generation] = []
        self.answered: set[str] = set()
        self.open: Counter[str] = Counter()
        self.violations = violations
        self.closed = False

    # -- what the world does to it -----------------------------------------------------------------

    def kill(self) -> None:
        """Everything it ran is no more; nobody listens."""
        self.state = "down"
        runs, self.runs = self.runs, set()
        for run in runs:
            if not run.killed.done():
                run.killed.set_result(None)

    def load(self) -> None:
        """It listens, and says that the model is loading; perhaps it will be another one."""
        self.state = "loading"
        self.ctx = self.chance.choice((CTX, CTX * 2))
        self.version = self.chance.choice((self.version, *VERSIONS))
        self.digest = self.chance.choice((self.digest, *DIGESTS))

    def come_up(self) -> None:
        """It is ready."""
        self.state = "up"

    # -- the port ----------------------------------------------------------------------------------

    async def generate(self, generation: Generation) -> AsyncGenerator[Chunk, None]:
        """Stream `prompt:0`, `prompt:1` … with the fault that chance gives this request."""
        self._must_be_open()
        fault = self.chance.choice(FAULTS) if self.chance.random() < self.fault_rate else NO_FAULT
        self.open[generation.prompt] += 1
        run = Run(generation.prompt, exclusive=not generation.cache_prompt)
        finished = False
        try:
            await self._pause()
            self._connect(fault)
            self._take(run)
            self.sent.append(generation)
            await self._or_killed(run, self._pause(), answered=False)
            self._answer(run, fault)
            yield BEGUN
            async for chunk in self._chunks(run, generation, fault):
                if chunk.final is not None:
                    finished = True
                    self.runs.discard(run)
                yield chunk
        finally:
            self.open[generation.prompt] -= 1
            if not finished and run in self.runs:
                self._linger(run)

    def _connect(self, fault: str) -> None:
        if self.state == "down" or fault == "gone":
            if self.state != "down":
                self.kill()
                self.state = "up"  # it was restarted between two looks
            raise EngineGone("nobody listens", sent=False)
        if fault == "refused before it was sent":
            raise EngineRefused("can't connect", sent=False)

    def _take(self, run: Run) -> None:
        if len(self.runs) >= self.slots:
            self.violations.append(f"{len(self.runs) + 1} requests on {self.slots} slots")
        if self.runs and (run.exclusive or any(other.exclusive for other in self.runs)):
            self.violations.append("a strict task is not alone")
        if run.prompt in self.answered and "|" in run.prompt:
            self.violations.append(f"{run.prompt} was sent again after an answer had begun")
        self.runs.add(run)
        asyncio.get_running_loop().call_later(self.chance.uniform(0, PICK_UP_S), self._pick_up, run)

    def _pick_up(self, run: Run) -> None:
        run.picked_up = True

    def _answer(self, run: Run, fault: str) -> None:
        if self.state == "loading" or fault == "loading":
            raise EngineLoading("loading", sent=True)
        if fault == "hung up":
            raise EngineRefused("hung up", sent=True)
        if fault == "invalid":
            self.runs.discard(run)
            raise EngineInvalidRequest("no", sent=False)
        if fault == "bug":
            raise ZeroDivisionError("a bug of ours")
        run.answered = run.picked_up = True  # its headers say so
        self.answered.add(run.prompt)

    async def _chunks(self, run: Run, generation: Generation, fault: str) -> AsyncGenerator[Chunk, None]:
        if fault == "broken at once":
            raise EngineBroken("broken off")
        if fault == "silent at first":
            await self._or_killed(run, asyncio.get_running_loop().create_future())
        count = self.chance.randint(0, 6)
        if run.exclusive and not self.fickle:  # strict work is reproducible
            count = len(run.prompt) % 7
        breaks_at = self.chance.randint(0, count)
        sent = 0
        while sent < count:
            if sent >= breaks_at and fault == "broken":
                raise EngineBroken("broken off")
            if sent >= breaks_at and fault == "silent":
                await self._or_killed(run, asyncio.get_running_loop().create_future())
            size = min(self.chance.choice((0, 1, 1, 2, 4)), count - sent)
            await self._or_killed(run, self._pause())
            texts = [f"{run.prompt}:{index}" for index in range(sent, sent + size)]
            sent += size
            if sent == count and self.chance.random() < 0.5 and fault == NO_FAULT:
                yield Chunk(texts, Final("length", count, 1))
                return
            yield Chunk(texts)
        if fault != "no final":
            await self._or_killed(run, self._pause())
            yield Chunk([], Final("stop", count, 1))

    async def _or_killed(self, run: Run, work: Any, *, answered: bool = True) -> None:
        """Do `work` unless the engine is killed meanwhile."""
        work = asyncio.ensure_future(work)
        try:
            await asyncio.wait({work, run.killed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
        if run.killed.done():
            raise EngineBroken("broken off") if answered else EngineRefused("hung up", sent=True)

    def _linger(self, run: Run) -> None:
        """The client has gone; the engine notices later."""
        asyncio.get_running_loop().call_later(self.chance.uniform(0.1, LINGER_S), self.runs.discard, run)

    async def tokenize(self, text: str) -> int:
        """One token a character; slow, and sometimes broken."""
        await self._control()
        return len(text)

    async def render(self, messages: tuple[Message, ...]) -> str:
        """The contents, joined."""
        await self._control()
        return "".join(message.content for message in messages)

    async def health(self) -> None:
        """Ready, loading or gone."""
        self._must_be_open()
        await self._control()
        if self.state == "loading":
            raise EngineLoading("loading", sent=False)

    async def props(self) -> Props:
        """Slots, and what a restart may change: context, version and, behind a file, the model."""
        await self._control()
        path = self.digest and "/model.gguf"
        return Props(slots=self.slots, ctx=self.ctx, engine_version=self.version, model_path=path)

    def keep_spare(self, wanted: bool) -> None:
        """Nothing to prepare."""

    async def busy_slots(self) -> int:
        """What was picked up and not let go of yet."""
        self._must_be_open()
        await self._control()
        return sum(run.picked_up for run in self.runs)

    async def _control(self) -> None:
        await self._pause()
        if self.closed:
            raise EngineRefused("the adapter is closed", sent=False)
        if self.state == "down":
            raise EngineGone("nobody listens", sent=False)
        if self.chance.random() < self.fault_rate / 10:
            raise self.chance.choice((EngineStalled, EngineBroken))("a passing fault")

    async def _pause(self) -> None:
        pause_s = self.chance.choice((0.0, 0.0, 0.0, 0.001, 0.01, 0.1))
        if pause_s:
            await asyncio.sleep(pause_s)

    async def model_digest(self, model_path: str) -> str | None:
        """Of its file, some time later."""
        await asyncio.sleep(self.chance.choice((0.0, 0.01, 0.5)))
        return self.digest

    def _must_be_open(self) -> None:
        if self.closed and not self.over:
            self.violations.append("a closed engine is asked")

    async def close(self) -> None:
        """No generator may be open any more."""
        self.closed = True
