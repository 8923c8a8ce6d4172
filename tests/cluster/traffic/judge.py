"""What the generator's lines say about a span of time: what was lost, when, on which way. Pure.

Lines are those of `flows run` (flows.c). A source is one process that prints them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Final

PATIENCE: Final = 10.0  # seconds after which flows.c gives a request up
LATE: Final = 0.5  # seconds for an answer that are worth telling
SILENCE: Final = 8.0  # seconds without a line: its process stood still, so that nothing is known


@dataclass(frozen=True, slots=True)
class Loss:
    """One thing that went wrong. `at` is when it began, in seconds since 1970."""

    at: float
    flow: str
    what: str
    more: str

    def __str__(self) -> str:
        return f"{clock(self.at)} {self.flow}: {self.what}: {self.more}"


@dataclass(frozen=True, slots=True)
class Counted:
    """A flow's part in the span. `worst` is the longest wait for an answer in seconds."""

    sent: int
    answered: int
    worst: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Flows are named SOURCE/NAME. `late` tells of answers that came, but late: the machine is busy, or they waited for
    something that we did."""

    losses: tuple[Loss, ...]
    flows: Mapping[str, Counted]
    late: tuple[Loss, ...] = ()

    @property
    def sent(self) -> int:
        """Everything that was asked on all flows together."""
        return sum(c.sent for c in self.flows.values())

    @property
    def worst(self) -> tuple[float, str]:
        """The longest wait, and whose."""
        return max(((c.worst, name) for name, c in self.flows.items()), default=(0.0, ""))


@dataclass(slots=True)
class _Source:
    events: list[dict[str, Any]] = field(default_factory=list)
    ticks: list[tuple[float, dict[str, list[int]]]] = field(default_factory=list)


def clock(at: float) -> str:
    """Time of day, to the millisecond."""
    return f"{datetime.fromtimestamp(at, UTC):%H:%M:%S.%f}"[:-3]


def covered(lines: Iterable[str]) -> float:
    """Until when a source has told everything, in seconds since 1970; 0.0 if it has said nothing."""
    last = 0.0
    for line in lines:
        if '"flows"' in line:
            last = float(json.loads(line)["at"]) / 1e6
    return last - PATIENCE if last else 0.0


def judge(sources: Mapping[str, Sequence[str]], begin: float, end: float) -> Verdict:
    """What happened to everything that began between two moments (seconds since 1970). Raises ValueError for lines
    that aren't the generator's."""
    losses: list[Loss] = []
    late: list[Loss] = []
    flows: dict[str, Counted] = {}
    for name, lines in sources.items():
        source = _read(lines)
        losses += _told(name, source, begin, end)
        losses += _silent(name, source, begin, end)
        late += _late(name, source, begin, end)
        for flow, (counted, resent) in _counted(source, begin, end).items():
            label = f"{name}/{flow}"
            flows[label] = counted
            told = any(e["flow"] == flow and e["what"] == "resent" for e in source.events)
            if resent and not told:
                losses.append(Loss(begin, label, "resent", f"{resent} segments of a long connection in this span"))
            if not counted.answered:
                losses.append(Loss(begin, label, "silent", "no answer in all this span"))
    return Verdict(_in_order(losses), flows, _in_order(late))


def _in_order(found: Iterable[Loss]) -> tuple[Loss, ...]:
    return tuple(sorted(found, key=lambda x: x.at))


def _read(lines: Iterable[str]) -> _Source:
    source = _Source()
    for line in lines:
        row = json.loads(line)
        if "flows" in row:
            source.ticks.append((row["at"] / 1e6, row["flows"]))
        else:
            source.events.append(row)
    return source


def _told(name: str, source: _Source, begin: float, end: float) -> list[Loss]:
    """What the source said by itself. What began before and failed within counts, too."""
    return [
        Loss(e["began"] / 1e6, f"{name}/{e['flow']}", e["what"], f"number {e['number']}, {e['more']}")
        for e in source.events
        if e["what"] != "note" and e["began"] / 1e6 <= end and e["at"] / 1e6 >= begin
    ]


def _silent(name: str, source: _Source, begin: float, end: float) -> list[Loss]:
    """Spans that the source knows nothing of."""
    times = [begin, *(at for at, _ in source.ticks if begin < at < end), end]
    found = []
    for before, after in pairwise(times):
        if after - before > SILENCE:
            found.append(Loss(before, name, "silent", f"the generator said nothing for {after - before:.1f} s"))
    return found


def _late(name: str, source: _Source, begin: float, end: float) -> list[Loss]:
    """Flows that waited long for an answer, by the second in which it came."""
    return [
        Loss(at, f"{name}/{flow}", "late", f"an answer after {numbers[4] / 1e6:.1f} s")
        for at, flows in source.ticks
        for flow, numbers in flows.items()
        if begin <= at <= end + PATIENCE and numbers[4] / 1e6 >= LATE
    ]


def _counted(source: _Source, begin: float, end: float) -> dict[str, tuple[Counted, int]]:
    """From the last tick before the span to the first one after it; with segments sent again."""
    before = [flows for at, flows in source.ticks if at <= begin][-1:]
    after = [flows for at, flows in source.ticks if at >= end + PATIENCE][:1]
    within = [flows for at, flows in source.ticks if begin < at <= end + PATIENCE]
    last = (after or within or [{}])[-1]
    found = {}
    for flow, now in last.items():
        then = before[0].get(flow, [0] * 5) if before else [0] * 5
        worst = max((f[flow][4] for f in within if flow in f), default=0) / 1e6
        found[flow] = Counted(now[0] - then[0], now[1] - then[1], worst), now[3] - then[3]
    return found
