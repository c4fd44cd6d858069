"""Label spaces on a bundle, in a test that runs in an event loop."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kshot_runtime.manifest import MANIFEST, Manifest

if TYPE_CHECKING:
    from tests.kshot_serve.conftest import Parts  # never at run time: tests are no packages

Open = Callable[..., "AbstractAsyncContextManager[Parts]"]


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


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """changed(bundle, **facts): a copy with other facts in its manifest."""

    def copy(bundle: Path, **facts: Any) -> Path:
        folder = Path(shutil.copytree(bundle, tmp_path / "changed"))
        (folder / MANIFEST).write_bytes(Manifest.load(bundle).model_copy(update=facts).to_bytes())
        return folder

    return copy
