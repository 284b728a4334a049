"""The inputs: a pure function of seed and index, from good requests to random bytes.

The one rule: nothing here looks at the server, so an input replays from its two numbers. `TASK_ID` stands
for a task that is there, and is replaced when the input is sent.
"""

import itertools
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

TASK_ID = b"f" * 32
CANARY = "xyzzy-canary"  # in every prompt; no log may hold it
MAX_BODY_BYTES = 4096  # what the attacked llorch should be configured for, to meet its limit now and then

Ending = Literal["read", "half", "fin", "rst"]


class Input(NamedTuple):
    """What one connection sends, in pieces that end at `cuts`, and what the client does then.

    `read`: wait for `requests` answers, `half`: close its sending side first, `fin`, `rst`: leave at once.
    """

    kind: str
    data: bytes
    cuts: tuple[int, ...]
    requests: int
    ending: Ending

    def pieces(self, task_id: bytes) -> list[bytes]:
        """What is sent where `task_id` is there."""
        data = self.data.replace(TASK_ID, task_id)
        return [data[start:end] for start, end in itertools.pairwise((0, *self.cuts, len(data)))]


@dataclass
class Request:
    """One request, before it becomes bytes; `fields` are header lines."""

    method: bytes
    target: bytes
    body: bytes = b""
    version: bytes = b"HTTP/1.1"
    fields: list[bytes] = field(default_factory=lambda: [b"Host: 127.0.0.1"])
    framed: bool = False  # its fields say already how long the body is
    line_end: bytes = b"\r\n"

    def encode(self) -> bytes:
        """Its bytes."""
        if self.body and not self.framed:
            self.fields.append(b"Content-Length: %d" % len(self.body))
        line = b" ".join((self.method, self.target, self.version))
        return self.line_end.join((line, *self.fields, b"", self.body))


def make(seed: int, index: int, token: bytes = b"") -> Input:
    """Input number `index` of `seed`; good requests carry `token` if there is one."""
    chance = random.Random((seed << 48) + index)
    (kind,) = chance.choices(list(KINDS), KIND_WEIGHTS)
    count = chance.choice((1, 1, 1, 1, 1, 1, 1, 2, 3, 8))
    requests = [good_request(chance) for _ in range(count)]
    for request in requests:
        if token:
            request.fields.append(b"Authorization: Bearer " + token)
        if kind != "good" and (len(requests) == 1 or chance.random() < 0.4):
            for _ in range(chance.choice((1, 1, 1, 2, 3))):
                chance.choice(MUTATIONS)(chance, request)
    data, ending = KINDS[kind](chance, b"".join(request.encode() for request in requests))
    cuts = []
    if chance.random() < 0.2 and data:
        cuts = sorted(chance.randrange(len(data)) for _ in range(chance.choice((1, 2, 5))))
    return Input(kind, data, tuple(cuts), count, ending)


# -- good requests ---------------------------------------------------------------------------------


def good_request(chance: random.Random) -> Request:
    """A request to some route, as the contract has it."""
    method, target = chance.choice(ROUTES)
    request = Request(method, target)
    if target == b"/v1/tasks" and method == b"POST":
        request.body = json.dumps(good_task(chance)).encode()
        request.fields.append(b"Content-Type: application/json")
    for ending, bodies in CONTROL.items():
        if target.endswith(ending):
            request.body = chance.choice(bodies)
            request.fields.append(b"Content-Type: application/json")
    if chance.random() < 0.3:
        request.fields.append(chance.choice(GOOD_FIELDS))
    return request


CONTROL = {  # nothing that a later input could not live with: no engine is reached, and drains are short
    b"/reload": (
        *(b"", b"{}", b'{"replicas": []}', b'{"replicas": [{"endpoint": "http://127.0.0.1:9"}]}'),
        b'{"replicas": [{"endpoint": "unix:/none", "slots": "auto", "devices": [0, 0]}]}',
    ),
    b"/drain": (
        *(b'{"deadline_ms": 5}', b'{"deadline_ms": 86400001}', b'{"cancel": false}', b"{}"),
        *(b'{"cancel": true}',) * 4,
    ),
}


ROUTES = [
    (b"GET", b"/health"),
    (b"HEAD", b"/health"),
    *[(b"POST", b"/v1/tasks")] * 4,
    (b"GET", b"/v1/tasks"),
    (b"GET", b"/v1/tasks?state=running&limit=3"),
    (b"GET", b"/v1/tasks/" + TASK_ID),
    *[(b"GET", b"/v1/tasks/" + TASK_ID + b"/stream")] * 2,
    (b"GET", b"/v1/tasks/" + TASK_ID + b"/stream?last_event_id=1"),
    *[(b"POST", b"/v1/tasks/" + TASK_ID + b"/cancel")] * 2,
    (b"GET", b"/v1/tasks/" + TASK_ID + b"/stream?metrics=1"),
    (b"GET", b"/v1/pools/default/health"),
    (b"GET", b"/v1/pools/small/health"),
    (b"POST", b"/v1/pools/default/reload"),
    *[(b"POST", b"/v1/pools/small/drain")] * 2,
    (b"GET", b"/v1/status"),
    (b"GET", b"/metrics"),
    (b"GET", b"/v1/capabilities"),
    (b"GET", b"/openapi.json"),
    (b"GET", b"/"),
    (b"OPTIONS", b"/v1/tasks"),
]
GOOD_FIELDS = [
    b"Connection: close",
    b"Last-Event-ID: 2",
    b"X-Correlation-Id: abc-123",
    b"Origin: http://127.0.0.1",
    b"Accept: text/event-stream",
    b"Accept-Encoding: gzip, deflate",
    b"User-Agent: fuzz",
]


def good_task(chance: random.Random) -> dict[str, Any]:
    """A body that is admitted if there is room."""
    task: dict[str, Any] = {"prompt": f"{CANARY} {chance.random()}"}
    if chance.random() < 0.2:
        task = {"messages": [{"role": "user", "content": task["prompt"]}]}
    for name in chance.sample(sorted(GOOD_VALUES), chance.choice((0, 1, 3))):
        task[name] = chance.choice(GOOD_VALUES[name])
    return task


GOOD_VALUES: dict[str, tuple[Any, ...]] = {
    "max_tokens": (1, 2, 8),
    "seed": (0, 42, 2**32 - 2),
    "temperature": (0, 0.8, 5),
    "top_k": (0, 1000),
    "top_p": (0, 1),
    "min_p": (0.05,),
    "typical_p": (1,),
    "repeat_penalty": (0.5, 2),
    "repeat_last_n": (0, 4096),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "stop": (["\n"], ["x" * 128] * 8),
    "grammar": ('root ::= "a"',),
    "json_schema": ({"type": "object"},),
    "priority": ("interactive", "batch"),
    "pool_id": ("default", "small"),
    "session_id": ("s-1",),
    "determinism": ("best_effort",),
    "metadata": ({"k": "v"}, {str(n): "x" * 100 for n in range(16)}),
}


# -- mutations by the grammar ----------------------------------------------------------------------


def odd_method(chance: random.Random, request: Request) -> None:
    """Another method, or none."""
    request.method = chance.choice(METHODS)


METHODS = [
    *(b"GET", b"HEAD", b"POST", b"PUT", b"DELETE", b"PATCH", b"TRACE", b"CONNECT", b"OPTIONS", b"PRI"),
    *(b"get", b"G\0T", b"", b"GET\t", b"M-SEARCH", b"A" * 300, b"\xff\xfe", b"\r\nGET", b"{}"),
]


def odd_target(chance: random.Random, request: Request) -> None:
    """Another target, or the same in a strange form."""
    target = request.target
    forms: tuple[Callable[[], bytes], ...] = (
        lambda: b"http://%b%b" % (chance.choice(HOSTS), target),
        lambda: b"//%b%b" % (chance.choice(HOSTS), target),
        lambda: target.replace(b"/", b"//"),
        lambda: target + chance.choice((b"/", b"%00", b"%2e", b"%2F", b"%", b"%zz", b"\xff", b"#x", b";a=b")),
        lambda: b"/%2e%2e" + target,
        lambda: b"/v1/../.." + target,
        lambda: b"".join(b"%%%02x" % byte for byte in target),
        lambda: target.swapcase(),
        lambda: target + b"?" + b"a" * chance.choice((100, 8000, 9000, 20000)),
        lambda: b"/" + b"x" * chance.choice((5000, 8190, 9000)),
        lambda: target.partition(b"?")[0] + b"?" + b"&".join(chance.choices(QUERIES, k=2)),
        lambda: b"/v1/tasks/" + chance.randbytes(16).hex().encode() + chance.choice((b"", b"/stream")),
        lambda: b"/v1/pools/" + chance.choice((b"", b"%F0%9F%98%80", b"..", b"x" * 300, b"%ff")) + b"/health",
        lambda: chance.choice((b"*", b"", b" ", b"health", b"?", b"http://", b"http://[::1", b"http:///x")),
        lambda: target[: chance.randrange(len(target) + 1)],
        lambda: target + b" " + target,
    )
    request.target = chance.choice(forms)()


HOSTS = [
    *(b"127.0.0.1", b"localhost", b"LOCALHOST:1", b"[::1]:80", b"evil.example", b"127.0.0.1.nip.io"),
    *(b"127.1", b"2130706433", b"0x7f.1", b"localhost.", b"a b", b"user:pw@localhost", b"localhost:999999"),
    *(b"", b"\xff", b"[::1", b"127.0.0.1:x", b"x" * 300, b"127.0.0.1, evil.example", b"%00", b"::1"),
]
QUERIES = [
    *(b"state=running", b"state=", b"state=x", b"limit=0", b"limit=1001", b"limit=-1", b"limit=%00"),
    *(b"limit=1&limit=2", b"limit=" + b"9" * 5000, b"last_event_id=0", b"last_event_id=-1", b"ticket=x"),
    *(b"last_event_id=999999999", b"last_event_id=%D9%A3", b"ticket=%ff%fe", b"ticket", b"%ff=%ff", b"&&=;"),
    *(b"metrics=1", b"state=%0d%0aX-Evil:%201", b"ticket=%ud800", b"limit=%D9%A3", b"ticket=" + b"a" * 4000),
]


def odd_version(chance: random.Random, request: Request) -> None:
    """Another version."""
    request.version = chance.choice(
        (b"HTTP/1.0", b"HTTP/0.9", b"HTTP/2.0", b"HTTP/9.9", b"HTTP/1.1.1", b"http/1.1", b"HTTP/1.1 x", b"")
    )


def odd_field(chance: random.Random, request: Request) -> None:
    """A header more, in another's place, twice, misspelt, or one less."""
    name = chance.choice(list(FIELDS))
    value = chance.choice(FIELDS[name] if chance.random() < 0.7 else ANY_VALUES)
    line = name + chance.choice((b": ", b": ", b":", b" : ", b":\t")) + value
    place = chance.randrange(len(request.fields) + 1)
    what = chance.random()
    if what < 0.5:
        request.fields.insert(place, line)
    elif what < 0.65:
        request.fields = [it for it in request.fields if not it.lower().startswith(name.lower())] + [line]
    elif what < 0.75:
        request.fields += [line, line]
    elif what < 0.82:
        request.fields.insert(place, chance.choice(ODD_LINES))
    elif what < 0.87:
        request.fields += [b"X-%d: %d" % (n, n) for n in range(chance.choice((50, 200)))]
    elif request.fields:
        request.fields.pop(place - 1)


FIELDS: dict[bytes, list[bytes]] = {
    b"Host": HOSTS,
    b"Origin": [
        *(b"null", b"http://evil.example", b"http://127.0.0.1", b"https://127.0.0.1", b"", b"file://"),
        *(b"http://127.0.0.1@evil", b"\xff", b"http://127.0.0.1:1", b"127.0.0.1"),
    ],
    b"Authorization": [
        b"",
        b"Bearer",
        b"Bearer x",
        b"Basic eDp5",
        b"Bearer \xff\xfe",
        b"Bearer " + b"x" * 7000,
    ],
    b"Content-Length": [
        *(b"0", b"1", b"5", b"-1", b"+5", b"0x5", b"5, 5", b"5 5", b"1e3", b"", b"007", b"4097", b"5000"),
        *(b"99999999999999999999", b"18446744073709551617", b"\xd9\xa3", b"5\0", b"1_0"),
    ],
    b"Transfer-Encoding": [
        *(b"chunked", b"gzip, chunked", b"chunked, identity", b"identity", b"xchunked", b"chunked;q=1"),
        *(b"CHUNKED", b"", b"\x0bchunked", b"chunked, chunked", b"chunked\0"),
    ],
    b"Expect": [b"100-continue", b"100-Continue", b"200-ok", b"", b"100-continue, x"],
    b"Content-Encoding": [b"gzip", b"br", b"identity", b"", b"deflate, gzip", b"zstd"],
    b"Content-Type": [
        *(b"application/json", b"APPLICATION/JSON", b"application/json; charset=utf-16", b"text/plain", b""),
        *(b"application/json;", b"application/json; charset=nonsense", b"application", b"/", b"multipart/x"),
        *(b"application/x-www-form-urlencoded", b"application/json, text/plain", b"\xff/\xff", b"a/b;" * 500),
        *(b"application/octet-stream", b'multipart/form-data; boundary="\xff"', b"application/json;=;=;"),
    ],
    b"Last-Event-ID": [
        b"0",
        b"1",
        b"-1",
        b"999999999",
        b"9999999999",
        b"x",
        b"\xd9\xa3",
        b"",
        b"1, 2",
        b"1\t",
    ],
    b"Connection": [b"close", b"keep-alive", b"upgrade", b"close, keep-alive", b"", b"x" * 100],
    b"Upgrade": [b"websocket", b"h2c", b"TLS/1.0", b"", b"\xff"],
    b"Sec-WebSocket-Key": [b"dGhlIHNhbXBsZSBub25jZQ=="],
    b"Sec-WebSocket-Version": [b"13"],
    b"X-Correlation-Id": [b"ok-1", b"a b", b"x" * 129, b"\xff", b"", b"a,b", b"\xd9\xa3"],
    b"Sec-Fetch-Site": [b"cross-site", b"same-origin", b"CROSS-SITE", b"\xff"],
    b"Cookie": [b"a=b", b"\xff=\xff; ;;=", b"a=" + b"x" * 6000, b'a="\\377\\"'],
    b"Access-Control-Request-Method": [b"POST"],
    b"X-Forwarded-For": [b"1.2.3.4", b"\xff"],
    b"Forwarded": [b"for=1.2.3.4", b'for="[::1]";host=\xff'],
    b"Range": [b"bytes=0-1", b"bytes=-", b"x"],
    b"If-Modified-Since": [b"x", b"Sun, 99 Nov 9999 99:99:99 GMT"],
    b"Keep-Alive": [b"timeout=99999999999999"],
    b"Trailer": [b"Host"],
    b"TE": [b"trailers, chunked"],
}
ANY_VALUES = [
    *(b"", b"\0", b"\xff\xfe\x80", b"\x7f", b"\x01", b"a\rb", b"a\nX-Evil: 1", b"\r\nX-Evil: 1", b"%0d%0a"),
    *(b"x" * 8000, b"x" * 9000, b"\xf0\x9f\x98\x80", b'"', b"\\", b"<script>", b"${jndi:x}", b"{}%s%n"),
]
ODD_LINES = [
    *(b"", b":", b": x", b"no colon", b" folded", b"Host", b"Host : 127.0.0.1", b"\tX: y", b"a b: c"),
    *(b"\xff: x", b"X\0Y: z", b"X" * 9000 + b": y", b"X: a\r\n  folded", b"X(y): z", b"Host:", b"X: \r"),
]


def odd_framing(chance: random.Random, request: Request) -> None:
    """A body whose length is told in chunks, or wrongly, or twice."""
    body = request.body or b"{}"
    request.body, request.framed = body, True
    what = chance.randrange(5)
    if what < 3:
        request.fields.append(b"Transfer-Encoding: chunked")
        request.body = _chunks(chance, body, broken=what > 0)
    if what in (2, 3):
        delta = chance.choice((-1, 0, 1, 10, 5000))
        request.fields.append(b"Content-Length: %d" % max(len(body) + delta, 0))
    if what == 4:
        request.fields += [b"Content-Length: %d" % (len(body) + n) for n in (0, chance.choice((0, 1)))]


def _chunks(chance: random.Random, body: bytes, *, broken: bool) -> bytes:
    size = chance.choice((1, 7, 100, 5000))
    blocks = [body[at : at + size] for at in range(0, len(body), size)][:200]
    lines = [b"%x\r\n%b\r\n" % (len(block), block) for block in blocks] + [b"0\r\n\r\n"]
    if broken:
        place = chance.randrange(len(lines))
        lines[place] = chance.choice(ODD_CHUNKS)
    return b"".join(lines)


ODD_CHUNKS = [
    *(
        b"",
        b"\r\n",
        b"x\r\nx\r\n",
        b"-1\r\n\r\n",
        b"ffffffffffffffffff\r\nx\r\n",
        b"5\r\nabc\r\n",
        b"5\nabcde\n",
    ),
    *(
        b"1;ext=" + b"x" * 5000 + b"\r\na\r\n",
        b"0x1\r\na\r\n",
        b" 1\r\na\r\n",
        b"1 \r\na\r\n",
        b"1\r\nab",
        b"0\r\n",
    ),
    *(
        b"0\r\nTrailer: x\r\n\r\n",
        b"0\r\nHost: evil\r\nContent-Length: 5\r\n\r\nabcde",
        b"1\ra\r",
        b"\0\r\n\r\n",
    ),
]


def odd_lines(chance: random.Random, request: Request) -> None:
    """Lines that end as HTTP's may not."""
    request.line_end = chance.choice((b"\n", b"\r", b"\r\r\n", b"\0", b"\n\r"))


def odd_body(chance: random.Random, request: Request) -> None:
    """Another body, sent as JSON, mostly to where one is wanted."""
    if chance.random() < 0.8:
        request.method, request.target = b"POST", b"/v1/tasks"
    if not any(line.startswith(b"Content-Type") for line in request.fields):
        request.fields.append(b"Content-Type: application/json")
    request.body = odd_json(chance)


def odd_json(chance: random.Random) -> bytes:
    """A task with something wrong in it, or what is no task, or no JSON at all."""
    what = chance.random()
    if what < 0.3:
        return chance.choice(ODD_BODIES)
    task = good_task(chance)
    for _ in range(chance.choice((1, 1, 2))):
        name = chance.choice(
            [*GOOD_VALUES, "prompt", "messages", "temperatur", "", "\0", "x" * 500, "`", "😀"]
        )
        task[name] = odd_value(chance)
    if what < 0.4:
        task["metadata"] = {"k" * 65: "x" * 513}
    body = json.dumps(task, ensure_ascii=chance.random() < 0.7).encode("utf-8", "surrogatepass")
    if what > 0.9:
        body = body.replace(b'"', chance.choice((b"'", b'\\"', b'"\\u0000', b'"\xff')), 3)
    return body


def odd_value(chance: random.Random, depth: int = 0) -> Any:
    """Any JSON value, mostly one that no field takes."""
    what = chance.random()
    if depth < 4 and what < 0.1:
        return [odd_value(chance, depth + 1) for _ in range(chance.choice((1, 2, 9)))]
    if depth < 4 and what < 0.2:
        return {chance.choice(("role", "content", "type", "", "x")): odd_value(chance, depth + 1)}
    return chance.choice(ODD_VALUES)


ODD_VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 17, 2**31, 2**32 - 1, 2**53 + 1, 2**63, -(2**63) - 1, 2**64, 10**400),
    *(0.5, -0.0, 1e308, 5e-324, float("inf"), float("nan"), 1.5, "", "x", "strict", "batch", "best_effort"),
    *(
        "\0",
        "\ud800",
        "\udfff\ud800",
        "😀",
        "\u2028",
        "x" * 129,
        "x" * 1000,
        "\x7f",
        "root ::= (",
        "null",
        "1",
    ),
    *([], {}, [[]], [None], ["x"] * 9, [""], {"a": {"b": []}}, [{"role": "user", "content": "hi"}]),
    *([{"role": 1, "content": None}], [{"role": "user"}], {str(n): "x" for n in range(17)}, {"\ud800": "x"}),
]
ODD_BODIES = [
    *(
        b"",
        b" ",
        b"null",
        b"[]",
        b"0",
        b'""',
        b"{}",
        b"{",
        b"}",
        b"[",
        b'{"prompt"',
        b'{"prompt": "x"}}',
        b"\0",
    ),
    *(b'{"prompt": "x"} {"prompt": "y"}', b'\xef\xbb\xbf{"prompt": "x"}', '{"prompt": "x"}'.encode("utf-16")),
    *(b"[" * 3000, b'{"a":' * 800, b"[" * 2000 + b"]" * 2000, b'{"json_schema":' * 200 + b"{}" + b"}" * 200),
    *(b'{"prompt": "x", "seed": ' + b"9" * 4000 + b"}", b'{"prompt": "x", "temperature": 1e400}'),
    *(b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "temperature": -Infinity}'),
    *(
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\\u00"}',
    ),
    *(b'{"prompt": "x", "prompt": "y"}', b'{"prompt": "a\0b"}', b'{"prompt": "a\nb"}', b"{'prompt': 'x'}"),
    *(b'{"prompt": "' + b"x" * 5000 + b'"}', b'{"prompt": "' + b"x" * 4080 + b'"}', b"x" * 4097),
    *(
        b'{"\xff": 1}',
        b'{"\\ud800": 1}',
        b'{"prompt": "x", "json_schema": {"a": ' + b"[" * 900 + b"]" * 900 + b"}}",
    ),
    *(b'{"json_schema": {"x": 1e999}, "prompt": "x"}', b'{"prompt": "x", "max_tokens": 1.0}', b"prompt=x"),
]

MUTATIONS: list[Callable[[random.Random, Request], None]] = [
    odd_method,
    *[odd_target] * 3,
    odd_version,
    *[odd_field] * 5,
    *[odd_framing] * 2,
    odd_lines,
    *[odd_body] * 5,
]


# -- what becomes of the bytes ---------------------------------------------------------------------


def whole(chance: random.Random, data: bytes) -> tuple[bytes, Ending]:
    """As they are."""
    return data, chance.choices(("read", "half", "fin", "rst"), (90, 4, 3, 3))[0]


def scrambled(chance: random.Random, data: bytes) -> tuple[bytes, Ending]:
    """Bits flipped, bytes put in, taken out, moved, doubled."""
    bad = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at = chance.randrange(len(bad) + 1)
        length = chance.choice((1, 1, 2, 8, 64))
        what = chance.randrange(6)
        if what == 0 and at < len(bad):
            bad[at] ^= 1 << chance.randrange(8)
        elif what == 1:
            bad[at:at] = chance.randbytes(length)
        elif what == 2:
            del bad[at : at + length]
        elif what == 3:
            bad[at:at] = bad[: chance.randrange(len(bad) + 1)][-length:]
        elif what == 4:
            bad[at : at + 1] = chance.choice(INTERESTING)
        else:
            other = good_request(chance).encode()
            bad[at:] = other[chance.randrange(len(other)) :]
    return whole(chance, bytes(bad))


INTERESTING = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b":",
    b"\xff",
    b"\r\n\r\n",
    b"%",
    b"/",
    b'"',
    b"{",
    b"0",
    b"\t",
]


def truncated(chance: random.Random, data: bytes) -> tuple[bytes, Ending]:
    """Cut short; who sent them leaves, or (less often, as it takes time) waits."""
    left = data[: chance.randrange(len(data))]
    return left, chance.choices(("read", "half", "fin", "rst"), (4, 32, 32, 32))[0]


def noise(chance: random.Random, data: bytes) -> tuple[bytes, Ending]:
    """Not HTTP at all: random bytes, a TLS hello, HTTP/2."""
    return whole(chance, chance.choice((chance.randbytes(len(data)), TLS + data, HTTP2 + data, data[::-1])))


TLS = bytes.fromhex("16030100c8010000c40303") + bytes(range(40))
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\x04\0\0\0\0\0"

KINDS: dict[str, Callable[[random.Random, bytes], tuple[bytes, Ending]]] = {
    "good": whole,
    "grammar": whole,
    "scrambled": scrambled,
    "truncated": truncated,
    "noise": noise,
}
KIND_WEIGHTS = (18, 58, 13, 9, 2)
