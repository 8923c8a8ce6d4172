"""BPF Type Format: what structs, enums and typedefs look like, out of an object file or the running kernel.

Format: Documentation/bpf/btf.rst of the kernel (sections 2.1 to 2.2 and 4); ELF: elf(5). Types are decoded when asked
for, because the kernel's own BTF has more than 100,000 of them.
"""

from __future__ import annotations

import os
import struct
import sys
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

_HEADER = struct.Struct("=HBBIIIII")  # magic, version, flags, header length, type offset/length, string offset/length
_TYPE = struct.Struct("=III")  # name offset, info, size or type
_TRIPLE = struct.Struct("=III")
_PAIR = struct.Struct("=Ii")
_MAGIC = 0xEB9F
_SIZE_LIMIT = 256 << 20
_DEPTH_LIMIT = 64


class BtfError(ValueError):
    """Malformed BTF, or a type that isn't there."""


class Kind(IntEnum):
    """BTF_KIND_*."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


# What follows struct btf_type: so many bytes, plus so many for each of `vlen`.
_EXTRA = {
    Kind.INT: (4, 0), Kind.PTR: (0, 0), Kind.ARRAY: (12, 0), Kind.STRUCT: (0, 12), Kind.UNION: (0, 12),
    Kind.ENUM: (0, 8), Kind.FWD: (0, 0), Kind.TYPEDEF: (0, 0), Kind.VOLATILE: (0, 0), Kind.CONST: (0, 0),
    Kind.RESTRICT: (0, 0), Kind.FUNC: (0, 0), Kind.FUNC_PROTO: (0, 8), Kind.VAR: (4, 0), Kind.DATASEC: (0, 12),
    Kind.FLOAT: (0, 0), Kind.DECL_TAG: (4, 0), Kind.TYPE_TAG: (0, 0), Kind.ENUM64: (0, 12),
}  # fmt: skip
_EXTRA_OF = [_EXTRA.get(Kind(k)) if k else None for k in range(20)]
_SIZED = frozenset({Kind.INT, Kind.STRUCT, Kind.UNION, Kind.ENUM, Kind.DATASEC, Kind.FLOAT, Kind.ENUM64})
_MODIFIERS = frozenset({Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG})


@dataclass(frozen=True, slots=True)
class Member:
    """A member of a struct or union. `bits` is 0 unless it is a bitfield; `bit_offset` from the start of the struct."""

    name: str
    type_id: int
    bit_offset: int
    bits: int


@dataclass(frozen=True, slots=True)
class Type:
    """One type. `size` in bytes (0 where the kind has none); `type_id` for the kinds that refer to another type.

    `members` of structs and unions, `values` of enums, `count` of arrays (whose element type is `type_id`), `signed`
    of integers and enums.
    """

    id: int
    kind: Kind
    name: str
    size: int
    type_id: int
    members: tuple[Member, ...] = ()
    values: tuple[tuple[str, int], ...] = ()
    count: int = 0
    signed: bool = False
    boolean: bool = False


@dataclass(frozen=True, slots=True)
class Resolved:
    """A type behind its typedefs and qualifiers, with the typedef names met on the way, outermost first."""

    type: Type
    typedefs: tuple[str, ...]


class Btf:
    """A parsed BTF blob. All errors are BtfError."""

    def __init__(self, raw: bytes) -> None:
        """Checks the blob's frame and finds where each type is."""
        if len(raw) < _HEADER.size:
            raise BtfError("BTF is shorter than its header")
        magic, version, _flags, header, type_off, type_len, str_off, str_len = _HEADER.unpack_from(raw)
        if magic != _MAGIC or version != 1:
            raise BtfError(f"not BTF of this machine's byte order: magic {magic:#06x}, version {version}")
        types, strings = header + type_off, header + str_off
        if header < _HEADER.size or types + type_len > len(raw) or strings + str_len > len(raw):
            raise BtfError("BTF sections lie outside the data")
        self._raw = raw
        self._strings = raw[strings : strings + str_len]
        self._offsets = self._scan(types, types + type_len)
        self._types: dict[int, Type] = {0: Type(0, Kind.VOID, "void", 0, 0)}
        self._index: dict[tuple[Kind, str], int] | None = None

    @classmethod
    def from_elf(cls, source: bytes | str | os.PathLike[str]) -> Btf:
        """The BTF of an object file. Raises BtfError, OSError."""
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        return cls(elf_section(data, ".BTF"))

    def __len__(self) -> int:
        return len(self._offsets)

    def _scan(self, position: int, end: int) -> list[int]:
        offsets = [0]
        unpack, raw, extras = _TYPE.unpack_from, self._raw, _EXTRA_OF
        while position < end:
            if position + 12 > end:
                raise BtfError(f"type {len(offsets)} is cut")
            info = unpack(raw, position)[1]
            kind = info >> 24 & 0x1F
            extra = extras[kind] if kind < len(extras) else None
            if extra is None:
                raise BtfError(f"type {len(offsets)} is of unknown kind {kind}")
            offsets.append(position)
            position += 12 + extra[0] + extra[1] * (info & 0xFFFF)
        if position != end:
            raise BtfError(f"type {len(offsets) - 1} is cut")
        return offsets

    def _string(self, offset: int) -> str:
        if offset >= len(self._strings) and offset:
            raise BtfError(f"name at {offset} lies outside the strings")
        end = self._strings.find(b"\0", offset)
        return self._strings[offset : end if end >= 0 else None].decode(errors="replace")

    def type(self, type_id: int) -> Type:
        """A type by its number; 0 is void."""
        found = self._types.get(type_id)
        if found is None:
            if not 0 < type_id < len(self._offsets):
                raise BtfError(f"there is no type {type_id}")
            found = self._types[type_id] = self._decode(type_id)
        return found

    def _decode(self, type_id: int) -> Type:
        position = self._offsets[type_id]
        name_off, info, third = _TYPE.unpack_from(self._raw, position)
        kind, vlen, flag = Kind(info >> 24 & 0x1F), info & 0xFFFF, bool(info >> 31)
        name = self._string(name_off)
        position += 12
        size, ref = (third, 0) if kind in _SIZED else (0, third)
        if kind is Kind.INT:
            encoding = struct.unpack_from("=I", self._raw, position)[0] >> 24
            return Type(type_id, kind, name, size, 0, signed=bool(encoding & 1), boolean=bool(encoding & 4))
        if kind is Kind.ARRAY:
            element, _index, count = _TRIPLE.unpack_from(self._raw, position)
            return Type(type_id, kind, name, 0, element, count=count)
        if kind in (Kind.STRUCT, Kind.UNION):
            return Type(type_id, kind, name, size, 0, members=self._members(position, vlen, flag))
        if kind is Kind.ENUM:
            pairs = (_PAIR.unpack_from(self._raw, position + 8 * i) for i in range(vlen))
            values = tuple((self._string(n), v if flag else v & 0xFFFFFFFF) for n, v in pairs)
            return Type(type_id, kind, name, size, 0, values=values, signed=flag)
        if kind is Kind.ENUM64:
            triples = (_TRIPLE.unpack_from(self._raw, position + 12 * i) for i in range(vlen))
            values = tuple((self._string(n), _wide(low, high, flag)) for n, low, high in triples)
            return Type(type_id, kind, name, size, 0, values=values, signed=flag)
        return Type(type_id, kind, name, size, ref)

    def _members(self, position: int, vlen: int, flag: bool) -> tuple[Member, ...]:
        members = []
        for i in range(vlen):
            name, ref, offset = _TRIPLE.unpack_from(self._raw, position + 12 * i)
            bits, offset = (offset >> 24, offset & 0xFFFFFF) if flag else (0, offset)
            members.append(Member(self._string(name), ref, offset, bits))
        return tuple(members)

    def find(self, kind: Kind, name: str) -> Type:
        """A type by its kind and name."""
        if self._index is None:
            self._index = {}
            for i in range(1, len(self._offsets)):
                name_off, info, _ = _TYPE.unpack_from(self._raw, self._offsets[i])
                if name_off:
                    self._index.setdefault((Kind(info >> 24 & 0x1F), self._string(name_off)), i)
        found = self._index.get((kind, name))
        if found is None:
            raise BtfError(f"there is no {kind.name.lower()} {name}")
        return self.type(found)

    def named(self, name: str) -> Type:
        """A type by what it is called in C: `struct x`, `union x`, `enum x`, or a typedef's name.

        A bare name that is no typedef means the struct.
        """
        first, _, rest = name.partition(" ")
        if not rest:
            try:
                return self.find(Kind.TYPEDEF, name)
            except BtfError:
                return self.find(Kind.STRUCT, name)
        if first == "enum":
            try:
                return self.find(Kind.ENUM, rest)
            except BtfError:
                return self.find(Kind.ENUM64, rest)
        if first not in ("struct", "union"):
            raise BtfError(f"not the name of a type: {name!r}")
        return self.find(Kind[first.upper()], rest)

    def resolve(self, type_id: int) -> Resolved:
        """Follows typedefs and qualifiers."""
        typedefs = []
        for _ in range(_DEPTH_LIMIT):
            found = self.type(type_id)
            if found.kind is Kind.TYPEDEF:
                typedefs.append(found.name)
            elif found.kind not in _MODIFIERS:
                return Resolved(found, tuple(typedefs))
            type_id = found.type_id
        raise BtfError(f"type {type_id} refers to itself")

    def size_of(self, type_id: int, depth: int = 0) -> int:
        """The size of a type in bytes."""
        found = self.resolve(type_id).type
        if depth > _DEPTH_LIMIT:
            raise BtfError(f"type {type_id} refers to itself")
        if found.kind is Kind.PTR:
            return 8
        if found.kind is Kind.ARRAY:
            return found.count * self.size_of(found.type_id, depth + 1)
        if found.kind not in _SIZED:
            raise BtfError(f"a {found.kind.name.lower()} has no size")
        return found.size


def _wide(low: int, high: int, signed: bool) -> int:
    value = high << 32 | low
    return value - (1 << 64) if signed and value >> 63 else value


def enum_values(btf: Btf, name: str) -> dict[str, int]:
    """The names and values of an enum, e.g. `drop_reason`. Raises BtfError."""
    return dict(btf.named(f"enum {name}").values)


_ELF_HEADER = struct.Struct("=16sHHIQQQIHHHHHH")
_ELF_SECTION = struct.Struct("=IIQQQQIIQQ")


def elf_section(data: bytes, wanted: str) -> bytes:
    """The content of a section of a 64-bit ELF file of this machine's byte order. Raises BtfError."""
    if len(data) < _ELF_HEADER.size or data[:5] != b"\x7fELF\x02":
        raise BtfError("not a 64-bit ELF file")
    if data[5] != (1 if sys.byteorder == "little" else 2):
        raise BtfError("an ELF file of the other byte order")
    fields = _ELF_HEADER.unpack_from(data)
    table, entry, count, names_index = fields[6], fields[11], fields[12], fields[13]
    if entry < _ELF_SECTION.size or names_index >= count or table + entry * count > len(data):
        raise BtfError("ELF section table lies outside the file")
    sections = [_ELF_SECTION.unpack_from(data, table + entry * i) for i in range(count)]
    names = _content(data, sections[names_index])
    for section in sections:
        end = names.find(b"\0", section[0])
        if names[section[0] : end if end >= 0 else None] == wanted.encode():
            return _content(data, section)
    raise BtfError(f"the ELF file has no section {wanted}")


def _content(data: bytes, section: tuple[int, ...]) -> bytes:
    offset, size = section[4], section[5]
    if size > _SIZE_LIMIT or offset + size > len(data):
        raise BtfError("ELF section lies outside the file")
    return data[offset : offset + size]
