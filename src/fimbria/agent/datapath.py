"""Codecs, map targets and constants: how the agent's desired rows and settings reach the programs."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from fimbria.agent.config import AgentConfig, port_range
from fimbria.apply.maps import U32, ManyCodec, MapTarget, Raw
from fimbria.apply.policy_sets import PolicySetsTarget
from fimbria.apply.programs import OBJECTS, Constant, Datapath
from fimbria.apply.service_tables import ServiceTablesTarget
from fimbria.kernel import netns
from fimbria.kernel.btf import Btf
from fimbria.kernel.codec import Codec, layout_hash
from fimbria.kernel.maps import Map
from fimbria.learned import sizing
from fimbria.model import rows
from fimbria.model.address import Prefix, unpack
from fimbria.model.network import DeviceSet
from fimbria.model.rows import NO_ADDR

STRUCTS: dict[str, type[Any]] = {
    "endpoint": rows.Endpoint,
    "local_addr": rows.LocalAddr,
    "prefix_key": rows.PrefixKey,
    "remote": rows.Remote,
    "cidr": rows.Cidr,
    "policy_key": rows.PolicyKey,
    "policy_entry": rows.PolicyEntry,
    "ct_key": rows.CtKey,
    "ct_entry": rows.CtEntry,
    "frontend_key": rows.FrontendKey,
    "frontend": rows.Frontend,
    "slot_key": rows.SlotKey,
    "backend": rows.Backend,
    "member_key": rows.MemberKey,
    "affinity_key": rows.AffinityKey,
    "affinity": rows.Affinity,
    "source_key": rows.SourceKey,
    "exempt_key": rows.ExemptKey,
    "sock_revnat_key": rows.SockRevnatKey,
    "sock_revnat": rows.SockRevnat,
    "nat_key": rows.NatKey,
    "nat_entry": rows.NatEntry,
    "event": rows.Event,
    "metric": rows.Metric,
    "runtime": rows.Runtime,
}


# What each map consists of, apart from plain numbers and addresses. A map whose structs changed is another map.
MAP_STRUCTS: dict[str, tuple[str, ...]] = {
    "endpoints": ("endpoint",),
    "local_addrs": ("local_addr",),
    "ipcache": ("prefix_key", "remote"),
    "cidrs": ("prefix_key", "cidr"),
    "policy_sets": ("policy_key", "policy_entry"),
    "conntrack": ("ct_key", "ct_entry"),
    "conntrack_other": ("ct_key", "ct_entry"),
    "frontends": ("frontend_key", "frontend"),
    "service_slots": ("slot_key",),
    "backends": ("backend",),
    "service_members": ("member_key",),
    "affinity": ("affinity_key", "affinity"),
    "source_ranges": ("source_key",),
    "service_exempt": ("exempt_key",),
    "sock_revnat": ("sock_revnat_key", "sock_revnat"),
    "sock_choices": ("sock_choice_key", "sock_choice"),
    "nat": ("nat_key", "nat_entry"),
    "nat_other": ("nat_key", "nat_entry"),
    "fragments": ("fragment_key", "fragment"),
    "events": ("event",),
    "metrics": ("metric",),
    "runtime": ("runtime",),
}


SCOPE_SERVICE: Final = 1  # enum ct_scope


def objects(config: AgentConfig) -> tuple[str, ...]:
    """The objects that are needed with these settings."""
    return OBJECTS if config.xdp == "disabled" else (*OBJECTS, "xdp")


def objects_folder() -> Path:
    """Where the compiled BPF objects are installed."""
    return Path(str(files("fimbria"))) / "_bpf"


class Layouts:
    """Codecs of all shared structs, bound to the BTF of `layout.bpf.o`."""

    def __init__(self) -> None:
        """Raises LayoutError if a dataclass and its struct differ, OSError if the object isn't there."""
        self.btf = btf = Btf.from_elf((objects_folder() / "layout.bpf.o").read_bytes())
        self._codecs = {name: Codec(btf, f"struct {name}", cls) for name, cls in STRUCTS.items()}
        self._hashes = {name: layout_hash(btf, f"struct {name}") for names in MAP_STRUCTS.values() for name in names}

    def of_map(self, name: str) -> str:
        """A hash of what the map's keys and values look like; the same for every map of plain numbers or addresses."""
        return " ".join(self._hashes[struct] for struct in MAP_STRUCTS.get(name, ()))

    def __getitem__(self, name: str) -> Codec[Any]:
        return self._codecs[name]


def map_codecs(layouts: Layouts) -> dict[str, tuple[ManyCodec[Any], ManyCodec[Any]]]:
    """Key and value codec of every map with plain rows, by map name."""
    return {
        "endpoints": (U32(), layouts["endpoint"]),
        "local_addrs": (Raw(16), layouts["local_addr"]),
        "ipcache": (layouts["prefix_key"], layouts["remote"]),
        "cidrs": (layouts["prefix_key"], layouts["cidr"]),
        "identities": (U32(), U32()),
        "conntrack": (layouts["ct_key"], layouts["ct_entry"]),
        "frontends": (layouts["frontend_key"], layouts["frontend"]),
        "service_slots": (layouts["slot_key"], U32()),
        "backends": (U32(), layouts["backend"]),
        "service_members": (layouts["member_key"], U32()),
        "affinity": (layouts["affinity_key"], layouts["affinity"]),
        "source_ranges": (layouts["source_key"], U32()),
        "service_exempt": (layouts["exempt_key"], U32()),
        "sock_revnat": (layouts["sock_revnat_key"], layouts["sock_revnat"]),
        "nat": (layouts["nat_key"], layouts["nat_entry"]),
        "runtime": (U32(), layouts["runtime"]),
    }


def map_target(name: str, bpf_map: Map, layouts: Layouts) -> MapTarget[Any, Any]:
    """The target of a map all of whose rows are ours."""
    keys, values = map_codecs(layouts)[name]
    return MapTarget(name, bpf_map, keys, values, show_key)


def policy_target(datapath: Datapath, layouts: Layouts) -> PolicySetsTarget:
    """The target of the policy sets."""
    return PolicySetsTarget(datapath.maps["policy_sets"], layouts["policy_key"], layouts["policy_entry"])


def tables_target(
    datapath: Datapath, config: AgentConfig, backend: Callable[[int], rows.Backend | None]
) -> ServiceTablesTarget:
    """The target of the Maglev tables; `backend` gives the desired row of a backend id."""
    return ServiceTablesTarget(datapath.maps["service_tables"], config.maglev_table_size, backend)


def backends_in_use(conntrack: Map, layouts: Layouts) -> set[int]:
    """The backends that connections through services name. 0.2 s for a table of 120,000."""
    keys, values = conntrack.dump()
    codec = layouts["ct_entry"]
    of_services = (at for at, key in enumerate(layouts["ct_key"].decode_many(keys)) if key.scope == SCOPE_SERVICE)
    named = codec.decode_many(b"".join(values[at * codec.size : (at + 1) * codec.size] for at in of_services))
    return {entry.backend for entry in named}


def show_key(key: object) -> str:
    """A map's key for people."""
    if isinstance(key, rows.PrefixKey):
        return f"prefix {Prefix(key.addr, key.prefixlen)}"
    if isinstance(key, rows.FrontendKey):
        return f"frontend {unpack(key.addr)}:{key.port}/{key.proto}"
    if isinstance(key, bytes):
        return f"address {unpack(key)}"
    return f"key {key}"


def machine_memory() -> int:
    """In bytes."""
    pages: int = os.sysconf("SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE")


_NONE: Final[Mapping[str, int]] = MappingProxyType({})


def existing_entries(bpffs: Path) -> dict[str, int]:
    """How large the pinned maps are, the largest of each name."""
    found: dict[str, int] = {}
    for path in (bpffs / "fimbria" / "maps").glob("*-*-*"):
        name, _, size = path.name.rsplit("-", 2)
        if size.isdecimal():
            found[name] = max(found.get(name, 0), int(size))
    return found


def sizes(config: AgentConfig, memory: int = 0, existing: Mapping[str, int] = _NONE) -> dict[str, int]:
    """max_entries of the maps sized by settings, by the machine's memory in bytes, and by the maps that exist."""
    told = {
        "conntrack": config.conntrack_entries, "nat": config.nat_entries, "affinity": config.affinity_entries,
        "sock_revnat": config.socket_entries, "sock_choices": config.socket_entries // 4,
    }  # fmt: skip
    return sizing.entries(told, memory, config.map_memory_ratio, existing) | {
        "ipcache": config.ipcache_entries,
        "frontends": config.service_entries * 2,
        "service_slots": config.service_entries * 4,
        "backends": config.service_entries * 4,
        "service_members": config.service_entries * 2,
        "source_ranges": config.service_entries // 2 or 1,
        "policy_sets": config.policy_sets,
        "identities": config.identity_entries,
    }


def arrays(config: AgentConfig) -> dict[str, int]:
    """Entries of the arrays in maps of arrays."""
    return {"service_tables": config.maglev_table_size}


def constants(
    config: AgentConfig, devices: DeviceSet, node_addrs: tuple[bytes, bytes], routers: tuple[bytes, bytes]
) -> dict[str, Constant]:
    """All `cfg_` constants of the programs; pairs are (IPv4, IPv6), NO_ADDR if absent."""
    first, last = port_range("--masquerade-ports", config.masquerade_ports)
    node_ports = port_range("--node-ports", config.node_ports)
    return {
        "cfg_node_addr4": node_addrs[0],
        "cfg_node_addr6": node_addrs[1],
        "cfg_router_addr4": routers[0],
        "cfg_router_addr6": routers[1],
        "cfg_overlay_ifindex": devices.overlay,
        "cfg_overlay_port": config.overlay_port,
        "cfg_host_ifindex": devices.host,
        "cfg_pod_mtu": devices.pod_mtu,
        "cfg_masquerade4": config.masquerade and node_addrs[0] != NO_ADDR,
        "cfg_masquerade6": config.masquerade and node_addrs[1] != NO_ADDR,
        "cfg_nat_port_min": first,
        "cfg_nat_port_max": last,
        "cfg_nodeport_min": node_ports[0],
        "cfg_nodeport_max": node_ports[1],
        "cfg_external_cluster_ip": config.external_cluster_ip,
        "cfg_service_seed": zlib.crc32(config.cluster_name.encode()),
        "cfg_host_netns": netns.cookie(),
        "cfg_socket_pods": config.socket_services == "all",
        "cfg_table_size": config.maglev_table_size,
        "cfg_redirect_peer": config.fast_path,
        "cfg_redirect_neigh": config.fast_path,
        "cfg_events": True,
        "cfg_trace_interval_ns": int(config.trace_interval * 1e9),
        "cfg_tcp_established_ns": 8 * 3600 * 10**9,
    }
