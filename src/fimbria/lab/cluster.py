"""Building a lab, looking at it, and removing every trace of it."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fimbria.lab import components, fabric, kernel, state
from fimbria.lab.errors import LabError
from fimbria.lab.kernel import Process
from fimbria.lab.layout import NETNS_DIR, PREFIX, STATE_ROOT, LabSpec, Paths, check_name

Progress = Callable[[str], None]


def quiet(_: str) -> None:
    return


def need_root() -> None:
    """Raises LabError."""
    if os.geteuid() != 0:
        raise LabError("the lab needs root: it creates namespaces, mounts and cgroups")


def up(spec: LabSpec, progress: Progress = quiet) -> None:
    """Builds and starts a lab. On failure or interruption what was built is removed again. Raises LabError."""
    need_root()
    spec.check()
    kernel.binary("labrun")
    root = kernel.cgroup_root()
    with state.locked(spec.name):
        if remains(spec.name):
            raise LabError(f"lab {spec.name} already exists, or a part of it: fimbria lab down --name {spec.name}")
        try:
            _build(spec, root / Paths(spec.name).cgroup_name, progress)
        except BaseException:
            progress("failed: removing what was built")
            _remove(spec.name)
            raise


def _build(spec: LabSpec, group: "os.PathLike[str]", progress: Progress) -> None:
    paths = Paths(spec.name)
    progress("state and cgroups")
    state.create(spec)
    for member in (*spec.node_names, "control", "fabric", "world"):
        os.makedirs(os.path.join(group, member, "system"))
    for node in spec.node_names:
        os.mkdir(os.path.join(group, node, "pods"))
    progress(f"fabric: {spec.nodes} nodes, control plane and outside world around a router")
    fabric.create(spec, paths)
    progress("nodes: " + ", ".join(spec.node_names))
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda node: boot(paths, node), spec.node_names):
            pass


def boot(paths: Paths, node: str) -> None:
    """Starts a node's pid 1. Raises LabError."""
    argv = [sys.executable, "-m", "fimbria.lab.boot", paths.lab, node, str(components.cgroup(paths, node))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"{node} didn't start: {done.stderr.strip().splitlines()[-1:]}")
    state.remember(paths, f"{node}/{state.INIT}", kernel.process(int(done.stdout)))


def run_in(lab: str, member: str, argv: Sequence[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command inside a node, the control plane's, the world's or the fabric's namespace, and captures what it says."""
    prefix = components.enter(Paths(lab), member)
    return subprocess.run(
        [*prefix, "--", *argv], input=stdin, capture_output=True, text=True, check=False, env=components.ENVIRONMENT
    )


# --- removal ---------------------------------------------------------------------------------------------------


def remains(lab: str) -> list[str]:
    """Every trace of a lab, found by name and not by what the state directory says."""
    paths = Paths(lab)
    found = [f"namespace {p.name}" for p in _namespaces(lab)]
    with contextlib.suppress(LabError):
        group = kernel.cgroup_root() / paths.cgroup_name
        found += [f"cgroup {group}"] if group.exists() else []
    found += [f"mount {p}" for p in _mounts(lab)]
    found += [f"directory {paths.state}"] if paths.state.exists() else []
    return found


def _namespaces(lab: str) -> list["os.PathLike[str]"]:
    return sorted(NETNS_DIR.glob(f"{PREFIX}{lab}.*")) if NETNS_DIR.is_dir() else []


def _mounts(lab: str) -> list["os.PathLike[str]"]:
    state_dir = Paths(lab).state
    return [p for p in kernel.mount_points(STATE_ROOT) if p == state_dir or state_dir in p.parents]


def down(lab: str, progress: Progress = quiet) -> bool:
    """Removes every trace of a lab, however far it got. False if there was none. Raises LabError for what resists."""
    need_root()
    check_name(lab)
    with state.locked(lab):
        if not remains(lab):
            return False
        progress("removing processes, namespaces, mounts and cgroups")
        _remove(lab)
    return True


def _remove(lab: str) -> None:
    """The processes first: they hold the rest. Every step is tried, whatever happened to the one before."""
    paths = Paths(lab)
    failures: list[str] = []

    def attempt(step: Callable[[], object]) -> None:
        try:
            step()
        except (LabError, OSError) as e:
            failures.append(str(e))

    attempt(lambda: kernel.cgroup_kill(kernel.cgroup_root() / paths.cgroup_name))
    for namespace in _namespaces(lab):
        attempt(lambda name=os.path.basename(namespace): kernel.ip("netns", "delete", name))  # type: ignore[misc]
    for point in _mounts(lab):
        attempt(lambda p=point: kernel.umount(p))  # type: ignore[misc]
    attempt(lambda: _remove_directory(paths))
    if failures:
        raise LabError(f"lab {lab} could not be removed completely: {'; '.join(failures)}")


def _remove_directory(paths: Paths) -> None:
    import shutil

    if paths.state.exists():
        shutil.rmtree(paths.state)


# --- status ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessStatus:
    name: str
    process: Process
    running: bool


def process_states(lab: str) -> list[ProcessStatus]:
    """Raises LabError if there is no such lab."""
    state.load(lab)
    return [ProcessStatus(name, p, p.alive()) for name, p in state.processes(Paths(lab)).items()]
