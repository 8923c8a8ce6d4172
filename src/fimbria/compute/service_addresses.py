"""Rows of whole addresses: those that belong to Services alone, and refuse the ports that no service has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fimbria.compute import service_frontends as front
from fimbria.compute.service_rows import FRONTENDS, Delta
from fimbria.model.rows import Frontend, FrontendKey


class ServiceAddresses:
    """How many services have an address, as cluster IP and as another one. Shares the rows of frontends."""

    def __init__(self, frontends: dict[FrontendKey, Frontend]) -> None:
        self._frontends = frontends
        self._counts: dict[bytes, list[int]] = {}
        self._of_nodes: frozenset[bytes] = frozenset()

    def exchange(self, before: Mapping[bytes, int], after: Mapping[bytes, int], delta: Delta) -> None:
        """A service has other addresses now; each with CLUSTER_IP, if that is what it is."""
        if before == after:
            return
        for addresses, step in ((before, -1), (after, 1)):
            for addr, flags in addresses.items():
                self._counts.setdefault(addr, [0, 0])[0 if flags else 1] += step
        for addr in {**before, **after}:
            if not any(self._counts[addr]):
                del self._counts[addr]
            self._row(addr, delta)

    def set_nodes(self, addrs: Iterable[bytes], delta: Delta) -> None:
        """The addresses of nodes: they belong to those nodes, whatever Services say."""
        now = frozenset(addrs)
        changed, self._of_nodes = now ^ self._of_nodes, now
        for addr in changed & self._counts.keys():
            self._row(addr, delta)

    def _row(self, addr: bytes, delta: Delta) -> None:
        counts = None if addr in self._of_nodes else self._counts.get(addr)
        key = FrontendKey(addr, 0, 0)
        if counts is None:
            if self._frontends.pop(key, None) is not None:
                delta.drop(FRONTENDS, key)
            return
        row = Frontend(0, 0, front.ADDRESS | (0 if counts[1] else front.CLUSTER_IP))
        if self._frontends.get(key) != row:
            self._frontends[key] = row
            delta.put(FRONTENDS, key, row)
