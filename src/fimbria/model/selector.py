"""Label selectors as they are written in annotations and query strings (`a=b, c in (d, e), !f`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

_KEY: Final = r"[A-Za-z0-9][-A-Za-z0-9_./]*"
_VALUE: Final = r"[-A-Za-z0-9_.]*"
_EQUAL: Final = re.compile(rf"\s*({_KEY})\s*(==|=|!=)\s*({_VALUE})\s*")
_SET: Final = re.compile(rf"\s*({_KEY})\s+(in|notin)\s+\(([^()]*)\)\s*")
_EXISTS: Final = re.compile(rf"\s*(!?)\s*({_KEY})\s*")
_VALUES: Final = re.compile(rf"\s*{_VALUE}\s*(,\s*{_VALUE}\s*)*")
MAX_LENGTH: Final = 4096


@dataclass(frozen=True, slots=True)
class Requirement:
    """`values` None: the label must exist. `negated` turns the sense around; an absent label has none of the values."""

    key: str
    values: frozenset[str] | None
    negated: bool = False

    def __call__(self, labels: Mapping[str, str]) -> bool:
        found = self.key in labels and (self.values is None or labels[self.key] in self.values)
        return found != self.negated


@dataclass(frozen=True, slots=True)
class NodeSelector:
    """All requirements must hold; `text` is as it was written."""

    text: str
    requirements: tuple[Requirement, ...]

    def __call__(self, labels: Mapping[str, str]) -> bool:
        return all(requirement(labels) for requirement in self.requirements)

    @classmethod
    def parse(cls, text: str) -> NodeSelector:
        """From the API's string form of a label selector. Raises ValueError naming the text."""
        found, at = [], 0
        while at < len(text) <= MAX_LENGTH:
            match = _SET.match(text, at) or _EQUAL.match(text, at) or _EXISTS.match(text, at)
            if match is None or (match.end() < len(text) and text[match.end()] != ","):
                break
            requirement = _requirement(match)
            if requirement is None:
                break
            found.append(requirement)
            at = match.end() + 1
        if not found or at != len(text) + 1:
            raise ValueError(f"{text[:80]!r} is not a label selector")
        return cls(text, tuple(found))


def _requirement(match: re.Match[str]) -> Requirement | None:
    if match.re is _EXISTS:
        return Requirement(match[2], None, match[1] == "!")
    if match.re is _EQUAL:
        return Requirement(match[1], frozenset([match[3]]), match[2] == "!=")
    if not _VALUES.fullmatch(match[3]):
        return None
    return Requirement(match[1], frozenset(v.strip() for v in match[3].split(",")), match[2] == "notin")
