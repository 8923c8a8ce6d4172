"""Backends: a row for as long as somebody lists it."""

from __future__ import annotations

from collections.abc import Iterator

from fimbria.compute.service_rows import BACKENDS, Delta
from fimbria.decide.numbers import Numbers
from fimbria.model.rows import Backend


class ListedBackends:
    """Counts for each backend id how many service ports list it."""

    def __init__(self, numbers: Numbers[Backend]) -> None:
        self._numbers = numbers
        self._users: dict[int, int] = {}
        self._unlisted: set[int] = set()

    def rows(self) -> Iterator[tuple[int, Backend]]:
        """All of them."""
        for number in self._users:
            key = self._numbers.key(number)
            assert key is not None
            yield number, key

    def list(self, backend: int, key: Backend, delta: Delta) -> None:
        """One more service port lists it."""
        users = self._users.get(backend, 0)
        self._users[backend] = users + 1
        if users == 0 and backend not in self._unlisted:
            delta.put(BACKENDS, backend, key)

    def unlist(self, backend: int) -> None:
        """One less."""
        self._users[backend] -= 1
        if self._users[backend] == 0:
            self._unlisted.add(backend)

    def sweep(self, delta: Delta) -> None:
        """Drop those that nobody lists. Only at the end of a change: one that moved in between keeps its number."""
        for backend in self._unlisted:
            if self._users[backend] == 0:
                del self._users[backend]
                key = self._numbers.key(backend)
                assert key is not None
                self._numbers.release(key)
                delta.drop(BACKENDS, backend)
        self._unlisted.clear()
