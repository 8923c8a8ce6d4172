"""A cluster that would run out of inotify instances isn't begun."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
from tests.cluster.bed import inotify
from tests.cluster.bed.errors import BedError


def test_what_is_open_is_counted() -> None:
    if os.geteuid() != 0:
        pytest.fail("the bed is root's, and so is what it counts")
    before = inotify.used()
    opened = [ctypes.CDLL(None, use_errno=True).inotify_init1(os.O_CLOEXEC) for _ in range(20)]
    try:
        assert min(opened) >= 0
        assert inotify.used() > before + 10, "others may close some meanwhile"
    finally:
        for file in opened:
            os.close(file)


@pytest.mark.parametrize(("limit", "enough"), [(128, False), (1024, True)])
def test_the_limit_is_checked_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: int, enough: bool
) -> None:
    monkeypatch.setattr(inotify, "LIMIT", tmp_path / "limit")
    monkeypatch.setattr(inotify, "used", lambda: 40)
    inotify.LIMIT.write_text(f"{limit}\n")
    inotify.check(0, control=False)
    inotify.check(2, control=True)
    if enough:
        inotify.check(8, control=True)
        return
    with pytest.raises(BedError) as said:
        inotify.check(8, control=True)
    assert str(said.value) == (
        "fs.inotify.max_user_instances is 128: 40 are in use and the cluster needs 112 more; "
        "`sysctl -w fs.inotify.max_user_instances=1024` makes room until the next boot"
    )
