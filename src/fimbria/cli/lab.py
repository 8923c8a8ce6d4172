"""`fimbria lab`: a cluster of several nodes on this machine."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from fimbria.lab.errors import LabError
from fimbria.lab.layout import ROUTINGS, LabSpec, Paths

T = TypeVar("T")
DEFAULTS = LabSpec()

name_option = click.option("--name", default=DEFAULTS.name, show_default=True, help="Name of the lab.")
namespace_option = click.option("-n", "--namespace", default="default", show_default=True)


@contextmanager
def errors() -> Iterator[None]:
    """One sentence instead of a traceback for what the user can act on."""
    from fimbria.sources.k8s.errors import ApiError

    try:
        yield
    except (LabError, ApiError) as e:
        raise click.ClickException(str(e)) from None
    except PermissionError as e:
        raise click.ClickException(f"the lab needs root: {e}") from None


class Steps:
    """Progress: a spinner with the step in a terminal, a line per step elsewhere."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._spinner = self._console.status("") if self._console.is_terminal else None
        self._begin = time.monotonic()
        self._step = ""

    def __enter__(self) -> Callable[[str], None]:
        if self._spinner:
            self._spinner.start()
        return self.next

    def __exit__(self, kind: object, *_: object) -> None:
        self.next("")
        if self._spinner:
            self._spinner.stop()

    def next(self, step: str) -> None:
        took = f"{time.monotonic() - self._begin:5.1f} s"
        if self._spinner:
            if self._step:
                self._console.print(f"[green]✓[/] [dim]{took}[/] {self._step}", highlight=False)
            self._spinner.update(step)
        elif step:
            click.echo(f"{took}  {step}", err=True)
        self._step = step


@click.group()
def lab() -> None:
    """A cluster of several nodes on this machine, for trying out and for tests."""


@lab.command()
@name_option
@click.option("--nodes", default=DEFAULTS.nodes, show_default=True, help="Number of nodes.")
@click.option(
    "--routing",
    type=click.Choice(ROUTINGS),
    default=DEFAULTS.routing,
    show_default=True,
    help="How pods' packets travel between nodes.",
)
@click.option("--mtu", default=DEFAULTS.mtu, show_default=True, help="MTU of the network between the nodes, in bytes.")
@click.option(
    "--kubeconfig",
    type=click.Path(exists=True, dir_okay=False, resolve_path=True),
    help="Use this API server instead of the embedded one.",
)
@click.option("--ipv4-pool", default=DEFAULTS.ipv4_pool, show_default=True, help='Pods\' IPv4 addresses; "" for none.')
@click.option(
    "--ipv4-mask", default=DEFAULTS.ipv4_mask, show_default=True, help="Prefix length of a node's share of it."
)
@click.option("--ipv6-pool", default=DEFAULTS.ipv6_pool, show_default=True, help='Pods\' IPv6 addresses; "" for none.')
@click.option(
    "--ipv6-mask", default=DEFAULTS.ipv6_mask, show_default=True, help="Prefix length of a node's share of it."
)
@click.option("--service-ipv4", default=DEFAULTS.service_ipv4, show_default=True, help="Services' IPv4 addresses.")
@click.option("--service-ipv6", default=DEFAULTS.service_ipv6, show_default=True, help="Services' IPv6 addresses.")
@click.option(
    "--fabric-ipv4", default=DEFAULTS.fabric_ipv4, show_default=True, help="Nodes' IPv4 addresses, a /16 or larger."
)
@click.option(
    "--fabric-ipv6", default=DEFAULTS.fabric_ipv6, show_default=True, help="Nodes' IPv6 addresses, a /48 or larger."
)
@click.option(
    "--agents/--no-agents", default=True, help="Start Fimbria itself, or leave the nodes without a network plugin."
)
@click.option(
    "--agent-option",
    "agent_options",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting for all agents, for example attach=clsact; repeatable.",
)
@click.option("--controllers", is_flag=True, help="With --kubeconfig: run controllers, for a server that has none.")
@click.option("--zone", "zones", multiple=True, help="Zones of the nodes, given in turn; repeatable.")
@click.option(
    "--source-check/--no-source-check",
    default=True,
    help="Drop what nodes send from addresses of others, as clouds do unless told otherwise; direct server return "
    "through node ports needs it off.",
)
def up(**options: Any) -> None:
    """Build a lab and start everything in it."""
    from fimbria.lab import cluster

    spec = LabSpec(**options | {"kubeconfig": options["kubeconfig"] or ""})
    begin = time.monotonic()
    with errors(), Steps() as step:
        _interruptible()
        cluster.up(spec, step)
    click.echo(_what_next(spec, time.monotonic() - begin))


def _interruptible() -> None:
    """SIGTERM and SIGHUP end `up` as Ctrl-C does: with everything removed."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)


def _what_next(spec: LabSpec, took: float) -> str:
    option = "" if spec.name == DEFAULTS.name else f" --name {spec.name}"
    network = (
        "" if spec.agents else "The nodes have no network plugin; they become Ready when one is in /etc/cni/net.d.\n"
    )
    return f"""Lab {spec.name} is up after {took:.1f} s: {spec.nodes} nodes, {spec.routing} routing.
{network}
  fimbria lab status{option}
  fimbria lab apply{option} -f FILE.yaml
  fimbria lab get{option} pods -A
  fimbria lab exec{option} POD -- COMMAND        (or node/node1)
  kubectl --kubeconfig {Paths(spec.name).host_kubeconfig} get nodes
  fimbria lab down{option}"""


@lab.command()
@name_option
@click.option("--all", "every", is_flag=True, help="Remove all labs.")
def down(name: str, every: bool) -> None:
    """Remove every trace of a lab, also of one that broke half-way."""
    from fimbria.lab import cluster, state

    with errors():
        for one in state.labs() if every else [name]:
            with Steps() as step:
                removed = cluster.down(one, step)
            click.echo(f"Lab {one} removed." if removed else f"There is no lab {one}; nothing to do.")


@lab.command()
@name_option
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
def status(name: str, output: str) -> None:
    """Show nodes and processes. The exit status is 1 if a process has ended or a node isn't ready."""
    import json

    from fimbria.lab import cluster

    with errors():
        picture = cluster.status(name)
    if output == "json":
        click.echo(json.dumps(picture, indent=2))
    else:
        _show_status(picture)
    sys.exit(0 if picture["healthy"] else 1)


def _show_status(picture: dict[str, Any]) -> None:
    click.echo(f"Lab {picture['name']}: {picture['routing']} routing, pods {', '.join(picture['pools'])}")
    if picture["api_error"]:
        click.echo(f"API server: {picture['api_error']}")
    click.echo()
    _columns(
        [["NODE", "ADDRESSES", "READY", "REASON"]]
        + [
            [n["name"], ", ".join(n["addresses"]), "yes" if n["ready"] else "no", n["message"]]
            for n in picture["nodes"]
        ]
    )
    click.echo()
    _columns(
        [["PROCESS", "PID", "STATE"]]
        + [[p["name"], str(p["pid"]), "running" if p["running"] else "ended"] for p in picture["processes"]]
    )


def _columns(rows: list[list[str]]) -> None:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for r in rows:
        click.echo("   ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip())


# --- objects ---------------------------------------------------------------------------------------------------


def _with_api(name: str, work: Callable[[Any], Awaitable[T]]) -> T:
    from fimbria.lab import cluster, state

    async def run() -> T:
        async with cluster.api(Paths(name)) as client:
            return await work(client)

    with errors():
        state.load(name)
        return asyncio.run(run())


files_option = click.option(
    "-f",
    "--filename",
    "files",
    multiple=True,
    required=True,
    type=click.Path(allow_dash=True),
    help="File or directory with YAML or JSON; - reads standard input.",
)


def _manifests(files: tuple[str, ...]) -> list[Any]:
    from fimbria.lab import manifests

    found = manifests.parse(sys.stdin.read(), "standard input") if "-" in files else []
    paths = [Path(f) for f in files if f != "-"]
    return found + (manifests.load(paths) if paths else [])


def _tell(m: Any, said: str) -> None:
    where = f"{m.namespace}/" if m.namespace else ""
    click.echo(f"{m.kind.lower()} {where}{m.name}: {said}", err=said.startswith("error"))


@lab.command()
@name_option
@namespace_option
@files_option
def apply(name: str, namespace: str, files: tuple[str, ...]) -> None:
    """Create or change objects, like kubectl apply."""
    from fimbria.lab.objects import apply_all

    with errors():
        manifests = _manifests(files)
    sys.exit(1 if _with_api(name, lambda c: apply_all(c, manifests, _tell, namespace)) else 0)


@lab.command()
@name_option
@namespace_option
@files_option
def delete(name: str, namespace: str, files: tuple[str, ...]) -> None:
    """Delete the objects that files describe."""
    from fimbria.lab.objects import remove_all

    with errors():
        manifests = _manifests(files)
    sys.exit(1 if _with_api(name, lambda c: remove_all(c, manifests, _tell, namespace)) else 0)


@lab.command()
@name_option
@namespace_option
@click.argument("kind")
@click.argument("object_name", required=False, default="")
@click.option("-A", "--all-namespaces", is_flag=True)
@click.option("-l", "--selector", default="", help="Label selector.")
@click.option("-o", "--output", type=click.Choice(["table", "wide", "name", "json", "yaml"]), default="table")
def get(
    *, name: str, namespace: str, kind: str, object_name: str, all_namespaces: bool, selector: str, output: str
) -> None:
    """Show objects of any kind the API server has."""

    async def work(client: Any) -> None:
        found = await client.find(kind)
        path = found.path("" if all_namespaces else namespace, object_name)
        params = {} if object_name else {"labelSelector": selector}
        if output == "name":
            answer = await client.request("GET", path, **params)
            for item in answer.get("items", [answer]):
                click.echo(f"{found.singular}/{item['metadata']['name']}")
        elif output in ("json", "yaml"):
            _dump(await client.request("GET", path, **params), output)
        else:
            _show_table(await client.table(path, **params), found.namespaced and all_namespaces, output == "wide")

    _with_api(name, work)


def _dump(value: dict[str, Any], output: str) -> None:
    import json

    import yaml

    click.echo(json.dumps(value, indent=2) if output == "json" else yaml.safe_dump(value, sort_keys=False).rstrip())


def _show_table(table: dict[str, Any], namespaces: bool, wide: bool) -> None:
    columns = [
        (i, c["name"]) for i, c in enumerate(table.get("columnDefinitions") or ()) if wide or not c.get("priority")
    ]
    rows = table.get("rows") or ()
    if not rows:
        click.echo("Nothing found.", err=True)
        return
    head = (["NAMESPACE"] if namespaces else []) + [c.upper() for _, c in columns]
    lines = [
        ([r["object"]["metadata"].get("namespace", "")] if namespaces else [])
        + ["" if r["cells"][i] is None else str(r["cells"][i]) for i, _ in columns]
        for r in rows
    ]
    _columns([head, *lines])


# --- inside ----------------------------------------------------------------------------------------------------


def _place(name: str, namespace: str, pod: str) -> Any:
    from fimbria.lab.access import PodPlace

    pod = pod.removeprefix("pod/")  # as `get -o name` writes it
    if "/" in pod:
        namespace, pod = pod.split("/", 1)
    found = _with_api(name, lambda c: c.request("GET", f"/api/v1/namespaces/{namespace}/pods/{pod}"))
    with errors():
        return PodPlace.of(found)


@lab.command("exec", context_settings={"ignore_unknown_options": True})
@name_option
@namespace_option
@click.option("-c", "--container", default="", help="Container, if not the first.")
@click.argument("target")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(name: str, namespace: str, container: str, target: str, command: tuple[str, ...]) -> None:
    """Run a command in a pod ([NAMESPACE/]POD), a node (node/NAME), or world, node/control, node/fabric."""
    _inside(name, namespace, container, target, command)


@lab.command(
    context_settings={"ignore_unknown_options": True},
    epilog="""\b
Examples:
  fimbria lab probe world http 203.0.113.1 80              a load balancer, from outside
  fimbria lab probe node/node1 tcp 127.0.0.1 30000         a node port, from the node itself
  fimbria lab probe shop/client udp 10.96.0.7 53 --count 5
  fimbria lab probe world tcp 172.31.1.10 30000 --source 198.51.100.10 --timeout 300

\b
The exit status is 0 if every attempt succeeded. More options: --count, --interval, --concurrency.""",
)
@name_option
@namespace_option
@click.argument("source", metavar="FROM")
@click.argument("protocol", type=click.Choice(["tcp", "http", "udp", "icmp"]))
@click.argument("address")
@click.argument("rest", metavar="[PORT] [OPTIONS]", nargs=-1, type=click.UNPROCESSED)
def probe(*, name: str, namespace: str, source: str, protocol: str, address: str, rest: tuple[str, ...]) -> None:
    """Try a connection from a pod, a node (node/NAME) or the outside world, and say what came of it."""
    from fimbria.lab import kernel

    with errors():
        tool = kernel.binary("labtool")
    _inside(name, namespace, "", source, (tool, "probe", protocol, address, *rest))


def _inside(name: str, namespace: str, container: str, target: str, command: tuple[str, ...]) -> None:
    """Becomes the command, in a place of the lab. A pod that is named world is pod/world."""
    from fimbria.lab import access, components, state

    paths = Paths(name)
    target = "node/world" if target == "world" else target
    member = target.removeprefix("node/") if target.startswith("node/") else ""
    with errors():
        spec = state.load(name)
        if member:
            if member not in ("world", "control", "fabric"):
                spec.node(member)
            argv = [*components.enter(paths, member), "--", *command]
        else:
            argv = access.pod_argv(paths, _place(name, namespace, target), container, command)
    os.execve(argv[0], argv, components.ENVIRONMENT | {k: os.environ[k] for k in ("TERM",) if k in os.environ})  # noqa: S606


@lab.command()
@name_option
@namespace_option
@click.option("-c", "--container", default="", help="Container, if not the first.")
@click.option("-f", "--follow", is_flag=True, help="Go on as the log grows.")
@click.argument("target")
def logs(name: str, namespace: str, container: str, follow: bool, target: str) -> None:
    """Show the log of a pod ([NAMESPACE/]POD) or of a process of the lab (process/node1/agent)."""
    from fimbria.lab import access, components, state

    paths = Paths(name)
    with errors():
        state.load(name)
        if target.startswith("process/"):
            path = components.log_path(paths, target.removeprefix("process/"))
        else:
            path = access.pod_log(paths, _place(name, namespace, target), container)
        out = sys.stdout.buffer
        for chunk in access.read_log(path, follow):
            out.write(chunk)
            out.flush()


@lab.command()
@name_option
@click.option("-s", "--signal", "number", default="KILL", show_default=True, help="Name or number of the signal.")
@click.argument("process")
def kill(name: str, number: str, process: str) -> None:
    """Send a signal to a process of the lab, for example node1/agent; nothing starts it again but `start`."""
    from fimbria.lab import components, state

    with errors():
        state.load(name)
        components.send(Paths(name), process, _signal(number))


def _signal(text: str) -> int:
    try:
        return signal.Signals(int(text)) if text.isdigit() else signal.Signals[f"SIG{text.upper().removeprefix('SIG')}"]
    except (KeyError, ValueError):
        raise LabError(f"there is no signal {text!r}") from None


@lab.command()
@name_option
@click.argument("process")
def start(name: str, process: str) -> None:
    """Start a process of the lab again that has ended."""
    from fimbria.lab import cluster

    with errors():
        cluster.start(name, process)
