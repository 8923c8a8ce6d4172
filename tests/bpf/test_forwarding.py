"""Real traffic through the real programs: two nodes, two pods each, and the world."""

from collections.abc import Iterator

import pytest
from lab import Lab, Mode, lab, ping, tcp_peer, udp_peer

MODES = [Mode(overlay, fast, tcx) for overlay in (True, False) for fast in (True, False) for tcx in (True, False)]
PAIRS = [("a", "b"), ("a", "c"), ("d", "b")]


@pytest.fixture(scope="module", params=MODES, ids=str)
def net(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with lab(request.param) as built:
        yield built


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("pair", PAIRS, ids="".join)
def test_pods_reach_each_other(net: Lab, pair: tuple[str, str], family: int) -> None:
    client, server = (net.pod(name) for name in pair)
    listen, source = server.addr[family], client.addr[family]
    assert ping(client.space, family, listen)
    assert udp_peer(server.space, client.space, family, listen) == source
    assert tcp_peer(server.space, client.space, family, listen) == source
