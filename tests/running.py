"""The scripts of this project, run as a user runs them."""

import asyncio
import os
import sys
from pathlib import Path
from typing import NamedTuple

SCRIPTS = Path(__file__).parent.parent / "scripts"


class Said(NamedTuple):
    """What a script said: its exit code, the lines on stdout, and what came on stderr."""

    code: int
    lines: list[str]
    err: str

    @property
    def verdicts(self) -> dict[str, str]:
        """The points that it judged, each with its verdict, the first word of the line."""
        heads = [line.partition(": ")[0].split() for line in self.lines if not line.startswith(" ")]
        return {head[1]: head[0] for head in heads if len(head) == 2}


async def run_script(name: str, *argv: str | Path, **env: str) -> Said:
    """Run it to its end, with nothing of llorch in its environment but `env`."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("LLORCH_")}
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, SCRIPTS / name, *argv],
        env=inherited | env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    assert process.returncode is not None
    return Said(process.returncode, out.decode().splitlines(), err.decode())
