"""Follow a task with aiohttp alone: python follow_aiohttp.py http://127.0.0.1:8080/v1/tasks/ID/stream

One line for each event: its id, its name, its data. A broken connection is resumed.
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import aiohttp

TIMEOUT = aiohttp.ClientTimeout(
    total=None, sock_read=60
)  # aiohttp's own total of 300 s would cut long answers


async def follow(url: str) -> AsyncIterator[tuple[str, str, str]]:
    """The events of a task, each once: id, name, data."""
    last: dict[str, str] = {}
    async with aiohttp.ClientSession(timeout=TIMEOUT, raise_for_status=True) as session:
        while True:
            try:
                async with session.get(url, headers=last) as response:
                    if response.status == 204:  # there is nothing more
                        return
                    fields: dict[str, str] = {}
                    async for line in response.content:
                        name, _, value = line.decode().rstrip("\n").partition(": ")
                        if name:
                            fields[name] = value
                        elif "data" in fields:  # a blank line ends an event
                            last = {"Last-Event-ID": fields["id"]}
                            yield fields["id"], fields["event"], fields["data"]
                            if fields["event"] in ("end", "error"):
                                return
                            fields = {}
            except aiohttp.ClientResponseError:
                raise  # the server refused
            except aiohttp.ClientError:
                await asyncio.sleep(1)


async def main() -> None:
    """Print them."""
    async for event in follow(sys.argv[1]):
        print(*event, flush=True)


if __name__ == "__main__":
    asyncio.run(main())
