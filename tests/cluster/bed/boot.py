"""Becomes the first process of a node: `python -m tests.cluster.bed.boot CLUSTER NODE BIN`; prints its number.

The node sees the machine's files, with overlays on its own disk where a node writes (/etc, /opt, /var), its own /tmp,
/run, /proc, /sys and bpffs, and files of its own in place of what the kernel has only once. All of it is in its mount
namespace and goes with its last process; the disk stays, so that a node can be started again.
"""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path

from tests.cluster.bed.layout import NODE_CGROUP2, Layout

from fimbria.lab import kernel

OVERLAYS = ("etc", "opt", "var")
# overlayfs takes no overlay as its upper layer: what mounts some itself gets a plain folder
PLAIN = ("var/lib/containerd", "var/lib/kubelet", "tmp")
BINARIES = "/opt/kube/bin"
MS_SHARED = 0x100000
_MODE = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
# What kubelet sets, and mustn't set for the whole machine.
KERNEL_VALUES = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}


def _run_folder() -> None:
    # what others have mounted below /run goes first: a copy of their namespaces' mounts would keep those alive
    for point in kernel.mount_points(Path("/run")):
        kernel.umount(point)
    kernel.mount("tmpfs", "/run", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    for name in ("netns", "lock"):
        Path("/run", name).mkdir()


def _overlays(disk: Path) -> None:
    for name in OVERLAYS:
        upper, work = disk / "upper" / name, disk / "work" / name
        upper.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        kernel.mount("overlay", f"/{name}", "overlay", data=f"lowerdir=/{name},upperdir={upper},workdir={work}")


def _folders(disk: Path, binaries: str) -> None:
    """`disk` leads to the node's disk although /var is another one by now."""
    Path(BINARIES).mkdir(parents=True, exist_ok=True)
    kernel.mount(binaries, BINARIES, flags=kernel.MS_BIND)
    for name in PLAIN:
        source, target = disk / "plain" / name, Path("/", name)
        source.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        kernel.mount(str(source), target, flags=kernel.MS_BIND)
    Path("/tmp").chmod(0o1777)


def _sys(cgroup2: Path) -> None:
    staging, own = Path("/run/cgroup"), Path(NODE_CGROUP2)
    staging.mkdir()
    own.mkdir()
    kernel.mount(str(cgroup2), own, flags=kernel.MS_BIND)
    kernel.mount("/sys/fs/cgroup", staging, flags=kernel.MS_BIND | kernel.MS_REC)
    kernel.mount("sysfs", "/sys", "sysfs", _MODE)
    kernel.mount("bpf", "/sys/fs/bpf", "bpf", _MODE, "mode=700")
    kernel.mount(str(staging), "/sys/fs/cgroup", flags=kernel.MS_BIND | kernel.MS_REC)
    kernel.umount(staging)
    staging.rmdir()


def _proc() -> None:
    kernel.mount("proc", "/proc", "proc", _MODE)
    values = KERNEL_VALUES | {"kernel/random/boot_id": str(uuid.uuid4())}
    for key, value in values.items():
        file = Path("/run/tunables", key if "/random/" not in key else "kernel/boot_id")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
        target = Path("/proc/sys", key)
        if target.exists():
            kernel.mount(str(file), target, flags=kernel.MS_BIND)


def _identity(node: str) -> None:
    import socket

    socket.sethostname(node)
    for name, text in (("hostname", f"{node}\n"), ("hosts", f"127.0.0.1 localhost {node}\n::1 localhost {node}\n")):
        Path("/etc", name).write_text(text)
    machine = Path("/etc/machine-id")
    known = machine.with_name(".fimbria-machine-id")
    if not known.exists():
        known.write_text(f"{uuid.uuid4().hex}\n")
    machine.unlink(missing_ok=True)
    machine.write_text(known.read_text())


def _child(layout: Layout, node: str, binaries: str) -> None:
    cgroup2 = kernel.cgroup_root() / layout.cgroup_of(node)
    opened = os.open(layout.disk(node), os.O_PATH | os.O_DIRECTORY)
    disk = Path(f"/proc/self/fd/{opened}")
    _overlays(layout.disk(node))
    _folders(disk, binaries)
    os.close(opened)
    _run_folder()
    _sys(cgroup2)
    _proc()
    _identity(node)
    kernel.mount("none", "/", flags=kernel.MS_REC | MS_SHARED)


def _detach(log: Path) -> None:
    os.setsid()
    null = os.open("/dev/null", os.O_RDONLY)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)


def main(name: str, node: str, binaries: str) -> None:
    layout = Layout(name)
    init = kernel.binary("labrun")
    (kernel.cgroup_root() / layout.cgroup_of(node) / "system" / "cgroup.procs").write_text("0")
    kernel.setns(layout.netns_path(node), kernel.CLONE_NEWNET)
    kernel.unshare(kernel.CLONE_NEWNS | kernel.CLONE_NEWUTS | kernel.CLONE_NEWPID)
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        _child(layout, node, binaries)
        os.write(tell, b"1")
        os.closerange(3, 64)
        _detach(Path("/var/log/init.log"))
        os.execv(init, [init, "init"])
    os.close(tell)
    if os.read(ready, 1) != b"1":
        raise SystemExit(f"{node} didn't start")
    sys.stdout.write(f"{pid}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
