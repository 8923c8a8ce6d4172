"""A real kube-apiserver over a real etcd, for tests and for ``fimbria lab up --kubeconfig``.

In tests: ``with real_apiserver(tmp_path) as kubeconfig: ...``. On the command line::

    python tests/kube/realserver.py up --dir D [--bind ADDRESS] [--port PORT] [--netns NAME]
    python tests/kube/realserver.py down --dir D

The kubeconfig (mode 0600, one context, authority inline, bearer token of group system:masters) is ``D/kubeconfig``,
logs are ``D/etcd.log`` and ``D/apiserver.log``. The two binaries come from build.py, etcd from Debian (etcd-server).
There is no controller-manager: run ``python -m fimbria.lab.apiserver.controllers --kubeconfig D/kubeconfig`` for one.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import importlib.util
import ipaddress
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

SERVICE_RANGES = "10.96.0.0/16,fd00:10:96::/112"
READY_SECONDS = 180.0
# ServiceAccount wants accounts that only a controller-manager makes; TaintNodesByCondition taints every new node until
# a controller-manager finds it ready.
DISABLED_ADMISSION = "ServiceAccount,TaintNodesByCondition"
_PR_SET_PDEATHSIG = 1


class ServerError(RuntimeError):
    """The real API server can't be started; the message says why and shows the end of its log."""


def _build_module() -> ModuleType:
    """build.py of this folder, which is no package (pytest imports by file here)."""
    spec = importlib.util.spec_from_file_location("fimbria_kube_build", Path(__file__).with_name("build.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def binaries(*more: str) -> Path:
    """The folder with kube-apiserver and kubectl, and `more`, building them first if need be. Raises BuildError."""
    build = _build_module()
    found: Path = build.ensure((*build.SERVER, *more))
    return found


@dataclass
class RealServer:
    """The two processes of one server in one folder. ``start`` and ``stop`` may be called once each.

    ``new_etcd``: instead of Debian's, the etcd that Kubernetes is released with. Only with that one does the API server
    stream lists and serve consistent ones from memory, which is what counts in a large cluster.
    """

    folder: Path
    bind: str = "127.0.0.1"
    port: int = 0
    netns: str = ""
    extra: list[str] = field(default_factory=list)
    detached: bool = False
    new_etcd: bool = False
    etcd_url: str = ""
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"

    def start(self) -> None:
        """Returns when /readyz says ok. Raises ServerError, with everything stopped again."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        tools = binaries(*(["etcd"] if self.new_etcd else []))
        etcd = str(tools / "etcd") if self.new_etcd else shutil.which("etcd")
        if not etcd:
            raise ServerError("etcd is missing; install Debian's etcd-server")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        client, peer = free_port(), free_port()
        self.port = self.port or free_port(self.bind if not self.netns else "127.0.0.1")
        self.etcd_url = f"http://127.0.0.1:{client}"
        self._run("etcd", _etcd_command(etcd, self.folder, client, peer))
        self._run("apiserver", self._apiserver_command(tools, client))
        self._wait(tools)

    def _apiserver_command(self, tools: Path, etcd_port: int) -> list[str]:
        token = secrets.token_urlsafe(24)
        tokens, key = self.folder / "tokens.csv", self.folder / "sa.key"
        _private(tokens, f'{token},admin,admin,"system:masters"\n')
        _openssl("ecparam", "-genkey", "-noout", "-name", "prime256v1", "-out", str(key))
        address = ipaddress.ip_address(self.bind)
        if address.is_loopback:
            # A loopback address can't be advertised: the kubernetes Service is left without endpoints instead.
            advertise = ["--advertise-address=192.0.2.1", "--endpoint-reconciler-type=none"]
        else:
            advertise = [f"--advertise-address={self.bind}"]
        crt = self._certificate()
        host = f"[{self.bind}]" if address.version == 6 else self.bind
        _private(self.kubeconfig, _kubeconfig(f"https://{host}:{self.port}", crt.read_bytes(), token))
        return [
            str(tools / "kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{etcd_port}",
            f"--bind-address={self.bind}",
            f"--secure-port={self.port}",
            *advertise,
            f"--tls-cert-file={crt}",
            f"--tls-private-key-file={self.folder / 'server.key'}",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            f"--service-cluster-ip-range={SERVICE_RANGES}",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--allow-privileged=true",
            "--profiling=false",
            f"--disable-admission-plugins={DISABLED_ADMISSION}",
            *self.extra,
        ]

    def _certificate(self) -> Path:
        crt, key = self.folder / "server.crt", self.folder / "server.key"
        names = ",".join(f"IP:{one}" for one in sorted({self.bind, "127.0.0.1", "::1", "10.96.0.1"}))
        _openssl(
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "30",
            "-subj",
            "/CN=kube-apiserver",
            "-addext",
            f"subjectAltName={names},DNS:localhost",
            "-keyout",
            str(key),
            "-out",
            str(crt),
        )
        return crt

    def _prefix(self) -> list[str]:
        return ["nsenter", f"--net={_netns_path(self.netns)}", "--"] if self.netns else []

    def _run(self, name: str, command: list[str]) -> None:
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            self._processes[name] = subprocess.Popen(
                [*self._prefix(), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=None if self.detached else die_with_parent,
            )
        state = {one: _identity(process.pid) for one, process in self._processes.items()}
        _private(self.folder / "pids.json", json.dumps(state))

    def _wait(self, tools: Path) -> None:
        command = [
            *self._prefix(),
            str(tools / "kubectl"),
            f"--kubeconfig={self.kubeconfig}",
            "--request-timeout=2s",
            "get",
            "--raw",
            "/readyz",
        ]
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            for name, process in self._processes.items():
                if process.poll() is not None:
                    raise ServerError(f"{name} ended with {process.returncode}:\n{self._log_tail(name)}")
            done = subprocess.run(command, capture_output=True, check=False)
            if done.returncode == 0 and done.stdout == b"ok":
                return
            time.sleep(0.2)
        raise ServerError(f"kube-apiserver isn't ready after {READY_SECONDS:.0f} s:\n{self._log_tail('apiserver')}")

    def _log_tail(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        """Kills what was started; the apiserver first, so that it doesn't complain about etcd."""
        for name in ("apiserver", "etcd"):
            process = self._processes.pop(name, None)
            if process and process.poll() is None:
                process.kill()
            if process:
                process.wait()
        (self.folder / "pids.json").unlink(missing_ok=True)


@contextlib.contextmanager
def real_apiserver(
    tmpdir: Path, bind: str = "127.0.0.1", netns: str = "", extra: list[str] | None = None
) -> Iterator[Path]:
    """A running server on a free port; yields its kubeconfig's path. Ends both processes in every case."""
    server = RealServer(Path(tmpdir), bind=bind, netns=netns, extra=extra or [])
    server.start()
    try:
        yield server.kubeconfig
    finally:
        server.stop()


_kept: list[socket.socket] = []


def free_port(host: str = "127.0.0.1") -> int:
    """One that the kernel gives to nobody else as long as this process lives: a socket stays bound to it. That is in
    nobody's way who listens there with SO_REUSEADDR, as servers do."""
    keeper = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    keeper.bind((host, 0))
    _kept.append(keeper)
    port: int = keeper.getsockname()[1]
    return port


def _etcd_command(etcd: str, folder: Path, client: int, peer: int) -> list[str]:
    # A test's data needn't survive a power cut; syncing would only slow everybody on the machine down.
    return [
        etcd,
        "--data-dir",
        str(folder / "etcd"),
        "--listen-client-urls",
        f"http://127.0.0.1:{client}",
        "--advertise-client-urls",
        f"http://127.0.0.1:{client}",
        "--listen-peer-urls",
        f"http://127.0.0.1:{peer}",
        "--initial-advertise-peer-urls",
        f"http://127.0.0.1:{peer}",
        "--initial-cluster",
        f"default=http://127.0.0.1:{peer}",
        "--unsafe-no-fsync",
        "--log-level",
        "warn",
    ]


def _kubeconfig(server: str, authority: bytes, token: str) -> str:
    cluster = {"server": server, "certificate-authority-data": base64.b64encode(authority).decode()}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "real", "cluster": cluster}],
            "users": [{"name": "admin", "user": {"token": token}}],
            "contexts": [{"name": "real", "context": {"cluster": "real", "user": "admin"}}],
            "current-context": "real",
        },
        indent=1,
    )


def _private(path: Path, text: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)


def _openssl(*arguments: str) -> None:
    openssl = shutil.which("openssl")
    if not openssl:
        raise ServerError("openssl is missing; install it")
    done = subprocess.run([openssl, *arguments], capture_output=True, text=True, check=False, umask=0o077)
    if done.returncode != 0:
        raise ServerError(f"openssl {arguments[0]} failed: {done.stderr[-500:]}")


def _netns_path(name: str) -> str:
    return name if "/" in name else f"/run/netns/{name}"


def die_with_parent() -> None:
    """For preexec_fn: the process ends with the one that started it, even when that is killed (prctl(2))."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _identity(pid: int) -> tuple[int, str]:
    """A pid with the moment its process started (proc(5), field 22), which no later process of that number shares."""
    return pid, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


def down(folder: Path) -> None:
    """Ends what ``up`` left running in a folder and removes its data; logs stay."""
    pids = folder / "pids.json"
    if pids.exists():
        state = json.loads(pids.read_text())
        for name in ("apiserver", "etcd"):
            if name in state:
                _kill(*state[name])
        pids.unlink()
    shutil.rmtree(folder / "etcd", ignore_errors=True)
    for name in ("kubeconfig", "tokens.csv", "sa.key", "server.key", "server.crt"):
        (folder / name).unlink(missing_ok=True)


def _kill(pid: int, started: str) -> None:
    """Kills a process unless its number has passed to another one."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if _identity(pid) != (pid, started):
                return
            os.kill(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description="A real kube-apiserver for tests and the lab.")
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--bind", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--netns", default="", help="name or path of the network namespace to run in")
    options = parser.parse_args()
    if options.action == "down":
        down(options.dir)
        return 0
    server = RealServer(options.dir, options.bind, options.port, options.netns, detached=True)
    try:
        server.start()
    except RuntimeError as error:
        print(f"realserver: {error}", file=sys.stderr)
        return 1
    print(server.kubeconfig)
    return 0


if __name__ == "__main__":
    sys.exit(main())
