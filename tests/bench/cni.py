"""CNI ADD and DEL as a runtime does them: one process each, ours against Debian's Go `bridge` with host-local."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from tests.bench import baseline
from tests.bench.labs import agent_metrics, bench_lab, cni_socket, settle
from tests.bench.measure import BenchError, Settings
from tests.bench.report import Figure, Goal, explain, figure, tail

from fimbria.lab import components, kernel
from fimbria.lab.handle import Lab

PLUGINS: Final = Path("/usr/lib/cni")
RUNS: Final = 200
CALM: Final = 0.05  # seconds; what the kernel still does after DEL must not be the next one's burden
OURS, CLSACT, THEIRS = "o", "c", "t"
BRIDGE: Final = "bridge + host-local"
AS_FAST: Final = Goal("ratio", "<=", 1.0)
GRACE: Final = (
    "pods start with clsact filters; the tcx links that replace them while the node rests wait for RCU grace periods "
    "(8 ms and more) under the kernel's lock for all network configuration"
)
POD: Final = """
apiVersion: v1
kind: Pod
metadata: {name: bench, labels: {app: bench}}
spec: {nodeName: node1, containers: [{name: main, image: fimbria/labtool, command: [labtool, sleep]}]}
"""


@dataclass(frozen=True, slots=True)
class Plugin:
    """A plugin binary with its configuration, and how to start a process where it belongs."""

    binary: str
    config: Mapping[str, Any]
    env: Mapping[str, str]
    within: Callable[[Callable[[], float]], float]

    def call(self, command: str, container: str, netns: Path, pod: str) -> float:
        """One whole process in ms, from before the fork until its end. Raises BenchError."""
        env = {
            "CNI_COMMAND": command, "CNI_CONTAINERID": container, "CNI_NETNS": str(netns), "CNI_IFNAME": "eth0",
            "CNI_ARGS": pod, "CNI_PATH": str(PLUGINS), "PATH": kernel.PATH, **self.env,
        }  # fmt: skip
        data = json.dumps(self.config).encode()
        return self.within(lambda: run_once(self.binary, env, data))


def run_once(binary: str, env: Mapping[str, str], stdin: bytes) -> float:
    """Fork, exec, configuration in, result out, end: in ms. Raises BenchError with the plugin's own words."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [binary], env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = process.communicate(stdin, timeout=120)
    took = time.perf_counter() - began
    if process.returncode:
        raise BenchError(f"{binary} {env['CNI_COMMAND']}: {(out or err).decode(errors='replace').strip()[:300]}")
    return took * 1000


def add_and_delete(settings: Settings) -> list[Figure]:
    """All figures of the CNI plugin."""
    runs = settings.times(RUNS, 10)
    with ExitStack() as stack:
        net = stack.enter_context(baseline.net("cni"))
        labs = [
            stack.enter_context(bench_lab(settings.say, f"cni{i}", nodes=1, agent_options=options))
            for i, options in enumerate(((), ("attach=clsact",)))
        ]
        args = [_pod(lab) for lab in labs]
        contest = {
            OURS: (_ours(labs[0]), args[0]),
            CLSACT: (_ours(labs[1]), args[1]),
            THEIRS: (_theirs(net, stack), ""),
        }
        for plugin, pod in contest.values():  # what only the first pod costs: identity, bridge
            _cycle(net, plugin, "warm", pod)
        settle(labs[0])
        before = agent_metrics(labs[0], "node1")
        samples: dict[tuple[str, str], list[float]] = {}
        settings.say(f"{runs} times ADD and DEL, ours and Debian's in turn")
        for i in range(runs):
            for name, (plugin, pod) in list(contest.items())[:: 1 if i % 2 else -1]:
                for command, took in _cycle(net, plugin, f"{name}{i}", pod).items():
                    samples.setdefault((name, command), []).append(took)
        after = agent_metrics(labs[0], "node1")
        floor = [_version(contest[OURS][0]) for _ in range(settings.times(50, 5))]
    return _figures(samples, floor, _agent_times(before, after))


def _pod(lab: Lab) -> str:
    """CNI_ARGS of a pod that exists in the API and that no runner starts: we are its runtime."""
    lab.kill("node1/runner")
    lab.apply(POD)
    uid = lab.pod("bench")["metadata"]["uid"]
    return f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=bench;K8S_POD_UID={uid}"


def _ours(lab: Lab) -> Plugin:
    config = {"cniVersion": "1.0.0", "name": "fimbria", "type": "fimbria-cni"}
    env = {"FIMBRIA_CNI_SOCKET": str(cni_socket(lab, "node1"))}
    return Plugin(kernel.binary("fimbria-cni"), config, env, lambda work: work())


def _theirs(net: baseline.Net, stack: ExitStack) -> Plugin:
    """Debian's, in a node of its own. Raises BenchError without it."""
    net.add("host", baseline.HOST)
    data = stack.enter_context(TemporaryDirectory(prefix="fimbench-"))
    thread = stack.enter_context(
        ThreadPoolExecutor(1, initializer=kernel.setns, initargs=(net.path("host"), kernel.CLONE_NEWNET))
    )
    return bridge(data, lambda work: thread.submit(work).result())


def bridge(data: str, within: Callable[[Callable[[], float]], float]) -> Plugin:
    """Debian's bridge with host-local, which keeps its state in `data`. Raises BenchError without it."""
    if not (PLUGINS / "bridge").exists():
        raise BenchError(f"{PLUGINS}/bridge is missing: install containernetworking-plugins")
    config = {
        "cniVersion": "1.0.0", "name": "fimbench", "type": "bridge", "bridge": "br0", "isGateway": True,
        "ipam": {"type": "host-local", "dataDir": data, "ranges": [[{"subnet": "10.8.0.0/16"}]],
                 "routes": [{"dst": "0.0.0.0/0"}]},
    }  # fmt: skip
    return Plugin(str(PLUGINS / "bridge"), config, {}, within)


def _cycle(net: baseline.Net, plugin: Plugin, name: str, pod: str) -> dict[str, float]:
    """A namespace made, ADD, DEL, the namespace removed; ms of the two commands."""
    net.bare(name)
    container = f"fimbench-{name}"
    try:
        return {c: plugin.call(c, container, net.path(name), pod) for c in ("ADD", "DEL")}
    finally:
        net.drop(name)
        time.sleep(CALM)


def _version(plugin: Plugin) -> float:
    """The shim's process without an agent's work: VERSION is answered by itself."""
    return run_once(plugin.binary, {"CNI_COMMAND": "VERSION", **components.ENVIRONMENT}, b"{}")


def _agent_times(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Mean ms that the agent says it spent on each command."""
    times = {}
    for command in ("ADD", "DEL"):
        seconds, count = (
            f'fimbria_cni_seconds_total{{command="{command}"}}',
            (f'fimbria_cni_requests_total{{code="0",command="{command}"}}'),
        )
        times[command] = 1000 * (after[seconds] - before[seconds]) / (after[count] - before[count])
    return times


def _figures(
    samples: Mapping[tuple[str, str], list[float]], floor: list[float], agent: Mapping[str, float]
) -> list[Figure]:
    found = []
    for command in ("ADD", "DEL"):
        theirs = samples[THEIRS, command]
        for name, title in ((OURS, f"CNI {command}"), (CLSACT, f"CNI {command}, --attach clsact")):
            ours, why = samples[name, command], GRACE if (name, command) == (OURS, "ADD") else ""
            split = f"mean inside the agent {agent[command]:.1f} ms; ours is dual-stack, the baseline IPv4 only"
            middle = figure(f"{title}, median", "ms", ours, baseline=theirs, against=BRIDGE, goal=AS_FAST,
                            note=split if name == OURS else "")  # fmt: skip
            last = tail(f"{title}, 99th percentile", "ms", ours, baseline=theirs, against=BRIDGE, goal=AS_FAST)
            found += [explain(middle, why), explain(last, why)]
    return [*found, figure("CNI process alone (VERSION)", "ms", floor)]
