"""Who has which frontend, where several claim it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from fimbria.compute.service_frontends import UNSPECIFIED
from fimbria.compute.service_rows import BackendKey
from fimbria.model.address import is_v4, unpack
from fimbria.model.protocol import protocol_name
from fimbria.model.rows import FrontendKey

REDIRECT: Final = 0
SERVICE: Final = 1
HOST_PORT: Final = 2
LOCAL_REDIRECT: Final = "local redirect"
"""The kind of owner that redirects: of a Service with rank REDIRECT, of an address with rank HOST_PORT."""
API_SERVER: Final = 1
"""How far the API servers' own addresses are trusted: cluster IPs (0) alone go before them."""


class Owner(NamedTuple):
    """Who claims frontends. Of several the lowest wins: `rank` is REDIRECT, SERVICE or HOST_PORT; `kind` is for people
    ("service", "pod", ...)."""

    rank: int
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Extra:
    """Frontends that lead to given backends: a pod's hostPort, a local redirect.

    `frontends` are of SCOPE_ALL and of one family and protocol, as are the backends (address, port, protocol); they
    share a service id. `flags`: enum frontend_flag (HOST_PORT, EXEMPT, ...), for each of them. Without backends they
    refuse: to leave a frontend to the next in line, don't name it.
    """

    frontends: tuple[FrontendKey, ...]
    backends: tuple[BackendKey, ...]
    flags: int
    port_name: str = ""


class Claims:
    """Frontends (of SCOPE_ALL) with their holders, and those who wait for them.

    A claim's `trust` says how far who makes it was given the address: 0 if the API server allocated it. Less trusted
    claims (higher numbers) lose to others of their rank, whatever their names: whoever may create a Service may write
    any external IP into it.
    """

    def __init__(self) -> None:
        self._holders: dict[FrontendKey, Owner] = {}
        self._waiting: dict[FrontendKey, list[Owner]] = {}
        self._trusts: dict[tuple[FrontendKey, Owner], int] = {}

    def holder(self, frontend: FrontendKey) -> Owner | None:
        """Who has a frontend."""
        return self._holders.get(frontend)

    def lost(self, owner: Owner, frontends: Iterable[FrontendKey]) -> Iterator[str]:
        """Which of its frontends an owner doesn't have, a sentence each. That a redirect takes them is no loss."""
        for frontend in frontends:
            winner = self._holders[frontend]
            if winner != owner and (winner.rank != REDIRECT or owner.rank == REDIRECT):
                yield f"{_named(frontend)} already belongs to {winner}"

    def _order(self, frontend: FrontendKey, owner: Owner) -> tuple[int, int, Owner]:
        return owner.rank, self._trusts.get((frontend, owner), 0), owner

    def claim(self, frontend: FrontendKey, owner: Owner, trust: int = 0) -> Owner | None:
        """Returns who lost it."""
        if trust:
            self._trusts[frontend, owner] = trust
        holder = self._holders.get(frontend)
        if holder is None:
            self._holders[frontend] = owner
            return None
        if self._order(frontend, holder) < self._order(frontend, owner):
            self._waiting.setdefault(frontend, []).append(owner)
            return None
        self._waiting.setdefault(frontend, []).append(holder)
        self._holders[frontend] = owner
        return holder

    def unclaim(self, frontend: FrontendKey, owner: Owner) -> Owner | None:
        """Returns who has it now, if that has changed."""
        waiting = self._waiting.get(frontend)
        self._trusts.pop((frontend, owner), None)
        if self._holders[frontend] != owner:
            assert waiting is not None
            waiting.remove(owner)
            heir = None
        elif waiting:
            heir = self._holders[frontend] = min(waiting, key=lambda each: self._order(frontend, each))
            waiting.remove(heir)
        else:
            del self._holders[frontend]
            return None
        if not waiting:
            del self._waiting[frontend]
        return heir


def _named(frontend: FrontendKey) -> str:
    if frontend.addr in UNSPECIFIED.values():
        family = "IPv4" if is_v4(frontend.addr) else "IPv6"
        return f"port {frontend.port}/{protocol_name(frontend.proto)} of the nodes ({family})"
    return f"port {frontend.port} of {unpack(frontend.addr)}"
