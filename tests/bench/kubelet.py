"""Pods on real kubelets, phase by phase: Fimbria on one node, Debian's bridge plugin and the real kube-proxy on the
other node of the same cluster, in turn."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tests.bench import kubeproxy
from tests.bench.measure import BenchError, Settings
from tests.bench.report import Figure, Goal, explain, figure, tail
from tests.cluster.bed import BedError, Cluster, processes
from tests.cluster.bed.layout import addresses
from tests.cluster.traffic import storm
from tests.cluster.traffic.phases import END_PHASES, PHASES, containerd_steps, durations, kubelet_steps

OURS, THEIRS = "node1", "node2"
AGAINST: Final = "bridge + kube-proxy"
NAMESPACE: Final = "default"
KUBELET, CONTAINERD = "/etc/kubernetes/kubelet.json", "/etc/kubernetes/containerd.toml"
LOUD: Final = '\n[debug]\n  level = "debug"\n'
RANGES: Final = ("10.88.2.0/24", "fd00:10:88:2::/64")
AT_ONCE, ROUNDS, SINGLES = 100, 2, 30
CALM: Final = 3.0
PATIENCE: Final = 300.0
ADD, DEL, ALL = "CNI ADD", "CNI DEL", "in all"
SLOW: Final = "two cores shared with the whole cluster: a process that is started waits for them"
Durations = dict[str, list[float]]


def kubelet(settings: Settings) -> list[Figure]:
    """All figures. Raises BenchError, BedError."""
    count, singles = settings.times(AT_ONCE, 5), settings.times(SINGLES, 3)
    with cluster(settings) as bed:
        time.sleep(CALM)
        settings.say(f"{singles} pods, one at a time, on both nodes in turn")
        turns = [(i, n) for i in range(singles) for n in (OURS, THEIRS)]
        pods = [p for i, n in turns for p in storm.pods(NAMESPACE, n, 1, tag=f"one-{n}-{i}")]
        found = figures("one at a time", phases(bed, storm.run(bed, pods, "each", pause=0.2, patience=PATIENCE)))
        lines: list[dict[str, Any]] = []
        for i in range(min(settings.times(ROUNDS, 1), settings.rounds)):
            for node in (OURS, THEIRS)[:: -1 if i % 2 else 1]:
                settings.say(f"{count} pods at once on {node}")
                pods = storm.pods(NAMESPACE, node, count, tag=f"all-{node}-{i}")
                lines += storm.run(bed, pods, "once", patience=PATIENCE)
                time.sleep(CALM)
        found += [*figures(f"{count} at once", phases(bed, lines)), refused(f"{count} at once", lines)]
        settings.say(f"{count} pods at once, an identity each")
        pods = storm.pods(NAMESPACE, OURS, count, tag="kinds", labels_each=True)
        lines = storm.run(bed, pods, "once", patience=PATIENCE)
        found += alone(f"{count} at once, an identity each", phases(bed, lines)[OURS])
        return [*found, refused(f"{count} at once, an identity each", lines)]


# --- the cluster ------------------------------------------------------------------------------------------------------


@contextmanager
def cluster(settings: Settings) -> Iterator[Cluster]:
    """Both nodes Ready, each with its own network; gone afterwards. Raises BedError, BenchError."""
    bed = Cluster(f"bench{os.getpid()}")
    kubeproxy.binary()
    try:
        settings.say(f"cluster {bed.name}")
        bed.up(nodes=2, taints=())
        for node in (OURS, THEIRS):
            _speak(bed, node)
        _bridge(bed, THEIRS)
        _proxy(bed, THEIRS)
        here = {"kubernetes.io/hostname": OURS}
        bed.install_fimbria({
            "nodeSelector": here,
            "operator": {"replicas": 1, "nodeSelector": here, "setNodeTaints": False},
        })  # fmt: skip
        yield bed
    finally:
        bed.down()


def _speak(bed: Cluster, node: str) -> None:
    """Has kubelet and containerd log each step."""
    handle = bed.node(node)
    handle.exec(["tee", CONTAINERD], stdin=handle.exec(["cat", CONTAINERD]) + LOUD)
    told = json.loads(handle.exec(["cat", KUBELET])) | {"logging": {"verbosity": 2}}
    handle.exec(["tee", KUBELET], stdin=json.dumps(told))
    for process in ("kubelet", "containerd"):
        processes.stop(bed.layout, node, process)
    handle.host.start_containerd()
    handle.host.start_kubelet()


def _bridge(bed: Cluster, node: str) -> None:
    """Debian's reference plugins as most installers write them."""
    ipam = {"type": "host-local", "ranges": [[{"subnet": r}] for r in RANGES],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}  # fmt: skip
    plugins = [
        {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": True, "hairpinMode": True, "ipam": ipam},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ]
    conf = {"cniVersion": "1.0.0", "name": "bridge", "plugins": plugins}
    bed.node(node).exec(["tee", "/etc/cni/net.d/10-bridge.conflist"], stdin=json.dumps(conf))


def _proxy(bed: Cluster, node: str) -> None:
    """The real kube-proxy, in the node's namespaces."""
    handle, kubeconfig, config = bed.node(node), "/etc/kubernetes/proxy.conf", "/etc/kubernetes/proxy.json"
    handle.exec(["tee", kubeconfig], stdin=bed.layout.kubeconfig.read_text())
    zero = {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s",
            "udpTimeout": "0s", "udpStreamTimeout": "0s"}  # fmt: skip
    told = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "nftables",
        "clientConnection": {"kubeconfig": kubeconfig}, "hostnameOverride": node, "conntrack": zero,
        "bindAddress": str(addresses(node).ipv4), "clusterCIDR": ",".join(RANGES),
    }  # fmt: skip
    handle.exec(["tee", config], stdin=json.dumps(told))
    processes.start(bed.layout, node, "kube-proxy", [str(kubeproxy.binary()), f"--config={config}"],
                    pid=handle.host.pid, log=Path("/var/log/kube-proxy.log"))  # fmt: skip
    try:
        processes.wait("kube-proxy", lambda: "kube-proxy" in handle.exec(["nft", "list", "tables"]), 60, lambda: "")
    except BedError as error:
        raise BenchError(str(error)) from None


# --- figures ----------------------------------------------------------------------------------------------------------


def phases(bed: Cluster, lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Durations, Durations]]:
    """Milliseconds of each phase of the starts and of the ends, by node. Raises BenchError if a pod wasn't Ready."""
    late = [line["name"] for line in lines if line["ready"] is None or line["gone"] is None]
    if late:
        raise BenchError(f"not Ready, or not gone: {', '.join(late[:5])}")
    found: dict[str, tuple[Durations, Durations]] = {}
    year = datetime.now(UTC).year
    for node in (OURS, THEIRS):
        with bed.layout.log("kubelet", node).open(errors="replace") as log:
            seen = kubelet_steps(log, year)
        with bed.layout.log("containerd", node).open(errors="replace") as log:
            steps = containerd_steps(log)
        mine = [line for line in lines if line["uid"] in steps]

        def gather(which: Mapping[str, tuple[str, str]]) -> Durations:
            each = [durations(line, seen, steps, which, NAMESPACE) for line in mine]  # noqa: B023
            return {name: [d[name] * 1000 for d in each if name in d] for name in which}

        found[node] = gather(PHASES), gather(END_PHASES)
    return found


def figures(label: str, found: Mapping[str, tuple[Durations, Durations]]) -> list[Figure]:
    """Each phase against the other node's: medians, then the slowest hundredth. Only ADD and the whole have goals: the
    rest is not ours, and says what the machine was like."""
    rows = []
    for what, index in (("start", 0), ("end", 1)):
        ours, theirs = found[OURS][index], found[THEIRS][index]
        for name, samples in ours.items():
            if not samples or not theirs[name]:
                raise BenchError(f"{label}: no pod shows {name}")
            goal = Goal("ratio", "<=", 1.0) if name in (ADD, DEL) else None
            rows.append(_row(figure, f"{label}, {what}: {name}", samples, theirs[name], goal))
            rows.append(_row(tail, f"{label}, {what}: {name}, p99", samples, theirs[name], goal))
    return rows


def _row(make: Any, name: str, samples: list[float], theirs: list[float], goal: Goal | None) -> Figure:
    return explain(make(name, "ms", samples, baseline=theirs, against=AGAINST, goal=goal), SLOW)


def alone(label: str, found: tuple[Durations, Durations]) -> list[Figure]:
    """Without another side."""
    start = found[0]
    return [
        make(f"{label}, start: {name}{mark}", "ms", start[name])
        for name in (ADD, ALL)
        for make, mark in ((figure, ""), (tail, ", p99"))
    ]


def refused(label: str, lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Attempts at a pod's sandbox that failed."""
    count = sum(len(line["refusals"]) for line in lines)
    return figure(f"{label}: sandboxes that couldn't be made", "", [float(count)], goal=Goal("median", "<=", 0))
