"""CiliumLocalRedirectPolicy (cilium.io/v2) to the model.

https://docs.cilium.io/en/stable/network/kubernetes/local-redirect-policy/ says what the fields mean. A policy that
can't be understood in full is refused: half a redirect leads clients to the wrong place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import msgspec

from fimbria.model.address import is_anybodys, pack
from fimbria.model.labels import NAMESPACE
from fimbria.model.policy import Operator, PolicyId, Problem, Requirement, Selector
from fimbria.model.protocol import WITH_PORTS
from fimbria.model.redirect import Redirect, RedirectPort
from fimbria.model.service import ServiceKey
from fimbria.sources.k8s.policies import DEFAULT_VOCABULARY, Refused, Vocabulary, checked_key, port_number, requirements
from fimbria.sources.k8s.types.cilium_redirect import CiliumLocalRedirectPolicy, Frontend, PortInfo, RedirectSpec
from fimbria.sources.k8s.types.meta import LabelSelector

KIND: Final = "CiliumLocalRedirectPolicy"
_NUMBER: Final = re.compile(r"[0-9]{1,5}")


@dataclass(frozen=True, slots=True)
class RedirectConversion:
    """`policy` is None if it can't be acted on: then the version before stays in force."""

    policy: Redirect | None
    problems: tuple[Problem, ...] = ()


def local_redirect(obj: CiliumLocalRedirectPolicy, _words: Vocabulary = DEFAULT_VOCABULARY) -> RedirectConversion:
    """Convert a policy. Raises nothing."""
    try:
        spec = msgspec.json.decode(bytes(obj.spec) or b"{}", type=RedirectSpec)
    except (msgspec.MsgspecError, RecursionError) as error:
        return RedirectConversion(None, (Problem("spec", str(error)),))
    own = PolicyId(KIND, obj.metadata.namespace, obj.metadata.name)
    try:
        return RedirectConversion(_convert(own, spec))
    except Refused as refused:
        return RedirectConversion(None, (refused.problem,))


def _convert(own: PolicyId, spec: RedirectSpec) -> Redirect:
    address, service = spec.redirect_frontend.address_matcher, spec.redirect_frontend.service_matcher
    at = "spec.redirectFrontend"
    if (address is None) == (service is None):
        raise Refused(at, "needs either an addressMatcher or a serviceMatcher")
    addr, key = None, None
    if address is not None:
        addr = _address(address, f"{at}.addressMatcher.ip")
        ports = tuple(_ports(address.to_ports or (), f"{at}.addressMatcher.toPorts"))
        if not ports:
            raise Refused(f"{at}.addressMatcher.toPorts", "names no port")
    else:
        assert service is not None
        key = _service(own, service.namespace, service.service_name, f"{at}.serviceMatcher")
        ports = tuple(_ports(service.to_ports or (), f"{at}.serviceMatcher.toPorts"))
    targets = tuple(_ports(spec.redirect_backend.to_ports or (), "spec.redirectBackend.toPorts"))
    if not targets:
        raise Refused("spec.redirectBackend.toPorts", "names no port")
    _matching(ports, targets)
    pods = _selector(own, spec.redirect_backend.local_endpoint_selector)
    return Redirect(own, addr, key, ports, pods, targets, spec.skip_redirect_from_backend)


def _address(frontend: Frontend, path: str) -> bytes:
    try:
        addr = pack(frontend.ip)
    except ValueError:
        raise Refused(path, f"{frontend.ip!r} is not an IP address") from None
    if is_anybodys(addr):
        raise Refused(path, f"{frontend.ip} can't be redirected")
    return addr


def _service(own: PolicyId, namespace: str, name: str, path: str) -> ServiceKey:
    if not name:
        raise Refused(f"{path}.serviceName", "is missing")
    if namespace and namespace != own.namespace:
        raise Refused(f"{path}.namespace", f"{namespace!r} is not the policy's own namespace")
    return ServiceKey(own.namespace, name)


def _ports(listed: Iterable[PortInfo], path: str) -> Iterator[RedirectPort]:
    seen: set[tuple[int, int]] = set()
    for n, item in enumerate(listed):
        at = f"{path}[{n}]"
        proto = WITH_PORTS.get(item.protocol.upper())
        if proto is None:
            raise Refused(f"{at}.protocol", f"{item.protocol!r} is none of TCP, UDP, SCTP")
        if not _NUMBER.fullmatch(item.port):
            raise Refused(f"{at}.port", f"{item.port!r} is not a port number")
        port = port_number(int(item.port), f"{at}.port")
        if (port, proto) in seen:
            raise Refused(at, f"{port}/{item.protocol} is there twice")
        seen.add((port, proto))
        yield RedirectPort(item.name.lower(), port, proto)


def _matching(fronts: tuple[RedirectPort, ...], targets: tuple[RedirectPort, ...]) -> None:
    """Raises Refused for a port that has no counterpart."""
    path = "spec.redirectBackend.toPorts"
    if len(targets) == 1 and len(fronts) <= 1:
        if fronts and fronts[0].proto != targets[0].proto:
            raise Refused(path, "the frontend has another protocol")
        return
    names = [(t.name, t.proto) for t in targets]
    if not all(name for name, _ in names) or len(set(names)) < len(names):
        raise Refused(path, "several ports need names, each another")
    missing = [f for f in fronts if (f.name, f.proto) not in names]
    if missing:
        raise Refused(path, f"none has the name and protocol of the frontend's port {missing[0].port}")


def _selector(own: PolicyId, selector: LabelSelector | None) -> Selector:
    path = "spec.redirectBackend.localEndpointSelector"
    if selector is None:
        raise Refused(path, "is missing")
    own_namespace = Requirement((NAMESPACE,), Operator.IN, (own.namespace,))
    return Selector([own_namespace, *requirements(selector, path, _keys)])


def _keys(key: str, path: str) -> tuple[str, ...]:
    source, colon, name = key.partition(":")
    if colon and source not in ("k8s", "any"):
        raise Refused(path, f"labels of source {source!r} don't exist here")
    return (f"k8s:{checked_key(name if colon else key, path)}",)
