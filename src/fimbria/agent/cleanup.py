"""Takes everything of ours off a node whose agent has stopped: after it, nothing says that Fimbria ever ran there.

Rules
1. The CNI configuration first, the other way round than it came: what was set aside is back before ours goes.
2. What is ours is known as a restarted agent knows it: pins below our folder, filters whose program uses one of our
   maps, devices by their names, routes and neighbours by their protocol.
3. Nothing of others is touched. Kernel settings stay as they are: who else relies on them, nobody can know.
4. It can be repeated, and goes on after a failure; what failed is reported.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fimbria.agent.endpoints import HOST_PREFIX
from fimbria.agent.install import BINARY, CONF_NAME, remove_config
from fimbria.apply.attach import TC_HANDLE, TC_HANDLES, TC_PRIORITY
from fimbria.apply.devices import HOST_DEVICE, OVERLAY_DEVICE
from fimbria.apply.network import NextHopTarget, RouteTarget
from fimbria.apply.rows import Delta
from fimbria.kernel import link
from fimbria.kernel.bpf import BpfError, Map, TcSlot, prog_info, program_by_id, tc_detach, tc_query
from fimbria.kernel.netlink import NetlinkSocket

OURS: Final = "fimbria"  # the folder below a BPF file system
POD_DEVICE: Final = re.compile(HOST_PREFIX + r"[0-9a-f]{11}")


class AgentRuns(OSError):
    """An agent answers: it would make everything again."""


@dataclass(slots=True)
class Cleanup:
    """One node's. `done` and `failed` are sentences."""

    run_dir: Path
    bpffs: Path
    cni_conf_dir: Path | None
    cni_bin_dir: Path | None
    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def run(self) -> bool:
        """Clean; False if something could not be removed. Raises AgentRuns."""
        self._refuse_if_running()
        with NetlinkSocket() as netlink:
            self._step("CNI configuration", self._cni)
            self._step("programs", lambda: self._filters(netlink))
            self._step("pins", self._pins)
            self._step("routes and neighbours", lambda: self._routes(netlink))
            self._step("devices", lambda: self._devices(netlink))
        self._step("journal and sockets", self._run_dir)
        return not self.failed

    def _step(self, name: str, work: Callable[[], str]) -> None:
        try:
            said = work()
        except OSError as error:
            self.failed.append(f"{name}: {error}")
            return
        if said:
            self.done.append(said)

    def _refuse_if_running(self) -> None:
        path = self.run_dir / "agent.sock"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(os.fspath(path)) == 0:
                raise AgentRuns(f"an agent listens on {path}: stop it first, or it makes everything again")

    def _cni(self) -> str:
        found = []
        if self.cni_conf_dir is not None and self.cni_conf_dir.is_dir():
            there = (self.cni_conf_dir / CONF_NAME).exists()
            back = remove_config(self.cni_conf_dir)
            found += [f"{CONF_NAME} removed"] * there + [f"{name} put back" for name in back]
        if self.cni_bin_dir is not None and (self.cni_bin_dir / BINARY).exists():
            (self.cni_bin_dir / BINARY).unlink()
            found.append(f"{BINARY} removed")
        return ", ".join(found)

    # --- kernel ------------------------------------------------------------------------------------------------------

    def _filters(self, netlink: NetlinkSocket) -> str:
        maps = set(self._our_maps())
        removed = 0
        for device in link.dump(netlink) if maps else ():
            for slot in _slots(device.index):
                with suppress(BpfError):  # a device without filters, or one that is just going
                    prog_id = tc_query(slot)
                    if prog_id is not None and _uses(prog_id, maps):
                        removed += tc_detach(slot, prog_id)
        return f"{removed} filters removed" if removed else ""

    def _our_maps(self) -> Iterator[int]:
        folder = self.bpffs / OURS / "maps"
        for path in folder.iterdir() if folder.is_dir() else ():
            with suppress(BpfError), Map.open(path) as found:
                yield found.info.id

    def _pins(self) -> str:
        folder = self.bpffs / OURS
        if not folder.is_dir():
            return ""
        count = sum(1 for p in folder.rglob("*") if not p.is_dir())
        # Links first: nothing of a program that still runs is missing.
        for part in (folder / "links", folder):
            if part.is_dir():
                shutil.rmtree(part)
        return f"{count} pinned programs, maps and links removed"

    def _routes(self, netlink: NetlinkSocket) -> str:
        routes, hops = RouteTarget(netlink), NextHopTarget(netlink, lambda: [])
        found, kept = routes.read(), hops.read()
        refused = dict(routes.write(Delta(deletes=frozenset(found)), order="out"))
        refused |= hops.write(Delta(deletes=frozenset(kept)), order="out")  # type: ignore[arg-type]
        self.failed += [f"{what}: {why}" for what, why in refused.items()]
        return f"{len(found)} routes and {len(kept)} neighbours removed" if found or kept else ""

    def _devices(self, netlink: NetlinkSocket) -> str:
        removed = []
        for device in link.dump(netlink):
            pods = device.kind == "veth" and POD_DEVICE.fullmatch(device.name)
            if pods or device.name in (HOST_DEVICE, OVERLAY_DEVICE):  # a pair goes with either end
                netlink.do(link.delete(device.index))
                removed.append(device.name)
        return f"interfaces {', '.join(removed)} removed" if removed else ""

    # --- files -------------------------------------------------------------------------------------------------------

    def _run_dir(self) -> str:
        """What is in it; the folder itself may be mounted, and so may the cgroup tree below it."""
        if not self.run_dir.is_dir():
            return ""
        found = sorted(p for p in self.run_dir.iterdir() if not p.is_mount())
        for path in found:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        with suppress(OSError):
            self.run_dir.rmdir()
        return f"{', '.join(p.name for p in found)} of {self.run_dir} removed" if found else ""


def _slots(ifindex: int) -> Iterator[TcSlot]:
    for egress in (False, True):
        for handle in range(TC_HANDLE, TC_HANDLE + TC_HANDLES):
            yield TcSlot(ifindex, egress, TC_PRIORITY, handle)


def _uses(prog_id: int, maps: set[int]) -> bool:
    with program_by_id(prog_id) as program:
        return not maps.isdisjoint(prog_info(program.fd).map_ids)
