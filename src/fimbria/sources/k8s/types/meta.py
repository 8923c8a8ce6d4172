"""What every object carries: metadata, references, selectors, conditions, lists, and the error body."""

from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")


class Obj(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, rename="camel", kw_only=True):
    """Base of all API structs: camelCase on the wire, defaults left out when encoding."""


class OwnerReference(Obj, frozen=True):
    api_version: str = ""
    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool | None = None
    block_owner_deletion: bool | None = None


class ObjectMeta(Obj, frozen=True):
    """Timestamps stay RFC 3339 text: they are shown and compared with "", rarely calculated with."""

    name: str = ""
    generate_name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    owner_references: tuple[OwnerReference, ...] | None = None
    finalizers: tuple[str, ...] | None = None


class ApiObject(Obj, frozen=True):
    """An object with `metadata`; items of a list arrive without `apiVersion` and `kind`."""

    api_version: str = ""
    kind: str = ""
    metadata: ObjectMeta = ObjectMeta()


class ObjectReference(Obj, frozen=True):
    api_version: str = ""
    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""
    resource_version: str = ""
    field_path: str = ""


class LabelSelectorRequirement(Obj, frozen=True):
    """`operator` is In, NotIn, Exists or DoesNotExist; anything else is the reader's to refuse."""

    key: str
    operator: str
    values: tuple[str, ...] | None = None


class LabelSelector(Obj, frozen=True):
    """Present but empty selects everything; an absent one means what the field that holds it says."""

    match_labels: dict[str, str] | None = None
    match_expressions: tuple[LabelSelectorRequirement, ...] | None = None


class Condition(Obj, frozen=True):
    """metav1.Condition, and the older per-kind ones, which have the same first four fields."""

    type: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""
    observed_generation: int = 0
    last_transition_time: str | None = None


class ListMeta(Obj, frozen=True):
    """`continue` is a Python keyword, hence the trailing underscore."""

    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")
    remaining_item_count: int | None = None


class ObjectList(Obj, Generic[T], frozen=True):
    metadata: ListMeta = ListMeta()
    items: tuple[T, ...] | None = None


class StatusCause(Obj, frozen=True):
    reason: str = ""
    message: str = ""
    field: str = ""


class StatusDetails(Obj, frozen=True):
    name: str = ""
    group: str = ""
    kind: str = ""
    uid: str = ""
    causes: tuple[StatusCause, ...] | None = None
    retry_after_seconds: int = 0


class Status(Obj, frozen=True):
    """The body of an error (metav1.Status)."""

    kind: str = ""
    status: str = ""
    message: str = ""
    reason: str = ""
    code: int = 0
    details: StatusDetails | None = None
