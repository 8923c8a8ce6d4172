"""The objects of the test, judged as an API server and a reader would."""

from fimbria.cli.connectivity import objects
from fimbria.cli.connectivity.scenario import CLIENTS, SERVERS, Probe

PROBE = Probe("c", "plain", "pod far", "http", "10.0.0.2", 8080, allowed=False)


def test_client_has_a_container_for_each_connection() -> None:
    pod = objects.client(CLIENTS[0], "with", "n1", "img", probes={"p0": PROBE, "p7": PROBE}, policies=True)
    assert [c["name"] for c in pod["spec"]["containers"]] == ["p0", "p7"]
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["spec"]["nodeName"] == "n1"
    assert pod["metadata"]["name"] == "plain-with"
    assert pod["metadata"]["labels"][objects.CLIENT] == "plain"


def test_patience_depends_on_what_is_expected() -> None:
    def patience(policies: bool) -> str:
        pod = objects.client(CLIENTS[0], "x", "n", "img", probes={"p0": PROBE}, policies=policies)
        return pod["spec"]["containers"][0]["args"][-1]

    assert int(patience(policies=True)) < int(patience(policies=False))


def test_servers_on_a_nodes_network_open_one_port_only() -> None:
    host = next(s for s in SERVERS if s.host)
    spec = objects.server(host, "n1", "img", 4242)["spec"]
    assert spec["hostNetwork"] is True
    assert spec["containers"][0]["args"] == ["serve", "--name", host.name, "--http", "4242"]


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
