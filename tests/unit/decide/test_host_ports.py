"""Who has which port of the node."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.decide.host_ports import HostPorts, HostPortTaken
from fimbria.model.address import pack
from fimbria.model.endpoint import HostPort

IPS = {"every": b"", "v4": pack("0.0.0.0"), "v6": pack("::"), "one": pack("192.0.2.1"), "other": pack("192.0.2.2"),
       "six": pack("fd00::1")}  # fmt: skip
MEANS = {"every": {"one", "other", "six"}, "v4": {"one", "other"}, "v6": {"six"}, "one": {"one"}, "other": {"other"},
         "six": {"six"}}  # fmt: skip


def port(number: int = 80, proto: int = 6, ip: str = "every", container: int = 8080) -> HostPort:
    return HostPort(number, container, proto, IPS[ip])


@pytest.mark.parametrize(("one", "other"), list(itertools.product(IPS, IPS)))
def test_two_pods_have_no_address_in_common(one: str, other: str) -> None:
    ports = HostPorts()
    ports.claim("a", [port(ip=one)])
    if MEANS[one] & MEANS[other]:
        with pytest.raises(HostPortTaken) as caught:
            ports.claim("b", [port(ip=other)])
        assert caught.value.owner == "a" and "80/TCP" in str(caught.value)
        assert ports.owners == {"a"}
        ports.release("a")
    ports.claim("b", [port(ip=other)])


def test_protocols_and_numbers_are_apart() -> None:
    ports = HostPorts()
    ports.claim("a", [port(80), port(80, 17), port(81)])
    ports.claim("b", [port(80, 132), port(82)])
    with pytest.raises(HostPortTaken):
        ports.claim("c", [port(83), port(82)])
    ports.claim("c", [port(83)])
    assert ports.owners == {"a", "b", "c"}


def test_a_claim_takes_the_place_of_the_former_one() -> None:
    ports = HostPorts()
    ports.claim("a", [port(80)])
    ports.claim("a", [port(81)])
    ports.claim("b", [port(80)])
    with pytest.raises(HostPortTaken):
        ports.claim("a", [port(80)])
    with pytest.raises(HostPortTaken):
        ports.claim("b", [port(81)])
    ports.claim("a", [])
    ports.claim("b", [port(81)])
    assert ports.owners == {"b"}


def test_one_port_leads_to_one_port_of_the_pod() -> None:
    ports = HostPorts()
    with pytest.raises(HostPortTaken, match="two ports"):
        ports.claim("a", [port(80, container=1), port(80, container=2, ip="one")])
    ports.claim("a", [port(80, container=1, ip="v4"), port(80, container=2, ip="v6")])
    ports.claim("b", [port(81, container=1), port(81, container=1, ip="one")])


@given(st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.builds(
    port, st.integers(1, 3), st.sampled_from((6, 17)), st.sampled_from(list(IPS)), st.just(8080)), max_size=3)),
    max_size=12))  # fmt: skip
def test_whatever_is_claimed_no_address_and_port_has_two_owners(steps: list[tuple[str, list[HostPort]]]) -> None:
    ports, has, names = HostPorts(), dict[str, list[HostPort]](), {ip: name for name, ip in IPS.items()}
    for owner, wanted in steps:
        try:
            ports.claim(owner, wanted)
        except HostPortTaken:
            others = {(p.port, p.proto, m) for o, ps in has.items() if o != owner for p in ps
                      for m in MEANS[names[p.host_ip]]}  # fmt: skip
            assert any((p.port, p.proto, m) in others for p in wanted for m in MEANS[names[p.host_ip]])
        else:
            has[owner] = wanted
        cells = [(p.port, p.proto, m, o) for o, ps in has.items() for p in ps for m in MEANS[names[p.host_ip]]]
        assert len({c[:3] for c in cells}) == len(set(cells))
    for owner in has:
        ports.release(owner)
    assert not ports.owners and not ports._claims
