"""Pod addresses of one node, out of the blocks that the operator gave it.

Rules:
1. An address has at most one owner; an owner has at most one address of each family.
2. The first usable address of the first block of a family is the router's and never given to a pod; network and
   (IPv4) broadcast addresses are never given out.
3. The next address is searched from behind the last one given, so that a freed address rests as long as possible. One
   that the cluster still takes for somebody else's (after a reboot, say, every address of before) is given out last.
4. What was restored (journal, kernel) is claimed before anything is allocated, also outside today's blocks: a changed
   pool never takes an address from a running pod.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fimbria.model.address import Prefix, is_v4, unpack


class PoolExhausted(Exception):
    """No address of a family is free; the text names the family, the blocks and how many are in use."""


class AddressTaken(Exception):
    """A claimed address already has another owner; the text names both."""


@dataclass(slots=True)
class _Family:
    name: str
    blocks: list[Prefix] = field(default_factory=list)
    cursor: int = 0


@dataclass(slots=True)
class AddressPool:
    """Allocator of single addresses. Synchronous; callers persist what it decides."""

    owners: dict[bytes, str] = field(default_factory=dict)
    resting: Callable[[bytes], bool] = lambda _addr: False
    """Whether a free address is still said to be somebody's."""
    _v4: _Family = field(default_factory=lambda: _Family("IPv4"))
    _v6: _Family = field(default_factory=lambda: _Family("IPv6"))

    def set_blocks(self, blocks: Iterable[Prefix]) -> None:
        """Replace the blocks. Addresses in use outside of them stay owned until released."""
        blocks = list(blocks)
        self._v4.blocks = [b for b in blocks if b.v4]
        self._v6.blocks = [b for b in blocks if not b.v4]

    def blocks(self, *, v4: bool) -> tuple[Prefix, ...]:
        """Blocks of one family, in order."""
        return tuple(self._family(v4).blocks)

    def router(self, *, v4: bool) -> bytes | None:
        """The node's own address inside its first block, or None without a block."""
        blocks = self._family(v4).blocks
        return _nth(blocks[0], 1) if blocks else None

    def allocate(self, owner: str, *, v4: bool) -> bytes:
        """A free address for `owner`; the one it already has, if any.

        Raises PoolExhausted if all addresses of the family's blocks are in use or the family has none.
        """
        held = self.held_by(owner, v4=v4)
        if held is not None:
            return held
        family = self._family(v4)
        total = sum(_usable(b, first=i == 0) for i, b in enumerate(family.blocks))
        router = self.router(v4=v4)
        for rested in (True, False):
            for _ in range(total + 1):
                addr = self._next(family)
                if addr is None:
                    break
                if addr != router and addr not in self.owners and not (rested and self.resting(addr)):
                    self.owners[addr] = owner
                    return addr
        names = ", ".join(map(str, family.blocks)) or "none"
        raise PoolExhausted(
            f"no free {family.name} address on this node: blocks {names}, all {total} pod addresses are in use"
        )

    def claim(self, addr: bytes, owner: str) -> None:
        """Record that `owner` has `addr` (restored state).

        Raises AddressTaken if somebody else has it.
        """
        holder = self.owners.setdefault(addr, owner)
        if holder != owner:
            raise AddressTaken(f"{unpack(addr)} belongs to {holder}, not to {owner}")

    def release(self, owner: str) -> tuple[bytes, ...]:
        """Free all addresses of `owner`; unknown owners have none."""
        freed = tuple(a for a, o in self.owners.items() if o == owner)
        for addr in freed:
            del self.owners[addr]
        return freed

    def held_by(self, owner: str, *, v4: bool) -> bytes | None:
        """The address of that family that `owner` has."""
        return next((a for a, o in self.owners.items() if o == owner and is_v4(a) == v4), None)

    def capacity(self, *, v4: bool) -> int:
        """How many pods can have an address of the family."""
        return sum(_usable(b, first=i == 0) for i, b in enumerate(self._family(v4).blocks))

    def _family(self, v4: bool) -> _Family:
        return self._v4 if v4 else self._v6

    def _next(self, family: _Family) -> bytes | None:
        sizes = [_span(b) for b in family.blocks]
        total = sum(sizes)
        if not total:
            return None
        family.cursor = family.cursor % total
        index = family.cursor
        family.cursor += 1
        for block, size in zip(family.blocks, sizes, strict=True):
            if index < size:
                return _nth(block, index + 1)
            index -= size
        return None


def _span(block: Prefix) -> int:
    """Addresses of a block that may be given out at all, the router's included; IPv6 is cut at 2^32 to stay finite."""
    host_bits = 128 - block.length
    if host_bits == 0:
        return 0
    if block.v4:
        return max((1 << host_bits) - 2, 0)
    return int(min(1 << host_bits, 1 << 32)) - 1


def _usable(block: Prefix, *, first: bool) -> int:
    return max(_span(block) - (1 if first else 0), 0)


def _nth(block: Prefix, n: int) -> bytes:
    return (int.from_bytes(block.addr) + n).to_bytes(16)
