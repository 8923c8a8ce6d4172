"""What is there before anybody creates anything: the first namespaces and the ``kubernetes`` Service."""

from __future__ import annotations

import ipaddress

from fimbria.lab.apiserver.model import Key, Obj
from fimbria.lab.apiserver.registry import Registry, Write

NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")
_LABELS = {"component": "apiserver", "provider": "kubernetes"}


def ensure(registry: Registry, endpoint: tuple[str, int]) -> None:
    """Creates what is missing; ``endpoint`` is where pods can reach this server."""
    for name in NAMESPACES:
        if Key("", name) not in registry.shelf(registry.namespaces).entries:
            registry.create(registry.namespaces, "", {"metadata": {"name": name}}, Write())
    services = registry.resource("", "v1", "services")
    if Key("default", "kubernetes") not in registry.shelf(services).entries:
        pool = next(iter(registry.allocations.pools.values()))
        ports = [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": endpoint[1]}]
        spec = {"ports": ports, "clusterIP": str(pool.network[1])}
        body: Obj = {"metadata": {"name": "kubernetes", "labels": dict(_LABELS)}, "spec": spec}
        registry.create(services, "default", body, Write())
    _ensure_slice(registry, endpoint)


def _ensure_slice(registry: Registry, endpoint: tuple[str, int]) -> None:
    address = ipaddress.ip_address(endpoint[0])
    if address.is_loopback or address.is_unspecified:
        return  # an EndpointSlice can't name such an address, and no pod could use it
    res = registry.resource("discovery.k8s.io", "v1", "endpointslices")
    body: Obj = {
        "metadata": {"name": "kubernetes", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": f"IPv{address.version}",
        "endpoints": [{"addresses": [str(address)], "conditions": {"ready": True}}],
        "ports": [{"name": "https", "port": endpoint[1], "protocol": "TCP"}],
    }
    key = Key("default", "kubernetes")
    if key in registry.shelf(res).entries:
        body["metadata"]["name"] = "kubernetes"
        registry.update(res, key, body, "", Write())
    else:
        registry.create(res, "default", body, Write())
