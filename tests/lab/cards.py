"""Makes veth pairs what XDP expects: cables between network cards."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tests.bpf.compiling import compile_object

from fimbria.kernel import netns
from fimbria.kernel.bpf import BpfObject, Link, Program, attach_xdp
from fimbria.lab.handle import Lab

PASS: Final = Path(__file__).parents[1] / "bpf" / "xdp_pass.bpf.c"
DRIVER: Final = 4  # XDP_FLAGS_DRV_MODE


@contextmanager
def far_ends(lab: Lab, *cables: tuple[str, str]) -> Iterator[None]:
    """`cables` are (member of the lab, device): they take what XDP sends from their peers, as long as this lasts.

    ip(8) could attach a program too, but leaves folders in this machine's BPF file system.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="fimxdp"))
        loaded = stack.enter_context(BpfObject(compile_object(PASS, Path(folder))))
        loaded.load()
        program = stack.enter_context(loaded.program("pass"))
        for member, device in cables:
            space = stack.enter_context(netns.opened(lab.paths.netns(member)))
            stack.enter_context(netns.run(space, partial(_attach, program, device)))
        yield


def _attach(program: Program, device: str) -> Link:
    return attach_xdp(program, socket.if_nametoindex(device), DRIVER)
