"""JSON Patch (RFC 6902), JSON Merge Patch (RFC 7386) and Kubernetes' strategic merge patch, all pure."""

from __future__ import annotations

import copy
from typing import Any

from fimbria.lab.apiserver.model import Obj
from fimbria.lab.apiserver.types import Type

MAX_OPERATIONS = 10_000


class PatchError(Exception):
    """The patch can't be applied to this object (422); ``malformed`` when it is no patch at all (400)."""

    def __init__(self, message: str, malformed: bool = False):
        super().__init__(message)
        self.malformed = malformed


# ---- JSON Patch


def json_patch(document: Any, operations: Any) -> Any:
    """Applies all operations to a copy, or raises PatchError and changes nothing."""
    if not isinstance(operations, list) or not all(isinstance(one, dict) for one in operations):
        raise PatchError("a JSON patch must be a list of operations", malformed=True)
    if len(operations) > MAX_OPERATIONS:
        raise PatchError(f"a JSON patch may have at most {MAX_OPERATIONS} operations", malformed=True)
    document = copy.deepcopy(document)
    for operation in operations:
        document = _operate(document, operation)
    return document


def _operate(document: Any, operation: Obj) -> Any:
    kind, path = operation.get("op"), _pointer(operation, "path")
    match kind:
        case "add" | "replace" | "test":
            if "value" not in operation and kind != "replace":
                raise PatchError(f"{kind} operation without a value at {operation['path']!r}", malformed=True)
            value = copy.deepcopy(operation.get("value"))
            if kind == "test":
                return _test(document, path, value)
            return _add(document, path, value) if kind == "add" else _replace(document, path, value)
        case "remove":
            return _remove(document, path)
        case "move" | "copy":
            source = _pointer(operation, "from")
            value = copy.deepcopy(_get(document, source))
            return _add(_remove(document, source) if kind == "move" else document, path, value)
    raise PatchError(f"unknown JSON patch operation {kind!r}", malformed=True)


def _pointer(operation: Obj, key: str) -> list[str]:
    text = operation.get(key)
    if not isinstance(text, str) or (text and not text.startswith("/")):
        raise PatchError(f"JSON patch operation with a bad {key!r}: {text!r}", malformed=True)
    return [part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:]]


def _index(target: list[Any], part: str, limit: int) -> int:
    if part == "-":
        return limit
    if not part.isdigit() or int(part) > limit:
        raise PatchError(f"index {part!r} is outside of a list of {len(target)}")
    return int(part)


def _get(document: Any, path: list[str]) -> Any:
    for part in path:
        if isinstance(document, dict) and part in document:
            document = document[part]
        elif isinstance(document, list) and part != "-":
            document = document[_index(document, part, len(document) - 1)]
        else:
            raise PatchError(f"there is no /{'/'.join(path)}")
    return document


def _add(document: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    parent, last = _get(document, path[:-1]), path[-1]
    if isinstance(parent, list):
        parent.insert(_index(parent, last, len(parent)), value)
    elif isinstance(parent, dict):
        parent[last] = value
    else:
        raise PatchError(f"nothing can be added at /{'/'.join(path)}")
    return document


def _remove(document: Any, path: list[str]) -> Any:
    _get(document, path)
    if not path:
        raise PatchError("the whole object can't be removed")
    parent = _get(document, path[:-1])
    del parent[int(path[-1]) if isinstance(parent, list) else path[-1]]
    return document


def _replace(document: Any, path: list[str], value: Any) -> Any:
    _get(document, path)
    if not path:
        return value
    parent = _get(document, path[:-1])
    parent[int(path[-1]) if isinstance(parent, list) else path[-1]] = value
    return document


def _test(document: Any, path: list[str], value: Any) -> Any:
    try:
        found = _get(document, path)
    except PatchError:
        found = None
    if found != value:
        raise PatchError(f"testing path /{'/'.join(path)} failed")
    return document


# ---- JSON Merge Patch


def merge_patch(document: Any, patch: Any) -> Any:
    """RFC 7386; the result shares nothing that the caller may change with the document."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(document) if isinstance(document, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


# ---- Strategic merge patch (sig-api-machinery: strategic-merge-patch.md)

_ORDER, _FROM_SET, _RETAIN, _DIRECTIVE = "$setElementOrder/", "$deleteFromPrimitiveList/", "$retainKeys", "$patch"


def strategic_patch(document: Any, patch: Any, fields: dict[str, Type] | None) -> Any:
    """Merges a patch; ``fields`` tells how lists merge. Raises PatchError for a patch that isn't an object."""
    if not isinstance(patch, dict) or not isinstance(document, dict):
        raise PatchError("a strategic merge patch must be an object", malformed=True)
    directive = patch.get(_DIRECTIVE)
    if directive == "delete":
        return {}
    if directive == "replace":
        return {key: copy.deepcopy(value) for key, value in patch.items() if key != _DIRECTIVE}
    if directive not in (None, "merge"):
        raise PatchError(f"unknown $patch directive {directive!r}", malformed=True)
    result = dict(document)
    if _RETAIN in patch:
        result = {key: value for key, value in result.items() if key in patch[_RETAIN]}
    for key, value in patch.items():
        if not key.startswith("$"):
            _merge_field(result, key, value, (fields or {}).get(key))
    _apply_list_directives(result, patch, fields or {})
    return result


def _merge_field(result: Obj, key: str, value: Any, kind: Type | None) -> None:
    if value is None:
        result.pop(key, None)
    elif isinstance(value, dict):
        fields = kind.fields if kind else None
        original = result.get(key)
        merged = strategic_patch(original if isinstance(original, dict) else {}, value, fields)
        result[key] = merged
    elif isinstance(value, list) and kind and kind.is_list and kind.keys is not None:
        result[key] = _merge_list(result.get(key) or [], value, kind)
    else:
        result[key] = copy.deepcopy(value)


def _merge_list(original: list[Any], patch: list[Any], kind: Type) -> list[Any]:
    if not kind.keys:
        return original + [value for value in patch if value not in original]
    if any(isinstance(item, dict) and item.get(_DIRECTIVE) == "replace" for item in patch):
        return [item for item in patch if item.get(_DIRECTIVE) != "replace"]
    result, merge_key = list(original), kind.keys[0]
    assert kind.item is not None
    for item in patch:
        if not isinstance(item, dict) or merge_key not in item:
            raise PatchError(f"map: {item} does not contain declared merge key: {merge_key}", malformed=True)
        same = [at for at, old in enumerate(result) if _same_item(old, item, merge_key)]
        if item.get(_DIRECTIVE) == "delete":
            result = [old for at, old in enumerate(result) if at not in same]
        elif same:
            result[same[0]] = strategic_patch(result[same[0]], item, kind.item.fields)
        else:
            result.append(strategic_patch({}, item, kind.item.fields))
    return result


def _same_item(old: Any, item: Obj, merge_key: str) -> bool:
    return isinstance(old, dict) and old.get(merge_key) == item[merge_key]


def _apply_list_directives(result: Obj, patch: Obj, fields: dict[str, Type]) -> None:
    for key, value in patch.items():
        if key.startswith(_FROM_SET):
            name = key.removeprefix(_FROM_SET)
            result[name] = [one for one in result.get(name) or [] if one not in value]
        elif key.startswith(_ORDER):
            name = key.removeprefix(_ORDER)
            if result.get(name):
                result[name] = _reorder(result[name], value, fields.get(name))


def _reorder(items: list[Any], order: list[Any], kind: Type | None) -> list[Any]:
    merge_key = kind.keys[0] if kind and kind.keys else None
    wanted = [one.get(merge_key) if merge_key else one for one in order]

    def rank(item: Any) -> int:
        value = item.get(merge_key) if merge_key else item
        return wanted.index(value) if value in wanted else len(wanted)

    return sorted(items, key=rank)
