"""Just enough HTTP and Server-Sent Events, from the standard library alone, for the scripts here."""

import http.client
import json
import os
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

if sys.version_info < (3, 11):  # noqa: UP036  # said here, before what an older one stumbles over
    command = f".venv/bin/python {sys.argv[0]}"
    sys.exit(
        f"this needs Python 3.11 or newer, not {sys.version.split()[0]}: say scripts/setup, then {command}"
    )


class Answer(NamedTuple):
    """One HTTP answer; `body` is decoded JSON, None if there was none."""

    status: int
    headers: dict[str, str]
    body: Any


class Event(NamedTuple):
    """One Server-Sent Event with its JSON, decoded and as it came."""

    id: int
    name: str
    data: dict[str, Any]
    raw: bytes


class Client:
    """Talks to one llorch; sends the token in LLORCH_AUTH_TOKEN if there is one. Raises ValueError."""

    def __init__(self, url: str, timeout_s: float = 120.0) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError(f"expected http://host:port, got {url!r}")
        self.url = url.rstrip("/")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._netloc, self._timeout_s = parts.netloc, timeout_s
        token = os.environ.get("LLORCH_AUTH_TOKEN")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def _send(self, method: str, path: str, body: Any, headers: dict[str, str]) -> http.client.HTTPResponse:
        connection = self._kind(self._netloc, timeout=self._timeout_s)
        data = None if body is None else json.dumps(body).encode()
        typed = {} if data is None else {"Content-Type": "application/json"}
        connection.request(method, path, data, {**self._headers, **typed, **headers})
        return connection.getresponse()

    def ask(self, method: str, path: str, body: Any = None) -> Answer:
        """Send one request and read its whole answer."""
        with self._send(method, path, body, {}) as response:
            text = response.read()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, json.loads(text) if text else None)

    def submit(self, **task: Any) -> dict[str, Any]:
        """Submit a task that must be admitted; its 202."""
        answer = self.ask("POST", "/v1/tasks", task)
        if answer.status != 202:
            raise RuntimeError(f"POST /v1/tasks answered {answer.status}: {answer.body}")
        return answer.body

    def events(self, path: str, last_event_id: int | None = None) -> Iterator[Event]:
        """The events of a stream, as they come."""
        headers = {} if last_event_id is None else {"Last-Event-ID": str(last_event_id)}
        with self._send("GET", path, None, headers) as response:
            if response.status != 200:
                raise RuntimeError(f"GET {path.partition('?')[0]} answered {response.status}")
            fields: dict[str, str] = {}
            for line in response:
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name:
                    fields[name] = value
                elif "data" in fields:
                    data = fields["data"]
                    yield Event(int(fields["id"]), fields["event"], json.loads(data), data.encode())
                    fields = {}

    def text(self, path: str) -> str:
        """What a stream says, its tokens joined."""
        return "".join(event.data["t"] for event in self.events(path) if event.name == "token")

    def pool(self) -> dict[str, Any]:
        """Health of the default pool."""
        return self.ask("GET", "/v1/pools/default/health").body
