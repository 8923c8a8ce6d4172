"""The apply loop: brings desired rows to the kernel in ordered phases, and repairs what others change there.

Rules
1. Targets are listed references first. Upserts go through the list forwards, deletes backwards, so no row ever points
   at something that is not there. A target that *vouches* for others is the exception: its deletes come before all
   upserts, since what it vouched for may change with them. Programs that replace others are swapped between the two:
   when new programs start everything that they read is there (an upgrade fills new maps first), and what the old ones
   read still is.
2. A row that fails stays pending, is tried again with growing pauses (at once when something was removed: that makes
   room), and never stops its neighbours; but a row that *requires* a failed one is held back (an endpoint is not opened
   before its policy is in the kernel).
3. Nothing is written before compute has seen every source once (`open`): until then the kernel goes on with what it
   has.
4. The first pass, and one every `audit_interval`, reads the kernel back and touches only what is wrong. Restart,
   upgrade, drift repair and garbage collection are this one path. An audit reads everything first, and only then takes
   what is pending, in one step: rows that belong together are written together.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from fimbria.apply.rows import Delta, Rows, compare
from fimbria.apply.target import Target

log = logging.getLogger(__name__)
THREAD_FROM: Final = 2000
RETRY_MIN: Final = 0.2
RETRY_MAX: Final = 30.0
MAX_LOGGED: Final = 5

Require = Callable[[Any, Any], Iterable[tuple[str, Any]]]


@dataclass(slots=True)
class Stage:
    """One target with its desired rows.

    `requires(key, row)` names (target, key) pairs that must not be pending. `quick` targets are cheap to read, and are
    what others most likely change. `swaps` targets are written a second time, after all upserts, with order "swap".
    Deltas of `thread_from` rows and more are written in a thread.
    `vouches`: a row says that other targets hold all that its key asks for; it goes first.
    `unreadable` says why the last audit could not read the target back.
    """

    target: Target[Any, Any]
    rows: Rows[Any, Any]
    requires: Require | None = None
    quick: bool = False
    swaps: bool = False
    vouches: bool = False
    thread_from: int = THREAD_FROM
    unreadable: str = ""
    repaired: int = 0
    writes: int = 0
    errors: int = 0


@dataclass(frozen=True, slots=True)
class PlannedChange:
    """One line of a plan."""

    target: str
    action: str
    key: str
    row: str


@dataclass(slots=True)
class Stats:
    """Figures of the loop; seconds."""

    passes: int = 0
    audits: int = 0
    last_pass_seconds: float = 0.0
    last_audit_seconds: float = 0.0


@dataclass(slots=True)
class ApplyLoop:
    """Owns the stages. `on_applied(changed target names)` runs after each pass that changed something."""

    stages: list[Stage]
    on_applied: Callable[[frozenset[str]], None] = lambda _changed: None
    audit_interval: float = 30.0
    stats: Stats = field(default_factory=Stats)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _idle: asyncio.Condition = field(default_factory=asyncio.Condition)
    _opened: bool = False
    _audit_now: bool = True
    _quick_audit: bool = False
    _done: int = 0
    _retry_at: float = 0.0
    _retry_pause: float = RETRY_MIN
    on_drift: Callable[[str, Delta[Any, Any]], None] | None = None

    def __post_init__(self) -> None:
        self.bind()

    def bind(self) -> None:
        """Wake up for changes of the stages' rows; call again when stages were added."""
        for stage in self.stages:
            stage.rows.on_change = self._wake.set

    def open(self) -> None:
        """Every source has been seen: from now on the kernel is brought to the desired state."""
        self._opened = True
        self._wake.set()

    @property
    def opened(self) -> bool:
        """Whether rows are being written."""
        return self._opened

    def audit_soon(self, *, quick: bool = False) -> None:
        """Something may have changed in the kernel behind our back: read it back now (`quick`: the cheap targets)."""
        if quick:
            self._quick_audit = True
        else:
            self._audit_now = True
        self._wake.set()

    async def flush(self) -> None:
        """Return when every row that was wanted at the time of the call was written, or failed."""
        self._wake.set()
        goal = self._done + 2 if self._busy else self._done + 1
        async with self._idle:
            await self._idle.wait_for(lambda: self._done >= goal)

    _busy: bool = False

    def failure(self, target: str, key: Any) -> str | None:
        """Why a row could not be written, if so."""
        for stage in self.stages:
            if stage.rows.name == target:
                return stage.rows.failed.get(key)
        return None

    def failures(self) -> dict[str, dict[Any, str]]:
        """All failed rows by target; under None why a target can't be read back."""
        found = {s.rows.name: dict(s.rows.failed) for s in self.stages if s.rows.failed or s.unreadable}
        for stage in self.stages:
            if stage.unreadable:
                found[stage.rows.name][None] = stage.unreadable
        return found

    def plan(self) -> list[PlannedChange]:
        """What a pass would change in the kernel now. Reads the kernel, writes nothing."""
        changes: list[PlannedChange] = []
        for stage in self.stages:
            # Called in a thread: a copy of the dict is made in one step, walking it would not be.
            delta = compare(dict(stage.rows.desired), stage.target.read())
            name = stage.rows.name
            changes += [PlannedChange(name, "write", str(k), str(v)) for k, v in delta.upserts.items()]
            changes += [PlannedChange(name, "delete", str(k), "") for k in delta.deletes]
        return changes

    async def run(self) -> None:
        """Apply until cancelled."""
        next_audit = time.monotonic() + self.audit_interval
        while True:
            await self._sleep(next_audit)
            self._wake.clear()
            if not self._opened:
                continue
            self._busy = True
            try:
                if self._audit_now or time.monotonic() >= next_audit:
                    self._audit_now = self._quick_audit = False
                    await self._audit(self.stages)
                    next_audit = time.monotonic() + self.audit_interval
                elif self._quick_audit:
                    self._quick_audit = False
                    await self._audit([s for s in self.stages if s.quick])
                else:
                    await self._pass()
            finally:
                self._busy = False
            self._done += 1
            async with self._idle:
                self._idle.notify_all()

    async def _sleep(self, next_audit: float) -> None:
        """Until there is something to write, an audit is due, or failed rows are to be tried again."""
        until = next_audit
        if any(s.rows.failed for s in self.stages):
            if not self._retry_at:
                self._retry_at = time.monotonic() + self._retry_pause
            until = min(until, self._retry_at)
        else:
            self._retry_at, self._retry_pause = 0.0, RETRY_MIN
        with suppress(TimeoutError):
            async with asyncio.timeout(max(until - time.monotonic(), 0.001)):
                await self._wake.wait()
        if self._retry_at and time.monotonic() >= self._retry_at:
            self._retry_at, self._retry_pause = 0.0, min(self._retry_pause * 2, RETRY_MAX)
            self._retry()

    def _retry(self) -> None:
        for stage in self.stages:
            stage.rows.dirty.update(stage.rows.failed)

    async def _pass(self) -> None:
        started = time.perf_counter()
        await self._write({s.rows.name: s.rows.take() for s in self.stages})
        self.stats.passes += 1
        self.stats.last_pass_seconds = time.perf_counter() - started

    async def _audit(self, stages: list[Stage]) -> None:
        started = time.perf_counter()
        actual: dict[str, Mapping[Any, Any]] = {}
        for stage in stages:
            try:
                actual[stage.rows.name] = await asyncio.to_thread(stage.target.read)
                stage.unreadable = ""
            except OSError as error:
                stage.unreadable = f"{stage.rows.name} can't be read back: {error}"
                log.error("%s", stage.unreadable)
        # No await from the first `take` to the last comparison. What was read is still true: only this loop writes.
        deltas = {s.rows.name: s.rows.take() for s in self.stages if s.rows.name not in actual}
        for stage in stages:
            name = stage.rows.name
            if name in actual:
                pending = stage.rows.take_keys()
                delta = compare(stage.rows.desired, actual[name])
                self._note_drift(stage, delta, pending, actual[name])
                for key in stage.rows.failed.keys() - delta.upserts.keys() - delta.deletes:
                    del stage.rows.failed[key]
                deltas[name] = delta
        await self._write(deltas)
        self.stats.audits += 1
        self.stats.last_audit_seconds = time.perf_counter() - started

    def _note_drift(self, stage: Stage, delta: Delta[Any, Any], pending: set[Any], actual: Mapping[Any, Any]) -> None:
        if not self.stats.audits:
            return
        known = pending | stage.rows.failed.keys()
        upserts = {k: v for k, v in delta.upserts.items() if k not in known}
        drift = Delta(upserts, frozenset(delta.deletes - known))
        if not drift:
            return
        stage.repaired += len(drift)
        for key in [*upserts, *drift.deletes][:MAX_LOGGED]:
            what = ("was changed" if key in actual else "was removed") if key in upserts else "was added"
            now = f", now {actual[key]}" if key in actual else ""
            log.warning("drift: %s %s %s behind our back%s; repaired", stage.rows.name, key, what, now)
        if self.on_drift is not None:
            self.on_drift(stage.rows.name, drift)

    async def _write(self, deltas: Mapping[str, Delta[Any, Any]]) -> None:
        changed: set[str] = set()
        room = False
        for stage in self.stages:
            delta = deltas.get(stage.rows.name)
            if stage.vouches and delta and delta.deletes:
                room |= await self._write_stage(stage, Delta(deletes=delta.deletes), "out") > 0
                changed.add(stage.rows.name)
        for stage in self.stages:
            delta = deltas.get(stage.rows.name)
            if delta and delta.upserts:
                await self._write_stage(stage, Delta(self._admitted(stage, delta.upserts)), "in")
                changed.add(stage.rows.name)
        for stage in self.stages:
            if stage.swaps and stage.rows.name in changed:
                await self._write_stage(stage, Delta(deltas[stage.rows.name].upserts), "swap")
        for stage in reversed(self.stages):
            delta = deltas.get(stage.rows.name)
            if not stage.vouches and delta and delta.deletes:
                room |= await self._write_stage(stage, Delta(deletes=delta.deletes), "out") > 0
                changed.add(stage.rows.name)
        if room and any(s.rows.failed for s in self.stages):
            self._retry()
            self._wake.set()
        if changed:
            self.on_applied(frozenset(changed))

    def _admitted(self, stage: Stage, upserts: Mapping[Any, Any]) -> dict[Any, Any]:
        """Rows whose requirements are met; the others fail with the reason of what they wait for."""
        if stage.requires is None:
            return dict(upserts)
        admitted: dict[Any, Any] = {}
        for key, row in upserts.items():
            blocked = next((f"waits for {t} {k}: {r}" for t, k in stage.requires(key, row)
                            if (r := self.failure(t, k)) is not None), None)  # fmt: skip
            if blocked is None:
                admitted[key] = row
            else:
                stage.rows.failed[key] = blocked
        return admitted

    async def _write_stage(self, stage: Stage, delta: Delta[Any, Any], order: str) -> int:
        """Returns how many rows were written."""
        try:
            if len(delta) >= stage.thread_from:
                failures = await asyncio.to_thread(stage.target.write, delta, order=order)
            else:
                failures = stage.target.write(delta, order=order)
        except OSError as error:
            failures = dict.fromkeys([*delta.upserts, *delta.deletes], f"{stage.rows.name}: {error}")
        if order == "swap":
            stage.rows.failed.update(failures)
        else:
            stage.rows.settle(delta, failures)
            stage.writes += len(delta) - len(failures)
        stage.errors += len(failures)
        for reason in list(failures.values())[:MAX_LOGGED]:
            log.error("apply: %s", reason)
        return len(delta) - len(failures)
