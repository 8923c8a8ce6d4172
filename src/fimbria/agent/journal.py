"""What the agent must remember over a restart: one JSON file per endpoint, and one for the numbers it gave out.

A file is written under a temporary name, synced and renamed, so that a reader finds the old or the new one, whole. A
file that can't be read is set aside under `.bad` with a log line; its endpoint is recovered from the kernel and the
cluster (`recovery`).

Agents of several versions read it, newer and older ones: fields are only ever added, each with a default, at the end of
a list or under a new name. What a version doesn't know it leaves out.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

from fimbria.model.address import Prefix, pack, unpack
from fimbria.model.endpoint import EndpointIdentity, HostPort, LocalEndpoint
from fimbria.model.node import Node

log = logging.getLogger(__name__)
LOCK_PATIENCE: Final = 1.0
_BYTES = frozenset(("pod_mac", "host_mac", "addr4", "addr6"))


class Journal:
    """Files under `<run>/state`, mode 0700. The state lasts as long as the boot, like the kernel's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._endpoints = folder / "endpoints"

    def open(self) -> None:
        """Make the folders, and take them for this process. Raises OSError, also if another agent has them."""
        self._endpoints.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        # A killed agent keeps its files until its last thread has come out of the kernel, where attaching a program
        # can take a while: the next agent waits for that, and not for one that lives.
        deadline = time.monotonic() + LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise OSError(error.errno, f"another agent is running with {self._folder}") from None
                time.sleep(0.02)
            else:
                return

    def save_endpoint(self, endpoint: LocalEndpoint, identity: EndpointIdentity | None) -> None:
        """Write one endpoint. Raises OSError."""
        row = {k: v.hex() if isinstance(v, bytes) else v for k, v in asdict(endpoint).items()}
        row["host_ports"] = [(p.port, p.container_port, p.proto, p.host_ip.hex()) for p in endpoint.host_ports]
        decided = {"number": identity.number, "labels": dict(identity.labels)} if identity else None
        self._write(self._endpoints / f"{endpoint.id}.json", {"endpoint": row, "identity": decided})

    def remove_endpoint(self, endpoint_id: int) -> None:
        """Forget one endpoint."""
        (self._endpoints / f"{endpoint_id}.json").unlink(missing_ok=True)

    def endpoints(self) -> list[tuple[LocalEndpoint, EndpointIdentity | None]]:
        """Everything that was saved and can be read."""
        found = []
        for path in sorted(self._endpoints.glob("*.json")):
            try:
                found.append(_decode(json.loads(path.read_bytes())))
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.error("journal: %s can't be read and is set aside: %s", path.name, error)
                path.rename(path.with_suffix(".bad"))
        return found

    def save_node(self, node: Node) -> None:
        """Write what is known of this node, if it changed. Raises OSError."""
        if node != self.node():
            self._write(self._folder / "node.json", encode_node(node))

    def node(self) -> Node | None:
        """What save_node wrote last; None on the first start or if it can't be read."""
        try:
            return decode_node(json.loads((self._folder / "node.json").read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.error("journal: node.json can't be read: %s", error)
            return None

    def save_numbers(self, numbers: Mapping[str, Any]) -> None:
        """Write the numbers given out (rules, services, ...). Raises OSError."""
        self._write(self._folder / "numbers.json", numbers)

    def numbers(self) -> dict[str, Any]:
        """What save_numbers wrote last; empty on the first start or if it can't be read."""
        try:
            found = json.loads((self._folder / "numbers.json").read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.error("journal: numbers.json can't be read, numbers are given anew: %s", error)
            return {}
        return found if isinstance(found, dict) else {}

    @staticmethod
    def _write(path: Path, content: Mapping[str, Any]) -> None:
        temporary = path.with_suffix(".tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            left = memoryview(json.dumps(content, separators=(",", ":")).encode())
            while left:
                left = left[os.write(fd, left) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)


def _decode(raw: Mapping[str, Any]) -> tuple[LocalEndpoint, EndpointIdentity | None]:
    names = {f.name for f in fields(LocalEndpoint)}
    row: dict[str, Any] = {k: bytes.fromhex(v) if k in _BYTES else v for k, v in raw["endpoint"].items() if k in names}
    row["host_ports"] = tuple(
        HostPort(int(port), int(target), int(proto), bytes.fromhex(ip))
        for port, target, proto, ip, *_ in row.get("host_ports", ())
    )
    decided = raw.get("identity")
    identity = EndpointIdentity(int(decided["number"]), dict(decided["labels"])) if decided else None
    return LocalEndpoint(**row), identity


def encode_node(node: Node) -> dict[str, Any]:
    """A node as JSON."""
    return {
        "name": node.name,
        "addrs": [unpack(a) for a in node.addrs],
        "routers": [unpack(a) for a in node.routers],
        "pod_cidrs": [str(c) for c in node.pod_cidrs],
    }


def decode_node(raw: dict[str, Any]) -> Node:
    """The opposite of encode_node. Raises KeyError, ValueError."""
    return Node(
        name=str(raw["name"]),
        addrs=tuple(pack(a) for a in raw["addrs"]),
        routers=tuple(pack(a) for a in raw["routers"]),
        pod_cidrs=tuple(Prefix.parse(c) for c in raw["pod_cidrs"]),
    )
