"""Build hook of the wheel: compiles what nodes need ready-made, as `make build` does, and tags the wheel accordingly.

A wheel then holds fimbria/_bpf/*.o, fimbria/_bin/* and fimbria/kernel/_libbpf.abi3.so, and needs neither a compiler nor
libbpf where it is installed. Editable installs build the same things in place.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = ("bpf", "src/fimbria/cni/shim", "src/fimbria/lab")
PRODUCTS = ("src/fimbria/_bpf/pod.bpf.o", "src/fimbria/_bin/fimbria-cni", "src/fimbria/kernel/_libbpf.abi3.so")


def wheel_tag() -> str:
    """The interpreter, ABI and platform tag. The extension keeps to the stable ABI since Python 3.11."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"cp311-abi3-{platform}"


def build_steps() -> list[list[str]]:
    """The commands to run in the root: BPF objects, the CNI shim and the lab's tools by make, then the extension."""
    return [*(["make", "-C", name] for name in NATIVE), [sys.executable, "src/fimbria/kernel/build_libbpf.py"]]


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling for wheels; source distributions carry the sources alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds, checks that everything is there, and sets the tag. Raises RuntimeError, CalledProcessError."""
        if self.target_name != "wheel":
            return
        root = Path(self.root)
        for step in build_steps():
            subprocess.run(step, cwd=root, check=True)
        for product in PRODUCTS:
            if not (root / product).exists():
                raise RuntimeError(f"the build left no {product}")
        build_data["pure_python"] = False
        build_data["tag"] = wheel_tag()
