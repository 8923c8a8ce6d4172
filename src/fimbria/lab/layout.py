"""Names, addresses and paths of a lab. Pure: everything follows from the lab's name and settings.

The fabric is a router with one point-to-point subnet per node (`fabric_ipv4` and `fabric_ipv6`, subnet number = node
number), one for the control plane, and one towards an "outside world" with documentation addresses (RFC 5737, RFC
3849). The world has routes to the nodes and to the addresses of load balancers, and none to pods, so that what reaches
it from a pod and gets an answer was masqueraded.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any

from fimbria.lab.errors import LabError

STATE_ROOT = Path("/run/fimbria-lab")
NETNS_DIR = Path("/run/netns")
PREFIX = "fimbria-lab-"
WORLD4, WORLD6 = IPv4Network("198.51.100.0/24"), IPv6Network("2001:db8::/64")
BALANCER4, BALANCER6 = IPv4Network("203.0.113.0/24"), IPv6Network("2001:db8:113::/112")  # of LoadBalancer Services
ROUTER_HOST, MEMBER4_HOST, MEMBER6_HOST = 1, 10, 0x10  # host parts in every subnet of the fabric
CONTROL_SUBNET, MAX_NODES = 254, 200
API_PORT = 6443
ROUTINGS = ("overlay", "native")

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True)
class Member:
    """One namespace on the fabric: its two addresses, and the fabric's addresses as its gateways."""

    name: str
    ipv4: str
    ipv6: str
    ipv4_prefix: int
    ipv6_prefix: int
    gateway4: str
    gateway6: str


@dataclass(frozen=True)
class LabSpec:
    """Settings of a lab, as text so that they can be stored. Networks in CIDR notation, `mtu` in bytes.

    `kubeconfig` is the file of another API server to use, or "" for the embedded one. `agent_options` are NAME=VALUE,
    passed to every agent as --NAME=VALUE. `controllers` starts the lab's own (Deployments, EndpointSlices, scheduling)
    also beside another API server, for one that has no controller manager. `zones` are given to the nodes in turn, as
    label. Without `source_check` the fabric lets nodes send from any address, as direct server return through node
    ports needs it.
    """

    name: str = "fimbria"
    nodes: int = 3
    routing: str = "overlay"
    mtu: int = 1500
    fabric_ipv4: str = "172.31.0.0/16"
    fabric_ipv6: str = "fd00:f1b::/48"
    ipv4_pool: str = "10.244.0.0/16"
    ipv4_mask: int = 24
    ipv6_pool: str = "fd00:244::/104"
    ipv6_mask: int = 120
    service_ipv4: str = "10.96.0.0/16"
    service_ipv6: str = "fd00:96::/112"
    kubeconfig: str = ""
    agents: bool = True
    agent_options: tuple[str, ...] = ()
    controllers: bool = False
    zones: tuple[str, ...] = ()
    source_check: bool = True

    def check(self) -> None:
        """Raises LabError with the first thing that is wrong."""
        check_name(self.name)
        if not 1 <= self.nodes <= MAX_NODES:
            raise LabError(f"a lab has 1 to {MAX_NODES} nodes, not {self.nodes}")
        if self.routing not in ROUTINGS:
            raise LabError(f"routing is one of {', '.join(ROUTINGS)}, not {self.routing!r}")
        if not 1280 <= self.mtu <= 65535:
            raise LabError(f"an MTU is between 1280 (IPv6 needs it) and 65535 bytes, not {self.mtu}")
        for zone in self.zones:
            if not _LABEL.fullmatch(zone):
                raise LabError(f"zone {zone!r} can't be the value of a label")
        _check_networks(self)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def node_names(self) -> list[str]:
        return [f"node{i}" for i in range(1, self.nodes + 1)]

    def node(self, name: str) -> Member:
        """Raises LabError for a name that isn't a node of this lab."""
        if name not in self.node_names:
            raise LabError(f"lab {self.name} has no node {name!r}; it has {', '.join(self.node_names)}")
        return self._member(name, self.node_names.index(name) + 1)

    def zone(self, node: str) -> str:
        """The node's zone, or "" if the lab has none."""
        return self.zones[self.node_names.index(node) % len(self.zones)] if self.zones else ""

    @property
    def control(self) -> Member:
        return self._member("control", CONTROL_SUBNET)

    @property
    def world(self) -> Member:
        return _at("world", WORLD4, WORLD6)

    def members(self) -> Iterator[Member]:
        """Everything with a cable to the fabric: nodes, control, world."""
        yield from (self.node(n) for n in self.node_names)
        yield self.control
        yield self.world

    def _member(self, name: str, number: int) -> Member:
        net4, net6 = IPv4Network(self.fabric_ipv4), IPv6Network(self.fabric_ipv6)
        sub4 = IPv4Network((int(net4.network_address) + (number << 8), 24))
        sub6 = IPv6Network((int(net6.network_address) + (number << 64), 64))
        return _at(name, sub4, sub6)


def _at(name: str, net4: IPv4Network, net6: IPv6Network) -> Member:
    return Member(
        name,
        str(net4[MEMBER4_HOST]),
        str(net6[MEMBER6_HOST]),
        net4.prefixlen,
        net6.prefixlen,
        str(net4[ROUTER_HOST]),
        str(net6[ROUTER_HOST]),
    )


def check_name(name: str) -> None:
    """Raises LabError unless `name` can be part of a cgroup, namespace and directory name."""
    if not _NAME.fullmatch(name):
        raise LabError(f"lab name {name!r}: use up to 20 lower-case letters, digits and inner hyphens")


def _network(what: str, text: str, version: int, longest: int) -> IPv4Network | IPv6Network:
    try:
        net = ip_network(text)
    except ValueError as e:
        raise LabError(f"{what}: {e}") from None
    if net.version != version:
        raise LabError(f"{what}: {text} is IPv{net.version}, IPv{version} is needed here")
    if net.prefixlen > longest:
        raise LabError(f"{what}: {text} is too small, at most /{longest} is possible")
    return net


def _check_networks(spec: LabSpec) -> None:
    nets: list[tuple[str, IPv4Network | IPv6Network]] = [
        ("fabric IPv4", _network("fabric IPv4", spec.fabric_ipv4, 4, 16)),
        ("fabric IPv6", _network("fabric IPv6", spec.fabric_ipv6, 6, 48)),
        ("outside world", WORLD4),
        ("outside world", WORLD6),
        ("load balancers", BALANCER4),
        ("load balancers", BALANCER6),
        ("service IPv4", _network("service IPv4", spec.service_ipv4, 4, 28)),
        ("service IPv6", _network("service IPv6", spec.service_ipv6, 6, 124)),
    ]
    for what, text, version, mask in (
        ("pod IPv4 pool", spec.ipv4_pool, 4, spec.ipv4_mask),
        ("pod IPv6 pool", spec.ipv6_pool, 6, spec.ipv6_mask),
    ):
        if text:
            nets.append((what, _network(what, text, version, mask)))
    if not spec.ipv4_pool and not spec.ipv6_pool:
        raise LabError("at least one pod pool is needed: both IPv4 and IPv6 are empty")
    for i, (what, net) in enumerate(nets):
        for other_what, other in nets[:i]:
            if net.version == other.version and net.overlaps(other):
                raise LabError(f"{what} {net} overlaps {other_what} {other}")


@dataclass(frozen=True)
class Paths:
    """Where a lab keeps what it has. Everything carries the lab's name, so that it is found without the state
    directory."""

    lab: str

    @property
    def state(self) -> Path:
        return STATE_ROOT / self.lab

    @property
    def spec(self) -> Path:
        return self.state / "lab.json"

    @property
    def processes(self) -> Path:
        return self.state / "processes"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def kubeconfig(self) -> Path:
        """For nodes and the control plane: the API server's address on the fabric."""
        return self.state / "kubeconfig"

    @property
    def host_kubeconfig(self) -> Path:
        """For kubectl on the host: a loopback port that leads to the same server."""
        return self.state / "kubeconfig.host"

    @property
    def database(self) -> Path:
        return self.state / "apiserver" / "objects.db"

    def disk(self, node: str) -> Path:
        return self.state / "nodes" / node

    def netns_name(self, member: str) -> str:
        return f"{PREFIX}{self.lab}.{member}"  # names have no dots, so no lab's prefix is another's

    def netns(self, member: str) -> Path:
        return NETNS_DIR / self.netns_name(member)

    @property
    def cgroup_name(self) -> str:
        return f"{PREFIX}{self.lab}"
