"""Which named ports the pods of each identity have, for egress rules that name ports.

Rules
1. An identity has a port while at least one of its pods has it: counted, so that a pod costs its own ports and not
   those of all other pods of its identity (which may be thousands).
2. Sets are made once for all changes of a step, and only of identities that gained or lost a port.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field

from fimbria.compute.policy_shapes import NO_PORTS, Ports
from fimbria.model.endpoint import NamedPort

Port = tuple[str, int, int]


@dataclass(slots=True)
class IdentityPorts:
    """Incremental: `put` says what one pod contributes, `changes` what came of all that."""

    _said: dict[Hashable, tuple[int, tuple[NamedPort, ...]]] = field(default_factory=dict)
    _counts: dict[int, dict[Port, int]] = field(default_factory=dict)
    _changed: set[int] = field(default_factory=set)

    def put(self, source: Hashable, identity: int, ports: tuple[NamedPort, ...]) -> None:
        """A pod has this identity and these ports now; identity 0 or no ports: it contributes nothing."""
        new = (identity, ports) if identity and ports else None
        old = self._said.get(source)
        if new == old:
            return
        if new is not None:
            self._said[source] = new
            self._add(identity, ports)
        else:
            del self._said[source]
        if old is not None:
            self._take(*old)

    def changes(self) -> Iterator[tuple[int, Ports]]:
        """The identities that gained or lost a port since the last call, with all ports that they have."""
        changed, self._changed = self._changed, set()
        for identity in changed:
            yield identity, frozenset(self._counts.get(identity, NO_PORTS))

    def _add(self, identity: int, ports: Iterable[NamedPort]) -> None:
        counts = self._counts.setdefault(identity, {})
        for port in ports_of(ports):
            counts[port] = counts.get(port, 0) + 1
            if counts[port] == 1:
                self._changed.add(identity)

    def _take(self, identity: int, ports: Iterable[NamedPort]) -> None:
        counts = self._counts[identity]
        for port in ports_of(ports):
            counts[port] -= 1
            if not counts[port]:
                del counts[port]
                self._changed.add(identity)
        if not counts:
            del self._counts[identity]


def ports_of(ports: Iterable[NamedPort]) -> Ports:
    """Named ports in the policy compiler's form."""
    return frozenset((p.name, p.proto, p.port) for p in ports)
