"""tcx links (Linux 6.6 and later): swapping under traffic, order at a hook, pins."""

from __future__ import annotations

import errno
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from fimbria.kernel import netns
from fimbria.kernel.bpf import (
    Anchor,
    AttachType,
    BpfError,
    BpfObject,
    Link,
    Map,
    Program,
    attach_tcx,
    prog_info,
    query_device,
)
from fimbria.kernel.netlink import NetlinkSocket

EGRESS = AttachType.TCX_EGRESS


class Pair(Protocol):
    """See conftest.py."""

    a: int
    b: int
    a_socket: NetlinkSocket
    a_index: int


@pytest.fixture
def first(loaded: BpfObject) -> Iterator[Program]:
    with loaded.program("cls_first") as p:
        yield p


@pytest.fixture
def second(loaded: BpfObject) -> Iterator[Program]:
    with loaded.program("cls_second") as p:
        yield p


def counter(m: Map, slot: int) -> int:
    value = m.lookup(struct.pack("=I", slot))
    assert value is not None
    return int(struct.unpack("=Q", value)[0])


def send(pair: Pair, n: int) -> None:
    """Sends `n` datagrams from a to b."""

    def body() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            for _ in range(n):
                s.sendto(b"x", ("10.0.0.2", 9999))

    netns.run(pair.a, body)


def test_swapping_under_traffic_misses_no_packet(
    loaded: BpfObject, pair: Pair, first: Program, second: Program
) -> None:
    n = 20_000
    with netns.run(pair.a, lambda: attach_tcx(first, pair.a_index, EGRESS)) as link, loaded.map("m_array") as counts:
        sender = threading.Thread(target=send, args=(pair, n))
        sender.start()
        swaps = 0
        while sender.is_alive():
            link.update(second if swaps % 2 == 0 else first)
            swaps += 1
            sender.join(0.001)
        a, b = counter(counts, 0), counter(counts, 1)
    assert swaps > 2 and a and b
    assert a + b == n


def test_an_update_can_insist_on_what_it_replaces(pair: Pair, first: Program, second: Program) -> None:
    with netns.run(pair.a, lambda: attach_tcx(first, pair.a_index, EGRESS)) as link:
        with pytest.raises(BpfError) as caught:
            link.update(second, expected=second)
        assert caught.value.errno == errno.EPERM
        link.update(second, expected=first)
        assert link.info().prog_id == prog_info(second.fd).id


def test_order_revision_and_query(pair: Pair, first: Program, second: Program) -> None:
    a, b = prog_info(first.fd).id, prog_info(second.fd).id

    def body() -> None:
        index = pair.a_index
        empty = query_device(index, EGRESS)
        assert empty.programs == ()
        with attach_tcx(first, index, EGRESS) as one:
            state = query_device(index, EGRESS)
            assert [p.prog_id for p in state.programs] == [a] and state.programs[0].link_id == one.info().id
            before = Anchor(before=True, link_id=one.info().id)
            with pytest.raises(BpfError) as caught:
                attach_tcx(second, index, EGRESS, before, expected_revision=state.revision + 7)
            assert caught.value.errno == errno.ESTALE
            with attach_tcx(second, index, EGRESS, before, expected_revision=state.revision):
                assert [p.prog_id for p in query_device(index, EGRESS).programs] == [b, a]
        with attach_tcx(second, index, EGRESS), attach_tcx(first, index, EGRESS, Anchor(before=True)):
            assert [p.prog_id for p in query_device(index, EGRESS).programs] == [a, b]
        with attach_tcx(second, index, EGRESS), attach_tcx(first, index, EGRESS, Anchor(before=False, prog_id=b)):
            assert [p.prog_id for p in query_device(index, EGRESS).programs] == [b, a]
        assert query_device(index, EGRESS).programs == ()

    netns.run(pair.a, body)


def test_a_pinned_link_goes_on_without_its_process(loaded: BpfObject, pair: Pair, first: Program, bpffs: Path) -> None:
    with netns.run(pair.a, lambda: attach_tcx(first, pair.a_index, EGRESS)) as link:
        link.pin(bpffs / "egress-fimv0")
        was = link.info()
    with loaded.map("m_array") as counts:
        send(pair, 10)
        assert counter(counts, 0) == 10
        with Link.open(bpffs / "egress-fimv0") as again:
            assert again.info() == was
            assert (was.ifindex, was.attach_type) == (pair.a_index, EGRESS)
            with Link.by_id(was.id) as by_id:
                assert by_id.info() == was
            again.detach()
            send(pair, 10)
            assert counter(counts, 0) == 10
            assert again.info().ifindex == 0


def test_attaching_where_there_is_no_device(first: Program, pair: Pair) -> None:
    with pytest.raises(BpfError, match="attach cls_first to TCX_INGRESS of interface 4242"):
        netns.run(pair.a, lambda: attach_tcx(first, 4242, AttachType.TCX_INGRESS))
