"""Patches as values: RFC 6902, RFC 7386 and the strategic merge of lists by key."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.lab.apiserver.patch import PatchError, json_patch, merge_patch, strategic_patch
from fimbria.lab.apiserver.types import TYPES

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab/~", max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab/~", max_size=2), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("document", "operation", "expected"),
    [
        ({"a": 1}, {"op": "add", "path": "/b", "value": 2}, {"a": 1, "b": 2}),
        ({"a": [1, 3]}, {"op": "add", "path": "/a/1", "value": 2}, {"a": [1, 2, 3]}),
        ({"a": [1]}, {"op": "add", "path": "/a/-", "value": 2}, {"a": [1, 2]}),
        ({"a/b": 1}, {"op": "remove", "path": "/a~1b"}, {}),
        ({"a~b": 1}, {"op": "replace", "path": "/a~0b", "value": None}, {"a~b": None}),
        ({"a": 1}, {"op": "move", "from": "/a", "path": "/b"}, {"b": 1}),
        ({"a": [1, 2]}, {"op": "copy", "from": "/a/0", "path": "/b"}, {"a": [1, 2], "b": 1}),
        ({"a": 1}, {"op": "test", "path": "/a", "value": 1}, {"a": 1}),
        ({"a": 1}, {"op": "add", "path": "", "value": {"z": 1}}, {"z": 1}),
    ],
)
def test_json_patch(document: Any, operation: Any, expected: Any) -> None:
    before = copy.deepcopy(document)
    assert json_patch(document, [operation]) == expected
    assert document == before


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "remove", "path": "/x"},
        {"op": "replace", "path": "/x", "value": 1},
        {"op": "test", "path": "/a", "value": 2},
        {"op": "add", "path": "/l/9", "value": 1},
        {"op": "add", "path": "/a/b", "value": 1},
        {"op": "move", "from": "/x", "path": "/y"},
        {"op": "jump", "path": "/a"},
        {"op": "add", "path": "a", "value": 1},
        {"op": "add", "path": "/a"},
    ],
)
def test_json_patch_refuses(operation: Any) -> None:
    with pytest.raises(PatchError):
        json_patch({"a": 1, "l": []}, [operation])


def test_merge_patch_examples_of_the_rfc() -> None:
    assert merge_patch({"a": "b"}, {"a": "c"}) == {"a": "c"}
    assert merge_patch({"a": "b", "b": "c"}, {"a": None}) == {"b": "c"}
    assert merge_patch({"a": [1]}, {"a": {"b": None}}) == {"a": {}}
    assert merge_patch({"e": None}, {"a": 1}) == {"e": None, "a": 1}
    assert merge_patch({}, {"a": {"bb": {"ccc": None}}}) == {"a": {"bb": {}}}
    assert merge_patch([1, 2], {"a": "b"}) == {"a": "b"}


@given(JSON, JSON)
def test_merge_patch_is_idempotent_and_changes_nothing_in_place(document: Any, patch: Any) -> None:
    before = copy.deepcopy(document)
    once = merge_patch(document, patch)
    assert merge_patch(once, patch) == once and document == before


def spec_patch(document: Any, patch: Any) -> Any:
    return strategic_patch(document, patch, TYPES["PodSpec"])


def test_strategic_patch_by_merge_key() -> None:
    old = {"containers": [{"name": "a", "image": "1", "args": ["x"]}, {"name": "b", "image": "1"}]}
    new = spec_patch(old, {"containers": [{"name": "a", "image": "2"}, {"name": "c", "image": "3"}]})
    assert new["containers"] == [{"name": "a", "image": "2", "args": ["x"]}, {"name": "b", "image": "1"},
                                 {"name": "c", "image": "3"}]  # fmt: skip


def test_strategic_patch_directives() -> None:
    old = {"containers": [{"name": "a"}, {"name": "b"}], "nodeSelector": {"x": "1", "y": "2"}}
    assert spec_patch(old, {"containers": [{"name": "a", "$patch": "delete"}]})["containers"] == [{"name": "b"}]
    whole = {"containers": [{"name": "z"}, {"$patch": "replace"}]}
    assert spec_patch(old, whole)["containers"] == [{"name": "z"}]
    assert spec_patch(old, {"nodeSelector": {"$patch": "replace", "z": "3"}})["nodeSelector"] == {"z": "3"}
    ordered = {"$setElementOrder/containers": [{"name": "b"}, {"name": "a"}]}
    assert [one["name"] for one in spec_patch(old, ordered)["containers"]] == ["b", "a"]


def test_strategic_patch_of_sets() -> None:
    meta = TYPES["ObjectMeta"]
    assert strategic_patch({"finalizers": ["a"]}, {"finalizers": ["b"]}, meta) == {"finalizers": ["a", "b"]}
    gone = strategic_patch({"finalizers": ["a", "b"]}, {"$deleteFromPrimitiveList/finalizers": ["a"]}, meta)
    assert gone == {"finalizers": ["b"]}


def test_strategic_patch_needs_the_merge_key() -> None:
    with pytest.raises(PatchError, match="merge key: name"):
        spec_patch({}, {"containers": [{"image": "x"}]})
