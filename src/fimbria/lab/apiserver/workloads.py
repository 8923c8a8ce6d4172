"""Deployments, ReplicaSets, DaemonSets, EndpointSlices and Endpoints: defaults and validation."""

from __future__ import annotations

from fimbria.lab.apiserver import pods, validation
from fimbria.lab.apiserver.errors import FieldError, invalid, not_supported, required
from fimbria.lab.apiserver.model import Obj
from fimbria.lab.apiserver.selectors import match_label_selector
from fimbria.lab.apiserver.strategy import Strategy


class WorkloadStrategy(Strategy):
    """What has a selector and a pod template."""

    has_generation = True

    def default(self, obj: Obj) -> None:
        obj.setdefault("status", {})
        template = obj.setdefault("spec", {}).setdefault("template", {})
        template.setdefault("metadata", {})
        pods.default_spec(template.setdefault("spec", {}))

    def prepare_create(self, obj: Obj) -> None:
        obj["status"] = {}

    def prepare_update(self, new: Obj, old: Obj) -> None:
        new["status"] = old.get("status", {})

    def prepare_status(self, new: Obj, old: Obj) -> None:
        super().prepare_status(new, old)
        new["metadata"]["labels"] = old["metadata"].get("labels", {})
        if not new["metadata"]["labels"]:
            del new["metadata"]["labels"]

    def validate(self, obj: Obj, old: Obj | None) -> list[FieldError]:
        spec = obj["spec"]
        errors: list[FieldError] = []
        selector = spec.get("selector")
        if selector is None:
            labels = spec["template"]["metadata"].get("labels") or {}
            detail = "`selector` does not match template `labels`"
            errors.append(required("spec.selector"))
            errors.append(invalid("spec.template.metadata.labels", labels, detail))
        else:
            errors += validation.label_selector(selector, "spec.selector")
            if not selector.get("matchLabels") and not selector.get("matchExpressions"):
                errors.append(invalid("spec.selector", selector, "empty selector is invalid for deployment"))
        if spec.get("replicas", 0) < 0:
            errors.append(invalid("spec.replicas", spec["replicas"], "must be greater than or equal to 0"))
        if errors:
            return errors
        labels = spec["template"]["metadata"].get("labels") or {}
        if not match_label_selector(selector, labels):
            detail = "`selector` does not match template `labels`"
            errors.append(invalid("spec.template.metadata.labels", labels, detail))
        template = spec["template"]["spec"]
        errors += pods.validate_spec(template, "spec.template.spec")
        if template["restartPolicy"] != "Always":
            errors.append(not_supported("spec.template.spec.restartPolicy", template["restartPolicy"], ["Always"]))
        if old and old["spec"].get("selector") != selector:
            errors.append(validation.immutable("spec.selector", selector))
        return errors


class DeploymentStrategy(WorkloadStrategy):
    def default(self, obj: Obj) -> None:
        super().default(obj)
        spec = obj["spec"]
        values = {"replicas": 1, "revisionHistoryLimit": 10, "progressDeadlineSeconds": 600}
        for key, value in values.items():
            spec.setdefault(key, value)
        strategy = spec.setdefault("strategy", {})
        if strategy.setdefault("type", "RollingUpdate") == "RollingUpdate":
            rolling = strategy.setdefault("rollingUpdate", {})
            rolling.setdefault("maxUnavailable", "25%")
            rolling.setdefault("maxSurge", "25%")

    def validate(self, obj: Obj, old: Obj | None) -> list[FieldError]:
        kinds = ["Recreate", "RollingUpdate"]
        kind = obj["spec"]["strategy"]["type"]
        return super().validate(obj, old) + validation.one_of(kind, "spec.strategy.type", kinds)


class ReplicaSetStrategy(WorkloadStrategy):
    field_labels = frozenset({"status.replicas"})

    def default(self, obj: Obj) -> None:
        super().default(obj)
        obj["spec"].setdefault("replicas", 1)
        obj["status"].setdefault("replicas", 0)

    def prepare_create(self, obj: Obj) -> None:
        obj["status"] = {"replicas": 0}

    def fields(self, obj: Obj) -> dict[str, str]:
        return super().fields(obj) | {"status.replicas": str(obj["status"].get("replicas", 0))}


DAEMON_STATUS = ("currentNumberScheduled", "numberMisscheduled", "desiredNumberScheduled", "numberReady")


class DaemonSetStrategy(WorkloadStrategy):
    def default(self, obj: Obj) -> None:
        super().default(obj)
        spec = obj["spec"]
        spec.setdefault("revisionHistoryLimit", 10)
        update = spec.setdefault("updateStrategy", {})
        if update.setdefault("type", "RollingUpdate") == "RollingUpdate":
            rolling = update.setdefault("rollingUpdate", {})
            rolling.setdefault("maxUnavailable", 1)
            rolling.setdefault("maxSurge", 0)
        for key in DAEMON_STATUS:
            obj["status"].setdefault(key, 0)

    def prepare_create(self, obj: Obj) -> None:
        obj["status"] = dict.fromkeys(DAEMON_STATUS, 0)


class EndpointSliceStrategy(Strategy):
    has_generation = True

    def default(self, obj: Obj) -> None:
        for port in obj.setdefault("ports", None) or []:
            port.setdefault("name", "")
            port.setdefault("protocol", "TCP")
        for endpoint in obj.setdefault("endpoints", None) or []:
            endpoint.setdefault("conditions", {})

    def validate(self, obj: Obj, old: Obj | None) -> list[FieldError]:
        family = obj.get("addressType")
        errors = [] if family else [required("addressType")]
        if family and family not in ("IPv4", "IPv6", "FQDN"):
            errors.append(not_supported("addressType", family, ["FQDN", "IPv4", "IPv6"]))
        if old and old.get("addressType") != family:
            errors.append(validation.immutable("addressType", family))
        for at, endpoint in enumerate(obj["endpoints"] or []):
            errors += _endpoint(endpoint, family or "", f"endpoints[{at}]")
        for at, port in enumerate(obj["ports"] or []):
            if port["name"]:
                errors += validation.dns_label(port["name"], f"ports[{at}].name")
            errors += validation.one_of(port["protocol"], f"ports[{at}].protocol", ["SCTP", "TCP", "UDP"])
        return errors


def _endpoint(endpoint: Obj, family: str, field: str) -> list[FieldError]:
    addresses = endpoint.get("addresses") or []
    if not addresses:
        return [required(f"{field}.addresses", "must contain at least 1 address")]
    errors: list[FieldError] = []
    for at, address in enumerate(addresses):
        found = validation.parse_ip(address)
        where = f"{field}.addresses[{at}]"
        if family == "FQDN":
            errors += validation.dns_subdomain(address, where)
        elif found is None:
            detail = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
            errors.append(invalid(where, address, detail))
        elif family in ("IPv4", "IPv6") and family != f"IPv{found.version}":
            errors.append(invalid(where, address, f"must be an {family} address"))
        elif found.is_unspecified or found.is_loopback or found.is_link_local or found.is_multicast:
            errors.append(
                invalid(where, address, "may not be an unspecified, loopback, link-local or multicast address")
            )
    return errors


class EndpointsStrategy(Strategy):
    create_on_update = True

    def default(self, obj: Obj) -> None:
        for subset in obj.get("subsets") or []:
            for port in subset.get("ports") or []:
                port.setdefault("protocol", "TCP")
