"""Structural schemas of custom resources: pruning, defaulting and validation (apiextensions/v1).

Of OpenAPI v3 this knows what structural schemas may use, except x-kubernetes-validations (CEL), which the server
reports as not evaluated when a definition that has them is created.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

from fimbria.lab.apiserver.errors import FieldError, duplicate, invalid, not_supported, required
from fimbria.lab.apiserver.model import Obj

PRESERVE, EMBEDDED, INT_OR_STRING = (
    "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-embedded-resource",
    "x-kubernetes-int-or-string",
)
_TOP = ("apiVersion", "kind", "metadata")


def prune(value: Any, schema: Obj, path: str = "", root: bool = True) -> list[str]:
    """Removes in place what the schema doesn't know; returns the paths removed."""
    if isinstance(value, list):
        items = schema.get("items") or {}
        return [one for at, item in enumerate(value) for one in prune(item, items, f"{path}[{at}]", False)]
    if not isinstance(value, dict):
        return []
    properties: Obj = schema.get("properties") or {}
    additional = schema.get("additionalProperties")
    gone: list[str] = []
    for key in list(value):
        where = f"{path}.{key}" if path else key
        if (root or schema.get(EMBEDDED)) and key in _TOP:
            continue
        if key in properties:
            gone += prune(value[key], properties[key], where, False)
        elif isinstance(additional, dict):
            gone += prune(value[key], additional, where, False)
        elif not additional and not schema.get(PRESERVE):
            gone.append(where)
            del value[key]
    return gone


def default(value: Any, schema: Obj) -> None:
    """Fills in defaults in place; a null where none is allowed counts as absent if there is a default."""
    if isinstance(value, list):
        for item in value:
            default(item, schema.get("items") or {})
    if not isinstance(value, dict):
        return
    additional = schema.get("additionalProperties")
    for key, inner in (schema.get("properties") or {}).items():
        if value.get(key) is None and key in value and not inner.get("nullable") and "default" in inner:
            del value[key]
        if key not in value and "default" in inner:
            value[key] = copy.deepcopy(inner["default"])
        if key in value:
            default(value[key], inner)
    if isinstance(additional, dict):
        for key in value.keys() - (schema.get("properties") or {}).keys():
            default(value[key], additional)


def drop_nulls(value: Any, schema: Obj) -> None:
    """Removes nulls of fields that aren't nullable, as kube-apiserver does before it validates."""
    if isinstance(value, list):
        for item in value:
            drop_nulls(item, schema.get("items") or {})
    elif isinstance(value, dict):
        for key, inner in (schema.get("properties") or {}).items():
            if key in value and value[key] is None and not inner.get("nullable"):
                del value[key]
            elif key in value:
                drop_nulls(value[key], inner)


def validate(value: Any, schema: Obj, path: str = "") -> list[FieldError]:
    """All violations, in the order of the schema's fields."""
    return list(_validate(value, schema, path))


def _validate(value: Any, schema: Obj, path: str) -> Iterator[FieldError]:
    if value is None and schema.get("nullable"):
        return
    wrong = _type_error(value, schema, path)
    if wrong:
        yield wrong
        return
    if "enum" in schema and value not in schema["enum"]:
        yield not_supported(path, value, [one if isinstance(one, str) else str(one) for one in schema["enum"]])
    if isinstance(value, str):
        yield from _validate_string(value, schema, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from _validate_number(value, schema, path)
    elif isinstance(value, list):
        yield from _validate_list(value, schema, path)
    elif isinstance(value, dict):
        yield from _validate_object(value, schema, path)
    yield from _validate_combinations(value, schema, path)


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "boolean": (bool,), "integer": (int,), "number": (int, float)
}  # fmt: skip


def _type_error(value: Any, schema: Obj, path: str) -> FieldError | None:
    if schema.get(INT_OR_STRING):
        if isinstance(value, str | int) and not isinstance(value, bool):
            return None
        return _bad(path, _type_name(value), f"must be of type integer,string: {_shown(value)}")
    wanted = schema.get("type")
    if not wanted:
        return None
    fits = isinstance(value, _TYPES[wanted]) and (wanted == "boolean" or not isinstance(value, bool))
    if wanted == "integer" and isinstance(value, float) and value.is_integer():
        fits = True
    return None if fits else _bad(path, _type_name(value), f"must be of type {wanted}: {_shown(value)}")


def _bad(path: str, value: Any, what: str) -> FieldError:
    return invalid(path, value, f"{path} in body {what}")


def _type_name(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
    return names.get(type(value), "null")


def _shown(value: Any) -> str:
    return f'"{_type_name(value)}"'


@cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text)


def _validate_string(value: str, schema: Obj, path: str) -> Iterator[FieldError]:
    if "pattern" in schema and not _pattern(schema["pattern"]).search(value):
        yield _bad(path, value, f"should match '{schema['pattern']}'")
    if len(value) < schema.get("minLength", 0):
        yield _bad(path, value, f"should be at least {schema['minLength']} chars long")
    if "maxLength" in schema and len(value) > schema["maxLength"]:
        yield FieldError(path, "FieldValueTooLong", f"Too long: may not be more than {schema['maxLength']} bytes")


def _validate_number(value: float, schema: Obj, path: str) -> Iterator[FieldError]:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and (value < low or (value == low and schema.get("exclusiveMinimum"))):
        sign = "greater than" if schema.get("exclusiveMinimum") else "greater than or equal to"
        yield _bad(path, value, f"should be {sign} {low}")
    if high is not None and (value > high or (value == high and schema.get("exclusiveMaximum"))):
        sign = "less than" if schema.get("exclusiveMaximum") else "less than or equal to"
        yield _bad(path, value, f"should be {sign} {high}")
    if schema.get("multipleOf") and value % schema["multipleOf"]:
        yield _bad(path, value, f"should be a multiple of {schema['multipleOf']}")


def _validate_list(value: list[Any], schema: Obj, path: str) -> Iterator[FieldError]:
    if len(value) < schema.get("minItems", 0):
        yield _bad(path, len(value), f"should have at least {schema['minItems']} items")
    if "maxItems" in schema and len(value) > schema["maxItems"]:
        message = f"Too many: {len(value)}: must have at most {schema['maxItems']} items"
        yield FieldError(path, "FieldValueTooMany", message)
    for at, item in enumerate(value):
        yield from _validate(item, schema.get("items") or {}, f"{path}[{at}]")
    keys = schema.get("x-kubernetes-list-map-keys") or []
    seen: list[Any] = []
    for at, item in enumerate(value if schema.get("x-kubernetes-list-type") in ("map", "set") else []):
        identity = {key: item.get(key) for key in keys if key in item} if keys and isinstance(item, dict) else item
        if identity in seen:
            yield duplicate(f"{path}[{at}]", identity)
        seen.append(identity)


def _validate_object(value: Obj, schema: Obj, path: str) -> Iterator[FieldError]:
    properties, additional = schema.get("properties") or {}, schema.get("additionalProperties")
    for key in schema.get("required") or []:
        if key not in value:
            yield required(f"{path}.{key}" if path else key)
    if len(value) < schema.get("minProperties", 0):
        yield _bad(path, len(value), f"should have at least {schema['minProperties']} properties")
    if "maxProperties" in schema and len(value) > schema["maxProperties"]:
        message = f"Too many: {len(value)}: must have at most {schema['maxProperties']} properties"
        yield FieldError(path, "FieldValueTooMany", message)
    for key, item in value.items():
        where = f"{path}.{key}" if path else key
        if key in properties:
            yield from _validate(item, properties[key], where)
        elif isinstance(additional, dict):
            yield from _validate(item, additional, where)


def _validate_combinations(value: Any, schema: Obj, path: str) -> Iterator[FieldError]:
    for inner in schema.get("allOf") or []:
        yield from _validate(value, inner, path)
    if schema.get("anyOf") and all(validate(value, inner, path) for inner in schema["anyOf"]):
        yield _bad(path, value, "must validate at least one schema (anyOf)")
    if schema.get("oneOf"):
        fitting = sum(not validate(value, inner, path) for inner in schema["oneOf"])
        if fitting != 1:
            found = "Found none valid" if fitting == 0 else f"Found {fitting} valid alternatives"
            yield _bad(path, value, f"must validate one and only one schema (oneOf). {found}")
    if schema.get("not") and not validate(value, schema["not"], path):
        yield _bad(path, value, "must not validate the schema (not)")


def uses_cel(schema: Any) -> bool:
    """Whether any part of the schema carries x-kubernetes-validations."""
    if isinstance(schema, dict):
        return "x-kubernetes-validations" in schema or any(uses_cel(inner) for inner in schema.values())
    return isinstance(schema, list) and any(uses_cel(inner) for inner in schema)
