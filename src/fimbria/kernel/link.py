"""Network devices and their addresses over rtnetlink (include/uapi/linux/if_link.h, if_addr.h)."""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

from fimbria.kernel.netlink import (
    BE16,
    CREATE,
    EXCL,
    REPLACE,
    Message,
    NetlinkError,
    NetlinkSocket,
    Request,
    WireError,
    attr,
    attr_text,
    attr_u8,
    attr_u32,
    attrs,
    nest,
    number,
    text,
)
from fimbria.kernel.route import family_of, show

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22

IFF_UP, IFF_LOWER_UP = 0x1, 0x10000
NAME_LIMIT = 15  # IFNAMSIZ without its NUL

_IFINFOMSG = struct.Struct("=BxHiII")  # family, device type, index, flags, change mask
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER, _IFLA_TXQLEN = 1, 3, 4, 5, 10, 13
_IFLA_OPERSTATE, _IFLA_LINKINFO, _IFLA_IFALIAS, _IFLA_GROUP, _IFLA_NET_NS_FD, _IFLA_EXT_MASK = 16, 18, 20, 27, 28, 29
_IFLA_LINK_NETNSID, _IFLA_GSO_MAX_SIZE, _IFLA_ALT_IFNAME = 37, 41, 53
_IFLA_GRO_MAX_SIZE, _IFLA_GSO_IPV4, _IFLA_GRO_IPV4 = 58, 63, 64
_INFO_KIND, _INFO_DATA = 1, 2
_VETH_PEER = 1
_VXLAN_ID, _VXLAN_TTL, _VXLAN_LEARNING, _VXLAN_PORT_RANGE, _VXLAN_PORT = 1, 5, 7, 10, 15
_VXLAN_UDP_CSUM, _VXLAN_ZERO_CSUM6_TX, _VXLAN_ZERO_CSUM6_RX, _VXLAN_METADATA, _VXLAN_DF = 18, 19, 20, 25, 29
_SKIP_STATS = 1 << 3  # RTEXT_FILTER_SKIP_STATS: half of a dump's bytes are counters


@dataclass(frozen=True, slots=True)
class VxlanInfo:
    """What a VXLAN device is configured for. `udp_csum`: over IPv4; `zero_csum6`: none over IPv6 (both directions)."""

    vni: int = 0
    port: int = 0
    collect_metadata: bool = False
    udp_csum: bool = True
    zero_csum6: bool = False
    ttl: int = 0
    learning: bool = False


@dataclass(frozen=True, slots=True)
class Device:
    """A device as the kernel reports it. `peer`: index of a veth's other end, in netns `peer_netnsid` (-1: this)."""

    index: int
    name: str
    kind: str
    mtu: int
    mac: bytes
    flags: int
    operstate: int
    master: int
    peer: int
    peer_netnsid: int
    group: int
    alias: str
    gso_max_size: int
    gro_max_size: int
    gso_ipv4_max_size: int
    gro_ipv4_max_size: int
    vxlan: VxlanInfo | None = None

    @property
    def up(self) -> bool:
        """Set up by an administrator (not: has a carrier)."""
        return bool(self.flags & IFF_UP)


@dataclass(frozen=True, slots=True)
class Veth:
    """A pair to create, each end where it belongs from the start. `netns_fd` None: the socket's namespace.

    With `queues` both ends get as many queues. MACs are 6 bytes, or empty for random ones.
    While it creates the pair the kernel can only set this end up, and no alias: see change() for the rest.
    """

    name: str
    peer_name: str
    mtu: int = 0
    mac: bytes = b""
    peer_mac: bytes = b""
    netns_fd: int | None = None
    peer_netns_fd: int | None = None
    up: bool = False
    group: int = 0
    queues: int = 0


@dataclass(frozen=True, slots=True)
class Vxlan:
    """A VXLAN device without a VNI of its own: BPF gives the tunnel key of each packet, for IPv4 and IPv6."""

    name: str
    port: int
    mtu: int = 0
    mac: bytes = b""
    udp_csum: bool = True
    zero_csum6: bool = False
    ttl: int = 0
    up: bool = False
    source_ports: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Bridge:
    """A bridge."""

    name: str
    mtu: int = 0
    mac: bytes = b""
    up: bool = False


def _check_name(name: str) -> str:
    if not 0 < len(name.encode()) <= NAME_LIMIT or "/" in name or name in (".", "..") or not name.isprintable():
        raise ValueError(f"impossible device name {name!r}")
    return name


def _check_mac(mac: bytes, name: str) -> bytes:
    if len(mac) != 6:
        raise ValueError(f"device {name}: a MAC has 6 bytes, not {len(mac)}")
    return mac


def _header(index: int = 0, flags: int = 0, mask: int = 0) -> bytes:
    return _IFINFOMSG.pack(0, 0, index, flags, mask)


def _common(name: str, mtu: int, mac: bytes, netns_fd: int | None, group: int) -> bytes:
    parts = [attr_text(_IFLA_IFNAME, _check_name(name))]
    if mtu:
        parts.append(attr_u32(_IFLA_MTU, mtu))
    if mac:
        parts.append(attr(_IFLA_ADDRESS, _check_mac(mac, name)))
    if netns_fd is not None:
        parts.append(attr_u32(_IFLA_NET_NS_FD, netns_fd))
    if group:
        parts.append(attr_u32(_IFLA_GROUP, group))
    return b"".join(parts)


def _create(name: str, up: bool, common: bytes, kind: str, data: bytes) -> Request:
    flags = IFF_UP if up else 0
    info = nest(_IFLA_LINKINFO, attr(_INFO_KIND, kind.encode()), nest(_INFO_DATA, data) if data else b"")
    return Request(RTM_NEWLINK, CREATE | EXCL, _header(0, flags, flags) + common + info, f"create {kind} {name}")


def create(spec: Veth | Vxlan | Bridge) -> Request:
    """Creates a device; EEXIST when the name is taken. Raises ValueError for an impossible name or MAC."""
    if isinstance(spec, Veth):
        queues = attr_u32(31, spec.queues) + attr_u32(32, spec.queues) if spec.queues else b""
        peer = _common(spec.peer_name, spec.mtu, spec.peer_mac, spec.peer_netns_fd, 0) + queues
        common = _common(spec.name, spec.mtu, spec.mac, spec.netns_fd, spec.group) + queues
        return _create(spec.name, spec.up, common, "veth", attr(_VETH_PEER, _header() + peer))
    common = _common(spec.name, spec.mtu, spec.mac, None, 0)
    if isinstance(spec, Bridge):
        return _create(spec.name, spec.up, common, "bridge", b"")
    data = attr_u8(_VXLAN_METADATA, 1) + attr_u8(_VXLAN_LEARNING, 0) + attr(_VXLAN_PORT, BE16.pack(spec.port))
    data += attr_u8(_VXLAN_UDP_CSUM, spec.udp_csum)
    data += attr_u8(_VXLAN_ZERO_CSUM6_TX, spec.zero_csum6) + attr_u8(_VXLAN_ZERO_CSUM6_RX, spec.zero_csum6)
    data += attr_u8(_VXLAN_TTL, spec.ttl) if spec.ttl else b""
    if spec.source_ports:
        data += attr(_VXLAN_PORT_RANGE, BE16.pack(spec.source_ports[0]) + BE16.pack(spec.source_ports[1]))
    return _create(spec.name, spec.up, common, "vxlan", data)


def change(
    index: int, *, up: bool | None = None, mtu: int | None = None, mac: bytes | None = None, name: str | None = None,
    netns_fd: int | None = None, alias: str | None = None, group: int | None = None, master: int | None = None,
    gso_max_size: int | None = None, gro_max_size: int | None = None,
    gso_ipv4_max_size: int | None = None, gro_ipv4_max_size: int | None = None,
) -> Request:  # fmt: skip
    """Changes what is given of one device; `master` 0 releases it, an empty `alias` clears it."""
    flags, mask = (IFF_UP if up else 0, IFF_UP) if up is not None else (0, 0)
    numbers = (
        (_IFLA_MTU, mtu), (_IFLA_NET_NS_FD, netns_fd), (_IFLA_GROUP, group), (_IFLA_MASTER, master),
        (_IFLA_GSO_MAX_SIZE, gso_max_size), (_IFLA_GRO_MAX_SIZE, gro_max_size),
        (_IFLA_GSO_IPV4, gso_ipv4_max_size), (_IFLA_GRO_IPV4, gro_ipv4_max_size),
    )  # fmt: skip
    parts = [_header(index, flags, mask), *(attr_u32(kind, value) for kind, value in numbers if value is not None)]
    if mac is not None:
        parts.append(attr(_IFLA_ADDRESS, _check_mac(mac, f"{index}")))
    if name is not None:
        parts.append(attr_text(_IFLA_IFNAME, _check_name(name)))
    if alias is not None:
        parts.append(attr(_IFLA_IFALIAS, alias.encode()))
    return Request(RTM_NEWLINK, 0, b"".join(parts), f"change device {index}")


def delete(index: int) -> Request:
    """Deletes a device (of a veth pair: both ends); ENODEV when there is none. By index: names are reused."""
    return Request(RTM_DELLINK, 0, _header(index), f"delete device {index}")


def _vxlan(info: dict[int, bytes]) -> VxlanInfo:
    raw = info.get(_INFO_DATA, b"")
    found = attrs(raw, 0, len(raw))
    port = found.get(_VXLAN_PORT, b"\0\0")
    return VxlanInfo(
        number(found.get(_VXLAN_ID)), int.from_bytes(port, "big"), bool(number(found.get(_VXLAN_METADATA))),
        bool(number(found.get(_VXLAN_UDP_CSUM))), bool(number(found.get(_VXLAN_ZERO_CSUM6_TX))),
        number(found.get(_VXLAN_TTL)), bool(number(found.get(_VXLAN_LEARNING))),
    )  # fmt: skip


def parse_device(data: bytes, start: int, end: int) -> Device | None:
    """The device in an RTM_NEWLINK or RTM_DELLINK body; None for bridge-port notifications. Raises WireError."""
    if end - start < _IFINFOMSG.size:
        raise WireError("link message too short")
    family, _kind, index, flags, _mask = _IFINFOMSG.unpack_from(data, start)
    if family != 0:
        return None
    found = attrs(data, start + 16, end)
    get = found.get
    raw_info = get(_IFLA_LINKINFO, b"")
    info = attrs(raw_info, 0, len(raw_info))
    kind = text(info.get(_INFO_KIND))
    netnsid = get(_IFLA_LINK_NETNSID)
    return Device(
        index, text(get(_IFLA_IFNAME)), kind, number(get(_IFLA_MTU)), get(_IFLA_ADDRESS, b""), flags,
        number(get(_IFLA_OPERSTATE)), number(get(_IFLA_MASTER)), number(get(_IFLA_LINK)),
        struct.unpack("=i", netnsid)[0] if netnsid and len(netnsid) == 4 else -1,
        number(get(_IFLA_GROUP)), text(get(_IFLA_IFALIAS)),
        number(get(_IFLA_GSO_MAX_SIZE)), number(get(_IFLA_GRO_MAX_SIZE)),
        number(get(_IFLA_GSO_IPV4)), number(get(_IFLA_GRO_IPV4)),
        _vxlan(info) if kind == "vxlan" else None,
    )  # fmt: skip


def get(sock: NetlinkSocket, name_or_index: str | int) -> Device | None:
    """One device by index, name or alternative name; None when there is none. Raises NetlinkError."""
    body = _header(name_or_index if isinstance(name_or_index, int) else 0) + attr_u32(_IFLA_EXT_MASK, _SKIP_STATS)
    if isinstance(name_or_index, str):
        kind = _IFLA_IFNAME if len(name_or_index.encode()) <= NAME_LIMIT else _IFLA_ALT_IFNAME
        body += attr_text(kind, name_or_index)
    try:
        messages = sock.query(Request(RTM_GETLINK, 0, body, f"get device {name_or_index}"))
    except NetlinkError as e:
        if e.errno == errno.ENODEV:
            return None
        raise
    return next((parse_device(m.data, m.start, m.end) for m in messages if m.type == RTM_NEWLINK), None)


def dump(sock: NetlinkSocket, *, kind: str = "", master: int = 0) -> list[Device]:
    """All devices, or those of a kind or below a master, filtered in the kernel. Raises NetlinkError."""
    body = _header() + attr_u32(_IFLA_EXT_MASK, _SKIP_STATS)
    body += attr_u32(_IFLA_MASTER, master) if master else b""
    body += nest(_IFLA_LINKINFO, attr(_INFO_KIND, kind.encode())) if kind else b""
    messages: list[Message] = sock.dump(Request(RTM_GETLINK, 0, body, "dump devices"))
    devices = (parse_device(m.data, m.start, m.end) for m in messages if m.type == RTM_NEWLINK)
    # A kind whose module isn't loaded can't be filtered for: the kernel then sends all.
    return [d for d in devices if d is not None and kind in ("", d.kind)]


# -- addresses

_IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix_len, flags, scope, index
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 4, 8
IFA_F_NODAD, IFA_F_TENTATIVE, IFA_F_PERMANENT, IFA_F_NOPREFIXROUTE = 0x02, 0x40, 0x80, 0x200


@dataclass(frozen=True, slots=True)
class Address:
    """An address of a device, packed. `scope` as for routes; `flags` are the IFA_F_ bits the kernel reports."""

    index: int
    address: bytes
    prefix_len: int
    scope: int = 0
    nodad: bool = False
    noprefixroute: bool = False
    peer: bytes = b""
    flags: int = 0

    def __str__(self) -> str:
        return f"{show(self.address)}/{self.prefix_len} of device {self.index}"


def _address_body(a: Address) -> bytes:
    family = family_of(a.address, "address")
    flags = a.flags | (IFA_F_NODAD if a.nodad else 0) | (IFA_F_NOPREFIXROUTE if a.noprefixroute else 0)
    return (
        _IFADDRMSG.pack(family, a.prefix_len, flags & 0xFF, a.scope, a.index)
        + attr(_IFA_LOCAL, a.address)
        + attr(_IFA_ADDRESS, a.peer or a.address)
        + attr_u32(_IFA_FLAGS, flags)
    )


def add_address(address: Address) -> Request:
    """Adds, or changes the flags of an address that is there. Raises ValueError for an impossible one."""
    return Request(RTM_NEWADDR, CREATE | REPLACE, _address_body(address), f"add address {address}")


def delete_address(address: Address) -> Request:
    """Deletes; EADDRNOTAVAIL when there is none."""
    return Request(RTM_DELADDR, 0, _address_body(address), f"delete address {address}")


def parse_address(data: bytes, start: int, end: int) -> Address | None:
    """The address in an RTM_NEWADDR or RTM_DELADDR body; None for other families. Raises WireError."""
    if end - start < _IFADDRMSG.size:
        raise WireError("address message too short")
    family, prefix_len, short_flags, scope, index = _IFADDRMSG.unpack_from(data, start)
    found = attrs(data, start + 8, end)
    remote = found.get(_IFA_ADDRESS, b"")
    local = found.get(_IFA_LOCAL, remote)
    if family not in (2, 10) or len(local) not in (4, 16):
        return None
    flags = number(found.get(_IFA_FLAGS), short_flags)
    return Address(
        index, local, prefix_len, scope, bool(flags & IFA_F_NODAD), bool(flags & IFA_F_NOPREFIXROUTE),
        remote if remote != local else b"", flags,
    )  # fmt: skip


def dump_addresses(sock: NetlinkSocket, *, index: int = 0, family: int = 0) -> list[Address]:
    """The addresses of all devices or of one, filtered in the kernel. Raises NetlinkError."""
    request = Request(RTM_GETADDR, 0, _IFADDRMSG.pack(family, 0, 0, 0, index), "dump addresses")
    found = (parse_address(m.data, m.start, m.end) for m in sock.dump(request) if m.type == RTM_NEWADDR)
    return [a for a in found if a is not None]
