"""Archives: redacted, bounded, whole or not at all, and what may come out of one that a node sent."""

import gzip
import io
import os
import stat
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.cli.sysdump import archive
from fimbria.cli.sysdump.archive import Full, Package, Stream, bounded, good_name, safe, unpack


def sent(*files: tuple[str, str]) -> bytes:
    sink = io.BytesIO()
    stream = Stream(sink)
    for name, text in files:
        stream.text(name, text)
    stream.close()
    return sink.getvalue()


def test_a_package_is_private_whole_and_redacted(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with Package(path, "x") as package:
        package.json("a/b.json", {"password": "hunter2", "rows": 1})
        package.lines("log.txt", ["one\n", "token=hunter2\n"])
        assert not path.exists()
        (partial,) = tmp_path.iterdir()
        assert stat.S_IMODE(partial.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["x.zip"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with zipfile.ZipFile(path) as found:
        assert found.namelist() == ["x/a/b.json", "x/log.txt"]
        assert all(b"hunter2" not in found.read(n) for n in found.namelist())
        assert found.testzip() is None


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_nothing_is_left_of_one_that_was_interrupted(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), Package(tmp_path / "x.zip", "x") as package:
        package.text("a", "b")
        raise error
    assert os.listdir(tmp_path) == []


def test_an_older_archive_survives_an_interrupted_new_one(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    path.write_text("older")
    with pytest.raises(KeyboardInterrupt), Package(path, "x"):
        raise KeyboardInterrupt
    assert path.read_text() == "older"


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_FILE", 100)
    with Package(tmp_path / "x.zip", "x", most=250) as package:
        package.text("long", "x" * 500)
        assert package.names == {"long.cut"}
        package.text("b", "x" * 100)
        with pytest.raises(Full, match="no room for c"):
            package.text("c", "x" * 100)
        with pytest.raises(ValueError, match="there already"):
            package.text("b", "")
        package.allow_more(100)
        package.text("c", "x" * 100)


def test_lines_that_have_no_room_are_counted() -> None:
    assert list(bounded(["12345\n"] * 5, 13)) == [b"12345\n", b"12345\n", b"... 18 bytes more were left out\n"]


def test_a_stream_is_read_back() -> None:
    data = sent(("a.txt", "one"), ("b/c.json", "{}"))
    assert list(unpack(io.BytesIO(data))) == [("a.txt", b"one"), ("b/c.json", b"{}")]


def test_what_came_before_a_stream_broke_off_is_kept() -> None:
    data = sent(*((f"{i}.txt", os.urandom(2000).hex()) for i in range(20)))
    found: list[str] = []
    with suppress(EOFError, tarfile.TarError):  # Python's reader may take the break for the end
        found.extend(name for name, _ in unpack(io.BytesIO(data[: len(data) // 2])))
    whole = [name for name, _ in unpack(io.BytesIO(data))]
    assert 5 < len(found) < len(whole)
    assert found == whole[: len(found)]


def tar_of(member: tarfile.TarInfo, data: bytes = b"") -> io.BytesIO:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w:gz") as tar:
        tar.addfile(member, io.BytesIO(data))
    return io.BytesIO(sink.getvalue())


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../../b", "a b", "", "a//b", "-" * 300, "a\nb", "a/./b"])
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    assert not good_name(name)
    with pytest.raises(ValueError, match="can't be in such an archive"):
        list(unpack(tar_of(tarfile.TarInfo(name))))


def test_links_and_giants_are_refused() -> None:
    link = tarfile.TarInfo("a")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/shadow"
    with pytest.raises(ValueError, match="can't be"):
        list(unpack(tar_of(link)))
    giant = tarfile.TarInfo("a")
    giant.size = 5000
    with pytest.raises(ValueError, match="can't be"):
        list(unpack(tar_of(giant, b"x" * 5000), most=1000))


class Counted(io.BytesIO):
    """How much of a source was asked for."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.most = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.most = max(self.most, self.tell())
        return super().read(size)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_without_end_is_not_read_to_its_end(kind: bytes) -> None:
    """tarfile would hold it in memory whole; compressed it is a thousandth of its size."""
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 1 << 33
    data = header.tobuf(tarfile.GNU_FORMAT) + os.urandom(4 << 20)
    source = Counted(gzip.compress(data, 0))
    with pytest.raises(ValueError, match="a header of more than 65536 bytes"):
        list(unpack(source))
    assert source.most < 1 << 20


def test_long_names_and_many_files_are_read() -> None:
    long = "/".join(["n" * 150] * 9)
    files = [(long, "x" * 100_000), *((f"{long[:-4]}{i}", str(i)) for i in range(300))]
    assert list(unpack(io.BytesIO(sent(*files)))) == [(name, text.encode()) for name, text in files]


def test_files_without_end_are_not_read_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_FILES", 10)
    with pytest.raises(ValueError, match="can't be"):
        list(unpack(io.BytesIO(sent(*((f"{i}", "") for i in range(11))))))


def test_sparse_files_are_refused() -> None:
    """Their size is what their header says, whatever they hold."""
    sparse = tarfile.TarInfo("a")
    sparse.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "1000000"}
    with pytest.raises(ValueError, match="can't be"):
        list(unpack(tar_of(sparse)))


@given(st.binary(max_size=300), st.booleans())
def test_anything_may_be_sent(data: bytes, zipped: bool) -> None:
    with suppress(ValueError, OSError, EOFError, tarfile.TarError):
        list(unpack(io.BytesIO(gzip.compress(data) if zipped else data)))


@given(st.text(max_size=40))
def test_safe_names(text: str) -> None:
    assert good_name(safe(text))
