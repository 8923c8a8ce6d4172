"""The store against the plain truth: any sequence of writes, seen at any version, and after a restart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fimbria.lab.apiserver.model import Key
from fimbria.lab.apiserver.store import Expired, Shelf, Store

WRITES = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["write", "remove"])), max_size=30)


def no_fields(_: Any) -> dict[str, str]:
    return {}


def contents(entries: dict[Key, Any]) -> dict[str, str]:
    return {key.name: entry.object()["value"] for key, entry in entries.items()}


def run(store: Store, writes: list[tuple[str, str]]) -> tuple[Shelf, dict[int, dict[str, str]]]:
    shelf = store.shelf("things", no_fields)
    state: dict[str, str] = {}
    truth = {store.rv: dict(state)}
    for number, (name, what) in enumerate(writes):
        if what == "write":
            state[name] = str(number)
            store.write(shelf, Key("", name), {"metadata": {"name": name}, "value": str(number)}, no_fields)
        elif name in state:
            del state[name]
            store.remove(shelf, Key("", name))
        truth[store.rv] = dict(state)
    return shelf, truth


@given(WRITES)
@settings(max_examples=60, deadline=None)
def test_every_version_can_be_seen_again(writes: list[tuple[str, str]]) -> None:
    store = Store(":memory:")
    shelf, truth = run(store, writes)
    for rv, state in truth.items():
        assert contents(shelf.snapshot(max(rv, shelf.floor))) == state
    store.close()


@given(WRITES)
@settings(max_examples=60, deadline=None)
def test_events_replay_to_the_state(writes: list[tuple[str, str]]) -> None:
    store = Store(":memory:")
    shelf, truth = run(store, writes)
    replayed: dict[str, str] = {}
    for event in shelf.events_after(shelf.floor):
        if event.new is None:
            del replayed[event.key.name]
        else:
            replayed[event.key.name] = event.new.object()["value"]
    assert replayed == truth[store.rv]
    store.close()


def test_history_is_bounded() -> None:
    store = Store(":memory:", history=5)
    shelf, _ = run(store, [("a", "write")] * 30)
    assert len(shelf.events_after(shelf.floor)) <= 10
    with pytest.raises(Expired):
        shelf.events_after(shelf.floor - 1)
    with pytest.raises(Expired):
        shelf.snapshot(shelf.floor - 1)
    store.close()


def test_restart_keeps_objects_versions_and_the_right_to_resume(tmp_path: Path) -> None:
    path = tmp_path / "db"
    store = Store(path)
    _, truth = run(store, [("a", "write"), ("b", "write"), ("a", "remove")])
    other = store.shelf("others", no_fields)
    store.write(other, Key("", "x"), {"metadata": {"name": "x"}, "value": "1"}, no_fields)
    last = store.rv
    store.close()
    again = Store(path)
    shelf = again.shelf("things", no_fields)
    assert again.rv == last and contents(shelf.entries) == truth[last - 1]
    assert shelf.events_after(last - 1) == []
    with pytest.raises(Expired):
        shelf.events_after(last - 2)
    again.close()
