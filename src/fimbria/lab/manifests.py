"""Kubernetes objects as YAML: reading, ordering, and what `apply` changes. Pure."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fimbria.lab.errors import LabError

# The annotation of `kubectl apply`, so that both tools can take turns on an object.
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"

# What others need comes first; kinds that aren't named come in between.
FIRST = (
    "Namespace",
    "CustomResourceDefinition",
    "ServiceAccount",
    "ClusterRole",
    "ClusterRoleBinding",
    "Role",
    "RoleBinding",
    "ConfigMap",
    "Secret",
    "Service",
)
LAST = ("Pod", "ReplicaSet", "Deployment", "StatefulSet", "DaemonSet", "Job")


@dataclass(frozen=True)
class Manifest:
    """One object and where it stands, for messages."""

    where: str
    value: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.value["kind"])

    @property
    def api_version(self) -> str:
        return str(self.value["apiVersion"])

    @property
    def name(self) -> str:
        return str(self.value["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.value["metadata"].get("namespace") or "")


def parse(text: str, where: str) -> list[Manifest]:
    """All objects of a YAML stream, lists unpacked. Raises LabError naming the document."""
    found: list[Manifest] = []
    try:
        for number, document in enumerate(yaml.safe_load_all(text), 1):
            if document is not None:
                found += _objects(document, f"{where}, document {number}")
    except (yaml.YAMLError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise LabError(f"{where}{line}: not valid YAML: {getattr(e, 'problem', None) or e}") from None
    return found


def _objects(value: Any, where: str) -> list[Manifest]:
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("kind"), str)
        or not isinstance(value.get("apiVersion"), str)
    ):
        raise LabError(f"{where}: not a Kubernetes object: apiVersion and kind are needed")
    if value["kind"] == "List":
        return [m for i, item in enumerate(value.get("items") or (), 1) for m in _objects(item, f"{where}, item {i}")]
    metadata = value.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("name"), str):
        raise LabError(f"{where}: {value['kind']} without metadata.name")
    return [Manifest(where, value)]


def load(paths: Iterable[Path]) -> list[Manifest]:
    """Files, and for a directory all its *.yaml, *.yml and *.json. Raises LabError."""
    found: list[Manifest] = []
    for path in paths:
        files = sorted(p for p in path.iterdir() if p.suffix in (".yaml", ".yml", ".json")) if path.is_dir() else [path]
        for file in files:
            try:
                found += parse(file.read_text(), str(file))
            except (OSError, UnicodeDecodeError) as e:
                raise LabError(f"{file}: {getattr(e, 'strerror', None) or e}") from None
    if not found:
        raise LabError(f"no objects in {', '.join(map(str, paths))}")
    return found


def ordered(manifests: Iterable[Manifest]) -> list[Manifest]:
    """In the order to create them in; reversed, the order to delete them in. Stable within a kind."""

    def rank(m: Manifest) -> int:
        if m.kind in FIRST:
            return FIRST.index(m.kind)
        return 200 + LAST.index(m.kind) if m.kind in LAST else 100

    return sorted(manifests, key=rank)


def for_create(value: Mapping[str, Any]) -> dict[str, Any]:
    """The object with a note of what was applied, from which the next `apply` knows what to remove."""
    metadata = dict(value["metadata"])
    clean = {k: v for k, v in (metadata.get("annotations") or {}).items() if k != LAST_APPLIED}
    bare = {**value, "metadata": {**{k: v for k, v in metadata.items() if k != "annotations"}, "annotations": clean}}
    note = json.dumps(bare, separators=(",", ":"), sort_keys=True, default=str)
    return {**bare, "metadata": {**bare["metadata"], "annotations": {**clean, LAST_APPLIED: note}}}


def merge_patch(current: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON merge patch (RFC 7386) that sets everything in `wanted` and removes what the last apply set and
    `wanted` doesn't name.

    Empty if nothing would change. Lists are replaced whole, items of an equally long list keep what the server added.
    """
    new = for_create(wanted)
    note = ((current.get("metadata") or {}).get("annotations") or {}).get(LAST_APPLIED)
    try:
        last = json.loads(note) if note else {}
    except ValueError:
        last = {}
    return _difference(current, new, last if isinstance(last, dict) else {})


def _difference(current: Mapping[str, Any], new: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, Any]:
    patch: dict[str, Any] = {key: None for key in last if key not in new and key in current}
    for key, value in new.items():
        old = current.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            before = last.get(key)
            inner = _difference(old, value, before if isinstance(before, dict) else {})
            if inner:
                patch[key] = inner
        elif not _same(old, value):
            patch[key] = _merged(old, value)
    return patch


def _same(old: Any, new: Any) -> bool:
    """Whether `old` says all that `new` says; what a server adds by default makes no difference."""
    if isinstance(old, dict) and isinstance(new, dict):
        return all(k in old and _same(old[k], v) for k, v in new.items())
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    return bool(old == new)


def _merged(old: Any, new: Any) -> Any:
    """`new`, with what the server added to the items of a list that kept its length."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old | {k: _merged(old.get(k), v) for k, v in new.items()}
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return list(map(_merged, old, new))
    return new
