"""Pod addresses of one node: each rule of decide/ipam.py."""

from __future__ import annotations

import random

import pytest

from fimbria.decide.ipam import AddressPool, AddressTaken, PoolExhausted
from fimbria.model.address import Prefix, pack, unpack


def pool(*blocks: str) -> AddressPool:
    found = AddressPool()
    found.set_blocks(Prefix.parse(b) for b in blocks)
    return found


def test_network_router_and_broadcast_are_never_given() -> None:
    p = pool("10.0.0.0/29")
    given = [unpack(p.allocate(f"o{n}", v4=True)) for n in range(5)]
    assert given == [f"10.0.0.{n}" for n in range(2, 7)]
    assert p.router(v4=True) == pack("10.0.0.1")
    with pytest.raises(PoolExhausted, match=r"IPv4.*10\.0\.0\.0/29.*all 5"):
        p.allocate("more", v4=True)
    assert p.capacity(v4=True) == 5


def test_an_owner_has_one_address_of_each_family() -> None:
    p = pool("10.0.0.0/24", "fd00::/120")
    assert p.allocate("a", v4=True) == p.allocate("a", v4=True) == pack("10.0.0.2")
    assert p.allocate("a", v4=False) == pack("fd00::2")
    assert set(p.release("a")) == {pack("10.0.0.2"), pack("fd00::2")} and p.release("a") == ()


def test_a_freed_address_rests_as_long_as_possible() -> None:
    p = pool("10.0.0.0/29")
    for n in range(3):
        p.allocate(f"o{n}", v4=True)
    p.release("o0")
    assert unpack(p.allocate("next", v4=True)) == "10.0.0.5"
    assert unpack(p.allocate("next2", v4=True)) == "10.0.0.6"
    assert unpack(p.allocate("next3", v4=True)) == "10.0.0.2"


def test_a_family_without_blocks() -> None:
    with pytest.raises(PoolExhausted, match=r"IPv6.*blocks none"):
        pool("10.0.0.0/24").allocate("a", v4=False)


def test_blocks_are_used_one_after_the_other_and_the_second_has_no_router() -> None:
    p = pool("10.0.0.0/30", "10.0.1.0/30")
    assert [unpack(p.allocate(f"o{n}", v4=True)) for n in range(3)] == ["10.0.0.2", "10.0.1.1", "10.0.1.2"]


def test_what_was_restored_is_kept_also_outside_of_the_blocks() -> None:
    p = pool("10.0.0.0/24")
    p.claim(pack("10.9.9.9"), "old")
    p.claim(pack("10.9.9.9"), "old")
    with pytest.raises(AddressTaken, match="belongs to old, not to new"):
        p.claim(pack("10.9.9.9"), "new")
    assert p.allocate("old", v4=True) == pack("10.9.9.9")
    p.set_blocks([Prefix.parse("10.1.0.0/24")])
    assert p.owners == {pack("10.9.9.9"): "old"}


@pytest.mark.parametrize("block", ["10.0.0.0/31", "10.0.0.0/32"])
def test_a_block_without_room(block: str) -> None:
    with pytest.raises(PoolExhausted):
        pool(block).allocate("a", v4=True)


def test_a_large_ipv6_block() -> None:
    assert unpack(pool("fd00:1::/64").allocate("a", v4=False)) == "fd00:1::2"


def test_random_use_never_gives_an_address_twice() -> None:
    choice = random.Random(3)
    p = pool("10.0.0.0/28", "10.0.1.0/29", "fd00::/124")
    owners: set[str] = set()
    for n in range(2000):
        if owners and choice.random() < 0.5:
            gone = choice.choice(sorted(owners))
            owners.discard(gone)
            p.release(gone)
            continue
        try:
            p.allocate(f"o{n}", v4=choice.random() < 0.6)
            owners.add(f"o{n}")
        except PoolExhausted:
            assert len(p.owners) >= 13
        assert len(p.owners) == len(owners)
        assert pack("10.0.0.1") not in p.owners and pack("fd00::1") not in p.owners


def test_an_address_that_is_said_to_be_somebodys_comes_last() -> None:
    pool = AddressPool()
    pool.set_blocks([Prefix.parse("10.0.0.0/29")])
    said = {pack(f"10.0.0.{n}") for n in (2, 3, 5)}
    pool.resting = said.__contains__
    given = [pool.allocate(f"pod{n}", v4=True) for n in range(5)]
    assert [unpack(a) for a in given] == ["10.0.0.4", "10.0.0.6", "10.0.0.2", "10.0.0.3", "10.0.0.5"]
    with pytest.raises(PoolExhausted):
        pool.allocate("one more", v4=True)
