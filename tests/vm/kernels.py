"""Debian kernels for the virtual machines: fetched once by apt, unpacked into a cache, never installed.

A kernel is named by its series ("6.1", "6.12") or by its whole release ("6.12.95+deb12-cloud-amd64"). A series
resolves to the newest release in the cache, so that a test run doesn't change under one's feet; only when the
cache has none does apt choose, the newest it knows. Delete a kernel's directory to have it fetched anew.

The cache is ``$FIMBRIA_CACHE`` (default ``~/.cache/fimbria``), below it ``kernels/<release>/`` with ``vmlinuz`` and
``lib/modules/<release>``.
"""

import fcntl
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"[0-9]+\.[0-9]+(?:[0-9A-Za-z.+~-]*)")
_PACKAGE = re.compile(r"linux-image-(?P<release>\S+-cloud-amd64)-unsigned")


class KernelError(Exception):
    """No such kernel, or it couldn't be fetched or unpacked; the text names the kernel."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: `release` is what ``uname -r`` says in the guest."""

    release: str
    directory: Path

    @property
    def image(self) -> Path:
        return self.directory / "vmlinuz"

    @property
    def modules(self) -> Path:
        return self.directory / "lib" / "modules" / self.release


def cache_root() -> Path:
    """The directory that holds the kernels; it may not exist yet."""
    base = os.environ.get("FIMBRIA_CACHE") or Path.home() / ".cache" / "fimbria"
    return Path(base).absolute() / "kernels"


def release_key(release: str) -> tuple[int, ...]:
    """Sort key that puts 6.1.0-9 before 6.1.0-56 and 6.12.95 before 6.12.117."""
    return tuple(int(number) for number in re.findall(r"[0-9]+", release))


def matches(name: str, release: str) -> bool:
    """Whether `release` is the kernel `name` or one of the series `name` ("6.1" isn't "6.12")."""
    return release == name or re.match(re.escape(name) + r"(?![0-9])", release) is not None


def newest(name: str, releases: list[str]) -> str | None:
    return max((r for r in releases if matches(name, r)), key=release_key, default=None)


def cached() -> list[Kernel]:
    """All unpacked kernels, oldest first."""
    root = cache_root()
    names = [p.name for p in root.iterdir() if (p / "vmlinuz").is_file()] if root.is_dir() else []
    return [Kernel(name, root / name) for name in sorted(names, key=release_key) if not name.startswith(".")]


def get(name: str) -> Kernel:
    """The kernel `name`, fetched if the cache has none of that name.

    Raises KernelError when the name is malformed, apt knows no such kernel, or a step of fetching it fails.
    """
    if not _NAME.fullmatch(name):
        raise KernelError(f"kernel {name!r}: not a series such as 6.12 or a release such as 6.12.95+deb12-cloud-amd64")
    with _locked():
        release = newest(name, [kernel.release for kernel in cached()])
        if release is None:
            release = _resolve(name)
            _fetch(release)
        return Kernel(release, cache_root() / release)


@contextmanager
def _locked() -> Iterator[None]:
    """Holds the cache against other processes, and clears away what an interrupted one left."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in root.glob(".new-*"):
            shutil.rmtree(leftover)
        yield


def _resolve(name: str) -> str:
    release = newest(name, _available())
    if release is None:
        _run(name, ["apt-get", "update", "-qq"])
        release = newest(name, _available())
    if release is None:
        raise KernelError(
            f"kernel {name}: apt knows no linux-image-{name}*-cloud-amd64-unsigned; "
            "scripts/setup adds the backports source that has newer kernels than Debian's own"
        )
    return release


def _available() -> list[str]:
    """Releases apt could download, from any of its sources."""
    command = ["apt-cache", "search", "--names-only", "^linux-image-.*-cloud-amd64-unsigned$"]
    lines = _run("list", command).splitlines()
    return [m["release"] for line in lines if (m := _PACKAGE.match(line))]


def _fetch(release: str) -> None:
    """Unpacks into a temporary directory beside the final one and renames it: it is there whole, or not at all."""
    root = cache_root()
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
    try:
        package = _download(release, new)
        _run(release, ["dpkg", "-x", str(package), str(new / "unpacked")])
        kernel = Kernel(release, new / "kernel")
        kernel.modules.parent.mkdir(parents=True)
        shutil.move(new / "unpacked" / "boot" / f"vmlinuz-{release}", kernel.image)
        shutil.move(_unpacked_modules(new / "unpacked", release), kernel.modules)
        for module in kernel.modules.rglob("*.ko.xz"):
            # Unpacking them in the guest, at every modprobe, is what emulation is slowest at.
            module.with_suffix("").write_bytes(lzma.decompress(module.read_bytes()))
            module.unlink()
        _run(release, ["depmod", "-b", str(kernel.directory), release])
        kernel.directory.chmod(0o755)
        kernel.directory.rename(root / release)
    except (OSError, lzma.LZMAError) as error:
        raise KernelError(f"kernel {release}: can't unpack it: {error}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _unpacked_modules(unpacked: Path, release: str) -> Path:
    """Where the package put its modules: below /usr since trixie."""
    for prefix in (unpacked, unpacked / "usr"):
        if (prefix / "lib" / "modules" / release).is_dir():
            return prefix / "lib" / "modules" / release
    raise KernelError(f"kernel {release}: its package has no modules (split packages aren't handled)")


def _download(release: str, into: Path) -> Path:
    command = ["apt-get", "download", "-qq", f"linux-image-{release}-unsigned"]
    try:
        _run(release, command, cwd=into)
    except KernelError:  # the package lists may be older than the mirror
        _run(release, ["apt-get", "update", "-qq"])
        _run(release, command, cwd=into)
    packages = list(into.glob("*.deb"))
    if len(packages) != 1:
        raise KernelError(f"kernel {release}: apt-get download left {len(packages)} packages instead of one")
    return packages[0]


def _run(name: str, command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise KernelError(f"kernel {name}: {command[0]} isn't installed; run scripts/setup --test") from None
    if done.returncode:
        raise KernelError(f"kernel {name}: {' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
