"""`fimbria demo`: the main job in one command. A lab, an application, policies, and what they do, measured."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console, Group
from rich.live import Live
from rich.rule import Rule
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fimbria.lab import cluster
from fimbria.lab.demo import APP, POLICIES, SELF, SOURCES, TARGETS, WORLD, Demo, DemoPod
from fimbria.lab.errors import LabError
from fimbria.lab.layout import LabSpec
from fimbria.observe.flow import end, reason
from fimbria.sources.k8s.errors import ApiError

PODS: Final = 8
CONNECTIONS: Final = 60
SETTLE: Final = 0.5
PLAIN_WIDTH: Final = 150
WORDS: Final = {
    SELF: "[dim]·[/]",
    "ok": "[green]✓ open[/]",
    "timeout": "[red]✗ dropped[/]",
    "refused": "[yellow]refused[/]",
}
NODE_COLOURS: Final = ("cyan", "magenta", "yellow", "blue", "green")


class Stage:
    """Prints what happens: a live picture in a terminal, plain lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.begun = time.monotonic()

    def title(self, text: str) -> None:
        """A new chapter."""
        self.console.print()
        self.console.print(Rule(f"[bold]{text}[/]", align="left", style="dim"))

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """A step that takes a moment; says how long it took."""
        started = time.monotonic()
        if self.console.is_terminal:
            with self.console.status(text):
                yield
        else:
            yield
        self.console.print(f"[green]✓[/] {text} [dim]{time.monotonic() - started:.1f} s[/]", highlight=False)


@click.command()
@click.option("--name", default="fimbria", show_default=True, help="Name of the lab.")
@click.option("--routing", type=click.Choice(["overlay", "native"]), default="overlay", show_default=True)
@click.option("--plain", is_flag=True, help="No live picture and no colours.")
def demo(name: str, routing: str, plain: bool) -> None:
    """Show the main job: three nodes, an application, policies, and what they do, measured with real connections.

    Leaves the lab running for you to look around; `fimbria lab down` removes every trace of it.
    """
    console = Console(no_color=plain, force_terminal=False if plain else None)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    try:
        asyncio.run(_run(LabSpec(name=name, routing=routing), Stage(console)))
    except (LabError, ApiError) as error:
        raise click.ClickException(str(error)) from None


async def _run(spec: LabSpec, stage: Stage) -> None:
    stage.title("1  A cluster of three nodes")
    with _lab_progress(stage) as step:
        await asyncio.to_thread(cluster.up, spec, step)
    show = Demo(spec)
    stage.title("2  An application, from ordinary Kubernetes YAML")
    await show.apply(APP, lambda m, what: None)
    pods = await _pods_coming_up(show, stage)
    await show.start_world()
    stage.console.print(await _inventory(show, pods))

    stage.title("3  Who can reach whom")
    with stage.working("measuring with real connections, before any policy"):
        before = await show.matrix(pods)
    with stage.working("applying seven policies"):
        await show.apply(POLICIES, lambda m, what: None)
        await asyncio.sleep(SETTLE)
    with stage.working("measuring again"):
        after = await show.matrix(pods)
    stage.console.print(_matrix("before the policies", before, before))
    stage.console.print(_matrix("after the policies", after, before))

    stage.title("4  Services spread connections over their backends on all nodes, from inside and from outside")
    frontend = next(p for p in pods if p.workload == "shop/frontend")
    with stage.working(f"{CONNECTIONS} connections from {frontend.name} to Service shop/api, each family"):
        spread = await show.spread(frontend, "shop/api", CONNECTIONS)
    with stage.working(f"{CONNECTIONS} connections from the outside world to Service shop/frontend, each way"):
        outside = await show.from_outside("shop/frontend", CONNECTIONS)
    stage.console.print(_spread("shop/api", spread, pods))
    stage.console.print(_spread("shop/frontend", outside.answers, pods))

    stage.title("5  What the datapath saw")
    stage.console.print(
        _flows("the last new connections", await show.flows(6, "&type=policy-verdict&verdict=FORWARDED"))
    )
    stage.console.print(
        _flows("every drop, with its reason and the policy behind it", await show.flows(10, "&verdict=DROPPED"))
    )
    _closing(spec, stage, (await show.services())["shop/api"][0], outside.balancer)


@contextmanager
def _lab_progress(stage: Stage) -> Iterator[Any]:
    started = time.monotonic()
    steps: list[str] = []

    def step(text: str) -> None:
        if stage.console.is_terminal:
            status.update(text)
        if steps:
            stage.console.print(f"[green]✓[/] {steps[-1]} [dim]{time.monotonic() - started:.1f} s[/]", highlight=False)
        steps.append(text)

    status = stage.console.status("starting")
    if stage.console.is_terminal:
        status.start()
    try:
        yield step
        step("")
    finally:
        status.stop()


async def _pods_coming_up(show: Demo, stage: Stage) -> list[DemoPod]:
    started = time.monotonic()

    def picture(pods: list[DemoPod]) -> Group:
        ready = sum(p.ready for p in pods)
        rows = [
            Text.from_markup(f"{'[green]●[/]' if p.ready else '[dim]○[/]'} {p.namespace}/{p.name}  [dim]{p.node}[/]")
            for p in pods
        ]
        return Group(Spinner("dots", f"{ready} of {PODS} pods ready"), *rows)

    if stage.console.is_terminal:
        with Live(console=stage.console, transient=True, refresh_per_second=8) as live:
            pods = await show.wait_ready(PODS, lambda found: live.update(picture(found)))
    else:
        pods = await show.wait_ready(PODS, lambda found: None)
    stage.console.print(
        f"[green]✓[/] {len(pods)} pods ready [dim]{time.monotonic() - started:.1f} s[/]", highlight=False
    )
    return pods


async def _inventory(show: Demo, pods: list[DemoPod]) -> Table:
    identities = await show.identities()
    nodes = list(show.spec.node_names)
    table = Table("Node", "Pod", "IPv4", "IPv6", "Identity", title="nodes and pods", title_justify="left")
    for node in nodes:
        member, colour = show.spec.node(node), NODE_COLOURS[nodes.index(node) % len(NODE_COLOURS)]
        table.add_row(f"[{colour}]{node}[/]", "[dim](the node itself)[/]", member.ipv4, member.ipv6, "1 [dim]host[/]")
        for p in (p for p in pods if p.node == node):
            v4 = next((i for i in p.ips if ":" not in i), "")
            v6 = next((i for i in p.ips if ":" in i), "")
            number = identities.get(f"{p.namespace}/{p.name}", 0)
            table.add_row("", f"[{colour}]{p.namespace}/{p.name}[/]", v4, v6, str(number) if number else "[red]?[/]")
    return table


def _matrix(title: str, cells: dict[tuple[str, str], str], before: dict[tuple[str, str], str]) -> Table:
    table = Table("from \\ to", *TARGETS, WORLD, title=title, title_justify="left")
    for source in SOURCES:
        row = []
        for target in (*TARGETS, WORLD):
            result = cells[source, target]
            changed = " [dim](new)[/]" if result != before[source, target] else ""
            row.append(WORDS.get(result, result) + changed)
        table.add_row(source, *row)
    return table


def _spread(service: str, spread: dict[str, Any], pods: list[DemoPod]) -> Table:
    table = Table("Backend", "Node", *spread, title=f"answers of Service {service}", title_justify="left")
    for p in (p for p in pods if p.workload == service):
        table.add_row(p.name, p.node, *(f"{c[p.name]:3d} {'▇' * (c[p.name] // 2)}" for c in spread.values()))
    return table


def _flows(title: str, flows: list[dict[str, Any]]) -> Table:
    table = Table("Time", "Node", "From → to", "Verdict and why", title=title, title_justify="left", show_lines=False)
    for f in flows:
        colour = "red" if f["verdict"] == "DROPPED" else "green"
        why = f"[{colour}]{f['verdict']}[/] {reason(f)}"
        what = f"{end(f, 'source')} → {end(f, 'destination')}\n[dim]{f['Summary']}[/]"
        table.add_row(f["time"][11:23], f["node_name"], what, why)
    return table


def _closing(spec: LabSpec, stage: Stage, denied: tuple[str, int], balancer: tuple[str, int]) -> None:
    option = "" if spec.name == "fimbria" else f" --name {spec.name}"
    visitor = f"-n guest $(fimbria lab get{option} pods -n guest -o name)"
    stage.title(f"Done after {time.monotonic() - stage.begun:.0f} s. The lab goes on running; try")
    activate = Path(sys.executable).with_name("activate")
    if shutil.which("fimbria") is None and activate.exists():
        shown = activate.relative_to(Path.cwd()) if activate.is_relative_to(Path.cwd()) else activate
        stage.console.print(f"  . {shown}          [dim]puts fimbria on this shell's path[/]", highlight=False)
    stage.console.print(
        f"""  fimbria lab status{option}
  fimbria lab get{option} pods -A -o wide
  fimbria lab exec{option} node/node1 -- fimbria status
  fimbria lab exec{option} node/node1 -- fimbria monitor --verdict DROPPED
  fimbria lab exec{option} {visitor} -- labtool probe http {denied[0]} {denied[1]}
  fimbria lab probe{option} world http {balancer[0]} {balancer[1]}
  fimbria lab exec{option} node/node1 -- fimbria service get shop/frontend
  fimbria lab down{option}          [dim]or: make demo-down[/]""",
        highlight=False,
    )
