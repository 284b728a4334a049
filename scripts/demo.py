"""What llorch does, shown on a real llama.cpp with a real 135M model; run it by `scripts/demo`."""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from plain_http import Client

SCRIPTS = Path(__file__).parent
SLOTS = 2
CAPACITY = 4


def main() -> int:
    """Show the main job, or serve until Ctrl-C; 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="leave it running for curl, until Ctrl-C")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with (
        tempfile.TemporaryDirectory(prefix="llorch-demo-") as logs,
        running_engine(Path(logs)) as engine,
        running_llorch(engine, Path(logs)) as client,
    ):
        if options.serve:
            serve(client)
        else:
            show(client)
    print("\nBoth processes are stopped. That was llorch.")
    return 0


# -- processes -------------------------------------------------------------------------------------


def free_port(wanted: int) -> int:
    """`wanted` if nobody has it, else a free one."""
    for port in (wanted, 0):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("127.0.0.1", port))
            return int(sock.getsockname()[1])
    raise SystemExit("no free port on 127.0.0.1")


@contextlib.contextmanager
def process(
    command: list[str], log: Path, env: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that is stopped, whatever happens."""
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(timeout=10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextlib.contextmanager
def running_engine(logs: Path) -> Iterator[str]:
    """A llama.cpp server with the small model; its URL."""
    port = free_port(8081)
    say(f"Starting llama.cpp on the CPU ({SLOTS} slots, SmolLM2 135M) on port {port}.")
    command = [
        sys.executable,
        str(SCRIPTS / "embedded_engine.py"),
        "--port",
        str(port),
        "--slots",
        str(SLOTS),
    ]
    with process(command, logs / "engine.log"):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def running_llorch(engine: str, logs: Path) -> Iterator[Client]:
    """llorch in front of that engine, ready."""
    port = free_port(8080)
    say(f"Starting llorch on port {port}; a queue of {CAPACITY}, no GPU required: for the demo alone.")
    settings = {
        "LLORCH_BIND_ADDR": f"127.0.0.1:{port}",
        "LLORCH_ADAPTER_ENDPOINT": engine,
        "LLORCH_ADAPTER_SLOTS": "auto",
        "LLORCH_QUEUE_CAPACITY": str(CAPACITY),
        "LLORCH_GPU_REQUIRED": "false",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("LLORCH_")}
    log = logs / "llorch.log"
    os.environ.pop("LLORCH_AUTH_TOKEN", None)
    empty = logs / "config.toml"
    empty.write_text("")
    command = [sys.executable, "-m", "llorch", "serve", "--config", str(empty)]
    with process(command, log, {**inherited, **settings}) as child:
        client = Client(f"http://127.0.0.1:{port}")
        wait_until_ready(client, child, log)
        yield client


def wait_until_ready(client: Client, child: subprocess.Popen[bytes], log: Path) -> None:
    """Show a dot every half second until the pool takes tasks."""
    print("  waiting for the model ", end="", flush=True)
    for _ in range(240):
        with contextlib.suppress(OSError):
            if client.pool()["ready"]:
                print(" ready.", flush=True)
                return
        if child.poll() is not None:
            break
        print(".", end="", flush=True)
        time.sleep(0.5)
    raise SystemExit(f"\nllorch did not become ready:\n{log.read_text()[-2000:]}")


# -- the show --------------------------------------------------------------------------------------


def say(text: str) -> None:
    """One line of explanation."""
    print(f"\n* {text}", flush=True)


def show(client: Client) -> None:
    """The main job, point by point."""
    show_stream(client)
    show_seed(client)
    show_cancel(client)
    show_full_queue(client)
    show_health(client)


def show_stream(client: Client) -> None:
    """A streamed answer."""
    say("A task is submitted; its tokens are streamed as the model makes them:")
    began = time.monotonic()
    task = client.submit(messages=[{"role": "user", "content": "Why is the sky blue?"}], max_tokens=60)
    print("  ", end="")
    first_ms = None
    for event in client.events(task["stream_url"]):
        if event.name == "token":
            first_ms = first_ms or (time.monotonic() - began) * 1000
            print(event.data["t"].replace("\n", "\n  "), end="", flush=True)
        elif event.name == "end":
            end = event.data
    print(
        f"\n  [{end['tokens_out']} tokens in {end['decode_time_ms']} ms; the first after {first_ms:.0f} ms]"
    )


def show_seed(client: Client) -> None:
    """Two seeded runs."""
    say("The same prompt and seed twice, with unrelated work in between; the bytes are compared:")
    texts = []
    for _ in range(2):
        task = client.submit(prompt="A short poem about the sea:\n", max_tokens=40, seed=42)
        texts.append(client.text(task["stream_url"]))
        client.text(client.submit(prompt="Recipes for bread:", max_tokens=20)["stream_url"])
    if texts[0] != texts[1]:
        raise SystemExit(f"  NOT IDENTICAL:\n{texts[0]!r}\n{texts[1]!r}")
    print(f"  {texts[0].strip()[:100]!r} ...\n  identical: {len(texts[0].encode())} bytes, twice")


def show_cancel(client: Client) -> None:
    """A cancel in mid-stream."""
    say("A long answer is cancelled in mid-stream; after the cancel nothing follows but the end:")
    task = client.submit(prompt="Count from one to one thousand: one, two,", max_tokens=1000)
    cancelled = None
    for event in client.events(task["stream_url"]):
        if event.name == "token" and cancelled is None and event.data["i"] == 10:
            cancelled = client.ask("POST", task["cancel_url"]).body
            print(f"  cancelled: {cancelled}")
        elif event.name == "token" and cancelled and event.data["i"] >= cancelled["tokens_out"]:
            raise SystemExit("  A TOKEN AFTER THE CANCEL")
    print(f"  last event: {event.name} {event.data}")


def show_full_queue(client: Client) -> None:
    """A queue that says no."""
    wait_until_idle(client)
    say(f"Tasks are submitted until the queue is full ({SLOTS} run, {CAPACITY} wait, the next is refused):")
    cancels = []
    while (
        answer := client.ask("POST", "/v1/tasks", {"prompt": "A story:", "max_tokens": 500})
    ).status == 202:
        position, start_ms = answer.body["queue_position"], answer.body.get("predicted_start_ms")
        predicted = "" if start_ms is None else f", predicted to start in {start_ms} ms"
        print(f"  202 queue_position {position}{predicted}")
        cancels.append(answer.body["cancel_url"])
    print(f"  {answer.status} {answer.body['code']}: Retry-After {answer.headers['retry-after']} s,", end=" ")
    print(f"X-Backoff-Ms {answer.headers['x-backoff-ms']}")
    for url in reversed(cancels):
        client.ask("POST", url)
    if answer.status != 429 or len(cancels) != SLOTS + CAPACITY:
        raise SystemExit(f"  EXPECTED {SLOTS + CAPACITY} admitted and a 429")


def wait_until_idle(client: Client) -> None:
    """A cancelled slot counts as busy until the engine has let go of it."""
    while (slots := client.pool()["slots"])["busy"] or slots["draining"]:
        time.sleep(0.1)


def show_health(client: Client) -> None:
    """The pool as it is."""
    say("The pool says how it is:")
    for key, value in client.pool().items():
        print(f"  {key}: {value}")


def serve(client: Client) -> None:
    """Print what to try, and wait for Ctrl-C."""
    say("llorch and its engine run until Ctrl-C. In another terminal, try:")
    print(f"""
  curl -s {client.url}/v1/pools/default/health

  curl -s {client.url}/v1/tasks -H 'Content-Type: application/json' \\
       -d '{{"prompt": "Once upon a time", "max_tokens": 100}}'

  curl -N {client.url}/v1/tasks/TASK_ID/stream
  curl -X POST {client.url}/v1/tasks/TASK_ID/cancel

  scripts/smoke {client.url}
""")
    with contextlib.suppress(KeyboardInterrupt):
        signal.pause()


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
