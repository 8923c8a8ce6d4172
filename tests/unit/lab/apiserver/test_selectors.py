from __future__ import annotations

import pytest

from fimbria.lab.apiserver.errors import ApiError
from fimbria.lab.apiserver.selectors import match_label_selector, parse_fields, parse_labels

LABELS = {"app": "web", "tier": "3", "a.b/c": "x"}


@pytest.mark.parametrize(
    ("selector", "matches"),
    [
        ("app=web", True), ("app==web", True), ("app!=web", False), ("other!=web", True), ("app in (web, db)", True),
        ("app notin (web)", False), ("other notin (web)", True), ("app", True), ("!app", False), ("!other", True),
        ("a.b/c=x,app", True), ("tier>2", True), ("tier<2", False), ("app>2", False), ("other in ()", False),
        ("app in (web),!other,tier!=4", True),
    ],
)  # fmt: skip
def test_labels(selector: str, matches: bool) -> None:
    match = parse_labels(selector)
    assert match is not None and match(LABELS) is matches


def test_nothing_selects_all() -> None:
    assert parse_labels("") is None and parse_labels("  ") is None


@pytest.mark.parametrize("selector", ["a in b", "=x", "a=b c", "a!b", "a>x", "in (a)", "-a", "a=-", ","])
def test_bad_labels(selector: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_labels(selector)
    assert caught.value.code == 400


def test_fields() -> None:
    known = {"metadata.name", "spec.nodeName"}.__contains__
    match = parse_fields("metadata.name=a,spec.nodeName!=n", known)
    assert match is not None
    assert match({"metadata.name": "a"}) and not match({"metadata.name": "a", "spec.nodeName": "n"})
    for wrong in ("status.phase=x", "metadata.name"):
        with pytest.raises(ApiError):
            parse_fields(wrong, known)


def test_label_selector_objects() -> None:
    assert match_label_selector({}, LABELS) and not match_label_selector(None, LABELS)
    terms = [{"key": "app", "operator": "In", "values": ["web"]}, {"key": "none", "operator": "DoesNotExist"}]
    assert match_label_selector({"matchLabels": {"app": "web"}, "matchExpressions": terms}, LABELS)
    assert not match_label_selector({"matchExpressions": [{"key": "none", "operator": "Exists"}]}, LABELS)
