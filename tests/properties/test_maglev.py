"""Maglev tables: shares, weights, how little moves, and that every node builds the same."""

import random
import struct
import time
from collections import Counter

import pytest

from fimbria.compute import maglev
from fimbria.compute.maglev import TableMember
from fimbria.kernel import maglev as fast
from fimbria.model.address import pack

SIZE = maglev.DEFAULT_SIZE


def member(n: int, weight: int = 1, backend: int = 0) -> TableMember:
    addr = pack(f"10.1.{n >> 8}.{n & 255}") if n % 2 else pack(f"fd00::{n:x}")
    return TableMember(backend or n + 1, weight, addr, 8000 + n % 7, 6)


def table(members: list[TableMember], size: int = SIZE) -> list[int]:
    return list(struct.unpack(f"={size}I", fast.fill(maglev.in_order(members), size)))


@pytest.mark.parametrize("size", [2, 3, 251, 1021, 4093])
@pytest.mark.parametrize("seed", range(12))
def test_c_computes_what_the_reference_says(size: int, seed: int) -> None:
    rng = random.Random(seed)
    count = rng.choice((0, 1, 2, 10, 300))
    weight = rng.choice((lambda: 1, lambda: rng.randrange(3), lambda: rng.choice((1, 100, 2**32 - 1))))
    members = [member(n, weight(), rng.randrange(1, 2**32)) for n in rng.sample(range(60000), count)]
    assert table(members, size) == maglev.fill(members, size)


def test_the_largest_table_is_the_same_too() -> None:
    members = [member(n, 1 + n % 5) for n in range(100)]
    assert table(members, maglev.TABLE_SIZES[-1]) == maglev.fill(members, maglev.TABLE_SIZES[-1])


def test_the_order_of_input_means_nothing() -> None:
    members = [member(n, 1 + n % 3) for n in range(100)]
    shuffled = random.Random(7).sample(members, len(members))
    assert maglev.fill(shuffled, 4093) == maglev.fill(members, 4093)
    assert table(shuffled) == table(members)


def test_numbers_that_differ_from_node_to_node_lead_to_the_same_addresses() -> None:
    here, there = [member(n) for n in range(100)], [member(n, backend=5000 - n) for n in range(100)]
    by_number = [{m.backend: m.addr for m in members} for members in (here, there)]
    tables = [[names[b] for b in table(members)] for names, members in zip(by_number, (here, there), strict=True)]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("seed", range(3))
def test_one_of_a_hundred_that_goes_or_comes_moves_two_percent_of_the_others_at_most(seed: int) -> None:
    members = [member(n) for n in random.Random(seed).sample(range(60000), 100)]
    whole = table(members)
    for gone in members:
        rest = [m for m in members if m is not gone]
        without = table(rest)
        others = [m.backend for m in rest]
        assert maglev.moved(whole, without, others) <= 0.02  # it goes
        # It comes: entries that the newcomer takes are its share, all other changes are moves.
        taken = [(a, b) for a, b in zip(without, whole, strict=True) if b != gone.backend]
        assert sum(a != b for a, b in taken) / len(taken) <= 0.02


@pytest.mark.parametrize("size", [251, SIZE, 131071])
def test_equal_weights_differ_by_one_entry(size: int) -> None:
    shares = Counter(table([member(n) for n in range(100)], size))
    assert len(shares) == 100
    assert max(shares.values()) - min(shares.values()) <= 1


@pytest.mark.parametrize("weights", [[1, 2, 3], [100, 1], [5, 50, 500], [1] * 50 + [2] * 50, [1000, 999, 7, 3, 250]])
def test_shares_are_within_two_percent_of_the_weights(weights: list[int]) -> None:
    members = [member(n, w) for n, w in enumerate(weights)]
    shares = Counter(table(members))
    for m in members:
        exact = SIZE * m.weight / sum(weights)
        assert abs(shares[m.backend] - exact) <= max(1, 0.02 * exact)


def test_weight_zero_gets_nothing() -> None:
    assert set(table([member(1), member(2, 0)])) == {2}
    assert set(table([member(1, 0), member(2, 0)])) == {0}
    assert set(table([])) == {0}


def test_a_changed_weight_moves_about_its_share() -> None:
    before, after = [member(n, 10) for n in range(100)], [member(n, 10 if n else 5) for n in range(100)]
    others = [m.backend for m in before[1:]]
    assert maglev.moved(table(before), table(after), others) <= 0.02


def test_every_size_is_prime_and_the_largest_below_its_power_of_two() -> None:
    def prime(n: int) -> bool:
        return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))

    for bits, size in enumerate(maglev.TABLE_SIZES, 8):
        assert prime(size)
        assert not any(prime(n) for n in range(size + 1, 1 << bits))


@pytest.mark.parametrize(
    ("members", "size"),
    [([member(1)._replace(backend=0)], 251), ([member(1)._replace(weight=2**32)], 251), ([member(1)], 1),
     ([member(1)], 1 << 21), ([member(1)], -1)],
)  # fmt: skip
def test_what_makes_no_table_is_an_error(members: list[TableMember], size: int) -> None:
    with pytest.raises(ValueError, match="Maglev table"):
        fast.fill(members, size)


def test_a_table_is_filled_in_well_under_a_millisecond() -> None:
    members = maglev.in_order(member(n) for n in range(100))
    spent = []
    for _ in range(50):
        begin = time.perf_counter()
        fast.fill(members, SIZE)
        spent.append(time.perf_counter() - begin)
    assert min(spent) < 0.001
