"""The entry point: help, start-up, mistakes, completion."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest

from fimbria.cli.main import ALIASES, COMMANDS, SECTIONS, fimbria

ROOT = Path(__file__).parents[3]


def imported(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": os.environ["PATH"]},
    )
    return set(done.stdout.split())


def test_help_lists_every_command_and_imports_none() -> None:
    modules = imported(
        "from fimbria.cli.main import fimbria\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    fimbria(['--help'], standalone_mode=False)\n"
        "assert 'Examples:' in out.getvalue()\n"
    )
    assert {m for m in modules if m.startswith("fimbria.")} == {"fimbria.cli", "fimbria.cli.main"}
    assert not modules & {"aiohttp", "rich", "yaml", "msgspec"}


@pytest.mark.parametrize("module", ["status", "objects", "datapath", "misc", "components"])
def test_commands_that_ask_the_agent_start_without_heavy_libraries(module: str) -> None:
    modules = imported(f"import fimbria.cli.{module}")
    assert not modules & {"aiohttp", "rich", "yaml", "msgspec", "fimbria.kernel", "asyncio"}


def test_help_by_section(call) -> None:
    text = call("--help").stdout
    for title, commands in SECTIONS.items():
        assert f"{title}:" in text
        assert all(f"  {name} " in text for name in commands)


@pytest.mark.parametrize("name", [*COMMANDS, *ALIASES])
def test_every_command_loads_and_has_help(name: str) -> None:
    command = fimbria.get_command(click.Context(fimbria), name)
    assert command is not None
    assert command.get_short_help_str()


def all_commands(command: click.Command, path: tuple[str, ...] = ()):
    ctx = click.Context(command)
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            yield from all_commands(command.get_command(ctx, name), (*path, name))
    else:
        yield path, command


def test_every_option_has_help() -> None:
    names = [n for n in COMMANDS if n not in ("lab", "demo", "agent", "operator", "observer")]
    for name in names:
        for path, command in all_commands(fimbria.get_command(click.Context(fimbria), name), (name,)):
            assert command.help, path
            bare = [p.name for p in command.params if isinstance(p, click.Option) and p.name != "output" and not p.help]
            assert not bare, path


def test_mistyped_command_gets_a_hint(call) -> None:
    result = call("statsu")
    assert result.exit_code == 2
    assert "Did you mean 'status'?" in result.stderr


def test_command_and_version_are_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"], "read from fimbria.release"
    assert project["scripts"]["fimbria"] == "fimbria.cli.main:main"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(call, shell: str) -> None:
    result = call("completion", shell)
    assert result.exit_code == 0
    assert f"_FIMBRIA_COMPLETE={shell}_complete" in result.stdout


def completions(words: str, position: int, run_dir: str = "/nonexistent") -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", "from fimbria.cli.main import main; main()"],
        capture_output=True,
        text=True,
        check=False,
        env={
            "PYTHONPATH": str(ROOT / "src"),
            "PATH": os.environ["PATH"],
            "_FIMBRIA_COMPLETE": "bash_complete",
            "COMP_WORDS": words,
            "COMP_CWORD": str(position),
            "FIMBRIA_RUN_DIR": run_dir,
        },
    )
    assert done.stderr == ""
    return [line.removeprefix("plain,") for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "position", "expected"),
    [
        ("fimbria sta", 1, "status"),
        ("fimbria --v", 1, "--version"),
        ("fimbria endpoint ", 2, "list"),
        ("fimbria endpoint list --name", 3, "--namespace"),
        ("fimbria monitor --verdict ", 3, "dropped"),
        ("fimbria connectivity test --no-", 3, "--no-policies"),
    ],
)
def test_completion_answers(words: str, position: int, expected: str) -> None:
    assert expected in completions(words, position)


def test_completion_asks_the_agent_for_names(agent) -> None:
    agent.answers["endpoints"] = [{"pod": "web", "namespace": "shop"}, {"pod": "db", "namespace": "shop"}]
    agent.answers["maps"] = [{"name": "ipcache"}]
    run_dir = str(agent.path.parent)
    assert completions("fimbria endpoint get w", 3, run_dir) == ["web"]
    assert completions("fimbria endpoint get shop/", 3, run_dir) == ["shop/db", "shop/web"]
    assert completions("fimbria map dump ", 3, run_dir) == ["ipcache"]
    agent.answers["policies"] = (500, "broken")
    assert completions("fimbria policy get ", 3, run_dir) == []


def test_completion_without_an_agent_is_silent() -> None:
    assert completions("fimbria endpoint get ", 3) == []
