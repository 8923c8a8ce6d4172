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
AS_FAST: Final = Goal("ratio", "<=", 1.0)
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
        lab = stack.enter_context(bench_lab(settings.say, "cni", nodes=1))
        pod_args = _pod(lab)
        net = stack.enter_context(baseline.net("cni"))
        ours = _ours(lab)
        theirs = _theirs(net, stack)
        for plugin in (ours, theirs):  # what only the first pod costs: identity, bridge
            _cycle(net, plugin, "warm", pod_args)
        settle(lab)
        before = agent_metrics(lab, "node1")
        samples: dict[tuple[str, str], list[float]] = {}
        settings.say(f"{runs} times ADD and DEL, ours and Debian's in turn")
        for i in range(runs):
            for name, plugin in (("ours", ours), ("theirs", theirs))[:: 1 if i % 2 else -1]:
                for command, took in _cycle(net, plugin, f"{name}{i}", pod_args).items():
                    samples.setdefault((name, command), []).append(took)
        after = agent_metrics(lab, "node1")
        floor = [_version(ours) for _ in range(settings.times(50, 5))]
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
    """Raises BenchError without Debian's plugins."""
    if not (PLUGINS / "bridge").exists():
        raise BenchError(f"{PLUGINS}/bridge is missing: install containernetworking-plugins")
    net.add("host", baseline.HOST)
    data = stack.enter_context(TemporaryDirectory(prefix="fimbench-"))
    config = {
        "cniVersion": "1.0.0", "name": "fimbench", "type": "bridge", "bridge": "br0", "isGateway": True,
        "ipam": {"type": "host-local", "dataDir": data, "ranges": [[{"subnet": "10.8.0.0/16"}]],
                 "routes": [{"dst": "0.0.0.0/0"}]},
    }  # fmt: skip
    thread = stack.enter_context(
        ThreadPoolExecutor(1, initializer=kernel.setns, initargs=(net.path("host"), kernel.CLONE_NEWNET))
    )
    return Plugin(str(PLUGINS / "bridge"), config, {}, lambda work: thread.submit(work).result())


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
        ours, theirs = samples["ours", command], samples["theirs", command]
        against = "bridge + host-local"
        split = f"mean inside the agent {agent[command]:.1f} ms; ours is dual-stack, the baseline IPv4 only"
        found += [
            explain(figure(f"CNI {command}, median", "ms", ours, baseline=theirs, against=against, goal=AS_FAST,
                           note=split)),
            explain(tail(f"CNI {command}, 99th percentile", "ms", ours, baseline=theirs, against=against,
                         goal=AS_FAST)),
        ]  # fmt: skip
    return [*found, figure("CNI process alone (VERSION)", "ms", floor)]
