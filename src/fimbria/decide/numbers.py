"""Stable numbers for keys: services, backends, rules, CIDR identities, policy sets, endpoints.

Rules:
1. A key has one number for as long as it is taken; a number has one key.
2. A freed number rests until the whole range has been gone through: the kernel's learned state (connections) may still
   name it, and must not be led to its next owner.
3. What was read back from the kernel is restored before the first `take`. A restored number waits for its key to be
   taken again; `settle` frees the ones that nobody came for, once every source has delivered.
"""

from __future__ import annotations

from collections.abc import Hashable, ItemsView, Iterable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class NumbersExhausted(Exception):
    """Every number of the range is in use; the text names what they number and how many there are."""


class Numbers(Generic[K]):
    """Allocator of the numbers `first` to `last`, both included. Synchronous and pure; remembers nothing by itself."""

    __slots__ = ("_cursor", "_keys", "_numbers", "_waiting", "first", "last", "what")

    def __init__(self, what: str, first: int = 1, last: int = 2**32 - 1) -> None:
        """`what` is numbered, in the plural, for messages. Raises ValueError for an empty range."""
        if first > last:
            raise ValueError(f"no numbers for {what}: {first} is more than {last}")
        self.what = what
        self.first = first
        self.last = last
        self._numbers: dict[K, int] = {}
        self._keys: dict[int, K] = {}
        self._waiting: set[K] = set()
        self._cursor = first

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, key: object) -> bool:
        return key in self._numbers

    def items(self) -> ItemsView[K, int]:
        """All keys with their numbers, restored ones included. A live view."""
        return self._numbers.items()

    def get(self, key: K) -> int | None:
        """The number of a key, or None."""
        return self._numbers.get(key)

    def key(self, number: int) -> K | None:
        """The key of a number, or None."""
        return self._keys.get(number)

    def restore(self, rows: Iterable[tuple[K, int]], spent: Iterable[int] = ()) -> list[tuple[K, int]]:
        """Take over numbers from an earlier life. `spent` are free ones that learned state may still name.

        Returns the rows that could not be kept: out of range, or with a key or a number that an earlier row has. Their
        keys get other numbers when they are taken. Raises ValueError after the first `take`.
        """
        if len(self._numbers) != len(self._waiting):
            raise ValueError(f"{self.what}: numbers are in use already, too late to restore")
        refused = []
        highest = self._cursor - 1
        for key, number in rows:
            if not self.first <= number <= self.last or key in self._numbers or number in self._keys:
                refused.append((key, number))
                continue
            self._set(key, number)
            self._waiting.add(key)
            highest = max(highest, number)
        named = (*spent, *(number for _, number in refused))
        highest = max(highest, *(n for n in named if self.first <= n <= self.last), self.first - 1)
        self._cursor = highest + 1
        return refused

    def take(self, key: K) -> int:
        """The number of `key`: the one it has, or the next free one. Raises NumbersExhausted."""
        number = self._numbers.get(key)
        if number is None:
            number = self._cursor
            if number > self.last or number in self._keys:
                number = self._next()
            self._cursor = number + 1
            self._set(key, number)
        elif self._waiting:
            self._waiting.discard(key)
        return number

    def adopt(self, key: K, number: int) -> bool:
        """Give `key` a restored number that its own key has not come for: it is known by another name now.

        False, and nothing changes, if the number doesn't wait or `key` has one already.
        """
        former = self._keys.get(number)
        if former is None or former not in self._waiting or key in self._numbers:
            return False
        self.release(former)
        self._set(key, number)
        return True

    def release(self, key: K) -> int | None:
        """Free the number of `key` and return it; None if it has none."""
        number = self._numbers.pop(key, None)
        if number is not None:
            del self._keys[number]
            self._waiting.discard(key)
        return number

    def settle(self) -> dict[K, int]:
        """Free the restored numbers whose key was not taken again, and return them."""
        gone = {key: self._numbers[key] for key in self._waiting}
        for key in gone:
            self.release(key)
        return gone

    def _set(self, key: K, number: int) -> None:
        self._numbers[key] = number
        self._keys[number] = key

    def _next(self) -> int:
        size = self.last - self.first + 1
        if len(self._keys) >= size:
            raise NumbersExhausted(f"no number left for {self.what}: all {size} are in use")
        while True:
            number = self._cursor if self._cursor <= self.last else self.first
            self._cursor = number + 1
            if number not in self._keys:
                return number
