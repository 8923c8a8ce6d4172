"""Processes of ours die, stay away, and come back changed, while traffic runs: it doesn't notice."""

import signal
import time
from collections.abc import Callable, Iterator

import pytest
from traffic import Traffic, metric, set_options, start_pods, wait_settled

from fimbria.lab.handle import Lab


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(nodes=2)
    start_pods(lab)
    return lab


@pytest.fixture(autouse=True)
def _settled(lab: Lab) -> Iterator[None]:
    yield
    wait_settled(lab)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_agents_killed_and_started(lab: Lab, number: int) -> None:
    with Traffic(lab):
        for node in lab.spec.node_names:
            lab.kill(f"{node}/agent", number)
            lab.restart(f"{node}/agent")
        wait_settled(lab)


def test_agents_away(lab: Lab) -> None:
    with Traffic(lab):
        for node in lab.spec.node_names:
            lab.kill(f"{node}/agent")
        time.sleep(12)
        for node in lab.spec.node_names:
            lab.restart(f"{node}/agent")
        wait_settled(lab)


@pytest.mark.parametrize("options", [
    pytest.param(("trace-interval=1.5",), id="programs change"),
    pytest.param(("conntrack-entries=65536", "nat-entries=32768"), id="learned maps change"),
    pytest.param(("ipcache-entries=10000", "service-entries=4000", "policy-sets=500"), id="derived maps change"),
    pytest.param((), id="all change back"),
])  # fmt: skip
def test_agents_with_other_settings(lab: Lab, options: tuple[str, ...]) -> None:
    set_options(lab, *options)
    with Traffic(lab):
        for node in lab.spec.node_names:
            lab.kill(f"{node}/agent")
            lab.restart(f"{node}/agent")
        wait_settled(lab)
        time.sleep(0.5)


def test_operator_and_api_server_killed(lab: Lab) -> None:
    with Traffic(lab):
        for process in ("control/operator", "control/controllers", "control/apiserver"):
            lab.kill(process)
        for process in ("control/apiserver", "control/controllers", "control/operator"):
            lab.restart(process)
        wait_settled(lab)
    assert metric(lab, "node1", "fimbria_ready") == 1
