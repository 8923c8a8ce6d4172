"""Maglev tables: which backend each hash of a connection goes to, the same on every node without a word between them.

The construction is that of Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
section 3.4. Each member has a permutation of the table's entries, from two hashes of its address, port and protocol.
Members take turns, and each turn takes the first entry of the member's permutation that nobody has. So members get
equal shares, and when one comes or goes the others' entries mostly stay.

Rules
1. A member's turns come in proportion to its weight: turn k in round floor((k + 1/2) * heaviest / weight), so the
   heaviest has one in each round. Within a round those whose last turn is longer ago come first.
2. Members are sorted first: the order in which they are given means nothing.
3. Weight 0 takes no entries. A member whose share is less than half an entry may get none: the table should have a
   hundred entries a member (section 5.3 of the paper).

This is the reference. `fimbria.kernel.maglev.fill` is the same in C, some hundred times faster; a test compares them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

# The usual primes, each the largest below a power of two. A prime, because then every step walks the whole table.
TABLE_SIZES: Final = (251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071)
DEFAULT_SIZE: Final = 16381

_WORD: Final = (1 << 64) - 1
_SEEDS: Final = (0x66696D62726961, 0x6D61676C6576)
_KEY: Final = struct.Struct(">QQI")


class TableMember(NamedTuple):
    """Who shares a table: a backend's number, its weight, and what its permutation is computed from."""

    backend: int
    weight: int
    addr: bytes
    port: int
    proto: int


def in_order(members: Iterable[TableMember]) -> list[TableMember]:
    """The order that decides who comes first in the first round."""
    return sorted(members, key=lambda m: (m.addr, m.port, m.proto))


def fill(members: Iterable[TableMember], size: int) -> list[int]:
    """A backend id for each of `size` entries; all 0 if nobody has a weight. `size` must be prime."""
    turns = [m for m in in_order(members) if m.weight]
    table = [0] * size
    heaviest = max((m.weight for m in turns), default=0)
    places = [_permutation(m, size) for m in turns]
    taken = [0] * len(turns)
    rounds: dict[int, list[int]] = {}
    for who, member in enumerate(turns):
        rounds.setdefault(_round(0, heaviest, member.weight), []).append(who)
    left = size if turns else 0
    for now in range(size):
        for who in rounds.pop(now, ()):
            if not left:
                return table
            at, step = places[who]
            while table[at]:
                at = (at + step) % size
            table[at] = turns[who].backend
            places[who] = ((at + step) % size, step)
            left -= 1
            taken[who] += 1
            rounds.setdefault(_round(taken[who], heaviest, turns[who].weight), []).append(who)
    return table


def moved(before: Sequence[int], after: Sequence[int], backends: Iterable[int]) -> float:
    """The part of the entries of `backends` in `before` that go elsewhere in `after`."""
    theirs = set(backends)
    kept = [(old, new) for old, new in zip(before, after, strict=True) if old in theirs]
    return sum(old != new for old, new in kept) / max(len(kept), 1)


def _round(turn: int, heaviest: int, weight: int) -> int:
    return (2 * turn + 1) * heaviest // (2 * weight)


def _permutation(member: TableMember, size: int) -> tuple[int, int]:
    """The first entry, and the step to the next one."""
    first, second = (_hash(seed, member) for seed in _SEEDS)
    return first % size, second % (size - 1) + 1


def _hash(seed: int, member: TableMember) -> int:
    value = seed
    for word in _KEY.unpack(member.addr + struct.pack(">HH", member.port, member.proto)):
        value = _mix(value ^ word)
    return value


def _mix(value: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31
