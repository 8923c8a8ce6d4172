"""Routes and neighbours of a node: pure.

Rules
1. Every pod has a route of its own over its veth, and a permanent neighbour, so the host's stack reaches it.
2. Every block of this node is `unreachable` as a whole: an address whose pod is gone answers at once.
3. In overlay mode blocks of other nodes lead to the overlay device over a gateway that exists only as a neighbour: the
   program there finds the node by the destination. No device has the gateway's MAC: a VXLAN device takes a frame from
   its own MAC for a loop, and the program on the receiving side makes the frame the node's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fimbria.model.address import V4_MAPPED, Prefix
from fimbria.model.endpoint import LocalEndpoint
from fimbria.model.network import DeviceSet, NeighbourKey, Route
from fimbria.model.node import Node
from fimbria.model.rows import NO_ADDR

GATEWAY_MAC: Final = bytes.fromhex("02f100000001")
GATEWAY4: Final = V4_MAPPED + bytes((169, 254, 241, 1))
GATEWAY6: Final = bytes.fromhex("fe8000000000000000000000000000f1")


def pod_routes(endpoint: LocalEndpoint, node: Node) -> Iterator[tuple[Prefix, Route]]:
    """Host routes of one local pod; the host talks to it from its router address."""
    for addr in endpoint.addrs:
        yield Prefix.host(addr), Route(endpoint.ifindex, src=_router(node, addr))


def pod_neighbours(endpoint: LocalEndpoint) -> Iterator[tuple[NeighbourKey, bytes]]:
    """Neighbours of one local pod."""
    for addr in endpoint.addrs:
        yield NeighbourKey(endpoint.ifindex, addr), endpoint.pod_mac


def own_block_routes(node: Node) -> Iterator[tuple[Prefix, Route]]:
    """Unreachable routes of this node's blocks."""
    for block in node.pod_cidrs:
        yield block, Route(0)


def remote_block_routes(node: Node, this_node: Node, devices: DeviceSet) -> Iterator[tuple[Prefix, Route]]:
    """Routes to another node's blocks: none in native routing, where the network between the nodes knows them."""
    if not devices.overlay:
        return
    for block in node.pod_cidrs:
        gateway = GATEWAY4 if block.v4 else GATEWAY6
        yield block, Route(devices.overlay, gateway, _router(this_node, block.addr), devices.pod_mtu)


def overlay_neighbours(devices: DeviceSet) -> Iterator[tuple[NeighbourKey, bytes]]:
    """The gateway on the overlay device."""
    if devices.overlay:
        yield NeighbourKey(devices.overlay, GATEWAY4), GATEWAY_MAC
        yield NeighbourKey(devices.overlay, GATEWAY6), GATEWAY_MAC


def routers(node: Node) -> tuple[bytes, bytes]:
    """This node's own IPv4 and IPv6 address on its pods' network: the first address of its first blocks."""
    first4 = next((b for b in node.pod_cidrs if b.v4), None)
    first6 = next((b for b in node.pod_cidrs if not b.v4), None)
    return tuple(_second(b) if b else NO_ADDR for b in (first4, first6))  # type: ignore[return-value]


def _second(block: Prefix) -> bytes:
    return (int.from_bytes(block.addr) + 1).to_bytes(16)


def _router(node: Node, like: bytes) -> bytes:
    router4, router6 = routers(node)
    router = router4 if like[:12] == V4_MAPPED else router6
    return router if router != NO_ADDR else b""
