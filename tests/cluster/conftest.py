"""One real cluster for all tests here: two nodes with Fimbria by its chart and the cluster's DNS.

By default it is the run's own and taken down at its end, also when that end is a signal. `--cluster NAME` takes a
cluster of that name, bringing up what isn't there, and leaves it; `KUBE_KEEP=1` leaves the run's own. Each test leaves
the cluster as it found it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType

import pytest
from tests.cluster.bed import BedError, Cluster
from tests.cluster.bed.cluster import clusters
from tests.cluster.bed.progress import say

LOGS = Path(__file__).resolve().parents[2] / "build" / "cluster-logs"
SHOWN = (
    ("nodes", ("get", "nodes", "-o", "wide")),
    ("pods", ("get", "pods", "-A", "-o", "wide")),
    ("events", ("get", "events", "-A", "--sort-by=.lastTimestamp")),
    ("agents", ("-n", "kube-system", "logs", "-l", "k8s-app=fimbria", "--all-containers", "--prefix", "--tail=30")),
    ("operators", ("-n", "kube-system", "logs", "-l", "k8s-app=fimbria-operator", "--prefix", "--tail=30")),
)
MakeCluster = Callable[..., Cluster]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cluster", default="", help="run tests/cluster on this cluster of the bed, and leave it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test's time doesn't include the cluster's start, which knows limits of its own."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            own = item.get_closest_marker("timeout")
            seconds = own.args[0] if own and own.args else item.config.getini("timeout")
            item.add_marker(pytest.mark.timeout(float(seconds), func_only=True), append=False)


def own_name() -> str:
    """Carries our pid, so that what a killed run left is recognised."""
    return f"t{os.getpid()}-{secrets.token_hex(2)}"


@pytest.fixture(scope="session", autouse=True)
def _orderly() -> Iterator[None]:
    """Sweeps what killed runs left, and lets SIGTERM and SIGHUP end a run as Ctrl-C does: with its clean-up."""
    if os.geteuid() != 0:
        pytest.fail("tests of a real cluster need root")
    for name in clusters():
        owner = name.removeprefix("t").split("-")[0]
        if name.startswith("t") and owner.isdigit() and not Path(f"/proc/{owner}").exists():
            Cluster(name).down()

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two nodes or more, Ready, names resolve."""
    named = request.config.getoption("--cluster")
    found = Cluster(named or own_name())
    keep = bool(named) or os.environ.get("KUBE_KEEP") == "1"
    try:
        if not found.installed():
            found.up_with_fimbria()
        yield found
    finally:
        if keep:
            say(f"cluster {found.name} stays; python -m tests.cluster.bed down --name {found.name} removes it")
        else:
            if request.session.testsfailed:
                _keep_logs(found)
            found.down()


@pytest.fixture
def make_cluster() -> Iterator[MakeCluster]:
    """More clusters, for tests of the bed itself: named, not brought up, and gone at the test's end."""
    made: list[Cluster] = []

    def make() -> Cluster:
        made.append(Cluster(own_name()))
        return made[-1]

    yield make
    for one in made:
        one.down()


@pytest.fixture
def namespace(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A Kubernetes namespace of the test's own, removed at its end with all that is in it."""
    name = f"fimt-{secrets.token_hex(3)}"
    cluster.kubectl("create", "namespace", name)
    # The API server takes no pod before that, and waits for a controller for a second or two only.
    cluster.kubectl("-n", name, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
    yield name
    cluster.kubectl("delete", "namespace", name, "--timeout=90s")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    found = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(found, Cluster):
        report.sections += [(f"cluster {found.name}: {what}", _ask(found, *words)) for what, words in SHOWN]
    return report


def _ask(cluster: Cluster, *words: str) -> str:
    try:
        return cluster.kubectl(*words, seconds=20)[-6000:]
    except BedError as error:
        return str(error)


def _keep_logs(cluster: Cluster) -> None:
    target = LOGS / cluster.name
    shutil.copytree(cluster.layout.logs, target, ignore_dangling_symlinks=True, dirs_exist_ok=True)
    say(f"logs of the control plane and the nodes: {target}")
