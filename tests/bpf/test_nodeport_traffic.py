"""Real clients outside two nodes reach Services: pods here and there, and the nodes themselves."""

import socket
from collections.abc import Iterator

import pytest
from datapath import addr

from fimbria.kernel.probe import has_tcx
from fimbria.model import rows
from lab import TCP, UDP, Lab, Mode, Node, lab, tcp_service

HOOKS = (True, False) if has_tcx() else (False,)
MODES = [Mode(overlay, fast, tcx) for overlay in (True, False) for fast in (True, False) for tcx in HOOKS]
NODE_PORT, BACKEND_PORT = 30080, 8080
CLIENT = {4: "192.168.1.1", 6: "fd01:1::1"}  # the router, as node 1 sees it
NODE_PORT_FLAG = 2


@pytest.fixture(scope="module", params=MODES, ids=str)
def net(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with lab(request.param) as built:
        yield built


def serve(node: Node, family: int, backend: str, number: int = 40, flags: int = NODE_PORT_FLAG) -> None:
    """Node port 30080 of `node` leads to `backend`, TCP and UDP."""
    every = addr("0.0.0.0" if family == 4 else "::")
    for proto in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        service = number + proto
        node.dp.put("backends", service, rows.Backend(addr(backend), BACKEND_PORT, proto))
        node.dp.put("service_slots", rows.SlotKey(service, 0), service)
        node.dp.put("frontends", rows.FrontendKey(every, NODE_PORT, proto), rows.Frontend(service, 1, flags))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("server", ["a", "c", "node", "other"])
def test_node_port(net: Lab, server: str, family: int) -> None:
    node, other = net.nodes
    places = {"node": (node.space, node.addr[family]), "other": (other.space, other.addr[family])}
    space, address = places[server] if server in places else (net.pod(server).space, net.pod(server).addr[family])
    serve(node, family, address)
    front = (node.addr[family], NODE_PORT)
    seen = tcp_service(space, net.fabric, family, (address, BACKEND_PORT), front)
    through = node.router[family] if net.mode.overlay and server == "c" else node.addr[family]
    assert seen == (CLIENT[family] if server in ("a", "node") else through)
    with space.socket(family, UDP) as s, net.fabric.socket(family, UDP) as c:
        s.bind((address, BACKEND_PORT))
        c.connect(front)
        for size in (10, 1400):
            c.send(b"q" * size)
            data, peer = s.recvfrom(65536)
            assert len(data) == size
            assert peer[0] == seen
            s.sendto(b"r" * size, peer)
            assert c.recv(65536) == b"r" * size


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("server", ["a", "c", "node", "other"])
def test_nobody_listening_is_said_at_once(net: Lab, server: str, family: int) -> None:
    node, other = net.nodes
    places = {"node": node.addr[family], "other": other.addr[family]}
    serve(node, family, places[server] if server in places else net.pod(server).addr[family])
    front = (node.addr[family], NODE_PORT)
    with net.fabric.socket(family, TCP) as c, pytest.raises(ConnectionRefusedError):
        c.connect(front)
    with net.fabric.socket(family, UDP) as c, pytest.raises(ConnectionRefusedError):
        c.connect(front)
        c.send(b"?")
        c.recv(1)
