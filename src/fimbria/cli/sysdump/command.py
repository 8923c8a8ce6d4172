"""The command itself: options, the archive's name, progress, Ctrl-C, exit status."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final

import click

from fimbria.cli.local import Local, socket_option
from fimbria.cli.sysdump.archive import Package, Stream, safe
from fimbria.cli.sysdump.findings import Facts, NodeFacts, findings, page
from fimbria.cli.sysdump.local import FULL, NORMAL, QUICK, Node

INTERRUPTED: Final = 130
_SPANS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _since(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    found = re.fullmatch(r"([0-9]{1,6})([smhd])", value)
    if not found:
        raise click.BadParameter(f"{value!r}: expected a number and s, m, h or d, for example 2h")
    return int(found[1]) * _SPANS[found[2]]


@click.command(
    epilog="""\b
One .zip with README.md, which says what is unwell at a glance, and below nodes/ and kubernetes/ what is
behind it: each agent's state, maps, plan, latest drops, metrics, logs, settings and journal, the kernel's
settings, devices, routes and BPF programs, and the objects of the API that bear on the network.
Secrets are never asked for, and what looks like one is replaced by <redacted>.

\b
Examples:
  fimbria sysdump                                  the whole cluster (50 nodes at most)
  fimbria sysdump --nodes worker1,worker2 --since 2h
  fimbria sysdump --quick                          for a first look: no tables, no maps
  fimbria sysdump --local                          this node alone, when the API is away
  fimbria sysdump --lab                            a lab on this machine

\b
Exit status: 0 there is an archive, also if something is missing in it; 2 nothing can be asked;
130 interrupted, nothing is left behind."""
)
@click.option("--output", "-o", metavar="FILE", help="The archive.  [default: fimbria-sysdump-CLUSTER-TIME.zip here]")
@click.option("--nodes", default="", metavar="A[,B...]", help="Only these nodes.")
@click.option("--max-nodes", default=50, show_default=True, type=click.IntRange(1), help="Of how many nodes at most.")
@click.option("--since", metavar="TIME", callback=_since, help="Logs of the last 90s, 30m, 2h or 1d.  [default: all]")
@click.option("--quick", "detail", flag_value=QUICK, help="No tables, no maps, no logs of before a restart.")
@click.option("--full", "detail", flag_value=FULL, help="Also tables and maps with very many rows.")
@click.option("--detail", type=click.Choice([QUICK, NORMAL, FULL]), default=NORMAL, hidden=True, help="The same.")
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(1), help="For each node.")
@click.option("--max-size", default=1024, show_default=True, metavar="MIB", help="Of all files before compression.")
@click.option("--local", is_flag=True, help="Only this node, without the API.")
@click.option("--lab", is_flag=False, flag_value="lab", metavar="NAME", help="A lab on this machine.")
@socket_option("agent")
def sysdump(*, agent: Local, output: str | None, local: bool, lab: str | None, **options: Any) -> None:
    """One archive with the state of the cluster, for those who help from afar."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        if local:
            _local(agent, output, options)
        else:
            _cluster(output, lab, options)
    except (KeyboardInterrupt, asyncio.CancelledError):
        click.echo("Interrupted; nothing is left behind.", err=True)
        sys.exit(INTERRUPTED)
    except OSError as error:
        raise click.FileError(error.filename or str(output), error.strerror or str(error)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _path(output: str | None, name: str) -> Path:
    path = Path(output) if output else Path(f"{name}.zip")
    if path.is_dir():
        return path / f"{name}.zip"
    return path


def _local(agent: Local, output: str | None, options: dict[str, Any]) -> None:
    import os

    os.nice(10)  # what is collected matters less than what it is collected from
    detail, seconds = options["detail"], options["seconds"]
    if output == "-":
        stream = Stream(sys.stdout.buffer)
        Node(stream, agent, detail=detail, seconds=seconds).collect()
        stream.close()
        return
    from fimbria.cli.sysdump.collect import stamp

    name = f"fimbria-sysdump-{safe(os.uname().nodename)}-{stamp(time.time())}"
    with Package(_path(output, name), name, options["max_size"] << 20) as package:
        node = Node(package, agent, detail=detail, seconds=seconds)
        node.collect()
        facts = Facts(f"Node {os.uname().nodename}", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), _version())
        facts.nodes["this node"] = one = NodeFacts("this node", errors=dict(node.notes.errors))
        for file, value in node.seen.items():
            one.learn(file, value)
        package.allow_more(16 << 20)
        package.text("README.md", page(facts, [f"nodes/{n}" for n in package.names]).replace("nodes/NAME/", ""))
    _tell(package, facts)


def _version() -> str:
    from fimbria.release import RELEASE

    return f"fimbria {RELEASE}"


def _cluster(output: str | None, lab: str | None, options: dict[str, Any]) -> None:
    import tempfile

    from fimbria.cli import cluster
    from fimbria.cli.sysdump.collect import Collector, Options, cluster_name, stamp
    from fimbria.sources.k8s.client import ApiClient
    from fimbria.sources.k8s.exec import PodAccess

    context = click.get_current_context().params
    reach, config = None, None
    if lab is not None:
        from fimbria.cli.sysdump.lab import LabNodes

        reach = LabNodes(lab)
        config = cluster.configuration(str(reach.kubeconfig), "")
    else:
        config = cluster.configuration(context["kubeconfig"], context["context"])
    name = f"fimbria-sysdump-{cluster_name(config.origin, config.server)}-{stamp(time.time())}"
    path = _path(output, name)
    facts = Facts(f"Cluster {config.server}", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), _version())
    facts.quick = options["detail"] == QUICK
    progress = _Progress()

    async def work(package: Package, folder: Path) -> None:
        wanted = Options(
            options["detail"],
            tuple(n.strip() for n in options["nodes"].split(",") if n.strip()),
            most_nodes=options["max_nodes"],
            since=options["since"],
            node_seconds=options["seconds"],
            folder=folder,
        )
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        async with ApiClient(config, component="sysdump") as client, PodAccess(config, component="sysdump") as pods:
            collector = Collector(package, client, pods, options=wanted, facts=facts, say=progress, reach=reach)
            await collector.run()

    with (
        tempfile.TemporaryDirectory(prefix=".fimbria-sysdump-", dir=path.parent) as folder,
        Package(path, name, options["max_size"] << 20) as package,
    ):
        cluster.run(work(package, Path(folder)))
    progress.end()
    _tell(package, facts)


def _tell(package: Package, facts: Facts) -> None:
    found = findings(facts)
    for line in found[:10]:
        click.echo(f"  {line.replace('**', '')}", err=True)
    if len(found) > 10:
        click.echo(f"  ... and {len(found) - 10} more", err=True)
    missing = len(facts.missing) + sum(len(n.errors) for n in facts.nodes.values())
    if missing:
        click.echo(f"{missing} things couldn't be collected; errors.json says why.", err=True)
    click.echo(f"{package.path}  ({package.path.stat().st_size / (1 << 20):.1f} MiB; begin with README.md)")


class _Progress:
    """Lines with the time since the beginning; in a terminal one line that changes."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, step: str) -> None:
        line = f"{time.monotonic() - self._begin:5.1f} s  {step}"
        if self._terminal:
            click.echo(f"\r\x1b[K{line[:100]}", err=True, nl=False)
        else:
            click.echo(line, err=True)

    def end(self) -> None:
        """What follows begins a line of its own."""
        if self._terminal:
            click.echo("\r\x1b[K", err=True, nl=False)
