"""Before the agent starts in a container: what the node lacks is mounted on the node itself, and the CNI plugin placed.

A mount made in a container is the container's alone unless it is privileged, so a child process enters the mount
namespace of the node's process 1 (found through the node's /proc) and mounts there. The control group namespace is
entered as well: a cgroup v2 file system shows the tree from the root of who mounts it. Needs CAP_SYS_ADMIN,
CAP_SYS_CHROOT and CAP_SYS_PTRACE (setns(2), namespaces(7)).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_CLONE_NEWNS, _CLONE_NEWCGROUP = 0x00020000, 0x02000000  # clone(2)
_STATFS_SIZE: Final = 256  # more than struct statfs has anywhere


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A kind that can be mounted. `magic`: as statfs(2) reports it; `data`: mount options of its own."""

    kind: str
    magic: int
    data: str = ""


BPF: Final = FileSystem("bpf", 0xCAFE4A11, "mode=0700")
CGROUP2: Final = FileSystem("cgroup2", 0x63677270)
_FLAGS: Final = 2 | 4 | 8  # MS_NOSUID, MS_NODEV, MS_NOEXEC


def mount_on_node(procfs: Path, wanted: list[tuple[Path, FileSystem]]) -> list[Path]:
    """Mount each file system at its path on the node unless it is there already; returns what was mounted.

    `procfs` shows the node's processes. Raises OSError naming what failed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    spaces = [
        (os.open(procfs / "1/ns/cgroup", os.O_RDONLY | os.O_CLOEXEC), _CLONE_NEWCGROUP),
        (os.open(procfs / "1/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), _CLONE_NEWNS),
    ]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(libc, spaces, wanted, writing)
    os.close(writing)
    for fd, _ in spaces:
        os.close(fd)
    with open(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if status or len(said) < 4:
        raise OSError(errno.EIO, f"mounting on the node: the child ended with status {status}")
    (code,) = struct.unpack_from("!i", said)
    text = said[4:].decode("utf-8", "replace")
    if code:
        raise OSError(code, f"{text}: {os.strerror(code)}")
    return [Path(p) for p in text.split("\0") if p]


def _child(
    libc: ctypes.CDLL, spaces: list[tuple[int, int]], wanted: list[tuple[Path, FileSystem]], writing: int
) -> None:
    """Never returns. Nothing may be imported here: the files are the node's."""
    doing, done, code = "entering the node's namespaces", [], 0
    try:
        for fd, kind in spaces:
            _check(libc.setns(fd, kind))
        for path, system in wanted:
            doing = f"mounting {system.kind} at {path}"
            if mount_if_missing(libc, os.fspath(path), system):
                done.append(os.fspath(path))
    except OSError as error:
        code = error.errno or errno.EIO
    finally:
        os.write(writing, struct.pack("!i", code) + (doing if code else "\0".join(done)).encode())
        os._exit(0)


def mount_if_missing(libc: ctypes.CDLL, path: str, system: FileSystem) -> bool:
    """Whether it had to be mounted. Raises OSError."""
    os.makedirs(path, mode=0o755, exist_ok=True)
    if _magic(libc, path) == system.magic:
        return False
    _check(
        libc.mount(
            system.kind.encode(), path.encode(), system.kind.encode(), ctypes.c_ulong(_FLAGS), system.data.encode()
        )
    )
    return True


def _magic(libc: ctypes.CDLL, path: str) -> int:
    buffer = ctypes.create_string_buffer(_STATFS_SIZE)
    _check(libc.statfs(path.encode(), buffer))
    return ctypes.c_long.from_buffer(buffer).value & 0xFFFFFFFF


def _check(outcome: int) -> None:
    if outcome != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
