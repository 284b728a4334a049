"""What llorch does, shown on a real llama.cpp with a real 135M model; run it by `scripts/demo`."""

import argparse
import contextlib
import signal
import tempfile
import time
from pathlib import Path

from plain_http import Client
from stack import leave_on_sigterm, running_engine, running_llorch, say

SLOTS = 2
CAPACITY = 4


def main() -> int:
    """Show the main job, or serve until Ctrl-C; 0 if all went well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help="leave it running for curl, until Ctrl-C")
    options = parser.parse_args()
    leave_on_sigterm()
    with (
        tempfile.TemporaryDirectory(prefix="llorch-demo-") as logs,
        running_engine(Path(logs), slots=SLOTS) as engine,
        running_llorch(engine.url, Path(logs), capacity=CAPACITY, purpose="the demo") as client,
    ):
        if options.serve:
            serve(client)
        else:
            show(client)
    print("\nBoth processes are stopped. That was llorch.")
    return 0


# -- the show --------------------------------------------------------------------------------------


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
