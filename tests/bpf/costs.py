"""The ways of pods through the programs whose cost `cost.py` measures; Services are in `costs_services.py`."""

from dataclasses import dataclass

from datapath import EGRESS, ENFORCE_EGRESS, ENFORCE_INGRESS, INGRESS
from record import A_IDENTITY, B_IDENTITY, C_IDENTITY, Build, Prepare, nothing, syn, udp
from test_policy import enforce, rule
from test_translate import service

BOTH = ENFORCE_EGRESS | ENFORCE_INGRESS


@dataclass(frozen=True)
class Path:
    """`packet` in one program, after `before`. `node`: "overlay" or "native". `fresh`: each time from another client
    port, so that every packet opens a connection."""

    name: str
    program: str
    packet: Build
    rows: Prepare = nothing
    before: tuple[tuple[str, Build], ...] = ()
    mark: int = 0
    node: str = "overlay"
    fresh: bool = False


ALLOW = enforce(rule(B_IDENTITY, EGRESS, proto=6), rule(C_IDENTITY, EGRESS, proto=6),
                rule(A_IDENTITY, INGRESS, proto=6), a=BOTH, b=BOTH)  # fmt: skip
ACK = syn(flags="A")
OPEN_B = (("from_pod", lambda w: w.sent("b", ACK)),)
ASKED = (("from_pod", lambda w: w.sent("world", udp())), ("to_network", lambda w: w.routed("a", "world", udp())))
PATHS = [
    Path("floor", "to_pod", lambda w: w.routed("front", "a", udp()), mark=0xF4),
    Path("pod to pod, one node", "from_pod", lambda w: w.sent("b", ACK), before=OPEN_B),
    Path("pod to pod, one node, new connection", "from_pod", lambda w: w.sent("b", syn()), fresh=True),
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
    Path("stack to pod", "to_pod", lambda w: w.routed("b", "a", syn(80, 40000, "A")), before=OPEN_B),
    Path("stack to pod, policy", "to_pod", lambda w: w.routed("b", "a", syn(80, 40000, "A")), ALLOW, OPEN_B),
]  # fmt: skip
