"""Routes, neighbours and sysctls of the node. Ours are told apart by route protocol 241 and by device."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from fimbria.apply.rows import Delta
from fimbria.kernel import neighbour, route
from fimbria.kernel.netlink import NetlinkSocket
from fimbria.model.address import V4_MAPPED, Prefix, is_v4
from fimbria.model.network import NeighbourKey, Route

PROTOCOL: Final = 241
MAIN_TABLE: Final = 254
_METRIC6: Final = 1024
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_PERMANENT: Final = 0x80
_NOARP: Final = 0x40


def plain(addr: bytes) -> bytes:
    """An address as the kernel's route sockets have it: 4 or 16 bytes; empty stays empty."""
    return addr[12:] if addr and is_v4(addr) else addr


def mapped(addr: bytes) -> bytes:
    """The opposite of `plain`."""
    return V4_MAPPED + addr if len(addr) == 4 else addr


class RouteTarget:
    """Our routes in the main table."""

    name = "routes"

    def __init__(self, netlink: NetlinkSocket) -> None:
        self._netlink = netlink

    def read(self) -> dict[Prefix, Route]:
        """All routes of our protocol."""
        found: dict[Prefix, Route] = {}
        for family in _FAMILIES:
            for r in route.dump(self._netlink, family, table=MAIN_TABLE, protocol=PROTOCOL):
                prefix, row = route_row(r)
                found[prefix] = row
        return found

    def write(self, delta: Delta[Prefix, Route], *, order: str) -> Mapping[Prefix, str]:
        """One batch; a route that is refused is reported."""
        if order == "in":
            rows = list(delta.upserts.items())
            outcome = self._netlink.run([route.replace(_wire(p, r)) for p, r in rows])
            return {p: str(e) for (p, _), e in zip(rows, outcome, strict=True) if e is not None}
        keys = list(delta.deletes)
        # Both shapes: what stands there may be a pod's route or a whole block's.
        requests = [route.delete(_bare(p)) for p in keys]
        outcome = self._netlink.run(requests)
        gone = (3, 2)  # ESRCH, ENOENT
        return {p: str(e) for p, e in zip(keys, outcome, strict=True) if e is not None and e.errno not in gone}


def route_row(r: route.Route) -> tuple[Prefix, Route]:
    """A route of the kernel as a row of ours."""
    length = r.prefix_len + (96 if len(r.dst) == 4 else 0)
    return Prefix(mapped(r.dst), length), Route(r.oif, mapped(r.gateway), mapped(r.src), r.mtu)


def _wire(prefix: Prefix, row: Route) -> route.Route:
    addr = plain(prefix.addr)
    length = prefix.length - (96 if len(addr) == 4 else 0)
    metric = _METRIC6 if len(addr) == 16 else 0
    if not row.ifindex:
        return route.Route(addr, length, type=route.RouteType.UNREACHABLE, protocol=PROTOCOL, metric=metric)
    scope = route.Scope.LINK if len(addr) == 4 and not row.gateway else route.Scope.UNIVERSE
    return route.Route(
        addr, length, oif=row.ifindex, gateway=plain(row.gateway), protocol=PROTOCOL, scope=scope, metric=metric,
        src=plain(row.src), mtu=row.mtu, onlink=bool(row.gateway),
    )  # fmt: skip


def _bare(prefix: Prefix) -> route.Route:
    addr = plain(prefix.addr)
    length = prefix.length - (96 if len(addr) == 4 else 0)
    return route.Route(addr, length, type=0, protocol=PROTOCOL, scope=route.Scope.NOWHERE)


class NeighbourTarget:
    """Permanent neighbours on devices of ours; `devices` lists them."""

    name = "neighbours"

    def __init__(self, netlink: NetlinkSocket, devices: Callable[[], Iterable[int]]) -> None:
        self._netlink = netlink
        self._devices = devices

    def read(self) -> dict[NeighbourKey, bytes]:
        """Permanent entries on our devices; what the kernel learned is its own."""
        devices = set(self._devices())
        return {
            NeighbourKey(n.index, mapped(n.address)): n.mac
            for family in _FAMILIES
            for n in neighbour.dump(self._netlink, family)
            if n.index in devices and n.state & _PERMANENT and n.mac and not _multicast(n.address)
        }

    def write(self, delta: Delta[NeighbourKey, bytes], *, order: str) -> Mapping[NeighbourKey, str]:
        """One batch; an entry whose device is gone needs no deleting."""
        if order == "in":
            rows = list(delta.upserts.items())
            outcome = self._netlink.run(
                [neighbour.replace(neighbour.Neighbour(k.ifindex, plain(k.addr), m, _PERMANENT)) for k, m in rows]
            )
            return {k: str(e) for (k, _), e in zip(rows, outcome, strict=True) if e is not None}
        keys = list(delta.deletes)
        self._netlink.run([neighbour.delete(neighbour.Neighbour(k.ifindex, plain(k.addr), b"")) for k in keys])
        return {}


class NextHopTarget:
    """Neighbours that the kernel keeps resolved: whoever is next on the way to other nodes.

    Ours are managed and of our protocol. Where somebody has put a permanent entry there is nothing to keep, and nothing
    is touched: the row counts as written.
    """

    name = "next_hops"

    def __init__(self, netlink: NetlinkSocket, wanted: Callable[[], Iterable[NeighbourKey]]) -> None:
        """`wanted` lists the rows that are wanted now."""
        self._netlink = netlink
        self._wanted = wanted

    def read(self) -> dict[NeighbourKey, bool]:
        """Those kept resolved by us, and permanent ones that are wanted."""
        wanted = set(self._wanted())
        return {key: True for key, n in self._entries() if _kept(n) or (key in wanted and _fixed(n))}

    def write(self, delta: Delta[NeighbourKey, bool], *, order: str) -> Mapping[NeighbourKey, str]:
        """One batch each. What others put there meanwhile stays."""
        entries = dict(self._entries())
        if order == "in":
            keys = [k for k in delta.upserts if k not in entries or not _fixed(entries[k])]
            requests = [neighbour.replace(_managed(k)) for k in keys]
        else:
            keys = [k for k in delta.deletes if k in entries and _kept(entries[k])]
            requests = [neighbour.delete(_managed(k)) for k in keys]
        outcome = self._netlink.run(requests)
        gone = (2, 19) if order == "out" else ()  # ENOENT, ENODEV
        return {k: str(e) for k, e in zip(keys, outcome, strict=True) if e is not None and e.errno not in gone}

    def _entries(self) -> Iterable[tuple[NeighbourKey, neighbour.Neighbour]]:
        for family in _FAMILIES:
            for n in neighbour.dump(self._netlink, family):
                yield NeighbourKey(n.index, mapped(n.address)), n


def _managed(key: NeighbourKey) -> neighbour.Neighbour:
    return neighbour.Neighbour(
        key.ifindex, plain(key.addr), state=0, extern_learn=True, protocol=PROTOCOL, managed=True
    )  # fmt: skip


def _kept(n: neighbour.Neighbour) -> bool:
    return n.managed and n.protocol == PROTOCOL and not _fixed(n)


def _fixed(n: neighbour.Neighbour) -> bool:
    return bool(n.state & (_PERMANENT | _NOARP))


def _multicast(addr: bytes) -> bool:
    return addr[0] == 0xFF if len(addr) == 16 else addr[0] >> 4 == 0xE


class SysctlTarget:
    """Kernel settings, by their path below /proc/sys. A setting that is no longer wanted is left as it is."""

    name = "sysctls"

    def __init__(self, wanted: Callable[[], Iterable[str]], root: Path = Path("/proc/sys")) -> None:
        self._wanted = wanted
        self._root = root

    def read(self) -> dict[str, str]:
        """The values of the wanted settings; one that doesn't exist is left out."""
        found = {}
        for key in self._wanted():
            try:
                found[key] = (self._root / key).read_text().strip()
            except OSError:
                continue
        return found

    def write(self, delta: Delta[str, str], *, order: str) -> Mapping[str, str]:
        """One file each."""
        failures = {}
        for key in delta.upserts if order == "in" else ():
            try:
                (self._root / key).write_text(delta.upserts[key])
            except OSError as error:
                failures[key] = f"sysctl {key}: {error.strerror}"
        return failures
