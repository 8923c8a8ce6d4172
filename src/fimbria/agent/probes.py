"""What kubelet asks an agent, on a port of its own (`--probe-listen`).

/livez    200 while the process works: it answers, and once it has started it goes on comparing with the kernel.
/readyz   200 while the node forwards: everything was seen once, programs, devices, routes and kernel settings are as
          they should be, and the runtime uses our CNI configuration. A line for each, as in the API server's readyz.

Neither depends on the API server: a node without it forwards, and starting its agent again would not help.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fimbria.agent.install import config_problem
from fimbria.small_http import Reply, SmallServer, listen_address

if TYPE_CHECKING:
    from fimbria.agent.main import Agent

TEXT: Final = {"Content-Type": "text/plain; charset=utf-8"}
# Without these nobody on the node is reached. A row of another target concerns one pod, one Service or one policy.
FORWARDING: Final = ("sysctls", "device_links", "xdp_links", "socket_links", "routes")
STUCK: Final = 10  # intervals without a comparison
STUCK_AT_LEAST: Final = 300.0  # seconds


@dataclass(slots=True)
class Probes:
    """Serves one agent's probes; without `--probe-listen` it does nothing."""

    agent: Agent
    _audits: int = -1
    _audited: float = field(default_factory=time.monotonic)

    async def run(self) -> None:
        """Until cancelled. Raises OSError if the port can't be had."""
        listen = listen_address(self.agent.config.probe_listen)
        if listen is None:
            return
        server = SmallServer(self.answer)
        try:
            await server.listen(*listen)
            await asyncio.Event().wait()
        finally:
            server.close_all()

    def answer(self, _host: str, _port: int, path: str) -> Reply:
        """The reply to one request."""
        if path == "/livez":
            return _reply({"loop": self.stuck()})
        if path == "/readyz":
            return _reply(dict(self.checks()))
        return Reply(404, b"404 Not Found\n", TEXT)

    def stuck(self) -> str:
        """Why the process counts as dead, "" if it doesn't."""
        audits, now = self.agent.loop.stats.audits, time.monotonic()
        if audits != self._audits or not self.agent.ready.is_set():
            self._audits, self._audited = audits, now
        late = max(STUCK * self.agent.config.audit_interval, STUCK_AT_LEAST)
        silent = now - self._audited
        return f"nothing was compared with the kernel for {silent:.0f} s" if silent > late else ""

    def checks(self) -> Iterator[tuple[str, str]]:
        """Name and problem ("" for none) of everything that must be well for a node to forward."""
        agent = self.agent
        missing = [i.resource.plural for i in agent.sources.informers if not i.table.synced]
        yield "sources", f"not seen yet: {', '.join(missing)}" if missing else ""
        yield "start", "" if agent.ready.is_set() else "the kernel isn't what it should be yet"
        failures = agent.loop.failures()
        for name in FORWARDING:
            failed = failures.get(name, {})
            yield name, "; ".join(sorted(map(str, failed.values()))[:3])
        config = agent.config
        if config.cni_conf_dir:
            yield "cni", config_problem(Path(config.cni_conf_dir), exclusive=config.cni_exclusive)


def _reply(checks: dict[str, str]) -> Reply:
    lines = [f"[-]{name} failed: {problem}" if problem else f"[+]{name} ok" for name, problem in checks.items()]
    well = not any(checks.values())
    return Reply(200 if well else 503, ("\n".join(lines) + "\n").encode(), TEXT)
