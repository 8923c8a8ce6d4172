"""CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy (cilium.io/v2), layers 3 and 4, to the model.

What the rules say (https://docs.cilium.io/en/stable/security/policy/language/):
- A rule without peers and ports says nothing, but makes denied the default; with ports alone it means any peer.
- A peer field that is present but empty selects nobody. A rule has at most one kind of peer.
- Selectors of a namespaced policy mean its own namespace unless they name namespaces; clusterwide ones all of them.

See `policies` for how whatever isn't understood or supported fails closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgspec

from fimbria.model.address import Prefix
from fimbria.model.identity import RESERVED_LABELS
from fimbria.model.labels import CLUSTER, NAMESPACE, NAMESPACE_LABELS
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
    Selector,
    Verdict,
    icmp_type,
)
from fimbria.model.policy import Rule as ModelRule
from fimbria.sources.k8s.policies import (
    DEFAULT_VOCABULARY,
    Conversion,
    Port,
    Refused,
    Vocabulary,
    attempt,
    checked_key,
    cidr_block,
    names_outside,
    only_identity_labels,
    port_name,
    port_number,
    requirements,
)
from fimbria.sources.k8s.types.cilium_policy import (
    Authentication,
    CIDRRule,
    CiliumClusterwideNetworkPolicy,
    CiliumNetworkPolicy,
    EgressDenyRule,
    EgressRule,
    ICMPField,
    IngressDenyRule,
    IngressRule,
    ParsedRule,
    PortDenyRule,
    PortProtocol,
    Rule,
    parse_rules,
)
from fimbria.sources.k8s.types.meta import LabelSelector

WireRule = IngressDenyRule | EgressDenyRule
_SECTIONS: Final = (
    ("ingress", Direction.INGRESS, Verdict.ALLOW),
    ("ingressDeny", Direction.INGRESS, Verdict.DENY),
    ("egress", Direction.EGRESS, Verdict.ALLOW),
    ("egressDeny", Direction.EGRESS, Verdict.DENY),
)
_RESERVED: Final = frozenset(key.partition(":")[2] for labels in RESERVED_LABELS.values() for key in labels) | {
    "ingress"
}
_L4: Final = {
    "TCP": (Proto.TCP,),
    "UDP": (Proto.UDP,),
    "SCTP": (Proto.SCTP,),
    "ANY": (Proto.TCP, Proto.UDP, Proto.SCTP),
}
_ICMP: Final = {"ICMP": Proto.ICMP, "ICMPV6": Proto.ICMPV6}

# RFC 792, 1256, 8335 and the IANA registries "ICMP Type Numbers", "ICMPv6 type Numbers", by the API's names.
_ICMP4_TYPES: Final = {
    "EchoReply": 0, "DestinationUnreachable": 3, "Redirect": 5, "Echo": 8, "EchoRequest": 8, "RouterAdvertisement": 9,
    "RouterSelection": 10, "TimeExceeded": 11, "ParameterProblem": 12, "Timestamp": 13, "TimestampReply": 14,
    "Photuris": 40, "ExtendedEchoRequest": 42, "ExtendedEcho": 42, "ExtendedEchoReply": 43,
}  # fmt: skip
_ICMP6_TYPES: Final = {
    "DestinationUnreachable": 1, "PacketTooBig": 2, "TimeExceeded": 3, "ParameterProblem": 4, "EchoRequest": 128,
    "EchoReply": 129, "MulticastListenerQuery": 130, "MulticastListenerReport": 131, "MulticastListenerDone": 132,
    "RouterSolicitation": 133, "RouterAdvertisement": 134, "NeighborSolicitation": 135, "NeighborAdvertisement": 136,
    "RedirectMessage": 137, "RouterRenumbering": 138, "ICMPNodeInformationQuery": 139,
    "ICMPNodeInformationResponse": 140,
    "InverseNeighborDiscoverySolicitation": 141, "InverseNeighborDiscoveryAdvertisement": 142,
    "HomeAgentAddressDiscoveryRequest": 144, "HomeAgentAddressDiscoveryReply": 145, "MobilePrefixSolicitation": 146,
    "MobilePrefixAdvertisement": 147, "DuplicateAddressRequestCodeSuffix": 157,
    "DuplicateAddressConfirmationCodeSuffix": 158,
    "ExtendedEchoRequest": 160, "ExtendedEchoReply": 161,
}  # fmt: skip


def cilium_policy(policy: CiliumNetworkPolicy, words: Vocabulary = DEFAULT_VOCABULARY) -> Conversion:
    """Convert either kind. Raises nothing."""
    clusterwide = isinstance(policy, CiliumClusterwideNetworkPolicy)
    kind = "CiliumClusterwideNetworkPolicy" if clusterwide else "CiliumNetworkPolicy"
    own = PolicyId(kind, "" if clusterwide else policy.metadata.namespace, policy.metadata.name)
    problems: list[Problem] = []
    parsed = parse_rules(policy)
    if not parsed:
        problems.append(Problem("spec", "there is neither a spec nor specs: nothing is selected"))
    specs = []
    for item in parsed:
        try:
            spec = _Spec(own, item, words, problems)
            specs.append(spec.salvage(_text(policy, item.path)) if item.rule is None else spec.convert(item.rule))
        except Refused as refused:
            return Conversion(None, (*problems, refused.problem))
    return Conversion(Policy(own, tuple(spec for spec in specs if spec is not None)), tuple(problems))


def _text(policy: CiliumNetworkPolicy, path: str) -> bytes:
    if path == "spec":
        return bytes(policy.spec)
    try:
        items = msgspec.json.decode(bytes(policy.specs), type=list[msgspec.Raw])
        return bytes(items[int(path.removeprefix("specs[").removesuffix("]"))])
    except (msgspec.MsgspecError, ValueError):
        raise Refused(path, "is not a list of rules") from None


# --- one spec ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Spec:
    own: PolicyId
    parsed: ParsedRule
    words: Vocabulary
    problems: list[Problem]

    def convert(self, rule: Rule) -> PolicySpec | None:
        """None if it selects nodes. Raises Refused if it can't be known which pods it selects."""
        path = self.parsed.path
        if rule.node_selector is not None:
            self._selects_nodes(self.own.namespace, rule.endpoint_selector)
            return None
        subject = self._subject(rule.endpoint_selector)
        listed: dict[str, Sequence[WireRule]] = {
            "ingress": rule.ingress or (),
            "ingressDeny": rule.ingress_deny or (),
            "egress": rule.egress or (),
            "egressDeny": rule.egress_deny or (),
        }
        denied = set()
        for direction, wish in zip(
            Direction, (rule.enable_default_deny.ingress, rule.enable_default_deny.egress), strict=True
        ):
            has_rules = any(listed[name] for name, of, _ in _SECTIONS if of is direction)
            if has_rules if wish is None else wish:
                denied.add(direction)
        unreadable = self._outside_of_rules(listed)
        for at in unreadable:
            self.problems.append(Problem(at, "unknown field: nothing is allowed in either direction"))
        rules = [
            self._rule(item, f"{path}.{name}[{n}]", direction, verdict)
            for name, direction, verdict in _SECTIONS
            for n, item in enumerate(listed[name])
            if not (unreadable and verdict is Verdict.ALLOW)
        ]
        return PolicySpec(subject, tuple(rules), frozenset(Direction if unreadable else denied))

    def salvage(self, text: bytes) -> PolicySpec | None:
        """Of a spec that can't be decoded: whom it selects, nothing allowed, everything denied that has a deny rule."""
        path = self.parsed.path
        try:
            shell = msgspec.json.decode(text, type=_Shell)
        except (msgspec.MsgspecError, RecursionError):
            raise Refused(path, self.parsed.error) from None
        if shell.node_selector is not None:
            self._selects_nodes(self.own.namespace, shell.endpoint_selector)
            return None
        subject = self._subject(shell.endpoint_selector)
        self.problems.append(Problem(path, f"{self.parsed.error}: nothing is allowed by this spec"))
        present = {
            "ingress": shell.ingress,
            "ingressDeny": shell.ingress_deny,
            "egress": shell.egress,
            "egressDeny": shell.egress_deny,
        }
        rules, denied = [], set()
        for name, direction, verdict in _SECTIONS:
            if present[name]:
                denied.add(direction)
                if verdict is Verdict.DENY:
                    origin = self._origin(f"{path}.{name}")
                    rules.append(ModelRule(direction, verdict, (ANYONE,), (EVERY_PORT,), origin))
        return PolicySpec(subject, tuple(rules), frozenset(denied))

    def _selects_nodes(self, namespace: str, endpoint_selector: LabelSelector | None) -> None:
        at = f"{self.parsed.path}.nodeSelector"
        if endpoint_selector is not None:
            raise Refused(at, "can't be combined with endpointSelector")
        if namespace:
            raise Refused(at, "only a clusterwide policy can select nodes")
        self.problems.append(Problem(at, "nodeSelector is not supported yet: nodes are not restricted by this policy"))

    def _subject(self, selector: LabelSelector | None) -> Selector:
        path = f"{self.parsed.path}.endpointSelector"
        if selector is None:
            raise Refused(path, "is missing: it can't be known which pods are selected")
        for unknown in self.parsed.unknown:
            if unknown.startswith(f"{path}."):
                raise Refused(unknown, "unknown field: it can't be known which pods are selected")
        conditions = list(requirements(selector, path, _keys))
        if not self.own.namespace:
            return Selector(conditions)
        inside = Requirement((NAMESPACE,), Operator.IN, (self.own.namespace,))
        foreign = [c for c in conditions if NAMESPACE in c.keys and c != inside]
        if foreign:
            # Dropped rather than combined: selecting nobody would leave the pods open.
            self.problems.append(
                Problem(path, f"a policy selects pods of its own namespace only: {foreign[0]} is ignored")
            )
        return Selector([inside, *(c for c in conditions if c not in foreign)])

    def _outside_of_rules(self, listed: dict[str, Sequence[WireRule]]) -> list[str]:
        """Unknown fields of the spec itself: they may be misspelt rules."""
        path = self.parsed.path
        inside = tuple(f"{path}.{name}[" for name in (*listed, "labels"))
        return [at for at in self.parsed.unknown if not at.startswith(inside)]

    def _origin(self, path: str) -> Origin:
        return Origin(self.own, path.removeprefix("spec."))

    def _rule(self, item: WireRule, path: str, direction: Direction, verdict: Verdict) -> ModelRule:
        allow = verdict is Verdict.ALLOW
        before = len(self.problems)
        effect = "this rule allows nothing" if allow else "this rule denies everything it could mean"
        self.problems.extend(self._not_for_us(item, path, effect))
        open_ended = len(self.problems) > before
        wide: tuple[tuple[Peer, ...], tuple[Port, ...]] = ((), ()) if allow else ((ANYONE,), (EVERY_PORT,))
        peers: tuple[Peer, ...] = attempt(self.problems, partial(self._peers, item, path), wide[0])
        ports: tuple[Port, ...] = attempt(self.problems, partial(_ports, item, path), wide[1])
        if open_ended:
            peers = () if allow else (ANYONE,)
            ports = (
                wide[1] if any(".toPorts[" in p.path or ".icmps[" in p.path for p in self.problems[before:]) else ports
            )
        rule = ModelRule(direction, verdict, peers, ports, self._origin(path))
        self.problems.extend(names_outside(rule, path))
        return rule

    def _not_for_us(self, item: WireRule, path: str, effect: str) -> Iterator[Problem]:
        """What this rule contains beyond layers 3 and 4."""
        for at in self.parsed.unknown:
            if at.startswith(f"{path}."):
                yield Problem(at, f"unknown field: {effect}")
        for at in self.parsed.unsupported:
            if at.startswith(f"{path}."):
                field = at.rpartition(".")[2]
                what = "layer 7 (rules)" if field == "rules" else field
                yield Problem(at, f"{what} is not supported yet: {effect}")
        for name in ("toFQDNs", "toServices", "fromNodes", "toNodes"):
            if _field(item, name) is not None:
                yield Problem(f"{path}.{name}", f"{name} is not supported yet: {effect}")
        authentication: Authentication | None = getattr(item, "authentication", None)
        if authentication is not None and authentication.mode != "disabled":
            yield Problem(f"{path}.authentication", f"authentication is not supported yet: {effect}")

    # --- peers ---

    def _peers(self, item: WireRule, path: str) -> tuple[Peer, ...]:
        side = "from" if isinstance(item, IngressDenyRule) else "to"
        kinds: tuple[tuple[str, Callable[[Any, str], Iterable[Peer]]], ...] = (
            (f"{side}Endpoints", self._endpoint),
            (f"{side}Entities", self._entity),
            (f"{side}CIDR", lambda cidr, at: [cidr_block(cidr, (), at, "", any_peer=False)]),
            (f"{side}CIDRSet", _cidr_set),
        )
        present = [(name, convert) for name, convert in kinds if _field(item, name) is not None]
        if len(present) > 1:
            raise Refused(
                path, f"combining {present[0][0]} and {present[1][0]} in one rule is not supported: write two rules"
            )
        for name, convert in present:
            listed = enumerate(_field(item, name))
            return tuple(dict.fromkeys(peer for n, entry in listed for peer in convert(entry, f"{path}.{name}[{n}]")))
        return (ANYONE,) if item.to_ports or item.icmps else ()

    def _endpoint(self, selector: LabelSelector, path: str) -> Iterator[Peer]:
        conditions = list(requirements(selector, path, _keys))
        keys = {key for condition in conditions for key in condition.keys}
        if not any(key.startswith("reserved:") for key in keys):
            if not any(key == NAMESPACE or key.startswith(NAMESPACE_LABELS) for key in keys) and self.own.namespace:
                conditions.append(Requirement((NAMESPACE,), Operator.IN, (self.own.namespace,)))
            elif not any(NAMESPACE in c.keys and c.operator is not Operator.NOT_IN for c in conditions):
                # "Endpoints" are pods: a selector of only negative conditions must not match nodes and the world.
                conditions.append(Requirement((NAMESPACE,), Operator.EXISTS))
        yield only_identity_labels(Selector(conditions), self.words.labels, path)

    def _entity(self, name: str, path: str) -> Iterable[Peer]:
        match name:
            case "all":
                return (ANYONE,)
            case "none":
                return ()
            case "world-ipv4":
                return (CidrBlock(Prefix.parse("0.0.0.0/0")),)
            case "world-ipv6":
                return (CidrBlock(Prefix.parse("::/0")),)
            case "cluster":
                pods = Selector([Requirement((CLUSTER,), Operator.IN, (self.words.cluster,))])
                return (pods, *(_reserved(other) for other in sorted(_RESERVED - {"world"})))
            case "cluster-mesh":
                raise Refused(path, "entity cluster-mesh is not supported yet")
        if name not in _RESERVED:
            raise Refused(path, f"{name!r} is not an entity")
        return (_reserved(name),)


class _Shell(msgspec.Struct, rename="camel", gc=False):
    """As much of a spec as must be readable for its pods to stay selected."""

    endpoint_selector: LabelSelector | None = None
    node_selector: Any = None
    ingress: Any = None
    ingress_deny: Any = None
    egress: Any = None
    egress_deny: Any = None


# --- small pieces ------------------------------------------------------------------------------------------------


def _field(item: WireRule, name: str) -> Any:
    """A field by the name that users write; None where the kind of rule has no such field."""
    return getattr(item, _PYTHON_NAMES[name], None)


_WIRE_RULES: Final[tuple[type[WireRule], ...]] = (IngressRule, EgressRule)
_PYTHON_NAMES: Final = {field.encode_name: field.name for kind in _WIRE_RULES for field in msgspec.structs.fields(kind)}


def _keys(key: str, path: str) -> tuple[str, ...]:
    """`k8s:x` and `reserved:x` are what they say; `any:x` and plain `x` mean a label of any source."""
    source, colon, name = key.partition(":")
    if not colon:
        source, name = "any", key
    checked_key(name, path)
    if source in ("k8s", "reserved"):
        return (f"{source}:{name}",)
    if source != "any":
        raise Refused(path, f"labels of source {source!r} don't exist here")
    return (f"k8s:{name}", f"reserved:{name}") if name in _RESERVED else (f"k8s:{name}",)


def _reserved(name: str) -> Selector:
    return Selector([Requirement((f"reserved:{name}",), Operator.EXISTS)])


def _cidr_set(item: CIDRRule, path: str) -> Iterator[Peer]:
    for name, used in (("cidrGroupRef", item.cidr_group_ref), ("cidrGroupSelector", item.cidr_group_selector)):
        if used:
            raise Refused(f"{path}.{name}", f"{name} is not supported yet")
    yield cidr_block(item.cidr, item.except_ or (), path, "cidr", any_peer=False)


def _ports(item: WireRule, path: str) -> tuple[Port, ...]:
    if item.to_ports and item.icmps:
        raise Refused(f"{path}.icmps", "can't be combined with toPorts: write two rules")
    found: list[Port] = []
    for n, listed in enumerate(item.to_ports or ()):
        found += _port_rule(listed, f"{path}.toPorts[{n}]")
    for n, icmp in enumerate(item.icmps or ()):
        if not icmp.fields:
            raise Refused(f"{path}.icmps[{n}]", "names no types")
        found += [_icmp(field, f"{path}.icmps[{n}].fields[{m}]") for m, field in enumerate(icmp.fields)]
    return tuple(dict.fromkeys(found)) or (EVERY_PORT,)


def _port_rule(rule: PortDenyRule, path: str) -> Iterator[Port]:
    if not rule.ports:
        raise Refused(path, "names no ports")
    for n, port in enumerate(rule.ports):
        yield from _port(port, f"{path}.ports[{n}]")


def _port(port: PortProtocol, path: str) -> Iterator[Port]:
    protocol = port.protocol.upper() or "ANY"
    everything = port.port in ("", "0")
    if everything and port.end_port:
        raise Refused(f"{path}.endPort", "needs a numeric port to start from")
    if protocol in _ICMP:
        if not everything:
            raise Refused(f"{path}.port", f"{protocol} has no ports: types are chosen by icmps")
        yield PortRange(_ICMP[protocol])
        return
    if protocol not in _L4:
        raise Refused(f"{path}.protocol", f"protocol {port.protocol!r} is not supported")
    if everything:
        yield from (EVERY_PORT,) if protocol == "ANY" else (PortRange(proto) for proto in _L4[protocol])
    elif port.port.isdecimal() and port.port.isascii():
        first = port_number(_small(port.port), f"{path}.port")
        last = port_number(port.end_port, f"{path}.endPort") if port.end_port else first
        if last < first:
            raise Refused(f"{path}.endPort", f"{last} is below port {first}")
        yield from (PortRange(proto, first, last) for proto in _L4[protocol])
    elif port.end_port:
        raise Refused(f"{path}.endPort", "needs a numeric port to start from")
    else:
        name = port_name(port.port.lower(), f"{path}.port")
        yield from (NamedPort(proto, name) for proto in _L4[protocol])


def _icmp(field: ICMPField, path: str) -> PortRange:
    families = {
        "": (Proto.ICMP, _ICMP4_TYPES),
        "IPv4": (Proto.ICMP, _ICMP4_TYPES),
        "IPv6": (Proto.ICMPV6, _ICMP6_TYPES),
    }
    if field.family not in families:
        raise Refused(f"{path}.family", f"{field.family!r} is neither IPv4 nor IPv6")
    proto, names = families[field.family]
    if isinstance(field.type, str) and not (field.type.isdecimal() and field.type.isascii()):
        if field.type not in names:
            raise Refused(f"{path}.type", f"{field.type!r} is not an ICMP type of {field.family or 'IPv4'}")
        return icmp_type(proto, names[field.type])
    number = _small(field.type) if isinstance(field.type, str) else field.type
    if not 0 <= number <= 255:
        raise Refused(f"{path}.type", f"{number} is not an ICMP type (0 to 255)")
    return icmp_type(proto, number)


def _small(digits: str) -> int:
    """A number of few digits; anything longer is beyond every limit here, and long ones are slow to convert."""
    return int(digits) if len(digits) <= 6 else 10**6
