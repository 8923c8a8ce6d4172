"""How often a table of the kernel's is walked, and when its fill is worth a warning. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

FULL: Final = 0.5
MUCH: Final = 0.2
LITTLE: Final = 0.05
AT_REST: Final = 0.001


@dataclass(slots=True)
class Pace:
    """Seconds that a walk over the whole table takes, between `shortest` and `longest`.

    A table that is half full, or of which a fifth had expired, is walked four times as often; one that hardly loses
    anything half as often, until that takes a thousandth of a CPU. So what expires takes up little room, a small table
    is seen to fill up within seconds, and a large quiet one costs next to nothing.
    """

    shortest: float = 10.0
    longest: float = 300.0
    period: float = 20.0

    def after(self, fill: float, removed: float, work: float) -> float:
        """The next walk's period, after one that found the table `fill` full and `removed` of its entries expired, and
        took `work` seconds of a CPU."""
        if fill > FULL or removed > MUCH:
            self.period = max(self.period / 4, self.shortest)
        elif removed < LITTLE:
            enough = max(work / AT_REST, self.shortest)
            self.period = min(self.period * 2, enough, self.longest)
        return self.period


@dataclass(slots=True)
class Alarm:
    """Tells when a share rises above `high`, and again when it is below `low`."""

    high: float = 0.8
    low: float = 0.7
    raised: bool = False

    def turned(self, share: float) -> bool:
        """Whether `raised` is another than before."""
        raised = share >= (self.low if self.raised else self.high)
        self.raised, before = raised, self.raised
        return raised != before
