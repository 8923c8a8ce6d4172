"""Who may talk while identities come and go, on real nodes; and what authors of policies are told."""

from collections.abc import Iterator

import pytest

from fimbria.lab import cluster
from fimbria.lab.handle import Lab
from fimbria.lab.layout import LabSpec

WEB = """
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec: {nodeName: node2, containers: [{name: main, image: fimbria/labtool}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: all-but-evil}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress: [{fromEntities: [all]}]
  ingressDeny: [{fromEndpoints: [{matchLabels: {role: evil}}]}]
"""
CLIENT = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{role: {role}, only: {name}}}}}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 1
  containers: [{{name: main, image: fimbria/labtool, command: [labtool, sleep]}}]
"""
BROKEN = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: broken}
spec:
  podSelector: {matchLabels: {app: nobody}}
  ingress: [{from: [{podSelector: {matchLabels: {pod-template-hash: abc}}}]}]
"""


@pytest.fixture
def lab(lab_name: str) -> Iterator[Lab]:
    cluster.up(LabSpec(name=lab_name, nodes=2))
    yield Lab(lab_name)


def test_a_new_identity_is_denied_or_allowed_from_its_first_packet(lab: Lab) -> None:
    lab.apply(WEB)
    lab.wait_ready(["web"])
    (web, *_) = lab.addresses("web")
    for n in range(4):
        for role, through in (("evil", False), ("good", True)):
            name = f"{role}{n}"
            lab.apply(CLIENT.format(name=name, role=role))
            lab.wait_ready([name])
            # On a busy machine a client may come before the server's node has heard of it: it sends its SYN again.
            patience = "7500" if through else "1000"
            assert (lab.probe(name, "tcp", web, 9000, "--timeout", patience)["result"] == "ok") is through, name


def test_authors_of_network_policies_are_told(lab: Lab) -> None:
    lab.apply(BROKEN)

    def told() -> list[dict[str, object]]:
        events = lab.request("GET", "/api/v1/namespaces/default/events")["items"]
        return [e for e in events if e["involvedObject"]["kind"] == "NetworkPolicy"]

    (event,) = lab.wait("an event about the policy", told)
    assert (event["reason"], event["type"]) == ("NotEnforcedAsWritten", "Warning")
    assert "pod-template-hash" in str(event["message"])
