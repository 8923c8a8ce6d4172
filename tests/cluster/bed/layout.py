"""Names, addresses and paths of a cluster. Pure: nothing here looks at the machine.

Every cluster has the same addresses, for each is an island of namespaces; what the machine sees carries its name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from tests.cluster.bed.errors import BedError

DEFAULT_NAME = "kube"
REPOSITORY = Path(__file__).resolve().parents[3]
STATE, DISKS, NETNS = Path("/run/fimbria-kube"), Path("/var/lib/fimbria-kube"), Path("/run/netns")
SUBNET4, SUBNET6 = "10.99.0.{}", "fd00:10:99::{}"
API_PORT = 6443
API_ADDRESS = SUBNET4.format(1)
WORLD_HOST = 100
SERVICE_RANGES = ("10.96.0.0/16", "fd00:10:96::/112")
POD_RANGES = ("10.244.0.0/16", "fd00:10:244::/56")
DNS_ADDRESS = "10.96.0.10"
PAUSE_IMAGE = "registry.k8s.io/pause:3.10.1"
STARTUP_TAINT = "node.cilium.io/agent-not-ready"
# Where a node's part of the cgroup v2 tree is seen inside it: the machine's is one for all clusters.
NODE_CGROUP2 = "/run/fimbria-cgroup2"
MAX_NODES = 80
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?")
_NODE = re.compile(r"node([1-9][0-9]?)")


@dataclass(frozen=True)
class Addresses:
    """A member's addresses on the cluster's bridge."""

    ipv4: IPv4Address
    ipv6: IPv6Address


def _addresses(host: int) -> Addresses:
    # fd00:10:99::11 is written as people read it: the decimal digits of the host part, not its value
    return Addresses(IPv4Address(SUBNET4.format(host)), IPv6Address(SUBNET6.format(host)))


@dataclass(frozen=True)
class Layout:
    """Paths and names of one cluster. Raises BedError if the name can't be one."""

    name: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise BedError(f"{self.name!r} can't be a cluster's name: 1 to 24 of a-z, 0-9 and dashes inside")

    @property
    def state(self) -> Path:
        return STATE / self.name

    @property
    def disks(self) -> Path:
        return DISKS / self.name

    @property
    def pki(self) -> Path:
        return self.state / "pki"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def kubeconfig(self) -> Path:
        return self.state / "kubeconfig"

    def disk(self, node: str) -> Path:
        return self.disks / node

    def log(self, process: str, member: str = "control") -> Path:
        """A node writes its logs on its own disk; in the folder of logs there is a link to each."""
        return self.logs / (f"{process}.log" if member == "control" else f"{member}-{process}.log")

    def pid_file(self, process: str, member: str = "control") -> Path:
        return self.state / "pids" / f"{member}-{process}"

    def netns(self, member: str) -> str:
        return f"fimk-{self.name}-{member}"

    def netns_path(self, member: str) -> Path:
        return NETNS / self.netns(member)

    def owns_netns(self, name: str) -> bool:
        return re.fullmatch(rf"fimk-{re.escape(self.name)}-(control|world|node[0-9]+)", name) is not None

    @property
    def cgroup(self) -> str:
        """Relative to the root of each hierarchy."""
        return f"fimk-{self.name}"

    def cgroup_of(self, member: str) -> str:
        return f"{self.cgroup}/{member}"


def addresses(member: str) -> Addresses:
    """Of `control`, `world` or a node on the cluster's bridge."""
    if member in ("control", "world"):
        return _addresses(1 if member == "control" else WORLD_HOST)
    return _addresses(10 + node_number(member))


def node_number(node: str) -> int:
    """Raises BedError if this isn't a node's name."""
    found = _NODE.fullmatch(node)
    if not found or int(found[1]) > MAX_NODES:
        raise BedError(f"{node!r} is no node's name: they are node1 to node{MAX_NODES}")
    return int(found[1])


def node_name(number: int) -> str:
    return f"node{number}"
