"""The Kubernetes objects of the test. Pure: names and addresses in, JSON-shaped objects out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Final

from fimbria.cli.connectivity.scenario import (
    BALANCED,
    HEADLESS,
    HTTP_PORT,
    LAST,
    PAIR,
    SERVICE_PORT,
    SPREAD,
    STICKY,
    TCP_PORT,
    UDP_PORT,
    Client,
    Probe,
    Server,
)

Json = dict[str, Any]
APP: Final = "fimbria-connectivity"
ROLE: Final = "fimbria.io/role"
CLIENT: Final = "fimbria.io/client"
BEHIND: Final = "fimbria.io/behind-two"
OPEN_ALL: Final = {4: "0.0.0.0/0", 6: "::/0"}
NOBODY: Final = 65534
PAIRED: Final = (SPREAD, STICKY, HEADLESS, BALANCED)


@cache
def prober() -> str:
    """The program of all pods."""
    return files("fimbria.cli.connectivity").joinpath("prober.py").read_text()


def namespace(name: str, *, restricted: bool) -> Json:
    """Pods on the nodes' network and host ports need the label where Pod Security is enforced."""
    level = "restricted" if restricted else "privileged"
    labels = {"app.kubernetes.io/name": APP, "pod-security.kubernetes.io/enforce": level}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def server(s: Server, node: str, image: str, host_port: int, mapped_port: int = 0) -> Json:
    """A pod that answers HTTP, TCP and UDP; on a node's network HTTP only."""
    port = host_port if s.host else HTTP_PORT
    settings = {"name": s.name, "http": [port]} | ({} if s.host else {"tcp": [TCP_PORT], "udp": [UDP_PORT]})
    container = _container("server", image, "serve", settings)
    container["readinessProbe"] = {"tcpSocket": {"port": port}, "periodSeconds": 1}
    if s.name == "porter" and mapped_port:
        container["ports"] = [{"containerPort": HTTP_PORT, "hostPort": mapped_port, "protocol": "TCP"}]
    labels = {ROLE: s.name} | ({BEHIND: "yes"} if s.name in PAIR else {})
    return _pod(s.name, labels, node, [container], host=s.host, restart="Always")


def service(name: str) -> Json:
    """In front of a server, or of two, for both families where the cluster has them."""
    both = name in PAIRED
    spec: Json = {
        "type": "LoadBalancer" if name == BALANCED else "ClusterIP" if both else "NodePort",
        "selector": {"app.kubernetes.io/name": APP} | ({BEHIND: "yes"} if both else {ROLE: name}),
        "ipFamilyPolicy": "PreferDualStack",
        "ports": [{"name": "http", "port": SERVICE_PORT, "targetPort": HTTP_PORT, "protocol": "TCP"}],
    }
    spec |= {"clusterIP": "None"} if name == HEADLESS else {}
    spec |= {"sessionAffinity": "ClientIP"} if name == STICKY else {}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def client(c: Client, round_: str, node: str, image: str, *, probes: Sequence[Probe], policies: bool) -> Json:
    """A pod that tries all of them and leaves the results, in this order, in its termination message."""
    tries = [probe_of(p, p.allowed or not policies) for p in probes]
    container = _container("client", image, "try", tries)
    container["terminationMessagePolicy"] = "FallbackToLogsOnError"
    return _pod(f"{c.name}-{round_}", {CLIENT: c.name}, node, [container], host=c.host, restart="Never")


def probe_of(p: Probe, expected: bool) -> Json:
    """As the prober reads it."""
    return {"op": p.proto, "host": p.address, "port": p.port, "want": list(p.want), "allowed": expected}


def _container(name: str, image: str, mode: str, settings: object) -> Json:
    """As the Pod Security Standard "restricted" wants it."""
    return {
        "name": name,
        "image": image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python3", "-c", prober(), mode, json.dumps(settings)],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "resources": {"requests": {"cpu": "5m", "memory": "16Mi"}},
    }


def _pod(name: str, labels: Json, node: str, containers: list[Json], *, host: bool, restart: str) -> Json:
    spec = {
        "nodeName": node,
        "hostNetwork": host,
        "restartPolicy": restart,
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "tolerations": [{"operator": "Exists"}],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": NOBODY,
            "runAsGroup": NOBODY,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": containers,
    }
    metadata = {"name": name, "labels": {"app.kubernetes.io/name": APP, **labels}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def policies(fenced: Mapping[int, str]) -> list[Json]:
    """What the second round runs under; `fenced` are the addresses (by family) that a block leaves out."""
    friend = {"podSelector": {"matchLabels": {CLIENT: "friend"}}}
    blocks = [
        {"ipBlock": {"cidr": OPEN_ALL[family], "except": [f"{address}/{LAST[family]}"]}}
        for family, address in sorted(fenced.items())
    ]
    return [
        _policy("closed", ROLE, {"policyTypes": ["Ingress"]}),
        _policy(
            "guarded",
            ROLE,
            {
                "policyTypes": ["Ingress"],
                "ingress": [{"from": [friend], "ports": [{"protocol": "TCP", "port": HTTP_PORT}]}],
            },
        ),
        _policy("walled", CLIENT, {"policyTypes": ["Egress"], "egress": [{"to": blocks}]}),
        _policy("caged", CLIENT, {"policyTypes": ["Egress"]}),
    ]


def cilium_policies() -> list[Json]:
    """What Cilium's kind says that NetworkPolicy can't: a denial that wins over what is allowed."""
    friend, walled = ({"matchLabels": {CLIENT: name}} for name in ("friend", "walled"))
    port = {"ports": [{"port": str(HTTP_PORT), "protocol": "TCP"}]}
    spec = {
        "endpointSelector": {"matchLabels": {ROLE: "barred"}},
        "ingress": [{"fromEndpoints": [friend, walled], "toPorts": [port]}],
        "ingressDeny": [{"fromEndpoints": [walled]}],
    }
    return [{"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "barred"}, "spec": spec}]


def _policy(name: str, label: str, spec: Json) -> Json:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name},
        "spec": {"podSelector": {"matchLabels": {label: name}}, **spec},
    }


def why_not_ready(pod: Mapping[str, Any]) -> str:
    """What keeps a pod from running, in one sentence; for messages."""
    status = pod.get("status") or {}
    for c in status.get("containerStatuses") or ():
        for state in ("waiting", "terminated"):
            detail = (c.get("state") or {}).get(state) or {}
            text = ": ".join(str(detail[k]) for k in ("reason", "message") if detail.get(k))
            if text:
                return f"container {c['name']} is {state} ({text})"
    for condition in status.get("conditions") or ():
        if condition.get("status") == "False" and condition.get("message"):
            return str(condition["message"])
    text = ": ".join(str(status[k]) for k in ("reason", "message") if status.get(k))
    if status.get("phase") == "Running":
        return "it runs, but isn't ready yet"
    return f"its phase is {status.get('phase') or 'Pending'}" + (f" ({text})" if text else "")


def ready(pod: Mapping[str, Any]) -> bool:
    """Whether its Ready condition holds."""
    return _condition((pod.get("status") or {}).get("conditions") or (), "Ready")


def _condition(conditions: Iterable[Mapping[str, Any]], kind: str) -> bool:
    return any(c.get("type") == kind and c.get("status") == "True" for c in conditions)


def usable_node(node: Mapping[str, Any]) -> bool:
    """Ready, and not closed to pods."""
    spec, status = node.get("spec") or {}, node.get("status") or {}
    tainted = any(t.get("effect") in ("NoSchedule", "NoExecute") for t in spec.get("taints") or ())
    return _condition(status.get("conditions") or (), "Ready") and not spec.get("unschedulable") and not tainted
