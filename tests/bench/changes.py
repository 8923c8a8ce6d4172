"""How soon a changed EndpointSlice decides where packets go, alone and in a storm of changes, ours and kube-proxy's."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from tests.bench import baseline, kubeproxy
from tests.bench.kubeproxy import KubeProxy
from tests.bench.labs import BenchPod, bench_lab, load, place, settle, start_pods
from tests.bench.measure import BenchError, Place, Settings
from tests.bench.report import Figure, Goal, explain, figure, tail
from tests.bench.rules import PORT, address
from tests.bench.service_data import SLICE_PATH, endpoint_slice, rows, service
from tests.bench.services import many

from fimbria.lab import components, kernel
from fimbria.lab.handle import Lab
from fimbria.lab.objects import Objects
from fimbria.sources.k8s import config

SIZES: Final = (10, 1000, 10_000)
UDP: Final = 9000
SERVERS: Final = ("a", "b")
PODS: Final = (
    BenchPod("client", "node1", "{role: client}", False),
    *(BenchPod(s, "node1", "{role: server}", True, f"exec labtool serve --tcp {UDP} --udp {UDP} --name {s}")
      for s in SERVERS),
)  # fmt: skip
AGENT: Final = "node1/agent"
PROBER: Final = Path(__file__).with_name("prober.py")
RATE: Final = 1000
STORMED: Final = 1000  # Services at most
QUIET: Final = 0.05  # seconds without another answer: the change is through
PATIENCE: Final = 60.0
SOONER: Final = Goal("ratio", "<=", 1.0)
KINDS: Final = {"one": "one change", "storm": f"in a storm of {RATE:,} changes a second"}


@dataclass(frozen=True, slots=True)
class Pace:
    """How often one side is changed: at most `times`, for at most `seconds`, `pause` seconds between two."""

    times: int
    seconds: float
    pause: float


# kube-proxy syncs at most once a second (minSyncPeriod): changes of their own come later than that one after the other.
OURS: Final = Pace(40, 6.0, 0.05)
THEIRS: Final = Pace(8, 9.0, 1.2)


class Watch(threading.Thread):
    """Who answers new connections to a Service, as a process inside a pod sees it."""

    def __init__(self, where: Place, vip: str) -> None:
        super().__init__(daemon=True)
        argv = where.argv(sys.executable, str(PROBER), vip, str(PORT))
        self._process = subprocess.Popen(argv, env=components.ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        self.seen: list[tuple[float, str]] = []

    def run(self) -> None:
        """Until the process ends."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            sent, _, name = line.partition(" ")
            self.seen.append((float(sent), name.strip()))

    def end(self) -> None:
        """Ends the process too."""
        self._process.kill()
        self._process.wait()
        self.join()

    def settled(self, name: str) -> float | None:
        """When the first datagram was sent from which on all were answered by `name`; None: not yet."""
        sent, last = self.seen[-1] if self.seen else (0.0, "")
        return sent if last == name and time.monotonic() - sent > QUIET else None


@contextmanager
def watching(where: Place, vip: str) -> Iterator[Watch]:
    """A `Watch` that ends with the context."""
    watch = Watch(where, vip)
    watch.start()
    try:
        yield watch
    finally:
        watch.end()


@dataclass(slots=True)
class Side:
    """What one side needed for changes, in ms; of the storm also its rate as it was."""

    samples: dict[str, list[float]] = field(default_factory=dict)
    rate: float = 0.0


def changes(settings: Settings) -> list[Figure]:
    """All figures of single changes and of storms."""
    found: list[Figure] = []
    have = 0
    with ExitStack() as stack:
        lab = stack.enter_context(bench_lab(settings.say, "changes", nodes=1))
        start_pods(lab, PODS)
        pods = {p.name: lab.addresses(p.name)[0] for p in PODS}
        nets = {m: _twin(stack, lab, m, pods) for m in kubeproxy.MODES}
        backends = [pods[s] for s in SERVERS]
        for size in (10, 100) if settings.quick else SIZES:
            settings.say(f"{many(size)}: creating them")
            numbers = range(have + 1, size + 1)
            bodies = (endpoint_slice(n, backends[:1], proto="UDP") for n in numbers)
            load(lab, rows((service(n, proto="UDP") for n in numbers), bodies))
            have = size
            sides = {"ours": _ours(lab, size, backends, settings)}
            lab.kill(AGENT)  # so that its work isn't measured as kube-proxy's
            for mode, net in nets.items():
                sides[mode] = _theirs(lab, net, mode, size, backends, settings)
            lab.restart(AGENT)
            found += _figures(size, sides)
    return found


def _twin(stack: ExitStack, lab: Lab, mode: str, pods: dict[str, str]) -> baseline.Net:
    """The lab's node and its pods without us."""
    net = stack.enter_context(baseline.net(f"ch-{mode}"))
    baseline.one_node_as(net, pods)
    for pod in PODS:
        if pod.serves:
            net.serve(pod.name, pod.command.replace("labtool", kernel.binary("labtool")))
    kubeproxy.connect(net, lab)
    return net


def _ours(lab: Lab, size: int, backends: list[str], settings: Settings) -> Side:
    with watching(place(lab, "client"), address(size)) as watch:
        lab.wait("our node has the last Service", lambda: watch.settled(SERVERS[0]), 60.0)
        settle(lab)
        settings.say(f"{many(size)}: changes, ours")
        return _measure(lab, watch, size, backends, Pace(5, 2.0, 0.05) if settings.quick else OURS)


def _theirs(lab: Lab, net: baseline.Net, mode: str, size: int, backends: list[str], settings: Settings) -> Side:
    try:
        with (
            KubeProxy(net, lab, mode, baseline.GATEWAY) as proxy,
            watching(net.place("client"), address(size)) as watch,
        ):
            proxy.wait(partial(_expect, watch), PATIENCE)
            proxy.settle(60.0)
            settings.say(f"{many(size)}: changes, kube-proxy {mode}")
            return _measure(lab, watch, size, backends, Pace(2, 3.0, 1.2) if settings.quick else THEIRS)
    finally:
        kubeproxy.flush(net)


def _expect(watch: Watch) -> None:
    if watch.settled(SERVERS[0]) is None:
        raise BenchError("no answer yet")


def _measure(lab: Lab, watch: Watch, size: int, backends: list[str], pace: Pace) -> Side:
    """Ends with the first backend in place again."""
    side = Side()
    side.samples["one"] = asyncio.run(_flip(lab, watch, size, backends, pace))
    with _storm(lab, min(size - 1, STORMED), backends) as tell:
        side.samples["storm"] = asyncio.run(_flip(lab, watch, size, backends, pace))
        side.rate = tell()
    asyncio.run(_put(lab, size, backends[0]))
    return side


async def _put(lab: Lab, number: int, backend: str) -> None:
    async with Objects(config.load(lab.paths.host_kubeconfig), component="bench", rate=1000, burst=1000) as client:
        await _change(client, number, backend)


async def _change(client: Objects, number: int, backend: str) -> None:
    body = endpoint_slice(number, [backend], proto="UDP")
    await client.request("PUT", f"{SLICE_PATH}/{body['metadata']['name']}", body)


async def _flip(lab: Lab, watch: Watch, number: int, backends: list[str], pace: Pace) -> list[float]:
    """Milliseconds of each change: from before the request until the first datagram after which none went to the old
    backend. Raises BenchError."""
    samples: list[float] = []
    async with Objects(config.load(lab.paths.host_kubeconfig), component="bench", rate=1000, burst=1000) as client:
        await client.request("GET", SLICE_PATH, limit="1")  # the connection is there before the clock runs
        start, turn = time.monotonic(), SERVERS.index(watch.seen[-1][1])
        while len(samples) < pace.times and (not samples or time.monotonic() - start < pace.seconds):
            turn = 1 - turn
            began = time.monotonic()
            await _change(client, number, backends[turn])
            while (at := watch.settled(SERVERS[turn])) is None or at < began:
                await asyncio.sleep(0.005)
                if time.monotonic() - began > PATIENCE:
                    raise BenchError(f"a changed EndpointSlice isn't used after {PATIENCE:.0f} s")
            samples.append((at - began) * 1000)
            await asyncio.sleep(max(began + pace.pause - time.monotonic(), 0))
    return samples


@contextmanager
def _storm(lab: Lab, services: int, backends: list[str]) -> Iterator[Callable[[], float]]:
    """Changes of other Services all the time; gives the rate per second that was reached."""
    options = (str(lab.paths.host_kubeconfig), str(services), str(RATE), *backends)
    argv = [sys.executable, "-m", "tests.bench.storm", *options]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    rates: list[float] = []
    reader = threading.Thread(target=lambda lines: rates.extend(map(float, lines)), args=(process.stdout,))
    reader.start()

    def tell() -> float:
        if process.poll() is not None or not rates:
            raise BenchError("the storm of changes ended early")
        return rates[-1]

    try:
        time.sleep(1.5)
        yield tell
    finally:
        process.kill()
        process.wait()
        reader.join()


def _figures(size: int, sides: dict[str, Side]) -> list[Figure]:
    ours, found = sides["ours"], []
    for kind, words in KINDS.items():
        mine = ours.samples[kind]
        name = f"{many(size)}, {words}"
        for mode in kubeproxy.MODES:
            theirs, against = sides[mode].samples[kind], f"kube-proxy {mode}"
            note = f"{len(mine)} changes, kube-proxy {len(theirs)}"
            if kind == "storm":
                note += f"; {ours.rate:,.0f} others a second, kube-proxy {sides[mode].rate:,.0f}"
            found.append(explain(figure(f"{name}, median, against {against}", "ms", mine, baseline=theirs,
                                        against=against, goal=SOONER, note=note)))  # fmt: skip
            found.append(explain(tail(f"{name}, 99th percentile, against {against}", "ms", mine, baseline=theirs,
                                      against=against, goal=SOONER)))  # fmt: skip
    return found
