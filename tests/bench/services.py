"""Connections to a Service with many others present, from a pod and from outside, ours in each way and the real
kube-proxy's."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
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
from tests.bench.rules import PORT, address
from tests.bench.service_data import endpoint_slice, rows, service

from fimbria.lab.handle import Lab

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
CLOSE: Final = Goal("ratio", ">=", 0.95)
AHEAD: Final = Goal("ratio", ">=", 1.0)
MODES: Final = {"crr": "connect+request+close", "rr": "request/response"}
NODE_PORTS: Final = {"near": 31080, "far": 31081}
NODE_PORT_NUMBERS: Final = {"near": 60_000, "far": 60_001}
Samples = dict[str, list[float]]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured where. `outside`: the sizes at which node ports are measured too; `proxies`: kube-proxy's modes,
    each with the most Services that it is given; `seconds` of a sample, `patience` for a sync."""

    sizes: tuple[int, ...]
    outside: tuple[int, ...]
    proxies: Mapping[str, int]
    ways: tuple[str, ...]
    seconds: float
    patience: float

    def modes(self, size: int) -> Sequence[str]:
        """Of kube-proxy, those that are measured with that many Services."""
        return [m for m, most in self.proxies.items() if size <= most]


# The first sync of 30,000 Services in nftables mode keeps a processor in the kernel for more than four minutes (an
# anonymous set for each is bound within one transaction, whose length each of them walks): not on a shared machine.
PLAN: Final = Plan((1, 100, 1000, 10_000, 30_000), (1, 1000, 30_000), {"iptables": 30_000, "nftables": 10_000},
                   tuple(WAYS), 0.3, 120.0)  # fmt: skip


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

    plan: Plan
    labs: dict[str, Lab]
    twins: dict[str, baseline.Net]
    pods: dict[str, dict[str, str]]


def through_services(settings: Settings, plan: Plan = PLAN) -> list[Figure]:
    """All figures of connections."""
    found: list[Figure] = []
    kept: dict[str, dict[int, Samples]] = {m: {} for m in MODES}
    sizes = plan.sizes[:2] if settings.quick else plan.sizes
    with ExitStack() as stack:
        world = _build(stack, plan, settings)
        for before, size in zip((0, *sizes), sizes, strict=False):
            settings.say(f"{many(size)}: creating them")
            for way, lab in world.labs.items():
                load(lab, _objects(range(before + 1, size + 1), world.pods[way]))
            with ExitStack() as proxies:
                _start_proxies(proxies, world, size, settings)
                for mode, load_name in MODES.items():
                    for kind in (INSIDE, NEAR, FAR) if settings.quick or size in plan.outside else (INSIDE,):
                        settings.say(f"{many(size)}: {kind.name}, {load_name}")
                        samples = interleave(_variants(world, kind, mode, size), settings.rounds)
                        found += _figures(kind, size, load_name, samples, plan)
                        if kind is INSIDE:
                            kept[mode][size] = samples
    return found + _independence(kept)


def many(number: int) -> str:
    """For names of figures."""
    return f"{number:,} Service{'s' if number > 1 else ''}"


# --- what is there -----------------------------------------------------------------------------------------------


def _build(stack: ExitStack, plan: Plan, settings: Settings) -> World:
    labs = {}
    for way in plan.ways:
        spec = {"nodes": 2, "routing": "native", "agent_options": WAYS[way], "source_check": False}
        labs[way] = stack.enter_context(bench_lab(settings.say, way, **spec))
        start_pods(labs[way], PODS)
        if way == "xdp":
            stack.enter_context(like_wires(labs[way], [("fabric", "node1")], ["node/world", "far"]))
    pods = {way: {p.name: lab.addresses(p.name)[0] for p in PODS} for way, lab in labs.items()}
    twins = {name: _twin(stack, labs["socket"], name, pods["socket"]) for name in (CLEAN, *plan.proxies)}
    return World(plan, labs, twins, pods)


def _twin(stack: ExitStack, lab: Lab, name: str, addresses: dict[str, str]) -> baseline.Net:
    """The lab's nodes and pods without us: same addresses, plain veth pairs and routing."""
    net = stack.enter_context(baseline.net(name))
    nodes = {theirs: ours for ours, theirs in NODES.items()}
    baseline.cluster_as(net, lab.spec, NODES, {p.name: (nodes[p.node], addresses[p.name]) for p in PODS})
    for pod in PODS:
        if pod.serves:
            net.serve(pod.name)
    if name != CLEAN:
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


def _start_proxies(stack: ExitStack, world: World, size: int, settings: Settings) -> None:
    """Each mode of kube-proxy in its own node, and wait until everybody has the last Service and is at rest."""
    lab, vip, patience, running = world.labs["socket"], address(size), world.plan.patience, []
    for mode in world.plan.modes(size):
        net = world.twins[mode]
        stack.callback(kubeproxy.flush, net)
        running.append(stack.enter_context(KubeProxy(net, lab, mode, lab.spec.node("node1").ipv4)))
    for proxy in running:
        seconds = proxy.wait(partial(rate, proxy.net.place("client"), "crr", vip, PORT, 0.01), patience)
        settings.say(f"kube-proxy, {proxy.mode}: answers after {seconds:.1f} s")
    for way, each in world.labs.items():
        works = partial(rate, place(each, "client"), "crr", vip, PORT, 0.01)
        each.wait(f"Service {vip} answers {way}", partial(kubeproxy.succeeds, works), patience)
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
    clients: dict[str, Place] = {w: place(lab, "node/world") for w, lab in world.labs.items() if w in kind.ours}
    clients |= {name: world.twins[name].place("world") for name in world.plan.modes(size)}
    found: dict[str, Measure] = {
        n: partial(rate, c, mode, target, port, world.plan.seconds) for n, c in clients.items()
    }
    backend = world.pods["socket"][where]
    return found | {CLEAN: partial(rate, world.twins[CLEAN].place("world"), mode, backend, seconds=world.plan.seconds)}


def _inside(world: World, mode: str, size: int) -> dict[str, Measure]:
    clients = {way: place(lab, "client") for way, lab in world.labs.items() if way in INSIDE.ours}
    backend = world.pods["socket"]["near"]
    direct = {"direct": clients["socket"], CLEAN: world.twins[CLEAN].place("client")}
    clients |= {name: world.twins[name].place("client") for name in world.plan.modes(size)}
    vip = address(size)
    found: dict[str, Measure] = {n: partial(rate, c, mode, vip, PORT, world.plan.seconds) for n, c in clients.items()}
    return found | {n: partial(rate, c, mode, backend, seconds=world.plan.seconds) for n, c in direct.items()}


def _figures(kind: Kind, size: int, load_name: str, samples: Samples, plan: Plan) -> list[Figure]:
    """Each way of ours against the better mode of kube-proxy; the note has what everybody reaches of a direct
    connection on a node that has neither."""
    modes = plan.modes(size)
    best = max(modes, key=lambda m: statistics.median(samples[m]))
    found = []
    for way, words in kind.ours.items():
        if way not in samples:
            continue
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
