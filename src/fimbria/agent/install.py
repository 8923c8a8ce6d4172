"""Puts the CNI plugin and its configuration where the container runtime looks for them.

The configuration's `cniVersion` is what old runtimes go by; newer ones (libcni 1.2 and later) take the highest of
`cniVersions` (CNI specification, section 1). A runtime uses the first configuration of its folder in lexical order.

Rules
1. The plugin first, the configuration only by an agent that can serve: a runtime that finds it calls the node ready.
2. Taking over from another plugin leaves no moment without a configuration: ours is in place before theirs goes aside.
3. What is set aside keeps its content under another name, and `put_back` undoes it.
"""

from __future__ import annotations

import asyncio
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
ASIDE: Final = ".fimbria_bak"
KEEP_INTERVAL: Final = 5.0
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
    """Plugin and configuration. Returns the names of configurations that the runtime prefers. Raises InstallError."""
    install_plugin(bin_dir, plugin)
    return install_config(conf_dir)


def install_plugin(bin_dir: Path, plugin: Path | None = None) -> None:
    """By rename: a runtime never sees half of it. `plugin` is the binary to install, by default the one that came with
    us. Raises InstallError."""
    source = plugin or Path(str(files("fimbria"))) / "_bin" / BINARY
    try:
        content = source.read_bytes()
    except OSError as error:
        raise InstallError(error.errno, f"the CNI plugin {source} can't be read: {error.strerror}") from None
    _place(bin_dir / BINARY, content, 0o755, "--cni-bin-dir")


def install_config(conf_dir: Path, *, exclusive: bool = False) -> tuple[str, ...]:
    """By rename. Those of other plugins are set aside if `exclusive`; otherwise the names of those that the runtime
    prefers to ours are logged and returned. Raises InstallError."""
    _place(conf_dir / CONF_NAME, json.dumps(CONFIG, indent=2).encode() + b"\n", 0o644, "--cni-conf-dir")
    if exclusive:
        for name in set_aside(conf_dir):
            log.warning("%s of another network plugin is set aside: it is %s now", conf_dir / name, name + ASIDE)
        return ()
    preferred = rivals(conf_dir)
    if preferred:
        log.warning(
            "the container runtime uses %s in %s instead of our %s: remove it, or rename it so that it sorts behind",
            ", ".join(preferred), conf_dir, CONF_NAME,
        )  # fmt: skip
    return preferred


def config_problem(conf_dir: Path, *, exclusive: bool = False) -> str:
    """What is wrong in the folder, "" for nothing. Without `exclusive` others may be there, and before ours, as that of
    a plugin that calls ours."""
    try:
        others = _others(conf_dir) if exclusive else ()
        if not (conf_dir / CONF_NAME).is_file():
            return f"{conf_dir / CONF_NAME} is missing"
    except OSError as error:
        return f"{conf_dir} can't be read: {error.strerror}"
    return f"{conf_dir} has {', '.join(others)} of other network plugins" if others else ""


async def keep_config(conf_dir: Path, *, exclusive: bool) -> None:
    """Until cancelled: put back what somebody removed, and set aside what another plugin's installer writes again."""
    told = ""
    while True:
        await asyncio.sleep(KEEP_INTERVAL)
        problem = config_problem(conf_dir, exclusive=exclusive)
        if not problem:
            told = ""
            continue
        try:
            if problem != told:
                log.warning("drift: %s", problem)
                install_config(conf_dir, exclusive=exclusive)
        except OSError as error:
            log.error("%s", error)
        told = problem


def set_aside(conf_dir: Path) -> tuple[str, ...]:
    """Rename all configurations but ours so that runtimes don't see them; returns their former names."""
    found = _others(conf_dir)
    for name in found:
        path = conf_dir / name
        path.rename(path.with_name(name + ASIDE))
    return found


def put_back(conf_dir: Path) -> tuple[str, ...]:
    """Undo `set_aside`, except where a file of that name is there again; returns the names."""
    found = []
    for path in sorted(conf_dir.glob(f"*{ASIDE}")):
        name = path.name.removesuffix(ASIDE)
        if not (conf_dir / name).exists():
            path.rename(conf_dir / name)
            found.append(name)
    return tuple(found)


def remove_config(conf_dir: Path) -> tuple[str, ...]:
    """What was set aside back in place, then ours away: the reverse of taking over. Returns the names put back."""
    found = put_back(conf_dir)
    (conf_dir / CONF_NAME).unlink(missing_ok=True)
    return found


def rivals(conf_dir: Path) -> tuple[str, ...]:
    """Configurations that sort before ours."""
    return tuple(name for name in _others(conf_dir) if name < CONF_NAME)


def _others(conf_dir: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in conf_dir.iterdir() if p.suffix in _SUFFIXES and p.name != CONF_NAME))


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
