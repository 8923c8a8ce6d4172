"""Outcomes, what counts as passed, and the table."""

import json

import click
import pytest

from fimbria.cli.connectivity.report import (
    BROKEN,
    CONNECTED,
    NOTHING,
    Outcome,
    Result,
    as_json,
    met,
    outcomes,
    show,
)
from fimbria.cli.connectivity.scenario import Probe

OPEN = Probe("pod to pod", "plain", "pod far", "http", "10.0.0.2", 8080)
SHUT = Probe("default deny", "friend", "pod closed", "http", "fd00::2", 8080, allowed=False, family=6)
YES, NO = Outcome(CONNECTED), Outcome(NOTHING, "timeout")


def ended(code: int, message: str = "", **more: object) -> dict:
    return {"name": "client", "state": {"terminated": {"exitCode": code, "message": message, **more}}}


def test_outcomes_of_a_client() -> None:
    assert outcomes(None, 2) is None
    assert outcomes({"state": {"running": {}}}, 2) is None
    assert outcomes(ended(0, '["ok","timeout"]'), 2) == [YES, NO]
    assert outcomes(ended(3, 'noise\n["refused"]\n'), 1) == [Outcome(NOTHING, "refused")]
    wrong = outcomes(ended(0, '["wrong: answered by far"]'), 1)
    assert wrong == [Outcome(BROKEN, "wrong: answered by far")], "an answer is no denial"


@pytest.mark.parametrize("message", ["", "Traceback\nNameError: x", '["ok"]', '{"a":1}', "[1,2]", "[" * 5000])
def test_a_client_that_failed_decides_nothing(message: str) -> None:
    found = outcomes(ended(1, message, reason="Error"), 2)
    assert found is not None
    assert [o.result for o in found] == [BROKEN, BROKEN]
    assert found[0].detail.startswith("the client failed: ")


@pytest.mark.parametrize(
    ("probe", "without", "under", "passed"),
    [
        (OPEN, YES, YES, True), (OPEN, YES, NO, False), (OPEN, NO, YES, False), (OPEN, YES, None, True),
        (SHUT, YES, NO, True), (SHUT, YES, YES, False), (SHUT, NO, NO, False),
        (SHUT, YES, Outcome(BROKEN), False), (OPEN, Outcome(BROKEN), YES, False),
    ],
)  # fmt: skip
def test_passed(probe: Probe, without: Outcome, under: Outcome | None, passed: bool) -> None:
    assert Result(probe, without, under).passed is passed


def test_what_was_not_tried_is_never_as_expected() -> None:
    assert not met(Outcome(BROKEN), True)
    assert not met(Outcome(BROKEN), False)


def test_all_well(capsys: pytest.CaptureFixture[str]) -> None:
    show([Result(OPEN, YES, YES), Result(SHUT, YES, NO)], verbose=False)
    text = click.unstyle(capsys.readouterr().out)
    assert [line.split() for line in text.splitlines()[1:3]] == [
        ["✓", "pod", "to", "pod", "1", "-"],
        ["✓", "default", "deny", "1", "1"],
    ]
    assert text.endswith("All 2 connections went as expected.\n")


def test_failures_stand_out(capsys: pytest.CaptureFixture[str]) -> None:
    results = [Result(OPEN, YES, YES), Result(SHUT, YES, YES), Result(OPEN, NO, None)]
    show(results, verbose=False)
    text = click.unstyle(capsys.readouterr().out)
    assert "✓" not in text
    assert "connected, expected: no connection" in text
    assert "no connection (timeout), expected: connected" in text
    assert "not run" in text
    assert text.endswith("2 of 3 connections didn't go as expected.\n")
    show(results, verbose=True)
    assert "✓" in capsys.readouterr().out


def test_hints_stand_once(capsys: pytest.CaptureFixture[str]) -> None:
    show([Result(OPEN, NO, None, "plain -> far: dropped"), Result(OPEN, NO, None, "plain -> far: dropped")], False)
    assert click.unstyle(capsys.readouterr().out).count("plain -> far: dropped") == 1


def test_json() -> None:
    value = as_json([Result(SHUT, YES, YES)], "ns", ["a", "b"])
    assert json.loads(json.dumps(value)) == value
    assert (value["passed"], value["failed"], value["nodes"]) == (0, 1, ["a", "b"])
    assert value["results"][0]["with_policies"] == {"result": CONNECTED, "detail": ""}
