"""What label spaces answer: classes, decisions and evidence, by either kind of bundle."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kshot_runtime.bundle import Bundle
from kshot_runtime.images import ImageRule
from kshot_serve.errors import Problem
from kshot_serve.spaces.uploads import Upload

if TYPE_CHECKING:
    from tests.kshot_serve.conftest import Parts  # never at run time: tests are no packages

Photo = Callable[..., bytes]
Changed = Callable[..., Path]  # of conftest.py
Open = Callable[..., "AbstractAsyncContextManager[Parts]"]


def soon() -> float:
    return time.monotonic() + 30


def fading(parts: Parts) -> list[Upload]:
    """From blue to white."""
    rule = parts.champions.current.bundle.manifest.image
    tints = np.linspace((20, 20, 235), (240, 240, 235), 30).astype(np.uint8)
    return [Upload(b"", np.broadcast_to(tint[:, None, None], rule.shape), rule) for tint in tints]


def test_pixels_that_another_model_would_take_otherwise_are_asked_for_anew(
    on: Any, features_bundle: Path, photo: Photo
) -> None:
    """Seen in review: they have no file to decode again, and the champion may change within a request: it was a 500."""

    async def body(opened: Parts) -> None:
        space = await opened.a_space("red", "blue")
        before = Upload(b"", np.zeros((3, 8, 8), np.uint8), ImageRule(size=8, channels=3))
        with pytest.raises(Problem, match="ask anew") as refused:
            await opened.spaces.classify(space, [before], soon())
        assert (refused.value.status, refused.value.retry_after) == (503, 1)

    on(features_bundle, body)


def test_the_next_answer_knows_a_class_that_was_added(on: Any, bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue")
        answers = await parts.ask(space, photo("red", 9), photo("blue", 9))
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
        space = await parts.a_space("red", "blue", "green", "yellow")
        known, none_of_these = await parts.ask(space, photo("red", 9), photo("black", 9))
        assert (known.decision, known.class_name) == ("match", "red")
        assert known.class_id == (await parts.ids(space))["red"]
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
        space = await parts.a_space("red", "blue")
        [answer] = await parts.ask(space, photo("blue", 9))
        assert [class_ for _, class_, _ in answer.evidence[:2]] == [(await parts.ids(space))["blue"]] * 2

    on(images_bundle, body)


def test_answers_equal_those_of_the_bundle_by_itself(on: Any, bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue", "yellow")
        asked = [photo(colour, 30 + i) for i, colour in enumerate(("red", "blue", "yellow", "grey", "white"))]
        alone = Bundle.open(bundle, threads=1)
        support = [(photo(colour, shade), colour) for colour in ("red", "blue", "yellow") for shade in range(2)]
        state = alone.adapt(*zip(*support, strict=True))
        expected = alone.classify(state, asked)
        for answers in (await parts.ask(space, *asked), [(await parts.ask(space, each))[0] for each in asked]):
            np.testing.assert_allclose([answer.logits for answer in answers], expected.logits, rtol=1e-3, atol=1e-3)
            assert [answer.classes[0][1] for answer in answers] == expected.names
            assert [answer.decision != "unknown" for answer in answers] == expected.known.tolist()

    on(bundle, body)


def test_one_class_alone_is_told_from_what_is_none(on: Any, bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await parts.a_space("red")
        known, strange = await parts.ask(space, photo("red", 9), photo("green", 9))
        assert (known.decision, known.class_name) == ("match", "red")
        assert strange.decision == "unknown"
        assert known.probability > 0.5 > strange.probability

    on(bundle, body)


def test_a_label_space_without_photos_cannot_answer_and_says_what_to_do(on: Any, bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", shots=1)
        [class_] = (await parts.spaces.classes(space))[1]
        await parts.spaces.delete_photo(space, class_.photos[0].id)
        with pytest.raises(Problem, match="add one") as caught:
            await parts.ask(space, photo("red"))
        assert caught.value.code == "too_few_classes"
        await parts.spaces.add_class(space, "blue", [parts.upload(photo("blue"))])
        [answer] = await parts.ask(space, photo("blue", 9))  # the empty class takes no part
        assert [name for _, name, _ in answer.classes] == ["blue"]

    on(bundle, body)


def test_a_stricter_share_to_accept_makes_more_unknown_and_null_goes_back(
    on: Any, features_bundle: Path, photo: Photo
) -> None:
    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue", shots=1)
        photos = fading(parts)

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


def test_a_label_space_without_a_share_of_its_own_has_the_server_s(on: Any, features_bundle: Path) -> None:
    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue", shots=1)
        photos = fading(parts)

        async def known() -> int:
            answers = (await parts.spaces.classify(space, photos, soon())).answers
            return sum(answer.decision != "unknown" for answer in answers)

        of_the_server = await known()
        assert (await parts.spaces.change(space, accept=0.99)).accept == 0.99
        assert await known() > of_the_server
        shown = await parts.spaces.change(space, accept=None)
        assert (shown.accept, shown.accepted) == (0.5, pytest.approx(0.5))
        assert await known() == of_the_server

    on(features_bundle, body, accept=0.5)


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
    on: Any, bundle: Path, changed: Changed, photo: Photo
) -> None:
    bare = changed(bundle, verification=None, calibration=())

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
        space = await parts.a_space("red", "blue")
        [answer] = await parts.ask(space, photo("green"))
        assert answer.decision != "unknown"  # nothing was measured that would tell
        shown = await parts.spaces.get(space)
        assert (shown.accepted, shown.false_accepts) == (None, None)

    on(bare, body)


def test_a_photo_that_another_champion_s_rule_decoded_is_decoded_again(
    on: Any, features_bundle: Path, photo: Photo
) -> None:
    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue")
        stale = Upload(photo("red", 9), np.zeros((1, 8, 8), np.uint8), ImageRule(size=8, channels=1))
        [answer] = (await parts.spaces.classify(space, [stale], soon())).answers
        assert answer.class_name == "red"
        np.testing.assert_array_equal(answer.logits, (await parts.ask(space, photo("red", 9)))[0].logits)

    on(features_bundle, body)
