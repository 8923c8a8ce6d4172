"""Puts image archives into a node's containerd."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.cluster.bed import processes
from tests.cluster.bed.errors import BedError
from tests.cluster.bed.node import NodeHost
from tests.cluster.bed.store import NAMESPACE, Marks, Store


def prepare(host: NodeHost, store: Store) -> None:
    """Gives a node that has never been started what the store has."""
    root = host.layout.disk(host.name) / "plain" / "var/lib/containerd"
    if not root.exists():
        store.fill(root, marks(host))


def load(host: NodeHost, archives: Mapping[str, Path]) -> None:
    """Imports those that the node hasn't got, by the images' names; the node runs. Raises BedError."""
    for name, archive in marks(host).missing(archives).items():
        _import(host, archive)
        marks(host).set(name, archive)


def marks(host: NodeHost) -> Marks:
    return Marks(host.layout.disk(host.name) / "images")


def _import(host: NodeHost, archive: Path) -> None:
    command = [*host.enter(), "--", "ctr", "--namespace", NAMESPACE, "image", "import", "-"]
    with archive.open("rb") as stdin:  # the node may not see the folder it is in
        done = subprocess.run(
            command, stdin=stdin, capture_output=True, text=True, check=False, env=processes.environment(), timeout=300
        )
    if done.returncode != 0:
        raise BedError(f"{host.name}: import of {archive}: {done.stderr.strip()[-2000:]}")
