"""Which reports of pods agents may believe: those whose addresses are of the node whose agent wrote them.

Agents judge that themselves where they follow reports (compute/ipcache.py, rule 5). Slices don't say who wrote what, so
the operator judges it before a report gets into one.

Rules
1. The writer is the node that the report's annotation names: the chart's admission policy lets an agent name only its
   own. A report without one isn't an agent's, and is taken as it is.
2. Each of its addresses must be in one of the blocks that the writer's CiliumNode has. If it isn't there yet, the
   report waits for it: kinds are watched separately.
3. What was let in stays until the report changes: the reports of a node that is gone, or lost a block, are removed by
   others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from fimbria.model.address import Prefix, pack
from fimbria.sources.k8s.types.cilium import CiliumNode, CoreCiliumEndpoint
from fimbria.tables import ObjectKey
from fimbria.tables.table import Table

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Origins:
    """Judges one report at a time. `waiting` are those that are kept out, by the node that wrote them, and for which
    address the log says so."""

    nodes: Table[str, CiliumNode]
    waiting: dict[str, dict[ObjectKey, str]] = field(default_factory=dict)
    _blocks: dict[str, tuple[Prefix, ...]] = field(default_factory=dict)
    _writers: dict[ObjectKey, str] = field(default_factory=dict)

    def node(self, name: str) -> frozenset[ObjectKey]:
        """A CiliumNode appeared, changed or went. Returns the reports to judge again."""
        known, found = self._blocks.get(name, ()), blocks(self.nodes.get(name))
        if found:
            self._blocks[name] = found
        else:
            self._blocks.pop(name, None)
        return frozenset(self.waiting.get(name, ())) if found != known else frozenset()

    def admit(self, key: ObjectKey, entry: bytes, writer: str) -> bytes | None:
        """What slices may hold of a report: its entry, None for nothing. Empty: there is no (complete) report."""
        told = self._forget(key)
        stranger = self._stranger(entry, writer) if entry and writer else ""
        if not stranger:
            return entry or None
        # Of a node without blocks nothing is said: most likely its CiliumNode comes next.
        said = stranger if writer in self._blocks else ""
        self._writers[key] = writer
        self.waiting.setdefault(writer, {})[key] = said
        if said and said != told:
            log.warning(
                "CiliumEndpoint %s/%s gets into no slice: %s is in no pod block of node %s, whose agent wrote it",
                *key, said, writer,
            )  # fmt: skip
        return None

    def __len__(self) -> int:
        """How many reports are kept out."""
        return len(self._writers)

    def _stranger(self, entry: bytes, writer: str) -> str:
        """The first address that isn't the writer's, "" for none."""
        own = self._blocks.get(writer, ())
        return next((ip for ip in _addresses(entry) if not any(pack(ip) in block for block in own)), "")

    def _forget(self, key: ObjectKey) -> str:
        writer = self._writers.pop(key, None)
        if writer is None:
            return ""
        theirs = self.waiting[writer]
        told = theirs.pop(key)
        if not theirs:
            del self.waiting[writer]
        return told


def blocks(node: CiliumNode | None) -> tuple[Prefix, ...]:
    """The pod blocks of a node; none that can't be read."""
    found = []
    for text in (node.spec.ipam.pod_cidrs or ()) if node is not None else ():
        try:
            found.append(Prefix.parse(text))
        except ValueError:
            continue  # the writer of blocks says so in the node's status
    return tuple(found)


def _addresses(entry: bytes) -> Iterator[str]:
    pairs = msgspec.json.decode(entry, type=CoreCiliumEndpoint).networking.addressing or ()
    return (ip for pair in pairs for ip in (pair.ipv4, pair.ipv6) if ip)
