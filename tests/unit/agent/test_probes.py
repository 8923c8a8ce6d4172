"""What kubelet is told about an agent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fimbria.agent import probes
from fimbria.agent.config import AgentConfig
from fimbria.agent.install import CONF_NAME, install_config
from fimbria.agent.probes import Probes


@dataclass
class FakeLoop:
    stats: Any = field(default_factory=lambda: SimpleNamespace(audits=0))
    failed: dict[str, dict[str, str]] = field(default_factory=dict)

    def failures(self) -> dict[str, dict[str, str]]:
        return self.failed


@dataclass
class Node:
    """As much of an agent as the probes look at."""

    config: AgentConfig
    loop: FakeLoop = field(default_factory=FakeLoop)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    synced: bool = False

    @property
    def sources(self) -> Any:
        informer = SimpleNamespace(resource=SimpleNamespace(plural="pods"), table=SimpleNamespace(synced=self.synced))
        return SimpleNamespace(informers=[informer])


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    yield Node(AgentConfig(node_name="n", cni_conf_dir=str(tmp_path)))


def ask(checks: Probes, path: str) -> tuple[int, list[str]]:
    reply = checks.answer("127.0.0.1", 9879, path)
    return reply.status, reply.body.decode().splitlines()


def test_ready_is_when_the_node_forwards_and_the_runtime_knows(node: Node) -> None:
    found = Probes(node)  # type: ignore[arg-type]
    status, lines = ask(found, "/readyz")
    assert status == 503
    assert "[-]sources failed: not seen yet: pods" in lines
    assert "[-]start failed: the kernel isn't what it should be yet" in lines
    assert any(line.startswith("[-]cni failed: ") and CONF_NAME in line for line in lines)
    assert ask(found, "/livez") == (200, ["[+]loop ok"])

    node.synced = True
    node.ready.set()
    install_config(Path(node.config.cni_conf_dir))
    status, lines = ask(found, "/readyz")
    assert status == 200 and all(line.startswith("[+]") for line in lines)

    node.loop.failed = {"endpoints": {"1": "no room"}}  # one pod
    assert ask(found, "/readyz")[0] == 200
    node.loop.failed = {"routes": {"a": "10.0.0.0/24: no such device"}}  # all pods
    status, lines = ask(found, "/readyz")
    assert status == 503 and "[-]routes failed: 10.0.0.0/24: no such device" in lines


def test_alive_is_while_it_goes_on_comparing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    found, now = Probes(node), 1000.0  # type: ignore[arg-type]
    monkeypatch.setattr(probes.time, "monotonic", lambda: now)
    assert ask(found, "/livez")[0] == 200
    now += 10_000  # it waits for its first addresses: starting it again would help nobody
    assert ask(found, "/livez")[0] == 200
    node.ready.set()
    now += probes.STUCK_AT_LEAST - 1
    assert ask(found, "/livez")[0] == 200
    node.loop.stats.audits += 1
    assert ask(found, "/livez")[0] == 200
    now += probes.STUCK_AT_LEAST + 1
    assert ask(found, "/livez") == (503, ["[-]loop failed: nothing was compared with the kernel for 301 s"])


def test_nothing_else_is_told(node: Node) -> None:
    found = Probes(node)  # type: ignore[arg-type]
    assert ask(found, "/metrics")[0] == ask(found, "/")[0] == 404
