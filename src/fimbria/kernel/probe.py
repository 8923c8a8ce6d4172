"""What this kernel and this process can do; each thing that is missing is one sentence for the user."""

from __future__ import annotations

import os
from pathlib import Path

from fimbria.kernel.fd import BpfError
from fimbria.kernel.links import AttachType, query_device

_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21


def kernel_version() -> tuple[int, int]:
    """Major and minor number of the running kernel."""
    major, minor = os.uname().release.split("-", 1)[0].split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def has_tcx() -> bool:
    """True when the kernel has tcx links (6.6 and later). Needs CAP_NET_ADMIN."""
    try:
        query_device(1, AttachType.TCX_INGRESS)  # 1 is the loopback device of every namespace
    except BpfError:
        return False
    return True


def has_btf() -> bool:
    """True when the kernel publishes its type information."""
    return Path("/sys/kernel/btf/vmlinux").exists()


def cgroup2_mount(mounts: str | None = None) -> str | None:
    """Where cgroup v2 is mounted, None when it isn't. `mounts`: text of /proc/self/mountinfo (proc(5)), for tests."""
    text = Path("/proc/self/mountinfo").read_text() if mounts is None else mounts
    return _mount_of(text, "cgroup2")


def bpffs_mounted(path: str) -> bool:
    """True when `path` lies on a BPF file system. By its device: a mount that is listed may be covered by another."""
    there = next(p for p in (Path(path), *Path(path).parents) if p.exists())
    device = there.stat().st_dev
    lines = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    wanted = f"{os.major(device)}:{os.minor(device)}"
    return any(fields[2] == wanted and fields[fields.index("-") + 1] == "bpf" for fields in lines)


def _mounts(text: str) -> list[tuple[str, str]]:
    found = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split(maxsplit=1)
        if len(fields) >= 5 and kind:
            found.append((fields[4].encode().decode("unicode_escape"), kind[0]))
    return found


def _mount_of(text: str, kind: str) -> str | None:
    return next((point for point, found in _mounts(text) if found == kind), None)


def capabilities(status: str | None = None) -> int:
    """The effective capability bits. `status`: text of /proc/self/status (proc(5)), for tests."""
    text = Path("/proc/self/status").read_text() if status is None else status
    return next((int(line.split()[1], 16) for line in text.splitlines() if line.startswith("CapEff:")), 0)


def problems(caps: int | None = None) -> list[str]:
    """What keeps the agent from running here, one sentence each; empty when nothing does."""
    bits = capabilities() if caps is None else caps
    found = []
    if not bits >> _CAP_SYS_ADMIN & 1:
        found.append("CAP_SYS_ADMIN is missing: the process can't enter pods' namespaces or open programs by number.")
    if not bits >> _CAP_NET_ADMIN & 1:
        found.append("CAP_NET_ADMIN is missing: the process can't attach programs or change links and routes.")
    if not has_btf():
        found.append("/sys/kernel/btf/vmlinux is missing: the kernel was built without CONFIG_DEBUG_INFO_BTF.")
    if kernel_version() < (5, 15):
        found.append(f"The kernel is {os.uname().release}; 5.15 or later is needed.")
    return found
