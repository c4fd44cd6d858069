"""Tries a registered version in a child process: fetched, loaded and warmed there before the server loads it itself.

A graph that never ends, or that takes its process with it, does so where nobody is served.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import threading
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kshot_runtime.errors import KshotError
from kshot_runtime.manifest import BundleError
from kshot_serve.models.registry import RegisteredVersion, Registry, RegistryError
from kshot_serve.models.shelf import Shelf
from kshot_serve.models.warmup import Loader
from kshot_serve.settings import Settings

log = logging.getLogger(__name__)

_TAIL = 2000  # characters of what a crashed child wrote to standard error, for the log


class CandidateError(BundleError):
    """A version that hung or crashed when it was tried; it may not the next time."""


class StuckError(CandidateError):
    """It was not loaded and warm in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"it was not loaded and warm within {seconds:g} s (candidate_s)")


async def try_out(version: RegisteredVersion, settings: Settings, loader: Loader) -> Path:
    """The folder of a version that another process of this kind has fetched, loaded and warmed.

    A RegistryError if it could not be fetched, a BundleError if it fails a check, a CandidateError if it hung or
    crashed; within `candidate_s` in any case.
    """
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", __name__, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
    )  # a terminal's Ctrl-C is not for it
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    told: dict[str, Any] = {}
    wrote = asyncio.create_task(child.stderr.read())
    try:
        async with asyncio.timeout(settings.candidate_s):
            task = {"version": asdict(version), "settings": settings.model_dump(mode="json"), "loader": asdict(loader)}
            child.stdin.write(json.dumps(task).encode() + b"\n")  # and stays open for as long as somebody waits
            async for line in child.stdout:
                told |= json.loads(line)
            code = await child.wait()
    except TimeoutError:
        if "folder" in told:
            raise StuckError(settings.candidate_s) from None
        raise RegistryError(f"{version} was not fetched within {settings.candidate_s:g} s (candidate_s)") from None
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        errors = (await wrote).decode(errors="replace")
        await child.wait()
    if "warm" in told:
        return Path(told["folder"])
    if "failed" in told:
        raise (RegistryError if told["again"] else BundleError)(told["failed"])
    log.error("the process that tried %s wrote: %s", version, errors[-_TAIL:])
    raise CandidateError(f"the process that tried it ended with {code}")


def _child() -> None:
    """Do what standard input asks for; the answers are lines on standard output."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # for whatever a library prints
    settings, version = Settings(**task["settings"]), RegisteredVersion(**task["version"])
    try:
        registry = Registry(settings.source, settings.registry)
        folder = Shelf(settings.champions).fetch(registry, version, unpinned=settings.unpinned)
        print(json.dumps({"folder": str(folder)}), file=answers)
        Loader(**task["loader"])(folder)
        print(json.dumps({"warm": True}), file=answers)
    except KshotError as error:
        print(json.dumps({"failed": str(error), "again": isinstance(error, RegistryError)}), file=answers)
    answers.close()
    os._exit(0)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    _child()
