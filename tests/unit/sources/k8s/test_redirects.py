"""CiliumLocalRedirectPolicy objects: what is understood, and what is refused by name."""

import json
from typing import Any

import msgspec
import pytest

from fimbria.model.address import pack
from fimbria.model.policy import PolicyId
from fimbria.model.redirect import RedirectPort
from fimbria.model.service import ServiceKey
from fimbria.sources.k8s.redirects import KIND, RedirectConversion, local_redirect
from fimbria.sources.k8s.types.cilium_redirect import CiliumLocalRedirectPolicy

DNS = {"port": "53", "protocol": "UDP", "name": "dns"}
DNS_TCP = {"port": "53", "protocol": "TCP", "name": "dns-tcp"}
BACKEND: dict[str, Any] = {"localEndpointSelector": {"matchLabels": {"app": "cache"}}, "toPorts": [DNS]}
ADDRESS: dict[str, Any] = {"addressMatcher": {"ip": "169.254.169.254", "toPorts": [DNS]}}
SERVICE: dict[str, Any] = {"serviceMatcher": {"serviceName": "kube-dns", "namespace": "kube-system"}}


def at(ip: str, *ports: dict[str, str]) -> dict[str, Any]:
    return {"addressMatcher": {"ip": ip, "toPorts": list(ports)}}


def convert(frontend: Any = ADDRESS, backend: Any = BACKEND, **more: Any) -> RedirectConversion:
    obj = {
        "metadata": {"namespace": "kube-system", "name": "cache"},
        "spec": {"redirectFrontend": frontend, "redirectBackend": backend, **more},
    }
    return local_redirect(msgspec.json.decode(json.dumps(obj), type=CiliumLocalRedirectPolicy))


def test_an_address() -> None:
    found = convert(skipRedirectFromBackend=True, description="metadata").policy
    assert found is not None
    assert found.id == PolicyId(KIND, "kube-system", "cache")
    assert (found.addr, found.service, found.skip) == (pack("169.254.169.254"), None, True)
    assert found.ports == found.targets == (RedirectPort("dns", 53, 17),)
    assert found.pods.matches({"k8s:app": "cache", "k8s:io.kubernetes.pod.namespace": "kube-system"})
    assert not found.pods.matches({"k8s:app": "cache", "k8s:io.kubernetes.pod.namespace": "elsewhere"})
    assert not found.pods.matches({"k8s:app": "other", "k8s:io.kubernetes.pod.namespace": "kube-system"})


def test_a_service() -> None:
    found = convert(SERVICE, BACKEND | {"toPorts": [DNS, DNS_TCP]}).policy
    assert found is not None
    assert (found.addr, found.service, found.ports) == (None, ServiceKey("kube-system", "kube-dns"), ())
    assert found.targets == (RedirectPort("dns", 53, 17), RedirectPort("dns-tcp", 53, 6))
    named = {"serviceMatcher": {**SERVICE["serviceMatcher"], "toPorts": [DNS_TCP]}}
    found = convert(named, BACKEND | {"toPorts": [DNS, DNS_TCP]}).policy
    assert found is not None and found.ports == (RedirectPort("dns-tcp", 53, 6),)


NOT_REDIRECTED = ("", "0.0.0.0", "::", "127.0.0.1", "::1", "224.0.0.1", "255.255.255.255", "ff02::1")
WRONG_EXPRESSION = {"matchExpressions": [{"key": "a", "operator": "Is"}]}


@pytest.mark.parametrize(
    ("frontend", "backend", "where"),
    [
        ({}, BACKEND, "spec.redirectFrontend"),
        (ADDRESS | SERVICE, BACKEND, "spec.redirectFrontend"),
        (at("metadata", DNS), BACKEND, "addressMatcher.ip"),
        *((at(ip, DNS), BACKEND, "addressMatcher.ip") for ip in NOT_REDIRECTED),
        (at("1.2.3.4"), BACKEND, "addressMatcher.toPorts"),
        (at("1.2.3.4", DNS, DNS), BACKEND, "toPorts[1]"),
        ({"addressMatcher": {"ip": "1.2.3.4", "toPorts": [DNS], "port": 1}}, BACKEND, "unknown field `port`"),
        ({"serviceMatcher": {"serviceName": "x", "namespace": "other"}}, BACKEND, "serviceMatcher.namespace"),
        ({"serviceMatcher": {"namespace": "kube-system"}}, BACKEND, "serviceMatcher.serviceName"),
        (ADDRESS, {"toPorts": [DNS]}, "localEndpointSelector"),
        (ADDRESS, BACKEND | {"toPorts": []}, "redirectBackend.toPorts"),
        (ADDRESS, BACKEND | {"toPorts": [DNS_TCP]}, "another protocol"),
        (ADDRESS, BACKEND | {"toPorts": [DNS | {"port": "dns"}]}, "toPorts[0].port"),
        (ADDRESS, BACKEND | {"toPorts": [DNS | {"port": "0"}]}, "toPorts[0].port"),
        (ADDRESS, BACKEND | {"toPorts": [DNS | {"port": "70000"}]}, "toPorts[0].port"),
        (ADDRESS, BACKEND | {"toPorts": [DNS | {"protocol": "ANY"}]}, "toPorts[0].protocol"),
        (ADDRESS, BACKEND | {"toPorts": [DNS, DNS_TCP | {"name": ""}]}, "need names"),
        (at("1.2.3.4", DNS, DNS_TCP), BACKEND, "port 53"),
        (at("1.2.3.4", DNS, DNS_TCP), BACKEND | {"toPorts": [DNS, DNS | {"name": "x", "port": "1"}]}, "port 53"),
        (ADDRESS, BACKEND | {"localEndpointSelector": {"matchLabels": {"reserved:host": ""}}}, "'reserved'"),
        (ADDRESS, BACKEND | {"localEndpointSelector": WRONG_EXPRESSION}, "'Is'"),
        ([], BACKEND, "spec"),
    ],
)
def test_what_is_wrong_is_refused_by_name(frontend: Any, backend: Any, where: str) -> None:
    found = convert(frontend, backend)
    assert found.policy is None
    assert where in str(found.problems[0])


def test_a_typo_is_no_policy() -> None:
    assert "skipRedirectFromBackends" in str(convert(skipRedirectFromBackends=True).problems[0])
    assert local_redirect(CiliumLocalRedirectPolicy()).policy is None
