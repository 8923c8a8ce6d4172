"""The router's command lines, and how its routes follow the nodes."""

from hypothesis import given
from hypothesis import strategies as st

from fimbria.lab.fabric import balancer_changes, member_lines, route_changes, router_lines
from fimbria.lab.layout import LabSpec, Paths

SPEC = LabSpec(nodes=3)
CIDRS = st.sampled_from(["10.0.1.0/24", "10.0.2.0/24", "fd00:1::/64", "fd00:2::/64"])
TABLES = st.dictionaries(CIDRS, st.sampled_from(SPEC.node_names))


def test_the_world_has_no_default_route() -> None:
    assert not any("default" in line for line in member_lines(SPEC, SPEC.world))
    assert any("route add default" in line for line in member_lines(SPEC, SPEC.node("node1")))


def test_every_port_of_the_router_ends_in_a_source_check() -> None:
    lines = router_lines(SPEC, Paths("x"))
    for m in SPEC.members():
        assert any(f"iif {m.name} blackhole" in line for line in lines)


def play(state: set[str], lines: list[str]) -> set[str]:
    """The kernel's part, as far as these lines go: each adds or removes one thing, and only what is there can go."""
    after = set(state)
    for line in lines:
        key = line.replace(" replace ", " add ").split(" via ")[0].split(" dev ")[0]
        if " del " in line:
            after.remove(key.replace(" del ", " add "))
        else:
            after.add(key)
    return after


@given(st.lists(TABLES, max_size=6))
def test_the_end_does_not_depend_on_the_way(history: list[dict[str, str]]) -> None:
    state: set[str] = set()
    before: dict[str, str] = {}
    for table in history:
        state = play(state, route_changes(SPEC, before.items(), table.items()))
        before = table
    assert state == play(set(), route_changes(SPEC, (), before.items()))


def test_no_change_no_lines() -> None:
    table = {"10.0.1.0/24": "node1"}.items()
    assert route_changes(SPEC, table, table) == []


def test_a_fabric_without_source_check_lets_nodes_send_from_any_address() -> None:
    lines = router_lines(LabSpec(nodes=3, source_check=False), Paths("x"))
    assert not any("iif node1" in line for line in lines)
    assert any("iif world blackhole" in line for line in lines)


ADDRESSES = st.sampled_from(["203.0.113.1", "203.0.113.2", "2001:db8:113::1"])
BALANCING = st.dictionaries(ADDRESSES, st.frozensets(st.sampled_from(SPEC.node_names)))


def balanced(state: dict[str, str], lines: list[str]) -> dict[str, str]:
    """Group number -> its hops. What is deleted or routed to must be there."""
    after = dict(state)
    for line in lines:
        words = line.split()
        if line.startswith("nexthop del"):
            del after[words[3]]
        elif "group" in words:
            assert all(("hop " + hop) in after for hop in words[5].split("/"))
            after[words[3]] = words[5]
        elif line.startswith("nexthop replace"):
            after["hop " + words[3]] = words[5]
        else:
            assert words[4] in after
    return after


@given(st.lists(BALANCING, max_size=6))
def test_load_balancers_lead_where_they_should_whatever_came_before(history: list[dict[str, frozenset[str]]]) -> None:
    state: dict[str, str] = {}
    before: dict[str, frozenset[str]] = {}
    for wanted in history:
        state = balanced(state, balancer_changes(SPEC, before, wanted))
        before = wanted
    groups = {k: v for k, v in state.items() if not k.startswith("hop")}
    expected = balanced({}, balancer_changes(SPEC, {}, before))
    assert groups == {k: v for k, v in expected.items() if not k.startswith("hop")}
    assert balancer_changes(SPEC, before, before) == [] or not before
