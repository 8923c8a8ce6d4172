"""A missed goal says why."""

from dataclasses import replace
from pathlib import Path

import pytest
from tests.bench import groups
from tests.bench.reasons import CONNECTION, with_reason
from tests.bench.report import Figure, from_json

DOCS = Path(__file__).parents[3] / "docs"
MISSED = Figure("pod to pod, one node: connect+request+close, against x", "/s", 1.0, 0.0, 2.0, 0.5, "ratio >= 1", False,
                note="goal missed", group="pods")  # fmt: skip


def test_a_missed_goal_gets_its_reason_once() -> None:
    told = with_reason(MISSED)
    assert told.note == f"goal missed: {CONNECTION}"
    assert with_reason(told) == told


def test_noise_stays_told() -> None:
    noisy = replace(MISSED, note="goal missed: not conclusive, the samples of this run spread by 9%")
    assert with_reason(noisy).note == f"{noisy.note}; {CONNECTION}"


@pytest.mark.parametrize("met", [True, None])
def test_others_are_left_alone(met: bool | None) -> None:
    figure = replace(MISSED, met=met, note="")
    assert with_reason(figure) == figure


def test_every_missed_goal_that_is_published_has_a_reason() -> None:
    figures = from_json((DOCS / "benchmarks.json").read_text())
    silent = [f.name for f in figures if f.met is False and with_reason(f).note in ("", "goal missed")]
    assert not silent


def test_every_group_has_a_title_and_words() -> None:
    assert list(groups.GROUPS) == list(groups.TITLES) and set(groups.WORDS) == set(groups.TITLES)
    assert set(groups.TITLES) >= groups.OPTIONAL
