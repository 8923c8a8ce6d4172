"""Single rules of ServiceCompute; random histories are in tests/properties/test_service.py."""

from dataclasses import replace
from typing import Any

from fimbria.compute import service_frontends as front
from fimbria.compute.service import (
    BACKENDS,
    FRONTENDS,
    HOST_PORT,
    REDIRECT,
    SERVICE,
    SLOTS,
    Delta,
    Extra,
    Owner,
    ServiceCompute,
)
from fimbria.compute.service_claims import LOCAL_REDIRECT
from fimbria.compute.service_rows import no_rows
from fimbria.decide.numbers import Numbers
from fimbria.model.address import pack
from fimbria.model.rows import Backend, Frontend, FrontendKey, SlotKey
from fimbria.model.service import Endpoint, EndpointPort, EndpointSlice, Service, ServiceKey, ServicePort

KEY = ServiceKey("default", "web")
IP = pack("10.96.0.1")
WEB = Service(KEY, (IP,), (ServicePort("http", 80, 6),))
FRONTEND = FrontendKey(IP, 80, 6)
ADDRESS = {FrontendKey(IP, 0, 0): Frontend(0, 0, front.ADDRESS | front.CLUSTER_IP)}
READY, NOT_READY = Endpoint(b""), Endpoint(b"", ready=False, serving=False)
DRAINING = Endpoint(b"", ready=False, serving=True, terminating=True)


def pod(n: int, like: Endpoint = READY, node: str = "here") -> Endpoint:
    return Endpoint(pack(f"10.0.{n >> 8}.{n & 255}"), node, like.ready, like.serving, like.terminating)


def part(*endpoints: Endpoint, name: str = "s1", port: int = 8080, key: ServiceKey = KEY) -> EndpointSlice:
    return EndpointSlice(name, key, True, (EndpointPort("http", port, 6),), endpoints)


def compute() -> ServiceCompute:
    return ServiceCompute("here", Numbers("service ports"), Numbers("backends"))


def slots(rows: dict[str, dict[Any, Any]], frontend: FrontendKey = FRONTEND) -> list[int]:
    """Last bytes of the backends' addresses in slot order."""
    row = rows[FRONTENDS][frontend]
    return [rows[BACKENDS][rows[SLOTS][SlotKey(row.service, n)]].addr[15] for n in range(row.count)]


def test_rows_of_one_service() -> None:
    c = compute()
    delta = c.update(KEY, WEB, (part(pod(1), pod(2)),))
    assert delta.upserts == c.all_rows() == no_rows() | {
        BACKENDS: {1: Backend(pod(1).addr, 8080, 6), 2: Backend(pod(2).addr, 8080, 6)},
        SLOTS: {SlotKey(1, 0): 1, SlotKey(1, 1): 2},
        FRONTENDS: {FRONTEND: Frontend(1, 2, 1)} | ADDRESS,
    }  # fmt: skip
    assert c.service_of(1) == (KEY, ServicePort("http", 80, 6))
    assert c.service_of(2) is None


def test_no_endpoints_refuses() -> None:
    c = compute()
    c.update(KEY, WEB)
    assert c.all_rows() == no_rows() | {FRONTENDS: {FRONTEND: Frontend(1, 0, 1)} | ADDRESS}


def test_headless_has_no_rows() -> None:
    c = compute()
    assert not c.update(KEY, Service(KEY, (), WEB.ports), (part(pod(1)),))
    assert not any(c.all_rows().values())


def test_a_deleted_service_leaves_nothing() -> None:
    c = compute()
    before = c.update(KEY, WEB, (part(pod(1)),)).upserts
    delta = c.update(KEY, None)
    assert not any(c.all_rows().values())
    assert delta.deletes == {name: set(rows) for name, rows in before.items()}
    assert not c.update(KEY, None)


def test_terminating_endpoints_serve_only_if_nothing_is_ready() -> None:
    c = compute()
    c.update(KEY, WEB, (part(pod(1), pod(2, DRAINING), pod(3, NOT_READY)),))
    assert slots(c.all_rows()) == [1]
    c.update(KEY, WEB, (part(pod(1, NOT_READY), pod(2, DRAINING), pod(3, NOT_READY)),))
    assert slots(c.all_rows()) == [2]
    c.update(KEY, WEB, (part(pod(1, NOT_READY), pod(2, NOT_READY), pod(3)),))
    assert slots(c.all_rows()) == [3]


def test_endpoints_that_do_not_serve_keep_their_backend_row_while_listed() -> None:
    c = compute()
    c.update(KEY, WEB, (part(pod(1), pod(2)),))
    delta = c.update(KEY, WEB, (part(pod(1), pod(2, DRAINING)),))
    assert set(c.all_rows()[BACKENDS]) == {1, 2}
    assert not delta.deletes[BACKENDS]
    delta = c.update(KEY, WEB, (part(pod(1)),))
    assert {name: keys for name, keys in delta.deletes.items() if keys} == {BACKENDS: {2}}


def test_publish_not_ready_addresses() -> None:
    c = compute()
    service = Service(KEY, WEB.cluster_ips, WEB.ports, publish_not_ready=True)
    c.update(KEY, service, (part(pod(1, NOT_READY), pod(2, DRAINING)),))
    assert slots(c.all_rows()) == [1, 2]


def test_internal_traffic_policy_local() -> None:
    c = compute()
    local = Service(KEY, WEB.cluster_ips, WEB.ports, internal_local=True)
    c.update(KEY, local, (part(pod(1, node="there"), pod(2), pod(3, node="")),))
    assert slots(c.all_rows()) == [2]
    c.update(KEY, local, (part(pod(1, node="there"), pod(2, DRAINING)),))
    assert slots(c.all_rows()) == [2]
    c.update(KEY, local, (part(pod(1, node="there")),))
    assert slots(c.all_rows()) == []


def test_ports_are_matched_by_name_and_protocol_and_may_differ_by_slice() -> None:
    c = compute()
    other = EndpointSlice("s3", KEY, True, (EndpointPort("http", 8080, 17), EndpointPort("dns", 53, 6)), (pod(9),))
    c.update(KEY, WEB, (part(pod(1), port=8080), part(pod(2), name="s2", port=9090), other))
    assert {(b.addr[15], b.port) for b in c.all_rows()[BACKENDS].values()} == {(1, 8080), (2, 9090)}


def test_an_endpoint_in_two_slices_is_one_backend_and_ready_if_either_says_so() -> None:
    c = compute()
    both = (part(pod(1)), part(pod(1, NOT_READY), name="s2"))
    c.update(KEY, WEB, both)
    assert slots(c.all_rows()) == [1]
    assert not c.update(KEY, WEB, both[:1])
    c.update(KEY, WEB, both[1:])
    assert slots(c.all_rows()) == []


def test_dual_stack_has_a_frontend_of_each_family() -> None:
    c = compute()
    ip6, pod6 = pack("fd96::1"), pack("fd00::7")
    service = Service(KEY, (IP, ip6), WEB.ports)
    six = EndpointSlice("s6", KEY, False, (EndpointPort("http", 8080, 6),), (Endpoint(pod6),))
    c.update(KEY, service, (part(pod(1)), six))
    assert slots(c.all_rows()) == [1]
    assert slots(c.all_rows(), FrontendKey(ip6, 80, 6)) == [7]


def test_removing_one_of_many_moves_the_last_into_its_slot() -> None:
    c = compute()
    parts = [part(*(pod(n * 100 + i) for i in range(100)), name=f"s{n}") for n in range(100)]
    c.update(KEY, WEB, parts)
    flapping = part(*parts[3].endpoints[1:], name="s3")
    delta = c.update(KEY, WEB, [*parts[:3], flapping, *parts[4:]])
    assert delta.upserts == no_rows() | {
        BACKENDS: {},
        SLOTS: {SlotKey(1, 300): 10_000},
        FRONTENDS: {FRONTEND: Frontend(1, 9999, 1)},
    }
    assert {name: keys for name, keys in delta.deletes.items() if keys} == {BACKENDS: {301}, SLOTS: {SlotKey(1, 9999)}}
    delta = c.update(KEY, WEB, parts)
    assert delta.upserts == no_rows() | {
        BACKENDS: {10_001: Backend(pod(300).addr, 8080, 6)},
        SLOTS: {SlotKey(1, 9999): 10_001},
        FRONTENDS: {FRONTEND: Frontend(1, 10_000, 1)},
    }
    assert not any(delta.deletes.values())


def test_a_replaced_endpoint_takes_over_the_slot() -> None:
    c = compute()
    c.update(KEY, WEB, (part(pod(1), pod(2), pod(3)),))
    delta = c.update(KEY, WEB, (part(pod(1), pod(4), pod(3)),))
    assert slots(c.all_rows()) == [1, 4, 3]
    assert len(delta) == 3  # backend 4, its slot, backend 2 deleted


def test_a_backend_that_moves_to_another_frontend_keeps_its_number() -> None:
    c = compute()
    c.update(KEY, WEB, (part(pod(1)),))
    moved = Service(KEY, WEB.cluster_ips, (ServicePort("http", 81, 6),))
    delta = c.update(KEY, moved, (part(pod(1)),))
    assert set(c.all_rows()[BACKENDS]) == {1}
    assert not delta.upserts[BACKENDS]
    assert not delta.deletes[BACKENDS]


def test_a_backend_of_two_services_goes_with_the_last_of_them() -> None:
    c = compute()
    other = ServiceKey("default", "other")
    c.update(KEY, WEB, (part(pod(1)),))
    c.update(other, Service(other, (pack("10.96.0.2"),), WEB.ports), (part(pod(1), key=other),))
    assert len(c.all_rows()[BACKENDS]) == 1
    assert not c.update(KEY, None).deletes[BACKENDS]
    assert c.update(other, None).deletes[BACKENDS] == {1}


def test_a_frontend_claimed_twice_belongs_to_the_first_by_name_and_the_other_says_so() -> None:
    c = compute()
    late = ServiceKey("default", "zzz")
    c.update(late, Service(late, (IP,), WEB.ports), (part(pod(2), key=late),))
    assert c.warnings(late) == ()
    c.update(KEY, WEB, (part(pod(1)),))
    assert slots(c.all_rows()) == [1]
    assert c.warnings(late) == ("port 80 of 10.96.0.1 already belongs to service default/web",)
    c.update(KEY, None)
    assert slots(c.all_rows()) == [2]
    assert c.warnings(late) == ()


def test_a_port_named_twice_counts_once() -> None:
    c = compute()
    c.update(KEY, Service(KEY, (IP,), (ServicePort("http", 80, 6), ServicePort("again", 80, 6))), (part(pod(1)),))
    assert slots(c.all_rows()) == [1]
    assert c.warnings(KEY) == ("it names the same port and protocol more than once; only the first counts",)


def test_warnings_of_the_objects_are_passed_on() -> None:
    c = compute()
    slice_ = EndpointSlice("s1", KEY, True, warnings=("endpoint left out: 'x' is not an IP address",))
    c.update(KEY, Service(KEY, (IP,), WEB.ports, warnings=("externalIPs: not supported yet",)), (slice_,))
    assert c.warnings(KEY) == (
        "externalIPs: not supported yet",
        "EndpointSlice s1: endpoint left out: 'x' is not an IP address",
    )
    assert c.warnings(ServiceKey("no", "such")) == ()


def test_restored_numbers_and_slots_survive_a_restart_with_changes() -> None:
    c = compute()
    c.update(KEY, WEB, (part(pod(1), pod(2), pod(3)),))
    c.update(KEY, WEB, (part(pod(2), pod(3)),))  # slots 3, 2
    rows = c.all_rows()
    again = compute()
    again.restore(rows[FRONTENDS], rows[SLOTS], rows[BACKENDS], spent_backends=[1, 9])
    delta = again.update(KEY, WEB, (part(pod(2), pod(3), pod(4)),))
    again.settle()
    assert slots(again.all_rows()) == [3, 2, 4]
    assert again.all_rows()[BACKENDS].keys() == {2, 3, 10}
    assert delta.upserts == again.all_rows()


def test_damaged_rows_are_not_restored() -> None:
    again = compute()
    again.restore(
        {FRONTEND: Frontend(1, 4, 1), FrontendKey(IP, 81, 6): Frontend(1, 4, 1)},
        {SlotKey(1, 0): 5, SlotKey(1, 1): 5, SlotKey(1, 3): 99, SlotKey(7, 0): 5},
        {5: Backend(pod(1).addr, 8080, 6), 6: Backend(pod(1).addr, 8080, 6)},
    )
    again.update(KEY, WEB, (part(pod(1), pod(2)),))
    again.settle()
    assert again.all_rows() == no_rows() | {
        BACKENDS: {5: Backend(pod(1).addr, 8080, 6), 7: Backend(pod(2).addr, 8080, 6)},
        SLOTS: {SlotKey(1, 0): 5, SlotKey(1, 1): 7},
        FRONTENDS: {FRONTEND: Frontend(1, 2, 1)} | ADDRESS,
    }


def test_merged_deltas_end_in_the_last_word() -> None:
    first, later = Delta(), Delta()
    first.put(BACKENDS, 1, "a")
    first.drop(BACKENDS, 2)
    later.drop(BACKENDS, 1)
    later.put(BACKENDS, 2, "b")
    first.merge(later)
    assert first.upserts[BACKENDS] == {2: "b"}
    assert first.deletes[BACKENDS] == {1}
    assert len(first) == 2
    assert not Delta()


# --- other claimants ---------------------------------------------------------------------------------------------

POD = Owner(HOST_PORT, "pod", "default", "proxy")
POLICY = Owner(REDIRECT, "policy", "default", "dns")
NODE_PORT = FrontendKey(front.UNSPECIFIED[True], 30080, 6)


def lead(frontend: FrontendKey, *pods: Endpoint, flags: int = front.HOST_PORT) -> Extra:
    return Extra((frontend,), tuple((p.addr, 8080, 6) for p in pods), flags)


def test_a_host_port_waits_for_the_node_port_of_a_service() -> None:
    c = compute()
    c.set_extra(POD, [lead(NODE_PORT, pod(9))])
    assert slots(c.all_rows(), NODE_PORT) == [9]
    assert c.conflicts(POD) == ()
    about = c.describe(NODE_PORT)
    assert about is not None
    assert (about.kind, about.owner) == ("HostPort", POD)
    c.update(KEY, Service(KEY, (IP,), (ServicePort("http", 80, 6, 30080),)), (part(pod(1)),))
    assert slots(c.all_rows(), NODE_PORT) == [1]
    assert c.conflicts(POD) == ("port 30080/TCP of the nodes (IPv4) already belongs to service default/web",)
    assert c.warnings(KEY) == ()
    c.update(KEY, None)
    assert slots(c.all_rows(), NODE_PORT) == [9]


def test_a_redirect_takes_a_frontend_over_and_gives_it_back() -> None:
    c = compute()
    c.update(KEY, WEB, (part(pod(1), pod(2)),))
    number = c.number(FRONTEND)
    c.set_extra(POLICY, [lead(FRONTEND, pod(7), flags=front.EXEMPT)])
    assert slots(c.all_rows()) == [7]
    assert c.number(FRONTEND) != number
    assert c.all_rows()[FRONTENDS][FRONTEND].flags == front.EXEMPT
    assert c.warnings(KEY) == ()
    assert c.claimed(FRONTEND) == POLICY
    c.set_extra(POLICY, [])
    assert slots(c.all_rows()) == [1, 2]
    assert c.claimed(FRONTEND) == Owner(SERVICE, "service", "default", "web")


def test_a_redirect_without_backends_refuses() -> None:
    c = compute()
    c.update(KEY, WEB, (part(pod(1)),))
    c.set_extra(POLICY, [lead(FRONTEND)])
    assert slots(c.all_rows()) == []


def test_extras_survive_a_restart() -> None:
    c = compute()
    c.update(KEY, WEB, (part(pod(1)),))
    c.set_extra(POD, [lead(NODE_PORT, pod(8), pod(9))])
    rows, again = c.all_rows(), compute()
    again.restore(rows[FRONTENDS], rows[SLOTS], rows[BACKENDS])
    delta = again.set_extra(POD, [lead(NODE_PORT, pod(8), pod(9))])
    delta.merge(again.update(KEY, WEB, (part(pod(1)),)))
    again.settle()
    assert again.all_rows() == delta.upserts == rows


def test_ready_endpoints_of_this_node_are_counted_for_health_checks() -> None:
    c = compute()
    c.update(KEY, WEB, (part(pod(1), pod(2, node="there"), pod(3, NOT_READY), pod(4, DRAINING)),))
    assert c.local_ready(KEY, v4=True) == 1
    c.update(KEY, WEB, (part(pod(4, DRAINING)),))
    assert c.local_ready(KEY, v4=True) == 0
    assert c.local_ready(ServiceKey("no", "such"), v4=True) == 0


def test_services_that_lost_every_frontend_are_told_of() -> None:
    c = compute()
    late = ServiceKey("default", "zzz")
    c.update(KEY, WEB)
    c.update(late, Service(late, (IP,), WEB.ports))
    assert c.unserved() == [late]


def by_name(name: str, **more: Any) -> Service:
    return Service(ServiceKey(name, "svc"), (pack("10.96.0.9"),), (ServicePort("http", 80, 6),), **more)


def winner(c: ServiceCompute, frontend: FrontendKey) -> str:
    owner = c.claimed(frontend)
    return owner.namespace if owner else ""


def test_an_external_ip_takes_over_nobodys_address_whatever_its_services_name() -> None:
    """Anybody who may create Services may write any external IP; cluster IPs and balancers' addresses are allocated."""
    balancer = FrontendKey(pack("203.0.113.1"), 80, 6)
    thief = by_name("aaa", external_ips=(IP, balancer.addr))
    for first in (True, False):
        c = compute()
        if first:
            c.update(thief.key, thief)
        c.update(KEY, replace(WEB, load_balancer_ips=(balancer.addr,)), (part(pod(1)),))
        if not first:
            c.update(thief.key, thief)
        assert winner(c, FRONTEND) == winner(c, balancer) == "default"
        assert slots(c.all_rows()) == slots(c.all_rows(), balancer) == [1]
        assert len(c.warnings(thief.key)) == 2
        c.update(KEY, None)
        assert winner(c, FRONTEND) == winner(c, balancer) == "aaa"


def test_a_claim_that_becomes_a_better_one() -> None:
    c, shared = compute(), FrontendKey(pack("203.0.113.1"), 80, 6)
    c.update(KEY, replace(WEB, external_ips=(shared.addr,)))
    c.update(ServiceKey("aaa", "svc"), by_name("aaa", external_ips=(shared.addr,)))
    assert winner(c, shared) == "aaa"
    c.update(KEY, replace(WEB, load_balancer_ips=(shared.addr,)))
    assert winner(c, shared) == "default"
    c.update(KEY, replace(WEB, external_ips=(shared.addr,)))
    assert winner(c, shared) == "aaa"


def test_no_service_takes_over_the_api_servers() -> None:
    """Agents would not even hear that it is deleted."""
    c, api = compute(), FrontendKey(pack("192.0.2.1"), 80, 6)
    thief = by_name("aaa", external_ips=(api.addr,), load_balancer_ips=(api.addr,))
    c.update(thief.key, thief)
    assert api in c.all_rows()[FRONTENDS]
    assert c.set_api_servers([api]).deletes[FRONTENDS] == {api}
    assert api not in c.all_rows()[FRONTENDS]
    assert c.warnings(thief.key) == ("port 80 of 192.0.2.1 already belongs to API server default/kubernetes",)
    assert not c.set_api_servers([api])
    assert api in c.set_api_servers([]).upserts[FRONTENDS]
    assert c.warnings(thief.key) == ()


def test_a_cluster_ip_by_which_agents_reach_the_api_server_is_a_services() -> None:
    c = compute()
    c.set_api_servers([FRONTEND])
    c.update(KEY, WEB, (part(pod(1)),))
    assert slots(c.all_rows()) == [1]


def test_a_redirect_is_called_so_whatever_it_redirects() -> None:
    """An address's redirect only gets what no Service has; the flags say how clients find it."""
    for rank in (REDIRECT, HOST_PORT):
        c = compute()
        owner = Owner(rank, LOCAL_REDIRECT, "default", "dns")
        c.set_extra(owner, (Extra((FRONTEND,), ((pod(1).addr, 53, 6),), front.CLUSTER_IP),))
        about = c.describe(FRONTEND)
        assert about and about.kind == "LocalRedirect"
