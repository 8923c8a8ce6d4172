"""The processes at rest, and the observer under more events than anybody wants to see."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from tests.bench.agent import cpu_percent, cpu_seconds, pid_of, pss
from tests.bench.datapath import PODS, POLICIES
from tests.bench.labs import agent_metrics, bench_lab, get, place, settle, start_pods
from tests.bench.measure import CLIENT_CPU, BenchError, Settings, interleave, rate
from tests.bench.report import Figure, figure

from fimbria.lab import access
from fimbria.lab.handle import Lab

AT_REST: Final = ("control/operator", "node1/observer", "node1/agent")
DROPS: Final = "fimbria_drop_count_total"
LOST: Final = "fimbria_events_lost_total"
# A datagram socket that sends as fast as it can to where nothing is allowed: every packet is a drop and an event.
FLOOD: Final = (
    "import socket, sys, time\n"
    "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect((sys.argv[1], 9999))\n"
    "end = time.monotonic() + float(sys.argv[2]); pause = float(sys.argv[3]); n = 0\n"
    "while time.monotonic() < end:\n"
    "    for _ in range(20):\n"
    "        s.send(b'x'); n += 1\n"
    "    if pause: time.sleep(pause)\n"
    "print(n)\n"
)
PAUSES: Final = (0.02, 0.004, 0.0)  # between twenty datagrams: about 1,000 and 5,000 a second, and all that goes


def processes(settings: Settings) -> list[Figure]:
    """All figures of operator and observer."""
    with bench_lab(settings.say, "procs", nodes=2) as lab:
        start_pods(lab, PODS)
        lab.apply(POLICIES)
        settle(lab)
        settings.say("processes at rest")
        found = _at_rest(lab, settings)
        found += _flood(lab, settings)
        return found + _cost_of_watching(lab, settings)


def _at_rest(lab: Lab, settings: Settings) -> list[Figure]:
    found = []
    with ThreadPoolExecutor(len(AT_REST)) as pool:
        for process in AT_REST:
            pid, name = pid_of(lab, process), process.partition("/")[2]
            found.append(figure(f"{name} memory", "MiB", [pss(pid) for _ in range(5)]))
        pids = [pid_of(lab, p) for p in AT_REST]
        used = [list(pool.map(lambda p: cpu_percent(p, 2.0), pids)) for _ in range(settings.times(5, 1))]
    for i, process in enumerate(AT_REST):
        name = process.partition("/")[2]
        found.append(figure(f"{name} at rest, CPU", "% of a core", [row[i] for row in used]))
    return found


def _flood(lab: Lab, settings: Settings) -> list[Figure]:
    """Events a second that the observer takes, what is lost then, and what the agent notices of it (nothing)."""
    seconds = settings.times(5, 1)
    target = lab.addresses("near-guarded")[0]
    client = place(lab, "client-open")
    found: list[Figure] = []
    calm = _answers(lab)
    for pause in PAUSES:
        settings.say("observer: a flood of drops")
        before, seen = agent_metrics(lab, "node1"), _seen(lab)
        used = cpu_seconds(pid_of(lab, "node1/observer"))
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            flood = pool.submit(client.run, "taskset", "-c", CLIENT_CPU, "python3", "-c", FLOOD, target,
                                str(seconds), str(pause))  # fmt: skip
            answers = _answers(lab) if pause == 0 else []
            flood.result()
        took = time.monotonic() - began
        used = cpu_seconds(pid_of(lab, "node1/observer")) - used
        settle(lab, 10.0)
        after = agent_metrics(lab, "node1")
        dropped = sum(v - before.get(k, 0) for k, v in after.items() if k.startswith(DROPS))
        lost = sum(v - before.get(k, 0) for k, v in after.items() if k.startswith(LOST))
        taken = _seen(lab) - seen
        offered = dropped / took
        found.append(figure(f"observer, {offered:,.0f} drops a second offered: events taken", "/s", [taken / took],
                            baseline=[offered], against="offered",
                            note=f"{lost / max(dropped, 1):.0%} of the events were lost and counted; "
                                 f"the observer used {100 * used / took:.0f} % of a core"))  # fmt: skip
    found.append(figure("agent's answer to a status request, under the flood", "ms", answers, baseline=calm,
                        against="at rest"))  # fmt: skip
    return found


def _cost_of_watching(lab: Lab, settings: Settings) -> list[Figure]:
    """What the observer's work costs new connections: it shares the cores with them."""
    settings.say("observer: what it costs new connections")
    client, target = place(lab, "client-open"), lab.addresses("far-open")[0]
    names = [f"node{n}/observer" for n in (1, 2)]

    def watched() -> float:
        return rate(client, "crr", target)

    def unwatched() -> float:
        for name in names:
            lab.kill(name)
        try:
            return rate(client, "crr", target)
        finally:
            for name in names:
                lab.restart(name)
            settle(lab, 10.0)

    samples = interleave({"watched": watched, "unwatched": unwatched}, settings.rounds)
    return [figure("connect+request+close with observers running", "/s", samples["watched"],
                   baseline=samples["unwatched"], against="observers stopped")]  # fmt: skip


def _seen(lab: Lab) -> int:
    """Events that the observer of node1 took in all."""
    path = access.node_root(lab.paths, "node1") / "run/fimbria/observer.sock"
    status: dict[str, Any] = json.loads(asyncio.run(get(path, "/v1/status")))
    if "seen_flows" not in status:
        raise BenchError("the observer's status has no seen_flows")
    return int(status["seen_flows"])


def _answers(lab: Lab) -> list[float]:
    """Milliseconds of some status requests to the agent."""
    path = access.node_root(lab.paths, "node1") / "run/fimbria/agent.sock"
    times = []
    for _ in range(10):
        began = time.monotonic()
        asyncio.run(get(path, "/v1/status"))
        times.append((time.monotonic() - began) * 1000)
        time.sleep(0.1)
    return times
