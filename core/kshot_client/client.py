"""A client in a few lines.

>>> client = Client("http://127.0.0.1:8000")
>>> pets = client.space("pets")                        # found by its name, or made
>>> pets.add("cat", ["tom.jpg", "kitty.png"])          # usable at once
>>> pets.add("dog", ["rex.jpg"])
>>> pets.classify("mystery.jpg").name                  # None: none of these
>>> print(client.space("fruit").fill("fruit.zip"))     # a folder or zip, with a folder of photos for each class

`AsyncClient` has the same methods for asyncio: `await client.space("pets")`.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar

from kshot_client.errors import ClientError, RefusedError
from kshot_client.folders import Filling, normal

if TYPE_CHECKING:
    import httpx

Photo = bytes | str | Path
"""An encoded photo, or the path of one."""

P = ParamSpec("P")
R = TypeVar("R")

_AGAIN = frozenset({"busy", "draining", "not_ready"})  # refused before anything was done
_ABOUT_A_PHOTO = frozenset({"not_an_image", "photo_too_large", "body_too_large"})
_TRIES = 5
_PART_BYTES = 1000  # of a multipart body around one photo, at most
_NUMBERED = re.compile(r"^photo (\d+)")


@dataclass(frozen=True)
class Answer:
    """What a photo shows. `name` is None where it shows none of the classes."""

    name: str | None
    probability: float
    decision: str  # match, ambiguous or unknown
    whole: Mapping[str, Any] = field(repr=False)  # as the server gave it: other classes, evidence


class AsyncClient:
    """A connection to a server. A server that is busy is asked again after the time that it names."""

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
        for attempt in range(1, _TRIES + 1):
            response = await self._request(method, path, **sent)
            if response.is_success:
                return response
            refused = _refused(response)
            if refused.code not in _AGAIN or attempt == _TRIES:
                raise refused
            await self._pause(float(response.headers.get("Retry-After", 1)))
        raise AssertionError("unreachable")

    async def limits(self) -> dict[str, Any]:
        """What the server takes: formats, sizes, photos in a request, and what its model can adapt to."""
        self._limits = (await self.call("GET", "/v1/limits")).json()
        return self._limits

    async def space(self, name: str) -> AsyncSpace:
        """The label space of this name; a new one if there is none."""
        name = normal(name)
        async for space in self._spaces():
            if space.name == name:
                return space
        return AsyncSpace(self, (await self.call("POST", "/v1/spaces", json={"name": name})).json())

    async def spaces(self) -> list[AsyncSpace]:
        """All label spaces, from the oldest to the newest."""
        return [space async for space in self._spaces()]

    async def import_space(self, exported: bytes) -> AsyncSpace:
        """A new label space made of an exported one."""
        headers = {"Content-Type": "application/zip"}
        return AsyncSpace(
            self, (await self.call("POST", "/v1/spaces/import", content=exported, headers=headers)).json()
        )

    async def embed(self, photos: Photo | Sequence[Photo]) -> list[list[float]]:
        """Photos as vectors. More photos than one request takes go in several."""
        vectors: list[list[float]] = []
        async for batch in self._batches(photos):
            vectors += (await self.call("POST", "/v1/embed", files=_files("photos", batch))).json()["vectors"]
        return vectors

    async def same(self, one: Photo, other: Photo) -> float:
        """The probability that two photos show the same class, whichever that is."""
        files = _files("a", [_read(one)]) + _files("b", [_read(other)])
        return (await self.call("POST", "/v1/verify", files=files)).json()["probability"]

    async def _spaces(self) -> AsyncIterator[AsyncSpace]:
        after: str | None = ""
        while after is not None:
            page = (await self.call("GET", "/v1/spaces", params={"after": after, "limit": 1000})).json()
            for space in page["spaces"]:
                yield AsyncSpace(self, space)
            after = page["next"]

    async def _batches(self, photos: Photo | Sequence[Photo]) -> AsyncIterator[list[bytes]]:
        """Encoded photos, in lists of as many as one request takes."""
        several = [photos] if isinstance(photos, bytes | str | Path) else photos
        if len(several) < 2:
            yield [_read(each) for each in several]
            return
        most = (self._limits or await self.limits())["request"]
        batch: list[bytes] = []
        for each in several:
            content = _read(each)
            size = sum(len(other) + _PART_BYTES for other in [*batch, content])
            if batch and (len(batch) == most["photos"] or size > most["bytes"]):
                yield batch
                batch = []
            batch.append(content)
        yield batch


class AsyncSpace:
    """A label space on a server."""

    def __init__(self, client: AsyncClient, described: Mapping[str, Any]) -> None:
        self._client = client
        self.id: str = described["id"]
        self.name: str = described["name"]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.id})"

    async def add(self, name: str, photos: Photo | Sequence[Photo]) -> list[str]:
        """Add photos to a class, which is made if need be. Gives what the server noticed about the photos.

        More photos than one request takes go in several: those before a refused one stay.
        """
        name = normal(name)
        class_, sent, notes = (await self._ids()).get(name), 0, list[str]()
        async for batch in self._client._batches(photos):
            added = await self._add(class_, name, batch)
            class_ = added["class"]["id"]
            notes += [_renumbered(note, sent) for note in added["notes"]]
            sent += len(batch)
        return notes

    async def fill(self, source: str | Path, progress: Callable[[Filling], object] = lambda _: None) -> Filling:
        """Add the photos of a folder or zip, whose folders are the classes. What is there already is left out.

        What was not taken is in `skipped` of what this gives, a line each; `progress` is called after each request.
        """
        filling = Filling(source)
        limits = await self._client.limits()
        if limits["adaptation"] is None:
            raise ClientError("the server has no model yet: fill the label space when it is ready")
        classes = await self.classes()
        ids = {each["name"]: each["id"] for each in classes}
        known = {each["name"]: [photo["sha256"] for photo in each["photos"]] for each in classes}
        for name, batch in filling.batches(known, **limits["adaptation"], photos=limits["request"]["photos"]):
            await self._fill(filling, ids, name, batch)
            progress(filling)
        return filling

    async def _fill(self, filling: Filling, ids: dict[str, str], name: str, batch: Mapping[str, bytes]) -> None:
        try:
            ids[name] = (await self._add(ids.get(name), name, list(batch.values())))["class"]["id"]
            filling.added += len(batch)
        except RefusedError as error:
            if error.code not in _ABOUT_A_PHOTO:
                raise
            if len(batch) == 1:
                filling.skipped.append(f"{next(iter(batch))}: {error}")
            else:  # one by one, to find which
                for file, content in batch.items():
                    await self._fill(filling, ids, name, {file: content})

    async def _add(self, class_: str | None, name: str, photos: Sequence[bytes]) -> dict[str, Any]:
        files = _files("photos", photos)
        if class_ is None:
            return (await self._call("POST", "/classes", data={"name": name}, files=files)).json()
        return (await self._call("POST", f"/classes/{class_}/photos", files=files)).json()

    async def classify(self, photo: Photo) -> Answer:
        """What a photo shows."""
        [answer] = await self.classify_all([photo])
        if isinstance(answer, RefusedError):
            raise answer
        return answer

    async def classify_all(self, photos: Sequence[Photo]) -> list[Answer | RefusedError]:
        """What each photo shows; the place of one that cannot be read has the reason.

        More photos than one request takes go in several.
        """
        answers: list[Answer | RefusedError] = []
        async for batch in self._client._batches(photos):
            try:
                found = (await self._call("POST", "/classify", files=_files("photos", batch))).json()["results"]
                answers += map(_answer, found)
            except RefusedError as error:  # a photo that is sent by itself is refused as a request
                if len(batch) > 1 or error.code not in _ABOUT_A_PHOTO:
                    raise
                answers.append(error)
        return answers

    async def classes(self) -> list[dict[str, Any]]:
        """The classes and their photos: ids, names, when."""
        return (await self._call("GET", "/classes")).json()["classes"]

    async def rename_class(self, name: str, new: str) -> None:
        """Give a class another name."""
        await self._call("PATCH", f"/classes/{await self._id(name)}", json={"name": new})

    async def delete_class(self, name: str) -> None:
        """Delete a class and its photos, for good."""
        await self._call("DELETE", f"/classes/{await self._id(name)}")

    async def photo(self, photo: str) -> bytes:
        """A photo by its id, as it came, or, where the server keeps no originals, as the model sees it."""
        return (await self._call("GET", f"/photos/{photo}")).content

    async def delete_photo(self, photo: str) -> None:
        """Delete a photo by its id, for good."""
        await self._call("DELETE", f"/photos/{photo}")

    async def rename(self, name: str) -> None:
        """Give the label space another name."""
        self.name = (await self._call("PATCH", "", json={"name": name})).json()["name"]

    async def accept(self, share: float | None) -> dict[str, Any]:
        """Set the share of known photos that is to pass the threshold, or, with None, leave it to the server.

        Gives the description of the label space: `accepted` and `false_accepts` say what the threshold does then.
        """
        return (await self._call("PATCH", "", json={"accept": share})).json()

    async def revisions(self) -> list[dict[str, Any]]:
        """What was done, the newest first: the last hundred writes."""
        return (await self._call("GET", "/revisions")).json()["revisions"]

    async def rollback(self, revision: int) -> int:
        """Go back to a revision, by a new one that equals it; gives its number."""
        return (await self._call("POST", "/rollback", json={"revision": revision})).json()["revision"]

    async def export(self) -> bytes:
        """The label space as a zip, for `Client.import_space`."""
        return (await self._call("GET", "/export")).content

    async def delete(self) -> None:
        """Delete it, for good."""
        await self._call("DELETE", "")

    async def _ids(self) -> dict[str, str]:
        return {each["name"]: each["id"] for each in await self.classes()}

    async def _id(self, name: str) -> str:
        ids = await self._ids()
        if normal(name) not in ids:
            raise ClientError(f"{self.name} has no class {name!r}; it has {', '.join(ids) or 'none'}")
        return ids[normal(name)]

    async def _call(self, method: str, path: str, **sent: Any) -> httpx.Response:
        return await self._client.call(method, f"/v1/spaces/{self.id}{path}", **sent)


class _Blocking(AsyncClient):
    """An AsyncClient whose requests block, so that its coroutines never wait for an event loop."""

    def _connect(self, httpx: Any, **settings: Any) -> Any:
        return httpx.Client(**settings)

    async def _request(self, method: str, path: str, **sent: Any) -> httpx.Response:
        return self._http.request(method, path, **sent)

    async def _pause(self, seconds: float) -> None:
        time.sleep(seconds)


def _done(coroutine: Coroutine[Any, Any, R]) -> R:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("unreachable")


def _blocking(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> Callable[Concatenate[Any, P], R]:
    """The same method without `await`, for a class that keeps the object with the method in `_awaited`."""

    @wraps(method)
    def call(self: Any, /, *given: P.args, **named: P.kwargs) -> R:
        return _done(method(self._awaited, *given, **named))

    return call


class Client:
    """A connection to a server: `AsyncClient`'s methods without `await`."""

    def __init__(self, url: str = "http://127.0.0.1:8000", key: str | None = None, timeout: float = 60.0) -> None:
        self._awaited = _Blocking(url, key, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._awaited._http.close()

    def space(self, name: str) -> Space:
        """The label space of this name; a new one if there is none."""
        return Space(_done(self._awaited.space(name)))

    def spaces(self) -> list[Space]:
        """All label spaces, from the oldest to the newest."""
        return [Space(space) for space in _done(self._awaited.spaces())]

    def import_space(self, exported: bytes) -> Space:
        """A new label space made of an exported one."""
        return Space(_done(self._awaited.import_space(exported)))

    call = _blocking(AsyncClient.call)
    embed = _blocking(AsyncClient.embed)
    limits = _blocking(AsyncClient.limits)
    same = _blocking(AsyncClient.same)


class Space:
    """A label space on a server: `AsyncSpace`'s methods without `await`."""

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


def _read(photo: Photo) -> bytes:
    return photo if isinstance(photo, bytes) else Path(photo).read_bytes()


def _files(field: str, photos: Sequence[bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    return [(field, ("photo", photo)) for photo in photos]


def _renumbered(note: str, before: int) -> str:
    """A note about a photo, which counts from the first of so many before its own request."""
    return _NUMBERED.sub(lambda found: f"photo {int(found[1]) + before}", note)


def _answer(result: Mapping[str, Any]) -> Answer | RefusedError:
    if "error" in result:
        return RefusedError(result["error"]["message"], result["error"]["code"], 422, result["error"]["request_id"])
    name = result["class"] and result["class"]["name"]
    return Answer(name, result["probability"], result["decision"], result)


def _refused(response: httpx.Response) -> RefusedError:
    try:
        error = response.json()["error"]
        return RefusedError(error["message"], error["code"], response.status_code, error["request_id"])
    except (ValueError, KeyError, TypeError):
        return RefusedError(f"the server answered {response.status_code}", "unreadable", response.status_code)
