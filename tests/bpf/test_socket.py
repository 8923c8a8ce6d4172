"""Services by socket, with real sockets: a sub-cgroup carries the programs, a network namespace the backends.

The test process itself joins the sub-cgroup, since a socket belongs to the cgroup of the process that makes it.
"""

import contextlib
import errno
import os
import socket
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import fimbria
from fimbria.kernel._libbpf import lib
from fimbria.kernel.fd import Fd, check
from fimbria.kernel.links import AttachType, attach_cgroup
from fimbria.kernel.maps import Map
from fimbria.kernel.objects import BpfObject

OBJECT = Path(fimbria.__file__).parent / "_bpf" / "socket.bpf.o"
HOOKS = {
    "sock_connect4": AttachType.CGROUP_INET4_CONNECT,
    "sock_connect6": AttachType.CGROUP_INET6_CONNECT,
    "sock_sendmsg4": AttachType.CGROUP_UDP4_SENDMSG,
    "sock_sendmsg6": AttachType.CGROUP_UDP6_SENDMSG,
    "sock_recvmsg4": AttachType.CGROUP_UDP4_RECVMSG,
    "sock_recvmsg6": AttachType.CGROUP_UDP6_RECVMSG,
    "sock_getpeername4": AttachType.CGROUP_INET4_GETPEERNAME,
    "sock_getpeername6": AttachType.CGROUP_INET6_GETPEERNAME,
}
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
PROTO: dict[int, int] = {TCP: socket.IPPROTO_TCP, UDP: socket.IPPROTO_UDP}
FRONTEND = {4: "10.96.0.10", 6: "fd96::10"}
OTHER_FRONTEND = {4: "10.96.0.11", 6: "fd96::11"}
BACKENDS = {4: [f"10.77.0.{n}" for n in range(1, 5)], 6: [f"fd77::{n}" for n in range(1, 5)]}
NETNS = f"fimsock{os.getpid()}"
Address = tuple[str, int]


def packed(address: str) -> bytes:
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address)
    return bytes(10) + b"\xff\xff" + socket.inet_aton(address)


class Services:
    """Writes the rows of a service by hand, as the agent would."""

    def __init__(self, maps: dict[str, Map]) -> None:
        self.maps = maps

    def frontend(self, at: Address, kind: int, service: int, backends: dict[int, Address]) -> None:
        """`backends`: by backend id, in slot order."""
        for slot, (number, (address, port)) in enumerate(backends.items()):
            value = packed(address) + struct.pack(">H", port) + bytes([PROTO[kind], 0])
            self.maps["backends"].update(struct.pack("=I", number), value)
            self.maps["service_slots"].update(struct.pack("=II", service, slot), struct.pack("=I", number))
        self.maps["frontends"].update(self.key(at, kind), struct.pack("=IIII", service, len(backends), 1, 0))

    def delete(self, at: Address, kind: int) -> None:
        assert self.maps["frontends"].delete(self.key(at, kind))

    def key(self, at: Address, kind: int) -> bytes:
        return packed(at[0]) + struct.pack(">H", at[1]) + bytes([PROTO[kind], 0])

    def clear(self) -> None:
        for m in self.maps.values():
            keys, _ = m.dump()
            m.delete_batch(keys, len(keys) // m.key_size)


class Net:
    """Sockets in the test's network namespace, all closed at its end."""

    def __init__(self, netns: int) -> None:
        self.netns = netns
        self.sockets: list[socket.socket] = []

    def open(self, family: int, kind: int) -> socket.socket:
        domain = socket.AF_INET if family == 4 else socket.AF_INET6
        s = socket.socket(fileno=check(lib.fim_socket_in(self.netns, domain, kind, 0), "socket"))
        s.settimeout(5)
        self.sockets.append(s)
        return s

    def server(self, address: str, kind: int) -> socket.socket:
        s = self.open(6 if ":" in address else 4, kind)
        s.bind((address, 0))
        if kind == TCP:
            s.listen(64)
        return s

    def close(self) -> None:
        for s in self.sockets:
            s.close()
        self.sockets.clear()


@contextlib.contextmanager
def sub_cgroup() -> Iterator[Path]:
    """Puts this process into a cgroup of its own, and back at the end."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = Path(next(m[1] for m in mounts if m[2] == "cgroup2"))
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    before = root / next(line[3:] for line in lines if line.startswith("0::")).lstrip("/")
    ours = root / f"fimsock{os.getpid()}"
    ours.mkdir()
    try:
        (ours / "cgroup.procs").write_text(str(os.getpid()))
        yield ours
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))
        ours.rmdir()


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True)


@contextlib.contextmanager
def network() -> Iterator[int]:
    ip("netns", "add", NETNS)
    try:
        ip("-n", NETNS, "link", "set", "lo", "up")
        for address in BACKENDS[4] + BACKENDS[6]:
            ip("-n", NETNS, "addr", "add", address, "dev", "lo", *(["nodad"] if ":" in address else []))
        with Fd(os.open(f"/run/netns/{NETNS}", os.O_RDONLY | os.O_CLOEXEC)) as fd:
            yield fd.fd
    finally:
        ip("netns", "del", NETNS)


@pytest.fixture(scope="module")
def node() -> Iterator[tuple[Services, Net]]:
    with contextlib.ExitStack() as stack:
        netns = stack.enter_context(network())
        cgroup = stack.enter_context(sub_cgroup())
        obj = stack.enter_context(BpfObject(OBJECT))
        obj.load()
        names = [name for name, spec in obj.maps.items() if not spec.internal]
        maps = {name: stack.enter_context(obj.map(name)) for name in names}
        for program, hook in HOOKS.items():
            with obj.program(program) as p:
                stack.enter_context(attach_cgroup(p, cgroup, hook))
        yield Services(maps), Net(netns)


@pytest.fixture
def services(node: tuple[Services, Net]) -> Iterator[Services]:
    yield node[0]
    node[0].clear()


@pytest.fixture
def net(node: tuple[Services, Net]) -> Iterator[Net]:
    yield node[1]
    node[1].close()


def client_address(client: int, frontend: str) -> str:
    """How a socket of family `client` spells `frontend`: IPv4-mapped on an IPv6 socket."""
    return frontend if client == 4 or ":" in frontend else f"::ffff:{frontend}"


CASES = pytest.mark.parametrize(
    ("client", "family"),
    [(4, 4), (6, 6), (6, 4)],
    ids=["ipv4", "ipv6", "mapped"],
)


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
    for s in servers:
        s.setblocking(False)
    for _ in range(400):
        with net.open(client, TCP) as c:
            c.connect((client_address(client, FRONTEND[family]), 80))
            for n, s in enumerate(servers):
                with contextlib.suppress(BlockingIOError):
                    s.accept()[0].close()
                    hits[n] += 1
    # 400 in 4 slots: mean 100, standard deviation 8.7; outside of 7 of them about once in 10^11 runs.
    assert sum(hits.values()) == 400
    assert all(40 <= hits[n] <= 160 for n in range(4)), hits


def test_an_unconnected_socket_keeps_its_backend_and_only_loses_it_with_the_slot(services: Services, net: Net) -> None:
    servers = {n: net.server(address, UDP) for n, address in enumerate(BACKENDS[4], 1)}
    at = {n: s.getsockname()[:2] for n, s in servers.items()}
    for s in servers.values():
        s.setblocking(False)

    def reached() -> int:
        c.sendto(b"x", (FRONTEND[4], 53))
        hit = []
        for n, s in servers.items():
            with contextlib.suppress(BlockingIOError):
                s.recv(8)
                hit.append(n)
        assert len(hit) == 1
        return hit[0]

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
