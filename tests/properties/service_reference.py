"""Kubernetes' rules of Services once more: slow, without history, straight from the objects."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fimbria.compute import service_frontends as front
from fimbria.compute.service import BACKENDS, FRONTENDS, MEMBERS, RANGES, SLOTS, TABLES, BackendKey, Extra, Owner
from fimbria.compute.service_frontends import Defaults
from fimbria.model.address import Prefix, is_v4, unpack
from fimbria.model.rows import FrontendKey, MemberKey, SlotKey
from fimbria.model.service import Endpoint, EndpointSlice, NodeTopology, Service, ServiceKey, ServicePort

NODE = "here"
SERVICE_RANK = 1


@dataclass(frozen=True)
class Lead:
    """What a client of one frontend meets. `group`: frontends of the same group share a service id."""

    backends: frozenset[BackendKey]
    flags: int
    affinity: int = 0
    ranges: frozenset[str] = frozenset()
    weights: frozenset[tuple[BackendKey, int]] = frozenset()
    group: Any = None


@dataclass
class World:
    """All objects there are."""

    services: dict[ServiceKey, tuple[Service, tuple[EndpointSlice, ...]]] = field(default_factory=dict)
    extras: dict[Owner, tuple[Extra, ...]] = field(default_factory=dict)
    node: NodeTopology = field(default_factory=NodeTopology)
    defaults: Defaults = field(default_factory=Defaults)


# --- endpoints ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """One endpoint as kube-proxy sees it: of several listings the one that isn't terminating, the ready one."""

    backend: BackendKey
    ready: bool
    serving: bool
    terminating: bool
    node: str
    zones: tuple[str, ...]
    nodes: tuple[str, ...]


def listed(world: World, key: ServiceKey, port: ServicePort, v4: bool) -> tuple[list[Seen], dict[BackendKey, int]]:
    """The endpoints of a service port, and their weights."""
    service, parts = world.services[key]
    zone = dict(world.node.labels).get("topology.kubernetes.io/zone", "")
    found: dict[BackendKey, Seen] = {}
    weights: dict[BackendKey, int] = {}

    def goodness(s: Seen) -> tuple[bool, ...]:
        here = s.node == NODE
        return (not s.terminating, s.ready, s.serving, here, bool(s.zones), zone in s.zones, bool(s.nodes),
                NODE in s.nodes)  # fmt: skip

    for part in parts:
        if part.v4 != v4:
            continue
        for target in part.ports:
            if (target.name, target.proto) != (port.name, port.proto):
                continue
            for e in part.endpoints:
                seen = look(e, (e.addr, target.port, port.proto), service, part)
                known = found.get(seen.backend)
                if known is None or goodness(seen) > goodness(known):
                    found[seen.backend] = seen
                weights[seen.backend] = max(weights.get(seen.backend, 0), part.weight)
    return list(found.values()), weights


def look(e: Endpoint, backend: BackendKey, service: Service, part: EndpointSlice) -> Seen:
    drained = part.weight == 0
    ready = (e.ready or service.publish_not_ready) and not drained
    return Seen(backend, ready, e.serving and not drained, e.terminating, e.node, e.zones, e.nodes)


def serving(endpoints: list[Seen], world: World, local: bool) -> tuple[set[BackendKey], bool]:
    """Those that take new connections, and whether any of the cluster does."""
    zone = dict(world.node.labels).get("topology.kubernetes.io/zone", "")
    ready = [s for s in endpoints if s.ready]
    leaving = [s for s in endpoints if not s.ready and s.serving and s.terminating]
    anywhere = bool(ready or leaving)
    if local:
        ready, leaving = [s for s in ready if s.node == NODE], [s for s in leaving if s.node == NODE]
    elif ready and all(s.nodes for s in ready) and any(NODE in s.nodes for s in ready):
        ready = [s for s in ready if NODE in s.nodes]
    elif ready and all(s.zones for s in ready) and any(zone in s.zones for s in ready):
        ready = [s for s in ready if zone in s.zones]
    return {s.backend for s in ready or leaving}, anywhere


# --- frontends ---------------------------------------------------------------------------------------------------


def exposed(world: World, key: ServiceKey) -> bool:
    service, _ = world.services[key]
    return service.nodes is None or service.nodes(dict(world.node.labels))


def offers(world: World, key: ServiceKey) -> dict[FrontendKey, tuple[str, ServicePort]]:
    """The frontends of a service for clients anywhere, each with its kind and port."""
    service, _ = world.services[key]
    found: dict[FrontendKey, tuple[str, ServicePort]] = {}
    if not exposed(world, key):
        return found
    by_number: dict[tuple[int, int], ServicePort] = {}
    for port in service.ports:
        by_number.setdefault((port.port, port.proto), port)
    for port in service.ports:
        first = by_number[port.port, port.proto]
        for addr in service.cluster_ips if service.serves_cluster_ip else ():
            found.setdefault(FrontendKey(addr, port.port, port.proto), ("cluster", first))
        for v4 in {is_v4(addr) for addr in service.cluster_ips}:
            anywhere = front.UNSPECIFIED[v4]
            if port.node_port:
                found.setdefault(FrontendKey(anywhere, port.node_port, port.proto), ("node", first))
            for addr in service.load_balancer_ips:
                if is_v4(addr) == v4:
                    found.setdefault(FrontendKey(addr, port.port, port.proto), ("balancer", first))
            for addr in service.external_ips:
                if is_v4(addr) == v4:
                    found.setdefault(FrontendKey(addr, port.port, port.proto), ("external", first))
    return found


def owners(world: World) -> dict[FrontendKey, Owner]:
    """Who has each frontend: the first in the order of ranks, of how the address was come by, and of names."""
    claims: dict[FrontendKey, list[tuple[int, int, Owner]]] = {}
    trust = {"cluster": 0, "node": 0, "balancer": 2, "external": 3}
    for key in world.services:
        for frontend, (kind, _) in offers(world, key).items():
            owner = Owner(SERVICE_RANK, "service", *key)
            claims.setdefault(frontend, []).append((SERVICE_RANK, trust[kind], owner))
    for owner, extras in world.extras.items():
        for frontend in {f for extra in extras for f in extra.frontends}:
            claims.setdefault(frontend, []).append((owner.rank, 0, owner))
    return {frontend: min(found)[2] for frontend, found in claims.items()}


def reference(world: World) -> tuple[dict[FrontendKey, Lead], set[BackendKey]]:
    """Where every frontend leads, and the backends that must be known."""
    leads: dict[FrontendKey, Lead] = {}
    known: set[BackendKey] = set()
    won = owners(world)
    for key in world.services:
        mine = Owner(SERVICE_RANK, "service", *key)
        for frontend, (kind, port) in offers(world, key).items():
            if won[frontend] == mine:
                for scope, lead in service_leads(world, key, frontend, kind, port):
                    leads[FrontendKey(frontend.addr, frontend.port, frontend.proto, scope)] = lead
                known |= {s.backend for s in listed(world, key, port, is_v4(frontend.addr))[0]}
    for owner, extras in world.extras.items():
        for number, extra in enumerate(extras):
            for frontend in extra.frontends:
                first = next(i for i, e in enumerate(extras) if frontend in e.frontends)
                if won[frontend] == owner and first == number:
                    leads[frontend] = Lead(frozenset(extra.backends), extra.flags, group=(owner, number))
                    known |= set(extra.backends)
    leads |= addresses(world)
    return leads, known


def service_leads(
    world: World, key: ServiceKey, frontend: FrontendKey, kind: str, port: ServicePort
) -> Iterable[tuple[int, Lead]]:
    service, _ = world.services[key]
    v4 = is_v4(frontend.addr)
    outside = kind != "cluster"
    local = service.external_local if outside else service.internal_local
    flags, ranges = kind_flags(world, service, kind, port, v4)
    for scope in (0, 1) if outside and local else (0,):
        endpoints, weights = listed(world, key, port, v4)
        found, anywhere = serving(endpoints, world, local and not scope)
        more = 0
        if outside and local and not scope:
            more |= front.TWO_SCOPES
        if local and not scope and not found and anywhere:
            more |= front.SILENT
        weighted = {b: w for b, w in weights.items() if w not in (0, 100)}
        if weighted:
            more |= front.TABLE
        if service.affinity_seconds:
            more |= front.AFFINITY
        hidden = front.DIRECT_RETURN if scope else 0
        row_flags = (flags | more) & ~hidden
        table = frozenset((b, weighted.get(b, 100)) for b in found) if row_flags & front.TABLE else frozenset()
        yield scope, Lead(
            frozenset(found), row_flags, service.affinity_seconds,
            ranges if row_flags & front.SOURCE_RANGES else frozenset(), table,
            (key, port.port, port.proto, v4, local and not scope),
        )  # fmt: skip


def kind_flags(world: World, service: Service, kind: str, port: ServicePort, v4: bool) -> tuple[int, frozenset[str]]:
    if kind == "cluster":
        return front.CLUSTER_IP, frozenset()
    flags = front.NODE_PORT if kind == "node" else 0
    forwarding = service.forwarding or world.defaults.forwarding
    if forwarding == "dsr" or (forwarding == "hybrid" and port.proto == 6):
        flags |= front.DIRECT_RETURN
    if (service.algorithm or world.defaults.algorithm) == "maglev":
        flags |= front.TABLE | front.HASH
    ranges = {str(r) for r in service.source_ranges if r.v4 == v4}
    open_to_all = not service.source_deny and ranges & {"0.0.0.0/0", "::/0"}
    if kind != "balancer" or not ranges or open_to_all:
        return flags, frozenset()
    flags |= front.SOURCE_RANGES | (front.SOURCE_DENY if service.source_deny else 0)
    return flags, frozenset(ranges)


def addresses(world: World) -> dict[FrontendKey, Lead]:
    """Rows of whole addresses: cluster IPs and balancers' IPs, unless a node has them."""
    found: dict[bytes, bool] = {}
    for key, (service, _) in world.services.items():
        if exposed(world, key) and service.ports and offers(world, key):
            for addr in service.cluster_ips if service.serves_cluster_ip else ():
                found.setdefault(addr, True)
            for addr in service.load_balancer_ips:
                found[addr] = False
    rows = {}
    for addr, inside in found.items():
        if addr not in world.node.addrs:
            flags = front.ADDRESS | (front.CLUSTER_IP if inside else 0)
            rows[FrontendKey(addr, 0, 0)] = Lead(frozenset(), flags, group=("address", unpack(addr)))
    return rows


# --- what the datapath makes of rows -----------------------------------------------------------------------------


def resolve(rows: Mapping[str, Mapping[Any, Any]]) -> dict[FrontendKey, Lead]:
    """Where every frontend leads by the rows. Fails on a row that is missing, double or nobody's."""
    leads: dict[FrontendKey, Lead] = {}
    slots: set[SlotKey] = set()
    members: set[MemberKey] = set()
    ranges: set[Any] = set()
    tables: set[int] = set()
    for frontend, row in rows[FRONTENDS].items():
        keys = [SlotKey(row.service, slot) for slot in range(row.count)]
        slots |= set(keys)
        numbers = [rows[SLOTS][key] for key in keys]
        found = [rows[BACKENDS][number] for number in numbers]
        backends = [(b.addr, b.port, b.proto) for b in found]
        assert len(set(backends)) == len(backends)
        assert all(b.proto == frontend.proto and is_v4(b.addr) == is_v4(frontend.addr) for b in found)
        admitted: frozenset[str] = frozenset()
        if row.flags & front.AFFINITY:
            members |= {MemberKey(row.service, number) for number in numbers}
        if row.flags & front.SOURCE_RANGES:
            mine = [key for key in rows[RANGES] if key.service == row.service]
            ranges |= set(mine)
            admitted = frozenset(range_text(key) for key in mine)
        weights: frozenset[tuple[BackendKey, int]] = frozenset()
        if row.flags & front.TABLE:
            tables.add(row.service)
            named = {n: (b.addr, b.port, b.proto) for n, b in rows[BACKENDS].items()}
            weights = frozenset((named[n], w) for n, w in rows[TABLES][row.service].backends)
        leads[frontend] = Lead(frozenset(backends), row.flags, row.affinity_seconds, admitted, weights, row.service)
    assert slots == rows[SLOTS].keys()
    assert members == rows[MEMBERS].keys()
    assert ranges == rows[RANGES].keys()
    assert tables == rows[TABLES].keys()
    return leads


def range_text(key: Any) -> str:
    return str(Prefix(key.addr, key.prefixlen - 32))


def same(found: dict[FrontendKey, Lead], wanted: dict[FrontendKey, Lead]) -> None:
    """The same but for the names of the groups, which must be one to one."""

    def bare(leads: dict[FrontendKey, Lead]) -> dict[FrontendKey, Lead]:
        return {k: Lead(v.backends, v.flags, v.affinity, v.ranges, v.weights) for k, v in leads.items()}

    one, other = bare(found), bare(wanted)
    differing = [(k, one.get(k), other.get(k)) for k in one.keys() | other.keys() if one.get(k) != other.get(k)]
    assert not differing, "\n".join(f"{k}: found {a}, wanted {b}" for k, a, b in differing)
    pairs = {(found[k].group, wanted[k].group) for k in found if not found[k].flags & front.ADDRESS}
    assert len(pairs) == len({number for number, _ in pairs}) == len({group for _, group in pairs})
