"""Follow a task with requests: pip install requests sseclient-py; python follow_sseclient.py http://127.0.0.1:…

One line for each event: its id, its name, its data. A broken connection is resumed.
"""

import sys
import time
from collections.abc import Iterator

import requests
import sseclient


def follow(url: str) -> Iterator[sseclient.Event]:
    """The events of a task, each once."""
    last: dict[str, str] = {}
    while True:
        try:
            with requests.get(url, headers=last, stream=True, timeout=60) as response:
                response.raise_for_status()
                if response.status_code == 204:  # there is nothing more
                    return
                for event in sseclient.SSEClient(response).events():
                    last = {"Last-Event-ID": event.id}
                    yield event
                    if event.event in ("end", "error"):
                        return
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
            time.sleep(1)


if __name__ == "__main__":
    for event in follow(sys.argv[1]):
        print(event.id, event.event, event.data, flush=True)
