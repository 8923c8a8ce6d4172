"""The node's own devices: the router's pair and the overlay device; and which devices lead out of the node."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable
from typing import Final

from fimbria.apply.network import mapped, plain
from fimbria.kernel import link
from fimbria.kernel.netlink import NetlinkError, NetlinkSocket
from fimbria.model.network import DeviceSet

log = logging.getLogger(__name__)
HOST_DEVICE: Final = "fimbria_host"
NET_DEVICE: Final = "fimbria_net"
OVERLAY_DEVICE: Final = "fimbria_vxlan"
VXLAN_OVERHEAD4: Final = 50
VXLAN_OVERHEAD6: Final = 70


class DeviceError(OSError):
    """The node's devices can't be set up; the text says which and why."""


def find_uplinks(netlink: NetlinkSocket, names: str, node_addrs: Iterable[bytes]) -> list[link.Device]:
    """The devices that lead out of the node: those named (comma separated), or those with one of the node's addresses.

    Raises DeviceError naming the one that doesn't exist, or if there are none.
    """
    found: dict[int, link.Device] = {}
    for name in filter(None, names.split(",")):
        device = link.get(netlink, name)
        if device is None:
            raise DeviceError(errno.ENODEV, f"--devices names {name}, which does not exist")
        found[device.index] = device
    if not names:
        wanted = {plain(a) for a in node_addrs}
        for address in link.dump_addresses(netlink):
            device = link.get(netlink, address.index) if address.address in wanted else None
            if device is not None and device.name != "lo":
                found[device.index] = device
    if not found:
        raise DeviceError(errno.ENODEV, "no device has an address of this node's Node object; name them by --devices")
    return list(found.values())


def host_addresses(netlink: NetlinkSocket) -> tuple[bytes, ...]:
    """All addresses (16 bytes) that this host answers to beyond its own links: neither loopback nor link-local ones.

    With the broadcast addresses of its IPv4 networks, on which its sockets hear too.
    """
    found: set[bytes] = set()
    for a in link.dump_addresses(netlink):
        if a.scope == 0:
            found.add(mapped(a.address))
            if len(a.address) == 4 and a.prefix_len < 31:
                hosts = (1 << 32 - a.prefix_len) - 1
                found.add(mapped((int.from_bytes(a.address) | hosts).to_bytes(4)))
    return tuple(sorted(found))


class NodeDevices:
    """Makes and repairs the node's devices. `ensure` is idempotent; `repairs` says what the last one had to do."""

    def __init__(self, netlink: NetlinkSocket, *, overlay: bool, port: int, mtu: int, underlay6: bool) -> None:
        self._netlink = netlink
        self._overlay = overlay
        self._port = port
        self._mtu = mtu
        self._overhead = VXLAN_OVERHEAD6 if underlay6 else VXLAN_OVERHEAD4
        self.repairs: list[str] = []

    def ensure(self, uplinks: list[link.Device], routers: Iterable[bytes]) -> DeviceSet:
        """Make what is missing, correct what differs. Raises NetlinkError, DeviceError."""
        self.repairs = []
        mtu = self._mtu or min(d.mtu for d in uplinks)
        pod_mtu = mtu - self._overhead if self._overlay else mtu
        host = self._pair(mtu)
        overlay = self._overlay_device(mtu) if self._overlay else None
        if not self._overlay:
            self._remove(OVERLAY_DEVICE)
        self._addresses(host.index, routers)
        return DeviceSet(
            host=host.index,
            host_mac=host.mac,
            overlay=overlay.index if overlay else 0,
            uplinks=tuple(d.index for d in uplinks),
            mtu=mtu,
            pod_mtu=pod_mtu,
        )

    def _pair(self, mtu: int) -> link.Device:
        if link.get(self._netlink, HOST_DEVICE) is None:
            self._netlink.do(link.create(link.Veth(HOST_DEVICE, NET_DEVICE, mtu=mtu)))
            self.repairs.append(f"device {HOST_DEVICE} was missing")
        host = self._get(HOST_DEVICE)
        for device in (host, self._get(NET_DEVICE)):
            self._raise(device, mtu)
        return host

    def _overlay_device(self, mtu: int) -> link.Device:
        device = link.get(self._netlink, OVERLAY_DEVICE)
        sound = device is not None and device.vxlan is not None and device.vxlan.collect_metadata
        if device is not None and (not sound or device.vxlan is None or device.vxlan.port != self._port):
            log.warning("device %s is not configured as ours and is made again", OVERLAY_DEVICE)
            self._remove(OVERLAY_DEVICE)
            device = None
        if device is None:
            self._create_overlay(mtu)
            self.repairs.append(f"device {OVERLAY_DEVICE} was missing")
        device = self._get(OVERLAY_DEVICE)
        self._raise(device, mtu)
        return device

    def _raise(self, device: link.Device, mtu: int) -> None:
        if not device.up or device.mtu != mtu:
            self._netlink.do(link.change(device.index, up=True, mtu=mtu))
            self.repairs.append(f"device {device.name} was down or had another MTU")

    def _create_overlay(self, mtu: int) -> None:
        spec = link.Vxlan(OVERLAY_DEVICE, port=self._port, mtu=mtu, udp_csum=False, zero_csum6=True)
        try:
            self._netlink.do(link.create(spec))
        except NetlinkError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise DeviceError(error.errno, "the kernel has no VXLAN: load the vxlan module or use native") from None
            raise

    def _addresses(self, host: int, routers: Iterable[bytes]) -> None:
        wanted = {plain(r) for r in routers if any(r)}
        there = {a.address: a for a in link.dump_addresses(self._netlink, index=host) if a.scope == 0}
        stale = [link.delete_address(a) for addr, a in there.items() if addr not in wanted]
        fresh = [
            link.add_address(link.Address(host, a, 8 * len(a), nodad=len(a) == 16, noprefixroute=len(a) == 16))
            for a in wanted - there.keys()
        ]
        if stale or fresh:
            self._netlink.do(*stale, *fresh)
            self.repairs.append(f"addresses of {HOST_DEVICE} were not those of this node's blocks")

    def _remove(self, name: str) -> None:
        device = link.get(self._netlink, name)
        if device is not None:
            self._netlink.do(link.delete(device.index))

    def _get(self, name: str) -> link.Device:
        device = link.get(self._netlink, name)
        if device is None:
            raise DeviceError(errno.ENODEV, f"device {name} vanished while it was set up")
        return device
