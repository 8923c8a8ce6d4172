"""Carries TCP connections from one network namespace into another: a socket stays in the namespace it was made in."""

import asyncio
import contextlib
import socket
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from fimbria.lab import kernel

CHUNK = 1 << 16


def listener(netns: Path | None, host: str, port: int) -> socket.socket:
    """A listening socket in `netns` (None: the caller's); port 0 takes a free one."""

    def make() -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)

    return make() if netns is None else kernel.in_netns(netns, make)


class Forwarder:
    """Accepts on `listening` and connects to `host`:`port` in `netns` (None: the caller's)."""

    def __init__(self, listening: socket.socket, netns: Path | None, host: str, port: int) -> None:
        self._listening, self._target = listening, (host, port)
        # One thread lives in the target's namespace and makes the sockets; the loop does everything else with them.
        self._threads = ThreadPoolExecutor(1, initializer=_enter, initargs=(netns,))

    async def run(self) -> None:
        """For ever."""
        server = await asyncio.start_server(self._serve, sock=self._listening)
        async with server:
            await server.serve_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(10):
                upstream_reader, upstream = await connect(self._threads, *self._target)
        except (OSError, TimeoutError):
            writer.transport.abort()
            return
        await asyncio.gather(_copy(reader, upstream), _copy(upstream_reader, writer))


async def connect(threads: Executor, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection from the namespace that the threads live in. Raises OSError."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = await loop.run_in_executor(threads, socket.socket, family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await loop.sock_connect(sock, (host, port))
        return await asyncio.open_connection(sock=sock)
    except BaseException:
        sock.close()
        raise


def _enter(netns: Path | None) -> None:
    if netns is not None:
        kernel.setns(netns, kernel.CLONE_NEWNET)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One direction, until its end; a break of one side breaks the other."""
    try:
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:
        with contextlib.suppress(OSError):
            writer.transport.abort()
