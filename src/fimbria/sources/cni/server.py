"""The agent's end of the CNI shim: `cni.sock`. The frame is described in `cni/shim/fimbria-cni.c`."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from fimbria.sources.cni.spec import COMMANDS, CniError, Code, Request, encode_error, parse, peek_version

log = logging.getLogger(__name__)
MAX_FRAME: Final = (1 << 20) + (64 << 10)
MAX_VARIABLES: Final = 64
READ_TIMEOUT: Final = 10.0
ACCEPT_PAUSE: Final = 0.1
_NS_GET_NSTYPE: Final = 0xB703  # ioctl_ns(2)
_CLONE_NEWNET: Final = 0x40000000
Handler = Callable[[Request], Awaitable[bytes]]


class FrameError(ValueError):
    """Bytes on the socket that are no request of the shim."""


def split_frame(frame: bytes) -> tuple[dict[str, str], bytes]:
    """Variables and stdin out of a request without its length word. Raises FrameError."""
    if len(frame) < 4:
        raise FrameError("frame too short")
    (count,) = struct.unpack_from("!I", frame)
    if count > MAX_VARIABLES:
        raise FrameError(f"{count} variables are too many")
    env: dict[str, str] = {}
    at = 4
    for _ in range(count):
        end = frame.find(b"\0", at)
        if end < 0:
            raise FrameError("variable without an end")
        key, equals, value = frame[at:end].partition(b"=")
        if not equals:
            raise FrameError("variable without '='")
        env[key.decode("ascii", "replace")] = value.decode("utf-8", "replace")
        at = end + 1
    return env, frame[at:]


def netns_problem(fd: int) -> str:
    """Why a descriptor is not the network namespace of a container, empty if it is one."""
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError:
        kind = 0
    if kind != _CLONE_NEWNET:
        return "is no network namespace"
    own = os.path.samestat(os.fstat(fd), Path("/proc/thread-self/ns/net").stat())
    return "is the node's own network namespace" if own else ""


class CniServer:
    """Listens on a socket that only root can open, and answers each request by calling `handler`.

    `handler` gets a validated request and returns what goes to stdout; it raises CniError for an error answer. The
    namespace's descriptor is closed when it returns.
    """

    def __init__(self, path: Path, handler: Handler) -> None:
        self._path = path
        self._handler = handler
        self.requests: dict[tuple[str, str], int] = {}
        self.seconds: dict[str, float] = {}

    async def run(self) -> None:
        """Serve until cancelled."""
        listener = self._listen()
        loop = asyncio.get_running_loop()
        pending: set[asyncio.Task[None]] = set()
        try:
            while True:
                try:
                    connection, _ = await loop.sock_accept(listener)
                except OSError as error:  # no descriptor is left, for one: those who wait are served when there is
                    log.error("CNI request can't be accepted: %s", error)
                    await asyncio.sleep(ACCEPT_PAUSE)
                    continue
                task = asyncio.create_task(self._serve(connection))
                pending.add(task)
                task.add_done_callback(pending.discard)
        finally:
            listener.close()
            for task in pending:
                task.cancel()

    def _listen(self) -> socket.socket:
        # Bound under another name and renamed, so that a shim never finds a socket nobody listens on.
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with suppress(FileNotFoundError):
            temporary.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        old = os.umask(0o177)
        try:
            listener.bind(str(temporary))
        finally:
            os.umask(old)
        listener.listen(512)
        temporary.rename(self._path)
        return listener

    async def _serve(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        netns_fd = -1
        try:
            frame, netns_fd = await asyncio.wait_for(_receive(connection), READ_TIMEOUT)
            status, answer = await self._answer(frame, netns_fd)
            await loop.sock_sendall(connection, struct.pack("!II", status, len(answer)) + answer)
        except (FrameError, TimeoutError, OSError) as error:
            log.warning("CNI request dropped: %s", error)
        finally:
            connection.close()
            if netns_fd >= 0:
                os.close(netns_fd)

    async def _answer(self, frame: bytes, netns_fd: int) -> tuple[int, bytes]:
        env, stdin = split_frame(frame)
        started = time.monotonic()
        command = env.get("CNI_COMMAND", "")
        command = command if command in COMMANDS else "unknown"
        try:
            answer = await self._handler(_checked(parse(env, stdin, netns_fd)))
        except CniError as error:
            log.warning("CNI %s of %s refused: %s", command, _who(env), error)
            self._count(command, str(int(error.code)), started)
            return 1, encode_error(error, peek_version(stdin))
        except Exception as error:
            log.exception("CNI %s of %s failed", command, _who(env))
            self._count(command, str(int(Code.INTERNAL)), started)
            return 1, encode_error(CniError(Code.INTERNAL, "internal error", str(error)), peek_version(stdin))
        self._count(command, "0", started)
        return 0, answer

    def _count(self, command: str, code: str, started: float) -> None:
        key = (command, code)
        self.requests[key] = self.requests.get(key, 0) + 1
        self.seconds[command] = self.seconds.get(command, 0.0) + time.monotonic() - started


def _who(env: dict[str, str]) -> str:
    return f"container {env.get('CNI_CONTAINERID', '')[:64]!r} interface {env.get('CNI_IFNAME', '')[:16]!r}"


def _checked(request: Request) -> Request:
    problem = netns_problem(request.netns_fd) if request.command in ("ADD", "CHECK") else ""
    if problem:
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_NETNS {request.netns[:256]} {problem}")
    return request


async def _receive(connection: socket.socket) -> tuple[bytes, int]:
    """One frame without its length word, and the descriptor that came along (-1: none)."""
    loop = asyncio.get_running_loop()
    received = bytearray()
    netns_fd = -1
    try:
        while True:
            data, fds = await _recv_with_fds(loop, connection)
            if fds:
                for extra in fds[1:] if netns_fd < 0 else fds:
                    os.close(extra)
                netns_fd = fds[0] if netns_fd < 0 else netns_fd
            if not data:
                raise FrameError("connection closed before the request was complete")
            received += data
            if len(received) >= 4:
                (length,) = struct.unpack_from("!I", received)
                if length > MAX_FRAME:
                    raise FrameError(f"request of {length} bytes is too long")
                if len(received) >= 4 + length:
                    return bytes(received[4 : 4 + length]), netns_fd
    except BaseException:
        if netns_fd >= 0:
            os.close(netns_fd)
        raise


async def _recv_with_fds(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> tuple[bytes, list[int]]:
    while True:
        try:
            data, fds, _, _ = socket.recv_fds(connection, 1 << 16, 4, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            await _readable(loop, connection)
        else:
            return data, fds


async def _readable(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> None:
    ready = asyncio.Event()
    fd = connection.fileno()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
