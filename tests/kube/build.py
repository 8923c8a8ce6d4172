"""Builds the Go programs of the test beds, once per version, into a cache folder.

Versions are those that go.mod here (Kubernetes), in ``coredns/``, ``helm/`` and ``etcd/`` require. Binaries land in
``${FIMBRIA_CACHE:-~/.cache/fimbria}/kube/<version of Kubernetes>/bin``; a second caller waits for the first one's lock.
``python tests/kube/build.py [TOOL...]`` builds (the API server and kubectl by default; ``cluster`` stands for what
``make kube-up`` needs, ``e2e`` for what upstream's tests need besides) and prints that folder: about ten minutes on
two cores the first time, and as much again for the end-to-end tests.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SERVER = ("kube-apiserver", "kubectl")
CLUSTER = (*SERVER, "kube-controller-manager", "kube-scheduler", "kubelet", "coredns", "helm", "agnhost")
E2E = ("e2e.test", "ginkgo")
GROUPS = {"server": SERVER, "cluster": CLUSTER, "e2e": E2E}


@dataclass(frozen=True)
class Tool:
    """A Go package and the module, a folder under this one, that requires it."""

    package: str
    module: str = "."
    tests: bool = False


TOOLS = {
    name: Tool(f"k8s.io/kubernetes/cmd/{name}")
    for name in ("kube-apiserver", "kubectl", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
} | {
    "agnhost": Tool("k8s.io/kubernetes/test/images/agnhost"),
    "regression-issue-74839": Tool("k8s.io/kubernetes/test/images/regression-issue-74839"),
    "e2e.test": Tool("k8s.io/kubernetes/test/e2e", tests=True),
    "ginkgo": Tool("github.com/onsi/ginkgo/v2/ginkgo"),
    "coredns": Tool("fimbria.invalid/tests/kube/coredns", "coredns"),
    "helm": Tool("helm.sh/helm/v4/cmd/helm", "helm"),
    "etcd": Tool("fimbria.invalid/tests/kube/etcd", "etcd"),
}
# Go 1.27's json v2 makes a 1.36 API server serve an OpenAPI document that kubectl can't apply against.
GO_SERIES = (1, 26)


class BuildError(RuntimeError):
    """The real Kubernetes can't be built here; the message says why and what to do."""


def version() -> str:
    """The Kubernetes version that go.mod requires, such as ``v1.36.3``."""
    found = re.search(r"^\s*k8s\.io/kubernetes (v\S+)$", (HERE / "go.mod").read_text(), re.MULTILINE)
    if not found:
        raise BuildError(f"{HERE / 'go.mod'}: no requirement on k8s.io/kubernetes")
    return found[1]


def cache_root() -> Path:
    return Path(os.environ.get("FIMBRIA_CACHE") or Path.home() / ".cache" / "fimbria") / "kube"


def bin_dir() -> Path:
    return cache_root() / version() / "bin"


def missing(tools: Sequence[str]) -> list[str]:
    """Those that the cache doesn't hold. Raises BuildError for a name that isn't in TOOLS."""
    if unknown := [tool for tool in tools if tool not in TOOLS]:
        raise BuildError(f"no tool {', '.join(unknown)}; there are {', '.join([*GROUPS, *TOOLS])}")
    return [tool for tool in tools if not os.access(bin_dir() / tool, os.X_OK)]


def ensure(tools: Sequence[str] = SERVER) -> Path:
    """Builds what is missing and returns the folder of the binaries. Raises BuildError."""
    if not missing(tools):
        return bin_dir()
    cache_root().mkdir(parents=True, exist_ok=True)
    with _locked(cache_root() / f"{version()}.lock"):
        if absent := missing(tools):
            _build(absent)
    return bin_dir()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another process is building Kubernetes {version()}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(tools: Sequence[str]) -> None:
    go = _find_go()
    bin_dir().mkdir(parents=True, exist_ok=True)
    scratch = cache_root() / f".{version()}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    try:
        _compile(go, tools, scratch)
        for tool in tools:
            (scratch / tool).rename(bin_dir() / tool)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _compile(go: str, tools: Sequence[str], out: Path) -> None:
    for module in sorted({TOOLS[tool].module for tool in tools}):
        built = [tool for tool in tools if TOOLS[tool].module == module]
        together = [tool for tool in built if not TOOLS[tool].tests]
        if together:
            _run_go(go, module, ["build", "-o", f"{out}/"], together)
        for tool in built:
            if TOOLS[tool].tests:
                _run_go(go, module, ["test", "-c", "-o", str(out / tool)], [tool])


def _run_go(go: str, module: str, verb: list[str], tools: Sequence[str]) -> None:
    folder, packages = HERE / module, [TOOLS[tool].package for tool in tools]
    env = os.environ | {"CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": "-mod=readonly -buildvcs=false"}
    total = len(
        _capture([go, "list", "-deps", *(["-test"] if verb[0] == "test" else []), *packages], env, folder).split()
    )
    _say(f"building {', '.join(tools)} for Kubernetes {version()}: {total} packages, up to ten minutes on two cores")
    command = [go, *verb, "-v", "-trimpath", "-ldflags", _ldflags(), *packages]
    nice = [tool, "-n", "10"] if (tool := shutil.which("nice")) else []
    started, seen, tail = time.monotonic(), 0, [""]
    with subprocess.Popen([*nice, *command], cwd=folder, env=env, text=True, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            seen += 1
            tail = [*tail[-30:], line.rstrip()]
            if seen % 100 == 0:
                _say(f"{seen} of at most {total} packages, {time.monotonic() - started:.0f} s")
    if process.returncode != 0:
        raise BuildError(f"go {verb[0]} of {', '.join(tools)} failed:\n" + "\n".join(tail))
    _say(f"built in {time.monotonic() - started:.0f} s")


def _ldflags() -> str:
    major, minor, _ = version().lstrip("v").split(".", 2)
    values = {"gitVersion": version(), "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean"}
    names = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    return " ".join(["-s", "-w", *(f"-X {name}.{key}={value}" for name in names for key, value in values.items())])


def _find_go() -> str:
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    wanted = ".".join(map(str, GO_SERIES))
    if not go:
        raise BuildError(f"building the real Kubernetes needs Go {wanted} and there is no 'go' in PATH")
    # asked in this folder, so that GOTOOLCHAIN=auto has already switched to what go.mod needs
    found = _capture([go, "env", "GOVERSION"], dict(os.environ)).strip()
    numbers = re.match(r"go(\d+)\.(\d+)", found)
    if not numbers or (int(numbers[1]), int(numbers[2])) != GO_SERIES:
        raise BuildError(f"building Kubernetes {version()} needs Go {wanted}, found {found or 'none'} at {go}")
    return go


def _capture(command: list[str], env: dict[str, str], folder: Path = HERE) -> str:
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command[:3])} failed:\n{done.stderr.strip()[-2000:]}")
    return done.stdout


def _say(message: str) -> None:
    print(f"kube: {message}", file=sys.stderr, flush=True)


def main() -> int:
    try:
        asked = sys.argv[1:] or ["server"]
        print(ensure([tool for name in asked for tool in GROUPS.get(name, (name,))]))
    except BuildError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
