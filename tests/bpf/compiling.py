"""Compiles the programs that tests bring along."""

import subprocess
from pathlib import Path
from typing import Final

BPF: Final = Path(__file__).parents[2] / "bpf"
FLAGS: Final = ("-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter",
                "-Wno-address-of-packed-member", f"-I{BPF}", "-idirafter", "/usr/include/x86_64-linux-gnu")  # fmt: skip


def compile_object(source: Path, folder: Path) -> Path:
    """The object of `NAME.bpf.c`, as `NAME.bpf.o` in a folder. The project's own headers can be included."""
    target = folder / source.with_suffix(".o").name
    subprocess.run(["clang-19", *FLAGS, "-c", source, "-o", target], check=True)
    return target
