"""A small client of any API server: requests, and caches kept by list and watch."""

from __future__ import annotations

import asyncio
import base64
import logging
import random
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import yaml

from fimbria.lab.apiserver.controllers.actions import Obj

log = logging.getLogger(__name__)
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
PAGE = 500
WATCH_SECONDS = 300
MAX_LINE = 16 * 1024 * 1024
Changed = Callable[[Obj | None, Obj | None], None]


class ApiProblem(Exception):
    """An answer that isn't a success; ``code`` is the HTTP status."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


class Gone(Exception):
    """The watch's version is too old: list again."""


class Client:
    """Requests with a kubeconfig's current context. Use as an async context manager."""

    def __init__(self, kubeconfig: Path):
        config = yaml.safe_load(kubeconfig.read_text())
        context = _named(config, "contexts", config["current-context"])["context"]
        cluster = _named(config, "clusters", context["cluster"])["cluster"]
        user = _named(config, "users", context["user"])["user"]
        self.server: str = cluster["server"].rstrip("/")
        self._ssl = _ssl_context(cluster, user) if self.server.startswith("https") else None
        self._tls_name: str | None = cluster.get("tls-server-name")
        self._headers = {"User-Agent": "fimbria-lab-controllers", "Accept": "application/json"}
        if token := user.get("token"):
            self._headers["Authorization"] = f"Bearer {token}"

    async def __aenter__(self) -> Client:
        connector = aiohttp.TCPConnector(ssl=self._ssl or True, limit=0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=timeout,
                                              read_bufsize=1 << 20)  # fmt: skip
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def request(
        self, method: str, path: str, body: Any = None, kind: str = "application/json", accept: str = "application/json"
    ) -> Obj:
        """One request; raises ApiProblem for an answer that isn't a success."""
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": kind, "Accept": accept}
        timeout = aiohttp.ClientTimeout(total=30)
        async with self._session.request(method, self.server + path, data=data, headers=headers, timeout=timeout,
                                         server_hostname=self._tls_name) as answer:  # fmt: skip
            raw = await answer.read()
            if answer.status >= 300:
                raise ApiProblem(answer.status, raw[:500].decode(errors="replace"))
            found: Obj = msgspec.json.decode(raw)
            return found

    async def watch(self, path: str, rv: str, accept: str, seen: Callable[[str, Obj], None]) -> None:
        """Follows one watch until the server ends it. Raises Gone, ApiProblem or a connection error."""
        query = f"?watch=1&allowWatchBookmarks=true&resourceVersion={rv}&timeoutSeconds={WATCH_SECONDS}"
        timeout = aiohttp.ClientTimeout(total=None, sock_read=WATCH_SECONDS + 30)
        async with self._session.get(self.server + path + query, headers={"Accept": accept}, timeout=timeout,
                                     server_hostname=self._tls_name) as answer:  # fmt: skip
            if answer.status == 410:
                raise Gone
            if answer.status != 200:
                raise ApiProblem(answer.status, (await answer.read())[:500].decode(errors="replace"))
            pending = b""
            async for chunk in answer.content.iter_any():
                *lines, pending = (pending + chunk).split(b"\n")
                if len(pending) > MAX_LINE:
                    raise ApiProblem(500, f"a watch line of {path} is larger than {MAX_LINE} bytes")
                for line in lines:
                    event = msgspec.json.decode(line)
                    if event["type"] == "ERROR":
                        if event["object"].get("code") == 410:
                            raise Gone
                        raise ApiProblem(event["object"].get("code", 500), event["object"].get("message", ""))
                    seen(event["type"], event["object"])


def _named(config: Obj, section: str, name: str) -> Obj:
    found: Obj = next(one for one in config[section] if one["name"] == name)
    return found


def _ssl_context(cluster: Obj, user: Obj) -> ssl.SSLContext:
    data = cluster.get("certificate-authority-data")
    context = ssl.create_default_context(
        cafile=cluster.get("certificate-authority"), cadata=base64.b64decode(data).decode() if data else None
    )
    if cluster.get("insecure-skip-tls-verify"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if certificate := user.get("client-certificate-data"):
        # ssl loads client certificates from files only
        with tempfile.NamedTemporaryFile() as file:
            file.write(base64.b64decode(certificate) + b"\n" + base64.b64decode(user["client-key-data"]))
            file.flush()
            context.load_cert_chain(file.name)
    elif path := user.get("client-certificate"):
        context.load_cert_chain(path, user["client-key"])
    return context


def version(obj: Obj) -> int:
    return int(obj["metadata"]["resourceVersion"])


class Cache:
    """The objects of one collection, kept by list and watch; told of our own writes too, so as never to lag them."""

    def __init__(self, client: Client, path: str, changed: Changed, metadata_only: bool = False):
        self.path, self.synced = path, asyncio.Event()
        self.namespaces: dict[str, dict[str, Obj]] = {}
        self._client, self._changed = client, changed
        self._list_accept = f"{METADATA_LIST},application/json" if metadata_only else "application/json"
        self._watch_accept = f"{METADATA},application/json" if metadata_only else "application/json"
        self._buried: set[str] = set()

    def all(self) -> list[Obj]:
        return [obj for inner in self.namespaces.values() for obj in inner.values()]

    def get(self, namespace: str, name: str) -> Obj | None:
        return self.namespaces.get(namespace, {}).get(name)

    def apply(self, obj: Obj) -> None:
        """Takes over an object unless a newer state of it is known."""
        meta = obj["metadata"]
        inner = self.namespaces.setdefault(meta.get("namespace", ""), {})
        old = inner.get(meta["name"])
        if meta["uid"] in self._buried or (old and version(old) >= version(obj)):
            return
        inner[meta["name"]] = obj
        self._changed(old, obj)

    def remove(self, obj: Obj, final: bool) -> None:
        """Forgets an object; ``final`` is the watch's word, otherwise late events of it are ignored until then."""
        meta = obj["metadata"]
        if final:
            self._buried.discard(meta["uid"])
        else:
            self._buried.add(meta["uid"])
        inner = self.namespaces.get(meta.get("namespace", ""), {})
        old = inner.get(meta["name"])
        if old and old["metadata"]["uid"] == meta["uid"]:
            del inner[meta["name"]]
            self._changed(old, None)

    async def run(self) -> None:
        """Lists and watches for ever; a collection that is gone (404) ends it."""
        delay = 0.1
        while True:
            try:
                rv = await self._list()
                self.synced.set()
                delay = 0.1
                while True:
                    rv = await self._follow(rv)
            except Gone:
                continue
            except (ApiProblem, aiohttp.ClientError, TimeoutError, OSError) as error:
                if isinstance(error, ApiProblem) and error.code == 404:
                    for obj in self.all():
                        self.remove(obj, final=True)
                    self.synced.set()
                    return
                log.warning("%s: %s; trying again in %.1f s", self.path, error or type(error).__name__, delay)
                await asyncio.sleep(delay * random.uniform(0.5, 1.5))  # noqa: S311 - spreads reconnections
                delay = min(delay * 2, 5)

    async def _follow(self, start: str) -> str:
        newest = start

        def seen(kind: str, obj: Obj) -> None:
            nonlocal newest
            newest = obj["metadata"]["resourceVersion"]
            if kind == "DELETED":
                self.remove(obj, final=True)
            elif kind != "BOOKMARK":
                self.apply(obj)

        await self._client.watch(self.path, start, self._watch_accept, seen)
        return newest

    async def _list(self) -> str:
        found: list[Obj] = []
        token, rv = "", ""
        while True:
            query = f"?limit={PAGE}" + (f"&continue={token}" if token else "")
            try:
                page = await self._client.request("GET", self.path + query, accept=self._list_accept)
            except ApiProblem as problem:
                if problem.code == 410:
                    raise Gone from None
                raise
            items = page.get("items") or []
            head = _item_head(page)
            found += [head | item for item in items]
            token, rv = page["metadata"].get("continue", ""), page["metadata"]["resourceVersion"]
            if not token:
                break
        self._buried.clear()
        present = {obj["metadata"]["uid"] for obj in found}
        for obj in self.all():
            if obj["metadata"]["uid"] not in present:
                self.remove(obj, final=True)
        for obj in found:
            self.apply(obj)
        return str(rv)


def _item_head(page: Obj) -> Obj:
    """Items of a typed list don't repeat their kind and version."""
    return {"apiVersion": page["apiVersion"], "kind": page["kind"].removesuffix("List")}
