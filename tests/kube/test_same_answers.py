"""The same requests to both servers, and the answers compared: defaults filled in, fields refused, codes.

Of a success the whole object must agree (but for what time and chance decide), of a refusal its code and its fields.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

Obj = dict[str, Any]
Request = tuple[str, str, Obj | None]
MERGE = "application/merge-patch+json"
CHANCE = ("uid", "resourceVersion", "creationTimestamp", "managedFields", "deletionTimestamp", "lastTransitionTime")
pytestmark = pytest.mark.timeout(1800)

PODS, SERVICES = "/api/v1/namespaces/NS/pods", "/api/v1/namespaces/NS/services"
DEPLOYMENTS = "/apis/apps/v1/namespaces/NS/deployments"
POLICIES = "/apis/networking.k8s.io/v1/namespaces/NS/networkpolicies"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/NS/endpointslices"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/NS/leases"
EVENTS = "/api/v1/namespaces/NS/events"
CONFIG = "/api/v1/namespaces/NS/configmaps"
READY: Obj = {"type": "Ready", "status": "True"}
ABOUT: Obj = {"kind": "Pod", "namespace": "NS"}
ENDPOINT: Obj = {"addresses": ["1.2.3.4"]}
LOOPBACK: Obj = {"addresses": ["127.0.0.1"]}
ENDING: Obj = {"containers": [{"name": "c", "image": "x"}], "restartPolicy": "Never"}
TEMPLATE: Obj = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "x"}]}}
SELECTOR: Obj = {"matchLabels": {"a": "b"}}
FULL_POD: Obj = {
    "hostNetwork": True,
    "serviceAccountName": "sa",
    "terminationGracePeriodSeconds": 0,
    "volumes": [
        {"name": "e", "emptyDir": {}},
        {"name": "c", "configMap": {"name": "x"}},
        {"name": "s", "secret": {"secretName": "s"}},
        {"name": "h", "hostPath": {"path": "/x"}},
        {"name": "n"},
        {"name": "pr", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}},
        {"name": "d", "downwardAPI": {"items": [{"path": "p", "fieldRef": {"fieldPath": "metadata.name"}}]}},
    ],
    "initContainers": [{"name": "i", "image": "x:latest"}],
    "containers": [
        {
            "name": "c",
            "image": "x@sha256:abc",
            "ports": [{"containerPort": 80}, {"name": "u", "containerPort": 53, "protocol": "UDP"}],
            "env": [{"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
            "resources": {"limits": {"cpu": "1", "memory": "1Gi"}},
            "livenessProbe": {"httpGet": {"port": 80}},
            "readinessProbe": {"tcpSocket": {"port": "u"}, "periodSeconds": 3},
            "startupProbe": {"grpc": {"port": 9}},
            "lifecycle": {"preStop": {"httpGet": {"port": 80}}},
            "volumeMounts": [{"name": "e", "mountPath": "/e"}],
        }
    ],
    "tolerations": [{"operator": "Exists"}],
}


def pod(name: str, spec: Obj) -> Request:
    return "POST", PODS, {"metadata": {"name": name}, "spec": spec}


def service(name: str, **spec: Any) -> Request:
    return "POST", SERVICES, {"metadata": {"name": name}, "spec": {"ports": [{"port": 1}]} | spec}


def change(path: str, body: Obj) -> Request:
    return "PATCH", path, body


def policy(**spec: Any) -> Request:
    return "POST", POLICIES, {"metadata": {"generateName": "p"}, "spec": {"podSelector": {}} | spec}


def block(cidr: str, *exceptions: str) -> Request:
    found = {"cidr": cidr} | ({"except": list(exceptions)} if exceptions else {})
    return policy(ingress=[{"from": [{"ipBlock": found}]}])


def config(**meta: Any) -> Request:
    return "POST", CONFIG, {"metadata": {"name": "c"} | meta}


def deployment(name: str, **spec: Any) -> Request:
    body = {
        key: value for key, value in ({"selector": SELECTOR, "template": TEMPLATE} | spec).items() if value is not None
    }
    return "POST", DEPLOYMENTS, {"metadata": {"name": name}, "spec": body}


STORIES: dict[str, list[Request]] = {
    "full pod": [pod("full", FULL_POD)],
    "pod without spec": [("POST", PODS, {"metadata": {"name": "x"}})],
    "pod with doubled port names": [
        pod("x", {"containers": [{"name": "c", "image": "x", "ports": [
            {"containerPort": 1, "name": "a"}, {"containerPort": 2, "name": "a"}]}]})
    ],
    "pod status": [
        pod("p", {"restartPolicy": "Never", "containers": [{"name": "c", "image": "x:1"}]}),
        change(f"{PODS}/p/status", {"status": {"phase": "Running", "conditions": [READY]}}),
        change(f"{PODS}/p/status", {"metadata": {"labels": {"z": "1"}, "finalizers": ["a.b/c"]}}),
        change(f"{PODS}/p", {"spec": {"tolerations": []}}),
        ("DELETE", f"{PODS}/p", None),
    ],
    "deployment": [
        deployment("d"),
        change(f"{DEPLOYMENTS}/d/status", {"status": {"replicas": 1, "readyReplicas": 1}}),
        ("GET", f"{DEPLOYMENTS}/d/scale", None),
        ("PUT", f"{DEPLOYMENTS}/d/scale", {"metadata": {"name": "d"}, "spec": {"replicas": 3}}),
    ],
    "recreate": [deployment("d", replicas=0, strategy={"type": "Recreate"})],
    "no selector": [deployment("d", selector=None)],
    "empty selector": [deployment("d", selector={})],
    "negative replicas": [deployment("d", replicas=-1)],
    "template that ends": [deployment("d", template=TEMPLATE | {"spec": ENDING})],
    "load balancer": [
        service("lb", type="LoadBalancer", clusterIP="10.96.9.9", externalTrafficPolicy="Local",
                healthCheckNodePort=31111, ports=[{"port": 80, "nodePort": 31112}], sessionAffinity="ClientIP"),
        change(f"{SERVICES}/lb/status", {"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}}),
        change(f"{SERVICES}/lb", {"spec": {"type": "ClusterIP"}}),
        ("DELETE", f"{SERVICES}/lb", None),
    ],
    "external name and back": [
        service("ext", type="ExternalName", externalName="a.b", ports=[]),
        change(f"{SERVICES}/ext", {"spec": {"type": "ClusterIP", "clusterIP": "10.96.9.10", "externalName": None,
                                            "ports": [{"port": 1}]}}),
        change(f"{SERVICES}/ext", {"spec": {"type": "ExternalName", "externalName": "x.y"}}),
    ],
    "headless": [service("h", clusterIP="None", selector={"a": "b"}, ipFamilyPolicy="PreferDualStack")],
    "headless without selector": [service("h", clusterIP="None")],
    "two families without policy": [service("s", ipFamilies=["IPv4", "IPv6"])],
    "IPv6 first": [service("s", ipFamilies=["IPv6", "IPv4"], ipFamilyPolicy="RequireDualStack",
                           clusterIP="fd00:10:96::99", clusterIPs=["fd00:10:96::99", "10.96.9.11"])],
    "addresses without the first": [service("s", clusterIPs=["10.96.9.12"])],
    "doubled port": [service("s", ports=[{"name": "a", "port": 1}, {"name": "b", "port": 1}])],
    "doubled port name": [service("s", ports=[{"name": "a", "port": 1}, {"name": "a", "port": 2}])],
    "external policy of a cluster IP": [service("s", externalTrafficPolicy="Local")],
    "headless node port": [service("s", type="NodePort", clusterIP="None")],
    "node port of a cluster IP": [service("s", ports=[{"port": 1, "nodePort": 30001}])],
    "bad source range": [service("s", type="LoadBalancer", loadBalancerSourceRanges=["1.2.3.4"])],
    "bad internal policy": [service("s", internalTrafficPolicy="X")],
    "port out of range": [service("s", ports=[{"port": 70000, "targetPort": -1}])],
    "policy": [("POST", POLICIES, {"metadata": {"name": "np"}, "spec": {
        "podSelector": SELECTOR, "policyTypes": ["Egress", "Ingress"], "egress": [{}],
        "ingress": [{"from": [{"podSelector": {}, "namespaceSelector": {}}],
                     "ports": [{"port": "web"}, {"protocol": "UDP", "port": 53, "endPort": 54}]}]}})],
    "empty block": [policy(ingress=[{"from": [{"ipBlock": {}}]}])],
    "host bits": [block("10.0.0.1/8")],
    "leading zeros": [block("010.0.0.0/8")],
    "mapped address": [block("::ffff:1.2.3.0/120")],
    "exception is all": [block("10.0.0.0/8", "10.0.0.0/8")],
    "exception of another family": [block("fd00::/8", "10.0.0.0/8")],
    "three policy types": [policy(policyTypes=["Ingress", "Egress", "Ingress"])],
    "policy port out of range": [policy(ingress=[{"ports": [{"port": 70000}]}])],
    "slice": [("POST", SLICES, {"metadata": {"name": "e"}, "addressType": "IPv4", "endpoints": [ENDPOINT],
                                "ports": [{"port": 1}]})],
    "bare slice": [("POST", SLICES, {"metadata": {"name": "e"}, "addressType": "IPv6"})],
    "bad slice": [("POST", SLICES, {"metadata": {"name": "e"}, "addressType": "X", "endpoints": [{"addresses": []}]})],
    "slice of loopback": [("POST", SLICES, {"metadata": {"name": "e"}, "addressType": "IPv4",
                                            "endpoints": [LOOPBACK, {"addresses": ["1.2.3.4.5"]}]})],
    "config key": [("POST", CONFIG, {"metadata": {"name": "c"}, "data": {"a/b": "x"}})],
    "secret": [("POST", "/api/v1/namespaces/NS/secrets", {"metadata": {"name": "s"}, "data": {"a": "!!"}})],
    "lease": [
        ("POST", LEASES, {"metadata": {"name": "l"}, "spec": {"leaseDurationSeconds": 0}}),
        ("POST", LEASES, {"metadata": {"name": "l"}, "spec": {"renewTime": "2026-01-01T00:00:00Z"}}),
        ("POST", LEASES, {"metadata": {"name": "l"}, "spec": {"renewTime": "2026-01-01T00:00:00.000000Z"}}),
    ],
    "event": [
        ("POST", EVENTS, {"metadata": {"name": "e"}, "involvedObject": ABOUT, "reason": "R"}),
        ("POST", EVENTS, {"metadata": {"name": "f"}, "involvedObject": {"kind": "Pod"}}),
        ("GET", "/apis/events.k8s.io/v1/namespaces/NS/events/e", None),
    ],
    "node": [
        ("POST", "/api/v1/nodes", {"metadata": {"name": "NS"}, "spec": {"podCIDRs": ["10.0.0.0/24", "fd00::/64"]}}),
        change("/api/v1/nodes/NS", {"spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24"]}}),
        change("/api/v1/nodes/NS", {"spec": {"unschedulable": True}}),
        change("/api/v1/nodes/NS/status", {"status": {"addresses": [{"type": "InternalIP", "address": "1.1.1.1"}]}}),
        ("DELETE", "/api/v1/nodes/NS", None),
    ],
    "namespace": [
        ("GET", "/api/v1/namespaces/NS", None),
        change("/api/v1/namespaces/NS", {"metadata": {"labels": {"kubernetes.io/metadata.name": "other", "x": "y"}}}),
        ("POST", "/api/v1/namespaces", {"metadata": {"name": "a.b"}}),
    ],
    "owner without uid": [config(ownerReferences=[{"apiVersion": "v1", "kind": "Pod", "name": "x"}])],
    "unqualified finalizer": [config(finalizers=["unqualified"])],
    "bad annotation": [config(annotations={"bad key": "x"})],
    "metadata that can't change": [
        config(),
        change(f"{CONFIG}/c", {"metadata": {"name": "d"}}),
        change(f"{CONFIG}/c", {"metadata": {"uid": "d"}}),
        change(f"{CONFIG}/c", {"kind": "Pod"}),
        ("PUT", f"{CONFIG}/c", {"metadata": {}}),
        ("POST", f"{CONFIG}/c", {}),
        ("DELETE", f"{CONFIG}/nothing", None),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    """Both servers at once: the real one and the embedded one."""
    import importlib.util
    import sys

    path = Path(__file__).with_name("conftest.py")
    spec = importlib.util.spec_from_file_location("fimbria_kube_conftest", path)
    assert spec and spec.loader
    tools = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = tools
    spec.loader.exec_module(tools)
    embedded = tools.Embedded(tmp_path_factory.mktemp("fim-same-embedded"))
    real = tools.load("realserver").real_apiserver(tmp_path_factory.mktemp("fim-same-real"))
    with real as kubeconfig:
        try:
            yield tools.Client("real", kubeconfig), embedded.start()
        finally:
            embedded.kill()


def comparable(answer: Any) -> Any:
    """What must agree of an answer."""
    body = answer.body
    if answer.code >= 400:
        causes = (body.get("details") or {}).get("causes") or []
        return answer.code, body["reason"], sorted({(cause["field"], cause["reason"]) for cause in causes})
    return answer.code, _without_chance(body)


def _without_chance(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_chance(inner) for key, inner in value.items() if key not in CHANCE}
    return [_without_chance(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("story", STORIES)
def test_same_answers(pair: tuple[Any, Any], story: str) -> None:
    namespace = f"fim-{uuid.uuid4().hex[:8]}"
    for client in pair:
        client.post("/api/v1/namespaces", {"metadata": {"name": namespace}})
    for method, path, body in STORIES[story]:
        path = path.replace("NS", namespace)
        text = json.dumps(body).replace('"NS"', f'"{namespace}"')
        kind = MERGE if method == "PATCH" else "application/json"
        real, embedded = (comparable(client.call(method, path, json.loads(text), kind=kind)) for client in pair)
        assert embedded == real, f"{method} {path}"
