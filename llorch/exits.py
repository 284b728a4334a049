"""The exit codes of the commands: one meaning each, after sysexits.h where that has one, so that a script
can tell what to do next.
"""

import enum


class Exit(enum.IntEnum):
    """What the exit code of a command says; `MEANING` has it in words."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    CANCELLED = 3
    REFUSED = 65
    NOT_FOUND = 66
    UNAVAILABLE = 69
    BUG = 70
    IO = 74
    BUSY = 75
    PROTOCOL = 76
    NOT_ALLOWED = 77
    CONFIG = 78
    INTERRUPTED = 130


MEANING = {
    Exit.DONE: "done",
    Exit.FAILED: "the task failed; doctor found something bad; or a bug stopped the server",
    Exit.USAGE: "the command line is wrong",
    Exit.CANCELLED: "the task was cancelled by somebody else",
    Exit.REFUSED: "the server refuses this request: a value out of range, too long a prompt",
    Exit.NOT_FOUND: "no such file, task or pool",
    Exit.UNAVAILABLE: "nothing answers, the engine is not ready, or the port is taken: try again later",
    Exit.BUG: "a bug, in the server or here",
    Exit.IO: "stdout can't be written",
    Exit.BUSY: "the queue is full: try again after the time told",
    Exit.PROTOCOL: "what answers is not llorch, or one too old or too new",
    Exit.NOT_ALLOWED: "the token is missing or wrong, or this host may not ask",
    Exit.CONFIG: "the configuration must be mended first",
    Exit.INTERRUPTED: "interrupted by Ctrl-C (143 by SIGTERM, 129 by SIGHUP)",
}


def table() -> str:
    """All of them, a line each, for `--help`."""
    return "\n".join(f"  {code:>3}  {meaning}" for code, meaning in MEANING.items())
