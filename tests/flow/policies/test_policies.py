"""Stories: Kubernetes YAML in, who reaches whom out. Each `*.yaml` beside this file is one behaviour.

A story has `pods` (by name: namespace, labels, addresses, ports), optional `namespaces` (their labels), and `steps`. A
step applies objects and deletes some, says which `problems` these have, and lists flows as `from -> to PROTOCOL/port`,
each with what becomes of it: `allowed`, `allowed by RULE`, `denied by RULE` or `denied by default of POLICIES`. Ends of
a flow are pods, addresses of the world, `host` and `remote-node`. A flow between two pods needs both pods' consent.
`entries` shows the entries of a pod's set, `sets` how many sets there are.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from fimbria.compute.policy import PolicyEngine
from fimbria.decide.numbers import Numbers
from fimbria.model.address import Prefix, pack
from fimbria.model.identity import RESERVED_LABELS, SCOPE_CIDR, Reserved
from fimbria.model.labels import DEFAULT_FILTER, Labels, pod_labels
from fimbria.model.policy import Direction, Origin, PolicyId, Proto, Verdict
from fimbria.model.rows import PolicyEntry, PolicyKey, PrefixKey
from fimbria.sources.k8s.policies import Conversion, network_policy
from fimbria.sources.k8s.policies_cilium import cilium_policy
from fimbria.sources.k8s.types.cilium_policy import CiliumClusterwideNetworkPolicy, CiliumNetworkPolicy
from fimbria.sources.k8s.types.networking import NetworkPolicy

Json = dict[str, Any]
STORIES = sorted(Path(__file__).parent.glob("*.yaml"))
KINDS = {kind.__name__: kind for kind in (NetworkPolicy, CiliumNetworkPolicy, CiliumClusterwideNetworkPolicy)}


@dataclass(frozen=True)
class Pod:
    name: str
    labels: Labels
    identity: int
    addresses: tuple[str, ...]
    ports: frozenset[tuple[str, int, int]]


class Node:
    """All pods of a story on one node, and what its maps would contain."""

    def __init__(self, story: Json) -> None:
        self.rules: Numbers[Origin] = Numbers("rules")
        self.prefixes: Numbers[Prefix] = Numbers("CIDRs", 1, SCOPE_CIDR - 1)
        self.engine = PolicyEngine(self.rules.take, self.prefixes.take)
        self.identities: Numbers[Labels] = Numbers("identities", 256, 65535)
        for number, labels in RESERVED_LABELS.items():
            self.engine.upsert_identity(number, labels)
        self.pods = {name: self.add(name, pod, story.get("namespaces", {})) for name, pod in story["pods"].items()}

    def add(self, name: str, pod: Json, namespaces: Json) -> Pod:
        namespace = pod.get("namespace", "shop")
        sourced = pod_labels(namespace, pod.get("labels", {}), namespaces.get(namespace, {}), "default")
        identity = DEFAULT_FILTER.apply(sourced)
        ports = frozenset(
            (n, int(Proto[p.split("/")[0]]), int(p.split("/")[1])) for n, p in pod.get("ports", {}).items()
        )
        made = Pod(name, Labels(sourced), self.identities.take(identity), tuple(pod.get("addresses", ())), ports)
        self.engine.upsert_identity(made.identity, identity)
        self.engine.set_identity_ports(made.identity, ports)
        self.engine.upsert_endpoint(name, made.labels, ports)
        return made

    def flow(self, source: str, target: str, proto: Proto, port: int) -> str:
        outcome = "allowed"
        for own, other, direction in ((source, target, Direction.EGRESS), (target, source, Direction.INGRESS)):
            if own in self.pods:
                verdict = self.judge(own, other, direction, proto, port)
                if verdict.startswith("denied"):
                    return verdict
                if verdict != "allowed":
                    outcome = verdict
        return outcome

    def judge(self, own: str, other: str, direction: Direction, proto: Proto, port: int) -> str:
        policy = self.engine.endpoint(own)
        if not policy.flags & (2 << direction) or (direction is Direction.INGRESS and other == "host"):
            return "allowed"
        assert policy.set is not None
        entries = self.engine.policy_set(policy.set).entries()
        identity, addresses = self.who(other)
        votes = [self.ask(entries, identity, direction, proto, port)]
        if policy.flags & (8 << direction):
            votes += [self.ask_cidr(entries, address, identity, direction, proto, port) for address in addresses]
        votes.append(self.ask(entries, 0, direction, proto, port))
        cast = [vote for vote in votes if vote is not None]
        if not cast:
            policies = ", ".join(map(str, self.engine.denying(own, direction)))
            return f"denied by default of {policies}"
        winner = next((vote for vote in cast if vote.verdict == 2), cast[0])
        word = "denied" if winner.verdict == 2 else "allowed"
        return f"{word} by {self.engine.explain(winner.rule)}" if winner.rule else word

    def who(self, other: str) -> tuple[int, tuple[str, ...]]:
        if other in self.pods:
            return self.pods[other].identity, self.pods[other].addresses[:1]
        if other in ("host", "remote-node"):
            return Reserved[other.upper().replace("-", "_")], ()
        return Reserved.WORLD, (str(ipaddress.ip_address(other)),)

    def ask(
        self, entries: dict[PolicyKey, PolicyEntry], peer: int, direction: int, proto: int, port: int
    ) -> PolicyEntry | None:
        wire = port << 8 if proto in (Proto.ICMP, Proto.ICMPV6) else port
        for length in range(64, 47, -1):
            key = PolicyKey(length, peer, int(direction), int(proto), wire >> (64 - length) << (64 - length))
            if key in entries:
                return entries[key]
        return entries.get(PolicyKey(40, peer, int(direction), 0, 0))

    def ask_cidr(
        self, entries: dict[PolicyKey, PolicyEntry], address: str, peer: int, direction: int, proto: int, port: int
    ) -> PolicyEntry | None:
        number, cidrs = int.from_bytes(pack(address)), self.engine.cidrs()
        for length in range(128, -1, -1):
            shift = 128 - length
            found = cidrs.get(PrefixKey(length, (number >> shift << shift).to_bytes(16)))
            if found is not None:
                entry = self.ask(entries, found.identity, direction, proto, port)
                if entry is None or peer == Reserved.WORLD:
                    return entry
                return PolicyEntry(1, 0, entry.rule) if entry.flags & 1 else None
        return None

    def entries(self, pod: str) -> list[str]:
        key = self.engine.endpoint(pod).set
        rows = self.engine.policy_set(key).entries().items() if key else ()
        return sorted(self.show(row, entry) for row, entry in rows)

    def show(self, key: PolicyKey, entry: PolicyEntry) -> str:
        prefix = self.prefixes.key(key.peer & (SCOPE_CIDR - 1)) if key.peer & SCOPE_CIDR else None
        owners = sorted(name for name, pod in self.pods.items() if pod.identity == key.peer)
        reserved = [label.partition(":")[2] for label in RESERVED_LABELS.get(key.peer, {})][:1]
        peer = str(prefix) if prefix else "+".join(owners or reserved) or ("anyone" if key.peer == 0 else str(key.peer))
        proto = Proto(key.proto).name if key.proto else "any"
        port = "*" if key.prefixlen <= 48 else f"{key.port}" + ("" if key.prefixlen == 64 else f"/{key.prefixlen - 48}")
        mark = " (any peer)" if entry.flags & 1 else ""
        verdict = Verdict(entry.verdict).name.lower()
        return f"{Direction(key.direction).name.lower()} {peer} {proto} {port}: {verdict}{mark}"


def convert(wire: Json) -> Conversion:
    policy = msgspec.json.decode(msgspec.json.encode(wire), type=KINDS[wire["kind"]])
    if isinstance(policy, NetworkPolicy):
        return network_policy(policy)
    assert isinstance(policy, CiliumNetworkPolicy)
    return cilium_policy(policy)


@pytest.mark.parametrize("path", STORIES, ids=lambda path: path.stem)
def test_story(path: Path) -> None:
    story = yaml.safe_load(path.read_text())
    assert set(story) <= {"story", "namespaces", "pods", "steps"}
    node = Node(story)
    for number, step in enumerate(story["steps"]):
        assert set(step) <= {"apply", "delete", "problems", "reach", "entries", "sets"}, f"{path.stem}: step {number}"
        play(node, step)


def play(node: Node, step: Json) -> None:
    problems = []
    for wire in step.get("apply", []):
        wire.setdefault("metadata", {}).setdefault("name", "p")
        if wire["kind"] != "CiliumClusterwideNetworkPolicy":
            wire["metadata"].setdefault("namespace", "shop")
        conversion = convert(wire)
        problems += [str(problem) for problem in conversion.problems]
        if conversion.policy is not None:
            node.engine.upsert_policy(conversion.policy)
    for text in step.get("delete", []):
        kind, namespace, name = (
            text.replace("/", " ").split() if "/" in text else (text.split()[0], "", text.split()[1])
        )
        node.engine.delete_policy(PolicyId(kind, namespace, name))
    node.engine.changes()
    assert problems == step.get("problems", [])
    check_flows(node, step.get("reach", {}))
    for pod, entries in step.get("entries", {}).items():
        assert node.entries(pod) == sorted(entries)
    if "sets" in step:
        assert len(node.engine.sets()) == step["sets"]


def check_flows(node: Node, reach: Json) -> None:
    wrong = []
    for flow, expected in reach.items():
        source, _, target, service = flow.split()
        protocol, _, port = service.partition("/")
        actual = node.flow(source, target, Proto[protocol], int(port))
        if actual != expected and not (expected == "allowed" and actual.startswith("allowed")):
            wrong.append(f"{flow}: {actual}, expected {expected}")
    assert not wrong, "\n".join(wrong)


def test_there_are_stories() -> None:
    assert len(STORIES) >= 25
