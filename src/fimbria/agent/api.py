"""The agent's local HTTP interface on `agent.sock` (0600): what it knows, wants and would change. Read-only JSON.

GET  /v1/status                         one object; "ready", "problems", "failures"
GET  /v1/nodes endpoints identities ipcache services policies      lists of objects
GET  /v1/endpoints/ID, /v1/ipcache/ADDRESS, /v1/policies/KIND/NAMESPACE/NAME, /v1/services/NAMESPACE/NAME
                                       one object with what is behind it
                                         (NAMESPACE "-" for cluster-wide policies)
GET  /v1/maps, /v1/maps/NAME            what the kernel's maps are and hold (read back, not remembered);
                                         ?most=N: as many rows as that
GET  /v1/plan                           what the agent would change in the kernel now
GET  /v1/metrics                        Prometheus text format
POST /v1/resolve                        {"addrs": [..], "identities": [..], "rules": [..], "services": [..],
                                         "endpoints": [..]} -> the same keys with names, for the observer
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from fimbria.agent import details, views
from fimbria.model.address import Prefix, unpack
from fimbria.small_http import listen_address

if TYPE_CHECKING:
    from fimbria.agent.main import Agent

log = logging.getLogger(__name__)
MAX_RESOLVE: Final = 1 << 20
TABLES: Final = {
    "nodes": views.nodes,
    "endpoints": views.endpoints,
    "identities": views.identities,
    "ipcache": views.ipcache,
    "services": views.services,
    "policies": views.policies,
}


class AgentApi:
    """Serves one agent's state."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def run(self) -> None:
        """Serve until cancelled."""
        app = web.Application(client_max_size=MAX_RESOLVE)
        app.add_routes(
            [
                web.get("/v1/status", self._status),
                web.get("/v1/plan", self._plan),
                web.get("/v1/maps", self._maps),
                web.get("/v1/maps/{name}", self._map),
                web.get("/v1/metrics", self._metrics),
                web.post("/v1/resolve", self._resolve),
                web.get("/v1/endpoints/{id}", self._endpoint),
                web.get("/v1/ipcache/{address}", self._ipcache),
                web.get("/v1/policies/{kind}/{namespace}/{name}", self._policy),
                web.get("/v1/services/{namespace}/{name}", self._service),
                *(web.get(f"/v1/{name}", self._table) for name in TABLES),
            ]
        )
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        path = self._agent.config.run / "agent.sock"
        with suppress(FileNotFoundError):
            path.unlink()
        old = os.umask(0o177)
        try:
            await web.UnixSite(runner, str(path)).start()
        finally:
            os.umask(old)
        metrics = await self._listen_metrics()
        try:
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()
            if metrics is not None:
                await metrics.cleanup()

    async def _listen_metrics(self) -> web.AppRunner | None:
        """Metrics alone are also served over TCP if a setting says so."""
        listen = listen_address(self._agent.config.metrics_listen)
        if listen is None:
            return None
        host, port = listen
        app = web.Application()
        app.add_routes([web.get("/metrics", self._metrics)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, host or None, port).start()
        return runner

    async def _status(self, _request: web.Request) -> web.Response:
        return _json(views.status(self._agent))

    async def _table(self, request: web.Request) -> web.Response:
        return _json(TABLES[request.path.rpartition("/")[2]](self._agent))

    async def _endpoint(self, request: web.Request) -> web.Response:
        number = request.match_info["id"]
        try:
            return _json(details.endpoint(self._agent, int(number)))
        except (ValueError, KeyError):
            return _json({"error": f"there is no endpoint {number!r} on this node"}, status=404)

    async def _ipcache(self, request: web.Request) -> web.Response:
        address = request.match_info["address"]
        try:
            return _json(details.ipcache(self._agent, address))
        except ValueError:
            return _json({"error": f"{address!r} is no IP address"}, status=400)

    async def _policy(self, request: web.Request) -> web.Response:
        kind, namespace, name = (request.match_info[k] for k in ("kind", "namespace", "name"))
        try:
            return _json(details.policy(self._agent, kind, "" if namespace == "-" else namespace, name))
        except KeyError:
            return _json({"error": f"there is no {kind} {namespace}/{name}"}, status=404)

    async def _service(self, request: web.Request) -> web.Response:
        namespace, name = (request.match_info[k] for k in ("namespace", "name"))
        try:
            return _json(details.service(self._agent, namespace, name))
        except KeyError:
            return _json({"error": f"there is no service {namespace}/{name}"}, status=404)

    async def _plan(self, _request: web.Request) -> web.Response:
        changes = await asyncio.to_thread(self._agent.loop.plan)
        return _json([asdict(c) for c in changes])

    async def _maps(self, _request: web.Request) -> web.Response:
        return _json(await asyncio.to_thread(views.maps, self._agent))

    async def _map(self, request: web.Request) -> web.Response:
        name, most = request.match_info["name"], request.query.get("most", "0")
        if not (most.isdecimal() and len(most) < 10):
            return _json({"error": f"most={most}: expected a number"}, status=400)
        try:
            return _json(await asyncio.to_thread(views.map_rows, self._agent, name, int(most)))
        except KeyError:
            known = ", ".join(sorted(self._agent.datapath.maps))
            return _json({"error": f"there is no map {name!r}; there are {known}"}, status=404)

    async def _metrics(self, _request: web.Request) -> web.Response:
        from fimbria.agent.metrics import exposition  # late: an agent nobody asks needn't carry the library

        text = await asyncio.to_thread(exposition, self._agent)
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _resolve(self, request: web.Request) -> web.Response:
        try:
            wanted = await request.json()
            return _json(views.resolve(self._agent, wanted))
        except (ValueError, TypeError, AttributeError) as error:
            return _json({"error": f"the request can't be understood: {error}"}, status=400)


def _json(body: Any, status: int = 200) -> web.Response:
    return web.Response(text=json.dumps(body, default=_plain), content_type="application/json", status=status)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return unpack(value) if len(value) == 16 else value.hex(":")
    if isinstance(value, Prefix):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
