"""What is written to label spaces: classes, photos, names, and the way back; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kshot_runtime.manifest import Limits
from kshot_serve.errors import Problem
from kshot_serve.spaces.writes import KEEP
from kshot_serve.storage.values import ORIGINAL

if TYPE_CHECKING:
    from tests.kshot_serve.conftest import Parts  # never at run time: tests are no packages

Photo = Callable[..., bytes]
Changed = Callable[..., Path]  # of conftest.py
Open = Callable[..., "AbstractAsyncContextManager[Parts]"]


def test_a_note_that_cannot_be_made_in_time_refuses_no_photo(
    on: Any, features_bundle: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(opened: Parts) -> None:
        space = await opened.a_space("red", "blue")

        async def late(*_: Any) -> None:
            raise Problem("too_late", "no answer in time", retry_after=1)

        monkeypatch.setattr(opened.spaces._answering, "judge", late)
        written = await opened.spaces.add_class(space, "green", [opened.upload(photo("green"))])
        assert (len(written.photos), written.notes) == (1, ())

    on(features_bundle, body)


def test_a_name_changes_and_nothing_is_adapted_again(on: Any, images_bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue")
        await parts.ask(space, photo("red"))
        adapted = parts.metrics.registry.get_sample_value("kshot_stage_seconds_count", {"stage": "adapt"})
        red = (await parts.ids(space))["red"]
        await parts.spaces.rename_class(space, red, "rouge")
        assert (await parts.spaces.change(space, name="couleurs", accept=KEEP)).name == "couleurs"
        [answer] = await parts.ask(space, photo("red", 9))
        assert "rouge" in [name for _, name, _ in answer.classes]
        assert parts.metrics.registry.get_sample_value("kshot_stage_seconds_count", {"stage": "adapt"}) == adapted

    on(images_bundle, body)


def test_going_back_gives_the_same_answers_to_the_bit(on: Any, bundle: Path, photo: Photo) -> None:
    """M5 of the feature table."""

    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue")
        golden = [photo(colour, shade) for colour in ("red", "blue", "grey") for shade in range(40, 50)]
        before = await parts.ask(space, *golden)
        await parts.spaces.add_class(space, "grey", [parts.upload(photo("grey"))])
        assert len((await parts.ask(space, photo("grey")))[0].logits) == 3
        written = await parts.spaces.rollback(space, 3, who="ann")
        assert (written.revision, written.gone) == (5, ())
        after = await parts.ask(space, *golden)
        np.testing.assert_array_equal([a.logits for a in after], [a.logits for a in before])
        assert [(a.classes, a.decision, a.evidence) for a in after] == [
            (a.classes, a.decision, a.evidence) for a in before
        ]

    on(bundle, body)


def test_a_deleted_class_is_in_no_answer_and_no_memory(on: Any, bundle: Path, photo: Photo) -> None:
    """M4 of the feature table; LandingLens cannot delete a class at all."""

    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue", "green")
        await parts.ask(space, photo("red"))
        assert parts.metrics.registry.get_sample_value("kshot_state_bytes") > 0
        blue = (await parts.ids(space))["blue"]
        await parts.spaces.delete_class(space, blue)
        assert parts.metrics.registry.get_sample_value("kshot_state_bytes") == 0
        [answer] = await parts.ask(space, photo("blue", 9))
        assert "blue" not in str(answer)
        assert blue not in str(answer)
        added = await parts.spaces.add_class(space, "blue", [parts.upload(photo("blue"))])
        assert added.class_ is not None
        assert added.class_.id != blue  # ids are never used again
        with pytest.raises(Problem) as caught:
            await parts.spaces.add_photos(space, blue, [parts.upload(photo("blue"))])
        assert caught.value.code == "class_unknown"

    on(bundle, body)


def test_a_deleted_label_space_is_gone_with_its_state(on: Any, bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue")
        await parts.ask(space, photo("red"))
        await parts.spaces.delete(space)
        assert parts.metrics.registry.get_sample_value("kshot_state_bytes") == 0
        assert parts.metrics.registry.get_sample_value("kshot_label_spaces") == 0
        with pytest.raises(Problem) as caught:
            await parts.ask(space, photo("red"))
        assert caught.value.code == "space_unknown"
        assert (await parts.spaces.create("colours")).id != space

    on(bundle, body)


def test_notes_tell_of_duplicates_and_of_photos_that_look_like_another_class(
    on: Any, bundle: Path, photo: Photo
) -> None:
    """S1 of the feature table: planted cases are found, and nothing is refused."""

    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue", "yellow")
        red = (await parts.ids(space))["red"]
        await parts.ask(space, photo("red"))  # where images are taken, notes need the state in memory
        photos = [photo("red", 0), photo("red", 50), photo("blue", 0), photo("red", 50), photo("yellow", 50)]
        written = await parts.spaces.add_photos(space, red, [parts.upload(each) for each in photos])
        assert written.notes[:4] == (
            "photo 1 is in this class already, and was left out",
            "photo 3 is also in class 'blue'",
            "photo 4 is in this class already, and was left out",
            "photo 5 is closer to class 'yellow'",
        )
        assert len(written.photos) == 3
        again = await parts.spaces.add_photos(space, red, [parts.upload(photo("red", 50))])
        assert (again.revision, again.photos) == (written.revision, ())

    on(bundle, body)


def test_photos_added_by_the_name_of_their_class_are_not_closer_to_that_class(
    on: Any, bundle: Path, photo: Photo
) -> None:
    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue")
        await parts.ask(space, photo("red"))
        photos = [photo("red", 50), photo("yellow", 50), photo("yellow", 51)]
        written = await parts.spaces.add(space, "red", [parts.upload(each) for each in photos])
        assert written.notes == ()

    on(bundle, body)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "   ",
        "x" * 201,
        "a\nb",
        "a\x00b",
        "tab\tbed",
        "\u202eright to left",
        "half \ud800",
        "line\u2028end",
        "\ufeff",
    ],
)
def test_a_name_that_cannot_name_anything_is_refused(on: Any, features_bundle: Path, photo: Photo, name: str) -> None:
    async def body(parts: Parts) -> None:
        for refused in (
            parts.spaces.create(name),
            parts.spaces.add_class("spc_" + "0" * 26, name, [parts.upload(photo("red"))]),
        ):
            with pytest.raises(Problem) as caught:
                await refused
            assert (caught.value.code, caught.value.reason) == ("bad_request", "name")

    on(features_bundle, body)


def test_names_in_any_script_are_kept_in_their_normal_form(on: Any, features_bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await parts.spaces.create("  Cafe\u0301 ")
        assert space.name == "Caf\u00e9"
        for name in ("猫", "क्\u200dष", "👩\u200d🚀", "health", "ready", "../etc", "'; DROP TABLE classes"):
            await parts.spaces.add_class(space.id, name, [parts.upload(photo("red"))])
        assert "ready" in await parts.ids(space.id)
        with pytest.raises(Problem) as caught:
            await parts.spaces.add_class(space.id, "ready ", [parts.upload(photo("red"))])
        assert caught.value.code == "conflict"
        [猫, other, *_] = (await parts.ids(space.id)).values()
        with pytest.raises(Problem) as caught:
            await parts.spaces.rename_class(space.id, other, "猫")
        assert caught.value.code == "conflict"
        assert (await parts.spaces.rename_class(space.id, 猫, "猫")).revision == 8  # nothing to do

    on(features_bundle, body)


def test_the_limits_of_the_bundle_are_checked_and_nothing_is_written(
    on: Any, features_bundle: Path, changed: Changed, photo: Photo
) -> None:
    small = changed(features_bundle, limits=Limits(ways=2, shots=3, support=4))

    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue", shots=1)
        red = (await parts.ids(space))["red"]
        for refused, code, reason in (
            (parts.spaces.add_class(space, "green", [parts.upload(photo("green"))]), "too_many_classes", "ways"),
            (
                parts.spaces.add_photos(space, red, [parts.upload(photo("red", shade)) for shade in range(1, 4)]),
                "too_many_photos",
                "shots",
            ),
        ):
            with pytest.raises(Problem) as caught:
                await refused
            assert (caught.value.code, caught.value.reason) == (code, reason)
        await parts.spaces.add_photos(space, red, [parts.upload(photo("red", shade)) for shade in (1, 2)])
        blue = (await parts.ids(space))["blue"]
        with pytest.raises(Problem) as caught:
            await parts.spaces.add_photos(space, blue, [parts.upload(photo("blue", shade)) for shade in (1, 2)])
        assert caught.value.reason == "support"
        assert (await parts.spaces.get(space)).revision == 4

    on(small, body)


def test_the_bytes_of_a_label_space_are_limited_until_some_are_deleted(
    on: Any, features_bundle: Path, photo: Photo
) -> None:
    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", shots=1)
        red = (await parts.ids(space))["red"]
        big = photo("red", 5, size=(500, 480))
        assert 500_000 < len(big) < 1_000_000
        await parts.spaces.add_photos(space, red, [parts.upload(big)])
        other = parts.upload(photo("red", 6, size=(500, 480)))
        with pytest.raises(Problem, match="may take 1 MB") as caught:
            await parts.spaces.add_photos(space, red, [other])
        assert caught.value.reason == "bytes"
        await parts.spaces.rollback(space, 2)  # which keeps the big one for a way back
        with pytest.raises(Problem):
            await parts.spaces.add_photos(space, red, [other])
        await parts.spaces.rollback(space, 3)
        _, [class_] = await parts.spaces.classes(space)
        await parts.spaces.delete_photo(space, class_.photos[-1].id)
        await parts.spaces.add_photos(space, red, [other])

    on(features_bundle, body, space_mb=1)


def test_a_full_server_and_a_second_label_space_of_one_name_are_refused(on: Any, features_bundle: Path) -> None:
    async def body(parts: Parts) -> None:
        await parts.spaces.create("one")
        with pytest.raises(Problem) as caught:
            await parts.spaces.create("one")
        assert (caught.value.code, caught.value.reason) == ("conflict", "name")
        await parts.spaces.create("two")
        with pytest.raises(Problem) as caught:
            await parts.spaces.create("three")
        assert (caught.value.code, caught.value.reason) == ("conflict", "spaces")
        listed, following = await parts.spaces.list(1, only=None)
        assert [space.name for space in listed] == ["one"]
        assert following == listed[0].id
        assert ([space.name for space in (await parts.spaces.list(1, following, only=None))[0]], None) == (
            ["two"],
            None,
        )

    on(features_bundle, body, spaces=2)


def test_a_photo_comes_back_as_it_was_and_its_pixels_where_originals_are_not_kept(
    on: Any, bundle: Path, photo: Photo
) -> None:
    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", shots=1)
        _, [class_] = await parts.spaces.classes(space)
        [kept] = class_.photos
        assert await parts.spaces.photo(space, kept.id) == (photo("red"), "image/png")
        tag, size = await parts.spaces.photo_facts(space, kept.id)
        assert (tag, size >= len(photo("red"))) == (kept.sha256, True)
        jpeg = photo("red", 3, kind="JPEG")
        written = await parts.spaces.add_photos(space, class_.id, [parts.upload(jpeg)])
        assert await parts.spaces.photo(space, written.photos[0]) == (jpeg, "image/jpeg")
        with pytest.raises(Problem) as caught:
            await parts.spaces.photo(space, "pho_" + "0" * 26)
        assert caught.value.code == "photo_unknown"

    on(bundle, body)


def test_without_originals_only_what_adapting_needs_is_kept(
    on: Any, bundle: Path, photo: Photo, tmp_path: Path
) -> None:
    """S12 of the feature table."""

    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue")
        _, classes = await parts.spaces.classes(space)
        photos = [each.id for class_ in classes for each in class_.photos]
        assert parts.store.contents(photos, ORIGINAL) == {}
        content, kind = await parts.spaces.photo(space, photos[0])
        assert kind == "image/png"
        tag, _ = await parts.spaces.photo_facts(space, photos[0])
        assert tag.startswith(f"{classes[0].photos[0].sha256}-")  # other pixels have another tag
        np.testing.assert_array_equal(parts.upload(content).pixels, parts.upload(photo("red")).pixels)
        files = b"".join(path.read_bytes() for path in (tmp_path / "serve").iterdir() if path.is_file())
        assert photo("red")[200:260] not in files
        [answer] = await parts.ask(space, photo("blue", 9))
        assert answer.classes[0][1] == "blue"

    on(bundle, body, keep_photos=False)
