"""A typed client for the Kubernetes API over aiohttp.

It asks, decodes and raises; what to do about an error is the caller's decision, with two exceptions that are part of
the protocol: an answer that says "later" (429, or 503 with Retry-After) was not acted upon and is tried again, and a
refused token is read again from its file once.
"""

import asyncio
import random as _random
import socket
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from functools import cache
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar
from urllib.parse import urlencode
from weakref import WeakSet

import aiohttp
import msgspec
from yarl import URL

from fimbria.release import RELEASE
from fimbria.sources.k8s.config import ClusterConfig
from fimbria.sources.k8s.errors import ApiError, BadAnswer, NotFound, TooMany, Unauthorized, Unavailable, from_answer
from fimbria.sources.k8s.pacing import Backoff, TokenBucket
from fimbria.sources.k8s.resources import Resource
from fimbria.sources.k8s.types.meta import ApiObject, ObjectList

T = TypeVar("T", bound=ApiObject)
D = TypeVar("D")
PatchKind = Literal["merge", "json", "strategic", "apply"]
Propagation = Literal["Background", "Foreground", "Orphan"]
Params = Mapping[str, str | int | bool | None]

_PATCH_TYPES: dict[PatchKind, str] = {
    "merge": "application/merge-patch+json",
    "json": "application/json-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "apply": "application/apply-patch+yaml",  # JSON is YAML
}
_MAX_RETRY_AFTER = 60.0
_STREAM_BUFFER = 256 << 10
_CLOCKS = dict.fromkeys((9, 10), " (or this node's clock is wrong)")  # OpenSSL's codes: not yet valid, expired


class Listed(msgspec.Struct, Generic[T], frozen=True):
    """All pages of a list, as of `resource_version`."""

    items: tuple[T, ...]
    resource_version: str


@cache
def _decoder(type_: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(type_)


def user_agent(component: str) -> str:
    return f"fimbria-{component}/{RELEASE}"


class ApiClient:
    """One connection pool to one API server; use as `async with ApiClient(config, component="agent") as client`.

    `rate` requests per second with `burst` at once, over all callers; `timeout` in seconds for one attempt (watches
    have their own); `retries` of answers that say "later". Every method raises ApiError, whose text names the object.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        component: str,
        rate: float = 50.0,
        burst: int = 100,
        timeout: float = 30.0,
        retries: int = 5,
        connections: int = 64,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = _random.random,
    ) -> None:
        self.config = config
        self.component = component
        self._bucket = TokenBucket(rate, burst)
        # `connect` would also bound the wait for a free connection, which says nothing about the server.
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=min(timeout, 10.0))
        self._retries = retries
        self._connections = connections
        self._clock = clock
        self._sleep = sleep
        self._random = random
        self._agent = user_agent(component)
        self._session: aiohttp.ClientSession | None = None
        self.guard: Callable[[str], None] | None = None
        """Asked right before anything is written, with what it is; raises if it must not be."""
        self._sockets: WeakSet[socket.socket] = WeakSet()

    async def __aenter__(self) -> Self:
        self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def reconnect(self) -> None:
        """Break all connections, for example because the address that they were made from is gone: TCP would take a
        minute to notice that nobody answers. What is under way raises Unavailable, what follows connects anew.
        """
        for made in tuple(self._sockets):
            with suppress(OSError):  # it has ended by itself
                made.shutdown(socket.SHUT_RDWR)

    def _socket(self, info: Any) -> socket.socket:
        made = _socket(info)
        self._sockets.add(made)
        return made

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(
                limit=self._connections, keepalive_timeout=60.0, socket_factory=self._socket
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                headers={"User-Agent": self._agent, "Accept": "application/json"},
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=_STREAM_BUFFER,
            )
        return self._session

    # --- reading -----------------------------------------------------------------------------------------------

    async def get(self, resource: Resource[T], name: str, namespace: str = "") -> T:
        what = f"get {resource.describe(namespace, name)}"
        return self._decode(what, await self._call("GET", what, resource.path(namespace, name)), resource.type)

    async def list(
        self, resource: Resource[T], namespace: str = "", *, labels: str = "", fields: str = "", limit: int = 500
    ) -> Listed[T]:
        """All objects, page by page. `labels` and `fields` are selectors in the API's syntax.

        Raises Gone when the list changed too much between two pages: start again.
        """
        what = f"list {resource.describe(namespace)}"
        items: Sequence[T] = []
        token = ""
        while True:
            data = await self.list_page(resource, namespace, labels=labels, fields=fields, limit=limit, token=token)
            page: ObjectList[T] = self._decode(what, data, ObjectList[resource.type])  # type: ignore[name-defined]
            items = [*items, *(page.items or ())]
            token = page.metadata.continue_
            if not token:
                return Listed(tuple(items), page.metadata.resource_version)

    async def list_page(
        self,
        resource: Resource[T],
        namespace: str = "",
        *,
        labels: str = "",
        fields: str = "",
        limit: int = 500,
        token: str = "",
    ) -> bytes:
        """One undecoded page of a list; `limit` 0 asks for everything at once, `token` continues a list."""
        params: Params = {
            "labelSelector": labels,
            "fieldSelector": fields,
            "limit": limit or None,
            "continue": token,
        }
        what = f"list {resource.describe(namespace)}"
        # The first page waits its turn; the next ones follow each other anyway, and starting up is made of them.
        return await self._call("GET", what, resource.path(namespace), params=params, paced=not token)

    @asynccontextmanager
    async def watch(
        self,
        resource: Resource[T],
        namespace: str = "",
        *,
        resource_version: str,
        labels: str = "",
        fields: str = "",
        seconds: int = 300,
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The undecoded bytes of a watch from `resource_version` on: JSON events, one a line, cut anywhere.

        Bookmarks are asked for. The server ends the stream after `seconds`; should it not, the client does 30 s later.
        Raises ApiError on opening; while reading, Unavailable when the connection breaks.
        """
        what = f"watch {resource.describe(namespace)}"
        params: Params = {
            "watch": True,
            "allowWatchBookmarks": True,
            "resourceVersion": resource_version,
            "timeoutSeconds": seconds,
            "labelSelector": labels,
            "fieldSelector": fields,
        }
        await self._take_turn()
        # Connecting and the answer's first line are bounded by `sock_connect` and a timeout of our own; after that
        # silence is normal, and TCP keep-alive notices a dead peer.
        timeout = aiohttp.ClientTimeout(total=seconds + 30.0, sock_connect=10.0)
        try:
            request = self._open().get(
                self._url(resource.path(namespace), params),
                headers=self._authorization(),
                timeout=timeout,
                ssl=self._tls(),
                server_hostname=self.config.tls_server_name or None,
                allow_redirects=False,
            )
            async with asyncio.timeout(self._timeout.total):
                response = await request
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._unreachable(what, error) from error
        try:
            if response.status != 200:
                raise await self._refusal(what, response)
            chunks = _chunks(what, response)
            async with aclosing(chunks):
                yield chunks
        finally:
            response.close()

    # --- writing -----------------------------------------------------------------------------------------------

    async def create(self, resource: Resource[T], obj: T | Mapping[str, Any], namespace: str = "") -> T:
        """Raises AlreadyExists, Invalid, ... Returns the object as stored."""
        name = obj.metadata.name if isinstance(obj, ApiObject) else str(obj.get("metadata", {}).get("name", ""))
        what = f"create {resource.describe(namespace, name or '(generated)')}"
        return self._decode(
            what, await self._call("POST", what, resource.path(namespace), body=_body(resource, obj)), resource.type
        )

    async def replace(
        self, resource: Resource[T], name: str, obj: T | Mapping[str, Any], namespace: str = "", subresource: str = ""
    ) -> T:
        """Replace the whole object: only for objects that nobody else writes, since a struct names a subset.

        With a `metadata.resourceVersion` it is refused with Conflict if the object changed since.
        """
        what = f"replace {resource.describe(namespace, name)}"
        path = resource.path(namespace, name, subresource)
        return self._decode(what, await self._call("PUT", what, path, body=_body(resource, obj)), resource.type)

    async def patch(
        self,
        resource: Resource[T],
        name: str,
        patch: Any,
        namespace: str = "",
        *,
        kind: PatchKind = "merge",
        subresource: str = "",
        force: bool = False,
    ) -> T:
        """Change part of an object. `patch` is JSON-shaped; for kind "apply" a whole object as we want it, owned by
        the field manager `fimbria-COMPONENT` (`force` takes over fields from other managers).
        """
        what = f"patch {resource.describe(namespace, name)}{' ' + subresource if subresource else ''}"
        params: dict[str, str | int | bool | None] = {"fieldManager": f"fimbria-{self.component}"}
        if kind == "apply":
            params["force"] = force
            patch = {"apiVersion": resource.api_version, "kind": resource.kind, **patch}
        path = resource.path(namespace, name, subresource)
        data = await self._call(
            "PATCH", what, path, params=params, body=msgspec.json.encode(patch), content_type=_PATCH_TYPES[kind]
        )
        return self._decode(what, data, resource.type)

    async def patch_status(
        self, resource: Resource[T], name: str, status: Any, namespace: str = "", *, kind: PatchKind = "merge"
    ) -> T:
        """Patch the status subresource: `status` is what stands under that key."""
        return await self.patch(resource, name, {"status": status}, namespace, kind=kind, subresource="status")

    async def delete(
        self,
        resource: Resource[T],
        name: str,
        namespace: str = "",
        *,
        uid: str = "",
        resource_version: str = "",
        propagation: Propagation | None = None,
        grace_seconds: int | None = None,
        missing_ok: bool = False,
    ) -> None:
        """Delete an object, only if `uid` and `resource_version` still match when they are given (else Conflict)."""
        what = f"delete {resource.describe(namespace, name)}"
        preconditions = {k: v for k, v in (("uid", uid), ("resourceVersion", resource_version)) if v}
        options: dict[str, Any] = {"apiVersion": "v1", "kind": "DeleteOptions"}
        if preconditions:
            options["preconditions"] = preconditions
        if propagation is not None:
            options["propagationPolicy"] = propagation
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        try:
            await self._call("DELETE", what, resource.path(namespace, name), body=msgspec.json.encode(options))
        except NotFound:
            if not missing_ok:
                raise

    # --- one request -------------------------------------------------------------------------------------------

    async def _call(
        self,
        method: str,
        what: str,
        path: str,
        *,
        params: Params | None = None,
        body: bytes | None = None,
        content_type: str = "application/json",
        paced: bool = True,
    ) -> bytes:
        backoff = Backoff(0.5, 10.0, self._random)
        token_renewed = False
        while True:
            if paced or backoff.attempts:
                await self._take_turn()
            try:
                return await self._attempt(method, what, self._url(path, params or {}), body, content_type)
            except Unauthorized:
                if token_renewed or self.config.token is None:
                    raise
                token_renewed = True
            except ApiError as error:
                later = isinstance(error, TooMany) or (error.status == 503 and error.retry_after is not None)
                delay = backoff.next()
                if error.retry_after is not None:
                    delay = error.retry_after + self._random()
                if not later or backoff.attempts > self._retries or delay > _MAX_RETRY_AFTER:
                    raise
                await self._sleep(delay)

    async def _attempt(self, method: str, what: str, url: URL, body: bytes | None, content_type: str) -> bytes:
        headers = self._authorization()
        if self.guard is not None and method != "GET":
            self.guard(what)
        if body is not None:
            headers["Content-Type"] = content_type
        try:
            async with self._open().request(
                method,
                url,
                data=body,
                headers=headers,
                timeout=self._timeout,
                ssl=self._tls(),
                server_hostname=self.config.tls_server_name or None,
                allow_redirects=False,
            ) as response:
                if response.status >= 300:
                    raise await self._refusal(what, response)
                return await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._unreachable(what, error) from error

    async def _refusal(self, what: str, response: aiohttp.ClientResponse) -> ApiError:
        try:
            body = await asyncio.wait_for(response.content.read(_STREAM_BUFFER), 10.0)
        except (aiohttp.ClientError, OSError, TimeoutError):
            body = b""
        if response.status == 401:
            for renewed in (self.config.token, self.config.trust):
                if renewed is not None:
                    renewed.expire()
        return from_answer(what, response.status, body, response.headers.get("Retry-After", ""))

    async def _take_turn(self) -> None:
        wait = self._bucket.reserve(self._clock())
        if wait > 0:
            await self._sleep(wait)

    def _tls(self) -> ssl.SSLContext | bool:
        trust = self.config.trust
        return (trust.get() if trust is not None else self.config.tls) or True

    def _unreachable(self, what: str, error: BaseException) -> Unavailable:
        if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError) and self.config.trust is not None:
            self.config.trust.expire()
        return Unavailable(what, 0, text=_say(error))

    def _authorization(self) -> dict[str, str]:
        token = self.config.token.get() if self.config.token else ""
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _url(self, path: str, params: Params) -> URL:
        text = {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in params.items() if v not in ("", None)}
        return URL(f"{self.config.server}{path}{'?' + urlencode(text) if text else ''}", encoded=True)

    def _decode(self, what: str, data: bytes, type_: type[D]) -> D:
        try:
            shape: Any = type_  # a cache wants hashable arguments, which mypy doubts of a generic type
            answer: D = _decoder(shape).decode(data)
            return answer
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise BadAnswer(what, 200, text=f"the answer doesn't decode: {error}") from None


async def _chunks(what: str, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    try:
        async for chunk in response.content.iter_any():
            yield chunk
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise Unavailable(what, 0, text=_say(error)) from error


def _socket(info: Any) -> socket.socket:
    """A socket whose dead peer is noticed after about a minute, also on a watch that is silent for hours."""
    family, kind, protocol, _, _ = info
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return made


def _body(resource: Resource[T], obj: T | Mapping[str, Any]) -> bytes:
    if isinstance(obj, ApiObject):
        return msgspec.json.encode(msgspec.structs.replace(obj, api_version=resource.api_version, kind=resource.kind))
    return msgspec.json.encode({"apiVersion": resource.api_version, "kind": resource.kind, **obj})


def _say(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the connection broke off in the middle"
    certificate = getattr(error, "certificate_error", None) or error
    if isinstance(certificate, ssl.SSLCertVerificationError):
        hint = _CLOCKS.get(certificate.verify_code, "")
        return f"the server's certificate isn't accepted: {certificate.verify_message}{hint}"
    return str(error) or type(error).__name__
