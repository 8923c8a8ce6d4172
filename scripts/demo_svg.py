"""Records the demo: runs `fimbria demo` for real (root) and writes what it printed as SVG.

    make build && .venv/bin/python scripts/demo_svg.py

docs/images/demo.svg moves like a terminal; docs/images/demo-full.svg holds everything on one sheet. Every character
comes from the run. Only the pauses of the moving one are ours: a run prints faster than people read.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import re
import time
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Final

from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from fimbria.cli.demo import Stage, _run
from fimbria.lab import cluster
from fimbria.lab.layout import LabSpec

IMAGES: Final = Path(__file__).parent.parent / "docs" / "images"
COLUMNS: Final = 124
ROWS: Final = 36  # of the moving picture
CELL: Final = 7.8  # pixels of a column
LINE: Final = 17  # pixels of a row
MARGIN: Final = 18
BAR: Final = 34
READ: Final = 0.16  # seconds a printed row stays at least before the next one comes
CHAPTER: Final = 3.0  # seconds before a new chapter pushes the last one away
STILL: Final = 3  # chapter that the moving picture shows where it can't move
HOLD: Final = 8.0  # seconds of the last picture before it starts again
DOTS: Final = ("#ff5f57", "#febc2e", "#28c840")
WORDS: Final = re.compile(r"\S+(?: \S+)*")
PALETTE: Final = (  # black, red, green, yellow, blue, magenta, cyan, white
    [(22, 27, 34), (255, 123, 114), (86, 211, 100), (227, 179, 65)],
    [(88, 166, 255), (210, 168, 255), (57, 197, 207), (214, 222, 230)],
)
THEME: Final = TerminalTheme((22, 27, 34), (214, 222, 230), [*PALETTE[0], *PALETTE[1]])


@dataclass(slots=True)
class Batch:
    """What one call of `print` wrote, and when (seconds from the start)."""

    at: float
    rows: list[Text]
    chapter: bool = False


class Recorder(Console):
    """A console without live pictures that remembers what was printed when."""

    def __init__(self) -> None:
        super().__init__(file=io.StringIO(), width=COLUMNS, record=True, force_terminal=False, color_system="truecolor")
        self.begun = time.monotonic()
        self.batches: list[Batch] = []

    def print(self, *objects: Any, **how: Any) -> None:
        super().print(*objects, **how)
        text = self.export_text(clear=True, styles=True).removesuffix("\n")
        self.batches.append(
            Batch(time.monotonic() - self.begun, list(Text.from_ansi(text).split("\n", allow_blank=True)))
        )


@dataclass(slots=True)
class RecordedStage(Stage):
    """Marks where chapters begin."""

    console: Recorder
    begun: float = field(default_factory=time.monotonic)

    def title(self, text: str) -> None:
        first = len(self.console.batches)
        Stage.title(self, text)
        self.console.batches[first].chapter = True


def record(name: str) -> list[Batch]:
    """Runs the demo in a lab of that name, which is removed afterwards."""
    console = Recorder()
    try:
        asyncio.run(_run(LabSpec(name=name), RecordedStage(console)))
    finally:
        cluster.down(name)
    return console.batches


def paced(batches: list[Batch]) -> list[float]:
    """When each batch appears: as in the run, but not before the one above could be read."""
    at, times = 0.0, []
    for n, batch in enumerate(batches):
        before = len(batches[n - 1].rows) * READ if n else 0.0
        at = max(batch.at, at + min(before, CHAPTER) + (CHAPTER if batch.chapter and n else 0.0))
        times.append(at)
    return times


def row(text: Text, y: float, console: Console) -> str:
    """One line of text as SVG: a piece for each run of words in one style, each at its own column.

    So no font shifts it, and no blank stands where a renderer may drop it.
    """
    column, pieces = 0, []
    for segment in text.render(console):
        if segment.control or segment.text == "\n":
            continue
        for words in WORDS.finditer(segment.text):
            x = MARGIN + (column + cell_len(segment.text[: words.start()])) * CELL
            pieces.append(
                f'<text x="{x:.1f}" y="{y:.0f}" textLength="{cell_len(words[0]) * CELL:.1f}"'
                f"{look(segment.style)}>{escape(words[0])}</text>"
            )
        column += cell_len(segment.text)
    return "".join(pieces)


def look(style: Style | None) -> str:
    """Attributes for a style; what is like the rest of the terminal has none."""
    if style is None:
        return ""
    marks = ""
    if style.color is not None and not style.color.is_default:
        marks += f' fill="{style.color.get_truecolor(THEME).hex}"'
    if style.bold:
        marks += ' font-weight="bold"'
    if style.dim:
        marks += ' opacity="0.6"'
    return marks


def window(rows: int, style: str, content: str, title: str) -> str:
    """A terminal of that many rows around the content, whose first row's baseline is at y = LINE."""
    width, height = COLUMNS * CELL + 2 * MARGIN, BAR + rows * LINE + MARGIN
    dots = "".join(f'<circle cx="{22 + 18 * n}" cy="17" r="5.5" fill="{c}"/>' for n, c in enumerate(DOTS))
    font = "ui-monospace,SFMono-Regular,DejaVu Sans Mono,Menlo,Consolas,monospace"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img"'
        f' aria-label="{escape(title)}" font-family="{font}" font-size="13" fill="{THEME.foreground_color.hex}"'
        f">{style}"
        f'<rect x=".5" y=".5" width="{width - 1:.0f}" height="{height - 1}" rx="9" fill="{THEME.background_color.hex}"'
        f' stroke="#444c56"/>{dots}'
        f'<text x="{width / 2:.0f}" y="22" text-anchor="middle" opacity="0.7">{escape(title)}</text>'
        f'<svg x="0" y="{BAR}" width="{width:.0f}" height="{rows * LINE + 6}">{content}</svg></svg>\n'
    )


def still(batches: list[Batch]) -> str:
    """Everything, one below the other."""
    console = Recorder()
    rows = [text for batch in batches for text in batch.rows]
    lines = "".join(row(text, LINE * (n + 1), console) for n, text in enumerate(rows))
    return window(len(rows), "", lines, "make demo")


def moving(batches: list[Batch]) -> str:
    """A terminal of ROWS rows that scrolls. Without animation, or where people don't want any, it shows one chapter."""
    console = Recorder()
    times = paced(batches)
    total = times[-1] + HOLD
    rules, groups, scroll, y, still_y, chapters = [], [], [], 0, 0, 0
    for n, (batch, at) in enumerate(zip(batches, times, strict=True)):
        chapters += batch.chapter
        still_y = y if batch.chapter and chapters == STILL + 1 else still_y
        lines = "".join(row(text, LINE * (y + k + 1), console) for k, text in enumerate(batch.rows))
        y += len(batch.rows)
        rules.append(
            f"#all #b{n}{{animation-name:b{n}}}@keyframes b{n}{{0%{{opacity:0}}{100 * at / total:.2f}%{{opacity:1}}}}"
        )
        groups.append(f'<g id="b{n}">{lines}</g>')
        scroll.append(f"{100 * at / total:.2f}%{{transform:translateY({scrolled(y)}px)}}")
    style = (
        f"<style>#all{{animation:s {total:.1f}s step-end infinite}}"
        f"#all g{{animation:{total:.1f}s step-end infinite}}"
        f"{''.join(rules)}@keyframes s{{0%{{transform:none}}{''.join(scroll)}}}"
        "@media (prefers-reduced-motion:reduce){#all,#all g{animation:none}}</style>"
    )
    content = f'<g id="all" transform="translate(0 {scrolled(still_y)})">{"".join(groups)}</g>'
    return window(ROWS, style, content, "make demo")


def scrolled(rows: int) -> int:
    """How far that many rows have moved up, in pixels."""
    return -LINE * max(rows - ROWS, 0)


def main() -> None:
    """Record, and write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--name", default=f"svg{os.getpid()}", help="name of the lab (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder (default: docs/images)")
    chosen = parser.parse_args()
    batches = record(chosen.name)
    chosen.output.mkdir(parents=True, exist_ok=True)
    for name, picture in (("demo.svg", moving(batches)), ("demo-full.svg", still(batches))):
        (chosen.output / name).write_text(picture)
        print(chosen.output / name)


if __name__ == "__main__":
    main()
