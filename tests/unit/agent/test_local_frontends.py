"""What this node's pods ask of its frontends, through the engine: changes touch what they must, and nothing stays."""

import logging
from dataclasses import replace

import pytest

from fimbria.agent.engine import DesiredRows, Engine, NumberBook
from fimbria.compute.service_frontends import EXEMPT
from fimbria.model.address import Prefix, pack
from fimbria.model.endpoint import EndpointIdentity, HostPort, LocalEndpoint, Pod
from fimbria.model.node import Node
from fimbria.model.policy import Operator, PolicyId, Requirement, Selector
from fimbria.model.redirect import Redirect, RedirectPort
from fimbria.model.rows import ExemptKey, FrontendKey
from fimbria.model.service import Endpoint, EndpointPort, EndpointSlice, NodeTopology, Service, ServiceKey, ServicePort
from fimbria.tables import Tables

NODE, EXTERNAL, VIP, FAR = pack("192.0.2.1"), pack("198.51.100.1"), pack("10.96.0.10"), pack("10.2.0.9")
DNS, COOKIE = ServiceKey("ns", "dns"), 1 << 40
PORT = RedirectPort("dns", 53, 17)


class World:
    """An engine on node `one`."""

    def __init__(self) -> None:
        self.tables, self.rows = Tables(), DesiredRows()
        self.engine = Engine(self.tables, self.rows, NumberBook(), node="one", cluster="default", overlay=True)
        self.tables.nodes.upsert("one", Node("one", (NODE,), (), (Prefix.parse("10.1.0.0/24"),)))
        self.tables.own_node.upsert("one", NodeTopology((), (NODE, EXTERNAL)))
        self.tables.namespaces.upsert("ns", {})

    def pod(self, number: int, *ports: HostPort, ready: bool = True, name: str = "", own: bool = False) -> None:
        name = name or f"p{number}"
        pod = Pod("ns", name, f"uid{number}", {"app": "cache"}, "default", (), False, ready, own)
        self.tables.pods.upsert(("ns", name), pod)
        self.tables.endpoint_identities.upsert(number, EndpointIdentity(300, {"k8s:app": "cache"}))
        self.tables.endpoints.upsert(number, LocalEndpoint(
            id=number, container_id=f"c{number}", ifname="eth0", network="fimbria", netns="", namespace="ns", pod=name,
            uid=f"uid{number}", host_ifname=f"fim{number}", ifindex=100 + number, pod_mac=bytes(6), host_mac=bytes(6),
            addr4=pack(f"10.1.0.{number}"), host_ports=ports, netns_cookie=COOKIE + number,
        ))  # fmt: skip
        self.engine.step()

    def gone(self, number: int) -> None:
        endpoint = self.tables.endpoints[number]
        self.tables.endpoints.delete(number)
        self.tables.endpoint_identities.delete(number)
        self.tables.pods.delete(("ns", endpoint.pod))
        self.engine.step()

    def service(self, **more: object) -> None:
        found = Service(DNS, (VIP,), (ServicePort("dns", 53, 17),))
        self.tables.services.upsert(tuple(DNS), replace(found, **more))  # type: ignore[arg-type]
        listed = EndpointSlice("s", DNS, True, (EndpointPort("dns", 53, 17),), (Endpoint(FAR, "two"),))
        self.tables.endpoint_slices.upsert(("ns", "s"), listed)
        self.engine.step()

    def redirect(self, name: str = "r", addr: bytes | None = None, *, skip: bool = False) -> None:
        pods = Selector([Requirement(("k8s:app",), Operator.IN, ("cache",))])
        ports = (PORT,) if addr else ()
        own = PolicyId("CiliumLocalRedirectPolicy", "ns", name)
        wanted = Redirect(own, addr, None if addr else DNS, ports, pods, (PORT,), skip)
        self.tables.redirects.upsert(("ns", name), wanted)
        self.engine.step()

    def leads(self, addr: bytes, port: int, proto: int) -> set[bytes] | None:
        """The addresses behind a frontend; None if there is none."""
        row = self.rows.frontends.desired.get(FrontendKey(addr, port, proto))
        if row is None:
            return None
        slots = [b for slot, b in self.rows.service_slots.desired.items() if slot.service == row.service]
        return {self.rows.backends.desired[b].addr for b in slots}

    def exempt(self) -> set[ExemptKey]:
        return set(self.rows.service_exempt.desired)


def one(number: int) -> set[bytes]:
    return {pack(f"10.1.0.{number}")}


@pytest.fixture
def world() -> World:
    return World()


def test_host_ports_follow_the_nodes_addresses(world: World) -> None:
    world.pod(5, HostPort(8080, 80, 6))
    assert (
        world.leads(NODE, 8080, 6)
        == world.leads(EXTERNAL, 8080, 6)
        == world.leads(pack("127.0.0.1"), 8080, 6)
        == one(5)
    )
    world.tables.own_node.upsert("one", NodeTopology((), (NODE,)))
    world.engine.step()
    assert world.leads(EXTERNAL, 8080, 6) is None and world.leads(NODE, 8080, 6) == one(5)
    world.gone(5)
    assert not world.rows.frontends.desired and not world.rows.backends.desired


def test_a_node_port_that_comes_later_wins_and_gives_back(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.pod(5, HostPort(30080, 80, 17))
    with caplog.at_level(logging.WARNING):
        world.service(kind="NodePort", ports=(ServicePort("dns", 53, 17, 30080),))
        world.service(kind="NodePort", ports=(ServicePort("dns", 53, 17, 30080),), publish_not_ready=True)
    assert world.leads(NODE, 30080, 17) is None
    assert caplog.text.count("host port 30080/UDP is the node port of service ns/dns") == 1, "said once"
    assert len(world.engine.local.problems) == 1
    world.tables.services.delete(tuple(DNS))
    world.engine.step()
    assert world.leads(NODE, 30080, 17) == one(5) and not world.engine.local.problems


def test_a_successor_of_the_same_name_keeps_what_it_took_over(world: World) -> None:
    world.pod(5, HostPort(8080, 80, 6), name="web-0")
    world.pod(6, HostPort(8081, 80, 6), name="web-0")
    world.tables.endpoints.delete(5)
    world.engine.step()
    assert world.leads(NODE, 8080, 6) is None and world.leads(NODE, 8081, 6) == one(6)


def test_a_redirect_follows_its_pods_and_its_service(world: World) -> None:
    world.redirect()
    assert "there is no Service ns/dns" in str(world.engine.local.problems)
    world.service()
    assert world.leads(VIP, 53, 17) == {FAR}
    world.pod(5, ready=False)
    assert world.leads(VIP, 53, 17) == {FAR}
    assert "no ready pod" in str(world.engine.local.problems)
    world.pod(5)
    assert world.leads(VIP, 53, 17) == one(5) and not world.engine.local.problems
    world.pod(6)
    assert world.leads(VIP, 53, 17) == one(5) | one(6)
    world.gone(5)
    assert world.leads(VIP, 53, 17) == one(6)
    world.tables.redirects.delete(("ns", "r"))
    world.engine.step()
    assert world.leads(VIP, 53, 17) == {FAR}


def test_who_is_selected_sees_the_address_itself(world: World) -> None:
    at = pack("169.254.169.254")
    world.redirect(addr=at, skip=True)
    assert world.leads(at, 53, 17) is None and not world.exempt()
    world.pod(5)
    world.pod(6, ready=False)
    row = world.rows.frontends.desired[FrontendKey(at, 53, 17)]
    assert row.flags & EXEMPT
    number = row.service
    assert world.exempt() == {
        ExemptKey(5, number, 1), ExemptKey(COOKIE + 5, number, 0),
        ExemptKey(6, number, 1), ExemptKey(COOKIE + 6, number, 0),
    }  # fmt: skip
    world.gone(5)
    assert not world.exempt(), "nobody is ready, so nothing is redirected"
    world.tables.redirects.delete(("ns", "r"))
    world.engine.step()
    assert not world.rows.frontends.desired


def test_addresses_of_pods_and_nodes_are_not_taken_over(world: World) -> None:
    world.pod(5)
    for name, addr in (("pod", pack("10.1.0.5")), ("node", NODE)):
        world.redirect(name, addr)
        assert world.leads(addr, 53, 17) is None
    world.redirect("block", pack("10.1.0.77"))
    assert world.leads(pack("10.1.0.77"), 53, 17) is None, "a pod may get it"
    assert str(world.engine.local.problems).count("which can't be redirected") == 3


def test_a_pod_with_addresses_of_its_own(world: World) -> None:
    world.pod(5, own=True)
    assert world.exempt() == {ExemptKey(COOKIE + 5, 0, 0)}
    world.pod(5)
    assert not world.exempt()
    world.pod(5, own=True)
    world.gone(5)
    assert not world.exempt()


def test_a_port_that_a_services_address_doesnt_serve_cant_be_redirected_either(world: World) -> None:
    world.pod(5)
    world.redirect("other", VIP)
    assert world.leads(VIP, 53, 17) == one(5), "nobody's address yet"
    world.service(ports=(ServicePort("other", 80, 6),))
    assert world.leads(VIP, 53, 17) is None
    assert "is the address of a Service" in str(world.engine.local.problems)
    world.tables.services.delete(tuple(DNS))
    world.engine.step()
    assert world.leads(VIP, 53, 17) == one(5)
