"""Local redirects (CiliumLocalRedirectPolicy): what clients of this node ask elsewhere for, and get from a pod here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fimbria.model.policy import PolicyId, Selector
from fimbria.model.service import ServiceKey


class RedirectPort(NamedTuple):
    """A port of the frontend or of the pods that take its place; `proto` is an IP protocol number."""

    name: str
    port: int
    proto: int


@dataclass(frozen=True, slots=True)
class Redirect:
    """One policy. Its frontend is an address (16 bytes) with `ports`, or the cluster IPs of a Service: those of its
    ports that `ports` names, all of them if there are none.

    `pods` selects pods by their labels (of the policy's namespace), `targets` are their ports. `skip`: these pods
    themselves see the frontend's addresses as they are.
    """

    id: PolicyId
    addr: bytes | None
    service: ServiceKey | None
    ports: tuple[RedirectPort, ...]
    pods: Selector
    targets: tuple[RedirectPort, ...]
    skip: bool = False


class LocalPod(NamedTuple):
    """A pod of this node that a redirect selects: where it is, and by which numbers the datapath knows it."""

    endpoint: int
    netns_cookie: int
    addrs: tuple[bytes, ...]
    ready: bool
