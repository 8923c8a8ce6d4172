"""What is written is read back whole; what can't be read is set aside and named."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest

from fimbria.agent import journal as journal_module
from fimbria.agent.journal import Journal
from fimbria.model.address import Prefix, pack
from fimbria.model.endpoint import EndpointIdentity, HostPort, LocalEndpoint
from fimbria.model.node import Node

ENDPOINT = LocalEndpoint(
    id=7, container_id="c", ifname="eth0", network="fimbria", netns="/run/netns/x", namespace="ns", pod="p", uid="u",
    host_ifname="fim1", ifindex=12, pod_mac=bytes(6), host_mac=bytes([2] * 6), addr4=pack("10.0.0.2"),
    addr6=pack("fd00::2"), host_ports=(HostPort(80, 8080, 6), HostPort(53, 53, 17, pack("192.0.2.1"))),
    netns_cookie=2**40,
)  # fmt: skip
IDENTITY = EndpointIdentity(256, {"k8s:app": "web"})
NODE = Node("n", (pack("192.0.2.1"),), (pack("10.0.0.1"),), (Prefix.parse("10.0.0.0/24"), Prefix.parse("fd00::/64")))


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "state")
    journal.open()
    return journal


def test_endpoints_come_back(journal: Journal) -> None:
    journal.save_endpoint(ENDPOINT, IDENTITY)
    assert journal.endpoints() == [(ENDPOINT, IDENTITY)]
    journal.save_endpoint(ENDPOINT, None)
    assert journal.endpoints() == [(ENDPOINT, None)]
    journal.remove_endpoint(7)
    journal.remove_endpoint(7)
    assert journal.endpoints() == []


def test_node_and_numbers_come_back(journal: Journal) -> None:
    assert journal.node() is None and journal.numbers() == {}
    journal.save_node(NODE)
    journal.save_numbers({"rules": {"a": 1}})
    assert journal.node() == NODE and journal.numbers() == {"rules": {"a": 1}}


@pytest.mark.parametrize("broken", ["", "{", "[]", "null", '{"endpoint": {}}', '{"endpoint": {"id": 1}}', "\x00" * 40])
def test_broken_files(journal: Journal, tmp_path: Path, caplog: Any, broken: str) -> None:
    journal.save_endpoint(ENDPOINT, IDENTITY)
    folder = tmp_path / "state"
    (folder / "endpoints/8.json").write_text(broken)
    (folder / "node.json").write_text(broken)
    (folder / "numbers.json").write_text(broken)
    assert journal.endpoints() == [(ENDPOINT, IDENTITY)], "its neighbours are read"
    assert (folder / "endpoints/8.bad").exists() and "8.json can't be read" in caplog.text
    assert journal.node() is None
    assert isinstance(journal.numbers(), dict)


def test_a_crash_while_writing_leaves_the_old_file(journal: Journal, tmp_path: Path) -> None:
    journal.save_endpoint(ENDPOINT, IDENTITY)
    (tmp_path / "state/endpoints/7.tmp").write_text('{"endpoi')
    assert journal.endpoints() == [(ENDPOINT, IDENTITY)]


def test_a_write_that_the_kernel_cuts_short_is_continued(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data)[:7]))
    journal.save_endpoint(ENDPOINT, IDENTITY)
    assert journal.endpoints() == [(ENDPOINT, IDENTITY)]


def test_only_one_agent(journal: Journal, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="another agent is running with"):
        Journal(tmp_path / "state").open()


def test_modes(journal: Journal, tmp_path: Path) -> None:
    journal.save_endpoint(ENDPOINT, IDENTITY)
    assert (tmp_path / "state/endpoints").stat().st_mode & 0o077 == 0
    assert (tmp_path / "state/endpoints/7.json").stat().st_mode & 0o177 == 0


def test_a_killed_agents_last_thread_is_waited_for(tmp_path: Path) -> None:
    first, second = Journal(tmp_path / "state"), Journal(tmp_path / "state")
    first.open()
    release = threading.Timer(0.2, os.close, [first._lock])
    release.start()
    second.open()
    release.join()


def test_a_living_agent_keeps_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "LOCK_PATIENCE", 0.05)
    living = Journal(tmp_path / "state")
    living.open()
    with pytest.raises(OSError, match="another agent"):
        Journal(tmp_path / "state").open()
