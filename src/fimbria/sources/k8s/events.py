"""Kubernetes Events (core/v1): telling users about an object, best effort and never a flood.

Repetitions of one message about one object become one Event whose count grows. Each object may have `burst` writes at
once and one every `interval` seconds after that; what exceeds it is only counted, and reported with the next write.
`emit` never waits and never fails; `run` posts in the background.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2s
from typing import Any, Literal

from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import ApiError, NotFound
from fimbria.sources.k8s.pacing import TokenBucket
from fimbria.sources.k8s.resources import EVENTS, Resource
from fimbria.sources.k8s.timestamps import to_time
from fimbria.sources.k8s.types.core import Event, EventSource
from fimbria.sources.k8s.types.meta import ObjectMeta, ObjectReference

EventType = Literal["Normal", "Warning"]

_MAX_MESSAGE = 1024  # bytes, a limit of the API
_log = logging.getLogger("fimbria.k8s")


@dataclass(slots=True)
class _Story:
    """One message about one object, and how often it happened."""

    about: ObjectReference
    type: EventType
    reason: str
    message: str
    first: float
    last: float
    count: int = 0
    posted_name: str = ""


class EventRecorder:
    """Posts Events in the name of `component` on `host`. Remembers the `remember` latest messages for counting."""

    def __init__(
        self,
        client: ApiClient,
        *,
        component: str,
        host: str = "",
        burst: int = 10,
        interval: float = 60.0,
        remember: int = 1024,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._component = component
        self._host = host
        self._burst = burst
        self._interval = interval
        self._remember = remember
        self._wall = wall
        self._clock = clock
        self._stories: OrderedDict[tuple[str, ...], _Story] = OrderedDict()
        self._buckets: OrderedDict[tuple[str, ...], TokenBucket] = OrderedDict()
        self._todo: OrderedDict[tuple[str, ...], _Story] = OrderedDict()
        self._wake = asyncio.Event()
        self.posted = 0
        self.suppressed = 0
        self.failed = 0
        self._complained = ""

    def emit(self, resource: Resource[Any], meta: ObjectMeta, type: EventType, reason: str, message: str) -> None:
        """Tell something about the object `meta` of the kind `resource`. `reason` is one CamelCase word."""
        about = ObjectReference(
            api_version=resource.api_version,
            kind=resource.kind,
            namespace=meta.namespace,
            name=meta.name,
            uid=meta.uid,
            resource_version=meta.resource_version,
        )
        message = message.encode()[:_MAX_MESSAGE].decode("utf-8", "ignore")
        subject = (about.api_version, about.kind, about.namespace, about.name, about.uid)
        key = (*subject, type, reason, message)
        now = self._wall()
        story = self._stories.pop(key, None) or _Story(about, type, reason, message, now, now)
        self._stories[key] = story
        story.count += 1
        story.last = now
        if key not in self._todo:
            if len(self._todo) >= self._remember or not self._bucket(subject).try_take(self._clock()):
                self.suppressed += 1
            else:
                self._todo[key] = story
                self._wake.set()
        while len(self._stories) > self._remember:
            self._stories.popitem(last=False)

    def _bucket(self, subject: tuple[str, ...]) -> TokenBucket:
        bucket = self._buckets.pop(subject, None) or TokenBucket(1.0 / self._interval, self._burst)
        self._buckets[subject] = bucket
        while len(self._buckets) > self._remember:
            self._buckets.popitem(last=False)
        return bucket

    async def run(self) -> None:
        """Post for ever; one failure costs one Event and a log line."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self.flush()

    async def flush(self) -> None:
        """Post what is waiting, e.g. before the process ends."""
        while self._todo:
            key, story = self._todo.popitem(last=False)
            try:
                await self._post(key, story)
                self.posted += 1
                self._complained = ""
            except ApiError as error:
                self.failed += 1
                if error.namespace_ends:
                    continue
                # Whoever may not post one may post none: once is enough, in a log that people read.
                level = logging.INFO if error.reason == self._complained else logging.WARNING
                self._complained = error.reason
                _log.log(level, "an event about %s %s wasn't posted: %s", story.about.kind, story.about.name, error)

    async def _post(self, key: tuple[str, ...], story: _Story) -> None:
        namespace = story.about.namespace or "default"  # Events are namespaced, also those about nodes
        if story.posted_name:
            patch = {"count": story.count, "lastTimestamp": to_time(story.last), "message": story.message}
            try:
                await self._client.patch(EVENTS, story.posted_name, patch, namespace)
                return
            except NotFound:
                pass  # expired on the server: tell it anew
        name = self._name(key, story)
        await self._client.create(EVENTS, self._event(story, name, namespace), namespace)
        story.posted_name = name

    def _name(self, key: tuple[str, ...], story: _Story) -> str:
        digest = blake2s("\0".join(key).encode(), digest_size=4).hexdigest()
        # The time keeps two processes, or two lives of one, from choosing the same name.
        return f"{story.about.name[:200].rstrip('.-')}.{digest}{int(self._wall() * 1e6) & 0xFFFFFFFFFF:010x}"

    def _event(self, story: _Story, name: str, namespace: str) -> Event:
        return Event(
            metadata=ObjectMeta(name=name, namespace=namespace),
            involved_object=story.about,
            type=story.type,
            reason=story.reason,
            message=story.message,
            count=story.count,
            first_timestamp=to_time(story.first),
            last_timestamp=to_time(story.last),
            source=EventSource(component=self._component, host=self._host),
            reporting_component=self._component,
            reporting_instance=self._host,
        )
