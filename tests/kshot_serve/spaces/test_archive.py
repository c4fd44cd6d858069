"""A label space as a zip: it comes back with the same answers, and a hostile one does not come in."""

from __future__ import annotations

import asyncio
import io
import json
import stat
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kshot_runtime.manifest import Limits
from kshot_serve.errors import Problem
from kshot_serve.spaces.archive import Most, unpack
from kshot_serve.storage.values import digest

if TYPE_CHECKING:
    from tests.kshot_serve.conftest import Parts  # never at run time: tests are no packages

Photo = Callable[..., bytes]
Open = Callable[..., "AbstractAsyncContextManager[Parts]"]

MOST = Most(photo=1_000_000, bytes=3_000_000, limits=Limits(support=10, ways=10))
MODEL = {"name": "pets", "version": "1", "bundle": "b", "image": {"size": 16}}


def manifest(*files: tuple[str, bytes], **changes: Any) -> bytes:
    photos = [{"file": file, "sha256": digest(content)} for file, content in files]
    facts = {"name": "pets", "classes": [{"name": "cat", "photos": photos}], "model": MODEL}
    return json.dumps(facts | changes).encode()


def packed(*entries: tuple[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return file.getvalue()


def sound(photo: bytes = b"a photo") -> list[tuple[str | zipfile.ZipInfo, bytes]]:
    return [("photos/0001.png", photo), ("manifest.json", manifest(("photos/0001.png", photo)))]


@pytest.mark.parametrize("keep_photos", [True, False])
@pytest.mark.parametrize("kind", ["features", "images"])
def test_a_label_space_comes_back_with_equal_answers(
    parts: Open, request: pytest.FixtureRequest, tmp_path: Path, photo: Photo, kind: str, keep_photos: bool
) -> None:
    """S11 of the feature table: what a user has made leaves with the user, also to another server."""
    bundle = request.getfixturevalue(f"{kind}_bundle")

    async def made() -> tuple[bytes, list[Any]]:
        async with parts(bundle, tmp_path / "here", keep_photos=keep_photos) as here:
            space = await here.spaces.create("farben", accept=0.8)
            for colour, form in (("red", "PNG"), ("blue", "JPEG"), ("yellow", "WEBP")):
                uploads = [here.upload(photo(colour, shade, kind=form)) for shade in range(2)]
                await here.spaces.add_class(space.id, colour, uploads)
            with await here.spaces.export(space.id) as file:
                content = file.read()
            copy = await here.spaces.import_(content)
            assert (copy.name, copy.classes, copy.photos, copy.accept) == ("farben (2)", 3, 6, 0.8)
            assert copy.id != space.id
            assert (await here.spaces.import_(content)).name == "farben (3)"
            return content, [await answers(here, space.id), await answers(here, copy.id)]

    async def answers(parts: Parts, space: str) -> list[Any]:
        asked = [parts.upload(photo(colour, 9)) for colour in ("red", "blue", "yellow", "black")]
        found = (await parts.spaces.classify(space, asked, time.monotonic() + 30)).answers
        return [
            (answer.class_name, answer.decision, answer.logits.tolist(), [name for _, name, _ in answer.classes])
            for answer in found
        ]

    async def elsewhere(content: bytes) -> list[Any]:
        async with parts(bundle, tmp_path / "there") as there:
            space = await there.spaces.import_(content, who="bob")
            assert space.name == "farben"
            [revision] = await there.spaces.revisions(space.id)
            assert (revision.action, revision.who, revision.what) == ("import", "bob", "6 photos")
            return await answers(there, space.id)

    content, [before, copied] = asyncio.run(made())
    assert before == copied == asyncio.run(elsewhere(content))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        facts = json.loads(archive.read("manifest.json"))
        assert [each["name"] for each in facts["classes"]] == ["red", "blue", "yellow"]
        first = facts["classes"][0]["photos"][0]["file"]
        assert (archive.read(first) == photo("red", 0)) is keep_photos


def test_a_sound_archive_is_unpacked() -> None:
    found, photos = unpack(packed(*sound()), MOST)
    assert (found.name, [each.name for each in found.classes]) == ("pets", ["cat"])
    assert photos == {"photos/0001.png": b"a photo"}


def link() -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo("photos/0001.png")
    entry.create_system = 3
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be read as a zip"),
        (b"PK\x03\x04 nonsense", "cannot be read as a zip"),
        (packed(*sound())[:-30], "cannot be read as a zip"),
        (packed(("photos/0001.png", b"a photo")), "lacks manifest.json"),
        (packed(*sound(), ("../../etc/passwd", b"x")), "neither its manifest nor a photo"),
        (packed(*sound(), ("/etc/passwd", b"x")), "neither its manifest nor a photo"),
        (packed(*sound(), ("photos/../../x.png", b"x")), "neither its manifest nor a photo"),
        (packed(*sound(), ("photos/evil.exe", b"x")), "neither its manifest nor a photo"),
        (packed(*sound(), ("photos\\0002.png", b"x")), "neither its manifest nor a photo"),
        (packed(*sound(), ("photos/", b"")), "neither its manifest nor a photo"),
        (packed((link(), b"/etc/passwd"), sound()[1]), "a link"),
        (packed(*sound(), ("photos/0002.png", b"unlisted")), "not those that its manifest.json lists"),
        (packed(sound()[1]), "not those that its manifest.json lists"),
        (packed(("photos/0001.png", b"swapped"), sound()[1]), "not the file that its manifest.json describes"),
        (packed(sound()[0], ("manifest.json", b"{")), "no JSON"),
        (packed(sound()[0], ("manifest.json", b"[" * 100_000)), "no JSON"),
        (packed(sound()[0], ("manifest.json", b"[]")), "not valid"),
        (packed(sound()[0], ("manifest.json", manifest(schema_version=2))), "not valid: schema_version"),
        (packed(sound()[0], ("manifest.json", manifest(kind="bundle"))), "not valid: kind"),
        (packed(sound()[0], ("manifest.json", manifest(accept=float("nan")))), "not valid: accept"),
        (packed(sound()[0], ("manifest.json", manifest(more=1))), "not valid: more"),
        (packed(sound()[0], ("manifest.json", manifest(("../x.png", b"")))), r"not valid: classes\.0\.photos\.0\.file"),
        (
            packed(sound()[0], ("manifest.json", manifest(("photos/0001.png", b"a photo"), ("photos/0001.png", b"")))),
            "lists a photo twice",
        ),
        (packed(*sound(), compression=zipfile.ZIP_LZMA), "compressed in a way that is not taken"),
    ],
)
def test_what_is_no_exported_label_space_is_refused_with_the_reason(content: bytes, reason: str) -> None:
    with pytest.raises(Problem, match=reason) as caught:
        unpack(content, MOST)
    assert caught.value.code == "bad_request"


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_file_that_is_in_the_archive_twice_is_refused() -> None:
    with pytest.raises(Problem, match="in it twice"):
        unpack(packed(*sound(), sound()[0]), MOST)


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    """Of 4a of the product notes, for zips: sizes are checked before anything is read, and none is believed."""
    zeros = bytes(1_000_001)
    for entries, code in (
        ([("photos/0001.png", zeros), sound()[1]], "photo_too_large"),
        ([(f"photos/{number}.png", zeros[:-1]) for number in range(9)] + [sound()[1]], "body_too_large"),
        ([(f"photos/{number}.png", b"") for number in range(11)] + [sound()[1]], "too_many_photos"),
        ([sound()[0], ("manifest.json", b" " * 5_000_000)], "photo_too_large"),
    ):
        content = packed(*entries)
        tracemalloc.start()
        with pytest.raises(Problem) as caught:
            unpack(content, MOST)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert caught.value.code == code
        assert peak < 500_000


def test_an_archive_that_lies_about_its_sizes_is_refused_without_reading_on() -> None:
    """An entry that says 7 bytes and inflates to a megabyte."""
    honest = packed(("photos/0001.png", bytes(1_000_000)), sound()[1])
    lying = honest.replace((1_000_000).to_bytes(4, "little"), (7).to_bytes(4, "little"))
    assert lying != honest
    with pytest.raises(Problem, match="cannot be read as a zip to its end"):
        unpack(lying, MOST)


def test_an_archive_whose_photos_or_names_cannot_be_taken_leaves_nothing_behind(
    parts: Open, features_bundle: Path, tmp_path: Path, photo: Photo
) -> None:
    png = photo("red")
    file = "photos/0001.png"
    two = [{"name": name, "photos": []} for name in ("cat", "cat")]
    hostile = [
        (sound(b"no photo at all"), "not_an_image"),
        ([(file, png), ("manifest.json", manifest((file, png), name="a\nb"))], "bad_request"),
        ([("manifest.json", manifest(classes=two))], "conflict"),
        ([("manifest.json", manifest(classes=[{"name": "", "photos": []}]))], "bad_request"),
        (
            [("manifest.json", manifest(classes=[{"name": f"{i}", "photos": []} for i in range(201)]))],
            "too_many_classes",
        ),
    ]

    async def body() -> None:
        async with parts(features_bundle, tmp_path / "serve") as opened:
            for entries, code in hostile:
                with pytest.raises(Problem) as caught:
                    await opened.spaces.import_(packed(*entries))
                assert caught.value.code == code
            assert (await opened.spaces.list(only=None))[0] == []
            empty = await opened.spaces.import_(packed(("manifest.json", manifest(classes=[]))))
            assert (empty.name, empty.classes) == ("pets", 0)

    asyncio.run(body())


def test_any_damage_to_an_archive_is_refused_as_a_user_s_mistake() -> None:
    content = packed(*sound(bytes(range(256)) * 4))
    chance = np.random.default_rng(0)
    for _ in range(2000):
        spoilt = bytearray(content)
        for _ in range(int(chance.integers(1, 4))):
            spoilt[int(chance.integers(len(spoilt)))] = int(chance.integers(256))
        try:
            unpack(bytes(spoilt), MOST)
        except Problem as problem:
            assert problem.status < 500  # noqa: PT017  (some changes hit bytes that mean nothing)
