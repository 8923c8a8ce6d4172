"""Validation shared by all kinds: names, labels, metadata, selectors, ports."""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from fimbria.lab.apiserver.errors import FieldError, forbidden_field, invalid, not_supported, required
from fimbria.lab.apiserver.model import Obj
from fimbria.lab.apiserver.selectors import is_label_key, is_label_value

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"
DNS_LABEL = re.compile(rf"^{_LABEL}$")
DNS_SUBDOMAIN = re.compile(rf"^{_SUBDOMAIN}$")
PORT_NAME = re.compile(r"^(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?$")
MAX_ANNOTATIONS = 256 * 1024

LABEL_RULE = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with "
    "an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
SUBDOMAIN_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and "
    "end with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)


def dns_label(value: str, field: str) -> list[FieldError]:
    if len(value) > 63:
        return [invalid(field, value, "must be no more than 63 bytes")]
    return [] if DNS_LABEL.match(value) else [invalid(field, value, LABEL_RULE)]


def dns_subdomain(value: str, field: str) -> list[FieldError]:
    if len(value) > 253:
        return [invalid(field, value, "must be no more than 253 bytes")]
    return [] if DNS_SUBDOMAIN.match(value) else [invalid(field, value, SUBDOMAIN_RULE)]


def path_segment(value: str, field: str) -> list[FieldError]:
    """Names of RBAC objects: anything that is one segment of a path."""
    if value in (".", "..") or "/" in value or "%" in value:
        return [invalid(field, value, "may not be '.' or '..' and may not contain '/' or '%'")]
    return []


def labels(values: Any, field: str) -> list[FieldError]:
    errors: list[FieldError] = []
    for key, value in (values or {}).items():
        if not is_label_key(key):
            errors.append(
                invalid(
                    field,
                    key,
                    "name part must consist of alphanumeric characters, '-', '_' or '.', and "
                    "must start and end with an alphanumeric character",
                )
            )
        if not isinstance(value, str) or not is_label_value(value):
            errors.append(
                invalid(
                    field,
                    value,
                    "a valid label must be an empty string or consist of alphanumeric "
                    "characters, '-', '_' or '.', and must start and end with an alphanumeric character "
                    "(e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
                    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')",
                )
            )
    return errors


STANDARD_FINALIZERS = ("kubernetes", "orphan", "foregroundDeletion")


def metadata(meta: Obj, builtin: bool) -> list[FieldError]:
    """Everything of metadata except the name, which has rules of its own for each kind."""
    errors = labels(meta.get("labels"), "metadata.labels")
    annotations = meta.get("annotations") or {}
    for key in annotations:
        if not is_label_key(key.lower()):
            errors.append(
                invalid(
                    "metadata.annotations",
                    key,
                    "name part must consist of alphanumeric characters, '-', "
                    "'_' or '.', and must start and end with an alphanumeric character",
                )
            )
    if sum(len(key) + len(value) for key, value in annotations.items()) > MAX_ANNOTATIONS:
        message = f"Too long: may not be more than {MAX_ANNOTATIONS} bytes"
        errors.append(FieldError("metadata.annotations", "FieldValueTooLong", message))
    for owner in meta.get("ownerReferences") or []:
        where = "metadata.ownerReferences"
        errors += [
            invalid(f"{where}.{key}", "", "must not be empty")
            for key in ("apiVersion", "kind", "name", "uid")
            if not owner.get(key)
        ]
    controllers = [owner for owner in meta.get("ownerReferences") or [] if owner.get("controller")]
    if len(controllers) > 1:
        errors.append(
            invalid("metadata.ownerReferences", len(controllers), "Only one reference can have Controller set to true")
        )
    for at, finalizer in enumerate(meta.get("finalizers") or []):
        if builtin and "/" not in finalizer and finalizer not in STANDARD_FINALIZERS:
            detail = "name is neither a standard finalizer name nor is it fully qualified"
            errors.append(invalid(f"metadata.finalizers[{at}]", finalizer, detail))
        if not is_label_key(finalizer):
            errors.append(
                invalid("metadata.finalizers", finalizer, "name part must consist of alphanumeric characters")
            )
    return errors


def metadata_update(new: Obj, old: Obj) -> list[FieldError]:
    """What an update may not change, after the server has filled in what the client left out."""
    errors = [
        immutable(f"metadata.{key}", new.get(key))
        for key in ("name", "namespace", "uid", "creationTimestamp")
        if new.get(key) != old.get(key)
    ]
    added = set(new.get("finalizers") or []) - set(old.get("finalizers") or [])
    if old.get("deletionTimestamp") and added:
        detail = f"no new finalizers can be added if the object is being deleted, found new finalizers {sorted(added)}"
        errors.append(forbidden_field("metadata.finalizers", detail))
    return errors


def immutable(field: str, value: Any) -> FieldError:
    return invalid(field, value, "field is immutable")


def label_selector(selector: Obj | None, field: str) -> list[FieldError]:
    selector = selector or {}
    errors = labels(selector.get("matchLabels"), f"{field}.matchLabels")
    for at, term in enumerate(selector.get("matchExpressions") or []):
        where = f"{field}.matchExpressions[{at}]"
        operator, values = term.get("operator"), term.get("values") or []
        if operator not in ("In", "NotIn", "Exists", "DoesNotExist"):
            errors.append(invalid(f"{where}.operator", operator, "not a valid selector operator"))
        if operator in ("In", "NotIn") and not values:
            errors.append(required(f"{where}.values", "must be specified when `operator` is 'In' or 'NotIn'"))
        if operator in ("Exists", "DoesNotExist") and values:
            detail = "may not be specified when `operator` is 'Exists' or 'DoesNotExist'"
            errors.append(forbidden_field(f"{where}.values", detail))
        if not is_label_key(term.get("key") or ""):
            errors.append(invalid(f"{where}.key", term.get("key") or "", "name part must be non-empty"))
    return errors


def port_number(value: Any, field: str) -> list[FieldError]:
    if isinstance(value, int) and 1 <= value <= 65535:
        return []
    return [invalid(field, value, "must be between 1 and 65535, inclusive")]


def port_name(value: str, field: str) -> list[FieldError]:
    if len(value) > 15:
        return [invalid(field, value, "must be no more than 15 characters long")]
    if PORT_NAME.match(value):
        return []
    return [invalid(field, value, "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)")]


def port_or_name(value: Any, field: str) -> list[FieldError]:
    return port_name(value, field) if isinstance(value, str) else port_number(value, field)


def one_of(value: Any, field: str, supported: list[str]) -> list[FieldError]:
    if value in supported:
        return []
    return [not_supported(field, value, sorted(supported))] if value else [required(field)]


def parse_cidr(value: Any) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """A CIDR with its prefix length written out; host bits may be set; None if it is no CIDR."""
    if not isinstance(value, str) or "/" not in value:
        return None
    length = value.partition("/")[2]
    if not length.isdigit():
        return None
    try:
        return ipaddress.ip_network(value, strict=False)
    except ValueError:
        return None


def cidr(value: Any, field: str) -> list[FieldError]:
    """A CIDR as strict validation wants it: canonical enough that no two readers take it for different networks."""
    network = parse_cidr(value)
    if network is None:
        if isinstance(value, str) and re.search(r"(^|\.)0\d|/0\d", value):
            return [invalid(field, value, "must not have leading 0s in IP or prefix length")]
        return [invalid(field, value, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)")]
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped:
        return [invalid(field, value, "must not have an IPv4-mapped IPv6 address")]
    if ipaddress.ip_address(value.partition("/")[0]) != network.network_address:
        return [invalid(field, value, "must not have bits set beyond the prefix length")]
    return []


def parse_ip(value: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(value) if isinstance(value, str) else None
    except ValueError:
        return None
