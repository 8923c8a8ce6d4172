"""Runs in the guest: can the kernel do what the datapath needs at the least? Prints one JSON object.

Makes a namespace and a veth pair into it, loads a one-instruction program that accepts or drops, and attaches it
to the host's end at the clsact hook and as a tcx link; a ping tells whether it took effect.
Keys: ``plain``, ``clsact_ok``, ``clsact_drop``, ``tcx_drop`` (whether the ping was answered), ``tcx`` (0 or errno).
"""

import ctypes
import errno
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

_SYS_BPF = 321  # x86-64
_PROG_LOAD, _OBJ_PIN, _LINK_CREATE = 5, 6, 28  # enum bpf_cmd of linux/bpf.h
_SCHED_CLS, _TCX_INGRESS = 3, 46
_TC_ACT_OK, _TC_ACT_SHOT = 0, 2

_NETNS, _LINK, _PEER = "fimvmprobe", "fimvmp0", "fimvmp1"
_PINS = Path("/sys/fs/bpf")
_libc = ctypes.CDLL(None, use_errno=True)


def bpf(command: int, attributes: bytes) -> int:
    """The bpf(2) system call; returns its descriptor, raises OSError."""
    result = int(_libc.syscall(_SYS_BPF, command, attributes, len(attributes)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def load(verdict: int) -> int:
    """Loads ``r0 = verdict; exit`` and returns its descriptor."""
    code = ctypes.create_string_buffer(struct.pack("<BBhi", 0xB7, 0, 0, verdict) + struct.pack("<BBhi", 0x95, 0, 0, 0))
    licence = ctypes.create_string_buffer(b"GPL")
    head = struct.pack("<IIQQ", _SCHED_CLS, 2, ctypes.addressof(code), ctypes.addressof(licence))
    return bpf(_PROG_LOAD, head.ljust(72, b"\0"))


def pin(descriptor: int, path: Path) -> None:
    name = ctypes.create_string_buffer(bytes(path))
    bpf(_OBJ_PIN, struct.pack("<QII", ctypes.addressof(name), descriptor, 0))


def link(descriptor: int) -> int:
    return bpf(
        _LINK_CREATE, struct.pack("<IIII", descriptor, socket.if_nametoindex(_LINK), _TCX_INGRESS, 0).ljust(64, b"\0")
    )


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def ping() -> bool:
    command = ["ip", "netns", "exec", _NETNS, "busybox", "ping", "-c", "1", "-W", "2", "192.0.2.1"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode == 0


def clsact(verdict: int) -> bool:
    path = _PINS / f"{_LINK}-{verdict}"
    descriptor = load(verdict)
    pin(descriptor, path)
    run(
        "tc", "filter", "replace", "dev", _LINK, "ingress", "prio", "1", "handle", "1", "bpf", "da", "pinned", str(path)
    )
    os.close(descriptor)
    path.unlink()
    return ping()


def main() -> None:
    run("ip", "netns", "add", _NETNS)
    run("ip", "link", "add", _LINK, "type", "veth", "peer", "name", _PEER, "netns", _NETNS)
    run("ip", "addr", "add", "192.0.2.1/24", "dev", _LINK)
    run("ip", "link", "set", _LINK, "up")
    run("ip", "-n", _NETNS, "addr", "add", "192.0.2.2/24", "dev", _PEER)
    run("ip", "-n", _NETNS, "link", "set", _PEER, "up")
    found: dict[str, bool | int] = {"plain": ping()}
    run("tc", "qdisc", "add", "dev", _LINK, "clsact")
    found["clsact_ok"] = clsact(_TC_ACT_OK)
    found["clsact_drop"] = clsact(_TC_ACT_SHOT)
    run("tc", "qdisc", "del", "dev", _LINK, "clsact")
    try:
        link(load(_TC_ACT_SHOT))
        found["tcx"] = 0
    except OSError as error:
        found["tcx"] = error.errno or errno.EIO
    found["tcx_drop"] = ping()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
