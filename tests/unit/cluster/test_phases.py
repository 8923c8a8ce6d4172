"""A pod's phases are read from the logs of kubelet and containerd."""

from __future__ import annotations

import pytest
from tests.cluster.traffic.phases import END_PHASES, PHASES, containerd_steps, durations, kubelet_steps

UID, SANDBOX, MAIN = "fa967554-af8f-4bb2-a488-326c132f0771", "d" * 64, "c" * 64
META = f"&PodSandboxMetadata{{Name:p1,Uid:{UID},Namespace:default,Attempt:0,}}"


def log(second: float, text: str, level: str = "info") -> str:
    return f'time="2026-11-23T15:27:{second:012.9f}Z" level={level} msg="{text}'


KUBELET = (
    'I1123 15:27:00.900000     756 kubelet.go:2709] "SyncLoop ADD" source="api" pods=["default/p1","default/p2"]',
    'I1123 15:27:01.900000     756 kubelet.go:2709] "SyncLoop ADD" source="api" pods=["default/p1"]',
    'E1123 15:27:02.900000     756 other.go:1] "SyncLoop ADD"',
)
STARTED = [
    log(1, f'RunPodSandbox for {META}"'),
    log(1.1, f'generated id for sandbox name \\"p1_default_{UID}_0\\"" podsandboxid={SANDBOX}', "debug"),
    log(1.2, f'begin cni setup" podsandboxid={SANDBOX}', "debug"),
    log(1.5, f'cni result: {{}}" podsandboxid={SANDBOX}', "debug"),
    log(2, f'RunPodSandbox for {META} returns sandbox id \\"{SANDBOX}\\""'),
    log(2.2, f'CreateContainer within sandbox \\"{SANDBOX}\\" for &ContainerMetadata{{Name:main,Attempt:0,}} '
             f'returns container id \\"{MAIN}\\""'),
    log(2.7, f'StartContainer for \\"{MAIN}\\" returns successfully"'),
]  # fmt: skip
ENDED = [
    log(5, f'StopPodSandbox for \\"{SANDBOX}\\""'),
    log(5.3, f'received exit event &TaskExit{{ContainerID:{SANDBOX},ID:{SANDBOX}}}"', "debug"),
    log(5.9, f'TearDown network for sandbox \\"{SANDBOX}\\" successfully"'),
]


def at(second: float) -> float:
    """Of that minute, in seconds since 1970."""
    return 1795447620.0 + second


def test_phases() -> None:
    seen, steps = kubelet_steps(KUBELET, 2026), containerd_steps([*STARTED, *ENDED, "no log line", "time="])
    pod = {"name": "p1", "uid": UID, "posted": at(0.8), "ready": at(3), "removed": at(4.5), "gone": at(7)}
    start, end = durations(pod, seen, steps), durations(pod, seen, steps, END_PHASES)
    assert start.keys() == PHASES.keys() and end.keys() == END_PHASES.keys()
    assert list(start.values()) == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.5, 0.2, 0.5, 0.3, 2.2], abs=1e-5)
    assert list(end.values()) == pytest.approx([0.5, 0.3, 0.6, 2.5], abs=1e-5)


def test_the_last_attempt_counts_and_failures_are_kept() -> None:
    failed = [log(0.2, f'RunPodSandbox for {META}"'), log(0.4, f'RunPodSandbox for {META} failed, error" error="x"')]
    steps = containerd_steps([*failed, *STARTED])
    assert steps[UID].at["sandbox_began"] == pytest.approx(at(1))
    assert len(steps[UID].failures) == 1


def test_what_is_not_known_is_left_out() -> None:
    pod = {"name": "p9", "uid": "unknown", "posted": at(0.8), "ready": None}
    assert durations(pod, {}, {}) == {}
