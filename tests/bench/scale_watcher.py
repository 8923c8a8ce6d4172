"""The API side of one real agent: `python -m tests.bench.scale_watcher KUBECONFIG NODE` follows what an agent follows,
with its informers and tables, and nothing else. It prints a line of JSON once it has seen everything, and another for
each line that it reads: what it has received so far, and when it first knew each pod whose name begins with MARK with
an identity, in seconds of the monotonic clock."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from tests.bench.agent import pss

from fimbria.agent.sources import Sources, vocabulary
from fimbria.sources.k8s import config
from fimbria.sources.k8s.client import ApiClient
from fimbria.startup import postpone_collection
from fimbria.tables import Tables

MARK: Final = "storm-"


class CountingClient(ApiClient):
    """Counts the bytes of lists and watches, as they are after TLS and decompression."""

    listed = 0
    watched = 0

    async def list_page(self, *arguments: Any, **options: Any) -> bytes:
        """As its parent."""
        data = await super().list_page(*arguments, **options)
        self.listed += len(data)
        return data

    @asynccontextmanager
    async def watch(self, *arguments: Any, **options: Any) -> AsyncIterator[AsyncIterator[bytes]]:
        """As its parent."""
        async with super().watch(*arguments, **options) as chunks:
            yield self._counted(chunks)

    async def _counted(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            self.watched += len(chunk)
            yield chunk


async def follow(kubeconfig: Path, node: str) -> None:
    """Until standard input ends."""
    tables, began = Tables(), time.monotonic()
    seen: dict[str, float] = {}
    subscription = tables.remote_endpoints.subscribe()

    async def note() -> None:
        while True:
            await subscription.wait()
            now = time.monotonic()
            for key in subscription.drain():
                row = tables.remote_endpoints.get(key)
                if key[1].startswith(MARK):
                    seen.setdefault(f"{key[1]} {row.identity if row else 0}", now)

    async with CountingClient(config.load(kubeconfig), component="agent", timeout=120.0) as client:
        sources = Sources(client, tables, node, vocabulary("", "default"))
        sources.build()

        def say() -> None:
            print(json.dumps({
                "listed": client.listed, "watched": client.watched, "cpu": time.process_time(), "pss": pss_here(),
                "pods": len(tables.remote_endpoints), "took": time.monotonic() - began, "seen": seen,
                "events": sum(i.events for i in sources.informers), "watches": len(sources.informers),
                "kinds": {i.resource.plural: i.events for i in sources.informers if i.events},
                "lists": sum(i.lists for i in sources.informers),
                "slices": bool(sources.remotes and sources.remotes.covered),
            }), flush=True)  # fmt: skip

        async with asyncio.TaskGroup() as group:
            synced = asyncio.Event()
            tasks = [group.create_task(work) for work in
                     (sources.run(), note(), postpone_collection(synced.wait(), 120.0))]  # fmt: skip
            for table in sources.tables_followed():
                await table.wait_synced()
            synced.set()
            say()
            while await asyncio.to_thread(sys.stdin.readline):
                say()
            for task in tasks:
                task.cancel()


def pss_here() -> float:
    """MiB of this process."""
    return pss(int(Path("/proc/self").readlink().name))


if __name__ == "__main__":
    asyncio.run(follow(Path(sys.argv[1]), sys.argv[2]))
