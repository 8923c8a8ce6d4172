"""Which fields an object has, as paths, and how objects merge field by field: the ground of server-side apply. Pure.

Source of the notation: structured-merge-diff's FieldsV1. A path is a tuple of steps: ``f:name`` of a map or struct,
``k:{"name":"a"}`` an item of a keyed list, ``v:"x"`` an item of a set; the step ``.`` stands for an item itself.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from fimbria.lab.apiserver.model import Obj
from fimbria.lab.apiserver.types import Type

Path = tuple[str, ...]
ITSELF = "."
_ABSENT = object()
# what servers keep for themselves, and what names the object
_IGNORED = frozenset({("f:apiVersion",), ("f:kind",)} | {("f:metadata", f"f:{name}") for name in (
    "name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "selfLink",
    "deletionGracePeriodSeconds", "managedFields", "generateName")})  # fmt: skip
_KEY_DEFAULTS = {"protocol": "TCP"}


@dataclass(frozen=True, eq=False)
class Shape:
    """How a value merges: ``map`` (struct or map), ``keyed`` or ``set`` list, or ``leaf``: replaced as a whole."""

    kind: str
    fields: dict[str, Shape] = field(default_factory=dict)
    item: Shape | None = None
    keys: tuple[str, ...] = ()

    def child(self, name: str) -> Shape:
        return self.fields.get(name) or self.item or OPEN


LEAF = Shape("leaf")
OPEN = Shape("open")
"""Of unknown type: an object merges as a map, everything else is a leaf."""


@cache
def shape_of_type(kind: Type) -> Shape:
    """The shape of a built-in type."""
    if kind.is_list:
        assert kind.item is not None
        if kind.keys is None:
            return LEAF
        return Shape("keyed", item=shape_of_type(kind.item), keys=kind.keys) if kind.keys else Shape("set")
    if kind.is_map:
        assert kind.item is not None
        return Shape("map", item=shape_of_type(kind.item))
    if kind.name == "LabelSelector" or kind.fields is None:
        return OPEN if kind.name == "any" else LEAF
    return Shape("map", {name: shape_of_type(one) for name, one in kind.fields.items()})


def shape_of_schema(schema: Obj) -> Shape:
    """The shape of a part of a structural schema."""
    kind = schema.get("type")
    if kind == "array":
        inner = shape_of_schema(schema.get("items") or {})
        match schema.get("x-kubernetes-list-type"):
            case "map":
                return Shape("keyed", item=inner, keys=tuple(schema.get("x-kubernetes-list-map-keys") or ()))
            case "set":
                return Shape("set")
        return LEAF
    if kind != "object":
        return OPEN if schema.get("x-kubernetes-preserve-unknown-fields") else LEAF
    if schema.get("x-kubernetes-map-type") == "atomic":
        return LEAF
    fields = {name: shape_of_schema(one) for name, one in (schema.get("properties") or {}).items()}
    additional = schema.get("additionalProperties")
    return Shape("map", fields, shape_of_schema(additional) if isinstance(additional, dict) else None)


def shape_of_custom(schema: Obj) -> Shape:
    """The shape of a custom resource: its schema's, with the metadata every object has."""
    shape = shape_of_schema(schema | {"type": "object"})
    return Shape("map", shape.fields | {"metadata": shape_of_type(Type("ObjectMeta"))}, shape.item)


def _kind(shape: Shape, value: Any) -> str:
    wanted = {"map": dict, "keyed": list, "set": list}.get(shape.kind)
    if shape.kind == "open":
        return "map" if isinstance(value, dict) else "leaf"
    return shape.kind if wanted and isinstance(value, wanted) else "leaf"


def item_step(item: Any, keys: tuple[str, ...]) -> str:
    identity = {key: item.get(key, _KEY_DEFAULTS.get(key)) for key in keys if key in item or key in _KEY_DEFAULTS}
    return "k:" + json.dumps(identity, sort_keys=True, separators=(",", ":"))


def _value_step(item: Any) -> str:
    return "v:" + json.dumps(item, separators=(",", ":"))


def paths(obj: Obj, shape: Shape) -> dict[Path, Any]:
    """Every field of an object that can be owned, with its value (None for the path of an item itself)."""
    return {path: value for path, value in _paths(obj, shape, ()) if path not in _IGNORED and path[:2] not in _IGNORED}


def _paths(value: Any, shape: Shape, path: Path) -> Iterator[tuple[Path, Any]]:
    kind = _kind(shape, value)
    if kind == "leaf" or (not value and path):
        yield path, value
    elif kind == "map":
        for name, inner in value.items():
            yield from _paths(inner, shape.child(name), (*path, f"f:{name}"))
    elif kind == "set":
        for item in value:
            yield (*path, _value_step(item)), item
    else:
        assert shape.item is not None
        for item in value:
            step = (*path, item_step(item, shape.keys))
            yield (*step, ITSELF), None
            yield from _paths(item, shape.item, step)


def merge(live: Any, applied: Any, shape: Shape) -> Any:
    """The live value with everything applied put over it."""
    kind = _kind(shape, applied)
    if kind == "leaf" or type(live) is not type(applied):
        return copy.deepcopy(applied)
    if kind == "map":
        result = dict(live)
        for name, value in applied.items():
            result[name] = merge(live.get(name), value, shape.child(name))
        return result
    if kind == "set":
        return live + [item for item in applied if item not in live]
    assert shape.item is not None
    merged = {item_step(item, shape.keys): item for item in live}
    for item in applied:
        step = item_step(item, shape.keys)
        merged[step] = merge(merged.get(step), item, shape.item) if step in merged else copy.deepcopy(item)
    return list(merged.values())


def remove(obj: Any, path: Path, shape: Shape) -> Any:
    """The object without what a path names; parents that this empties stay."""
    step, rest = path[0], path[1:]
    if step.startswith("f:"):
        name = step[2:]
        if not isinstance(obj, dict) or name not in obj:
            return obj
        result = dict(obj)
        if rest:
            result[name] = remove(obj[name], rest, shape.child(name))
        else:
            del result[name]
        return result
    if not isinstance(obj, list):
        return obj
    if step.startswith("v:"):
        return [item for item in obj if _value_step(item) != step]
    if not shape.keys or shape.item is None:
        return obj
    if not rest or rest == (ITSELF,):
        return [item for item in obj if item_step(item, shape.keys) != step]
    return [remove(item, rest, shape.item) if item_step(item, shape.keys) == step else item for item in obj]


def is_key_field(path: Path) -> bool:
    """Whether a path names the very field that tells an item of a keyed list from the others."""
    return len(path) > 1 and path[-2].startswith("k:") and path[-1][2:] in json.loads(path[-2][2:])


def to_fields_v1(found: Iterable[Path]) -> Obj:
    """A set of paths in the nested notation of managedFields."""
    tree: Obj = {}
    for path in sorted(found):
        node = tree
        for step in path:
            node = node.setdefault(step, {})
    return tree


def from_fields_v1(tree: Obj) -> set[Path]:
    return set(_leaves(tree, ()))


def _leaves(tree: Obj, path: Path) -> Iterator[Path]:
    if not tree and path:
        yield path
    for step, inner in tree.items():
        yield from _leaves(inner, (*path, step))


def readable(path: Path) -> str:
    """A path as conflict messages show it: ``.spec.containers[name="c"].image``."""
    text = ""
    for step in path:
        if step.startswith("f:"):
            text += f".{step[2:]}"
        elif step.startswith("k:"):
            text += "[" + ",".join(f"{key}={json.dumps(value)}" for key, value in json.loads(step[2:]).items()) + "]"
        elif step.startswith("v:"):
            text += f"[={step[2:]}]"
    return text
