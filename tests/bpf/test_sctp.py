"""SCTP packets with other ports: their CRC32c must be the one that a computation over all bytes gives."""

import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from compiling import compile_object
from datapath import DEFAULTS, DROP
from record import Wire
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, PadN
from scapy.layers.l2 import Ether
from scapy.packet import Raw

from fimbria.kernel.bpf import BpfObject, Program, prog_test_run

HERE = Path(__file__).parent
SPORT, DPORT = 61234, 3868
SCTP_NUMBER = 132
ETHER = Ether(src="02:00:00:00:0e:01", dst="02:00:00:00:0e:01")
POLY, ONE = 0x82F63B78, 0x80000000


def shift(remainder: int, bits: int) -> int:
    """Times x^bits, bits reflected."""
    for _ in range(bits):
        remainder = remainder >> 1 ^ (POLY if remainder & 1 else 0)
    return remainder


TABLE = [shift(byte, 8) for byte in range(256)]


def crc32c(data: bytes) -> int:
    """Byte by byte, as RFC 9260 appendix A describes it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def sctp(sport: int, dport: int, body: bytes, tag: int = 0xFEEDBEEF, *, summed: bool = True) -> bytes:
    start = sport.to_bytes(2, "big") + dport.to_bytes(2, "big") + tag.to_bytes(4, "big")
    return start + (crc32c(start + bytes(4) + body) if summed else 0).to_bytes(4, "little") + body


def frame(family: int, payload: bytes) -> bytes:
    ip = Wire(family).ip("world", "c")
    setattr(ip, "proto" if family == 4 else "nh", SCTP_NUMBER)
    return bytes(ETHER / ip / Raw(payload))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    path = compile_object(HERE / "sctp_test.bpf.c", tmp_path_factory.mktemp("bpf"))
    with BpfObject(path) as obj:
        wanted = {**DEFAULTS, "cfg_sport": SPORT, "cfg_dport": DPORT}
        obj.set_constants({name: wanted[name] for name in obj.constants})
        obj.load()
        found = obj.program("set_ports")
    yield found
    found.close()


def test_the_reference() -> None:
    """Known values of CRC-32C; the second is in RFC 3720 B.4."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


def test_the_table_of_powers() -> None:
    text = (HERE.parent.parent / "bpf" / "lib" / "sctp.h").read_text()
    table = [int(n, 16) for n in re.findall(r"0x[0-9a-f]{8}(?=,)", text)]
    power, want = ONE, []
    for k in range(4):
        for j in range(16):
            want.append(power)
            power = shift(power, 8 * 16**k) if j < 15 else ONE
    assert table == want


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("size", [0, 4, 5, 16, 100, 243, 244, 1400, 3000, 3333])
def test_random_packets(program: Program, family: int, size: int) -> None:
    dice = random.Random(f"{family} {size}")
    for _ in range(20):
        sport, dport, tag, body = (
            dice.randrange(65536),
            dice.randrange(65536),
            dice.getrandbits(32),
            dice.randbytes(size),
        )
        done = prog_test_run(program.fd, frame(family, sctp(sport, dport, body, tag)))
        assert (done.retval, done.data_out) == (0, frame(family, sctp(SPORT, DPORT, body, tag)))


@pytest.mark.parametrize("family", [4, 6])
def test_padding_of_the_frame_is_no_part(program: Program, family: int) -> None:
    pad = b"\xa5" * 24
    done = prog_test_run(program.fd, frame(family, sctp(1, 2, b"")) + pad)
    assert (done.retval, done.data_out) == (0, frame(family, sctp(SPORT, DPORT, b"")) + pad)


@pytest.mark.parametrize("family", [4, 6])
def test_what_the_device_will_sum_up_is_left_to_it(program: Program, family: int) -> None:
    done = prog_test_run(program.fd, frame(family, sctp(1, 2, b"init", summed=False)))
    assert (done.retval, done.data_out) == (0, frame(family, sctp(SPORT, DPORT, b"init", summed=False)))


def test_behind_an_extension_header(program: Program) -> None:
    def made(sport: int, dport: int) -> bytes:
        header = IPv6ExtHdrDestOpt(nh=SCTP_NUMBER, options=[PadN(optdata=bytes(12))])
        return bytes(ETHER / Wire(6).ip("world", "c") / header / Raw(sctp(sport, dport, b"data of it")))

    done = prog_test_run(program.fd, made(5, 6))
    assert (done.retval, done.data_out) == (0, made(SPORT, DPORT))


@pytest.mark.parametrize("family", [4, 6])
def test_a_fragment_is_refused(program: Program, family: int) -> None:
    """Its checksum is that of bytes which are elsewhere."""
    payload = Raw(sctp(1, 2, b"12345678"))
    if family == 4:
        packet = ETHER / IP(src="203.0.113.9", dst="10.2.0.10", id=7, flags=1, proto=SCTP_NUMBER) / payload
    else:
        packet = ETHER / Wire(6).ip("world", "c") / IPv6ExtHdrFragment(nh=SCTP_NUMBER, id=9, m=1) / payload
    assert prog_test_run(program.fd, bytes(packet)).retval == DROP["DROP_NAT_UNSUPPORTED_PROTOCOL"]


def test_a_header_that_ends_too_early_is_refused(program: Program) -> None:
    assert prog_test_run(program.fd, frame(4, sctp(1, 2, b"")[:10])).retval == DROP["DROP_CT_INVALID_HEADER"]
