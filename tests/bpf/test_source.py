"""Whatever a pod sends: nothing leaves in another's name, and nothing upsets the programs."""

from collections.abc import Iterator

import pytest
from datapath import EVENT_DROP, REDIRECT, SHOT, TCX_NEXT, Datapath, addr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from record import ADDRS, MACS, OVERLAY, Build, Wire, base_rows, send, syn, udp
from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, PadN
from scapy.layers.l2 import Ether

LEAST = 54
MAC = bytes.fromhex(MACS["a"].replace(":", ""))
BUILDS: list[Build] = [
    lambda w: w.sent("b", udp()),
    lambda w: w.sent("c", syn()),
    lambda w: w.sent("world", w.echo()),
    lambda w: w.sent("front", syn()),
    lambda w: w.sent("b", w.unreachable(w.ip("b", "a") / udp())),
]
SEEDS = [bytes(build(Wire(family))) for family in (4, 6) for build in BUILDS] + [
    bytes(Ether(src=MACS["a"], dst=MACS["a-host"]) / Wire(6).ip("a", "b") / extension / udp())
    for extension in (IPv6ExtHdrFragment(nh=17, m=1), IPv6ExtHdrDestOpt(options=[PadN(optdata=b"\0" * 4)]))
]
PROGRAMS = ["from_pod", "to_pod", "to_network", "from_network", "to_overlay", "from_overlay"]


@pytest.fixture(scope="module")
def dp() -> Iterator[Datapath]:
    loaded = Datapath(OVERLAY)
    base_rows(loaded)
    loaded.service(7, ADDRS[4]["front"], 80, 6, [(ADDRS[4]["b"], 8080)])
    loaded.service(8, ADDRS[6]["front"], 80, 6, [(ADDRS[6]["b"], 8080)])
    yield loaded
    loaded.close()


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A packet with some bytes replaced, perhaps cut."""
    packet = bytearray(draw(st.sampled_from(SEEDS)).ljust(60, b"\0"))
    for _ in range(draw(st.integers(0, 4))):
        packet[draw(st.integers(0, len(packet) - 1))] = draw(st.integers(0, 255))
    # Test runs refuse what has no network header at all.
    return bytes(packet[: draw(st.integers(LEAST, len(packet)))])


def is_control(packet: bytes) -> bool:
    """ARP and ICMPv6 on the link, which we answer or hand to the stack."""
    return packet[12:14] == b"\x08\x06" or (packet[12:14] == b"\x86\xdd" and packet[20] == 58)


def source(packet: bytes) -> bytes:
    if packet[12:14] == b"\x08\x00":
        return bytes(10) + b"\xff\xff" + packet[26:30]
    return packet[22:38]


@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packet=broken())
def test_a_pod_only_speaks_for_itself(dp: Datapath, packet: bytes) -> None:
    verdict, _, _ = send(dp, "from_pod", packet)
    drops = [e for e in dp.events() if e.type == EVENT_DROP]
    assert verdict in (TCX_NEXT, SHOT, REDIRECT)
    if verdict != SHOT:
        assert packet[6:12] == MAC
        assert is_control(packet) or source(packet) in (addr(ADDRS[4]["a"]), addr(ADDRS[6]["a"]))
    elif not is_control(packet):
        # Only group membership (IGMP) goes without a word.
        assert drops or packet[23] == 2


@pytest.mark.parametrize("program", PROGRAMS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(packet=broken())
def test_no_program_is_upset(dp: Datapath, program: str, packet: bytes) -> None:
    verdict, out, _ = send(dp, program, packet)
    dp.events()
    assert verdict in (TCX_NEXT, SHOT, REDIRECT)
    assert len(out) <= len(packet) + 64
