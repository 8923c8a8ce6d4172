"""Reading YAML and deciding what apply changes."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.lab.errors import LabError
from fimbria.lab.manifests import LAST_APPLIED, for_create, merge_patch, ordered, parse

POD = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}


def applied(current: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """RFC 7386, section 2."""
    result = dict(current)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            old = result.get(key)
            result[key] = applied(old if isinstance(old, dict) else {}, value)
        else:
            result[key] = value
    return result


def test_order() -> None:
    text = "---\n".join(
        f"apiVersion: v1\nkind: {k}\nmetadata: {{name: x}}\n" for k in ("Pod", "Other", "Service", "Namespace")
    )
    assert [m.kind for m in ordered(parse(text, "f"))] == ["Namespace", "Service", "Other", "Pod"]


def test_lists_and_empty_documents() -> None:
    text = "---\n---\n" + json.dumps({"apiVersion": "v1", "kind": "List", "items": [POD, POD]}) + "\n---\n"
    assert len(parse(text, "f")) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "f, line 1: not valid YAML"),
        ("- 1", "f, document 1: not a Kubernetes object"),
        ("apiVersion: v1\nkind: Pod", "f, document 1: Pod without metadata.name"),
        ("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\nfoo: 1", "f, document 2: not a Kubernetes object"),
        ("apiVersion: v1\nkind: Pod\nmetadata: 3", "without metadata.name"),
    ],
)
def test_bad_yaml_is_named(text: str, message: str) -> None:
    with pytest.raises(LabError, match=message):
        parse(text, "f")


def test_defaults_of_the_server_are_no_change() -> None:
    wanted = POD | {"spec": {"containers": [{"name": "c", "image": "i"}]}}
    stored = for_create(wanted)
    stored["spec"] = {
        "restartPolicy": "Always",
        "containers": [{"name": "c", "image": "i", "imagePullPolicy": "Always"}],
    }
    assert merge_patch(stored, wanted) == {}


def test_changing_an_item_keeps_what_the_server_added() -> None:
    wanted = POD | {"spec": {"containers": [{"name": "c", "image": "new"}]}}
    stored = for_create(POD | {"spec": {"containers": [{"name": "c", "image": "i"}]}})
    stored["spec"]["containers"][0]["volumeMounts"] = ["token"]
    assert merge_patch(stored, wanted)["spec"]["containers"] == [
        {"name": "c", "image": "new", "volumeMounts": ["token"]}
    ]


def test_what_is_no_longer_named_goes_and_what_others_set_stays() -> None:
    stored = for_create(POD | {"spec": {"a": 1, "b": {"c": 1, "d": 2}}})
    stored["spec"]["theirs"] = 5
    patch = merge_patch(stored, POD | {"spec": {"b": {"d": 2}}})
    assert applied(stored, patch)["spec"] == {"b": {"d": 2}, "theirs": 5}


VALUES = st.recursive(
    st.integers() | st.text(max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=3) | st.lists(inner, max_size=3),
    max_leaves=8,
)
SPECS = st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=3)


@given(SPECS, SPECS, SPECS)
def test_applying_ends_with_what_was_asked(first: Any, second: Any, third: Any) -> None:
    stored = for_create(POD | {"spec": first})
    for spec in (second, third):
        stored = applied(stored, merge_patch(stored, POD | {"spec": spec}))
        assert merge_patch(stored, POD | {"spec": spec}) == {}, "a second time changes nothing"
    assert json.loads(stored["metadata"]["annotations"][LAST_APPLIED])["spec"] == third
