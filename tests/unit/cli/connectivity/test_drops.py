"""Which drop belongs to which connection."""

from typing import Any

import click

from fimbria.cli.connectivity.drops import hint
from fimbria.cli.connectivity.scenario import Places, Probe

PLACES = Places({"far": {4: "10.0.1.2"}, "near": {4: "10.0.0.2"}}, {"far": {4: "10.96.0.7"}}, 38080)
TO_SERVICE = Probe("c", "plain", "service far", "http", "10.96.0.7", 80, want=("far",))


def flow(client: str, to: str, asked: str = "node2", **more: Any) -> dict[str, Any]:
    return {
        "time": "2026-11-23T15:00:00Z",
        "asked": asked,
        "verdict": "DROPPED",
        "drop_reason_desc": "POLICY_DENIED",
        "source": {"namespace": "ns", "pod_name": client, "labels": ["reserved:host"], "identity": 1},
        "destination": {"namespace": "ns", "pod_name": "far"},
        "IP": {"source": "10.0.0.9", "destination": to},
        "l4": {"TCP": {"source_port": 4242, "destination_port": 8080}},
        "traffic_direction": "INGRESS",
    } | more


def said(probe: Probe, *flows: dict[str, Any]) -> str:
    return click.unstyle(hint(probe, PLACES, flows, ["node1", "node2"]))


def test_a_drop_at_the_backend_of_a_service() -> None:
    text = said(
        TO_SERVICE, flow("other-with", "10.0.1.2"), flow("plain-with", "10.0.1.2"), flow("plain-with", "10.0.1.2")
    )
    assert text.startswith("plain -> service far (HTTP IPv4): dropped on node2, 2 times: ns/plain-with")
    assert "POLICY_DENIED" in text


def test_a_dropped_answer_counts() -> None:
    back = flow("x", "10.0.0.9") | {
        "source": {"namespace": "ns", "pod_name": "far"},
        "destination": {"namespace": "ns", "pod_name": "plain-without"},
        "IP": {"source": "10.0.1.2", "destination": "10.0.0.9"},
    }
    assert "dropped on node2" in said(TO_SERVICE, back)


def test_a_node_has_no_pods_name() -> None:
    host = Probe("c", "host", "pod far", "http", "10.0.1.2", 8080)
    assert "dropped on" in said(host, flow("", "10.0.1.2"))
    assert "dropped on" not in said(host, flow("plain-with", "10.0.1.2"))


def test_none() -> None:
    expected = "no drop was seen on node1 and node2"
    assert expected in said(TO_SERVICE, flow("plain-with", "10.0.0.2"), flow("plainer-with", "10.0.1.2"))
    assert "no agent could be asked" in hint(TO_SERVICE, PLACES, [], [])
