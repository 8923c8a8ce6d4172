"""Label selectors in their string form."""

import pytest

from fimbria.model.selector import MAX_LENGTH, NodeSelector

LABELS = {"pool": "edge", "zone": "a", "empty": ""}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("pool=edge", True), ("pool==edge", True), ("pool = core", False), ("pool!=core", True), ("none!=x", True),
        ("pool", True), ("none", False), ("!none", True), ("! pool", False), ("empty=", True), ("pool=", False),
        ("pool in (core, edge)", True), ("pool in (core)", False), ("pool notin (core)", True),
        ("none notin (x)", True), ("none in (x)", False), (" pool=edge , zone in (a,b),!old ", True),
        ("pool=edge,zone=b", False), ("node.kubernetes.io/x-y_z.1 notin (q)", True),
    ],
)  # fmt: skip
def test_what_holds(text: str, holds: bool) -> None:
    assert NodeSelector.parse(text)(LABELS) is holds


@pytest.mark.parametrize(
    "text",
    ["", " ", ",", "a=b,", "a=b c=d", "a in b", "a in (b", "a in (b c)", "=b", "a=b=c", "!", "a<1", "a=b,,c=d",
     "a" * (MAX_LENGTH + 1)],
)  # fmt: skip
def test_what_is_no_selector(text: str) -> None:
    with pytest.raises(ValueError, match="is not a label selector"):
        NodeSelector.parse(text)
