"""A pod's interface: a veth pair, addresses and routes inside the pod. Thin: what goes where is decided elsewhere."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fimbria.apply.network import plain
from fimbria.kernel import link, route
from fimbria.kernel.netlink import NetlinkError, NetlinkSocket
from fimbria.model.address import is_v4, unpack
from fimbria.model.endpoint import LocalEndpoint
from fimbria.model.rows import NO_ADDR

log = logging.getLogger(__name__)
_BOOT: Final = 3  # RTPROT_BOOT: routes inside the pod are the pod's own from then on


class WiringError(OSError):
    """The kernel refused a step; the text says which."""


@dataclass(slots=True)
class Wiring:
    """Makes and removes pod interfaces. Blocking; called in threads. `routers` are (IPv4, IPv6), NO_ADDR if absent;
    kernel settings are written below `sysctls`."""

    netlink: NetlinkSocket
    pod_mtu: int
    routers: tuple[bytes, bytes] = (NO_ADDR, NO_ADDR)
    sysctls: Path = Path("/proc/sys")
    _removals: set[asyncio.Task[None]] = field(default_factory=set)

    def gateway(self, *, v4: bool) -> bytes:
        """The pod's default gateway of a family."""
        return self.routers[0] if v4 else self.routers[1]

    def create(self, endpoint: LocalEndpoint, netns_fd: int) -> int:
        """Make the pair, the pod's side still down; returns the host side's ifindex.

        Raises WiringError, with EEXIST if the pod has an interface of that name; nothing is left then.
        """
        self._remove_stale(endpoint)
        pair = link.Veth(
            endpoint.host_ifname, endpoint.ifname, mtu=self.pod_mtu, mac=endpoint.host_mac, peer_mac=endpoint.pod_mac,
            peer_netns_fd=netns_fd,
        )  # fmt: skip
        try:
            self.netlink.do(link.create(pair))
        except (NetlinkError, ValueError) as error:
            raise WiringError(getattr(error, "errno", errno.EINVAL), str(error)) from None
        host = link.get(self.netlink, endpoint.host_ifname)
        if host is None:
            raise WiringError(errno.ENODEV, "the pod's network namespace vanished while it was connected")
        self._quiet(endpoint.host_ifname)
        try:
            self.netlink.do(link.change(host.index, up=True, alias=f"fimbria: {endpoint.label}"[:200]))
        except NetlinkError as error:
            raise WiringError(error.errno, str(error)) from None
        return host.index

    def configure(self, endpoint: LocalEndpoint, netns_fd: int) -> None:
        """Addresses and routes inside the pod, and its side up. Raises WiringError."""
        try:
            with NetlinkSocket(netns_fd) as pod:
                self._configure(pod, endpoint)
        except OSError as error:
            raise WiringError(error.errno, f"inside the pod: {error}") from None

    def _configure(self, pod: NetlinkSocket, endpoint: LocalEndpoint) -> None:
        device = link.get(pod, endpoint.ifname)
        loopback = link.get(pod, "lo")
        if device is None:
            raise OSError(errno.ENODEV, f"{endpoint.ifname} vanished")
        requests = [link.change(loopback.index, up=True)] if loopback is not None else []
        requests.append(link.change(device.index, up=True))
        for addr in endpoint.addrs:
            own, gateway = plain(addr), plain(self.gateway(v4=is_v4(addr)))
            requests.append(link.add_address(link.Address(device.index, own, 8 * len(own), nodad=True)))
            scope = route.Scope.LINK if is_v4(addr) else route.Scope.UNIVERSE
            requests.append(
                route.replace(route.Route(gateway, 8 * len(gateway), oif=device.index, protocol=_BOOT, scope=scope))
            )
            requests.append(
                route.replace(
                    route.Route(bytes(len(own)), 0, oif=device.index, gateway=gateway, protocol=_BOOT, mtu=self.pod_mtu)
                )
            )
        pod.do(*requests)

    def remove_later(self, name: str) -> None:
        """Delete an interface in the background: the kernel takes 20 ms and more, and nothing leads there any more."""
        task = asyncio.create_task(asyncio.to_thread(self.remove, name))
        self._removals.add(task)
        task.add_done_callback(self._removals.discard)

    def remove(self, name: str) -> None:
        """Delete an interface if it is there."""
        try:
            device = link.get(self.netlink, name)
            if device is not None:
                self.netlink.do(link.delete(device.index))
        except NetlinkError as error:
            if error.errno != errno.ENODEV:
                log.error("interface %s can't be removed: %s", name, error)

    def raise_up(self, index: int) -> bool:
        """Set an interface up that somebody set down; False if it is up, or gone, by now."""
        device = link.get(self.netlink, index)
        if device is None or device.up:
            return False
        try:
            self.netlink.do(link.change(index, up=True))
        except NetlinkError as error:
            log.error("interface %s can't be set up: %s", index, error)
        return True

    def host_exists(self, name: str, ifindex: int) -> bool:
        """Whether that very interface is there."""
        device = link.get(self.netlink, name)
        return device is not None and device.index == ifindex

    def host_has(self, addr: bytes) -> bool:
        """Whether the node has an address (16 bytes), loopback included."""
        return any(a.address == plain(addr) for a in link.dump_addresses(self.netlink))

    def pod_has(self, netns_fd: int, ifname: str) -> bool:
        """Whether the pod has an interface of that name."""
        with NetlinkSocket(netns_fd) as pod:
            return link.get(pod, ifname) is not None

    def problems(
        self, endpoint: LocalEndpoint, netns_fd: int, addrs: Sequence[bytes], routes: Sequence[bool]
    ) -> list[str]:
        """What differs from what `create` and `configure` made, for CHECK. `addrs` are the addresses that should be
        there, `routes` the families (True: IPv4) whose default route should."""
        found = []
        host = link.get(self.netlink, endpoint.host_ifname)
        if host is None or host.index != endpoint.ifindex:
            found.append(f"host interface {endpoint.host_ifname} is gone")
        elif not host.up:
            found.append(f"host interface {endpoint.host_ifname} is down")
        with NetlinkSocket(netns_fd) as pod:
            device = link.get(pod, endpoint.ifname)
            if device is None:
                return [*found, f"interface {endpoint.ifname} is gone"]
            if not device.up:
                found.append(f"interface {endpoint.ifname} is down")
            if device.mac != endpoint.pod_mac:
                found.append(
                    f"interface {endpoint.ifname} has MAC {device.mac.hex(':')} instead of {endpoint.pod_mac.hex(':')}"
                    " and what it sends is dropped"
                )
            there = {a.address for a in link.dump_addresses(pod, index=device.index)}
            found += [f"address {unpack(a)} is gone" for a in addrs if plain(a) not in there]
            for v4 in routes:
                gateway = self.gateway(v4=v4)
                # In any table: a plugin after us may have moved it there.
                family = socket.AF_INET if v4 else socket.AF_INET6
                there_are = route.dump(pod, family, oif=device.index)
                if not any(r.prefix_len == 0 and r.gateway == plain(gateway) for r in there_are):
                    found.append(f"the default route via {unpack(gateway)} is gone")
        return found

    def _remove_stale(self, endpoint: LocalEndpoint) -> None:
        # Left by an ADD that died half-way: the name says that it is of this very attachment.
        if link.get(self.netlink, endpoint.host_ifname) is not None:
            log.warning("interface %s of %s was left over and is removed", endpoint.host_ifname, endpoint.label)
            self.remove(endpoint.host_ifname)

    def _quiet(self, name: str) -> None:
        """The host's side needs no IPv6 address of its own, and would only chatter."""
        for setting, value in (("addr_gen_mode", "1"), ("accept_ra", "0")):
            try:
                (self.sysctls / f"net/ipv6/conf/{name}/{setting}").write_text(value)
            except OSError:
                continue
