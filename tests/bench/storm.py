"""Changes of EndpointSlices at a steady rate: `python -m tests.bench.storm KUBECONFIG SERVICES RATE A B` moves the
Services 1 to SERVICES between the backends A and B in turn, until it is killed. A process of its own, so that its work
doesn't delay what is measured; it prints a line once a second with the changes made so far."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import Final

from tests.bench.service_data import SLICE_PATH, endpoint_slice

from fimbria.lab.objects import Objects
from fimbria.sources.k8s import config

AT_ONCE: Final = 8


async def storm(client: Objects, services: int, rate: float, backends: tuple[str, str]) -> None:
    """Raises ApiError if the server refuses a change."""
    began, made = time.monotonic(), 0

    async def worker() -> None:
        nonlocal made
        while True:
            number, turn = made % services + 1, made // services % 2
            made += 1
            await asyncio.sleep(max(began + made / rate - time.monotonic(), 0))
            body = endpoint_slice(number, [backends[1 - turn]], proto="UDP")
            await client.request("PUT", f"{SLICE_PATH}/{body['metadata']['name']}", body)

    async def tell() -> None:
        while True:
            await asyncio.sleep(1)
            print(f"{made / (time.monotonic() - began):.0f}", flush=True)

    await asyncio.gather(tell(), *(worker() for _ in range(AT_ONCE)))


async def main() -> None:
    """Until killed."""
    kubeconfig, services, rate, *backends = sys.argv[1:]
    async with Objects(config.load(Path(kubeconfig)), component="bench", rate=1e6, burst=1_000_000) as client:
        await storm(client, int(services), float(rate), (backends[0], backends[1]))


if __name__ == "__main__":
    asyncio.run(main())
