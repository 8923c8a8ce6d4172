"""BPF maps: single operations, batches and whole dumps, all on packed bytes (the codec gives them meaning)."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

from fimbria.kernel._libbpf import ffi, lib
from fimbria.kernel.fd import BpfError, Fd, c_name, check, error_text, open_pin, pin_fd


class MapType(IntEnum):
    """enum bpf_map_type of the kernel's UAPI (include/uapi/linux/bpf.h), the types in use here."""

    HASH = 1
    ARRAY = 2
    PROG_ARRAY = 3
    PERF_EVENT_ARRAY = 4
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    CGROUP_ARRAY = 8
    LRU_HASH = 9
    LRU_PERCPU_HASH = 10
    LPM_TRIE = 11
    ARRAY_OF_MAPS = 12
    HASH_OF_MAPS = 13
    DEVMAP = 14
    SOCKMAP = 15
    SOCKHASH = 18
    PERCPU_CGROUP_STORAGE = 21
    QUEUE = 22
    STACK = 23
    SK_STORAGE = 24
    RINGBUF = 27
    CGRP_STORAGE = 32


class UpdateFlag(IntEnum):
    """What an update expects to find."""

    ANY = 0
    NOEXIST = 1
    EXIST = 2


class MapFlag(IntEnum):
    """map_flags of BPF_MAP_CREATE."""

    NO_PREALLOC = 1 << 0
    NO_COMMON_LRU = 1 << 1
    RDONLY_PROG = 1 << 7
    WRONLY_PROG = 1 << 8
    MMAPABLE = 1 << 10
    INNER_MAP = 1 << 12


_PERCPU = frozenset({MapType.PERCPU_HASH, MapType.PERCPU_ARRAY, MapType.LRU_PERCPU_HASH, MapType.PERCPU_CGROUP_STORAGE})
# An LPM trie answers ENOSPC when it is full, a hash E2BIG; for an array E2BIG is an index out of range.
_ARRAYS = frozenset({MapType.ARRAY, MapType.PERCPU_ARRAY, MapType.ARRAY_OF_MAPS, MapType.PROG_ARRAY})


class MapError(BpfError):
    """A failed map operation. `map_name`, `key` (None when no single key is to blame) and, for batches, `done`."""

    def __init__(self, code: int, operation: str, map_name: str, key: bytes | None = None, done: int = 0) -> None:
        where = f" key {key.hex()}" if key is not None else ""
        super().__init__(code, f"{operation} map {map_name}{where}: {self._text(code)}")
        self.map_name = map_name
        self.key = key
        self.done = done

    def _text(self, code: int) -> str:
        return error_text(code)


class MapFull(MapError):
    """There is no room for another entry."""

    def _text(self, code: int) -> str:
        return "the map is full"


@dataclass(frozen=True, slots=True)
class MapInfo:
    """What the kernel says of a map. Sizes in bytes; `value_size` of one CPU's value for per-CPU maps."""

    type: int
    id: int
    name: str
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    btf_id: int
    btf_key_type_id: int
    btf_value_type_id: int
    extra: int

    @property
    def layout(self) -> tuple[int, int, int, int, int]:
        """What two maps must share for one to take the other's place."""
        return (self.type, self.key_size, self.value_size, self.max_entries, self.flags)


@cache
def possible_cpus() -> int:
    """How many values a per-CPU entry has."""
    return check(lib.libbpf_num_possible_cpus(), "possible CPUs")


def map_info(fd: int) -> MapInfo:
    """Reads a map's description. Raises BpfError when `fd` is no map."""
    raw = ffi.new("struct fim_map_info *")
    check(lib.fim_map_info(fd, raw), f"map info of descriptor {fd}")
    return MapInfo(
        raw.type, raw.id, c_name(raw.name), raw.key_size, raw.value_size, raw.max_entries, raw.flags,
        raw.btf_id, raw.btf_key, raw.btf_value, raw.extra,
    )  # fmt: skip


class Map(Fd):
    """An open map. Keys and values are packed bytes of exactly `key_size` and `slot_size`.

    `slot_size` is `value_size`, except for per-CPU maps, where it is `value_size` rounded up to eight, times
    possible_cpus(), one value after the other. All errors are MapError, a full map MapFull.
    """

    def __init__(self, fd: int, name: str | None = None) -> None:
        """Takes ownership of `fd`. `name` overrides the kernel's, which is cut at 15 characters."""
        super().__init__(fd)
        self.info = map_info(fd)
        self.name = name or self.info.name or f"id {self.info.id}"
        self.type = self.info.type
        self.key_size = self.info.key_size
        self.value_size = self.info.value_size
        self.max_entries = self.info.max_entries
        percpu = self.type in _PERCPU
        self.slot_size = (self.value_size + 7 & ~7) * possible_cpus() if percpu else self.value_size

    @classmethod
    def open(cls, path: str | os.PathLike[str], name: str | None = None) -> Map:
        """Opens a pinned map. Raises BpfError (ENOENT when there is none)."""
        fd = open_pin(path)
        try:
            return cls(fd, name)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def by_id(cls, map_id: int) -> Map:
        """Opens a map by its number, e.g. an inner map found in an outer one. Raises BpfError."""
        return cls(check(lib.bpf_map_get_fd_by_id(map_id), f"map id {map_id}"))

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Pins the map at `path`, replacing what was pinned there in one step."""
        pin_fd(self.fd, path)

    def freeze(self) -> None:
        """Forbids any further change by system calls."""
        self._check(lib.bpf_map_freeze(self.fd), "freeze", None)

    def lookup(self, key: bytes, flags: int = 0) -> bytes | None:
        """The value, or None when there is no such entry. For maps of maps: the inner map's id as 4 bytes."""
        self._key(key, "lookup")
        value = ffi.new("char[]", self.slot_size)
        result = lib.fim_map_lookup(self.fd, key, value, flags)
        if result == -errno.ENOENT:
            return None
        self._check(result, "lookup", key)
        return bytes(ffi.buffer(value))

    def update(self, key: bytes, value: bytes, flags: int = 0) -> None:
        """Writes one entry. `flags`: UpdateFlag. For maps of maps the value is the inner map's descriptor (4 bytes)."""
        self._key(key, "update")
        if len(value) != self.slot_size:
            raise MapError(errno.EINVAL, f"update (value of {len(value)} bytes, not {self.slot_size})", self.name, key)
        self._check(lib.fim_map_update(self.fd, key, value, flags), "update", key)

    def delete(self, key: bytes) -> bool:
        """Removes one entry; False when there was none."""
        self._key(key, "delete")
        result = lib.fim_map_delete(self.fd, key)
        if result == -errno.ENOENT:
            return False
        self._check(result, "delete", key)
        return True

    def update_batch(self, keys: bytes, values: bytes, n: int, flags: int = 0) -> None:
        """Writes `n` entries in one system call where the map type allows it.

        On MapError the first `done` entries are written and `key` is the one that failed.
        """
        self._sizes(keys, n, self.key_size, "update_batch keys")
        self._sizes(values, n, self.slot_size, "update_batch values")
        if not n:
            return
        done = ffi.new("uint32_t *")
        result = lib.fim_map_update_batch(self.fd, keys, values, self.key_size, self.slot_size, n, flags, done)
        self._check(result, "update_batch", keys, done[0])

    def delete_batch(self, keys: bytes, n: int, *, missing_ok: bool = True) -> int:
        """Removes `n` entries and returns how many were there."""
        self._sizes(keys, n, self.key_size, "delete_batch keys")
        if not n:
            return 0
        deleted, position = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        result = lib.fim_map_delete_batch(self.fd, keys, self.key_size, n, missing_ok, deleted, position)
        self._check(result, "delete_batch", keys, position[0])
        return int(deleted[0])

    def dump(self) -> tuple[bytes, bytes]:
        """All keys and all values, each packed one after the other, in the same order.

        Not a snapshot: of entries that programs add or remove meanwhile some may be missing or come twice.
        """
        out = ffi.new("struct fim_dump *")
        self._check(lib.fim_map_dump(self.fd, self.key_size, self.slot_size, self.max_entries, out), "dump", None)
        try:
            n = out.count
            return ffi.buffer(out.keys, n * self.key_size)[:], ffi.buffer(out.values, n * self.slot_size)[:]
        finally:
            lib.fim_dump_free(out)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """The entries of dump(), one at a time: for small maps and tests."""
        keys, values = self.dump()
        ks, vs = self.key_size, self.slot_size
        for i in range(len(keys) // ks if ks else 0):
            yield keys[i * ks : (i + 1) * ks], values[i * vs : (i + 1) * vs]

    def split_percpu(self, slot: bytes) -> tuple[bytes, ...]:
        """One CPU's value each, out of a per-CPU map's slot."""
        step = (self.value_size + 7) & ~7
        return tuple(slot[i : i + self.value_size] for i in range(0, len(slot), step))

    def _key(self, key: bytes, operation: str) -> None:
        if len(key) != self.key_size:
            raise MapError(errno.EINVAL, f"{operation} (key of {len(key)} bytes, not {self.key_size})", self.name, key)

    def _sizes(self, data: bytes, n: int, size: int, what: str) -> None:
        if n < 0 or len(data) != n * size:
            raise MapError(errno.EINVAL, f"{what} ({len(data)} bytes, not {n} x {size})", self.name)

    def _check(self, result: int, operation: str, keys: bytes | None, done: int = 0) -> None:
        if result >= 0:
            return
        key = keys[done * self.key_size : (done + 1) * self.key_size] if keys is not None else None
        full = (result == -errno.E2BIG and self.type not in _ARRAYS) or (
            result == -errno.ENOSPC and self.type == MapType.LPM_TRIE
        )
        raise (MapFull if full else MapError)(-result, operation, self.name, key, done)


def array_map(entries: int, name: str) -> Map:
    """An array of numbers of four bytes that `array_memory` can show. Raises MapError."""
    return create_map(MapType.ARRAY, 4, 4, entries, MapFlag.MMAPABLE, name)


@contextmanager
def array_memory(array: Map) -> Iterator[memoryview]:
    """The numbers of an `array_map` as memory: what is read and written is the map's content at that moment, each
    number in one piece. Far faster than system calls. Raises MapError if it can't be mapped."""
    stride = 2  # the kernel gives each value 8 bytes
    try:
        memory = mmap.mmap(array.fd, array.max_entries * 4 * stride)
    except (OSError, ValueError) as error:
        raise MapError(getattr(error, "errno", None) or errno.EINVAL, "mmap", array.name) from None
    with memory, memoryview(memory) as raw, raw.cast("I") as words, words[::stride] as numbers:
        yield numbers


class MapBtf(Fd):
    """The type information of a map's key and value, to be given to maps made like it: bpftool then shows fields."""

    def __init__(self, like: Map) -> None:
        """Opens the type information that `like` was made with. Raises BpfError (ENOENT when it has none)."""
        super().__init__(check(lib.bpf_btf_get_fd_by_id(like.info.btf_id), f"BTF of map {like.name}"))
        self.key_type_id = like.info.btf_key_type_id
        self.value_type_id = like.info.btf_value_type_id


def create_map(  # noqa: PLR0917 the order of bpf(2)
    map_type: int, key_size: int, value_size: int, max_entries: int, flags: int = 0, name: str = "",
    btf: MapBtf | None = None, *, inner: Map | None = None, extra: int = 0,
) -> Map:  # fmt: skip
    """Creates a map. `inner` is the template that maps of maps need. Raises MapError."""
    result = lib.fim_map_create(
        map_type, name.encode()[:15], key_size, value_size, max_entries, flags, inner.fd if inner else -1, extra,
        btf.fd if btf else -1, btf.key_type_id if btf else 0, btf.value_type_id if btf else 0,
    )  # fmt: skip
    if result < 0:
        raise MapError(-result, "create", name or f"of type {map_type}")
    return Map(result, name or None)
