"""Blocks of nodes out of cluster-wide pools: each rule of decide/node_blocks.py."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fimbria.decide import node_blocks
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


def test_smaller_blocks_are_found_behind_larger_ones() -> None:
    old = allocator("10.0.0.0/16/24")
    have = [(f"n{i}", old.assign(f"n{i}", ()).blocks) for i in range(50)]
    new = allocator("10.0.0.0/16/26")
    assert new.restore(have) == {}
    assert new.assign("new", ()).blocks == (P("10.0.50.0/26"),)


def test_larger_blocks_are_found_among_smaller_ones() -> None:
    a = allocator("10.0.0.0/22/24")
    a.restore([("a", [P("10.0.0.64/26")]), ("b", [P("10.0.1.0/26"), P("10.0.1.192/26")]), ("c", [P("10.0.3.0/25")])])
    assert a.assign("d", ()).blocks == (P("10.0.2.0/24"),)
    assert a.assign("e", ()).blocks == ()


@pytest.mark.parametrize("held", [range(50), [*range(50), 255], [*range(3), *range(230, 256)], range(100, 150)])
def test_a_freed_block_rests_also_after_a_restart(held: Any) -> None:
    pool = Pool.parse("10.0.0.0/16/24")
    have = {f"n{i}": (pool.block(i),) for i in held}
    a = BlockAllocator((pool,))
    a.restore(have.items())
    last = max(held, key=lambda i: ((i + 1) % 256 not in held, -((i + 1) % 256)))
    for name in (f"n{held[1]}", f"n{last}"):
        assert a.release(name)
    new = [a.assign(f"new{i}", ()).blocks for i in range(256 - len(have))]
    assert not set(new) & set(have.values()) and len(set(new)) == len(new)
    assert {a.assign(f"late{i}", ()).blocks for i in range(2)} == {have[f"n{held[1]}"], have[f"n{last}"]}
    assert a.assign("none", ()).lacks


def test_blocks_of_one_node_inside_each_other_are_all_given_back() -> None:
    a = allocator("10.0.0.0/24/26")
    a.restore([("a", [P("10.0.0.0/27"), P("10.0.0.0/25"), P("10.0.0.64/26")])])
    assert "10.0.0.0/25 of node a" in a.assign("b", [P("10.0.0.32/27")]).problem
    assert a.assign("c", ()).blocks and a.assign("d", ()).lacks
    assert a.release("a") and not a.release("a")
    assert not a.assign("d", ()).lacks and not a.assign("e", ()).lacks


POOLS = ["10.0.0.0/26/28", "10.0.0.0/26/29", "10.0.0.0/27/30 10.0.0.32/28/30", "10.0.0.32/27/28 fd00::/120/122"]
BLOCKS = st.builds(
    lambda at, length: P(f"10.0.0.{at}/{length}"), st.integers(0, 80), st.sampled_from([20, 26, 28, 29, 30])
) | st.sampled_from([P("fd00::/122"), P("fd00::40/123"), P("::/0"), P("fd00::/100")])
STEPS = st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(["again", "claim", "gone", "leader"]), BLOCKS,
                  st.sampled_from(POOLS))  # fmt: skip


def overlap(one: Prefix, two: Prefix) -> bool:
    return one in two or two in one


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_against_a_list_that_is_searched_from_end_to_end(steps: list[tuple[str, str, Prefix, str]]) -> None:
    pools = tuple(Pool.parse(p) for p in POOLS[0].split())
    a = BlockAllocator(pools)
    objects: dict[str, tuple[Prefix, ...]] = {}
    held: list[tuple[Prefix, str]] = []
    for node, what, block, texts in steps:
        if what == "gone":
            assert a.release(node) == any(n == node for _, n in held)
            objects.pop(node, None)
            held = [h for h in held if h[1] != node]
            continue
        if what == "leader":
            pools = tuple(Pool.parse(p) for p in texts.split())
            a, held = BlockAllocator(pools), [(b, n) for n, blocks in objects.items() for b in blocks]
            assert a.restore(objects.items()) == {}
        current = (*objects.get(node, ()), *([block] if what == "claim" else []))
        sound = []
        for b in current:
            if not any(n != node and overlap(b, other) for other, n in held):
                sound.append(b)
                held.append((b, node))
        decision = a.assign(node, current)
        objects[node] = decision.blocks
        assert list(decision.blocks[: len(sound)]) == sound
        assert ("is taken back" in decision.problem) == (len(sound) < len(current))
        fresh = decision.blocks[len(sound) :]
        lacks = []
        for v4 in {p.network.v4 for p in pools}:
            added = [b for b in fresh if b.v4 == v4]
            has = [b for b, n in held if n == node and b.v4 == v4]
            free = [p.block(i) for p in pools if p.network.v4 == v4 for i in range(p.count)
                    if not any(overlap(p.block(i), b) for b, _ in held)]  # fmt: skip
            if any(b.v4 == v4 for b in sound):
                assert not added
            elif has:
                assert added == has[:1], "the same again"
            else:
                assert len(added) == bool(free) and set(added) <= set(free)
            lacks.append(not added and not any(b.v4 == v4 for b in sound))
        assert decision.lacks == any(lacks)
        held += [(b, node) for b in fresh if (b, node) not in held]


@contextmanager
def at_most(lines: int) -> Iterator[None]:
    """The allocator executes so many lines of code; more are an error at once."""
    left = lines

    def trace(frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != node_blocks.__file__:
            return None
        left -= event == "line"
        assert left >= 0, f"more than {lines} lines"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_ten_thousand_nodes_are_restored_without_comparing_each_with_each() -> None:
    pools = (Pool.parse("10.0.0.0/8/24"), Pool.parse("fd00::/48/64"))
    count = 10_000
    have = [(f"n{i}", [p.block(i * 7919 % count) for p in pools]) for i in range(count)]
    a = BlockAllocator(pools)
    with at_most(60 * count):
        assert a.restore(have) == {}
    with at_most(1000):
        assert a.assign("n7", have[7][1]).problem == ""
        assert a.assign("new", ()).blocks == tuple(p.block(count) for p in pools)
        assert a.release("n9")
