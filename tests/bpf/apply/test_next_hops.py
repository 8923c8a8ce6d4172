"""Next hops kept resolved by the kernel, between two namespaces: found, resolved, followed, given back."""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from fimbria.agent.next_hops import next_hops
from fimbria.apply.loop import ApplyLoop, Stage
from fimbria.apply.network import PROTOCOL, NextHopTarget, mapped
from fimbria.apply.rows import Rows
from fimbria.kernel import neighbour, netns, route
from fimbria.kernel.neighbour import Neighbour, NudState
from fimbria.kernel.netlink import NetlinkSocket
from fimbria.lab.slowness import factor
from fimbria.model.address import pack
from fimbria.model.network import NeighbourKey

US, THEM = (f"fimhop{os.getpid()}{which}" for which in "ab")
MAC = bytes.fromhex("020000000042")
ONE, TWO, ABSENT = "192.0.2.11", "192.0.2.12", "192.0.2.99"
ONE6 = "2001:db8::11"


def ip(name: str, *args: str) -> None:
    subprocess.run(["ip", "-n", name, *args], check=True)


@dataclass
class Node:
    """`us` with a device `up0` to `them`, where the others live."""

    netlink: NetlinkSocket
    uplink: int
    rows: Rows[NeighbourKey, bool]
    target: NextHopTarget
    fd: int

    def entries(self) -> dict[bytes, Neighbour]:
        families = socket.AF_INET, socket.AF_INET6
        return {
            mapped(n.address): n
            for family in families
            for n in neighbour.dump(self.netlink, family, index=self.uplink)
            if n.managed or n.state & NudState.PERMANENT or n.mac
        }

    def look(self, *addrs: str) -> set[str]:
        found = next_hops(self.netlink, [pack(a) for a in addrs], frozenset({self.uplink}))
        assert all(k.ifindex == self.uplink for k in found)
        return {str(socket.inet_ntop(*_shown(k.addr))) for k in found}

    def key(self, addr: str) -> NeighbourKey:
        return NeighbourKey(self.uplink, pack(addr))

    async def apply(self) -> None:
        loop = ApplyLoop([Stage(self.target, self.rows)])
        loop.open()
        await loop._audit(loop.stages)
        assert loop.failures() == {}

    def resolved(self, addr: str) -> bool:
        entry = self.entries().get(pack(addr))
        return entry is not None and len(entry.mac) == 6 and not entry.state & NudState.FAILED


def _shown(addr: bytes) -> tuple[int, bytes]:
    return (socket.AF_INET, addr[12:]) if addr[:12] == pack("0.0.0.0")[:12] else (socket.AF_INET6, addr)


@pytest.fixture
def node() -> Iterator[Node]:
    with ExitStack() as stack:
        os.makedirs("/run/netns", exist_ok=True)
        for name in (US, THEM):
            netns.create(f"/run/netns/{name}")
            stack.callback(netns.delete, f"/run/netns/{name}")
        ip(US, "link", "add", "up0", "type", "veth", "peer", "name", "down0", "netns", THEM)
        for name, device, addrs in ((US, "up0", ["192.0.2.1/24", "2001:db8::1/64"]),
                                    (THEM, "down0", [f"{ONE}/24", f"{TWO}/24", f"{ONE6}/64"])):  # fmt: skip
            ip(name, "link", "set", device, "up")
            for addr in addrs:
                ip(name, "addr", "add", addr, "dev", device, *(["nodad"] if ":" in addr else []))
        fd = stack.enter_context(netns.opened(f"/run/netns/{US}"))
        netlink = stack.enter_context(NetlinkSocket(fd))
        uplink = netns.run(fd, lambda: socket.if_nametoindex("up0"))
        rows: Rows[NeighbourKey, bool] = Rows("next_hops")
        yield Node(netlink, uplink, rows, NextHopTarget(netlink, lambda: list(rows.desired)), fd)


def eventually(condition: Callable[[], bool], seconds: float = 5) -> bool:
    deadline = time.monotonic() + seconds * factor()
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_nodes_on_the_link_and_gateways_are_next(node: Node) -> None:
    assert node.look(ONE, ONE6) == {ONE, ONE6}
    ip(US, "route", "add", "198.51.100.0/24", "via", TWO)
    assert node.look(ONE, "198.51.100.7") == {ONE, TWO}
    ip(US, "route", "add", "default", "nexthop", "via", "192.0.2.21", "nexthop", "via", "192.0.2.22")
    assert node.look() == {TWO, "192.0.2.21", "192.0.2.22"}
    ip(US, "route", "del", "198.51.100.0/24")
    assert TWO not in node.look(ONE)


def test_what_is_reached_by_another_device_or_not_at_all_is_nobodys_business(node: Node) -> None:
    ip(US, "link", "set", "lo", "up")
    ip(US, "route", "add", "unreachable", "203.0.113.0/24")
    assert node.look("192.0.2.1", "203.0.113.1", "8.8.8.8", "127.0.0.1") == set()


@pytest.mark.parametrize("addr", [ONE, ONE6])
async def test_a_next_hop_is_resolved_without_any_traffic(node: Node, addr: str) -> None:
    node.rows.put(node.key(addr), True)
    await node.apply()
    assert eventually(lambda: node.resolved(addr))
    entry = node.entries()[pack(addr)]
    assert (entry.managed, entry.extern_learn, entry.protocol) == (True, True, PROTOCOL)
    assert node.target.read() == {node.key(addr): True}


async def test_one_that_the_kernel_knew_already_becomes_ours_and_stays_known(node: Node) -> None:
    probe = netns.run(node.fd, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with probe:
        probe.sendto(b"x", (ONE, 9))
    assert eventually(lambda: node.resolved(ONE))
    assert not node.entries()[pack(ONE)].managed
    node.rows.put(node.key(ONE), True)
    await node.apply()
    assert node.entries()[pack(ONE)].managed
    assert node.resolved(ONE)


async def test_it_comes_back_when_somebody_flushes_and_goes_when_not_wanted(node: Node) -> None:
    node.rows.put(node.key(ONE), True)
    await node.apply()
    ip(US, "neigh", "del", ONE, "dev", "up0")
    assert node.target.read() == {}
    await node.apply()
    assert eventually(lambda: node.resolved(ONE))
    node.rows.drop(node.key(ONE))
    await node.apply()
    assert pack(ONE) not in node.entries()


async def test_a_restarted_agent_knows_its_own(node: Node) -> None:
    """Nothing but the kernel remembers."""
    node.rows.put(node.key(ONE), True)
    node.rows.put(node.key(TWO), True)
    await node.apply()
    again: Rows[NeighbourKey, bool] = Rows("next_hops")
    again.put(node.key(ONE), True)
    target = NextHopTarget(node.netlink, lambda: list(again.desired))
    loop = ApplyLoop([Stage(target, again)])
    loop.open()
    await loop._audit(loop.stages)
    assert target.read() == {node.key(ONE): True}


async def test_entries_of_others_are_left_alone(node: Node) -> None:
    """A permanent one serves as it is; others' managed ones aren't ours to remove."""
    fixed = Neighbour(node.uplink, socket.inet_aton(ONE), MAC)
    theirs = Neighbour(node.uplink, socket.inet_aton(TWO), state=0, managed=True, protocol=4)
    node.netlink.do(neighbour.replace(fixed), neighbour.replace(theirs))
    node.rows.put(node.key(ONE), True)
    await node.apply()
    assert (node.entries()[pack(ONE)].mac, node.entries()[pack(ONE)].managed) == (MAC, False)
    assert node.target.read() == {node.key(ONE): True}
    node.rows.drop(node.key(ONE))
    await node.apply()
    assert node.entries()[pack(ONE)].mac == MAC
    assert node.entries()[pack(TWO)].managed


async def test_somebody_who_does_not_answer_is_no_failure_and_is_found_when_he_does(node: Node) -> None:
    node.rows.put(node.key(ABSENT), True)
    await node.apply()
    assert not node.resolved(ABSENT)
    ip(THEM, "addr", "add", f"{ABSENT}/24", "dev", "down0")
    ip(THEM, "neigh", "flush", "all")
    assert eventually(lambda: node.resolved(ABSENT), 12)


def test_routes_to_the_cluster_are_read_within_milliseconds(node: Node) -> None:
    began = time.thread_time()
    node.look(*(f"192.0.2.{n % 250 + 1}" for n in range(1000)))
    assert time.thread_time() - began < factor()
    assert route.lookup(node.netlink, socket.inet_aton(ONE)) is not None
