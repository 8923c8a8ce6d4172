"""Owned file descriptors of BPF objects, errors, and pinning."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fimbria.kernel._libbpf import ffi, lib

lib.fim_init()

_ENOTSUPP = 524  # kernel-internal, leaks through bpf(2); the C library has no text for it


class BpfError(OSError):
    """A failed bpf(2) call; `errno` as the kernel gave it, the message names the object."""


def error_text(code: int) -> str:
    """The text of a positive errno."""
    return "operation not supported by this kernel object" if code == _ENOTSUPP else os.strerror(code)


def check(result: int, what: str) -> int:
    """Returns `result`, or raises BpfError(`what`) when it is a negative errno."""
    if result < 0:
        raise BpfError(-result, f"{what}: {error_text(-result)}")
    return result


class Fd:
    """An owned file descriptor, closed by `close()`, by a `with` block, or at the latest with the object."""

    _fd = -1  # class default: __del__ runs even when __init__ raised

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def fd(self) -> int:
        """The descriptor. Raises ValueError once closed."""
        if self._fd < 0:
            raise ValueError(f"{type(self).__name__} is closed")
        return self._fd

    def fileno(self) -> int:
        """The descriptor, under the name that select and os expect."""
        return self.fd

    @property
    def closed(self) -> bool:
        """True after close()."""
        return self._fd < 0

    def close(self) -> None:
        """Closes the descriptor; pins and other references keep the kernel object alive. May be called twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            self.close()


_TEMPORARY = "_new"


def pin_fd(fd: int, path: str | os.PathLike[str]) -> None:
    """Pins at `path`, replacing what is pinned there in one step. The directory must exist on a bpffs.

    Raises BpfError.
    """
    target = os.fspath(path)
    # bpffs refuses dots in names, hence the spelling of the temporary one.
    temp = f"{target}{_TEMPORARY}{os.getpid()}_{fd}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temp)
    check(lib.bpf_obj_pin(fd, os.fsencode(temp)), f"pin {target}")
    try:
        os.rename(temp, target)
    except OSError as e:
        os.unlink(temp)
        raise BpfError(e.errno, f"pin {target}: {e.strerror}") from e


def is_pinned_whole(path: Path) -> bool:
    """False for the name that `pin_fd` uses for a moment."""
    return _TEMPORARY not in path.name


def open_pin(path: str | os.PathLike[str]) -> int:
    """A new descriptor of the object pinned at `path`. Raises BpfError (ENOENT when nothing is pinned there)."""
    return check(lib.bpf_obj_get(os.fsencode(path)), f"open pin {os.fspath(path)}")


def unpin(path: str | os.PathLike[str]) -> bool:
    """Removes a pin; False when there was none."""
    try:
        Path(path).unlink()
    except FileNotFoundError:
        return False
    return True


def c_name(raw: Any) -> str:
    """A NUL-terminated name of the kernel's or of libbpf's."""
    return str(ffi.string(raw).decode(errors="replace"))
