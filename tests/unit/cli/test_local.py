"""Asking over local sockets: every way in which nobody answers."""

import socket
from pathlib import Path

import pytest

from fimbria.cli import local
from fimbria.cli.local import Local, Refused, Unreachable


def test_no_socket_names_path_and_way_out(call, run_dir: Path) -> None:
    result = call("status")
    assert result.exit_code == 2
    assert f"No agent runs on this node: there is no socket {run_dir}/agent.sock." in result.stderr
    assert "--socket" in result.stderr
    assert "FIMBRIA_RUN_DIR" in result.stderr


def test_socket_option_wins(call, tmp_path: Path) -> None:
    assert "elsewhere.sock" in call("endpoint", "list", "--socket", str(tmp_path / "elsewhere.sock")).stderr


def test_nobody_listens(run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(run_dir / "agent.sock"))
    with pytest.raises(Unreachable, match="The agent has ended"):
        Local("agent").get("status")


def test_hangs(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "TIMEOUT", 0.05)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(run_dir / "agent.sock"))
        silent.listen(1)
        with pytest.raises(Unreachable, match="it runs, but hangs"):
            Local("agent").get("status")


def test_not_root(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: object) -> None:
        raise PermissionError

    monkeypatch.setattr(local._UnixConnection, "connect", refuse)
    with pytest.raises(Unreachable, match="only root may") as caught:
        Local("agent").get("status")
    assert "sudo" in caught.value.message


def test_default_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIMBRIA_RUN_DIR", raising=False)
    assert Local("observer").path == Path("/run/fimbria/observer.sock")


def test_refusal_is_a_sentence(agent) -> None:
    agent.answers["maps/x"] = (404, {"error": "there is no map 'x'"})
    with pytest.raises(Refused, match=r"^There is no map 'x'\.$") as caught:
        Local("agent").get("maps", "x")
    assert caught.value.exit_code == 1


def test_broken_answer_of_an_error(agent) -> None:
    agent.answers["maps"] = (500, "Internal Server Error")
    with pytest.raises(Refused, match="HTTP 500: Internal Server Error"):
        Local("agent").get("maps")


def test_parts_are_quoted(agent) -> None:
    with pytest.raises(Refused):
        Local("agent").get("ipcache", "a/../b")
    assert agent.asked[-1][0] == "/v1/ipcache/a%2F..%2Fb"
