"""Services in a lab: servers and clients in every place, and what a connection through a frontend came to."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from traffic import Recorded, agent, pod

from fimbria.lab import kernel
from fimbria.lab.handle import Lab

TCP, UDP, TCP_TARGET, UDP_TARGET = 80, 81, 9000, 9001  # of a Service, and of its pods
FAMILIES = (4, 6)
EXTERNAL = {4: "203.0.113.200", 6: "2001:db8:113::200"}
ASKS = 36  # one of two backends is missed once in 30 billion times; a run of all tests asks a thousand times
# Goes on serving for a while after SIGTERM, as a server does that is taken out of its Service gracefully.
GRACEFUL = "trap 'sleep {linger}; kill $!' TERM; labtool serve --http 8080 --tcp 9000 --udp 9001 & wait; wait"


def server(name: str, node: str, app: str = "server", linger: float = 0) -> str:
    """A server's manifest; it goes on for `linger` seconds after it was told to end."""
    if not linger:
        return pod(name, node, app)
    command = json.dumps(["sh", "-c", GRACEFUL.format(linger=linger)])
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {app}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 20
  containers: [{{name: main, image: fimbria/labtool, command: {command}}}]
---
"""


def service(name: str, app: str = "server", annotations: Mapping[str, str] | None = None, **spec: Any) -> str:
    """A dual-stack Service's manifest, with a TCP and a UDP port."""
    ports = [
        {"name": "tcp", "port": TCP, "targetPort": TCP_TARGET},
        {"name": "udp", "port": UDP, "targetPort": UDP_TARGET, "protocol": "UDP"},
    ]
    body = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "annotations": dict(annotations or {})},
        "spec": {"ipFamilyPolicy": "PreferDualStack", "selector": {"app": app}, "ports": ports} | spec,
    }
    return json.dumps(body) + "\n---\n"


@dataclass
class Front:
    """A Service as the API server has it, with the addresses that it is reached at."""

    lab: Lab
    name: str

    @cached_property
    def object(self) -> dict[str, Any]:
        return self.lab.request("GET", f"/api/v1/namespaces/default/services/{self.name}")

    def cluster_ip(self, family: int) -> str:
        return next(a for a in self.object["spec"]["clusterIPs"] if (":" in a) == (family == 6))

    def node_port(self, port: int) -> int:
        return next(int(p["nodePort"]) for p in self.object["spec"]["ports"] if p["port"] == port)

    def balancer(self, family: int) -> str:
        """The load balancer's address, once the cloud has given it."""

        def look() -> str:
            self.__dict__.pop("object", None)
            ingress = self.object["status"]["loadBalancer"].get("ingress") or ()
            return str(next((one["ip"] for one in ingress if (":" in one["ip"]) == (family == 6)), ""))

        return self.lab.wait(f"{self.name} has an address", look)

    @property
    def health_port(self) -> int:
        return int(self.object["spec"]["healthCheckNodePort"])


def node_address(lab: Lab, node: str, family: int) -> str:
    return lab.spec.node(node).ipv4 if family == 4 else lab.spec.node(node).ipv6


def world_address(lab: Lab, family: int) -> str:
    return lab.spec.world.ipv4 if family == 4 else lab.spec.world.ipv6


def node_addresses(lab: Lab, node: str) -> set[str]:
    """All that a node itself may send from: its own addresses and its routers'."""
    found = next(n for n in agent(lab, "node1", "nodes") if n["name"] == node)
    return {*found["addresses"], *found["routers"]}


@dataclass(frozen=True)
class Answers:
    """What several connections came to: results, and of those that succeeded who answered and whom the server saw."""

    results: tuple[str, ...]
    names: tuple[str, ...]
    peers: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return bool(self.results) and set(self.results) == {"ok"}

    def seen(self, name: str) -> set[str]:
        """Clients' addresses as one server saw them."""
        return {p for n, p in zip(self.names, self.peers, strict=True) if n == name}


def host_of(endpoint: str) -> str:
    """The address in `1.2.3.4:80` or `[fd00::1]:80`."""
    return endpoint.rpartition(":")[0].strip("[]")


def ask(lab: Lab, source: str, proto: str, host: str, port: int, *, count: int = ASKS, timeout: int = 2000,
        options: Iterable[str] = ()) -> Answers:  # fmt: skip
    """Connections one after the other from a place of the lab."""
    command = (kernel.binary("labtool"), "probe", proto, host, str(port), "--count", str(count))
    done = lab.run(source, *command, "--timeout", str(timeout), *options)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == count, (source, host, port, done.stdout, done.stderr)
    good = [r["answer"] for r in rows if r["result"] == "ok"]
    return Answers(
        tuple(r["result"] for r in rows), tuple(a["name"] for a in good), tuple(host_of(a["peer"]) for a in good)
    )


def wait_answers(lab: Lab, source: str, host: str, port: int, proto: str = "tcp", names: Iterable[str] = ()) -> None:
    """Until a frontend answers, by all of `names` if some are given."""
    wanted, said = set(names), Answers((), (), ())

    def look() -> bool:
        nonlocal said
        said = ask(lab, source, proto, host, port, count=ASKS if wanted else 1, timeout=300)
        return said.ok and wanted <= set(said.names)

    try:
        lab.wait(f"{host} port {port} answers {source}", look, 15)
    except Exception as error:
        raise AssertionError(f"{error}: {said}") from error


def script(lab: Lab, target: str, text: str, *args: object, patience: float = 30) -> list[Any]:
    """Runs Python in a place of the lab; returns the JSON lines that it prints."""
    argv = lab.argv(target, "python3", "-c", text, *map(str, args))
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=patience)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@dataclass
class Clients:
    """Connections all the time while the body of `with` runs: `streams` live from its beginning to its end, `news` are
    made anew every few milliseconds. Afterwards none may have failed."""

    lab: Lab
    news: Mapping[str, tuple[str, str, str, int]] = field(default_factory=dict)  # label -> source, proto, host, port
    streams: Mapping[str, tuple[str, str, str, int]] = field(default_factory=dict)
    interval: int = 10  # milliseconds
    stall: int = 2000
    verdict: list[str] = field(default_factory=list)
    connections: int = 0
    _running: dict[str, Recorded] = field(default_factory=dict)
    _folder: tempfile.TemporaryDirectory[str] = field(default_factory=lambda: tempfile.TemporaryDirectory("fim"))
    _started: float = 0.0

    def __enter__(self) -> Self:
        for label, where in self.streams.items():
            options = ("--interval", "20000", "--stall", str(self.stall), "--timeout", "3000")
            (first, *_) = self._start(f"stream {label}", "stream", where, options)
            assert json.loads(first).get("event") == "connected", (label, first)
        for label, where in self.news.items():
            # Time for a lost SYN or two to be sent again: a client would wait, too. A lost datagram is a failure.
            options = ("--count", "10000000", "--interval", str(self.interval), "--timeout", "3500")
            self._start(f"new {label}", "probe", where, options)
        self._started = time.monotonic()
        return self

    def _start(self, label: str, mode: str, where: tuple[str, str, str, int], options: tuple[str, ...]) -> list[str]:
        """Returns what it says first."""
        source, *target = where
        path = Path(self._folder.name, str(len(self._running)))
        client = self._running[label] = Recorded.start(self.lab, source, path, mode, *map(str, target), *options)
        return self.lab.wait(f"{label} begins", client.lines)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        time.sleep(max(self._started + 1 - time.monotonic(), 0.5))  # what broke a moment ago shows a moment later
        for client in self._running.values():
            client.process.send_signal(signal.SIGTERM)
        for label, client in self._running.items():
            self._judge(label, [json.loads(line) for line in client.end() if line.startswith("{")])
        self._folder.cleanup()
        if kind is None:
            assert self.verdict == [], "\n".join(self.verdict)

    def _judge(self, label: str, rows: list[dict[str, Any]]) -> None:
        if label.startswith("stream"):
            if not rows or not rows[-1].get("ok"):
                self.verdict.append(f"{label}: {rows[-3:]}")
            return
        results = [r["result"] for r in rows][:-1]  # the last one may have been ended by us
        self.connections += len(results)
        failed = [(at, r) for at, r in enumerate(results) if r != "ok"]
        if failed or len(results) < 5:
            self.verdict.append(f"{label}: {len(failed)} of {len(results)} new connections failed: {failed[:10]}")
