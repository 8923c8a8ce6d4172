"""What stands between us and an API server in bad times: a proxy that answers in its place, late, or with another
certificate; and a webhook that refuses objects or changes them. Both over TLS with authorities of their own."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import ssl
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from fimbria.sources.k8s import config


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


HOP = {"host", "connection", "transfer-encoding", "content-length", "keep-alive", "accept-encoding"}
_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


@dataclass(frozen=True)
class Pair:
    """A server certificate for 127.0.0.1 and its key; it is its own authority."""

    cert: Path
    key: Path

    @staticmethod
    def make(folder: Path, name: str, start: str = "", end: str = "") -> Pair:
        """Valid from now on for two days, or from `start` to `end` (YYYYMMDDHHMMSSZ)."""
        pair = Pair(folder / f"{name}.crt", folder / f"{name}.key")
        names = "subjectAltName=IP:127.0.0.1,DNS:kube.test"
        if not start:
            _openssl("req", "-x509", *_CURVE, "-subj", f"/CN={name}", "-addext", names, "-days", "2",
                     "-keyout", str(pair.key), "-out", str(pair.cert))  # fmt: skip
            return pair
        request, settings = folder / f"{name}.csr", folder / f"{name}.cnf"
        (folder / f"{name}.db").write_text("")
        (folder / f"{name}.serial").write_text("01")
        settings.write_text(
            f"[ca]\ndefault_ca=c\n[c]\ndatabase={folder}/{name}.db\nserial={folder}/{name}.serial\n"
            f"new_certs_dir={folder}\ndefault_md=sha256\npolicy=p\nx509_extensions=e\n[p]\ncommonName=supplied\n"
            f"[e]\nbasicConstraints=CA:TRUE\n{names}\n"
        )
        _openssl("req", "-new", *_CURVE, "-subj", f"/CN={name}", "-keyout", str(pair.key), "-out", str(request))
        _openssl("ca", "-batch", "-selfsign", "-config", str(settings), "-keyfile", str(pair.key), "-in", str(request),
                 "-startdate", start, "-enddate", end, "-out", str(pair.cert), "-notext")  # fmt: skip
        return pair

    def context(self) -> ssl.SSLContext:
        made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        made.load_cert_chain(self.cert, self.key)
        return made


@dataclass
class Fault:
    """Requests whose `METHOD PATH?QUERY` matches get `status` instead of an answer, or (0) the right one `delay`
    seconds late."""

    pattern: str
    status: int = 0
    delay: float = 0.0
    retry_after: str = ""
    hits: int = 0


@dataclass
class Background:
    """An event loop in a thread."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)


@dataclass
class Proxy:
    """In front of the server of a kubeconfig, on a port of loopback. Who asks is for the server behind to judge."""

    kubeconfig: Path
    pair: Pair
    faults: list[Fault] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    port: int = 0
    _background: Background = field(default_factory=Background)
    _runner: web.AppRunner | None = None
    _session: aiohttp.ClientSession | None = None
    _open: set[asyncio.Transport] = field(default_factory=set)

    def start(self) -> None:
        self._background.run(self._start())

    def stop(self) -> None:
        self._background.run(self._stop())
        self._background.stop()

    def present(self, pair: Pair) -> None:
        """Connections from now on see this certificate; those of before are broken."""
        self.pair = pair
        self._background.run(self._again())

    def cut(self) -> None:
        """Breaks every connection."""
        self._background.run(self._cut())

    @contextmanager
    def fault(self, pattern: str, **options: Any) -> Iterator[Fault]:
        made = Fault(pattern, **options)
        self.faults.append(made)
        try:
            yield made
        finally:
            self.faults.remove(made)

    async def _start(self) -> None:
        cluster = config.load(self.kubeconfig)
        self._server = cluster.server
        connector = aiohttp.TCPConnector(ssl=cluster.tls or True, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False)
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        await self._listen()

    async def _listen(self) -> None:
        assert self._runner is not None
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self.pair.context(), reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _again(self) -> None:
        assert self._runner is not None
        for site in list(self._runner.sites):
            await site.stop()
        await self._cut()
        await self._listen()

    async def _cut(self) -> None:
        for transport in list(self._open):
            transport.abort()

    async def _stop(self) -> None:
        await self._cut()
        if self._runner:
            await self._runner.cleanup()
        if self._session:
            await self._session.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        transport = request.transport
        if isinstance(transport, asyncio.Transport):
            self._open.add(transport)
        self.asked.append(said := f"{request.method} {request.path_qs}")
        for fault in self.faults:
            if re.search(fault.pattern, said):
                fault.hits += 1
                await asyncio.sleep(fault.delay)
                if fault.status:
                    headers = {"Retry-After": fault.retry_after} if fault.retry_after else {}
                    return web.Response(status=fault.status, text="so it was ordered", headers=headers)
        return await self._forward(request)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        headers = {k: v for k, v in request.headers.items() if k.lower() not in HOP}
        async with self._session.request(
            request.method, self._server + request.raw_path, headers=headers, data=await request.read() or None,
            allow_redirects=False,
        ) as answer:  # fmt: skip
            passed = {k: v for k, v in answer.headers.items() if k.lower() not in HOP}
            response = web.StreamResponse(status=answer.status, headers=passed)
            with suppress(ConnectionError):
                await response.prepare(request)
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
                await response.write_eof()
            return response


Judge = Callable[[dict[str, Any]], tuple[bool, str, list[dict[str, Any]]]]
"""Of an AdmissionReview's request: allowed, why not, JSON patch."""


@dataclass
class Webhook:
    """An admission webhook (admission.k8s.io/v1) on a port of loopback."""

    pair: Pair
    judge: Judge
    port: int = 0
    asked: int = 0
    _background: Background = field(default_factory=Background)
    _runner: web.AppRunner | None = None

    def start(self) -> None:
        self._background.run(self._start())

    def stop(self) -> None:
        assert self._runner is not None
        self._background.run(self._runner.cleanup())
        self._background.stop()

    def configuration(self, name: str, kind: str, group: str, plural: str, *operations: str) -> dict[str, Any]:
        """A ValidatingWebhookConfiguration or MutatingWebhookConfiguration that sends objects here."""
        hook = {
            "name": f"{name}.test.invalid",
            "clientConfig": {
                "url": f"https://127.0.0.1:{self.port}/",
                "caBundle": base64.b64encode(self.pair.cert.read_bytes()).decode(),
            },
            "rules": [{"apiGroups": [group], "apiVersions": ["*"], "resources": [plural], "operations": [*operations]}],
            "failurePolicy": "Fail", "sideEffects": "None", "admissionReviewVersions": ["v1"], "timeoutSeconds": 5,
        }  # fmt: skip
        version = "admissionregistration.k8s.io/v1"
        return {"apiVersion": version, "kind": kind, "metadata": {"name": name}, "webhooks": [hook]}

    async def _start(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self.pair.context()).start()
        self.port = self._runner.addresses[0][1]

    async def _handle(self, request: web.Request) -> web.Response:
        review = await request.json()
        self.asked += 1
        allowed, why, patch = self.judge(review["request"])
        answer: dict[str, Any] = {"uid": review["request"]["uid"], "allowed": allowed}
        if why:
            answer["status"] = {"message": why}
        if patch:
            answer |= {"patchType": "JSONPatch", "patch": base64.b64encode(json.dumps(patch).encode()).decode()}
        return web.json_response({"apiVersion": review["apiVersion"], "kind": review["kind"], "response": answer})
