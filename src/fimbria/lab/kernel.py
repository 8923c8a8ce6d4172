"""Thin wrappers of what the lab asks the kernel for: namespaces, mounts, cgroups, `ip`. They decide nothing."""

import ctypes
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from fimbria.lab.errors import LabError

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWPID, CLONE_NEWNET = 0x00020000, 0x04000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
BIN = Path(__file__).parent.parent / "_bin"
# For what runs inside: labtool and fimbria are commands there.
PATH = f"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:{BIN}:{Path(sys.executable).parent}"

T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


def binary(name: str) -> str:
    """Path of one of the lab's own tools. Raises LabError if it wasn't built."""
    path = BIN / name
    if not path.exists():
        raise LabError(f"{name} isn't built: run make -C src/fimbria/lab")
    return str(path)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare")


def setns(path: Path, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, flags), f"enter {path}")
    finally:
        os.close(fd)


def mount(source: str, target: Path | str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    result = _libc.mount(
        source.encode(), os.fsencode(target), fstype.encode() or None, ctypes.c_ulong(flags), data.encode() or None
    )
    _check(result, f"mount {fstype or source} on {target}")


def umount(target: Path | str, flags: int = MNT_DETACH) -> bool:
    """False if nothing was mounted there."""
    if _libc.umount2(os.fsencode(target), flags) == 0:
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOENT):
        return False
    _check(-1, f"unmount {target}")
    return False


def mount_points(below: Path) -> list[Path]:
    """Mounts strictly below a directory, the deepest first (proc(5), mountinfo, field 5)."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [Path(line.split()[4].encode().decode("unicode_escape")) for line in lines]
    return sorted((p for p in points if below in p.parents), key=lambda p: len(p.parts), reverse=True)


def in_netns(path: Path, work: Callable[[], T]) -> T:
    """Runs `work` in a thread of its own that has entered the network namespace; sockets it opens stay there."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            setns(path, CLONE_NEWNET)
            result.append(work())
        except BaseException as e:
            failure.append(e)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def write_sysctls(values: dict[str, str]) -> None:
    """Of the calling thread's network namespace. Keys in the form net/ipv4/ip_forward."""
    for key, value in values.items():
        Path("/proc/sys", key).write_text(value)


def ip(*args: str) -> None:
    """Raises LabError with what `ip` said."""
    _ip(args, "")


def ip_batch(netns: str, lines: Sequence[str]) -> None:
    """Lines as `ip -batch` takes them, which knows no options in a line: those that begin with "-6 " follow in a
    second process."""
    for family, batch in (
        ("-4", [x for x in lines if not x.startswith("-6 ")]),
        ("-6", [x[3:] for x in lines if x.startswith("-6 ")]),
    ):
        if batch:
            _ip((family, "-n", netns, "-batch", "-"), "\n".join(batch) + "\n")


def ip_lines(netns: str, lines: Sequence[str]) -> None:
    """Lines for objects of no family, or whose family shows."""
    _ip(("-n", netns, "-batch", "-"), "\n".join(lines) + "\n")


def _ip(args: Sequence[str], stdin: str) -> None:
    try:
        done = subprocess.run(["ip", *args], input=stdin, capture_output=True, text=True, check=False)  # noqa: S607
    except FileNotFoundError:
        raise LabError("the command ip is missing: install iproute2") from None
    if done.returncode != 0:
        raise LabError(f"ip {' '.join(args)}: {done.stderr.strip()}")


# --- processes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A process that can't be mistaken for a later one with the same number. `start` in clock ticks since boot
    (proc(5), stat, field 22)."""

    pid: int
    start: int

    def alive(self) -> bool:
        """A zombie counts as dead."""
        stat = read_stat(self.pid)
        return stat is not None and stat[1] == self.start and stat[0] not in "ZX"

    def signal(self, number: int) -> bool:
        """False if the process is gone. The pidfd closes the gap between the check and the signal."""
        import signal

        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive():
                return False
            signal.pidfd_send_signal(fd, number)
            return True
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)


def read_stat(pid: int) -> tuple[str, int] | None:
    """State letter and start time, or None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


def process(pid: int) -> Process:
    """Raises ProcessLookupError if it is gone."""
    stat = read_stat(pid)
    if stat is None:
        raise ProcessLookupError(pid)
    return Process(pid, stat[1])


# --- cgroups ---------------------------------------------------------------------------------------------------


def cgroup_root() -> Path:
    """The mounted cgroup v2 hierarchy. Raises LabError if there is none that can be written."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ", 1)
        fields = left.split()
        if right.split()[0] == "cgroup2" and "rw" in fields[5].split(","):
            return Path(fields[4])
    raise LabError("no writable cgroup v2 is mounted: mount one, for example at /sys/fs/cgroup/unified")


def cgroup_kill(group: Path, timeout: float = 10.0) -> None:
    """Ends everything in the subtree at once and removes it. Raises LabError if something doesn't die in `timeout`
    seconds."""
    if not group.exists():
        return
    deadline = time.monotonic() + timeout
    while True:
        (group / "cgroup.kill").write_text("1")  # again and again: a process may be on its way in
        if "populated 0" in (group / "cgroup.events").read_text():
            break
        if time.monotonic() > deadline:
            raise LabError(f"processes in {group} don't die")
        time.sleep(0.01)
    cgroup_remove(group)


def cgroup_remove(group: Path) -> None:
    """Removes an empty subtree. The kernel releases a dead process's cgroup a moment after its death, hence the
    retries."""
    for directory, _, _ in os.walk(group, topdown=False):
        for _ in range(200):
            try:
                os.rmdir(directory)
                break
            except FileNotFoundError:
                break
            except OSError as e:
                if e.errno != errno.EBUSY:
                    raise
                time.sleep(0.01)
        else:
            raise LabError(f"cgroup {directory} is still busy")
