"""The client for asyncio, on which the blocking one is built."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kshot_client.errors import ClientError, RefusedError
from kshot_client.folders import normal
from kshot_client.photos import Photo, batches, parts, read
from kshot_client.space import AsyncSpace

if TYPE_CHECKING:
    import httpx

_AGAIN = frozenset({"busy", "draining", "not_ready"})  # refused before anything was done
_TRIES = 5


class AsyncClient:
    """A connection to a server, for asyncio. A busy server is asked again after the time that it names."""

    def __init__(self, url: str = "http://127.0.0.1:8000", key: str | None = None, timeout: float = 60.0) -> None:
        try:
            import httpx  # here, since kshot's own server imports this package and needs no httpx
        except ImportError:
            raise ClientError("the client needs httpx: pip install 'kshot[client]'") from None
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = self._connect(httpx, base_url=url, headers=headers, timeout=timeout)
        self._limits: dict[str, Any] | None = None

    def _connect(self, httpx: Any, **settings: Any) -> Any:
        return httpx.AsyncClient(**settings)

    async def _request(self, method: str, path: str, **sent: Any) -> httpx.Response:
        return await self._http.request(method, path, **sent)

    async def _pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def call(self, /, method: str, path: str, **sent: Any) -> httpx.Response:
        """A request as httpx takes it, and its answer, or a RefusedError."""
        tries = 1
        while not (response := await self._request(method, path, **sent)).is_success:
            refused = _refused(response)
            if refused.code not in _AGAIN or tries == _TRIES:
                raise refused
            await self._pause(float(response.headers.get("Retry-After", 1)))
            tries += 1
        return response

    async def limits(self) -> dict[str, Any]:
        """What the server takes: formats, sizes, photos in a request, and what its model can adapt to."""
        self._limits = (await self.call("GET", "/v1/limits")).json()
        return self._limits

    async def space(self, name: str) -> AsyncSpace:
        """The label space of this name; a new one if there is none."""
        name = normal(name)
        for space in await self.spaces():
            if space.name == name:
                return space
        return AsyncSpace(self, (await self.call("POST", "/v1/spaces", json={"name": name})).json())

    async def spaces(self) -> list[AsyncSpace]:
        """All label spaces, from the oldest to the newest."""
        found: list[AsyncSpace] = []
        after: str | None = ""
        while after is not None:
            page = (await self.call("GET", "/v1/spaces", params={"after": after, "limit": 1000})).json()
            found += [AsyncSpace(self, space) for space in page["spaces"]]
            after = page["next"]
        return found

    async def import_space(self, exported: bytes) -> AsyncSpace:
        """A new label space made of an exported one."""
        headers = {"Content-Type": "application/zip"}
        made = await self.call("POST", "/v1/spaces/import", content=exported, headers=headers)
        return AsyncSpace(self, made.json())

    async def embed(self, photos: Photo | Sequence[Photo]) -> list[list[float]]:
        """Photos as vectors. More photos than one request takes go in several."""
        vectors: list[list[float]] = []
        for batch in await self._batches(photos):
            vectors += (await self.call("POST", "/v1/embed", files=parts("photos", batch))).json()["vectors"]
        return vectors

    async def same(self, one: Photo, other: Photo) -> float:
        """The probability that two photos show the same class, whichever that is."""
        files = parts("a", [read(one)]) + parts("b", [read(other)])
        return (await self.call("POST", "/v1/verify", files=files)).json()["probability"]

    async def _batches(self, photos: Photo | Sequence[Photo]) -> Iterable[list[bytes]]:
        """Encoded photos, in lists of as many as one request takes; for fewer than two the limits are not asked for."""
        several = [photos] if isinstance(photos, bytes | str | Path) else photos
        if len(several) < 2:
            return [[read(photo) for photo in several]]
        most = (self._limits or await self.limits())["request"]
        return batches(several, most["photos"], most["bytes"])


def _refused(response: httpx.Response) -> RefusedError:
    try:
        error = response.json()["error"]
        return RefusedError(error["message"], error["code"], response.status_code, error["request_id"])
    except (ValueError, KeyError, TypeError):
        return RefusedError(f"the server answered {response.status_code}", "unreadable", response.status_code)
