"""Commands in containers and their logs: through the API server, which asks the kubelet of the pod's node.

A command is a WebSocket of the subprotocol `v5.channel.k8s.io`
(https://kubernetes.io/docs/reference/using-api/api-concepts/ and KEP-4006). Each message is binary and begins with a
byte that names its channel: 0 standard input, 1 standard output, 2 standard error, 3 how it ended (a metav1.Status as
JSON), 4 the terminal's size, 255 the end of the channel that the next byte names.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote, urlencode

import aiohttp
import msgspec
from yarl import URL

from fimbria.release import RELEASE
from fimbria.sources.k8s.config import ClusterConfig
from fimbria.sources.k8s.errors import ApiError, Unavailable, from_answer
from fimbria.sources.k8s.types.meta import Status

SUBPROTOCOL: Final = "v5.channel.k8s.io"
MAX_MESSAGE: Final = 4 << 20  # bytes; kubelet sends at most 32 KiB at a time
MAX_STATUS: Final = 64 << 10
_CHUNK: Final = 64 << 10
_CONNECT: Final = 10.0  # seconds
_PARTING: Final = 1.0
Sink = Callable[[bytes], object]


class Channel(IntEnum):
    """The first byte of a message."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    ERROR = 3
    RESIZE = 4
    CLOSE = 255


class ExecError(Exception):
    """The command couldn't be run, or nobody knows how it ended; one sentence that names the container."""


class TooMuch(Exception):
    """A sink that has had enough raises this: the command is left."""


@dataclass(frozen=True, slots=True)
class Container:
    """One of a pod."""

    namespace: str
    pod: str
    name: str

    def __str__(self) -> str:
        return f"container {self.name} of pod {self.namespace}/{self.pod}"


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that ended by itself."""

    code: int
    stdout: bytes
    stderr: bytes

    @property
    def said(self) -> str:
        """The last line that it wrote to standard error, or its exit code, for messages."""
        lines = self.stderr.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self.code}"


def split(message: bytes) -> tuple[Channel, bytes]:
    """Channel and content. Raises ValueError for one that isn't the protocol's."""
    if not message:
        raise ValueError("an empty message")
    try:
        return Channel(message[0]), message[1:]
    except ValueError:
        raise ValueError(f"a message on channel {message[0]}, which doesn't exist") from None


def exit_code(status: bytes) -> int:
    """The exit code in the Status on channel 3. Raises ValueError with the server's words if there is none."""
    if len(status) > MAX_STATUS:
        raise ValueError("the final status is too long")
    try:
        ended = msgspec.json.decode(status, type=Status)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise ValueError(f"the final status can't be understood: {status[:200]!r}") from None
    if ended.status == "Success":
        return 0
    for cause in (ended.details.causes if ended.details else None) or ():
        if cause.reason == "ExitCode" and re.fullmatch(r"[0-9]{1,3}", cause.message):
            return int(cause.message)
    raise ValueError(ended.message or ended.reason or "it failed without saying why")


class PodAccess:
    """Use as `async with PodAccess(config, component="sysdump") as pods`. Raises ApiError as ApiClient does."""

    def __init__(self, config: ClusterConfig, *, component: str, connections: int = 32) -> None:
        self._config = config
        connector = aiohttp.TCPConnector(limit=connections, ssl=config.tls or True)
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers={"User-Agent": f"fimbria-{component}/{RELEASE}"},
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def capture(
        self, container: Container, argv: Sequence[str], *, patience: float, most: int = 16 << 20
    ) -> Finished:
        """Run a command to its end. Raises ExecError after `patience` seconds or more than `most` bytes of output."""
        out, err = Limited(most), Limited(_CHUNK, cut=True)
        try:
            async with asyncio.timeout(patience):
                code = await self.run(container, argv, out.write, err.write)
        except TimeoutError:
            raise ExecError(f"{_name(argv)} in {container} took longer than {patience:.0f} s") from None
        except TooMuch:
            raise ExecError(f"{_name(argv)} in {container} wrote more than {most >> 20} MiB") from None
        return Finished(code, bytes(out.data), bytes(err.data))

    async def run(
        self,
        container: Container,
        argv: Sequence[str],
        stdout: Sink,
        stderr: Sink,
        *,
        hold_stdin: bool = False,
    ) -> int:
        """Run a command, handing on what it writes as it comes; the exit code at its end. Raises ExecError.

        Kubernetes ends no command whose caller went away. With `hold_stdin` its standard input stays open as long as
        we are there, so that it can notice.
        """
        query = [("command", a) for a in argv] + [("container", container.name), ("stdout", "true"), ("stderr", "true")]
        query += [("stdin", "true")] if hold_stdin else []
        what = f"run {_name(argv)} in {container}"
        async with self._open(what, f"{_path(container)}/exec?{urlencode(query)}") as socket:
            try:
                return await self._until_its_end(socket, stdout, stderr)
            except ValueError as error:
                raise ExecError(f"{what}: {error}") from None
            except (aiohttp.ClientError, OSError) as error:
                raise ExecError(f"{what}: the connection broke: {error or type(error).__name__}") from None

    async def _until_its_end(self, socket: aiohttp.ClientWebSocketResponse, stdout: Sink, stderr: Sink) -> int:
        async for message in socket:
            if message.type is aiohttp.WSMsgType.ERROR:
                break
            if message.type is not aiohttp.WSMsgType.BINARY:
                raise ValueError(f"a message of type {message.type.name}; binary ones were agreed on")
            channel, content = split(message.data)
            if channel is Channel.STDOUT:
                stdout(content)
            elif channel is Channel.STDERR:
                stderr(content)
            elif channel is Channel.ERROR:
                return exit_code(content)
        reason = socket.exception()
        raise ValueError(f"the connection ended before the command did{f': {reason}' if reason else ''}")

    @asynccontextmanager
    async def _open(self, what: str, path: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        url = URL(self._config.server + path, encoded=True)
        try:
            socket = await self._session.ws_connect(
                url,
                protocols=(SUBPROTOCOL,),
                headers=self._authorization(),
                server_hostname=self._config.tls_server_name or None,
                heartbeat=30.0,
                max_msg_size=MAX_MESSAGE,
            )
        except aiohttp.WSServerHandshakeError as error:
            raise await self._refusal(what, url, error.status) from None
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(what, 0, text=str(error) or type(error).__name__) from None
        try:
            if socket.protocol != SUBPROTOCOL:
                raise ExecError(f"{what}: the API server doesn't speak {SUBPROTOCOL}; Kubernetes 1.30 and later do")
            yield socket
        finally:
            # Closing politely reads on until the other side agrees: one that goes on writing never would.
            with suppress(TimeoutError):
                async with asyncio.timeout(_PARTING):
                    await socket.close()

    async def _refusal(self, what: str, url: URL, status: int) -> ApiError:
        """Why a WebSocket was refused: the library drops the answer's body, a request without upgrade gets it again."""
        try:
            async with self._get(url, timeout=_CONNECT) as response:
                if response.status == status:
                    return from_answer(what, status, await response.content.read(_CHUNK))
        except (aiohttp.ClientError, OSError, TimeoutError):
            pass
        return from_answer(what, status, b"")

    async def logs(
        self,
        container: Container,
        sink: Sink,
        *,
        previous: bool = False,
        since_seconds: int | None = None,
        tail_lines: int | None = None,
    ) -> None:
        """Hand on a container's log, each line with its time; `previous`: of the one before its last restart."""
        wanted = {"container": container.name, "timestamps": "true", "previous": "true" if previous else None,
                  "sinceSeconds": since_seconds, "tailLines": tail_lines}  # fmt: skip
        query = urlencode({k: v for k, v in wanted.items() if v is not None})
        await self.fetch(f"log of {container}", f"{_path(container)}/log?{query}", sink)

    async def fetch(self, what: str, path: str, sink: Sink) -> None:
        """Hand on the body of GET `path`, piece by piece."""
        url = URL(self._config.server + path, encoded=True)
        try:
            async with self._get(url) as response:
                if response.status != 200:
                    raise from_answer(what, response.status, await response.content.read(_CHUNK))
                async for chunk in response.content.iter_chunked(_CHUNK):
                    sink(chunk)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unavailable(what, 0, text=str(error) or type(error).__name__) from None

    def _get(self, url: URL, timeout: float | None = None) -> aiohttp.client._RequestContextManager:
        return self._session.get(
            url,
            headers=self._authorization(),
            server_hostname=self._config.tls_server_name or None,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=_CONNECT),
        )

    def _authorization(self) -> dict[str, str]:
        token = self._config.token.get() if self._config.token else ""
        return {"Authorization": f"Bearer {token}"} if token else {}


class Limited:
    """A sink that keeps up to `most` bytes; what is more raises TooMuch, or is dropped if it may be `cut`."""

    def __init__(self, most: int, *, cut: bool = False) -> None:
        self.data = bytearray()
        self._most = most
        self._cut = cut

    def write(self, piece: bytes) -> None:
        """Raises TooMuch."""
        room = self._most - len(self.data)
        self.data += piece[:room]
        if len(piece) > room and not self._cut:
            raise TooMuch


def _path(container: Container) -> str:
    return f"/api/v1/namespaces/{quote(container.namespace, safe='')}/pods/{quote(container.pod, safe='')}"


def _name(argv: Sequence[str]) -> str:
    return " ".join(argv[:3])
