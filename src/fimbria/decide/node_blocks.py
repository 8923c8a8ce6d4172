"""Cluster-pool address management: per-node blocks carved out of cluster-wide pools. Decided by the operator only.

Rules:
1. A node has one block of each family for which a pool is configured; more are added when it asks for them.
2. Blocks of two nodes never overlap, also when pools change: a block in use stays its node's until the node is gone,
   even if no pool contains it any more (the node gets a condition that says so).
3. If two nodes hold overlapping blocks (objects edited by hand), the older node keeps it and the younger one gets a
   condition.
4. A node that is gone gives its blocks back. One whose object lost them (edited by hand) gets the same again: its pods
   have addresses of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

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
    """The decision for one node: its blocks, and what is wrong (empty if nothing is)."""

    blocks: tuple[Prefix, ...]
    problem: str = ""


@dataclass(slots=True)
class BlockAllocator:
    """Who has which block. Restore with `observe` for every node before the first `assign`."""

    pools: tuple[Pool, ...]
    held: dict[Prefix, str] = field(default_factory=dict)
    _cursor: dict[Pool, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_pools(self.pools)

    def restore(self, nodes: Iterable[tuple[str, Iterable[Prefix]]]) -> dict[str, str]:
        """Take over what nodes hold, oldest node first. Returns problems by node name."""
        problems: dict[str, str] = {}
        for name, blocks in nodes:
            for block in blocks:
                other = self._overlapping(block, name)
                if other is not None:
                    problems[name] = (
                        f"block {block} overlaps {other[0]} of node {other[1]}, which is older and keeps it"
                    )
                else:
                    self.held[block] = name
        return problems

    def assign(self, node: str, current: Iterable[Prefix]) -> NodeBlocks:
        """Blocks for a node, given those it has now. Adds what is missing, never takes away a sound one."""
        kept: list[Prefix] = []
        problems: list[str] = []
        for block in current:
            other = self._overlapping(block, node)
            if other is not None:
                problems.append(f"block {block} overlaps {other[0]} of node {other[1]} and is taken back")
                continue
            self.held[block] = node
            kept.append(block)
            if not any(block in p.network for p in self.pools):
                problems.append(f"block {block} is in no configured pool any more; it stays while the node lives")
        for v4 in (True, False):
            pools = [p for p in self.pools if p.network.v4 == v4]
            if not pools or any(b.v4 == v4 for b in kept):
                continue
            fresh = self._take(pools, node)
            if fresh is None:
                names = ", ".join(map(str, pools))
                problems.append(f"no {'IPv4' if v4 else 'IPv6'} block is free for node {node} in {names}")
            else:
                kept.append(fresh)
        return NodeBlocks(tuple(kept), "; ".join(problems))

    def release(self, node: str) -> None:
        """Free what a node had that is gone."""
        for block in [b for b, n in self.held.items() if n == node]:
            del self.held[block]

    def usage(self) -> Mapping[str, tuple[int, int]]:
        """Pool text -> (blocks in use, blocks in all)."""
        return {str(p): (sum(b in p.network for b in self.held), p.count) for p in self.pools}

    def _take(self, pools: list[Pool], node: str) -> Prefix | None:
        for block, holder in self.held.items():
            if holder == node and block.v4 == pools[0].network.v4:
                return block
        for pool in pools:
            start = self._cursor.get(pool, 0)
            for step in range(min(pool.count, len(self.held) + 1)):
                index = (start + step) % pool.count
                block = pool.block(index)
                if self._overlapping(block, "") is None:
                    self.held[block] = node
                    self._cursor[pool] = index + 1
                    return block
        return None

    def _overlapping(self, block: Prefix, node: str) -> tuple[Prefix, str] | None:
        holder = self.held.get(block)
        if holder is not None:
            return None if holder == node else (block, holder)
        for other, name in self.held.items():
            if name != node and (other in block or block in other):
                return other, name
        return None
