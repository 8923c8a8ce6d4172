"""cilium.io/v2 CiliumLocalRedirectPolicy. Decoding knows every field or refuses: a typo must not widen a redirect."""

import msgspec

from fimbria.sources.k8s.types.meta import ApiObject, Condition, LabelSelector, Obj

_ABSENT = msgspec.Raw()


class PortInfo(Obj, frozen=True, forbid_unknown_fields=True):
    """`port` is a number as text; `name` is needed only among several."""

    port: str = ""
    protocol: str = ""
    name: str = ""


class Frontend(Obj, frozen=True, forbid_unknown_fields=True):
    """redirectFrontend.addressMatcher."""

    ip: str = ""
    to_ports: tuple[PortInfo, ...] | None = None


class ServiceInfo(Obj, frozen=True, forbid_unknown_fields=True):
    """redirectFrontend.serviceMatcher. No ports: all of the Service's."""

    service_name: str = ""
    namespace: str = ""
    to_ports: tuple[PortInfo, ...] | None = None


class RedirectFrontend(Obj, frozen=True, forbid_unknown_fields=True):
    """Exactly one of the two."""

    address_matcher: Frontend | None = None
    service_matcher: ServiceInfo | None = None


class RedirectBackend(Obj, frozen=True, forbid_unknown_fields=True):
    """Pods of the policy's namespace and of the node."""

    local_endpoint_selector: LabelSelector | None = None
    to_ports: tuple[PortInfo, ...] | None = None


class RedirectSpec(Obj, frozen=True, forbid_unknown_fields=True):
    """What a policy asks for."""

    redirect_frontend: RedirectFrontend = RedirectFrontend()
    redirect_backend: RedirectBackend = RedirectBackend()
    skip_redirect_from_backend: bool = False
    description: str = ""


class RedirectStatus(Obj, frozen=True):
    """What we write."""

    conditions: tuple[Condition, ...] | None = None


class CiliumLocalRedirectPolicy(ApiObject, frozen=True):
    """`spec` stays JSON until somebody looks: what is wrong with it is told in the status, not lost with the object."""

    spec: msgspec.Raw = _ABSENT
    status: RedirectStatus | None = None
