"""The frontend in a packet, for direct return: put in, taken out, and left alone where it isn't ours to touch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from compiling import compile_object
from datapath import DEFAULTS, DROP, Setting, addr
from record import Wire, syn, udp
from scapy.layers.inet import IP, IPOption
from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop, PadN
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from fimbria.kernel.bpf import BpfObject, Program, prog_test_run

HERE = Path(__file__).parent
FRONT = {4: "203.0.113.80", 6: "2001:db8::80"}
PORT = 8443
ETHER = Ether(src="02:00:00:00:0e:01", dst="02:00:00:00:0e:01")
NONE, TAKEN = 0, -1
OTHER_FRONTEND = -11
PAYLOADS = {"udp": udp(), "empty": udp(data=b""), "syn": syn(), "large": udp(data=b"x" * 1400)}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Program]]:
    path = compile_object(HERE / "dsr_test.bpf.c", tmp_path_factory.mktemp("bpf"))
    with BpfObject(path) as obj:
        mine: dict[str, Setting] = {
            "cfg_frontend4": addr(FRONT[4]),
            "cfg_frontend6": addr(FRONT[6]),
            "cfg_frontend_port": PORT,
        }
        wanted = {**DEFAULTS, **mine}
        obj.set_constants({name: wanted[name] for name in obj.constants})
        obj.load()
        found = {name: obj.program(name) for name in ("add", "take")}
    yield found
    for program in found.values():
        program.close()


def option4(port: int = PORT, front: str = FRONT[4]) -> IPOption:
    return IPOption(b"\x9e\x08" + port.to_bytes(2, "big") + addr(front)[12:])


def header6(following: int, port: int = PORT, front: str = FRONT[6]) -> Raw:
    return Raw(bytes((following, 2, 1, 0, 0x1E, 18)) + port.to_bytes(2, "big") + addr(front))


def plain(family: int, payload: Packet) -> Packet:
    return Wire(family).routed("world", "c", payload)


def carrying(family: int, payload: Packet) -> Packet:
    """What `plain` becomes."""
    w = Wire(family)
    if family == 4:
        return ETHER / w.ip(
            "world", "c", options=[option4()]) / payload  # fmt: skip
    whole = bytes(plain(6, payload))
    packet = Ether(whole[:54]) / header6(following=whole[20]) / Raw(whole[54:])
    packet.payload.nh, packet.payload.plen = 60, len(whole) - 54 + 24
    return packet


def run(program: Program, packet: bytes) -> tuple[int, bytes]:
    done = prog_test_run(program.fd, packet)
    return done.retval, done.data_out


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("payload", PAYLOADS)
def test_there_and_back(programs: dict[str, Program], family: int, payload: str) -> None:
    before, after = bytes(plain(family, PAYLOADS[payload])), bytes(carrying(family, PAYLOADS[payload]))
    assert run(programs["add"], before) == (0, after)
    assert run(programs["take"], after) == (TAKEN, before)


@pytest.mark.parametrize("family", [4, 6])
def test_nothing_to_take(programs: dict[str, Program], family: int) -> None:
    packet = bytes(plain(family, udp()))
    assert run(programs["take"], packet) == (NONE, packet)


@pytest.mark.parametrize("family", [4, 6])
def test_what_it_says_is_read(programs: dict[str, Program], family: int) -> None:
    """The test program compares with the frontend that it knows."""
    packet = bytearray(bytes(carrying(family, udp())))
    at = bytes(packet).index(PORT.to_bytes(2, "big"))
    packet[at : at + 2] = (PORT + 1).to_bytes(2, "big")
    assert run(programs["take"], bytes(packet))[0] == OTHER_FRONTEND


def with_options(*options: IPOption) -> Packet:
    return ETHER / IP(src="203.0.113.9", dst="10.2.0.10", options=list(options)) / udp()


OTHER = [IPOption(b"\x94\x04\x00\x00"), IPOption(b"\x88\x04\x00\x01"), IPOption(b"\x07\x0b\x04" + bytes(8) + b"\x00")]


@pytest.mark.parametrize("other", OTHER)
def test_options_of_others_stay(programs: dict[str, Program], other: IPOption) -> None:
    before, after = bytes(with_options(other)), bytes(with_options(option4(), other))
    assert run(programs["add"], before) == (0, after)
    assert run(programs["take"], after) == (TAKEN, before)
    assert run(programs["take"], before) == (NONE, before)
    late = bytes(with_options(other, option4()))
    assert run(programs["take"], late) == (NONE, late)


def test_a_full_header_has_no_room(programs: dict[str, Program]) -> None:
    full = bytes(with_options(IPOption(b"\x1e\x24" + bytes(34))))
    assert run(programs["add"], full) == (DROP["DROP_INVALID_PACKET"], full)


@pytest.mark.parametrize("length", [0, 1, 2, 4, 7, 9, 255])
def test_an_option_of_another_length_is_not_ours(programs: dict[str, Program], length: int) -> None:
    packet = bytes(with_options(IPOption(bytes((0x9E, length)) + bytes(6))))
    assert run(programs["take"], packet) == (NONE, packet)


@pytest.mark.parametrize("flags", [1, 0])
def test_fragments4(programs: dict[str, Program], flags: int) -> None:
    def made(**kw: Any) -> bytes:
        ip = IP(src="203.0.113.9", dst="10.2.0.10", id=7, flags=flags, proto=17, **kw)
        return bytes(ETHER / ip / Raw(bytes(udp(data=b"x" * 16))))

    before, after = made(), made(options=[option4()])
    assert run(programs["add"], before) == (0, after)
    assert run(programs["take"], after) == (TAKEN, before)


def test_a_fragment6_gets_it_before_the_fragment_header(programs: dict[str, Program]) -> None:
    w = Wire(6)
    fragment = IPv6ExtHdrFragment(nh=17, id=9, m=1) / Raw(bytes(udp(data=b"x" * 16)))
    before = bytes(ETHER / w.ip("world", "c") / fragment)
    status, after = run(programs["add"], before)
    assert (status, after[20], after[54], len(after)) == (0, 60, 44, len(before) + 24)
    assert run(programs["take"], after) == (TAKEN, before)


def test_destination_options_of_others_stay(programs: dict[str, Program]) -> None:
    w = Wire(6)
    theirs = IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(4))])
    large = IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(20))])
    for header in (theirs, large):
        before = bytes(ETHER / w.ip("world", "c") / header / udp())
        assert run(programs["take"], before) == (NONE, before)
        status, after = run(programs["add"], before)
        assert (status, after[54]) == (0, 60)
        assert run(programs["take"], after) == (TAKEN, before)


def test_hop_by_hop_options_stay_first(programs: dict[str, Program]) -> None:
    packet = bytes(ETHER / Wire(6).ip("world", "c") / IPv6ExtHdrHopByHop() / udp())
    assert run(programs["add"], packet) == (DROP["DROP_INVALID_IPV6_EXTENSION"], packet)


@pytest.mark.parametrize(("at", "value"), [(1, 1), (1, 3), (2, 0), (3, 1), (4, 0x1F), (5, 17), (5, 255)])
def test_a_header6_that_differs_is_not_ours(programs: dict[str, Program], at: int, value: int) -> None:
    packet = bytearray(bytes(carrying(6, udp(data=b"y" * 64))))
    packet[54 + at] = value
    assert run(programs["take"], bytes(packet)) == (NONE, bytes(packet))
