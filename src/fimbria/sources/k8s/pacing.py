"""When to send the next request: a token bucket and a back-off. Pure: time and randomness are arguments."""

from collections.abc import Callable
from random import random as _random


class TokenBucket:
    """At most `burst` at once and `rate` per second in the long run; callers are served in the order they asked."""

    __slots__ = ("_at", "_burst", "_rate", "_tokens")

    def __init__(self, rate: float, burst: int) -> None:
        if rate <= 0 or burst < 1:
            raise ValueError(f"a rate limit needs a positive rate and burst, not {rate} and {burst}")
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._at: float | None = None

    def reserve(self, now: float) -> float:
        """Take one token, possibly of the future; returns how many seconds to wait before using it."""
        self._refill(now)
        self._tokens -= 1
        return max(0.0, -self._tokens / self._rate)

    def try_take(self, now: float) -> bool:
        """Take one token if there is one now."""
        self._refill(now)
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _refill(self, now: float) -> None:
        if self._at is not None and now > self._at:
            self._tokens = min(float(self._burst), self._tokens + (now - self._at) * self._rate)
        self._at = now


class Backoff:
    """Delays that double from `base` to `cap` seconds, each shortened by up to half so that a fleet spreads out."""

    __slots__ = ("_attempt", "_base", "_cap", "_random")

    def __init__(self, base: float = 0.2, cap: float = 30.0, random: Callable[[], float] = _random) -> None:
        self._base = base
        self._cap = cap
        self._random = random
        self._attempt = 0

    @property
    def attempts(self) -> int:
        return self._attempt

    def next(self) -> float:
        delay = min(self._cap, self._base * 2.0 ** min(self._attempt, 32))
        self._attempt += 1
        return delay * (0.5 + 0.5 * self._random())

    def reset(self) -> None:
        self._attempt = 0
