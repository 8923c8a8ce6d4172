"""Field sets and server-side apply as values."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fimbria.lab.apiserver import apply, fieldsets
from fimbria.lab.apiserver.apply import Writer
from fimbria.lab.apiserver.types import Type

SHAPE = fieldsets.shape_of_type(Type("Deployment"))
CONFIG = fieldsets.shape_of_type(Type("ConfigMap"))
A, B = Writer("a", "Apply"), Writer("b", "Apply")
DATA = st.dictionaries(st.sampled_from("klmn"), st.sampled_from("12"), max_size=4)


def config(data: dict[str, str]) -> Any:
    return {"metadata": {"name": "c"}} | ({"data": data} if data else {})


def stored(obj: Any, owners: apply.Owners, before: Any) -> Any:
    fields = apply.managed_fields(owners, before, "v1", "2026-01-01T00:00:00Z")
    return obj | {"metadata": obj["metadata"] | {"managedFields": fields}}


def containers(*items: Any) -> Any:
    return {"metadata": {"name": "d"}, "spec": {"template": {"spec": {"containers": list(items)}}}}


def test_paths_of_keyed_lists() -> None:
    found = fieldsets.paths(containers({"name": "c", "ports": [{"containerPort": 80}]}), SHAPE)
    prefix = ("f:spec", "f:template", "f:spec", "f:containers", 'k:{"name":"c"}')
    port = 'k:{"containerPort":80,"protocol":"TCP"}'
    assert (*prefix, ".") in found and (*prefix, "f:ports", port, "f:containerPort") in found
    assert ("f:metadata", "f:name") not in found


def test_fields_v1_round_trip() -> None:
    found = set(fieldsets.paths(containers({"name": "c", "image": "x", "args": ["1"]}), SHAPE))
    assert fieldsets.from_fields_v1(fieldsets.to_fields_v1(found)) == found


def test_readable() -> None:
    path = ("f:spec", "f:containers", 'k:{"name":"c"}', "f:image")
    assert fieldsets.readable(path) == '.spec.containers[name="c"].image'


@given(DATA, DATA)
def test_applying_again_removes_exactly_what_was_dropped(first: dict[str, str], second: dict[str, str]) -> None:
    made, owners, _ = apply.apply(None, config(first), CONFIG, A, False)
    live = stored(made, owners, {"metadata": {}})
    new, _, conflicts = apply.apply(live, config(second), CONFIG, A, False)
    assert not conflicts and (new.get("data") or {}) == second


@given(DATA, DATA)
def test_conflicts_are_the_fields_that_differ(first: dict[str, str], second: dict[str, str]) -> None:
    made, owners, _ = apply.apply(None, config(first), CONFIG, A, False)
    live = stored(made, owners, {"metadata": {}})
    _, _, conflicts = apply.apply(live, config(second), CONFIG, B, False)
    differing = {key for key in first.keys() & second.keys() if first[key] != second[key]}
    assert {fieldsets.readable(one.path) for one in conflicts} == {f".data.{key}" for key in differing}
    forced, after, _ = apply.apply(live, config(second), CONFIG, B, True)
    assert (forced.get("data") or {}) == first | second
    assert not any(path in after[A] for path in fieldsets.paths(config({key: "" for key in differing}), CONFIG))


def test_an_item_two_own_stays_for_the_other() -> None:
    made, owners, _ = apply.apply(None, containers({"name": "c", "image": "x"}), SHAPE, A, False)
    live = stored(made, owners, {"metadata": {}})
    live, owners, _ = apply.apply(live, containers({"name": "c", "tty": True}), SHAPE, B, False)
    live = stored(live, owners, live)
    new, _, _ = apply.apply(live, containers(), SHAPE, A, False)
    assert new["spec"]["template"]["spec"]["containers"] == [{"name": "c", "tty": True}]
    last, _, _ = apply.apply(stored(new, {B: apply.owners_of(live)[B]}, new), containers(), SHAPE, B, False)
    assert last["spec"]["template"]["spec"]["containers"] == []


def test_updates_take_over() -> None:
    made, owners, _ = apply.apply(None, config({"k": "1", "l": "1"}), CONFIG, A, False)
    live = stored(made, owners, {"metadata": {}})
    hand = Writer("hand", "Update")
    after = apply.track(live | {"data": {"k": "2"}}, live, CONFIG, hand)
    assert after[hand] == {("f:data", "f:k")} and after[A] == set()
