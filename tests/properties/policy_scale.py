"""Measures the policy compiler: `python tests/properties/policy_scale.py`. Prints a table; asserts nothing."""

from __future__ import annotations

import gc
import random
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import msgspec

from fimbria.compute.policy import PolicyEngine
from fimbria.decide.numbers import Numbers
from fimbria.model.identity import RESERVED_LABELS
from fimbria.model.labels import DEFAULT_FILTER, pod_labels
from fimbria.model.policy import Policy
from fimbria.sources.k8s.policies import network_policy
from fimbria.sources.k8s.types.networking import NetworkPolicy

NAMESPACES = 100
Json = dict[str, Any]


def pod(namespace: int, app: str) -> dict[str, str]:
    name = f"ns{namespace % NAMESPACES}"
    return pod_labels(name, {"app": app, "tier": "x"}, {"kubernetes.io/metadata.name": name, "team": "t"}, "default")


def policy(number: int, app: str, peers: list[Json]) -> Policy:
    spec = {
        "podSelector": {"matchLabels": {"app": app}},
        "ingress": [{"from": peers, "ports": [{"port": 1000 + number % 60000}]}],
    }
    wire = {"metadata": {"namespace": f"ns{number % NAMESPACES}", "name": f"p{number}"}, "spec": spec}
    converted = network_policy(msgspec.json.decode(msgspec.json.encode(wire), type=NetworkPolicy)).policy
    assert converted is not None
    return converted


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1000


def spread(times: Iterable[float]) -> str:
    values = sorted(times)
    return f"median {statistics.median(values):.2f} ms, highest {values[-1]:.2f} ms"


def fill(engine: PolicyEngine, identities: int, policies: int, pods: int) -> None:
    for number, labels in RESERVED_LABELS.items():
        engine.upsert_identity(number, labels)
    for n in range(identities):
        engine.upsert_identity(256 + n, DEFAULT_FILTER.apply(pod(n, f"app{n // NAMESPACES}")))
    for n in range(pods):
        engine.upsert_endpoint(str(n), pod(n, f"app{n // NAMESPACES}"))
    source = random.Random(1)
    for n in range(policies):
        peer = {"podSelector": {"matchLabels": {"app": f"app{source.randrange(identities // NAMESPACES)}"}}}
        peers: list[Json] = [peer, {"ipBlock": {"cidr": f"10.{n % 250}.0.0/16"}}]
        if n % 20 == 0:
            peers.append({"namespaceSelector": {}})
        engine.upsert_policy(policy(n, f"app{n // NAMESPACES}", peers))
    engine.changes()


def measure(identities: int, policies: int, pods: int) -> None:
    engine = PolicyEngine(Numbers("rules").take, Numbers("CIDRs", 1, 2**24 - 1).take)
    scratch = milliseconds(lambda: fill(engine, identities, policies, pods))
    entries = sum(len(one) for one in engine.sets().values())
    gc.collect()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f"\n{identities} identities, {policies} policies, {pods} local pods")
    print(f"  from scratch: {scratch:.0f} ms; {len(engine.sets())} sets, {entries} entries; peak memory {memory} MiB")

    def step(change: Callable[[], None]) -> float:
        def work() -> None:
            change()
            engine.changes()

        return milliseconds(work)

    def add(one: Policy) -> float:
        return step(lambda: engine.upsert_policy(one))

    new = [DEFAULT_FILTER.apply(pod(n, f"new{n}")) for n in range(100)]
    added = [step(partial(engine.upsert_identity, 10**6 + n, one)) for n, one in enumerate(new)]
    print(f"  an identity more: {spread(added)}")
    narrow = [policy(10_000 + n, "app0", [{"podSelector": {"matchLabels": {"app": "app1"}}}]) for n in range(50)]
    print(f"  a policy more: {spread(map(add, narrow))}")
    wide = [policy(20_000 + n, "app0", [{"namespaceSelector": {}}]) for n in range(50)]
    print(f"  a policy more, with every pod as a peer: {spread(map(add, wide))}")
    print(f"  a policy less: {spread(step(partial(engine.delete_policy, one.id)) for one in narrow)}")


if __name__ == "__main__":
    measure(2_000, 1_000, 100)
    measure(2_000, 1_000, 1_000)
    measure(50_000, 1_000, 100)
