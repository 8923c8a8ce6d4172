"""What a lab remembers in its state directory: settings and processes. The directory is a tmpfs of its own, so that
node disks can be overlays wherever /run is, and so that one unmount removes all of it."""

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fimbria.lab import kernel
from fimbria.lab.errors import LabError
from fimbria.lab.kernel import Process
from fimbria.lab.layout import STATE_ROOT, LabSpec, Paths

INIT = "init"


@contextmanager
def locked(lab: str) -> Iterator[None]:
    """Keeps two commands from building or removing the same lab at once. Raises LabError if another is at it."""
    STATE_ROOT.mkdir(mode=0o700, exist_ok=True)
    path = STATE_ROOT / f".{lab}.lock"
    lock = _take_lock(lab, path)
    try:
        yield
    finally:
        if not Paths(lab).state.exists():
            path.unlink()
        os.close(lock)
        with contextlib.suppress(OSError):
            STATE_ROOT.rmdir()  # refused while other labs are there


def _take_lock(lab: str, path: Path) -> int:
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise LabError(f"another command is bringing lab {lab} up or down right now") from None
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            return lock
        os.close(lock)  # its owner removed the file between our opening and locking it


def create(spec: LabSpec) -> None:
    paths = Paths(spec.name)
    paths.state.mkdir(mode=0o700)
    kernel.mount("tmpfs", paths.state, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=700")
    nodes = [paths.disk(n) for n in spec.node_names]
    for directory in (paths.logs, paths.processes, paths.database.parent, nodes[0].parent, *nodes):
        directory.mkdir(mode=0o700)
    write(paths.spec, json.dumps(spec.to_json()))


def write(path: Path, text: str) -> None:
    """Whole or not at all, and for root only."""
    tmp = path.with_name(f".{path.name}.tmp")
    tmp.touch(mode=0o600)
    tmp.write_text(text)
    tmp.rename(path)


def load(lab: str) -> LabSpec:
    """Raises LabError if there is no such lab."""
    try:
        values = json.loads(Paths(lab).spec.read_text())
        return LabSpec(**values | {k: tuple(values[k]) for k in ("agent_options", "zones")})
    except FileNotFoundError:
        raise LabError(f"there is no lab {lab}: fimbria lab up --name {lab}") from None
    except PermissionError:
        raise LabError("the lab needs root") from None


def labs() -> list[str]:
    """Names of all labs with a state directory."""
    if not STATE_ROOT.is_dir():
        return []
    return sorted(p.name for p in STATE_ROOT.iterdir() if p.is_dir())


# A process is named MEMBER/COMPONENT: node1/agent, control/apiserver. Its file is MEMBER.COMPONENT.


def remember(paths: Paths, name: str, process: Process) -> None:
    write(paths.processes / name.replace("/", "."), f"{process.pid} {process.start}\n")


def recall(paths: Paths, name: str) -> Process | None:
    """The process, dead or alive, or None if it was never started."""
    try:
        pid, start = (paths.processes / name.replace("/", ".")).read_text().split()
    except FileNotFoundError:
        return None
    return Process(int(pid), int(start))


def processes(paths: Paths) -> dict[str, Process]:
    """All processes ever started, by name."""
    found = {}
    for path in sorted(paths.processes.iterdir()):
        if re.fullmatch(r"[a-z0-9-]+\.[a-z0-9-]+", path.name):
            name = path.name.replace(".", "/")
            known = recall(paths, name)
            if known:
                found[name] = known
    return found
