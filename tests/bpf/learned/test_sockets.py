"""Cutting real sockets in namespaces: those that came to a lost backend through a service, and no others."""

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from fimbria.agent.datapath import Layouts
from fimbria.agent.sockets import namespaces
from fimbria.kernel import netns
from fimbria.kernel._libbpf import lib
from fimbria.kernel.fd import check
from fimbria.kernel.maps import Map, MapType, create_map
from fimbria.kernel.sock_diag import SockDiag
from fimbria.lab.slowness import factor
from fimbria.learned.sockets import Backend, TranslatedSockets, cut
from fimbria.model.address import pack
from fimbria.model.rows import SockRevnat, SockRevnatKey

LAYOUTS = Layouts()
UDP, TCP = socket.SOCK_DGRAM, socket.SOCK_STREAM
NAMES = [f"fimcut{os.getpid()}{which}" for which in "ab"]
SERVICE, OTHER_SERVICE, FRONTEND = 7, 8, pack("10.96.0.10")
# By the family of the socket and of what it talks to.
KINDS = {
    "v4": (socket.AF_INET, "127.0.0.1", "127.0.0.1"),
    "v6": (socket.AF_INET6, "::1", "::1"),
    "mapped": (socket.AF_INET6, "::ffff:127.0.0.1", "127.0.0.1"),
}


class World:
    """Two namespaces, and `sock_revnat` as programs would have filled it."""

    def __init__(self, revnat: Map, fds: list[int]) -> None:
        self.revnat = revnat
        self.fds = fds
        self.sockets: list[socket.socket] = []

    def open(self, where: int, family: int, kind: int) -> socket.socket:
        s = socket.socket(fileno=check(lib.fim_socket_in(self.fds[where], family, kind, 0), "socket"))
        s.settimeout(3)
        self.sockets.append(s)
        return s

    def server(self, where: int, kind: str = "v4", proto: int = UDP) -> tuple[socket.socket, int]:
        s = self.open(where, socket.AF_INET6 if kind == "v6" else socket.AF_INET, proto)
        s.bind(("::1" if kind == "v6" else "127.0.0.1", 0))
        if proto == TCP:
            s.listen()
        return s, s.getsockname()[1]

    def client(self, where: int, port: int, kind: str = "v4", proto: int = UDP) -> socket.socket:
        family, address, _ = KINDS[kind]
        s = self.open(where, family, proto)
        s.connect((address, port))
        return s

    def through(self, s: socket.socket, backend: Backend) -> None:
        """What the connect program writes."""
        key = SockRevnatKey(cookie(s), backend.addr, backend.port)
        row = SockRevnat(FRONTEND, 53, backend.service)
        self.revnat.update(LAYOUTS["sock_revnat_key"].encode(key), LAYOUTS["sock_revnat"].encode(row))

    def lost(self, *backends: Backend) -> dict[Backend, list[int]]:
        known = TranslatedSockets(self.revnat, LAYOUTS.btf).of({b.service for b in backends})
        return {b: cookies for b, cookies in known.items() if b in backends}

    def cut(self, *backends: Backend, tcp: bool = False) -> tuple[int, list[str]]:
        done = cut(self.lost(*backends), iter(self.fds), tcp=tcp)
        return done.cut, done.failures


def cookie(s: socket.socket) -> int:
    return struct.unpack("=Q", s.getsockopt(socket.SOL_SOCKET, 57, 8))[0]


def backend(port: int, kind: str = "v4", service: int = SERVICE) -> Backend:
    return Backend(service, pack(KINDS[kind][2]), port)


def is_cut(s: socket.socket) -> bool:
    s.setblocking(False)
    try:
        s.recv(1)
    except BlockingIOError:
        return False
    except OSError as error:
        assert error.errno == errno.ECONNABORTED
        return True
    raise AssertionError("data nobody sent")


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        fds = []
        for name in NAMES:
            path = f"/run/netns/{name}"
            os.makedirs("/run/netns", exist_ok=True)
            netns.create(path)
            stack.callback(netns.delete, path)
            fds.append(stack.enter_context(netns.opened(path)))
            assert os.system(f"ip -n {name} link set lo up") == 0
        size = LAYOUTS["sock_revnat_key"].size, LAYOUTS["sock_revnat"].size
        revnat = stack.enter_context(create_map(MapType.LRU_HASH, *size, 65536, 0, "fimcut"))
        made = World(revnat, fds)
        stack.callback(lambda: [s.close() for s in made.sockets])
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_a_resolver_waiting_for_a_dead_backend_is_told_at_once_and_asks_another(world: World, kind: str) -> None:
    """It sleeps in recv, for an answer that would never come."""
    (dead, port), (living, other) = world.server(1, kind), world.server(1, kind)
    client = world.client(1, port, kind)
    world.through(client, backend(port, kind))
    dead.close()
    told: list[float] = []

    def resolve() -> None:
        try:
            client.recv(100)
        except OSError as error:
            assert error.errno == errno.ECONNABORTED
            told.append(time.monotonic())

    thread = threading.Thread(target=resolve)
    thread.start()
    time.sleep(0.05)
    began = time.monotonic()
    assert world.cut(backend(port, kind)) == (1, [])
    thread.join()
    assert told[0] - began < factor(), "its own patience is three times as long"
    again = world.client(1, other, kind)
    again.send(b"question")
    assert living.recv(100) == b"question"


def test_only_sockets_that_came_through_the_service_are_touched(world: World) -> None:
    _, port = world.server(0)
    _, other = world.server(0)
    mine, direct, elsewhere, others = (world.client(0, p) for p in (port, port, other, port))
    world.through(mine, backend(port))
    world.through(elsewhere, backend(other))
    world.through(others, backend(port, service=OTHER_SERVICE))
    assert world.cut(backend(port)) == (1, [])
    assert [is_cut(s) for s in (mine, direct, elsewhere, others)] == [True, False, False, False]


def test_unconnected_sockets_choose_by_themselves(world: World) -> None:
    server, port = world.server(0)
    s = world.open(0, socket.AF_INET, UDP)
    s.sendto(b"x", ("127.0.0.1", port))
    world.through(s, backend(port))
    assert world.cut(backend(port)) == (0, [])
    assert not is_cut(s)
    assert server.recv(10) == b"x"


def test_a_socket_that_went_on_to_another_peer_is_left_alone(world: World) -> None:
    """The row of its former backend is still there."""
    _, port = world.server(0)
    _, other = world.server(0)
    s = world.client(0, port)
    world.through(s, backend(port))
    s.connect(("127.0.0.1", other))
    assert world.cut(backend(port)) == (0, [])
    assert not is_cut(s)


@pytest.mark.parametrize("kind", KINDS)
def test_tcp_is_left_to_finish_unless_told_otherwise(world: World, kind: str) -> None:
    server, port = world.server(1, kind, TCP)
    s = world.client(1, port, kind, TCP)
    accepted, _ = server.accept()
    world.sockets.append(accepted)
    world.through(s, backend(port, kind))
    assert world.cut(backend(port, kind)) == (0, [])
    s.send(b"still here")
    assert accepted.recv(100) == b"still here"
    assert world.cut(backend(port, kind), tcp=True) == (1, [])
    with pytest.raises(ConnectionAbortedError):
        s.recv(1)
    with pytest.raises(ConnectionResetError):
        accepted.recv(1)


def test_many_backends_in_many_namespaces_are_one_pass(world: World) -> None:
    clients, gone = [], []
    for where in (0, 1):
        for kind in KINDS:
            for _ in range(20):
                _, port = world.server(where, kind)
                clients.append(world.client(where, port, kind))
                gone.append(backend(port, kind))
                world.through(clients[-1], gone[-1])
    kept = world.client(0, world.server(0)[1])
    world.through(kept, backend(kept.getpeername()[1]))
    began = time.thread_time()
    assert world.cut(*gone) == (120, [])
    assert time.thread_time() - began < 0.5 * factor()
    assert all(is_cut(s) for s in clients)
    assert not is_cut(kept)


def test_namespaces_are_not_entered_once_all_are_found(world: World) -> None:
    _, port = world.server(0)
    world.through(world.client(0, port), backend(port))
    entered = []

    def each() -> Iterator[int]:
        for fd in world.fds:
            entered.append(fd)
            yield fd

    assert cut(world.lost(backend(port)), each(), tcp=False).cut == 1
    assert entered == world.fds[:1]


def test_a_namespace_that_is_gone_is_left_out() -> None:
    found = namespaces([f"/run/netns/fimcut-none-{os.getpid()}", "/proc/self/ns/net"])
    assert next(found) is None
    assert isinstance(next(found), int)
    assert list(found) == []


def test_what_closed_sockets_left_in_the_table_does_no_harm(world: World) -> None:
    _, port = world.server(0)
    gone, living = world.client(0, port), world.client(0, port)
    for s in (gone, living):
        world.through(s, backend(port))
    gone.close()
    assert world.cut(backend(port)) == (1, [])


def test_a_socket_that_closes_meanwhile_is_no_failure(world: World) -> None:
    _, port = world.server(0)
    s = world.client(0, port)
    with SockDiag(world.fds[0]) as diag:
        found = diag.connected(socket.IPPROTO_UDP, [(socket.inet_aton("127.0.0.1"), port)])
        assert [f.cookie for f in found] == [cookie(s)]
        s.close()
        assert diag.destroy(found) == (0, [])


def test_the_table_is_read_by_service(world: World) -> None:
    sockets = [world.client(0, 9) for _ in range(3)]
    for s, service in zip(sockets, (1, 2, 3), strict=True):
        world.through(s, backend(9, service=service))
    table = TranslatedSockets(world.revnat, LAYOUTS.btf)
    assert table.of({1, 3, 99}) == {backend(9, service=n): [cookie(sockets[n - 1])] for n in (1, 3)}
    assert len(table.of(None)) == 3
    assert table.of(set()) == {}
