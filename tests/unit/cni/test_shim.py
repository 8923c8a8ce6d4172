"""The CNI plugin's binary against agents that answer, don't, and misbehave. A build with the address and undefined
behaviour sanitizers passes the same cases as the one that ships."""

import json
import os
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fimbria.sources.cni.spec import PROTOCOL

SHIM = Path(__file__).parents[3] / "src/fimbria/cni/shim"
CONF = b'{"cniVersion": "1.0.0", "name": "fimbria", "type": "fimbria-cni"}'
PATIENCE = 0.3  # of the checked build, seconds; see the Makefile
MIB = 1 << 20


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("shim")
    subprocess.run(["make", "-s", "-C", SHIM, f"OUT={out}", "all", "checked"], check=True)
    return {"shipped": out / "fimbria-cni", "checked": out / "fimbria-cni-checked"}


@pytest.fixture(params=["shipped", "checked"])
def shim(builds: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return builds[request.param]


@pytest.fixture
def checked(builds: dict[str, Path]) -> Path:
    return builds["checked"]


def run(shim: Path, command: str, sock: Path | str = "/nonexistent", stdin: Any = CONF, **env: str) -> tuple[int, Any]:
    """Exit status, and stdout as JSON (None if empty). Nothing may be written to stderr: sanitizers report there."""
    done = subprocess.run(
        [shim], input=stdin, capture_output=True, timeout=30, check=False,
        env={"CNI_COMMAND": command, "FIMBRIA_CNI_SOCKET": str(sock), **env},
    )  # fmt: skip
    assert done.stderr == b""
    return done.returncode, json.loads(done.stdout) if done.stdout else None


class Agent:
    """Accepts one connection and lets `behave(connection)` do the rest; keeps what came before."""

    def __init__(self, path: Path, behave: Callable[["Agent", socket.socket], None]) -> None:
        self.path = path
        self.env: dict[str, str] = {}
        self.stdin = b""
        self.fds: list[int] = []
        self._behave = behave
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        with connection:
            self._behave(self, connection)

    def receive(self, connection: socket.socket) -> None:
        data, self.fds, _, _ = socket.recv_fds(connection, 1 << 16, 4)
        (length,) = struct.unpack_from("!I", data)
        while len(data) < 4 + length:
            chunk = connection.recv(1 << 16)
            assert chunk
            data += chunk
        (count,) = struct.unpack_from("!I", data, 4)
        rest = data[8:]
        for _ in range(count):
            row, rest = rest.split(b"\0", 1)
            key, _, value = row.decode().partition("=")
            self.env[key] = value
        self.stdin = rest

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self._listener.close()
        for fd in self.fds:
            os.close(fd)
        assert not self._thread.is_alive()


@contextmanager
def agent(tmp_path: Path, behave: Callable[[Agent, socket.socket], None]) -> Iterator[Agent]:
    one = Agent(tmp_path / f"{random.getrandbits(32):x}.sock", behave)
    try:
        yield one
    finally:
        one.close()


def says(answer: bytes, status: int = 0, length: int | None = None) -> Callable[[Agent, socket.socket], None]:
    def behave(one: Agent, connection: socket.socket) -> None:
        one.receive(connection)
        connection.sendall(struct.pack("!II", status, len(answer) if length is None else length) + answer)

    return behave


# --- without an agent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stdin", "version"),
    [
        (b'{"cniVersion":"0.4.0"}', "0.4.0"),
        (b' {\n "x" : {"cniVersion": "0.1.0"}, "cniVersion" :\t"1.1.0" }', "1.1.0"),
        (b'{"a": "\\"cniVersion\\": \\"0.2.0\\"", "l": [{"cniVersion": "0.1.0"}], "cniVersion": "0.3.1"}', "0.3.1"),
        (b'{"cniVersion":"9.9.9-rc.1+b"}', "9.9.9-rc.1+b"),
        (b'{"cniVersion": 5}', "1.1.0"),
        (b'{"cniVersion":"1.0.0\\"}', "1.1.0"),
        (b'{"cniVersion":"' + b"1" * 100 + b'"}', "1.1.0"),
        (b'{"cniVersion"', "1.1.0"),
        (b'{"cniVersion":', "1.1.0"),
        (b'{"cniVersion":"', "1.1.0"),
        (b'"\\', "1.1.0"),
        (b"\0\0\0", "1.1.0"),
        (b"", "1.1.0"),
    ],
)
def test_version_needs_no_agent(shim: Path, stdin: bytes, version: str) -> None:
    status, body = run(shim, "VERSION", stdin=stdin)
    assert status == 0
    assert body == {"cniVersion": version, "supportedVersions": ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]}


@pytest.mark.parametrize(("command", "code"), [("ADD", 11), ("DEL", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)])
def test_no_agent(checked: Path, tmp_path: Path, command: str, code: int) -> None:
    """Not for some time, either."""
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(dead))
    plain = tmp_path / "plain"
    plain.write_text("")
    for path in ("/nonexistent", dead, plain, "/" + "x" * 200):
        status, body = run(checked, command, path)
        assert status == 1
        assert body.keys() == {"cniVersion", "code", "msg", "details"}
        assert (body["cniVersion"], body["code"]) == ("1.0.0", code)


def test_an_agent_that_comes_back_in_time(builds: dict[str, Path], tmp_path: Path) -> None:
    """It is being replaced: a runtime's next attempt would come much later."""
    path = tmp_path / "back.sock"
    for gone in (False, True):  # its socket is there without it, as after a crash, or isn't
        if not gone:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
        env = {"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "one", "FIMBRIA_CNI_SOCKET": str(path)}
        process = subprocess.Popen([builds["shipped"]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        time.sleep(0.5)
        path.unlink(missing_ok=True)
        one = Agent(path, says(b"{}"))
        try:
            assert process.communicate(CONF, timeout=10)[0] == b"{}"
            assert process.returncode == 0
        finally:
            one.close()
            path.unlink(missing_ok=True)


def test_no_command(shim: Path) -> None:
    status, body = run(shim, "")
    assert (status, body["code"]) == (1, 4)
    assert "CNI_COMMAND" in body["msg"]


def test_standard_input_that_is_closed_or_endless(shim: Path) -> None:
    done = subprocess.run(["sh", "-c", f"{shim} <&-"], env={"CNI_COMMAND": "ADD"}, capture_output=True, check=False)
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 5)
    with open("/dev/zero", "rb") as zero:
        done = subprocess.run([shim], stdin=zero, env={"CNI_COMMAND": "ADD"}, capture_output=True, check=False)
    assert (done.returncode, json.loads(done.stdout)["code"]) == (1, 5)


def test_standard_output_that_takes_nothing(shim: Path) -> None:
    """A runtime that didn't get the result must not see success."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [shim], input=CONF, stdout=full, stderr=subprocess.PIPE, env={"CNI_COMMAND": "VERSION"}, check=False
        )
    assert done.returncode == 1
    assert b"cannot write" in done.stderr


def test_variables_that_are_too_long(shim: Path, tmp_path: Path) -> None:
    status, body = run(shim, "ADD", CNI_ARGS="x" * 70_000)
    assert (status, body["code"], body["details"]) == (1, 4, "CNI_ARGS")
    status, body = run(shim, "ADD", CNI_CONTAINERID="x" * 40_000, CNI_ARGS="y" * 40_000)
    assert (status, body["code"]) == (1, 4)


def test_a_namespace_that_is_gone(shim: Path, tmp_path: Path) -> None:
    status, body = run(shim, "ADD", CNI_NETNS=str(tmp_path / "gone"))
    assert (status, body["code"]) == (1, 4)
    assert "CNI_NETNS" in body["msg"]


# --- what the agent gets -----------------------------------------------------------------------------------------


def test_what_is_handed_over(shim: Path, tmp_path: Path) -> None:
    with agent(tmp_path, says(b'{"ok":1}')) as one:
        env = {"CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0", "CNI_ARGS": "A=B;C=ä", "CNI_PATH": "/x", "HOME": "/root"}
        assert run(shim, "ADD", one.path, CNI_NETNS="/proc/self/ns/net", **env) == (0, {"ok": 1})
    wanted = {"CNI_COMMAND": "ADD", "CNI_NETNS": "/proc/self/ns/net", "FIMBRIA_PROTOCOL": str(PROTOCOL)} | env
    assert one.env == {k: v for k, v in wanted.items() if k not in ("HOME", "CNI_PATH")}
    assert one.stdin == CONF


def test_the_namespace_goes_along_as_a_descriptor(shim: Path, tmp_path: Path) -> None:
    """Whatever the path is: of a process, or a bind mount that the agent needn't see."""
    bound = tmp_path / "ns"
    bound.symlink_to("/proc/self/ns/net")
    for path in (f"/proc/{os.getpid()}/ns/net", str(bound)):
        inode = []

        def behave(one: Agent, connection: socket.socket, inode: list[int] = inode) -> None:
            one.receive(connection)
            inode.extend(os.fstat(fd).st_ino for fd in one.fds)
            connection.sendall(struct.pack("!II", 0, 0))

        with agent(tmp_path, behave) as one:
            assert run(shim, "ADD", one.path, CNI_NETNS=path) == (0, None)
        assert inode == [os.stat("/proc/self/ns/net").st_ino]


@pytest.mark.parametrize("netns", ["", "/gone"])
def test_del_without_a_namespace(shim: Path, tmp_path: Path, netns: str) -> None:
    with agent(tmp_path, says(b"")) as one:
        assert run(shim, "DEL", one.path, CNI_NETNS=netns) == (0, None)
    assert one.fds == []
    assert one.env["CNI_NETNS"] == netns


def test_a_fifo_for_a_namespace_does_not_block(shim: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with agent(tmp_path, says(b"")) as one:
        assert run(shim, "ADD", one.path, CNI_NETNS=str(tmp_path / "fifo")) == (0, None)


@pytest.mark.parametrize("size", [MIB - 1, MIB, MIB + 1, 3 * MIB])
def test_large_configurations(shim: Path, tmp_path: Path, size: int) -> None:
    stdin = b'{"cniVersion":"1.0.0","x":"' + b"a" * (size - 29) + b'"}'
    assert len(stdin) == size
    with agent(tmp_path, says(b"{}")) as one:
        status, body = run(shim, "DEL", one.path, stdin=stdin)
        if size < MIB:
            assert (status, body) == (0, {})
        else:
            assert (status, body["code"]) == (1, 5)
    assert one.stdin == (stdin if size < MIB else b"")


# --- what the agent answers --------------------------------------------------------------------------------------


def test_answers_of_any_size(shim: Path, tmp_path: Path) -> None:
    for size in (2, 4096, MIB - 2):
        answer = b'"' + b"a" * size + b'"'
        with agent(tmp_path, says(answer)) as one:
            assert run(shim, "ADD", one.path) == (0, "a" * size)
    with agent(tmp_path, says(b'{"code":7}', status=1)) as one:
        assert run(shim, "ADD", one.path) == (1, {"code": 7})
    with agent(tmp_path, says(b"", status=256)) as one:  # an exit status has eight bits
        assert run(shim, "DEL", one.path)[0] == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0\0\0",
        struct.pack("!I", 0),
        struct.pack("!II", 0, 100),
        struct.pack("!II", 0, 100) + b'{"cniVersion"',
        struct.pack("!II", 0, 0xFFFFFFFF),
        struct.pack("!II", 0, MIB + 1) + b"x",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_an_agent_that_dies_or_is_none(shim: Path, tmp_path: Path, raw: bytes) -> None:
    """Half an answer is no answer: the runtime is told to try again, and gets JSON."""

    def behave(one: Agent, connection: socket.socket) -> None:
        one.receive(connection)
        connection.sendall(raw)

    for command, code in (("ADD", 11), ("STATUS", 50)):
        with agent(tmp_path, behave) as one:
            status, body = run(shim, command, one.path)
        assert (status, body["code"], body["cniVersion"]) == (1, code, "1.0.0")


def test_an_agent_that_hangs_up_at_once(shim: Path, tmp_path: Path) -> None:
    with agent(tmp_path, lambda _one, _connection: None) as one:
        status, body = run(shim, "ADD", one.path, stdin=CONF + b" " * (MIB - 1000))
    assert (status, body["code"]) == (1, 11)


def test_an_agent_that_never_answers(checked: Path, tmp_path: Path) -> None:
    """Neither reading nor trickling buys an agent more time than the deadline."""
    done = threading.Event()

    def silent(one: Agent, connection: socket.socket) -> None:
        done.wait(20)

    def mute(one: Agent, connection: socket.socket) -> None:
        one.receive(connection)
        done.wait(20)

    def trickling(one: Agent, connection: socket.socket) -> None:
        one.receive(connection)
        connection.sendall(struct.pack("!II", 0, 1000))
        while not done.wait(PATIENCE / 10):
            try:
                connection.sendall(b"x")
            except OSError:
                return

    big = CONF + b" " * (MIB - 1000)
    for behave, stdin in ((silent, big), (mute, CONF), (trickling, CONF)):
        done.clear()
        with agent(tmp_path, behave) as one:
            started = time.monotonic()
            status, body = run(checked, "ADD", one.path, stdin=stdin)
            took = time.monotonic() - started
            done.set()
        assert (status, body["code"]) == (1, 11)
        assert took >= PATIENCE


def test_an_agent_that_accepts_nothing(checked: Path, tmp_path: Path) -> None:
    path = tmp_path / "full.sock"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(path))
        listener.listen(0)
        waiting.connect(str(path))
        status, body = run(checked, "ADD", path)
    assert (status, body["code"]) == (1, 11)


# --- anything at all ---------------------------------------------------------------------------------------------


def test_arbitrary_input_under_the_sanitizers(checked: Path, tmp_path: Path) -> None:
    """Bytes from pieces of JSON and noise, as configuration and as answer: never a crash, always JSON on failure."""
    dice = random.Random(20)
    pieces = [b'"cniVersion"', b'"', b":", b"\\", b"{", b"}", b"[", b"]", b'"1.0.0"', b" ", b"\0", b"\xff", b"1.1.0"]
    for _ in range(150):
        stdin = b"".join(dice.choice(pieces) for _ in range(dice.randrange(20)))
        assert run(checked, "VERSION", stdin=stdin)[1]["supportedVersions"]
    for _ in range(60):
        raw = struct.pack("!II", dice.choice((0, 1)), dice.randrange(12)) + dice.randbytes(dice.randrange(12))

        def behave(one: Agent, connection: socket.socket, raw: bytes = raw) -> None:
            one.receive(connection)
            connection.sendall(raw)

        with agent(tmp_path, behave) as one:
            done = subprocess.run(
                [checked], input=CONF, capture_output=True, check=False, timeout=30,
                env={"CNI_COMMAND": "DEL", "FIMBRIA_CNI_SOCKET": str(one.path)},
            )  # fmt: skip
        (status, length), body = struct.unpack_from("!II", raw), raw[8:]
        assert done.stderr == b""
        if len(body) < length:
            assert json.loads(done.stdout)["code"] == 11
        else:
            assert (done.returncode, done.stdout) == (status, body[:length])


# --- what ships --------------------------------------------------------------------------------------------------


def test_the_binary_is_static_and_small(builds: dict[str, Path]) -> None:
    binary = builds["shipped"]
    headers = subprocess.run(["readelf", "-lW", binary], capture_output=True, text=True, check=True).stdout
    assert "INTERP" not in headers
    assert binary.stat().st_size < MIB
