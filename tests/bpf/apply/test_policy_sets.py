"""Policy sets in real maps: whole, in place, and when the kernel refuses."""

import random
import struct
from collections.abc import Iterator

import pytest

from fimbria.agent.datapath import Layouts
from fimbria.apply.policy_sets import PolicySetsTarget, SetContent
from fimbria.apply.rows import Delta
from fimbria.kernel.bpf import Map, MapFlag, MapType, create_map
from fimbria.model.rows import PolicyEntry, PolicyKey

LAYOUTS = Layouts()
ALLOW, DENY = 1, 2
SETS = 4


@pytest.fixture
def outer() -> Iterator[Map]:
    with create_map(MapType.LPM_TRIE, 12, 8, 1, MapFlag.NO_PREALLOC) as template:
        found = create_map(MapType.HASH_OF_MAPS, 4, 4, SETS, MapFlag.NO_PREALLOC, "sets", inner=template)
    yield found
    found.close()


@pytest.fixture
def target(outer: Map) -> PolicySetsTarget:
    return PolicySetsTarget(outer, LAYOUTS["policy_key"], LAYOUTS["policy_entry"])


def entry(peer: int, verdict: int = ALLOW, rule: int = 1) -> tuple[PolicyKey, PolicyEntry]:
    return PolicyKey(40, peer, 0, 0, 0), PolicyEntry(verdict, 0, rule)


def content(*peers: int) -> SetContent:
    return SetContent(dict(entry(p) for p in peers))


def write(target: PolicySetsTarget, **sets: SetContent) -> dict[int, str]:
    return dict(target.write(Delta({int(n[1:]): c for n, c in sets.items()}), order="in"))


def map_id(outer: Map, number: int) -> bytes | None:
    return outer.lookup(struct.pack("=I", number))


def test_what_is_written_is_read(target: PolicySetsTarget) -> None:
    want = {1: content(256), 2: content(*range(300, 900)), 3: SetContent({})}
    assert target.write(Delta(want), order="in") == {}
    assert target.read() == want
    assert target.write(Delta(deletes=frozenset((1, 3, 99))), order="out") == {}
    assert target.read() == {2: want[2]}


def test_a_small_change_is_made_in_place(target: PolicySetsTarget, outer: Map) -> None:
    first = content(*range(256, 400))
    assert write(target, s1=first) == {}
    before = map_id(outer, 1)
    second = first.derive(dict([entry(500, DENY), entry(256, DENY), entry(501)]), [entry(257)[0]])
    assert write(target, s1=second) == {}
    assert (target.read(), map_id(outer, 1)) == ({1: second}, before)
    assert (target.swapped, target.amended) == (1, 1)


def random_change(rng: random.Random, now: SetContent) -> SetContent:
    """Of identities only, of anyone only, or of everything at once."""
    identities = range(256, 900)
    peers = rng.choice(([0], identities, [0, 1 << 24 | 7, *identities]))
    many = rng.choice((1, 2, 10, 90))
    new = dict(entry(rng.choice(peers), rng.choice((ALLOW, DENY))) for _ in range(many))
    there = sorted((k for k in now if k.peer in peers and k not in new), key=str)
    return now.derive(new, rng.sample(there, min(len(there), rng.randrange(12))))


def test_random_changes_end_as_wanted(target: PolicySetsTarget) -> None:
    rng = random.Random(11)
    want = {n: content(*range(256, 256 + 100 * n)) for n in (1, 2, 3)}
    target.write(Delta(dict(want)), order="in")
    for _ in range(150):
        dirty = set()
        for _ in range(rng.randrange(1, 4)):  # several changes may come before they are written
            number = rng.choice((1, 2, 3))
            want[number] = random_change(rng, want[number])
            dirty.add(number)
        assert target.write(Delta({n: want[n] for n in dirty}), order="in") == {}
        assert target.read() == want
    assert target.amended > 40
    assert target.swapped > 40


def test_no_room_in_place_means_a_larger_map(target: PolicySetsTarget, outer: Map) -> None:
    want = content(256)
    write(target, s1=want)
    ids = {map_id(outer, 1)}
    for peer in range(300, 400):
        want = want.derive(dict([entry(peer)]), ())
        assert write(target, s1=want) == {}
        ids.add(map_id(outer, 1))
    assert target.read() == {1: want}
    assert 2 < len(ids) < 10


def test_the_kernel_says_no_room_where_we_thought_there_was(target: PolicySetsTarget, outer: Map) -> None:
    want = content(256)
    write(target, s1=want)
    raw = map_id(outer, 1)
    assert raw is not None
    with Map.by_id(int.from_bytes(raw, "little")) as inner:  # somebody else's entries fill it
        while inner.max_entries > len(list(inner.items())):
            strange = PolicyKey(40, 9000 + len(list(inner.items())), 1, 0, 0)
            inner.update(LAYOUTS["policy_key"].encode(strange), bytes(8))
    want = want.derive(dict([entry(300), entry(301, DENY)]), ())
    assert write(target, s1=want) == {}
    assert target.read() == {1: want}
    assert map_id(outer, 1) != raw


def test_a_map_that_somebody_else_put_there_is_replaced(target: PolicySetsTarget, outer: Map) -> None:
    want = content(256, 257)
    write(target, s1=want)
    with create_map(MapType.LPM_TRIE, 12, 8, 64, MapFlag.NO_PREALLOC) as strange:
        outer.update(struct.pack("=I", 1), struct.pack("=I", strange.fd))
    want = want.derive(dict([entry(300)]), ())
    assert write(target, s1=want) == {}
    assert target.read() == {1: want}


def test_a_set_without_room_leaves_its_neighbours_and_what_is_enforced(target: PolicySetsTarget) -> None:
    old = {n: content(256 + n) for n in range(1, SETS + 1)}
    target.write(Delta(dict(old)), order="in")
    new = {n: content(300 + n, 400) for n in range(1, SETS + 3)}
    failures = target.write(Delta(dict(new)), order="in")
    assert sorted(failures) == [SETS + 1, SETS + 2]
    assert all("policy set" in reason and "full" in reason for reason in failures.values())
    assert target.read() == {n: c for n, c in new.items() if n <= SETS}


def test_a_number_that_is_used_again_is_another_set(target: PolicySetsTarget) -> None:
    first = content(256, 257)
    write(target, s1=first)
    target.write(Delta(deletes=frozenset((1,))), order="out")
    second = content(256).derive(dict([entry(300)]), ())
    assert write(target, s1=second) == {}
    assert target.read() == {1: second}
