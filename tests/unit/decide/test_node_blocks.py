"""Blocks of nodes out of cluster-wide pools: each rule of decide/node_blocks.py."""

from __future__ import annotations

import random

import pytest

from fimbria.decide.node_blocks import BlockAllocator, Pool, PoolError, check_pools
from fimbria.model.address import Prefix

P = Prefix.parse


def allocator(*pools: str) -> BlockAllocator:
    return BlockAllocator(tuple(Pool.parse(p) for p in pools))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.0.0.0",
        "10.0.0.0/16",
        "10.0.0.0/16/x",
        "10.0.0.0/33/24",
        "10.0.0.0/16/8",
        "10.0.0.0/16/31",
        "fd00::/48/128",
        "moon/1/2",
    ],
)
def test_a_bad_pool_is_named(text: str) -> None:
    with pytest.raises(PoolError, match=f"pool '{text}'"):
        Pool.parse(text)


def test_pools_must_not_overlap() -> None:
    with pytest.raises(PoolError, match=r"10\.0\.4\.0"):
        check_pools((Pool.parse("10.0.0.0/16/24"), Pool.parse("10.0.4.0/22/24")))
    check_pools((Pool.parse("10.0.0.0/16/24"), Pool.parse("10.1.0.0/16/26"), Pool.parse("fd00::/48/64")))


def test_one_block_of_each_family() -> None:
    a = allocator("10.0.0.0/16/24", "fd00::/48/64")
    first = a.assign("a", ())
    assert first.blocks == (P("10.0.0.0/24"), P("fd00::/64")) and first.problem == ""
    assert a.assign("a", first.blocks) == first, "what it has is kept"
    assert a.assign("b", ()).blocks == (P("10.0.1.0/24"), P("fd00:0:0:1::/64"))
    assert a.usage()["10.0.0.0/16/24"] == (2, 256)


def test_a_pool_without_room_is_named_and_the_next_pool_is_used() -> None:
    a = allocator("10.0.0.0/24/25", "10.9.0.0/25/25")
    for name in "abc":
        assert a.assign(name, ()).problem == ""
    refused = a.assign("d", ())
    assert (
        refused.blocks == () and "no IPv4 block is free for node d in 10.0.0.0/24/25, 10.9.0.0/25/25" in refused.problem
    )
    a.release("b")
    assert a.assign("d", ()).blocks == (P("10.0.0.128/25"),)


def test_a_family_that_is_exhausted_leaves_the_other() -> None:
    a = allocator("10.0.0.0/24/24", "fd00::/48/64")
    a.assign("a", ())
    second = a.assign("b", ())
    assert second.blocks == (P("fd00:0:0:1::/64"),) and "IPv4" in second.problem


def test_changed_pools_leave_what_nodes_have() -> None:
    a = allocator("10.9.0.0/16/24")
    kept = a.assign("a", (P("10.0.0.0/24"),))
    assert kept.blocks == (P("10.0.0.0/24"),) and "in no configured pool any more" in kept.problem


@pytest.mark.parametrize("claimed", ["10.0.0.0/24", "10.0.0.0/25", "10.0.0.0/20"])
def test_overlapping_blocks_stay_the_older_nodes(claimed: str) -> None:
    a = allocator("10.0.0.0/16/24")
    problems = a.restore([("old", (P("10.0.0.0/24"),)), ("young", (P(claimed),))])
    assert list(problems) == ["young"] and "of node old" in problems["young"]
    decision = a.assign("young", (P(claimed),))
    assert P(claimed) not in decision.blocks and "is taken back" in decision.problem
    assert a.assign("old", (P("10.0.0.0/24"),)).blocks == (P("10.0.0.0/24"),)


def test_blocks_of_nodes_never_overlap() -> None:
    choice = random.Random(5)
    a = allocator("10.0.0.0/22/26", "10.1.0.0/24/27")
    have: dict[str, tuple[Prefix, ...]] = {}
    for _ in range(600):
        name = f"n{choice.randrange(40)}"
        if name in have and choice.random() < 0.4:
            a.release(name)
            del have[name]
            continue
        decision = a.assign(name, have.get(name, ()))
        if decision.blocks:
            have[name] = decision.blocks
        else:
            assert decision.problem
        every = [b for blocks in have.values() for b in blocks]
        assert not any(x in y for i, x in enumerate(every) for j, y in enumerate(every) if i != j)


def test_a_node_that_lost_its_blocks_gets_the_same_again() -> None:
    blocks = allocator("10.0.0.0/24/25", "fd00::/48/64")
    first = blocks.assign("a", [])
    for _ in range(5):
        assert blocks.assign("a", []) == first
    assert blocks.assign("b", []).problem == ""
