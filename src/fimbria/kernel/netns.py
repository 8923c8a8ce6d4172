"""Network namespaces: create, enter for one call, identify. No thread of the caller ever changes its namespace."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from fimbria.kernel._libbpf import lib

T = TypeVar("T")

RUN_DIR = "/run/netns"
_SO_NETNS_COOKIE = 71


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


def create(path: str | os.PathLike[str]) -> None:
    """Makes a namespace and keeps it by a mount at `path`, whose directory must exist.

    Raises FileExistsError when there is something already, OSError.
    """
    target = os.fspath(path)
    os.close(os.open(target, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
    try:
        _check(lib.fim_netns_create(os.fsencode(target)), f"create namespace {target}")
    except BaseException:
        os.unlink(target)
        raise


def delete(path: str | os.PathLike[str]) -> bool:
    """Removes the mount and its file; False when there was none. The namespace ends with its last user."""
    target = os.fspath(path)
    if not os.path.lexists(target):
        return False
    with contextlib.suppress(OSError):  # a file left by a crash between creation and mount
        _check(lib.fim_umount(os.fsencode(target)), f"unmount {target}")
    os.unlink(target)
    return True


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[int]:
    """The descriptor of a namespace (a mount, or /proc/PID/ns/net). Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def run(netns_fd: int, call: Callable[[], T]) -> T:
    """Runs `call` in the namespace, on a thread that ends with it, and returns or raises what it does.

    Blocks meanwhile: under asyncio, use it from a worker thread. Raises OSError when the namespace can't be entered.
    """
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            _check(lib.fim_setns(netns_fd), f"enter namespace of descriptor {netns_fd}")
            result.append(call())
        except BaseException as e:
            failure.append(e)

    thread = threading.Thread(target=body, name="netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def inode(path: str | os.PathLike[str] = "/proc/self/ns/net") -> int:
    """The number by which ip(8) and /proc tell namespaces apart; reused once a namespace is gone."""
    return os.stat(path).st_ino


def cookie(netns_fd: int | None = None) -> int:
    """The number that bpf_get_netns_cookie() gives, never reused while the machine is up. Raises OSError."""
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
    if netns_fd is None:
        sock = socket.socket(socket.AF_INET, kind)
    else:
        fd = _check(lib.fim_socket_in(netns_fd, socket.AF_INET, kind, 0), f"namespace of descriptor {netns_fd}")
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 0, fileno=fd)
    with sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8), sys.byteorder)


def named(directory: str = RUN_DIR) -> list[str]:
    """The names of the namespaces mounted in a directory; empty when there is no such directory."""
    try:
        return sorted(entry.name for entry in Path(directory).iterdir() if entry.is_file())
    except FileNotFoundError:
        return []
