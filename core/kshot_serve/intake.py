"""How photos come in: a body counted and timed on its way, its parts, and each part decoded by the bundle's rule.

Bytes only: there is no way to name a URL or a file. What a client says a part is does not matter; its bytes decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request
from starlette.types import Message, Receive

from kshot_runtime.images import ImageError, ImageLimits, ImageRule, ImageTooLargeError, decode
from kshot_serve.problems import Problem
from kshot_serve.spaces import Upload
from kshot_serve.telemetry import Metrics

if TYPE_CHECKING:
    from kshot_serve.backend import Backend

_BODY_PACE = 100_000  # bytes of a body that earn it another second
_SMALL_BYTES, _SMALL_PIXELS = 8192, 128 * 128
_TOGETHER_BYTES = 16384
_TEXT_BYTES = 4096  # of a part that is no photo
_PART_HEADERS, _PART_HEADER_BYTES = 8, 2048
_BESIDES = 8  # parts that may come beside the photos


class Bodies:
    """The bytes that the bodies of all requests under way may take."""

    def __init__(self, most: int) -> None:
        self._left = most

    def take(self, size: int) -> None:
        if size > self._left:
            raise Problem("busy", "too many large requests at once: try again", retry_after=1, reason="bodies")
        self._left -= size

    def give(self, size: int) -> None:
        self._left += size


class Body:
    """A request's body on its way in: at most `limit` bytes, in time, and within what all bodies may take.

    It has so many `seconds`, and earns more as it comes, so that a large one may take its time and one that drips may
    not. Bytes are counted as they come, so a body without Content-Length, or with a false one, gains nothing. `arrived`
    is called when it is complete or given up.
    """

    def __init__(self, receive: Receive, bodies: Bodies, length: int | None, limit: int, seconds: float) -> None:
        self.arrived: Callable[[], None] = lambda: None
        self._receive = receive
        self._bodies = bodies
        self._limit = limit
        self._seconds = seconds
        self._now = asyncio.get_running_loop().time
        self._until = self._now() + seconds
        self._came = self._taken = 0
        self.complete = asyncio.Event()
        if length is not None:
            self._take(length)

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
            self._came += size
            self._take(self._came - self._taken)
            if message.get("more_body", False):
                self._until = min(self._until + size / _BODY_PACE, self._now() + self._seconds)
            else:
                self.complete.set()
                self.arrived()
        return message

    def _take(self, more: int) -> None:
        if more <= 0:
            return
        if self._taken + more > self._limit:
            raise Problem("body_too_large", f"a body may have at most {self._limit:,} bytes here")
        self._bodies.take(more)
        self._taken += more

    def close(self) -> None:
        self.arrived()
        self._bodies.give(self._taken)
        self._taken = 0


@dataclass
class Form:
    """What came: photos under their fields' names, and texts."""

    photos: dict[str, list[bytes]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


async def read_form(
    request: Request, backend: Backend, *, photos: Sequence[str] = ("photos",), texts: Sequence[str] = ()
) -> Form:
    """The parts of a multipart body; or a body that is itself a photo, where no text is asked for."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    most = backend.settings.photos
    if kind == b"multipart/form-data":
        reader = _Parts(options.get(b"boundary", b""), photos, texts, most, backend.settings.image.max_bytes)
        async for chunk in request.stream():
            reader.feed(chunk)
        form = reader.end()
    elif len(photos) == 1 and not texts and (kind.startswith(b"image/") or kind == b"application/octet-stream"):
        form = Form({photos[0]: [await _whole(request, backend.settings.image.max_bytes)]})
    else:
        also = " or a photo itself, as image/jpeg, image/png or image/webp" if len(photos) == 1 and not texts else ""
        raise Problem("media_type_unknown", f"send multipart/form-data{also}")
    if not all(form.photos.get(name) and any(form.photos[name]) for name in photos):
        raise Problem("no_photos", f"no photo came; send {_fields(photos)} as multipart/form-data")
    return form


async def read_uploads(photos: Sequence[bytes], backend: Backend, rule: ImageRule) -> list[Upload | Problem]:
    """Each photo decoded, or why not; in threads, but for a small one by itself. None waits for its fellows' faults."""
    limits, metrics = backend.settings.image, backend.metrics
    if len(photos) == 1 and len(photos[0]) <= _SMALL_BYTES:  # handing it to a thread would take as long as it does
        small = limits.model_copy(update={"max_pixels": min(_SMALL_PIXELS, limits.max_pixels)})
        upload = _decode(photos[0], rule, small, metrics)
        if not isinstance(upload, Problem) or upload.code != "photo_too_large":
            return [upload]

    def decoded(some: Sequence[bytes]) -> list[Upload | Problem]:
        return [_decode(photo, rule, limits, metrics) for photo in some]

    parts = await asyncio.gather(*(backend.engine.in_thread(decoded, some) for some in _together(photos)))
    return [upload for part in parts for upload in part]


def _together(photos: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """The photos in the same order, as one thread takes them: a large one alone, as many small ones as are like one."""
    start = size = 0
    for i, photo in enumerate(photos):
        if size and size + len(photo) > _TOGETHER_BYTES:
            yield photos[start:i]
            start, size = i, 0
        size += len(photo)
    yield photos[start:]


@asynccontextmanager
async def timely(deadline: float) -> AsyncIterator[None]:
    """Give up what is not done by the deadline."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError:
        raise Problem("too_late", "no answer in time; try again", retry_after=1, reason="deadline") from None


def all_sound(uploads: Sequence[Upload | Problem]) -> list[Upload]:
    """The uploads, if every photo is sound; else the first fault, with the number of its photo."""
    sound = []
    for number, upload in enumerate(uploads, 1):
        if isinstance(upload, Problem):
            raise Problem(upload.code, f"photo {number}: {upload.message}") if len(uploads) > 1 else upload
        sound.append(upload)
    return sound


def _decode(photo: bytes, rule: ImageRule, limits: ImageLimits, metrics: Metrics) -> Upload | Problem:
    with metrics.stage("decode"):
        try:
            return Upload(photo, decode(photo, rule, limits), rule)
        except ImageTooLargeError as error:
            return Problem("photo_too_large", str(error))
        except ImageError as error:  # kshot_runtime.images words it, and never with the decoder's own text
            return Problem("not_an_image", str(error))


async def _whole(request: Request, most: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise _too_large(most)
    return bytes(body)


class _Parts:
    """A multipart body, read as it comes, refused at the first byte too much."""

    def __init__(
        self, boundary: bytes, photos: Sequence[str], texts: Sequence[str], most: int, photo_bytes: int
    ) -> None:
        self._fields = {name.encode(): True for name in photos} | {name.encode(): False for name in texts}
        self._names = _fields([*texts, *photos])
        self._most = most
        self._photo_bytes = photo_bytes
        self._form = Form()
        self._parts = self._photos = 0
        self._header = self._value = self._disposition = b""
        self._name = b""
        self._content = bytearray()
        self._ended = False
        with _as_problem():
            if not boundary:
                raise FormParserError
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._header_name,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._data,
                    "on_part_end": self._end,
                    "on_end": self._all,
                },
                max_header_count=_PART_HEADERS,
                max_header_size=_PART_HEADER_BYTES,
            )

    def feed(self, chunk: bytes) -> None:
        if self._ended:
            return  # RFC 2046: an epilogue is to be ignored
        with _as_problem():
            self._parser.write(chunk)

    def end(self) -> Form:
        if not self._ended:
            raise Problem("bad_request", "the multipart body is cut short: its last boundary is missing")
        return self._form

    def _begin(self) -> None:
        self._parts += 1
        if self._parts > self._most + _BESIDES:
            raise _too_many(self._most)
        self._disposition = b""
        self._content = bytearray()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers_end(self) -> None:
        self._name = parse_options_header(self._disposition.decode("latin-1"))[1].get(b"name", b"")
        if self._name not in self._fields:
            raise Problem("bad_request", f"a part has a name that is not asked for here; the parts are {self._names}")
        self._photos += self._fields[self._name]
        if self._photos > self._most:
            raise _too_many(self._most)

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._content += memoryview(data)[start:end]
        if self._fields[self._name]:
            if len(self._content) > self._photo_bytes:
                raise _too_large(self._photo_bytes)
        elif len(self._content) > _TEXT_BYTES:
            raise Problem("bad_request", f"a part that is no photo may have at most {_TEXT_BYTES:,} bytes")

    def _end(self) -> None:
        name = self._name.decode()
        if self._fields[self._name]:
            self._form.photos.setdefault(name, []).append(bytes(self._content))
            return
        if name in self._form.texts:
            raise Problem("bad_request", f"{name} came twice")
        try:
            self._form.texts[name] = self._content.decode()
        except UnicodeDecodeError:
            raise Problem("bad_request", f"{name} is not UTF-8") from None

    def _all(self) -> None:
        self._ended = True


@contextmanager
def _as_problem() -> Iterator[None]:
    try:
        yield
    except FormParserError:
        raise Problem("bad_request", "the body is no multipart/form-data that can be read") from None


def _fields(names: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def _too_many(most: int) -> Problem:
    return Problem("too_many_photos", f"more than {most} photos came in one request; send fewer at once")


def _too_large(most: int) -> Problem:
    return Problem("photo_too_large", f"a photo may have at most {most:,} bytes")
