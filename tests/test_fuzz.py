"""The fuzzer finds nothing in llorch, and does find what is planted."""

import pytest

from tests.fuzz.__main__ import fuzz
from tests.fuzz.attack import Failure

SNAPSHOT = """
import asyncio
from llorch import api

async def broken(request):
    {}

api.ROUTES = [(m, path, broken if path == "/v1/tasks/{{task_id}}" else h) for m, path, h in api.ROUTES]
"""
ECHOES = """
from aiohttp import web
from llorch import server

def echo(self, request, status=500, exc=None, message=None):
    response = web.Response(status=status, text=message or repr(exc))
    response.force_close()
    return response

server.Protocol.handle_error = echo
"""
LEAKS = """
from llorch.admission import AdmissionQueue
reserve = AdmissionQueue.reserve

def leaky(self, *args):
    reservation = reserve(self, *args)
    lane = self.lanes["{}"]
    lane.reserved += lane.reserved < 2
    return reservation

AdmissionQueue.reserve = leaky
"""
TELLS = """
import logging
from llorch import wire
task_request = wire.task_request

def telling(body, **limits):
    logging.getLogger("llorch").info("got %s", body)
    return task_request(body, **limits)

wire.task_request = telling
"""


@pytest.mark.timeout(600)
async def test_no_input_breaks_it(pytestconfig: pytest.Config) -> None:
    """Every connection ends, every answer is the contract's, health stays prompt, nothing is left behind."""
    assert await fuzz(range(pytestconfig.getoption("--fuzz-n")), seed=1) == []


async def test_no_input_gets_past_the_token() -> None:
    """The same with a token, which no log line holds."""
    assert await fuzz(range(500), seed=2, token="fuzz-fuzz-fuzz-fuzz") == []


@pytest.mark.parametrize(
    ("bug", "says"),
    [
        (SNAPSHOT.format("raise ValueError"), "status 500"),
        (SNAPSHOT.format("await asyncio.sleep(60)"), "no end within"),
        (SNAPSHOT.format("return api.web.Response(text=request.path)"), "neither JSON"),
        (ECHOES, "the parser's constant"),
        (LEAKS.format("interactive"), "room for 6 interactive tasks answers [202, 202"),
        (LEAKS.format("batch"), "room for 3 batch tasks answers [202, "),
        (TELLS, "llorch says"),
    ],
    ids=["raises", "hangs", "no-json", "echoes", "leaks", "leaks-batch", "tells"],
)
async def test_a_planted_bug_is_found(bug: str, says: str) -> None:
    """Each kind of bug is reported as what it is."""
    failures = await fuzz(range(200), seed=3, before=bug, bound_s=4.0)
    assert any(says in failure.what for failure in failures), _what(failures)


def _what(failures: list[Failure]) -> list[str]:
    return [failure.what for failure in failures]
