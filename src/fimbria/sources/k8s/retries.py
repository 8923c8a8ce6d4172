"""What the API server refuses is tried again later and later, each object by itself, and its reason said once."""

import asyncio
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from fimbria.sources.k8s.pacing import Backoff

K = TypeVar("K", bound=Hashable)
RETRY: Final = 1.0
RETRY_MAX: Final = 30.0
TOGETHER: Final = 25.0
"""Tries in a second of all of one writer's objects, so that thousands don't use up the client's requests."""


@dataclass(slots=True)
class _Trouble:
    why: str | None = None
    pause: Backoff = field(default_factory=lambda: Backoff(RETRY, RETRY_MAX))
    timer: asyncio.TimerHandle | None = None


class Retries(Generic[K]):
    """Calls `again` for each object when it is time; on one event loop."""

    __slots__ = ("_again", "_troubles")

    def __init__(self, again: Callable[[K], None]) -> None:
        self._again = again
        self._troubles: dict[K, _Trouble] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._troubles

    def attempts(self, key: K) -> int:
        """How often it was refused since it last went well."""
        trouble = self._troubles.get(key)
        return trouble.pause.attempts if trouble else 0

    def is_news(self, key: K, why: str) -> bool:
        """Whether it was not refused for this very reason the last time that it was asked."""
        trouble = self._troubles.setdefault(key, _Trouble())
        before, trouble.why = trouble.why, why
        return before != why

    def later(self, key: K) -> None:
        """It was refused: once more after a while. What was tried early, because it changed, keeps one timer."""
        trouble = self._troubles.setdefault(key, _Trouble())
        if trouble.timer is not None:
            trouble.timer.cancel()
        delay = max(trouble.pause.next(), len(self._troubles) / TOGETHER)
        trouble.timer = asyncio.get_running_loop().call_later(delay, self._again, key)

    def done(self, key: K) -> None:
        """It went well, or there is nothing left to do."""
        trouble = self._troubles.pop(key, None)
        if trouble is not None and trouble.timer is not None:
            trouble.timer.cancel()
