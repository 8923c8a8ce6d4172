"""Names behind numbers and addresses, asked of the agent in batches and remembered for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import aiohttp

from fimbria.model.address import unpack
from fimbria.model.rows import NO_ADDR, Event

log = logging.getLogger(__name__)
DROP: Final = 1
TTL: Final = 5.0
LIMIT: Final = 65536
Json = dict[str, Any]


class AgentNames:
    """Implements `flow.Names` from a cache that `learn` fills. What the agent doesn't know is asked again later."""

    def __init__(self, agent_socket: Path) -> None:
        self._socket = agent_socket
        self._session: aiohttp.ClientSession | None = None
        self._known: dict[tuple[str, str], tuple[float, Any]] = {}
        self.errors = 0

    async def close(self) -> None:
        """End the connection to the agent."""
        if self._session is not None:
            await self._session.close()

    async def learn(self, events: Iterable[Event]) -> None:
        """Ask for everything in these events that isn't known or was asked long ago. Never raises: names are extra."""
        now = time.monotonic()
        wanted: dict[str, set[str]] = {
            "addrs": set(),
            "identities": set(),
            "rules": set(),
            "services": set(),
            "endpoints": set(),
        }
        for e in events:
            for addr in (e.saddr, e.daddr):
                if addr != NO_ADDR:
                    self._want(wanted, "addrs", unpack(addr), now)
            for kind, number in (
                ("identities", e.source), ("identities", e.destination), ("rules", e.rule),
                ("services", e.service), ("endpoints", e.endpoint),
            ):  # fmt: skip
                if number:
                    self._want(wanted, kind, str(number), now)
            if e.type == DROP and e.endpoint and not e.rule:
                # Which policies made "denied" the default may have changed a moment ago.
                wanted["endpoints"].add(str(e.endpoint))
        if any(wanted.values()):
            await self._ask(wanted, now)

    def _want(self, wanted: dict[str, set[str]], kind: str, key: str, now: float) -> None:
        known = self._known.get((kind, key))
        if known is None or now - known[0] > TTL:
            wanted[kind].add(key)

    async def _ask(self, wanted: dict[str, set[str]], now: float) -> None:
        if self._session is None:
            connector = aiohttp.UnixConnector(str(self._socket))
            self._session = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=5))
        body = {kind: sorted(keys) for kind, keys in wanted.items()}
        try:
            async with self._session.post("http://agent/v1/resolve", json=body) as response:
                answer = await response.json()
        except (OSError, aiohttp.ClientError, TimeoutError, ValueError) as error:
            self.errors += 1
            log.debug("the agent does not answer: %s", error)
            return
        if len(self._known) > LIMIT:
            self._known.clear()
        for kind, found in answer.items():
            for key, value in found.items() if isinstance(found, dict) else ():
                old = self._known.get((kind, key))
                # A rule or pod that is gone keeps its name for the events that still speak of it.
                self._known[kind, key] = (now, value if value or old is None else old[1])

    def _get(self, kind: str, key: str) -> Any:
        known = self._known.get((kind, key))
        return known[1] if known else None

    def addr(self, addr: bytes) -> Json | None:
        """See Names."""
        found: Json | None = self._get("addrs", unpack(addr))
        return found

    def identity(self, number: int) -> list[str]:
        """See Names."""
        return list(self._get("identities", str(number)) or ())

    def rule(self, number: int) -> Json | None:
        """See Names."""
        found: Json | None = self._get("rules", str(number))
        return found

    def service(self, number: int) -> Json | None:
        """See Names."""
        found: Json | None = self._get("services", str(number))
        return found

    def endpoint(self, number: int) -> Json | None:
        """See Names."""
        found: Json | None = self._get("endpoints", str(number))
        return found
