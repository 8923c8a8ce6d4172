"""Codecs: what they lay out, what they refuse when they are made, and what they refuse of rows."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NewType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.kernel.btf import Btf
from fimbria.kernel.codec import Codec, LayoutError, RowError, layout_hash

Base = tuple[Any, dict[str, int]]
Make = Callable[..., Btf]
Identity = NewType("Identity", int)


@pytest.fixture
def make(base: Base) -> Make:
    """Makes BTF with `struct x` of the given size and members (name, type's name, byte offset)."""

    def build(size: int, *members: tuple[str, str, int], name: str = "x") -> Btf:
        w, types = type(base[0])(), base[1]
        w.types, w.strings, w.count = base[0].types, base[0].strings, base[0].count
        inner = w.struct("inner", 4, [("low", types["u16"], 0), ("port", types["port_be_t"], 16)])
        known = {**types, "inner": inner, "inners": w.array(inner, 2)}
        w.struct(name, size, [(n, known[t], 8 * offset) for n, t, offset in members])
        return Btf(w.blob())

    return build


@dataclass(frozen=True, slots=True)
class Inner:
    port: int
    low: int


@dataclass(frozen=True, slots=True)
class Full:
    """Declared in another order than the struct, on purpose."""

    name: str
    wide: int
    small: int
    identity: Identity
    port: int
    be32: int
    flag: bool
    addr: bytes
    mac: bytes
    three: tuple[int, int, int]
    ports: tuple[int, ...]
    colour: int
    minus: int
    union: bytes
    inner: Inner
    inners: tuple[Inner, ...]


FULL = (
    ("wide", "u64", 0), ("addr", "addr_t", 8), ("small", "s16", 24), ("port", "port_be_t", 26),
    ("be32", "__be32", 28), ("identity", "identity_t", 32), ("flag", "bool", 36), ("pad", "u8", 37),
    ("mac", "mac_t", 38), ("name", "char8", 44), ("three", "three", 52), ("ports", "ports2", 58),
    ("_pad2", "u16", 62), ("colour", "colour", 64), ("minus", "signed", 68), ("union", "union", 72),
    ("inner", "inner", 76), ("inners", "inners", 80),
)  # fmt: skip
ROW = Full(
    "eth0", 2**64 - 1, -3, Identity(77), 8080, 0x01020304, True, bytes(range(16)), b"\2\0\0\0\0\1",
    (1, 2, 3), (80, 443), 1, -1, b"abcd", Inner(1, 2), (Inner(3, 4), Inner(5, 6)),
)  # fmt: skip


def test_every_kind_of_member(make: Make) -> None:
    codec = Codec(make(96, *FULL), "struct x", Full)
    raw = codec.encode(ROW)
    want = (
        b"\xff" * 8 + bytes(range(16)) + struct.pack("=h", -3) + b"\x1f\x90" + b"\1\2\3\4" + struct.pack("=I", 77)
        + b"\1\0" + b"\2\0\0\0\0\1" + b"eth0\0\0\0\0" + struct.pack("=HHH", 1, 2, 3) + b"\0\x50\x01\xbb" + b"\0\0"
        + struct.pack("=Ii", 1, -1) + b"abcd"
        + b"".join(struct.pack("=H", low) + struct.pack("!H", port) for low, port in ((2, 1), (4, 3), (6, 5)))
        + bytes(8)
    )  # fmt: skip
    assert raw == want and codec.size == 96
    assert codec.decode(raw) == ROW
    assert codec.decode_many(raw * 3) == [ROW] * 3
    assert codec.encode_many(iter([ROW, ROW])) == raw * 2
    assert codec.encode_many([]) == b"" and codec.decode_many(b"") == []


rows = st.builds(
    Full,
    name=st.text(max_size=7)
    .filter(lambda t: len(t.encode("utf-8", "surrogatepass")) < 8 and "\0" not in t)
    .filter(lambda t: t.isprintable()),
    wide=st.integers(0, 2**64 - 1),
    small=st.integers(-(2**15), 2**15 - 1),
    identity=st.integers(0, 2**32 - 1).map(Identity),
    port=st.integers(0, 65535),
    be32=st.integers(0, 2**32 - 1),
    flag=st.booleans(),
    addr=st.binary(min_size=16, max_size=16),
    mac=st.binary(min_size=6, max_size=6),
    three=st.tuples(*[st.integers(0, 65535)] * 3),
    ports=st.tuples(*[st.integers(0, 65535)] * 2),
    colour=st.integers(0, 2**32 - 1),
    minus=st.integers(-(2**31), 2**31 - 1),
    union=st.binary(min_size=4, max_size=4),
    inner=st.builds(Inner, st.integers(0, 65535), st.integers(0, 65535)),
    inners=st.tuples(*[st.builds(Inner, st.integers(0, 65535), st.integers(0, 65535))] * 2),
)


@given(st.lists(rows, max_size=4))
def test_round_trips(full: Codec[Full], many: list[Full]) -> None:
    raw = full.encode_many(many)
    assert full.decode_many(raw) == many
    assert raw == b"".join(full.encode(r) for r in many)


@given(st.binary(max_size=300))
def test_any_bytes_decode_or_are_refused(full: Codec[Full], raw: bytes) -> None:
    if len(raw) % 96:
        with pytest.raises(RowError, match="no multiple of 96"):
            full.decode_many(raw)
    else:
        assert len(full.decode_many(raw)) == len(raw) // 96


@pytest.fixture(scope="module")
def full(base: Base) -> Codec[Full]:
    w, types = type(base[0])(), base[1]
    w.types, w.strings, w.count = base[0].types, base[0].strings, base[0].count
    inner = w.struct("inner", 4, [("low", types["u16"], 0), ("port", types["port_be_t"], 16)])
    known = {**types, "inner": inner, "inners": w.array(inner, 2)}
    w.struct("x", 96, [(n, known[t], 8 * offset) for n, t, offset in FULL])
    return Codec(Btf(w.blob()), "struct x", Full)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"addr": b"short"}, "wrong length"),
        ({"addr": bytes(17)}, "wrong length"),
        ({"name": "much too long"}, "wrong length"),
        ({"name": "8 bytes!"}, "wrong length"),
        ({"three": (1, 2)}, "wrong length"),
        ({"port": 65536}, "struct x"),
        ({"port": -1}, "struct x"),
        ({"be32": 2**32}, "struct x"),
        ({"small": 40000}, "struct x"),
        ({"wide": -1}, "struct x"),
        ({"identity": None}, "struct x"),
        ({"inner": None}, "struct x"),
    ],
)
def test_rows_that_do_not_fit_are_named(full: Codec[Full], change: dict[str, Any], words: str) -> None:
    values = {name: getattr(ROW, name) for name in Full.__slots__}
    bad = Full(**{**values, **change})
    with pytest.raises(RowError, match=words) as caught:
        full.encode_many([ROW, bad, ROW])
    assert repr(bad) in str(caught.value)
    with pytest.raises(RowError):
        full.encode(bad)


def test_decode_wants_exactly_one(full: Codec[Full]) -> None:
    with pytest.raises(RowError, match="95 bytes, not 96"):
        full.decode(bytes(95))


@dataclass
class One:
    a: int


@dataclass
class Two:
    a: int
    b: int


@dataclass
class OneBytes:
    a: bytes


@dataclass
class OneBool:
    a: bool


@dataclass
class OneTuple:
    a: tuple[int, int]


addr = bytes


@dataclass
class BytesField:
    """A field that hides a builtin."""

    bytes: int
    a: addr


@dataclass(kw_only=True)
class Keyword:
    b: int
    a: int = 5


class NoDataclass:
    a: int


@pytest.mark.parametrize(
    ("cls", "members", "words"),
    [
        (Two, [("a", "u32", 0)], "struct x has no member 'b', which Two names"),
        (One, [("a", "u32", 0), ("b", "u32", 4)], "One lacks the member 'b' of struct x"),
        (One, [("a", "addr_t", 0)], r"struct x\.a is 16 bytes, the dataclass says int"),
        (OneBytes, [("a", "u32", 0)], r"struct x\.a is an integer of 4 bytes, the dataclass says bytes"),
        (OneBool, [("a", "u8", 0)], r"struct x\.a is an integer of 1 bytes, the dataclass says bool"),
        (One, [("a", "bool", 0)], r"struct x\.a is a boolean, the dataclass says int"),
        (One, [("a", "three", 0)], r"struct x\.a is an array of 3, the dataclass says int"),
        (OneTuple, [("a", "three", 0)], r"struct x\.a is an array of 3"),
        (One, [("a", "pointer", 0)], r"struct x\.a is a ptr"),
        (One, [("a", "inner", 0)], "int is no dataclass"),
        (NoDataclass, [("a", "u32", 0)], "NoDataclass is no dataclass"),
        (Two, [("a", "u32", 0), ("b", "u32", 2)], r"struct x\.b overlaps"),
    ],
)
def test_what_does_not_match_is_refused(
    make: Make, cls: type[Any], members: list[tuple[str, str, int]], words: str
) -> None:
    with pytest.raises(LayoutError, match=words):
        Codec(make(24, *members), "struct x", cls)


class Pair(NamedTuple):
    """In another order than the struct, and with a default."""

    port: int
    low: int = 7


def test_named_tuples_are_rows_too(make: Make) -> None:
    codec = Codec(make(4, ("low", "u16", 0), ("port", "port_be_t", 2)), "x", Pair)
    rows = [Pair(0x1234), Pair(80, 5)]
    assert codec.encode_many(rows) == struct.pack("=H", 7) + b"\x12\x34" + struct.pack("=H", 5) + b"\x00\x50"
    decoded = codec.decode_many(codec.encode_many(rows))
    assert decoded == rows
    assert {type(row) for row in decoded} == {Pair}
    with pytest.raises(RowError):
        codec.encode(Pair(1 << 16))


def test_named_tuples_must_match_as_well(make: Make) -> None:
    with pytest.raises(LayoutError, match="which Pair names"):
        Codec(make(4, ("low", "u16", 0)), "x", Pair)


def test_names_that_are_not_there(make: Make) -> None:
    btf = make(4, ("a", "u32", 0))
    for name in ("struct nope", "enum colour", "nope", "class x"):
        with pytest.raises(LayoutError, match=name):
            Codec(btf, name, One)


def test_holes_and_tails_are_zero(make: Make) -> None:
    codec = Codec(make(16, ("a", "u8", 1), ("b", "u16", 6)), "struct x", Two)
    assert codec.encode(Two(1, 2)) == b"\0\1\0\0\0\0" + struct.pack("=H", 2) + bytes(8)


def test_keyword_only_fields_and_fields_named_like_builtins(make: Make) -> None:
    keyword = Codec(make(8, ("a", "u32", 0), ("b", "u32", 4)), "struct x", Keyword)
    assert keyword.decode(keyword.encode(Keyword(b=2))) == Keyword(b=2, a=5)
    builtin = Codec(make(20, ("bytes", "u32", 0), ("a", "addr_t", 4)), "struct x", BytesField)
    row = BytesField(7, bytes(range(16)))
    assert builtin.decode(builtin.encode(row)) == row


def test_a_typedef_of_a_struct(base: Base) -> None:
    assert Codec(Btf(base[0].blob()), "mac_t", B6).encode(B6(b"123456")) == b"123456"


@dataclass
class B6:
    b: bytes


def test_a_bare_name_means_the_struct(make: Make) -> None:
    btf = make(4, ("a", "u32", 0))
    assert Codec(btf, "x", One).encode(One(1)) == Codec(btf, "struct x", One).encode(One(1))


def test_layout_hashes_tell_meanings_apart(make: Make) -> None:
    plain = [("a", "u32", 0), ("b", "u16", 4), ("pad", "u16", 6)]
    variants = [
        make(8, *plain),
        make(12, *plain),
        make(8, ("c", "u32", 0), *plain[1:]),
        make(8, ("a", "s32", 0), *plain[1:]),
        make(8, ("a", "identity_t", 0), *plain[1:]),
        make(8, plain[0], ("b", "port_be_t", 4), plain[2]),
        make(8, ("a", "u32", 4), ("b", "u16", 0), ("pad", "u16", 2)),
        make(8, ("a", "union", 0), *plain[1:]),
    ]
    hashes = [layout_hash(btf, "struct x") for btf in variants]
    assert len(set(hashes)) == len(hashes)
    assert layout_hash(make(8, *plain), "struct x") == hashes[0]
    assert all(len(h) == 12 and int(h, 16) >= 0 for h in hashes)
    assert layout_hash(make(8, *plain, name="y"), "struct y") != hashes[0]
