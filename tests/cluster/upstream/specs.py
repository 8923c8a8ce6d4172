"""Which of upstream's specs are run: their names, and the reasons for those that aren't. Pure but for two readers."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SKIPS = Path(__file__).resolve().with_name("skips.toml")
AREA = "[sig-network]"
CONFORMANCE = "[Conformance]"
# Not beside others: they change or break what others rely on.
ALONE = re.compile(r"\[(Serial|Disruptive)\]")
_PUNCTUATION = re.compile(r"[][(){}.*+?|^$\\]")
_LISTED = re.compile(r"^\s+\S+\.go:\d+: (.+)$")


@dataclass(frozen=True)
class Skip:
    """Specs whose names `spec` meets and `exception` doesn't aren't run, for `reason`."""

    spec: re.Pattern[str]
    reason: str
    exception: re.Pattern[str] | None = None

    def meets(self, name: str) -> bool:
        return bool(self.spec.search(name)) and not (self.exception and self.exception.search(name))


@dataclass(frozen=True)
class Selection:
    """What one run does: `together` beside each other, `alone` one after the other, `skipped` with the reason."""

    together: tuple[str, ...]
    alone: tuple[str, ...]
    skipped: dict[str, str]


def parse_skips(text: str) -> list[Skip]:
    """The entries of skips.toml. Raises ValueError that names the entry."""
    found = []
    for number, entry in enumerate(tomllib.loads(text).get("skip", ()), 1):
        if unknown := entry.keys() - {"spec", "except", "reason"}:
            raise ValueError(f"skip {number}: unknown {', '.join(sorted(unknown))}")
        if not entry.get("spec") or len(entry.get("reason", "").split()) < 3:
            raise ValueError(f"skip {number}: needs a spec and a reason in words")
        exception = re.compile(entry["except"]) if "except" in entry else None
        found.append(Skip(re.compile(entry["spec"]), entry["reason"], exception))
    return found


def parse_list(text: str) -> list[str]:
    """Names out of what `e2e.test --list-tests` prints; those of other areas are left out."""
    names = (found[1] for line in text.splitlines() if (found := _LISTED.match(line)))
    return sorted(name for name in names if name.startswith(AREA))


def select(names: Iterable[str], skips: Sequence[Skip], focus: str = "", skip: str = "") -> Selection:
    """Names that meet `focus` and not `skip` (regular expressions; empty: all and none), divided."""
    together: list[str] = []
    alone: list[str] = []
    skipped: dict[str, str] = {}
    for name in names:
        if not re.search(focus, name) or (skip and re.search(skip, name)):
            continue
        if reason := next((one.reason for one in skips if one.meets(name)), None):
            skipped[name] = reason
        else:
            (alone if ALONE.search(name) else together).append(name)
    return Selection(tuple(together), tuple(alone), skipped)


def stale(names: Sequence[str], skips: Sequence[Skip]) -> list[str]:
    """Expressions of skips that meet no spec."""
    return [one.spec.pattern for one in skips if not any(one.meets(name) for name in names)]


def focus_of(names: Iterable[str]) -> str:
    """A regular expression for ginkgo's --focus that meets exactly these. It is searched behind the suite's own name;
    Go takes a backslash before punctuation only, so Python's re.escape won't do."""
    return f"(?:{'|'.join(_PUNCTUATION.sub(_escaped, name) for name in names)})$"


def _escaped(found: re.Match[str]) -> str:
    return f"\\{found[0]}"


def load_skips() -> list[Skip]:
    return parse_skips(SKIPS.read_text())


def list_specs(binary: Path) -> list[str]:
    """Asks the test binary. Raises subprocess.CalledProcessError."""
    done = subprocess.run([str(binary), "--list-tests"], check=True, capture_output=True, text=True)
    return parse_list(done.stdout)
