"""The chart as Helm renders it: the real API server takes every manifest, and the components take every argument."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from fimbria.agent import config as agent
from fimbria.operator import config as operator
from fimbria.sources.k8s.rows import NODE_ANNOTATION

CHART = Path(__file__).resolve().parents[2] / "deploy" / "fimbria"
AGENT = "system:serviceaccount:kube-system:fimbria"
POLICY = "ValidatingAdmissionPolicy"
ALL = {
    "k8sServiceHost": "fd00::1",
    "image": {"digest": f"sha256:{'0' * 64}"},
    "imagePullSecrets": [{"name": "registry"}],
    "routingMode": "native",
    "devices": ["eth0", "eth1"],
    "ipv6": {"enabled": True},
    "loadBalancer": {"mode": "hybrid", "algorithm": "maglev", "acceleration": "best-effort"},
    "socketLB": {"hostNamespaceOnly": True},
    "identityManagementMode": "operator",
    "ciliumEndpointSlice": {"enabled": True},
    "extraConfig": {"conntrack-entries": 1000000, "fast-path": False, "audit-interval": 2.5},
    "prometheus": {"enabled": True},
    "affinity": {"nodeAffinity": {}},
    "podLabels": {"a": "b"},
    "podAnnotations": {"c": "d"},
    "operator": {
        "replicas": 3,
        "extraConfig": {"identity-grace": 60},
        "prometheus": {"enabled": True},
        "podLabels": {"a": "b"},
        "podAnnotations": {"c": "d"},
        "affinity": {"podAntiAffinity": {}},
    },
    "serviceAccounts": {"agent": {"annotations": {"e": "f"}}},
}
LITTLE = {
    "observer": {"enabled": False},
    "bpf": {"autoMount": {"enabled": False}},
    "cgroup": {"autoMount": {"enabled": False}, "hostRoot": "/sys/fs/cgroup"},
    "cni": {"install": False, "exclusive": False},
    "masquerade": {"enabled": False},
    "socketLB": {"enabled": False},
    "kubeProxyReplacementHealthzBindAddr": "",
    "crds": {"install": False},
    "admissionPolicy": {"enabled": False},
    "operator": {
        "replicas": 1,
        "removeNodeTaints": False,
        "setNodeTaints": False,
        "setNodeNetworkStatus": False,
        "podDisruptionBudget": {"enabled": False},
    },
    "serviceAccounts": {"agent": {"create": False}, "operator": {"create": False}},
}
V6 = {"ipv4": {"enabled": False}, "ipv6": {"enabled": True}, "kubeProxyReplacementHealthzBindAddr": "[::]:10256"}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all": ALL,
    "little": LITTLE,
    "ipv6": V6,
    "privileged": {"securityContext": {"privileged": True}},
    "cleanup": {"cleanup": {"enabled": True}},
    "strategies": {"updateStrategy": {"type": "OnDelete"}, "operator": {"updateStrategy": {"type": "Recreate"}}},
    "no SELinux": {"securityContext": {"seLinuxOptions": None}},
}


def load(name: str) -> ModuleType:
    """A module of this folder (tests are no package here)."""
    spec = importlib.util.spec_from_file_location(f"fimbria_chart_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tools() -> Path:
    found: Path = load("build").ensure(("helm", "kubectl", "kube-apiserver"))
    return found


@pytest.fixture(scope="module")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with load("realserver").real_apiserver(tmp_path_factory.mktemp("chart")) as path:
        yield path


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}


def helm(tools: Path, env: dict[str, str], *arguments: str, stdin: str = "", code: int = 0) -> str:
    done = subprocess.run(
        [tools / "helm", *arguments], env=env, input=stdin, text=True, capture_output=True, check=False, timeout=60
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def render(tools: Path, env: dict[str, str], values: dict[str, Any], chart: Path = CHART, *words: str) -> str:
    told = yaml.safe_dump(values)
    return helm(tools, env, "template", "fimbria", str(chart), "-n", "kube-system", *words, "-f", "-", stdin=told)


def objects(text: str) -> dict[tuple[str, str], dict[str, Any]]:
    """By kind and name."""
    return {(o["kind"], o["metadata"]["name"]): o for o in yaml.safe_load_all(text) if o}


@pytest.mark.parametrize("case", CASES)
def test_the_api_server_takes_it(case: str, tools: Path, home: dict[str, str], kubeconfig: Path) -> None:
    """Validated on the server, unknown and doubled fields refused, without being stored."""
    text = render(tools, home, CASES[case])
    done = subprocess.run(
        [tools / "kubectl", "--kubeconfig", kubeconfig, "apply", "--dry-run=server", "--validate=strict", "-f", "-"],
        env=home, input=text, text=True, capture_output=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert done.stdout.count("dry run") == len(objects(text))


@pytest.mark.parametrize("case", [c for c in CASES if c != "cleanup"])
def test_components_take_their_arguments(case: str, tools: Path, home: dict[str, str]) -> None:
    made = objects(render(tools, home, CASES[case]))
    containers = made["DaemonSet", "fimbria"]["spec"]["template"]["spec"]["containers"]
    (told,) = [c["args"] for c in containers if c["name"] == "agent"]
    found = agent.parse(told, {"FIMBRIA_NODE_NAME": "n"})
    (container,) = made["Deployment", "fimbria-operator"]["spec"]["template"]["spec"]["containers"]
    also = operator.parse(container["args"], {})
    assert also.leader_elect
    assert (found.identity_allocation, found.label_filter) == (also.identity_allocation, also.label_filter)
    if case == "all":
        assert (found.conntrack_entries, found.fast_path, found.audit_interval) == (1000000, False, 2.5)
        assert (found.routing, found.xdp, found.forwarding) == ("native", "best-effort", "hybrid")
        assert (also.identity_grace, also.metrics_listen) == (60, ":9963")
    if case == "ipv6":
        assert [p.network.v4 for p in also.pools] == [False]


@pytest.mark.parametrize("case", [c for c in CASES if c != "cleanup"])
def test_the_nodes_preparation_takes_its_arguments(case: str, tools: Path, home: dict[str, str]) -> None:
    spec = objects(render(tools, home, CASES[case]))["DaemonSet", "fimbria"]["spec"]["template"]["spec"]
    containers = spec.get("initContainers", [])
    assert bool(containers) is (case != "little"), "nothing to prepare"
    for container in containers:
        _parses([*container["command"][1:], *container["args"]])


def test_cleaning_up_takes_its_arguments(tools: Path, home: dict[str, str]) -> None:
    made = objects(render(tools, home, CASES["cleanup"]))
    (container,) = made["DaemonSet", "fimbria"]["spec"]["template"]["spec"]["containers"]
    _parses([*container["command"][1:], *container["args"]])
    assert ("Deployment", "fimbria-operator") not in made


def _parses(words: list[str]) -> None:
    from fimbria.cli.main import fimbria

    command = fimbria.get_command(fimbria.make_context("fimbria", [], resilient_parsing=True), words[0])
    assert command is not None
    command.make_context(words[0], list(words[1:]))


def test_definitions_survive_an_uninstallation_and_an_upgrade_changes_them(tools: Path, home: dict[str, str]) -> None:
    from fimbria.lab.cluster import definitions

    made = {n: o for (k, n), o in objects(render(tools, home, {})).items() if k == "CustomResourceDefinition"}
    originals = {m.value["metadata"]["name"]: m.value for m in definitions()}
    assert made.keys() == originals.keys()
    for name, definition in originals.items():
        found = made[name]
        assert found["spec"] == definition["spec"]
        assert found["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_a_package_is_the_folder(tools: Path, home: dict[str, str], tmp_path: Path) -> None:
    """The link to the definitions is followed."""
    helm(tools, home, "package", str(CHART), "-d", str(tmp_path))
    (package,) = tmp_path.glob("fimbria-*.tgz")
    assert render(tools, home, {}, package) == render(tools, home, {})


@pytest.mark.parametrize("version", ["1.30.0", "1.31.0", "1.36.3-gke.100"])
def test_the_policy_is_there_without_a_server_to_ask(version: str, tools: Path, home: dict[str, str]) -> None:
    made = objects(render(tools, home, {}, CHART, "--kube-version", version))
    assert (f"{POLICY}Binding", "fimbria-agents") in made
    rules = json.dumps(made[POLICY, "fimbria-agents"])
    assert ("isCIDR" in rules) is (version != "1.30.0"), "the server doesn't know cidr() before 1.31"


def test_a_cluster_without_policies_is_refused(tools: Path, home: dict[str, str]) -> None:
    words = ("template", "f", str(CHART), "--kube-version", "1.29.9")
    assert "chart requires kubeVersion: >= 1.30.0-0" in helm(tools, home, *words, code=1)


@pytest.mark.parametrize(
    ("version", "enabled", "said"),
    [("1.30.5", True, "1.30.5 is too old for one rule"), ("1.31.0", True, ""), ("1.36.0", False, "is false: whoever")],
)
def test_notes_say_what_the_policy_lacks(
    version: str, enabled: bool, said: str, tools: Path, home: dict[str, str], tmp_path: Path
) -> None:
    """Helm shows notes of a server's version only: here they are a manifest."""
    chart = shutil.copytree(CHART, tmp_path / "chart")
    text = (chart / "templates" / "NOTES.txt").read_text()
    manifest = '{{ end }}\nkind: Notes\nmetadata: {name: notes}\ntext: {{ include "notes" . | toJson }}\n'
    (chart / "templates" / "notes.yaml").write_text('{{ define "notes" }}' + text + manifest)
    values = {"admissionPolicy": {"enabled": enabled}}
    notes = objects(render(tools, home, values, chart, "--kube-version", version))["Notes", "notes"]["text"]
    assert "Wait until every node has its agent" in notes
    found = [text for text in ("is too old for one rule", "admissionPolicy.enabled is false") if text in notes]
    assert len(found) == bool(said) and said in notes


@pytest.mark.parametrize("case", CASES)
def test_selinux_lets_all_containers_of_a_node_work(case: str, tools: Path, home: dict[str, str]) -> None:
    spec = objects(render(tools, home, CASES[case]))["DaemonSet", "fimbria"]["spec"]["template"]["spec"]
    wanted = None if case == "no SELinux" else {"type": "spc_t", "level": "s0"}
    assert spec["securityContext"].get("seLinuxOptions") == wanted
    containers = [*spec.get("initContainers", []), *spec["containers"]]
    assert not [c["name"] for c in containers if "seLinuxOptions" in c["securityContext"]], "these would win"


def test_strategies_other_than_the_default(tools: Path, home: dict[str, str]) -> None:
    """The API server refuses a Deployment that is recreated with the default's rollingUpdate, which Helm merges."""
    made = objects(render(tools, home, CASES["strategies"]))
    assert made["DaemonSet", "fimbria"]["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert made["Deployment", "fimbria-operator"]["spec"]["strategy"] == {"type": "Recreate"}


def test_lint(tools: Path, home: dict[str, str]) -> None:
    helm(tools, home, "lint", "--strict", str(CHART))


def test_rendering_is_deterministic(tools: Path, home: dict[str, str]) -> None:
    assert render(tools, home, ALL) == render(tools, home, ALL)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"surprise": 1}, "additional properties 'surprise' not allowed"),
        ({"operator": {"replica": 3}}, "additional properties 'replica' not allowed"),
        ({"k8sServicePort": 70000}, "maximum: got 70,000, want 65,535"),
        ({"extraConfig": {"routing": "native"}}, "additional properties 'routing' not allowed"),
        ({"extraConfig": {"conntrack-entries": -1}}, "minimum: got -1, want 0"),
        ({"operator": {"extraConfig": {"collect-interval": "often"}}}, "got string, want number"),
        ({"maglev": {"tableSize": 1000}}, "value must be one of"),
        ({"admissionPolicy": None}, "missing property 'admissionPolicy'"),
        ({"operator": {"podDisruptionBudget": None}}, "at '/operator': missing property 'podDisruptionBudget'"),
        ({"ipam": {"operator": {"clusterPoolIPv4PodCIDRList": ["10.0.0.0"]}}}, "does not match pattern"),
    ],
)
def test_bad_values(values: dict[str, Any], said: str, tools: Path, home: dict[str, str]) -> None:
    told = yaml.safe_dump(values)
    assert said in helm(tools, home, "template", "f", str(CHART), "-f", "-", stdin=told, code=1)


def test_what_is_switched_off_is_not_granted(tools: Path, home: dict[str, str]) -> None:
    made = objects(render(tools, home, LITTLE))
    rules = made["ClusterRole", "fimbria-operator"]["rules"]
    assert not [r for r in rules if "nodes" in r["resources"] and {"patch", "watch"} & set(r["verbs"])]
    spec = made["DaemonSet", "fimbria"]["spec"]["template"]["spec"]
    assert "initContainers" not in spec
    some = objects(render(tools, home, LITTLE | {"cni": {"install": True}}))["DaemonSet", "fimbria"]
    (prepare,) = some["spec"]["template"]["spec"]["initContainers"]
    assert prepare["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert [c["name"] for c in spec["containers"]] == ["agent"]
    assert not {v["name"] for v in spec["volumes"]} & {"proc", "cni-conf", "cni-bin"}


def _kubectl(tools: Path, env: dict[str, str], kubeconfig: Path, *words: str, stdin: str = "") -> tuple[int, str]:
    command = [str(tools / "kubectl"), "--kubeconfig", str(kubeconfig), *words]
    done = subprocess.run(command, env=env, input=stdin, text=True, capture_output=True, check=False, timeout=60)
    return done.returncode, done.stdout + done.stderr


def _as_agent(kubeconfig: Path, node: str, path: Path) -> Path:
    """The same server as the agent of a node; of none, if empty."""
    config = yaml.safe_load(kubeconfig.read_text())
    config["users"][0]["user"] |= {"as": AGENT}
    if node:
        config["users"][0]["user"]["as-user-extra"] = {"authentication.kubernetes.io/node-name": [node]}
    path.write_text(yaml.safe_dump(config))
    path.chmod(0o600)
    return path


def _report(name: str, node: str, identity: int = 1000) -> str:
    meta: dict[str, Any] = {"name": name, "namespace": "default"}
    if node:
        meta["annotations"] = {NODE_ANNOTATION: node}
    body = {"apiVersion": "cilium.io/v2", "kind": "CiliumEndpoint", "metadata": meta}
    return yaml.safe_dump(body | {"status": {"identity": {"id": identity}}})


@pytest.fixture(scope="module")
def admission(
    tools: Path, kubeconfig: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[int, str]]:
    """The chart's rights and policy at work: kubectl as the agent of a node."""
    folder = tmp_path_factory.mktemp("agents")
    env = {"HOME": str(folder), "PATH": "/usr/bin:/bin"}
    rights = (("ClusterRole", "fimbria"), ("ClusterRoleBinding", "fimbria"))
    chart = objects(render(tools, env, {"ipv6": {"enabled": True}}))
    made = [o for key, o in chart.items() if key in rights or key[0].startswith(POLICY)]
    assert len(made) == 4
    for words, stdin in (
        (("apply", "-f", str(CHART.parents[1] / "src" / "fimbria" / "crds")), ""),
        (("wait", "--for=condition=Established", "crd", "--all"), ""),
        (("apply", "-f", "-"), yaml.safe_dump_all(made)),
    ):
        code, said = _kubectl(tools, env, kubeconfig, *words, stdin=stdin)
        assert code == 0, said

    def run(node: str, *words: str, stdin: str = "") -> tuple[int, str]:
        config = kubeconfig if node == "admin" else _as_agent(kubeconfig, node, folder / f"{node}.kubeconfig")
        return _kubectl(tools, env, config, *words, stdin=stdin)

    # The API server takes a moment to learn about policies.
    deadline = time.monotonic() + 30
    early = ("create", "--dry-run=server", "-f", "-")
    while "of its own node only" not in (said := run("node1", *early, stdin=_report("early", "node2"))[1]):
        assert time.monotonic() < deadline, f"the policy isn't at work: {said}"
        time.sleep(0.1)
    return run


def test_an_agent_reports_pods_of_its_node_only(admission: Callable[..., tuple[int, str]]) -> None:
    told = "may write CiliumEndpoints of its own node only"

    def allowed(node: str, *words: str, stdin: str = "") -> None:
        code, said = admission(node, *words, stdin=stdin)
        assert code == 0, said

    def refused(node: str, *words: str, stdin: str = "", why: str = told) -> None:
        code, said = admission(node, *words, stdin=stdin)
        assert code != 0 and why in said and f"agent of node {node or '?'} " in said, said

    def change(body: dict[str, Any]) -> tuple[str, ...]:
        return ("patch", "ciliumendpoint", "p", "--type=merge", "--patch", json.dumps(body))

    make = ("create", "-f", "-")
    mark = {"metadata": {"annotations": {NODE_ANNOTATION: "node2"}}}
    identity = {"status": {"identity": {"id": 2000}}}
    refused("node1", *make, stdin=_report("p", "node2"), why=f"{told}, not p of node2")
    refused("node1", *make, stdin=_report("p", ""))
    refused("", *make, stdin=_report("p", "node1"))
    refused("", *make, stdin=_report("p", ""))
    allowed("node1", *make, stdin=_report("p", "node1"))
    allowed("admin", *change({"metadata": {"labels": {"somebody": "else"}, "annotations": {"his": "own"}}}))
    refused("node2", *change(identity), why=f"{told}, not p of node1")
    refused("node2", *change(identity | mark), why=f"{told}, not p of node1")
    refused("node2", "delete", "ciliumendpoint", "p", why=f"{told}, not p of node1")
    refused("", "delete", "ciliumendpoint", "p")
    refused("node1", *change(mark))
    refused("node1", *change({"metadata": {"annotations": None}}))
    owner = {"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "00000000-0000-0000-0000-000000000001"}
    allowed("node1", *change(identity | {"metadata": {"ownerReferences": [owner]}}))
    code, said = admission("admin", "get", "ciliumendpoint", "p", "-o", "json")
    meta = json.loads(said)["metadata"]
    assert code == 0 and meta["labels"] == {"somebody": "else"}
    assert meta["annotations"] == {"his": "own", NODE_ANNOTATION: "node1"}
    allowed("node1", "delete", "ciliumendpoint", "p")
    # Nobody's, as what another plugin left: whose pod it is may take it over.
    allowed("admin", *make, stdin=_report("p", ""))
    refused("node1", *change(identity))
    allowed("node2", *change(mark | identity))
    refused("node1", *change(identity))
    allowed("admin", "delete", "ciliumendpoint", "p")


def test_an_agent_asks_for_blocks_of_the_pools_only(admission: Callable[..., tuple[int, str]]) -> None:
    """The object of a running node was deleted; the chart's pools are 10.244.0.0/16 and fd00:10:244::/56."""

    def ask(*blocks: str, node: str = "node1", user: str = "node1") -> tuple[int, str]:
        spec = {"ipam": {"podCIDRs": list(blocks)} if blocks else {}}
        body = {"apiVersion": "cilium.io/v2", "kind": "CiliumNode", "metadata": {"name": node}, "spec": spec}
        return admission(user, "create", "--dry-run=server", "-f", "-", stdin=yaml.safe_dump(body))

    for blocks in (
        (),
        ("10.244.7.0/24",),
        ("10.244.7.0/24", "10.244.255.0/24"),
        ("10.244.7.0/24", "fd00:10:244:7::/64"),
    ):
        code, said = ask(*blocks)
        assert code == 0, said
    inside = "10.244.0.0/16 10.244.7.0/25 10.244.0.0/23 fd00:10:244::/56 fd00:10:244::/65"
    outside = "10.245.0.0/24 10.99.0.0/24 fd00:10:244:100::/64 0.0.0.0/0 ::/0"
    odd = "10.244.7.1/24 fd00:10:244:7::1/64 ::ffff:10.244.7.0/120 10.244.7.0 moon"
    for block in (*inside.split(), *outside.split(), *odd.split(), ""):
        for blocks in ((block,), ("10.244.7.0/24", block)):
            code, said = ask(*blocks)
            assert code != 0 and "may ask for blocks out of the pools only" in said, (blocks, said)
    code, said = ask("10.245.0.0/24", user="admin")
    assert code == 0, said
