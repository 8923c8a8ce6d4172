"""Traffic that runs while something happens to the lab, and whether the lab is as it should be afterwards."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fimbria.lab import components, kernel, state
from fimbria.lab.handle import Lab
from fimbria.lab.layout import Paths

TCP, UDP = 9000, 9001
STALL_MS = 1000  # TCP on a busy machine; a lost packet of UDP is noticed at once, whatever the load

PODS = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {app}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers: [{{name: main, image: fimbria/labtool{command}}}]
---
"""
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: servers}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: server}
  ports: [{name: tcp, port: 9000}, {name: udp, port: 9001, protocol: UDP}]
"""


def pod(name: str, node: str, app: str = "", *, sleeps: bool = False) -> str:
    """A pod's manifest: a server of the lab's tool, or one that only sleeps."""
    return PODS.format(name=name, node=node, app=app or name, command=", command: [labtool, sleep]" if sleeps else "")


def start_pods(lab: Lab) -> None:
    """`client` and `near` on node1, `far` on node2, and the Service `servers` over both servers."""
    lab.apply(pod("client", "node1", sleeps=True) + pod("near", "node1", "server") + pod("far", "node2", "server"))
    lab.apply(SERVICE)
    lab.wait_ready(["client", "near", "far"])
    lab.wait("the Service answers", lambda: all(_answers(lab, a) for a in cluster_ips(lab)))


def cluster_ips(lab: Lab) -> list[str]:
    found: list[str] = lab.request("GET", "/api/v1/namespaces/default/services/servers")["spec"]["clusterIPs"]
    return found


def _answers(lab: Lab, address: str) -> bool:
    return bool(lab.probe("client", "udp", address, UDP, "--timeout", "300")["result"] == "ok")


@dataclass
class Recorded:
    """A client of the lab's tool that writes to a file: a pipe that nobody reads would stop it."""

    process: subprocess.Popen[bytes]
    path: Path

    @staticmethod
    def start(lab: Lab, source: str, path: Path, *command: str) -> Recorded:
        argv = lab.argv(source, kernel.binary("labtool"), *command)
        with path.open("wb") as out:
            process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env=components.ENVIRONMENT)
        return Recorded(process, path)

    def lines(self) -> list[str]:
        """What it has said, whole lines only."""
        return self.path.read_text().rpartition("\n")[0].splitlines()

    def end(self) -> list[str]:
        """Waits for it, and returns all that it said."""
        self.process.wait(60)
        return self.lines()


@dataclass
class Traffic:
    """Streams and new connections from `client` while the body of `with` runs; then `verdict` must be empty.

    TCP and UDP, both families, to `near`, `far` and the Service; a new connection every 50 ms.
    """

    lab: Lab
    verdict: list[str] = field(default_factory=list)
    _started: float = 0.0
    _streams: dict[str, Recorded] = field(default_factory=dict)
    _probes: dict[str, Recorded] = field(default_factory=dict)
    _folder: tempfile.TemporaryDirectory[str] = field(default_factory=lambda: tempfile.TemporaryDirectory("fim"))

    def __enter__(self) -> Self:
        targets = [(n, a) for n in ("near", "far") for a in self.lab.addresses(n)]
        services = [("service", a) for a in cluster_ips(self.lab)]
        options = ("--interval", "20000", "--stall", str(STALL_MS), "--timeout", "3000")
        for name, address in targets + services:
            self._streams[f"tcp {name} {address}"] = self._start("stream", "tcp", address, str(TCP), *options)
            self._streams[f"udp {name} {address}"] = self._start("stream", "udp", address, str(UDP), *options)
        forever = ("--count", "1000000", "--interval", "50", "--timeout", "3000")
        for name, address in (targets[0], targets[3], *services):
            self._probes[f"new {name} {address}"] = self._start("probe", "tcp", address, str(TCP), *forever)
        for what, client in (*self._streams.items(), *self._probes.items()):
            self.lab.wait(f"{what} begins", client.lines)
        for what, client in self._streams.items():
            assert json.loads(client.lines()[0]).get("event") == "connected", (what, client.lines())
        self._started = time.monotonic()
        return self

    def _start(self, *command: str) -> Recorded:
        path = Path(self._folder.name, str(len(self._streams) + len(self._probes)))
        return Recorded.start(self.lab, "client", path, *command)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        time.sleep(max(self._started + 1 - time.monotonic(), 0.2))  # what was broken a moment ago shows a moment later
        for client in (*self._streams.values(), *self._probes.values()):
            client.process.send_signal(signal.SIGTERM)
        said = {w: c.end() for w, c in (*self._streams.items(), *self._probes.items())}
        self._folder.cleanup()
        for what in self._streams:
            outcome = json.loads(said[what][-1])
            if not outcome.get("ok"):
                self.verdict.append(f"{what}: {said[what]}")
        for what in self._probes:
            results = [json.loads(line)["result"] for line in said[what]]
            failed = [r for r in results[:-1] if r != "ok"]  # the last one may have been ended by us
            if failed or len(results) < 5:
                self.verdict.append(f"{what}: {len(failed)} of {len(results)} new connections failed: {set(failed)}")
        if kind is None:
            assert self.verdict == [], "\n".join(self.verdict)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("agent", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def node_root(lab: Lab, node: str) -> Path:
    """A node's file system, seen from the machine."""
    init = state.recall(Paths(lab.spec.name), f"{node}/{state.INIT}")
    assert init is not None
    return Path(f"/proc/{init.pid}/root")


def agent(lab: Lab, node: str, what: str) -> Any:
    """GET /v1/`what` of a node's agent: JSON, or text for metrics. Raises OSError while the agent is away."""
    connection = _UnixConnection(str(node_root(lab, node) / "run/fimbria/agent.sock"))
    try:
        connection.request("GET", f"/v1/{what}")
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, (what, body)
        return body.decode() if what == "metrics" else json.loads(body)
    except http.client.HTTPException as error:  # half an answer of one that was just killed
        raise OSError(f"agent of {node}: {error!r}") from error
    finally:
        connection.close()


def metric(lab: Lab, node: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples with these labels."""
    wanted = [f'{k}="{v}"' for k, v in labels.items()]
    lines = [line for line in agent(lab, node, "metrics").splitlines() if line.startswith((name + "{", name + " "))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(w in line for w in wanted))


def ready(lab: Lab, node: str) -> bool:
    """Whether the node's agent says so."""
    try:
        return bool(agent(lab, node, "status")["ready"])
    except OSError:
        return False


def starved(lab: Lab) -> float:
    """Seconds that the lab's processes and this one have waited for a processor so far: what a busy machine adds to the
    time that something takes (Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat, second field)."""
    total = 0
    for pid in (os.getpid(), *(p.pid for p in state.processes(lab.paths).values())):
        for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with suppress(OSError):
                total += int(path.read_text().split()[1])
    return total / 1e9


def wait_soon(lab: Lab, what: str, condition: Callable[[], object], limit: float) -> float:
    """Waits, and fails if it took `limit` seconds or more beyond what the machine let the lab's processes wait for a
    processor. Returns the seconds that it took."""
    began, before = time.monotonic(), starved(lab)
    lab.wait(what, condition, limit + 60)
    took, excused = time.monotonic() - began, max(starved(lab) - before, 0.0)
    assert took - excused < limit, f"{what}: after {took:.1f} s, of which {excused:.1f} s without a processor"
    return took


def wait_settled(lab: Lab, patience: float = 60.0) -> None:
    """Until every agent is ready, has nothing left to change in the kernel and no row that can't be written."""
    for node in lab.spec.node_names:
        lab.wait(f"agent of {node} is ready", lambda n=node: ready(lab, n), patience)  # type: ignore[misc]

        def settled(n: str = node) -> bool:
            return bool(agent(lab, n, "plan") == [] and agent(lab, n, "status")["failures"] == {})

        try:
            lab.wait(f"{node} has nothing to change", settled, patience)
        except Exception as error:
            found = agent(lab, node, "plan"), agent(lab, node, "status")["failures"]
            raise AssertionError(f"{node}: still to change and failed: {found}") from error


def cni(lab: Lab, command: str, container: str, netns: str, pod_name: str, uid: str) -> tuple[int, dict[str, Any]]:
    """A request to node1's plugin as a runtime makes it for a pod: exit status and what was printed."""
    args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod_name};K8S_POD_UID={uid}"
    env = {"COMMAND": command, "CONTAINERID": container, "NETNS": netns, "IFNAME": "eth0", "PATH": "/x", "ARGS": args}
    config = '{"cniVersion":"1.1.0","name":"fimbria","type":"fimbria-cni"}'
    # The plugin reads its standard input to the end.
    script = 'printf %s "$1" | /opt/cni/bin/fimbria-cni'
    argv = lab.argv("node/node1", "env", *(f"CNI_{k}={v}" for k, v in env.items()), "sh", "-c", script, "sh", config)
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout) if done.stdout else {}


def set_options(lab: Lab, *options: str) -> None:
    """Settings (NAME=VALUE) that agents get when they are started again."""
    spec = lab.spec.to_json() | {"agent_options": list(options)}
    state.write(lab.paths.spec, json.dumps(spec))
