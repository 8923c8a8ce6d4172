"""`fimbria node|endpoint|identity|ipcache|service|policy list|get`: what the agent of this node knows."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from typing import Any, Final

import click

from fimbria.cli import match
from fimbria.cli.local import Local, socket_option
from fimbria.cli.show import (
    Column,
    Row,
    bad,
    count,
    dim,
    dump,
    fields,
    good,
    listing,
    output_option,
    short_labels,
    table,
    warn,
)

namespace_option = click.option("-n", "--namespace", default="", help="Only this namespace.")
label_option = click.option(
    "-l", "--label", "labels", multiple=True, metavar="KEY[=VALUE]", help="Only with this label; repeatable."
)


def _get_output(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")(command)


def _lines(items: Iterable[str]) -> str:
    return "\n".join(items)


# --- nodes -----------------------------------------------------------------------------------------------------------


@click.group()
def node() -> None:
    """Nodes of the cluster and their pod addresses."""


NODE_COLUMNS: Final = (
    Column("NAME", lambda r: r["name"] + (" *" if r["local"] else "")),
    Column("ADDRESSES", lambda r: ", ".join(r["addresses"])),
    Column("POD CIDRS", lambda r: ", ".join(r["pod_cidrs"])),
    Column("ROUTERS", lambda r: ", ".join(r["routers"]), wide=True),
    Column("PROBLEM", lambda r: bad(r["problem"]) if r["problem"] else ""),
)


@node.command("list")
@socket_option("agent")
@output_option
def node_list(agent: Local, output: str) -> None:
    """List nodes; * is this one."""
    listing(agent.get("nodes"), NODE_COLUMNS, output, "No nodes yet.")


@node.command("get")
@click.argument("name", shell_complete=match.completer("nodes", lambda r: [r["name"]]))
@socket_option("agent")
@_get_output
def node_get(agent: Local, name: str, output: str) -> None:
    """Show a node by its name or one of its addresses."""
    row = match.one(agent.get("nodes"), name, "node", match.node_names)
    if output == "json":
        dump(row)
        return
    fields(
        [
            ("Node", row["name"] + (" (this one)" if row["local"] else "")),
            ("Addresses", ", ".join(row["addresses"])),
            ("Pod CIDRs", ", ".join(row["pod_cidrs"])),
            ("Routers", ", ".join(row["routers"])),
            ("Problem", bad(row["problem"]) if row["problem"] else ""),
        ]
    )


# --- endpoints -------------------------------------------------------------------------------------------------------


@click.group()
def endpoint() -> None:
    """Pods of this node: addresses, identity, what their policies allow."""


def _pod(r: Row) -> str:
    return f"{r['namespace']}/{r['pod']}" if r["pod"] else dim("(no pod)")


def _enforcing(direction: str) -> Callable[[Row], str]:
    def cell(r: Row) -> str:
        names = r["enforced_by"][direction]
        return warn("enforced") + dim(f" ({count(len(names), 'policy', 'policies')})") if names else "open"

    return cell


def _state(r: Row) -> str:
    if r["failure"]:
        return bad("failing")
    return good("ready") if r["identity"] else warn("no identity yet")


ENDPOINT_COLUMNS: Final = (
    Column("ID", lambda r: str(r["id"])),
    Column("POD", _pod),
    Column("IPV4", lambda r: r["ipv4"]),
    Column("IPV6", lambda r: r["ipv6"]),
    Column("IDENTITY", lambda r: str(r["identity"] or "")),
    Column("INGRESS", _enforcing("ingress")),
    Column("EGRESS", _enforcing("egress")),
    Column("STATE", _state),
    Column("INTERFACE", lambda r: f"{r['interface']} ({r['ifindex']})", wide=True),
    Column("MAC", lambda r: r["mac"], wide=True),
    Column("LABELS", lambda r: short_labels(r["labels"]), wide=True),
)


@endpoint.command("list")
@namespace_option
@label_option
@click.option("--identity", type=int, help="Only with this identity.")
@click.option("--failing", is_flag=True, help="Only those that aren't in the kernel as they should be.")
@socket_option("agent")
@output_option
def endpoint_list(
    *, agent: Local, namespace: str, labels: tuple[str, ...], identity: int | None, failing: bool, output: str
) -> None:
    """List the pods of this node."""
    rows = [
        r
        for r in agent.get("endpoints")
        if (not namespace or r["namespace"] == namespace)
        and match.labels(r["labels"], labels)
        and (identity is None or r["identity"] == identity)
        and (not failing or r["failure"])
    ]
    rows.sort(key=lambda r: (r["namespace"], r["pod"], r["id"]))
    listing(rows, ENDPOINT_COLUMNS, output, "No such pods on this node.")


@endpoint.command(
    "get",
    epilog="""\b
Examples:
  fimbria endpoint get web-6f7c          by a pod's name
  fimbria endpoint get shop/web-6f7c     with its namespace
  fimbria endpoint get 10.244.0.7        by address, endpoint number or container id""",
)
@click.argument("name", shell_complete=match.completer("endpoints", match.pod_names))
@socket_option("agent")
@_get_output
def endpoint_get(agent: Local, name: str, output: str) -> None:
    """Show a pod of this node with every entry of its policy and the rule behind it."""
    found = match.one(agent.get("endpoints"), name, "pod on this node", match.endpoint_names)
    row = agent.get("endpoints", str(found["id"]))
    if output == "json":
        dump(row)
        return
    fields(
        [
            ("Endpoint", str(row["id"])),
            ("Pod", _pod(row)),
            ("Container", row["container_id"]),
            ("State", _state(row) + (f"  {row['failure']}" if row["failure"] else "")),
            ("Addresses", ", ".join(a for a in (row["ipv4"], row["ipv6"]) if a)),
            ("Interface", f"{row['interface']} (number {row['ifindex']}), pod's MAC {row['mac']}"),
            ("Identity", str(row["identity"] or "none yet")),
            ("Labels", _lines(row["labels"])),
            ("Ingress", _enforced(row, "ingress")),
            ("Egress", _enforced(row, "egress")),
        ]
    )
    _entries(row)


def _enforced(row: Row, direction: str) -> str:
    names = row["enforced_by"][direction]
    return warn("denied unless allowed") + ", by\n" + _lines(names) if names else "open: no policy denies by default"


def _entries(row: Row) -> None:
    """Entries that differ in their ports only share a line."""
    grouped: dict[tuple[str, ...], list[str]] = {}
    for e in row["entries"]:
        who = short_labels(e["peer_is"]) + (" (pods too)" if e["pods_too"] else "")
        key = (e["direction"], e["verdict"], str(e["peer"] or "any"), who, rule_text(e["rule"]))
        grouped.setdefault(key, []).append(e["ports"])
    if not grouped:
        return
    click.echo()
    table(
        ["DIRECTION", "VERDICT", "PEER", "IS", "PORTS", "RULE"],
        [
            [direction, good(verdict) if verdict == "allow" else bad(verdict), peer, who, ", ".join(ports), rule]
            for (direction, verdict, peer, who, rule), ports in grouped.items()
        ],
        indent="  ",
    )


def rule_text(rule: Row | None) -> str:
    """`NetworkPolicy shop/web ingress[0]`."""
    if rule is None:
        return "allowed by default"
    name = f"{rule['namespace']}/{rule['name']}" if rule["namespace"] else rule["name"]
    return f"{rule['kind']} {name} {rule['path']}"


# --- identities ------------------------------------------------------------------------------------------------------


@click.group()
def identity() -> None:
    """Security identities: numbers and the labels behind them."""


IDENTITY_COLUMNS: Final = (
    Column("ID", lambda r: str(r["id"])),
    Column("LABELS", lambda r: short_labels(r["labels"])),
    Column("ALL LABELS", lambda r: ",".join(r["labels"]), wide=True),
)


@identity.command("list")
@label_option
@click.option("--reserved/--no-reserved", default=True, help="With the fixed ones (host, world, ...)?")
@socket_option("agent")
@output_option
def identity_list(agent: Local, labels: tuple[str, ...], reserved: bool, output: str) -> None:
    """List all identities of the cluster."""
    rows = [r for r in agent.get("identities") if match.labels(r["labels"], labels) and (reserved or not _reserved(r))]
    listing(rows, IDENTITY_COLUMNS, output, "No such identities.")


def _reserved(r: Row) -> bool:
    return any(label.startswith("reserved:") for label in r["labels"])


@identity.command("get")
@click.argument("name", metavar="NUMBER|NAME", shell_complete=match.completer("identities", match.identity_names))
@socket_option("agent")
@_get_output
def identity_get(agent: Local, name: str, output: str) -> None:
    """Show an identity by its number, or a fixed one by its name: labels, pods of this node, addresses."""
    row = match.one(agent.get("identities"), name, "identity", match.identity_names)
    pods = [_pod(e) for e in agent.get("endpoints") if e["identity"] == row["id"]]
    addresses = [r["prefix"] for r in agent.get("ipcache") if r["identity"] == row["id"]]
    if output == "json":
        dump(row | {"endpoints": pods, "prefixes": addresses})
        return
    fields(
        [
            ("Identity", str(row["id"])),
            ("Labels", _lines(row["labels"])),
            ("Pods here", _lines(pods)),
            ("Addresses", _lines(_some(addresses))),
        ]
    )


def _some(items: list[str], most: int = 50) -> list[str]:
    return items if len(items) <= most else [*items[:most], dim(f"and {len(items) - most} more (-o json shows all)")]


# --- addresses -------------------------------------------------------------------------------------------------------


@click.group()
def ipcache() -> None:
    """Which identity an address has."""


IPCACHE_COLUMNS: Final = (
    Column("PREFIX", lambda r: r["prefix"]),
    Column("IDENTITY", lambda r: str(r["identity"])),
    Column("LABELS", lambda r: short_labels(r["labels"])),
    Column("THROUGH", lambda r: r["tunnel"]),
    Column("FLAGS", lambda r: ",".join(r["flags"]), wide=True),
)


def _prefix(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
    try:
        return ipaddress.ip_network(value, strict=False) if value else None
    except ValueError:
        raise click.BadParameter(f"{value!r} is no IP address or network") from None


@ipcache.command("list")
@click.option("--identity", type=int, help="Only with this identity.")
@label_option
@click.option("--within", metavar="CIDR", callback=_prefix, help="Only addresses in this network.")
@click.option("--through", metavar="IP", default="", help="Only those reached through a node's tunnel address.")
@socket_option("agent")
@output_option
def ipcache_list(
    *, agent: Local, identity: int | None, labels: tuple[str, ...], within: Any, through: str, output: str
) -> None:
    """List all addresses with their identities, as wanted in the kernel."""
    known = {r["id"]: r["labels"] for r in agent.get("identities")}
    rows = [r | {"labels": known.get(r["identity"], [])} for r in agent.get("ipcache")]
    rows = [
        r
        for r in rows
        if (identity is None or r["identity"] == identity)
        and match.labels(r["labels"], labels)
        and (within is None or match.within(r["prefix"], within))
        and (not through or r["tunnel"] == through)
    ]
    rows.sort(key=lambda r: match.prefix_order(r["prefix"]))
    listing(rows, IPCACHE_COLUMNS, output, "No such addresses.")


@ipcache.command("get")
@click.argument("address")
@socket_option("agent")
@_get_output
def ipcache_get(agent: Local, address: str, output: str) -> None:
    """Show which identity ADDRESS has and why: the longest prefix that contains it counts."""
    found = agent.get("ipcache", address)
    if output == "json":
        dump(found)
        return
    answer, matches = found["answer"], found["matches"]
    many = (
        f"the longest of the {len(matches)} prefixes that contain it" if len(matches) > 1 else "the only prefix with it"
    )
    because = f"{answer['prefix']} is {many}"
    fields(
        [
            ("Address", found["address"]),
            ("Identity", f"{answer['identity']}  {short_labels(answer['labels'])}"),
            ("Because", because if matches else "no known prefix contains it, so it is the world"),
            ("Claimed by", _lines(answer.get("claims", []))),
            ("Through", f"the tunnel to {answer['tunnel']}" if answer["tunnel"] else ""),
        ]
    )
    if len(matches) > 1:
        click.echo()
        listing(matches, IPCACHE_COLUMNS, "wide", "")


# --- policies --------------------------------------------------------------------------------------------------------


@click.group()
def policy() -> None:
    """Policies: whom they select, their rules, what is wrong with them."""


POLICY_COLUMNS: Final = (
    Column("KIND", lambda r: r["kind"]),
    Column("NAMESPACE", lambda r: r["namespace"]),
    Column("NAME", lambda r: r["name"]),
    Column("RULES", lambda r: str(r["rules"])),
    Column("PODS HERE", lambda r: str(len(r["selects"]))),
    Column("PROBLEMS", lambda r: bad("; ".join(r["problems"])) if r["problems"] else ""),
    Column("SELECTS", lambda r: ", ".join(r["selects"]), wide=True),
)


@policy.command("list")
@namespace_option
@click.option("--pod", default="", metavar="[NAMESPACE/]POD", help="Only those that select this pod of this node.")
@click.option("--problems", is_flag=True, help="Only those that something is wrong with.")
@socket_option("agent")
@output_option
def policy_list(agent: Local, namespace: str, pod: str, problems: bool, output: str) -> None:
    """List all policies of the cluster."""
    rows = [
        r
        for r in agent.get("policies")
        if (not namespace or r["namespace"] == namespace)
        and (not pod or any(pod in (p, p.rpartition("/")[2]) for p in r["selects"]))
        and (not problems or r["problems"])
    ]
    rows.sort(key=lambda r: (r["namespace"], r["kind"], r["name"]))
    listing(rows, POLICY_COLUMNS, output, "No such policies.")


@policy.command("get")
@click.argument(
    "name", metavar="[KIND/][NAMESPACE/]NAME", shell_complete=match.completer("policies", lambda r: [r["name"]])
)
@socket_option("agent")
@_get_output
def policy_get(agent: Local, name: str, output: str) -> None:
    """Show a policy: which pods of this node it selects, its rules as they were understood, its problems."""
    found = match.one(agent.get("policies"), name, "policy", match.policy_names)
    row = agent.get("policies", found["kind"], found["namespace"] or "-", found["name"])
    if output == "json":
        dump(row)
        return
    fields(
        [
            ("Policy", f"{row['kind']} {row['namespace']}/{row['name']}".replace(" /", " ")),
            ("Selects here", _lines(_some(row["selects"])) or dim("no pod of this node")),
            ("Problems", _lines(bad(p) for p in row["problems"])),
        ]
    )
    for spec in row["specs"]:
        click.echo()
        fields([("Pods", spec["subject"]), ("Denied by default", ", ".join(spec["default_deny"]) or "nothing")])
        if spec["rules"]:
            table(
                ["RULE", "VERDICT", "PEERS", "PORTS"],
                [
                    [
                        r["path"],
                        good("allow") if r["verdict"] == "allow" else bad(r["verdict"]),
                        " or ".join(r["peers"]) or "nobody",
                        ", ".join(r["ports"]) or "none",
                    ]
                    for r in spec["rules"]
                ],
                indent="  ",
            )
