"""What this node's own pods ask of its frontends: host ports, local redirects, and being left alone.

Decided by `fimbria.compute.host_ports` and `fimbria.compute.redirect`; here it is found out what a change touches.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fimbria.apply.rows import Rows
from fimbria.compute import host_ports, redirect
from fimbria.compute.service import Delta, Extra, Owner, ServiceCompute
from fimbria.model.endpoint import HostPort, LocalEndpoint
from fimbria.model.redirect import LocalPod, Redirect
from fimbria.model.rows import ExemptKey, FrontendKey
from fimbria.tables import ObjectKey, Tables

log = logging.getLogger(__name__)


class LocalFrontends:
    """Part of the engine; `step` is one of its steps. `addrs()` are this node's addresses, `labels(endpoint)` a pod's
    labels with their sources, `held(addr)` says whether a node or pod has an address, `put` takes changed rows."""

    def __init__(
        self,
        tables: Tables,
        exempt: Rows[ExemptKey, int],
        services: ServiceCompute,
        put: Callable[[Delta], None],
        *,
        addrs: Callable[[], tuple[bytes, ...]],
        labels: Callable[[LocalEndpoint], Mapping[str, str] | None],
        held: Callable[[bytes], bool],
    ) -> None:
        self._tables = tables
        self._services = services
        self._put = put
        self._addrs = addrs
        self._labels = labels
        self._held = held
        self._exempt = exempt
        self._exempt_of: dict[Any, frozenset[ExemptKey]] = {}  # by redirect's or endpoint's key
        self._exempt_uses: dict[ExemptKey, int] = {}
        self._ports: dict[int, Owner] = {}
        self._redirected: dict[ObjectKey, Owner] = {}
        self._namespaces: dict[int, str] = {}
        self.problems: dict[str, tuple[str, ...]] = {}
        """What isn't as asked for on this node, by pod or policy."""

    def step(self, dirty: Mapping[str, set[Any]], touched: Iterable[int]) -> None:
        """After Services and endpoints; `touched` are endpoints of which anything changed."""
        moved = {namespace for namespace, _ in dirty.get("pods", ())} | set(dirty.get("namespaces", ()))
        for endpoint_id in touched:
            moved.add(self._namespaces.get(endpoint_id, ""))
            self._endpoint(endpoint_id)
            moved.add(self._namespaces.get(endpoint_id, ""))
        if any(name in dirty for name in ("services", "own_node", "nodes")):
            for endpoint_id in list(self._ports):
                self._host_ports(endpoint_id, self._tables.endpoints.get(endpoint_id))
        changed = set(dirty.get("redirects", ()))
        services = dirty.get("services", ())
        for key, wanted in self._tables.redirects.items():
            at_address = wanted.addr is not None and (services or "nodes" in dirty)
            if key[0] in moved or wanted.service in services or at_address:
                changed.add(key)
        for key in sorted(changed):
            self._redirect(key, self._tables.redirects.get(key))

    # --- endpoints ---------------------------------------------------------------------------------------------------

    def _endpoint(self, endpoint_id: int) -> None:
        endpoint = self._tables.endpoints.get(endpoint_id)
        self._host_ports(endpoint_id, endpoint)
        self._namespaces.pop(endpoint_id, None)
        wanted = frozenset[ExemptKey]()
        if endpoint is not None:
            self._namespaces[endpoint_id] = endpoint.namespace
            pod = self._tables.pods.get((endpoint.namespace, endpoint.pod))
            if pod is not None and pod.own_addresses and pod.is_of(endpoint.uid) and endpoint.netns_cookie:
                wanted = frozenset((ExemptKey(endpoint.netns_cookie, 0, 0),))
        self._set_exempt(endpoint_id, wanted)

    def node_port_service(self, port: HostPort) -> Owner | None:
        """Whose node port a port is."""
        owners = (self._services.claimed(host_ports.node_port(port, v4)) for v4 in (True, False))
        return next((o for o in owners if o is not None), None)

    def host_port_frontends(self, endpoint: LocalEndpoint) -> list[FrontendKey]:
        """The frontends of an endpoint's host ports."""
        return [key for extra in self._port_extras(endpoint) for key in extra.frontends]

    def _port_extras(self, endpoint: LocalEndpoint) -> tuple[Extra, ...]:
        return host_ports.extras(endpoint, self._addrs(), self._services.claimed)

    def _host_ports(self, endpoint_id: int, endpoint: LocalEndpoint | None) -> None:
        owner = self._ports.pop(endpoint_id, None)
        if endpoint is not None and endpoint.host_ports:
            owner = self._ports[endpoint_id] = host_ports.owner(endpoint)
            self._put(self._services.set_extra(owner, self._port_extras(endpoint)))
            lost = [f"{p} is the node port of {o}" for p in endpoint.host_ports if (o := self.node_port_service(p))]
            self._tell(str(owner), (*lost, *self._services.conflicts(owner)))
        elif owner is not None:
            self._put(self._services.set_extra(owner, ()))
            self._tell(str(owner), ())

    # --- local redirects ---------------------------------------------------------------------------------------------

    def _redirect(self, key: ObjectKey, wanted: Redirect | None) -> None:
        if wanted is None:
            owner = self._redirected.pop(key, None)
            if owner is not None:
                self._put(self._services.set_extra(owner, ()))
                self._set_exempt(key, frozenset())
                self._tell(str(owner), ())
            return
        owner, former = redirect.owner(wanted), self._redirected.get(key)
        if former is not None and former != owner:
            self._put(self._services.set_extra(former, ()))
        self._redirected[key] = owner
        service = self._tables.services.get(wanted.service) if wanted.service is not None else None
        foreign = wanted.addr is not None and (self._held(wanted.addr) or self._services.has_address(wanted.addr))
        pods = sorted(self._selected(wanted))
        extras = () if foreign else redirect.extras(wanted, service, pods)
        self._put(self._services.set_extra(owner, extras))
        has = [f for e in extras for f in e.frontends if self._services.claimed(f) == owner]
        numbers = {n for f in has if (n := self._services.number(f)) is not None}
        self._set_exempt(key, frozenset(redirect.exempt(wanted, numbers, pods)))
        found = redirect.problems(wanted, service, pods, foreign=foreign)
        self._tell(str(owner), (*found, *self._services.conflicts(owner)))

    def _selected(self, wanted: Redirect) -> Iterator[LocalPod]:
        for endpoint_id in self._tables.endpoints.by("namespace", wanted.id.namespace):
            endpoint = self._tables.endpoints[endpoint_id]
            labels = self._labels(endpoint)
            if labels is not None and wanted.pods.matches(labels):
                pod = self._tables.pods[endpoint.namespace, endpoint.pod]
                yield LocalPod(endpoint_id, endpoint.netns_cookie, endpoint.addrs, pod.ready)

    # --- rows and words ----------------------------------------------------------------------------------------------

    def _set_exempt(self, source: Any, wanted: frozenset[ExemptKey]) -> None:
        """Several may ask for one row."""
        before = self._exempt_of.pop(source, frozenset())
        if wanted:
            self._exempt_of[source] = wanted
        for key in wanted - before:
            self._exempt_uses[key] = self._exempt_uses.get(key, 0) + 1
            self._exempt.put(key, 1)
        for key in before - wanted:
            self._exempt_uses[key] -= 1
            if not self._exempt_uses[key]:
                del self._exempt_uses[key]
                self._exempt.drop(key)

    def _tell(self, who: str, problems: tuple[str, ...]) -> None:
        """A log line when something begins to be wrong."""
        for problem in problems:
            if problem not in self.problems.get(who, ()):
                log.warning("%s: %s", who, problem)
        self.problems.pop(who, None)
        if problems:
            self.problems[who] = problems
