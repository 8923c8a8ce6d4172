"""Services and their endpoints, as far as load balancing needs them. Addresses are 16 bytes, ports in host order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ServiceKey(NamedTuple):
    """Name of a service."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class ServicePort:
    """`name` is what endpoint ports are matched by, and empty for a single port; `proto` is an IP protocol number."""

    name: str
    port: int
    proto: int


@dataclass(frozen=True, slots=True)
class Service:
    """One service.

    `cluster_ips` has up to one address of each family, none for what needs no translation (headless, ExternalName).
    `internal_local`: only endpoints of the client's own node (internalTrafficPolicy Local).
    `publish_not_ready`: endpoints serve whether or not they are ready (publishNotReadyAddresses).
    `warnings`: what the object asks for and does not get, a sentence each, for people.
    """

    key: ServiceKey
    cluster_ips: tuple[bytes, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    internal_local: bool = False
    publish_not_ready: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address that serves. `node` is empty if unknown; the conditions are those of discovery.k8s.io/v1."""

    addr: bytes
    node: str = ""
    ready: bool = True
    serving: bool = True
    terminating: bool = False


@dataclass(frozen=True, slots=True)
class EndpointPort:
    """`port` is the number that the endpoints listen on: named target ports are resolved."""

    name: str
    port: int
    proto: int


@dataclass(frozen=True, slots=True)
class EndpointSlice:
    """A part of a service's endpoints, all of one family; several may name the same endpoint."""

    name: str
    service: ServiceKey
    v4: bool
    ports: tuple[EndpointPort, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    warnings: tuple[str, ...] = ()


class TableMember(NamedTuple):
    """One backend of a Maglev table: its number, its share, and what its place in the table is computed from."""

    backend: int
    weight: int
    addr: bytes
    port: int
    proto: int


@dataclass(frozen=True, slots=True)
class TableContent:
    """Desired row of `service_tables`, by service id: who shares the table. The order of members means nothing; a
    weight of 0 takes no new connections. `fimbria.compute.maglev` says who gets which entry."""

    members: tuple[TableMember, ...]
