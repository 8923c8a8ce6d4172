"""`fimbria service list|get`: where the addresses and ports of Services lead, as this node has them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import click

from fimbria.cli import match
from fimbria.cli.local import Local, Refused, socket_option
from fimbria.cli.show import Column, Row, bad, dim, dump, fields, good, listing, output_option, table, warn

KINDS: Final = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalIP", "HostPort", "LocalRedirect")
# Whom a frontend is for. Most are for everybody; those of externalTrafficPolicy Local lead outsiders elsewhere.
SCOPES: Final = {"all": "", "inside": "pods and nodes", "outside": "the outside"}
SHOWN: Final = 50


@click.group()
def service() -> None:
    """Services: frontends and their backends."""


def _backends(r: Row) -> str:
    if r["backends"]:
        return str(len(r["backends"]))
    return bad("none") if r["frontend"] else ""


def _affinity(r: Row) -> str:
    return f"{r['affinity_seconds']} s" if r.get("affinity_seconds") else ""


def _ranges(r: Row) -> str:
    listed = ", ".join(r.get("source_ranges") or ())
    return f"{'all but' if r['source_policy'] == 'deny' else 'only'} {listed}" if listed else ""


def _warnings(r: Row) -> str:
    return warn("; ".join(r["warnings"])) if r["warnings"] else ""


COLUMNS: Final = (
    Column("SERVICE", lambda r: r["service"]),
    Column("PORT", lambda r: r["port"]),
    Column("TYPE", lambda r: r.get("type") or ""),
    Column("FRONTEND", lambda r: r["frontend"]),
    Column("PROTOCOL", lambda r: r.get("protocol") or ""),
    Column("FOR", lambda r: SCOPES.get(r.get("scope", ""), "")),
    Column("BACKENDS", _backends),
    Column("POLICY", lambda r: r.get("policy") or "", wide=True),
    Column("BALANCED", lambda r: r.get("algorithm") or "", wide=True),
    Column("FORWARDING", lambda r: r.get("forwarding") or "", wide=True),
    Column("AFFINITY", _affinity, wide=True),
    Column("CLIENTS", _ranges, wide=True),
    Column("WARNINGS", _warnings, wide=True),
    Column("ADDRESSES", lambda r: ", ".join(r["backends"]), wide=True),
)


@service.command(
    "list",
    epilog="""\b
Examples:
  fimbria service list -n shop                 frontends of a namespace
  fimbria service list --type NodePort         what this node serves at ports of its own
  fimbria service list --empty                 what is refused, because nobody serves it
  fimbria service list --warnings -o wide      what Services ask for and don't get

\b
0.0.0.0 and [::] stand for all addresses of all nodes. With externalTrafficPolicy Local a frontend is there
twice: FOR the outside it leads to this node's endpoints, for pods and nodes to all.""",
)
@click.option("-n", "--namespace", default="", help="Only this namespace.")
@click.option("--type", "kind", type=click.Choice(KINDS, case_sensitive=False), help="Only frontends of this type.")
@click.option("--empty", is_flag=True, help="Only those without backends.")
@click.option("--warnings", is_flag=True, help="Only those that ask for something they don't get.")
@socket_option("agent")
@output_option
def service_list(*, agent: Local, namespace: str, kind: str | None, empty: bool, warnings: bool, output: str) -> None:
    """List the frontends of Services with their backends."""
    rows = [
        r
        for r in agent.get("services")
        if (not namespace or r["service"].startswith(namespace + "/"))
        and (not kind or r.get("type") == kind)
        and (not empty or (r["frontend"] and not r["backends"]))
        and (not warnings or r["warnings"])
    ]
    listing(rows, COLUMNS, output, "No such services.")


@service.command(
    "get",
    epilog="""\b
Examples:
  fimbria service get shop/web                 by namespace and name
  fimbria service get 10.96.0.2:80             by an address and port that it has
  fimbria service get :30080                   by a node port

\b
STATE is what the EndpointSlices say of a backend: active ones get new connections; terminating ones only when
no active one is left. USED says whether this node sends new connections there.""",
)
@click.argument("name", shell_complete=match.completer("services", lambda r: [r["service"]]))
@socket_option("agent")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
def service_get(agent: Local, name: str, output: str) -> None:
    """Show a Service by [NAMESPACE/]NAME, or by a frontend's address, :PORT or both."""
    rows = match.some(agent.get("services"), name, "service", match.service_names, lambda r: str(r["service"]))
    found = _details(agent, rows)
    if output == "json":
        dump(found)
        return
    first = rows[0]
    fields(
        [
            ("Service", found["service"]),
            ("Type", found["type"]),
            ("Affinity", f"a client keeps its backend for {_affinity(first)}" if _affinity(first) else ""),
            ("Clients", "\n".join(dict.fromkeys(_ranges(r) for r in rows if _ranges(r)))),
            ("Health check", f"port {port} of every node" if (port := found["health_check_port"]) else ""),
            ("Warnings", "\n".join(warn(w) for w in found["warnings"])),
        ]
    )
    _frontends(found["frontends"])
    _endpoints(found["endpoints"])


def _details(agent: Local, rows: list[Row]) -> Row:
    """What is behind a Service; of a host port or redirect only what its frontends lead to is known."""
    try:
        found: Row = agent.get("services", *rows[0]["service"].split("/", 1))
        return found
    except Refused as error:
        if error.status != 404:
            raise
    warnings = list(dict.fromkeys(w for r in rows for w in r["warnings"]))
    owner = {"service": rows[0]["service"], "type": rows[0].get("type", ""), "health_check_port": 0}
    unknown = {"port": "", "node": "", "state": "active", "weight": "", "for_zones": [], "for_nodes": [], "used": True}
    backends = sorted({(b, r["protocol"]) for r in rows for b in r["backends"]})
    endpoints = [unknown | {"address": b, "protocol": protocol} for b, protocol in backends]
    return owner | {"frontends": rows, "endpoints": endpoints, "warnings": warnings}


def _frontends(rows: list[Row]) -> None:
    if not rows:
        return
    click.echo()
    head = ["FRONTEND", "PROTOCOL", "TYPE", "FOR", "POLICY", "BALANCED", "FORWARDING", "BACKENDS"]
    table(head, [_frontend(r) for r in rows], indent="  ")


def _frontend(r: Row) -> list[str]:
    silent = r["without_backends"] == "drop"
    nobody = "none: dropped, other nodes have them" if silent else "none: connections are refused"
    port = f" ({r['port']})" if r["port"] else ""
    return [
        r["frontend"] + port, r["protocol"], r["type"], SCOPES[r["scope"]] or "all", r["policy"], r["algorithm"],
        r["forwarding"], str(len(r["backends"])) if r["backends"] else bad(nobody),
    ]  # fmt: skip


def _endpoints(rows: list[Row]) -> None:
    if not rows:
        return
    click.echo()
    head = ["BACKEND", "PROTOCOL", "NODE", "STATE", "WEIGHT", "MEANT FOR", "USED"]
    shown: list[list[Any]] = [
        [e["address"] + (f" ({e['port']})" if e["port"] else ""), e["protocol"], e["node"], _state(e["state"]),
         str(e["weight"]), _meant(e), good("yes") if e["used"] else dim("no")]
        for e in rows[:SHOWN]
    ]  # fmt: skip
    table(head, shown, indent="  ")
    if len(rows) > SHOWN:
        click.echo(dim(f"  and {len(rows) - SHOWN} more (-o json shows all)"))


def _state(text: str) -> str:
    return good(text) if text == "active" else warn(text)


def _meant(e: Row) -> str:
    """Hints of the slice's controller (trafficDistribution)."""
    nodes: Iterable[str] = (f"node {n}" for n in e["for_nodes"])
    return ", ".join([*nodes, *(f"zone {z}" for z in e["for_zones"])])
