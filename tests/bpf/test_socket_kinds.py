"""Services by socket beyond cluster IPs: node ports, scopes, affinity, exemptions, and ports that the node loses."""

import errno
import select
import socket
import struct

import pytest
from sockets import (
    BACKENDS,
    CASES,
    FRONTEND,
    HOST_ADDR,
    OTHER_FRONTEND,
    POD_ADDR,
    TCP,
    UDP,
    Net,
    Services,
    client_address,
)  # fmt: skip

from fimbria.kernel import netns
from fimbria.kernel.maps import MapFlag, MapType, create_map

ANY = {4: "0.0.0.0", 6: "::"}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
REMOTE = {4: "192.0.2.7", 6: "fd66::7"}
PORT = 30080
TABLE_SIZE = 16381
both = pytest.mark.parametrize("family", [4, 6])
kinds = pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])


def servers(net: Net, family: int, kind: int, n: int = 1) -> dict[int, socket.socket]:
    """Backends by id, from 1 on."""
    return {i: net.server(BACKENDS[family][i - 1], kind) for i in range(1, n + 1)}


def backends(of: dict[int, socket.socket]) -> dict[int, tuple[str, int]]:
    return {n: s.getsockname()[:2] for n, s in of.items()}


def reached(net: Net, of: dict[int, socket.socket], at: tuple[str, int], client: int, kind: int, *,
            pod: bool = False) -> int:  # fmt: skip
    """Which backend a new socket gets. Raises OSError when it gets none."""
    c = net.open(client, kind, pod=pod)
    c.connect(at)
    if kind == UDP:
        c.send(b"x")
    assert c.getpeername()[:2] == at
    # The last segment of a handshake through a veth pair may still be on its way.
    ready, _, _ = select.select(list(of.values()), [], [], 5)
    hit = [n for n, s in of.items() if s in ready]
    for s in ready:
        s.recv(8) if kind == UDP else s.accept()[0].close()
    c.close()
    (backend,) = hit
    return backend


def refused(net: Net, at: tuple[str, int], client: int, kind: int, *, pod: bool = False) -> bool:
    """By us: the error comes from connect() itself, also for UDP."""
    try:
        net.open(client, kind, pod=pod).connect(at)
    except ConnectionRefusedError:
        return True
    return False


# -- node ports


@CASES
@kinds
@pytest.mark.parametrize("pod", [False, True], ids=["node", "pod"])
def test_a_node_port_on_any_nodes_address(
    services: Services, net: Net, client: int, family: int, kind: int, pod: bool
) -> None:
    of = servers(net, family, kind)
    services.frontend((ANY[family], PORT), kind, 7, backends(of), "NODE_PORT")
    services.node_address(HOST_ADDR[family], own=True)
    services.node_address(REMOTE[family], own=False)
    for address in (HOST_ADDR, REMOTE):
        assert reached(net, of, (client_address(client, address[family]), PORT), client, kind, pod=pod) == 1


@CASES
def test_an_unconnected_socket_uses_a_node_port(services: Services, net: Net, client: int, family: int) -> None:
    of = servers(net, family, UDP)
    services.frontend((ANY[family], PORT), UDP, 7, backends(of), "NODE_PORT")
    services.node_address(REMOTE[family], own=False)
    c, at = net.open(client, UDP, pod=True), (client_address(client, REMOTE[family]), PORT)
    c.sendto(b"q", at)
    data, source = of[1].recvfrom(8)
    of[1].sendto(b"a", source)
    got, peer = c.recvfrom(8)
    assert (data, got, peer[:2]) == (b"q", b"a", at)


@CASES
def test_a_node_port_of_another_nodes_own_endpoints_is_left_to_it(
    services: Services, net: Net, client: int, family: int
) -> None:
    of = servers(net, family, UDP, 2)
    services.frontend((ANY[family], PORT), UDP, 7, {}, "NODE_PORT TWO_SCOPES SILENT")
    services.frontend((ANY[family], PORT), UDP, 8, backends(of), "NODE_PORT TWO_SCOPES", scope=1)
    services.node_address(HOST_ADDR[family], own=True)
    services.node_address(REMOTE[family], own=False)
    own, other = ((client_address(client, a[family]), PORT) for a in (HOST_ADDR, REMOTE))
    assert reached(net, of, own, client, UDP, pod=True) in (1, 2)
    services.maps["sock_revnat"].delete(next(iter(services.maps["sock_revnat"].items()))[0])
    net.open(client, UDP, pod=True).connect(other)
    assert not list(services.maps["sock_revnat"].items())


@CASES
def test_who_is_no_node_has_no_node_port(services: Services, net: Net, client: int, family: int) -> None:
    of = servers(net, family, UDP)
    services.frontend((ANY[family], PORT), UDP, 7, backends(of), "NODE_PORT")
    direct = net.server(HOST_ADDR[family], UDP, PORT)
    c = net.open(client, UDP, pod=True)
    c.connect((client_address(client, HOST_ADDR[family]), PORT))
    c.send(b"x")
    assert direct.recv(8) == b"x"


# -- loopback


@CASES
@kinds
@pytest.mark.parametrize("unspecified", [False, True], ids=["loopback", "unspecified"])
def test_loopback_is_the_nodes_in_its_own_namespace(
    services: Services, net: Net, client: int, family: int, kind: int, unspecified: bool
) -> None:
    of = servers(net, family, kind)
    services.frontend((ANY[family], PORT), kind, 7, backends(of), "NODE_PORT")
    services.frontend((LOOPBACK[family], 8888), kind, 8, backends(of), "HOST_PORT")
    for port in (PORT, 8888):
        at = (client_address(client, (ANY if unspecified else LOOPBACK)[family]), port)
        c = net.open(client, kind)
        c.connect(at)
        if kind == UDP:
            c.send(b"x")
            assert of[1].recv(8) == b"x"
        else:
            of[1].accept()[0].close()


@CASES
@kinds
@pytest.mark.parametrize("address", [LOOPBACK, ANY], ids=["loopback", "unspecified"])
def test_a_pods_loopback_is_its_own(
    services: Services, net: Net, client: int, family: int, kind: int, address: dict[int, str]
) -> None:
    of = servers(net, family, kind)
    services.frontend((ANY[family], PORT), kind, 7, backends(of), "NODE_PORT")
    own = net.server(LOOPBACK[family], kind, PORT, pod=True)
    c = net.open(client, kind, pod=True)
    c.connect((client_address(client, address[family]), PORT))
    if kind == UDP:
        c.send(b"x")
        assert own.recv(8) == b"x"
    else:
        own.accept()[0].close()


# -- who may, and which backend


@CASES
@kinds
def test_an_unknown_port_of_a_service_address_is_refused(
    services: Services, net: Net, client: int, family: int, kind: int
) -> None:
    services.frontend((FRONTEND[family], 0), 0, 0, {}, "ADDRESS CLUSTER_IP")
    at = (client_address(client, FRONTEND[family]), 81)
    assert refused(net, at, client, kind) and refused(net, at, client, kind, pod=True)
    if kind == UDP:
        with pytest.raises(ConnectionRefusedError):
            net.open(client, kind).sendto(b"x", at)
    # A node's address has other ports than those of services.
    services.frontend((HOST_ADDR[family], 0), 0, 0, {}, "ADDRESS")
    services.node_address(HOST_ADDR[family], own=True)
    direct = net.server(HOST_ADDR[family], kind)
    net.open(client, kind).connect((client_address(client, HOST_ADDR[family]), direct.getsockname()[1]))


@CASES
def test_sockets_are_inside(services: Services, net: Net, client: int, family: int) -> None:
    of = servers(net, family, TCP, 2)
    first, second = ({n: at} for n, at in backends(of).items())
    services.frontend((FRONTEND[family], 80), TCP, 7, first, "TWO_SCOPES")
    services.frontend((FRONTEND[family], 80), TCP, 8, second, "TWO_SCOPES", scope=1)
    services.frontend((OTHER_FRONTEND[family], 80), TCP, 9, first, "CLUSTER_IP")
    assert reached(net, of, (client_address(client, FRONTEND[family]), 80), client, TCP, pod=True) == 2
    assert reached(net, of, (client_address(client, OTHER_FRONTEND[family]), 80), client, TCP, pod=True) == 1


@CASES
@kinds
@pytest.mark.parametrize("flags", ["", "SOURCE_DENY"], ids=["allow", "deny"])
def test_a_node_without_an_address_is_in_no_source_range(
    services: Services, net: Net, client: int, family: int, kind: int, flags: str
) -> None:
    """And isn't known not to be in one; see test_socket_ranges.py for others."""
    of = servers(net, family, kind)
    services.frontend((FRONTEND[family], 80), kind, 7, backends(of), f"SOURCE_RANGES {flags}")
    with pytest.raises(PermissionError):
        net.open(client, kind).connect((client_address(client, FRONTEND[family]), 80))


@CASES
@kinds
def test_affinity_is_the_namespaces(services: Services, net: Net, client: int, family: int, kind: int) -> None:
    of = servers(net, family, kind, 4)
    services.frontend((FRONTEND[family], 80), kind, 7, backends(of), "AFFINITY", affinity=600)
    at = (client_address(client, FRONTEND[family]), 80)
    for pod in (False, True):
        assert len({reached(net, of, at, client, kind, pod=pod) for _ in range(20)}) == 1
    spaces = {k[:8] for k, _ in services.maps["affinity"].items()}
    assert spaces == {struct.pack("=Q", netns.cookie(fd)) for fd in (net.netns, net.pod_netns)}
    kept = reached(net, of, at, client, kind)
    assert services.maps["service_members"].delete(struct.pack("=II", 7, kept))
    services.frontend((FRONTEND[family], 80), kind, 7, {n: b for n, b in backends(of).items() if n != kept},
                      "AFFINITY", affinity=600)  # fmt: skip
    assert kept not in {reached(net, of, at, client, kind) for _ in range(20)}


def fill(services: Services, service: int, backend: int) -> None:
    with create_map(MapType.ARRAY, 4, 4, TABLE_SIZE, MapFlag.MMAPABLE, "service_table") as inner:
        keys, values = range(TABLE_SIZE), [backend] * TABLE_SIZE
        inner.update_batch(struct.pack(f"={TABLE_SIZE}I", *keys), struct.pack(f"={TABLE_SIZE}I", *values), TABLE_SIZE)
        services.maps["service_tables"].update(struct.pack("=I", service), struct.pack("=i", inner.fd))


@CASES
@kinds
def test_a_table_decides_instead_of_slots(services: Services, net: Net, client: int, family: int, kind: int) -> None:
    of = servers(net, family, kind, 2)
    services.frontend((FRONTEND[family], 80), kind, 7, backends(of), "TABLE HASH")
    fill(services, 7, 2)
    at = (client_address(client, FRONTEND[family]), 80)
    assert {reached(net, of, at, client, kind) for _ in range(10)} == {2}
    if kind == UDP:
        c = net.open(client, UDP)
        c.sendto(b"x", at)
        c.sendto(b"x", at)
        assert of[2].recv(8) + of[2].recv(8) == b"xx"
        fill(services, 7, 1)
        c.sendto(b"x", at)
        assert of[1].recv(8) == b"x"


@CASES
@kinds
def test_exempt_namespaces_see_addresses_as_they_are(
    services: Services, net: Net, client: int, family: int, kind: int
) -> None:
    """The service's address is the node's own here, so that there is somebody to be reached."""
    of, direct = servers(net, family, kind), net.server(HOST_ADDR[family], kind, 8081)
    everyone = {**of, 0: direct}
    services.frontend((HOST_ADDR[family], 8081), kind, 7, backends(of), "EXEMPT")
    at = (client_address(client, HOST_ADDR[family]), 8081)
    assert reached(net, everyone, at, client, kind, pod=True) == 1
    services.exempt(netns.cookie(net.pod_netns), 7)
    assert reached(net, everyone, at, client, kind, pod=True) == 0
    assert reached(net, everyone, at, client, kind) == 1
    services.exempt(netns.cookie(net.netns), 0)
    assert reached(net, everyone, at, client, kind) == 0


@CASES
def test_a_pods_tcp_socket_with_a_port_of_its_own_is_left_to_the_packet_path(
    services: Services, net: Net, client: int, family: int
) -> None:
    of, direct = servers(net, family, TCP), net.server(HOST_ADDR[family], TCP, 8081)
    services.frontend((HOST_ADDR[family], 8081), TCP, 7, backends(of))
    at = (client_address(client, HOST_ADDR[family]), 8081)
    for pod, accepts in ((True, direct), (False, of[1])):
        c = net.open(client, TCP, pod=pod)
        c.bind((client_address(client, (POD_ADDR if pod else HOST_ADDR)[family]), 0))
        c.connect(at)
        accepts.accept()[0].close()


@both
def test_a_pods_connecting_udp_socket_likewise(services: Services, net: Net, family: int) -> None:
    of, direct = servers(net, family, UDP), net.server(HOST_ADDR[family], UDP, 8081)
    services.frontend((HOST_ADDR[family], 8081), UDP, 7, backends(of))
    for pod, hears in ((True, direct), (False, of[1])):
        c = net.open(family, UDP, pod=pod)
        c.bind(((POD_ADDR if pod else HOST_ADDR)[family], 0))
        c.connect((HOST_ADDR[family], 8081))
        c.send(b"x")
        assert hears.recv(8) == b"x"


@both
def test_a_pods_unconnected_udp_socket_is_translated_whatever_its_port(
    services: Services, net: Net, family: int
) -> None:
    of = servers(net, family, UDP)
    services.frontend((FRONTEND[family], 53), UDP, 7, backends(of))
    c = net.open(family, UDP, pod=True)
    c.bind((POD_ADDR[family], 0))
    c.sendto(b"x", (FRONTEND[family], 53))
    assert of[1].recv(8) == b"x"


# -- bind


def bind_error(net: Net, family: int, kind: int, at: tuple[str, int], *, pod: bool = False) -> int:
    with net.open(family, kind, pod=pod) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(at)
        except OSError as error:
            return error.errno or 0
    return 0


@both
@kinds
def test_the_nodes_processes_cannot_have_a_node_port(services: Services, net: Net, family: int, kind: int) -> None:
    services.frontend((ANY[family], PORT), kind, 7, {}, "NODE_PORT")
    services.node_address(HOST_ADDR[family], own=True)
    for address in (ANY, HOST_ADDR, LOOPBACK):
        assert bind_error(net, family, kind, (address[family], PORT)) == errno.EADDRINUSE
        assert bind_error(net, family, kind, (address[family], PORT + 1)) == 0
        assert bind_error(net, family, TCP + UDP - kind, (address[family], PORT)) == 0
    # An address that isn't the node's towards the cluster, port 0, and pods.
    assert bind_error(net, family, kind, (BACKENDS[family][0], PORT)) == 0
    assert bind_error(net, family, kind, (ANY[family], 0)) == 0
    for address in (ANY, POD_ADDR, LOOPBACK):
        assert bind_error(net, family, kind, (address[family], PORT), pod=True) == 0


@kinds
def test_an_ipv6_socket_takes_ipv4s_ports_too(services: Services, net: Net, kind: int) -> None:
    services.frontend((ANY[4], PORT), kind, 7, {}, "NODE_PORT")
    services.node_address(HOST_ADDR[4], own=True)
    for address in ("::", "::ffff:0.0.0.0", f"::ffff:{HOST_ADDR[4]}", "::ffff:127.0.0.1"):
        assert bind_error(net, 6, kind, (address, PORT)) == errno.EADDRINUSE
    assert bind_error(net, 6, kind, ("::1", PORT)) == 0
    services.delete((ANY[4], PORT), kind)
    services.frontend((ANY[6], PORT), kind, 7, {}, "NODE_PORT")
    assert bind_error(net, 4, kind, (ANY[4], PORT)) == 0
    assert bind_error(net, 6, kind, ("::", PORT)) == errno.EADDRINUSE
