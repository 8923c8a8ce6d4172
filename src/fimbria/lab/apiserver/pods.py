"""Pods and pod templates: defaults as kube-apiserver sets them, validation, graceful deletion."""

from __future__ import annotations

from fimbria.lab.apiserver import validation
from fimbria.lab.apiserver.errors import FieldError, duplicate, forbidden_field, invalid, required
from fimbria.lab.apiserver.model import Obj
from fimbria.lab.apiserver.strategy import Strategy

_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")
_HANDLERS = ("exec", "httpGet", "tcpSocket", "grpc")
_PROTOCOLS = ["TCP", "UDP", "SCTP"]
_NOT_READY = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
_MUTABLE = (
    "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` "
    "(only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was "
    "previously negative)"
)


def default_spec(spec: Obj) -> None:
    """Defaults of a PodSpec, of a Pod or a template, in place."""
    spec.setdefault("restartPolicy", "Always")
    spec.setdefault("terminationGracePeriodSeconds", 30)
    spec.setdefault("dnsPolicy", "ClusterFirst")
    spec.setdefault("securityContext", {})
    spec.setdefault("schedulerName", "default-scheduler")
    if name := spec.get("serviceAccountName") or spec.get("serviceAccount"):
        spec["serviceAccountName"] = spec["serviceAccount"] = name
    for container in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]:
        _default_container(container, bool(spec.get("hostNetwork")))
    for volume in spec.get("volumes") or []:
        _default_volume(volume)


def _default_container(container: Obj, host_network: bool) -> None:
    container.setdefault("resources", {})
    container.setdefault("terminationMessagePath", "/dev/termination-log")
    container.setdefault("terminationMessagePolicy", "File")
    image = container.get("image", "")
    tag = image.rpartition("/")[2].partition(":")[2]
    latest = "@" not in image and tag in ("", "latest")
    container.setdefault("imagePullPolicy", "Always" if latest else "IfNotPresent")
    for port in container.get("ports") or []:
        port.setdefault("protocol", "TCP")
        if host_network:
            port.setdefault("hostPort", port.get("containerPort"))
    for variable in container.get("env") or []:
        reference = (variable.get("valueFrom") or {}).get("fieldRef")
        if reference:
            reference.setdefault("apiVersion", "v1")
    for probe in (container[key] for key in _PROBES if key in container):
        _default_probe(probe)
    for handler in (container.get("lifecycle") or {}).values():
        if isinstance(handler, dict):
            _default_handler(handler)


def _default_probe(probe: Obj) -> None:
    values = {"timeoutSeconds": 1, "periodSeconds": 10, "successThreshold": 1, "failureThreshold": 3}
    for key, value in values.items():
        probe.setdefault(key, value)
    _default_handler(probe)
    if "grpc" in probe:
        probe["grpc"].setdefault("service", "")


def _default_handler(handler: Obj) -> None:
    if "httpGet" in handler:
        handler["httpGet"].setdefault("path", "/")
        handler["httpGet"].setdefault("scheme", "HTTP")


def _default_volume(volume: Obj) -> None:
    for key in ("configMap", "secret", "projected", "downwardAPI"):
        if key in volume:
            volume[key].setdefault("defaultMode", 420)
    sources = (volume.get("projected") or {}).get("sources") or []
    for source in [volume, *sources]:
        for item in (source.get("downwardAPI") or {}).get("items") or []:
            if "fieldRef" in item:
                item["fieldRef"].setdefault("apiVersion", "v1")
        if "serviceAccountToken" in source:
            source["serviceAccountToken"].setdefault("expirationSeconds", 3600)
    if "hostPath" in volume:
        volume["hostPath"].setdefault("type", "")
    if volume.keys() == {"name"}:
        volume["emptyDir"] = {}


def validate_spec(spec: Obj, field: str) -> list[FieldError]:
    """The rules of a PodSpec that matter to networking and to a node runner."""
    errors: list[FieldError] = []
    names: set[str] = set()
    volumes = {volume.get("name") for volume in spec.get("volumes") or []}
    if not spec.get("containers"):
        errors.append(required(f"{field}.containers"))
    for key in ("initContainers", "containers"):
        for at, container in enumerate(spec.get(key) or []):
            errors += _validate_container(container, f"{field}.{key}[{at}]", names, volumes)
    for at, volume in enumerate(spec.get("volumes") or []):
        errors += _validate_name(volume.get("name"), f"{field}.volumes[{at}].name")
    errors += validation.one_of(spec.get("restartPolicy"), f"{field}.restartPolicy", ["Always", "OnFailure", "Never"])
    policies = ["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"]
    errors += validation.one_of(spec.get("dnsPolicy"), f"{field}.dnsPolicy", policies)
    if (spec.get("terminationGracePeriodSeconds") or 0) < 0:
        value = spec["terminationGracePeriodSeconds"]
        errors.append(invalid(f"{field}.terminationGracePeriodSeconds", value, "must be greater than or equal to 0"))
    if spec.get("nodeName"):
        errors += validation.dns_subdomain(spec["nodeName"], f"{field}.nodeName")
    for key in ("hostname", "subdomain"):
        if spec.get(key):
            errors += validation.dns_label(spec[key], f"{field}.{key}")
    return errors + validation.labels(spec.get("nodeSelector"), f"{field}.nodeSelector")


def _validate_name(name: str | None, field: str) -> list[FieldError]:
    return validation.dns_label(name, field) if name else [required(field)]


def _validate_container(container: Obj, field: str, names: set[str], volumes: set[str | None]) -> list[FieldError]:
    name = container.get("name")
    errors = _validate_name(name, f"{field}.name")
    if name and name in names:
        errors.append(duplicate(f"{field}.name", name))
    names.add(name or "")
    if not container.get("image"):
        errors.append(required(f"{field}.image"))
    elif container["image"].strip() != container["image"]:
        errors.append(invalid(f"{field}.image", container["image"], "must not have leading or trailing whitespace"))
    errors += validation.one_of(container["imagePullPolicy"], f"{field}.imagePullPolicy",
                                ["Always", "IfNotPresent", "Never"])  # fmt: skip
    port_names: set[str] = set()
    for at, port in enumerate(container.get("ports") or []):
        errors += _validate_port(port, f"{field}.ports[{at}]")
        if port.get("name") in port_names:
            errors.append(duplicate(f"{field}.ports[{at}].name", port["name"]))
        port_names.add(port.get("name") or "")
        port_names.discard("")
    for at, variable in enumerate(container.get("env") or []):
        if not variable.get("name"):
            errors.append(required(f"{field}.env[{at}].name"))
    for at, mount in enumerate(container.get("volumeMounts") or []):
        where = f"{field}.volumeMounts[{at}]"
        if not mount.get("mountPath"):
            errors.append(required(f"{where}.mountPath"))
        if mount.get("name") not in volumes:
            errors.append(FieldError(f"{where}.name", "FieldValueNotFound", f'Not found: "{mount.get("name", "")}"'))
    for key in _PROBES:
        if key in container and sum(handler in container[key] for handler in _HANDLERS) != 1:
            errors.append(required(f"{field}.{key}", "must specify a handler type"))
    return errors


def _validate_port(port: Obj, field: str) -> list[FieldError]:
    errors: list[FieldError] = []
    if port.get("name"):
        errors += validation.port_name(port["name"], f"{field}.name")
    if not port.get("containerPort"):
        errors.append(required(f"{field}.containerPort"))
    else:
        errors += validation.port_number(port["containerPort"], f"{field}.containerPort")
    if port.get("hostPort"):
        errors += validation.port_number(port["hostPort"], f"{field}.hostPort")
    return errors + validation.one_of(port.get("protocol"), f"{field}.protocol", _PROTOCOLS)


def qos_class(spec: Obj) -> str:
    """Guaranteed, Burstable or BestEffort, from the containers' requests and limits of cpu and memory."""
    containers = [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]
    resources = [container.get("resources") or {} for container in containers]
    named = {"cpu", "memory"}
    used = [one for one in resources if named & ({*(one.get("limits") or {})} | {*(one.get("requests") or {})})]
    if not used:
        return "BestEffort"
    for one in resources:
        limits, requests = one.get("limits") or {}, one.get("requests") or {}
        if not named <= limits.keys() or any(requests.get(key, limits[key]) != limits[key] for key in named):
            return "Burstable"
    return "Guaranteed"


class PodStrategy(Strategy):
    has_generation = True
    returns_deleted = True
    field_labels = frozenset(
        {"spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName", "spec.hostNetwork",
         "status.phase", "status.podIP", "status.podIPs", "status.nominatedNodeName"})  # fmt: skip

    def default(self, obj: Obj) -> None:
        spec = obj.setdefault("spec", {})
        default_spec(spec)
        spec.setdefault("enableServiceLinks", True)
        for condition in (obj.get("status") or {}).get("conditions") or []:
            for key in ("lastProbeTime", "lastTransitionTime"):
                condition.setdefault(key, None)
        for container in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]:
            limits = container["resources"].get("limits")
            if limits:
                container["resources"]["requests"] = limits | (container["resources"].get("requests") or {})

    def prepare_create(self, obj: Obj) -> None:
        spec = obj["spec"]
        spec.setdefault("priority", 0)
        spec.setdefault("preemptionPolicy", "PreemptLowerPriority")
        _tolerate_lost_nodes(spec)
        obj["status"] = {"phase": "Pending", "qosClass": qos_class(spec)}

    def prepare_update(self, new: Obj, old: Obj) -> None:
        _tolerate_lost_nodes(new["spec"])
        new["status"] = old.get("status", {})

    def prepare_status(self, new: Obj, old: Obj) -> None:
        super().prepare_status(new, old)
        new.setdefault("status", {})["qosClass"] = (old.get("status") or {}).get("qosClass", "BestEffort")

    def validate(self, obj: Obj, old: Obj | None) -> list[FieldError]:
        errors = validate_spec(obj["spec"], "spec")
        if old is not None and not errors and _frozen(obj["spec"]) != _frozen(old["spec"]):
            detail = f"pod updates may not change fields other than {_MUTABLE}"
            errors.append(forbidden_field("spec", detail))
        return errors

    def fields(self, obj: Obj) -> dict[str, str]:
        spec, status = obj.get("spec") or {}, obj.get("status") or {}
        return super().fields(obj) | {
            "spec.nodeName": spec.get("nodeName", ""),
            "spec.restartPolicy": spec.get("restartPolicy", ""),
            "spec.schedulerName": spec.get("schedulerName", ""),
            "spec.serviceAccountName": spec.get("serviceAccountName", ""),
            "spec.hostNetwork": str(bool(spec.get("hostNetwork"))).lower(),
            "status.phase": status.get("phase", ""),
            "status.podIP": status.get("podIP", ""),
            "status.podIPs": status.get("podIP", ""),
            "status.nominatedNodeName": status.get("nominatedNodeName", ""),
        }

    def grace(self, obj: Obj, requested: int | None) -> int | None:
        """As kube-apiserver: nobody waits for a pod that no node has, or that has already ended."""
        spec, phase = obj["spec"], (obj.get("status") or {}).get("phase")
        if not spec.get("nodeName") or phase in ("Succeeded", "Failed"):
            return 0
        seconds = requested if requested is not None else int(spec.get("terminationGracePeriodSeconds", 30))
        return max(seconds, 0)


def _tolerate_lost_nodes(spec: Obj) -> None:
    """What the DefaultTolerationSeconds admission adds: five minutes on a node that went away."""
    tolerations = spec.setdefault("tolerations", [])
    for key in _NOT_READY:
        covered = any(
            (one.get("key") == key or (not one.get("key") and one.get("operator") == "Exists"))
            and one.get("effect") in (None, "", "NoExecute")
            for one in tolerations
        )
        if not covered:
            tolerations.append({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300})


def _frozen(spec: Obj) -> Obj:
    """The spec without what an update may change."""
    kept = {key: value for key, value in spec.items()
            if key not in ("activeDeadlineSeconds", "tolerations", "ephemeralContainers")}  # fmt: skip
    for key in ("containers", "initContainers"):
        if key in kept:
            kept[key] = [{name: value for name, value in one.items() if name != "image"} for one in kept[key]]
    return kept
