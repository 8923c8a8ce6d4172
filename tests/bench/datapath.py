"""Pod to pod, on one node and across nodes, with and without a policy, against what the kernel does without us."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

from tests.bench import baseline
from tests.bench.labs import BenchPod, bench_lab, place, start_pods
from tests.bench.measure import Place, Settings, bulk, interleave, rate
from tests.bench.report import Figure, Goal, explain, figure

from fimbria.lab.handle import Lab

WHERE: Final = {"client": "node1", "near": "node1", "far": "node2"}
PODS: Final = tuple(
    BenchPod(f"{role}-{side}", WHERE[role], f"{{role: {role}, side: {side}}}", role != "client")
    for side in ("open", "guarded")
    for role in WHERE
)
# Both directions: the servers let in nobody but the guarded client, which may go nowhere else.
POLICIES: Final = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: servers}
spec:
  podSelector: {matchLabels: {side: guarded}, matchExpressions: [{key: role, operator: In, values: [near, far]}]}
  ingress:
    - from: [{podSelector: {matchLabels: {role: client, side: guarded}}}]
      ports: [{port: 9000}, {port: 5201}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: client}
spec:
  podSelector: {matchLabels: {role: client, side: guarded}}
  policyTypes: [Egress]
  egress:
    - to: [{podSelector: {matchExpressions: [{key: role, operator: In, values: [near, far]}]}}]
      ports: [{port: 9000}, {port: 5201}]
"""
NO_SLOWER: Final = Goal("ratio", ">=", 1.0)
POLICY_COST: Final = Goal("ratio", ">=", 0.95)


@dataclass(frozen=True, slots=True)
class Path:
    """A way from a client to a server's address."""

    client: Place
    address: str


@dataclass(frozen=True, slots=True)
class Metric:
    """One kind of load."""

    name: str
    unit: str
    run: Callable[[Place, str, int], float]


METRICS: Final = (
    Metric("request/response", "/s", lambda p, host, seconds: rate(p, "rr", host, seconds=seconds)),
    Metric("connect+request+close", "/s", lambda p, host, seconds: rate(p, "crr", host, seconds=seconds)),
    Metric("bulk", "Gbit/s", bulk),
)


def pods_of(settings: Settings) -> list[Figure]:
    """All figures of pod to pod."""
    return [*_overlay(settings), *_native(settings)]


def _overlay(settings: Settings) -> list[Figure]:
    with ExitStack() as stack:
        lab = stack.enter_context(bench_lab(settings.say, "overlay", nodes=2))
        _prepare(lab)
        routed = Path(*_baseline(stack, "routed", baseline.one_node_routed))
        bridged = Path(*_baseline(stack, "bridged", baseline.one_node_bridged))
        near = _ours(lab, "near") | {"plain veth and routing": routed, "bridge + iptables": bridged}
        found = _compare("one node", near, settings)
        far = _ours(lab, "far")
        for name, iptables in (("kernel VXLAN", False), ("kernel VXLAN + iptables", True)):
            build = partial(baseline.two_nodes, vxlan=True, iptables=iptables)
            far[name] = Path(*_baseline(stack, f"vxlan{int(iptables)}", build))
        return found + _compare("across nodes, overlay", far, settings)


def _native(settings: Settings) -> list[Figure]:
    with ExitStack() as stack:
        lab = stack.enter_context(bench_lab(settings.say, "native", nodes=2, routing="native"))
        _prepare(lab)
        far = _ours(lab, "far")
        for name, iptables in (("plain veth and routing", False), ("routing + iptables", True)):
            build = partial(baseline.two_nodes, vxlan=False, iptables=iptables)
            far[name] = Path(*_baseline(stack, f"native{int(iptables)}", build))
        return _compare("across nodes, native", far, settings)


def _prepare(lab: Lab) -> None:
    start_pods(lab, PODS)
    lab.apply(POLICIES)
    guarded = lab.addresses("near-guarded")[0]
    options = ("--timeout", "200")
    lab.wait("the policy holds", lambda: lab.probe("client-open", "tcp", guarded, 9000, *options)["result"] != "ok")


def _baseline(stack: ExitStack, name: str, build: Callable[[baseline.Net], str]) -> tuple[Place, str]:
    net = stack.enter_context(baseline.net(name))
    address = build(net)
    return net.place("a"), address


def _ours(lab: Lab, role: str) -> dict[str, Path]:
    return {
        name: Path(place(lab, f"client-{side}"), lab.addresses(f"{role}-{side}")[0])
        for name, side in (("", "open"), ("policy", "guarded"))
    }


def _compare(where: str, paths: Mapping[str, Path], settings: Settings) -> list[Figure]:
    """`paths` are ours without and with a policy, then the baselines."""
    found: list[Figure] = []
    for path in paths.values():  # the first connection teaches every cache on the way
        rate(path.client, "rr", path.address)
    for metric in METRICS:
        settings.say(f"{where}: {metric.name}")
        variants = {n: partial(metric.run, p.client, p.address, settings.seconds) for n, p in paths.items()}
        samples = interleave(variants, settings.rounds)
        ours, guarded, *_ = samples.values()
        for against in list(paths)[2:]:
            found.append(figure(f"pod to pod, {where}: {metric.name}, against {against}", metric.unit, ours,
                                baseline=samples[against], against=against, goal=NO_SLOWER))  # fmt: skip
        found.append(figure(f"pod to pod, {where}, policy: {metric.name}", metric.unit, guarded, baseline=ours,
                            against="ours without policy", goal=POLICY_COST))  # fmt: skip
    return [explain(f) for f in found]
