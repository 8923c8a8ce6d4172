"""The HTTP face: routes a request to discovery, the registry, a list or a watch, and shapes the answer."""

from __future__ import annotations

import asyncio
import hmac
import logging
import random
import socket
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from fimbria.lab.apiserver import discovery, errors, listing, openapi, patch, requests, watching
from fimbria.lab.apiserver.errors import ApiError
from fimbria.lab.apiserver.model import Entry, Key, Obj, Resource, encode
from fimbria.lab.apiserver.registry import Registry, Write, served_raw
from fimbria.lab.apiserver.requests import Target
from fimbria.lab.apiserver.scale import patch_scale, put_scale, scale_of
from fimbria.lab.apiserver.types import TYPES

log = logging.getLogger(__name__)
MAX_BODY = 3 * 1024 * 1024
OPEN_PATHS = ("/healthz", "/livez", "/readyz", "/version")
KUBERNETES = ("1", "36")
"""The Kubernetes version whose behaviour the server follows."""
Answer = tuple[int, Obj | bytes]


class Api:
    """One handler for every path. ``token`` is what clients over TCP must show; unix sockets go by their mode."""

    def __init__(self, registry: Registry, token: str):
        self.registry, self.store = registry, registry.store
        self._token = token
        self._watches: set[asyncio.Task[Any]] = set()

    def runner(self) -> web.AppRunner:
        """Ready to be set up and given sites. A client that goes away ends its watch at once."""
        return web.AppRunner(self._application(), access_log=None, shutdown_timeout=1.0, handler_cancellation=True)

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY)
        app.router.add_route("*", "/{path:.*}", self.handle)
        app.on_shutdown.append(self._end_watches)
        return app

    async def _end_watches(self, _: web.Application) -> None:
        for task in self._watches:
            task.cancel()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        try:
            self._authenticate(request)
            return await self._route(request)
        except ApiError as error:
            return _answer(error.code, error.status())
        except web.HTTPRequestEntityTooLarge:
            message = f"the request body is larger than {MAX_BODY} bytes"
            return _answer(413, ApiError(413, "RequestEntityTooLarge", message).status())
        except (ConnectionResetError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            message = "an internal error occurred; the server's log says more"
            return _answer(500, ApiError(500, "InternalError", message).status())

    def _authenticate(self, request: web.Request) -> None:
        if request.path in OPEN_PATHS or _is_unix(request):
            return
        given = request.headers.get("Authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
            raise ApiError(401, "Unauthorized", "Unauthorized")

    async def _route(self, request: web.Request) -> web.StreamResponse:
        target = requests.parse_path(request.path)
        if target is None:
            return self._document(request)
        res = self.registry.resource(target.group, target.version, target.plural)
        if target.namespace and not res.namespaced:
            raise errors.no_such_path()
        if target.sub and target.sub not in res.subresources:
            raise errors.no_such_path() if res.type_name else errors.not_found(res, target.name)
        if request.method in ("GET", "HEAD"):
            return await self._read(request, res, target)
        if res.namespaced and not target.namespace:
            raise errors.method_not_allowed()
        raw = await request.read()
        applies = request.headers.get("Content-Type", "").startswith(requests.APPLY_PATCH)
        write = requests.write_options(request.query, request.headers.get("User-Agent", ""), applies)
        code, body = self._write(request, res, target, raw, write)
        response = self._shaped(request, res, code, body)
        for warning in write.warnings:
            response.headers.add("Warning", f"299 - {encode(warning).decode()}")
        return response

    # ---- documents that aren't resources

    def _document(self, request: web.Request) -> web.Response:
        if request.method not in ("GET", "HEAD"):
            raise errors.no_such_path()
        path = request.path.rstrip("/")
        if path in ("/healthz", "/livez", "/readyz") or path.startswith(("/healthz/", "/livez/", "/readyz/")):
            return web.Response(text="ok")
        if path in ("/api", "/apis") and (shaped := self._aggregated(request, path == "/api")):
            return shaped
        body = self._plain_document(request, path)
        if body is None:
            raise errors.no_such_path()
        return _answer(200, body)

    def _plain_document(self, request: web.Request, path: str) -> Obj | None:
        parts = path.strip("/").split("/")
        match parts:
            case ["version"]:
                return version_info()
            case ["api"]:
                return discovery.api_versions(request.host)
            case ["api", version]:
                return discovery.resource_list(self.registry, "", version)
            case ["apis"]:
                return discovery.group_list(self.registry)
            case ["apis", group]:
                return discovery.group(self.registry, group)
            case ["apis", group, version]:
                return discovery.resource_list(self.registry, group, version)
            case ["openapi", "v2"]:
                return openapi.swagger()
            case ["openapi", "v3"]:
                return openapi.index(self.registry)
            case ["openapi", "v3", *rest]:
                return openapi.document(self.registry, "/".join(rest))
            case [""]:
                return {
                    "paths": [
                        "/api",
                        "/apis",
                        "/healthz",
                        "/livez",
                        "/openapi/v2",
                        "/openapi/v3",
                        "/readyz",
                        "/version",
                    ]
                }
        return None

    def _aggregated(self, request: web.Request, core: bool) -> web.Response | None:
        accept = request.headers.get("Accept", "").replace(" ", "")
        for clause in accept.split(","):
            words = set(clause.split(";"))
            for version in ("v2", "v2beta1"):
                if {"application/json", "g=apidiscovery.k8s.io", f"v={version}", "as=APIGroupDiscoveryList"} <= words:
                    body = discovery.aggregated(self.registry, core, version)
                    kind = discovery.AGGREGATED.format(version=version)
                    return web.Response(body=encode(body), headers={"Content-Type": kind})
            if words & {"application/json", "*/*"} and len(words) == 1:
                return None
        return None

    # ---- reading

    async def _read(self, request: web.Request, res: Resource, target: Target) -> web.StreamResponse:
        accept = requests.parse_accept(request.headers.get("Accept", ""))
        query, include = request.query, request.query.get("includeObject", "Metadata")
        if requests.flag(query, "watch"):
            return await self._watch(request, res, target, accept.transform, include)
        if not target.name:
            wanted = listing.predicate(res, target.namespace, "", query)
            page = listing.page(self.registry.shelf(res), self.store.rv, wanted, query)
            return _answer(200, listing.list_body(res, page, accept.transform, include))
        key = Key(target.namespace, target.name)
        entry = self.registry.entry(res, key)
        if target.sub == "scale":
            return _answer(200, scale_of(entry.object()))
        if target.sub not in ("", "status"):
            raise errors.method_not_allowed()
        return self._shaped(request, res, 200, entry)

    def _shaped(self, request: web.Request, res: Resource, code: int, body: Obj | bytes | Entry) -> web.Response:
        """One object as asked for: itself, a Table of one row, or its metadata."""
        transform = requests.parse_accept(request.headers.get("Accept", "")).transform
        if isinstance(body, Entry):
            if not transform:
                return _answer(code, served_raw(res, body))
            body = listing.parsed(res, body)
        if transform and isinstance(body, dict) and body.get("kind") == res.kind:
            include = request.query.get("includeObject", "Metadata")
            rv = {"resourceVersion": body["metadata"].get("resourceVersion", "")}
            body = listing.table(res, [body], rv, include) if transform == "Table" else listing.partial(body)
        return _answer(code, body)

    async def _watch(
        self, request: web.Request, res: Resource, target: Target, transform: str, include: str
    ) -> web.StreamResponse:
        query = request.query
        watch = _parse_watch(res, target, query, transform, include)
        seconds = requests.number(query, "timeoutSeconds")
        timeout = float(seconds) if seconds else random.uniform(1800, 3600)  # noqa: S311 - spreads reconnections
        response = web.StreamResponse(
            headers={"Content-Type": "application/json", "Cache-Control": "no-cache, private"}
        )
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            await watching.run(watch, self.store, self.registry.shelf(res), timeout, response.write)
            await response.write_eof()
        except (ConnectionResetError, BrokenPipeError):
            log.debug("the watcher of %s went away", res.qualified)
        finally:
            self._watches.discard(task)
        return response

    # ---- writing

    def _write(self, request: web.Request, res: Resource, target: Target, raw: bytes, write: Write) -> Answer:
        """Synchronous on purpose: no other request comes between the read and the write of an object."""
        kind = request.headers.get("Content-Type", "")
        method = request.method
        if method == "POST" and (not target.name or target.sub == "binding"):
            return self._post(res, target, _object(requests.parse_body(raw, kind)), write)
        if method == "PUT" and target.name and target.sub != "binding":
            body = _object(requests.parse_body(raw, kind))
            if target.sub == "scale":
                return 200, put_scale(self.registry, res, target, body, write)
            found, created = self.registry.update(res, Key(target.namespace, target.name), body, target.sub, write)
            return (201 if created else 200), found
        if method == "PATCH" and target.name and target.sub not in ("binding", "finalize"):
            return self._patch(res, target, kind.partition(";")[0].strip(), requests.parse_body(raw, kind), write)
        if method == "DELETE" and not target.sub:
            return self._delete(request.query, res, target, requests.parse_body(raw, kind))
        raise errors.method_not_allowed()

    def _post(self, res: Resource, target: Target, body: Obj, write: Write) -> Answer:
        if target.sub == "binding":
            return 201, self.registry.bind(res, Key(target.namespace, target.name), body, write)
        return 201, self.registry.create(res, target.namespace, body, write)

    def _patch(self, res: Resource, target: Target, kind: str, body: Any, write: Write) -> Answer:
        if target.sub == "scale":
            return 200, patch_scale(self.registry, res, target, body, kind=kind, write=write)
        if kind == requests.APPLY_PATCH:
            found, created = self.registry.apply(
                res, Key(target.namespace, target.name), _object(body), target.sub, write
            )
            return (201 if created else 200), found
        change = _patcher(res, kind, body)
        return 200, self.registry.modify(res, Key(target.namespace, target.name), change, target.sub, write)

    def _delete(self, query: Mapping[str, str], res: Resource, target: Target, body: Any) -> Answer:
        options = requests.deletion(query, body)
        if target.name:
            obj, gone = self.registry.delete(res, Key(target.namespace, target.name), options)
            return 200, obj if not gone or res.strategy.returns_deleted else _deleted(res, obj)
        wanted = listing.predicate(res, target.namespace, "", query)
        page = listing.page(self.registry.shelf(res), self.store.rv, wanted, {})
        bodies = [served_raw(res, entry) for entry in page.entries]
        for entry in page.entries:
            meta = entry.object()["metadata"]
            self.registry.delete(res, Key(meta.get("namespace", ""), meta["name"]), options)
        meta = {"resourceVersion": str(self.store.rv)}
        head = encode({"kind": res.list_kind, "apiVersion": res.api_version, "metadata": meta})
        return 200, head[:-1] + b',"items":[' + b",".join(bodies) + b"]}"


def _patcher(res: Resource, kind: str, body: Any) -> Callable[[Obj], Obj]:
    """How a patch of this content type changes an object. The result raises ApiError 400 or 422."""
    accepted = [requests.JSON_PATCH, requests.MERGE_PATCH, requests.APPLY_PATCH]
    if res.type_name:
        accepted.append(requests.STRATEGIC_PATCH)
    if kind not in accepted:
        message = "the body of the request was in an unknown format - accepted media types include: "
        raise errors.unsupported_media(message + ", ".join(accepted))

    def change(obj: Obj) -> Obj:
        try:
            if kind == requests.JSON_PATCH:
                changed = patch.json_patch(obj, body)
            elif kind == requests.MERGE_PATCH:
                changed = patch.merge_patch(obj, _object(body))
            else:
                changed = patch.strategic_patch(obj, _object(body), TYPES[res.type_name])
        except patch.PatchError as error:
            if error.malformed and kind != requests.JSON_PATCH:
                raise errors.bad_request(str(error)) from None
            message = f"the server rejected our request due to an error in our request: {error}"
            raise ApiError(422, "Invalid", message) from None
        return _object(changed)

    return change


def _parse_watch(
    res: Resource, target: Target, query: Mapping[str, str], transform: str, include: str
) -> watching.Watch:
    wanted = listing.predicate(res, target.namespace, target.name, query)
    initial = query.get("sendInitialEvents")
    match = query.get("resourceVersionMatch", "")
    start = listing.version(query)
    problems: list[errors.FieldError] = []
    if initial is None and match:
        problems.append(errors.forbidden_field("resourceVersionMatch", "resourceVersionMatch is forbidden for watch "
                                               "unless sendInitialEvents is provided"))  # fmt: skip
    if initial is not None and match != "NotOlderThan":
        problems.append(errors.forbidden_field("resourceVersionMatch", "sendInitialEvents requires setting "
                                               "resourceVersionMatch to NotOlderThan"))  # fmt: skip
    if problems:
        raise errors.invalid_options("ListOptions", problems[0])
    bookmarks = requests.flag(query, "allowWatchBookmarks")
    if initial is not None:
        wants = requests.flag(query, "sendInitialEvents")
        begin = None if wants else start or None
        return watching.Watch(res, wanted, transform, include, bookmarks, begin, wants and bookmarks)
    return watching.Watch(res, wanted, transform, include, bookmarks, start or None)


def _deleted(res: Resource, obj: Obj) -> Obj:
    details = {"name": obj["metadata"]["name"]} | ({"group": res.group} if res.group else {})
    details |= {"kind": res.plural, "uid": obj["metadata"]["uid"]}
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}


def _object(body: Any) -> Obj:
    if not isinstance(body, dict):
        raise errors.bad_request("the body must be an object")
    return body


def _answer(code: int, body: Obj | bytes) -> web.Response:
    raw = body if isinstance(body, bytes) else encode(body)
    return web.Response(status=code, body=raw, headers={"Content-Type": "application/json"})


def _is_unix(request: web.Request) -> bool:
    sock = request.transport.get_extra_info("socket") if request.transport else None
    return sock is not None and sock.family == socket.AF_UNIX


def version_info() -> Obj:
    major, minor = KUBERNETES
    return {
        "major": major,
        "minor": minor,
        "gitVersion": f"v{major}.{minor}.0+fimbria-lab",
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "none",
        "compiler": "CPython",
        "platform": "linux/amd64",
    }
