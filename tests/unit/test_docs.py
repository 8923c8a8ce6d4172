"""The documentation says what is so: links, commands, targets, settings, metrics and drop reasons exist."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

from fimbria.cli.main import fimbria

ROOT = Path(__file__).parents[2]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "tests").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^|[(;\s])fimbria ((?:[a-z|]+ ?)+)")
TARGET = re.compile(r"\bmake ([a-z][a-z-]*)\b")
METRIC = re.compile(r"fimbria_[a-z0-9_]+")
REASON = re.compile(r"\bDROP_([A-Z0-9_]+)")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def code(text: str) -> Iterator[str]:
    """Lines of consoles, and spans: what a reader would type."""
    for block in FENCE.findall(text):
        yield from (line[2:] for line in block.splitlines() if line.startswith(("# ", "$ ")))
    yield from SPAN.findall(FENCE.sub("", text))


def unknown_command(words: list[str]) -> str:
    """The first word that is no command; "" if all are. `a|b` means both; what follows a plain command is free."""
    group: click.Command = fimbria
    for word in words:
        if not isinstance(group, click.Group):
            return ""
        found = [(name, group.get_command(click.Context(group), name)) for name in word.split("|")]
        wrong = [name for name, command in found if command is None]
        if wrong:
            return wrong[0]
        command = found[0][1]
        assert command is not None
        group = command
    return ""


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    bad = []
    for link in LINK.findall(FENCE.sub("", text)):
        target, _, anchor = link.partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        there = (path.parent / target).resolve() if target else path
        if not there.exists() or (anchor and anchor not in anchors(there.read_text())):
            bad.append(link)
    assert bad == []


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_exist(path: Path) -> None:
    named = [c.split() for line in code(path.read_text()) for c in COMMAND.findall(line)]
    assert [(words, wrong) for words in named if (wrong := unknown_command(words))] == []


@pytest.mark.parametrize("path", DOCS, ids=lambda p: str(p.relative_to(ROOT)))
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {t for line in code(path.read_text()) for t in TARGET.findall(line)}
    assert named - targets == set()


def test_the_readers_see_commands_and_targets() -> None:
    # Otherwise the two tests above could pass by finding nothing.
    readme = list(code((ROOT / "README.md").read_text()))
    assert "make demo" in readme
    assert any(COMMAND.findall(line) == ["lab status"] for line in readme)
    assert unknown_command(["endpoint", "lst"]) == "lst"
    assert unknown_command(["monitor", "anything"]) == ""
    assert anchors("# What works, and what does not yet\n") == {"what-works-and-what-does-not-yet"}


def test_settings_page_is_current() -> None:
    assert page("settings.md") == load("settings_doc").document(), "run scripts/settings_doc.py"


def test_every_metric_is_documented_and_no_other() -> None:
    parts = [f"agent/{n}" for n in ("metrics", "learned", "sockets")]
    parts += [f"operator/{n}" for n in ("metrics", "collect", "endpoint_slices", "identities")]
    sources = "".join(_source(f"{name}.py") for name in parts)
    made = re.findall(r'(Counter|Gauge)MetricFamily\(\s*"(fimbria_\w+)"', sources)
    names = {name + ("_total" if kind == "Counter" else "") for kind, name in made}
    assert len(names) > 15
    assert set(METRIC.findall(page("operations.md"))) - {"fimbria_host", "fimbria_net"} == names


def test_every_drop_reason_is_documented_and_no_other() -> None:
    raised = {
        reason
        for path in [*(ROOT / "bpf").glob("*.c"), *(ROOT / "bpf/lib").glob("*.h")]
        for reason in REASON.findall(path.read_text())
    }
    section = page("operations.md").partition("## Why packets are dropped")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[A-Z0-9_`, ]+`) \|", section, re.MULTILINE)
    documented = {name for row in rows for name in SPAN.findall(row)}
    assert documented == raised


def test_every_page_is_in_the_index() -> None:
    index = page("index.md")
    pages = [str(p.relative_to(ROOT / "docs")) for p in DOCS if p.is_relative_to(ROOT / "docs")]
    assert [p for p in pages if p != "index.md" and f"]({p})" not in index] == []


def _source(name: str) -> str:
    return (ROOT / "src/fimbria" / name).read_text()
