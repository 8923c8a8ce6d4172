"""The agent's state as plain JSON-shaped values, for the local API. Nothing here changes anything."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from fimbria.agent.datapath import map_codecs
from fimbria.apply.attach import DeviceHook
from fimbria.compute import service_frontends as front
from fimbria.compute.service import SERVICE, Description, ServiceCompute
from fimbria.kernel.maps import Map, MapType
from fimbria.kernel.sweep import Sweep, count
from fimbria.model.address import Prefix, is_v4, pack, unpack
from fimbria.model.identity import RESERVED_LABELS
from fimbria.model.policy import Direction
from fimbria.model.protocol import protocol_name
from fimbria.model.rows import NO_ADDR, Backend, Frontend, FrontendKey, PrefixKey, Remote, SlotKey
from fimbria.model.service import ServiceKey
from fimbria.observe.names import drop_reason_name, enum_names
from fimbria.release import RELEASE

if TYPE_CHECKING:
    from fimbria.agent.main import Agent

Row = dict[str, Any]
DIRECTIONS: Final = ("ingress", "egress")
_NOT_DROPS: Final = {0: "FORWARDED", 1: "EVENT_LOST"}
_REMOTE_FLAGS: Final = {1: "pod", 2: "node", 4: "tunnel", 8: "no-masquerade"}


def status(agent: Agent) -> Row:
    """Health at a glance."""
    agent.sources.forget_gone()
    disconnected = {i.resource.plural: i.error for i in agent.sources.informers if not i.connected}
    node = agent.tables.nodes.get(agent.config.node_name)
    return {
        "node": agent.config.node_name,
        "version": RELEASE,
        "kernel": os.uname().release,
        "pid": os.getpid(),
        "ready": agent.ready.is_set(),
        "ready_after_seconds": round(agent.ready_after, 3),
        "uptime_seconds": round(time.time() - agent.started, 1),
        "api_server": {"server": agent.client.config.server, "connected": not disconnected, "errors": disconnected},
        "routing": agent.config.routing,
        "attach": agent.attach,
        "fast_path": agent.config.fast_path,
        "masquerade": agent.config.masquerade,
        "devices": asdict(agent.devices) if agent.devices else None,
        "pod_cidrs": [str(c) for c in node.pod_cidrs] if node else [],
        "ipam": {
            family: {
                "used": sum(1 for a in agent.pool.owners if v4 == is_v4(a)),
                "capacity": agent.pool.capacity(v4=v4),
            }
            for family, v4 in (("ipv4", True), ("ipv6", False))
        },
        "node_problem": node.problem if node else "",
        "endpoints": len(agent.tables.endpoints),
        "unmanaged": unmanaged(agent),
        "identities": len(agent.tables.identities),
        "policies": sum(len(t) for t in policy_tables(agent)),
        "nodes": len(agent.tables.nodes),
        "services": len(agent.tables.services),
        "rows": {s.rows.name: len(s.rows.desired) for s in agent.loop.stages},
        "pressure": _pressure(agent),
        "failures": {k: [str(r) for r in v.values()] for k, v in agent.loop.failures().items()},
        "repaired": {s.rows.name: s.repaired for s in agent.loop.stages if s.repaired},
        "policy_problems": {str(p): [str(x) for x in found] for p, found in agent.sources.problems.items() if found},
        "not_as_asked": {who: list(found) for who, found in agent.engine.local.problems.items()}
        | {who: [text] for who, text in (agent.health.problems if agent.health else {}).items()},
        "foreign_programs": foreign(agent),
    }


def unmanaged(agent: Agent) -> list[str]:
    """Pods of this node that have an address, but none of ours: another plugin started them, or their attachment was
    lost. Policies don't apply to them, and to the others they are nobody."""
    of = agent.tables.endpoints.by
    pods = agent.tables.pods.values()
    return sorted(
        f"{p.namespace}/{p.name}"
        for p in pods
        if p.addrs and not p.host_network and not of("pod", (p.namespace, p.name))
    )


def _pressure(agent: Agent) -> dict[str, Row]:
    """How full each table is, and the source ports towards the destination that has most in use."""
    found: dict[str, Row] = {n: {"used": u, "room": r} for n, (u, r) in agent.learned.pressure().items()}
    used, room, fullest = agent.learned.ports
    return found | ({"nat ports": {"used": used, "room": room, "fullest": fullest}} if room else {})


def foreign(agent: Agent) -> dict[str, list[str]]:
    """Programs of others at the hooks we use."""
    links = next((s.target for s in agent.loop.stages if s.rows.name == "device_links"), None)
    found: dict[str, list[str]] = {}
    # Metrics ask in a thread: a copy is made in one step, walking the dict would not be.
    for hook in tuple(agent.rows.device_links.desired) if links is not None else ():
        assert isinstance(hook, DeviceHook)
        try:
            others = links.foreign(hook)  # type: ignore[union-attr]
        except OSError:
            continue
        if others:
            found[str(hook)] = others
    return found


def nodes(agent: Agent) -> list[Row]:
    """All nodes of the cluster."""
    return [
        {
            "name": n.name,
            "local": n.name == agent.config.node_name,
            "addresses": [unpack(a) for a in n.addrs],
            "routers": [unpack(a) for a in n.routers],
            "pod_cidrs": [str(c) for c in n.pod_cidrs],
            "problem": n.problem,
        }
        for n in sorted(agent.tables.nodes.values(), key=lambda n: n.name)
    ]


def endpoints(agent: Agent) -> list[Row]:
    """Pods of this node."""
    return [_endpoint(agent, i) for i in sorted(agent.tables.endpoints)]


def _endpoint(agent: Agent, endpoint_id: int) -> Row:
    e = agent.tables.endpoints[endpoint_id]
    decided = agent.tables.endpoint_identities.get(endpoint_id)
    row = agent.rows.endpoints.desired.get(e.ifindex)
    policies = {d: [] for d in DIRECTIONS} if row is None else _enforced(agent, endpoint_id)
    return {
        "id": e.id,
        "pod": e.pod,
        "namespace": e.namespace,
        "container_id": e.container_id,
        "interface": e.host_ifname,
        "ifindex": e.ifindex,
        "ipv4": unpack(e.addr4),
        "ipv6": unpack(e.addr6),
        "mac": e.pod_mac.hex(":"),
        "host_ports": [str(p) for p in e.host_ports],
        "identity": decided.number if decided else 0,
        "labels": sorted(f"{k}={v}" for k, v in decided.labels.items()) if decided else [],
        "policy_set": row.policy_set if row else 0,
        "enforced_by": policies,
        "failure": agent.loop.failure("endpoints", e.ifindex) or "",
    }


def _enforced(agent: Agent, endpoint_id: int) -> dict[str, list[str]]:
    return {d.name.lower(): [str(p) for p in agent.engine.policy.denying(str(endpoint_id), d)] for d in Direction}


def identities(agent: Agent) -> list[Row]:
    """All identities of the cluster, reserved ones included."""
    rows = [{"id": int(n), "labels": sorted(_texts(labels.items()))} for n, labels in RESERVED_LABELS.items()]
    return rows + [
        {"id": n, "labels": sorted(_texts(i.labels.items()))} for n, i in sorted(agent.tables.identities.items())
    ]


def ipcache(agent: Agent) -> list[Row]:
    """Who owns an address, as wanted."""
    rows = sorted(agent.rows.ipcache.desired.items(), key=lambda r: (r[0].addr, r[0].prefixlen))
    return [ipcache_row(key, row) for key, row in rows]


def ipcache_row(key: PrefixKey, row: Remote) -> Row:
    """One prefix."""
    return {
        "prefix": str(Prefix(key.addr, key.prefixlen)),
        "identity": row.identity,
        "tunnel": unpack(row.tunnel),
        "flags": [name for bit, name in _REMOTE_FLAGS.items() if row.flags & bit],
    }


def services(agent: Agent) -> list[Row]:
    """Frontends with their backends; a service that has none, but something to say about it, is a row without one."""
    compute = agent.engine.services
    backends, slots = agent.rows.backends.desired, agent.rows.service_slots.desired
    found = []
    for key, row in agent.rows.frontends.desired.items():
        about = compute.describe(key)
        if about is not None:
            ids = (slots.get(SlotKey(row.service, slot)) for slot in range(row.count))
            found.append(
                _frontend(compute, key, row, about) | {"backends": _backends(b and backends.get(b) for b in ids)}
            )
    for name in compute.unserved():
        found.append(_unserved(compute, name))
    return sorted(found, key=lambda r: (r["service"], r["frontend"], r["scope"]))


def _frontend(compute: ServiceCompute, key: FrontendKey, row: Frontend, about: Description) -> Row:
    owner, flags = about.owner, row.flags
    name = f"{owner.namespace}/{owner.name}"
    outside = not flags & front.CLUSTER_IP and not key.scope
    return {
        "id": row.service,
        "service": name,
        "owner": str(owner),
        "port": about.port.name,
        "frontend": addr_port(key.addr, key.port),
        "protocol": protocol_name(key.proto),
        "type": about.kind,
        # Whom this row is for: frontends with externalTrafficPolicy Local have two, others one for everybody.
        "scope": "inside" if key.scope else "outside" if flags & front.TWO_SCOPES else "all",
        "policy": "Local" if about.local else "Cluster",
        "affinity_seconds": row.affinity_seconds if flags & front.AFFINITY else 0,
        "forwarding": ("dsr" if flags & front.DIRECT_RETURN else "snat") if outside else "",
        "algorithm": "maglev" if flags & front.HASH else "weighted" if flags & front.TABLE else "random",
        "source_ranges": sorted(map(str, about.ranges)) if flags & front.SOURCE_RANGES else [],
        "source_policy": ("deny" if flags & front.SOURCE_DENY else "allow") if flags & front.SOURCE_RANGES else "",
        # What a client gets when there are no backends.
        "without_backends": "drop" if flags & front.SILENT else "refuse",
        "warnings": list(compute.warnings(ServiceKey(owner.namespace, owner.name)) if owner.rank == SERVICE
                         else compute.conflicts(owner)),
    }  # fmt: skip


def _unserved(compute: ServiceCompute, key: ServiceKey) -> Row:
    words = dict.fromkeys(("port", "frontend", "protocol", "type", "scope", "policy", "forwarding", "algorithm",
                           "source_policy", "without_backends"), "")  # fmt: skip
    return words | {"id": 0, "service": str(key), "owner": f"service {key}", "affinity_seconds": 0, "backends": [],
                    "source_ranges": [], "warnings": list(compute.warnings(key))}  # fmt: skip


def _backends(rows: Iterable[Backend | int | None]) -> list[str]:
    return sorted(addr_port(b.addr, b.port) for b in rows if isinstance(b, Backend))


def policies(agent: Agent) -> list[Row]:
    """Policies known here, what is wrong with them, and which local pods they select."""
    selected: dict[str, set[str]] = {}
    for endpoint_id, e in agent.tables.endpoints.items():
        if agent.tables.endpoint_identities.get(endpoint_id) is None:
            continue
        for names in _enforced(agent, endpoint_id).values():
            for name in names:
                selected.setdefault(name, set()).add(e.label)
    rows = []
    for table in policy_tables(agent):
        for policy in table.values():
            problems = agent.sources.problems.get(policy.id, ())
            name = str(policy.id)
            rows.append(
                {
                    "kind": policy.id.kind,
                    "namespace": policy.id.namespace,
                    "name": policy.id.name,
                    "rules": sum(len(s.rules) for s in policy.specs),
                    "selects": sorted(selected.get(name, ())),
                    "problems": [str(p) for p in problems],
                }
            )
    return rows


def maps(agent: Agent) -> list[Row]:
    """The datapath's maps, how many rows the agent wants in each, and how many there are where others write too."""
    wanted = {s.rows.name: len(s.rows.desired) for s in agent.loop.stages}
    return [
        {
            "name": name,
            "id": m.info.id,
            "type": m.info.type,
            "key_size": m.key_size,
            "value_size": m.value_size,
            "max_entries": m.max_entries,
            "wanted": wanted.get(name),
            "entries": _entries(m) if name not in wanted else None,
        }
        for name, m in sorted(agent.datapath.maps.items())
    ]


def _entries(bpf_map: Map) -> int | None:
    """Rows in the kernel now; None for what has no rows (ring buffers), or always the same number (arrays)."""
    if bpf_map.type == MapType.LPM_TRIE:
        return len(bpf_map.dump()[0]) // bpf_map.key_size
    return count(bpf_map) if bpf_map.type in (MapType.HASH, MapType.LRU_HASH) else None


def map_rows(agent: Agent, name: str, most: int = 0) -> list[Row]:
    """Every row of a map, or as many as `most`, read from the kernel. Raises KeyError for an unknown map."""
    bpf_map = agent.datapath.maps[name]
    if name == "policy_sets":
        target = next(s.target for s in agent.loop.stages if s.rows.name == name)
        rows = (
            {"set": number, "key": asdict(k), "entry": asdict(v)}
            for number, content in sorted(target.read().items())
            for k, v in content.items()
        )
        return list(islice(rows, most or None))
    if name == "metrics":
        return metrics_rows(agent)
    if name == "service_tables":
        return _table_rows(agent)
    codecs = map_codecs(agent.layouts).get(name)
    if codecs is None:
        items = islice(bpf_map.items(), most or None) if bpf_map.key_size else ()
        return [{"key": k.hex(), "value": v.hex()} for k, v in items]
    keys, values = _entries_of(bpf_map, most)
    pairs = zip(codecs[0].decode_many(keys), codecs[1].decode_many(values), strict=True)
    return [{"key": _shown(k), "value": _with_names(name, _shown(v))} for k, v in pairs]


def _entries_of(bpf_map: Map, most: int) -> tuple[bytes, bytes]:
    """Keys and values, packed; with `most` only so many, and of tables that traffic fills no more are even read."""
    if most and bpf_map.type in (MapType.HASH, MapType.LRU_HASH):
        sweep = Sweep(bpf_map, most)
        sweep.step()
        rows = [sweep.row(i) for i in range(min(most, sweep.count))]
        return b"".join(k for k, _ in rows), b"".join(v for _, v in rows)
    keys, values = bpf_map.dump()
    ends = (most * bpf_map.key_size, most * bpf_map.value_size) if most else (None, None)
    return keys[: ends[0]], values[: ends[1]]


_FLAGS: Final = {  # map -> enumeration of its rows' flags, and what its names begin with
    "endpoints": ("endpoint_flag", "ENDPOINT_"), "ipcache": ("remote_flag", "REMOTE_"),
    "frontends": ("frontend_flag", "FRONTEND_"), "conntrack": ("ct_flag", "CT_"), "nat": ("nat_flag", "NAT_"),
}  # fmt: skip


def _with_names(bpf_map: str, value: Any) -> Any:
    """A row with its flags also as words."""
    if bpf_map not in _FLAGS:
        return value
    names = enum_names(*_FLAGS[bpf_map]).items()
    words = (name.lower().replace("_", "-") for bit, name in sorted(names) if value["flags"] & bit)
    return value | {"flags_set": ",".join(words)}


def _table_rows(agent: Agent) -> list[Row]:
    """Who shares each Maglev table, by entries. Equal digests on two nodes: equal choices for equal connections."""
    target = next(s.target for s in agent.loop.stages if s.rows.name == "service_tables")
    names = {n: _backend_name(row) for n, row in list(agent.rows.backends.desired.items())}
    rows = []
    for number, entries in sorted(target.entries().items()):  # type: ignore[attr-defined]
        named = [names.get(backend, f"backend {backend}") for backend in entries]
        digest = hashlib.sha256("\n".join(named).encode()).hexdigest()[:16]
        rows.append({"service": number, "entries": len(named), "backends": Counter(named), "digest": digest})
    return rows


def _backend_name(row: Backend) -> str:
    return f"{addr_port(row.addr, row.port)}/{protocol_name(row.proto)}"


def metrics_rows(agent: Agent) -> list[Row]:
    """Packets and bytes by reason and direction, summed over the CPUs. Reason 0 is forwarded, 1 a lost event."""
    bpf_map, codec = agent.datapath.maps["metrics"], agent.layouts["metric"]
    rows = []
    for key, slot in bpf_map.items():
        reason, direction = divmod(int.from_bytes(key, "little"), 2)
        cpus = [codec.decode(value) for value in bpf_map.split_percpu(slot)]
        packets, size = sum(c.packets for c in cpus), sum(c.bytes for c in cpus)
        if packets:
            named = {"reason": reason, "name": _NOT_DROPS.get(reason) or drop_reason_name(reason)}
            rows.append(named | {"direction": DIRECTIONS[direction], "packets": packets, "bytes": size})
    return rows


def resolve(agent: Agent, wanted: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Names for numbers and addresses. Raises ValueError, TypeError for a malformed request."""
    return {
        "addrs": {a: _who(agent, pack(a)) for a in wanted.get("addrs", ())},
        "identities": {str(n): identity_labels(agent, int(n)) for n in wanted.get("identities", ())},
        "rules": {str(n): rule(agent, int(n)) for n in wanted.get("rules", ())},
        "services": {str(n): _service(agent, int(n)) for n in wanted.get("services", ())},
        "endpoints": {str(n): _local(agent, int(n)) for n in wanted.get("endpoints", ())},
    }


def _who(agent: Agent, addr: bytes) -> Row | None:
    for claim in agent.engine.ipcache.sources(PrefixKey(128, addr)):
        kind, key = claim
        if kind == "local":
            e = agent.tables.endpoints.get(key)
            if e is not None:
                return {"kind": "pod", "namespace": e.namespace, "name": e.pod, "node": agent.config.node_name}
        if kind == "pod":
            return {"kind": "pod", "namespace": key[0], "name": key[1], "node": ""}
        if kind == "node":
            return {"kind": "node", "namespace": "", "name": key, "node": key}
    return None


def identity_labels(agent: Agent, number: int) -> list[str]:
    """Labels behind a number; empty for an unknown one."""
    reserved = RESERVED_LABELS.get(number)
    if reserved is not None:
        return sorted(_texts(reserved.items()))
    known = agent.tables.identities.get(number)
    return sorted(_texts(known.labels.items())) if known else []


def rule(agent: Agent, number: int) -> Row | None:
    """Where a rule is written; None for 0 and for one that is gone."""
    origin = agent.engine.policy.explain(number)
    if origin is None:
        return None
    p = origin.policy
    return {"kind": p.kind, "namespace": p.namespace, "name": p.name, "path": origin.path}


def _service(agent: Agent, number: int) -> Row | None:
    named = agent.engine.services.service_of(number)
    return {"namespace": named[0].namespace, "name": named[0].name, "port": named[1].port} if named else None


def _local(agent: Agent, endpoint_id: int) -> Row | None:
    e = agent.tables.endpoints.get(endpoint_id)
    if e is None:
        return None
    known = agent.tables.endpoint_identities.get(endpoint_id) is not None
    enforced = _enforced(agent, endpoint_id) if known else {}
    return {"namespace": e.namespace, "name": e.pod, "interface": e.host_ifname, "enforced_by": enforced}


def policy_tables(agent: Agent) -> tuple[Any, ...]:
    """The three tables of policies."""
    t = agent.tables
    return t.network_policies, t.cilium_policies, t.clusterwide_policies


def _texts(items: Iterable[tuple[str, str]]) -> Iterable[str]:
    return (f"{k}={v}" if v else k for k, v in items)


def addr_port(addr: bytes, port: int) -> str:
    """`1.2.3.4:80`, `[fd00::1]:80`."""
    text = unpack(addr) or "::"
    return f"[{text}]:{port}" if ":" in text else f"{text}:{port}"


def _shown(value: Any) -> Any:
    if isinstance(value, bytes):
        return unpack(value) if len(value) == 16 else value.hex(":")
    if isinstance(value, int):
        return value
    if isinstance(value, PrefixKey):
        return {"prefix": str(Prefix(value.addr, value.prefixlen))}
    row: Row = value._asdict() if hasattr(value, "_asdict") else asdict(value)
    return {k: _field(v) for k, v in row.items()}


def _field(value: Any) -> Any:
    if isinstance(value, bytes):
        return "" if value == NO_ADDR else (unpack(value) if len(value) == 16 else value.hex(":"))
    return value
