"""Connections to a Service with many others present, from a pod and from outside, ours in each way and the real
kube-proxy's."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from tests.bench import baseline, kubeproxy
from tests.bench.cluster_data import Row
from tests.bench.kubeproxy import KubeProxy
from tests.bench.labs import BenchPod, bench_lab, like_wires, load, place, settle, start_pods
from tests.bench.measure import Measure, Place, Settings, interleave, rate
from tests.bench.report import Figure, Goal, explain, figure, paired_ratio
from tests.bench.service_data import PORT, address, endpoint_slice, rows, service

from fimbria.lab.handle import Lab

SIZES: Final = (1, 100, 1000, 10_000, 30_000)
OUTSIDE: Final = (1, 1000, 30_000)  # sizes at which node ports are measured too
# One lab for each way of ours: what is compared runs side by side.
WAYS: Final[dict[str, tuple[str, ...]]] = {
    "socket": (),
    "packet": ("socket-services=host", "forwarding=dsr"),
    "xdp": ("xdp=native",),
}
PODS: Final = (
    BenchPod("client", "node1", "{role: client}", False),
    BenchPod("near", "node1", "{role: near}", True),
    BenchPod("far", "node2", "{role: far}", True),
)
NODES: Final = {kubeproxy.HOST: "node1", "other": "node2"}
CLEAN: Final = "clean"
TWINS: Final = (CLEAN, *kubeproxy.MODES)
CLOSE: Final = Goal("ratio", ">=", 0.95)
AHEAD: Final = Goal("ratio", ">=", 1.0)
MODES: Final = {"crr": "connect+request+close", "rr": "request/response"}
SECONDS: Final = 0.3
SYNC: Final = 120.0
# The first sync of 30,000 Services in nftables mode keeps a processor in the kernel for more than four minutes (an
# anonymous set for each is bound within one transaction, whose length each of them walks): not on a shared machine.
NFTABLES_MOST: Final = 10_000
NODE_PORTS: Final = {"near": 31080, "far": 31081}
NODE_PORT_NUMBERS: Final = {"near": 60_000, "far": 60_001}
Samples = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of connection: which variants of ours it has, and what they are compared with. Variants are named by their
    way or, for twins, by the twin; "direct" goes to the pod's own address within our lab."""

    name: str
    ours: dict[str, str]
    direct: bool = False


INSIDE: Final = Kind("ClusterIP", {"socket": "by socket", "packet": "by packet"}, direct=True)
NEAR: Final = Kind("node port, backend on that node", {"socket": "tc", "xdp": "XDP"})
FAR: Final = Kind("node port, backend on another node", {"socket": "tc, SNAT", "packet": "tc, direct return",
                                                         "xdp": "XDP, SNAT"})  # fmt: skip


@dataclass(frozen=True, slots=True)
class World:
    """Everything that is measured: labs by way, twins by name, the pods' addresses by lab."""

    labs: dict[str, Lab]
    twins: dict[str, baseline.Net]
    pods: dict[str, dict[str, str]]


def through_services(settings: Settings) -> list[Figure]:
    """All figures of connections."""
    found: list[Figure] = []
    kept: dict[str, dict[int, Samples]] = {m: {} for m in MODES}
    sizes = SIZES[:2] if settings.quick else SIZES
    with ExitStack() as stack:
        world = _build(stack, settings)
        for before, size in zip((0, *sizes), sizes, strict=False):
            settings.say(f"{many(size)}: creating them")
            for way, lab in world.labs.items():
                load(lab, _objects(range(before + 1, size + 1), world.pods[way]))
            with ExitStack() as proxies:
                _start_proxies(proxies, world, _modes(size), address(size), settings)
                for mode, load_name in MODES.items():
                    for kind in (INSIDE, NEAR, FAR) if settings.quick or size in OUTSIDE else (INSIDE,):
                        settings.say(f"{many(size)}: {kind.name}, {load_name}")
                        samples = interleave(_variants(world, kind, mode, size), settings.rounds)
                        found += _figures(kind, size, load_name, samples)
                        if kind is INSIDE:
                            kept[mode][size] = samples
    return found + _independence(kept)


def many(number: int) -> str:
    """For names of figures."""
    return f"{number:,} Service{'s' if number > 1 else ''}"


def _modes(size: int) -> Sequence[str]:
    """Of kube-proxy, those that are measured with that many Services."""
    return [m for m in kubeproxy.MODES if m != "nftables" or size <= NFTABLES_MOST]


# --- what is there -----------------------------------------------------------------------------------------------


def _build(stack: ExitStack, settings: Settings) -> World:
    labs = {}
    for way, options in WAYS.items():
        spec = {"nodes": 2, "routing": "native", "agent_options": options, "source_check": False}
        labs[way] = stack.enter_context(bench_lab(settings.say, way, **spec))
        start_pods(labs[way], PODS)
        if way == "xdp":
            like_wires(labs[way], [("node/fabric", "node1")], ["node/world", "far"])
    pods = {way: {p.name: lab.addresses(p.name)[0] for p in PODS} for way, lab in labs.items()}
    twins = {name: _twin(stack, labs["socket"], name, pods["socket"]) for name in TWINS}
    return World(labs, twins, pods)


def _twin(stack: ExitStack, lab: Lab, name: str, addresses: dict[str, str]) -> baseline.Net:
    """The lab's nodes and pods without us: same addresses, plain veth pairs and routing."""
    net = stack.enter_context(baseline.net(name))
    nodes = {theirs: ours for ours, theirs in NODES.items()}
    baseline.cluster_as(net, lab.spec, NODES, {p.name: (nodes[p.node], addresses[p.name]) for p in PODS})
    for pod in PODS:
        if pod.serves:
            net.serve(pod.name)
    if name in kubeproxy.MODES:
        kubeproxy.connect(net, lab)
    return net


def _objects(numbers: range, pods: dict[str, str]) -> Iterator[Row]:
    """Services with a backend on the client's node, and the two with node ports, which come again each time."""
    services: list[dict[str, Any]] = [service(n) for n in numbers]
    slices = [endpoint_slice(n, [pods["near"]]) for n in numbers]
    for where, number in NODE_PORT_NUMBERS.items():
        services.append(service(number, node_port=NODE_PORTS[where]))
        slices.append(endpoint_slice(number, [pods[where]]))
    return rows(services, slices)


def _start_proxies(stack: ExitStack, world: World, modes: Sequence[str], vip: str, settings: Settings) -> None:
    """Each mode of kube-proxy in its own node, and wait until everybody has the last Service and is at rest."""
    lab, running = world.labs["socket"], []
    for mode in modes:
        net = world.twins[mode]
        stack.callback(kubeproxy.flush, net)
        running.append(stack.enter_context(KubeProxy(net, lab, mode, lab.spec.node("node1").ipv4)))
    for proxy in running:
        seconds = proxy.wait(partial(rate, proxy.net.place("client"), "crr", vip, PORT, 0.01), SYNC)
        settings.say(f"kube-proxy, {proxy.mode}: answers after {seconds:.1f} s")
    for way, each in world.labs.items():
        works = partial(rate, place(each, "client"), "crr", vip, PORT, 0.01)
        each.wait(f"Service {vip} answers {way}", partial(kubeproxy.succeeds, works), 120.0)
    for proxy in running:
        proxy.settle(60.0)
    for each in world.labs.values():
        settle(each)


# --- measuring ---------------------------------------------------------------------------------------------------


def _variants(world: World, kind: Kind, mode: str, size: int) -> dict[str, Measure]:
    """What is measured side by side, by name."""
    if kind is INSIDE:
        return _inside(world, mode, size)
    where = "near" if kind is NEAR else "far"
    target, port = world.labs["socket"].spec.node("node1").ipv4, NODE_PORTS[where]
    clients: dict[str, Place] = {way: place(world.labs[way], "node/world") for way in kind.ours}
    clients |= {name: world.twins[name].place("world") for name in _modes(size)}
    found: dict[str, Measure] = {n: partial(rate, c, mode, target, port, SECONDS) for n, c in clients.items()}
    backend = world.pods["socket"][where]
    return found | {CLEAN: partial(rate, world.twins[CLEAN].place("world"), mode, backend, seconds=SECONDS)}


def _inside(world: World, mode: str, size: int) -> dict[str, Measure]:
    clients = {way: place(world.labs[way], "client") for way in INSIDE.ours}
    backend = world.pods["socket"]["near"]
    direct = {"direct": clients["socket"], CLEAN: world.twins[CLEAN].place("client")}
    clients |= {name: world.twins[name].place("client") for name in _modes(size)}
    vip = address(size)
    found: dict[str, Measure] = {n: partial(rate, c, mode, vip, PORT, SECONDS) for n, c in clients.items()}
    return found | {n: partial(rate, c, mode, backend, seconds=SECONDS) for n, c in direct.items()}


def _figures(kind: Kind, size: int, load_name: str, samples: Samples) -> list[Figure]:
    """Each way of ours against the better mode of kube-proxy; the note has what everybody reaches of a direct
    connection on a node that has neither."""
    modes = _modes(size)
    best = max(modes, key=lambda m: statistics.median(samples[m]))
    found = []
    for way, words in kind.ours.items():
        name = f"{kind.name}, {words}, {many(size)}: {load_name}"
        if kind.direct and way == "socket":
            found.append(explain(figure(f"{name}, against the pod's address", "/s", samples[way], goal=CLOSE,
                                        baseline=samples["direct"], against="the pod's address")))  # fmt: skip
        shares = [f"{who} {paired_ratio(samples[n], samples[CLEAN]):.2f}" for who, n in
                  (("ours", way), *((f"kube-proxy {m}", m) for m in modes))]  # fmt: skip
        found.append(explain(figure(f"{name}, against kube-proxy", "/s", samples[way], baseline=samples[best],
                                    against=best, goal=AHEAD, note=f"of direct: {', '.join(shares)}")))  # fmt: skip
    return found


def _independence(kept: dict[str, dict[int, Samples]]) -> list[Figure]:
    """Whether many Services make a connection slower; what it costs on the same machine at that time taken out."""
    found = []
    for mode, by_size in kept.items():
        small, large = min(by_size), max(by_size)
        shares = {n: [a / b for a, b in zip(s["socket"], s["direct"], strict=True)] for n, s in by_size.items()}
        name = f"ClusterIP against direct, {many(large)} against {many(small)}: {MODES[mode]}"
        found.append(explain(figure(name, "of direct", shares[large], baseline=shares[small],
                                    against=many(small), goal=CLOSE)))  # fmt: skip
    return found
