"""From the rules that speak about one peer to the entries of that peer: ports to prefixes, deny over allow.

The datapath asks each peer's longest matching prefix of (protocol, port) and nothing else, so everything that the rules
say about a prefix must stand in that one entry:

- Denied beats allowed, in the same entry and in every longer one. An allow below a deny is left out.
- An entry of a CIDR may speak about the world's addresses only, or (`CIDR_ANY_PEER`) about pods and nodes as well.
  That flag always means *allowed* for them, whatever the verdict is for the world, because only NetworkPolicy speaks
  about any peer and it cannot deny. So an allow for any peer below or beside a deny for the world becomes a deny with
  the flag, and an allow for the world below an allow for any peer gets the flag.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from fimbria.model.policy import Direction, NamedPort, Origin, PortRange, Verdict

PREFIX_ANY_PROTO: Final = 40
PREFIX_ANY_PORT: Final = 48
PREFIX_FULL: Final = 64
CIDR_ANY_PEER: Final = 1
PORT_BITS: Final = 16
ALLOW: Final = int(Verdict.ALLOW)
DENY: Final = int(Verdict.DENY)

Ports = frozenset[tuple[str, int, int]]  # container ports: name, protocol, number
NO_PORTS: Final[Ports] = frozenset()


class Cell(NamedTuple):
    """`struct policy_key` without the peer."""

    prefixlen: int
    direction: int
    proto: int
    port: int


class Entry(NamedTuple):
    """`struct policy_entry`."""

    verdict: int
    flags: int
    rule: int


Shape = dict[Cell, Entry]  # all entries of one peer; shared by all peers about whom the same rules speak


@dataclass(frozen=True, slots=True)
class CompiledRule:
    """A rule without its peers. `origin` orders rules, so that which of two equal ones is named is no accident."""

    direction: Direction
    verdict: Verdict
    rule: int
    origin: Origin | None
    cells: tuple[Cell, ...]
    named: tuple[NamedPort, ...]

    @property
    def order(self) -> tuple[bool, Origin | None]:
        return self.origin is None, self.origin


def compile_ports(direction: Direction, ports: Iterable[PortRange]) -> tuple[Cell, ...]:
    """The fewest prefixes for each range."""
    return tuple(sorted({cell for ports_ in ports for cell in _cells(int(direction), ports_)}))


def _cells(direction: int, ports: PortRange) -> Iterator[Cell]:
    if ports.proto is None:
        yield Cell(PREFIX_ANY_PROTO, direction, 0, 0)
        return
    first = ports.first
    while first <= ports.last:
        # The largest aligned block that starts here and doesn't reach beyond the end.
        size = min(first & -first or 1 << PORT_BITS, 1 << ((ports.last - first + 1).bit_length() - 1))
        yield Cell(PREFIX_FULL - size.bit_length() + 1, direction, int(ports.proto), first)
        first += size


def named_cells(direction: Direction, named: Iterable[NamedPort], ports: Ports) -> Iterator[Cell]:
    """Cells of the container ports that go by one of the names."""
    wanted = {(port.name, port.proto) for port in named}
    for name, proto, number in ports:
        if (name, proto) in wanted:
            yield Cell(PREFIX_FULL, int(direction), proto, number)


def merge(spoken: Iterable[tuple[CompiledRule, bool]], ports: Ports = NO_PORTS) -> Shape:
    """The entries for one peer about whom these rules speak; the boolean: also for pods and nodes (`any_peer`).

    `ports` are the peer's container ports, for rules that name a port on the way out.
    """
    denied: dict[Cell, int] = {}
    allowed: dict[Cell, tuple[int, bool]] = {}  # rule, any peer
    for rule, any_peer in sorted(spoken, key=lambda item: item[0].order):
        named = named_cells(rule.direction, rule.named, ports) if rule.named else ()
        for cell in (*rule.cells, *named):
            if rule.verdict is Verdict.DENY:
                denied.setdefault(cell, rule.rule)
            elif cell not in allowed or (any_peer and not allowed[cell][1]):
                allowed[cell] = (allowed[cell][0] if cell in allowed else rule.rule), any_peer
    if not denied and not any(any_peer for _, any_peer in allowed.values()):
        return {cell: Entry(ALLOW, 0, rule) for cell, (rule, _) in allowed.items()}
    return _combine(denied, allowed)


def _combine(denied: dict[Cell, int], allowed: dict[Cell, tuple[int, bool]]) -> Shape:
    shape: Shape = {}
    for cell in denied.keys() | allowed.keys():
        above = [cell, *wider(cell)]
        rule_of_deny = next((denied[c] for c in above if c in denied), None)
        flag = CIDR_ANY_PEER if any(c in allowed and allowed[c][1] for c in above) else 0
        if rule_of_deny is None:
            shape[cell] = Entry(ALLOW, flag, allowed[cell][0])
        elif cell in denied or (allowed[cell][1] and flag):
            shape[cell] = Entry(DENY, flag, rule_of_deny)
    return shape


def wider(cell: Cell) -> Iterator[Cell]:
    """The shorter prefixes that contain a cell, longest first."""
    prefixlen, direction, proto, port = cell
    for length in range(prefixlen - 1, PREFIX_ANY_PORT - 1, -1):
        yield Cell(length, direction, proto, port >> (PREFIX_FULL - length) << (PREFIX_FULL - length))
    if prefixlen > PREFIX_ANY_PROTO:
        yield Cell(PREFIX_ANY_PROTO, direction, 0, 0)
