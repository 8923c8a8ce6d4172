"""One node's datapath for tests: the real objects loaded, and the rows that the agent would write."""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fimbria
from fimbria.kernel.bpf import BpfObject, Map, MapType, Program, RingBuffer, create_map
from fimbria.kernel.btf import Btf, enum_values
from fimbria.kernel.codec import Codec
from fimbria.model import rows

OBJECTS = Path(fimbria.__file__).parent / "_bpf"
LAYOUT = Btf.from_elf(OBJECTS / "layout.bpf.o")
FRONTEND_FLAG = {name.removeprefix("FRONTEND_"): n for name, n in enum_values(LAYOUT, "frontend_flag").items()}
# Small: thousands of test maps are created.
SIZES = {"ipcache": 1024, "conntrack": 4096, "nat": 4096, "frontends": 256, "service_slots": 1024, "backends": 1024,
         "identities": 256, "events": 1 << 18, "fragments": 256}  # fmt: skip
DROP = enum_values(LAYOUT, "drop_reason")
POINT = enum_values(LAYOUT, "trace_point")
EVENT_DROP, EVENT_TRACE, EVENT_VERDICT = 1, 2, 3
INGRESS, EGRESS = 0, 1
READY, ENFORCE_INGRESS, ENFORCE_EGRESS, CIDR_INGRESS, CIDR_EGRESS = 1, 2, 4, 8, 16
POD, NODE, TUNNEL, NO_MASQUERADE = 1, 2, 4, 8
HOST, WORLD, REMOTE_NODE = 1, 2, 6
ALLOCATED, CIDR_SCOPE = 256, 1 << 24
TCX_NEXT, SHOT, REDIRECT = -1, 2, 7

_CODECS = {
    "endpoints": ("endpoint", rows.Endpoint),
    "local_addrs": ("local_addr", rows.LocalAddr),
    "ipcache": ("remote", rows.Remote),
    "cidrs": ("cidr", rows.Cidr),
    "conntrack": ("ct_entry", rows.CtEntry),
    "frontends": ("frontend", rows.Frontend),
    "backends": ("backend", rows.Backend),
    "nat": ("nat_entry", rows.NatEntry),
    "runtime": ("runtime", rows.Runtime),
    "metrics": ("metric", rows.Metric),
}
_KEYS = {
    "ipcache": ("prefix_key", rows.PrefixKey),
    "cidrs": ("prefix_key", rows.PrefixKey),
    "conntrack": ("ct_key", rows.CtKey),
    "frontends": ("frontend_key", rows.FrontendKey),
    "service_slots": ("slot_key", rows.SlotKey),
    "nat": ("nat_key", rows.NatKey),
    "service_exempt": ("exempt_key", rows.ExemptKey),
}
VALUE: dict[str, Codec[Any]] = {name: Codec(LAYOUT, f"struct {s}", cls) for name, (s, cls) in _CODECS.items()}
KEY: dict[str, Codec[Any]] = {name: Codec(LAYOUT, f"struct {s}", cls) for name, (s, cls) in _KEYS.items()}
EVENT = Codec(LAYOUT, "struct event", rows.Event)
POLICY_KEY = Codec(LAYOUT, "struct policy_key", rows.PolicyKey)
POLICY_ENTRY = Codec(LAYOUT, "struct policy_entry", rows.PolicyEntry)


def addr(text: str) -> bytes:
    """The 16 bytes of an address; IPv4 is mapped. An empty text is no address."""
    if not text:
        return bytes(16)
    packed = ipaddress.ip_address(text).packed
    return packed if len(packed) == 16 else bytes(10) + b"\xff\xff" + packed


def show(packed: bytes) -> str:
    if packed[:12] == bytes(10) + b"\xff\xff":
        return str(ipaddress.IPv4Address(packed[12:]))
    return str(ipaddress.IPv6Address(packed))


def prefix(text: str) -> rows.PrefixKey:
    net = ipaddress.ip_network(text)
    return rows.PrefixKey(net.prefixlen + (96 if net.version == 4 else 0), addr(str(net.network_address)))


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


Setting = int | bool | bytes
DEFAULTS: dict[str, Setting] = {
    "cfg_redirect_peer": True,
    "cfg_host_netns": 0,
    "cfg_socket_pods": True,
    "cfg_redirect_neigh": True,
    "cfg_events": True,
    "cfg_trace_interval_ns": 5 * 10**9,
    "cfg_tcp_established_ns": 8 * 3600 * 10**9,
    "cfg_pod_mtu": 1450,
    "cfg_overlay_ifindex": 0,
    "cfg_overlay_port": 8472,
    "cfg_masquerade4": True,
    "cfg_masquerade6": True,
    "cfg_nat_port_min": 61000,
    "cfg_nat_port_max": 65535,
    "cfg_node_addr4": bytes(16),
    "cfg_node_addr6": bytes(16),
    "cfg_router_addr4": bytes(16),
    "cfg_router_addr6": bytes(16),
    "cfg_nodeport_min": 30000,
    "cfg_nodeport_max": 32767,
    "cfg_external_cluster_ip": False,
    "cfg_table_size": 16381,
    "cfg_service_seed": 0,
}


class Datapath:
    """All objects of one node, loaded with shared maps."""

    def __init__(self, config: Mapping[str, Setting] = {}, objects: tuple[str, ...] = ("pod", "overlay", "host"),
                 sizes: Mapping[str, int] = {}, beside: Datapath | None = None) -> None:  # fmt: skip
        """`beside`: another version on the same node, which has tables of its own for what it learns."""
        own = ("conntrack", "nat")
        self.maps: dict[str, Map] = {n: m for n, m in beside.maps.items() if n not in own} if beside else {}
        self._shared = set(self.maps)
        self.programs: dict[str, Program] = {}
        self._ring: RingBuffer | None = None
        for name in objects:
            with BpfObject(OBJECTS / f"{name}.bpf.o") as obj:
                wanted = {**DEFAULTS, **config}
                obj.set_constants({k: v for k, v in wanted.items() if k in obj.constants})
                shared = [n for n, spec in obj.maps.items() if not spec.internal]
                obj.resize({n: s for n, s in {**SIZES, **sizes}.items() if n in shared})
                obj.reuse({n: self.maps[n] for n in shared if n in self.maps})
                obj.load()
                self.maps |= {n: obj.map(n) for n in shared if n not in self.maps}
                self.programs |= {p: obj.program(p) for p in obj.programs}
        self.put("runtime", 0, rows.Runtime(1))

    def close(self) -> None:
        if self._ring:
            self._ring.close()
        own = (m for n, m in self.maps.items() if n not in self._shared)
        for thing in (*self.programs.values(), *own):
            thing.close()

    def look_into(self, *tables: Datapath) -> None:
        """Programs look for connections that their own table doesn't have in these as well."""
        for name in ("conntrack", "nat"):
            others = self.maps[f"{name}_other"]
            for place in range(others.max_entries):
                if place < len(tables):
                    others.update(struct.pack("=I", place), struct.pack("=i", tables[place].maps[name].fd))
                elif others.lookup(struct.pack("=I", place)):
                    others.delete(struct.pack("=I", place))

    def key(self, name: str, key: Any) -> bytes:
        if name in KEY:
            return KEY[name].encode(key)
        return key if isinstance(key, bytes) else struct.pack("=I", key)

    def put(self, name: str, key: Any, value: Any) -> None:
        """Writes a row: dataclasses where the struct has one, numbers and bytes otherwise."""
        raw = VALUE[name].encode(value) if name in VALUE else struct.pack("=I", value)
        self.maps[name].update(self.key(name, key), raw)
        if isinstance(value, (rows.Remote, rows.Endpoint)):
            self.know(value.identity)

    def know(self, identity: int) -> None:
        """As if the compiler had seen it: whoever has an address here is known, unless a test says otherwise."""
        if ALLOCATED <= identity < CIDR_SCOPE:
            self.put("identities", identity, 1)

    def forget(self, identity: int) -> None:
        assert self.maps["identities"].delete(struct.pack("=I", identity))

    def get(self, name: str, key: Any) -> Any:
        raw = self.maps[name].lookup(self.key(name, key))
        return None if raw is None else VALUE[name].decode(raw)

    def items(self, name: str) -> list[tuple[Any, Any]]:
        return [(KEY[name].decode(k), VALUE[name].decode(v)) for k, v in self.maps[name].items()]

    def policy_set(self, number: int, entries: Mapping[rows.PolicyKey, rows.PolicyEntry]) -> None:
        with create_map(MapType.LPM_TRIE, POLICY_KEY.size, POLICY_ENTRY.size, 1024, 1, "policy_set") as inner:
            for key, entry in entries.items():
                inner.update(POLICY_KEY.encode(key), POLICY_ENTRY.encode(entry))
            self.maps["policy_sets"].update(struct.pack("=I", number), struct.pack("=i", inner.fd))

    def endpoint(self, ifindex: int, row: rows.Endpoint) -> None:
        self.put("endpoints", ifindex, row)
        for address in (row.addr4, row.addr6):
            if any(address):
                self.put("local_addrs", address, rows.LocalAddr(ifindex))

    def service(self, number: int, front: str, port: int, proto: int, backends: list[tuple[str, int]]) -> None:
        for slot, (address, backend_port) in enumerate(backends):
            backend = number * 100 + slot
            self.put("backends", backend, rows.Backend(addr(address), backend_port, proto))
            self.put("service_slots", rows.SlotKey(number, slot), backend)
        self.put("frontends", rows.FrontendKey(addr(front), port, proto), rows.Frontend(number, len(backends), 1))

    def events(self) -> list[rows.Event]:
        if self._ring is None:
            self._ring = RingBuffer(self.maps["events"].fd)
        return [EVENT.decode(raw) for raw in self._ring.drain()]

    def metric(self, reason: int, direction: int) -> int:
        """Packets counted so far, over all CPUs."""
        m = self.maps["metrics"]
        slot = m.lookup(struct.pack("=I", reason * 2 + direction)) or b""
        return sum(VALUE["metrics"].decode(v).packets for v in m.split_percpu(slot))

    def clear(self) -> None:
        """Empties every map but the metrics, and what other versions share."""
        for name, m in self.maps.items():
            if name in ("metrics", "events", "runtime", "node_serves", "errors_sent") or name.endswith("_other"):
                continue
            keys, _ = m.dump()
            m.delete_batch(keys, len(keys) // m.key_size)
        self.put("runtime", 0, rows.Runtime(1))
        self.events()
