"""The node's devices and what the programs are told about them: at start, and whenever either changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fimbria.agent import datapath as dp
from fimbria.apply.devices import NodeDevices, find_uplinks, host_addresses
from fimbria.apply.programs import Constant
from fimbria.compute.network import routers
from fimbria.model.address import is_v4
from fimbria.model.network import DeviceSet
from fimbria.model.node import Node
from fimbria.model.rows import NO_ADDR

if TYPE_CHECKING:
    from fimbria.agent.main import Agent

log = logging.getLogger(__name__)


def prepare(agent: Agent, node: Node) -> None:
    """Make the devices and load the programs. Raises OSError naming what can't be."""
    config, addrs = agent.config, agent.registration.addrs
    underlay6 = not any(is_v4(a) for a in addrs)
    agent.maker = NodeDevices(
        agent.netlink, overlay=config.overlay, port=config.overlay_port, mtu=config.mtu, underlay6=underlay6
    )
    devices = _ensure(agent, node)
    agent.constants = _constants(agent, devices)
    agent.datapath.load(agent.constants)
    _remember(agent, devices)


async def refresh(agent: Agent) -> int:
    """Make devices again that are missing or wrong, and follow the node's blocks; returns the number of repairs.

    If that changes what programs are told they are loaded again, and swapped in. Raises OSError.
    """
    assert agent.maker is not None
    node = agent.engine.own_node()
    if node is None:
        return 0
    devices = _ensure(agent, node)
    for repair in agent.maker.repairs:
        log.warning("drift: %s behind our back; repaired", repair)
    constants = _constants(agent, devices)
    if constants != agent.constants:
        log.info("the node's devices or addresses changed: programs are loaded again")
        await asyncio.to_thread(agent.datapath.load, constants)
    known = agent.engine.ipcache.host_addrs
    if constants != agent.constants or devices != agent.devices:
        agent.constants = constants
        _remember(agent, devices)
        agent.engine.set_devices(devices)
        agent.rows.device_links.touch_all()
        agent.rows.xdp_links.touch_all()
        agent.rows.socket_links.touch_all()
        agent.loop.audit_soon(quick=True)
        await agent.loop.flush()
        agent.sweep()
    else:
        _remember(agent, devices)
        if agent.engine.ipcache.host_addrs != known:
            agent.engine.host_addresses_changed()
            await agent.loop.flush()
        if agent.maker.repairs:
            agent.loop.audit_soon(quick=True)
    return len(agent.maker.repairs)


def _ensure(agent: Agent, node: Node) -> DeviceSet:
    assert agent.maker is not None
    agent.pool.set_blocks(node.pod_cidrs)
    agent.wiring.routers = routers(node)
    uplinks = find_uplinks(agent.netlink, agent.config.devices, agent.registration.addrs)
    return agent.maker.ensure(uplinks, agent.wiring.routers)


def _remember(agent: Agent, devices: DeviceSet) -> None:
    agent.devices = devices
    agent.wiring.pod_mtu = devices.pod_mtu
    agent.engine.ipcache.host_addrs = host_addresses(agent.netlink)


def _constants(agent: Agent, devices: DeviceSet) -> Mapping[str, Constant]:
    addrs = agent.registration.addrs
    own4 = next((a for a in addrs if is_v4(a)), NO_ADDR)
    own6 = next((a for a in addrs if not is_v4(a)), NO_ADDR)
    return dp.constants(agent.config, devices, (own4, own6), agent.wiring.routers)
