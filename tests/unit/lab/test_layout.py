"""Names and addresses of a lab."""

import re
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.lab.errors import LabError
from fimbria.lab.layout import MAX_NODES, LabSpec, Paths, check_name


def test_defaults_are_valid() -> None:
    LabSpec().check()


@given(st.integers(1, MAX_NODES))
def test_every_member_has_a_subnet_of_its_own(nodes: int) -> None:
    members = list(LabSpec(nodes=nodes).members())
    for version in ("ipv4", "ipv6"):
        nets = {ip_network(f"{getattr(m, version)}/{getattr(m, version + '_prefix')}", strict=False) for m in members}
        assert len(nets) == len(members)
    for m in members:
        for address, gateway, prefix in ((m.ipv4, m.gateway4, m.ipv4_prefix), (m.ipv6, m.gateway6, m.ipv6_prefix)):
            assert ip_address(gateway) in ip_network(f"{address}/{prefix}", strict=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "Upper"}, "lower-case"),
        ({"name": "a.b"}, "lower-case"),
        ({"name": ""}, "lower-case"),
        ({"name": "-a"}, "lower-case"),
        ({"nodes": 0}, "1 to 200 nodes"),
        ({"nodes": 201}, "1 to 200 nodes"),
        ({"routing": "magic"}, "overlay, native"),
        ({"mtu": 1000}, "1280"),
        ({"ipv4_pool": "172.31.4.0/22"}, "pod IPv4 pool 172.31.4.0/22 overlaps fabric IPv4 172.31.0.0/16"),
        ({"ipv4_pool": "198.51.0.0/16"}, "overlaps outside world"),
        ({"ipv6_pool": "fd00::/16"}, "overlaps"),
        ({"service_ipv4": "10.244.3.0/24"}, "overlaps"),
        ({"ipv4_pool": "10.0.0.0/25"}, "too small, at most /24"),
        ({"ipv4_pool": "10.0.0.1/16"}, "host bits"),
        ({"ipv4_pool": "fd00::/64"}, "is IPv6, IPv4 is needed"),
        ({"fabric_ipv4": "10.9.0.0/17"}, "too small"),
        ({"ipv4_pool": "", "ipv6_pool": ""}, "at least one pod pool"),
    ],
)
def test_errors_name_what_is_wrong(settings: dict[str, object], message: str) -> None:
    with pytest.raises(LabError, match=re.escape(message)):
        LabSpec(**settings).check()  # type: ignore[arg-type]


def test_unknown_node() -> None:
    with pytest.raises(LabError, match="has no node 'node4'; it has node1, node2, node3"):
        LabSpec().node("node4")


@given(
    st.from_regex(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?", fullmatch=True),
    st.from_regex(r"[a-z0-9-]{1,10}", fullmatch=True),
)
def test_no_labs_names_begin_with_anothers(name: str, more: str) -> None:
    check_name(name)
    assert not Paths(name + more).netns_name("node1").startswith(Paths(name).netns_name(""))


def test_world_speaks_documentation_addresses() -> None:
    world = LabSpec().world
    assert (world.ipv4, world.ipv6) == ("198.51.100.10", "2001:db8::10")
