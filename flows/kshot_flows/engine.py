"""Prefect around plain functions: steps as tasks whose results are kept by content, and a server where none is set up.

A result is a small file under `.kshot/steps`, named by its key. It says where things are, so these are looked at
before the result is used again; what is gone or changed is made anew.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from filelock import FileLock, Timeout

import kshot_flows  # noqa: F401  (first: it switches telemetry off)

# Prefect reads these when it is imported. Steps speak for themselves, and a stopping server complains of what it stops.
os.environ.setdefault("PREFECT_LOGGING_SERVER_LEVEL", "CRITICAL")

from prefect import get_client, task
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.events.worker import EventsWorker
from prefect.filesystems import LocalFileSystem
from prefect.locking.protocol import LockManager
from prefect.results import ResultStore
from prefect.settings import (
    PREFECT_API_BLOCKS_REGISTER_ON_START,
    PREFECT_API_DATABASE_CONNECTION_URL,
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_LOGGING_TO_API_ENABLED,
    PREFECT_UI_ENABLED,
    temporary_settings,
)
from prefect.transactions import IsolationLevel, Transaction, get_transaction

from kshot_flows import progress, tracking
from kshot_flows.products import Product
from kshot_runtime.errors import KshotError

P = ParamSpec("P")
R = TypeVar("R", bound=Product)


@dataclass(frozen=True)
class Done:
    """A step that has come to its end."""

    step: str
    product: Product
    reused: bool
    seconds: float


_journal: ContextVar[list[Done]] = ContextVar("journal")
_recalling: ContextVar[bool] = ContextVar("recalling", default=False)


class _NothingKept(Exception):  # noqa: N818  (no error)
    """A step has no result that can be used again."""


@contextmanager
def journal() -> Iterator[list[Done]]:
    """The steps that come to their end inside the block, in order."""
    done: list[Done] = []
    token = _journal.set(done)
    try:
        yield done
    finally:
        _journal.reset(token)


def step(
    title: str, key: Callable[P, str], undo: Callable[[R], None] | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function a task of the pipeline; its result is used again wherever `key` of its arguments is the same.

    `undo` takes the result back if a later step in the same transaction fails.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            # Prefect pickles the whole pipeline to run it on a schedule, so nothing unpicklable is named here.
            return cast(R, _perform(title, function, key, undo, *args, **kwargs))

        return run

    return decorate


def _perform(
    title: str,
    function: Callable[..., Product],
    key: Callable[..., str],
    undo: Callable[[Any], None] | None,
    *args: Any,
    **kwargs: Any,
) -> Product:
    began = time.monotonic()
    if _recalling.get():
        product, reused = _recall(key(*args, **kwargs)), True
    else:
        progress.say(f"[bold]{title}[/bold]")
        state = _task(title, function, _usable(key(*args, **kwargs)), undo)(*args, return_state=True, **kwargs)
        product, reused = state.result(), state.name == "Cached"
        if reused:
            progress.say("  nothing has changed: the earlier result is used again")
    if (done := _journal.get(None)) is not None:
        done.append(Done(title, product, reused, time.monotonic() - began))
    return product


def recalled(pipeline: Callable[[], object]) -> list[Done] | None:
    """The steps of a pipeline if each has a result that can be used again; None if anything is left to do.

    With the keys and the store of a real run, but without Prefect's server, which takes longer than the looking up.
    """
    token = _recalling.set(True)
    try:
        with journal() as done:
            pipeline()
        return done
    except _NothingKept:
        return None
    finally:
        _recalling.reset(token)


def recalling() -> bool:
    """Whether we are in a `recalled` pipeline, which says nothing because it may give up."""
    return _recalling.get()


def _usable(key: str) -> str:
    """The key, when nothing lies under it that cannot be used again: Prefect would use whatever it finds there.

    Done before Prefect is asked, which takes an error in making a key for leave to work without one.
    """
    try:
        _recall(key)
    except _NothingKept:
        (_results() / key).unlink(missing_ok=True)
    return key


def _task(title: str, function: Callable[..., R], key: str, undo: Callable[[R], None] | None) -> Any:
    """Made at every call, because where results are kept depends on the project that we are in."""
    policy = CacheKeyFnPolicy(
        cache_key_fn=lambda *_: key,
        isolation_level=IsolationLevel.SERIALIZABLE,  # of two processes with one key, one works and one waits
        lock_manager=ProcessLocks(tracking.home() / ".kshot" / "locks"),
    )

    @functools.wraps(function)
    def work(*args: Any, **kwargs: Any) -> R:
        product = function(*args, **kwargs)
        if (transaction := get_transaction()) is not None:
            transaction.set("product", product)  # for taking it back
        return product

    made = task(work, name=title, cache_policy=policy, result_storage=_results(), result_serializer="json")
    if undo is not None:

        @made.on_rollback
        def take_back(transaction: Transaction) -> None:
            undo(transaction.get("product"))

    return made


def _results() -> Path:
    return tracking.home() / ".kshot" / "steps"


def _recall(key: str) -> Product:
    """The kept result of a key, if its things are still there and unchanged."""
    if not (_results() / key).exists():
        raise _NothingKept
    try:
        product: Product = ResultStore(result_storage=LocalFileSystem(basepath=str(_results()))).read(key).result
    except Exception:  # written by another kshot, or cut off
        raise _NothingKept from None
    if not product.intact():  # an error here, say of the registry, does not mean that it is gone
        raise _NothingKept
    return product


class ProcessLocks(LockManager):
    """Locks that the operating system frees with their process: one that is killed must not block the next.

    Prefect's own file locks stay behind after kill -9, and whoever comes next waits for ever.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: dict[str, tuple[str, FileLock]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ProcessLocks:
        return self  # Prefect copies policies; a lock is one thing

    def acquire_lock(
        self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None
    ) -> bool:
        if self.is_lock_holder(key, holder):
            return True
        lock = self._lock(key)
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                progress.say("  another process is at this very step; waiting for it")
                lock.acquire(timeout=-1 if acquire_timeout is None else acquire_timeout)
        except Timeout:
            return False
        self._held[key] = (holder, lock)
        return True

    async def aacquire_lock(
        self, key: str, holder: str, acquire_timeout: float | None = None, hold_timeout: float | None = None
    ) -> bool:
        return self.acquire_lock(key, holder, acquire_timeout, hold_timeout)

    def release_lock(self, key: str, holder: str) -> None:
        if not self.is_lock_holder(key, holder):
            raise ValueError(f"{holder} does not hold the lock of {key}")
        self._held.pop(key)[1].release()

    def is_locked(self, key: str) -> bool:
        return key in self._held or not self.wait_for_lock(key, 0)

    def is_lock_holder(self, key: str, holder: str) -> bool:
        return key in self._held and self._held[key][0] == holder

    def wait_for_lock(self, key: str, timeout: float | None = None) -> bool:
        try:
            with self._lock(key).acquire(timeout=-1 if timeout is None else timeout):
                return True
        except Timeout:
            return False

    async def await_for_lock(self, key: str, timeout: float | None = None) -> bool:
        return self.wait_for_lock(key, timeout)

    def _lock(self, key: str) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / f"{key}.lock", thread_local=False)


def configured() -> bool:
    """Whether the user has set up a Prefect server."""
    return bool(PREFECT_API_URL.value())


@contextmanager
def api(*, schedules: bool = False) -> Iterator[str]:
    """A Prefect API for the block: the one that is set up (PREFECT_API_URL or a profile), or else one of our own.

    Ours runs in a thread, so it ends with this process however that ends, and starts in two seconds where Prefect's
    own takes eight. It keeps its records in `.kshot/prefect.db`. With `schedules` it also fires them.
    """
    quiet = {PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}  # its thread would add a second to every flow
    if url := PREFECT_API_URL.value():
        with temporary_settings(quiet):
            with get_client(sync_client=True) as client:
                failure = client.api_healthcheck()
            if failure:
                raise KshotError(
                    f"no Prefect server answers at {url} ({failure}). Start it, or unset PREFECT_API_URL (and see "
                    "`prefect config view`) to run without one."
                )
            yield url
        return
    folder = tracking.home() / ".kshot"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        **quiet,
        PREFECT_API_DATABASE_CONNECTION_URL: f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
        PREFECT_API_BLOCKS_REGISTER_ON_START: False,
        PREFECT_LOGGING_TO_API_ENABLED: False,
        PREFECT_UI_ENABLED: False,
    }
    with temporary_settings(settings), _server(folder, schedules) as url, temporary_settings({PREFECT_API_URL: url}):
        yield url


@contextmanager
def _server(folder: Path, schedules: bool) -> Iterator[str]:
    import uvicorn
    from prefect.server.api.server import create_app

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = create_app(ephemeral=not schedules, final=True, ignore_cache=True)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        # Settings are context variables, which a new thread does not inherit.
        context = copy_context()
        thread = threading.Thread(target=context.run, args=(server.run, [listening]), name="prefect", daemon=True)
        with FileLock(folder / "prefect.lock"):  # the first start makes the tables
            thread.start()
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError(f"Prefect's server did not start; see {folder / 'prefect.db'}")
                time.sleep(0.02)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        finally:
            EventsWorker.drain_all(timeout=10)  # what happened is sent on by a thread of its own
            server.should_exit = True
            thread.join(timeout=10)
