"""The features in plain language, each step on a real `llorch serve` in front of a fake engine [MVP-080].

The one rule: engine, child and client share one event loop, which turns only while a step is under way. So a
step that has returned has happened.
"""

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
from pytest_bdd import given, parsers, scenarios, then, when

from llorch.config import env_name
from llorch.selftest import CURE
from tests.fakes import PATIENCE_S, Connection, FakeLlamaServer
from tests.live import Event, EventReader, names, text

ROOT = Path(__file__).parent.parent.parent
TOKEN = "a-token-of-the-features-0123456789"

scenarios(".")


class Answer(NamedTuple):
    """A whole HTTP answer."""

    status: int
    headers: dict[str, str]
    body: dict[str, Any]


class House:
    """An engine, a llorch and a client. `do` runs one coroutine to its end."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self.engine = self.do(_made(FakeLlamaServer))
        self.process: asyncio.subprocess.Process | None = None
        self.session: aiohttp.ClientSession | None = None
        self.log: list[str] = []
        self.answer = Answer(0, {}, {})
        self.tasks: dict[str, dict[str, Any]] = {}
        self.events: list[Event] = []
        self.stream: EventReader | None = None
        self.runs: list[bytes] = []

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """What `work` returns, within a patient time."""

        async def within() -> Any:
            async with asyncio.timeout(PATIENCE_S):
                return await work

        return self._runner.run(within())

    # -- llorch ------------------------------------------------------------------------------------

    def start(self, **settings: Any) -> None:
        """Start llorch with these settings, by their dotted keys with `__` for the dot."""
        self.do(self.engine.start())
        given = {"bind_addr": "127.0.0.1:0", "gpu.required": False, "adapter.endpoint": self.engine.url}
        given |= {"adapter.slots": 2, "adapter.self_test": False, "shutdown.grace_s": 0.1}
        given |= {key.replace("__", "."): value for key, value in settings.items()}
        env = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
        env |= {env_name(key): json.dumps(value).strip('"') for key, value in given.items()}
        self.process = self.do(
            asyncio.create_subprocess_exec(
                *[sys.executable, "-m", "llorch", "serve", "--config", os.devnull],
                cwd=ROOT,
                env=env,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        )

    def listen(self, **settings: Any) -> None:
        """Start llorch, and return once it listens."""
        self.start(**settings)
        line = self.logged(lambda line: line["msg"].startswith("llorch "))
        port = line["msg"].partition("http://")[2].partition(",")[0].rpartition(":")[2]
        self.session = self.do(_made(aiohttp.ClientSession, f"http://127.0.0.1:{port}"))

    def logged(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The next line of the log that is wanted."""

        async def read() -> dict[str, Any]:
            async for line in self.process.stdout:
                self.log.append(line.decode())
                if wanted(entry := json.loads(line)):
                    return entry
            raise AssertionError(f"llorch ended: {self.log}")

        return self.do(read())

    def exit_code(self) -> int:
        """How llorch ends; what it said is in the log."""

        async def end() -> int:
            async for line in self.process.stdout:
                self.log.append(line.decode())
            return await self.process.wait()

        try:
            return self.do(end())
        except TimeoutError:
            self.process.kill()
            return self.do(end())

    def close(self) -> None:
        """Stop all of it."""
        if self.session is not None:
            self.do(self.session.close())
        if self.process is not None:
            if self.process.returncode is None:
                self.process.terminate()
            assert self.exit_code() in (0, 78), self.log
        self.do(self.engine.__aexit__())

    # -- requests ----------------------------------------------------------------------------------

    def ask(self, method: str, path: str, **options: Any) -> Answer:
        """One request and its answer."""

        async def asked() -> Answer:
            async with self.session.request(method, path, **options) as response:
                return Answer(response.status, dict(response.headers), await response.json())

        return self.do(asked())

    def hand_in(self, name: str = "last", token: str | None = None, **task: Any) -> None:
        """Submit a task; if it is admitted, it is `tasks[name]` and the last one."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.answer = self.ask("POST", "/v1/tasks", json={"prompt": "hello", **task}, headers=headers)
        if self.answer.status == 202:
            self.tasks[name] = self.tasks["last"] = self.answer.body

    def whole_stream(self, name: str = "last") -> bytes:
        """The stream of a task to its end, as it comes; its events are in `events`."""

        async def read() -> bytes:
            async with self.session.get(self.tasks[name]["stream_url"]) as response:
                assert response.status == 200
                return await response.read()

        said = self.do(read())
        self.events = [_event(block) for block in said.decode().split("\n\n") if block.startswith("id:")]
        return said

    def run(self, **task: Any) -> None:
        """Run a task to its end, and keep the bytes of its tokens."""
        self.hand_in(**task)
        assert self.answer.status == 202, self.answer.body
        blocks = self.whole_stream().split(b"\n\n")
        self.runs.append(b"".join(block for block in blocks if b"event: token" in block))

    def pool(self) -> dict[str, Any]:
        """How the pool is."""
        return self.ask("GET", "/v1/pools/default/health").body

    def pool_when(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """How the pool is once it is as wanted: asked again and again, for no event tells."""

        async def asked() -> dict[str, Any]:
            while True:
                async with self.session.get("/v1/pools/default/health") as response:
                    if wanted(pool := await response.json()):
                        return pool

        return self.do(asked())

    @property
    def working(self) -> Connection:
        """The engine's side of the task it works on."""
        return self.do(self.engine.started(len(self.engine.completions) or 1))


async def _made(kind: Callable[..., Any], *arguments: Any) -> Any:
    """An object that wants a running loop when it is made."""
    return kind(*arguments)


def _event(block: str) -> Event:
    fields = dict(line.split(": ", 1) for line in block.split("\n"))
    return Event(int(fields["id"]), fields["event"], json.loads(fields["data"]))


@pytest.fixture
def house() -> Iterator[House]:
    """Nothing runs in it yet; everything is stopped afterwards."""
    with asyncio.Runner() as runner:
        house = House(runner)
        yield house
        house.close()


# -- given -----------------------------------------------------------------------------------------


@given("an engine")
def an_engine(house: House) -> None:
    """It has two slots and answers by itself."""


@given("an engine with one slot, which says what it is told")
def a_told_engine(house: House) -> None:
    """The scenario says what it says."""
    house.engine.slots, house.engine.hold = 1, True


@given("an engine that is loading its model")
def a_loading_engine(house: House) -> None:
    """It answers 503 for now."""
    house.engine.health = "loading"


@given("an engine that heeds no seed")
def a_fickle_engine(house: House) -> None:
    """Each answer is another."""

    async def fickle(connection: Connection) -> None:
        for _ in range(connection.request.body["n_predict"]):
            await connection.token(f" {os.urandom(4).hex()}")
        await connection.final("limit")

    house.engine.always(fickle)


@given("a llorch")
def a_llorch(house: House) -> None:
    """With what is built in."""
    house.listen()


@given("a llorch with room for one waiting task")
def a_small_llorch(house: House) -> None:
    """One runs, one waits."""
    house.listen(adapter__slots=1, queue__capacity=1)


@given("a llorch that tests its engine")
def a_testing_llorch(house: House) -> None:
    """The self-test is done when this is."""
    house.listen(adapter__self_test=True)
    house.pool_when(lambda pool: pool["determinism"] != "unknown")


@given(parsers.re(r"a llorch on (?P<host>\S+) with a token(?P<optional>, optional on loopback)?"))
def a_llorch_with_token(house: House, host: str, optional: str | None) -> None:
    """Every request needs it, or none from here."""
    house.listen(bind_addr=f"{host}:0", auth__token=TOKEN, auth__optional=bool(optional))


@given("a task that runs")
def a_running_task(house: House) -> None:
    """The engine has it."""
    house.hand_in("runs")
    house.do(house.engine.started(1))


@given("a task that waits")
def a_waiting_task(house: House) -> None:
    """No slot is free for it."""
    house.hand_in("waits")
    assert house.ask("GET", f"/v1/tasks/{house.tasks['waits']['task_id']}").body["state"] == "queued"


@given(parsers.parse('an open stream that has shown "{word}"'))
def an_open_stream(house: House, word: str) -> None:
    """The reader has the token, and stays."""

    async def shown() -> Event | None:
        response = await house.session.get(house.tasks["runs"]["stream_url"])
        house.stream = EventReader(response)
        await house.stream.next()
        return await house.stream.next()

    house.do(house.working.token(word))
    assert house.do(shown()).data == {"t": word, "i": 0}


# -- when ------------------------------------------------------------------------------------------


@when("I hand in a task")
@when("I hand in a task without a token")
def hand_in(house: House) -> None:
    """Whatever the answer is."""
    house.hand_in()


@when("I hand in a task with the right token")
def hand_in_with_token(house: House) -> None:
    """As a client that knows it."""
    house.hand_in(token=TOKEN)


@when("I hand in a task with a wrong token")
def hand_in_with_wrong_token(house: House) -> None:
    """Of the right length, and one character off."""
    house.hand_in(token=TOKEN[:-1] + "X")


@when(parsers.parse("I hand in a task with seed {seed:d}"))
def hand_in_seeded(house: House, seed: int) -> None:
    """That makes it strict."""
    house.hand_in(seed=seed)


@when("I run a task without a seed")
def run(house: House) -> None:
    """To its end."""
    house.run(max_tokens=5)


@when(parsers.re(r"I run a task with seed (?P<seed>\d+)(?: again)?"))
def run_seeded(house: House, seed: str) -> None:
    """To its end."""
    house.run(max_tokens=5, seed=int(seed))


@when(parsers.re("I cancel the task that (?P<name>runs|waits)"))
def cancel(house: House, name: str) -> None:
    """It is the last one spoken of from here on."""
    house.tasks["last"] = house.tasks[name]
    answer = house.ask("POST", house.tasks[name]["cancel_url"])
    assert (answer.status, answer.body["state"]) == (200, "cancelled")


@when(parsers.parse('the engine says "{first}" and then "{second}"'))
def engine_says(house: House, first: str, second: str) -> None:
    """One token each."""
    for word in (first, second):
        house.do(house.working.token(word))


@when("the engine is done")
def engine_done(house: House) -> None:
    """It has nothing more to say."""
    house.do(house.working.finish("eos"))


@when("the engine has loaded its model")
def engine_loaded(house: House) -> None:
    """From now on it answers."""
    house.engine.health = "ok"


@when("the engine is killed")
def engine_killed(house: House) -> None:
    """As by SIGKILL: every connection is reset, new ones are refused."""
    house.do(house.engine.kill())


@when("the engine is started again")
def engine_started(house: House) -> None:
    """On the same port."""
    house.do(house.engine.start())


@when("I start a llorch on 0.0.0.0 without a token")
def start_in_the_open(house: House) -> None:
    """Whatever comes of it."""
    house.start(bind_addr="0.0.0.0:0")


# -- then ------------------------------------------------------------------------------------------


@then(parsers.parse("it is admitted at place {place:d}"))
def admitted(house: House, place: int) -> None:
    """So many wait before it."""
    assert house.answer.status == 202, house.answer.body
    assert house.answer.body["queue_position"] == place


@then(parsers.parse("it is refused with {status:d} {code}"))
def refused(house: House, status: int, code: str) -> None:
    """In the envelope of every error."""
    assert (house.answer.status, house.answer.body["code"]) == (status, code)
    assert house.answer.body["message"]


@then("the refusal is retriable, by the policy reject")
def retriable(house: House) -> None:
    """A client knows what to do."""
    assert house.answer.body["retriable"] is True
    assert house.answer.body["policy_label"] == "reject"


@then("body and headers say the same backoff")
def same_backoff(house: House) -> None:
    """In milliseconds, and in whole seconds rounded up."""
    wait_ms = house.answer.body["retry_after_ms"]
    assert wait_ms > 0
    assert house.answer.headers["X-Backoff-Ms"] == str(wait_ms)
    assert house.answer.headers["Retry-After"] == str(-(-wait_ms // 1000))


@then("the refusal asks for a bearer token")
def challenged(house: House) -> None:
    """As HTTP has it."""
    assert house.answer.headers["WWW-Authenticate"] == "Bearer"


@then("the refusal says how llama-server has to be started")
def cure_told(house: House) -> None:
    """The flags that mend it."""
    assert house.answer.body["hint"] == CURE


@then(parsers.parse("its stream is: {wanted}"))
def stream_is(house: House, wanted: str) -> None:
    """To a reader from the start."""
    house.whole_stream()
    assert names(house.events) == wanted.replace(",", "")


@then(parsers.parse('its text is "{wanted}"'))
def text_is(house: House, wanted: str) -> None:
    """Its tokens, joined."""
    assert text(house.events) == wanted


@then(parsers.parse("its end says cancelled after {tokens:d} tokens"))
def end_says(house: House, tokens: int) -> None:
    """The same count as the answer to the cancel."""
    end = house.events[-1].data
    assert (end["finish_reason"], end["tokens_out"]) == ("cancelled", tokens)


@then("the open stream shows nothing but the end")
def only_the_end(house: House) -> None:
    """No token after the cancel, to a reader who was there before."""
    assert names(house.do(house.stream.rest())) == "end"


@then(parsers.parse("the open stream shows the error {code}, which is retriable"))
def stream_error(house: House, code: str) -> None:
    """And then it is closed."""
    (error,) = house.do(house.stream.rest())
    assert (error.name, error.data["code"], error.data["retriable"]) == ("error", code, True)


@then("it has completed")
@then("the task that runs has completed")
def completed(house: House) -> None:
    """Its stream ends as it should."""
    name = "runs" if "runs" in house.tasks else "last"
    house.whole_stream(name)
    assert house.events[-1].name == "end"
    assert house.events[-1].data["finish_reason"] in ("stop", "length")


@then("the engine's work is broken off")
def broken_off(house: House) -> None:
    """Its connection has been closed."""
    house.do(house.engine.closed(1))


@then("the engine was never asked")
def never_asked(house: House) -> None:
    """No task came to it."""
    assert house.engine.completions == []


@then("the engine was asked for one task only")
def asked_once(house: House) -> None:
    """The other one never came to it."""
    assert len(house.engine.completions) == 1


@then("the slot comes back")
def slot_back(house: House) -> None:
    """Counted as free once the engine has let go."""
    house.pool_when(lambda pool: not pool["slots"]["busy"] and not pool["slots"]["draining"])
    assert house.engine.busy_slots == 0


@then(parsers.parse('the log has it from "{identity}"'))
def logged_from(house: House, identity: str) -> None:
    """On the line of its admission."""
    entry = house.logged(lambda line: line["event"] == "admitted")
    assert entry["identity"] == identity
    assert entry["job_id"] == house.answer.body["task_id"]


@then("the log has it from the token's fingerprint")
def logged_from_token(house: House) -> None:
    """Six hex digits of its SHA-256."""
    logged_from(house, f"token:{hashlib.sha256(TOKEN.encode()).hexdigest()[:6]}")


@then("the log never has the token itself")
def no_token_in_log(house: House) -> None:
    """To its last line."""
    house.process.terminate()
    assert house.exit_code() == 0
    assert house.log
    assert TOKEN not in "".join(house.log)


@then(parsers.parse("it ends with exit code {code:d}"))
def exit_code_is(house: House, code: int) -> None:
    """By itself."""
    assert house.exit_code() == code


@then(parsers.parse("it says {what} in one line"))
def says(house: House, what: str) -> None:
    """And nothing else."""
    (line,) = house.log
    assert what in line


@then("the pool is live and ready")
def pool_ready(house: House) -> None:
    """From the start: the first probe comes before the first answer."""
    pool = house.pool()
    assert (pool["live"], pool["ready"]) == (True, True)


@then("the pool is live but not ready")
def pool_loading(house: House) -> None:
    """The engine's HTTP answers, its model does not."""
    pool = house.pool()
    assert (pool["live"], pool["ready"]) == (True, False)
    assert pool["last_error"]


@then("the pool becomes ready")
def becomes_ready(house: House) -> None:
    """By itself."""
    assert house.pool_when(lambda pool: pool["ready"]).get("last_error") is None


@then("the pool becomes unready, and says why")
def becomes_unready(house: House) -> None:
    """By itself."""
    pool = house.pool_when(lambda pool: not pool["ready"])
    assert house.engine.url in pool["last_error"]
    assert pool["live"] is False


@then(parsers.parse("it has {slots:d} slots, all free, and nothing waits"))
def slots_are(house: House, slots: int) -> None:
    """Those in force."""
    pool = house.pool()
    assert pool["slots"] == {"total": slots, "busy": 0, "draining": 0}
    assert pool["queue"]["depth"] == 0


@then(parsers.parse('its engine is "{engine}" of version "{version}"'))
def engine_is(house: House, engine: str, version: str) -> None:
    """As it said itself."""
    pool = house.pool()
    assert (pool["engine"], pool["engine_version"]) == (engine, version)


@then(parsers.parse("the pool's determinism is {verdict}"))
def determinism_is(house: House, verdict: str) -> None:
    """By its self-test."""
    pool = house.pool()
    assert (pool["determinism"], pool["ready"]) == (verdict, True)


@then("both gave the same bytes")
def same_bytes(house: House) -> None:
    """The frames of their tokens; those of the other task are others."""
    first, between, second = house.runs
    assert first == second != between
    assert first


@then("the engine had no cache and no company for them")
def alone(house: House) -> None:
    """That is how llama.cpp keeps a seed."""
    seeded = [request.body for request in house.engine.requests if (request.body or {}).get("seed") == 42]
    assert [(body["cache_prompt"], body["id_slot"]) for body in seeded] == [(False, 0)] * 2
    assert house.engine.waited == 0
