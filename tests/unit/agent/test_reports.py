"""Reports of other nodes' pods that aren't believed: what the agent says of them, and what else of them counts."""

from __future__ import annotations

import sys

import pytest

from fimbria.agent.engine import DesiredRows, Engine, NumberBook
from fimbria.model.address import Prefix, pack
from fimbria.model.endpoint import NamedPort, RemoteEndpoint
from fimbria.model.node import Node
from fimbria.model.rows import PrefixKey
from fimbria.tables import Tables

THEIRS = pack("10.2.0.3")
KEY = ("ns", "lie")


def engine_of(tables: Tables, rows: DesiredRows) -> Engine:
    for n, name in enumerate(("one", "two", "taken"), 1):
        node = Node(name, (pack(f"192.0.2.{n}"),), (), (Prefix.parse(f"10.{n}.0.0/24"),))
        tables.nodes.upsert(name, node)
    return Engine(tables, rows, NumberBook(), node="one", cluster="default", overlay=True)


def report(addr: bytes, identity: int, created: str, writer: str) -> RemoteEndpoint:
    ports = (NamedPort("web", 6, 8080),)
    return RemoteEndpoint(identity, (addr,), pack("192.0.2.3"), ports, created, writer)


def test_a_lie_changes_no_row_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    tables, rows = Tables(), DesiredRows()
    engine = engine_of(tables, rows)
    tables.remote_endpoints.upsert(("ns", "true"), report(THEIRS, 300, "2026-01-01T00:00:00Z", "two"))
    engine.step()
    before = dict(rows.ipcache.desired)
    assert before[PrefixKey(128, THEIRS)].identity == 300
    for moment in "123":
        tables.remote_endpoints.upsert(KEY, report(THEIRS, 301, f"2026-01-01T00:00:0{moment}Z", "taken"))
        engine.step()
    tables.nodes.upsert("two", Node("two", (pack("192.0.2.9"),), (), (Prefix.parse("10.2.0.0/24"),)))
    engine.step()
    assert rows.ipcache.desired[PrefixKey(128, THEIRS)].identity == 300
    assert [r.getMessage() for r in caplog.records] == [
        "CiliumEndpoint ns/lie is ignored: 10.2.0.3 is in no pod block of node taken, whose agent wrote it"
    ]
    assert list(engine.ipcache.foreign) == [KEY]


def test_a_report_counts_as_soon_as_its_node_has_the_block() -> None:
    """The two kinds are watched separately: either may come first."""
    tables, rows = Tables(), DesiredRows()
    engine = engine_of(tables, rows)
    addr = pack("10.9.0.3")
    tables.remote_endpoints.upsert(KEY, report(addr, 301, "", "taken"))
    engine.step()
    assert PrefixKey(128, addr) not in rows.ipcache.desired and len(engine.ipcache.foreign) == 1
    blocks = (Prefix.parse("10.3.0.0/24"), Prefix.parse("10.9.0.0/24"))
    tables.nodes.upsert("taken", Node("taken", (pack("192.0.2.3"),), (), blocks))
    engine.step()
    assert rows.ipcache.desired[PrefixKey(128, addr)].identity == 301 and not engine.ipcache.foreign


def test_thousands_of_pods_of_one_identity_cost_each_its_own() -> None:
    """The work of a step grows with the pods, not with their square: a step blocks everything else in the agent."""

    def calls(count: int) -> int:
        tables, made = Tables(), 0
        engine = engine_of(tables, DesiredRows())
        for n in range(count):
            addr = pack(f"10.2.{n >> 8}.{n & 255}")
            tables.remote_endpoints.upsert(("ns", f"p{n}"), report(addr, 300, "", ""))

        def count_calls(_frame: object, event: str, _argument: object) -> None:
            nonlocal made
            made += event == "call"

        sys.setprofile(count_calls)
        try:
            engine.step()
        finally:
            sys.setprofile(None)
        return made

    assert calls(800) < 9 * calls(100)
