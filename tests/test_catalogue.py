"""The catalogue of faults and attacks: each has an id, and at least one test that carries it."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

FAULTS = {
    "E1": "the engine refuses connections",
    "E2": "the engine says that it is loading",
    "E3": "it accepts and sends no headers",
    "E4": "it finds the prompt too long",
    "E5": "it refuses parameters, or is misconfigured",
    "E6": "500, HTML, an empty body, endless error text",
    "E7": "a redirect",
    "E8": "an error frame in mid-stream",
    "E9": "a reset or an end at any byte of the answer",
    "E10": "a clean end without the final chunk",
    "E11": "two finals, tokens after the final",
    "E12": "it stalls anywhere; pings are no progress",
    "E13": "a byte a segment, ten thousand events in one, odd but legal framing",
    "E14": "a line without end",
    "E15": "what is not HTTP",
    "E16": "text that is odd but legal, and JSON that is not",
    "E17": "a partial character at the limit",
    "E18": "killed in mid-stream, and back again",
    "E19": "it goes on generating after we left",
    "E20": "health is good, compute hangs",
    "E21": "it comes back as another",
    "E23": "timings that are nonsense",
    "C1": "a client leaves",
    "C3": "a client reads slowly, or never",
    "C4": "a reader comes back with any id",
    "C6": "too many streams",
    "C7": "too few file descriptors",
    "C8": "huge bodies",
    "C9": "malformed JSON",
    "C10": "malformed HTTP",
    "C11": "a full queue",
    "C12": "a cancel in each state",
    "C13": "many cancels at once",
    "C16": "half-open headers and dripping bodies",
    "P1": "SIGTERM in each state",
    "P2": "a second signal",
    "P4": "stdout is gone",
    "P6": "a bug ends the dispatcher",
    "T1": "DNS rebinding",
    "T2": "CSRF without preflight",
    "T3": "a cross-origin read",
    "T4": "tokens that are missing, wrong or odd",
    "T7": "the loopback exemption behind a proxy",
    "T9": "request smuggling",
    "T12": "parameter bombs",
    "T13": "injection into the stream",
    "T17": "injection into the log",
    "T18": "secrets in errors, repr and logs",
}


def docstrings() -> list[str]:
    """The docstrings of all tests."""
    trees = (ast.parse(path.read_text("utf-8")) for path in TESTS.rglob("test_*.py"))
    functions = (
        node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [ast.get_docstring(node) or "" for node in functions if node.name.startswith("test_")]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_a_test(fault: str) -> None:
    """Each id of the catalogue stands in the docstring of a test."""
    carries = re.compile(rf"\b{fault}\b")
    assert any(carries.search(text) for text in docstrings()), f"no test carries {fault}: {FAULTS[fault]}"
