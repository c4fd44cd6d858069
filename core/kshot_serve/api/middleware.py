"""Around every request, before any route: its id and trace, its log line, Host, origin, key, headers for browsers."""

from __future__ import annotations

import ipaddress
import logging
import re
from collections.abc import Iterable
from math import ceil
from time import perf_counter
from typing import get_args

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kshot_serve.backend import Backend
from kshot_serve.budgets import Reason, address_of, caller_of
from kshot_serve.errors import Problem
from kshot_serve.observe import trace
from kshot_serve.settings import Settings
from kshot_serve.storage.keys import OPEN, Key

log = logging.getLogger("kshot.serve")

_GONE = 499  # the client hung up before its answer: only ever in logs and metrics

_NOT_IN_HOST = re.compile(r"[\s@/?#,\\]")  # a user's name before an @, above all

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


def refuse(problem: Problem, scope: Scope, backend: Backend) -> Response:
    """A refusal in the shape of the API that was asked: /v2 has the protocol's, everything else ours."""
    backend.metrics.refusals.labels(problem.code, problem.reason).inc()
    request = trace.current.get()
    if request is not None:
        request.more["code"] = problem.code
    if scope["path"].startswith("/v2"):
        content: dict[str, object] = {"error": problem.message}
    else:
        error = {"code": problem.code, "message": problem.message, "request_id": request.id if request else ""}
        content = {"error": error | ({"reason": problem.reason} if problem.reason else {})}
    headers = {}
    if problem.retry_after is not None:
        headers["Retry-After"] = str(max(1, ceil(problem.retry_after)))
        if problem.reason in get_args(Reason):
            backend.budgets.refused(credential_of(scope, backend.settings), problem.retry_after)
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(content, problem.status, headers)


class Envelope:
    """Id, trace, metrics and log line of a request; and whatever goes wrong inside becomes a 500 that tells nothing."""

    def __init__(self, app: ASGIApp, backend: Backend) -> None:
        self.app = app
        self.backend = backend

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = trace.Request.begin(Headers(scope=scope))
        token = trace.current.set(request)
        status = _GONE

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers["X-Request-Id"] = request.id
                headers.update(request.headers)
                if self.backend.leaving or scope.get("state", {}).get("surplus"):
                    headers["Connection"] = "close"
            await send(message)

        try:
            await self.app(scope, receive, told)
        except ClientDisconnect:
            pass
        except Exception:
            log.exception("a request failed")
            if status == _GONE:
                await refuse(
                    Problem("internal", "something failed here; the log has it under this id"), scope, self.backend
                )(scope, receive, told)
        finally:
            self._told(scope, request, status)
            trace.current.reset(token)

    def _told(self, scope: Scope, request: trace.Request, status: int) -> None:
        seconds = perf_counter() - request.started
        matched = scope.get("route")  # its template: each raw path or method would make a metric of its own
        route = "unmatched"
        if matched is not None and scope["method"] in matched.methods:
            route = f"{scope['method']} {matched.path}"
        self.backend.metrics.requests.labels(route, str(status)).inc()
        self.backend.metrics.request_seconds.labels(route).observe(seconds)
        fields = {"route": route, "status": status, "ms": round(1000 * seconds, 1)}
        stages = {f"{stage}_ms": round(1000 * took, 1) for stage, took in request.stages.items()}
        log.info("request", extra={"fields": fields | stages | request.more})


class Guard:
    """No request for another host or from another's page, none without a key where one is needed, none at the end."""

    def __init__(self, app: ASGIApp, backend: Backend, open_paths: Iterable[str] = ()) -> None:
        self.app = app
        self.backend = backend
        self._open = OPEN | frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        budgets = self.backend.budgets
        try:
            await self._check(scope)
            if scope["path"] in OPEN:
                return await self.app(scope, receive, send)
            caller = caller_of(scope)
            budgets.request_rate.take(caller)
            budgets.requests.take(caller, 1)
        except Problem as problem:
            await refuse(problem, scope, self.backend)(scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        finally:
            budgets.requests.give(caller, 1)

    async def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        hosts = headers.getlist("host")
        if len(hosts) > 1 or (not hosts and scope["http_version"] == "1.1") or _NOT_IN_HOST.search("".join(hosts)):
            raise Problem("bad_request", "a request has one Host header, with a name or address and perhaps a port")
        if not self._is_ours(headers.get("host", "")):
            raise Problem("host_not_allowed", "this server does not go by the name in Host; see --allow-host")
        if not self._may_come_from(headers.get("origin"), headers.get("host", "")):
            raise Problem("origin_not_allowed", "a page of another origin may not call this server; see --origin")
        if scope.get("state", {}).get("surplus") and path not in OPEN:
            raise Problem("busy", "too many connections are open: try again", retry_after=1, reason="connections")
        if self.backend.draining and path not in OPEN:
            raise Problem("draining", "this server is shutting down: ask another, or again", retry_after=1)
        if self.backend.settings.needs_keys and path not in self._open:
            key = await self._key(_key_in(headers), address_of(scope))
            scope.setdefault("state", {})["key"] = key
            if (request := trace.current.get()) is not None:
                request.more["key"] = key.id

    async def _key(self, text: str | None, address: str) -> Key:
        """The key of this text, or a Problem. Only so many wrong keys a second may ask the database.

        Those are counted for each address; but where the id is right, for that key, so that nobody's right key is held
        up by wrong ones from the same address, which may be a proxy's.
        """
        keys, rate = self.backend.keys, self.backend.budgets.wrong_key_rate
        if not text or keys.remembers(text):
            return await keys.check(text)
        caller = await keys.id_in(text) or address
        rate.take(caller)
        try:
            key = await keys.check(text)
        except Problem as problem:
            if problem.code != "key_unknown":
                rate.give(caller)
            raise
        rate.give(caller)
        return key

    def _may_come_from(self, origin: str | None, host: str) -> bool:
        """Whether the page that calls, if it is one, is ours or one that was named.

        A page from elsewhere can send forms and photos here without asking, though it does not see the answer. Where
        keys are needed it has none; elsewhere what it does would be done.
        """
        settings = self.backend.settings
        if origin is None or settings.needs_keys or origin in settings.origins or "*" in settings.origins:
            return True
        return origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())

    def _is_ours(self, host: str) -> bool:
        """Whether a browser that calls us by this name does so on purpose.

        A page from elsewhere can make a name of its own point at 127.0.0.1 and call this server through it (DNS
        rebinding). It cannot do so with an address. Where keys are needed, that page has none.
        """
        settings = self.backend.settings
        if settings.needs_keys and not settings.hosts:
            return True
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").lower().rstrip(".")
        if name in {"localhost", settings.host.lower(), *(each.lower() for each in settings.hosts)}:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def credential_of(scope: Scope, settings: Settings) -> str:
    """What tells a request's caller before its key is known: the key as it came, or its client's address."""
    return (settings.needs_keys and _key_in(Headers(scope=scope))) or address_of(scope)


def _key_in(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return headers.get("x-api-key")
