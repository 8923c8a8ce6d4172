"""What a target of the apply loop is: one kind of kernel object, read and written by key."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Protocol, TypeVar

from fimbria.apply.rows import Delta

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Target(Protocol[K, V]):
    """Reads and writes kernel objects of one kind. Decides nothing; blocking, so it may be called in a thread."""

    @property
    def name(self) -> str:
        """As users see it in plans, logs and metrics."""
        ...

    def read(self) -> dict[K, V]:
        """Everything that is ours in the kernel now. Raises OSError if it can't be read at all."""
        ...

    def write(self, delta: Delta[K, V], *, order: str) -> Mapping[K, str]:
        """Write a delta and return the reason for each key that failed; its neighbours are not affected.

        `order` is "in" for upserts only and "out" for deletes only, so that the loop can keep references sound. Targets
        of programs leave what replaces a running program to a second call, "swap", after the upserts of all targets.
        """
        ...
