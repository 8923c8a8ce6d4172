"""Source ranges by socket: the node's processes are taken for its address, pods are left to the packet path."""

import errno
import socket
import struct
from collections.abc import Iterator

import pytest
from datapath import addr
from sockets import (
    BACKENDS,
    CASES,
    FRONTEND,
    HOST_ADDR,
    OTHER_FRONTEND,
    TCP,
    UDP,
    Net,
    Services,
    client_address,
    loaded,
)

kinds = pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])
NUMBER = 7


@pytest.fixture(scope="module")
def made() -> Iterator[tuple[Services, Net]]:
    with loaded(cfg_node_addr4=addr(HOST_ADDR[4]), cfg_node_addr6=addr(HOST_ADDR[6])) as pair:
        yield pair


@pytest.fixture
def node(made: tuple[Services, Net]) -> Iterator[tuple[Services, Net]]:
    made[0].clear()
    yield made
    made[1].close()


def ranged(services: Services, server: socket.socket, at: tuple[str, int], kind: int, listed: str = "",
           flags: str = "") -> None:  # fmt: skip
    """A frontend of the server's for this address, or whom the flags say."""
    services.frontend(at, kind, NUMBER, {1: server.getsockname()[:2]}, f"SOURCE_RANGES {flags}")
    if listed:
        key = struct.pack("=II", 32 + 128, NUMBER) + addr(listed)
        services.maps["source_ranges"].update(key, struct.pack("=I", 1))


def reach(s: socket.socket, server: socket.socket, at: tuple[str, int], kind: int) -> None:
    s.connect(at)
    assert s.getpeername()[:2] == at
    if kind == TCP:
        server.accept()[0].close()
    else:
        s.send(b"x")
        assert server.recv(8) == b"x"


def error_of(s: socket.socket, at: tuple[str, int], *, sends: bool = False) -> int:
    try:
        s.sendto(b"x", at) if sends else s.connect(at)
    except OSError as error:
        return error.errno or 0
    return 0


@CASES
@kinds
@pytest.mark.parametrize("deny", [False, True], ids=["allow", "deny"])
def test_the_nodes_address_counts(node: tuple[Services, Net], client: int, family: int, kind: int, deny: bool) -> None:
    services, net = node
    server = net.server(BACKENDS[family][0], kind)
    front, other = (FRONTEND[family], 80), (OTHER_FRONTEND[family], 80)
    at = client_address(client, FRONTEND[family]), 80
    flags = "SOURCE_DENY" if deny else ""
    ranged(services, server, front, kind, BACKENDS[family][1], flags)  # somebody else
    services.frontend(other, kind, NUMBER, {1: server.getsockname()[:2]})
    if deny:
        reach(net.open(client, kind), server, at, kind)
    else:
        assert error_of(net.open(client, kind), at) == errno.EPERM
    ranged(services, server, front, kind, HOST_ADDR[family], flags)
    if deny:
        assert error_of(net.open(client, kind), at) == errno.EPERM
        # Whatever it is bound to.
        bound = net.open(client, kind)
        bound.bind((client_address(client, BACKENDS[family][2]), 0))
        assert error_of(bound, at) == errno.EPERM
    else:
        reach(net.open(client, kind), server, at, kind)
    # Another frontend of the same service is for everybody.
    reach(net.open(client, kind), server, (client_address(client, OTHER_FRONTEND[family]), 80), kind)


@CASES
def test_each_datagram_is_looked_at(node: tuple[Services, Net], client: int, family: int) -> None:
    """A socket that names its peer each time loses the service with its ranges, a connected one keeps it."""
    services, net = node
    server = net.server(BACKENDS[family][0], UDP)
    at = client_address(client, FRONTEND[family]), 80
    ranged(services, server, (FRONTEND[family], 80), UDP, HOST_ADDR[family])
    loose, fixed = net.open(client, UDP), net.open(client, UDP)
    fixed.connect(at)
    loose.sendto(b"x", at)
    fixed.send(b"x")
    for _ in range(2):
        server.sendto(*server.recvfrom(8))
    assert loose.recvfrom(8)[1][:2] == at and fixed.recv(8) == b"x"
    assert services.maps["source_ranges"].delete(struct.pack("=II", 32 + 128, NUMBER) + addr(HOST_ADDR[family]))
    assert error_of(loose, at, sends=True) == errno.EPERM
    fixed.send(b"y")
    assert server.recv(8) == b"y"


@CASES
@kinds
@pytest.mark.parametrize("flags", ["", "SOURCE_DENY"], ids=["allow", "deny"])
def test_pods_are_left_to_the_packet_path(
    node: tuple[Services, Net], client: int, family: int, kind: int, flags: str
) -> None:
    """The service's address is the node's own here, so that there is somebody to be reached."""
    services, net = node
    server, direct = net.server(BACKENDS[family][0], kind), net.server(HOST_ADDR[family], kind, 8081)
    at = client_address(client, HOST_ADDR[family]), 8081
    ranged(services, server, (HOST_ADDR[family], 8081), kind, HOST_ADDR[family], flags)
    reach(net.open(client, kind, pod=True), direct, at, kind)
    if kind == UDP:
        net.open(client, UDP, pod=True).sendto(b"z", at)
        assert direct.recv(8) == b"z"
