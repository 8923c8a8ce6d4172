"""Images unpacked once for all nodes of all clusters.

A containerd of its own keeps a folder in the cache up to date; a new node's containerd begins with hard links to what
is there. That is safe, for blobs and layers are never written again; the databases, which are, become copies. A node
then starts in a second instead of half a minute, and two nodes' programs share their pages in memory.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.bed import processes
from tests.cluster.bed.errors import BedError

NAMESPACE = "k8s.io"
IMPORT_SECONDS = 300
_DATABASES = "*.db"
_OF_ONE_DAEMON = ("io.containerd.grpc.v1.introspection", "io.containerd.runtime.v2.task", "tmpmounts")


class Marks:
    """Which content of each image a containerd has: one file an image, for a name gets new contents."""

    def __init__(self, folder: Path):
        self._folder = folder

    def archives(self) -> dict[str, str]:
        """The archive's file name by the image's."""
        files = self._folder.iterdir() if self._folder.exists() else ()
        return {file.name: self._read(file.name).partition(" ")[0] for file in files}

    def missing(self, archives: Mapping[str, Path]) -> dict[str, Path]:
        return {name: path for name, path in archives.items() if self._read(name) != _content(path)}

    def set(self, name: str, archive: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / name).write_text(_content(archive))

    def copy(self, other: Marks) -> None:
        shutil.copytree(other._folder, self._folder, dirs_exist_ok=True)

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _read(self, name: str) -> str:
        file = self._folder / name
        return file.read_text() if file.exists() else ""


def _content(archive: Path) -> str:
    """Tells one content from another without reading it."""
    found = archive.stat()
    return f"{archive.name} {found.st_size} {found.st_mtime_ns}"


class Store:
    """`root` is containerd's. Any number of processes may use a store at the same time."""

    def __init__(self, folder: Path):
        self.folder, self.root, self.marks = folder, folder / "root", Marks(folder / "marks")
        self._unfinished = folder / "unfinished"

    def update(self, archives: Mapping[str, Path]) -> None:
        """Brings in those that aren't there, by the images' names. Raises BedError."""
        with self._locked(fcntl.LOCK_EX):
            if self._unfinished.exists():
                self._clear()
            missing = self.marks.missing(archives)
            if not missing:
                return
            self._unfinished.touch()
            try:
                self._import(missing.values())
            except BaseException:
                self._clear()
                raise
            for name, archive in missing.items():
                self.marks.set(name, archive)
            self._unfinished.unlink()

    def fill(self, target: Path, marks: Marks) -> None:
        """Makes `target` a containerd's root with what is here, whole or not at all: one with layers that its database
        doesn't know can't import any image ("file exists"). Raises BedError."""
        with self._locked(fcntl.LOCK_SH):
            if self._unfinished.exists() or not self.root.exists():
                return
            partial = target.with_name(f"{target.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
            self._copy(partial)
            partial.rename(target)
            marks.copy(self.marks)  # last: a node without marks only imports again what it has

    def _copy(self, target: Path) -> None:
        try:
            processes.run(["cp", "--archive", "--link", str(self.root), str(target)], seconds=IMPORT_SECONDS)
        except BedError:  # on another file system
            shutil.rmtree(target, ignore_errors=True)
            processes.run(["cp", "--archive", str(self.root), str(target)], seconds=IMPORT_SECONDS)
        for database in self.root.rglob(_DATABASES):
            copy = target / database.relative_to(self.root)
            copy.unlink()
            shutil.copy2(database, copy)
        for name in _OF_ONE_DAEMON:
            shutil.rmtree(target / name, ignore_errors=True)

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(handle, how)
            yield
        finally:
            os.close(handle)

    def _clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.marks.clear()
        self._unfinished.unlink(missing_ok=True)

    def _import(self, archives: Iterable[Path]) -> None:
        scratch = self.folder / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        with _daemon(self.root, scratch) as socket:
            for archive in archives:
                command = ["ctr", "--address", str(socket), "--namespace", NAMESPACE, "image", "import", str(archive)]
                processes.run(command, env=processes.environment(), seconds=IMPORT_SECONDS)
        shutil.rmtree(scratch)


def _config(root: Path, scratch: Path) -> str:
    return f"""version = 2
root = "{root}"
state = "{scratch / "state"}"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{scratch / "socket"}"
[ttrpc]
  address = "{scratch / "ttrpc"}"
"""


@contextmanager
def _daemon(root: Path, scratch: Path) -> Iterator[Path]:
    """A containerd with mounts of its own; its socket. It ends with us, however we end."""
    file, socket, log = scratch / "config.toml", scratch / "socket", scratch / "log"
    file.write_text(_config(root, scratch))
    # all of these become containerd in turn; its mounts are its own, and it ends when this process does
    command = [
        "setpriv",
        "--pdeathsig",
        "KILL",
        "unshare",
        "--mount",
        "containerd",
        "--config",
        str(file),
        "--log-level",
        "warn",
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=processes.environment())
    try:
        ask = ["ctr", "--address", str(socket), "version"]

        def answers() -> bool:
            if process.poll() is not None:
                raise BedError(f"the image store's containerd has ended: {log.read_text()[-2000:]}")
            return subprocess.run(ask, capture_output=True, check=False, env=processes.environment()).returncode == 0

        processes.wait("the image store's containerd", answers, 60, lambda: f": {log.read_text()[-2000:]}")
        yield socket
        process.terminate()  # it closes its databases
        process.wait(30)
    finally:
        process.kill()
        process.wait()
