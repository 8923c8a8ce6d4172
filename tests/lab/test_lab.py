"""The lab itself: that it is what it says, that its pods are pods, and that nothing of it stays behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fimbria.lab import cluster, components, kernel, state
from fimbria.lab.errors import LabError
from fimbria.lab.handle import Lab
from fimbria.lab.layout import LabSpec, Paths

CLI = [sys.executable, "-c", "from fimbria.cli.lab import lab; lab()"]
PROBE_OK = "ok"


def pod(name: str, node: str, extra: str = "", container: str = "image: fimbria/labtool") -> str:
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  {extra}
  containers:
  - name: main
    {container}
"""


def traces(name: str) -> dict[str, list[str]]:
    """Everything on the machine that carries the lab's name or belongs to it."""
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    links = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, text=True, check=True).stdout)
    # not by walking all of it: others' groups come and go
    groups = [path for path, _, _ in os.walk(kernel.cgroup_root()) if name in Path(path).name]
    processes = []
    for proc in Path("/proc").glob("[0-9]*"):
        try:
            if f"fimbria-lab-{name}/" in (proc / "cgroup").read_text():
                processes.append(proc.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return {
        "namespaces": [p.name for p in Path("/run/netns").glob("*") if f"-{name}." in p.name],
        "mounts": [m for m in mounts if name in m],
        "links": [x["ifname"] for x in links if re.fullmatch(r"node[0-9]+|control|world", x["ifname"])],
        "cgroups": groups,
        "processes": processes,
        "files": [str(p) for p in Path("/run").glob(f"fimbria-lab/*{name}*")],
    }  # fmt: skip


def nothing_left(name: str) -> None:
    """Dead processes stay visible until the machine's init has taken note of them, hence the patience."""
    deadline = time.monotonic() + 20
    while (left := {k: v for k, v in traces(name).items() if v}) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == {}


# --- building and removing ---------------------------------------------------------------------------------------


def test_up_and_down_leave_nothing(lab_name: str) -> None:
    nothing_left(lab_name)
    cluster.up(LabSpec(name=lab_name, agents=False))
    there = traces(lab_name)
    assert len(there["namespaces"]) == 3 + len(("fabric", "control", "world"))
    assert there["processes"] and there["cgroups"] and there["mounts"]
    assert there["links"] == [], "cables belong in the lab's own namespaces"
    assert cluster.down(lab_name) is True
    nothing_left(lab_name)
    assert cluster.down(lab_name) is False, "a second down has nothing to do"


def test_state_is_private(ptp_lab: Lab) -> None:
    for path in [ptp_lab.paths.state, *ptp_lab.paths.state.glob("*"), *ptp_lab.paths.logs.glob("*")]:
        assert path.stat().st_mode & 0o077 == 0 or path.name in ("server.crt",), f"{path} is open to others"


def test_two_labs_side_by_side(ptp_lab: Lab, lab_name: str) -> None:
    cluster.up(LabSpec(name=lab_name, nodes=1, agents=False))
    other = Lab(lab_name)
    assert other.probe("node/node1", "icmp", other.spec.world.ipv4)["result"] == PROBE_OK
    with other.paths.netns("node1").open() as kept:  # while it is there, no later namespace gets its number
        inode = os.fstat(kept.fileno()).st_ino
        cluster.down(lab_name)
        nothing_left(lab_name)
        holders = [p for p in Path("/proc").glob("[0-9]*/mountinfo") if _mentions(p, f"net:[{inode}]")]
    assert holders == [], "a lab that was there before or after must not keep another's namespaces alive"
    assert all(p["running"] for p in cluster.status(ptp_lab.spec.name)["processes"])
    assert ptp_lab.probe("node/node1", "icmp", ptp_lab.spec.world.ipv4)["result"] == PROBE_OK


def _mentions(path: Path, text: str) -> bool:
    try:
        return text in path.read_text()
    except OSError:
        return False


def up_process(name: str) -> "subprocess.Popen[str]":
    # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
    return subprocess.Popen(
        [*CLI, "up", "--name", name, "--no-agents"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def read_until(process: "subprocess.Popen[str]", step: str) -> None:
    assert process.stderr
    for line in process.stderr:
        if step in line:
            return
    raise AssertionError(f"up ended before {step!r}")


@pytest.mark.parametrize("step", ["fabric", "nodes", "API server", "processes"])
def test_down_after_a_killed_up(lab_name: str, step: str) -> None:
    process = up_process(lab_name)
    read_until(process, step)
    time.sleep(0.05)
    process.kill()
    process.wait()
    assert cluster.remains(lab_name)
    with pytest.raises(LabError, match="already exists, or a part of it"):
        cluster.up(LabSpec(name=lab_name, agents=False))
    assert cluster.down(lab_name) is True
    nothing_left(lab_name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_up_cleans_up_itself(lab_name: str, number: signal.Signals) -> None:
    process = up_process(lab_name)
    read_until(process, "custom resources")
    process.send_signal(number)
    assert process.wait(60) != 0
    nothing_left(lab_name)


def test_down_without_the_state_directory(lab_name: str) -> None:
    cluster.up(LabSpec(name=lab_name, nodes=1, agents=False))
    kernel.umount(Paths(lab_name).state)
    Paths(lab_name).state.rmdir()
    assert cluster.down(lab_name) is True
    nothing_left(lab_name)


def test_a_server_that_does_not_answer(lab_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for = components.wait_for

    def hurry_then(*args: Any) -> None:
        """What leads to the server may take its time to start."""
        wait_for(*args)
        monkeypatch.setattr(cluster, "API_PATIENCE", 1.0)

    monkeypatch.setattr(components, "wait_for", hurry_then)
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(json.dumps({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "k", "cluster": {"server": "http://127.0.0.1:9"}}],
        "contexts": [{"name": "c", "context": {"cluster": "k"}}],
    }))  # fmt: skip
    with pytest.raises(LabError, match="API server doesn't answer"):
        cluster.up(LabSpec(name=lab_name, nodes=1, agents=False, kubeconfig=str(kubeconfig)))
    nothing_left(lab_name)


def test_errors_in_one_sentence(ptp_lab: Lab, lab_name: str) -> None:
    def said(*args: str) -> str:
        done = subprocess.run([*CLI, *args], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        return str(done.stderr.strip())

    assert "already exists" in said("up", "--name", ptp_lab.spec.name)
    assert "overlaps fabric IPv4" in said("up", "--name", lab_name, "--ipv4-pool", "172.31.0.0/20")
    assert "lower-case" in said("up", "--name", "../x")
    assert "there is no lab" in said("status", "--name", lab_name)
    assert "no process node1/nothing" in said("kill", "--name", ptp_lab.spec.name, "node1/nothing")
    assert "has no node" in said("exec", "--name", ptp_lab.spec.name, "node/node9", "--", "true")
    assert "has no 'unicorns'" in said("get", "--name", ptp_lab.spec.name, "unicorns")
    nothing_left(lab_name)


def test_without_root(lab_name: str) -> None:
    code = "import os; from fimbria.lab import cluster, layout; os.setuid(65534); cluster.up(layout.LabSpec(name={!r}))"
    argv = [sys.executable, "-c", code.format(lab_name)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "the lab needs root" in done.stderr.splitlines()[-1]


# --- the network -------------------------------------------------------------------------------------------------


def test_nodes_reach_each_other_and_the_world(ptp_lab: Lab) -> None:
    spec = ptp_lab.spec
    for target in (spec.node("node2"), spec.control, spec.world):
        for address in (target.ipv4, target.ipv6):
            assert ptp_lab.probe("node/node1", "icmp", address)["result"] == PROBE_OK


def test_nodes_do_not_reach_each_others_pods_by_accident(ptp_lab: Lab) -> None:
    ptp_lab.apply(pod("far1", "node1") + "---" + pod("far2", "node2"))
    ptp_lab.wait_ready(["far1", "far2"])
    for address in ptp_lab.addresses("far2"):
        assert ptp_lab.probe("node/node2", "tcp", address, 9000)["result"] == PROBE_OK, "the pod itself answers"
        for source in ("node/node1", "far1", "node/world", "node/control"):
            assert ptp_lab.probe(source, "tcp", address, 9000, "--timeout", "300")["result"] in (
                "unreachable",
                "timeout",
            )
    for address in (ptp_lab.spec.world.ipv4, ptp_lab.spec.world.ipv6):
        answer = ptp_lab.probe("far1", "icmp", address, 0, "--timeout", "300")
        assert answer["result"] == "timeout", "an unmasqueraded pod must not get an answer from the world"
    ptp_lab.delete(pod("far1", "node1") + "---" + pod("far2", "node2"))


def ptp(number: int) -> dict[str, object]:
    ranges = [[{"subnet": f"10.244.{number}.0/24"}], [{"subnet": f"fd00:244::{number}00/120"}]]
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    return {"type": "ptp", "ipam": {"type": "host-local", "ranges": ranges, "routes": routes}}


def test_native_routing_follows_cilium_nodes(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(nodes=2, agents=False, routing="native")
    for number, node in enumerate(lab.spec.node_names, 1):
        lab.request("POST", "/apis/cilium.io/v2/ciliumnodes", {
            "apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": {"name": node},
            "spec": {"ipam": {"podCIDRs": [f"10.244.{number}.0/24", f"fd00:244::{number}00/120"]}},
        })  # fmt: skip
        conf = {"cniVersion": "1.0.0", "name": "ptp", "plugins": [ptp(number)]}
        lab.run(f"node/{node}", "tee", "/etc/cni/net.d/10-ptp.conflist", stdin=json.dumps(conf))
    lab.apply(pod("a", "node1") + "---" + pod("b", "node2"))
    lab.wait_ready(["a", "b"])
    lab.wait("routes", lambda: _routed(lab, "10.244.2.0/24") and _routed(lab, "fd00:244::200/120"))
    for address in lab.addresses("b"):
        answer = lab.probe("a", "http", address, 8080)
        assert answer["result"] == PROBE_OK
        assert answer["answer"]["peer"].strip("[").startswith(tuple(lab.addresses("a")))
    for process in ("node2/init", "machine/cloud"):
        lab.kill(process)
        lab.restart(process)
        lab.wait(f"the pod answers after the end of {process}", lambda: _answers(lab, "a", "b"))
    lab.request("DELETE", "/apis/cilium.io/v2/ciliumnodes/node2")
    lab.wait("no routes", lambda: not _routed(lab, "10.244.2.0/24") and not _routed(lab, "fd00:244::200/120"))
    for address in lab.addresses("b"):
        assert lab.probe("a", "tcp", address, 9000, "--timeout", "300")["result"] in ("unreachable", "timeout")


def _routed(lab: Lab, block: str) -> bool:
    """Whether the fabric has a way to the block."""
    return block in lab.run("node/fabric", "ip", "-6" if ":" in block else "-4", "route").stdout


def _answers(lab: Lab, source: str, target: str) -> bool:
    """Over every address it has now, which after a reboot may be others than before."""
    addresses = lab.addresses(target)
    results = [lab.probe(source, "http", a, 8080, "--timeout", "300")["result"] for a in addresses]
    return bool(results) and set(results) == {"ok"}


# --- pods --------------------------------------------------------------------------------------------------------


def test_pod_environment_files_and_namespaces(ptp_lab: Lab) -> None:
    lab = ptp_lab
    lab.apply(
        pod(
            "env",
            "node1",
            container="""image: any
    command: [sh, -c]
    args: ["echo ip=$POD_IP up=$(UPPER) host=$HOST_IP node=$NODE; hostname; cat /etc/hosts; echo $$$$; exec sleep 1000"]
    env:
    - {name: UPPER, value: X}
    - {name: POD_IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: HOST_IP, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}""",
        )
    )
    lab.wait_ready(["env"])
    address = lab.addresses("env")[0]
    log = lab.wait("output", lambda: lab.log("env") if "ip=" in lab.log("env") else "")
    assert f"ip={address} up=X host={lab.spec.node('node1').ipv4} node=node1" in log
    assert f"{address}\tenv" in log
    assert "\n1\n" in log, "the command is pid 1 of its own pid namespace"
    assert lab.run("env", "hostname").stdout == "env\n"
    assert lab.run("node/node1", "hostname").stdout == "node1\n"
    group = lab.run("env", "cat", "/proc/self/cgroup").stdout
    assert re.search(rf"0::/fimbria-lab-{lab.spec.name}/node1/pods/[0-9a-f-]+/main", group)
    lab.delete(pod("env", "node1"))


def test_deleted_pods_leave_nothing_on_the_node(ptp_lab: Lab) -> None:
    lab = ptp_lab
    lab.apply(
        pod("gone", "node2", container="image: fimbria/labtool\n    ports: [{containerPort: 8080, hostPort: 8099}]")
    )
    lab.wait_ready(["gone"])
    answer = lab.probe("node/world", "http", lab.spec.node("node2").ipv4, 8099)
    assert answer["result"] == PROBE_OK, "hostPort by the chained portmap"
    uid = lab.pod("gone")["metadata"]["uid"]
    assert uid in lab.run("node/node2", "ip", "netns").stdout
    lab.delete(pod("gone", "node2"))
    lab.wait("the pod is gone", lambda: uid not in str(lab.request("GET", "/api/v1/pods")["items"]))
    left = lab.run(
        "node/node2",
        "sh",
        "-c",
        "ip netns; ls /run/fimbria-runner /var/lib/cni/results /sys/fs/cgroup/pods; ip -o link",
    ).stdout
    assert uid not in left
    assert "veth" not in left


CRASHING = """image: x
    command: [sh, -c, 'exit 3']"""
ONE_INIT = "initContainers: [{name: first, image: x, command: [sh, -c, 'echo one; sleep 0.1']}]"
READY_ONCE_FILE_IS_THERE = """image: x
    command: [sh, -c, 'sleep 0.7; touch /tmp/fim-$HOSTNAME; exec sleep 1000']
    readinessProbe: {exec: {command: [sh, -c, 'rm /tmp/fim-$(hostname)']}, periodSeconds: 1000}"""


def test_restart_policy_init_containers_and_probes(ptp_lab: Lab) -> None:
    lab = ptp_lab
    lab.apply(pod("crash", "node1", ONE_INIT, CRASHING))
    lab.apply(pod("once", "node1", "restartPolicy: Never", CRASHING))
    lab.apply(pod("late", "node1", "", READY_ONCE_FILE_IS_THERE))
    lab.apply(pod("nothing", "node1", "", "image: nginx"))
    status = lab.wait("two restarts", lambda: _restarted(lab, "crash", 2))
    assert status["containerStatuses"][0]["lastState"]["terminated"]["exitCode"] == 3
    assert status["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0
    assert lab.wait("the end", lambda: lab.pod("once")["status"].get("phase") == "Failed")
    assert "pulls no images" in lab.wait("refusal", lambda: lab.pod("nothing")["status"].get("message", ""))
    lab.wait_ready(["late"])
    for name in ("crash", "once", "late", "nothing"):
        lab.delete(pod(name, "node1"))


def _restarted(lab: Lab, name: str, times: int) -> dict[str, list[dict[str, dict[str, dict[str, int]]]]] | None:
    status = lab.pod(name)["status"]
    counts = [c["restartCount"] for c in status.get("containerStatuses") or ()]
    return status if counts and counts[0] >= times else None


def test_host_network(ptp_lab: Lab) -> None:
    ptp_lab.apply(pod("host", "node1", "hostNetwork: true", "image: fimbria/labtool\n    args: [serve, --tcp, '9555']"))
    ptp_lab.wait_ready(["host"])
    node = ptp_lab.spec.node("node1")
    assert ptp_lab.addresses("host") == [node.ipv4, node.ipv6]
    assert ptp_lab.probe("node/node2", "tcp", node.ipv6, 9555)["answer"]["name"] == "node1"
    ptp_lab.delete(pod("host", "node1"))


def test_runner_killed_and_started_again(ptp_lab: Lab) -> None:
    lab = ptp_lab
    lab.apply(
        pod("keep", "node1")
        + "---"
        + pod("drop", "node1")
        + "---"
        + pod("ends", "node1", "restartPolicy: Never", "image: fimbria/labtool")
    )
    lab.wait_ready(["keep", "drop", "ends"])
    address, before = lab.addresses("keep")[0], lab.pod("keep")["status"]["containerStatuses"]
    stream = lab.start(
        "node/node1", kernel.binary("labtool"), "stream", "tcp", address, "9000", "--seconds", "3", "--stall", "1000"
    )
    lab.kill("node1/runner", signal.SIGKILL)
    lab.delete(pod("drop", "node1"))
    lab.run("ends", "kill", "-9", "1")
    lab.run("node/node1", "sh", "-c", f"kill -TERM {_container_pid(lab, 'ends')}")
    lab.restart("node1/runner")
    lab.wait(
        "the deleted pod is gone",
        lambda: "drop" not in [p["metadata"]["name"] for p in lab.request("GET", "/api/v1/pods")["items"]],
    )
    lab.wait("the ended one is noticed", lambda: lab.pod("ends")["status"]["phase"] == "Succeeded")
    out, _ = stream.communicate(timeout=20)
    assert json.loads(out.splitlines()[-1])["ok"] is True, out
    after = lab.pod("keep")["status"]["containerStatuses"]
    assert after[0]["restartCount"] == before[0]["restartCount"] == 0
    assert lab.addresses("keep")[0] == address
    for name in ("keep", "ends"):
        lab.delete(pod(name, "node1"))


def _container_pid(lab: Lab, name: str) -> str:
    """In the node's own numbering."""
    uid = lab.pod(name)["metadata"]["uid"]
    return lab.run("node/node1", "cat", f"/run/fimbria-runner/{uid}/containers/main/0/pid").stdout.strip()


def test_many_pods_at_once(ptp_lab: Lab) -> None:
    names = [f"many{i}" for i in range(12)]
    text = "---".join(pod(n, f"node{i % 2 + 1}") for i, n in enumerate(names))
    ptp_lab.apply(text)
    ptp_lab.wait_ready(names, patience=60)
    assert len({ptp_lab.addresses(n)[0] for n in names}) == len(names)
    ptp_lab.delete(text)
    ptp_lab.wait(
        "all are gone",
        lambda: not any("many" in p["metadata"]["name"] for p in ptp_lab.request("GET", "/api/v1/pods")["items"]),
    )


# --- the command line --------------------------------------------------------------------------------------------


def test_cli_story(ptp_lab: Lab, tmp_path: Path) -> None:
    def cli(*args: str, code: int = 0) -> str:
        name = ["--name", ptp_lab.spec.name]
        done = subprocess.run(
            [*CLI, args[0], *name, *args[1:]], capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == code, done.stderr
        return done.stdout

    file = tmp_path / "pod.yaml"
    file.write_text(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---"
        + pod("web", "node1").replace("{name: web}", "{name: web, namespace: shop}")
    )
    assert "pod shop/web: created" in cli("apply", "-f", str(file))
    assert "pod shop/web: unchanged" in cli("apply", "-f", str(file))
    ptp_lab.wait_ready(["shop/web"])
    assert "web" in cli("get", "pods", "-n", "shop")
    assert json.loads(cli("get", "po", "-n", "shop", "web", "-o", "json"))["metadata"]["name"] == "web"
    assert cli("exec", "shop/web", "--", "hostname") == "web\n"
    cli("exec", "shop/web", "--", "sh", "-c", "exit 7", code=7)
    assert "running" in cli("status")
    cli("kill", "node2/runner")
    cli("status", code=1)
    cli("start", "node2/runner")
    cli("status")
    assert "pod shop/web: deleted" in cli("delete", "-f", str(file))
    assert state.recall(ptp_lab.paths, "node2/runner")
    assert components.log_path(ptp_lab.paths, "node2/runner").exists()
