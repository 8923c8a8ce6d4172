"""Keeps what others could change as it should be: devices, pins, links, routes, neighbours, sysctls.

Rules
1. What the kernel tells of (routes, neighbours, devices, addresses, filters) is looked at when it tells; what it says
   nothing about (links, pins, sysctls) once a second, by cheap reads. The rows of maps wait for the audit.
2. Deciding whether a notification concerns us is pure (`concerns`); our own changes never do.
3. Repair is the apply loop's: this only asks for an audit, makes devices and mounts again, and pins again.
4. An endpoint whose interface is gone is gone: nobody can make it again without its network namespace.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fimbria.agent import devices, views
from fimbria.apply.attach import EGRESS, INGRESS, ClsactTarget, DeviceHook, PinnedLinks
from fimbria.apply.bpffs import mount_bpffs
from fimbria.apply.devices import HOST_DEVICE, NET_DEVICE, OVERLAY_DEVICE
from fimbria.apply.network import MAIN_TABLE, PROTOCOL, SysctlTarget, mapped, route_row
from fimbria.kernel import link, neighbour, probe, route, tc
from fimbria.kernel.monitor import Change, Group, Monitor
from fimbria.kernel.netlink import ResyncNeeded
from fimbria.model.address import Prefix
from fimbria.model.network import DeviceSet, NeighbourKey, Route

if TYPE_CHECKING:
    from fimbria.agent.main import Agent

log = logging.getLogger(__name__)
POLL: Final = 1.0
GATHER: Final = 0.05
FOREIGN_POLL: Final = 5.0
GROUPS: Final = (
    Group.LINK, Group.NEIGH, Group.TC, Group.IPV4_ADDRESS, Group.IPV6_ADDRESS, Group.IPV4_ROUTE, Group.IPV6_ROUTE,
)  # fmt: skip


class Concern(Enum):
    """What a notification asks for."""

    NOTHING = 0
    ROWS = 1
    DEVICES = 2
    ENDPOINT_GONE = 3
    ENDPOINT_DOWN = 4
    ADDRESS_LOST = 5


@dataclass(frozen=True, slots=True)
class Wanted:
    """What should be there, to judge a notification by. `programs` are the ids of ours."""

    devices: DeviceSet | None
    node_addrs: tuple[bytes, ...]
    endpoints: Mapping[int, object]
    routes: Mapping[Prefix, Route]
    neighbours: Mapping[NeighbourKey, bytes]
    next_hops: Mapping[NeighbourKey, bool]
    hooks: Mapping[DeviceHook, str]
    programs: Mapping[int, str]
    filters: bool


def concerns(change: Change, wanted: Wanted) -> Concern:
    """Whether a change is one that we didn't make and don't want."""
    thing, gone = change.thing, change.gone
    if isinstance(thing, route.Route):
        return _route(thing, gone, wanted)
    if isinstance(thing, neighbour.Neighbour):
        key = NeighbourKey(thing.index, mapped(thing.address))
        mac = wanted.neighbours.get(key)
        lost = mac is not None and (gone or thing.mac != mac)
        return Concern.ROWS if lost or (gone and key in wanted.next_hops) else Concern.NOTHING
    if isinstance(thing, link.Device):
        return _device(thing, gone, wanted)
    if isinstance(thing, link.Address):
        if mapped(thing.address) in wanted.node_addrs:
            return Concern.ADDRESS_LOST if gone else Concern.DEVICES
        # What comes from any address of this host is the host's, whether its Node lists it or not.
        return Concern.DEVICES if thing.scope == 0 else Concern.NOTHING
    if isinstance(thing, tc.Filter) and wanted.filters:
        hooked = DeviceHook(thing.index, EGRESS if thing.egress else INGRESS) in wanted.hooks
        return Concern.ROWS if hooked and (gone or thing.prog_id not in wanted.programs) else Concern.NOTHING
    if isinstance(thing, tc.Qdisc) and wanted.filters and gone:
        return Concern.ROWS if DeviceHook(thing.index, INGRESS) in wanted.hooks else Concern.NOTHING
    return Concern.NOTHING


def _route(thing: route.Route, gone: bool, wanted: Wanted) -> Concern:
    if thing.table != MAIN_TABLE:
        return Concern.NOTHING
    prefix, row = route_row(thing)
    want = wanted.routes.get(prefix)
    if want is None:
        return Concern.ROWS if thing.protocol == PROTOCOL and not gone else Concern.NOTHING
    return Concern.ROWS if gone or row != want or thing.protocol != PROTOCOL else Concern.NOTHING


def _device(thing: link.Device, gone: bool, wanted: Wanted) -> Concern:
    if thing.index in wanted.endpoints:
        return Concern.ENDPOINT_GONE if gone else Concern.NOTHING if thing.up else Concern.ENDPOINT_DOWN
    ours = thing.name in (HOST_DEVICE, NET_DEVICE, OVERLAY_DEVICE)
    uplink = wanted.devices is not None and thing.index in wanted.devices.uplinks
    return Concern.DEVICES if ours or uplink else Concern.NOTHING


@dataclass(slots=True)
class Keeper:
    """Watches one agent's node. `repaired` counts by kind ("pins", "devices"), rows are counted by the loop."""

    agent: Agent
    repaired: Counter[str] = field(default_factory=Counter)
    foreign: dict[str, list[str]] = field(default_factory=dict)
    _devices_due: bool = True
    _foreign_at: float = 0.0
    _told: str = ""

    async def run(self) -> None:
        """Watch until cancelled."""
        nodes = self.agent.tables.nodes.subscribe()
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        polled = 0.0
        with Monitor(GROUPS) as monitor:

            def woken() -> None:
                # Until it is read the socket stays readable: left in place, the reader would spin while we gather.
                loop.remove_reader(monitor.fileno())
                readable.set()

            try:
                while True:
                    loop.add_reader(monitor.fileno(), woken)
                    try:
                        async with asyncio.timeout(POLL):
                            await readable.wait()
                        await asyncio.sleep(GATHER)
                    except TimeoutError:
                        pass
                    readable.clear()
                    await self._notified(monitor)
                    if not self.agent.loop.opened:
                        continue  # the first pass compares everything anyway
                    if self.agent.config.node_name in nodes.drain():
                        self._devices_due = True
                    if self._devices_due:
                        await self._refresh()
                    if time.monotonic() - polled >= POLL:
                        self._poll()
                        polled = time.monotonic()
            finally:
                loop.remove_reader(monitor.fileno())

    # --- notifications -----------------------------------------------------------------------------------------------

    async def _notified(self, monitor: Monitor) -> None:
        wanted = self._wanted()
        try:
            found = [(concerns(c, wanted), c.thing) for c in monitor.read()]
        except ResyncNeeded:
            self._devices_due = True
            self.agent.loop.audit_soon(quick=True)
            return
        for concern, thing in found:
            index = getattr(thing, "index", 0)
            if concern in (Concern.DEVICES, Concern.ADDRESS_LOST):
                self._devices_due = True
            elif concern is Concern.ENDPOINT_GONE and self.agent.endpoints is not None:
                await self.agent.endpoints.vanished(index)
            elif concern is Concern.ENDPOINT_DOWN and self.agent.wiring.raise_up(index):
                log.warning("drift: interface %s of a pod was set down behind our back; repaired", index)
                self.repaired["devices"] += 1
        kinds = {concern for concern, _ in found}
        if Concern.ADDRESS_LOST in kinds:
            log.warning("this host has lost an address of its Node; connections to the API server are made anew")
            self.agent.client.reconnect()
        if self.agent.loop.opened and kinds & {Concern.ROWS, Concern.ENDPOINT_DOWN}:
            self.agent.loop.audit_soon(quick=True)

    def _wanted(self) -> Wanted:
        agent = self.agent
        return Wanted(
            agent.devices, agent.registration.addrs, agent.rows.endpoints.desired, agent.rows.routes.desired,
            agent.rows.neighbours.desired, agent.rows.next_hops.desired, agent.rows.device_links.desired,
            agent.datapath.program_ids, agent.attach == "clsact",
        )  # fmt: skip

    # --- devices -----------------------------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        """Make devices again that are missing or wrong; if that changes what programs are told, load them again."""
        try:
            self.repaired["devices"] += await devices.refresh(self.agent)
            self._devices_due = False
            self._told = ""
        except OSError as error:
            if str(error) != self._told:
                log.error("the node's devices can't be set up: %s", error)
                self._told = str(error)

    # --- what the kernel doesn't tell of -----------------------------------------------------------------------------

    def _poll(self) -> None:
        self._pins()
        for stage in self.agent.loop.stages:
            target = stage.target
            links = isinstance(target, (PinnedLinks, ClsactTarget)) and not target.intact()
            if links or (isinstance(target, SysctlTarget) and target.read() != stage.rows.desired):
                self.agent.loop.audit_soon(quick=True)
        if time.monotonic() - self._foreign_at >= FOREIGN_POLL:
            self._foreign_at = time.monotonic()
            self._look_for_others()

    def _pins(self) -> None:
        path = self.agent.config.bpffs
        try:
            if not self.agent.datapath.links.exists() and not probe.bpffs_mounted(path):
                mount_bpffs(Path(path))
                log.warning("drift: the BPF file system %s was unmounted behind our back; mounted again", path)
                self.repaired["mounts"] += 1
            missing = self.agent.datapath.repin()
        except OSError as error:
            if str(error) != self._told:
                log.error("pins can't be restored: %s", error)
                self._told = str(error)
            return
        if missing:
            log.warning("drift: %d pins were removed behind our back (%s ...); repaired", len(missing), missing[0])
            self.repaired["pins"] += len(missing)

    def _look_for_others(self) -> None:
        now = views.foreign(self.agent)
        for hook in now.keys() | self.foreign.keys():
            before, others = self.foreign.get(hook, []), now.get(hook, [])
            if others != before:
                log.warning("%s: programs of others now: %s", hook, ", ".join(others) or "none")
        self.foreign = now
