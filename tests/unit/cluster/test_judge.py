"""The judge of the traffic finds what went wrong, and when it can't know."""

from __future__ import annotations

import json

import pytest
from tests.cluster.traffic.judge import Verdict, clock, covered, judge

START = 1_700_000_000.0


def tick(second: float, **flows: list[int]) -> str:
    return json.dumps({"at": int((START + second) * 1e6), "flows": flows})


def event(second: float, what: str, began: float, flow: str = "a") -> str:
    times = {"at": int((START + second) * 1e6), "began": int((START + began) * 1e6)}
    return json.dumps({**times, "flow": flow, "what": what, "number": 7, "more": "no answer"})


def calm(seconds: int, *, resent_from: int = 1000) -> list[str]:
    """A flow that sends ten a second and waits a millisecond."""
    return [tick(s, a=[10 * s, 10 * s, 0, int(s >= resent_from), 1000]) for s in range(seconds)]


def judged(lines: list[str], begin: float = 5, end: float = 10) -> Verdict:
    return judge({"client": lines}, START + begin, START + end)


def test_calm() -> None:
    found = judged(calm(40))
    assert found.losses == () and found.late == ()
    assert found.flows["client/a"].answered == found.sent >= 50
    assert found.worst == (0.001, "client/a")


@pytest.mark.parametrize(("began", "told", "counts"), [(4, 4.5, False), (4, 6, True), (9, 19, True), (11, 12, False)])
def test_a_loss_counts_if_any_of_it_was_within(began: float, told: float, counts: bool) -> None:
    losses = judged([*calm(40), event(told, "lost", began)]).losses
    assert [(loss.flow, loss.what) for loss in losses] == ([("client/a", "lost")] if counts else [])


def test_a_note_is_no_loss() -> None:
    assert judged([*calm(40), event(6, "note", 6)]).losses == ()


def test_segments_sent_again_on_a_long_connection() -> None:
    assert [loss.what for loss in judged(calm(40, resent_from=7)).losses] == ["resent"]
    assert judged(calm(40, resent_from=2)).losses == ()


def test_who_says_nothing_is_no_witness() -> None:
    quiet = [*calm(6), *(tick(s, a=[600, 600, 0, 0, 1000]) for s in range(25, 60))]
    assert "silent" in {loss.what for loss in judged(quiet, 5, 20).losses}
    assert {loss.what for loss in judged([], 5, 20).losses} == {"silent"}


def test_a_flow_without_answers() -> None:
    stuck = [tick(s, a=[10 * s, 20, 0, 0, 0]) for s in range(40)]
    assert [loss.what for loss in judged(stuck).losses] == ["silent"]


def test_late_answers_are_told_and_are_no_loss() -> None:
    lines = [*calm(6), tick(7, a=[70, 70, 0, 0, 900_000]), *(tick(s, a=[10 * s] * 2 + [0, 0, 5]) for s in range(8, 40))]
    found = judged(lines)
    assert found.losses == ()
    assert [loss.more for loss in found.late] == ["an answer after 0.9 s"]


def test_covered() -> None:
    assert covered([]) == 0.0
    assert covered(calm(41)) == pytest.approx(START + 30)
    assert clock(START) == "22:13:20.000"
