"""Consumer of a BPF ring buffer."""

from __future__ import annotations

import errno
from types import TracebackType
from typing import Any, Self

from fimbria.kernel._libbpf import ffi, lib
from fimbria.kernel.fd import BpfError, check, error_text


class RingBuffer:
    """Reads a map of type RINGBUF. One reader per map: the kernel keeps one consumer position."""

    def __init__(self, map_fd: int) -> None:
        """Maps the buffer into memory; `map_fd` stays the caller's. Raises BpfError when it is no ring buffer."""
        self._ring: Any = ffi.NULL
        ring = lib.fim_ring_new(map_fd)
        if ring == ffi.NULL:
            code = ffi.errno or errno.EINVAL
            raise BpfError(code, f"ring buffer of descriptor {map_fd}: {error_text(code)}")
        self._ring = ring
        self.fd: int = lib.fim_ring_fd(ring)
        """Readable while there are records: for add_reader()."""

    def drain(self, max_records: int = 65536) -> list[bytes]:
        """Takes up to `max_records` records, oldest first, without waiting. Raises BpfError."""
        if self._ring == ffi.NULL:
            raise ValueError("RingBuffer is closed")
        n = check(lib.fim_ring_drain(self._ring, max_records), "drain ring buffer")
        if not n:
            return []
        ends = ffi.unpack(self._ring.ends, n)
        data = ffi.buffer(self._ring.data, ends[-1])[:]
        starts = [0, *ends[:-1]]
        return [data[a:b] for a, b in zip(starts, ends, strict=True)]

    def close(self) -> None:
        """Unmaps the buffer. May be called twice."""
        ring, self._ring = self._ring, ffi.NULL
        if ring != ffi.NULL:
            lib.fim_ring_free(ring)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_ring", ffi.NULL) != ffi.NULL:
            self.close()
