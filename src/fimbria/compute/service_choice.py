"""Which endpoints of a service port take new connections, by Kubernetes' rules as kube-proxy 1.36 applies them.

An endpoint's *standing* is all that matters about it, as one small number. There are few different ones, so what is
decided is decided for standings, not for endpoints: `choose` looks at which standings there are.

1. Ready endpoints serve; if there is none at all, those that serve while terminating.
2. Hints: if every ready endpoint has hints of nodes, and one names this node, those that name it; otherwise, if every
   one has hints of zones, and one names this zone, those that name it; otherwise all.
3. Local policies: this node's ready endpoints, else its terminating ones that serve. Hints don't count there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

from fimbria.model.service import Endpoint

Standing = int

# Of several listings of an endpoint the highest counts: one that isn't terminating (a new pod may have got the address
# of one that is still going), then a ready one.
GOING_ON: Final = 1 << 8  # not terminating
READY: Final = 1 << 7
SERVING: Final = 1 << 6
LOCAL: Final = 1 << 5
ZONE_HINT: Final = 1 << 4
THIS_ZONE: Final = 1 << 3
NODE_HINT: Final = 1 << 2
THIS_NODE: Final = 1 << 1
ALIVE: Final = 1 << 0  # connections it has may go on, whether or not it takes new ones


class Place(NamedTuple):
    """Where this node is; `zone` is empty if unknown."""

    node: str
    zone: str = ""


class Choice(NamedTuple):
    """The standings that serve under either policy. `anywhere`: some endpoint of the cluster serves."""

    everywhere: frozenset[Standing]
    local: frozenset[Standing]
    anywhere: bool


def standing(endpoint: Endpoint, place: Place, *, publish_not_ready: bool, drained: bool) -> Standing:
    """How an endpoint stands here. `drained`: it takes no new connections, whatever its conditions."""
    found = 0 if endpoint.terminating else GOING_ON
    if endpoint.serving or endpoint.ready or publish_not_ready:
        found |= ALIVE
    if (endpoint.ready or publish_not_ready) and not drained:
        found |= READY
    if endpoint.serving and not drained:
        found |= SERVING
    if endpoint.node and endpoint.node == place.node:
        found |= LOCAL
    if endpoint.zones:
        found |= ZONE_HINT | (THIS_ZONE if place.zone in endpoint.zones else 0)
    if endpoint.nodes:
        found |= NODE_HINT | (THIS_NODE if place.node in endpoint.nodes else 0)
    return found


@lru_cache(maxsize=4096)
def choose(present: frozenset[Standing]) -> Choice:
    """What serves, given the standings of all endpoints."""
    ready = frozenset(s for s in present if s & READY)
    leaving = frozenset(s for s in present if not s & (READY | GOING_ON) and s & SERVING)
    local_ready = frozenset(s for s in ready if s & LOCAL)
    local_leaving = frozenset(s for s in leaving if s & LOCAL)
    return Choice(_near(ready) or leaving, local_ready or local_leaving, bool(ready or leaving))


def _near(ready: frozenset[Standing]) -> frozenset[Standing]:
    for hint, here in ((NODE_HINT, THIS_NODE), (ZONE_HINT, THIS_ZONE)):
        near = frozenset(s for s in ready if s & here)
        if near and all(s & hint for s in ready):
            return near
    return ready
