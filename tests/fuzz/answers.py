"""What may come back: HTTP answers taken apart and held against the contract.

The one rule: this knows the contract, not the code; whatever the contract does not allow is a fault.
"""

import itertools
import re
from typing import Any, NamedTuple

import msgspec

NOT_HTTP = b'{"code":"INVALID_PARAMS","message":"this is not a valid HTTP request","engine":null}'
CODES = {
    400: {"INVALID_PARAMS", "CONTEXT_OVERFLOW"},
    401: {"MISSING_TOKEN", "BAD_TOKEN"},
    403: {"FORBIDDEN_HOST", "FORBIDDEN_ORIGIN"},
    404: {"UNKNOWN_POOL", "TASK_NOT_FOUND", "NOT_FOUND"},
    405: {"METHOD_NOT_ALLOWED"},
    408: {"BODY_TIMEOUT"},
    409: {"DETERMINISM_UNAVAILABLE", "RELOAD_FAILED"},
    413: {"BODY_TOO_LARGE"},
    415: {"UNSUPPORTED_MEDIA_TYPE"},
    429: {"ADMISSION_REJECT"},
    503: {"POOL_UNREADY", "POOL_UNAVAILABLE", "TOO_MANY_STREAMS"},
}
ENVELOPE = {"code", "message", "engine", "retriable", "retry_after_ms", "hint", "policy_label", "steps"}
ENDS = ("end", "error")
PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
HEADERS = {
    *("content-type", "content-length", "server", "date", "connection", "cache-control", "location", "allow"),
    *("x-content-type-options", "x-correlation-id", "retry-after", "x-backoff-ms", "www-authenticate"),
    *("transfer-encoding", "x-accel-buffering"),
}
PAGE_HEADERS = {
    *("content-security-policy", "referrer-policy", "x-frame-options"),
    *("cross-origin-opener-policy", "cross-origin-resource-policy"),
}
MAX_ERROR_BYTES = 2048
VERSIONS = (b"HTTP/1.1 ", b"HTTP/1.0 ", b"HTTP/0.9 ", b"HTTP/2.0 ")  # aiohttp says what the request said

_HEAD = re.compile(rb"HTTP/(?:1\.1|1\.0|0\.9|2\.0) (\d{3}) [ -~]*\r\n((?:[!-9;-~]+: [ -~]*\r\n)*)\r\n")
FRAME = re.compile(
    rb"id: (\d+)\nevent: (started|token|end|error)\ndata: (\{[^\n]*\})\n\n"
    rb"|event: metrics\ndata: \{[^\n]*\}\n\n|:[^\n]*\n\n"
)
_METRICS_LINE = re.compile(
    rb"# (?:HELP|TYPE) [a-z_]+ [^\n]+|[a-z_]+(?:\{(?:[a-z_]+=\"(?:[^\"\\]|\\.)*\",?)+\})? [0-9.e+-]+"
)


class Fault(Exception):
    """What came back is not allowed."""


class Answer(NamedTuple):
    """One answer; names of `headers` in lower case; `whole`: its end was seen."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool


def parse(received: bytes, *, maybe_head: bool, closed: bool) -> list[Answer]:
    """The final answers in `received`, of which the last may not be whole; raises Fault.

    `maybe_head`: a body may be left out. `closed`: nothing more will come.
    """
    answers, at = [], 0
    while at < len(received):
        head = _HEAD.match(received, at)
        if head is None:
            rest = received[at:]
            if b"\r\n\r\n" in rest or not rest.startswith(b"HTTP/"[: len(rest)]):
                raise Fault(f"this is no answer: {rest[:200]!r}")
            answers.append(Answer(0, {}, rest, False))
            break
        status, headers = int(head[1]), _headers(head[2])
        at = head.end()
        if status == 100:
            continue
        body, at, whole = _body(received, at, status, headers, maybe_head, closed)
        answers.append(Answer(status, headers, body, whole))
        if not whole:
            break
    return answers


def _headers(lines: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines.decode("ascii").splitlines():
        name, _, value = line.partition(": ")
        if headers.setdefault(name.lower(), value) != value:
            raise Fault(f"header {name} twice")
    return headers


def _body(
    received: bytes, at: int, status: int, headers: dict[str, str], maybe_head: bool, closed: bool
) -> tuple[bytes, int, bool]:
    """The body that begins `at`, where it ends, and whether that is its end."""
    if status == 204:
        return b"", at, True
    if maybe_head and (received.startswith(VERSIONS, at) or (closed and at == len(received))):
        return b"", at, True
    if headers.get("transfer-encoding") == "chunked":
        return _chunked(received, at)
    if "content-length" in headers:
        end = at + int(headers["content-length"])
        return received[at:end], end, len(received) >= end
    return received[at:], len(received), closed


def _chunked(received: bytes, at: int) -> tuple[bytes, int, bool]:
    blocks: list[bytes] = []
    while (line_end := received.find(b"\r\n", at)) >= 0:
        try:
            size = int(received[at:line_end], 16)
        except ValueError:
            raise Fault(f"this is no chunk: {received[at : at + 80]!r}") from None
        block_end = line_end + 2 + size
        if received[block_end : block_end + 2] != b"\r\n":
            break
        at = block_end + 2
        if not size:
            return b"".join(blocks), at, True
        blocks.append(received[line_end + 2 : block_end])
    return b"".join(blocks), len(received), False


def check(answer: Answer) -> str:
    """Status and code of a whole answer; raises Fault if anything is wrong with it."""
    status, headers, body = answer.status, answer.headers, answer.body
    page = headers.get("content-type") == "text/html; charset=utf-8"
    if page and (status != 200 or PAGE_HEADERS - headers.keys()):
        raise Fault(f"a page with status {status} and {sorted(headers)}")
    if strange := headers.keys() - HEADERS - (PAGE_HEADERS if page else set()):
        raise Fault(f"headers that llorch never sends: {strange}")
    if "x-correlation-id" not in headers:
        if (status, body) != (400, NOT_HTTP):
            raise Fault(f"neither a handler's answer nor the parser's constant: {status} {body!r}")
        return "400, not HTTP"
    if status in (200, 202, 204):
        _check_good(answer)
        return str(status)
    if status not in CODES:
        raise Fault(f"status {status}: {body[:300]!r}")
    return f"{status} {_check_refusal(answer)}"


def _check_good(answer: Answer) -> None:
    if answer.headers.get("content-type") == "text/event-stream":
        check_stream(answer.body)
    elif answer.body.startswith(b"<!doctype html>") and "content-security-policy" in answer.headers:
        pass  # the page, which is the same for everybody
    elif answer.headers.get("content-type") == PROMETHEUS:
        _check_metrics(answer.body)
    elif answer.body:
        said = _json(answer)
        if (
            answer.status == 202
            and not {"task_id", "queue_position", "stream_url", "cancel_url"} <= said.keys()
        ):
            raise Fault(f"a 202 without its fields: {said}")


def _check_metrics(body: bytes) -> None:
    """Raise Fault unless each line is a comment of the format or a sample."""
    for line in body.split(b"\n")[:-1] if body else ():
        if not _METRICS_LINE.fullmatch(line):
            raise Fault(f"this is no line of Prometheus' format: {line[:200]!r}")


def _check_refusal(answer: Answer) -> str:
    if not answer.body:
        return "(HEAD)"
    said = _json(answer)
    if said.get("code") not in CODES[answer.status]:
        raise Fault(f"status {answer.status} with code {said.get('code')!r}")
    if said.keys() - ENVELOPE or not isinstance(said.get("message"), str) or "engine" not in said:
        raise Fault(f"this is no envelope: {said}")
    if len(answer.body) > MAX_ERROR_BYTES:
        raise Fault(f"a refusal of {len(answer.body)} bytes: {answer.body[:300]!r}")
    if answer.status in (429, 503) and "retry-after" not in answer.headers:
        raise Fault(f"{answer.status} without Retry-After")
    return str(said["code"])


def _json(answer: Answer) -> dict[str, Any]:
    if not answer.headers.get("content-type", "").startswith("application/json"):
        raise Fault(f"neither JSON nor a stream: {answer.headers.get('content-type')!r}")
    try:
        return msgspec.json.decode(answer.body, type=dict[str, Any])
    except msgspec.DecodeError:
        raise Fault(f"this is no JSON object: {answer.body[:300]!r}") from None


class Event(NamedTuple):
    """One event of a stream."""

    id: int
    name: str
    data: dict[str, Any]


def check_stream(body: bytes) -> None:
    """Raise Fault unless `body` is a whole stream as the contract has it."""
    events, at = [], 0
    while at < len(body):
        frame = FRAME.match(body, at)
        if frame is None:
            raise Fault(f"this is no frame: {body[at : at + 200]!r}")
        at = frame.end()
        if frame[1] is not None:
            events.append(event(frame))
    check_events(events)


def event(frame: re.Match[bytes]) -> Event:
    """What is in a frame that is no comment."""
    return Event(int(frame[1]), frame[2].decode(), msgspec.json.decode(frame[3], type=dict[str, Any]))


def check_events(events: list[Event]) -> None:
    """Raise Fault if the order, the ids or the numbers of a stream's events are not the contract's."""
    names = [event.name for event in events]
    if "started" in names[1:] or any(name in ENDS for name in names[:-1]):
        raise Fault(f"events in the order {names}")
    if not names or names[-1] not in ENDS:
        raise Fault(f"the stream ended after {names[-3:]}")
    for before, after in itertools.pairwise(events):
        recalled = after.data.get("finish_reason") == "cancelled" and after.id > before.id
        if after.id != before.id + 1 and not recalled:
            raise Fault(f"event {after.id} follows {before.id}")
    for event in events:
        if event.name == "token" and (event.data["i"] != event.id - 1 or not event.data["t"]):
            raise Fault(f"token {event.data} with id {event.id}")
