"""What every kind of policy is turned into: who is selected, and which peers and ports are allowed or denied.

The words are few on purpose: an entity is a selector of reserved labels, an ICMP type is a port range, an empty `from`
is `ANYONE`. Anything a policy says that has no word here is refused by the conversion, not carried along.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Final

from fimbria.model.address import Prefix


class Direction(IntEnum):
    """`enum direction`: as the selected pod sees it."""

    INGRESS = 0
    EGRESS = 1


class Verdict(IntEnum):
    """`enum policy_verdict`."""

    ALLOW = 1
    DENY = 2


class Proto(IntEnum):
    """IP protocols (RFC 790 and the IANA list) that policies can name."""

    ICMP = 1
    TCP = 6
    UDP = 17
    ICMPV6 = 58
    SCTP = 132


class Operator(StrEnum):
    """Label selector operators (meta/v1 LabelSelectorRequirement)."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


_ABSENT: Final = object()


@dataclass(frozen=True, slots=True, order=True)
class Requirement:
    """One condition on labels. `keys` are sourced; several mean "any source" and the first one present counts."""

    keys: tuple[str, ...]
    operator: Operator
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """As Kubernetes does: NotIn also holds for labels that lack the key."""
        value: object = _ABSENT
        for key in self.keys:
            if (value := labels.get(key, _ABSENT)) is not _ABSENT:
                break
        match self.operator:
            case Operator.IN:
                return value in self.values
            case Operator.NOT_IN:
                return value not in self.values
            case Operator.EXISTS:
                return value is not _ABSENT
        return value is _ABSENT

    def __str__(self) -> str:
        key = self.keys[0] if len(self.keys) == 1 else f"any:{self.keys[0].partition(':')[2]}"
        match self.operator:
            case Operator.EXISTS:
                return key
            case Operator.DOES_NOT_EXIST:
                return f"!{key}"
            case Operator.IN if len(self.values) == 1:
                return f"{key}={self.values[0]}"
        return f"{key} {'in' if self.operator is Operator.IN else 'notin'} ({', '.join(self.values)})"


class Selector:
    """All of its requirements hold; none at all selects every label set. Equal ones compare and hash equal, fast."""

    __slots__ = ("_hash", "requirements")

    def __init__(self, requirements: Iterable[Requirement] = ()) -> None:
        self.requirements: tuple[Requirement, ...] = tuple(sorted(set(requirements)))
        self._hash = hash(self.requirements)

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(requirement.matches(labels) for requirement in self.requirements)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Selector) and self._hash == other._hash and self.requirements == other.requirements

    def __repr__(self) -> str:
        return f"Selector({self})"

    def __str__(self) -> str:
        return ", ".join(str(requirement) for requirement in self.requirements) or "everything"


class Anyone:
    """Peer 0: any source or destination whatever."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "ANYONE"


ANYONE: Final = Anyone()


@dataclass(frozen=True, slots=True)
class CidrBlock:
    """Addresses in `prefix` but in none of `excepts`. `any_peer`: also addresses of pods and nodes (NetworkPolicy)."""

    prefix: Prefix
    excepts: tuple[Prefix, ...] = ()
    any_peer: bool = False
    # A policy may name thousands of exceptions, and is asked about every prefix known.
    _holes: dict[int, set[int]] = field(init=False, repr=False, compare=False)
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        holes: dict[int, set[int]] = {}
        for hole in self.excepts:
            holes.setdefault(hole.length, set()).add(_leading(hole.addr, hole.length))
        object.__setattr__(self, "_holes", holes)
        object.__setattr__(self, "_hash", hash((self.prefix, self.excepts, self.any_peer)))

    def __hash__(self) -> int:
        return self._hash

    def covers(self, prefix: Prefix) -> bool:
        """Whether every address of `prefix` is meant. IPv6 blocks never cover IPv4, although ::/0 contains its map."""
        inside = prefix.v4 == self.prefix.v4 and prefix in self.prefix
        return inside and not any(
            length <= prefix.length and _leading(prefix.addr, length) in holes for length, holes in self._holes.items()
        )

    def __str__(self) -> str:
        holes = f" except {', '.join(map(str, self.excepts))}" if self.excepts else ""
        return f"{self.prefix}{holes}"


def _leading(addr: bytes, length: int) -> int:
    return int.from_bytes(addr) >> (128 - length)


Peer = Selector | CidrBlock | Anyone


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """Ports `first`..`last` of a protocol, both included; `proto` None is any protocol and then all ports.

    An ICMP type t is the range t << 8 .. t << 8 | 255, for the datapath keeps the type in the port's high byte.
    """

    proto: int | None = None
    first: int = 0
    last: int = 65535


EVERY_PORT: Final = PortRange()


def icmp_type(proto: Proto, number: int) -> PortRange:
    return PortRange(proto, number << 8, number << 8 | 0xFF)


@dataclass(frozen=True, slots=True, order=True)
class NamedPort:
    """A container port by name: of the selected pod (ingress) or of the peer (egress)."""

    proto: int
    name: str


@dataclass(frozen=True, slots=True, order=True)
class PolicyId:
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Where a rule is written, such as `ingress[0]` or `specs[1].egressDeny[2]`. Rule numbers belong to it."""

    policy: PolicyId
    path: str

    def __str__(self) -> str:
        return f"{self.policy} {self.path}"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: `verdict` for any of `peers` on any of `ports`. No peers or no ports: it says nothing."""

    direction: Direction
    verdict: Verdict
    peers: tuple[Peer, ...]
    ports: tuple[PortRange | NamedPort, ...]
    origin: Origin


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """The rules for the pods that `subject` selects, and the directions in which these are denied by default."""

    subject: Selector
    rules: tuple[Rule, ...]
    default_deny: frozenset[Direction]


@dataclass(frozen=True, slots=True)
class Policy:
    id: PolicyId
    specs: tuple[PolicySpec, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a policy, for its status: a path inside the object, and one sentence."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"
