"""Connections through a ClusterIP with many Services present, ours and kube-proxy's iptables."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

from tests.bench import baseline, rules
from tests.bench.labs import BenchPod, bench_lab, place, settle, start_pods
from tests.bench.measure import BenchError, Place, Settings, interleave, rate
from tests.bench.report import Figure, Goal, explain, figure

from fimbria.lab.handle import Lab
from fimbria.lab.objects import Objects
from fimbria.sources.k8s import config

SIZES: Final = (10, 1000, 10000)
PODS: Final = (
    BenchPod("client", "node1", "{role: client}", False),
    BenchPod("server", "node1", "{role: server}", True),
)
CLOSE: Final = Goal("ratio", ">=", 0.95)
MODES: Final = {"crr": "connect+request+close", "rr": "request/response"}
AT_ONCE: Final = 32


def through_services(settings: Settings) -> list[Figure]:
    """All figures of Services."""
    sizes = (10, 100) if settings.quick else SIZES
    found: list[Figure] = []
    kept: dict[str, dict[int, list[float]]] = {m: {} for m in MODES}
    with ExitStack() as stack:
        lab = stack.enter_context(bench_lab(settings.say, "services", nodes=1))
        start_pods(lab, PODS)
        client, backend = place(lab, "client"), lab.addresses("server")[0]
        clean = stack.enter_context(baseline.net("clean"))
        clean_address = baseline.one_node_routed(clean)
        have = 0
        for size in sizes:
            settings.say(f"{size:,} Services: creating them")
            asyncio.run(_create(lab, range(have + 1, size + 1), backend))
            have = size
            vip = rules.address(size)
            _await_service(lab, client, vip)
            with baseline.net(f"ipt{size}") as proxied:
                address = baseline.one_node_routed(proxied)
                proxied.restore("host", rules.kube_proxy(size, address, "10.9.0.0/16"))
                for mode, name in MODES.items():
                    settings.say(f"{size:,} Services: {name}")
                    samples = interleave({
                        "direct": partial(rate, client, mode, backend),
                        "vip": partial(rate, client, mode, vip, rules.PORT),
                        "clean": partial(rate, clean.place("a"), mode, clean_address),
                        "iptables": partial(rate, proxied.place("a"), mode, vip, rules.PORT),
                    }, settings.rounds)  # fmt: skip
                    found += _figures(size, name, samples)
                    kept[mode][size] = [a / b for a, b in zip(samples["vip"], samples["direct"], strict=True)]
    return found + _independence(kept)


def _figures(size: int, name: str, samples: dict[str, list[float]]) -> list[Figure]:
    ours = figure(f"ClusterIP, {size:,} Services: {name}", "/s", samples["vip"], baseline=samples["direct"],
                  against="the pod's address", goal=CLOSE)  # fmt: skip
    theirs = figure(f"kube-proxy's iptables, {size:,} Services: {name}", "/s", samples["iptables"],
                    baseline=samples["clean"], against="direct, no rules")  # fmt: skip
    return [explain(ours), theirs]


def _independence(kept: dict[str, dict[int, list[float]]]) -> list[Figure]:
    found = []
    for mode, by_size in kept.items():
        small, large = min(by_size), max(by_size)
        name = f"ClusterIP against direct, {large:,} Services against {small:,}: {MODES[mode]}"
        found.append(explain(figure(name, "of direct", by_size[large], baseline=by_size[small],
                                    against=f"{small:,} Services", goal=CLOSE)))  # fmt: skip
    return found


def objects(number: int, backend: str) -> list[tuple[str, dict[str, Any]]]:
    """A Service without a selector and its EndpointSlice, each with the path to post it to."""
    name = f"s{number}"
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"clusterIP": rules.address(number), "ports": [{"name": "p", "port": rules.PORT, "targetPort": 9000}]},
    }  # fmt: skip
    slice_ = {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
        "endpoints": [{"addresses": [backend], "conditions": {"ready": True}}],
        "ports": [{"name": "p", "port": 9000, "protocol": "TCP"}],
    }  # fmt: skip
    return [
        ("/api/v1/namespaces/default/services", service),
        ("/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", slice_),
    ]


async def _create(lab: Lab, numbers: range, backend: str) -> None:
    todo = [entry for n in numbers for entry in objects(n, backend)]
    cluster = config.load(lab.paths.host_kubeconfig)
    async with Objects(cluster, component="bench", rate=100_000, burst=100_000) as client:

        async def worker() -> None:
            while todo:
                path, body = todo.pop()
                await client.request("POST", path, body)

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))


def _await_service(lab: Lab, client: Place, vip: str) -> None:
    """Until the last Service answers and every process has come to rest."""

    def answers() -> bool:
        try:
            return rate(client, "crr", vip, rules.PORT) > 0
        except BenchError:
            return False

    lab.wait(f"Service {vip} answers", answers, 120.0)
    settle(lab)
