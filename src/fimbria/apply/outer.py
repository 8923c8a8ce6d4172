"""Maps of maps: what goes into an outer map, and out of it, by numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from fimbria.apply.maps import U32
from fimbria.kernel.bpf import Map, MapError

OPEN_AT_ONCE: Final = 256
"""New inner maps, each an open file, that go in by one batch: each system call that changes a map of maps waits until
no program is left that reads the old one, for some 10 ms."""
Explain = Callable[[int, MapError], str]


def put_all(outer: Map, inner: Mapping[int, Map], explain: Explain) -> dict[int, str]:
    """Puts every map under its number, in place of what is there; returns those that can't be, with the reason."""

    def put(numbers: list[int]) -> None:
        maps = [inner[n].fd for n in numbers]
        outer.update_batch(U32().encode_many(numbers), U32().encode_many(maps), len(numbers))

    return _each(list(inner), put, explain)


def remove_all(outer: Map, numbers: list[int], explain: Explain) -> dict[int, str]:
    """Removes what is under these numbers; returns those that can't be, with the reason."""
    return _each(numbers, lambda some: outer.delete_batch(U32().encode_many(some), len(some)), explain)


def _each(numbers: list[int], batch: Callable[[list[int]], object], explain: Explain) -> dict[int, str]:
    """All of them by one batch; after one that fails, the rest by another."""
    failures: dict[int, str] = {}
    while numbers:
        try:
            batch(numbers)
            break
        except MapError as error:
            failures[numbers[error.done]] = explain(numbers[error.done], error)
            numbers = numbers[error.done + 1 :]
    return failures
