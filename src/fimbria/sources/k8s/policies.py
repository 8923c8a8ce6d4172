"""NetworkPolicy (networking.k8s.io/v1) to the model, and what all kinds of policy share.

Rules
- Nothing is skipped in silence: what isn't understood becomes a `Problem` with its path, for the policy's status.
- It fails closed. An allow rule with anything wrong in it allows nothing, a deny rule denies everything it could mean;
  the pods stay selected, so what isn't allowed is denied.
- If it can't be known which pods are selected there is no policy at all (`Conversion.policy` is None): the caller keeps
  the version before in force and says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from fimbria.model.address import Prefix
from fimbria.model.labels import DEFAULT_CLUSTER, DEFAULT_FILTER, NAMESPACE, NAMESPACE_LABELS, LabelFilter
from fimbria.model.policy import (
    ANYONE,
    EVERY_PORT,
    CidrBlock,
    Direction,
    NamedPort,
    Operator,
    Origin,
    Peer,
    Policy,
    PolicyId,
    PolicySpec,
    PortRange,
    Problem,
    Proto,
    Requirement,
    Rule,
    Selector,
    Verdict,
)
from fimbria.sources.k8s.types.meta import LabelSelector
from fimbria.sources.k8s.types.networking import (
    IPBlock,
    NetworkPolicy,
    NetworkPolicyEgressRule,
    NetworkPolicyIngressRule,
    NetworkPolicyPeer,
    NetworkPolicyPort,
)

Port = PortRange | NamedPort
WireRule = NetworkPolicyIngressRule | NetworkPolicyEgressRule
Keys = Callable[[str, str], tuple[str, ...]]  # a key as written and its path -> the sourced keys that it means

_KEY: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?")
_PORT_NAME: Final = re.compile(r"(?=.*[a-z])[a-z0-9]([-a-z0-9]*[a-z0-9])?")  # RFC 6335, 5.1
_PORT_NAME_LENGTH: Final = 15
_MAX_PORT: Final = 65535
T = TypeVar("T")


class Refused(Exception):
    """Part of a policy can't be acted on; carries the `Problem`."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.problem = Problem(path, message)


@dataclass(frozen=True, slots=True)
class Conversion:
    """`policy` is None if its subject can't be known: then the version before stays in force."""

    policy: Policy | None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What this cluster is called, and which labels make identities: peers can be selected by no others."""

    labels: LabelFilter = DEFAULT_FILTER
    cluster: str = DEFAULT_CLUSTER


DEFAULT_VOCABULARY: Final = Vocabulary()

# --- shared by all kinds -----------------------------------------------------------------------------------------


def attempt(problems: list[Problem], convert: Callable[[], T], otherwise: T) -> T:
    """The conversion's result; if it is refused the problem is noted and `otherwise` returned."""
    try:
        return convert()
    except Refused as refused:
        problems.append(refused.problem)
        return otherwise


def requirements(selector: LabelSelector, path: str, keys: Keys) -> Iterator[Requirement]:
    """The conditions of a selector (meta/v1). Raises Refused for unknown operators and wrong numbers of values."""
    for key, value in (selector.match_labels or {}).items():
        yield Requirement(keys(key, f"{path}.matchLabels"), Operator.IN, (value,))
    for n, expression in enumerate(selector.match_expressions or ()):
        at = f"{path}.matchExpressions[{n}]"
        values = tuple(sorted(set(expression.values or ())))
        try:
            operator = Operator(expression.operator)
        except ValueError:
            raise Refused(f"{at}.operator", f"{expression.operator!r} is not an operator") from None
        if (operator in (Operator.IN, Operator.NOT_IN)) != bool(values):
            raise Refused(f"{at}.values", f"{operator} {'needs values' if not values else 'takes no values'}")
        yield Requirement(keys(expression.key, at), operator, values)


def checked_key(key: str, path: str) -> str:
    if not _KEY.fullmatch(key):
        raise Refused(path, f"{key!r} is not a label key")
    return key


def only_identity_labels(selector: Selector, labels: LabelFilter, path: str) -> Selector:
    """Peers are known by their identity: a label outside of it would seem absent from all. Raises Refused then."""
    for requirement in selector.requirements:
        for key in requirement.keys:
            if not labels.relevant(key):
                name = key.partition(":")[2]
                raise Refused(path, f"label {name!r} is not part of identities (label filter), so no peer has it")
    return selector


def cidr_block(cidr: str, excepts: Iterable[str], path: str, field: str, any_peer: bool) -> CidrBlock:
    """Raises Refused for what isn't a network, and for exceptions outside of it."""
    block = prefix(cidr, f"{path}.{field}" if field else path)
    holes = []
    for n, text in enumerate(excepts):
        hole = prefix(text, f"{path}.except[{n}]")
        if hole.v4 != block.v4 or hole not in block:
            raise Refused(f"{path}.except[{n}]", f"{text} is not inside {cidr}")
        holes.append(hole)
    return CidrBlock(block, tuple(sorted(set(holes))), any_peer)


def prefix(text: str, path: str) -> Prefix:
    try:
        if text != text.strip() or "%" in text:
            raise ValueError
        found = Prefix.parse(text)
    except ValueError:
        raise Refused(path, f"{text!r} is not an IP network") from None
    if ":" in text and found.v4:
        raise Refused(path, f"{text!r} is an IPv4 network written as IPv6: write it as IPv4")
    return found


def port_number(number: int, path: str) -> int:
    if not 1 <= number <= _MAX_PORT:
        raise Refused(path, f"{number} is not a port (1 to {_MAX_PORT})")
    return number


def port_name(name: str, path: str) -> str:
    if len(name) > _PORT_NAME_LENGTH or not _PORT_NAME.fullmatch(name):
        raise Refused(path, f"{name!r} is neither a port number nor a port name")
    return name


def names_outside(rule: Rule, path: str) -> Iterator[Problem]:
    """Named ports belong to pods; towards addresses nobody knows what they mean."""
    named = [port.name for port in rule.ports if isinstance(port, NamedPort)]
    if rule.direction is Direction.EGRESS and named and any(isinstance(peer, CidrBlock) for peer in rule.peers):
        effect = "denies every port of" if rule.verdict is Verdict.DENY else "allows nothing to"
        yield Problem(path, f"port name {named[0]!r} can't be known for addresses: it {effect} these")


# --- NetworkPolicy -----------------------------------------------------------------------------------------------


def network_policy(policy: NetworkPolicy, words: Vocabulary = DEFAULT_VOCABULARY) -> Conversion:
    """Convert a whole NetworkPolicy. Raises nothing."""
    problems: list[Problem] = []
    namespace, spec = policy.metadata.namespace, policy.spec
    own = PolicyId("NetworkPolicy", namespace, policy.metadata.name)
    try:
        conditions = requirements(spec.pod_selector, "spec.podSelector", _pod_keys)
        subject = Selector([_in_namespace(namespace), *conditions])
    except Refused as refused:
        return Conversion(None, (refused.problem,))
    directions = _directions(policy, problems)
    rules: list[Rule] = []
    ingress = spec.ingress or () if Direction.INGRESS in directions else ()
    egress = spec.egress or () if Direction.EGRESS in directions else ()
    listed: tuple[tuple[str, tuple[WireRule, ...]], ...] = ("ingress", ingress), ("egress", egress)
    for section, items in listed:
        for n, item in enumerate(items):
            rule = _allow(own, item, f"{section}[{n}]", words, problems)
            problems += names_outside(rule, f"spec.{rule.origin.path}")
            rules.append(rule)
    return Conversion(Policy(own, (PolicySpec(subject, tuple(rules), directions),)), tuple(problems))


def _directions(policy: NetworkPolicy, problems: list[Problem]) -> frozenset[Direction]:
    """Absent `policyTypes` means Ingress, and Egress too if there are egress rules; so does one we can't read."""
    by_name = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}
    types = policy.spec.policy_types or ()
    found = {by_name[name] for name in types if name in by_name}
    for n, name in enumerate(types):
        if name not in by_name:
            problems.append(Problem(f"spec.policyTypes[{n}]", f"{name!r} is neither Ingress nor Egress"))
    if len(found) < len(set(types)) or not types:
        found.add(Direction.INGRESS)
        if policy.spec.egress:
            found.add(Direction.EGRESS)
    return frozenset(found)


def _allow(
    own: PolicyId,
    item: WireRule,
    path: str,
    words: Vocabulary,
    problems: list[Problem],
) -> Rule:
    if isinstance(item, NetworkPolicyIngressRule):
        direction, field, listed = Direction.INGRESS, "from", item.from_
    else:
        direction, field, listed = Direction.EGRESS, "to", item.to

    def peers() -> tuple[Peer, ...]:
        at = f"spec.{path}.{field}"
        return tuple(_peer(own.namespace, peer, f"{at}[{n}]", words) for n, peer in enumerate(listed or ())) or (
            ANYONE,
        )

    def ports() -> tuple[Port, ...]:
        at = f"spec.{path}.ports"
        return tuple(_port(port, f"{at}[{n}]") for n, port in enumerate(item.ports or ())) or (EVERY_PORT,)

    return Rule(direction, Verdict.ALLOW, attempt(problems, peers, ()), attempt(problems, ports, ()), Origin(own, path))


def _peer(namespace: str, peer: NetworkPolicyPeer, path: str, words: Vocabulary) -> Peer:
    if peer.ip_block is not None:
        if peer.pod_selector is not None or peer.namespace_selector is not None:
            raise Refused(path, "ipBlock can't be combined with selectors")
        return _block(peer.ip_block, f"{path}.ipBlock")
    if peer.pod_selector is None and peer.namespace_selector is None:
        raise Refused(path, "names no peer that is known here")
    conditions = [_in_namespace(namespace)]
    if peer.namespace_selector is not None:
        # Identities of pods have a namespace; a selector without positive conditions must not match a node.
        conditions = [Requirement((NAMESPACE,), Operator.EXISTS)]
        conditions += requirements(peer.namespace_selector, f"{path}.namespaceSelector", _namespace_keys)
    if peer.pod_selector is not None:
        conditions += requirements(peer.pod_selector, f"{path}.podSelector", _pod_keys)
    return only_identity_labels(Selector(conditions), words.labels, path)


def _block(block: IPBlock, path: str) -> CidrBlock:
    return cidr_block(block.cidr, block.except_ or (), path, "cidr", any_peer=True)


def _in_namespace(namespace: str) -> Requirement:
    return Requirement((NAMESPACE,), Operator.IN, (namespace,))


def _pod_keys(key: str, path: str) -> tuple[str, ...]:
    return (f"k8s:{checked_key(key, path)}",)


def _namespace_keys(key: str, path: str) -> tuple[str, ...]:
    return (f"{NAMESPACE_LABELS}{checked_key(key, path)}",)


def _port(port: NetworkPolicyPort, path: str) -> Port:
    protocol = port.protocol or "TCP"
    if protocol not in ("TCP", "UDP", "SCTP"):
        raise Refused(f"{path}.protocol", f"{protocol!r} is none of TCP, UDP, SCTP")
    proto = Proto[protocol]
    if port.end_port is not None:
        if not isinstance(port.port, int):
            raise Refused(f"{path}.endPort", "needs a numeric port to start from")
        first, last = port_number(port.port, f"{path}.port"), port_number(port.end_port, f"{path}.endPort")
        if last < first:
            raise Refused(f"{path}.endPort", f"{last} is below port {first}")
        return PortRange(proto, first, last)
    if port.port is None:
        return PortRange(proto)
    if isinstance(port.port, str):
        return NamedPort(proto, port_name(port.port, f"{path}.port"))
    number = port_number(port.port, f"{path}.port")
    return PortRange(proto, number, number)
