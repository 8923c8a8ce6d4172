"""The chart as Helm renders it: the real API server takes every manifest, and the components take every argument."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from fimbria.agent import config as agent
from fimbria.operator import config as operator

CHART = Path(__file__).resolve().parents[2] / "deploy" / "fimbria"
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


def render(tools: Path, env: dict[str, str], values: dict[str, Any], chart: Path = CHART) -> str:
    told = yaml.safe_dump(values)
    return helm(tools, env, "template", "fimbria", str(chart), "-n", "kube-system", "-f", "-", stdin=told)


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
