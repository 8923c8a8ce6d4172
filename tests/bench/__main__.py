"""`python -m tests.bench [NAME...]`: measure against baselines, print a table, write docs/benchmarks.md and .json.

Without names everything is measured but what takes very long (ipvs). With names, figures of other groups are kept
from the files. `--quick` is a smoke test of the bench itself: too short to mean anything, and never written.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from tests.bench import baseline, groups, labs
from tests.bench.measure import Settings
from tests.bench.reasons import with_reason
from tests.bench.report import Figure, from_json, merge, table, to_json

DOCS = Path(__file__).parents[2] / "docs"
STEM = "benchmarks"
TITLES = groups.TITLES


def machine() -> str:
    """What the figures were taken on, in one line."""
    cpu = next((x.partition(":")[2].strip() for x in Path("/proc/cpuinfo").read_text().splitlines()
                if x.startswith("model name")), platform.machine())  # fmt: skip
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    return f"{os.cpu_count()} cores ({cpu}), {memory:.0f} GiB, {system}, kernel {platform.release()}"


def document(figures: Sequence[Figure], failed: Sequence[str], load: str, took: float) -> str:
    """docs/benchmarks.md."""
    missed = [f for f in figures if f.met is False]
    judged = [f for f in figures if f.met is not None]
    lines = [
        "# Benchmarks", "",
        "Written by `make bench`; `make bench GROUPS='NAME...'` measures some groups again "
        f"({', '.join(TITLES)}); {', '.join(groups.OPTIONAL)} takes long and is measured only so. "
        "The same figures for programs: [benchmarks.json](benchmarks.json).", "",
        f"- Machine: {machine()}",
        f"- Last run: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {took / 60:.0f} minutes, {load}",
        f"- Goals met: {len(judged) - len(missed)} of {len(judged)}",
        *([f"- Not measured in the last run, it failed: {', '.join(failed)}"] if failed else []), "",
        "How to read it: what is compared ran in the same minutes, A B A B, on the same machine, client and server "
        "pinned to a core each. *Measured* and *baseline* are medians, *±* is half the distance between the quartiles, "
        "*ratio* the median of the rounds' ratios. Absolute figures of a shared virtual machine mean little; ratios "
        "do. Baselines are what the kernel does without us, in namespaces of their own.",
    ]  # fmt: skip
    for group, title in TITLES.items():
        mine = [f for f in figures if f.group == group]
        if mine:
            lines += ["", f"## {title}", "", *groups.WORDS[group], "", *table(mine)]
            lines += ["", f"`make bench GROUPS={group}`, {mine[0].date}"]
    return "\n".join(lines) + "\n"


def measure(names: Sequence[str], settings: Settings) -> tuple[list[Figure], list[str]]:
    """Figures of the groups, and the names of those that failed."""
    found: list[Figure] = []
    failed: list[str] = []
    for name in names:
        settings.say(f"== {TITLES[name]}")
        date = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        try:
            mine = [with_reason(replace(f, group=name, date=date)) for f in groups.GROUPS[name](settings)]
        except Exception:
            traceback.print_exc()
            failed.append(name)
            continue
        found += mine
        print("\n".join(["", f"## {TITLES[name]}", "", *table(mine), ""]), flush=True)
    return found, failed


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 if everything was measured (goals may be missed), 1 if a group failed."""
    parser = argparse.ArgumentParser("python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"groups: {', '.join(TITLES)}")
    parser.add_argument("--quick", action="store_true", help="smoke test; nothing is written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-write", action="store_true", help="only print")
    options = parser.parse_args(argv)
    unknown = [n for n in options.names if n not in TITLES]
    if unknown:
        parser.error(f"no group {', '.join(unknown)}; there are {', '.join(TITLES)}")
    if os.geteuid() != 0:
        parser.error("needs root: it makes namespaces and a lab")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.1f} s  {text}", file=sys.stderr, flush=True)

    baseline.sweep()
    labs.sweep()
    load = f"load average before {os.getloadavg()[0]:.1f}"
    settings = Settings(rounds=2 if options.quick else options.rounds, quick=options.quick, say=say)
    found, failed = measure(options.names or [n for n in TITLES if n not in groups.OPTIONAL], settings)
    if not (options.quick or options.no_write):
        write(found, failed, load, time.monotonic() - began)
    for name in failed:
        print(f"not measured: {name} (see above)", file=sys.stderr)
    return 1 if failed else 0


def write(found: Sequence[Figure], failed: Sequence[str], load: str, took: float) -> None:
    """Both files; groups that were not measured now keep their figures."""
    path = DOCS / f"{STEM}.json"
    old = from_json(path.read_text()) if path.exists() else []
    figures = [with_reason(f) for f in merge(old, found, list(TITLES))]
    path.write_text(to_json(figures))
    path.with_suffix(".md").write_text(document(figures, failed, load, took))


if __name__ == "__main__":
    sys.exit(main())
