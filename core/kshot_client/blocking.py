"""The client without asyncio: `Client` and `Space` have the methods of `AsyncClient` and `AsyncSpace`.

A coroutine whose requests block never waits, so it runs without an event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from kshot_client.client import AsyncClient
from kshot_client.space import AsyncSpace

if TYPE_CHECKING:
    import httpx

P = ParamSpec("P")
R = TypeVar("R")


class _BlockingRequests(AsyncClient):
    def _connect(self, httpx: Any, **settings: Any) -> Any:
        return httpx.Client(**settings)

    async def _request(self, method: str, path: str, **sent: Any) -> httpx.Response:
        return self._http.request(method, path, **sent)

    async def _pause(self, seconds: float) -> None:
        time.sleep(seconds)

    async def close(self) -> None:
        self._http.close()


def _run(coroutine: Coroutine[Any, Any, R]) -> R:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("the coroutine waits")


def _blocking(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Any, P], R]:
    """The same method without `await`, for a class that keeps the object with the method in `_awaited`."""

    @wraps(method)
    def call(self: Any, /, *given: P.args, **named: P.kwargs) -> R:
        return _run(method(self._awaited, *given, **named))

    return call


class Client:
    """A connection to a server. A busy server is asked again after the time that it names."""

    def __init__(self, url: str = "http://127.0.0.1:8000", key: str | None = None, timeout: float = 60.0) -> None:
        self._awaited = _BlockingRequests(url, key, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        _run(self._awaited.close())

    def space(self, name: str) -> Space:
        """The label space of this name; a new one if there is none."""
        return Space(_run(self._awaited.space(name)))

    def spaces(self) -> list[Space]:
        """All label spaces, from the oldest to the newest."""
        return [Space(space) for space in _run(self._awaited.spaces())]

    def import_space(self, exported: bytes) -> Space:
        """A new label space made of an exported one."""
        return Space(_run(self._awaited.import_space(exported)))

    call = _blocking(AsyncClient.call)
    embed = _blocking(AsyncClient.embed)
    limits = _blocking(AsyncClient.limits)
    same = _blocking(AsyncClient.same)


class Space:
    """A label space on a server."""

    def __init__(self, awaited: AsyncSpace) -> None:
        self._awaited = awaited

    def __repr__(self) -> str:
        return f"Space({self.name!r}, {self.id})"

    @property
    def id(self) -> str:
        return self._awaited.id

    @property
    def name(self) -> str:
        return self._awaited.name

    accept = _blocking(AsyncSpace.accept)
    add = _blocking(AsyncSpace.add)
    classes = _blocking(AsyncSpace.classes)
    classify = _blocking(AsyncSpace.classify)
    classify_all = _blocking(AsyncSpace.classify_all)
    delete = _blocking(AsyncSpace.delete)
    delete_class = _blocking(AsyncSpace.delete_class)
    delete_photo = _blocking(AsyncSpace.delete_photo)
    export = _blocking(AsyncSpace.export)
    fill = _blocking(AsyncSpace.fill)
    photo = _blocking(AsyncSpace.photo)
    rename = _blocking(AsyncSpace.rename)
    rename_class = _blocking(AsyncSpace.rename_class)
    revisions = _blocking(AsyncSpace.revisions)
    rollback = _blocking(AsyncSpace.rollback)
