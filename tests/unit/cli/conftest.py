"""A component's local socket with canned answers, and a runner for the command line."""

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from click.testing import CliRunner, Result

from fimbria.cli.main import fimbria

STATUS: dict[str, Any] = {
    "node": "node1",
    "version": "0.1.0",
    "kernel": "6.18.1",
    "pid": 7,
    "ready": True,
    "ready_after_seconds": 0.71,
    "uptime_seconds": 11.8,
    "api_server": {"server": "https://172.31.254.10:6443", "connected": True, "errors": {}},
    "routing": "overlay",
    "attach": "tcx",
    "fast_path": True,
    "masquerade": True,
    "devices": {"host": 4, "host_mac": "16:36:40:58:c3:8f", "overlay": 5, "uplinks": [2], "mtu": 1500, "pod_mtu": 1450},
    "pod_cidrs": ["10.244.0.0/24", "fd00:244::/120"],
    "ipam": {"ipv4": {"used": 2, "capacity": 253}, "ipv6": {"used": 2, "capacity": 254}},
    "node_problem": "",
    "endpoints": 2,
    "identities": 3,
    "policies": 1,
    "nodes": 3,
    "services": 1,
    "rows": {"ipcache": 18, "endpoints": 2},
    "pressure": {"conntrack": {"used": 3000, "room": 100000}, "frontends": {"used": 5, "room": 100}},
    "failures": {},
    "repaired": {},
    "policy_problems": {},
    "not_as_asked": {},
    "foreign_programs": {},
}


class Component:
    """Serves `answers` ((path) -> JSON value, text, or (status, JSON value)) and notes what it was asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        component = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                url = urlsplit(self.path)
                component.asked.append((url.path, {k: v[0] for k, v in parse_qs(url.query).items()}))
                known = component.answers.get(url.path.removeprefix("/v1/"), (404, {"error": f"no {url.path}"}))
                known = known() if callable(known) else known
                status, value = known if isinstance(known, tuple) else (200, known)
                body = (value if isinstance(value, str) else json.dumps(value)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def address_string(self) -> str:
                return "local"

            def log_message(self, *_: object) -> None:
                return

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                return  # a client that left: what it saw is what the test looks at

        self._server = Server(str(path), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.path.unlink(missing_ok=True)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FIMBRIA_RUN_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def agent(run_dir: Path) -> Iterator[Component]:
    component = Component(run_dir / "agent.sock")
    component.answers["status"] = dict(STATUS)
    yield component
    component.close()


@pytest.fixture
def observer(run_dir: Path) -> Iterator[Component]:
    component = Component(run_dir / "observer.sock")
    yield component
    component.close()


@pytest.fixture
def call(run_dir: Path) -> Callable[..., Result]:
    """Runs `fimbria ARGS`; without colour, as into a pipe."""

    def run(*args: str) -> Result:
        result = CliRunner().invoke(fimbria, list(args), prog_name="fimbria")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
