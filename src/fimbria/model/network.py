"""Rows for what is not a BPF map: routes, neighbours, addresses and sysctls of a node."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Route:
    """A route of ours in the main table; the key is a Prefix. `ifindex` 0: unreachable. Addresses 16 bytes or empty."""

    ifindex: int
    gateway: bytes = b""
    src: bytes = b""
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class NeighbourKey:
    """An address on a device; the value is the MAC."""

    ifindex: int
    addr: bytes


@dataclass(frozen=True, slots=True)
class DeviceSet:
    """The devices of a node that programs are configured with. MTUs in bytes; `overlay` 0: native routing."""

    host: int
    host_mac: bytes
    overlay: int
    uplinks: tuple[int, ...]
    mtu: int
    pod_mtu: int
