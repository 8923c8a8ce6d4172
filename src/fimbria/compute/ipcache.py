"""Who owns an address: rows of `ipcache` and `local_addrs`.

Rules
1. An address can be claimed by several sources at once (a pod that moved and whose old report lingers). The source of
   the highest rank wins: an endpoint of this node, then the youngest report of a pod, then a node's own addresses.
   When a claim goes the next one takes its place.
2. In overlay mode addresses of other nodes' pods carry the node to encapsulate to.
3. An address of a pod block that nobody reports is UNMANAGED: policies don't allow it by accident.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fimbria.model.address import Prefix, is_v4
from fimbria.model.endpoint import LocalEndpoint, RemoteEndpoint
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


def prefix_key(prefix: Prefix) -> PrefixKey:
    """The map's key of a network."""
    return PrefixKey(prefix.length, prefix.addr)


@dataclass(slots=True)
class IpcacheCompute:
    """Incremental: each source states its claims; `take` returns the keys whose winner may have changed."""

    this_node: str
    overlay: bool
    _claims: dict[Source, tuple[Claim, ...]] = field(default_factory=dict)
    _ranks: dict[Source, Rank] = field(default_factory=dict)
    _by_key: dict[PrefixKey, tuple[Source, ...]] = field(default_factory=dict)
    _interned: dict[Remote, Remote] = field(default_factory=dict)

    def set_node(self, name: str, node: Node | None) -> set[PrefixKey]:
        """A node appeared, changed or went."""
        return self._set(("node", name), (1, ""), self._node_claims(node) if node else ())

    def set_remote(self, key: tuple[str, str], endpoint: RemoteEndpoint | None) -> set[PrefixKey]:
        """A pod was reported, or its report went."""
        if endpoint is None:
            return self._set(("pod", key), (2, ""), ())
        tunnel = endpoint.node if self.overlay and endpoint.node not in self.own_addrs else NO_ADDR
        remote = self._remote(endpoint.identity, REMOTE_POD, tunnel)
        claims = tuple((PrefixKey(128, a), remote) for a in endpoint.addrs)
        return self._set(("pod", key), (2, endpoint.created), claims)

    def set_apiserver(self, addrs: Iterable[bytes]) -> set[PrefixKey]:
        """The API servers' addresses, wherever they run, but for this node's own: those stay HOST."""
        remote = self._remote(IDENTITY_KUBE_APISERVER, REMOTE_NODE, NO_ADDR)
        claims = tuple((PrefixKey(128, a), remote) for a in sorted(set(addrs)) if a not in self.own_addrs)
        return self._set(("apiserver", ""), (1, "above a node's own claim"), claims)

    def set_local(self, endpoint_id: int, endpoint: LocalEndpoint | None, identity: int) -> set[PrefixKey]:
        """An endpoint of this node. Identity 0: not decided yet, no claim."""
        claims: tuple[Claim, ...] = ()
        if endpoint is not None and identity:
            remote = self._remote(identity, REMOTE_POD, NO_ADDR)
            claims = tuple((PrefixKey(128, a), remote) for a in endpoint.addrs)
        return self._set(("local", endpoint_id), (3, ""), claims)

    def get(self, key: PrefixKey) -> Remote | None:
        """The winning claim."""
        sources = self._by_key.get(key)
        if not sources:
            return None
        best = max(sources, key=self._ranks.__getitem__) if len(sources) > 1 else sources[0]
        return next(r for k, r in self._claims[best] if k == key)

    def sources(self, key: PrefixKey) -> tuple[tuple[str, Any], ...]:
        """Who claims a prefix, the winner first: ("local", id), ("pod", (namespace, name)) or ("node", name)."""
        return tuple(sorted(self._by_key.get(key, ()), key=self._ranks.__getitem__, reverse=True))

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
            yield prefix_key(block), self._remote(IDENTITY_UNMANAGED, REMOTE_POD, tunnel)

    def _remote(self, identity: int, flags: int, tunnel: bytes) -> Remote:
        row = Remote(identity, flags | (REMOTE_TUNNEL if tunnel != NO_ADDR else 0), tunnel)
        return self._interned.setdefault(row, row)

    def _set(self, source: Source, rank: Rank, claims: Iterable[Claim]) -> set[PrefixKey]:
        new = tuple(claims)
        old = self._claims.get(source, ())
        if new == old and self._ranks.get(source) == rank:
            return set()
        old_keys, new_keys = {k for k, _ in old}, {k for k, _ in new}
        for key in old_keys - new_keys:
            rest = tuple(s for s in self._by_key[key] if s != source)
            if rest:
                self._by_key[key] = rest
            else:
                del self._by_key[key]
        for key in new_keys - old_keys:
            self._by_key[key] = (*self._by_key.get(key, ()), source)
        if new:
            self._claims[source], self._ranks[source] = new, rank
        else:
            self._claims.pop(source, None)
            self._ranks.pop(source, None)
        return old_keys | new_keys
