"""A client in a few lines.

>>> client = Client("http://127.0.0.1:8000")
>>> pets = client.space("pets")                        # found by its name, or made
>>> pets.add("cat", ["tom.jpg", "kitty.png"])          # usable at once
>>> pets.add("dog", ["rex.jpg"])
>>> pets.classify("mystery.jpg").name                  # None: none of these
>>> print(client.space("fruit").fill("fruit.zip"))     # a folder or zip, with a folder of photos for each class
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from kshot_runtime.errors import KshotError
from kshot_serve.spaces.folders import Filling
from kshot_serve.spaces.names import normal

if TYPE_CHECKING:
    import httpx

Photo = bytes | str | Path
"""An encoded photo, or the path of one."""

_AGAIN = frozenset({"busy", "draining", "not_ready"})  # refused before anything was done
_ABOUT_A_PHOTO = frozenset({"not_an_image", "photo_too_large", "body_too_large"})
_TRIES = 5


class RefusedError(KshotError):
    """What the server refused: `code` is one of a fixed set, `request_id` finds it in the server's log."""

    def __init__(self, message: str, code: str, status: int, request_id: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.request_id = request_id


@dataclass(frozen=True)
class Answer:
    """What a photo shows. `name` is None where it shows none of the classes."""

    name: str | None
    probability: float
    decision: str  # match, ambiguous or unknown
    whole: Mapping[str, Any] = field(repr=False)  # as the server gave it: other classes, evidence


class Client:
    """A connection to a server. A server that is busy is asked again after the time that it names."""

    def __init__(self, url: str = "http://127.0.0.1:8000", key: str | None = None, timeout: float = 60.0) -> None:
        try:
            import httpx
        except ImportError:
            raise KshotError("the client needs httpx: pip install 'kshot[client]'") from None
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http: httpx.Client = httpx.Client(base_url=url, headers=headers, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def space(self, name: str) -> Space:
        """The label space of this name; a new one if there is none."""
        name = normal(name)
        for space in self.spaces():
            if space.name == name:
                return space
        return Space(self, self.call("POST", "/v1/spaces", json={"name": name}).json())

    def spaces(self) -> Iterable[Space]:
        """All label spaces, from the oldest to the newest."""
        after: str | None = ""
        while after is not None:
            page = self.call("GET", "/v1/spaces", params={"after": after, "limit": 1000}).json()
            yield from (Space(self, space) for space in page["spaces"])
            after = page["next"]

    def import_space(self, exported: bytes) -> Space:
        """A new label space made of an exported one."""
        sent = {"content": exported, "headers": {"Content-Type": "application/zip"}}
        return Space(self, self.call("POST", "/v1/spaces/import", **sent).json())

    def embed(self, photos: Photo | Sequence[Photo]) -> list[list[float]]:
        """Photos as vectors."""
        return self.call("POST", "/v1/embed", files=_files("photos", photos)).json()["vectors"]

    def same(self, one: Photo, other: Photo) -> float:
        """The probability that two photos show the same class, whichever that is."""
        files = _files("a", one) + _files("b", other)
        return self.call("POST", "/v1/verify", files=files).json()["probability"]

    def call(self, method: str, path: str, **sent: Any) -> httpx.Response:
        """A request as httpx takes it, and its answer, or a RefusedError."""
        for attempt in range(1, _TRIES + 1):
            response = self._http.request(method, path, **sent)
            if response.is_success:
                return response
            refused = _refused(response)
            if refused.code not in _AGAIN or attempt == _TRIES:
                raise refused
            time.sleep(float(response.headers.get("Retry-After", 1)))
        raise AssertionError("unreachable")


class Space:
    """A label space on a server."""

    def __init__(self, client: Client, described: Mapping[str, Any]) -> None:
        self._client = client
        self.id: str = described["id"]
        self.name: str = described["name"]

    def __repr__(self) -> str:
        return f"Space({self.name!r}, {self.id})"

    def add(self, name: str, photos: Photo | Sequence[Photo]) -> list[str]:
        """Add photos to a class, which is made if need be. Gives what the server noticed about the photos."""
        name, files = normal(name), _files("photos", photos)
        known = next((each["id"] for each in self.classes() if each["name"] == name), None)
        if known is None:
            return self._call("POST", "/classes", data={"name": name}, files=files).json()["notes"]
        return self._call("POST", f"/classes/{known}/photos", files=files).json()["notes"]

    def fill(self, source: str | Path, progress: Callable[[Filling], object] = lambda _: None) -> Filling:
        """Add the photos of a folder or zip, whose folders are the classes. What is there already is left out.

        What was not taken is in `skipped` of what this gives, a line each; `progress` is called after each request.
        """
        filling = Filling(source)
        limits = self._client.call("GET", "/v1/limits").json()
        if limits["adaptation"] is None:
            raise KshotError("the server has no model yet: fill the label space when it is ready")
        known = {each["name"]: [photo["sha256"] for photo in each["photos"]] for each in self.classes()}
        for name, batch in filling.batches(known, **limits["adaptation"], photos=limits["request"]["photos"]):
            self._fill(filling, name, batch)
            progress(filling)
        return filling

    def _fill(self, filling: Filling, name: str, batch: Mapping[str, bytes]) -> None:
        try:
            self.add(name, list(batch.values()))
            filling.added += len(batch)
        except RefusedError as error:
            if error.code not in _ABOUT_A_PHOTO:
                raise
            if len(batch) == 1:
                filling.skipped.append(f"{next(iter(batch))}: {error}")
            else:  # one by one, to find which
                for file, content in batch.items():
                    self._fill(filling, name, {file: content})

    def classify(self, photo: Photo) -> Answer:
        """What a photo shows."""
        [answer] = self.classify_all([photo])
        if isinstance(answer, RefusedError):
            raise answer
        return answer

    def classify_all(self, photos: Sequence[Photo]) -> list[Answer | RefusedError]:
        """What each photo shows; the place of one that cannot be read has the reason."""
        results = self._call("POST", "/classify", files=_files("photos", photos)).json()["results"]
        return [_answer(result) for result in results]

    def classes(self) -> list[dict[str, Any]]:
        """The classes and their photos: ids, names, when."""
        return self._call("GET", "/classes").json()["classes"]

    def revisions(self) -> list[dict[str, Any]]:
        """What was done, the newest first."""
        return self._call("GET", "/revisions").json()["revisions"]

    def rollback(self, revision: int) -> int:
        """Go back to a revision, by a new one that equals it; gives its number."""
        return self._call("POST", "/rollback", json={"revision": revision}).json()["revision"]

    def export(self) -> bytes:
        """The label space as a zip, for `Client.import_space`."""
        return self._call("GET", "/export").content

    def delete(self) -> None:
        """Delete it, for good."""
        self._call("DELETE", "")

    def _call(self, method: str, path: str, **sent: Any) -> httpx.Response:
        return self._client.call(method, f"/v1/spaces/{self.id}{path}", **sent)


def _files(field: str, photos: Photo | Sequence[Photo]) -> list[tuple[str, tuple[str, bytes]]]:
    several = [photos] if isinstance(photos, bytes | str | Path) else photos
    return [(field, ("photo", each if isinstance(each, bytes) else Path(each).read_bytes())) for each in several]


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
