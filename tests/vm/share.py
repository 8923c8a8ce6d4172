"""Becomes a virtiofsd that serves this machine's root, which it can only read: ``share.py FD VIRTIOFSD``.

The guest mounts its share read-only, but its root user could mount it again, writable. Here that is refused on the
host's side: virtiofsd gets a mount namespace of its own in which every mount is read-only.
"""

import ctypes
import os
import signal
import sys

_CLONE_NEWNS = 0x20000
_SYS_MOUNT_SETATTR = 442  # the same on every architecture; mount_setattr(2)
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY = 1
_MS_PRIVATE = 1 << 18
_PR_SET_PDEATHSIG = 1


class _MountAttr(ctypes.Structure):
    """struct mount_attr of linux/mount.h"""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    attr = _MountAttr(attr_set=_MOUNT_ATTR_RDONLY, propagation=_MS_PRIVATE)
    _check("prctl", libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL))
    _check("unshare", libc.unshare(_CLONE_NEWNS))
    _check(
        "mount_setattr",
        libc.syscall(_SYS_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, ctypes.byref(attr), ctypes.sizeof(attr)),
    )
    listener, program = sys.argv[1:]
    options = ("source=/", "cache=always", "sandbox=chroot", "log_level=warn")
    arguments = [argument for option in options for argument in ("-o", option)]
    os.execv(program, [program, f"--fd={listener}", *arguments])


def _check(call: str, result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{call}: {os.strerror(code)}")


if __name__ == "__main__":
    main()
