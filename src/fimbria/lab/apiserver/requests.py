"""What a request asks for: path, query and headers as values. Pure; raises ApiError 400, 404, 406, 415."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from fimbria.lab.apiserver import errors, protobuf
from fimbria.lab.apiserver.errors import ApiError
from fimbria.lab.apiserver.model import Obj, decode
from fimbria.lab.apiserver.registry import Deletion, Write

JSON, YAML = "application/json", "application/yaml"
JSON_PATCH, MERGE_PATCH = "application/json-patch+json", "application/merge-patch+json"
STRATEGIC_PATCH, APPLY_PATCH = "application/strategic-merge-patch+json", "application/apply-patch+yaml"


@dataclass(frozen=True)
class Target:
    """Where a path points: a collection if ``name`` is empty. ``namespace`` is empty for all of them."""

    group: str
    version: str
    plural: str
    namespace: str
    name: str
    sub: str


def parse_path(path: str) -> Target | None:
    """The resource a path names, or None if it is no resource path."""
    parts = [part for part in path.split("/") if part]
    if parts[:1] == ["api"] and len(parts) > 2:
        group, version, rest = "", parts[1], parts[2:]
    elif parts[:1] == ["apis"] and len(parts) > 3:
        group, version, rest = parts[1], parts[2], parts[3:]
    else:
        return None
    namespace = ""
    own_subresource = not group and len(rest) == 3 and rest[2] in ("status", "finalize")
    if rest[0] == "namespaces" and len(rest) > 2 and not own_subresource:
        namespace, rest = rest[1], rest[2:]
    if len(rest) > 3:
        return None
    plural, name, sub = [*rest, "", ""][:3]
    return Target(group, version, plural, namespace, name, sub)


def flag(query: Mapping[str, str], name: str) -> bool:
    return query.get(name, "") in ("1", "true", "True", "") if name in query else False


def number(query: Mapping[str, str], name: str) -> int | None:
    text = query.get(name, "")
    if not text:
        return None
    if not text.isdigit() or len(text) > 19:
        raise errors.bad_request(f'invalid value for {name}: "{text}" is not a number')
    return int(text)


def write_options(query: Mapping[str, str], user_agent: str, applies: bool) -> Write:
    strictness = query.get("fieldValidation") or "Warn"
    if strictness not in ("Strict", "Warn", "Ignore"):
        problem = errors.not_supported("fieldValidation", strictness, ["", "Ignore", "Strict", "Warn"])
        raise errors.invalid_options("CreateOptions", problem)
    manager = query.get("fieldManager") or ("" if applies else user_agent.partition("/")[0] or "unknown")
    return Write(_dry_run(query.get("dryRun")), strictness, manager, flag(query, "force"))


def _dry_run(value: Any) -> bool:
    if value not in (None, "", "All", [], ["All"]):
        raise errors.invalid_options("CreateOptions", errors.not_supported("dryRun", value, ["All"]))
    return bool(value)


def deletion(query: Mapping[str, str], body: Any) -> Deletion:
    """DeleteOptions from the body, or from the query where there is none."""
    options: Obj = body if isinstance(body, dict) else {}
    conditions = options.get("preconditions") or {}
    grace = options.get("gracePeriodSeconds")
    grace = number(query, "gracePeriodSeconds") if grace is None else grace
    policy = options.get("propagationPolicy") or query.get("propagationPolicy")
    if policy not in (None, "", "Orphan", "Background", "Foreground"):
        supported = ["Foreground", "Background", "Orphan", "nil"]
        raise errors.invalid_options("DeleteOptions", errors.not_supported("propagationPolicy", policy, supported))
    if options.get("orphanDependents") or (not policy and flag(query, "orphanDependents")):
        policy = "Orphan"
    dry_run = _dry_run(options.get("dryRun")) or _dry_run(query.get("dryRun"))
    return Deletion(grace, policy or None, conditions.get("uid"), conditions.get("resourceVersion"), dry_run)


def parse_body(raw: bytes, content_type: str) -> Any:
    """The decoded body; empty bytes give None."""
    kind = content_type.partition(";")[0].strip().lower()
    if not raw:
        return None
    try:
        if kind in (YAML, APPLY_PATCH):
            return yaml.safe_load(raw)
        if kind in (JSON, JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH, "", "application/octet-stream", "*/*"):
            return decode(raw)
        if kind == protobuf.CONTENT_TYPE:
            return protobuf.decode_object(raw)
    except (ValueError, OverflowError, OSError, yaml.YAMLError, RecursionError) as error:
        raise errors.bad_request(f"the body can't be decoded: {error}") from None
    accepted = f"{JSON}, {YAML}, {protobuf.CONTENT_TYPE}"
    message = "the body of the request was in an unknown format - accepted media types include: "
    raise ApiError(415, "UnsupportedMediaType", message + accepted)


@dataclass(frozen=True)
class Accept:
    """The representation asked for: ``transform`` is empty, Table or PartialObjectMetadata(List)."""

    transform: str = ""


_KNOWN_TRANSFORMS = ("Table", "PartialObjectMetadata", "PartialObjectMetadataList")


def parse_accept(header: str) -> Accept:
    """The first representation of the header that the server has."""
    for clause in (header or "*/*").split(","):
        kind, *parameters = [part.strip() for part in clause.split(";")]
        values = dict(part.split("=", 1) for part in parameters if "=" in part)
        if kind not in (JSON, "*/*", "application/*"):
            continue
        transform = values.get("as", "")
        if not transform:
            return Accept()
        if transform in _KNOWN_TRANSFORMS and values.get("g") == "meta.k8s.io" and values.get("v") == "v1":
            return Accept(transform.removesuffix("List"))
    message = f"only the following media types are accepted: {JSON}"
    raise ApiError(406, "NotAcceptable", message)
