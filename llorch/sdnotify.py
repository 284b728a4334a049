"""What systemd wants to hear from a `Type=notify` service, over its datagram socket."""

import os
import socket


def notify(state: str) -> None:
    """Send `state` (READY=1, STOPPING=1, WATCHDOG=1 …) to systemd; nothing happens outside of it."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(address)
            sock.sendall(state.encode())
    except OSError:
        pass  # the service works without its supervisor; a lost watchdog beat is systemd's to judge


def watchdog_interval_s() -> float | None:
    """Half of the time systemd waits for a beat, in seconds; None where no watchdog is set."""
    pid, usec = os.environ.get("WATCHDOG_PID"), os.environ.get("WATCHDOG_USEC", "")
    if not usec.isdigit() or int(usec) == 0 or (pid is not None and pid != str(os.getpid())):
        return None
    return int(usec) / 2_000_000
