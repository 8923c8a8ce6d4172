"""Puts the CNI plugin and its configuration where the container runtime looks for them.

The configuration's `cniVersion` is what old runtimes go by; newer ones (libcni 1.2 and later) take the highest of
`cniVersions` (CNI specification, section 1). A runtime uses the first configuration of its folder in lexical order.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

log = logging.getLogger(__name__)
CONF_NAME: Final = "05-fimbria.conflist"
BINARY: Final = "fimbria-cni"
CONFIG: Final[Mapping[str, Any]] = {
    "cniVersion": "0.4.0",
    "cniVersions": ["0.4.0", "1.0.0", "1.1.0"],
    "name": "fimbria",
    "plugins": [{"type": BINARY, "capabilities": {"portMappings": True}}],
}
_SUFFIXES: Final = (".conf", ".conflist", ".json")  # what libcni reads


class InstallError(OSError):
    """A file could not be put in place; the text names it, the reason, and the setting that says where it goes."""


def install_cni(bin_dir: Path, conf_dir: Path, plugin: Path | None = None) -> tuple[str, ...]:
    """Binary first, then configuration, each by rename: a runtime never sees half of either, nor one without the other.

    `plugin` is the binary to install, by default the one that came with us. Returns the names of configurations that
    the runtime prefers to ours. Raises InstallError.
    """
    source = plugin or Path(str(files("fimbria"))) / "_bin" / BINARY
    try:
        content = source.read_bytes()
    except OSError as error:
        raise InstallError(error.errno, f"the CNI plugin {source} can't be read: {error.strerror}") from None
    _place(bin_dir / BINARY, content, 0o755, "--cni-bin-dir")
    _place(conf_dir / CONF_NAME, json.dumps(CONFIG, indent=2).encode() + b"\n", 0o644, "--cni-conf-dir")
    preferred = rivals(conf_dir)
    if preferred:
        log.warning(
            "the container runtime uses %s in %s instead of our %s: remove it, or rename it so that it sorts behind",
            ", ".join(preferred), conf_dir, CONF_NAME,
        )  # fmt: skip
    return preferred


def rivals(conf_dir: Path) -> tuple[str, ...]:
    """Configurations that sort before ours."""
    return tuple(sorted(p.name for p in conf_dir.iterdir() if p.suffix in _SUFFIXES and p.name < CONF_NAME))


def _place(path: Path, content: bytes, mode: int, setting: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        if not _is_there(path, content, mode):
            _replace(path, content, mode)
    except OSError as error:
        raise InstallError(error.errno, f"{path} can't be written ({setting}): {error.strerror}") from None


def _is_there(path: Path, content: bytes, mode: int) -> bool:
    with suppress(FileNotFoundError):
        return path.stat().st_mode & 0o7777 == mode and path.read_bytes() == content
    return False


def _sweep(path: Path) -> None:
    """What an installation that was killed left behind."""
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink(missing_ok=True)


def _replace(path: Path, content: bytes, mode: int) -> None:
    # A rename also replaces a binary that is running, which writing to it would not.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
