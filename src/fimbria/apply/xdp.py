"""Programs in network devices' drivers, by XDP links.

A device runs one XDP program. Where somebody else's is, ours waits, and the row says so: tc does the same work. The
mode that was asked for is part of a row's key and of the pin's name, since the kernel doesn't tell a link's.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from fimbria.apply.attach import PinnedLinks
from fimbria.kernel.bpf import BpfError, Link, LinkInfo, Program, attach_xdp, program_by_id

# XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE of include/uapi/linux/if_link.h: what to try, in this order
_DRIVER, _GENERIC = 1 << 2, 1 << 1
MODES: Final = {"native": (_DRIVER,), "generic": (_GENERIC,), "best-effort": (_DRIVER, _GENERIC)}
PROGRAM: Final = "from_device"
_GENERIC_PROGRAM: Final = "from_device_skb"


@dataclass(frozen=True, slots=True)
class XdpHook:
    """A network device, and how a program is to run there: a key of MODES. The value is PROGRAM.

    There it runs as itself in the driver, and as its twin after it.
    """

    ifindex: int
    mode: str

    def __str__(self) -> str:
        return f"XDP ({self.mode}) of interface {self.ifindex}"


class XdpTarget(PinnedLinks[XdpHook]):
    """Programs on devices by XDP links."""

    name = "xdp_links"

    def read(self) -> dict[XdpHook, str]:
        """Pinned links; either twin is PROGRAM."""
        return {h: PROGRAM if name == _GENERIC_PROGRAM else name for h, name in super().read().items()}

    def parse(self, pin: str) -> XdpHook | None:
        """From `xdp-<ifindex>-<mode>`."""
        kind, _, rest = pin.partition("-")
        number, _, mode = rest.partition("-")
        return XdpHook(int(number), mode) if kind == "xdp" and mode in MODES and number.isdecimal() else None

    def pin_name(self, hook: XdpHook) -> str:
        """`xdp-<ifindex>-<mode>`."""
        return f"xdp-{hook.ifindex}-{hook.mode}"

    def attached(self, hook: XdpHook, info: LinkInfo) -> bool:
        """The kernel says ifindex 0 once the device is gone or the link was detached."""
        return info.ifindex == hook.ifindex

    def attach(self, hook: XdpHook, program: Program) -> Link:
        """In the first mode that the device can do. Raises BpfError, with EBUSY where another program is."""
        *others, last = MODES[hook.mode]
        for flags in others:
            try:
                return self._attach_as(hook, program, flags)
            except BpfError as error:
                if error.errno == errno.EBUSY:
                    raise
        return self._attach_as(hook, program, last)

    def _attach_as(self, hook: XdpHook, program: Program, flags: int) -> Link:
        try:
            chosen = self._datapath.programs[_GENERIC_PROGRAM] if flags == _GENERIC else program
            return attach_xdp(chosen, hook.ifindex, flags)
        except BpfError as error:
            # EEXIST: in the other one of the two modes.
            if error.errno in (errno.EBUSY, errno.EEXIST):
                raise BpfError(
                    errno.EBUSY, f"{hook}: another XDP program is attached there, and is left in place"
                ) from None
            raise

    def _ensure(self, hook: XdpHook, program: Program) -> None:
        # A device that changes its mode has no program for a moment, in which tc does the work.
        for other in [h for h in self._links if h.ifindex == hook.ifindex and h != hook]:
            self._detach(other)
        super()._ensure(hook, self._twin(hook, program))

    def _twin(self, hook: XdpHook, program: Program) -> Program:
        """What takes a running program's place runs in the same mode."""
        if not self._alive(hook):
            return program
        with program_by_id(self._links[hook].info().prog_id) as running:
            return self._datapath.programs[_GENERIC_PROGRAM] if running.name == _GENERIC_PROGRAM else program

    def _drop(self, hook: XdpHook) -> None:
        self._detach(hook)

    def _detach(self, hook: XdpHook) -> None:
        """At once: the device is to be free for another link, or for somebody else's program."""
        link = self._links.get(hook)
        if link is not None:
            link.detach()
        super()._drop(hook)
