"""The cluster's part of each cgroup hierarchy.

Kubelet runs on cgroup v1, the one that has controllers on a hybrid machine; runc puts each container into the v2 tree
beside it at the same path. That tree tells nodes apart for the agent's socket programs, and lets `down` find and end
every process of the cluster, whatever became of its parents.
"""

from __future__ import annotations

from pathlib import Path

from tests.cluster.bed.errors import BedError
from tests.cluster.bed.layout import Layout

from fimbria.lab import kernel
from fimbria.lab.errors import LabError

_NEEDED = {"cpu", "cpuacct", "cpuset", "memory", "pids"}  # what kubelet insists on


def check() -> None:
    """Raises BedError if kubelet can't work with this machine's cgroups."""
    present = {option for _, options in _v1() for option in options}
    if missing := sorted(_NEEDED - present):
        raise BedError(f"cgroup v1 isn't mounted for {', '.join(missing)}: the bed's kubelets need the hybrid layout")
    try:
        root = kernel.cgroup_root()
    except LabError as error:
        raise BedError(str(error)) from None
    if root != Path("/sys/fs/cgroup/unified"):
        raise BedError(f"cgroup v2 is mounted at {root}: runc only looks for it at /sys/fs/cgroup/unified")


def ensure(layout: Layout, member: str) -> None:
    for root, _ in _v1():
        for folder in (root / layout.cgroup, root / layout.cgroup_of(member)):
            folder.mkdir(exist_ok=True)
            _inherit_cpuset(folder)
    (kernel.cgroup_root() / layout.cgroup_of(member) / "system").mkdir(parents=True, exist_ok=True)


def kill(layout: Layout, member: str = "") -> None:
    """Ends every process of a member, or of the whole cluster, and removes its cgroups."""
    path = layout.cgroup_of(member) if member else layout.cgroup
    try:
        kernel.cgroup_kill(kernel.cgroup_root() / path)
        for root, _ in _v1():
            kernel.cgroup_remove(root / path)
    except LabError as error:
        raise BedError(str(error)) from None


def present(layout: Layout) -> list[Path]:
    """The cluster's folders in all hierarchies."""
    roots = [kernel.cgroup_root(), *(root for root, _ in _v1())]
    return [root / layout.cgroup for root in roots if (root / layout.cgroup).exists()]


def names() -> list[str]:
    """Of the clusters that have processes or had."""
    return sorted(p.name.removeprefix("fimk-") for p in kernel.cgroup_root().glob("fimk-*") if p.is_dir())


def _v1() -> list[tuple[Path, list[str]]]:
    """Mount points with their options (proc(5), mountinfo), the controllers among them."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        kind, _, options = right.split()[:3]
        if kind == "cgroup":
            found.append((Path(left.split()[4]), options.split(",")))
    return found


def _inherit_cpuset(folder: Path) -> None:
    """A new group of cgroup v1's cpuset has no processor and no memory, and takes no process."""
    for file in ("cpuset.cpus", "cpuset.mems"):
        if (folder / file).exists() and not (folder / file).read_text().strip():
            (folder / file).write_text((folder.parent / file).read_text())
