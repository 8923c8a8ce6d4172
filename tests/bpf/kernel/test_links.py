"""Attaching to clsact and cgroups, on any kernel that is supported, and reading back what is attached."""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from fimbria.kernel import netns, tc
from fimbria.kernel.bpf import (
    AttachType,
    BpfError,
    BpfObject,
    Map,
    Program,
    TcSlot,
    attach_cgroup,
    attach_netns,
    attach_xdp,
    clsact,
    link_ids,
    map_ids,
    prog_info,
    program_ids,
    query_cgroup,
    tc_attach,
    tc_detach,
    tc_query,
)
from fimbria.kernel.link import change
from fimbria.kernel.netlink import NetlinkSocket

EGRESS = AttachType.TCX_EGRESS


class Pair(Protocol):
    """See conftest.py."""

    a: int
    b: int
    a_socket: NetlinkSocket
    a_index: int
    b_index: int


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


def test_clsact_for_kernels_without_tcx(loaded: BpfObject, pair: Pair, first: Program, second: Program) -> None:
    slot = TcSlot(pair.a_index, egress=True, priority=1, handle=0xF1)

    def body() -> None:
        assert tc_query(slot) is None
        assert clsact(pair.a_index) and not clsact(pair.a_index)
        assert tc_query(slot) is None
        one = tc_attach(first, slot)
        assert one == prog_info(first.fd).id == tc_query(slot)
        with pytest.raises(BpfError) as taken:
            tc_attach(second, slot)
        assert taken.value.errno == errno.EEXIST
        two = tc_attach(second, slot, replace=True)
        assert two == tc_query(slot) != one
        with pytest.raises(BpfError, match=f"it holds program {two}, not {one}"):
            tc_detach(slot, one)
        filters = tc.dump_filters(pair.a_socket, pair.a_index, egress=True)
        assert [(f.priority, f.handle, f.kind, f.prog_id, f.egress) for f in filters] == [(1, 0xF1, "bpf", two, True)]
        assert tc.dump_filters(pair.a_socket, pair.a_index, egress=False) == []
        send(pair, 5)
        assert tc_detach(slot, two) and not tc_detach(slot, two)

    netns.run(pair.a, body)
    with loaded.map("m_array") as counts:
        assert (counter(counts, 0), counter(counts, 1)) == (0, 5)


CONNECT = """
import os, socket, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
for port in (9, 10):
    try:
        socket.create_connection(("127.0.0.1", port), 2)
    except OSError as e:
        print(e.errno)
"""


def test_a_cgroup_program_rules_its_subtree_only(loaded: BpfObject, cgroup: Path, pair: Pair) -> None:
    with loaded.program("sock_connect4") as program, loaded.map("m_array") as counts:
        with attach_cgroup(program, cgroup, AttachType.CGROUP_INET4_CONNECT) as link:
            ours = prog_info(program.fd).id
            info = link.info()
            assert (info.prog_id, info.attach_type) == (ours, AttachType.CGROUP_INET4_CONNECT)
            assert info.cgroup_id == cgroup.stat().st_ino
            assert [p.prog_id for p in query_cgroup(cgroup, AttachType.CGROUP_INET4_CONNECT).programs] == [ours]
            assert query_cgroup(cgroup.parent, AttachType.CGROUP_INET4_CONNECT).programs == ()
            run = subprocess.run(
                [sys.executable, "-c", CONNECT, str(cgroup)], check=True, capture_output=True, text=True
            )
            assert [int(x) for x in run.stdout.split()] == [errno.EPERM, errno.ECONNREFUSED]
            assert counter(counts, 2) == 2
        assert query_cgroup(cgroup, AttachType.CGROUP_INET4_CONNECT).programs == ()


def test_generic_xdp(loaded: BpfObject, pair: Pair) -> None:
    with (
        loaded.program("xdp_count") as program,
        loaded.map("m_array") as counts,
        netns.run(pair.b, lambda: attach_xdp(program, pair.b_index, flags=2)) as link,
    ):
        info = link.info()
        assert (info.ifindex, info.attach_type) == (pair.b_index, AttachType.XDP)
        send(pair, 5)
        deadline = time.monotonic() + 10
        while counter(counts, 3) < 5:  # a busy kernel receives some time after it has sent
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_socket_lookup_of_one_namespace(loaded: BpfObject, pair: Pair) -> None:
    def connect(port: int) -> int:
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", port))
            server.listen()
            client.settimeout(2)
            return client.connect_ex(("127.0.0.1", port))

    pair.a_socket.do(change(1, up=True))
    with loaded.program("lookup_refuse") as program:
        with attach_netns(program, pair.a):
            assert netns.run(pair.a, lambda: connect(7777)) == errno.ECONNREFUSED
            assert netns.run(pair.a, lambda: connect(7778)) == 0
        assert netns.run(pair.a, lambda: connect(7777)) == 0


def test_iteration_finds_what_is_there(loaded: BpfObject, cgroup: Path) -> None:
    with loaded.program("sock_connect4") as program, loaded.map("m_array") as m:
        with attach_cgroup(program, cgroup, AttachType.CGROUP_INET4_CONNECT) as link:
            assert link.info().id in set(link_ids())
        assert m.info.id in set(map_ids())
        assert prog_info(program.fd).id in set(program_ids())
        assert m.info.id in prog_info(program.fd).map_ids
