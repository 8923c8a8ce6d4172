"""Entry point of `fimbria`: subcommands are imported when they are used, so that each starts fast."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# name -> (module, attribute, one line of help): the help of `fimbria` itself imports no module.
SECTIONS: Final = {
    "Look at this node": {
        "status": ("status", "status", "Is the agent well, and what is it doing?"),
        "endpoint": ("objects", "endpoint", "Pods of this node: addresses, identity, what their policies allow."),
        "identity": ("objects", "identity", "Security identities: numbers and the labels behind them."),
        "ipcache": ("objects", "ipcache", "Which identity an address has."),
        "service": ("services", "service", "Services: frontends and their backends."),
        "policy": ("objects", "policy", "Policies: whom they select, their rules, what is wrong with them."),
        "node": ("objects", "node", "Nodes of the cluster and their pod addresses."),
    },
    "Look at packets": {
        "monitor": ("monitor", "monitor", "Flows as they happen, with verdicts and the rules behind them."),
        "connectivity": ("connectivity.command", "connectivity", "Test a cluster with real connections."),
        "sysdump": ("sysdump.command", "sysdump", "One archive with the state of everything, for a report."),
    },
    "Look below": {
        "map": ("datapath", "map_", "The datapath's maps, as they are in the kernel."),
        "plan": ("datapath", "plan", "What the agent would change in the kernel now."),
        "metrics": ("datapath", "metrics", "The agent's metrics in Prometheus' text format."),
        "version": ("misc", "version", "Versions of this command, the agent and the kernel."),
        "completion": ("misc", "completion", "Completion for bash, zsh or fish."),
    },
    "Run": {
        "agent": ("components", "agent", "Run the agent (one on every node)."),
        "observer": ("components", "observer", "Run the observer (beside each agent)."),
        "operator": ("components", "operator", "Run the operator (once per cluster)."),
        "prepare": ("host", "prepare", "Prepare this node for its agent: file systems, CNI plugin."),
        "cleanup": ("host", "cleanup", "Remove everything of Fimbria from this node."),
        "lab": ("lab", "lab", "A cluster of several nodes on this machine."),
        "demo": ("demo", "demo", "The main job on such a cluster, measured: start here."),
    },
}
COMMANDS: Final = {name: where for section in SECTIONS.values() for name, where in section.items()}
ALIASES: Final = {
    "observe": "monitor",
    "endpoints": "endpoint",
    "identities": "identity",
    "services": "service",
    "policies": "policy",
    "nodes": "node",
    "maps": "map",
}
ARGUMENTS: Final = "fimbria.arguments"
EPILOG: Final = """\b
Examples:
  fimbria status --wait                     until this node's agent is ready
  fimbria endpoint list -n shop             pods of a namespace on this node
  fimbria monitor --verdict dropped         what is being denied, and by which rule
  fimbria ipcache get 10.244.1.7            who has that address

\b
From anywhere, with a kubeconfig:
  fimbria status --wait                     until the whole cluster is ready
  fimbria endpoint list --node worker1      what a node's agent answers
  fimbria connectivity test                 does this cluster's network work?
  fimbria sysdump                           one archive of everything, for those who help

\b
Exit status: 0 well; 1 not well, or not found; 2 wrong usage, or the agent can't be asked;
3 `plan` has something to change. The agent is looked for in /run/fimbria; --socket or
FIMBRIA_RUN_DIR point elsewhere."""


class LazyGroup(click.Group):
    """A group whose subcommands are modules named in COMMANDS."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keeps them as they were given, for a command that is to run elsewhere."""
        ctx.meta[ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, without aliases."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Imports the module of one."""
        known = COMMANDS.get(ALIASES.get(cmd_name, cmd_name))
        if known is None:
            return None
        found = getattr(importlib.import_module(f"fimbria.cli.{known[0]}"), known[1])
        assert isinstance(found, click.Command)
        return found

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names from the table: asking every command for its help would import them all."""
        from click.shell_completion import CompletionItem

        found = [CompletionItem(n, help=where[2]) for n, where in COMMANDS.items() if n.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a hint for a mistyped name."""
        name = args[0]
        if name not in COMMANDS and name not in ALIASES and not ctx.resilient_parsing and not name.startswith("-"):
            import difflib  # late: only a mistake is worth its 20 ms

            close = difflib.get_close_matches(name, [*COMMANDS, *ALIASES], n=1)
            hint = f" Did you mean {close[0]!r}?" if close else " `fimbria --help` lists the commands."
            ctx.fail(f"There is no command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """By section, from the table."""
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, _, text) in commands.items()], col_max=14)


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from fimbria.release import RELEASE

        click.echo(f"fimbria {RELEASE}")
        ctx.exit()


@click.command(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
@click.option("--while-stdin", is_flag=True, hidden=True, help="End when standard input does.")
def fimbria(while_stdin: bool) -> None:
    """eBPF networking, policy and load balancing for Kubernetes."""
    if while_stdin:
        import threading

        threading.Thread(target=_end_with_stdin, daemon=True).start()


def _end_with_stdin() -> None:
    """Kubernetes ends no command whose caller went away; its standard input is all that shows it."""
    import os

    while os.read(0, 4096):
        pass
    os._exit(130)


def main() -> None:
    """Run the command line."""
    fimbria(prog_name="fimbria")


if __name__ == "__main__":
    main()
