"""What a packet costs in each path, in nanoseconds, as JSON.

Programs change their packets, so a test run can't be repeated on one: each sample is a run of its own, timed by the
kernel, and the median counts. `floor` is the shortest program there is under the same clock; `ns` is without it.
"""

import argparse
import json
import os
import platform
import statistics
from dataclasses import dataclass

from datapath import EGRESS, ENFORCE_EGRESS, ENFORCE_INGRESS, INGRESS, Datapath
from record import (
    A_IDENTITY,
    B_IDENTITY,
    C_IDENTITY,
    OVERLAY,
    Build,
    Prepare,
    Wire,
    base_rows,
    context,
    nothing,
    send,
    syn,
    udp,
)  # fmt: skip
from test_nodeport import call, nodeport
from test_policy import enforce, rule
from test_translate import service

from fimbria.kernel.bpf import prog_test_run

BOTH = ENFORCE_EGRESS | ENFORCE_INGRESS


@dataclass(frozen=True)
class Path:
    name: str
    program: str
    packet: Build
    rows: Prepare = nothing
    before: tuple[tuple[str, Build], ...] = ()
    mark: int = 0


ALLOW = enforce(rule(B_IDENTITY, EGRESS, proto=6), rule(C_IDENTITY, EGRESS, proto=6),
                rule(A_IDENTITY, INGRESS, proto=6), a=BOTH, b=BOTH)  # fmt: skip
ACK = syn(flags="A")
OPEN_B = (("from_pod", lambda w: w.sent("b", ACK)),)
ASKED = (("from_pod", lambda w: w.sent("world", udp())), ("to_network", lambda w: w.routed("a", "world", udp())))
NODE_PORT = call(payload=syn(40000, 30080, "A"))
PATHS = [
    Path("floor", "to_pod", lambda w: w.routed("front", "a", udp()), mark=0xF4),
    Path("pod to pod, one node", "from_pod", lambda w: w.sent("b", ACK), before=OPEN_B),
    Path("pod to pod, one node, policy", "from_pod", lambda w: w.sent("b", ACK), ALLOW, OPEN_B),
    Path("pod to pod, to the overlay", "from_pod", lambda w: w.sent("c", ACK),
         before=(("from_pod", lambda w: w.sent("c", ACK)),)),
    Path("pod to pod, to the overlay, policy", "from_pod", lambda w: w.sent("c", ACK), ALLOW,
         (("from_pod", lambda w: w.sent("c", ACK)),)),
    Path("service by packet, one node", "from_pod", lambda w: w.sent("front", ACK), service("b"),
         (("from_pod", lambda w: w.sent("front", ACK)),)),
    Path("pod to world", "from_pod", lambda w: w.sent("world", udp()), before=ASKED),
    Path("masquerading out", "to_network", lambda w: w.routed("a", "world", udp()), before=ASKED),
    Path("masquerading in", "from_network", lambda w: w.routed("world", "node", udp(53, 61000)), before=ASKED),
    Path("node's own out (VXLAN)", "to_network", lambda w: w.routed("node", "other", udp(50000, 8472))),
    Path("node's own in (VXLAN)", "from_network", lambda w: w.routed("other", "node", udp(50000, 8472))),
    Path("node's own out (TCP)", "to_network", lambda w: w.routed("node", "world", syn(50000, 443, "A"))),
    Path("node's own in (TCP)", "from_network", lambda w: w.routed("world", "node", syn(443, 50000, "A"))),
    Path("network to pod", "from_network", lambda w: w.routed("world", "a", syn(443, 50000, "A")),
         before=(("from_network", lambda w: w.routed("world", "a", syn(443, 50000, "A"))),)),
    Path("node port, pod here", "from_network", NODE_PORT, nodeport("a"), (("from_network", NODE_PORT),)),
    Path("node port, pod elsewhere", "from_network", NODE_PORT, nodeport("c"), (("from_network", NODE_PORT),)),
    Path("stack to pod", "to_pod", lambda w: w.routed("b", "a", syn(80, 40000, "A")), before=OPEN_B),
    Path("stack to pod, policy", "to_pod", lambda w: w.routed("b", "a", syn(80, 40000, "A")), ALLOW, OPEN_B),
]  # fmt: skip


def measure(dp: Datapath, path: Path, family: int, samples: int) -> tuple[float, float]:
    """Median and spread (half the distance between the quartiles) in ns."""
    w = Wire(family)
    dp.clear()
    base_rows(dp)
    path.rows(dp, w)
    for program, build in path.before:
        send(dp, program, build(w))
    fd, packet, ctx = dp.programs[path.program].fd, bytes(path.packet(w)), context(path.mark)
    times = [prog_test_run(fd, packet, ctx).duration_ns for _ in range(samples)]
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    dp = Datapath(OVERLAY)
    results = []
    try:
        for family in (4, 6):
            floor = measure(dp, PATHS[0], family, options.samples)[0]
            for path in PATHS:
                median, spread = measure(dp, path, family, options.samples)
                results.append({"path": path.name, "family": family, "ns": round(median - floor, 1),
                                "spread": round(spread, 1), "floor": round(floor, 1)})  # fmt: skip
    finally:
        dp.close()
    print(json.dumps({"kernel": platform.release(), "samples": options.samples, "paths": results}, indent=1))


if __name__ == "__main__":
    main()
