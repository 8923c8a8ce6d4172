"""The agent: how soon it is ready, how much memory it needs, how soon a policy is enforced; alone, with many pods of
its own, and in a cluster of 50,000 pods."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from tests.bench import cluster_data
from tests.bench.cni import GRACE
from tests.bench.enforce import Enforcement
from tests.bench.labs import agent_metrics, bench_lab, load, settle
from tests.bench.measure import HERE, BenchError, Settings
from tests.bench.pods import AT_ONCE, Pods, bridge_rates
from tests.bench.report import Figure, Goal, explain, figure, tail

from fimbria.lab import components, state
from fimbria.lab.handle import Lab

AGENT: Final = "node1/agent"
REST: Final = 4.0  # seconds; what a start needed for a moment is given back within two
MEMORY: Final = Goal("median", "<=", 100)
ENFORCED: Final = Goal("p99", "<=", 100)
ONE_NODE: Final[dict[str, object]] = {"nodes": 1, "ipv4_mask": 20, "ipv6_mask": 116}
STATE: Final = "about 1 KiB a pod and 0.25 KiB an address is state, the rest of the excess what audits leave behind"
MAKE_COLD: Final = (
    "rm -rf /sys/fs/bpf/fimbria /run/fimbria/state; "
    "for d in fimbria_host fimbria_vxlan; do ip link delete $d 2>/dev/null; done; true"
)


def agent(settings: Settings) -> list[Figure]:
    """All figures of the agent."""
    with ExitStack() as stack:
        lab = stack.enter_context(bench_lab(settings.say, "agent", **ONE_NODE))
        lab.kill("node1/runner")  # pods are made by the bench itself: there is nothing to run in them
        found, ready = _starts(lab, settings)
        found.append(memory(lab, "agent memory, no pods"))
        base = found[-1].median
        enforcement = stack.enter_context(Enforcement(lab))
        settings.say("agent: policies in an empty cluster")
        empty = enforcement.measure(settings.times(100, 5))
        found += _large_cluster(lab, settings, enforcement, base, ready, empty)
    return found


def crowd(settings: Settings) -> list[Figure]:
    """All figures of an agent with many pods of its own."""
    with bench_lab(settings.say, "crowd", **ONE_NODE) as lab:
        lab.kill("node1/runner")
        ready = [start_seconds(lab) for _ in range(settings.times(5, 2))]
        base = memory(lab, "agent memory, no pods").median
        return _local_pods(lab, settings, base, ready)


# --- start -------------------------------------------------------------------------------------------------------


def start_seconds(lab: Lab, cold: bool = False) -> float:
    """Kill -9 the agent and start it again: seconds from the start of its process until it says that it is ready."""
    lab.kill(AGENT)
    if cold:
        lab.run("node/node1", "sh", "-c", MAKE_COLD)
    log = components.log_path(lab.paths, AGENT)
    before = log.stat().st_size
    began = time.monotonic()
    lab.restart(AGENT)
    while b"ready after" not in log.read_bytes()[before:]:
        if time.monotonic() - began > 120:
            raise BenchError(f"the agent isn't ready after 120 s: {components.tail(log)}")
        time.sleep(0.005)
    return time.monotonic() - began


def _imports() -> float:
    """The interpreter with everything that the agent imports, and nothing else."""
    began = time.monotonic()
    HERE.run(*components.Component("agent", "fimbria.agent").argv(), "--help")
    return time.monotonic() - began


def _starts(lab: Lab, settings: Settings) -> tuple[list[Figure], list[float]]:
    settings.say("agent: cold starts and restarts")
    cold, warm, bare = [], [], []
    for _ in range(settings.times(5, 2)):
        cold.append(start_seconds(lab, cold=True))
        warm.append(start_seconds(lab))
        bare.append(_imports())
    against = "interpreter and imports"
    return [
        figure("agent, cold start to ready", "s", cold, baseline=bare, against=against,
               note="no pins, no journal, no devices: programs are loaded and verified"),
        figure("agent, restart to ready", "s", warm, baseline=bare, against=against),
    ], warm  # fmt: skip


# --- memory ------------------------------------------------------------------------------------------------------


def pss(pid: int) -> float:
    """Proportional set size in MiB (proc(5), smaps_rollup)."""
    return _rollup(pid, "Pss:")


def _rollup(pid: int, key: str) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def cpu_percent(pid: int, seconds: float) -> float:
    """Share of one core that a process uses over some seconds."""
    before = cpu_seconds(pid)
    time.sleep(seconds)
    return 100 * (cpu_seconds(pid) - before) / seconds


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far (proc(5), stat, fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pid_if_running(lab: Lab, process: str) -> int:
    """0 if it doesn't run."""
    found = state.recall(lab.paths, process)
    return found.pid if found is not None and found.alive() else 0


def pid_of(lab: Lab, process: str) -> int:
    """Raises BenchError if it doesn't run."""
    pid = pid_if_running(lab, process)
    if not pid:
        raise BenchError(f"{process} isn't running")
    return pid


def memory(lab: Lab, name: str, base: float | None = None, note: str = "", why: str = "") -> Figure:
    """PSS of the agent once it has come to rest, a few times."""
    settle(lab, 30.0)
    time.sleep(REST)
    pid = pid_of(lab, AGENT)
    samples = []
    for _ in range(5):
        samples.append(pss(pid))
        time.sleep(0.2)
    peak = next(x.split()[1] for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmHWM:"))
    most = f"RSS {_rollup(pid, 'Rss:'):.0f} MiB, at most {int(peak) / 1024:.0f}"
    return explain(figure(name, "MiB", samples, baseline=[base] * 5 if base else (),
                          against="no pods" if base else "", goal=MEMORY,
                          note="; ".join(filter(None, (note, most)))), why)  # fmt: skip


# --- many local pods ---------------------------------------------------------------------------------------------


def _local_pods(lab: Lab, settings: Settings, base: float, ready: list[float]) -> list[Figure]:
    sizes = (20, 40) if settings.quick else (100, 1000)
    found: list[Figure] = []
    simulated = "real CNI ADDs, interfaces and programs; nothing runs in the pods"
    with Pods(lab) as made:
        for size in sizes:
            settings.say(f"agent: {size:,} local pods")
            rates = made.grow(size)
            found.append(memory(lab, f"agent memory, {size:,} local pods", base, simulated))
        settings.say("agent: as many by Debian's bridge plugin")
        found.append(explain(figure(f"pods added, {AT_ONCE} at once, up to {size:,}", "/s", rates,
                                    baseline=bridge_rates(sizes[0]), against=f"bridge + host-local, {sizes[0]} pods",
                                    goal=Goal("ratio", ">=", 1.0)), GRACE))  # fmt: skip
        idle = [cpu_percent(pid_of(lab, AGENT), 1.0) for _ in range(5)]
        found.append(figure(f"agent at rest, {size:,} local pods, CPU", "% of a core", idle))
        settings.say(f"agent: restarts with {size:,} local pods")
        again = [start_seconds(lab) for _ in range(settings.times(5, 2))]
        found.append(figure(f"agent, restart to ready, {size:,} local pods", "s", again, baseline=ready[: len(again)],
                            against="no pods"))  # fmt: skip
        settings.say("agent: removing the pods")
        found.append(figure(f"pods removed, {AT_ONCE} at once", "/s", [made.shrink()]))
    return found


# --- enforcement and a large cluster -------------------------------------------------------------------------------

Samples = dict[str, list[float]]


def _large_cluster(
    lab: Lab, settings: Settings, enforcement: Enforcement, base: float, ready: list[float], empty: Samples
) -> list[Figure]:  # fmt: skip
    nodes, pods = settings.times(cluster_data.NODES, 50), settings.times(cluster_data.PODS, 500)
    what = f"{pods:,} remote pods in {nodes:,} nodes"
    found: list[Figure] = []
    for stack, ipv6 in (("IPv4", False), ("dual-stack", True)):
        settings.say(f"agent: {what}, {stack}")
        seconds = fill(lab, nodes, pods, ipv6=ipv6)
        found.append(figure(f"{what} appear at once, {stack}, until all are in the kernel", "s", [seconds]))
        again = [start_seconds(lab) for _ in range(settings.times(3, 2))]
        found.append(figure(f"agent, restart to ready, {what}, {stack}", "s", again, baseline=ready[: len(again)],
                            against="empty cluster"))  # fmt: skip
        found.append(memory(lab, f"agent memory, {what}, {stack}", base, why=STATE))
    settings.say(f"agent: policies, with {what}")
    for kind, samples in enforcement.measure(settings.times(100, 5)).items():
        words = "from before the request to the API until the first packet that is treated so"
        name = f"policy {kind}, {what}"
        found.append(figure(f"{name}, median", "ms", samples, baseline=empty[kind], against="empty cluster"))
        found.append(explain(tail(f"{name}, 99th percentile", "ms", samples, baseline=empty[kind],
                                  against="empty cluster", goal=ENFORCED, note=words)))  # fmt: skip
    return found


def fill(lab: Lab, nodes: int, pods: int, *, ipv6: bool) -> float:
    """Put a large cluster into the API server's database while it is down; seconds from its start until the agent has
    every address in the kernel. Raises LabError."""
    took = load(lab, cluster_data.everything(nodes, pods, cluster_data.IDENTITIES, ipv6=ipv6))
    began = time.monotonic() - took
    wanted = pods * (2 if ipv6 else 1)

    def written() -> bool:
        return agent_metrics(lab, "node1").get('fimbria_desired_rows{target="ipcache"}', 0.0) >= wanted

    lab.wait(f"{wanted:,} addresses in the kernel", written, 180.0)
    return time.monotonic() - began
