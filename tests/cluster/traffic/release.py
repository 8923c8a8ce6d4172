"""Fimbria as Helm knows it: upgraded, rolled back, and back to where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from tests.cluster.bed import Cluster
from tests.cluster.bed.install import CHART, NAMESPACE, RELEASE, merged, wait_rollout

AGENTS: Final = "daemonset/fimbria"
OPERATORS: Final = "deployment/fimbria-operator"
AGENT_LABEL: Final = "app.kubernetes.io/name=fimbria-agent"


class Release:
    """The chart's release on a cluster. Everything raises BedError."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def values(self) -> dict[str, Any]:
        """What the chart was told."""
        text = self.cluster.helm("get", "values", RELEASE, "--namespace", NAMESPACE, "--output", "json")
        return dict(json.loads(text) or {})

    def revision(self) -> int:
        """The one in force."""
        said = json.loads(self.cluster.helm("history", RELEASE, "--namespace", NAMESPACE, "--output", "json"))
        return int(next(one["revision"] for one in reversed(said) if one["status"] == "deployed"))

    def upgrade(self, values: Mapping[str, Any]) -> None:
        """With some values changed; returns when the API server has the objects."""
        file = self.cluster.layout.state / "upgrade-values.json"
        file.write_text(json.dumps(merged(self.values(), values)))
        self.cluster.helm("upgrade", RELEASE, str(CHART), "--namespace", NAMESPACE, "--values", str(file))

    def rollback(self, revision: int) -> None:
        """The same for a former revision."""
        self.cluster.helm("rollback", RELEASE, str(revision), "--namespace", NAMESPACE)

    def wait(self, agents: bool = True, seconds: float = 240) -> None:
        """Until agents and operators are all of today's revision, and ready."""
        wait_rollout(self.cluster, *([AGENTS] if agents else []), OPERATORS, seconds=seconds)

    @contextmanager
    def restored(self) -> Iterator[int]:
        """Whatever happens to the release within, afterwards it is as it was."""
        before = self.revision()
        try:
            yield before
        finally:
            if self.revision() != before:
                self.rollback(before)
            self.wait()

    # --- agents -------------------------------------------------------------------------------------------------------

    def agents(self) -> dict[str, dict[str, Any]]:
        """The agents' pods by node, without those that are ending or were only just made: the scheduler binds them."""
        found = self.cluster.get("pods", "-n", NAMESPACE, "-l", AGENT_LABEL)["items"]
        living = [p for p in found if not p["metadata"].get("deletionTimestamp")]
        return {p["spec"]["nodeName"]: p for p in living if "nodeName" in p["spec"]}

    def tags(self) -> dict[str, str]:
        """The tag that each node's agent runs."""
        return {n: p["spec"]["containers"][0]["image"].rpartition(":")[2] for n, p in self.agents().items()}

    def ready(self, node: str) -> bool:
        """Whether the node's agent says so."""
        pod = self.agents().get(node, {})
        return any(c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", ()))

    def restarts(self, node: str) -> int:
        """How often the agent's container was started again."""
        statuses = self.agents()[node]["status"].get("containerStatuses", ())
        return next((int(s["restartCount"]) for s in statuses if s["name"] == "agent"), 0)

    def kill(self, node: str) -> None:
        """SIGKILL to the agent's process, as the kernel's OOM killer sends it: nothing is told to anybody."""
        before = self.restarts(node)
        self.cluster.node(node).exec(["kill", "-9", str(self.process(node, "agent"))])
        self.until(lambda: self.restarts(node) > before and self.ready(node), 90, f"the agent of {node} is back")

    def process(self, node: str, command: str) -> int:
        """Number of `fimbria COMMAND` as its node counts."""
        for line in self.cluster.node(node).exec(["ps", "-eo", "pid=,args="]).splitlines():
            number, *words = line.split()
            if words[1:3] and words[1].endswith("/fimbria") and words[2] == command:
                return int(number)
        raise LookupError(f"{node} runs no fimbria {command}")

    @staticmethod
    def until(true: Any, seconds: float, what: str) -> None:
        """Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not true():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not after {seconds:.0f} s")
            time.sleep(0.5)
