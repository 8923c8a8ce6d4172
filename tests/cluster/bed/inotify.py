"""Whether the machine lets as many watch files as a cluster has: the limit is one for all of root's processes.

A kubelet that gets none ends, or goes on and doesn't see its files change. The machine's settings are its owner's:
`up` says what is missing before it starts anything, and changes nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.cluster.bed.errors import BedError

LIMIT = Path("/proc/sys/fs/inotify/max_user_instances")
# Counted: 7 of kubelet, 1 of containerd, 12 of the control plane; the rest is for what tests start.
OF_A_NODE, OF_THE_CONTROL_PLANE = 12, 16


def check(new_nodes: int, *, control: bool) -> None:
    """Raises BedError if there isn't room for as many more nodes, and (`control`) for a control plane."""
    needed = new_nodes * OF_A_NODE + control * OF_THE_CONTROL_PLANE
    if needed and (problem := lacking(int(LIMIT.read_text()), used(), needed)):
        raise BedError(problem)


def lacking(limit: int, taken: int, needed: int) -> str:
    """What is wrong, "" for nothing. Pure."""
    if taken + needed <= limit:
        return ""
    enough = max(1024, 2 * (taken + needed))
    return (
        f"fs.inotify.max_user_instances is {limit}: {taken} are in use and the cluster needs {needed} more; "
        f"`sysctl -w fs.inotify.max_user_instances={enough}` makes room until the next boot"
    )


def used() -> int:
    """How many root's processes have."""
    return sum(os.path.basename(target) == "anon_inode:inotify" for target in _open_files())


def _open_files() -> Iterator[str]:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if process.stat().st_uid != 0:
                continue
            for file in (process / "fd").iterdir():
                with suppress(OSError):
                    yield os.readlink(file)
