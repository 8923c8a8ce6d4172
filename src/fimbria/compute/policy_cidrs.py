"""Which of the prefixes that policies name each CIDR block covers, kept up to date.

An address belongs to its longest known prefix and to no other. So a rule for 10.0.0.0/8 except 10.1.0.0/16 needs an
entry for every known prefix inside the first and outside the second, and a new prefix anywhere inside touches it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Set
from typing import Final

from fimbria.model.address import V4_MAPPED, V4_PREFIX, Prefix
from fimbria.model.policy import CidrBlock

ALL_V4: Final = Prefix(V4_MAPPED + bytes(4), V4_PREFIX)


class CidrIndex:
    """Blocks in use, each as often as somebody uses it, and the prefixes that they name.

    Where an IPv6 prefix contains the IPv4-mapped range (::/0 does), 0.0.0.0/0 is known as well: otherwise the
    datapath's longest match would find the IPv6 prefix for IPv4 addresses.
    """

    __slots__ = ("_blocks", "_by_prefix", "_lengths", "_named", "_sorted")

    def __init__(self) -> None:
        self._blocks: dict[CidrBlock, int] = {}
        self._by_prefix: dict[Prefix, set[CidrBlock]] = {}
        self._lengths: dict[int, int] = {}
        self._named: dict[Prefix, int] = {}
        self._sorted: list[Prefix] = []

    def prefixes(self) -> Set[Prefix]:
        return self._named.keys()

    def inside(self, block: CidrBlock) -> Iterator[Prefix]:
        """Known prefixes that a block covers."""
        start, span = block.prefix.addr, (1 << (128 - block.prefix.length)) - 1
        end = (int.from_bytes(start) + span).to_bytes(16)
        low, high = bisect_left(self._sorted, Prefix(start, 0)), bisect_right(self._sorted, Prefix(end, 128))
        return (prefix for prefix in self._sorted[low:high] if block.covers(prefix))

    def covering(self, prefix: Prefix) -> Iterator[CidrBlock]:
        """Blocks in use that cover a prefix."""
        number = int.from_bytes(prefix.addr)
        for length in self._lengths:
            if length <= prefix.length:
                shift = 128 - length
                wide = Prefix((number >> shift << shift).to_bytes(16), length)
                yield from (block for block in self._by_prefix.get(wide, ()) if block.covers(prefix))

    def add(self, block: CidrBlock) -> list[Prefix]:
        """Returns the prefixes that nobody named before."""
        self._blocks[block] = self._blocks.get(block, 0) + 1
        if self._blocks[block] > 1:
            return []
        self._by_prefix.setdefault(block.prefix, set()).add(block)
        self._lengths[block.prefix.length] = self._lengths.get(block.prefix.length, 0) + 1
        return [prefix for prefix in _named(block) if self._name(prefix)]

    def remove(self, block: CidrBlock) -> list[Prefix]:
        """Returns the prefixes that nobody names any more. Raises KeyError if the block isn't in use."""
        self._blocks[block] -= 1
        if self._blocks[block]:
            return []
        del self._blocks[block]
        self._by_prefix[block.prefix].discard(block)
        if not self._by_prefix[block.prefix]:
            del self._by_prefix[block.prefix]
        self._lengths[block.prefix.length] -= 1
        if not self._lengths[block.prefix.length]:
            del self._lengths[block.prefix.length]
        return [prefix for prefix in _named(block) if self._unname(prefix)]

    def _name(self, prefix: Prefix) -> bool:
        self._named[prefix] = self._named.get(prefix, 0) + 1
        if self._named[prefix] > 1:
            return False
        insort(self._sorted, prefix)
        return True

    def _unname(self, prefix: Prefix) -> bool:
        self._named[prefix] -= 1
        if self._named[prefix]:
            return False
        del self._named[prefix]
        del self._sorted[bisect_left(self._sorted, prefix)]
        return True


def _named(block: CidrBlock) -> Iterable[Prefix]:
    named = (block.prefix, *block.excepts)
    # Sorted and unique: a block that names a prefix twice still names it once.
    return sorted({*named, *(ALL_V4 for prefix in named if not prefix.v4 and ALL_V4 in prefix)})
