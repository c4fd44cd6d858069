"""Adapted states: built once, bounded in memory, and of one label space only."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

from kshot_runtime.manifest import MANIFEST, VIEWS, FileFacts
from kshot_serve.spaces.states import features_of
from kshot_serve.spaces.uploads import Upload
from kshot_serve.storage.values import ORIGINAL

if TYPE_CHECKING:
    from tests.kshot_serve.conftest import Parts  # never at run time: tests are no packages

Photo = Callable[..., bytes]
Open = Callable[..., "AbstractAsyncContextManager[Parts]"]


def soon() -> float:
    return time.monotonic() + 30


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
        space = await parts.a_space("red", "blue")
        count = {"stage": "adapt"}
        before = parts.metrics.registry.get_sample_value("kshot_stage_seconds_count", count) or 0
        await asyncio.gather(*(parts.ask(space, photo("red", shade)) for shade in range(20)))
        assert parts.metrics.registry.get_sample_value("kshot_stage_seconds_count", count) == before + 1

    on(images_bundle, body)


def test_who_gives_up_waiting_for_a_state_does_not_spoil_it_for_others(
    on: Any, images_bundle: Path, photo: Photo
) -> None:
    """gh:ray-project/ray#41057: cancelled clients degraded later traffic."""

    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue")
        impatient, patient = (asyncio.create_task(parts.ask(space, photo("red"))) for _ in range(2))
        while not parts.spaces._states._building:
            await asyncio.sleep(0)
        impatient.cancel()
        assert [answer.classes[0][1] for answer in await patient] == ["red"]
        with pytest.raises(asyncio.CancelledError):
            await impatient

    on(images_bundle, body)


def test_states_take_no_more_memory_than_they_may(on: Any, images_bundle: Path, photo: Photo) -> None:
    async def body(parts: Parts) -> None:
        spaces = [await parts.a_space("red", "blue", name=f"space {i}") for i in range(4)]
        await parts.ask(spaces[0], photo("red"))
        each = int(parts.metrics.registry.get_sample_value("kshot_state_bytes") or 0)
        parts.spaces._states._room = 2 * each
        for space in (*spaces[1:], spaces[0]):
            [answer] = await parts.ask(space, photo("red", 9))
            assert answer.classes[0][1] == "red"
        assert parts.metrics.registry.get_sample_value("kshot_state_bytes") == 2 * each
        assert [space for space, _ in parts.spaces._states._kept] == [spaces[3], spaces[0]]

    on(images_bundle, body)


def test_a_class_that_is_deleted_while_its_state_is_built_is_not_kept(
    on: Any, images_bundle: Path, photo: Photo
) -> None:
    async def body(parts: Parts) -> None:
        space = await parts.a_space("red", "blue")
        asked = asyncio.create_task(parts.ask(space, photo("red")))
        while not parts.spaces._states._building:
            await asyncio.sleep(0)
        parts.spaces._states.drop(space)
        await asked
        assert not parts.spaces._states._kept
        assert parts.metrics.registry.get_sample_value("kshot_state_bytes") == 0

    on(images_bundle, body)
