"""The clsact qdisc and the filters on it, seen over rtnetlink (include/uapi/linux/pkt_sched.h, pkt_cls.h).

Programs are attached by kernel.links; this shows what else sits on a device.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

from fimbria.kernel.netlink import (
    NetlinkError,
    NetlinkSocket,
    Request,
    WireError,
    attrs,
    number,
    text,
)

RTM_NEWQDISC = 36
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46

_TCMSG = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info
_TCA_KIND, _TCA_OPTIONS = 1, 2
_BPF_NAME, _BPF_ID = 7, 11
INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3


@dataclass(frozen=True, slots=True)
class Qdisc:
    """A queueing discipline of a device."""

    index: int
    kind: str
    handle: int
    parent: int


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter on one side of clsact. `prog_id` is 0 for other kinds than bpf."""

    index: int
    egress: bool
    priority: int
    handle: int
    kind: str
    name: str
    prog_id: int


def parse_qdisc(data: bytes, start: int, end: int) -> Qdisc:
    """The qdisc in an RTM_NEWQDISC or RTM_DELQDISC body. Raises WireError."""
    if end - start < _TCMSG.size:
        raise WireError("qdisc message too short")
    _family, index, handle, parent, _info = _TCMSG.unpack_from(data, start)
    return Qdisc(index, text(attrs(data, start + 20, end).get(_TCA_KIND)), handle, parent)


def parse_filter(data: bytes, start: int, end: int) -> Filter | None:
    """The filter in an RTM_NEWTFILTER or RTM_DELTFILTER body; None when it isn't on clsact. Raises WireError."""
    if end - start < _TCMSG.size:
        raise WireError("filter message too short")
    _family, index, handle, parent, info = _TCMSG.unpack_from(data, start)
    if parent not in (INGRESS, EGRESS):
        return None
    found = attrs(data, start + 20, end)
    raw = found.get(_TCA_OPTIONS, b"")
    options = attrs(raw, 0, len(raw)) if raw else {}
    kind = text(found.get(_TCA_KIND))
    bpf = kind == "bpf"
    return Filter(
        index, parent == EGRESS, info >> 16, handle, kind,
        text(options.get(_BPF_NAME)) if bpf else "", number(options.get(_BPF_ID)) if bpf else 0,
    )  # fmt: skip


def dump_filters(sock: NetlinkSocket, index: int, *, egress: bool) -> list[Filter]:
    """The filters on one side of a device's clsact, in running order; empty without clsact. Raises NetlinkError."""
    body = _TCMSG.pack(0, index, 0, EGRESS if egress else INGRESS, 0)
    try:
        messages = sock.dump(Request(RTM_GETTFILTER, 0, body, f"dump filters of device {index}"))
    except NetlinkError as e:
        if e.errno in (errno.EINVAL, errno.ENOENT):
            return []
        raise
    found = (parse_filter(m.data, m.start, m.end) for m in messages if m.type == RTM_NEWTFILTER)
    return [f for f in found if f is not None and f.handle]
