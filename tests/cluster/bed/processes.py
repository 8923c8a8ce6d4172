"""Starts and ends the cluster's processes, in its namespaces and cgroups."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.cluster.bed.errors import BedError
from tests.cluster.bed.layout import Layout

from fimbria.lab import kernel

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TAIL_BYTES = 3000


def run(command: Sequence[str], *, stdin: str = "", env: Mapping[str, str] | None = None, seconds: float = 120) -> str:
    """Its output. Raises BedError with what it said on its error output."""
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=False, env=env, timeout=seconds
        )
    except FileNotFoundError:
        raise BedError(f"the command {command[0]} is missing: scripts/setup --test installs what is needed") from None
    except subprocess.TimeoutExpired:
        raise BedError(f"{_shown(command)}: no end after {seconds:.0f} s") from None
    if done.returncode != 0:
        raise BedError(f"{_shown(command)}: {(done.stderr or done.stdout).strip()[-TAIL_BYTES:]}")
    return done.stdout


def _shown(command: Sequence[str]) -> str:
    """Without the words that lead into a namespace, and not all of it."""
    own = command[command.index("--") + 1 :] if "--" in command and command[0].endswith("labrun") else command
    return " ".join(own[:8])


def enter(layout: Layout, member: str, pid: int | None = None) -> list[str]:
    """The beginning of a command that runs in a member's namespaces: all of a node's (`pid` is its first process),
    else the network's. It joins the member's cgroup, so that nothing outlives the cluster."""
    where = ["--target", str(pid)] if pid else ["--netns", str(layout.netns_path(member))]
    return [kernel.binary("labrun"), "enter", *where, "--cgroup", str(system_cgroup(layout, member))]


def system_cgroup(layout: Layout, member: str) -> Path:
    """The cgroup v2 of what isn't a pod."""
    return kernel.cgroup_root() / layout.cgroup_of(member) / "system"


def environment(**more: str) -> dict[str, str]:
    """Nothing of the caller's: no proxy, no locale, no other cluster's kubeconfig."""
    return {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", **more}


def start(
    layout: Layout,
    member: str,
    process: str,
    command: Sequence[str],
    *,
    pid: int | None = None,
    log: Path | None = None,
    env: Mapping[str, str] | None = None,
) -> None:
    """Starts a daemon unless it runs already. `log` is its path as the member sees it."""
    if running(layout, member, process):
        return
    detach = ["--detach-log", str(log or layout.log(process, member))]
    done = run([*enter(layout, member, pid), *detach, "--", *command], env=env or environment())
    record(layout, member, process, int(done))


def record(layout: Layout, member: str, process: str, pid: int) -> None:
    file = layout.pid_file(process, member)
    file.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        found = kernel.process(pid)
    except ProcessLookupError:
        raise BedError(f"{member}: {process} ended at once{tail(layout, member, process)}") from None
    file.write_text(f"{found.pid} {found.start}\n")


def running(layout: Layout, member: str, process: str) -> kernel.Process | None:
    """None if it was never started or has ended."""
    try:
        pid, started = layout.pid_file(process, member).read_text().split()
    except (FileNotFoundError, ValueError):
        return None
    found = kernel.Process(int(pid), int(started))
    return found if found.alive() else None


def stop(layout: Layout, member: str, process: str, seconds: float = 10) -> bool:
    """Asks it to end, then makes it. False if it wasn't running."""
    found = running(layout, member, process)
    if not found:
        return False
    found.signal(signal.SIGTERM)
    deadline = time.monotonic() + seconds
    while found.alive():
        if time.monotonic() > deadline:
            found.signal(signal.SIGKILL)
        time.sleep(0.02)
    layout.pid_file(process, member).unlink(missing_ok=True)
    return True


def tail(layout: Layout, member: str, process: str) -> str:
    """The end of a log with its path, to be put behind an error."""
    file = layout.log(process, member)
    try:
        with file.open("rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(max(0, size - TAIL_BYTES))
            text = handle.read().decode(errors="replace")
    except OSError:
        return f" (no log at {file})"
    return f"; the end of {file}:\n{text}"


def wait(what: str, check: Callable[[], bool], seconds: float, explain: Callable[[], str], pause: float = 0.1) -> None:
    """Raises BedError with the explanation when time is up."""
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            raise BedError(f"{what}: not after {seconds:.0f} s{explain()}")
        time.sleep(pause)
