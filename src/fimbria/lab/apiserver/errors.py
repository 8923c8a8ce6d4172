"""API errors: each becomes a ``Status`` object (apimachinery meta/v1) and its HTTP code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fimbria.lab.apiserver.model import Obj, Resource, encode


@dataclass(frozen=True)
class FieldError:
    """One reason for a 422, in kube-apiserver's words: ``field: Type: value: detail``."""

    field: str
    reason: str
    message: str

    @property
    def text(self) -> str:
        return f"{self.field}: {self.message}"


def required(field: str, detail: str = "") -> FieldError:
    return FieldError(field, "FieldValueRequired", _join("Required value", detail))


def invalid(field: str, value: Any, detail: str) -> FieldError:
    return FieldError(field, "FieldValueInvalid", f"Invalid value: {quoted(value)}: {detail}")


def not_supported(field: str, value: Any, supported: list[str]) -> FieldError:
    choice = ", ".join(f'"{one}"' for one in supported)
    return FieldError(
        field, "FieldValueNotSupported", f"Unsupported value: {quoted(value)}: supported values: {choice}"
    )


def duplicate(field: str, value: Any) -> FieldError:
    return FieldError(field, "FieldValueDuplicate", f"Duplicate value: {quoted(value)}")


def forbidden_field(field: str, detail: str) -> FieldError:
    return FieldError(field, "FieldValueForbidden", _join("Forbidden", detail))


def _join(what: str, detail: str) -> str:
    return f"{what}: {detail}" if detail else what


def quoted(value: Any) -> str:
    """A value as kube-apiserver prints it inside a message: strings in quotes, the rest as JSON."""
    return encode(value).decode()


class ApiError(Exception):
    """An answer that isn't a success. ``code`` is the HTTP status, ``status()`` the body."""

    def __init__(self, code: int, reason: str, message: str, details: Obj | None = None, meta: Obj | None = None):
        super().__init__(message)
        self.code, self.reason, self.message, self.details, self.meta = code, reason, message, details, meta

    def status(self) -> Obj:
        body: Obj = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": self.meta or {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
        }
        if self.details:
            body["details"] = self.details
        return body | {"code": self.code}


def _named(res: Resource, name: str) -> Obj:
    details: Obj = {"name": name, "kind": res.plural}
    return ({"name": name, "group": res.group, "kind": res.plural}) if res.group else details


def not_found(res: Resource, name: str) -> ApiError:
    return ApiError(404, "NotFound", f'{res.qualified} "{name}" not found', _named(res, name))


def no_such_path() -> ApiError:
    return ApiError(404, "NotFound", "the server could not find the requested resource", {})


def already_exists(res: Resource, name: str) -> ApiError:
    return ApiError(409, "AlreadyExists", f'{res.qualified} "{name}" already exists', _named(res, name))


def conflict(res: Resource, name: str, why: str = "") -> ApiError:
    why = why or "the object has been modified; please apply your changes to the latest version and try again"
    message = f'Operation cannot be fulfilled on {res.qualified} "{name}": {why}'
    return ApiError(409, "Conflict", message, _named(res, name))


def invalid_object(res: Resource, name: str, errors: list[FieldError]) -> ApiError:
    texts = list(dict.fromkeys(error.text for error in errors))
    joined = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    kind = f"{res.kind}.{res.group}" if res.group else res.kind
    details: Obj = {"name": name} if name else {}
    if res.group:
        details["group"] = res.group
    causes = [{"reason": one.reason, "message": one.message, "field": one.field} for one in errors]
    details |= {"kind": res.kind, "causes": causes}
    return ApiError(422, "Invalid", f'{kind} "{name}" is invalid: {joined}', details)


def invalid_options(kind: str, problem: FieldError) -> ApiError:
    """What is wrong with a request's own options, such as ListOptions."""
    cause = {"reason": problem.reason, "message": problem.message, "field": problem.field}
    details = {"group": "meta.k8s.io", "kind": kind, "causes": [cause]}
    return ApiError(422, "Invalid", f'{kind}.meta.k8s.io "" is invalid: {problem.text}', details)


def bad_request(message: str) -> ApiError:
    return ApiError(400, "BadRequest", message)


def forbidden(res: Resource, name: str, why: str, causes: list[Obj] | None = None) -> ApiError:
    details = _named(res, name) | ({"causes": causes} if causes else {})
    return ApiError(403, "Forbidden", f'{res.qualified} "{name}" is forbidden: {why}', details)


def expired(message: str, token: str = "") -> ApiError:
    return ApiError(410, "Expired", message, meta={"continue": token} if token else None)


def unsupported_media(message: str) -> ApiError:
    return ApiError(415, "UnsupportedMediaType", message)


def method_not_allowed() -> ApiError:
    message = "the server does not allow this method on the requested resource"
    return ApiError(405, "MethodNotAllowed", message)
