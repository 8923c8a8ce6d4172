"""Roles grant what is used, and nothing else: what the API server wrote down about our service accounts is compared
with what the chart grants. Run after other tests of this folder it has seen more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from tests.cluster.bed import Cluster
from tests.cluster.bed.install import NAMESPACE

ACCOUNTS = ("fimbria", "fimbria-operator")


class Right(NamedTuple):
    """Who may do what; `resource` is GROUP/PLURAL[/SUBRESOURCE]."""

    account: str
    resource: str
    verb: str


# Granted, and not used by every run: when each of them is.
SOMETIMES = {
    Right("fimbria", "/nodes", "get"): "a node joins",
    Right("fimbria", "/namespaces", "get"): "a pod starts before its namespace was seen",
    Right("fimbria", "/pods", "get"): "a pod starts before it was seen",
    Right("fimbria", "/events", "create"): "the report of a pod is refused",
    Right("fimbria", "/events", "patch"): "and refused again",
    Right("fimbria", "cilium.io/ciliumnodes", "create"): "a node joins",
    Right("fimbria", "cilium.io/ciliumnodes", "patch"): "its addresses change, or it has another boot id",
    Right("fimbria", "cilium.io/ciliumidentities", "create"): "labels that no pod had",
    Right("fimbria", "cilium.io/ciliumidentities", "get"): "two agents wanted one number",
    Right("fimbria", "cilium.io/ciliumidentities", "patch"): "an identity that nobody used is used again",
    Right("fimbria", "cilium.io/ciliumendpoints", "get"): "a report is in the way, or to be removed",
    Right("fimbria", "cilium.io/ciliumendpoints", "patch"): "a pod's labels change",
    Right("fimbria", "cilium.io/ciliumendpointslices", "list"): "agents look for slices",
    Right("fimbria", "cilium.io/ciliumendpointslices", "watch"): "the operator makes slices",
    Right("fimbria-operator", "/nodes", "get"): "a node's taint changes, or a CiliumNode without an owner is there",
    Right("fimbria-operator", "/nodes", "patch"): "a node's taint changes",
    Right("fimbria-operator", "/nodes/status", "patch"): "a node's network is there",
    Right("fimbria-operator", "/pods", "get"): "a CiliumEndpoint without an owner is there",
    Right("fimbria-operator", "/events", "create"): "a NetworkPolicy asks for what can't be done",
    Right("fimbria-operator", "/events", "patch"): "and asks again",
    Right("fimbria-operator", "cilium.io/ciliumnodes", "get"): "a CiliumNode without an owner is there",
    Right("fimbria-operator", "cilium.io/ciliumnodes", "patch"): "a node gets its blocks",
    Right("fimbria-operator", "cilium.io/ciliumnodes", "delete"): "a CiliumNode without an owner has no Node",
    Right("fimbria-operator", "cilium.io/ciliumnodes/status", "patch"): "a pool is exhausted",
    Right("fimbria-operator", "cilium.io/ciliumidentities", "patch"): "nobody uses an identity for a minute",
    Right(
        "fimbria-operator", "cilium.io/ciliumidentities", "delete"
    ): "nobody uses an identity for a quarter of an hour",
    Right("fimbria-operator", "cilium.io/ciliumendpoints", "get"): "a CiliumEndpoint without an owner is there",
    Right("fimbria-operator", "cilium.io/ciliumendpoints", "delete"): "a CiliumEndpoint without an owner has no Pod",
    Right("fimbria-operator", "cilium.io/ciliumendpointslices", "delete"): "slices were switched off",
    **{
        Right("fimbria-operator", f"cilium.io/{kind}/status", "patch"): "a policy of the kind is made or changed"
        for kind in ("ciliumnetworkpolicies", "ciliumclusterwidenetworkpolicies", "ciliumlocalredirectpolicies")
    },
    Right("fimbria-operator", "coordination.k8s.io/leases", "create"): "the first operator of a cluster",
}


def granted(cluster: Cluster) -> Iterator[Right]:
    """What the installed roles say."""
    for account in ACCOUNTS:
        roles = [cluster.get("clusterrole", account)]
        if account == "fimbria-operator":
            roles.append(cluster.get("-n", NAMESPACE, "role", account))
        for rule in (rule for role in roles for rule in role["rules"]):
            for group in rule["apiGroups"]:
                for resource in rule["resources"]:
                    yield from (Right(account, f"{group}/{resource}", verb) for verb in rule["verbs"])


def requests(cluster: Cluster) -> Iterator[tuple[Right, dict[str, Any]]]:
    """What the service accounts asked the API server for since they have today's roles, oldest first."""
    prefix = f"system:serviceaccount:{NAMESPACE}:"
    since = max(cluster.get("clusterrolebinding", a)["metadata"]["creationTimestamp"] for a in ACCOUNTS)
    text = (cluster.layout.logs / "audit.log").read_text()
    for line in text[: text.rfind("\n") + 1].splitlines():  # without one that is being written
        if prefix not in line:
            continue
        event = json.loads(line)
        account, about = event["user"]["username"].removeprefix(prefix), event.get("objectRef", {})
        # Tokens that tests asked for are used by kubectl.
        ours = event.get("userAgent", "").startswith("fimbria")
        if event["requestReceivedTimestamp"] < since:
            continue
        if account in ACCOUNTS and ours and event["stage"] != "RequestReceived" and "resource" in about:
            names = [about["resource"], *filter(None, [about.get("subresource")])]
            yield Right(account, f"{about.get('apiGroup', '')}/{'/'.join(names)}", event["verb"]), event


@pytest.fixture
def something_happened(cluster: Cluster, namespace: str) -> None:
    """A pod came and went."""
    image = "registry.k8s.io/pause:3.10.1"
    cluster.kubectl("-n", namespace, "run", "passing", f"--image={image}", f"--labels=run={namespace}")
    cluster.kubectl("-n", namespace, "wait", "--for=condition=Ready", "pod/passing", "--timeout=60s")
    cluster.kubectl("-n", namespace, "delete", "pod", "passing", "--grace-period=1", "--timeout=60s")


def test_nothing_was_forbidden(cluster: Cluster, something_happened: None) -> None:
    """By the authorizer: admission, too, answers 403, to who writes into a namespace that is going."""
    refused = {right: event["requestReceivedTimestamp"] for right, event in requests(cluster) if forbidden(event)}
    # An API server that has just started (a test took it away) refuses what is granted until it has read its roles.
    assert not refused.keys() - set(granted(cluster)), refused


def forbidden(event: dict[str, Any]) -> bool:
    return bool(event.get("annotations", {}).get("authorization.k8s.io/decision", "") == "forbid")


def test_nothing_is_granted_that_is_not_used(cluster: Cluster, something_happened: None) -> None:
    used = {right for right, _ in requests(cluster)}
    assert used, "the audit log says nothing about us"
    rights = set(granted(cluster))
    idle = rights - used
    assert idle <= SOMETIMES.keys(), f"granted for no known reason: {sorted(idle - SOMETIMES.keys())}"
    assert SOMETIMES.keys() <= rights, f"reasons for what isn't granted: {sorted(SOMETIMES.keys() - rights)}"
