"""Mounts a BPF file system (mount(2)): the standard library can't."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

_NOSUID, _NODEV, _NOEXEC = 2, 4, 8
_FLAGS: Final = _NOSUID | _NODEV | _NOEXEC


def mount_bpffs(path: Path) -> None:
    """A fresh BPF file system at `path`, readable for root only. Raises OSError naming the path."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(path), b"bpf", ctypes.c_ulong(_FLAGS), b"mode=0700") != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount a BPF file system at {path}: {os.strerror(code)}")
