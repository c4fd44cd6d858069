"""What an operation of the API declares, and what its requests go through before the operation's own code."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from typing import Annotated, Any

from fastapi import Depends, Path, Query
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from kshot_serve.api.bodies import Answer, AnswerRefusedError, Body
from kshot_serve.api.schemas import Failure
from kshot_serve.backend import DEADLINE, Backend
from kshot_serve.budgets import caller_of, current_caller
from kshot_serve.errors import STATUS, Code, Problem
from kshot_serve.observe import trace
from kshot_serve.storage import keys as access

_JSON_BYTES = 1_000_000
_SOON_S = 0.02  # an answer that comes within this is not watched over: a watch costs a fifth of a small request
_ALWAYS: tuple[Code, ...] = (
    "bad_request",
    "key_missing",
    "key_unknown",
    "key_not_allowed",
    "host_not_allowed",
    "origin_not_allowed",
    "draining",
    "internal",
)
_WRITES: tuple[Code, ...] = ("busy", "not_ready", "storage_full")
JSON: tuple[Code, ...] = ("body_too_large", "body_too_slow", "busy")
"""What can go wrong with a JSON body."""
_WITH_BODY: tuple[Code, ...] = ("body_too_large", "body_too_slow", "media_type_unknown", "busy")
_WITH_PHOTOS: tuple[Code, ...] = (
    "photo_too_large", "not_an_image", "too_many_photos", "no_photos", "not_ready", "too_late",
)  # fmt: skip


def operation(
    scope: access.Scope,
    *codes: Code,
    photos: bool = False,
    body: dict[str, Any] | None = None,
    whole: bool = False,
    failure: type = Failure,
    answers: dict[int | str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """What a route's decorator is told: who may call it, what can go wrong, what its body is.

    `photos`: it works on photos, so it is turned away while the engine is full. `whole`: its body may be a whole label
    space. Both are given up when the client hangs up; a write that has begun ends all the same.
    """
    known = {
        *_ALWAYS,
        *codes,
        *(() if scope == "read" else _WRITES),
        *(_WITH_BODY if body or photos else ()),
        *(_WITH_PHOTOS if photos else ()),
    }
    by_status: dict[int, list[str]] = {}
    for code in sorted(known):
        by_status.setdefault(STATUS[code], []).append(code)
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": failure, "description": ", ".join(found)} for status, found in sorted(by_status.items())
    }
    extra: dict[str, Any] = {
        "x-kshot-scope": scope,
        "x-kshot-photos": photos,
        "x-kshot-whole": whole,
    }
    if body:
        extra["requestBody"] = {"required": True, "content": body}
    if photos:
        extra["parameters"] = [_DEADLINE]
    return {"responses": responses | (answers or {}), "openapi_extra": extra}


_DEADLINE = {
    "name": DEADLINE,
    "in": "header",
    "required": False,
    "description": "the longest that the answer may take, in milliseconds; past it the request is given up (503)",
    "schema": {"type": "integer", "minimum": 1},
}


def is_question(route: BaseRoute) -> bool:
    """Whether a route answers questions about photos, which is what most requests are."""
    declared = (isinstance(route, APIRoute) and route.openapi_extra) or {}
    return bool(declared.get("x-kshot-photos")) and declared["x-kshot-scope"] == "read"


class Operation(APIRoute):
    """A route that looks at the key before it reads a body, at the load once the body begins, and bounds the body."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **declared: Any) -> None:
        super().__init__(path, endpoint, **declared)
        self.unique_id = self.name  # what generated clients call their functions

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        backend: Backend = scope["app"].state.backend
        declared = self.openapi_extra or {}
        _authorise(scope, declared.get("x-kshot-scope", "admin"))
        settings, length = backend.settings, Headers(scope=scope).get("content-length")
        limit = settings.body_mb * 1_000_000 if declared.get("requestBody") else _JSON_BYTES
        if whole := bool(declared.get("x-kshot-whole")):
            limit = max(limit, settings.space_mb * 1_000_000 + _JSON_BYTES)
        budgets, caller = backend.budgets, caller_of(scope)
        body = Body(
            receive, budgets.bodies, caller, int(length) if length else None, limit, settings.body_s, whole=whole
        )
        response = scope["answer"] = Answer(send, budgets.answers, caller)
        current_caller.set(caller)
        if declared.get("x-kshot-photos"):
            body.began = backend.engine.admission.check
        try:
            answer = super().handle(scope, body.receive, response.send)
            cancels = declared.get("x-kshot-photos") or whole
            await (_unless_gone(answer, body, receive) if cancels else answer)
        except AnswerRefusedError as refused:
            raise refused.problem from None
        finally:
            body.close()
            response.close()


def _authorise(scope: Scope, needed: access.Scope) -> None:
    """The middleware has found the key, if this server needs any. What a key may not see is as if it were not there."""
    key = _key(scope)
    if key is None:
        return
    if not key.may(needed):
        raise Problem("key_not_allowed", f"this key has scope {key.scope}, and this needs {needed}")
    if key.spaces is None:
        return
    path = scope["path_params"]
    space = path.get("space_id", path.get("model"))  # or the model `embed`, which belongs to no label space
    if space is None and needed != "read":
        raise Problem("key_not_allowed", "this key is bound to label spaces: it cannot make others")
    if space is not None and space not in key.spaces | {"embed"}:
        raise Problem("model_unknown" if "model" in path else "space_unknown", "there is no such label space")


def _key(scope: Scope) -> access.Key | None:
    key: access.Key | None = scope.get("state", {}).get("key")
    return key


async def _unless_gone(answer: Awaitable[None], body: Body, receive: Receive) -> None:
    """Wait for the answer, but give it up once the client hangs up, so that its images leave the queue.

    gh:ray-project/ray#41057
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        await body.complete.wait()
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watching: list[asyncio.Task[None]] = []
    soon = asyncio.get_running_loop().call_later(_SOON_S, lambda: watching.append(asyncio.create_task(watch())))
    try:
        await answer
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
    finally:
        soon.cancel()
        for each in watching:
            each.cancel()


async def _backend(request: Request) -> Backend:  # FastAPI would call a plain function in a thread
    return request.app.state.backend


Serving = Annotated[Backend, Depends(_backend)]
SpaceId = Annotated[str, Path(examples=["spc_01jd7x2m9v4k8r3t6w5y0zabcd"])]
ClassId = Annotated[str, Path(examples=["cls_01jd7x2m9v4k8r3t6w5y0zabcd"])]
PhotoId = Annotated[str, Path(examples=["pho_01jd7x2m9v4k8r3t6w5y0zabcd"])]
PageSize = Annotated[int, Query(ge=1, le=1000)]


def _parts(photos: dict[str, Any], *texts: str) -> dict[str, Any]:
    """A multipart body as OpenAPI describes it."""
    text = {"type": "string", "minLength": 1, "maxLength": 200}
    properties: dict[str, Any] = {name: text for name in texts}  # noqa: C420
    required = [*texts, *photos]
    return {
        "schema": {
            "type": "object", "properties": properties | photos, "required": required, "additionalProperties": False,
        }
    }  # fmt: skip


_FILE = {"type": "string", "format": "binary"}
_FILES = {"photos": {"type": "array", "items": _FILE, "minItems": 1}}
PHOTOS = {"multipart/form-data": _parts(_FILES)}
NAMED_PHOTOS = {"multipart/form-data": _parts(_FILES, "name")}
PAIR = {"multipart/form-data": _parts({"a": _FILE, "b": _FILE})}
PHOTO = {f"image/{kind}": {"schema": _FILE} for kind in ("jpeg", "png", "webp")}
ONE_PHOTO = {"application/octet-stream": {"schema": _FILE}} | PHOTO  # as clients send that know no other bytes
JPEG = {"image/jpeg": {"schema": _FILE}}
ZIP = {"application/zip": {"schema": _FILE}}


def author(request: Request) -> str:
    """The name of the key that a write is done with."""
    key = _key(request.scope)
    return key.name if key else ""


def visible(request: Request) -> Collection[str] | None:
    """Ids of the only label spaces that a request may see; none: it may see all."""
    key = _key(request.scope)
    return key.spaces if key else None


def request_id() -> str:
    request = trace.current.get()
    return request.id if request else ""
