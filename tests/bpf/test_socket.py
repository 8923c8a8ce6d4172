"""Services by socket, with real sockets: there and back, in every spelling of an address."""

import errno
import os
import select
import socket
import struct
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from sockets import BACKENDS, CASES, FRONTEND, OTHER_FRONTEND, TCP, UDP, Net, Services, client_address

from fimbria.kernel._libbpf import lib
from fimbria.kernel.fd import check


def exchange(server: socket.socket, text: bytes) -> None:
    """Answers one datagram from a socket that sees no service."""
    data, source = server.recvfrom(64)
    assert data == text
    server.sendto(b"re " + data, source)


@CASES
def test_tcp_reaches_the_backend_and_believes_in_the_frontend(
    services: Services, net: Net, client: int, family: int
) -> None:
    server = net.server(BACKENDS[family][0], TCP)
    services.frontend((FRONTEND[family], 80), TCP, 7, {3: server.getsockname()[:2]})
    c = net.open(client, TCP)
    at = client_address(client, FRONTEND[family])
    c.connect((at, 80))
    accepted, source = server.accept()
    with accepted:
        c.sendall(b"hello")
        assert accepted.recv(16) == b"hello"
        assert source[:2] == (c.getsockname()[0].removeprefix("::ffff:"), c.getsockname()[1])
        assert c.getpeername()[:2] == (at, 80)
        assert accepted.getpeername()[:2] == source[:2]


@CASES
def test_tcp_fast_open_connects_with_its_first_data(services: Services, net: Net, client: int, family: int) -> None:
    server = net.server(BACKENDS[family][0], TCP)
    services.frontend((FRONTEND[family], 80), TCP, 7, {3: server.getsockname()[:2]})
    c = net.open(client, TCP)
    at = (client_address(client, FRONTEND[family]), 80)
    c.setblocking(True)  # without a cookie yet, it connects first and then sends
    c.sendto(b"hello", socket.MSG_FASTOPEN, at)
    with server.accept()[0] as accepted:
        assert accepted.recv(16) == b"hello"
        assert c.getpeername()[:2] == at


@CASES
def test_connected_udp(services: Services, net: Net, client: int, family: int) -> None:
    server = net.server(BACKENDS[family][0], UDP)
    services.frontend((FRONTEND[family], 53), UDP, 7, {3: server.getsockname()[:2]})
    c = net.open(client, UDP)
    at = client_address(client, FRONTEND[family])
    c.connect((at, 53))
    c.send(b"q")
    exchange(server, b"q")
    data, source = c.recvfrom(64)
    assert (data, source[:2]) == (b"re q", (at, 53))
    assert c.getpeername()[:2] == (at, 53)


@CASES
def test_one_unconnected_udp_socket_with_two_frontends_and_a_direct_peer(
    services: Services, net: Net, client: int, family: int
) -> None:
    first, second, direct = (net.server(address, UDP) for address in BACKENDS[family][:3])
    at = [client_address(client, f) for f in (FRONTEND[family], OTHER_FRONTEND[family])]
    services.frontend((FRONTEND[family], 53), UDP, 7, {3: first.getsockname()[:2]})
    services.frontend((OTHER_FRONTEND[family], 5353), UDP, 8, {4: second.getsockname()[:2]})
    bare = (client_address(client, BACKENDS[family][2]), direct.getsockname()[1])
    c = net.open(client, UDP)
    for _ in range(3):
        c.sendto(b"1", (at[0], 53))
        c.sendto(b"2", (at[1], 5353))
        c.sendto(b"3", bare)
        for server, text in ((second, b"2"), (direct, b"3"), (first, b"1")):
            exchange(server, text)
        got = [(data, source[:2]) for data, source in (c.recvfrom(64) for _ in range(3))]
        assert got == [(b"re 2", (at[1], 5353)), (b"re 3", bare), (b"re 1", (at[0], 53))]


@CASES
def test_the_same_socket_may_talk_to_the_backend_itself_afterwards(
    services: Services, net: Net, client: int, family: int
) -> None:
    server = net.server(BACKENDS[family][0], UDP)
    backend = server.getsockname()[:2]
    services.frontend((FRONTEND[family], 53), UDP, 7, {3: backend})
    c = net.open(client, UDP)
    c.sendto(b"by service", (client_address(client, FRONTEND[family]), 53))
    exchange(server, b"by service")
    assert c.recvfrom(64)[1][1] == 53
    bare = (client_address(client, backend[0]), backend[1])
    c.sendto(b"directly", bare)
    exchange(server, b"directly")
    assert c.recvfrom(64)[1][:2] == bare


@CASES
@pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])
def test_no_backends_is_refused_at_once(services: Services, net: Net, client: int, family: int, kind: int) -> None:
    services.frontend((FRONTEND[family], 80), kind, 7, {})
    at = (client_address(client, FRONTEND[family]), 80)
    with pytest.raises(ConnectionRefusedError):
        net.open(client, kind).connect(at)
    if kind == UDP:
        with pytest.raises(ConnectionRefusedError):
            net.open(client, kind).sendto(b"x", at)


def test_a_slot_without_its_backend_is_refused_too(services: Services, net: Net) -> None:
    services.frontend((FRONTEND[4], 80), TCP, 7, {3: (BACKENDS[4][0], 9)})
    services.maps["backends"].delete(struct.pack("=I", 3))
    with pytest.raises(ConnectionRefusedError):
        net.open(4, TCP).connect((FRONTEND[4], 80))


@CASES
def test_what_is_no_frontend_passes_untouched(services: Services, net: Net, client: int, family: int) -> None:
    server = net.server(BACKENDS[family][0], TCP)
    port = server.getsockname()[1]
    elsewhere = net.server(BACKENDS[family][1], TCP)
    # The backend's own address, once a frontend, of another protocol, and on another port.
    services.frontend((BACKENDS[family][0], port), TCP, 7, {3: elsewhere.getsockname()[:2]})
    services.delete((BACKENDS[family][0], port), TCP)
    services.frontend((BACKENDS[family][0], port), UDP, 8, {3: elsewhere.getsockname()[:2]})
    services.frontend((BACKENDS[family][0], port ^ 1), TCP, 9, {3: elsewhere.getsockname()[:2]})
    c = net.open(client, TCP)
    at = (client_address(client, BACKENDS[family][0]), port)
    c.connect(at)
    server.accept()[0].close()
    assert c.getpeername()[:2] == at
    assert not list(services.maps["sock_revnat"].items())


def test_other_protocols_are_left_alone(services: Services, net: Net) -> None:
    services.frontend((FRONTEND[4], 0), TCP, 7, {})
    s = socket.socket(fileno=check(lib.fim_socket_in(net.netns, socket.AF_INET, socket.SOCK_RAW, 1), "socket"))
    net.sockets.append(s)
    with pytest.raises(OSError) as raised:
        s.connect((FRONTEND[4], 0))
    assert raised.value.errno == errno.ENETUNREACH


@CASES
def test_connections_spread_evenly(services: Services, net: Net, client: int, family: int) -> None:
    servers = [net.server(address, TCP) for address in BACKENDS[family]]
    services.frontend((FRONTEND[family], 80), TCP, 7, {n: s.getsockname()[:2] for n, s in enumerate(servers, 1)})
    hits: Counter[int] = Counter()
    for _ in range(400):
        with net.open(client, TCP) as c:
            c.connect((client_address(client, FRONTEND[family]), 80))
            (hit,) = select.select(servers, [], [], 5)[0]
            hit.accept()[0].close()
            hits[servers.index(hit)] += 1
    # 400 in 4 slots: mean 100, standard deviation 8.7; outside of 7 of them about once in 10^11 runs.
    assert sum(hits.values()) == 400
    assert all(40 <= hits[n] <= 160 for n in range(4)), hits


def test_an_unconnected_socket_keeps_its_backend_and_only_loses_it_with_the_slot(services: Services, net: Net) -> None:
    servers = {n: net.server(address, UDP) for n, address in enumerate(BACKENDS[4], 1)}
    at = {n: s.getsockname()[:2] for n, s in servers.items()}

    def reached() -> int:
        c.sendto(b"x", (FRONTEND[4], 53))
        (hit,) = select.select(list(servers.values()), [], [], 5)[0]
        assert hit.recv(8) == b"x"
        return next(n for n, s in servers.items() if s is hit)

    services.frontend((FRONTEND[4], 53), UDP, 7, at)
    c = net.open(4, UDP)
    kept = reached()
    assert {reached() for _ in range(50)} == {kept}
    # Another backend goes: the last one moves into its slot, as the agent does it.
    gone = 1 if kept != 1 else 2
    order = [n for n in at if n != gone and n != 4]
    order.insert(gone - 1, 4)
    services.frontend((FRONTEND[4], 53), UDP, 7, {n: at[n] for n in order if n != gone})
    if kept != 4:
        assert {reached() for _ in range(50)} == {kept}
    # Its own goes, though another service still has it.
    services.frontend((FRONTEND[4], 53), UDP, 7, {n: at[n] for n in at if n not in (kept, gone)})
    moved = reached()
    assert moved not in (kept, gone)
    assert {reached() for _ in range(50)} == {moved}


def test_a_socket_of_another_cgroup_sees_no_services(services: Services, net: Net) -> None:
    services.frontend((FRONTEND[4], 80), TCP, 7, {})
    code = "import socket,sys\ntry: socket.create_connection((sys.argv[1], 80), 2)\nexcept OSError as e: print(e.errno)"
    outside = f"/proc/{os.getpid()}/fd/{net.netns}"
    root = next(m.split()[1] for m in Path("/proc/self/mounts").read_text().splitlines() if m.split()[2] == "cgroup2")
    script = f'echo $$ >{root}/cgroup.procs && exec nsenter --net={outside} python3 -c "$0" {FRONTEND[4]}'
    done = subprocess.run(["sh", "-c", script, code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == errno.ENETUNREACH
