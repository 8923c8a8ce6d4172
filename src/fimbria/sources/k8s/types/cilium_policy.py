"""cilium.io/v2 CiliumNetworkPolicy and CiliumClusterwideNetworkPolicy: decoding that can't widen a policy.

A policy that is understood half may allow too much, so nothing is skipped in silence. `parse_rules` gives for every
rule one of: an error (the text can't be decoded), or the rule plus the paths that nobody knows (a typo such as
`fromEndpoint` would otherwise turn "from these" into "from anywhere") plus the paths that are known to the API but
kept as raw JSON here because Fimbria can't act on them. What to do about them is the compiler's decision.

In peers, absent and empty differ: no `fromEndpoints` puts no restriction, an empty list selects nobody.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import msgspec
from msgspec import inspect

from fimbria.sources.k8s.types.meta import ApiObject, Condition, LabelSelector, Obj

_ABSENT = msgspec.Raw()

# --- peers -------------------------------------------------------------------------------------------------------


class CIDRRule(Obj, frozen=True):
    cidr: str = ""
    except_: tuple[str, ...] | None = msgspec.field(default=None, name="except")
    cidr_group_ref: str = ""
    cidr_group_selector: LabelSelector | None = None


class K8sService(Obj, frozen=True):
    service_name: str = ""
    namespace: str = ""


class K8sServiceSelector(Obj, frozen=True):
    selector: LabelSelector = LabelSelector()
    namespace: str = ""


class ServicePeer(Obj, frozen=True):
    k8s_service: K8sService | None = None
    k8s_service_selector: K8sServiceSelector | None = None


class FQDNPeer(Obj, frozen=True):
    match_name: str = ""
    match_pattern: str = ""


# --- ports -------------------------------------------------------------------------------------------------------


class PortProtocol(Obj, frozen=True):
    """`port` is a number or a port's name, as text; "0" or "" is every port. `protocol` "" is the API's "ANY"."""

    port: str = ""
    end_port: int = 0
    protocol: str = ""


class PortRule(Obj, frozen=True):
    ports: tuple[PortProtocol, ...] | None = None
    rules: msgspec.Raw = _ABSENT
    terminating_tls: msgspec.Raw = msgspec.field(default=_ABSENT, name="terminatingTLS")
    originating_tls: msgspec.Raw = msgspec.field(default=_ABSENT, name="originatingTLS")
    server_names: msgspec.Raw = _ABSENT
    listener: msgspec.Raw = _ABSENT


class PortDenyRule(Obj, frozen=True):
    ports: tuple[PortProtocol, ...] | None = None


class ICMPField(Obj, frozen=True):
    """`type` is a number or a name; `family` IPv4 (the default) or IPv6."""

    family: str = "IPv4"
    type: int | str = 0


class ICMPRule(Obj, frozen=True):
    fields: tuple[ICMPField, ...] | None = None


class Authentication(Obj, frozen=True):
    """`mode` is disabled, required or test-always-fail."""

    mode: str = ""


# --- rules -------------------------------------------------------------------------------------------------------


class IngressDenyRule(Obj, frozen=True):
    from_endpoints: tuple[LabelSelector, ...] | None = None
    from_entities: tuple[str, ...] | None = None
    from_cidr: tuple[str, ...] | None = msgspec.field(default=None, name="fromCIDR")
    from_cidr_set: tuple[CIDRRule, ...] | None = msgspec.field(default=None, name="fromCIDRSet")
    from_nodes: tuple[LabelSelector, ...] | None = None
    from_groups: msgspec.Raw = _ABSENT
    from_requires: msgspec.Raw = _ABSENT
    to_ports: tuple[PortDenyRule, ...] | None = None
    icmps: tuple[ICMPRule, ...] | None = None


class IngressRule(IngressDenyRule, frozen=True):
    to_ports: tuple[PortRule, ...] | None = None  # type: ignore[assignment]  # allow rules carry L7 as well
    authentication: Authentication | None = None


class EgressDenyRule(Obj, frozen=True):
    to_endpoints: tuple[LabelSelector, ...] | None = None
    to_entities: tuple[str, ...] | None = None
    to_cidr: tuple[str, ...] | None = msgspec.field(default=None, name="toCIDR")
    to_cidr_set: tuple[CIDRRule, ...] | None = msgspec.field(default=None, name="toCIDRSet")
    to_nodes: tuple[LabelSelector, ...] | None = None
    to_services: tuple[ServicePeer, ...] | None = None
    to_groups: msgspec.Raw = _ABSENT
    to_requires: msgspec.Raw = _ABSENT
    to_ports: tuple[PortDenyRule, ...] | None = None
    icmps: tuple[ICMPRule, ...] | None = None


class EgressRule(EgressDenyRule, frozen=True):
    to_fqdns: tuple[FQDNPeer, ...] | None = msgspec.field(default=None, name="toFQDNs")
    to_ports: tuple[PortRule, ...] | None = None  # type: ignore[assignment]  # allow rules carry L7 as well
    authentication: Authentication | None = None


class EnableDefaultDeny(Obj, frozen=True):
    """Absent means: deny by default in a direction that has rules."""

    ingress: bool | None = None
    egress: bool | None = None


class RuleLabel(Obj, frozen=True):
    key: str = ""
    value: str = ""
    source: str = ""


class RuleLog(Obj, frozen=True):
    value: str = ""


class Rule(Obj, frozen=True):
    """Exactly one of the selectors is valid; the compiler checks that, and that `node_selector` is clusterwide."""

    endpoint_selector: LabelSelector | None = None
    node_selector: LabelSelector | None = None
    ingress: tuple[IngressRule, ...] | None = None
    ingress_deny: tuple[IngressDenyRule, ...] | None = None
    egress: tuple[EgressRule, ...] | None = None
    egress_deny: tuple[EgressDenyRule, ...] | None = None
    labels: tuple[RuleLabel, ...] | None = None
    enable_default_deny: EnableDefaultDeny = EnableDefaultDeny()
    description: str = ""
    log: RuleLog = RuleLog()


class PolicyStatus(Obj, frozen=True):
    conditions: tuple[Condition, ...] | None = None


class CiliumNetworkPolicy(ApiObject, frozen=True):
    """`spec` is one rule, `specs` a list; either or both. Raw until `parse_rules`: see the module's text.

    The Raw values are views of the buffer they were decoded from: parse them before storing anything.
    """

    spec: msgspec.Raw = _ABSENT
    specs: msgspec.Raw = _ABSENT
    status: PolicyStatus = PolicyStatus()


class CiliumClusterwideNetworkPolicy(CiliumNetworkPolicy, frozen=True):
    pass


# --- parsing -----------------------------------------------------------------------------------------------------


class ParsedRule(msgspec.Struct, frozen=True):
    """One rule of a policy. `rule` is None exactly when `error` isn't empty.

    `path` is `spec` or `specs[n]`; `unknown` and `unsupported` are full paths such as `spec.ingress[0].fromGroups`.
    """

    path: str
    rule: Rule | None
    error: str = ""
    unknown: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()


_DECODER = msgspec.json.Decoder(Rule)


def parse_rules(policy: CiliumNetworkPolicy) -> tuple[ParsedRule, ...]:
    """All rules of a policy, each with what is wrong with it. Raises nothing; a policy without rules gives ()."""
    parsed = []
    if bytes(policy.spec) not in (b"", b"null"):
        parsed.append(_parse("spec", bytes(policy.spec)))
    if bytes(policy.specs) not in (b"", b"null"):
        try:
            items = msgspec.json.decode(bytes(policy.specs), type=list[msgspec.Raw])
        except msgspec.MsgspecError as error:
            parsed.append(ParsedRule("specs", None, _explain("specs", error)))
        else:
            parsed += [_parse(f"specs[{n}]", bytes(item)) for n, item in enumerate(items)]
    return tuple(parsed)


def _parse(path: str, text: bytes) -> ParsedRule:
    try:
        rule = _DECODER.decode(text)
        fields = msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        return ParsedRule(path, None, _explain(path, error))
    return ParsedRule(path, rule, "", tuple(_unknown(fields, _shape(), path)), tuple(_raw(fields, _shape(), path)))


def _explain(path: str, error: Exception) -> str:
    """One sentence that names the field: msgspec writes the position as `$.ingress[0].x`."""
    text = str(error)
    return text.replace("`$", f"`{path}") if "`$" in text else f"{text} - at `{path}`"


@cache
def _shape() -> inspect.Type:
    return inspect.type_info(Rule)


def _unknown(value: Any, shape: inspect.Type, path: str) -> Iterator[str]:
    """Paths in `value` that `shape` has no field for."""
    for child, child_shape, child_path in _children(value, shape, path):
        if child_shape is None:
            yield child_path
        else:
            yield from _unknown(child, child_shape, child_path)


def _raw(value: Any, shape: inspect.Type, path: str) -> Iterator[str]:
    """Paths in `value` whose content this module keeps undecoded."""
    for child, child_shape, child_path in _children(value, shape, path):
        if isinstance(child_shape, inspect.RawType):
            if child is not None:
                yield child_path
        elif child_shape is not None:
            yield from _raw(child, child_shape, child_path)


def _children(value: Any, shape: inspect.Type, path: str) -> Iterator[tuple[Any, inspect.Type | None, str]]:
    if isinstance(shape, inspect.UnionType) and not isinstance(value, str | int | None):
        shape = next((t for t in shape.types if isinstance(t, inspect.StructType | inspect.VarTupleType)), shape)
    if isinstance(shape, inspect.StructType) and isinstance(value, dict):
        fields = {field.encode_name: field.type for field in shape.fields}
        for name, child in value.items():
            yield child, fields.get(name), f"{path}.{name}"
    elif isinstance(shape, inspect.VarTupleType) and isinstance(value, list):
        for n, child in enumerate(value):
            yield child, shape.item_type, f"{path}[{n}]"
