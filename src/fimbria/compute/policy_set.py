"""One policy set: all entries for the endpoints that are selected by the same rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from fimbria.compute.policy_shapes import (
    NO_PORTS,
    PREFIX_ANY_PROTO,
    Cell,
    CompiledRule,
    Ports,
    Shape,
    compile_ports,
    merge,
    named_cells,
)
from fimbria.model.policy import (
    ANYONE,
    Anyone,
    CidrBlock,
    Direction,
    NamedPort,
    Origin,
    Peer,
    PolicyId,
    PolicySpec,
    PortRange,
    Rule,
    Selector,
    Verdict,
)
from fimbria.model.rows import PolicyEntry, PolicyKey

ENFORCE: Final = {Direction.INGRESS: 1 << 1, Direction.EGRESS: 1 << 2}  # enum endpoint_flag
CIDR: Final = {Direction.INGRESS: 1 << 3, Direction.EGRESS: 1 << 4}

# Named ports belong to containers: "anyone" with a named port on the way out means every identity that has such a port.
EVERY_IDENTITY: Final = Selector()
ANY_PEER: Final = 0

UnitId = tuple[PolicyId, int]  # a policy and which of its specs


@dataclass(frozen=True, slots=True, order=True)
class SetKey:
    """What a set is made of: the specs that select its endpoints, and the container ports that these specs name."""

    units: tuple[UnitId, ...]
    ports: tuple[tuple[str, int, int], ...] = ()

    def __str__(self) -> str:
        ports = (
            f" with {', '.join(f'{name}={number}/{proto}' for name, proto, number in self.ports)}" if self.ports else ""
        )
        return " + ".join(f"{policy}#{index}" if index else str(policy) for policy, index in self.units) + ports


@dataclass(frozen=True, slots=True)
class Unit:
    """A spec whose rules have numbers; `by_peer` says which rules speak about each peer of theirs."""

    default_deny: frozenset[Direction]
    by_peer: tuple[tuple[Peer, CompiledRule], ...]
    local_names: frozenset[tuple[str, int]]
    directions: frozenset[Direction]  # those in which anything is denied, by default or by a rule


def compile_unit(spec: PolicySpec, rule_id: Callable[[Origin], int]) -> Unit:
    """Numbers are asked for each rule, in order; equal specs give equal units."""
    by_peer: list[tuple[Peer, CompiledRule]] = []
    names: set[tuple[str, int]] = set()
    denying = set(spec.default_deny)
    for rule in spec.rules:
        compiled = _compile(rule, rule_id(rule.origin))
        if rule.direction is Direction.INGRESS:
            names |= {(port.name, port.proto) for port in compiled.named}
        if rule.verdict is Verdict.DENY:
            denying.add(rule.direction)
        for peer in dict.fromkeys(rule.peers):
            by_peer += _for_peer(peer, compiled)
    return Unit(spec.default_deny, tuple(by_peer), frozenset(names), frozenset(denying))


def _compile(rule: Rule, number: int) -> CompiledRule:
    ranges = [port for port in rule.ports if isinstance(port, PortRange)]
    named = tuple(port for port in rule.ports if isinstance(port, NamedPort))
    return CompiledRule(rule.direction, rule.verdict, number, rule.origin, compile_ports(rule.direction, ranges), named)


def _for_peer(peer: Peer, rule: CompiledRule) -> Iterator[tuple[Peer, CompiledRule]]:
    if rule.direction is Direction.INGRESS or not rule.named or isinstance(peer, Selector):
        yield peer, rule
        return
    unnamed = replace(rule, named=())
    if isinstance(peer, Anyone):
        yield EVERY_IDENTITY, replace(rule, cells=())
        yield peer, unnamed
    elif rule.verdict is Verdict.DENY:
        # What a name means outside the cluster can't be known: a deny denies all that it could mean.
        yield peer, replace(unnamed, cells=(_every_port(rule.direction),))
    else:
        yield peer, unnamed


def _every_port(direction: Direction) -> Cell:
    return Cell(PREFIX_ANY_PROTO, int(direction), 0, 0)


class PolicySet:
    """Entries by peer number (0: any). Changed only by the engine; `entries` is what the kernel's map must contain."""

    __slots__ = ("_any", "_index", "_memo", "_needs_ports", "_spoken", "flags", "key", "shapes")

    def __init__(self, key: SetKey) -> None:
        self.key = key
        self.flags = 0
        self.shapes: dict[int, Shape] = {}
        self._load((), 0)

    def load(self, units: Iterable[Unit]) -> None:
        """Take over the rules; the shapes are the caller's to rebuild."""
        units = tuple(units)
        ports = frozenset(self.key.ports)
        rules = [(peer, _resolve(rule, ports)) for unit in units for peer, rule in unit.by_peer]
        flags = 0
        for direction in Direction:
            if any(direction in unit.directions for unit in units):
                flags |= ENFORCE[direction]
                if not any(direction in unit.default_deny for unit in units):
                    rules.append((ANYONE, _default_allow(direction)))
            if any(isinstance(peer, CidrBlock) and rule.direction is direction for peer, rule in rules):
                flags |= CIDR[direction]
        self._load(rules, flags)

    def _load(self, rules: Iterable[tuple[Peer, CompiledRule]], flags: int) -> None:
        spoken: dict[Selector | CidrBlock, list[tuple[CompiledRule, bool]]] = {}
        self._any: list[tuple[CompiledRule, bool]] = []
        for peer, rule in rules:
            if isinstance(peer, Anyone):
                self._any.append((rule, False))
            else:
                any_peer = isinstance(peer, CidrBlock) and peer.any_peer
                spoken.setdefault(peer, []).append((rule, any_peer))
        self._spoken = list(spoken.values())
        self._index: dict[Selector | CidrBlock, int] = {peer: n for n, peer in enumerate(spoken)}
        self._needs_ports = any(
            rule.named and rule.direction is Direction.EGRESS for rules in self._spoken for rule, _ in rules
        )
        self._memo: dict[tuple[tuple[int, ...], Ports], Shape] = {}
        self.flags = flags

    @property
    def peers(self) -> Iterable[Selector | CidrBlock]:
        """Whom the rules speak about, besides anyone."""
        return self._index.keys()

    def speaks_of(self, peer: Selector | CidrBlock) -> bool:
        return peer in self._index

    def anyone(self) -> Shape:
        """Entries of peer 0."""
        return merge(self._any)

    def shape(self, matching: Iterable[Selector | CidrBlock], ports: Ports) -> Shape:
        """Entries for a peer that these selectors and blocks match (others than the set's own are passed over)."""
        index = self._index
        which = tuple(sorted([index[peer] for peer in matching if peer in index]))
        return self.shape_at(which, ports)

    def shape_at(self, which: tuple[int, ...], ports: Ports) -> Shape:
        """The same by ascending positions in `peers`."""
        key = which, (ports if self._needs_ports else NO_PORTS)
        shape = self._memo.get(key)
        if shape is None:
            shape = self._memo[key] = merge([spoken for n in which for spoken in self._spoken[n]], key[1])
        return shape

    def entries(self) -> dict[PolicyKey, PolicyEntry]:
        """The whole map."""
        rows: dict[int, list[tuple[Cell, PolicyEntry]]] = {}  # by shape, which many peers share
        entries = {}
        for peer, shape in self.shapes.items():
            if id(shape) not in rows:
                rows[id(shape)] = [(cell, PolicyEntry(*entry)) for cell, entry in shape.items()]
            for cell, row in rows[id(shape)]:
                entries[PolicyKey(cell.prefixlen, peer, cell.direction, cell.proto, cell.port)] = row
        return entries

    def __len__(self) -> int:
        return sum(map(len, self.shapes.values()))


def _resolve(rule: CompiledRule, ports: Ports) -> CompiledRule:
    """Ingress rules name ports of the set's own endpoints."""
    if not rule.named or rule.direction is not Direction.INGRESS:
        return rule
    cells = {*rule.cells, *named_cells(rule.direction, rule.named, ports)}
    return replace(rule, cells=tuple(sorted(cells)), named=())


def _default_allow(direction: Direction) -> CompiledRule:
    """Rules that deny but don't make denied the default leave everything else allowed."""
    return CompiledRule(direction, Verdict.ALLOW, 0, None, (_every_port(direction),), ())
