"""Sockets of a network namespace: found by their state and peer in the kernel, and closed for their owners.

Formats: sock_diag(7), include/uapi/linux/inet_diag.h. Whoever waits for a socket that is destroyed, or reads from it,
gets ECONNABORTED at once; a UDP socket has no peer after that (CONFIG_INET_DIAG_DESTROY).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from fimbria.kernel.netlink import SOCK_DIAG, NetlinkError, NetlinkSocket, Request, attr

# family, protocol, extensions, pad, states; then struct inet_diag_sockid: ports, addresses, device, cookie
_REQUEST: Final = struct.Struct("=BBBxI")
_SOCKID: Final = struct.Struct("!HH16s16s")
_SOCKID_SIZE: Final = 48
_MSG: Final = struct.Struct("=BBBB")
_MSG_SIZE: Final = 72
_DEVICE_COOKIE: Final = struct.Struct("=IQ")
_BY_FAMILY, _DESTROY = 20, 21
_BYTECODE: Final = 1
_OP: Final = struct.Struct("=BBH")
_HOST: Final = struct.Struct("=BBxxi")
_JUMP, _D_COND = 1, 8

ESTABLISHED, SYN_SENT, SYN_RECV, CLOSE = 1, 2, 3, 7  # include/net/tcp_states.h; a connected UDP socket is ESTABLISHED
# More conditions cost the kernel more than handing out sockets that then don't match.
MOST_PEERS: Final = 16
Peer = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class Socket:
    """One socket. Addresses are 4 or 16 bytes by its family, ports in host order; `cookie` is what programs see."""

    family: int
    protocol: int
    state: int
    source: Peer
    peer: Peer
    device: int
    cookie: int

    def __str__(self) -> str:
        ends = (f"{socket.inet_ntop(self.family, a)} port {p}" for a, p in (self.source, self.peer))
        return f"socket {' to '.join(ends)}"


def filter_peers(peers: Collection[Peer]) -> bytes:
    """A filter program that lets sockets through whose peer is one of `peers` (4 or 16 bytes, port).

    An IPv4 peer also stands for the IPv4-mapped one of an IPv6 socket.
    """
    parts = []
    for addr, port in peers:
        family = socket.AF_INET if len(addr) == 4 else socket.AF_INET6
        parts.append(_HOST.pack(family, len(addr) * 8, port) + addr)
    # Each condition, if true, goes on to a jump to the end, which accepts; if not, past that jump.
    left = sum(_OP.size * 2 + len(p) for p in parts)
    program = b""
    for part in parts:
        size = _OP.size + len(part)
        left -= size
        last = left == _OP.size
        # Beyond the end is a refusal.
        program += _OP.pack(_D_COND, size, size + (8 if last else _OP.size)) + part
        program += _OP.pack(_JUMP, _OP.size, left)
        left -= _OP.size
    return program


def dump_request(family: int, protocol: int, states: Iterable[int], peers: Collection[Peer] = ()) -> Request:
    """All sockets of a family and protocol in some states; with `peers`, only those connected to one of them."""
    body = _REQUEST.pack(family, protocol, 0, sum(1 << s for s in states)) + bytes(_SOCKID_SIZE)
    if peers:
        body += attr(_BYTECODE, filter_peers(peers))
    return Request(_BY_FAMILY, 0, body, f"list sockets of protocol {protocol}")


def destroy_request(found: Socket) -> Request:
    """Closes a socket under its owner's feet. ENOENT: it is gone; ESTALE: another one has its place."""
    ends = _SOCKID.pack(
        found.source[1], found.peer[1], found.source[0].ljust(16, b"\0"), found.peer[0].ljust(16, b"\0")
    )
    body = _REQUEST.pack(found.family, found.protocol, 0, 1 << found.state) + ends
    return Request(_DESTROY, 0, body + _DEVICE_COOKIE.pack(found.device, found.cookie), f"destroy {found}")


def parse_socket(protocol: int, data: bytes, start: int, end: int) -> Socket | None:
    """The socket in an inet_diag_msg; None for what is no such message."""
    if end - start < _MSG_SIZE:
        return None
    family, state, _, _ = _MSG.unpack_from(data, start)
    width = {socket.AF_INET: 4, socket.AF_INET6: 16}.get(family)
    if width is None:
        return None
    sport, dport, source, peer = _SOCKID.unpack_from(data, start + 4)
    device, cookie = _DEVICE_COOKIE.unpack_from(data, start + 4 + _SOCKID.size)
    return Socket(family, protocol, state, (source[:width], sport), (peer[:width], dport), device, cookie)


class SockDiag:
    """A namespace's sockets. Calls block for as long as the kernel walks its tables: a millisecond or so."""

    def __init__(self, netns_fd: int | None = None) -> None:
        """Of this namespace or of the given one. Raises OSError."""
        self._netlink = NetlinkSocket(netns_fd, strict=False, protocol=SOCK_DIAG)

    def connected(self, protocol: int, peers: Collection[Peer] = (), *, family: int = socket.AF_INET) -> list[Socket]:
        """Connected sockets of a family, with `peers` only those connected to one of them. Raises NetlinkError."""
        states = (ESTABLISHED,) if protocol == socket.IPPROTO_UDP else (ESTABLISHED, SYN_SENT)
        request = dump_request(family, protocol, states, peers if len(peers) <= MOST_PEERS else ())
        messages = self._netlink.dump(request)
        found = (parse_socket(protocol, m.data, m.start, m.end) for m in messages)
        return [s for s in found if s is not None]

    def destroy(self, sockets: Iterable[Socket]) -> tuple[int, list[NetlinkError]]:
        """Closes sockets, all in one exchange: how many, and why others couldn't be. One that is gone is no failure."""
        wanted = list(sockets)
        outcome = self._netlink.run([destroy_request(s) for s in wanted])
        gone = (errno.ENOENT, errno.ESTALE)
        failures = [e for e in outcome if e is not None and e.errno not in gone]
        return sum(e is None for e in outcome), failures

    def close(self) -> None:
        """Closes the netlink socket."""
        self._netlink.close()

    def __enter__(self) -> SockDiag:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
