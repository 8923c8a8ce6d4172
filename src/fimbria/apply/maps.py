"""Rows of plain BPF maps, by codec."""

from __future__ import annotations

import struct
from collections.abc import Callable, Hashable, Mapping
from typing import Final, Generic, Protocol, TypeVar

from fimbria.apply.rows import Delta
from fimbria.kernel.bpf import Map, MapError, MapFull

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
        decoded = self._keys.decode_many(keys)
        return dict(zip(decoded, self._values_of(values, len(decoded)), strict=True))

    def _values_of(self, data: bytes, count: int) -> list[V]:
        """Equal values as one object: a large map has few different ones, and an audit holds all of them at once."""
        size = len(data) // max(count, 1)
        rows: dict[bytes, V] = {}
        found: list[V] = []
        for start in range(0, count, BATCH):
            pieces = [data[i * size : (i + 1) * size] for i in range(start, min(start + BATCH, count))]
            new = [p for p in dict.fromkeys(pieces) if p not in rows]
            rows.update(zip(new, self._values.decode_many(b"".join(new)), strict=True))
            found += [rows[p] for p in pieces]
        return found

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
