"""Label and field selectors as kube-apiserver parses them (apimachinery labels and fields)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from fimbria.lab.apiserver.errors import bad_request

Match = Callable[[Mapping[str, str]], bool]

_LABEL_KEY = re.compile(r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
_LABEL_VALUE = re.compile(r"^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$")
_SET = re.compile(r"^(\S+)\s+(in|notin)\s*\(([^()]*)\)$")
_COMPARE = re.compile(r"^([^!=<>\s]+)\s*(==|!=|=|<|>)\s*(\S*)$")


def is_label_key(text: str) -> bool:
    return bool(_LABEL_KEY.match(text))


def is_label_value(text: str) -> bool:
    return bool(_LABEL_VALUE.match(text))


def parse_labels(text: str) -> Match | None:
    """A selector such as ``a=b,c!=d,e in (f,g),h,!i``; None when it selects all. Raises ApiError 400."""
    terms = [_label_term(term.strip()) for term in _split(text)] if text.strip() else []
    return _all(terms)


def _split(text: str) -> list[str]:
    """Splits at the commas outside parentheses."""
    return re.split(r",(?![^(]*\))", text)


def _all(terms: list[Match]) -> Match | None:
    if not terms:
        return None
    if len(terms) == 1:
        return terms[0]
    return lambda labels: all(term(labels) for term in terms)


def _label_term(term: str) -> Match:
    if found := _SET.match(term):
        key, negative = found[1], found[2] == "notin"
        values = frozenset(value.strip() for value in found[3].split(","))
        _check(term, key, *values)
        if negative:
            return lambda labels: labels.get(key) not in values
        return lambda labels: labels.get(key) in values
    if found := _COMPARE.match(term):
        return _comparison(term, found[1], found[2], found[3])
    key = term.lstrip("!").strip()
    _check(term, key)
    if term.startswith("!"):
        return lambda labels: key not in labels
    return lambda labels: key in labels


def _comparison(term: str, key: str, sign: str, value: str) -> Match:
    _check(term, key, value)
    if sign == "!=":
        return lambda labels: labels.get(key) != value
    if sign in "<>":
        if not value.lstrip("-").isdigit():
            raise bad_request(f"unable to parse requirement: {term}: for '<' and '>' the value must be an integer")
        return _ordered(key, sign, int(value))
    return lambda labels: labels.get(key) == value


def _ordered(key: str, sign: str, bound: int) -> Match:
    def match(labels: Mapping[str, str]) -> bool:
        try:
            value = int(labels[key])
        except (KeyError, ValueError):
            return False
        return value < bound if sign == "<" else value > bound

    return match


def _check(term: str, key: str, *values: str) -> None:
    if not is_label_key(key):
        raise bad_request(f'unable to parse requirement: invalid label key "{key}" in "{term}"')
    for value in values:
        if not is_label_value(value):
            raise bad_request(f'unable to parse requirement: invalid label value "{value}" in "{term}"')


def parse_fields(text: str, supported: Callable[[str], bool]) -> Match | None:
    """A selector such as ``metadata.name=a,status.phase!=Running``. Raises ApiError 400."""
    terms = [_field_term(term.strip(), supported) for term in text.split(",") if term.strip()]
    return _all(terms)


def _field_term(term: str, supported: Callable[[str], bool]) -> Match:
    found = re.match(r"^([^!=]+?)\s*(==|!=|=)\s*(.*)$", term)
    if not found:
        raise bad_request(f'invalid selector: "{term}"; can\'t understand "{term}"')
    key, sign, value = found[1], found[2], found[3]
    if not supported(key):
        raise bad_request(f"field label not supported: {key}")
    if sign == "!=":
        return lambda fields: fields.get(key, "") != value
    return lambda fields: fields.get(key, "") == value


def match_label_selector(selector: Mapping[str, object] | None, labels: Mapping[str, str]) -> bool:
    """A LabelSelector object (matchLabels, matchExpressions) against labels; an empty one matches all, None nothing."""
    if selector is None:
        return False
    wanted = selector.get("matchLabels") or {}
    assert isinstance(wanted, dict)
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    expressions = selector.get("matchExpressions") or []
    assert isinstance(expressions, list)
    return all(match_expression(one, labels) for one in expressions)


def match_expression(expression: Mapping[str, object], labels: Mapping[str, str]) -> bool:
    """One requirement (key, operator, values) of a LabelSelector or a node selector term."""
    value = labels.get(str(expression["key"]))
    values = expression.get("values") or []
    assert isinstance(values, list)
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt":
            return value is not None and int(value) > int(values[0])
        case "Lt":
            return value is not None and int(value) < int(values[0])
        case operator:
            raise ValueError(f"unknown operator {operator!r}")
