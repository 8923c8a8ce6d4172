"""What keeps agent and operator from running: one clear sentence each, the right exit status, and the rest goes on."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from traffic import Traffic, agent, cluster_ips, ready, set_options, start_pods, wait_settled

from fimbria.lab import components
from fimbria.lab.handle import Lab


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(nodes=2)
    start_pods(lab)
    return lab


# Another agent beside node1's, in folders of its own.
FOLDERS = ("--run-dir", "/run/second", "--cni-conf-dir=", "--cni-bin-dir=")


def second(lab: Lab, what: str, *options: str, prefix: tuple[str, ...] = ()) -> tuple[int, list[str]]:
    """Another agent (or operator) that ends by itself: its exit status (124 if it doesn't) and what it said."""
    folders = FOLDERS if what == "agent" else ()
    argv = [*prefix, "timeout", "60", sys.executable, "-m", f"fimbria.{what}", *folders, *options]
    done = lab.run("node/node1", *argv)
    return done.returncode, [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]


def waiting(lab: Lab, words: str, *options: str) -> list[str]:
    """Another agent that says these words and waits on, for two more seconds: the lines with them."""
    argv = lab.argv("node/node1", sys.executable, "-m", "fimbria.agent", *FOLDERS, *options)
    with tempfile.TemporaryDirectory(prefix="fim") as folder:
        path = Path(folder, "said")
        with path.open("wb") as out:
            process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env=components.ENVIRONMENT)
        try:
            lab.wait(f"it says {words!r}", lambda: words in path.read_text() or process.poll() is not None, 60)
            time.sleep(2)  # it tries again every second
            assert process.poll() is None, path.read_text()
        finally:
            process.terminate()
            process.wait(20)
        return [line for line in path.read_text().splitlines() if words in line]


def kubeconfig(lab: Lab) -> str:
    return str(lab.paths.kubeconfig)


@pytest.mark.parametrize(("options", "code", "said"), [
    (("--node-name", "node1", "--kubeconfig", "/nowhere"), 1, "/nowhere"),
    (("--kubeconfig", "/nowhere"), 2, "--node-name is not set"),
    (("--node-name", "node1", "--routing", "teleport"), 2, "--routing 'teleport': overlay or native"),
    (("--node-name", "node1", "--bpffs", "/mnt"), 1, "mount -t bpf bpf /mnt"),
    (("--node-name", "node1", "--kubeconfig", "/etc/passwd"), 1, "/etc/passwd"),
])  # fmt: skip
def test_an_agent_that_cannot_start(lab: Lab, options: tuple[str, ...], code: int, said: str) -> None:
    found, lines = second(lab, "agent", *options)
    assert found == code, lines
    assert len(lines) == 1 and said in lines[0], lines


def test_an_agent_without_capabilities(lab: Lab) -> None:
    code, lines = second(lab, "agent", "--node-name", "node1", prefix=("setpriv", "--bounding-set", "-all"))
    assert code == 1, lines
    assert [line.split(" is missing")[0] for line in lines] == [
        "fimbria agent: CAP_SYS_ADMIN",
        "fimbria agent: CAP_NET_ADMIN",
    ]


def test_an_agent_whose_node_does_not_exist(lab: Lab) -> None:
    """It waits, for the kubelet may register the Node a little later."""
    lines = waiting(lab, "Node nobody does not exist yet", "--node-name", "nobody", "--kubeconfig", kubeconfig(lab))
    assert len(lines) == 1, lines


def test_an_agent_whose_api_server_does_not_answer(lab: Lab) -> None:
    text = lab.paths.kubeconfig.read_text()
    target = lab.paths.state / "kubeconfig.unreachable"
    target.write_text(text.replace(f"{lab.spec.control.ipv4}:6443", "127.0.0.1:1"))
    words = "waiting for this node's addresses"
    lines = waiting(lab, words, "--node-name", "nobody", "--kubeconfig", str(target))
    assert len(lines) == 1 and "127.0.0.1:1" in lines[0], lines


@pytest.mark.parametrize(("options", "code", "said"), [
    (("--kubeconfig", "/nowhere"), 1, "/nowhere"),
    (("--ipv4-pool", "10.0.0.0/33"), 2, "10.0.0.0/33"),
    (("--ipv4-pool", "10.0.0.0/16,10.0.4.0/22"), 2, "10.0.4.0/22"),
    (("--ipv4-pool", "", "--ipv6-pool", ""), 2, "neither --ipv4-pool nor --ipv6-pool is set"),
])  # fmt: skip
def test_an_operator_that_cannot_start(lab: Lab, options: tuple[str, ...], code: int, said: str) -> None:
    found, lines = second(lab, "operator", *options)
    assert found == code, lines
    assert said in lines[-1] and not any("Traceback" in line for line in lines), lines


def test_a_missing_cgroup(lab: Lab) -> None:
    """Services aren't translated at the socket then; everything else works, and the status says what is missing."""
    with Traffic(lab):
        set_options(lab, "cgroup=/sys/fs/cgroup/nowhere")
        lab.kill("node1/agent")
        lab.restart("node1/agent")
        set_options(lab)
        lab.wait("it is ready", lambda: ready(lab, "node1"))
    failures = lab.wait("it says so", lambda: agent(lab, "node1", "status")["failures"].get("socket_links"))
    assert any("/sys/fs/cgroup/nowhere" in f for f in failures), failures
    assert all(lab.probe("client", "tcp", a, 9000)["result"] == "ok" for a in cluster_ips(lab)), "by packet"
    lab.kill("node1/agent")
    lab.restart("node1/agent")
    wait_settled(lab)


def test_a_second_agent_on_the_same_node(lab: Lab) -> None:
    """Refused: two would undo each other's work."""
    options = ("--node-name", "node1", "--kubeconfig", kubeconfig(lab), "--run-dir", "/run/fimbria")
    code, lines = second(lab, "agent", *options)
    assert code == 1 and len(lines) == 1 and "another agent is running with /run/fimbria" in lines[0], lines
    assert ready(lab, "node1")


def test_nothing_of_all_this_touched_the_first(lab: Lab) -> None:
    assert subprocess.run(lab.argv("node/node1", "test", "-S", "/run/fimbria/cni.sock"), check=False).returncode == 0
    wait_settled(lab)
    with Traffic(lab):
        wait_settled(lab)
