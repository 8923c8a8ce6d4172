"""The named ports of each identity, kept one by one, against all pods taken together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fimbria.compute.identity_ports import IdentityPorts, ports_of
from fimbria.compute.policy_shapes import NO_PORTS, Ports
from fimbria.model.endpoint import NamedPort

Said = tuple[int, tuple[NamedPort, ...]]

# Few of everything, so that pods share ports, name one twice, and change one thing and not the other.
port = st.builds(NamedPort, st.sampled_from(["web", "dns"]), st.sampled_from([6, 17]), st.sampled_from([53, 80]))
said = st.tuples(st.integers(0, 3), st.lists(port, max_size=3).map(tuple))
step = st.lists(st.tuples(st.integers(0, 4), said), max_size=4)


def naive(pods: dict[int, Said]) -> dict[int, Ports]:
    found = {number: ports_of(p for n, ports in pods.values() if n == number for p in ports) for number in (1, 2, 3)}
    return {number: ports for number, ports in found.items() if ports}


@given(st.lists(step, max_size=12))
def test_against_all_pods_taken_together(steps: list[list[tuple[int, Said]]]) -> None:
    """Pods come, change ports, change identity, and go; nobody who is gone leaves anything behind."""
    ports, pods, told = IdentityPorts(), dict[int, Said](), dict[int, Ports]()
    for changes in steps:
        for pod, (identity, named) in changes:
            ports.put(pod, identity, named)
            pods[pod] = identity, named
        for identity, known in ports.changes():
            told[identity] = known
        assert {number: known for number, known in told.items() if known} == naive(pods)
    for pod in pods:
        ports.put(pod, 0, ())
    told.update(ports.changes())
    assert not any(told.values()) and not ports._said and not ports._counts


def test_a_pod_that_brings_nothing_new_is_no_change() -> None:
    """Else every pod of an identity would have all policies about it looked at."""
    ports, web = IdentityPorts(), NamedPort("web", 6, 80)
    ports.put("a", 300, (web,))
    assert list(ports.changes()) == [(300, frozenset({("web", 6, 80)}))]
    ports.put("b", 300, (web, web))
    ports.put("a", 300, ())
    assert not list(ports.changes())
    ports.put("b", 301, (web,))
    assert dict(ports.changes()) == {300: NO_PORTS, 301: frozenset({("web", 6, 80)})}
