"""What load balancers ask a node: does it have endpoints of a Service, and is it fit for service at all?

The answers are kube-proxy's (k8s.io/kubernetes 1.36, pkg/proxy/healthcheck), to the field:
- on a Service's healthCheckNodePort, whatever the path: 200 if this node has ready endpoints of it and the proxy is
  healthy, else 503; the number of endpoints is also a header, the weight that some balancers go by;
- on `--healthz-listen`: /healthz, which also fails for a node that is going away, so that balancers leave it in time;
  /livez, which doesn't.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from fimbria.compute.service_frontends import families
from fimbria.model.service import Service, ServiceKey
from fimbria.small_http import Reply, SmallServer, listen_address
from fimbria.tables.table import Table

log = logging.getLogger(__name__)
RETRY: Final = 5.0
LATE: Final = 60.0  # seconds that a change may wait to be written until the proxy counts as unhealthy
KEPT: Final = 0.1  # seconds that a count of endpoints is good for: many may ask at once
ANY: Final = {True: "0.0.0.0", False: "::"}  # noqa: S104 they are for clients outside, as kube-proxy's are
JSON: Final = {"Content-Type": "application/json", "X-Content-Type-Options": "nosniff"}


@dataclass(slots=True)
class Freshness:
    """Whether what is wanted gets written. `progress()` is anything that changes with each pass; `pending()` says
    whether something waits."""

    progress: Callable[[], object]
    pending: Callable[[], bool]
    ready: Callable[[], bool]
    late: float = LATE
    updated: float = field(default_factory=time.time)
    """When everything was written last, or a pass went by; seconds since the epoch."""
    _seen: object = None
    _since: float = field(default_factory=time.monotonic)

    def look(self) -> None:
        """Take note of where things are."""
        seen = self.progress()
        if seen != self._seen or not self.pending():
            self._seen, self._since, self.updated = seen, time.monotonic(), time.time()

    def healthy(self) -> bool:
        """Ready, and nothing has waited for longer than `late`."""
        self.look()
        return self.ready() and time.monotonic() - self._since < self.late


@dataclass(slots=True)
class HealthChecks:
    """Serves both kinds of questions. `local_ready(service, v4)` counts ready endpoints of this node in a family: that
    of the question, if the Service has it. `eligible()` says whether the node stays, `listen` is
    HOST:PORT for /healthz, empty for none; 0.0.0.0 means IPv6 as well."""

    services: Table[Any, Service]
    local_ready: Callable[[ServiceKey, bool], int]
    freshness: Freshness
    eligible: Callable[[], bool]
    listen: str
    problems: dict[str, str] = field(default_factory=dict)
    """What can't be served, by what it is for."""
    _asked: dict[int, ServiceKey] = field(default_factory=dict)
    _wanted: dict[ServiceKey, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    _counts: dict[tuple[ServiceKey, bool], tuple[float, int]] = field(default_factory=dict)
    _ports: SmallServer = field(init=False)
    _own: SmallServer = field(init=False)

    def __post_init__(self) -> None:
        self._ports = SmallServer(self._about_service)
        self._own = SmallServer(self._about_node)

    async def run(self) -> None:
        """Follow the Services until cancelled."""
        subscription = self.services.subscribe()
        try:
            changed = True
            while True:
                for key in subscription.drain():
                    changed |= self._follow(ServiceKey(*key))
                if changed or self.problems:
                    await self._serve()
                changed = False
                pause = RETRY if self.problems else LATE / 4
                try:
                    async with asyncio.timeout(pause):
                        await subscription.wait()
                except TimeoutError:
                    self.freshness.look()
        finally:
            self._ports.close_all()
            self._own.close_all()

    # --- ports -------------------------------------------------------------------------------------------------------

    def _follow(self, key: ServiceKey) -> bool:
        """A Service changed: do its ports?"""
        service, before = self.services.get(key), self._wanted.pop(key, ())
        now: tuple[tuple[str, int], ...] = ()
        if service is not None and service.health_check_port:
            # Balancers ask at any of a node's addresses, also those of a family that the Service hasn't.
            now = tuple((host, service.health_check_port) for host in ANY.values())
            self._wanted[key] = now
        return now != before

    async def _serve(self) -> None:
        wanted: dict[tuple[str, int], ServiceKey] = {}
        for key, ports in sorted(self._wanted.items()):
            for each in ports:
                wanted.setdefault(each, key)
        self._asked = {port: key for (_, port), key in wanted.items()}
        self._counts.clear()
        found: dict[str, str] = {}
        for host, port in self._ports.listening - wanted.keys():
            self._ports.close(host, port)
        for (host, port), key in wanted.items():
            await self._open(self._ports, host, port, f"health check of Service {key}", found)
        for host, port in _addresses(self.listen):
            await self._open(self._own, host, port, "--healthz-listen", found)
        self.problems = found

    async def _open(self, server: SmallServer, host: str, port: int, purpose: str, found: dict[str, str]) -> None:
        try:
            await server.listen(host, port)
        except OSError as error:
            if host == ANY[False] and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                return  # a node without IPv6
            found[purpose] = f"port {port} can't be opened: {error.strerror or error}"
            if self.problems.get(purpose) != found[purpose]:
                log.warning("%s: %s; tried again every %.0f s", purpose, found[purpose], RETRY)

    # --- answers -----------------------------------------------------------------------------------------------------

    def _about_service(self, host: str, port: int, _path: str) -> Reply:
        key = self._asked.get(port)
        if key is None:
            return Reply(404, b"")
        count, healthy = self._count(key, self._family(key, ":" not in host)), self.freshness.healthy()
        body = {
            "service": {"namespace": key.namespace, "name": key.name},
            "localEndpoints": count,
            "serviceProxyHealthy": healthy,
        }
        headers = {**JSON, "X-Load-Balancing-Endpoint-Weight": str(count)}
        return Reply(200 if count and healthy else 503, json.dumps(body, indent="\t").encode(), headers)

    def _family(self, key: ServiceKey, asked_v4: bool) -> bool:
        service = self.services.get(key)
        served = families(service) if service is not None else ()
        return asked_v4 if asked_v4 in served or not served else served[0]

    def _count(self, key: ServiceKey, v4: bool) -> int:
        now = time.monotonic()
        counted, count = self._counts.get((key, v4), (0.0, 0))
        if now - counted > KEPT:
            count = self.local_ready(key, v4)
            self._counts[key, v4] = now, count
        return count

    def _about_node(self, _host: str, _port: int, path: str) -> Reply:
        if path not in ("/healthz", "/livez"):
            return Reply(404, b"404 page not found\n", {"Content-Type": "text/plain; charset=utf-8"})
        healthy, eligible = self.freshness.healthy(), self.eligible()
        now = time.time()
        updated = _time(now if healthy else self.freshness.updated)
        body: dict[str, Any] = {"lastUpdated": updated, "currentTime": _time(now)}
        if path == "/healthz":
            body["nodeEligible"] = eligible
        each = {"lastUpdated": _time(self.freshness.updated), "healthy": healthy}
        body |= {"healthy": healthy, "status": {"IPv4": each, "IPv6": each}}
        good = healthy and (eligible or path == "/livez")
        return Reply(200 if good else 503, json.dumps(body, separators=(",", ":")).encode(), JSON)


def _time(seconds: float) -> str:
    """RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _addresses(listen: str) -> tuple[tuple[str, int], ...]:
    found = listen_address(listen)
    if found is None:
        return ()
    host, port = found
    return tuple((h, port) for h in (ANY.values() if host in ("", *ANY.values()) else (host,)))
