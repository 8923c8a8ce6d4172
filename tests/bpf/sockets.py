"""A node's sockets for tests: a sub-cgroup carries the programs, network namespaces stand for the node and a pod.

The test process itself joins the sub-cgroup, since a socket belongs to the cgroup of the process that makes it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from datapath import DEFAULTS, FRONTEND_FLAG, HOST, NODE, OBJECTS, REMOTE_NODE, Setting

from fimbria.apply.attach import SOCKET_HOOKS
from fimbria.kernel import netns
from fimbria.kernel._libbpf import lib
from fimbria.kernel.fd import check
from fimbria.kernel.links import attach_cgroup
from fimbria.kernel.maps import Map
from fimbria.kernel.objects import BpfObject
from fimbria.model.address import pack

OBJECT = OBJECTS / "socket.bpf.o"
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
PROTO: dict[int, int] = {TCP: socket.IPPROTO_TCP, UDP: socket.IPPROTO_UDP, 0: 0}
FRONTEND = {4: "10.96.0.10", 6: "fd96::10"}
OTHER_FRONTEND = {4: "10.96.0.11", 6: "fd96::11"}
BACKENDS = {4: [f"10.77.0.{n}" for n in range(1, 5)], 6: [f"fd77::{n}" for n in range(1, 5)]}
HOST_ADDR = {4: "10.78.0.1", 6: "fd78::1"}
POD_ADDR = {4: "10.78.0.2", 6: "fd78::2"}
NETNS, POD_NETNS = f"fimsock{os.getpid()}", f"fimsockp{os.getpid()}"
CASES = pytest.mark.parametrize(("client", "family"), [(4, 4), (6, 6), (6, 4)], ids=["ipv4", "ipv6", "mapped"])
Address = tuple[str, int]


class Services:
    """Writes the rows of a service by hand, as the agent would."""

    def __init__(self, maps: dict[str, Map]) -> None:
        self.maps = maps

    def frontend(self, at: Address, kind: int, service: int, backends: dict[int, Address], flags: str = "",
                 scope: int = 0, affinity: int = 0) -> None:  # fmt: skip
        """`backends`: by backend id, in slot order; `flags`: names of enum frontend_flag; `kind` 0: a whole address."""
        for slot, (number, (address, port)) in enumerate(backends.items()):
            value = pack(address) + struct.pack(">H", port) + bytes([PROTO[kind], 0])
            self.maps["backends"].update(struct.pack("=I", number), value)
            self.maps["service_slots"].update(struct.pack("=II", service, slot), struct.pack("=I", number))
            if affinity:
                self.maps["service_members"].update(struct.pack("=II", service, number), struct.pack("=I", 1))
        bits = sum(FRONTEND_FLAG[name] for name in flags.split())
        row = struct.pack("=IIII", service, len(backends), bits, affinity)
        self.maps["frontends"].update(self.key(at, kind, scope), row)

    def delete(self, at: Address, kind: int) -> None:
        assert self.maps["frontends"].delete(self.key(at, kind))

    def key(self, at: Address, kind: int, scope: int = 0) -> bytes:
        return pack(at[0]) + struct.pack(">H", at[1]) + bytes([PROTO[kind], scope])

    def node_address(self, address: str, own: bool) -> None:
        """A row of ipcache: an address of this node or of another one."""
        key = struct.pack("=I", 128) + pack(address)
        self.maps["ipcache"].update(key, struct.pack("=II", HOST if own else REMOTE_NODE, NODE) + bytes(16))

    def exempt(self, cookie: int, service: int) -> None:
        self.maps["service_exempt"].update(struct.pack("=QII", cookie, service, 0), struct.pack("=I", 1))

    def clear(self) -> None:
        for m in self.maps.values():
            keys, _ = m.dump()
            m.delete_batch(keys, len(keys) // m.key_size)


class Net:
    """Sockets in the test's network namespaces, all closed at its end. The backends are on the node."""

    def __init__(self, netns: int, pod_netns: int) -> None:
        self.netns = netns
        self.pod_netns = pod_netns
        self.sockets: list[socket.socket] = []

    def open(self, family: int, kind: int, *, pod: bool = False) -> socket.socket:
        domain = socket.AF_INET if family == 4 else socket.AF_INET6
        space = self.pod_netns if pod else self.netns
        s = socket.socket(fileno=check(lib.fim_socket_in(space, domain, kind, 0), "socket"))
        s.settimeout(5)
        self.sockets.append(s)
        return s

    def server(self, address: str, kind: int, port: int = 0, *, pod: bool = False) -> socket.socket:
        s = self.open(6 if ":" in address else 4, kind, pod=pod)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == TCP)
        s.bind((address, port))
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
def network() -> Iterator[tuple[int, int]]:
    """A node, whose backends are addresses of its loopback device, and a pod behind a veth pair."""
    with contextlib.ExitStack() as stack:
        for name in (NETNS, POD_NETNS):
            ip("netns", "add", name)
            stack.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", NETNS, "link", "add", "fimpod", "type", "veth", "peer", "name", "eth0", "netns", POD_NETNS)
        for name, device, addresses in ((NETNS, "fimpod", HOST_ADDR), (POD_NETNS, "eth0", POD_ADDR)):
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "addr", "add", f"{addresses[4]}/24", "dev", device)
            ip("-n", name, "addr", "add", f"{addresses[6]}/64", "dev", device, "nodad")
        for family in (4, 6):
            ip("-n", POD_NETNS, f"-{family}", "route", "add", "default", "via", HOST_ADDR[family])
        for address in BACKENDS[4] + BACKENDS[6]:
            ip("-n", NETNS, "addr", "add", address, "dev", "lo", *(["nodad"] if ":" in address else []))
        fds = [stack.enter_context(netns.opened(f"/run/netns/{name}")) for name in (NETNS, POD_NETNS)]
        yield fds[0], fds[1]


@contextlib.contextmanager
def loaded(**config: Setting) -> Iterator[tuple[Services, Net]]:
    """All hooks on a cgroup of this process. Constants beyond the node's namespace are the defaults of datapath.py."""
    with contextlib.ExitStack() as stack:
        host, pod = stack.enter_context(network())
        cgroup = stack.enter_context(sub_cgroup())
        obj = stack.enter_context(BpfObject(OBJECT))
        wanted = {**DEFAULTS, "cfg_host_netns": netns.cookie(host), **config}
        obj.set_constants({name: wanted[name] for name in obj.constants})
        obj.load()
        names = [name for name, spec in obj.maps.items() if not spec.internal]
        maps = {name: stack.enter_context(obj.map(name)) for name in names}
        for hook, kind in SOCKET_HOOKS.items():
            with obj.program(f"sock_{hook}") as p:
                stack.enter_context(attach_cgroup(p, cgroup, kind))
        yield Services(maps), Net(host, pod)


def client_address(client: int, frontend: str) -> str:
    """How a socket of family `client` spells `frontend`: IPv4-mapped on an IPv6 socket."""
    return frontend if client == 4 or ":" in frontend else f"::ffff:{frontend}"
