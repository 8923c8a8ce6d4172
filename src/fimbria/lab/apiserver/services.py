"""Services: families, ClusterIP and node port allocation, defaults, validation.

The allocators' state is derived from the stored Services alone, so that it can't disagree with them.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fimbria.lab.apiserver import validation
from fimbria.lab.apiserver.errors import FieldError, duplicate, forbidden_field, invalid, required
from fimbria.lab.apiserver.model import Obj
from fimbria.lab.apiserver.strategy import Strategy

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
NODE_PORTS = range(30000, 32768)
_TYPES = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]
_WITH_PORTS = ("NodePort", "LoadBalancer")


def family_of(address: str) -> str:
    return "IPv6" if ":" in address else "IPv4"


@dataclass
class Pool:
    """The addresses of one family's service range; the first is the ``kubernetes`` Service's."""

    network: Network
    used: set[str] = field(default_factory=set)
    _next: int = 0

    def allocate(self) -> str | None:
        """A free address, upwards from the last one so that a freed address rests before its reuse."""
        size = min(self.network.num_addresses - 2, 1 << 16)
        for step in range(size):
            offset = 1 + (self._next + step) % size
            address = str(self.network[offset])
            if address not in self.used:
                self._next = offset
                return address
        return None


class Allocations:
    """Every ClusterIP and node port in use."""

    def __init__(self, networks: list[Network]):
        self.families = [f"IPv{network.version}" for network in networks]
        self.pools = {f"IPv{network.version}": Pool(network) for network in networks}
        self.ports: Counter[tuple[str, int]] = Counter()

    def free_port(self, taken: set[int]) -> int | None:
        used = {port for _, port in self.ports} | taken
        return next((port for port in NODE_PORTS if port not in used), None)

    def update(self, old: Obj | None, new: Obj | None) -> None:
        for service, present in ((old, False), (new, True)):
            for address in allocated_addresses(service) if service else ():
                pool = self.pools.get(family_of(address))
                if pool:
                    (pool.used.add if present else pool.used.discard)(address)
            for key in _node_ports(service) if service else ():
                self.ports[key] += 1 if present else -1
                if not self.ports[key]:
                    del self.ports[key]


def allocated_addresses(service: Obj) -> list[str]:
    return [address for address in service["spec"].get("clusterIPs") or [] if address not in ("", "None")]


def _node_ports(service: Obj) -> Iterator[tuple[str, int]]:
    for port in service["spec"].get("ports") or []:
        if port.get("nodePort"):
            yield port.get("protocol", "TCP"), port["nodePort"]
    if service["spec"].get("healthCheckNodePort"):
        yield "TCP", service["spec"]["healthCheckNodePort"]


class ServiceStrategy(Strategy):
    create_on_update = True
    returns_deleted = True
    name_rule = staticmethod(validation.dns_label)
    field_labels = frozenset({"spec.clusterIP", "spec.type"})

    def __init__(self, allocations: Allocations):
        self._allocations = allocations

    def default(self, obj: Obj) -> None:
        spec = obj.setdefault("spec", {})
        obj.setdefault("status", {}).setdefault("loadBalancer", {})
        spec.setdefault("sessionAffinity", "None")
        spec.setdefault("type", "ClusterIP")
        if spec["sessionAffinity"] == "ClientIP":
            config = spec.setdefault("sessionAffinityConfig", {}).setdefault("clientIP", {})
            config.setdefault("timeoutSeconds", 10800)
        for ingress in obj["status"]["loadBalancer"].get("ingress") or []:
            if ingress.get("ip"):
                ingress.setdefault("ipMode", "VIP")
        for port in spec.get("ports") or []:
            port.setdefault("protocol", "TCP")
            if port.get("targetPort") in (None, 0, "") and "port" in port:
                port["targetPort"] = port["port"]
        if spec["type"] != "ExternalName":
            spec.setdefault("internalTrafficPolicy", "Cluster")
        if spec["type"] in _WITH_PORTS:
            spec.setdefault("externalTrafficPolicy", "Cluster")
        if spec["type"] == "LoadBalancer":
            spec.setdefault("allocateLoadBalancerNodePorts", True)

    def prepare_create(self, obj: Obj) -> None:
        obj["status"] = {"loadBalancer": {}}
        _mirror_cluster_ip(obj["spec"])

    def prepare_update(self, new: Obj, old: Obj) -> None:
        new["status"] = old.get("status", {"loadBalancer": {}})
        if new["spec"]["type"] != "LoadBalancer":
            new["status"] = new["status"] | {"loadBalancer": {}}
        _carry_over(new["spec"], old["spec"])
        _mirror_cluster_ip(new["spec"])

    def validate(self, obj: Obj, old: Obj | None) -> list[FieldError]:
        """Checks, and where nothing is wrong chooses families, addresses and ports in place."""
        errors = _validate_spec(obj["spec"])
        if errors:
            return errors
        if old is not None:
            errors = _validate_change(obj["spec"], old["spec"])
        return errors or self._allocate(obj["spec"], old["spec"] if old else {})

    def fields(self, obj: Obj) -> dict[str, str]:
        spec = obj["spec"]
        return super().fields(obj) | {"spec.clusterIP": spec.get("clusterIP", ""), "spec.type": spec.get("type", "")}

    def committed(self, old: Obj | None, new: Obj | None) -> None:
        self._allocations.update(old, new)

    def _allocate(self, spec: Obj, old: Obj) -> list[FieldError]:
        if spec["type"] == "ExternalName":
            for key in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"):
                spec.pop(key, None)
            return []
        errors = choose_families(spec, self._allocations.families)
        if not errors and spec.get("clusterIP") != "None":
            errors = self._allocate_addresses(spec, set(old.get("clusterIPs") or []))
        return errors or self._allocate_ports(spec, old)

    def _allocate_addresses(self, spec: Obj, own: set[str]) -> list[FieldError]:
        addresses = list(spec.get("clusterIPs") or [])[: len(spec["ipFamilies"])]
        for at, family in enumerate(spec["ipFamilies"]):
            pool = self._allocations.pools[family]
            if at >= len(addresses):
                free = pool.allocate()
                if free is None:
                    detail = "failed to allocate IP: range is full"
                    return [invalid("spec.clusterIPs", addresses, detail)]
                addresses.append(free)
                continue
            address, where = addresses[at], f"spec.clusterIPs[{at}]"
            if address in own:
                continue
            if ipaddress.ip_address(address) not in pool.network:
                detail = f"failed to allocate IP {address}: the provided network does not match the current range"
                return [invalid("spec.clusterIPs", addresses, detail)]
            if address in pool.used:
                detail = f"failed to allocate IP {address}: provided IP is already allocated"
                return [invalid(where.rpartition("[")[0], addresses, detail)]
        spec["clusterIPs"], spec["clusterIP"] = addresses, addresses[0]
        return []

    def _allocate_ports(self, spec: Obj, old: Obj) -> list[FieldError]:
        wants = spec["type"] == "NodePort" or (
            spec["type"] == "LoadBalancer" and spec.get("allocateLoadBalancerNodePorts", True)
        )
        own = set(_node_ports({"spec": old})) if old else set()
        taken = {port["nodePort"] for port in spec.get("ports") or [] if port.get("nodePort")}
        if spec["type"] == "LoadBalancer" and spec.get("externalTrafficPolicy") == "Local":
            errors = self._health_check_port(spec, taken, own)
            if errors:
                return errors
        for at, port in enumerate(spec.get("ports") or []):
            where, number = f"spec.ports[{at}].nodePort", port.get("nodePort")
            if not number and wants:
                number = port["nodePort"] = self._allocations.free_port(taken) or 0
                taken.add(number)
                if not number:
                    return [invalid(where, 0, "failed to allocate a nodePort: range is full")]
            elif number and (port["protocol"], number) not in own:
                if number not in NODE_PORTS:
                    detail = "provided port is not in the valid range. The range of valid ports is 30000-32767"
                    return [invalid(where, number, detail)]
                if (port["protocol"], number) in self._allocations.ports:
                    return [invalid(where, number, "provided port is already allocated")]
        return []

    def _health_check_port(self, spec: Obj, taken: set[int], own: set[tuple[str, int]]) -> list[FieldError]:
        where, number = "spec.healthCheckNodePort", spec.get("healthCheckNodePort")
        if not number:
            number = spec["healthCheckNodePort"] = self._allocations.free_port(taken) or 0
            if not number:
                return [invalid(where, 0, "failed to allocate requested HealthCheck NodePort: range is full")]
        elif number not in NODE_PORTS:
            detail = "provided port is not in the valid range. The range of valid ports is 30000-32767"
            return [invalid(where, number, detail)]
        elif ("TCP", number) not in own and ("TCP", number) in self._allocations.ports:
            return [invalid(where, number, "provided port is already allocated")]
        taken.add(number)
        return []


def _mirror_cluster_ip(spec: Obj) -> None:
    """clusterIP and the first of clusterIPs are one field written twice."""
    if spec.get("clusterIP") and not spec.get("clusterIPs"):
        spec["clusterIPs"] = [spec["clusterIP"]]


def _carry_over(new: Obj, old: Obj) -> None:
    """What was allocated stays when an update leaves it out, and goes with the type that needed it."""
    if new["type"] != "ExternalName" and old["type"] != "ExternalName":
        if not new.get("clusterIP") and not new.get("clusterIPs"):
            for key in ("clusterIP", "clusterIPs"):
                if key in old:
                    new[key] = old[key]
        elif new.get("clusterIP") == old.get("clusterIP") and not new.get("clusterIPs"):
            new["clusterIPs"] = old.get("clusterIPs", [])
        for key in ("ipFamilies", "ipFamilyPolicy"):
            if not new.get(key) and old.get(key):
                new[key] = old[key]
        if new.get("ipFamilyPolicy") == "SingleStack" and old.get("ipFamilyPolicy") != "SingleStack":
            new["ipFamilies"], new["clusterIPs"] = new["ipFamilies"][:1], new["clusterIPs"][:1]
    if new["type"] == "ExternalName":
        for key in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"):
            if new.get(key) == old.get(key):
                new.pop(key, None)
    if new["type"] not in _WITH_PORTS:
        for key in ("externalTrafficPolicy", "healthCheckNodePort", "allocateLoadBalancerNodePorts"):
            if new.get(key) == old.get(key):
                new.pop(key, None)
    health, policy = "healthCheckNodePort", "externalTrafficPolicy"
    if new.get(policy) == "Local" and old.get(policy) == "Local" and not new.get(health) and old.get(health):
        new[health] = old[health]
    elif new.get(policy) != "Local" and new.get(health) == old.get(health):
        new.pop(health, None)
    ports = {(port["port"], port["protocol"]): port.get("nodePort") for port in old.get("ports") or []}
    for port in new.get("ports") or []:
        number = ports.get((port.get("port"), port.get("protocol")))
        if new["type"] in _WITH_PORTS:
            if not port.get("nodePort") and number:
                port["nodePort"] = number
        elif port.get("nodePort") == number:
            port.pop("nodePort", None)


def choose_families(spec: Obj, cluster: list[str]) -> list[FieldError]:
    """Fills in ipFamilies and ipFamilyPolicy in place, as kube-apiserver's allocator does."""
    addresses = [address for address in spec.get("clusterIPs") or [] if address != "None"]
    families: list[str] = list(spec.get("ipFamilies") or [])
    for at, address in enumerate(addresses):
        if at >= len(families):
            families.append(family_of(address))
        elif families[at] != family_of(address):
            return [invalid(f"spec.clusterIPs[{at}]", address, f'expected an {families[at]} value as indicated by '
                            f"`ipFamilies[{at}]`")]  # fmt: skip
    for at, family in enumerate(families):
        if family not in cluster:
            return [invalid(f"spec.ipFamilies[{at}]", family, "not configured on this cluster")]
    headless_bare = spec.get("clusterIP") == "None" and not spec.get("selector")
    policy = spec.get("ipFamilyPolicy") or ("RequireDualStack" if headless_bare else "SingleStack")
    if policy == "SingleStack" and len(families) > 1:
        return [invalid("spec.ipFamilyPolicy", policy, "must be 'RequireDualStack' or 'PreferDualStack' when "
                        "multiple IP families are specified")]  # fmt: skip
    if policy == "RequireDualStack" and len(cluster) < 2 and not headless_bare:
        return [invalid("spec.ipFamilyPolicy", policy, "this cluster is not configured for dual-stack services")]
    families = families or cluster[:1]
    if policy != "SingleStack" and len(families) == 1:
        other = "IPv6" if families[0] == "IPv4" else "IPv4"
        families += [other] if other in cluster or headless_bare else []
    spec["ipFamilyPolicy"], spec["ipFamilies"] = policy, families
    return []


def _validate_spec(spec: Obj) -> list[FieldError]:
    kind, headless = spec["type"], spec.get("clusterIP") == "None"
    errors = validation.one_of(kind, "spec.type", _TYPES)
    if not spec.get("ports") and not headless and kind != "ExternalName":
        errors.append(required("spec.ports"))
    if kind == "ExternalName":
        errors += _validate_external_name(spec)
    if headless and kind in _WITH_PORTS:
        errors.append(invalid("spec.clusterIPs[0]", "None", f"may not be set to 'None' for {kind} services"))
    errors += _validate_ports(spec)
    errors += validation.labels(spec.get("selector"), "spec.selector")
    errors += validation.one_of(spec["sessionAffinity"], "spec.sessionAffinity", ["ClientIP", "None"])
    for at, address in enumerate(spec.get("clusterIPs") or []):
        if address != "None" and validation.parse_ip(address) is None:
            errors.append(invalid(f"spec.clusterIPs[{at}]", address, "must be a valid IP address, (e.g. 10.9.8.7 or "
                                  "2001:db8::ffff)"))  # fmt: skip
    if spec.get("clusterIPs") and not spec.get("clusterIP"):
        detail = "must be empty when `clusterIP` is not specified"
        errors.append(invalid("spec.clusterIPs", spec["clusterIPs"], detail))
    elif spec.get("clusterIPs") and spec["clusterIP"] != spec["clusterIPs"][0]:
        errors.append(invalid("spec.clusterIPs", spec["clusterIPs"], "first value must match `clusterIP`"))
    for at, address in enumerate(spec.get("externalIPs") or []):
        if validation.parse_ip(address) is None:
            errors.append(invalid(f"spec.externalIPs[{at}]", address, "must be a valid IP address, (e.g. 10.9.8.7 or "
                                  "2001:db8::ffff)"))  # fmt: skip
    for at, cidr in enumerate(spec.get("loadBalancerSourceRanges") or []):
        if validation.parse_cidr(cidr) is None:
            errors.append(invalid(f"spec.LoadBalancerSourceRanges[{at}]", cidr, "must be a valid CIDR value, "
                                  "(e.g. 10.9.8.0/24 or 2001:db8::/64)"))  # fmt: skip
    return errors + _validate_policies(spec)


def _validate_external_name(spec: Obj) -> list[FieldError]:
    errors: list[FieldError] = []
    if not spec.get("externalName"):
        errors.append(required("spec.externalName"))
    else:
        errors += validation.dns_subdomain(spec["externalName"].rstrip("."), "spec.externalName")
    if spec.get("clusterIPs"):
        errors.append(forbidden_field("spec.clusterIPs[0]", "may not be set for ExternalName services"))
    return errors


def _validate_policies(spec: Obj) -> list[FieldError]:
    errors: list[FieldError] = []
    if "internalTrafficPolicy" in spec:
        errors += validation.one_of(spec["internalTrafficPolicy"], "spec.internalTrafficPolicy", ["Cluster", "Local"])
    if "externalTrafficPolicy" in spec:
        if spec["type"] not in _WITH_PORTS and not spec.get("externalIPs"):
            detail = "may only be set for externally-accessible services"
            errors.append(invalid("spec.externalTrafficPolicy", spec["externalTrafficPolicy"], detail))
        errors += validation.one_of(spec["externalTrafficPolicy"], "spec.externalTrafficPolicy", ["Cluster", "Local"])
    if spec.get("trafficDistribution"):
        known = ["PreferClose", "PreferSameNode", "PreferSameZone"]
        errors += validation.one_of(spec["trafficDistribution"], "spec.trafficDistribution", known)
    kind_and_policy = spec["type"], spec.get("externalTrafficPolicy")
    if spec.get("healthCheckNodePort") and kind_and_policy != ("LoadBalancer", "Local"):
        detail = "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
        errors.append(invalid("spec.healthCheckNodePort", spec["healthCheckNodePort"], detail))
    if spec.get("ipFamilyPolicy"):
        policies = ["SingleStack", "PreferDualStack", "RequireDualStack"]
        errors += validation.one_of(spec["ipFamilyPolicy"], "spec.ipFamilyPolicy", policies)
    for at, family in enumerate(spec.get("ipFamilies") or []):
        errors += validation.one_of(family, f"spec.ipFamilies[{at}]", ["IPv4", "IPv6"])
    timeout: Any = ((spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}).get("timeoutSeconds", 1)
    if not 0 < timeout <= 86400:
        where = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        errors.append(invalid(where, timeout, "must be greater than 0 and less than 86400"))
    return errors


def _validate_ports(spec: Obj) -> list[FieldError]:
    errors: list[FieldError] = []
    ports = spec.get("ports") or []
    names: set[str] = set()
    pairs: set[tuple[Any, Any]] = set()
    for at, port in enumerate(ports):
        where = f"spec.ports[{at}]"
        name, pair = port.get("name"), (port["protocol"], port.get("port"))
        if not name and len(ports) > 1:
            errors.append(required(f"{where}.name"))
        elif name:
            errors += validation.dns_label(name, f"{where}.name")
            if name in names:
                errors.append(duplicate(f"{where}.name", name))
            names.add(name)
        errors += validation.port_number(port.get("port", 0), f"{where}.port")
        errors += validation.one_of(port["protocol"], f"{where}.protocol", ["SCTP", "TCP", "UDP"])
        errors += validation.port_or_name(port.get("targetPort", 0), f"{where}.targetPort")
        if port.get("nodePort") and spec["type"] not in _WITH_PORTS:
            detail = "may not be used when `type` is 'ClusterIP'"
            errors.append(forbidden_field(f"{where}.nodePort", detail))
        if pair in pairs:
            errors.append(duplicate(where, {"protocol": pair[0], "port": pair[1]}))
        pairs.add(pair)
    return errors


def _validate_change(new: Obj, old: Obj) -> list[FieldError]:
    if "ExternalName" in (new["type"], old["type"]):
        return []
    fresh, was = new.get("clusterIPs") or [], old.get("clusterIPs") or []
    if was and fresh and fresh[0] != was[0]:
        return [invalid("spec.clusterIPs[0]", fresh, "may not change once set")]
    if len(was) > 1 and len(fresh) > 1 and fresh[1] != was[1]:
        return [invalid("spec.clusterIPs[1]", fresh, "may not change once set")]
    families, before = new.get("ipFamilies") or [], old.get("ipFamilies") or []
    if families and before and families[0] != before[0]:
        return [invalid("spec.ipFamilies[0]", families, "may not change once set")]
    return []
