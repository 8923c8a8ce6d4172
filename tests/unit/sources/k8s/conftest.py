"""Fixtures around the scripted API server."""

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.config import ClusterConfig

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode: the tests' own modules aren't found otherwise

from scripted_api import Pauses, Scripted


@pytest.fixture
async def api() -> AsyncIterator[Scripted]:
    scripted = Scripted()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", scripted.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.05)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    scripted.url = f"http://{host}:{port}"
    try:
        yield scripted
    finally:
        await runner.cleanup()
    assert scripted.problems == []


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
async def client(api: Scripted, pauses: Pauses) -> AsyncIterator[ApiClient]:
    config = ClusterConfig(api.url)
    async with ApiClient(
        config, component="test", timeout=2.0, sleep=pauses, clock=pauses.clock, random=lambda: 0.0
    ) as made:
        yield made
