"""The ASGI application: its life, its middleware, its routes, the page, and the words of its errors."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from kshot_serve.api.middleware import Envelope, Guard, refuse
from kshot_serve.api.operation import Operation, is_question, operation
from kshot_serve.api.routes import classes, health, protocol, questions, repository, spaces
from kshot_serve.api.statistics import Statistics
from kshot_serve.backend import DEADLINE, Backend
from kshot_serve.errors import Problem
from kshot_serve.settings import Settings

_PAGE_POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
_DESCRIPTION = (
    "Few-shot image classification: make a label space, give each class a few photos, and ask what others show. "
    "A class is known from the next request on. Photos are JPEG, PNG or WebP, as multipart/form-data or by themselves."
)


def create_app(settings: Settings) -> FastAPI:
    """A server as an ASGI application; `app.state.backend` holds its parts."""
    backend = Backend(settings)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        try:
            await backend.start()
            yield
        finally:
            await backend.stop()

    app = FastAPI(
        title="kshot",
        version=version("kshot"),
        description=_DESCRIPTION,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        # A span for each request, to where OTEL_EXPORTER_OTLP_ENDPOINT says; metrics and logs are ours.
        telemetry={"auto_configure": True, "metrics": False, "logs": False, "operation_spans": False},
    )
    app.state.backend = backend
    app.state.statistics = Statistics()
    routes: list[APIRoute] = []
    open_ = [_page(), _description(app, routes)]
    parts = [spaces, classes, questions, repository, protocol, health]
    routers = [*open_, *(part.router for part in parts)]
    routes += [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    # They are tried one after the other: flat, and questions first. As routers they took a fifth of a small request.
    app.router.routes.extend(sorted(routes, key=is_question, reverse=True))
    _word_errors(app, backend, routes)
    # The last one added is the outermost.
    paths = [route.path for router in open_ for route in router.routes if isinstance(route, APIRoute)]
    app.add_middleware(Guard, backend=backend, open_paths=paths)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.origins),
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["Authorization", "X-API-Key", "Content-Type", "traceparent", DEADLINE],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    app.add_middleware(Envelope, backend=backend)
    return app


def _page() -> APIRouter:
    """A route for each file of the page and of Swagger UI, at its exact path: no path from a request is followed."""
    router = APIRouter(route_class=Operation)
    for path, file in _files():
        kind = mimetypes.guess_type(file.name)[0]
        if kind and file.is_file():
            answer, methods = _file(file.read_bytes(), kind), ["GET", "HEAD"]
            router.add_api_route(path, answer, methods=methods, include_in_schema=False, **operation("read"))
    return router


def _files() -> Iterator[tuple[str, Traversable]]:
    special = {"index.html": "/", "docs.html": "/docs"}
    for file in (files("kshot_serve") / "page").iterdir():
        yield special.get(file.name, f"/page/{file.name}"), file
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        yield f"/docs/{name}", files("fastapi_swagger.resources") / name


def _file(content: bytes, kind: str) -> Any:
    headers = {
        "Content-Security-Policy": _PAGE_POLICY,
        "Cache-Control": "no-cache",
        "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"',
    }

    async def file(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return file


def _description(app: FastAPI, routes: Sequence[APIRoute]) -> APIRouter:
    """/openapi.json. It needs no key, like the page: it describes this package, and holds no data."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            app.openapi_schema = _trim(
                get_openapi(title=app.title, version=app.version, description=app.description, routes=routes)
            )
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    described = APIRouter(route_class=Operation)

    @described.get("/openapi.json", include_in_schema=False, **operation("read"))
    async def description() -> Response:
        return JSONResponse(app.openapi())

    return described


def _trim(schema: dict[str, Any]) -> dict[str, Any]:
    """Say which key each operation needs, and leave out FastAPI's own 422: what does not validate is a 400 here."""
    for methods in schema["paths"].values():
        for each in methods.values():
            if "HTTPValidationError" in str(each["responses"].get("422", "")):
                del each["responses"]["422"]
            each["security"] = [{}, {"key": [each["x-kshot-scope"]]}]
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    schema["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "a key from `kshot keys new`: kshot_..."}
    }
    return schema


def _word_errors(app: FastAPI, backend: Backend, routes: Sequence[APIRoute]) -> None:
    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> Response:
        return refuse(error, request.scope, backend)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        """Where, and what would fit; never what came, which may be anything."""
        faults = [f"{'.'.join(map(str, fault['loc'][1:])) or 'body'}: {fault['msg']}" for fault in error.errors()[:5]]
        return refuse(Problem("bad_request", "; ".join(faults)), request.scope, backend)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if isinstance(error.__cause__, Problem):  # FastAPI makes its own of whatever ends the reading of a JSON body
            return refuse(error.__cause__, request.scope, backend)
        if error.status_code == 404:
            answer = Problem("not_found", "there is nothing at this path; /docs lists what there is")
        elif error.status_code == 405:
            answer = Problem("method_not_allowed", "this path does not take this method; /docs lists what there is")
        else:
            answer = Problem("bad_request", "the request cannot be read")
        response = refuse(answer, request.scope, backend)
        if error.status_code == 405:
            response.headers["Allow"] = ", ".join(_methods(routes, request.scope["path"]))
        return response


def _methods(routes: Sequence[APIRoute], path: str) -> list[str]:
    """What a path takes, over all of its routes: Starlette tells of the first one only."""
    matching = [route for route in routes if route.path_regex.match(path)]
    exact = [route for route in matching if route.path == path]
    return sorted({method for route in exact or matching for method in route.methods or ()})
