"""The chart's files agree with each other and with the components. What needs Helm is in tests/kube/test_chart.py."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from fimbria.agent.config import AgentConfig
from fimbria.operator.taints import AGENT_PODS, AGENTS
from fimbria.release import RELEASE

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "fimbria"
TEMPLATES = CHART / "templates"


@pytest.fixture(scope="module")
def doc() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("fimbria_chart_doc", ROOT / "scripts" / "chart_doc.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_schema_and_page_are_current(doc: ModuleType) -> None:
    assert (CHART / "values.schema.json").read_text() == doc.schema_text(), "run scripts/chart_doc.py"
    assert (ROOT / "docs" / "helm.md").read_text() == doc.page(), "run scripts/chart_doc.py"


def test_versions_are_the_release() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == RELEASE


def test_every_value_is_used(doc: ModuleType) -> None:
    """A name in values.yaml that no template reads would do nothing, quietly."""
    text = "".join(p.read_text() for p in TEMPLATES.iterdir())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def unused(node: dict[str, Any], prefix: str) -> list[str]:
        found = []
        for key, value in node.items():
            # Some are read below a `with`, by the end of their path.
            if not re.search(rf"\.{key}\b", text):
                found.append(prefix + key)
            elif isinstance(value, dict) and key not in doc.OPAQUE:
                found += unused(value, f"{prefix}{key}.")
        return found

    # Service accounts are read by the name of their component.
    assert [p for p in unused(values, "") if p not in ("serviceAccounts.agent", "serviceAccounts.operator")] == []


def test_every_setting_of_the_agent_can_be_reached(doc: ModuleType) -> None:
    known = {f.name.replace("_", "-") for f in fields(AgentConfig)}
    by_value, by_name = doc.set_by_chart("agent"), set(doc.agent_settings())
    assert by_value <= known, f"the chart sets what the agent doesn't know: {by_value - known}"
    assert by_value | by_name | set(doc.WITHHELD) == known
    assert not by_value & by_name


def test_every_setting_of_the_operator_is_known(doc: ModuleType) -> None:
    settings_doc = importlib.import_module("settings_doc")
    from fimbria.operator import config

    rows = settings_doc.help_rows(config.parse, True)
    known = {option.partition("`, `")[0].strip("`").removeprefix("--") for option, *_ in rows}
    assert doc.set_by_chart("operator") <= known
    assert doc.set_by_chart("operator") | set(doc.operator_settings()) | {"kubeconfig"} == known


def test_definitions_have_no_second_copy() -> None:
    link = CHART / "files" / "crds"
    assert link.is_symlink() and not Path(link.readlink()).is_absolute()
    assert link.resolve() == ROOT / "src" / "fimbria" / "crds"


def test_each_rule_of_the_roles_says_what_it_is_for() -> None:
    for name in ("rbac-agent.yaml", "rbac-operator.yaml"):
        lines = [line.strip() for line in (TEMPLATES / name).read_text().splitlines()]
        above = ""
        for line in lines:
            if line.startswith("- apiGroups"):
                # One comment may stand above several rules, but only a comment or a rule may be between.
                assert above.startswith(("#", "verbs:")), f"{name}: {line!r} comes after {above!r}"
            if not line.startswith("{{"):
                above = line
        assert not any("*" in line.partition("#")[0] for line in lines), f"{name} grants more than it names"


def test_the_operator_looks_for_the_agents_that_the_chart_makes() -> None:
    key, _, value = AGENT_PODS.partition("=")
    assert f"{key}: {value}\n" in (TEMPLATES / "_helpers.tpl").read_text()
    group, kind, name = AGENTS
    made = (TEMPLATES / "daemonset.yaml").read_text()
    assert made.startswith(f"apiVersion: {group}/v1\nkind: {kind}\nmetadata:\n  name: {name}\n")


def test_a_container_that_ends_badly_says_why_in_its_status() -> None:
    """The last lines of its log stand in the pod's status then, also after the log is gone."""
    for path in TEMPLATES.glob("*.yaml"):
        images = re.findall(r"^( +)imagePullPolicy: .*\n(.*)$", path.read_text(), re.MULTILINE)
        assert [after for _, after in images] == [
            f"{indent}terminationMessagePolicy: FallbackToLogsOnError" for indent, _ in images
        ], path.name


def test_values_are_valid_by_their_own_schema() -> None:
    """Helm says the same; this needs no Helm. Only the outline: unknown names and choices."""
    schema = json.loads((CHART / "values.schema.json").read_text())

    def check(node: Any, rules: dict[str, Any], path: str) -> None:
        assert "enum" not in rules or node in rules["enum"], path
        if isinstance(node, dict) and rules.get("additionalProperties") is False:
            assert node.keys() <= rules["properties"].keys(), path
            for key, value in node.items():
                check(value, rules["properties"][key], f"{path}.{key}")

    check(yaml.safe_load((CHART / "values.yaml").read_text()), schema, "values")
