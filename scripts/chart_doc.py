"""Writes what describes the Helm chart's values from the values themselves: `.venv/bin/python scripts/chart_doc.py`.

deploy/fimbria/values.yaml          is the source: names, defaults, and a comment on each
deploy/fimbria/values.schema.json   what Helm checks: types by the defaults, choices by the components' settings
docs/helm.md                        the table for people

tests/unit/test_chart.py fails when one of the files isn't what this makes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import yaml

from fimbria.agent.config import LOG_LEVELS, RANGES, AgentConfig
from fimbria.compute.maglev import TABLE_SIZES

ROOT: Final = Path(__file__).parent.parent
CHART: Final = ROOT / "deploy" / "fimbria"
SCHEMA: Final = CHART / "values.schema.json"
PAGE: Final = ROOT / "docs" / "helm.md"
HEAD: Final = """\
# The Helm chart

<!-- Written by scripts/chart_doc.py; a test compares. Change deploy/fimbria/values.yaml, then run the script. -->

`deploy/fimbria` installs the agents (a DaemonSet), the operator (a Deployment), their roles and the custom resource
definitions. [Installation](installation.md) leads through it. `helm` checks values before anything is touched: an
unknown name or a value out of range is refused. Names are those of Cilium's chart where the meaning is the same.

No image is published yet: `deploy/Dockerfile` builds it (its first lines say how), and it has to be where nodes can
fetch it.

```console
$ helm install --namespace kube-system --set k8sServiceHost=192.0.2.10 \\
    --set image.repository=REGISTRY/fimbria fimbria ./deploy/fimbria
```

Upgrades keep your values by `--reset-then-reuse-values`. `--reuse-values` would also keep the former chart's defaults,
so that values that are new in this one are missing: Helm says which (`missing property`), and changes nothing.

Settings without a value of their own go into `extraConfig` (agents) and `operator.extraConfig`, by their names in
[settings](settings.md) without the dashes; they are checked as well:

```yaml
extraConfig:
  conntrack-entries: 1000000
operator:
  extraConfig:
    identity-grace: 1800
```

"""
# What Kubernetes defines, and the API server checks.
OPAQUE: Final = (
    "resources",
    "updateStrategy",
    "nodeSelector",
    "tolerations",
    "affinity",
    "podLabels",
    "podAnnotations",
    "annotations",
    "imagePullSecrets",
    "seLinuxOptions",
)
LIMITS: Final = ("minimum", "maximum")
PORT: Final = {"type": "integer", "minimum": 1, "maximum": 65535}
MASK: Final = {"type": "integer", "minimum": 1, "maximum": 128}
PATH: Final = {"type": "string", "pattern": "^/"}
STRINGS: Final = {"type": "array", "items": {"type": "string"}}
NAMES: Final = {"type": "array", "items": {"type": "string", "pattern": "^[A-Z_]+$"}, "uniqueItems": True}
PORTS: Final = {"type": "string", "pattern": "^[0-9]+-[0-9]+$"}
LISTEN: Final = {"type": "string", "pattern": "^$|:[0-9]+$"}
CIDRS: Final = {"type": "array", "items": {"type": "string", "pattern": "^[0-9a-fA-F.:]+/[0-9]+$"}}
CONSTRAINTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "k8sServiceHost": {"type": "string", "pattern": "^[a-zA-Z0-9.:-]*$"},
    "k8sServicePort": PORT,
    "image.digest": {"type": "string", "pattern": "^$|^sha256:[0-9a-f]{64}$"},
    "image.pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    "cluster.name": {"type": "string", "minLength": 1},
    "routingMode": {"enum": ["tunnel", "native"]},
    "tunnelPort": PORT,
    "MTU": {"type": "integer", "minimum": 0, "maximum": 65535},
    "devices": STRINGS,
    "masquerade.ports": PORTS,
    "nodePort.range": PORTS,
    "identityManagementMode": {"enum": ["agent", "operator"]},
    "ipam.mode": {"enum": ["cluster-pool"]},
    "ipam.operator.clusterPoolIPv4PodCIDRList": CIDRS,
    "ipam.operator.clusterPoolIPv6PodCIDRList": CIDRS,
    "ipam.operator.clusterPoolIPv4MaskSize": {"type": "integer", "minimum": 1, "maximum": 32},
    "ipam.operator.clusterPoolIPv6MaskSize": MASK,
    "loadBalancer.mode": {"enum": ["snat", "dsr", "hybrid"]},
    "loadBalancer.algorithm": {"enum": ["random", "maglev"]},
    "loadBalancer.acceleration": {"enum": ["disabled", "native", "best-effort", "generic"]},
    "maglev.tableSize": {"enum": list(TABLE_SIZES)},
    "kubeProxyReplacementHealthzBindAddr": LISTEN,
    "bpf.root": PATH,
    "bpf.mapDynamicSizeRatio": {"type": "number", **dict(zip(LIMITS, RANGES["map_memory_ratio"], strict=True))},
    "cgroup.hostRoot": PATH,
    "cni.binPath": PATH,
    "cni.confPath": PATH,
    "logLevel": {"enum": list(LOG_LEVELS)},
    "healthPort": PORT,
    "prometheus.port": PORT,
    "agentNotReadyTaintKey": {"type": "string", "pattern": "^([a-z0-9.-]+/)?[A-Za-z0-9._-]+$"},
    "securityContext.capabilities.agent": NAMES,
    "securityContext.capabilities.prepare": NAMES,
    "securityContext.capabilities.observer": NAMES,
    "operator.replicas": {"type": "integer", "minimum": 1},
    "operator.healthPort": PORT,
    "operator.prometheus.port": PORT,
    "operator.podDisruptionBudget.maxUnavailable": {"type": ["integer", "string"]},
    "terminationGracePeriodSeconds": {"type": "integer", "minimum": 0},
}  # fmt: skip
# Not the chart's to offer: they are where its volumes are, or say who the pod is.
WITHHELD: Final = ("node-name", "kubeconfig", "run-dir")


@dataclass(frozen=True, slots=True)
class Value:
    """One value: its path, what the file says about it, and its default."""

    path: str
    text: str
    default: Any


def values() -> list[Value]:
    """Every value of values.yaml, in the file's order. Raises ValueError for one without a comment."""
    text = (CHART / "values.yaml").read_text()
    comments = dict(_comments(text))
    found = [Value(p, comments.get(p, ""), d) for p, d in _leaves(yaml.safe_load(text))]
    silent = [v.path for v in found if not v.text]
    if silent:
        raise ValueError(f"values.yaml says nothing about {', '.join(silent)}")
    return found


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value and key not in OPAQUE:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _comments(text: str) -> Iterator[tuple[str, str]]:
    """Path and comment of every key that has one right above it."""
    stack: list[tuple[int, str]] = []
    said: list[str] = []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("#"):
            said.append(stripped[1:].strip())
            continue
        key = re.match(r"^( *)([A-Za-z0-9]+):", line)
        if key is not None:
            indent = len(key[1])
            stack = [(i, k) for i, k in stack if i < indent] + [(indent, key[2])]
            if said:
                yield ".".join(k for _, k in stack), " ".join(said)
        said = []


# --- the schema -------------------------------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """The JSON schema (draft 7) that Helm checks values by."""
    tree: dict[str, Any] = _object()
    for value in values():
        at = tree
        *parents, name = value.path.split(".")
        for parent in parents:
            if parent not in at["properties"]:
                # A former chart's values (--reuse-values) lack what is new: better told so than by a template.
                at["properties"][parent] = _object()
                at.setdefault("required", []).append(parent)
            at = at["properties"][parent]
        at["properties"][name] = {"description": value.text, **_shape(value)}
    tree["properties"]["global"] = {"description": "What Helm hands to a chart within another.", "type": "object"}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **tree}


def _object() -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def _shape(value: Value) -> Mapping[str, Any]:
    if value.path in CONSTRAINTS:
        return CONSTRAINTS[value.path]
    if value.path == "extraConfig":
        return {**_object(), "properties": agent_settings()}
    if value.path == "operator.extraConfig":
        return {**_object(), "properties": operator_settings()}
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return {"type": kinds[type(value.default)]}


def set_by_chart(component: str) -> set[str]:
    """Settings that the chart's templates give a component, by their names without dashes."""
    text = (CHART / "templates" / "_helpers.tpl").read_text()
    part = text.partition(f'{{{{- define "fimbria.{component}.arguments"')[2].partition("{{- end -}}")[0]
    return set(re.findall(r'^  "([a-z0-9-]+)" ', part, re.MULTILINE))


def agent_settings() -> dict[str, Any]:
    """Schemas of the agent's settings that have no value of their own."""
    taken = set_by_chart("agent") | set(WITHHELD)
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
    found: dict[str, Any] = {}
    for f in fields(AgentConfig):
        name = f.name.replace("_", "-")
        if name not in taken:
            limits = dict(zip(LIMITS, RANGES.get(f.name, ()), strict=False))
            found[name] = {"type": kinds[type(f.default)], **limits}
    return found


def operator_settings() -> dict[str, Any]:
    """The same for the operator: numbers by their defaults, switches, and texts."""
    from settings_doc import help_rows

    from fimbria.operator import config

    taken = set_by_chart("operator") | set(WITHHELD)
    found: dict[str, Any] = {}
    for option, _, default, _ in help_rows(config.parse, True):
        name = option.partition("`, `")[0].strip("`").removeprefix("--")
        if name in taken:
            continue
        if "--no-" in option:
            found[name] = {"type": "boolean"}
        elif re.fullmatch(r"`[0-9.]+`", default):
            found[name] = {"type": "number"}
        else:
            found[name] = {"type": "string"}
    return found


# --- the page ---------------------------------------------------------------------------------------------------------


def page() -> str:
    """docs/helm.md."""
    lines = ["| value | default | what it is |", "| --- | --- | --- |"]
    lines += [f"| `{v.path}` | {_shown(v.default)} | {v.text.replace('|', chr(92) + '|')} |" for v in values()]
    return HEAD + "\n".join(lines) + "\n"


def _shown(default: Any) -> str:
    if default == "":
        return ""
    return f"`{json.dumps(default)}`" if isinstance(default, (dict, list, bool)) else f"`{default}`"


def schema_text() -> str:
    """values.schema.json."""
    return json.dumps(schema(), indent=1) + "\n"


if __name__ == "__main__":
    SCHEMA.write_text(schema_text())
    PAGE.write_text(page())
    print(SCHEMA, PAGE, sep="\n")
