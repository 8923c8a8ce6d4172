"""Output for people (aligned columns, colour in a terminal) and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

Row = dict[str, Any]
GAP: Final = "   "
output_option = click.option(
    "-o",
    "--output",
    type=click.Choice(["table", "wide", "json"]),
    default="table",
    help="table for people, wide with more columns, json for programs.  [default: table]",
)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a list; `wide` ones appear with `-o wide` only."""

    head: str
    cell: Callable[[Row], str]
    wide: bool = False


def listing(rows: Sequence[Row], columns: Iterable[Column], output: str, nothing: str) -> None:
    """Prints a list. `nothing` is said to people (on standard error) when it is empty."""
    if output == "json":
        dump(rows)
        return
    if not rows:
        click.echo(nothing, err=True)
        return
    shown = [c for c in columns if output == "wide" or not c.wide]
    table([c.head for c in shown], [[c.cell(r) for c in shown] for r in rows])


def table(head: Sequence[str], rows: Iterable[Sequence[str]], indent: str = "") -> None:
    """Aligned columns; cells may carry colour."""
    cells = [[click.style(h, bold=True) for h in head], *([c or dim("-") for c in row] for row in rows)]
    widths = [max(len(click.unstyle(row[i])) for row in cells) for i in range(len(head))]
    for row in cells:
        padded = (c + " " * (w - len(click.unstyle(c))) for c, w in zip(row, widths, strict=True))
        click.echo(indent + GAP.join(padded).rstrip())


def fields(pairs: Iterable[tuple[str, str]]) -> None:
    """`Name   value` lines; values of several lines are indented; empty values are left out."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        first, *rest = value.split("\n")
        click.echo(click.style(name.ljust(width), bold=True) + GAP + first)
        for line in rest:
            click.echo(" " * width + GAP + line)


def dump(value: Any) -> None:
    """JSON for programs."""
    click.echo(json.dumps(value, indent=2))


def good(text: str) -> str:
    """Green."""
    return click.style(text, fg="green")


def bad(text: str) -> str:
    """Red."""
    return click.style(text, fg="red")


def warn(text: str) -> str:
    """Yellow."""
    return click.style(text, fg="yellow")


def dim(text: str) -> str:
    """Less important."""
    return click.style(text, dim=True)


def count(number: int, word: str, plural: str = "") -> str:
    """`1 pod`, `2 pods`."""
    return f"{number} {word if number == 1 else plural or word + 's'}"


def short_labels(labels: Iterable[str]) -> str:
    """Labels with what people don't look for left out."""
    boring = ("io.cilium.k8s.policy.", "io.cilium.k8s.namespace.labels.")
    texts = [label.removeprefix("k8s:").removeprefix("reserved:") for label in labels]
    shown = [t for t in texts if not t.startswith(boring)]
    return ",".join(t.replace("io.kubernetes.pod.namespace=", "namespace=") for t in shown) or ",".join(texts)


def duration(seconds: float) -> str:
    """`12 s`, `3 min`, `5 h`, `2 d`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
