"""Connections through a ClusterIP with many Services: ours by socket and by packet, and the real kube-proxy's."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Final

from tests.bench import baseline, kubeproxy
from tests.bench.kubeproxy import KubeProxy
from tests.bench.labs import BenchPod, bench_lab, load, place, settle, start_pods
from tests.bench.measure import Measure, Settings, interleave, rate
from tests.bench.report import Figure, Goal, explain, figure
from tests.bench.service_data import PORT, address, endpoint_slice, rows, service

from fimbria.lab.handle import Lab

SIZES: Final = (1, 100, 1000, 10_000, 30_000)
PODS: Final = (
    BenchPod("client", "node1", "{role: client}", False),
    BenchPod("server", "node1", "{role: server}", True),
)
CLOSE: Final = Goal("ratio", ">=", 0.95)
AHEAD: Final = Goal("ratio", ">=", 1.0)
MODES: Final = {"crr": "connect+request+close", "rr": "request/response"}
SECONDS: Final = 0.5
SYNC: Final = 240.0  # seconds; nftables mode needs most of it for 30,000 Services
Samples = dict[str, list[float]]


def through_services(settings: Settings) -> list[Figure]:
    """All figures of ClusterIPs."""
    found: list[Figure] = []
    kept: dict[str, dict[int, Samples]] = {m: {} for m in MODES}
    have = 0
    with ExitStack() as stack:
        lab = stack.enter_context(bench_lab(settings.say, "services", nodes=1))
        start_pods(lab, PODS)
        nets = {name: _twin(stack, lab, name) for name in ("clean", *kubeproxy.MODES)}
        backend = lab.addresses("server")[0]
        for size in SIZES[:2] if settings.quick else SIZES:
            settings.say(f"{many(size)}: creating them")
            numbers = range(have + 1, size + 1)
            load(lab, rows(map(service, numbers), (endpoint_slice(n, [backend]) for n in numbers)))
            have = size
            with ExitStack() as proxies:
                _start_proxies(proxies, lab, nets, address(size), settings)
                for mode, name in MODES.items():
                    settings.say(f"{many(size)}: {name}")
                    samples = kept[mode][size] = interleave(_variants(lab, nets, mode, address(size)), settings.rounds)
                    found += _figures(size, name, samples)
    return found + _independence(kept)


def _twin(stack: ExitStack, lab: Lab, name: str) -> baseline.Net:
    """The lab's node and its two pods without us: same addresses, plain veth pairs and routing."""
    net = stack.enter_context(baseline.net(name))
    baseline.one_node_as(net, {"a": lab.addresses("client")[0], "b": lab.addresses("server")[0]})
    net.serve("b")
    if name in kubeproxy.MODES:
        kubeproxy.connect(net, lab)
    return net


def _start_proxies(stack: ExitStack, lab: Lab, nets: dict[str, baseline.Net], vip: str, settings: Settings) -> None:
    """Each mode of kube-proxy in its own node, and wait until everybody has the last Service and is at rest."""
    running = []
    for mode in kubeproxy.MODES:
        net = nets[mode]
        stack.callback(kubeproxy.flush, net)
        running.append(stack.enter_context(KubeProxy(net, lab, mode, baseline.GATEWAY)))
    for proxy in running:
        seconds = proxy.wait(partial(rate, proxy.net.place("a"), "crr", vip, PORT, 0.01), SYNC)
        settings.say(f"kube-proxy, {proxy.mode}: answers after {seconds:.1f} s")
    lab.wait(f"Service {vip} answers", lambda: kubeproxy.succeeds(
        partial(rate, place(lab, "client"), "crr", vip, PORT, 0.01)), 120.0)  # fmt: skip
    for proxy in running:
        proxy.settle(60.0)
    settle(lab)


def _variants(lab: Lab, nets: dict[str, baseline.Net], mode: str, vip: str) -> dict[str, Measure]:
    client, backend = place(lab, "client"), lab.addresses("server")[0]
    found: dict[str, Measure] = {
        "direct": partial(rate, client, mode, backend, seconds=SECONDS),
        "socket": partial(rate, client, mode, vip, PORT, SECONDS),
        "clean": partial(rate, nets["clean"].place("a"), mode, backend, seconds=SECONDS),
    }
    return found | {m: partial(rate, nets[m].place("a"), mode, vip, PORT, SECONDS) for m in kubeproxy.MODES}


def many(number: int) -> str:
    """For names of figures."""
    return f"{number:,} Service{'s' if number > 1 else ''}"


def _figures(size: int, load_name: str, samples: Samples) -> list[Figure]:
    def one(what: str, ours: str, against: str, words: str, goal: Goal | None = None) -> Figure:
        name = f"{what}, {many(size)}: {load_name}, against {words}"
        return explain(figure(name, "/s", samples[ours], baseline=samples[against], against=words, goal=goal))

    return [
        one("ClusterIP by socket", "socket", "direct", "the pod's address", CLOSE),
        *(one("ClusterIP by socket", "socket", m, f"kube-proxy {m}", AHEAD) for m in kubeproxy.MODES),
        one("ClusterIP by socket", "socket", "clean", "direct without any proxy"),
        *(one(f"kube-proxy {m}", m, "clean", "direct without any proxy") for m in kubeproxy.MODES),
    ]


def _independence(kept: dict[str, dict[int, Samples]]) -> list[Figure]:
    """Whether many Services make a connection slower; what it costs on the same machine at that time taken out."""
    found = []
    for mode, by_size in kept.items():
        small, large = min(by_size), max(by_size)
        shares = {n: [a / b for a, b in zip(s["socket"], s["direct"], strict=True)] for n, s in by_size.items()}
        name = f"ClusterIP against direct, {many(large)} against {small:,}: {MODES[mode]}"
        found.append(explain(figure(name, "of direct", shares[large], baseline=shares[small],
                                    against=many(small), goal=CLOSE)))  # fmt: skip
    return found
