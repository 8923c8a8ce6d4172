"""Cluster-pool address management: per-node blocks carved out of cluster-wide pools. Decided by the operator only.

Rules:
1. A node has one block of each family for which a pool is configured; more are added when it asks for them.
2. Blocks of two nodes never overlap, also when pools change: a block in use stays its node's until the node is gone,
   even if no pool contains it any more (the node gets a condition that says so).
3. If two nodes hold overlapping blocks (objects edited by hand), the older node keeps it and the younger one gets a
   condition.
4. A node that is gone gives its blocks back. One whose object lost them (edited by hand) gets the same again: its pods
   have addresses of them.
5. A free block is searched for from behind the last one given, so that a freed one rests: its node may come back, and
   others still route to it. Nobody wrote down which was the last one given: after a restore the search begins with the
   widest gap, where nothing was given for longest.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from fimbria.model.address import Prefix


class PoolError(ValueError):
    """A pool's configuration is wrong; the text names the pool and why."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Addresses for pods of the whole cluster and the block length (as a 0..128 prefix length) for one node."""

    network: Prefix
    block_length: int

    @classmethod
    def parse(cls, text: str) -> Pool:
        """From `10.244.0.0/16/24` or `fd00:10:244::/48/64`: network, then the length of one node's block.

        Raises PoolError naming the text.
        """
        network, _, block = text.rpartition("/")
        if network.count("/") != 1 or not block.isdecimal():
            raise PoolError(f"pool {text!r}: expected NETWORK/LENGTH/NODE-LENGTH, for example 10.244.0.0/16/24")
        try:
            prefix = Prefix.parse(network)
        except ValueError as error:
            raise PoolError(f"pool {text!r}: {error}") from None
        length = int(block) + (96 if prefix.v4 else 0)
        longest = 126 if prefix.v4 else 124
        if not prefix.length <= length <= longest:
            raise PoolError(
                f"pool {text!r}: a node's block must be between the pool's length and /{longest % 96 or 124}"
            )
        return cls(prefix, length)

    @property
    def count(self) -> int:
        """How many blocks the pool has."""
        return 1 << (self.block_length - self.network.length)

    def block(self, index: int) -> Prefix:
        """The n-th block."""
        step = index << (128 - self.block_length)
        return Prefix((int.from_bytes(self.network.addr) + step).to_bytes(16), self.block_length)

    def __str__(self) -> str:
        return f"{self.network}/{self.block_length - (96 if self.network.v4 else 0)}"


def check_pools(pools: Iterable[Pool]) -> None:
    """Raises PoolError if two pools overlap."""
    seen: list[Pool] = []
    for pool in pools:
        for other in seen:
            if pool.network in other.network or other.network in pool.network:
                raise PoolError(f"pools {other} and {pool} overlap")
        seen.append(pool)


@dataclass(frozen=True, slots=True)
class NodeBlocks:
    """The decision for one node: its blocks, what is wrong (empty if nothing is), and whether a family has no block."""

    blocks: tuple[Prefix, ...]
    problem: str = ""
    lacks: bool = False


class _Range(NamedTuple):
    """A block, the numbers of its first and last address, and whose it is."""

    first: int
    last: int
    block: Prefix
    node: str


_LAST = attrgetter("last")


def _ends(network: Prefix) -> tuple[int, int]:
    """The numbers of the first and the last address."""
    first = int.from_bytes(network.addr)
    return first, first + (1 << (128 - network.length)) - 1


@dataclass(slots=True)
class BlockAllocator:
    """Who has which block. `restore` what all nodes hold before the first `assign`."""

    pools: tuple[Pool, ...]
    _ranges: list[_Range] = field(default_factory=list)
    """What is held, in the order of addresses and apart from each other: of a node's blocks inside each other (edited
    by hand) only the outermost one."""
    _held: dict[str, dict[Prefix, None]] = field(default_factory=dict)
    """Each node's blocks, in the order it got them."""
    _cursor: dict[Pool, int] = field(default_factory=dict)
    """The index of the block that the next search begins with."""

    def __post_init__(self) -> None:
        check_pools(self.pools)

    def restore(self, nodes: Iterable[tuple[str, Iterable[Prefix]]]) -> dict[str, str]:
        """Take over what nodes hold, oldest node first. Returns problems by node name."""
        problems: dict[str, str] = {}
        for name, blocks in nodes:
            for block in blocks:
                other = self._claim(block, name)
                if other is not None:
                    problems[name] = (
                        f"block {block} overlaps {other.block} of node {other.node}, which is older and keeps it"
                    )
        self._cursor = {pool: self._widest_gap(pool) for pool in self.pools}
        return problems

    def assign(self, node: str, current: Iterable[Prefix]) -> NodeBlocks:
        """Blocks for a node, given those it has now. Adds what is missing, never takes away a sound one."""
        kept: list[Prefix] = []
        problems: list[str] = []
        lacks = False
        for block in current:
            other = self._claim(block, node)
            if other is not None:
                problems.append(f"block {block} overlaps {other.block} of node {other.node} and is taken back")
                continue
            kept.append(block)
            if not any(block in p.network for p in self.pools):
                problems.append(f"block {block} is in no configured pool any more; it stays while the node lives")
        for v4 in (True, False):
            pools = [p for p in self.pools if p.network.v4 == v4]
            if not pools or any(b.v4 == v4 for b in kept):
                continue
            fresh = self._take(pools, node)
            if fresh is None:
                lacks = True
                names = ", ".join(map(str, pools))
                problems.append(f"no {'IPv4' if v4 else 'IPv6'} block is free for node {node} in {names}")
            else:
                kept.append(fresh)
        return NodeBlocks(tuple(kept), "; ".join(problems), lacks)

    def release(self, node: str) -> bool:
        """Free what a node had that is gone; whether it had any."""
        blocks = self._held.pop(node, {})
        for block in blocks:
            at = self._behind(_ends(block)[0])
            if at < len(self._ranges) and self._ranges[at].block == block:
                del self._ranges[at]
        return bool(blocks)

    def _behind(self, address: int) -> int:
        """The place of the first range that doesn't end before an address."""
        return bisect_left(self._ranges, address, key=_LAST)

    def _claim(self, block: Prefix, node: str) -> _Range | None:
        """Note that a node has a block, unless another one has addresses of it: what that one has is returned."""
        first, last = _ends(block)
        start = end = self._behind(first)
        while end < len(self._ranges) and self._ranges[end].first <= last:
            if self._ranges[end].node != node:
                return self._ranges[end]
            end += 1
        # Networks are inside each other or apart: either one contains this block, or this block contains them all.
        if start == end or block not in self._ranges[start].block:
            self._ranges[start:end] = [_Range(first, last, block, node)]
        self._held.setdefault(node, {})[block] = None
        return None

    def _take(self, pools: list[Pool], node: str) -> Prefix | None:
        for block in self._held.get(node, ()):
            if block.v4 == pools[0].network.v4:
                return block
        for pool in pools:
            cursor = self._cursor.get(pool, 0)
            index = self._free(pool, cursor, pool.count)
            if index is None:
                index = self._free(pool, 0, cursor)
            if index is not None:
                self._cursor[pool] = index + 1
                self._claim(pool.block(index), node)
                return pool.block(index)
        return None

    def _free(self, pool: Pool, index: int, stop: int) -> int | None:
        """The first of a pool's blocks from `index` to before `stop` that nobody has an address of."""
        begin, size = _ends(pool.network)[0], 1 << (128 - pool.block_length)
        at = self._behind(begin + index * size)
        while index < stop:
            if at == len(self._ranges) or self._ranges[at].first >= begin + (index + 1) * size:
                return index
            index = (self._ranges[at].last - begin) // size + 1
            at = bisect_left(self._ranges, begin + index * size, lo=at, key=_LAST)
        return None

    def _widest_gap(self, pool: Pool) -> int:
        """The index of the first block behind the range that has the most room behind it; the pool's end is followed by
        its beginning."""
        begin, last = _ends(pool.network)
        held = self._ranges[self._behind(begin) : bisect_left(self._ranges, last + 1, key=attrgetter("first"))]
        if not held:
            return 0
        following = [*(r.first for r in held[1:]), held[0].first + last + 1 - begin]
        _, end = max((after - r.last, r.last) for r, after in zip(held, following, strict=True))
        return ((end - begin) // (1 << (128 - pool.block_length)) + 1) % pool.count
