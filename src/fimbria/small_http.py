"""A server for questions that anybody may ask: one request a connection, everything bounded.

At most MAX_CONNECTIONS are open at a time, over all ports of a server; the one that has been open longest makes room
for a new one. A request is a line and headers (RFC 9112) of at most MAX_HEAD bytes that arrive within PATIENCE seconds.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

log = logging.getLogger(__name__)
MAX_CONNECTIONS: Final = 256
MAX_HEAD: Final = 8192
PATIENCE: Final = 5.0
BACKLOG: Final = 128


@dataclass(frozen=True, slots=True)
class Reply:
    """What is answered."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


Answer = Callable[[str, int, str], Reply]


class SmallServer:
    """Asks `answer(local address, local port, path)` for every request, whatever its method. Any number of ports."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.open: dict[_Exchange, None] = {}
        self._servers: dict[tuple[str, int], asyncio.Server] = {}

    @property
    def listening(self) -> frozenset[tuple[str, int]]:
        """Addresses and ports."""
        return frozenset(self._servers)

    async def listen(self, host: str, port: int) -> None:
        """Open a port of an address (IPv6's means IPv6 only); nothing happens if it is open. Raises OSError."""
        if (host, port) in self._servers:
            return
        sock = _bound(host, port)
        try:
            loop = asyncio.get_running_loop()
            self._servers[host, port] = await loop.create_server(lambda: _Exchange(self), sock=sock, backlog=BACKLOG)
        except BaseException:
            sock.close()
            raise

    def close(self, host: str, port: int) -> None:
        """Close a port and its connections."""
        server = self._servers.pop((host, port), None)
        if server is not None:
            server.close()
        for exchange in [e for e in self.open if e.port == port]:
            exchange.abort()

    def close_all(self) -> None:
        """Close everything."""
        for host, port in list(self._servers):
            self.close(host, port)


def listen_address(text: str) -> tuple[str, int] | None:
    """Host (without brackets) and port of HOST:PORT; None for an empty text. Raises ValueError."""
    if not text:
        return None
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r}: expected HOST:PORT")
    return host.strip("[]"), int(port)


def _bound(host: str, port: int) -> socket.socket:
    v6 = ":" in host
    sock = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock


class _Exchange(asyncio.Protocol):
    """One request and its answer."""

    def __init__(self, server: SmallServer) -> None:
        self._server = server
        self._head = bytearray()
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self.host, self.port = "", 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.host, self.port = transport.get_extra_info("sockname")[:2]
        while len(self._server.open) >= MAX_CONNECTIONS:
            next(iter(self._server.open)).abort()
        self._server.open[self] = None
        self._deadline = asyncio.get_running_loop().call_later(PATIENCE, self.abort)

    def connection_lost(self, _error: Exception | None) -> None:
        self._forget()

    def abort(self) -> None:
        """End the connection without another word."""
        self._forget()
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self._head += data[: MAX_HEAD + 1]
        end = self._head.find(b"\r\n\r\n")
        if end < 0 and len(self._head) <= MAX_HEAD:
            return
        self._reply(bytes(self._head[:end]) if 0 <= end <= MAX_HEAD else b"")

    def _reply(self, head: bytes) -> None:
        assert self._transport is not None
        method, path = _request(head)
        if not method:
            reply = Reply(400, b"400 Bad Request", {"Content-Type": "text/plain; charset=utf-8"})
        else:
            try:
                reply = self._server.answer(self.host, self.port, path)
            except Exception:
                log.exception("a question on port %d", self.port)
                reply = Reply(500, b"")
        self._transport.write(_encode(reply, with_body=method != "HEAD"))
        self._transport.close()

    def _forget(self) -> None:
        self._server.open.pop(self, None)
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _request(head: bytes) -> tuple[str, str]:
    """Method and path without the query; two empty texts if it is no request."""
    parts = head.split(b"\r\n", 1)[0].split(b" ")
    if len(parts) != 3 or not parts[0].isalpha() or not parts[2].startswith(b"HTTP/1."):
        return "", ""
    return parts[0].decode(), parts[1].partition(b"?")[0].decode("ascii", "replace")


def _encode(reply: Reply, *, with_body: bool) -> bytes:
    lines = [f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in reply.headers.items()]
    lines += [f"Content-Length: {len(reply.body)}", "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + (reply.body if with_body else b"")
