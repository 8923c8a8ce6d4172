"""Real connections of a pod by packet: one port, two services, one backend, wherever that is."""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from fimbria.kernel.probe import has_tcx
from lab import TCP, UDP, WORLD_ADDR, Lab, Mode, Space, exchange, lab

MODES = [Mode(overlay, fast, has_tcx()) for overlay in (True, False) for fast in (True, False)]
TWINS = {4: ("10.96.0.21", "10.96.0.22"), 6: ("fd96::21", "fd96::22")}
PORT, CLIENT_PORT = 8080, 40404
PAYLOAD = bytes(range(256)) * 200


@pytest.fixture(scope="module", params=MODES, ids=str)
def net(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with lab(request.param) as built:
        yield built


def backend_of(net: Lab, name: str, family: int) -> tuple[Space, str]:
    if name == "world":
        return net.fabric, WORLD_ADDR[family]
    if name == "node":
        node = net.node_of("a")
        return node.space, node.addr[family]
    pod = net.pod(name)
    return pod.space, pod.addr[family]


def dial(client: Space, family: int, kind: int, source: str, to: str) -> socket.socket:
    c = client.socket(family, kind)
    c.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    c.bind((source, CLIENT_PORT))
    c.connect((to, 80))
    return c


@pytest.fixture
def twins(net: Lab, family: int, backend: str) -> Iterator[tuple[Space, str, tuple[str, str]]]:
    """The backend's namespace and address, and the addresses of the two services it is in."""
    space, address = backend_of(net, backend, family)
    dp = net.node_of("a").dp
    for number, front in enumerate(TWINS[family], 70):
        for proto in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
            dp.service(number + 10 * (proto == socket.IPPROTO_UDP), front, 80, proto, [(address, PORT)])
    yield space, address, TWINS[family]
    for name in ("conntrack", "nat"):
        keys, _ = dp.maps[name].dump()
        dp.maps[name].delete_batch(keys, len(keys) // dp.maps[name].key_size)


cases = pytest.mark.parametrize(
    ("family", "backend"), [(f, b) for f in (4, 6) for b in ("b", "c", "a", "node", "world")]
)
Twins = tuple[Space, str, tuple[str, str]]


@cases
def test_tcp(net: Lab, twins: Twins, family: int) -> None:
    server, address, fronts = twins
    pod = net.pod("a")
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(server.socket(family, TCP))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, PORT))
        listener.listen()
        pairs = []
        for front in fronts:
            c = stack.enter_context(dial(pod.space, family, TCP, pod.addr[family], front))
            s = stack.enter_context(listener.accept()[0])
            s.settimeout(3)
            pairs.append((c, s))
        assert pairs[0][1].getpeername()[1] != pairs[1][1].getpeername()[1]
        for _ in range(2):
            for c, s in pairs:
                exchange(c, s, PAYLOAD)
                exchange(s, c, PAYLOAD)


def answered(c: socket.socket, s: socket.socket, text: bytes) -> bool:
    """Whether the client gets its text back. Raises TimeoutError if it doesn't even arrive."""
    c.settimeout(1)
    c.send(text)
    data, peer = s.recvfrom(65536)
    assert data == text
    s.sendto(text, peer)
    with contextlib.suppress(TimeoutError):
        return c.recv(65536) == text
    return False


@cases
def test_udp_in_fragments(net: Lab, twins: Twins, family: int) -> None:
    server, address, fronts = twins
    pod = net.pod("a")
    with contextlib.ExitStack() as stack:
        s = stack.enter_context(server.socket(family, UDP))
        s.bind((address, PORT))
        clients = [stack.enter_context(dial(pod.space, family, UDP, pod.addr[family], front)) for front in fronts]
        for size in (10, 4000):
            for n, c in enumerate(clients):
                # An IPv6 sender outside learns by its first answer that pods' devices take less than its own.
                assert answered(c, s, bytes([n]) * size) or answered(c, s, bytes([n]) * size)


@pytest.mark.parametrize(("family", "backend"), [(f, b) for f in (4, 6) for b in ("b", "c")])
def test_the_other_port_is_one_that_the_pod_has_used(net: Lab, twins: Twins, family: int) -> None:
    """A datagram's binding takes a port by which the pod itself called the same backend a moment ago."""
    server, address, fronts = twins
    pod = net.pod("a")
    with contextlib.ExitStack() as stack:
        s = stack.enter_context(server.socket(family, UDP))
        s.bind((address, PORT))
        first, second = [stack.enter_context(dial(pod.space, family, UDP, pod.addr[family], front)) for front in fronts]
        assert answered(first, s, b"first")
        second.send(b"whose port?")
        other = s.recvfrom(64)[1][1]
        assert other != CLIENT_PORT
        conntrack = net.node_of("a").dp.maps["conntrack"]
        keys, _ = conntrack.dump()
        conntrack.delete_batch(keys, len(keys) // conntrack.key_size)
        with pod.space.socket(family, UDP) as direct:
            direct.bind((pod.addr[family], other))
            direct.connect((address, PORT))
            assert answered(direct, s, b"directly")
        assert answered(first, s, b"first again")
        assert answered(second, s, b"second")


@pytest.mark.parametrize(("family", "backend"), [(4, "c"), (6, "c"), (4, "a"), (6, "a")])
def test_an_error_finds_its_socket(net: Lab, twins: Twins, family: int) -> None:
    """Nobody listens: each of the two sockets is told so, though the backend knows them by other ports."""
    _, _, fronts = twins
    pod = net.pod("a")
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(dial(pod.space, family, UDP, pod.addr[family], front)) for front in fronts]
        for c in clients:
            c.send(b"anybody?")
            with pytest.raises(ConnectionRefusedError):
                c.recv(64)
