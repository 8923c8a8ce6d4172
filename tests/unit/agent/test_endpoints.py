"""What an agent that starts takes over from the one before, and what it clears away."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from fimbria.agent.endpoints import EndpointManager
from fimbria.agent.journal import Journal
from fimbria.decide.ipam import AddressPool
from fimbria.model.address import Prefix, pack
from fimbria.model.endpoint import EndpointIdentity, LocalEndpoint
from fimbria.tables import Tables

IDENTITY = EndpointIdentity(256, {"k8s:app": "web"})


def endpoint(number: int, addr: str = "", *, ifindex: int = 10) -> LocalEndpoint:
    return LocalEndpoint(
        id=number, container_id=f"c{number}", ifname="eth0", network="fimbria", netns="", namespace="ns",
        pod=f"p{number}", uid="", host_ifname=f"fim{number}", ifindex=ifindex, pod_mac=bytes(6), host_mac=bytes(6),
        addr4=pack(addr or f"10.0.0.{number}"),
    )  # fmt: skip


@dataclass
class FakeWiring:
    there: set[tuple[str, int]] = field(default_factory=set)
    removed: list[str] = field(default_factory=list)

    def host_exists(self, name: str, ifindex: int) -> bool:
        return (name, ifindex) in self.there

    def remove(self, name: str) -> None:
        self.removed.append(name)


@pytest.fixture
def manager(tmp_path: Path) -> EndpointManager:
    journal = Journal(tmp_path / "state")
    journal.open()
    pool = AddressPool()
    pool.set_blocks([Prefix.parse("10.0.0.0/24")])
    unused = cast(Any, None)
    return EndpointManager(Tables(), unused, unused, journal, pool, cast(Any, FakeWiring()), unused, unused, unused)


def test_what_still_has_its_interface_goes_on(manager: EndpointManager) -> None:
    manager.journal.save_endpoint(endpoint(5), IDENTITY)
    cast(FakeWiring, manager.wiring).there = {("fim5", 10)}
    assert manager.restore() == 1
    assert manager.tables.endpoints[5] == endpoint(5) and manager.tables.endpoint_identities[5] == IDENTITY
    assert manager.pool.owners == {pack("10.0.0.5"): "c5/eth0"}


@pytest.mark.parametrize("saved", [endpoint(5), endpoint(5, ifindex=0), endpoint(5, ifindex=11)])
def test_what_lost_it_or_never_had_it_is_cleared_away(manager: EndpointManager, saved: LocalEndpoint) -> None:
    manager.journal.save_endpoint(saved, IDENTITY)
    if saved.ifindex != 10:
        cast(FakeWiring, manager.wiring).there = {("fim5", 10)}  # another interface of that name
    assert manager.restore() == 0
    assert not manager.tables.endpoints and not manager.pool.owners and manager.journal.endpoints() == []
    assert cast(FakeWiring, manager.wiring).removed == ["fim5"]


def test_of_two_with_one_address_the_first_keeps_it(manager: EndpointManager, caplog: pytest.LogCaptureFixture) -> None:
    first, second = endpoint(5), replace(endpoint(6), addr4=pack("10.0.0.5"))
    for saved in (first, second):
        manager.journal.save_endpoint(saved, IDENTITY)
    cast(FakeWiring, manager.wiring).there = {("fim5", 10), ("fim6", 10)}
    assert manager.restore() == 1
    assert manager.pool.owners == {pack("10.0.0.5"): "c5/eth0"}
    assert "belongs to c5/eth0, not to c6/eth0" in caplog.text
    assert cast(FakeWiring, manager.wiring).removed == [], "a running pod's interface is left alone"
