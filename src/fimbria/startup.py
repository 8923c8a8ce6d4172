"""What a process that stays does about the cost of its own imports."""

from __future__ import annotations

import asyncio
import gc
import ssl
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Final

COLLECT_AFTER: Final = (20_000, 20, 20)
"""Python's own (700, 10, 10) looks at what a burst of objects leaves behind again and again: half of the time that
10,000 new Services take, and next to nothing of it is garbage."""


@contextmanager
def cheap_imports() -> Iterator[None]:
    """A process's modules are imported within it, before any thread is started.

    Nothing that is imported becomes garbage: the collector looks for some only afterwards, and never again at what is
    there by then. And aiohttp's connector reads the system's certificates for two contexts when it is imported. Ours
    come from `sources.k8s.config`; those two trust nobody, so that a connection by mistake fails.
    """
    load = ssl.SSLContext.load_default_certs
    ssl.SSLContext.load_default_certs = _load_none  # type: ignore[method-assign]
    gc.disable()
    try:
        yield
    finally:
        ssl.SSLContext.load_default_certs = load  # type: ignore[method-assign]
        gc.freeze()
        gc.set_threshold(*COLLECT_AFTER)
        gc.enable()


async def postpone_collection(until: Awaitable[object], most: float) -> None:
    """Look for no garbage until `until` is done, or for `most` seconds.

    What is read at a start stays: looking through all of it, again and again as it grows, was a third of the time that
    a large cluster took. What is there by then is never looked at again, as in `cheap_imports`.
    """
    gc.disable()
    try:
        await asyncio.wait_for(until, most)
        gc.freeze()
    except TimeoutError:
        pass  # something is being tried again and again, and may leave garbage
    finally:
        gc.enable()


def _load_none(self: ssl.SSLContext, purpose: ssl.Purpose = ssl.Purpose.SERVER_AUTH) -> None:
    """Stands in for SSLContext.load_default_certs."""
