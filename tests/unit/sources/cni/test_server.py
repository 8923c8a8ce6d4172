"""Frames of the shim, as bytes and over a real socket."""

import asyncio
import gc
import json
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.sources.cni.server import MAX_FRAME, CniServer, FrameError, netns_problem, split_frame
from fimbria.sources.cni.spec import CniError, Code, Request

CONF = b'{"cniVersion": "1.1.0", "name": "fimbria"}'
ENV = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0"}


def frame(env: dict[str, str], stdin: bytes) -> bytes:
    body = struct.pack("!I", len(env)) + b"".join(f"{k}={v}".encode() + b"\0" for k, v in env.items()) + stdin
    return struct.pack("!I", len(body)) + body


# --- bytes -------------------------------------------------------------------------------------------------------

NO_NUL = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)))


@given(st.dictionaries(NO_NUL.filter(lambda k: "=" not in k and k.isascii()), NO_NUL, max_size=8), st.binary())
def test_a_frame_survives_the_way(env: dict[str, str], stdin: bytes) -> None:
    assert split_frame(frame(env, stdin)[4:]) == (env, stdin)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_a_frame_or_an_error(data: bytes) -> None:
    with suppress(FrameError):
        split_frame(data)


@given(st.integers(0, 2**32 - 1), st.binary(max_size=300))
def test_arbitrary_counts_end_soon(count: int, data: bytes) -> None:
    with suppress(FrameError):
        env, _ = split_frame(struct.pack("!I", count) + data)
        assert len(env) <= count


@pytest.mark.parametrize("data", [b"", b"\0\0\0", struct.pack("!I", 1) + b"A=b", struct.pack("!I", 1) + b"A\0"])
def test_frames_that_end_too_early(data: bytes) -> None:
    with pytest.raises(FrameError):
        split_frame(data)


# --- namespaces --------------------------------------------------------------------------------------------------


def test_what_is_no_namespace_of_a_container(tmp_path: Path) -> None:
    found = {}
    for path in (tmp_path, "/dev/null", "/proc/self/ns/uts", "/proc/thread-self/ns/net"):
        fd = os.open(path, os.O_RDONLY)
        try:
            found[str(path)] = netns_problem(fd)
        finally:
            os.close(fd)
    assert found.pop("/proc/thread-self/ns/net") == "is the node's own network namespace"
    assert set(found.values()) == {"is no network namespace"}


# --- the socket --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(path: Path, seen: list[Request]) -> AsyncIterator[CniServer]:
    async def handler(request: Request) -> bytes:
        seen.append(request)
        if request.container_id == "refused":
            raise CniError(Code.TRY_AGAIN_LATER, "not now")
        if request.container_id == "broken":
            raise RuntimeError("a fault of ours")
        return b"{}\n"

    server = CniServer(path, handler)
    task = asyncio.create_task(server.run())
    while not path.exists():  # noqa: ASYNC110, ASYNC240
        await asyncio.sleep(0.001)
    try:
        yield server
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def ask(path: Path, *parts: bytes, fds: tuple[int, ...] = (), hang_up: bool = False) -> tuple[int, bytes] | None:
    """Status and stdout; None if the server hung up without an answer."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        await loop.sock_connect(client, str(path))
        socket.send_fds(client, [parts[0]], list(fds))
        for part in parts[1:]:
            await asyncio.sleep(0.01)
            await loop.sock_sendall(client, part)
        if hang_up:
            return None
        answer = b""
        while chunk := await asyncio.wait_for(loop.sock_recv(client, 1 << 16), 5):
            answer += chunk
    if not answer:
        return None
    status, length = struct.unpack_from("!II", answer)
    assert length == len(answer) - 8
    return status, answer[8:]


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_requests_over_the_socket(tmp_path: Path) -> None:
    path, seen = tmp_path / "cni.sock", []  # type: ignore[var-annotated]
    async with serving(path, seen) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        whole = frame(ENV, CONF)
        assert await ask(path, whole) == (0, b"{}\n")
        assert await ask(path, *(whole[i : i + 7] for i in range(0, len(whole), 7))) == (0, b"{}\n")
        for container, code in (("refused", 11), ("broken", 999)):
            answer = await ask(path, frame(ENV | {"CNI_CONTAINERID": container}, CONF))
            assert answer is not None
            assert answer[0] == 1
            body = json.loads(answer[1])
            assert (body["cniVersion"], body["code"]) == ("1.1.0", code)
        assert server.requests == {("DEL", "0"): 2, ("DEL", "11"): 1, ("DEL", "999"): 1}


async def test_an_add_needs_a_network_namespace(tmp_path: Path) -> None:
    path, seen = tmp_path / "cni.sock", []  # type: ignore[var-annotated]
    add = ENV | {"CNI_COMMAND": "ADD", "CNI_NETNS": "/run/netns/blue"}
    async with serving(path, seen):
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        wrong = os.open("/dev/null", os.O_RDONLY)
        try:
            for fds in ((), (own,), (wrong,)):
                answer = await ask(path, frame(add, CONF), fds=fds)
                assert answer is not None
                body = json.loads(answer[1])
                assert body["code"] == 4
                assert "CNI_NETNS" in body["msg"]
        finally:
            os.close(own)
            os.close(wrong)
    assert not seen


async def test_garbage_costs_nothing(tmp_path: Path) -> None:
    """Bad frames, hang-ups, superfluous descriptors, deep JSON: an error or a hang-up, no descriptor kept, and the next
    request is served."""
    path, seen = tmp_path / "cni.sock", []  # type: ignore[var-annotated]
    async with serving(path, seen):
        await ask(path, frame(ENV, CONF))
        gc.collect()  # what earlier tests have left may close at any time
        before = open_fds()
        null = os.open("/dev/null", os.O_RDONLY)
        assert await ask(path, struct.pack("!I", MAX_FRAME + 1)) is None
        assert await ask(path, frame({}, b"")[:4] + b"\xff" * 4) is None
        assert await ask(path, b"\0\0\0\4\xff\xff\xff\xff") is None
        await ask(path, frame(ENV, CONF)[:9], fds=(null, null), hang_up=True)
        assert await ask(path, frame(ENV, CONF), fds=(null, null, null, null)) == (0, b"{}\n")
        deep = await ask(path, frame(ENV, b"[" * 200_000))
        assert deep is not None
        assert json.loads(deep[1])["code"] == 6
        os.close(null)
        async with asyncio.timeout(10):
            while open_fds() != before:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.01)
        assert await ask(path, frame(ENV, CONF)) == (0, b"{}\n")


async def test_a_second_server_takes_over_the_socket(tmp_path: Path) -> None:
    """A restarted agent finds the socket of the one before it."""
    path, first, second = tmp_path / "cni.sock", [], []  # type: ignore[var-annotated]
    async with serving(path, first):
        await ask(path, frame(ENV, CONF))
    inode = path.stat().st_ino
    async with serving(path, second):
        while path.stat().st_ino == inode:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert await ask(path, frame(ENV, CONF)) == (0, b"{}\n")
    assert (len(first), len(second)) == (1, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["cni.sock"]  # noqa: ASYNC240
