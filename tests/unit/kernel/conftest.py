"""A writer of BTF, so that the parser is tested without a compiler."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest


class BtfWriter:
    """Builds a BTF blob type by type; each method returns the new type's number."""

    def __init__(self) -> None:
        self.types = b""
        self.strings = b"\0"
        self.count = 0

    def name(self, text: str) -> int:
        if not text:
            return 0
        offset = len(self.strings)
        self.strings += text.encode() + b"\0"
        return offset

    def add(self, kind: int, name: str, third: int, extra: bytes = b"", vlen: int = 0, flag: bool = False) -> int:
        info = kind << 24 | vlen | flag << 31
        self.types += struct.pack("=III", self.name(name), info, third) + extra
        self.count += 1
        return self.count

    def integer(self, name: str, size: int, encoding: int = 0) -> int:
        return self.add(1, name, size, struct.pack("=I", encoding << 24 | size * 8))

    def typedef(self, name: str, to: int) -> int:
        return self.add(8, name, to)

    def array(self, element: int, count: int) -> int:
        return self.add(3, "", 0, struct.pack("=III", element, element, count))

    def struct(
        self, name: str, size: int, members: Sequence[tuple[str, int, int]], kind: int = 4, flag: bool = False
    ) -> int:
        """Members as (name, type, offset in bits)."""
        extra = b"".join(struct.pack("=III", self.name(n), t, offset) for n, t, offset in members)
        return self.add(kind, name, size, extra, len(members), flag)

    def enum(self, name: str, values: dict[str, int], size: int = 4, signed: bool = False) -> int:
        if size == 8:
            halves = [(k, v & 0xFFFFFFFF, v >> 32 & 0xFFFFFFFF) for k, v in values.items()]
            extra = b"".join(struct.pack("=III", self.name(k), low, high) for k, low, high in halves)
            return self.add(19, name, size, extra, len(values), signed)
        extra = b"".join(struct.pack("=II", self.name(k), v & 0xFFFFFFFF) for k, v in values.items())
        return self.add(6, name, size, extra, len(values), signed)

    def blob(self) -> bytes:
        header = struct.pack(
            "=HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings)
        )  # fmt: skip
        return header + self.types + self.strings


@pytest.fixture
def writer() -> BtfWriter:
    """An empty writer."""
    return BtfWriter()


@pytest.fixture(scope="session")
def base() -> tuple[BtfWriter, dict[str, int]]:
    """A writer with the integer types and the typedefs that the codec knows, and their numbers."""
    w = BtfWriter()
    t = {f"u{8 * s}": w.integer(f"u{8 * s}", s) for s in (1, 2, 4, 8)}
    t |= {f"s{8 * s}": w.integer(f"s{8 * s}", s, 1) for s in (1, 2, 4, 8)}
    t["bool"] = w.integer("_Bool", 1, 4)
    t["char"] = w.integer("char", 1, 1)
    t["const"] = w.add(10, "", t["u32"])
    t["identity_t"] = w.typedef("identity_t", t["const"])
    t["port_be_t"] = w.typedef("port_be_t", t["u16"])
    t["__be32"] = w.typedef("__be32", t["u32"])
    t["bytes16"] = w.array(t["u8"], 16)
    t["addr_t"] = w.typedef("addr_t", w.struct("", 16, [("b", t["bytes16"], 0)]))
    t["bytes6"] = w.array(t["u8"], 6)
    t["mac_t"] = w.typedef("mac_t", w.struct("", 6, [("b", t["bytes6"], 0)]))
    t["char8"] = w.array(t["char"], 8)
    t["three"] = w.array(t["u16"], 3)
    t["ports2"] = w.array(t["port_be_t"], 2)
    t["pointer"] = w.add(2, "", t["u8"])
    t["colour"] = w.enum("colour", {"RED": 1, "GREEN": 2**32 - 1})
    t["signed"] = w.enum("signed", {"MINUS": -1}, signed=True)
    t["wide"] = w.enum("wide", {"HUGE": 2**63, "SMALL": 1}, size=8)
    t["union"] = w.struct("", 4, [("a", t["u32"], 0), ("b", t["u16"], 0)], kind=5)
    return w, t
