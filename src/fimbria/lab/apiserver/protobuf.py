"""Decodes Kubernetes' protobuf requests, in which Go's typed clients (and so ``kubectl create namespace``) send.

Source of the format: apimachinery's runtime.Unknown (magic ``k8s\\0``, then the type and the object's bytes) and the
protobuf wire encoding. Fields and their numbers are in types.py; answers are always JSON.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from fimbria.lab.apiserver.model import Obj
from fimbria.lab.apiserver.types import TYPES, WIRE, Path, Type

CONTENT_TYPE = "application/vnd.kubernetes.protobuf"
MAGIC = b"k8s\x00"
MAX_DEPTH = 40
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
Value = int | bytes


def decode_object(raw: bytes) -> Obj:
    """An object with its kind and apiVersion. Raises ValueError."""
    if not raw.startswith(MAGIC):
        raise ValueError("a protobuf body must begin with k8s and a zero byte")
    envelope = dict(_fields(raw[len(MAGIC) :]))
    type_meta = {number: _text(value) for number, value in _fields(_bytes(envelope.get(1, b"")))}
    version, kind = type_meta.get(1, ""), type_meta.get(2, "")
    name = "CoreEvent" if (version, kind) == ("v1", "Event") else kind
    if not WIRE.get(name):
        raise ValueError(f"objects of kind {kind!r} can't be sent as protobuf; send JSON")
    return {"apiVersion": version, "kind": kind} | _message(_bytes(envelope.get(2, b"")), name, (), 0)


def _fields(raw: bytes) -> Iterator[tuple[int, Value]]:
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(raw, at)
            yield number, value
            continue
        if wire == _BYTES:
            size, at = _varint(raw, at)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"unknown protobuf wire type {wire}")
        if size > len(raw) - at:
            raise ValueError("the protobuf message is cut short")
        yield number, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(raw) and shift < 70:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a protobuf number is cut short or too long")


def _message(raw: bytes, name: str, prefix: Path, depth: int) -> Obj:
    """A message of a type; ``prefix`` leads to the embedded message that ``raw`` is, if it is one."""
    if depth > MAX_DEPTH:
        raise ValueError("the protobuf message is nested too deeply")
    numbers, types = WIRE[name], TYPES[name]
    result: Obj = {}
    for number, value in _fields(raw):
        path = (*prefix, number)
        if path in numbers:
            _store(result, numbers[path], types[numbers[path]], value, depth)
        elif any(known[: len(path)] == path for known in numbers):
            result |= _message(_bytes(value), name, path, depth + 1)
        else:
            raise ValueError(f"{name} has an unknown protobuf field {number}; send JSON")
    return result


def _store(result: Obj, key: str, kind: Type, value: Value, depth: int) -> None:
    if kind.is_list:
        assert kind.item is not None
        result.setdefault(key, []).append(_value(key, kind.item, value, depth))
    elif kind.is_map:
        assert kind.item is not None
        pair = dict(_fields(_bytes(value)))
        result.setdefault(key, {})[_text(pair.get(1, b""))] = _value(key, kind.item, pair.get(2, b""), depth)
    else:
        found = _value(key, kind, value, depth)
        # Go leaves nothing out of what it sends: an empty string or a zero of an optional field means absent
        if found not in ("", None) and not (kind.name == "i" and found == 0 and key in _ZERO_IS_ABSENT):
            result[key] = found


_ZERO_IS_ABSENT = frozenset({"generation", "nodePort", "hostPort", "healthCheckNodePort", "minReadySeconds", "count",
                             "observedGeneration", "initialDelaySeconds", "timeoutSeconds", "periodSeconds",
                             "successThreshold", "failureThreshold", "deprecatedCount"})  # fmt: skip


def _value(key: str, kind: Type, value: Value, depth: int) -> Any:
    match kind.name:
        case "s":
            return _text(value)
        case "i":
            return _signed(value)
        case "b":
            return bool(value)
        case "B":
            return base64.b64encode(_bytes(value)).decode()
        case "q":
            return _text(dict(_fields(_bytes(value))).get(1, b""))
        case "t" | "T":
            return _time(_bytes(value), kind.name == "T")
        case "is":
            inner = dict(_fields(_bytes(value)))
            return _text(inner.get(3, b"")) if inner.get(1) else _signed(inner.get(2, 0))
        case "any":
            if key == "managedFields":
                return {}
            raise ValueError(f"field {key} can't be sent as protobuf; send JSON")
    return _message(_bytes(value), kind.name, (), depth + 1)


def _time(raw: bytes, micro: bool) -> str | None:
    fields = dict(_fields(raw))
    seconds, nanos = _signed(fields.get(1, 0)), _signed(fields.get(2, 0))
    if not fields or seconds < 0:
        return None
    moment = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{moment}.{nanos // 1000:06d}Z" if micro else f"{moment}Z"


def _signed(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a protobuf number was expected")
    return value - (1 << 64) if value >= 1 << 63 else value


def _bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("protobuf bytes were expected")
    return value


def _text(value: Value) -> str:
    return _bytes(value).decode()
