"""What every replica follows from its start, leader or not: what is large. So a new leader begins with the cluster
before its eyes, and not with a minute of lists.

The views may be a moment old when it begins. Nothing is decided from them that can't be put right: slices carry their
resourceVersion, identities are numbered by their labels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from fimbria.decide.endpoint_slices import Stored
from fimbria.decide.identity import Existing
from fimbria.operator.collect import existing
from fimbria.operator.endpoint_slices import NamespaceWords, Reported, namespace_words, reported, stored, unreadable
from fimbria.operator.identities import PODS, PodWords, pod_words
from fimbria.sources.k8s import resources, rows
from fimbria.sources.k8s.informer import Informer
from fimbria.sources.k8s.rows import object_key
from fimbria.sources.k8s.types.cilium import CiliumEndpointSlice
from fimbria.tables import ObjectKey
from fimbria.tables.table import Table


class ClusterView:
    """Tables and their informers, which `follow(resource, table, transform, **options)` makes."""

    def __init__(self, follow: Callable[..., Informer[Any, Any, Any]], *, slices: bool, pods: bool) -> None:
        self.endpoints: Table[ObjectKey, Reported] = Table("endpoints")
        self.identities: Table[int, Existing] = Table("identities")
        self.slices: Table[str, Stored[bytes]] = Table("slices")
        self.namespaces: Table[str, NamespaceWords] = Table("namespaces")
        self.pods: Table[ObjectKey, PodWords] | None = None

        def by_name(meta: Any) -> str:
            return str(meta.name)

        self._collected = [
            follow(resources.CILIUM_ENDPOINTS, self.endpoints, partial(reported, entries=slices), key=object_key),
            follow(resources.CILIUM_IDENTITIES, self.identities, existing, key=rows.identity_key),
        ]
        self.informers = list(self._collected)
        if slices:
            self.informers.append(
                follow(resources.CILIUM_ENDPOINT_SLICES, self.slices, self._stored, key=by_name, on_bad=unreadable)
            )
        if pods:
            self.pods = Table("pods")
            self._collected.append(follow(PODS, self.pods, pod_words, key=object_key))
            self.informers.append(self._collected[-1])
        if slices or pods:
            self.informers.append(follow(resources.NAMESPACES, self.namespaces, namespace_words, key=by_name))

    def _stored(self, obj: CiliumEndpointSlice) -> Stored[bytes]:
        """An entry that is what the endpoint's own row says is the same object: a sixth of the operator's memory."""
        read, known = stored(obj), self.endpoints.get
        same = {n: row.entry for n in read.endpoints if (row := known((read.namespace, n))) is not None}
        kept = {n: same[n] if same.get(n) == e else e for n, e in read.endpoints.items()}
        return Stored(read.namespace, kept, read.version)

    def current(self) -> bool:
        """Whether what says that something is unused is up to date."""
        return all(i.connected for i in self._collected)
