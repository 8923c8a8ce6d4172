"""Nodes of the cluster, as the datapath needs them."""

from __future__ import annotations

from dataclasses import dataclass

from fimbria.model.address import Prefix


@dataclass(frozen=True, slots=True)
class Node:
    """A node. `addrs` are its own addresses, `routers` those it has on its pods' networks (16 bytes each)."""

    name: str
    addrs: tuple[bytes, ...]
    routers: tuple[bytes, ...]
    pod_cidrs: tuple[Prefix, ...]
    problem: str = ""
