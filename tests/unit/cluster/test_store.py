"""The image store of the bed: what a new node gets from it is whole, whenever somebody kills the one who gives it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.bed import processes
from tests.cluster.bed.errors import BedError
from tests.cluster.bed.store import Marks, Store


class Killed(BaseException):
    """As SIGKILL: nothing runs afterwards."""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "store")
    for name, text in (("overlay/1/file", "layer"), ("overlay/meta.db", "layers: 1"), ("tmpmounts/x", "")):
        file = made.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    archive = tmp_path / "a.tar"
    archive.touch()
    made.marks.set("a", archive)
    return made


def test_a_new_node_has_all_of_it_and_a_database_of_its_own(store: Store, tmp_path: Path) -> None:
    root, marks = tmp_path / "node" / "containerd", Marks(tmp_path / "node" / "images")
    store.fill(root, marks)
    assert sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()) == [
        "overlay/1/file",
        "overlay/meta.db",
    ]
    assert (root / "overlay/1/file").samefile(store.root / "overlay/1/file")
    assert not (root / "overlay/meta.db").samefile(store.root / "overlay/meta.db")
    assert marks.archives() == {"a": "a.tar"}
    assert [p.name for p in root.parent.iterdir() if "partial" in p.name] == []


@pytest.mark.parametrize("other_disk", [False, True])
def test_a_node_whose_filling_was_cut_off_has_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_disk: bool
) -> None:
    """Layers without their database: its containerd couldn't make any layer that has the same number."""
    root, marks = tmp_path / "node" / "containerd", Marks(tmp_path / "node" / "images")
    really = processes.run

    def cut_off(command: Sequence[str], **options: Any) -> str:
        really(command, **options)
        database = Path(command[-1]) / "overlay/meta.db"
        assert database.exists()
        database.unlink()
        if other_disk and "--link" in command:
            raise BedError("Invalid cross-device link")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(processes, "run", cut_off)
        with pytest.raises(Killed):
            store.fill(root, marks)
    assert not root.exists() and marks.archives() == {}
    store.fill(root, marks)
    assert (root / "overlay/meta.db").read_text() == "layers: 1" and marks.archives() == {"a": "a.tar"}
