"""Builds the generator: a static program, so that it runs in any image, once for each version of its sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
SOURCES: Final = ("flows.c", "serve.c", "common.h")
FLAGS: Final = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-static", "-s", "-pthread")


class GeneratorError(Exception):
    """It can't be built, or isn't where it should be."""


def ensure() -> Path:
    """Path of the program. Raises GeneratorError with the compiler's words."""
    digest = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in SOURCES)).hexdigest()[:12]
    found = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fimbria" / "flows" / digest / "flows"
    if found.exists():
        return found
    compiler = shutil.which("gcc")
    if compiler is None:
        raise GeneratorError("gcc is missing: scripts/setup --test installs what is needed")
    found.parent.mkdir(parents=True, exist_ok=True)
    fresh = found.with_suffix(f".{os.getpid()}")
    sources = [str(HERE / name) for name in SOURCES if name.endswith(".c")]
    done = subprocess.run([compiler, *FLAGS, "-o", str(fresh), *sources], capture_output=True, text=True, check=False)
    if done.returncode:
        raise GeneratorError(done.stderr)
    fresh.replace(found)
    return found
