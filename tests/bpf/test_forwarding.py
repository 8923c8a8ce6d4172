"""Real traffic through the real programs: two nodes, two pods each, and the world."""

import socket
from collections.abc import Iterator

import pytest
from lab import TCP, UDP, WORLD_ADDR, Lab, Mode, lab, ping, tcp_peer, tcp_service, udp_peer

MODES = [Mode(overlay, fast, tcx) for overlay in (True, False) for fast in (True, False) for tcx in (True, False)]
PAIRS = [("a", "b"), ("a", "c"), ("d", "b")]


@pytest.fixture(scope="module", params=MODES, ids=str)
def net(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with lab(request.param) as built:
        yield built


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("pair", PAIRS, ids="".join)
def test_pods_reach_each_other(net: Lab, pair: tuple[str, str], family: int) -> None:
    client, server = (net.pod(name) for name in pair)
    listen, source = server.addr[family], client.addr[family]
    assert ping(client.space, family, listen)
    assert udp_peer(server.space, client.space, family, listen) == source
    assert tcp_peer(server.space, client.space, family, listen) == source


@pytest.mark.parametrize("family", [4, 6])
def test_pod_to_world_is_masqueraded(net: Lab, family: int) -> None:
    pod, node, world = net.pod("a"), net.node_of("a"), WORLD_ADDR[family]
    assert ping(pod.space, family, world)
    assert udp_peer(net.fabric, pod.space, family, world) == node.addr[family]
    assert tcp_peer(net.fabric, pod.space, family, world) == node.addr[family]


@pytest.mark.parametrize("family", [4, 6])
def test_pod_and_its_node(net: Lab, family: int) -> None:
    pod, node = net.pod("a"), net.node_of("a")
    for address in (node.addr[family], node.router[family]):
        assert ping(pod.space, family, address)
        assert tcp_peer(node.space, pod.space, family, address) == pod.addr[family]
    assert ping(node.space, family, pod.addr[family])
    assert tcp_peer(pod.space, node.space, family, pod.addr[family]) == node.router[family]


@pytest.mark.parametrize("family", [4, 6])
def test_pod_and_another_node(net: Lab, family: int) -> None:
    pod, own, node = net.pod("a"), net.node_of("a"), net.node_of("c")
    source = own.addr[family] if net.mode.overlay else pod.addr[family]
    assert ping(pod.space, family, node.addr[family])
    assert tcp_peer(node.space, pod.space, family, node.addr[family]) == source
    seen = node.router[family] if net.mode.overlay else node.addr[family]
    assert tcp_peer(pod.space, node.space, family, pod.addr[family]) == seen


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("pair", PAIRS, ids="".join)
def test_service_by_packet(net: Lab, pair: tuple[str, str], family: int) -> None:
    client, server = (net.pod(name) for name in pair)
    front = ("10.96.0.10" if family == 4 else "fd96::10", 80)
    backend = (server.addr[family], 8080)
    net.node_of(pair[0]).dp.service(7, *front, socket.IPPROTO_TCP, [backend])
    # The listener is on the backend's port; the client only ever sees the frontend.
    assert tcp_service(server.space, client.space, family, backend, front) == client.addr[family]


@pytest.mark.parametrize("family", [4, 6])
def test_large_datagrams_arrive_in_fragments(net: Lab, family: int) -> None:
    for client, server in (("a", "b"), ("a", "c")):
        assert ping(net.pod(client).space, family, net.pod(server).addr[family], size=4000)
        assert udp_peer(net.pod(server).space, net.pod(client).space, family, net.pod(server).addr[family], 4000)
    # The first answer may be too big for the pod's device, which the world must be told by an error it understands.
    assert any(ping(net.pod("a").space, family, WORLD_ADDR[family], size=4000, timeout=1) for _ in range(2))


@pytest.mark.parametrize("family", [4, 6])
def test_service_without_backends_refuses_at_once(net: Lab, family: int) -> None:
    pod, front = net.pod("a"), ("10.96.0.11" if family == 4 else "fd96::11", 80)
    for proto in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        net.node_of("a").dp.service(8, *front, proto, [])
    with pod.space.socket(family, TCP) as c, pytest.raises(ConnectionRefusedError):
        c.connect(front)
    with pod.space.socket(family, UDP) as c, pytest.raises(ConnectionRefusedError):
        c.connect(front)
        c.send(b"?")
        c.recv(1)
