"""The installed plugin on a node of the real cluster, driven by libcni's own `cnitool` and, where that says less than
the specification, by the letter of CNI 1.1.0: https://www.cni.dev/docs/spec/, sections 2 and 5."""

from __future__ import annotations

import importlib.util
import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.cluster.bed import BedError, Cluster

NODE = "node1"
NETWORK = "fimbria"
VERSION = "1.1.0"
PLUGINS, CONFIGURATION = "/opt/cni/bin", "/etc/cni/net.d"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fimbria_cluster_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cnitool() -> Path:
    tool: Path = _load(Path(__file__).resolve().parents[1] / "cni/build.py").ensure()
    return tool


class Sandbox:
    """A network namespace on a node, as a runtime makes one before it calls plugins."""

    def __init__(self, cluster: Cluster, tool: Path) -> None:
        self.name = f"fimct-{secrets.token_hex(3)}"
        self.path = f"/run/netns/{self.name}"
        self.node = cluster.node(NODE)
        # what the node sees of the machine's file system needn't include our cache
        self.tool = f"/run/{self.name}-cnitool"
        self._copy(tool)
        self.node.exec(["ip", "netns", "add", self.name])

    def _copy(self, tool: Path) -> None:
        with tool.open("rb") as data:
            done = subprocess.run(
                [*self.node.host.enter(), "--", "install", "-m", "0755", "/dev/stdin", self.tool],
                stdin=data,
                capture_output=True,
                check=False,
            )
        assert done.returncode == 0, done.stderr

    def call(self, command: str) -> str:
        """libcni with the node's own configuration. Raises BedError."""
        env = [f"CNI_PATH={PLUGINS}", f"NETCONFPATH={CONFIGURATION}"]
        return self.node.exec(["env", *env, self.tool, command, NETWORK, self.path])

    def inside(self, *command: str) -> str:
        return self.node.exec(["ip", "netns", "exec", self.name, *command])

    def addresses(self) -> set[str]:
        links = json.loads(self.inside("ip", "-j", "addr", "show", "scope", "global"))
        return {f"{a['local']}/{a['prefixlen']}" for link in links for a in link["addr_info"] if a}

    def interfaces(self) -> dict[str, str]:
        return {link["ifname"]: link["address"] for link in json.loads(self.inside("ip", "-j", "link"))}

    def close(self) -> None:
        try:
            self.call("del")
        finally:
            self.node.exec(["sh", "-c", f"ip netns del {self.name}; rm -f {self.tool}"])


@pytest.fixture
def sandbox(cluster: Cluster, cnitool: Path) -> Iterator[Sandbox]:
    made = Sandbox(cluster, cnitool)
    yield made
    made.close()


def plugin(cluster: Cluster, command: str, config: dict[str, Any], **parameters: str) -> tuple[int, Any]:
    """The program itself: its exit status, and its answer if it gave one."""
    env = [f"{key}={value}" for key, value in {"CNI_COMMAND": command, "CNI_PATH": PLUGINS, **parameters}.items()]
    child = cluster.node(NODE).popen(
        ["env", *env, f"{PLUGINS}/fimbria-cni"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, _ = child.communicate(json.dumps(config), timeout=60)
    return child.returncode, json.loads(out) if out else None


def config(**more: Any) -> dict[str, Any]:
    return {"cniVersion": VERSION, "name": NETWORK, "type": "fimbria-cni", **more}


def pod_ranges(cluster: Cluster, node: str) -> list[Any]:
    return [ip_network(text) for text in cluster.get("ciliumnode", node)["spec"]["ipam"]["podCIDRs"]]


def test_version(cluster: Cluster) -> None:
    """Section 2, VERSION: the answer has the request's cniVersion, and the list of what is supported."""
    status, answer = plugin(cluster, "VERSION", {"cniVersion": VERSION})
    assert status == 0 and answer["cniVersion"] == VERSION
    assert {"1.0.0", "1.1.0"} <= set(answer["supportedVersions"])


def test_status(cluster: Cluster, sandbox: Sandbox) -> None:
    """Section 2, STATUS: exit status 0 and no output means ready for ADD."""
    assert sandbox.call("status") == ""
    assert plugin(cluster, "STATUS", config()) == (0, None)


def test_add_check_del(cluster: Cluster, sandbox: Sandbox) -> None:
    """Sections 2 and 5: the result describes what is there; CHECK notices when it isn't; DEL may be called twice."""
    result = json.loads(sandbox.call("add"))
    assert result["cniVersion"] == VERSION
    inside = {i["name"]: i for i in result["interfaces"] if i.get("sandbox")}
    assert {name: i["mac"] for name, i in inside.items()}.items() <= sandbox.interfaces().items()
    assert all(i["sandbox"] == sandbox.path for i in inside.values())
    for ip in result["ips"]:
        assert result["interfaces"][ip["interface"]]["name"] in inside
        assert any(ip_interface(ip["address"]).ip in block for block in pod_ranges(cluster, NODE))
    assert {ip["address"] for ip in result["ips"]} == sandbox.addresses()
    assert {ip_interface(ip["address"]).version for ip in result["ips"]} == {4, 6}
    assert {route["dst"] for route in result["routes"]} >= {"0.0.0.0/0", "::/0"}

    assert sandbox.call("check") == ""
    with pytest.raises(BedError, match="eth0"):
        sandbox.call("add")  # the same attachment twice without a DEL
    assert sandbox.call("check") == ""

    sandbox.inside("ip", "addr", "flush", "dev", "eth0", "scope", "global")
    with pytest.raises(BedError, match="is gone"):
        sandbox.call("check")
    assert sandbox.call("del") == ""
    assert sandbox.interfaces().keys() == {"lo"}
    assert sandbox.call("del") == ""


def test_the_attachment_reaches_the_cluster(cluster: Cluster, sandbox: Sandbox) -> None:
    """A pod on another node, both families, and a Service; and it is forgotten after DEL."""
    result = json.loads(sandbox.call("add"))
    peers = cluster.get("pods", "-n", "kube-system", "-l", "k8s-app=kube-dns")["items"]
    peer = next(p for p in peers if p["spec"]["nodeName"] != NODE)
    targets = [one["ip"] for one in peer["status"]["podIPs"]]
    service = cluster.get("service", "-n", "kube-system", "kube-dns")["spec"]["clusterIPs"]
    assert {ip_address(t).version for t in targets} == {ip_address(t).version for t in service} == {4, 6}
    for address in (*targets, *service):
        code = f"import socket; socket.create_connection(({address!r}, 53), 5).close()"
        sandbox.inside("/usr/bin/python3", "-c", code)
    own = str(ip_interface(result["ips"][0]["address"]).ip)
    assert own in routed(cluster)
    sandbox.call("del")
    assert own not in routed(cluster)


def routed(cluster: Cluster) -> set[str]:
    """Destinations of our IPv4 routes on the node."""
    listed = cluster.node(NODE).exec(["ip", "-j", "route", "show", "proto", "241"])
    return {route["dst"] for route in json.loads(listed)}


def test_del_without_the_namespace(cluster: Cluster, sandbox: Sandbox) -> None:
    """Section 2, DEL: "should complete without error even if some resources are missing"."""
    container = f"fimct-{secrets.token_hex(6)}"
    ids = {"CNI_CONTAINERID": container, "CNI_IFNAME": "eth0"}
    status, result = plugin(cluster, "ADD", config(), CNI_NETNS=sandbox.path, **ids)
    assert status == 0, result
    assert plugin(cluster, "CHECK", config(prevResult=result), CNI_NETNS=sandbox.path, **ids) == (0, None)
    assert plugin(cluster, "DEL", config(prevResult=result), CNI_NETNS="", **ids) == (0, None)
    assert plugin(cluster, "DEL", config(), **ids) == (0, None)
    status, answer = plugin(cluster, "CHECK", config(prevResult=result), CNI_NETNS=sandbox.path, **ids)
    assert status != 0 and answer["cniVersion"] == VERSION and answer["code"] and answer["msg"]


def test_gc_takes_what_nobody_names(cluster: Cluster, cnitool: Path, sandbox: Sandbox) -> None:
    """Section 2, GC: attachments to this network that the runtime doesn't name may go; those it names stay, and those
    to other networks, as the node's pods have them."""
    network, other = f"fimct-{secrets.token_hex(3)}", Sandbox(cluster, cnitool)
    try:
        names = {box: {"containerID": f"fimct-{secrets.token_hex(6)}", "ifname": "eth0"} for box in (sandbox, other)}
        for box, one in names.items():
            ids = {"CNI_CONTAINERID": one["containerID"], "CNI_IFNAME": one["ifname"], "CNI_NETNS": box.path}
            status, result = plugin(cluster, "ADD", config(name=network), **ids)
            assert status == 0, result

        def collect(name: str, valid: list[dict[str, str]]) -> set[Sandbox]:
            """Who is attached after a GC."""
            assert plugin(cluster, "GC", config(name=name, **{"cni.dev/valid-attachments": valid})) == (0, None)
            return {box for box in names if "eth0" in box.interfaces()}

        assert collect(network, list(names.values())) == {sandbox, other}
        assert collect("fimct-another", []) == {sandbox, other}
        assert collect(network, [names[other]]) == {other}
        assert collect(network, []) == set()
        status, answer = plugin(cluster, "GC", config(name=network))
        assert status != 0 and "valid-attachments" in answer["msg"]
    finally:
        other.close()


@pytest.mark.parametrize(
    ("command", "changed", "parameters", "code"),
    [
        ("ADD", {"cniVersion": "9.9.9"}, {}, 1),
        ("ADD", {"runtimeConfig": {"bandwidth": {"ingressRate": 1}}}, {}, 2),
        ("ADD", {}, {"CNI_CONTAINERID": ""}, 4),
        ("ADD", {}, {"CNI_IFNAME": "a/b"}, 4),
        ("ADD", {}, {"CNI_NETNS": "/run/netns/fimct-none"}, 4),
        ("CHECK", {}, {}, 3),
    ],
)
def test_errors_have_the_codes_of_the_specification(
    cluster: Cluster, sandbox: Sandbox, command: str, changed: dict[str, Any], parameters: dict[str, str], code: int
) -> None:
    """Section 5, Error: 1 incompatible version, 2 unsupported field, 3 unknown container, 4 invalid environment."""
    ids = {"CNI_CONTAINERID": "fimct-errors", "CNI_IFNAME": "eth0", "CNI_NETNS": sandbox.path} | parameters
    status, answer = plugin(cluster, command, config() | changed, **ids)
    assert status != 0 and answer["code"] == code, answer
    assert answer["msg"] and "cniVersion" in answer
    assert sandbox.interfaces().keys() == {"lo"}
