"""What becomes of samples: medians, spreads, ratios, verdicts, and the table that people read. Pure."""

from __future__ import annotations

import json
import math
import operator
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

KEYS: Final = ("name", "unit", "median", "spread", "baseline", "ratio", "goal", "met")
NOISY: Final = 0.05  # of the median
_COMPARE: Final[Mapping[str, Callable[[float, float], bool]]] = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure must hold: `subject` is "ratio", or the name of the value itself in its unit ("median", "p99")."""

    subject: str
    compare: str
    limit: float

    def holds(self, value: float, ratio: float | None) -> bool:
        """Whether it is met; a ratio that couldn't be formed never meets anything."""
        checked = ratio if self.subject == "ratio" else value
        return checked is not None and _COMPARE[self.compare](checked, self.limit)

    def text(self, unit: str) -> str:
        """For people: `ratio >= 0.95`, `p99 <= 100 ms`."""
        return f"{self.subject} {self.compare} {number(self.limit)}" + (f" {unit}" if self.subject != "ratio" else "")


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. `spread` is half the distance between the quartiles, in `unit` like median and baseline;
    `ratio` is the median of the rounds' ratios, not the ratio of the medians: what disturbs the machine for seconds
    disturbs both sides of a round. `met` is None without a goal. `group` and `date` tell which run it comes from."""

    name: str
    unit: str
    median: float
    spread: float
    baseline: float | None = None
    ratio: float | None = None
    goal: str = ""
    met: bool | None = None
    against: str = ""
    note: str = ""
    group: str = ""
    date: str = ""


def spread(samples: Sequence[float]) -> float:
    """Half the distance between the quartiles; 0 for a single sample. Raises ValueError without samples."""
    if not samples:
        raise ValueError("no samples")
    if len(samples) == 1:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / 2


def percentile(samples: Sequence[float], share: float) -> float:
    """The smallest sample that at least `share` (0..1) of all don't exceed. Raises ValueError without samples."""
    if not samples:
        raise ValueError("no samples")
    return sorted(samples)[max(math.ceil(share * len(samples)) - 1, 0)]


def paired_ratio(samples: Sequence[float], baseline: Sequence[float]) -> float | None:
    """Median of the ratios round by round; of the medians if the sides have different numbers of samples. None if
    the baseline is zero."""
    if len(samples) == len(baseline) and all(baseline):
        return statistics.median(a / b for a, b in zip(samples, baseline, strict=True))
    below = statistics.median(baseline)
    return statistics.median(samples) / below if below else None


def figure(
    name: str, unit: str, samples: Sequence[float], *, baseline: Sequence[float] = (), against: str = "",
    goal: Goal | None = None, note: str = "",
) -> Figure:  # fmt: skip
    """A figure from the samples of one side and, in the same rounds, of its baseline. Raises ValueError without
    samples."""
    middle = statistics.median(samples) if samples else math.nan
    ratio = paired_ratio(samples, baseline) if baseline else None
    return Figure(
        name, unit, middle, spread(samples), statistics.median(baseline) if baseline else None, ratio,
        goal.text(unit) if goal else "", goal.holds(middle, ratio) if goal else None, against, note,
    )  # fmt: skip


def tail(
    name: str, unit: str, samples: Sequence[float], *, share: float = 0.99, baseline: Sequence[float] = (),
    against: str = "", goal: Goal | None = None, note: str = "",
) -> Figure:  # fmt: skip
    """The same for a percentile: `median` holds it, and the spread is that of all samples."""
    value = percentile(samples, share)
    below = percentile(baseline, share) if baseline else None
    ratio = value / below if below else None
    return Figure(
        name, unit, value, spread(samples), below, ratio,
        goal.text(unit) if goal else "", goal.holds(value, ratio) if goal else None, against, note,
    )  # fmt: skip


def explain(found: Figure, why: str = "") -> Figure:
    """With a word on why the goal was missed, if it was. A miss within the run's own noise is called that."""
    if found.met is not False:
        return found
    noise = found.spread / found.median if found.median else 0.0
    if noise > NOISY:
        why = f"not conclusive, the samples of this run spread by {noise:.0%}" + (f"; {why}" if why else "")
    note = "; ".join(filter(None, (why, found.note)))
    return replace(found, note=f"goal missed: {note}" if note else "goal missed")


# --- files and tables --------------------------------------------------------------------------------------------


def to_json(figures: Iterable[Figure]) -> str:
    """A JSON list of objects with at least KEYS. NaN isn't JSON: it raises ValueError."""
    return json.dumps([asdict(f) for f in figures], indent=1, allow_nan=False) + "\n"


def from_json(text: str) -> list[Figure]:
    """The opposite. Raises ValueError naming what is missing."""
    raw = json.loads(text)
    if not isinstance(raw, list):
        raise ValueError("benchmarks are a list")
    found = []
    for row in raw:
        missing = [k for k in KEYS if k not in row]
        if missing:
            raise ValueError(f"{row.get('name', '?')}: {', '.join(missing)} is missing")
        found.append(Figure(**{k: v for k, v in row.items() if k in Figure.__dataclass_fields__}))
    return found


def merge(old: Iterable[Figure], new: Sequence[Figure], groups: Sequence[str]) -> list[Figure]:
    """All figures in the order of `groups`: a group that was measured again is replaced as a whole."""
    fresh = {f.group for f in new}
    kept = [f for f in old if f.group not in fresh and f.group in groups]
    return sorted([*kept, *new], key=lambda f: groups.index(f.group))


def number(value: float) -> str:
    """Three significant digits, no exponent."""
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    text = f"{round(value, digits):,.{max(digits, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


HEAD: Final = ("figure", "measured", "±", "baseline", "ratio", "goal", "met")


def cells(f: Figure) -> tuple[str, ...]:
    """One line of the table as text, in the order of HEAD."""
    return (
        f.name,
        f"{number(f.median)} {f.unit}",
        number(f.spread),
        f"{number(f.baseline)} ({f.against})" if f.baseline is not None else "",
        "" if f.ratio is None else f"{f.ratio:.2f}" if f.ratio >= 0.1 else number(f.ratio),
        f.goal,
        "" if f.met is None else "yes" if f.met else "**no**",
    )


def table(figures: Sequence[Figure]) -> list[str]:
    """Markdown lines, aligned so that they are also read well as plain text; notes follow below the table."""
    rows = [HEAD, *map(cells, figures)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(HEAD))]
    right = {1, 2, 4}

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ) + " |"  # fmt: skip

    rule = "|" + "|".join("-" * (w + 1) + ":" if i in right else "-" * (w + 2) for i, w in enumerate(widths)) + "|"
    notes = [f"- {f.name}: {f.note}" for f in figures if f.note]
    return [line(rows[0]), rule, *map(line, rows[1:]), *(["", *notes] if notes else [])]
