"""Garbage collection by owner references: background, foreground and orphaning (meta/v1 DeleteOptions). Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fimbria.lab.apiserver.controllers.actions import Obj

FOREGROUND, ORPHAN = "foregroundDeletion", "orphan"


@dataclass(frozen=True)
class Item:
    """An object's metadata and the resource it belongs to (a collection's path under its group version)."""

    resource: str
    meta: Obj

    @property
    def uid(self) -> str:
        return str(self.meta["uid"])


@dataclass(frozen=True)
class Collect:
    """Delete an item whose owners are gone or wait for it; ``absent`` names owners to be looked up once more first."""

    item: Item
    policy: str
    absent: tuple[tuple[str, str, str, str], ...] = ()


@dataclass(frozen=True)
class SetOwners:
    item: Item
    owners: list[Obj]
    absent: tuple[tuple[str, str, str, str], ...] = ()


@dataclass(frozen=True)
class DropFinalizer:
    item: Item
    finalizer: str


Decision = Collect | SetOwners | DropFinalizer


def is_relevant(meta: Obj) -> bool:
    """Whether the collector has anything to do with an object beyond knowing that it exists."""
    return bool(meta.get("ownerReferences")) or bool({FOREGROUND, ORPHAN} & set(meta.get("finalizers") or []))


def matters(old: Obj | None, new: Obj | None) -> bool:
    """Whether a change of an object's metadata can change what the collector has to do."""
    if new is None:
        return True
    if old is None:
        return is_relevant(new)
    return any(old.get(key) != new.get(key) for key in ("uid", "ownerReferences", "finalizers", "deletionTimestamp"))


def plan(relevant: Iterable[Item], known: dict[str, Item]) -> list[Decision]:
    """What to do about the relevant items; ``known`` has every object by uid."""
    items = list(relevant)
    dependents: dict[str, list[Item]] = {}
    for item in items:
        for reference in item.meta.get("ownerReferences") or []:
            dependents.setdefault(reference["uid"], []).append(item)
    decisions: list[Decision] = []
    for item in items:
        decisions += _release(item, dependents.get(item.uid, []))
        if item.meta.get("ownerReferences"):
            decisions += _judge(item, known, bool(dependents.get(item.uid)))
    return decisions


def _release(item: Item, dependents: list[Item]) -> list[Decision]:
    """What an object that is being deleted waits for."""
    finalizers = item.meta.get("finalizers") or []
    if not item.meta.get("deletionTimestamp"):
        return []
    if ORPHAN in finalizers:
        if dependents:
            return [SetOwners(one, _without(one, item.uid)) for one in dependents]
        return [DropFinalizer(item, ORPHAN)]
    if FOREGROUND in finalizers and not any(_blocks(one, item.uid) for one in dependents):
        return [DropFinalizer(item, FOREGROUND)]
    return []


def _without(item: Item, uid: str) -> list[Obj]:
    return [one for one in item.meta["ownerReferences"] if one["uid"] != uid]


def _blocks(item: Item, uid: str) -> bool:
    return any(one["uid"] == uid and one.get("blockOwnerDeletion") for one in item.meta["ownerReferences"])


def _judge(item: Item, known: dict[str, Item], has_dependents: bool) -> list[Decision]:
    solid: list[Obj] = []
    waiting = False
    absent: list[tuple[str, str, str, str]] = []
    for reference in item.meta["ownerReferences"]:
        found = known.get(reference["uid"])
        if found is None:
            absent.append((reference["apiVersion"], reference["kind"], reference["name"], reference["uid"]))
        elif found.meta.get("deletionTimestamp") and ORPHAN in (found.meta.get("finalizers") or []):
            return []  # its references are about to be cut by the owner's own release
        elif found.meta.get("deletionTimestamp") and FOREGROUND in (found.meta.get("finalizers") or []):
            waiting = True
        else:
            solid.append(reference)
    if solid:
        return [SetOwners(item, solid, tuple(absent))] if absent or waiting else []
    if item.meta.get("deletionTimestamp"):
        return []
    if waiting:
        return [Collect(item, "Foreground" if has_dependents else "Background", tuple(absent))]
    return [Collect(item, "Background", tuple(absent))]
