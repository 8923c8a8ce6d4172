"""`fimbria monitor`: flows as they happen, with verdicts and the rules behind them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

import click

from fimbria.cli.local import Local, Unreachable, socket_option
from fimbria.cli.show import bad, dim, good, warn
from fimbria.observe.flow import end, reason

Json = dict[str, Any]
FILTERS: Final = (
    ("--pod", "[NAMESPACE/]POD", "From or to this pod; the beginning of its name is enough."),
    ("--from-pod", "[NAMESPACE/]POD", "From this pod."),
    ("--to-pod", "[NAMESPACE/]POD", "To this pod."),
    ("--ip", "IP|CIDR", "From or to this address or network."),
    ("--from-ip", "IP|CIDR", "From it."),
    ("--to-ip", "IP|CIDR", "To it."),
    ("--port", "PORT", "From or to this port."),
    ("--from-port", "PORT", "From it."),
    ("--to-port", "PORT", "To it."),
    ("--label", "KEY[=VALUE]", "From or to a pod with this label."),
    ("--from-label", "KEY[=VALUE]", "From one."),
    ("--to-label", "KEY[=VALUE]", "To one."),
    ("--identity", "NUMBER|NAME", "From or to this identity: a number, or world, host, ..."),
    ("--protocol", "NAME", "tcp, udp, icmpv4, icmpv6 or sctp."),
    ("--policy", "[NAMESPACE/]NAME", "Allowed or denied by a rule of this policy."),
    ("--reason", "NAME", "Dropped for this reason, for example policy_denied."),
)
VERDICTS: Final = ("forwarded", "dropped")
TYPES: Final = ("drop", "trace", "policy-verdict")
MEMORY: Final = 4095
RETRY: Final = 0.3
F = Callable[..., Any]


def _filters(command: F) -> F:
    for option, metavar, text in reversed(FILTERS):
        command = click.option(option, metavar=metavar, multiple=True, help=text)(command)
    return command


@click.command(
    epilog="""\b
All filters must match; one that is given several times matches any of its values.

\b
Examples:
  fimbria monitor --verdict dropped                    what is denied, and by which rule
  fimbria monitor --namespace shop --to-port 80        who talks to port 80 in shop
  fimbria monitor --pod shop/web --last 20 --no-follow the last 20 flows of a pod
  fimbria monitor --identity world -o json | jq .IP    as Hubble's flows in JSON"""
)
@socket_option("observer")
@click.option(
    "--last", type=click.IntRange(0, MEMORY), help="First the last N flows.  [default: 0; 20 with --no-follow]"
)
@click.option("--follow/--no-follow", "-f", default=True, help="Go on with new ones as they happen.  [default: follow]")
@click.option("-n", "--namespace", multiple=True, help="From or to pods of this namespace.")
@click.option("--verdict", type=click.Choice(VERDICTS), multiple=True, help="Only with this verdict.")
@click.option("-t", "--type", "type_", type=click.Choice(TYPES), multiple=True, help="Only events of this type.")
@click.option("--direction", type=click.Choice(["ingress", "egress"]), help="As the pod of this node sees it.")
@_filters
@click.option(
    "-o",
    "--output",
    type=click.Choice(["compact", "json", "jsonpb"]),
    default="compact",
    help="compact lines for people; json: a flow a line; jsonpb: as `hubble observe -o jsonpb`.  [default: compact]",
)
def monitor(
    *,
    observer: Local,
    last: int | None,
    follow: bool,
    output: str,
    type_: tuple[str, ...],
    direction: str | None,
    **filters: Any,
) -> None:
    """Flows of this node as they happen: who, to whom, the verdict, and the rule behind it."""
    query = {name.replace("_", "-"): ",".join(values) for name, values in filters.items() if values}
    query |= {"type": ",".join(type_)} if type_ else {}
    query |= {"direction": direction} if direction else {}
    write = WRITERS[output]
    count = last if last is not None else (0 if follow else 20)
    try:
        flows = follow_flows(observer, query, count) if follow else observer.lines("flows", **query, last=str(count))
        for flow in flows:
            click.echo(write(flow))
    except KeyboardInterrupt:
        return


def follow_flows(observer: Local, query: dict[str, str], last: int) -> Iterator[Json]:
    """The last flows, then new ones for ever. An observer that goes away is waited for; what its successor has from
    meanwhile comes then, and nothing twice. Raises Unreachable if there is none at first, Refused for a bad filter.
    """
    seen = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    stream = observer.lines("flows", **query, last=str(last), follow="1")
    resumed = False
    while True:
        with suppress(Unreachable):
            for flow in stream:
                if not resumed or flow["time"] > seen:
                    seen = max(seen, flow["time"])
                    yield flow
        click.echo(warn("-- the observer went away; waiting for it"), err=True)
        stream = _again(observer, query)
        resumed = True
        click.echo(good("-- the observer is back"), err=True)


def _again(observer: Local, query: dict[str, str]) -> Iterator[Json]:
    while True:
        with suppress(Unreachable):
            return observer.lines("flows", **query, last=str(MEMORY), follow="1")
        time.sleep(RETRY)


def compact(flow: Json) -> str:
    """`12:00:01.123 DROPPED shop/a:4242 -> shop/b:80 TCP SYN  POLICY_DENIED by NetworkPolicy shop/x (ingress)`."""
    dropped = flow["verdict"] == "DROPPED"
    verdict = (bad if dropped else good)(f"{flow['verdict'].lower():<9}")
    why = reason(flow)
    colour = bad if dropped else dim
    kind = f"{flow['event_type']:<14}"
    arrow = dim("-> (reply)" if flow.get("is_reply") else "->")
    ends = f"{end(flow, 'source')} {arrow} {end(flow, 'destination')}"
    return f"{dim(flow['time'][11:23])} {verdict} {dim(kind)} {ends}  {flow['Summary']}  {colour(why)}".rstrip()


def jsonpb(flow: Json) -> str:
    """As Hubble's API sends a flow: inside a response with the node and the time."""
    return json.dumps({"flow": flow, "node_name": flow["node_name"], "time": flow["time"]})


WRITERS: Final[dict[str, Callable[[Json], str]]] = {"compact": compact, "json": json.dumps, "jsonpb": jsonpb}
