"""The observer: reads the datapath's events, remembers the last ones as flows, and serves them on `observer.sock`.

It is a process of its own, so that a flood of events can't starve the agent. If it is down or too slow, events are lost
and counted; nothing else happens.

    GET /v1/flows?last=N&follow=1&<filter>=<values>   one JSON flow a line, oldest first
    GET /v1/status
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from errno import ENOENT
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from fimbria.kernel.bpf import BpfError, Map, RingBuffer
from fimbria.kernel.btf import Btf
from fimbria.kernel.codec import Codec
from fimbria.kernel.fd import is_pinned_whole
from fimbria.model.rows import Event
from fimbria.observe.filters import FilterError, build
from fimbria.observe.flow import DROP, Clock, FlowBuilder
from fimbria.observe.names import layout_object
from fimbria.observe.resolve import AgentNames

log = logging.getLogger("fimbria.observer")
CAPACITY: Final = 4095
BATCH: Final = 1024
FOLLOWER_LIMIT: Final = 4096
Flow = dict[str, Any]
PAUSE: Final = 0.02


class Observer:
    """Reads and remembers; enriches what is asked for.

    Most events are never looked at, so they stay as they came until somebody reads or follows them. Drops are told at
    once: the rule, or the pod, behind one may be gone when it is read.
    """

    def __init__(self, node: str, run_dir: Path, bpffs: Path) -> None:
        self._run_dir = run_dir
        self._bpffs = bpffs
        self.names = AgentNames(run_dir / "agent.sock")
        clock = Clock(time.time_ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC))
        self._builder = FlowBuilder(node, clock, self.names)
        self._codec: Codec[Event] = Codec(Btf.from_elf(layout_object()), "struct event", Event)
        self._past: deque[Event | Flow] = deque(maxlen=CAPACITY)
        self.followers: set[asyncio.Queue[Flow]] = set()
        self.seen = 0
        self.dropped_for_followers = 0

    async def run(self) -> None:
        """Read events until cancelled; follows the map if an upgraded agent makes a new one."""
        while True:
            path = await self._find_map()
            try:
                events = Map.open(path, "events")
            except BpfError as e:
                if e.errno != ENOENT:
                    raise
                continue  # the agent has just replaced it
            log.info("reading events of %s", path.name)
            with events:
                await self._read(RingBuffer(events.fd), path)

    async def _find_map(self) -> Path:
        while True:
            found = self._newest_map()
            if found is not None:
                return found
            await asyncio.sleep(0.2)

    def _newest_map(self) -> Path | None:
        with suppress(OSError):
            pins = filter(is_pinned_whole, (self._bpffs / "fimbria" / "maps").glob("events-*"))
            return max(pins, key=lambda p: p.stat().st_ctime, default=None)
        return None

    async def _read(self, ring: RingBuffer, path: Path) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()

        def woken() -> None:
            # Events that come during the pause leave the buffer readable: a reader left in place would spin.
            loop.remove_reader(ring.fd)
            readable.set()

        try:
            while self._newest_map() == path:
                loop.add_reader(ring.fd, woken)
                with suppress(TimeoutError):
                    async with asyncio.timeout(2.0):
                        await readable.wait()
                readable.clear()
                while records := ring.drain(BATCH):
                    await self._take(records)
                await asyncio.sleep(PAUSE)
        finally:
            loop.remove_reader(ring.fd)

    async def _take(self, records: list[bytes]) -> None:
        events = self._codec.decode_many(b"".join(records))
        self.seen += len(events)
        told = events if self.followers else [e for e in events if e.type == DROP]
        if told:
            await self.names.learn(told)
        for event in events:
            if not self.followers and event.type != DROP:
                self._past.append(event)
                continue
            flow = self._builder.flow(event)
            self._past.append(flow)
            for queue in self.followers:
                if queue.full():
                    self.dropped_for_followers += 1
                else:
                    queue.put_nowait(flow)

    def __len__(self) -> int:
        return len(self._past)

    async def past(self) -> list[Flow]:
        """The flows of all events remembered at the time of the call, oldest first."""
        kept = list(self._past)
        await self.names.learn(e for e in kept if isinstance(e, Event))
        return [self._builder.flow(e) if isinstance(e, Event) else e for e in kept]


class ObserverApi:
    """Serves one observer."""

    def __init__(self, observer: Observer, path: Path) -> None:
        self._observer = observer
        self._path = path

    async def run(self) -> None:
        """Serve until cancelled."""
        app = web.Application()
        app.add_routes([web.get("/v1/flows", self._flows), web.get("/v1/status", self._status)])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            self._path.unlink()
        old = os.umask(0o177)
        try:
            await web.UnixSite(runner, str(self._path)).start()
        finally:
            os.umask(old)
        try:
            await asyncio.Event().wait()
        finally:
            await runner.cleanup()

    async def _status(self, _request: web.Request) -> web.Response:
        o = self._observer
        return web.json_response(
            {
                "flows": len(o),
                "max_flows": CAPACITY,
                "seen_flows": o.seen,
                "followers": len(o.followers),
                "lost_for_followers": o.dropped_for_followers,
                "name_errors": o.names.errors,
            }
        )

    async def _flows(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        follow = query.pop("follow", "") in ("1", "true")
        last = query.pop("last", "0" if follow else "100")
        try:
            wanted = build(query)
            count = min(int(last), CAPACITY)
        except (FilterError, ValueError) as error:
            return web.json_response({"error": str(error)}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        queue: asyncio.Queue[Flow] = asyncio.Queue(FOLLOWER_LIMIT)
        # Subscribed before the past is written: nothing falls in between.
        if follow:
            self._observer.followers.add(queue)
        try:
            past = [f for f in await self._observer.past() if wanted(f)]
            await response.prepare(request)
            lines = "".join(json.dumps(f) + "\n" for f in past[len(past) - count :])
            await response.write(lines.encode())
            while follow:
                flow = await queue.get()
                if wanted(flow):
                    await response.write(json.dumps(flow).encode() + b"\n")
        except (ConnectionResetError, ConnectionError):
            pass
        finally:
            self._observer.followers.discard(queue)
        return response


async def run(node: str, run_dir: Path, bpffs: Path) -> None:
    """Run until cancelled."""
    observer = Observer(node, run_dir, bpffs)
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(ObserverApi(observer, run_dir / "observer.sock").run())
            group.create_task(observer.run())
    finally:
        await observer.names.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fimbria observer`; returns the exit status."""
    p = argparse.ArgumentParser("fimbria observer", description="Fimbria's observer: flows of one node.")
    node = os.environ.get("FIMBRIA_NODE_NAME", os.uname().nodename)
    p.add_argument("--node-name", default=node, help="name of this node in flows (default: the host's name)")
    p.add_argument("--run-dir", default="/run/fimbria", help="folder of sockets (default: /run/fimbria)")
    p.add_argument("--bpffs", default="/sys/fs/bpf", help="where a BPF file system is mounted")
    levels = ("debug", "info", "warning", "error")
    p.add_argument("--log-level", default="info", choices=levels, help="debug, info, warning or error")
    a = p.parse_args(argv)
    logging.basicConfig(
        level=a.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    return asyncio.run(_until_stopped(a.node_name, Path(a.run_dir), Path(a.bpffs)))


async def _until_stopped(node: str, run_dir: Path, bpffs: Path) -> int:
    task = asyncio.create_task(run(node, run_dir, bpffs))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return 0
    except BpfError as error:
        log.error("%s", error)
        return 1
    return 0
