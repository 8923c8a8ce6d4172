"""Ports of the node that lead to a pod: which frontends they become."""

from fimbria.compute import host_ports
from fimbria.compute.service import Extra, ServiceCompute
from fimbria.compute.service_frontends import HOST_PORT, UNSPECIFIED
from fimbria.decide.numbers import Numbers
from fimbria.model.address import pack
from fimbria.model.endpoint import HostPort, LocalEndpoint
from fimbria.model.rows import FrontendKey
from fimbria.model.service import Service, ServiceKey, ServicePort

NODE4, NODE6 = pack("192.0.2.1"), pack("2001:db8::1")
LO4, LO6 = pack("127.0.0.1"), pack("::1")


def endpoint(*ports: HostPort, v6: bool = True, number: int = 5) -> LocalEndpoint:
    return LocalEndpoint(
        id=number, container_id="c", ifname="eth0", network="fimbria", netns="", namespace="ns", pod="web", uid="",
        host_ifname="fim5", ifindex=10, pod_mac=bytes(6), host_mac=bytes(6), addr4=pack("10.0.0.5"),
        addr6=pack("fd00::5") if v6 else bytes(16), host_ports=ports,
    )  # fmt: skip


def extras(*ports: HostPort, v6: bool = True) -> tuple[Extra, ...]:
    return host_ports.extras(endpoint(*ports, v6=v6), (NODE4, NODE6, NODE4), lambda _key: None)


def led(found: tuple[Extra, ...]) -> dict[bytes, bytes]:
    return {key.addr: extra.backends[0][0] for extra in found for key in extra.frontends}


def test_without_an_address_it_is_every_one_of_the_node_in_both_families() -> None:
    found = extras(HostPort(8080, 80, 6))
    v4, v6 = pack("10.0.0.5"), pack("fd00::5")
    assert led(found) == {NODE4: v4, LO4: v4, NODE6: v6, LO6: v6}
    assert {(k.port, k.proto, k.scope) for e in found for k in e.frontends} == {(8080, 6, 0)}
    assert {e.backends[0][1:] for e in found} == {(80, 6)}
    assert {e.flags for e in found} == {HOST_PORT}


def test_an_address_limits_it() -> None:
    assert led(extras(HostPort(1, 2, 17, LO4))) == {LO4: pack("10.0.0.5")}
    assert led(extras(HostPort(1, 2, 17, NODE6))) == {NODE6: pack("fd00::5")}
    assert led(extras(HostPort(1, 2, 17, pack("0.0.0.0")))).keys() == {NODE4, LO4}
    assert led(extras(HostPort(1, 2, 17, pack("::")))).keys() == {NODE6, LO6}
    assert extras(HostPort(1, 2, 17, NODE6), v6=False) == ()


def test_a_node_port_goes_first() -> None:
    taken = {FrontendKey(UNSPECIFIED[True], 30080, 6)}
    found = host_ports.extras(endpoint(HostPort(30080, 80, 6), HostPort(30080, 80, 17)), (NODE4,), taken.__contains__)
    cells = {(k.addr, k.proto) for e in found for k in e.frontends}
    assert cells == {(LO6, 6), (NODE4, 17), (LO4, 17), (LO6, 17)}


def test_two_pods_of_one_name_are_two_owners_and_services_go_first() -> None:
    compute = ServiceCompute("n", Numbers("services"), Numbers("backends"))
    old, new = endpoint(HostPort(80, 80, 6), number=5), endpoint(HostPort(80, 81, 6), number=6)
    for each in (old, new):
        compute.set_extra(host_ports.owner(each), host_ports.extras(each, (NODE4,), compute.claimed))
    compute.set_extra(host_ports.owner(old), ())
    assert {(b.addr, b.port) for b in compute.all_rows()["backends"].values()} == {
        (pack("10.0.0.5"), 81), (pack("fd00::5"), 81),
    }  # fmt: skip
    web = ServiceKey("ns", "svc")
    compute.update(web, Service(web, (pack("10.96.0.1"),), (ServicePort("", 80, 6),),
                                external_ips=(NODE4,)))  # fmt: skip
    assert str(compute.claimed(FrontendKey(NODE4, 80, 6))) == "service ns/svc"
    assert compute.conflicts(host_ports.owner(new)) == ("port 80 of 192.0.2.1 already belongs to service ns/svc",)
