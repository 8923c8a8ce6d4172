"""How often tables are walked, and when their fill is told."""

import pytest

from fimbria.learned.pace import Alarm, Pace


def test_a_quiet_table_is_walked_ever_more_rarely_up_to_a_limit() -> None:
    pace = Pace(shortest=10, longest=300, period=20)
    assert [pace.after(0.1, 0.0, 10.0) for _ in range(6)] == [40, 80, 160, 300, 300, 300]


def test_a_quiet_table_is_walked_as_often_as_a_thousandth_of_a_cpu_allows() -> None:
    pace = Pace(shortest=10, longest=300, period=20)
    assert [pace.after(0.1, 0.0, 0.05) for _ in range(3)] == [40, 50, 50]
    assert pace.after(0.1, 0.0, 0.001) == 10


@pytest.mark.parametrize(("fill", "removed"), [(0.6, 0.0), (0.1, 0.3)])
def test_a_table_under_load_is_walked_often_soon(fill: float, removed: float) -> None:
    pace = Pace(shortest=10, longest=300, period=300)
    assert [pace.after(fill, removed, 1.0) for _ in range(4)] == [75, 18.75, 10, 10]


def test_in_between_nothing_changes() -> None:
    assert Pace(period=20).after(0.4, 0.1, 1.0) == 20


def test_an_alarm_tells_each_turn_once_and_does_not_flutter() -> None:
    alarm = Alarm(high=0.8, low=0.7)
    shares = [0.1, 0.79, 0.8, 0.95, 0.75, 0.71, 0.69, 0.79, 0.81]
    assert [alarm.turned(s) for s in shares] == [False, False, True, False, False, False, True, False, True]
    assert alarm.raised
