"""Makes the identities that pods will need, where agents may not (--identity-allocation operator).

It follows all pods and namespaces, computes each pod's labels as agents do (`model/labels.py`, the same filter), and
sees to it that each set of them has a number: from the moment the pod is known, which is before it is scheduled.
Numbers are chosen as agents choose them (decide/identity.py), so that both kinds of agents can be in one cluster while
it changes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fimbria.decide.identity import Existing, IdentitiesExhausted
from fimbria.model.labels import LabelFilter, Labels, pod_labels
from fimbria.operator.endpoint_slices import NamespaceWords
from fimbria.sources.k8s.errors import ApiError
from fimbria.sources.k8s.identities import IdentitySearch
from fimbria.sources.k8s.resources import Resource
from fimbria.sources.k8s.types.meta import ApiObject, Obj
from fimbria.tables import ObjectKey
from fimbria.tables.table import Signal, Table

log = logging.getLogger(__name__)
WORKERS: Final = 16
RETRY: Final = 1.0
ENDED: Final = ("Succeeded", "Failed")


class SlimSpec(Obj, frozen=True):
    host_network: bool = False
    service_account_name: str = ""


class SlimStatus(Obj, frozen=True):
    phase: str = ""


class SlimPod(ApiObject, frozen=True):
    """What an identity depends on, and nothing else of a pod is decoded."""

    spec: SlimSpec = SlimSpec()
    status: SlimStatus = SlimStatus()


PODS: Final = Resource("", "v1", "pods", "Pod", SlimPod)


class PodWords(NamedTuple):
    """A pod's own labels and its service account; equal ones share their labels."""

    labels: Labels
    service_account: str


def pod_words(obj: SlimPod) -> PodWords | None:
    """None for a pod that has no identity of its own: on the host's network, or ended."""
    if obj.spec.host_network or obj.status.phase in ENDED:
        return None
    return PodWords(Labels(obj.metadata.labels or {}), obj.spec.service_account_name)


@dataclass(slots=True)
class IdentityMaker:
    """Follows the tables until cancelled."""

    search: IdentitySearch
    pods: Table[ObjectKey, PodWords]
    namespaces: Table[str, NamespaceWords]
    identities: Table[int, Existing]
    labels: LabelFilter
    cluster: str
    failures: int = 0
    _labels: dict[str, Mapping[str, str]] = field(default_factory=dict)
    _of: dict[ObjectKey, Labels] = field(default_factory=dict)
    _uses: Counter[Labels] = field(default_factory=Counter)
    _missing: dict[Labels, None] = field(default_factory=dict)
    _wake: Signal = field(default_factory=Signal)

    async def run(self) -> None:
        """Make identities until cancelled."""
        for table in (self.identities, self.namespaces, self.pods):
            await table.wait_synced()
        identities = self.identities.subscribe(self._wake)
        namespaces = self.namespaces.subscribe(self._wake)
        pods = self.pods.subscribe(self._wake)
        async with asyncio.TaskGroup() as group:
            slots = asyncio.Semaphore(WORKERS)
            while True:
                self._wake.clear()
                for number in identities.drain():
                    self._identity(number)
                keys = pods.drain()
                if changed := {n for n in namespaces.drain() if self._relabelled(n)}:
                    keys |= {key for key in self.pods if key[0] in changed}
                for key in keys:
                    self._pod(key)
                for labels in list(self._missing):
                    del self._missing[labels]
                    group.create_task(self._make(labels, slots))
                await self._wake.wait()

    def wanted(self) -> Set[int]:
        """The numbers of all pods' labels, as far as they have any."""
        numbers = (self.search.allocator.number(labels) for labels in self._uses)
        return {n for n in numbers if n is not None}

    def _relabelled(self, name: str) -> bool:
        row, old = self.namespaces.get(name), self._labels.get(name)
        if row is None:
            return self._labels.pop(name, None) is not None
        self._labels[name] = row.labels
        return row.labels != old

    def _pod(self, key: ObjectKey) -> None:
        old, words = self._of.pop(key, None), self.pods.get(key)
        if old is not None:
            self._uses[old] -= 1
            if not self._uses[old]:
                del self._uses[old]
        namespace = self.namespaces.get(key[0])
        if words is None or namespace is None:
            return
        new = self.labels.apply(pod_labels(key[0], words.labels, namespace.labels, words.service_account, self.cluster))
        self._of[key] = new
        self._uses[new] += 1
        if self._uses[new] == 1:
            self._missing[new] = None

    def _identity(self, number: int) -> None:
        row = self.identities.get(number)
        if row is not None:
            self.search.allocator.on_seen(number, row.labels, row.marked)
            if row.marked and row.labels in self._uses:
                self._missing[row.labels] = None
            return
        labels = self.search.allocator.on_gone(number)
        if labels is not None and labels in self._uses:
            self._missing[labels] = None

    async def _make(self, labels: Labels, slots: asyncio.Semaphore) -> None:
        told = ""
        while labels in self._uses:
            async with slots:  # not while it waits: one namespace that gets none would keep all others from theirs
                try:
                    await self.search.number(labels)
                    return
                except (ApiError, IdentitiesExhausted) as error:
                    self.failures += 1
                    level = logging.DEBUG if str(error) == told else logging.WARNING
                    told = str(error)
                    log.log(level, "no identity for %s yet: %s", ", ".join(labels.texts()), error)
            await asyncio.sleep(RETRY)

    def metrics(self) -> Iterator[Metric]:
        """For the operator's exposition."""
        yield GaugeMetricFamily("fimbria_identities_wanted", "Sets of labels that pods have", value=len(self._uses))
        yield CounterMetricFamily("fimbria_identities_created", "Identities made", value=self.search.created)
        yield CounterMetricFamily("fimbria_identity_failures", "Failed attempts to make one", value=self.failures)
