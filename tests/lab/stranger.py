"""Attaches somebody else's program: `stranger.py OBJECT tcx before|after IFINDEX` or `... clsact HANDLE IFINDEX`.

Says "there", and detaches at the end of its standard input.
"""

import sys
from pathlib import Path

from fimbria.kernel.bpf import Anchor, AttachType, BpfObject, TcSlot, attach_tcx, clsact, tc_attach, tc_detach


def main(path: str, kind: str, where: str, ifindex: int) -> None:
    with BpfObject(Path(path).read_bytes(), "stranger") as loaded:
        loaded.load()
        program = loaded.program("stranger")
        if kind == "tcx":
            link = attach_tcx(program, ifindex, AttachType.TCX_INGRESS, Anchor(before=where == "before"))
            print("there", flush=True)
            sys.stdin.read()
            link.close()
            return
        slot = TcSlot(ifindex, egress=False, priority=1, handle=int(where, 16))
        clsact(ifindex)
        prog_id = tc_attach(program, slot, replace=True)
        print("there", flush=True)
        sys.stdin.read()
        tc_detach(slot, prog_id)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
