"""The groups of figures, in the order of the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from tests.bench import (
    agent,
    api,
    changes,
    cni,
    datapath,
    ipvs,
    kubelet,
    observer,
    programming,
    programs,
    scale,
    services,
)
from tests.bench.measure import Settings
from tests.bench.report import Figure

GROUPS: Final[Mapping[str, Callable[[Settings], list[Figure]]]] = {
    "pods": datapath.pods_of,
    "services": services.through_services,
    "changes": changes.changes,
    "programming": programming.programming,
    "ipvs": ipvs.through_ipvs,
    "cni": cni.add_and_delete,
    "agent": agent.agent,
    "crowd": agent.crowd,
    "kubelet": kubelet.kubelet,
    "programs": programs.per_packet,
    "processes": observer.processes,
    "api": api.api,
    "scale": scale.scale,
}
OPTIONAL: Final = frozenset(("ipvs", "kubelet", "scale"))  # take long, or much of the machine: only by their names
TITLES: Final[Mapping[str, str]] = {
    "pods": "Pod to pod",
    "services": "Services: connections",
    "changes": "Services: changes",
    "programming": "Services: very many at once, one of very many",
    "ipvs": "Services: connections, beside IPVS in a virtual machine",
    "cni": "CNI plugin",
    "agent": "Agent: start, memory, enforcement, a large cluster",
    "crowd": "Agent: many pods on one node",
    "kubelet": "Pods on the real kubelet, phase by phase",
    "programs": "Packet programs",
    "processes": "Operator and observer",
    "api": "API client: tens of thousands of objects",
    "scale": "A cluster of thousands of nodes on a real API server",
}
WORDS: Final[Mapping[str, tuple[str, ...]]] = {
    "pods": (
        "One TCP connection (`labtool rr`), a connection for each request (`labtool crr`), one stream (`iperf3`).",
        "The policy holds on both ends: the client's egress and the server's ingress, by label and port.",
    ),
    "services": (
        "Selector-less Services with one backend each, the one measured created last; client and backend on one node.",
        "Node ports are asked from outside the cluster, at the node that has the backend or at another one.",
        "kube-proxy is the real one of Kubernetes 1.36 in each mode (iptables: legacy back end), following the same",
        "API server in a node of its own that is like ours but for us: plain veth pairs, routing, the same addresses.",
        "The baseline is its better mode; the notes say what everybody reaches of a direct connection.",
        "nftables mode up to 10,000: the first sync of 30,000 holds a CPU in the kernel for over four minutes here.",
    ),
    "changes": (
        "An EndpointSlice moves a Service from one backend to another; a pod asks the Service who it is from a new UDP",
        "socket every millisecond. The clock runs from before the request to the API until the first datagram after",
        "which none goes to the old backend. kube-proxy as above, alone on the machine with the API server, with its",
        "defaults: it syncs at most once a second.",
    ),
    "programming": (
        "All objects are in the API before anybody starts; our agent begins without pins, journal and devices.",
        "Ours is done when it says that it is ready (the rows are counted), kube-proxy when the last Service answers.",
        "Memory and CPU of the process (kube-proxy: CPU also of the `nft` and `iptables-restore` that it runs).",
    ),
    "ipvs": (
        "Everything in one virtual machine with Debian's kernel 6.12 and one emulated processor, ours too; 3 rounds of",
        "2 s samples. Only the ratios mean anything.",
    ),
    "cni": (
        "Whole processes as a runtime starts them: fork, exec, configuration in, result out, exit; a fresh",
        "network namespace each time, made outside the clock.",
    ),
    "agent": (
        "One node; PSS of the agent's process. The large cluster exists in the API server only: CiliumNodes,",
        "CiliumIdentities and CiliumEndpoints as agents would report them, written into its database.",
        "Enforcement is seen by a UDP echo a millisecond between two pods; the policy selects half of all identities.",
    ),
    "crowd": ("Pods by real CNI ADDs, each with a network namespace, veth, programs and policy row; no containers.",),
    "kubelet": (
        "A real cluster of two nodes, Fimbria on one, Debian's `bridge`, `host-local`, `portmap` and kube-proxy",
        "(nftables) on the other, in turn. Pods of one `pause` container, the image there, put on their node by name.",
        "Phases as kubelet and containerd log them, between what a watch of the API tells. Control plane, both nodes",
        "and all pods share the machine's cores: the phases that aren't CNI say how busy those were.",
    ),
    "programs": (
        "One packet in one program by the kernel's test runs, the empty run's time taken off; established connections.",
        "Redirecting, the pod's stack and the wire are not part of it.",
    ),
    "api": (
        "Replayed: pages and watch streams from files, in a process of its own; CPU seconds. The real API server is",
        "Kubernetes 1.36 on this machine with etcd 3.6 in memory; a sample is a fresh process until its table is full.",
    ),
    "scale": (
        "Nodes, pods, identities and CiliumEndpoints are put into etcd; then the real operator, simulated agents (the",
        "allocator and publisher of real ones) and a few nodes with all informers of real agents work on it, on one",
        "machine whose cores API server and etcd share: bytes, requests, events and CPU hold elsewhere, delays are",
        "upper bounds. Thousands of nodes need what one needs, multiplied. `FIMBRIA_BENCH_SCALE=5000x100000` is the",
        "full size.",
    ),
    "processes": ("PSS and CPU of processes in a small lab; a pod that floods a closed port.",),
}
