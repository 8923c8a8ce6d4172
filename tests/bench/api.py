"""The API client with tens of thousands of objects: replayed, and against a real API server."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import aiohttp
from tests.bench import bigserver, cluster_data
from tests.bench.bigserver import BigServer, big_server
from tests.bench.measure import HERE, BenchError, Settings
from tests.bench.report import Figure, Goal, figure

from fimbria.sources.k8s import config
from fimbria.sources.k8s.resources import CILIUM_ENDPOINTS

OBJECTS: Final = 50_000
PAGE: Final = 500
NAMES: Final = {"ciliumendpoints": "CiliumEndpoints", "endpointslices": "EndpointSlices"}
DICTS: Final = "json and dicts of the standard library"
FASTER: Final = Goal("ratio", "<=", 1.0)
SMALL: Final = Goal("median", "<=", 60)
Sample = dict[str, float]


def api(settings: Settings) -> list[Figure]:
    """All figures of the client."""
    count = settings.times(OBJECTS, 1000)
    rounds = settings.times(3, 1)
    found: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="fimbench-") as name:
        folder = Path(name)
        for kind in NAMES:
            settings.say(f"api: {count:,} {NAMES[kind]}, replayed")
            _write(folder, kind, list(islice(_bodies(kind, count), count)))
            found += _replayed(kind, count, [_sample(mode, kind, str(folder)) for mode in
                                             ("pages", "pages-dicts", "events", "events-dicts") * rounds])  # fmt: skip
    with big_server() as server:
        for kind in NAMES:
            settings.say(f"api: {count:,} {NAMES[kind]} on a real API server")
            asyncio.run(server.fill(_rows(kind, count)))
            found += _followed(kind, count, server, rounds)
        found += asyncio.run(_encodings(server))
    return found


def _rows(kind: str, count: int) -> Iterator[cluster_data.Row]:
    if kind == "endpointslices":
        return bigserver.slices(count)
    return cluster_data.pods(count, cluster_data.NODES, cluster_data.IDENTITIES, ipv6=False)


def _bodies(kind: str, count: int) -> Iterator[dict[str, Any]]:
    for version, (_, _, _, body) in enumerate(_rows(kind, count), 1):
        body["metadata"]["resourceVersion"] = str(version)
        body["metadata"]["managedFields"] = _MANAGED  # what a server sends along, for us to skip
        yield body


_MANAGED: Final = [
    {"manager": "fimbria-agent", "operation": "Update", "apiVersion": "cilium.io/v2", "time": cluster_data.CREATED,
     "fieldsType": "FieldsV1", "fieldsV1": {"f:status": {".": {}, "f:id": {}, "f:identity": {".": {}, "f:id": {}},
                                                         "f:networking": {".": {}, "f:addressing": {}, "f:node": {}}}}}
]  # fmt: skip


def _write(folder: Path, kind: str, bodies: Sequence[dict[str, Any]]) -> None:
    for at in range(0, len(bodies), PAGE):
        page = {"kind": "List", "metadata": {"resourceVersion": "1"}, "items": bodies[at : at + PAGE]}
        (folder / f"{kind}-pages-{at:06}").write_text(json.dumps(page, separators=(",", ":")))
    with (folder / f"{kind}-events-0").open("w") as file:
        for body in bodies:
            file.write(json.dumps({"type": "MODIFIED", "object": body}, separators=(",", ":")) + "\n")


def _sample(mode: str, kind: str, *arguments: str) -> Sample:
    output = HERE.run(sys.executable, "-m", "tests.bench.api_worker", mode, kind, *arguments, patience=300.0)
    sample: Sample = json.loads(output)
    return sample | {"mode": hash(mode)}


def _of(samples: Iterable[Sample], mode: str, key: str) -> list[float]:
    return [s[key] for s in samples if s["mode"] == hash(mode)]


def _replayed(kind: str, count: int, samples: Sequence[Sample]) -> list[Figure]:
    what = f"{count:,} {NAMES[kind]}"
    for sample in samples:
        if sample["objects"] != count:
            raise BenchError(f"{sample['objects']} of {what} arrived")
    rate = [count / s for s in _of(samples, "events", "seconds")]
    return [
        figure(f"{what}, decoded and applied", "s", _of(samples, "pages", "seconds"), goal=FASTER, against=DICTS,
               baseline=_of(samples, "pages-dicts", "seconds")),
        figure(f"{what}, memory kept", "MiB", _of(samples, "pages", "kept"), goal=SMALL, against=DICTS,
               baseline=_of(samples, "pages-dicts", "kept"),
               note=f"at most {max(_of(samples, 'pages', 'most')):.0f} MiB on the way"),
        figure(f"watch of {NAMES[kind]}, decoded and applied", "events/s", rate, against=DICTS,
               baseline=[count / s for s in _of(samples, "events-dicts", "seconds")], goal=Goal("ratio", ">=", 1.0)),
    ]  # fmt: skip


def _followed(kind: str, count: int, server: BigServer, rounds: int) -> list[Figure]:
    samples, cpu = [], []
    _sample("follow", kind, str(server.kubeconfig), str(count))  # the server's own memory of the kind is filled
    for _ in range(rounds):
        before = server.cpu()
        samples.append(_sample("follow", kind, str(server.kubeconfig), str(count)))
        cpu.append(server.cpu() - before)
    what = f"{count:,} {NAMES[kind]} from a real API server"
    note = f"CPU of the client {statistics.median(s['cpu'] for s in samples):.2f} s, of the server " \
           f"{statistics.median(cpu):.2f} s; at most {max(s['most'] for s in samples):.0f} MiB"  # fmt: skip
    return [
        figure(f"{what}, until known", "s", [s["seconds"] for s in samples], note=note),
        figure(f"{what}, memory kept", "MiB", [s["kept"] for s in samples], goal=SMALL),
    ]


async def _encodings(server: BigServer) -> list[Figure]:
    """What a page costs with and without compression, and whether the server speaks CBOR."""
    cluster = config.load(server.kubeconfig)
    token = cluster.token.get() if cluster.token else ""
    url = f"{cluster.server}{CILIUM_ENDPOINTS.path()}?limit={PAGE}"
    size: dict[str, list[float]] = {"gzip": [], "identity": []}
    cost: dict[str, list[float]] = {"gzip": [], "identity": []}
    connector = aiohttp.TCPConnector(ssl=cluster.tls or True)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        for _ in range(3):
            for encoding in ("gzip", "identity"):
                headers = {"Authorization": f"Bearer {token}", "Accept-Encoding": encoding}
                before = server.cpu()
                for _ in range(40):
                    async with session.get(url, headers=headers) as response:
                        data = await response.read()
                cost[encoding].append((server.cpu() - before) * 1000 / 40)
                size[encoding].append(len(data) / 1024)
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/cbor"}
        async with session.get(url, headers=headers) as response:
            cbor = f"CBOR: {response.status}"
    note = f"{cbor} ({'not served, an alpha feature' if '406' in cbor else 'served'})"
    return [
        figure(f"a page of {PAGE} CiliumEndpoints, compressed", "KiB", size["gzip"], baseline=size["identity"],
               against="not compressed", note=note),
        figure(f"a page of {PAGE} CiliumEndpoints, compressed, CPU of the server", "ms", cost["gzip"],
               baseline=cost["identity"], against="not compressed", note=f"load average {os.getloadavg()[0]:.0f}"),
    ]  # fmt: skip
