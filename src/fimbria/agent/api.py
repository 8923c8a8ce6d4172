"""The agent's local HTTP interface on `agent.sock` (0600): status, tables, maps, plan. Read-only."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web

from fimbria.model.address import Prefix, unpack

if TYPE_CHECKING:
    from fimbria.agent.main import Agent


class AgentApi:
    """Serves one agent's state."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def run(self) -> None:
        """Serve until cancelled."""
        app = web.Application()
        app.add_routes([web.get("/v1/status", self._status), web.get("/v1/plan", self._plan)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        path = self._agent.config.run / "agent.sock"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            path.unlink()
        old = os.umask(0o177)
        try:
            await web.UnixSite(runner, str(path)).start()
        finally:
            os.umask(old)
        try:
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    async def _status(self, _request: web.Request) -> web.Response:
        agent = self._agent
        body = {
            "node": agent.config.node_name,
            "ready": bool(agent.ready_after),
            "ready_after_seconds": round(agent.ready_after, 3),
            "routing": agent.config.routing,
            "attach": agent.attach,
            "endpoints": len(agent.tables.endpoints),
            "failures": {k: [str(r) for r in v.values()] for k, v in agent.loop.failures().items()},
        }
        return _json(body)

    async def _plan(self, _request: web.Request) -> web.Response:
        changes = await asyncio.to_thread(self._agent.loop.plan)
        return _json([asdict(c) for c in changes])


def _json(body: Any) -> web.Response:
    return web.Response(text=json.dumps(body, default=_plain), content_type="application/json")


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return unpack(value) if len(value) == 16 else value.hex(":")
    if isinstance(value, Prefix):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)
