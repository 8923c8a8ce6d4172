"""Which notifications of the kernel concern us."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fimbria.agent.keeper import Concern, Wanted, concerns
from fimbria.apply.attach import DeviceHook
from fimbria.apply.network import plain
from fimbria.kernel import link, neighbour, route, tc
from fimbria.kernel.monitor import Change
from fimbria.model.address import Prefix, pack
from fimbria.model.network import DeviceSet, NeighbourKey, Route

POD, NODE = pack("10.244.0.5"), pack("192.0.2.1")
MAC, OTHER_MAC = bytes([2, 0, 0, 0, 0, 1]), bytes([2, 0, 0, 0, 0, 2])
PLAIN = bytes([10, 244, 0, 5])


def wanted(*, filters: bool = False) -> Wanted:
    return Wanted(
        devices=DeviceSet(2, MAC, 5, (3,), 1500, 1450),
        node_addrs=(NODE,),
        endpoints={10: object()},
        routes={Prefix.host(POD): Route(10)},
        neighbours={NeighbourKey(10, POD): MAC},
        next_hops={},
        hooks={DeviceHook(10, "ingress"): "from_pod"},
        programs={77: "from_pod"},
        filters=filters,
    )


def device(index: int, name: str = "x", *, up: bool = True) -> link.Device:
    return link.Device(index, name, "veth", 1500, MAC, 1 if up else 0, 6, 0, 0, -1, 0, "", (), 0, 0, 0, 0)


def our_route(**changes: object) -> route.Route:
    values: dict[str, object] = {"dst": PLAIN, "prefix_len": 32, "oif": 10, "protocol": 241, "scope": 253} | changes
    return route.Route(**values)  # type: ignore[arg-type]


ROWS, NOTHING, DEVICES = Concern.ROWS, Concern.NOTHING, Concern.DEVICES


def test_a_next_hop_that_somebody_flushed_is_kept_resolved_again() -> None:
    hop = pack("192.0.2.9")
    want = replace(wanted(), next_hops={NeighbourKey(3, hop): True})
    entry = neighbour.Neighbour(3, plain(hop), b"", 0, managed=True)
    assert concerns(Change(True, entry), want) is Concern.ROWS
    assert concerns(Change(False, entry), want) is Concern.NOTHING
    assert concerns(Change(True, entry), wanted()) is Concern.NOTHING


@pytest.mark.parametrize(("gone", "thing", "expected"), [
    (False, our_route(), NOTHING),  # what we wrote ourselves
    (True, our_route(), ROWS),
    (False, our_route(oif=11), ROWS),
    (False, our_route(protocol=4), ROWS),
    (False, our_route(table=100, oif=11), NOTHING),
    (False, our_route(dst=bytes(4), prefix_len=0), ROWS),  # under our protocol, and not wanted
    (True, our_route(dst=bytes(4), prefix_len=0), NOTHING),  # we may have deleted it
    (False, our_route(dst=bytes(4), prefix_len=0, protocol=4), NOTHING),
])  # fmt: skip
def test_routes(gone: bool, thing: route.Route, expected: Concern) -> None:
    assert concerns(Change(gone, thing), wanted()) is expected


@pytest.mark.parametrize(("gone", "index", "mac", "expected"), [
    (False, 10, MAC, NOTHING), (True, 10, MAC, ROWS), (False, 10, OTHER_MAC, ROWS), (False, 11, OTHER_MAC, NOTHING),
])  # fmt: skip
def test_neighbours(gone: bool, index: int, mac: bytes, expected: Concern) -> None:
    assert concerns(Change(gone, neighbour.Neighbour(index, PLAIN, mac, 0x80)), wanted()) is expected


@pytest.mark.parametrize(("gone", "thing", "expected"), [
    (True, device(10), Concern.ENDPOINT_GONE),
    (False, device(10, up=False), Concern.ENDPOINT_DOWN),
    (False, device(10), NOTHING),
    (True, device(99, "fimbria_vxlan"), DEVICES),
    (True, device(99, "fimbria_host"), DEVICES),
    (True, device(3, "eth0"), DEVICES),
    (True, device(99, "docker0"), NOTHING),
])  # fmt: skip
def test_devices(gone: bool, thing: link.Device, expected: Concern) -> None:
    assert concerns(Change(gone, thing), wanted()) is expected


@pytest.mark.parametrize(("gone", "index", "address", "scope", "expected"), [
    (True, 2, bytes([10, 244, 0, 1]), 0, DEVICES),
    (True, 3, bytes([192, 0, 2, 1]), 0, Concern.ADDRESS_LOST),
    (False, 3, bytes([192, 0, 2, 1]), 0, DEVICES),
    (False, 3, bytes([192, 0, 2, 9]), 0, DEVICES),
    (False, 3, bytes([169, 254, 0, 9]), 253, NOTHING),
])  # fmt: skip
def test_addresses(gone: bool, index: int, address: bytes, scope: int, expected: Concern) -> None:
    assert concerns(Change(gone, link.Address(index, address, 32, scope=scope)), wanted()) is expected


@pytest.mark.parametrize(("gone", "prog_id", "filters", "expected"), [
    (True, 77, True, ROWS), (False, 78, True, ROWS), (False, 77, True, NOTHING), (True, 77, False, NOTHING),
])  # fmt: skip
def test_filters(gone: bool, prog_id: int, filters: bool, expected: Concern) -> None:
    thing = tc.Filter(10, False, 1, 0xF1, "bpf", "from_pod", prog_id)
    assert concerns(Change(gone, thing), wanted(filters=filters)) is expected


def test_a_qdisc_takes_its_filters_with_it() -> None:
    assert concerns(Change(True, tc.Qdisc(10, "clsact", 0xFFFF0000, 0xFFFFFFF1)), wanted(filters=True)) is ROWS
    assert concerns(Change(True, tc.Qdisc(11, "clsact", 0xFFFF0000, 0xFFFFFFF1)), wanted(filters=True)) is NOTHING
