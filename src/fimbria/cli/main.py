"""Entry point of `fimbria`: subcommands are imported when they are used, so that each starts fast."""

from __future__ import annotations

import importlib
import sys
from typing import Final

import click

COMMANDS: Final = {
    "lab": ("fimbria.cli.lab", "lab", "A cluster of several nodes on this machine."),
}


class LazyGroup(click.Group):
    """A group whose subcommands are modules named in COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the module of one."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        found = getattr(importlib.import_module(module), attribute)
        assert isinstance(found, click.Command)
        return found


@click.command(cls=LazyGroup)
def fimbria() -> None:
    """eBPF networking, policy and load balancing for Kubernetes."""


def main() -> None:
    """Run the command line."""
    fimbria(prog_name="fimbria")


if __name__ == "__main__":
    main()
