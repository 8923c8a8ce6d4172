"""Waiting until every BPF program that is running now has ended."""

from __future__ import annotations

from fimbria.kernel.fd import Fd
from fimbria.kernel.maps import MapType, create_map


class GracePeriod:
    """Lasts about 10 to 20 ms each time, and frees the interpreter meanwhile: call `wait` in a thread.

    The kernel lets a change of a map of maps return only when no program that could see the map before is left
    (kernel/bpf/syscall.c, maybe_wait_bpf_programs(): an RCU grace period, since Linux 4.15). A private one will do.
    """

    def __init__(self) -> None:
        """Raises MapError."""
        self._inner = create_map(MapType.ARRAY, 4, 4, 1, name="grace_inner")
        self._outer = create_map(MapType.ARRAY_OF_MAPS, 4, 4, 1, name="grace", inner=self._inner)

    def wait(self) -> None:
        """Return when all programs that ran at the time of the call have ended. Raises MapError."""
        self._outer.update(bytes(4), self._inner.fd.to_bytes(4, "little"))

    def close(self) -> None:
        """Free the two maps."""
        parts: tuple[Fd, ...] = (self._outer, self._inner)
        for part in parts:
            part.close()
