"""Sockets that still talk to a backend which their service has lost: found, and cut, so that their owners connect anew.

Rules
1. A socket counts only if it came there through a service: `sock_revnat` has its cookie, the backend and the service.
   Whoever talks to the same address directly is left alone.
2. Connected UDP sockets are cut: they would send into the void and never hear of it. Unconnected ones choose again by
   themselves. TCP notices by its own means, and is cut only if asked for.
3. What the service has now decides, not what was seen to go: an event that was missed changes nothing.
4. Any number of backends that go at once are one pass: one look through the map, two dumps in a namespace.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from fimbria.kernel.btf import Btf
from fimbria.kernel.codec import Codec
from fimbria.kernel.maps import Map
from fimbria.kernel.netlink import NetlinkError
from fimbria.kernel.sock_diag import Peer, SockDiag, Socket
from fimbria.kernel.sweep import Sweep, offsets
from fimbria.model.address import V4_MAPPED, is_v4
from fimbria.model.rows import SockRevnat, SockRevnatKey


class Backend(NamedTuple):
    """A backend as sockets of a service know it. The address has 16 bytes, the port is in host order."""

    service: int
    addr: bytes
    port: int


@dataclass(slots=True)
class Cut:
    """What a pass did. `found` and `cut` are sockets."""

    found: int = 0
    cut: int = 0
    failures: list[str] = field(default_factory=list)


class TranslatedSockets:
    """Who talks to what through a service, as `sock_revnat` has it; rows of closed sockets included."""

    def __init__(self, bpf_map: Map, btf: Btf) -> None:
        """Raises LayoutError, BtfError."""
        self._sweep = Sweep(bpf_map)
        self._keys = Codec(btf, "struct sock_revnat_key", SockRevnatKey)
        self._values = Codec(btf, "struct sock_revnat", SockRevnat)
        self._service = offsets(btf, "sock_revnat")["service"]

    def of(self, services: Iterable[int] | None) -> dict[Backend, list[int]]:
        """The cookies of those who talk to each backend of some services; None: of all. Blocks. Raises MapError."""
        wanted = None if services is None else sorted(services)
        found: dict[Backend, list[int]] = {}
        last = False
        while not last:
            last = self._sweep.step()
            if wanted is not None:
                self._sweep.keep_numbers(self._service, wanted)
            rows = [self._sweep.row(at) for at in range(self._sweep.rows.count)]
            keys = self._keys.decode_many(b"".join(k for k, _ in rows))
            values = self._values.decode_many(b"".join(v for _, v in rows))
            for key, value in zip(keys, values, strict=True):
                found.setdefault(Backend(value.service, key.addr, key.port), []).append(key.cookie)
        return found


def cut(lost: dict[Backend, list[int]], namespaces: Iterable[int | None], *, tcp: bool) -> Cut:
    """Destroys the sockets with these cookies that are connected to these backends. Blocks.

    `namespaces` are descriptors, None for this thread's own; those not needed any more aren't taken. What can't be
    destroyed is in `failures`.
    """
    done = Cut()
    wanted = {(cookie, backend.addr, backend.port) for backend, cookies in lost.items() for cookie in cookies}
    peers = sorted({_peer(backend) for backend in lost})
    protocols = (socket.IPPROTO_UDP, socket.IPPROTO_TCP) if tcp else (socket.IPPROTO_UDP,)
    for netns in namespaces if wanted else ():
        try:
            with SockDiag(netns) as diag:
                found = [s for p in protocols for s in _connected(diag, p, peers) if _known(s) in wanted]
                number, failures = diag.destroy(found)
        except OSError as error:
            done.failures.append(str(error))
            continue
        done.found += len(found)
        done.cut += number
        done.failures += map(str, failures)
        wanted -= {_known(s) for s in found}
        if not wanted:
            break
    return done


def _connected(diag: SockDiag, protocol: int, peers: list[Peer]) -> list[Socket]:
    found: list[Socket] = []
    plain = [p for p in peers if len(p[0]) == 4]
    if plain:
        found += diag.connected(protocol, plain, family=socket.AF_INET)
    try:
        return found + diag.connected(protocol, peers, family=socket.AF_INET6)
    except NetlinkError:
        if any(len(p[0]) == 16 for p in peers):
            raise
        return found  # a kernel without IPv6


def _peer(backend: Backend) -> Peer:
    return (backend.addr[12:] if is_v4(backend.addr) else backend.addr), backend.port


def _known(found: Socket) -> tuple[int, bytes, int]:
    addr, port = found.peer
    return found.cookie, (V4_MAPPED + addr if len(addr) == 4 else addr), port
