"""Rows of BPF maps: plain maps by codec, and policy sets (maps of maps)."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from typing import Final, Generic, Protocol, TypeVar

from fimbria.apply.rows import Delta
from fimbria.kernel.bpf import BpfError, Map, MapError, MapFlag, MapFull, MapType, create_map
from fimbria.model.rows import PolicyEntry, PolicyKey

log = logging.getLogger(__name__)
BATCH: Final = 4096
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
T = TypeVar("T")


class ManyCodec(Protocol[T]):
    """Packs and unpacks lists of rows."""

    def encode_many(self, rows: list[T], /) -> bytes:
        """All rows, one after the other."""
        ...

    def decode_many(self, data: bytes, /) -> list[T]:
        """The rows of packed bytes."""
        ...


class U32:
    """Numbers of four bytes, host order."""

    def encode_many(self, rows: list[int]) -> bytes:
        """Packed numbers."""
        return struct.pack(f"={len(rows)}I", *rows)

    def decode_many(self, data: bytes) -> list[int]:
        """Numbers of packed bytes."""
        return list(struct.unpack(f"={len(data) // 4}I", data))


class Raw:
    """Fixed-size bytes as they are (addresses)."""

    def __init__(self, size: int) -> None:
        self._size = size

    def encode_many(self, rows: list[bytes]) -> bytes:
        """Joined bytes."""
        return b"".join(rows)

    def decode_many(self, data: bytes) -> list[bytes]:
        """Pieces of `size` bytes."""
        return [data[i : i + self._size] for i in range(0, len(data), self._size)]


class MapTarget(Generic[K, V]):
    """A map all of whose rows are ours."""

    def __init__(self, name: str, bpf_map: Map, keys: ManyCodec[K], values: ManyCodec[V], show: Callable[[K], str]):
        self._name = name
        self.map = bpf_map
        self._keys = keys
        self._values = values
        self._show = show

    @property
    def name(self) -> str:
        """The map's name."""
        return self._name

    def read(self) -> dict[K, V]:
        """All rows."""
        keys, values = self.map.dump()
        return dict(zip(self._keys.decode_many(keys), self._values.decode_many(values), strict=True))

    def write(self, delta: Delta[K, V], *, order: str) -> Mapping[K, str]:
        """Batches of BATCH rows; a row that fails is reported and skipped."""
        if order == "in":
            return self._upsert(list(delta.upserts.items()))
        return self._delete(list(delta.deletes))

    def _upsert(self, rows: list[tuple[K, V]]) -> dict[K, str]:
        failures: dict[K, str] = {}
        at = 0
        while at < len(rows):
            part = rows[at : at + BATCH]
            keys = self._keys.encode_many([k for k, _ in part])
            values = self._values.encode_many([v for _, v in part])
            try:
                self.map.update_batch(keys, values, len(part))
                at += len(part)
            except MapError as error:
                key = part[error.done][0]
                failures[key] = self._explain(error, key)
                at += error.done + 1
                if isinstance(error, MapFull):
                    failures.update(self._rest_of_full(rows[at:]))
                    break
        return failures

    def _rest_of_full(self, rows: list[tuple[K, V]]) -> dict[K, str]:
        """A full map still takes changes of rows it has."""
        failures: dict[K, str] = {}
        for key, value in rows:
            try:
                self.map.update(self._keys.encode_many([key]), self._values.encode_many([value]))
            except MapError as error:
                failures[key] = self._explain(error, key)
        return failures

    def _delete(self, keys: list[K]) -> dict[K, str]:
        failures: dict[K, str] = {}
        at = 0
        while at < len(keys):
            part = keys[at : at + BATCH]
            try:
                self.map.delete_batch(self._keys.encode_many(part), len(part))
                at += len(part)
            except MapError as error:
                failures[part[error.done]] = self._explain(error, part[error.done])
                at += error.done + 1
        return failures

    def _explain(self, error: MapError, key: K) -> str:
        if isinstance(error, MapFull):
            return f"map {self._name} is full ({self.map.max_entries} entries): no room for {self._show(key)}"
        return f"{self._show(key)}: {error}"


class PolicySetsTarget:
    """Policy sets: number -> whole content.

    A changed set is a new inner map that replaces the old one in one step, so a set is never half written, and one that
    can't be written leaves the old one in force.
    """

    name = "policy_sets"

    def __init__(self, outer: Map, keys: ManyCodec[PolicyKey], values: ManyCodec[PolicyEntry]) -> None:
        self._outer = outer
        self._keys = keys
        self._values = values

    def read(self) -> dict[int, Mapping[PolicyKey, PolicyEntry]]:
        """Content of every set."""
        numbers, ids = (U32().decode_many(part) for part in self._outer.dump())
        sets: dict[int, Mapping[PolicyKey, PolicyEntry]] = {}
        for number, map_id in zip(numbers, ids, strict=True):
            with suppress(BpfError), Map.by_id(map_id) as inner:
                keys, values = inner.dump()
                sets[number] = dict(zip(self._keys.decode_many(keys), self._values.decode_many(values), strict=True))
        return sets

    def write(self, delta: Delta[int, Mapping[PolicyKey, PolicyEntry]], *, order: str) -> Mapping[int, str]:
        """Swap in or remove whole sets."""
        failures: dict[int, str] = {}
        for number in delta.upserts if order == "in" else ():
            try:
                self._swap(number, delta.upserts[number])
            except MapError as error:
                failures[number] = f"policy set {number}: {error}; what was enforced before stays enforced"
        for number in delta.deletes if order == "out" else ():
            try:
                self._outer.delete(struct.pack("=I", number))
            except MapError as error:
                failures[number] = f"policy set {number}: {error}"
        return failures

    def _swap(self, number: int, content: Mapping[PolicyKey, PolicyEntry]) -> None:
        rows = list(content.items())
        name = f"policy_{number}"
        with create_map(
            MapType.LPM_TRIE, 12, 8, max(len(rows), 1), MapFlag.NO_PREALLOC, name=name
        ) as inner:  # fmt: skip
            for part in _parts(rows):
                keys = self._keys.encode_many([k for k, _ in part])
                inner.update_batch(keys, self._values.encode_many([v for _, v in part]), len(part))
            self._outer.update(struct.pack("=I", number), struct.pack("=I", inner.fd))


def _parts(rows: list[T]) -> Iterable[list[T]]:
    return (rows[i : i + BATCH] for i in range(0, len(rows), BATCH))
