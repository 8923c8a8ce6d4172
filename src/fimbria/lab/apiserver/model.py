"""The words of the server: resources, stored entries and events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    from fimbria.lab.apiserver.strategy import Strategy

Obj = dict[str, Any]
"""One API object, or a part of one, as decoded JSON."""

encode = msgspec.json.Encoder().encode
decode: Callable[[bytes], Any] = msgspec.json.Decoder().decode


class Key(NamedTuple):
    """Sorts as etcd's keys do: by namespace, then by name. Cluster-scoped objects have an empty namespace."""

    namespace: str
    name: str


class Entry:
    """One stored object at one resource version: its JSON, and what selectors ask for without decoding it."""

    __slots__ = ("fields", "labels", "raw", "rv")

    def __init__(self, raw: bytes, rv: int, labels: dict[str, str], fields: dict[str, str]):
        self.raw, self.rv, self.labels, self.fields = raw, rv, labels, fields

    def object(self) -> Obj:
        """A fresh copy, the caller's to change."""
        decoded: Obj = decode(self.raw)
        return decoded


class Event:
    """One change: ``old`` is None for a creation, ``new`` for a deletion (then ``old`` carries the last state)."""

    __slots__ = ("_encoded", "key", "new", "old", "rv")

    def __init__(self, rv: int, key: Key, old: Entry | None, new: Entry | None):
        self.rv, self.key, self.old, self.new = rv, key, old, new
        self._encoded: dict[str, bytes] = {}

    def encoded(self, kind: str) -> bytes:
        """The watch line of this event, serialised once however many watchers there are."""
        line = self._encoded.get(kind)
        if line is None:
            line = self._encoded[kind] = watch_line(kind, self.raw(kind))
        return line

    def raw(self, kind: str) -> bytes:
        """The object's JSON: a DELETED one shows the last state that matched, at the version of this change."""
        if kind != "DELETED" or self.old is None:
            assert self.new is not None
            return self.new.raw
        last = self.old.object()
        last["metadata"]["resourceVersion"] = str(self.rv)
        return encode(last)


def watch_line(kind: str, raw: bytes) -> bytes:
    return b'{"type":"%s","object":%s}\n' % (kind.encode(), raw)


@dataclass(frozen=True)
class Column:
    """A column of a Table answer; ``priority`` above 0 shows with ``-o wide`` only."""

    name: str
    type: str
    cell: Callable[[Obj], Any]
    priority: int = 0
    format: str = ""
    description: str = ""


@dataclass(frozen=True, eq=False)
class Resource:
    """One served resource. ``storage`` names its rows: the versions of one kind share them."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool
    strategy: Strategy
    singular: str = ""
    short: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()
    type_name: str = ""
    """Name of the built-in type in types.py, or empty for custom resources, whose strategy holds a schema."""
    storage_name: str = ""
    """The rows it shares with another resource, if not its own."""
    to_stored: Callable[[Obj], Obj] | None = None
    from_stored: Callable[[Obj], Obj] | None = None
    """Conversions, for versions that aren't stored as they are served."""
    verbs: tuple[str, ...] = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
    extra: Obj = field(default_factory=dict)

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        """``pods`` or ``deployments.apps``, as messages name it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def storage(self) -> str:
        return self.storage_name or self.qualified

    @property
    def list_kind(self) -> str:
        return self.extra.get("listKind") or f"{self.kind}List"
