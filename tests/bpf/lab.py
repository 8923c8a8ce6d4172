"""Two nodes and a world in network namespaces, joined by a router, with the datapath's rows filled in by hand.

    pods --- node 1 --- router --- node 2 --- pods        the world is an address of the router

In overlay mode the router knows no pod; in native mode it routes every node's pod CIDR.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from datapath import (
    HOST,
    NODE,
    POD,
    READY,
    REMOTE_NODE,
    TUNNEL,
    Datapath,
    addr,
    prefix,
)  # fmt: skip

from fimbria.kernel import netns
from fimbria.kernel._libbpf import lib
from fimbria.kernel.bpf import AttachType, Link, TcSlot, attach_tcx, clsact, tc_attach
from fimbria.kernel.fd import check
from fimbria.model import rows

T = TypeVar("T")
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
WORLD_ADDR = {4: "203.0.113.9", 6: "fd99::9"}
IDENTITY = {"a": 1001, "b": 1002, "c": 1003, "d": 1004}


@dataclass(frozen=True)
class Mode:
    overlay: bool = True
    fast: bool = True
    tcx: bool = True

    def __str__(self) -> str:
        words = ("overlay" if self.overlay else "native", "redirect" if self.fast else "stack",
                 "tcx" if self.tcx else "clsact")  # fmt: skip
        return "-".join(words)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


class Space:
    """A network namespace."""

    def __init__(self, name: str) -> None:
        self.name = f"fimdp{os.getpid()}{name}"
        Path(netns.RUN_DIR).mkdir(exist_ok=True)
        run("ip", "netns", "add", self.name)
        self.fd = os.open(f"{netns.RUN_DIR}/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
        self.ip("link set lo up")

    def ip(self, command: str) -> None:
        run("ip", "-n", self.name, *command.split())

    def inside(self, call: Callable[[], T]) -> T:
        return netns.run(self.fd, call)

    def sysctl(self, **values: int) -> None:
        def write() -> None:
            for key, value in values.items():
                Path("/proc/thread-self/root/proc/sys/net", *key.split("__")).write_text(str(value))

        self.inside(write)

    def ifindex(self, device: str) -> int:
        return self.inside(lambda: socket.if_nametoindex(device))

    def mac(self, device: str) -> bytes:
        def read() -> bytes:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as s:
                s.bind((device, 0))
                return bytes(s.getsockname()[4])

        return self.inside(read)

    def checksum_offload(self, device: str, on: bool) -> None:
        """Whether the device takes packets whose checksum is still to be done (ETHTOOL_STXCSUM)."""
        value = ctypes.create_string_buffer(struct.pack("=II", 0x17, on), 8)

        def change() -> None:
            with socket.socket() as s:
                request = struct.pack("=16sQ16x", device.encode(), ctypes.addressof(value))
                fcntl.ioctl(s, 0x8946, request)  # SIOCETHTOOL

        self.inside(change)

    def socket(self, family: int, kind: int, proto: int = 0) -> socket.socket:
        domain = {4: socket.AF_INET, 6: socket.AF_INET6}[family]
        s = socket.socket(fileno=check(lib.fim_socket_in(self.fd, domain, kind, proto), "socket"))
        s.settimeout(3)
        return s

    def close(self) -> None:
        os.close(self.fd)
        run("ip", "netns", "del", self.name)


@dataclass
class Pod:
    name: str
    space: Space
    addr: dict[int, str]
    device: str
    ifindex: int = 0
    number: int = 0


@dataclass
class Node:
    number: int
    space: Space
    mode: Mode
    addr: dict[int, str]
    pods: dict[str, Pod] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    datapath: Datapath | None = None

    @property
    def dp(self) -> Datapath:
        assert self.datapath
        return self.datapath

    @property
    def router(self) -> dict[int, str]:
        return {4: f"10.{self.number}.0.1", 6: f"fd10:{self.number}::1"}

    @property
    def cidr(self) -> dict[int, str]:
        return {4: f"10.{self.number}.0.0/16", 6: f"fd10:{self.number}::/64"}

    def attach(self, program: str, device: str, egress: bool) -> None:
        prog, index = self.dp.programs[program], self.space.ifindex(device)

        def tcx() -> None:
            self.links.append(attach_tcx(prog, index, AttachType.TCX_EGRESS if egress else AttachType.TCX_INGRESS))

        def filters() -> None:
            clsact(index)
            tc_attach(prog, TcSlot(index, egress, 1, 1))

        self.space.inside(tcx if self.mode.tcx else filters)

    def load(self, **config: int | bool | bytes) -> None:
        overlay = self.space.ifindex("fimvx") if self.mode.overlay else 0
        settings: dict[str, int | bool | bytes] = {
            "cfg_redirect_peer": self.mode.fast, "cfg_redirect_neigh": self.mode.fast,
            "cfg_overlay_ifindex": overlay,
            "cfg_node_addr4": addr(self.addr[4]), "cfg_node_addr6": addr(self.addr[6]),
            "cfg_router_addr4": addr(self.router[4]), "cfg_router_addr6": addr(self.router[6]),
        }  # fmt: skip
        self.datapath = Datapath({**settings, **config})
        if self.mode.overlay:
            self.attach("from_overlay", "fimvx", False)
            self.attach("to_overlay", "fimvx", True)
        if "from_network" in self.dp.programs:
            self.attach("from_network", "eth0", False)
            self.attach("to_network", "eth0", True)

    def add_pod(self, name: str, number: int) -> Pod:
        space, device = Space(name), f"fim{name}"
        addresses = {4: f"10.{self.number}.0.{number}", 6: f"fd10:{self.number}::{number}"}
        pod = Pod(name, space, addresses, device, number=number)
        self.pods[name] = pod
        self.space.ip(f"link add {device} mtu 1450 type veth peer name eth0 mtu 1450 netns {space.name}")
        self.space.ip(f"link set {device} up")
        space.ip("link set eth0 up")
        for family, address in addresses.items():
            length = 32 if family == 4 else 128
            space.ip(f"addr add {address}/{length} dev eth0" + (" nodad" if family == 6 else ""))
            space.ip(f"route add {self.router[family]} dev eth0")
            space.ip(f"route add default via {self.router[family]} dev eth0")
            self.space.ip(f"route add {address}/{length} dev {device} src {self.router[family]}")
        pod.ifindex = self.space.ifindex(device)
        self.endpoint(pod)
        self.attach("from_pod", device, False)
        self.attach("to_pod", device, True)
        return pod

    def endpoint(self, pod: Pod, flags: int = READY, policy_set: int = 0) -> None:
        row = rows.Endpoint(
            pod.number, IDENTITY[pod.name], policy_set, flags, addr(pod.addr[4]), addr(pod.addr[6]),
            pod.space.mac("eth0"), self.space.mac(pod.device),
        )  # fmt: skip
        self.dp.endpoint(pod.ifindex, row)

    def rejudge(self) -> None:
        epoch = self.dp.get("runtime", 0).policy_epoch
        self.dp.put("runtime", 0, rows.Runtime(epoch + 1))

    def close(self) -> None:
        for link in self.links:
            link.close()
        for pod in self.pods.values():
            pod.space.close()
        if self.datapath:
            self.datapath.close()
        self.space.close()


class Lab:
    """All of it. Pods a and b are on node 1, c and d on node 2."""

    def __init__(self, mode: Mode, **config: int | bool | bytes) -> None:
        self.mode = mode
        self.nodes: list[Node] = []
        self.fabric = Space("w")
        try:
            self._fabric()
            for number in (1, 2):
                self._node(number, config)
            self._ipcache()
        except BaseException:
            self.close()
            raise

    def _fabric(self) -> None:
        self.fabric.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1)
        for family, address in WORLD_ADDR.items():
            self.fabric.ip(f"addr add {address}/{32 if family == 4 else 128} dev lo")

    def _node(self, number: int, config: dict[str, int | bool | bytes]) -> None:
        node = Node(number, Space(f"n{number}"), self.mode, {4: f"192.168.{number}.2", 6: f"fd01:{number}::2"})
        self.nodes.append(node)
        node.space.sysctl(ipv4__ip_forward=1, ipv6__conf__all__forwarding=1, ipv4__conf__all__rp_filter=0,
                          ipv4__conf__default__rp_filter=0, ipv6__conf__default__accept_dad=0)  # fmt: skip
        self.fabric.ip(f"link add n{number} type veth peer name eth0 netns {node.space.name}")
        self.fabric.ip(f"link set n{number} up")
        node.space.ip("link set eth0 up")
        node.space.ip("link add fimhost type veth peer name fimnet")
        node.space.ip("link set fimhost up")
        node.space.ip("link set fimnet up")
        for family, length in ((4, 24), (6, 64)):
            gateway = node.addr[family][:-1] + "1"
            nodad = " nodad" if family == 6 else ""
            node.space.ip(f"addr add {node.addr[family]}/{length} dev eth0{nodad}")
            self.fabric.ip(f"addr add {gateway}/{length} dev n{number}{nodad}")
            node.space.ip(f"route add default via {gateway}")
            node.space.ip(f"addr add {node.router[family]}/{32 if family == 4 else 128} dev fimhost{nodad}")
            node.space.ip(f"route add unreachable {node.cidr[family]} metric 9999")
            if not self.mode.overlay:
                self.fabric.ip(f"route add {node.cidr[family]} via {node.addr[family]}")
        if self.mode.overlay:
            self._overlay(node)
        node.load(**config)
        names = "ab" if number == 1 else "cd"
        for i, name in enumerate(names):
            node.add_pod(name, 10 + i)

    def _overlay(self, node: Node) -> None:
        node.space.ip("link add fimvx type vxlan external dstport 8472 nolearning udp6zerocsumtx udp6zerocsumrx")
        node.space.ip("link set fimvx arp off mtu 1450 up")
        other = 3 - node.number
        for family, cidr in ((4, f"10.{other}.0.0/16"), (6, f"fd10:{other}::/64")):
            node.space.ip(f"route add {cidr} dev fimvx src {node.router[family]}")

    def _ipcache(self) -> None:
        for node in self.nodes:
            for other in self.nodes:
                self._remote(node, other)

    def _remote(self, node: Node, other: Node) -> None:
        own = node is other
        tunnel = TUNNEL if self.mode.overlay and not own else 0
        for family in (4, 6):
            via = addr(other.addr[4]) if tunnel else bytes(16)
            length = "/32" if family == 4 else "/128"
            host = HOST if own else REMOTE_NODE
            node.dp.put("ipcache", prefix(other.addr[family] + length), rows.Remote(host, NODE))
            node.dp.put("ipcache", prefix(other.router[family] + length), rows.Remote(host, NODE | tunnel, via))
            for pod in other.pods.values():
                remote = rows.Remote(IDENTITY[pod.name], POD | tunnel, via)
                node.dp.put("ipcache", prefix(pod.addr[family] + length), remote)

    def pod(self, name: str) -> Pod:
        return next(n.pods[name] for n in self.nodes if name in n.pods)

    def node_of(self, name: str) -> Node:
        return next(n for n in self.nodes if name in n.pods)

    def close(self) -> None:
        for node in self.nodes:
            node.close()
        self.fabric.close()


@contextlib.contextmanager
def lab(mode: Mode, **config: int | bool | bytes) -> Iterator[Lab]:
    built = Lab(mode, **config)
    try:
        yield built
    finally:
        built.close()


# -- traffic


def tcp_peer(server: Space, client: Space, family: int, listen: str) -> str:
    """A connection that carries data there and back; returns the client's address as the server saw it."""
    with server.socket(family, TCP) as listener:
        listener.bind((listen, 0))
        return _tcp(listener, client, family, listener.getsockname()[:2])


def tcp_service(server: Space, client: Space, family: int, backend: tuple[str, int], front: tuple[str, int]) -> str:
    """The same with a server that the client calls by another address."""
    with server.socket(family, TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(backend)
        return _tcp(listener, client, family, front)


def _tcp(listener: socket.socket, client: Space, family: int, dial: tuple[str, int]) -> str:
    payload = bytes(range(256)) * 400
    listener.listen()
    with client.socket(family, TCP) as c:
        c.connect(dial)
        assert c.getpeername()[:2] == dial
        s, peer = listener.accept()
        with s:
            s.settimeout(3)
            exchange(c, s, payload)
            exchange(s, c, payload)
        return str(peer[0])


def exchange(a: socket.socket, b: socket.socket, payload: bytes) -> None:
    """`payload` from one connected socket to the other, a bit at a time so that neither side blocks."""
    got = b""
    for start in range(0, len(payload), 16384):
        part = payload[start : start + 16384]
        a.sendall(part)
        while len(got) < start + len(part):
            got += b.recv(65536)
    assert got == payload


def udp_peer(server: Space, client: Space, family: int, listen: str, size: int = 100) -> str:
    with server.socket(family, UDP) as s, client.socket(family, UDP) as c:
        s.bind((listen, 0))
        c.connect(s.getsockname()[:2])
        c.send(b"q" * size)
        data, peer = s.recvfrom(65536)
        assert len(data) == size
        s.sendto(b"r" * size, peer)
        assert c.recv(65536) == b"r" * size
        return str(peer[0])


def ping(client: Space, family: int, target: str, size: int = 56, timeout: float = 3) -> bool:
    """One echo request; True when its reply comes back."""
    proto = socket.IPPROTO_ICMP if family == 4 else socket.IPPROTO_ICMPV6
    request, reply = (8, 0) if family == 4 else (128, 129)
    with client.socket(family, socket.SOCK_RAW, proto) as s:
        ident = os.getpid() & 0xFFFF
        packet = struct.pack(">BBHHH", request, 0, 0, ident, 1) + b"p" * size
        if family == 4:
            packet = packet[:2] + struct.pack(">H", checksum(packet)) + packet[4:]
        s.sendto(packet, (target, 0))
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            s.settimeout(left)
            try:
                data, peer = s.recvfrom(65536)
            except TimeoutError:
                return False
            body = data[(data[0] & 15) * 4 :] if family == 4 else data
            if peer[0] == target and body[0] == reply and body[4:6] == packet[4:6]:
                return True
    return False


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def hop(client: Space, family: int, target: str, ttl: int) -> str:
    """Who says that a packet's time is up."""
    proto, exceeded = (socket.IPPROTO_ICMP, 11) if family == 4 else (socket.IPPROTO_ICMPV6, 3)
    level, option = socket.IPPROTO_IP, socket.IP_TTL
    if family == 6:
        level, option = socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS
    with client.socket(family, socket.SOCK_RAW, proto) as errors, client.socket(family, UDP) as c:
        c.setsockopt(level, option, ttl)
        c.sendto(b"?", (target, 33434))
        while True:
            data, peer = errors.recvfrom(2048)
            if data[(data[0] & 15) * 4 if family == 4 else 0] == exceeded:
                return str(peer[0])


def path_mtu(c: socket.socket, family: int, target: tuple[str, int]) -> int:
    """What the socket learns of the way when it may not fragment."""
    level = socket.IPPROTO_IP if family == 4 else socket.IPPROTO_IPV6
    discover, mtu = (10, 14) if family == 4 else (23, 24)  # IP_MTU_DISCOVER, IP_MTU and their IPv6 twins
    c.connect(target)
    c.setsockopt(level, discover, 2)
    for _ in range(20):
        with contextlib.suppress(OSError):
            c.send(b"x" * 1440)
        if (learned := int(c.getsockopt(level, mtu))) < 1500:
            return learned
        time.sleep(0.05)
    return 1500
