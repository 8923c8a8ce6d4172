"""The agent's informers: which kinds it follows, and into which tables.

An agent sees pods of its own node only; of others it sees what their agents report (CiliumEndpoint), by slices or one
by one (`agent/remotes.py`). Everything else is what every node needs: nodes, namespaces, identities, Services and
policies.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from fimbria.agent.remotes import RemoteEndpoints
from fimbria.model.endpoint import PodSlice
from fimbria.model.labels import LabelFilter
from fimbria.model.policy import Policy, PolicyId, Problem
from fimbria.model.redirect import Redirect
from fimbria.model.service import EndpointSlice, Service, ServiceKey
from fimbria.sources.k8s import policies, policies_cilium, redirects, resources, rows, services
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import NotFound
from fimbria.sources.k8s.informer import KEEP, Informer
from fimbria.sources.k8s.policies import Conversion, Vocabulary
from fimbria.sources.k8s.redirects import RedirectConversion
from fimbria.sources.k8s.types import core
from fimbria.sources.k8s.types.cilium import CiliumEndpointSlice
from fimbria.tables import Tables
from fimbria.tables.table import Table

log = logging.getLogger(__name__)
SPARE_PROBLEMS: Final = 64
MAX_TOLD: Final = 5


class BadPolicy(ValueError):
    """A policy whose subject can't be known: the version before stays in force."""


@dataclass(slots=True)
class Sources:
    """Builds and runs the informers. `problems` holds what is wrong with each policy, for its status and for people."""

    client: ApiClient
    tables: Tables
    node: str
    words: Vocabulary
    slices: bool = True
    remotes: RemoteEndpoints | None = None
    informers: list[Informer[Any, Any, Any]] = field(default_factory=list)
    problems: dict[PolicyId, tuple[Problem, ...]] = field(default_factory=dict)

    def build(self) -> None:
        """Make the informers; they start with `run`."""
        t, r = self.tables, resources
        self._add(r.CILIUM_NODES, t.nodes, rows.node, key=lambda m: m.name)
        self._add(r.NAMESPACES, t.namespaces, rows.namespace, key=lambda m: m.name)
        self._add(r.PODS, t.pods, rows.pod, fields=f"spec.nodeName={self.node}")
        self._add(r.CILIUM_IDENTITIES, t.identities, rows.identity, key=rows.identity_key)
        if self.slices:
            made = self._informer(r.CILIUM_ENDPOINT_SLICES, t.pod_slices, self._pod_slice, key=lambda m: m.name)
            self.remotes = RemoteEndpoints(t, made, self._reports, self.informers)
        else:
            self.informers.append(self._reports())
        named = f"metadata.name={self.node}"
        self._add(r.NODES, t.own_node, services.to_topology, key=lambda m: m.name, fields=named)
        self._add(r.SERVICES, t.services, self._service)
        self._add(r.ENDPOINT_SLICES, t.endpoint_slices, self._slice)
        self._add(r.NETWORK_POLICIES, t.network_policies, self._convert(policies.network_policy))
        cilium = self._convert(policies_cilium.cilium_policy)
        self._add(r.CILIUM_NETWORK_POLICIES, t.cilium_policies, cilium)
        self._add(r.CILIUM_CLUSTERWIDE_NETWORK_POLICIES, t.clusterwide_policies, cilium)
        self._add(r.CILIUM_LOCAL_REDIRECT_POLICIES, t.redirects, self._convert(redirects.local_redirect))

    def tables_followed(self) -> list[Table[Any, Any]]:
        """The tables that informers fill: all must be synced before absence means anything."""
        found = {i.table.name: i.table for i in self.informers if i.table is not self.tables.pod_slices}
        return [*found.values(), *([] if "remote_endpoints" in found else [self.tables.remote_endpoints])]

    async def run(self) -> None:
        """Follow all kinds until cancelled."""
        async with asyncio.TaskGroup() as group:
            for informer in self.informers:
                group.create_task(informer.run())
            if self.remotes is not None:
                group.create_task(self.remotes.run())

    async def fetch_pod(self, namespace: str, name: str) -> None:
        """Bring one pod and its namespace into the tables without waiting for the watch."""
        try:
            pod = await self.client.get(resources.PODS, name, namespace)
            # The watch, which only follows this node's pods, would never say that another's is gone.
            if pod.spec.node_name != self.node:
                return
            self.tables.pods.upsert((namespace, name), rows.pod(pod))
            if namespace not in self.tables.namespaces:
                found = await self.client.get(resources.NAMESPACES, namespace)
                self.tables.namespaces.upsert(namespace, rows.namespace(found))
        except NotFound:
            return

    def forget_gone(self) -> None:
        """Drop the problems of policies that aren't there any more."""
        t = self.tables
        tables = (t.network_policies, t.cilium_policies, t.clusterwide_policies, t.redirects)
        there = {policy.id for table in tables for policy in table.values()}
        bad = {key if isinstance(key, tuple) else ("", key) for informer in self.informers for key in informer.bad}
        gone = [p for p in self.problems if p not in there and (p.namespace, p.name) not in bad]
        for policy in gone:
            del self.problems[policy]

    def _policies(self) -> int:
        t = self.tables
        return len(t.network_policies) + len(t.cilium_policies) + len(t.clusterwide_policies) + len(t.redirects)

    def _add(self, resource: Any, table: Any, transform: Any, *, key: Any = rows.object_key, fields: str = "") -> None:
        self.informers.append(self._informer(resource, table, transform, key=key, fields=fields))

    def _informer(
        self, resource: Any, table: Any, transform: Any, *, key: Any = rows.object_key, fields: str = ""
    ) -> Informer[Any, Any, Any]:
        on_bad = self._on_bad(resource.kind)
        return Informer(self.client, resource, table, transform, key=key, fields=fields, on_bad=on_bad)

    def _reports(self) -> Informer[Any, Any, Any]:
        return self._informer(resources.CILIUM_ENDPOINTS, self.tables.remote_endpoints, rows.remote_endpoint)

    def _pod_slice(self, obj: CiliumEndpointSlice) -> PodSlice:
        known = self.tables.pod_slices.get(obj.metadata.name)
        row = rows.pod_slice(obj, known.endpoints if known is not None else {})
        for problem in row.problems[:MAX_TOLD] if known is None or known.problems != row.problems else ():
            log.error("CiliumEndpointSlice %s: %s", obj.metadata.name, problem)
        return row

    @staticmethod
    def _on_bad(kind: str) -> Callable[[Any, str, bytes], Any]:
        def report(key: Any, error: str, _raw: bytes) -> Any:
            log.error("%s %s can't be used, what it said before stays in force: %s", kind, key, error)
            return KEEP

        return report

    def _service(self, obj: core.Service) -> Service:
        row = services.to_service(obj)
        _tell("Service", row.key, row.warnings, self.tables.services.get(row.key))
        return row

    def _slice(self, obj: core.EndpointSlice) -> EndpointSlice | None:
        row = services.to_slice(obj)
        if row is not None:
            name = ServiceKey(row.service.namespace, row.name)
            _tell("EndpointSlice", name, row.warnings, self.tables.endpoint_slices.get(name))
        return row

    def _convert(
        self, convert: Callable[[Any, Vocabulary], Conversion | RedirectConversion]
    ) -> Callable[[Any], Policy | Redirect]:
        def transform(obj: Any) -> Policy | Redirect:
            conversion = convert(obj, self.words)
            policy_id = PolicyId(obj.kind or type(obj).__name__, obj.metadata.namespace, obj.metadata.name)
            if conversion.policy is not None:
                policy_id = conversion.policy.id
            known = self.problems.get(policy_id)
            self.problems[policy_id] = conversion.problems
            if len(self.problems) > 2 * self._policies() + SPARE_PROBLEMS:
                self.forget_gone()
            # A status patch brings the same object again: said once is enough.
            for problem in conversion.problems if conversion.problems != known else ():
                log.warning("%s: %s", policy_id, problem)
            if conversion.policy is None:
                raise BadPolicy("; ".join(map(str, conversion.problems)))
            return conversion.policy

        return transform


def vocabulary(label_filter: str, cluster: str) -> Vocabulary:
    """Raises ValueError naming a pattern that can't be used."""
    return Vocabulary(LabelFilter.of(label_filter.split()), cluster)


def _tell(kind: str, name: ServiceKey, warnings: tuple[str, ...], known: Service | EndpointSlice | None) -> None:
    """What an object asks for and doesn't get, the first few; what was said of it before isn't said again."""
    told = known.warnings if known is not None else ()
    for text in [w for w in warnings if w not in told][:MAX_TOLD]:
        log.warning("%s %s: %s", kind, name, text)
