"""Agents come back with other BPF objects, whose maps look different, and go back again: traffic doesn't notice.

The other version is built from our own sources with a few lines changed, so that no field is missing in either.
"""

import importlib.util
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from traffic import UDP, Traffic, agent, pod, set_options, start_pods, wait_settled

from fimbria.lab import kernel
from fimbria.lab.handle import Lab

BPF = Path(__file__).parents[2] / "bpf"
CLOSED = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: servers}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: nobody-calls-the-client}
spec:
  podSelector: {matchLabels: {app: client}}
  policyTypes: [Ingress]
"""
# Nanoseconds that a connection in use has left at least; one of UDP that is answered starts with three minutes.
FRESH = 100 * 10**9
# Derived maps change their layout and size; what connections are remembered in changes its size, by a setting.
CHANGES = (
    ("types/endpoint.h", "\t__u32 policy_set;", "\t__u32 flags;\n\t__u32 policy_set;"),
    ("types/endpoint.h", "\t__u32 flags;         /* enum endpoint_flag */\n", ""),
    ("maps/endpoint.h", "__uint(max_entries, 4096);", "__uint(max_entries, 2048);"),
)


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(nodes=2)
    start_pods(lab)
    lab.apply(CLOSED)
    return lab


@pytest.fixture(scope="module")
def other_version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH: our package, with BPF objects of its own."""
    root = tmp_path_factory.mktemp("version")
    shutil.copytree(BPF, root / "bpf")
    for name, old, new in CHANGES:
        path = root / "bpf" / name
        text = path.read_text()
        assert old in text, f"{name} has changed: change this test"
        path.write_text(text.replace(old, new, 1))
    package = root / "path" / "fimbria"
    package.mkdir(parents=True)
    spec = importlib.util.find_spec("fimbria")
    assert spec is not None and spec.origin is not None
    for path in Path(spec.origin).parent.iterdir():
        if path.name not in ("_bpf", "__pycache__"):
            (package / path.name).symlink_to(path)
    subprocess.run(["make", "-s", "-C", root / "bpf", f"OUT={package / '_bpf'}"], check=True)
    return root / "path"


def restart(lab: Lab, *options: str) -> None:
    """With settings; what the kernel remembered before is remembered afterwards."""
    before = {node: remembered(lab, node) for node in lab.spec.node_names}
    set_options(lab, *options)
    for node in lab.spec.node_names:
        lab.kill(f"{node}/agent")
        lab.restart(f"{node}/agent")
    wait_settled(lab)
    for node, rows in before.items():
        assert rows, "there is traffic"
        lost = rows - remembered(lab, node)
        assert not lost, f"{node} forgot {len(lost)} of {len(rows)}: {list(lost)[:3]}"


def remembered(lab: Lab, node: str) -> set[str]:
    """Keys of the streams over UDP, which never end by themselves, and of what of them is masqueraded."""
    fresh = time.monotonic_ns() + FRESH  # not what probes left behind, which may expire at any moment
    rows = [r for r in agent(lab, node, "maps/conntrack") if r["value"]["expires"] > fresh]
    rows += agent(lab, node, "maps/nat")
    keys = [row["key"] for row in rows]
    ports = ("local_port", "remote_port", "sport", "dport")
    return {json.dumps(k, sort_keys=True) for k in keys if k["proto"] == 17 and UDP in map(k.get, ports)}


def test_upgrade_and_back(lab: Lab, other_version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = kernel.binary("labtool")
    echo = lab.start("node/world", tool, "serve", "--udp", str(UDP), "--tcp", "9000")
    try:
        with Traffic(lab):
            # Masqueraded, so its answers come back only by what the kernel remembers.
            out = lab.start("client", tool, "stream", "udp", lab.spec.world.ipv4, str(UDP), "--interval", "20000")
            with monkeypatch.context() as patch:
                patch.setenv("PYTHONPATH", str(other_version))
                restart(lab, "conntrack-entries=65536", "nat-entries=32768")
            for node in lab.spec.node_names:
                assert "of a former version" in lab.process_log(f"{node}/agent")
            restart(lab)
            out.send_signal(signal.SIGTERM)
            outcome = json.loads(out.communicate(timeout=10)[0].splitlines()[-1])
            assert outcome["ok"] and outcome["sent"] > 20, outcome
    finally:
        echo.terminate()
        echo.communicate(timeout=10)
    lab.apply(pod("stranger", "node1", sleeps=True))
    lab.wait_ready(["stranger"])
    for name in ("near", "far"):
        for address in lab.addresses(name):
            assert lab.probe("client", "udp", address, UDP)["result"] == "ok"
            assert lab.probe("stranger", "udp", address, UDP, "--timeout", "300")["result"] != "ok"
