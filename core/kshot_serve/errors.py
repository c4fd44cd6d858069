"""What a server refuses, as fixed codes: HTTP status, a message without paths or addresses, when to try again."""

from __future__ import annotations

from typing import Literal, get_args

from kshot_runtime.errors import KshotError

Code = Literal[
    "bad_request",
    "key_missing",
    "key_unknown",
    "key_not_allowed",
    "host_not_allowed",
    "origin_not_allowed",
    "space_unknown",
    "class_unknown",
    "photo_unknown",
    "revision_unknown",
    "model_unknown",
    "method_not_allowed",
    "not_found",
    "conflict",
    "body_too_slow",
    "body_too_large",
    "photo_too_large",
    "media_type_unknown",
    "not_an_image",
    "too_many_photos",
    "too_many_classes",
    "too_few_classes",
    "no_photos",
    "not_supported",
    "busy",
    "draining",
    "not_ready",
    "too_late",
    "internal",
    "storage_full",
]

STATUS: dict[Code, int] = {
    "bad_request": 400,
    "key_missing": 401,
    "key_unknown": 401,
    "key_not_allowed": 403,
    "host_not_allowed": 421,
    "origin_not_allowed": 403,
    "space_unknown": 404,
    "class_unknown": 404,
    "photo_unknown": 404,
    "revision_unknown": 404,
    "model_unknown": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "conflict": 409,
    "body_too_slow": 408,
    "body_too_large": 413,
    "photo_too_large": 413,
    "media_type_unknown": 415,
    "not_an_image": 422,
    "too_many_photos": 422,
    "too_many_classes": 422,
    "too_few_classes": 409,
    "no_photos": 422,
    "not_supported": 409,
    "busy": 429,
    "draining": 503,
    "not_ready": 503,
    "too_late": 503,
    "internal": 500,
    "storage_full": 507,
}
assert set(STATUS) == set(get_args(Code))


class Problem(KshotError):  # noqa: N818  (a word of HTTP's: RFC 9457)
    """A request that is not done. `reason` names the limit that was reached, `retry_after` is in seconds."""

    def __init__(self, code: Code, message: str, *, retry_after: float | None = None, reason: str = "") -> None:
        super().__init__(message)
        self.code: Code = code
        self.message = message
        self.retry_after = retry_after
        self.reason = reason

    @property
    def status(self) -> int:
        return STATUS[self.code]
