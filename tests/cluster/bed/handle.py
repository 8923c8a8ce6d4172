"""A node as tests see it."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.cluster.bed import processes
from tests.cluster.bed.boot import BINARIES
from tests.cluster.bed.node import CONTAINERD, KUBELET, NodeHost

COMMAND_SECONDS = 120.0


@dataclass(frozen=True)
class Node:
    """One that exists, running or not."""

    host: NodeHost

    @property
    def name(self) -> str:
        return self.host.name

    def exec(self, command: Sequence[str], *, stdin: str = "", seconds: float = COMMAND_SECONDS) -> str:
        """Runs in all namespaces of the node; its output. Raises BedError with what it said if it failed."""
        return processes.run([*self.host.enter(), "--", *command], stdin=stdin, env=self.env, seconds=seconds)

    def popen(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen([*self.host.enter(), "--", *command], env=self.env, text=True, **options)

    @property
    def env(self) -> dict[str, str]:
        return processes.environment() | {"PATH": f"{BINARIES}:{processes.PATH}"}

    def stop(self) -> None:
        """Pulls the plug; the disk stays."""
        self.host.stop()

    def start(self) -> None:
        """Starts it again, with another boot id and an empty /run."""
        self.host.boot()
        self.host.start_containerd()
        self.host.start_kubelet()

    def stop_kubelet(self) -> None:
        processes.stop(self.host.layout, self.name, KUBELET)

    def start_kubelet(self) -> None:
        self.host.start_kubelet()

    def restart_containerd(self) -> None:
        """Pods go on meanwhile."""
        processes.stop(self.host.layout, self.name, CONTAINERD)
        self.host.start_containerd()
