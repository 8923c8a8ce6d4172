"""Labs for tests: each with a random short name that carries our pid, so that what a killed run left is recognised
and removed."""

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fimbria.lab import cluster, state
from fimbria.lab.handle import Lab
from fimbria.lab.layout import LabSpec

sys.path.insert(0, str(Path(__file__).parent))  # tests of this directory share traffic.py
MakeLab = Callable[..., Lab]


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        pytest.fail("the lab's tests need root")
    for name in state.labs():
        owner = name.removeprefix("t").split("-")[0]
        if name.startswith("t") and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            cluster.down(name)


def fresh_name() -> str:
    return f"t{os.getpid()}-{secrets.token_hex(2)}"


@pytest.fixture
def lab_name() -> Iterator[str]:
    """A name whose lab, should the test create it, is removed at the end."""
    name = fresh_name()
    yield name
    cluster.down(name)
    assert cluster.remains(name) == []


@pytest.fixture(scope="module")
def make_lab() -> Iterator[MakeLab]:
    """Builds labs that live until the module's end: make_lab(nodes=2, agents=False, ...)."""
    names: list[str] = []

    def make(**settings: object) -> Lab:
        name = fresh_name()
        names.append(name)
        cluster.up(LabSpec(name=name, **settings))  # type: ignore[arg-type]
        return Lab(name)

    yield make
    for name in names:
        cluster.down(name)
        assert cluster.remains(name) == []


def ptp_network(number: int) -> dict[str, object]:
    """A configuration for Debian's own plugins: a node's pods in a range of their own, routed by the node."""
    ranges = [[{"subnet": f"10.244.{number}.0/24"}], [{"subnet": f"fd00:244::{number}00/120"}]]
    ipam = {"type": "host-local", "ranges": ranges, "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}
    return {"cniVersion": "1.0.0", "name": "ptp", "plugins": [
        {"type": "ptp", "ipam": ipam},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ]}  # fmt: skip


def install_ptp(lab: Lab) -> None:
    """Gives every node Debian's ptp plugin, and waits until the nodes are Ready by that."""
    for number, node in enumerate(lab.spec.node_names, 1):
        done = lab.run(f"node/{node}", "tee", "/etc/cni/net.d/10-ptp.conflist", stdin=json.dumps(ptp_network(number)))
        assert done.returncode == 0, done.stderr
    lab.wait("nodes are Ready", lambda: all(n["ready"] for n in cluster.status(lab.spec.name)["nodes"]))


@pytest.fixture(scope="module")
def ptp_lab(make_lab: MakeLab) -> Lab:
    """Two nodes with Debian's ptp plugin instead of ours: what is wrong here is the lab's own fault."""
    lab = make_lab(nodes=2, agents=False)
    install_ptp(lab)
    return lab


@pytest.fixture(scope="module")
def agent_lab(make_lab: MakeLab) -> Lab:
    """Three nodes with everything of ours running, overlay routing."""
    return make_lab()
