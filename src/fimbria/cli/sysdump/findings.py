"""What is unwell, out of what was collected, and the page that a person reads first. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from fimbria.cli.show import duration
from fimbria.cli.status import problems

Row = dict[str, Any]
FULL_SHARE: Final = 0.8
MOST_LISTED: Final = 200
NOT_TROUBLE: Final = frozenset({"FORWARDED", "EVENT_LOST"})


@dataclass(slots=True)
class NodeFacts:
    """Of one node: what the page shows of it. `pod` is the agent's trouble as Kubernetes sees it."""

    name: str
    version: str = ""
    kernel: str = ""
    ready: bool | None = None
    uptime: float | None = None
    endpoints: int = 0
    restarts: int = 0
    pod: str = ""
    problems: list[str] = field(default_factory=list)
    pressure: dict[str, float] = field(default_factory=dict)
    drops: dict[str, int] = field(default_factory=dict)
    plan: int = 0
    policies: dict[str, list[str]] = field(default_factory=dict)
    not_as_asked: dict[str, list[str]] = field(default_factory=dict)
    foreign: dict[str, list[str]] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)
    lost_events: int = 0
    errors: dict[str, str] = field(default_factory=dict)
    asked: bool = True

    def learn(self, name: str, value: Any) -> None:
        """From one of the node's files, if it is one that matters here. What has another shape is passed over."""
        try:
            if name == "status.json":
                self._status(value)
            elif name == "drops.json":
                self._drops(value)
            elif name == "plan.json":
                self.plan = len(value)
            elif name == "errors.json":
                self.errors |= {str(k): str(v) for k, v in value.items()}
        except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
            self.errors[name] = f"it has another shape than expected ({error})"

    def _status(self, s: Row) -> None:
        self.version, self.kernel, self.ready = s["version"], s["kernel"], bool(s["ready"])
        self.uptime, self.endpoints = s["uptime_seconds"], s["endpoints"]
        self.problems = problems(s)
        self.pressure = {n: p["used"] / p["room"] for n, p in s["pressure"].items() if p["room"]}
        self.policies, self.not_as_asked = s["policy_problems"], s["not_as_asked"]
        self.foreign, self.repaired = s["foreign_programs"], s["repaired"]

    def _drops(self, rows: Iterable[Row]) -> None:
        for r in rows:
            if r["name"] == "EVENT_LOST":
                self.lost_events += int(r["packets"])
            elif r["name"] not in NOT_TROUBLE:
                self.drops[r["name"]] = self.drops.get(r["name"], 0) + int(r["packets"])


@dataclass(slots=True)
class Facts:
    """Of the whole. `kubernetes` are findings from objects; `missing` is what couldn't be collected: file -> why."""

    title: str
    collected: str
    by: str
    server_version: str = ""
    desired: str = ""
    helm: str = ""
    nodes: dict[str, NodeFacts] = field(default_factory=dict)
    left_out: int = 0
    kubernetes: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    quick: bool = False


def findings(f: Facts) -> list[str]:
    """What is unwell, worst first, one sentence each."""
    nodes = sorted(f.nodes.values(), key=lambda n: n.name)
    found = [f"**{n.name}**: the agent's pod isn't ready: {n.pod}" for n in nodes if n.pod]
    found += [f"**{n.name}**: {problem}" for n in nodes for problem in n.problems]
    found += [f"**{n.name}**: nothing could be asked: {_first(n.errors)}" for n in nodes if n.ready is None and n.asked]
    found += f.kubernetes
    found += _versions(nodes)
    found += (
        _differing("kernel", {n.name: n.kernel for n in nodes}) if len({n.kernel for n in nodes} - {""}) > 3 else []
    )
    found += [
        f"**{n.name}**: table {name} is {share:.0%} full"
        for n in nodes for name, share in n.pressure.items() if share >= FULL_SHARE
    ]  # fmt: skip
    found += [f"**{n.name}**: the kernel isn't as it should be: {n.plan} changes in plan.json" for n in nodes if n.plan]
    found += [f"policy {name}: {'; '.join(words)}" for name, words in sorted(_policies(nodes).items())]
    found += [f"{who}: {'; '.join(words)}" for n in nodes for who, words in sorted(n.not_as_asked.items())]
    found += [f"**{n.name}**: the agent has restarted {n.restarts} times" for n in nodes if n.restarts > 2]
    found += [
        f"**{n.name}**: programs of others at {hook}: {', '.join(names)}"
        for n in nodes for hook, names in sorted(n.foreign.items())
    ]  # fmt: skip
    found += [
        f"**{n.name}**: somebody changed what is ours, and it was repaired: {n.repaired}" for n in nodes if n.repaired
    ]
    found += [f"**{n.name}**: {n.lost_events} events were lost" for n in nodes if n.lost_events]
    return list(dict.fromkeys(found))


def _first(errors: Mapping[str, str]) -> str:
    return errors.get("the agent") or next(iter(errors.values()), "no answer")


def _versions(nodes: Sequence[NodeFacts]) -> list[str]:
    return _differing("version of the agent", {n.name: n.version for n in nodes})


def _differing(what: str, values: Mapping[str, str]) -> list[str]:
    counted = Counter(v for v in values.values() if v)
    if len(counted) < 2:
        return []
    parts = []
    for value, number in counted.most_common():
        names = [n for n, v in values.items() if v == value]
        parts.append(f"{value} on {number} ({', '.join(names[:5])}{', ...' if number > 5 else ''})")
    return [f"the {what} differs: {'; '.join(parts)}"]


def _policies(nodes: Iterable[NodeFacts]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for n in nodes:
        for name, words in n.policies.items():
            found.setdefault(name, [])
            found[name] += [w for w in words if w not in found[name]]
    return found


def page(f: Facts, names: Iterable[str]) -> str:
    """README.md: what is unwell, nodes, drops, what is missing, and where to find what."""
    parts = [f"# {f.title}\n", _head(f), _unwell(findings(f)), _nodes(f), _drops(f), _missing(f), _contents(names)]
    return "\n".join(p for p in parts if p)


def _head(f: Facts) -> str:
    rows = [("Collected", f.collected), ("By", f.by), ("Kubernetes", f.server_version), ("Agents", f.desired),
            ("Helm", f.helm), ("Versions", _counted(n.version for n in f.nodes.values())),
            ("Kernels", _counted(n.kernel for n in f.nodes.values()))]  # fmt: skip
    lines = [f"- {name}: {value}" for name, value in rows if value]
    if f.left_out:
        lines.append(f"- **{f.left_out} nodes were left out**; `--max-nodes` and `--nodes` choose")
    if f.quick:
        lines.append("- collected with `--quick`: no tables, maps and logs of before a restart")
    return "\n".join(lines) + "\n"


def _counted(values: Iterable[str]) -> str:
    return ", ".join(f"{v} ({n})" for v, n in Counter(v for v in values if v).most_common(6))


def _unwell(found: Sequence[str]) -> str:
    if not found:
        return "## Unwell\n\nNothing that this looks for.\n"
    more = [f"- ... and {len(found) - MOST_LISTED} more"] if len(found) > MOST_LISTED else []
    return "\n".join(["## Unwell\n", *(f"- {_line(x)}" for x in found[:MOST_LISTED]), *more]) + "\n"


def _nodes(f: Facts) -> str:
    if not f.nodes:
        return ""
    head = ["## Nodes\n", "| node | agent | version | kernel | up | pods | fullest table | most drops | restarts |",
            "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    order = sorted(f.nodes.values(), key=lambda n: (n.ready is True and not n.problems and not n.pod, n.name))
    rows = [_node(n) for n in order[:MOST_LISTED]]
    more = [f"\n... and {len(order) - MOST_LISTED} more."] if len(order) > MOST_LISTED else []
    return "\n".join([*head, *rows, *more]) + "\n"


def _node(n: NodeFacts) -> str:
    state = {True: "not well" if n.problems else "ready", False: "**not ready**", None: "**no answer**"}[n.ready]
    if not n.asked:
        state = "not asked"
    fullest = max(n.pressure.items(), key=lambda p: p[1], default=None)
    most = max(n.drops.items(), key=lambda p: p[1], default=None)
    cells = [n.name, state, n.version, n.kernel, duration(n.uptime) if n.uptime is not None else "",
             str(n.endpoints), f"{fullest[0]} {fullest[1]:.0%}" if fullest else "",
             f"{most[0]} {most[1]}" if most else "", str(n.restarts)]  # fmt: skip
    return "| " + " | ".join(_line(c) or " " for c in cells) + " |"


def _drops(f: Facts) -> str:
    sums: Counter[str] = Counter()
    nodes: dict[str, Counter[str]] = {}
    for n in f.nodes.values():
        sums.update(n.drops)
        for reason, packets in n.drops.items():
            nodes.setdefault(reason, Counter())[n.name] += packets
    if not sums:
        return ""
    lines = ["## Drops since the maps were made\n", "| reason | packets | most on |", "|---|---|---|"]
    for reason, packets in sums.most_common():
        where = ", ".join(f"{name} {count}" for name, count in nodes[reason].most_common(3))
        lines.append(f"| {_line(reason)} | {packets} | {_line(where)} |")
    return (
        "\n".join([*lines, "\n`nodes/NAME/flows/dropped.ndjson` has the latest ones with the rules behind them."])
        + "\n"
    )


def _missing(f: Facts) -> str:
    lines = [f"- `{name}`: {_line(why)}" for name, why in f.missing.items()]
    lines += [f"- `nodes/{n.name}/{name}`: {_line(why)}" for n in f.nodes.values() for name, why in n.errors.items()]
    if not lines:
        return ""
    more = [f"- ... and {len(lines) - MOST_LISTED} more, in errors.json"] if len(lines) > MOST_LISTED else []
    return "\n".join(["## What couldn't be collected, and why\n", *lines[:MOST_LISTED], *more]) + "\n"


CONTENTS: Final = (
    ("nodes/NAME/status.json", "what the agent says of itself"),
    ("nodes/NAME/endpoints.json, endpoints/", "its pods, their identities, what their policies allow by which rule"),
    ("nodes/NAME/{identities,ipcache,services,policies,nodes}.json", "what it knows of the cluster"),
    ("nodes/NAME/plan.json", "what it would change in the kernel; empty is good"),
    ("nodes/NAME/maps.json, maps/", "how full the datapath's maps are, and what is in them"),
    ("nodes/NAME/flows/dropped.ndjson", "the latest drops"),
    ("nodes/NAME/metrics.txt, drops.json", "counters"),
    ("nodes/NAME/settings.json, process.txt", "how the agent was started, its memory"),
    ("nodes/NAME/kernel/, network/, bpf/, cni/", "the machine: settings, devices, routes, programs, CNI configuration"),
    ("nodes/NAME/journal/", "what the agent has written down"),
    ("nodes/NAME/logs/", "logs of its containers, also of before their last restart"),
    ("operator/", "the operator's logs"),
    ("kubernetes/", "objects of the API, without managed fields; Secrets are never asked for"),
    ("errors.json", "what couldn't be collected"),
)  # fmt: skip


def _contents(names: Iterable[str]) -> str:
    there = {n.partition("/")[0] for n in names}
    rows = [f"| `{path}` | {text} |" for path, text in CONTENTS if path.partition("/")[0].partition(",")[0] in there]
    note = "What looked like a secret was replaced by `<redacted>`; look through before you pass it on.\n"
    return "\n".join(["## What is where\n", "| file | has |", "|---|---|", *rows, "", note]) if rows else note


def _line(text: str) -> str:
    """Within a list or a table: no new lines, no cells of its own."""
    return " ".join(str(text).split()).replace("|", "\\|")
