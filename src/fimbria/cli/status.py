"""`fimbria status`: is this node's agent well, and what is it doing?"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, Final, NoReturn

import click

from fimbria.cli.local import Local, Refused, Unreachable, socket_option
from fimbria.cli.show import Row, bad, count, dim, dump, duration, fields, good, warn

POLL: Final = 0.3
MOST_FAILURES: Final = 5
NEARLY_FULL: Final = 0.8
LEARNED: Final = ("conntrack", "nat", "nat ports")


@click.command(
    epilog="""\b
Examples:
  fimbria status                          on a node: that node's agent; elsewhere: the whole cluster
  fimbria status --cluster                the whole cluster, also from a node
  fimbria status --wait --timeout 60      until all is ready, saying what it waits for
  fimbria status --node worker1           what that node's agent says
  fimbria status -o json | jq .ready

\b
The cluster is looked at if --cluster or --kubeconfig says so, and where there is no Fimbria on this
machine, but a kubeconfig as kubectl finds it.

\b
Exit status: 0 ready and nothing fails; 1 not ready, or something fails; 2 no agent, or no API, answers."""
)
@socket_option("agent")
@click.option("--cluster", "whole", is_flag=True, help="The whole cluster: all agents, the operator, the nodes.")
@click.option("--wait", is_flag=True, help="Wait until all is ready and well.")
@click.option(
    "--timeout", default=300.0, show_default=True, metavar="SECONDS", help="How long to wait.", type=click.FloatRange(0)
)
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Also rows by target, devices and programs of others; of a cluster, every agent.",
)
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table")
def status(*, agent: Local, whole: bool, wait: bool, timeout: float, verbose: bool, output: str) -> None:
    """Is this node's agent, or the whole cluster, well, and what is it doing?"""
    where = click.get_current_context().params
    if whole or where["kubeconfig"] or where["context"] or _elsewhere(agent):
        _whole_cluster(where["kubeconfig"], where["context"], timeout if wait else None, verbose=verbose, output=output)
    found = _wait(agent, timeout) if wait else agent.get("status")
    observer = _observer(agent)
    troubles = problems(found)
    if output == "json":
        dump(found | {"observer": observer, "problems": troubles})
    else:
        show(found, observer, verbose)
    sys.exit(1 if troubles else 0)


def _elsewhere(agent: Local) -> bool:
    """Whether this is no node of ours, but a place from which a cluster is worked on."""
    home = Path(os.environ.get("HOME", "/root")) / ".kube" / "config"
    return not agent.path.parent.exists() and (bool(os.environ.get("KUBECONFIG")) or home.exists())


def _whole_cluster(
    kubeconfig: str | None, context: str, patience: float | None, *, verbose: bool, output: str
) -> NoReturn:
    from fimbria.cli import cluster_status  # late: who asks this node needs no Kubernetes
    from fimbria.cli.cluster import configuration, run

    view = run(cluster_status.watch(configuration(kubeconfig, context), patience))
    if output == "json":
        dump(cluster_status.as_json(view))
    else:
        cluster_status.show(view, verbose)
    sys.exit(1 if cluster_status.problems(view) else 0)


def _wait(agent: Local, timeout: float) -> Row:
    """The first status without problems, or the last one in time. Raises Unreachable if there was none at the end."""
    deadline = time.monotonic() + timeout
    said = ""
    while True:
        late = time.monotonic() >= deadline
        try:
            found: Row = agent.get("status")
            missing = "; ".join(problems(found))
            if late or not missing:
                return found
        except (Unreachable, Refused) as error:
            if late:
                raise
            missing = error.message.splitlines()[0]
        if missing != said:
            click.echo(f"waiting: {missing}", err=True)
            said = missing
        time.sleep(POLL)


def _observer(agent: Local) -> Row | None:
    """The observer's own status, if it runs beside the agent."""
    try:
        found: Row = Local("observer", agent.path.with_name("observer.sock")).get("status")
        return found
    except (Unreachable, Refused):
        return None


def problems(s: Row) -> list[str]:
    """What keeps a node from being well, one sentence each."""
    found = [] if s["ready"] else ["the agent is not ready: " + _waits_for(s)]
    api = s["api_server"]
    if not api["connected"]:
        kinds = ", ".join(sorted(api["errors"])[:3])
        reason = next((str(e) for e in api["errors"].values() if e), "no connection yet")
        found.append(f"the API server {api['server']} can't be followed ({kinds}): {reason}")
    if s["node_problem"]:
        found.append(s["node_problem"])
    for target, rows in s["failures"].items():
        found.append(f"{count(len(rows), 'row')} of {target} can't be written: {rows[0]}")
    return found


def _waits_for(s: Row) -> str:
    if not s["pod_cidrs"]:
        return "no pod addresses yet; the operator hands them out (is it running?)"
    if s["devices"] is None:
        return "its devices aren't set up yet"
    return "the kernel isn't as it should be yet"


def show(s: Row, observer: Row | None, verbose: bool) -> None:
    """For people."""
    fields(_lines(s, observer, verbose))


def _lines(s: Row, observer: Row | None, verbose: bool) -> list[tuple[str, str]]:
    troubles = problems(s)
    lines = [
        ("Node", f"{s['node']}  {dim('kernel ' + s.get('kernel', '?') + ', fimbria ' + s.get('version', '?'))}"),
        ("Agent", _agent(s, troubles)),
        ("API server", _api_server(s["api_server"])),
        ("Routing", _routing(s)),
        ("Devices", _devices(s["devices"])),
        ("Pod CIDRs", ", ".join(s["pod_cidrs"])),
        ("Addresses", _addresses(s["ipam"])),
        ("Cluster", _cluster(s)),
        ("Unmanaged", _unmanaged(s.get("unmanaged", []))),
        ("Datapath", _datapath(s)),
        ("Tables", _tables(s["pressure"])),
        ("Repaired", warn(", ".join(f"{k} {n}" for k, n in s["repaired"].items())) if s["repaired"] else ""),
        ("Observer", _observed(observer)),
        ("Failures", "\n".join(_failures(s["failures"]))),
        ("Policies", "\n".join(warn(f"{p}: {'; '.join(x)}") for p, x in s["policy_problems"].items())),
        ("Not as asked", "\n".join(warn(f"{who}: {'; '.join(x)}") for who, x in s["not_as_asked"].items())),
        ("Programs of others", _foreign(s["foreign_programs"])),
    ]
    return lines + (_more(s) if verbose else [])


def _api_server(a: Row) -> str:
    return f"{good('connected') if a['connected'] else bad('lost')}  {a['server']}"


def _addresses(ipam: dict[str, Row]) -> str:
    return "; ".join(f"{family}: {u['used']} of {u['capacity']} used" for family, u in ipam.items() if u["capacity"])


def _observed(observer: Row | None) -> str:
    return f"{observer['seen_flows']} flows seen" if observer else warn("not running: `fimbria monitor` shows nothing")


def _agent(s: Row, troubles: list[str]) -> str:
    since = dim(f"up {duration(s['uptime_seconds'])}, ready after {s['ready_after_seconds']:.1f} s")
    if not troubles:
        return f"{good('ready')}  {since}"
    state = warn("ready, but not well") if s["ready"] else bad("not ready")
    return "\n".join([state, *(bad(t) for t in troubles)])


def _routing(s: Row) -> str:
    extra = [f"programs attached by {s['attach']}"] if s["attach"] else []
    extra += ["redirected past the host's stack"] if s["fast_path"] else []
    extra += ["masquerading"] if s["masquerade"] else []
    return f"{s['routing']}  {dim(', '.join(extra))}"


def _devices(d: dict[str, Any] | None) -> str:
    if d is None:
        return warn("not set up yet")
    return f"MTU {d['mtu']}, for pods {d['pod_mtu']}"


def _cluster(s: Row) -> str:
    return ", ".join(
        (
            count(s["nodes"], "node"),
            count(s["endpoints"], "pod") + " here",
            count(s["identities"], "identity", "identities"),
            count(s["services"], "service"),
            count(s["policies"], "policy", "policies"),
        )
    )


def _unmanaged(pods: list[str]) -> str:
    if not pods:
        return ""
    shown = ", ".join(pods[:MOST_FAILURES]) + (", ..." if len(pods) > MOST_FAILURES else "")
    return warn(f"{count(len(pods), 'pod')} with another plugin's network, no policy applies; restart them: {shown}")


def _datapath(s: Row) -> str:
    failing = sum(len(rows) for rows in s["failures"].values())
    return f"{sum(s['rows'].values())} rows, " + (bad(f"{failing} failing") if failing else "none failing")


def _tables(pressure: dict[str, Row]) -> str:
    """Those that traffic fills, and any other that is nearly full."""
    found = []
    for name, p in pressure.items():
        share = p["used"] / p["room"]
        if share >= NEARLY_FULL:
            found.append(bad(f"{name} {share:.0%} of {p['room']}" + (f" ({p['fullest']})" if p.get("fullest") else "")))
        elif name in LEARNED:
            found.append(f"{name} {share:.0%} of {p['room']}")
    return ", ".join(found)


def _failures(failures: dict[str, list[str]]) -> list[str]:
    lines = []
    for target, rows in failures.items():
        lines += [bad(f"{target}: {row}") for row in rows[:MOST_FAILURES]]
        if len(rows) > MOST_FAILURES:
            lines.append(bad(f"{target}: and {len(rows) - MOST_FAILURES} more"))
    return lines


def _foreign(programs: dict[str, list[str]]) -> str:
    return "\n".join(warn(f"{hook}: {', '.join(names)}") for hook, names in programs.items())


def _more(s: Row) -> list[tuple[str, str]]:
    d = s["devices"] or {}
    devices = ", ".join(f"{name} {value}" for name, value in d.items() if value)
    return [
        ("Rows", "\n".join(f"{name:<16}{n:>8}" for name, n in sorted(s["rows"].items()))),
        ("Device numbers", devices),
        ("Process", f"pid {s.get('pid', '?')}"),
        ("API errors", "\n".join(f"{k}: {e}" for k, e in s["api_server"]["errors"].items())),
    ]
