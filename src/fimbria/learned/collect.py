"""Collection of `conntrack`, `nat` and `affinity`: entries that count for nothing any more make room, and are counted.

Rules
1. A table is walked in steps of some thousand entries, in a thread, evenly over a period that follows the load.
2. Programs take an expired entry for none. It is removed only some time after that, when no packet can be in the
   middle of using it, and only as what it was judged as (`kernel.sweep`): a newer entry of the same name stays.
3. A binding of `nat` is over when the connection it serves has expired. If no connection is known, it is over when
   unused for NAT_LONELY. That holds for each half of it: the one that is left when the kernel forgot the other is how
   programs find the port again.
4. The walk counts: entries, source ports in use by destination, and, by a sample, what the kernel had to forget.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from fimbria.kernel.btf import Btf
from fimbria.kernel.maps import Map, MapError
from fimbria.kernel.sweep import Groups, NatRules, Sweep, Tally, offsets
from fimbria.learned.pace import Alarm, Pace

log = logging.getLogger(__name__)
SECOND: Final = 10**9
# Longer than a walk over `nat` under load: that one asks what became of the connection.
CT_GRACE: Final = 30 * SECOND
NAT_RECENT: Final = 10 * SECOND
NAT_LONELY: Final = 120 * SECOND
AFFINITY_GRACE: Final = 10 * SECOND
LEAST_PAUSE: Final = 0.02
SAMPLE: Final = 8
_STAMP: Final = struct.Struct("=Q")


@dataclass(slots=True)
class Figures:
    """Of one table. `entries`, `fill`: as the last whole walk found it, without what it removed.

    `evicted` is estimated: the share of a sample of living entries that was missing a walk later.
    """

    entries: int = 0
    fill: float = 0.0
    runs: int = 0
    failures: int = 0
    removed: int = 0
    renewed: int = 0
    evicted: float = 0.0
    busy_seconds: float = 0.0
    last_seconds: float = 0.0
    period: float = 0.0


@dataclass(slots=True)
class Walk:
    """What one walk has found so far."""

    seen: int = 0
    removed: int = 0
    steps: int = 0
    seconds: float = 0.0


class Collector:
    """One table. `step` blocks for a millisecond or two and is called from one thread at a time."""

    def __init__(self, bpf_map: Map, *, pace: Pace | None = None, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.map = bpf_map
        self.figures = Figures()
        self.alarm = Alarm()
        self._pace = pace or Pace()
        self._clock = clock
        self._sweep = Sweep(bpf_map)
        self._walk = Walk()
        self._steps = 1
        self.figures.period = self._pace.period

    def begin(self, now: int) -> None:
        """Before a walk."""

    def judge(self, sweep: Sweep, now: int) -> None:
        """Leave only the rows that are to be removed."""
        raise NotImplementedError

    def look(self, sweep: Sweep, now: int) -> None:
        """Before rows are judged."""

    def load(self) -> float:
        """How near the table is to trouble, 0 to 1."""
        return self.figures.fill

    def step(self) -> bool:
        """The next entries; True after the last ones of a walk. Raises MapError."""
        began, now, walk = time.thread_time(), self._clock(), self._walk
        if not walk.steps:
            self.begin(now)
        last = self._sweep.step()
        walk.steps += 1
        walk.seen += self._sweep.count
        self.look(self._sweep, now)
        self.judge(self._sweep, now)
        removed, renewed = self._sweep.remove()
        walk.removed += removed
        self.figures.removed += removed
        self.figures.renewed += renewed
        walk.seconds += time.thread_time() - began  # what others took of the CPU meanwhile is none of its work
        if last:
            self._finish(walk)
        return last

    def _finish(self, walk: Walk) -> None:
        f = self.figures
        f.entries = walk.seen - walk.removed
        f.fill = f.entries / self.map.max_entries
        f.runs += 1
        f.last_seconds = walk.seconds
        f.busy_seconds += walk.seconds
        f.period = self._pace.after(self.load(), walk.removed / max(walk.seen, 1), walk.seconds)
        self._steps = walk.steps
        self._walk = Walk()
        if self.alarm.turned(f.fill):
            state = "is nearly full" if self.alarm.raised else "has room again"
            log.warning("table %s %s: %d of %d entries", self.map.name, state, f.entries, self.map.max_entries)

    async def run(self) -> None:
        """Walk until cancelled. A table that can't be read is tried again a period later."""
        while True:
            try:
                await asyncio.to_thread(self.step)
            except MapError as error:
                self.figures.failures += 1
                log.error("collection: %s", error)
                self._walk = Walk()
                await asyncio.sleep(self.figures.period)
            await asyncio.sleep(max(self.figures.period / self._steps, LEAST_PAUSE))


class ConntrackCollector(Collector):
    """Connections, by their `expires`."""

    def __init__(
        self, bpf_map: Map, btf: Btf, *, pace: Pace | None = None, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        super().__init__(bpf_map, pace=pace, clock=clock)
        self._expires = offsets(btf, "ct_entry")["expires"]
        self._sample: list[bytes] = []

    def begin(self, now: int) -> None:
        """Look for the last walk's sample: what is missing was evicted, since nothing else removes what lives."""
        if self._sample:
            gone = sum(self.map.lookup(key) is None for key in self._sample)
            self.figures.evicted += gone / len(self._sample) * self.figures.entries
        self._sample = []

    def look(self, sweep: Sweep, now: int) -> None:
        """Take some entries that will live beyond the next walk's beginning."""
        enough = now + int(2 * self.figures.period * SECOND)
        for at in range(0, sweep.count, max(sweep.count // SAMPLE, 1)):
            key, value = sweep.row(at)
            if _STAMP.unpack_from(value, self._expires)[0] > enough:
                self._sample.append(key)

    def judge(self, sweep: Sweep, now: int) -> None:
        """Those expired for a while."""
        sweep.keep_expired(self._expires, now - CT_GRACE)


class AffinityCollector(Collector):
    """Clients' backends, by when they were used and what their service asks for."""

    def __init__(
        self, bpf_map: Map, btf: Btf, seconds: Callable[[], Mapping[int, int]], *, pace: Pace | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:  # fmt: skip
        """`seconds`: by service id; a service that isn't in it keeps nothing. Called in the walking thread."""
        super().__init__(bpf_map, pace=pace, clock=clock)
        self._used = offsets(btf, "affinity")["used"]
        self._service = offsets(btf, "affinity_key")["service"]
        self._seconds = seconds
        self._ages: Mapping[int, int] = {}

    def begin(self, now: int) -> None:
        """What services ask for now."""
        self._ages = self._seconds()

    def judge(self, sweep: Sweep, now: int) -> None:
        """Those whose time is over."""
        limits = {n: max(now - s * SECOND - AFFINITY_GRACE, 0) for n, s in self._ages.items()}
        sweep.keep_expired(self._used, now - AFFINITY_GRACE, Groups(self._service, limits))


class NatCollector(Collector):
    """Bindings, by the connections they serve."""

    def __init__(
        self, nat: Map, conntrack: Map, btf: Btf, ports: int, show: Callable[[bytes], str] = bytes.hex, *,
        pace: Pace | None = None, clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:  # fmt: skip
        """`ports`: how many source ports there are towards one destination; `show` puts an ingress key into words."""
        super().__init__(nat, pace=pace or Pace(shortest=5.0), clock=clock)
        self._show = show
        self._rules = NatRules(btf, conntrack)
        self._tally = Tally()
        self._ports_alarm = Alarm()
        self.ports = max(ports, 1)
        self.ports_used = 0
        self.fullest = ""

    def begin(self, now: int) -> None:
        """Count anew."""
        self._tally.clear()

    def judge(self, sweep: Sweep, now: int) -> None:
        """Those whose connection is over."""
        self._rules.at(now, NAT_RECENT, NAT_LONELY)
        sweep.keep_over(self._rules, self._tally)

    def load(self) -> float:
        """Ports run out before the table does."""
        return max(self.figures.fill, self.ports_used / self.ports)

    def _finish(self, walk: Walk) -> None:
        self.ports_used = min(self._tally.most, self.ports)
        self.fullest = self._show(self._tally.fullest(self.map.key_size)) if self.ports_used else ""
        super()._finish(walk)
        if self._ports_alarm.turned(self.ports_used / self.ports):
            state = "nearly out of source ports" if self._ports_alarm.raised else "enough source ports again"
            log.warning("%s towards %s: %d of %d in use", state, self.fullest, self.ports_used, self.ports)
