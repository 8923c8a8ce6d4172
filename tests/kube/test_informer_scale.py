"""Informers in a storm of changes, against both servers: a slow one, one whose connections are cut, one that falls out
of the server's history. None may miss a change for good, and none may stay behind for longer than its own pause."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from fimbria.sources.k8s import config
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.informer import Informer
from fimbria.sources.k8s.resources import ENDPOINT_SLICES
from fimbria.sources.k8s.types.core import EndpointSlice
from fimbria.tables.table import Table

SLICES = 200
STORM = 8.0  # seconds at least
MOST = 120.0  # seconds for what a storm is made for, on a machine that is busy
CHANGES = 500
WRITERS = 8
TURN = "fim/turn"
CAUGHT_UP = 60.0  # seconds for everybody to be equal to the server after the storm
FRESH = 3.0  # seconds that an undisturbed informer may be behind, besides the longest that a request took meanwhile

Turns = dict[str, int]


@dataclass
class Storm:
    """What came of it: changes made, and the longest that one took in seconds."""

    made: int = 0
    slowest: float = 0.0


def body(name: str, turn: int) -> dict[str, Any]:
    meta = {"name": name, "labels": {"kubernetes.io/service-name": name, TURN: str(turn)}}
    endpoints = [{"addresses": [f"10.1.{turn % 250}.{n}"], "conditions": {"ready": True}} for n in range(1, 4)]
    return {"metadata": meta, "addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 80}]}


def turn_of(obj: EndpointSlice) -> int:
    return int((obj.metadata.labels or {})[TURN])


class Cutter:
    """A TCP proxy whose connections live for some tenths of a second, or stall before they die."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.cuts = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        life, stall = random.uniform(0.1, 1.5), random.choice((0.0, 0.5))
        up_reader, up_writer = await asyncio.open_connection(*self._target)
        pumps = [asyncio.create_task(_pump(*ends)) for ends in ((reader, up_writer), (up_reader, writer))]
        try:
            await asyncio.wait(pumps, timeout=life, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.sleep(stall)
            self.cuts += 1
        finally:
            for end in (writer, up_writer):
                end.transport.abort()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(3000):
            sink.write(data)
            await sink.drain()
    except (ConnectionError, OSError):
        return


async def storm(client: ApiClient, namespace: str, turns: Turns, seen: Storm, enough: Callable[[], bool]) -> None:
    """Changes slices in turn, as fast as the server takes them; `turns` is what the server has confirmed. It lasts
    until it has done what it is made for."""
    began = time.monotonic()

    def over() -> bool:
        passed = time.monotonic() - began
        return passed > MOST or (passed > STORM and seen.made > CHANGES and enough())

    async def writer(first: int) -> None:
        while not over():
            for n in range(first, SLICES, WRITERS):
                name, asked = f"s{n}", time.monotonic()
                await client.replace(ENDPOINT_SLICES, name, body(name, turns[name] + 1), namespace)
                seen.slowest = max(seen.slowest, time.monotonic() - asked)
                turns[name] += 1
                seen.made += 1

    await asyncio.gather(*(writer(n) for n in range(WRITERS)))


def informer(client: ApiClient, namespace: str, transform: Any = turn_of, **options: Any) -> Informer[Any, str, int]:
    table: Table[str, int] = Table("slices")
    return Informer(client, ENDPOINT_SLICES, table, transform, key=lambda m: m.name, namespace=namespace, **options)


async def settled(table: Table[str, int], wanted: Turns) -> float:
    """Seconds until a table says the same; fails with what differs."""
    began = time.monotonic()
    while dict(table.items()) != wanted:
        if time.monotonic() - began > CAUGHT_UP:
            off = {k: (table.get(k), v) for k, v in wanted.items() if table.get(k) != v}
            raise AssertionError(f"still different after {CAUGHT_UP} s (has, should have): {off}")
        await asyncio.sleep(0.01)
    return time.monotonic() - began


@contextmanager
def slow_reader(
    cluster: config.ClusterConfig, namespace: str, storm: Storm, over: threading.Event
) -> Iterator[Informer[Any, str, int]]:
    """An informer in a thread of its own that takes ten milliseconds for an object, and keeps up with every second
    change at most, until the storm is over."""
    made: list[Informer[Any, str, int]] = []
    ready, loops, read = threading.Event(), [], count(-SLICES)

    def slowly(obj: EndpointSlice) -> int:
        done = next(read)
        while not over.wait(0.01) and 2 * done > storm.made:
            pass
        return turn_of(obj)

    async def work() -> None:
        async with ApiClient(cluster, component="slow", rate=1000.0, burst=1000) as client:
            made.append(informer(client, namespace, slowly))
            loops.append((asyncio.get_running_loop(), asyncio.current_task()))
            ready.set()
            await made[0].run()

    def thread() -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(work())

    running = threading.Thread(target=thread, daemon=True)
    running.start()
    assert ready.wait(60)
    try:
        yield made[0]
    finally:
        over.set()
        loop, task = loops[0]
        loop.call_soon_threadsafe(task.cancel)
        running.join(60)


async def run_storm(
    kubeconfig: Path, namespace: str, enough: Callable[[Cutter, Informer[Any, str, int]], bool]
) -> dict[str, Any]:
    """`enough` is asked about the connections that were cut and the slow informer."""
    cluster = config.load(kubeconfig)
    url = urlsplit(cluster.server)
    cutter = Cutter(str(url.hostname), int(url.port or 443))
    behind = 0.0
    async with (
        cutter.listening() as port,
        ApiClient(cluster, component="storm", rate=1e6, burst=1_000_000) as client,
        ApiClient(replace(cluster, server=f"https://127.0.0.1:{port}"), component="cut", rate=1e6, burst=10**6) as cut,
    ):
        turns: Turns = {}
        for n in range(SLICES):
            await client.create(ENDPOINT_SLICES, body(f"s{n}", 0), namespace)
            turns[f"s{n}"] = 0
        direct, broken = informer(client, namespace), informer(cut, namespace)
        tasks = [asyncio.create_task(one.run()) for one in (direct, broken)]
        over, seen = threading.Event(), Storm()
        with slow_reader(cluster, namespace, seen, over) as slow:
            await asyncio.gather(*(one.table.wait_synced() for one in (direct, broken)))

            async def freshness() -> None:
                nonlocal behind
                while True:
                    confirmed, at = dict(turns), time.monotonic()
                    while any((direct.table.get(k) or 0) < v for k, v in confirmed.items()):
                        behind = max(behind, time.monotonic() - at)
                        await asyncio.sleep(0.005)
                    await asyncio.sleep(0.05)

            watchman = asyncio.create_task(freshness())
            await storm(client, namespace, turns, seen, lambda: enough(cutter, slow))
            assert not watchman.done(), watchman
            watchman.cancel()
            over.set()
            found = {"changes": seen.made, "slowest": seen.slowest, "behind": behind, "cuts": cutter.cuts}
            for name, one in (("direct", direct), ("broken", broken), ("slow", slow)):
                found[name] = await settled(one.table, turns)
                found[f"{name} lists"] = one.lists
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return found


def test_storm_leaves_nobody_behind(server: Any, ns: str) -> None:
    found = asyncio.run(run_storm(server.kubeconfig, ns, lambda cutter, _: cutter.cuts >= 3))
    print(server.kind, found)
    assert found["changes"] > CHANGES
    assert found["cuts"] >= 3
    assert found["behind"] < FRESH + found["slowest"]
    assert found["direct lists"] == 1
    assert found["broken lists"] == 1, "a cut connection is no reason to list again"


def test_storm_with_a_history_that_is_too_short(embedded_server: Any) -> None:
    client = embedded_server.start()
    client.post("/api/v1/namespaces", {"metadata": {"name": "fim-short"}})
    found = asyncio.run(run_storm(client.kubeconfig, "fim-short", lambda _, slow: slow.lists > 1))
    print(found)
    assert found["slow lists"] > 1, "the slow informer was meant to fall out of the history"


pytestmark = pytest.mark.timeout(600)
