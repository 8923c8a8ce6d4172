"""The compiled policy against a slow reference that reads the policies as they are written, one flow at a time.

The reference knows nothing of selectors, prefixes, identities or sets; the compiled side is asked exactly as the
datapath asks its maps (`bpf/lib/policy.h`).
"""

from __future__ import annotations

import ipaddress
import random
from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fimbria.compute.policy import Changes, PolicyEngine
from fimbria.compute.policy_set import SetKey
from fimbria.decide.numbers import Numbers
from fimbria.model.address import Prefix, pack
from fimbria.model.identity import RESERVED_LABELS, SCOPE_CIDR, Reserved
from fimbria.model.labels import DEFAULT_FILTER, Labels, pod_labels
from fimbria.model.policy import Policy
from fimbria.model.rows import Cidr, PolicyEntry, PolicyKey, PrefixKey
from fimbria.sources.k8s.policies import network_policy
from fimbria.sources.k8s.policies_cilium import cilium_policy
from fimbria.sources.k8s.types.cilium_policy import CiliumClusterwideNetworkPolicy, CiliumNetworkPolicy
from fimbria.sources.k8s.types.networking import NetworkPolicy

Json = dict[str, Any]
PROTOS = {"ICMP": 1, "TCP": 6, "UDP": 17, "ICMPV6": 58, "SCTP": 132}

# --- a small world -----------------------------------------------------------------------------------------------

NAMESPACES: dict[str, dict[str, str]] = {"a": {"team": "red"}, "b": {"team": "blue"}, "c": {}}


@dataclass(frozen=True)
class Pod:
    namespace: str
    labels: tuple[tuple[str, str], ...]
    addresses: tuple[str, str]

    @property
    def ports(self) -> frozenset[tuple[str, int, int]]:
        """Alike for pods of one identity: that they may differ is not what is tested here."""
        number = {"x": 80, "y": 81}.get(dict(self.labels).get("app", ""))
        return frozenset({("http", 6, number), ("dns", 17, 80)}) if number else frozenset()

    def sourced(self) -> dict[str, str]:
        return pod_labels(self.namespace, dict(self.labels), NAMESPACES[self.namespace], "default")


PODS = tuple(
    Pod(namespace, tuple(labels.items()), (f"10.1.2.{n}", f"fd00:1::{n:x}"))
    for n, (namespace, labels) in enumerate(
        [
            ("a", {"app": "x"}),
            ("a", {"app": "x", "tier": "1"}),
            ("a", {"app": "y"}),
            ("b", {"app": "x"}),
            ("b", {"app": "y", "tier": "2"}),
            ("c", {"app": "z"}),
            ("c", {}),
        ],
        start=1,
    )
)


@dataclass(frozen=True)
class Party:
    """The other side of a flow: a pod, or an entity with an address."""

    address: str
    pod: Pod | None = None
    entity: str = ""


PARTIES = (
    *(Party(address, pod) for pod in PODS for address in pod.addresses),
    Party("172.16.0.2", entity="remote-node"),
    Party("10.1.9.2", entity="remote-node"),
    *(
        Party(address, entity="world")
        for address in ("8.8.8.8", "10.1.2.200", "10.1.9.9", "10.200.0.1", "2001:db8::1", "fd00:1::99", "fd00:2::1")
    ),
)
PORTS = (("TCP", 79), ("TCP", 80), ("TCP", 81), ("TCP", 443), ("UDP", 80), ("SCTP", 81), ("ICMP", 8), ("ICMPV6", 128))

# --- the reference -----------------------------------------------------------------------------------------------


def matches(selector: Json, labels: dict[str, str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", []):
        key, has = expression["key"], expression["key"] in labels
        ok = {
            "In": has and labels.get(key) in expression.get("values", ()),
            "NotIn": not has or labels[key] not in expression.get("values", ()),
            "Exists": has,
            "DoesNotExist": not has,
        }[expression["operator"]]
        if not ok:
            return False
    return True


def in_block(address: str, cidr: str, excepts: list[str]) -> bool:
    ip = ipaddress.ip_address(address)
    nets = [ipaddress.ip_network(text) for text in (cidr, *excepts)]
    inside = [ip.version == net.version and ip in net for net in nets]
    return inside[0] and not any(inside[1:])


def reference(policies: list[Json], subject: Pod, side: str, party: Party, protocol: str, port: int) -> bool:
    """Whether a flow is allowed; `side` is ingress or egress as the subject sees it."""
    target = subject if side == "ingress" else party.pod
    default_deny = allowed = False
    for policy in policies:
        if policy["kind"] == "NetworkPolicy":
            applies, permits = kubernetes(policy, subject, side, party, protocol, port, target)
            default_deny |= applies
            allowed |= permits
        elif cilium_selects(policy, subject):
            rules, denies = policy["spec"].get(side, []), policy["spec"].get(f"{side}Deny", [])
            if any(cilium(policy, rule, side, party, protocol, port, target, True) for rule in denies):
                return False
            wish = policy["spec"].get("enableDefaultDeny", {}).get(side)
            default_deny |= bool(rules or denies) if wish is None else wish
            allowed |= any(cilium(policy, rule, side, party, protocol, port, target, False) for rule in rules)
    return allowed or not default_deny


def kubernetes(
    policy: Json, subject: Pod, side: str, party: Party, protocol: str, port: int, target: Pod | None
) -> tuple[bool, bool]:
    spec, namespace = policy["spec"], policy["metadata"]["namespace"]
    types = spec.get("policyTypes") or ["Ingress", *(["Egress"] if spec.get("egress") else [])]
    if subject.namespace != namespace or side.capitalize() not in types:
        return False, False
    if not matches(spec.get("podSelector", {}), dict(subject.labels)):
        return False, False
    peers_field = "from" if side == "ingress" else "to"
    for rule in spec.get(side) or []:
        peers, ports = rule.get(peers_field) or [], rule.get("ports") or []
        peer_ok = not peers or any(kubernetes_peer(peer, namespace, party) for peer in peers)
        by_block = peers and not any(kubernetes_peer(p, namespace, party) for p in peers if "ipBlock" not in p)
        # A port's name is a pod's: what it means for an address nobody knows, unless the rule is about our own ports.
        known = None if side == "egress" and by_block else target
        if peer_ok and (not ports or any(kubernetes_port(p, protocol, port, known) for p in ports)):
            return True, True
    return True, False


def kubernetes_peer(peer: Json, namespace: str, party: Party) -> bool:
    if "ipBlock" in peer:
        return in_block(party.address, peer["ipBlock"]["cidr"], peer["ipBlock"].get("except", []))
    if party.pod is None:
        return False
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"], NAMESPACES[party.pod.namespace]):
            return False
    elif party.pod.namespace != namespace:
        return False
    return matches(peer.get("podSelector", {}), dict(party.pod.labels))


def kubernetes_port(entry: Json, protocol: str, port: int, target: Pod | None) -> bool:
    if entry.get("protocol", "TCP") != protocol:
        return False
    wanted = entry.get("port")
    if isinstance(wanted, str):
        return target is not None and (wanted, PROTOS[protocol], port) in target.ports
    return wanted is None or wanted <= port <= entry.get("endPort", wanted)


def cilium_selects(policy: Json, subject: Pod) -> bool:
    namespace = policy["metadata"].get("namespace")
    return namespace in (None, subject.namespace) and matches(policy["spec"]["endpointSelector"], dict(subject.labels))


def cilium(
    policy: Json, rule: Json, side: str, party: Party, protocol: str, port: int, target: Pod | None, deny: bool
) -> bool:
    word = "from" if side == "ingress" else "to"
    ports, icmps = rule.get("toPorts"), rule.get("icmps")
    by_address = False
    if f"{word}Endpoints" in rule:
        home = policy["metadata"].get("namespace")
        hit = any(cilium_endpoint(selector, home, party.pod) for selector in rule[f"{word}Endpoints"])
    elif f"{word}Entities" in rule:
        hit = any(cilium_entity(entity, party) for entity in rule[f"{word}Entities"])
        families = [entity for entity in rule[f"{word}Entities"] if entity.startswith("world-")]
        by_address = any(cilium_entity(entity, party) for entity in families)
    elif f"{word}CIDR" in rule or f"{word}CIDRSet" in rule:
        sets = [(text, []) for text in rule.get(f"{word}CIDR", [])]
        sets += [(entry["cidr"], entry.get("except", [])) for entry in rule.get(f"{word}CIDRSet", [])]
        hit, by_address = any(in_block(party.address, *one) for one in sets) and party.entity == "world", True
    else:
        hit = bool(ports or icmps)
    if not hit:
        return False
    if deny and by_address and side == "egress" and party.entity == "world" and names_a_port(ports):
        return True
    if icmps:
        family = {"ICMP": "IPv4", "ICMPV6": "IPv6"}.get(protocol)
        return any(f.get("family", "IPv4") == family and f["type"] == port for i in icmps for f in i["fields"])
    return not ports or any(cilium_port(entry, protocol, port, target) for part in ports for entry in part["ports"])


def names_a_port(ports: list[Json] | None) -> bool:
    return any(entry["port"].isalpha() for part in ports or [] for entry in part["ports"])


def cilium_endpoint(selector: Json, home: str | None, pod: Pod | None) -> bool:
    if pod is None:
        return False
    labels = dict(pod.labels) | {"k8s:io.kubernetes.pod.namespace": pod.namespace}
    prefix = "k8s:io.cilium.k8s.namespace.labels."
    labels |= {prefix + key: value for key, value in NAMESPACES[pod.namespace].items()}
    keys = [*selector.get("matchLabels", {}), *(e["key"] for e in selector.get("matchExpressions", []))]
    elsewhere = any(key == "k8s:io.kubernetes.pod.namespace" or key.startswith(prefix) for key in keys)
    return (elsewhere or home in (None, pod.namespace)) and matches(selector, labels)


def cilium_entity(entity: str, party: Party) -> bool:
    v4 = ":" not in party.address
    return {
        "all": True,
        "none": False,
        "world": party.entity == "world",
        "world-ipv4": party.entity == "world" and v4,
        "world-ipv6": party.entity == "world" and not v4,
        "cluster": party.pod is not None or party.entity == "remote-node",
        "remote-node": party.entity == "remote-node",
    }[entity]


def cilium_port(entry: Json, protocol: str, port: int, target: Pod | None) -> bool:
    wanted, of = entry["port"], entry.get("protocol", "ANY")
    if wanted == "0" and of == "ANY":
        return True
    if protocol not in ("TCP", "UDP", "SCTP") or of not in ("ANY", protocol):
        return False
    if wanted.isalpha():
        return target is not None and (wanted, PROTOS[protocol], port) in target.ports
    first = int(wanted)
    return first == 0 or first <= port <= max(first, entry.get("endPort", 0))


# --- the compiled side, asked as the datapath asks -----------------------------------------------------------------


@dataclass
class Kernel:
    """The maps, written only by what `changes()` says; refuses changes that don't fit."""

    sets: dict[SetKey, dict[PolicyKey, PolicyEntry]] = field(default_factory=dict)
    cidrs: dict[PrefixKey, Cidr] = field(default_factory=dict)

    def apply(self, changes: Changes) -> None:
        for key, change in changes.sets.items():
            assert (key not in self.sets) == change.created
            entries = self.sets.setdefault(key, {})
            for gone in change.deletes:
                del entries[gone]
            for row, entry in change.upserts.items():
                assert entries.get(row) != entry
                entries[row] = entry
        for prefix, cidr in changes.cidrs.items():
            if cidr is None:
                del self.cidrs[prefix]
            else:
                self.cidrs[prefix] = cidr
        for key in changes.gone:
            del self.sets[key]

    def cidr(self, address: bytes) -> int | None:
        number = int.from_bytes(address)
        for length in range(128, -1, -1):
            found = self.cidrs.get(PrefixKey(length, (number >> (128 - length) << (128 - length)).to_bytes(16)))
            if found is not None:
                return found.identity
        return None


class Node:
    """An engine with the maps that follow from it."""

    def __init__(self, numbers: tuple[Numbers[Any], Numbers[Any]] | None = None) -> None:
        self.numbers = numbers or (Numbers("rules"), Numbers("CIDRs", 1, SCOPE_CIDR - 1))
        self.engine = PolicyEngine(self.numbers[0].take, self.numbers[1].take)
        self.kernel = Kernel()
        self.identities: dict[Labels, int] = {}

    def start(self) -> None:
        for number, labels in RESERVED_LABELS.items():
            self.engine.upsert_identity(number, labels)
        for index, pod in enumerate(PODS):
            self.add_pod(index, pod)

    def identity(self, pod: Pod) -> int:
        return 256 + sorted({DEFAULT_FILTER.apply(p.sourced()).texts() for p in PODS}).index(
            DEFAULT_FILTER.apply(pod.sourced()).texts()
        )

    def add_pod(self, index: int, pod: Pod) -> None:
        self.engine.upsert_identity(self.identity(pod), DEFAULT_FILTER.apply(pod.sourced()))
        self.engine.set_identity_ports(self.identity(pod), pod.ports)
        self.engine.upsert_endpoint(str(index), pod.sourced(), pod.ports)

    def settle(self) -> None:
        self.kernel.apply(self.engine.changes())
        assert self.kernel.sets == {key: one.entries() for key, one in self.engine.sets().items()}
        assert self.kernel.cidrs == self.engine.cidrs()
        assert not self.engine.changes()

    def allows(self, index: int, side: str, party: Party, protocol: str, port: int) -> bool:
        policy = self.engine.endpoint(str(index))
        egress = side == "egress"
        if not policy.flags & (4 if egress else 2):
            return True
        assert policy.set is not None
        entries = self.kernel.sets[policy.set]
        wire_port = port << 8 if protocol.startswith("ICMP") else port
        peer = self.identity(party.pod) if party.pod else {"world": 2, "remote-node": 6}[party.entity]
        votes = [
            self.ask(entries, peer, egress, protocol, wire_port),
            self.ask(entries, 0, egress, protocol, wire_port),
        ]
        if policy.flags & (16 if egress else 8):
            cidr = self.kernel.cidr(pack(party.address))
            entry = self.ask(entries, cidr, egress, protocol, wire_port) if cidr else None
            if entry is not None and peer != Reserved.WORLD:
                entry = PolicyEntry(1, 0, entry.rule) if entry.flags & 1 else None
            votes.append(entry)
        verdicts = {vote.verdict for vote in votes if vote}
        return 2 not in verdicts and 1 in verdicts

    def ask(
        self, entries: dict[PolicyKey, PolicyEntry], peer: int, egress: bool, protocol: str, port: int
    ) -> PolicyEntry | None:
        proto = PROTOS[protocol]
        for length in range(64, 47, -1):
            shift = 64 - length
            if entry := entries.get(PolicyKey(length, peer, int(egress), proto, port >> shift << shift)):
                return entry
        return entries.get(PolicyKey(40, peer, int(egress), 0, 0))


def convert(policy: Json) -> Policy:
    text = msgspec.json.encode(policy)
    match policy["kind"]:
        case "NetworkPolicy":
            conversion = network_policy(msgspec.json.decode(text, type=NetworkPolicy))
        case "CiliumNetworkPolicy":
            conversion = cilium_policy(msgspec.json.decode(text, type=CiliumNetworkPolicy))
        case _:
            conversion = cilium_policy(msgspec.json.decode(text, type=CiliumClusterwideNetworkPolicy))
    assert conversion.policy is not None
    assert all("can't be known" in problem.message for problem in conversion.problems), conversion.problems
    return conversion.policy


# --- random policies ---------------------------------------------------------------------------------------------

CIDRS = ("0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "10.1.2.3/32", "::/0", "fd00::/16", "fd00:1::/32")


def maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries({}, optional=fields)


def selectors(keys: dict[str, tuple[str, ...]]) -> st.SearchStrategy[Json]:
    pairs = st.sampled_from([(key, value) for key, values in keys.items() for value in values])
    expressions = st.one_of(
        st.builds(
            lambda kv, op: {"key": kv[0], "operator": op, "values": [kv[1]]}, pairs, st.sampled_from(["In", "NotIn"])
        ),
        st.builds(lambda kv, op: {"key": kv[0], "operator": op}, pairs, st.sampled_from(["Exists", "DoesNotExist"])),
    )
    return st.one_of(
        st.just({}),
        pairs.map(lambda kv: {"matchLabels": dict([kv])}),
        maybe(
            matchLabels=pairs.map(lambda kv: dict([kv])), matchExpressions=st.lists(expressions, min_size=1, max_size=2)
        ),
    )


POD_KEYS = {"app": ("x", "y", "z"), "tier": ("1", "2")}
POD = selectors(POD_KEYS)
SUBJECT = st.sampled_from(
    [{}, {"matchLabels": {"app": "x"}}, {"matchExpressions": [{"key": "tier", "operator": "Exists"}]}]
)
TEAM = selectors({"team": ("red", "blue")})
ENDPOINT = selectors(
    POD_KEYS
    | {"k8s:io.kubernetes.pod.namespace": ("a", "b"), "k8s:io.cilium.k8s.namespace.labels.team": ("red", "blue")}
).filter(lambda s: not any(negative_namespace(e) for e in s.get("matchExpressions", [])))


def negative_namespace(expression: Json) -> bool:
    return expression["key"] == "k8s:io.kubernetes.pod.namespace" and expression["operator"] == "DoesNotExist"


@st.composite
def blocks(draw: st.DrawFn) -> Json:
    cidr = draw(st.sampled_from(CIDRS))
    net = Prefix.parse(cidr)
    inside = [c for c in CIDRS if c != cidr and Prefix.parse(c).v4 == net.v4 and Prefix.parse(c) in net]
    excepts = draw(st.lists(st.sampled_from(inside), max_size=2, unique=True)) if inside else []
    return {"cidr": cidr, **({"except": excepts} if excepts else {})}


NUMBERS = st.integers(79, 82)
K8S_PORT = st.one_of(
    st.fixed_dictionaries({"port": NUMBERS}, optional={"protocol": st.sampled_from(["TCP", "UDP", "SCTP"])}),
    st.builds(lambda port, more: {"port": port, "endPort": port + more}, NUMBERS, st.integers(0, 400)),
    st.sampled_from([{"port": "http"}, {"port": "dns", "protocol": "UDP"}, {"protocol": "UDP"}, {}]),
)
K8S_PEER = st.one_of(
    POD.map(lambda s: {"podSelector": s}),
    TEAM.map(lambda s: {"namespaceSelector": s}),
    st.builds(lambda n, p: {"namespaceSelector": n, "podSelector": p}, TEAM, POD),
    blocks().map(lambda b: {"ipBlock": b}),
)


def k8s_rules(word: str) -> st.SearchStrategy[list[Json]]:
    return st.lists(
        maybe(**{word: st.lists(K8S_PEER, max_size=3), "ports": st.lists(K8S_PORT, max_size=2)}), max_size=2
    )


KUBERNETES = st.builds(
    lambda namespace, spec: {"kind": "NetworkPolicy", "metadata": {"namespace": namespace}, "spec": spec},
    st.sampled_from(["a", "b"]),
    st.fixed_dictionaries(
        {"podSelector": SUBJECT},
        optional={
            "policyTypes": st.sampled_from([["Ingress"], ["Egress"], ["Ingress", "Egress"]]),
            "ingress": k8s_rules("from"),
            "egress": k8s_rules("to"),
        },
    ),
)

CILIUM_PORT = st.one_of(
    st.builds(
        lambda port, proto, more: {"port": str(port), "protocol": proto, **({"endPort": port + more} if more else {})},
        NUMBERS,
        st.sampled_from(["TCP", "UDP", "SCTP", "ANY"]),
        st.sampled_from([0, 0, 1, 17, 362]),
    ),
    st.sampled_from(
        [{"port": "http"}, {"port": "dns", "protocol": "UDP"}, {"port": "0"}, {"port": "0", "protocol": "TCP"}]
    ),
)
ICMP = st.builds(
    lambda fields: [{"fields": fields}],
    st.lists(st.sampled_from([{"type": 8}, {"type": 128, "family": "IPv6"}]), min_size=1),
)
ENTITIES = st.sampled_from(["all", "none", "world", "world-ipv4", "world-ipv6", "cluster", "remote-node"])


@st.composite
def cilium_rules(draw: st.DrawFn, word: str) -> list[Json]:
    rules = []
    for _ in range(draw(st.integers(1, 3))):
        kinds = {
            f"{word}Endpoints": st.lists(ENDPOINT, max_size=2),
            f"{word}Entities": st.lists(ENTITIES, max_size=2),
            f"{word}CIDR": st.lists(st.sampled_from(CIDRS), max_size=2),
            f"{word}CIDRSet": st.lists(blocks(), max_size=2),
        }
        rule: Json = {}
        if kind := draw(st.sampled_from(["", *kinds])):
            rule[kind] = draw(kinds[kind])
        match draw(st.sampled_from(["", "ports", "icmps"])):
            case "ports":
                rule["toPorts"] = [{"ports": draw(st.lists(CILIUM_PORT, min_size=1, max_size=2))}]
            case "icmps":
                rule["icmps"] = draw(ICMP)
        rules.append(rule)
    return rules


CILIUM = st.builds(
    lambda namespace, spec: {
        "kind": "CiliumNetworkPolicy" if namespace else "CiliumClusterwideNetworkPolicy",
        "metadata": {"namespace": namespace} if namespace else {},
        "spec": spec,
    },
    st.sampled_from(["a", "b", None]),
    st.fixed_dictionaries(
        {"endpointSelector": SUBJECT, "ingress": cilium_rules("from"), "egress": cilium_rules("to")},
        optional={
            "ingressDeny": cilium_rules("from"),
            "egressDeny": cilium_rules("to"),
            "enableDefaultDeny": maybe(ingress=st.booleans(), egress=st.booleans()),
        },
    ),
)


@st.composite
def named(draw: st.DrawFn, of: st.SearchStrategy[Json], most: int) -> list[Json]:
    policies = draw(st.lists(of, min_size=1, max_size=most))
    return [policy | {"metadata": policy["metadata"] | {"name": f"p{n}"}} for n, policy in enumerate(policies)]


# --- the properties ----------------------------------------------------------------------------------------------


FLOWS = [
    (index, side, party, protocol, port)
    for index in range(4)
    for side in ("ingress", "egress")
    for party in PARTIES
    for protocol, port in PORTS
]


def check_against_reference(policies: list[Json], seed: int) -> None:
    node = Node()
    node.start()
    for policy in policies:
        node.engine.upsert_policy(convert(policy))
    node.settle()
    for index, side, party, protocol, port in random.Random(seed).sample(FLOWS, 500):
        expected = reference(policies, PODS[index], side, party, protocol, port)
        actual = node.allows(index, side, party, protocol, port)
        assert actual == expected, f"{PODS[index]} {side} {party} {protocol}/{port}: {actual}, should be {expected}"


FEW = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
SEED = st.integers(0, 2**32)


@FEW
@given(named(KUBERNETES, 3), SEED)
def test_network_policies_as_written(policies: list[Json], seed: int) -> None:
    check_against_reference(policies, seed)


@FEW
@given(named(CILIUM, 3), SEED)
def test_cilium_policies_as_written(policies: list[Json], seed: int) -> None:
    check_against_reference(policies, seed)


@FEW
@given(named(st.one_of(KUBERNETES, CILIUM), 4), SEED)
def test_both_kinds_together_as_written(policies: list[Json], seed: int) -> None:
    check_against_reference(policies, seed)


@FEW
@given(named(st.one_of(KUBERNETES, CILIUM), 6), SEED)
def test_the_way_there_leaves_no_trace(policies: list[Json], seed: int) -> None:
    """Added, changed, deleted, in any order, looked at in between or not: the outcome is that of a fresh start."""
    source, node = random.Random(seed), Node()
    converted = [convert(policy) for policy in policies]
    for number, labels in RESERVED_LABELS.items():
        node.engine.upsert_identity(number, labels)
    for _ in range(40):
        index, policy = source.randrange(len(PODS)), source.choice(converted)
        pod = PODS[index]
        match source.randrange(8):
            case 0 | 1:
                node.add_pod(index, pod)
            case 2:
                node.engine.delete_endpoint(str(index))
            case 3:
                node.engine.delete_identity(node.identity(pod))
            case 4:
                node.engine.set_identity_ports(node.identity(pod), source.choice([pod.ports, frozenset()]))
            case 5:
                # Under the name of another policy: the same object with other contents.
                node.engine.upsert_policy(Policy(source.choice(converted).id, policy.specs))
            case 6:
                node.engine.delete_policy(policy.id)
            case _:
                node.settle()
    for policy in source.sample(converted, len(converted)):
        node.engine.upsert_policy(policy)
    for index in source.sample(range(len(PODS)), len(PODS)):
        node.add_pod(index, PODS[index])
    node.settle()
    fresh = Node(node.numbers)
    fresh.start()
    for policy in converted:
        fresh.engine.upsert_policy(policy)
    fresh.settle()
    assert node.kernel == fresh.kernel
    for index in range(len(PODS)):
        assert node.engine.endpoint(str(index)) == fresh.engine.endpoint(str(index))
        node.engine.delete_endpoint(str(index))
    node.settle()
    assert node.kernel == Kernel()
