"""Who has which port of the node (hostPort): each port of an address and protocol leads to one pod."""

from __future__ import annotations

from collections.abc import Sequence

from fimbria.model.address import is_v4
from fimbria.model.endpoint import HostPort


class HostPortTaken(Exception):
    """A port is taken; the text says which, and by whom. `owner` is empty if the pod itself asks for it twice."""

    def __init__(self, text: str, owner: str = "") -> None:
        super().__init__(f"{text} {owner}" if owner else text)
        self.text = text
        self.owner = owner


class HostPorts:
    """Claims by owner. Synchronous and pure."""

    __slots__ = ("_claims", "_owners")

    def __init__(self) -> None:
        self._claims: dict[tuple[int, int], list[tuple[bytes, str]]] = {}
        self._owners: dict[str, tuple[HostPort, ...]] = {}

    @property
    def owners(self) -> frozenset[str]:
        """Who has any."""
        return frozenset(self._owners)

    def claim(self, owner: str, ports: Sequence[HostPort]) -> None:
        """Take all of them in the place of what the owner had. Raises HostPortTaken, and changes nothing then."""
        for at, port in enumerate(ports):
            for ip, other in self._claims.get((port.proto, port.port), ()):
                if other != owner and _overlap(ip, port.host_ip):
                    raise HostPortTaken(f"{port} belongs to", other)
            for mine in ports[:at]:
                same = (mine.proto, mine.port) == (port.proto, port.port) and _overlap(mine.host_ip, port.host_ip)
                if same and mine.container_port != port.container_port:
                    raise HostPortTaken(f"{port} would lead to two ports, {mine.container_port} as well")
        self.release(owner)
        if ports:
            self._owners[owner] = tuple(ports)
        for port in ports:
            self._claims.setdefault((port.proto, port.port), []).append((port.host_ip, owner))

    def release(self, owner: str) -> None:
        """Give back what an owner has."""
        for cell in {(port.proto, port.port) for port in self._owners.pop(owner, ())}:
            left = [claim for claim in self._claims.pop(cell) if claim[1] != owner]
            if left:
                self._claims[cell] = left


def _overlap(one: bytes, other: bytes) -> bool:
    return one == other or _covers(one, other) or _covers(other, one)


def _covers(wide: bytes, addr: bytes) -> bool:
    """Whether `wide` means every address, of `addr`'s family at least."""
    return not wide or (HostPort.is_any(wide) and (not addr or is_v4(addr) == is_v4(wide)))
