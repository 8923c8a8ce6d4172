"""What upstream's specs said: read from JUnit, kept as JSON beside this file, summed up in words. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from xml.etree import ElementTree

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
UNFINISHED = ("pending", "interrupted", "aborted")  # nothing was said about the cluster
MESSAGE_LENGTH = 2000
_PREFIX = "[It] "


@dataclass(frozen=True)
class Result:
    """One spec. `seconds` is its own time; `message` says why it failed, or why it left by itself."""

    name: str
    state: str
    seconds: float
    message: str = ""


@dataclass(frozen=True)
class Run:
    """Results of a run, with where it ran. `listed` are the specs that weren't asked, with the reason."""

    results: tuple[Result, ...]
    listed: Mapping[str, str] = field(default_factory=dict)
    date: str = ""
    kubernetes: str = ""
    kernel: str = ""
    release: str = ""
    nodes: int = 0

    def of(self, state: str) -> list[Result]:
        return [one for one in self.results if one.state == state]


def parse_junit(text: str) -> list[Result]:
    """Specs of a JUnit report of ginkgo, in its order; set-up and tear-down of the suite only where they failed, and
    specs that the run's focus left out not at all. Raises ElementTree.ParseError."""
    found = []
    for case in ElementTree.fromstring(text).iter("testcase"):
        name, state, message = case.get("name", ""), PASSED, ""
        for child in case:
            if child.tag in ("failure", "error"):
                state, message = FAILED, child.get("message") or (child.text or "")
            elif child.tag == "skipped":
                state, message = SKIPPED, (child.get("message") or "").removeprefix("skipped - ")
        if case.get("status") in UNFINISHED or (state == SKIPPED and message in ("", "skipped")):
            continue
        if not name.startswith(_PREFIX) and state != FAILED:
            continue
        result = Result(name.removeprefix(_PREFIX), state, float(case.get("time") or 0), message[:MESSAGE_LENGTH])
        found.append(result)
    return found


def merge(former: Run, later: Run) -> Run:
    """The later run where it has results or a reason for none, the former one for the specs that it didn't touch."""
    names = {one.name for one in later.results}
    kept = [one for one in former.results if one.name not in names | later.listed.keys()]
    results = tuple(sorted([*kept, *later.results], key=lambda one: one.name))
    listed = {name: reason for name, reason in former.listed.items() if name not in names}
    return Run(results, {**listed, **later.listed}, *_place(later))


def _place(run: Run) -> tuple[str, str, str, str, int]:
    return run.date, run.kubernetes, run.kernel, run.release, run.nodes


def dump(run: Run) -> str:
    return json.dumps(asdict(run), indent=1) + "\n"


def parse(text: str) -> Run:
    """What dump wrote. Raises ValueError, TypeError, KeyError."""
    data = json.loads(text)
    return Run(**data | {"results": tuple(Result(**one) for one in data["results"])})


def summary(run: Run) -> str:
    """For the terminal: failures with their first lines, then the counts."""
    lines = []
    for one in run.of(FAILED):
        lines += [f"FAILED {one.name} ({one.seconds:.0f} s)", *(f"    {text}" for text in _head(one.message))]
    lines += [f"left   {one.name}: {' '.join(one.message.split())[:150]}" for one in run.of(SKIPPED)]
    slowest = sorted(run.of(PASSED), key=lambda one: -one.seconds)[:5]
    lines += [f"slow   {one.name}: {one.seconds:.0f} s" for one in slowest]
    counts = ", ".join(f"{len(run.of(state))} {state}" for state in (PASSED, FAILED, SKIPPED))
    return "\n".join([*lines, f"{counts}; {len(run.listed)} not asked"])


def _head(message: str, lines: int = 6) -> Iterable[str]:
    return [text for text in message.splitlines() if text.strip()][:lines]
