"""Services and EndpointSlices from their JSON to rows of the model."""

from typing import Any

import msgspec

from fimbria.model.address import pack
from fimbria.model.service import Endpoint, EndpointPort, EndpointSlice, Service, ServiceKey, ServicePort
from fimbria.sources.k8s.services import to_service, to_slice
from fimbria.sources.k8s.types import core

WEB = ServiceKey("shop", "web")


def service(labels: dict[str, str] | None = None, **spec: Any) -> Service:
    spec = {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]} | spec
    metadata = {"namespace": "shop", "name": "web", "labels": labels}
    return to_service(msgspec.convert({"metadata": metadata, "spec": spec}, core.Service))


def slice_(labels: dict[str, str] | None = None, **fields: Any) -> EndpointSlice | None:
    labels = {"kubernetes.io/service-name": "web"} | (labels or {})
    metadata = {"namespace": "shop", "name": "web-1", "labels": labels}
    obj = {"metadata": metadata, "addressType": "IPv4", "ports": [{"name": "", "port": 8080}]} | fields
    return to_slice(msgspec.convert(obj, core.EndpointSlice))


def test_plain() -> None:
    assert service() == Service(WEB, (pack("10.96.0.1"),), (ServicePort("", 80, 6),))


def test_dual_stack_and_protocols() -> None:
    ports = [
        {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": "dns"},
        {"name": "s", "port": 1, "protocol": "SCTP"},
    ]
    row = service(clusterIPs=["10.96.0.1", "fd96::1"], ports=ports, internalTrafficPolicy="Local")
    assert row == Service(
        WEB,
        (pack("10.96.0.1"), pack("fd96::1")),
        (ServicePort("dns", 53, 17), ServicePort("s", 1, 132)),
        internal_local=True,
    )


def test_what_has_no_cluster_ip() -> None:
    assert service(clusterIP="None", clusterIPs=["None"]).cluster_ips == ()
    assert service(clusterIP="", ports=None) == Service(WEB)
    assert service(type="ExternalName", externalName="example.org") == Service(WEB, kind="ExternalName")
    assert service({"service.kubernetes.io/service-proxy-name": "other"}) == Service(WEB)


def test_bad_parts_are_named_and_the_rest_counts() -> None:
    ports = [{"port": 0}, {"port": 70000}, {"port": 80, "protocol": "IPIP"}, {"port": 443}]
    row = service(clusterIPs=["10.96.0.300", "10.96.0.1"], ports=ports)
    assert row.cluster_ips == (pack("10.96.0.1"),)
    assert row.ports == (ServicePort("", 443, 6),)
    assert row.warnings == (
        "cluster IP '10.96.0.300' is not an IP address",
        "port 0: not a port number",
        "port 70000: not a port number",
        "port 80: unknown protocol 'IPIP'",
    )


def test_slice_with_conditions() -> None:
    endpoints = [
        {"addresses": ["10.0.0.1", "10.0.0.9"]},
        {"addresses": ["10.0.0.2"], "nodeName": "n1", "conditions": {"ready": False}},
        {"addresses": ["10.0.0.3"], "conditions": {"ready": False, "serving": True, "terminating": True}},
        {"addresses": ["10.0.0.4"], "conditions": {"ready": False, "serving": False, "terminating": None}},
    ]
    assert slice_(endpoints=endpoints) == EndpointSlice(
        "web-1",
        WEB,
        True,
        (EndpointPort("", 8080, 6),),
        (
            Endpoint(pack("10.0.0.1")),
            Endpoint(pack("10.0.0.2"), "n1", ready=False),
            Endpoint(pack("10.0.0.3"), "", False, True, True),
            Endpoint(pack("10.0.0.4"), "", False, False, False),
        ),
    )


def test_slices_that_lead_nowhere() -> None:
    assert slice_(addressType="FQDN") is None
    assert slice_({"kubernetes.io/service-name": ""}) is None
    assert slice_({"service.kubernetes.io/headless": ""}) is None
    assert slice_(ports=None, endpoints=None) == EndpointSlice("web-1", WEB, True)


def test_bad_endpoints_and_ports_are_named_and_the_rest_counts() -> None:
    row = slice_(
        ports=[
            {"name": "all"},
            {"name": "p", "port": 1, "protocol": "X"},
            {"name": "dns", "port": 53, "protocol": "UDP"},
        ],
        endpoints=[{"addresses": ["fd00::1"]}, {"addresses": ["pod"]}, {"addresses": []}, {"addresses": ["10.0.0.1"]}],
    )
    assert row is not None
    assert row.ports == (EndpointPort("dns", 53, 17),)
    assert row.endpoints == (Endpoint(pack("10.0.0.1")),)
    assert row.warnings == (
        "port all: a port number is needed",
        "port p: unknown protocol 'X'",
        "endpoint left out: fd00::1 is no IPv4 address",
        "endpoint left out: 'pod' is not an IP address",
        "endpoint left out: '' is not an IP address",
    )


def test_addresses_that_no_service_can_have() -> None:
    """A frontend of the unspecified address would be a node port, one of loopback every node's own port."""
    status = {"loadBalancer": {"ingress": [{"ip": ip} for ip in ("0.0.0.0", "::", "127.0.0.1", "::1", "203.0.113.1")]}}
    spec = {
        "type": "LoadBalancer", "clusterIPs": ["10.96.0.1", "fd96::1"], "clusterIP": "10.96.0.1",
        "externalIPs": ["224.0.0.5", "ff02::1", "255.255.255.255", "2001:db8::1"], "ports": [{"port": 30080}],
    }  # fmt: skip
    obj = {"metadata": {"namespace": "shop", "name": "web"}, "spec": spec, "status": status}
    row = to_service(msgspec.convert(obj, core.Service))
    assert row.load_balancer_ips == (pack("203.0.113.1"),) and row.external_ips == (pack("2001:db8::1"),)
    assert row.warnings[0] == "load balancer IP 0.0.0.0 is left out: no Service can have it"
    assert len(row.warnings) == 7
