"""Neighbour entries (ARP, ND) and forwarding entries over rtnetlink (include/uapi/linux/neighbour.h)."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from fimbria.kernel.netlink import (
    CREATE,
    REPLACE,
    NetlinkSocket,
    Request,
    WireError,
    attr,
    attr_u8,
    attr_u32,
    attrs,
    number,
)
from fimbria.kernel.route import FAMILIES, WIDTHS, family_of, show

RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30

_NDMSG = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
_NDA_DST, _NDA_LLADDR, _NDA_IFINDEX, _NDA_PROTOCOL, _NDA_FLAGS_EXT = 1, 2, 8, 12, 15
_NTF_PROXY, _NTF_EXT_LEARNED = 0x08, 0x10
_NTF_EXT_MANAGED = 1 << 0


class NudState(IntEnum):
    """ndm_state."""

    INCOMPLETE = 0x01
    REACHABLE = 0x02
    STALE = 0x04
    DELAY = 0x08
    PROBE = 0x10
    FAILED = 0x20
    NOARP = 0x40
    PERMANENT = 0x80


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Who has an address on a device. `mac` is empty for proxy entries (they answer for others) and unresolved ones.

    `managed` (Linux 5.16): the kernel finds the MAC and keeps it fresh by itself, whether or not it is used; `state` is
    0 when such an entry is made.
    """

    index: int
    address: bytes
    mac: bytes = b""
    state: int = NudState.PERMANENT
    extern_learn: bool = False
    proxy: bool = False
    protocol: int = 0
    managed: bool = False

    def __str__(self) -> str:
        return f"{show(self.address)} on device {self.index}"


def _body(n: Neighbour) -> bytes:
    flags = (_NTF_PROXY if n.proxy else 0) | (_NTF_EXT_LEARNED if n.extern_learn else 0)
    body = _NDMSG.pack(family_of(n.address, "neighbour"), n.index, n.state, flags, 0) + attr(_NDA_DST, n.address)
    if n.mac:
        if len(n.mac) != 6:
            raise ValueError(f"neighbour {n}: a MAC has 6 bytes, not {len(n.mac)}")
        body += attr(_NDA_LLADDR, n.mac)
    if n.managed:
        body += attr_u32(_NDA_FLAGS_EXT, _NTF_EXT_MANAGED)
    return body + (attr_u8(_NDA_PROTOCOL, n.protocol) if n.protocol else b"")


def replace(neighbour: Neighbour) -> Request:
    """Adds or replaces. Raises ValueError for an impossible entry."""
    return Request(RTM_NEWNEIGH, CREATE | REPLACE, _body(neighbour), f"set neighbour {neighbour}")


def delete(neighbour: Neighbour) -> Request:
    """Deletes; ENOENT when there is none."""
    return Request(RTM_DELNEIGH, 0, _body(neighbour), f"delete neighbour {neighbour}")


def parse_neighbour(data: bytes, start: int, end: int) -> Neighbour | None:
    """The entry in an RTM_NEWNEIGH or RTM_DELNEIGH body; None for other families. Raises WireError."""
    if end - start < _NDMSG.size:
        raise WireError("neighbour message too short")
    family, index, state, flags, _kind = _NDMSG.unpack_from(data, start)
    found = attrs(data, start + 12, end)
    address = found.get(_NDA_DST, b"")
    if family not in WIDTHS or FAMILIES.get(len(address)) != family:
        return None
    return Neighbour(
        index, address, found.get(_NDA_LLADDR, b""), state, bool(flags & _NTF_EXT_LEARNED), bool(flags & _NTF_PROXY),
        number(found.get(_NDA_PROTOCOL)), bool(number(found.get(_NDA_FLAGS_EXT)) & _NTF_EXT_MANAGED),
    )  # fmt: skip


def dump(sock: NetlinkSocket, family: int, *, index: int = 0, proxy: bool = False) -> list[Neighbour]:
    """The entries of one family, or the proxy entries, filtered by device in the kernel. Raises NetlinkError."""
    body = _NDMSG.pack(family, 0, 0, _NTF_PROXY if proxy else 0, 0) + (attr_u32(_NDA_IFINDEX, index) if index else b"")
    messages = sock.dump(Request(RTM_GETNEIGH, 0, body, "dump neighbours"))
    found = (parse_neighbour(m.data, m.start, m.end) for m in messages if m.type == RTM_NEWNEIGH)
    return [n for n in found if n is not None and (not index or n.index == index)]
