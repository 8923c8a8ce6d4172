"""The write path: what happens to an object between a request and the store. No I/O but the store's."""

from __future__ import annotations

import copy
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from fimbria.lab.apiserver import apply as ownership
from fimbria.lab.apiserver import builtin, crds, errors, schema, validation
from fimbria.lab.apiserver.columns import timestamp
from fimbria.lab.apiserver.errors import ApiError, FieldError
from fimbria.lab.apiserver.fieldsets import readable
from fimbria.lab.apiserver.model import Entry, Key, Obj, Resource, decode, encode
from fimbria.lab.apiserver.services import Allocations, Network
from fimbria.lab.apiserver.store import Shelf, Store

_SUFFIX = "bcdfghjklmnpqrstvwxz2456789"
MAX_BASE = 58
PERMANENT = ("default", "kube-system", "kube-public")


@dataclass
class Write:
    """What a request says about how to write: dry run, strictness, who writes; collects warnings for the answer."""

    dry_run: bool = False
    strictness: str = "Warn"
    manager: str = ""
    force: bool = False
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Deletion:
    """DeleteOptions (meta/v1), as far as they are honoured."""

    grace: int | None = None
    policy: str | None = None
    uid: str | None = None
    resource_version: str | None = None
    dry_run: bool = False


class Registry:
    """All resources, by group and version, over one store."""

    def __init__(self, store: Store, networks: list[Network]):
        self.store = store
        self.allocations = Allocations(networks)
        self.groups: dict[str, dict[str, dict[str, Resource]]] = {}
        self._custom: dict[str, list[Resource]] = {}
        self.generation = 0
        """Goes up with every change of what is served."""
        for res in builtin.resources(self.allocations):
            self._serve(res)
        self.namespaces = self.groups[""]["v1"]["namespaces"]
        self.crds = self.groups["apiextensions.k8s.io"]["v1"]["customresourcedefinitions"]
        self._restore()

    # ---- resources

    def _serve(self, res: Resource) -> None:
        self.groups.setdefault(res.group, {}).setdefault(res.version, {})[res.plural] = res
        self.generation += 1

    def resource(self, group: str, version: str, plural: str) -> Resource:
        try:
            return self.groups[group][version][plural]
        except KeyError:
            raise errors.no_such_path() from None

    def shelf(self, res: Resource) -> Shelf:
        return self.store.shelf(res.storage, res.strategy.fields)

    def _restore(self) -> None:
        services = self.resource("", "v1", "services")
        for entry in self.shelf(services).entries.values():
            self.allocations.update(None, entry.object())
        for entry in self.shelf(self.crds).entries.values():
            self._publish(entry.object())

    def _publish(self, definition: Obj) -> None:
        """Serves an established definition, in place of what its older state served."""
        self._withdraw(definition["metadata"]["name"])
        conditions = (definition.get("status") or {}).get("conditions") or []
        if not any(one["type"] == "Established" and one["status"] == "True" for one in conditions):
            return
        served = crds.resources(definition)
        for res in served:
            self._serve(res)
        self._custom[definition["metadata"]["name"]] = served

    def _withdraw(self, name: str) -> None:
        for res in self._custom.pop(name, []):
            versions = self.groups[res.group]
            del versions[res.version][res.plural]
            if not versions[res.version]:
                del versions[res.version]
            if not versions:
                del self.groups[res.group]
            self.generation += 1

    # ---- reading

    def entry(self, res: Resource, key: Key) -> Entry:
        entry = self.shelf(res).entries.get(key)
        if entry is None:
            raise errors.not_found(res, key.name)
        return entry

    def read(self, res: Resource, key: Key) -> Obj:
        """A copy of an object as this resource's version shows it. Raises ApiError 404."""
        return served(res, self.entry(res, key).object())

    # ---- creating

    def create(self, res: Resource, namespace: str, body: Obj, write: Write, managed: list[Obj] | None = None) -> Obj:
        """Stores a new object and returns it; ``managed`` are its managedFields, if any. Raises ApiError."""
        obj = self._decode(res, body, write)
        meta = obj["metadata"]
        self._check_namespace(res, namespace, meta)
        if meta.get("resourceVersion"):
            raise ApiError(500, "InternalError", "resourceVersion should not be set on objects to be created")
        if not meta.get("name") and meta.get("generateName"):
            meta["name"] = generated_name(meta["generateName"])
        self._admit_into(res, namespace, meta.get("name", ""))
        res.strategy.default(obj)
        for owned in ("selfLink", "deletionTimestamp", "deletionGracePeriodSeconds", "managedFields", "generation"):
            meta.pop(owned, None)
        meta |= {"uid": str(uuid.uuid4()), "creationTimestamp": timestamp(datetime.now(UTC))}
        if res.strategy.has_generation:
            meta["generation"] = 1
        if managed:
            meta["managedFields"] = managed
        res.strategy.prepare_create(obj)
        problems = _check_name(res, meta) + validation.metadata(meta, bool(res.type_name))
        problems = problems or res.strategy.validate(obj, None)
        if problems:
            raise errors.invalid_object(res, meta.get("name") or meta.get("generateName") or "", problems)
        key = Key(namespace, meta["name"])
        if key in self.shelf(res).entries:
            raise errors.already_exists(res, key.name)
        self._warn_about(res, obj, write)
        return self._store(res, key, obj, None, write.dry_run)

    def _admit_into(self, res: Resource, namespace: str, name: str) -> None:
        """Nothing is created in a namespace that isn't there or is going."""
        if not res.namespaced:
            return
        entry = self.shelf(self.namespaces).entries.get(Key("", namespace))
        if entry is None:
            raise errors.not_found(self.namespaces, namespace)
        if entry.fields.get("status.phase") == "Terminating":
            why = f"unable to create new content in namespace {namespace} because it is being terminated"
            cause = {
                "reason": "NamespaceTerminating",
                "message": f"namespace {namespace} is being terminated",
                "field": "metadata.namespace",
            }
            raise errors.forbidden(res, name, why, [cause])

    def _decode(self, res: Resource, body: Obj, write: Write) -> Obj:
        """Checks the type's header, prunes unknown fields, warns or refuses as asked. Changes and returns the body."""
        described = f'{res.kind} in version "{res.version}" cannot be handled as a {res.kind}'
        kind, version = body.get("kind") or res.kind, body.get("apiVersion") or res.api_version
        if kind != res.kind:
            raise errors.bad_request(f'{kind} in version "{res.version}" cannot be handled as a {res.kind}')
        if version != res.api_version:
            message = f"the API version in the data ({version}) does not match the expected API version"
            raise errors.bad_request(f"{message} ({res.api_version})")
        body["kind"], body["apiVersion"] = res.kind, res.api_version
        if not isinstance(body.get("metadata") or {}, dict):
            raise errors.bad_request(f"{described}: metadata must be an object")
        body["metadata"] = body.get("metadata") or {}
        unknown = [f'unknown field "{path}"' for path in res.strategy.decode(res, body)]
        if unknown and write.strictness == "Strict":
            raise errors.bad_request(f"{described}: strict decoding error: {', '.join(unknown)}")
        if write.strictness == "Warn":
            write.warnings += unknown
        for key in ("labels", "annotations", "finalizers", "ownerReferences"):
            if not body["metadata"].get(key, True):
                del body["metadata"][key]
        return res.to_stored(body) if res.to_stored else body

    def _check_namespace(self, res: Resource, namespace: str, meta: Obj) -> None:
        given = meta.get("namespace") or ""
        if not res.namespaced:
            meta.pop("namespace", None)
        elif given and given != namespace:
            raise errors.bad_request(
                "the namespace of the provided object does not match the namespace sent on the request"
            )
        else:
            meta["namespace"] = namespace

    def _warn_about(self, res: Resource, obj: Obj, write: Write) -> None:
        if res is self.crds and schema.uses_cel(obj["spec"]["versions"]):
            write.warnings.append("x-kubernetes-validations are not evaluated by the lab's API server")

    def _store(self, res: Resource, key: Key, obj: Obj, old: Obj | None, dry_run: bool) -> Obj:
        if dry_run:
            return served(res, obj)
        if res is self.crds:
            others = [entry.object() for entry in self.shelf(res).entries.values()]
            if not obj["metadata"].get("deletionTimestamp"):
                obj["status"] = crds.accept(obj, crds.conflicts(obj, others)) if _renamed(obj, old) else obj["status"]
        self.store.write(self.shelf(res), key, obj, res.strategy.fields)
        res.strategy.committed(old, obj)
        if res is self.crds:
            self._publish(obj)
        return served(res, obj)

    # ---- updating

    def update(self, res: Resource, key: Key, body: Obj, sub: str, write: Write) -> tuple[Obj, bool]:
        """Replaces an object or a subresource of it; returns it, and whether it was created. Raises ApiError."""
        name = (body.get("metadata") or {}).get("name") if isinstance(body.get("metadata") or {}, dict) else None
        if name and name != key.name:
            message = f"the name of the object ({name}) does not match the name on the URL ({key.name})"
            raise errors.bad_request(message)
        if key not in self.shelf(res).entries:
            if not res.strategy.create_on_update or sub:
                raise errors.not_found(res, key.name)
            body.setdefault("metadata", {})["name"] = key.name
            return self.create(res, key.namespace, body, write), True
        new = self._decode(res, body, write)
        if not name:
            message = f"the name of the object ({key.name} based on URL) was undeterminable: name must be provided"
            raise errors.bad_request(message)
        self._check_namespace(res, key.namespace, new["metadata"])
        needs_version = not res.strategy.unconditional_update
        if needs_version and not new["metadata"].get("resourceVersion"):
            problem = errors.invalid("metadata.resourceVersion", 0, "must be specified for an update")
            raise errors.invalid_object(res, key.name, [problem])
        return self._replace(res, key, new, sub, write), False

    def modify(self, res: Resource, key: Key, change: Callable[[Obj], Obj], sub: str, write: Write) -> Obj:
        """Patches: ``change`` gets a copy of the object as served and returns the new one. Raises ApiError."""
        current = self.read(res, key)
        changed = change(copy.deepcopy(current))
        if not isinstance(changed, dict):
            raise errors.bad_request("the patch does not leave an object")
        for name in ("kind", "apiVersion"):
            if changed.get(name) != current[name]:
                problem = errors.invalid("patch", changed.get(name), f"a patch may not change {name}")
                raise errors.invalid_object(res, "", [problem])
        try:
            new = self._decode(res, changed, write)
        except ApiError as error:
            if "strict decoding error" not in error.message:
                raise
            detail = error.message[error.message.index("strict decoding error") :]
            problem = FieldError("patch", "FieldValueInvalid", f"Invalid value: {detail}")
            raise errors.invalid_object(res, "", [problem]) from None
        if new["metadata"].get("name") != key.name:
            message = f"the name of the object ({new['metadata'].get('name')}) does not match the name on the URL"
            raise errors.bad_request(f"{message} ({key.name})")
        if new["metadata"].get("uid") != current["metadata"]["uid"]:
            problem = validation.immutable("metadata.uid", new["metadata"].get("uid"))
            raise errors.invalid_object(res, key.name, [problem])
        self._check_namespace(res, key.namespace, new["metadata"])
        return self._replace(res, key, new, sub, write)

    def _replace(
        self, res: Resource, key: Key, new: Obj, sub: str, write: Write, *, managed: list[Obj] | None = None
    ) -> Obj:
        old = self.entry(res, key).object()
        _keep_metadata(res, key, new, old)
        strategy = res.strategy
        strategy.default(new)
        if sub == "status":
            strategy.prepare_status(new, old)
            problems = validation.metadata(new["metadata"], bool(res.type_name)) or strategy.validate_status(new, old)
        elif sub == "finalize":
            self.namespaces.strategy.prepare_finalize(new, old)  # type: ignore[attr-defined]
            problems = []
        else:
            strategy.prepare_update(new, old)
            problems = validation.metadata(new["metadata"], bool(res.type_name)) + validation.metadata_update(
                new["metadata"], old["metadata"]
            )
            problems = problems or strategy.validate(new, old)
        if problems:
            raise errors.invalid_object(res, key.name, problems)
        if strategy.has_generation and sub != "status" and strategy.spec_changed(new, old):
            new["metadata"]["generation"] = old["metadata"].get("generation", 0) + 1
        _set_owners(res, new, old, managed, ownership.Writer(write.manager, "Update", sub))
        return self._settle(res, key, new, old, write.dry_run)

    def _settle(self, res: Resource, key: Key, new: Obj, old: Obj, dry_run: bool) -> Obj:
        """Stores a changed object, or removes it when nothing holds a deleted one any more."""
        if _is_released(res, new):
            if not dry_run:
                self._remove(res, key, new)
            return served(res, new)
        if new == old:
            return served(res, old)
        return self._store(res, key, new, old, dry_run)

    def bind(self, res: Resource, key: Key, body: Obj, write: Write) -> Obj:
        """The binding subresource: gives a pod its node, once. Raises ApiError."""
        node = (body.get("target") or {}).get("name")
        old = self.entry(res, key).object()
        if not node:
            raise errors.invalid_object(res, key.name, [errors.required("target.name")])
        if old["metadata"].get("deletionTimestamp"):
            raise errors.conflict(res, key.name, f"pod {key.name} is being deleted, cannot be assigned to a host")
        if old["spec"].get("nodeName"):
            why = f'pod {key.name} is already assigned to node "{old["spec"]["nodeName"]}"'
            raise errors.conflict(res, key.name, why)
        new = copy.deepcopy(old)
        new["spec"]["nodeName"] = node
        conditions = [one for one in new["status"].get("conditions") or [] if one["type"] != "PodScheduled"]
        moment = timestamp(datetime.now(UTC))
        conditions.append(
            {"type": "PodScheduled", "status": "True", "lastProbeTime": None, "lastTransitionTime": moment}
        )
        new["status"]["conditions"] = conditions
        self._store(res, key, new, old, write.dry_run)
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}

    def apply(self, res: Resource, key: Key, body: Obj, sub: str, write: Write) -> tuple[Obj, bool]:
        """Server-side apply; returns the object, and whether it was created. Raises ApiError, 409 for conflicts."""
        if not write.manager:
            problem = errors.required("fieldManager", "is required for apply patch")
            raise errors.invalid_options("PatchOptions", problem)
        if not body.get("apiVersion") or not body.get("kind"):
            raise errors.bad_request("apiVersion and kind must be given in an applied object")
        applied = self._decode(res, body, write)
        meta = applied["metadata"]
        if meta.setdefault("name", key.name) != key.name:
            message = f"the name of the object ({meta['name']}) does not match the name on the URL ({key.name})"
            raise errors.bad_request(message)
        if meta.pop("managedFields", None):
            raise errors.bad_request("metadata.managedFields must be nil")
        self._check_namespace(res, key.namespace, meta)
        entry = self.shelf(res).entries.get(key)
        if entry is None and sub:
            raise errors.not_found(res, key.name)
        live = entry.object() if entry else None
        if live and meta.get("uid") not in (None, live["metadata"]["uid"]):
            raise errors.conflict(res, key.name, "the object has another uid")
        writer = ownership.Writer(write.manager, "Apply", sub)
        merged, owners, conflicts = ownership.apply(live, applied, res.strategy.shape(res), writer, write.force)
        if conflicts:
            raise _apply_conflict(conflicts)
        moment = timestamp(datetime.now(UTC))
        if live is None:
            fields = ownership.managed_fields(owners, {"metadata": {}}, res.api_version, moment)
            return self.create(res, key.namespace, merged, write, fields), True
        fields = ownership.managed_fields(owners, live, res.api_version, moment)
        merged = copy.deepcopy(merged)
        merged["metadata"]["resourceVersion"] = meta.get("resourceVersion") or live["metadata"]["resourceVersion"]
        return self._replace(res, key, merged, sub, write, managed=fields), False

    # ---- deleting

    def delete(self, res: Resource, key: Key, options: Deletion) -> tuple[Obj, bool]:
        """Deletes or begins to delete; returns the object, and whether it is gone. Raises ApiError."""
        old = self.entry(res, key).object()
        self._check_deletion(res, key, old["metadata"], options)
        new = begin_deletion(res, old, options, datetime.now(UTC))
        if new is None:
            last = _last_state(res, old, datetime.now(UTC))
            if not options.dry_run:
                if last is not old:
                    self._store(res, key, last, old, False)
                self._remove(res, key, last)
            return served(res, last), True
        if new == old:
            return served(res, old), False
        return self._store(res, key, new, old, options.dry_run), False

    def _check_deletion(self, res: Resource, key: Key, meta: Obj, options: Deletion) -> None:
        if res is self.namespaces and key.name in PERMANENT:
            raise errors.forbidden(res, key.name, "this namespace may not be deleted")
        for wanted, found, what in (
            (options.uid, meta["uid"], "UID"),
            (options.resource_version, meta["resourceVersion"], "ResourceVersion"),
        ):
            if wanted is not None and wanted != found:
                why = f"Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {found}"
                raise errors.conflict(res, key.name, why)

    def _remove(self, res: Resource, key: Key, obj: Obj) -> None:
        if res is self.crds:
            self._remove_custom(obj)
        self.store.remove(self.shelf(res), key)
        res.strategy.committed(obj, None)

    def _remove_custom(self, definition: Obj) -> None:
        """A definition takes its objects along."""
        for res in self._custom.get(definition["metadata"]["name"], [])[:1]:
            for key in list(self.shelf(res).sorted_keys()):
                self.store.remove(self.shelf(res), key)
        self._withdraw(definition["metadata"]["name"])


def served(res: Resource, stored: Obj) -> Obj:
    return res.from_stored(stored) if res.from_stored else stored


def served_raw(res: Resource, entry: Entry) -> bytes:
    """The JSON of an entry as the resource's version shows it; the stored bytes wherever that is the same."""
    if res.from_stored is None:
        return entry.raw
    return encode(res.from_stored(decode(entry.raw)))


def generated_name(base: str) -> str:
    return base[:MAX_BASE] + "".join(secrets.choice(_SUFFIX) for _ in range(5))


def _check_name(res: Resource, meta: Obj) -> list[FieldError]:
    if not meta.get("name"):
        return [errors.required("metadata.name", "name or generateName is required")]
    return res.strategy.name_rule(meta["name"], "metadata.name")


def _renamed(new: Obj, old: Obj | None) -> bool:
    return old is None or new["spec"] != old["spec"]


def _keep_metadata(res: Resource, key: Key, new: Obj, old: Obj) -> None:
    """Restores what the server owns; raises ApiError 409 when the client's version or uid is another one."""
    meta, was = new["metadata"], old["metadata"]
    given = meta.get("resourceVersion")
    if given and given != was["resourceVersion"]:
        raise errors.conflict(res, key.name)
    if meta.get("uid") and meta["uid"] != was["uid"]:
        why = f"Precondition failed: UID in precondition: {meta['uid']}, UID in object meta: {was['uid']}"
        raise errors.conflict(res, key.name, why)
    owned = (
        "managedFields",
        "resourceVersion",
        "uid",
        "creationTimestamp",
        "generation",
        "deletionTimestamp",
        "generateName",
        "deletionGracePeriodSeconds",
    )
    for name in owned:
        if name in was:
            meta[name] = was[name]
        else:
            meta.pop(name, None)
    meta.pop("selfLink", None)


def _set_owners(res: Resource, new: Obj, old: Obj, managed: list[Obj] | None, writer: ownership.Writer) -> None:
    """Writes managedFields: as an apply decided, or by what an update changed of an object that has owners."""
    if managed is None and old["metadata"].get("managedFields"):
        owners = ownership.track(new, old, res.strategy.shape(res), writer)
        managed = ownership.managed_fields(owners, old, res.api_version, timestamp(datetime.now(UTC)))
    if managed:
        new["metadata"]["managedFields"] = managed


def _apply_conflict(conflicts: list[ownership.Conflict]) -> ApiError:
    texts = [f'conflict with "{one.manager}": {readable(one.path)}' for one in conflicts]
    causes = [
        {"reason": "FieldManagerConflict", "message": f'conflict with "{one.manager}"', "field": readable(one.path)}
        for one in conflicts
    ]
    many = f"{len(texts)} conflict{'s' if len(texts) > 1 else ''}"
    return ApiError(409, "Conflict", f"Apply failed with {many}: " + ", ".join(texts), {"causes": causes})


def _is_released(res: Resource, obj: Obj) -> bool:
    meta = obj["metadata"]
    if not meta.get("deletionTimestamp") or meta.get("finalizers") or meta.get("deletionGracePeriodSeconds"):
        return False
    return not (res.qualified == "namespaces" and (obj.get("spec") or {}).get("finalizers"))


def _last_state(res: Resource, old: Obj, now: datetime) -> Obj:
    """What watchers see of an object just before it goes: kinds with a grace period show that it is being deleted."""
    meta = old["metadata"]
    if res.strategy.grace(old, 0) is None or (meta.get("deletionTimestamp") and not meta["deletionGracePeriodSeconds"]):
        return old
    new = copy.deepcopy(old)
    new["metadata"] |= {"deletionTimestamp": timestamp(now), "deletionGracePeriodSeconds": 0}
    if not meta.get("deletionTimestamp") and meta.get("generation"):
        new["metadata"]["generation"] += 1
    return new


_GC_FINALIZERS = {"Orphan": "orphan", "Foreground": "foregroundDeletion"}


def begin_deletion(res: Resource, old: Obj, options: Deletion, now: datetime) -> Obj | None:
    """The object as it stays while something holds it, or None if it goes at once. Pure."""
    new = copy.deepcopy(old)
    meta = new["metadata"]
    _set_finalizers(meta, options.policy)
    namespace = res.qualified == "namespaces"
    grace = res.strategy.grace(old, options.grace) or 0
    if meta.get("deletionTimestamp"):
        before = meta.get("deletionGracePeriodSeconds") or 0
        if before and options.grace is None:
            grace = before
        grace = min(grace, before)
    held = bool(meta.get("finalizers")) or (namespace and bool((new.get("spec") or {}).get("finalizers")))
    if not grace and not held:
        return None
    before_deletion = not meta.get("deletionTimestamp")
    if before_deletion or grace < (meta.get("deletionGracePeriodSeconds") or 0):
        meta["deletionTimestamp"] = timestamp(now + timedelta(seconds=grace))
        if not namespace:
            meta["deletionGracePeriodSeconds"] = grace
        if before_deletion and meta.get("generation"):
            meta["generation"] += 1
    if namespace:
        new["status"] = (new.get("status") or {}) | {"phase": "Terminating"}
    return new


def _set_finalizers(meta: Obj, policy: str | None) -> None:
    if policy is None:
        return
    kept = [one for one in meta.get("finalizers") or [] if one not in _GC_FINALIZERS.values()]
    if policy in _GC_FINALIZERS:
        kept.append(_GC_FINALIZERS[policy])
    if kept:
        meta["finalizers"] = kept
    else:
        meta.pop("finalizers", None)


__all__ = ["ApiError", "Deletion", "Registry", "Write", "begin_deletion", "generated_name", "served", "served_raw"]
