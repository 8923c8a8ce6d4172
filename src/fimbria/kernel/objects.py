"""BPF object files: open, configure, load, pin."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fimbria.kernel._libbpf import ffi, lib
from fimbria.kernel.fd import BpfError, Fd, c_name, check, error_text, open_pin, pin_fd
from fimbria.kernel.maps import Map, MapError

LOG_LIMIT = 16 * 1024

Constant = int | bool | bytes


class VerifierError(BpfError):
    """The kernel refused a program. `program` (may be empty), `log` is the tail of what the verifier said."""

    def __init__(self, code: int, object_name: str, program: str, log: str) -> None:
        where = f"{object_name}: program {program}" if program else object_name
        super().__init__(code, f"load {where}: {error_text(code)}\n{log}")
        self.program = program
        self.log = log


class ConstantError(ValueError):
    """A constant of .rodata is unknown, not set, or out of range."""


@dataclass(frozen=True, slots=True)
class _Variable:
    section: str
    name: str
    offset: int
    size: int
    kind: int
    signed: bool
    required: bool


def _log() -> str:
    size = ffi.new("size_t *")
    text = lib.fim_log(size)
    raw = bytes(ffi.buffer(text, size[0])) if size[0] else b""
    return raw[-LOG_LIMIT:].decode(errors="replace").rstrip()


class Program(Fd):
    """A loaded program, independent of the object it came from."""

    def __init__(self, fd: int, name: str = "") -> None:
        """Takes ownership of `fd`."""
        super().__init__(fd)
        self.name = name

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Program:
        """Opens a pinned program. Raises BpfError (ENOENT when there is none)."""
        return cls(open_pin(path), Path(path).name)

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Pins the program at `path`, replacing what was pinned there in one step."""
        pin_fd(self.fd, path)


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """A program as the object file declares it."""

    name: str
    section: str
    type: int
    attach_type: int
    autoload: bool


@dataclass(frozen=True, slots=True)
class MapSpec:
    """A map as the object file declares it (after any resize). `internal`: a data section such as .rodata."""

    name: str
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    internal: bool


class BpfObject:
    """One compiled object file. Configure it, then load() once; close() drops everything that isn't pinned or attached.

    Shared maps come from elsewhere through `reuse`; everything else in the file is created at load().
    """

    def __init__(self, source: bytes | str | os.PathLike[str], name: str | None = None) -> None:
        """Opens an object from its bytes or its path. Raises BpfError when it isn't a valid BPF object."""
        if isinstance(source, bytes):
            data, self.name = source, name or "object"
        else:
            data, self.name = Path(source).read_bytes(), name or Path(source).name.removesuffix(".o")
        # libbpf derives the names of .rodata maps from this one; a dot would end up in them.
        label = re.sub(r"[^A-Za-z0-9_]", "_", self.name.removesuffix(".bpf"))
        self._set: set[str] = set()
        self._loaded = False
        self._data = data
        self._obj: Any = ffi.NULL
        lib.fim_log_reset()
        obj = lib.fim_open(data, len(data), label.encode())
        if obj == ffi.NULL:
            code = ffi.errno or errno.EINVAL
            raise BpfError(code, f"open {self.name}: {error_text(code)}\n{_log()}")
        self._obj = obj
        self._maps = {c_name(lib.bpf_map__name(m)): m for m in self._walk(lib.bpf_object__next_map)}
        programs = self._walk(lib.bpf_object__next_program)
        self._programs = {c_name(lib.bpf_program__name(p)): p for p in programs}
        self._variables = {v.name: v for v in self._read_variables() if v.required}

    # -- what the file holds

    @property
    def maps(self) -> dict[str, MapSpec]:
        """All maps by name."""
        return {
            name: MapSpec(
                name, lib.bpf_map__type(m), lib.bpf_map__key_size(m), lib.bpf_map__value_size(m),
                lib.bpf_map__max_entries(m), lib.bpf_map__map_flags(m), bool(lib.bpf_map__is_internal(m)),
            )
            for name, m in self._maps.items()
        }  # fmt: skip

    @property
    def programs(self) -> dict[str, ProgramSpec]:
        """All programs by function name."""
        return {
            name: ProgramSpec(
                name, c_name(lib.bpf_program__section_name(p)), lib.bpf_program__type(p),
                lib.bpf_program__expected_attach_type(p), bool(lib.bpf_program__autoload(p)),
            )
            for name, p in self._programs.items()
        }  # fmt: skip

    @property
    def constants(self) -> frozenset[str]:
        """The `const volatile` variables, all of which load() wants set."""
        return frozenset(self._variables)

    def btf(self) -> bytes:
        """The file's BTF with section offsets filled in; empty when it has none."""
        size = ffi.new("uint32_t *")
        raw = lib.fim_raw_btf(self._open(), size)
        return bytes(ffi.buffer(raw, size[0])) if raw != ffi.NULL else b""

    # -- configuration

    def set_constants(self, values: Mapping[str, Constant]) -> None:
        """Sets `const volatile` variables: integers and booleans by value, anything else as its exact bytes.

        Raises ConstantError for an unknown name or a value that doesn't fit; nothing is written then.
        """
        self._unloaded("set constants")
        unknown = sorted(set(values) - self.constants)
        if unknown:
            raise ConstantError(f"{self.name}: no such constant: {', '.join(unknown)}")
        encoded = {name: _encode_constant(self.name, self._variables[name], value) for name, value in values.items()}
        for name, raw in encoded.items():
            variable = self._variables[name]
            section = lib.bpf_object__find_map_by_name(self._obj, variable.section.encode())
            size = ffi.new("size_t *")
            base = lib.bpf_map__initial_value(section, size) if section != ffi.NULL else ffi.NULL
            if base == ffi.NULL or variable.offset + variable.size > size[0]:
                raise ConstantError(f"{self.name}: constant {name} lies outside {variable.section}")
            ffi.memmove(ffi.cast("char *", base) + variable.offset, raw, len(raw))
            self._set.add(name)

    def resize(self, sizes: Mapping[str, int]) -> None:
        """Sets max_entries by map name, before load(). Raises KeyError for an unknown map, BpfError."""
        self._unloaded("resize maps")
        for name, entries in sizes.items():
            check(lib.bpf_map__set_max_entries(self._map(name), entries), f"{self.name}: resize map {name}")

    def autoload(self, names: Iterable[str]) -> None:
        """Loads just these programs. Raises KeyError for an unknown one."""
        self._unloaded("choose programs")
        wanted = set(names)
        for name in wanted:
            self._program(name)
        for name, program in self._programs.items():
            check(lib.bpf_program__set_autoload(program, name in wanted), f"{self.name}: autoload {name}")

    def autocreate(self, name: str, create: bool) -> None:
        """Whether load() creates this map; a map that isn't created must not be used by a loaded program."""
        self._unloaded("choose maps")
        check(lib.bpf_map__set_autocreate(self._map(name), create), f"{self.name}: autocreate {name}")

    def reuse(self, maps: Mapping[str, Map]) -> None:
        """Uses existing maps in place of the file's, by name. Resize first: sizes must agree too.

        Raises KeyError for an unknown map and MapError (EINVAL) when a layout differs.
        """
        self._unloaded("reuse maps")
        for name, existing in maps.items():
            raw = self._map(name)
            spec = self.maps[name]
            want = (spec.type, spec.key_size, spec.value_size, spec.max_entries, spec.flags)
            if existing.info.layout != want:
                text = f"reuse (type, key, value, entries, flags {existing.info.layout}, {self.name} wants {want})"
                raise MapError(errno.EINVAL, text, name)
            check(lib.bpf_map__reuse_fd(raw, existing.fd), f"{self.name}: reuse map {name}")

    def set_inner(self, outer: str, template: Map) -> None:
        """Gives a map of maps its template, where the file doesn't declare one."""
        self._unloaded("set an inner map")
        check(lib.bpf_map__set_inner_map_fd(self._map(outer), template.fd), f"{self.name}: inner map of {outer}")

    # -- load and what comes of it

    def load(self) -> None:
        """Creates the maps and has the kernel verify the programs.

        Raises ConstantError when a constant isn't set, VerifierError when a program is refused, BpfError otherwise.
        """
        self._unloaded("load")
        unset = sorted(self.constants - self._set)
        if unset:
            raise ConstantError(f"{self.name}: constants not set: {', '.join(unset)}")
        lib.fim_log_reset()
        result = lib.bpf_object__load(self._obj)
        self._loaded = result >= 0
        if result < 0:
            log = _log()
            failed = re.findall(r"prog '([^']+)': BPF program load failed", log)
            if failed or "BEGIN PROG LOAD LOG" in log:
                raise VerifierError(-result, self.name, failed[-1] if failed else "", log)
            raise BpfError(-result, f"load {self.name}: {error_text(-result)}\n{log}")

    def map(self, name: str) -> Map:
        """A handle of its own on a loaded map. Raises KeyError, BpfError."""
        fd = lib.bpf_map__fd(self._map(name))
        check(fd, f"{self.name}: map {name} (not loaded)")
        return Map(os.dup(fd), name)

    def program(self, name: str) -> Program:
        """A handle of its own on a loaded program. Raises KeyError, BpfError."""
        fd = lib.bpf_program__fd(self._program(name))
        check(fd, f"{self.name}: program {name} (not loaded)")
        return Program(os.dup(fd), name)

    def close(self) -> None:
        """Releases the object. May be called twice."""
        obj, self._obj = self._obj, ffi.NULL
        self._maps, self._programs = {}, {}
        if obj != ffi.NULL:
            lib.bpf_object__close(obj)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_obj", ffi.NULL) != ffi.NULL:
            self.close()

    # -- inside

    def _open(self) -> Any:
        if self._obj == ffi.NULL:
            raise ValueError(f"{self.name} is closed")
        return self._obj

    def _unloaded(self, what: str) -> None:
        self._open()
        if self._loaded:
            raise ValueError(f"{self.name}: too late to {what}: it is loaded")

    def _map(self, name: str) -> Any:
        self._open()
        if name not in self._maps:
            raise KeyError(f"{self.name} has no map {name!r}")
        return self._maps[name]

    def _program(self, name: str) -> Any:
        self._open()
        if name not in self._programs:
            raise KeyError(f"{self.name} has no program {name!r}")
        return self._programs[name]

    def _walk(self, step: Any) -> Iterable[Any]:
        item = step(self._obj, ffi.NULL)
        while item != ffi.NULL:
            yield item
            item = step(self._obj, item)

    def _read_variables(self) -> list[_Variable]:
        n = check(lib.fim_vars(self._obj, ffi.NULL, 0), f"{self.name}: read BTF")
        raw = ffi.new("struct fim_var[]", max(n, 1))
        check(lib.fim_vars(self._obj, raw, n), f"{self.name}: read BTF")
        return [
            _Variable(
                section := c_name(v.section), c_name(v.name), v.offset, v.size, v.kind,
                bool(v.is_signed), section.startswith(".rodata") and bool(v.is_volatile),
            )
            for v in raw[0:n]
        ]  # fmt: skip


_INT, _ENUM, _ENUM64 = 1, 6, 19  # BTF kinds (Documentation/bpf/btf.rst)


def _encode_constant(object_name: str, variable: _Variable, value: Constant) -> bytes:
    if isinstance(value, bytes):
        if len(value) != variable.size:
            raise ConstantError(
                f"{object_name}: constant {variable.name} takes {variable.size} bytes, not {len(value)}"
            )
        return value
    if variable.kind not in (_INT, _ENUM, _ENUM64):
        raise ConstantError(f"{object_name}: constant {variable.name} is no integer: give its {variable.size} bytes")
    try:
        return int(value).to_bytes(variable.size, sys.byteorder, signed=variable.signed)
    except OverflowError:
        raise ConstantError(f"{object_name}: {value} doesn't fit constant {variable.name}") from None
