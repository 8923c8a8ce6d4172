"""Many nodes that want identities for the same labels at the same moment: what that costs the API server, and that each
set of labels gets one number.

    .venv/bin/python tests/kube/allocators.py --server real --nodes 5000 --labels 1

Every node is an allocator of its own (`IdentitySearch`), with its own view, which learns what the watch says a random
`LAG` later, as behind an API server with thousands of watches. Requests are real; the nodes share their connections.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import aiohttp

from fimbria.decide.identity import IdentityAllocator, probe
from fimbria.lab.cluster import definitions
from fimbria.model.endpoint import ClusterIdentity
from fimbria.model.labels import Labels
from fimbria.sources.k8s import config as k8s_config
from fimbria.sources.k8s import resources, rows
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import AlreadyExists, ApiError
from fimbria.sources.k8s.identities import IdentitySearch, spread
from fimbria.sources.k8s.informer import Informer
from fimbria.sources.k8s.resources import Resource
from fimbria.sources.k8s.types.meta import ApiObject
from fimbria.tables.table import Table

LAG: Final = (0.02, 0.1)
CRDS: Final = Resource(
    "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", ApiObject, namespaced=False
)


class CountingClient(ApiClient):
    """Counts what it sends, by method."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.sent: Counter[str] = Counter()
        # All the nodes of the storm share a few connections here: waiting for one is not the server's fault.
        self._timeout = aiohttp.ClientTimeout(total=600.0)

    async def _attempt(self, method: str, *args: Any, **options: Any) -> bytes:
        self.sent[method] += 1
        return await super()._attempt(method, *args, **options)


@dataclass
class Storm:
    """What came of it."""

    numbers: dict[Labels, set[int]] = field(default_factory=dict)
    sent: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    waits: list[float] = field(default_factory=list)

    def share(self, part: float) -> float:
        """The time within which that part of the nodes had their number."""
        return sorted(self.waits)[int(part * (len(self.waits) - 1))]


async def install(client: ApiClient) -> None:
    """The custom resources; waits until identities can be listed."""
    for manifest in definitions():
        with suppress(AlreadyExists):
            await client.create(CRDS, dict(manifest.value))
    while True:
        try:
            await client.list(resources.CILIUM_IDENTITIES)
            return
        except ApiError:
            await asyncio.sleep(0.1)


async def storm(
    client: CountingClient, nodes: int, wanted: list[Labels], *, spreading: bool = True, at_once: bool = True
) -> Storm:
    """All nodes want all labels, `at_once` or spread over ten seconds. Returns when all have them."""
    table: Table[int, ClusterIdentity] = Table("identities")
    informer = Informer(client, resources.CILIUM_IDENTITIES, table, rows.identity, key=rows.identity_key)
    following = asyncio.create_task(informer.run())
    await table.wait_synced()
    window = spread(nodes) if spreading else 0.0
    searches = [IdentitySearch(client, IdentityAllocator(), lambda: window) for _ in range(nodes)]
    telling = asyncio.create_task(_tell(table, searches))
    client.sent.clear()
    result, began = Storm(), time.monotonic()

    async def one(search: IdentitySearch, labels: Labels) -> None:
        if not at_once:
            await asyncio.sleep(random.random() * 10)
        asked = time.monotonic()
        number = await search.number(labels)
        result.waits.append(time.monotonic() - asked)
        result.numbers.setdefault(labels, set()).add(number)

    try:
        await asyncio.gather(*(one(search, labels) for labels in wanted for search in searches))
        result.seconds = time.monotonic() - began
        result.sent = Counter(client.sent)
    finally:
        for task in (following, telling):
            task.cancel()
        await asyncio.gather(following, telling, return_exceptions=True)
    return result


async def _tell(table: Table[int, ClusterIdentity], searches: list[IdentitySearch]) -> None:
    loop, subscription = asyncio.get_running_loop(), table.subscribe()

    def tell(some: Iterable[IdentitySearch], number: int, row: ClusterIdentity) -> None:
        for search in some:
            search.allocator.on_seen(number, Labels(row.labels), row.marked)

    while True:
        for number in subscription.drain():
            row = table.get(number)
            if row is None:
                continue
            groups: list[list[IdentitySearch]] = [[] for _ in range(20)]
            for search in searches:
                random.choice(groups).append(search)
            for n, group in enumerate(groups):
                loop.call_later(LAG[0] + (LAG[1] - LAG[0]) * n / 19, tell, group, number, row)
        await subscription.wait()


def label_sets(count: int, run: str) -> list[Labels]:
    """New ones for each run."""
    return [Labels({"k8s:app": f"app{n}-{run}", "k8s:io.kubernetes.pod.namespace": "ns"}) for n in range(count)]


async def occupy(client: ApiClient, wanted: list[Labels]) -> None:
    """Others hold the first number of each set of labels, of every second one marked as unused."""
    for n, labels in enumerate(wanted):
        meta: dict[str, Any] = {"name": str(next(probe(labels)))}
        if n % 2:
            meta["annotations"] = {rows.UNUSED_ANNOTATION: "2026-01-01T00:00:00Z"}
        with suppress(AlreadyExists):
            body = {"metadata": meta, "security-labels": {"k8s:app": f"holder-{meta['name']}"}}
            await client.create(resources.CILIUM_IDENTITIES, body)


async def duplicates(client: ApiClient) -> list[Labels]:
    """Sets of labels that more than one identity has."""
    listed = await client.list(resources.CILIUM_IDENTITIES)
    counted = Counter(Labels(i.security_labels or {}) for i in listed.items)
    return [labels for labels, count in counted.items() if count > 1]


def open_client(kubeconfig: Path) -> CountingClient:
    """Without a limit of its own, for thousands of nodes have thousands of limits."""
    config = k8s_config.load(str(kubeconfig))
    return CountingClient(config, component="storm", rate=1e6, burst=10**6, connections=64, timeout=300.0)


async def _run(kubeconfig: Path, nodes: int, count: int) -> None:
    async with open_client(kubeconfig) as client:
        await install(client)
        for name, spreading, at_once in (("at once, no spreading", False, True), ("at once", True, True),
                                         ("over 10 s", True, False)):  # fmt: skip
            wanted = label_sets(count, name.replace(" ", "").replace(",", ""))
            found = await storm(client, nodes, wanted, spreading=spreading, at_once=at_once)
            same = all(len(numbers) == 1 for numbers in found.numbers.values())
            print(
                f"{name}: {nodes} nodes x {count} label sets: {dict(found.sent)} requests, all within "
                f"{found.seconds:.2f} s, median {found.share(0.5):.3f} s, 99 % {found.share(0.99):.3f} s, "
                f"{'one number each' if same and not await duplicates(client) else 'DUPLICATES'}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=("embedded", "real"), default="embedded")
    parser.add_argument("--nodes", type=int, default=5000)
    parser.add_argument("--labels", type=int, default=1)
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    import conftest

    with tempfile.TemporaryDirectory(prefix="fim-storm-") as folder:
        if given.server == "real":
            with conftest.load("realserver").real_apiserver(Path(folder)) as kubeconfig:
                asyncio.run(_run(kubeconfig, given.nodes, given.labels))
            return
        embedded = conftest.Embedded(Path(folder))
        try:
            asyncio.run(_run(embedded.start().kubeconfig, given.nodes, given.labels))
        finally:
            embedded.kill()


if __name__ == "__main__":
    main()
