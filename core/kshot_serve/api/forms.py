"""Multipart bodies: the photos and texts in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from kshot_serve.backend import Backend
from kshot_serve.errors import Problem

_TEXT_BYTES = 4096  # of a part that is no photo
_PART_HEADERS, _PART_HEADER_BYTES = 8, 2048
_BESIDES = 8  # parts that may come beside the photos


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
