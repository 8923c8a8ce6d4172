"""IP protocols by number and by name, as Kubernetes writes it (IANA, "Protocol Numbers")."""

from __future__ import annotations

from typing import Final

WITH_PORTS: Final = {"TCP": 6, "UDP": 17, "SCTP": 132}
"""Those that Kubernetes knows."""
NAMES: Final = {number: name for name, number in WITH_PORTS.items()} | {1: "ICMP", 58: "ICMPv6"}


def protocol_name(number: int) -> str:
    """Its name, or its number as text."""
    return NAMES.get(number, str(number))
