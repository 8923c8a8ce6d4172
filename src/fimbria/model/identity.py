"""Numeric security identities: which numbers are fixed, and what the fixed ones are called."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from fimbria.model.labels import Labels

MIN_ALLOCATED: Final = 256
MAX_ALLOCATED: Final = 65535
SCOPE_CIDR: Final = 1 << 24
NOBODY: Final = SCOPE_CIDR - 1
"""An identity that never exists: to the datapath one that it doesn't know yet, whose packets policies drop."""


class Reserved(IntEnum):
    """`enum reserved_identity` of the datapath."""

    UNKNOWN = 0
    HOST = 1
    WORLD = 2
    UNMANAGED = 3
    HEALTH = 4
    INIT = 5
    REMOTE_NODE = 6
    KUBE_APISERVER = 7


# API servers run on nodes, so what is said about remote nodes holds for them too.
RESERVED_LABELS: Final[dict[int, Labels]] = {
    Reserved.HOST: Labels({"reserved:host": ""}),
    Reserved.WORLD: Labels({"reserved:world": ""}),
    Reserved.UNMANAGED: Labels({"reserved:unmanaged": ""}),
    Reserved.HEALTH: Labels({"reserved:health": ""}),
    Reserved.INIT: Labels({"reserved:init": ""}),
    Reserved.REMOTE_NODE: Labels({"reserved:remote-node": ""}),
    Reserved.KUBE_APISERVER: Labels({"reserved:kube-apiserver": "", "reserved:remote-node": ""}),
}
