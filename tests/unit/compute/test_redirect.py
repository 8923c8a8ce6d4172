"""Local redirects: which frontends they take over, and for whom not."""

from fimbria.compute import redirect
from fimbria.compute.service import ServiceCompute
from fimbria.compute.service_frontends import CLUSTER_IP, EXEMPT
from fimbria.decide.numbers import Numbers
from fimbria.model.address import pack
from fimbria.model.policy import PolicyId, Selector
from fimbria.model.redirect import LocalPod, Redirect, RedirectPort
from fimbria.model.rows import ExemptKey, FrontendKey
from fimbria.model.service import Endpoint, EndpointPort, EndpointSlice, Service, ServiceKey, ServicePort

DNS = ServiceKey("kube-system", "dns")
UDP, TCP = RedirectPort("dns", 53, 17), RedirectPort("dns-tcp", 53, 6)
VIP4, VIP6 = pack("10.96.0.10"), pack("fd96::a")
SERVICE = Service(DNS, (VIP4, VIP6), (ServicePort("dns", 53, 17), ServicePort("dns-tcp", 53, 6)))
CACHE = LocalPod(5, 1 << 33, (pack("10.0.0.5"), pack("fd00::5")), True)
OTHER = LocalPod(6, 0, (pack("10.0.0.6"),), True)


def policy(*ports: RedirectPort, targets: tuple[RedirectPort, ...] = (UDP, TCP), addr: str = "", skip: bool = False,
           name: str = "cache") -> Redirect:  # fmt: skip
    key = None if addr else DNS
    own = PolicyId("CiliumLocalRedirectPolicy", "kube-system", name)
    return Redirect(own, pack(addr) if addr else None, key, ports, Selector(), targets, skip)


def led(wanted: Redirect, service: Service | None, *pods: LocalPod) -> dict[FrontendKey, set[tuple[bytes, int]]]:
    found = redirect.extras(wanted, service, pods)
    return {key: {(a, p) for a, p, _ in extra.backends} for extra in found for key in extra.frontends}


def test_every_port_of_a_service_in_both_families() -> None:
    behind = (UDP._replace(port=5353), TCP._replace(port=5354))
    v4, v6 = {CACHE.addrs[0], OTHER.addrs[0]}, {CACHE.addrs[1]}
    assert led(policy(targets=behind), SERVICE, CACHE, OTHER) == {
        FrontendKey(VIP4, 53, 17): {(a, 5353) for a in v4}, FrontendKey(VIP4, 53, 6): {(a, 5354) for a in v4},
        FrontendKey(VIP6, 53, 17): {(a, 5353) for a in v6}, FrontendKey(VIP6, 53, 6): {(a, 5354) for a in v6},
    }  # fmt: skip


def test_only_the_ports_that_are_named() -> None:
    assert {k.proto for k in led(policy(TCP), SERVICE, CACHE)} == {6}
    assert led(policy(RedirectPort("dns", 54, 17)), SERVICE, CACHE) == {}


def test_without_a_ready_pod_nothing_is_asked_for() -> None:
    assert led(policy(), SERVICE, CACHE._replace(ready=False)) == {}
    assert {k.addr for k in led(policy(), SERVICE, OTHER)} == {VIP4}, "the other family goes to the Service's endpoints"
    assert led(policy(), None, CACHE) == {}


def test_one_port_on_both_sides_needs_no_name() -> None:
    one = policy(RedirectPort("", 80, 6), targets=(RedirectPort("x", 8080, 6),), addr="169.254.169.254")
    assert led(one, None, CACHE) == {FrontendKey(pack("169.254.169.254"), 80, 6): {(CACHE.addrs[0], 8080)}}


def test_flags_and_exemptions() -> None:
    assert {e.flags for e in redirect.extras(policy(), SERVICE, [CACHE])} == {CLUSTER_IP}
    assert {e.flags for e in redirect.extras(policy(skip=True), SERVICE, [CACHE])} == {CLUSTER_IP | EXEMPT}
    assert set(redirect.exempt(policy(skip=True), (7,), (CACHE, OTHER))) == {
        ExemptKey(5, 7, 1), ExemptKey(1 << 33, 7, 0), ExemptKey(6, 7, 1),
    }  # fmt: skip
    assert not set(redirect.exempt(policy(), (7,), (CACHE,)))


def test_reasons() -> None:
    def why(wanted: Redirect, service: Service | None, *pods: LocalPod, foreign: bool = False) -> str:
        return "; ".join(redirect.problems(wanted, service, pods, foreign=foreign))

    assert why(policy(), SERVICE, CACHE) == ""
    assert "no ready pod" in why(policy(), SERVICE)
    assert "no Service kube-system/dns" in why(policy(), None, CACHE)
    assert "no cluster IP" in why(policy(), Service(DNS), CACHE)
    assert "counterpart" in why(policy(targets=(RedirectPort("x", 1, 6),)), SERVICE, CACHE)
    assert "10.0.0.9 is the address" in why(policy(UDP, addr="10.0.0.9"), None, CACHE, foreign=True)


def test_a_service_goes_on_when_the_last_local_pod_goes() -> None:
    compute = ServiceCompute("n", Numbers("services"), Numbers("backends"))
    remote = pack("10.0.1.1")
    ports = (EndpointPort("dns", 53, 17), EndpointPort("dns-tcp", 53, 6))
    compute.update(DNS, SERVICE, [EndpointSlice("s", DNS, True, ports, (Endpoint(remote, "other"),))])

    def serving() -> set[bytes]:
        rows = compute.all_rows()
        number = rows["frontends"][FrontendKey(VIP4, 53, 17)].service
        return {rows["backends"][b].addr for slot, b in rows["service_slots"].items() if slot.service == number}

    owner = redirect.owner(policy())
    compute.set_extra(owner, redirect.extras(policy(), SERVICE, [CACHE]))
    assert serving() == {CACHE.addrs[0]}
    compute.set_extra(owner, redirect.extras(policy(), SERVICE, [CACHE._replace(ready=False)]))
    assert serving() == {remote}


def test_naming_a_services_address_does_not_take_it_over() -> None:
    compute = ServiceCompute("n", Numbers("services"), Numbers("backends"))
    wanted = policy(UDP, addr="10.96.0.10")
    compute.set_extra(redirect.owner(wanted), redirect.extras(wanted, None, [CACHE]))
    compute.update(DNS, SERVICE, [])
    assert str(compute.claimed(FrontendKey(VIP4, 53, 17))) == "service kube-system/dns"
    assert "already belongs to service kube-system/dns" in "".join(compute.conflicts(redirect.owner(wanted)))
