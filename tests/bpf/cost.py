"""What a packet costs in each path, in nanoseconds, as JSON.

Programs change their packets, so a test run can't be repeated on one: each sample is a run of its own, timed by the
kernel, and the median counts. `floor` is the shortest program there is under the same clock; `ns` is without it.
"""

import argparse
import contextlib
import json
import os
import platform
import statistics
import struct
from collections.abc import Iterator
from functools import partial

from costs import PATHS, Path
from costs_services import SERVICES, connects
from datapath import Datapath
from record import NATIVE, OVERLAY, Wire, base_rows, context, send

from fimbria.kernel.bpf import attach_xdp, prog_test_run
from lab import Space

XDP, DRIVER = "from_device", 4
UPLINKS = (("192.168.1.2/24", "192.168.1.1"), ("fd01:1::2/64", "fd01:1::1"))
MOST_FRESH = 500  # connections that the tests' small tables hold


class Node:
    """Every program of a node, overlay and native, and a device with a neighbour that packets leave by."""

    def __init__(self) -> None:
        self.stack = contextlib.ExitStack()
        self.space = Space("cost")
        self.stack.callback(self.space.close)
        self.space.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1, ipv6__conf__default__accept_dad=0)
        self.space.ip("link add up0 type veth peer name up1")
        for device in ("up0", "up1"):
            self.space.ip(f"link set {device} up")
        for address, gateway in UPLINKS:
            self.space.ip(f"addr add {address} dev up0" + (" nodad" if ":" in address else ""))
            self.space.ip(f"route add default via {gateway}")
            self.space.ip(f"neigh add {gateway} lladdr 02:00:00:00:0e:01 dev up0 nud permanent")
        self.uplink = self.space.ifindex("up0")
        self.programs = {"overlay": Datapath(OVERLAY), "native": Datapath(NATIVE, ("pod", "overlay", "host", "xdp"))}
        for dp in self.programs.values():
            self.stack.callback(dp.close)
        # A test run takes the device's receive queue, which a veth has while any program is attached.
        attach = partial(attach_xdp, self.programs["native"].programs[XDP], self.uplink, DRIVER)
        self.stack.enter_context(self.space.inside(attach))

    def run(self, dp: Datapath, program: str, packet: bytes, mark: int = 0) -> int:
        """Nanoseconds."""
        raw = struct.pack("=IIIIII", 0, len(packet), 0, self.uplink, 0, 0) if program == XDP else context(mark)
        return prog_test_run(dp.programs[program].fd, packet, raw).duration_ns


def packets(path: Path, w: Wire, samples: int) -> Iterator[bytes]:
    """The packet again and again; a fresh connection's client ports are patched in, the checksum stays wrong."""
    raw = bytearray(bytes(path.packet(w)))
    for number in range(min(samples, MOST_FRESH) if path.fresh else samples):
        if path.fresh:
            struct.pack_into(">H", raw, 34 if w.family == 4 else 54, 20_000 + number)
        yield bytes(raw)


def measure(node: Node, path: Path, family: int, samples: int) -> tuple[float, float]:
    """Median and spread (half the distance between the quartiles) in ns."""
    w, dp = Wire(family), node.programs[path.node]
    dp.clear()
    base_rows(dp)
    path.rows(dp, w)
    for program, build in path.before:
        if program == XDP:
            node.run(dp, program, bytes(build(w)))
        else:
            send(dp, program, build(w))
    times = [node.run(dp, path.program, packet, path.mark) for packet in packets(path, w, samples)]
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / 2


def line(path: str, family: int, middle: float, spread: float, floor: float) -> dict[str, object]:
    return {"path": path, "family": family, "ns": round(middle - floor, 1), "spread": round(spread, 1),
            "floor": round(floor, 1)}  # fmt: skip


def socket_lines(family: int, floor: float) -> Iterator[dict[str, object]]:
    """The connect hook can't be run for a test: it is timed by the kernel while real sockets connect."""
    for path, samples in connects(family).items():
        low, middle, high = statistics.quantiles(samples, n=4)
        yield line(path, family, middle, (high - low) / 2, 0.0) | {"floor": round(floor, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    results = []
    node = Node()
    try:
        for family in (4, 6):
            run = partial(measure, node, family=family, samples=options.samples)
            floor = node.space.inside(partial(run, PATHS[0]))[0]
            for path in (*PATHS, *SERVICES):
                middle, spread = node.space.inside(partial(run, path))
                results.append(line(path.name, family, middle, spread, floor))
            results += socket_lines(family, floor)
    finally:
        node.stack.close()
    print(json.dumps({"kernel": platform.release(), "samples": options.samples, "paths": results}, indent=1))


if __name__ == "__main__":
    main()
