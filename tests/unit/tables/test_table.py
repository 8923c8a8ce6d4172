"""Tables against a plain dict, and the promises that subscribers build on."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fimbria.tables.table import Changes, Signal, Table


@dataclass(frozen=True, slots=True)
class Row:
    node: str
    labels: frozenset[str] = frozenset()


def test_equal_row_is_no_change() -> None:
    table = Table[str, Row]("pods")
    assert table.upsert("a", Row("n1"))
    revision = table.revision
    assert not table.upsert("a", Row("n1"))
    assert table.revision == revision
    assert table.upsert("a", Row("n2"))
    assert table.revision == revision + 1


def test_delete_of_unknown_is_no_change() -> None:
    table = Table[str, Row]("pods")
    assert not table.delete("a")
    assert table.revision == 0


def test_keys_are_coalesced_between_drains() -> None:
    table = Table[str, int]("t")
    subscription = table.subscribe()
    table.upsert("a", 1)
    table.upsert("a", 2)
    table.delete("a")
    table.upsert("b", 1)
    assert subscription.drain() == {"a", "b"}
    assert subscription.drain() == set()
    assert not subscription.signal.is_set


def test_late_subscriber_sees_existing_rows_unless_told_otherwise() -> None:
    table = Table[str, int]("t")
    table.upsert("a", 1)
    assert table.subscribe().drain() == {"a"}
    late = table.subscribe(initial=False)
    assert not late.signal.is_set
    assert late.drain() == set()


def test_replace_names_only_what_differs() -> None:
    table = Table[str, int]("t")
    table.replace({"same": 1, "changed": 1, "gone": 1})
    subscription = table.subscribe(initial=False)
    kept = table["same"]
    assert table.replace({"same": 1, "changed": 2, "new": 1}) == 3
    assert subscription.drain() == {"changed", "gone", "new"}
    assert dict(table.items()) == {"same": 1, "changed": 2, "new": 1}
    assert table["same"] is kept
    assert table.replace(dict(table.items())) == 0


def test_closed_subscription_hears_nothing_more() -> None:
    table = Table[str, int]("t")
    first, second = table.subscribe(), table.subscribe()
    first.close()
    table.upsert("a", 1)
    assert first.drain() == set()
    assert second.drain() == {"a"}


def test_index_that_raises_changes_nothing() -> None:
    def of(value: int) -> Iterable[int]:
        return [1 // value]

    table = Table[str, int]("t")
    table.add_index("first", lambda value: [value])
    table.add_index("bad", of)
    with pytest.raises(ZeroDivisionError):
        table.upsert("a", 0)
    assert "a" not in table
    assert table.revision == 0
    assert table.by("first", 0) == set()


def test_index_covers_rows_that_were_there_before_it() -> None:
    table = Table[str, Row]("pods")
    table.upsert("a", Row("n1"))
    table.add_index("node", lambda row: [row.node])
    assert table.by("node", "n1") == {"a"}
    assert set(table.entries("node")) == {"n1"}


def test_unknown_or_doubled_index_is_an_error() -> None:
    table = Table[str, int]("t")
    with pytest.raises(KeyError):
        table.by("nope", 1)
    table.add_index("x", lambda value: [value])
    with pytest.raises(ValueError, match="already has an index named x"):
        table.add_index("x", lambda value: [value])


def test_tables_of_one_name_can_not_be_followed_together() -> None:
    with pytest.raises(ValueError, match="told apart"):
        Changes([Table[str, int]("t"), Table[str, int]("t")])


async def test_one_loop_waits_for_many_tables() -> None:
    pods, services = Table[str, int]("pods"), Table[str, int]("services")
    changes = Changes([pods, services])
    waiter = asyncio.ensure_future(changes.wait())
    await asyncio.sleep(0)
    assert not waiter.done()
    services.upsert("s", 1)
    await asyncio.wait_for(waiter, 1)
    pods.upsert("p", 1)
    assert changes.drain() == {"pods": {"p"}, "services": {"s"}}
    assert not changes.signal.is_set
    pods.delete("p")
    await asyncio.wait_for(changes.wait(), 1)
    assert changes.drain() == {"pods": {"p"}}


async def test_becoming_synced_wakes_waiters_once() -> None:
    table = Table[str, int]("t")
    changes = Changes([table])
    waiters = asyncio.gather(table.wait_synced(), changes.wait_synced(), changes.wait())
    await asyncio.sleep(0)
    assert not table.synced
    table.mark_synced()
    await asyncio.wait_for(waiters, 1)
    assert table.synced
    assert changes.synced
    assert changes.drain() == {}
    table.mark_synced()
    assert not changes.signal.is_set


def test_shared_signal_is_cleared_by_its_owner_alone() -> None:
    signal = Signal()
    a, b = Table[str, int]("a"), Table[str, int]("b")
    of_a, of_b = a.subscribe(signal), b.subscribe(signal)
    a.upsert("x", 1)
    b.upsert("y", 1)
    of_a.drain()
    assert signal.is_set
    assert of_b.drain() == {"y"}


KEYS = st.sampled_from("abcdef")
ROWS = st.builds(Row, st.sampled_from(["n1", "n2"]), st.frozensets(st.sampled_from("xyz")))


class TableMachine(RuleBasedStateMachine):
    """Any sequence of writes, drains and new indexes behaves like a dict recomputed from scratch."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table[str, Row]("t")
        self.model: dict[str, Row] = {}
        self.table.add_index("node", lambda row: [row.node])
        self.table.add_index("label", lambda row: row.labels)
        self.subscription = self.table.subscribe()
        self.seen: dict[str, Row] = {}

    @rule(key=KEYS, row=ROWS)
    def upsert(self, key: str, row: Row) -> None:
        before = self.table.revision
        changed = self.model.get(key) != row
        assert self.table.upsert(key, row) == changed
        assert self.table.revision == before + changed
        self.model[key] = row

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        assert self.table.delete(key) == (self.model.pop(key, None) is not None)

    @rule(rows=st.dictionaries(KEYS, ROWS))
    def replace(self, rows: dict[str, Row]) -> None:
        differ = {key for key in rows.keys() | self.model.keys() if rows.get(key) != self.model.get(key)}
        assert self.table.replace(rows) == len(differ)
        self.model = dict(rows)

    @rule()
    def follow(self) -> None:
        for key in self.subscription.drain():
            row = self.table.get(key)
            if row is None:
                self.seen.pop(key, None)
            else:
                self.seen[key] = row
        assert self.seen == self.model

    @invariant()
    def same_rows(self) -> None:
        assert dict(self.table.items()) == self.model
        assert len(self.table) == len(self.model)

    @invariant()
    def same_indexes(self) -> None:
        for node in ("n1", "n2"):
            assert self.table.by("node", node) == {k for k, row in self.model.items() if row.node == node}
        for label in "xyz":
            assert self.table.by("label", label) == {k for k, row in self.model.items() if label in row.labels}
        assert set(self.table.entries("label")) == {x for row in self.model.values() for x in row.labels}

    @invariant()
    def pending_means_signal(self) -> None:
        assert self.subscription.signal.is_set == bool(len(self.subscription))


TableMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestTableMachine = TableMachine.TestCase
