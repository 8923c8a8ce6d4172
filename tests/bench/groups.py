"""The groups of figures, in the order of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from tests.bench import cni, datapath, services
from tests.bench.measure import Settings
from tests.bench.report import Figure

GROUPS: Final[Mapping[str, Callable[[Settings], list[Figure]]]] = {
    "pods": datapath.pods_of,
    "services": services.through_services,
    "cni": cni.add_and_delete,
}
TITLES: Final[Mapping[str, str]] = {
    "pods": "Pod to pod",
    "services": "Services",
    "cni": "CNI plugin",
}
WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "pods": (
        "One TCP connection (`labtool rr`), a connection for each request (`labtool crr`), one stream (`iperf3`).",
        "The policy holds on both ends: the client's egress and the server's ingress, by label and port.",
    ),
    "services": (
        "Selector-less Services with one backend each, the one measured created last; client and backend on one node.",
        "kube-proxy's shape: the same number of Services as iptables rules (legacy back end) on a routing host.",
    ),
    "cni": (
        "Whole processes as a runtime starts them: fork, exec, configuration in, result out, exit; a fresh",
        "network namespace each time, made outside the clock.",
    ),
}
