"""Keeps resolved whoever is next on the way to other nodes and to clients, while XDP is on.

A program in a device's driver can't ask for a MAC and wait: what it finds no neighbour for goes to the stack, which
does. That one packet takes the slow way is no harm; that many do after every quiet time is. Without XDP nobody needs
this: tc programs redirect by `bpf_redirect_neigh`, which resolves. Hence it costs nothing then.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from fimbria.apply.network import MAIN_TABLE, mapped, plain
from fimbria.kernel import route
from fimbria.kernel.monitor import Group, Monitor
from fimbria.kernel.netlink import NetlinkError, NetlinkSocket, ResyncNeeded
from fimbria.model.network import NeighbourKey

if TYPE_CHECKING:
    from fimbria.agent.main import Agent

log = logging.getLogger(__name__)
GATHER: Final = 0.2
AGAIN: Final = 60.0
GROUPS: Final = (Group.LINK, Group.IPV4_ADDRESS, Group.IPV6_ADDRESS, Group.IPV4_ROUTE, Group.IPV6_ROUTE)


class NextHops:
    """For one agent: looks again whenever nodes, routes, addresses or devices change."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def run(self) -> None:
        """Follow until cancelled."""
        nodes = self._agent.tables.nodes.subscribe()
        loop = asyncio.get_running_loop()
        with Monitor(GROUPS) as monitor, NetlinkSocket() as netlink:

            def woken() -> None:
                # Until it is read the socket stays readable: the reader would spin while changes gather.
                loop.remove_reader(monitor.fileno())
                nodes.signal.set()

            try:
                while True:
                    loop.add_reader(monitor.fileno(), woken)
                    nodes.drain()
                    await self._look(netlink)
                    with suppress(TimeoutError):
                        async with asyncio.timeout(AGAIN):
                            await nodes.wait()
                    await asyncio.sleep(GATHER)
                    with suppress(ResyncNeeded):
                        monitor.read()
            finally:
                loop.remove_reader(monitor.fileno())

    async def _look(self, netlink: NetlinkSocket) -> None:
        agent = self._agent
        if agent.devices is None:
            return
        name = agent.config.node_name
        addrs = [a for n in agent.tables.nodes.values() if n.name != name for a in n.addrs]
        try:
            found = await asyncio.to_thread(next_hops, netlink, addrs, frozenset(agent.devices.uplinks))
        except OSError as error:
            log.error("the ways to other nodes can't be read: %s", error)
            return
        rows = agent.rows.next_hops
        rows.put_many(dict.fromkeys(found, True))
        rows.drop_many([k for k in rows.desired if k not in found])


def next_hops(netlink: NetlinkSocket, addrs: Iterable[bytes], uplinks: frozenset[int]) -> frozenset[NeighbourKey]:
    """Who is next on the way to these addresses (16 bytes), and every gateway, through these devices. Blocks.

    Raises NetlinkError.
    """
    found = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        for r in route.dump(netlink, family, table=MAIN_TABLE):
            hops = r.nexthops or (route.NextHop(r.oif, r.gateway),)
            found |= {(h.oif, h.gateway) for h in hops if h.gateway}
    for addr in addrs:
        try:
            way = route.lookup(netlink, plain(addr))
        except NetlinkError:
            continue  # prohibited, for one
        if way is not None:
            found.add((way.oif, way.gateway or plain(addr)))
    return frozenset(NeighbourKey(oif, mapped(gateway)) for oif, gateway in found if oif in uplinks)
