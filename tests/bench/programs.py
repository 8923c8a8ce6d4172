"""What a packet costs in each path of the programs, by the kernel's own test runs (tests/bpf/cost.py)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from tests.bench.measure import HERE, BenchError, Settings
from tests.bench.report import Figure

SCRIPT: Final = Path(__file__).parents[1] / "bpf/cost.py"
SECONDS: Final = 300.0


def per_packet(settings: Settings) -> list[Figure]:
    """One figure a path and family. Raises BenchError."""
    if not SCRIPT.exists():
        raise BenchError(f"{SCRIPT.name} is missing")
    settings.say("packet programs: test runs")
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH", ""), str(SCRIPT.parent))))
    samples = str(settings.times(2000, 100))
    command = ("env", f"PYTHONPATH={path}", sys.executable, str(SCRIPT), "--samples", samples)
    return figures(json.loads(HERE.run(*command, patience=SECONDS)))


def figures(answer: dict[str, Any]) -> list[Figure]:
    """From the script's JSON; the shortest program there is under the same clock is the baseline, and already taken
    off."""
    return [
        Figure(f"{row['path']}, IPv{row['family']}", "ns", row["ns"], row["spread"], row["floor"],
               row["ns"] / row["floor"], against="empty run")
        for row in answer["paths"] if row["path"] != "floor"
    ]  # fmt: skip
