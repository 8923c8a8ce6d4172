"""The CNI plugin on a node as container runtimes use it: its binary executed by hand, and through libcni by cnitool."""

import importlib.util
import ipaddress
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from traffic import agent, node_root, ready, wait_settled

from conftest import MakeLab
from fimbria.kernel.bpf import AttachType, prog_info, program_by_id, query_device
from fimbria.lab import cluster, components, kernel, state
from fimbria.lab.handle import Lab
from fimbria.lab.layout import LabSpec

HERE = Path(__file__).parent
NODE = "node1"
PLUGIN = "/opt/cni/bin/fimbria-cni"
CONF = {"cniVersion": "1.1.0", "name": "fimbria", "type": "fimbria-cni"}
MTU = 1450
Answer = tuple[int, Any]


class Box:
    """An attachment of a container that is no Kubernetes pod: its namespace, and the plugin's operations on it."""

    def __init__(self, lab: Lab, container: str = "") -> None:
        self.lab = lab
        self.container = container or f"fimtest{secrets.token_hex(4)}"
        self.netns = f"/run/netns/{self.container}"
        self.used: set[str] = set()
        self.node("ip", "netns", "add", self.container)

    def node(self, *command: str) -> str:
        done = self.lab.run(f"node/{NODE}", *command)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout

    def inside(self, *command: str) -> str:
        return self.node("ip", "netns", "exec", self.container, *command)

    def ip(self, *args: str) -> list[dict[str, Any]]:
        return json.loads(self.inside("ip", "-j", *args) or "[]")

    def call(
        self, command: str, ifname: str = "eth0", conf: Any = None, netns: str | None = None, args: str = ""
    ) -> Answer:
        """Exit status and answer (None for empty)."""
        self.used.add(ifname)
        netns = self.netns if netns is None else netns
        return call(self.lab, command, conf, CNI_CONTAINERID=self.container, CNI_NETNS=netns, CNI_IFNAME=ifname,
                    CNI_ARGS=args)  # fmt: skip

    def add(self, ifname: str = "eth0", **conf: Any) -> dict[str, Any]:
        status, result = self.call("ADD", ifname, CONF | conf)
        assert status == 0, result
        assert isinstance(result, dict)
        return result

    def check(self, result: dict[str, Any], ifname: str = "eth0") -> Answer:
        return self.call("CHECK", ifname, CONF | {"prevResult": result})

    def delete_netns(self) -> None:
        self.lab.run(f"node/{NODE}", "ip", "netns", "del", self.container)

    def close(self) -> None:
        for ifname in self.used:
            self.call("DEL", ifname)
        self.delete_netns()


def call(lab: Lab, command: str, conf: Any = None, **env: str) -> Answer:
    stdin = json.dumps(CONF if conf is None else conf)
    variables = [f"{k}={v}" for k, v in {"CNI_COMMAND": command, **env}.items()]
    done = lab.run(f"node/{NODE}", "env", *variables, PLUGIN, stdin=stdin)
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout) if done.stdout else None


def error(answer: Answer) -> tuple[int, str]:
    """Code and words of an error answer."""
    status, body = answer
    assert status == 1, body
    assert body.keys() == {"cniVersion", "code", "msg", "details"}
    return body["code"], f"{body['msg']}: {body['details']}"


def inventory(lab: Lab) -> dict[str, Any]:
    """Everything an attachment leaves on a node while it exists."""
    root = node_root(lab, NODE)
    run = lab.run(f"node/{NODE}", "bash", "-c", (
        "ip -j link; ip -j route show proto 241; ip -6 -j route show proto 241; ls /sys/fs/bpf/fimbria/links"
    )).stdout.splitlines()  # fmt: skip
    init = state.recall(lab.paths, f"{NODE}/agent")
    assert init is not None
    return {
        "links": {row["ifname"] for row in json.loads(run[0]) if row["ifname"].startswith("fim")},
        "routes": {r["dst"] for line in run[1:3] for r in json.loads(line)},
        "pins": set(run[3:]),
        "endpoints": {e["id"] for e in agent(lab, NODE, "endpoints")},
        "journal": set(os.listdir(root / "run/fimbria/state/endpoints")),
        "descriptors": descriptors(init.pid),
    }


def descriptors(pid: int) -> int:
    """Open descriptors of a process, except connections to the API server and of those who ask the agent for its state:
    these come and go."""
    net = Path(f"/proc/{pid}/net")
    visitors = {row.split()[9] for table in ("tcp", "tcp6") for row in (net / table).read_text().splitlines()[1:]}
    visitors |= {row.split()[6] for row in (net / "unix").read_text().splitlines() if row.endswith("/agent.sock")}
    found = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/{pid}/fd/{name}").removeprefix("socket:[").rstrip("]") not in visitors
    return found


def steady_inventory(lab: Lab) -> dict[str, Any]:
    """What is there at two looks in a row: an agent has a file open for a moment now and then."""
    last: dict[str, Any] = {}

    def look() -> bool:
        nonlocal last
        before, last = last, inventory(lab)
        return before == last

    lab.wait("nothing changes", look)
    return last


def nothing_left(lab: Lab, before: dict[str, Any]) -> None:
    """Interfaces are removed in the background, so with a little patience."""
    deadline = time.monotonic() + 30
    while (now := inventory(lab)) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert now == before


@pytest.fixture(scope="module")
def lab(make_lab: MakeLab) -> Lab:
    return make_lab(nodes=1)


@pytest.fixture
def clean(lab: Lab) -> Iterator[None]:
    """What a test adds, it must have removed."""
    wait_settled(lab)
    before = steady_inventory(lab)
    yield
    nothing_left(lab, before)


@pytest.fixture
def box(lab: Lab, clean: None) -> Iterator[Box]:
    one = Box(lab)
    yield one
    one.close()


# --- ADD ---------------------------------------------------------------------------------------------------------


def _as_reported(box: Box, result: dict[str, Any], ifname: str = "eth0", mtu: int = MTU) -> None:
    """Interfaces, addresses, gateways and routes are in the namespace as the result says, and no others."""
    host, pod = result["interfaces"]
    (device,) = box.ip("addr", "show", "dev", ifname)
    assert (pod["name"], pod["mac"], pod["mtu"], pod["sandbox"]) == (ifname, device["address"], mtu, box.netns)
    assert device["mtu"] == mtu
    assert "UP" in device["flags"]
    (outside,) = json.loads(box.node("ip", "-j", "link", "show", "dev", host["name"]))
    assert (host["mac"], host["mtu"], host.get("sandbox", "")) == (outside["address"], outside["mtu"], "")
    addresses = {f"{a['local']}/{a['prefixlen']}" for a in device["addr_info"] if a["scope"] == "global"}
    assert {ip["address"] for ip in result["ips"]} == addresses
    assert {ip["interface"] for ip in result["ips"]} == {1}
    there = {}
    for family in ("-4", "-6"):
        for route in box.ip(family, "route", "show", "dev", ifname):
            if route["dst"] == "default":
                there["0.0.0.0/0" if family == "-4" else "::/0"] = (route["gateway"], route["metrics"][0]["mtu"])
    assert {r["dst"]: (r["gw"], r["mtu"]) for r in result["routes"]} == there
    assert {ip["gateway"] for ip in result["ips"]} == {gateway for gateway, _ in there.values()}


def test_add_check_del(lab: Lab, box: Box) -> None:
    result = box.add()
    assert result["cniVersion"] == "1.1.0"
    assert len(result["ips"]) == 2
    _as_reported(box, result)
    assert box.check(result) == (0, None)
    assert box.call("DEL", conf=CONF | {"prevResult": result}) == (0, None)
    assert error(box.check(result))[0] == 3


def test_a_container_that_is_no_pod_has_the_identity_init(lab: Lab, box: Box) -> None:
    result = box.add()
    addresses = {ip["address"].split("/")[0] for ip in result["ips"]}
    (endpoint,) = [e for e in agent(lab, NODE, "endpoints") if box.container[:12] in json.dumps(e)]
    assert endpoint["identity"] == 5
    assert addresses <= set(json.dumps(endpoint).split('"'))
    box.inside("ping", "-c1", "-W2", result["ips"][0]["gateway"])


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0", "1.0.0"])
def test_older_versions(box: Box, version: str) -> None:
    result = box.add(cniVersion=version)
    assert result["cniVersion"] == version
    assert ("version" in result["ips"][0]) == version.startswith("0.")
    checked = box.call("CHECK", conf=CONF | {"cniVersion": version, "prevResult": result})
    assert checked == (0, None) if version in ("0.4.0", "1.0.0") else error(checked)[0] == 1
    assert box.call("DEL", conf=CONF | {"cniVersion": version}) == (0, None)


def test_add_twice_is_an_error_and_harms_nothing(lab: Lab, box: Box) -> None:
    result = box.add()
    code, text = error(box.call("ADD"))
    assert code == 100
    assert "eth0" in text
    _as_reported(box, result)
    assert box.check(result) == (0, None)


def test_two_interfaces_of_one_container(box: Box) -> None:
    first, second = box.add("eth0"), box.add("net1")
    assert not {i["address"] for i in first["ips"]} & {i["address"] for i in second["ips"]}
    assert {d["ifname"] for d in box.ip("link")} == {"lo", "eth0", "net1"}
    assert box.call("DEL", "eth0") == (0, None)
    assert {d["ifname"] for d in box.ip("link")} >= {"lo", "net1"}
    assert box.check(second, "net1") == (0, None)


def test_an_interface_of_that_name_is_somebody_elses(lab: Lab, box: Box) -> None:
    """ADD fails, and neither its clean-up nor a DEL touches what isn't ours."""
    box.inside("ip", "link", "add", "eth0", "type", "bridge")
    (before,) = box.ip("link", "show", "dev", "eth0")
    code, text = error(box.call("ADD"))
    assert code == 100
    assert box.container[:12] in text
    assert box.call("DEL") == (0, None)
    assert box.ip("link", "show", "dev", "eth0") == [before]
    assert error(box.call("ADD", "lo"))[0] == 100
    assert box.call("DEL", "lo") == (0, None)
    assert {d["ifname"] for d in box.ip("link")} == {"lo", "eth0"}


def test_del_of_an_unknown_attachment_leaves_the_containers_own_interface(box: Box) -> None:
    box.inside("ip", "link", "add", "eth0", "type", "bridge")
    assert box.call("DEL") == (0, None)
    assert "eth0" in {d["ifname"] for d in box.ip("link")}


@pytest.mark.parametrize("path", ["/etc/passwd", "/dev/null", "/proc/self/ns/uts", "/run/netns/gone", "", "/run"])
def test_add_into_what_is_no_namespace(box: Box, path: str) -> None:
    code, text = error(box.call("ADD", netns=path))
    assert code == 4
    assert "CNI_NETNS" in text


def test_add_into_the_nodes_own_namespace(box: Box) -> None:
    code, text = error(box.call("ADD", "fimx0", netns="/proc/1/ns/net"))
    assert code == 4
    assert "the node's own" in text


def test_namespaces_by_process_and_by_bind_mount(lab: Lab, box: Box) -> None:
    holder = lab.start(f"node/{NODE}", "ip", "netns", "exec", box.container, "sleep", "60")
    try:
        pid = lab.wait("the process", lambda: box.node("ip", "netns", "pids", box.container).split())[0]
        status, result = box.call("ADD", netns=f"/proc/{pid}/ns/net")
        assert status == 0, result
        assert result["interfaces"][1]["sandbox"] == f"/proc/{pid}/ns/net"
        assert "eth0" in {d["ifname"] for d in box.ip("link")}
        assert box.call("DEL", netns=f"/proc/{pid}/ns/net") == (0, None)
    finally:
        holder.kill()
        holder.communicate()
    elsewhere = f"/run/{box.container}.bound"
    box.node("touch", elsewhere)
    box.node("mount", "--bind", box.netns, elsewhere)
    try:
        assert box.call("ADD", netns=elsewhere)[0] == 0
    finally:
        box.node("umount", elsewhere)
        box.node("rm", elsewhere)


def mapped(*rows: dict[str, Any]) -> dict[str, Any]:
    return CONF | {"runtimeConfig": {"portMappings": list(rows)}}


def frontends(lab: Lab, port: int) -> set[str]:
    rows = agent(lab, NODE, "maps/frontends")
    return {r["key"]["addr"] for r in rows if r["key"]["port"] == port}


def test_host_ports_come_and_go_with_their_attachment(box: Box, lab: Lab) -> None:
    mapping = {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}
    status, result = box.call("ADD", conf=mapped(mapping))
    assert status == 0, result
    assert box.call("CHECK", conf=mapped(mapping) | {"prevResult": result}) == (0, None)
    code, text = error(box.call("CHECK", conf=mapped(mapping | {"hostPort": 8081}) | {"prevResult": result}))
    assert code == 101 and "portMappings" in text
    spec = lab.spec.node(NODE)
    assert {spec.ipv4, spec.ipv6, "127.0.0.1", "::1"} <= frontends(lab, 8080)
    assert box.call("DEL", conf=mapped(mapping)) == (0, None)
    assert frontends(lab, 8080) == set()


def test_a_host_port_that_can_not_be_had_is_refused_by_name(box: Box, lab: Lab) -> None:
    mapping = {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}
    assert box.call("ADD", conf=mapped(mapping))[0] == 0
    other = Box(lab)
    try:
        code, text = error(other.call("ADD", conf=mapped(mapping | {"hostIP": "127.0.0.1"})))
        assert code == 103
        assert "host port 127.0.0.1 8080/TCP belongs to container" in text
        code, text = error(other.call("ADD", conf=mapped(mapping | {"hostPort": 1, "hostIP": "8.8.8.8"})))
        assert code == 103 and "no address 8.8.8.8" in text
        code, text = error(other.call("ADD", conf=mapped(mapping | {"hostPort": 8472, "protocol": "udp"})))
        assert code == 103 and "--overlay-port" in text
        assert error(other.call("ADD", conf=mapped(mapping | {"hostPort": 0})))[0] == 7
        assert {d["ifname"] for d in other.ip("link")} == {"lo"}
        assert other.call("ADD", conf=mapped(mapping | {"protocol": "udp"}))[0] == 0
        assert box.call("DEL") == (0, None)
        assert other.call("ADD", "eth1", conf=mapped(mapping))[0] == 0, "free again"
    finally:
        other.close()


def test_what_is_not_supported_says_so(box: Box) -> None:
    code, text = error(box.call("ADD", conf=CONF | {"runtimeConfig": {"bandwidth": {"ingressRate": 8080}}}))
    assert code == 2
    assert "8080" in text
    assert error(box.call("ADD", conf=CONF | {"prevResult": {"interfaces": []}}))[0] == 7
    assert error(box.call("ADD", "eth%d"))[0] == 4
    assert {d["ifname"] for d in box.ip("link")} == {"lo"}


# --- DEL ---------------------------------------------------------------------------------------------------------


def test_del_of_something_unknown_or_twice(lab: Lab, clean: None) -> None:
    box = Box(lab)
    try:
        assert box.call("DEL") == (0, None)
        box.add()
        assert box.call("DEL") == (0, None)
        assert box.call("DEL") == (0, None)
    finally:
        box.close()


@pytest.mark.parametrize("how", ["netns gone", "netns empty", "path gone"])
def test_del_without_the_namespace(lab: Lab, clean: None, how: str) -> None:
    box = Box(lab)
    try:
        box.add()
        if how == "netns gone":
            box.delete_netns()
        assert box.call("DEL", netns="" if how == "netns empty" else box.netns + how[:4].strip()) == (0, None)
        if how != "netns gone":
            lab.wait("no eth0", lambda: {d["ifname"] for d in box.ip("link")} == {"lo"})
    finally:
        box.close()


def test_the_same_container_again_after_its_namespace_was_lost(box: Box) -> None:
    """A node that reboots its containers: no DEL, a new namespace of the same name."""
    box.add()
    box.delete_netns()
    box.node("ip", "netns", "add", box.container)
    _as_reported(box, box.add())


# --- CHECK -------------------------------------------------------------------------------------------------------

IN_THE_POD = {
    "interface deleted": ("ip link del eth0", "eth0"),
    "interface down": ("ip link set eth0 down", "is down"),
    "IPv4 address removed": ("ip addr flush dev eth0 scope global", "is gone"),
    "IPv4 route removed": ("ip route del default", "default route via 10."),
    "IPv6 route removed": ("ip -6 route del default", "default route via fd"),
    "other gateway": ("ip route replace default dev eth0 scope link", "default route via 10."),
    "other MAC": ("ip link set eth0 address 02:00:00:00:be:ef", "MAC 02:00:00:00:be:ef"),
}


@pytest.mark.parametrize("harm", IN_THE_POD)
def test_check_finds_what_is_wrong_in_the_container(box: Box, harm: str) -> None:
    result = box.add()
    assert box.check(result) == (0, None)
    command, words = IN_THE_POD[harm]
    box.inside(*command.split())
    code, text = error(box.check(result))
    assert code in (3, 101)  # without its interface an attachment ceases to exist
    assert words in text
    assert box.call("DEL") == (0, None)


def _program_name(number: int) -> str:
    with program_by_id(number) as program:
        return prog_info(program.fd).name


def _programs(box: Box, name: str) -> dict[str, int]:
    """Name and link id of the programs on both sides of a device."""
    (device,) = json.loads(box.node("ip", "-j", "link", "show", "dev", name))

    def look() -> dict[str, int]:
        states = [query_device(device["ifindex"], hook) for hook in (AttachType.TCX_INGRESS, AttachType.TCX_EGRESS)]
        return {_program_name(p.prog_id): p.link_id for state in states for p in state.programs}

    return kernel.in_netns(box.lab.paths.netns(NODE), look)


def _linked(box: Box, name: str) -> dict[str, int]:
    """The programs of a device once links have taken the place of the filters that it starts with."""
    deadline = time.monotonic() + 40
    while (found := _programs(box, name)).keys() != {"from_pod", "to_pod"}:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("harm", ["host interface down", "program detached", "route of the node deleted"])
def test_check_waits_for_what_the_agent_repairs_by_itself(lab: Lab, box: Box, harm: str) -> None:
    """A runtime may take a failed CHECK for final, so it is only told what stays wrong."""
    result = box.add()
    host = result["interfaces"][0]["name"]
    programs = _linked(box, host)
    if harm == "host interface down":
        box.node("ip", "link", "set", host, "down")
    elif harm == "program detached":
        for number in programs.values():
            box.node("bpftool", "link", "detach", "id", str(number))
    else:
        box.node("ip", "route", "del", result["ips"][0]["address"].split("/")[0], "dev", host)
    assert box.check(result) == (0, None)
    _linked(box, host)
    box.node("ping", "-c1", "-W2", result["ips"][0]["address"].split("/")[0])


def test_check_goes_by_prev_result(box: Box) -> None:
    """Plugins after us may have changed what the result no longer lists; a result of something else is an error."""
    result = box.add()
    box.inside("ip", "route", "del", "default")
    assert error(box.check(result))[0] == 101
    later = result | {"routes": [r for r in result["routes"] if r["dst"] != "0.0.0.0/0"]}
    assert box.check(later) == (0, None)
    code, text = error(box.check(result | {"ips": [{"address": "192.0.2.1/32"}]}))
    assert code == 101
    assert "prevResult" in text
    assert error(box.check(result | {"interfaces": []}))[0] == 101
    assert error(box.call("CHECK"))[0] == 7
    assert error(box.call("CHECK", conf=CONF | {"prevResult": {"ips": 5}}))[0] == 7


# --- GC, STATUS, VERSION -----------------------------------------------------------------------------------------


def test_gc_removes_what_is_not_listed_and_of_this_network_only(lab: Lab, clean: None) -> None:
    kept, stale, other = Box(lab), Box(lab), Box(lab)
    try:
        result, _, foreign = kept.add(), stale.add(), other.add(name="othernet")
        key = "cni.dev/valid-attachments"
        for bad in ({}, {key: [{"containerID": kept.container}]}, {key: "x"}):
            assert error(call(lab, "GC", CONF | bad))[0] == 7
        assert len(agent(lab, NODE, "endpoints")) == 3
        listed = {key: [{"containerID": kept.container, "ifname": "eth0"}]}
        assert call(lab, "GC", CONF | listed) == (0, None)
        assert kept.check(result) == (0, None)
        assert other.check(foreign) == (0, None)
        assert len(agent(lab, NODE, "endpoints")) == 2
        lab.wait("the stale interface is gone", lambda: {d["ifname"] for d in stale.ip("link")} == {"lo"})
        assert error(call(lab, "GC", CONF | {"cniVersion": "1.0.0"} | listed))[0] == 1
    finally:
        for one in (kept, stale, other):
            one.close()


def test_version_and_status(lab: Lab) -> None:
    status, body = call(lab, "VERSION", {"cniVersion": "1.0.0"})
    assert status == 0
    assert body["cniVersion"] == "1.0.0"
    assert body["supportedVersions"][-1] == "1.1.0"
    assert call(lab, "STATUS") == (0, None)
    assert error(call(lab, "STATUS", CONF | {"cniVersion": "1.0.0"}))[0] == 1
    assert error(call(lab, "INFO"))[0] == 4


def test_without_an_agent(lab: Lab, box: Box) -> None:
    """50 for STATUS, 11 for what a runtime should try again; and what it then tries again succeeds."""
    result = box.add()
    lab.kill(f"{NODE}/agent")
    try:
        assert error(call(lab, "STATUS"))[0] == 50
        assert error(box.call("DEL"))[0] == 11
        assert error(box.check(result))[0] == 11
        assert error(call(lab, "GC", CONF | {"cni.dev/valid-attachments": []}))[0] == 11
        assert call(lab, "VERSION")[0] == 0
    finally:
        lab.restart(f"{NODE}/agent")
    seen = set()
    while not ready(lab, NODE):
        status, body = call(lab, "STATUS")
        seen.add(body["code"] if status else 0)
    assert seen <= {0, 50}
    assert lab.wait("STATUS is good", lambda: call(lab, "STATUS") == (0, None))
    assert box.check(result) == (0, None)


def test_status_while_the_node_has_no_addresses(lab_name: str) -> None:
    """No operator, so no pod CIDRs: the agent waits, and says for what."""
    cluster.up(LabSpec(name=lab_name, nodes=1, agents=False))
    lab = Lab(lab_name)
    argv = components.agent(lab.spec, lab.paths, NODE).argv()
    components.start(lab.paths, f"{NODE}/agent", argv)
    lab.run(f"node/{NODE}", "mkdir", "-p", "/opt/cni/bin")
    lab.run(f"node/{NODE}", "cp", kernel.binary("fimbria-cni"), PLUGIN)
    box = Box(lab)
    lab.wait("the agent waits", lambda: "pod addresses" in lab.process_log(f"{NODE}/agent"))
    code, text = error(call(lab, "STATUS"))
    assert code == 50
    assert "pod addresses" in text
    code, text = error(box.call("ADD"))
    assert code == 11
    assert "pod addresses" in text
    assert not (node_root(lab, NODE) / "etc/cni/net.d/05-fimbria.conflist").exists()


# --- address families and small pools ----------------------------------------------------------------------------


@pytest.mark.parametrize("families", ["IPv4", "IPv6"])
def test_one_family(lab_name: str, families: str) -> None:
    pool = {"ipv6_pool": ""} if families == "IPv4" else {"ipv4_pool": ""}
    cluster.up(LabSpec(name=lab_name, nodes=1, routing="native", **pool))
    lab = Lab(lab_name)
    before = steady_inventory(lab)
    box = Box(lab)
    result = box.add()
    assert [ipaddress.ip_interface(ip["address"]).version for ip in result["ips"]] == [4 if families == "IPv4" else 6]
    assert [r["dst"] for r in result["routes"]] == ["0.0.0.0/0" if families == "IPv4" else "::/0"]
    _as_reported(box, result, mtu=1500)
    assert box.check(result) == (0, None)
    box.inside("ping", "-c1", "-W2", result["ips"][0]["gateway"])
    box.close()
    nothing_left(lab, before)


def test_a_pool_that_is_used_up(lab_name: str) -> None:
    """ADD and STATUS say so, and a DEL makes room."""
    cluster.up(LabSpec(name=lab_name, nodes=1, ipv4_pool="10.244.0.0/28", ipv4_mask=29, ipv6_pool=""))
    lab = Lab(lab_name)
    before = steady_inventory(lab)
    boxes = [Box(lab) for _ in range(6)]
    for one in boxes[:5]:
        one.add()
    code, text = error(boxes[5].call("ADD"))
    assert code == 102
    assert "10.244.0" in text
    code, text = error(call(lab, "STATUS"))
    assert code == 50
    assert "IPv4" in text
    assert boxes[0].call("DEL") == (0, None)
    assert call(lab, "STATUS") == (0, None)
    boxes[5].add()
    for one in boxes:
        one.close()
    nothing_left(lab, before)


# --- pods --------------------------------------------------------------------------------------------------------

POD = """
apiVersion: v1
kind: Pod
metadata: {name: cnipod}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{name: main, image: fimbria/labtool, command: [labtool, sleep]}]
"""


def test_a_pods_attachment(lab: Lab, clean: None) -> None:
    """What the node runner cached is what a runtime would pass; an ADD that comes again doesn't hurt the pod."""
    lab.apply(POD)
    lab.wait_ready(["cnipod"])
    entries = [json.loads(p.read_bytes()) for p in (node_root(lab, NODE) / "var/lib/cni").rglob("fimbria-*")]
    (entry,) = [e for e in entries if ["K8S_POD_NAME", "cnipod"] in e["cniArgs"]]
    env = {"CNI_CONTAINERID": entry["containerId"], "CNI_NETNS": entry["netns"], "CNI_IFNAME": entry["ifName"],
           "CNI_ARGS": ";".join("=".join(a) for a in entry["cniArgs"])}  # fmt: skip
    assert entry["result"]["cniVersion"] == "1.1.0"  # the runner chose the highest of cniVersions
    assert {ip["address"].split("/")[0] for ip in entry["result"]["ips"]} == set(lab.addresses("cnipod"))
    assert call(lab, "CHECK", CONF | {"prevResult": entry["result"]}, **env) == (0, None)
    code, text = error(call(lab, "ADD", **env))
    assert code == 100
    assert "default/cnipod" in text
    assert call(lab, "CHECK", CONF | {"prevResult": entry["result"]}, **env) == (0, None)
    lab.delete(POD)
    lab.wait("the pod is gone", lambda: not list((node_root(lab, NODE) / "var/lib/cni").rglob("fimbria-*")))


def test_a_pod_that_the_api_server_does_not_know(box: Box) -> None:
    args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=ghost;K8S_POD_INFRA_CONTAINER_ID=x"
    code, text = error(box.call("ADD", args=args))
    assert code == 11
    assert "default/ghost" in text
    assert {d["ifname"] for d in box.ip("link")} == {"lo"}


# --- libcni ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cnitool() -> Path:
    path = HERE.parent / "cni" / "build.py"
    spec = importlib.util.spec_from_file_location("fimbria_cnitool_build", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    tool: Path = module.ensure()
    return tool


class Libcni:
    """cnitool on one network configuration and one namespace."""

    def __init__(self, tool: Path, box: Box, conf: dict[str, Any] | None = None, capabilities: Any = None) -> None:
        self.box = box
        self.name = "fimbria"
        self.folder = "/etc/cni/net.d"
        self._tool = tool
        self._env = ["CNI_PATH=/opt/cni/bin:/usr/lib/cni"]
        if conf is not None:
            self.name = conf["name"]
            self.folder = f"/run/{box.container}.d"
            box.node("mkdir", "-p", self.folder)
            done = box.lab.run(f"node/{NODE}", "tee", f"{self.folder}/10.conflist", stdin=json.dumps(conf))
            assert done.returncode == 0
        if capabilities:
            self._env.append(f"CAP_ARGS={json.dumps(capabilities)}")

    def run(self, command: str) -> tuple[int, str, str]:
        env = ["env", *self._env, f"NETCONFPATH={self.folder}"]
        done = self.box.lab.run(f"node/{NODE}", *env, str(self._tool), command, self.name, self.box.netns)
        return done.returncode, done.stdout, done.stderr


def test_libcni_with_the_installed_configuration(lab: Lab, cnitool: Path, box: Box) -> None:
    libcni = Libcni(cnitool, box)
    status, out, err = libcni.run("add")
    assert status == 0, err
    result = json.loads(out)
    assert result["cniVersion"] == "1.1.0"  # the highest of cniVersions
    _as_reported(box, result)
    assert libcni.run("check") == (0, "", "")
    assert libcni.run("status") == (0, "", "")
    status, _, err = libcni.run("add")
    assert status == 1
    assert "eth0 of container" in err
    assert libcni.run("check") == (0, "", "")
    box.inside("ip", "addr", "flush", "dev", "eth0", "scope", "global")
    status, _, err = libcni.run("check")
    assert status == 1
    assert "is gone" in err
    assert libcni.run("del") == (0, "", "")
    assert libcni.run("del") == (0, "", "")
    lab.wait("no eth0", lambda: {d["ifname"] for d in box.ip("link")} == {"lo"})


def test_libcni_passes_port_mappings_with_the_installed_configuration(lab: Lab, cnitool: Path, box: Box) -> None:
    """As kubelet and containerd do: the capability stands in our configuration, so libcni hands over what is mapped."""
    ports = {"portMappings": [{"hostPort": 8070, "containerPort": 9000, "protocol": "tcp", "hostIP": ""}]}
    libcni = Libcni(cnitool, box, capabilities=ports)
    status, _, err = libcni.run("add")
    assert status == 0, err
    assert lab.spec.node(NODE).ipv4 in frontends(lab, 8070)
    assert libcni.run("check") == (0, "", "")
    assert libcni.run("del") == (0, "", "")
    assert not frontends(lab, 8070)


def test_libcni_gc(lab: Lab, cnitool: Path, box: Box) -> None:
    """cnitool deletes what libcni has cached, and then sends a GC without the list that the specification demands:
    we refuse that one, and remove nothing else."""
    libcni = Libcni(cnitool, box)
    other = Box(lab)
    try:
        result = other.add()
        assert libcni.run("add")[0] == 0
        status, _, err = libcni.run("gc")
        assert status == 1
        assert "cni.dev/valid-attachments" in err
        lab.wait("no eth0", lambda: {d["ifname"] for d in box.ip("link")} == {"lo"})
        assert other.check(result) == (0, None)
    finally:
        other.close()


def chain(*plugins: dict[str, Any]) -> dict[str, Any]:
    """Debian's plugins know no later version than 1.0.0."""
    return {"cniVersion": "1.0.0", "name": "fimbria", "plugins": [{"type": "fimbria-cni"}, *plugins]}


def test_a_chain_with_tuning_and_bandwidth(lab: Lab, cnitool: Path, box: Box) -> None:
    tuning = {"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.log_martians": "1"}, "mtu": 1400}
    shaped = {"bandwidth": {"ingressRate": 8_000_000, "ingressBurst": 8_000_000}}
    plugins = (tuning, {"type": "bandwidth", "capabilities": {"bandwidth": True}})
    libcni = Libcni(cnitool, box, chain(*plugins), shaped)
    status, out, err = libcni.run("add")
    assert status == 0, err
    assert json.loads(out)["interfaces"][1]["name"] == "eth0"
    assert box.inside("sysctl", "-n", "net.ipv4.conf.eth0.log_martians").strip() == "1"
    assert box.ip("link", "show", "dev", "eth0")[0]["mtu"] == 1400
    assert libcni.run("check") == (0, "", "")
    box.inside("ip", "-6", "route", "del", "default")
    status, _, err = libcni.run("check")
    assert status == 1
    assert "default route via fd" in err
    assert libcni.run("del") == (0, "", "")
    assert libcni.run("del") == (0, "", "")
    lab.wait("no eth0", lambda: {d["ifname"] for d in box.ip("link")} == {"lo"})


def test_a_chain_with_portmap(lab_name: str, cnitool: Path) -> None:
    """Host ports by another plugin: its replies must pass the host's stack, hence no fast path. Debian's portmap 1.1.1
    fails its own CHECK whatever plugin it follows, so only ours is asked, with the result of the whole chain."""
    cluster.up(LabSpec(name=lab_name, nodes=1, agent_options=("no-fast-path",)))
    lab = Lab(lab_name)
    before = steady_inventory(lab)
    box = Box(lab)
    ports = {"portMappings": [{"hostPort": 18080, "containerPort": 8080, "protocol": "tcp"}]}
    libcni = Libcni(cnitool, box, chain({"type": "portmap", "capabilities": {"portMappings": True}}), ports)
    status, out, err = libcni.run("add")
    assert status == 0, err
    result = json.loads(out)
    address = result["ips"][0]["address"].split("/")[0]
    web = ("-m", "http.server", "8080", "--bind", "::")
    server = lab.start(f"node/{NODE}", "ip", "netns", "exec", box.container, sys.executable, *web)
    try:
        lab.wait("a server", lambda: lab.probe(f"node/{NODE}", "tcp", address, 8080)["result"] == "ok")
        for target in (f"node/{NODE}", "node/world"):
            assert lab.probe(target, "tcp", lab.spec.node(NODE).ipv4, 18080)["result"] == "ok"
    finally:
        server.kill()
        server.communicate()
    (entry,) = [e for e in agent(lab, NODE, "endpoints") if "cnitool-" in json.dumps(e)]
    ours = {"CNI_CONTAINERID": entry["container_id"], "CNI_NETNS": box.netns, "CNI_IFNAME": "eth0"}
    assert call(lab, "CHECK", CONF | {"cniVersion": "1.0.0", "prevResult": result}, **ours) == (0, None)
    assert libcni.run("del") == (0, "", "")
    assert libcni.run("del") == (0, "", "")
    assert "18080" not in box.node("iptables-save", "-t", "nat")
    box.close()
    nothing_left(lab, before)


def test_we_refuse_to_come_second(lab: Lab, cnitool: Path, box: Box) -> None:
    """And what came before us in the chain is not ours to undo."""
    conf = {"cniVersion": "1.0.0", "name": "behind", "plugins": [{"type": "loopback"}, {"type": "fimbria-cni"}]}
    libcni = Libcni(cnitool, box, conf)
    status, _, err = libcni.run("add")
    assert status == 1
    assert "must be the first plugin of a chain" in err
    assert libcni.run("del") == (0, "", "")


# --- many at once ------------------------------------------------------------------------------------------------


def load(lab: Lab, command: str, count: int) -> list[dict[str, Any]]:
    done = lab.run(f"node/{NODE}", sys.executable, str(HERE / "cni_load.py"), command, str(count))
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert [r for r in rows if r["rc"] != 0] == []
    took = sorted(r["ms"] for r in rows)
    print(f"{count} {command} at once: p50 {took[len(took) // 2]:.0f} ms, p99 {took[int(len(took) * 0.99)]:.0f} ms")
    return rows


def test_a_hundred_at_once(lab: Lab, clean: None) -> None:
    """All succeed with addresses of their own, each can talk, and nothing is left of them."""
    count = 100
    rows = load(lab, "ADD", count)
    addresses = [ip["address"] for row in rows for ip in row["answer"]["ips"]]
    assert len(set(addresses)) == 2 * count
    try:
        gateway = rows[0]["answer"]["ips"][0]["gateway"]
        script = (
            "for i in $(seq 0 99); do ip netns exec fimload$i ping -qc1 -W2 " + gateway + " >&2 || echo fimload$i; done"
        )
        assert lab.run(f"node/{NODE}", "bash", "-c", script).stdout == ""
    finally:
        load(lab, "DEL", count)
