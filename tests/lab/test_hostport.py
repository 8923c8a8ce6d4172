"""hostPort: a pod behind ports of its node, from everywhere; and the health checks that a node answers."""

import json
from collections.abc import Callable, Iterator

import pytest
from balance import FAMILIES, Front, ask, node_address, server, service, world_address
from traffic import agent, pod, ready, wait_settled

from fimbria.lab.handle import Lab

PORT, UDP_PORT, LOCAL_PORT = 8099, 8098, 8097


def with_ports(name: str, node: str, *ports: dict[str, object]) -> str:
    container = {"name": "main", "image": "fimbria/labtool", "ports": list(ports)}
    spec = {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [container]}
    body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec}
    return json.dumps(body) + "\n---\n"


TCP_PORT = {"containerPort": 9000, "hostPort": PORT}
WEB = with_ports(
    "web", "node2",
    TCP_PORT, {"containerPort": 9001, "hostPort": UDP_PORT, "protocol": "UDP"},
    {"containerPort": 9000, "hostPort": LOCAL_PORT, "hostIP": "127.0.0.1"},
)  # fmt: skip
LOOPBACK = {4: "127.0.0.1", 6: "::1"}


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(nodes=2)
    lab.apply(WEB + pod("client1", "node1", sleeps=True) + pod("client2", "node2", sleeps=True))
    lab.wait_ready(["web", "client1", "client2"])
    return lab


@pytest.fixture(autouse=True)
def _settled(lab: Lab) -> Iterator[None]:
    yield
    wait_settled(lab)


@pytest.mark.parametrize("source", ["client1", "client2", "node/node1", "node/node2", "node/world", "web"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_address_of_the_node_from_everywhere(lab: Lab, source: str, family: int) -> None:
    host = node_address(lab, "node2", family)
    for proto, port in (("tcp", PORT), ("udp", UDP_PORT)):
        found = ask(lab, source, proto, host, port, count=3)
        assert found.ok and set(found.names) == {"web"}, (proto, found)
    elsewhere = node_address(lab, "node1", family)
    assert not ask(lab, source, "tcp", elsewhere, PORT, count=1, timeout=500).ok, "another node has no such port"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_world_keeps_its_address(lab: Lab, family: int) -> None:
    found = ask(lab, "node/world", "tcp", node_address(lab, "node2", family), PORT, count=2)
    assert found.seen("web") == {world_address(lab, family)}


@pytest.mark.parametrize("family", FAMILIES)
def test_loopback_is_the_nodes_in_its_own_namespace_only(lab: Lab, family: int) -> None:
    assert ask(lab, "node/node2", "tcp", LOOPBACK[family], PORT, count=2).ok
    assert not ask(lab, "client2", "tcp", LOOPBACK[family], PORT, count=1, timeout=500).ok
    assert not ask(lab, "node/node1", "tcp", LOOPBACK[family], PORT, count=1, timeout=500).ok


def test_a_host_address_limits_it(lab: Lab) -> None:
    assert ask(lab, "node/node2", "tcp", "127.0.0.1", LOCAL_PORT, count=1).ok
    for source in ("node/node2", "node/world", "client1"):
        assert not ask(lab, source, "tcp", node_address(lab, "node2", 4), LOCAL_PORT, count=1, timeout=500).ok


def test_a_restarted_agent_keeps_host_ports(lab: Lab) -> None:
    before = rows(lab, PORT)
    assert before
    lab.kill("node2/agent")
    assert ask(lab, "node/world", "tcp", node_address(lab, "node2", 4), PORT, count=1).ok, "nobody needs the agent"
    lab.restart("node2/agent")
    lab.wait("the agent is back", lambda: ready(lab, "node2"))
    assert rows(lab, PORT) == before
    assert ask(lab, "node/world", "tcp", node_address(lab, "node2", 4), PORT, count=1).ok


def rows(lab: Lab, port: int) -> dict[str, object]:
    """Frontends of a port on node2, with their service ids."""
    listed = agent(lab, "node2", "maps/frontends")
    return {str(r["key"]): r["value"] for r in listed if r["key"]["port"] == port}


def test_a_port_that_is_taken_keeps_the_second_pod_from_starting_until_it_is_free(lab: Lab) -> None:
    lab.apply(with_ports("first", "node2", {"containerPort": 9000, "hostPort": 8090}))
    lab.wait_ready(["first"])
    # The scheduler isn't asked: the node is named. So it is the node's part to refuse.
    second = with_ports("second", "node2", {"containerPort": 9000, "hostPort": 8090})
    lab.apply(second)
    try:
        lab.wait("it is refused by name", lambda: "host port 8090/TCP" in lab.process_log("node2/agent"))
        assert set(ask(lab, "node/world", "tcp", node_address(lab, "node2", 4), 8090, count=2).names) == {"first"}
        lab.delete(with_ports("first", "node2"))
        lab.wait_ready(["second"], 60)
        assert set(ask(lab, "node/world", "tcp", node_address(lab, "node2", 4), 8090, count=2).names) == {"second"}
    finally:
        lab.delete(second)
    lab.wait("no frontend is left", lambda: not rows(lab, 8090))


def test_health_checks_of_a_service_and_of_the_node(lab: Lab) -> None:
    lab.apply(server("local", "node1", "local"))
    lab.apply(service("local", app="local", type="LoadBalancer", externalTrafficPolicy="Local"))
    lab.wait_ready(["local"])
    front = Front(lab, "local")

    def health(node: str) -> str:
        done = lab.run("node/world", "curl", "-s", "-i", "--max-time", "10",
                       f"http://{node_address(lab, node, 4)}:{front.health_port}/")  # fmt: skip
        return done.stdout

    lab.wait("node1 has it", lambda: health("node1").startswith("HTTP/1.1 200 "))
    assert "X-Load-Balancing-Endpoint-Weight: 1\n" in health("node1")
    lab.wait("node2 has none", lambda: health("node2").startswith("HTTP/1.1 503 "))
    body = json.loads(health("node2").partition("\n\n")[2])
    assert body == {
        "service": {"namespace": "default", "name": "local"}, "localEndpoints": 0, "serviceProxyHealthy": True,
    }  # fmt: skip
    for family in FAMILIES:
        address = node_address(lab, "node1", family)
        host = f"[{address}]" if family == 6 else address
        for path in ("healthz", "livez"):
            done = lab.run("node/world", "curl", "-s", "--max-time", "10", f"http://{host}:10256/{path}")
            assert json.loads(done.stdout)["healthy"] is True, done
    lab.delete(server("local", "node1", "local"))
    lab.wait("node1 has none", lambda: health("node1").startswith("HTTP/1.1 503 "))
    lab.delete(service("local", app="local", type="LoadBalancer", externalTrafficPolicy="Local"))
    lab.wait("the port is closed", lambda: health("node1") == "")
