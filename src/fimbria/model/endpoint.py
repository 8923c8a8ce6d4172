"""Pods and their network endpoints, local and remote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from fimbria.model.address import V4_MAPPED, unpack
from fimbria.model.protocol import protocol_name
from fimbria.model.rows import NO_ADDR

_ANY: Final = (V4_MAPPED + bytes(4), bytes(16))


@dataclass(frozen=True, slots=True)
class NamedPort:
    """A container port that has a name; `proto` is an IPPROTO number, `port` in host order."""

    name: str
    proto: int
    port: int


class HostPort(NamedTuple):
    """A port of the node that leads to a pod. `host_ip` is empty for every address of the node, the unspecified address
    of a family for every one of that family, or else one address (16 bytes)."""

    port: int
    container_port: int
    proto: int
    host_ip: bytes = b""

    @staticmethod
    def is_any(host_ip: bytes) -> bool:
        """Whether it stands for every address of a family."""
        return host_ip in _ANY

    def __str__(self) -> str:
        where = f"{unpack(self.host_ip) or '::'} " if self.host_ip else ""
        return f"host port {where}{self.port}/{protocol_name(self.proto)}"


@dataclass(frozen=True, slots=True)
class Pod:
    """What an agent keeps of a pod of its own node. `own_addresses`: its sockets shall see addresses as they are,
    because a proxy in the pod translates Services itself (annotation fimbria.io/socket-services: "off")."""

    namespace: str
    name: str
    uid: str
    labels: Mapping[str, str]
    service_account: str
    named_ports: tuple[NamedPort, ...]
    host_network: bool
    ready: bool = False
    own_addresses: bool = False
    static_uid: str = ""
    """Of the mirror of a static pod: the uid that kubelet and runtime know the pod by, the hash of its manifest."""
    addrs: tuple[bytes, ...] = ()
    """What the pod's status says it has, while its containers run."""

    def is_of(self, uid: str) -> bool:
        """Whether this is the pod that a runtime knows by that uid (empty: unknown, any will do)."""
        return uid in ("", self.uid, self.static_uid)


def is_static(uid: str) -> bool:
    """Whether kubelet read the pod from a file: its uid is a hash, 32 digits, and not the API server's (RFC 9562)."""
    return len(uid) == 32 and "-" not in uid


@dataclass(frozen=True, slots=True)
class LocalEndpoint:
    """A pod interface of this node, made by a CNI ADD. Addresses are 16 bytes, NO_ADDR if absent. `netns_cookie` is the
    number by which socket programs know the pod's network namespace, 0 if unknown."""

    id: int
    container_id: str
    ifname: str
    network: str
    netns: str
    namespace: str
    pod: str
    uid: str
    host_ifname: str
    ifindex: int
    pod_mac: bytes
    host_mac: bytes
    addr4: bytes = NO_ADDR
    addr6: bytes = NO_ADDR
    host_ports: tuple[HostPort, ...] = ()
    netns_cookie: int = 0

    @property
    def owner(self) -> str:
        """The attachment's name in the CNI specification's terms."""
        return f"{self.container_id}/{self.ifname}"

    @property
    def addrs(self) -> tuple[bytes, ...]:
        """The addresses it has."""
        return tuple(a for a in (self.addr4, self.addr6) if a != NO_ADDR)

    @property
    def label(self) -> str:
        """For people: namespace/pod, or the container id of a pod unknown to Kubernetes."""
        return f"{self.namespace}/{self.pod}" if self.pod else f"container {self.container_id[:12]}"


@dataclass(frozen=True, slots=True)
class EndpointIdentity:
    """Which identity an endpoint has, and the labels that say so."""

    number: int
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ClusterIdentity:
    """A CiliumIdentity: its labels, and whether the operator has marked it for collection."""

    labels: Mapping[str, str]
    marked: bool = False


@dataclass(frozen=True, slots=True)
class RemoteEndpoint:
    """A pod of any node, as its agent reported it. `node` is that node's address; `created` orders rivals; `writer` is
    the name of the node whose agent wrote the report, "" if somebody else did or the operator has looked at that."""

    identity: int
    addrs: tuple[bytes, ...]
    node: bytes
    named_ports: tuple[NamedPort, ...]
    created: str
    writer: str = ""


@dataclass(frozen=True, slots=True)
class PodSlice:
    """A batch of the pods of one namespace, by name, as the operator wrote it; `version` orders what it wrote."""

    namespace: str
    endpoints: Mapping[str, RemoteEndpoint]
    version: int
    problems: tuple[str, ...] = ()
