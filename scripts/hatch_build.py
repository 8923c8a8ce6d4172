"""Build hook of the wheel: compiles what nodes need ready-made, as `make build` does, and tags the wheel accordingly.

A wheel then holds fimbria/_bpf/*.o, fimbria/_bin/* and fimbria/kernel/_libbpf.abi3.so, and needs neither a compiler nor
libbpf where it is installed. Editable installs build the same things in place.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = ("bpf", "src/fimbria/cni/shim", "src/fimbria/lab")
EXTENSION = "src/fimbria/kernel/_libbpf.abi3.so"
BINARIES = ("fimbria-cni", "labrun", "labtool")


def products(root: Path) -> list[Path]:
    """Every file that the build must leave in the tree at `root`: one object for each source, the binaries, the
    extension."""
    objects = [root / "src/fimbria/_bpf" / f"{p.stem}.o" for p in sorted((root / "bpf").glob("*.bpf.c"))]
    return [*objects, *(root / "src/fimbria/_bin" / name for name in BINARIES), root / EXTENSION]


def glibc_needed(version_info: str) -> tuple[int, int]:
    """The newest glibc version among those that `readelf --version-info` shows as needed. Raises ValueError."""
    found = [(int(major), int(minor)) for major, minor in re.findall(r"\bGLIBC_(\d+)\.(\d+)", version_info)]
    if not found:
        raise ValueError("the extension names no version of glibc")
    return max(found)


def wheel_tag(version_info: str, machine: str) -> str:
    """Interpreter, ABI and platform. The extension keeps to the stable ABI since Python 3.11 and links nothing but
    the C library, so the platform is manylinux with that library's version (PEP 600)."""
    major, minor = glibc_needed(version_info)
    return f"cp311-abi3-manylinux_{major}_{minor}_{machine}"


def build_steps() -> list[list[str]]:
    """The commands to run in the root: BPF objects, the CNI shim and the lab's tools by make, then the extension."""
    return [*(["make", "-s", "-C", name] for name in NATIVE), [sys.executable, "src/fimbria/kernel/build_libbpf.py"]]


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling for wheels; source distributions carry the sources alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds, checks that everything is there, and sets the tag. Raises RuntimeError, CalledProcessError."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        for step in build_steps():
            subprocess.run(step, cwd=root, check=True)
        wanted = products(root)
        for product in wanted:
            if not product.exists():
                raise RuntimeError(f"the build left no {product}")
        # By name: objects of sources that are gone, and binaries made for tests, may lie there too.
        build_data["artifacts"] = [str(p.relative_to(root)) for p in wanted]
        build_data["pure_python"] = False
        readelf = ["readelf", "--wide", "--version-info", EXTENSION]
        info = subprocess.run(readelf, cwd=root, check=True, capture_output=True, text=True).stdout
        build_data["tag"] = wheel_tag(info, sysconfig.get_platform().rsplit("-", 1)[1])
