"""Which rows a name or a filter means. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import click

Row = dict[str, Any]
Names = Callable[[Row], Iterable[str]]
SHORTEST_ID: Final = 6  # characters of a container id that are taken for one


class NotFound(click.ClickException):
    """No row, or too many, go by a name; exit status 1."""


def one(rows: Sequence[Row], name: str, what: str, names: Names) -> Row:
    """The one row that goes by a name. Raises NotFound, with the candidates, for none and for several."""
    found = [r for r in rows if _same(name, names(r))]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(sorted(next(iter(names(r))) for r in found))
        raise NotFound(f"{name!r} could be any of {several}; say which.")
    raise _missing(rows, name, what, names)


def some(rows: Sequence[Row], name: str, what: str, names: Names, group: Callable[[Row], str]) -> list[Row]:
    """All rows that go by a name, if they are of one group. Raises NotFound."""
    found = [r for r in rows if _same(name, names(r))]
    groups = sorted({group(r) for r in found})
    if len(groups) == 1:
        return found
    if groups:
        raise NotFound(f"{name!r} could be any of {', '.join(groups)}; say which.")
    raise _missing(rows, name, what, names)


def _missing(rows: Sequence[Row], name: str, what: str, names: Names) -> NotFound:
    import difflib  # late: only a mistake is worth its 20 ms

    known = sorted({next(iter(names(r))) for r in rows})
    close = difflib.get_close_matches(name, {n for r in rows for n in names(r)}, n=1)
    if close:
        return NotFound(f"There is no {what} {name!r}. Did you mean {close[0]!r}?")
    if not known:
        return NotFound(f"There is no {what} {name!r}; there are none at all.")
    shown = ", ".join(known[:8]) + (f" and {len(known) - 8} more" if len(known) > 8 else "")
    return NotFound(f"There is no {what} {name!r}; there are {shown}.")


def _same(name: str, names: Iterable[str]) -> bool:
    address = _address(name)
    return any(name == n or (address is not None and address == _address(n)) for n in names)


def _address(text: str) -> Any:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def node_names(r: Row) -> list[str]:
    """Its name and its addresses."""
    return [r["name"], *r["addresses"], *r["routers"]]


def pod_names(r: Row) -> list[str]:
    """What people would type for an endpoint."""
    return [r["pod"], f"{r['namespace']}/{r['pod']}"]


def endpoint_names(r: Row) -> list[str]:
    """namespace/pod, pod, number, addresses, and the container id or its beginning as runtimes show it."""
    ids = [r["container_id"][:n] for n in range(SHORTEST_ID, len(r["container_id"]) + 1)]
    return [f"{r['namespace']}/{r['pod']}", r["pod"], str(r["id"]), r["ipv4"], r["ipv6"], r["interface"], *ids]


def identity_names(r: Row) -> list[str]:
    """Its number; a fixed one's name."""
    return [str(r["id"]), *(lb.removeprefix("reserved:") for lb in r["labels"][:1] if lb.startswith("reserved:"))]


def service_names(r: Row) -> list[str]:
    """namespace/name, name, address:port, address, :port."""
    address, _, port = r["frontend"].rpartition(":")
    return [r["service"], r["service"].rpartition("/")[2], r["frontend"], address.strip("[]"), f":{port}"]


def policy_names(r: Row) -> list[str]:
    """Kind/namespace/name and its shorter forms."""
    long = f"{r['namespace']}/{r['name']}" if r["namespace"] else r["name"]
    return [f"{r['kind']}/{long}", long, r["name"], f"{r['kind']}/{r['name']}", f"{r['kind']} {long}"]


def completer(table: str, names: Names) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Completes names from one of the agent's tables. Silent if no agent answers: a shell is no place for errors."""

    def complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
        from fimbria.cli.local import Local

        try:
            rows = (ctx.params.get("agent") or Local("agent")).get(table)
        except (click.ClickException, ValueError):
            return []
        return sorted({n for r in rows for n in names(r) if n and n.startswith(incomplete)})

    return complete


def labels(have: Iterable[str], wanted: Iterable[str]) -> bool:
    """Whether each of `wanted` (`key`, `key=value`, with or without `source:`) is among the labels."""
    texts = set()
    for label in have:
        bare = label.partition(":")[2] or label
        texts |= {label, bare, label.partition("=")[0], bare.partition("=")[0]}
    return all(w in texts for w in wanted)


def within(prefix: str, network: Any) -> bool:
    """Whether a prefix lies in a network."""
    mine = ipaddress.ip_network(prefix)
    return mine.version == network.version and mine.subnet_of(network)


def prefix_order(prefix: str) -> tuple[int, int, int]:
    """IPv4 first, then by address, wider before narrower."""
    network = ipaddress.ip_network(prefix)
    return network.version, int(network.network_address), network.prefixlen
