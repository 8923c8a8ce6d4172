"""With XDP on, next hops stay resolved: whatever becomes one is followed, whatever isn't one any more is given back."""

import json
from collections.abc import Callable

import pytest

from fimbria.lab.handle import Lab

pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab(nodes=2, agent_options=("xdp=generic",))


def ip(lab: Lab, *args: str) -> None:
    done = lab.run("node/node1", "ip", *args)
    assert done.returncode == 0, done.stderr


def managed(lab: Lab) -> dict[str, str]:
    """MACs by address of what the kernel keeps resolved for us; empty while unknown."""
    rows = json.loads(lab.run("node/node1", "ip", "-j", "neigh", "show").stdout)
    return {r["dst"]: r.get("lladdr", "") for r in rows if r.get("managed", "") is None and "241" in str(r)}


def gateway(lab: Lab) -> str:
    routes = json.loads(lab.run("node/node1", "ip", "-j", "route", "show", "default").stdout)
    return str(routes[0]["gateway"])


def test_the_gateway_is_resolved_before_anybody_asks(lab: Lab) -> None:
    assert lab.wait("the gateway is resolved", lambda: managed(lab).get(gateway(lab)))


def test_what_becomes_a_next_hop_is_followed_and_given_back(lab: Lab) -> None:
    first = gateway(lab).rsplit(".", 1)[0]
    ip(lab, "route", "add", "192.0.2.0/24", "via", f"{first}.77")
    lab.wait("the new gateway is kept", lambda: f"{first}.77" in managed(lab))
    ip(lab, "route", "del", "192.0.2.0/24")
    lab.wait("it is given back", lambda: f"{first}.77" not in managed(lab))
    assert gateway(lab) in managed(lab)


def test_an_entry_that_somebody_removes_comes_back(lab: Lab) -> None:
    device = json.loads(lab.run("node/node1", "ip", "-j", "route", "show", "default").stdout)[0]["dev"]
    ip(lab, "neigh", "del", gateway(lab), "dev", device)
    lab.wait("the gateway is resolved again", lambda: managed(lab).get(gateway(lab)))
