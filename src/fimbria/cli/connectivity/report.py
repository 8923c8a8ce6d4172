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
BROKEN: Final = "not tried"  # the probe itself couldn't run
NO_CONNECTION_CODE: Final = 1  # the tool's exit code; others mean that it couldn't try


@dataclass(frozen=True, slots=True)
class Outcome:
    """`result` is CONNECTED, NOTHING or BROKEN; `detail` the tool's own word for it, if the cluster passes it on."""

    result: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """A connection with what came of it without and with policies (None: that round wasn't run)."""

    probe: Probe
    without: Outcome | None
    under: Outcome | None

    @property
    def passed(self) -> bool:
        """Both rounds as expected."""
        return met(self.without, True) and met(self.under, self.probe.allowed)


def met(outcome: Outcome | None, expected: bool) -> bool:
    """Whether an outcome is the expected one. What couldn't be tried is never expected."""
    return outcome is None or outcome.result == (CONNECTED if expected else NOTHING)


def outcome(status: Mapping[str, Any] | None) -> Outcome | None:
    """From a container's status; None while it runs or may still start."""
    state = (status or {}).get("state") or {}
    ended = state.get("terminated")
    if ended:
        code = ended.get("exitCode")
        detail = _word(ended.get("message") or "")
        if code == 0:
            return Outcome(CONNECTED)
        if code == NO_CONNECTION_CODE:
            return Outcome(NOTHING, detail)
        return Outcome(BROKEN, detail or f"exit code {code}")
    return None


def _word(message: str) -> str:
    """The tool's `result` out of the last line of its log, or the line itself."""
    last = (message.strip().splitlines() or [""])[-1]
    try:
        return str(json.loads(last)["result"])
    except (ValueError, KeyError, TypeError):
        return last


def show(results: Sequence[Result], verbose: bool) -> None:
    """The table: failures always, what passed by check unless `verbose`."""
    rows = []
    for r in results:
        mark = good("✓") if r.passed else bad("✗")
        what = [mark, r.probe.check, f"{r.probe.client} -> {r.probe.target}", _through(r.probe)]
        rows.append([*what, _cell(r.without, True), _cell(r.under, r.probe.allowed)])
    if not verbose and any(not r.passed for r in results):
        rows = [row for row, r in zip(rows, results, strict=True) if not r.passed]
    table(["", "CHECK", "CONNECTION", "BY", "WITHOUT POLICIES", "WITH POLICIES"], rows)
    click.echo(summary(results))


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
            | {
                "passed": r.passed,
                "without_policies": asdict(r.without) if r.without else None,
                "with_policies": asdict(r.under) if r.under else None,
            }
            for r in results
        ],
    }
