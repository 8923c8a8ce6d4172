"""The processes of a lab: what is started where, with which command line. A small table, so that a changed flag is
one line."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fimbria.lab import kernel, state
from fimbria.lab.errors import LabError
from fimbria.lab.layout import API_PORT, LabSpec, Paths

MACHINE = "machine"  # where the lab meets the machine that it runs on: no namespace of its own
NODE_CGROUP = "/sys/fs/cgroup"  # as a node sees its own part of the tree
# Never the caller's whole environment: a component behaves the same whoever started the lab.
ENVIRONMENT = {
    "PATH": kernel.PATH,
    "LANG": "C.UTF-8",
    "HOME": "/root",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Component:
    """A process to start. `module` tells whether it exists in this installation."""

    name: str
    module: str
    args: tuple[str, ...] = ()

    def argv(self) -> list[str]:
        return [sys.executable, "-m", self.module, *self.args]

    @property
    def exists(self) -> bool:
        """Importing the parent package is enough to know, and cheap."""
        try:
            return importlib.util.find_spec(f"{self.module}.__main__") is not None
        except ModuleNotFoundError:
            return importlib.util.find_spec(self.module) is not None


def api_server(spec: LabSpec, paths: Paths) -> Component:
    return Component(
        "apiserver",
        "fimbria.lab.apiserver",
        (
            "--db",
            str(paths.database),
            "--listen",
            f"{spec.control.ipv4}:{API_PORT}",
            "--kubeconfig-out",
            str(paths.kubeconfig),
            "--service-cidr",
            f"{spec.service_ipv4},{spec.service_ipv6}",
        ),
    )


def controllers(paths: Paths) -> Component:
    return Component("controllers", "fimbria.lab.apiserver.controllers", ("--kubeconfig", str(paths.kubeconfig)))


def operator(spec: LabSpec, paths: Paths) -> Component:
    args = ["--kubeconfig", str(paths.kubeconfig), "--ipv4-pool", spec.ipv4_pool, "--ipv6-pool", spec.ipv6_pool]
    args += ["--ipv4-mask", str(spec.ipv4_mask), "--ipv6-mask", str(spec.ipv6_mask)]
    return Component("operator", "fimbria.operator", tuple(args))


def cloud(paths: Paths) -> Component:
    return Component("cloud", "fimbria.lab.cloud", ("--lab", paths.lab))


def runner(spec: LabSpec, paths: Paths, node: str) -> Component:
    m = spec.node(node)
    return Component(
        "runner",
        "fimbria.lab.runner",
        (
            "--node-name",
            node,
            "--kubeconfig",
            str(paths.kubeconfig),
            "--address",
            m.ipv4,
            "--address",
            m.ipv6,
            "--cgroup",
            f"{NODE_CGROUP}/pods",
            *(("--zone", spec.zone(node)) if spec.zones else ()),
        ),
    )


def agent(spec: LabSpec, paths: Paths, node: str) -> Component:
    return Component(
        "agent",
        "fimbria.agent",
        (
            "--node-name",
            node,
            "--kubeconfig",
            str(paths.kubeconfig),
            "--cgroup",
            NODE_CGROUP,
            "--routing",
            spec.routing,
            *(f"--{option}" for option in spec.agent_options),
        ),
    )


def observer(node: str) -> Component:
    return Component("observer", "fimbria.observer", ("--node-name", node))


def table(spec: LabSpec, paths: Paths) -> dict[str, Component]:
    """Every process by its name MEMBER/COMPONENT, in the order in which they start. What isn't installed isn't
    there."""
    all_: dict[str, Component] = {}
    if not spec.kubeconfig:
        all_["control/apiserver"] = api_server(spec, paths)
    if not spec.kubeconfig or spec.controllers:
        all_["control/controllers"] = controllers(paths)
    all_[f"{MACHINE}/cloud"] = cloud(paths)
    if spec.agents:
        all_["control/operator"] = operator(spec, paths)
    for node in spec.node_names:
        all_[f"{node}/runner"] = runner(spec, paths, node)
    for node in spec.node_names if spec.agents else ():
        all_[f"{node}/agent"] = agent(spec, paths, node)
        all_[f"{node}/observer"] = observer(node)
    return {name: c for name, c in all_.items() if c.exists}


def cgroup(paths: Paths, member: str) -> Path:
    return kernel.cgroup_root() / paths.cgroup_name / member


def enter(paths: Paths, member: str) -> list[str]:
    """The command prefix that runs something inside a member. Raises LabError if a node isn't running."""
    prefix = [kernel.binary("labrun"), "enter", "--cgroup", str(cgroup(paths, member) / "system")]
    if member == MACHINE:
        return prefix
    if not member.startswith("node"):
        return [*prefix, "--netns", str(paths.netns(member))]
    init = state.recall(paths, f"{member}/{state.INIT}")
    if init is None or not init.alive():
        raise LabError(f"{member} of lab {paths.lab} isn't running")
    return [*prefix, "--target", str(init.pid)]


def start(paths: Paths, name: str, argv: Sequence[str]) -> kernel.Process:
    """Starts a background process that outlives the caller. Raises LabError if it already runs or can't be started."""
    member = name.split("/", maxsplit=1)[0]
    known = state.recall(paths, name)
    if known and known.alive():
        raise LabError(f"{name} is already running (pid {known.pid})")
    log = log_path(paths, name)
    prefix = enter(paths, member)
    done = subprocess.run(
        [*prefix, "--detach-log", str(log), "--", *argv],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT | _python_path() | {"FIMBRIA_NODE_NAME": member},
        cwd="/",
    )
    if done.returncode != 0:
        raise LabError(f"{name} didn't start: {done.stderr.strip() or tail(log)}")
    try:
        process = kernel.process(int(done.stdout))
    except ProcessLookupError:
        raise LabError(f"{name} ended at once: {tail(log)}") from None
    state.remember(paths, name, process)
    return process


def _python_path() -> dict[str, str]:
    value = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": value} if value else {}


def log_path(paths: Paths, name: str) -> Path:
    return paths.logs / f"{name.replace('/', '-')}.log"


def tail(log: Path, lines: int = 5) -> str:
    """The last lines of a log, for error messages."""
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) or "(its log is empty)"
    except FileNotFoundError:
        return "(it has no log)"


def send(paths: Paths, name: str, number: int = signal.SIGKILL, timeout: float = 10.0) -> None:
    """Signals a process and, if the signal is one that ends, waits until it is gone. Raises LabError."""
    process = state.recall(paths, name)
    if process is None:
        known = ", ".join(state.processes(paths)) or "none"
        raise LabError(f"lab {paths.lab} has no process {name}; it has {known}")
    if not process.signal(number):
        raise LabError(f"{name} isn't running")
    if number not in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        return
    deadline = time.monotonic() + timeout
    while process.alive():
        if time.monotonic() > deadline:
            raise LabError(f"{name} (pid {process.pid}) still runs {timeout:.0f} s after signal {number}")
        time.sleep(0.01)


def wait_for(what: str, paths: Paths, name: str, condition: Callable[[], bool], timeout: float) -> None:
    """Raises LabError with the end of the process's log if it dies or `condition` isn't met in `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        process = state.recall(paths, name)
        if process is None or not process.alive():
            raise LabError(f"{name} ended before {what}: {tail(log_path(paths, name))}")
        if time.monotonic() > deadline:
            raise LabError(
                f"{what} took more than {timeout:.0f} s; last words of {name}: {tail(log_path(paths, name))}"
            )
        time.sleep(0.02)
