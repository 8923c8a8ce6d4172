"""Server-side apply: who owns which field, and what an apply changes (KEP-555). Pure.

Ownership is kept from an object's first apply on. What is there before belongs to a manager of its own then, as
kube-apiserver does with objects from before it knew about owners.
"""

from __future__ import annotations

from dataclasses import dataclass

from fimbria.lab.apiserver import fieldsets
from fimbria.lab.apiserver.fieldsets import ITSELF, Path, Shape
from fimbria.lab.apiserver.model import Obj

BEFORE = "before-first-apply"
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


@dataclass(frozen=True)
class Writer:
    """Who writes: a manager's name, ``Apply`` or ``Update``, and the subresource."""

    manager: str
    operation: str
    sub: str = ""


@dataclass(frozen=True)
class Conflict:
    """A field that another manager owns and that the apply would change."""

    manager: str
    operation: str
    path: Path


Owners = dict[Writer, set[Path]]


def owners_of(obj: Obj) -> Owners:
    found: Owners = {}
    for entry in obj["metadata"].get("managedFields") or []:
        if "manager" in entry:
            writer = Writer(entry["manager"], entry.get("operation", "Update"), entry.get("subresource", ""))
            found[writer] = fieldsets.from_fields_v1(entry.get("fieldsV1") or {})
    return found


def managed_fields(owners: Owners, before: Obj, api_version: str, now: str) -> list[Obj]:
    """The managedFields of these owners; an unchanged entry keeps its time."""
    times = {}
    for entry in before["metadata"].get("managedFields") or []:
        writer = Writer(entry.get("manager", ""), entry.get("operation", ""), entry.get("subresource", ""))
        times[writer] = (fieldsets.from_fields_v1(entry.get("fieldsV1") or {}), entry.get("time", now))
    entries: list[Obj] = []
    for writer, found in owners.items():
        if not found:
            continue
        old, time = times.get(writer, (None, now))
        entry = {"manager": writer.manager, "operation": writer.operation, "apiVersion": api_version,
                 "time": time if old == found else now, "fieldsType": "FieldsV1",
                 "fieldsV1": fieldsets.to_fields_v1(found)}  # fmt: skip
        entries.append(entry | ({"subresource": writer.sub} if writer.sub else {}))
    return entries


def apply(
    live: Obj | None, applied: Obj, shape: Shape, writer: Writer, force: bool
) -> tuple[Obj, Owners, list[Conflict]]:
    """The object after an apply, and its owners; with conflicts (unless forced) both are to be thrown away."""
    wanted = fieldsets.paths(applied, shape)
    if live is None:
        return applied, {writer: set(wanted)}, []
    owners = owners_of(live)
    there = fieldsets.paths(live, shape)
    if not owners and not (writer.manager == "kubectl" and LAST_APPLIED in (live["metadata"].get("annotations") or {})):
        owners[Writer(BEFORE, "Update")] = set(there)
    previous = owners.pop(writer, set())
    conflicts = [
        Conflict(other.manager, other.operation, path)
        for other, found in owners.items()
        for path in sorted(found & wanted.keys())
        if path[-1] != ITSELF and path in there and there[path] != wanted[path]
    ]
    if conflicts and not force:
        return live, owners, conflicts
    for conflict in conflicts:
        for found in owners.values():
            found.discard(conflict.path)
    merged: Obj = fieldsets.merge(live, applied, shape)
    kept = set(wanted).union(*owners.values())
    # items before what is in them: an item without its key couldn't be found any more
    for path in sorted(previous - kept, key=lambda one: (one[-1] != ITSELF, one)):
        shared = path[-1] == ITSELF and any(one[: len(path) - 1] == path[:-1] for one in kept)
        if not shared and not fieldsets.is_key_field(path):
            merged = fieldsets.remove(merged, path, shape)
    owners[writer] = set(wanted)
    return merged, owners, []


def track(new: Obj, old: Obj, shape: Shape, writer: Writer) -> Owners:
    """The owners after an ordinary update: what it changed is its writer's now, what it removed is nobody's."""
    owners = owners_of(old)
    before, after = fieldsets.paths(old, shape), fieldsets.paths(new, shape)
    changed = {path for path, value in after.items() if path not in before or before[path] != value}
    for other, found in owners.items():
        found.intersection_update(after)
        if other != writer:
            found.difference_update(changed)
    if changed:
        owners[writer] = owners.get(writer, set()) | changed
    return owners
