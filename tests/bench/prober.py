"""Who answers new connections, watched from inside a pod: `python prober.py HOST PORT` asks `who` of a labtool UDP
server every millisecond, each time from a new socket, and prints `TIME NAME` whenever the answer changes. TIME is when
the first datagram that got this answer was sent, in seconds of the monotonic clock; NAME is `-` for no answer.

Standard library only: it starts often, and shares the machine with what it measures."""

from __future__ import annotations

import json
import select
import socket
import sys
import time
from typing import Final

PACE: Final = 0.001
PATIENCE: Final = 0.02


def ask(address: tuple[str, int]) -> str:
    """The name of the server that answers one datagram of a new socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(b"who\n", address)
            if not select.select([sock], [], [], PATIENCE)[0]:
                return "-"
            return str(json.loads(sock.recv(4096))["name"])
        except OSError:  # refused: nobody is there
            return "-"


def main() -> None:
    """Until killed."""
    address = (sys.argv[1], int(sys.argv[2]))
    before, following = "", time.monotonic()
    while True:
        sent = time.monotonic()
        name = ask(address)
        if name != before:
            print(f"{sent:.6f} {name}", flush=True)
            before = name
        following = max(following + PACE, time.monotonic())
        time.sleep(max(following - time.monotonic(), 0))


if __name__ == "__main__":
    main()
