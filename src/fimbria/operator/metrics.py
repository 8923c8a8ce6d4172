"""The operator's metrics, collected when asked. Each part brings its own numbers; names are in docs/operations.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fimbria.sources.k8s.informer import Informer

Part = Callable[[], Iterable[Metric]]


@dataclass(slots=True, eq=False)
class OperatorMetrics:
    """`parts` are asked in order; `informers` are all that this replica runs."""

    leading: Callable[[], bool]
    informers: list[Informer[Any, Any, Any]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)

    def exposition(self) -> bytes:
        """All of them as Prometheus text."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for them."""
        yield GaugeMetricFamily("fimbria_operator_leading", "Whether this replica leads", value=int(self.leading()))
        yield from self._sources()
        for part in self.parts:
            yield from part()

    def _sources(self) -> Iterator[Metric]:
        labels = ["kind"]
        connected = GaugeMetricFamily("fimbria_k8s_connected", "Whether a kind is being followed", labels=labels)
        objects = GaugeMetricFamily("fimbria_kubernetes_objects", "Objects known", labels=labels)
        events = CounterMetricFamily("fimbria_kubernetes_events", "Watch events received", labels=labels)
        lists = CounterMetricFamily("fimbria_kubernetes_lists", "Full lists", labels=labels)
        errors = CounterMetricFamily("fimbria_kubernetes_errors", "Failed lists and watches", labels=labels)
        for informer in self.informers:
            kind = [informer.resource.kind]
            connected.add_metric(kind, int(informer.connected))
            objects.add_metric(kind, len(informer.table))
            events.add_metric(kind, informer.events)
            lists.add_metric(kind, informer.lists)
            errors.add_metric(kind, informer.errors)
        yield from (connected, objects, events, lists, errors)
