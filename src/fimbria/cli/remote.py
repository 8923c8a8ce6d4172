"""`--node`: this very command, run in the container of that node's agent."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final, TextIO

import click

from fimbria.cli.cluster import CantAsk, agent_of, configuration, pod_trouble, run
from fimbria.cli.main import ARGUMENTS
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.config import ClusterConfig
from fimbria.sources.k8s.exec import ExecError, PodAccess, TooMuch

INTERRUPTED: Final = 130
OURS: Final = ("--node", "--kubeconfig", "--context")


def run_on(node: str, kubeconfig: str | None, context: str, *, hold: bool) -> None:
    """Runs the command line there and exits as it does; with `hold` it ends with us. Raises CantAsk."""
    arguments = without_ours(click.get_current_context().meta[ARGUMENTS])
    command = ["fimbria", *(["--while-stdin"] if hold else []), *arguments]
    try:
        code = run(_run(configuration(kubeconfig, context), node, command, hold))
    except KeyboardInterrupt:
        code = INTERRUPTED
    except ExecError as error:
        raise CantAsk(str(error)) from None
    sys.exit(code)


async def _run(config: ClusterConfig, node: str, command: Sequence[str], hold: bool) -> int:
    async with ApiClient(config, component="cli") as client, PodAccess(config, component="cli") as pods:
        agent = await agent_of(client, node)
        where = agent.container()
        if not agent.running(where.name):
            raise CantAsk(f"The agent of node {node} doesn't run: {pod_trouble(agent)}.")
        try:
            return await pods.run(where, command, Writer(sys.stdout), Writer(sys.stderr), hold_stdin=hold)
        except TooMuch:
            return 0  # whoever read our output has gone: `| head`


class Writer:
    """Bytes to one of our own streams, at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream.buffer

    def __call__(self, piece: bytes) -> None:
        """Raises TooMuch once nobody reads."""
        try:
            self._stream.write(piece)
            self._stream.flush()
        except BrokenPipeError:
            raise TooMuch from None


def without_ours(arguments: Sequence[str]) -> list[str]:
    """A command line without what chooses the node."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, has_value, _ = argument.partition("=")
        if skip:
            skip = False
        elif name in OURS:
            skip = not has_value
        else:
            kept.append(argument)
    return kept
