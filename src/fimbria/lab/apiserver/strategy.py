"""What differs between kinds: defaults, validation, what an update may touch. Kinds override the base's rules."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from fimbria.lab.apiserver import decoding, validation
from fimbria.lab.apiserver.errors import FieldError, forbidden_field, invalid
from fimbria.lab.apiserver.fieldsets import Shape, shape_of_type
from fimbria.lab.apiserver.model import Obj
from fimbria.lab.apiserver.types import Type

if TYPE_CHECKING:
    from fimbria.lab.apiserver.model import Resource


class Strategy:
    """The rules of a plain kind: stored as sent, metadata validated, spec and status if the type has them."""

    has_generation = False
    unconditional_update = True
    """Whether an update without a resourceVersion is accepted."""
    create_on_update = False
    """Whether a PUT of something that isn't there creates it."""
    returns_deleted = False
    """Whether a finished DELETE answers with the object instead of a Status."""
    name_rule: Callable[[str, str], list[FieldError]] = staticmethod(validation.dns_subdomain)
    field_labels: frozenset[str] = frozenset()
    """What a field selector may name besides metadata.name and metadata.namespace."""

    def decode(self, res: Resource, obj: Obj) -> list[str]:
        """Prunes in place what the type doesn't know and returns those paths. Raises ApiError 400."""
        described = f'{res.kind} in version "{res.version}" cannot be handled as a {res.kind}'
        return decoding.prune(obj, Type(res.type_name), described)

    def shape(self, res: Resource) -> Shape:
        """How objects merge in server-side apply."""
        return shape_of_type(Type(res.type_name))

    def default(self, obj: Obj) -> None:
        """Fills in defaults in place; called on every decoded object and must be idempotent."""

    def prepare_create(self, obj: Obj) -> None:
        """Drops or sets what a client can't choose. Status isn't the creator's to write."""
        obj.pop("status", None)

    def prepare_update(self, new: Obj, old: Obj) -> None:
        _restore(new, old, "status")

    def prepare_status(self, new: Obj, old: Obj) -> None:
        """Of a write to the status subresource only status counts (and labels and annotations, for built-in kinds)."""
        for key in old.keys() | new.keys():
            if key not in ("status", "metadata"):
                _restore(new, old, key)
        _restore(new["metadata"], old["metadata"], "ownerReferences")

    def validate(self, obj: Obj, old: Obj | None) -> list[FieldError]:
        return []

    def validate_status(self, obj: Obj, old: Obj) -> list[FieldError]:
        return []

    def spec_changed(self, new: Obj, old: Obj) -> bool:
        """Whether the generation goes up: what isn't metadata or status changed."""
        ignored = ("metadata", "status", "apiVersion", "kind")
        return any(new.get(key) != old.get(key) for key in new.keys() | old.keys() if key not in ignored)

    def fields(self, obj: Obj) -> dict[str, str]:
        """What field selectors may ask for."""
        meta = obj["metadata"]
        return {"metadata.name": meta["name"], "metadata.namespace": meta.get("namespace", "")}

    def knows_field(self, name: str) -> bool:
        return name in ("metadata.name", "metadata.namespace") or name in self.field_labels

    def grace(self, obj: Obj, requested: int | None) -> int | None:
        """Seconds an object stays after DELETE for whoever runs it; None for kinds that know no such thing."""
        return None

    def committed(self, old: Obj | None, new: Obj | None) -> None:
        """Told after every stored change (and of each object at start), for allocators."""


def _restore(new: Obj, old: Obj, key: str) -> None:
    if key in old:
        new[key] = old[key]
    else:
        new.pop(key, None)


class CreateOnUpdate(Strategy):
    create_on_update = True


class Rbac(CreateOnUpdate):
    name_rule = staticmethod(validation.path_segment)


class NamespaceStrategy(Strategy):
    returns_deleted = True
    name_rule = staticmethod(validation.dns_label)
    field_labels = frozenset({"status.phase", "name"})

    def default(self, obj: Obj) -> None:
        name = obj["metadata"].get("name")
        if name:
            obj["metadata"].setdefault("labels", {})["kubernetes.io/metadata.name"] = name

    def prepare_create(self, obj: Obj) -> None:
        finalizers = (obj.get("spec") or {}).get("finalizers") or []
        obj["spec"] = {"finalizers": list(dict.fromkeys([*finalizers, "kubernetes"]))}
        obj["status"] = {"phase": "Active"}

    def prepare_update(self, new: Obj, old: Obj) -> None:
        new["spec"], new["status"] = old.get("spec", {}), old.get("status", {})

    def prepare_finalize(self, new: Obj, old: Obj) -> None:
        """Of a write to the finalize subresource only spec.finalizers counts."""
        spec, status = new.get("spec") or {}, old.get("status", {})
        new["spec"], new["status"] = spec, status

    def fields(self, obj: Obj) -> dict[str, str]:
        phase = (obj.get("status") or {}).get("phase", "")
        return super().fields(obj) | {"status.phase": phase, "name": obj["metadata"]["name"]}


NODE_INFO = ("architecture", "bootID", "containerRuntimeVersion", "kernelVersion", "kubeProxyVersion", "kubeletVersion",
             "machineID", "operatingSystem", "osImage", "systemUUID")  # fmt: skip
_CONFIG_KEY = re.compile(r"^[-._a-zA-Z0-9]+$")
_CONFIG_KEY_RULE = (
    "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or "
    "'key-name', regex used for validation is '[-._a-zA-Z0-9]+')"
)


class NodeStrategy(Strategy):
    field_labels = frozenset({"spec.unschedulable"})

    def prepare_create(self, obj: Obj) -> None:
        """A kubelet registers itself with its status in one request: it stays."""

    def default(self, obj: Obj) -> None:
        spec = obj.setdefault("spec", {})
        status = obj.setdefault("status", {})
        status.setdefault("daemonEndpoints", {"kubeletEndpoint": {"Port": 0}})
        info = status.setdefault("nodeInfo", {})
        for key in NODE_INFO:
            info.setdefault(key, "")
        if spec.get("podCIDR") and not spec.get("podCIDRs"):
            spec["podCIDRs"] = [spec["podCIDR"]]
        elif spec.get("podCIDRs") and not spec.get("podCIDR"):
            spec["podCIDR"] = spec["podCIDRs"][0]

    def validate(self, obj: Obj, old: Obj | None) -> list[FieldError]:
        errors: list[FieldError] = []
        cidrs = obj["spec"].get("podCIDRs") or []
        for at, cidr in enumerate(cidrs):
            if validation.parse_cidr(cidr) is None:
                errors.append(invalid(f"spec.podCIDRs[{at}]", cidr, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or "
                                      "2001:db8::/64)"))  # fmt: skip
        if old and (was := old.get("spec", {}).get("podCIDRs")) and was != cidrs:
            errors.append(
                forbidden_field("spec.podCIDRs", 'node updates may not change podCIDR except from "" to valid')
            )
        return errors

    def fields(self, obj: Obj) -> dict[str, str]:
        unschedulable = bool((obj.get("spec") or {}).get("unschedulable"))
        return super().fields(obj) | {"spec.unschedulable": str(unschedulable).lower()}


class ConfigMapStrategy(Strategy):
    def validate(self, obj: Obj, old: Obj | None) -> list[FieldError]:
        maps = (("data", obj.get("data")), ("binaryData", obj.get("binaryData")))
        bad = [
            invalid(f"{field}[{key}]", key, _CONFIG_KEY_RULE)
            for field, values in maps
            for key in values or {}
            if not _CONFIG_KEY.match(key)
        ]
        if bad or not old or not old.get("immutable"):
            return bad
        keys = ("data", "binaryData", "immutable", "type")
        return [forbidden_field(key, "field is immutable when `immutable` is set")
                for key in keys if old.get(key) != obj.get(key)]  # fmt: skip


class SecretStrategy(ConfigMapStrategy):
    field_labels = frozenset({"type"})

    def default(self, obj: Obj) -> None:
        obj.setdefault("type", "Opaque")
        for key, value in (obj.pop("stringData", None) or {}).items():
            obj.setdefault("data", {})[key] = base64.b64encode(value.encode()).decode()

    def fields(self, obj: Obj) -> dict[str, str]:
        return super().fields(obj) | {"type": obj.get("type", "")}


class ServiceAccountStrategy(Strategy):
    returns_deleted = True


class LeaseStrategy(CreateOnUpdate):
    unconditional_update = False

    def validate(self, obj: Obj, old: Obj | None) -> list[FieldError]:
        seconds = (obj.get("spec") or {}).get("leaseDurationSeconds")
        if seconds is not None and seconds <= 0:
            return [invalid("spec.leaseDurationSeconds", seconds, "must be greater than 0")]
        return []


EVENT_FIELDS = ("kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath")


class EventStrategy(CreateOnUpdate):
    """Stored as core/v1; the same object is served as events.k8s.io/v1 with other field names."""

    field_labels = frozenset({f"involvedObject.{key}" for key in EVENT_FIELDS}
                             | {f"regarding.{key}" for key in EVENT_FIELDS}
                             | {"reason", "source", "type", "reportingComponent", "reportingController"})  # fmt: skip

    def default(self, obj: Obj) -> None:
        for key in ("firstTimestamp", "lastTimestamp", "eventTime"):
            obj.setdefault(key, None)
        for key in ("reportingComponent", "reportingInstance"):
            obj.setdefault(key, "")
        obj.setdefault("source", {})

    def validate(self, obj: Obj, old: Obj | None) -> list[FieldError]:
        namespace = (obj.get("involvedObject") or {}).get("namespace", "")
        if (namespace or "default") != obj["metadata"].get("namespace"):
            return [invalid("involvedObject.namespace", namespace, "does not match event.namespace")]
        return []

    def fields(self, obj: Obj) -> dict[str, str]:
        about = obj.get("involvedObject") or {}
        found = super().fields(obj)
        for key in EVENT_FIELDS:
            found[f"involvedObject.{key}"] = found[f"regarding.{key}"] = about.get(key, "")
        component = (obj.get("source") or {}).get("component", "")
        found |= {"reason": obj.get("reason", ""), "source": component, "type": obj.get("type", "")}
        reporting = obj.get("reportingComponent", "")
        return found | {"reportingComponent": reporting, "reportingController": reporting}
