"""Finding and destroying sockets: the kernel's filter lets exactly those through that are asked for."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from fimbria.kernel import link
from fimbria.kernel._libbpf import lib
from fimbria.kernel.fd import check
from fimbria.kernel.netlink import NetlinkSocket
from fimbria.kernel.sock_diag import MOST_PEERS, Peer, SockDiag, Socket

UDP = socket.IPPROTO_UDP
V4, V6 = socket.AF_INET, socket.AF_INET6


class Net:
    """A namespace with its loopback device up, and UDP sockets in it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.sockets: list[socket.socket] = []

    def connect(self, address: str, port: int) -> socket.socket:
        family = V6 if ":" in address else V4
        s = socket.socket(fileno=check(lib.fim_socket_in(self.fd, family, socket.SOCK_DGRAM, 0), "socket"))
        self.sockets.append(s)
        s.connect((address, port))
        return s


@pytest.fixture
def net(namespace: Callable[[], int]) -> Iterator[Net]:
    with ExitStack() as stack:
        made = Net(namespace())
        stack.callback(lambda: [s.close() for s in made.sockets])
        with NetlinkSocket(made.fd) as sock:
            sock.do(link.change(1, up=True))
        yield made


def peer(address: str, port: int) -> Peer:
    return socket.inet_pton(V6 if ":" in address else V4, address), port


def ports(found: list[Socket]) -> list[int]:
    return sorted(s.peer[1] for s in found)


@pytest.mark.parametrize("number", [1, 2, 3, 7, MOST_PEERS])
def test_each_of_several_peers_is_let_through_and_nobody_else(net: Net, number: int) -> None:
    for port in range(1, 41):
        net.connect(f"127.0.0.{port % 3 + 1}", port)
    wanted = [(f"127.0.0.{port % 3 + 1}", port) for port in range(1, number + 1)]
    # The right port of another address doesn't count.
    asked = [peer(*w) for w in wanted] + [peer("127.0.0.9", 40)] * (number < MOST_PEERS)
    with SockDiag(net.fd) as diag:
        assert ports(diag.connected(UDP, asked)) == [port for _, port in wanted]


def test_families_and_mapped_addresses(net: Net) -> None:
    net.connect("127.0.0.1", 1)
    net.connect("::1", 2)
    net.connect("::ffff:127.0.0.1", 1)
    net.connect("::ffff:127.0.0.1", 3)
    asked = [peer("127.0.0.1", 1), peer("::1", 2)]
    with SockDiag(net.fd) as diag:
        assert ports(diag.connected(UDP, asked, family=V4)) == [1]
        assert ports(diag.connected(UDP, asked, family=V6)) == [1, 2]


def test_more_peers_than_a_filter_has_room_for_are_all_handed_out(net: Net) -> None:
    """The caller compares anyway."""
    for port in range(1, 31):
        net.connect("127.0.0.1", port)
    with SockDiag(net.fd) as diag:
        assert ports(diag.connected(UDP, [peer("127.0.0.1", p) for p in range(1, MOST_PEERS + 2)])) == list(
            range(1, 31)
        )


def test_only_connected_sockets_are_found(net: Net) -> None:
    s = socket.socket(fileno=check(lib.fim_socket_in(net.fd, V4, socket.SOCK_DGRAM, 0), "socket"))
    net.sockets.append(s)
    s.bind(("127.0.0.1", 5))
    with SockDiag(net.fd) as diag:
        assert diag.connected(UDP) == []


def test_what_is_destroyed_has_no_peer_and_can_connect_again(net: Net) -> None:
    s = net.connect("127.0.0.1", 7)
    with SockDiag(net.fd) as diag:
        found = diag.connected(UDP, [peer("127.0.0.1", 7)])
        assert diag.destroy(found) == (1, [])
        assert diag.connected(UDP) == []
        assert diag.destroy(found) == (0, [])
    with pytest.raises(ConnectionAbortedError):
        s.recv(1)
    with pytest.raises(OSError) as caught:
        s.send(b"x")
    assert caught.value.errno == errno.EDESTADDRREQ
    s.connect(("127.0.0.1", 8))
    s.send(b"x")


def test_another_namespace_is_another_world(net: Net, namespace: Callable[[], int]) -> None:
    net.connect("127.0.0.1", 7)
    with SockDiag(namespace()) as diag:
        assert diag.connected(UDP) == []
