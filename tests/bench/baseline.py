"""What the kernel does without us: pods joined by plain veth pairs and routing, by a bridge, by the kernel's VXLAN,
with and without iptables rules in kube-proxy's shape. Every namespace is `fimb<our pid>-...`, so that what a killed
run left is recognised and removed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from tests.bench import rules
from tests.bench.measure import BenchError, Place, server_command

from fimbria.lab import components, kernel
from fimbria.lab.errors import LabError
from fimbria.lab.layout import LabSpec

NETNS: Final = Path("/run/netns")
PREFIX: Final = "fimb"
OVERHEAD: Final = 50  # bytes that VXLAN over IPv4 adds
GATEWAY: Final = "169.254.1.1"
QUIET: Final = {f"net/ipv6/conf/{s}/{k}": "0" for s in ("all", "default") for k in ("accept_dad", "accept_ra")}
ROUTER: Final = {"net/ipv4/ip_forward": "1", "net/ipv4/conf/all/rp_filter": "1", "net/ipv4/conf/default/rp_filter": "1"}
HOST: Final = {"net/ipv4/ip_forward": "1"}


@dataclass(slots=True)
class Net:
    """Namespaces made by us; `close` ends the servers in them and removes them."""

    name: str
    members: list[str] = field(default_factory=list)
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def full(self, member: str) -> str:
        """The namespace's name."""
        return f"{PREFIX}{os.getpid()}-{self.name}-{member}"

    def path(self, member: str) -> Path:
        """The namespace's file."""
        return NETNS / self.full(member)

    def place(self, member: str) -> Place:
        """For commands inside."""
        return Place(("nsenter", f"--net={self.path(member)}", "--"))

    def add(self, member: str, sysctls: dict[str, str]) -> None:
        """A namespace with its loopback up. Raises LabError."""
        kernel.ip("netns", "add", self.full(member))
        self.members.append(member)
        kernel.in_netns(self.path(member), partial(kernel.write_sysctls, QUIET | sysctls))
        self.ip(member, "link set lo up")

    def bare(self, member: str) -> None:
        """A namespace as a runtime makes it: empty. Raises LabError."""
        kernel.ip("netns", "add", self.full(member))
        self.members.append(member)

    def drop(self, member: str) -> None:
        """Remove one namespace before the end."""
        self.members.remove(member)
        kernel.ip("netns", "delete", self.full(member))

    def ip(self, member: str, *lines: str) -> None:
        """`ip -batch` lines inside. Raises LabError."""
        kernel.ip_batch(self.full(member), lines)

    def cable(self, one: str, device: str, other: str, peer: str, mtu: int = 1500) -> None:
        """A veth pair between two members, both ends up."""
        self.ip(one, f"link add {device} mtu {mtu} type veth peer name {peer} mtu {mtu} netns {self.path(other)}",
                f"link set {device} up")  # fmt: skip
        self.ip(other, f"link set {peer} up")

    def serve(self, member: str, command: str = "") -> None:
        """Start the servers that clients measure against, or another shell command."""
        argv = self.place(member).argv("setpriv", "--pdeathsig", "KILL", "sh", "-c", command or server_command())
        self.servers.append(subprocess.Popen(argv, env=components.ENVIRONMENT, stdin=subprocess.DEVNULL))

    def restore(self, member: str, text: str) -> None:
        """Load iptables rules. The legacy back end: the faster of the two with many Services. Raises BenchError."""
        argv = self.place(member).argv("iptables-legacy-restore", "-w")
        done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False, env=components.ENVIRONMENT)
        if done.returncode != 0:
            raise BenchError(f"iptables-legacy-restore: {done.stderr.strip()[-300:]}")

    def close(self) -> None:
        """Remove everything, whatever happened."""
        for server in self.servers:
            server.kill()
            server.wait()
        for member in self.members:
            _end(self.path(member))


def _end(namespace: Path) -> None:
    """Ends what runs in a namespace of ours (iperf3 outlives its shell) and removes it."""
    with suppress(OSError):
        inode = namespace.stat().st_ino
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (process / "ns/net").stat().st_ino == inode:
                    kernel.process(int(process.name)).signal(9)
    with suppress(LabError):
        kernel.ip("netns", "delete", namespace.name)


def sweep() -> None:
    """Remove what runs of this bench that are dead left."""
    for path in NETNS.glob(f"{PREFIX}[0-9]*-*") if NETNS.is_dir() else ():
        owner = path.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            _end(path)


@contextmanager
def net(name: str) -> Iterator[Net]:
    """An empty set of namespaces that is removed at the end."""
    made = Net(name)
    try:
        yield made
    finally:
        made.close()


# --- shapes ------------------------------------------------------------------------------------------------------


def one_node_routed(n: Net) -> str:
    """Pods a and b, each on a cable of its own to a host that routes. Returns the address of b, which serves."""
    n.add("host", HOST)
    for i, pod in enumerate("ab", 1):
        n.add(pod, {})
        n.cable("host", f"v{pod}", pod, "eth0")
        n.ip("host", f"address add 10.9.{i}.1/24 dev v{pod}")
        n.ip(pod, f"address add 10.9.{i}.2/24 dev eth0", f"route add default via 10.9.{i}.1")
    n.serve("b")
    return "10.9.2.2"


def one_node_as(n: Net, pods: Mapping[str, str]) -> None:
    """Pods with given addresses, each on a cable of its own to a host that routes."""
    n.add("host", HOST)
    for pod, address in pods.items():
        _pod(n, "host", pod, address)


def cluster_as(n: Net, spec: LabSpec, nodes: Mapping[str, str], pods: Mapping[str, tuple[str, str]]) -> None:
    """The nodes and the outside world of a lab around a router, and pods that the router knows, all by their addresses
    there. `nodes` maps our members to the lab's names, `pods` pods to their node (of ours) and address."""
    n.add("fabric", ROUTER)
    members = {member: spec.node(name) for member, name in nodes.items()} | {"world": spec.world}
    for member, place in members.items():
        n.add(member, HOST)
        n.cable("fabric", member, member, "eth0")
        n.ip("fabric", f"address add {place.gateway4}/{place.ipv4_prefix} dev {member}")
        n.ip(member, f"address add {place.ipv4}/{place.ipv4_prefix} dev eth0",
             f"route add default via {place.gateway4}")  # fmt: skip
    for pod, (node, address) in pods.items():
        _pod(n, node, pod, address)
        n.ip("fabric", f"route add {address} via {members[node].ipv4}")


def _pod(n: Net, node: str, pod: str, address: str) -> None:
    n.add(pod, {})
    n.cable(node, f"v{pod}", pod, "eth0")
    n.ip(node, f"address add {GATEWAY}/32 dev v{pod}", f"route add {address} dev v{pod}")
    n.ip(pod, f"address add {address}/32 dev eth0", f"route add {GATEWAY} dev eth0", f"route add default via {GATEWAY}")


def one_node_bridged(n: Net, services: int = 10) -> str:
    """Pods a and b on a bridge whose packets pass iptables, as Kubernetes demands of bridge plugins."""
    n.add("host", HOST)
    n.ip("host", "link add br0 type bridge", "address add 10.9.0.1/24 dev br0", "link set br0 up")
    bridge_filters(n, "host")
    for i, pod in enumerate("ab", 2):
        n.add(pod, {})
        n.cable("host", f"v{pod}", pod, "eth0")
        n.ip("host", f"link set v{pod} master br0")
        n.ip(pod, f"address add 10.9.0.{i}/24 dev eth0", "route add default via 10.9.0.1")
    n.restore("host", rules.kube_proxy(services, "10.9.0.3", "10.9.0.0/16"))
    n.serve("b")
    return "10.9.0.3"


def bridge_filters(n: Net, member: str) -> None:
    """Bridged packets pass iptables. Raises BenchError if this kernel has no br_netfilter."""
    try:
        kernel.in_netns(n.path(member), partial(kernel.write_sysctls, {"net/bridge/bridge-nf-call-iptables": "1"}))
    except OSError as e:
        raise BenchError(f"bridge-nf-call-iptables: {e}") from None


def two_nodes(n: Net, *, vxlan: bool, iptables: bool) -> str:
    """Pod a on one node, b on another, a router between the nodes as in the lab. Returns the address of b."""
    n.add("fabric", ROUTER)
    mtu = 1500 - (OVERHEAD if vxlan else 0)
    for i, (node, pod) in enumerate((("n1", "a"), ("n2", "b")), 1):
        n.add(node, HOST)
        n.add(pod, {})
        n.cable("fabric", node, node, "eth0")
        n.ip("fabric", f"address add 172.30.{i}.1/24 dev {node}")
        n.ip(node, f"address add 172.30.{i}.10/24 dev eth0", f"route add default via 172.30.{i}.1")
        n.cable(node, "vpod", pod, "eth0", mtu)
        n.ip(node, f"address add 10.9.{i}.1/24 dev vpod")
        n.ip(pod, f"address add 10.9.{i}.2/24 dev eth0", f"route add default via 10.9.{i}.1")
    for i, node in enumerate(("n1", "n2"), 1):
        other = 3 - i
        if vxlan:
            n.ip(node, *_vxlan_lines(i, other, mtu))
        else:
            n.ip("fabric", f"route add 10.9.{i}.0/24 via 172.30.{i}.10")
    if iptables:
        for node in ("n1", "n2"):
            n.restore(node, rules.kube_proxy(10, "10.9.2.2", "10.9.0.0/16"))
    n.serve("b")
    return "10.9.2.2"


def _vxlan_lines(own: int, other: int, mtu: int) -> Sequence[str]:
    """A VXLAN device with one static peer, the pods' subnets routed through it."""
    mac = f"02:00:00:00:09:{other:02x}"
    return (
        f"link add vx0 address 02:00:00:00:09:{own:02x} mtu {mtu} type vxlan id 9 local 172.30.{own}.10 "
        f"remote 172.30.{other}.10 dstport 8472 nolearning",
        "link set vx0 up",
        f"address add 10.9.{own}.0/32 dev vx0",
        f"neighbour add 10.9.{other}.0 lladdr {mac} dev vx0 nud permanent",
        f"route add 10.9.{other}.0/24 via 10.9.{other}.0 dev vx0 onlink",
    )
