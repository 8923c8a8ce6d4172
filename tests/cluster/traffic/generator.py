"""Traffic over a real cluster that runs for as long as a test module does: every way that a packet can take.

Servers are one pod a node and one process in the world outside; clients are pods on both nodes, one in the host's
network, and one outside. `watch` judges a span of time.
"""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.cluster.bed import Cluster
from tests.cluster.bed.layout import DNS_ADDRESS, PAUSE_IMAGE, addresses
from tests.cluster.traffic.build import GeneratorError, ensure
from tests.cluster.traffic.judge import Verdict, clock, covered, judge

NAMESPACE: Final = "fim-traffic"
PORT: Final = 9400  # of all servers, TCP and UDP
FOLDER: Final = "/opt/fimbria-flows"
STREAM_MS, NEW_MS = 50, 100
DNS_NAME: Final = "flows.fim-traffic.svc.cluster.local"
ALL: Final = ("tcp", "connect", "udp", "ask")
PATIENCE: Final = 60.0


def container(arguments: Sequence[str], **more: Any) -> dict[str, Any]:
    """The generator in an image that needs nothing but to exist."""
    return {
        "name": "main", "image": PAUSE_IMAGE, "imagePullPolicy": "Never", "command": [f"{FOLDER}/flows", *arguments],
        "volumeMounts": [{"name": "flows", "mountPath": FOLDER, "readOnly": True}],
        # Without a share of the processors it would measure who else is busy.
        "resources": {"requests": {"cpu": "250m"}},
        "securityContext": {"capabilities": {"add": ["SYS_NICE", "NET_ADMIN"]}},
    } | more  # fmt: skip


def pod(
    name: str, node: str, arguments: Sequence[str], *, labels: Mapping[str, str] | None = None,
    spec: Mapping[str, Any] | None = None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """A manifest. `more` goes into the container, `spec` into the pod. The pod stays whatever taints its node gets."""
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": dict(labels or {"app": name})},
        "spec": {
            "nodeName": node, "terminationGracePeriodSeconds": 1, "enableServiceLinks": False,
            "automountServiceAccountToken": False, "tolerations": [{"operator": "Exists"}],
            "volumes": [{"name": "flows", "hostPath": {"path": FOLDER}}],
            "containers": [container(arguments, **more)],
        } | dict(spec or {}),
    }  # fmt: skip


def service() -> dict[str, Any]:
    """Both servers, in both families, also from outside."""
    ports = [{"name": p.lower(), "port": 80, "targetPort": PORT, "protocol": p} for p in ("TCP", "UDP")]
    spec = {"type": "NodePort", "ipFamilyPolicy": "RequireDualStack", "selector": {"app": "server"}, "ports": ports}
    metadata = {"name": "flows", "namespace": NAMESPACE}
    return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}


def ways(name: str, address: str, tcp: int = PORT, udp: int = PORT, kinds: Iterable[str] = ALL) -> list[str]:
    """Flows to one address, one of each kind."""
    port = {"tcp": tcp, "connect": tcp, "udp": udp, "ask": udp}
    pause = {"tcp": STREAM_MS, "udp": STREAM_MS, "connect": NEW_MS, "ask": NEW_MS}
    return [f"{name} {kind},{kind},{address},{port[kind]},{pause[kind]}" for kind in kinds]


@dataclass
class Watched:
    """What a span came to; complete once its `with` has ended. `marks` are what the test did, by time."""

    label: str
    begin: float = field(default_factory=time.time)
    end: float = 0.0
    verdict: Verdict = field(default_factory=lambda: Verdict((), {}))
    marks: list[tuple[float, str]] = field(default_factory=list)

    def mark(self, text: str) -> None:
        """Notes a step, so that a loss can be put down to one."""
        self.marks.append((time.time(), text))

    def story(self) -> str:
        """Steps and losses in their order."""
        lines = [(at, f"{clock(at)} -- {text}") for at, text in self.marks]
        lines += [(loss.at, str(loss)) for loss in (*self.verdict.losses[:200], *self.verdict.late[:50])]
        worst, who = self.verdict.worst
        head = (
            f"{self.label}: {self.end - self.begin:.1f} s, {self.verdict.sent} asked, "
            f"{len(self.verdict.losses)} lost; longest wait {worst * 1000:.0f} ms ({who})"
        )
        return "\n".join([head, *(text for _, text in sorted(lines))])


class Traffic:
    """`start` returns once everything answers; `stop` leaves nothing behind."""

    def __init__(self, cluster: Cluster, nodes: Sequence[str] = ("node1", "node2")) -> None:
        self.cluster, self.nodes = cluster, nodes
        self._folder = tempfile.TemporaryDirectory(prefix="fim")
        self._outside: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}

    def start(self) -> None:
        """Raises GeneratorError, BedError."""
        program = ensure()
        for node in self.nodes:
            _install(self.cluster, node, program)
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        serve = ["serve", f"tcp/{PORT}", f"udp/{PORT}"]
        probe = {"tcpSocket": {"port": PORT}, "periodSeconds": 1}
        servers = [pod(f"server-{n}", n, serve, labels={"app": "server"}, readinessProbe=probe) for n in self.nodes]
        self.apply(namespace, service(), *servers)
        self.wait_ready("app=server")
        self._outside["world server"] = self._beside("world server", *serve)
        labels = {"role": "client"}
        self.apply(*(pod(n, at, ["run", *f], spec=more, labels=labels) for n, at, f, more in self.clients()))
        self.wait_ready("role=client")
        self._outside["world"] = self._beside("world", "run", *self._from_outside())
        self._wait_answers()

    def stop(self) -> None:
        """Also of what was started only in part."""
        for process, _ in self._outside.values():
            process.send_signal(signal.SIGTERM)
            process.wait(10)
        self._outside.clear()
        self.cluster.kubectl("delete", "namespace", NAMESPACE, "--ignore-not-found", "--wait=true", "--timeout=90s")
        for node in self.nodes:
            self.cluster.node(node).exec(["rm", "-rf", FOLDER])
        self._folder.cleanup()

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """Raises BedError."""
        self.cluster.kubectl("apply", "-f", "-", stdin="\n---\n".join(json.dumps(o) for o in objects))

    def wait_ready(self, selector: str) -> None:
        """Raises BedError."""
        self.cluster.kubectl("wait", "-n", NAMESPACE, "pod", "-l", selector, "--for=condition=Ready", "--timeout=90s")

    # --- who talks to whom -----------------------------------------------------------------------------------------

    def addresses(self, name: str) -> list[str]:
        """A pod's, IPv4 first."""
        return [one["ip"] for one in self.cluster.get("pod", "-n", NAMESPACE, name)["status"]["podIPs"]]

    def fronts(self) -> tuple[list[str], dict[str, int]]:
        """The Service's addresses, and its node ports by protocol."""
        spec = self.cluster.get("service", "-n", NAMESPACE, "flows")["spec"]
        return spec["clusterIPs"], {p["protocol"].lower(): p["nodePort"] for p in spec["ports"]}

    def clients(self) -> list[tuple[str, str, list[str], dict[str, Any]]]:
        """Name, node, flows, and what else its pod needs."""
        first, second = self.nodes[:2]
        near, far = self.addresses(f"server-{first}"), self.addresses(f"server-{second}")
        (ip4, ip6), _ = self.fronts()
        world = addresses("world")
        dns = [f"dns,dns,{DNS_ADDRESS},53,{2 * NEW_MS},{DNS_NAME}"]
        one = [
            *ways("near", near[0]), *ways("far", far[0]), *ways("far6", far[1], kinds=("tcp", "connect", "udp")),
            *ways("service", ip4, 80, 80), *ways("service6", ip6, 80, 80, kinds=("connect", "ask")),
            *ways("out", str(world.ipv4)), *ways("out6", str(world.ipv6), kinds=("connect",)), *dns,
        ]  # fmt: skip
        two = [
            *ways("far", near[0], kinds=("tcp", "connect", "udp")), *ways("near", far[0], kinds=("connect", "ask")),
            *ways("service", ip4, 80, 80, kinds=("connect", "ask")),
            *ways("out", str(world.ipv4), kinds=("connect", "ask")), *dns,
        ]  # fmt: skip
        host = [
            *ways("near", near[0], kinds=("tcp", "ask")), *ways("far", far[0], kinds=("tcp", "connect", "ask")),
            *ways("service", ip4, 80, 80, kinds=("connect", "ask")),
        ]  # fmt: skip
        return [
            ("client1", first, one, {}), ("client2", second, two, {}), ("host1", first, host, {"hostNetwork": True}),
        ]  # fmt: skip

    def _from_outside(self) -> list[str]:
        _, port = self.fronts()
        first, second = (addresses(n) for n in self.nodes[:2])
        return [
            *ways("nodeport1", str(first.ipv4), port["tcp"], port["udp"]),
            *ways("nodeport2", str(second.ipv4), port["tcp"], port["udp"], kinds=("connect", "ask")),
            *ways("nodeport6", str(second.ipv6), port["tcp"], port["udp"], kinds=("tcp", "connect", "ask")),
        ]

    # --- what came of it -------------------------------------------------------------------------------------------

    def lines(self) -> dict[str, list[str]]:
        """What each client has said so far."""
        found = {}
        for name in ("client1", "client2", "host1"):
            found[name] = _whole(self.cluster.kubectl("logs", "-n", NAMESPACE, name))
        found["world"] = _whole(self._outside["world"][1].read_text())
        return found

    @contextmanager
    def watch(self, label: str) -> Iterator[Watched]:
        """Judges what happens within. What is still under way at its end is waited for."""
        watched = Watched(label)
        try:
            yield watched
        finally:
            watched.end = time.time()
            lines = self._until(lambda now: all(covered(said) >= watched.end for said in now.values()))
            watched.verdict = judge(lines, watched.begin, watched.end)

    def _until(self, enough: Callable[[dict[str, list[str]]], bool]) -> dict[str, list[str]]:
        deadline = time.monotonic() + PATIENCE
        while not enough(lines := self.lines()):
            if time.monotonic() > deadline:
                break  # the judge finds who is silent
            time.sleep(1)
        return lines

    def _wait_answers(self) -> None:
        """Until every flow has an answer and a second went by without a loss."""
        deadline = time.monotonic() + PATIENCE
        while True:
            begin = time.time()
            time.sleep(1)
            with self.watch("start") as seen:
                pass
            verdict = judge(self.lines(), begin, seen.end)
            if verdict.flows and not verdict.losses:
                return
            if time.monotonic() > deadline:
                raise GeneratorError("\n".join(map(str, verdict.losses)) or "no client has said anything")

    def _beside(self, name: str, *arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
        """In the world outside."""
        path = Path(self._folder.name, name)
        with path.open("wb") as out:
            process = subprocess.Popen([*self.cluster.enter("world"), "--", str(ensure()), *arguments], stdout=out)
        return process, path


def _whole(text: str) -> list[str]:
    """Lines, without one that is being written."""
    return text[: text.rfind("\n") + 1].splitlines()


def _install(cluster: Cluster, node: str, program: Path) -> None:
    command = [*cluster.enter(node), "--", "install", "-D", "-m", "755", "/dev/stdin", f"{FOLDER}/flows"]
    with program.open("rb") as stdin:
        subprocess.run(command, stdin=stdin, check=True, capture_output=True)
