"""What an API server answers when it doesn't do what was asked (metav1.Status), as exceptions that name the object."""

import msgspec

from fimbria.sources.k8s.types.meta import Status


class ApiError(Exception):
    """`status` is the HTTP code, 0 when no answer arrived; `reason` and `details` are the server's, if it gave any."""

    def __init__(self, what: str, status: int, body: Status | None = None, text: str = "") -> None:
        self.what = what
        self.status = status
        self.reason = body.reason if body else ""
        self.message = (body.message if body else "") or text
        self.details = body.details if body else None
        self.retry_after: float | None = None
        code = f"{status} {self.reason}".strip() if status else "no answer"
        super().__init__(f"{what}: {code}: {self.message}" if self.message else f"{what}: {code}")

    @property
    def namespace_ends(self) -> bool:
        """Nothing can be made in the namespace any more: it is being deleted."""
        causes = self.details.causes if self.details else None
        return any(cause.reason == "NamespaceTerminating" for cause in causes or ())


class Unavailable(ApiError):
    """No (complete) answer: connection refused, reset or timed out. A write may or may not have happened."""


class BadAnswer(ApiError):
    """The server's answer isn't what the API promises, e.g. JSON of another shape."""


class Unauthorized(ApiError):
    pass


class Forbidden(ApiError):
    pass


class NotFound(ApiError):
    pass


class Conflict(ApiError):
    """The object changed since it was read, or a precondition doesn't hold: read again."""


class AlreadyExists(ApiError):
    pass


class Gone(ApiError):
    """The resourceVersion or continue token is too old: list again."""


class Invalid(ApiError):
    """The object breaks a rule of its kind; `details.causes` name the fields."""


class TooMany(ApiError):
    """The server is busy; `retry_after` seconds, if it said so."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: Invalid,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: Invalid,
    429: TooMany,
}
_BY_REASON: dict[str, type[ApiError]] = {"AlreadyExists": AlreadyExists, "Expired": Gone, "Gone": Gone}
_MAX_TEXT = 500


def from_answer(what: str, status: int, body: bytes, retry_after: str = "") -> ApiError:
    """The exception for an answer with an error code. `what` says what was tried on which object."""
    parsed: Status | None
    try:
        parsed = msgspec.json.decode(body, type=Status)
    except msgspec.MsgspecError:
        parsed = None
    if parsed is None or parsed.kind != "Status":
        # Something in between answered (a proxy, a load balancer): its own words help most.
        return _build(what, status, None, body[:_MAX_TEXT].decode("utf-8", "replace").strip(), retry_after)
    return _build(what, status, parsed, "", retry_after)


def from_status(what: str, status: Status) -> ApiError:
    """The exception for a Status that came inside a watch stream."""
    return _build(what, status.code, status, "", "")


def _build(what: str, status: int, body: Status | None, text: str, retry_after: str) -> ApiError:
    kind = _BY_REASON.get(body.reason if body else "") or _BY_STATUS.get(status, ApiError)
    error = kind(what, status, body, text)
    if retry_after.strip().isdecimal():
        error.retry_after = float(retry_after)
    elif body and body.details and body.details.retry_after_seconds > 0:
        error.retry_after = float(body.details.retry_after_seconds)
    return error
