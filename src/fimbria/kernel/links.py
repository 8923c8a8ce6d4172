"""Attaching programs: BPF links (tcx, cgroup, XDP), clsact filters for kernels without tcx, and what is attached."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from fimbria.kernel._libbpf import ffi, lib
from fimbria.kernel.fd import BpfError, Fd, c_name, check, error_text, open_pin, pin_fd
from fimbria.kernel.objects import Program


class AttachType(IntEnum):
    """enum bpf_attach_type of the kernel's UAPI (include/uapi/linux/bpf.h), the hooks in use here."""

    CGROUP_INET_INGRESS = 0
    CGROUP_INET_EGRESS = 1
    CGROUP_SOCK_CREATE = 2
    CGROUP_SOCK_OPS = 3
    CGROUP_INET4_BIND = 8
    CGROUP_INET6_BIND = 9
    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_INET4_POST_BIND = 12
    CGROUP_INET6_POST_BIND = 13
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    CGROUP_UDP4_RECVMSG = 19
    CGROUP_UDP6_RECVMSG = 20
    CGROUP_INET4_GETPEERNAME = 29
    CGROUP_INET6_GETPEERNAME = 30
    CGROUP_INET4_GETSOCKNAME = 31
    CGROUP_INET6_GETSOCKNAME = 32
    CGROUP_SOCK_RELEASE = 34
    SK_LOOKUP = 36
    XDP = 37
    TCX_INGRESS = 46
    TCX_EGRESS = 47
    NETKIT_PRIMARY = 54
    NETKIT_PEER = 55


class ProgType(IntEnum):
    """enum bpf_prog_type, the types in use here."""

    SCHED_CLS = 3
    TRACEPOINT = 5
    XDP = 6
    CGROUP_SKB = 8
    CGROUP_SOCK = 9
    SOCK_OPS = 13
    SK_MSG = 16
    CGROUP_SOCK_ADDR = 18
    TRACING = 26
    SK_LOOKUP = 30


F_REPLACE, F_BEFORE, F_AFTER, F_ID, F_LINK = 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 13


@dataclass(frozen=True, slots=True)
class Anchor:
    """Where a tcx program goes in the chain of its hook.

    Before or after another link or program of that hook, named by its number; without one, at the head or the tail.
    """

    before: bool
    link_id: int = 0
    prog_id: int = 0

    def flags(self) -> tuple[int, int]:
        """The kernel's flags and the relative number."""
        where = F_BEFORE if self.before else F_AFTER
        if self.link_id:
            return where | F_LINK | F_ID, self.link_id
        return (where | F_ID, self.prog_id) if self.prog_id else (where, 0)


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """What the kernel says of a link. `ifindex` is 0 once the device is gone (and for cgroup links)."""

    type: int
    id: int
    prog_id: int
    attach_type: int
    ifindex: int
    cgroup_id: int


@dataclass(frozen=True, slots=True)
class Attached:
    """One program at a hook; `link_id` is 0 when it was attached without a link."""

    prog_id: int
    link_id: int


@dataclass(frozen=True, slots=True)
class HookState:
    """The programs of a hook in running order, and its revision (0 where the hook has none)."""

    programs: tuple[Attached, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class ProgInfo:
    """What the kernel says of a program. Times in nanoseconds; `load_time_ns` since boot.

    `run_time_ns` and `run_count` stay 0 unless kernel.bpf_stats_enabled is on.
    """

    id: int
    type: int
    name: str
    tag: str
    load_time_ns: int
    run_time_ns: int
    run_count: int
    verified_insns: int
    xlated_bytes: int
    jited_bytes: int
    map_ids: tuple[int, ...]


class Link(Fd):
    """An attachment that lasts as long as this handle or a pin."""

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Link:
        """Opens a pinned link. Raises BpfError (ENOENT when there is none)."""
        return cls(open_pin(path))

    @classmethod
    def by_id(cls, link_id: int) -> Link:
        """Opens a link by its number. Raises BpfError."""
        return cls(check(lib.bpf_link_get_fd_by_id(link_id), f"link id {link_id}"))

    def pin(self, path: str | os.PathLike[str]) -> None:
        """Pins the link at `path`, replacing what was pinned there in one step."""
        pin_fd(self.fd, path)

    def update(self, program: Program, expected: Program | None = None) -> None:
        """Swaps the program in one step; no packet sees the hook empty.

        With `expected`, only if that one is attached. Raises BpfError.
        """
        result = lib.fim_link_update(self.fd, program.fd, expected.fd if expected else -1)
        check(result, f"update link to program {program.name}")

    def detach(self) -> None:
        """Detaches the program, even if pins keep the link object. Raises BpfError."""
        check(lib.bpf_link_detach(self.fd), "detach link")

    def info(self) -> LinkInfo:
        """Reads the link's description. Raises BpfError."""
        raw = ffi.new("struct fim_link_info *")
        check(lib.fim_link_info(self.fd, raw), "link info")
        return LinkInfo(raw.type, raw.id, raw.prog_id, raw.attach_type, raw.ifindex, raw.cgroup_id)


def attach_tcx(
    program: Program, ifindex: int, hook: AttachType, anchor: Anchor | None = None, expected_revision: int = 0
) -> Link:
    """Attaches to a device of the caller's network namespace. Raises BpfError (ESTALE: another revision)."""
    flags, relative = anchor.flags() if anchor else (0, 0)
    result = lib.fim_link_create(program.fd, ifindex, hook, flags, relative, expected_revision)
    return Link(check(result, f"attach {program.name} to {hook.name} of interface {ifindex}"))


def attach_cgroup(program: Program, cgroup: str | os.PathLike[str], hook: AttachType) -> Link:
    """Attaches to a cgroup v2 directory and all below it. Raises BpfError, OSError when there is no such directory."""
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        result = lib.fim_link_create(program.fd, fd, hook, 0, 0, 0)
        return Link(check(result, f"attach {program.name} to {hook.name} of cgroup {os.fspath(cgroup)}"))
    finally:
        os.close(fd)


def attach_xdp(program: Program, ifindex: int, flags: int = 0) -> Link:
    """Attaches at the driver. `flags`: XDP_FLAGS_SKB_MODE (2) or XDP_FLAGS_DRV_MODE (4). Raises BpfError."""
    result = lib.fim_link_create(program.fd, ifindex, AttachType.XDP, flags, 0, 0)
    return Link(check(result, f"attach {program.name} to XDP of interface {ifindex}"))


def attach_netns(program: Program, netns_fd: int, hook: AttachType = AttachType.SK_LOOKUP) -> Link:
    """Attaches to a network namespace (sk_lookup). Raises BpfError."""
    result = lib.fim_link_create(program.fd, netns_fd, hook, 0, 0, 0)
    return Link(check(result, f"attach {program.name} to {hook.name}"))


def _query(target: int, hook: int, flags: int, what: str) -> HookState:
    cap = 16
    while True:
        prog_ids, link_ids = ffi.new("uint32_t[]", cap), ffi.new("uint32_t[]", cap)
        count, revision = ffi.new("uint32_t *"), ffi.new("uint64_t *")
        result = lib.fim_prog_query(target, hook, flags, cap, prog_ids, link_ids, count, revision)
        if result == -errno.ENOSPC and cap < 65536:
            cap *= 4
            continue
        check(result, what)
        programs = tuple(Attached(prog_ids[i], link_ids[i]) for i in range(count[0]))
        return HookState(programs, revision[0])


def query_device(ifindex: int, hook: AttachType) -> HookState:
    """What is attached to a tcx or netkit hook of a device. Raises BpfError."""
    return _query(ifindex, hook, 0, f"query {hook.name} of interface {ifindex}")


def query_cgroup(cgroup: str | os.PathLike[str], hook: AttachType, *, effective: bool = False) -> HookState:
    """What is attached to a cgroup; with `effective`, also what it inherits. The kernel tells no link ids here."""
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _query(fd, hook, 1 if effective else 0, f"query {hook.name} of cgroup {os.fspath(cgroup)}")
    finally:
        os.close(fd)


# -- clsact


@dataclass(frozen=True, slots=True)
class TcSlot:
    """The place of a direct-action filter on a device's clsact qdisc."""

    ifindex: int
    egress: bool
    priority: int
    handle: int

    def __str__(self) -> str:
        side = "egress" if self.egress else "ingress"
        return f"clsact {side} of interface {self.ifindex}, priority {self.priority}, handle {self.handle:#x}"


def clsact(ifindex: int) -> bool:
    """Makes sure a device has the clsact qdisc; False when it was there. Raises BpfError."""
    result = lib.fim_tc_qdisc(ifindex)
    if result == -errno.EEXIST:
        return False
    check(result, f"add clsact to interface {ifindex}")
    return True


def tc_attach(program: Program, slot: TcSlot, *, replace: bool = False) -> int:
    """Attaches as a direct-action filter and returns the program's id. Raises BpfError (EEXIST: slot taken)."""
    prog_id = ffi.new("uint32_t *")
    result = lib.fim_tc_attach(slot.ifindex, slot.egress, program.fd, slot.handle, slot.priority, replace, prog_id)
    check(result, f"attach {program.name} to {slot}")
    return int(prog_id[0])


def tc_query(slot: TcSlot) -> int | None:
    """The id of the program in a slot; None when there is none. Raises BpfError."""
    prog_id = ffi.new("uint32_t *")
    result = lib.fim_tc_query(slot.ifindex, slot.egress, slot.handle, slot.priority, prog_id)
    # The kernel answers EINVAL when the device has no clsact at all.
    if result in (-errno.ENOENT, -errno.EINVAL):
        return None
    check(result, f"query {slot}")
    return int(prog_id[0])


def tc_detach(slot: TcSlot, expected_prog_id: int) -> bool:
    """Removes a filter if it still is the expected program; False when nothing is there.

    Raises BpfError, with EEXIST when somebody else's program has the slot.
    """
    found = tc_query(slot)
    if found is None:
        return False
    if found != expected_prog_id:
        raise BpfError(errno.EEXIST, f"detach {slot}: it holds program {found}, not {expected_prog_id}")
    result = lib.fim_tc_detach(slot.ifindex, slot.egress, slot.handle, slot.priority)
    if result == -errno.ENOENT:
        return False
    check(result, f"detach {slot}")
    return True


# -- ids and infos


def prog_info(fd: int) -> ProgInfo:
    """Reads a program's description. Raises BpfError when `fd` is no program."""
    cap = 64
    while True:
        raw, map_ids = ffi.new("struct fim_prog_info *"), ffi.new("uint32_t[]", cap)
        check(lib.fim_prog_info(fd, raw, map_ids, cap), f"program info of descriptor {fd}")
        if raw.nr_map_ids <= cap:
            break
        cap = raw.nr_map_ids
    return ProgInfo(
        raw.id, raw.type, c_name(raw.name), bytes(ffi.buffer(raw.tag)).hex(), raw.load_time, raw.run_time_ns,
        raw.run_cnt, raw.verified_insns, raw.xlated_len, raw.jited_len, tuple(map_ids[0 : raw.nr_map_ids]),
    )  # fmt: skip


def program_by_id(prog_id: int) -> Program:
    """Opens a program by its number. Raises BpfError."""
    fd = check(lib.bpf_prog_get_fd_by_id(prog_id), f"program id {prog_id}")
    return Program(fd, prog_info(fd).name)


def _ids(step: Any, what: str) -> Iterator[int]:
    current = ffi.new("uint32_t *")
    while True:
        result = step(current[0], current)
        if result == -errno.ENOENT:
            return
        check(result, what)
        yield current[0]


def program_ids() -> Iterator[int]:
    """The numbers of all programs of the machine."""
    return _ids(lib.bpf_prog_get_next_id, "next program id")


def map_ids() -> Iterator[int]:
    """The numbers of all maps of the machine."""
    return _ids(lib.bpf_map_get_next_id, "next map id")


def link_ids() -> Iterator[int]:
    """The numbers of all links of the machine."""
    return _ids(lib.bpf_link_get_next_id, "next link id")


# -- test runs


@dataclass(frozen=True, slots=True)
class TestRun:
    """The outcome of prog_test_run. `duration_ns` is the mean of one repetition."""

    __test__ = False  # pytest would take it for a test class

    retval: int
    data_out: bytes
    ctx_out: bytes
    duration_ns: int


def prog_test_run(
    fd: int, data_in: bytes, ctx_in: bytes | None = None, repeat: int = 1, *, flags: int = 0, room: int = 256
) -> TestRun:
    """Runs a program once or more on a packet (BPF_PROG_TEST_RUN), without any device.

    `ctx_in` is a packed struct __sk_buff or xdp_md where given; `room` is how far the packet may grow, in bytes.
    Raises BpfError.
    """
    out_len = len(data_in) + room
    ctx_len = len(ctx_in) if ctx_in is not None else 0
    data, data_out = ffi.from_buffer(data_in), ffi.new("char[]", out_len)
    ctx = ffi.from_buffer(ctx_in) if ctx_in is not None else ffi.NULL
    ctx_out = ffi.new("char[]", ctx_len) if ctx_len else ffi.NULL
    run: Any = ffi.new("struct fim_test_run *")
    run.data_in, run.data_in_len = (data if data_in else ffi.NULL), len(data_in)
    run.data_out, run.data_out_len = (data_out if data_in else ffi.NULL), (out_len if data_in else 0)
    run.ctx_in, run.ctx_in_len, run.ctx_out, run.ctx_out_len = ctx, ctx_len, ctx_out, ctx_len
    run.repeat, run.flags = repeat, flags
    result = lib.fim_prog_test_run(fd, run)
    if result < 0:
        raise BpfError(-result, f"test run of descriptor {fd}: {error_text(-result)}")
    # The kernel's unsigned answer: TCX_NEXT (-1) and the like are meant as signed.
    retval = run.retval - (1 << 32) if run.retval & 0x80000000 else run.retval
    ctx_bytes = bytes(ffi.buffer(ctx_out, run.ctx_out_len)) if ctx_len else b""
    return TestRun(
        retval, bytes(ffi.buffer(data_out, run.data_out_len)) if data_in else b"", ctx_bytes, run.duration_ns
    )
