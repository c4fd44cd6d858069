"""A label space on a server, for asyncio, and the answers that it gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kshot_client.errors import ClientError, RefusedError
from kshot_client.folders import Filling, normal
from kshot_client.photos import Photo, parts

if TYPE_CHECKING:
    import httpx

    from kshot_client.client import AsyncClient

_ABOUT_A_PHOTO = frozenset({"not_an_image", "photo_too_large", "body_too_large"})
_NUMBERED = re.compile(r"^photo (\d+)")


@dataclass(frozen=True)
class Answer:
    """What a photo shows. `name` is None where it shows none of the classes."""

    name: str | None
    probability: float
    decision: str  # match, ambiguous or unknown
    whole: Mapping[str, Any] = field(repr=False)  # as the server gave it: other classes, evidence


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
        for batch in await self._client._batches(photos):
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
        files = parts("photos", photos)
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
        for batch in await self._client._batches(photos):
            try:
                found = (await self._call("POST", "/classify", files=parts("photos", batch))).json()["results"]
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


def _renumbered(note: str, before: int) -> str:
    """A note about a photo, which counts from the first of so many before its own request."""
    return _NUMBERED.sub(lambda found: f"photo {int(found[1]) + before}", note)


def _answer(result: Mapping[str, Any]) -> Answer | RefusedError:
    if "error" in result:
        return RefusedError(result["error"]["message"], result["error"]["code"], 422, result["error"]["request_id"])
    name = result["class"] and result["class"]["name"]
    return Answer(name, result["probability"], result["decision"], result)
