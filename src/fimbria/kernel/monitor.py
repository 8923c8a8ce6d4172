"""What changes in the kernel's network configuration, as the dataclasses of the other modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Self

from fimbria.kernel import link, neighbour, route, tc
from fimbria.kernel.netlink import GroupSocket, ResyncNeeded, WireError


class Group(IntEnum):
    """enum rtnetlink_groups (include/uapi/linux/rtnetlink.h)."""

    LINK = 1
    NEIGH = 3
    TC = 4
    IPV4_ADDRESS = 5
    IPV4_ROUTE = 7
    IPV6_ADDRESS = 9
    IPV6_ROUTE = 11


Thing = link.Device | link.Address | route.Route | neighbour.Neighbour | tc.Qdisc | tc.Filter


@dataclass(frozen=True, slots=True)
class Change:
    """`thing` is there now or has changed; with `gone`, it was as described."""

    gone: bool
    thing: Thing


_PARSERS: dict[int, Callable[[bytes, int, int], Thing | None]] = {
    link.RTM_NEWLINK: link.parse_device,
    link.RTM_NEWADDR: link.parse_address,
    route.RTM_NEWROUTE: route.parse_route,
    neighbour.RTM_NEWNEIGH: neighbour.parse_neighbour,
    tc.RTM_NEWQDISC: tc.parse_qdisc,
    tc.RTM_NEWTFILTER: tc.parse_filter,
}


def parse_change(kind: int, data: bytes, start: int, end: int) -> Change | None:
    """A notification by its message type; None for what nobody here is interested in. Raises WireError."""
    # Message types come in fours: new, delete, get, set.
    parser = _PARSERS.get(kind & ~3)
    gone = kind & 3
    if parser is None or gone > 1:
        return None
    thing = parser(data, start, end)
    return Change(bool(gone), thing) if thing is not None else None


class Monitor:
    """Notifications of one namespace. Give `fileno()` to add_reader() and call read()."""

    def __init__(self, groups: Iterable[Group], netns_fd: int | None = None) -> None:
        """Subscribes at once: dump after this, and nothing is missed. Raises OSError."""
        self._socket = GroupSocket(groups, netns_fd)

    def fileno(self) -> int:
        """The descriptor, nonblocking."""
        return self._socket.fileno()

    def read(self) -> list[Change]:
        """The changes that have arrived, oldest first, without waiting.

        Raises ResyncNeeded when the kernel dropped some or sent one that can't be read: dump again.
        """
        try:
            messages = self._socket.read()
            changes = (parse_change(m.type, m.data, m.start, m.end) for m in messages)
            return [c for c in changes if c is not None]
        except WireError as e:
            raise ResyncNeeded(str(e)) from e

    def close(self) -> None:
        """Ends the subscription. May be called twice."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
