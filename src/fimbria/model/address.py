"""Addresses as the datapath keeps them: 16 bytes, IPv4 mapped into IPv6 (RFC 4291, 2.5.5.2)."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from typing import Final

V4_MAPPED: Final = bytes(10) + b"\xff\xff"
V4_PREFIX: Final = 96


def pack(text: str) -> bytes:
    """16 bytes of an address written as text.

    Raises ValueError naming the text if it is not an address.
    """
    try:
        if ":" in text:
            return socket.inet_pton(socket.AF_INET6, text)
        return V4_MAPPED + socket.inet_pton(socket.AF_INET, text)
    except OSError:
        raise ValueError(f"{text!r} is not an IP address") from None


def unpack(addr: bytes) -> str:
    """Text of a 16-byte address; the empty string for the unset one (all zero)."""
    if addr[:12] == V4_MAPPED:
        return socket.inet_ntop(socket.AF_INET, addr[12:])
    return socket.inet_ntop(socket.AF_INET6, addr) if any(addr) else ""


def is_v4(addr: bytes) -> bool:
    """Whether a 16-byte address is an IPv4 one."""
    return addr[:12] == V4_MAPPED


def is_anybodys(addr: bytes) -> bool:
    """Whether a 16-byte address says nothing about who has it: unspecified, loopback, multicast or broadcast."""
    if is_v4(addr):
        return addr[12] == 127 or addr[12] >= 224 or not any(addr[12:])
    return addr[0] == 0xFF or (not any(addr[:15]) and addr[15] <= 1)


@dataclass(frozen=True, slots=True, order=True)
class Prefix:
    """A network: 16 address bytes with the host bits zero and a length of 0..128 (an IPv4 /n is 96 + n)."""

    addr: bytes
    length: int

    @classmethod
    def parse(cls, text: str) -> Prefix:
        """From `10.0.0.0/8`, `fd00::/48` or a bare address. Host bits may be set and are cleared.

        Raises ValueError naming the text if it is not a network.
        """
        try:
            net = ipaddress.ip_network(text, strict=False)
        except ValueError:
            raise ValueError(f"{text!r} is not an IP network") from None
        if net.version == 4:
            return cls(V4_MAPPED + net.network_address.packed, V4_PREFIX + net.prefixlen)
        return cls(net.network_address.packed, net.prefixlen)

    @classmethod
    def host(cls, addr: bytes) -> Prefix:
        """The network of one address."""
        return cls(addr, 128)

    @property
    def v4(self) -> bool:
        """Whether this is an IPv4 network."""
        return self.length >= V4_PREFIX and is_v4(self.addr)

    def __contains__(self, other: object) -> bool:
        """Whether an address (16 bytes) or a network lies inside."""
        if isinstance(other, Prefix):
            return other.length >= self.length and other.addr in self
        if not isinstance(other, bytes):
            return False
        shift = 128 - self.length
        return int.from_bytes(other) >> shift == int.from_bytes(self.addr) >> shift

    def __str__(self) -> str:
        if self.v4:
            return f"{unpack(self.addr)}/{self.length - V4_PREFIX}"
        return f"{socket.inet_ntop(socket.AF_INET6, self.addr)}/{self.length}"
