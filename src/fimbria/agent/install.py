"""Puts the CNI plugin and its configuration where the container runtime looks for them."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Final

CONF_NAME: Final = "05-fimbria.conflist"
BINARY: Final = "fimbria-cni"
CONFIG: Final = {
    "cniVersion": "1.1.0",
    "name": "fimbria",
    "plugins": [{"type": BINARY}],
}


def install_cni(bin_dir: Path, conf_dir: Path) -> None:
    """Binary first, then configuration, each by rename: a runtime never sees half of either. Raises OSError."""
    bin_dir.mkdir(parents=True, exist_ok=True)
    conf_dir.mkdir(parents=True, exist_ok=True)
    source = Path(str(files("fimbria"))) / "_bin" / BINARY
    _replace(bin_dir / BINARY, source.read_bytes(), 0o755)
    _replace(conf_dir / CONF_NAME, json.dumps(CONFIG, indent=2).encode() + b"\n", 0o644)


def _replace(path: Path, content: bytes, mode: int) -> None:
    if path.exists() and path.read_bytes() == content:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.chmod(mode)
    temporary.rename(path)
