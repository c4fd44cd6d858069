"""Label spaces on real bundles: what a user writes, what a champion answers, and what happens when champions change."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from kshot_runtime.bundle import Bundle
from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import MANIFEST, VIEWS, FileFacts, Limits, Manifest
from kshot_serve.errors import Problem
from kshot_serve.models.champion import Champion
from kshot_serve.spaces.questions import Answer
from kshot_serve.spaces.states import features_of, pixels_by
from kshot_serve.spaces.uploads import Upload
from kshot_serve.spaces.writes import KEEP
from kshot_serve.storage.values import ORIGINAL

if TYPE_CHECKING:
    from tests.kshot_serve.conftest import Parts  # never at run time: tests are no packages

Photo = Callable[..., bytes]
Open = Callable[..., "AbstractAsyncContextManager[Parts]"]


def soon() -> float:
    return time.monotonic() + 30


@pytest.fixture(params=["features", "images"])
def bundle(request: pytest.FixtureRequest) -> Path:
    """Each of the two kinds of bundles."""
    return Path(request.getfixturevalue(f"{request.param}_bundle"))


@pytest.fixture
def on(parts: Open, tmp_path: Path) -> Callable[..., None]:
    """Run a test's body on label spaces with a bundle."""

    def run(bundle: Path, body: Callable[[Parts], Coroutine[Any, Any, None]], **settings: Any) -> None:
        async def whole() -> None:
            async with parts(bundle, tmp_path / "serve", **settings) as opened:
                await body(opened)

        asyncio.run(whole())

    return run


async def a_space(parts: Parts, photo: Photo, *colours: str, shots: int = 2, name: str = "colours") -> str:
    space = await parts.spaces.create(name)
    for colour in colours:
        uploads = [parts.upload(photo(colour, shade)) for shade in range(shots)]
        await parts.spaces.add_class(space.id, colour, uploads)
    return space.id


async def ask(parts: Parts, space: str, *photos: bytes) -> tuple[Answer, ...]:
    return (await parts.spaces.classify(space, [parts.upload(each) for each in photos], soon())).answers


async def ids(parts: Parts, space: str) -> dict[str, str]:
    return {each.name: each.id for each in (await parts.spaces.classes(space))[1]}


def test_a_note_that_cannot_be_made_in_time_refuses_no_photo(
    on: Any, features_bundle: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(opened: Parts) -> None:
        space = await a_space(opened, photo, "red", "blue")

        async def late(*_: Any) -> None:
            raise Problem("too_late", "no answer in time", retry_after=1)

        monkeypatch.setattr(opened.spaces._answering, "judge", late)
        written = await opened.spaces.add_class(space, "green", [opened.upload(photo("green"))])
        assert (len(written.photos), written.notes) == (1, ())

    on(features_bundle, body)


def test_pixels_that_another_model_would_take_otherwise_are_asked_for_anew(
    on: Any, features_bundle: Path, photo: Photo
) -> None:
    """Seen in review: they have no file to decode again, and the champion may change within a request: it was a 500."""

    async def body(opened: Parts) -> None:
        space = await a_space(opened, photo, "red", "blue")
        before = Upload(b"", np.zeros((3, 8, 8), np.uint8), ImageRule(size=8, channels=3))
        with pytest.raises(Problem, match="ask anew") as refused:
            await opened.spaces.classify(space, [before], soon())
        assert (refused.value.status, refused.value.retry_after) == (503, 1)

    on(features_bundle, body)


def champion(path: Path) -> Champion:
    bundle = Bundle.open(path, threads=1)
    return Champion(bundle, bundle.manifest.id, "next", "2", str(path))


def changed(source: Path, folder: Path, **facts: Any) -> Path:
    """A copy of a bundle with other facts in its manifest."""
    shutil.copytree(source, folder)
    manifest = Manifest.load(source).model_copy(update=facts)
    (folder / MANIFEST).write_bytes(manifest.to_bytes())
    return folder


def test_the_next_answer_knows_a_class_that_was_added(on: Any, bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", "blue")
        answers = await ask(parts, space, photo("red", 9), photo("blue", 9))
        assert [answer.classes[0][1] for answer in answers] == ["red", "blue"]
        written = await parts.spaces.add_class(space, "yellow", [parts.upload(photo("yellow"))], who="ann")
        assert written.class_ is not None
        assert written.class_.name == "yellow"
        assert [each.id for each in written.class_.photos] == list(written.photos)
        classified = await parts.spaces.classify(space, [parts.upload(photo("yellow", 9))], soon())
        [answer] = classified.answers
        assert answer.classes[0][:2] == (written.class_.id, "yellow")
        assert (classified.revision, classified.champion) == (4, parts.champions.current)
        assert [name for _, name in classified.classes] == ["red", "blue", "yellow"]
        assert answer.logits.shape == (3,)

    on(bundle, body)


def test_an_answer_has_class_probability_decision_and_evidence(on: Any, features_bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", "blue", "green", "yellow")
        known, none_of_these = await ask(parts, space, photo("red", 9), photo("black", 9))
        assert (known.decision, known.class_name) == ("match", "red")
        assert known.class_id == (await ids(parts, space))["red"]
        assert 0.5 <= known.probability <= 1
        assert known.probability == known.classes[0][2] >= known.classes[1][2]
        assert sum(share for *_, share in known.classes) == pytest.approx(1, abs=1e-5)
        assert [class_ for _, class_, _ in known.evidence[:2]] == [known.class_id] * 2
        similarities = [similarity for *_, similarity in known.evidence]
        assert len(similarities) == 3
        assert similarities == sorted(similarities, reverse=True)
        assert (none_of_these.decision, none_of_these.class_id, none_of_these.class_name) == ("unknown", None, None)
        assert none_of_these.classes
        assert b'kshot_decisions_total{decision="unknown"} 1.0' in parts.metrics.exposition("")[0]

    on(features_bundle, body)


def test_evidence_is_seen_with_the_adapted_learner_s_eyes(on: Any, images_bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", "blue")
        [answer] = await ask(parts, space, photo("blue", 9))
        assert [class_ for _, class_, _ in answer.evidence[:2]] == [(await ids(parts, space))["blue"]] * 2

    on(images_bundle, body)


def test_answers_equal_those_of_the_bundle_by_itself(on: Any, bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", "blue", "yellow")
        asked = [photo(colour, 30 + i) for i, colour in enumerate(("red", "blue", "yellow", "grey", "white"))]
        alone = Bundle.open(bundle, threads=1)
        support = [(photo(colour, shade), colour) for colour in ("red", "blue", "yellow") for shade in range(2)]
        state = alone.adapt(*zip(*support, strict=True))
        expected = alone.classify(state, asked)
        for answers in (await ask(parts, space, *asked), [(await ask(parts, space, each))[0] for each in asked]):
            np.testing.assert_allclose([answer.logits for answer in answers], expected.logits, rtol=1e-3, atol=1e-3)
            assert [answer.classes[0][1] for answer in answers] == expected.names
            assert [answer.decision != "unknown" for answer in answers] == expected.known.tolist()

    on(bundle, body)


def test_one_class_alone_is_told_from_what_is_none(on: Any, bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red")
        known, strange = await ask(parts, space, photo("red", 9), photo("green", 9))
        assert (known.decision, known.class_name) == ("match", "red")
        assert strange.decision == "unknown"
        assert known.probability > 0.5 > strange.probability

    on(bundle, body)


def test_a_label_space_without_photos_cannot_answer_and_says_what_to_do(on: Any, bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", shots=1)
        [class_] = (await parts.spaces.classes(space))[1]
        await parts.spaces.delete_photo(space, class_.photos[0].id)
        with pytest.raises(Problem, match="add one") as caught:
            await ask(parts, space, photo("red"))
        assert caught.value.code == "too_few_classes"
        await parts.spaces.add_class(space, "blue", [parts.upload(photo("blue"))])
        [answer] = await ask(parts, space, photo("blue", 9))  # the empty class takes no part
        assert [name for _, name, _ in answer.classes] == ["blue"]

    on(bundle, body)


def test_a_stricter_share_to_accept_makes_more_unknown_and_null_goes_back(
    on: Any, features_bundle: Path, photo: Photo
) -> None:
    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", "blue", shots=1)
        rule = parts.champions.current.bundle.manifest.image
        fading = np.linspace((20, 20, 235), (240, 240, 235), 30).astype(np.uint8)  # from blue to white
        photos = [Upload(b"", np.broadcast_to(tint[:, None, None], rule.shape), rule) for tint in fading]

        async def accepted() -> int:
            answers = (await parts.spaces.classify(space, photos, soon())).answers
            return sum(answer.decision != "unknown" for answer in answers)

        usual = await accepted()
        assert (await parts.spaces.change(space, accept=0.5)).accept == 0.5
        strict = await accepted()
        assert strict < usual
        assert (await parts.spaces.change(space, accept=None)).accept is None
        assert await accepted() == usual
        assert (await parts.spaces.get(space)).name == "colours"
        await parts.spaces.rollback(space, 4)
        assert await accepted() == strict

    on(features_bundle, body)


def test_a_name_changes_and_nothing_is_adapted_again(on: Any, images_bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", "blue")
        await ask(parts, space, photo("red"))
        adapted = parts.metrics.registry.get_sample_value("kshot_stage_seconds_count", {"stage": "adapt"})
        red = (await ids(parts, space))["red"]
        await parts.spaces.rename_class(space, red, "rouge")
        assert (await parts.spaces.change(space, name="couleurs", accept=KEEP)).name == "couleurs"
        [answer] = await ask(parts, space, photo("red", 9))
        assert "rouge" in [name for _, name, _ in answer.classes]
        assert parts.metrics.registry.get_sample_value("kshot_stage_seconds_count", {"stage": "adapt"}) == adapted

    on(images_bundle, body)


def test_going_back_gives_the_same_answers_to_the_bit(on: Any, bundle: Path, photo: Photo) -> None:
    """M5 of the feature table."""

    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", "blue")
        golden = [photo(colour, shade) for colour in ("red", "blue", "grey") for shade in range(40, 50)]
        before = await ask(parts, space, *golden)
        await parts.spaces.add_class(space, "grey", [parts.upload(photo("grey"))])
        assert len((await ask(parts, space, photo("grey")))[0].logits) == 3
        written = await parts.spaces.rollback(space, 3, who="ann")
        assert (written.revision, written.gone) == (5, ())
        after = await ask(parts, space, *golden)
        np.testing.assert_array_equal([a.logits for a in after], [a.logits for a in before])
        assert [(a.classes, a.decision, a.evidence) for a in after] == [
            (a.classes, a.decision, a.evidence) for a in before
        ]

    on(bundle, body)


def test_a_deleted_class_is_in_no_answer_and_no_memory(on: Any, bundle: Path, photo: Photo) -> None:
    """M4 of the feature table; LandingLens cannot delete a class at all."""

    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", "blue", "green")
        await ask(parts, space, photo("red"))
        assert parts.metrics.registry.get_sample_value("kshot_state_bytes") > 0
        blue = (await ids(parts, space))["blue"]
        await parts.spaces.delete_class(space, blue)
        assert parts.metrics.registry.get_sample_value("kshot_state_bytes") == 0
        [answer] = await ask(parts, space, photo("blue", 9))
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
        space = await a_space(parts, photo, "red", "blue")
        await ask(parts, space, photo("red"))
        await parts.spaces.delete(space)
        assert parts.metrics.registry.get_sample_value("kshot_state_bytes") == 0
        assert parts.metrics.registry.get_sample_value("kshot_label_spaces") == 0
        with pytest.raises(Problem) as caught:
            await ask(parts, space, photo("red"))
        assert caught.value.code == "space_unknown"
        assert (await parts.spaces.create("colours")).id != space

    on(bundle, body)


def test_notes_tell_of_duplicates_and_of_photos_that_look_like_another_class(
    on: Any, bundle: Path, photo: Photo
) -> None:
    """S1 of the feature table: planted cases are found, and nothing is refused."""

    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", "blue", "yellow")
        red = (await ids(parts, space))["red"]
        await ask(parts, space, photo("red"))  # where images are taken, notes need the state in memory
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
        space = await a_space(parts, photo, "red", "blue")
        await ask(parts, space, photo("red"))
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
        assert "ready" in await ids(parts, space.id)
        with pytest.raises(Problem) as caught:
            await parts.spaces.add_class(space.id, "ready ", [parts.upload(photo("red"))])
        assert caught.value.code == "conflict"
        [猫, other, *_] = (await ids(parts, space.id)).values()
        with pytest.raises(Problem) as caught:
            await parts.spaces.rename_class(space.id, other, "猫")
        assert caught.value.code == "conflict"
        assert (await parts.spaces.rename_class(space.id, 猫, "猫")).revision == 8  # nothing to do

    on(features_bundle, body)


def test_the_limits_of_the_bundle_are_checked_and_nothing_is_written(
    on: Any, features_bundle: Path, tmp_path: Path, photo: Photo
) -> None:
    small = changed(features_bundle, tmp_path / "small", limits=Limits(ways=2, shots=3, support=4))

    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", "blue", shots=1)
        red = (await ids(parts, space))["red"]
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
        blue = (await ids(parts, space))["blue"]
        with pytest.raises(Problem) as caught:
            await parts.spaces.add_photos(space, blue, [parts.upload(photo("blue", shade)) for shade in (1, 2)])
        assert caught.value.reason == "support"
        assert (await parts.spaces.get(space)).revision == 4

    on(small, body)


def test_the_bytes_of_a_label_space_are_limited_until_some_are_deleted(
    on: Any, features_bundle: Path, photo: Photo
) -> None:
    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", shots=1)
        red = (await ids(parts, space))["red"]
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


MIRRORED = """
<ir_version: 9, opset_import: ["": 18]>
mirrored (uint8[N, 3, 16, 16] images) => (uint8[N, 2, 3, 16, 16] views) {
    one = Constant <value_ints = [1]> ()
    from = Constant <value_ints = [15]> ()
    to = Constant <value_ints = [-100]> ()
    back = Constant <value_ints = [-1]> ()
    mirror = Slice (images, from, to, back, back)
    first = Unsqueeze (images, one)
    second = Unsqueeze (mirror, one)
    views = Concat <axis = 1> (first, second)
}
"""


def test_what_is_kept_of_a_support_photo_is_the_mean_over_its_views(
    on: Any, features_bundle: Path, tmp_path: Path
) -> None:
    """Also of photos that came while a bundle without views served."""
    viewing = Path(shutil.copytree(features_bundle, tmp_path / "viewing"))
    onnx.save(onnx.parser.parse_model(MIRRORED), viewing / VIEWS)
    content = json.loads((viewing / MANIFEST).read_text())
    content["files"][VIEWS] = FileFacts.of((viewing / VIEWS).read_bytes()).model_dump()
    (viewing / MANIFEST).write_text(json.dumps(content))
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 16, 16), np.uint8)
    spaces = []

    async def body(parts: Parts) -> None:
        champion = parts.champions.current
        uploads = [Upload(bytes([i]), images[i], champion.bundle.manifest.image) for i in range(3)]
        spaces.append((await parts.spaces.create(f"space {len(spaces)}")).id)
        await parts.spaces.add_class(spaces[-1], "noise", uploads, deadline=soon())
        graphs = champion.bundle.graphs
        support, query = graphs.embed_support(images), graphs.embed(images)
        assert np.allclose(support, query, atol=1e-3) != graphs.makes_views
        np.testing.assert_allclose(
            support, (query + graphs.embed(images[..., :: -1 if graphs.makes_views else 1])) / 2, atol=1e-5
        )
        for space in spaces:
            await parts.spaces.classify(space, uploads, soon())
            _, kept = parts.store.support(space, features_of(champion))
            found = np.stack([np.frombuffer(kept[photo], np.float32) for photo in sorted(kept)])
            np.testing.assert_allclose(found, support, atol=1e-5)

    for bundle in (features_bundle, viewing):
        on(bundle, body)


def test_a_thousand_label_spaces_on_one_backbone_and_none_sees_another_s(
    on: Any, features_bundle: Path, photo: Photo
) -> None:
    """S15 of the feature table."""
    colours = ("red", "green", "blue", "yellow", "white", "black")

    async def body(parts: Parts) -> None:
        photos = {colour: photo(colour) for colour in colours}
        images = np.stack([parts.upload(each).pixels for each in photos.values()])
        vectors = await parts.engine.embed(parts.champions.current, images)
        features = dict(zip(colours, vectors, strict=True))
        key, mine = features_of(parts.champions.current), {}
        for number in range(1000):
            with parts.store.creating(f"tenant {number}", None, "", 10_000) as new:
                for colour in (colours[number % 6], colours[(number + 1 + number // 6 % 5) % 6]):
                    class_ = new.add_class(f"{colour} of {number}")
                    kept = {ORIGINAL: photos[colour], key: features[colour].tobytes()}
                    mine[class_] = mine[new.add_photo(class_, str(number), kept)] = number
                    spaces = mine.setdefault(new.space, number)
                    assert spaces == number
        tenants = [id_ for id_ in mine if id_.startswith("spc_")]
        asked = parts.upload(photo("red", 9))
        for start in range(0, 1000, 50):
            some = tenants[start : start + 50]
            answers = await asyncio.gather(*(parts.spaces.classify(space, [asked], soon()) for space in some))
            for space, classified in zip(some, answers, strict=True):
                seen = [each[0] for each in (*classified.classes, *classified.answers[0].evidence)]
                assert len(seen) == 4
                assert {mine[id_] for id_ in seen} == {mine[space]}
                names = [name for _, name in classified.classes]
                if any(name.startswith("red") for name in names):
                    assert classified.answers[0].classes[0][1].startswith("red")

    on(features_bundle, body)


def test_a_state_is_built_once_for_all_who_ask_at_the_same_time(on: Any, images_bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", "blue")
        count = {"stage": "adapt"}
        before = parts.metrics.registry.get_sample_value("kshot_stage_seconds_count", count) or 0
        await asyncio.gather(*(ask(parts, space, photo("red", shade)) for shade in range(20)))
        assert parts.metrics.registry.get_sample_value("kshot_stage_seconds_count", count) == before + 1

    on(images_bundle, body)


def test_who_gives_up_waiting_for_a_state_does_not_spoil_it_for_others(
    on: Any, images_bundle: Path, photo: Photo
) -> None:
    """gh:ray-project/ray#41057: cancelled clients degraded later traffic."""

    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", "blue")
        impatient, patient = (asyncio.create_task(ask(parts, space, photo("red"))) for _ in range(2))
        while not parts.spaces._states._building:
            await asyncio.sleep(0)
        impatient.cancel()
        assert [answer.classes[0][1] for answer in await patient] == ["red"]
        with pytest.raises(asyncio.CancelledError):
            await impatient

    on(images_bundle, body)


def test_states_take_no_more_memory_than_they_may(on: Any, images_bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        spaces = [await a_space(parts, photo, "red", "blue", name=f"space {i}") for i in range(4)]
        await ask(parts, spaces[0], photo("red"))
        each = int(parts.metrics.registry.get_sample_value("kshot_state_bytes") or 0)
        parts.spaces._states._room = 2 * each
        for space in (*spaces[1:], spaces[0]):
            [answer] = await ask(parts, space, photo("red", 9))
            assert answer.classes[0][1] == "red"
        assert parts.metrics.registry.get_sample_value("kshot_state_bytes") == 2 * each
        assert [space for space, _ in parts.spaces._states._kept] == [spaces[3], spaces[0]]

    on(images_bundle, body)


def test_a_class_that_is_deleted_while_its_state_is_built_is_not_kept(
    on: Any, images_bundle: Path, photo: Photo
) -> None:
    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", "blue")
        asked = asyncio.create_task(ask(parts, space, photo("red")))
        while not parts.spaces._states._building:
            await asyncio.sleep(0)
        parts.spaces._states.drop(space)
        await asked
        assert not parts.spaces._states._kept
        assert parts.metrics.registry.get_sample_value("kshot_state_bytes") == 0

    on(images_bundle, body)


def test_a_photo_comes_back_as_it_was_and_its_pixels_where_originals_are_not_kept(
    on: Any, bundle: Path, photo: Photo
) -> None:
    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", shots=1)
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
        space = await a_space(parts, photo, "red", "blue")
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
        [answer] = await ask(parts, space, photo("blue", 9))
        assert answer.classes[0][1] == "blue"

    on(bundle, body, keep_photos=False)


def test_two_photos_of_one_class_are_told_from_two_of_two_in_either_order(on: Any, bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        red, again, green = (parts.upload(photo(*args)) for args in (("red", 1), ("red", 2), ("green", 1)))
        alike, other = await parts.spaces.verify(red, again, soon()), await parts.spaces.verify(red, green, soon())
        assert (alike.same, other.same) == (True, False)
        assert alike.probability > 0.5 > other.probability
        turned = await parts.spaces.verify(green, red, soon())
        assert turned.probability == pytest.approx(other.probability, rel=1e-3)

    on(bundle, body)


def test_features_are_given_and_what_a_bundle_cannot_do_is_said(
    on: Any, bundle: Path, tmp_path: Path, photo: Photo
) -> None:
    bare = changed(bundle, tmp_path / "bare", verification=None, calibration=())

    async def body(parts: Parts) -> None:
        uploads = [parts.upload(photo("red")), parts.upload(photo("blue"))]
        vectors, by = await parts.spaces.embed(uploads, soon())
        np.testing.assert_allclose(
            vectors, by.bundle.graphs.embed(np.stack([each.pixels for each in uploads])), rtol=1e-4, atol=1e-5
        )
        with pytest.raises(Problem) as caught:
            await parts.spaces.verify(*uploads, soon())
        assert caught.value.code == "not_supported"
        for nothing in (parts.spaces.embed([], soon()), parts.spaces.classify("", [], soon())):
            with pytest.raises(Problem):
                await nothing
        space = await a_space(parts, photo, "red", "blue")
        [answer] = await ask(parts, space, photo("green"))
        assert answer.decision != "unknown"  # nothing was measured that would tell

    on(bare, body)


def test_a_photo_that_another_champion_s_rule_decoded_is_decoded_again(
    on: Any, features_bundle: Path, photo: Photo
) -> None:
    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", "blue")
        stale = Upload(photo("red", 9), np.zeros((1, 8, 8), np.uint8), ImageRule(size=8, channels=1))
        [answer] = (await parts.spaces.classify(space, [stale], soon())).answers
        assert answer.class_name == "red"
        np.testing.assert_array_equal(answer.logits, (await ask(parts, space, photo("red", 9)))[0].logits)

    on(features_bundle, body)


# Champions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["features to images", "images to features", "another image rule"])
def test_a_new_champion_answers_at_once_from_the_photos_that_are_there(
    parts: Open, features_bundle: Path, images_bundle: Path, tmp_path: Path, photo: Photo, way: str
) -> None:
    """N5 of the feature table: a backbone is upgraded, and nobody collects photos again."""
    first, second = {
        "features to images": (features_bundle, images_bundle),
        "images to features": (images_bundle, features_bundle),
        "another image rule": (
            features_bundle,
            changed(images_bundle, tmp_path / "next", image=ImageRule(size=16, channels=3, resize="box", fit="crop")),
        ),
    }[way]

    async def body() -> None:
        async with parts(first, tmp_path / "serve") as opened:
            space = await a_space(opened, photo, "red", "blue", "yellow")
            await ask(opened, space, photo("red"))
            newcomer = champion(second)
            await opened.spaces.prepare_for(newcomer)
            assert [a.classes[0][1] for a in await ask(opened, space, photo("red", 9))] == ["red"]  # the old one still
            late = await opened.spaces.add_class(space, "white", [opened.upload(photo("white"))])  # and writes go on
            opened.champions._current = newcomer
            await opened.spaces.settled(newcomer)
            answers = await ask(opened, space, photo("red", 9), photo("blue", 9))
            assert [answer.classes[0][1] for answer in answers] == ["red", "blue"]
            alone = Bundle.open(second, threads=1)
            support = [(photo(colour, shade), colour) for colour in ("red", "blue", "yellow") for shade in range(2)]
            state = alone.adapt(*zip(*support, (photo("white"), "white"), strict=True))
            expected = alone.classify(state, [photo("red", 9), photo("blue", 9)])
            np.testing.assert_allclose([a.logits for a in answers], expected.logits, rtol=1e-3, atol=1e-3)
            # What only the old one needed goes with the next that settles.
            await opened.spaces.settled(newcomer)
            _, classes = await opened.spaces.classes(space)
            photos = [each.id for class_ in classes for each in class_.photos]
            old = champion(first)
            assert late.photos[0] in photos
            assert opened.store.contents(photos, features_of(old)) == {}
            if way == "another image rule":
                assert opened.store.contents(photos, pixels_by(old.bundle.manifest.image)) == {}

    asyncio.run(body())


def test_the_states_in_use_are_adapted_before_a_champion_takes_over(
    on: Any, images_bundle: Path, tmp_path: Path, photo: Photo
) -> None:
    newcomer = champion(_other(images_bundle, tmp_path / "next"))

    async def body(parts: Parts) -> None:
        spaces = [await a_space(parts, photo, "red", "blue", name=f"space {i}") for i in range(3)]
        await ask(parts, spaces[1], photo("red"))
        await parts.spaces.prepare_for(newcomer)
        assert [space for space, bundle in parts.spaces._states._kept if bundle == newcomer.id] == [spaces[1]]
        await parts.spaces.settled(newcomer)
        assert list(parts.spaces._states._kept) == [(spaces[1], newcomer.id)]

    on(images_bundle, body)


def test_a_champion_that_needs_originals_which_were_not_kept_is_refused_with_the_reason(
    on: Any, features_bundle: Path, tmp_path: Path, photo: Photo
) -> None:
    other = ImageRule(size=16, channels=3, fit="pad")
    newcomer = champion(changed(features_bundle, tmp_path / "next", image=other))

    async def body(parts: Parts) -> None:
        await parts.spaces.prepare_for(newcomer)  # nothing is lost while there are no photos
        await a_space(parts, photo, "red")
        with pytest.raises(Problem, match="originals were not kept") as caught:
            await parts.spaces.prepare_for(newcomer)
        assert (caught.value.code, caught.value.reason) == ("not_supported", "image")

    on(features_bundle, body, keep_photos=False)


def test_a_champion_that_adapts_to_less_than_a_label_space_holds_is_refused(
    on: Any, features_bundle: Path, tmp_path: Path, photo: Photo
) -> None:
    newcomer = champion(changed(features_bundle, tmp_path / "next", limits=Limits(ways=2, shots=5, support=10)))

    async def body(parts: Parts) -> None:
        await a_space(parts, photo, "red", "blue", "green")
        with pytest.raises(Problem, match="a label space has 3 classes, and this bundle adapts to at most 2"):
            await parts.spaces.prepare_for(newcomer)

    on(features_bundle, body)


def test_photos_that_come_while_a_champion_is_prepared_are_prepared_too(
    on: Any, features_bundle: Path, tmp_path: Path, photo: Photo
) -> None:
    newcomer = champion(_other(features_bundle, tmp_path / "next"))

    async def body(parts: Parts) -> None:
        space = await a_space(parts, photo, "red", shots=5)
        preparing = asyncio.create_task(parts.spaces.prepare_for(newcomer))
        await parts.spaces.add_class(space, "blue", [parts.upload(photo("blue", shade)) for shade in range(5)])
        await preparing
        parts.champions._current = newcomer
        await parts.spaces.settled(newcomer)
        [answer] = await ask(parts, space, photo("blue", 9))
        assert answer.class_name == "blue"
        assert parts.store.lacking([features_of(newcomer)], 10) == []

    on(features_bundle, body)


def test_a_server_restarted_with_another_bundle_adapts_to_the_same_photos(
    parts: Open, features_bundle: Path, images_bundle: Path, tmp_path: Path, photo: Photo
) -> None:
    async def first() -> str:
        async with parts(features_bundle, tmp_path / "serve") as opened:
            return await a_space(opened, photo, "red", "blue")

    async def then(space: str) -> None:
        async with parts(images_bundle, tmp_path / "serve") as opened:
            assert [a.classes[0][1] for a in await ask(opened, space, photo("blue", 9))] == ["blue"]

    asyncio.run(then(asyncio.run(first())))


def _other(source: Path, folder: Path) -> Path:
    """A bundle with the same graphs but for a note in one of them: another id."""
    import onnx

    from kshot_runtime.manifest import ADAPT, FileFacts

    shutil.copytree(source, folder)
    model = onnx.load(folder / ADAPT)
    model.doc_string = "the same, again"
    (folder / ADAPT).write_bytes(model.SerializeToString())
    facts = json.loads((folder / MANIFEST).read_bytes())
    facts["files"][ADAPT] = FileFacts.of((folder / ADAPT).read_bytes()).model_dump()
    (folder / MANIFEST).write_text(json.dumps(facts))
    return folder
