"""Which connections are tried, and what must come of them."""

import pytest

from fimbria.cli.connectivity.scenario import (
    BALANCED,
    CLIENTS,
    PORTS,
    SERVERS,
    SERVICES,
    SPREAD,
    STICKY,
    External,
    Places,
    one_node,
    parse_external,
    probes,
)

MORE = (SPREAD, STICKY, BALANCED, "kubernetes")
FAMILIES = {4: "10.0.0.{}", 6: "fd00::{}"}


def places(*families: int, external: External | None = None, whole: bool = False) -> Places:
    """With `whole` as in a cluster with DNS, Cilium's policies, a load balancer, host ports."""

    def addresses(number: int) -> dict[int, str]:
        return {f: FAMILIES[f].format(number) for f in families}

    return Places(
        {s.name: addresses(i + 1) for i, s in enumerate(SERVERS)},
        {name: addresses(i + 50) for i, name in enumerate((*SERVICES, *(MORE if whole else ())))},
        38080,
        external,
        {name: 30000 + i for i, name in enumerate(SERVICES)},
        namespace="ns",
        mapped_port=38081 if whole else 0,
        names=whole,
        cilium=whole,
    )


def test_every_client_and_server_has_a_part() -> None:
    found = probes(places(4, whole=True))
    assert {p.client for p in found} == {c.name for c in CLIENTS}
    words = {p.target.removeprefix("pod ").removeprefix("service ").replace("host ", "host-") for p in found}
    assert {s.name for s in SERVERS} <= words
    assert {p.target for p in found if p.target.startswith("service")} == {f"service {s}" for s in (*SERVICES, *MORE)}


def test_what_a_cluster_has_not_is_not_tried() -> None:
    checks = {p.check for p in probes(places(4, 6, whole=True))} - {p.check for p in probes(places(4, 6))}
    assert {c.partition(":")[0] for c in checks} == {
        "service, both backends are used", "service, session affinity", "load balancer", "service of the API server",
        "name of a service", "name of a headless service", "service, by its name", "host port of another node",
        "CiliumNetworkPolicy",
    }  # fmt: skip


def test_names_have_all_addresses_of_their_family() -> None:
    found = [p for p in probes(places(4, 6, whole=True)) if p.proto == "dns"]
    assert {p.address for p in found} == {"far", "far.ns", "far.ns.svc", "headless.ns.svc"}
    assert [p.want for p in found if p.address == "headless.ns.svc"] == [
        ("10.0.0.1", "10.0.0.2"),
        ("fd00::1", "fd00::2"),
    ]


def test_denials_by_cilium_have_an_allowed_twin() -> None:
    found = [p for p in probes(places(4, whole=True)) if p.target == "pod barred"]
    assert [(p.client, p.proto) for p in found if p.allowed] == [("friend", "http")]
    assert {(p.client, p.proto) for p in found if not p.allowed} == {
        ("friend", "tcp"), ("walled", "http"), ("plain", "http"),
    }  # fmt: skip


def test_both_families_alike() -> None:
    four, six, both = probes(places(4)), probes(places(6)), probes(places(4, 6))
    assert len(four) == len(six)
    assert both == four + six
    assert all((":" in p.address) == (p.family == 6) for p in both)


def test_what_policies_must_deny() -> None:
    denied = {(p.client, p.target, p.proto) for p in probes(places(4)) if not p.allowed}
    assert denied == {
        ("plain", "pod guarded", "http"),
        ("friend", "pod guarded", "tcp"),
        ("plain", "service guarded", "http"),
        ("friend", "pod closed", "http"),
        ("walled", "pod fenced", "http"),
        ("caged", "pod near", "http"),
        ("caged", "pod far", "http"),
    }


def test_every_denial_has_an_allowed_twin() -> None:
    """So that "denied" can't pass because everything of that client or server is broken under policies."""
    found = probes(places(4))
    for client in ("friend", "walled", "plain"):
        assert any(p.allowed for p in found if p.client == client)
    assert any(p.allowed for p in found if p.target == "pod guarded")


def test_ports() -> None:
    for p in probes(places(4)):
        if p.target.startswith("pod "):
            assert p.port == PORTS[p.proto]
        elif p.target.startswith("service "):
            number = SERVICES.index(p.target.removeprefix("service "))
            assert p.port == (30000 + number if "node port" in p.check else 80)
        else:
            assert p.port == 38080


def test_one_node_leaves_out_what_needs_two() -> None:
    found = one_node(probes(places(4, 6)))
    assert found
    assert not [p for p in found if p.target == "host far" or "other node" in p.check]
    assert {p.check for p in found} >= {"pod to pod, same node", "default deny", "service, from a node"}


def test_node_ports_of_both_nodes_for_backends_on_both() -> None:
    found = {(p.client, p.target, p.check) for p in probes(places(4)) if p.check.startswith("node port")}
    assert len(found) == 8
    assert not [p for p in probes(Places(places(4).pods, places(4).services, 1)) if p.check.startswith("node port")]


def test_nodes_may_have_a_family_that_pods_lack() -> None:
    both, four = places(4, 6), places(4)
    pods = {name: (both if name.startswith("host") else four).pods[name] for name in four.pods}
    assert probes(Places(pods, four.services, 38080, None, four.node_ports)) == probes(four)


def test_nothing_for_addresses_that_are_missing() -> None:
    assert probes(Places({}, {}, 1)) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.1:80", External("http", "192.0.2.1", 80)),
        ("http://[2001:db8::1]:8080", External("http", "2001:db8::1", 8080)),
        ("udp://192.0.2.1:53", External("udp", "192.0.2.1", 53)),
    ],
)
def test_external(text: str, expected: External) -> None:
    found = parse_external(text)
    assert found == expected
    last = probes(places(4, external=found))[-1]
    assert (last.check, last.address, last.family) == ("to the outside", expected.address, expected.family)


@pytest.mark.parametrize(
    "text", ["", "example.org:80", "192.0.2.1", "192.0.2.1:0", "192.0.2.1:70000", "ftp://1.2.3.4:1"]
)
def test_external_that_cannot_be_used(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_external(text)
