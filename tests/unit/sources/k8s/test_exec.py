"""Commands in containers: the protocol's frames, and a server that speaks them."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from fimbria.sources.k8s.config import ClusterConfig
from fimbria.sources.k8s.errors import Forbidden, NotFound, Unavailable
from fimbria.sources.k8s.exec import (
    MAX_STATUS,
    SUBPROTOCOL,
    Channel,
    Container,
    ExecError,
    Limited,
    PodAccess,
    TooMuch,
    exit_code,
    split,
)

WEB = Container("shop", "web", "main")
SUCCESS = b'\x03{"status":"Success"}'
Speak = Callable[[web.WebSocketResponse, web.Request], Awaitable[None]]


def failure(code: int) -> bytes:
    causes = [{"reason": "ExitCode", "message": str(code)}]
    return json.dumps({"status": "Failure", "reason": "NonZeroExitCode", "details": {"causes": causes}}).encode()


@given(st.binary(max_size=64))
def test_split_knows_channels_and_nothing_else(message: bytes) -> None:
    try:
        channel, content = split(message)
    except ValueError:
        assert not message or message[0] not in set(Channel)
    else:
        assert bytes([channel]) + content == message


@given(st.binary(max_size=200) | st.recursive(st.none() | st.text() | st.integers(), lambda c: st.dictionaries(
    st.sampled_from(["status", "details", "causes", "reason", "message"]), c | st.lists(c, max_size=2), max_size=3
)).map(lambda v: json.dumps(v).encode()))  # fmt: skip
def test_a_final_status_is_a_code_or_refused(status: bytes) -> None:
    try:
        assert 0 <= exit_code(status) <= 999
    except ValueError as error:
        assert str(error)


def test_exit_codes() -> None:
    assert exit_code(SUCCESS[1:]) == 0
    assert exit_code(failure(3)) == 3
    with pytest.raises(ValueError, match="no such file"):
        exit_code(b'{"status":"Failure","message":"no such file"}')
    with pytest.raises(ValueError, match="too long"):
        exit_code(b" " * (MAX_STATUS + 1))


class Server:
    """An API server that knows one container; `speak` is what happens on its WebSocket."""

    def __init__(self) -> None:
        self.speak: Speak = self._nothing
        self.requests: list[Any] = []
        self.refuse: tuple[int, str] | None = None
        self.protocols: tuple[str, ...] = (SUBPROTOCOL,)
        self.url = ""

    @staticmethod
    async def _nothing(socket: web.WebSocketResponse, _request: web.Request) -> None:
        await socket.send_bytes(SUCCESS)

    async def exec(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        if self.refuse is not None:
            status, message = self.refuse
            return web.json_response({"kind": "Status", "status": "Failure", "message": message}, status=status)
        socket = web.WebSocketResponse(protocols=self.protocols)
        await socket.prepare(request)
        await self.speak(socket, request)
        return socket

    async def log(self, request: web.Request) -> web.Response:
        self.requests.append(request)
        if request.query.get("previous") == "true":
            return web.json_response({"message": "previous terminated container not found"}, status=400)
        return web.Response(body=b"x" * 200_000)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    app = web.Application()
    app.add_routes([web.get("/api/v1/namespaces/shop/pods/web/exec", made.exec),
                    web.get("/api/v1/namespaces/shop/pods/web/log", made.log)])  # fmt: skip
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield made
    await runner.cleanup()


@pytest.fixture
async def pods(server: Server) -> AsyncIterator[PodAccess]:
    async with PodAccess(ClusterConfig(server.url), component="test") as access:
        yield access


async def test_output_by_channel_and_the_exit_code(server: Server, pods: PodAccess) -> None:
    async def speak(socket: web.WebSocketResponse, _request: web.Request) -> None:
        for message in (b"\x01one ", b"\x02warning: x\n", b"\x01two", b"\xff\x01", b"\x01", b"\x03" + failure(3)):
            await socket.send_bytes(message)

    server.speak = speak
    done = await pods.capture(WEB, ["fimbria", "plan", "a b&c"], patience=5)
    assert (done.code, done.stdout, done.said) == (3, b"one two", "warning: x")
    query = server.requests[0].query
    assert query.getall("command") == ["fimbria", "plan", "a b&c"]
    assert (query["container"], query["stdout"], query["stderr"]) == ("main", "true", "true")
    assert "stdin" not in query


async def test_a_command_that_hangs_is_left_after_its_time(server: Server, pods: PodAccess) -> None:
    gone = asyncio.Event()

    async def speak(socket: web.WebSocketResponse, _request: web.Request) -> None:
        await socket.send_bytes(b"\x01begun")
        async for _ in socket:
            pass
        gone.set()

    server.speak = speak
    with pytest.raises(ExecError, match=r"fimbria status in container main of pod shop/web took longer than 0 s"):
        await pods.capture(WEB, ["fimbria", "status"], patience=0.3)
    await asyncio.wait_for(gone.wait(), 5)


async def test_output_is_bounded(server: Server, pods: PodAccess) -> None:
    async def speak(socket: web.WebSocketResponse, _request: web.Request) -> None:
        while not socket.closed:
            await socket.send_bytes(b"\x01" + b"x" * 30_000)

    server.speak = speak
    with pytest.raises(ExecError, match="wrote more than 1 MiB"):
        await pods.capture(WEB, ["yes"], patience=20, most=1 << 20)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ((b"\x01x",), "ended before the command did"),
        ((b"\x09x",), "channel 9"),
        ((b"",), "empty message"),
        (("text",), "type TEXT"),
        ((b"\x03nonsense",), "can't be understood"),
        ((b'\x03{"status":"Failure","message":"container not found (\\"main\\")"}',), "container not found"),
    ],
)
async def test_a_server_that_breaks_the_rules(
    server: Server, pods: PodAccess, messages: tuple[bytes | str, ...], text: str
) -> None:
    async def speak(socket: web.WebSocketResponse, _request: web.Request) -> None:
        for message in messages:
            await (socket.send_str(message) if isinstance(message, str) else socket.send_bytes(message))

    server.speak = speak
    with pytest.raises(ExecError, match=text):
        await pods.capture(WEB, ["x"], patience=5)


async def test_refusals_carry_the_servers_words(server: Server, pods: PodAccess) -> None:
    server.refuse = (403, 'pods "web" is forbidden: User "x" cannot get resource "pods/exec"')
    with pytest.raises(Forbidden, match=r'run id in container main of pod shop/web: .*cannot get resource "pods/exec"'):
        await pods.capture(WEB, ["id"], patience=5)
    server.refuse = (404, 'pods "web" not found')
    with pytest.raises(NotFound, match="not found"):
        await pods.capture(WEB, ["id"], patience=5)


async def test_a_server_without_the_protocol(server: Server, pods: PodAccess) -> None:
    server.protocols = ("v4.channel.k8s.io",)
    with pytest.raises(ExecError, match=r"doesn't speak v5\.channel\.k8s\.io"):
        await pods.capture(WEB, ["id"], patience=5)


async def test_no_server() -> None:
    async with PodAccess(ClusterConfig("http://127.0.0.1:9"), component="test") as access:
        with pytest.raises(Unavailable, match="run id in container main"):
            await access.capture(WEB, ["id"], patience=5)


async def test_logs(server: Server, pods: PodAccess) -> None:
    kept = Limited(1 << 20)
    await pods.logs(WEB, kept.write, since_seconds=60, tail_lines=100)
    assert len(kept.data) == 200_000
    assert dict(server.requests[0].query) == {
        "container": "main", "timestamps": "true", "sinceSeconds": "60", "tailLines": "100",
    }  # fmt: skip
    with pytest.raises(Exception, match="previous terminated container not found"):
        await pods.logs(WEB, kept.write, previous=True)
    with pytest.raises(TooMuch):
        await pods.logs(WEB, Limited(1000).write)
