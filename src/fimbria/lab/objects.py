"""What `apply`, `delete` and `get` do with an API server, for any kind that the server knows."""

import asyncio
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import yarl

from fimbria.lab.errors import LabError
from fimbria.lab.manifests import Manifest, for_create, merge_patch, ordered
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import ApiError, NotFound

TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"


@dataclass(frozen=True)
class Kind:
    """A resource as discovery describes it."""

    group_version: str
    plural: str
    kind: str
    singular: str
    short: tuple[str, ...]
    namespaced: bool

    def path(self, namespace: str = "", name: str = "") -> str:
        parts = ["api" if "/" not in self.group_version else "apis", *self.group_version.split("/")]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts += [self.plural, *([name] if name else [])]
        return "/" + "/".join(quote(p, safe="") for p in parts)


class Objects(ApiClient):
    """A client for kinds that are only known at run time."""

    async def request(
        self, method: str, path: str, body: Any = None, content_type: str = "application/json", **params: str
    ) -> dict[str, Any]:
        """Raises ApiError."""
        data = None if body is None else json.dumps(body, default=str).encode()
        answer = await self._call(method, f"{method} {path}", path, params=params, body=data, content_type=content_type)
        value = json.loads(answer)
        if not isinstance(value, dict):
            raise LabError(f"{method} {path}: the answer is no object")
        return value

    async def kinds(self) -> list[Kind]:
        """Everything the server has, preferred versions only, subresources left out."""
        groups = (await self.request("GET", "/apis")).get("groups") or ()
        versions = ["v1", *(g["preferredVersion"]["groupVersion"] for g in groups)]
        answers = await asyncio.gather(
            *(self.request("GET", f"/{'api' if '/' not in v else 'apis'}/{v}") for v in versions)
        )
        return [
            _kind(v, r)
            for v, a in zip(versions, answers, strict=True)
            for r in a.get("resources") or ()
            if "/" not in r["name"]
        ]

    async def find(self, word: str) -> Kind:
        """By kind, plural, singular or short name, with or without .group. Raises LabError."""
        wanted = word.lower()
        known = await self.kinds()
        for k in known:
            names = {k.kind.lower(), k.plural, k.singular, *k.short, f"{k.plural}.{k.group_version.split('/')[0]}"}
            if wanted in names:
                return k
        raise LabError(f"the API server has no {word!r}; it has {', '.join(sorted(k.plural for k in known))}")

    async def kind_of(self, m: Manifest, patience: float = 5.0) -> Kind:
        """Waits a little for a definition that was created just now. Raises LabError."""
        deadline = time.monotonic() + patience
        while True:
            try:
                answer = await self.request("GET", f"/{'api' if '/' not in m.api_version else 'apis'}/{m.api_version}")
                for r in answer.get("resources") or ():
                    if r["kind"] == m.kind and "/" not in r["name"]:
                        return _kind(m.api_version, r)
            except NotFound:
                pass
            if time.monotonic() > deadline:
                raise LabError(f"{m.where}: the API server doesn't know {m.api_version} {m.kind}")
            await asyncio.sleep(0.1)

    async def apply(self, m: Manifest, namespace: str = "default") -> str:
        """What was done: created, configured or unchanged. Raises ApiError or LabError."""
        kind = await self.kind_of(m)
        scope = (m.namespace or namespace) if kind.namespaced else ""
        try:
            current = await self.request("GET", kind.path(scope, m.name))
        except NotFound:
            await self.request("POST", kind.path(scope), for_create(m.value))
            return "created"
        patch = merge_patch(current, m.value)
        if not patch:
            return "unchanged"
        await self.request("PATCH", kind.path(scope, m.name), patch, "application/merge-patch+json")
        return "configured"

    async def remove(self, m: Manifest, namespace: str = "default") -> str:
        kind = await self.kind_of(m, patience=0)
        try:
            await self.request("DELETE", kind.path((m.namespace or namespace) if kind.namespaced else "", m.name))
        except NotFound:
            return "not found"
        return "deleted"

    async def table(self, path: str, **params: str) -> dict[str, Any]:
        """A list or object as the server would have it shown (meta.k8s.io/v1 Table)."""
        url = yarl.URL(self.config.server + path, encoded=True).with_query({k: v for k, v in params.items() if v})
        async with self._open().get(
            url, headers={**self._authorization(), "Accept": TABLE}, ssl=self._tls(),
            server_hostname=self.config.tls_server_name or None,
        ) as response:  # fmt: skip
            if response.status != 200:
                raise await self._refusal(f"get {path}", response)
            value: dict[str, Any] = json.loads(await response.read())
            return value


def _kind(group_version: str, r: Mapping[str, Any]) -> Kind:
    return Kind(
        group_version,
        r["name"],
        r["kind"],
        r.get("singularName") or r["kind"].lower(),
        tuple(r.get("shortNames") or ()),
        bool(r["namespaced"]),
    )


async def apply_all(
    client: Objects, manifests: Iterable[Manifest], tell: Callable[[Manifest, str], None], namespace: str = "default"
) -> int:
    """Every object, also after one that failed. Returns the number of failures; `tell` hears the outcome of each."""
    return await _each(client.apply, ordered(manifests), tell, namespace)


async def remove_all(
    client: Objects, manifests: Iterable[Manifest], tell: Callable[[Manifest, str], None], namespace: str = "default"
) -> int:
    return await _each(client.remove, ordered(manifests)[::-1], tell, namespace)


async def _each(
    step: Callable[..., Any], manifests: Iterable[Manifest], tell: Callable[[Manifest, str], None], namespace: str
) -> int:
    failures = 0
    for m in manifests:
        try:
            tell(m, await step(m, namespace))
        except (ApiError, LabError) as e:
            failures += 1
            tell(m, f"error: {e}")
    return failures
