"""The lab with the real agents, operator and controllers: pods reach each other, processes can be ended and started."""

import importlib.util
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fimbria.lab import cluster, kernel
from fimbria.lab.errors import LabError
from fimbria.lab.handle import Lab
from fimbria.lab.layout import LabSpec

APP = """
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: main, image: fimbria/labtool, readinessProbe: {tcpSocket: {port: 9000}}}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  nodeName: node1
  terminationGracePeriodSeconds: 1
  containers: [{name: main, image: fimbria/labtool, command: [labtool, sleep]}]
"""


def start_app(lab: Lab) -> list[str]:
    """Names of the web pods, all Ready."""
    lab.apply(APP)

    def web() -> list[str]:
        pods = lab.request("GET", "/api/v1/namespaces/default/pods", labelSelector="app=web")["items"]
        return [p["metadata"]["name"] for p in pods] if len(pods) == 3 else []

    names = lab.wait("three web pods", web)
    lab.wait_ready([*names, "client"])
    return names


@pytest.fixture(scope="module")
def real_kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real kube-apiserver over etcd (built once, see tests/kube)."""
    path = Path(__file__).parent.parent / "kube" / "realserver.py"
    spec = importlib.util.spec_from_file_location("fimbria_lab_realserver", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    with module.real_apiserver(tmp_path_factory.mktemp("kube")) as kubeconfig:
        yield str(kubeconfig)


@pytest.mark.parametrize("server", ["embedded", "real"])
@pytest.mark.parametrize("routing", ["overlay", "native"])
def test_pods_and_services_across_nodes(
    lab_name: str, request: pytest.FixtureRequest, routing: str, server: str
) -> None:
    kubeconfig = request.getfixturevalue("real_kubeconfig") if server == "real" else ""
    cluster.up(LabSpec(name=lab_name, routing=routing, kubeconfig=kubeconfig, controllers=True))
    lab = Lab(lab_name)
    names = start_app(lab)
    nodes = {lab.pod(n)["spec"]["nodeName"] for n in names}
    assert len(nodes) > 1, "the controllers spread pods"
    for name in names:
        for address in lab.addresses(name):
            answer = lab.probe("client", "http", address, 8080)
            assert answer["result"] == "ok", (routing, address, answer)
            assert answer["answer"]["name"] == name
            assert any(own in answer["answer"]["peer"] for own in lab.addresses("client")), (
                "pods see each other's own address"
            )
    service = lab.request("GET", "/api/v1/namespaces/default/services/web")["spec"]["clusterIP"]
    seen = lab.wait("all backends", lambda: _backends(lab, service) == set(names) and names)
    assert seen
    for address in (lab.spec.world.ipv4, lab.spec.world.ipv6):
        assert lab.probe("client", "icmp", address)["result"] == "ok", "masqueraded, so the world can answer"
    lab.delete(APP)
    lab.wait("all pods are gone", lambda: not lab.request("GET", "/api/v1/namespaces/default/pods")["items"])


def _backends(lab: Lab, service: str) -> set[str]:
    tool = kernel.binary("labtool")
    lines = lab.run("client", tool, "probe", "http", service, "80", "--count", "30").stdout.splitlines()
    return {json.loads(line).get("answer", {}).get("name") for line in lines}


def test_processes_killed_under_traffic(agent_lab: Lab) -> None:
    lab = agent_lab
    names = start_app(lab)
    far = next(n for n in names if lab.pod(n)["spec"]["nodeName"] != "node1")
    where = lab.pod(far)["spec"]["nodeName"]
    options = ("--seconds", "60", "--stall", "1000")
    tool, address = kernel.binary("labtool"), lab.addresses(far)[0]
    streams = [lab.start("client", tool, "stream", "tcp", address, "9000", *options),
               lab.start("client", tool, "stream", "udp", address, "9001", *options)]  # fmt: skip
    for process in ("control/operator", "control/apiserver", "node1/agent", f"{where}/agent", "node1/runner"):
        lab.kill(process, signal.SIGKILL)
    for process in ("control/apiserver", "control/operator", "node1/agent", f"{where}/agent", "node1/runner"):
        lab.restart(process)
    lab.wait("everything runs and is ready", lambda: cluster.status(lab.spec.name)["healthy"], 60)
    for stream in streams:
        stream.send_signal(signal.SIGTERM)
        out, _ = stream.communicate(timeout=20)
        assert json.loads(out.splitlines()[-1])["ok"] is True, out


def test_a_node_that_boots_again(agent_lab: Lab) -> None:
    lab = agent_lab
    names = start_app(lab)
    lab.kill("node1/init")
    lab.wait("every process of the node is gone", lambda: not _running(lab, "node1/"))
    lab.restart("node1/init")
    lab.wait("everything runs and is ready", lambda: cluster.status(lab.spec.name)["healthy"], 60)
    lab.wait("the client runs again and reaches all", lambda: _reaches(lab, "client", names), 60)


def _running(lab: Lab, prefix: str) -> list[str]:
    processes = cluster.status(lab.spec.name)["processes"]
    return [p["name"] for p in processes if p["running"] and p["name"].startswith(prefix)]


def _reaches(lab: Lab, source: str, names: list[str]) -> bool:
    try:
        addresses = [a for name in names for a in lab.addresses(name)]
        return all(lab.probe(source, "http", a, 8080, "--timeout", "300")["result"] == "ok" for a in addresses)
    except LabError:
        return False  # its container isn't running yet
