"""rtnetlink against the kernel: devices, addresses, routes, neighbours, the monitor, and speed."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import pytest

from fimbria.kernel import link, neighbour, netns, route, tc
from fimbria.kernel.links import clsact
from fimbria.kernel.monitor import Change, Group, Monitor
from fimbria.kernel.netlink import NetlinkError, NetlinkSocket, ResyncNeeded
from fimbria.kernel.route import NextHop, Route, RouteType, Scope, Table

V4, V6 = socket.AF_INET, socket.AF_INET6
OURS = 241
MAC_A, MAC_B = b"\x02\0\0\0\0\x01", b"\x02\0\0\0\0\x02"


class Pair(Protocol):
    """See conftest.py."""

    a: int
    b: int
    a_socket: NetlinkSocket
    b_socket: NetlinkSocket
    a_index: int
    b_index: int


def ip(text: str) -> bytes:
    return socket.inet_pton(V6 if ":" in text else V4, text)


@pytest.fixture
def alone(namespace: Callable[[], int]) -> Iterator[NetlinkSocket]:
    """A socket in a namespace with nothing but its loopback device, which is up."""
    with NetlinkSocket(namespace()) as sock:
        sock.do(link.change(1, up=True))
        yield sock


def test_a_veth_goes_straight_into_the_pod(namespace: Callable[[], int]) -> None:
    a, b = namespace(), namespace()
    with NetlinkSocket(a) as na, NetlinkSocket(b) as nb:
        spec = link.Veth("fimv1", "eth0", mtu=1450, mac=MAC_A, peer_mac=MAC_B, peer_netns_fd=b, up=True, group=7)
        na.do(link.create(spec))
        near, far = link.get(na, "fimv1"), link.get(nb, "eth0")
        assert near is not None and far is not None
        assert (near.kind, near.mtu, near.mac, near.group, near.up) == ("veth", 1450, MAC_A, 7, True)
        assert (far.mtu, far.mac, far.up) == (1450, MAC_B, False)
        assert (near.peer, far.peer) == (far.index, near.index)
        with pytest.raises(NetlinkError, match="create veth fimv1") as caught:
            na.do(link.create(spec))
        assert caught.value.errno == errno.EEXIST
        na.do(link.delete(near.index))
        assert link.get(na, "fimv1") is None and link.get(nb, "eth0") is None
        with pytest.raises(NetlinkError) as gone:
            na.do(link.delete(near.index))
        assert gone.value.errno == errno.ENODEV


def test_changing_a_device(pair: Pair, namespace: Callable[[], int]) -> None:
    na, index = pair.a_socket, pair.a_index
    long = "a-name-that-is-longer-than-fifteen-characters"
    na.do(
        link.change(
            index, mtu=1400, mac=MAC_A, alias="fimbria:pod", group=9, up=False,
            gso_max_size=60_000, gro_max_size=70_000,
        ),
        link.change(index, name="fimv9"),
    )  # fmt: skip
    inside = f"--net=/proc/{os.getpid()}/fd/{pair.a}"
    subprocess.run(["nsenter", inside, "ip", "link", "property", "add", "dev", "fimv9", "altname", long], check=True)
    d = link.get(na, long)
    assert d is not None
    assert (d.index, d.name, d.alias, d.group, d.up) == (index, "fimv9", "fimbria:pod", 9, False)
    assert (d.mtu, d.mac, d.gso_max_size, d.gro_max_size) == (1400, MAC_A, 60_000, 70_000)
    with NetlinkSocket(other := namespace()) as there:
        na.do(link.change(index, netns_fd=other))
        assert link.get(na, "fimv9") is None and link.get(there, "fimv9") is not None


def test_filtered_dumps(pair: Pair) -> None:
    na = pair.a_socket
    na.do(link.create(link.Bridge("fimbr", up=True)), link.create(link.Vxlan("fimvx", 8472, mtu=1450, ttl=9, up=True)))
    bridge = link.get(na, "fimbr")
    assert bridge is not None
    na.do(link.change(pair.a_index, master=bridge.index))
    assert {d.name for d in link.dump(na)} == {"lo", "fimv0", "fimbr", "fimvx"}
    assert [d.index for d in link.dump(na, master=bridge.index)] == [pair.a_index]
    assert [d.name for d in link.dump(na, kind="bridge")] == ["fimbr"]
    assert link.dump(na, kind="nosuchkind") == []
    vxlan = link.dump(na, kind="vxlan")[0]
    assert vxlan.vxlan == link.VxlanInfo(port=8472, collect_metadata=True, ttl=9)
    na.do(link.change(pair.a_index, master=0))
    assert link.dump(na, master=bridge.index) == []


def test_addresses(pair: Pair) -> None:
    na, index = pair.a_socket, pair.a_index
    four = link.Address(index, ip("10.7.0.1"), 24, Scope.LINK, noprefixroute=True)
    six = link.Address(index, ip("fd00::1"), 64, nodad=True)
    na.do(link.add_address(four), link.add_address(six), link.add_address(four))
    found = {a.address: a for a in link.dump_addresses(na, index=index)}
    assert (found[four.address].scope, found[four.address].noprefixroute) == (Scope.LINK, True)
    assert found[six.address].nodad and not found[six.address].flags & link.IFA_F_TENTATIVE
    assert {a.index for a in link.dump_addresses(na, index=index)} == {index}
    assert {len(a.address) for a in link.dump_addresses(na, family=V6)} == {16}
    na.do(link.delete_address(four))
    with pytest.raises(NetlinkError, match=r"delete address 10\.7\.0\.1/24") as caught:
        na.do(link.delete_address(four))
    assert caught.value.errno == errno.EADDRNOTAVAIL


def sample_routes(index: int) -> list[Route]:
    return [
        Route(ip("10.1.0.0"), 16, oif=index, scope=Scope.LINK, src=ip("10.0.0.1"), mtu=1400, protocol=OURS),
        Route(ip("10.2.0.0"), 24, type=RouteType.UNREACHABLE, protocol=OURS),
        Route(ip("10.3.0.0"), 24, type=RouteType.BLACKHOLE, protocol=OURS, table=1000, metric=7),
        Route(ip("10.4.0.0"), 24, oif=index, gateway=ip("169.254.1.1"), onlink=True, protocol=OURS),
        Route(ip("10.5.0.0"), 24, oif=index, gateway=ip("fe80::1"), protocol=OURS),
        Route(ip("10.6.0.0"), 24, protocol=OURS, nexthops=(
            NextHop(index, ip("10.0.0.2")), NextHop(index, ip("10.0.0.3"), 3))),
        Route(ip("0.0.0.0"), 0, oif=index, gateway=ip("10.0.0.2"), protocol=OURS),
        Route(ip("10.7.0.1"), 32, oif=index, type=RouteType.LOCAL, table=Table.LOCAL, scope=Scope.HOST, protocol=OURS),
        Route(ip("fd01::"), 64, type=RouteType.UNREACHABLE, metric=1024, protocol=OURS),
        Route(ip("fd02::"), 64, oif=index, metric=5, mtu=1280, protocol=OURS),
        Route(ip("fd03::1"), 128, oif=index, gateway=ip("fe80::1"), metric=1024, table=4_000_000, protocol=OURS),
        Route(ip("fd04::"), 64, metric=1024, protocol=OURS, nexthops=(
            NextHop(index, ip("fe80::1")), NextHop(index, ip("fe80::2")))),
    ]  # fmt: skip


def test_every_kind_of_route_reads_back_as_written(pair: Pair) -> None:
    na, routes = pair.a_socket, sample_routes(pair.a_index)
    na.do(*(route.add(r) for r in routes))
    assert set(route.dump(na, V4, protocol=OURS) + route.dump(na, V6, protocol=OURS)) == set(routes)
    na.do(*(route.replace(r) for r in routes))
    assert route.dump(na, V4, table=1000) == [routes[2]]
    assert route.dump(na, V6, table=4_000_000) == [routes[10]]
    assert route.dump(na, V4, table=4242) == []
    assert {r.oif for r in route.dump(na, V4, oif=1)} <= {1}
    na.do(*(route.delete(r) for r in routes))
    assert route.dump(na, V4, protocol=OURS) + route.dump(na, V6, protocol=OURS) == []


def test_looking_up(pair: Pair) -> None:
    na = pair.a_socket
    found = route.lookup(na, ip("10.0.0.77"))
    assert found is not None and found.oif == pair.a_index
    assert route.lookup(na, ip("192.0.2.1")) is None
    na.do(route.add(Route(ip("192.0.2.0"), 24, type=RouteType.UNREACHABLE)))
    assert route.lookup(na, ip("192.0.2.1")) is None


def test_a_refusal_names_the_route_and_says_why_and_stops_nobody(alone: NetlinkSocket) -> None:
    good = [Route(bytes([10, 9, i, 0]), 24, type=RouteType.UNREACHABLE) for i in range(3)]
    bad = Route(ip("10.9.99.0"), 24, gateway=ip("192.0.2.1"))
    outcome = alone.run([route.add(r) for r in (good[0], bad, good[1], good[0], good[2])])
    assert [e.errno if e else 0 for e in outcome] == [0, errno.ENETUNREACH, 0, errno.EEXIST, 0]
    assert outcome[1] is not None
    assert "add route 10.9.99.0/24 via 192.0.2.1 table 254" in str(outcome[1])
    assert outcome[1].explanation == "Nexthop has invalid gateway"
    assert set(route.dump(alone, V4, table=Table.MAIN)) >= {Route(r.dst, 24, type=RouteType.UNREACHABLE) for r in good}
    assert alone.run([]) == []


def test_neighbours(pair: Pair) -> None:
    na, index = pair.a_socket, pair.a_index
    rows = [
        neighbour.Neighbour(index, ip("10.0.0.9"), MAC_B, protocol=OURS),
        neighbour.Neighbour(index, ip("fd00::9"), MAC_B, extern_learn=True),
    ]
    proxy = neighbour.Neighbour(index, ip("10.0.0.77"), proxy=True)
    na.do(*(neighbour.replace(n) for n in (*rows, proxy)))
    assert rows[0] in neighbour.dump(na, V4, index=index)
    assert rows[1] in neighbour.dump(na, V6, index=index)
    assert [n.address for n in neighbour.dump(na, V4, proxy=True)] == [proxy.address]
    na.do(*(neighbour.delete(n) for n in (*rows, proxy)))
    assert neighbour.dump(na, V4, proxy=True) == []
    assert rows[0] not in neighbour.dump(na, V4)


async def test_the_monitor_tells_changes_in_order(pair: Pair) -> None:
    loop, woken, seen = asyncio.get_running_loop(), asyncio.Event(), list[Change]()
    groups = [Group.LINK, Group.IPV4_ROUTE, Group.NEIGH, Group.TC]
    with Monitor(groups, pair.a) as monitor:
        loop.add_reader(monitor.fileno(), woken.set)
        r = Route(ip("10.1.0.0"), 16, type=RouteType.UNREACHABLE, protocol=OURS)
        n = neighbour.Neighbour(pair.a_index, ip("10.0.0.9"), MAC_B, protocol=OURS)
        pair.a_socket.do(route.add(r), neighbour.replace(n), route.delete(r))
        netns.run(pair.a, partial(clsact, pair.a_index))
        pair.a_socket.do(link.change(pair.a_index, mtu=1300))
        try:
            while not any(isinstance(c.thing, link.Device) and c.thing.mtu == 1300 for c in seen):
                await asyncio.wait_for(woken.wait(), 5)
                woken.clear()
                seen += monitor.read()
        finally:
            loop.remove_reader(monitor.fileno())
        assert monitor.read() == []
    ours = [c for c in seen if getattr(c.thing, "protocol", 0) == OURS]
    assert ours == [Change(False, r), Change(False, n), Change(True, r)]
    assert any(isinstance(c.thing, tc.Qdisc) and c.thing.kind == "clsact" for c in seen)


def test_lost_notifications_ask_for_a_resync(namespace: Callable[[], int]) -> None:
    fd = namespace()
    with NetlinkSocket(fd) as sock, Monitor([Group.IPV4_ROUTE], fd) as monitor:
        rows = [Route(bytes([10, i >> 8, i & 255, 0]), 24, type=RouteType.BLACKHOLE) for i in range(40_000)]
        sock.do(*(route.add(r) for r in rows))
        with pytest.raises(ResyncNeeded):
            while monitor.read():
                pass
        while monitor.read():
            pass
        sock.do(route.delete(rows[0]))
        assert monitor.read() == [Change(True, rows[0])]


def test_sockets_of_one_namespace_leave_the_caller_where_it_is(namespace: Callable[[], int]) -> None:
    here = netns.inode("/proc/thread-self/ns/net")
    fd = namespace()
    with NetlinkSocket(fd) as sock:
        assert [d.name for d in link.dump(sock)] == ["lo"]
    assert netns.run(fd, lambda: netns.inode("/proc/thread-self/ns/net")) != here
    assert netns.inode("/proc/thread-self/ns/net") == here
    assert netns.cookie(fd) != netns.cookie() and netns.cookie(fd) == netns.run(fd, netns.cookie)


def test_a_namespace_by_name() -> None:
    path = f"{netns.RUN_DIR}/fimknamed{time.monotonic_ns()}"
    netns.create(path)
    try:
        assert path.rpartition("/")[2] in netns.named()
        with pytest.raises(FileExistsError):
            netns.create(path)
        with netns.opened(path) as fd, pytest.raises(ZeroDivisionError):
            netns.run(fd, lambda: 1 // 0)
    finally:
        assert netns.delete(path)
    assert not netns.delete(path) and path.rpartition("/")[2] not in netns.named()


def test_what_is_no_namespace() -> None:
    with open("/dev/null", "rb") as f:
        with pytest.raises(OSError, match="netlink socket in namespace"):
            NetlinkSocket(f.fileno())
        with pytest.raises(OSError, match="enter namespace"):
            netns.run(f.fileno(), lambda: None)
    assert netns.named("/nonexistent") == []
