"""Which devices are to run XDP, and which objects are loaded for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fimbria.agent.config import AgentConfig
from fimbria.agent.datapath import objects
from fimbria.agent.engine import DesiredRows, Engine, NumberBook
from fimbria.apply.xdp import XdpHook
from fimbria.model.network import DeviceSet
from fimbria.tables import Tables

DEVICES = DeviceSet(7, bytes(6), 9, (2, 3), 1500, 1450)


def engine(xdp: str) -> Engine:
    return Engine(Tables(), DesiredRows(), NumberBook(), node="n", cluster="c", overlay=True, xdp=xdp)


@pytest.mark.parametrize("mode", ["native", "generic", "best-effort"])
def test_uplinks_and_nothing_else_run_it(mode: str) -> None:
    made = engine(mode)
    made.set_devices(DEVICES)
    assert made.rows.xdp_links.desired == {XdpHook(2, mode): "from_device", XdpHook(3, mode): "from_device"}


def test_an_uplink_that_is_none_any_more_does_not() -> None:
    made = engine("native")
    made.set_devices(DEVICES)
    made.set_devices(replace(DEVICES, uplinks=(3, 4)))
    assert set(made.rows.xdp_links.desired) == {XdpHook(3, "native"), XdpHook(4, "native")}


def test_disabled_is_nowhere() -> None:
    made = engine("disabled")
    made.set_devices(DEVICES)
    assert not made.rows.xdp_links.desired
    assert "xdp" not in objects(AgentConfig())


def test_its_object_is_loaded_when_it_is_wanted() -> None:
    assert "xdp" in objects(AgentConfig(xdp="generic"))
