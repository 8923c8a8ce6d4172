"""The command line of the bed."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tests.cluster.bed import processes, verdict
from tests.cluster.bed.cluster import Cluster, clusters
from tests.cluster.bed.errors import BedError
from tests.cluster.bed.layout import DEFAULT_NAME, STARTUP_TAINT
from tests.cluster.bed.progress import say, step

EXAMPLES = """examples:
  python -m tests.cluster.bed up --nodes 2
  python -m tests.cluster.bed exec control -- kubectl get nodes
  python -m tests.cluster.bed exec node1 -- ctr -n k8s.io containers ls
  python -m tests.cluster.bed exec world -- curl http://10.99.0.11:30080
  python -m tests.cluster.bed node reboot node2
  python -m tests.cluster.bed logs node1 kubelet
"""


USE = """
The cluster runs. In the folder of this repository, with its Python:
  {bed} exec control -- kubectl get pods -A -o wide     helm and e2e.test alike
  {bed} exec node1 -- ip route                          in a node's namespaces
  {bed} exec world -- curl http://10.99.0.11:30080      from outside the cluster
  {bed} install                                         this tree's Fimbria again, after a change
  {bed} node stop|start|reboot node2, node add, api stop|start, logs node1 kubelet
  {bed} down                                            leaves nothing"""


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    # what follows the first "--" is a command with options of its own; --name may stand anywhere before
    end = words.index("--") if "--" in words else len(words)
    named, rest = _name_parser().parse_known_args(words[:end])
    options = _parser().parse_args(rest, named)
    options.command = words[end + 1 :]
    try:
        return int(options.run(options) or 0)
    except BedError as error:
        say(str(error))
        return 1


def _name_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--name", default=DEFAULT_NAME, help=f"the cluster's name ({DEFAULT_NAME})")
    return parser


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m tests.cluster.bed",
        description="A real Kubernetes on this machine.",
        parents=[_name_parser()],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help)
        made.set_defaults(run=run)
        return made

    up = command("up", _up, "bring up what isn't up yet")
    up.add_argument("--nodes", type=int, default=2)
    up.add_argument("--install", action="store_true", help="install Fimbria and DNS as well, as `install` does")
    up.add_argument("--no-taint", action="store_true", help=f"nodes register without the taint {STARTUP_TAINT}")
    command("install", _install, "install or upgrade Fimbria by its chart, and the cluster's DNS")
    command("test", _test, "run all tests of a real cluster and upstream's conformance; print a table")
    command("down", _down, "end and remove everything")
    inside = command("exec", _exec, "run a command in control (kubectl, helm), world or a node")
    inside.add_argument("member")
    node = command("node", _node, "stop, start or reboot a node; add one; remove one")
    node.add_argument("action", choices=["stop", "start", "reboot", "add", "remove"])
    node.add_argument("node", nargs="?", default="")
    api = command("api", _api, "stop or start the API server; etcd goes on")
    api.add_argument("action", choices=["stop", "start"])
    logs = command("logs", _logs, "the end of a log")
    logs.add_argument("member")
    logs.add_argument("process")
    commands.add_parser("list", help="clusters of this machine").set_defaults(run=_list)
    return parser


def _up(options: argparse.Namespace) -> None:
    cluster = Cluster(options.name)
    if options.install and options.no_taint:
        raise BedError(
            "--no-taint is for clusters without Fimbria, which needs the taint to be safe from the first pod"
        )
    with step(f"cluster {options.name}"):
        if options.install:
            cluster.up_with_fimbria(options.nodes)
        else:
            cluster.up(options.nodes, () if options.no_taint else (STARTUP_TAINT,))
    if options.install:
        _explain(options.name)


def _install(options: argparse.Namespace) -> None:
    cluster = Cluster(options.name)
    with step(f"Fimbria on cluster {options.name}"):
        cluster.install_fimbria()
        cluster.install_dns()
    _explain(options.name)


def _explain(name: str) -> None:
    print(USE.format(bed="python -m tests.cluster.bed" + (f" --name {name}" if name != DEFAULT_NAME else "")))


def _test(options: argparse.Namespace) -> int:
    return 0 if verdict.run(options.name) else 1


def _down(options: argparse.Namespace) -> None:
    with step(f"cluster {options.name} removed"):
        Cluster(options.name).down()


def _exec(options: argparse.Namespace) -> None:
    if not options.command:
        raise BedError("exec: what is to run follows `--`")
    cluster = Cluster(options.name)
    command = [*cluster.enter(options.member), "--", *options.command]
    env = cluster.control_env if options.member == "control" else processes.environment()
    if options.member.startswith("node"):
        env = cluster.node(options.member).env
    os.execve(command[0], command, env | {"TERM": os.environ.get("TERM", "dumb")})


def _node(options: argparse.Namespace) -> None:
    cluster = Cluster(options.name)
    if options.action == "add":
        with step("one more node"):
            say(cluster.add_node().name)
        return
    if options.action == "remove":
        cluster.remove_node(options.node)
        return
    node = cluster.node(options.node)
    with step(f"{options.action} {options.node}"):
        if options.action in ("stop", "reboot"):
            node.stop()
        if options.action in ("start", "reboot"):
            node.start()


def _api(options: argparse.Namespace) -> None:
    cluster = Cluster(options.name)
    with step(f"API server {options.action}"):
        cluster.stop_api() if options.action == "stop" else cluster.start_api()


def _logs(options: argparse.Namespace) -> None:
    file = Cluster(options.name).layout.log(options.process, options.member)
    try:
        print(file.read_text(errors="replace")[-20000:], end="")
    except OSError as error:
        raise BedError(f"no log {file}: {error.strerror}") from None


def _list(options: argparse.Namespace) -> None:
    for name in clusters():
        cluster = Cluster(name)
        up = [n for n in cluster.nodes() if cluster.node(n).host.booted]
        api = "API up" if processes.running(cluster.layout, "control", "apiserver") else "API down"
        print(f"{name}: {api}, running: {', '.join(up) or 'no node'}")


if __name__ == "__main__":
    sys.exit(main())
