"""The program of the test's pods, on real sockets of this machine."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fimbria.cli.connectivity import objects, prober

LOCAL = ("127.0.0.1", "::1")
NOBODYS = 1  # a port that nobody has; a free one of those the kernel gives away might be given to who asks


def free(kind: socket.SocketKind) -> int:
    with socket.socket(type=kind) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, int]]:
    """As its pod runs it: the text of the program, not the module."""
    with ExitStack() as stack:
        # bound until it listens itself, which it may beside those that share addresses
        held = [stack.enter_context(socket.socket()) for _ in range(2)]
        for one in held:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", 0))
        http, tcp = (int(one.getsockname()[1]) for one in held)
        yield from _serving({"http": http, "tcp": tcp, "udp": free(socket.SOCK_DGRAM)})


def _serving(ports: dict[str, int]) -> Iterator[dict[str, int]]:
    settings = json.dumps({"name": "near"} | {kind: [port] for kind, port in ports.items()})
    process = subprocess.Popen([sys.executable, "-c", objects.prober(), "serve", settings])
    deadline = time.monotonic() + 60
    for kind, port in ports.items():
        while prober.once({"op": kind, "host": "127.0.0.1", "port": port, "want": []}) != "ok":
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
    yield ports
    process.terminate()
    assert process.wait(30) == 0, "it ends at once when it is told to"


@pytest.mark.parametrize("host", LOCAL)
@pytest.mark.parametrize("op", ["http", "tcp", "udp", "connect"])
def test_answers(server: dict[str, int], host: str, op: str) -> None:
    port = server[op if op in server else "tcp"]
    assert prober.once({"op": op, "host": host, "port": port, "want": ["near"] if op == "http" else []}) == "ok"


def test_who_answers_counts(server: dict[str, int]) -> None:
    probe = {"op": "http", "host": "127.0.0.1", "port": server["http"], "want": ["far"], "allowed": True}
    assert prober.once(probe) == "wrong: answered by near"
    assert prober.once(probe | {"op": "same", "want": ["near"]}) == "ok"
    assert prober.once(probe | {"op": "same"}) == "wrong: answered by near"
    assert prober.once(probe | {"op": "spread", "want": ["far", "near"]}) == "wrong: only answered by near"
    assert prober.once(probe | {"op": "http", "port": server["tcp"]}) in ("wrong: no HTTP", "timeout")


def test_nobody_there() -> None:
    assert prober.once({"op": "tcp", "host": "127.0.0.1", "port": NOBODYS}) == "refused"
    assert prober.once({"op": "udp", "host": "127.0.0.1", "port": NOBODYS}) == "refused"


def test_names() -> None:
    assert prober.once({"op": "dns", "host": "localhost", "want": ["127.0.0.1"]}) == "ok"
    assert prober.once({"op": "dns", "host": "localhost", "want": ["127.0.0.2"]}).startswith("wrong: is 127.0.0.1")
    assert prober.once({"op": "dns", "host": "no.such.name.invalid", "want": ["10.0.0.1"]}).startswith("wrong: ")


def test_what_should_come_is_waited_for(server: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    words = iter(["timeout", "timeout", "ok", "never asked"])
    monkeypatch.setattr(prober, "once", lambda _probe: next(words))
    monkeypatch.setattr(prober, "PAUSE", 0.0)
    assert prober.judge({"allowed": True}) == "ok"
    words = iter(["ok", "timeout"])
    assert prober.judge({"allowed": False}) == "timeout"
    words = iter(["ok"] * 10_000_000)
    assert prober.judge({"allowed": False}, patience=0.05) == "ok"


def test_results_are_left_for_kubelet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = tmp_path / "message"
    message.touch()
    assert prober.report(["ok", "timeout"], str(message)) == 0
    assert json.loads(message.read_text()) == ["ok", "timeout"]
    assert prober.report(["ok"], str(tmp_path / "none")) == prober.RESULTS_IN_LOG
    assert json.loads(capsys.readouterr().out) == ["ok"]
    assert not (tmp_path / "none").exists()


def test_the_message_has_room_for_many_failures() -> None:
    assert len(json.dumps(["x" * prober.MOST_DETAIL] * 60)) < 4096


def test_a_client_as_its_pod_runs_it(server: dict[str, int]) -> None:
    tries = [
        {"op": "http", "host": "127.0.0.1", "port": server["http"], "want": ["near"], "allowed": True},
        {"op": "tcp", "host": "127.0.0.1", "port": NOBODYS, "allowed": False},
    ]
    command = [sys.executable, "-c", objects.prober(), "try", json.dumps(tries)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode in (0, prober.RESULTS_IN_LOG), done.stderr
    if done.returncode:
        assert json.loads(done.stdout) == ["ok", "refused"]
