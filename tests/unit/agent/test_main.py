"""What keeps the agent from starting: one sentence each, and the exit status."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fimbria.agent import main as agent
from fimbria.agent.config import AgentConfig
from fimbria.kernel import probe
from fimbria.model.address import pack
from fimbria.model.rows import FrontendKey

ALL = (1 << 41) - 1


@pytest.fixture(autouse=True)
def _able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing is missing, whatever this one lacks."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(probe, "capabilities", lambda status=None: ALL)
    monkeypatch.setattr(probe, "has_btf", lambda: True)
    monkeypatch.setattr(probe, "kernel_version", lambda: (6, 12))
    monkeypatch.setattr(probe, "cgroup2_mount", lambda mounts=None: "/sys/fs/cgroup")
    monkeypatch.setattr(probe, "bpffs_mounted", lambda path: True)


def start(capsys: Any, tmp_path: Path) -> tuple[int, list[str]]:
    code = agent.main(["--node-name", "n", "--kubeconfig", "/nowhere", "--run-dir", str(tmp_path)])
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("module", "name", "value", "said"), [
    (os, "geteuid", lambda: 1000, "must run as root"),
    (probe, "capabilities", lambda status=None: ALL & ~(1 << 12), "CAP_NET_ADMIN is missing"),
    (probe, "has_btf", lambda: False, "/sys/kernel/btf/vmlinux is missing"),
    (probe, "kernel_version", lambda: (5, 4), "5.15 or later is needed"),
    (probe, "bpffs_mounted", lambda path: False, "mount -t bpf bpf /sys/fs/bpf"),
])  # fmt: skip
def test_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, module: Any, name: str, value: Any, said: str
) -> None:
    monkeypatch.setattr(module, name, value)
    code, lines = start(capsys, tmp_path)
    assert code == 1 and len(lines) == 1 and said in lines[0] and lines[0].startswith("fimbria agent: ")


def test_a_missing_cgroup_is_told_and_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(probe, "cgroup2_mount", lambda mounts=None: None)
    code, lines = start(capsys, tmp_path)
    assert code == 1 and lines == [], "it got as far as the kubeconfig"
    assert "Services are translated by packet" in caplog.text and "/nowhere" in caplog.text


def test_tcx_that_is_demanded_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "has_tcx", lambda: False)
    with pytest.raises(agent.StartError, match=r"--attach tcx.*6\.6"):
        agent.choose_attach("tcx")
    assert agent.choose_attach("auto") == agent.choose_attach("clsact") == "clsact"


def test_a_setting_that_cannot_be_used(capsys: Any) -> None:
    assert agent.main(["--node-name", "n", "--masquerade-ports", "9-1"]) == 2
    assert "--masquerade-ports '9-1'" in capsys.readouterr().err


@pytest.mark.parametrize(("server", "ends"), [
    ("https://172.31.254.10:6443", {FrontendKey(pack("172.31.254.10"), 6443, 6)}),
    ("https://[2001:db8::1]", {FrontendKey(pack("2001:db8::1"), 443, 6)}),
    ("https://api.example:6443", set()),
])  # fmt: skip
def test_the_address_that_the_agent_was_given_is_the_api_servers(server: str, ends: set[FrontendKey]) -> None:
    assert agent.api_server_ends(server) == ends


@pytest.mark.parametrize(("masquerading", "nodes", "reserved"), [
    ("49152-65535", "30000-32767", "30000-32767,49152-65535"),
    ("40001-50000", "30000-40000", "30000-50000"),
    ("61000-65535", "62000-62000", "61000-65535"),
    ("61000-65535", "30000-30000", "30000,61000-65535"),
])  # fmt: skip
def test_no_socket_is_given_a_port_of_a_binding_or_of_a_service(masquerading: str, nodes: str, reserved: str) -> None:
    """Without masquerading, too: clients of Services have bindings of the same ports."""
    for masquerade in (True, False):
        config = AgentConfig(masquerade=masquerade, masquerade_ports=masquerading, node_ports=nodes)
        assert agent.reserved_ports(config) == reserved
