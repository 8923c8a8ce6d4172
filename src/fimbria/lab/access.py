"""Ways into a running lab: a shell in a node or a pod, and the logs of both."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fimbria.lab import components, kernel, state
from fimbria.lab.errors import LabError
from fimbria.lab.layout import Paths

RUNNER = Path("run/fimbria-runner")
POD_LOGS = Path("var/log/pods")
FOLLOW = 0.2  # seconds between two looks at a growing log


@dataclass(frozen=True)
class PodPlace:
    """Where a pod lives."""

    namespace: str
    name: str
    uid: str
    node: str
    containers: tuple[str, ...]

    @staticmethod
    def of(pod: dict[str, Any]) -> "PodPlace":
        """Raises LabError for a pod that has no node yet."""
        meta, spec = pod["metadata"], pod["spec"]
        if not spec.get("nodeName"):
            raise LabError(f"pod {meta['namespace']}/{meta['name']} isn't scheduled to a node yet")
        names = [c["name"] for c in (*(spec.get("containers") or ()), *(spec.get("initContainers") or ()))]
        return PodPlace(meta["namespace"], meta["name"], meta["uid"], spec["nodeName"], tuple(names))

    def container(self, name: str) -> str:
        """`name`, or the first one for "". Raises LabError."""
        if name and name not in self.containers:
            raise LabError(
                f"pod {self.namespace}/{self.name} has no container {name!r}; it has {', '.join(self.containers)}"
            )
        return name or self.containers[0]


def node_root(paths: Paths, node: str) -> Path:
    """The node's file system as seen from the machine. Raises LabError if the node isn't running."""
    init = state.recall(paths, f"{node}/{state.INIT}")
    if init is None or not init.alive():
        raise LabError(f"{node} of lab {paths.lab} isn't running")
    return Path(f"/proc/{init.pid}/root")


def pod_argv(paths: Paths, pod: PodPlace, container: str, argv: Sequence[str]) -> list[str]:
    """The command that runs `argv` inside a container. Raises LabError if the container isn't running."""
    name = pod.container(container)
    attempts = node_root(paths, pod.node) / RUNNER / pod.uid / "containers" / name
    last = max((int(p.name) for p in attempts.glob("[0-9]*")), default=-1)
    directory = attempts / str(last)
    if last < 0 or (directory / "exit").exists() or not (directory / "pid").exists():
        raise LabError(f"container {name} of pod {pod.namespace}/{pod.name} isn't running")
    pid = (directory / "pid").read_text().strip()
    inside = [
        kernel.binary("labrun"),
        "enter",
        "--cgroup",
        f"{components.NODE_CGROUP}/pods/{pod.uid}/{name}",
        "--target",
        pid,
    ]
    return [*components.enter(paths, pod.node), "--", *inside, "--", *argv]


def pod_log(paths: Paths, pod: PodPlace, container: str) -> Path:
    directory = f"{pod.namespace}_{pod.name}_{pod.uid}"
    return node_root(paths, pod.node) / POD_LOGS / directory / f"{pod.container(container)}.log"


def read_log(path: Path, follow: bool) -> Iterator[bytes]:
    """What is there, and with `follow` what comes, until the reader stops. Raises LabError if there is no such log."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise LabError(f"no log yet: {path.name}") from None
    with open(fd, "rb") as file:
        while True:
            data = file.read(1 << 16)
            if data:
                yield data
            elif follow:
                time.sleep(FOLLOW)
            else:
                return
