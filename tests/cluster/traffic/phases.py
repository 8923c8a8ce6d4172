"""A pod's start and end, phase by phase, from the logs of kubelet (verbosity 2) and containerd (debug). Pure.

Both write a line at each step with a time to the microsecond; what the API server tells (podtimes.py) frames them. All
times are seconds since 1970.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

PHASES: Final[Mapping[str, tuple[str, str]]] = {
    "created until kubelet sees it": ("posted", "seen"),
    "kubelet's preparations": ("seen", "sandbox_began"),
    "sandbox before CNI (namespace, specification)": ("sandbox_began", "add_began"),
    "CNI ADD": ("add_began", "add_ended"),
    "sandbox after CNI (shim, runc)": ("add_ended", "sandbox_ended"),
    "container created": ("sandbox_ended", "container_created"),
    "container started": ("container_created", "container_started"),
    "started to Ready in the API": ("container_started", "ready"),
    "in all": ("posted", "ready"),
}
END_PHASES: Final[Mapping[str, tuple[str, str]]] = {
    "container stopped": ("removed", "stop_began"),
    "sandbox stopped": ("stop_began", "sandbox_exited"),
    "CNI DEL": ("sandbox_exited", "del_ended"),
    "in all": ("removed", "gone"),
}
_KUBELET: Final = re.compile(r'^I(\d{4} [\d:.]+) .*"SyncLoop ADD" source="api" pods=\[(.*)\]')
_CONTAINERD: Final = re.compile(r'^time="([^"]+)" level=\w+ msg="(.*)$')
_BEGAN: Final = re.compile(
    r"RunPodSandbox for &PodSandboxMetadata\{Name:[^,]*,Uid:([^,]*),Namespace:[^,]*,Attempt:\d+,\}(.*)$"
)
_GENERATED: Final = re.compile(r'generated id for sandbox name \\"[^\\]*_([0-9a-f-]{36})_\d+\\"" podsandboxid=(\w+)')
_CREATED: Final = re.compile(r'CreateContainer within sandbox \\"(\w+)\\" for &.* returns container id \\"(\w+)\\"')
_STARTED: Final = re.compile(r'StartContainer for \\"(\w+)\\" returns successfully')
_STOPPING: Final = re.compile(r'StopPodSandbox for \\"(\w+)\\""')
_TORN: Final = re.compile(r'TearDown network for sandbox \\"(\w+)\\" successfully')
_EXITED: Final = re.compile(r"received exit event &TaskExit\{ContainerID:(\w+),")


@dataclass
class Steps:
    """What the logs say of one pod; the last attempt counts. `failures` are containerd's refused sandboxes."""

    at: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


@dataclass
class _Known:
    """Whose each sandbox and container is, as far as the log has been read."""

    pods: dict[str, Steps] = field(default_factory=dict)
    sandboxes: dict[str, Steps] = field(default_factory=dict)
    containers: dict[str, Steps] = field(default_factory=dict)

    def step(self, at: float, text: str) -> None:
        """One line."""
        if found := _BEGAN.match(text):
            self._sandbox(at, self.pods.setdefault(found[1], Steps()), found[2])
        elif found := _GENERATED.match(text):
            self.sandboxes[found[2]] = self.pods.setdefault(found[1], Steps())
        elif text.startswith(("begin cni setup", "cni result")):
            sandbox = self.sandboxes.get(text.rpartition("podsandboxid=")[2])
            if sandbox is not None:
                sandbox.at["add_began" if text.startswith("begin") else "add_ended"] = at
        elif (found := _CREATED.match(text)) and found[1] in self.sandboxes:
            self.containers[found[2]] = self.sandboxes[found[1]]
            self.sandboxes[found[1]].at["container_created"] = at
        elif (found := _STARTED.match(text)) and found[1] in self.containers:
            self.containers[found[1]].at["container_started"] = at
        else:
            self._end(at, text)

    @staticmethod
    def _sandbox(at: float, pod: Steps, rest: str) -> None:
        if " returns sandbox id" in rest:
            pod.at["sandbox_ended"] = at
        elif " failed" in rest:
            pod.failures.append(rest)
        else:
            pod.at["sandbox_began"] = at

    def _end(self, at: float, text: str) -> None:
        for pattern, name in ((_STOPPING, "stop_began"), (_EXITED, "sandbox_exited"), (_TORN, "del_ended")):
            found = pattern.match(text)
            if found and found[1] in self.sandboxes:
                self.sandboxes[found[1]].at.setdefault(name, at)


def kubelet_steps(lines: Iterable[str], year: int) -> dict[str, float]:
    """When kubelet first saw each pod, by NAMESPACE/NAME. Its lines don't say the year; they are in UTC here."""
    seen: dict[str, float] = {}
    for line in lines:
        if found := _KUBELET.match(line):
            at = datetime.strptime(f"{year} {found[1]}", "%Y %m%d %H:%M:%S.%f").replace(tzinfo=UTC).timestamp()
            for name in re.findall(r'"([^"]+)"', found[2]):
                seen.setdefault(name, at)
    return seen


def containerd_steps(lines: Iterable[str]) -> dict[str, Steps]:
    """By the pod's uid."""
    known = _Known()
    for line in lines:
        if found := _CONTAINERD.match(line):
            known.step(_stamp(found[1]), found[2])
    return known.pods


def _stamp(text: str) -> float:
    """RFC 3339 with nanoseconds, of which Python takes six digits."""
    whole, _, rest = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{rest or 0}")


def durations(
    pod: Mapping[str, Any], seen: Mapping[str, float], steps: Mapping[str, Steps],
    phases: Mapping[str, tuple[str, str]] = PHASES, namespace: str = "default",
) -> dict[str, float]:  # fmt: skip
    """Seconds of each phase of one pod (a line of podtimes.py). A phase with an unknown end is left out."""
    at: dict[str, float] = {k: v for k, v in pod.items() if isinstance(v, float)}
    if (saw := seen.get(f"{namespace}/{pod['name']}")) is not None:
        at["seen"] = saw
    at |= steps[pod["uid"]].at if pod["uid"] in steps else {}
    return {name: at[end] - at[begin] for name, (begin, end) in phases.items() if begin in at and end in at}
