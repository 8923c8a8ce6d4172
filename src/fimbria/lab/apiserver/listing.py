"""Lists: selection, pages from one consistent state, and the Table and metadata-only shapes of answers."""

from __future__ import annotations

import base64
import binascii
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec

from fimbria.lab.apiserver import errors
from fimbria.lab.apiserver.errors import ApiError
from fimbria.lab.apiserver.model import Entry, Key, Obj, Resource, encode
from fimbria.lab.apiserver.registry import served_raw
from fimbria.lab.apiserver.requests import number
from fimbria.lab.apiserver.selectors import parse_fields, parse_labels
from fimbria.lab.apiserver.store import Expired, Shelf

Predicate = Callable[[Key, Entry], bool]
TOO_OLD = "The resourceVersion for the provided list is too old."
CONTINUE_EXPIRED = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without "
    "the continue parameter, or use the continue token in this response to retrieve the remainder of the results."
)


class _Token(msgspec.Struct):
    """What a continue token says: the state (0 for the newest) and the last key served."""

    rv: int
    namespace: str
    name: str


@dataclass(frozen=True)
class Page:
    entries: list[Entry]
    rv: int
    token: str = ""
    remaining: int | None = None


def predicate(res: Resource, namespace: str, name: str, query: Mapping[str, str]) -> Predicate | None:
    """What a list, watch or deletecollection selects; None for everything."""
    by_label = parse_labels(query.get("labelSelector", ""))
    by_field = parse_fields(query.get("fieldSelector", ""), res.strategy.knows_field)
    tests: list[Predicate] = []
    if namespace:
        tests.append(lambda key, entry: key.namespace == namespace)
    if name:
        tests.append(lambda key, entry: key.name == name)
    if by_label:
        tests.append(lambda key, entry: by_label(entry.labels))
    if by_field:
        tests.append(lambda key, entry: by_field(entry.fields))
    if not tests:
        return None
    return tests[0] if len(tests) == 1 else lambda key, entry: all(test(key, entry) for test in tests)


def page(shelf: Shelf, now_rv: int, wanted: Predicate | None, query: Mapping[str, str]) -> Page:
    """One page of a list. Raises ApiError 400, 410 and 504."""
    limit = number(query, "limit") or 0
    token = _decode_token(query["continue"]) if query.get("continue") else None
    rv = _list_version(query, now_rv, limit) if token is None else token.rv or now_rv
    state = _state(shelf, rv, now_rv, token)
    keys = shelf.sorted_keys() if state is shelf.entries else sorted(state)
    if token:
        keys = keys[bisect_right(keys, Key(token.namespace, token.name)) :]
    if wanted is not None:
        keys = [key for key in keys if wanted(key, state[key])]
    served, rest = (keys[:limit], keys[limit:]) if limit else (keys, [])
    entries = [state[key] for key in served]
    if not rest:
        return Page(entries, rv)
    selective = query.get("labelSelector") or query.get("fieldSelector")
    return Page(entries, rv, _encode_token(rv, served[-1]), None if selective else len(rest))


def _state(shelf: Shelf, rv: int, now_rv: int, token: _Token | None) -> dict[Key, Entry]:
    try:
        return shelf.snapshot(rv if rv != now_rv else max(now_rv, shelf.floor))
    except Expired:
        if token is None:
            raise errors.expired(TOO_OLD) from None
        fresh = _encode_token(0, Key(token.namespace, token.name))
        raise errors.expired(CONTINUE_EXPIRED, fresh) from None


def _list_version(query: Mapping[str, str], now_rv: int, limit: int) -> int:
    rv, match = version(query), query.get("resourceVersionMatch", "")
    problem: errors.FieldError | None = None
    if match not in ("", "Exact", "NotOlderThan"):
        problem = errors.not_supported("resourceVersionMatch", match, ["Exact", "NotOlderThan", ""])
    elif match and rv is None:
        problem = _forbidden_match("resourceVersionMatch is forbidden unless resourceVersion is provided")
    elif match == "Exact" and not rv:
        problem = _forbidden_match('resourceVersionMatch "exact" is forbidden for resourceVersion "0"')
    if problem:
        raise errors.invalid_options("ListOptions", problem)
    if rv and rv > now_rv:
        message = f"Too large resource version: {rv}, current: {now_rv}"
        details = {"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
                   "retryAfterSeconds": 1}  # fmt: skip
        raise ApiError(504, "Timeout", message, details)
    return rv if rv and (match == "Exact" or (limit and not match)) else now_rv


def _forbidden_match(detail: str) -> errors.FieldError:
    return errors.forbidden_field("resourceVersionMatch", detail)


def version(query: Mapping[str, str]) -> int | None:
    text = query.get("resourceVersion", "")
    if text and (not text.isdigit() or len(text) > 19):
        raise errors.bad_request(f'resourceVersion: Invalid value: "{text}": strconv.ParseUint: parsing "{text}": '
                                 "invalid syntax")  # fmt: skip
    return int(text) if text else None


def _encode_token(rv: int, last: Key) -> str:
    return base64.urlsafe_b64encode(encode(_Token(rv, last.namespace, last.name))).decode().rstrip("=")


def _decode_token(text: str) -> _Token:
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        return msgspec.json.decode(raw, type=_Token)
    except (binascii.Error, msgspec.DecodeError, ValueError):
        raise errors.bad_request("continue key is not valid: the continue token can't be decoded") from None


# ---- shapes


def list_body(res: Resource, found: Page, transform: str, include: str) -> bytes:
    meta: Obj = {"resourceVersion": str(found.rv)}
    if found.token:
        meta["continue"] = found.token
    if found.remaining is not None:
        meta["remainingItemCount"] = found.remaining
    if transform == "Table":
        objects = [parsed(res, entry) for entry in found.entries]
        return encode(table(res, objects, meta, include))
    if transform:
        objects = [partial(parsed(res, entry)) for entry in found.entries]
        head: Obj = {"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": meta}
        return encode(head | {"items": objects})
    items = b",".join(served_raw(res, entry) for entry in found.entries)
    head_raw = encode({"kind": res.list_kind, "apiVersion": res.api_version, "metadata": meta})
    return head_raw[:-1] + b',"items":[' + items + b"]}"


def parsed(res: Resource, entry: Entry) -> Obj:
    obj = entry.object()
    return res.from_stored(obj) if res.from_stored else obj


def partial(obj: Obj) -> Obj:
    return {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]}


def table(res: Resource, objects: Iterable[Obj], meta: Obj, include: str, header: bool = True) -> Obj:
    """A Table (meta/v1); ``include`` is Metadata, Object or None: how much of each object comes along."""
    definitions = [
        {"name": one.name, "type": one.type, "format": one.format, "description": one.description,
         "priority": one.priority}
        for one in res.columns
    ]  # fmt: skip
    body: Obj = {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": meta}
    body["columnDefinitions"] = definitions if header else None
    return body | {"rows": [_row(res, obj, include) for obj in objects]}


def _row(res: Resource, obj: Obj, include: str) -> Obj:
    stored = res.to_stored(obj) if res.to_stored else obj
    row: Obj = {"cells": [column.cell(stored) for column in res.columns]}
    if include == "Object":
        row["object"] = obj
    elif include != "None":
        row["object"] = partial(obj)
    return row
