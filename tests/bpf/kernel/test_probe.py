"""The probes against the running kernel."""

from __future__ import annotations

from pathlib import Path

import pytest

from fimbria.kernel import probe
from fimbria.kernel.bpf import BpfError, MapType, ProgType
from fimbria.kernel.btf import Btf, Kind, Member

MAP_LOOKUP_ELEM, NO_SUCH_HELPER, NO_SUCH_TYPE = 1, 9999, 9999


def test_tcx_came_with_6_6() -> None:
    assert probe.has_tcx() == (probe.kernel_version() >= (6, 6))


def test_helpers_and_types() -> None:
    assert probe.have_helper(ProgType.SCHED_CLS, MAP_LOOKUP_ELEM)
    assert not probe.have_helper(ProgType.SCHED_CLS, NO_SUCH_HELPER)
    assert probe.have_prog_type(ProgType.XDP)
    assert probe.have_map_type(MapType.RINGBUF)
    with pytest.raises(BpfError, match="probe map type 9999"):
        probe.have_map_type(NO_SUCH_TYPE)


def test_a_root_process_here_lacks_nothing() -> None:
    assert probe.problems() == []


def test_bpf_file_systems_are_told_from_others(bpffs: Path) -> None:
    assert probe.bpffs_mounted(str(bpffs / "x"))
    assert not probe.bpffs_mounted(str(bpffs.parent))


def test_the_kernels_own_types() -> None:
    btf = Btf.of_kernel()
    skb = btf.find(Kind.STRUCT, "sk_buff")
    assert "mark" in {m.name for m in _all(btf, skb.id)} and btf.size_of(skb.id) == skb.size


def _all(btf: Btf, type_id: int) -> list[Member]:
    found: list[Member] = []
    for member in btf.resolve(type_id).type.members:
        found.append(member)
        if not member.name:
            found += _all(btf, member.type_id)
    return found
