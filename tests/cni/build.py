"""Builds cnitool, libcni's command line, out of the Go module that go.mod next to this file requires.

It lands in ``${FIMBRIA_CACHE:-~/.cache/fimbria}/cni/<version>/cnitool``; a second caller waits for the first one.
Run ``python tests/cni/build.py`` to build it and print its path. A few seconds the first time.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "github.com/containernetworking/cni/cnitool"


class BuildError(RuntimeError):
    """cnitool can't be built here; the message says why."""


def version() -> str:
    """The version of libcni that go.mod requires, such as ``v1.3.0``."""
    found = re.search(r"containernetworking/cni (v\S+)$", (HERE / "go.mod").read_text(), re.MULTILINE)
    if not found:
        raise BuildError(f"{HERE / 'go.mod'}: no requirement on containernetworking/cni")
    return found[1]


def ensure() -> Path:
    """Builds what is missing and returns the program. Raises BuildError."""
    cache = Path(os.environ.get("FIMBRIA_CACHE") or Path.home() / ".cache" / "fimbria") / "cni"
    tool = cache / version() / "cnitool"
    if os.access(tool, os.X_OK):
        return tool
    tool.parent.mkdir(parents=True, exist_ok=True)
    with (cache / f"{version()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.access(tool, os.X_OK):
            _build(tool)
    return tool


def _build(tool: Path) -> None:
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if not go:
        raise BuildError("building cnitool needs Go and there is no 'go' in PATH")
    scratch = tool.with_name(f".cnitool.{os.getpid()}")
    command = [go, "build", "-trimpath", "-ldflags", "-s -w", "-o", str(scratch), PACKAGE]
    env = os.environ | {"CGO_ENABLED": "0", "GOWORK": "off", "GOFLAGS": "-mod=readonly"}
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"go build of cnitool {version()} failed:\n{done.stderr.strip()[-2000:]}")
    scratch.rename(tool)


def main() -> int:
    try:
        print(ensure())
    except BuildError as error:
        print(f"cni: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
