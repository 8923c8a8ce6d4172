"""Somebody deletes or changes what is ours in the kernel: noticed, repaired, told, and traffic goes on."""

import json
from collections.abc import Callable, Iterator

import pytest
from traffic import Traffic, agent, metric, node_root, start_pods, wait_settled, wait_soon

from fimbria.lab.handle import Lab

SOON = 5.0  # seconds until links, routes, pins and devices are repaired: half a second to one on an idle machine


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(nodes=2, agent_options=("audit-interval=3",))
    start_pods(lab)
    return lab


@pytest.fixture(autouse=True)
def _settled(lab: Lab) -> Iterator[None]:
    yield
    wait_settled(lab)


def node(lab: Lab, *command: str) -> str:
    done = lab.run("node/node1", *command)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout


def repairs(lab: Lab, target: str) -> float:
    return metric(lab, "node1", "fimbria_drift_repaired_total", target=target)


def fault(lab: Lab, target: str, strike: Callable[[], object], within: float = SOON, said: str = "drift: ") -> None:
    """Strikes while traffic runs; the repair must be counted under `target` in time, and logged."""
    before, logged = repairs(lab, target), len(lab.process_log("node1/agent"))
    strike()
    took = wait_soon(lab, f"{target} repaired", lambda: repairs(lab, target) > before, within)
    print(f"{target} repaired after {took:.2f} s")
    assert said in lab.process_log("node1/agent")[logged:]
    wait_settled(lab)


def interface(lab: Lab, pod: str) -> dict[str, object]:
    found: dict[str, object] = next(e for e in agent(lab, "node1", "endpoints") if e["pod"] == pod)
    return found


def links(lab: Lab) -> list[dict[str, object]]:
    shown: list[dict[str, object]] = json.loads(node(lab, "bpftool", "-j", "link", "show"))
    return shown


def link_pin(lab: Lab, pod: str, side: str) -> str:
    """The pin of a pod's link, once it has taken the place of the filter that the pod starts with."""
    name = f"tcx-{side}-{interface(lab, pod)['ifindex']}"
    lab.wait("the pod's link", (node_root(lab, "node1") / "sys/fs/bpf/fimbria/links" / name).exists, 40)
    return name


def tcx_link(lab: Lab, pod: str, side: str) -> str:
    pinned = f"/sys/fs/bpf/fimbria/links/{link_pin(lab, pod, side)}"
    return str(json.loads(node(lab, "bpftool", "-j", "link", "show", "pinned", pinned))["id"])


def test_a_link_detached(lab: Lab) -> None:
    fault(lab, "device_links", lambda: node(lab, "bpftool", "link", "detach", "id", tcx_link(lab, "near", "ingress")))


def test_a_links_pin_removed(lab: Lab) -> None:
    name = link_pin(lab, "near", "ingress")
    with Traffic(lab):
        fault(lab, "device_links", (node_root(lab, "node1") / "sys/fs/bpf/fimbria/links" / name).unlink)


def test_a_cgroup_link_detached(lab: Lab) -> None:
    pinned = "/sys/fs/bpf/fimbria/links/cgroup-connect4"
    link_id = str(json.loads(node(lab, "bpftool", "-j", "link", "show", "pinned", pinned))["id"])
    with Traffic(lab):
        fault(lab, "socket_links", lambda: node(lab, "bpftool", "link", "detach", "id", link_id))


@pytest.mark.parametrize("pattern", ["ipcache-*", "conntrack-*", "policy_sets-*"])
def test_a_maps_pin_removed(lab: Lab, pattern: str) -> None:
    (path,) = (node_root(lab, "node1") / "sys/fs/bpf/fimbria/maps").glob(pattern)
    with Traffic(lab):
        fault(lab, "pins", path.unlink)
    assert path.exists()


def test_the_mount_removed(lab: Lab) -> None:
    with Traffic(lab):
        fault(lab, "mounts", lambda: node(lab, "umount", "-l", "/sys/fs/bpf"))
    assert list((node_root(lab, "node1") / "sys/fs/bpf/fimbria/links").iterdir())
    with Traffic(lab):  # what is pinned again is what runs
        lab.kill("node1/agent")
        lab.restart("node1/agent")
        wait_settled(lab)


def test_the_mount_covered_by_a_fresh_one(lab: Lab) -> None:
    def strike() -> None:
        node(lab, "umount", "-l", "/sys/fs/bpf")
        node(lab, "mount", "-t", "bpf", "bpf", "/sys/fs/bpf")

    with Traffic(lab):
        fault(lab, "pins", strike)


@pytest.mark.parametrize("family", ["-4", "-6"])
def test_a_pods_route_deleted(lab: Lab, family: str) -> None:
    address = interface(lab, "near")["ipv4" if family == "-4" else "ipv6"]
    with Traffic(lab):  # pods don't need it: programs deliver past the stack
        fault(lab, "routes", lambda: node(lab, "ip", family, "route", "del", str(address)))


@pytest.mark.parametrize("family", ["-4", "-6"])
def test_the_unreachable_route_deleted(lab: Lab, family: str) -> None:
    blocks = agent(lab, "node1", "status")["pod_cidrs"]
    block = next(b for b in blocks if (":" in b) == (family == "-6"))
    with Traffic(lab):
        fault(lab, "routes", lambda: node(lab, "ip", family, "route", "del", "unreachable", block))


def test_a_pods_route_bent(lab: Lab) -> None:
    address = str(interface(lab, "near")["ipv4"])
    fault(lab, "routes", lambda: node(lab, "ip", "route", "replace", address, "dev", "fimbria_host", "proto", "241"))


def test_a_neighbour_deleted(lab: Lab) -> None:
    found = interface(lab, "near")
    where = (str(found["ipv4"]), "dev", str(found["interface"]))
    fault(lab, "neighbours", lambda: node(lab, "ip", "neigh", "del", *where))


def test_a_pods_interface_set_down(lab: Lab) -> None:
    fault(lab, "devices", lambda: node(lab, "ip", "link", "set", str(interface(lab, "near")["interface"]), "down"))
    assert all(lab.probe("client", "udp", a, 9001)["result"] == "ok" for a in lab.addresses("near"))


def test_a_sysctl_changed(lab: Lab) -> None:
    # Not ip_forward itself: the kernel resets a node's other settings with it.
    fault(lab, "sysctls", lambda: node(lab, "sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=1"))


@pytest.mark.parametrize("name", ["local_addrs", "endpoints", "ipcache"])
def test_rows_of_a_map_deleted(lab: Lab, name: str) -> None:
    (path,) = (node_root(lab, "node1") / "sys/fs/bpf/fimbria/maps").glob(f"{name}-*")
    where = ("pinned", f"/sys/fs/bpf/fimbria/maps/{path.name}")
    rows = json.loads(node(lab, "bpftool", "-j", "map", "dump", *where))

    def strike() -> None:
        for row in rows[:2]:
            node(lab, "bpftool", "map", "delete", *where, "key", "hex", *(b.removeprefix("0x") for b in row["key"]))

    fault(lab, name, strike, within=3 + SOON)  # the audit's interval


@pytest.mark.parametrize("strike", [
    ("link", "del", "fimbria_vxlan"), ("link", "set", "fimbria_vxlan", "down"), ("link", "del", "fimbria_host"),
    ("link", "set", "fimbria_net", "down"), ("addr", "flush", "dev", "fimbria_host"),
])  # fmt: skip
def test_a_device_of_the_node(lab: Lab, strike: tuple[str, ...]) -> None:
    fault(lab, "devices", lambda: node(lab, "ip", *strike), within=SOON)
    addresses = lab.addresses("far")
    wait_soon(lab, "pods of other nodes answer", lambda: all(_ok(lab, "client", a) for a in addresses), 5)
    wait_soon(lab, "the node reaches them too", lambda: all(_ok(lab, "node/node1", a) for a in addresses), 5)


def _ok(lab: Lab, source: str, address: str) -> bool:
    return bool(lab.probe(source, "udp", address, 9001, "--timeout", "300")["result"] == "ok")
