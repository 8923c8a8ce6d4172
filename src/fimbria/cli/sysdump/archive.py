"""Writing archives. Whatever goes in is redacted on the way, and bounded."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
import threading
import time
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final, Self

from fimbria.cli.sysdump import redact

MOST_FILE: Final = 16 << 20  # bytes of one file
MOST_TOTAL: Final = 1 << 30
MOST_FILES: Final = 10_000
MOST_HEADER: Final = 64 << 10
_NAME: Final = re.compile(r"[A-Za-z0-9_.:@+-]{1,200}(/[A-Za-z0-9_.:@+-]{1,200}){0,8}")


class Full(Exception):
    """The archive has reached its size; one sentence."""


class Archive(ABC):
    """Files by name. Its methods may be called from several threads."""

    def __init__(self, most: int = MOST_TOTAL) -> None:
        """`most` is how many bytes all files may have together, before compression."""
        self._most = most
        self._lock = threading.Lock()
        self.size = 0
        self.names: set[str] = set()

    def json(self, name: str, value: Any) -> None:
        """A JSON value. Raises Full, ValueError for a bad name."""
        self._put(name, json.dumps(redact.value(value), indent=1, default=str).encode())

    def text(self, name: str, value: str) -> None:
        """A text. Raises as json() does."""
        self._put(name, redact.text(value).encode())

    def lines(self, name: str, source: Iterable[str]) -> None:
        """A text line by line. What is more than MOST_FILE bytes is left out, and said so at the end."""
        self._put(name, b"".join(bounded(redact.lines(source))))

    def spooled(self, name: str, source: IO[bytes]) -> None:
        """A file on disk that was redacted as it was written, however large."""
        size = source.seek(0, io.SEEK_END)
        source.seek(0)
        with self._lock:
            self._room(name, size)
            self._write(name, source, size)

    def allow_more(self, size: int) -> None:
        """Makes room for what must be in it."""
        self._most = max(self._most, self.size + size)

    def _put(self, name: str, data: bytes) -> None:
        if len(data) > MOST_FILE:
            name, data = f"{name}.cut", data[:MOST_FILE]
        with self._lock:
            self._room(name, len(data))
            self._write(name, io.BytesIO(data), len(data))

    def _room(self, name: str, size: int) -> None:
        if not good_name(name):
            raise ValueError(f"{name!r} is no name for a file of the archive")
        if name in self.names:
            raise ValueError(f"{name} is there already")
        if self.size + size > self._most:
            raise Full(f"no room for {name} ({size >> 10} KiB): the archive may have {self._most >> 20} MiB")
        self.names.add(name)
        self.size += size

    @abstractmethod
    def _write(self, name: str, source: IO[bytes], size: int) -> None: ...


class Stream(Archive):
    """tar, compressed, into a pipe: what has been written can be read even if the rest never comes."""

    def __init__(self, sink: IO[bytes], most: int = MOST_TOTAL) -> None:
        super().__init__(most)
        self._zipped = gzip.GzipFile(fileobj=sink, mode="wb", compresslevel=3, mtime=0)
        self._sink = sink
        self._tar = tarfile.open(fileobj=self._zipped, mode="w|")  # noqa: SIM115 closed by close()

    def _write(self, name: str, source: IO[bytes], size: int) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mode, member.mtime = size, 0o600, int(time.time())
        self._tar.addfile(member, source)
        self._zipped.flush()
        self._sink.flush()

    def close(self) -> None:
        """The end; the sink stays open."""
        self._tar.close()
        self._zipped.close()
        self._sink.flush()


class Package(Archive):
    """A .zip file that appears, complete and readable for its owner only, when the block ends; or not at all."""

    def __init__(self, path: Path, folder: str, most: int = MOST_TOTAL) -> None:
        """`folder` is the one that all files are in. Raises OSError."""
        super().__init__(most)
        self.path = path
        self._folder = folder
        self._partial = path.with_name(f".{path.name}.{os.getpid()}.partial")

    def __enter__(self) -> Self:
        descriptor = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_DEFLATED, compresslevel=4)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._file, suppress(*(() if kind is None else (OSError, ValueError))):
                self._zip.close()
            if kind is None:
                self._partial.rename(self.path)
        finally:
            self._partial.unlink(missing_ok=True)

    def _write(self, name: str, source: IO[bytes], size: int) -> None:
        member = zipfile.ZipInfo(f"{self._folder}/{name}", time.gmtime()[:6])
        member.external_attr = 0o100600 << 16
        member.compress_type = zipfile.ZIP_DEFLATED
        with self._zip.open(member, "w", force_zip64=size >= 1 << 31) as file:
            while piece := source.read(1 << 20):
                file.write(piece)


def bounded(source: Iterable[str], most: int = MOST_FILE) -> Iterator[bytes]:
    """Encoded lines up to `most` bytes, and a last line that says what is missing."""
    size = left_out = 0
    for line in source:
        data = line.encode(errors="replace")
        if left_out or size + len(data) > most:
            left_out += len(data)
            continue
        size += len(data)
        yield data
    if left_out:
        yield f"... {left_out} bytes more were left out\n".encode()


def good_name(name: str) -> bool:
    """Whether a file may have this name: relative, no way out of its folder, nothing that a shell or a disk minds."""
    return _NAME.fullmatch(name) is not None and not any(part in (".", "..") for part in name.split("/"))


def safe(name: str) -> str:
    """A part of a name, with what isn't allowed there replaced."""
    return re.sub(r"[^A-Za-z0-9_.:@+-]", "_", name)[:200].strip(".") or "_"


def unpack(source: IO[bytes], most: int = MOST_FILE) -> Iterator[tuple[str, bytes]]:
    """Files of what a Stream wrote, one at a time. Raises EOFError or OSError, tarfile.TarError or zlib.error where it
    breaks off, ValueError for what no Stream writes.
    """
    with _Metered(fileobj=source) as meter, tarfile.open(fileobj=meter, mode="r|") as tar:
        for n, member in enumerate(tar):
            plain = member.isreg() and not member.issparse()
            if n >= MOST_FILES or not plain or member.size > most + 200 or not good_name(member.name):
                raise ValueError(f"{member.name[:200]!r} can't be in such an archive")
            meter.allow(member.size)
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            if len(data) != member.size:
                raise EOFError(f"{member.name} breaks off")
            yield member.name, data
            meter.allow(0)


class _Metered(gzip.GzipFile):
    """Reads what tarfile asks for as long as it is no more than was allowed: by itself it keeps whole headers in
    memory, and a name or a comment (pax, GNU's long names) may say that it has any number of bytes."""

    _room = MOST_HEADER

    def allow(self, size: int) -> None:
        """From now on `size` bytes of a file, its padding, and the headers of the next one."""
        self._room = size + MOST_HEADER

    def read(self, size: int | None = -1) -> bytes:
        """Raises ValueError, and what gzip raises."""
        data = super().read(size)
        self._room -= len(data)
        if self._room < 0:
            raise ValueError(f"a header of more than {MOST_HEADER} bytes can't be in such an archive")
        return data
