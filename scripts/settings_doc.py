"""Writes docs/settings.md from the components themselves: `.venv/bin/python scripts/settings_doc.py`.

tests/unit/test_docs.py fails when the file isn't what this prints.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from fimbria.agent import config as agent
from fimbria.observer import main as observer
from fimbria.operator import config as operator

TARGET: Final = Path(__file__).parent.parent / "docs" / "settings.md"
HEAD: Final = """\
# Settings

<!-- Written by scripts/settings_doc.py; a test compares. Change the source, then run the script. -->

Every setting is an option of its component. Those of the agent and the operator can also come from the environment; an
option on the command line wins. In the environment switches are `on` or `off`, `true` or `false`, `yes` or `no`.

In the lab, `fimbria lab up --agent-option NAME=VALUE` gives a setting to all agents, for example `attach=clsact`.
"""
AGENT: Final = """
## Agent

`fimbria agent`, one on every node. Sizes of tables are rows, times seconds. A changed setting takes effect when the
agent is started again.

"""
OPERATOR: Final = """
## Operator

`fimbria operator`, once per cluster; with `--leader-elect` several can run and one of them works.

"""
OBSERVER: Final = """
## Observer

`fimbria observer`, beside each agent.

"""
OPTION: Final = re.compile(r"^  (--[a-z0-9-]+)(?:, --no-[a-z-]+)?(?: [A-Z0-9_]+)?(?:\s\s+(.*))?$")
DEFAULT: Final = re.compile(r"^(.*?)(?: \(default: (.*)\))?$")


def agent_rows() -> Iterator[Sequence[str]]:
    """Option, variable, default, meaning."""
    defaults = agent.AgentConfig()
    for f in fields(agent.AgentConfig):
        flag, value = "--" + f.name.replace("_", "-"), getattr(defaults, f.name)
        if isinstance(value, bool):
            flag, value = f"{flag}`, `--no-{flag[2:]}", "on" if value else "off"
        yield f"`{flag}`", f"`FIMBRIA_{f.name.upper()}`", shown(value), agent.HELP[f.name]


def help_rows(main: Callable[[list[str]], Any], variables: bool) -> Iterator[Sequence[str]]:
    """The same, read off the help of a component that has no table of its settings."""
    for line in help_text(main).replace("\n                        ", "  ").splitlines():
        found = OPTION.match(line)
        if found is None or found[1] == "--help":
            continue
        text = DEFAULT.match(found[2] or "")
        assert text is not None
        switch = "--no-" in line
        name = f"`{found[1]}`, `--no-{found[1][2:]}`" if switch else f"`{found[1]}`"
        variable = f"`FIMBRIA_{found[1][2:].upper().replace('-', '_')}`" if variables and not switch else ""
        yield name, variable, shown(text[2] or "") or ("off" if switch else ""), text[1]


def help_text(main: Callable[[list[str]], Any]) -> str:
    """What `--help` prints, each option on a line of its own."""
    out, before = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main(["--help"])
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
    return out.getvalue()


def shown(value: object) -> str:
    """A default as people read it."""
    return f"`{value}`" if value not in ("", None) else ""


def table(rows: Iterator[Sequence[str]], head: Sequence[str]) -> str:
    """A Markdown table; columns that are empty throughout are left out."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    used = [n for n in range(len(head)) if any(line[n] for line in lines)]
    out = [[head[n] for n in used], ["---"] * len(used), *([line[n] for n in used] for line in lines)]
    return "".join(f"| {' | '.join(line)} |\n" for line in out)


def document() -> str:
    """The whole file."""
    head = ("option", "variable", "default", "what it is")
    return "".join(
        (
            HEAD,
            AGENT, table(agent_rows(), head),
            OPERATOR, table(help_rows(operator.parse, True), head),
            OBSERVER, table(help_rows(observer.main, False), head),
        )
    )  # fmt: skip


if __name__ == "__main__":
    TARGET.write_text(document())
    print(TARGET)
