"""Many Services at once: how long until all are in the kernel, with which memory and CPU; and one backend of very many
that comes and goes."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

from tests.bench import baseline, kubeproxy
from tests.bench.agent import cpu_seconds, pid_of, start_seconds
from tests.bench.kubeproxy import KubeProxy
from tests.bench.labs import agent_metrics, bench_lab, load, settle
from tests.bench.measure import BenchError, Settings, rate
from tests.bench.report import Figure, Goal, explain, figure, tail
from tests.bench.rules import PORT, address
from tests.bench.service_data import SLICE_PATH, endpoint_slice, rows, service

from fimbria.kernel.bpf import Map
from fimbria.lab import access
from fimbria.lab.handle import Lab
from fimbria.lab.objects import Objects
from fimbria.sources.k8s import config

SERVICES: Final = 10_000
BACKENDS: Final = 10  # of each
LARGE: Final = 10_000  # backends of one
SLICE: Final = 100  # endpoints of a slice, as the controller makes them
AGENT: Final = "node1/agent"
CLIENT, SERVER = "10.9.1.2", "10.9.2.2"
PATIENCE: Final = 300.0
TWO_SECONDS: Final = Goal("median", "<=", 2)
NO_MORE: Final = Goal("ratio", "<=", 1.0)
WHY: Final = "see docs/design/service.md for where the time goes"


@dataclass(frozen=True, slots=True)
class Cost:
    """What programming everything took: seconds, CPU seconds, MiB at most."""

    seconds: float
    cpu: float
    memory: float


def programming(settings: Settings) -> list[Figure]:
    """All figures."""
    return [*_everything(settings), *_flapping(settings)]


# --- all at once -------------------------------------------------------------------------------------------------


def _everything(settings: Settings) -> list[Figure]:
    count = settings.times(SERVICES, 200)
    with ExitStack() as stack:
        lab = stack.enter_context(bench_lab(settings.say, "nothing", nodes=1))
        load(lab, rows(map(service, range(1, count + 1)), (endpoint_slice(n, _backends(n, count))
                                                           for n in range(1, count + 1))))  # fmt: skip
        settings.say(f"{count:,} Services with {count * BACKENDS:,} backends: ours")
        ours = [_ours(lab, count) for _ in range(settings.times(5, 2))]
        lab.kill(AGENT)
        theirs = {}
        for mode in kubeproxy.MODES:
            settings.say(f"{count:,} Services with {count * BACKENDS:,} backends: kube-proxy {mode}")
            theirs[mode] = _theirs(lab, mode, count)
    return _everything_figures(f"{count:,} Services, {count * BACKENDS:,} backends from nothing", ours, theirs)


def _backends(number: int, last: int) -> list[str]:
    """Addresses that nobody has, but for the last Service's: one pod that answers."""
    first = int(IPv4Address("10.128.0.0")) + number * BACKENDS
    return [SERVER] if number == last else [str(IPv4Address(first + i)) for i in range(BACKENDS)]


def _ours(lab: Lab, count: int) -> Cost:
    """Everything of an earlier start is gone: pins, journal, devices."""
    seconds = start_seconds(lab, cold=True)
    pid = pid_of(lab, AGENT)
    cost = Cost(seconds, cpu_seconds(pid), most_memory(pid))
    with _map(lab, "frontends") as frontends:
        if (found := len(frontends.dump()[0]) // frontends.info.key_size) < count:
            raise BenchError(f"the agent says that it is ready with {found:,} frontends of {count:,}")
    return cost


def _theirs(lab: Lab, mode: str, count: int) -> Cost:
    with baseline.net(f"all-{mode}") as net:
        baseline.one_node_as(net, {"a": CLIENT, "b": SERVER})
        net.serve("b")
        kubeproxy.connect(net, lab)
        with KubeProxy(net, lab, mode, baseline.GATEWAY) as proxy:
            last = partial(rate, net.place("a"), "crr", address(count), PORT, 0.01)
            seconds = proxy.wait(last, PATIENCE)
            proxy.settle(60.0)
            return Cost(seconds, proxy.cpu(), most_memory(proxy.pid))


def _everything_figures(what: str, ours: list[Cost], theirs: dict[str, Cost]) -> list[Figure]:
    found = []
    for mode, cost in theirs.items():
        against = f"kube-proxy {mode}"
        found += [
            figure(f"{what}: time, against {against}", "s", [c.seconds for c in ours], baseline=[cost.seconds],
                   against=against, goal=TWO_SECONDS if mode == kubeproxy.MODES[0] else NO_MORE,
                   note="ours: from the agent's start, programs are loaded too" if mode == kubeproxy.MODES[0] else ""),
            figure(f"{what}: CPU, against {against}", "s", [c.cpu for c in ours], baseline=[cost.cpu],
                   against=against, goal=NO_MORE),
            figure(f"{what}: memory at most, against {against}", "MiB", [c.memory for c in ours],
                   baseline=[cost.memory], against=against, goal=NO_MORE),
        ]  # fmt: skip
    return [explain(f, WHY) for f in found]


def most_memory(pid: int) -> float:
    """The most that a process had resident so far, MiB (proc(5), status)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _map(lab: Lab, name: str) -> Map:
    """A pinned map of the node's agent. Raises BenchError."""
    folder = access.node_root(lab.paths, "node1") / "sys/fs/bpf/fimbria/maps"
    path = next(folder.glob(f"{name}-*"), None)
    if path is None:
        raise BenchError(f"no pin of {name} in {folder}")
    return Map.open(path)


# --- one of very many --------------------------------------------------------------------------------------------


def _flapping(settings: Settings) -> list[Figure]:
    size = settings.times(LARGE, 1000)
    slices = [endpoint_slice(1, [str(IPv4Address("10.128.0.0") + i) for i in range(n, n + SLICE)], part=n // SLICE)
              for n in range(0, size, SLICE)]  # fmt: skip
    with bench_lab(settings.say, "flapping", nodes=1) as lab:
        load(lab, rows([service(1)], slices))
        times = settings.times(100, 10)
        settings.say(f"one backend of {size:,} comes and goes: ours")
        samples, written, cpu = _flap_ours(lab, slices[len(slices) // 2], size, times)
        lab.kill(AGENT)
        found = [figure(f"one of {size:,} backends comes or goes: rows written", "rows", [written]),
                 figure(f"one of {size:,} backends comes or goes: agent's CPU", "ms", [cpu])]  # fmt: skip
        for mode in kubeproxy.MODES:
            settings.say(f"one backend of {size:,} comes and goes: kube-proxy {mode}")
            synced = asyncio.run(_flap_theirs(lab, mode, slices[len(slices) // 2], settings.times(4, 2)))
            name, against = f"one of {size:,} backends comes or goes", f"kube-proxy {mode}"
            note = "ours: from before the request to the API until it is in the kernel; kube-proxy's: its sync alone"
            found += [
                explain(figure(f"{name}: median, against {against}", "ms", samples, baseline=[synced],
                               against=against, goal=NO_MORE, note=note)),
                explain(tail(f"{name}: 99th percentile, against {against}", "ms", samples, baseline=[synced],
                             against=against, goal=NO_MORE)),
            ]  # fmt: skip
        return found


def _turned(body: dict[str, Any], ready: bool) -> dict[str, Any]:
    """With the readiness of the first endpoint changed, whatever version the API server has."""
    first, *others = body["endpoints"]
    conditions = {"ready": ready, "serving": ready, "terminating": False}
    metadata = {k: v for k, v in body["metadata"].items() if k != "resourceVersion"}
    return body | {"metadata": metadata, "endpoints": [first | {"conditions": conditions}, *others]}


def _flap_ours(lab: Lab, body: dict[str, Any], size: int, times: int) -> tuple[list[float], float, float]:
    """ms of each change, rows written for each, CPU ms for each."""
    with _map(lab, "frontends") as frontends:
        key = lab.wait(f"a Service with {size:,} slots", partial(_key_of, frontends, size), 60.0) or b""
        settle(lab)
        pid = pid_of(lab, AGENT)
        cpu, written = cpu_seconds(pid), _written(lab)
        samples = asyncio.run(_flap(lab, body, times, lambda up: _count(frontends, key) == size - 1 + up))
        return samples, (_written(lab) - written) / times, (cpu_seconds(pid) - cpu) * 1000 / times


async def _flap(lab: Lab, body: dict[str, Any], times: int, done: Callable[[bool], bool]) -> list[float]:
    """ms of each change."""
    samples = []
    async with Objects(config.load(lab.paths.host_kubeconfig), component="bench", rate=1e4, burst=1000) as client:
        for turn in range(times):
            up, began = bool(turn % 2), time.monotonic()
            await client.request("PUT", f"{SLICE_PATH}/{body['metadata']['name']}", _turned(body, up))
            while not done(up):
                await asyncio.sleep(0.0002)
                if time.monotonic() - began > 30:
                    raise BenchError("the change of one backend isn't in the kernel after 30 s")
            samples.append((time.monotonic() - began) * 1000)
    return samples


def _key_of(frontends: Map, count: int) -> bytes | None:
    """The frontend with that many slots."""
    return next((k for k, v in frontends.items() if struct.unpack_from("=II", v)[1] == count), None)


def _count(frontends: Map, key: bytes) -> int:
    value = frontends.lookup(key)
    return int(struct.unpack_from("=II", value)[1]) if value else 0


def _written(lab: Lab) -> float:
    metrics = agent_metrics(lab, "node1")
    return sum(v for k, v in metrics.items() if k.startswith("fimbria_rows_written"))


async def _flap_theirs(lab: Lab, mode: str, body: dict[str, Any], times: int) -> float:
    """ms that kube-proxy's sync takes for each change."""
    metric = "kubeproxy_sync_proxy_rules_duration_seconds_sum"
    with baseline.net(f"flap-{mode}") as net:
        baseline.one_node_as(net, {"a": CLIENT})
        kubeproxy.connect(net, lab)
        with KubeProxy(net, lab, mode, baseline.GATEWAY) as proxy:
            proxy.wait(partial(_expect_sync, proxy), PATIENCE)
            proxy.settle(60.0)
            before = proxy.metric(metric)
            async with Objects(config.load(lab.paths.host_kubeconfig), component="bench") as client:
                for turn in range(times):
                    path = f"{SLICE_PATH}/{body['metadata']['name']}"
                    await client.request("PUT", path, _turned(body, bool(turn % 2)))
                    await asyncio.sleep(1.2)
                    proxy.settle(60.0)
            return (proxy.metric(metric) - before) * 1000 / times


def _expect_sync(proxy: KubeProxy) -> None:
    if not proxy.metric("kubeproxy_sync_proxy_rules_last_timestamp_seconds"):
        raise BenchError("not synced yet")
