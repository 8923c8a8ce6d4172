"""Refused objects on a loop whose clock is moved by hand."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fimbria.sources.k8s import retries as module
from fimbria.sources.k8s.retries import Retries


class Timer:
    def __init__(self, delay: float, call: Callable[[], None]) -> None:
        self.delay, self.call, self.cancelled = delay, call, False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """What `later` asks of the running loop."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, delay: float, call: Callable[..., None], *args: Any) -> Timer:
        self.timers.append(Timer(delay, lambda: call(*args)))
        return self.timers[-1]


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    found = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: found)
    return found


def test_each_object_later_and_later(loop: Loop) -> None:
    tried: list[str] = []
    retries = Retries[str](tried.append)
    for attempt in range(12):
        assert retries.attempts("a") == attempt
        retries.later("a")
        longest = min(2.0**attempt, module.RETRY_MAX)
        assert longest / 2 <= loop.timers[-1].delay <= longest
    retries.later("b")
    assert loop.timers[-1].delay <= module.RETRY
    loop.timers[-1].call()
    assert tried == ["b"]
    retries.done("a")
    assert "a" not in retries and "b" in retries and retries.attempts("a") == 0
    retries.later("a")
    assert loop.timers[-1].delay <= module.RETRY


def test_an_object_has_one_timer_and_none_once_it_went_well(loop: Loop) -> None:
    retries = Retries[str](lambda _key: None)
    retries.later("a")
    retries.later("a")
    assert [t.cancelled for t in loop.timers] == [True, False]
    retries.done("a")
    assert loop.timers[-1].cancelled
    retries.done("a")


def test_thousands_share_a_rate(loop: Loop) -> None:
    retries = Retries[int](lambda _key: None)
    for key in range(5000):
        retries.later(key)
    for second in range(10, 190):
        assert sum(second <= t.delay < second + 10 for t in loop.timers) <= 10 * module.TOGETHER + 1


def test_a_reason_is_news_once_until_it_changes(loop: Loop) -> None:
    retries = Retries[str](lambda _key: None)
    assert [retries.is_news("a", why) for why in ("", "", "x", "x", "y")] == [True, False, True, False, True]
    assert retries.is_news("b", "y")
    retries.done("a")
    assert retries.is_news("a", "y")
