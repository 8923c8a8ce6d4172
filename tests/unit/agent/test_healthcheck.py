"""Health checks over real sockets: kube-proxy's answers, and clients that mean no good."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from fimbria import small_http
from fimbria.agent import healthcheck
from fimbria.agent.config import ConfigError, parse
from fimbria.agent.healthcheck import Freshness, HealthChecks
from fimbria.model.address import pack
from fimbria.model.service import Service, ServiceKey
from fimbria.tables.table import Table

WEB = ServiceKey("shop", "web")


class Ports:
    """Nobody else's meanwhile: a socket stays bound to each, which is in no listener's way that shares addresses."""

    def __init__(self) -> None:
        self._kept: list[socket.socket] = []

    def free(self) -> int:
        keeper = socket.socket()
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        self._kept.append(keeper)
        return int(keeper.getsockname()[1])

    def close(self) -> None:
        for keeper in self._kept:
            keeper.close()


@dataclass
class Node:
    """The agent's side."""

    services: Table[Any, Service] = field(default_factory=lambda: Table("services"))
    ready: dict[ServiceKey, int] = field(default_factory=dict)
    healthy: bool = True
    eligible: bool = True
    counted: int = 0
    ports: Ports = field(default_factory=Ports)
    health_port: int = 0
    port: int = 0
    checks: HealthChecks = field(init=False)

    def __post_init__(self) -> None:
        self.health_port, self.port = self.ports.free(), self.ports.free()
        freshness = Freshness(lambda: 0, lambda: False, lambda: self.healthy)
        listen = f"127.0.0.1:{self.health_port}"
        self.checks = HealthChecks(self.services, self.count, freshness, lambda: self.eligible, listen)

    def count(self, key: ServiceKey, v4: bool) -> int:
        assert v4
        self.counted += 1
        return self.ready.get(key, 0)

    def serve(self, key: ServiceKey = WEB, port: int = 0, addr: str = "10.96.0.1") -> None:
        self.services.upsert(tuple(key), Service(key, (pack(addr),), health_check_port=port or self.port))


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    node = Node()
    task = asyncio.create_task(node.checks.run())
    yield node
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for port in (node.port, node.health_port):
        with pytest.raises(OSError):
            await ask(port)
    node.ports.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(healthcheck, "RETRY", 0.05)
    monkeypatch.setattr(healthcheck, "KEPT", 0.0)
    monkeypatch.setattr(small_http, "PATIENCE", 0.3)
    yield


async def talk(port: int, request: bytes, host: str = "127.0.0.1") -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(), 30)
    finally:
        writer.close()


async def ask(port: int, path: str = "/", method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    raw = await talk(port, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    return int(lines[0].split()[1]), dict(line.split(": ", 1) for line in lines[1:]), body


async def until_open(port: int) -> None:
    for _ in range(100):
        try:
            await ask(port)
        except OSError:
            await asyncio.sleep(0.02)
        else:
            return
    pytest.fail(f"nobody listens on port {port}")


async def until_closed(port: int) -> None:
    for _ in range(100):
        try:
            await ask(port)
        except OSError:
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"port {port} stays open")


async def test_a_service_answers_as_kube_proxy_does(node: Node, quick: None) -> None:
    node.serve()
    node.ready[WEB] = 2
    await until_open(node.port)
    status, headers, body = await ask(node.port, "/whatever?x=1")
    assert status == 200
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Load-Balancing-Endpoint-Weight"] == "2"
    assert int(headers["Content-Length"]) == len(body)
    assert body.decode() == (
        '{\n\t"service": {\n\t\t"namespace": "shop",\n\t\t"name": "web"\n\t},\n'
        '\t"localEndpoints": 2,\n\t"serviceProxyHealthy": true\n}'
    )
    node.ready[WEB] = 0
    status, headers, body = await ask(node.port)
    assert (status, headers["X-Load-Balancing-Endpoint-Weight"], json.loads(body)["localEndpoints"]) == (503, "0", 0)
    node.ready[WEB], node.healthy = 3, False
    status, headers, body = await ask(node.port)
    assert (status, headers["X-Load-Balancing-Endpoint-Weight"]) == (503, "3")
    assert json.loads(body)["serviceProxyHealthy"] is False


async def test_a_service_of_one_family_answers_in_the_other(node: Node, quick: None) -> None:
    """Upstream's specs ask each InternalIP of a node with two about a Service with IPv4 alone."""
    node.serve()
    node.ready[WEB] = 2
    await until_open(node.port)
    answer = await talk(node.port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", "::1")
    assert b" 200 " in answer.splitlines()[0] and b'"localEndpoints": 2' in answer


async def test_ports_come_and_go_with_their_services(node: Node, quick: None) -> None:
    other, port = ServiceKey("shop", "other"), node.ports.free()
    node.serve()
    node.serve(other, port)
    node.ready[other] = 1
    await until_open(node.port)
    await until_open(port)
    assert (await ask(node.port))[0] == 503
    assert json.loads((await ask(port))[2])["service"]["name"] == "other"
    node.services.delete(tuple(WEB))
    await until_closed(node.port)
    assert (await ask(port))[0] == 200
    node.services.delete(tuple(other))
    await until_closed(port)


async def test_a_port_that_is_taken_is_named_and_tried_again(
    node: Node, quick: None, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("0.0.0.0", node.port))
        holder.listen()
        node.serve()
        await asyncio.sleep(0.3)
        assert caplog.text.count("Service shop/web: port") == 1, "once, not with every try"
        assert list(node.checks.problems) == ["health check of Service shop/web"]
    await until_open(node.port)
    for _ in range(200):
        if not node.checks.problems:
            break
        await asyncio.sleep(0.02)
    assert node.checks.problems == {}


async def test_the_node_answers_as_kube_proxy_does(node: Node, quick: None) -> None:
    await until_open(node.health_port)
    status, headers, body = await ask(node.health_port, "/healthz")
    found = json.loads(body)
    assert (status, headers["Content-Type"], found["nodeEligible"], found["healthy"]) == (
        200, "application/json", True, True,
    )  # fmt: skip
    assert found.keys() == {"lastUpdated", "currentTime", "nodeEligible", "healthy", "status"}
    assert found["lastUpdated"] == found["currentTime"]
    assert found["status"].keys() == {"IPv4", "IPv6"}
    node.eligible = False
    status, _, body = await ask(node.health_port, "/healthz")
    assert (status, json.loads(body)["nodeEligible"]) == (503, False)
    status, _, body = await ask(node.health_port, "/livez")
    assert (status, "nodeEligible" in json.loads(body)) == (200, False)
    node.healthy = False
    assert (await ask(node.health_port, "/livez"))[0] == 503
    assert (await ask(node.health_port, "/metrics"))[0] == 404


async def test_requests_that_are_none(node: Node, quick: None) -> None:
    await until_open(node.health_port)
    for text in (b"\r\n\r\n", b"GET /healthz\r\n\r\n", b"\xff\xfe /healthz HTTP/1.1\r\n\r\n", b"GET / SMTP/1\r\n\r\n"):
        assert (await talk(node.health_port, text)).startswith(b"HTTP/1.1 400 ")
    endless = await talk(node.health_port, b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 3000)
    assert endless.startswith(b"HTTP/1.1 400 ") or endless == b""
    head = await talk(node.health_port, b"HEAD /healthz HTTP/1.1\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and head.endswith(b"\r\n\r\n")
    slow = b"".join(await asyncio.gather(*(talk(node.health_port, b"G") for _ in range(3)), return_exceptions=False))
    assert slow == b"", "who says nothing is left alone after a while"


async def test_connections_that_say_nothing_do_not_keep_others_out(node: Node) -> None:
    await until_open(node.health_port)
    silent = [await asyncio.open_connection("127.0.0.1", node.health_port) for _ in range(400)]
    try:
        begin = time.monotonic()
        for _ in range(20):
            assert (await ask(node.health_port, "/healthz"))[0] == 200
        assert time.monotonic() - begin < small_http.PATIENCE, "the silent ones had to go by themselves first"
        assert len(node.checks._own.open) <= small_http.MAX_CONNECTIONS
    finally:
        for _, writer in silent:
            writer.close()


async def test_many_questions_are_one_count(node: Node) -> None:
    node.serve()
    node.ready[WEB] = 1
    await until_open(node.port)
    node.counted = 0
    begin = time.monotonic()
    await asyncio.gather(*(ask(node.port) for _ in range(200)))
    assert node.counted <= 2 + (time.monotonic() - begin) / healthcheck.KEPT


def test_a_proxy_that_can_not_write_becomes_unhealthy_and_recovers() -> None:
    passes, waiting = 0, False
    freshness = Freshness(lambda: passes, lambda: waiting, lambda: True, late=0.3)
    assert freshness.healthy()
    waiting = True
    assert freshness.healthy(), "not late yet"
    time.sleep(0.35)
    assert not freshness.healthy()
    passes += 1
    assert freshness.healthy()
    time.sleep(0.35)
    waiting = False
    assert freshness.healthy()


def test_where_it_listens() -> None:
    assert healthcheck._addresses("0.0.0.0:10256") == (("0.0.0.0", 10256), ("::", 10256))
    assert healthcheck._addresses("[::]:1") == healthcheck._addresses(":1") == (("0.0.0.0", 1), ("::", 1))
    assert healthcheck._addresses("[fd00::1]:80") == (("fd00::1", 80),)
    assert healthcheck._addresses("") == ()
    assert small_http.listen_address("127.0.0.1:80") == ("127.0.0.1", 80)
    for text in ("80", "host:", "host:0", "host:65536", "host:x"):
        with pytest.raises(ConfigError, match="--healthz-listen"):
            parse(["--node-name", "n", "--healthz-listen", text], {})
