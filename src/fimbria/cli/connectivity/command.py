"""The command itself: options, progress, Ctrl-C, exit status."""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
import time
from dataclasses import replace
from typing import Any, Final

import click

from fimbria.cli.connectivity.scenario import External, parse_external

LAB_IMAGE: Final = "fimbria/labtool"
INTERRUPTED: Final = 130


@click.group()
def connectivity() -> None:
    """Test a cluster with real connections."""


def _external(_ctx: click.Context, _param: click.Parameter, value: str | None) -> External | None:
    try:
        return parse_external(value) if value else None
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@connectivity.command(
    epilog="""\b
Servers and clients are started as pods on two nodes, in a namespace of their own that is removed at
the end, also on Ctrl-C. Every connection is attempted without policies and then with NetworkPolicies
and CiliumNetworkPolicies (default deny, allow by label, egress deny, an address block with an
exception, a denial that wins), for IPv4 and IPv6 where pods have them; names where there is a cluster DNS.
Of what fails, the agents are asked for the drop and the rule behind it.

\b
Examples:
  fimbria connectivity test
  fimbria connectivity test --kubeconfig admin.conf --nodes worker1,worker2
  fimbria connectivity test --external http://192.0.2.1:80
  fimbria connectivity test --no-host           where policy forbids pods on the nodes' network
  fimbria connectivity test --load-balancer     where something gives Services of this type addresses
  fimbria connectivity test --keep              leave everything for a closer look

\b
Exit status: 0 all as expected; 1 a connection wasn't; 2 the test couldn't be run; 130 interrupted."""
)
@click.option("--kubeconfig", type=click.Path(dir_okay=False), help="The cluster.  [default: as kubectl finds it]")
@click.option("--context", default="", help="One of the kubeconfig's contexts.")
@click.option("--namespace", default="", help="Namespace to create for the test.  [default: a new name]")
@click.option(
    "--image",
    default="",
    help="Image with Python 3, for servers and clients.  [default: Fimbria's own, as its DaemonSet names it]",
)
@click.option(
    "--nodes", default="", metavar="A[,B]", help="Clients' node and servers' node.  [default: two that are Ready]"
)
@click.option("--external", metavar="[PROTO://]IP:PORT", callback=_external, help="Also something outside the cluster.")
@click.option("--host-port", default=38080, show_default=True, help="Free on the nodes, and the next one too.")
@click.option("--host/--no-host", default=True, help="Also pods on the nodes' network, and host ports?")
@click.option("--load-balancer", is_flag=True, help="Also a Service of type LoadBalancer.")
@click.option("--policies/--no-policies", default=True, help="With the round under NetworkPolicies?")
@click.option("--keep", is_flag=True, help="Don't remove the namespace at the end.")
@click.option("--timeout", default=120.0, show_default=True, metavar="SECONDS", help="How long each step may take.")
@click.option("-v", "--verbose", is_flag=True, help="All connections in the table, also if some failed.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
def test(
    *, kubeconfig: str | None, context: str, external: External | None, verbose: bool, output: str, **options: Any
) -> None:
    """Does this cluster's network do what Kubernetes promises? Real connections between real pods."""
    from fimbria.cli.cluster import CantAsk
    from fimbria.cli.connectivity.report import as_json, show
    from fimbria.cli.connectivity.run import CantRun, Settings
    from fimbria.cli.show import dump
    from fimbria.sources.k8s.config import ConfigError, load
    from fimbria.sources.k8s.errors import ApiError

    options["namespace"] = options["namespace"] or f"fimbria-test-{secrets.token_hex(3)}"
    options["nodes"] = tuple(n.strip() for n in options["nodes"].split(",") if n.strip())
    settings = Settings(external=external, **options)
    try:
        finished = asyncio.run(_run(load(kubeconfig, context=context), settings))
    except (ConfigError, CantRun, CantAsk, ApiError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, asyncio.CancelledError):
        left = f"namespace {settings.namespace} is kept" if settings.keep else "what was created has been removed"
        click.echo(f"Interrupted; {left}.", err=True)
        sys.exit(INTERRUPTED)
    if output == "json":
        dump(as_json(finished.results, settings.namespace, finished.nodes))
    else:
        show(finished.results, verbose)
    if all(r.passed for r in finished.results):
        return
    advice = "--keep leaves the pods; `fimbria monitor --verdict dropped --node NODE` shows drops as they happen"
    click.echo(f"For a closer look: {advice}.", err=True)
    sys.exit(1)


async def _run(config: Any, settings: Any) -> Any:
    from fimbria.cli.connectivity.run import run
    from fimbria.sources.k8s.client import ApiClient
    from fimbria.sources.k8s.exec import PodAccess

    task = asyncio.current_task()
    assert task is not None
    # Once: what is removed after the first signal must not be interrupted by a second, impatient one.
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, _cancel_once(task))
    async with ApiClient(config, component="connectivity") as client, PodAccess(config, component="cli") as pods:
        image, agents = await _installed(client, settings.image)

        async def explain(results: Any, places: Any) -> Any:
            from fimbria.cli.connectivity.drops import ask, hint

            flows, failed = await ask(pods, agents, settings.namespace)
            for node, why in sorted(failed.items()):
                click.echo(f"the observer of {node} can't be asked: {why}", err=True)
            asked = set(agents) - set(failed)
            return [r if r.passed else replace(r, hint=hint(r.probe, places, flows, asked)) for r in results]

        return await run(client, replace(settings, image=image), _Progress(), explain if agents else None)


async def _installed(client: Any, image: str) -> tuple[str, Any]:
    """The image for the test's pods, and the agents that may know why something fails. Raises CantAsk, ApiError."""
    from fimbria.cli import cluster
    from fimbria.sources.k8s.errors import ApiError

    try:
        found = await cluster.find(client)
        return image or found.agent.image, found.agents
    except (cluster.NotInstalled, ApiError):
        if image:
            return image, {}
        if await cluster.is_lab(client):
            return LAB_IMAGE, {}
        raise


def _cancel_once(task: asyncio.Task[Any]) -> Any:
    def cancel() -> None:
        if not task.cancelling():
            task.cancel()

    return cancel


class _Progress:
    """A line for each step, with the time since the beginning."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def __call__(self, step: str) -> None:
        click.echo(f"{time.monotonic() - self._begin:5.1f} s  {step}", err=True)
