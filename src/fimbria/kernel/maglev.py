"""Maglev tables in C: what `fimbria.compute.maglev.fill` says, fast enough for every change of a Service."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable
from typing import Final

from fimbria.kernel._libbpf import ffi, lib

_MEMBER: Final = struct.Struct("=16sHHII")  # struct fim_member
Member = tuple[int, int, bytes, int, int]  # backend id, weight, address (16 bytes), port, protocol


def fill(members: Iterable[Member], size: int) -> bytes:
    """`size` backend ids of four bytes, in host order, for members sorted by what `compute.maglev.in_order` says.

    Raises ValueError for a backend id 0 or more than 32 bits, a size below 2 or above 2**20, MemoryError.
    """
    try:
        rows = (_MEMBER.pack(addr, port, proto, weight, backend) for backend, weight, addr, port, proto in members)
        packed = b"".join(rows)
    except struct.error as error:
        raise ValueError(f"a member of a Maglev table is out of range: {error}") from None
    table = ffi.new("uint32_t[]", max(size, 0))
    result = lib.fim_maglev(packed, len(packed) // _MEMBER.size, table, max(size, 0))
    if result == -errno.ENOMEM:
        raise MemoryError(f"a Maglev table of {size} entries")
    if result < 0:
        raise ValueError(f"a Maglev table of {size} entries: {os.strerror(-result)}")
    return bytes(ffi.buffer(table))
