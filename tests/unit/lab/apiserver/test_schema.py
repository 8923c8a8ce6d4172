from __future__ import annotations

from typing import Any

import pytest

from fimbria.lab.apiserver import schema
from fimbria.lab.apiserver.columns import json_path

THING: Any = {
    "type": "object",
    "properties": {
        "spec": {
            "type": "object",
            "properties": {
                "list": {"type": "array", "minItems": 1,
                         "items": {"type": "object", "properties": {"a": {"type": "string"}}}},
                "map": {"type": "object", "additionalProperties": {"type": "integer", "default": 1}},
                "open": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                "nullable": {"type": "string", "nullable": True},
                "plain": {"type": "string", "default": "x"},
                "keyed": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["k"],
                          "items": {"type": "object", "properties": {"k": {"type": "string"}}}},
                "choice": {"type": "object", "oneOf": [{"required": ["a"]}, {"required": ["b"]}],
                           "properties": {"a": {"type": "string"}, "b": {"type": "string"}}},
            },
        }
    },
}  # fmt: skip


def test_prune() -> None:
    obj = {
        "metadata": {"anything": 1},
        "spec": {"list": [{"a": "1", "b": 2}], "map": {"x": 1}, "open": {"y": {}}, "z": 1},
    }
    assert schema.prune(obj, THING) == ["spec.list[0].b", "spec.z"]
    assert obj["spec"] == {"list": [{"a": "1"}], "map": {"x": 1}, "open": {"y": {}}}


def test_defaults_and_nulls() -> None:
    obj: Any = {"spec": {"plain": None, "nullable": None, "list": None}}
    schema.default(obj, THING)
    schema.drop_nulls(obj, THING)
    assert obj["spec"] == {"plain": "x", "nullable": None}


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ({"list": []}, ["spec.list"]),
        ({"list": "x"}, ["spec.list"]),
        ({"map": {"a": "1"}}, ["spec.map.a"]),
        ({"keyed": [{"k": "1"}, {"k": "1"}]}, ["spec.keyed[1]"]),
        ({"choice": {"a": "1", "b": "1"}}, ["spec.choice"]),
        ({"choice": {"a": "1"}}, []),
        ({"nullable": None}, []),
    ],
)
def test_validate(spec: Any, fields: list[str]) -> None:
    assert [error.field for error in schema.validate({"spec": spec}, THING)] == fields


def test_json_path() -> None:
    obj = {"a": {"b": [{"t": "x", "v": 1}, {"t": "y", "v": 2}]}, "l": {"c/d": 3}}
    assert json_path(".a.b[1].v")(obj) == 2
    assert json_path('.a.b[?(@.t=="y")].v')(obj) == [2]
    assert json_path(".a.b[*].v")(obj) == [1, 2]
    assert json_path(".l['c/d']")(obj) == 3
    assert json_path(".a.none.deeper")(obj) is None and json_path(".a.b[7].v")(obj) is None
    for wrong in ("a.b", "..a", ".a[?(@.x>1)]", ".a["):
        with pytest.raises(ValueError, match="unsupported JSONPath"):
            json_path(wrong)
