"""The bench's arithmetic and its files: what a later issue reads must have the form that was promised."""

import json
import math

import pytest
from tests.bench import cluster_data, report, rules
from tests.bench.report import Figure, Goal


def test_spread_is_half_the_distance_between_the_quartiles() -> None:
    assert report.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 1.0
    assert report.spread([7.0]) == 0.0
    with pytest.raises(ValueError, match="no samples"):
        report.spread([])


def test_percentile_is_a_sample_that_was_measured() -> None:
    samples = [float(n) for n in range(1, 201)]
    assert report.percentile(samples, 0.99) == 198.0
    assert report.percentile(samples, 1.0) == 200.0
    assert report.percentile([3.0], 0.99) == 3.0


def test_ratio_is_formed_round_by_round() -> None:
    """A machine that is twice as slow in one round slows both sides, and leaves the ratio alone."""
    assert report.paired_ratio([10.0, 5.0, 10.0], [20.0, 10.0, 20.0]) == 0.5
    assert report.paired_ratio([10.0, 5.0], [20.0]) == 0.375
    assert report.paired_ratio([1.0], [0.0]) is None


@pytest.mark.parametrize(
    ("goal", "value", "ratio", "met"),
    [
        (Goal("ratio", ">=", 0.95), 1.0, 0.95, True),
        (Goal("ratio", ">=", 0.95), 1.0, 0.949, False),
        (Goal("ratio", ">=", 0.95), 1.0, None, False),
        (Goal("ratio", "<=", 1.0), 1.0, 1.01, False),
        (Goal("p99", "<=", 100), 99.9, None, True),
        (Goal("p99", "<=", 100), 100.1, 0.1, False),
    ],
)
def test_goals(goal: Goal, value: float, ratio: float | None, met: bool) -> None:
    assert goal.holds(value, ratio) is met


def test_a_goal_names_its_unit_unless_it_is_a_ratio() -> None:
    assert Goal("p99", "<=", 100).text("ms") == "p99 <= 100 ms"
    assert Goal("ratio", ">=", 0.95).text("/s") == "ratio >= 0.95"


def test_a_missed_goal_is_told_and_noise_is_called_noise() -> None:
    goal = Goal("ratio", ">=", 1.0)
    steady = report.explain(
        report.figure("a", "/s", [9.0, 9.0, 9.0], baseline=[10.0] * 3, goal=goal), "the kernel waits"
    )
    assert steady.met is False
    assert steady.note == "goal missed: the kernel waits"
    noisy = report.explain(report.figure("a", "/s", [5.0, 9.0, 13.0], baseline=[10.0] * 3, goal=goal))
    assert "not conclusive" in noisy.note
    fine = report.figure("a", "/s", [11.0], baseline=[10.0], goal=goal, note="n")
    assert report.explain(fine, "why") == fine


def test_tail_is_judged_by_the_percentile() -> None:
    samples = [1.0] * 98 + [500.0, 500.0]
    found = report.tail("t", "ms", samples, goal=Goal("p99", "<=", 100))
    assert (found.median, found.met) == (500.0, False)


def test_json_has_the_promised_keys_and_comes_back() -> None:
    figures = [report.figure("a", "/s", [1.0, 2.0], baseline=[2.0, 2.0]), Figure("b", "MiB", 3.0, 0.0)]
    text = report.to_json(figures)
    assert all(set(report.KEYS) <= set(row) for row in json.loads(text))
    assert report.from_json(text) == figures


def test_json_refuses_what_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="JSON"):
        report.to_json([Figure("a", "/s", math.nan, 0.0)])
    with pytest.raises(ValueError, match=r"a: .*goal"):
        report.from_json(
            '[{"name": "a", "unit": "/s", "median": 1, "spread": 0, "baseline": 1, "ratio": 1, "met": true}]'
        )
    with pytest.raises(ValueError, match="list"):
        report.from_json("{}")
    with pytest.raises(ValueError, match="samples"):
        report.figure("a", "/s", [])


def test_a_group_measured_again_is_replaced_as_a_whole() -> None:
    def f(name: str, group: str) -> Figure:
        return Figure(name, "/s", 1.0, 0.0, group=group)

    old = [f("x1", "x"), f("x2", "x"), f("y1", "y"), f("gone", "no longer a group")]
    merged = report.merge(old, [f("x3", "x")], ["y", "x"])
    assert [m.name for m in merged] == ["y1", "x3"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (0.95, "0.95"), (1.0, "1"), (12.345, "12.3"), (100, "100"), (12345.6, "12,300")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


def test_table_is_aligned_and_marks_what_was_missed() -> None:
    missed = report.figure(
        "long name of a figure", "/s", [1.0], baseline=[2.0], against="them", goal=Goal("ratio", ">=", 1)
    )
    lines = report.table([missed, Figure("b", "MiB", 3.0, 0.0, note="why")])
    assert len({len(line) for line in lines[:4]}) == 1
    assert "**no**" in lines[2]
    assert lines[-1] == "- b: why"


def test_services_of_both_sides_have_the_same_addresses() -> None:
    text = rules.kube_proxy(3, "10.9.0.3", "10.9.0.0/16")
    assert text.count("-A KUBE-SERVICES -d ") == 3
    assert f"-d {rules.address(3)}/32" in text
    assert rules.address(1) == "10.96.1.1"
    assert len({rules.address(n) for n in range(1, 10_001)}) == 10_000


def test_every_pod_of_the_large_cluster_is_another() -> None:
    rows = list(cluster_data.pods(2000, 100, 10, ipv6=True))
    addresses = [a for *_, body in rows for a in body["status"]["networking"]["addressing"][0].values()]
    assert len(set(addresses)) == 4000
    assert len({(namespace, name) for _, namespace, name, _ in rows}) == 2000
