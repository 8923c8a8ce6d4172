"""rtnetlink: messages, attributes, and a socket that sends many requests at once.

Formats: RFC 3549, netlink(7), rtnetlink(7), include/uapi/linux/netlink.h and rtnetlink.h; strict checking and extended
acknowledgements: Documentation/userspace-api/netlink/intro.rst. The objects (devices, routes, ...) have modules of
their own, which turn dataclasses into a Request and message bodies back into dataclasses without any I/O.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from fimbria.kernel._libbpf import lib

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
ATTR = struct.Struct("=HH")
U8, U16, U32, U64, S32 = (struct.Struct("=" + c) for c in "BHIQi")
BE16 = struct.Struct("!H")

ROUTE, SOCK_DIAG = 0, 4  # enum of netlink protocols in netlink.h
REQUEST, MULTI, ACK, DUMP_INTR = 0x1, 0x2, 0x4, 0x10
DUMP = 0x300
REPLACE, EXCL, CREATE, APPEND = 0x100, 0x200, 0x400, 0x800
NLMSG_NOOP, NLMSG_ERROR, NLMSG_DONE, NLMSG_OVERRUN = 1, 2, 3, 4

_CAPPED, _ACK_TLVS = 0x100, 0x200
_SOL_NETLINK = 270
_CAP_ACK, _EXT_ACK, _STRICT = 10, 11, 12
_ADD_MEMBERSHIP = 1
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_NESTED, _TYPE_MASK = 0x8000, 0x3FFF

_CHUNK_BYTES, _CHUNK_MESSAGES = 96 * 1024, 512
_BUFFER = 4 << 20
_DUMP_TRIES = 5
_ANSWER_SECONDS = 30


class NetlinkError(OSError):
    """A refused request: `errno`, the request's label, and the kernel's own explanation where it gives one."""

    def __init__(self, code: int, label: str, explanation: str = "") -> None:
        super().__init__(code, f"{label}: {os.strerror(code)}" + (f" ({explanation})" if explanation else ""))
        self.label = label
        self.explanation = explanation


class WireError(ValueError):
    """A message that doesn't follow the format."""


class ResyncNeeded(Exception):
    """The kernel dropped notifications (ENOBUFS): whoever listens must read everything again."""


@dataclass(frozen=True, slots=True)
class Request:
    """One message to the kernel: type, flags beyond NLM_F_REQUEST, a padded body, and words for errors."""

    type: int
    flags: int
    body: bytes
    label: str


@dataclass(frozen=True, slots=True)
class Message:
    """A message from the kernel: its body is `data[start:end]`."""

    type: int
    data: bytes
    start: int
    end: int


# -- attributes


def attr(kind: int, value: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    n = len(value)
    return ATTR.pack(n + 4, kind) + value + b"\0" * (-n & 3)


def nest(kind: int, *parts: bytes) -> bytes:
    """An attribute made of attributes."""
    return attr(kind | _NESTED, b"".join(parts))


def attr_u32(kind: int, value: int) -> bytes:
    """An attribute of 32 bits in host byte order."""
    return ATTR.pack(8, kind) + U32.pack(value)


def attr_u8(kind: int, value: int) -> bytes:
    """An attribute of 8 bits."""
    return attr(kind, U8.pack(value))


def attr_text(kind: int, value: str) -> bytes:
    """A NUL-terminated text attribute."""
    return attr(kind, value.encode() + b"\0")


def attrs(data: bytes, start: int, end: int) -> dict[int, bytes]:
    """The attributes in `data[start:end]` by number (the last of equals wins). Raises WireError."""
    found: dict[int, bytes] = {}
    unpack = ATTR.unpack_from
    while start + 4 <= end:
        length, kind = unpack(data, start)
        stop = start + length
        if length < 4 or stop > end:
            raise WireError(f"attribute {kind & _TYPE_MASK} of {length} bytes does not fit at offset {start}")
        found[kind & _TYPE_MASK] = data[start + 4 : stop]
        start += (length + 3) & ~3
    return found


def number(value: bytes | None, default: int = 0) -> int:
    """An attribute's value as an unsigned number in host byte order."""
    return int.from_bytes(value, "little" if U16.pack(1)[0] else "big") if value else default


def text(value: bytes | None) -> str:
    """An attribute's value as text, up to the first NUL."""
    return value.split(b"\0", 1)[0].decode(errors="replace") if value else ""


# -- messages


def encode(request: Request, sequence: int, extra_flags: int = 0) -> bytes:
    """The wire bytes of one request."""
    header = HEADER.pack(16 + len(request.body), request.type, request.flags | REQUEST | extra_flags, sequence, 0)
    return header + request.body


def split(data: bytes) -> list[tuple[int, int, int, int, int]]:
    """The messages of one datagram as (type, flags, sequence, body start, body end). Raises WireError."""
    found = []
    position, size = 0, len(data)
    while position + 16 <= size:
        length, kind, flags, sequence, _port = HEADER.unpack_from(data, position)
        if length < 16 or position + length > size:
            raise WireError(f"message of {length} bytes does not fit at offset {position}")
        found.append((kind, flags, sequence, position + 16, position + length))
        position += (length + 3) & ~3
    return found


def parse_error(data: bytes, flags: int, start: int, end: int) -> tuple[int, str]:
    """The errno (0: acknowledged) and the kernel's explanation in an NLMSG_ERROR body. Raises WireError."""
    if end - start < 4:
        raise WireError("error message without a number")
    code = -S32.unpack_from(data, start)[0]
    explanation = ""
    if flags & _ACK_TLVS and end - start >= 20:
        echoed = U32.unpack_from(data, start + 4)[0]
        skip = start + 20 if flags & _CAPPED else start + 4 + (echoed + 3 & ~3)
        explanation = text(attrs(data, skip, end).get(1)) if skip <= end else ""
    return code, explanation


# -- sockets


def open_socket(netns_fd: int | None, flags: int = 0, protocol: int = ROUTE) -> socket.socket:
    """A netlink socket of this namespace or of the given one. Raises OSError."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | flags
    if netns_fd is None:
        return socket.socket(socket.AF_NETLINK, kind, protocol)
    fd = lib.fim_socket_in(netns_fd, socket.AF_NETLINK, kind, protocol)
    if fd < 0:
        raise OSError(-fd, f"netlink socket in namespace of descriptor {netns_fd}: {os.strerror(-fd)}")
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol, fileno=fd)


class NetlinkSocket:
    """Requests and dumps. Calls block (microseconds; deleting a device 20 ms and more) and release the GIL.

    Safe to use from several threads; each call is one exchange.
    """

    def __init__(self, netns_fd: int | None = None, *, strict: bool = True, protocol: int = ROUTE) -> None:
        """Opens the socket, in another network namespace when `netns_fd` is given (which stays the caller's).

        `strict` has the kernel check dump requests and filter by what they name; `protocol` is ROUTE or SOCK_DIAG.
        Raises OSError.
        """
        self._lock = threading.Lock()
        self._sequence = 0
        self._socket = open_socket(netns_fd, protocol=protocol)
        try:
            self._chunk = _CHUNK_MESSAGES if self._enlarge() else 64
            for option in (_CAP_ACK, _EXT_ACK, *((_STRICT,) if strict else ())):
                self._socket.setsockopt(_SOL_NETLINK, option, 1)
            # Answers are queued before send returns; the limit only turns a kernel surprise into an error.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _ANSWER_SECONDS, 0))
            self._socket.bind((0, 0))
        except BaseException:
            self._socket.close()
            raise

    def _enlarge(self) -> bool:
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
        except PermissionError:
            return False
        return True

    def run(self, requests: Sequence[Request]) -> list[NetlinkError | None]:
        """Sends all requests in order and returns the outcome of each: None, or why it was refused.

        One refusal doesn't keep the others from being carried out. Raises OSError when the exchange itself fails.
        """
        outcome: list[NetlinkError | None] = [None] * len(requests)
        with self._lock:
            first = 0
            while first < len(requests):
                first = self._run_chunk(requests, first, outcome)
        return outcome

    def _run_chunk(self, requests: Sequence[Request], first: int, outcome: list[NetlinkError | None]) -> int:
        """Only the last message asks for an acknowledgement: the kernel answers in order and reports errors anyway."""
        size, stop = 0, first
        while stop < len(requests) and stop - first < self._chunk:
            size += 16 + len(requests[stop].body)
            if size > _CHUNK_BYTES and stop > first:
                break
            stop += 1
        base = self._next(stop - first)
        parts = [encode(requests[i], base + i - first) for i in range(first, stop - 1)]
        parts.append(encode(requests[stop - 1], base + stop - 1 - first, ACK))
        self._socket.send(b"".join(parts))
        last = base + stop - 1 - first
        while True:
            data = self._receive()
            for kind, flags, sequence, start, end in split(data):
                if kind != NLMSG_ERROR or not base <= sequence <= last:
                    continue  # the rest of an earlier exchange that was cut short
                code, explanation = parse_error(data, flags, start, end)
                if code:
                    i = first + sequence - base
                    outcome[i] = NetlinkError(code, requests[i].label, explanation)
                if sequence == last:
                    return stop

    def do(self, *requests: Request) -> None:
        """Carries out the requests; raises the first NetlinkError."""
        for error in self.run(requests):
            if error is not None:
                raise error

    def query(self, request: Request) -> list[Message]:
        """Sends one request that isn't a dump and returns what it answers. Raises NetlinkError."""
        with self._lock:
            return self._answers(request, ACK)[0]

    def dump(self, request: Request) -> list[Message]:
        """All messages of a dump, repeated when the kernel says that it was interrupted by a change.

        Raises NetlinkError; EINTR when the table changes faster than it can be read.
        """
        with self._lock:
            for _ in range(_DUMP_TRIES):
                messages, interrupted = self._answers(request, DUMP)
                if not interrupted:
                    return messages
        raise NetlinkError(errno.EINTR, request.label, "kept changing while it was read")

    def _answers(self, request: Request, extra_flags: int) -> tuple[list[Message], bool]:
        sequence = self._next(1)
        self._socket.send(encode(request, sequence, extra_flags))
        found: list[Message] = []
        interrupted = False
        while True:
            data = self._receive()
            for kind, flags, answer_to, start, end in split(data):
                if answer_to != sequence:
                    continue
                interrupted |= bool(flags & DUMP_INTR)
                if kind == NLMSG_ERROR:
                    code, explanation = parse_error(data, flags, start, end)
                    if code:
                        raise NetlinkError(code, request.label, explanation)
                    return found, False
                if kind == NLMSG_DONE:
                    self._done(request, data, start, end)
                    return found, interrupted
                if kind > NLMSG_OVERRUN:
                    found.append(Message(kind, data, start, end))

    @staticmethod
    def _done(request: Request, data: bytes, start: int, end: int) -> None:
        code = -S32.unpack_from(data, start)[0] if end - start >= 4 else 0
        if code > 0:
            explanation = ""
            with contextlib.suppress(WireError):
                explanation = text(attrs(data, start + 4, end).get(1))
            raise NetlinkError(code, request.label, explanation)

    def _next(self, n: int) -> int:
        if self._sequence + n > 0xFFFFFFFF:
            self._sequence = 0
        first = self._sequence + 1
        self._sequence += n
        return first

    def _receive(self) -> bytes:
        try:
            data, _, flags, _ = self._socket.recvmsg(1 << 16)
        except BlockingIOError:
            raise TimeoutError(errno.ETIMEDOUT, "netlink: the kernel did not answer") from None
        if flags & socket.MSG_TRUNC:
            raise OSError(errno.EMSGSIZE, "netlink: an answer was cut")
        return data

    def close(self) -> None:
        """Closes the socket. May be called twice."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class GroupSocket:
    """A nonblocking socket subscribed to notification groups (enum rtnetlink_groups)."""

    def __init__(self, groups: Iterable[int], netns_fd: int | None = None) -> None:
        """Subscribes at once. Raises OSError."""
        self._socket = open_socket(netns_fd, socket.SOCK_NONBLOCK)
        try:
            with contextlib.suppress(PermissionError):
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            self._socket.setblocking(False)
            self._socket.bind((0, 0))
            for group in groups:
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """The descriptor, for add_reader()."""
        return self._socket.fileno()

    def read(self, limit: int = 256) -> list[Message]:
        """What has arrived, at most `limit` datagrams, without waiting. Raises ResyncNeeded, WireError."""
        found: list[Message] = []
        for _ in range(limit):
            try:
                data = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError as e:
                if e.errno == errno.ENOBUFS:
                    raise ResyncNeeded from e
                raise
            found += [Message(kind, data, a, b) for kind, _, _, a, b in split(data) if kind > NLMSG_OVERRUN]
        return found

    def close(self) -> None:
        """Closes the socket. May be called twice."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
