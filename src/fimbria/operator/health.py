"""What probes and Prometheus ask the operator: one port for each, or one for both.

/livez, /healthz   200 as long as the event loop answers and leadership isn't overdue
/readyz            200 once this replica could work at any moment: it leads, or knows who does, and has seen the
                   cluster; the leader also says in it what will go wrong soon
/metrics           Prometheus text format (docs/operations.md)

None of them depends on the API server being there now: starting the operator again wouldn't bring it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from fimbria.small_http import Reply, SmallServer, listen_address

TEXT: Final = {"Content-Type": "text/plain; charset=utf-8"}
PROMETHEUS: Final = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
ALIVE: Final = ("/livez", "/healthz")


@dataclass(slots=True)
class OperatorHealth:
    """Serves until cancelled. `alive()` and `ready()` say what is wrong, `warning()` what will be, "" for nothing."""

    alive: Callable[[], str]
    ready: Callable[[], str]
    metrics: Callable[[], bytes]
    healthz_listen: str
    metrics_listen: str
    warning: Callable[[], str] = str
    _probes: set[tuple[str, int]] = field(default_factory=set)
    _scrapes: set[tuple[str, int]] = field(default_factory=set)

    async def run(self) -> None:
        """Raises OSError if a port can't be had."""
        server = SmallServer(self.answer)
        try:
            for listen, which in ((self.healthz_listen, self._probes), (self.metrics_listen, self._scrapes)):
                found = listen_address(listen)
                if found is not None:
                    which.add(found)
                    await server.listen(*found)
            await asyncio.Event().wait()
        finally:
            server.close_all()

    def answer(self, _host: str, port: int, path: str) -> Reply:
        """The reply to one request on a port."""
        if path in ALIVE and _serves(self._probes, port):
            return _verdict(self.alive())
        if path == "/readyz" and _serves(self._probes, port):
            return _verdict(self.alive() or self.ready(), self.warning())
        if path == "/metrics" and _serves(self._scrapes, port):
            return Reply(200, self.metrics(), PROMETHEUS)
        return Reply(404, b"404 Not Found\n", TEXT)


def _serves(listening: Iterable[tuple[str, int]], port: int) -> bool:
    return any(port == p for _, p in listening)


def _verdict(problem: str, warning: str = "") -> Reply:
    if problem:
        return Reply(503, f"{problem}\n".encode(), TEXT)
    text = f"ok\nwarning: {warning}\n" if warning else "ok\n"
    return Reply(200, text.encode(), TEXT)
