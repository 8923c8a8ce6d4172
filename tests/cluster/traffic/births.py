"""Pods that are born while something happens: each must get its network, and use it at once."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.cluster.bed import BedError
from tests.cluster.bed.layout import DNS_ADDRESS
from tests.cluster.traffic.generator import DNS_NAME, NAMESPACE, PORT, Traffic, pod
from tests.cluster.traffic.judge import clock

REPOSITORY: Final = Path(__file__).resolve().parents[3]
MOST: Final = 400
NEW: Final = ("connect", "ask")


def order(pods: Sequence[dict[str, Any]], mode: str, pause: float, patience: float, *, remove: bool = True) -> str:
    """What `podtimes` is told."""
    return json.dumps({"pods": pods, "mode": mode, "pause": pause, "remove": remove, "patience": patience}) + "\n"


@dataclass
class Births:
    """One pod every `pause` seconds on each node in turn, for as long as the body of `with` runs. The first thing that
    a pod does is to connect to servers on both nodes, a Service, the outside, and to ask for a name: if one of these
    fails, the pod has failed. It is Ready when kubelet can connect to it."""

    traffic: Traffic
    tag: str
    pause: float = 2.0
    patience: float = 120.0
    pods: list[dict[str, Any]] = field(default_factory=list)
    _process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        cluster = self.traffic.cluster
        command = [*cluster.enter("control"), "--", sys.executable, "-m", "tests.cluster.traffic.podtimes"]
        self._process = subprocess.Popen(
            [*command, str(cluster.layout.kubeconfig)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=REPOSITORY, env=cluster.control_env | {"PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(order(self._manifests(), "steady", self.pause, self.patience))
        self._process.stdin.flush()
        return self

    def _manifests(self) -> list[dict[str, Any]]:
        nodes, firsts = self.traffic.nodes, self._firsts()
        probe = {"tcpSocket": {"port": PORT}, "periodSeconds": 1}
        command = ["born", f"tcp/{PORT}", f"udp/{PORT}", "--", *firsts]
        spec = {"restartPolicy": "Never"}
        little = {"requests": {"cpu": "5m"}}  # those that wait for an agent add up, and a full node takes no more
        return [
            pod(
                f"born-{self.tag}-{i}",
                nodes[i % len(nodes)],
                command,
                spec=spec,
                readinessProbe=probe,
                resources=little,
            )
            for i in range(MOST)
        ]

    def _firsts(self) -> list[str]:
        near, far = (self.traffic.addresses(f"server-{n}")[0] for n in self.traffic.nodes[:2])
        (ip4, ip6), _ = self.traffic.fronts()
        targets = [(near, PORT), (far, PORT), (ip4, 80), (ip6, 80)]
        found = [f"{kind} {a},{kind},{a},{port},100" for a, port in targets for kind in NEW]
        return [*found, f"dns,dns,{DNS_ADDRESS},53,100,{DNS_NAME}"]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process is not None
        out, _ = self._process.communicate(timeout=2 * self.patience + 60)
        self.pods = [json.loads(line) for line in out.splitlines()]
        for one in self.pods:
            if one["ready"] is None:
                self._take_away(one)
        if kind is None:
            assert self._process.returncode == 0, out

    def _take_away(self, one: dict[str, Any]) -> None:
        """A pod that has failed, with its last words."""
        cluster = self.traffic.cluster
        try:
            one["said"] = cluster.kubectl("logs", "-n", NAMESPACE, one["name"])[-2000:]
        except BedError as error:
            one["said"] = str(error)
        cluster.kubectl("delete", "pod", "-n", NAMESPACE, one["name"], "--ignore-not-found", "--wait=false")

    # --- what came of them --------------------------------------------------------------------------------------------

    def broken(self) -> list[str]:
        """Those that never became Ready: what fails at first never does."""
        return [
            f"{p['name']}, posted {clock(p['posted'])}, was never Ready: {p['phase']} {p['reason']}, {p['said']}; "
            f"{p['refusals'][-1:]}"
            for p in self.pods
            if p["ready"] is None
        ]

    def delays(self, begin: float, end: float) -> list[float]:
        """Seconds from the request to Ready, of those whose start fell into a span."""
        ready = [p for p in self.pods if p["ready"]]
        return [p["ready"] - p["posted"] for p in ready if p["posted"] <= end and p["ready"] >= begin]

    def story(self, begin: float, end: float) -> str:
        """In one line, against those outside of the span."""
        within = self.delays(begin, end)
        calm = [p["ready"] - p["posted"] for p in self.pods if p["ready"] and (p["ready"] < begin or p["posted"] > end)]
        refused = sum(len(p["refusals"]) for p in self.pods)
        return (
            f"{len(self.pods)} pods born, {len(self.broken())} broken, {refused} attempts refused; to Ready within: "
            f"{_spread(within)}; before and after: {_spread(calm)}"
        )


def _spread(seconds: Sequence[float]) -> str:
    return f"median {statistics.median(seconds):.1f} s, longest {max(seconds):.1f} s" if seconds else "none"
