"""The command line as from a laptop: it has a kubeconfig and reaches the API server, nothing else."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.bed import BedError, Cluster

from fimbria.cli.connectivity.objects import prober

SYSTEM = "kube-system"
PATIENCE = 240
SECRET = "hunter2hunter2"
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJodW50ZXIyIn0.aHVudGVyMmh1bnRlcjI"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nTUlJaHVudGVyMmh1bnRlcjI=\n-----END RSA PRIVATE KEY-----\n"
ENCODED = base64.b64encode(PEM.encode()).decode()
KEYS = (SECRET, JWT, "TUlJaHVudGVyMmh1bnRlcjI=", ENCODED, "AKIAHUNTER2HUNTER2XX")
OURS = {"app.kubernetes.io/part-of": "fimbria"}
SABOTEUR = """
apiVersion: cilium.io/v2
kind: CiliumClusterwideNetworkPolicy
metadata: {name: fimt-saboteur}
spec:
  endpointSelector: {matchLabels: {fimbria.io/role: near}}
  ingress: [{fromEntities: [all]}]
  ingressDeny: [{fromEndpoints: [{matchLabels: {fimbria.io/client: plain}}]}]
"""
COUNT_MONITORS = """
import contextlib, glob
count = 0
for file in glob.glob("/proc/[0-9]*/cmdline"):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(file, "rb") as opened:  # it may just end
        count += b"\\0monitor\\0" in opened.read()
print(count)
"""
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def argv(cluster: Cluster, *words: str) -> list[str]:
    return [*cluster.enter("control"), sys.executable, "-m", "fimbria.cli.main", *words]


def environment(cluster: Cluster) -> dict[str, str]:
    return cluster.control_env | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}


@pytest.fixture
def fimbria(cluster: Cluster, tmp_path: Path) -> Command:
    """Runs it to its end, in an empty folder."""

    def run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv(cluster, *words), capture_output=True, text=True, check=False, timeout=PATIENCE, cwd=tmp_path,
            env=environment(cluster) | environ,
        )  # fmt: skip

    return run


def interrupted(
    cluster: Cluster, cwd: Path, begun: Callable[[], bool], *words: str
) -> subprocess.CompletedProcess[str]:
    """Starts it, and presses Ctrl-C as soon as it has `begun`."""
    # What a shell runs in the background, as CI may, ignores the signal, and its children do.
    process = subprocess.Popen(
        ["env", "--default-signal=INT", *argv(cluster, *words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, cwd=cwd, env=environment(cluster), start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + PATIENCE
        while not begun():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(words, process.returncode, out, err)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait(what: str, condition: Callable[[], Any], patience: float = 60) -> Any:
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


def agent_image(cluster: Cluster) -> str:
    agents = cluster.get("-n", SYSTEM, "daemonset", "fimbria")
    return str(agents["spec"]["template"]["spec"]["containers"][0]["image"])


# --- status, and any command on a node -------------------------------------------------------------------------------


def test_status_of_the_cluster(cluster: Cluster, fimbria: Command) -> None:
    done = fimbria("status", "--wait", "--timeout", "120", "--verbose")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(cluster.nodes())} of {len(cluster.nodes())} ready" in done.stdout
    value = json.loads(fimbria("status", "-o", "json").stdout)
    assert (value["ready"], value["problems"]) == (True, [])
    assert [n["name"] for n in value["nodes"]] == sorted(cluster.nodes())
    assert value["operator"]["leader"]


def test_a_command_on_a_node(cluster: Cluster, fimbria: Command) -> None:
    """Its output and its exit status are those of the command there."""
    for node in cluster.nodes():
        status = fimbria("status", "--node", node, "-o", "json")
        assert json.loads(status.stdout)["node"] == node
        assert fimbria("node", "get", node, f"--node={node}").stdout.splitlines()[0].endswith(f"{node} (this one)")
    node = cluster.nodes()[0]
    missing = fimbria("endpoint", "get", "no-such-pod", "--node", node)
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "no-such-pod" in missing.stderr
    assert fimbria("endpoint", "list", "--nonsense", "--node", node).returncode == 2
    maps = json.loads(fimbria("map", "dump", "ipcache", "--most", "2", "--node", node, "-o", "json").stdout)
    assert len(maps) == 2


def test_a_node_that_cannot_be_asked(fimbria: Command) -> None:
    done = fimbria("endpoint", "list", "--node", "node99")
    assert done.returncode == 2
    assert "There is no node 'node99'." in done.stderr
    done = fimbria("status", "--cluster", KUBECONFIG="/nonexistent")
    assert done.returncode == 2
    assert "can't read /nonexistent" in done.stderr.replace("Can't", "can't")


def monitors(cluster: Cluster, pod: str) -> int:
    """How many `fimbria monitor` run in an agent's container."""
    return int(cluster.kubectl("-n", SYSTEM, "exec", pod, "-c", "agent", "--", "python3", "-c", COUNT_MONITORS))


def test_monitor_on_a_node_ends_there_when_it_ends_here(cluster: Cluster, tmp_path: Path) -> None:
    """Kubernetes ends no command whose caller went away."""
    node = cluster.nodes()[0]
    agents = cluster.get("-n", SYSTEM, "pods", "-l", "k8s-app=fimbria", "--field-selector", f"spec.nodeName={node}")
    (pod,) = [p["metadata"]["name"] for p in agents["items"] if not p["metadata"].get("deletionTimestamp")]
    before = monitors(cluster, pod)
    done = interrupted(cluster, tmp_path, lambda: monitors(cluster, pod) == before + 1, "monitor", "--node", node)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    wait("it has ended there too", lambda: monitors(cluster, pod) == before, 30)


# --- sysdump ---------------------------------------------------------------------------------------------------------


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as package:
        assert package.testzip() is None
        return {n.partition("/")[2]: package.read(n) for n in package.namelist()}


def logs_of(cluster: Cluster, pod: str) -> str:
    try:
        return cluster.kubectl("-n", SYSTEM, "logs", pod, "--tail=50")
    except BedError:
        return ""  # not started yet


@pytest.fixture
def planted(cluster: Cluster, namespace: str) -> Iterator[str]:
    """Secrets wherever people leave them, in objects that an archive has."""
    noise = f"token={SECRET}\nAuthorization: Bearer {JWT}\n{PEM}\nurl https://me:{SECRET}@x/ AKIAHUNTER2HUNTER2XX\n"
    annotations = {"example.org/token": SECRET, "example.org/note": f"see https://u:{SECRET}@x.example/ {PEM}"}
    config = {"kubeconfig": f"users:\n- user:\n    token: {JWT}\n    client-key-data: {ENCODED}\n",
              "app.yaml": f"password: |\n  {SECRET}\nlisten: 80\n", "tls.key": PEM}  # fmt: skip
    container = {
        "name": "operator", "image": agent_image(cluster), "command": ["python3", "-c"],
        "args": [f"print({noise!r}, flush=True); import signal; signal.pause()", "--token", SECRET],
        "env": [{"name": "DB_PASSWORD", "value": SECRET}, {"name": "PLAIN", "value": f"password={SECRET}"}],
    }  # fmt: skip
    named = {"labels": OURS | {"app.kubernetes.io/name": "fimbria-operator"}, "annotations": annotations}
    objects = [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "fimt-secret", "namespace": SYSTEM, "labels": OURS},
         "stringData": {"password": SECRET}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "fimt-config", "namespace": SYSTEM} | named,
         "data": config},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "fimt-talks", "namespace": SYSTEM} | named,
         "spec": {"containers": [container], "terminationGracePeriodSeconds": 0, "hostNetwork": True,
                  "nodeName": cluster.nodes()[0]}},
        {"apiVersion": "v1", "kind": "Service",
         "metadata": {"name": "fimt-service", "namespace": namespace, "annotations": annotations},
         "spec": {"ports": [{"port": 80}]}},
        {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
         "metadata": {"name": "fimt-policy", "namespace": namespace, "annotations": annotations},
         "spec": {"podSelector": {}}},
        {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
         "metadata": {"name": "fimt-cnp", "namespace": namespace, "annotations": annotations},
         "spec": {"endpointSelector": {}, "description": f"password={SECRET}", "ingress": [{}]}},
        {"apiVersion": "v1", "kind": "Event", "metadata": {"name": "fimt-event", "namespace": namespace},
         "involvedObject": {"kind": "Pod", "namespace": namespace, "name": "x"}, "reason": "Failed", "type": "Warning",
         "message": f"pull with {JWT} and --password {SECRET} failed"},
    ]  # fmt: skip
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    node = cluster.nodes()[0]
    cluster.kubectl("apply", "-f", "-", stdin=text)  # which also leaves all of it in an annotation
    cluster.kubectl("annotate", "node", node, f"fimt/secret={SECRET}")
    try:
        wait("it talks", lambda: SECRET in logs_of(cluster, "fimt-talks"))
        yield namespace
    finally:
        cluster.kubectl("annotate", "node", node, "fimt/secret-")
        cluster.kubectl("delete", "--ignore-not-found", "--wait=false", "-f", "-", stdin=text)


def test_sysdump_has_everything_but_secrets(cluster: Cluster, fimbria: Command, planted: str, tmp_path: Path) -> None:
    done = fimbria("sysdump", "-o", "all.zip")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["all.zip"]
    found = contents(tmp_path / "all.zip")
    everything = b"\n".join(found.values())
    for there in ("fimt-config", "fimt-talks", "fimt-service", "fimt-policy", "fimt-cnp", "pull with"):
        assert there.encode() in everything, "what has the secrets is in it"
    assert b"fimt-talks" in b"".join(n.encode() for n in found if n.startswith("operator/"))
    for key in KEYS:
        assert not [n for n, data in found.items() if key.encode() in data], key
    assert not [n for n in found if "secrets" in n]
    assert b'"kind": "Secret"' not in everything
    for node in cluster.nodes():
        status = json.loads(found[f"nodes/{node}/status.json"])
        assert (status["node"], status["ready"]) == (node, True)
        for name in (
            "endpoints.json", "identities.json", "ipcache.json", "services.json", "policies.json", "nodes.json",
            "maps.json", "maps/ipcache.json", "plan.json", "metrics.txt", "settings.json", "version.json",
            "observer.json", "flows/dropped.ndjson", "kernel/version.txt", "kernel/cmdline.txt", "kernel/sysctl.txt",
            "network/links.json", "network/routes.json", "network/rules.json", "bpf/programs.json", "bpf/links.json",
            "bpf/features.json", "journal/journal.ndjson", "cni/05-fimbria.conflist", "logs/agent.log",
        ):  # fmt: skip
            assert f"nodes/{node}/{name}" in found, name
        assert json.loads(found[f"nodes/{node}/bpf/links.json"]), "the agent sees its own links"
    assert json.loads(found["kubernetes/version.json"])["gitVersion"] in found["README.md"].decode()
    assert {n["metadata"]["name"] for n in json.loads(found["kubernetes/nodes.json"])["items"]} == set(cluster.nodes())
    assert "ciliumnodes.cilium.io" in "".join(found)
    errors = json.loads(found["errors.json"])
    assert not [n for n in errors if not n.startswith("operator/fimt-talks")], errors


def test_sysdump_says_at_a_glance_what_is_unwell(
    cluster: Cluster, fimbria: Command, namespace: str, tmp_path: Path
) -> None:
    spec = {"endpointSelector": {}, "egress": [{"toFQDNs": [{"matchName": "example.org"}]}]}
    metadata = {"name": "odd", "namespace": namespace}
    policy = {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": metadata, "spec": spec}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(policy))
    node = cluster.nodes()[0]
    name = f"{namespace}/odd"
    wait("the agents say so", lambda: name in fimbria("policy", "list", "--node", node, "-o", "wide").stdout.replace(
        f"{namespace}   odd", name) or name in fimbria("status", "--node", node).stdout)  # fmt: skip
    done = fimbria("sysdump", "--quick", "--nodes", node, "-o", "one.zip")
    assert done.returncode == 0, done.stderr
    found = contents(tmp_path / "one.zip")
    unwell = found["README.md"].decode().partition("## Unwell")[2].partition("##")[0]
    assert name in unwell
    assert {n.split("/")[1] for n in found if n.startswith("nodes/")} == {node}
    assert not [n for n in found if "/maps/" in n]


def test_sysdump_that_is_interrupted_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    begun = lambda: bool(list(tmp_path.glob(".*.partial")))  # noqa: E731
    done = interrupted(cluster, tmp_path, begun, "sysdump")
    assert done.returncode == 130, done.stderr
    assert "nothing is left behind" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def allowed(cluster: Cluster, user: str, verb: str, resource: str) -> bool:
    try:
        return cluster.kubectl("auth", "can-i", verb, resource, f"--as={user}").strip() == "yes"
    except BedError:  # its way to say no
        return False


def reader(cluster: Cluster, namespace: str) -> str:
    """A kubeconfig of somebody who may look at objects, but neither run commands in pods nor read their logs."""
    cluster.kubectl("-n", namespace, "create", "serviceaccount", "reader")
    resources = "nodes,namespaces,pods,services,events,daemonsets.apps,deployments.apps,leases.coordination.k8s.io"
    cluster.kubectl("create", "clusterrole", f"fimt-{namespace}", "--verb=get,list", f"--resource={resources}")
    cluster.kubectl("create", "clusterrolebinding", f"fimt-{namespace}", f"--clusterrole=fimt-{namespace}",
                    f"--serviceaccount={namespace}:reader")  # fmt: skip
    user = f"system:serviceaccount:{namespace}:reader"
    wait("the API server knows of it", lambda: allowed(cluster, user, "list", "daemonsets.apps"))
    token = cluster.kubectl("-n", namespace, "create", "token", "reader").strip()
    config = json.loads(cluster.kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    config["users"] = [{"name": u["name"], "user": {"token": token}} for u in config["users"]]
    return json.dumps(config)


def test_sysdump_by_somebody_with_few_rights(
    cluster: Cluster, fimbria: Command, namespace: str, tmp_path: Path
) -> None:
    """What isn't allowed is named, and the rest is there."""
    try:
        (tmp_path / "config").write_text(reader(cluster, namespace))
        done = fimbria("sysdump", "-o", "few.zip", KUBECONFIG=str(tmp_path / "config"))
    finally:
        for kind in ("clusterrole", "clusterrolebinding"):
            cluster.kubectl("delete", kind, f"fimt-{namespace}", "--ignore-not-found")
    assert done.returncode == 0, done.stderr
    found = contents(tmp_path / "few.zip")
    errors = json.loads(found["errors.json"])
    for node in cluster.nodes():
        assert 'cannot create resource "pods/exec"' in errors[f"nodes/{node}/the agent"].replace(
            "cannot get", "cannot create"
        )
        assert "pods/log" in errors[f"nodes/{node}/logs/agent.log"]
    assert "networkpolicies" in errors["kubernetes/networkpolicies.networking.k8s.io.json"]
    assert json.loads(found["kubernetes/daemonsets.apps.json"])["items"]
    assert "couldn't be collected" in found["README.md"].decode()


# --- connectivity test -----------------------------------------------------------------------------------------------


def test_connectivity(cluster: Cluster, fimbria: Command) -> None:
    done = fimbria("connectivity", "test", "-o", "json")
    assert done.returncode == 0, done.stderr + done.stdout
    value = json.loads(done.stdout)
    assert value["failed"] == 0
    assert {r["family"] for r in value["results"]} == {4, 6}
    assert {r["check"].partition(":")[0] for r in value["results"]} >= {
        "name of a service", "name of a headless service", "service, by its name", "service, session affinity",
        "service, both backends are used", "service of the API server", "host port of another node",
        "CiliumNetworkPolicy", "default deny", "node port of another node, from a node",
    }  # fmt: skip
    assert value["namespace"] not in cluster.kubectl("get", "namespaces")


def test_connectivity_names_the_rule_behind_a_failure(cluster: Cluster, fimbria: Command) -> None:
    cluster.kubectl("apply", "-f", "-", stdin=SABOTEUR)
    try:
        done = fimbria("connectivity", "test", "--no-policies")
    finally:
        cluster.kubectl("delete", "-f", "-", stdin=SABOTEUR)
    assert done.returncode == 1, done.stderr + done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("✗")]
    assert rows
    assert all("plain -> " in row for row in rows), "only what is broken"
    why = [line for line in done.stdout.splitlines() if line.strip().startswith("plain -> pod near (TCP IPv4)")]
    assert why and "dropped on" in why[0] and "CiliumClusterwideNetworkPolicy fimt-saboteur" in why[0], done.stdout


def test_connectivity_that_is_interrupted_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    name = "fimt-interrupted"
    there = lambda: name in cluster.kubectl("get", "namespaces", "-o", "name")  # noqa: E731
    done = interrupted(cluster, tmp_path, there, "connectivity", "test", "--namespace", name)
    assert done.returncode == 130, done.stderr
    assert "what was created has been removed" in done.stderr
    assert not there()


@pytest.mark.long
def test_connectivity_where_pods_are_restricted(cluster: Cluster, fimbria: Command) -> None:
    """The namespace enforces the Pod Security Standard "restricted"."""
    done = fimbria("connectivity", "test", "--no-host", "-o", "json")
    assert done.returncode == 0, done.stderr + done.stdout
    assert not [r for r in json.loads(done.stdout)["results"] if r["client"] == "host"]


def test_connectivity_that_cannot_be_run(cluster: Cluster, fimbria: Command) -> None:
    for words, text in (
        (("--nodes", "node99"), "there is no node node99"),
        (("--namespace", SYSTEM), f"namespace {SYSTEM} exists already"),
    ):
        done = fimbria("connectivity", "test", *words)
        assert done.returncode == 2, done.stderr
        assert text in done.stderr
    for patience in (5, 20, 60):  # kubelet must have come to the image: on a busy machine it takes longer
        done = fimbria("connectivity", "test", "--image", "localhost/no/such:1", "--timeout", str(patience))
        assert done.returncode == 2, done.stderr
        if "ErrImage" in done.stderr:
            break
    assert "ErrImage" in done.stderr
    assert SYSTEM in cluster.kubectl("get", "namespaces")


def test_the_probers_program_fits_a_command_line() -> None:
    assert len(prober()) < 32_000
