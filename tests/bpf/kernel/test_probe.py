"""The probes against the running kernel."""

from __future__ import annotations

from pathlib import Path

from fimbria.kernel import probe


def test_tcx_came_with_6_6() -> None:
    assert probe.has_tcx() == (probe.kernel_version() >= (6, 6))


def test_a_root_process_here_lacks_nothing() -> None:
    assert probe.problems() == []


def test_bpf_file_systems_are_told_from_others(bpffs: Path) -> None:
    assert probe.bpffs_mounted(str(bpffs / "x"))
    assert not probe.bpffs_mounted(str(bpffs.parent))
