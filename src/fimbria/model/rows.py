"""Rows of the BPF maps, as the control plane sees them.

Only field *names* are restated here; layout, sizes and byte order come from the BTF of `layout.bpf.o` at start
(`fimbria.kernel.codec`), and a difference is an error there. The meaning of each field is documented in `bpf/types/`.
Addresses are 16 bytes (IPv4-mapped for IPv4), ports are in host order, MACs are 6 bytes. What there are hundreds of
thousands of is a NamedTuple: made, hashed and compared several times as fast as a frozen dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

NO_ADDR: Final = bytes(16)
NO_MAC: Final = bytes(6)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`struct endpoint`; key is the ifindex of the veth's host side."""

    id: int
    identity: int
    policy_set: int
    flags: int
    addr4: bytes = NO_ADDR
    addr6: bytes = NO_ADDR
    pod_mac: bytes = NO_MAC
    host_mac: bytes = NO_MAC


@dataclass(frozen=True, slots=True)
class LocalAddr:
    """`struct local_addr`; key is an address."""

    ifindex: int


@dataclass(frozen=True, slots=True)
class PrefixKey:
    """`struct prefix_key`, the key of `ipcache` and `cidrs`."""

    prefixlen: int
    addr: bytes


@dataclass(frozen=True, slots=True)
class Remote:
    """`struct remote`."""

    identity: int
    flags: int
    tunnel: bytes = NO_ADDR


@dataclass(frozen=True, slots=True)
class Cidr:
    """`struct cidr`."""

    identity: int


@dataclass(frozen=True, slots=True)
class PolicyKey:
    """`struct policy_key`."""

    prefixlen: int
    peer: int
    direction: int
    proto: int
    port: int


@dataclass(frozen=True, slots=True)
class PolicyEntry:
    """`struct policy_entry`."""

    verdict: int
    flags: int
    rule: int


class FrontendKey(NamedTuple):
    """`struct frontend_key`."""

    addr: bytes
    port: int
    proto: int
    scope: int = 0


@dataclass(frozen=True, slots=True)
class Frontend:
    """`struct frontend`."""

    service: int
    count: int
    flags: int
    affinity_seconds: int = 0


class SlotKey(NamedTuple):
    """`struct slot_key`; the value is a backend id."""

    service: int
    slot: int


class Backend(NamedTuple):
    """`struct backend`; key is a backend id."""

    addr: bytes
    port: int
    proto: int
    flags: int = 0


class MemberKey(NamedTuple):
    """`struct member_key`, the key of `service_members`."""

    service: int
    backend: int


@dataclass(frozen=True, slots=True)
class AffinityKey:
    """`struct affinity_key`."""

    client: bytes
    service: int
    by_namespace: int


@dataclass(frozen=True, slots=True)
class Affinity:
    """`struct affinity`."""

    used: int
    backend: int


@dataclass(frozen=True, slots=True)
class SourceKey:
    """`struct source_key`, the key of `source_ranges`."""

    prefixlen: int
    service: int
    addr: bytes


@dataclass(frozen=True, slots=True)
class ExemptKey:
    """`struct exempt_key`, the key of `service_exempt`."""

    client: int
    service: int
    by_endpoint: int


@dataclass(frozen=True, slots=True)
class SockRevnatKey:
    """`struct sock_revnat_key`: a socket and a backend it talks to."""

    cookie: int
    addr: bytes
    port: int


@dataclass(frozen=True, slots=True)
class SockRevnat:
    """`struct sock_revnat`: the frontend that it was called by."""

    addr: bytes
    port: int
    service: int


@dataclass(frozen=True, slots=True)
class CtKey:
    """`struct ct_key`."""

    local: bytes
    remote: bytes
    local_port: int
    remote_port: int
    proto: int
    scope: int


@dataclass(frozen=True, slots=True)
class CtEntry:
    """`struct ct_entry`; times are ktime nanoseconds."""

    expires: int
    reported: int
    endpoint: int
    rule: int
    epoch: int
    peer: int
    service: int
    backend: int
    flags: int
    tcp_flags: int
    frontend_port: int
    frontend: bytes


@dataclass(frozen=True, slots=True)
class NatKey:
    """`struct nat_key`."""

    saddr: bytes
    daddr: bytes
    sport: int
    dport: int
    proto: int
    direction: int


@dataclass(frozen=True, slots=True)
class NatEntry:
    """`struct nat_entry`."""

    addr: bytes
    port: int
    flags: int
    service: int
    used: int
    frontend: bytes = NO_ADDR
    frontend_port: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """`struct event`, one record of the ring buffer."""

    time: int
    type: int
    reason: int
    direction: int
    ct_state: int
    proto: int
    tcp_flags: int
    packet_len: int
    endpoint: int
    source: int
    destination: int
    ifindex: int
    rule: int
    saddr: bytes
    daddr: bytes
    sport: int
    dport: int
    service: int


@dataclass(frozen=True, slots=True)
class Metric:
    """`struct metric`, of one CPU."""

    packets: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Runtime:
    """`struct runtime`."""

    policy_epoch: int
