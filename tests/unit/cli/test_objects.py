"""Lists and single objects from canned answers."""

import json
from typing import Any

import pytest

POLICY = "NetworkPolicy shop/only-clients"


def pod(number: int, name: str, identity: int, **more: Any) -> dict[str, Any]:
    return {
        "id": number,
        "pod": name,
        "namespace": "shop",
        "container_id": f"c0ffee{number}",
        "interface": f"fim{number}",
        "ifindex": number + 5,
        "ipv4": f"10.244.0.{number}",
        "ipv6": f"fd00::{number}",
        "mac": "02:00:00:00:00:01",
        "identity": identity,
        "labels": [f"k8s:app={name}", "k8s:io.cilium.k8s.policy.cluster=default"],
        "policy_set": 0,
        "enforced_by": {"ingress": [], "egress": []},
        "failure": "",
    } | more


RULE = {"kind": "NetworkPolicy", "namespace": "shop", "name": "only-clients", "path": "ingress[0]"}


def entry(ports: str, peer: int = 300, verdict: str = "allow", rule: Any = RULE) -> dict[str, Any]:
    return {
        "direction": "ingress",
        "verdict": verdict,
        "peer": peer,
        "peer_is": ["k8s:app=client"] if peer else ["anyone"],
        "ports": ports,
        "pods_too": False,
        "rule": rule,
    }


SERVED = {"type": "ClusterIP", "scope": "all", "policy": "Cluster", "affinity_seconds": 0, "forwarding": "",
          "algorithm": "random", "source_ranges": [], "source_policy": "", "without_backends": "refuse"}  # fmt: skip


@pytest.fixture
def filled(agent):
    web = pod(1, "web", 301, enforced_by={"ingress": [POLICY], "egress": []})
    agent.answers |= {
        "nodes": [
            {
                "name": "node1",
                "local": True,
                "addresses": ["172.31.1.10"],
                "routers": ["10.244.0.1"],
                "pod_cidrs": ["10.244.0.0/24"],
                "problem": "",
            },
            {
                "name": "node2",
                "local": False,
                "addresses": ["172.31.2.10"],
                "routers": [],
                "pod_cidrs": [],
                "problem": "no pod CIDR",
            },
        ],
        "endpoints": [pod(2, "client", 300), web, pod(3, "broken", 0, failure="the map is full", namespace="other")],
        "endpoints/1": web | {"entries": [entry("TCP/80"), entry("TCP/8000-8007"), entry("any", 0, "deny", None)]},
        "identities": [{"id": 2, "labels": ["reserved:world"]}, {"id": 300, "labels": ["k8s:app=client"]}],
        "ipcache": [
            {"prefix": "fd00::2/128", "identity": 300, "tunnel": "", "flags": ["pod"]},
            {"prefix": "10.244.1.0/24", "identity": 3, "tunnel": "172.31.2.10", "flags": ["pod", "tunnel"]},
            {"prefix": "10.244.0.2/32", "identity": 300, "tunnel": "", "flags": ["pod"]},
        ],
        "services": [
            {
                "id": 1,
                "service": "shop/web",
                "port": "http",
                "frontend": "10.96.0.2:80",
                "protocol": "TCP",
                "backends": ["10.244.0.1:80"],
                "warnings": [],
                **SERVED,
            },
            {
                "id": 2,
                "service": "shop/empty",
                "port": "",
                "frontend": "10.96.0.3:80",
                "protocol": "TCP",
                "backends": [],
                "warnings": ["no"],
                **SERVED,
            },
        ],
        "policies": [
            {
                "kind": "NetworkPolicy",
                "namespace": "shop",
                "name": "only-clients",
                "rules": 1,
                "selects": ["shop/web"],
                "problems": [],
            },
            {
                "kind": "CiliumNetworkPolicy",
                "namespace": "shop",
                "name": "l7",
                "rules": 0,
                "selects": [],
                "problems": ["spec: HTTP rules"],
            },
        ],
    }
    return agent


@pytest.mark.parametrize("kind", ["node", "endpoint", "identity", "ipcache", "service", "policy"])
def test_empty_lists(call, agent, kind: str) -> None:
    agent.answers |= {k: [] for k in ("nodes", "endpoints", "identities", "ipcache", "services", "policies")}
    people = call(kind, "list")
    assert (people.exit_code, people.stdout) == (0, "")
    assert people.stderr.startswith("No ")
    assert json.loads(call(kind, "list", "-o", "json").stdout) == []


@pytest.mark.parametrize("kind", ["node", "endpoint", "identity", "ipcache", "service", "policy"])
@pytest.mark.parametrize("output", ["table", "wide", "json"])
def test_every_list_in_every_form(call, filled, kind: str, output: str) -> None:
    result = call(kind, "list", "-o", output)
    assert result.exit_code == 0
    if output == "json":
        assert isinstance(json.loads(result.stdout), list)
    else:
        assert len(result.stdout.splitlines()) >= 3


@pytest.mark.parametrize("kind", ["node", "endpoint", "identity", "service", "policy"])
def test_unknown_names_fail_with_one_sentence(call, filled, kind: str) -> None:
    result = call(kind, "get", "no-such-thing")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: There is no")
    assert result.stdout == ""


def test_node_marks_itself_and_problems(call, filled) -> None:
    lines = call("node", "list").stdout.splitlines()
    assert lines[1].startswith("node1 *")
    assert lines[2].endswith("no pod CIDR")
    assert "node2" in call("node", "get", "172.31.2.10").stdout


def test_endpoint_list_sorts_and_filters(call, filled) -> None:
    names = [line.split()[1] for line in call("endpoint", "list").stdout.splitlines()[1:]]
    assert names == ["other/broken", "shop/client", "shop/web"]

    def ids(*options: str) -> list[int]:
        return [r["id"] for r in json.loads(call("endpoint", "list", *options, "-o", "json").stdout)]

    assert ids("-n", "shop") == [2, 1]
    assert ids("-l", "app=web") == [1]
    assert ids("--identity", "300") == [2]
    assert ids("--failing") == [3]
    assert ids("-n", "shop", "-l", "app=broken") == []


def test_endpoint_get_shows_entries_with_rules(call, filled) -> None:
    text = call("endpoint", "get", "web").stdout
    assert POLICY in text
    row = next(line for line in text.splitlines() if "TCP/80," in line)
    assert row.split() == [
        "ingress",
        "allow",
        "300",
        "app=client",
        "TCP/80,",
        "TCP/8000-8007",
        "NetworkPolicy",
        "shop/only-clients",
        "ingress[0]",
    ]
    assert "deny" in text
    assert json.loads(call("endpoint", "get", "c0ffee1", "-o", "json").stdout)["entries"][0]["rule"] == RULE


def test_endpoint_states(call, filled) -> None:
    text = call("endpoint", "list").stdout
    assert "failing" in text
    assert "enforced (1 policy)" in text


def test_identity_get_joins_pods_and_addresses(call, filled) -> None:
    value = json.loads(call("identity", "get", "300", "-o", "json").stdout)
    assert value["endpoints"] == ["shop/client"]
    assert value["prefixes"] == ["fd00::2/128", "10.244.0.2/32"]
    assert "reserved:world" in call("identity", "get", "world").stdout
    assert [r["id"] for r in json.loads(call("identity", "list", "--no-reserved", "-o", "json").stdout)] == [300]


def test_ipcache_list_sorts_joins_and_filters(call, filled) -> None:
    def prefixes(*options: str) -> list[str]:
        return [r["prefix"] for r in json.loads(call("ipcache", "list", *options, "-o", "json").stdout)]

    assert prefixes() == ["10.244.0.2/32", "10.244.1.0/24", "fd00::2/128"]
    assert prefixes("--label", "app=client") == ["10.244.0.2/32", "fd00::2/128"]
    assert prefixes("--within", "10.244.1.0/24") == ["10.244.1.0/24"]
    assert prefixes("--through", "172.31.2.10") == ["10.244.1.0/24"]
    assert prefixes("--identity", "2") == []


def test_ipcache_list_refuses_what_is_no_network(call, filled) -> None:
    result = call("ipcache", "list", "--within", "10.0.0.0/99")
    assert result.exit_code == 2
    assert "'10.0.0.0/99' is no IP address or network" in result.stderr


def test_ipcache_get_explains(call, filled) -> None:
    pod_row = {
        "prefix": "10.244.1.2/32",
        "identity": 300,
        "labels": ["k8s:app=client"],
        "tunnel": "172.31.2.10",
        "flags": ["pod"],
        "claims": ["pod shop/x"],
    }
    block = pod_row | {
        "prefix": "10.244.1.0/24",
        "identity": 3,
        "labels": ["reserved:unmanaged"],
        "claims": ["node node2"],
    }
    filled.answers["ipcache/10.244.1.2"] = {"address": "10.244.1.2", "answer": pod_row, "matches": [pod_row, block]}
    text = call("ipcache", "get", "10.244.1.2").stdout
    assert "300  app=client" in text
    assert "10.244.1.2/32 is the longest of the 2 prefixes that contain it" in text
    assert "the tunnel to 172.31.2.10" in text
    world = {"prefix": "", "identity": 2, "labels": ["reserved:world"], "tunnel": "", "flags": []}
    filled.answers["ipcache/8.8.8.8"] = {"address": "8.8.8.8", "answer": world, "matches": []}
    assert "so it is the world" in call("ipcache", "get", "8.8.8.8").stdout
    filled.answers["ipcache/x"] = (400, {"error": "'x' is no IP address"})
    assert call("ipcache", "get", "x").exit_code == 1


def test_services(call, filled) -> None:
    assert [r["id"] for r in json.loads(call("service", "list", "--empty", "-o", "json").stdout)] == [2]
    assert json.loads(call("service", "list", "-n", "sho", "-o", "json").stdout) == []
    assert "10.244.0.1:80" in call("service", "get", "10.96.0.2:80").stdout
    assert "none: connections are refused" in call("service", "get", "empty").stdout
    assert [r["id"] for r in json.loads(call("service", "list", "--warnings", "-o", "json").stdout)] == [2]
    assert json.loads(call("service", "list", "--type", "nodeport", "-o", "json").stdout) == []


def test_a_service_with_everything_behind_it(call, filled) -> None:
    local = SERVED | {"type": "NodePort", "policy": "Local", "forwarding": "dsr", "algorithm": "maglev",
                      "service": "shop/web", "port": "http", "protocol": "TCP", "frontend": "0.0.0.0:30080", "id": 4,
                      "warnings": []}  # fmt: skip
    frontends = [
        local | {"scope": "outside", "backends": [], "without_backends": "drop"},
        local | {"scope": "inside", "backends": ["10.244.0.1:80"]},
    ]
    endpoint = {"address": "10.244.0.1:80", "port": "http", "protocol": "TCP", "node": "node1", "state": "terminating",
                "weight": 50, "for_zones": ["a"], "for_nodes": ["node1"], "used": True}  # fmt: skip
    filled.answers["services"] = frontends
    filled.answers["services/shop/web"] = {
        "service": "shop/web", "type": "NodePort", "frontends": frontends, "endpoints": [endpoint],
        "health_check_port": 30001, "warnings": ["a warning"],
    }  # fmt: skip
    said = call("service", "get", ":30080").stdout
    for text in ("port 30001 of every node", "a warning", "the outside", "pods and nodes", "dropped, other nodes",
                 "maglev", "dsr", "terminating", "50", "node node1, zone a", "yes"):  # fmt: skip
        assert text in said, (text, said)


def test_policies(call, filled) -> None:
    def names(*options: str) -> list[str]:
        return [r["name"] for r in json.loads(call("policy", "list", *options, "-o", "json").stdout)]

    assert names() == ["l7", "only-clients"]
    assert names("--pod", "web") == ["only-clients"] == names("--pod", "shop/web")
    assert names("--problems") == ["l7"]
    assert names("-n", "other") == []


def test_policy_get(call, filled) -> None:
    rule = {
        "path": "ingress[0]",
        "direction": "ingress",
        "verdict": "allow",
        "peers": ["k8s:app=client"],
        "ports": ["TCP/80"],
    }
    spec = {"subject": "k8s:app=web", "default_deny": ["ingress"], "rules": [rule]}
    filled.answers["policies/NetworkPolicy/shop/only-clients"] = filled.answers["policies"][0] | {"specs": [spec]}
    text = call("policy", "get", "shop/only-clients").stdout
    for part in ("NetworkPolicy shop/only-clients", "shop/web", "k8s:app=web", "ingress[0]", "TCP/80"):
        assert part in text
