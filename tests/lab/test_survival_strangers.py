"""Programs of others at our hooks, with tcx links and with clsact filters: told, left alone, and ours run as before."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.bpf.compiling import compile_object
from traffic import Traffic, agent, metric, start_pods, wait_settled, wait_soon

from fimbria.lab import components
from fimbria.lab.handle import Lab

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=["tcx", "clsact"])
def lab(make_lab: Callable[..., Lab], request: pytest.FixtureRequest) -> Lab:
    lab = make_lab(nodes=2, agent_options=(f"attach={request.param}",))
    start_pods(lab)
    return lab


@pytest.fixture(autouse=True)
def _settled(lab: Lab) -> Iterator[None]:
    yield
    wait_settled(lab)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_object(HERE / "stranger.bpf.c", tmp_path_factory.mktemp("stranger"))


def hook(lab: Lab, pod: str) -> int:
    return int(next(e["ifindex"] for e in agent(lab, "node1", "endpoints") if e["pod"] == pod))


def repairs(lab: Lab) -> float:
    return metric(lab, "node1", "fimbria_drift_repaired_total", target="device_links")


@contextmanager
def attached(lab: Lab, built: Path, *where: str) -> Iterator[None]:
    argv = lab.argv("node/node1", sys.executable, str(HERE / "stranger.py"), str(built), *where)
    process = subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=components.ENVIRONMENT
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        yield
    finally:
        process.communicate(timeout=10)


def told(lab: Lab, ifindex: int) -> bool:
    found = agent(lab, "node1", "status")["foreign_programs"].get(f"ingress of interface {ifindex}", [])
    return any("stranger" in name for name in found)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_program_beside_ours(lab: Lab, stranger: Path, place: str) -> None:
    if agent(lab, "node1", "status")["attach"] == "clsact":
        where = ("clsact", {"before": "0x1", "after": "0xf3"}[place])
    else:
        where = ("tcx", place)
    ifindex, logged = hook(lab, "near"), len(lab.process_log("node1/agent"))
    with Traffic(lab), attached(lab, stranger, *where, str(ifindex)):
        wait_soon(lab, "the status tells", lambda: told(lab, ifindex), 5)
        words = f"ingress of interface {ifindex}: programs of others now: stranger"
        wait_soon(lab, "the log tells", lambda: words in lab.process_log("node1/agent")[logged:], 8)
        assert metric(lab, "node1", "fimbria_foreign_programs", hook=f"ingress of interface {ifindex}") == 1
        wait_settled(lab)
        assert told(lab, ifindex), "it isn't ours to remove"
    wait_soon(lab, "it is gone", lambda: not told(lab, ifindex), 5)
    words = f"ingress of interface {ifindex}: programs of others now: none"
    lab.wait("the log tells", lambda: words in lab.process_log("node1/agent")[logged:])


@pytest.mark.parametrize("lab", ["clsact"], indirect=True)  # nobody can replace the program of a link
def test_ours_replaced_in_its_place(lab: Lab, stranger: Path) -> None:
    """A filter of somebody else's under our handle stays; ours takes another one, and runs."""
    ifindex = hook(lab, "near")
    before = repairs(lab)
    with attached(lab, stranger, "clsact", "0xf1", str(ifindex)):
        wait_soon(lab, "ours is back", lambda: repairs(lab) > before, 2)
        assert told(lab, ifindex)
        with Traffic(lab):
            wait_settled(lab)


@pytest.mark.parametrize("lab", ["clsact"], indirect=True)
@pytest.mark.parametrize("what", ["filter", "qdisc"])
def test_ours_deleted(lab: Lab, what: str) -> None:
    name = next(e["interface"] for e in agent(lab, "node1", "endpoints") if e["pod"] == "near")
    before = repairs(lab)
    argv = ("filter", "del", "dev", name, "ingress") if what == "filter" else ("qdisc", "del", "dev", name, "clsact")
    assert lab.run("node/node1", "tc", *argv).returncode == 0
    wait_soon(lab, "ours is back", lambda: repairs(lab) > before, 2)
    with Traffic(lab):
        wait_settled(lab)


def test_agents_restarted(lab: Lab) -> None:
    with Traffic(lab):
        for node in lab.spec.node_names:
            lab.kill(f"{node}/agent")
            lab.restart(f"{node}/agent")
        wait_settled(lab)
