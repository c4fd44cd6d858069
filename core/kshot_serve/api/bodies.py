"""Request bodies: counted and timed as they arrive. Answers: sent in pieces, and counted until they are read."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Receive, Send

from kshot_serve.backend import Backend
from kshot_serve.budgets import Share, caller_of
from kshot_serve.errors import Problem

_GZIP_OR_ZLIB = 47  # zlib's wbits for either header, found out from the data
_INFLATED = 4_000_000  # bytes inflated at once
_BODY_PACE = 100_000  # bytes of a body that earn it another second
_PIECE = 64_000  # bytes of an answer that are sent at once; smaller answers are not counted
_STREAM = 1_000_000  # bytes counted for an answer whose length is not known: its pieces are no larger


class Body:
    """A request's body on its way in: at most `limit` bytes, in time, and within its caller's share of all bodies.

    Only bytes that have arrived are counted: an announced length reserves nothing, and is refused if it is above the
    limit. The body has so many `seconds`, and earns more as it comes, so that a large one may take its time and one
    that drips may not. `began` is called when its first bytes come. With `whole` it may take all of the bodies' bytes
    that are free, and not its caller's share only.
    """

    def __init__(
        self,
        receive: Receive,
        bodies: Share,
        caller: str,
        length: int | None,
        limit: int,
        seconds: float,
        *,
        whole: bool = False,
    ) -> None:
        self.began: Callable[[], None] = lambda: None
        self._receive = receive
        self._bodies = bodies
        self._caller = caller
        self._limit = limit
        self._seconds = seconds
        self._whole = whole
        self._now = asyncio.get_running_loop().time
        self._until = self._now() + seconds
        self._taken = 0
        self.complete = asyncio.Event()
        self._check(length or 0)

    async def receive(self) -> Message:
        """ASGI's receive."""
        if self.complete.is_set():
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise Problem(
                "body_too_slow",
                f"the body comes too slowly: {_BODY_PACE // 1000} kB a second are expected; send less at once",
            ) from None
        if message["type"] == "http.request":
            size = len(message.get("body", b""))
            self._check(self._taken + size)
            if size and not self._taken:
                self.began()
            self._bodies.take(self._caller, size, all_of_it=self._whole)
            self._taken += size
            if message.get("more_body", False):
                self._until = min(self._until + size / _BODY_PACE, self._now() + self._seconds)
            else:
                self.complete.set()
        return message

    def _check(self, size: int) -> None:
        if size > self._limit:
            raise Problem("body_too_large", f"a body may have at most {self._limit:,} bytes here")

    def close(self) -> None:
        self._bodies.give(self._caller, self._taken)
        self._taken = 0


@asynccontextmanager
async def inflated(request: Request, backend: Backend) -> AsyncIterator[bytes]:
    """A request's body, inflated if it says so; what that takes is limited and counted as the body itself is."""
    body = await request.body()
    encoding = request.headers.get("content-encoding", "identity")
    if encoding == "identity":
        yield body
        return
    if encoding not in ("gzip", "deflate"):
        raise Problem("media_type_unknown", "bodies are taken as they are, or compressed as gzip or deflate")
    inflater, limit, pieces, size = zlib.decompressobj(_GZIP_OR_ZLIB), backend.settings.body_mb * 1_000_000, [], 0
    bodies, caller = backend.budgets.bodies, caller_of(request.scope)
    try:
        while not inflater.eof:
            try:
                piece = await backend.engine.in_thread(inflater.decompress, body, _INFLATED)
            except zlib.error:
                piece = b""
            if not piece and not inflater.eof:
                raise Problem("bad_request", f"the body is not {encoding}, or is cut short")
            if size + len(piece) > limit:
                raise Problem("body_too_large", f"a body may have at most {limit:,} bytes here, once inflated")
            bodies.take(caller, len(piece))
            size += len(piece)
            pieces.append(piece)
            body = inflater.unconsumed_tail
        if inflater.unused_data:
            raise Problem("bad_request", f"the body goes on after its {encoding} data")
        yield b"".join(pieces)
    finally:
        bodies.give(caller, size)


class AnswerRefusedError(Exception):
    """An answer that is larger than its caller may have now; nothing of it was sent."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class Answer:
    """An answer on its way out, within its caller's share of all answers.

    Its body is handed on in pieces, and each piece waits until the connection has room for it, so that of a large
    answer the connection holds two pieces at most. The answer itself is in memory until then, and is counted.
    `until_sent` holds what is to be let go when the answer has been sent or given up.
    """

    def __init__(self, send: Send, answers: Share, caller: str) -> None:
        self._send = send
        self._answers = answers
        self._caller = caller
        self._taken = 0
        self.until_sent = ExitStack()

    async def send(self, message: Message) -> None:
        """ASGI's send. Raises AnswerRefusedError before anything is sent."""
        if message["type"] == "http.response.start":
            size = int(Headers(raw=message["headers"]).get("content-length", _STREAM))
            if size > _PIECE and message["status"] not in (204, 304):
                try:
                    self.reserve(size)
                except Problem as problem:
                    raise AnswerRefusedError(problem) from None
        elif len(content := message.get("body", b"")) > _PIECE:
            for start in range(0, len(content) - _PIECE, _PIECE):
                await self._send({**message, "body": content[start : start + _PIECE], "more_body": True})
            rest = len(content) % _PIECE or _PIECE
            message = {**message, "body": content[-rest:]}
        await self._send(message)

    def reserve(self, size: int) -> None:
        """Count an answer of so many bytes before it is made, or raise Problem `busy` (429)."""
        if size > self._taken:
            self._answers.take(self._caller, size - self._taken)
            self._taken = size

    def close(self) -> None:
        self.until_sent.close()
        self._answers.give(self._caller, self._taken)
        self._taken = 0
