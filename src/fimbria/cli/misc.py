"""`fimbria version` and `fimbria completion`."""

from __future__ import annotations

import os

import click

from fimbria.cli.local import Local, Refused, Unreachable, socket_option
from fimbria.cli.show import dim, dump, fields
from fimbria.release import RELEASE

SHELLS = ("bash", "zsh", "fish")


@click.command()
@socket_option("agent")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
def version(agent: Local, output: str) -> None:
    """Versions of this command, and of the agent and its kernel if one answers."""
    found = {"client": RELEASE, "kernel": os.uname().release, "agent": None, "node": None}
    why = ""
    try:
        status = agent.get("status")
        found |= {"agent": status["version"], "node": status["node"], "kernel": status["kernel"]}
    except (Unreachable, Refused) as error:
        why = error.message.splitlines()[0]
    if output == "json":
        dump(found)
        return
    answered = f"{found['agent']}  {dim('node ' + str(found['node']))}"
    fields([("Client", RELEASE), ("Agent", answered if found["agent"] else dim(why)), ("Kernel", str(found["kernel"]))])


@click.command(
    epilog="""\b
Examples:
  eval "$(fimbria completion bash)"                                  for this shell
  fimbria completion bash > /etc/bash_completion.d/fimbria           for good
  fimbria completion zsh > "${fpath[1]}/_fimbria"
  fimbria completion fish > ~/.config/fish/completions/fimbria.fish"""
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that makes a shell complete commands, options and values of fimbria."""
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root().command
    maker = get_completion_class(shell)
    assert maker is not None
    click.echo(maker(root, {}, "fimbria", "_FIMBRIA_COMPLETE").source())
