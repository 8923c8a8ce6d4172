"""The guest's first file system: busybox, the modules that mount the host's root, and what to run there.

An uncompressed cpio archive in the "newc" format (kernel documentation, driver-api/early-userspace/buffer-format).
"""

import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kernels import Kernel

# What the guest needs to see the host's files (virtiofs under an overlay) and to answer (virtio_console).
_MODULES = ("virtio_pci", "virtio_console", "virtiofs", "overlay")
_DIRECTORIES = ("bin", "dev", "host", "modules", "new", "proc", "repo", "sys", "upper")
_INIT = Path(__file__).with_name("init.sh")


class InitrdError(Exception):
    """A part of the initrd is missing; the text names it."""


@dataclass
class Archive:
    """A cpio archive in the making."""

    _data: bytearray = field(default_factory=bytearray)
    _count: int = 0

    def directory(self, name: str) -> None:
        self._add(name, 0o040755, b"")

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self._add(name, 0o100000 | mode, content)

    def finish(self) -> bytes:
        """The archive with its trailer; nothing can be added afterwards."""
        self._add("TRAILER!!!", 0, b"")
        return bytes(self._data)

    def _add(self, name: str, mode: int, content: bytes) -> None:
        self._count += 1
        path = name.encode() + b"\0"
        # ino, mode, uid, gid, nlink, mtime, size, device and rdevice (major, minor each), name size, checksum
        numbers = (self._count, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        self._data += b"070701" + b"".join(b"%08X" % number for number in numbers) + path
        self._pad()
        self._data += content
        self._pad()

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)


def module_files(kernel: Kernel, names: Sequence[str]) -> list[Path]:
    """The files of the modules `names` and of what they depend on, in the order to insert them.

    Modules built into the kernel have none. Raises InitrdError for a module that is neither a file nor built in.
    """
    lines = (kernel.modules / "modules.dep").read_text().splitlines()
    needs = {path: rest.split() for path, rest in (line.split(":", 1) for line in lines)}
    by_name = {_module_name(path): path for path in needs}
    builtin = {_module_name(path) for path in (kernel.modules / "modules.builtin").read_text().split()}
    order: list[str] = []
    for name in names:
        if name in by_name:
            # depmod lists what is needed farthest first from the right
            order += [p for p in (*reversed(needs[by_name[name]]), by_name[name]) if p not in order]
        elif name not in builtin:
            raise InitrdError(f"kernel {kernel.release} has no module {name}, which the guest needs to start")
    return [kernel.modules / path for path in order]


def _module_name(path: str) -> str:
    return re.sub(r"\.ko(\.\w+)?$", "", Path(path).name).replace("-", "_")


def job(argv: Sequence[str], cwd: Path, env: Mapping[str, str]) -> str:
    """Shell text that runs `argv` in `cwd` with exactly the environment `env`."""
    for name in env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise InitrdError(f"environment variable {name!r}: not a name the guest's shell can set")
    assignments = [f"{name}={value}" for name, value in env.items()]
    return f"cd {shlex.quote(str(cwd))} || exit 126\nexec {shlex.join(['env', '-i', *assignments, *argv])}\n"


def build(kernel: Kernel, job_text: str, settings: Mapping[str, str]) -> bytes:
    """The initrd that boots `kernel` and runs `job_text`; `settings` are the variables that init.sh reads.

    Raises InitrdError when busybox or a needed module is missing.
    """
    busybox = shutil.which("busybox")
    if busybox is None:
        raise InitrdError("busybox isn't installed; run scripts/setup --test")
    archive = Archive()
    for name in _DIRECTORIES:
        archive.directory(name)
    archive.file("bin/busybox", Path(busybox).read_bytes(), 0o755)
    for number, path in enumerate(module_files(kernel, _MODULES)):
        archive.file(f"modules/{number:02}-{path.name}", path.read_bytes())
    archive.file("settings", "".join(f"{k}={shlex.quote(v)}\n" for k, v in settings.items()).encode())
    archive.file("job", job_text.encode())
    archive.file("init", _INIT.read_bytes(), 0o755)
    return archive.finish()
