"""uvicorn's HTTP connections with limits: their number, the size of a head, and how long a client may take."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
from contextlib import suppress
from random import getrandbits
from typing import Any, Literal

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from kshot_serve.api.middleware import credential_of
from kshot_serve.budgets import SPARE_FILES, Budgets
from kshot_serve.observe.metrics import Metrics
from kshot_serve.settings import Settings
from kshot_serve.storage.keys import OPEN

log = logging.getLogger("kshot.serve")

_HEAD_BYTES = 64_000
_QUEUED = 32  # requests of one connection that wait for those before them (pipelining)
_MOMENT_S = 0.05
_NOT_HTTP = "this is no HTTP/1.1 request that can be read"
_AGAIN = "requests go on coming though they were refused as too many: wait a second"
_LARGE = f"the head of a request may have at most {_HEAD_BYTES // 1000} kB"

Cut = Literal["full", "late", "idle", "unread"]
"""Why a connection was closed: for a new one, its head was late, it was idle for long, its answer was not read."""


def _again(error: object) -> JSONResponse:
    return JSONResponse({"error": error}, 429, {"Retry-After": "1", "Cache-Control": "no-store"})


_V2_AGAIN = _again(_AGAIN)
_ANY_AGAIN = _again({"code": "busy", "message": _AGAIN, "request_id": "", "reason": "again"})


async def _refused_again(scope: Scope, receive: Receive, send: Send) -> None:
    """The answer to who goes on sending after a refusal: it costs a tenth of one that the application gives."""
    await (_V2_AGAIN if scope["path"].startswith("/v2") else _ANY_AGAIN)(scope, receive, send)


def raise_file_limit() -> None:
    """Let this process open as many files, connections among them, as the system lets it (RLIMIT_NOFILE)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems call their limit infinite and take less
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Connections:
    """All connections of a server. Those that are idle may be closed for new ones.

    Where `most` are open, a new connection closes the one that has been silent for longest, of those that were never
    answered if there are any. While all have requests under way, requests of new ones are refused (`surplus` in the
    state of their scope), but for the health checks; half of the files held in reserve are for those.
    """

    def __init__(self, settings: Settings, metrics: Metrics, budgets: Budgets) -> None:
        self.settings = settings
        self.most = budgets.connections
        self._budgets = budgets
        self.open = 0
        self.silent: dict[Connection, None] = {}  # not answered yet, the oldest first
        self.idle: dict[Connection, None] = {}  # between requests, the longest first
        self._metrics = metrics
        self._told = False

    def protocol(self, *args: Any, **kwargs: Any) -> Connection:
        """A new connection, as uvicorn makes its own."""
        return Connection(self, *args, **kwargs)

    def opened(self, connection: Connection) -> None:
        self.open += 1
        self._metrics.connections.set(self.open)
        if self.open <= self.most:
            return
        if not self._told:
            self._told = True
            log.warning("%d connections are open, the most there may be: idle ones are closed for new ones", self.most)
        for waiting in (self.silent, self.idle):
            if waiting:
                first = next(iter(waiting))
                del waiting[first]
                return first.cut("full")
        connection.surplus = True
        if self.open > self.most + SPARE_FILES // 2:
            connection.cut("full")

    def closed(self, connection: Connection) -> None:
        self.open -= 1
        self._metrics.connections.set(self.open)
        self._told = self._told and self.open > 0.9 * self.most
        self.silent.pop(connection, None)
        self.idle.pop(connection, None)

    def cut(self, why: Cut) -> None:
        self._metrics.cut.labels(why).inc()

    def refuses(self, scope: Any) -> bool:
        """Whether this caller has just been refused for having sent too much, and is to wait a second."""
        refuses = self._budgets.refuses(lambda: credential_of(scope, self.settings))
        if refuses:
            self._metrics.refusals.labels("busy", "again").inc()
        return refuses

    def refused(self, message: str, id_: str) -> None:
        """Count and log what is no HTTP like any request that is refused."""
        self._metrics.refusals.labels("bad_request", "http").inc()
        self._metrics.requests.labels("unmatched", "400").inc()
        fields = {"route": "unmatched", "status": 400, "why": message, "request_id": id_}
        log.info("request", extra={"fields": fields})


class Connection(HttpToolsProtocol):
    """uvicorn's connection, closed if a head is late (slowloris) or too large, and if an answer is not read."""

    def __init__(self, connections: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.surplus = False
        self._all = connections
        self._awaited: Literal["request", "rest of a head"] | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._head: int | None = None  # bytes that came of a head that is not complete
        self._within = False  # a message, from the first byte of its head to the last of its body
        self._begun = 0  # messages that began in this chunk
        self._fault = _NOT_HTTP
        self._unread = 0  # bytes of answers that the client had not read when its clock was started
        self._read_clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._all.opened(self)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves its clock running after a reset, which holds everything
        for clock in (self._clock, self._read_clock):
            if clock:
                clock.cancel()
        self._all.closed(self)

    def cut(self, why: Cut) -> None:
        """Close the connection at once, whatever is still to be sent."""
        self._all.cut(why)
        self.transport.abort()

    # What comes ------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        alone = not self._within
        self._begun = 0
        if self._head is not None:
            self._head += len(data)
        super().data_received(data)
        if self._head is not None and alone and self._begun == 1:  # all of this chunk is of one head
            self._head = len(data)
        self._expect()
        if self._head is not None and self._head > _HEAD_BYTES and not self.transport.is_closing():
            self._fault = _LARGE
            self.send_400_response(_LARGE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head, self._within = 0, True
        self._begun += 1

    def on_headers_complete(self) -> None:
        """An error here becomes one of the parser, for which uvicorn sends a 400."""
        self._head = None
        if len(self.pipeline) >= _QUEUED:
            self._fault = f"more than {_QUEUED} requests came behind each other, without waiting for their answers"
            raise ValueError(self._fault)
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > _HEAD_BYTES:
            self._fault = _LARGE
            raise ValueError(_LARGE)
        if self.surplus and self._all.open > self._all.most:
            self.scope["state"]["surplus"] = True
        app = self.app
        if self.url.decode("latin-1") not in OPEN and self._all.refuses(self.scope):
            self.app = _refused_again
        super().on_headers_complete()
        self.app = app

    def on_message_complete(self) -> None:
        self._within = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what is no HTTP, in the shape of the API; never in the middle of another answer."""
        id_ = f"req_{getrandbits(80):020x}"
        self._all.refused(self._fault, id_)
        if self.pipeline or (self.cycle and self.cycle.response_started and not self.cycle.response_complete):
            return self.transport.close()
        error = {"code": "bad_request", "message": self._fault, "request_id": id_}
        body = json.dumps({"error": self._fault if getattr(self, "url", b"").startswith(b"/v2") else error}).encode()
        lines = [
            STATUS_LINE[400].rstrip(),
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"cache-control: no-store",
            b"x-request-id: " + id_.encode(),
            b"connection: close",
        ]
        self.transport.write(b"\r\n".join([*lines, b"", body]))
        self.transport.close()

    # What is awaited -------------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect()
        self._watch_reader()

    def _expect(self) -> None:
        """Run a clock while something is awaited: for a head, from its first moment and not from its last byte."""
        awaited: Literal["request", "rest of a head"] | None = None
        if self._head is not None:
            awaited = "rest of a head"
        elif self.cycle is None or self.cycle.response_complete:
            awaited = "request"
        if awaited == self._awaited:
            return
        self._awaited = awaited
        if self._clock:
            self._clock.cancel()
        limits = self._all.settings
        if awaited is None:
            self._all.silent.pop(self, None)
            self._all.idle.pop(self, None)
        elif awaited == "rest of a head":
            self._clock = self.loop.call_later(limits.headers_s, self._close, "late")
        else:
            (self._all.idle if self.cycle else self._all.silent)[self] = None
            self._clock = self.loop.call_later(limits.idle_s if self.cycle else limits.headers_s, self._look_once_more)

    def _look_once_more(self) -> None:
        """Into the socket: a busy server's clocks run out before it sees that a request has come."""
        self._clock = self.loop.call_later(_MOMENT_S, self._close, "idle" if self.cycle else "late")

    def _close(self, why: Cut) -> None:
        self._all.cut(why)
        self.transport.close()

    # What is not read ------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_clock:
            self._read_clock.cancel()
            self._read_clock = None

    def _watch_reader(self) -> None:
        """Run a clock while there is something that the client has not read."""
        if self._read_clock is None and (unread := self.transport.get_write_buffer_size()):
            self._unread = unread
            self._read_clock = self.loop.call_later(self._all.settings.unread_s, self._look_at_reader)

    def _look_at_reader(self) -> None:
        """Cut off a client that has read nothing since its clock was started."""
        self._read_clock = None
        if self.transport.get_write_buffer_size() >= self._unread:
            self.cut("unread")
        else:
            self._watch_reader()
