"""Decoding lists and watch streams: bytes in, typed objects out, one bad object never spoils its neighbours.

The fast path decodes a whole page, or all complete lines of a chunk, straight into structs. Only when that fails are
the pieces decoded one by one, so that the one at fault is named and the others get through.
"""

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgspec

from fimbria.sources.k8s.types.meta import ApiObject, ListMeta, Obj, ObjectList, ObjectMeta, Status

T = TypeVar("T", bound=ApiObject)

MAX_LINE = 16 << 20  # bytes; etcd refuses objects above 1.5 MiB, JSON can be several times that


class Event(Obj, Generic[T], frozen=True):
    """`type` is ADDED, MODIFIED, DELETED, BOOKMARK or ERROR."""

    type: str
    object: T


class RawEvent(Obj, frozen=True):
    type: str
    object: msgspec.Raw


class Bad(msgspec.Struct, frozen=True):
    """An object that doesn't decode. `type` is the event's, or "" in a list; `meta` is as good as it could be read."""

    type: str
    meta: ObjectMeta
    error: str
    raw: bytes


class Failed(msgspec.Struct, frozen=True):
    """The server ended the stream with an error of its own."""

    status: Status


class Page(msgspec.Struct, Generic[T], frozen=True):
    meta: ListMeta
    items: tuple[T | Bad, ...]


class StreamError(ValueError):
    """The bytes are no watch stream."""


class _OnlyMeta(Obj, frozen=True):
    metadata: ObjectMeta = ObjectMeta()


_RAW_LIST = msgspec.json.Decoder(ObjectList[msgspec.Raw])
_RAW_EVENT = msgspec.json.Decoder(RawEvent)
_META = msgspec.json.Decoder(_OnlyMeta)
_STATUS = msgspec.json.Decoder(Status)
_BROKEN = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class PageDecoder(Generic[T]):
    """Decodes pages of a list of one type."""

    def __init__(self, type_: type[T]) -> None:
        self._page: Any = msgspec.json.Decoder(ObjectList[type_])  # type: ignore[valid-type]
        self._item = msgspec.json.Decoder(type_)

    def decode(self, data: bytes) -> Page[T]:
        """Raises StreamError when `data` isn't a list at all."""
        try:
            page = self._page.decode(data)
            return Page(page.metadata, page.items or ())
        except _BROKEN:
            pass
        try:
            raw = _RAW_LIST.decode(data)
        except _BROKEN as error:
            raise StreamError(f"the answer is no list: {error}") from None
        return Page(raw.metadata, tuple(self._one(bytes(item)) for item in raw.items or ()))

    def _one(self, data: bytes) -> T | Bad:
        try:
            return self._item.decode(data)
        except _BROKEN as error:
            return Bad("", read_meta(data), str(error), data)


class EventDecoder(Generic[T]):
    """Cuts a byte stream into lines and decodes them; a new one for every connection."""

    def __init__(self, type_: type[T]) -> None:
        self._event: Any = msgspec.json.Decoder(Event[type_])  # type: ignore[valid-type]
        self._pieces: list[bytes] = []
        self._pending = 0

    def feed(self, chunk: bytes) -> Iterator[Event[T] | Bad | Failed]:
        """The events completed by `chunk`. Raises StreamError for a line that is too long or is no event."""
        end = chunk.rfind(b"\n")
        if end < 0:
            self._pieces.append(chunk)
            self._pending += len(chunk)
            if self._pending > MAX_LINE:
                raise StreamError(f"an event is longer than {MAX_LINE >> 20} MiB")
            return iter(())
        lines = b"".join((*self._pieces, chunk[:end]))
        rest = chunk[end + 1 :]
        self._pieces = [rest] if rest else []
        self._pending = len(rest)
        return self._decode(lines)

    def _decode(self, lines: bytes) -> Iterator[Event[T] | Bad | Failed]:
        try:
            events: list[Event[T]] = self._event.decode_lines(lines)
        except _BROKEN:
            return (self._one(line) for line in lines.split(b"\n") if line.strip())
        # A Status happens to fit types that have no field of its names, so an ERROR must be looked for here as well.
        if any(event.type == "ERROR" for event in events):
            return (self._one(line) for line in lines.split(b"\n") if line.strip())
        return iter(events)

    def _one(self, line: bytes) -> Event[T] | Bad | Failed:
        try:
            event: Event[T] = self._event.decode(line)
            if event.type != "ERROR":
                return event
        except _BROKEN as error:
            problem = str(error)
        else:
            problem = ""
        try:
            raw = _RAW_EVENT.decode(line)
            if raw.type == "ERROR":
                return Failed(_STATUS.decode(raw.object))
        except _BROKEN as error:
            raise StreamError(f"a line of the watch is no event: {error}") from None
        data = bytes(raw.object)
        return Bad(raw.type, read_meta(data), problem, data)


def read_meta(data: bytes) -> ObjectMeta:
    """The metadata of an object that doesn't decode otherwise; empty when not even that is readable."""
    try:
        return _META.decode(data).metadata
    except _BROKEN:
        return ObjectMeta()
