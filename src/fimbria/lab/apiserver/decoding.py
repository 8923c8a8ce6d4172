"""Decoding of built-in objects against types.py: unknown and duplicate fields, wrong JSON types."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from fimbria.lab.apiserver.errors import bad_request
from fimbria.lab.apiserver.model import Obj
from fimbria.lab.apiserver.types import Type

MAX_DEPTH = 100
_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$")
_MICRO_TIME = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)$")

_SCALARS: dict[str, tuple[type, ...]] = {
    "s": (str,),
    "t": (str,),
    "T": (str,),
    "B": (str,),
    "i": (int,),
    "n": (int, float),
    "q": (str, int, float),
    "is": (str, int),
    "b": (bool,),
}
_NAMES = {
    "s": "string",
    "t": "time",
    "T": "time",
    "B": "bytes",
    "i": "int",
    "n": "float",
    "q": "quantity",
    "is": "int or string",
    "b": "bool",
}


# Go's encoding leaves empty lists and maps out, except where a type wants them shown.
_KEPT_EMPTY = ("endpoints", "ports", "rules")


def prune(obj: Obj, kind: Type, described: str) -> list[str]:
    """Removes unknown fields and nulls in place; returns the paths of the unknown ones.

    ``described`` begins a message, such as ``Pod in version "v1" cannot be handled as a Pod``.
    Raises ApiError 400 for a value of the wrong JSON type.
    """
    unknown: list[str] = []
    _prune(obj, kind, "", unknown, described)
    return unknown


def _prune(value: Any, kind: Type, path: str, unknown: list[str], described: str) -> None:
    if path.count(".") > MAX_DEPTH:
        raise bad_request(f"{described}: nested too deeply at {path[:80]}")
    if kind.name == "any":
        return
    if kind.is_list:
        _expect(value, list, path, described)
        assert kind.item is not None
        for at, item in enumerate(value):
            _prune(item, kind.item, f"{path}[{at}]", unknown, described)
    elif kind.is_map:
        _expect(value, dict, path, described)
        assert kind.item is not None
        for key, item in value.items():
            _prune(item, kind.item, f"{path}.{key}", unknown, described)
    elif kind.name in _SCALARS:
        accepted = _SCALARS[kind.name]
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            raise bad_request(f"{described}: cannot unmarshal {_json_type(value)} into field {path} of type "
                              f"{_NAMES[kind.name]}")  # fmt: skip
        _check_encoding(value, kind.name, path, described)
    else:
        _prune_struct(value, kind, path, unknown, described)


def _check_encoding(value: Any, kind: str, path: str, described: str) -> None:
    """Times and bytes are strings of a certain form. A time with microseconds must show all six digits of them."""
    if kind == "t" and not _TIME.match(value):
        raise bad_request(f'{described}: parsing time "{value}" of field {path} as RFC 3339: cannot parse')
    if kind == "T" and not _MICRO_TIME.match(value):
        layout = "2006-01-02T15:04:05.000000Z07:00"
        raise bad_request(f'{described}: parsing time "{value}" of field {path} as "{layout}": cannot parse')
    if kind == "B":
        try:
            base64.b64decode(value, validate=True)
        except binascii.Error:
            raise bad_request(f"{described}: illegal base64 data in field {path}") from None


def _prune_struct(value: Any, kind: Type, path: str, unknown: list[str], described: str) -> None:
    _expect(value, dict, path, described)
    fields = kind.fields
    assert fields is not None, kind.name
    for key in list(value):
        where = f"{path}.{key}" if path else key
        if key not in fields:
            unknown.append(where)
            del value[key]
        elif value[key] is None:
            del value[key]
        else:
            _prune(value[key], fields[key], where, unknown, described)
            if not value[key] and (fields[key].is_list or fields[key].is_map) and where not in _KEPT_EMPTY:
                del value[key]


def _expect(value: Any, wanted: type, path: str, described: str) -> None:
    if not isinstance(value, wanted):
        name = "list" if wanted is list else "object"
        raise bad_request(
            f"{described}: cannot unmarshal {_json_type(value)} into field {path or 'root'} of type {name}"
        )


def _json_type(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    return {str: "string", int: "number", float: "number", list: "array", dict: "object"}.get(type(value), "null")
