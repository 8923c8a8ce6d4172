"""Turns dataclasses and NamedTuples into the bytes of C structs and back, by the structs' BTF.

A dataclass restates the field names only. Sizes, offsets, signedness and, through typedef names, the meaning come from
BTF, so there is nothing to keep in step; what doesn't match is refused when the codec is made. By typedef name:

    addr_t, ipv4_be_t, mac_t         bytes of exactly that size, as they are on the wire
    other names ending in be_t or    int in host order, big-endian in memory
    starting with __be
    anything else                    by its type: int, bool, bytes (arrays of __u8, unions), str (char arrays),
                                     nested dataclass, tuple (other arrays)

Every codec is two generated functions around one compiled struct.Struct: no Python loop over fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar, get_args, get_origin

from fimbria.kernel.btf import Btf, BtfError, Kind, Member, Resolved, Type

T = TypeVar("T")

_PACKED = frozenset({"addr_t", "ipv4_be_t", "mac_t"})
_INT_FORMATS = {(1, False): "B", (1, True): "b", (2, False): "H", (2, True): "h",
                (4, False): "I", (4, True): "i", (8, False): "Q", (8, True): "q"}  # fmt: skip
_ARRAY_LIMIT = 256


class LayoutError(Exception):
    """A dataclass and a struct don't match; the message names both and the field."""


class RowError(ValueError):
    """A row that can't be encoded, or bytes of the wrong length."""


def _is_padding(name: str) -> bool:
    return name.startswith(("pad", "_pad"))


def _is_big_endian(typedefs: tuple[str, ...]) -> bool:
    return any(t.endswith("be_t") or t.startswith("__be") for t in typedefs)


class _Builder:
    """Collects one struct's format, the expressions that rebuild it, and those that take it apart."""

    def __init__(self, btf: Btf, cls: type, twin: type) -> None:
        self.btf = btf
        self.makers: dict[type, type] = {cls: twin}
        self.format: list[str] = []
        self.position = 0
        self.slots = 0
        self.pack: list[str] = []
        self.checks: list[str] = []
        self.names: dict[str, object] = {}

    def skip_to(self, offset: int, what: str) -> None:
        if offset < self.position:
            raise LayoutError(f"{what} overlaps the member before it")
        if offset > self.position:
            self.format.append(f"{offset - self.position}x")
            self.position = offset

    def slot(self, code: str, size: int) -> str:
        """Room for one value of struct.Struct; returns the variable that holds it after unpacking."""
        self.format.append(code)
        self.position += size
        self.slots += 1
        return f"v{self.slots - 1}"

    def known(self, thing: object) -> str:
        name = f"k{len(self.names)}"
        self.names[name] = thing
        return name


def _hint(hint: Any) -> Any:
    while hasattr(hint, "__supertype__"):
        hint = hint.__supertype__
    return hint


def _fields(cls: type, what: str) -> dict[str, Any]:
    named = _is_named_tuple(cls)
    if not named and not dataclasses.is_dataclass(cls):
        raise LayoutError(f"{what}: {cls.__name__} is no dataclass")
    # The class's own namespace would shadow builtins: a field may well be called `bytes`.
    module = typing.get_type_hints(cls, localns={})
    names = cls._fields if named else (f.name for f in dataclasses.fields(cls) if f.init)  # type: ignore[attr-defined]
    return {name: _hint(module[name]) for name in names}


def _struct(b: _Builder, found: Type, cls: type, source: str, what: str) -> str:
    """Adds a struct's members; returns the expression that builds the dataclass."""
    if found.kind is not Kind.STRUCT:
        raise LayoutError(f"{what} is a {found.kind.name.lower()}, not a struct")
    base, fields = b.position, _fields(cls, what)
    members = {m.name for m in found.members}
    extra = [name for name in fields if name not in members]
    if extra:
        raise LayoutError(f"{what} has no member {extra[0]!r}, which {cls.__name__} names")
    arguments = []
    for member in found.members:
        if member.name not in fields:
            if _is_padding(member.name):
                continue
            raise LayoutError(f"{cls.__name__} lacks the member {member.name!r} of {what}")
        where = f"{what}.{member.name}"
        if member.bits or member.bit_offset % 8:
            raise LayoutError(f"{where} is a bitfield")
        b.skip_to(base + member.bit_offset // 8, where)
        value = _value(b, b.btf.resolve(member.type_id), fields[member.name], f"{source}.{member.name}", where)
        arguments.append(f"{member.name}={value}" if _keyword_only(cls, member.name) else (member.name, value))
    b.skip_to(base + found.size, what)
    by_name = dict(a for a in arguments if isinstance(a, tuple))
    order = [by_name[name] for name in fields if name in by_name] + [a for a in arguments if isinstance(a, str)]
    if _is_named_tuple(cls):
        return f"{b.known(tuple.__new__)}({b.known(cls)}, ({', '.join(order)},))"
    return f"{b.known(b.makers.get(cls, cls))}({', '.join(order)})"


def _twin(cls: type) -> type:
    """A class of the same memory layout whose instances are made five times as fast, or `cls` itself.

    A frozen dataclass sets each field through object.__setattr__. An instance of the twin is filled by plain
    assignments and then becomes one of `cls` by its `__class__`, which Python allows where the slots are the same.
    """
    params = getattr(cls, "__dataclass_params__", None)
    slots = cls.__dict__.get("__slots__", ())
    if params is None or not params.frozen or not params.init or hasattr(cls, "__post_init__"):
        return cls
    if cls.__bases__ != (object,) or tuple(slots) != tuple(f.name for f in dataclasses.fields(cls)):
        return cls
    text = f"def __init__(self, {', '.join(slots)}):\n" + "".join(f"    self.{n} = {n}\n" for n in slots) + "    pass\n"
    scope: dict[str, Any] = {}
    exec(compile(text, "<codec>", "exec"), scope)  # noqa: S102 built from identifiers only
    return type(cls.__name__, (), {"__slots__": slots, "__init__": scope["__init__"]})


def _is_named_tuple(cls: type) -> bool:
    return issubclass(cls, tuple) and hasattr(cls, "_fields")


def _keyword_only(cls: Any, name: str) -> bool:
    return not _is_named_tuple(cls) and any(f.name == name and f.kw_only for f in dataclasses.fields(cls))


def _value(b: _Builder, found: Resolved, hint: Any, source: str, what: str) -> str:
    """Adds one value; returns the expression that converts it after unpacking."""
    kind = found.type.kind
    if _PACKED.intersection(found.typedefs):
        return _bytes(b, b.btf.size_of(found.type.id), hint, source, what)
    if kind in (Kind.INT, Kind.ENUM, Kind.ENUM64):
        return _int(b, found, hint, source, what)
    if kind is Kind.ARRAY:
        return _array(b, found.type, hint, source, what)
    if kind is Kind.STRUCT and hint is not bytes:
        if not isinstance(hint, type):
            raise LayoutError(f"{what} is a struct, {hint} can't hold it")
        return _struct(b, found.type, hint, source, what)
    if kind in (Kind.UNION, Kind.STRUCT):
        return _bytes(b, found.type.size, hint, source, what)
    raise LayoutError(f"{what} is a {kind.name.lower()}, which has no meaning outside the kernel")


def _int(b: _Builder, found: Resolved, hint: Any, source: str, what: str) -> str:
    size, signed = found.type.size, found.type.signed
    if found.type.boolean:
        if hint is not bool:
            raise LayoutError(f"{what} is a boolean, the dataclass says {_show(hint)}")
        b.pack.append(source)
        return b.slot("?", 1)
    if hint is not int:
        raise LayoutError(f"{what} is an integer of {size} bytes, the dataclass says {_show(hint)}")
    if _is_big_endian(found.typedefs) and size == 2:
        # Two bytes and a shift: struct.Struct has one byte order for all of its values.
        b.pack += [f"{source} >> 8", f"{source} & 255"]
        return f"({b.slot('B', 1)} << 8 | {b.slot('B', 1)})"
    if _is_big_endian(found.typedefs) and size > 1:
        b.pack.append(f"{source}.to_bytes({size}, 'big')")
        return f"{b.known(int.from_bytes)}({b.slot(f'{size}s', size)}, 'big')"
    code = _INT_FORMATS.get((size, signed))
    if code is None:
        raise LayoutError(f"{what} is an integer of {size} bytes")
    b.pack.append(source)
    return b.slot(code, size)


def _bytes(b: _Builder, size: int, hint: Any, source: str, what: str) -> str:
    if hint is not bytes:
        raise LayoutError(f"{what} is {size} bytes, the dataclass says {_show(hint)}")
    # struct.pack would silently cut or fill.
    b.checks.append(f"len({source}) == {size}")
    b.pack.append(source)
    return b.slot(f"{size}s", size)


def _array(b: _Builder, array: Type, hint: Any, source: str, what: str) -> str:
    element = b.btf.resolve(array.type_id)
    one_byte = element.type.kind is Kind.INT and element.type.size == 1 and not element.type.boolean
    if one_byte and hint is bytes:
        return _bytes(b, array.count, hint, source, what)
    if one_byte and hint is str:
        b.checks.append(f"len({source}.encode()) < {array.count}")
        b.pack.append(f"{source}.encode()")
        return f"{b.slot(f'{array.count}s', array.count)}.split(b'\\0', 1)[0].decode('utf-8', 'replace')"
    items = get_args(hint)
    if get_origin(hint) is not tuple or not items:
        raise LayoutError(f"{what} is an array of {array.count}, the dataclass says {_show(hint)}")
    variadic = len(items) == 2 and items[1] is Ellipsis
    if not variadic and len(items) != array.count:
        raise LayoutError(f"{what} is an array of {array.count}, the dataclass says {_show(hint)}")
    if array.count > _ARRAY_LIMIT:
        raise LayoutError(f"{what} is an array of {array.count}: declare it as bytes")
    b.checks.append(f"len({source}) == {array.count}")
    hints = [_hint(items[0])] * array.count if variadic else [_hint(i) for i in items]
    values = [_value(b, element, h, f"{source}[{i}]", f"{what}[{i}]") for i, h in enumerate(hints)]
    return f"({', '.join(values)},)" if values else "()"


def _show(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if get_origin(hint) is None else str(hint)


class Codec(Generic[T]):
    """Encodes and decodes rows of one struct. `size` is the struct's, in bytes."""

    def __init__(self, btf: Btf, name: str, cls: type[T]) -> None:
        """Binds `cls` to `struct name` (or a typedef of one). Raises LayoutError when they don't match."""
        self.name = name
        try:
            found = btf.resolve(btf.named(name).id)
            twin = _twin(cls)
            builder = _Builder(btf, cls, twin)
            build = _struct(builder, found.type, cls, "r", name)
        except BtfError as e:
            raise LayoutError(f"{name}: {e}") from e
        compiled = struct.Struct("=" + "".join(builder.format))
        self.size = found.type.size
        if compiled.size != self.size:
            raise LayoutError(f"{name}: {compiled.size} bytes laid out, {self.size} expected")
        self._encode_all, self._decode_all = _generate(
            builder, build, compiled, self._refuse, cls if twin is not cls else None
        )

    def _refuse(self, row: object) -> bytes:
        raise RowError(f"{self.name}: a value of the wrong length in {row!r}")

    def encode(self, row: T) -> bytes:
        """The struct's bytes. Raises RowError."""
        return self.encode_many((row,))

    def decode(self, data: bytes | bytearray | memoryview) -> T:
        """The row in exactly `size` bytes. Raises RowError."""
        if len(data) != self.size:
            raise RowError(f"{self.name}: {len(data)} bytes, not {self.size}")
        return typing.cast(T, self._decode_all(data)[0])

    def encode_many(self, rows: Iterable[T]) -> bytes:
        """The bytes of all rows, one after the other. Raises RowError naming the row that doesn't fit."""
        if not isinstance(rows, Sequence):
            rows = list(rows)
        try:
            return self._encode_all(rows)
        except (struct.error, OverflowError, TypeError, AttributeError) as e:
            raise RowError(f"{self.name}: {e} in {self._culprit(rows)!r}") from e

    def decode_many(self, data: bytes | bytearray | memoryview) -> list[T]:
        """The rows in `data`. Raises RowError when its length is no multiple of `size`."""
        if len(data) % self.size:
            raise RowError(f"{self.name}: {len(data)} bytes are no multiple of {self.size}")
        return self._decode_all(data)

    def _culprit(self, rows: Sequence[T]) -> object:
        for row in rows:
            try:
                self._encode_all((row,))
            except Exception:
                return row
        return None


def _generate(
    b: _Builder, build: str, compiled: struct.Struct, refuse: Callable[[object], bytes], become: type | None
) -> tuple[Callable[[Sequence[Any]], bytes], Callable[[Any], list[Any]]]:
    """Two functions whose text depends on names out of the dataclass and the BTF, all of them Python identifiers."""
    pack = f"pack({', '.join(b.pack)})"
    if b.checks:
        pack = f"{pack} if {' and '.join(b.checks)} else refuse(r)"
    values = ", ".join(f"v{i}" for i in range(b.slots)) + ","
    text = (
        f"def encode_all(rows):\n    return join([{pack} for r in rows])\n"
        f"def decode_all(data):\n    rows = [{build} for {values} in unpack(data)]\n"
        + ("    for r in rows:\n        r.__class__ = become\n" if become else "")
        + "    return rows\n"
    )
    scope: dict[str, Any] = {
        **b.names, "pack": compiled.pack, "join": b"".join, "refuse": refuse, "unpack": compiled.iter_unpack,
        "become": become,
    }  # fmt: skip
    exec(compile(text, "<codec>", "exec"), scope)  # noqa: S102 built from identifiers only
    return scope["encode_all"], scope["decode_all"]


# -- layout hashes


def _describe_member(btf: Btf, member: Member, depth: int) -> str:
    found = btf.resolve(member.type_id)
    names = "/".join(found.typedefs)
    return f"{member.name}@{member.bit_offset}:{member.bits} {names} {_describe(btf, found.type, depth + 1)}"


def _describe(btf: Btf, found: Type, depth: int) -> str:
    if depth > 16:
        raise BtfError(f"{found.name} is nested too deeply")
    if found.kind in (Kind.STRUCT, Kind.UNION):
        inner = "; ".join(_describe_member(btf, m, depth) for m in found.members)
        return f"{found.kind.name} {found.size} {{{inner}}}"
    if found.kind is Kind.ARRAY:
        element = btf.resolve(found.type_id)
        names = "/".join(element.typedefs)
        return f"{found.count} x {names} {_describe(btf, element.type, depth + 1)}"
    return f"{found.kind.name} {found.size} {'signed' if found.signed else 'unsigned'}"


def layout_hash(btf: Btf, name: str) -> str:
    """Twelve hex digits over a type's names, offsets, sizes and typedef names: equal only for equal meaning.

    `name` as for Codec. It doesn't change with the compiler, comments or the order of other types. Raises BtfError.
    """
    found = btf.resolve(btf.named(name).id)
    text = f"{name} {'/'.join(found.typedefs)} {_describe(btf, found.type, 0)}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]
