"""The attack: one connection per input, several at once, and what each must come to.

The one rule: a connection that is not answered in the time of a few others steps aside and is watched from
there, so that those which the server has to time out cost the others nothing.
"""

import asyncio
import contextlib
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

from tests.fuzz import answers, inputs
from tests.fuzz.answers import Answer, Fault
from tests.fuzz.inputs import Input

ACTIVE = 16  # connections in the midst of an exchange
ASIDE = 400  # and those that the server lets wait
LEAST_PATIENCE_S, PATIENCE_IN_ANSWERS = 0.02, 4  # until then, by how long the last /health took
HEALTH_EVERY_S = 0.05
HEALTH_BOUND_S = 5.0
SETTLE_S = 20.0
MAX_FAILURES = 100  # enough is enough
_RST = struct.pack("ii", 1, 0)
_HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"

Address = tuple[str, int]


class Failure(NamedTuple):
    """What an input brought out, by its index; -1: no input in particular."""

    input: int
    what: str
    sent: bytes = b""
    received: bytes = b""


class Attack:
    """Plays inputs against `address`; `bound_s` is how long a connection may last."""

    def __init__(self, address: Address, seed: int, *, token: bytes = b"", bound_s: float = 6.0) -> None:
        self.address, self.seed, self.token, self.bound_s = address, seed, token, bound_s
        self.failures: list[Failure] = []
        self.outcomes: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.health_ms = [0.0]
        self.played = 0
        self._task_ids: deque[bytes] = deque(maxlen=8)
        self._active = asyncio.Semaphore(ACTIVE)
        self._open = asyncio.Semaphore(ACTIVE + ASIDE)

    # -- the whole -----------------------------------------------------------------------------

    async def play(self, indices: Iterable[int]) -> None:
        """Play these inputs, and ask for health all the while."""
        self._task_ids.append(await self._a_task())
        asking = asyncio.create_task(self._ask_health(), name="health")
        async with asyncio.TaskGroup() as group:
            for index in indices:
                if len(self.failures) >= MAX_FAILURES:
                    break
                await self._open.acquire()
                await self._active.acquire()
                group.create_task(self._play(index), name=f"input-{index}")
        asking.cancel()
        await asyncio.wait({asking})

    async def settle(self) -> None:
        """End every drain, cancel every task, and wait for an empty queue and free slots."""
        for pool in (await self._get("/v1/status"))["pools"]:
            if "drain" in pool:
                await self.ask("POST", f"/v1/pools/{pool['pool_id']}/drain", b'{"cancel": true}')
        await self._cancel_all()
        until = time.monotonic() + SETTLE_S
        while (left := await self._left()) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        if left:
            self.failures.append(Failure(-1, f"left behind once every task was cancelled: {left}"))

    async def fill(self, prompt_bytes: int) -> None:
        """Check that idle pools admit as many tasks as they have slots and places: no place has leaked."""
        for pool in (await self._get("/v1/status"))["pools"]:
            queue = pool["queue"]
            rooms = {
                "interactive": pool["slots"]["total"] + queue["interactive"]["capacity"],
                "batch": queue["batch"]["capacity"],
            }
            for lane, room in rooms.items():
                task = {"prompt": "x" * prompt_bytes, "pool_id": pool["pool_id"], "priority": lane}
                body = msgspec.json.encode(task)
                answered = [(await self.ask("POST", "/v1/tasks", body))[0] for _ in range(room)]
                if answered != [202] * room:
                    what = (
                        f"an idle pool {pool['pool_id']} with room for {room} {lane} tasks answers {answered}"
                    )
                    self.failures.append(Failure(-1, what))
            await self._cancel_all()

    async def _cancel_all(self) -> None:
        for state in ("queued", "running"):
            for task in (await self._get(f"/v1/tasks?limit=1000&state={state}"))["tasks"]:
                await self.ask("POST", f"/v1/tasks/{task['task_id']}/cancel")

    async def _left(self) -> dict[str, int]:
        found = {}
        for pool in (await self._get("/v1/status"))["pools"]:
            counts = {
                "queued": pool["queue"]["depth"],
                "bytes": pool["queue"]["bytes"],
                "busy": pool["slots"]["busy"],
                "draining": pool["slots"]["draining"],
            }
            found |= {f"{pool['pool_id']} {name}": count for name, count in counts.items() if count}
        return found

    async def _a_task(self) -> bytes:
        status, body = await self.ask("POST", "/v1/tasks", b'{"prompt": "the first", "max_tokens": 1}')
        return body["task_id"].encode() if status == 202 else inputs.TASK_ID

    # -- honest requests -----------------------------------------------------------------------

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, Any]:
        """Status and JSON of one good request."""
        reader, writer = await asyncio.open_connection(*self.address)
        try:
            head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{self._fields()}"
            if body:
                head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            writer.write(head.encode() + b"\r\n" + body)
            async with asyncio.timeout(self.bound_s):
                (answer,) = answers.parse(await reader.read(-1), maybe_head=False, closed=True)
        finally:
            writer.close()
        return answer.status, msgspec.json.decode(answer.body) if answer.body else None

    async def _get(self, path: str) -> Any:
        status, body = await self.ask("GET", path)
        if status != 200:
            raise RuntimeError(f"GET {path} answered {status}: {body}")
        return body

    def _fields(self) -> str:
        return f"Authorization: Bearer {self.token.decode()}\r\n" if self.token else ""

    async def _ask_health(self) -> None:
        while True:
            began = time.perf_counter()
            try:
                status, _ = await self.ask("GET", "/health")
                what = "" if status == 200 else f"/health answered {status}"
            except (OSError, TimeoutError, ValueError, Fault) as error:
                what = f"/health was not answered: {error!r}"
            took_s = time.perf_counter() - began
            self.health_ms.append(took_s * 1000)
            if what or took_s > HEALTH_BOUND_S:
                self.failures.append(Failure(-1, what or f"/health took {took_s:.1f} s"))
            await asyncio.sleep(HEALTH_EVERY_S)

    # -- one input -----------------------------------------------------------------------------

    async def _play(self, index: int) -> None:
        given = inputs.make(self.seed, index, self.token)
        pieces = given.pieces(self._task_ids[index % len(self._task_ids)])
        received = bytearray()
        patience_s = max(LEAST_PATIENCE_S, PATIENCE_IN_ANSWERS * self.health_ms[-1] / 1000)
        aside = asyncio.get_running_loop().call_later(patience_s, self._active.release)
        try:
            async with asyncio.timeout(self.bound_s):
                how = await self._converse(given, pieces, received)
        except TimeoutError:
            how = "overdue"
        finally:
            if not self._has_run(aside):
                aside.cancel()
                self._active.release()
            self._open.release()
        try:
            outcome = self._judge(given, bytes(received), how)
        except Fault as fault:
            outcome = "FAULT"
            self.failures.append(Failure(index, str(fault), b"".join(pieces), bytes(received)))
        self.played += 1
        self.kinds[given.kind] += 1
        self.outcomes[outcome] += 1

    def _has_run(self, handle: asyncio.TimerHandle) -> bool:
        return handle.when() <= asyncio.get_running_loop().time()

    async def _converse(self, given: Input, pieces: list[bytes], received: bytearray) -> str:
        """Send and receive; how it ended: left, answered, closed (by the server), reset (by the server)."""
        loop = asyncio.get_running_loop()
        with contextlib.closing(socket.socket()) as sock:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await loop.sock_connect(sock, self.address)
                for piece in pieces:
                    await loop.sock_sendall(sock, piece)
                    if piece is not pieces[-1]:
                        await asyncio.sleep(0)
                if given.ending == "rst":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RST)
                if given.ending in ("rst", "fin"):
                    return "left"
                if given.ending == "half":
                    sock.shutdown(socket.SHUT_WR)
                while block := await loop.sock_recv(sock, 1 << 16):
                    received += block
                    if self._answered(given, received):
                        return "answered"
            except (ConnectionError, OSError):
                return "reset"
        return "closed"

    def _answered(self, given: Input, received: bytearray) -> bool:
        try:
            said = answers.parse(bytes(received), maybe_head=b"HEAD" in given.data, closed=False)
        except Fault:
            return True
        return sum(answer.whole for answer in said) >= given.requests

    def _judge(self, given: Input, received: bytes, how: str) -> str:
        """A word or two on what came back; raises Fault."""
        if how == "overdue":
            raise Fault(f"no end within {self.bound_s:g} s")
        waited = given.ending == "read"
        closed = waited and how == "closed"
        said = answers.parse(received, maybe_head=b"HEAD" in given.data, closed=closed)
        found = [answers.check(answer) for answer in said if answer.whole]
        if closed and said and not said[-1].whole:
            raise Fault(f"the answer is cut off after {len(received)} bytes")
        for answer in said:
            self._remember(answer)
        return found[0] if found else how

    def _remember(self, answer: Answer) -> None:
        if answer.status == 202 and answer.whole:
            self._task_ids.append(msgspec.json.decode(answer.body)["task_id"].encode())
