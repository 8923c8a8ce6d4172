"""Conversion of policies: what is written comes out, and junk neither crashes it nor opens anything."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fimbria.model.labels import NAMESPACE, LabelFilter
from fimbria.model.policy import (
    ANYONE,
    EVERY_PORT,
    Direction,
    NamedPort,
    Operator,
    PortRange,
    Proto,
    Requirement,
    Selector,
    Verdict,
)
from fimbria.sources.k8s.policies import Conversion, Vocabulary, network_policy
from fimbria.sources.k8s.policies_cilium import cilium_policy
from fimbria.sources.k8s.types.cilium_policy import CiliumClusterwideNetworkPolicy, CiliumNetworkPolicy
from fimbria.sources.k8s.types.networking import NetworkPolicy

Json = dict[str, Any]
META = {"name": "p", "namespace": "shop"}


def kubernetes(spec: Json, words: Vocabulary | None = None) -> Conversion:
    wire = msgspec.json.encode({"metadata": META, "spec": spec})
    return network_policy(msgspec.json.decode(wire, type=NetworkPolicy), words or Vocabulary())


def cilium(spec: Any, words: Vocabulary | None = None) -> Conversion:
    wire = msgspec.json.encode({"metadata": META, "spec": spec})
    return cilium_policy(msgspec.json.decode(wire, type=CiliumNetworkPolicy), words or Vocabulary())


def test_a_network_policy_as_a_model() -> None:
    outcome = kubernetes(
        {
            "podSelector": {"matchLabels": {"app": "web"}},
            "ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": 80, "endPort": 90}, {"port": "http"}]}],
            "egress": [{}],
        }
    )
    assert outcome.problems == () and outcome.policy is not None
    (spec,) = outcome.policy.specs
    own = Requirement((NAMESPACE,), Operator.IN, ("shop",))
    assert spec.subject == Selector([own, Requirement(("k8s:app",), Operator.IN, ("web",))])
    assert spec.default_deny == set(Direction)
    ingress, egress = spec.rules
    assert ingress.peers == (Selector([own]),)
    assert ingress.ports == (PortRange(Proto.TCP, 80, 90), NamedPort(Proto.TCP, "http"))
    assert str(ingress.origin) == "NetworkPolicy shop/p ingress[0]"
    assert (egress.direction, egress.peers, egress.ports) == (Direction.EGRESS, (ANYONE,), (EVERY_PORT,))


def test_the_filter_decides_which_labels_peers_have() -> None:
    spec = {"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"version": "2"}}}]}]}
    assert not kubernetes(spec).problems
    narrow = Vocabulary(LabelFilter.of(["app"]))
    outcome = kubernetes(spec, narrow)
    assert [problem.path for problem in outcome.problems] == ["spec.ingress[0].from[0]"]
    assert outcome.policy is not None and outcome.policy.specs[0].rules[0].peers == ()


def test_the_cluster_has_its_name() -> None:
    rule = {"endpointSelector": {}, "ingress": [{"fromEntities": ["cluster"]}]}
    outcome = cilium(rule, Vocabulary(cluster="east"))
    assert outcome.policy is not None
    assert "k8s:io.cilium.k8s.policy.cluster=east" in {str(p) for p in outcome.policy.specs[0].rules[0].peers}


@pytest.mark.parametrize("number", [0, -1, 65536, 10**12])
def test_ports_out_of_range(number: int) -> None:
    outcome = kubernetes({"podSelector": {}, "ingress": [{"ports": [{"port": number}]}]})
    assert "is not a port (1 to 65535)" in outcome.problems[0].message
    assert outcome.policy is not None and outcome.policy.specs[0].rules[0].ports == ()


def test_long_digits_are_refused_fast() -> None:
    rule = {"endpointSelector": {}, "ingress": [{"toPorts": [{"ports": [{"port": "9" * 100_000}]}]}]}
    assert "is not a port" in cilium(rule).problems[0].message


def test_deep_nesting_is_refused() -> None:
    text = b'{"metadata":{"name":"p","namespace":"shop"},"spec":{"endpointSelector":{},"ingress":' + b"[" * 5000
    text += b"]" * 5000 + b"}}"
    try:
        policy = msgspec.json.decode(text, type=CiliumNetworkPolicy)
    except (msgspec.MsgspecError, RecursionError):
        return
    assert cilium_policy(policy).problems


# --- junk --------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 70000),
    st.text(max_size=4),
    st.sampled_from(["all", "10.0.0.0/8", "80", "::/0"]),
)
FIELDS = [
    "podSelector", "namespaceSelector", "ipBlock", "cidr", "except", "ports", "port", "endPort", "protocol", "from",
    "to", "matchLabels", "matchExpressions", "key", "operator", "values", "endpointSelector", "nodeSelector",
    "fromEndpoints", "toEndpoints", "fromEntities", "toEntities", "fromCIDR", "toCIDR", "fromCIDRSet", "toCIDRSet",
    "toPorts", "icmps", "fields", "family", "type", "ingress", "egress", "ingressDeny", "egressDeny",
    "enableDefaultDeny", "policyTypes", "toFQDNs", "rules", "authentication", "mode", "app",
]  # fmt: skip
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(FIELDS), st.text(max_size=3)), inner, max_size=4),
    ),
    max_leaves=12,
)
SECTIONS = ("ingress", "egress", "ingressDeny", "egressDeny")


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=5))
def test_junk_in_a_network_policy(spec: Json) -> None:
    try:
        outcome = kubernetes(spec)
    except msgspec.ValidationError:
        return  # refused while decoding: the informer says so
    assert outcome.policy is not None or outcome.problems


@settings(max_examples=300, deadline=None)
@given(JUNK)
def test_junk_as_a_cilium_spec(spec: Any) -> None:
    outcome = cilium(spec)
    assert outcome.policy is not None or outcome.problems


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(SECTIONS), st.dictionaries(st.sampled_from(FIELDS), JUNK, min_size=1, max_size=3))
def test_a_junk_rule_is_said_and_opens_nothing(section: str, rule: Json) -> None:
    """Either all of it is understood, or there is a problem and an allow rule allows nothing, a deny rule something."""
    outcome = cilium({"endpointSelector": {}, section: [rule]})
    assert outcome.policy is not None
    (spec,) = outcome.policy.specs
    direction = Direction.INGRESS if section.startswith("ingress") else Direction.EGRESS
    assert direction in spec.default_deny
    if outcome.problems and not all("can't be known for addresses" in p.message for p in outcome.problems):
        for one in spec.rules:
            says_something = bool(one.peers and one.ports)
            assert says_something == (one.verdict is Verdict.DENY), (one, outcome.problems)
        assert spec.rules or not section.endswith("Deny")


@settings(max_examples=200, deadline=None)
@given(JUNK)
def test_junk_as_specs(specs: Any) -> None:
    wire = msgspec.json.encode({"metadata": {"name": "p"}, "specs": specs})
    outcome = cilium_policy(msgspec.json.decode(wire, type=CiliumClusterwideNetworkPolicy))
    assert outcome.policy is not None or outcome.problems
