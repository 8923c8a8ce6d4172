"""How patient the lab is. Emulated machines are an order of magnitude slower: FIMBRIA_LAB_SLOWNESS=10 waits ten times
as long before it gives up; nothing takes longer by it."""

from __future__ import annotations

import os


def factor() -> float:
    """The factor for every time limit of the lab, at least 1. Raises ValueError naming the variable."""
    text = os.environ.get("FIMBRIA_LAB_SLOWNESS", "1")
    try:
        return max(1.0, float(text))
    except ValueError:
        raise ValueError(f"FIMBRIA_LAB_SLOWNESS is {text!r}, not a number") from None
