"""Decoding what real servers send, and policies that may not be widened by what we don't understand."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.sources.k8s.types import cilium, core, networking
from fimbria.sources.k8s.types.cilium_policy import CiliumNetworkPolicy, ParsedRule, Rule, parse_rules
from fimbria.sources.k8s.types.meta import ApiObject
from fimbria.sources.k8s.watch import MAX_LINE, Bad, Event, EventDecoder, Failed, StreamError


def decode(type_: Any, obj: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(obj), type=type_)


def rules(**fields: Any) -> tuple[ParsedRule, ...]:
    return parse_rules(decode(CiliumNetworkPolicy, {"metadata": {"name": "p"}, **fields}))


def one(spec: Any) -> ParsedRule:
    (parsed,) = rules(spec=spec)
    return parsed


# --- wire names --------------------------------------------------------------------------------------------------


def test_names_that_are_not_plain_camel_case() -> None:
    node = decode(core.Node, {"spec": {"podCIDRs": ["10.0.0.0/24"], "podCIDR": "10.0.0.0/24", "providerID": "x"}})
    assert (node.spec.pod_cidrs, node.spec.pod_cidr, node.spec.provider_id) == (("10.0.0.0/24",), "10.0.0.0/24", "x")
    status = {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}], "hostIP": "192.0.2.1", "hostIPs": [{"ip": "::1"}]}
    pod = decode(core.Pod, {"status": status, "spec": {"containers": [{"ports": [{"hostIP": "0.0.0.0"}]}]}})
    assert (pod.status.pod_ip, pod.status.pod_ips[0].ip, pod.status.host_ips[0].ip) == ("10.0.0.1", "10.0.0.1", "::1")
    assert pod.spec.containers[0].ports[0].host_ip == "0.0.0.0"
    spec = {
        "clusterIP": "10.0.0.1",
        "clusterIPs": ["10.0.0.1"],
        "externalIPs": ["1.1.1.1"],
        "loadBalancerIP": "2.2.2.2",
    }
    service = decode(core.Service, {"spec": {**spec, "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 9}}}})
    assert (service.spec.cluster_ip, service.spec.cluster_ips, service.spec.external_ips) == (
        "10.0.0.1",
        ("10.0.0.1",),
        ("1.1.1.1",),
    )
    assert service.spec.load_balancer_ip == "2.2.2.2"
    assert service.spec.session_affinity_config.client_ip.timeout_seconds == 9
    ips = {"loadBalancer": {"ingress": [{"ip": "1.2.3.4", "ipMode": "Proxy"}]}}
    assert decode(core.Service, {"status": ips}).status.load_balancer.ingress[0].ip_mode == "Proxy"


def test_cilium_names() -> None:
    spec = {
        "instance-id": "i-1",
        "bootid": "b",
        "addresses": [{"type": "InternalIP", "ip": "192.0.2.1"}],
        "ipam": {
            "podCIDRs": ["10.1.0.0/24"],
            "pre-allocate": 8,
            "pools": {
                "requested": [{"pool": "default", "needed": {"ipv4-addrs": 16}}],
                "allocated": [{"pool": "default", "cidrs": ["10.2.0.0/24"]}],
            },
        },
    }
    status = {"ipam": {"operator-status": {"error": "x"}, "pod-cidrs": {"10.1.0.0/24": {"status": "in-use"}}}}
    node = decode(cilium.CiliumNode, {"metadata": {"name": "n"}, "spec": spec, "status": status})
    assert (node.spec.instance_id, node.spec.boot_id, node.spec.ipam.pre_allocate) == ("i-1", "b", 8)
    assert node.spec.ipam.pools.requested[0].needed.ipv4_addrs == 16
    assert node.status.ipam.operator_status.error == "x"
    again = msgspec.json.decode(msgspec.json.encode(node))
    assert again["spec"] == spec
    assert again["status"] == status
    endpoint = decode(
        cilium.CiliumEndpoint,
        {
            "status": {
                "id": 7,
                "identity": {"id": 1234, "labels": ["k8s:app=x"]},
                "networking": {"addressing": [{"ipv4": "10.0.0.1", "ipv6": "fd00::1"}], "node": "192.0.2.1"},
                "named-ports": [{"name": "http", "port": 80, "protocol": "TCP"}],
                "service-account": "default",
                "external-identifiers": {"k8s-pod-name": "p"},
            }
        },
    )
    assert endpoint.status.networking.addressing[0].ipv6 == "fd00::1"
    assert endpoint.status.named_ports[0].port == 80
    assert endpoint.status.service_account == "default"
    assert endpoint.status.external_identifiers.k8s_pod_name == "p"


@pytest.mark.parametrize(
    ("type_", "obj"),
    [
        (core.EndpointSlice, {"metadata": {"creationTimestamp": None}, "endpoints": None, "ports": None}),
        (core.Pod, {"metadata": {"labels": None}, "spec": {"containers": None}}),
        (core.Service, {"spec": {"ports": None, "selector": None}}),
        (networking.NetworkPolicy, {"spec": {"podSelector": {"matchLabels": None}, "ingress": None}}),
        (cilium.CiliumEndpoint, {"status": {"networking": {"addressing": None}, "named-ports": None}}),
    ],
)
def test_null_where_go_writes_it(type_: type[ApiObject], obj: Any) -> None:
    assert isinstance(decode(type_, obj), type_)


def test_network_policy_tells_absent_from_empty() -> None:
    ingress = [
        {},
        {"from": [{"namespaceSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}}]},
    ]
    egress = [{"to": [{"podSelector": {"matchExpressions": [{"key": "a", "operator": "Exists"}]}}]}]
    ports = [{"port": "http"}, {"port": 80, "endPort": 90, "protocol": "UDP"}]
    policy = decode(
        networking.NetworkPolicy,
        {"spec": {"podSelector": {}, "ingress": ingress, "egress": [{**egress[0], "ports": ports}]}},
    )
    everybody, some = policy.spec.ingress
    assert everybody.from_ is None
    assert some.from_[0].pod_selector is None
    assert some.from_[0].namespace_selector is not None
    assert some.from_[1].ip_block.except_ == ("10.1.0.0/16",)
    assert policy.spec.egress[0].ports[0].port == "http"
    assert (policy.spec.egress[0].ports[1].port, policy.spec.egress[0].ports[1].end_port) == (80, 90)
    assert policy.spec.policy_types is None


def test_objects_are_comparable_and_untracked() -> None:
    import gc

    pod = decode(core.Pod, {"spec": {"containers": [{"ports": [{"containerPort": 1}]}]}})
    assert not gc.is_tracked(pod)
    assert pod == decode(core.Pod, {"spec": {"containers": [{"ports": [{"containerPort": 1}]}]}})


# --- policies ----------------------------------------------------------------------------------------------------


def test_every_supported_field_is_known() -> None:
    peers = {
        "fromEndpoints": [{"matchLabels": {"k8s:app": "a"}}],
        "fromEntities": ["world"],
        "fromCIDR": ["10.0.0.0/8"],
        "fromCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}, {"cidrGroupRef": "g"}],
        "fromNodes": [{}],
        "toPorts": [{"ports": [{"port": "80", "endPort": 90, "protocol": "TCP"}]}],
        "icmps": [{"fields": [{"family": "IPv6", "type": "EchoRequest"}, {"type": 8}]}],
    }
    to = {key.replace("from", "to"): value for key, value in peers.items()}
    parsed = one(
        {
            "endpointSelector": {"matchLabels": {"a": "b"}},
            "ingress": [{**peers, "authentication": {"mode": "required"}}],
            "ingressDeny": [peers],
            "egress": [
                {**to, "toFQDNs": [{"matchPattern": "*.x"}], "toServices": [{"k8sService": {"serviceName": "s"}}]}
            ],
            "egressDeny": [to],
            "enableDefaultDeny": {"ingress": False},
            "description": "d",
            "labels": [{"key": "a", "value": "b", "source": "k8s"}],
            "log": {"value": "x"},
        }
    )
    assert (parsed.error, parsed.unknown, parsed.unsupported) == ("", (), ())
    assert parsed.rule is not None
    assert parsed.rule.ingress is not None
    assert parsed.rule.ingress[0].from_cidr_set is not None
    assert parsed.rule.ingress[0].from_cidr_set[0].except_ == ("10.1.0.0/16",)
    assert parsed.rule.enable_default_deny.ingress is False
    assert parsed.rule.enable_default_deny.egress is None
    assert parsed.rule.egress is not None
    assert parsed.rule.egress[0].to_fqdns is not None


def test_typo_in_a_peer_is_reported_where_it_stands() -> None:
    parsed = one({"endpointSelector": {}, "ingress": [{}, {"fromEndpoint": [{"matchLabels": {"a": "b"}}]}]})
    assert parsed.rule is not None
    assert parsed.unknown == ("spec.ingress[1].fromEndpoint",)


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"endpointselector": {}}, "spec.endpointselector"),
        ({"endpointSelector": {"matchLabel": {}}}, "spec.endpointSelector.matchLabel"),
        ({"egressDeny": [{"toPorts": [{"rules": {"http": []}}]}]}, "spec.egressDeny[0].toPorts[0].rules"),
        ({"ingress": [{"toPorts": [{"ports": [{"protcol": "TCP"}]}]}]}, "spec.ingress[0].toPorts[0].ports[0].protcol"),
        ({"ingress": [{"icmps": [{"fields": [{"kind": 8}]}]}]}, "spec.ingress[0].icmps[0].fields[0].kind"),
        ({"ingress": [{"fromCIDRSet": [{"excepts": []}]}]}, "spec.ingress[0].fromCIDRSet[0].excepts"),
        ({"ingressDeny": [{"authentication": {}}]}, "spec.ingressDeny[0].authentication"),
    ],
)
def test_unknown_fields_at_every_depth(spec: Any, path: str) -> None:
    assert one(spec).unknown == (path,)


def test_known_but_unsupported_fields_are_visible() -> None:
    ports = {"rules": {"http": [{"path": "/"}]}, "terminatingTLS": {}, "serverNames": ["a"], "listener": {"name": "x"}}
    parsed = one({"ingress": [{"fromGroups": [{"aws": {}}], "toPorts": [ports]}], "egress": [{"toRequires": [{}]}]})
    assert parsed.rule is not None
    assert set(parsed.unsupported) == {
        "spec.ingress[0].fromGroups",
        "spec.ingress[0].toPorts[0].rules",
        "spec.ingress[0].toPorts[0].terminatingTLS",
        "spec.ingress[0].toPorts[0].serverNames",
        "spec.ingress[0].toPorts[0].listener",
        "spec.egress[0].toRequires",
    }
    assert parsed.unknown == ()


def test_absent_and_empty_peers_differ() -> None:
    parsed = one({"ingress": [{"fromEndpoints": []}, {}]})
    assert parsed.rule is not None
    assert parsed.rule.ingress is not None
    assert parsed.rule.ingress[0].from_endpoints == ()
    assert parsed.rule.ingress[1].from_endpoints is None


def test_one_bad_rule_among_good_ones() -> None:
    good, bad, none = rules(specs=[{"endpointSelector": {}}, {"ingress": {"fromEndpoints": []}}, None])
    assert good.rule is not None
    assert good.path == "specs[0]"
    assert bad.rule is None
    assert "specs[1].ingress" in bad.error
    assert none.rule is None
    assert "specs[2]" in none.error


def test_spec_and_specs_of_any_shape() -> None:
    assert rules() == ()
    assert rules(spec=None, specs=None) == ()
    assert [parsed.path for parsed in rules(spec={}, specs=[{}])] == ["spec", "specs[0]"]
    assert "specs" in rules(specs={"a": 1})[0].error
    assert one([]).rule is None
    assert one("x").rule is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(list(Rule.__struct_encode_fields__)), inner)
    ),
    max_leaves=10,
)


@given(JSON, JSON)
def test_parsing_never_raises_and_never_guesses(spec: Any, specs: Any) -> None:
    for parsed in rules(spec=spec, specs=specs):
        assert (parsed.rule is None) == bool(parsed.error)


# --- watch streams -----------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["ok", "bad", "bookmark"]), max_size=12), st.integers(1, 60))
def test_any_cut_gives_the_same_events(kinds: list[str], size: int) -> None:
    lines = []
    for n, kind in enumerate(kinds):
        spec = {"nodeName": 5} if kind == "bad" else {"nodeName": f"n{n}"}
        obj = {"metadata": {"name": f"p{n}", "resourceVersion": str(n)}, "spec": spec}
        lines.append(
            msgspec.json.encode({"type": "BOOKMARK" if kind == "bookmark" else "ADDED", "object": obj}) + b"\n"
        )
    data = b"".join(lines)
    decoder = EventDecoder(core.Pod)
    out = [item for at in range(0, len(data), size) for item in decoder.feed(data[at : at + size])]
    assert [type(item) is Bad for item in out] == [kind == "bad" for kind in kinds]
    names = [
        item.meta.name if isinstance(item, Bad) else item.object.metadata.name
        for item in out
        if not isinstance(item, Failed)
    ]
    assert names == [f"p{n}" for n in range(len(kinds))]


def test_error_event_is_seen_even_where_its_fields_fit() -> None:
    class Anything(ApiObject, frozen=True):
        pass

    line = b'{"type":"ERROR","object":{"kind":"Status","code":410,"reason":"Expired","status":"Failure"}}\n'
    ok = b'{"type":"ADDED","object":{"metadata":{"name":"a"}}}\n'
    for type_ in (Anything, core.Pod):
        first, second = EventDecoder(type_).feed(ok + line)
        assert isinstance(first, Event)
        assert isinstance(second, Failed)
        assert second.status.code == 410


def test_endless_line_is_refused() -> None:
    decoder = EventDecoder(core.Pod)
    with pytest.raises(StreamError, match="longer than"):
        for _ in range(MAX_LINE // (1 << 20) + 1):
            decoder.feed(b"x" * (1 << 20))
