"""CIDR blocks with exceptions."""

import ipaddress
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from fimbria.model.address import Prefix
from fimbria.model.policy import CidrBlock

V4 = st.builds(lambda a, n: f"{ipaddress.IPv4Address(a)}/{n}", st.integers(0, 2**32 - 1), st.integers(0, 32))
V6 = st.builds(lambda a, n: f"{ipaddress.IPv6Address(a)}/{n}", st.integers(2**100, 2**128 - 1), st.integers(0, 128))
PREFIXES = st.one_of(
    V4, V6, st.sampled_from(["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.1.1/32", "::/0", "fd00::/8"])
)


@given(PREFIXES, st.lists(PREFIXES, max_size=6), PREFIXES)
def test_a_block_covers_what_is_in_it_and_in_no_hole(block: str, holes: list[str], asked: str) -> None:
    prefix, excepts, other = Prefix.parse(block), tuple(map(Prefix.parse, holes)), Prefix.parse(asked)
    expected = other.v4 == prefix.v4 and other in prefix and not any(other in hole for hole in excepts)
    made = CidrBlock(prefix, excepts)
    assert made.covers(other) == expected
    assert made == CidrBlock(prefix, excepts)
    assert hash(made) == hash(CidrBlock(prefix, excepts))


def test_exceptions_are_not_gone_through_one_by_one() -> None:
    excepts = tuple(Prefix.parse(f"9.{n // 256}.{n % 256}.0/24") for n in range(3000))
    block, asked = CidrBlock(Prefix.parse("0.0.0.0/0"), excepts), Prefix.parse("20.0.0.0/24")
    with patch.object(Prefix, "__contains__", autospec=True, side_effect=Prefix.__contains__) as contains:
        assert block.covers(asked)
    assert contains.call_count < 5
