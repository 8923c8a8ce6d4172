"""A scripted API server: every test says request by request what comes back, down to where a line is cut."""

import asyncio
import json
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Responder = Callable[[web.Request], Awaitable[web.StreamResponse]]
Obj = dict[str, Any]


@dataclass
class Seen:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def pod(name: str, version: int, node: str = "n1", **more: Any) -> Obj:
    meta = {"name": name, "namespace": "ns", "uid": f"uid-{name}", "resourceVersion": str(version)}
    return {"metadata": meta, "spec": {"nodeName": node}, **more}


def status(code: int, reason: str, message: str = "", **more: Any) -> Obj:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason}
    return {**body, "message": message, **more}


def event(kind: str, obj: Obj) -> bytes:
    return json.dumps({"type": kind, "object": obj}).encode() + b"\n"


def bookmark(version: int) -> bytes:
    return event("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": str(version), "creationTimestamp": None}})


def answer(body: Any, code: int = 200, **headers: str) -> Responder:
    async def respond(_request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=code, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return respond


def fails(code: int, reason: str = "", message: str = "", **headers: str) -> Responder:
    return answer(status(code, reason, message), code, **headers)


def listing(items: list[Obj], version: int, token: str = "") -> Responder:
    return answer({"kind": "PodList", "metadata": {"resourceVersion": str(version), "continue": token}, "items": items})


class Stream:
    """A watch that the test feeds: `send` bytes, then `end` it properly or `cut` the connection."""

    def __init__(self) -> None:
        self._orders: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    def send(self, *data: bytes) -> "Stream":
        for part in data:
            self._orders.put_nowait(("send", part))
        return self

    def end(self) -> "Stream":
        self._orders.put_nowait(("end", b""))
        return self

    def cut(self) -> "Stream":
        self._orders.put_nowait(("cut", b""))
        return self

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        while True:
            order, data = await self._orders.get()
            if order == "end":
                return response
            if order == "cut":
                assert request.transport is not None
                request.transport.abort()
                return response
            await response.write(data)


@dataclass
class Scripted:
    """Answers by the kind of request: `get`, `list`, `watch`, or the lower-case method of a write."""

    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    scripts: dict[str, deque[Responder]] = field(default_factory=lambda: defaultdict(deque))
    problems: list[str] = field(default_factory=list)

    def on(self, kind: str, *responders: Responder) -> "Scripted":
        self.scripts[kind].extend(responders)
        return self

    def requests(self, kind: str) -> list[Seen]:
        return [seen for seen in self.seen if self.kind(seen.method, seen.path, seen.query) == kind]

    @staticmethod
    def kind(method: str, path: str, query: dict[str, str]) -> str:
        if method != "GET":
            return method.lower()
        if query.get("watch") == "true":
            return "watch"
        return "list" if path.rsplit("/", 1)[-1].endswith("s") else "get"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        seen = Seen(request.method, request.path, query, dict(request.headers), await request.read())
        self.seen.append(seen)
        kind = self.kind(request.method, request.path, query)
        if not self.scripts[kind]:
            if kind == "watch":  # nothing more is scripted: an idle watch
                return await Stream()(request)
            self.problems.append(f"nobody expected {kind} {request.path_qs}")
            return web.json_response(status(500, "InternalError", "not scripted"), status=500)
        return await self.scripts[kind].popleft()(request)


class Pauses:
    """A sleep that doesn't: it notes how long it was asked to, moves a clock, and yields once."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.now = 1000.0

    def clock(self) -> float:
        return self.now

    async def __call__(self, seconds: float) -> None:
        self.asked.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something that other tasks bring about; fails loudly instead of hanging."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # any state of any task may be waited for
            await asyncio.sleep(0.002)
