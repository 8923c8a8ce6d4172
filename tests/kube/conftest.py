"""The two servers every test here runs against, a thin client of its own, and kubectl."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
import yaml

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent.parent / "src"
MERGE, STRATEGIC, JSON_PATCH, APPLY = (
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/json-patch+json",
    "application/apply-patch+yaml",
)


def load(name: str) -> ModuleType:
    """A module of this folder (tests are no package here), the same one each time."""
    known = f"fimbria_kube_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, HERE / f"{name}.py")
        assert spec and spec.loader
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


@dataclass
class Answer:
    code: int
    body: Any
    headers: dict[str, str]


@dataclass
class Watcher:
    """An open watch. ``next`` returns one event and fails after half a minute of silence."""

    connection: http.client.HTTPSConnection
    response: http.client.HTTPResponse

    def next(self) -> tuple[str, dict[str, Any]]:
        line = self.response.readline()
        assert line, "the watch has ended"
        event = json.loads(line)
        return event["type"], event["object"]

    def until(self, wanted: str) -> dict[str, Any]:
        while True:
            kind, obj = self.next()
            if kind == wanted:
                return obj

    def ended(self) -> bool:
        return self.response.readline() == b""

    def close(self) -> None:
        self.connection.close()


@dataclass
class Client:
    kind: str
    kubeconfig: Path
    watchers: list[Watcher] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = yaml.safe_load(self.kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        address = urlsplit(cluster["server"])
        self.host, self.port, self.token = address.hostname or "", address.port or 0, user["token"]
        self.ssl = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())

    def connect(self, timeout: float = 30) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(self.host, self.port, context=self.ssl, timeout=timeout)

    def raw(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        connection = self.connect()
        try:
            fields = {"Authorization": f"Bearer {self.token}", "User-Agent": "conformance"} | (headers or {})
            connection.request(method, path, body, {key: value for key, value in fields.items() if value})
            response = connection.getresponse()
            data = response.read()
            # the real server calls its OpenAPI index text/plain
            parsed = json.loads(data) if data[:1] == b"{" else data.decode()
            return Answer(response.status, parsed, {key.lower(): value for key, value in response.headers.items()})
        finally:
            connection.close()

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        kind: str = "application/json",
        accept: str = "application/json",
        **query: Any,
    ) -> Answer:
        path += f"?{urlencode(query)}" if query else ""
        data = None if body is None else json.dumps(body).encode()
        return self.raw(method, path, data, {"Content-Type": kind if data else "", "Accept": accept})

    def get(self, path: str, **query: Any) -> Any:
        return self.expect(200, "GET", path, **query)

    def post(self, path: str, body: Any, **query: Any) -> Any:
        return self.expect(201, "POST", path, body, **query)

    def put(self, path: str, body: Any, **query: Any) -> Any:
        return self.expect(200, "PUT", path, body, **query)

    def patch(self, path: str, body: Any, kind: str = MERGE, **query: Any) -> Any:
        return self.expect(200, "PATCH", path, body, kind=kind, **query)

    def delete(self, path: str, body: Any = None, **query: Any) -> Any:
        return self.expect(200, "DELETE", path, body, **query)

    def expect(self, code: int, method: str, path: str, body: Any = None, **options: Any) -> Any:
        answer = self.call(method, path, body, **options)
        assert answer.code == code, f"{method} {path}: {answer.code} {answer.body}"
        return answer.body

    def watch(self, path: str, **query: Any) -> Watcher:
        connection = self.connect(timeout=30)
        query = {"watch": "1"} | query
        accept = query.pop("accept", "application/json")
        headers = {"Authorization": f"Bearer {self.token}", "Accept": accept}
        connection.request("GET", f"{path}?{urlencode(query)}", headers=headers)
        response = connection.getresponse()
        assert response.status == 200, response.read()
        watcher = Watcher(connection, response)
        self.watchers.append(watcher)
        return watcher

    def eventually(self, check: Callable[[], Any], seconds: float = 60) -> Any:
        deadline = time.monotonic() + seconds
        while True:
            found = check()
            if found:
                return found
            assert time.monotonic() < deadline, f"still {found!r} after {seconds} s"
            time.sleep(0.05)


class Embedded:
    """The embedded server as a process, which can be killed and started again on the same data."""

    def __init__(self, folder: Path, *options: str):
        self.folder, self.kubeconfig, self._options = folder, folder / "kubeconfig", options
        self._port = load("realserver").free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Client:
        self.kubeconfig.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            "fimbria.lab.apiserver",
            "--db",
            str(self.folder / "db.sqlite"),
            "--listen",
            f"127.0.0.1:{self._port}",
            "--kubeconfig-out",
            str(self.kubeconfig),
            *self._options,
        ]
        log = (self.folder / "log").open("ab")
        env = os.environ | {"PYTHONPATH": str(SOURCE)}
        die = load("realserver").die_with_parent
        self._process = subprocess.Popen(command, stdout=log, stderr=log, env=env, preexec_fn=die)
        deadline = time.monotonic() + 60
        while not self.kubeconfig.exists():
            assert self._process.poll() is None and time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.02)
        return Client("embedded", self.kubeconfig)

    def kill(self, how: int = signal.SIGKILL) -> None:
        if self._process:
            self._process.send_signal(how)
            self._process.wait(10)
            self._process = None


@pytest.fixture(scope="session", params=["embedded", "real"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp(f"fim-{request.param}")
    if request.param == "real":
        with load("realserver").real_apiserver(folder) as kubeconfig:
            yield Client("real", kubeconfig)
        return
    embedded = Embedded(folder)
    try:
        yield embedded.start()
    finally:
        embedded.kill()


@pytest.fixture(autouse=True)
def close_watches(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        client: Client = request.getfixturevalue("server")
        while client.watchers:
            client.watchers.pop().close()


@pytest.fixture(scope="session")
def controllers(server: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The lab's controllers at work on the server."""
    log = (tmp_path_factory.mktemp("fim-controllers") / "log").open("wb")
    command = [sys.executable, "-m", "fimbria.lab.apiserver.controllers", "--kubeconfig", str(server.kubeconfig)]
    die = load("realserver").die_with_parent
    env = os.environ | {"PYTHONPATH": str(SOURCE)}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=env, preexec_fn=die)
    try:
        yield
        assert process.poll() is None, Path(log.name).read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def ns(server: Client) -> str:
    """A fresh namespace."""
    name = f"fim-{uuid.uuid4().hex[:8]}"
    server.post("/api/v1/namespaces", {"metadata": {"name": name}})
    return name


Kubectl = Callable[..., str]


@pytest.fixture
def kubectl(server: Client, tmp_path: Path) -> Kubectl:
    """Runs the real kubectl; gives its output, stdout and stderr; ``code`` is the exit status expected."""
    binary = load("realserver").binaries() / "kubectl"

    def run(*arguments: str, stdin: str = "", code: int = 0) -> str:
        env = {"KUBECONFIG": str(server.kubeconfig), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [str(binary), *arguments],
            input=stdin,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=60,
        )
        assert done.returncode == code, f"kubectl {' '.join(arguments)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    return run


@dataclass
class Beside:
    """A kubectl that runs while the test goes on."""

    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)

    def until(self, *words: str) -> None:
        """Reads on until a line has all of these words."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if all(word in line for word in words):
                return
        raise AssertionError(f"kubectl never said {' '.join(words)}:\n{''.join(self.said)}")

    def end(self) -> str:
        """All that it said, when it has ended by itself, and well."""
        self.said.append(self.process.communicate(timeout=60)[0])
        assert self.process.returncode == 0, self.said
        return "".join(self.said)


@pytest.fixture
def kubectl_beside(server: Client, tmp_path: Path) -> Iterator[Callable[..., Beside]]:
    """Starts the real kubectl, which must give up by itself in time; stdout and stderr are one."""
    binary = load("realserver").binaries() / "kubectl"
    env = {"KUBECONFIG": str(server.kubeconfig), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    started: list[Beside] = []

    def start(*arguments: str) -> Beside:
        command = [str(binary), *arguments]
        process = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        started.append(Beside(process))
        return started[-1]

    yield start
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.fixture
def embedded_server(tmp_path: Path) -> Iterator[Embedded]:
    """An embedded server of the test's own, to kill and restart; small history."""
    embedded = Embedded(tmp_path, "--history", "50")
    try:
        yield embedded
    finally:
        embedded.kill()
