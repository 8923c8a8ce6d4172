"""Services as rows of the lab's API server, see `cluster_data.load`, and as bodies of requests. Pure."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from tests.bench.cluster_data import CREATED, Row
from tests.bench.rules import PORT, address

SERVICES: Final = "services"
SLICES: Final = "endpointslices.discovery.k8s.io"
NAMESPACE: Final = "default"
SLICE_PATH: Final = f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices"
Backends = Sequence[str]


def _meta(kind: str, name: str) -> dict[str, Any]:
    uid = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{kind}/{name}"))
    return {"name": name, "namespace": NAMESPACE, "uid": uid, "creationTimestamp": CREATED, "generation": 1}


def service(number: int, *, proto: str = "TCP", node_port: int = 0, **spec: object) -> dict[str, Any]:
    """A Service without a selector, with all that an API server fills in."""
    port = {"name": "p", "port": PORT, "targetPort": 9000, "protocol": proto}
    kind = {"type": "NodePort", "externalTrafficPolicy": "Cluster"} if node_port else {"type": "ClusterIP"}
    own = {
        "clusterIP": address(number), "clusterIPs": [address(number)], "ipFamilies": ["IPv4"],
        "ipFamilyPolicy": "SingleStack", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
        "ports": [port | ({"nodePort": node_port} if node_port else {})],
    }  # fmt: skip
    return {"apiVersion": "v1", "kind": "Service", "metadata": _meta("Service", f"s{number}"),
            "spec": own | kind | spec, "status": {"loadBalancer": {}}}  # fmt: skip


def endpoint_slice(
    number: int, backends: Backends, *, proto: str = "TCP", port: int = 9000, part: int = 0
) -> dict[str, Any]:
    """One of a Service's EndpointSlices, every endpoint ready."""
    name = f"s{number}-{part}"
    meta = _meta("EndpointSlice", name) | {"labels": {"kubernetes.io/service-name": f"s{number}"}}
    conditions = {"ready": True, "serving": True, "terminating": False}
    return {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4", "metadata": meta,
        "endpoints": [{"addresses": [b], "conditions": conditions} for b in backends],
        "ports": [{"name": "p", "port": port, "protocol": proto}],
    }  # fmt: skip


def rows(services: Iterable[dict[str, Any]], slices: Iterable[dict[str, Any]]) -> Iterator[Row]:
    """For the database."""
    for resource, bodies in ((SERVICES, services), (SLICES, slices)):
        for body in bodies:
            yield resource, NAMESPACE, body["metadata"]["name"], body
