"""Label spaces while the champion changes: nobody collects photos again."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from kshot_runtime.bundle import Bundle
from kshot_runtime.images import ImageRule
from kshot_runtime.manifest import ADAPT, MANIFEST, FileFacts, Limits
from kshot_serve.errors import Problem
from kshot_serve.models.champion import Champion
from kshot_serve.spaces.states import features_of, pixels_by

if TYPE_CHECKING:
    from tests.kshot_serve.conftest import Parts  # never at run time: tests are no packages

Photo = Callable[..., bytes]
Changed = Callable[..., Path]  # of conftest.py
Open = Callable[..., "AbstractAsyncContextManager[Parts]"]


def champion(path: Path) -> Champion:
    bundle = Bundle.open(path, threads=1)
    return Champion(bundle, bundle.manifest.id, "next", "2", str(path))


def other(source: Path, folder: Path) -> Path:
    """A bundle with the same graphs but for a note in one of them: another id."""
    shutil.copytree(source, folder)
    model = onnx.load(folder / ADAPT)
    model.doc_string = "the same, again"
    (folder / ADAPT).write_bytes(model.SerializeToString())
    facts = json.loads((folder / MANIFEST).read_bytes())
    facts["files"][ADAPT] = FileFacts.of((folder / ADAPT).read_bytes()).model_dump()
    (folder / MANIFEST).write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("way", ["features to images", "images to features", "another image rule"])
def test_a_new_champion_answers_at_once_from_the_photos_that_are_there(
    parts: Open, features_bundle: Path, images_bundle: Path, changed: Changed, tmp_path: Path, photo: Photo, way: str
) -> None:
    """N5 of the feature table: a backbone is upgraded, and nobody collects photos again."""
    first, second = {
        "features to images": (features_bundle, images_bundle),
        "images to features": (images_bundle, features_bundle),
        "another image rule": (
            features_bundle,
            changed(images_bundle, image=ImageRule(size=16, channels=3, resize="box", fit="crop")),
        ),
    }[way]

    async def body() -> None:
        async with parts(first, tmp_path / "serve") as opened:
            space = await opened.a_space("red", "blue", "yellow")
            await opened.ask(space, photo("red"))
            newcomer = champion(second)
            await opened.spaces.prepare_for(newcomer)
            assert [a.classes[0][1] for a in await opened.ask(space, photo("red", 9))] == ["red"]  # the old one still
            late = await opened.spaces.add_class(space, "white", [opened.upload(photo("white"))])  # and writes go on
            opened.champions._current = newcomer
            await opened.spaces.settled(newcomer)
            answers = await opened.ask(space, photo("red", 9), photo("blue", 9))
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
    newcomer = champion(other(images_bundle, tmp_path / "next"))

    async def body(parts: Parts) -> None:
        spaces = [await parts.a_space("red", "blue", name=f"space {i}") for i in range(3)]
        await parts.ask(spaces[1], photo("red"))
        await parts.spaces.prepare_for(newcomer)
        assert [space for space, bundle in parts.spaces._states._kept if bundle == newcomer.id] == [spaces[1]]
        await parts.spaces.settled(newcomer)
        assert list(parts.spaces._states._kept) == [(spaces[1], newcomer.id)]

    on(images_bundle, body)


def test_a_champion_that_needs_originals_which_were_not_kept_is_refused_with_the_reason(
    on: Any, features_bundle: Path, changed: Changed, photo: Photo
) -> None:
    newcomer = champion(changed(features_bundle, image=ImageRule(size=16, channels=3, fit="pad")))

    async def body(parts: Parts) -> None:
        await parts.spaces.prepare_for(newcomer)  # nothing is lost while there are no photos
        await parts.a_space("red")
        with pytest.raises(Problem, match="originals were not kept") as caught:
            await parts.spaces.prepare_for(newcomer)
        assert (caught.value.code, caught.value.reason) == ("not_supported", "image")

    on(features_bundle, body, keep_photos=False)


def test_a_champion_that_adapts_to_less_than_a_label_space_holds_is_refused(
    on: Any, features_bundle: Path, changed: Changed, photo: Photo
) -> None:
    newcomer = champion(changed(features_bundle, limits=Limits(ways=2, shots=5, support=10)))

    async def body(parts: Parts) -> None:
        await parts.a_space("red", "blue", "green")
        with pytest.raises(Problem, match="a label space has 3 classes, and this bundle adapts to at most 2"):
            await parts.spaces.prepare_for(newcomer)

    on(features_bundle, body)


def test_photos_that_come_while_a_champion_is_prepared_are_prepared_too(
    on: Any, features_bundle: Path, tmp_path: Path, photo: Photo
) -> None:
    newcomer = champion(other(features_bundle, tmp_path / "next"))

    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", shots=5)
        preparing = asyncio.create_task(parts.spaces.prepare_for(newcomer))
        await parts.spaces.add_class(space, "blue", [parts.upload(photo("blue", shade)) for shade in range(5)])
        await preparing
        parts.champions._current = newcomer
        await parts.spaces.settled(newcomer)
        [answer] = await parts.ask(space, photo("blue", 9))
        assert answer.class_name == "blue"
        assert parts.store.lacking([features_of(newcomer)], 10) == []

    on(features_bundle, body)


def test_a_server_restarted_with_another_bundle_adapts_to_the_same_photos(
    parts: Open, features_bundle: Path, images_bundle: Path, tmp_path: Path, photo: Photo
) -> None:
    async def first() -> str:
        async with parts(features_bundle, tmp_path / "serve") as opened:
            return await opened.a_space("red", "blue")

    async def then(space: str) -> None:
        async with parts(images_bundle, tmp_path / "serve") as opened:
            assert [a.classes[0][1] for a in await opened.ask(space, photo("blue", 9))] == ["blue"]

    asyncio.run(then(asyncio.run(first())))
