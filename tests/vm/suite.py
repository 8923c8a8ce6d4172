"""Runs test files of this repository with pytest inside a guest."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import machine

_COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|deselected)\b")


@dataclass(frozen=True)
class Summary:
    """What pytest said at its end: counts by outcome ("passed", "failed", "error", "skipped", ...)."""

    rc: int
    counts: dict[str, int]
    output: str

    @property
    def ok(self) -> bool:
        """Something passed and nothing failed or was skipped: a skip would prove nothing about that kernel."""
        return self.rc == 0 and set(self.counts) == {"passed"}


def run_tests(
    kernel: str,
    path: str | Path,
    *arguments: str,
    timeout: float = 600,
    memory: int = 1024,
    env: Mapping[str, str] | None = None,
) -> Summary:
    """Runs the test file `path` (relative to the repository, or anywhere outside /tmp and /run) in the guest.

    `timeout` in seconds bounds the whole run, and replaces pytest's own limit for one test, which is meant for
    hardware. Raises what machine.run raises.
    """
    command = ["python", "-m", "pytest", "-p", "no:cacheprovider", f"--timeout={timeout:g}", *arguments, str(path)]
    result = machine.run(kernel, command, timeout=timeout, memory=memory, env=env)
    return Summary(result.rc, counts(result.output), result.output)


def counts(output: str) -> dict[str, int]:
    """The counts of pytest's last line, such as ``== 1 failed, 2 passed in 0.12s ==``; empty if there is none."""
    lines = [line for line in output.splitlines() if re.search(r" in \d+\.\d+s\b", line)]
    found = _COUNT.findall(lines[-1]) if lines else []
    return {"error" if outcome == "errors" else outcome: int(number) for number, outcome in found}
