"""Collection of what the kernel learned, for one agent, and how near its tables are to being full."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fimbria.agent import views
from fimbria.agent.config import port_range
from fimbria.learned.collect import AffinityCollector, Collector, ConntrackCollector, NatCollector
from fimbria.learned.pace import Alarm
from fimbria.model.protocol import protocol_name
from fimbria.model.rows import NatKey

if TYPE_CHECKING:
    from fimbria.agent.main import Agent

log = logging.getLogger(__name__)
WATCH: Final = 10.0
NO_MAPPING: Final = 167  # enum drop_reason


class Learned:
    """The collectors of one agent, by the name of their table. None until `run`: programs bring the maps."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self.collectors: dict[str, Collector] = {}
        self._alarms: dict[str, Alarm] = {}
        self._refused = 0

    async def run(self) -> None:
        """Collect until cancelled."""
        maps, btf = self._agent.datapath.maps, self._agent.layouts.btf
        self.collectors = {"conntrack": ConntrackCollector(maps["conntrack"], btf)}
        if "nat" in maps:
            first, last = port_range("--masquerade-ports", self._agent.config.masquerade_ports)
            ports = last - first + 1
            self.collectors["nat"] = NatCollector(maps["nat"], maps["conntrack"], btf, ports, self._destination)
        if "affinity" in maps:
            self.collectors["affinity"] = AffinityCollector(maps["affinity"], btf, self._affinity_seconds)
        async with asyncio.TaskGroup() as group:
            for name, collector in self.collectors.items():
                group.create_task(collector.run(), name=f"collect-{name}")
            group.create_task(self._watch(), name="pressure")

    async def _watch(self) -> None:
        """Say what nobody walks: tables that hold what was decided, and packets that found no source port."""
        while True:
            for name, (used, room) in self.pressure().items():
                if name not in self.collectors and self._alarms.setdefault(name, Alarm()).turned(used / room):
                    state = "is nearly full" if self._alarms[name].raised else "has room again"
                    log.warning("table %s %s: %d of %d entries", name, state, used, room)
            rows = await asyncio.to_thread(views.metrics_rows, self._agent)
            refused = sum(r["packets"] for r in rows if r["reason"] == NO_MAPPING)
            if refused > self._refused:
                text = "%d packets were dropped because no source port was free (NAT_NO_MAPPING); fullest: %s"
                log.warning(text, refused - self._refused, self.ports[2] or "unknown")
            self._refused = refused
            await asyncio.sleep(WATCH)

    def pressure(self) -> dict[str, tuple[int, int]]:
        """By table: rows, and room for them. Rows are those wanted, or those that the last walk found."""
        maps = self._agent.datapath.maps
        found = {s.rows.name: len(s.rows.desired) for s in self._agent.loop.stages if s.rows.name in maps}
        found |= {name: n for name in self.collectors if (n := self.entries(name)) is not None}
        return {name: (n, maps[name].max_entries) for name, n in sorted(found.items())}

    def entries(self, name: str) -> int | None:
        """How many entries its last walk left in a table; None for one that isn't walked."""
        found = self.collectors.get(name)
        return found.figures.entries if found and found.figures.runs else None

    @property
    def ports(self) -> tuple[int, int, str]:
        """Source ports in use towards the destination that has most, how many there are, and which it is."""
        nat = self.collectors.get("nat")
        return (nat.ports_used, nat.ports, nat.fullest) if isinstance(nat, NatCollector) else (0, 0, "")

    def _destination(self, key: bytes) -> str:
        row: NatKey = self._agent.layouts["nat_key"].decode(key)
        return f"{protocol_name(row.proto)} {views.addr_port(row.saddr, row.sport)}"

    def _affinity_seconds(self) -> Mapping[int, int]:
        # In a thread: a copy of the dict is made in one step, walking it would not be.
        rows = tuple(self._agent.rows.frontends.desired.values())
        return {row.service: row.affinity_seconds for row in rows if row.affinity_seconds}

    # --- metrics -----------------------------------------------------------------------------------------------------

    def metrics(self) -> Iterator[Metric]:
        """Everything that collection counts."""
        labels = ["map_name"]
        runs = CounterMetricFamily("fimbria_map_gc_runs", "Walks over a table, by outcome", labels=[*labels, "status"])
        entries = GaugeMetricFamily("fimbria_map_gc_entries", "Entries after the last walk", labels=labels)
        deleted = CounterMetricFamily("fimbria_map_gc_deleted", "Expired entries removed", labels=labels)
        lost = "Living entries lost because a table was full (estimate)"
        evicted = CounterMetricFamily("fimbria_map_evictions", lost, labels=labels)
        busy = CounterMetricFamily("fimbria_map_gc_duration_seconds", "CPU time spent walking a table", labels=labels)
        period = GaugeMetricFamily("fimbria_map_gc_interval_seconds", "Time between two walks", labels=labels)
        for name, collector in self.collectors.items():
            f = collector.figures
            runs.add_metric([name, "completed"], f.runs)
            runs.add_metric([name, "failed"], f.failures)
            entries.add_metric([name], f.entries)
            deleted.add_metric([name], f.removed)
            evicted.add_metric([name], f.evicted)
            busy.add_metric([name], f.busy_seconds)
            period.add_metric([name], f.period)
        yield from (runs, entries, deleted, evicted, busy, period)
        text = "Rows / room in the table"
        pressure = GaugeMetricFamily("fimbria_bpf_map_pressure", text, labels=labels)
        capacity = GaugeMetricFamily("fimbria_bpf_map_capacity", "Room in a table", labels=labels)
        for name, (n, room) in self.pressure().items():
            pressure.add_metric([name], n / room)
            capacity.add_metric([name], room)
        yield from (pressure, capacity)
        used, there, _ = self.ports
        if there:
            text = "Source ports in use towards the destination that has most"
            yield GaugeMetricFamily("fimbria_nat_ports_used", text, value=used)
            yield GaugeMetricFamily("fimbria_nat_ports_available", "Source ports towards one destination", value=there)
