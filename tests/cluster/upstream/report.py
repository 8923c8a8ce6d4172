"""docs/conformance.md, out of the results that are kept and the list of what isn't run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tests.cluster.upstream.results import FAILED, PASSED, SKIPPED, Result, Run, dump, parse
from tests.cluster.upstream.specs import AREA, CONFORMANCE

RESULTS = Path(__file__).resolve().with_name("results.json")
DOCUMENT = Path(__file__).resolve().parents[3] / "docs/conformance.md"
HEAD = """# Conformance

<!-- Written by `python -m tests.cluster.upstream --record`, out of tests/cluster/upstream/: edit those. -->

Kubernetes' own end-to-end tests, unmodified, run by `make kube-test` and `python -m tests.cluster.upstream` against a
real cluster with Fimbria, installed by its chart, in place of kube-proxy and of any other network plugin: all specs of
`[sig-network]`, those that a conformant cluster must pass (`[Conformance]`) and the others.
"""


def load() -> Run:
    return parse(RESULTS.read_text()) if RESULTS.exists() else Run(())


def save(run: Run) -> None:
    RESULTS.write_text(dump(run))


def write(run: Run) -> None:
    DOCUMENT.write_text(document(run))


def document(run: Run) -> str:
    """The whole text. Pure."""
    place = f"Fimbria {run.release}, Kubernetes {run.kubernetes}, Linux {run.kernel}, {run.nodes} nodes, {run.date}."
    parts = [HEAD, place + "\n", _counts(run), _failures(run), _not_asked(run), _left(run), _all(run)]
    return "\n".join(part for part in parts if part)


def _counts(run: Run) -> str:
    rows = ["| specs | passed | failed | left by themselves | not run |", "|---|---|---|---|---|"]
    for title, conformance in (("`[Conformance]`", True), ("others", False)):
        numbers = [sum(_is(one.name) == conformance for one in run.of(state)) for state in (PASSED, FAILED, SKIPPED)]
        listed = sum(_is(name) == conformance for name in run.listed)
        rows.append(f"| {title} | {' | '.join(map(str, [*numbers, listed]))} |")
    return "\n".join(rows) + "\n"


def _failures(run: Run) -> str:
    failed = run.of(FAILED)
    if not failed:
        return ""
    return "\n".join(["## Failed", "", *(f"- {_short(one.name)}: {_line(one.message)}" for one in failed), ""])


def _not_asked(run: Run) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    for name, reason in run.listed.items():
        groups[reason].append(name)
    lines = ["## Not run, and why", ""]
    for reason, names in sorted(groups.items()):
        lines += [reason, "", *(f"- {_short(name)}" for name in sorted(names)), ""]
    return "\n".join(lines)


def _left(run: Run) -> str:
    left = run.of(SKIPPED)
    if not left:
        return ""
    head = ["## Left by themselves", "", "These looked at the cluster and left; the words are theirs.", ""]
    return "\n".join([*head, *(f"- {_short(one.name)}: {_line(one.message)}" for one in left), ""])


def _all(run: Run) -> str:
    lines = ["## Passed", "", "| spec | seconds |", "|---|---|"]
    order: Iterable[Result] = sorted(run.of(PASSED), key=lambda one: (not _is(one.name), one.name))
    lines += [f"| {_short(one.name).replace('|', chr(92) + '|')} | {one.seconds:.0f} |" for one in order]
    return "\n".join(lines) + "\n"


def _is(name: str) -> bool:
    return CONFORMANCE in name


def _short(name: str) -> str:
    return name.removeprefix(AREA).strip().replace("[", "\\[")


def _line(message: str) -> str:
    return " ".join(message.split())[:300].replace("[", "\\[")
