"""Names of label spaces and classes: which are refused, and which are noted as alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from kshot_serve.errors import Problem
from kshot_serve.spaces.names import alike, named


@pytest.mark.parametrize(
    "name", ["\u115f", "\u3164", "\u115f \u1160", "\uffa0", "\u2800\u2800", "\u0301", "\u200d", "\ufe0f"]
)
def test_a_name_without_a_visible_character_is_refused(name: str) -> None:
    with pytest.raises(Problem, match="visible character"):
        named(name, "a class")


@pytest.mark.parametrize("name", ["a", "7", "?", "🥭", "猫", "ネコ", "قط", "e\u0301", "👩\u200d🔬", "한"])
def test_names_of_any_script_are_taken(name: str) -> None:
    assert named(name, "a class")


@pytest.mark.parametrize(
    "name", ["mango", "MANGO", "Ｍａｎｇｏ", "Mаngо", "МаnGo", "Mango\u3164", "Man go", "Man\u200dgo", "Μango"]
)
def test_a_name_that_looks_like_another_is_noted(name: str) -> None:
    assert alike(name, ["Mangold", "Mango"]) == ["the name looks like that of class 'Mango'"]


def test_other_names_and_the_name_itself_are_not() -> None:
    assert alike("Mango", ["Mango", "Mangö", "Tango", "mangos"]) == []


async def _added(parts: Any, bundle: Path, folder: Path, photo: Callable[..., bytes]) -> list[tuple[str, ...]]:
    async with parts(bundle, folder) as there:
        space = await there.spaces.create("fruit")
        notes = []
        for shade, name in enumerate(("Mango", "mango", "Kiwi")):
            added = await there.spaces.add_class(space.id, name, [there.upload(photo("red", shade=shade))])
            notes.append([note for note in added.notes if "name" in note])
        renamed = await there.spaces.rename_class(space.id, added.class_.id, "MANGO")
        return [*notes, list(renamed.notes)]


def test_adding_and_renaming_a_class_tell_of_names_that_look_alike(
    parts: Callable[..., AbstractAsyncContextManager[Any]],
    features_bundle: Path,
    tmp_path: Path,
    photo: Callable[..., bytes],
) -> None:
    notes = asyncio.run(_added(parts, features_bundle, tmp_path, photo))
    like = "the name looks like that of class {!r}".format
    assert notes == [[], [like("Mango")], [], [like("Mango"), like("mango")]]
