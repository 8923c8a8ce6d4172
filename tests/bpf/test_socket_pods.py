"""--socket-services host: sockets of pods see Services' addresses as they are, those of the node don't."""

import socket
from collections.abc import Iterator

import pytest
from sockets import BACKENDS, FRONTEND, TCP, UDP, Net, Services, loaded


@pytest.fixture
def node() -> Iterator[tuple[Services, Net]]:
    with loaded(cfg_socket_pods=False) as pair:
        yield pair
        pair[1].close()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])
def test_only_the_nodes_sockets_are_translated(node: tuple[Services, Net], family: int, kind: int) -> None:
    services, net = node
    server = net.server(BACKENDS[family][0], kind)
    services.frontend((FRONTEND[family], 80), kind, 7, {1: server.getsockname()[:2]})
    mine = net.open(family, kind)
    mine.connect((FRONTEND[family], 80))
    if kind == UDP:
        mine.send(b"x")
        assert server.recv(8) == b"x"
    pod = net.open(family, kind, pod=True)
    pod.settimeout(0.3)
    try:
        pod.connect((FRONTEND[family], 80))
        if kind == UDP:
            pod.send(b"x")
        assert pod.getpeername()[0] == FRONTEND[family]
    except OSError:
        pass  # nobody has the address itself: as it should be
    server.settimeout(0.3)
    with pytest.raises(socket.timeout):
        if kind == UDP:
            server.recv(8)
        else:
            server.accept()
            server.accept()
