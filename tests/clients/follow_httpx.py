"""Follow a task with httpx: pip install httpx httpx-sse; python follow_httpx.py http://127.0.0.1:8080/v1/…/stream

One line for each event: its id, its name, its data. A broken connection is resumed.
"""

import sys
import time
from collections.abc import Iterator

import httpx
from httpx_sse import ServerSentEvent, connect_sse


def follow(url: str) -> Iterator[ServerSentEvent]:
    """The events of a task, each once."""
    last: dict[str, str] = {}
    with httpx.Client(timeout=60) as client:
        while True:
            try:
                with connect_sse(client, "GET", url, headers=last) as source:
                    source.response.raise_for_status()
                    if source.response.status_code == 204:  # there is nothing more
                        return
                    for event in source.iter_sse():
                        last = {"Last-Event-ID": event.id}
                        yield event
                        if event.event in ("end", "error"):
                            return
            except httpx.TransportError:
                time.sleep(1)


if __name__ == "__main__":
    for event in follow(sys.argv[1]):
        print(event.id, event.event, event.data, flush=True)
