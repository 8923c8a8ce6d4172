"""Ports to prefixes, and deny over allow within one peer."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from fimbria.compute.policy_shapes import CIDR_ANY_PEER, Cell, CompiledRule, Entry, compile_ports, merge, wider
from fimbria.model.policy import Direction, Origin, PolicyId, PortRange, Proto, Verdict, icmp_type

TCP, UDP = Proto.TCP, Proto.UDP
ALLOW, DENY = Verdict.ALLOW, Verdict.DENY


def cells(*ports: PortRange) -> tuple[Cell, ...]:
    return compile_ports(Direction.INGRESS, ports)


def rule(verdict: Verdict, number: int, *ports: PortRange) -> CompiledRule:
    origin = Origin(PolicyId("K", "ns", "p"), f"ingress[{number}]")
    return CompiledRule(Direction.INGRESS, verdict, number, origin, cells(*ports), ())


def world(*rules: CompiledRule) -> list[tuple[CompiledRule, bool]]:
    return [(one, False) for one in rules]


@given(st.integers(0, 65535), st.integers(0, 65535))
def test_a_range_is_covered_exactly_once_by_as_few_prefixes_as_can_be(a: int, b: int) -> None:
    first, last = min(a, b), max(a, b)
    found = cells(PortRange(TCP, first, last))
    spans = sorted((cell.port, cell.port + (1 << (64 - cell.prefixlen)) - 1) for cell in found)
    assert spans[0][0] == first and spans[-1][1] == last
    assert all(before[1] + 1 == after[0] for before, after in pairwise(spans))
    assert len(spans) == fewest(first, last, 0, 65535)


def fewest(first: int, last: int, low: int, high: int) -> int:
    """By halving: a block is taken whole, left out, or split."""
    if last < low or high < first:
        return 0
    if first <= low and high <= last:
        return 1
    middle = (low + high) // 2
    return fewest(first, last, low, middle) + fewest(first, last, middle + 1, high)


def test_all_ports_of_a_protocol_any_protocol_and_icmp_types() -> None:
    assert cells(PortRange(TCP)) == (Cell(48, 0, 6, 0),)
    assert cells(PortRange()) == (Cell(40, 0, 0, 0),)
    assert cells(icmp_type(Proto.ICMP, 8)) == (Cell(56, 0, 1, 0x0800),)


def test_wider_prefixes_longest_first() -> None:
    assert list(wider(Cell(64, 0, 6, 81)))[:2] == [Cell(63, 0, 6, 80), Cell(62, 0, 6, 80)]
    assert list(wider(Cell(64, 0, 6, 81)))[-2:] == [Cell(48, 0, 6, 0), Cell(40, 0, 0, 0)]
    assert list(wider(Cell(40, 0, 0, 0))) == []


def test_an_allow_below_a_deny_is_left_out() -> None:
    shape = merge(world(rule(ALLOW, 1, PortRange(TCP, 80, 80)), rule(DENY, 2, PortRange(TCP))))
    assert shape == {Cell(48, 0, 6, 0): Entry(2, 0, 2)}


def test_a_deny_below_an_allow_stays_beside_it() -> None:
    shape = merge(world(rule(ALLOW, 1, PortRange()), rule(DENY, 2, PortRange(TCP, 80, 80))))
    assert shape == {Cell(40, 0, 0, 0): Entry(1, 0, 1), Cell(64, 0, 6, 80): Entry(2, 0, 2)}


def test_of_two_equal_rules_the_first_written_is_named() -> None:
    one, other = rule(ALLOW, 1, PortRange(TCP)), rule(ALLOW, 2, PortRange(TCP))
    assert merge(world(one, other)) == merge(world(other, one)) == {Cell(48, 0, 6, 0): Entry(1, 0, 1)}


def test_an_allow_for_any_peer_reaches_into_narrower_entries() -> None:
    shape = merge([(rule(ALLOW, 1, PortRange(TCP)), True), (rule(ALLOW, 2, PortRange(TCP, 80, 80)), False)])
    assert shape == {Cell(48, 0, 6, 0): Entry(1, CIDR_ANY_PEER, 1), Cell(64, 0, 6, 80): Entry(1, CIDR_ANY_PEER, 2)}


def test_the_world_may_be_denied_where_pods_are_allowed() -> None:
    shape = merge([(rule(ALLOW, 1, PortRange(TCP, 80, 80)), True), (rule(DENY, 2, PortRange()), False)])
    assert shape == {Cell(40, 0, 0, 0): Entry(2, 0, 2), Cell(64, 0, 6, 80): Entry(2, CIDR_ANY_PEER, 2)}
