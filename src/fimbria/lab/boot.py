"""Becomes pid 1 of a node: `python -m fimbria.lab.boot LAB NODE CGROUP`, run by `lab up`; prints the node's pid.

The node sees the machine's files, with overlays where a node writes (/etc, /opt, /var), its own /run, /sys, /proc,
bpffs and its own part of the cgroup tree at /sys/fs/cgroup. All mounts are private to it and go when its last process
ends.
"""

import os
import socket
import sys
from pathlib import Path

from fimbria.lab import kernel
from fimbria.lab.layout import Paths

OVERLAYS = ("etc", "opt", "var")


def _private_run(paths: Paths, node: str) -> None:
    """An empty /run that holds nothing but the lab's own state.

    What other labs have mounted below /run must go first: a copy of their namespaces' mounts would keep them alive
    after their end.
    """
    staging = paths.disk(node) / "run"
    staging.mkdir(exist_ok=True)
    kernel.mount("tmpfs", staging, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    inner = staging / paths.state.relative_to("/run")
    inner.mkdir(parents=True)
    kernel.mount(str(paths.state), inner, flags=kernel.MS_BIND)
    keep = {paths.state, *paths.state.parents}
    for point in kernel.mount_points(Path("/run")):
        if point not in keep and paths.state not in point.parents:
            kernel.umount(point)
    kernel.mount(str(staging), "/run", flags=kernel.MS_BIND | kernel.MS_REC)
    for name in ("netns", "lock"):
        Path("/run", name).mkdir()


def _overlay(paths: Paths, node: str) -> None:
    for name in OVERLAYS:
        upper, work = paths.disk(node) / name, paths.disk(node) / f".{name}"
        upper.mkdir(exist_ok=True)
        work.mkdir(exist_ok=True)
        kernel.mount("overlay", f"/{name}", "overlay", data=f"lowerdir=/{name},upperdir={upper},workdir={work}")
    for directory in ("/etc/cni/net.d", "/opt/cni/bin", "/var/lib/cni", "/var/log/pods"):
        Path(directory).mkdir(parents=True, exist_ok=True)
    for stale in Path("/etc/cni/net.d").iterdir():  # the machine's own CNI isn't the node's
        if not (paths.disk(node) / "etc/cni/net.d" / stale.name).exists():
            stale.unlink()
    for name in ("resolv.conf", "hosts"):  # mount points of the pods' own
        target = Path("/etc", name)
        if target.is_symlink() or not target.exists():
            target.unlink(missing_ok=True)
            target.touch()


def _sys(cgroup: Path) -> None:
    opened = os.open(
        cgroup, os.O_PATH | os.O_DIRECTORY
    )  # /sys is about to be replaced; the descriptor still leads there
    kernel.mount("sysfs", "/sys", "sysfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    kernel.mount("bpf", "/sys/fs/bpf", "bpf", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, "mode=700")
    kernel.mount(f"/proc/self/fd/{opened}", "/sys/fs/cgroup", flags=kernel.MS_BIND)
    os.close(opened)


def _child(paths: Paths, node: str, cgroup: Path) -> None:
    _private_run(paths, node)
    _overlay(paths, node)
    _sys(cgroup)
    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC)
    socket.sethostname(node)


def _detach(log: Path) -> None:
    os.setsid()
    null = os.open("/dev/null", os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)


def main(lab: str, node: str, cgroup: Path) -> None:
    paths = Paths(lab)
    init = kernel.binary("labrun")
    (cgroup / "system" / "cgroup.procs").write_text("0")
    kernel.setns(paths.netns(node), kernel.CLONE_NEWNET)
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS | kernel.CLONE_NEWPID)
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(paths, node, cgroup)
        os.write(tell, b"1")
        _detach(paths.logs / f"{node}-init.log")
        os.execv(init, [init, "init"])  # noqa: S606
    os.close(tell)
    if os.read(ready, 1) != b"1":
        raise SystemExit(f"node {node} didn't start")
    sys.stdout.write(f"{pid}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
