"""Netlink on the wire: exact bytes out, and nothing but WireError from bad bytes in."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.kernel import link, neighbour, route, tc
from fimbria.kernel.monitor import Change, parse_change
from fimbria.kernel.netlink import (
    ACK,
    NetlinkError,
    Request,
    WireError,
    attr,
    attr_text,
    attr_u32,
    attrs,
    encode,
    nest,
    number,
    parse_error,
    split,
    text,
)
from fimbria.kernel.route import NextHop, Route, RouteType


def u16(n: int) -> bytes:
    return struct.pack("=H", n)


def u32(n: int) -> bytes:
    return struct.pack("=I", n)


def tlv(kind: int, value: bytes) -> bytes:
    return u16(4 + len(value)) + u16(kind) + value + bytes(-len(value) % 4)


def ip(words: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in words else socket.AF_INET, words)


def test_attributes() -> None:
    raw = attr(1, b"abc") + attr_u32(2, 7) + attr_text(3, "x") + nest(4, attr_u32(1, 9))
    assert raw == tlv(1, b"abc") + tlv(2, u32(7)) + tlv(3, b"x\0") + tlv(0x8004, tlv(1, u32(9)))
    found = attrs(raw, 0, len(raw))
    assert found == {1: b"abc", 2: u32(7), 3: b"x\0", 4: tlv(1, u32(9))}
    assert (number(found[2]), text(found[3]), number(None, 5), text(None)) == (7, "x", 5, "")


def test_a_request() -> None:
    raw = encode(Request(24, 0x600, b"body", "label"), 77, ACK)
    assert raw == u32(20) + u16(24) + u16(0x605) + u32(77) + u32(0) + b"body"
    assert split(raw) == [(24, 0x605, 77, 16, 20)]
    assert split(raw * 2)[1] == (24, 0x605, 77, 36, 40)


def test_a_route() -> None:
    body = route.route_body(Route(ip("10.1.0.0"), 16, oif=3, gateway=ip("10.0.0.2"), metric=9, table=1000, mtu=1400,
                                  src=ip("10.0.0.1"), protocol=241, scope=253, onlink=True))  # fmt: skip
    assert body == (
        bytes([2, 16, 0, 0, 0, 241, 253, 1]) + u32(4) + tlv(15, u32(1000)) + tlv(1, ip("10.1.0.0")) + tlv(4, u32(3))
        + tlv(5, ip("10.0.0.2")) + tlv(6, u32(9)) + tlv(7, ip("10.0.0.1")) + tlv(0x8008, tlv(2, u32(1400)))
    )  # fmt: skip
    assert route.add(Route(bytes(4), 0)).flags == 0x600 and route.replace(Route(bytes(4), 0)).flags == 0x500


def test_a_multipath_route_and_a_gateway_of_the_other_family() -> None:
    hops = (NextHop(3, ip("10.0.0.2"), 1), NextHop(4, ip("fe80::1"), 5, onlink=True))
    body = route.route_body(Route(bytes(4), 0, nexthops=hops))
    one = u16(16) + bytes([0, 0]) + u32(3) + tlv(5, ip("10.0.0.2"))
    two = u16(32) + bytes([4, 4]) + u32(4) + tlv(18, u16(10) + ip("fe80::1"))
    assert body == bytes([2, 0, 0, 0, 254, 4, 0, 1]) + u32(0) + tlv(15, u32(254)) + tlv(9, one + two)
    parsed = route.parse_route(body, 0, len(body))
    assert parsed == Route(bytes(4), 0, nexthops=hops)


def test_a_veth() -> None:
    mac, other = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"
    request = link.create(link.Veth("v0", "eth0", 1450, mac, other, peer_netns_fd=9, up=True))
    peer = bytes(16) + tlv(3, b"eth0\0") + tlv(4, u32(1450)) + tlv(1, other) + tlv(28, u32(9))
    assert request.type == 16 and request.flags == 0x600
    assert request.body == (
        bytes(8) + u32(1) + u32(1) + tlv(3, b"v0\0") + tlv(4, u32(1450)) + tlv(1, mac)
        + tlv(0x8012, tlv(1, b"veth") + tlv(0x8002, tlv(1, peer)))
    )  # fmt: skip


def test_a_vxlan() -> None:
    request = link.create(link.Vxlan("vx", 8472, zero_csum6=True, ttl=64, source_ports=(1, 2)))
    data = tlv(25, b"\1") + tlv(7, b"\0") + tlv(15, struct.pack("!H", 8472)) + tlv(18, b"\1") + tlv(19, b"\1")
    data += tlv(20, b"\1") + tlv(5, b"\x40") + tlv(10, struct.pack("!HH", 1, 2))
    assert request.body == bytes(16) + tlv(3, b"vx\0") + tlv(0x8012, tlv(1, b"vxlan") + tlv(0x8002, data))


def test_only_what_is_given_changes() -> None:
    assert link.change(5).body == bytes(4) + u32(5) + bytes(8)
    assert link.change(5, up=False).body == bytes(4) + u32(5) + u32(0) + u32(1)
    assert link.change(5, master=0, alias="").body == bytes(4) + u32(5) + bytes(8) + tlv(10, u32(0)) + tlv(20, b"")


@pytest.mark.parametrize("name", ["", "sixteen-letters!", "a/b", "..", "a b\n", "ä" * 8])
def test_impossible_names(name: str) -> None:
    with pytest.raises(ValueError, match="impossible device name"):
        link.create(link.Bridge(name))


@pytest.mark.parametrize(
    "make",
    [
        lambda: route.add(Route(b"abc", 8)),
        lambda: route.add(Route(bytes(4), 33)),
        lambda: route.add(Route(bytes(4), -1)),
        lambda: route.add(Route(bytes(4), 0, gateway=b"12345")),
        lambda: link.create(link.Bridge("br", mac=b"12345")),
        lambda: link.add_address(link.Address(1, b"12345", 8)),
        lambda: neighbour.replace(neighbour.Neighbour(1, bytes(4), b"12345")),
        lambda: neighbour.replace(neighbour.Neighbour(1, bytes(5))),
    ],
)
def test_impossible_values_never_reach_the_kernel(make: Callable[[], Request]) -> None:
    with pytest.raises(ValueError, match=r"bytes|prefix"):
        make()


def test_an_error_with_and_without_the_kernels_words() -> None:
    plain = struct.pack("=i", -errno.EEXIST) + bytes(16)
    assert parse_error(plain, 0, 0, 20) == (errno.EEXIST, "")
    words = tlv(1, b"because\0")
    assert parse_error(plain + words, 0x300, 0, 20 + len(words)) == (errno.EEXIST, "because")
    echoed = struct.pack("=i", -errno.EEXIST) + u32(24) + bytes(20) + words
    assert parse_error(echoed, 0x200, 0, len(echoed)) == (errno.EEXIST, "because")
    error = NetlinkError(errno.EEXIST, "add route x", "because")
    assert str(error) == "[Errno 17] add route x: File exists (because)"


addresses = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))
word = st.integers(0, 2**32 - 1)
byte = st.integers(0, 255)


@st.composite
def routes(draw: st.DrawFn) -> Route:
    dst = draw(addresses)
    prefix_len = draw(st.integers(1, 8 * len(dst)))
    kind = draw(st.sampled_from([RouteType.UNICAST, RouteType.UNREACHABLE, RouteType.BLACKHOLE, RouteType.LOCAL]))
    reach = kind in (RouteType.UNICAST, RouteType.LOCAL)
    hop = st.builds(NextHop, st.integers(1, 2**31 - 1), addresses, st.integers(1, 256), st.booleans())
    return Route(
        dst, prefix_len, draw(st.integers(1, 2**31 - 1)) if reach else 0, draw(st.one_of(st.just(b""), addresses)),
        kind, draw(st.integers(1, 2**32 - 1)), draw(byte), draw(byte), draw(word),
        draw(st.one_of(st.just(b""), st.just(dst))), draw(word), draw(st.booleans()),
        tuple(draw(st.lists(hop, max_size=3))),
    )  # fmt: skip


@given(routes())
def test_routes_round_trip(r: Route) -> None:
    body = route.route_body(r)
    assert len(body) % 4 == 0
    assert route.parse_route(body, 0, len(body)) == r
    assert parse_change(25, body, 0, len(body)) == Change(True, r)


@given(st.builds(neighbour.Neighbour, st.integers(1, 2**31 - 1), addresses, st.binary(min_size=6, max_size=6),
                 st.integers(0, 65535), st.booleans(), st.booleans(), byte))  # fmt: skip
def test_neighbours_round_trip(n: neighbour.Neighbour) -> None:
    body = neighbour.replace(n).body
    assert neighbour.parse_neighbour(body, 0, len(body)) == n


Parser = Callable[[bytes, int, int], Any]
PARSERS: list[Parser] = [
    link.parse_device, link.parse_address, route.parse_route, neighbour.parse_neighbour,
    tc.parse_qdisc, tc.parse_filter, attrs, lambda d, a, b: parse_error(d, 0x300, a, b),
    lambda d, a, b: parse_error(d, 0x200, a, b),
]  # fmt: skip


@given(raw=st.binary(max_size=200), index=st.integers(0, len(PARSERS) - 1))
def test_any_bytes(raw: bytes, index: int) -> None:
    with contextlib.suppress(WireError):
        PARSERS[index](raw, 0, len(raw))
        split(raw)


@given(st.data())
def test_damaged_messages(data: st.DataObject) -> None:
    hops = (NextHop(3, ip("10.0.0.2"), 1), NextHop(4, ip("fe80::1"), 5))
    samples: list[tuple[Parser, bytes]] = [
        (route.parse_route, route.route_body(Route(bytes(4), 0, nexthops=hops, mtu=1400))),
        (link.parse_device, link.create(link.Veth("v0", "eth0")).body),
        (link.parse_device, link.create(link.Vxlan("vx", 8472)).body),
        (link.parse_address, link.add_address(link.Address(1, bytes(16), 64)).body),
        (neighbour.parse_neighbour, neighbour.replace(neighbour.Neighbour(1, bytes(4), b"123456")).body),
    ]
    parser, body = data.draw(st.sampled_from(samples))
    raw = bytearray(body)
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(byte)
    for candidate in (bytes(raw), bytes(raw[: data.draw(st.integers(0, len(raw)))])):
        with contextlib.suppress(WireError):
            parser(candidate, 0, len(candidate))
