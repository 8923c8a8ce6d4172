"""Names and filters."""

import ipaddress

import pytest

from fimbria.cli import match
from fimbria.cli.match import NotFound

PODS = [
    {
        "namespace": "a",
        "pod": "web",
        "id": 1,
        "ipv4": "10.0.0.1",
        "ipv6": "fd00::1",
        "interface": "fim1",
        "container_id": "abcdef12",
    },
    {
        "namespace": "b",
        "pod": "web",
        "id": 2,
        "ipv4": "10.0.0.2",
        "ipv6": "fd00::2",
        "interface": "fim2",
        "container_id": "abcdee34",
    },
    {"namespace": "b", "pod": "db", "id": 3, "ipv4": "10.0.0.3", "ipv6": "", "interface": "fim3", "container_id": "99"},
]


@pytest.mark.parametrize(
    ("name", "number"),
    [("a/web", 1), ("2", 2), ("db", 3), ("10.0.0.1", 1), ("fd00:0::2", 2), ("abcdef", 1), ("abcdee3", 2), ("fim3", 3)],
)
def test_one_endpoint(name: str, number: int) -> None:
    assert match.one(PODS, name, "pod", match.endpoint_names)["id"] == number


def test_ambiguous_names_say_which() -> None:
    with pytest.raises(NotFound, match="'web' could be any of a/web, b/web"):
        match.one(PODS, "web", "pod", match.endpoint_names)


def test_unknown_names_get_a_hint_or_the_list() -> None:
    with pytest.raises(NotFound, match="Did you mean 'a/web'"):
        match.one(PODS, "a/wbe", "pod", match.endpoint_names)
    with pytest.raises(NotFound, match="there are a/web, b/db, b/web"):
        match.one(PODS, "zzzzz", "pod", match.endpoint_names)
    with pytest.raises(NotFound, match="none at all"):
        match.one([], "x", "pod", match.endpoint_names)


def test_fixed_identities_by_name() -> None:
    rows = [{"id": 2, "labels": ["reserved:world"]}, {"id": 300, "labels": ["k8s:world"]}]
    assert match.one(rows, "world", "identity", match.identity_names)["id"] == 2
    assert match.one(rows, "300", "identity", match.identity_names)["id"] == 300


def test_services_by_address_and_name() -> None:
    rows = [
        {"service": "a/web", "frontend": "10.96.0.1:80"},
        {"service": "a/web", "frontend": "[fd00::a]:80"},
        {"service": "b/web", "frontend": "10.96.0.2:80"},
    ]

    def find(name: str) -> list[str]:
        found = match.some(rows, name, "service", match.service_names, lambda r: str(r["service"]))
        return [r["frontend"] for r in found]

    assert find("a/web") == ["10.96.0.1:80", "[fd00::a]:80"]
    assert find("10.96.0.2") == ["10.96.0.2:80"]
    assert find("fd00::a") == ["[fd00::a]:80"]
    with pytest.raises(NotFound, match="any of a/web, b/web"):
        find("web")


def test_labels() -> None:
    have = ["k8s:app=web", "reserved:host", "any:x="]
    assert match.labels(have, ["app=web", "k8s:app", "host", "reserved:host"])
    assert match.labels(have, [])
    assert not match.labels(have, ["app=db"])
    assert not match.labels(have, ["app=web", "tier"])


def test_prefixes() -> None:
    assert match.within("10.1.2.0/24", ipaddress.ip_network("10.0.0.0/8"))
    assert not match.within("fd00::/64", ipaddress.ip_network("10.0.0.0/8"))
    order = sorted(["fd00::/64", "10.0.0.0/24", "9.0.0.0/8", "10.0.0.0/8"], key=match.prefix_order)
    assert order == ["9.0.0.0/8", "10.0.0.0/8", "10.0.0.0/24", "fd00::/64"]
