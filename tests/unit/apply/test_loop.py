"""Order, requirements, retries and audits of the apply loop, on targets that only remember."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fimbria.apply.loop import ApplyLoop, Stage
from fimbria.apply.rows import Delta, Rows


class Remembers:
    """A target that notes every write in a list it shares with others."""

    def __init__(self, name: str, seen: list[tuple[str, str, Any]]) -> None:
        self.name = name
        self.seen = seen
        self.rows: dict[Any, Any] = {}
        self.room = 100
        self.read_error = ""
        self.write_error = ""

    def read(self) -> dict[Any, Any]:
        if self.read_error:
            raise OSError(5, self.read_error)
        return dict(self.rows)

    def write(self, delta: Delta[Any, Any], *, order: str) -> Mapping[Any, str]:
        if self.write_error:
            raise OSError(5, self.write_error)
        failures = {}
        keys = [*delta.upserts, *delta.deletes]
        self.seen += [(order, self.name, key) for key in keys]
        for key in keys:
            if order == "out":
                self.rows.pop(key, None)
            elif key not in self.rows and len(self.rows) >= self.room:
                failures[key] = f"{self.name} is full"
            else:
                self.rows[key] = delta.upserts[key]
        return failures


def build(*names: str) -> tuple[ApplyLoop, dict[str, Remembers], dict[str, Rows[Any, Any]], list[tuple[str, str, Any]]]:
    seen: list[tuple[str, str, Any]] = []
    targets = {n: Remembers(n, seen) for n in names}
    rows: dict[str, Rows[Any, Any]] = {n: Rows(n) for n in names}
    return ApplyLoop([Stage(targets[n], rows[n]) for n in names], audit_interval=3600), targets, rows, seen


@asynccontextmanager
async def running(loop: ApplyLoop, *, opened: bool = True) -> AsyncIterator[None]:
    task = asyncio.create_task(loop.run())
    if opened:
        loop.open()
        await loop.flush()
    try:
        yield
    finally:
        task.cancel()


async def test_references_first_in_and_last_out() -> None:
    loop, _, rows, seen = build("sets", "links", "endpoints")
    async with running(loop):
        for name in rows:
            rows[name].put(1, "a")
        await loop.flush()
        assert seen == [("in", "sets", 1), ("in", "links", 1), ("in", "endpoints", 1)]
        seen.clear()
        for name in rows:
            rows[name].drop(1)
        await loop.flush()
        assert seen == [("out", "endpoints", 1), ("out", "links", 1), ("out", "sets", 1)]


async def test_programs_are_swapped_when_all_rows_are_in_and_none_is_out_yet() -> None:
    loop, _, rows, seen = build("sets", "links", "endpoints")
    loop.stages[1].swaps = True
    async with running(loop):
        rows["endpoints"].put("old", 1)
        await loop.flush()
        seen.clear()
        for name in rows:
            rows[name].put("new", 1)
        rows["endpoints"].drop("old")
        await loop.flush()
        assert [s[:2] for s in seen] == [
            ("in", "sets"), ("in", "links"), ("in", "endpoints"), ("swap", "links"), ("out", "endpoints"),
        ]  # fmt: skip


async def test_nothing_is_written_before_the_loop_is_opened() -> None:
    loop, targets, rows, _ = build("sets")
    targets["sets"].rows = {"orphan": 1}
    async with running(loop, opened=False):
        rows["sets"].put("a", 1)
        await asyncio.sleep(0.02)
        assert targets["sets"].rows == {"orphan": 1}
        loop.open()
        await loop.flush()
        assert targets["sets"].rows == {"a": 1}


async def test_a_row_waits_for_what_it_requires_and_follows_it() -> None:
    loop, targets, rows, _ = build("sets", "endpoints")
    loop.stages[1].requires = lambda _key, row: [("sets", row)]
    targets["sets"].room = 0
    async with running(loop):
        rows["sets"].put(7, "rules")
        rows["endpoints"].put(1, 7)
        rows["endpoints"].put(2, 8)  # needs nothing that failed
        await loop.flush()
        assert targets["endpoints"].rows == {2: 8}
        assert loop.failure("endpoints", 1) == "waits for sets 7: sets is full"
        targets["sets"].room = 1
        while loop.failures():  # noqa: ASYNC110 by itself, after a pause
            await asyncio.sleep(0.02)
        assert targets["endpoints"].rows == {1: 7, 2: 8}


async def test_room_is_used_at_once() -> None:
    loop, targets, rows, _ = build("sets")
    targets["sets"].room = 1
    async with running(loop):
        rows["sets"].put("a", 1)
        rows["sets"].put("b", 1)
        await loop.flush()
        assert len(loop.failures()["sets"]) == 1
        (there,) = targets["sets"].rows
        loop._retry_pause = 3600  # not by waiting
        rows["sets"].drop(there)
        await loop.flush()
        await loop.flush()
        assert targets["sets"].rows == rows["sets"].desired and loop.failures() == {}


async def test_wake_ups_do_not_put_off_a_retry() -> None:
    loop, targets, rows, _ = build("sets", "other")
    targets["sets"].room = 0
    async with running(loop):
        rows["sets"].put("a", 1)
        await loop.flush()
        targets["sets"].room = 1
        for n in range(30):  # busier than the retry's pause is long
            rows["other"].put(n, n)
            await asyncio.sleep(0.02)
        assert targets["sets"].rows == {"a": 1}


async def test_a_target_that_cannot_be_read_is_still_written() -> None:
    loop, targets, rows, _ = build("links", "routes")
    targets["links"].read_error = "no such folder"
    async with running(loop):
        rows["links"].put("a", 1)
        rows["routes"].put("a", 1)
        loop.audit_soon()
        await loop.flush()
        assert targets["links"].rows == {"a": 1} and targets["routes"].rows == {"a": 1}
        assert "no such folder" in loop.failures()["links"][None]
        targets["links"].read_error = ""
        loop.audit_soon()
        await loop.flush()
        assert loop.failures() == {}


async def test_a_target_that_cannot_be_written_fails_its_rows_only() -> None:
    loop, targets, rows, _ = build("links", "routes")
    targets["links"].write_error = "read-only"
    async with running(loop):
        rows["links"].put("a", 1)
        rows["routes"].put("a", 1)
        await loop.flush()
        assert targets["routes"].rows == {"a": 1}
        assert "read-only" in loop.failures()["links"]["a"]


async def test_rows_that_belong_together_are_taken_together_in_an_audit() -> None:
    """A change that arrives while targets are being read is written as a whole, or not yet."""
    loop, targets, rows, seen = build("sets", "endpoints")
    async with running(loop):
        read = targets["endpoints"].read

        def change_meanwhile() -> dict[Any, Any]:
            if not rows["sets"].desired:
                rows["sets"].put(1, "rules")
                rows["endpoints"].put(1, 1)
            return read()

        targets["endpoints"].read = change_meanwhile  # type: ignore[method-assign]
        loop.audit_soon()
        await loop.flush()
        assert seen == [("in", "sets", 1), ("in", "endpoints", 1)]


async def test_drift_is_repaired_counted_and_only_then_called_drift(caplog: Any) -> None:
    loop, targets, rows, _ = build("routes")
    targets["routes"].rows = {"leftover": 1}
    async with running(loop):
        assert targets["routes"].rows == {} and loop.stages[0].repaired == 0, "the first pass is no drift"
        rows["routes"].put("a", 1)
        await loop.flush()
        targets["routes"].rows = {"a": 9, "stranger": 1}
        loop.audit_soon()
        await loop.flush()
        assert targets["routes"].rows == {"a": 1} and loop.stages[0].repaired == 2
        assert "routes a was changed behind our back, now 9" in caplog.text
        assert "routes stranger was added" in caplog.text


async def test_a_failure_goes_with_its_row() -> None:
    loop, targets, rows, _ = build("sets")
    targets["sets"].room = 0
    async with running(loop):
        rows["sets"].put("a", 1)
        await loop.flush()
        assert loop.failures()
        rows["sets"].drop("a")
        loop.audit_soon()
        await loop.flush()
        assert loop.failures() == {}
