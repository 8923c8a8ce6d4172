"""`fimbria map`, `plan` and `metrics`: what is in the kernel, and what the agent would change there."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Final

import click

from fimbria.cli.local import Local, Refused, socket_option
from fimbria.cli.match import completer
from fimbria.cli.show import Column, Row, bad, count, dump, listing, output_option, table, warn

# enum bpf_map_type in include/uapi/linux/bpf.h
MAP_TYPES: Final = {
    1: "hash", 2: "array", 3: "prog_array", 4: "perf_event_array", 5: "percpu_hash", 6: "percpu_array", 9: "lru_hash",
    10: "lru_percpu_hash", 11: "lpm_trie", 12: "array_of_maps", 13: "hash_of_maps", 19: "cgroup_storage",
    24: "sk_storage", 27: "ringbuf",
}  # fmt: skip
NEARLY_FULL: Final = 0.9


@click.group("map")
def map_() -> None:
    """The datapath's maps, as they are in the kernel."""


def _fill(r: Row) -> str:
    if fill(r) is None:
        return ""
    share = (fill(r) or 0) / r["max_entries"]
    text = f"{share:.0%}" if share == 0 or share >= 0.01 else "<1%"
    return bad(text) if share >= NEARLY_FULL else text


def fill(r: Row) -> int | None:
    """How many rows a map has; None where that makes no sense (ring buffers, arrays)."""
    found = r["wanted"] if r["wanted"] is not None else r["entries"]
    return int(found) if found is not None else None


MAP_COLUMNS: Final = (
    Column("NAME", lambda r: r["name"]),
    Column("TYPE", lambda r: MAP_TYPES.get(r["type"], str(r["type"]))),
    Column("ROWS", lambda r: "" if fill(r) is None else str(fill(r))),
    Column("MAX", lambda r: str(r["max_entries"])),
    Column("FILL", _fill),
    Column("KERNEL ID", lambda r: str(r["id"]), wide=True),
    Column("KEY", lambda r: f"{r['key_size']} B", wide=True),
    Column("VALUE", lambda r: f"{r['value_size']} B", wide=True),
)


@map_.command("list")
@socket_option("agent")
@output_option
def map_list(agent: Local, output: str) -> None:
    """List the maps with how full they are."""
    rows = agent.get("maps")
    if output == "json":
        rows = [r | {"type_name": MAP_TYPES.get(r["type"], str(r["type"])), "rows": fill(r)} for r in rows]
    listing(rows, MAP_COLUMNS, output, "No maps yet.")


@map_.command("dump")
@click.argument("name", shell_complete=completer("maps", lambda r: [r["name"]]))
@click.option("-g", "--grep", "text", default="", metavar="TEXT", help="Only rows that contain this text.")
@click.option("--most", type=click.IntRange(1), metavar="N", help="Read as many rows as that.  [default: all]")
@socket_option("agent")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
def map_dump(agent: Local, name: str, text: str, most: int | None, output: str) -> None:
    """Show every row of a map, read from the kernel and decoded."""
    rows = agent.get("maps", name, **({"most": str(most)} if most else {}))
    if text:
        rows = [r for r in rows if text in " ".join(f"{k}={v}" for k, v in _flat(r).items())]
    if output == "json":
        dump(rows)
        return
    if not rows:
        click.echo(f"Map {name} has no such rows." if text else f"Map {name} is empty.", err=True)
        return
    flat = [_flat(r) for r in rows]
    heads = list(dict.fromkeys(h for r in flat for h in r))
    table([h.upper() for h in heads], [[str(r.get(h, "")) for h in heads] for r in flat])


def _flat(row: Row, prefix: str = "") -> Row:
    """Nested fields by their own names; `key.` and `value.` are left out where that is clear."""
    found: Row = {}
    for name, value in row.items():
        if isinstance(value, dict):
            inner = _flat(value)
            found |= {(k if k not in found else f"{name}.{k}"): v for k, v in inner.items()}
        else:
            found[prefix + name] = value
    return found


ACTIONS: Final = {"write": warn, "delete": bad}


@click.command(
    epilog="""\b
Exit status: 0 nothing to change; 3 something to change; 2 no agent answers."""
)
@socket_option("agent")
@output_option
def plan(agent: Local, output: str) -> None:
    """What the agent would change in the kernel now: empty, unless someone else changed something."""
    changes = agent.get("plan")
    if output == "json":
        dump(changes)
    elif not changes:
        click.echo("Nothing to change: the kernel is as it should be.")
    else:
        head = ["ACTION", "TARGET", "KEY"] + (["ROW"] if output == "wide" else [])
        rows = [
            [ACTIONS.get(c["action"], str)(c["action"]), c["target"], c["key"]]
            + ([c["row"]] if output == "wide" else [])
            for c in changes
        ]
        table(head, rows)
        sums = Counter(c["action"] for c in changes)
        said = ", ".join(f"{n} to {action}" for action, n in sorted(sums.items()))
        click.echo(f"\n{count(len(changes), 'change')}: {said}.")
    sys.exit(3 if changes else 0)


@click.command()
@click.argument("names", nargs=-1)
@socket_option("agent")
def metrics(agent: Local, names: tuple[str, ...]) -> None:
    """The agent's metrics in Prometheus' text format; with NAMES only those that contain one of them."""
    text = agent.text("metrics")
    if not names:
        click.echo(text, nl=False)
        return
    lines = [ln for ln in text.splitlines() if any(n in ln for n in names)]
    if not any(not ln.startswith("#") for ln in lines):
        raise Refused(f"No metric's name contains {' or '.join(names)}.", 404)
    click.echo("\n".join(lines))
