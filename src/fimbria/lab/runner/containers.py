"""Containers and pod sandboxes as processes and files, so that a new runner finds what an old one started.

A pod's directory (DIRECTORY/<pod uid>/) holds sandbox.json, the files mounted into it, and per container and attempt
a directory with what its shim wrote: `shim` (pid and start time), `pid`, and at the end `exit`.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fimbria.lab import kernel
from fimbria.lab.errors import LabError
from fimbria.lab.kernel import Process

NETNS = Path("/run/netns")
LOST = 137  # exit code of a container whose shim ended without a word: as if killed


@dataclass(frozen=True)
class Sandbox:
    """What survives the runner: who the pod is, its network namespace ("" for the node's) and its addresses."""

    uid: str
    namespace: str
    name: str
    netns: str
    addresses: tuple[str, ...] = ()
    capabilities: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Running:
    """A started container."""

    directory: Path
    shim: Process
    pid: int


@dataclass(frozen=True)
class Start:
    """A container to start. `binds` are SOURCE:TARGET files mounted over the node's."""

    name: str
    attempt: int
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    hostname: str
    binds: Sequence[str]


class Store:
    """The runner's directory on the node."""

    def __init__(self, directory: Path, cgroup: Path, logs: Path) -> None:
        self.directory, self.cgroup, self.logs = directory, cgroup, logs

    def pod(self, uid: str) -> Path:
        return self.directory / uid

    def sandboxes(self) -> list[Sandbox]:
        found = []
        for path in sorted(self.directory.glob("*/sandbox.json")):
            values = json.loads(path.read_text())
            found.append(Sandbox(**values | {"addresses": tuple(values["addresses"])}))
        return found

    def save(self, sandbox: Sandbox) -> None:
        directory = self.pod(sandbox.uid)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.cgroup / sandbox.uid).mkdir(exist_ok=True)
        tmp = directory / ".sandbox.json"
        tmp.write_text(
            json.dumps(
                {
                    "uid": sandbox.uid,
                    "namespace": sandbox.namespace,
                    "name": sandbox.name,
                    "netns": sandbox.netns,
                    "addresses": list(sandbox.addresses),
                    "capabilities": dict(sandbox.capabilities or {}),
                }
            )
        )
        tmp.rename(directory / "sandbox.json")

    def remove(self, uid: str) -> None:
        """The pod's processes, cgroup and files. Logs stay."""
        kernel.cgroup_kill(self.cgroup / uid)
        shutil.rmtree(self.pod(uid), ignore_errors=True)

    def log(self, sandbox: Sandbox, container: str) -> Path:
        directory = self.logs / f"{sandbox.namespace}_{sandbox.name}_{sandbox.uid}"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        return directory / f"{container}.log"

    def container(self, uid: str, name: str, attempt: int) -> Path:
        return self.pod(uid) / "containers" / name / str(attempt)

    def last_attempt(self, uid: str, name: str) -> int:
        """-1 if the container never started."""
        directory = self.pod(uid) / "containers" / name
        return max((int(p.name) for p in directory.glob("[0-9]*")), default=-1)

    def cgroups(self) -> set[str]:
        return {p.name for p in self.cgroup.iterdir() if p.is_dir()}


def create_netns(name: str) -> str:
    """A namespace below the node's /run/netns, with its loopback up. Returns the path."""
    kernel.ip("netns", "add", name)
    kernel.ip("-n", name, "link", "set", "lo", "up")
    return str(NETNS / name)


def delete_netns(path: str) -> None:
    """The kernel removes what is in it once the last process has left."""
    name = Path(path)
    if name.exists():
        kernel.umount(name)
        name.unlink(missing_ok=True)


async def launch(store: Store, sandbox: Sandbox, container: Start) -> Running:
    """Starts a container below a shim. Raises LabError if it can't be set up."""
    directory = store.container(sandbox.uid, container.name, container.attempt)
    directory.mkdir(parents=True, mode=0o700)
    shim = await asyncio.to_thread(_start_shim, store, sandbox, container, directory)
    for _ in range(500):
        if (directory / "pid").exists():
            found = find(directory)
            if found:
                return found
        if shim.poll() is not None:
            log = store.log(sandbox, container.name)
            raise LabError(f"container {container.name} could not be set up: {_last_line(log)}")
        await asyncio.sleep(0.002)
    shim.kill()
    raise LabError(f"container {container.name} wasn't set up in time")


def _start_shim(store: Store, sandbox: Sandbox, container: Start, directory: Path) -> "subprocess.Popen[bytes]":
    """Not through asyncio: the shim may outlive us, and is watched by pidfd like one that we adopted."""
    group = store.cgroup / sandbox.uid / container.name
    group.mkdir(exist_ok=True)
    log = store.log(sandbox, container.name)
    options = ["--dir", str(directory), "--cgroup", str(group), "--log", str(log), "--cwd", container.cwd]
    if sandbox.netns:
        options += ["--netns", sandbox.netns, "--hostname", container.hostname]
    for bind in container.binds:
        options += ["--bind", bind]
    null = subprocess.DEVNULL
    return subprocess.Popen(
        [kernel.binary("labrun"), "shim", *options, "--", *container.argv],
        env=dict(container.env),
        cwd="/",
        stdin=null,
        stdout=null,
        stderr=null,
    )


def last_words(store: Store, sandbox: Sandbox, container: str) -> str:
    """The end of a container's log as terminationMessagePolicy FallbackToLogsOnError shows it: 2048 bytes, 80 lines."""
    try:
        with store.log(sandbox, container).open("rb") as log:
            log.seek(max(log.seek(0, os.SEEK_END) - 2048, 0))
            text = log.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-80:])


def _last_line(log: Path) -> str:
    try:
        return (log.read_text(errors="replace").splitlines() or [""])[-1]
    except OSError:
        return ""


def find(directory: Path) -> Running | None:
    """The container that was started in a directory, dead or alive; None if it never got a process."""
    try:
        pid, start = (directory / "shim").read_text().split()
        return Running(directory, Process(int(pid), int(start)), int((directory / "pid").read_text()))
    except (FileNotFoundError, ValueError):
        return None


async def wait(running: Running) -> int:
    """The exit code, as soon as the shim has ended; for a container that is dead already, at once."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(running.shim.pid)
        try:
            if running.shim.alive():
                await _readable(fd)
        finally:
            os.close(fd)
    _reap(running.shim.pid)
    return exit_code(running)


def _reap(pid: int) -> None:
    """If it is our child, and not one of a former runner that init takes care of."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, _set, future)
    try:
        await future
    finally:
        loop.remove_reader(fd)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def exit_code(running: Running) -> int:
    try:
        return int((running.directory / "exit").read_text())
    except (FileNotFoundError, ValueError):
        return LOST


async def stop(running: Running, grace: float) -> None:
    """SIGTERM to the container's first process, SIGKILL to all after `grace` seconds."""
    if running.shim.alive() and not (running.directory / "exit").exists():
        _signal(running, signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                await wait(running)
                return
        except TimeoutError:
            _signal(running, signal.SIGKILL)
            await wait(running)


def _signal(running: Running, number: int) -> None:
    # the pid can't have been reused: its parent, the shim, is alive and hasn't recorded an exit
    with contextlib.suppress(ProcessLookupError):
        os.kill(running.pid, number)


async def execute(running: Running, argv: Sequence[str], patience: float) -> int:
    """Runs a command inside a container (exec probes); the exit code, or 124 after `patience` seconds."""
    null = subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(
        kernel.binary("labrun"),
        "enter",
        "--target",
        str(running.pid),
        "--",
        *argv,
        stdin=null,
        stdout=null,
        stderr=null,
    )
    try:
        async with asyncio.timeout(patience):
            return await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
        return 124
