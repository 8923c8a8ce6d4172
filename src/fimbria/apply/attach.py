"""Where programs are attached: tcx links where the kernel has them, clsact filters where not, cgroup links for sockets.

How a restarted agent knows what is ours: links by their pin; a clsact filter by a program that uses one of our maps.
Nothing is ever removed by handle or name alone.

A program that replaces one of a former version is swapped in one step, and only when the loop says "swap": by then all
maps are filled. Learned maps of the former version are carried over just before and, for what was learned meanwhile,
just after; connections later, since programs look for them in the former version's tables as well.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, TypeVar

from fimbria.apply.programs import Datapath
from fimbria.apply.rows import Delta
from fimbria.kernel import tc
from fimbria.kernel.bpf import (
    AttachType,
    BpfError,
    Link,
    LinkInfo,
    Map,
    Program,
    TcSlot,
    attach_cgroup,
    attach_tcx,
    clsact,
    prog_info,
    program_by_id,
    query_device,
    tc_attach,
    tc_detach,
    tc_query,
)
from fimbria.kernel.netlink import NetlinkSocket

log = logging.getLogger(__name__)
H = TypeVar("H", bound=Hashable)
TC_PRIORITY: Final = 1
TC_HANDLE: Final = 0xF1
TC_HANDLES: Final = 8
INGRESS, EGRESS = "ingress", "egress"
POD_PROGRAMS: Final = frozenset(("from_pod", "to_pod"))
_TCX: Final = {INGRESS: AttachType.TCX_INGRESS, EGRESS: AttachType.TCX_EGRESS}
SOCKET_HOOKS: Final = {
    "connect4": AttachType.CGROUP_INET4_CONNECT,
    "connect6": AttachType.CGROUP_INET6_CONNECT,
    "sendmsg4": AttachType.CGROUP_UDP4_SENDMSG,
    "sendmsg6": AttachType.CGROUP_UDP6_SENDMSG,
    "recvmsg4": AttachType.CGROUP_UDP4_RECVMSG,
    "recvmsg6": AttachType.CGROUP_UDP6_RECVMSG,
    "getpeername4": AttachType.CGROUP_INET4_GETPEERNAME,
    "getpeername6": AttachType.CGROUP_INET6_GETPEERNAME,
    "bind4": AttachType.CGROUP_INET4_BIND,
    "bind6": AttachType.CGROUP_INET6_BIND,
}


@dataclass(frozen=True, slots=True)
class DeviceHook:
    """One side of a network device; the value is the name of the program that should run there."""

    ifindex: int
    side: str

    def __str__(self) -> str:
        return f"{self.side} of interface {self.ifindex}"


class PinnedLinks(Generic[H]):
    """Programs attached by pinned links. Keys are hooks, values the names of the programs that should run there."""

    name = ""

    def __init__(self, datapath: Datapath) -> None:
        self._datapath = datapath
        self._links: dict[H, Link] = {}
        self._fresh: set[H] = set()

    def read(self) -> dict[H, str]:
        """Pinned links and the program each runs; one whose device or cgroup is gone is shown as detached."""
        found: dict[H, str] = {}
        for path in self._datapath.links.iterdir():
            hook = self.parse(path.name)
            if hook is None:
                continue
            try:
                link = Link.open(path)
                info = link.info()
            except BpfError:
                found[hook] = "unreadable pin"
                continue
            program = self._datapath.program_ids.get(info.prog_id) or _name(info.prog_id)
            found[hook] = program if self.attached(hook, info) else "detached"
            self._links[hook] = link
        return found

    def intact(self) -> bool:
        """Whether all links are attached, run programs of ours and are pinned: two cheap system calls a link."""
        try:
            pins = {p.name for p in self._datapath.links.iterdir()}
            states = [(hook, link.info()) for hook, link in self._links.items()]
        except OSError:
            return False
        return all(
            self.pin_name(h) in pins and i.prog_id in self._datapath.program_ids and self.attached(h, i)
            for h, i in states
        )

    def write(self, delta: Delta[H, str], *, order: str) -> Mapping[H, str]:
        """Attach where nothing is; then, on "swap", replace programs in place where a link is there."""
        if order == "out":
            for hook in delta.deletes:
                self._drop(hook)
            return {}
        failures: dict[H, str] = {}
        swap = order == "swap"
        hooks = [h for h in delta.upserts if self._alive(h) == swap and h not in self._fresh]
        self._fresh = set() if swap else set(hooks)
        if swap and hooks:
            self._datapath.carry_over()
        for hook in hooks:
            try:
                self._ensure(hook, self._datapath.programs[delta.upserts[hook]])
            except OSError as error:
                failures[hook] = str(error)
        if swap and hooks:
            self._datapath.carry_over()
        return failures

    def parse(self, pin: str) -> H | None:
        """The hook of a pin's name, None for a pin of another target."""
        raise NotImplementedError

    def pin_name(self, hook: H) -> str:
        """The opposite of `parse`."""
        raise NotImplementedError

    def attached(self, hook: H, info: LinkInfo) -> bool:
        """Whether the link still is where the hook says; a dead one can't be revived."""
        raise NotImplementedError

    def attach(self, hook: H, program: Program) -> Link:
        """A new link."""
        raise NotImplementedError

    def _alive(self, hook: H) -> bool:
        link = self._links.get(hook)
        try:
            return link is not None and self.attached(hook, link.info())
        except OSError:
            return False

    def _ensure(self, hook: H, program: Program) -> None:
        path = self._datapath.links / self.pin_name(hook)
        if self._alive(hook):
            self._links[hook].update(program)
            self._links[hook].pin(path)
            return
        self._drop(hook)
        link = self.attach(hook, program)
        link.pin(path)
        self._links[hook] = link

    def _drop(self, hook: H) -> None:
        # The pin goes last: the kernel then detaches in a thread of its own, while closing the last descriptor would
        # wait for an RCU grace period (8 ms and more) here.
        link = self._links.pop(hook, None)
        if link is not None:
            link.close()
        (self._datapath.links / self.pin_name(hook)).unlink(missing_ok=True)


class TcxTarget(PinnedLinks[DeviceHook]):
    """Programs on devices by tcx links (Linux 6.6).

    Attaching a tcx link waits for an RCU grace period: milliseconds that a pod's start would pay twice. A pod's new
    interface is first guarded by clsact filters, which wait for nothing; `promote` puts links in their place soon
    after. Meanwhile, and for the instant in which both are there, every packet is judged.
    """

    name = "device_links"

    def __init__(self, datapath: Datapath, filters: ClsactTarget) -> None:
        """`filters` attaches provisionally; `on_provisional` is told when there is something to promote."""
        super().__init__(datapath)
        self._filters = filters
        self._provisional: dict[DeviceHook, str] = {}
        self._searched = False
        self.on_provisional: Callable[[], None] = lambda: None

    def read(self) -> dict[DeviceHook, str]:
        """Links, and provisional filters where there is no link yet. A hook may be promoted meanwhile, by the loop:
        before its filter goes its link is in `_links`."""
        provisional = dict(self._provisional)
        found = super().read()
        if not self._searched:
            # A crash between a link and the end of its filter leaves both.
            self._filters.write(Delta(deletes=frozenset(found)), order="out")
            self._searched = True
        for hook, name in provisional.items():
            if hook not in found and (self._filters.guards(hook) or hook in self._links):
                found[hook] = name
        return found

    def provisional(self) -> list[DeviceHook]:
        """Hooks that wait for their link."""
        return list(self._provisional)

    def link_for(self, hook: DeviceHook) -> Link | None:
        """The link for a provisional hook, attached but not yet ours; None if the device is gone. Blocks: RCU."""
        name = self._provisional.get(hook)
        try:
            return self.attach(hook, self._datapath.programs[name]) if name is not None else None
        except BpfError as error:
            log.info("%s keeps its filter: %s", hook, error)
            return None

    def promote(self, hook: DeviceHook, link: Link | None) -> None:
        """Take over the link, then remove the filter; a hook that is not wanted any more lets go of it."""
        wanted = self._provisional.pop(hook, None)
        if link is None:
            return
        path = self._datapath.links / self.pin_name(hook)
        link.pin(path)
        if wanted is None:
            link.close()
            path.unlink(missing_ok=True)
            return
        self._links[hook] = link
        self._filters.write(Delta(deletes=frozenset((hook,))), order="out")

    def _ensure(self, hook: DeviceHook, program: Program) -> None:
        if program.name not in POD_PROGRAMS or self._alive(hook):
            super()._ensure(hook, program)
            return
        super()._drop(hook)
        self._filters.guard(hook, program)
        self._provisional[hook] = program.name
        self.on_provisional()

    def _drop(self, hook: DeviceHook) -> None:
        if self._provisional.pop(hook, None) is not None:
            self._filters.write(Delta(deletes=frozenset((hook,))), order="out")
        super()._drop(hook)

    def parse(self, pin: str) -> DeviceHook | None:
        """From `tcx-<side>-<ifindex>`."""
        kind, _, rest = pin.partition("-")
        side, _, number = rest.partition("-")
        return DeviceHook(int(number), side) if kind == "tcx" and side in _TCX and number.isdecimal() else None

    def pin_name(self, hook: DeviceHook) -> str:
        """`tcx-<side>-<ifindex>`."""
        return f"tcx-{hook.side}-{hook.ifindex}"

    def attached(self, hook: DeviceHook, info: LinkInfo) -> bool:
        """The kernel says ifindex 0 once the device is gone or the link was detached."""
        return info.ifindex == hook.ifindex

    def attach(self, hook: DeviceHook, program: Program) -> Link:
        """At the end of the chain: programs of others keep their place."""
        return attach_tcx(program, hook.ifindex, _TCX[hook.side])

    def foreign(self, hook: DeviceHook) -> list[str]:
        """Other programs at the hook, for people."""
        ids = [p.prog_id for p in query_device(hook.ifindex, _TCX[hook.side]).programs]
        return [_name(i) for i in ids if i not in self._datapath.program_ids]


class CgroupTarget(PinnedLinks[str]):
    """Socket programs on one cgroup subtree; hooks are the keys of SOCKET_HOOKS."""

    name = "socket_links"

    def __init__(self, datapath: Datapath, cgroup: Path) -> None:
        super().__init__(datapath)
        self._cgroup = cgroup

    def parse(self, pin: str) -> str | None:
        """From `cgroup-<hook>`."""
        kind, _, hook = pin.partition("-")
        return hook if kind == "cgroup" and hook in SOCKET_HOOKS else None

    def pin_name(self, hook: str) -> str:
        """`cgroup-<hook>`."""
        return f"cgroup-{hook}"

    def attached(self, hook: str, info: LinkInfo) -> bool:
        """A cgroup's id is its directory's inode number."""
        return info.cgroup_id == self._cgroup.stat().st_ino

    def attach(self, hook: str, program: Program) -> Link:
        """On the subtree and all below it."""
        return attach_cgroup(program, self._cgroup, SOCKET_HOOKS[hook])


@dataclass(slots=True)
class ClsactTarget:
    """Programs on devices as direct-action filters, for kernels without tcx. `devices` lists ifindexes to look at."""

    datapath: Datapath
    netlink: NetlinkSocket
    devices: Callable[[], list[int]]
    name: str = "device_links"
    _slots: dict[DeviceHook, tuple[TcSlot, int]] = field(default_factory=dict)

    def read(self) -> dict[DeviceHook, str]:
        """Our filters on all devices."""
        found: dict[DeviceHook, str] = {}
        for ifindex in self.devices():
            for side in (INGRESS, EGRESS):
                hook = DeviceHook(ifindex, side)
                mine = self._find(hook)
                if mine is not None:
                    self._slots[hook] = mine
                    found[hook] = self.datapath.program_ids.get(mine[1]) or _name(mine[1])
        return found

    def intact(self) -> bool:
        """The kernel tells of every change of a filter: there is nothing to poll for."""
        return True

    def write(self, delta: Delta[DeviceHook, str], *, order: str) -> Mapping[DeviceHook, str]:
        """Take a free handle; on "swap", replace our own filter in place."""
        if order == "out":
            self._detach(delta.deletes)
            return {}
        failures: dict[DeviceHook, str] = {}
        swap = order == "swap"
        found = {h: self._find(h) for h in delta.upserts}
        hooks = [h for h, mine in found.items() if (mine is not None) == swap]
        if swap and hooks:
            self.datapath.carry_over()
        for hook in hooks:
            try:
                self._ensure(hook, self.datapath.programs[delta.upserts[hook]], found[hook])
            except OSError as error:
                failures[hook] = str(error)
        if swap and hooks:
            self.datapath.carry_over()
        return failures

    def guard(self, hook: DeviceHook, program: Program) -> None:
        """Attach one program now. Raises OSError."""
        self._ensure(hook, program, self._find(hook))

    def guards(self, hook: DeviceHook) -> bool:
        """Whether a filter of ours is there."""
        return self._find(hook) is not None

    def _detach(self, hooks: Iterable[DeviceHook]) -> None:
        for hook in hooks:
            slot = self._slots.pop(hook, None) or self._find(hook)
            if slot is not None:
                with suppress(BpfError):
                    tc_detach(*slot)

    def foreign(self, hook: DeviceHook) -> list[str]:
        """Filters of others on that side of the device, for people."""
        filters = tc.dump_filters(self.netlink, hook.ifindex, egress=hook.side == EGRESS)
        others = [f for f in filters if not (f.prog_id and self._ours(f.prog_id))]
        return [_name(f.prog_id) if f.prog_id else f"a {f.kind} filter, handle {f.handle:#x}" for f in others]

    def _ensure(self, hook: DeviceHook, program: Program, mine: tuple[TcSlot, int] | None) -> None:
        clsact(hook.ifindex)
        if mine is not None:
            self._slots[hook] = (mine[0], tc_attach(program, mine[0], replace=True))
            return
        for slot in self._candidates(hook):
            try:
                self._slots[hook] = (slot, tc_attach(program, slot))
            except BpfError as error:
                if error.errno != errno.EEXIST:
                    raise
            else:
                return
        raise BpfError(errno.EBUSY, f"{hook}: other programs hold all {TC_HANDLES} handles at priority {TC_PRIORITY}")

    def _find(self, hook: DeviceHook) -> tuple[TcSlot, int] | None:
        for slot in self._candidates(hook):
            with suppress(BpfError):  # a device that is gone has no filters
                prog_id = tc_query(slot)
                if prog_id is not None and self._ours(prog_id):
                    return slot, prog_id
        return None

    def _ours(self, prog_id: int) -> bool:
        """By a map of ours; or, when all pins are gone, by its own name and those of its maps together."""
        if prog_id in self.datapath.program_ids:
            return True
        with suppress(BpfError), program_by_id(prog_id) as program:
            info = prog_info(program.fd)
            if self.datapath.map_ids.intersection(info.map_ids):
                return True
            if info.name in self.datapath.programs:
                names = {_map_name(i) for i in info.map_ids}
                return {"metrics", "events"} <= names <= self.datapath.maps.keys() | {n for n in names if "rodata" in n}
        return False

    @staticmethod
    def _candidates(hook: DeviceHook) -> list[TcSlot]:
        egress = hook.side == EGRESS
        return [TcSlot(hook.ifindex, egress, TC_PRIORITY, TC_HANDLE + i) for i in range(TC_HANDLES)]


def _map_name(map_id: int) -> str:
    with Map.by_id(map_id) as found:
        return found.info.name


def _name(prog_id: int) -> str:
    try:
        with program_by_id(prog_id) as program:
            info = prog_info(program.fd)
            return f"{info.name} (id {prog_id}, tag {info.tag})"
    except BpfError:
        return f"id {prog_id}"
