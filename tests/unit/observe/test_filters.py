"""Which flows a reader wants to see."""

from typing import Any

import pytest

from fimbria.observe.filters import FilterError, build

FLOW: dict[str, Any] = {
    "verdict": "DROPPED",
    "event_type": "drop",
    "traffic_direction": "INGRESS",
    "source": {"identity": 2, "labels": ["reserved:world"]},
    "destination": {"identity": 300, "labels": ["k8s:app=web"], "namespace": "shop", "pod_name": "web-1"},
    "IP": {"source": "192.0.2.1", "destination": "10.0.0.2", "ipVersion": "IPv4"},
    "l4": {"TCP": {"source_port": 4242, "destination_port": 80, "flags": ["SYN"]}},
    "drop_reason_desc": "POLICY_DENIED",
    "ingress_denied_by": [{"kind": "NetworkPolicy", "namespace": "shop", "name": "only", "path": "default deny"}],
}


@pytest.mark.parametrize(
    ("name", "match", "miss"),
    [
        ("pod", "web", "db"),
        ("pod", "shop/web", "other/web"),
        ("to-pod", "web-1", "web-2"),
        ("from-pod", "", "web"),
        ("namespace", "shop", "sho"),
        ("ip", "192.0.2.0/24", "192.0.3.0/24"),
        ("to-ip", "10.0.0.2", "192.0.2.1"),
        ("port", "80", "81"),
        ("from-port", "4242", "80"),
        ("label", "app=web", "app=db"),
        ("label", "k8s:app=web", "app"),
        ("identity", "300", "301"),
        ("identity", "world", "host"),
        ("verdict", "dropped", "forwarded"),
        ("type", "drop", "trace"),
        ("reason", "policy_denied", "policy_deny"),
        ("direction", "ingress", "egress"),
        ("protocol", "tcp", "udp"),
        ("policy", "only", "others"),
        ("policy", "shop/only", "other/only"),
    ],
)
def test_filter(name: str, match: str, miss: str) -> None:
    assert build({name: match})(FLOW)
    assert not build({name: miss})(FLOW)


def test_values_are_alternatives_and_filters_conditions() -> None:
    assert build({"port": "79,80"})(FLOW)
    assert build({"port": "80", "verdict": "dropped"})(FLOW)
    assert not build({"port": "80", "verdict": "forwarded"})(FLOW)
    assert build({})(FLOW)


def test_flows_without_addresses_match_no_address() -> None:
    flow = {k: v for k, v in FLOW.items() if k not in ("IP", "l4", "ingress_denied_by")}
    for name, value in (("ip", "192.0.2.1"), ("port", "80"), ("protocol", "tcp"), ("policy", "only")):
        assert not build({name: value})(flow)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("colour", "red", "there is no filter 'colour'; there are .*verdict"),
        ("ip", "10.0.0.300", "'10.0.0.300' is no IP address or network"),
        ("port", "http", "port 'http' is no number"),
        ("identity", "nobody", "identity 'nobody' is no number"),
    ],
)
def test_what_cannot_be_understood_is_named(name: str, value: str, text: str) -> None:
    with pytest.raises(FilterError, match=text):
        build({name: value})
