"""Real clients outside two nodes reach Services: pods here and there, and the nodes themselves."""

import contextlib
import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from datapath import ENFORCE_INGRESS, INGRESS, READY, REMOTE_NODE, WORLD, addr

from fimbria.kernel.probe import has_tcx
from fimbria.model import rows
from lab import TCP, UDP, Lab, Mode, Node, Space, exchange, lab, tcp_service

HOOKS = (True, False) if has_tcx() else (False,)
MODES = [Mode(overlay, fast, tcx) for overlay in (True, False) for fast in (True, False) for tcx in HOOKS]
NODE_PORT, FRONT_PORT, BACKEND_PORT = 30080, 80, 8080
FRONT = {4: "198.51.100.10", 6: "fd96:1::10"}  # no device has it
CLIENT = {4: "192.168.9.2", 6: "fd01:9::2"}
NODE_PORT_FLAG, DIRECT_FLAG = 2, 512
SIZES = (10, 1400, 4000)  # the last one in fragments


@dataclass
class Outside:
    """Two nodes, and a client beyond the router."""

    lab: Lab
    client: Space

    @property
    def nodes(self) -> list[Node]:
        return self.lab.nodes

    @property
    def overlay(self) -> bool:
        return self.lab.mode.overlay


@pytest.fixture(scope="module", params=MODES, ids=str)
def net(request: pytest.FixtureRequest) -> Iterator[Outside]:
    with lab(request.param) as built, contextlib.closing(Space("k")) as client:
        built.fabric.ip(f"link add k type veth peer name eth0 netns {client.name}")
        built.fabric.ip("link set k up")
        client.ip("link set eth0 up")
        for family, address in CLIENT.items():
            gateway, length = address[:-1] + "1", 24 if family == 4 else 64
            nodad = " nodad" if family == 6 else ""
            built.fabric.ip(f"addr add {gateway}/{length} dev k{nodad}")
            client.ip(f"addr add {address}/{length} dev eth0{nodad}")
            client.ip(f"route add default via {gateway}")
            built.fabric.ip(f"route add {FRONT[family]} via {built.nodes[0].addr[family]}")
        for name in ("all", "n1", "n2"):
            # Direct answers come from where the router wouldn't send to their source.
            built.fabric.sysctl(**{f"ipv4__conf__{name}__rp_filter": 0})
        yield Outside(built, client)


@pytest.fixture(autouse=True)
def _no_former_connections(net: Outside) -> Iterator[None]:
    yield
    forget_connections(net.nodes)


def forget_connections(nodes: list[Node]) -> None:
    """The kernel may give a client a port that an earlier test's had, whose connection to another backend is known."""
    for node in nodes:
        for table in (node.dp.maps[name] for name in ("conntrack", "nat")):
            keys, _ = table.dump()
            if keys:
                table.delete_batch(keys, len(keys) // table.key_size)


@dataclass(frozen=True)
class Server:
    """Where a backend listens, and what it sees of clients that node 1 calls for."""

    space: Space
    addr: str
    caller: str


def server(net: Outside, name: str, family: int) -> Server:
    first, second = net.nodes
    if name in ("node", "other"):
        there = first if name == "node" else second
        return Server(there.space, there.addr[family], CLIENT[family] if there is first else first.addr[family])
    pod = net.lab.pod(name)
    if net.lab.node_of(name) is first:
        return Server(pod.space, pod.addr[family], CLIENT[family])
    return Server(pod.space, pod.addr[family], (first.router if net.overlay else first.addr)[family])


def serve(node: Node, family: int, backend: str, number: int = 40, flags: int = NODE_PORT_FLAG) -> None:
    """Node port 30080, and port 80 of FRONT, lead to `backend`, TCP and UDP."""
    every = addr("0.0.0.0" if family == 4 else "::")
    for proto in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        service = number + proto
        node.dp.put("backends", service, rows.Backend(addr(backend), BACKEND_PORT, proto))
        node.dp.put("service_slots", rows.SlotKey(service, 0), service)
        for front, port in ((every, NODE_PORT), (addr(FRONT[family]), FRONT_PORT)):
            node.dp.put("frontends", rows.FrontendKey(front, port, proto), rows.Frontend(service, 1, flags))


def datagrams(s: Server, client: Space, family: int, front: tuple[str, int]) -> list[str]:
    """Questions and answers of several sizes; returns the client's address as the server saw it each time."""
    seen = []
    with s.space.socket(family, UDP) as listener, client.socket(family, UDP) as c:
        listener.bind((s.addr, BACKEND_PORT))
        c.connect(front)
        for size in SIZES:
            peer = ask(c, listener, size) or ask(c, listener, size)
            assert peer
            listener.sendto(b"r" * size, peer)
            assert c.recv(65536) == b"r" * size
            seen.append(peer[0])
    return seen


def ask(c: socket.socket, listener: socket.socket, size: int) -> tuple[str, int] | None:
    """A question of this size. The first one that is too big for the way is lost, but the client hears of it."""
    try:
        c.send(b"q" * size)
    except OSError as e:  # the news reach it first
        assert e.errno == errno.EMSGSIZE
        c.send(b"q" * size)
    listener.settimeout(0.5)
    try:
        data, peer = listener.recvfrom(65536)
    except TimeoutError:
        return None
    assert data == b"q" * size
    return str(peer[0]), int(peer[1])


def refused(client: Space, family: int, front: tuple[str, int]) -> None:
    with client.socket(family, TCP) as c, pytest.raises(ConnectionRefusedError):
        c.connect(front)
    with client.socket(family, UDP) as c, pytest.raises(ConnectionRefusedError):
        c.connect(front)
        c.send(b"?")
        c.recv(1)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", ["a", "c", "node", "other"])
def test_every_place_of_a_backend(net: Outside, name: str, family: int) -> None:
    s = server(net, name, family)
    serve(net.nodes[0], family, s.addr)
    for front in ((net.nodes[0].addr[family], NODE_PORT), (FRONT[family], FRONT_PORT)):
        assert tcp_service(s.space, net.client, family, (s.addr, BACKEND_PORT), front) == s.caller
        assert datagrams(s, net.client, family, front) == [s.caller] * len(SIZES)
        # Nobody listens any more: the backend says so.
        refused(net.client, family, front)


@pytest.mark.parametrize("family", [4, 6])
def test_without_backends_clients_are_refused(net: Outside, family: int) -> None:
    node = net.nodes[0]
    serve(node, family, node.addr[family], number=80)
    every = addr("0.0.0.0" if family == 4 else "::")
    for proto in (socket.IPPROTO_TCP, socket.IPPROTO_UDP):
        empty = rows.Frontend(90 + proto, 0, NODE_PORT_FLAG)
        node.dp.put("frontends", rows.FrontendKey(every, NODE_PORT, proto), empty)
    refused(net.client, family, (node.addr[family], NODE_PORT))


@pytest.mark.parametrize("family", [4, 6])
def test_checksums_are_right_without_offload(net: Outside, family: int) -> None:
    devices = [(n.space, "eth0") for n in net.nodes] + [(net.lab.fabric, d) for d in ("n1", "n2")]
    devices += [(net.lab.pod(name).space, "eth0") for name in ("a", "c")]
    try:
        for space, device in devices:
            space.checksum_offload(device, False)
        for name in ("a", "c", "node", "other"):
            s = server(net, name, family)
            serve(net.nodes[0], family, s.addr)
            front = (net.nodes[0].addr[family], NODE_PORT)
            assert tcp_service(s.space, net.client, family, (s.addr, BACKEND_PORT), front) == s.caller
            assert datagrams(s, net.client, family, front) == [s.caller] * len(SIZES)
    finally:
        for space, device in devices:
            space.checksum_offload(device, True)


@contextlib.contextmanager
def listening(s: Server, family: int) -> Iterator[socket.socket]:
    with s.space.socket(family, TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((s.addr, BACKEND_PORT))
        listener.listen()
        yield listener


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", ["a", "c", "node", "other"])
def test_one_client_port_through_two_frontends(net: Outside, name: str, family: int) -> None:
    s = server(net, name, family)
    serve(net.nodes[0], family, s.addr)
    with listening(s, family) as listener, contextlib.ExitStack() as open_ones:
        pairs = []
        port = 0
        for front in ((net.nodes[0].addr[family], NODE_PORT), (FRONT[family], FRONT_PORT)):
            c = open_ones.enter_context(net.client.socket(family, TCP))
            c.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            c.bind((CLIENT[family], port))
            port = c.getsockname()[1]
            c.connect(front)
            accepted, peer = listener.accept()
            accepted.settimeout(3)
            pairs.append((c, open_ones.enter_context(accepted), peer))
        for number, (c, accepted, _) in enumerate(pairs * 2):
            exchange(c, accepted, b"question %d" % number)
            exchange(accepted, c, b"answer %d" % number)
        assert len({peer[1] for _, _, peer in pairs}) == 2


@pytest.mark.parametrize("family", [4, 6])
def test_policy_sees_the_client_or_who_calls_for_it(net: Outside, family: int) -> None:
    """Through the tunnel it is the world; a packet of the fabric is of the node whose address it has."""
    for name, peer in (("a", WORLD), ("c", WORLD if net.overlay else REMOTE_NODE)):
        s, node, pod = server(net, name, family), net.lab.node_of(name), net.lab.pod(name)
        serve(net.nodes[0], family, s.addr)
        front = (net.nodes[0].addr[family], NODE_PORT)
        allow = rows.PolicyKey(48, peer, INGRESS, socket.IPPROTO_TCP, 0)
        node.dp.policy_set(5, {})
        node.endpoint(pod, READY | ENFORCE_INGRESS, 5)
        node.rejudge()
        try:
            with listening(s, family), net.client.socket(family, TCP) as c, pytest.raises(TimeoutError):
                c.settimeout(0.3)
                c.connect(front)
            node.dp.policy_set(5, {allow: rows.PolicyEntry(1, 0, 900)})
            node.rejudge()
            assert tcp_service(s.space, net.client, family, (s.addr, BACKEND_PORT), front) == s.caller
        finally:
            node.endpoint(pod)
            node.rejudge()


@pytest.mark.parametrize("family", [4, 6])
def test_the_backends_node_answers_directly(net: Outside, family: int) -> None:
    s = server(net, "c", family)
    for node in net.nodes:
        serve(node, family, s.addr, flags=NODE_PORT_FLAG | DIRECT_FLAG)
    for front in ((net.nodes[0].addr[family], NODE_PORT), (FRONT[family], FRONT_PORT)):
        assert tcp_service(s.space, net.client, family, (s.addr, BACKEND_PORT), front) == CLIENT[family]
        # IPv4's fragments have no room for the frontend, and nobody to be told.
        last = CLIENT[family] if net.overlay or family == 6 else s.caller
        assert datagrams(s, net.client, family, front) == [CLIENT[family], CLIENT[family], last]
        refused(net.client, family, front)
