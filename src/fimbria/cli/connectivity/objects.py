"""The Kubernetes objects of the test. Pure: names and addresses in, JSON-shaped objects out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from fimbria.cli.connectivity.scenario import HTTP_PORT, LAST, SERVICE_PORT, TCP_PORT, UDP_PORT, Client, Probe, Server

Json = dict[str, Any]
APP: Final = "fimbria-connectivity"
ROLE: Final = "fimbria.io/role"
CLIENT: Final = "fimbria.io/client"
RETRIED_MS: Final = 5000  # what must succeed may take one or two retransmissions, so soon after the pod's start
DENIED_MS: Final = 2500  # long enough for a second SYN to be denied as well
OPEN_ALL: Final = {4: "0.0.0.0/0", 6: "::/0"}


def namespace(name: str) -> Json:
    """Pods on the nodes' network need the label where Pod Security is enforced."""
    labels = {"app.kubernetes.io/name": APP, "pod-security.kubernetes.io/enforce": "privileged"}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def server(s: Server, node: str, image: str, host_port: int) -> Json:
    """A pod that answers HTTP, TCP and UDP; on a node's network HTTP only."""
    port = host_port if s.host else HTTP_PORT
    args = ["serve", "--name", s.name, "--http", str(port)]
    if not s.host:
        args += ["--tcp", str(TCP_PORT), "--udp", str(UDP_PORT)]
    container = {
        "name": "server",
        "image": image,
        "args": args,
        "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1},
    }
    return _pod(s.name, {ROLE: s.name}, node, [container], host=s.host, restart="Always")


def service(name: str) -> Json:
    """A cluster IP and a node port in front of a server, for both families where the cluster has them."""
    spec = {
        "type": "NodePort",
        "selector": {"app.kubernetes.io/name": APP, ROLE: name},
        "ipFamilyPolicy": "PreferDualStack",
        "ports": [{"name": "http", "port": SERVICE_PORT, "targetPort": HTTP_PORT, "protocol": "TCP"}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def client(c: Client, round_: str, node: str, image: str, *, probes: Mapping[str, Probe], policies: bool) -> Json:
    """A pod with a container for each connection: its exit code is the result. `probes` by container name."""
    containers = [
        {
            "name": name,
            "image": image,
            "args": probe_args(p, p.allowed or not policies),
            "terminationMessagePolicy": "FallbackToLogsOnError",
        }
        for name, p in probes.items()
    ]
    return _pod(f"{c.name}-{round_}", {CLIENT: c.name}, node, containers, host=c.host, restart="Never")


def probe_args(p: Probe, expected: bool) -> list[str]:
    """Arguments for the lab's tool."""
    timeout = RETRIED_MS if expected else DENIED_MS
    return ["probe", p.proto, p.address, str(p.port), "--timeout", str(timeout)]


def _pod(name: str, labels: Json, node: str, containers: list[Json], *, host: bool, restart: str) -> Json:
    spec = {
        "nodeName": node,
        "hostNetwork": host,
        "restartPolicy": restart,
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "tolerations": [{"operator": "Exists"}],
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
