"""The BTF parser: what it reads, and that nothing but BtfError comes of bad data."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.kernel.btf import Btf, BtfError, Kind, elf_section, enum_values

Base = tuple[Any, dict[str, int]]


def test_types_by_name_and_number(base: Base) -> None:
    w, t = base
    btf = Btf(w.blob())
    assert len(btf) == w.count + 1
    u16 = btf.type(t["u16"])
    assert (u16.kind, u16.name, u16.size, u16.signed, u16.boolean) == (Kind.INT, "u16", 2, False, False)
    assert btf.type(t["s16"]).signed and btf.type(t["bool"]).boolean
    assert btf.find(Kind.ENUM, "colour").id == t["colour"]
    assert btf.named("identity_t").kind is Kind.TYPEDEF
    resolved = btf.resolve(t["identity_t"])
    assert (resolved.type.name, resolved.typedefs) == ("u32", ("identity_t",))
    assert btf.type(0).kind is Kind.VOID


def test_sizes(base: Base) -> None:
    w, t = base
    btf = Btf(w.blob())
    sizes = {name: btf.size_of(t[name]) for name in ("addr_t", "mac_t", "three", "pointer", "wide", "union", "char8")}
    assert sizes == {"addr_t": 16, "mac_t": 6, "three": 6, "pointer": 8, "wide": 8, "union": 4, "char8": 8}
    with pytest.raises(BtfError, match="void has no size"):
        btf.size_of(0)


def test_enums_of_both_widths(base: Base) -> None:
    btf = Btf(base[0].blob())
    assert enum_values(btf, "colour") == {"RED": 1, "GREEN": 2**32 - 1}
    assert enum_values(btf, "signed") == {"MINUS": -1}
    assert enum_values(btf, "wide") == {"HUGE": 2**63, "SMALL": 1}
    with pytest.raises(BtfError, match="no enum64 nope"):
        enum_values(btf, "nope")


def test_members_and_bitfields(writer: Any) -> None:
    u32 = writer.integer("u32", 4)
    writer.struct("plain", 8, [("a", u32, 0), ("b", u32, 32)])
    writer.struct("bits", 4, [("low", u32, 3 << 24), ("high", u32, 29 << 24 | 3)], flag=True)
    btf = Btf(writer.blob())
    assert [(m.name, m.bit_offset, m.bits) for m in btf.named("struct plain").members] == [("a", 0, 0), ("b", 32, 0)]
    assert [(m.name, m.bit_offset, m.bits) for m in btf.named("struct bits").members] == [
        ("low", 0, 3),
        ("high", 3, 29),
    ]


def test_types_that_refer_to_themselves(writer: Any) -> None:
    writer.typedef("loop", 1)
    writer.array(2, 3)
    btf = Btf(writer.blob())
    for type_id in (1, 2):
        with pytest.raises(BtfError, match="refers to itself"):
            btf.size_of(type_id)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "shorter than its header"),
        (b"\0" * 24, "byte order"),
        (struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 999, 999, 0), "outside"),
        (struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 12, 12, 0) + struct.pack("=III", 0, 31 << 24, 0), "kind 31"),
        (struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, 12, 12, 0) + struct.pack("=III", 0, 4 << 24 | 9, 0), "cut"),
    ],
)
def test_bad_frames(raw: bytes, words: str) -> None:
    with pytest.raises(BtfError, match=words):
        Btf(raw)


def walk(raw: bytes) -> None:
    """Reads everything there is; only BtfError may come of it."""
    try:
        btf = Btf(raw)
    except BtfError:
        return
    for i in range(len(btf)):
        with contextlib.suppress(BtfError):
            btf.type(i)
            btf.size_of(i)


@given(st.binary(max_size=200))
def test_any_bytes(raw: bytes) -> None:
    walk(raw)
    walk(struct.pack("=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(raw), len(raw), 0) + raw)


@given(st.data())
def test_a_damaged_blob(base: Base, data: st.DataObject) -> None:
    raw = bytearray(base[0].blob())
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    walk(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    walk(bytes(raw))


def elf(content: bytes, name: str = ".BTF") -> bytes:
    names = b"\0" + name.encode() + b"\0"
    table = 64 + len(content) + len(names)
    header = struct.pack("=16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 1, 247, 1, 0, 0, table, 0, 64, 0, 0, 64, 2, 1)
    sections = struct.pack("=IIQQQQIIQQ", 1, 1, 0, 0, 64, len(content), 0, 0, 1, 0)
    sections += struct.pack("=IIQQQQIIQQ", 0, 3, 0, 0, 64 + len(content), len(names), 0, 0, 1, 0)
    return header + content + names + sections


def test_the_section_of_an_elf_file() -> None:
    assert elf_section(elf(b"hello"), ".BTF") == b"hello"
    with pytest.raises(BtfError, match=r"no section \.BTF"):
        elf_section(elf(b"hello", ".text"), ".BTF")


@given(st.data())
def test_a_damaged_elf_file(data: st.DataObject) -> None:
    raw = bytearray(elf(b"hello"))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    for candidate in (bytes(raw), bytes(raw[: data.draw(st.integers(0, len(raw)))])):
        with contextlib.suppress(BtfError):
            elf_section(candidate, ".BTF")
