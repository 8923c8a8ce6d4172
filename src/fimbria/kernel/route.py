"""Routes over rtnetlink (include/uapi/linux/rtnetlink.h). Packed addresses."""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from enum import IntEnum

from fimbria.kernel.netlink import (
    CREATE,
    EXCL,
    REPLACE,
    U16,
    U32,
    NetlinkError,
    NetlinkSocket,
    Request,
    WireError,
    attr,
    attr_u32,
    attrs,
    nest,
    number,
)

RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26

_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_RTNEXTHOP = struct.Struct("=HBBi")  # length, flags, hops, ifindex
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_METRICS, _RTA_MULTIPATH = 1, 4, 5, 6, 7, 8, 9
_RTA_TABLE, _RTA_VIA = 15, 18
_RTAX_MTU = 2
_RTNH_F_ONLINK = 4
_RTM_F_CLONED = 0x200

FAMILIES = {4: int(socket.AF_INET), 16: int(socket.AF_INET6)}
WIDTHS = {family: width for width, family in FAMILIES.items()}


class RouteType(IntEnum):
    """rtm_type."""

    UNICAST = 1
    LOCAL = 2
    BROADCAST = 3
    ANYCAST = 4
    MULTICAST = 5
    BLACKHOLE = 6
    UNREACHABLE = 7
    PROHIBIT = 8
    THROW = 9


class Table(IntEnum):
    """The tables every namespace has."""

    DEFAULT = 253
    MAIN = 254
    LOCAL = 255


class Scope(IntEnum):
    """rtm_scope; IPv6 knows only UNIVERSE."""

    UNIVERSE = 0
    LINK = 253
    HOST = 254
    NOWHERE = 255


_NO_DEVICE = frozenset({RouteType.BLACKHOLE, RouteType.UNREACHABLE, RouteType.PROHIBIT, RouteType.THROW})


@dataclass(frozen=True, slots=True)
class NextHop:
    """One leg of a multipath route; `weight` from 1 to 256."""

    oif: int = 0
    gateway: bytes = b""
    weight: int = 1
    onlink: bool = False


@dataclass(frozen=True, slots=True)
class Route:
    """One route. `dst` has 4 or 16 bytes and decides the family; the default route is zeros with `prefix_len` 0.

    `gateway` and `src` are empty when absent, and a gateway of the other family is possible for IPv4. With `nexthops`,
    `oif` and `gateway` stay empty. IPv6 turns `metric` 0 into 1024, which is what a dump shows. Routes that lead
    nowhere always read as `oif` 0, though IPv6 reports the loopback device.
    """

    dst: bytes
    prefix_len: int
    oif: int = 0
    gateway: bytes = b""
    type: int = 1
    table: int = 254
    protocol: int = 4
    scope: int = 0
    metric: int = 0
    src: bytes = b""
    mtu: int = 0
    onlink: bool = False
    nexthops: tuple[NextHop, ...] = ()

    def __str__(self) -> str:
        kind = "" if self.type == RouteType.UNICAST else f"{_type_name(self.type)} "
        via = f" via {show(self.gateway)}" if self.gateway else ""
        dev = f" dev {self.oif}" if self.oif else ""
        return f"{kind}{show(self.dst)}/{self.prefix_len}{via}{dev} table {self.table}"


def _type_name(value: int) -> str:
    return RouteType(value).name.lower() if value in RouteType.__members__.values() else f"type {value}"


def show(address: bytes) -> str:
    """A packed address as text."""
    family = FAMILIES.get(len(address))
    return socket.inet_ntop(family, address) if family else address.hex()


def family_of(address: bytes, what: str) -> int:
    """The address family of a packed address. Raises ValueError naming `what`."""
    try:
        return FAMILIES[len(address)]
    except KeyError:
        raise ValueError(f"{what}: an address has 4 or 16 bytes, not {len(address)}") from None


def _gateway(family: int, gateway: bytes, what: str) -> bytes:
    other = family_of(gateway, what)
    if other == family:
        return attr(_RTA_GATEWAY, gateway)
    return attr(_RTA_VIA, U16.pack(other) + gateway)


def _nexthop(family: int, hop: NextHop, what: str) -> bytes:
    inner = _gateway(family, hop.gateway, what) if hop.gateway else b""
    flags = _RTNH_F_ONLINK if hop.onlink else 0
    return _RTNEXTHOP.pack(8 + len(inner), flags, hop.weight - 1, hop.oif) + inner


def route_body(route: Route) -> bytes:
    """The wire form of a route. Raises ValueError for values that no route can have."""
    family = FAMILIES.get(len(route.dst)) or family_of(route.dst, "route")
    if not 0 <= route.prefix_len <= 8 * len(route.dst):
        raise ValueError(f"route {route}: impossible prefix length")
    small = route.table if route.table < 256 else 0
    flags = _RTNH_F_ONLINK if route.onlink else 0
    parts = [
        _RTMSG.pack(family, route.prefix_len, 0, 0, small, route.protocol, route.scope, route.type, flags),
        attr_u32(_RTA_TABLE, route.table),
    ]
    if route.prefix_len:
        parts.append(attr(_RTA_DST, route.dst))
    if route.oif:
        parts.append(attr_u32(_RTA_OIF, route.oif))
    if route.gateway:
        parts.append(_gateway(family, route.gateway, f"route {route}"))
    if route.metric:
        parts.append(attr_u32(_RTA_PRIORITY, route.metric))
    if route.src:
        parts.append(attr(_RTA_PREFSRC, route.src))
    if route.mtu:
        parts.append(nest(_RTA_METRICS, attr_u32(_RTAX_MTU, route.mtu)))
    if route.nexthops:
        parts.append(attr(_RTA_MULTIPATH, b"".join(_nexthop(family, h, f"route {route}") for h in route.nexthops)))
    return b"".join(parts)


def add(route: Route) -> Request:
    """Adds; EEXIST when the same prefix, metric and table are taken."""
    return Request(RTM_NEWROUTE, CREATE | EXCL, route_body(route), f"add route {route}")


def replace(route: Route) -> Request:
    """Adds or replaces the route of the same prefix, metric and table."""
    return Request(RTM_NEWROUTE, CREATE | REPLACE, route_body(route), f"replace route {route}")


def delete(route: Route) -> Request:
    """Deletes the route that matches in all that is given; ESRCH when there is none."""
    return Request(RTM_DELROUTE, 0, route_body(route), f"delete route {route}")


def _hops(family: int, raw: bytes) -> tuple[NextHop, ...]:
    hops, position = [], 0
    while position + 8 <= len(raw):
        length, flags, weight, oif = _RTNEXTHOP.unpack_from(raw, position)
        if length < 8 or position + length > len(raw):
            raise WireError(f"next hop of {length} bytes does not fit at offset {position}")
        found = attrs(raw, position + 8, position + length)
        hops.append(NextHop(oif, _read_gateway(found), weight + 1, bool(flags & _RTNH_F_ONLINK)))
        position += (length + 3) & ~3
    return tuple(hops)


def _read_gateway(found: dict[int, bytes]) -> bytes:
    via = found.get(_RTA_VIA)
    return via[2:] if via else found.get(_RTA_GATEWAY, b"")


def parse_route(data: bytes, start: int, end: int) -> Route | None:
    """The route in an RTM_NEWROUTE or RTM_DELROUTE body; None for other families and clones. Raises WireError."""
    if end - start < _RTMSG.size:
        raise WireError("route message too short")
    family, dst_len, _src, _tos, table, protocol, scope, kind, flags = _RTMSG.unpack_from(data, start)
    width = WIDTHS.get(family)
    if width is None or flags & _RTM_F_CLONED:
        return None
    found = attrs(data, start + 12, end)
    get = found.get
    dst = get(_RTA_DST) or bytes(width)
    if len(dst) != width:
        raise WireError(f"route to an address of {len(dst)} bytes")
    oif, metric, wide = get(_RTA_OIF), get(_RTA_PRIORITY), get(_RTA_TABLE)
    metrics, multipath = get(_RTA_METRICS), get(_RTA_MULTIPATH)
    return Route(
        dst,
        dst_len,
        number(oif) if oif and kind not in _NO_DEVICE else 0,
        _read_gateway(found),
        kind,
        number(wide) if wide else table,
        protocol,
        scope,
        number(metric) if metric else 0,
        get(_RTA_PREFSRC, b""),
        number(attrs(metrics, 0, len(metrics)).get(_RTAX_MTU)) if metrics else 0,
        bool(flags & _RTNH_F_ONLINK),
        _hops(family, multipath) if multipath else (),
    )


def dump(sock: NetlinkSocket, family: int, *, table: int | None = None, protocol: int = 0, oif: int = 0) -> list[Route]:
    """The routes of one family (AF_INET, AF_INET6), filtered in the kernel. A table that doesn't exist is empty.

    Raises NetlinkError.
    """
    body = _RTMSG.pack(family, 0, 0, 0, 0, protocol, 0, 0, 0)
    body += attr_u32(_RTA_TABLE, table) if table is not None else b""
    body += attr_u32(_RTA_OIF, oif) if oif else b""
    try:
        messages = sock.dump(Request(RTM_GETROUTE, 0, body, "dump routes"))
    except NetlinkError as e:
        if e.errno == errno.ENOENT and table is not None:
            return []
        raise
    routes = (parse_route(m.data, m.start, m.end) for m in messages if m.type == RTM_NEWROUTE)
    return [r for r in routes if r is not None]


def lookup(sock: NetlinkSocket, dst: bytes, *, src: bytes = b"", oif: int = 0, mark: int = 0) -> Route | None:
    """The route a packet would take; None when there is none. Raises NetlinkError."""
    family = family_of(dst, "look-up")
    body = _RTMSG.pack(family, 8 * len(dst), 8 * len(src), 0, 0, 0, 0, 0, 0) + attr(_RTA_DST, dst)
    body += attr(2, src) if src else b""
    body += attr_u32(_RTA_OIF, oif) if oif else b""
    body += attr_u32(16, mark) if mark else b""
    try:
        messages = sock.query(Request(RTM_GETROUTE, 0, body, f"look up {show(dst)}"))
    except NetlinkError as e:
        if e.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
            return None
        raise
    for m in messages:
        # The answer always is a clone of the entry that matched.
        flags = U32.unpack_from(m.data, m.start + 8)[0] & ~_RTM_F_CLONED
        data = m.data[: m.start + 8] + U32.pack(flags) + m.data[m.start + 12 :]
        return parse_route(data, m.start, m.end)
    return None
