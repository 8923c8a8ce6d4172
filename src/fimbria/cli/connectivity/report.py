"""What came of each connection, and the table at the end. Pure but for printing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import click

from fimbria.cli.connectivity.scenario import Probe
from fimbria.cli.show import bad, count, dim, good, table

CONNECTED: Final = "connected"
NOTHING: Final = "no connection"
BROKEN: Final = "failed"  # the probe itself couldn't run, or the answer was a wrong one


@dataclass(frozen=True, slots=True)
class Outcome:
    """`result` is CONNECTED, NOTHING or BROKEN; `detail` what happened instead of an answer."""

    result: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """A connection with what came of it without and with policies (None: that round wasn't run).

    `hint` is what the agents say of it, if it didn't go as expected.
    """

    probe: Probe
    without: Outcome | None
    under: Outcome | None
    hint: str = ""

    @property
    def passed(self) -> bool:
        """Both rounds as expected."""
        return met(self.without, True) and met(self.under, self.probe.allowed)


def met(outcome: Outcome | None, expected: bool) -> bool:
    """Whether an outcome is the expected one. What couldn't be tried is never expected."""
    return outcome is None or outcome.result == (CONNECTED if expected else NOTHING)


def outcomes(status: Mapping[str, Any] | None, count: int) -> list[Outcome] | None:
    """From a client's container: an outcome for each of its `count` probes; None while it runs or may still start."""
    ended = ((status or {}).get("state") or {}).get("terminated")
    if not ended:
        return None
    message = str(ended.get("message") or "")
    lines = message.strip().splitlines()
    try:
        words = json.loads(lines[-1])
        if len(words) != count or not all(isinstance(w, str) for w in words):
            raise ValueError
    except (ValueError, TypeError, IndexError, RecursionError):
        why = lines[-1][:200] if lines else f"{ended.get('reason') or 'ended'}, exit code {ended.get('exitCode')}"
        return [Outcome(BROKEN, f"the client failed: {why}")] * count
    return [_outcome(w) for w in words]


def _outcome(word: str) -> Outcome:
    if word == "ok":
        return Outcome(CONNECTED)
    # A wrong answer came over a connection, so it is no proof of a denial.
    return Outcome(BROKEN if word.startswith(("wrong", "not tried")) else NOTHING, word)


def show(results: Sequence[Result], verbose: bool) -> None:
    """What failed, each by itself with the reason; what passed by its check, or each by itself if `verbose`."""
    shown = results if verbose else [r for r in results if not r.passed]
    if shown:
        heads = ["", "CHECK", "CONNECTION", "BY", "WITHOUT POLICIES", "WITH POLICIES"]
        table(heads, [_row(r) for r in shown])
    else:
        table(["", "CHECK", "PASSED", "OF WHICH DENIED, AS THEY MUST BE"], _by_check(results))
    hints = list(dict.fromkeys(r.hint for r in results if r.hint))
    if hints:
        click.echo(click.style("\nWhy:", bold=True))
        for hint in hints:
            click.echo(f"  {hint}")
        click.echo()
    click.echo(summary(results))


def _row(r: Result) -> list[str]:
    mark = good("✓") if r.passed else bad("✗")
    what = [mark, r.probe.check, f"{r.probe.client} -> {r.probe.target}", _through(r.probe)]
    return [*what, _cell(r.without, True), _cell(r.under, r.probe.allowed)]


def _by_check(results: Sequence[Result]) -> list[list[str]]:
    """A line for each check, all of which passed."""
    checks: dict[str, list[Result]] = {}
    for r in results:
        checks.setdefault(r.probe.check, []).append(r)
    return [
        [good("✓"), check, str(len(found)), str(sum(not r.probe.allowed and r.under is not None for r in found) or "")]
        for check, found in checks.items()
    ]


def _through(p: Probe) -> str:
    return f"{p.proto.upper()} IPv{p.family}"


def _cell(found: Outcome | None, expected: bool) -> str:
    if found is None:
        return dim("not run")
    wanted = CONNECTED if expected else NOTHING
    if met(found, expected):
        return good("connects" if expected else "denied")
    detail = f" ({found.detail})" if found.detail else ""
    return bad(f"{found.result}{detail}, expected: {wanted}")


def summary(results: Sequence[Result]) -> str:
    """The last line."""
    failed = sum(not r.passed for r in results)
    if failed:
        return bad(f"{failed} of {count(len(results), 'connection')} didn't go as expected.")
    return good(f"All {count(len(results), 'connection')} went as expected.")


def as_json(results: Sequence[Result], namespace: str, nodes: Sequence[str]) -> dict[str, Any]:
    """For programs."""
    return {
        "namespace": namespace,
        "nodes": list(nodes),
        "passed": sum(r.passed for r in results),
        "failed": sum(not r.passed for r in results),
        "results": [
            asdict(r.probe)
            | {"want": list(r.probe.want)}
            | {
                "passed": r.passed,
                "hint": r.hint,
                "without_policies": asdict(r.without) if r.without else None,
                "with_policies": asdict(r.under) if r.under else None,
            }
            for r in results
        ],
    }
