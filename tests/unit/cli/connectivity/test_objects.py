"""The objects of the test, judged as an API server and a reader would."""

import json

from fimbria.cli.connectivity import objects
from fimbria.cli.connectivity.scenario import CLIENTS, PAIR, SERVERS, Probe

PROBE = Probe("c", "plain", "pod far", "http", "10.0.0.2", 8080, allowed=False)


def test_a_client_tries_all_of_its_connections_in_order() -> None:
    other = Probe("c", "plain", "far", "dns", "far.ns.svc", 0, want=("10.96.0.1",))
    pod = objects.client(CLIENTS[0], "with", "n1", "img", probes=[PROBE, other], policies=True)
    (container,) = pod["spec"]["containers"]
    assert container["command"][:2] == ["python3", "-c"]
    assert container["command"][3] == "try"
    assert json.loads(container["command"][4]) == [
        {"op": "http", "host": "10.0.0.2", "port": 8080, "want": [], "allowed": False},
        {"op": "dns", "host": "far.ns.svc", "port": 0, "want": ["10.96.0.1"], "allowed": True},
    ]
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["spec"]["nodeName"] == "n1"
    assert pod["metadata"]["name"] == "plain-with"
    assert pod["metadata"]["labels"][objects.CLIENT] == "plain"


def test_without_policies_everything_is_expected_to_connect() -> None:
    assert objects.probe_of(PROBE, PROBE.allowed)["allowed"] is False
    pod = objects.client(CLIENTS[0], "without", "n", "img", probes=[PROBE], policies=False)
    assert json.loads(pod["spec"]["containers"][0]["command"][4])[0]["allowed"] is True


def test_servers_on_a_nodes_network_open_one_port_only() -> None:
    host = next(s for s in SERVERS if s.host)
    spec = objects.server(host, "n1", "img", 4242)["spec"]
    assert spec["hostNetwork"] is True
    assert json.loads(spec["containers"][0]["command"][4]) == {"name": host.name, "http": [4242]}


def test_pods_keep_to_the_restricted_standard_where_they_can() -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/"""
    for s in SERVERS:
        spec = objects.server(s, "n1", "img", 4242)["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        security = spec["containers"][0]["securityContext"]
        assert security == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert not any(p.get("hostPort") for c in spec["containers"] for p in c.get("ports") or ())
    porter = next(s for s in SERVERS if s.name == "porter")
    (port,) = objects.server(porter, "n", "img", 4242, 4243)["spec"]["containers"][0]["ports"]
    assert port["hostPort"] == 4243
    enforce = "pod-security.kubernetes.io/enforce"
    assert objects.namespace("x", restricted=True)["metadata"]["labels"][enforce] == "restricted"
    assert objects.namespace("x", restricted=False)["metadata"]["labels"][enforce] == "privileged"


def test_services() -> None:
    assert objects.service("near")["spec"]["selector"][objects.ROLE] == "near"
    for name in objects.PAIRED:
        assert objects.service(name)["spec"]["selector"][objects.BEHIND] == "yes"
    assert objects.service("headless")["spec"]["clusterIP"] == "None"
    assert objects.service("sticky")["spec"]["sessionAffinity"] == "ClientIP"
    assert objects.service("balanced")["spec"]["type"] == "LoadBalancer"
    behind = {s.name for s in SERVERS if objects.BEHIND in objects.server(s, "n", "i", 1)["metadata"]["labels"]}
    assert behind == set(PAIR)


def test_policies_select_their_own_pods_only() -> None:
    found = {p["metadata"]["name"]: p["spec"] for p in objects.policies({4: "10.0.0.9", 6: "fd00::9"})}
    assert found["closed"]["podSelector"] == {"matchLabels": {objects.ROLE: "closed"}}
    assert found["caged"] == {"podSelector": {"matchLabels": {objects.CLIENT: "caged"}}, "policyTypes": ["Egress"]}
    assert found["walled"]["egress"] == [
        {
            "to": [
                {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.9/32"]}},
                {"ipBlock": {"cidr": "::/0", "except": ["fd00::9/128"]}},
            ]
        }
    ]


def test_why_not_ready() -> None:
    waiting = {"name": "server", "state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}
    status = {"phase": "Pending", "containerStatuses": [waiting]}
    assert objects.why_not_ready({"status": status}) == "container server is waiting (ErrImagePull: no such image)"
    assert objects.why_not_ready({}) == "its phase is Pending"
    failed = {"status": {"phase": "Failed", "reason": "Evicted", "message": "no room"}}
    assert objects.why_not_ready(failed) == "its phase is Failed (Evicted: no room)"
    condition = {"type": "PodScheduled", "status": "False", "message": "no node fits"}
    assert objects.why_not_ready({"status": {"conditions": [condition]}}) == "no node fits"


def test_usable_nodes() -> None:
    ready = {"conditions": [{"type": "Ready", "status": "True"}]}
    assert objects.usable_node({"status": ready})
    assert not objects.usable_node({"status": ready, "spec": {"unschedulable": True}})
    assert not objects.usable_node({"status": ready, "spec": {"taints": [{"key": "x", "effect": "NoSchedule"}]}})
    assert not objects.usable_node({"status": {}})
