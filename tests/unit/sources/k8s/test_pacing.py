"""Rate limit and back-off, with time as an argument."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.sources.k8s.pacing import Backoff, TokenBucket


def test_burst_then_rate() -> None:
    bucket = TokenBucket(10.0, 3)
    assert [bucket.reserve(0.0) for _ in range(5)] == pytest.approx([0, 0, 0, 0.1, 0.2])
    assert bucket.reserve(0.2) == pytest.approx(0.1)
    assert bucket.reserve(100.0) == 0
    assert [bucket.try_take(100.0) for _ in range(3)] == [True, True, False]


@given(st.lists(st.floats(0, 2), max_size=200), st.floats(0.5, 50), st.integers(1, 20))
def test_no_window_exceeds_burst_plus_rate(gaps: list[float], rate: float, burst: int) -> None:
    bucket = TokenBucket(rate, burst)
    now, used = 0.0, []
    for gap in gaps:
        now += gap
        used.append(now + bucket.reserve(now))
    assert used == sorted(used)
    for first, start in enumerate(used):
        for last in range(first, len(used)):
            assert last - first + 1 <= burst + rate * (used[last] - start) + 1e-6


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (1, 0), (-1, 5)])
def test_senseless_limits_are_refused(rate: float, burst: int) -> None:
    with pytest.raises(ValueError, match="rate limit"):
        TokenBucket(rate, burst)


def test_backoff_doubles_up_to_its_cap_within_its_jitter() -> None:
    low, high = Backoff(1, 8, lambda: 0.0), Backoff(1, 8, lambda: 1.0)
    assert [high.next() for _ in range(6)] == [1, 2, 4, 8, 8, 8]
    assert [low.next() for _ in range(6)] == [0.5, 1, 2, 4, 4, 4]
    high.reset()
    assert high.next() == 1
    for _ in range(5000):
        assert low.next() == 4
