"""Puts image archives into a node's containerd."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path

from tests.cluster.bed import processes
from tests.cluster.bed.errors import BedError
from tests.cluster.bed.node import NodeHost

NAMESPACE = "k8s.io"


def load(host: NodeHost, archives: Iterable[Path]) -> None:
    """Imports those that the node hasn't got. Raises BedError."""
    done = host.layout.disk(host.name) / "images"
    done.mkdir(exist_ok=True)
    for archive in archives:
        found = archive.stat()
        marker = done / f"{archive.name}.{found.st_size}.{found.st_mtime_ns}"
        if not marker.exists():
            _import(host, archive)
            marker.touch()


def _import(host: NodeHost, archive: Path) -> None:
    command = [*host.enter(), "--", "ctr", "--namespace", NAMESPACE, "image", "import", "-"]
    with archive.open("rb") as stdin:  # the node may not see the folder it is in
        done = subprocess.run(
            command, stdin=stdin, capture_output=True, text=True, check=False, env=processes.environment(), timeout=300
        )
    if done.returncode != 0:
        raise BedError(f"{host.name}: import of {archive}: {done.stderr.strip()[-2000:]}")
