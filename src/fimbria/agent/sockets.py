"""Cuts sockets whose backend their service has lost, after the rows that led there are out of the kernel."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, Metric

from fimbria.kernel import netns
from fimbria.kernel.maps import MapError
from fimbria.learned.sockets import Backend, TranslatedSockets, cut

if TYPE_CHECKING:
    from fimbria.agent.main import Agent

log = logging.getLogger(__name__)


@dataclass(slots=True)
class SocketCutter:
    """For one agent. `wake` is set whenever Services changed."""

    agent: Agent
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    cut: int = 0
    failed: int = 0
    passes: int = 0
    _told: str = ""

    async def run(self) -> None:
        """First all services, since backends may have gone while no agent ran; then those that lose one.

        At first a backend must be nobody's: after an upgrade that could not read the former version's maps, service
        ids in the table mean something else.
        """
        maps, services = self.agent.datapath.maps, self.agent.engine.services
        if "sock_revnat" not in maps:
            return
        sockets = TranslatedSockets(maps["sock_revnat"], self.agent.layouts.btf)
        services.take_losing()
        await self._pass(sockets, None, lambda b: not services.lists(b.addr, b.port))
        while True:
            await self.wake.wait()
            self.wake.clear()
            losing = services.take_losing()
            if losing:
                await self.agent.loop.flush()
                await self._pass(sockets, losing, lambda b: not services.keeps(b.service, b.addr, b.port))

    async def _pass(
        self, sockets: TranslatedSockets, numbers: set[int] | None, is_lost: Callable[[Backend], bool]
    ) -> None:
        try:
            known = await asyncio.to_thread(sockets.of, numbers)
        except MapError as error:
            self._failed(str(error))
            return
        lost = {b: cookies for b, cookies in known.items() if is_lost(b)}
        if not lost:
            return
        paths = [e.netns for e in self.agent.tables.endpoints.values()]
        done = await asyncio.to_thread(cut, lost, namespaces(paths), tcp=self.agent.config.reset_tcp)
        self.passes += 1
        self.cut += done.cut
        if done.cut:
            log.info("%d sockets connected to backends that are gone were cut", done.cut)
        for failure in done.failures:
            self._failed(failure)

    def _failed(self, why: str) -> None:
        self.failed += 1
        if why != self._told:
            log.error("sockets of backends that are gone can't be cut: %s", why)
            self._told = why

    def metrics(self) -> Iterator[Metric]:
        """What was cut."""
        text = "Sockets cut because their service has lost the backend they were connected to"
        yield CounterMetricFamily("fimbria_sockets_cut", text, value=self.cut)
        yield CounterMetricFamily("fimbria_sockets_cut_failures", "Attempts to cut that failed", value=self.failed)


def namespaces(paths: Iterable[str]) -> Iterator[int | None]:
    """This node's own network namespace (None), then descriptors of others; one that is gone is left out."""
    yield None
    for path in paths:
        try:
            with netns.opened(path) as fd:
                yield fd
        except OSError:
            continue
