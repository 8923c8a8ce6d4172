"""How the entries of a policy set are shown."""

import pytest

from fimbria.agent.details import port_text


@pytest.mark.parametrize(
    ("prefixlen", "proto", "port", "text"),
    [
        (40, 0, 0, "any"),
        (48, 6, 0, "TCP"),
        (64, 6, 80, "TCP/80"),
        (61, 17, 8000, "UDP/8000-8007"),
        (56, 1, 8 << 8, "ICMP type 8"),
        (55, 58, 128 << 8, "ICMPv6 types 128-129"),
        (64, 200, 7, "protocol 200/7"),
    ],
)
def test_ports(prefixlen: int, proto: int, port: int, text: str) -> None:
    assert port_text(prefixlen, proto, port) == text
