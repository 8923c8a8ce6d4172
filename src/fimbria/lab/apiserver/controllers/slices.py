"""EndpointSlices of a Service: its ready and its terminating pods, one slice per family and set of ports. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from fimbria.lab.apiserver.controllers.actions import (
    Action,
    Create,
    Delete,
    Obj,
    Put,
    is_ready,
    is_terminating,
    meta,
    owner_reference,
)

SERVICE = "kubernetes.io/service-name"
MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
MANAGER = "endpointslice-controller.k8s.io"
HEADLESS = "service.kubernetes.io/headless"
LIMIT = 100
DISTRIBUTIONS = ("PreferClose", "PreferSameZone", "PreferSameNode")
PortKey = tuple[tuple[str, str, int, str], ...]


def wants_slices(service: Obj) -> bool:
    return bool(service["spec"].get("selector")) and service["spec"].get("type") != "ExternalName"


def selects(service: Obj, labels: Obj) -> bool:
    return wants_slices(service) and service["spec"]["selector"].items() <= labels.items()


def plan(service: Obj, pods: Iterable[Obj], existing: list[Obj], zones: dict[str, str]) -> list[Action]:
    """What a Service's slices need; ``pods`` are those its selector matches, ``zones`` the nodes' zones by name."""
    if is_terminating(service):
        return []
    groups: dict[tuple[str, PortKey], dict[str, Obj]] = {}
    families = service["spec"].get("ipFamilies") or ["IPv4"]
    for pod in pods:
        if (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
            continue
        ports = resolve_ports(service, pod)
        for family in families:
            address = _address(pod, family)
            if address and ports is not None:
                groups.setdefault((family, ports), {})[address] = _endpoint(service, pod, address, zones)
    for family in families:
        if not any(key[0] == family for key in groups):
            groups[family, _declared_ports(service)] = {}
    actions: list[Action] = []
    left = {meta(one)["name"]: one for one in existing if not is_terminating(one)}
    for (family, ports), endpoints in groups.items():
        mine = [one for one in left.values() if one["addressType"] == family and _port_key(one) == ports]
        for one in mine:
            del left[meta(one)["name"]]
        actions += _fill(service, family, ports, endpoints, mine)
    for one in left.values():
        actions.append(_delete(one))
    return actions


def _delete(one: Obj) -> Delete:
    return Delete("endpointslices", meta(one)["namespace"], meta(one)["name"], meta(one)["uid"])


def _address(pod: Obj, family: str) -> str | None:
    addresses = [one["ip"] for one in (pod.get("status") or {}).get("podIPs") or [] if one.get("ip")]
    return next((one for one in addresses if (":" in one) == (family == "IPv6")), None)


def resolve_ports(service: Obj, pod: Obj) -> PortKey | None:
    """The ports as this pod serves them; a name it doesn't have is left out, None if it has none of them."""
    found: list[tuple[str, str, int, str]] = []
    ports = service["spec"].get("ports") or []
    for port in ports:
        number = _target(port, pod)
        if number:
            found.append((port.get("name", ""), port.get("protocol", "TCP"), number, port.get("appProtocol", "")))
    return None if ports and not found else tuple(sorted(found))


def _target(port: Obj, pod: Obj) -> int | None:
    target = port.get("targetPort") or port["port"]
    if isinstance(target, int):
        return target
    for container in [*(pod["spec"].get("containers") or []), *(pod["spec"].get("initContainers") or [])]:
        for one in container.get("ports") or []:
            if one.get("name") == target and one.get("protocol", "TCP") == port.get("protocol", "TCP"):
                return int(one["containerPort"])
    return None


def _declared_ports(service: Obj) -> PortKey:
    """The ports of a slice without endpoints: what needs no pod to be known."""
    ports = service["spec"].get("ports") or []
    fixed = [(one.get("name", ""), one.get("protocol", "TCP"), target, one.get("appProtocol", ""))
             for one in ports if isinstance(target := one.get("targetPort") or one["port"], int)]  # fmt: skip
    return tuple(sorted(fixed))


def _port_key(one: Obj) -> PortKey:
    return tuple(
        sorted((port.get("name", ""), port.get("protocol", "TCP"), port.get("port", 0), port.get("appProtocol", ""))
               for port in one.get("ports") or [])
    )  # fmt: skip


def _endpoint(service: Obj, pod: Obj, address: str, zones: dict[str, str]) -> Obj:
    publish = bool(service["spec"].get("publishNotReadyAddresses"))
    serving, terminating = is_ready(pod), is_terminating(pod)
    endpoint: Obj = {
        "addresses": [address],
        "conditions": {
            "ready": publish or (serving and not terminating),
            "serving": publish or serving,
            "terminating": terminating,
        },
        "targetRef": {
            "kind": "Pod",
            "namespace": meta(pod)["namespace"],
            "name": meta(pod)["name"],
            "uid": meta(pod)["uid"],
        },
    }
    node = pod["spec"].get("nodeName")
    if node:
        endpoint["nodeName"] = node
        if zones.get(node):
            endpoint["zone"] = zones[node]
    if hints := _hints(service["spec"].get("trafficDistribution"), endpoint):
        endpoint["hints"] = hints
    if pod["spec"].get("hostname") and pod["spec"].get("subdomain") == meta(service)["name"]:
        endpoint["hostname"] = pod["spec"]["hostname"]
    return endpoint


def _hints(distribution: str | None, endpoint: Obj) -> Obj:
    """For whom an endpoint is meant: those of its own zone; with PreferSameNode also, and before them, of its node.
    PreferClose is the former name of PreferSameZone (KEP-4444, KEP-3015)."""
    if distribution not in DISTRIBUTIONS or not endpoint["conditions"]["ready"]:
        return {}
    hints = {"forZones": [{"name": endpoint["zone"]}]} if endpoint.get("zone") else {}
    if distribution == "PreferSameNode" and endpoint.get("nodeName"):
        hints["forNodes"] = [{"name": endpoint["nodeName"]}]
    return hints


def _fill(service: Obj, family: str, ports: PortKey, endpoints: dict[str, Obj], mine: list[Obj]) -> list[Action]:
    """Keeps endpoints in the slices they are in, so that a change touches one slice; then fills up, then adds."""
    remaining = dict(endpoints)
    contents: list[tuple[Obj, list[Obj]]] = []
    for one in sorted(mine, key=lambda each: str(meta(each)["name"])):
        addresses = [old["addresses"][0] for old in one.get("endpoints") or []]
        contents.append((one, [remaining.pop(address) for address in addresses if address in remaining]))
    rest = list(remaining.values())
    for _, inside in contents:
        take = LIMIT - len(inside)
        inside.extend(rest[:take])
        rest = rest[take:]
    actions: list[Action] = []
    kept = 0
    for one, inside in contents:
        if not inside and (kept or any(other for _, other in contents) or rest):
            actions.append(_delete(one))
            continue
        kept += 1
        actions += _update(service, one, inside)
    while rest or not kept:
        chunk, rest, kept = rest[:LIMIT], rest[LIMIT:], kept + 1
        actions.append(Create("endpointslices", _new(service, family, ports, chunk)))
    return actions


def _labels(service: Obj) -> Obj:
    labels = dict(meta(service).get("labels") or {})
    labels.pop(HEADLESS, None)
    labels |= {SERVICE: meta(service)["name"], MANAGED_BY: MANAGER}
    return labels | ({HEADLESS: ""} if service["spec"].get("clusterIP") == "None" else {})


def _update(service: Obj, one: Obj, inside: list[Obj]) -> list[Action]:
    labels = _labels(service)
    if one.get("endpoints") == inside and meta(one).get("labels") == labels:
        return []
    return [Put("endpointslices", one | {"metadata": meta(one) | {"labels": labels}, "endpoints": inside})]


def _new(service: Obj, family: str, ports: PortKey, endpoints: list[Obj]) -> Obj:
    written = [
        {"name": name, "protocol": protocol, "port": port} | ({"appProtocol": app} if app else {})
        for name, protocol, port, app in ports
    ]
    metadata = {
        "generateName": f"{meta(service)['name']}-",
        "namespace": meta(service)["namespace"],
        "labels": _labels(service),
        "ownerReferences": [owner_reference(service)],
    }
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": metadata,
        "addressType": family,
        "endpoints": endpoints,
        "ports": written,
    }
