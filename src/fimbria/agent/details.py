"""One object of the agent's state with everything behind it, for `get`. Plain JSON-shaped values; changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from fimbria.agent import views
from fimbria.compute.policy_shapes import CIDR_ANY_PEER, PREFIX_ANY_PORT, PREFIX_ANY_PROTO, PREFIX_FULL
from fimbria.model.address import Prefix, is_v4, pack, unpack
from fimbria.model.identity import SCOPE_CIDR
from fimbria.model.policy import Anyone, Direction, NamedPort, Policy, PolicySpec, PortRange, Rule, Verdict
from fimbria.model.protocol import NAMES, protocol_name
from fimbria.model.rows import PolicyEntry, PolicyKey, PrefixKey
from fimbria.model.service import Endpoint, EndpointPort, ServiceKey

if TYPE_CHECKING:
    from fimbria.agent.main import Agent

Row = dict[str, Any]
_ICMP: Final = (1, 58)
_V4_BITS: Final = 96  # what an IPv4 prefix is longer by in its mapped form


def endpoint(agent: Agent, number: int) -> Row:
    """One endpoint with the entries of its policy set, by peer and port. Raises KeyError for an unknown one."""
    if number not in agent.tables.endpoints:
        raise KeyError(number)
    row = next(r for r in views.endpoints(agent) if r["id"] == number)
    entries: Mapping[PolicyKey, PolicyEntry] = agent.rows.policy_sets.desired.get(row["policy_set"], {})
    cidrs = {row.identity: str(Prefix(key.addr, key.prefixlen)) for key, row in agent.rows.cidrs.desired.items()}
    ordered = sorted(entries.items(), key=lambda e: (e[0].direction, e[0].peer, e[0].proto, e[0].port, -e[0].prefixlen))
    return row | {"entries": [_entry(agent, k, e, cidrs) for k, e in ordered]}


def _entry(agent: Agent, key: PolicyKey, entry: PolicyEntry, cidrs: dict[int, str]) -> Row:
    return {
        "direction": Direction(key.direction).name.lower(),
        "verdict": Verdict(entry.verdict).name.lower(),
        "peer": key.peer,
        "peer_is": _peer(agent, key.peer, cidrs),
        "ports": port_text(key.prefixlen, key.proto, key.port),
        "pods_too": bool(entry.flags & CIDR_ANY_PEER),
        "rule": views.rule(agent, entry.rule),
    }


def _peer(agent: Agent, number: int, cidrs: dict[int, str]) -> list[str]:
    if number == 0:
        return ["anyone"]
    if number >= SCOPE_CIDR:
        return [cidrs.get(number, "a block that is gone")]
    return views.identity_labels(agent, number)


def port_text(prefixlen: int, proto: int, port: int) -> str:
    """What a policy entry's (protocol, port) prefix means: `any`, `TCP`, `TCP/80`, `TCP/8080-8087`, `ICMP type 8`."""
    if prefixlen <= PREFIX_ANY_PROTO:
        return "any"
    name = NAMES.get(proto, f"protocol {proto}")
    if prefixlen <= PREFIX_ANY_PORT:
        return name
    last = port + (1 << (PREFIX_FULL - prefixlen)) - 1
    if proto in _ICMP:
        first_type, last_type = port >> 8, last >> 8
        return f"{name} type {first_type}" if first_type == last_type else f"{name} types {first_type}-{last_type}"
    return f"{name}/{port}" if port == last else f"{name}/{port}-{last}"


def ipcache(agent: Agent, address: str) -> Row:
    """The prefixes that contain an address, longest first: the first one counts. Raises ValueError for no address."""
    addr = pack(address)
    bits = int.from_bytes(addr, "big")
    matches = []
    for length in range(128, (_V4_BITS if is_v4(addr) else 0) - 1, -1):
        mask = (1 << 128) - (1 << (128 - length))
        key = PrefixKey(length, (bits & mask).to_bytes(16, "big"))
        row = agent.rows.ipcache.desired.get(key)
        if row is not None:
            found = views.ipcache_row(key, row)
            matches.append(
                found | {"labels": views.identity_labels(agent, row.identity), "claims": _claims(agent, key)}
            )
    world = {"prefix": "", "identity": 2, "labels": views.identity_labels(agent, 2), "flags": [], "tunnel": ""}
    return {"address": unpack(addr), "answer": matches[0] if matches else world, "matches": matches}


def _claims(agent: Agent, key: PrefixKey) -> list[str]:
    """Who says so: a pod here, a pod or a node elsewhere."""
    found = []
    for kind, source in agent.engine.ipcache.sources(key):
        if kind == "local":
            e = agent.tables.endpoints.get(source)
            found.append(f"pod {e.label} of this node" if e else f"endpoint {source}")
        elif kind == "pod":
            found.append(f"pod {source[0]}/{source[1]} (its CiliumEndpoint)")
        else:
            found.append(f"{kind} {source}")
    return found


def policy(agent: Agent, kind: str, namespace: str, name: str) -> Row:
    """One policy with its rules as they were understood. Raises KeyError for an unknown one."""
    row = next(
        (
            r
            for r in views.policies(agent)
            if (r["kind"].lower(), r["namespace"], r["name"]) == (kind.lower(), namespace, name)
        ),
        None,
    )
    if row is None:
        raise KeyError(name)
    known: Policy = next(
        p
        for table in views.policy_tables(agent)
        for p in table.values()
        if (p.id.kind, p.id.namespace, p.id.name) == (row["kind"], namespace, name)
    )
    return row | {"specs": [_spec(s) for s in known.specs]}


def _spec(spec: PolicySpec) -> Row:
    return {
        "subject": str(spec.subject),
        "default_deny": sorted(d.name.lower() for d in spec.default_deny),
        "rules": [_rule(r) for r in spec.rules],
    }


def _rule(rule: Rule) -> Row:
    return {
        "path": rule.origin.path,
        "direction": rule.direction.name.lower(),
        "verdict": rule.verdict.name.lower(),
        "peers": ["anyone" if isinstance(p, Anyone) else str(p) for p in rule.peers],
        "ports": [_port(p) for p in rule.ports],
    }


def _port(port: PortRange | NamedPort) -> str:
    name = "any" if port.proto is None else NAMES.get(int(port.proto), f"protocol {port.proto}")
    if isinstance(port, NamedPort):
        return f"{name}/{port.name}"
    if port.proto is None or (port.first, port.last) == (0, 65535):
        return name
    if port.proto in _ICMP:
        return f"{name} type {port.first >> 8}"
    return f"{name}/{port.first}" if port.first == port.last else f"{name}/{port.first}-{port.last}"


def service(agent: Agent, namespace: str, name: str) -> Row:
    """One service: its frontends, and all endpoints that its slices list, whether or not this node uses them. Raises
    KeyError for an unknown one."""
    key = ServiceKey(namespace, name)
    frontends = [r for r in views.services(agent) if r["service"] == str(key) and r["frontend"]]
    known = next((s for s in agent.tables.services.values() if s.key == key), None)
    if known is None and not frontends:
        raise KeyError(str(key))
    used = {backend for r in frontends for backend in r["backends"]}
    found = (agent.tables.endpoint_slices.get(k) for k in agent.tables.endpoint_slices.by("service", key))
    endpoints = [_service_endpoint(p, e, s.weight, used) for s in found if s for p in s.ports for e in s.endpoints]
    return {
        "service": str(key),
        "type": known.kind if known else "",
        "frontends": frontends,
        "endpoints": sorted(endpoints, key=lambda e: (e["port"], e["address"])),
        "health_check_port": known.health_check_port if known else 0,
        "warnings": list(agent.engine.services.warnings(key)),
    }


def _service_endpoint(port: EndpointPort, e: Endpoint, weight: int, used: set[str]) -> Row:
    address = views.addr_port(e.addr, port.port)
    state = "terminating" if e.terminating else "active" if e.ready else "not ready"
    return {
        "address": address,
        "port": port.name,
        "protocol": protocol_name(port.proto),
        "node": e.node,
        "state": state if e.serving or not e.terminating else "terminating, not serving",
        "weight": weight,
        "for_zones": list(e.zones),
        "for_nodes": list(e.nodes),
        "used": address in used,
    }
