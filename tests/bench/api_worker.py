"""What the group `api` measures, in a process of its own so that memory and CPU are its alone:

    python -m tests.bench.api_worker pages|pages-dicts|events|events-dicts KIND FOLDER
    python -m tests.bench.api_worker follow KIND KUBECONFIG COUNT

`pages` decodes the list pages in FOLDER and applies them to a table as the informer does, `events` the watch stream;
`-dicts` does the same with the standard library's json into dicts, as a client without types has to. `follow` is the
real informer against a server. One line of JSON comes out."""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from fimbria.sources.k8s import config, resources, rows, services
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.informer import Informer
from fimbria.sources.k8s.resources import Resource
from fimbria.sources.k8s.watch import Bad, EventDecoder, Failed, PageDecoder
from fimbria.tables.table import Table

KINDS: Final[dict[str, tuple[Resource[Any], Callable[[Any], Any]]]] = {
    "ciliumendpoints": (resources.CILIUM_ENDPOINTS, rows.remote_endpoint),
    "endpointslices": (resources.ENDPOINT_SLICES, services.to_slice),
}
CHUNK: Final = 256 << 10
Outcome = dict[str, float]


def memory(key: str = "VmRSS:") -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def typed_pages(kind: str, pages: list[Path]) -> int:
    """As `Informer._collect` and `Table.replace`."""
    resource, transform = KINDS[kind]
    decoder, table, found = PageDecoder(resource.type), Table[Any, Any](kind), dict[Any, Any]()
    for page in pages:
        for item in decoder.decode(page.read_bytes()).items:
            assert not isinstance(item, Bad)
            row = transform(item)
            if row is not None:
                found[rows.object_key(item.metadata)] = row
    table.replace(found)
    kept.append(table)
    return len(table)


def dict_pages(_kind: str, pages: list[Path]) -> int:
    """A cache of plain objects."""
    cache: dict[Any, Any] = {}
    for page in pages:
        for item in json.loads(page.read_bytes())["items"]:
            cache[item["metadata"]["namespace"], item["metadata"]["name"]] = item
    kept.append(cache)
    return len(cache)


def typed_events(kind: str, files: list[Path]) -> int:
    """As `Informer._watch`."""
    resource, transform = KINDS[kind]
    decoder, table = EventDecoder(resource.type), Table[Any, Any](kind)
    data, count = files[0].read_bytes(), 0
    for at in range(0, len(data), CHUNK):
        for event in decoder.feed(data[at : at + CHUNK]):
            assert not isinstance(event, Bad | Failed)
            count += 1
            table.upsert(rows.object_key(event.object.metadata), transform(event.object))
    kept.append(table)
    return count


def dict_events(_kind: str, files: list[Path]) -> int:
    """A cache of plain objects that follows a stream."""
    cache: dict[Any, Any] = {}
    count = 0
    for line in files[0].read_bytes().splitlines():
        item = json.loads(line)["object"]
        cache[item["metadata"]["namespace"], item["metadata"]["name"]] = item
        count += 1
    kept.append(cache)
    return count


kept: list[Any] = []
WORK: Final = {"pages": typed_pages, "pages-dicts": dict_pages, "events": typed_events, "events-dicts": dict_events}


def replay(mode: str, kind: str, folder: Path) -> Outcome:
    """Seconds of CPU, MiB kept and MiB at most, and how many objects."""
    files = sorted(folder.glob(f"{kind}-{mode.partition('-')[0]}-*"))
    gc.collect()
    before, cpu = memory(), time.process_time()
    count = WORK[mode](kind, files)
    took = time.process_time() - cpu
    return {"seconds": took, "kept": memory() - before, "most": memory("VmHWM:") - before, "objects": count}


async def follow(kind: str, kubeconfig: Path, count: int) -> Outcome:
    """The informer from its start until it has all."""
    resource, transform = KINDS[kind]
    table: Table[Any, Any] = Table(kind)
    before, cpu, began = memory(), time.process_time(), time.monotonic()
    async with ApiClient(config.load(kubeconfig), component="bench", timeout=120.0) as client:
        informer: Informer[Any, Any, Any] = Informer(client, resource, table, transform, key=rows.object_key)
        task = asyncio.create_task(informer.run())
        await table.wait_synced()
        took = time.monotonic() - began
        found: Outcome = {"seconds": took, "cpu": time.process_time() - cpu, "kept": memory() - before}
        found |= {"most": memory("VmHWM:") - before, "objects": len(table)}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    if len(table) != count:
        raise SystemExit(f"{len(table)} {kind} instead of {count}")
    return found


def main() -> None:
    """One measurement."""
    mode, kind, *rest = sys.argv[1:]
    if mode == "follow":
        print(json.dumps(asyncio.run(follow(kind, Path(rest[0]), int(rest[1])))))
    else:
        print(json.dumps(replay(mode, kind, Path(rest[0]))))


if __name__ == "__main__":
    main()
