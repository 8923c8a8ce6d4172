"""Who owns an address: rows of `ipcache` and `local_addrs`.

Rules
1. An address can be claimed by several sources at once (a pod that moved and whose old report lingers). The source of
   the highest rank wins: an endpoint of this node, this node itself, other nodes, then the youngest report of a pod.
   So no object of the cluster takes a node's address away from it. When a claim goes the next one takes its place.
2. In overlay mode addresses of other nodes' pods carry the node to encapsulate to: the one whose block they are in, by
   the address it has now; the one that the report names while the block's node is gone, which somebody may have deleted
   by mistake. So a node that changes its address is followed at once, not when its last pod's report has been written
   anew. An address that was in no block yet is no pod's, whatever a report says: it is NOBODY's and goes the way that
   it would go without, so that nobody gets the packets, or the rights, of an address outside.
3. An address of a pod block that nobody reports is UNMANAGED: policies don't allow it by accident.
4. Of two reports of the same second that name different identities neither can be preferred: until one goes the address
   is NOBODY's, which every pod with a policy drops, so that neither's rights are given to the other.
5. A report that names an address outside of the blocks of the node whose agent wrote it says nothing at all: whoever
   has taken over one node can't give other nodes' addresses an identity. It counts as soon as the node has the block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Final

from fimbria.model.address import Prefix, is_v4
from fimbria.model.endpoint import LocalEndpoint, RemoteEndpoint
from fimbria.model.identity import NOBODY
from fimbria.model.node import Node
from fimbria.model.rows import NO_ADDR, PrefixKey, Remote

IDENTITY_HOST = 1
IDENTITY_UNMANAGED = 3
IDENTITY_REMOTE_NODE = 6
IDENTITY_KUBE_APISERVER = 7
REMOTE_POD, REMOTE_NODE, REMOTE_TUNNEL = 1, 2, 4

Claim = tuple[PrefixKey, Remote]
Rank = tuple[int, str]
Source = tuple[str, Any]
POD_RANK: Final = 1
OTHER_NODE: Final[Rank] = (2, "")
API_SERVER: Final[Rank] = (2, "above a node's claim")
OWN_NODE: Final[Rank] = (3, "")
LOCAL: Final[Rank] = (4, "")
API_SERVERS: Final[Source] = ("apiserver", "")


class Rivals(tuple[Source, ...]):
    """Several sources of one key. A single source, which is nearly always, stands for itself: there can be 100,000."""

    __slots__ = ()


def prefix_key(prefix: Prefix) -> PrefixKey:
    """The map's key of a network."""
    return PrefixKey(prefix.length, prefix.addr)


@dataclass(slots=True)
class IpcacheCompute:
    """Incremental: each source states its claims, and what it changes is returned as the keys whose winner may differ.

    `_claims` holds flat tuples (rank, rank's text, key, row, key, row, ...): most of an agent's memory in a large
    cluster is in here.
    """

    this_node: str
    overlay: bool
    _claims: dict[Source, tuple[Any, ...]] = field(default_factory=dict)
    _by_key: dict[PrefixKey, Source | Rivals] = field(default_factory=dict)
    foreign: dict[tuple[str, str], bytes] = field(default_factory=dict)
    """Reports that rule 5 keeps out, and the address that does it."""
    _blocks: dict[tuple[int, int], tuple[PrefixKey, Source]] = field(default_factory=dict)
    """Every block that there was, and who had it last."""
    _lengths: set[int] = field(default_factory=set)

    def tunnel(self, name: str) -> bytes:
        """The address that packets for a node's pods go to; NO_ADDR if there is none."""
        claims = self._claims.get(("node", name), ())
        return next((row.tunnel for row in claims[3::2] if row.flags & REMOTE_TUNNEL), NO_ADDR)

    def place(self, name: str) -> tuple[bytes, frozenset[PrefixKey]]:
        """What decides about reports of a node's pods: `tunnel` and its blocks."""
        return self.tunnel(name), frozenset(k for k in self._claims.get(("node", name), ())[2::2] if k.prefixlen < 128)

    def known_pods(
        self, blocks: Iterable[PrefixKey] | None, reports: Iterable[tuple[tuple[str, str], RemoteEndpoint]]
    ) -> list[tuple[tuple[str, str], RemoteEndpoint]]:
        """Of all reports those that are known by now and have an address in one of the blocks (None: wherever)."""
        if blocks is None:
            return [(key, report) for key, report in reports if self._knows(key)]
        numbers = {(b.prefixlen, int.from_bytes(b.addr) >> (128 - b.prefixlen)) for b in blocks}
        lengths = {128 - length for length, _ in numbers}
        return [
            (key, report) for key, report in reports
            if any((128 - n, int.from_bytes(a) >> n) in numbers for a in report.addrs for n in lengths)
            and self._knows(key)
        ]  # fmt: skip

    def _knows(self, pod: tuple[str, str]) -> bool:
        return ("pod", pod) in self._claims or pod in self.foreign

    def set_node(self, name: str, node: Node | None) -> set[PrefixKey]:
        """A node appeared, changed or went."""
        return self._set(
            ("node", name), OWN_NODE if name == self.this_node else OTHER_NODE, self._node_claims(node) if node else ()
        )

    def set_remote(self, key: tuple[str, str], endpoint: RemoteEndpoint | None) -> set[PrefixKey]:
        """A pod was reported, or its report went."""
        stranger = self._stranger(endpoint) if endpoint is not None else None
        if stranger is not None:
            self.foreign[key] = stranger
        else:
            self.foreign.pop(key, None)
        if endpoint is None or stranger is not None:
            return self._set(("pod", key), (POD_RANK, ""), ())
        # One row for all addresses of a pod, which are nearly always of one node.
        made: dict[bytes | None, Remote] = {None: self._remote(NOBODY, 0, NO_ADDR)}
        claims = []
        for addr in endpoint.addrs:
            way = self._way(addr, endpoint.node)
            if way not in made:
                made[way] = self._remote(endpoint.identity, REMOTE_POD, way or NO_ADDR)
            claims.append((PrefixKey(128, addr), made[way]))
        return self._set(("pod", key), (POD_RANK, endpoint.created), claims)

    def _stranger(self, report: RemoteEndpoint) -> bytes | None:
        """The first address that isn't of the node whose agent wrote the report."""
        if not report.writer:
            return None
        return next((a for a in report.addrs if not self._vouched(a, report.writer)), None)

    def _vouched(self, addr: bytes, writer: str) -> bool:
        """Rule 5. An address in no block, of a node without any, may be in one that we haven't heard of: rule 2."""
        number, node, known = int.from_bytes(addr), ("node", writer), False
        for length in self._lengths:
            block = self._blocks.get((length, number >> (128 - length)))
            if block is not None:
                known = True
                if node in (self._sources(block[0]) or (block[1],)):
                    return True
        return not known and not self.place(writer)[1]

    def _way(self, addr: bytes, reported: bytes) -> bytes | None:
        """The address to encapsulate to, NO_ADDR if that isn't done; None for an address that was never in a block."""
        number, known = int.from_bytes(addr), False
        for length in self._lengths:
            block = self._blocks.get((length, number >> (128 - length)))
            row = self.get(block[0]) if block is not None else None
            if row is not None:
                return row.tunnel
            known |= block is not None
        if not known:
            return None
        return reported if self.overlay and reported not in self.own_addrs else NO_ADDR

    def set_apiserver(self, addrs: Iterable[bytes]) -> set[PrefixKey]:
        """The API servers' addresses, wherever they run, but for this node's own: those stay HOST.

        One that is no node's isn't a node: it can't vouch for identities.
        """
        remote = self._remote(IDENTITY_KUBE_APISERVER, 0, NO_ADDR)
        claims = tuple((PrefixKey(128, a), remote) for a in sorted(set(addrs)) if a not in self.own_addrs)
        return self._set(API_SERVERS, API_SERVER, claims)

    def set_local(self, endpoint_id: int, endpoint: LocalEndpoint | None, identity: int) -> set[PrefixKey]:
        """An endpoint of this node. Identity 0: not decided yet, no claim."""
        claims: tuple[Claim, ...] = ()
        if endpoint is not None and identity:
            remote = self._remote(identity, REMOTE_POD, NO_ADDR)
            claims = tuple((PrefixKey(128, a), remote) for a in endpoint.addrs)
        return self._set(("local", endpoint_id), LOCAL, claims)

    def get(self, key: PrefixKey) -> Remote | None:
        """The winning claim."""
        sources = self._by_key.get(key)
        if sources is None:
            return None
        if not isinstance(sources, Rivals):
            return self._stated(sources, key)
        ranked = sorted(sources, key=self._rank, reverse=True)
        row = self._stated(ranked[0], key)
        if ranked[0][0] == "pod" and self._equals_differ(ranked, row.identity, key):
            return replace(row, identity=NOBODY)
        if ranked[0] == API_SERVERS and ranked[1][0] == "node":
            return replace(row, flags=self._stated(ranked[1], key).flags)
        return row

    def _equals_differ(self, ranked: list[Source], identity: int, key: PrefixKey) -> bool:
        """Rule 4: whether a report as young as the winner's says that the address has another identity."""
        rank = self._rank(ranked[0])
        rivals = (self._stated(s, key) for s in ranked[1:] if s[0] == "pod" and self._rank(s) == rank)
        return any(row.identity != identity for row in rivals)

    def _stated(self, source: Source, key: PrefixKey) -> Remote:
        claims = self._claims[source]
        row: Remote = claims[claims.index(key, 2) + 1]
        return row

    def sources(self, key: PrefixKey) -> tuple[tuple[str, Any], ...]:
        """Who claims a prefix, the winner first: ("local", id), ("pod", (namespace, name)) or ("node", name)."""
        return tuple(sorted(self._sources(key), key=self._rank, reverse=True))

    def __len__(self) -> int:
        return len(self._by_key)

    own_addrs: frozenset[bytes] = frozenset()
    host_addrs: tuple[bytes, ...] = ()
    """Every address of this host, also those its Node doesn't list: what comes from them is the host's."""

    def _node_claims(self, node: Node) -> Iterable[Claim]:
        local = node.name == self.this_node
        if local:
            self.own_addrs = frozenset(node.addrs)
        identity = IDENTITY_HOST if local else IDENTITY_REMOTE_NODE
        # A pod block of one family may be tunnelled over the other: any address of the node will do.
        tunnel = next(iter(sorted(node.addrs, key=is_v4, reverse=True)), NO_ADDR)
        tunnel = tunnel if self.overlay and not local else NO_ADDR
        for addr in (*node.addrs, *(self.host_addrs if local else ())):
            yield PrefixKey(128, addr), self._remote(identity, REMOTE_NODE, NO_ADDR)
        for addr in node.routers:
            yield PrefixKey(128, addr), self._remote(identity, REMOTE_NODE | REMOTE_POD, tunnel)
        for block in node.pod_cidrs:
            key = prefix_key(block)
            if block.length < 128:  # of one address a pod's own claim would be taken for the block's
                number = int.from_bytes(block.addr) >> (128 - block.length)
                self._blocks[block.length, number] = key, ("node", node.name)
                self._lengths.add(block.length)
            yield key, self._remote(IDENTITY_UNMANAGED, REMOTE_POD, tunnel)

    @staticmethod
    def _remote(identity: int, flags: int, tunnel: bytes) -> Remote:
        return Remote(identity, flags | (REMOTE_TUNNEL if tunnel != NO_ADDR else 0), tunnel)

    def _set(self, source: Source, rank: Rank, claims: Iterable[Claim]) -> set[PrefixKey]:
        stated = tuple(chain.from_iterable(claims))
        new: tuple[Any, ...] = (*rank, *stated) if stated else ()
        old = self._claims.get(source, ())
        if new == old:
            return set()
        old_keys: set[PrefixKey] = set(old[2::2])
        new_keys: set[PrefixKey] = set(new[2::2])
        for key in old_keys - new_keys:
            self._file(key, [s for s in self._sources(key) if s != source])
        for key in new_keys - old_keys:
            self._file(key, [*self._sources(key), source])
        if new:
            self._claims[source] = new
        else:
            self._claims.pop(source, None)
        return old_keys | new_keys

    def _rank(self, source: Source) -> Rank:
        stated = self._claims[source]
        return stated[0], stated[1]

    def _sources(self, key: PrefixKey) -> tuple[Source, ...]:
        found = self._by_key.get(key)
        return () if found is None else found if isinstance(found, Rivals) else (found,)

    def _file(self, key: PrefixKey, sources: list[Source]) -> None:
        if len(sources) > 1:
            self._by_key[key] = Rivals(sources)
        elif sources:
            self._by_key[key] = sources[0]
        else:
            del self._by_key[key]
