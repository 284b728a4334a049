"""What scripts/bench measures: a scenario is one function of a peer, giving one number for each column.

The one rule: within a round every peer does the same work, one after another, on the same engine.
"""

import itertools
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench_peers import (
    DIRECT,
    HAPROXY_PEER,
    LLORCH,
    LLORCH_UVLOOP,
    NGINX_PEER,
    RELAY,
    Loading,
    Peer,
    Stage,
    Target,
    run_load,
)
from plain_http import Client

ENDLESS = 4000  # tokens: more than any window sees; the engine ends the answer when it is told to
NEVER_S = 3600.0
SETTLE_S = 0.3
MOST_TO_FILL = 100

Numbers = dict[str, float]


@dataclass(frozen=True)
class Size:
    """How much is done: `share` of the full time and number, and which levels."""

    share: float
    streams: tuple[int, ...]
    readers: tuple[int, ...]
    deep: int
    clients: int

    def count(self, full: int) -> int:
        """So many of `full`, 10 at least."""
        return max(int(full * self.share), 10)


FULL = Size(1.0, (16, 256), (1, 10, 100, 1000), 10_000, 1000)
QUICK = Size(0.1, (16, 128), (1, 100), 1000, 200)


@dataclass(frozen=True)
class Scenario:
    """`less_direct`: what the engine alone takes is taken off. `plain` ones have no ratio."""

    title: str
    note: str
    run: Callable[[Stage, Peer, Size], Numbers]
    peers: tuple[Peer, ...]
    less_direct: bool = False
    plain: tuple[str, ...] = ()


# -- what a token costs ----------------------------------------------------------------------------


def window(stage: Stage, target: Target, seconds: float) -> float:
    """The CPU that the target takes for a token of the engine's, in microseconds."""
    if target.process is None:
        raise ValueError("the engine itself has no CPU to tell")
    time.sleep(SETTLE_S)
    cpu, tokens = target.process.cpu_us(), stage.ask("state")["tokens"]
    time.sleep(seconds)
    cpu, tokens = target.process.cpu_us() - cpu, stage.ask("state")["tokens"] - tokens
    return float(cpu / max(tokens, 1))


def paced(stage: Stage, peer: Peer, size: Size) -> Numbers:
    """N streams at a model's pace, in a window without set-up."""
    target, found = stage.target(peer), {}
    for count in size.streams:
        stage.set(rate=100.0 if count < 100 else 16.0, first_s=0.05)
        with Loading(target, conns=count, requests=count, tokens=ENDLESS) as loading:
            stage.until_busy(count)
            found[f"{count} streams"] = window(stage, target, max(2.5 * size.share, 0.4))
            stage.ask("finish")
            expect(loading.result(), ok=count)
    return found


def flood(stage: Stage, peer: Peer, size: Size) -> Numbers:
    """Short answers as fast as they come: what a token costs, connection and all."""
    target, found = stage.target(peer), {}
    assert target.process is not None
    for count in (1, *size.streams):
        stage.set()
        requests = max(size.count(400), count)
        cpu = target.process.cpu_us()
        seen = expect(run_load(target, conns=count, requests=requests, tokens=200), ok=requests)
        found[f"{count} stream{'s' if count > 1 else ''}"] = (target.process.cpu_us() - cpu) / max(
            seen["tokens"], 1
        )
    return found


def fanout(stage: Stage, peer: Peer, size: Size) -> Numbers:
    """One task and its readers: CPU for each token and reader."""
    target, found = stage.target(peer), {}
    for count in size.readers:
        stage.set(rate={1: 100.0, 10: 100.0, 100: 40.0}.get(count, 5.0), first_s=0.5 + count / 500)
        path = post(target, "/v1/tasks", prompt="x", max_tokens=ENDLESS)["stream_url"]
        with Loading(target, mode="sub", path=path, conns=count, requests=count) as loading:
            time.sleep(0.5 + count / 500)
            found[f"{count:,} reader{'s' if count > 1 else ''}"] = (
                window(stage, target, max(3 * size.share, 1.0)) / count
            )
            stage.ask("finish")
            expect(loading.result(), ok=count)
    return found


# -- how long things take --------------------------------------------------------------------------


def first_token(stage: Stage, peer: Peer, size: Size) -> Numbers:
    """From the first byte of the request to the first token, where nothing else runs."""
    stage.set(first_s=0.005)
    count = size.count(300)
    seen = expect(run_load(stage.target(peer), requests=count, tokens=4), ok=count)
    return {"p50": seen["first_us"]["p50"], "p99": seen["first_us"]["p99"]}


def gap(stage: Stage, peer: Peer, size: Size) -> Numbers:
    """From the last byte of an answer to the arrival of the next request, with eight waiting."""
    target, count = stage.target(peer, "one"), size.count(120)
    stage.set(rate=250.0, first_s=0.004)
    expect(run_load(target, conns=8, requests=count, tokens=8), ok=count)
    records = sorted(stage.ask("records"), key=lambda record: record["arrived"])
    gaps = [(after["arrived"] - before["last"]) / 1000 for before, after in itertools.pairwise(records)]
    return quantiles(gaps)


def cancel(stage: Stage, peer: Peer, size: Size) -> Numbers:
    """From the cancel (llorch: the POST; others: hanging up) to the engine that sees its client gone."""
    target, found = stage.target(peer, "few"), Numbers()
    for phase, first_s in (("decode", 0.0), ("prefill", NEVER_S)):
        stage.set(rate=200.0, first_s=first_s)
        times = []
        for _ in range(size.count(30)):
            stage.until_busy(0)
            at = cancel_one(stage, target, decoding=phase == "decode")
            stage.until_busy(0)
            times.append((stage.ask("records")[-1]["gone"] - at) / 1000)
        found |= {f"{phase} {name}": value for name, value in quantiles(times).items()}
    return found


def cancel_one(stage: Stage, target: Target, *, decoding: bool) -> int:
    """Start a stream and cancel it; returns when, on the monotonic clock in ns."""
    url = f"127.0.0.1:{target.port}"
    with (
        socket.create_connection(("127.0.0.1", target.port), 10) as stream,
        socket.create_connection(("127.0.0.1", target.port), 10) as other,
    ):
        if target.peer.task:
            task = post(target, "/v1/tasks", prompt="x", max_tokens=ENDLESS)
            stream.sendall(f"GET {task['stream_url']} HTTP/1.1\r\nHost: {url}\r\n\r\n".encode())
        else:
            body = json.dumps({"prompt": "x", "n_predict": ENDLESS, "stream": True}).encode()
            head = f"POST /completion HTTP/1.1\r\nHost: {url}\r\nContent-Type: application/json\r\n"
            stream.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        stage.until_busy(1)
        if decoding:
            got = b""
            while got.count(b'"t":' if target.peer.task else b'"content":') < 5:
                got += stream.recv(65536)
        if target.peer.task:
            said = f"POST {task['cancel_url']} HTTP/1.1\r\nHost: {url}\r\nContent-Length: 0\r\n\r\n".encode()
            at = time.monotonic_ns()
            other.sendall(said)
            other.recv(65536)
        else:
            at = time.monotonic_ns()
        return at


# -- admission -------------------------------------------------------------------------------------


def admission(stage: Stage, peer: Peer, size: Size) -> Numbers:
    """POSTs on 64 connections, all accepted or all refused."""
    stage.set(rate=1.0, first_s=NEVER_S)
    found: Numbers = {}
    for status, variant, path in (("202", "one", "/accept"), ("429", "few", "/reject")):
        target, count = stage.target(peer, variant if peer.task else "many"), size.count(6000)
        if peer.task and status == "429":
            fill(target)
        assert target.process is not None
        cpu = target.process.cpu_us()
        load = {"mode": "post", "conns": 64, "requests": count}
        seen = run_load(target, **load, **({} if peer.task else {"path": path}))
        cpu = target.process.cpu_us() - cpu
        if seen["statuses"] != {status: count}:
            raise RuntimeError(f"expected {count} × {status}, got {seen['statuses']}")
        found |= {f"{status} a second": count / seen["seconds"], f"{status}, µs of CPU": cpu / count}
        if peer.task:
            stage.drop(peer)
    return found


def depth(stage: Stage, peer: Peer, size: Size) -> Numbers:
    """What submit, position and cancel take behind few and behind many; the median, one at a time."""
    target = stage.target(peer, "one")
    stage.set(rate=1.0, first_s=NEVER_S)
    found: Numbers = {}
    queued = 0
    for count in (10, size.deep):
        run_load(target, mode="post", conns=8, requests=count - queued)
        queued = count
        turns = size.count(500)
        seen = expect(run_load(target, mode="turn", requests=turns), ok=turns)
        found |= {
            f"{step}, {count:,}": seen["turn_us"][step]["p50"] for step in ("submit", "position", "cancel")
        }
    stage.drop(peer)
    return found


def storm(stage: Stage, peer: Peer, size: Size) -> Numbers:
    """How late a token comes (p99) in 16 running streams, without and with a storm of refused POSTs."""
    target, found = stage.target(peer, "few" if peer.task else "many"), {}
    for name in ("without", "with"):
        stage.set(rate=25.0, first_s=0.05, stamp=True)
        with Loading(target, conns=16, requests=16, tokens=ENDLESS, stamp=True) as loading:
            stage.until_busy(16)
            seconds = max(4 * size.share, 1.0)
            if name == "with":
                if peer.task:
                    fill(target)
                load: dict[str, Any] = {"mode": "post", "conns": 8, "requests": 10**9, "limit_s": seconds}
                seen = run_load(target, **load, **({} if peer.task else {"path": "/reject"}))
                found["refused a second"] = seen["ok"] / seen["seconds"]
            else:
                time.sleep(seconds)
            stage.ask("finish")
            seen = expect(loading.result(), ok=16)
            found[f"p99 {name}"] = seen["delay_us"]["p99"]
        stage.ask("finish")  # the task that filled the queue has come to the engine by now, or comes
    return found


# -- memory, failures ------------------------------------------------------------------------------


def memory(stage: Stage, peer: Peer, size: Size) -> Numbers:
    """Private memory for each client that waits for its first token, and for each task in the queue."""
    target = stage.target(peer)
    assert target.process is not None
    stage.set(rate=1.0, first_s=NEVER_S)
    before = target.process.private_kb()
    with Loading(target, conns=size.clients, requests=size.clients):
        stage.until_busy(size.clients)
        time.sleep(SETTLE_S)
        found = {"a waiting client": (target.process.private_kb() - before) / size.clients}
    stage.drop(peer)
    if peer.task:
        target = stage.target(peer, "one")
        assert target.process is not None
        stage.set(rate=1.0, first_s=NEVER_S)
        before = target.process.private_kb()
        run_load(target, mode="post", conns=8, requests=size.deep)
        found["a queued task"] = (target.process.private_kb() - before) / size.deep
        stage.drop(peer)
    return found


def failures(stage: Stage, peer: Peer, size: Size) -> Numbers:
    """Short answers of an engine that closes after each."""
    stage.set()
    count = size.count(3000)
    seen = run_load(stage.target(peer), conns=16, requests=count, tokens=4)
    return {"tasks": count, "failed": count - seen["ok"]}


# -- small parts -----------------------------------------------------------------------------------


def post(target: Target, path: str, **body: Any) -> Any:
    """The body of the answer to one POST."""
    return Client(f"http://127.0.0.1:{target.port}").ask("POST", path, body).body


def fill(target: Target) -> None:
    """Submit until one is refused: the queue is full then."""
    client = Client(f"http://127.0.0.1:{target.port}")
    for _ in range(MOST_TO_FILL):
        if client.ask("POST", "/v1/tasks", {"prompt": "x", "max_tokens": 1}).status == 429:
            return
    raise RuntimeError("the queue does not fill")


def expect(seen: dict[str, Any], *, ok: int) -> dict[str, Any]:
    """What the load saw, if so many requests went well. Raises RuntimeError."""
    if seen["ok"] != ok:
        raise RuntimeError(f"{seen['ok']} of {ok} requests went well, {seen['failed']} failed")
    return seen


def quantiles(values: list[float]) -> Numbers:
    """The median and the 99th percentile."""
    ordered = sorted(values)
    return {name: ordered[int(len(ordered) * share)] for name, share in (("p50", 0.5), ("p99", 0.99))}


_BOTH = (LLORCH, LLORCH_UVLOOP)
_ALL = (NGINX_PEER, RELAY, *_BOTH)

SCENARIOS: dict[str, Scenario] = {
    "paced": Scenario("CPU per token, paced streams", "CPU for each token handed on, in µs", paced, _ALL),
    "fanout": Scenario(
        "Fan-out: one task, many readers", "CPU for each token and reader, in µs", fanout, _BOTH
    ),
    "flood": Scenario(
        "Flood: as fast as it goes",
        "CPU for each token, in µs; answers of 200 tokens, connection and all",
        flood,
        _ALL,
    ),
    "first": Scenario(
        "Added time to first token",
        "From the request to its first token, in µs above the engine's own; llorch: POST and GET",
        first_token,
        (DIRECT, *_ALL),
        less_direct=True,
    ),
    "gap": Scenario(
        "Idle gap of a busy slot",
        "From an answer's last byte to the arrival of the next request, in µs; eight clients, one slot",
        gap,
        (HAPROXY_PEER, RELAY, *_BOTH),
    ),
    "cancel": Scenario(
        "Cancel",
        "Until the engine sees its connection closed, in µs; llorch: by POST, others: their client hangs up",
        cancel,
        _ALL,
    ),
    "admission": Scenario(
        "Admission", "POSTs on 64 connections; nginx and the relay answer without looking", admission, _ALL
    ),
    "depth": Scenario(
        "A long queue", "What one request takes, in µs, behind so many queued tasks", depth, _BOTH
    ),
    "storm": Scenario(
        "Streams beside refused POSTs",
        "From the engine's write to the client's read, in µs; 16 streams, and eight clients that POST",
        storm,
        _ALL,
        plain=("refused a second",),
    ),
    "memory": Scenario("Memory", "Private to the process, in kB", memory, _ALL),
    "failures": Scenario(
        "Failures",
        "Tasks of four tokens against an engine that closes after each answer",
        failures,
        _ALL,
        plain=("tasks", "failed"),
    ),
}
