"""The workload tool on loopback: that it reports what happens, above all when something goes wrong."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from fimbria.lab import kernel

TOOL = kernel.binary("labtool")
LOOPBACK = ["127.0.0.1", "::1"]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket(socket.AF_INET6, socket.SOCK_STREAM) for _ in range(count)]
    for s in sockets:
        s.bind(("::1", 0))
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Server:
    def __init__(self) -> None:
        self.http, self.tcp, self.udp = free_ports(3)
        ports = ["--http", str(self.http), "--tcp", str(self.tcp), "--udp", str(self.udp)]
        self.process = subprocess.Popen([TOOL, "serve", "--name", "me", *ports])
        deadline = time.monotonic() + 20
        while probe("tcp", "::1", self.tcp)["result"] != "ok":
            assert time.monotonic() < deadline, "the server doesn't start"
            time.sleep(0.02)


@pytest.fixture
def server() -> Iterator[Server]:
    one = Server()
    yield one
    one.process.kill()
    one.process.wait()


def lines(*args: str | int) -> list[dict[str, Any]]:
    done = subprocess.run([TOOL, *map(str, args)], capture_output=True, text=True, check=False, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def probe(proto: str, host: str, port: int, *options: str) -> dict[str, Any]:
    return lines("probe", proto, host, port, *options)[0]


@pytest.mark.parametrize("host", LOOPBACK)
def test_probes_tell_who_answers_and_whom_it_sees(server: Server, host: str) -> None:
    for proto, port in (("tcp", server.tcp), ("http", server.http), ("udp", server.udp)):
        answer = probe(proto, host, port)
        assert answer["result"] == "ok"
        assert answer["answer"]["name"] == "me"
        assert answer["answer"]["peer"].rsplit(":", 1)[0].strip("[]") == host
    assert probe("icmp", host, 0)["result"] == "ok"


@pytest.mark.parametrize("host", LOOPBACK)
def test_failures_have_names(server: Server, host: str) -> None:
    (nobody,) = free_ports(1)
    assert probe("tcp", host, nobody)["result"] == "refused"
    assert probe("udp", host, nobody)["result"] == "refused"
    os.kill(server.process.pid, signal.SIGSTOP)
    for proto, port in (("http", server.http), ("udp", server.udp)):
        answer = probe(proto, host, port, "--timeout", "150")
        assert answer["result"] == "timeout"
        assert answer["latency_us"] >= 140_000
    os.kill(server.process.pid, signal.SIGCONT)


def test_count_and_concurrency(server: Server) -> None:
    answers = lines("probe", "tcp", "127.0.0.1", server.tcp, "--count", 50, "--concurrency", 8)
    assert len(answers) == 50
    assert {a["result"] for a in answers} == {"ok"}


@pytest.mark.parametrize(
    ("mode", "proto"), [("rr", "tcp"), ("rr", "udp"), ("rr", "http"), ("crr", "tcp"), ("crr", "http")]
)
def test_load(server: Server, mode: str, proto: str) -> None:
    (report,) = lines(mode, proto, "::1", getattr(server, proto), "--seconds", 1)
    assert report["errors"] == 0
    assert report["operations"] > 20  # a busy machine manages no more
    assert report["per_second"] == pytest.approx(report["operations"] / report["seconds"], rel=0.01)


@pytest.mark.parametrize("proto", ["tcp", "udp"])
def test_an_undisturbed_stream_is_ok(server: Server, proto: str) -> None:
    report = lines("stream", proto, "127.0.0.1", getattr(server, proto), "--seconds", 1, "--stall", 5000)[-1]
    assert report["ok"] is True, report
    assert report["sent"] == report["received"] > 20


def stream(server: Server, proto: str) -> "subprocess.Popen[str]":
    port = getattr(server, proto)
    argv = [TOOL, "stream", proto, "127.0.0.1", str(port), "--stall", "200", "--timeout", "500"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert json.loads(process.stdout.readline())["event"] == "connected"
    return process


def end(process: "subprocess.Popen[str]") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    *events, report = [json.loads(line) for line in out.splitlines()]
    assert process.returncode == (0 if report["ok"] else 1)
    return events, report


def test_a_stall_is_seen(server: Server) -> None:
    process = stream(server, "tcp")
    time.sleep(0.2)
    os.kill(server.process.pid, signal.SIGSTOP)
    time.sleep(0.6)
    os.kill(server.process.pid, signal.SIGCONT)
    time.sleep(0.2)
    events, report = end(process)
    assert report["ok"] is False
    assert report["stalls"] >= 1 and report["longest_wait_us"] > 400_000
    assert any(e["event"] == "stall_us" for e in events)
    assert report["lost"] == 0, "TCP delivers late, but everything"


def test_a_broken_connection_is_seen(server: Server) -> None:
    process = stream(server, "tcp")
    time.sleep(0.2)
    server.process.kill()
    server.process.wait()
    time.sleep(0.2)
    _, report = end(process)
    assert report["ok"] is False
    assert report["ended"] == "reset"


def test_lost_datagrams_are_seen(server: Server) -> None:
    process = stream(server, "udp")
    time.sleep(0.2)
    server.process.kill()
    server.process.wait()
    time.sleep(0.2)
    _, report = end(process)
    assert report["ok"] is False
    assert report["ended"] == "refused"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["probe", "tcp", "localhost", "1"], "localhost is no IPv4 or IPv6 address"),
        (["probe", "tcp", "::1"], "needs PROTOCOL HOST PORT"),
        (["probe", "tcp", "::1", "99999"], "99999 is no number up to 65535"),
        (["crr", "udp", "::1", "1"], "udp isn't possible here"),
        (["serve"], "no port given"),
        (["dance"], "usage"),
    ],
)
def test_wrong_use(args: list[str], message: str) -> None:
    done = subprocess.run([TOOL, *args], capture_output=True, text=True, check=False, timeout=5)
    assert done.returncode == 2
    assert message in done.stderr
