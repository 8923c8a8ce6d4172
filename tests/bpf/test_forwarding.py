"""Real traffic through the real programs: two nodes, two pods each, and the world."""

import socket
from collections.abc import Iterator

import pytest
from datapath import ENFORCE_INGRESS, INGRESS, POD, READY, TUNNEL, WORLD, addr, prefix

from fimbria.kernel.probe import has_tcx
from fimbria.model import rows
from lab import (
    IDENTITY,
    TCP,
    UDP,
    WORLD_ADDR,
    Lab,
    Mode,
    exchange,
    hop,
    lab,
    path_mtu,
    ping,
    tcp_peer,
    tcp_service,
    udp_peer,
)  # fmt: skip

# Linux before 6.6 has no tcx: there is nothing to test of it then.
HOOKS = (True, False) if has_tcx() else (False,)
MODES = [Mode(overlay, fast, tcx) for overlay in (True, False) for fast in (True, False) for tcx in HOOKS]
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
@pytest.mark.parametrize("pair", [*PAIRS, ("a", "a")], ids="".join)
def test_service_by_packet(net: Lab, pair: tuple[str, str], family: int) -> None:
    client, server = (net.pod(name) for name in pair)
    front = ("10.96.0.10" if family == 4 else "fd96::10", 80)
    backend = (server.addr[family], 8080)
    node = net.node_of(pair[0])
    node.dp.service(7, *front, socket.IPPROTO_TCP, [backend])
    # The listener is on the backend's port; the client only ever sees the frontend.
    seen = client.addr[family] if client is not server else node.router[family]
    assert tcp_service(server.space, client.space, family, backend, front) == seen


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


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("where", ["pod", "node"])
def test_checksums_are_right_without_offload(net: Lab, where: str, family: int) -> None:
    """Between veths nobody sums up nor checks; here the pods do before the datapath, or the nodes after it."""
    a, c = net.pod("a"), net.pod("c")
    spaces = [p.space for p in (a, c)] if where == "pod" else [net.fabric, *(n.space for n in net.nodes)]
    devices = [(s, d) for s in spaces for d in (("n1", "n2") if s is net.fabric else ("eth0",))]
    front = ("10.96.0.20" if family == 4 else "fd96::20", 80)
    backend = (c.addr[family], 8080)
    net.nodes[0].dp.service(9, *front, socket.IPPROTO_TCP, [backend])
    try:
        for space, device in devices:
            space.checksum_offload(device, False)
        assert tcp_peer(net.fabric, a.space, family, WORLD_ADDR[family]) == net.nodes[0].addr[family]
        assert udp_peer(net.fabric, a.space, family, WORLD_ADDR[family]) == net.nodes[0].addr[family]
        assert tcp_service(c.space, a.space, family, backend, front) == a.addr[family]
        assert tcp_peer(c.space, a.space, family, c.addr[family]) == a.addr[family]
        assert udp_peer(c.space, a.space, family, c.addr[family]) == a.addr[family]
    finally:
        for space, device in devices:
            space.checksum_offload(device, True)


@pytest.mark.parametrize("family", [4, 6])
def test_nobody_listening_is_said_at_once(net: Lab, family: int) -> None:
    for name in ("b", "c"):
        target = (net.pod(name).addr[family], 9)
        with net.pod("a").space.socket(family, TCP) as c, pytest.raises(ConnectionRefusedError):
            c.connect(target)
        with net.pod("a").space.socket(family, UDP) as c, pytest.raises(ConnectionRefusedError):
            c.connect(target)
            c.send(b"?")
            c.recv(1)


@pytest.mark.parametrize("family", [4, 6])
def test_an_address_without_a_pod_is_unreachable_at_once(net: Lab, family: int) -> None:
    node, other = net.nodes
    if net.mode.overlay:
        remote = rows.Remote(WORLD, POD | TUNNEL, addr(other.addr[4]))
        node.dp.put("ipcache", prefix(other.cidr[family]), remote)
    for near in (node, other):
        gone = near.router[family] + "99"
        with net.pod("a").space.socket(family, TCP) as c, pytest.raises(OSError, match=r"No route to host|unreachable"):
            c.connect((gone, 80))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize(("ttl", "answering"), [(1, 0), (2, 1)])
def test_time_exceeded_comes_from_each_node(net: Lab, family: int, ttl: int, answering: int) -> None:
    if not net.mode.overlay and ttl == 2:
        expected = {net.nodes[0].addr[family][:-1] + "1"}
    else:
        node = net.nodes[answering]
        expected = {node.router[family], node.addr[family]}
    assert hop(net.pod("a").space, family, net.pod("c").addr[family], ttl) in expected


@pytest.mark.parametrize("family", [4, 6])
def test_a_packet_too_big_for_the_way_is_answered(net: Lab, family: int) -> None:
    pod, node, server = net.pod("a"), net.nodes[0], net.pod("c")
    device = "fimvx" if net.mode.overlay else "eth0"
    try:
        pod.space.ip("link set eth0 mtu 1500")
        node.space.ip(f"link set {pod.device} mtu 1500")
        if not net.mode.overlay:
            node.space.ip(f"link set {device} mtu 1450")
        with pod.space.socket(family, UDP) as c:
            assert path_mtu(c, family, (server.addr[family], 9)) == 1450
    finally:
        pod.space.ip("link set eth0 mtu 1450")
        node.space.ip(f"link set {pod.device} mtu 1450")
        node.space.ip(f"link set {device} mtu {1450 if net.mode.overlay else 1500}")


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("server", ["b", "c"])
def test_policy_is_enforced_and_lifted_on_a_connection(net: Lab, server: str, family: int) -> None:
    node, pod, client = net.node_of(server), net.pod(server), net.pod("a")
    node.dp.policy_set(5, {})
    with pod.space.socket(family, TCP) as listener, client.space.socket(family, TCP) as c:
        listener.bind((pod.addr[family], 0))
        listener.listen()
        c.connect(listener.getsockname()[:2])
        s, _ = listener.accept()
        with s:
            s.settimeout(3)
            exchange(c, s, b"before")
            node.endpoint(pod, READY | ENFORCE_INGRESS, 5)
            node.rejudge()
            c.send(b"during")
            s.settimeout(0.3)
            with pytest.raises(TimeoutError):
                s.recv(10)
            allow = rows.PolicyKey(48, IDENTITY["a"], INGRESS, socket.IPPROTO_TCP, 0)
            node.dp.policy_set(5, {allow: rows.PolicyEntry(1, 0, 900)})
            s.settimeout(5)
            assert s.recv(10) == b"during"
            exchange(s, c, b"answer")
    with client.space.socket(family, UDP) as c:
        c.settimeout(0.2)
        c.connect((pod.addr[family], 9))
        c.send(b"?")
        with pytest.raises(TimeoutError):
            c.recv(1)
    node.endpoint(pod)
    node.rejudge()
