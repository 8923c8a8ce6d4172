"""Connections all the time, from pods, nodes and the outside world, while every backend is replaced and agents die:
none fails."""

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from balance import GRACEFUL, TCP, UDP, Clients, Front, ask, node_address, server, service, wait_answers
from traffic import agent, metric, pod, ready, set_options, wait_settled

from fimbria.lab.handle import Lab

WEB = "/apis/apps/v1/namespaces/default/deployments/web"
# Seconds that a server goes on after it was told to end: longer than the news takes to all nodes, also to an agent
# that is just being restarted on a busy machine.
LINGER = 15


def deployment(replicas: int) -> str:
    container = {
        "name": "main", "image": "fimbria/labtool", "command": ["sh", "-c", GRACEFUL.format(linger=LINGER)],
        "readinessProbe": {"tcpSocket": {"port": 9000}, "periodSeconds": 1},
    }  # fmt: skip
    template = {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [container]}}
    spec = {
        "replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": template,
        "strategy": {"rollingUpdate": {"maxSurge": 2, "maxUnavailable": 1}},
    }  # fmt: skip
    return json.dumps({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": spec})


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(nodes=3)
    lab.apply(deployment(5))
    lab.apply(service("web", app="web", type="LoadBalancer"))
    lab.apply(service("web-local", app="web", type="LoadBalancer", externalTrafficPolicy="Local"))
    lab.apply(service("web-maglev", app="web", type="NodePort",
                      annotations={"service.cilium.io/lb-algorithm": "maglev"}))  # fmt: skip
    lab.apply(server("steady", "node2", "steady") + service("steady", app="steady", type="LoadBalancer"))
    lab.apply(pod("client", "node1", sleeps=True) + pod("client2", "node2", sleeps=True))
    lab.wait_ready(["client", "client2", "steady"])
    lab.wait("the deployment is available", lambda: rolled_out(lab))
    for client, where in places(lab).items():
        wait_answers(lab, where[0], where[2], where[3], where[1])
        assert client
    return lab


@pytest.fixture(autouse=True)
def _settled(lab: Lab) -> Iterator[None]:
    lab.wait("all that were told to end have ended", lambda: not ending(lab), LINGER + 10)
    yield
    wait_settled(lab)


def ending(lab: Lab) -> list[str]:
    pods = lab.request("GET", "/api/v1/namespaces/default/pods")["items"]
    return [p["metadata"]["name"] for p in pods if p["metadata"].get("deletionTimestamp")]


def status(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = lab.request("GET", WEB)
    return found


def rolled_out(lab: Lab) -> bool:
    """All pods are of the newest template, and available."""
    found = status(lab)
    now, wanted = found.get("status") or {}, found["spec"]["replicas"]
    return bool(
        now.get("observedGeneration") == found["metadata"]["generation"]
        and now.get("updatedReplicas") == now.get("replicas") == now.get("availableReplicas") == wanted
    )


def roll(lab: Lab) -> None:
    """Replaces every pod of the deployment, and waits for the last one."""
    patch = {"spec": {"template": {"metadata": {"annotations": {"version": str(time.monotonic_ns())}}}}}
    lab.call(lambda c: c.request("PATCH", WEB, patch, "application/merge-patch+json"))
    lab.wait("the rolling update is done", lambda: rolled_out(lab), 60)


def running(lab: Lab) -> set[str]:
    """The deployment's pods that nobody told to end."""
    found = [p["metadata"] for p in lab.request("GET", "/api/v1/namespaces/default/pods")["items"]]
    return {m["name"] for m in found if m["name"].startswith("web-") and not m.get("deletionTimestamp")}


Where = tuple[str, str, str, int]  # source, protocol, address, port


def places(lab: Lab, family: int = 4) -> dict[str, Where]:
    """Every way into the deployment."""
    web, local, maglev = Front(lab, "web"), Front(lab, "web-local"), Front(lab, "web-maglev")
    return {
        "pod, ClusterIP": ("client", "tcp", web.cluster_ip(family), TCP),
        "pod, ClusterIP, IPv6": ("client2", "tcp", web.cluster_ip(6), TCP),
        "pod, ClusterIP, UDP": ("client", "udp", web.cluster_ip(family), UDP),
        "host, ClusterIP": ("node/node1", "tcp", web.cluster_ip(family), TCP),
        "world, NodePort of node1": ("node/world", "tcp", node_address(lab, "node1", family), web.node_port(TCP)),
        "world, NodePort of node2, IPv6": ("node/world", "tcp", node_address(lab, "node2", 6), web.node_port(TCP)),
        "world, NodePort, UDP": ("node/world", "udp", node_address(lab, "node3", family), web.node_port(UDP)),
        "world, Maglev": ("node/world", "tcp", node_address(lab, "node3", family), maglev.node_port(TCP)),
        "world, LoadBalancer": ("node/world", "tcp", web.balancer(family), TCP),
        "world, LoadBalancer, Local": ("node/world", "tcp", local.balancer(family), TCP),
    }


def steady(lab: Lab) -> dict[str, Where]:
    """Ways to a server that isn't replaced: long-lived connections must survive what happens around it."""
    front = Front(lab, "steady")
    return {
        "pod": ("client", "tcp", front.cluster_ip(4), TCP),
        "pod, UDP, IPv6": ("client", "udp", front.cluster_ip(6), UDP),
        "host": ("node/node1", "tcp", front.cluster_ip(4), TCP),
        "world, NodePort elsewhere": ("node/world", "tcp", node_address(lab, "node1", 4), front.node_port(TCP)),
        "world, NodePort there, IPv6": ("node/world", "tcp", node_address(lab, "node2", 6), front.node_port(TCP)),
        "world, NodePort, UDP": ("node/world", "udp", node_address(lab, "node3", 4), front.node_port(UDP)),
        "world, LoadBalancer": ("node/world", "tcp", front.balancer(4), TCP),
    }


def test_rolling_updates_of_every_backend(lab: Lab) -> None:
    before = running(lab)
    with Clients(lab, places(lab), steady(lab)) as clients:
        roll(lab)
        roll(lab)
    assert len(before) == 5 and not before & running(lab)
    print(f"{clients.connections} new connections, none failed")


def test_agents_killed_while_backends_are_replaced(lab: Lab) -> None:
    """Servers linger long enough for an agent that comes back to hear of it."""
    with Clients(lab, places(lab), steady(lab)) as clients:
        patch = {"spec": {"template": {"metadata": {"annotations": {"killed": str(time.monotonic_ns())}}}}}
        lab.call(lambda c: c.request("PATCH", WEB, patch, "application/merge-patch+json"))
        for node in lab.spec.node_names:
            time.sleep(0.5)
            lab.kill(f"{node}/agent")
            lab.restart(f"{node}/agent")
            lab.wait(f"{node} is back", lambda n=node: ready(lab, n))  # type: ignore[misc]
        lab.wait("the rolling update is done", lambda: rolled_out(lab), 60)
    print(f"{clients.connections} new connections, none failed")


def test_agents_away(lab: Lab) -> None:
    with Clients(lab, places(lab), steady(lab)):
        for node in lab.spec.node_names:
            lab.kill(f"{node}/agent")
        time.sleep(3)
        for node in lab.spec.node_names:
            lab.restart(f"{node}/agent")
        wait_settled(lab)


@pytest.mark.parametrize("options", [
    pytest.param(("service-entries=4000", "conntrack-entries=65536", "nat-entries=32768"), id="maps change"),
    pytest.param(("trace-interval=1.5",), id="programs change"),
    pytest.param((), id="all change back"),
])  # fmt: skip
def test_agents_with_other_settings(lab: Lab, options: tuple[str, ...]) -> None:
    set_options(lab, *options)
    with Clients(lab, places(lab), steady(lab)):
        for node in lab.spec.node_names:
            lab.kill(f"{node}/agent")
            lab.restart(f"{node}/agent")
        wait_settled(lab)


def test_scaled_to_nothing_and_back(lab: Lab) -> None:
    """Refused while nobody is there, never a wait; and as before afterwards."""

    def scale(replicas: int) -> None:
        patch = {"spec": {"replicas": replicas}}
        lab.call(lambda c: c.request("PATCH", WEB, patch, "application/merge-patch+json"))

    ways = places(lab)
    scale(0)
    local = ways.pop("world, LoadBalancer, Local")
    for label, (source, proto, host, port) in ways.items():

        def refused(way: Where = (source, proto, host, port)) -> bool:
            return set(ask(lab, *way, count=2, timeout=1000).results) == {"refused"}

        lab.wait(f"{label} is refused", refused, LINGER + 10)
    scale(5)
    lab.wait("the deployment is available", lambda: rolled_out(lab), 40)
    for source, proto, host, port in (*ways.values(), local):
        wait_answers(lab, source, host, port, proto)


def test_nothing_was_left_or_lost(lab: Lab) -> None:
    """After all that: as many backends as endpoints, no failed row, and a second plan is empty."""
    wait_settled(lab)
    for node in lab.spec.node_names:
        assert metric(lab, node, "fimbria_failed_rows") == 0
        named = {b for row in agent(lab, node, "services") for b in row["backends"]}
        rows = agent(lab, node, "status")["rows"]
        assert rows["backends"] >= len(named) > 0
