"""All that is judged on a real cluster, one after the other, and a table of it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.cluster.bed.layout import REPOSITORY
from tests.cluster.bed.progress import say

TESTS = "tests/cluster"


@dataclass(frozen=True)
class Line:
    """Of the table: a file of tests, or a run of upstream's specs."""

    name: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    note: str = ""


def of_junit(text: str) -> list[Line]:
    """One line a file, from pytest's report in the JUnit format (xunit2: testcase with classname, time and children
    failure, error or skipped)."""
    lines: dict[str, Line] = {}
    for case in ET.fromstring(text).iter("testcase"):
        name = case.get("classname", "").split(".test_")[-1].split(".")[0] or "?"
        line = lines.get(name, Line(name))
        bad, skipped = any(case.find(tag) is not None for tag in ("failure", "error")), case.find("skipped") is not None
        lines[name] = replace(
            line,
            passed=line.passed + (not bad and not skipped),
            failed=line.failed + bad,
            skipped=line.skipped + skipped,
            seconds=line.seconds + float(case.get("time", "0")),
        )
    return sorted(lines.values(), key=lambda line: line.name)


def table(lines: Iterable[Line]) -> str:
    """Fixed columns; a note is a line's last words."""
    rows = [("suite", "passed", "failed", "skipped", "seconds", "")]
    rows += [(x.name, str(x.passed), str(x.failed), str(x.skipped), f"{x.seconds:.0f}", x.note) for x in lines]
    width = max(len(row[0]) for row in rows)
    shown = [f"{a:<{width}}  {b:>7} {c:>7} {d:>7} {e:>8}  {f}".rstrip() for a, b, c, d, e, f in rows]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def run(name: str) -> bool:
    """Everything against that cluster, brought up if it isn't there; the table on the standard output. True if nothing
    failed."""
    lines = [*_pytest(name), _upstream(name)]
    print(table(lines))
    return not any(line.failed for line in lines)


def _pytest(name: str) -> list[Line]:
    with tempfile.TemporaryDirectory(prefix="fimbria-verdict-") as folder:
        report = Path(folder, "junit.xml")
        code = _call(["-m", "pytest", "-q", TESTS, f"--cluster={name}", f"--junit-xml={report}"])
        lines = of_junit(report.read_text()) if report.exists() else []
    if code != 0 and not any(line.failed for line in lines):
        lines.append(Line("pytest", failed=1, note=f"ended with {code}"))
    return lines


def _upstream(name: str) -> Line:
    started = time.monotonic()
    command = [sys.executable, "-m", "tests.cluster.upstream", "--name", name, "--conformance"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    counts = _counts(done.stdout)
    failed = counts.get("failed", 0) or int(done.returncode != 0)
    seconds = time.monotonic() - started
    return Line("upstream's conformance", counts.get("passed", 0), failed, counts.get("skipped", 0), seconds)


def _counts(output: str) -> dict[str, int]:
    """From the last line of `python -m tests.cluster.upstream`: "28 passed, 0 failed, 3 skipped; ..."."""
    last = output.strip().splitlines()[-1:] or [""]
    words = last[0].split(";")[0].replace(",", "").split()
    return {word: int(number) for number, word in zip(words[::2], words[1::2], strict=False) if number.isdigit()}


def _call(arguments: Sequence[str]) -> int:
    say(f"python {' '.join(arguments)}")
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=False).returncode
