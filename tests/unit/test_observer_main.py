"""The observer's choice of the buffer that it reads."""

from pathlib import Path

from fimbria.observer.main import Observer


def test_newest_buffer(tmp_path: Path) -> None:
    """The last one made; the name under which an agent pins one for a moment is none."""
    maps = tmp_path / "fimbria" / "maps"
    observer = Observer("node1", tmp_path, tmp_path)
    assert observer._newest_map() is None
    maps.mkdir(parents=True)
    assert observer._newest_map() is None
    (maps / "events-1-4096").touch()
    (maps / "conntrack").touch()
    (maps / "events-2-4096_new50_7").touch()
    assert observer._newest_map() == maps / "events-1-4096"
