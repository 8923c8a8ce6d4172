"""The ring buffer consumer."""

from __future__ import annotations

import asyncio
import struct

import pytest

from fimbria.kernel.bpf import BpfError, BpfObject, MapType, RingBuffer, create_map, prog_test_run


def lengths(records: list[bytes]) -> list[int]:
    return [struct.unpack("=Q", r)[0] for r in records]


def test_records_come_in_order_and_in_portions(loaded: BpfObject) -> None:
    with loaded.map("m_ring") as m, loaded.program("cls_emit") as program, RingBuffer(m.fd) as ring:
        assert ring.drain() == []
        for n in range(100, 110):
            prog_test_run(program.fd, bytes(n))
        assert lengths(ring.drain(4)) == [100, 101, 102, 103]
        assert lengths(ring.drain(0)) == []
        assert lengths(ring.drain()) == [104, 105, 106, 107, 108, 109]
        assert ring.drain() == []


def test_a_full_ring_goes_on_after_a_drain(loaded: BpfObject) -> None:
    with loaded.map("m_ring") as m, loaded.program("cls_emit") as program, RingBuffer(m.fd) as ring:
        prog_test_run(program.fd, bytes(64), repeat=10_000)
        assert len(ring.drain()) == 65536 // 16 - 1  # 8 bytes and an 8-byte header each; the last never fits
        prog_test_run(program.fd, bytes(77))
        assert lengths(ring.drain()) == [77]


async def test_the_event_loop_is_woken(loaded: BpfObject) -> None:
    with loaded.map("m_ring") as m, loaded.program("cls_emit") as program, RingBuffer(m.fd) as ring:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(ring.fd, woken.set)
        try:
            await asyncio.to_thread(prog_test_run, program.fd, bytes(99))
            await asyncio.wait_for(woken.wait(), 5)
        finally:
            loop.remove_reader(ring.fd)
        assert lengths(ring.drain()) == [99]


def test_only_ring_buffers_and_only_while_open() -> None:
    with create_map(MapType.HASH, 4, 4, 4) as m, pytest.raises(BpfError, match="ring buffer"):
        RingBuffer(m.fd)
    with create_map(MapType.RINGBUF, 0, 0, 4096) as m:
        ring = RingBuffer(m.fd)
        ring.close()
        ring.close()
        with pytest.raises(ValueError, match="closed"):
            ring.drain()
