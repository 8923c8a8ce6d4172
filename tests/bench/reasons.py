"""Why goals are missed, for the groups whose own code doesn't know. Pure. The first entry that fits counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from tests.bench.report import Figure

CONNECTION: Final = (
    "in part the programs (eight passes, about 8% of a connection's time) and its entries in the table, which plain "
    "routing doesn't have; the rest is not explained yet"
)
REASONS: Final[Sequence[tuple[str, str, str]]] = (
    ("pods", r"policy: connect", "the first packet is judged on both ends, and its verdict stored with the connection"),
    ("pods", r"connect\+request\+close", CONNECTION),
    ("pods", r"bulk", "not explained yet; the programs take 3% of the time, and the receiver is woken 1.3 times as "
                      "often for the same data"),
    ("pods", r"native: request/response", "the programs' own time, against a path that looks at no packet"),
    ("services", r"against the pod's address", "one look-up more for each connection"),
    ("services", r"XDP", "a veth device copies each packet for a native XDP program; hardware doesn't"),
    ("services", r"by packet", "each packet is translated, there and back"),
    ("ipvs", r"", "BPF programs cost more where the processor is emulated: their code is translated twice"),
    ("scale", r"API side: memory", "an agent that follows slices also remembers who is in which"),
    ("programming", r"time", "Python: reading the lists, computing and encoding the rows; system calls take 5% of it"),
)  # fmt: skip


def with_reason(found: Figure) -> Figure:
    """A missed goal that has no reason yet gets the one that fits."""
    if found.met is not False:
        return found
    why = next((text for group, name, text in REASONS if group == found.group and re.search(name, found.name)), "")
    if not why or why in found.note:
        return found
    return replace(found, note=f"{found.note or 'goal missed'}; {why}".replace("goal missed; ", "goal missed: "))
