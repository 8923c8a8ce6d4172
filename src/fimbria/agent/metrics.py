"""The agent's metrics in Prometheus' text format, collected when asked. Names follow the field's (`cilium_*` users find
them under `fimbria_*`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fimbria.agent import views
from fimbria.observe.names import drop_reason_name

if TYPE_CHECKING:
    from fimbria.agent.main import Agent


def exposition(agent: Agent) -> bytes:
    """All metrics as text. Blocking: reads a per-CPU map."""
    registry = CollectorRegistry()
    registry.register(_Collector(agent))
    return generate_latest(registry)


class _Collector:
    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def collect(self) -> Iterator[Metric]:
        yield from self._datapath()
        yield from self._apply()
        yield from self._agent.learned.metrics()
        yield from self._agent.sockets.metrics()
        yield from self._sources()
        yield from self._endpoints()

    def _datapath(self) -> Iterator[Metric]:
        drops = CounterMetricFamily("fimbria_drop_count", "Dropped packets", labels=["reason", "direction"])
        drop_bytes = CounterMetricFamily("fimbria_drop_bytes", "Dropped bytes", labels=["reason", "direction"])
        forwards = CounterMetricFamily("fimbria_forward_count", "Forwarded packets", labels=["direction"])
        forward_bytes = CounterMetricFamily("fimbria_forward_bytes", "Forwarded bytes", labels=["direction"])
        lost = CounterMetricFamily("fimbria_events_lost", "Events lost because the ring buffer was full")
        events_lost = 0
        for row in views.metrics_rows(self._agent) if "metrics" in self._agent.datapath.maps else ():
            direction = row["direction"]
            if row["reason"] == 0:
                forwards.add_metric([direction], row["packets"])
                forward_bytes.add_metric([direction], row["bytes"])
            elif row["reason"] == 1:
                events_lost += row["packets"]  # of both directions: one series
            else:
                name = drop_reason_name(row["reason"])
                drops.add_metric([name, direction], row["packets"])
                drop_bytes.add_metric([name, direction], row["bytes"])
        lost.add_metric([], events_lost)
        yield from (drops, drop_bytes, forwards, forward_bytes, lost)

    def _apply(self) -> Iterator[Metric]:
        loop = self._agent.loop
        wanted = GaugeMetricFamily("fimbria_desired_rows", "Rows wanted in the kernel", labels=["target"])
        failed = GaugeMetricFamily("fimbria_failed_rows", "Rows that can't be written", labels=["target"])
        repaired = CounterMetricFamily("fimbria_drift_repaired", "What others changed, repaired", labels=["target"])
        writes = CounterMetricFamily("fimbria_rows_written", "Rows written", labels=["target"])
        for stage in loop.stages:
            name = stage.rows.name
            wanted.add_metric([name], len(stage.rows.desired))
            failed.add_metric([name], len(stage.rows.failed))
            repaired.add_metric([name], stage.repaired)
            writes.add_metric([name], stage.writes)
        for kind, count in self._agent.keeper.repaired.items():
            repaired.add_metric([kind], count)
        yield from (wanted, failed, repaired, writes)
        yield GaugeMetricFamily("fimbria_policy_epoch", "Policy epoch in the kernel", value=self._agent.epoch.value)
        labels = ["hook", "program"]
        foreign = GaugeMetricFamily("fimbria_foreign_programs", "Programs of others at our hooks", labels=labels)
        for hook, programs in views.foreign(self._agent).items():
            for program in programs:
                foreign.add_metric([hook, program], 1)
        yield foreign

    def _sources(self) -> Iterator[Metric]:
        labels = ["kind"]
        connected = GaugeMetricFamily("fimbria_k8s_connected", "Whether a kind is being followed", labels=labels)
        events = CounterMetricFamily("fimbria_kubernetes_events", "Watch events received", labels=labels)
        lists = CounterMetricFamily("fimbria_kubernetes_lists", "Full lists", labels=labels)
        errors = CounterMetricFamily("fimbria_kubernetes_errors", "Failed lists and watches", labels=labels)
        bad = GaugeMetricFamily("fimbria_kubernetes_bad_objects", "Objects that can't be used", labels=labels)
        for informer in self._agent.sources.informers:
            kind = [informer.resource.kind]
            connected.add_metric(kind, int(informer.connected))
            events.add_metric(kind, informer.events)
            lists.add_metric(kind, informer.lists)
            errors.add_metric(kind, informer.errors)
            bad.add_metric(kind, len(informer.bad))
        yield from (connected, events, lists, errors, bad)

    def _endpoints(self) -> Iterator[Metric]:
        agent: Any = self._agent
        yield GaugeMetricFamily("fimbria_endpoints", "Pods of this node", value=len(agent.tables.endpoints))
        yield GaugeMetricFamily("fimbria_identities", "Identities known", value=len(agent.tables.identities))
        ignored = len(agent.engine.ipcache.foreign)
        yield GaugeMetricFamily("fimbria_reports_ignored", "CiliumEndpoints with other nodes' addresses", value=ignored)
        policies = sum(len(t) for t in views.policy_tables(agent))
        yield GaugeMetricFamily("fimbria_policies", "Policies known", value=policies)
        yield GaugeMetricFamily("fimbria_ready", "Whether the agent is ready", value=int(agent.ready.is_set()))
        requests = CounterMetricFamily("fimbria_cni_requests", "CNI requests", labels=["command", "code"])
        seconds = CounterMetricFamily("fimbria_cni_seconds", "Seconds spent in CNI requests", labels=["command"])
        if agent.cni is not None:
            for (command, code), count in agent.cni.requests.items():
                requests.add_metric([command, code], count)
            for command, spent in agent.cni.seconds.items():
                seconds.add_metric([command], spent)
        yield from (requests, seconds)
